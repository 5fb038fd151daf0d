"""A small diffusion model of handwritten digits, averaged three ways while it trains."""
