"""How the course's models were made, each by one command from nothing:

    python -m ldm_lessons.recipes judge        # and then clip, vae, unet, in this order
    torchrun --standalone --nproc_per_node 2 -m ldm_lessons.recipes vae     # two processes, one core each
    accelerate launch -m ldm_lessons.recipes unet                           # as `accelerate config` says: GPUs

A run that is killed goes on where its last checkpoint was, by the same command. Checkpoints and drawn pictures live in
`runs/`, results in `data/`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ldm_lessons import cards, checkpoints, data, scenes, training
from ldm_lessons.machine import data_dir
from ldm_lessons.training import Plan

RUNS = Path("runs")
PLANS = {
    "judge": Plan(steps=20_000, rows=40_000, batch=16, learning_rate=1e-3, ema=0.998),
    "clip": Plan(steps=2400, rows=40_000, batch=64, learning_rate=1e-3, ema=0.995),
    "vae": Plan(steps=10_000, rows=40_000, batch=16, learning_rate=1.5e-3, ema=0.998, weight_decay=0.0),
    "unet": Plan(steps=24_000, rows=40_000, batch=32, learning_rate=1e-3, ema=0.999),
}
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
}
WORDINGS = 4  # captions of each scene that training reads


def training_pictures(plan: Plan, runs: Path) -> np.ndarray:
    """The training pictures, uint8 (rows, 3, 128, 128)."""
    return data.pictures(scenes.SPLITS["train"][: plan.rows], 128, runs / "cache")


def validation(count: int, runs: Path) -> tuple[list[scenes.Scene], Tensor]:
    """The first validation scenes and their pictures, float32 (count, 3, 128, 128) in [0, 1]."""
    drawn = data.pictures(scenes.SPLITS["validation"][:count], 128, runs / "cache")
    return [scenes.sample_scene(i, "validation") for i in range(count)], torch.from_numpy(drawn).float() / 255


def batch_of(source: np.ndarray, rows: Tensor, like: nn.Module) -> Tensor:
    """Rows of uint8 pictures as floats in [0, 1], on the model's device."""
    where = next(like.parameters()).device
    picked = torch.from_numpy(source[rows.numpy()])
    return (picked.to(where).float() / 255).contiguous(memory_format=torch.channels_last)


