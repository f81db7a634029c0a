"""The loss as the paper's code computes it: every logit, every average of logits, the teacher's backbone twice.

python -m tests.support.udi_literal_loss [flags of udi/main_pretrain.py] compares time and memory of a step with those
of the loss that is trained with.
"""

import gc
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from udi.loss import UDILoss
from udi.models_udi import DINOHead, MaskedAttention, MultiCropWrapper


def sample(attn: MaskedAttention, x: Tensor, mix: Tensor) -> Tensor:
    """Patches (B, N, D) and a map (B, s, N) -> (B, s, D); queries are mixed after their projection."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q = mix[:, None] @ q
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return attn.norm(attn.proj((weights @ v).transpose(1, 2).flatten(2)) + mix @ x)


def logits(
    net: MultiCropWrapper, x: Tensor, mix: Tensor | None, draws: Any = None
) -> tuple[list[Tensor], Tensor | None]:
    """Class logits (B, K) per class token, and patch logits (B, s, K)."""
    head: DINOHead = net.head[0]  # type: ignore[assignment]
    vit = net.backbone.backbone
    tokens = vit.forward_tokens(x, draws)
    c = vit.num_class_token
    classes = [head(vit.norm(tokens[:, i : i + 1]))[:, 0] for i in range(c)]
    if mix is None:
        return classes, None
    assert net.backbone.attn is not None
    return classes, head(sample(net.backbone.attn, net.backbone.norm1(tokens[:, c:]), mix))


def cross_entropy(target: Tensor, x: Tensor) -> Tensor:
    return -(target * F.log_softmax(x, dim=-1)).sum(dim=-1)


def teacher_levels(
    settings: UDILoss, u: Tensor, p_g: Tensor | None, p_l: Tensor | None, mask_g: Tensor | None, masks_l: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    """The teacher's logits of each level, those of views and those of local crops: class token, blended, patches.

    Args:
        u: (2B, K) of the class token. p_g: (2B, s, K) of patches with mask_g (2B, s); p_l: (nl, 2B, s, K), masks_l.
    """
    nl, alpha, batch = settings.num_local_crops, settings.alpha, len(u) // 2
    u_l = u.view(2, batch, -1).transpose(0, 1).repeat(nl, 1, 1)  # (nl B, 2, K)
    levels: list[tuple[Tensor, Tensor | None]] = [(u, u_l)]
    if settings.include_patch and settings.num_clt == 2:
        assert p_g is not None and mask_g is not None

        def mean(p: Tensor, m: Tensor) -> Tensor:
            return (p * m[..., None]).sum(-2) / (m.sum(-1, keepdim=True) + 1e-5)

        blend = alpha * mean(p_g, mask_g) + (1 - alpha) * u
        blend_l = u_l[:0]
        if p_l is not None and masks_l is not None:
            blend_l = mean(p_l, masks_l).view(nl, 2, batch, -1).transpose(1, 2).reshape(nl * batch, 2, -1)
            blend_l = alpha * blend_l + (1 - alpha) * u_l
        levels.append((blend, blend_l))
    return [*levels, (p_g, p_l)] if p_g is not None else levels


def targets_of(settings: UDILoss, levels: list[tuple[Tensor, Tensor | None]], epoch: int) -> list[list[Tensor | None]]:
    """Softmax of each level's centred logits."""
    temp, centre = settings.temperatures[epoch], settings.centering.center
    return [
        [None if x is None else ((x - centre[i]) / temp).softmax(-1) for x in pair] for i, pair in enumerate(levels)
    ]


