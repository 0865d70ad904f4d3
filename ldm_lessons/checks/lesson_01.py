"""Marking for 01_noise_and_denoising: jump, alpha_bar, equal noise, the posterior's mean, the ideal guess."""

import torch

from ._core import Exercise, Wrong


def _cosine(n: int) -> torch.Tensor:
    u = (torch.arange(1, n + 1, dtype=torch.float64) / n + 0.008) / 1.008
    return (torch.cos(u * torch.pi / 2) ** 2).clamp_min(1e-6).float()


def _linear(n: int) -> torch.Tensor:
    return torch.linspace(1e-4, 0.02, n, dtype=torch.float64).mul(-1).add(1).log().cumsum(0).exp().float()


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x[:, None, None, None]


def _jump(g: torch.Generator) -> list[tuple]:
    def probe(rows: int, t: list[int], table: torch.Tensor) -> tuple:
        x0, noise = torch.randn(2, rows, 3, 5, 5, generator=g)
        return x0, noise, torch.tensor(t), table

    return [
        probe(4, [0, 1, 2, 3], _linear(1000)),
        probe(4, [999, 500, 20, 250], _linear(1000)),
        probe(3, [3, 9, 0], _cosine(10)),
    ]


add_noise = Exercise(
    name="The jump",
    oracle=lambda x0, noise, t, ab: torch.stack(
        [ab[k] ** 0.5 * x + (1 - ab[k]) ** 0.5 * e for x, e, k in zip(x0, noise, t, strict=True)]
    ),
    probes=_jump,
    good="Each row has its own share of picture and of noise, and their variances add up to 1.",
    wrong_answers=(
        Wrong(
            lambda x0, noise, t, ab: _rows(ab[t]) * x0 + _rows(1 - ab[t]) * noise,
            "You left out the square roots. alpha_bar is a share of the *variance*; the numbers themselves are "
            "multiplied by its square root.",
        ),
        Wrong(
            lambda x0, noise, t, ab: _rows(ab[t].sqrt()) * x0 + _rows(1 - ab[t].sqrt()) * noise,
            "The noise's factor is the root of (1 - alpha_bar), not 1 minus the root: only then do the "
            "variances add up to 1.",
        ),
        Wrong(
            lambda x0, noise, t, ab: _rows((1 - ab[t]).sqrt()) * x0 + _rows(ab[t].sqrt()) * noise,
            "You swapped the two: alpha_bar is the picture's share. At t = 0 nearly all should be picture.",
        ),
        Wrong(
            lambda x0, noise, t, ab: _rows(ab[t].sqrt()) * x0 + noise,
            "You shrank the picture but added the noise at full strength: its factor is the root of 1 - alpha_bar.",
        ),
        Wrong(
            lambda x0, noise, t, ab: ab[t].sqrt() * x0 + (1 - ab[t]).sqrt() * noise,
            "`alpha_bar[t]` has the shape (B,), and (B, C, H, W) is to be multiplied with it row by row: give it three "
            "more dimensions of size 1, with `.view(-1, 1, 1, 1)`.",
        ),
        Wrong(
            lambda x0, noise, t, ab: _rows(ab[t].sqrt()) * x0 + _rows((1 - ab[t]).sqrt()) * torch.randn_like(x0),
            "You drew noise of your own. Use the `noise` that is given: later the network is asked about it.",
        ),
        Wrong(
            lambda x0, noise, t, ab: ab[t].sqrt()[0] * x0 + (1 - ab[t]).sqrt()[0] * noise,
            "You took the first row's t for all rows: each row has its own.",
        ),
    ),
)

alpha_bar = Exercise(
    name="From betas to alpha_bar",
    oracle=lambda betas: (1 - betas.double()).log().cumsum(0).exp().to(betas.dtype),
    probes=lambda g: [
        (torch.linspace(1e-4, 0.02, 1000),),
        (0.3 * torch.rand(12, generator=g) + 0.01,),
        (torch.tensor([0.5]),),
    ],
    good="What is left after t steps is the product of what each of them leaves.",
    wrong_answers=(
        Wrong(
            lambda betas: torch.cumprod(betas, 0),
            "You multiplied the betas. Beta is the noise that a step brings; what it leaves of the picture is 1 "
            "- beta.",
        ),
        Wrong(
            lambda betas: 1 - torch.cumsum(betas, 0),
            "You subtracted the betas from 1. That is nearly right while they are small, but each step takes "
            "its share of what is left, not of the beginning: multiply.",
        ),
        Wrong(
            lambda betas: 1 - betas,
            "That is what one step leaves. alpha_bar has all the steps before it, too: a running product.",
        ),
        Wrong(
            lambda betas: torch.cumprod(1 - betas, 0).sqrt(),
            "This is the root of alpha_bar, the factor of x0. The table holds alpha_bar itself.",
        ),
        Wrong(
            lambda betas: torch.prod(1 - betas),
            "This is the last entry alone: the whole product. Every t wants its own; there is a function for "
            "running products.",
        ),
        Wrong(
            lambda betas: torch.cat([torch.ones(1), torch.cumprod(1 - betas, 0)[:-1]]),
            "Your table is one step late: entry t should have step t behind it as well.",
        ),
    ),
)


