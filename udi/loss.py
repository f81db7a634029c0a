"""UDI's loss: cross entropies of teacher and student predictions on three levels (UDI, framework figure), and centres.

B batch, nl local crops, s (s_l) sampled patches per view (local crop), E bottleneck width, K prototypes, L levels. The
head's last layer is linear, so everything that is an average of logits upstream is an average of bottleneck vectors
here, and logits exist in chunks only.
"""

import math
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
BLOCK = 2048  # prototypes at a time on a CPU, whose caches hold their logits; a GPU takes all at once


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """(G, S, E) and (K, E) -> (G, S, K) at least float32; on GPUs products of halves are summed in that."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x.flatten(0, 1), weight.T, out_dtype=torch.float32).unflatten(0, x.shape[:2])
    return wide(x) @ wide(weight).T


class Pairs(NamedTuple):
    """G groups of S students and T teacher vectors; each student has its own mixture of the T predictions as target."""

    z: Tensor  # (G, S, E), the students' vectors
    target: Tensor  # (G, T, E), the teacher's vectors
    centre: Tensor  # (K,), subtracted from the teacher's logits
    mix: Tensor  # (S, T), share of each prediction in a student's target
    share: Tensor  # (S,), weight of a student in the total


class Entropies(NamedTuple):
    each: Tensor  # (G, S), cross entropies of the students
    mean_target: Tensor  # (K,), mean of each group's first prediction
    entropy: Tensor  # (), mean of their entropies


def _log_sum(blocks: list[Tensor]) -> Tensor:
    """Logarithm of the sum of exponentials of blocks (g, S, k) over all their k, (g, S, 1)."""
    return torch.stack([x.logsumexp(dim=-1, keepdim=True) for x in blocks]).logsumexp(dim=0)


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: Tensor) -> None:
    """total += factor * a @ b; halves are multiplied as halves, and added in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b * factor)
    else:
        total += wide(a @ b.to(a.dtype)) * factor


def _entropies(
    pairs: Pairs, w: Tensor, tw: Tensor, temps: tuple[float, float], grad_w: Tensor
) -> tuple[Entropies, Tensor]:
    """`Entropies` of pairs, and the gradient of their z, (G, S, E); that of the prototypes is added to grad_w.

    Args:
        w, tw: prototypes (K, E) of student and teacher, in the precision of the products. temps: as `cross_entropies`.
    """
    z, target, centre, mix, share = pairs
    groups, students = z.shape[:2]
    prototypes, half = len(w), w.dtype
    temp, student_temp = temps
    zeros = partial(torch.zeros, dtype=grad_w.dtype, device=z.device)
    losses, grad_z, mean, entropy = zeros(groups, students), zeros(z.shape), zeros(prototypes), zeros(())
    size = BLOCK if z.device.type == "cpu" else prototypes
    blocks = [slice(k, k + size) for k in range(0, prototypes, size)]
    chunks = min(groups, math.ceil(groups * (students + target.shape[1]) * prototypes / CHUNK))
    for chunk in range(chunks):
        a, b = groups * chunk // chunks, groups * (chunk + 1) // chunks
        s, t = (z[a:b] / student_temp).to(half), (target[a:b] / temp).to(half)
        logits = [_logits(s, w[k]) for k in blocks]  # (g, S, k)
        teacher = [_logits(t, tw[k]).sub_(centre[k] / temp) for k in blocks]  # (g, T, k)
        log_sum, teacher_sum = _log_sum(logits), _log_sum(teacher)
        losses[a:b] = log_sum[..., 0]
        rows = share.expand(b - a, students).flatten()[:, None] / student_temp
        # Halves hold the rows' relative weights only: the small factor comes in float32.
        top = rows.max().clamp(min=1e-30)
        weighted, vectors = z[a:b].flatten(0, 1) * (rows / top), zeros(rows.shape[0], z.shape[2])
        for k, x, y in zip(blocks, logits, teacher, strict=True):
            first = y.sub_(teacher_sum)[:, 0].clone()  # logarithms of predictions
            predictions = y.exp_()
            mean[k] += predictions[:, 0].sum(dim=0)
            entropy -= (predictions[:, 0] * first).sum()
            mixed = mix @ predictions
            losses[a:b] -= (mixed * x).sum(dim=-1)
            residual = x.sub_(log_sum).exp_().sub_(mixed).flatten(0, 1).to(half)  # d loss / d logits
            vectors += wide(residual @ w[k])
            _add_product(grad_w[k], residual.T, weighted, top)
        grad_z[a:b] = (vectors * rows).unflatten(0, (b - a, students))
    return Entropies(losses, mean / max(groups, 1), entropy / max(groups, 1)), grad_z


