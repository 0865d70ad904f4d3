"""Samplers: from a network's outputs at a few noise levels to a picture.

One coordinate for all of them: x_t = a x0 + s eps with a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar), so that a^2 + s^2
= 1 and the network takes x_t as it is (the symbols are those of schedules.py). A level is named by sigma = s / a, which
falls from about 14.6 to 0; then a = 1 / sqrt(1 + sigma^2). In y = x_t / a every sampler here solves

    dy / dsigma = eps(x_t, t)                                                         arXiv:2010.02502 eq. (14)

and they differ in how they use the eps (or x0) of this step and of earlier ones, and in the noise they add.

    level by level       DDIM = Euler, DDPM = Euler ancestral (they differ in the levels that they visit)
    there and back       Heun, PNDM's warm-up: a step again and again with better eps, several network calls
    with a memory        PNDM (after its warm-up), LMS, DPM-Solver++(2M): eps or x0 of earlier steps

A sampler is what a diffusers pipeline needs of a scheduler, so `pipe.scheduler = DDIM()` works, and no more:
`config`, `order`, `init_noise_sigma`, `set_timesteps(n)`, `timesteps`, `scale_model_input(x, t)`, `step(out, t, x)`,
`add_noise(x0, noise, t)`, `set_begin_index(i)`. Steps may begin at any index; the order of a multistep method comes
from the history it has, never from the index. Coefficients are float64; noise is drawn by a CPU generator, so that a
seed means the same picture on every device. Derived in lessons 02 (DDPM) and 09.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm_lessons.schedules import (
    NoiseSchedule,
    karras_sigmas,
    known_prediction,
    spaced_timesteps,
    to_eps,
    to_x0,
)

Generators = torch.Generator | list[torch.Generator] | None


class StepOutput(NamedTuple):
    """What `step` returns: x at the next level, and the x0 that the network predicts; both like the step's input."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Config(SimpleNamespace):
    """A sampler's options, as attributes and as a mapping."""

    def __getitem__(self, key: str) -> Any:
        return vars(self)[key]

    def get(self, key: str, default: Any = None) -> Any:
        return vars(self).get(key, default)

    def keys(self) -> Any:
        return vars(self).keys()


