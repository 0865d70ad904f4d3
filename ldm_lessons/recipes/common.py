"""What the recipes share: the pictures they read, and the run with its progress bar and its facts for the card."""

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import PreTrainedTokenizerBase

from ldm_lessons import checkpoints, data, scenes, training
from ldm_lessons.judge import Judge
from ldm_lessons.machine import cores
from ldm_lessons.pipeline import to_pil
from ldm_lessons.text import tokenize
from ldm_lessons.training import Plan
from ldm_lessons.vae import VAE

WORDINGS = 4  # captions of each scene that training reads


def training_pictures(plan: Plan, runs: Path) -> np.ndarray:
    """The training pictures, uint8 (rows, 3, 128, 128)."""
    return data.pictures(scenes.SPLITS["train"][: plan.rows], 128, runs / "cache")


def validation(count: int, runs: Path) -> tuple[list[scenes.Scene], Tensor]:
    """The first validation scenes and their pictures, float32 (count, 3, 128, 128) in [0, 1]."""
    drawn = data.pictures(scenes.SPLITS["validation"][:count], 128, runs / "cache")
    return [scenes.sample_scene(i, "validation") for i in range(count)], torch.from_numpy(drawn).float() / 255


def by_style(some: list[scenes.Scene]) -> dict[str, list[int]]:
    """Which of the scenes are drawn in each style, for the styles that are there."""
    found = {style: [i for i, scene in enumerate(some) if scene.style == style] for style in scenes.STYLES}
    return {style: rows for style, rows in found.items() if rows}


def batch_of(source: np.ndarray, rows: Tensor, like: nn.Module) -> Tensor:
    """Rows of uint8 pictures as floats in [0, 1], on the model's device."""
    where = next(like.parameters()).device
    picked = torch.from_numpy(source[rows.numpy()])
    return (picked.to(where).float() / 255).contiguous(memory_format=torch.channels_last)


