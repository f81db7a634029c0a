"""Linear probing of a UDI backbone. Recipes of the authors' rows: scripts/udi_*.sh."""

import argparse
import math
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision import transforms

from common import datasets, distributed
from udi.backbone import build_backbone, load_backbone
from udi.engine_finetune import evaluate, train_one_epoch
from udi.files import Prefixed, folder_beside
from udi.flags import add_checkpoint_flags, boolean
from udi.models_udi import VisionTransformer

DERIVED = "."  # upstream's default folder, which it never writes to


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI linear probing")
    g = distributed.flag_groups(p)
    # ---- network
    g.model.add_argument(
        "--n_last_blocks",
        default=4,
        type=int,
        help="last blocks whose class tokens are classified together (README: 4)",
    )
    g.model.add_argument(
        "--avgpool_patchtokens", default=False, type=boolean, help="add the mean of the patches, of the last block only"
    )
    g.model.add_argument("--arch", default="vit_small", help="backbone")
    add_checkpoint_flags(p)
    g.model.add_argument("--input_size", default=224, type=int, help="image side in pixels")
    # ---- optimizer
    g.optimizer.add_argument("--epochs", default=100, type=int, help="epochs to train (README: 100)")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="micro-steps per update")
    g.optimizer.add_argument(
        "--lr", default=0.001, type=float, help="learning rate per 256 images of an update (README: 0.02)"
    )
    g.optimizer.add_argument(
        "--batch_size_per_gpu", "--batch_size", default=256, type=int, help="images per process and micro-step"
    )
    # ---- data, files, process
    datasets.add_flags(p)
    g.output.add_argument(
        "--val_freq",
        default=1,
        type=int,
        help="epochs between evaluations, from the first; the last is always evaluated",
    )
    g.output.add_argument(
        "--output_dir",
        default=DERIVED,
        help="checkpoints and logs; default: a folder beside the weights, named by the flags; '' writes nothing",
    )
    g.model.add_argument("--num_labels", "--nb_classes", default=1000, type=int, help="number of classes")
    g.output.add_argument("--evaluate", action="store_true", help="only evaluate the probe of --resume or --output_dir")
    g.optimizer.add_argument("--lr_min", default=0.0, type=float, help="learning rate at the end")
    distributed.add_flags(p)
    p.set_defaults(data_path="/dataset/imagenet-raw/", num_workers=12, local_rank=0)
    return p


def strong_transform(
    input_size: int = 224, mean=datasets.IMAGENET_MEAN, std=datasets.IMAGENET_STD, in_chans: int | None = None
) -> transforms.Compose:
    """Flip, RandAugment of the whole image, a crop of 8-100 %, random erasing; in_chans: as in `photos_only`."""
    fill = tuple(round(255 * x) for x in datasets.IMAGENET_MEAN)
    augment = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"translate_const": int(0.45 * input_size), "img_mean": fill}
    )
    steps = [
        transforms.RandomHorizontalFlip(),
        datasets.photos_only(datasets.repair_posterize(augment), in_chans),
        transforms.RandomResizedCrop(input_size, interpolation=transforms.InterpolationMode.BICUBIC),
        *datasets.tensor_and_normalize(mean, std, in_chans),
        RandomErasing(0.25, mode="pixel", max_count=1, device="cpu"),
    ]
    return transforms.Compose(steps)


class LinearClassifier(nn.Module):
    """A linear layer on features of any shape (B, ...) with `dim` values per image."""

    def __init__(self, dim: int, num_labels: int = 1000):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def probe_features(backbone: VisionTransformer, imgs: Tensor, n_last_blocks: int, avgpool: bool) -> Tensor:
    """Normed first class tokens of the last blocks, oldest first, (B, n C).

    avgpool: the last block's, each value followed by that of the patches' mean, (B, 2 C).
    """
    outputs = backbone.get_intermediate_layers(imgs, n_last_blocks)
    if avgpool:
        last = outputs[-1]
        mean = last[:, backbone.num_class_token :].mean(dim=1)
        return torch.stack([last[:, 0], mean], dim=2).flatten(1)  # as upstream: interleaved
    return torch.cat([tokens[:, 0] for tokens in outputs], dim=1)


class Probe(nn.Module):
    """A frozen backbone and a linear classifier, in float32 whatever the backbone computes in."""

    def __init__(self, backbone: VisionTransformer, num_labels: int, n_last_blocks: int, avgpool: bool):
        super().__init__()
        if not 1 <= n_last_blocks <= len(backbone.blocks):
            raise ValueError(f"{n_last_blocks} blocks, expected 1 to the depth {len(backbone.blocks)}")
        if avgpool and n_last_blocks > 1:
            raise ValueError(f"{n_last_blocks} blocks, the patches' mean is of 1 only")
        self.backbone = backbone.requires_grad_(False)
        self.n_last_blocks, self.avgpool = n_last_blocks, avgpool
        self.classifier = LinearClassifier(backbone.embed_dim * (n_last_blocks + avgpool), num_labels)

    def train(self, mode: bool = True) -> "Probe":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, imgs: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        with torch.no_grad():
            features = probe_features(self.backbone, imgs, self.n_last_blocks, self.avgpool)
        with torch.autocast(imgs.device.type, enabled=False):
            return self.classifier(features.float())


def output_dir(args: argparse.Namespace) -> str:
    """The folder of --output_dir; if that is not given, one beside the weights that is named by the recipe."""
    if args.output_dir != DERIVED:
        return args.output_dir
    name = (
        f"linear-eva-lr-{args.lr:.3e}-mlr-{args.lr_min:.3e}-bs-{args.batch_size_per_gpu}-ep-{args.epochs}"
        f"-key-{args.checkpoint_key}-layer-{args.n_last_blocks}"
    )
    return folder_beside(args.pretrained_weights, name)


