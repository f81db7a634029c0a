"""Did it help? Encoders compared on one's own images: k-NN, linear probe and, on demand, a short fine-tuning.

Usage: python scripts/tools/compare.py DATA FILE [FILE ...] [--scratch] [--finetune] [--output_dir compare]
DATA has train/<class>/ and val/<class>/, or <class>/ alone; without classes the features are compared without labels.
FILE is a checkpoint of any stage and method, or NAME=FILE. Writes compare.md, compare.json, compare.png and pictures of
neighbours. Every start is compared with the first FILE by a t test paired over seeds.

A seed chooses the labelled images, the weights of a network from scratch, and an equal share of its own of the
validation images, so that chance differs in everything but the training images themselves. All starts get the same.
"""

import argparse
import importlib
import json
import math
import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from common import datasets, distributed
from common.distributed import UserError
from scripts.tools import measures, neighbours, probe, recipe, runs
from scripts.tools.encoders import load as encoders
from scripts.tools.encoders.timm_folder import load_folder
from scripts.tools.flags import METHODS, Parser, arguments, run_quietly, writing
from scripts.tools.images import Part, Pictures, evenly, read_pictures
from scripts.tools.texts import table

SCRATCH = "from scratch"
MEASURES = ("k-NN", "linear probe", "fine-tuned")
MOST = 2000  # images on which features are compared without labels
SEEN, EPOCHS = 2000, 5  # of a fine-tuning: images over all epochs, and their usual number
LEVEL = 0.05  # of the test, shared by the comparisons
Results = dict[str, dict[str, dict[str, list[float]]]]  # percent by measure, labels per class, start and seed


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Compare encoders", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("data_path", metavar="DATA", help="folder of images, best with train/<class>/ and val/<class>/")
    p.add_argument("files", nargs="+", metavar="FILE", help="checkpoint, folder of export.py, or NAME=FILE")
    p.add_argument("--method", default="", choices=["", *METHODS], help="of files that do not say it")
    p.add_argument("--pool", default="", choices=["", "token", "avg"], help="default: as the small recipes' k-NN")
    p.add_argument("--scratch", action="store_true", help="also the first FILE's network with random weights")
    p.add_argument("--labels_per_class", default="1,5,10,all", help="numbers of labelled images, separated by commas")
    p.add_argument("--seeds", default=3, type=int, help="repetitions; more of them see smaller differences")
    budget = f"also fine-tune, each time on so many images over all epochs, {SEEN} if no number follows"
    p.add_argument("--finetune", nargs="?", const=SEEN, type=int, metavar="IMAGES", help=budget)
    p.add_argument("--output_dir", default="compare", help="folder of the table and the pictures")
    p.add_argument("--batch_size", default=64, type=int, help="images in one forward pass")
    datasets.add_loader_flags(p)
    distributed.add_launch_flags(p)
    return p


# ---- images


