"""The VAE's recipe."""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lessons import cards, checkpoints, scenes, training
from ldm_lessons.judge import Judge, score
from ldm_lessons.machine import data_dir
from ldm_lessons.metrics import features, frechet_distance, psnr
from ldm_lessons.recipes.common import batch_of, by_style, drive, training_pictures, validation
from ldm_lessons.training import Plan
from ldm_lessons.vae import VAE, VAEConfig
from ldm_lessons.weights import save_model


def reconstruction_loss(built: Tensor, wanted: Tensor) -> Tensor:
    """L1 and squared error at full, half, quarter and eighth size, and L1 of the differences at the finer two.

    The coarse sizes make it find the colour of small things early; rain and hatching count at the finest alone.
    """
    total = torch.zeros((), device=wanted.device)
    for scale in range(4):
        total = total + (built - wanted).abs().mean() + 4 * (built - wanted).square().mean()
        if scale < 2:
            steps = [(x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]) for x in (built, wanted)]
            total = total + 0.5 * sum((a - b).abs().mean() for a, b in zip(*steps, strict=True))
        built, wanted = F.avg_pool2d(built, 2), F.avg_pool2d(wanted, 2)
    return total


def likeness(judge: nn.Module, built: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance between what the judge's layers see in two pictures in [-1, 1] (as in arXiv:1801.03924 eq. (1)).

    The layers are those at 32 x 32, 16 x 16 and 8 x 8. It is added to the pixels' own error, in which small things
    hardly count.
    """
    total = torch.zeros((), device=wanted.device)
    for layers in (judge.stem, judge.body[:4], judge.body[4:]):
        built, wanted = layers(built), layers(wanted)
        total = total + (F.normalize(built.float()) - F.normalize(wanted.float())).square().sum(1).mean()
    return total


def crops_of_detail(pictures: Tensor, rng: torch.Generator, size: int = 64) -> Tensor:
    """One crop of each picture (B, 3, S, S), at a place that is the likelier the more there is to see."""
    small = F.avg_pool2d(pictures, 4)  # rain and hatching are gone, things remain
    change = (small[..., 1:, 1:] - small[..., :-1, 1:]).abs() + (small[..., 1:, 1:] - small[..., 1:, :-1]).abs()
    chance = F.avg_pool2d(F.pad(change.mean(1, True), (1, 0, 1, 0)), size // 4, 2)  # every eighth pixel
    places = torch.multinomial(chance.flatten(1).square().cpu() + 1e-6, 1, generator=rng)[:, 0].tolist()
    wide = chance.shape[-1]
    corners = [(8 * (k // wide), 8 * (k % wide)) for k in places]
    cut = [p[:, y : y + size, x : x + size] for p, (y, x) in zip(pictures, corners, strict=True)]
    return torch.stack(cut).contiguous(memory_format=torch.channels_last)


def train_vae(plan: Plan, args: argparse.Namespace) -> None:
    """The f=8 VAE, without any downloaded network in its loss; then its scaling factor."""
    source = training_pictures(plan, args.runs)
    vae = VAE(VAEConfig.pocket()).to(memory_format=torch.channels_last)
    judge = Judge.load().float().requires_grad_(False).to(memory_format=torch.channels_last)
    kl_weight, likeness_weight = 1e-3, 0.3  # the first of the mean over latent numbers

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> dict[str, Tensor]:
        if torch.rand((), generator=rng) < 0.25:
            wanted = batch_of(source, rows[: max(1, len(rows) // 4)], vae) * 2 - 1  # as many pixels as in the crops
        else:
            wanted = crops_of_detail(batch_of(source, rows, vae) * 2 - 1, rng)
        built, latents = model(wanted, rng)
        rebuilt = reconstruction_loss(built.float(), wanted)
        alike = likeness(judge.to(wanted.device), built, wanted)
        kl = latents.kl().mean() / latents.mean[0].numel()
        l1 = (built.detach().float() - wanted).abs().mean()
        return {"loss": rebuilt + likeness_weight * alike + kl_weight * kl, "l1": l1, "kl": kl}

    facts = drive("vae", vae, loss, plan, args)
    vae.load_state_dict(checkpoints.ema_weights(args.runs / "vae"))
    vae.eval()
    with torch.inference_mode():
        z = torch.cat(
            [
                vae.encode(batch_of(source, torch.arange(i, min(i + 50, plan.rows)), vae) * 2 - 1).mode()
                for i in range(0, min(1000, plan.rows), 50)
            ]
        )
        vae.config = replace(vae.config, scaling_factor=round(1 / z.std().item(), 5))
    facts["validation"] = through(vae, judge.eval(), *validation(min(1000, plan.rows), args.runs))
    facts["validation"]["channel_std"] = [round(v, 3) for v in (z.std((0, 2, 3)) * vae.config.scaling_factor).tolist()]
    facts["scaling_factor"] = vae.config.scaling_factor
    save_model(vae, data_dir() / "pocket" / "vae")
    cards.record("vae", facts)
    print(facts["validation"], facts["scaling_factor"])


@torch.inference_mode()
def through(vae: nn.Module, judge: nn.Module, held_out: list[scenes.Scene], shown: Tensor) -> dict:
    """What is left of unseen pictures after the VAE: PSNR and Fréchet distance by style, what the judge still sees.

    "noise" is the mean PSNR when the scaled latents have noise of that deviation on them.
    """
    scale = vae.config.scaling_factor
    latents = torch.cat([vae.encode(x * 2 - 1).mode() * scale for x in shown.split(50)])

    def pictures(noise: float) -> Tensor:
        noisy = latents + noise * torch.randn(latents.shape, generator=training.generator(0, 3))
        return torch.cat([(vae.decode(z / scale) / 2 + 0.5).clamp(0, 1) for z in noisy.split(50)])

    built = pictures(0)
    quality, seen, real = psnr(built, shown), features(judge, built), features(judge, shown)
    rows = by_style(held_out)
    found = {"psnr": {style: round(quality[of].mean().item(), 2) for style, of in rows.items()}}
    found["rFID"] = {
        style: round(frechet_distance(seen[of], real[of]), 2) for style, of in ({"all": slice(None)} | rows).items()
    }
    found["noise"] = {str(noise): round(psnr(pictures(noise), shown).mean().item(), 2) for noise in (0.05, 0.1, 0.2)}
    for key, x in (("drawn", shown), ("through it", built)):
        found[key] = score(judge, x, held_out).to_dict()["all_right"]
    return found