def drive(name: str, model: nn.Module, loss: training.Loss, plan: Plan, args: argparse.Namespace) -> dict:
    """Run the training with a progress bar; returns what the model card says of it."""
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
            if args.minutes and time.monotonic() - began > 60 * args.minutes and progress.step < plan.steps:
                raise SystemExit(
                    f"{args.minutes} minutes are over at step {progress.step}; the same command goes on from there"
                )
    PartialState().destroy_process_group()  # or their threads may abort the ones that end first
    if not first:
        raise SystemExit  # what follows is for one process
    _, header = checkpoints.read(folder)
    curve = header["curve"]
    minutes = sum(max(b["seconds"] - a["seconds"], 0) for a, b in zip(curve, curve[1:], strict=False)) / 60
    return {
        "command": f"{launcher()} -m ldm_lessons.recipes {name} --precision {args.precision}",
        "plan": asdict(plan),
        "samples": plan.steps * plan.batch,
        "minutes": round(minutes, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "hardware": hardware(),
        "versions": {m: __import__(m).__version__ for m in ("torch", "diffusers", "transformers", "accelerate")},
        "curve": curve if last is None else last.curve,
    }


def launcher() -> str:
    """How this process was started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return "python" if count == "1" else f"torchrun --standalone --nproc_per_node {count}"


def hardware() -> str:
    """What it runs on, in a few words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


# --- judge ---------------------------------------------------------------------------------------------------------


def train_judge(plan: Plan, args: argparse.Namespace) -> None:
    """The judge, on drawn scenes alone; scored on the validation scenes."""
    from ldm_lessons import metrics
    from ldm_lessons.weights import save_model

    source = training_pictures(plan, args.runs)
    truth = torch.tensor([metrics.labels(scenes.sample_scene(s)) for s in scenes.SPLITS["train"][: plan.rows]])
    judge = metrics.Judge().to(memory_format=torch.channels_last)

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
    held_out, shown = validation(min(2000, plan.rows), args.runs)
    facts["validation"] = metrics.score(judge, shown, held_out).to_dict()
    save_model(judge, data_dir() / "judge")
    cards.record("judge", facts)
    print({k: v["accuracy"] for k, v in facts["validation"]["attributes"].items()})


# --- CLIP ----------------------------------------------------------------------------------------------------------


def train_tokenizer(captions: list[str], size: int = 400) -> PreTrainedTokenizerBase:
    """A `CLIPTokenizer` whose `size` merges were learnt on `captions` (byte-pair encoding, arXiv:1508.07909)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pattern = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size + 512, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *dict.fromkeys("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def captions(plan: Plan) -> list[list[str]]:
    """`WORDINGS` captions of every training scene."""
    return [
        [scenes.caption(scenes.sample_scene(s), w) for w in range(WORDINGS)]
        for s in scenes.SPLITS["train"][: plan.rows]
    ]


def token_table(tokenizer: PreTrainedTokenizerBase, texts: list[list[str]]) -> Tensor:
    """All captions as tokens: int16 (scenes, wordings, 77)."""
    from ldm_lessons.text import tokenize

    flat = [t for row in texts for t in row]
    parts = [tokenize(tokenizer, flat[i : i + 8192]).to(torch.int16) for i in range(0, len(flat), 8192)]
    return torch.cat(parts).view(len(texts), -1, 77)


def train_clip(plan: Plan, args: argparse.Namespace) -> None:
    """Tokenizer and small CLIP; its text tower becomes the pocket model's."""
    from ldm_lessons.clip import CLIP, VisionConfig
    from ldm_lessons.metrics import write_json
    from ldm_lessons.text import TextConfig, tokenize
    from ldm_lessons.weights import save_model

    source, texts = training_pictures(plan, args.runs), captions(plan)
    pocket = data_dir() / "pocket"
    tokenizer = train_tokenizer([t for row in texts[:5000] for t in row])
    tokenizer.save_pretrained(pocket / "tokenizer")
    write_json(pocket / "tokenizer" / "known_words.json", {"words": scenes.known_words()})
    ends = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    text = TextConfig.pocket(len(tokenizer), **ends)
    clip = CLIP(text, VisionConfig.pocket(), text.projection_dim).to(memory_format=torch.channels_last)
    table = token_table(tokenizer, texts)

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        shown = F.avg_pool2d(batch_of(source, rows, clip), 2) * 2 - 1
        ids = table[rows, torch.randint(WORDINGS, (len(rows),), generator=rng)].long().to(shown.device)
        ids = ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1]  # the rest is padding
        logits = model(ids, shown)
        same = torch.arange(len(rows), device=shown.device)
        return (F.cross_entropy(logits.float(), same) + F.cross_entropy(logits.float().T, same)) / 2

    facts = drive("clip", clip, loss, plan, args)
    clip.load_state_dict(checkpoints.ema_weights(args.runs / "clip"))
    clip.eval()
    held_out, shown = validation(min(1000, plan.rows), args.runs)
    with torch.inference_mode():
        ids = tokenize(tokenizer, [scenes.caption(s, WORDINGS) for s in held_out])  # a wording that training never read
        best = clip(ids, F.avg_pool2d(shown, 2) * 2 - 1).T.topk(5, 1).indices  # texts x pictures
    hit = best == torch.arange(len(held_out))[:, None]
    recall = {"recall@1": hit[:, 0], "recall@5": hit.any(1)}
    facts["validation"] = {k: round(v.float().mean().item(), 4) for k, v in recall.items()} | {"scenes": len(held_out)}
    save_model(clip, data_dir() / "clip")
    save_model(clip.text_model, pocket / "text_encoder")
    cards.record("clip", facts)
    print(facts["validation"])


# --- VAE -----------------------------------------------------------------------------------------------------------


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
    from ldm_lessons import metrics
    from ldm_lessons.vae import VAE, VAEConfig
    from ldm_lessons.weights import save_model

    source = training_pictures(plan, args.runs)
    vae = VAE(VAEConfig.pocket()).to(memory_format=torch.channels_last)
    judge = metrics.Judge.load().float().requires_grad_(False).to(memory_format=torch.channels_last)
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
        held_out, shown = validation(min(500, plan.rows), args.runs)
        built = torch.cat([vae.decode(vae.encode(x * 2 - 1).mode()) for x in shown.split(50)])
    quality = metrics.psnr((built / 2 + 0.5).clamp(0, 1), shown)
    styles = {s: [i for i, scene in enumerate(held_out) if scene.style == s] for s in scenes.STYLES}
    facts["validation"] = {"psnr": {s: round(quality[i].mean().item(), 2) for s, i in styles.items() if i}}
    facts["validation"]["channel_std"] = [round(v, 3) for v in (z.std((0, 2, 3)) * vae.config.scaling_factor).tolist()]
    facts["scaling_factor"] = vae.config.scaling_factor
    save_model(vae, data_dir() / "pocket" / "vae")
    cards.record("vae", facts)
    print(facts["validation"], facts["scaling_factor"])


# --- U-Net ---------------------------------------------------------------------------------------------------------


