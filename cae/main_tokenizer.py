"""Train a small discrete VAE on any images, for pre-training without DALL-E's: --discrete_vae_type customized.

Then: main_pretrain.py --discrete_vae_type customized --discrete_vae_weight_path OUTPUT_DIR/checkpoint.pth
      --second_input_size INPUT_SIZE --decoder_num_classes NUM_TOKENS ...
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torchvision import transforms

from cae.augmentation import RANGES, of_tensors
from cae.engine_tokenizer import CodeUsage, temperature_at, train_one_epoch
from cae.models_dvae import MEAN, STD, DiscreteVAE
from common import datasets, distributed, lr_sched

UPDATES = 500  # of a run whose --epochs is not given: 1 to 3 minutes at 32 to 64 pixels on two CPU cores
COLLAPSE = 0.05  # share of the codebook below which the perplexity is warned about


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("CAE tokenizer")
    g = distributed.flag_groups(p)
    g.optimizer.add_argument("--batch_size", default=32, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument(
        "--epochs", type=int, help=f"passes over the training images; default: as many as {UPDATES} updates take"
    )
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="batches per update of the weights")
    # ---- model; stored in the checkpoint, where pre-training reads it
    g.model.add_argument(
        "--input_size", default=64, type=int, help="side of the images in pixels: --second_input_size of pre-training"
    )
    g.model.add_argument(
        "--num_tokens", default=512, type=int, help="number of codes: --decoder_num_classes of pre-training"
    )
    g.model.add_argument("--num_layers", default=3, type=int, help="n: a code stands for 2^n x 2^n pixels")
    g.model.add_argument("--codebook_dim", default=128, type=int, help="width of the codes' vectors")
    g.model.add_argument("--hidden_dim", default=64, type=int, help="width of the convolutions")
    # ---- loss
    drawn = "temperature of the Gumbel-softmax that draws codes,"
    g.model.add_argument("--temperature", default=1.0, type=float, help=f"{drawn} at the beginning")
    g.model.add_argument("--min_temperature", default=1 / 16, type=float, help=f"{drawn} at the end")
    g.model.add_argument(
        "--anneal", default=0.8, type=float, help="share of training after which --min_temperature is reached"
    )
    g.model.add_argument(
        "--kl_weight", default=0.03, type=float, help="weight of the loss that makes all codes be used equally often"
    )
    # ---- optimizer
    g.optimizer.add_argument("--weight_decay", default=1e-4, type=float, help="weight decay of AdamW")
    g.optimizer.add_argument("--clip_grad", default=1.0, type=float, help="largest norm of the gradient")
    g.optimizer.add_argument(
        "--lr", default=3e-3, type=float, help="highest learning rate (DALL-E's far larger network: 1e-4)"
    )
    g.optimizer.add_argument("--min_lr", default=0.0, type=float, help="learning rate at the end of training")
    g.optimizer.add_argument(
        "--warmup_epochs",
        type=float,
        help="epochs in which the learning rate rises; default: a twentieth of all epochs",
    )
    # ---- data, files, process; crops as pre-training makes them
    g.augmentation.add_argument(
        "--crop_min_size", default=0.08, type=float, help="smallest crop, as a share of the image's area"
    )
    g.augmentation.add_argument(
        "--crop_max_size", default=1.0, type=float, help="largest crop, as a share of the image's area"
    )
    g.augmentation.add_argument(
        "--second_interpolation",
        default="lanczos",
        help="how images are resized: lanczos, bicubic, bilinear or hamming",
    )
    datasets.add_flags(p)
    g.output.add_argument(
        "--output_dir", default="./pretrain/cae_tokenizer", help="folder of checkpoint, log.txt and TensorBoard events"
    )
    distributed.add_flags(p)
    return p


def tokenizer_transform(
    input_size: int,
    crop_min_size: float = 0.08,
    crop_max_size: float = 1.0,
    interpolation: str = "lanczos",
    mean=MEAN,
    std=STD,
    in_chans: int | None = None,
) -> transforms.Compose:
    """The view that pre-training tokenises: a random crop, a flip, and [0, 1] normalised, of photographs to [-1, 1].

    in_chans: given where images may be tensors.
    Raises:
        ValueError: the interpolation is unknown, or the crop sizes are no range of shares.
    """
    if not 0 < crop_min_size <= crop_max_size <= 1:
        raise ValueError(f"crops of {crop_min_size} to {crop_max_size} of the image, expected a range inside 0 to 1")
    filters = {name: transforms.InterpolationMode(name) for name in ("lanczos", "bicubic", "bilinear", "hamming")}
    if interpolation not in filters:
        raise ValueError(f"interpolation {interpolation}, expected one of {', '.join(filters)}")
    mode = of_tensors(filters[interpolation]) if in_chans else filters[interpolation]
    crop = transforms.RandomResizedCrop(input_size, (crop_min_size, crop_max_size), interpolation=mode)
    return transforms.Compose(
        [crop, transforms.RandomHorizontalFlip(), *datasets.tensor_and_normalize(mean, std, in_chans)]
    )


def build_model(args: argparse.Namespace) -> DiscreteVAE:
    """The network of the flags; raises UserError for sizes that do not fit together."""
    with distributed.user_errors("--input_size, --num_tokens, --num_layers, --codebook_dim and --hidden_dim"):
        sizes = (args.num_tokens, args.codebook_dim, args.num_layers, args.hidden_dim)
        if min(sizes) < 1:
            raise ValueError(f"{sizes}, expected positive numbers")
        mean, std, in_chans = datasets.statistics(args, MEAN, STD)
        return DiscreteVAE(args.input_size, *sizes, in_chans or 3, mean, std)


def report(stats: dict[str, float], num_tokens: int, epoch: int, epochs: int) -> None:
    """One line on the reconstructions and the codebook, and in the second half a warning if most of it is unused."""
    distributed.log(
        f"Epoch {epoch}: squared error from codes {stats['code_error']:.4f} (variance {stats['variance']:.4f}); "
        f"{stats['codes_used']} of {num_tokens} codes in use, perplexity {stats['perplexity']:.1f}"
    )
    if stats["perplexity"] < COLLAPSE * num_tokens and 2 * (epoch + 1) >= epochs:
        distributed.log("WARNING: most of the codebook is unused; raise --kl_weight or --epochs, or lower --num_tokens")


def main(args: argparse.Namespace) -> None:
    distributed.check_ranges(args, RANGES)
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    # ---- data
    crops = args.crop_min_size, args.crop_max_size, args.second_interpolation
    statistics = datasets.statistics(args, MEAN, STD)
    with distributed.user_errors("--crop_min_size, --crop_max_size and --second_interpolation"):
        transform = tokenizer_transform(args.input_size, *crops, *statistics)
    loader = datasets.pretrain_loader(args, transform, device)
    if args.epochs is None:
        args.epochs = math.ceil(UPDATES / (len(loader) // args.accum_iter))
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 20
    # ---- model
    model = build_model(args).to(device)
    datasets.check_memory(args, model, lambda net, batch: net(batch[0], 1.0, args.kl_weight).loss, loader)
    net = distributed.wrap(model, device, args.compile)
    usage = CodeUsage(args.num_tokens, device)
    # ---- optimizer; betas and the weight decay's default: arXiv 2102.12092, appendix A.2
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True
    )
    schedule = partial(
        lr_sched.warmup_cosine, base=args.lr, final=args.min_lr, warmup=args.warmup_epochs, epochs=args.epochs
    )

    def temperature(epoch: float) -> float:
        return temperature_at(epoch / args.epochs, args.temperature, args.min_temperature, args.anneal)

    if not 0 < args.min_temperature <= args.temperature or not 0 < args.anneal <= 1:
        raise distributed.UserError(
            "--min_temperature, --temperature and --anneal: expected 0 < t1 <= t0, 0 < share <= 1"
        )
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, args.clip_grad)
    images_per_step = args.batch_size * distributed.world_size()
    distributed.log(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, {updater.dtype}; {loader.images} "
        f"images, {images_per_step * args.accum_iter} per update; {model.grid_size} x {model.grid_size} codes an image"
    )
    # ---- loop
    checkpoint = distributed.Checkpoint(
        args.output_dir, args, model, optimizer=optimizer, scaler=updater.scaler, usage=usage
    )
    position = checkpoint.resume(distributed.find_checkpoint(args.output_dir, args.resume), args.start_epoch)
    stats: dict[str, float] = {}
    tags = {name: name for name in ("loss", "error", "kl", "lr", "temperature", "code_error")}
    for epoch, epoch_log in checkpoint.epochs(loader, position, tags, ticks=1000):
        by_step = schedule, temperature, args.kl_weight
        with checkpoint.on_exit(epoch_log):
            stats = train_one_epoch(net, loader, updater, *by_step, usage, epoch_log, args.seed)
        codes = {name: stats[name] for name in ("codes_used", "perplexity")}
        epoch_log.run_log.scalars(codes, (epoch + 1) * epoch_log.run_log.ticks)
        epoch_log.run_log.epoch({**{f"train_{k}": v for k, v in stats.items()}, "epoch": epoch})
        checkpoint.save(distributed.Position(epoch + 1))
        report(stats, args.num_tokens, epoch, args.epochs)
    distributed.log(f"{args.epochs} epochs done; checkpoint.pth and log.txt are in {args.output_dir}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
