"""The loss that is trained with, against the authors' numbers and a literal computation of every logit."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.helpers import ROOT, Golden, assert_close, golden_files, load_golden
from tests.support.processes import launch
from tests.support.udi_literal_loss import plain_loss, targets_of, teacher_levels
from tests.udi.test_models_udi import network_of, tol
from udi import optim
from udi.loss import Pairs, UDILoss, cross_entropies, udi_forward_loss
from udi.models_udi import Projected

TWO_RANKS = str(ROOT / "tests" / "support" / "udi_two_ranks.py")


def batch_of(ref: Golden, prefix: str = "in") -> dict[str, Any]:
    """Crops and maps of a golden."""
    kinds = {kind: ref.group(f"{prefix}/{kind}") for kind in ("crops", "src_maps", "tgt_maps")}
    return {kind: [found[str(i)] for i in range(len(found))] for kind, found in kinds.items()}


def pair_of(ref: Golden) -> tuple[Any, Any]:
    """Student and teacher of a golden with their weights."""
    meta = ref.meta
    nets = []
    for name, norm, drop in (("student", meta["norm_last_layer"], meta["drop_path_rate"]), ("teacher", True, 0.0)):
        net = network_of(meta["config"], meta["include_patch"], norm, drop)
        weights = ref.group(f"sd/{name}")
        assert list(net.state_dict()) == list(weights)
        net.load_state_dict(weights)
        nets.append(net.train())
    return nets[0], nets[1].requires_grad_(False)


def settings_of(ref: Golden) -> UDILoss:
    meta = ref.meta
    settings = UDILoss(
        meta["config"]["nl"],
        meta["config"]["K"],
        meta["teacher_temp_schedule"],
        include_patch=meta["include_patch"],
        num_clt=meta["num_clt"],
        alpha=meta["alpha"],
        student_temp=meta["student_temp"],
        center_momentum=meta["center_momentum"],
        weights=meta["weights"],
    )
    settings.centering.center.copy_(ref["in/center"])
    return settings


# ---- goldens


@golden_files("udi", "pretrain_forward")
@pytest.mark.parametrize("draws", ["fed", "seeded"])
def test_loss_centres_and_gradients(path, draws):
    ref = load_golden(path)
    student, teacher = pair_of(ref)
    settings = settings_of(ref)
    fed = [value for _, value in sorted(ref.group("in/drop_path_rand").items())] or None
    if draws == "seeded":
        if ref.meta.get("drop_path_seed") is None:
            pytest.skip("draws nothing")
        torch.manual_seed(ref.meta["drop_path_seed"])
        fed = None
    loss, spec = udi_forward_loss(
        student, teacher, settings, **batch_of(ref), epoch=ref.meta["epoch"], drop_path_rand=fed
    )
    ref.check("out/loss", loss, **tol(ref))
    # Upstream writes -1 where patches have no local part.
    for group, values in enumerate((spec.global_losses, [*spec.local_losses, -1])):
        for level, value in enumerate(values):
            ref.check(f"out/loss_spec/{group}/{level}", value, **tol(ref))
    ref.check("out/center_after", settings.centering.center, **tol(ref))
    loss.backward()
    params = dict(student.named_parameters())
    for name, expected in ref.group("out/grad").items():
        grad = params[name].grad
        assert grad is not None, name
        assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-8, name
    for name in ref.meta.get("trainable_without_grad", ()):
        assert params[name].grad is None or not params[name].grad.any()


def check_valid(ref: Golden, name: str, value: Tensor | None, mask: Tensor | None) -> None:
    """Of patches only those count that the mask (..., 1) shows."""
    if name in ref and value is not None and mask is not None:
        valid = mask.view(value.shape[:-1]) > 0
        assert_close(value[valid], ref[name].view(value.shape)[valid], **tol(ref), what=name)


def check_targets(ref: Golden, out: str, targets: list[list], masks: list[Tensor | None]) -> None:
    """Targets of class levels, then of patches, whose masks for views and for local crops are given."""
    for level, (views, crops) in enumerate(targets):
        if views.ndim == 2:
            ref.check(f"{out}/target/0/{level}", views[:, None], **tol(ref))
            ref.check(f"{out}/target/1/{level}", crops, **tol(ref))
        else:
            check_valid(ref, f"{out}/target/0/{level}", views, masks[0])
            if crops is not None and masks[1] is not None:  # from crop, view, image to view, crop, image
                crops, mask = (x.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2) for x in (crops, masks[1]))
                check_valid(ref, f"{out}/target/1/{level}", crops, mask)


@golden_files("udi", "pretrain_forward")
def test_literal_computation(path):
    """What the other tests compare with computes the authors' predictions and targets."""
    ref = load_golden(path)
    fed = [value for _, value in sorted(ref.group("in/drop_path_rand").items())] or None
    student, teacher = pair_of(ref)
    out = plain_loss(student, teacher, settings_of(ref), **batch_of(ref), epoch=ref.meta["epoch"], drop_path_rand=fed)
    s_cls, s_p, l_cls = out["student"]
    u, p_g, p_l = out["teacher"]
    for i, x in enumerate(s_cls):
        ref.check(f"out/student_pred/0/{i}", x[:, None], **tol(ref))
    for i, x in enumerate(l_cls):
        ref.check(f"out/student_pred/1/{i}", x[:, None], **tol(ref))
    ref.check("out/teacher_pred/0/0", u[:, None], **tol(ref))
    level = len(s_cls)
    masks = [ref.get(f"out/teacher_mask/{side}/{level}", None) for side in (0, 1)]
    if p_g is not None:
        check_valid(ref, f"out/student_pred/0/{level}", s_p, ref.get(f"out/student_mask/0/{level}", None))
        check_valid(ref, f"out/teacher_pred/0/{level}", p_g, masks[0])
        check_valid(ref, f"out/teacher_pred/1/{level}", p_l, masks[1])
    check_targets(ref, "out", out["targets"], masks)
    ref.check("out/loss", out["loss"], **tol(ref))
    ref.check("out/center_after", out["center"], **tol(ref))


