"""Classifier-free guidance (arXiv:2207.12598): one network call gives the output with and without the prompt.

out = uncond + guidance_scale (cond - uncond), with guidance_scale = 1 + w of the paper's eq. (6): 1 is the network's
own answer, 0 ignores the prompt, and more than 1 exaggerates what the prompt changes. A negative prompt's text in place
of the empty one steers away from it. Derived in lesson 08.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def guided(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, t: Tensor | int, cond: Tensor,
    uncond: Tensor | None = None, guidance_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """The guided output (B, C, H, W) at x (B, C, H, W) and t, () or (B,), for texts cond and uncond (B, L, D).

    Calls `unet(x, t, text)` once, with a batch of 2 B; of B when there is nothing to guide (scale 1, or no uncond).
    Raises ValueError where the texts' shapes differ.
    """
    if uncond is None or guidance_scale == 1:
        return unet(x, t, cond)
    if uncond.shape != cond.shape:
        raise ValueError(f"cond {tuple(cond.shape)} and uncond {tuple(uncond.shape)} must have the same shape.")
    if isinstance(t, Tensor) and t.ndim == 1 and len(t) == len(x) > 1:
        t = torch.cat([t, t])  # (2B,)
    without, with_text = unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).chunk(2)
    return without + guidance_scale * (with_text - without)
