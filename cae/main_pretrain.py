"""CAE pre-training. Recipes of the published rows: scripts/cae_*.sh."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor, nn

from cae import optim
from cae.augmentation import HALF, RANGES, PretrainAugmentation
from cae.engine_pretrain import batch_loss, train_one_epoch
from cae.files import default_folder, resume_path, run_files
from cae.initial import start_from
from cae.masking_generator import MaskingGenerator, RandomMaskingGenerator
from cae.models_cae import MODELS, ContextAutoencoderViT
from cae.models_dalle import DalleTokenizer, map_pixels
from cae.models_dvae import DiscreteVAE, load_tokenizer
from common import datasets, distributed


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("CAE pre-training")
    g = distributed.flag_groups(p)
    g.model.add_argument("--model_type", default="cae", choices=["cae", "caev2"], help="caev2 is not supported")
    g.optimizer.add_argument("--batch_size", default=64, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument("--epochs", default=300, type=int, help="passes over the training images")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="batches per update of the weights")
    g.output.add_argument(
        "--save_ckpt_freq", default=50, type=int, help="epochs from one numbered checkpoint to the next"
    )
    # ---- tokenizer
    g.model.add_argument(
        "--discrete_vae_weight_path",
        help="folder of DALL-E's encoder.pkl or of what convert_dalle.py made of it, a checkpoint of a customized "
        "tokenizer, or the word random: random weights, to measure speed",
    )
    g.model.add_argument(
        "--discrete_vae_type", default="dall-e", help="tokenizer: dall-e, or customized (one of main_tokenizer.py)"
    )
    g.model.add_argument(
        "--dvae_num_layers", default=3, type=int, help="layers of a customized tokenizer whose file does not say"
    )
    # ---- network
    g.model.add_argument(
        "--model", default="deit_base_patch16_224", help=f"must be given (no default works): {', '.join(MODELS)}"
    )
    g.model.add_argument(
        "--layer_scale_init_value",
        default=0.1,
        type=float,
        help="initial layer scale of the encoder; 0 for none (README, L: 1e-5)",
    )
    g.model.add_argument("--input_size", default=224, type=int, help="side of the encoder's images in pixels")
    g.model.add_argument("--patch_size", type=int, help="side of a patch in pixels; default: that in the model's name")
    g.model.add_argument("--second_input_size", default=112, type=int, help="side of the tokenizer's images in pixels")
    g.augmentation.add_argument(
        "--drop_path",
        default=0,
        type=float,
        help="probability of skipping the last block in training; lower for earlier ones (README: 0.1)",
    )
    unknown = "positions are fixed sine and cosine"
    g.unused.add_argument("--sincos_pos_emb", action="store_true", help=unknown)
    g.unused.add_argument("--abs_pos_emb", action="store_true", help=unknown)
    g.unused.add_argument("--rel_pos_bias", action="store_true", help=unknown)
    g.model.add_argument(
        "--base_momentum",
        type=float,
        help="momentum of a moving average of the encoder that makes the alignment targets; default: the encoder",
    )
    # ---- optimizer
    optim.add_flags(p)
    g.optimizer.add_argument(
        "--lr", default=5e-4, type=float, help="highest learning rate (README: 1.5e-3 for 2048 images per update)"
    )
    g.unused.add_argument(
        "--warmup_lr", default=1e-6, type=float, help="the warm-up starts at 0, as in the authors' code"
    )
    g.optimizer.add_argument("--min_lr", default=1e-5, type=float, help="learning rate at the end of training")
    g.optimizer.add_argument(
        "--warmup_epochs", default=5, type=int, help="epochs in which the learning rate rises (README: 10 of 300)"
    )
    g.optimizer.add_argument(
        "--warmup_steps",
        default=-1,
        type=int,
        help="updates in which the learning rate rises, in place of --warmup_epochs, if above 0",
    )
    # ---- augmentation
    filters = "bicubic, lanczos, bilinear, hamming or random"
    g.augmentation.add_argument(
        "--train_interpolation", default="bicubic", help=f"how the encoder's images are resized: {filters}"
    )
    g.augmentation.add_argument(
        "--second_interpolation", default="lanczos", help=f"how the tokenizer's images are resized: {filters}"
    )
    datasets.add_augment_flag(p, "pillow", "device")
    datasets.add_flags(p)
    g.augmentation.add_argument(
        "--imagenet_default_mean_and_std",
        action="store_true",
        help="normalise the encoder's images by ImageNet's mean and deviation instead of 0.5 and 0.5",
    )
    g.output.add_argument("--output_dir", default="", help="folder of checkpoints and log.txt; '' writes nothing")
    g.output.add_argument("--log_dir", help="folder of TensorBoard's events; default: --output_dir")
    g.process.add_argument(
        "--auto_resume", action="store_true", default=True, help="continue a run found in --output_dir (default)"
    )
    g.process.add_argument(
        "--no_auto_resume", action="store_false", dest="auto_resume", help="start anew, whatever is in --output_dir"
    )
    distributed.add_flags(p, pretrains=True)
    g.output.add_argument("--exp_name", default="", help="prefix of the numbered checkpoints' names")
    g.unused.add_argument("--enable_multi_print", action="store_true", help="process 0 prints")
    g.augmentation.add_argument(
        "--crop_min_size", default=0.08, type=float, help="smallest crop, as a share of the image's area"
    )
    g.augmentation.add_argument(
        "--crop_max_size", default=1.0, type=float, help="largest crop, as a share of the image's area"
    )
    g.augmentation.add_argument(
        "--color_jitter", default=0, type=float, help="strength of random changes of brightness, contrast, saturation"
    )
    # ---- masks
    g.model.add_argument("--mask_generator", default="block", help="kind of masks: block or random")
    g.model.add_argument("--num_mask_patches", default=98, type=int, help="masked patches of an image, in block masks")
    g.model.add_argument(
        "--max_mask_patches_per_block", type=int, help="largest number of patches in one block; default: all of them"
    )
    g.model.add_argument(
        "--min_mask_patches_per_block", default=16, type=int, help="smallest number of patches in one block"
    )
    g.model.add_argument("--ratio_mask_patches", type=float, help="share of masked patches, in random masks")
    # ---- regressor, decoder, loss
    g.model.add_argument("--regressor_depth", default=4, type=int, help="number of the regressor's blocks")
    g.model.add_argument("--decoder_depth", default=4, type=int, help="number of the decoder's blocks")
    g.model.add_argument("--decoder_embed_dim", default=768, type=int, help="width of regressor and decoder")
    g.model.add_argument("--decoder_num_heads", default=12, type=int, help="attention heads of regressor and decoder")
    g.model.add_argument(
        "--decoder_num_classes", default=8192, type=int, help="number of the tokenizer's visual tokens"
    )
    g.model.add_argument(
        "--decoder_layer_scale_init_value",
        default=0.1,
        type=float,
        help="initial layer scale of regressor and decoder; 0 for none (README, L: 1e-5)",
    )
    g.unused.add_argument("--num_out_dim", default=512, type=int, help="belongs to CAE v2")
    g.model.add_argument("--align_loss_weight", default=2, type=float, help="weight λ of the alignment loss")
    g.unused.add_argument("--latent_alignment_loss_weight", default=0, type=float, help="belongs to CAE v2")
    g.model.add_argument(
        "--fix_init_weight", action="store_true", help="initial output weights of a block shrink with its depth"
    )
    p.set_defaults(data_path="/datasets01/imagenet_full_size/061417/", num_workers=10)
    return p


def build_model(args: argparse.Namespace, **overrides) -> ContextAutoencoderViT:
    """The network of the flags (and overrides by keyword); raises UserError for values that do not fit together."""
    if args.model not in MODELS:
        raise distributed.UserError(f"--model {args.model}: expected one of {', '.join(MODELS)}")
    keywords = {
        "img_size": args.input_size,
        "in_chans": args.in_chans or 3,
        "drop_path_rate": args.drop_path,
        "init_values": args.layer_scale_init_value,
        "decoder_num_classes": args.decoder_num_classes,
        "decoder_embed_dim": args.decoder_embed_dim,
        "regressor_depth": args.regressor_depth,
        "decoder_depth": args.decoder_depth,
        "decoder_num_heads": args.decoder_num_heads,
        "decoder_layer_scale_init_value": args.decoder_layer_scale_init_value,
        "fix_init_weight": args.fix_init_weight,
        "base_momentum": args.base_momentum,
        "model_type": args.model_type,
    }
    if args.patch_size is not None:
        keywords["patch_size"] = args.patch_size
    with distributed.user_errors(f"--model {args.model}"):
        return MODELS[args.model](**{**keywords, **overrides})


def build_masking(args: argparse.Namespace) -> MaskingGenerator | RandomMaskingGenerator:
    """The masking generator that the flags choose; raises UserError for settings that no mask can meet."""
    if args.mask_generator == "random":
        if args.ratio_mask_patches is None:
            raise distributed.UserError("--mask_generator random: needs --ratio_mask_patches, such as 0.5")
        with distributed.user_errors(f"--ratio_mask_patches {args.ratio_mask_patches}"):
            return RandomMaskingGenerator(grid_of(args), args.ratio_mask_patches)
    if args.mask_generator != "block":
        raise distributed.UserError(f"--mask_generator {args.mask_generator}: expected block or random")
    smallest, largest = args.min_mask_patches_per_block, args.max_mask_patches_per_block
    with distributed.user_errors(f"--num_mask_patches {args.num_mask_patches} and the sizes of blocks"):
        masking = MaskingGenerator(grid_of(args), args.num_mask_patches, smallest, largest)
        masking()  # settings that no mask can meet end here
        return masking


def mean_and_std(args: argparse.Namespace):
    """Mean and deviation by which the encoder's images are normalised."""
    usual = (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD) if args.imagenet_default_mean_and_std else (HALF, HALF)
    return datasets.statistics(args, *usual)[:2]


