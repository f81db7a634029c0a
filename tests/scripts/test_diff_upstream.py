"""Comparison with the authors' repositories: invented checkouts that hold what is recorded, changed in one place."""

import argparse
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from common import distributed
from saim import main_finetune, main_linprobe, main_pretrain
from scripts.tools import diff_upstream as diff
from scripts.tools import sources
from semaim import main_pretrain as semaim_pretrain
from semaim.files import run_files
from tests.support.helpers import ROOT

RECORDED = [m for m in diff.METHODS if (diff.TOOLS / "upstream" / f"{m}.json").exists()]
CHECKOUTS = [(m, i) for m in RECORDED for i in range(len(diff.read_record(m)["repositories"]))]
SOME = [pytest.param(m, i, marks=pytest.mark.slow) if i else (m, i) for m, i in CHECKOUTS]


# ---- invented checkouts


def add_argument(name: str, fields: dict[str, Any]) -> str:
    """A line of a parser as the authors may have written it."""
    words = [repr(name)]
    action = fields.get("action", "store")
    if action != "store":
        words.append(f"action={action!r}" if action.islower() else f"action={action}")
    if fields.get("type"):
        words.append(f"type={fields['type']}" if fields["type"] != "<lambda>" else "type=lambda x: x")
    if "default" in fields or action == "store":
        words.append(f"default={fields.get('default')!r}")
    words += [f"{key}={fields[key]!r}" for key in ("dest", "nargs", "choices") if fields.get(key) is not None]
    return f"    parser.add_argument({', '.join(words)}, help='words')"


def define(parts: list[dict[str, Any]]) -> str:
    """Classes and functions with the recorded keywords."""
    functions, classes = [], {}
    for part in parts:
        owner, _, method = part["name"].rpartition(".")
        keywords = "".join(f", {k}={v!r}" for k, v in part.get("defaults", {}).items())
        if owner or (part["name"][0].isupper() and not part.get("calls")):
            name, method = (owner, method) if owner else (part["name"], "__init__")
            classes.setdefault(name, []).append(f"    def {method}(self{keywords}):\n        pass\n")
            continue
        call = "".join(f"{k}={v!r}, " for k, v in part.get("calls", {}).items() if k != "norm_layer")
        functions.append(
            f"def {part['name']}({keywords.removeprefix(', ')}{', ' if keywords else ''}**kwargs):\n"
            f"    model = Network({call}norm_layer=partial(nn.LayerNorm, eps=1e-6), **kwargs)\n    return model\n"
        )
    return "\n\n".join([f"class {n}(nn.Module):\n" + "\n".join(m) for n, m in classes.items()] + functions)


