"""Samplers: closed forms (constant eps, Gaussian data), parity with diffusers, and the promises in the file's top."""

import math

import pytest
import torch
from torch.testing import assert_close

from ldm_lessons.samplers import DDIM, DDPM, SAMPLERS, DPMpp2M, make_sampler
from ldm_lessons.schedules import PREDICTION_TYPES, NoiseSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
SPACINGS = ("leading", "linspace", "trailing")
STEPS = (1, 2, 3, 10, 14, 15, 20, 50, 77)
SCHEDULE = NoiseSchedule.from_config(SD)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def constant_eps(x0, eps, kind):
    """A network that knows x0 and eps: every exact sampler follows the straight line between them."""
    return lambda x, t: {"epsilon": eps, "sample": x0, "v_prediction": SCHEDULE.velocity(x0, eps, int(t))}[kind]


def wavy(x, t):
    """A network that depends on its input and its time."""
    return 0.6 * torch.sin(1.3 * x + int(t) / 300) + 0.3 * x


def run(sampler, network, x, n=None, start=0, **extra):
    """All steps from index `start`, as a diffusers pipeline makes them: returns every x."""
    if n is not None:
        sampler.set_timesteps(n)
    if start and hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(start)
    xs = []
    for t in sampler.timesteps[start:]:
        out = network(sampler.scale_model_input(x, t), t)
        x = sampler.step(out, t, x, **extra, return_dict=False)[0]
        xs.append(x)
    return torch.stack(xs)


