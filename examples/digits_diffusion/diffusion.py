"""A denoiser of 64-pixel images, its loss and its sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from digits_diffusion.digits import DEVIATION, PIXELS, quantize

Denoise = Callable[[Tensor, Tensor], Tensor]

# Training noise is log-normal; mean and deviation of ln σ as in EDM2 (arXiv 2312.02696).
LOG_SIGMA = (-0.4, 1.0)
SIGMA_MIN, SIGMA_MAX, RHO = 0.01, 10.0, 7.0
# Images lie in [-1, 1]. An estimate this far outside comes only from a network that is off its
# path, and would be carried further off at each step of the sampler.
GUARD = 1.5


class Block(nn.Module):
    """h + W silu(a(σ) ⊙ h + b(σ)), where a and b are linear in an embedding of the noise level."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(embedding, 2 * width)
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Apply the block to (n, width) and (n, embedding)."""
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        update: Tensor = self.linear(nn.functional.silu(hidden * (1 + scale) + shift))
        return hidden + update


class Denoiser(nn.Module):
    """The expected clean image of a noisy one.

        D(x; σ) = s²/(σ² + s²) x + σ s/√(σ² + s²) F(x/√(σ² + s²), ln σ)

    with s the pixels' standard deviation: whatever the noise, the network F is given inputs and
    asked for outputs of variance one.

    Args:
        width: hidden units; the network has about 73,000 parameters at the default.
        blocks: residual blocks.
        embedding: sines and cosines of ln σ.

    Reference:
        T. Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
        arXiv 2206.00364, equation 7 and table 1.
    """

    frequencies: Tensor

    def __init__(self, width: int = 136, blocks: int = 2, embedding: int = 32) -> None:
        super().__init__()
        self.register_buffer(
            "frequencies", torch.linspace(0, math.log(30), embedding // 2).exp() / 4
        )
        self.first = nn.Linear(PIXELS, width)
        self.blocks = nn.ModuleList(Block(width, embedding) for _ in range(blocks))
        self.last = nn.Linear(width, PIXELS)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Denoise.

        Args:
            noisy: (n, 64) images with noise.
            sigma: (n,) standard deviations of the noise.

        Returns:
            (n, 64) expected clean images.
        """
        angles = sigma.log()[:, None] * self.frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        sigma = sigma[:, None]
        total = (sigma.square() + DEVIATION**2).sqrt()
        hidden = self.first(noisy / total)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        network: Tensor = self.last(nn.functional.silu(hidden))
        return (DEVIATION / total) ** 2 * noisy + sigma * DEVIATION / total * network


def denoising_loss(denoise: Denoise, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the weighted squared error of a denoiser at random noise levels.

        E (σ² + s²)/(σ s)² (D(y + σ n; σ) − y)²,   ln σ ~ N(-0.4, 1),   n ~ N(0, I)

    Args:
        denoise: D.
        images: (n, 64) clean images.
        generator: source of the noise.

    Reference:
        arXiv 2206.00364, equation 8 and table 1; J. Ho et al., "Denoising Diffusion Probabilistic
        Models", arXiv 2006.11239, for the objective that it rescales.
    """
    mean, deviation = LOG_SIGMA
    sigma = (mean + deviation * torch.randn(len(images), generator=generator)).exp()
    noise = torch.randn(images.shape, generator=generator)
    error = denoise(images + sigma[:, None] * noise, sigma) - images
    weight = (sigma.square() + DEVIATION**2) / (sigma * DEVIATION).square()
    return (weight[:, None] * error.square()).mean()


def noise_levels(steps: int) -> Tensor:
    """Return the sampler's noise levels, from the largest to zero.

        σ_i = (σ_max^(1/ρ) + i/(steps − 1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ

    Args:
        steps: of the sampler; at least 2.

    Returns:
        (steps + 1,) float32, the last of them 0.

    Reference:
        arXiv 2206.00364, equation 5.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    first, last = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return torch.cat([(first + ramp * (last - first)) ** RHO, torch.zeros(1)]).float()


@torch.no_grad()
def sample(denoise: Denoise, noise: Tensor, steps: int) -> Tensor:
    """Turn noise into images along dx/dσ = (x − D(x; σ))/σ, by Heun's method.

    Args:
        denoise: D.
        noise: (n, 64), standard normal. The same noise gives the same images.
        steps: of the sampler, each of two evaluations but the last.

    Returns:
        (n, 64) images in [-1, 1], in the 17 levels of the data.

    Reference:
        arXiv 2206.00364, algorithm 1 with no noise added on the way.
    """

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        clean = denoise(x, sigma.expand(len(x))).clamp(-GUARD, GUARD)
        return (x - clean) / sigma

    levels = noise_levels(steps)
    x = noise * levels[0]
    for now, then in pairwise(levels):
        here = slope(x, now)
        euler = x + (then - now) * here
        x = euler if then == 0 else x + (then - now) * (here + slope(euler, then)) / 2
    return quantize(x)
