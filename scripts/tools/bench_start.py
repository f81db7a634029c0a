"""What a program costs before it works: bench.py start.

Processor seconds, on which other programs of the machine have little influence: to import torch, torchvision and timm;
of --help of every program of the methods beyond that; and of the pre-training of small networks, from the first line on
the screen to the end of the first step.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.distributed import UserError
from scripts.tools.machine import usage

ROOT = Path(__file__).resolve().parents[2]
MOST_OF_HELP, MOST_TO_STEP = 0.3, 2.0  # seconds
# Prints what the libraries cost this process, and what --help of each program costs a copy of it.
STARTS = """
import json, os, runpy, sys, time
import torch, torchvision, timm
found = {"import torch, torchvision, timm": time.process_time()}
for program in sys.argv[1:]:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = [program, "--help"]
        try:
            runpy.run_path(program, run_name="__main__")
        finally:
            os._exit(0)
    used = os.wait4(child, 0)[2]
    found[f"{program} --help"] = used.ru_utime + used.ru_stime
print(json.dumps(found))
"""


def seconds_to_help(*programs: str) -> dict[str, float]:
    """What importing the libraries costs, and --help of programs, paths from the root, beyond that."""
    done = subprocess.run([sys.executable, "-c", STARTS, *programs], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


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
    mains = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("*/main_*.py"))]
    for name, seconds in seconds_to_help(*mains).items():
        print(f"{name:44}{seconds:8.2f} s" + "  too much" * (name.endswith("--help") and seconds > MOST_OF_HELP))
    for method, name, words in networks:
        seconds = seconds_to_step(method, words, data_path)
        print(
            f"{name + ', to the first step':44}{seconds:8.2f} s" + "  too much" * (seconds > MOST_TO_STEP), flush=True
        )
