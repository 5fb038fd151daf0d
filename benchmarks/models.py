"""The models whose averages are timed: shapes from plain torch layers, never called.

Only tensors, their sizes and the modules that they stand in matter to an average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Shape", "build", "elements", "many"]


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut, as in ResNet-50.

    Args:
        inputs: channels in.
        width: channels of the inner convolution; four times as many leave the block.
        first: whether the shortcut needs a convolution of its own.
    """

    def __init__(self, inputs: int, width: int, first: bool) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if first:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )


def resnet50() -> nn.Module:
    """Return ResNet-50's layers: 161 parameters, 25,557,032 elements, and BatchNorm's buffers."""
    stages = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    model = nn.Sequential(*stages, nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        blocks = []
        for i in range(depth):
            blocks.append(Bottleneck(inputs, width, first=i == 0))
            inputs = 4 * width
        model.append(nn.Sequential(*blocks))
    return model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Linear(inputs, 1000))


class EncoderBlock(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm, as in ViT-B/16."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(768)
        self.attention = nn.MultiheadAttention(768, 12, batch_first=True)
        self.ln_2 = nn.LayerNorm(768)
        self.mlp = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))


class VisionTransformer(nn.Module):
    """ViT-B/16's layers for images of 224²: 152 parameters, 86,567,656 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.class_token = nn.Parameter(torch.empty(1, 1, 768))
        self.positions = nn.Parameter(torch.empty(1, 197, 768))
        self.layers = nn.Sequential(*(EncoderBlock() for _ in range(12)))
        self.norm = nn.LayerNorm(768)
        self.head = nn.Linear(768, 1000)


def many(tensors: int, inputs: int, outputs: int) -> nn.Module:
    """Return as many layers of one tensor each: no two tensors share a module."""
    return nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for _ in range(tensors)))


@dataclass(frozen=True)
class Shape:
    """A model of the benchmark."""

    title: str
    make: Callable[[], nn.Module]
    parameters: int
    """Parameter tensors that it must have."""
    weights: int
    """Elements that these must have."""
    memory: bool = False
    """Whether peak memory is measured: where it is far above what Python itself takes."""


MODELS = {
    "resnet50": Shape("ResNet-50", resnet50, 161, 25_557_032, memory=True),
    "vit_b_16": Shape("ViT-B/16", VisionTransformer, 152, 86_567_656, memory=True),
    "24x4m": Shape("24 × 4M", lambda: many(24, 2000, 2000), 24, 96_000_000),
    "1000x1k": Shape("1,000 × 1k", lambda: many(1000, 40, 25), 1000, 1_000_000),
}


def build(
    make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, constant: bool = False
) -> nn.Module:
    """Build a model in one dtype on one device, without a second copy of it at any time.

    Args:
        make: returns the layers.
        dtype: of all floating-point tensors.
        device: of all tensors.
        constant: whether all weights are one number, which is faster to write.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = make()
    finally:
        torch.set_default_dtype(before)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            _ = parameter.fill_(0.02) if constant else parameter.uniform_(-0.1, 0.1)
        for buffer in model.buffers():
            buffer.fill_(1)
    return model


def elements(model: nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def flat(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the yardstick's two tensors: as many float32 elements in one piece each."""
    target = torch.empty(count, device=device).uniform_(-0.1, 0.1)
    return target, torch.empty(count, device=device).uniform_(-0.1, 0.1)
