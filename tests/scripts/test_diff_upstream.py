"""Comparison with the authors' repositories: invented checkouts like the pinned commits, changed in one place."""

import argparse
import contextlib
import io
import json
import re
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from common import distributed
from saim import main_finetune, main_linprobe, main_pretrain
from scripts.tools import diff_upstream as diff
from semaim import main_pretrain as semaim_pretrain
from semaim.files import run_files
from tests.support import checkouts
from tests.support.checkouts import checkout

CHECKOUTS = [(m, i) for m in diff.METHODS for i in range(len(diff.read_record(m)["repositories"]))]
SOME = [pytest.param(m, i, marks=pytest.mark.slow) if i else (m, i) for m, i in CHECKOUTS]


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
def test_checkout_as_pinned__has_nothing_unexpected(method, index, tmp_path):
    folder = checkout(method, tmp_path, index)
    record = diff.read_record(method)
    repository, rows = diff.compare_checkout(method, record, folder, "")
    assert repository == record["repositories"][index]
    assert [row for row in rows if row.status == diff.UNEXPECTED] == []
    assert {row.kind for row in rows} >= {"file", "flag"}
    told = {(row.where, row.name) for row in rows if row.kind == "flag"}
    unparsable = repository.get("unparsable", [])
    flags = {(f, name) for f, options in checkouts.flags(method, index).items() for name in options}
    assert told >= {(file, name) for file, name in flags if file not in unparsable}
    assert not [row for row in rows if row.status == diff.PURPOSE and not row.why]
    # What is only mapped is not called the same, and bodies are not called equal.
    assert {row.status for row in rows if row.kind == "file"} <= {diff.MAPPED, diff.PURPOSE, diff.SKIPPED}
    assert any(row.kind == "file" and row.status == diff.MAPPED for row in rows)
    # Every difference that is recorded is one.
    purposes = {(row.where, row.name) for row in rows if row.status == diff.PURPOSE}
    for file, part in repository["flags"].items():
        recorded = {(file, name) for names in part.get("differs", {}).values() for name in names}
        assert recorded <= purposes, file
    for place, names in repository["definitions"].items():
        for name, part in names.items():
            keys = {f"{name}({key})" for keys in part.get("differs", {}).values() for key in keys}
            assert keys <= {name for _, name in purposes}, place
    for values in repository["configs"].get("differs", {}).values():
        for pattern in values:
            assert any(fnmatchcase(f"{file}: {name}", pattern) for file, name in purposes), pattern


PRETRAIN, FINETUNE, LINPROBE = "main_pretrain.py", "main_finetune.py", "main_linprobe.py"
SAIM, VIT = "models_saim.py", "models_vit.py"
CHANGES = [  # file, text, what replaces it, name in the unexpected line, words of it
    (PRETRAIN, "'--blr', type=float, default=0.0002", "'--blr', type=float, default=2e-3", "--blr", "default 0.002"),
    (PRETRAIN, "'--epochs', type=int", "'--epochs', type=float", "--epochs", "type 'float', here 'int'"),
    (
        PRETRAIN,
        "default='cuda'",
        "default='cpu'",
        "--device",
        "str 'cpu' | str 'auto': the pinned commit has str 'cuda'",
    ),
    (PRETRAIN, "'--lr', type=float", "'--lr', type=float, nargs='+'", "--lr", "nargs '+', here None"),
    (PRETRAIN, "'saim_base'", "'saim_base', choices=['saim_base', 'x']", "--model", "choices ['saim_base', 'x'], here"),
    (FINETUNE, "parser.add_argument('--smoothing'", "dict('--smoothing'", "--smoothing", "the pinned commit has it"),
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
    (SAIM, "query_depth=12, share", "query_depth=8, share", "SaimViT(query_depth)", "8 | 12"),
    (SAIM, "gaussian_sigma=None", "gaussian_sigma=1", "SaimViT(gaussian_sigma)", "1 | None"),
    (SAIM, "norm_pix_loss=True):", "norm_pix_loss=True, extra=1):", "SaimViT(extra)", "1 | no such keyword"),
    (SAIM, ", query_depth=12, share_weight", ", share_weight", "SaimViT(query_depth)", "no such keyword | 12"),
    (VIT, "embed_dim=1280", "embed_dim=1024", "vit_huge_patch14(embed_dim)", "1024 | 1280"),
    (VIT, "depth=24,", "depth=24, init_values=0.1,", "vit_large_patch16(init_values)", "0.1 | no such keyword"),
    ("util/blocks.py", "mlp_ratio=4.0", "mlp_ratio=2.0", "Block(mlp_ratio)", "2.0 | 4.0"),
]


