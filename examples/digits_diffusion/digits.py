"""The data: 1,797 handwritten digits of 8 by 8 pixels that scikit-learn brings along."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 8
PIXELS = SIDE * SIDE
LEVELS = 16
# Of the pixels in [-1, 1], over all images.
DEVIATION = 0.75


@dataclass(frozen=True)
class Digits:
    """The images in two halves, chosen at random but the same at every call.

    Attributes:
        train: (898, 64) float32 in [-1, 1]; the denoiser and the classifier learn from them.
        train_labels: (898,) int64, the digits 0 to 9.
        held_out: (899, 64); what samples are compared with. Nothing learns from them.
        held_out_labels: (899,) int64.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def load() -> Digits:
    """Load the digits and split them.

    Reference:
        E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32) / (LEVELS / 2) - 1
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    return Digits(images[first], labels[first], images[second], labels[second])


def quantize(images: Tensor) -> Tensor:
    """Round pixels in [-1, 1] to the 17 levels that the data has.

    A sampler stops at a little noise, by which alone a comparison of statistics could tell its
    images from scanned ones.
    """
    return ((images + 1) * (LEVELS / 2)).round().clamp(0, LEVELS) / (LEVELS / 2) - 1
