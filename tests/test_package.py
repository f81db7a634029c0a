"""The wheel: built, installed and run outside the checkout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import common
from tests.support.documents import METHODS
from tests.support.helpers import ROOT


def shell(*command: str | Path, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder in which the wheel is installed, without what it depends on, which is here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():  # building writes beside the sources
        if path.name in (*METHODS, "common", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
            (source / path.name).symlink_to(path)
    built = shell("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl") or pytest.fail(built.stderr)
    assert common.__version__ in wheel.name
    done = shell("-m", "pip", "install", "-q", "--no-deps", "--target", folder / "site", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_wheel__holds_the_packages_and_nothing_else(site):
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"common", *METHODS}
    for name in ("common", *METHODS):
        own = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*.py")}
        assert own == {path.relative_to(site) for path in (site / name).rglob("*.py")}


def test_wheel__runs_outside_the_checkout(site, tmp_path):
    done = shell("-m", "saim.main_pretrain", "--help", cwd=tmp_path, path=str(site))
    assert done.returncode == 0, done.stderr
    assert "--query_depth" in done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_another_package_of_the_same_name_is_one_line(method, tmp_path):
    (tmp_path / "common.py").touch()
    done = shell("-m", f"{method}.main_pretrain", cwd=tmp_path, path=str(ROOT))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/common.py" in done.stderr


def test_test_script_installs_the_extra_for_development():
    (listed,) = re.findall(r"^dev = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    (installed,) = re.findall(r"^packages=\((.*)\)", (ROOT / "scripts" / "test.sh").read_text(), re.MULTILINE)
    assert json.loads(f"[{listed}]") == installed.split()


def test_containers_and_workflows_call_the_same_commands():
    """What other machines run is what the README and .ci/run say."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1] == {"pip": ["--requirement requirements.txt"]}
    assert 'CMD ["bash", "scripts/quickstart.sh"]' in (ROOT / "Dockerfile").read_text()
