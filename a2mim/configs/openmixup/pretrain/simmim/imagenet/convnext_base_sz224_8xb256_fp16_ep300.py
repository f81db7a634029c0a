"""SimMIM pre-training of convnext_base, 300 epochs; 8 GPUs make 2048 images per update."""

method = "simmim"
backbone = "convnext_base"
input_size = 224
drop_path = 0.0
mask_layer = 0
mask_token = "learnable"
mask_init = 0.0
mask_replace = False

mask_patch_size = 32
model_patch_size = 4
mask_ratio = 0.6
mask_color = "zero"
crop_scale = [0.67, 1.0]

opt = "adamw"
lr = 0.0008
weight_decay = 0.05
betas = [0.9, 0.999]
eps = 1e-08
paramwise = [
    ("(bn|ln|gn)(\\d+)?.(weight|bias)", {"weight_decay": 0.0}),
    ("bias", {"weight_decay": 0.0}),
    ("gamma", {"weight_decay": 0.0}),
    ("mask_token", {"weight_decay": 0.0}),
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
