"""Modes of ``generate``: what is refused, self-speculation, rows of different depth, contrast, diffusion."""
