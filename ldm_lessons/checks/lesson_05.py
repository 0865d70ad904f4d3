"""Marking for 05_latent_diffusion: the training step, the way to the screen, the choice of f, and three patients."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ldm_lessons.schedules import NoiseSchedule, scaled_linear
from ldm_lessons.vae import Gaussian

from ._core import Exercise, Wrong


class _ToyVAE:
    """Something that encodes and decodes, half the size, and depends on every number that goes in."""

    def __init__(self, g: torch.Generator, scaling_factor: float):
        self.config = SimpleNamespace(scaling_factor=scaling_factor)
        self.mix = torch.randn(4, 12, generator=g)

    def encode(self, x: Tensor) -> Gaussian:
        patches = torch.nn.functional.pixel_unshuffle(x, 2)  # (B, 12, H/2, W/2)
        z = torch.einsum("oc,bchw->bohw", self.mix, patches)
        return Gaussian(z, -1 - z.square().clamp_max(2))

    def decode(self, z: Tensor) -> Tensor:
        patches = torch.einsum("oc,bohw->bchw", self.mix, z.tanh() + 0.2 * z)
        return 0.3 * torch.nn.functional.pixel_shuffle(patches, 2)


def _toy_unet(z: Tensor, t: Tensor) -> Tensor:
    return (1 + t.view(-1, 1, 1, 1) / 700) * z.roll(1, -1).tanh() + 0.3 * z


def _steps(g: torch.Generator) -> list[tuple]:
    schedule, found = NoiseSchedule(scaled_linear()), []
    for factor, t in ((0.4, [700, 20, 350]), (0.18215, [5, 600, 999])):
        vae, x = _ToyVAE(g, factor), torch.rand(3, 3, 8, 8, generator=g)
        noise = torch.randn(3, 4, 4, 4, generator=g)
        found.append((_toy_unet, vae, x, torch.tensor(t), noise, schedule, torch.Generator().manual_seed(len(found))))
    return found


def _loss(
    unet, vae, x, t, noise, schedule, rng,
    before=lambda x: 2 * x - 1, drawn=True, scale=lambda z, f: z * f, late=None, target="v", reduce=Tensor.mean,
):  # fmt: skip
    """The right loss when all options are left alone; written with the formulas, not with the schedule's methods."""
    posterior, f = vae.encode(before(x)), vae.config.scaling_factor
    z = scale(posterior.sample(rng) if drawn else posterior.mode(), f)
    a = schedule.alpha_bar[t].sqrt().to(z.dtype).view(-1, 1, 1, 1)
    s = (1 - schedule.alpha_bar[t]).sqrt().to(z.dtype).view(-1, 1, 1, 1)
    z_t = a * z + s * noise
    wanted = {"v": a * noise - s * z, "eps": noise, "z": z, "raw": a * noise - s * z / f}[target]
    return reduce((unet(z_t if late is None else late(z_t, f), t) - wanted) ** 2)


def _other(**changes: Any):
    return lambda *args: _loss(*args, **changes)


latent_loss = Exercise(
    name="The latent training step",
    oracle=_loss,
    probes=_steps,
    rtol=1e-3,
    good="The decoder was not needed once: it has its turn when the last step is taken, and not before.",
    wrong_answers=(
        Wrong(
            _other(before=lambda x: x),
            "You gave the encoder pictures from 0 to 1. The VAE was trained on pictures from -1 to 1.",
        ),
        Wrong(
            _other(scale=lambda z, f: z),
            "The scaling factor is missing: behind the encoder the latent is multiplied by it, before any noise comes.",
        ),
        Wrong(
            _other(scale=lambda z, f: z / f),
            "You divided by the scaling factor. It is 1 over the latents' standard deviation, so multiplying by it is "
            "what makes their variance 1; dividing belongs before the decoder.",
        ),
        Wrong(
            _other(scale=lambda z, f: z, late=lambda z_t, f: f * z_t),
            "You scaled z_t, noise and all. The latent is to be scaled before the noise is added: the noise already "
            "has variance 1.",
        ),
        Wrong(
            _other(drawn=False),
            "You took the Gaussian's mean. That is nearly the same with a good VAE, but the task says to draw the "
            "latent: `.sample(rng)`.",
        ),
        Wrong(
            _other(target="eps"),
            "You compared the network's answer with the noise. This network predicts v: `schedule.velocity`.",
        ),
        Wrong(
            _other(target="z"),
            "You compared the network's answer with the clean latent. This network predicts v: `schedule.velocity`.",
        ),
        Wrong(
            _other(target="raw"),
            "Your velocity is made from the latent as the encoder gave it. z_t holds the scaled latent, so v has to be "
            "that of the scaled one.",
        ),
        Wrong(
            _other(reduce=Tensor.sum),
            "You summed the squares. The loss is their mean, so that it does not grow with batch and latent.",
        ),
        Wrong(
            lambda unet, vae, x, t, noise, schedule, rng: _loss(
                lambda z_t, t: unet(z_t, torch.zeros_like(t)), vae, x, t, noise, schedule, rng
            ),
            "You told the network t = 0 for every row. It has to know how much noise there is: `unet(z_t, t)`.",
        ),
    ),
)