class _CrossEntropies(torch.autograd.Function):
    """Weighted sum of the cross entropies of several `Pairs`.

    Gradients are computed in the forward pass, chunk by chunk, because the weights are known then; one array gets those
    of the prototypes of all.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, target_weight: Tensor, temps, pairs: list[Pairs], *zs: Tensor):
        """See `cross_entropies`; zs: the students' vectors of the pairs, which get gradients."""
        device = weight.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else zs[0].dtype
        w, tw = weight.to(half), target_weight.to(half)
        grad_w = torch.zeros(weight.shape, dtype=pairs[0].centre.dtype, device=weight.device)
        with torch.autocast(device, enabled=False):  # the casts are meant
            found, grads = zip(*[_entropies(one, w, tw, temps, grad_w) for one in pairs], strict=True)
        ctx.save_for_backward(*grads)
        ctx.grad_w = grad_w  # of the size of the prototypes for any batch: not among the activations
        ctx.dtypes = [weight.dtype, *[z.dtype for z in zs]]
        parts = [x for entropies in found for x in entropies]
        ctx.mark_non_differentiable(*parts)
        total = torch.stack([(found[i].each * one.share).sum() for i, one in enumerate(pairs)]).sum()
        return total, *parts

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Any):  # type: ignore[override]
        # In place, once: on a CPU new memory of the prototypes' size takes longer than their products.
        grads = zip([ctx.grad_w, *ctx.saved_tensors], ctx.dtypes, strict=True)
        grad_w, *grad_z = (x.mul_(grad).to(dtype) for x, dtype in grads)
        return grad_w, *[None] * 3, *grad_z


def cross_entropies(
    pairs: Sequence[Pairs], weight: Tensor, target_weight: Tensor, temp: float, student_temp: float
) -> tuple[Tensor, list[Entropies]]:
    """The weighted sum, (), of the cross entropies of all pairs, which has a gradient once; and what has none, of each.

    Args:
        weight, target_weight: prototypes (K, E) of student and teacher. temp, student_temp: the teacher's temperature
            and the student's.
    """
    pairs = [one._replace(mix=one.mix.to(one.centre.dtype), share=one.share.to(one.centre.dtype)) for one in pairs]
    zs = [one.z for one in pairs]
    total, *found = _CrossEntropies.apply(weight, target_weight, (temp, student_temp), pairs, *zs)  # type: ignore
    size = len(Entropies._fields)
    return total, [Entropies(*found[i : i + size]) for i in range(0, len(found), size)]


