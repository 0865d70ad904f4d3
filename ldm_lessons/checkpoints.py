"""Checkpoints of a training run: one safetensors file with weights, average and optimiser, and the rest in its header.

They are written aside and renamed, so a kill or a full disk leaves the last one whole.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: dict[str, torch.optim.Optimizer],
    average: dict | None,
    plan: dict,
    curve: list,
) -> None:
    """One safetensors file with weights, average and optimisers; the step, plan and loss curve in its header."""
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v.detach() for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in (average or {}).items()}
    for kind, optimizer in optimizers.items():
        state = optimizer.state_dict()["state"]
        tensors |= {f"{kind}.{i}.{k}": v for i, values in state.items() for k, v in values.items()}
    header = {"step": str(step), "plan": json.dumps(plan), "curve": json.dumps(curve)}
    aside = folder / f"checkpoint.{os.getpid()}.part"
    with writing_to(folder):
        try:
            save_file({k: v.cpu().contiguous().clone() for k, v in tensors.items()}, aside, header)
            os.replace(aside, folder / "checkpoint.safetensors")
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns a failure to write to `folder` into an OSError that says what to do."""
    try:
        yield
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise OSError(
            f"the checkpoint could not be written to {folder} ({error}): make room there or choose another folder; the "
            "last checkpoint is whole, and the same command goes on from it"
        ) from error


def read(folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """The tensors and the header (step, plan, curve) of `folder`'s checkpoint, or None. ValueError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to start this training afresh") from error
    return tensors, {
        "step": int(header["step"]),
        "plan": json.loads(header["plan"]),
        "curve": json.loads(header["curve"]),
    }


def ema_weights(folder: Path) -> dict[str, Tensor]:
    """The averaged weights (or the plain ones, where no average was kept) of `folder`'s checkpoint."""
    found = read(folder)
    if found is None:
        raise FileNotFoundError(f"nothing has been trained in {folder} yet")
    tensors, _ = found
    prefix = "ema." if any(k.startswith("ema.") for k in tensors) else "model."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