def build_data(args: argparse.Namespace, device: torch.device) -> tuple[datasets.Loader, dict]:
    """Training batches of the flags, and what else `batch_loss` takes: tokenizer, align_weight, num_masked.

    Raises:
        distributed.UserError: a value does not fit, or the tokenizer gives other tokens than the model predicts.
    """
    tokenizer = build_tokenizer(args)
    masking = build_masking(args)
    if args.crop_min_size > args.crop_max_size:
        raise distributed.UserError(
            f"--crop_min_size {args.crop_min_size}: is above --crop_max_size {args.crop_max_size}"
        )
    with distributed.user_errors("--train_interpolation, --second_interpolation"):
        augment = PretrainAugmentation(
            args.input_size,
            args.second_input_size,
            tokenizer_view(tokenizer),
            masking,
            args.train_interpolation,
            args.second_interpolation,
            (args.crop_min_size, args.crop_max_size),
            args.color_jitter,
            *mean_and_std(args),
            on_device=args.augment == "device",
        )
    context = {"tokenizer": tokenizer.to(device), "align_weight": args.align_loss_weight}
    return datasets.pretrain_loader(args, augment, device), context | {"num_masked": masking.num_masked}


def grid_of(args: argparse.Namespace) -> int:
    """Side of the patch grid, in patches."""
    return args.input_size // (args.patch_size or 16)