@pytest.mark.parametrize(("file", "old", "new", "name", "words"), CHANGES)
def test_one_change__is_the_one_unexpected_line(saim, file, old, new, name, words):
    replace(saim / file, old, new)
    (row,) = unexpected("saim", saim)
    assert (row.where, row.name) == (file, name)
    assert words in f"{row.upstream} | {row.here}: {row.why}"


@pytest.mark.parametrize(("method", "index"), SOME)
def test_one_change__in_each_repository(method, index, tmp_path):
    folder = checkout(method, tmp_path, index)
    repository = diff.read_record(method)["repositories"][index]

    def told(file: str, old: str, new: str) -> list[tuple[str, str]]:
        """Files and names of what is not as at the pinned commit when a text is replaced."""
        text = (folder / file).read_text()
        replace(folder / file, old, new)
        wrong = (diff.UNEXPECTED, diff.UNJUDGED)
        rows = [(row.where, row.name) for row in compared(method, folder) if row.status in wrong]
        (folder / file).write_text(text)
        return [row for row in rows if row not in before]

    before = [(r.where, r.name) for r in compared(method, folder) if r.status == diff.UNJUDGED]
    parsers = {f: o for f, o in checkouts.flags(method, index).items() if "here" in repository["flags"][f]}
    for file, options in list(parsers.items())[:3]:
        number = [n for n, f in options.items() if f.get("type") == "int" and isinstance(f.get("default"), int)]
        for name in number[:1]:
            default = options[name]["default"]
            old = checkouts.add_argument(name, options[name])
            new = old.replace(f"default={default}", f"default={default + 1}")
            assert told(file, old, new) == told(file, f"{old}\n", "") == [(file, name)]
    definitions = [(place, name) for place, names in repository["definitions"].items() for name in names]
    for place, whole in definitions[-3:]:
        file, name = checkouts.place(repository, place), whole.split(".")[-1]
        old = f"{'def' if f'def {name}(' in (folder / file).read_text() else 'class'} {name}("
        assert [name for _, name in told(file, old, old.replace("(", "2("))] == [whole]
    pairs = diff.config_pairs(repository["configs"].get("folders", {}), diff.files_of(folder))
    for file, here in list(pairs.items())[:3]:
        lr = diff.our_config(here)["lr"]
        assert told(file, f"lr={lr!r}", f"lr={lr + 1!r}") == [(file, "optimizer.lr")]
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


def test_a_file_that_is_no_python_at_the_pinned_commit__is_no_surprise(tmp_path):
    status, text = run("udi", "--upstream", str(checkout("udi", tmp_path)))
    assert status == 0
    (line,) = (line for line in text.splitlines() if "cannot be parsed there" in line)
    assert "line 25: is no Python 3" in line


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


def test_numbers_in_bodies__are_listed_as_not_compared(saim):
    rows = [row for row in compared("saim", saim) if row.why == "numbers in the body"]
    assert {row.status for row in rows} == {diff.SKIPPED}
    assert {row.name: row.upstream for row in rows}["SaimViT"] == "1e-06"


# ---- configurations


