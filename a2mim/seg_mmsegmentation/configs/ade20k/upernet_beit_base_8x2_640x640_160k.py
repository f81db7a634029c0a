"""UPerNet on ViT-B, crops of 640 px; 8 GPUs make 16 images per update."""

method = "segmentation"
model = "upernet_vit_base"
layer_scale_init_value = 0.1
drop_path = 0.1

input_size = 640
scale = [2560, 640]

opt = "adamw"
lr = 3e-5
layer_decay = 0.9
weight_decay = 0.05
power = 1.0
min_lr = 0.0
warmup_iters = 1500

iters = 160000
eval_interval = 16000
batch_size = 2
amp_dtype = "fp32"
