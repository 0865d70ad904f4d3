"""Latent diffusion, lesson by lesson: Stable Diffusion from scratch, in PyTorch."""
