"""Fine-tuning of resnet50, 100 epochs; 8 GPUs make 2048 images per update."""

method = "finetune"
backbone = "resnet50"
drop_path = 0.0

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
lr = 0.005
weight_decay = 0.05
betas = [0.9, 0.999]
eps = 1e-08
paramwise = [
    ("(bn|ln|gn)(\\d+)?.(weight|bias)", {"weight_decay": 0.0}),
    ("bias", {"weight_decay": 0.0}),
]

sched = "CosineAnnealing"
min_lr = 1e-06
warmup_epochs = 20
warmup_ratio = 0.0002
by_epoch = False

epochs = 100
batch_per_gpu = 128
accum = 2
clip_grad = None
amp = True
sync_bn = False
