"""Which weights to load, and from where: the pocket model, a folder in diffusers' format, or the hub.

Only safetensors, JSON and the tokenizer's text files are ever read: nothing that can run code.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm_lessons import hub
from ldm_lessons.clip import CLIP
from ldm_lessons.controlnet import SHARED, ControlNet
from ldm_lessons.machine import data_dir, memory_gb, pick_device, pick_dtype
from ldm_lessons.pipeline import LatentDiffusion
from ldm_lessons.text import TextConfig, TextEncoder
from ldm_lessons.unet import UNet, UNetConfig
from ldm_lessons.vae import VAE, VAEConfig
from ldm_lessons.weights import CHANGES, build, load_changes, load_model, read_safetensors

POCKET = data_dir() / "pocket"
INPAINT = data_dir() / "inpaint"
WORKING_GB = 1.5  # beside weights: the decoder holds 0.4 for 512 x 512 in half precision, the GPU's libraries the rest
PARTS: dict[str, Any] = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}
SD15: dict[str, Any] = {"unet": UNetConfig.sd15(), "vae": VAEConfig.sd15(), "text_encoder": TextConfig.sd15()}
MODELS: dict[str, Path] = {"pocket": POCKET} | ({"pocket-inpaint": INPAINT} if INPAINT.is_dir() else {})


def load(
    name: str | Path = "pocket", device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> LatentDiffusion:  # fmt: skip
    """A whole model, ready to make pictures: one of `MODELS` or of `hub.SOURCES`, a folder, or a hub name "org/name".

    A `.safetensors` file is taken for Stable Diffusion 1.x as it was first published, all parts in one. `revision` pins
    a version on the hub. The default device and dtype are those of machine.py. Raises ValueError for a name, device or
    dtype that is not known, FileNotFoundError for a part that is missing, OSError for a full disk, and RuntimeError for
    a hub that does not answer or weights that do not fit.
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    folder = find(name, revision)
    if (folder / CHANGES).is_file():  # a U-Net that differs from the pocket model's in a few layers
        model = load("pocket", device, dtype)
        model.unet = load_changes(UNet, model.unet.state_dict(), folder).requires_grad_(False)
        model.name = str(name)
        return model.to(device, dtype)
    if folder.is_file():
        parts, folder = _from_file(folder, device, dtype), hub.words("sd15")
    elif not any((folder / part).exists() for part in ("model_index.json", "unet")):
        raise FileNotFoundError(f"{folder} holds no model in diffusers' format: no model_index.json and no unet.")
    else:
        parts = {part: load_model(cls, None, folder / part, dtype=dtype, device=device) for part, cls in PARTS.items()}
    for part in parts.values():
        part.requires_grad_(False)
    scheduler_config = _json(folder, "scheduler/scheduler_config.json")
    known = None
    for file in ("known_words.json", "tokenizer/known_words.json"):
        if (folder / file).is_file():
            words = _json(folder, file)
            known = frozenset(word.lower() for word in (words["words"] if isinstance(words, dict) else words))
    found = sum(p.numel() for part in parts.values() for p in part.parameters())
    if name in hub.SOURCES and found != hub.SOURCES[name].parameters:
        raise RuntimeError(
            f"what was fetched as {name} has {found:,} parameters instead of {hub.SOURCES[name].parameters:,}: it is "
            "another model; report it, and take the pocket model, load('pocket')."
        )
    return LatentDiffusion(
        _tokenizer(folder), **parts, scheduler_config=scheduler_config, known_words=known, name=str(name)
    ).to(device, dtype)


