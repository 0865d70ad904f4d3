"""CLIP's picture half, and both halves together (arXiv:2103.00020).

    input_ids     token numbers (B, L), L at most 77
    pixel_values  pictures (B, 3, H, W), normalised as the model was trained
    hidden        (B, 1 + patches, D)
Names and numbers are those of transformers 5: CLIPVisionModel, CLIPModel.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lessons.text import TextConfig, TextEncoder, Transformer, TransformerConfig


@dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    """A ``CLIPVisionModel``: a vision transformer with a class token."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    model_type: ClassVar[str] = "clip_vision_model"
    architecture: ClassVar[str] = "CLIPVisionModel"

    @classmethod
    def pocket(cls) -> "VisionConfig":
        """The course's own: pictures of 64x64 in patches of 8x8."""
        size = {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 5}
        return cls(**size, projection_dim=128, image_size=64, patch_size=8)


@dataclass(frozen=True)
class CLIPConfig:
    """A ``CLIPModel``: both encoders and the width of the space they share."""

    text: TextConfig
    vision: VisionConfig
    projection_dim: int = 512

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "CLIPConfig":
        """Read transformers' ``config.json``; raises ValueError for a model of another kind."""
        if (kind := config.get("model_type", "clip")) != "clip":
            raise ValueError(f"CLIPConfig needs a clip, but this configuration is of a {kind}.")
        text, vision = (dict(config.get(key) or {}) for key in ("text_config", "vision_config"))
        parts = TextConfig.from_transformers(text), VisionConfig.from_transformers(vision)
        return cls(*parts, config.get("projection_dim", 512))

    def to_transformers(self) -> dict[str, Any]:
        """The ``config.json`` from which transformers builds the same model."""
        parts = {"text_config": self.text.to_transformers(), "vision_config": self.vision.to_transformers()}
        return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": self.projection_dim, **parts}


class VisionEmbeddings(nn.Module):
    """A class token, then the patches, with position vectors: (B, 3, H, W) -> (B, 1 + patches, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        d, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(d))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, d, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(patches + 1, d)
        nn.init.normal_(self.class_embedding, std=d**-0.5)
        nn.init.normal_(self.position_embedding.weight, std=d**-0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, patches, D)
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionEncoder(nn.Module):
    """A vision transformer (arXiv:2010.11929) as CLIP has it."""

    config_class = VisionConfig

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic
        self.encoder = Transformer(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) -> hidden states (B, 1 + patches, D), the class token first, before the last norm.

        Raises ValueError for another size or number of channels than the configuration's.
        """
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"The vision encoder takes pictures of shape (B, {', '.join(map(str, expected))}), "
                f"but got {tuple(pixel_values.shape)}."
            )
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))

    def pooled(self, hidden: Tensor) -> Tensor:
        """The class token's state after the last norm: (B, 1 + patches, D) -> (B, D)."""
        return self.post_layernorm(hidden[:, 0])


class CLIP(nn.Module):
    """Both encoders with their projections into one space, trained so that a picture lies near its caption."""

    config_class = CLIPConfig

    def __init__(self, text: TextConfig, vision: VisionConfig, projection_dim: int = 512):
        super().__init__()
        self.config = CLIPConfig(text, vision, projection_dim)
        self.text_model = TextEncoder(text)
        self.vision_model = VisionEncoder(vision)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.text_projection.weight, std=text.hidden_size**-0.5)
        nn.init.normal_(self.visual_projection.weight, std=vision.hidden_size**-0.5)

    @classmethod
    def from_config(cls, config: CLIPConfig) -> "CLIP":
        """Build it from one configuration, as ``weights.load_model`` does."""
        return cls(config.text, config.vision, config.projection_dim)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, L) -> (B, projection_dim), not normalised."""
        hidden = self.text_model(input_ids, attention_mask)
        return self.text_projection(self.text_model.pooled(hidden, input_ids))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) -> (B, projection_dim), not normalised."""
        return self.visual_projection(self.vision_model.pooled(self.vision_model(pixel_values)))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Cosine of every picture with every text, times the learnt scale: (B pictures, B texts)."""
        text = F.normalize(self.text_features(input_ids, attention_mask), dim=-1)
        image = F.normalize(self.image_features(pixel_values), dim=-1)
        return self.logit_scale.exp() * image @ text.T
