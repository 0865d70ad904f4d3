"""The first stage: a variational autoencoder between pictures and latents (arXiv:2112.10752 section 3.1).

    x  picture (B, 3, H, W) in [-1, 1]
    z  latent  (B, c, H/f, W/f), as the encoder gives it; the U-Net sees z * config.scaling_factor
Names and numbers are those of diffusers' AutoencoderKL.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lessons.layers import Attention, Downsample, ResnetBlock, Upsample

_EPS = 1e-6  # of every group norm in the VAE; the U-Net's resnets have 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """What varies among Stable Diffusion's autoencoders; names and defaults are diffusers'."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215

    @classmethod
    def sd15(cls) -> "VAEConfig":
        """Stable Diffusion 1.x: f = 8, 83,653,863 parameters."""
        return cls(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)

    @classmethod
    def pocket(cls) -> "VAEConfig":
        """The course's own: f = 8, for pictures of 128x128."""
        return cls(block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=4, sample_size=128)

    def __post_init__(self):
        widths, groups = self.block_out_channels, self.norm_num_groups
        if any(c % groups for c in widths):
            raise ValueError(f"Every width in {widths} must be a multiple of norm_num_groups, {groups}.")

    @property
    def downscale(self) -> int:
        """How many times smaller than the picture the latent is along each side (f in the paper)."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Read diffusers' ``config.json``; raises ValueError for an autoencoder that this class cannot be."""
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        result = cls(**{key: config[key] for key in cls.__dataclass_fields__ if key in config})
        for key, value in result.to_diffusers().items():
            if config.get(key, value) != value:
                raise ValueError(f"This VAE has {key} = {value!r}, as in Stable Diffusion 1.x, not {config[key]!r}.")
        return result

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` from which diffusers builds the same autoencoder."""
        levels = len(self.block_out_channels)
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
        return {"_class_name": "AutoencoderKL", **asdict(self), **kinds, **_FIXED}


# What diffusers' class could do otherwise and Stable Diffusion 1.x does not.
_FIXED = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
_FIXED |= {"shift_factor": None, "latents_mean": None, "latents_std": None}


class Gaussian:
    """The encoder's answer: a normal distribution with its own mean and variance at every latent number.

    ``mean`` and ``logvar`` (B, c, h, w); ``logvar`` is clamped to [-30, 20].
    """

    def __init__(self, mean: Tensor, logvar: Tensor):
        self.mean, self.logvar = mean, logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw z = mean + std * noise, (B, c, h, w), differentiable in both (arXiv:1312.6114 eq. (10))."""
        device = self.mean.device if generator is None else generator.device  # a CPU seed is the same everywhere
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean: (B, c, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over each latent: (B,) (arXiv:1312.6114 appendix B)."""
        wide = torch.promote_types(self.mean.dtype, torch.float32)  # a sum of thousands is too much for half precision
        mean, logvar = self.mean.to(wide), self.logvar.to(wide)
        return 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


class AttentionBlock(Attention):
    """Self-attention with one head over all positions of a picture-shaped tensor: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C)
        return x + super().forward(tokens).unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)  # (B, C, H, W)


class Stage(nn.Module):
    """Resnets at one resolution, then a change of resolution, or none."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, *, down: bool = False, up: bool = False):
        super().__init__()
        widths = [c_in] + [c_out] * layers
        self.resnets = nn.ModuleList(
            ResnetBlock(a, b, groups=groups, eps=_EPS) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.downsamplers = nn.ModuleList([Downsample(c_out, right_and_below=True)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Middle(nn.Module):
    """Resnet, attention, resnet at the lowest resolution: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Picture (B, 3, H, W) -> mean and log variance, one above the other (B, 2c, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], c, config.layers_per_block, groups, down=i < last)
            for i, c in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Decoder(nn.Module):
    """Latent (B, c, h, w) -> picture (B, 3, f*h, f*w); one resnet more a stage than the encoder has."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], c, config.layers_per_block + 1, groups, up=i < last)
            for i, c in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class VAE(nn.Module):
    """Encoder and decoder with the two 1x1 convolutions between them (lesson 04 derives it).

    Heights and widths may be any multiples of ``config.downscale``.
    """

    config_class = VAEConfig

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x: Tensor) -> Gaussian:
        """Pictures (B, 3, H, W) in [-1, 1] -> a ``Gaussian`` over latents (B, c, H/f, W/f).

        Raises ValueError for a wrong number of channels or sides that are no multiples of f.
        """
        channels, f = self.config.in_channels, self.config.downscale
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"The VAE encodes pictures of shape (B, {channels}, H, W), but got {tuple(x.shape)}.")
        if x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"The picture is {x.shape[2]}x{x.shape[3]} pixels, but height and width must be multiples of {f}."
            )
        return Gaussian(*self.quant_conv(self.encoder(x)).chunk(2, dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, c, h, w), already divided by the scaling factor -> pictures (B, 3, f*h, f*w), about [-1, 1].

        Raises ValueError for a wrong number of channels.
        """
        channels = self.config.latent_channels
        if z.ndim != 4 or z.shape[1] != channels:
            raise ValueError(f"The VAE decodes latents of shape (B, {channels}, h, w), but got {tuple(z.shape)}.")
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Gaussian]:
        """A training pass: pictures -> (pictures rebuilt from a sampled latent, the distribution it came from)."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator)), posterior