def latents(vae: nn.Module, source: np.ndarray, folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every picture's latent, scaled: float16 (N, 4, 16, 16), kept in `folder`."""
    from safetensors.torch import load_file, save_file
    from tqdm.auto import tqdm

    path = folder / "latents.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        vae, threads = vae.to(device).eval(), torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # the other processes wait
        means, deviations = [], []
        with torch.inference_mode(), tqdm(total=len(source), desc="encoding") as bar:
            for i in range(0, len(source), 64):
                rows = torch.arange(i, min(i + 64, len(source)))
                with torch.autocast(device.type, torch.bfloat16):
                    found = vae.encode(batch_of(source, rows, vae) * 2 - 1)
                scale = vae.config.scaling_factor
                means.append((found.mean.float() * scale).half().cpu())
                deviations.append(((0.5 * found.logvar.float()).exp() * scale).half().cpu())
                bar.update(len(rows))
        torch.set_num_threads(threads)
        aside = path.with_suffix(".part")
        save_file({"mean": torch.cat(means).contiguous(), "std": torch.cat(deviations).contiguous()}, aside)
        os.replace(aside, path)
    stored = load_file(path)
    return stored["mean"], stored["std"]


def places_of_things(plan: Plan) -> Tensor:
    """Where in its latent each training scene shows a thing or a bird: bool (rows, 1, 16, 16)."""
    first = scenes.LABELS.index("house")
    maps = (scenes.semantic_map(scenes.sample_scene(s), 64) for s in scenes.SPLITS["train"][: plan.rows])
    return torch.stack([F.max_pool2d(torch.from_numpy(m >= first)[None].float(), 4) > 0 for m in maps])


def train_unet(plan: Plan, args: argparse.Namespace) -> None:
    """The denoiser of latents: v-prediction (arXiv:2202.00512), every noise level alike, 10 % of captions dropped.

    Until the learning rate falls, errors where a thing is count six times: things are what the words are mostly about,
    and they cover a fifteenth of the pictures. The last part weighs all places alike, which takes the bias out again.
    """
    from accelerate import PartialState
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import CLIPTokenizer

    from ldm_lessons import schedules
    from ldm_lessons.metrics import write_json
    from ldm_lessons.text import TextEncoder, tokenize
    from ldm_lessons.unet import UNet, UNetConfig
    from ldm_lessons.vae import VAE
    from ldm_lessons.weights import load_model, save_model

    pocket = data_dir() / "pocket"
    tokenizer = CLIPTokenizer.from_pretrained(pocket / "tokenizer")
    vae = load_model(VAE, None, pocket / "vae").float()
    text = load_model(TextEncoder, None, pocket / "text_encoder").float().eval().requires_grad_(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text.to(device)
    with PartialState(cpu=device.type == "cpu").main_process_first():
        mean, deviation = latents(vae, training_pictures(plan, args.runs)[: plan.rows], args.runs / "unet", device)
    table = token_table(tokenizer, captions(plan))
    nothing = tokenize(tokenizer, "")[0]
    things = places_of_things(plan)
    # on CPUs, plain attention is a sixth faster in training at this size than the fused kernel
    attention = (
        SDPBackend.MATH if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    )
    schedule = schedules.NoiseSchedule.from_config(SCHEDULER)
    unet = UNet(UNetConfig.pocket())

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        n = len(rows)
        x0 = mean[rows].float() + deviation[rows].float() * torch.randn(n, *mean.shape[1:], generator=rng)
        noise = torch.randn(x0.shape, generator=rng)
        t = (
            torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)
        ) / n  # one in each n-th part of the schedule
        t = (t * schedule.num_train_timesteps).long()
        ids = table[rows, torch.randint(WORDINGS, (n,), generator=rng)].long()
        ids[torch.rand(n, generator=rng) < 0.1] = nothing
        x_t, v = schedule.add_noise(x0, noise, t).to(device), schedule.velocity(x0, noise, t).to(device)
        with sdpa_kernel(attention):
            with torch.no_grad():
                condition = text(ids.to(device))
            error = (model(x_t, t.to(device), condition).float() - v).square().mean(1, keepdim=True)
        if done < 1 - plan.decay:
            weight = 1 + 5 * things[rows].float()
            error = error * (weight / weight.mean()).to(device)
        return error.mean()

    facts = drive("unet", unet, loss, plan, args)
    unet.load_state_dict(checkpoints.ema_weights(args.runs / "unet"))
    save_model(unet, pocket / "unet")
    write_json(pocket / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(
        pocket / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": facts["versions"]["diffusers"],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    cards.record("unet", facts)


RECIPES: dict[str, Callable[[Plan, argparse.Namespace], None]] = {
    "judge": train_judge,
    "clip": train_clip,
    "vae": train_vae,
    "unet": train_unet,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ldm_lessons.recipes", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=RECIPES, help="what to train")
    parser.add_argument("--steps", type=int, help="how many steps in all (default: the recipe's)")
    parser.add_argument("--rows", type=int, help="how many training scenes (default: 40,000)")
    parser.add_argument("--batch", type=int, help="scenes a step")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model: slower to start, faster to run"
    )
    parser.add_argument("--minutes", type=float, help="stop after this long, to go on another time")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where checkpoints and drawn pictures are kept")
    args = parser.parse_args(arguments)
    changes = {k: v for k in ("steps", "rows", "batch") if (v := getattr(args, k)) is not None}
    try:
        RECIPES[args.name](replace(PLANS[args.name], **changes), args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"recipes: {error}") from error


if __name__ == "__main__":
    main()
