"""One process of two: loss and centres of a golden's share of logits, as JSON. Last arguments: golden, folder."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from common import distributed
from tests.support.helpers import load_golden
from tests.udi.test_loss import loss_on
from udi.loss import UDILoss

distributed.init("cpu")
ref = load_golden(Path(sys.argv[-2]))
meta, rank, found = ref.meta, distributed.rank(), {}
for exact in (False, True):
    given = {name: meta[name] for name in ("alpha", "student_temp", "center_momentum", "num_clt")}
    settings = UDILoss(meta["num_local_crops"], meta["dim"], [meta["teacher_temp"]], **given, exact_center=exact)
    settings.centering.center.copy_(ref["in/center"])
    loss, *_ = loss_on(ref, f"in/rank{rank}", settings, 0)
    found["exact" if exact else "center"] = settings.centering.center.tolist()
    found["loss"] = loss.item()
(Path(sys.argv[-1]) / f"{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
