"""Samplers: closed forms (constant eps, Gaussian data), parity with diffusers, and the promises in the file's top."""

import math

import pytest
import torch
from torch.testing import assert_close

from ldm_lessons.samplers import (
    DDIM,
    DDPM,
    LMS,
    PNDM,
    SAMPLERS,
    DPMpp2M,
    Euler,
    EulerAncestral,
    Heun,
    make_sampler,
)
from ldm_lessons.schedules import PREDICTION_TYPES, NoiseSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
SPACINGS = ("leading", "linspace", "trailing")
STEPS = (1, 2, 3, 10, 14, 15, 20, 50, 77)
NOISY = ("ddpm", "euler_ancestral")
SCHEDULE = NoiseSchedule.from_config(SD)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def constant_eps(x0, eps, kind):
    """A network that knows x0 and eps: every exact sampler follows the straight line between them."""
    return lambda x, t: {"epsilon": eps, "sample": x0, "v_prediction": SCHEDULE.velocity(x0, eps, int(t))}[kind]


def straight(sampler, x0, eps, kind):
    """The same for levels between the integers, and for any prediction type."""

    def network(x, t):
        one = torch.ones(1, dtype=torch.float64)
        a = sampler.add_noise(one, 0 * one, t)
        return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - (1 - a * a) ** 0.5 * x0}[kind]

    return network


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


EXACT = [  # no noise added, so that the straight line between x0 and eps is followed to its end
    pytest.param(cls, options, id=cls.__name__ + "-" + "-".join(options))
    for cls, options in [
        (DDIM, {}), (DDIM, dict(set_alpha_to_one=True)), (PNDM, {}), (PNDM, dict(skip_prk_steps=False)),
        *[(cls, karras) for cls in (LMS, Euler, Heun, DPMpp2M) for karras in ({}, dict(use_karras_sigmas=True))],
    ]
]  # fmt: skip


@pytest.mark.parametrize(("cls", "options"), EXACT)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_constant_eps_is_exact_from_every_start(cls, options, spacing, kind):
    x0, eps = noise(2, 1, 4, 3, 3)
    for n in (1, 2, 7, 20):
        sampler = cls(timestep_spacing=spacing, prediction_type=kind, **options)
        if cls is PNDM and n < 4 and options:
            continue
        to_zero = cls not in (DDIM, PNDM) or options.get("set_alpha_to_one")
        final = x0 if to_zero else SCHEDULE.add_noise(x0, eps, 0)  # at t = 0, as Stable Diffusion's does
        sampler.set_timesteps(n)
        for start in range(len(sampler.timesteps)):
            sampler.set_timesteps(n)
            sampler.set_begin_index(start)
            x = sampler.add_noise(x0, eps, sampler.timesteps[start])
            network = straight(sampler, x0, eps, kind)
            assert_close(run(sampler, network, x, n, start)[-1], final, atol=1e-10, rtol=1e-10)


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