def build_tokenizer(args: argparse.Namespace, with_decoder: bool = False) -> DalleTokenizer | DiscreteVAE:
    """The frozen tokenizer of the flags. with_decoder: also able to make pictures of tokens.

    Raises:
        distributed.UserError: its weights cannot be read, or it gives other tokens than the model predicts.
    """
    path, size = args.discrete_vae_weight_path, args.second_input_size
    if path == "random":
        tokenizer = DalleTokenizer(with_decoder=with_decoder)
    else:
        tokenizer = load_tokenizer(args.discrete_vae_type, path, size, args.dvae_num_layers, with_decoder)
    taken = tokenizer.in_chans if isinstance(tokenizer, DiscreteVAE) else 3
    if taken != (args.in_chans or 3):
        way = "one of main_tokenizer.py with the same --in_chans can"
        raise distributed.UserError(f"--in_chans {args.in_chans or 3}: the tokenizer takes {taken} channels; {way}")
    own = tokenizer.grid_size if isinstance(tokenizer, DiscreteVAE) else size / 8
    grid, tokens = grid_of(args), args.decoder_num_classes
    if (own, tokenizer.num_tokens) != (grid, tokens):
        fit = f"--second_input_size {round(size / own * grid)} --decoder_num_classes {tokenizer.num_tokens}"
        raise distributed.UserError(
            f"--second_input_size {size}: the tokenizer gives {own:g} x {own:g} of {tokenizer.num_tokens} tokens, "
            f"the model predicts {grid} x {grid} of {tokens}; {fit} would fit"
        )
    return tokenizer


