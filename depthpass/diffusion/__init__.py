"""Diffusion on transformed decoders: training losses and samplers of masked and of coevolutionary diffusion."""

from depthpass.diffusion.coevolution import CoevolutionaryDiffusion
from depthpass.diffusion.loss import diffusion_loss
from depthpass.diffusion.sampler import Denoised, denoise

__all__ = ["CoevolutionaryDiffusion", "Denoised", "denoise", "diffusion_loss"]
