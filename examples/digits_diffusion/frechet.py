"""How far a set of images is from another: the Fréchet distance of a classifier's features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from digits_diffusion.digits import PIXELS, Digits

FEATURES = 64


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian fitted to a set of feature vectors.

    Attributes:
        mean: (d,) float64.
        covariance: (d, d) float64.
    """

    mean: Tensor
    covariance: Tensor


def fit(features: Tensor) -> Gaussian:
    """Fit a Gaussian to feature vectors.

    Args:
        features: (n, d), n at least 2.

    Raises:
        ValueError: a feature is not finite.
    """
    if not features.isfinite().all():
        raise ValueError("the features hold values that are not finite")
    exact = features.to(torch.float64)
    covariance = torch.cov(exact.T).reshape(exact.shape[1], exact.shape[1])
    return Gaussian(exact.mean(dim=0), covariance)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Fréchet distance between two Gaussians.

        d² = |μ₁ − μ₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½)

    The trace of (C₁ C₂)^½ is that of (C₁^½ C₂ C₁^½)^½, whose eigenvalues are real and not
    negative. Estimated from n images the distance is too large, by an amount that falls as 1/n:
    distances compare only at the same n.

    Reference:
        M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium", arXiv 1706.08500, equation 6.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    means = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return float(means + traces - 2 * cross)


@dataclass(frozen=True)
class Metric:
    """A trained classifier's features, and the held-out images as it sees them.

    Attributes:
        features: maps (n, 64) images to (n, 64) features.
        held_out: the Gaussian of the held-out images' features.
        floor: the distance of the training images from the held-out ones: what a generator that
            returned its training set would score. Beside samples more numerous than these images
            it is a little too large.
        accuracy: the classifier's share of held-out images named right.
    """

    features: nn.Module
    held_out: Gaussian
    floor: float
    accuracy: float

    def distance(self, images: Tensor) -> float:
        """The Fréchet distance of (n, 64) images from the held-out ones."""
        with torch.no_grad():
            return frechet_distance(fit(self.features(images)), self.held_out)


def train_metric(digits: Digits, steps: int, batch_size: int = 64, noise: float = 0.1) -> Metric:
    """Train the classifier, the same at every call, and measure the real images with it.

    Args:
        digits: the images.
        steps: of Adam.
        batch_size: images per step.
        noise: standard deviation of what is added to the pixels, so that the features stay smooth
            around the images.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = nn.Sequential(
            nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU()
        )
        head = nn.Linear(FEATURES, 10)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(len(digits.train), (batch_size,), generator=generator)
        images = digits.train[chosen]
        images = images + noise * torch.randn(images.shape, generator=generator)
        loss = nn.functional.cross_entropy(head(features(images)), digits.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    features.requires_grad_(False)
    with torch.no_grad():
        named = head(features(digits.held_out)).argmax(dim=1)
        held_out = fit(features(digits.held_out))
        floor = frechet_distance(fit(features(digits.train)), held_out)
    accuracy = float((named == digits.held_out_labels).double().mean())
    return Metric(features, held_out, floor, accuracy)
