"""Fine-tuning of convnext_small, 300 epochs; 8 GPUs make 4096 images per update."""

method = "finetune"
backbone = "convnext_small"
drop_path = 0.4

aug = "swin"
train_size = 224
val_resize = 256
val_crop = 224
repeated_aug = False
bce = False
smoothing = 0.1
mixup = 0.8
cutmix = 1.0

opt = "adamw"
lr = 0.004
weight_decay = 0.05
betas = [0.9, 0.999]
eps = 1e-08
paramwise = [
    ("(bn|ln|gn)(\\d+)?.(weight|bias)", {"weight_decay": 0.0}),
    ("norm", {"weight_decay": 0.0}),
    ("bias", {"weight_decay": 0.0}),
    ("gamma", {"weight_decay": 0.0}),
]

sched = "CosineAnnealing"
min_lr = 1e-06
warmup_epochs = 5
warmup_ratio = 1e-05
by_epoch = False

epochs = 300
batch_per_gpu = 256
accum = 2
clip_grad = None
amp = True

ema = 0.9999
ema_warmup_iters = 12520
ema_update_interval = 2