def nested(values: dict[str, Any]) -> str:
    """Assignments whose dotted paths hold these values."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *folders, last = path.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value

    def code(value: Any) -> str:
        if isinstance(value, dict) and value and all(k.isdigit() for k in value):
            return f"[{', '.join(code(value.get(str(i))) for i in range(1 + max(map(int, value))))}]"
        if isinstance(value, dict):
            return f"dict({', '.join(f'{k}={code(v)}' for k, v in value.items())})"
        return repr(value)

    return "\n".join(f"{name} = {code(value)}" for name, value in tree.items()) + "\n"


def place(repository: dict[str, Any], part: dict[str, Any]) -> str:
    """A file that a definition may stand in: one that is recorded, else an invented one."""
    patterns = part["file"].split(", ")
    known = [file for file in repository["files"] if "*" not in file]
    found = [file for pattern in patterns for file in known if diff.matches(file, pattern)]
    return (found or [patterns[0].replace("**/", "").replace("*", "some")])[0]


def checkout(method: str, folder: Path, index: int = 0) -> Path:
    """A folder with what is recorded of a repository."""
    repository = diff.read_record(method)["repositories"][index]
    texts: dict[str, list[str]] = {path: ["import argparse"] for path in repository["files"] if "*" not in path}
    texts |= {mark: ["import argparse"] for mark in repository["marks"] if Path(mark).suffix} | texts
    definitions: dict[str, list[dict[str, Any]]] = {}
    for part in repository.get("definitions", []):
        definitions.setdefault(place(repository, part), []).append(part)
    for file, parts in definitions.items():
        texts.setdefault(file, []).append(define(parts))
    for part in repository.get("parsers", []):
        lines = [add_argument(name, fields) for name, fields in part["flags"].items()]
        head = ["def get_args_parser():", "    parser = argparse.ArgumentParser('name', add_help=False)"]
        texts.setdefault(part["file"], []).append("\n".join([*head, *lines, "    return parser"]))
    for part in repository.get("configs", []):
        texts.setdefault(part["file"], []).append(nested(part["values"]))
    for path, parts in texts.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n\n\n".join(parts) + "\n")
    for mark in repository["marks"]:
        if not (folder / mark).exists():
            (folder / mark).mkdir(parents=True)
    return folder


def compared(method: str, folder: Path) -> list[diff.Row]:
    return diff.compare_checkout(method, diff.read_record(method), folder, diff.git_commit(folder))[1]


def unexpected(method: str, folder: Path) -> list[diff.Row]:
    return [row for row in compared(method, folder) if row.status == diff.UNEXPECTED]


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, f"{file} has no {old}"
    file.write_text(text.replace(old, new, 1))


@pytest.fixture
def saim(tmp_path) -> Path:
    return checkout("saim", tmp_path / "SAIM")


# ---- checkouts


@pytest.mark.parametrize(("method", "index"), CHECKOUTS)
def test_checkout_as_recorded__has_nothing_unexpected(method, index, tmp_path):
    folder = checkout(method, tmp_path, index)
    record = diff.read_record(method)
    repository, rows = diff.compare_checkout(method, record, folder, "")
    assert repository == record["repositories"][index]
    assert [row for row in rows if row.status == diff.UNEXPECTED] == []
    assert {row.kind for row in rows} >= {"file"} | ({"flag"} if repository.get("parsers") else set())
    told = {(row.where, row.name) for row in rows if row.kind == "flag"}
    assert told >= {(p["file"], name) for p in repository.get("parsers", []) for name in p["flags"]}
    assert not [row for row in rows if row.status == diff.PURPOSE and not row.why]


PRETRAIN, FINETUNE, LINPROBE = "main_pretrain.py", "main_finetune.py", "main_linprobe.py"
SAIM, VIT = "models_saim.py", "models_vit.py"
CHANGES = [  # file, text, what replaces it, name in the unexpected line, words of its reason
    (PRETRAIN, "'--blr', type=float, default=0.0002", "'--blr', type=float, default=2e-3", "--blr", "default 0.002"),
    (
        PRETRAIN,
        "'--epochs', type=int",
        "'--epochs', type=float",
        "--epochs",
        "type 'float', the pinned commit has 'int'",
    ),
    (PRETRAIN, "default='cuda'", "default='cpu'", "--device", "default 'cpu', the pinned commit has 'cuda'"),
    (FINETUNE, "parser.add_argument('--smoothing'", "dict('--smoothing'", "--smoothing", "commit has it: float 0.1"),
    (FINETUNE, "'--eval', action='store_true'", "'--eval', action='store_false'", "--eval", "action 'store_false'"),
    (LINPROBE, "return parser", "parser.add_argument('-x', '--extra'); return parser", "-x, --extra", "is new"),
    (
        LINPROBE,
        "return parser",
        "parser.set_defaults(global_pool=True); return parser",
        "--global_pool",
        "default True",
    ),
    (SAIM, "def saim_base(", "def saim_base_dec(", "saim_base", "the pinned commit defines it"),
    (SAIM, "class SaimViT(", "class SaimNet(", "SaimViT", "the pinned commit defines it"),
    (SAIM, "query_depth=12, share", "query_depth=8, share", "SaimViT(query_depth)", "the pinned commit has 12"),
    (SAIM, "gaussian_sigma=None", "gaussian_sigma=1", "SaimViT(gaussian_sigma)", "the pinned commit has None"),
    (SAIM, "norm_pix_loss=True):", "norm_pix_loss=True, extra=1):", "SaimViT(extra)", "is new"),
    (SAIM, ", query_depth=12, share_weight", ", share_weight", "SaimViT(query_depth)", "the pinned commit has 12"),
    (VIT, "embed_dim=1280", "embed_dim=1024", "vit_huge_patch14(embed_dim)", "the pinned commit has 1280"),
    (VIT, "depth=24,", "depth=24, init_values=0.1,", "vit_large_patch16(init_values)", "is new"),
    ("util/blocks.py", "mlp_ratio=4.0", "mlp_ratio=2.0", "Block(mlp_ratio)", "the pinned commit has 4.0"),
]


@pytest.mark.parametrize(("file", "old", "new", "name", "words"), CHANGES)
def test_one_change__is_the_one_unexpected_line(saim, file, old, new, name, words):
    replace(saim / file, old, new)
    (row,) = unexpected("saim", saim)
    assert (row.where, row.name) == (file, name)
    assert words in row.why


@pytest.mark.parametrize(("method", "index"), SOME)
def test_one_change__in_each_repository(method, index, tmp_path):
    folder = checkout(method, tmp_path, index)
    repository = diff.read_record(method)["repositories"][index]

    def told(file: str, old: str, new: str) -> list[tuple[str, str]]:
        """Files and names of what is not as recorded when a text is replaced."""
        text = (folder / file).read_text()
        replace(folder / file, old, new)
        wrong = (diff.UNEXPECTED, diff.UNMEASURED)
        rows = [(row.where, row.name) for row in compared(method, folder) if row.status in wrong]
        (folder / file).write_text(text)
        return rows

    for part in repository.get("parsers", [])[:3]:
        number = [n for n, f in part["flags"].items() if f.get("type") == "int" and isinstance(f.get("default"), int)]
        for name in number[:1]:
            default = part["flags"][name]["default"]
            old = add_argument(name, part["flags"][name])
            new = old.replace(f"default={default}", f"default={default + 1}")
            assert told(part["file"], old, new) == told(part["file"], f"{old}\n", "") == [(part["file"], name)]
    for part in repository.get("definitions", [])[-3:]:
        file, name = place(repository, part), part["name"].split(".")[-1]
        old = f"{'def' if f'def {name}(' in (folder / file).read_text() else 'class'} {name}("
        assert [name for _, name in told(file, old, old.replace("(", "2("))] == [part["name"]]
    for part in repository.get("configs", [])[:3]:
        path, value = next((p, v) for p, v in part["values"].items() if isinstance(v, int | float) and v is not True)
        name = path.split(".")[-1]
        assert told(part["file"], f"{name}={value!r}", f"{name}={value + 1!r}") == [(part["file"], path)]
    if "**" not in repository["files"]:
        (folder / "new_file.py").touch()
        assert told("new_file.py", "", "print(1)") == [("new_file.py", "")]


def test_new_and_missing_files(saim):
    (saim / "util" / "extra.py").touch()
    assert [row.where for row in unexpected("saim", saim)] == ["util/extra.py"]
    (saim / "util" / "extra.py").unlink()
    for name in ("new/deep/a.py", "new/\udcff.py", "new/c.txt", "util/__init__.py", ".github/x.py", "notes.md"):
        (saim / name).parent.mkdir(parents=True, exist_ok=True)
        (saim / name).touch()
    (row,) = unexpected("saim", saim)
    assert row.where == "new/ (2 files)"
    (saim / "new" / "\udcff.py").rename(saim / "\udcff.py")
    assert run("saim", "--upstream", str(saim))[1].count("\ufffd.py") == 1
    (saim / "\udcff.py").unlink()
    assert [row.where for row in unexpected("saim", saim)] == ["new/deep/a.py"]
    (saim / "new" / "deep" / "a.py").unlink()
    (saim / "main_finetune.py").unlink()
    (row,) = unexpected("saim", saim)
    assert (row.where, row.upstream) == ("main_finetune.py", "is gone")


def test_a_file_that_is_no_python__is_one_line(saim):
    (saim / "main_pretrain.py").write_text("print 'text'\n")
    (row,) = unexpected("saim", saim)
    assert row.upstream.startswith("line 1: is no Python 3")
    (saim / "main_pretrain.py").write_text("import argparse\nparser.add_argument('--a', dest=[1], default=9**9**9)\n")
    assert {row.name for row in unexpected("saim", saim)} >= {"--a", "--epochs"}
    (saim / "main_pretrain.py").write_bytes(b"\xff\xfe\x00x = 1")
    (row,) = unexpected("saim", saim)
    assert "is no Python 3" in row.upstream
    (saim / "main_pretrain.py").write_text("x = " + "-" * 100_000 + "1\n")
    (row,) = unexpected("saim", saim)
    assert (row.where, "is no Python 3" in row.upstream) == ("main_pretrain.py", True)


def test_a_default_that_is_computed__is_not_compared(saim):
    replace(saim / "main_pretrain.py", "'--seed', type=int, default=0", "'--seed', type=int, default=os.getpid()")
    assert unexpected("saim", saim) == []
    (row,) = (row for row in compared("saim", saim) if (row.where, row.name) == ("main_pretrain.py", "--seed"))
    assert (row.status, row.why) == (diff.SKIPPED, "its default is computed: os.getpid()")


def test_a_factory__takes_what_it_does_not_pass_from_the_class(saim):
    """A change of the class is told once, an omitted keyword is told where the class's default differs."""
    text = (saim / "models_saim.py").read_text().replace("Network(", "SaimViT(")
    (saim / "models_saim.py").write_text(text)
    assert unexpected("saim", saim) == []
    (saim / "models_saim.py").write_text(re.sub(r"SaimViT\(img_size.*norm_layer", "SaimViT(norm_layer", text))
    rows = {row.name: row.upstream for row in unexpected("saim", saim)}
    assert rows == {"saim_base(embed_dim)": "1024", "saim_base(depth)": "24", "saim_base(num_heads)": "16"}
    replace(saim / "models_saim.py", "drop_path_rate=0.0", "drop_path_rate=0.1")
    assert {row.name for row in unexpected("saim", saim)} - set(rows) == {"SaimViT(drop_path_rate)"}


