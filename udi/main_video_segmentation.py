"""Segmentation of videos with a frozen backbone: the first frame's mask is carried on (DAVIS-2017), and scored."""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import distributed
from common.distributed import UserError
from udi import davis_scores, video
from udi.backbone import build_backbone, load_backbone
from udi.davis_scores import ObjectScore
from udi.flags import ARCHS, add_checkpoint_flags
from udi.models_udi import VisionTransformer
from udi.video import Video

SHEET = 6  # frames of a contact sheet
WIDTH = 320  # of a frame in pictures, in pixels


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI video segmentation")
    g = distributed.flag_groups(p)
    add_checkpoint_flags(p)
    g.model.add_argument("--arch", default="vit_small", choices=ARCHS, help="backbone")
    g.output.add_argument(
        "--output_dir",
        default="./small_video_segmentation",
        help="the masks go to topk-<k>-n-frames-<n>-mask-neighbors-<m>/<video>/ in this folder",
    )
    g.data.add_argument(
        "--data_path", default="/mnt/aiops/common/DAVIS2017_video/DAVIS", help="folder of DAVIS-2017, or one like it"
    )
    g.data.add_argument(
        "--short_side", default=480, type=int, help="frames are resized to this many pixels, the longer side by 64"
    )
    g.model.add_argument("--n_last_frames", default=7, type=int, help="frames that are asked besides the first one")
    g.model.add_argument(
        "--size_mask_neighborhood",
        default=12,
        type=int,
        help="patches so many rows and columns away; 0: all of a frame",
    )
    g.model.add_argument("--topk", default=5, type=int, help="patches of all those frames that count")
    g.unused.add_argument("--bs", default=8, type=int, help="unread by the authors' program, too")
    g.output.add_argument(
        "--eval",
        nargs="?",
        const=".",
        default=None,
        metavar="FOLDER",
        help="score the masks in FOLDER/<video>/ instead of making them; without FOLDER those of this command line",
    )
    g.output.add_argument(
        "--save_pictures", default=0, type=int, help="videos of which <video>.gif and <video>.png show masks on frames"
    )
    distributed.add_launch_flags(p)
    p.set_defaults(pretrained_weights="./vit_small_800_best/checkpoint.pth")
    return p


def results_folder(args: argparse.Namespace) -> Path:
    """Where the masks go."""
    name = f"topk-{args.topk}-n-frames-{args.n_last_frames}-mask-neighbors-{args.size_mask_neighborhood}"
    return Path(args.output_dir, name)


def build_model(args: argparse.Namespace) -> VisionTransformer:
    """The backbone of the flags with the weights of its checkpoint.

    Raises:
        UserError: its patches do not divide the frames.
    """
    weights = None
    if args.pretrained_weights:
        distributed.check_default_file(args, "pretrained_weights")
        weights = load_backbone(args.pretrained_weights, args.checkpoint_key, args.class_tokens)
    else:
        distributed.log("WARNING: no --pretrained_weights, the backbone is random")
    model = build_backbone(args.arch, args.patch_size, weights).eval()
    channels = model.patch_embed.proj.in_channels
    if channels != 3:
        raise UserError(f"{args.pretrained_weights}: takes {channels} channels, frames of videos have 3")
    if args.short_side % model.patch_size or 64 % model.patch_size:
        raise UserError(
            f"--short_side {args.short_side}: is, or 64 is, no multiple of {model.patch_size}, the patch side"
        )
    return model


def segment(args: argparse.Namespace, videos: list[Video], folder: Path, device: torch.device) -> None:
    """Write the masks of this process's videos to folder/<video>/."""
    model = build_model(args).to(device)
    settings = (args.n_last_frames, args.size_mask_neighborhood, args.topk, args.short_side)
    for clip in videos:
        masks = video.propagate(model, clip, device, *settings)
        (folder / clip.name).mkdir(parents=True, exist_ok=True)
        shown = tqdm(masks, clip.name, len(clip.frames), unit="frame", disable=not distributed.is_main(), leave=False)
        for frame, mask in zip(clip.frames, shown, strict=True):
            video.write_mask(mask, folder / clip.name / f"{frame.stem}.png")


def predicted(clip: Video, folder: Path) -> np.ndarray:
    """The masks (T, H, W) in folder/<video>/.

    Raises:
        UserError: one is missing or of another size.
    """
    masks = [video.read_mask(folder / clip.name / f"{frame.stem}.png").numbers for frame in clip.frames]
    odd = next((i for i, mask in enumerate(masks) if mask.shape != masks[0].shape), None)
    if odd is not None:
        raise UserError(f"{folder / clip.name / clip.frames[odd].stem}.png: is of another size than the first mask")
    return np.stack(masks)