@pytest.fixture
def configuration(tmp_path, monkeypatch) -> Path:
    """A file of theirs with base files; ours is what the test says."""
    ours = {"lr": 2e-3, "betas": [0.9, 0.95], "opt": "sgd", "alone": 1, "rate": 0.1}
    monkeypatch.setattr(diff, "our_config", lambda here: ours)
    (tmp_path / "_base_").mkdir()
    (tmp_path / "_base_" / "run.py").write_text("optimizer = dict(type='AdamW', lr=1e-3, betas=(0.9, 0.95))\n")
    (tmp_path / "x.py").write_text(
        "_base_ = ['_base_/run.py', '../../outside.py']\nlr = 2e-3\n"
        "optimizer = dict(lr=lr)\ntrain = [dict(a=1), {'b': dict(c=3)}]\nrate = 0.3 / 3\n"
    )
    return tmp_path


def test_config_values__through_base_files_and_against_ours(configuration):
    values = {
        "optimizer.lr": "lr",
        "optimizer.betas": "betas",
        "optimizer.type": ["opt", {"AdamW": ["adamw", "fused_adamw"]}],
        "train.1.b.c": "opt",
        "train.7.b": "alone",
        "nothing.there": "nor_here",
        "rate": "rate",
    }
    source = diff.Source(configuration, "x.py")
    rows = {row.name: row for row in diff.compare_config("ours.py", values, source, diff.Judge({}, {}))}
    assert {name: row.status for name, row in rows.items()} == {
        "3 values": diff.SAME,
        "optimizer.type": diff.UNEXPECTED,
        "train.1.b.c": diff.UNEXPECTED,
        "set on one side only": diff.SKIPPED,
    }
    assert (rows["optimizer.type"].upstream, rows["optimizer.type"].here) == ("'AdamW'", "opt 'sgd'")
    assert rows["set on one side only"].upstream == "alone"
    judge = diff.Judge({"differs": {"reason one": {"x.py: optimizer.*": "'AdamW'"}}}, {})
    rows = {row.name: row for row in diff.compare_config("ours.py", values, source, judge)}
    assert (rows["optimizer.type"].status, rows["optimizer.type"].why) == (diff.PURPOSE, "reason one")


def test_experiments_that_are_left_out__are_named(tmp_path):
    folder = checkout("a2mim", tmp_path)
    rows = {row.where: row for row in compared("a2mim", folder) if row.kind == "file"}
    row = rows["configs/openmixup/pretrain/a2mim/cifar100/r18_l3_sz224_cos_ep300.py"]
    assert (row.status, row.why) == (diff.PURPOSE, "experiment configuration that is left out")
    name = "configs/openmixup/finetune/imagenet/r50_linear_sz224_4xb64_step_ep100.py"
    assert (rows[name].status, rows[name].here) == (diff.MAPPED, f"a2mim/{name}")
    (folder / name).unlink()
    (row,) = unexpected("a2mim", folder)
    assert (row.where, row.upstream) == (Path(name).name, "is gone")


# ---- git, wrong folders, output