def tokenizer_view(tokenizer: DalleTokenizer | DiscreteVAE) -> Callable[[Tensor], Tensor]:
    """The map from pixels in [0, 1] to what a tokenizer takes."""
    return map_pixels if isinstance(tokenizer, DalleTokenizer) else datasets.Normalize(tokenizer.mean, tokenizer.std)


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """--opt on two groups, with and without weight decay; class and mask token are decayed, as upstream.

    README: AdamW, weight decay 0.05; betas (0.9, 0.999) and epsilon 1e-8 are the optimizer's (upstream
    furnace/optim_factory.py@a7fd162).
    """
    return optim.create_optimizer(args, optim.param_groups(model, args.weight_decay), lr)


def main(args: argparse.Namespace) -> None:
    distributed.check_ranges(args, RANGES)
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    default_folder(args)
    # ---- model
    model = build_model(args).to(device)
    resume = resume_path(args)
    distributed.hold_flags(args, resume, distributed.HELD)
    if weights := distributed.initial_weights(args, resume):
        start_from(model, weights, args.initial_checkpoint)
    net = distributed.wrap(model, device, args.compile)
    # ---- data
    loader, context = build_data(args, device)
    if args.use_checkpoint:
        distributed.recompute_blocks(model)
    datasets.check_memory(args, model, partial(batch_loss, **context), loader, context["tokenizer"])
    # ---- optimizer
    images_per_step = args.batch_size * distributed.world_size()
    optimizer = build_optimizer(args, model, args.lr)
    rates = optim.build_rates(args, len(loader) // args.accum_iter)
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, args.clip_grad)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    distributed.log(
        f"{args.model}: {n_parameters:,} trained parameters on {device}, {updater.dtype}; "
        f"{loader.images} images, {images_per_step * args.accum_iter} per update (README: 2048), lr {args.lr:.2e}"
    )
    # ---- loop
    files = run_files(args, args.save_ckpt_freq, f"{args.exp_name}_")
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, optimizer=optimizer, scaler=updater.scaler)
    position = checkpoint.resume(resume, args.start_epoch)
    tags = {"loss": "loss/loss", "mlm_acc": "loss/mlm_acc", "loss_main": "loss_main/loss"}
    tags |= {"loss_align": "loss_align/loss"}
    tags |= {name: f"opt/{name}" for name in ("loss_scale", "lr", "min_lr", "weight_decay", "grad_norm")}
    for epoch, epoch_log in checkpoint.epochs(loader, position, tags):
        with checkpoint.on_exit(epoch_log):
            stats = train_one_epoch(net, loader, updater, rates, epoch_log, seed=args.seed, **context)
        epoch_log.run_log.epoch(
            {**{f"train_{k}": v for k, v in stats.items()}, "epoch": epoch, "n_parameters": n_parameters}
        )
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; {files.latest} is in {args.output_dir or 'no folder'}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
