"""How good a model that makes scenes is, in numbers that can be had again:

    python -m ldm_lessons.metrics               # the pocket model: data/pocket/scores.json
    python -m ldm_lessons.metrics --grid 96     # adds how guidance, steps and samplers change it

What it measures with are the judge (does the picture show what its prompt says?), the Fréchet distance in the judge's
features (do all pictures together look like the drawn ones?) and the nearest training scene (is it a copy?).
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_lessons import scenes
from ldm_lessons.judge import Judge, pictures_to_tensor, score

PARTS = {"prompts": ("test", 0), "paraphrases": ("test", 5), "composition": ("composition", 0)}  # split, wording
GUIDANCE, STEPS = (1.0, 3.0, 5.0, 7.5), (5, 10, 20, 50)
DRAWN = 40_000  # training scenes in which the nearest is looked for


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], one number a picture: (B,)."""
    return -10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features (N, D), (M, D), each taken as a Gaussian (arXiv:1706.08500 eq. (6))."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def nearest(pictures: Tensor, among: Tensor, batch: int = 2048) -> tuple[Tensor, Tensor]:
    """The nearest row of `among` for each of `pictures`, and how far it is: root mean square difference, index (N,).

    Both are (N, ...) with equal shapes behind; `among` may be uint8, which stands for [0, 1].
    """
    x = pictures.flatten(1).float()
    best, index = torch.full((len(x),), float("inf")), torch.zeros(len(x), dtype=torch.long)
    for start in range(0, len(among), batch):
        y = among[start : start + batch].flatten(1)
        y = y.float() / 255 if y.dtype == torch.uint8 else y.float()
        found, where = torch.cdist(x, y).min(1)
        index = torch.where(found < best, where + start, index)
        best = best.minimum(found)
    return best / x.shape[1] ** 0.5, index


@torch.inference_mode()
def features(judge: Judge, pictures: Tensor, batch: int = 64) -> Tensor:
    """What the judge's heads read in `pictures` (N, 3, 128, 128): (N, 384), for the Fréchet distance."""
    return torch.cat([judge.features(p) for p in pictures.split(batch)])


def make(
    model: Any, texts: Sequence[str], label: str, *, steps: int = 20, guidance_scale: float = 5.0,
    sampler: str = "dpmpp_2m", batch: int = 16,
) -> tuple[Tensor, float]:  # fmt: skip
    """Pictures (N, 3, 128, 128) in [0, 1] of all `texts`, picture i with seed i, and the seconds that one took."""
    from tqdm.auto import tqdm

    from ldm_lessons import generate

    made, began = [], time.perf_counter()
    with tqdm(total=len(texts), desc=label) as bar:
        for i in range(0, len(texts), batch):
            some = list(texts[i : i + batch])
            made += generate.text_to_image(
                model, some, num_inference_steps=steps, guidance_scale=guidance_scale, sampler=sampler, seed=i,
                progress=False,
            )  # fmt: skip
            bar.update(len(some))
    return pictures_to_tensor(made), (time.perf_counter() - began) / len(texts)


def grid(model: Any, judge: Judge, count: int) -> list[dict]:
    """DPM-Solver++ with every guidance, and the other samplers, all by steps: the judge's word on `count` prompts."""
    from ldm_lessons import samplers

    asked, told = _prompts("test", 0, count)
    cells = [("dpmpp_2m", steps, g) for steps in STEPS for g in GUIDANCE]
    cells += [(name, steps, 5.0) for name in samplers.SAMPLERS if name != "dpmpp_2m" for steps in STEPS]
    rows = []
    for name, steps, g in cells:
        label = f"{name}, {steps} steps, guidance {g}"
        shown, seconds = make(
            model, [t.text for t in told], label, steps=steps, guidance_scale=g, sampler=name, batch=32
        )
        found = score(judge, shown, asked, [t.mentions for t in told])
        rows.append({
            "sampler": name, "steps": steps, "guidance_scale": g, "count": count,
            "all_right": round(found.all_right[0] / count, 4), "object": round(found.accuracy("object"), 4),
            "seconds": round(seconds, 3),
        })  # fmt: skip
    return rows