def git(folder: Path, *words: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *name, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def committed(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all", "--allow-empty")
    return git(folder, "rev-parse", "HEAD")


def test_git_commit__in_every_form(tmp_path):
    """Branch, packed branch, detached, worktree."""
    folder = tmp_path / "a"
    folder.mkdir()
    commit = committed(folder)
    assert diff.git_commit(folder) == commit
    git(folder, "pack-refs", "--all")
    assert diff.git_commit(folder) == commit
    git(folder, "worktree", "add", "-q", "--detach", str(tmp_path / "b"))
    assert (tmp_path / "b" / ".git").is_file()
    assert diff.git_commit(tmp_path / "b") == commit
    (folder / "inside").mkdir()
    assert diff.git_commit(folder / "inside") == ""


def test_git_commit__of_no_checkout(tmp_path):
    assert diff.git_commit(tmp_path) == ""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    assert diff.git_commit(tmp_path) == ""
    (tmp_path / ".git").rename(tmp_path / "git")
    git(tmp_path, "init", "-q")
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
    commit = committed(saim)
    replace(saim / "main_pretrain.py", "default='saim_base'", "default='saim_large'")
    status, text = run("saim", "--upstream", str(saim))
    assert status == 1
    assert f"NOTE: the checkout is at commit {commit[:12]}" in text
    assert "NOTE: locally modified: main_pretrain.py" in text
    assert text.endswith("locally modified; default 'saim_large', here 'saim_base'")
    status, text = run("saim", "--upstream", str(saim), "--json")
    assert status == 1
    result = json.loads(text)
    assert result["checkout"]["commit"] == commit
    assert result["checkout"]["locally modified"] == ["main_pretrain.py"]
    assert result["counts"]["unexpected"] == 1
    rows = [diff.Row(**row) for row in result["rows"]]
    assert [row._replace(why=row.why.removeprefix("locally modified; ")) for row in rows] == compared("saim", saim)
    assert {row.where for row in rows if row.why.startswith("locally modified")} == {"main_pretrain.py"}


def test_output_that_is_cut__ends_quietly(saim, tmp_path, monkeypatch):
    class Cut(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return file.fileno()

    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr("sys.stdout", Cut())
        diff.main(diff.get_args_parser().parse_args(["saim", "--upstream", str(saim)]))
        monkeypatch.undo()
        file.write("goes nowhere")
    assert (tmp_path / "out").read_text() == ""


@pytest.mark.slow
def test_the_script__in_a_process_of_its_own(saim, run_script):
    (saim / "models_saim.py").unlink()
    (saim / "util").rename(saim / "other")
    done = run_script("scripts/tools/diff_upstream.py", "saim", "--upstream", str(saim), status=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "is no checkout of https://github.com/qiy20/SAIM (no models_saim.py)" in done.stderr


@pytest.mark.parametrize("wrong", ["--no_such", "--checkpoint", "--all=1"])
def test_a_wrong_flag__is_one_line(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        distributed.run(diff.main, lambda: diff.get_args_parser().parse_args(["saim", "--upstream", "x", wrong]))
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert (text.count("\n"), wrong.partition("=")[0] in text) == (1, True)


def test_the_report__lists_everything_on_request(saim):
    status, short = run("saim", "--upstream", str(saim))
    _, full = run("saim", "--upstream", str(saim), "--all")
    assert status == 0
    assert "--warmup_epochs" not in short
    assert full.count("--warmup_epochs") == 3
    assert "different on purpose" in short
    assert "auto; CPU works, too" in short
    # The differences in behaviour stand below the flags.
    places = [short.index(title) for title in ("Flags: theirs", "Behaviour: theirs", "Definitions: theirs")]
    assert places == sorted(places)
    assert "  targets: blurred in half precision under autocast | float32" in short
    assert re.search(r"^ +same +mapped +on purpose +unexpected .*\nfiles +0 +15 +0 +0 ", short, re.MULTILINE)


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
    return {row.name: row for row in diff.compare_checkpoint(method, diff.read_record(method), path, flags)}


def test_checkpoint_of_pretraining(tmp_path):
    args = main_pretrain.get_args_parser().parse_args([*NANO, *BLUR])
    path = written(tmp_path, args, main_pretrain.build_model(args))
    rows = checkpoint_rows("saim", path)
    assert {row.status for row in rows.values()} == {diff.SAME}
    assert rows["format"].upstream.startswith("pre-training, ")
    assert rows["format"].here == "saim/main_pretrain.py:build_model, saim_nano"
    assert rows["loads"].upstream == "strictly"
    assert "missing: head" in rows["encoder"].upstream or "missing: " in rows["encoder"].upstream
    assert rows["encoder"].here == "scripts/tools/encoders/saim.py:load_backbone, vit_nano_patch16"


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