def build_model(args: argparse.Namespace) -> Probe:
    """The probe of the flags; raises UserError for values that do not fit together."""
    weights = None
    if args.pretrained_weights:
        weights = load_backbone(args.pretrained_weights, args.checkpoint_key, args.class_tokens)
    else:
        distributed.log("WARNING: no --pretrained_weights: the encoder has random weights")
    backbone = build_backbone(args.arch, args.patch_size, weights, args.input_size, in_chans=args.in_chans or 3)
    with distributed.user_errors(f"--n_last_blocks {args.n_last_blocks} and --avgpool_patchtokens"):
        return Probe(backbone, args.num_labels, args.n_last_blocks, args.avgpool_patchtokens)


def build_optimizer(args: argparse.Namespace, model: Probe, lr: float) -> torch.optim.SGD:
    """SGD with momentum on the classifier, without weight decay."""
    return torch.optim.SGD(model.classifier.parameters(), lr=lr, momentum=0.9, weight_decay=0, fused=True)


def build_loaders(args: argparse.Namespace, device: torch.device) -> tuple[datasets.Loader, datasets.Loader]:
    """Training batches, the last one of an epoch possibly smaller, and validation batches; to evaluate, those twice."""
    args.batch_size = args.batch_size_per_gpu
    train, val = (
        datasets.image_dataset(args.data_path, is_train, True, args.dataset, split, in_chans=args.in_chans)
        for is_train, split in ((not args.evaluate, args.train_split), (False, args.val_split))
    )
    datasets.follow_classes(args, train, val, "num_labels")
    statistics = datasets.statistics(args)
    augment = strong_transform(args.input_size, *statistics)
    val_transform = datasets.eval_transform(args.input_size, 224 / 256, *statistics)
    own = {"seed": args.seed, "accum_iter": args.accum_iter, "drop_last": False}
    loader = None if args.evaluate else datasets.build_loader(args, train, augment, device, **own)
    val_loader = datasets.build_loader(args, val, val_transform, device, train=False)
    return val_loader if loader is None else loader, val_loader


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    if args.val_freq < 1 or args.lr_min < 0:
        raise distributed.UserError(f"--val_freq {args.val_freq} --lr_min {args.lr_min}: expected at least 1 and 0")
    args.output_dir = output_dir(args)
    # ---- data
    loader, val_loader = build_loaders(args, device)
    # ---- model
    model = build_model(args).to(device)
    if not args.evaluate:
        datasets.check_memory(args, model, lambda net, batch: net(batch[0]), loader)
    net = distributed.wrap(model, device, args.compile)
    # ---- optimizer
    images_per_step = args.batch_size * distributed.world_size()
    lr = args.lr * images_per_step * args.accum_iter / 256
    optimizer = build_optimizer(args, model, lr)
    scheduler = CosineAnnealingLR(optimizer, args.epochs, args.lr_min)
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter)
    trained = sum(p.numel() for p in model.classifier.parameters())
    distributed.log(
        f"{args.arch}: {trained:,} trained parameters on {device}, {updater.dtype}; {loader.images} images, "
        f"{images_per_step * args.accum_iter} per update (README: 2048), lr {lr:.2e}"
    )
    # ---- loop
    latest = "checkpoint.pth.tar"
    resume = distributed.find_checkpoint(args.output_dir, args.resume, latest)
    if args.evaluate:
        if not resume:
            raise distributed.UserError(f"--evaluate: {args.output_dir or '--output_dir'} holds no {latest}")
        val_loader.match_classes(distributed.load_weights(Prefixed(model.classifier), resume), resume)
        evaluate(model, val_loader, updater)
        return
    files = distributed.Files(
        latest=latest, weights="state_dict", epoch=1, values=lambda _: {"best_acc": checkpoint.best}
    )
    parts = {"optimizer": optimizer, "scheduler": scheduler, "fp16_scaler": updater.scaler}
    checkpoint = distributed.Checkpoint(args.output_dir, args, Prefixed(model.classifier), files, **parts)
    position = checkpoint.resume(resume, args.start_epoch)
    for group in optimizer.param_groups:  # of this run's flags, wherever it continues
        turn = math.pi * position.epoch / args.epochs
        group["initial_lr"], group["lr"] = lr, args.lr_min + (lr - args.lr_min) * (1 + math.cos(turn)) / 2
    scheduler.T_max, scheduler.base_lrs = args.epochs, [lr] * len(optimizer.param_groups)
    for epoch, epoch_log in checkpoint.epochs(loader, position, {"loss": "train/loss", "lr": "train/lr"}):
        steady = optimizer.param_groups[0]["lr"], 0.0  # rate and weight decay
        with checkpoint.on_exit(epoch_log):
            stats = train_one_epoch(net, nn.CrossEntropyLoss(), loader, updater, lambda *_, r=steady: r, epoch_log)
        line = {"train_loss": stats["loss"], "train_lr": stats["lr"], "epoch": epoch}
        if epoch % args.val_freq == 0 or epoch + 1 == args.epochs:
            checkpoint.save(epoch_log.position(len(loader)))  # an evaluation may be stopped: it is repeated from here
            test = evaluate(model, val_loader, updater)
            checkpoint.best = max(checkpoint.best, test["acc1"])
            distributed.log(f"Max accuracy: {checkpoint.best:.2f}%")
            epoch_log.run_log.scalars({f"test/{k}": v for k, v in test.items()}, epoch)
            line |= {f"test_{k}": v for k, v in test.items() if k != "acc5" or args.num_labels >= 5}
        scheduler.step()
        epoch_log.run_log.epoch(line)
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; {latest} is in {args.output_dir or 'no folder'}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
