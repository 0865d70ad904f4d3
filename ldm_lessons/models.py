"""Which weights to load, and from where: the pocket model, a folder in diffusers' format, or the hub.

Only safetensors, JSON and the tokenizer's text files are ever read: nothing that can run code.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from ldm_lessons.clip import CLIP
from ldm_lessons.controlnet import SHARED, ControlNet
from ldm_lessons.machine import data_dir, pick_device, pick_dtype
from ldm_lessons.pipeline import LatentDiffusion
from ldm_lessons.text import TextEncoder
from ldm_lessons.unet import UNet
from ldm_lessons.vae import VAE
from ldm_lessons.weights import CHANGES, load_changes, load_model

POCKET = data_dir() / "pocket"
INPAINT = data_dir() / "inpaint"
MODELS: dict[str, Path] = {"pocket": POCKET} | ({"pocket-inpaint": INPAINT} if INPAINT.is_dir() else {})
FILES = (
    "scheduler/scheduler_config.json", "tokenizer/*.json", "tokenizer/*.txt", "*/config.json", "known_words.json",
    "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)  # fmt: skip


def load(
    name: str | Path = "pocket", device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> LatentDiffusion:  # fmt: skip
    """A whole model, ready to make pictures, by the name of one of `MODELS`, a folder, or a hub name "org/name".

    `revision` pins a version on the hub. The default device and dtype are those of machine.py. Raises ValueError for a
    name, device or dtype that is not known, FileNotFoundError for a part that is missing, and RuntimeError for a hub
    that does not answer or weights that do not fit.
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    folder = find(name, revision)
    if (folder / CHANGES).is_file():  # a U-Net that differs from the pocket model's in a few layers
        model = load("pocket", device, dtype)
        model.unet = load_changes(UNet, model.unet.state_dict(), folder).requires_grad_(False)
        return model.to(device, dtype)
    if not any((folder / part).exists() for part in ("model_index.json", "unet")):
        raise FileNotFoundError(f"{folder} holds no model in diffusers' format: no model_index.json and no unet.")
    classes = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}
    parts = {part: load_model(cls, None, folder / part, dtype=dtype, device=device) for part, cls in classes.items()}
    for part in parts.values():
        part.requires_grad_(False)
    scheduler_config = _json(folder, "scheduler/scheduler_config.json")
    known = None
    for file in ("known_words.json", "tokenizer/known_words.json"):
        if (folder / file).is_file():
            words = _json(folder, file)
            known = frozenset(word.lower() for word in (words["words"] if isinstance(words, dict) else words))
    model = LatentDiffusion(_tokenizer(folder), **parts, scheduler_config=scheduler_config, known_words=known)
    return model.to(device, dtype)


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
    """The folder of that model, fetched from the hub if it is there; errors as in `load`."""
    text, folder = str(name), Path(name).expanduser()
    if text in MODELS:
        if not MODELS[text].is_dir():
            raise FileNotFoundError(
                f"the {text} model is not in {MODELS[text]}: fetch the course's repository again, with its data "
                "folder, or set LDM_LESSONS_DATA to the folder that holds it."
            )
        return MODELS[text]
    if text and folder.is_dir():
        return folder
    if isinstance(name, Path) or re.match(r"[.~/\\]|\w:", text) or (folder.parts and Path(folder.parts[0]).is_dir()):
        raise FileNotFoundError(f"there is no model folder {text!r}: give one, or the name {' or '.join(MODELS)}.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise ValueError(
            f"unknown model {text!r}: choose {' or '.join(MODELS)}, a folder in diffusers' format, or a name on the "
            "hub, such as 'org/name'."
        )
    return _from_hub(text, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    none = f"there is no folder {name!r} here, and"
    instead = "or take the pocket model, load('pocket'), which needs no network."
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except errors.GatedRepoError:
        problem = f"the model {name} asks for your consent: give it on its page of huggingface.co and log in, {instead}"
    except errors.RepositoryNotFoundError:
        problem = f"{none} the hub has no public model of that name: check its spelling, {instead}"
    except errors.RevisionNotFoundError:
        problem = f"the model {name} has no revision {revision!r}: leave `revision` out, {instead}"
    except Exception as error:  # many libraries lie below: a reader needs one sentence, not their tracebacks
        problem = f"{none} the hub does not answer ({type(error).__name__}): check the network, {instead}"
    raise RuntimeError(problem)


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
