"""The recipes that teach the finished U-Net to look at a picture: one for inpainting, and a ControlNet for maps."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from ldm_lessons import cards, checkpoints, data, generate, models, scenes, schedules, show, training
from ldm_lessons.controlnet import ControlNet
from ldm_lessons.judge import Judge, pictures_to_tensor, score
from ldm_lessons.machine import data_dir
from ldm_lessons.pipeline import LatentDiffusion
from ldm_lessons.recipes.common import (
    attention_for,
    batch_of,
    captions,
    drive,
    latents,
    made_once,
    spoken,
    token_table,
    training_pictures,
)
from ldm_lessons.recipes.unet import SCHEDULER, noised
from ldm_lessons.scenes.things import PLACE_X
from ldm_lessons.text import tokenize
from ldm_lessons.training import Plan
from ldm_lessons.unet import UNet
from ldm_lessons.weights import save_changes

TRAINED = ("conv_in.", "down_blocks.0.", "up_blocks.2.", "conv_norm_out.", "conv_out.")  # all at 16 x 16
CAPTIONS_DROPPED = 0.5  # of a ControlNet's: it is to read the map (arXiv:2302.05543 section 3.3)


def frozen_model(
    plan: Plan, args: argparse.Namespace
) -> tuple[LatentDiffusion, torch.device, np.ndarray, Tensor, Tensor, Tensor]:
    """The pocket model, frozen, and its device; pictures; mean and deviation of their latents; captions as tokens."""
    from accelerate import PartialState

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load(data_dir() / "pocket", device, torch.float32)
    with PartialState(cpu=device.type == "cpu").main_process_first():
        source = training_pictures(plan, args.runs)
        mean, deviation = latents(model.vae, source, args.runs / "unet")
    return (
        model,
        device,
        source,
        mean[: plan.rows],
        deviation[: plan.rows],
        token_table(model.tokenizer, captions(plan)),
    )


def hole(rng: torch.Generator, things: Tensor | None = None, size: int = 128) -> Tensor:
    """A random mask, bool (size, size): one to three boxes and ovals, and sometimes around the scene's things."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    mask = torch.zeros(size, size, dtype=torch.bool)
    for _ in range(int(torch.randint(1, 4, (), generator=rng))):
        cx, cy = (torch.rand(2, generator=rng) * size).tolist()
        rx, ry = (size * (0.08 + 0.27 * torch.rand(2, generator=rng))).tolist()
        box = ((x - cx).abs() < rx) & ((y - cy).abs() < ry)
        oval = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        mask |= box if torch.rand((), generator=rng) < 0.5 else oval
    if things is not None and things.any() and torch.rand((), generator=rng) < 0.5:
        wide = 2 * int(torch.randint(4, 10, (), generator=rng)) + 1
        mask = F.max_pool2d(things[None, None].float(), wide, 1, wide // 2)[0, 0] > 0
    return mask


def masked_latents(model: LatentDiffusion, source: np.ndarray, maps: np.ndarray, folder: Path) -> tuple[Tensor, Tensor]:
    """One hole for each picture, at latent size (N, 1, 16, 16), and the latent of what is left (N, 4, 16, 16)."""
    first, vae = scenes.LABELS.index("house"), model.vae

    def each(rows: Tensor) -> dict[str, Tensor]:
        here = torch.from_numpy(maps[rows.numpy()] >= first).repeat_interleave(4, 1).repeat_interleave(4, 2)
        masks = [hole(training.generator(0, 4, int(r)), m) for r, m in zip(rows, here, strict=True)]
        masks = torch.stack(masks)[:, None].to(model.device)
        shown = batch_of(source, rows, vae).where(~masks, 0.5)
        found = vae.encode(shown * 2 - 1).mode()
        return {"hole": F.max_pool2d(masks.float(), 8).bool(), "kept": (found * vae.config.scaling_factor).half()}

    found = made_once("masked", folder, vae, len(source), each)
    return found["hole"], found["kept"]


def maps_of(plan: Plan, runs: Path) -> np.ndarray:
    """The semantic maps of the training scenes, uint8 (rows, 32, 32)."""
    path = runs / "cache" / f"maps-{data.drawing_code()}-{plan.rows}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        some = scenes.SPLITS["train"][: plan.rows]
        aside = path.with_suffix(".part.npy")
        np.save(aside, np.stack([scenes.semantic_map(scenes.sample_scene(s), 32) for s in some]))
        os.replace(aside, path)
    return np.load(path)


def train_inpaint(plan: Plan, args: argparse.Namespace) -> None:
    """The pocket U-Net with five more channels: a mask, and the latent of what is kept (arXiv:2112.10752 section 4.5).

    Only its first and last layers and the levels at 16 x 16 are trained. They see the new channels first and the
    answer last; the rest knows the world already. So less than 1 MB is kept instead of 22.
    """
    model, device, source, mean, deviation, table = frozen_model(plan, args)
    holes, left = masked_latents(model, source, maps_of(plan, args.runs), args.runs / "inpaint")
    unet = UNet(replace(model.unet.config, in_channels=9))
    state = model.unet.state_dict()
    state["conv_in.weight"] = F.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, 5))  # at first it does not look
    unet.load_state_dict(state)
    for name, p in unet.named_parameters():
        p.requires_grad_(name.startswith(TRAINED))
    schedule = schedules.NoiseSchedule.from_config(SCHEDULER)
    nothing = tokenize(model.tokenizer, "")[0]

    def loss(net: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        x0, noise, t = noised(mean[rows], deviation[rows], schedule, rng)
        new, beside = holes[rows].float(), left[rows].float()
        x, wanted = torch.cat([schedule.add_noise(x0, noise, t), new, beside], 1), schedule.velocity(x0, noise, t)
        with sdpa_kernel(attention_for(device)):
            with torch.no_grad():
                text = model.text_encoder(spoken(table, rows, nothing, 0.1, rng).to(device))
            answer = net(x.to(device), t.to(device), text)
        error = (answer.float() - wanted.to(device)).square().mean(1, keepdim=True)
        new = new.to(device)
        weight = 0.2 + new  # what is kept is put back anyway
        return (error * weight / weight.mean()).mean()

    facts = drive("inpaint", unet, loss, plan, args)
    unet.load_state_dict(checkpoints.ema_weights(args.runs / "inpaint"))
    facts["trained parameters"] = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    save_changes(unet, data_dir() / "inpaint", model.unet.state_dict())
    facts["validation"] = judge_inpainting(replace(model, unet=unet.eval()), model, min(256, plan.rows // 16))
    cards.record("inpaint", facts)
    print(facts["validation"])


@torch.no_grad()
def judge_inpainting(trained: LatentDiffusion, plain: LatentDiffusion, count: int) -> dict:
    """New things painted into drawn scenes that have none: how often the judge sees the thing at its place.

    "blended" is the same by the U-Net of four channels, for which the kept part is put back after every step; "seam" is
    the mean jump of colour across the mask's edge, "drawn" what it is before.
    """
    judge = Judge.load()
    asked, holed, prompts, found = [], [], [], {}
    for i in range(4 * count):
        scene = scenes.sample_scene(i, "test")
        if len(scene.objects) == 1 and len(asked) < count:
            asked.append(scene)
            holed.append(scenes.draw(replace(scene, objects=())))
            prompts.append(scenes.caption_with_mentions(scene, 0))
    for key, model in (("trained", trained), ("blended", plain)):
        made, edge = [], {"after": [], "before": []}
        for scene, picture, words in zip(asked, holed, prompts, strict=True):
            x = int(128 * PLACE_X[scene.objects[0].place])
            mask = torch.zeros(128, 128)
            mask[16:120, max(x - 30, 0) : x + 30] = 1
            made += generate.inpaint(
                model, picture, mask, words.text, generator=training.generator(0, 6, scene.seed), progress=False
            )
            for when, p in (("after", made[-1]), ("before", picture)):
                edge[when].append(jump(np.asarray(p), mask.numpy() > 0))
        seen = score(judge, pictures_to_tensor(made), asked, [p.mentions for p in prompts])
        found[key] = {name: round(seen.accuracy(name), 4) for name in ("object", "place", "colour")}
        found[key]["seam"] = round(float(np.mean(edge["after"])), 2)
        found["drawn"] = {"seam": round(float(np.mean(edge["before"])), 2)}
    return found | {"scenes": len(asked)}


def jump(picture: np.ndarray, mask: np.ndarray) -> float:
    """The mean difference, of 255, between pixels on the two sides of a mask's edge."""
    down, right = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    p = picture.astype(float)
    steps = [np.abs(p[1:] - p[:-1])[down], np.abs(p[:, 1:] - p[:, :-1])[right]]
    return float(np.concatenate(steps).mean())


def train_controlnet(plan: Plan, args: argparse.Namespace) -> None:
    """A ControlNet (arXiv:2302.05543) that reads a semantic map, painted in the colours of `show.LABEL_COLOURS`.

    Its two parts at 4 x 4 stay as the U-Net has them: they are most of its weights, and need not be kept a second time.
    """
    model, device, _, mean, deviation, table = frozen_model(plan, args)
    maps, colours = torch.from_numpy(maps_of(plan, args.runs)), torch.tensor(show.LABEL_COLOURS).float() / 255
    net = ControlNet.from_unet(model.unet, conditioning_embedding_out_channels=(16, 32, 32, 64))
    for part in (net.down_blocks[-1], net.mid_block):
        part.requires_grad_(False)
    frozen = model.unet.requires_grad_(False)
    schedule = schedules.NoiseSchedule.from_config(SCHEDULER)
    nothing = tokenize(model.tokenizer, "")[0]

    def painted(rows: Tensor) -> Tensor:
        shown = colours[maps[rows].long()].permute(0, 3, 1, 2)
        return F.interpolate(shown, scale_factor=4.0, mode="nearest")

    def loss(net: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        x0, noise, t = noised(mean[rows], deviation[rows], schedule, rng)
        x, wanted, t = (v.to(device) for v in (schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t), t))
        with sdpa_kernel(attention_for(device)):
            with torch.no_grad():
                text = model.text_encoder(spoken(table, rows, nothing, CAPTIONS_DROPPED, rng).to(device))
            out = frozen(x, t, text, net(x, t, text, painted(rows).to(device)))
        return (out.float() - wanted).square().mean()

    facts = drive("controlnet", net, loss, plan, args)
    net.load_state_dict(checkpoints.ema_weights(args.runs / "controlnet"))
    facts["trained parameters"] = sum(p.numel() for p in net.parameters() if p.requires_grad)
    save_changes(net.eval(), data_dir() / "controlnet", frozen.state_dict())
    facts["validation"] = judge_control(model, net, min(256, plan.rows // 16))
    cards.record("controlnet", facts)
    print(facts["validation"])


@torch.no_grad()
def judge_control(model: LatentDiffusion, net: ControlNet, count: int) -> dict:
    """What the judge sees of `count` painted maps when no word is said: with the ControlNet, and without it."""
    judge, colours = Judge.load(), torch.tensor(show.LABEL_COLOURS).float() / 255
    asked = [scenes.sample_scene(i, "test") for i in range(count)]
    told = [{"ground", "backdrop"} | {f"{o.kind}{x}" for o in s.objects for x in ("", ".place")} for s in asked]
    maps = torch.stack([torch.from_numpy(scenes.semantic_map(s, 128)).long() for s in asked])
    found: dict[str, Any] = {"maps": count}
    for key in ("with the map", "without"):
        made = []
        for i in range(0, count, 16):
            picture = colours[maps[i : i + 16]].permute(0, 3, 1, 2).to(model.device)
            control = net.on(picture) if key == "with the map" else None
            nothing = [""] * len(picture)
            made += generate.text_to_image(
                model, nothing, guidance_scale=1.0, seed=i, control=control, progress=False
            )  # fmt: skip
        seen = score(judge, pictures_to_tensor(made), asked, told)
        found[key] = {name: round(seen.accuracy(name), 4) for name in ("ground", "backdrop", "object", "place")}
    return found