def _logit(ab: torch.Tensor) -> torch.Tensor:
    return (ab / (1 - ab)).log()


same_noise = Exercise(
    name="The same noise on two clocks",
    oracle=lambda t, first, second: min(
        range(len(second)), key=lambda k: abs(float(_logit(second[k]) - _logit(first[t])))
    ),
    probes=lambda g: (
        [(t, _linear(1000), _cosine(1000)) for t in (5, 120, 400, 800, 999)]
        + [(t, _cosine(1000), _linear(1000)[::100]) for t in range(3, 1000, 23)]
        + [(7, _linear(1000), _linear(400))]
    ),
    good="Two networks that speak of the same noise can be compared, whatever their clocks say.",
    wrong_answers=(
        Wrong(
            lambda t, first, second: int((second - first[t]).abs().argmin()),
            "You looked for the nearest alpha_bar. In the middle that is nearly the same, but near 0 and 1 all "
            "alpha_bars look alike; compare the logarithms of the SNR.",
        ),
        Wrong(
            lambda t, first, second: int((second / (1 - second) - first[t] / (1 - first[t])).abs().argmin()),
            "You compared the SNRs themselves. They go from thousands down to thousandths; compare their logarithms.",
        ),
        Wrong(
            lambda t, first, second: int((_logit(first) - _logit(second)[t]).abs().argmin()),
            "You swapped the tables: t belongs to alpha_bar_1, and the answer to alpha_bar_2.",
        ),
        Wrong(
            lambda t, first, second: int((_logit(second) - _logit(first[t])).argmin()),
            "You took the smallest difference, which is the most negative one. Nearest means smallest without sign.",
        ),
        Wrong(
            lambda t, first, second: int((second.log() - first[t].log()).abs().argmin()),
            "You compared the logarithms of alpha_bar. The signal-to-noise ratio is alpha_bar / (1 - alpha_bar).",
        ),
        Wrong(
            lambda t, first, second: t,
            "You gave t back. The same t means another amount of noise in another schedule.",
        ),
        Wrong(
            lambda t, first, second: round(t * (len(second) - 1) / (len(first) - 1)),
            "You scaled t to the other table's length. How much noise there is at a share of the way differs "
            "from schedule to schedule.",
        ),
        Wrong(
            lambda t, first, second: int((_logit(first) - _logit(second[min(t, len(second) - 1)])).abs().argmin()),
            "You went the other way: t belongs to the first table, and the answer to the second.",
        ),
    ),
)


def _mean(x_t, x0, t, betas, ab):
    """From the two Gaussians' precisions, without the textbook formula."""
    prior, ahead = 1 / (1 - ab[t - 1]), (1 - betas[t]) / betas[t]
    return (prior * ab[t - 1] ** 0.5 * x0 + ahead * x_t / (1 - betas[t]) ** 0.5) / (prior + ahead)


def _steps(g: torch.Generator) -> list[tuple]:
    betas = torch.linspace(1e-3, 0.3, 20, dtype=torch.float64)
    ab = torch.cumprod(1 - betas, 0)
    x = torch.randn(2, 2, 3, 4, 4, generator=g)
    return [(x[0], x[1], t, betas.float(), ab.float()) for t in (8, 1, 19)]