def label_counts(text: str, pictures: Pictures, seeds: int) -> list[str]:
    """The numbers of labels per class that there are images for.

    Raises:
        UserError: one is no number, or none fits.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word == "all" or (word.isdecimal() and int(word)) for word in words):
        raise UserError(f"--labels_per_class {text}: expected numbers or all, separated by commas")
    splits = [pictures.split(seed, seeds) for seed in range(seeds)]
    classes = len(pictures.classes)
    smallest, held = (min(np.bincount(pictures.labels[s[i]], minlength=classes).min() for s in splits) for i in (0, 1))
    if not held:
        raise UserError(f"--seeds {seeds}: a class has too few validation images to give each seed one of its own")
    counts = [word for word in words if word == "all" or int(word) <= smallest]
    if len(counts) < len(words):
        left = ", ".join(word for word in words if word not in counts)
        distributed.log(f"{left} labels per class left out: the smallest class has {smallest} training images")
    if not counts:
        raise UserError(f"--labels_per_class {text}: the smallest class has {smallest} training images")
    return counts


# ---- starts


@dataclass
class Start:
    """An encoder to begin with. features: (n, D) of all images, by seed; equal ones are one array."""

    name: str
    path: str
    method: str
    fresh: bool
    backbone: encoders.Backbone
    features: list[np.ndarray]
    device: str = "cpu"


def named(files: list[str]) -> dict[str, str]:
    """Paths by name: the given one, else the first of file name, folder name and path that is different for all."""
    pairs = [file.split("=", 1) if "=" in file and not Path(file).exists() else ["", file] for file in files]
    for name in (lambda p: Path(p).stem, lambda p: Path(p).resolve().parent.name, str):
        names = [given or name(path) for given, path in pairs]
        if len(set(names)) == len(names) and SCRATCH not in names:
            return dict(zip(names, (path for _, path in pairs), strict=True))
    raise UserError(f"{' '.join(files)}: expected files, or NAME=FILE, of different names")


def channels(paths: list[str]) -> int | None:
    """--in_chans of the runs that wrote the files; raises UserError where they differ."""
    found = {
        path: distributed.flags_of(distributed.load(path)).get("in_chans") for path in paths if Path(path).is_file()
    }
    odd = next((path for path, number in found.items() if (number or 3) != (found[paths[0]] or 3)), "")
    if odd:
        numbers = f"{odd}: takes {found[odd] or 3} channels, {paths[0]} {found[paths[0]] or 3}"
        raise UserError(f"{numbers}; both need the same images")
    return next(iter(found.values()), None)


def load_start(args: argparse.Namespace, path: str, seed: int = 0, fresh: bool = False) -> tuple[str, Any]:
    """Method and encoder of a file; raises UserError where it cannot be read or its method is unknown."""
    if Path(path).is_dir():
        if args.scratch or args.finetune:
            raise UserError(f"{path}: --scratch and --finetune need a checkpoint of a method, not a folder")
        return "timm", load_folder(path)
    state = distributed.load(path)
    method = args.method or encoders.method_of(path, state)
    pool = args.pool or recipe.load(method, "laptop").get("knn", {}).get("pool", "")
    torch.manual_seed(seed)
    return method, encoders.load_backbone(method, path, pool=pool, state=state, fresh=fresh)


def read_starts(args: argparse.Namespace, pictures: Pictures, device: torch.device) -> list[Start]:
    """The starts with their features; the network from scratch comes last."""
    starts = []
    paths = named(args.files)
    first = next(iter(paths.values()))
    for name, path in [*paths.items(), *([(SCRATCH, first)] if args.scratch else [])]:
        fresh, rows = name == SCRATCH, []
        for seed in range(args.seeds if fresh else 1):
            method, backbone = load_start(args, path, seed, fresh)
            rows.append(measures.features(backbone.to(device), pictures.base, args, device))
        distributed.log(f"{name}: {backbone.model_name} of {method}, {backbone.input_size} pixels")
        rows *= 1 if fresh else args.seeds
        starts.append(Start(name, "" if fresh else path, method, fresh, backbone, rows, args.device))
    return starts


# ---- with labels


def link(pictures: Pictures, rows: np.ndarray, folder: Path, copies: int = 1) -> None:
    """Links to images in folders of their classes."""
    for row in rows.tolist():
        path, label = pictures.base.samples[row]
        for copy in range(copies):
            new = folder / str(pictures.classes[label]) / f"{row:06d}-{copy}{Path(path).suffix}"
            new.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.path.abspath(path), new)


def finetune_flags(start: Start, data: Path, out: Path, seed: int, images: int, epochs: int) -> list[str]:
    """The small recipe's flags of fine-tuning, for a start's network: of training with labels, from scratch.

    Args:
        images: of an epoch.
    """
    plan, net = recipe.load(start.method, "laptop"), start.backbone
    settings = dict(plan["supervised" if start.fresh else "finetune"])
    size = {"input_size": net.input_size, "patch_size": net.patch_size}
    if start.method == "a2mim":
        size |= {"val_crop": net.input_size, "val_resize": round(net.input_size * 8 / 7)}
        settings["backbone"] = net.model_name
        if not net.model_name.startswith(("vit", "mae_vit")):
            size.pop("patch_size")
    else:
        settings["model"] = net.model_name
    size["batch_size"] = min(int(settings["batch_size"]), 1 << (images.bit_length() - 1))  # a power of two
    if net.in_chans:
        settings |= {"in_chans": net.in_chans, "mean": list(net.mean), "std": list(net.std)}
    settings |= {**size, "epochs": epochs, "nb_classes": len(os.listdir(data / "train")), "seed": seed}
    settings |= {
        "data_path": data,
        "output_dir": out,
        plan["starts_from"]["finetune"]: start.path,
        "device": start.device,
    }
    return recipe.flags(
        {k: v if v is True else list(map(str, v)) if isinstance(v, list) else str(v) for k, v in settings.items()}, ""
    )


def finetune(start: Start, pictures: Pictures, rows: np.ndarray, val: np.ndarray, seed: int, seen: int) -> float:
    """Accuracy in percent after a fine-tuning by the method's own program.

    With few images an epoch has several copies of each, augmented differently; so all have epochs of a like length.
    """
    copies = math.ceil(seen / EPOCHS / len(rows))
    epochs = max(2, round(seen / (copies * len(rows))))
    main = importlib.import_module(f"{start.method}.main_finetune")
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        data, out = Path(folder, "data"), Path(folder, "out")
        link(pictures, rows, data / "train", copies)
        link(pictures, val, data / "val")
        flags = finetune_flags(start, data, out, seed, copies * len(rows), epochs)
        run_quietly(main, arguments(main, flags))
        return runs.accuracy(out)


def measure(args: argparse.Namespace, pictures: Pictures, starts: list[Start], counts: list[str]) -> Results:
    """Accuracies of every start with every number of labels, for every seed."""
    names = MEASURES[: 3 if args.finetune else 2]
    found: Results = {m: {c: {start.name: [] for start in starts} for c in counts} for m in names}
    for seed in range(args.seeds):
        rows, val = pictures.split(seed, args.seeds)
        for count in counts:
            chosen = pictures.labelled(rows, count, seed)
            for start in starts:
                x, y = start.features[seed], pictures.labels
                parts = x[chosen], y[chosen], x[val], y[val]
                found["k-NN"][count][start.name].append(measures.knn_accuracy(*parts))
                found["linear probe"][count][start.name].append(probe.accuracies(*parts)["logistic"])
                if args.finetune:
                    accuracy = finetune(start, pictures, chosen, val, seed, args.finetune)
                    found["fine-tuned"][count][start.name].append(accuracy)
        distributed.log(f"seed {seed}: {', '.join(counts)} labels per class, {len(val)} validation images")
    return found


def paired(a: np.ndarray, b: np.ndarray, least: float) -> tuple[float, float, float]:
    """Mean of a - b, its standard error, and p of Student's two-sided t test of pairs; p is NaN for a single pair.

    Args:
        least: deviation of the differences below which they agree by chance: accuracies go by whole images.
    """
    differences = np.asarray(a, float) - np.asarray(b, float)
    if len(differences) < 2:
        return float(differences.mean()), math.nan, math.nan
    error = max(float(differences.std(ddof=1)), least) / len(differences) ** 0.5
    mean = float(differences.mean())
    return mean, error, float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))


def conclude(
    what: str,
    over: str,
    values: dict[str, np.ndarray],
    least: float,
    words: tuple[str, str] = ("better than", "worse than"),
) -> str:
    """One sentence: every start against the first one. values: by start, of pairs in the same order."""
    first, *others = values
    parts = []
    for name in others:
        mean, error, p = paired(values[name], values[first], least)
        if math.isnan(p):
            parts.append(f"{name} {mean:+.1f} points against {first}, which one seed cannot tell from chance")
            continue
        numbers = f"{mean:+.1f} ± {error:.1f} points, p = {p:.2g}"
        if p < LEVEL / len(others):
            parts.append(f"{name} is {words[mean < 0]} {first} ({numbers})")
        else:
            parts.append(f"no difference beyond chance between {name} and {first} ({numbers})")
    if not others:
        return f"{what}: one start, nothing to compare it with."
    test = f"Paired t test over {over}, level {LEVEL / len(others):.2g}, mean ± standard error."
    return f"{what}: {'; '.join(parts)}. {test}"


# ---- without labels


@dataclass
class Look:
    """What a start's features are like: agreement in percent by image, effective rank, variance; see measures.py."""

    agreement: np.ndarray
    rankme: float
    variance: float