@pytest.mark.parametrize(
    ("cls", "options", "order"),
    [
        (DDIM, {}, 1), (Euler, {}, 1), (Heun, {}, 2), (DPMpp2M, {}, 2), (LMS, {}, 4),
        (PNDM, {}, 2), (PNDM, dict(skip_prk_steps=False), 2),
    ],
)  # fmt: skip
def test_order_of_accuracy_on_gaussian_data(cls, options, order):
    """The error left when the steps get shorter; methods with a memory are given exact values to begin with."""
    mean, std, t_end = 0.3, 0.5, 200
    start, sigma = noise(50), SCHEDULE.sigma

    def exact(t):  # the ODE's solution from t = 900, where y = x / a moves towards the mean as the spread shrinks
        spread = ((std**2 + sigma[t] ** 2) / (std**2 + sigma[900] ** 2)).sqrt()
        return SCHEDULE.alpha_bar[t].sqrt() * (mean + (start / SCHEDULE.alpha_bar[900].sqrt() - mean) * spread)

    errors, network = [], gaussian_eps(mean, std)
    for stride in (50, 25, 10, 5):
        sampler = cls(steps_offset=0, **options)
        sampler.set_timesteps(1000 // stride - (cls is DPMpp2M))
        steps = sampler.timesteps.tolist()
        first, last = len(steps) - 1 - steps[::-1].index(900), steps.index(t_end)
        sampler.set_begin_index(first)
        y = start
        for i in range(first, last):
            y = sampler.step(network(y, steps[i]), steps[i], y)[0]
            if i < first + 3 and cls in (LMS, DPMpp2M):
                y = exact(steps[i + 1])
        errors.append((y - exact(t_end)).abs().max().item())
    rates = [math.log(a / b) / math.log(r) for a, b, r in zip(errors, errors[1:], (2, 2.5, 2), strict=False)]
    assert rates[-1] == pytest.approx(order, abs=0.25), (errors, rates)


POINTS = torch.tensor([[-2.0, 0.5], [-0.7, -1.6], [0.0, 1.8], [0.9, -0.2], [1.7, 1.1], [2.2, -1.4]]).double() / 1.5


def of_points(x, t):
    """The ideal network for data that is one of POINTS (arXiv:2206.00364 eq. (57)): x0 is their weighted mean."""
    ab = SCHEDULE.alpha_bar[int(t)]
    distance = (x[:, None] - ab.sqrt() * POINTS).square().sum(-1)  # (B, points)
    x0 = (-distance / (2 * (1 - ab))).softmax(1) @ POINTS
    return (x - ab.sqrt() * x0) / (1 - ab).sqrt()


def nearest(x):
    distance = (x[:, None] - POINTS).norm(dim=-1)
    return distance.argmin(1), distance.min(1).values


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_ideal_denoiser_leads_back_to_its_data(name):
    x = noise(200, 2)
    exact, _ = nearest(run(DDIM(timestep_spacing="trailing"), of_points, x, 1000)[-1])
    extra = {"generator": torch.Generator().manual_seed(1)} if name in NOISY else {}
    found, distance = nearest(run(make_sampler(name, timestep_spacing="trailing"), of_points, x, 50, **extra)[-1])
    assert distance.quantile(0.9) < 0.15  # DDIM and PNDM keep t = 0's noise, 0.03, and those with a memory overshoot
    assert len(found.unique()) == len(POINTS)
    if name not in NOISY:  # the ODE leads each start to one point
        assert (found == exact).double().mean() > 0.93


@pytest.mark.parametrize(("name", "cls"), [("LMSDiscreteScheduler", LMS), ("PNDMScheduler", PNDM)])
def test_starting_in_the_middle_where_diffusers_is_wrong(name, cls):
    """Started at step 20 of 50 with constant eps, theirs count their order from the index or the first call."""
    x0, eps = noise(2, 1, 4, 3, 3)
    ours, reference = cls(timestep_spacing="leading"), theirs(name, timestep_spacing="leading")
    errors = []
    for sampler in (ours, reference):
        sampler.set_timesteps(50)
        sampler.set_begin_index(20) if hasattr(sampler, "set_begin_index") else None
        x = sampler.add_noise(x0, eps, sampler.timesteps[20:21])
        end = run(sampler, lambda x, t: eps, x, 50, 20)[-1]
        final = SCHEDULE.add_noise(x0, eps, 0) if cls is PNDM else x0
        errors.append((end - final).abs().max().item())
    assert errors[0] < 1e-10 and errors[1] > 0.05


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
    scheduler = getattr(diffusers, name)(**SD | config)
    if double:  # their tables in float64, so that only the formulas are compared
        scheduler.alphas_cumprod = NoiseSchedule.from_config(SD | config).alpha_bar
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


@pytest.mark.parametrize("prk", [False, True])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_pndm_is_that_of_diffusers(prk, to_one, spacing):
    config = dict(skip_prk_steps=not prk, set_alpha_to_one=to_one, timestep_spacing=spacing)
    for n in STEPS:  # theirs steps T // n down whatever the spacing is, so only where that is right
        if (prk and n < 4) or (spacing == "trailing" and 1000 % n):
            continue
        if prk and 1000 // n % 2:  # theirs goes down by half of the odd stride, and asks the network one step off
            continue
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            reference = theirs("PNDMScheduler", dtype == torch.float64, **config)
            compare(PNDM(**config), reference, n, noise(2, 4, 4, 4, dtype=dtype), tolerance)


def run_theirs(reference, x, **extra):
    """A trajectory of diffusers' samplers in y = x / a, in our coordinate."""
    reference.sigmas = reference.sigmas.double()  # differences of large sigmas in float32 would hide the formulas
    scale = (reference.sigmas**2 + 1).sqrt()
    ys = run(reference, wavy, x * scale[0].item(), **extra)
    return torch.stack([y / scale[i + 1].item() for i, y in enumerate(ys)])


@pytest.mark.parametrize("name", ["LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_samplers_in_sigma_are_those_of_diffusers(name, spacing, kind, karras, schedule):
    cls = {"LMSDiscrete": LMS, "EulerDiscrete": Euler, "EulerAncestralDiscrete": EulerAncestral, "HeunDiscrete": Heun}[
        name
    ]
    if cls is EulerAncestral and (karras or kind == "sample"):
        return  # theirs cannot
    config = dict(timestep_spacing=spacing, prediction_type=kind, beta_schedule=schedule)
    config |= {} if cls is EulerAncestral else dict(use_karras_sigmas=karras)
    for n in STEPS:
        single = cls in (Euler, EulerAncestral)  # theirs computes in float32 whatever goes in
        x, ours = noise(2, 4, 4, 4, dtype=torch.float32 if single else torch.float64), cls(**config)
        seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
        extra = [dict(generator=seed) if cls is EulerAncestral else {} for seed in seeds]
        reference = theirs(name + "Scheduler", True, **config)
        reference.set_timesteps(n)
        if -1 in reference.timesteps:  # theirs, trailing: the rounding of 1000 / n makes a timestep too many
            continue
        b = run_theirs(reference, x, **extra[1])
        a = run(ours, wavy, x, n, **extra[0])
        assert ours.timesteps.tolist() == pytest.approx(reference.timesteps.tolist(), abs=2e-3)
        precision = 2e-6 * reference.sigmas[0].item() if single else 0.0  # y is sigma times larger than x
        assert (a - b).abs().max() < (2e-5 + precision) * max(1, a.abs().max())


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
    for karras in (False, True):
        config["use_karras_sigmas"] = karras
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
        extra = {"variance_noise": torch.zeros_like(y)} if name in NOISY else {}
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
    kept, extra = x.to(dtype).clone(), {"generator": torch.Generator()} if name in NOISY else {}
    sampler = make_sampler(name)
    sampler.set_timesteps(4)
    t = sampler.timesteps[0]
    given, out = x.to(dtype), wavy(x, t).to(dtype)
    result = sampler.step(out, t, given, **extra)
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
    assert torch.equal(given, kept)
    if name not in NOISY:
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
