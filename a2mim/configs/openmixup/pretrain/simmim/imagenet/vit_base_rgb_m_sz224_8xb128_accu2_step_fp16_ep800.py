"""SimMIM pre-training of vit_base, 800 epochs; 8 GPUs make 2048 images per update."""

method = "simmim"
backbone = "vit_base"
input_size = 224
patch_size = 16
drop_path = 0.1
mask_layer = 0
mask_token = "learnable"
mask_init = 0.0
mask_replace = True

mask_patch_size = 32
model_patch_size = 16
mask_ratio = 0.6
mask_color = "mean"
crop_scale = [0.67, 1.0]

opt = "adamw"
lr = 0.0004
weight_decay = 0.05
betas = [0.9, 0.999]
eps = 1e-08
paramwise = [
    ("(bn|ln|gn)(\\d+)?.(weight|bias)", {"weight_decay": 0.0}),
    ("norm", {"weight_decay": 0.0}),
    ("bias", {"weight_decay": 0.0}),
    ("mask_token", {"weight_decay": 0.0}),
    ("pos_embed", {"weight_decay": 0.0}),
    ("cls_token", {"weight_decay": 0.0}),
    ("gamma", {"weight_decay": 0.0}),
]

sched = "step"
warmup_epochs = 10
warmup_ratio = 2e-06
steps = [700]
gamma = 0.1

epochs = 800
batch_per_gpu = 128
accum = 2
clip_grad = 5.0
amp = False

save_recon_every = 31300
recon_iters_per_epoch = 1252
