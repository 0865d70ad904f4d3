"""Weights in and out of files, in the folders of diffusers and transformers: strictly, and never from a pickle.

A folder holds ``config.json`` and one weight file, ``diffusion_pytorch_model.safetensors`` (U-Net, VAE) or
``model.safetensors`` (CLIP). Our parameters already have the libraries' names; only history is renamed here.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)
CHANGES = "changes.safetensors"  # of a model that shares the rest with another
_PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_model(
    cls: type[Model],
    config: Any,
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> Model:
    """Build ``cls`` (``UNet``, ``VAE``, ``TextEncoder``, ``VisionEncoder``, ``CLIP``) and fill it, in ``eval`` mode.

    ``path`` is a folder or a ``.safetensors`` file; ``config`` None reads ``config.json`` beside the weights;
    ``dtype`` None keeps the file's. Raises FileNotFoundError where something is missing, ValueError where it is
    damaged, unsafe or does not fit.
    """
    path = Path(path)
    file = _weight_file(path, _file_name(cls.config_class))
    state = {name: tensor.to(device, dtype) for name, tensor in read_safetensors(file).items()}
    config = read_config(cls, file.parent) if config is None else config
    try:
        return build(cls, config, state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def build(cls: type[Model], config: Any, state: Mapping[str, Tensor]) -> Model:
    """``cls`` of that configuration, in ``eval`` mode, made of the tensors of ``state`` themselves.

    Raises ValueError for a configuration or weights that do not fit.
    """
    try:
        with torch.device("meta"), _NoInitialWeights():  # they would be replaced at once
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"No {cls.__name__} can be built from {config} ({_short(error)}).") from None
    load_state_dict_strict(model, state, assign=True)
    return model.eval()


def load_state_dict_strict(model: nn.Module, state: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Fill ``model`` from ``state``, whose names may be old; ``assign`` takes the tensors themselves, not copies.

    Raises ValueError, and changes nothing, if any tensor is missing, left over or of another shape.
    """
    wanted = model.state_dict()
    state = modern_names(state, wanted)
    faults = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in wanted
            if name in state and state[name].shape != wanted[name].shape
        ],
    }
    if any(faults.values()):
        lists = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
        raise ValueError(f"these weights do not fit this {type(model).__name__}: {'; '.join(lists)}.")
    model.load_state_dict(state, assign=assign)


def modern_names(state: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """``state`` under today's names where those are ``wanted``; other names stay, for the strict check to find.

    CLIP's towers once had the prefix ``text_model.`` or ``vision_model.`` when they stood alone, and stored
    ``position_ids``; the VAE's attention was called query, key, value, proj_attn, at first as 1x1 convolutions.
    """
    wanted, result = set(wanted), {}
    for old, tensor in state.items():
        if old.endswith("embeddings.position_ids") and old not in wanted:
            continue
        new = re.sub(r"^(text|vision)_model\.", "", old)
        new = re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: f".{_OLD_ATTENTION[match[1]]}.", new)
        name = new if old not in wanted and new in wanted and new not in state else old
        if re.search(r"mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", name) and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # (C, C, 1, 1) -> (C, C)
        result[name] = tensor
    return result


def read_config(cls: type, folder: str | Path) -> Any:
    """``config.json`` of a folder as the configuration of ``cls``; errors as ``load_model``."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give a configuration, or a whole folder from diffusers.")
    try:
        config, kind = json.loads(file.read_text(encoding="utf-8")), cls.config_class
        return (getattr(kind, "from_diffusers", None) or kind.from_transformers)(config)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} does not describe a {cls.__name__} ({_short(error)}).") from None


def read_safetensors(file: str | Path) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` file, on the CPU; errors as ``load_model``."""
    file = Path(file)
    if file.suffix in _PICKLES:
        raise ValueError(f"{file} is a pickle, which can run any code when opened; get the .safetensors file instead.")
    if not file.is_file():
        raise FileNotFoundError(f"There is no weight file {file}; check the path, or download or train it first.")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file} ({size:,} bytes) is damaged or cut short ({_short(error)}); get or train it again."
        ) from None


def save_model(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = torch.float16) -> Path:
    """Write ``config.json`` and weights as diffusers or transformers would; returns the weight file's path.

    ``dtype`` None keeps the model's. Files are written aside and then renamed: whatever stops the writing, the old ones
    stay whole. Raises ValueError for weights that are not finite in ``dtype``, OSError where the disk refuses.
    """
    model, folder = getattr(model, "_orig_mod", model), Path(folder)  # _orig_mod: what torch.compile wraps
    state, file = _finite(model, dtype), folder / _file_name(model.config_class)
    _write({file: save(state, metadata={"format": "pt"}), folder / "config.json": _config_text(model)})
    return file


def save_changes(model: nn.Module, folder: str | Path, base: Mapping[str, Tensor]) -> Path:
    """Write ``config.json`` and, in half precision, only the tensors that ``base`` has not, or has otherwise.

    Returns the weight file's path, for ``load_changes``; files are written, and errors raised, as by ``save_model``.
    """
    state = _finite(model, torch.float16)
    state = {k: v for k, v in state.items() if k not in base or not torch.equal(v, base[k].cpu().half())}
    file = Path(folder) / CHANGES
    _write({file: save(state, metadata={"format": "pt"}), Path(folder) / "config.json": _config_text(model)})
    return file


def load_changes(cls: type[Model], base: Mapping[str, Tensor], folder: str | Path) -> Model:
    """Build ``cls`` from ``base`` and what ``save_changes`` put into ``folder``, float32 in ``eval`` mode.

    Errors as ``load_model``.
    """
    config = read_config(cls, folder)
    model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    changes = read_safetensors(Path(folder) / CHANGES)
    try:
        load_state_dict_strict(model, dict(base) | changes)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CHANGES}: {error}") from None
    return model.eval()


def _finite(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    state = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.state_dict().items()}
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{len(bad)} tensors are not finite in {dtype or 'this precision'} ({_some(bad)}); not saved.")
    return state


def _config_text(model: nn.Module) -> bytes:
    if hasattr(model.config, "to_diffusers"):
        config = model.config.to_diffusers()
    else:  # diffusers computes in float32 unless asked otherwise; transformers would follow the file without "dtype"
        config = {**model.config.to_transformers(), "dtype": "float32"}
    return (json.dumps(config, indent=2) + "\n").encode()


def _write(contents: Mapping[Path, bytes]) -> None:
    """Write all files aside, then rename all."""
    aside = {file: file.with_name(f".{file.name}.{os.getpid()}.part") for file in contents}
    try:
        for file, content in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(aside[file], "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for file in contents:
            os.replace(aside[file], file)
    except OSError as error:
        folder, reason = next(iter(contents)).parent, error.strerror or error
        message = f"Cannot write to {folder} ({reason}); free some space or choose another folder."
        raise OSError(message) from error
    finally:
        for part in aside.values():
            if part.is_file():
                part.unlink()


class _NoInitialWeights(TorchFunctionMode):
    """Leaves out random numbers: on the meta device the first normal distribution costs torch a second of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _file_name(config_class: type) -> str:
    return "diffusion_pytorch_model.safetensors" if hasattr(config_class, "to_diffusers") else "model.safetensors"


def _weight_file(path: Path, name: str) -> Path:
    if not path.is_dir():
        return path
    half = path / name.replace(".safetensors", ".fp16.safetensors")  # as the hub calls half precision
    if half.is_file() and not (path / name).is_file():
        return half
    if not (path / name).is_file() and (pickles := sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)):
        return path / pickles[0]  # read_safetensors says why not
    return path / name


def _short(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