class _Sampler:
    """What the samplers share: options, timesteps, levels, and the place in them."""

    order = 1  # network calls per step
    init_noise_sigma = 1.0  # scale of the noise to begin with
    options: dict[str, Any] = dict(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", trained_betas=None,
        prediction_type="epsilon", timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip

    def __init__(self, **config: Any) -> None:
        unknown = sorted(set(config) - set(self.options))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {unknown[0]!r}: it has {', '.join(self.options)}.")
        self.config = Config(**{**self.options, **config})
        known_prediction(self.config.prediction_type)
        self.schedule = NoiseSchedule.from_config(self.config)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.schedule.num_train_timesteps - 1, -1, -1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> _Sampler:
        """Make one from another scheduler's options (a dict, or `pipe.scheduler.config`); foreign keys are left out.

        Raises ValueError where leaving an option out would silently give other pictures.
        """
        for key in ("thresholding", "rescale_betas_zero_snr", "use_karras_sigmas"):
            if config.get(key) and key not in cls.options:
                raise ValueError(f"{cls.__name__} cannot do {key}: set it to False in the configuration.")
        return cls(**{key: config[key] for key in config.keys() if key in cls.options} | changes)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps, from noisy to clean. Raises ValueError for a number outside 1 .. T."""
        steps, sigmas = self._levels(num_inference_steps)
        whole = bool((steps == steps.round()).all())
        self.timesteps = torch.tensor(steps.tolist(), dtype=torch.int64 if whole else torch.float32, device=device)
        self._t: list[float] = self.timesteps.tolist()
        self._sigmas: list[float] = [*sigmas.tolist(), self._final_sigma()]
        self.num_inference_steps = num_inference_steps
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Let the next step be the one at this index of `timesteps`, with no history."""
        self._index, self._history = begin_index, []

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input for x_t: x_t itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """x_t from x0 and eps (B, ...) at timesteps, a number or (B,) or (1,): this sampler's own, or integers."""
        ts = timesteps.flatten().tolist() if isinstance(timesteps, Tensor) else [timesteps]
        if self.num_inference_steps is None or not set(ts) <= set(self._t):
            return self.schedule.add_noise(original_samples, noise, timesteps)
        here = self._t[self._index] if self._index < len(self._t) else None
        levels = [_level(self._sigmas[self._index if t == here else self._t.index(t)]) for t in ts]
        a, s = (
            torch.tensor(levels, dtype=torch.float64)
            .to(original_samples)
            .T.reshape(2, -1, *[1] * (original_samples.ndim - 1))
        )
        return a * original_samples + s * noise

    def _levels(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps to visit, and their sigmas."""
        c = self.config
        steps = spaced_timesteps(c.timestep_spacing, c.num_train_timesteps, n, c.steps_offset)
        return steps, self.schedule.sigma.numpy()[steps]

    def _final_sigma(self) -> float:
        return 0.0

    def _begin(self, out: Tensor, timestep: int | Tensor, sample: Tensor) -> tuple[int, Tensor, Tensor]:
        """This step's index, and out and sample in at least float32. A timestep out of turn starts a new history."""
        if self.num_inference_steps is None:
            raise RuntimeError(f"call set_timesteps(n) on this {type(self).__name__} before its first step.")
        t = float(timestep)
        if self._index >= len(self._t) or self._t[self._index] != t:
            if t not in self._t:
                raise ValueError(f"timestep {t:g} is not one of this sampler's timesteps: take them from `.timesteps`.")
            self.set_begin_index(self._t.index(t))
        index, self._index = self._index, self._index + 1
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return index, out.to(dtype), sample.to(dtype)


def _level(sigma: float) -> tuple[float, float]:
    """a and s of the level sigma."""
    a = 1 / math.sqrt(1 + sigma**2)
    return a, sigma * a


def _transfer(x: Tensor, eps: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """DDIM's step (arXiv:2010.02502 eq. (13)), shared by most: x at sigma_next, along eps; exact for a constant one."""
    a, a_next = _level(sigma)[0], _level(sigma_next)[0]
    return torch.add((a_next / a) * x, eps, alpha=a_next * (sigma_next - sigma))


def randn(shape: Sequence[int], generator: Generators = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise (B, ...) on the CPU, from one generator, or from a list with one for each sample."""
    if isinstance(generator, list):
        return torch.cat([randn((1, *shape[1:]), one, dtype) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype).cpu()


class DDPM(_Sampler):
    """Ancestral sampling from the posterior q(x_prev given x_t, x0) (arXiv:2006.11239 eq. (7)).

    Options besides the shared ones: `variance_type`, "fixed_small" (the posterior's variance) or "fixed_large" (beta);
    `clip_sample`, x0 held in [-clip_sample_range, clip_sample_range], for pixels only.
    """

    options = _Sampler.options | dict(variance_type="fixed_small", clip_sample=False, clip_sample_range=1.0)

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        if self.config.variance_type not in ("fixed_small", "fixed_large"):
            raise ValueError(f"unknown variance_type {self.config.variance_type!r}: choose fixed_small or fixed_large.")

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True,
    ) -> StepOutput:  # fmt: skip
        """One step to the next timestep, all (B, ...). The noise is `variance_noise`, or drawn by `generator`."""
        i, out, x = self._begin(model_output, timestep, sample)
        (a, s), (a_next, s_next) = _level(self._sigmas[i]), _level(self._sigmas[i + 1])
        x0 = _clip(to_x0(out, x, a, s, self.config.prediction_type), self.config)
        alpha = (a / a_next) ** 2  # of the whole stride, like beta = 1 - alpha
        mean = (a_next * (1 - alpha) / s**2) * x0 + (math.sqrt(alpha) * s_next**2 / s**2) * x  # eq. (7)
        variance = (1 - alpha) * (1.0 if self.config.variance_type == "fixed_large" else s_next**2 / s**2)
        if timestep > 0 and variance > 0:
            noise = randn(x.shape, generator, x.dtype).to(x.device) if variance_noise is None else variance_noise
            mean = mean + math.sqrt(variance) * noise
        return StepOutput(mean.to(sample.dtype), x0.to(sample.dtype))


class DDIM(_Sampler):
    """Denoising diffusion implicit models (arXiv:2010.02502 eq. (12) and (16)): with eta 0 no noise, with eta 1 DDPM.

    Options besides the shared ones: `set_alpha_to_one`, whether the last step ends without noise (or at t = 0, as in
    Stable Diffusion); `eta`; `clip_sample` as in DDPM; `previous`: a step ends at the next of the timesteps ("next"),
    or T // n below its own ("stride"). diffusers does the latter, which misses the level of the next step unless the
    spacing is even: with "leading", or "trailing" and n a divisor of T, both are the same.
    """

    options = _Sampler.options | dict(
        set_alpha_to_one=False, eta=0.0, clip_sample=False, clip_sample_range=1.0, previous="next"
    )

    def _final_sigma(self) -> float:
        return 0.0 if self.config.set_alpha_to_one else float(self.schedule.sigma[0])

    def _next_sigma(self, i: int) -> float:
        if self.config.previous == "next":
            return self._sigmas[i + 1]
        t = self._t[i] - self.config.num_train_timesteps // len(self._t)
        return float(self.schedule.sigma[t]) if t >= 0 else self._final_sigma()

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, eta: float | None = None,
        generator: Generators = None, variance_noise: Tensor | None = None, return_dict: bool = True,
    ) -> StepOutput:  # fmt: skip
        """One step to the next timestep, all (B, ...). Noise if eta > 0: `variance_noise`, or from `generator`."""
        i, out, x = self._begin(model_output, timestep, sample)
        (a, s), (a_next, s_next) = _level(self._sigmas[i]), _level(self._next_sigma(i))
        kind, eta = self.config.prediction_type, self.config.eta if eta is None else eta
        x0, eps = _clip(to_x0(out, x, a, s, kind), self.config), to_eps(out, x, a, s, kind)
        x = _ddim(x0, eps, (a, s), (a_next, s_next), eta, generator, variance_noise)
        return StepOutput(x.to(sample.dtype), x0.to(sample.dtype))


def _ddim(
    x0: Tensor, eps: Tensor, level: tuple[float, float], level_next: tuple[float, float], eta: float,
    generator: Generators, variance_noise: Tensor | None,
) -> Tensor:  # fmt: skip
    """arXiv:2010.02502 eq. (12): towards x0, back along eps, and eta's share of the noise is new."""
    (a, s), (a_next, s_next) = level, level_next
    std = eta * s_next / s * math.sqrt(max(0.0, 1 - (a / a_next) ** 2))  # eq. (16)
    x = a_next * x0 + math.sqrt(s_next**2 - std**2) * eps
    if std > 0:
        noise = randn(x.shape, generator, x.dtype).to(x.device) if variance_noise is None else variance_noise
        x = x + std * noise
    return x


class PNDM(_Sampler):
    """Pseudo numerical methods for diffusion models (arXiv:2202.09778): Adams-Bashforth in eps, DDIM's transfer.

    Each step follows a mean of this eps and up to three earlier ones (eq. (12)). To have earlier ones, it warms up: a
    round of network calls makes one step several times over from the same x. Options besides the shared ones:
    `skip_prk_steps`, whether that is one round of two calls for the first step (as Stable Diffusion does) or three
    rounds of Runge-Kutta's four (eq. (13)), which need 4 steps or more; `set_alpha_to_one` as in DDIM.
    """

    options = _Sampler.options | dict(skip_prk_steps=True, set_alpha_to_one=False)
    memory = 4  # how many eps a step may follow
    warm_up: tuple[float, ...] = (1 / 2, 1 / 2)  # the weights of a round's calls

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Let the next step be the one at this index of `timesteps`, with no history."""
        super().set_begin_index(begin_index)
        self._held: tuple[Tensor, float, Tensor] | None = None  # a round's first x, its sigma, the weighted eps so far

    def _final_sigma(self) -> float:
        return 0.0 if self.config.set_alpha_to_one else float(self.schedule.sigma[0])

    def _levels(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        steps = super()._levels(n)[0].tolist()
        visits, self._calls = [], []  # the timestep of each call, and the call's place in its round
        if self.config.skip_prk_steps:
            rounds = min(n - 1, 1)
            visits += steps[:2] * rounds
        elif n < 4:
            raise ValueError(f"PNDM with skip_prk_steps=False needs 4 steps or more, not {n}.")
        else:
            rounds, self.warm_up = 3, (1 / 6, 1 / 3, 1 / 3, 1 / 6)
            for t, t_next in zip(steps[:3], steps[1:], strict=False):
                visits += [t, *[t_next + (t - t_next) // 2] * 2, t_next]
        self._calls += [*range(len(self.warm_up))] * rounds
        visits += steps[rounds:]
        self._calls += [None] * (n - rounds)
        return np.array(visits), self.schedule.sigma.numpy()[visits]

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> StepOutput:
        """One network call's worth of a step, all (B, ...): x at the level of the next of `timesteps`."""
        i, out, x = self._begin(model_output, timestep, sample)
        sigma, sigma_next, call = self._sigmas[i], self._sigmas[i + 1], self._calls[i]
        eps = to_eps(out, x, *_level(sigma), self.config.prediction_type)
        x0 = _transfer(x, eps, sigma, 0.0)
        if not call:  # the first call of a round, or one that is alone: its eps is remembered
            self._history = [*self._history, eps][-self.memory :]
        if call == 0:
            self._held = (x, sigma, self.warm_up[0] * eps)
        elif call is None:
            eps = _adams_bashforth(self._history)
        elif self._held is not None:  # else the first step is in the middle of a round, and follows its own eps
            x, sigma, total = self._held
            total = torch.add(total, eps, alpha=self.warm_up[call])
            self._held = (x, sigma, total)
            eps = total if call == len(self.warm_up) - 1 else eps
        x = _transfer(x, eps, sigma, sigma_next)
        return StepOutput(x.to(sample.dtype), x0.to(sample.dtype))


def _adams_bashforth(eps: list[Tensor]) -> Tensor:
    """The mean of 1 to 4 eps, oldest first, that polynomials in equal steps would have (arXiv:2202.09778 eq. (12))."""
    weights = ((1,), (-1 / 2, 3 / 2), (5 / 12, -16 / 12, 23 / 12), (-9 / 24, 37 / 24, -59 / 24, 55 / 24))
    return sum(w * e for w, e in zip(weights[len(eps) - 1], eps, strict=True))


class Euler(_Sampler):
    """Euler's method for dy / dsigma (arXiv:2206.00364 algorithm 1 without its second-order part).

    The step is DDIM's; the levels need not be those of integers t: "linspace" cuts [0, T - 1] into equal parts, and
    `use_karras_sigmas` spaces the sigmas as in arXiv:2206.00364 eq. (5). The last step ends without noise.
    """

    options = _Sampler.options | dict(use_karras_sigmas=False)

    @property
    def init_noise_sigma(self) -> float:
        """Scale of the noise to begin with: diffusers leaves out x0's share where the first level is the noisiest."""
        first = 1.0 if self.num_inference_steps is None else _level(self._sigmas[0])[1]
        return 1.0 if self.config.timestep_spacing == "leading" else first

    def _levels(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        table = self.schedule.sigma.numpy()
        every, (steps, sigmas) = np.arange(len(table)), super()._levels(n)
        if self.config.timestep_spacing == "linspace":
            steps = np.linspace(0, len(table) - 1, n)[::-1]
            sigmas = np.interp(steps, every, table)
        if self.config.use_karras_sigmas:
            sigmas = karras_sigmas(sigmas[-1], sigmas[0], n).numpy()
            steps = np.interp(np.log(sigmas), np.log(table), every)
        return steps, sigmas

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> StepOutput:
        """One step to the next timestep, all (B, ...)."""
        i, out, x = self._begin(model_output, timestep, sample)
        a, s = _level(self._sigmas[i])
        x0, eps = (to(out, x, a, s, self.config.prediction_type) for to in (to_x0, to_eps))
        x = _transfer(x, self._slope(i, eps), self._sigmas[i], self._sigmas[i + 1])
        return StepOutput(x.to(sample.dtype), x0.to(sample.dtype))

    def _slope(self, i: int, eps: Tensor) -> Tensor:
        """What to follow from sigma i to the next."""
        return eps


class LMS(Euler):
    """Linear multistep, "K-LMS": the polynomial through up to 4 eps, integrated over the step (as in k-diffusion).

    It differs from PNDM's in taking the levels as they are, not as if they were equal steps. Options as in Euler.
    """

    def _slope(self, i: int, eps: Tensor) -> Tensor:
        sigma, sigma_next = self._sigmas[i], self._sigmas[i + 1]
        self._history = [*self._history, (eps, sigma)][-4:]
        nodes = [s for _, s in self._history]
        middle, half = (sigma_next + sigma) / 2, (sigma_next - sigma) / 2
        points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))  # Gauss: exact up to degree 3
        weights = [
            sum(math.prod((p - m) / (node - m) for m in nodes if m != node) for p in points) / 2 for node in nodes
        ]
        return sum(w * e for w, (e, _) in zip(weights, self._history, strict=True))


class EulerAncestral(Euler):
    """Euler's method to a level below the next one, and noise up to that: DDPM's step. Options as in Euler."""

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True,
    ) -> StepOutput:  # fmt: skip
        """One step to the next timestep, all (B, ...). The noise is `variance_noise`, or drawn by `generator`."""
        i, out, x = self._begin(model_output, timestep, sample)
        (a, s), (a_next, s_next) = _level(self._sigmas[i]), _level(self._sigmas[i + 1])
        x0, eps = (to(out, x, a, s, self.config.prediction_type) for to in (to_x0, to_eps))
        x = _ddim(x0, eps, (a, s), (a_next, s_next), 1.0, generator, variance_noise)
        return StepOutput(x.to(sample.dtype), x0.to(sample.dtype))


class Heun(PNDM, Euler):
    """Heun's method (arXiv:2206.00364 algorithm 1): each step twice, the second time with the mean of both ends' eps.

    The last step, to sigma 0, is Euler's. Options as in Euler. A step is two network calls, so `timesteps` has 2n - 1.
    """

    options = Euler.options
    order = 2
    memory = 1

    def _final_sigma(self) -> float:
        return 0.0

    def _levels(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        self._calls = [0, 1] * (n - 1) + [None]
        return tuple(np.repeat(values, 2)[1:] for values in Euler._levels(self, n))


class DPMpp2M(_Sampler):
    """DPM-Solver++(2M): second order in log sigma, from the x0 of two steps (arXiv:2211.01095 algorithm 2).

    Options besides the shared ones: `final_sigmas_type`, "zero" or "sigma_min" (the level of t = 0), and
    `use_karras_sigmas`. The last step is of first order when it ends at zero, where log sigma does not exist, and when
    there are fewer than 15 steps. The timesteps are the n noisiest of n + 1, as in diffusers.
    """

    options = _Sampler.options | dict(final_sigmas_type="zero", lower_order_final=True, use_karras_sigmas=False)

    def _levels(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        c, sigma = self.config, self.schedule.sigma.numpy()
        if c.use_karras_sigmas:
            super()._levels(n)  # for its checks
            sigmas = karras_sigmas(sigma[0], sigma[-1], n).numpy()
            return np.interp(np.log(sigmas), np.log(sigma), np.arange(len(sigma))).round(), sigmas
        steps, sigmas = super()._levels(n)
        if c.timestep_spacing != "trailing" and n < c.num_train_timesteps:
            steps, sigmas = super()._levels(n + 1)
        return steps[:n], sigmas[:n]

    def _final_sigma(self) -> float:
        return 0.0 if self.config.final_sigmas_type == "zero" else float(self.schedule.sigma[0])

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> StepOutput:
        """One step to the next timestep, all (B, ...)."""
        i, out, x = self._begin(model_output, timestep, sample)
        sigma, sigma_next = self._sigmas[i], self._sigmas[i + 1]
        (a, s), (a_next, s_next) = _level(sigma), _level(sigma_next)
        x0 = to_x0(out, x, a, s, self.config.prediction_type)
        low = i == len(self._t) - 1 and self.config.lower_order_final and len(self._t) < 15
        slope = x0
        if self._history and sigma_next > 0 and not low:
            x0_before, sigma_before = self._history[-1]
            w = math.log(sigma / sigma_next) / (2 * math.log(sigma_before / sigma))  # 1 / (2 r)
            slope = (1 + w) * x0 - w * x0_before
        self._history = [(x0, sigma)]
        x = (s_next / s) * x + (a_next * (1 - sigma_next / sigma)) * slope  # exp(-h) = sigma_next / sigma
        return StepOutput(x.to(sample.dtype), x0.to(sample.dtype))


def _clip(x0: Tensor, config: Config) -> Tensor:
    return x0.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x0


SAMPLERS: dict[str, type[_Sampler]] = {
    "ddpm": DDPM, "ddim": DDIM, "pndm": PNDM, "lms": LMS, "euler": Euler, "euler_ancestral": EulerAncestral,
    "heun": Heun, "dpmpp_2m": DPMpp2M,
}  # fmt: skip


def make_sampler(name: str, **config: Any) -> _Sampler:
    """The sampler of that name with these options. Raises ValueError, naming the known ones, for another name."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](**config)
