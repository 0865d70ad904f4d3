"""The blocks that Stable Diffusion's networks are made of.

Module and parameter names follow diffusers, so that released weights load without renaming.
Shapes: pictures and latents (B, C, H, W); tokens (B, N, C) with N = H * W; text (B, L, D); time vector (B, E).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of the time step, cosine half first (arXiv:1706.03762 section 3.5, arXiv:2006.11239 appendix B).

    ``t`` (B,) integer or real, ``dim`` even; returns (B, dim) float32 in [-1, 1].
    """
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t.float()[:, None] * exponent.exp()[None]  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, dim)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions round a shortcut; the time vector is added between them (arXiv:2006.11239 appendix B).

    ``x`` (B, c_in, H, W), ``temb`` (B, time_channels) or None -> (B, c_out, H, W).
    ``eps`` is 1e-5 in Stable Diffusion's U-Net and 1e-6 in its VAE, whose blocks have no time vector.
    """

    def __init__(self, c_in: int, c_out: int, time_channels: int | None = None, *, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, c_out) if time_channels else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves height and width by a convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2).

    The U-Net pads one pixel on every side; the VAE pads only right and below (``right_and_below=True``).
    """

    def __init__(self, channels: int, *, right_and_below: bool = False):
        super().__init__()
        self.right_and_below = right_and_below
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if right_and_below else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.right_and_below else x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution. (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762 eq. (1)): each token of ``x`` reads from the tokens of ``context``.

    ``x`` (B, N, C), ``context`` (B, L, D) -> (B, N, C). Without ``context``, ``x`` reads from itself.
    """

    def __init__(self, channels: int, context_channels: int | None = None, *, heads: int = 8, bias: bool = False):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared among {heads} heads; choose a divisor of it.")
        context_channels = context_channels or channels
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, heads, N, C/heads)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(context)), self._split(self.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C/heads)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, N, C)

    def probabilities(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Where each token looks: (B, heads, N, L), rows that sum to 1. Only to look at; ``forward`` never forms it."""
        q, k = self._split(self.to_q(x)), self._split(self.to_k(x if context is None else context))
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other (arXiv:2002.05202): (B, N, c_in) -> (B, N, c_out)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Widen four times through a GEGLU, then come back: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int):
        super().__init__()
        # The identity holds the place of diffusers' dropout, so that the last layer is number 2.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each is added to what comes in."""

    def __init__(self, channels: int, context_channels: int, *, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads=heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads=heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a latent (arXiv:2112.10752 section 3.3 and appendix E.2.1).

    ``x`` (B, C, H, W), ``context`` (B, L, D) -> (B, C, H, W).
    """

    def __init__(self, channels: int, context_channels: int, *, heads: int, groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_channels, heads=heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        h = self.proj_in(self.norm(x))
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C): only a view when memory is channels_last
        for block in self.transformer_blocks:
            h = block(h, context)
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.proj_out(h)
