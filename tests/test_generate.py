"""Pictures: equal to diffusers' pipelines from the same weights, seeds that mean something, and exact borders."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ldm_lessons import generate, guidance
from ldm_lessons.controlnet import ControlNet
from ldm_lessons.generate import (
    decode,
    denoise,
    encode,
    encode_prompt,
    image_to_image,
    inpaint,
    interpolate,
    slerp,
    text_to_image,
    to_pil,
    to_tensor,
)
from ldm_lessons.samplers import SAMPLERS, make_sampler
from ldm_lessons.schedules import NoiseSchedule
from ldm_lessons.unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'

PROMPT = "a red house on the left, snowy mountains"
THEIRS = {
    "ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
}  # fmt: skip


def theirs(name, config):
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name).from_config(config)


def pair(name, config, **changes):
    """diffusers' scheduler and our sampler of that name."""
    if name == "pndm":  # theirs takes the mean of v at several levels, which is no v
        changes |= dict(prediction_type="epsilon", skip_prk_steps=True)
    config = {**config, **changes}
    return theirs(THEIRS[name], config), SAMPLERS[name].from_config(config)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(picture):
    return np.asarray(picture).astype(int)


def photo(size=32, seed=0):
    """A colourful picture that is not symmetric."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def half_mask(size=32):
    """White on the right half."""
    return Image.fromarray(np.repeat([[0] * (size // 2) + [255] * (size // 2)], size, 0).astype(np.uint8))


@pytest.fixture
def pipe(tiny_pipe):
    """The pipeline, its scheduler put back afterwards."""
    scheduler = tiny_pipe.scheduler
    yield tiny_pipe
    tiny_pipe.scheduler = scheduler


@pytest.fixture
def other(pipe):
    """The same parts in another of diffusers' pipelines."""

    def make(name):
        made = getattr(__import__("diffusers"), name)(**pipe.components, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    return make


# The same picture as diffusers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.filterwarnings("ignore:the sampler takes")
def test_text_to_image_is_that_of_diffusers(pipe, tiny_model, name, scale):
    pipe.scheduler, sampler = pair(name, pipe.scheduler.config)
    options = dict(num_inference_steps=7, guidance_scale=scale)
    want = pipe(PROMPT, negative_prompt="night", generator=generator(3), **options).images[0]
    options |= dict(negative_prompt="night", sampler=sampler, progress=False)
    got = text_to_image(tiny_model, PROMPT, seed=3, **options)[0]
    assert got.size == want.size == (32, 32) and got.mode == "RGB"
    assert abs(numbers(got) - numbers(want)).max() <= 1
    assert_close(to_tensor(tiny_model, got), to_tensor(tiny_model, want), atol=1 / 254, rtol=0)
    assert numbers(want).std() > 5  # and it is a picture


def test_latents_are_those_of_diffusers(pipe, tiny_model):
    start, found = torch.randn(2, 4, 4, 4, generator=generator()), []
    want = pipe(
        [PROMPT, "a boat"], latents=start, num_inference_steps=10, guidance_scale=4, output_type="latent"
    ).images  # fmt: skip
    text_to_image(
        tiny_model, [PROMPT, "a boat"], latents=start, num_inference_steps=10, guidance_scale=4, sampler="ddim",
        progress=False, on_step=found.append,
    )  # fmt: skip
    assert_close(found[-1].latents, want, atol=1e-4 * want.std().item(), rtol=1e-4)
    pixels = pipe.vae.decode(want / pipe.vae.config.scaling_factor).sample
    assert_close(decode(tiny_model, want), (pixels / 2 + 0.5).clamp(0, 1).detach(), atol=1e-5, rtol=1e-5)


def test_other_sizes_and_lists_are_those_of_diffusers(pipe, tiny_model):
    prompts, seeds = ["a tree", "a lake at night"], [5, 6]
    options = dict(num_inference_steps=4, guidance_scale=3.0, height=48, width=16)
    want = pipe(prompts, negative_prompt=["red", "blue"], generator=[generator(s) for s in seeds], **options).images
    got = text_to_image(
        tiny_model, prompts, negative_prompt=["red", "blue"], seed=5, sampler="ddim", progress=False, **options
    )
    assert got[0].size == (16, 48)
    for a, b in zip(got, want, strict=True):
        assert abs(numbers(a) - numbers(b)).max() <= 1


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.filterwarnings("ignore:the sampler takes")
def test_our_samplers_run_in_their_pipelines(pipe, other, name, spacing):
    results = []
    for scheduler in pair(name, pipe.scheduler.config, timestep_spacing=spacing):
        pipe.scheduler = scheduler
        some = [pipe(PROMPT, num_inference_steps=5, generator=generator()).images[0]]
        part = 1.0 if name in ("pndm", "lms") else 0.6  # theirs are wrong from the middle: see test_samplers
        for kind, extra in (
            ("StableDiffusionImg2ImgPipeline", {"strength": part}),
            ("StableDiffusionInpaintPipeline", {"strength": part, "mask_image": half_mask()}),
        ):
            if "Inpaint" in kind:
                extra |= {"height": 32, "width": 32}
            made = other(kind)
            made.scheduler = scheduler
            assert made.scheduler is scheduler
            some += made(PROMPT, image=photo(), num_inference_steps=5, generator=generator(), **extra).images
        results.append(np.stack([numbers(picture) for picture in some]))
    assert abs(results[0] - results[1]).max() <= 1


def test_our_samplers_and_controlnet_run_in_their_controlnet_pipeline(pipe, tiny_model):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    ours = ControlNet.from_unet(tiny_model.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for p in [*ours.controlnet_down_blocks.parameters(), *ours.controlnet_mid_block.parameters()]:
        torch.nn.init.normal_(p, 0, 0.2, generator=generator())
    torch.nn.init.normal_(ours.controlnet_cond_embedding.conv_out.weight, 0, 0.2, generator=generator())
    reference = ControlNetModel.from_config(ours.config.to_diffusers())
    reference.load_state_dict(ours.state_dict())
    controlled = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=reference, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=4, guidance_scale=3.0)
    config = pipe.scheduler.config
    for name in [*THEIRS, "heun"]:  # Heun last: its picture is used below
        results = []
        for scheduler in pair(name, config):
            controlled.scheduler = scheduler
            results.append(controlled(PROMPT, image=photo(), generator=generator(), **options).images[0])
        assert abs(numbers(results[0]) - numbers(results[1])).max() <= 1, name
    options |= dict(sampler="heun", progress=False)
    mine = text_to_image(tiny_model, PROMPT, control=ours.on(to_tensor(tiny_model, photo())), **options)[0]
    assert abs(numbers(mine) - numbers(results[0])).max() <= 1
    plain = text_to_image(tiny_model, PROMPT, **options)[0]
    assert abs(numbers(plain) - numbers(mine)).max() > 20  # it does steer


@pytest.mark.parametrize(
    "name",
    ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
     "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"],
)  # fmt: skip
def test_their_schedulers_run_in_our_loop(pipe, tiny_model, name):
    pipe.scheduler = theirs(name, pipe.scheduler.config)
    want = pipe(PROMPT, num_inference_steps=6, guidance_scale=3, generator=generator()).images[0]
    found = []
    options = dict(num_inference_steps=6, guidance_scale=3, progress=False, on_step=found.append)
    got = text_to_image(tiny_model, PROMPT, sampler=theirs(name, pipe.scheduler.config), **options)[0]
    assert abs(numbers(got) - numbers(want)).max() <= 1
    assert all(step.pred_x0.shape == step.latents.shape and step.pred_x0.isfinite().all() for step in found)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_pred_x0_is_the_network_s_whatever_the_scheduler_tells(tiny_model, name):
    sampler = theirs(name, tiny_model.scheduler_config)
    sampler.set_timesteps(6)
    x, cond = torch.randn(1, 4, 4, 4, generator=generator()), encode_prompt(tiny_model, PROMPT)
    step = next(denoise(tiny_model, x * sampler.init_noise_sigma, cond, sampler=sampler))
    seen = sampler.init_noise_sigma * x / (1 if "Euler" not in name else (1 + sampler.sigmas[0] ** 2) ** 0.5)
    schedule = NoiseSchedule.from_config(tiny_model.scheduler_config)
    with torch.no_grad():
        v = tiny_model.unet(seen, int(step.t), cond)
    assert_close(step.pred_x0, schedule.to_x0(v, seen, int(step.t), "v_prediction"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_is_that_of_diffusers(pipe, other, tiny_model, name, strength):
    pipe.scheduler, _ = pair(name, pipe.scheduler.config)
    options = dict(num_inference_steps=8, guidance_scale=3.0, strength=strength)
    want = other("StableDiffusionImg2ImgPipeline")(PROMPT, image=photo(), generator=generator(), **options).images[0]
    got = image_to_image(tiny_model, photo(), PROMPT, sampler=name, progress=False, **options)[0]
    assert abs(numbers(got) - numbers(want)).max() <= 1


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpaint_is_that_of_diffusers_inside_the_mask(pipe, other, tiny_model, strength):
    options = dict(num_inference_steps=8, guidance_scale=3.0, strength=strength)
    want = other("StableDiffusionInpaintPipeline")(
        PROMPT, image=photo(), mask_image=half_mask(), height=32, width=32, generator=generator(), **options
    ).images[0]
    got = inpaint(tiny_model, photo(), half_mask(), PROMPT, sampler="ddim", progress=False, **options)[0]
    assert abs(numbers(got) - numbers(want))[:, 16:].max() <= 1


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_unet_of_nine_channels_inpaints_as_in_diffusers(pipe, tiny_model, strength):
    import diffusers

    net = UNet(dataclasses.replace(tiny_model.unet.config, in_channels=9)).requires_grad_(False)
    model = dataclasses.replace(tiny_model, unet=net)
    unet = diffusers.UNet2DConditionModel.from_config(net.config.to_diffusers())
    unet.load_state_dict(net.state_dict())
    fill = diffusers.StableDiffusionInpaintPipeline(**(pipe.components | {"unet": unet}), requires_safety_checker=False)
    fill.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=8, guidance_scale=3.0, strength=strength)
    want = fill(PROMPT, image=photo(), mask_image=half_mask(), height=32, width=32, generator=generator(), **options)
    got = inpaint(model, photo(), half_mask(), PROMPT, sampler="ddim", progress=False, **options)[0]
    assert abs(numbers(got) - numbers(want.images[0]))[:, 16:].max() <= 1
    assert np.array_equal(numbers(got)[:, :16], numbers(photo())[:, :16])
    plain = inpaint(tiny_model, photo(), half_mask(), PROMPT, sampler="ddim", progress=False, **options)[0]
    assert abs(numbers(got) - numbers(plain)).max() > 8


@pytest.mark.filterwarnings("ignore:the sampler takes")
def test_the_pocket_model_s_pictures_are_those_of_diffusers():
    """Text to image, image to image and inpainting, 128 x 128: at most 2 of 255 apart."""
    import diffusers

    from ldm_lessons import models

    model, pipe = models.load("pocket", "cpu"), diffusers.StableDiffusionPipeline.from_pretrained(models.POCKET)
    image, options = photo(128), dict(num_inference_steps=6, guidance_scale=5.0)
    mask, parts = half_mask(128), dict(**pipe.components, requires_safety_checker=False)
    want = [pipe(PROMPT, generator=generator(), **options).images[0]]
    img2img, fill = diffusers.StableDiffusionImg2ImgPipeline(**parts), diffusers.StableDiffusionInpaintPipeline(**parts)
    want += img2img(PROMPT, image=image, strength=0.7, generator=generator(), **options).images
    sizes = dict(height=128, width=128, strength=1.0)
    want += fill(PROMPT, image=image, mask_image=mask, generator=generator(), **sizes, **options).images
    options["progress"] = False
    got = text_to_image(model, PROMPT, **options) + image_to_image(model, image, PROMPT, 0.7, **options)
    got += inpaint(model, image, mask, PROMPT, **options)
    for a, b, part in zip(got, want, (slice(None), slice(None), slice(64, None)), strict=True):
        assert abs(numbers(a) - numbers(b))[:, part].max() <= 2
        assert numbers(a).std() > 20


def test_encode_prompt_is_that_of_diffusers(pipe, tiny_model):
    prompts = [PROMPT, "", "a boat"]
    want = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    got = encode_prompt(tiny_model, prompts)
    assert got.shape == (3, 77, 24)
    assert_close(got, want.detach(), atol=1e-5, rtol=1e-5)


# Properties ----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_the_pictures_of_the_single_seeds(tiny_model):
    for name in ("dpmpp_2m", "ddpm"):
        options = dict(num_inference_steps=5, sampler=name, progress=False)
        batch = text_to_image(tiny_model, [PROMPT] * 3, seed=11, **options)
        for k, picture in enumerate(batch):
            alone = text_to_image(tiny_model, PROMPT, seed=11 + k, **options)[0]
            assert abs(numbers(picture) - numbers(alone)).max() <= 1
        assert abs(numbers(batch[0]) - numbers(batch[1])).max() > 5


def test_the_seed_is_the_picture(tiny_model):
    options = dict(num_inference_steps=3, progress=False)
    first = text_to_image(tiny_model, PROMPT, seed=1, **options)[0]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert first.tobytes() == text_to_image(tiny_model, PROMPT, seed=1, **options)[0].tobytes()
    assert first.tobytes() == text_to_image(tiny_model, PROMPT, generator=generator(1), **options)[0].tobytes()
    assert torch.equal(before, torch.get_rng_state())  # nobody else's random numbers move
    new = [text_to_image(tiny_model, PROMPT, seed=None, **options)[0].tobytes() for _ in range(2)]
    assert new[0] != new[1]


def test_prompt_and_scale_make_a_difference(tiny_model):
    options = dict(num_inference_steps=4, progress=False)
    a, b, c = (
        numbers(text_to_image(tiny_model, prompt, guidance_scale=scale, **options)[0])
        for prompt, scale in ((PROMPT, 4), ("a boat", 4), (PROMPT, 1))
    )
    assert abs(a - b).max() > 3 and abs(a - c).max() > 3


def test_denoise_yields_every_step(tiny_model):
    sampler = make_sampler("ddim", prediction_type="v_prediction")
    sampler.set_timesteps(6)
    cond, uncond = encode_prompt(tiny_model, [PROMPT, ""]).split(1)
    x = torch.randn(1, 4, 4, 4, generator=generator())
    kept = x.clone()
    steps = list(denoise(tiny_model, x, cond, uncond, sampler=sampler, guidance_scale=2.0))
    assert [step.index for step in steps] == list(range(6))
    assert [step.t for step in steps] == sampler.timesteps.tolist()
    assert torch.equal(x, kept)
    with torch.no_grad():  # the first step by hand
        both = tiny_model.unet(torch.cat([x, x]), 831, torch.cat([uncond, cond]))
        v = both[:1] + 2 * (both[1:] - both[:1])
    x0 = sampler.schedule.to_x0(v, x, int(steps[0].t), "v_prediction")
    assert int(steps[0].t) == 831
    assert_close(steps[0].pred_x0, x0, atol=1e-5, rtol=1e-4)
    assert not steps[0].latents.is_inference() and not steps[0].pred_x0.is_inference()
    rest = list(denoise(tiny_model, steps[2].latents, cond, uncond, sampler=sampler, guidance_scale=2.0, start=3))
    assert [step.index for step in rest] == [3, 4, 5]
    assert_close(rest[-1].latents, steps[-1].latents)


def test_another_start_knows_nothing_of_the_last_run(tiny_model):
    cond, other = encode_prompt(tiny_model, [PROMPT, "a boat"]).split(1)
    x = torch.randn(2, 4, 4, 4, generator=generator())

    def end(sampler):
        return list(denoise(tiny_model, x[:1], cond, sampler=sampler, start=3))[-1].latents

    fresh, used = (make_sampler("dpmpp_2m", prediction_type="v_prediction") for _ in "ab")
    for sampler in (fresh, used):
        sampler.set_timesteps(6)
    for step in denoise(tiny_model, x[1:], other, sampler=used):
        if step.index == 2:  # its next step would have been the one at 3
            break
    assert_close(end(used), end(fresh))


def test_guided_is_one_call():
    calls = []

    def unet(x, t, text):
        calls.append((len(x), t))
        return x * text.mean((1, 2)).reshape(-1, 1, 1, 1)

    x, cond, uncond = torch.randn(2, 4, 3, 3), torch.full((2, 7, 5), 3.0), torch.full((2, 7, 5), 1.0)
    assert_close(guidance.guided(unet, x, 5, cond, uncond, 4.0), x * (1 + 4 * (3 - 1)))
    assert_close(guidance.guided(unet, x, 5, cond, uncond, 1.0), 3 * x)
    assert_close(guidance.guided(unet, x, 5, cond), 3 * x)
    assert_close(guidance.guided(unet, x, 5, cond, uncond, 0.0), x)
    guidance.guided(unet, x, torch.tensor([5, 6]), cond, uncond, 4.0)
    assert [n for n, _ in calls] == [4, 2, 2, 4, 4] and calls[-1][1].tolist() == [5, 6, 5, 6]
    with pytest.raises(ValueError, match="must have the same shape"):
        guidance.guided(unet, x, 5, cond, uncond[:1], 4.0)


def test_text_is_encoded_once(tiny_model, monkeypatch):
    calls = []
    forward = type(tiny_model.text_encoder).forward
    monkeypatch.setattr(type(tiny_model.text_encoder), "forward", lambda *a: calls.append(1) or forward(*a))
    text_to_image(tiny_model, PROMPT, num_inference_steps=5, progress=False)
    assert len(calls) == 1


def test_strength_zero_is_the_round_trip_through_the_vae(tiny_model):
    got = image_to_image(tiny_model, photo(), PROMPT, strength=0.0, progress=False)[0]
    want = decode(tiny_model, encode(tiny_model, to_tensor(tiny_model, photo()), generator()))
    assert got.tobytes() == to_pil(want)[0].tobytes()


@pytest.mark.parametrize("name", SAMPLERS)
def test_inpaint_keeps_the_kept_pixels_exactly(tiny_model, name):
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[5:9, 3:20] = 255  # not on the borders of latents
    options = dict(num_inference_steps=4, sampler=name, progress=False)
    got = inpaint(tiny_model, photo(), Image.fromarray(mask), PROMPT, **options)[0]
    same = (numbers(got) == numbers(photo())).all(-1)
    assert same[mask == 0].all() and not same[mask > 0].all()
    again = inpaint(tiny_model, photo(), torch.from_numpy(mask / 255.0), PROMPT, **options)[0]
    assert again.tobytes() == got.tobytes()


def test_a_thin_stroke_is_repainted(tiny_model):
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[5:7, 3:20] = 255  # between the pixels that a mask shrunk by "nearest" would look at
    a, b = (
        numbers(inpaint(tiny_model, photo(), Image.fromarray(mask), prompt, num_inference_steps=4, progress=False)[0])
        for prompt in (PROMPT, "a boat")
    )
    assert abs(a - b)[mask > 0].max() > 3 and abs(a - b)[mask == 0].max() == 0


def test_pictures_round_trip(tiny_model):
    picture = photo()
    assert to_pil(to_tensor(tiny_model, picture))[0].tobytes() == picture.tobytes()
    pixels = to_tensor(tiny_model, picture)
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.float32
    assert_close(to_tensor(tiny_model, pixels[0].double()), pixels)
    assert (
        numbers(to_pil(torch.full((1, 3, 2, 2), 100.6 / 255))[0]).tolist() == [[[101] * 3] * 2] * 2
    )  # rounded, not cut


def test_slerp():
    a, b = torch.randn(2, 3, 4, 8, 8, generator=generator())
    assert_close(slerp(a, b, 0.0), a)
    assert_close(slerp(a, b, 1.0), b)
    half = slerp(a, b, 0.5)
    for k in range(3):  # each row on its own, and as long as its ends
        assert_close(slerp(a[k : k + 1], b[k : k + 1], 0.5), half[k : k + 1])
        assert half[k].norm().item() == pytest.approx((a[k].norm() + b[k].norm()).item() / 2, rel=1e-5)
        assert torch.lerp(a, b, 0.5)[k].norm() < 0.8 * half[k].norm()
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for w in (0.25, 0.5, 0.9):  # the unit circle, at even speed
        assert_close(slerp(x, y, w), torch.tensor([math.cos(w * math.pi / 2), math.sin(w * math.pi / 2)]))
    assert_close(slerp(x, x, 0.3), x)
    assert slerp(x, -x, 0.5).isfinite().all() and slerp(x * 0, x, 0.5).isfinite().all()
    with pytest.raises(ValueError, match="of one shape"):
        slerp(a, b[:1], 0.5)


def test_interpolate_begins_and_ends_at_the_two_pictures(tiny_model):
    options = dict(num_inference_steps=4, guidance_scale=3.0, progress=False)
    film = interpolate(tiny_model, (PROMPT, "a boat"), (4, 4), frames=5, batch_size=2, **options)
    assert len(film) == 5
    for k, prompt in ((0, PROMPT), (-1, "a boat")):
        alone = text_to_image(tiny_model, prompt, seed=4, **options)[0]
        assert abs(numbers(film[k]) - numbers(alone)).max() <= 1
    film = interpolate(tiny_model, (PROMPT, PROMPT), (4, 9), frames=3, **options)
    for k, seed in ((0, 4), (-1, 9)):
        alone = text_to_image(tiny_model, PROMPT, seed=seed, **options)[0]
        assert abs(numbers(film[k]) - numbers(alone)).max() <= 1
    assert len(interpolate(tiny_model, (PROMPT, PROMPT), frames=1, **options)) == 1
    still = interpolate(tiny_model, (PROMPT, PROMPT), (4, 4), frames=3, batch_size=3, sampler="ddpm", **options)
    assert max(abs(numbers(frame) - numbers(still[0])).max() for frame in still) <= 1  # added noise, too


def test_progress_bar(tiny_model, capsys):
    text_to_image(tiny_model, PROMPT, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    text_to_image(tiny_model, PROMPT, num_inference_steps=3, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_makes_nearly_the_same_picture(tiny_model, dtype):
    half = copy.deepcopy(tiny_model).to(dtype=dtype)
    assert half.dtype == dtype and half.device.type == "cpu" and half.image_size == 32
    a, b = (numbers(text_to_image(m, PROMPT, num_inference_steps=3, progress=False)[0]) for m in (half, tiny_model))
    assert 0 < abs(a - b).mean() < 6


def test_generate_offers_the_pipeline_s_names():
    for name in ("LatentDiffusion", "Step", "encode_prompt", "decode", "to_pil"):
        assert hasattr(generate, name)
