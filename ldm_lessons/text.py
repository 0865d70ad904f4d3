"""The text encoder that steers Stable Diffusion: CLIP's text half (arXiv:2103.00020).

    input_ids  token numbers (B, L), L at most 77
    hidden     (B, L, D)
Names and numbers are those of transformers 5: CLIPTextModel. The other half is in clip.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TransformerConfig:
    """What both encoders have in common; names and defaults are transformers'."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self):
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise ValueError(f"hidden_size {width} cannot be shared among {heads} heads; choose a divisor of {width}.")
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"Unknown hidden_act {self.hidden_act!r}; use {' or '.join(_ACTIVATIONS)}.")

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> Self:
        """Read transformers' ``config.json``; raises ValueError for a model of another kind."""
        if (kind := config.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"{cls.__name__} needs a {cls.model_type}, but this configuration is of a {kind}.")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def to_transformers(self) -> dict[str, Any]:
        """The ``config.json`` from which transformers builds the same model."""
        return {"architectures": [self.architecture], "model_type": self.model_type, **asdict(self)}


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """A ``CLIPTextModel``.

    An ``eos_token_id`` of 2 means "the largest number in the row", as in the files that Stable Diffusion 1.x came with:
    give the end of your own vocabulary another number.
    """

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1
    model_type: ClassVar[str] = "clip_text_model"
    architecture: ClassVar[str] = "CLIPTextModel"

    @classmethod
    def sd15(cls) -> "TextConfig":
        """Stable Diffusion 1.x (the text half of OpenAI's ViT-L/14): 123,060,480 parameters."""
        return cls(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)

    @classmethod
    def pocket(cls, vocab_size: int, **changes: Any) -> "TextConfig":
        """The course's own; as in CLIP, the vocabulary's last two numbers are start and end, and end is padding too."""
        special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
        size = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
        return cls(**{"vocab_size": vocab_size, "projection_dim": 128} | size | special | changes)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's cheap approximation of GELU, x * sigmoid(1.702 x) (arXiv:1606.08415 section 2)."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases (arXiv:1706.03762 eq. (1)): (B, L, D) -> (B, L, D)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D/heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers round the activation: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm transformer layer: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask, causal)
        return x + self.mlp(self.layer_norm2(x))


class Transformer(nn.Module):
    """The stack of layers, with CLIP's initial weights (OpenAI's ``initialize_parameters``)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        narrow, depth = config.hidden_size**-0.5, (2 * config.num_hidden_layers) ** -0.5
        # What is added to the residual stream (out_proj, fc2) shrinks with the depth, so that the sum does not grow.
        stds = {"q_proj": narrow, "k_proj": narrow, "v_proj": narrow, "out_proj": narrow * depth}
        stds |= {"fc1": (2 * config.hidden_size) ** -0.5, "fc2": narrow * depth}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=stds[name.rpartition(".")[2]])
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, causal)
        return x


class TextEmbeddings(nn.Module):
    """Token and position vectors, added: (B, L) -> (B, L, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class TextEncoder(nn.Module):
    """A causal transformer over tokens (lesson 06 derives it); Stable Diffusion reads all its hidden states."""

    config_class = TextConfig

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Transformer(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, L) int64 -> hidden states after the last norm, (B, L, D).

        ``attention_mask`` (B, L) is 0 where padding must not be read; Stable Diffusion gives none.
        Raises ValueError for a wrong shape or more tokens than there are positions.
        """
        longest = self.config.max_position_embeddings
        if input_ids.ndim != 2 or input_ids.shape[1] > longest:
            got = tuple(input_ids.shape)
            raise ValueError(f"The text encoder takes tokens of shape (B, L) with L at most {longest}, but got {got}.")
        mask = None
        if attention_mask is not None:
            length = input_ids.shape[1]
            past = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
            mask = past & attention_mask.bool()[:, None, None, :]  # (B, 1, L, L)
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids), mask, causal=True))

    def pooled(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """The state at the first end-of-text token, which has read the whole sentence: (B, L, D) -> (B, D)."""
        eos = self.config.eos_token_id
        is_end = input_ids if eos == 2 else (input_ids == eos).int()  # 2: see TextConfig
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), is_end.argmax(dim=1)]


def tokenize(tokenizer: Any, prompts: str | Sequence[str]) -> Tensor:
    """Sentences -> token numbers (B, 77) int64, padded and cut to the tokenizer's ``model_max_length``."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    length = tokenizer.model_max_length
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
