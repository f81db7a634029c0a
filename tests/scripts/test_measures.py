"""Measures of features: their values on features whose values are known, and features of images."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets
from saim.models_vit import MODELS
from scripts.tools import measures
from scripts.tools.encoders import load as encoders
from scripts.tools.images import Part, read_pictures
from tests.support.runs import CPU


def test_rankme__counts_the_directions():
    eye = np.repeat(np.eye(8), 4, axis=0)
    assert measures.rankme(eye) == pytest.approx(8, rel=1e-4)
    assert measures.rankme(np.ones((20, 8))) == pytest.approx(1, abs=1e-3)
    assert 2 < measures.rankme(eye * [1, 1, 0.5, 0.1, 0, 0, 0, 0]) < 4
    assert measures.rankme(np.zeros((4, 8))) == pytest.approx(1, abs=1e-3)


def test_variance__of_directions_alone():
    assert measures.variance(np.ones((5, 3)) * np.arange(1, 6)[:, None]) == pytest.approx(0, abs=1e-9)
    assert measures.variance(np.array([[1, 0], [-3, 0]])) == pytest.approx(1)
    assert measures.variance(np.eye(4)) == pytest.approx(0.75)


def test_agreement__by_image():
    rows = np.random.default_rng(0).standard_normal((40, 16))
    np.testing.assert_array_equal(measures.agreement(rows, 2 * rows), 100)
    other = measures.agreement(rows, np.random.default_rng(1).standard_normal((40, 16)))
    assert other.shape == (40,)
    assert other.mean() == pytest.approx(1000 / 39, abs=10)  # chance


def test_knn_accuracy__with_fewer_images_than_neighbours():
    labels = np.array([0, 1, 1, 2])
    assert measures.knn_accuracy(np.eye(3), np.arange(3), np.eye(3)[labels], np.array([0, 1, 2, 2])) == 75


def test_features__of_images_and_of_their_middle(digits):
    torch.manual_seed(0)
    state = {"model": MODELS["vit_nano_patch16"](img_size=16, patch_size=8, num_classes=0).state_dict()}
    backbone = encoders.load_backbone("saim", "memory", state=state)
    pictures = read_pictures(digits)
    args = argparse.Namespace(batch_size=7, num_workers=0, pin_mem=False, bad_images="stop")
    part = Part(pictures.base, [3, 50, 0])
    plain, middle = (measures.features(backbone, part, args, CPU, zoom) for zoom in (1, 0.5))
    images = [datasets.read_image(path) for path, _ in part.samples]
    resized = [image.resize((18, 18), Image.Resampling.BICUBIC).crop((1, 1, 17, 17)) for image in images]
    to_tensor = encoders.eval_transform(backbone).transforms
    with torch.no_grad():
        for rows, side in ((plain, 16), (middle, 8)):
            edge = (16 - side) // 2
            views = [
                view.crop((edge, edge, 16 - edge, 16 - edge)).resize((16, 16), Image.Resampling.BICUBIC)
                for view in resized
            ]
            pixels = torch.stack([to_tensor[3](to_tensor[2](view)) for view in views])
            np.testing.assert_allclose(rows, backbone(pixels).numpy(), atol=1e-5)