def made_once(
    what: str, folder: Path, net: nn.Module, count: int, each: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `each` makes of the first `count` training scenes, 64 rows a call: made once, then read from `folder`.

    The file's name tells `net`'s weights and the code that draws, so what another made is not taken for it.
    """
    from safetensors.torch import load_file, save_file
    from tqdm.auto import tqdm

    digest = hashlib.sha256(data.drawing_code().encode())
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode() + value.cpu().float().contiguous().numpy().tobytes())
    path = folder / f"{what}-{digest.hexdigest()[:8]}.safetensors"
    if path.exists():
        found = {name: value[:count] for name, value in load_file(path).items()}
        if all(len(value) == count for value in found.values()):
            return found
    folder.mkdir(parents=True, exist_ok=True)
    parts, threads, device = [], torch.get_num_threads(), next(net.parameters()).device
    torch.set_num_threads(os.cpu_count() or 1)  # the other processes wait
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16), tqdm(total=count, desc=what) as bar:
        for rows in torch.arange(count).split(64):
            parts.append({name: value.cpu() for name, value in each(rows).items()})
            bar.update(len(rows))
    torch.set_num_threads(threads)
    found = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    aside = path.with_suffix(".part")
    save_file(found, aside)
    os.replace(aside, path)
    return found


def latents(vae: VAE, source: np.ndarray, folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every picture's latent, scaled: float16 (N, C, h, w), kept in `folder`."""

    def each(rows: Tensor) -> dict[str, Tensor]:
        found, scale = vae.encode(batch_of(source, rows, vae) * 2 - 1), vae.config.scaling_factor
        return {
            "mean": (found.mean.float() * scale).half(),
            "std": ((0.5 * found.logvar.float()).exp() * scale).half(),
        }

    found = made_once("latents", folder, vae, len(source), each)
    return found["mean"], found["std"]


def seen_by_judge(source: np.ndarray, folder: Path, device: torch.device) -> Tensor:
    """The judge's layers at 8 x 8 on every picture: float16 (N, C, 8, 8), kept in `folder`."""
    judge = Judge.load().float().to(device).eval()

    def each(rows: Tensor) -> dict[str, Tensor]:
        return {"seen": judge.body(judge.stem(batch_of(source, rows, judge) * 2 - 1)).half()}

    return made_once("judge", folder, judge, len(source), each)["seen"]


def usual_and_spread(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over the first of `seen` (N, C, h, w): (1, C, 1, 1) both."""
    some = seen[:4096].float()
    return some.mean((0, 2, 3), keepdim=True), some.std((0, 2, 3), keepdim=True) + 1e-3


def captions(plan: Plan) -> list[list[str]]:
    """`WORDINGS` captions of every training scene."""
    return [
        [scenes.caption(scenes.sample_scene(s), w) for w in range(WORDINGS)]
        for s in scenes.SPLITS["train"][: plan.rows]
    ]


def token_table(tokenizer: PreTrainedTokenizerBase, texts: list[list[str]]) -> Tensor:
    """All captions as tokens: int16 (scenes, wordings, 77)."""
    flat = [t for row in texts for t in row]
    parts = [tokenize(tokenizer, flat[i : i + 8192]).to(torch.int16) for i in range(0, len(flat), 8192)]
    return torch.cat(parts).view(len(texts), -1, 77)


def spoken(table: Tensor, rows: Tensor, nothing: Tensor, dropped: float, rng: torch.Generator) -> Tensor:
    """One of the captions of each row as tokens (B, 77); a share `dropped` of them says `nothing`."""
    ids = table[rows, torch.randint(table.shape[1], (len(rows),), generator=rng)].long()
    ids[torch.rand(len(rows), generator=rng) < dropped] = nothing
    return ids


def attention_for(device: torch.device) -> SDPBackend | list[SDPBackend]:
    """The fastest attention: on CPUs, plain is a sixth faster in training at these sizes than the fused kernel."""
    if device.type == "cpu":
        return SDPBackend.MATH
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def picture_row(pictures: Tensor) -> Image.Image:
    """Pictures (N, 3, H, W) in [0, 1] side by side, as PIL."""
    return to_pil(torch.cat(list(pictures), 2)[None])[0]


def drive(
    name: str, model: nn.Module, loss: training.Loss, plan: Plan, args: argparse.Namespace,
    watch: Callable[[training.Progress], None] | None = None,
) -> dict:  # fmt: skip
    """Run the training with a progress bar; returns what the model card says of it.

    The first process calls `watch` after every step.
    """
    from accelerate import PartialState
    from tqdm.auto import tqdm

    folder = args.runs / name
    began, last = time.monotonic(), None
    first = os.environ.get("RANK", "0") == "0"
    with tqdm(total=plan.steps, desc=name, unit="step", disable=not first) as bar:
        for progress in training.train(model, loss, plan, folder, precision=args.precision, compile=args.compile):
            bar.update(progress.step - bar.n)
            if progress.step % 20 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in progress.losses.items()})
            last = progress
            if first and watch is not None:
                watch(progress)
            if args.minutes and time.monotonic() - began > 60 * args.minutes and progress.step < plan.steps:
                raise SystemExit(
                    f"{args.minutes} minutes are over at step {progress.step}; the same command goes on from there"
                )
    PartialState().destroy_process_group()  # or their threads may abort the ones that end first
    if not first:
        raise SystemExit  # what follows is for one process
    _, header = checkpoints.read(folder)
    curve = header["curve"]
    chosen = "".join(f" --{k} {v}" for k in ("steps", "rows", "batch") if (v := getattr(args, k)) is not None)
    return {
        "command": f"{launcher()} -m ldm_lessons.recipes {name} --precision {args.precision}{chosen}",
        "plan": asdict(plan),
        "samples": plan.steps * plan.batch,
        "minutes": round(minutes_of(curve)[-1], 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "hardware": hardware(),
        "versions": {m: __import__(m).__version__ for m in ("torch", "diffusers", "transformers", "accelerate")},
        "curve": curve if last is None else last.curve,
    }


def minutes_of(curve: list[dict]) -> list[float]:
    """How long the training had taken at each row of its curve; the rows' own clock starts anew at every resumption."""
    spent, found, before = 0.0, [], 0.0
    for row in curve:
        spent += row["seconds"] - (before if row["seconds"] >= before else 0)
        before = row["seconds"]
        found.append(spent / 60)
    return found


def minutes_at(curve: list[dict], step: int) -> float:
    """How long the training had taken at the row of its curve that is nearest to `step`."""
    row = min(range(len(curve)), key=lambda i: abs(curve[i]["step"] - step))
    return round(minutes_of(curve)[row], 1)


def launcher() -> str:
    """How this process was started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return "python" if count == "1" else f"torchrun --standalone --nproc_per_node {count}"


def hardware() -> str:
    """What it runs on, in a few words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    count = cores()
    return f"{count} CPU core{'s' * (count > 1)}"
