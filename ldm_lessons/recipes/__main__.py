"""The command line: `python -m ldm_lessons.recipes NAME`."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ldm_lessons import recipes
from ldm_lessons.recipes.clip import train_clip, train_text
from ldm_lessons.recipes.conditions import train_controlnet, train_inpaint
from ldm_lessons.recipes.judge import train_judge
from ldm_lessons.recipes.small import (
    SMALL_VAES,
    compare_kl_weights,
    compare_predictions,
    race,
    record_band,
    train_pixels,
    train_small_vae,
)
from ldm_lessons.recipes.unet import VARIANTS, compare_variants, train_unet
from ldm_lessons.recipes.vae import train_vae
from ldm_lessons.training import Plan

RUNS = Path("runs")
PLANS = {
    "judge": Plan(steps=20_000, rows=40_000, batch=16, learning_rate=1e-3, ema=0.998),
    "text": Plan(steps=2000, rows=40_000, batch=64, learning_rate=1e-3, ema=0.995),
    "clip": Plan(steps=2400, rows=40_000, batch=64, learning_rate=1e-3, ema=0.995),
    "vae": Plan(steps=10_000, rows=40_000, batch=16, learning_rate=1.5e-3, ema=0.998, weight_decay=0.0),
    "unet": Plan(steps=12_000, rows=40_000, batch=64, learning_rate=1e-3, ema=0.998),
    "compare": Plan(steps=1200, rows=40_000, batch=32, learning_rate=1e-3, ema=0.995),
    "inpaint": Plan(steps=2500, rows=12_000, batch=32, learning_rate=5e-4, ema=0.998),
    "controlnet": Plan(steps=1500, rows=12_000, batch=32, learning_rate=5e-4, ema=0.998),
    "vae-f4": Plan(steps=2400, rows=20_000, batch=16, learning_rate=1.5e-3, ema=0.995, weight_decay=0.0),
    "vae-f8": Plan(steps=2400, rows=20_000, batch=16, learning_rate=1.5e-3, ema=0.995, weight_decay=0.0),
    "vae-f16": Plan(steps=2400, rows=20_000, batch=16, learning_rate=1.5e-3, ema=0.995, weight_decay=0.0),
    "pixels": Plan(steps=3000, rows=20_000, batch=64, learning_rate=1e-3, ema=0.998),
    "predictions": Plan(steps=300, rows=20_000, batch=64, learning_rate=1e-3, ema=0.99, decay=0.0),
    "band": Plan(steps=150, rows=4000, batch=64, learning_rate=1e-3, ema=0.99, decay=0.0),
    "kl": Plan(steps=600, rows=20_000, batch=16, learning_rate=1.5e-3, ema=0.99, weight_decay=0.0),
    # a race ends by the clock, and is not gone on with
    "race": Plan(steps=10**9, rows=20_000, batch=64, learning_rate=1e-3, ema=0.998, save_seconds=1e9),
}
RECIPES: dict[str, Callable[[Plan, argparse.Namespace], None]] = {
    "judge": train_judge,
    "text": train_text,
    "clip": train_clip,
    "vae": train_vae,
    "unet": train_unet,
    "compare": compare_variants,
    "inpaint": train_inpaint,
    "controlnet": train_controlnet,
    **dict.fromkeys(SMALL_VAES, train_small_vae),
    "pixels": train_pixels,
    "predictions": compare_predictions,
    "band": record_band,
    "kl": compare_kl_weights,
    "race": race,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ldm_lessons.recipes", description=recipes.__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=RECIPES, help="what to train")
    parser.add_argument("--steps", type=int, help="how many steps in all (default: the recipe's)")
    parser.add_argument("--rows", type=int, help="how many training scenes (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="scenes a step")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16")
    parser.add_argument("--count", type=int, default=256, help="prompts by which `compare` judges a variant")
    parser.add_argument("--variant", choices=VARIANTS, default="shipped", help="other choices in the U-Net's loss")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model: slower to start, faster to run"
    )
    parser.add_argument("--minutes", type=float, help="stop after this long, to go on another time")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where checkpoints and drawn pictures are kept")
    args = parser.parse_args(arguments)
    changes = {k: v for k in ("steps", "rows", "batch") if (v := getattr(args, k)) is not None}
    try:
        plan = replace(PLANS[args.name], **changes)
        torch.manual_seed(plan.seed)  # the weights to begin with
        RECIPES[args.name](plan, args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"recipes: {error}") from error


if __name__ == "__main__":
    main()