class Centering(nn.Module):
    """Centres c (L, K) of the teacher's logits, subtracted before its softmax.

    The rows of a level's centre are the logits of its targets: of the class token those of the two global views, of the
    blended level those of views and local crops, of the patches those of every matched patch. Centres move after the
    loss of each micro-step, which still used the old ones: c <- momentum c + (1 - momentum) mean of all rows.
    Args:
        exact: weigh every row alike, not every process (the two differ for patches).
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


class Patches(NamedTuple):
    """Sampled patches of student and teacher, with masks: 1 where a patch of the one is shown by the other, else 0."""

    student: Tensor  # (2 B, s, E)
    student_mask: Tensor  # (2 B, s)
    rows: Tensor  # (R,), numbers of the student's shown patches among all 2 B s
    views: Tensor  # (2 B, s, E), the teacher's, at the places of the views' patches
    views_mask: Tensor  # (2 B, s)
    crops: Tensor  # (2 B, nl, s_l, E), the teacher's, at the places of the local crops' patches
    crops_mask: Tensor  # (2 B, nl, s_l)


class Level(NamedTuple):
    """What one level of the loss compares, and the rows of its centre."""

    pairs: Pairs
    rows_sum: Tensor  # (E,), sum of the teacher's vectors whose logits are the centre's rows
    rows: Tensor  # (), their number


class UDILoss(nn.Module):
    """The three levels and their centres; `udi_forward_loss` runs the networks and adds the levels up.

    With l(z) the logits of a vector z, teacher and student predict p_t(y|z') = softmax((l(z') - c) / T) and
    p_s(y|z) = softmax(l(z) / τ). The loss is the mean of the levels (the figure has their sum).
    Args:
        num_local_crops: nl. dim: K. teacher_temp_schedule: T by epoch. student_temp: τ.
        include_patch: has the level of patches. num_clt: class tokens, 1 or 2.
        alpha: α, share of the patches in the targets of the second class token.
        weights: of the levels; default: 1 / L each. exact_center: as `Centering`.
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

    def class_level(self, s: Projected, t: Projected) -> Level:
        """CE(p_t(y|z'_cls), p_s(y|z_cls)): the class token of a view predicts that of the other view.

        A local crop aims at the mean of the predictions of both views.
        """
        z = wide(t.global_cls[0])  # (2 B, E)
        own = torch.eye(2, device=z.device)
        mix = torch.cat([own, torch.full((self.num_local_crops, 2), 0.5, device=z.device)])  # (2 + nl, 2)
        return self._class_tokens(0, s, by_image(z), mix, z.sum(dim=0), len(z))

    def blended_level(self, s: Projected, t: Projected, patches: Patches) -> Level:
        """CE(p*_t(y|Z'), p_s(y|z_cls+)): the extra class token predicts a target of two kinds, patches and image.

        p*_t(y|Z') = softmax((α mean_i l(ẑ'_i) + (1 - α) l(z'_cls) - c) / T), over the matched patches i (logits are
        blended, not predictions, as upstream). A local crop has a blend with each view and aims at the mean of both.
        """
        nl, u = self.num_local_crops, wide(t.global_cls[0])[:, None]  # (2 B, 1, E)
        means = mean_rows(patches.views, patches.views_mask)[:, None], mean_rows(patches.crops, patches.crops_mask)
        blend = by_image(self.alpha * torch.cat(means, dim=1) + (1 - self.alpha) * u)  # (B, 2, 1 + nl, E)
        target = blend.transpose(1, 2).flatten(1, 2)  # (B, 2 + 2 nl, E): both of the views, then of each local crop
        own, mean = torch.eye(2, device=u.device), torch.full((1, 2), 0.5, device=u.device)
        mix = torch.block_diag(own, *[mean] * nl)  # (2 + nl, 2 + 2 nl)
        rows = target.shape[0] * target.shape[1]
        return self._class_tokens(1, s, target, mix, target.sum(dim=(0, 1)), rows)

    def _class_tokens(
        self, level: int, s: Projected, target: Tensor, mix: Tensor, rows_sum: Tensor, rows: int
    ) -> Level:
        """Cross entropies of a class token: ℓ = (2 ℓ_global + 2 nl ℓ_local) / (2 + 2 nl), of means over their rows.

        Args:
            target: teacher vectors (B, T, E) by image. mix: (2 + nl, T), shares of their predictions in the targets of
                an image's views and local crops.
        """
        nl, batch = self.num_local_crops, len(target)
        z = by_image(s.global_cls[level])  # (B, 2, E)
        if s.local_cls is not None:
            z = torch.cat([z, s.local_cls[level].transpose(0, 1)], dim=1)  # (B, 2 + nl, E)
        weight = self.weights[level] / (2 + 2 * nl) / batch  # of a global view
        share = torch.cat([target.new_full((2,), weight), target.new_full((nl,), 2 * weight)])
        pairs = Pairs(z, target, self.centering.center[level], mix, share)
        return Level(pairs, rows_sum, target.new_full((), rows))

    def patch_level(self, patches: Patches) -> Level:
        """CE(p_t(y|ẑ'_i), p_s(y|ẑ_i)): a sampled patch predicts what the teacher has in its place.

        The mean over the shown patches of the global views; those of local crops only move the centre.
        """
        level = self.num_clt
        z, target = (x.flatten(0, 1)[patches.rows, None] for x in (patches.student, patches.views))  # (R, 1, E)
        share = self.weights[level] / patches.student_mask.sum().clamp(min=1)
        pairs = Pairs(z, target, self.centering.center[level], target.new_ones(1, 1), share[None])
        both = (patches.views, patches.views_mask), (patches.crops, patches.crops_mask)
        rows_sum = torch.stack([(x * mask[..., None]).flatten(0, -2).sum(dim=0) for x, mask in both]).sum(dim=0)
        return Level(pairs, rows_sum, patches.views_mask.sum() + patches.crops_mask.sum())