def _finished(g: torch.Generator) -> list[tuple]:
    return [(torch.randn(2, 4, 3, 3, generator=g), _ToyVAE(g, factor)) for factor in (0.5, 0.18215, 1.3)]


def _seen(z: Tensor, vae: _ToyVAE) -> Tensor:
    return vae.decode(z * (1 / vae.config.scaling_factor)).add(1).mul(0.5).clip(0, 1)


to_picture = Exercise(
    name="From the latent to the screen",
    oracle=_seen,
    probes=_finished,
    good="One division, and the picture has its colours. Nothing would have warned you: no shape changes by it.",
    wrong_answers=(
        Wrong(
            lambda z, vae: (vae.decode(z) / 2 + 0.5).clamp(0, 1),
            "The division by the scaling factor is missing: the decoder wants latents as the encoder gives them.",
        ),
        Wrong(
            lambda z, vae: (vae.decode(z * vae.config.scaling_factor) / 2 + 0.5).clamp(0, 1),
            "You multiplied by the scaling factor. That was done behind the encoder; before the decoder it is undone.",
        ),
        Wrong(
            lambda z, vae: (vae.decode(z) / vae.config.scaling_factor / 2 + 0.5).clamp(0, 1),
            "You divided the picture, not the latent. The division comes before the decoder, which is no linear map.",
        ),
        Wrong(
            lambda z, vae: (vae.decode(z / 0.18215) / 2 + 0.5).clamp(0, 1),
            "0.18215 is Stable Diffusion's number. Every VAE has its own: `vae.config.scaling_factor`.",
        ),
        Wrong(
            lambda z, vae: vae.decode(z / vae.config.scaling_factor).clamp(0, 1),
            "The latent is right, but the decoder's pictures go from -1 to 1: the dark half is cut off. Move them to 0 "
            "to 1 before you clamp.",
        ),
        Wrong(
            lambda z, vae: vae.decode(z / vae.config.scaling_factor) / 2 + 0.5,
            "All but the last: some numbers overshoot 0 and 1. Clamp them.",
        ),
        Wrong(
            lambda z, vae: vae.decode(z / vae.config.scaling_factor),
            "The latent is right; now the picture has to go from -1 to 1 to 0 to 1, and be clamped.",
        ),
        Wrong(
            lambda z, vae: (vae.decode((z / vae.config.scaling_factor).clamp(-1, 1)) / 2 + 0.5).clamp(0, 1),
            "You clamped the latent. Latents have no borders at -1 and 1; only pictures are clamped.",
        ),
    ),
)


def _racer(*points: tuple[float, int, float]) -> dict:
    return {"points": [dict(zip(("minutes", "step", "fid"), point, strict=True)) for point in points]}


def _races(g: torch.Generator) -> list[tuple]:
    racers = {
        "1": _racer((2.1, 20, 950.0), (4.0, 40, 930.0), (8.0, 80, 300.0), (16.0, 160, 90.0)),
        "4": _racer((2.0, 200, 700.0), (4.1, 400, 320.0), (8.0, 800, 180.0), (16.2, 1600, 110.0)),
        "8": _racer((2.0, 500, 400.0), (4.0, 1000, 350.0), (8.1, 2000, 220.0), (16.0, 4000, 200.0)),
        "16": _racer((1.0, 300, 380.0), (3.0, 900, 310.0), (4.0, 1200, 370.0), (8.0, 2400, 365.0), (16.0, 4800, 390.0)),
    }
    ceilings = {"4": 27.0, "8": 24.0, "16": 23.0}
    clients = [(1.5, 0.0), (2.0, 0.0), (4.0, 0.0), (4.1, 0.0), (8.0, 0.0), (8.0, 24.0), (9.0, 25.0), (8.5, 28.0)]
    return [(racers, ceilings, *client) for client in [*clients, (100.0, 0.0), (100.0, 20.0), (16.0, 24.0)]]


def _pick(racers, ceilings, minutes, least, keep=lambda p, m: p["minutes"] <= m, of=lambda points: points[-1]["fid"]):
    """The lowest of what `of` says of the points kept, among the racers that the client accepts."""
    best = None
    for f, racer in racers.items():
        points = [p for p in racer["points"] if keep(p, minutes)]
        if not points or (f in ceilings and ceilings[f] < least):
            continue
        if best is None or of(points) < best[0]:
            best = (of(points), f)
    return None if best is None else best[1]


def _next_point(racers, ceilings, minutes, least):
    later = {f: [p for p in r["points"] if p["minutes"] >= minutes] or r["points"][-1:] for f, r in racers.items()}
    fine = {f: points[0]["fid"] for f, points in later.items() if ceilings.get(f, float("inf")) >= least}
    return min(fine, key=fine.get)


