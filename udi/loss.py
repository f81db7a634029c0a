"""UDI's loss: cross entropies of student and teacher predictions on three levels (paper sec. 3), and their centres.

B batch, nl local crops, s sampled patches per view, E bottleneck width, K prototypes, L levels. The head's last layer
is linear, so everything that is an average of logits upstream is an average of bottleneck vectors here, and logits
exist in chunks only.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from udi.models_udi import Projected

CHUNK = 2**25  # logits computed at a time


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """(G, S, E) and (K, E) -> (G, S, K) at least float32; on GPUs products of halves are summed in that."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x.flatten(0, 1), weight.T, out_dtype=torch.float32).unflatten(0, x.shape[:2])
    return wide(x) @ wide(weight).T


class _CrossEntropy(torch.autograd.Function):
    """Weighted sum of cross entropies between mixtures of teacher predictions and student predictions.

    The gradient is computed in the forward pass, chunk by chunk, because the weights are known then.
    """

    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor, target: Tensor, target_weight: Tensor, centre, mix, share, temps):
        """See `cross_entropies`."""
        temp, student_temp = temps
        groups, students = z.shape[:2]
        teachers, prototypes = target.shape[1], len(weight)
        half = torch.get_autocast_dtype(z.device.type) if torch.is_autocast_enabled(z.device.type) else z.dtype
        w, tw = weight.to(half), target_weight.to(half)
        zeros = partial(torch.zeros, dtype=centre.dtype, device=z.device)
        losses, grad_z, grad_w = zeros(groups, students), zeros(z.shape), zeros(weight.shape)
        mean, entropy = zeros(prototypes), zeros(())  # of the first targets
        step = max(1, CHUNK // (prototypes * (students + teachers)))
        with torch.autocast(z.device.type, enabled=False):  # the casts below are meant
            for a in range(0, groups, step):
                b = min(a + step, groups)
                predictions = ((_logits(target[a:b].to(half), tw) - centre) / temp).softmax(dim=-1)  # (g, T, K)
                logits = _logits(z[a:b].to(half), w) / student_temp  # (g, S, K)
                log_sum = logits.logsumexp(dim=-1)
                mixed = mix @ predictions
                losses[a:b] = log_sum - (mixed * logits).sum(dim=-1)
                # d loss / d logits, weighted, in place of the logits
                residual = logits.sub_(log_sum[..., None]).exp_().sub_(mixed).flatten(0, 1).to(half)
                rows = share.expand(b - a, students).flatten()[:, None] / student_temp
                grad_z[a:b] = (wide(residual @ w) * rows).unflatten(0, (b - a, students))
                # Halves hold the rows' relative weights only: the small factor comes in float32.
                top = rows.max().clamp(min=1e-30)
                grad_w += wide(residual.T @ (z[a:b].flatten(0, 1) * (rows / top)).to(half)) * top
                mean += predictions[:, 0].sum(dim=0)
                entropy -= torch.special.xlogy(predictions[:, 0], predictions[:, 0]).sum()
        ctx.save_for_backward(grad_z, grad_w)
        ctx.dtypes = z.dtype, weight.dtype
        ctx.mark_non_differentiable(losses, mean, entropy)
        return (losses * share).sum(), losses, mean / max(groups, 1), entropy / max(groups, 1)

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Any):  # type: ignore[override]
        grad_z, grad_w = ctx.saved_tensors
        return (grad_z * grad).to(ctx.dtypes[0]), (grad_w * grad).to(ctx.dtypes[1]), *[None] * 6


class Entropies(NamedTuple):
    total: Tensor  # (), the weighted sum, which has a gradient
    each: Tensor  # (G, S), without
    mean_target: Tensor  # (K,), mean of each group's first prediction
    entropy: Tensor  # (), mean of their entropies


def cross_entropies(
    z: Tensor,
    weight: Tensor,
    target: Tensor,
    target_weight: Tensor,
    centre: Tensor,
    mix: Tensor,
    share: Tensor,
    temp: float,
    student_temp: float,
) -> Entropies:
    """Cross entropies of G groups of S students, each with its own mixture of the group's T teacher predictions.

    Args:
        z: student vectors (G, S, E), weight: (K, E). target: teacher vectors (G, T, E), target_weight: (K, E).
        centre: (K,), subtracted from the teacher's logits. temp, student_temp: temperatures.
        mix: (S, T), share of each prediction in a student's target. share: (S,), weight of a student in the total.
    """
    mix, share = mix.to(centre.dtype), share.to(centre.dtype)
    return Entropies(
        *_CrossEntropy.apply(z, weight, target, target_weight, centre, mix, share, (temp, student_temp))  # type: ignore
    )


