"""ControlNet: a copy of the U-Net's way down that reads a picture and adds to the U-Net's skips (arXiv:2302.05543).

    sample, timestep, encoder_hidden_states  as the U-Net's
    picture  what to follow, as large as the picture to be made (B, 3, 8H, 8W), in [0, 1]
    result   one tensor for each skip of the U-Net, and one for its middle: its argument ``control``
Names and numbers are those of diffusers' ControlNetModel as Stable Diffusion 1.x sets it. Derived in lesson 10.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lessons.unet import DownBlock, MidBlock, TimeEmbedding, UNet, UNetConfig, check_inputs, way_down

SHARED = ("conv_in", "time_embedding", "down_blocks", "mid_block")  # what it begins with is the U-Net's
_UNET_ALONE = ("sample_size", "out_channels", "up_block_types", "center_input_sample", "time_embedding_type")
_UNET_ALONE += ("time_cond_proj_dim", "dual_cross_attention", "attention_type")


@dataclass(frozen=True)
class ControlNetConfig:
    """The U-Net that it steers, the picture's channels, and the widths on the way from picture to latent size."""

    unet: UNetConfig = field(default_factory=UNetConfig.sd15)
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "ControlNetConfig":
        """Read diffusers' ``config.json``; raises ValueError for a network that this class cannot be."""
        unet = UNetConfig.from_diffusers({k: v for k, v in config.items() if k != "_class_name"})
        own = {k: config[k] for k in cls.__dataclass_fields__ if k in config}
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
        for key, value in (("controlnet_conditioning_channel_order", "rgb"), ("global_pool_conditions", False)):
            if config.get(key, value) != value:
                raise ValueError(f"This ControlNet has {key} = {value!r}, not {config[key]!r}.")
        return cls(unet, **own)

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` from which diffusers builds the same network."""
        shared = {k: v for k, v in self.unet.to_diffusers().items() if k not in _UNET_ALONE}
        own = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "unet"}
        return shared | own | {"_class_name": "ControlNetModel"}


class PictureEmbedding(nn.Module):
    """The picture at latent size: (B, 3, 8H, 8W) -> (B, c, H, W); the last convolution starts at zero."""

    def __init__(self, channels: int, widths: tuple[int, ...], c: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for w, w_next in zip(widths, widths[1:], strict=False):
            self.blocks += [nn.Conv2d(w, w, 3, padding=1), nn.Conv2d(w, w_next, 3, padding=1, stride=2)]
        self.conv_out = _zero(nn.Conv2d(widths[-1], c, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(nn.Module):
    """The way down, with a zero convolution behind each of its results: at first it changes nothing."""

    config_class = ControlNetConfig

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        self.config, unet = config, config.unet
        widths, levels = unet.block_out_channels, len(unet.block_out_channels)
        self.conv_in = nn.Conv2d(unet.in_channels, widths[0], 3, padding=1)
        self.controlnet_cond_embedding = PictureEmbedding(
            config.conditioning_channels, config.conditioning_embedding_out_channels, widths[0]
        )
        self.time_embedding = TimeEmbedding(widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(unet, level) for level in range(levels))
        self.mid_block = MidBlock(unet)
        self.controlnet_down_blocks = nn.ModuleList(_zero(nn.Conv2d(c, c, 1)) for c in unet.skip_widths)
        self.controlnet_mid_block = _zero(nn.Conv2d(widths[-1], widths[-1], 1))

    @classmethod
    def from_unet(cls, unet: UNet, **options: Any) -> "ControlNet":
        """A ControlNet for ``unet`` that begins with its weights. ``options`` are `ControlNetConfig`'s."""
        made = cls(ControlNetConfig(replace(unet.config, sample_size=None), **options)).to(unet.conv_in.weight)
        for part in SHARED:
            getattr(made, part).load_state_dict(getattr(unet, part).state_dict())
        return made

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, picture: Tensor,
        scale: float = 1.0,
    ) -> list[Tensor]:  # fmt: skip
        """What the U-Net takes as ``control``, times ``scale``. Raises ValueError where a shape does not fit."""
        check_inputs(self.config.unet, sample, encoder_hidden_states)
        f = 2 ** (len(self.controlnet_cond_embedding.blocks) // 2)
        wanted = (len(sample), self.config.conditioning_channels, f * sample.shape[2], f * sample.shape[3])
        if tuple(picture.shape) != wanted:
            raise ValueError(f"The ControlNet takes a picture of shape {wanted}, but got {tuple(picture.shape)}.")
        x = self.conv_in(sample) + self.controlnet_cond_embedding(picture)
        skips, temb = way_down(self, x, timestep, encoder_hidden_states)
        middle = self.mid_block(skips[-1], temb, encoder_hidden_states)
        made = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [scale * x for x in (*made, self.controlnet_mid_block(middle))]

    def on(self, picture: Tensor, scale: float = 1.0) -> Callable[[Tensor, Tensor, Tensor], list[Tensor]]:
        """What `generate.text_to_image` takes as ``control``: the answers for ``picture`` (1 or B, 3, H, W)."""
        return lambda x, t, text: self(x, t, text, picture.repeat(len(x) // len(picture), 1, 1, 1), scale)


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
