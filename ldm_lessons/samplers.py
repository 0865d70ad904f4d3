"""Samplers: from a network's outputs at a few noise levels to a picture.

One coordinate for all of them: x_t = a x0 + s eps with a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar), so that a^2 + s^2
= 1 and the network takes x_t as it is (the symbols are those of schedules.py). A level is named by sigma = s / a, which
falls from about 14.6 to 0; then a = 1 / sqrt(1 + sigma^2). In y = x_t / a every sampler here solves

    dy / dsigma = eps(x_t, t)                                                         arXiv:2010.02502 eq. (14)

and they differ in how they use the eps (or x0) of this step and of earlier ones, and in the noise they add.

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

import torch
from torch import Tensor

from ldm_lessons.schedules import NoiseSchedule, known_prediction, spaced_timesteps, to_eps, to_x0

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
        """Choose the timesteps, an int64 tensor from noisy to clean. Raises ValueError for a number outside 1 .. T."""
        steps = self._spaced(num_inference_steps)
        sigma = self.schedule.sigma
        self._t: list[int] = steps.tolist()
        self._sigmas: list[float] = [*sigma[torch.from_numpy(steps.copy())].tolist(), self._final_sigma()]
        self.timesteps = torch.tensor(self._t, device=device)
        self.num_inference_steps = num_inference_steps
        self._index, self._history = 0, []

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Let the next step be the one at this index of `timesteps`, with no history."""
        self._index, self._history = begin_index, []

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input for x_t: x_t itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """x_t from x0 and eps (B, ...) at integer timesteps, an int or (B,) or (1,)."""
        return self.schedule.add_noise(original_samples, noise, timesteps)

    def _spaced(self, n: int) -> Any:
        c = self.config
        return spaced_timesteps(c.timestep_spacing, c.num_train_timesteps, n, c.steps_offset)

    def _final_sigma(self) -> float:
        return 0.0

    def _begin(self, out: Tensor, timestep: int | Tensor, sample: Tensor) -> tuple[int, Tensor, Tensor]:
        """This step's index, and out and sample in at least float32. A timestep out of turn starts a new history."""
        if self.num_inference_steps is None:
            raise RuntimeError(f"call set_timesteps(n) on this {type(self).__name__} before its first step.")
        t = int(timestep)
        if self._index >= len(self._t) or self._t[self._index] != t:
            if t not in self._t:
                raise ValueError(f"timestep {t} is not one of this sampler's timesteps: take them from `.timesteps`.")
            self.set_begin_index(self._t.index(t))
        index, self._index = self._index, self._index + 1
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return index, out.to(dtype), sample.to(dtype)


def _level(sigma: float) -> tuple[float, float]:
    """a and s of the level sigma."""
    a = 1 / math.sqrt(1 + sigma**2)
    return a, sigma * a


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
        std = eta * s_next / s * math.sqrt(max(0.0, 1 - (a / a_next) ** 2))  # eq. (16)
        x = a_next * x0 + math.sqrt(s_next**2 - std**2) * eps  # eq. (12)
        if std > 0:
            noise = randn(x.shape, generator, x.dtype).to(x.device) if variance_noise is None else variance_noise
            x = x + std * noise
        return StepOutput(x.to(sample.dtype), x0.to(sample.dtype))


class DPMpp2M(_Sampler):
    """DPM-Solver++(2M): second order in log sigma, from the x0 of two steps (arXiv:2211.01095 algorithm 2).

    Option besides the shared ones: `final_sigmas_type`, "zero" or "sigma_min" (the level of t = 0). The last step is of
    first order when it ends at zero, where log sigma does not exist, and when there are fewer than 15 steps. The
    timesteps are the n noisiest of n + 1, as in diffusers.
    """

    options = _Sampler.options | dict(final_sigmas_type="zero", lower_order_final=True)

    def _spaced(self, n: int) -> Any:
        c, total = self.config, self.config.num_train_timesteps
        if c.timestep_spacing == "trailing" or n == total:
            return super()._spaced(n)
        super()._spaced(n)  # for its checks
        return spaced_timesteps(c.timestep_spacing, total, n + 1, c.steps_offset)[:-1]

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


SAMPLERS: dict[str, type[_Sampler]] = {"ddpm": DDPM, "ddim": DDIM, "dpmpp_2m": DPMpp2M}


def make_sampler(name: str, **config: Any) -> _Sampler:
    """The sampler of that name with these options. Raises ValueError, naming the known ones, for another name."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](**config)