def test_config_values__through_base_files(tmp_path):
    (tmp_path / "_base_").mkdir()
    (tmp_path / "_base_" / "run.py").write_text("optimizer = dict(type='AdamW', lr=1e-3, betas=(0.9, 0.95))\n")
    (tmp_path / "x.py").write_text(
        "_base_ = ['_base_/run.py', '../../outside.py']\nlr = 2e-3\n"
        "optimizer = dict(lr=lr)\ntrain = [dict(a=1), {'b': dict(c=3)}]\n"
    )
    record = {
        "file": "x.py",
        "values": {
            "optimizer.lr": 2e-3,
            "optimizer.betas": [0.9, 0.95],
            "optimizer.type": "SGD",
            "train.1.b.c": 3,
            "train.7.b": 1,
            "nothing.there": 2,
        },
    }
    rows = {row.name: row.status for row in diff.compare_config(record, diff.Source(tmp_path, "x.py"))}
    assert rows == {
        "3 values": diff.SAME,
        "optimizer.type": diff.UNEXPECTED,
        "train.7.b": diff.SKIPPED,
        "nothing.there": diff.SKIPPED,
    }


# ---- git, wrong folders, output


@pytest.mark.parametrize("form", ["detached", "branch", "packed", "worktree"])
def test_git_commit__is_read_from_files(form, tmp_path):
    commit, git = "0123456789" * 4, tmp_path / ".git"
    if form == "worktree":
        (tmp_path / ".git").write_text("gitdir: store/worktrees/x\n")
        git = tmp_path / "store" / "worktrees" / "x"
        git.mkdir(parents=True)
        (git / "commondir").write_text("../..\n")
        (tmp_path / "store" / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    git.mkdir(exist_ok=True)
    (git / "HEAD").write_text(f"{commit}\n" if form == "detached" else "ref: refs/heads/main\n")
    if form == "branch":
        (git / "refs" / "heads").mkdir(parents=True)
        (git / "refs" / "heads" / "main").write_text(f"{commit}\n")
    elif form == "packed":
        (git / "packed-refs").write_text(
            f"# pack-refs with: peeled\n{'f' * 40} refs/tags/v1\n{commit} refs/heads/main\n"
        )
    assert diff.git_commit(tmp_path) == commit


def test_git_commit__of_no_checkout(tmp_path):
    assert diff.git_commit(tmp_path) == ""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    assert diff.git_commit(tmp_path) == ""


def run(*flags: str) -> tuple[int, str]:
    """Exit status and output of main, or its one line of an error."""
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            diff.main(diff.get_args_parser().parse_args(flags))
        except distributed.UserError as error:
            return 2, str(error)
        except SystemExit as end:
            assert end.code == 1
            status = 1
    return status, out.getvalue().strip()


def test_the_command__says_what_is_unexpected(saim):
    status, text = run("saim", "--upstream", str(saim))
    assert status == 0
    assert "Unexpected: none" in text
    assert "commit is not known" in text
    assert "--amp_dtype" in text
    replace(saim / "main_pretrain.py", "default='saim_base'", "default='saim_large'")
    (saim / ".git").mkdir()
    (saim / ".git" / "HEAD").write_text("a" * 40)
    status, text = run("saim", "--upstream", str(saim))
    assert status == 1
    assert "NOTE: the checkout is at commit aaaaaaaaaaaa" in text
    assert text.endswith("the pinned commit has 'saim_base'")
    status, text = run("saim", "--upstream", str(saim), "--json")
    assert status == 1
    result = json.loads(text)
    assert result["checkout"]["commit"] == "a" * 40
    assert result["counts"]["unexpected"] == 1
    assert [diff.Row(**row) for row in result["rows"]] == compared("saim", saim)


def test_the_script__in_a_process_of_its_own(saim, run_script):
    (saim / "models_saim.py").unlink()
    (saim / "util").rename(saim / "other")
    done = run_script("scripts/tools/diff_upstream.py", "saim", "--upstream", str(saim), status=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "is no checkout of https://github.com/qiy20/SAIM (no models_saim.py)" in done.stderr


def test_the_report__lists_everything_on_request(saim):
    status, short = run("saim", "--upstream", str(saim))
    _, full = run("saim", "--upstream", str(saim), "--all")
    assert status == 0
    assert "--warmup_epochs" not in short
    assert full.count("--warmup_epochs") == 3
    assert "different on purpose" in short
    assert "auto; CPU works, too" in short


def test_wrong_folders(tmp_path, saim):
    assert run("saim", "--upstream", str(tmp_path / "none")) == (
        2,
        f"--upstream {tmp_path}/none: no such folder, expected a checkout",
    )
    status, text = run("saim", "--upstream", str(saim / "models_vit.py"))
    assert (status, "is no folder" in text) == (2, True)
    status, text = run("semaim", "--upstream", str(saim))
    assert (status, "is no checkout of https://github.com/skyoux/SemAIM" in text) == (2, True)
    assert run("saim", "--upstream", str(saim), "--flags", "--epochs 1")[0] == 2


# ---- the data


@pytest.mark.parametrize("method", RECORDED)
def test_record__names_files_that_are_here(method):
    record = diff.read_record(method)
    for repository in record["repositories"]:
        places = [entry["here"] for entry in repository["files"].values()]
        places += [part["here"] for kind in ("parsers", "definitions") for part in repository.get(kind, [])]
        for path in filter(None, ", ".join(filter(None, places)).split(", ")):
            assert (ROOT / path.partition(":")[0]).exists(), path
        assert re.fullmatch("[0-9a-f]{7,40}", repository["commit"])
        files = repository["files"]
        for part in repository.get("parsers", []) + repository.get("definitions", []) + repository.get("configs", []):
            assert any(diff.matches(place(repository, part), pattern) for pattern in files), part["file"]


@pytest.mark.parametrize(("method", "index"), CHECKOUTS)
def test_intended_differences__are_differences(method, index):
    for part in diff.read_record(method)["repositories"][index].get("parsers", []):
        ours = diff.our_flags(part["here"]) if part["here"] else []
        for name in set(part.get("intended", {})) - {"*"}:
            known = diff.recorded_flag(name, part["flags"][name])
            mine = next((flag for flag in ours if name in flag.options), None)
            assert mine is None or diff.flag_changes(known, mine, ours=True), f"{part['file']} {name} is the same here"


@pytest.mark.parametrize("method", RECORDED)
def test_record__has_every_flag_of_the_golden_manifest(method):
    manifest = json.loads((ROOT / "tests" / "golden" / method / "manifest.json").read_text())["flags"]
    parsers = [p for r in diff.read_record(method)["repositories"] for p in r.get("parsers", [])]
    for file, flags in manifest.items():
        if file.endswith(".sh"):
            continue
        recorded = [p["flags"] for p in parsers if file in (p["file"], Path(p["file"]).stem)]
        if not recorded and method in ("udi", "a2mim"):
            continue  # dense tasks, whose files are out of scope
        assert recorded, file
        for name, fields in flags.items():
            known = [diff.recorded_flag(name, r[name]) for r in recorded if name in r]
            assert known, f"{file} {name}"
            dest = {n: f.get("dest") for n, f in flags.items()}
            shares = list(dest.values()).index(dest[name]) != list(dest).index(name) if dest[name] else False
            default = sources.plain(fields.get("default"))
            assert shares or any(sources.equal(k.default, default) for k in known), f"{file} {name}"
            kind = (
                ""
                if fields.get("type") in (None, "str", "flag", "Store", "StoreTrue", "StoreFalse")
                else fields["type"]
            )
            assert any(k.type == kind for k in known), f"{file} {name}"


def test_record__of_a_wrong_form(tmp_path, monkeypatch):
    monkeypatch.setattr(diff, "TOOLS", tmp_path)
    with pytest.raises(distributed.UserError, match="cannot be read"):
        diff.read_record("saim")
    (tmp_path / "upstream").mkdir()
    for text, words in (
        ("{", "is no JSON"),
        ("[]", "is no object"),
        ('{"repositories": []}', "lacks differences"),
        ('{"repositories": [], "differences": [], "flags": 1}', "has the unknown key flags"),
        ('{"repositories": [{"name": ""}], "differences": []}', r"repositories\[0\] lacks commit"),
    ):
        (tmp_path / "upstream" / "saim.json").write_text(text)
        with pytest.raises(distributed.UserError, match=words):
            diff.read_record("saim")


# ---- checkpoints

NANO = ["--model", "saim_nano", "--input_size", "32", "--patch_size", "8", "--query_depth", "2"]
BLUR = ["--gaussian_kernel_size", "3", "--gaussian_sigma", "1"]
VIT_NANO = ["--model", "vit_nano_patch16", "--input_size", "32", "--patch_size", "8", "--nb_classes", "10"]


def written(
    folder: Path, args: argparse.Namespace, model: torch.nn.Module, files: distributed.Files | None = None
) -> str:
    """A checkpoint as our mains write it."""
    files = files or distributed.Files()
    args.output_dir = str(folder)
    distributed.Checkpoint(str(folder), args, model, files, optimizer=torch.optim.SGD(model.parameters())).save(
        distributed.Position(1)
    )
    return str(folder / files.latest)


def checkpoint_rows(method: str, path: str, flags: str = "") -> dict[str, diff.Row]:
    return {row.name: row for row in diff.compare_checkpoint(diff.read_record(method), path, flags)}


def test_checkpoint_of_pretraining(tmp_path):
    args = main_pretrain.get_args_parser().parse_args([*NANO, *BLUR])
    path = written(tmp_path, args, main_pretrain.build_model(args))
    rows = checkpoint_rows("saim", path)
    assert {row.status for row in rows.values()} == {diff.SAME}
    assert rows["format"].upstream.startswith("pre-training, ")
    assert rows["format"].here == "saim/main_pretrain.py:build_model, saim_nano"
    assert rows["loads"].upstream == "strictly"
    assert "missing: head" in rows["encoder"].upstream or "missing: " in rows["encoder"].upstream
    assert rows["encoder"].here == "saim/models_vit.py:load_encoder, vit_nano_patch16"


@pytest.mark.parametrize("pool", ["--global_pool", "--cls_token"])
def test_checkpoints_of_finetuning_and_probing(pool, tmp_path):
    args = main_finetune.get_args_parser().parse_args([*VIT_NANO, pool])
    model = main_finetune.build_model(args)
    rows = checkpoint_rows("saim", written(tmp_path / "a", args, model))
    assert {row.status for row in rows.values()} == {diff.SAME}
    assert rows["format"].upstream.startswith("fine-tuned, ")
    probe = main_linprobe.get_args_parser().parse_args([*VIT_NANO, pool])
    main_linprobe.add_probe(model)
    rows = checkpoint_rows("saim", written(tmp_path / "b", probe, model))
    assert {row.status for row in rows.values()} == {diff.SAME}
    assert rows["format"].upstream.startswith("linear probe, ")


def test_official_layout__with_a_namespace(tmp_path):
    """Keys as the authors' code stores them; flags that we added are not among its arguments."""
    args = main_pretrain.get_args_parser().parse_args([*NANO, *BLUR, "--prediction_head_type", "LINEAR"])
    model = main_pretrain.build_model(args)
    theirs = {k: v for k, v in vars(args).items() if k not in ("order", "patch_size", "amp_dtype", "compile")}
    theirs |= {"gpu": 0, "dist_backend": "nccl"}
    path = str(tmp_path / "checkpoint.pth")
    state = {
        "model": model.state_dict(),
        "optimizer": {},
        "epoch": 0,
        "scaler": {},
        "args": argparse.Namespace(**theirs),
    }
    torch.save(state, path)
    rows = checkpoint_rows("saim", path, "--patch_size 8")
    assert [row for row in rows.values() if row.status != diff.SAME] == []
    rows = checkpoint_rows("saim", path)  # whose patches are 16 pixels by default
    shapes = [row for row in rows.values() if row.status == diff.UNEXPECTED]
    assert any("of another shape" in row.name and "pos_embed" in row.upstream for row in shapes)
    del state["args"], state["model"]["cls_token"]
    torch.save(state, path)
    rows = checkpoint_rows("saim", path, "--patch_size 8 --input_size 32 --model saim_nano")
    missing = [row.name for row in rows.values() if row.status == diff.UNEXPECTED]
    assert missing == ["1 missing", "encoder"]


def test_semaim_checkpoint__with_and_without_flags(tmp_path):
    args = semaim_pretrain.get_args_parser().parse_args([*NANO, *BLUR, "--model", "aim_nano"][2:])
    model = semaim_pretrain.build_model(args)
    path = written(tmp_path, args, model, run_files(args))
    rows = checkpoint_rows("semaim", path)
    assert {row.status for row in rows.values()} == {diff.SAME}
    assert rows["encoder"].here.endswith("vit_nano_patch16")
    state = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "model": "aim_nano"}
    torch.save(state, path)
    rows = checkpoint_rows("semaim", path, "--patch_size 8 --input_size 32")
    assert [row for row in rows.values() if row.status != diff.SAME] == []


def test_wrong_checkpoints__are_one_line(tmp_path, saim):
    (tmp_path / "text.pth").write_text("words")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save({"model": 1, "args": 2}, tmp_path / "values.pth")
    torch.save({"f": print}, tmp_path / "code.pth")
    args = main_pretrain.get_args_parser().parse_args(NANO)
    model = main_pretrain.build_model(args)
    good = written(tmp_path / "run", args, model)
    torch.save({"model": model.state_dict(), "args": {"model": 5, "input_size": "x"}}, tmp_path / "odd.pth")
    for path, flags, words in (
        ("none.pth", "", "no such checkpoint file"),
        ("text.pth", "", "not a checkpoint"),
        (
            "other.pth",
            "",
            "is no checkpoint of a kind that is known here (pre-training, linear probe, fine-tuned); its keys: model",
        ),
        ("values.pth", "", "is no checkpoint of a kind"),
        ("code.pth", "", "it would execute"),
        (good, "--no_such 1", "--flags --no_such 1: unrecognized arguments: --no_such 1"),
        (good, "--model saim_huge", "invalid choice"),
        (good, "'", "--flags ': "),
        (good, "--query_depth 3", "make no network here"),
        ("odd.pth", "", "make no network here"),
    ):
        status, text = run("saim", "--upstream", str(saim), "--checkpoint", str(tmp_path / path), f"--flags={flags}")
        assert (status, text.count("\n")) == (2, 0), text
        assert words in text


def test_docstring__names_every_key():
    """The form of upstream/<method>.json is told where its reader is."""
    assert diff.__doc__
    words = set(diff.__doc__.replace(",", " ").replace("{", " ").replace("}", " ").replace("`", " ").split())
    keys = {key for required, optional in diff.RECORD.values() for key in required | optional}
    told = {word.strip(".:;()[]?") for word in words}
    assert keys - told <= {"computed"}