def judge_model(
    name: str | Path = "pocket", count: int = 1000, *, steps: int = 20, guidance_scale: float = 5.0,
    runs: Path = Path("runs"),
) -> dict:  # fmt: skip
    """Score a model that makes scenes: pictures of `count` unseen prompts, held to what each prompt says.

    "prompts" come from the test split, "paraphrases" say the same scenes in other words, "composition" (a third as
    many) asks for combinations that training never showed. "drawn" is the judge's own accuracy on the drawn test
    scenes, "vae" the same after encoding and decoding: the ceiling of everything else. Seeds count from 0, so the
    result can be had again.
    """
    from ldm_lessons import data, generate, models

    judge, model = Judge.load(), models.load(name)
    result: dict = {"count": count, "steps": steps, "guidance_scale": guidance_scale, "sampler": "dpmpp_2m"}
    made = {}
    for part, (split, wording) in PARTS.items():
        asked, told = _prompts(split, wording, count // 3 if part == "composition" else count)
        made[part], seconds = make(model, [t.text for t in told], part, steps=steps, guidance_scale=guidance_scale)
        found = score(judge, made[part], asked, [t.mentions for t in told])
        result[part] = found.to_dict() | {"seconds": round(seconds, 3)}

    asked, told = _prompts("test", 0, count)
    mentions = [t.mentions for t in told]
    seeds = scenes.SPLITS["test"]
    drawn, other = (
        torch.from_numpy(data.pictures(seeds[i : i + count], 128, runs / "cache")).float() / 255 for i in (0, count)
    )
    with torch.inference_mode():
        rebuilt = torch.cat([generate.decode(model, generate.encode(model, x)).cpu() for x in drawn.split(16)])
    result["drawn"] = score(judge, drawn, asked, mentions).to_dict()
    result["vae"] = score(judge, rebuilt, asked, mentions).to_dict()
    result["vae"]["psnr"] = round(psnr(rebuilt, drawn).mean().item(), 2)
    real = features(judge, other)
    result["fid"] = {
        key: round(frechet_distance(features(judge, shown), real), 3)
        for key, shown in (("drawn", drawn), ("vae", rebuilt), ("made", made["prompts"]))
    }
    trained = torch.from_numpy(data.pictures(scenes.SPLITS["train"][:DRAWN], 32, runs / "cache"))
    result["nearest"] = {"among": DRAWN}
    for key, shown in (("made", made["prompts"]), ("drawn", drawn)):
        apart, _ = nearest(torch.nn.functional.avg_pool2d(shown, 4), trained)
        result["nearest"][key] = {"median": round(apart.median().item(), 4), "least": round(apart.min().item(), 4)}
    rows = result["prompts"]["attributes"]
    result["readme"] = {key: f"{100 * row['accuracy']:.0f} % of {row['asked']}" for key, row in rows.items()}
    whole = result["prompts"]["all_right"]
    result["readme"]["everything right"] = f"{100 * whole['accuracy']:.0f} % of {whole['asked']}"
    return result


def _prompts(split: str, wording: int, count: int) -> tuple[list[scenes.Scene], list[scenes.Caption]]:
    asked = [scenes.sample_scene(i, split) for i in range(count)]
    return asked, [scenes.caption_with_mentions(s, wording) for s in asked]


def write_json(path: Path, values: dict) -> None:
    """Write aside, then rename: what was there stays whole until the new file is."""
    aside = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps(values, indent=1) + "\n")
    aside.replace(path)


def main(arguments: list[str] | None = None) -> None:
    import argparse

    from ldm_lessons import models
    from ldm_lessons.machine import data_dir

    parser = argparse.ArgumentParser(prog="python -m ldm_lessons.metrics", description="Score a model with the judge.")
    parser.add_argument("name", nargs="?", default="pocket", help="a model that makes scenes (default: pocket)")
    parser.add_argument("--count", type=int, default=1000, help="prompts (default: 1000)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument(
        "--grid", type=int, default=0, metavar="N", help="only add this: how guidance, steps and samplers change it"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where drawn pictures are kept")
    args = parser.parse_args(arguments)
    path = data_dir() / "pocket" / "scores.json"
    if args.grid:
        rows = grid(models.load(args.name), Judge.load(), args.grid)
        print(json.dumps(rows, indent=1))
        if args.name == "pocket":
            write_json(path, json.loads(path.read_text()) | {"grid": rows})
        return
    result = judge_model(args.name, args.count, steps=args.steps, guidance_scale=args.guidance_scale, runs=args.runs)
    if args.name == "pocket":
        write_json(path, result)
    print(json.dumps(result["readme"] | {"fid": result["fid"], "nearest": result["nearest"]}, indent=1))


if __name__ == "__main__":
    main()