best_f = Exercise(
    name="Which f for this budget?",
    oracle=_pick,
    probes=_races,
    good="Mind what the answer left out: the time to train the VAE, and what the pictures cost afterwards.",
    wrong_answers=(
        Wrong(
            lambda r, c, m, least: _pick(r, c, m, least, keep=lambda p, m: True),
            "You took the last point of each racer. That is the end of the recording, not of the budget.",
        ),
        Wrong(
            lambda r, c, m, least: _pick(r, c, m, 0),
            "You did not ask the client: a VAE whose ceiling is below `least_psnr` is out.",
        ),
        Wrong(
            lambda r, c, m, least: _pick({f: x for f, x in r.items() if f in c}, c, m, least),
            "You left the pixels out. They have no VAE, so no entry in `ceilings`, and no ceiling: "
            "`ceilings.get(f, float('inf'))`.",
        ),
        Wrong(
            lambda r, c, m, least: _pick(r, c, m, least, of=lambda points: -points[-1]["fid"]),
            "You took the largest distance. Of distances to the drawn scenes the lowest is the best.",
        ),
        Wrong(
            lambda r, c, m, least: _pick(r, c, m, least, of=lambda points: -points[-1]["step"]),
            "You took the one with the most steps. Steps are what it costs; what you get is the distance, `fid`.",
        ),
        Wrong(
            _next_point,
            "You took the first point *after* the minutes are over. Only what is reached within them counts.",
        ),
        Wrong(
            lambda r, c, m, least: _pick(r, c, m, least, keep=lambda p, m: p["minutes"] < m),
            "A point exactly at the budget is still within it: `<=`.",
        ),
        Wrong(
            lambda r, c, m, least: _pick(r, c, m, least, of=lambda points: min(p["fid"] for p in points)),
            "You took each racer's best point so far. A network cannot be had from the past unless somebody kept it: "
            "the task asks for the *last* point within the minutes.",
        ),
        Wrong(
            lambda r, c, m, least: int(_pick(r, c, m, least)),
            "The right f, but as a number: return the string that is the key in `racers`.",
        ),
    ),
)


FAULTS = ("not unscaled", "v taken for epsilon", "weak noise", "stopped early", "wrong range")
_ILL = {"A": "stopped early", "B": "not unscaled", "C": "v taken for epsilon"}


def fault_of(patient: str) -> str:
    """The fault of patient "A", "B" or "C", for the cell that makes their pictures. (No peeking.)"""
    return _ILL[patient]


class _Anything:
    """Equal to whatever stands in this place, so that a sentence can be about one patient only."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


class _Unknown:
    """Equal to every text that is the name of no fault."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unknown) or (isinstance(other, str) and other not in FAULTS)

    __hash__ = None


_NOT = {  # what speaks against a fault, patient by patient
    "A": {
        "not unscaled": "A has all its contrast; what is wrong with it is what lies over the scene. A latent that is "
        "not divided gives a clean picture, only pale.",
        "v taken for epsilon": "A's latent is about as large as its twin's. Had v been taken for epsilon at every "
        "step, it would be many times larger.",
        "weak noise": "A has too much in it, blotches everywhere; with weak noise to begin with there is too little.",
        "wrong range": "A is as bright as its twin. In the wrong range the dark half of every picture turns black.",
    },
    "B": {
        "v taken for epsilon": "B's latent is as large as its twin's and its scene is clean: the sampler did its work. "
        "Look behind it.",
        "weak noise": "B has every detail that its twin has, only paler. With weak noise, details would be missing.",
        "stopped early": "B has no blotches, and its latent has just the twin's size: all steps were taken.",
        "wrong range": "B is not too dark: its darkest places are grey. In the wrong range they would be black.",
    },
    "C": {
        "not unscaled": "C is not pale, on the contrary; and its latent itself is far too large. The fault is in the "
        "loop, not behind it.",
        "weak noise": "Weak noise gives a scene with too little in it, and a latent of ordinary size. C's is huge.",
        "stopped early": "With noise left over a latent is still about as large as its twin's: variance 1, noise "
        "included. C's is many times larger: something added up, step by step.",
        "wrong range": "The range is lost behind the decoder, so the latent would be the twin's. C's latent is far too "
        "large.",
    },
}


def _about(patient: str, name: object, message: str) -> Wrong:
    return Wrong({p: name if p == patient else _Anything() for p in _ILL}, message)


diagnosis = Exercise(
    name="Three patients",
    oracle=lambda: _ILL,
    good="Size of the latent, contrast, grain: three looks that find most faults of a latent diffusion pipeline.",
    wrong_answers=(
        *(_about(patient, name, text) for patient, known in _NOT.items() for name, text in known.items()),
        *(
            _about(patient, _Unknown(), f"{patient}: that is none of the names in the table. Copy one, quotes and all.")
            for patient in _ILL
        ),
    ),
)
