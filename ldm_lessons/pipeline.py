"""A latent diffusion model's parts together, and its borders: prompts in, pictures in, pictures out.

    picture   float (B, 3, H, W) in [0, 1], or PIL
    latents   (B, 4, H/8, W/8), already times the VAE's scaling factor: what the U-Net works on
    text      the text encoder's last hidden states (B, 77, D)

Whatever a person gives is checked here, and what cannot be is answered in one sentence.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_lessons.samplers import Generators, make_sampler, randn
from ldm_lessons.text import TextEncoder, tokenize
from ldm_lessons.unet import UNet
from ldm_lessons.vae import VAE


@dataclass
class LatentDiffusion:
    """The parts of a Stable Diffusion, the words that its text encoder was trained on, where known, and its name."""

    tokenizer: Any
    text_encoder: TextEncoder
    unet: UNet
    vae: VAE
    scheduler_config: dict[str, Any]
    known_words: frozenset[str] | None = None
    name: str = ""

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the pictures that it was trained on."""
        return self.unet.config.sample_size * self.vae.config.downscale

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LatentDiffusion:
        """Move every part there, like torch's `Module.to`; returns itself."""
        for part in (self.text_encoder, self.unet, self.vae):
            part.to(device, dtype)
        self.vae.to(memory_format=torch.channels_last)  # the order in which its convolutions are fastest
        wide = self.device.type == "cuda"  # a processor is as fast or faster without it in the U-Net's small layers
        self.unet.to(memory_format=torch.channels_last if wide else torch.contiguous_format)
        return self


def prompt_list(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list; "" is one, of unconditional pictures. Raises ValueError for what is none."""
    found = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(found, list | tuple) or not found or not all(isinstance(prompt, str) for prompt in found):
        raise ValueError(f"the prompt is {prompts!r}: give a sentence in quotes, or a list of them.")
    if any(prompt and not prompt.strip() for prompt in found):
        raise ValueError("the prompt is nothing but spaces: say what to draw, or give '' for a picture of anything.")
    return list(found)


def encode_prompt(model: LatentDiffusion, prompts: str | Sequence[str]) -> Tensor:
    """The text encoder's last hidden states for the prompts, (B, 77, D).

    Warns, in one sentence, of a prompt that is cut because it has more than 77 tokens, and of words that the model
    never saw. Raises ValueError for what is no prompt (see `prompt_list`).
    """
    prompts, limit = prompt_list(prompts), model.tokenizer.model_max_length
    for row, prompt in zip(model.tokenizer(prompts, verbose=False).input_ids, prompts, strict=True):
        if len(row) > limit:
            lost = model.tokenizer.decode(row[limit - 1 : -1]).strip()
            _warn(f"the prompt is too long (over {limit} tokens): not read is {lost!r}.")
        words = dict.fromkeys(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", prompt.lower()))
        if strange := [word for word in words if word not in (model.known_words or words)]:
            _warn(f"the model never saw {', '.join(map(repr, strange))}: use other words.")
    with torch.inference_mode():
        hidden = model.text_encoder(tokenize(model.tokenizer, prompts).to(model.device))
    return hidden.clone()  # a tensor like any other, outside inference mode


def encode(model: LatentDiffusion, pictures: Tensor, generator: Generators = None) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] to latents (B, 4, H/8, W/8), drawn by `generator` from what the VAE answers."""
    with torch.inference_mode(), enough_memory():
        posterior = model.vae.encode((pictures * 2 - 1).to(model.device, model.dtype))
        noise = randn(posterior.mean.shape, generator).to(posterior.mean)
        z = posterior.mean + (0.5 * posterior.logvar).exp() * noise
    return z * model.vae.config.scaling_factor


def decode(model: LatentDiffusion, latents: Tensor) -> Tensor:
    """Latents (B, 4, h, w) to pictures, float32 (B, 3, H, W) in [0, 1]."""
    with torch.inference_mode(), enough_memory():
        pixels = model.vae.decode(latents.to(model.device, model.dtype) / model.vae.config.scaling_factor)
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) in [0, 1] as PIL."""
    arrays = (pictures.permute(0, 2, 3, 1) * 255).round().to("cpu", torch.uint8).numpy()  # (B, H, W, 3)
    return [Image.fromarray(array) for array in arrays]


def to_tensor(model: LatentDiffusion, image: Any) -> Tensor:
    """A picture, PIL (RGB) or float (3, H, W) or (B, 3, H, W), as float32 (B, 3, H, W) in [0, 1] on the CPU.

    Raises ValueError for another kind, mode, shape or range, and for a size that this model cannot take.
    """
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"the image has the mode {image.mode}, not RGB: convert it with image.convert('RGB').")
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (3, H, W)
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise ValueError(f"the image is a {type(image).__name__}: give a PIL image, or a float tensor in [0, 1].")
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"the image has the shape {tuple(image.shape)}, but must be (3, H, W) or (B, 3, H, W).")
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError("the image has values outside [0, 1]: scale it first.")
    side(model, "the image's height", image.shape[2])
    side(model, "the image's width", image.shape[3])
    return image.float().cpu()


def to_mask(mask: Any, height: int, width: int) -> Tensor:
    """A mask, PIL or float (H, W), as float32 (1, 1, H, W) of 0 (keep) and 1 (repaint: white, over one half).

    Raises ValueError for another kind or size.
    """
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.array(mask.convert("L"))) / 255
    if not isinstance(mask, Tensor) or mask.numel() != mask.shape[-1] * mask.shape[-2 % max(mask.ndim, 1)]:
        raise ValueError("the mask must be a PIL image, or a tensor (H, W) of 0 (keep) and 1 (repaint).")
    if tuple(mask.shape[-2:]) != (height, width):
        found = "x".join(map(str, reversed(mask.shape[-2:])))
        raise ValueError(f"the mask is {found} pixels, but the image is {width}x{height}: make them the same size.")
    return (mask.reshape(1, 1, height, width).cpu() >= 0.5).float()


def side(model: LatentDiffusion, name: str, pixels: Any) -> int:
    """A height or width that this model can make. Raises ValueError if it cannot."""
    unit = model.vae.config.downscale * model.unet.config.downscale
    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < unit or pixels % unit:
        raise ValueError(f"{name} is {pixels!r}, but must be a multiple of {unit} pixels, such as {model.image_size}.")
    return pixels


def one_each(rows: Tensor, n: int, name: str = "images") -> Tensor:
    """`rows` (n, ...), or n times (1, ...). Raises ValueError for another number."""
    if len(rows) not in (1, n):
        raise ValueError(f"there are {len(rows)} {name} for {n} pictures: give one, or one for each.")
    return rows.expand(n, *rows.shape[1:])


def sampler(model: LatentDiffusion, chosen: str | Any, n: int) -> Any:
    """A sampler by its name, with the model's own settings, or the one given, its n timesteps set; errors as above."""
    total = model.scheduler_config.get("num_train_timesteps", 1000)
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= total:
        raise ValueError(f"num_inference_steps is {n!r}, but must be a whole number from 1 to {total}.")
    if isinstance(chosen, str):
        chosen = type(make_sampler(chosen)).from_config(model.scheduler_config)
    if isinstance(chosen, type) or not hasattr(chosen, "set_timesteps") or not hasattr(chosen, "step"):
        raise ValueError(f"the sampler is a {type(chosen).__name__}: give a name such as 'ddim', or a sampler object.")
    kinds = [dict(config).get("prediction_type", "epsilon") for config in (chosen.config, model.scheduler_config)]
    if kinds[0] != kinds[1]:
        _warn(f"the sampler takes the network's output for {kinds[0]}, but it is {kinds[1]}: set prediction_type.")
    chosen.set_timesteps(n)
    return chosen