def projected(ref: Golden, prefix: str, nl: int, student: bool) -> tuple[Projected, list[Tensor]]:
    """Logits of a golden as vectors of prototypes that are an identity; and maps with its masks as row sums."""
    who = "student" if student else "teacher"
    found, masks = ref.group(f"{prefix}/{who}_pred"), ref.group(f"{prefix}/{who}_mask")
    classes = sorted(k for k in found if k.startswith("0/") and found[k].ndim == 3)
    global_cls = torch.stack([found[k][:, 0] for k in classes])
    dim, batch = global_cls.shape[-1], global_cls.shape[1] // 2
    local = [found[k] for k in sorted(found) if k.startswith("1/") and found[k].ndim == 3]
    local_cls = torch.stack([x[:, 0].unflatten(0, (nl, batch)) for x in local]) if local else None
    patches = [(found[k], masks[k][..., 0]) for k in sorted(found) if found[k].ndim == 4]
    if not patches:
        return Projected(global_cls, local_cls, None, torch.eye(dim)), []
    vectors = torch.cat([p.transpose(0, 1).flatten(1, 2) for p, _ in patches], dim=1)  # (2B, s + nl s_l, K)
    mask = torch.cat([m.transpose(0, 1).flatten(1) for _, m in patches], dim=1)
    return Projected(global_cls, local_cls, vectors, torch.eye(dim)), list(mask[..., None].chunk(2))