def plain_loss(
    student: MultiCropWrapper,
    teacher: MultiCropWrapper,
    settings: UDILoss,
    crops: list[Tensor],
    src_maps: list[Tensor],
    tgt_maps: list[Tensor],
    epoch: int,
    drop_path_rand: list[Tensor] | None = None,
) -> dict[str, Any]:
    """Predictions, targets, losses and the centres after the step."""
    nl, patches = settings.num_local_crops, settings.include_patch
    tau, centre = settings.student_temp, settings.centering.center
    draws = None if drop_path_rand is None else iter(drop_path_rand)
    out: dict[str, Any] = {}
    with torch.no_grad():
        both = torch.cat([crops[1], crops[0]])
        m_g = torch.cat(tgt_maps[:2]) if patches else None
        (u, *_), p_g = logits(teacher, both, m_g)
        p_l = masks_l = None
        if patches and nl:
            local = [torch.cat(tgt_maps[2 + 2 * i : 4 + 2 * i]) for i in range(nl)]
            found: list[Any] = [logits(teacher, both, mix)[1] for mix in local]
            p_l = torch.stack(found)  # (nl, 2B, s, K)
            masks_l = torch.stack([mix.sum(-1) for mix in local])
    mix_s = torch.cat(src_maps[:2]) if patches else None
    s_cls, s_p = logits(student, torch.cat(crops[:2]), mix_s, draws)
    l_cls = logits(student, torch.cat(crops[2:]), None, draws)[0] if nl else []
    mask_g = m_g.sum(-1) if m_g is not None else None
    raw = teacher_levels(settings, u, p_g, p_l, mask_g, masks_l)
    targets = targets_of(settings, raw, epoch)
    class_levels: list[Any] = raw[:-1] if patches else raw
    sums, counts = [u.sum(0)], [float(len(u))]
    for view, local_crops in class_levels[1:]:
        sums.append(view.sum(0) + local_crops.sum((0, 1)))
        counts.append(len(view) + 2.0 * len(local_crops))
    g_losses, l_losses, levels = [], [], []
    for i, (y_g, y_l) in enumerate(targets[: len(class_levels)]):
        assert y_g is not None
        g = cross_entropy(y_g, s_cls[i] / tau).mean()
        level = g
        g_losses.append(g)
        if nl:
            assert y_l is not None
            one = cross_entropy(y_l, (l_cls[i] / tau)[:, None]).mean()
            l_losses.append(one)
            level = (2 * g + 2 * nl * one) / (2 + 2 * nl)
        levels.append(level)
    if patches:
        assert p_g is not None and mask_g is not None and s_p is not None and mix_s is not None
        y, _ = targets[-1]
        assert y is not None
        shown = mix_s.sum(-1)
        g = (cross_entropy(y, s_p / tau) * shown).sum() / shown.sum().clamp(min=1)
        g_losses.append(g)
        levels.append(g)
        total, number = (p_g * mask_g[..., None]).sum((0, 1)), mask_g.sum()
        if p_l is not None and masks_l is not None:
            total, number = total + (p_l * masks_l[..., None]).sum((0, 1, 2)), number + masks_l.sum()
        sums.append(total)
        counts.append(float(number))
    means = torch.stack([s / n if n else centre[i] for i, (s, n) in enumerate(zip(sums, counts, strict=True))])
    out["loss"] = sum(w * level for w, level in zip(settings.weights, levels, strict=True))
    m = settings.centering.momentum
    out["center"] = torch.stack(
        [(m * a + (1 - m) * b) if n else a for a, b, n in zip(centre, means, counts, strict=True)]
    )
    out |= {"global": g_losses, "local": l_losses, "student": (s_cls, s_p, l_cls), "teacher": (u, p_g, p_l)}
    out["targets"] = targets
    return out


# ---- time and memory of a training step, each in a process of its own


def peak_gigabytes() -> float:
    """Peak memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 / 1e9


def measure(fused: bool, flags: list[str], results: Any) -> None:
    """Seconds of forward and backward pass, and gigabytes above those of networks and batch."""
    from udi import main_pretrain
    from udi.loss import udi_forward_loss
    from udi.udi_augmentation import expand

    args = main_pretrain.get_args_parser().parse_args(flags)
    torch.manual_seed(0)
    student = main_pretrain.build_model(args)
    teacher, settings = main_pretrain.build_teacher(student), main_pretrain.build_loss(args)
    batch, _ = next(main_pretrain.build_loader(args, torch.device("cpu")).batches())
    views = expand(batch, student.backbone.backbone.patch_size)
    rows = views.pop("rows")
    tgt = views["tgt_maps"]
    seconds = []
    for p in student.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_gigabytes()
    for _ in range(3):
        start = time.perf_counter()
        settings.centering.center.zero_()  # only what is trained with moves it
        if fused:
            loss, _ = udi_forward_loss(student, teacher, settings, **views, epoch=0, rows=rows)
        else:
            s, nl = views["src_maps"][0].shape[1], args.local_crops_number
            both = [mix.split([s, *[(mix.shape[1] - s) // nl] * nl], dim=1) for mix in tgt]
            maps = [part for pair in zip(*both, strict=True) for part in pair]
            loss = plain_loss(student, teacher, settings, views["crops"], views["src_maps"], maps, epoch=0)["loss"]
        loss.backward()
        seconds.append(time.perf_counter() - start)
    results.put((min(seconds[1:]), peak_gigabytes() - before, loss.item()))


if __name__ == "__main__":
    for fused in (False, True, False, True):
        results = multiprocessing.get_context("spawn").SimpleQueue()
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(fused, sys.argv[1:], results))
        process.start()
        seconds, gigabytes, loss = results.get()
        process.join()
        print(f"{'fused' if fused else 'plain'}: {seconds:.2f} s, {gigabytes:.2f} GB, loss {loss:.5f}", flush=True)
