"""Fine-tuning of vit_small, 200 epochs; 8 GPUs make 1024 images per update."""

method = "finetune"
backbone = "vit_small"
patch_size = 16
drop_path = 0.1

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
lr = 0.01
weight_decay = 0.05
betas = [0.9, 0.999]
eps = 1e-08
paramwise = [
    ("(bn|ln|gn)(\\d+)?.(weight|bias)", {"weight_decay": 0.0}),
    ("norm", {"weight_decay": 0.0}),
    ("bias", {"weight_decay": 0.0}),
    ("cls_token", {"weight_decay": 0.0}),
    ("pos_embed", {"weight_decay": 0.0}),
    ("gamma", {"weight_decay": 0.0}),
]
layer_decay = 0.65

sched = "StepFixCosineAnnealing"
min_lr = 1e-06
warmup_epochs = 20
warmup_ratio = 1e-06

epochs = 200
batch_per_gpu = 128
accum = 1
clip_grad = 5.0
amp = True
