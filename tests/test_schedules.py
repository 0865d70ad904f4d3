"""Schedules: closed forms, round trips, and diffusers' tables."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ldm_lessons import schedules
from ldm_lessons.schedules import PREDICTION_TYPES, NoiseSchedule, cosine, karras_sigmas, linear, spaced_timesteps

SD = NoiseSchedule.from_config({})


def test_stable_diffusion_numbers():
    assert SD.num_train_timesteps == 1000 and SD.alpha_bar.dtype == torch.float64
    assert_close(SD.alpha_bar[0].item(), 1 - 0.00085)
    assert_close(SD.alpha_bar[999].item(), 0.0046601, atol=5e-7, rtol=0)
    assert_close(SD.sigma[[0, 999]], torch.tensor([0.029167, 14.6146], dtype=torch.float64), atol=5e-5, rtol=0)
    assert_close(SD.snr, 1 / SD.sigma**2)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_are_those_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    config = dict(num_train_timesteps=1000, beta_start=0.001, beta_end=0.015, beta_schedule=name)
    theirs = diffusers.DDPMScheduler(**config)
    # They add up in float32: 1e-6 is their rounding, not ours.
    assert_close(NoiseSchedule.from_config(config).betas.float(), theirs.betas, atol=1e-7, rtol=2e-5)
    assert_close(NoiseSchedule.from_config(config).alpha_bar.float(), theirs.alphas_cumprod, atol=1e-6, rtol=2e-5)


def test_alpha_bar_closed_forms():
    constant = NoiseSchedule(torch.full((50,), 0.1))
    assert_close(constant.alpha_bar, 0.9 ** torch.arange(1, 51, dtype=torch.float64), rtol=1e-6, atol=0)
    u = torch.arange(1, 1000, dtype=torch.float64) / 1000  # the last beta of the cosine is capped
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    assert_close(NoiseSchedule(cosine(1000)).alpha_bar[:-1], f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [0, 517, 999, torch.tensor([3, 999]), torch.tensor([400]), torch.tensor(400)])
def test_round_trips(kind, t):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 4, 5, 5, generator=g, dtype=torch.float64)
    x_t = SD.add_noise(x0, eps, t)
    out = {"epsilon": eps, "sample": x0, "v_prediction": SD.velocity(x0, eps, t)}[kind]
    assert_close(SD.to_x0(out, x_t, t, kind), x0, atol=1e-12, rtol=1e-12)
    assert_close(SD.to_eps(out, x_t, t, kind), eps, atol=1e-12, rtol=1e-12)


def test_each_sample_has_its_own_timestep():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 5, 5, generator=g)
    t = torch.tensor([0, 500, 999])
    for rule in (SD.add_noise, SD.velocity):
        each = torch.cat([rule(x0[i : i + 1], eps[i : i + 1], int(t[i])) for i in range(3)])
        assert_close(rule(x0, eps, t), each)
    assert_close(SD.add_noise(x0, eps, t)[2].std().item(), 1.0, atol=0.1, rtol=0)


def test_add_noise_and_velocity_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 5, 5, generator=g)
    t = torch.tensor([0, 500, 999])
    assert_close(SD.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), atol=2e-6, rtol=1e-5)
    assert_close(SD.velocity(x0, eps, t), theirs.get_velocity(x0, eps, t), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_what_goes_in(dtype):
    x = torch.ones(2, 4, 3, 3, dtype=dtype)
    for t in (7, torch.tensor([7, 8])):
        assert SD.add_noise(x, x, t).dtype == dtype
        assert SD.to_x0(x, x, t, "v_prediction").dtype == dtype
        assert SD.to_eps(x, x, t, "sample").dtype == dtype


def test_a_schedule_first_used_for_pictures_can_still_train():
    schedule, t = NoiseSchedule(linear(10)), torch.tensor([3])
    with torch.inference_mode():
        schedule.add_noise(torch.ones(1), torch.ones(1), t)
    out = torch.ones(1, requires_grad=True)
    schedule.to_x0(out, torch.ones(1), t, "v_prediction").sum().backward()
    assert_close(out.grad.item(), -math.sqrt(1 - schedule.alpha_bar[3].item()))


def test_arguments_are_not_changed():
    x, eps, betas = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 2.0), linear(10)
    kept = betas.clone()
    NoiseSchedule(betas).add_noise(x, eps, 5)
    assert_close(betas, kept)
    assert bool((x == 1).all()) and bool((eps == 2).all())


@pytest.mark.parametrize("kind", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_those_of_diffusers(kind, offset):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(timestep_spacing=kind, steps_offset=offset)
    for n in [*range(1, 120), 150, 200, 250, 333, 500, 750, 999]:
        theirs.set_timesteps(n)
        # Their "trailing" has a step too many, at t = -1, for 61 and some more: np.arange rounds.
        assert np.array_equal(spaced_timesteps(kind, 1000, n, offset), theirs.timesteps[:n].numpy()), n


@pytest.mark.parametrize("kind", ["leading", "linspace", "trailing"])
def test_timesteps_stay_in_the_schedule_and_fall(kind):
    for n in range(1, 1001):
        t = spaced_timesteps(kind, 1000, n, 1)
        assert len(t) == n and 0 <= t.min() and t.max() <= 999 and (np.diff(t) < 0).all(), n


def test_karras_sigmas():
    sigmas = karras_sigmas(0.03, 14.6, 10)
    assert sigmas.dtype == torch.float64 and bool((sigmas.diff() < 0).all())
    assert_close(sigmas[[0, -1]], torch.tensor([14.6, 0.03], dtype=torch.float64))
    assert_close((sigmas ** (1 / 7)).diff(), (sigmas ** (1 / 7)).diff().mean().expand(9))  # even in sigma^(1/rho)
    theirs = pytest.importorskip("diffusers").EulerDiscreteScheduler()
    assert_close(sigmas.numpy(), theirs._convert_to_karras(torch.tensor([14.6, 0.03]), 10), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SD.add_noise(torch.ones(1), torch.ones(1), 1000), "outside this schedule's 0 .. 999"),
        (lambda: SD.add_noise(torch.ones(1), torch.ones(1), -1), "outside this schedule's 0 .. 999"),
        (lambda: SD.to_x0(torch.ones(1), torch.ones(1), 5, "eps"), "choose one of epsilon, sample, v_prediction"),
        (lambda: SD.to_eps(torch.ones(1), torch.ones(1), 5, "eps"), "choose one of epsilon, sample, v_prediction"),
        (lambda: NoiseSchedule.from_config({"beta_schedule": "sigmoid"}), "choose linear, scaled_linear"),
        (lambda: NoiseSchedule.from_config({"rescale_betas_zero_snr": True}), "trained_betas"),
        (lambda: NoiseSchedule(torch.tensor([0.1, 1.0])), "between 0 and 1"),
        (lambda: spaced_timesteps("even", 1000, 5), "choose leading, trailing or linspace"),
        (lambda: spaced_timesteps("leading", 1000, 0), "from 1 to 1000"),
        (lambda: spaced_timesteps("leading", 1000, 1001), "from 1 to 1000"),
        (lambda: spaced_timesteps("leading", 1000, 2.5), "from 1 to 1000"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        call()


def test_trained_betas():
    assert_close(NoiseSchedule.from_config({"trained_betas": [0.1, 0.2]}).alpha_bar.tolist(), [0.9, 0.72])
    assert schedules.scaled_linear(7).shape == (7,)
