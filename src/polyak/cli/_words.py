"""What options can be given, so that help and completion load no reader of files.

The package itself imports torch all the same. A test holds these to the layouts' own names.
"""

LAYOUTS = (
    "torch",
    "mmengine",
    "averaged-model",
    "mmengine-checkpoint",
    "mmagic",
    "openmmlab-1",
    "timm",
    "timm-checkpoint",
    "ema-pytorch",
    "posthoc-ema",
    "posthoc-ema-file",
    "torch-ema",
    "diffusers",
    "diffusers-pretrained",
    "lightning",
    "nemo",
    "composer",
    "edm2",
    "d2go",
    "weight-average",
    "plain",
)
WRITABLE = (
    "torch",
    "mmengine",
    "averaged-model",
    "mmengine-checkpoint",
    "timm",
    "timm-checkpoint",
    "ema-pytorch",
    "torch-ema",
    "diffusers",
    "diffusers-pretrained",
    "lightning",
    "plain",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