def score(clip: Video, folder: Path) -> list[ObjectScore]:
    """The scores of a video's masks in folder/<video>/; none where only the first frame has a true mask.

    Raises:
        UserError: a mask is missing or has an object that is not there, or the video is too short.
    """
    if len(clip.masks) == 1 < len(clip.frames):
        return []
    if len(clip.frames) < 3:
        raise UserError(
            f"{clip.name}: has {len(clip.frames)} frames, expected 3: the first and the last are not scored"
        )
    if len(clip.masks) < len(clip.frames):
        names = {mask.stem for mask in clip.masks}
        missing = next(frame.stem for frame in clip.frames if frame.stem not in names)
        raise UserError(f"{clip.masks[0].parent / missing}.png: no such file, expected the true mask of every frame")
    truth, pred = np.stack([video.read_mask(mask).numbers for mask in clip.masks]), predicted(clip, folder)
    if truth.shape != pred.shape:
        raise UserError(f"{folder / clip.name}: masks are {pred.shape[1:]}, the true ones {truth.shape[1:]}")
    with distributed.user_errors(str(folder / clip.name)):
        return davis_scores.object_scores(clip.name, *davis_scores.frame_scores(truth, pred))


def picture(clip: Video, folder: Path) -> None:
    """Draw a video's masks over its frames: an animation, and a sheet with some of them, in folder."""
    frames = []
    for path in clip.frames:
        mask = video.read_mask(folder / clip.name / f"{path.stem}.png")
        image = video.read_frame(path).permute(1, 2, 0).numpy()
        colours = np.array(mask.palette, np.uint8).reshape(-1, 3)[mask.numbers]
        mixed = np.where(mask.numbers[..., None] > 0, image * 0.4 + colours * 0.6, image * 0.7)
        height = round(WIDTH * image.shape[0] / image.shape[1])
        frames.append(Image.fromarray(mixed.astype(np.uint8)).resize((WIDTH, height)))
    frames[0].save(folder / f"{clip.name}.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    chosen = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(SHEET, len(frames)))]
    sheet = Image.new("RGB", (WIDTH * len(chosen), chosen[0].height))
    for i, frame in enumerate(chosen):
        sheet.paste(frame, (i * WIDTH, 0))
    sheet.save(folder / f"{clip.name}.png")


def report(scores: list[ObjectScore], folder: Path) -> None:
    """Print the scores in percent and write them to scores.csv, their means to log.txt, in folder."""
    means = davis_scores.overall(scores)
    rows = [(s.name, *(f"{100 * value:.1f}" for value in s[1:])) for s in scores]
    width = max(len(row[0]) for row in rows)
    distributed.log(f"{'object':{width}}   J mean  recall  F mean  recall")
    for row in rows:
        distributed.log(f"{row[0]:{width}} {row[1]:>8} {row[2]:>7} {row[3]:>7} {row[4]:>7}")
    shown = ", ".join(f"{name.replace('_and_', '&')} {100 * value:.2f}" for name, value in means.items())
    distributed.log(f"{len(scores)} objects: {shown}")
    with open(folder / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ObjectScore._fields)
        writer.writerows(scores)
    line = {f"test_{name}": 100 * value for name, value in means.items()} | {"epoch": 0}  # a run's log has epochs
    (folder / "log.txt").write_text(json.dumps(line) + "\n")


RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("n_last_frames", "size_mask_neighborhood", "save_pictures"), (0, math.inf)),
    "topk": (1, math.inf),
    "short_side": (64, math.inf),
}


def main(args: argparse.Namespace) -> None:
    distributed.check_ranges(args, RANGES)
    device = distributed.init(args.device)
    torch.manual_seed(0)  # random weights are the same on all processes
    videos, folder = video.read_videos(args.data_path), results_folder(args)
    if args.eval not in (None, "."):
        folder = Path(args.eval)
    if args.eval is not None and not folder.is_dir():
        raise UserError(f"--eval: there is no folder {folder}")
    own = range(distributed.rank(), len(videos), distributed.world_size())
    try:
        if args.eval is None:
            segment(args, [videos[i] for i in own], folder, device)
        scores = {i: score(videos[i], folder) for i in own}
        for i in own:
            if i < args.save_pictures:
                picture(videos[i], folder)
        every = dict(item for part in distributed.gather(scores) for item in part.items())
        flat = [one for i in sorted(every) for one in every[i]]
        if distributed.is_main() and flat:
            report(flat, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    unscored = sum(not of_video for of_video in every.values())
    if unscored:
        distributed.log(f"{unscored} of {len(videos)} videos have the true mask of the first frame alone: not scored")
    distributed.log(f"masks of {len(videos)} videos are in {folder}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
