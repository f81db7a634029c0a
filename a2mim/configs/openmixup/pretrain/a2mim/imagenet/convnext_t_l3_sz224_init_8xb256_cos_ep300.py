"""A2MIM pre-training of convnext_tiny, 300 epochs; 8 GPUs make 2048 images per update."""

method = "a2mim"
backbone = "convnext_tiny"
input_size = 224
drop_path = 0.0
mask_layer = 3
mask_token = "learnable"
mask_init = 1e-06
mask_replace = False

mask_patch_size = 32
model_patch_size = 32
mask_ratio = 0.6
mask_color = "mean"
crop_scale = [0.8, 1.0]

loss = "focal_l1"
focal_alpha = 0.2
focal_gamma = 1.0
unmask_weight = 0.0
fft_weight = 0.0
fft_focal = False
fft_unmask_weight = 0.0
fft_unmask_replace = "mixed"
fft_reweight = False

opt = "adamw"
lr = 0.0012
weight_decay = 0.05
betas = [0.9, 0.999]
eps = 1e-08
paramwise = [
    ("(bn|ln|gn)(\\d+)?.(weight|bias)", {"weight_decay": 0.0}),
    ("bias", {"weight_decay": 0.0}),
    ("gamma", {"weight_decay": 0.0}),
    ("mask_token", {"weight_decay": 0.0, "lr_mult": 0.1}),
    ("mask_gamma", {"weight_decay": 0.0, "lr_mult": 0.1}),
]

sched = "StepFixCosineAnnealing"
min_lr = 1e-05
warmup_epochs = 10
warmup_ratio = 1e-06

epochs = 300
batch_per_gpu = 256
accum = 1
clip_grad = None
amp = True

save_recon_every = 15650
recon_iters_per_epoch = 626
