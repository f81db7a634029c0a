"""scripts/slurm: the job of a row, with stand-ins for SLURM's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.helpers import ROOT

SCRIPT = ROOT / "scripts" / "slurm" / "row.sbatch"
ROW = """echo "$NODE_RANK $NNODES $GPUS $MASTER_ADDR $MASTER_PORT $*" >started
trap 'exit "$END"' USR1
if [[ $WAIT ]]; then for i in {1..500}; do sleep 0.02; done; fi
exit "$END"
"""
COMMANDS = {
    "srun": '#!/bin/bash\nSLURM_NODEID=3 exec "$@"\n',
    "scontrol": '#!/bin/bash\necho "$*" >>calls\nif [[ $1 == show ]]; then printf "node7\\nnode8\\n"; fi\n',
}


def start(folder: Path, *words: str, wait: str = "", end: int = 0) -> subprocess.Popen[str]:
    """The job of a row, started as SLURM starts it."""
    for name, text in COMMANDS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "scripts").mkdir()
    (folder / "scripts" / "toy.sh").write_text(ROW)
    slurm = {"SUBMIT_DIR": str(folder), "JOB_ID": "20011", "JOB_NODELIST": "node[7-8]", "NNODES": "2"}
    env = {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURM_GPUS_ON_NODE": "4"}
    env |= {"PATH": f"{folder}:{os.environ['PATH']}", "WAIT": wait, "END": str(end)}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", str(SCRIPT), *words], env=env, stdout=pipe, stderr=pipe, text=True, cwd="/")


def stop(job: subprocess.Popen[str], folder: Path) -> None:
    """SLURM's signal to the batch script, once the row runs."""
    end = time.monotonic() + 20
    while not (folder / "started").exists() or not (folder / "started").read_text():
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.02)
    time.sleep(0.05)  # until it has set its trap
    job.send_signal(signal.SIGUSR1)


def test_a_row_gets_its_nodes_and_stages(tmp_path):
    job = start(tmp_path, "toy", "pretrain", "finetune")
    assert job.wait(20) == 0, job.communicate()
    assert (tmp_path / "started").read_text() == "3 2 4 node7 20011 pretrain finetune\n"
    assert (tmp_path / "calls").read_text() == "show hostnames node[7-8]\n"


@pytest.mark.parametrize(("end", "requeued"), [(138, True), (1, True), (0, False)])
def test_at_the_time_limit__the_row_is_stopped_and_queued_again_unless_it_is_done(tmp_path, end, requeued):
    job = start(tmp_path, "toy", wait="yes", end=end)
    stop(job, tmp_path)
    assert job.wait(20) == 0, job.communicate()
    assert ("requeue 20011" in (tmp_path / "calls").read_text()) == requeued


def test_a_failure_is_the_job_s(tmp_path):
    assert start(tmp_path, "toy", end=3).wait(20) == 3
    assert "requeue" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(("words", "message"), [((), "expected the name of a row"), (("none",), "no such row")])
def test_mistakes(tmp_path, words, message):
    job = start(tmp_path, *words)
    assert message in job.communicate(timeout=20)[1]
    assert job.returncode in (1, 2)


def test_options_of_sbatch_come_before_the_first_command():
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert [i for i, line in enumerate(lines) if line.startswith("#SBATCH")][-1] < first
    assert "#SBATCH --signal=B:USR1@300" in lines and "#SBATCH --requeue" in lines