class Centering(nn.Module):
    """Centres (L, K) of the teacher's logits, moving averages of their means over all processes.

    Args:
        exact: weigh every row alike, not every process (they differ for patches).
    """

    center: Tensor
    count: Tensor

    def __init__(self, levels: int, dim: int, momentum: float = 0.9, exact: bool = False):
        super().__init__()
        self.register_buffer("center", torch.zeros(levels, dim))
        self.register_buffer("count", torch.zeros(levels, 1))  # as upstream: never updated
        self.momentum, self.exact = momentum, exact

    @torch.no_grad()
    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Move each centre to the mean of its rows; a level without rows anywhere stays.

        Args:
            sums: (L, K) of this process's logits. counts: (L,) of its rows.
        """
        counts = counts[:, None]
        if self.exact:
            both = torch.cat([sums, counts], dim=1)
        else:
            present = (counts > 0).to(counts.dtype)
            both = torch.cat([sums / counts.clamp(min=1e-12) * present, present], dim=1)
        if distributed.world_size() > 1:
            dist.all_reduce(both)
        total, number = both.split([both.shape[1] - 1, 1], dim=1)
        moved = self.center * self.momentum + total / number.clamp(min=1e-12) * (1 - self.momentum)
        self.center.copy_(torch.where(number > 0, moved, self.center))


class UDILoss(nn.Module):
    """Settings and centres of the loss; `udi_forward_loss` computes it.

    Args:
        num_local_crops: nl. dim: K. teacher_temp_schedule: the teacher's temperature by epoch.
        include_patch: has the level of patches. num_clt: class tokens, 1 or 2.
        alpha: share of the patches in the targets of the second class token.
        weights: of the levels; default: equal. exact_center: as `Centering`.
    Raises:
        ValueError: another number of class tokens, or two without patches.
    """

    def __init__(
        self,
        num_local_crops: int,
        dim: int,
        teacher_temp_schedule: Sequence[float],
        include_cls: bool = True,
        include_patch: bool = True,
        num_clt: int = 2,
        alpha: float = 0.5,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        weights: Sequence[float] | None = None,
        exact_center: bool = False,
    ):
        super().__init__()
        if num_clt not in (1, 2) or (num_clt == 2 and not include_patch) or not include_cls:
            raise ValueError(f"{num_clt} class tokens: expected 1, or 2 with patches")
        self.num_local_crops, self.include_patch, self.num_clt = num_local_crops, include_patch, num_clt
        self.alpha, self.student_temp = alpha, student_temp
        self.temperatures = list(teacher_temp_schedule)
        levels = num_clt + include_patch
        self.weights = [1 / levels] * levels if weights is None else list(weights)
        self.centering = Centering(levels, dim, center_momentum, exact_center)


class Spec(NamedTuple):
    """The parts of the loss: losses of global and local crops per level, and what tells a collapse."""

    global_losses: list[Tensor]
    local_losses: list[Tensor]  # none for patches
    mean_entropy: Tensor  # of the teacher's mean prediction, in nats
    entropy: Tensor  # mean of its predictions' entropies


def mean_rows(z: Tensor, mask: Tensor) -> Tensor:
    """Weighted sum of vectors (..., s, E) with mask (..., s), over the mask's sum: (..., E)."""
    return (z * mask[..., None]).sum(dim=-2) / (mask.sum(dim=-1, keepdim=True) + 1e-5)


def teacher_maps(tgt_maps: Sequence[Tensor]) -> Tensor:
    """Maps of both views, (B, s, N) each, and interleaved ones of local crops -> (2 B, s + nl s_l, N)."""
    views = [torch.cat(list(tgt_maps[view::2]), dim=1) for view in (0, 1)]
    return torch.cat(views)


