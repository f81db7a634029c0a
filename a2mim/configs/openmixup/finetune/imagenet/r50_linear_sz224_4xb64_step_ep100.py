"""Linear probe of resnet50, 100 epochs; 4 GPUs make 256 images per update."""

method = "linear"
backbone = "resnet50"
drop_path = 0.0

aug = "plain"
train_size = 224
val_resize = 256
val_crop = 224
repeated_aug = False
bce = False
smoothing = 0.0
mixup = 0.0
cutmix = 0.0

opt = "sgd"
lr = 30.0
weight_decay = 0.0
momentum = 0.9
paramwise = []

sched = "step"
warmup_epochs = 0
steps = [60, 80]
gamma = 0.1

epochs = 100
batch_per_gpu = 64
accum = 1
clip_grad = None
amp = False
sync_bn = False
