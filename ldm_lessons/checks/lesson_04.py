"""Marking for 04_vae: reparameterisation, the KL term, the scaling factor, the size of a latent."""

import torch
from torch.distributions import Normal, kl_divergence

from ._core import Exercise, Wrong


def _clouds(g: torch.Generator) -> list[tuple]:
    """(mean, logvar, noise), with variances on both sides of 1."""
    found = []
    for shape in ((2, 4, 3, 3), (5,), (1, 3, 2, 4)):
        mean, logvar, noise = torch.randn(3, *shape, generator=g)
        found.append((mean, 1.5 * logvar, noise))
    return found


reparameterise = Exercise(
    name="A draw with a gradient",
    oracle=lambda mean, logvar, noise: logvar.exp().sqrt() * noise + mean,
    probes=_clouds,
    good="The randomness comes from outside; mean and logvar are only added and multiplied, so gradients reach both.",
    wrong_answers=(
        Wrong(
            lambda mean, logvar, noise: mean + logvar.exp() * noise,
            "You multiplied the noise by the variance. Its root, the standard deviation, belongs there: exp(logvar/2).",
        ),
        Wrong(
            lambda mean, logvar, noise: mean + logvar * noise,
            "You took logvar for the standard deviation. It is the *logarithm* of the variance: first exp, then root.",
        ),
        Wrong(
            lambda mean, logvar, noise: mean + 0.5 * logvar * noise,
            "Half of logvar is the logarithm of the standard deviation: an `exp()` is missing around it.",
        ),
        Wrong(
            lambda mean, logvar, noise: mean + logvar.sqrt() * noise,
            "You took the root of logvar, which may be negative. The variance is its exp; take the root of that.",
        ),
        Wrong(
            lambda mean, logvar, noise: mean + (2 * logvar).exp() * noise,
            "The root halves a logarithm, and you doubled it: exp(logvar / 2).",
        ),
        Wrong(
            lambda mean, logvar, noise: mean + (-0.5 * logvar).exp() * noise,
            "You divided by the standard deviation. The wider the cloud, the *more* noise belongs in it: multiply.",
        ),
        Wrong(
            lambda mean, logvar, noise: mean,
            "That is the middle of the cloud (`mode()` in the package). A draw lies beside it: add the noise, scaled.",
        ),
        Wrong(
            lambda mean, logvar, noise: mean + noise,
            "You added the noise at full strength: every cloud then has the width 1. Scale it by exp(logvar / 2).",
        ),
        Wrong(
            lambda mean, logvar, noise: (mean + noise) * (0.5 * logvar).exp(),
            "Only the noise is to be scaled; you scaled the mean with it.",
        ),
        Wrong(
            lambda mean, logvar, noise: mean + (0.5 * logvar).exp() * torch.randn_like(mean),
            "You drew noise of your own. Use the `noise` that is given, so that a seed decides what comes out.",
        ),
    ),
)

kl_to_standard = Exercise(
    name="The price of a cloud",
    oracle=lambda mean, logvar: (
        kl_divergence(Normal(mean.double(), logvar.double().exp().sqrt()), Normal(0.0, 1.0)).flatten(1).sum(1).float()
    ),
    probes=lambda g: [
        (2 * torch.randn(3, 4, 2, 2, generator=g), 1.5 * torch.randn(3, 4, 2, 2, generator=g) - 1),
        (torch.randn(5, 1, 1, 3, generator=g), torch.randn(5, 1, 1, 3, generator=g)),
        (torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)),
    ],
    good="It is 0 only where mean is 0 and logvar is 0: for the standard Gaussian itself.",
    wrong_answers=(
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).mean(1),
            "You took the mean over a latent's numbers. Their prices add up: sum them.",
        ),
        Wrong(
            lambda mean, logvar: (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1),
            "The factor of one half is missing.",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(),
            "You summed over the whole batch. Each picture's latent has its own sum: the answer has the shape (B,).",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + logvar.exp() - 1 - logvar),
            "These are the prices of the single numbers. Sum them over channels, rows and columns: (B,) is wanted.",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (1 + logvar - mean**2 - logvar.exp()).flatten(1).sum(1),
            "The sign is flipped. A divergence is never negative.",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + logvar.exp() - logvar).flatten(1).sum(1),
            "The -1 is missing: for mean 0 and logvar 0 the divergence is 0.",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (mean + logvar.exp() - 1 - logvar).flatten(1).sum(1),
            "The mean is to be squared: its distance from 0 counts, on whichever side it lies.",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + (2 * logvar).exp() - 1 - 2 * logvar).flatten(1).sum(1),
            "You took logvar for the logarithm of the standard deviation. It is that of the variance: no factor of 2.",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + logvar - 1 - logvar.log()).flatten(1).sum(1),
            "You used logvar as if it were the variance. The variance is `logvar.exp()`, and its logarithm is logvar.",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + (0.5 * logvar).exp() - 1 - 0.5 * logvar).flatten(1).sum(1),
            "You put the standard deviation where the variance belongs: exp(logvar), not exp(logvar / 2).",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * ((1 + mean**2) / logvar.exp() - 1 + logvar).flatten(1).sum(1),
            "This is the divergence the other way round, of the standard Gaussian from the cloud. The two differ.",
        ),
    ),
)