def _from_file(file: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The parts of a Stable Diffusion 1.x in its first publication's one file; diffusers knows the old names."""
    import diffusers

    state = read_safetensors(file)
    first, prefix = state.get("model.diffusion_model.input_blocks.0.0.weight"), "cond_stage_model.transformer."
    if first is None or not any(name.startswith(prefix) for name in state):
        raise ValueError(
            f"{file} is no whole Stable Diffusion 1.x: give such a file, or a folder in diffusers' format."
        )
    configs = {**SD15, "unet": replace(SD15["unet"], in_channels=first.shape[1])}
    found: dict[str, Any] = {
        "text_encoder": {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    }
    part, problem = "unet", ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            for part, cls in {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}.items():
                (Path(folder) / part).mkdir()
                (Path(folder) / part / "config.json").write_text(json.dumps(configs[part].to_diffusers()))
                theirs = cls.from_single_file(dict(state), config=folder, subfolder=part, local_files_only=True)
                found[part] = theirs.state_dict()
        for part, cls in PARTS.items():
            found[part] = build(cls, configs[part], found[part]).to(device, dtype)
        return found
    except (KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split())
    raise ValueError(f"{file}: its {part} is not that of a Stable Diffusion 1.x, or not whole ({problem}).")


def load_or_pocket(name: str, device: str | torch.device | None = None) -> LatentDiffusion:
    """The model of that name; or the pocket model, and a printed sentence that says why not the other.

    Real Stable Diffusion is left out where there is no GPU, or too little memory on it, or where its weights cannot be
    had. The model's `name` says which one it is. Raises ValueError for a name or device that is not known.
    """
    device = pick_device(device)
    problem = _too_much(name, device) if name in hub.SOURCES else None
    if problem is None:
        try:
            return load(name, device)
        except (OSError, RuntimeError) as error:
            problem = str(error)
    print(f"{problem}\nThe pocket model stands in for {name}: all pictures below are its.")
    return load("pocket", device)


def _too_much(name: str, device: torch.device) -> str | None:
    """Why a model of the hub is too large for this machine, with the numbers, or None."""
    needed = hub.SOURCES[name].parameters * pick_dtype(None, device).itemsize / 1e9 + WORKING_GB
    if device.type == "cpu":
        return f"{name} wants a GPU with {needed:.1f} GB of free memory, and there is none here."
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 1e9
    else:
        free = memory_gb() * 2**30 / 1e9
    return None if free >= needed else f"{name} needs {needed:.1f} GB on the GPU, but only {free:.1f} GB are free."


def load_clip() -> CLIP:
    """The course's small CLIP, float32 on the CPU: the pocket model's text tower, and a picture tower of its own.

    Raises FileNotFoundError or ValueError, as `weights.load_model`, where a part is missing or damaged.
    """
    text = load_model(TextEncoder, None, find("pocket") / "text_encoder").state_dict()
    return load_changes(CLIP, {f"text_model.{k}": v for k, v in text.items()}, data_dir() / "clip")


def load_controlnet(unet: UNet) -> ControlNet:
    """The course's ControlNet for semantic maps, for the pocket model's `unet`, whose dtype and device it takes.

    Raises FileNotFoundError or ValueError, as `weights.load_model`, where it is missing or damaged.
    """
    base = {k: v for k, v in unet.state_dict().items() if k.startswith(SHARED)}
    return load_changes(ControlNet, base, data_dir() / "controlnet").to(unet.conv_in.weight)


def find(name: str | Path, revision: str | None = None) -> Path:
    """The folder, or file, of that model, fetched from the hub if it is there; errors as in `load`."""
    text, folder = str(name), Path(name).expanduser()
    if text in MODELS:
        if not MODELS[text].is_dir():
            raise FileNotFoundError(
                f"the {text} model is not in {MODELS[text]}: fetch the course's repository again, with its data "
                "folder, or set LDM_LESSONS_DATA to the folder that holds it."
            )
        return MODELS[text]
    if text and (folder.is_dir() or (folder.suffix == ".safetensors" and folder.is_file())):
        return folder
    if text in hub.SOURCES and not isinstance(name, Path):
        return hub.fetch(text, revision)
    if isinstance(name, Path) or re.match(r"[.~/\\]|\w:", text) or (folder.parts and Path(folder.parts[0]).is_dir()):
        raise FileNotFoundError(f"there is no model folder {text!r}: give one, or the name {' or '.join(MODELS)}.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise ValueError(
            f"unknown model {text!r}: choose {', '.join([*MODELS, *hub.SOURCES])}, a folder in diffusers' format, or a "
            "name on the hub, such as 'org/name'."
        )
    return hub.fetch(text, revision)


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    where = folder / "tokenizer"
    if not where.is_dir():
        raise FileNotFoundError(f"{folder} has no tokenizer folder: fetch or save the model again.")
    try:
        return CLIPTokenizer.from_pretrained(where, local_files_only=True)
    except Exception as error:
        problem = f"the tokenizer in {where} cannot be read ({type(error).__name__}): fetch or save the model again."
    raise RuntimeError(problem)


def _json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        problem = FileNotFoundError(f"{folder} has no {name}: it is no whole model in diffusers' format.")
    except ValueError:
        problem = RuntimeError(f"{folder / name} is damaged (it is no JSON): fetch or save the model again.")
    raise problem
