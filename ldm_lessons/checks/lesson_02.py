"""Marking for 02_pixel_diffusion: the loss, the sinusoid, one DDPM step, and a sampling loop with a fault."""

import math

import torch
from torch import Tensor

from ._core import Exercise, Wrong


class _Model:
    """Stands for a network: its answer depends on x_t and on t, whether t is one number or one for each row."""

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, x: Tensor, t: int | Tensor) -> Tensor:
        t = torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) / 1000
        return self.scale * torch.tanh(x.flip(-1)) + 0.3 * x * t + t

    def __repr__(self) -> str:
        return "a small model"


def _alpha_bar(n: int) -> Tensor:
    return torch.linspace(0.03, 0.11, n, dtype=torch.float64).square().mul(-1).add(1).log().cumsum(0).exp().float()


def _rows(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def _batches(g: torch.Generator) -> list[tuple]:
    def probe(scale: float, rows: int, t: list[int], n: int) -> tuple:
        x0, noise = torch.randn(2, rows, 3, 5, 5, generator=g)
        return _Model(scale), x0, noise, torch.tensor(t), _alpha_bar(n)

    return [probe(0.5, 4, [0, 99, 800, 320], 1000), probe(-1.2, 2, [9, 4], 10)]


def _loss(model, x0, noise, t, ab):
    """Row by row, with v as the derivative by the angle."""
    total = 0.0
    for x, e, k in zip(x0, noise, t, strict=True):
        phi = torch.acos(ab[k].sqrt())
        x_t, v = phi.cos() * x + phi.sin() * e, phi.cos() * e - phi.sin() * x
        total = total + ((model(x_t[None], k) - v) ** 2).sum()
    return total / x0.numel()


def _with_target(of_x0: str, of_noise: str, reduce=lambda d: d.square().mean()):
    """A loss whose target is put together from "a", "s", "-s" or "" for none."""

    def loss(model, x0, noise, t, ab):
        factors = {"a": _rows(ab[t].sqrt()), "s": _rows((1 - ab[t]).sqrt()), "": 0.0, "1": 1.0}
        factors["-s"] = -factors["s"]
        x_t = factors["a"] * x0 + factors["s"] * noise
        return reduce(model(x_t, t) - (factors[of_x0] * x0 + factors[of_noise] * noise))

    return loss


def _with_mixture(mix):
    """A loss with v as it should be, whose network is given what `mix` makes of it all."""

    def loss(model, x0, noise, t, ab):
        a, s = _rows(ab[t].sqrt()), _rows((1 - ab[t]).sqrt())
        return (model(mix(x0, noise, a, s), t) - (a * noise - s * x0)).square().mean()

    return loss


v_loss = Exercise(
    name="The loss",
    oracle=_loss,
    probes=_batches,
    good="Change the target to `noise` or `x0`, and the same line trains the other two kinds of network.",
    wrong_answers=(
        Wrong(
            _with_target("", "1"),
            "You asked for the noise. That is a good loss, but of another kind: this network is to answer v.",
        ),
        Wrong(_with_target("1", ""), "You asked for the picture x0. This network is to answer v."),
        Wrong(
            _with_target("s", "a"),
            "The picture's part of v has a minus sign: v = a * noise - s * x0, since a cosine falls.",
        ),
        Wrong(
            _with_target("a", "-s"),
            "You swapped picture and noise in v: a belongs to the noise there, and s to the picture. Where there is "
            "little noise (a near 1), v is the noise.",
        ),
        Wrong(
            lambda model, x0, noise, t, ab: (
                (
                    model(_rows(ab[t]) * x0 + _rows(1 - ab[t]) * noise, t)
                    - (_rows(ab[t]) * noise - _rows(1 - ab[t]) * x0)
                )
                .square()
                .mean()
            ),
            "You left out the square roots: a is the root of alpha_bar, and s the root of 1 - alpha_bar.",
        ),
        Wrong(
            _with_mixture(lambda x0, noise, a, s: x0),
            "Your network sees the clean picture. It is to be given x_t, the picture with its noise.",
        ),
        Wrong(
            _with_mixture(lambda x0, noise, a, s: x0 + noise),
            "You added the noise without the factors: x_t is a * x0 + s * noise.",
        ),
        Wrong(
            _with_target("-s", "a", lambda d: d.square().sum()),
            "You took the sum of the squares. With the mean, the loss does not depend on the size of picture and "
            "batch, and the learning rate need not, either.",
        ),
        Wrong(
            _with_target("-s", "a", lambda d: d.abs().mean()),
            "You took the absolute value. It would teach the network the median of what is possible; the square "
            "teaches the mean, which sampling needs.",
        ),
        Wrong(
            _with_target("-s", "a", lambda d: d.square()),
            "That is the squared error of every pixel. A loss is one number: take the mean of all.",
        ),
        Wrong(
            lambda model, x0, noise, t, ab: (
                (model(ab[t].sqrt() * x0 + (1 - ab[t]).sqrt() * noise, t) - noise).square().mean()
            ),
            "`alpha_bar[t]` has the shape (B,), and (B, C, H, W) is to be multiplied with it row by row: give it three "
            "more dimensions of size 1, with `.view(-1, 1, 1, 1)`.",
        ),
    ),
)


def _angles(t: Tensor, rates: Tensor) -> Tensor:
    return t.float()[:, None] * rates[None]


def _rates(half: int, steps: int, base: float = 10_000.0) -> Tensor:
    return (-math.log(base) * torch.arange(half, dtype=torch.float32) / steps).exp()


def _waves(rates, first=torch.cos, second=torch.sin):
    """An answer with `rates(half)` as its rates."""
    return lambda t, dim: torch.cat([f(_angles(t, rates(dim // 2))) for f in (first, second)], 1)


def _hands(t: Tensor, dim: int) -> Tensor:
    """Number by number."""
    rows = []
    for time in t.tolist():
        angles = [time / 10_000 ** (2 * k / dim) for k in range(dim // 2)]
        rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    return torch.tensor(rows)


time_sinusoid = Exercise(
    name="The hands of the clock",
    oracle=_hands,
    probes=lambda g: [
        (torch.tensor([0, 1, 500, 999]), 8),
        (torch.randint(0, 1000, (5,), generator=g), 32),
        (torch.tensor([7]), 2),
    ],
    rtol=1e-3,
    atol=1e-3,
    good="Stable Diffusion's U-Net does just this, with 160 hands for 320 numbers.",
    wrong_answers=(
        Wrong(
            _waves(lambda half: _rates(half, half), torch.sin, torch.cos),
            "You put the sines first. Either order would do, but Stable Diffusion's weights expect the cosines first.",
        ),
        Wrong(
            lambda t, dim: (
                torch.stack(
                    [_angles(t, _rates(dim // 2, dim // 2)).cos(), _angles(t, _rates(dim // 2, dim // 2)).sin()], 2
                )
            ).flatten(1),
            "You let cosines and sines take turns. Here all the cosines come first, then all the sines: `torch.cat`.",
        ),
        Wrong(
            _waves(lambda half: _rates(half, max(half - 1, 1))),
            "You divided k by half - 1, so that the last hand turns at a rate of 1/10000. In Stable Diffusion k is "
            "divided by half.",
        ),
        Wrong(
            _waves(lambda half: _rates(half, 2 * half)),
            "You divided k by dim. There are only dim / 2 rates, so k is to be divided by dim / 2.",
        ),
        Wrong(
            _waves(lambda half: 1 / _rates(half, half)),
            "Your hands turn faster and faster. The exponent has a minus sign: the first rate is 1, the last near "
            "1/10000.",
        ),
        Wrong(
            _waves(lambda half: 2 * math.pi * _rates(half, half)),
            "You multiplied by 2 pi. The first hand makes one radian a step, not one turn: whole turns would leave it "
            "where it is at every t.",
        ),
        Wrong(
            lambda t, dim: _waves(lambda half: _rates(half, half))(t / 1000, dim),
            "You scaled t to the range 0 to 1. Then the fast hands hardly move, and times that are close can no longer "
            "be told apart.",
        ),
        Wrong(
            lambda t, dim: _angles(t, _rates(dim // 2, dim // 2)).cos(),
            "You have the cosines only. A cosine is the same for an angle and its negative; cosine and sine together "
            "say where the hand is.",
        ),
    ),
)


def _bayes(x_t: Tensor, x0: Tensor, now: float, before: float) -> tuple[Tensor, float]:
    """Mean and variance of x at the level `before`, from the two Gaussians' precisions."""
    if before == 1:
        return x0, 0.0
    alpha = now / before
    prior, ahead = 1 / (1 - before), alpha / (1 - alpha)
    return (prior * before**0.5 * x0 + ahead * x_t / alpha**0.5) / (prior + ahead), 1 / (prior + ahead)


def _step(x_t, v, z, now, before):
    mean, variance = _bayes(x_t, now**0.5 * x_t - (1 - now) ** 0.5 * v, now, before)
    return mean + variance**0.5 * z


def _levels(g: torch.Generator) -> list[tuple]:
    found = []
    for now, before in ((0.3, 0.5), (0.02, 0.05), (0.9, 0.97), (0.98, 1.0)):
        x, v, z = torch.randn(3, 2, 3, 4, 4, generator=g)
        found.append((x, v, z, now, before))
    return found


def _altered(**changes):
    """The step as section 9 writes it, with some of its parts replaced by other functions of the same symbols."""
    rules = {
        "x0": lambda x, v, a, s: a * x - s * v,
        "alpha": lambda now, before: now / before,
        "of_x0": lambda now, before, alpha: before**0.5 * (1 - alpha) / (1 - now),
        "of_x": lambda now, before, alpha: alpha**0.5 * (1 - before) / (1 - now),
        "noise": lambda now, before, alpha: ((1 - before) / (1 - now) * (1 - alpha)) ** 0.5,
    } | changes

    def step(x, v, z, now, before):
        x0, alpha = rules["x0"](x, v, now**0.5, (1 - now) ** 0.5), rules["alpha"](now, before)
        mean = rules["of_x0"](now, before, alpha) * x0 + rules["of_x"](now, before, alpha) * x
        return mean + rules["noise"](now, before, alpha) * z

    return step


ddpm_step = Exercise(
    name="One step of DDPM",
    oracle=_step,
    probes=_levels,
    rtol=1e-3,
    atol=1e-4,
    good="At the last step, where alpha_bar_s is 1, it goes to the guess itself and adds no noise, without being told.",
    wrong_answers=(
        Wrong(
            _altered(noise=lambda now, before, alpha: (1 - before) / (1 - now) * (1 - alpha)),
            "You multiplied the noise by the variance. Numbers are multiplied by its square root, the standard "
            "deviation.",
        ),
        Wrong(
            _altered(noise=lambda now, before, alpha: (1 - alpha) ** 0.5),
            "You added noise of variance 1 - alpha, which is that of a step *forward*. On the way back some of it is "
            "known: it is (1 - alpha_bar_s) / (1 - alpha_bar_t) times as much.",
        ),
        Wrong(
            _altered(noise=lambda now, before, alpha: (1 - before) ** 0.5),
            "You added as much noise as there is in all at s. Most of it is in x_t already; what is new has the "
            "variance of section 9.",
        ),
        Wrong(
            _altered(noise=lambda now, before, alpha: 0.0),
            "You left out the new noise `z`. Section 9 shows what becomes of the pictures then.",
        ),
        Wrong(
            _altered(x0=lambda x, v, a, s: (x - s * v) / a),
            "You took the network's answer for the noise. It is v, so the guess is a * x_t - s * v.",
        ),
        Wrong(
            _altered(x0=lambda x, v, a, s: v),
            "You took the network's answer for the picture. It is v, so the guess is a * x_t - s * v.",
        ),
        Wrong(_altered(x0=lambda x, v, a, s: a * x + s * v), "In the guess at x0, v comes with a minus sign."),
        Wrong(
            _altered(alpha=lambda now, before: now),
            "You took alpha_bar_t for alpha. The stretch from s to t has only its own share: alpha_bar_t / "
            "alpha_bar_s.",
        ),
        Wrong(
            _altered(of_x0=lambda now, before, alpha: now**0.5 * (1 - alpha) / (1 - now)),
            "In x0's share the root is that of alpha_bar_s, where the step leads, not of alpha_bar_t.",
        ),
        Wrong(
            _altered(of_x=lambda now, before, alpha: now**0.5 * (1 - before) / (1 - now)),
            "In x_t's share the root is that of alpha, without a bar.",
        ),
        Wrong(
            _altered(
                of_x0=lambda now, before, alpha: alpha**0.5 * (1 - before) / (1 - now),
                of_x=lambda now, before, alpha: before**0.5 * (1 - alpha) / (1 - now),
            ),
            "You swapped the shares of x0 and x_t: the one with 1 - alpha belongs to x0.",
        ),
    ),
)


def _mended(model, x, times, ab, new_noise):
    for i, t in enumerate(times):
        now, before = float(ab[t]), float(ab[times[i + 1]]) if i + 1 < len(times) else 1.0
        mean, variance = _bayes(x, now**0.5 * x - (1 - now) ** 0.5 * model(x, t), now, before)
        x = mean + variance**0.5 * new_noise[i]
    return x


def _runs(g: torch.Generator) -> list[tuple]:
    found = []
    for scale, times in ((0.5, [999, 700, 400, 100]), (-0.4, [800, 500, 200]), (0.3, [600, 30])):
        x, new_noise = torch.randn(2, 3, 4, 4, generator=g), torch.randn(len(times), 2, 3, 4, 4, generator=g)
        found.append((_Model(scale), x, times, _alpha_bar(1000), new_noise))
    return found


def _loop(old=lambda b, var: (1 - b - var).sqrt(), new=lambda b, var: var.sqrt(), told=0, last=False):
    """The loop of the exercise with other factors of the old and the new noise, another t told, or noise at the end."""

    def run(model, x, times, ab, new_noise):
        for i, t in enumerate(times):
            a, s = ab[t].sqrt(), (1 - ab[t]).sqrt()
            v = model(x, times[min(i + told, len(times) - 1)])
            x0, noise = a * x - s * v, s * x + a * v
            if i + 1 == len(times):
                return x0 + (s * new_noise[i] if last else 0)
            b = ab[times[i + 1]]
            variance = (1 - b) / s**2 * (1 - ab[t] / b)
            x = b.sqrt() * x0 + old(b, variance) * noise + new(b, variance) * new_noise[i]
        return x

    return run


mended = Exercise(
    name="Clean, but empty",
    oracle=_mended,
    probes=_runs,
    rtol=1e-3,
    atol=1e-3,
    good="Now x has as much noise at every step as the network is told. What was missing, it had taken out of the "
    "picture instead: the things.",
    wrong_answers=(
        Wrong(
            _loop(new=lambda b, var: var),
            "This is the loop as it was. The noise in x at the level s must have the variance 1 - b in all: add up "
            "what the two noises of the last line bring.",
        ),
        Wrong(
            _loop(new=lambda b, var: 0.0),
            "You left the new noise out. Then even less noise is in x than before; what is there must add up to the "
            "variance 1 - b.",
        ),
        Wrong(
            _loop(old=lambda b, var: (1 - b).sqrt(), new=lambda b, var: 0.0),
            "That is a good sampler, DDIM of lesson 01, but it is not this one: DDPM replaces a part of the noise at "
            "each step by new noise. Keep that.",
        ),
        Wrong(
            _loop(old=lambda b, var: (1 - b).sqrt()),
            "The new noise has the right size now, but the old one takes up the whole variance 1 - b, and both "
            "together are too much. The old factor was right.",
        ),
        Wrong(
            _loop(old=lambda b, var: (1 - b).sqrt(), new=lambda b, var: var),
            "You enlarged the old noise, but the new one is still multiplied by a variance. Which factor makes noise "
            "of variance 1 into noise of that variance?",
        ),
        Wrong(
            _loop(old=lambda b, var: (1 - b - var**2).sqrt(), new=lambda b, var: var),
            "The variances add up to 1 - b now, so the pictures have things again; but the new noise is much less than "
            "DDPM adds. `variance` itself is right: only what it is multiplied with is not.",
        ),
        Wrong(
            _loop(old=lambda b, var: 0.0, new=lambda b, var: (1 - b).sqrt()),
            "You replaced all the noise by new noise. The old one is to stay, but for the part `variance`.",
        ),
        Wrong(
            _loop(told=1),
            "The last line is right now, but the network is told another t: it must be told how noisy the x is that it "
            "is given.",
        ),
        Wrong(
            _loop(last=True),
            "The last line is right now, but the end has changed: the loop ends with the guess, without noise.",
        ),
    ),
)