def look(args: argparse.Namespace, pictures: Pictures, start: Start, device: torch.device) -> Look:
    """Of at most 2,000 images, all starts' the same; of a network from scratch, that of the last seed."""
    chosen = evenly(pictures.labels.tolist(), MOST)
    part = Part(pictures.base, chosen)
    rows, middle = start.features[-1][chosen], measures.features(start.backbone, part, args, device, measures.ZOOM)
    return Look(measures.agreement(rows, middle), measures.rankme(rows), measures.variance(rows))


def draw_neighbours(pictures: Pictures, start: Start, path: Path) -> None:
    """A contact sheet: the same images for every start, and their nearest of all images."""
    queries = neighbours.spread(pictures.labels, 8)
    rows, cosines = neighbours.nearest(start.features[-1], queries, min(5, len(pictures.labels) - 1))
    paths = [Path(path) for path, _ in pictures.base.samples]
    labels = [str(pictures.classes[label]) for label in pictures.labels] if pictures.classes else []
    titles = labels or [path.name for path in paths]
    neighbours.draw(paths, titles, queries, rows, cosines, pictures.base.in_chans).savefig(path)


# ---- what is written


def draw(found: Results, counts: dict[str, int], classes: int) -> Figure:
    """Accuracy over labels per class, a panel per measure, a line per start; bars are deviations between seeds.

    Args:
        counts: labelled images, by number of labels per class. classes: 1 / their number is chance.
    """
    fig = Figure(figsize=(2 + 3.2 * len(found), 3.6), layout="constrained", dpi=150)
    axes = fig.subplots(1, len(found), sharey=True, squeeze=False)[0]
    places = [images / classes for images in counts.values()]
    for ax, (title, by_count) in zip(axes, found.items(), strict=True):
        for i, name in enumerate(next(iter(by_count.values()))):
            values = np.array([by_count[count][name] for count in counts])  # (counts, seeds)
            spread = values.std(axis=1, ddof=1) if values.shape[1] > 1 else None
            style = {"linestyle": "--", "color": "0.5"} if name == SCRATCH else {"color": f"C{i}"}
            beside = 1.03 ** (i - (len(by_count[next(iter(counts))]) - 1) / 2)  # the bars of another start
            xs = [place * beside for place in places]
            ax.errorbar(xs, values.mean(axis=1), spread, marker="o", capsize=3, label=name, **style)
        ax.axhline(100 / classes, color="0.8", linewidth=1)
        ax.set_xscale("log")
        labels = [
            f"all\n({place:.0f})" if count == "all" else count for count, place in zip(counts, places, strict=True)
        ]
        ax.set_xticks(places, labels)
        ax.minorticks_off()
        ax.set_title(title)
        ax.set_xlabel("labelled images per class")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy (%)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return fig


