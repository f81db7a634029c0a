"""The authors' command lines of segmentation as flags of our program."""

import pytest

from cae import main_segmentation
from cae.authors_commands import translate
from common.distributed import UserError
from tests.support.helpers import ROOT

TOOLS = ROOT / "cae" / "downstream_tasks" / "semantic_segmentation" / "tools"


def parsed(*words: str, test: bool = False):
    return main_segmentation.get_args_parser().parse_args(translate(list(words), main_segmentation.ROWS, test))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("configs/cae/upernet_base_12_512_slide_160k_ade20k_pt_300ep.py", (3e-4, "upernet_cae_base")),
        ("upernet_cae_base_800e_160k.py", (2e-4, "upernet_cae_base")),
        ("upernet_base_1600e.py", (1e-4, "upernet_cae_base")),
        ("upernet_base_12_512_slide_160k_ade20k.py", (2e-4, "upernet_cae_base")),
        ("upernet_cae_base_800e_lr4e-4.py", (4e-4, "upernet_cae_base")),
        ("upernet_cae_large_24_512_slide_160k.py", (4e-5, "upernet_cae_large")),
    ],
)
def test_a_configuration_names_a_row(config, expected):
    args = parsed(config)
    assert (args.lr, args.model) == expected
    assert args.output_dir == f"work_dirs/{config.split('/')[-1][:-3]}"
    large = args.model == "upernet_cae_large"
    values = (args.drop_path, args.layer_scale_init_value, args.layer_decay, args.save_interval)
    assert values == ((0.15, 1e-5, 0.95, 32000) if large else (0.1, 0.1, 0.65, 8000))


def test_training_flags():
    words = "upernet_base_800e.py --work-dir OUT --seed 3 --deterministic --launcher pytorch --gpus 8 --gpu-ids 0 1"
    words += " --options model.pretrained=FILE.pth model.backbone.use_checkpoint=True --data_path DATA"
    words += " --cfg-options data.samples_per_gpu=4 runner.max_iters=80000 --resume-from OLD.pth"
    args = parsed("--local-rank=1", *words.split())
    assert (args.output_dir, args.seed, args.deterministic, args.finetune) == ("OUT", 3, True, "FILE.pth")
    assert (args.use_checkpoint, args.batch_size, args.iters, args.resume) == (True, 4, 80000, "OLD.pth")
    assert (args.data_path, args.local_rank, args.eval) == ("DATA", 1, False)


def test_testing_flags():
    args = parsed("upernet_large_1600e.py", "iter_160000.pth", "--eval", "mIoU", "--work-dir", "OUT", test=True)
    assert (args.eval, args.resume, args.model, args.output_dir) == (
        True,
        "iter_160000.pth",
        "upernet_cae_large",
        "OUT",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--work-dir OUT", r"expected CONFIG \[flags\]"),
        ("mine.py", "mine.py: expected the name of a configuration with base or large in it"),
        ("upernet_large_800e.py", "800 epochs of pre-training, expected 1600 for large"),
        ("upernet_base.py --options model.depth=3", "--options model.depth=3: expected model.pretrained, "),
    ],
)
def test_what_cannot_be_understood(words, message):
    with pytest.raises(UserError, match=message):
        parsed(*words.split())
