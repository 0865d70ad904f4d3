"""The U-Net's recipe, and the choices in it that can be compared."""

import argparse
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_lessons import cards, checkpoints, data, metrics, models, scenes, schedules, training
from ldm_lessons.judge import Judge, pictures_to_tensor, score
from ldm_lessons.machine import data_dir
from ldm_lessons.metrics import write_json
from ldm_lessons.pipeline import LatentDiffusion
from ldm_lessons.recipes.common import (
    attention_for,
    captions,
    drive,
    latents,
    minutes_at,
    picture_row,
    seen_by_judge,
    spoken,
    token_table,
    training_pictures,
    usual_and_spread,
)
from ldm_lessons.text import TextEncoder, tokenize
from ldm_lessons.training import Plan
from ldm_lessons.unet import UNet, UNetConfig
from ldm_lessons.vae import VAE
from ldm_lessons.weights import load_model, save_model

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


STAGES = (100, 300, 1000, 3000, 10_000, 30_000)
SENTENCES = (
    "a red house on the left, snowy mountains, a green meadow at sunset",
    "a yellow balloon in the middle, red cliffs, a beach by day",
    "a large white boat on the right, a lake, green hills at dawn",
    "a watercolour of a lighthouse on the left, a lake with clouds",
    "a castle in the middle, a meadow under a rainbow",
    "pixel art of a small blue windmill on the right, a city skyline at night",
    "a pencil sketch of a pine tree and a purple house, falling snow",
    "three birds, a palm tree on the right, a beach at sunset",
)


@dataclass(frozen=True)
class Choices:
    """What can be chosen about the loss; the defaults made the U-Net that comes with the course.

    ``things`` is how much more an error counts where a thing is, until the learning rate falls: things are what the
    words are mostly about, and they cover a fifteenth of the pictures. ``align`` weighs, as long, how well the middle
    of the U-Net tells what the judge's layers see in the clean picture (arXiv:2410.06940 eq. (8)). ``min_snr`` is the
    gamma of arXiv:2303.09556 (0: all noise levels alike); ``shift`` draws noisier timesteps more often, as
    arXiv:2403.03206 eq. (23) does. ``muon`` is the learning rate of Muon, 0 to have AdamW for everything.
    """

    prediction: str = "v_prediction"
    beta_schedule: str = "scaled_linear"
    things: float = 5.0
    align: float = 1.5
    min_snr: float = 0.0
    shift: float = 1.0
    muon: float = 0.02


VARIANTS = {
    "shipped": Choices(),
    "without alignment": Choices(align=0),
    "things like the rest": Choices(things=0),
    "epsilon": Choices(prediction="epsilon"),
    "x0": Choices(prediction="sample"),
    "min-SNR": Choices(min_snr=5),
    "cosine": Choices(beta_schedule="squaredcos_cap_v2"),
    "shifted": Choices(shift=2),
    "AdamW alone": Choices(muon=0),
}


