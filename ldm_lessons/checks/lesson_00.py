"""Marking for 00_start_here: noise from a seed, the decoder's numbers on a screen, how much smaller a latent is."""

import math

import numpy as np
import torch

from ._core import Exercise, Rule, Wrong

_GLOBAL = (
    "The numbers are right, but `torch.manual_seed` resets the random numbers of the whole program. Make a generator "
    "of your own instead: `torch.Generator().manual_seed(seed)`."
)


def _seeded(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _global_seed(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(shape)


def _disturbs_global_state(answer) -> bool:
    before = torch.get_rng_state()
    answer((2, 3), 5)
    return not torch.equal(before, torch.get_rng_state())


_NUMPY = (
    "You draw with NumPy, whose generator gives other numbers for the same seed. Draw with `torch.randn`, so that a "
    "seed means the same picture everywhere in the course."
)


def _numpy(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


noise_from_seed = Exercise(
    name="Noise from a seed",
    oracle=_seeded,
    probes=lambda g: [((1, 4, 16, 16), 0), ((2, 4, 8, 8), 7), ((3, 5), int(torch.randint(10_000, (), generator=g)))],
    good="The same seed gives the same noise on every machine, and nobody else's random numbers move.",
    wrong_answers=(
        Wrong(
            lambda shape, seed: torch.randn(shape),
            "Your noise does not depend on `seed`: `randn` is drawing from PyTorch's global generator. Make a "
            "`torch.Generator()`, seed it, and hand it over as `generator=`.",
        ),
        Wrong(
            lambda shape, seed: torch.randn(shape, generator=torch.Generator()),
            "You made a generator of your own but did not seed it with `seed`, so every seed gives the same noise.",
        ),
        Wrong(
            lambda shape, seed: torch.rand(shape, generator=torch.Generator().manual_seed(seed)),
            "You used `torch.rand`, which draws evenly between 0 and 1. Diffusion starts from Gaussian noise, with "
            "mean 0 and variance 1: `torch.randn`.",
        ),
        Wrong(
            lambda shape, seed: 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1,
            "You draw evenly between -1 and 1. Diffusion starts from Gaussian noise, with mean 0 and variance 1: "
            "`torch.randn` gives it as it is.",
        ),
        Wrong(
            lambda shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(0)),
            "Your generator always gets seed 0: pass the function's own `seed` to `manual_seed`.",
        ),
        Wrong(_global_seed, _GLOBAL),
        Wrong(_numpy, _NUMPY),
    ),
    rules=(Rule(_disturbs_global_state, _GLOBAL),),
)


def _stretched(x: torch.Tensor) -> torch.Tensor:
    return (x - x.min()) / (x.max() - x.min())


to_pixels = Exercise(
    name="From the decoder to the screen",
    oracle=lambda x: torch.minimum(torch.maximum(0.5 + 0.5 * x, torch.zeros(())), torch.ones(())),
    probes=lambda g: [(scale * torch.randn(2, 3, 8, 8, generator=g),) for scale in (0.2, 0.7, 1.5)],
    good="-1 is black, 1 is white, and what overshoots is cut off at the border.",
    wrong_answers=(
        Wrong(
            lambda x: (x + 1) / 2,
            "You did not cut off what overshoots: the decoder is a network, and some of its values lie a little "
            "outside [-1, 1]. Clamp the result to [0, 1].",
        ),
        Wrong(
            lambda x: (x.clamp(0, 1) + 1) / 2,
            "You clamped to [0, 1] before rescaling, which throws away everything below 0: the darker half of the "
            "picture. Rescale first, or clamp to [-1, 1].",
        ),
        Wrong(
            lambda x: x.clamp(0, 1),
            "You clamped but did not rescale: the decoder's 0 is middle grey, and yours becomes black.",
        ),
        Wrong(
            lambda x: x.clamp(-1, 1),
            "You clamped to [-1, 1] but did not rescale: a screen's numbers go from 0 to 1, so -1 has to become 0.",
        ),
        Wrong(
            lambda x: (x + 1).clamp(0, 1),
            "You shifted by 1 but did not halve: [-1, 1] is two wide and becomes [0, 2], so everything brighter than "
            "middle grey turns white.",
        ),
        Wrong(
            lambda x: (x / 2).clamp(0, 1),
            "You halved without shifting: [-1, 1] becomes [-0.5, 0.5], so the darker half of the picture turns black.",
        ),
        Wrong(
            _stretched,
            "You stretched every picture between its own smallest and largest value. Then a dark picture would come "
            "out as bright as any other: use the fixed ends -1 and 1 instead.",
        ),
        Wrong(
            lambda x: 255 * ((x + 1) / 2).clamp(0, 1),
            "This is right up to the last step: you went on to 0..255, and this function should stay in [0, 1].",
        ),
    ),
)


def _numbers(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _positions(shape: tuple[int, ...]) -> int:
    return shape[-1] * shape[-2]


times_fewer = Exercise(
    name="How much smaller is a latent?",
    oracle=lambda picture, latents: _numbers(picture) / _numbers(latents),
    probes=lambda g: [
        ((3, 512, 512), (4, 64, 64)),
        ((3, 128, 128), (4, 16, 16)),
        ((3, 256, 384), (3, 64, 96)),
        ((1, 96, 64), (16, 6, 4)),
        ((3, 64, 64), (5, 8, 8)),
    ],
    good="For Stable Diffusion it is 48: 64 times fewer positions, with four numbers at each instead of three.",
    wrong_answers=(
        Wrong(
            lambda picture, latents: _positions(picture) / _positions(latents),
            "You counted positions (height times width). That is the 64 that is often quoted, but a pixel holds 3 "
            "numbers and a position of the latent holds 4: count those too.",
        ),
        Wrong(
            lambda picture, latents: _numbers(picture) // _numbers(latents),
            "You divided with `//`, which cuts the fraction off. The sizes need not fit into each other: use `/`.",
        ),
        Wrong(
            lambda picture, latents: picture[-1] / latents[-1],
            "You compared one side only. A picture has two sides, and channels besides.",
        ),
        Wrong(
            lambda picture, latents: _numbers(latents) / _numbers(picture),
            "This is upside down: it says what share of the numbers is left. How many times fewer are there?",
        ),
        Wrong(
            lambda picture, latents: _numbers(picture) / _positions(latents),
            "You counted the picture's channels but not the latent's.",
        ),
        Wrong(
            lambda picture, latents: _positions(picture) / _numbers(latents),
            "You counted the latent's channels but not the picture's.",
        ),
        Wrong(
            lambda picture, latents: _numbers(picture) - _numbers(latents),
            "You subtracted: that is how many numbers are saved. The question is how many times fewer there are.",
        ),
        Wrong(
            lambda picture, latents: sum(picture) / sum(latents),
            "You added the sizes up. A box of 3 by 512 by 512 numbers holds their product.",
        ),
    ),
)
