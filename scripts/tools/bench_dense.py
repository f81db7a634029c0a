"""Rows of bench.py's table for small segmentation networks and detectors: their real commands on drawn images."""

import argparse
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from common.distributed import UserError
from scripts.tools import doctor, measured_run, shapes
from scripts.tools.flags import network_of
from scripts.tools.measured_run import Launch

SIDE, IMAGES = 128, 32  # pixels of an image, and how many are drawn
_BOXES = "--short_sides 96 112 128 --long_side 192 --crop_short_sides --test_short_side 128 --batch_size 2"
_MASKS = "--input_size 128 --batch_size 4 --warmup_iters 1"
DENSE = {  # flags of a case by method and stage
    "cae segmentation": f"--model upernet_cae_nano {_MASKS}",
    "cae detection": f"--model mask_rcnn_cae_nano {_BOXES}",
    "a2mim segmentation": f"--model upernet_vit_nano {_MASKS}",
    "a2mim detection": f"--model mask_rcnn_resnet_nano {_BOXES}",
    "udi segmentation": f"--arch vit_nano {_MASKS}",
    "udi detection": f"--arch vit_nano --heads narrow {_BOXES}",
}


def chosen(only: str) -> list[str]:
    """The cases whose name a regular expression matches."""
    return [case for case in DENSE if re.search(only, case)]


def rows(only: str, seconds: float, device: str) -> Iterator[tuple[str, dict[str, str] | UserError]]:
    """The chosen cases, and the cells of their rows or why they were not measured; memory is that of the process."""
    with tempfile.TemporaryDirectory() as folder:
        if cases := chosen(only):
            for split, numbers in (("training", range(IMAGES)), ("validation", range(IMAGES, IMAGES + 2))):
                shapes.write_stills(Path(folder), split, numbers, SIDE, 0)
        for case in cases:
            try:
                yield case, row(case, Path(folder), seconds, device)
            except UserError as error:
                yield case, error


def row(case: str, folder: Path, seconds: float, device: str) -> dict[str, str]:
    """The cells of a case; raises UserError if it took no steps."""
    method, stage = case.split()
    data = folder / ("ade20k" if stage == "segmentation" else "coco")
    words = [*DENSE[case].split(), "--data_path", str(data), "--output_dir", "", "--num_workers", "2"]
    own = argparse.Namespace(method=method, stage=stage, seconds=seconds, no_measure=False)
    plan = doctor.make_plan(own, [*words, "--device", device])
    on_gpu = device != "cpu" and torch.cuda.is_available()
    plan.launch = Launch(env=dict(os.environ), on_gpu=on_gpu)
    with tempfile.TemporaryDirectory() as out:
        run = measured_run.measure(plan, Path(out), evaluates=False)
    speed = measured_run.speed_of(run, 1)
    if speed is None:
        raise UserError((run.output.strip().splitlines() or [f"ended with status {run.status}"])[-1])
    parameters = re.search(r"([\d,]+) (?:trained )?parameters", run.output)
    memory = run.lines[-1]["memory"] if on_gpu else run.host
    return {
        "network": f"{stage}, {network_of(vars(plan.args))}",
        "px": f"{SIDE}",
        "batch": f"{run.images}",
        "param. M": f"{int(parameters[1].replace(',', '')) / 1e6:.1f}" if parameters else "",
        "images/s": f"{run.images / speed.step:.3g}",
        "ms/step": f"{1e3 * speed.step:.0f}",
        "data": f"{1e3 * speed.wait:.0f}",
        "peak GB": f"{memory / 1e9:.2f}",
    }
