"""DemoFusion: high-resolution images from any latent diffusion model, without training (arXiv 2311.16973)."""

__version__ = "0.11.0"
