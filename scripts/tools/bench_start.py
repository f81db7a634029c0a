"""What a program costs before it works: bench.py start.

Processor seconds, on which other programs of the machine have little influence: to import torch, torchvision and timm;
of --help of every program of the methods beyond that; and of the pre-training of small networks, from the first line on
the screen to the end of the first step.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.distributed import UserError
from scripts.tools.machine import usage

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = "import torch, torchvision, timm"
MOST_OF_HELP, MOST_TO_STEP = 0.3, 2.0  # seconds


def processor_seconds(*words: str) -> float:
    """What a Python process with these words computes, the lesser of two."""
    found = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def seconds_to_step(method: str, words: list[str], data_path: str) -> float:
    """What a pre-training computes from its first line to the end of its first step; raises UserError if it ends."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = [sys.executable, f"{method}/main_pretrain.py", *words, "--num_workers", "0", "--device", "cpu"]
        command += ["--data_path", data_path, "--output_dir", str(out)]
        with (
            open(Path(folder, "errors"), "w+") as errors,
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors) as run,
        ):
            assert run.stdout is not None
            run.stdout.readline()
            begun = now = usage(run.pid)[1]
            while run.poll() is None and not any(path.stat().st_size for path in out.glob("*progress.jsonl")):
                now = usage(run.pid)[1]
                time.sleep(0.005)
            if run.returncode:
                errors.seek(0)
                raise UserError((errors.read().strip().splitlines() or [f"ended with status {run.returncode}"])[-1])
            run.kill()
        return now - begun


def report(networks: list[tuple[str, str, list[str]]], data_path: str) -> None:
    """Print a line each; of networks: method, name and flags."""
    libraries = processor_seconds("-c", LIBRARIES)
    print(f"{'import torch, torchvision, timm':44}{libraries:8.2f} s", flush=True)

    def line(name: str, seconds: float, most: float, sign: str = "") -> None:
        over = f"  more than {most:g} s" if seconds > most else ""
        print(f"{name:44}{sign + f'{seconds:.2f}':>8} s{over}", flush=True)

    for main in sorted(ROOT.glob("*/main_*.py")):
        name = str(main.relative_to(ROOT))
        line(f"{name} --help", processor_seconds(name, "--help") - libraries, MOST_OF_HELP, "+")
    for method, name, words in networks:
        line(f"{name}: first line to first step", seconds_to_step(method, words, data_path), MOST_TO_STEP)
