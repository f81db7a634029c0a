"""A fully convolutional head on a dilated ResNet-50; 4 GPUs make 16 images per update."""

method = "segmentation"
model = "fcn_resnet50"
drop_path = 0.0

input_size = 512

opt = "sgd"
lr = 0.01
momentum = 0.9
weight_decay = 5e-4
power = 0.9
min_lr = 1e-4
warmup_iters = 0

iters = 160000
eval_interval = 16000
batch_size = 4
