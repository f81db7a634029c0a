"""A2MIM pre-training of vit_small, 800 epochs; 8 GPUs make 2048 images per update."""

method = "a2mim"
backbone = "vit_small"
input_size = 224
patch_size = 16
drop_path = 0.1
mask_layer = 0
mask_token = "learnable"
mask_init = 0.0
mask_replace = False

mask_patch_size = 32
model_patch_size = 16
mask_ratio = 0.6
mask_color = "mean"
crop_scale = [0.67, 1.0]

loss = "l1"
unmask_weight = 0.0
fft_weight = 0.1
fft_focal = True
fft_unmask_weight = 0.0
fft_unmask_replace = "mixed"
fft_reweight = False

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
batch_per_gpu = 256
accum = 1
clip_grad = 5.0
amp = False

save_recon_every = 15650
recon_iters_per_epoch = 626