def _latents(g: torch.Generator) -> list[tuple]:
    """Latents whose channels have means of their own, and whose pictures differ in spread."""
    found = []
    for n, c, side, spread in ((12, 4, 8, 5.0), (30, 3, 6, 0.3)):
        of_picture = 0.3 + 1.4 * torch.rand(n, 1, 1, 1, generator=g)
        of_channel, middle = 0.5 + torch.rand(1, c, 1, 1, generator=g), torch.randn(1, c, 1, 1, generator=g) + 1
        found.append((spread * (of_picture * of_channel * torch.randn(n, c, side, side, generator=g) + middle),))
    return found


scaling_factor = Exercise(
    name="The scaling factor",
    oracle=lambda z: 1 / float(((z.double() - z.double().mean()) ** 2).mean()) ** 0.5,
    probes=_latents,
    rtol=2e-3,
    good="One number for all channels: it changes how large latents are, and nothing about their shape.",
    wrong_answers=(
        Wrong(
            lambda z: z.std().item(),
            "That is the standard deviation itself. Latents are *multiplied* by the factor: it is one over that.",
        ),
        Wrong(
            lambda z: 1 / z.var().item(),
            "You took one over the variance. To make a standard deviation 1, divide by the standard deviation.",
        ),
        Wrong(
            lambda z: z.var().item(),
            "That is the variance. What, multiplied with the latents, makes their standard deviation 1?",
        ),
        Wrong(
            lambda z: 1 / z.std(dim=(0, 2, 3)),
            "You have a factor for each channel. Stable Diffusion has one number for all of them.",
        ),
        Wrong(
            lambda z: (1 / z.std(dim=(1, 2, 3))).mean().item(),
            "You made a factor for each picture and averaged those. Take one standard deviation over all numbers.",
        ),
        Wrong(
            lambda z: 1 / z.std(dim=(1, 2, 3)).mean().item(),
            "You averaged the pictures' own standard deviations; how they differ from each other is then left out.",
        ),
        Wrong(
            lambda z: 1 / z.std(dim=(0, 2, 3)).mean().item(),
            "You averaged the channels' own standard deviations; how they differ from each other is then left out.",
        ),
        Wrong(
            lambda z: 1 / z.square().mean().sqrt().item(),
            "You measured the spread around 0. A standard deviation is measured around the mean.",
        ),
        Wrong(
            lambda z: 1 / z.abs().max().item(),
            "You scaled by the largest number, so that all fit between -1 and 1. What has to be 1 is the deviation.",
        ),
    ),
)

latent_size = Exercise(
    name="How much smaller is it?",
    oracle=lambda picture, f, c: (
        (c, picture[1] // f, picture[2] // f),
        float(f**2),
        picture[0] * picture[1] * picture[2] / (c * (picture[1] // f) * (picture[2] // f)),
    ),
    probes=lambda g: [
        ((3, 512, 512), 8, 4),
        ((3, 512, 768), 4, 3),
        ((1, 256, 128), 16, 16),
        ((3, 64, 96), 16, 7),
    ],
    good="So 64 and 48 are both right for Stable Diffusion, and they answer two different questions.",
    wrong_answers=(
        Wrong(
            lambda p, f, c: ((c, p[1] // f, p[2] // f), f**2, f**2),
            "The positions are right. For the numbers the channels count, too: how many there are at each position of "
            "the picture, and how many at each of the latent.",
        ),
        Wrong(
            lambda p, f, c: ((c, p[1] // f, p[2] // f), p[0] * f**2 / c, f**2),
            "You swapped the last two: positions come first, then numbers.",
        ),
        Wrong(
            lambda p, f, c: ((c, p[1] // f, p[2] // f), f, p[0] * f / c),
            "Height and width both shrink f times, so the positions are f * f times fewer.",
        ),
        Wrong(
            lambda p, f, c: ((c, p[1] // f, p[2] // f), f**2, f**2 / c),
            "A picture has several numbers at a position, too: its own channels belong above the fraction bar.",
        ),
        Wrong(
            lambda p, f, c: ((c, p[1] // f, p[2] // f), f**2, f**2 * c / p[0]),
            "The channels are upside down: the more channels the latent has, the *less* is gained.",
        ),
        Wrong(
            lambda p, f, c: ((c, p[1] // f, p[2] // f), 1 / f**2, c / (p[0] * f**2)),
            "These are the shares that are left. How many *times* fewer is one over that.",
        ),
        Wrong(
            lambda p, f, c: ((c, p[1] // f, p[2] // f), f**2, p[0] * f**2 // c),
            "You rounded the number of times down to a whole one: use `/`, not `//`, in that place.",
        ),
        Wrong(
            lambda p, f, c: ((c, p[2] // f, p[1] // f), f**2, p[0] * f**2 / c),
            "You swapped height and width in the latent's shape.",
        ),
        Wrong(
            lambda p, f, c: ((p[1] // f, p[2] // f, c), f**2, p[0] * f**2 / c),
            "In the latent's shape the channels come first, as in the picture's.",
        ),
        Wrong(
            lambda p, f, c: ((p[0], p[1] // f, p[2] // f), f**2, f**2),
            "You gave the latent the picture's channels. It has a number of its own, given as `channels`.",
        ),
    ),
)
