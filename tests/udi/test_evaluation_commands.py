"""The evaluations' flags against the authors', and the paths of their READMEs and repository."""

import argparse
import runpy

import pytest

from common import distributed
from tests.support.helpers import ROOT, golden_files, load_golden
from udi import main_knn, main_logistic_regression, main_semi_supervised, main_transfer, visualize_attention

SEMI = "eval_semi_supervised_learning/eval_semi_supervised_learning.py"
REGRESSION = "eval_semi_supervised_learning/eval_logistic_regression.py"
TRANSFER = "eval_transfer_learning/eval_transfer_learning.py"
MAINS = {
    "eval/eval_knn/eval_knn.py": main_knn,
    f"eval/{SEMI}": main_semi_supervised,
    f"eval/{REGRESSION}": main_logistic_regression,
    f"eval/{TRANSFER}": main_transfer,
    "visualize_attention.py": visualize_attention,
}
# Defaults and names that differ; other networks than UDI's are not offered.
DEST = {"--batch_size_per_gpu": "batch_size"}
DEFAULTS = {"--device": "auto", "--resume": ""}
NOT_OURS = ("swin", "resnet", "deit_small_patch16_224")
DEAD = {
    f"eval/{SEMI}": [
        *("--window_size", "--repeated-aug", "--resplit", "--disable_weight_decay_on_bias_norm", "--configure"),
        *("--distill_epochs", "--inat-category", "--layer_decay", "--layer_scale_init_value", "--gpu", "--dist_on_itp"),
        *("--disable_weight_decay_on_cls_pos", "--disable_weight_decay_on_rel_pos_bias", "--enable_deepspeed"),
        *("--local_rank", "--teacher-model", "--dist-eval"),
    ],
    f"eval/{TRANSFER}": ["--window_size", "--resplit", "--disable_weight_decay_on_bias_norm", "--configure"],
    f"eval/{REGRESSION}": ["--window_size", "--dist_on_itp", "--it0", "--world_size", "--epochs"],
    "eval/eval_knn/eval_knn.py": ["--local_rank", "--dist_url"],
}


def actions_of(name: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.Action]]:
    parser = MAINS[name].get_args_parser()
    return parser, {option: action for action in parser._actions for option in action.option_strings}


@golden_files("udi", "manifest", ".json")
@pytest.mark.parametrize("name", MAINS)
def test_flags_and_defaults(path, name):
    parser, actions = actions_of(name)
    defaults = vars(parser.parse_args([]))
    for flag, ref in load_golden(path)["flags"][name].items():
        action = actions[flag]
        kind = None if action.nargs == 0 else getattr(action.type, "__name__", None)
        expected = {"bool_flag": "boolean"}.get(ref["type"], ref["type"])
        assert kind == expected or {kind, expected} <= {None, "str"}, flag
        if ref["action"] in ("StoreTrue", "StoreFalse"):
            assert (action.nargs, action.const) == (0, ref["action"] == "StoreTrue"), flag
        else:
            assert action.nargs == ("+" if flag == "--image_path" else ref.get("nargs")), flag  # several pictures
        assert action.dest == DEST.get(flag, ref["dest"]), flag
        assert defaults[action.dest] == DEFAULTS.get(flag, ref["default"]), flag
        official = {choice for choice in ref.get("choices") or () if not str(choice).startswith(NOT_OURS)}
        assert action.choices is None or official <= set(action.choices), flag
    for flag in DEAD.get(name, ()):
        assert actions[flag] in distributed.flag_groups(parser).unused._group_actions, flag


@pytest.mark.parametrize("name", MAINS)
def test_both_spellings(name):
    """Dashes and underscores mean the same in the names that upstream writes in two ways."""
    _, actions = actions_of(name)
    for flag, action in actions.items():
        if "-" in flag.lstrip("-"):
            assert actions["--" + flag.lstrip("-").replace("-", "_")] is action
    if "--batch_size" in actions and "knn" not in name and "logistic" not in name:
        assert actions["--batch-size"] is actions["--batch_size"]
    if "--data_set" in actions:
        assert "CIFAR100" in (actions["--data_set"].choices or ())


@pytest.mark.parametrize("folder", ["", "eval/"])
@pytest.mark.parametrize("name", ["eval_knn/eval_knn.py", SEMI, REGRESSION, TRANSFER])
def test_aliases(folder, name, monkeypatch, capsys):
    path = ROOT / "udi" / folder / name
    assert len(path.read_text().splitlines()) <= 10
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    main = MAINS[f"eval/{name}"]
    assert main.get_args_parser().prog in capsys.readouterr().out