@pytest.mark.parametrize("cls", [DDIM, DPMpp2M])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_constant_eps_is_exact_from_every_start(cls, spacing, kind):
    x0, eps = noise(2, 1, 4, 3, 3)
    for n in (1, 2, 7, 20):
        sampler = cls(timestep_spacing=spacing, prediction_type=kind)
        final = SCHEDULE.add_noise(x0, eps, 0) if cls is DDIM else x0  # DDIM ends at t = 0, as Stable Diffusion's does
        for start in range(n):
            sampler.set_timesteps(n)
            x = SCHEDULE.add_noise(x0, eps, int(sampler.timesteps[start]))
            end = run(sampler, constant_eps(x0, eps, kind), x, n, start)[-1]
            assert_close(end, final, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("cls", [DDIM, DPMpp2M, DDPM])
def test_every_step_lands_on_the_next_level(cls):
    x0, eps = noise(2, 1, 4, 3, 3)
    sampler = cls(timestep_spacing="trailing")
    sampler.set_timesteps(13)
    for start in range(12):
        t, t_next = int(sampler.timesteps[start]), int(sampler.timesteps[start + 1])
        x = SCHEDULE.add_noise(x0, eps, t)
        extra = {"variance_noise": torch.zeros_like(x)} if cls is DDPM else {}
        out = sampler.step(eps, t, x, **extra)
        assert_close(out.pred_original_sample, x0, atol=1e-11, rtol=1e-11)
        if cls is DDPM:  # E[x_prev] has all of x0's share, but less noise than the level
            share = (out.prev_sample - SCHEDULE.alpha_bar[t_next].sqrt() * x0) / eps
            assert_close(share, share.mean().expand_as(share), atol=1e-9, rtol=1e-9)
            assert 0 < share.mean() < (1 - SCHEDULE.alpha_bar[t_next]).sqrt()
        else:
            assert_close(out.prev_sample, SCHEDULE.add_noise(x0, eps, t_next), atol=1e-11, rtol=1e-11)


def gaussian_eps(mean, std):
    """The ideal network for data ~ N(mean, std^2): E[eps given x_t]."""

    def network(x, t):
        ab = SCHEDULE.alpha_bar[int(t)]
        return (1 - ab).sqrt() * (x - ab.sqrt() * mean) / (ab * std**2 + 1 - ab)

    return network


@pytest.mark.parametrize(("cls", "order"), [(DDIM, 1), (DPMpp2M, 2)])
def test_order_of_accuracy_on_gaussian_data(cls, order):
    mean, std, t_end = 0.3, 0.5, 200
    x = noise(50)
    sigma = SCHEDULE.sigma
    spread = ((std**2 + sigma[t_end] ** 2) / (std**2 + sigma[900] ** 2)).sqrt()
    ab, ab_end = SCHEDULE.alpha_bar[900], SCHEDULE.alpha_bar[t_end]
    exact = ab_end.sqrt() * (mean + (x / ab.sqrt() - mean) * spread)  # the ODE's solution, from t = 900
    errors = []
    for stride in (100, 50, 25, 10):
        sampler = cls(steps_offset=0)
        sampler.set_timesteps(1000 // stride - (cls is DPMpp2M))
        steps = sampler.timesteps.tolist()
        y, network = x, gaussian_eps(mean, std)
        for t in [t for t in steps if t_end < t <= 900]:
            y = sampler.step(network(y, t), t, y)[0]
        errors.append((y - exact).abs().max().item())
    rates = [math.log(a / b) / math.log(r) for a, b, r in zip(errors, errors[1:], (2, 2, 2.5), strict=False)]
    assert rates[-1] == pytest.approx(order, abs=0.25), (errors, rates)
    assert errors[-1] < (3e-2, 3e-3)[order - 1]


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_keeps_the_variance_of_gaussian_data(variance_type):
    std, network = 0.5, gaussian_eps(0.0, 0.5)
    sampler = DDPM(variance_type=variance_type)
    sampler.set_timesteps(1000)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    variance = 1.0
    for t in sampler.timesteps:  # a step is linear here: find its factor and its noise by probing
        sampler.set_begin_index(int((sampler.timesteps == t).nonzero()))
        factor = sampler.step(network(one, t), t, one, variance_noise=zero)[0].item()
        sampler.set_begin_index(int((sampler.timesteps == t).nonzero()))
        spread = sampler.step(network(zero, t), t, zero, variance_noise=one)[0].item()
        variance = factor**2 * variance + spread**2
    assert math.sqrt(variance) == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_ddim_with_eta_one_is_ddpm(spacing, kind):
    options = dict(timestep_spacing=spacing, prediction_type=kind)
    x = noise(2, 4, 3, 3)
    ddpm = run(DDPM(**options), wavy, x, 12, generator=torch.Generator().manual_seed(3))
    ddim = DDIM(**options, set_alpha_to_one=True)
    assert_close(run(ddim, wavy, x, 12, generator=torch.Generator().manual_seed(3), eta=1.0), ddpm)
    assert_close(run(DDIM(**options, set_alpha_to_one=True, eta=1.0), wavy, x, 12,
                     generator=torch.Generator().manual_seed(3)), ddpm)  # fmt: skip


# Parity with diffusers: whole trajectories, every step compared -----------------------------------------------------


def theirs(name, double=False, **config):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(**SD, **config)
    if double:  # their tables in float64, so that only the formulas are compared
        scheduler.alphas_cumprod = SCHEDULE.alpha_bar.clone()
        if hasattr(scheduler, "final_alpha_cumprod") and not config.get("set_alpha_to_one", True):
            scheduler.final_alpha_cumprod = SCHEDULE.alpha_bar[0]
    return scheduler


def compare(ours, reference, n, x, tolerance, noisy=False, **extra):
    results = []
    for sampler in (ours, reference):
        seed = {"generator": torch.Generator().manual_seed(7)} if noisy else {}
        results.append(run(sampler, wavy, x, n, **seed, **extra))
    assert ours.timesteps.tolist() == reference.timesteps.tolist()
    assert_close(*results, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_is_that_of_diffusers(spacing, kind, variance_type):
    config = dict(timestep_spacing=spacing, prediction_type=kind, variance_type=variance_type, clip_sample=False)
    for n in STEPS:
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            reference = theirs("DDPMScheduler", dtype == torch.float64, **config)
            compare(DDPM(**config), reference, n, noise(2, 4, 4, 4, dtype=dtype), tolerance, noisy=True)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_that_of_diffusers(spacing, kind, to_one, eta):
    config = dict(timestep_spacing=spacing, prediction_type=kind, set_alpha_to_one=to_one, clip_sample=False)
    for n in STEPS:
        even = spacing == "leading" or (spacing == "trailing" and 1000 % n == 0)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            reference = theirs("DDIMScheduler", dtype == torch.float64, **config)
            for previous in ["stride", "next"] if even else ["stride"]:
                ours = DDIM(**config, previous=previous)
                compare(ours, reference, n, noise(2, 4, 4, 4, dtype=dtype), tolerance, noisy=eta > 0, eta=eta)


def test_clipping_is_that_of_diffusers():
    for cls, name in ((DDPM, "DDPMScheduler"), (DDIM, "DDIMScheduler")):
        config = dict(clip_sample=True, clip_sample_range=0.7)
        if cls is DDIM:
            config["set_alpha_to_one"] = True
        compare(cls(**config), theirs(name, True, **config), 20, noise(2, 4, 4, 4), 1e-9, noisy=cls is DDPM)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("lower", [True, False])
def test_dpmpp_2m_is_that_of_diffusers(spacing, kind, final, lower):
    config = dict(timestep_spacing=spacing, prediction_type=kind, final_sigmas_type=final, lower_order_final=lower)
    for n in STEPS:  # theirs computes in float32 whatever goes in
        reference = theirs("DPMSolverMultistepScheduler", **config)
        compare(DPMpp2M(**config), reference, n, noise(2, 4, 4, 4, dtype=torch.float32), 5e-5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_starting_in_the_middle_is_that_of_diffusers(name):
    cls = {"DDIMScheduler": DDIM, "DPMSolverMultistepScheduler": DPMpp2M}[name]
    extra = {"clip_sample": False, "set_alpha_to_one": False} if cls is DDIM else {}
    for start in (1, 6, 18, 19):
        x = noise(2, 4, 4, 4, dtype=torch.float32)
        a = run(cls(timestep_spacing="leading", **extra), wavy, x, 20, start)
        b = run(theirs(name, timestep_spacing="leading", **extra), wavy, x, 20, start)
        assert_close(a, b, atol=5e-5, rtol=5e-5)


def test_a_seed_per_sample():
    x = noise(3, 4, 2, 2, dtype=torch.float32)
    seeds = [torch.Generator().manual_seed(s) for s in (5, 6, 7)]
    together = run(DDPM(), wavy, x, 5, generator=seeds)[-1]
    for k, seed in enumerate((5, 6, 7)):
        alone = run(DDPM(), wavy, x[k : k + 1], 5, generator=torch.Generator().manual_seed(seed))[-1]
        assert_close(together[k : k + 1], alone)


# Promises ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_timestep_out_of_turn_forgets_the_history(name):
    sampler, x = make_sampler(name), noise(1, 4, 3, 3)
    sampler.set_timesteps(10)
    steps = sampler.timesteps

    def one(t, y):
        extra = {"variance_noise": torch.zeros_like(y)} if name == "ddpm" else {}
        return sampler.step(wavy(y, t), t, y, **extra)[0]

    fresh = one(steps[4], x)
    for t in steps[5:8]:
        one(t, x)
    assert_close(one(steps[4], x), fresh)  # back again, as resampling does
    sampler.set_timesteps(10)
    assert_close(one(steps[4], x), fresh)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_the_sum_is_made_in_float32(name, dtype):
    x = noise(2, 4, 4, 4)
    kept, extra = x.to(dtype).clone(), {"generator": torch.Generator()} if name == "ddpm" else {}
    sampler = make_sampler(name)
    sampler.set_timesteps(4)
    t = sampler.timesteps[0]
    given, out = x.to(dtype), wavy(x, t).to(dtype)
    result = sampler.step(out, t, given, **extra)
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
    assert torch.equal(given, kept)
    if name != "ddpm":
        sampler.set_timesteps(4)
        exact = sampler.step(out.double(), t, given.double())[0]
        assert_close(result.prev_sample.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_options_pass_through_a_configuration(name):
    sampler = make_sampler(name, prediction_type="v_prediction", timestep_spacing="trailing", num_train_timesteps=500)
    again = type(sampler).from_config(dict(sampler.config) | {"_class_name": "PNDMScheduler", "foreign": 3})
    assert dict(again.config) == dict(sampler.config)
    assert again.config.prediction_type == "v_prediction" and again.config.get("foreign") is None
    assert type(sampler).from_config(sampler.config, timestep_spacing="leading").config.timestep_spacing == "leading"
    assert sampler.config["steps_offset"] == 1 and sampler.order >= 1 and sampler.init_noise_sigma > 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: make_sampler("dpm"), ValueError, "unknown sampler 'dpm': choose one of ddpm, ddim"),
        (lambda: DDIM(etaa=1), ValueError, "DDIM has no option 'etaa'"),
        (lambda: DDIM(prediction_type="eps"), ValueError, "choose one of epsilon, sample, v_prediction"),
        (lambda: DDPM(variance_type="learned"), ValueError, "choose fixed_small or fixed_large"),
        (lambda: DDIM.from_config({"thresholding": True}), ValueError, "DDIM cannot do thresholding"),
        (lambda: DDIM().step(torch.ones(1), 1, torch.ones(1)), RuntimeError, "call set_timesteps"),
        (lambda: DDIM().set_timesteps(0), ValueError, "from 1 to 1000"),
        (lambda: DPMpp2M().set_timesteps(1001), ValueError, "from 1 to 1000"),
        (lambda: DPMpp2M(timestep_spacing="x").set_timesteps(5), ValueError, "choose leading, trailing or linspace"),
    ],
)
def test_mistakes_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_timestep_from_elsewhere_is_named(name):
    sampler = make_sampler(name)
    sampler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep 7 is not one of"):
        sampler.step(torch.ones(1), 7, torch.ones(1))