class Spec(NamedTuple):
    """The parts of the loss: losses of global and local crops per level, and what shows a collapse."""

    global_losses: list[Tensor]
    local_losses: list[Tensor]  # none for patches
    mean_entropy: Tensor  # of the teacher's mean prediction, in nats
    entropy: Tensor  # mean of its predictions' entropies


def by_image(x: Tensor) -> Tensor:
    """Rows of two views (2 B, ...), those of one after those of the other -> (B, 2, ...)."""
    return x.unflatten(0, (2, -1)).transpose(0, 1)


def mean_rows(z: Tensor, mask: Tensor) -> Tensor:
    """Weighted sum of vectors (..., s, E) with mask (..., s), over the mask's sum: (..., E)."""
    return (z * mask[..., None]).sum(dim=-2) / (mask.sum(dim=-1, keepdim=True) + 1e-5)


def teacher_maps(tgt_maps: Sequence[Tensor]) -> Tensor:
    """Maps of both views, (B, s, N) each, and interleaved ones of local crops -> (2 B, s + nl s_l, N)."""
    views = [torch.cat(list(tgt_maps[view::2]), dim=1) for view in (0, 1)]
    return torch.cat(views)


def shown_rows(mix: Tensor) -> Tensor:
    """Numbers of the rows of maps (2 B, s, N) that are not zero."""
    return (mix.sum(dim=-1) > 0).flatten().nonzero()[:, 0]


def match(z_s: Tensor, mix_s: Tensor, rows: Tensor, z_t: Tensor, mix_t: Tensor, nl: int) -> Patches:
    """The sampled patches of student (2 B, s, E) and teacher (2 B, s + nl s_l, E), by the maps that sampled them."""
    s, z_t, mask = mix_s.shape[1], wide(z_t), mix_t.sum(dim=-1)
    s_l = (mix_t.shape[1] - s) // max(nl, 1)
    crops, crops_mask = (x[:, s:].unflatten(1, (nl, s_l)) for x in (z_t, mask))
    return Patches(z_s, mix_s.sum(dim=-1), rows, z_t[:, :s], mask[:, :s], crops, crops_mask)


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
        rows: numbers of the rows of student and teacher maps that are not zero (`MultiCropWrapper`); giving them
            spares waiting for the device.
    Returns:
        loss: (). its parts.
    """
    mix_s = mix_t = rows_s = rows_t = None
    if udi_loss.include_patch:
        mix_s, mix_t = torch.cat(list(src_maps[:2])), teacher_maps(tgt_maps)
        rows_s, rows_t = rows or (shown_rows(mix_s), shown_rows(mix_t))
    with torch.no_grad():  # the teacher's weights only follow the student's (`engine_pretrain.update_teacher`)
        t: Projected = teacher(crops, mix_t, rows_t, branch=1)
    s: Projected = student(crops, mix_s, rows_s, branch=0, drop_path_rand=drop_path_rand)
    levels, shown = [udi_loss.class_level(s, t)], None
    if mix_s is not None and mix_t is not None and rows_s is not None:
        patches = match(s.patches, mix_s, rows_s, t.patches, mix_t, udi_loss.num_local_crops)  # type: ignore[arg-type]
        if udi_loss.num_clt == 2:
            levels.append(udi_loss.blended_level(s, t, patches))
        levels.append(udi_loss.patch_level(patches))
        shown = patches.student_mask.sum().clamp(min=1)
    temp, student_temp = udi_loss.temperatures[epoch], udi_loss.student_temp
    loss, found = cross_entropies([level.pairs for level in levels], s.weight, t.weight, temp, student_temp)
    with torch.no_grad(), torch.autocast(crops[0].device.type, enabled=False):
        # The sum of a level's logits is the logits of its vectors' sum.
        sums = F.linear(torch.stack([level.rows_sum for level in levels]), wide(t.weight))
        udi_loss.centering.update(sums, torch.stack([level.rows for level in levels]))
    tokens, nl = [entropies.each for entropies in found[: udi_loss.num_clt]], udi_loss.num_local_crops
    global_losses = [each[:, :2].mean() for each in tokens]
    if shown is not None:
        global_losses.append(found[-1].each.sum() / shown)
    mean_target = found[0].mean_target
    spec = Spec(
        global_losses,
        [each[:, 2:].mean() for each in tokens] if nl else [],
        -torch.special.xlogy(mean_target, mean_target).sum(),
        found[0].entropy,
    )
    return loss, spec