class Aligned(nn.Module):
    """A U-Net whose layer at 8 x 8, near the end, is read by two layers that guess what the judge sees there."""

    def __init__(self, unet: UNet, features: int):
        super().__init__()
        self.unet = unet
        c = unet.config.block_out_channels[1]
        self.guess = nn.Sequential(nn.Conv2d(c, 256, 1), nn.SiLU(), nn.Conv2d(256, features, 1))
        self._tapped: Tensor | None = None
        unet.up_blocks[1].attentions[-1].register_forward_hook(self._tap)

    def _tap(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._tapped = output

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The U-Net's answer (B, 4, 16, 16), and the guess (B, features, 8, 8)."""
        answer = self.unet(x, t, text)
        return answer, self.guess(self._tapped)


def places_of_things(plan: Plan) -> Tensor:
    """Where in its latent each training scene shows a thing or a bird: bool (rows, 1, 16, 16)."""
    first = scenes.LABELS.index("house")
    maps = (scenes.semantic_map(scenes.sample_scene(s), 64) for s in scenes.SPLITS["train"][: plan.rows])
    return torch.stack([F.max_pool2d(torch.from_numpy(m >= first)[None].float(), 4) > 0 for m in maps])


def noised(
    mean: Tensor, deviation: Tensor, schedule: schedules.NoiseSchedule, rng: torch.Generator, shift: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """A latent of each picture (B, 4, h, w), its noise, and a timestep (B,) from each B-th part of the schedule."""
    x0 = mean.float() + deviation.float() * torch.randn(mean.shape, generator=rng)
    noise = torch.randn(x0.shape, generator=rng)
    t = (torch.randperm(len(x0), generator=rng) + torch.rand(len(x0), generator=rng)) / len(x0)
    t = shift * t / (1 + (shift - 1) * t)
    return x0, noise, (t * schedule.num_train_timesteps).long().clamp_max(schedule.num_train_timesteps - 1)


def target(schedule: schedules.NoiseSchedule, prediction: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network is to answer at t: the noise, the picture, or v."""
    if prediction == "v_prediction":
        return schedule.velocity(x0, noise, t)
    return noise if prediction == "epsilon" else x0


def min_snr_weight(schedule: schedules.NoiseSchedule, choices: Choices, t: Tensor) -> Tensor:
    """Weights (B,) with which every prediction counts like x0 at min(SNR, gamma) (arXiv:2303.09556 section 3.4)."""
    snr = schedule.snr[t].float()
    per = {"v_prediction": snr + 1, "epsilon": snr, "sample": torch.ones_like(snr)}[choices.prediction]
    return snr.clamp_max(choices.min_snr) / per


def draw_stage(model: LatentDiffusion, path: Path) -> None:
    """What the model draws for `SENTENCES` by now, in a row, from the same noise every time."""
    from ldm_lessons import generate

    with sdpa_kernel(SDPBackend.MATH):
        made = generate.text_to_image(model, list(SENTENCES), seed=0, progress=False)
    picture_row(pictures_to_tensor(made)).save(path, quality=85, method=6)


def keep_stages(made: Path, target: Path, curve: list[dict]) -> list[dict]:
    """Copy the rows that `draw_stage` left into `target`; says for each after how many steps and minutes it was."""
    target.mkdir(parents=True, exist_ok=True)
    found = []
    for path in sorted(made.glob("step-*.webp")):
        step = int(path.stem.removeprefix("step-"))
        shutil.copy(path, target / f"{made.name}-{path.name}")
        found.append({"step": step, "minutes": minutes_at(curve, step), "file": f"{made.name}-{path.name}"})
    return found


def train_unet(plan: Plan, args: argparse.Namespace) -> None:
    """The pocket model's U-Net, or another variant of it in `runs/unet-VARIANT`."""
    shipped = args.variant == "shipped"
    make_denoiser("unet" if shipped else f"unet-{_file_name(args.variant)}", VARIANTS[args.variant], plan, args)


def _file_name(variant: str) -> str:
    return variant.replace(" ", "-")


def make_denoiser(name: str, choices: Choices, plan: Plan, args: argparse.Namespace) -> None:
    """The denoiser of latents, 10 % of captions dropped; "unet" goes into the pocket model, others stay in `runs/name`.

    The last part of the run leaves out what favours things (see `Choices`), which takes its bias out again.
    """
    from accelerate import PartialState
    from transformers import CLIPTokenizer

    plan = replace(plan, muon=choices.muon)
    pocket, shared = data_dir() / "pocket", args.runs / "unet"
    tokenizer = CLIPTokenizer.from_pretrained(pocket / "tokenizer")
    vae = load_model(VAE, None, pocket / "vae").float()
    text = load_model(TextEncoder, None, pocket / "text_encoder").float().eval().requires_grad_(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text.to(device)
    with PartialState(cpu=device.type == "cpu").main_process_first():
        source = training_pictures(plan, args.runs)
        mean, deviation = latents(vae.to(device), source, shared)
        seen = seen_by_judge(source, shared, device)
    usual, spread = usual_and_spread(seen)
    seen = torch.cat([((part.float() - usual) / spread).half() for part in seen.split(1000)])
    table = token_table(tokenizer, captions(plan))
    nothing = tokenize(tokenizer, "")[0]
    things = places_of_things(plan)
    config = SCHEDULER | {"prediction_type": choices.prediction, "beta_schedule": choices.beta_schedule}
    schedule = schedules.NoiseSchedule.from_config(config)
    model = Aligned(UNet(UNetConfig.pocket()), seen.shape[1])

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> dict[str, Tensor]:
        x0, noise, t = noised(mean[rows], deviation[rows], schedule, rng, choices.shift)
        ids = spoken(table, rows, nothing, 0.1, rng)
        x_t, wanted = schedule.add_noise(x0, noise, t), target(schedule, choices.prediction, x0, noise, t)
        with sdpa_kernel(attention_for(device)):
            with torch.no_grad():
                condition = text(ids.to(device))
            answer, guess = model(x_t.to(device), t.to(device), condition)
        error = (answer.float() - wanted.to(device)).square().mean(1, keepdim=True)  # (B, 1, 16, 16)
        alike = F.cosine_similarity(guess.float(), seen[rows].float().to(device), dim=1)
        if choices.min_snr:
            level = min_snr_weight(schedule, choices, t)
            error = error * level.view(-1, 1, 1, 1).to(device)
        early = done < 1 - plan.decay
        if early and choices.things:
            weight = (1 + choices.things * things[rows].float()).to(device)
            error = error * (weight / weight.mean())
            coarse = F.max_pool2d(weight, 2)[:, 0]
            alike = alike * (coarse / coarse.mean())
        align = choices.align if early else 0.0
        return {"loss": error.mean() - align * alike.mean(), "v": error.detach().mean(), "alike": alike.detach().mean()}

    apart = LatentDiffusion(tokenizer, text, UNet(UNetConfig.pocket()).to(device), vae.to(device), config)

    def watch(progress: training.Progress) -> None:
        if progress.step in (*STAGES, plan.steps):
            apart.unet.load_state_dict({k[5:]: v for k, v in progress.ema.items() if k.startswith("unet.")})
            draw_stage(apart, args.runs / name / f"step-{progress.step:06}.webp")

    facts = drive(name, model, loss, plan, args, watch)
    model.load_state_dict(checkpoints.ema_weights(args.runs / name))
    if name == "unet":
        facts["stages"] = keep_stages(args.runs / name, data_dir() / "stages", facts["curve"])
    facts["choices"] = asdict(choices)
    facts["parameters"] = sum(p.numel() for p in model.unet.parameters())  # without the two layers that guess
    if name != "unet":
        pocket = args.runs / name / "model"
        for part in ("vae", "text_encoder", "tokenizer"):
            shutil.copytree(data_dir() / "pocket" / part, pocket / part, dirs_exist_ok=True)
    save_pipeline(model.unet, pocket, config, facts["versions"]["diffusers"])
    if name == "unet":
        cards.record("unet", facts)
    else:
        write_json(args.runs / name / "facts.json", facts)


def save_pipeline(unet: UNet, folder: Path, scheduler: dict, version: str) -> None:
    """The U-Net, and what makes `folder` one that diffusers' StableDiffusionPipeline reads whole."""
    save_model(unet, folder / "unet")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": version,
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


def compare_variants(plan: Plan, args: argparse.Namespace) -> None:
    """Train every variant for the same few samples and have the judge look; `data/comparison.json` has a row for each.

    A row that is there already, of the same plan, is not made again.
    """
    path, asked = data_dir() / "comparison.json", [scenes.sample_scene(i, "test") for i in range(args.count)]
    prompts = [scenes.caption_with_mentions(s, 0) for s in asked]
    judge = Judge.load().float()
    other = data.pictures(scenes.SPLITS["test"][args.count : 3 * args.count], 128, args.runs / "cache")
    real = metrics.features(judge, torch.from_numpy(other).float() / 255)
    for variant in [args.variant] if args.variant != "shipped" else VARIANTS:
        rows = json.loads(path.read_text()) if path.exists() else {}
        budget = {"steps": plan.steps, "batch": plan.batch, "rows": plan.rows, "count": args.count}
        if rows.get(variant, {}).get("budget") == budget:
            continue
        folder = args.runs / f"compare-{_file_name(variant)}"
        make_denoiser(folder.name, VARIANTS[variant], plan, args)
        shown, _ = metrics.make(models.load(folder / "model"), [p.text for p in prompts], variant)
        found = score(judge, shown, asked, [p.mentions for p in prompts])
        facts = json.loads((folder / "facts.json").read_text())
        rows = json.loads(path.read_text()) if path.exists() else {}  # another process may have added one
        rows[variant] = {
            "budget": budget,
            "choices": facts["choices"],
            "minutes": facts["minutes"],
            "accuracy": {k: v["accuracy"] for k, v in found.to_dict()["attributes"].items()},
            "all_right": round(found.all_right[0] / args.count, 4),
            "fid": round(metrics.frechet_distance(metrics.features(judge, shown), real), 2),
        }
        write_json(path, rows)
        print(variant, rows[variant]["all_right"], rows[variant]["accuracy"], rows[variant]["fid"])