def udi_forward_loss(
    student: nn.Module,
    teacher: nn.Module,
    udi_loss: UDILoss,
    crops: list[Tensor],
    src_maps: Sequence[Tensor],
    tgt_maps: Sequence[Tensor],
    epoch: int,
    drop_path_rand: list[Tensor] | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Spec]:
    """The loss of a batch, after which the centres have moved.

    Args:
        student, teacher: `MultiCropWrapper`s (or DistributedDataParallel of one).
        crops: two global views (B, 3, H, W), then nl local ones.
        src_maps: at least those of the views in each other, (B, s, N) each. tgt_maps: those, and per local crop its
            maps to the second and the first view.
        drop_path_rand: uniform draws of the student's stochastic depth, in place of random ones.
        rows: numbers of the rows of student and teacher maps that are not zero (`MultiCropWrapper`); telling them
            spares waiting for the device.
    Returns:
        loss: (). its parts.
    """
    patches = udi_loss.include_patch
    mix_s = torch.cat(list(src_maps[:2])) if patches else None
    mix_t = teacher_maps(tgt_maps) if patches else None
    if rows is None and mix_s is not None and mix_t is not None:
        sums = [(mix.sum(dim=-1) > 0).flatten().nonzero()[:, 0] for mix in (mix_s, mix_t)]
        rows = sums[0], sums[1]
    rows_s, rows_t = rows if rows is not None else (None, None)
    with torch.no_grad():
        t: Projected = teacher(crops, mix_t, rows_t, branch=1)
    s: Projected = student(crops, mix_s, rows_s, branch=0, drop_path_rand=drop_path_rand)

    batch, nl = len(crops[0]), udi_loss.num_local_crops
    temps = udi_loss.temperatures[epoch], udi_loss.student_temp
    centres = udi_loss.centering.center
    device = crops[0].device
    z_u = wide(t.global_cls[0])  # (2 B, E): the second view's images, then the first's
    parts: list[Entropies] = []
    global_losses: list[Tensor] = []
    local_losses: list[Tensor] = []

    def class_level(level: int, target: Tensor, mix: Tensor) -> None:
        """Students of an image: its two global views and nl local crops; target (B, T, E)."""
        views = s.global_cls[level].unflatten(0, (2, batch)).transpose(0, 1)  # (B, 2, E)
        z = views if s.local_cls is None else torch.cat([views, s.local_cls[level].transpose(0, 1)], dim=1)
        # Means over 2 B and nl B rows, weighted as 2 and 2 nl.
        weight = udi_loss.weights[level] / (2 + 2 * nl)
        share = centres.new_full((2 + nl,), 2 * weight / batch)
        share[:2] = weight / batch
        found = cross_entropies(z, s.weight, target, t.weight, centres[level], mix, share, *temps)
        parts.append(found)
        global_losses.append(found.each[:, :2].mean())
        if nl:
            local_losses.append(found.each[:, 2:].mean())

    # ---- level 0: class token; local crops aim at the mean of both views' predictions
    target = z_u.unflatten(0, (2, batch)).transpose(0, 1)  # (B, 2, E)
    own, mean = torch.eye(2, device=device), torch.full((nl, 2), 0.5, device=device)
    class_level(0, target, torch.cat([own, mean]))
    sums, counts = [z_u.sum(dim=0)], [z_u.new_tensor(2.0 * batch)]
    if patches:
        assert t.patches is not None
        assert s.patches is not None
        assert mix_s is not None
        assert mix_t is not None
        z_p, mask = wide(t.patches), mix_t.sum(dim=-1)
        sampled = mix_s.shape[1]
        z_g, m_g = z_p[:, :sampled], mask[:, :sampled]
        z_l, m_l = (x[:, sampled:].unflatten(1, (nl, -1)) if nl else None for x in (z_p, mask))
        if udi_loss.num_clt == 2:
            # ---- level 1: second class token; each crop has its own blend of patches and image, per view
            blend = udi_loss.alpha * mean_rows(z_g, m_g) + (1 - udi_loss.alpha) * z_u  # (2 B, E)
            target = blend.unflatten(0, (2, batch)).transpose(0, 1)
            if z_l is not None and m_l is not None:
                local = udi_loss.alpha * mean_rows(z_l, m_l) + (1 - udi_loss.alpha) * z_u[:, None]  # (2 B, nl, E)
                pairs = local.unflatten(0, (2, batch)).permute(1, 2, 0, 3).flatten(1, 2)  # (B, 2 nl, E)
                target = torch.cat([target, pairs], dim=1)
            mix = torch.block_diag(own, *[torch.full((1, 2), 0.5, device=device)] * nl)
            class_level(1, target, mix)
            sums.append(target.sum(dim=(0, 1)))
            counts.append(z_u.new_tensor(2.0 * batch * (1 + nl)))
        # ---- last level: patches that both views show
        level, (rows_s, _) = udi_loss.num_clt, rows or (None, None)
        assert rows_s is not None
        shown = mix_s.sum(dim=-1).flatten()[rows_s]  # (R,) of ones
        number = shown.sum()
        z_s, z_t = s.patches.flatten(0, 1)[rows_s], z_g.flatten(0, 1)[rows_s]
        share = centres.new_ones(1)
        found = cross_entropies(
            z_s[:, None], s.weight, z_t[:, None], t.weight, centres[level], share[:, None], share, *temps
        )
        scale = udi_loss.weights[level] / number.clamp(min=1)
        parts.append(found._replace(total=found.total * scale))
        global_losses.append(found.each.sum() / number.clamp(min=1))
        sums.append((z_p * mask[..., None]).sum(dim=(0, 1)))
        counts.append(mask.sum())
    # ---- centres of all teacher rows: by linearity of their mean vectors
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        udi_loss.centering.update(F.linear(torch.stack(sums), wide(t.weight)), torch.stack(counts))
    mean_target = parts[0].mean_target
    mean_entropy = -torch.special.xlogy(mean_target, mean_target).sum()
    loss = torch.stack([part.total for part in parts]).sum()
    return loss, Spec(global_losses, local_losses, mean_entropy, parts[0].entropy)
