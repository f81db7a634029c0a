"""The documents' generated tables: they are what the data say, and wrong data are refused."""

import json
import shutil

import pytest

from common.distributed import UserError
from scripts.tools import differences, readme
from tests.support.helpers import ROOT

ROWS = {
    "metrics": {"finetune": "fine-tuned", "linprobe": "linear"},
    "rows": [
        {
            "name": "SAIM, ViT-B/16",
            "script": "scripts/a.sh",
            "published": {"finetune": 84, "linprobe": 62.5},
            "ours": {},
            "note": "no recipe | was published",
        },
        {
            "name": "tiny",
            "script": "scripts/a.sh",
            "published": {"finetune": "84.3 (summary: 84.2)"},
            "ours": {"finetune": 91.25},
            "note": "",
        },
    ],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A root of its own, with the differences of two methods and ROWS."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for module in (readme, differences):
        monkeypatch.setattr(module, "TOOLS", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "a.sh").touch()
    (tmp_path / "upstream").mkdir()
    for method in ("saim", "semaim"):
        shutil.copy(ROOT / "scripts" / "tools" / "upstream" / f"{method}.json", tmp_path / "upstream")
    (tmp_path / "rows.json").write_text(json.dumps({"saim": ROWS}))
    return tmp_path


def run(*flags: str) -> None:
    readme.main(readme.get_args_parser().parse_args(flags))


def test_readme_is_what_the_data_say():
    texts = [path.read_text() for path in readme.documents()]
    assert [readme.generate(text) for text in texts] == texts
    regions = {(kind, method) for text in texts for _, kind, method, _, _ in readme.REGION.findall(text)}
    tables = {(kind, method) for kind in ("rows", "differences") for method in readme.METHODS}
    assert regions == tables | {("gpu", "speed")}
    run("--check")


def test_rows(here):
    assert readme.result_rows("saim") == (
        "| row | script | fine-tuned, published | linear, published | measured here |\n"
        "|---|---|---|---|---|\n"
        "| SAIM, ViT-B/16 (no recipe \\| was published) | `scripts/a.sh` | 84.0 | 62.5 | – |\n"
        "| tiny | `scripts/a.sh` | 84.3 (summary: 84.2) | – | 91.25 fine-tuned |"
    )
    assert readme.result_rows("semaim") is None
    (here / "rows.json").write_text(json.dumps({"saim": {**ROWS, "rows": ROWS["rows"][:1]}}))
    assert str(readme.result_rows("saim")).startswith("| row | script | fine-tuned, published | linear, published |\n")


def test_differences__name_what_is_shared(here):
    record = json.loads((here / "upstream" / "semaim.json").read_text())
    text = readme.differences("semaim")
    assert text.startswith("As for SAIM: precision, targets, `--device`,")
    assert text.count("\n| ") == 1 + len(record["differences"]) - 1 + 1
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    assert " ".join(text.split()).endswith(f"Kept on purpose: {'; '.join(record['kept'])}.")
    record["shared"].append("nothing")
    (here / "upstream" / "semaim.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="shared: nothing is no id"):
        readme.differences("semaim")


def test_check__and_rewrite(here, capsys):
    path = here / "README.md"
    text = "# Title\n\n<!-- rows saim -->\nold\n<!-- end -->\n\n<!-- differences udi -->\nby hand\n<!-- end -->\nrest\n"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        run(str(path), "--check")
    assert end.value.code == 1
    assert "differs from the data in rows saim;" in capsys.readouterr().out
    assert path.read_text() == text
    run(str(path))
    assert path.read_text() == text.replace("old", str(readme.result_rows("saim")))
    run(str(path), "--check")


def test_wrong_files(here):
    path = here / "README.md"
    with pytest.raises(UserError, match="cannot be read"):
        run(str(path))
    path.write_text("# Title\n")
    with pytest.raises(UserError, match="has no region"):
        run(str(path))
    path.write_text("<!-- rows mae -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="region 'rows mae': expected one of saim"):
        run(str(path))
    row = ROWS["rows"][0]
    for wrong in (
        [],
        {"metrics": {}, "rows": [row]},
        {**ROWS, "rows": [{**row, "script": "scripts/none.sh"}]},
        {**ROWS, "rows": [{"name": "a"}]},
    ):
        (here / "rows.json").write_text(json.dumps({"saim": wrong}))
        with pytest.raises(UserError, match="is not of the form metrics, rows"):
            readme.result_rows("saim")


def test_gpu_speed(here):
    text = "a\n<!-- gpu speed -->\nNot measured yet.\n<!-- end -->\n"
    assert readme.generate(text) == text
    lines = [
        {"item": ["machine"], "status": "ok", "result": {"device": "A GPU", "torch": "2.11"}},
        {"item": ["peaks"], "status": "ok", "result": {"bf16 TFLOP/s": 700.5}},
        {
            "item": ["speed", "saim base", "default"],
            "status": "ok",
            "result": {"batch": 64, "images/s": 2000, "ms": 32},
        },
        {"item": ["speed", "saim base", "--compile"], "status": "out of time", "seconds": 150},
        {"item": ["files", "saim base"], "status": "ok", "result": {"batch": 64, "images/s": 1800.5}},
        {"item": ["files", "saim base", "device"], "status": "ok", "result": {"batch": 64, "images/s": 1900}},
        {"item": ["guard", "saim"], "status": "ok", "result": {"guard": "on the device"}},
    ]
    (here / "docs").mkdir()
    (here / "docs" / "gpu_check.jsonl").write_text("\n".join(map(json.dumps, lines)))
    region = readme.generate(text)
    assert "A GPU, torch 2.11; bf16 TFLOP/s 700.5." in region
    assert "| saim base | default | 64 | 2000 | 32 | | |" in region
    assert "| saim base | from JPEG files | 64 | 1800.5 | | | |" in region
    assert "| saim base | from JPEG files, `--augment device` | 64 | 1900 | | | |" in region
    assert "compile" not in region and "guard" not in region
    (here / "docs" / "gpu_check.jsonl").write_text("{")
    with pytest.raises(UserError, match="is not what scripts/gpu_check.sh writes"):
        readme.generate(text)
