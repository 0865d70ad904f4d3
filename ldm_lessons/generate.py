"""Pictures from a model: text to image, image to image, inpainting, and the way from one picture to another.

    x0, x_t   latents (B, 4, H/8, W/8), without noise and at timestep t
    cond      the prompts' text (B, 77, D); uncond is the negative prompts'

`denoise` is the loop; the others prepare what goes in and use what comes out. Noise is drawn by CPU generators, so that
a seed means the same picture on every device; picture k of a batch has seed + k. Assembled by hand in lesson 12.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_lessons import pipeline as check
from ldm_lessons.guidance import guided
from ldm_lessons.pipeline import LatentDiffusion, decode, encode, encode_prompt, enough_memory, to_pil, to_tensor
from ldm_lessons.samplers import Generators, randn
from ldm_lessons.schedules import to_x0

Edit = Callable[[Tensor, int], Tensor]
Path = Callable[[Tensor, Tensor, float], Tensor]
Control = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


class Step(NamedTuple):
    """What `denoise` yields after a step: x at the next level, and the x0 that the network predicted at t."""

    index: int
    t: float
    latents: Tensor
    pred_x0: Tensor


def denoise(
    model: LatentDiffusion, latents: Tensor, cond: Tensor, uncond: Tensor | None = None, *, sampler: Any,
    guidance_scale: float = 1.0, start: int = 0, generator: Generators = None, edit: Edit | None = None,
    beside: Tensor | None = None, control: Control | None = None,
) -> Iterator[Step]:  # fmt: skip
    """From x_t (B, 4, h, w) at `sampler.timesteps[start]` to x0, one `Step` at a time.

    `sampler` is ours or diffusers', with its timesteps set. `generator` draws the noise of a sampler that adds some.
    `edit(x, index)` gives what to go on with instead of x, which is at the level of `timesteps[index]`, at the end x0.
    `beside` (B, C', h, w) are further channels that the U-Net reads behind those of x; `control(x, t, text)` gives what
    it adds to its skips, as a ControlNet does.
    """

    def unet(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        more = [] if beside is None else [beside.repeat(len(x) // len(beside), 1, 1, 1)]
        added = [] if control is None else [control(x, t, text)]
        return model.unet(torch.cat([x, *more], 1), t, text, *added)

    steps, on_device = sampler.timesteps.cpu(), sampler.timesteps.to(latents.device)  # a GPU need not wait at each step
    noisy = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(start)
    for index in range(start, len(steps)):
        with torch.inference_mode(), enough_memory():
            x = sampler.scale_model_input(latents, steps[index])
            out = guided(unet, x, on_device[index], cond, uncond, guidance_scale)
            result = sampler.step(out, steps[index], latents, **noisy, return_dict=False)
            if len(result) == 1:  # some of diffusers' schedulers keep x0 to themselves
                alpha_bar = float(sampler.alphas_cumprod[round(steps[index].item())])
                a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
                result = (*result, to_x0(out, x, a, s, sampler.config.prediction_type))
            latents = result[0] if edit is None else edit(result[0], index + 1)
        latents = latents.clone()  # a tensor like any other, outside inference mode
        yield Step(index, steps[index].item(), latents, result[1].clone())


@enough_memory()
def text_to_image(
    model: LatentDiffusion, prompt: str | Sequence[str], *, negative_prompt: str | Sequence[str] = "",
    num_inference_steps: int = 20, guidance_scale: float = 5.0, height: int | None = None, width: int | None = None,
    seed: int | None = 0, generator: Generators = None, sampler: str | Any = "dpmpp_2m", latents: Tensor | None = None,
    progress: bool = True, on_step: Callable[[Step], Any] | None = None, control: Control | None = None,
) -> list[Image.Image]:  # fmt: skip
    """Pictures that match the prompts, one each, as diffusers' StableDiffusionPipeline makes them.

    The noise to begin with is `latents`, or `generator`'s (one, or a list of one for each picture), or that of `seed`
    (None: another at each call). `sampler` is a name, or a sampler, or a scheduler of diffusers. `on_step` is called
    with every `Step`, and `control` is as in `denoise`. Raises ValueError for a setting that cannot be, and
    RuntimeError if the memory does not suffice.
    """
    prompts, f = check.prompt_list(prompt), model.vae.config.downscale
    height = check.side(model, "height", model.image_size if height is None else height)
    width = check.side(model, "width", model.image_size if width is None else width)
    sampler, generator = check.sampler(model, sampler, num_inference_steps), check.seeds(seed, generator, len(prompts))
    shape = (len(prompts), model.vae.config.latent_channels, height // f, width // f)
    latents = randn(shape, generator) if latents is None else latents
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents have the shape {tuple(latents.shape)}, but these pictures begin with {shape}.")
    x = latents.to(model.device, model.dtype) * sampler.init_noise_sigma
    return _paint(
        model, x, prompts, sampler, generator, negative_prompt, guidance_scale, progress, on_step, control=control
    )


@enough_memory()
def image_to_image(
    model: LatentDiffusion, image: Any, prompt: str | Sequence[str], strength: float = 0.8, *,
    num_inference_steps: int = 20, seed: int | None = 0, generator: Generators = None,
    sampler: str | Any = "dpmpp_2m", **settings: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures like `image` that match the prompts: noise is added, and the last `strength` of the steps removes it.

    `image` is PIL (RGB), or float (3, H, W) or (B, 3, H, W) in [0, 1]. Strength 0 gives it back through the VAE, 1
    hardly looks at it (arXiv:2108.01073). The rest, and `settings` (negative_prompt, guidance_scale, progress,
    on_step), are as in `text_to_image`.
    """
    prompts = check.prompt_list(prompt)
    pixels = check.one_each(to_tensor(model, image), len(prompts))
    sampler, generator = check.sampler(model, sampler, num_inference_steps), check.seeds(seed, generator, len(prompts))
    start = check.start(sampler, strength, num_inference_steps)
    x0 = encode(model, pixels, generator)
    x = _noised(sampler, x0, randn(x0.shape, generator).to(x0), start)
    return _paint(model, x, prompts, sampler, generator, start=start, **settings)


@enough_memory()
def inpaint(
    model: LatentDiffusion, image: Any, mask: Any, prompt: str | Sequence[str], strength: float = 1.0, *,
    num_inference_steps: int = 20, seed: int | None = 0, generator: Generators = None,
    sampler: str | Any = "dpmpp_2m", **settings: Any,
) -> list[Image.Image]:  # fmt: skip
    """`image`, repainted where `mask` is white to match the prompts; every other pixel stays exactly as it was.

    A U-Net of nine channels sees the mask and what is kept. For any other, what is kept is put back after each step
    with that step's noise (arXiv:2201.09865 eq. (8), without resampling). `mask` is PIL or float (H, W), as large as
    the image; a latent is repainted if one of its pixels is. The rest is as in `image_to_image`.
    """
    prompts = check.prompt_list(prompt)
    pixels = check.one_each(to_tensor(model, image), len(prompts))
    white = check.to_mask(mask, *pixels.shape[-2:])  # (1, 1, H, W)
    sampler, generator = check.sampler(model, sampler, num_inference_steps), check.seeds(seed, generator, len(prompts))
    start = check.start(sampler, strength, num_inference_steps)
    f, c = model.vae.config.downscale, model.vae.config.latent_channels
    shape = (len(pixels), c, pixels.shape[2] // f, pixels.shape[3] // f)
    new = F.max_pool2d(white, f).to(model.device, model.dtype)  # (1, 1, h, w)
    if model.unet.config.in_channels == 2 * c + 1:  # trained to inpaint
        x0 = encode(model, pixels, generator) if strength < 1 else torch.zeros(shape).to(new)
        noise = randn(shape, generator).to(new)
        kept = encode(model, torch.where(white > 0, 0.5, pixels), generator)  # grey where it is to be painted
        how = {"beside": torch.cat([new.expand(len(kept), -1, -1, -1), kept], 1)}
    else:
        x0 = encode(model, pixels, generator)
        noise = randn(shape, generator).to(new)
        how = {"edit": lambda x, index: new * x + (1 - new) * _noised(sampler, x0, noise, index)}
    x = noise * sampler.init_noise_sigma if strength == 1 else _noised(sampler, x0, noise, start)
    made = _paint(model, x, prompts, sampler, generator, start=start, **how, **settings)
    hole = to_pil(white.expand(-1, 3, -1, -1))[0].convert("L")
    return [Image.composite(painted, old, hole) for painted, old in zip(made, to_pil(pixels), strict=True)]


def slerp(a: Tensor, b: Tensor, w: float) -> Tensor:
    """The point at the share w of the great circle from a to b, tensors of one shape; a batch (B, ...) row by row.

    Its length goes evenly from a's to b's. The straight line's does not: halfway between two noises it is 0.7 of
    theirs, too little noise for the network (lesson 14). Raises ValueError for two shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"slerp needs two tensors of one shape, but got {tuple(a.shape)} and {tuple(b.shape)}.")
    p, q = (v.cpu().double().reshape(1 if v.ndim == 1 else len(v), -1) for v in (a, b))
    long_p, long_q = (v.norm(dim=1, keepdim=True).clamp_min(1e-12) for v in (p, q))
    angle = (p / long_p * q / long_q).sum(1, keepdim=True).clamp(-1, 1).acos()
    line = angle.sin() < 1e-6  # parallel: any circle, or none
    share_p = torch.where(line, 1 - w, ((1 - w) * angle).sin() / angle.sin())
    share_q = torch.where(line, w, (w * angle).sin() / angle.sin())
    length = (1 - w) * long_p + w * long_q
    return (length * (share_p * p / long_p + share_q * q / long_q)).reshape(a.shape).to(a)


@enough_memory()
def interpolate(
    model: LatentDiffusion, prompts: tuple[str, str], seeds: tuple[int, int] = (0, 0), frames: int = 9, *,
    text_path: Path = torch.lerp, noise_path: Path = slerp, num_inference_steps: int = 20,
    sampler: str | Any = "dpmpp_2m", batch_size: int = 4, **settings: Any,
) -> list[Image.Image]:  # fmt: skip
    """`frames` pictures on the way from the first prompt and seed to the second, both ends included.

    The paths are functions (a, b, share) of the two texts (1, 77, D) and of the two noises (1, 4, h, w). `batch_size`
    frames are made at once; `settings` are as in `image_to_image`.
    """
    cond_a, cond_b = encode_prompt(model, prompts).split(1)
    shape = (1, model.vae.config.latent_channels, *[model.unet.config.sample_size] * 2)
    a, b = (randn(shape, check.seeds(seed, None, 1)) for seed in seeds)
    shares = [k / max(frames - 1, 1) for k in range(frames)]
    made: list[Image.Image] = []
    for some in (shares[k : k + batch_size] for k in range(0, frames, batch_size)):
        ready = check.sampler(model, sampler, num_inference_steps)
        cond = torch.cat([text_path(cond_a, cond_b, w) for w in some])
        x = torch.cat([noise_path(a, b, w) for w in some]).to(model.device, model.dtype) * ready.init_noise_sigma
        same = [check.seeds(seeds[0], None, 1)[0] for _ in some]  # what a sampler adds must not flicker
        made += _paint(model, x, cond, ready, same, **settings)
    return made


def _paint(
    model: LatentDiffusion, x: Tensor, prompts: list[str] | Tensor, sampler: Any, generator: Generators,
    negative_prompt: str | Sequence[str] = "", guidance_scale: float = 5.0, progress: bool = True,
    on_step: Callable[[Step], Any] | None = None, start: int = 0, **how: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures from x_t at `start`, for prompts or their text; `how` goes to `denoise`."""
    from tqdm.auto import tqdm

    negative = check.prompt_list(negative_prompt)
    text = encode_prompt(model, negative if isinstance(prompts, Tensor) else prompts + negative)
    cond, uncond = (prompts, text) if isinstance(prompts, Tensor) else text.split([len(prompts), len(negative)])
    uncond = check.one_each(uncond, len(x), "negative prompts")
    options = dict(sampler=sampler, guidance_scale=guidance_scale, start=start, generator=generator, **how)
    steps = denoise(model, x, cond, uncond, **options)
    for step in tqdm(steps, total=len(sampler.timesteps) - start, disable=not progress):
        x = step.latents
        if on_step is not None:
            on_step(step)
    return to_pil(decode(model, x))


def _noised(sampler: Any, x0: Tensor, noise: Tensor, index: int) -> Tensor:
    """x_t at the index of the timesteps, or x0 after the last."""
    t = sampler.timesteps[index : index + 1]
    return sampler.add_noise(x0, noise, t) if len(t) else x0