def seeds(seed: int | None, generator: Generators, n: int) -> Any:
    """What draws the noise of n pictures: what is given, or a generator for each with seed + k. Raises ValueError."""
    if isinstance(generator, list) and len(generator) != n:
        raise ValueError(f"there are {len(generator)} generators for {n} pictures: give one, or one for each.")
    if generator is not None:
        return generator
    if isinstance(seed, bool) or not isinstance(seed, int | None):
        raise ValueError(f"the seed is {seed!r}, but must be a whole number, or None for a new one each time.")
    seed = torch.Generator().seed() % 2**62 if seed is None else seed
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


def start(sampler: Any, strength: float, n: int) -> int:
    """The index of the first of the last `strength` of n steps. Raises ValueError for a strength outside [0, 1]."""
    if not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength!r}, but must be from 0 (keep the image) to 1 (forget it).")
    steps = int(n * strength)
    return (n - steps) * sampler.order if steps else len(sampler.timesteps)


def _warn(message: str) -> None:
    """Warn in the reader's own line, not in ours."""
    depth, frame = 1, sys._getframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ("ldm_lessons", "contextlib"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Turn every kind of out-of-memory error into one RuntimeError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own is a RuntimeError, on the CPU without a class
        lacks = re.search(r"out of memory|(can't|cannot|failed to) allocate|not enough memory", str(error), re.I)
        if not lacks and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        raise RuntimeError(
            "the memory does not suffice (out of memory): make fewer pictures at once, or smaller ones, or, on a GPU, "
            "load the model in half precision."
        ) from None
