"""UPerNet on ViT-B, crops of 512 px; 8 GPUs make 16 images per update."""

method = "segmentation"
model = "upernet_vit_base"
layer_scale_init_value = 0.1
drop_path = 0.1

input_size = 512

opt = "adamw"
lr = 4e-4
layer_decay = 0.65
weight_decay = 0.05
power = 1.0
min_lr = 0.0
warmup_iters = 1500

iters = 160000
eval_interval = 16000
batch_size = 2
amp_dtype = "fp32"
