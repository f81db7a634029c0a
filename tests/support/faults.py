"""Run a script of a method with a fault: FAULT=<name>:<when> python faults.py <method>/<script> <flags>.

kill_in_save:n   SIGKILL in the middle of the n-th file that torch.save writes
full_disk_at:n   the file system refuses growth from the n-th file on
signal_at:n      SIGTERM to the own process before the n-th loss is computed (from 0)
stop_in_eval:n   SIGTERM to the own process before the n-th batch of evaluations (from 0)
nan_at:n         the n-th loss (from 0) is NaN
"""

import os
import resource
import runpy
import signal
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

NETWORKS = {
    "saim": {"models_saim": ["SaimViT"], "models_vit": ["VisionTransformer"]},
    "semaim": {"models_semaim": ["AimViT"], "models_vit": ["VisionTransformer"]},
    "cae": {
        "models_cae": ["ContextAutoencoderViT"],
        "models_vit": ["VisionTransformer"],
        "models_segmentation": ["SegmentationNetwork"],
    },
    "a2mim": {
        "models_a2mim": ["MaskedImageModel", "Classifier"],
        "models_segmentation": ["SegmentationNetwork"],
        "detection_heads": ["MaskRCNN"],
    },
    # in pre-training two calls per step, the teacher's first
    "udi": {
        "models_udi": ["MultiCropWrapper"],
        "models_finetune": ["VisionTransformer"],
        "models_segmentation": ["SegmentationNetwork"],
        "detection_heads": ["MaskRCNN"],
    },
}
fault, when = os.environ["FAULT"].split(":")
calls = {"save": 0, "forward": 0, "eval": 0}
plain_save = torch.save


def save(state, file):
    calls["save"] += 1
    if fault == "kill_in_save" and calls["save"] == int(when):
        plain_save(state, file)
        file.flush()
        os.truncate(file.fileno(), file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "full_disk_at" and calls["save"] == int(when):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    plain_save(state, file)


def patch(network: type) -> None:
    plain_forward = network.forward

    def forward(self, *args, **kwargs):
        n = calls["forward"]
        calls["forward"] += self.training
        if fault == "stop_in_eval" and calls["eval"] == int(when) and not self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        calls["eval"] += not self.training
        if fault == "signal_at" and n == int(when) and self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        out = plain_forward(self, *args, **kwargs)
        if fault != "nan_at" or n != int(when) or not self.training:
            return out
        if isinstance(out, dict):
            return {**out, "loss": out["loss"] * float("nan")}
        if not isinstance(out, tuple):
            return out * float("nan")
        return getattr(out, "_make", tuple)((out[0] * float("nan"), *out[1:]))  # a named tuple stays one

    network.forward = forward


torch.save = save
sys.argv = sys.argv[1:]
method = Path(sys.argv[0]).parent.name
for module, names in NETWORKS[method].items():
    for name in names:
        patch(getattr(import_module(f"{method}.{module}"), name))
runpy.run_path(sys.argv[0], run_name="__main__")
