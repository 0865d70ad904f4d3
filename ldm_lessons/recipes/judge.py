"""The judge's recipe."""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lessons import cards, checkpoints, scenes
from ldm_lessons import judge as judging
from ldm_lessons.machine import data_dir
from ldm_lessons.recipes.common import batch_of, by_style, drive, training_pictures, validation
from ldm_lessons.training import Plan
from ldm_lessons.weights import save_model


def train_judge(plan: Plan, args: argparse.Namespace) -> None:
    """The judge, on drawn scenes alone; calibrated on validation scenes and scored on others."""
    source = training_pictures(plan, args.runs)
    truth = torch.tensor([judging.labels(scenes.sample_scene(s)) for s in scenes.SPLITS["train"][: plan.rows]])
    judge = judging.Judge().to(memory_format=torch.channels_last)

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        shown = batch_of(source, rows, judge)
        light = 1 + 0.06 * (torch.rand(len(rows), 3, 1, 1, generator=rng) - 0.5)
        grain = 0.03 * torch.rand(len(rows), 1, 1, 1, generator=rng) * torch.randn(shown.shape, generator=rng)
        soft = F.interpolate(F.avg_pool2d(shown, 2), scale_factor=2.0, mode="bilinear")
        blend = 0.7 * torch.rand(len(rows), 1, 1, 1, generator=rng).to(shown.device)
        seen = shown.lerp(soft, blend) * light.to(shown.device) + grain.to(shown.device)
        return judge.loss(model(seen), truth[rows].to(shown.device))

    facts = drive("judge", judge, loss, plan, args)
    judge.load_state_dict(checkpoints.ema_weights(args.runs / "judge"))
    judge.eval()
    count = min(2000, plan.rows)
    held_out, shown = validation(count + count // 2, args.runs)
    first, others = slice(0, count), slice(count, None)
    facts["validation"] = judging.score(judge, shown[first], held_out[first]).to_dict()
    facts["validation"]["all right by style"] = {
        style: judging.score(judge, shown[of], [held_out[i] for i in of]).to_dict()["all_right"]
        for style, of in by_style(held_out[first]).items()
    }
    error = judging.calibration_error(judge, shown[first], held_out[first])
    temperature = judging.calibrate(judge, shown[others], held_out[others])
    facts["validation"]["calibration"] = {
        "error before": round(error, 5),
        "temperature": round(temperature, 3),
        "error": round(judging.calibration_error(judge, shown[first], held_out[first]), 5),
    }
    save_model(judge, data_dir() / "judge")
    cards.record("judge", facts)
    print(facts["validation"])
