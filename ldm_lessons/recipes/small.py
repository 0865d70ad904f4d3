"""Small models for single lessons: VAEs that shrink 4, 8 and 16 times, a U-Net in pixels, and a race among them.

All are of 64 x 64 scenes, but for the pixel U-Net of lesson 02, whose scenes have 32 x 32. None of them reads a text.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from ldm_lessons import cards, checkpoints, data, scenes, schedules, training
from ldm_lessons.judge import Judge
from ldm_lessons.machine import data_dir
from ldm_lessons.metrics import features, frechet_distance, psnr, write_json
from ldm_lessons.recipes.common import attention_for, batch_of, drive, hardware, latents, minutes_at, picture_row
from ldm_lessons.recipes.unet import SCHEDULER, noised, target
from ldm_lessons.recipes.vae import reconstruction_loss
from ldm_lessons.samplers import SAMPLERS
from ldm_lessons.training import Plan
from ldm_lessons.unet import UNet, UNetConfig
from ldm_lessons.vae import VAE, VAEConfig
from ldm_lessons.weights import load_model, save_model

SMALL_VAES = {
    "vae-f4": VAEConfig(latent_channels=3, block_out_channels=(24, 48, 96), norm_num_groups=4, sample_size=64),
    "vae-f8": VAEConfig(latent_channels=4, block_out_channels=(16, 32, 64, 96), norm_num_groups=4, sample_size=64),
    "vae-f16": VAEConfig(
        latent_channels=16, block_out_channels=(16, 32, 64, 64, 96), norm_num_groups=4, sample_size=64
    ),
}
RACERS = {"1": None, "4": "vae-f4", "8": "vae-f8", "16": "vae-f16"}
DRAWS = 256  # pictures by which a racer is judged
PIXEL_STAGES = (130, 900, 3000)  # steps after which pixel samples are kept


def small_unet(channels: int, side: int, widths: tuple[int, ...] = (32, 64, 96)) -> UNet:
    """A U-Net without words: its middle reads one row of zeros where others read a text."""
    return UNet(UNetConfig(
        sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=widths, heads=4,
        down_block_types=("DownBlock2D",) * len(widths), norm_num_groups=8, cross_attention_dim=32,
    ))  # fmt: skip


def wordless(x: Tensor) -> Tensor:
    """What stands in the place of a text beside x (B, C, h, w): (B, 1, 32) zeros."""
    return x.new_zeros(len(x), 1, 32)


def train_small_vae(plan: Plan, args: argparse.Namespace) -> None:
    """One of `SMALL_VAES`, by the pocket VAE's loss without the judge, which looks at larger pictures."""
    vae, facts = small_vae(args.name, SMALL_VAES[args.name], 1e-3, plan, args)
    facts["latent"] = [vae.config.latent_channels, 64 // vae.config.downscale, 64 // vae.config.downscale]
    save_model(vae, data_dir() / "small" / args.name)
    cards.record(args.name, facts)
    print(facts["validation"])


def small_vae(name: str, config: VAEConfig, kl_weight: float, plan: Plan, args: argparse.Namespace) -> tuple[VAE, dict]:
    """A VAE of 64 x 64 pictures trained in `runs/name`, averaged and scaled, and the facts of its training."""
    source = data.pictures(scenes.SPLITS["train"][: plan.rows], 64, args.runs / "cache")
    torch.manual_seed(plan.seed)
    vae = VAE(config).to(memory_format=torch.channels_last)

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> dict[str, Tensor]:
        wanted = batch_of(source, rows, vae) * 2 - 1
        built, found = model(wanted, rng)
        kl = found.kl().mean() / found.mean[0].numel()
        return {"loss": reconstruction_loss(built.float(), wanted) + kl_weight * kl, "kl": kl}

    facts = drive(name, vae, loss, plan, args)
    vae.load_state_dict(checkpoints.ema_weights(args.runs / name))
    vae.eval()
    shown = _held_out(args, min(500, plan.rows))
    with torch.inference_mode():
        z = vae.encode(batch_of(source, torch.arange(min(500, plan.rows)), vae) * 2 - 1).mode()
        vae.config = replace(vae.config, scaling_factor=round(1 / z.std().item(), 5))
    facts["validation"] = {"psnr": round(psnr(_through(vae, shown), shown).mean().item(), 2)}
    facts["scaling_factor"] = vae.config.scaling_factor
    return vae, facts


def _held_out(args: argparse.Namespace, count: int, side: int = 64) -> Tensor:
    drawn = data.pictures(scenes.SPLITS["validation"][:count], side, args.runs / "cache")
    return torch.from_numpy(drawn).float() / 255


def _looked_at(judge: Judge, pictures: Tensor) -> Tensor:
    """What the judge sees in pictures smaller than those it knows."""
    return features(judge, F.interpolate(pictures, (128, 128), mode="bilinear"))


def compare_kl_weights(plan: Plan, args: argparse.Namespace) -> None:
    """The f=8 VAE with four weights of the KL term: `data/small/kl.json`, and for each two rows of pictures.

    The rows are drawn pictures through it, and what its decoder makes of plain Gaussian noise.
    """
    folder, result = data_dir() / "small", {}
    folder.mkdir(parents=True, exist_ok=True)
    for weight in (0.0, 1e-3, 0.3, 3.0):
        vae, facts = small_vae(f"kl-{weight}", SMALL_VAES["vae-f8"], weight, plan, args)
        shown = _held_out(args, 200)
        with torch.inference_mode():
            found = vae.encode(shown * 2 - 1)
            rows = {
                "through": vae.decode(found.mode()[:12]),
                "noise": vae.decode(torch.randn(found.mean[:12].shape, generator=training.generator(0, 8))),
            }
        for kind, made in rows.items():
            picture_row((made / 2 + 0.5).clamp(0, 1)).save(folder / f"kl-{weight}-{kind}.webp", quality=85, method=6)
        result[str(weight)] = {
            "psnr": facts["validation"]["psnr"],
            "kl": round((found.kl().mean() / found.mean[0].numel()).item(), 3),
            "deviation of the means": round(found.mean.std().item(), 3),
            "deviation of one latent": round((0.5 * found.logvar).exp().mean().item(), 4),
            "minutes": facts["minutes"],
        }
        write_json(folder / "kl.json", result)


def train_pixels(plan: Plan, args: argparse.Namespace) -> None:
    """The denoiser of 32 x 32 pictures for lesson 02; rows of samples along the way are kept, and the last weights."""
    folder = data_dir() / "small" / "pixels"

    def watch(progress: training.Progress) -> None:
        if progress.step in (*PIXEL_STAGES, plan.steps):
            unet = _filled(small_unet(3, 32), progress.ema)
            folder.mkdir(parents=True, exist_ok=True)
            picture_row(_pictures(unet, None, 12)).save(folder / f"step-{progress.step:05}.webp", quality=90, method=6)
            if progress.step == plan.steps:
                save_model(unet, folder)

    unet, facts = pixel_denoiser("pixels", "v_prediction", plan, args, watch)
    facts["stages"] = [
        {"step": step, "minutes": minutes_at(facts["curve"], step)}
        for step in sorted({*PIXEL_STAGES, plan.steps})
        if step <= plan.steps
    ]
    cards.record("pixels", facts)


def pixel_denoiser(
    name: str, prediction: str, plan: Plan, args: argparse.Namespace,
    watch: Callable[[training.Progress], None] | None = None,
) -> tuple[UNet, dict]:  # fmt: skip
    """A U-Net of 32 x 32 pictures trained in `runs/name`, averaged, and the facts of its training."""
    source = data.pictures(scenes.SPLITS["train"][: plan.rows], 32, args.runs / "cache")
    torch.manual_seed(plan.seed)
    unet, schedule = small_unet(3, 32), schedules.NoiseSchedule.from_config(SCHEDULER)

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        x0 = batch_of(source, rows, unet) * 2 - 1
        return denoising_loss(model, x0, torch.zeros_like(x0), schedule, rng, prediction)

    facts = drive(name, unet, loss, plan, args, watch)
    unet.load_state_dict(checkpoints.ema_weights(args.runs / name))
    return unet.eval(), facts


def compare_predictions(plan: Plan, args: argparse.Namespace) -> None:
    """The same network and budget for noise, picture and v: `data/small/predictions.json`, a row of samples each."""
    judge, folder, result = Judge.load().float().eval(), data_dir() / "small", {}
    real = _looked_at(judge, _held_out(args, 1000, 32))
    for prediction in ("epsilon", "sample", "v_prediction"):
        unet, facts = pixel_denoiser(f"pixels-{prediction}", prediction, plan, args)
        shown = _pictures(unet, None, DRAWS, prediction)
        seen = _looked_at(judge, shown)
        folder.mkdir(parents=True, exist_ok=True)
        picture_row(shown[:12]).save(folder / f"predicts-{prediction}.webp", quality=90, method=6)
        result[prediction] = {
            "steps": plan.steps, "batch": plan.batch, "minutes": facts["minutes"],
            "fid": round(frechet_distance(seen, real), 1),
        }  # fmt: skip
        write_json(folder / "predictions.json", result)


def record_band(plan: Plan, args: argparse.Namespace) -> None:
    """Between which losses the first steps of lesson 02's training lie, from three seeds: `data/small/band.json`."""
    smooth = []
    for seed in range(3):
        _, facts = pixel_denoiser(f"band-{seed}", "v_prediction", replace(plan, seed=seed), args)
        curve, level = [], None
        for row in facts["curve"]:
            level = row["loss"] if level is None else 0.9 * level + 0.1 * row["loss"]
            curve.append(level)
        smooth.append(curve)
    low, high = ([round(f(v), 4) for v in zip(*smooth, strict=True)] for f in (min, max))
    write_json(data_dir() / "small" / "band.json", {"low": low, "high": high, "batch": plan.batch, "rows": plan.rows})


def denoising_loss(
    model: nn.Module, mean: Tensor, deviation: Tensor, schedule: schedules.NoiseSchedule, rng: torch.Generator,
    prediction: str = "v_prediction",
) -> Tensor:  # fmt: skip
    """The mean squared error, (), on what `mean` and `deviation` (B, C, h, w) give."""
    x0, noise, t = noised(mean, deviation, schedule, rng)
    device = next(model.parameters()).device
    x, wanted = (v.to(device) for v in (schedule.add_noise(x0, noise, t), target(schedule, prediction, x0, noise, t)))
    with sdpa_kernel(attention_for(device)):
        answer = model(x, t.to(device), wordless(x))
    return (answer.float() - wanted).square().mean()


@torch.inference_mode()
def sample_small(
    unet: nn.Module, count: int, prediction: str = "v_prediction", steps: int = 20, seed: int = 0, batch: int = 64
) -> Tensor:
    """`count` samples (N, C, h, w) of a U-Net without words, by DPM-Solver++."""
    side, channels, made = unet.config.sample_size, unet.config.in_channels, []
    noise = torch.randn(count, channels, side, side, generator=training.generator(seed, 7))
    for x in noise.split(batch):
        sampler = SAMPLERS["dpmpp_2m"].from_config(SCHEDULER | {"prediction_type": prediction})
        sampler.set_timesteps(steps)
        x = x.to(unet.conv_in.weight)
        for t in sampler.timesteps:
            x = sampler.step(unet(x, t, wordless(x)), t, x, return_dict=False)[0]
        made.append(x)
    return torch.cat(made)


def race(plan: Plan, args: argparse.Namespace) -> None:
    """The same U-Net in pixels and in latents of three sizes, as many minutes each (arXiv:2112.10752 figure 6).

    Every few minutes of training each makes `DRAWS` pictures; `data/small/race.json` has their Fréchet distance to
    drawn scenes ("fid") and to drawn scenes that went through its VAE ("own"), and a row of them at the end is beside
    it. "ceiling" is the distance between those two kinds of scenes: what encoding and decoding alone cost. `--minutes`
    says how long each has.
    """
    minutes = args.minutes or 12.0
    source = data.pictures(scenes.SPLITS["train"][: plan.rows], 64, args.runs / "cache")
    judge, schedule = Judge.load().float().eval(), schedules.NoiseSchedule.from_config(SCHEDULER)
    drawn, folder = _held_out(args, 1000), data_dir() / "small"
    real = _looked_at(judge, drawn)
    floor = round(frechet_distance(real[:DRAWS], real[DRAWS:]), 2)
    result = {"minutes": minutes, "hardware": hardware(), "floor": floor, "batch": plan.batch, "racers": {}}
    for f, name in RACERS.items():
        vae = None if name is None else load_model(VAE, None, folder / name).float()
        mean, deviation = _compressed(vae, source, args.runs / "race")
        coded = real if vae is None else _looked_at(judge, _through(vae, drawn))
        torch.manual_seed(plan.seed)
        unet = small_unet(mean.shape[1], mean.shape[2])
        points, marks, spent, began = [], [minutes * k / 6 for k in range(1, 7)], 0.0, time.perf_counter()

        def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
            return denoising_loss(model, mean[rows], deviation[rows], schedule, rng)  # noqa: B023 (used in this turn)

        for progress in training.train(unet, loss, plan, args.runs / f"race-f{f}", precision=args.precision):
            spent += (time.perf_counter() - began) / 60
            if spent >= marks[0]:
                marks.pop(0)
                pictures = _pictures(_filled(small_unet(mean.shape[1], mean.shape[2]), progress.ema), vae, DRAWS)
                seen = _looked_at(judge, pictures)
                fid, own = (round(frechet_distance(seen, other), 2) for other in (real, coded))
                points.append({"minutes": round(spent, 2), "step": progress.step, "fid": fid, "own": own})
                print(f, points[-1], flush=True)
            if not marks:
                break
            began = time.perf_counter()
        picture_row(pictures[:12]).save(folder / f"race-f{f}.webp", quality=85, method=6)
        result["racers"][f] = {
            "latent": list(mean.shape[1:]), "parameters": sum(p.numel() for p in unet.parameters()), "points": points,
            "ceiling": round(frechet_distance(coded[:DRAWS], real[DRAWS:]), 2),
        }  # fmt: skip
        write_json(folder / "race.json", result)


@torch.inference_mode()
def _through(vae: VAE, pictures: Tensor) -> Tensor:
    """Pictures (N, 3, 64, 64) in [0, 1], encoded and decoded."""
    back = torch.cat([vae.decode(vae.encode(x * 2 - 1).mode()) for x in pictures.split(50)])
    return (back / 2 + 0.5).clamp(0, 1)


def _compressed(vae: VAE | None, source: np.ndarray, runs: Path) -> tuple[Tensor, Tensor]:
    """What the U-Net of a race learns from: pictures in [-1, 1] or scaled latents, and their deviation; float16."""
    if vae is None:
        pixels = (torch.from_numpy(np.array(source)).float() / 127.5 - 1).half()
        return pixels, torch.zeros(1, 1, 1, 1).half().expand_as(pixels)
    return latents(vae, source, runs)


@torch.inference_mode()
def _pictures(unet: nn.Module, vae: nn.Module | None, count: int, prediction: str = "v_prediction") -> Tensor:
    x = sample_small(unet, count, prediction)
    if vae is not None:
        x = torch.cat([vae.decode(z / vae.config.scaling_factor) for z in x.split(64)])
    return (x / 2 + 0.5).clamp(0, 1)


def _filled(unet: UNet, state: dict) -> UNet:
    unet.load_state_dict(state)
    return unet.eval()
