"""Noise schedules: how much of the picture, and how much noise, is in x_t.

    symbol      meaning                                                          range
    x0          a clean picture or latent
    eps         standard Gaussian noise of x0's shape
    t           training timestep, an integer                                    0 (clean) .. T-1 (noise)
    beta        variance that one step of the forward process adds               (0, 1)
    alpha_bar   cumulative product of 1 - beta, the share of x0 in x_t           (0, 1), falls with t
    x_t         sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps                     arXiv:2006.11239 eq. (4)
    sigma       sqrt((1 - alpha_bar) / alpha_bar), the noise in x_t/sqrt(alpha_bar)
    snr         alpha_bar / (1 - alpha_bar) = 1 / sigma^2
    v           sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0                     arXiv:2202.00512 appendix D

A network's output is one of x0 ("sample"), eps ("epsilon") or v ("v_prediction"); x_t and any one of them give the
others. Tables are float64; results have the dtype and device of the tensors passed in. Derived in lesson 01.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def linear(n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Betas that rise in equal steps (arXiv:2006.11239 section 4): float64 (n,)."""
    return torch.linspace(beta_start, beta_end, n, dtype=torch.float64)


def scaled_linear(n: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Betas whose square roots rise in equal steps, as in Stable Diffusion (its defaults): float64 (n,)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64) ** 2


def cosine(n: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Betas that make alpha_bar a squared cosine (arXiv:2102.09672 eq. (17)): float64 (n,)."""
    u = torch.arange(n + 1, dtype=torch.float64) / n
    alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


def to_x0(out: Tensor, x_t: Tensor, a: float | Tensor, s: float | Tensor, prediction_type: str) -> Tensor:
    """The x0 that a network's output stands for, at the level x_t = a x0 + s eps, a^2 + s^2 = 1."""
    if prediction_type == "epsilon":
        return (x_t - s * out) / a
    return a * x_t - s * out if known_prediction(prediction_type) == "v_prediction" else out


def to_eps(out: Tensor, x_t: Tensor, a: float | Tensor, s: float | Tensor, prediction_type: str) -> Tensor:
    """The eps that a network's output stands for, at the level x_t = a x0 + s eps, a^2 + s^2 = 1."""
    if prediction_type == "sample":
        return (x_t - a * out) / s
    return a * out + s * x_t if known_prediction(prediction_type) == "v_prediction" else out


def known_prediction(kind: str) -> str:
    """`kind`, if it is one of PREDICTION_TYPES. Raises ValueError if not."""
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction_type {kind!r}: choose one of {', '.join(PREDICTION_TYPES)}.")
    return kind


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Tables over t: `alpha_bar`, `sigma`, `snr`, float64 (T,). A `t` is an int, or integers (B,), (1,) or ()."""

    betas: Tensor = field(repr=False)
    num_train_timesteps: int = field(init=False)
    alpha_bar: Tensor = field(init=False, repr=False)
    _tables: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64).cpu()
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be numbers between 0 and 1, one for each timestep.")
        vars(self).update(betas=betas, num_train_timesteps=len(betas), alpha_bar=torch.cumprod(1 - betas, 0))

    @classmethod
    def from_config(cls, config: Mapping) -> NoiseSchedule:
        """From diffusers' scheduler_config; missing keys are Stable Diffusion's. Raises ValueError for other kinds."""
        if config.get("trained_betas") is not None:
            return cls(torch.as_tensor(config["trained_betas"], dtype=torch.float64))
        if config.get("rescale_betas_zero_snr"):
            raise ValueError("rescale_betas_zero_snr is not supported: pass the rescaled betas as trained_betas.")
        n, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "scaled_linear")
        if kind == "squaredcos_cap_v2":
            return cls(cosine(n))
        if kind not in (rules := {"linear": linear, "scaled_linear": scaled_linear}):
            raise ValueError(f"unknown beta_schedule {kind!r}: choose linear, scaled_linear or squaredcos_cap_v2.")
        return cls(rules[kind](n, config.get("beta_start", 0.00085), config.get("beta_end", 0.012)))

    @property
    def sigma(self) -> Tensor:
        """sqrt((1 - alpha_bar) / alpha_bar), float64 (T,)."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio, float64 (T,)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """x_t from x0 and eps (arXiv:2006.11239 eq. (4))."""
        a, s = self._signal_noise(t, x0)
        return a * x0 + s * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """v from x0 and eps (arXiv:2202.00512 appendix D)."""
        a, s = self._signal_noise(t, x0)
        return a * noise - s * x0

    def to_x0(self, out: Tensor, x_t: Tensor, t: int | Tensor, prediction_type: str) -> Tensor:
        """The x0 that a network's output at x_t stands for. Raises ValueError for an unknown prediction type."""
        return to_x0(out, x_t, *self._signal_noise(t, x_t), prediction_type)

    def to_eps(self, out: Tensor, x_t: Tensor, t: int | Tensor, prediction_type: str) -> Tensor:
        """The eps that a network's output at x_t stands for. Raises ValueError for an unknown prediction type."""
        return to_eps(out, x_t, *self._signal_noise(t, x_t), prediction_type)

    def _signal_noise(self, t: int | Tensor, like: Tensor) -> tuple:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t: two floats, or two tensors that broadcast against `like`."""
        if not isinstance(t, Tensor):
            if not 0 <= t < self.num_train_timesteps:
                raise ValueError(f"timestep {t} is outside this schedule's 0 .. {self.num_train_timesteps - 1}.")
            alpha_bar = float(self.alpha_bar[t])
            return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if (key := (like.device, like.dtype)) not in self._tables:  # once: a copy at every call would stall a GPU
            pair = torch.stack([self.alpha_bar, 1 - self.alpha_bar]).sqrt()
            self._tables[key] = pair.to(like.dtype).to(like.device)
        pair = self._tables[key][:, t.to(like.device)]
        return tuple(pair.reshape(2, -1, *[1] * (like.ndim - 1)))


def spaced_timesteps(kind: str, num_train_timesteps: int, n: int, steps_offset: int = 0) -> np.ndarray:
    """n of the T training timesteps, from noisy to clean: int64 (n,) (arXiv:2305.08891 table 2).

    "leading" counts up from 0 by T // n, then adds `steps_offset`; "trailing" counts down from T - 1 by T / n;
    "linspace" has both ends. Raises ValueError for another kind, or n outside 1 .. T.
    """
    total = num_train_timesteps
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n <= total:
        raise ValueError(f"num_inference_steps is {n!r}, but must be a whole number from 1 to {total}.")
    if kind == "leading":
        t = np.arange(n)[::-1] * (total // n)
        return t + min(steps_offset, total - 1 - int(t[0]))  # the offset must not leave the schedule
    if kind == "trailing":
        return np.round(np.arange(total, 0, -total / n))[:n].astype(np.int64) - 1
    if kind == "linspace":
        return np.linspace(0, total - 1, n).round()[::-1].astype(np.int64)
    raise ValueError(f"unknown timestep_spacing {kind!r}: choose leading, trailing or linspace.")


def karras_sigmas(sigma_min: float, sigma_max: float, n: int, rho: float = 7.0) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, dense near the clean end (arXiv:2206.00364 eq. (5)): float64."""
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    return (sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