def loss_on(ref: Golden, prefix: str, settings: UDILoss, epoch: int) -> tuple[Tensor, Any, Projected]:
    """The loss of a golden's logits; the student's vectors have gradients."""
    s, src = projected(ref, prefix, settings.num_local_crops, True)
    t, tgt = projected(ref, prefix, settings.num_local_crops, False)
    for value in (s.global_cls, s.local_cls, s.patches):
        if value is not None:
            value.requires_grad_()
    crops = [torch.zeros(s.global_cls.shape[1] // 2, 1)] * 2
    loss, spec = udi_forward_loss(lambda *a, **k: s, lambda *a, **k: t, settings, crops, src, tgt, epoch)  # type: ignore
    return loss, spec, s


@golden_files("udi", "udi_loss")
def test_loss_alone(path):
    ref = load_golden(path)
    meta = ref.meta
    keys = ("alpha", "student_temp", "center_momentum", "weights", "include_patch", "num_clt")
    options: dict[str, Any] = {k: meta[k] for k in keys}
    settings = UDILoss(meta["num_local_crops"], meta["dim"], meta["teacher_temp_schedule"], **options)
    settings.centering.center.copy_(ref["in/center"])
    for step in range(len(meta["teacher_temp_schedule"])):
        out, given = f"out/step{step}", f"in/step{step}"
        names = [f"{given}/teacher_{part}/{side}/{meta['num_clt']}" for part in ("pred", "mask") for side in (0, 1)]
        p_g, p_l, *masks = (ref.get(name, None) for name in names) if meta["include_patch"] else [None] * 4
        raw = p_g if p_g is None else p_g[0], p_l, *(x if x is None else x[..., 0].squeeze(0) for x in masks)
        levels = teacher_levels(settings, ref[f"{given}/teacher_pred/0/0"][:, 0], *raw)
        check_targets(ref, out, targets_of(settings, levels, step), masks)
        loss, spec, s = loss_on(ref, given, settings, step)
        ref.check(f"{out}/loss", loss, **tol(ref))
        # Upstream writes -1 where patches have no local part.
        for group, values in enumerate((spec.global_losses, [*spec.local_losses, -1])):
            for level, value in enumerate(values):
                ref.check(f"{out}/loss_spec/{group}/{level}", value, **tol(ref))
        ref.check(f"{out}/center_after", settings.centering.center, **tol(ref))
        loss.backward()
        assert s.global_cls.grad is not None
        for level, grad in enumerate(s.global_cls.grad):
            ref.check(f"{out}/grad_student_pred/0/{level}", grad[:, None], **tol(ref))
            assert s.local_cls is not None
            assert s.local_cls.grad is not None
            local = s.local_cls.grad[level].flatten(0, 1)[:, None]
            ref.check(f"{out}/grad_student_pred/1/{level}", local, **tol(ref))
        if s.patches is not None:
            assert s.patches.grad is not None
            ref.check(f"{out}/grad_student_pred/0/{meta['num_clt']}", s.patches.grad[None], **tol(ref))


@golden_files("udi", "center_two_ranks")
def test_two_processes_share_centres(path, tmp_path):
    """The mean of the processes' means, or with exact_center that of all rows."""
    assert launch(tmp_path / "out", TWO_RANKS, str(path), str(tmp_path), processes=2) == [0, 0]
    ref = load_golden(path)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        ref.check(f"out/rank{rank}/loss", found["loss"], **tol(ref))
        ref.check("out/center_after", found["center"], **tol(ref))
        level, momentum = ref.meta["num_clt"], ref.meta["center_momentum"]
        masks = [ref[f"in/rank{r}/teacher_mask/{side}/{level}"] for r in (0, 1) for side in (0, 1)]
        preds = [ref[f"in/rank{r}/teacher_pred/{side}/{level}"] for r in (0, 1) for side in (0, 1)]
        total = sum((p * m).sum((0, 1, 2)) for p, m in zip(preds, masks, strict=True))
        exact = momentum * ref["in/center"][level] + (1 - momentum) * total / sum(m.sum() for m in masks)
        assert_close(found["exact"][level], exact, rtol=1e-5, atol=1e-6)


@golden_files("udi", "schedules")
def test_schedules(path):
    ref = load_golden(path)
    temps = 0
    for i, call in enumerate(ref.meta["calls"]):
        if "temp" in call:
            start, end, length, total = call["temp"]
            ref.check(f"out/temp{temps}", optim.ramp_table(start, end, length, total), 1e-12, 1e-15)
            temps += 1
        else:
            ref.check(f"out/{i}", optim.cosine_scheduler(**call), 1e-12, 1e-15)


@golden_files("udi", "train_steps")
def test_training_steps(path):
    """Schedules, losses and their parts, gradients' norms, centres and weights, from those before the first step."""
    ref = load_golden(path)
    meta, config = ref.meta, ref.meta["config"]
    epochs, iters = meta["epochs"], meta["iters_per_epoch"]
    lr = optim.cosine_scheduler(meta["peak_lr"], meta["min_lr"], epochs, iters, meta["warmup_epochs"])
    decay = optim.cosine_scheduler(meta["weight_decay"][0], meta["weight_decay"][1], epochs, iters)
    momentum = optim.cosine_scheduler(meta["momentum_teacher"], 1, epochs, iters)
    temps = optim.ramp_table(
        meta["warmup_teacher_temp"], meta["teacher_temp"], meta["warmup_teacher_temp_epochs"], epochs
    )
    for name, table in (("lr", lr), ("wd", decay), ("momentum", momentum), ("teacher_temp", temps)):
        ref.check(f"out/{name}", table, 1e-9, 1e-12)
    patches = meta.get("include_patch", True)
    student, teacher = (network_of(config, patches, norm) for norm in (meta["norm_last_layer"], True))
    for net in (student, teacher.requires_grad_(False)):
        net.load_state_dict(ref.group("sd/student"))
    given = {name: meta[name] for name in ("alpha", "student_temp", "center_momentum", "weights") if name in meta}
    given |= {"include_patch": patches, "num_clt": meta.get("num_clt", config["nct"])}
    settings = UDILoss(config["nl"], config["K"], temps.tolist(), **given)
    optimizer = optim.build_optimizer(meta["optimizer"], optim.get_params_groups(student))
    batches = [batch_of(ref, f"in/{name}") for name in sorted({key.split("/")[0] for key in ref.group("in")})]
    losses, specs = [], []
    for it in range(epochs * iters):
        optim.set_rates(optimizer, lr[it], decay[it])
        loss, spec = udi_forward_loss(student, teacher, settings, **batches[it % len(batches)], epoch=it // iters)
        optimizer.zero_grad()
        loss.backward()
        if meta["clip_grad"]:
            norms = optim.clip_gradients(student, meta["clip_grad"])
            ref.check(f"out/grad_norms/step{it}", norms, **tol(ref))
        optim.cancel_gradients_last_layer(it // iters, student, meta["freeze_last_layer"])
        optimizer.step()
        with torch.no_grad():
            for k, q in zip(teacher.parameters(), student.parameters(), strict=True):
                k.mul_(momentum[it]).add_(q, alpha=1 - momentum[it])
        losses.append(loss.item())
        specs.append([part.item() for part in (*spec.global_losses, *spec.local_losses)])
    if "out/loss_specs" in ref:
        missing = ref["out/loss_specs"].shape[1] - len(specs[0])  # upstream writes -1: patches have no local part
        specs = [[*parts, *[-1] * missing] for parts in specs]
    ref.check("out/loss_specs", specs, **tol(ref))
    ref.check("out/losses", np.array(losses), **tol(ref))
    ref.check("out/center", settings.centering.center, **tol(ref))
    for name, net in (("student", student), ("teacher", teacher)):
        for key, expected in ref.group(f"out/final/{name}").items():
            assert_close(net.state_dict()[key], expected, **tol(ref), what=key)


@golden_files("udi", "clip_lars")
def test_clipping_and_lars(path):
    ref = load_golden(path)

    def setting(pattern: str) -> float:
        """A number of the text that says what the file holds."""
        found = re.search(pattern + r"([\d.]+\d)", ref.meta["what"])
        assert found, pattern
        return float(found[1])

    clip, lr, decay = setting(r"clip_gradients\(model,"), setting("lr "), setting("weight_decay ")
    grads = ref.group("in/grad")

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(*reversed(grads["a.weight"].shape))
            self.last_layer = torch.nn.Linear(*reversed(grads["last_layer.weight"].shape), bias=False)

    model = Two()
    params = dict(model.named_parameters())
    for name, grad in ref.group("in/grad").items():
        params[name].grad = grad.clone()
    norms = optim.clip_gradients(model, clip)
    ref.check("out/norms", norms, **tol(ref))
    for name, grad in ref.group("in/grad").items():
        clipped = params[name].grad
        assert clipped is not None
        assert_close(clipped, grad * min(1, clip / (float(grad.norm()) + 1e-6)), rtol=1e-5, atol=1e-7)
        ref.check(f"out/grad/{name}", clipped, **tol(ref))
    optim.cancel_gradients_last_layer(0, model, 1)
    ref.equal("cancelled", [n for n, p in params.items() if p.grad is None])
    for name, value in ref.group("in/lars/param").items():
        params[name].data = value.clone()
    optimizer = optim.build_optimizer("lars", optim.get_params_groups(model))
    step = 0
    while f"in/lars/grad{step}/a.weight" in ref:
        optim.set_rates(optimizer, lr / (step + 1), decay)
        for name, grad in ref.group(f"in/lars/grad{step}").items():
            params[name].grad = grad.clone()
        optimizer.step()
        for name, expected in ref.group(f"out/lars/param{step}").items():
            assert_close(params[name], expected, **tol(ref), what=name)
        step += 1


# ---- against the literal computation, for cases that no file holds


def random_case(nl: int, num_clt: int, patches: bool, matched: float, seed: int = 0) -> tuple[Any, Any, UDILoss, dict]:
    """Random networks and views in float64; `matched`: share of the sampled patches that the other view shows."""
    torch.manual_seed(seed)
    config = {"gs": 16, "p": 4, "d": 12, "depth": 2, "h": 2, "ah": 2, "K": 18, "hid": 14, "bot": 8, "nl": nl}
    config["nct"] = num_clt
    student = network_of(config, patches, False).double()
    teacher = network_of(config, patches, True).double().requires_grad_(False)
    for p in [*student.parameters(), *teacher.parameters()]:
        p.data += 0.3 * torch.randn_like(p)
    settings = UDILoss(nl, 18, [0.06], include_patch=patches, num_clt=num_clt, alpha=0.3, weights=None).double()
    settings.centering.center.normal_()
    batch, sizes = 3, [4] * 2 + [3] * 2 * nl
    valid = [torch.rand(batch, s) < matched for s in sizes]
    mixes = [
        torch.rand(batch, s, 16, dtype=torch.float64).softmax(-1) * v[..., None]
        for s, v in zip(sizes, valid, strict=True)
    ]
    picks = [torch.nn.functional.one_hot(torch.randint(16, v.shape), 16).double() * v[..., None] for v in valid[:2]]
    crops = [torch.randn(batch, 3, n, n, dtype=torch.float64) for n in [16] * 2 + [8] * nl]
    return student, teacher, settings, {"crops": crops, "src_maps": picks, "tgt_maps": mixes}


@pytest.mark.parametrize("matched", [0.6, 0.0])
@pytest.mark.parametrize(
    ("nl", "num_clt", "patches"), [(0, 2, True), (3, 2, True), (2, 1, True), (0, 1, True), (0, 1, False), (4, 1, False)]
)
def test_fused_equals_literal(nl, num_clt, patches, matched, monkeypatch):
    monkeypatch.setattr("udi.loss.CHUNK", 200)  # several chunks of rows
    monkeypatch.setattr("udi.loss.BLOCK", 7)  # and blocks of prototypes
    student, teacher, settings, views = random_case(nl, num_clt, patches, matched)
    expected = plain_loss(student, teacher, settings, **views, epoch=0)
    expected["loss"].backward()
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    loss, spec = udi_forward_loss(student, teacher, settings, **views, epoch=0)
    # Losses and centres are summed in float32.
    assert_close(loss, expected["loss"], rtol=1e-6, atol=1e-7)
    for found, wanted in zip(
        [*spec.global_losses, *spec.local_losses], [*expected["global"], *expected["local"]], strict=True
    ):
        assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert_close(settings.centering.center, expected["center"], rtol=1e-5, atol=1e-6)
    loss.backward()
    for name, grad in grads.items():
        own = student.get_parameter(name).grad
        assert own is not None
        assert (own - grad).abs().max() <= 1e-9 * grad.abs().max() + 1e-12, name


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_halves_keep_small_gradients(half):
    """The factor of a loss of many rows is far below what halves resolve."""
    torch.manual_seed(0)
    z, t = (torch.nn.functional.normalize(torch.randn(8, 4, 32), dim=-1) for _ in range(2))
    w, tw = (torch.nn.functional.normalize(torch.randn(4096, 32), dim=-1).requires_grad_() for _ in range(2))
    z.requires_grad_()
    share, mix, grads = torch.full((4,), 1e-4), torch.eye(4), []
    for enabled in (False, True):
        w.grad = z.grad = None
        with torch.autocast("cpu", half, enabled=enabled):
            pairs = Pairs(z, t, torch.zeros(4096), mix, share)
            total, _ = cross_entropies([pairs], w, tw.detach(), 0.05, 0.1)
        total.backward()
        assert w.grad is not None
        assert z.grad is not None
        grads.append((w.grad, z.grad))
    for expected, own in zip(*grads, strict=True):
        assert (own - expected).norm() < 0.01 * expected.norm()


def test_entropies_tell_a_collapse():
    student, teacher, settings, views = random_case(2, 1, False, 0.0)
    _, spec = udi_forward_loss(student, teacher, settings, **views, epoch=0)
    assert 0 <= spec.entropy <= spec.mean_entropy + 1e-6 <= np.log(18) + 1e-5
    for p in teacher.head[0].mlp.parameters():  # all images get the same vector
        p.data *= 0
    teacher.head[0].mlp[-1].bias.data += 1
    _, spec = udi_forward_loss(student, teacher, settings, **views, epoch=0)
    assert float(spec.mean_entropy - spec.entropy) == pytest.approx(0, abs=1e-5)


def test_loss__raises_on_two_tokens_without_patches():
    with pytest.raises(ValueError, match="2 class tokens"):
        UDILoss(2, 8, [0.1], include_patch=False, num_clt=2)
