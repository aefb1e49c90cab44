"""Masked diffusion on transformed decoders: the training loss and the sampler."""

from depthpass.diffusion.loss import diffusion_loss
from depthpass.diffusion.sampler import Denoised, denoise

__all__ = ["Denoised", "denoise", "diffusion_loss"]
