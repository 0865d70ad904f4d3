"""The U-Net that removes noise from latents, steered by text (arXiv:2112.10752 sections 3.2 and 3.3).

    sample                 noisy latent x_t (B, C, H, W)
    timestep               t, one for all or one each (B,)
    encoder_hidden_states  text (B, L, D)
    result                 eps or v, whatever the model was trained for (B, C, H, W)
Names and numbers are those of diffusers' UNet2DConditionModel as Stable Diffusion 1.x sets it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lessons.layers import Downsample, ResnetBlock, SpatialTransformer, Upsample, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """What varies among U-Nets of Stable Diffusion 1.x's kind; tuples have one entry a resolution, finest first.

    Names and defaults are diffusers', except ``heads``: the number of attention heads, one for all levels or one each,
    which diffusers calls ``attention_head_dim``. Levels of type ``CrossAttnDownBlock2D`` read the text, those of type
    ``DownBlock2D`` do not; the middle block always does.
    """

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    heads: int | tuple[int, ...] = 8
    norm_num_groups: int = 32
    cross_attention_dim: int = 1280

    @classmethod
    def sd15(cls) -> "UNetConfig":
        """Stable Diffusion 1.x: 859,520,964 parameters."""
        return cls(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)

    @classmethod
    def pocket(cls) -> "UNetConfig":
        """The course's own, for latents of 16x16."""
        return cls(
            sample_size=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            block_out_channels=(64, 128, 192), layers_per_block=1, heads=(2, 4, 6), norm_num_groups=16,
            cross_attention_dim=128,
        )  # fmt: skip

    def __post_init__(self):
        widths, groups = self.block_out_channels, self.norm_num_groups
        levels = len(widths)
        if len(self.attends) != levels or len(self.heads_per_level) != levels:
            raise ValueError(f"down_block_types and heads need one entry for each of the {levels} block_out_channels.")
        if unknown := set(self.down_block_types) - {"CrossAttnDownBlock2D", "DownBlock2D"}:
            raise ValueError(f"This U-Net has no {unknown.pop()}; use CrossAttnDownBlock2D or DownBlock2D.")
        if any(c % groups for c in widths):
            raise ValueError(f"Every width in {widths} must be a multiple of norm_num_groups, {groups}.")

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each level reads the text."""
        return tuple(name == "CrossAttnDownBlock2D" for name in self.down_block_types)

    @property
    def heads_per_level(self) -> tuple[int, ...]:
        """Number of attention heads at each level."""
        return (self.heads,) * len(self.block_out_channels) if isinstance(self.heads, int) else self.heads

    @property
    def downscale(self) -> int:
        """What a latent's height and width must be multiples of."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def skip_widths(self) -> list[int]:
        """The widths of what the way down leaves behind, first to last."""
        widths, n = self.block_out_channels, self.layers_per_block
        return [widths[0], *(c for c in widths[:-1] for _ in range(n + 1)), *[widths[-1]] * n]

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Read diffusers' ``config.json``; raises ValueError for a network that this class cannot be."""
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        own = {key: config[key] for key in cls.__dataclass_fields__ if key in config}
        result = cls(**own, heads=config.get("attention_head_dim", 8))
        for key, value in result.to_diffusers().items():
            if config.get(key, value) != value:
                raise ValueError(f"This U-Net has {key} = {value!r}, as in Stable Diffusion 1.x, not {config[key]!r}.")
        return result

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` from which diffusers builds the same network."""
        own = {("attention_head_dim" if key == "heads" else key): value for key, value in asdict(self).items()}
        up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(self.attends))
        return {"_class_name": "UNet2DConditionModel", **own, "up_block_types": up, **_FIXED}


# What diffusers' class could do otherwise and Stable Diffusion 1.x does not.
_FIXED = {"mid_block_type": "UNetMidBlock2DCrossAttn", "act_fn": "silu", "norm_eps": 1e-5, "center_input_sample": False}
_FIXED |= {"flip_sin_to_cos": True, "freq_shift": 0, "time_embedding_type": "positional", "time_cond_proj_dim": None}
_FIXED |= {"downsample_padding": 1, "mid_block_scale_factor": 1, "resnet_time_scale_shift": "default"}
_FIXED |= {"use_linear_projection": False, "only_cross_attention": False, "dual_cross_attention": False}
_FIXED |= {"transformer_layers_per_block": 1, "attention_type": "default", "num_attention_heads": None}
_FIXED |= {"class_embed_type": None, "num_class_embeds": None, "addition_embed_type": None, "encoder_hid_dim": None}


class TimeEmbedding(nn.Module):
    """Two linear layers that turn the sinusoids (B, C) into the time vector (B, 4C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Block(nn.Module):
    """What every level has: a resnet for each of ``widths_in``, and some of them followed by a transformer."""

    def __init__(self, config: UNetConfig, level: int, widths_in: Sequence[int], transformers: int):
        super().__init__()
        c, groups, time = config.block_out_channels[level], config.norm_num_groups, 4 * config.block_out_channels[0]
        heads, text = config.heads_per_level[level], config.cross_attention_dim
        self.resnets = nn.ModuleList(ResnetBlock(w, c, time, groups=groups) for w in widths_in)
        self.attentions = nn.ModuleList(
            SpatialTransformer(c, text, heads=heads, groups=groups) for _ in range(transformers)
        )


class DownBlock(Block):
    """(B, c_in, H, W) -> the list of what each layer made, for the way up to read again; the last goes on down."""

    def __init__(self, config: UNetConfig, level: int):
        c_in, c = (config.block_out_channels[i] for i in (max(level - 1, 0), level))
        n = config.layers_per_block
        super().__init__(config, level, [c_in] + [c] * (n - 1), transformers=n * config.attends[level])
        self.downsamplers = nn.ModuleList([Downsample(c)] if level < len(config.block_out_channels) - 1 else [])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        made = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            made.append(x)
        for downsample in self.downsamplers:
            made.append(downsample(x))  # (B, c, H/2, W/2)
        return made


class MidBlock(Block):
    """Resnet, transformer, resnet at the lowest resolution: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, config: UNetConfig):
        c = config.block_out_channels[-1]
        super().__init__(config, -1, [c, c], transformers=1)

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, temb), context)
        return self.resnets[1](x, temb)


class UpBlock(Block):
    """Each resnet reads one of ``skips``, newest first: (B, c_in, H, W) -> (B, c, 2H, 2W), at last (B, c, H, W)."""

    def __init__(self, config: UNetConfig, level: int, c_in: int, skip_widths: Sequence[int]):
        c, n = config.block_out_channels[level], len(skip_widths)
        widths = [a + b for a, b in zip([c_in] + [c] * (n - 1), skip_widths, strict=True)]
        super().__init__(config, level, widths, transformers=n * config.attends[level])
        self.upsamplers = nn.ModuleList([Upsample(c)] if level else [])

    def forward(self, x: Tensor, skips: Sequence[Tensor], temb: Tensor, context: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[i]], dim=1), temb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x)  # (B, c, 2H, 2W)
        return x


class UNet(nn.Module):
    """The denoiser (lessons 02 and 08 derive it). Every part is a module with tensors in and out: hooks can tap it.

    Latents may be any size whose height and width are multiples of ``config.downscale``.
    """

    config_class = UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, levels = config.block_out_channels, len(config.block_out_channels)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(levels))
        self.mid_block = MidBlock(config)
        skips, up = config.skip_widths, []
        for level in reversed(range(levels)):
            c_in = widths[min(level + 1, levels - 1)]
            up.append(UpBlock(config, level, c_in, [skips.pop() for _ in range(config.layers_per_block + 1)]))
        self.up_blocks = nn.ModuleList(up)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Predict eps or v, (B, C, H, W); raises ValueError where a shape does not fit the configuration.

        ``control`` is what a ControlNet answers: something to add to each skip, and at last to the middle.
        """
        check_inputs(self.config, sample, encoder_hidden_states)
        skips, temb = way_down(self, self.conv_in(sample), timestep, encoder_hidden_states)
        x = self.mid_block(skips[-1], temb, encoder_hidden_states)
        if control is not None:
            *down, middle = control
            skips, x = [skip + more for skip, more in zip(skips, down, strict=True)], x + middle
        for block in self.up_blocks:
            x = block(x, [skips.pop() for _ in block.resnets], temb, encoder_hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def way_down(net: nn.Module, x: Tensor, t: Tensor | float, text: Tensor) -> tuple[list[Tensor], Tensor]:
    """What a U-Net or a ControlNet leaves behind on its way down from x (B, c, H, W), and the time vector (B, E)."""
    t = torch.as_tensor(t, device=x.device).expand(x.shape[0])  # (B,)
    temb, skips = net.time_embedding(timestep_embedding(t, x.shape[1]).to(x.dtype)), [x]
    for block in net.down_blocks:
        skips += block(skips[-1], temb, text)
    return skips, temb


def check_inputs(config: UNetConfig, sample: Tensor, text: Tensor) -> None:
    """Raises ValueError where the latents or the text do not fit the configuration."""
    channels, f, width = config.in_channels, config.downscale, config.cross_attention_dim
    if sample.ndim != 4 or sample.shape[1] != channels:
        raise ValueError(f"The U-Net takes latents of shape (B, {channels}, H, W), but got {tuple(sample.shape)}.")
    h, w = sample.shape[2:]
    if h % f or w % f:
        raise ValueError(f"The latent is {h}x{w}, but height and width must be multiples of {f}.")
    if text.ndim != 3 or text.shape[::2] != (len(sample), width):
        shape = f"({len(sample)}, L, {width})"
        raise ValueError(f"The U-Net takes text of shape {shape} with these latents, but got {tuple(text.shape)}.")
