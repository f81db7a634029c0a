"""UDI's views: overlapping crops whose coordinates are known, and which patch of one is where in another.

Coordinates of a crop are (i0, j0, i1, j1) of its first and last pixel, over the image's last pixel index, float32; a
horizontal flip swaps j0 and j1, a vertical one i0 and i1. F patches per side, s sampled patches, w side of a sampling
window in patches.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ImageChops, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as tf

from common import datasets, distributed

Array = NDArray[np.float32]
Box = tuple[int, int, int, int, int, int]  # i, j, h, w of a crop; H, W of its image


Pair = tuple[int, int, NDArray[np.bool_]]  # numbers of a source and a target view; the source's sampled patches


class RandomCropCoord:
    """Random crop of a share of the image, resized to size x size pixels, with its coordinates.

    Args:
        flip: probabilities of a horizontal and of a vertical flip.
        fix_reference: keep the overlap rule for columns that upstream computes from a row.
    """

    RATIO = (3 / 4, 4 / 3)

    def __init__(
        self, size: int, scale: tuple[float, float], flip: tuple[float, float] = (0.5, 0.0), fix_reference: bool = False
    ):
        self.size, self.scale, self.flip, self.fix_reference = size, scale, flip, fix_reference

    @staticmethod
    def get_params(img: Any, scale: Sequence[float], ratio: Sequence[float]) -> Box:
        """Draw a crop; Python's generator, rows first."""
        width, height = tf.get_image_size(img)
        log_ratio = math.log(ratio[0]), math.log(ratio[1])
        for _ in range(10):
            area = random.uniform(*scale) * height * width
            aspect = math.exp(random.uniform(*log_ratio))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                i = random.randint(0, height - h)
                j = random.randint(0, width - w)
                return i, j, h, w, height, width
        w, h = width, height
        if width / height < ratio[0]:
            h = round(width / ratio[0])
        elif width / height > ratio[1]:
            w = round(height * ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w, height, width

    def get_params_ref(
        self, img: Any, scale: Sequence[float], ratio: Sequence[float], ref_crop: Sequence[float] | Array
    ) -> Box:
        """Draw a crop and move it until it overlaps the crop of coordinates ref_crop by half per axis."""
        i, j, h, w, height, width = self.get_params(img, scale, ratio)
        rows, columns = (sorted(float(x) for x in ref_crop[axis::2]) for axis in (0, 1))
        ri, r_i = (round(x * (height - 1)) for x in rows)
        rj, r_j = (round(x * (width - 1)) for x in columns)
        last_i, last_j = i + h - 1, j + w - 1
        joint_h = max(last_i, r_i) - min(i, ri)
        joint_w = max(last_j, r_j) - min(j if self.fix_reference else i, rj)  # as upstream: i
        i = _towards(i, last_i, h, ri, r_i, joint_h)
        j = _towards(j, last_j, w, rj, r_j, joint_w)
        return max(min(i, height - h), 0), max(min(j, width - w), 0), h, w, height, width

    def draw(self, img: Any, ref_crop: Array | None = None) -> tuple[tuple[int, int, int, int], list[bool], Array]:
        """A box i, j, h, w, whether it is flipped horizontally and vertically, and the view's coordinates (4,)."""
        if ref_crop is None:
            i, j, h, w, height, width = self.get_params(img, self.scale, self.RATIO)
        else:
            i, j, h, w, height, width = self.get_params_ref(img, self.scale, self.RATIO, ref_crop)
        rows, columns = max(height - 1, 1), max(width - 1, 1)
        crop = np.array([i / rows, j / columns, (i + h - 1) / rows, (j + w - 1) / columns], np.float32)
        flips = [bool(p and random.random() < p) for p in self.flip]
        crop = crop[[0, 3, 2, 1]] if flips[0] else crop
        return (i, j, h, w), flips, crop[[2, 1, 0, 3]] if flips[1] else crop

    def __call__(self, img: Any, ref_crop: Array | None = None) -> tuple[Any, Array]:
        """A view of size x size pixels, and its coordinates (4,)."""
        box, (horizontal, vertical), crop = self.draw(img, ref_crop)
        view = tf.crop(img, *box)
        view = tf.hflip(view) if horizontal else view
        view = tf.vflip(view) if vertical else view
        return tf.resize(view, [self.size, self.size], transforms.InterpolationMode.BICUBIC), crop


def _towards(first: int, last: int, side: int, ref_first: int, ref_last: int, joint: int) -> int:
    """First pixel of an interval after it has moved towards another; joint: length of what covers both."""
    ref_side = ref_last - ref_first
    least = 0.5 * min(ref_side, side)
    shift = float(joint - side - ref_side if joint > side + ref_side else 0)
    if joint >= side + ref_side - least:
        shift += least
    delta = (ref_first + ref_last) / 2 - (first + last) / 2
    return first + round(delta / (abs(delta) + 1e-5) * shift)


class Photometric:
    """Colour jitter, grayscale, blur and solarisation of a view; the same for all views.

    Views in tensors, (C, H, W) from 0 to 1, of other than three channels keep their colours; the draws are the same.
    """

    def __init__(self):
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
        self.colour = transforms.Compose([transforms.RandomApply([jitter], 0.8), transforms.RandomGrayscale(0.2)])

    def __call__(self, img: Any) -> Any:
        img = datasets.change_colours(self.colour, img)
        if random.random() < 0.5:
            return self.blur(img, 0.5 if random.random() < 0.5 else 1.0)
        img = self.blur(img, 0.1)
        return self.solarize(img) if random.random() < 0.2 else img

    @staticmethod
    def solarize(img: Any) -> Any:
        """Invert the upper half of the values."""
        if isinstance(img, Tensor):
            return torch.where(img < 128 / 255, img, 1 - img)
        return ImageChops.darker(img, ImageChops.invert(img))

    @staticmethod
    def radius(probability: float) -> float:
        """Of a blur, 0.1 to 2 pixels; 0: none."""
        return 0.0 if random.random() > probability else random.uniform(0.1, 2.0)

    def blur(self, img: Any, probability: float) -> Any:
        """Gaussian blur of a random radius."""
        radius = self.radius(probability)
        if not radius:
            return img
        if isinstance(img, Tensor):
            reach = min(math.ceil(3 * radius), min(img.shape[1:]) - 1)
            return tf.gaussian_blur(img, [2 * reach + 1] * 2, [radius] * 2)
        return img.filter(ImageFilter.GaussianBlur(radius))


class Matches(NamedTuple):
    """Sampled patches of P views, and where other views show them; shown ones in raster order, then rows of zeros."""

    count: NDArray[np.int64]  # (P,), number of the shown ones
    token: NDArray[np.int64]  # (P, s), number of the patch in its view
    corner: NDArray[np.int64]  # (P, s, 4), numbers of the four patches around it in the other view
    weight: Array  # (P, s, 4), their bilinear weights


class DataAugmentation:
    """All views of an image, and how their patches correspond.

    Args:
        global_crops_scale, local_crops_scale: shares of the image. global_size, local_size: in pixels.
        sampling_window_size_g, sampling_window_size_l: in patches; one patch per window is sampled.
        random_sampling: False takes the first patch of each window.
        fix_crop_reference: as `RandomCropCoord.fix_reference`.
        statistics: of `datasets.statistics`; (): views are uint8, which `expand` normalises by ImageNet's.
    Raises:
        ValueError: sizes that do not divide, or a window larger than a view.
    """

    CROP, PHOTOMETRIC = RandomCropCoord, Photometric

    def __init__(
        self,
        global_crops_scale: tuple[float, float],
        local_crops_scale: tuple[float, float],
        local_crops_number: int,
        global_size: int = 224,
        local_size: int = 96,
        sampling_window_size_g: int = 3,
        sampling_window_size_l: int = 2,
        patch_size: int = 16,
        random_sampling: bool = True,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        fix_crop_reference: bool = False,
        statistics: tuple = (),
    ):
        if global_size % patch_size or local_size % patch_size:
            raise ValueError(f"views of {global_size} and {local_size} pixels: expected multiples of {patch_size}")
        self.features_g, self.features_l = global_size // patch_size, local_size // patch_size
        self.window_g, self.window_l = sampling_window_size_g, sampling_window_size_l
        if not 0 < self.window_g <= self.features_g or not 0 < self.window_l <= self.features_l:
            raise ValueError(
                f"sampling windows of {self.window_g} and {self.window_l} patches: the views have {self.features_g} "
                f"and {self.features_l} per side"
            )
        self.local_crops_number, self.random_sampling = local_crops_number, random_sampling
        self.statistics = statistics
        flip = horizontal_flip, vertical_flip
        self.crop_g = self.CROP(global_size, global_crops_scale, flip, fix_crop_reference)
        self.crop_l = self.CROP(local_size, local_crops_scale, flip, fix_crop_reference)
        self.photometric = self.PHOTOMETRIC()
        last = datasets.tensor_and_normalize(*statistics) if statistics else [transforms.PILToTensor()]
        self.to_pixels = transforms.Compose(last)

    def _sampling_mask(self, feature_size: int, window_size: int) -> NDArray[np.bool_]:
        """Stratified random sampling: one patch of every window, as a mask (F * F,) in raster order.

        The strata are windows of w x w patches; where they leave a rest, their grid lies in a random corner.
        """
        grid = feature_size // window_size
        cells = torch.randint(0, window_size**2, (grid**2,)).numpy() if self.random_sampling else np.zeros(grid**2, int)
        rows = np.arange(grid).repeat(grid) * window_size + cells // window_size
        columns = np.tile(np.arange(grid), grid) * window_size + cells % window_size
        rest = feature_size - grid * window_size
        if rest > 0:
            corner = random.random()
            rows = rows + rest * (corner >= 0.5)
            columns = columns + rest * (0.25 <= corner < 0.5 or corner >= 0.75)
        mask = np.zeros((feature_size, feature_size), bool)
        mask[rows, columns] = True
        return mask.flatten()

    def _crop_intersection(self, c1: Array, c2: Array) -> Array:
        """Smallest box around two crops' coordinates; as upstream, those of flipped ones enter as they are."""
        return np.concatenate([np.minimum(c1[:2], c2[:2]), np.maximum(c1[2:], c2[2:])])

    def correspondence(self, src_crops: Array, tgt_crops: Array, mask: NDArray[np.bool_]) -> Matches:
        """The correspondence map: where in the target views the sampled patches of the source views lie.

        Patch (a, b) of F x F stands for a point of the image, the first and the last patch for the crop's border:
        x = src_0 + (a, b) / (F - 1) * (src_1 - src_0). Strictly inside the target it lies between four of its patches,
        at t = (F_g - 1) * (x - tgt_0) / (tgt_1 - tgt_0); elsewhere the patch has no match.
        Args:
            src_crops, tgt_crops: coordinates (P, 4) of the pairs, flipped ones included; targets are global views.
            mask: (F * F,), the sampled patches of the sources.
        """
        side, last = math.isqrt(len(mask)), np.float32(self.features_g - 1)
        tokens = np.flatnonzero(mask)
        line = torch.linspace(0, 1, side).numpy()  # as upstream; NumPy's differs in the last bit
        grid = np.stack([line[tokens // side], line[tokens % side]], axis=1)  # (s, 2)
        src, tgt = src_crops[:, None], tgt_crops[:, None]
        x = src[..., :2] + grid * (src[..., 2:] - src[..., :2])  # (P, s, 2)
        low, high = np.minimum(tgt[..., :2], tgt[..., 2:]), np.maximum(tgt[..., :2], tgt[..., 2:])
        shown = ((x > low) & (x < high)).all(axis=2)
        order = np.argsort(~shown, axis=1, kind="stable")  # shown ones first
        shown = np.take_along_axis(shown, order, axis=1)
        t = (np.take_along_axis(x, order[..., None], axis=1) - tgt[..., :2]) * last
        extent = tgt[..., 2:] - tgt[..., :2]
        t = np.divide(t, extent, out=np.zeros_like(t), where=shown[..., None])  # nothing is shown in a single pixel
        floor = np.floor(t)
        ceil = np.minimum(floor + 1, last)
        (wi, wj), (i, j) = (x.transpose(3, 0, 1, 2) for x in (np.stack([ceil - t, t - floor]), np.stack([floor, ceil])))
        corner = i[[0, 0, 1, 1]] * self.features_g + j[[0, 1, 0, 1]]  # (4, P, s)
        weight = wi[[0, 0, 1, 1]] * wj[[0, 1, 0, 1]] * shown
        return Matches(
            shown.sum(axis=1),
            np.where(shown, tokens[order], -1),
            corner.transpose(1, 2, 0).astype(np.int64),
            weight.transpose(1, 2, 0),
        )

    def _create_map(self, src_crop: Array, tgt_crop: Array, mask: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Upstream's form of `correspondence` for one pair: dense maps (s, F * F) and (s, F_g * F_g)."""
        found = self.correspondence(np.asarray(src_crop)[None], np.asarray(tgt_crop)[None], np.asarray(mask))
        token, corner, weight = (torch.from_numpy(x[0]) for x in (found.token, found.corner, found.weight))
        return token_map(token, len(mask)).numpy(), corner_map(corner, weight, self.features_g**2).numpy()

    def views(self, img: Any) -> tuple[list[Any], list[Array], list[Pair]]:
        """The views, their coordinates, and the pairs to map: the second view overlaps the first, local ones both.

        Pairs: the two global views in each other, then per local one itself in the second and in the first.
        """
        first, c0 = self.crop_g(img)
        first = self.photometric(first)
        second, c1 = self.crop_g(img, c0)
        second = self.photometric(second)
        mask_g = self._sampling_mask(self.features_g, self.window_g)
        box = self._crop_intersection(c0, c1)
        views, coords = [first, second], [c0, c1]
        pairs: list[Pair] = [(0, 1, mask_g), (1, 0, mask_g)]
        if self.local_crops_number:
            mask_l = self._sampling_mask(self.features_l, self.window_l)
        for k in range(2, 2 + self.local_crops_number):
            local, crop = self.crop_l(img, box)
            views.append(self.photometric(local))
            coords.append(crop)
            pairs += [(k, 1, mask_l), (k, 0, mask_l)]
        return views, coords, pairs

    def __call__(self, img: Any) -> "Sample":
        views, coords, pairs = self.views(img)
        src, tgt = np.stack([coords[i] for i, _, _ in pairs]), np.stack([coords[i] for _, i, _ in pairs])
        matches = [self.correspondence(src[:2], tgt[:2], pairs[0][2])]
        if pairs[2:]:
            matches.append(self.correspondence(src[2:], tgt[2:], pairs[2][2]))
        return self.sample(img, views, matches)

    def sample(self, img: Any, views: list[Any], matches: list[Matches]) -> "Sample":
        """What `collate` takes."""
        return Sample([self.to_pixels(view) for view in views], matches)


class Sample(NamedTuple):
    """An image's views (C, H, W), and the matches of its global pairs and of its local ones, if any."""

    views: list[Any]
    matches: list[Matches]


def collate(samples: list[Sample]) -> dict[str, Any]:
    """A batch of B samples.

    Returns:
        crops: two global views (B, C, H, W), then nl local ones. token: of the global pairs (2, B, s), -1 where
        the other view does not show them. corner, weight: where the teacher finds patches of both views,
        (2 B, s + nl s_l, 4); the first B rows are patches of the second view. rows_s, rows_t: numbers of the matched
        rows, for `udi_forward_loss`.
    """
    crops = [datasets.collate_decoded(list(views)) for views in zip(*(sample.views for sample in samples), strict=True)]
    # Of the global and of the local pairs, (B, P, ...); pairs alternate between the second and the first view.
    found = zip(*(sample.matches for sample in samples), strict=True)
    groups = [Matches(*map(np.stack, zip(*matches, strict=True))) for matches in found]
    shown = [np.arange(group.token.shape[2]) < group.count[..., None] for group in groups]

    def of_views(values: list[Any]) -> Any:
        """Values (B, P, s, ...) of both groups -> (2 B, s + nl s_l, ...)."""
        views = [np.concatenate([x[:, v::2].reshape(len(x), -1, *x.shape[3:]) for x in values], axis=1) for v in (0, 1)]
        return np.concatenate(views)

    return {
        "crops": crops,
        "token": torch.from_numpy(groups[0].token.swapaxes(0, 1).copy()),
        "corner": torch.from_numpy(of_views([group.corner for group in groups])),
        "weight": torch.from_numpy(of_views([group.weight for group in groups])),
        "rows_s": torch.from_numpy(np.flatnonzero(shown[0].swapaxes(0, 1))),
        "rows_t": torch.from_numpy(np.flatnonzero(of_views(shown))),
    }


def token_map(token: Tensor, patches: int) -> Tensor:
    """Numbers (..., s) of patches -> rows (..., s, N) that pick them; those of -1 are zero."""
    return (F.one_hot(token.clamp(min=0), patches) * (token >= 0)[..., None]).float()


def corner_map(corner: Tensor, weight: Tensor, patches: int) -> Tensor:
    """Numbers and weights (..., s, 4) of patches -> rows (..., s, N) that mix them; equal ones are added up."""
    return weight.new_zeros(*weight.shape[:-1], patches).scatter_add_(-1, corner, weight)


def expand(batch: dict[str, Any], patch_size: int) -> dict[str, Any]:
    """What `udi_forward_loss` takes of a collated batch, on its device: normalised crops, dense maps, rows."""
    mean, std = (
        255 * distributed.constant(x, batch["token"].device)[:, None, None]
        for x in (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD)
    )
    crops = [crop if crop.is_floating_point() else (crop - mean) / std for crop in batch["crops"]]
    patches = (crops[0].shape[-1] // patch_size) ** 2
    src = token_map(batch["token"], patches)  # (2, B, s, N)
    tgt = corner_map(batch["corner"], batch["weight"], patches)  # (2 B, s + nl s_l, N)
    rows = batch["rows_s"], batch["rows_t"]
    return {"crops": crops, "src_maps": list(src), "tgt_maps": list(tgt.chunk(2)), "rows": rows}
