"""Semantic-first diffusion: a semantic latent is denoised slightly ahead of a texture latent (arXiv 2512.04926)."""

__version__ = "0.1.0"
