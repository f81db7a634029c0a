"""Fine-tuning of resnet101, 300 epochs; 8 GPUs make 2048 images per update."""

method = "finetune"
backbone = "resnet101"
drop_path = 0.1

aug = "rsb"
train_size = 224
ra_level = 7
val_resize = 236
val_crop = 224
repeated_aug = True
bce = True
smoothing = 0.0
mixup = 0.1
cutmix = 1.0

opt = "lamb"
lr = 0.005
weight_decay = 0.02
paramwise = [
    ("(bn|gn)(\\d+)?.(weight|bias)", {"weight_decay": 0.0}),
    ("bias", {"weight_decay": 0.0}),
]

sched = "CosineAnnealing"
min_lr = 1e-06
warmup_epochs = 5
warmup_ratio = 1e-05
by_epoch = True

epochs = 300
batch_per_gpu = 256
accum = 1
clip_grad = None
amp = True
sync_bn = True