posterior_mean = Exercise(
    name="One step back",
    oracle=_mean,
    probes=_steps,
    rtol=1e-3,
    atol=1e-4,
    good="While there is much noise it is nearly all x_t; at the last steps before the picture, x0 takes over.",
    wrong_answers=(
        Wrong(
            lambda x_t, x0, t, b, ab: (
                ab[t].sqrt() * b[t] / (1 - ab[t]) * x0 + (1 - b[t]).sqrt() * (1 - ab[t - 1]) / (1 - ab[t]) * x_t
            ),
            "In x0's share, the root is that of alpha_bar at t - 1, not at t.",
        ),
        Wrong(
            lambda x_t, x0, t, b, ab: (
                ab[t - 1].sqrt() * b[t] / (1 - ab[t]) * x0 + ab[t].sqrt() * (1 - ab[t - 1]) / (1 - ab[t]) * x_t
            ),
            "In x_t's share you used alpha_bar where alpha belongs: sqrt(1 - beta_t) has no bar.",
        ),
        Wrong(
            lambda x_t, x0, t, b, ab: (
                ab[t - 1].sqrt() * b[t] / (1 - ab[t]) * x_t + (1 - b[t]).sqrt() * (1 - ab[t - 1]) / (1 - ab[t]) * x0
            ),
            "You swapped x0 and x_t: the factor that holds beta_t belongs to x0.",
        ),
        Wrong(
            lambda x_t, x0, t, b, ab: (
                ab[t - 1] * b[t] / (1 - ab[t]) * x0 + (1 - b[t]) * (1 - ab[t - 1]) / (1 - ab[t]) * x_t
            ),
            "You left out the two square roots.",
        ),
        Wrong(
            lambda x_t, x0, t, b, ab: (
                ab[t - 1].sqrt() * b[t - 1] / (1 - ab[t]) * x0
                + (1 - b[t - 1]).sqrt() * (1 - ab[t - 1]) / (1 - ab[t]) * x_t
            ),
            "You took beta at t - 1. The step that is to be undone is step t, with its own beta; only alpha_bar is "
            "wanted at both times.",
        ),
        Wrong(
            lambda x_t, x0, t, b, ab: (
                ab[t].sqrt() * b[t] / (1 - ab[t]) * x0 + (1 - b[t]).sqrt() * (1 - ab[t]) / (1 - ab[t]) * x_t
            ),
            "You took alpha_bar at t everywhere. Above the fraction bar it is that of t - 1.",
        ),
        Wrong(
            lambda x_t, x0, t, b, ab: (x_t - b[t].sqrt() * x0) / (1 - b[t]).sqrt(),
            "You turned the forward step around as if x0 were its noise. The step's noise is not known here; "
            "use the two shares of section 6.",
        ),
        Wrong(
            lambda x_t, x0, t, b, ab: ab[t - 1].sqrt() * x0 + (1 - ab[t - 1]).sqrt() * x_t,
            "This is the jump to t - 1 with x_t in the noise's place. It forgets that x_t itself holds a share "
            "of the picture.",
        ),
    ),
)


def _guess(x_t: torch.Tensor, data: torch.Tensor, ab: float) -> torch.Tensor:
    """With plain sums, row by row."""
    rows = []
    for x in x_t.double():
        exponents = torch.stack([-((x - ab**0.5 * d) ** 2).sum() / (2 * (1 - ab)) for d in data.double()])
        weights = (exponents - exponents.max()).exp()
        rows.append((weights[:, None] * data).sum(0) / weights.sum())
    return torch.stack(rows).to(data.dtype)


def _worlds(g: torch.Generator) -> list[tuple]:
    found = []
    for n, d, ab in ((5, 4, 0.1), (12, 2, 0.5), (3, 6, 0.03)):
        data = torch.randn(n, d, generator=g)
        found.append((ab**0.5 * data[:3] + (1 - ab) ** 0.5 * torch.randn(3, d, generator=g), data, ab))
    return found


ideal_guess = Exercise(
    name="The ideal denoiser",
    oracle=_guess,
    probes=_worlds,
    rtol=1e-3,
    atol=1e-4,
    good="That is the best that any denoiser can do on these pictures, and all that it can do.",
    wrong_answers=(
        Wrong(
            lambda x, data, ab: (-(torch.cdist(x, data) ** 2) / (2 * (1 - ab))).softmax(1) @ data,
            "You compared x_t with the pictures themselves. In x_t they are shrunk by the root of alpha_bar.",
        ),
        Wrong(
            lambda x, data, ab: (-torch.cdist(x, ab**0.5 * data) / (2 * (1 - ab))).softmax(1) @ data,
            "The exponent holds the distance *squared*.",
        ),
        Wrong(
            lambda x, data, ab: (-(torch.cdist(x, ab**0.5 * data) ** 2)).softmax(1) @ data,
            "The squared distance is to be measured in units of the noise: divide it by 2 (1 - alpha_bar_t).",
        ),
        Wrong(
            lambda x, data, ab: (-(torch.cdist(x, ab**0.5 * data) ** 2) / (2 * (1 - ab) ** 0.5)).softmax(1) @ data,
            "You divided by the noise's deviation; its *variance*, 1 - alpha_bar_t, belongs there.",
        ),
        Wrong(
            lambda x, data, ab: data[torch.cdist(x, ab**0.5 * data).argmin(1)],
            "You took the nearest picture. The guess is the mean of all, each with its weight.",
        ),
        Wrong(
            lambda x, data, ab: (-(torch.cdist(x, ab**0.5 * data) ** 2) / (2 * (1 - ab))).softmax(0) @ data,
            "Your weights add up to 1 over the rows of x_t. They should over the pictures: softmax along dimension 1.",
        ),
        Wrong(
            lambda x, data, ab: (-(torch.cdist(x, ab**0.5 * data) ** 2) / (2 * (1 - ab))).exp() @ data,
            "Your weights do not add up to 1: divide each row by its sum, or use softmax.",
        ),
        Wrong(
            lambda x, data, ab: (-(torch.cdist(x, ab**0.5 * data) ** 2) / (2 * (1 - ab))).softmax(1) @ (ab**0.5 * data),
            "That is the guess at the shrunk picture. x0 itself is wanted: the weighted mean of `data`.",
        ),
    ),
)