def spread_text(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def power(seeds: int) -> str:
    """How large a difference must be for so few pairs to show it."""
    if seeds < 2:
        return "One seed says nothing about chance."
    least = stats.t.ppf(1 - LEVEL / 2, seeds - 1) / seeds**0.5
    return (
        f"The test of {seeds} seeds has {seeds - 1} degrees of freedom: it sees a mean difference that is at least "
        f"{least:.1f} times the differences' own deviation."
    )


def markdown(record: dict[str, Any]) -> str:
    """The tables of a comparison's record."""
    lines = ["# Comparison", "", f"**{record['conclusion']}**"]
    if record["accuracy"]:
        counts = record["labels_per_class"]
        heads = [f"{count} ({images} images)" for count, images in counts.items()]
        lines += ["", f"Percent correct, mean ± deviation over {record['seeds']} seeds, by labels per class:", ""]
        rows = [
            [f"{measured}: {name}", *(spread_text(by_count[count][name]) for count in counts)]
            for measured, by_count in record["accuracy"].items()
            for name in record["starts"]
        ]
        own = f"Each seed has {record['validation_images']} validation images of its own. {power(record['seeds'])}"
        lines += [table(["", *heads], rows), "", own, "", "![accuracy over labels per class](compare.png)"]
    heads = ["", "network", "neighbour agreement (%)", "RankMe", "variance"]
    numbers = ("agreement", "rankme", "variance")
    rows = [
        [f"[{name}]({about['neighbours']})", about["network"], *(f"{about[key]:.3g}" for key in numbers)]
        for name, about in record["starts"].items()
    ]
    lines += ["", "Without labels:", "", table(heads, rows)]
    lines += ["", f"Features of {record['width']} numbers. The links lead to pictures of nearest neighbours.", ""]
    return "\n".join([*lines, "```", record["command"], "```", ""])


def summary(args: argparse.Namespace, pictures: Pictures, found: Results, looks: dict[str, Look]) -> str:
    """The sentence: of the dearest measure, over all numbers of labels; without labels of neighbour agreement."""
    if not found:
        values = {name: seen.agreement for name, seen in looks.items()}
        over = f"{len(next(iter(values.values())))} images, rough because they share neighbours"
        words = "above", "below"  # more of it is not always better
        return conclude("Neighbour agreement, without labels", over, values, 100 / measures.CLOSEST / 2, words)
    dearest = list(found)[-1]
    values = {name: np.mean([by_start[name] for by_start in found[dearest].values()], axis=0) for name in looks}
    what = f"{dearest.capitalize()}, mean over {', '.join(found[dearest])} labels per class"
    return conclude(what, f"{args.seeds} seeds", values, 50 / len(pictures.split(0, args.seeds)[1]))


def main(args: argparse.Namespace) -> None:
    begun, device = time.perf_counter(), distributed.init(args.device)
    distributed.check_ranges(args, {"seeds": (1, 1000), "finetune": (1, math.inf)})
    # ---- images, features
    pictures = read_pictures(args.data_path, channels(list(named(args.files).values())))
    counts = label_counts(args.labels_per_class, pictures, args.seeds) if pictures.classes else []
    starts, out = read_starts(args, pictures, device), Path(args.output_dir)
    # ---- measures
    found = measure(args, pictures, starts, counts) if counts else {}
    looks = {start.name: look(args, pictures, start, device) for start in starts}
    rows = pictures.split(0, args.seeds)[0]
    images = {count: len(pictures.labelled(rows, count, 0)) for count in counts}
    record: dict[str, Any] = {
        "conclusion": summary(args, pictures, found, looks),
        "command": shlex.join(["python", *sys.argv]),
        "data_path": args.data_path,
        "images": len(pictures.labels),
        "validation_images": len(pictures.split(0, args.seeds)[1]) if counts else 0,
        "seeds": args.seeds,
        "width": starts[0].backbone.embed_dim,
        "labels_per_class": images,
        "accuracy": found,
        "starts": {},
    }
    # ---- files
    with writing(f"--output_dir {out}"):
        out.mkdir(parents=True, exist_ok=True)
        for i, start in enumerate(starts):
            sheet = f"neighbours-{i + 1}.png"
            draw_neighbours(pictures, start, out / sheet)
            seen, network = looks[start.name], f"{start.backbone.model_name} of {start.method}"
            about = {"file": start.path, "network": network, "neighbours": sheet}
            about |= {"agreement": float(seen.agreement.mean()), "rankme": seen.rankme, "variance": seen.variance}
            record["starts"][start.name] = about
        if found:
            draw(found, images, len(pictures.classes)).savefig(out / "compare.png")
        record["seconds"] = round(time.perf_counter() - begun, 1)
        (out / "compare.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        (out / "compare.md").write_text(markdown(record), "utf-8")
    distributed.log(f"wrote {out}/compare.md, compare.json and pictures in {record['seconds']:.0f} s")
    print(record["conclusion"])


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
