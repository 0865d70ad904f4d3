"""Training: one loop for every model of the course, as a generator that the caller drives.

    for progress in train(model, loss, plan, folder):   # one step a turn
        ...

`loss(model, rows, rng, done)` gives a scalar to minimise, or a dict of them with the total under "loss". `rows` are the
data set's row numbers for this step, `rng` is a fresh CPU generator, and `done` is the share of the run that lies
behind: all depend on the plan and the step alone, never on what ran before. So a run that is killed and resumed takes
the very steps it would have taken.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm_lessons import checkpoints

Loss = Callable[[nn.Module, Tensor, torch.Generator, float], Tensor | dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train. `rows` is the data set's size, `batch` what all processes take together."""

    steps: int
    rows: int
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.3  # the last part of the run, over which the learning rate falls to zero
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999  # 0 keeps no average
    seed: int = 0
    save_seconds: float = 120.0
    muon: float = 0.0  # `Muon`'s learning rate for the inner matrices, the rest being AdamW's; 0: AdamW has all


@dataclass
class Progress:
    """What one step did. `ema` is the averaged model's state dict (None without one)."""

    step: int
    losses: dict[str, float]
    seconds: float
    ema: dict[str, Tensor] | None = None
    curve: list[dict] = field(default_factory=list, repr=False)


def learning_rate(plan: Plan, step: int, peak: float | None = None) -> float:
    """Linear warm-up to the plan's learning rate (or `peak`), a plateau, then a straight way down to zero."""
    up = min(1.0, (step + 1) / max(plan.warmup, 1))
    down = min(1.0, (plan.steps - step) / max(plan.decay * plan.steps, 1))
    return (plan.learning_rate if peak is None else peak) * min(up, down)


def rows_of_step(plan: Plan, step: int) -> Tensor:
    """The `batch` rows of `step`: every epoch is its own permutation, and no row is left over."""
    start = step * plan.batch
    picked = []
    while len(picked) < plan.batch:
        epoch, at = divmod(start + len(picked), plan.rows)
        order = _epoch_order(plan.rows, plan.seed, epoch)
        picked += order[at : at + plan.batch - len(picked)].tolist()
    return torch.tensor(picked)


_orders: dict[tuple, Tensor] = {}


def _epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    key = (rows, seed, epoch)
    if key not in _orders:
        _orders.clear()
        _orders[key] = torch.randperm(rows, generator=generator(seed, 1, epoch))
    return _orders[key]


def generator(*seed: int) -> torch.Generator:
    """A CPU generator whose stream depends on all the numbers of `seed`."""
    mixed = 0
    for value in seed:
        mixed = (mixed * 6364136223846793005 + value + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


class Muon:
    """torch's Muon (arXiv:2502.16982) for a model's inner matrices; a convolution (O, I, h, w) is one of (O, I h w).

    It makes every direction of a matrix's step equally long, so that what is seldom seen is learnt as fast as what is
    common. Embeddings, the first and last layers and whatever is no matrix stay with AdamW, as its authors advise.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        self.parameters = parameters
        self.flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in parameters]  # the same numbers, not copies
        self.inner = torch.optim.Muon(self.flat, lr, weight_decay=0.0, ns_steps=3)  # five cost a CPU too much

    def step(self, lr: float) -> None:
        """One step with the gradients that lie at the parameters."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        for flat, p in zip(self.flat, self.parameters, strict=True):
            if flat.data_ptr() != p.data_ptr():
                raise RuntimeError("the model's weights were moved after Muon was made for them")
            flat.grad = None if p.grad is None else p.grad.reshape(flat.shape)
        self.inner.step()
        for flat, p in zip(self.flat, self.parameters, strict=True):
            flat.grad = p.grad = None


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What `Muon` may move: weights of two dimensions or more between layers, not those at the model's two ends."""
    ends = ("conv_in", "conv_out", "time_embedding", "embeddings", "guess")
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return [m.weight for name, m in layers if not any(end in name for end in ends)]


def train(
    model: nn.Module,
    loss: Loss,
    plan: Plan,
    folder: Path,
    *,
    precision: str = "no",
    compile: bool = False,
    accelerator: Accelerator | None = None,
) -> Iterator[Progress]:
    """Train `model` in place, from the checkpoint in `folder` if there is one.

    `precision` is Accelerate's mixed precision ("no", "bf16", "fp16"). Runs on one CPU, one GPU, or as many processes
    as `accelerate launch` or `torchrun` started. Checkpoints are written aside and renamed, so a kill or a full disk
    leaves the last one whole; the OSError then says which folder to make room in.
    """
    if plan.muon and precision == "fp16":
        raise ValueError("Muon cannot be used with fp16's scaled gradients: choose bf16 or no")
    several_cpus = os.environ.get("WORLD_SIZE", "1") != "1" and not torch.cuda.is_available()
    accelerator = accelerator or Accelerator(mixed_precision=precision, cpu=several_cpus)
    with checkpoints.writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)  # before any time is spent
    model.to(accelerator.device)
    wrapped = accelerator.prepare(model)  # before the optimisers are made: it may give the weights new places
    muon = Muon(inner_matrices(model), plan.muon) if plan.muon else None
    with_muon = {id(p) for p in muon.parameters} if muon else set()
    others = [p for p in model.parameters() if id(p) not in with_muon]
    adam = torch.optim.AdamW(others, plan.learning_rate, (0.9, 0.98), weight_decay=plan.weight_decay, fused=True)
    optimizers = {"optimizer": adam} | ({"muon": muon.inner} if muon else {})
    average = {k: v.detach().float().clone() for k, v in model.state_dict().items()} if plan.ema else None
    step, curve = _resume(folder, model, optimizers, average, plan)
    optimizer = accelerator.prepare(adam)
    run = torch.compile(wrapped) if compile else wrapped
    first, count = accelerator.process_index, accelerator.num_processes
    saved = began = time.monotonic()
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        rows = rows_of_step(plan, step)[first::count]
        with accelerator.autocast():
            result = loss(run, rows, generator(plan.seed, 2, step, first), step / plan.steps)
        parts = result if isinstance(result, dict) else {"loss": result}
        accelerator.backward(parts["loss"])
        accelerator.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        if muon:
            muon.step(learning_rate(plan, step, plan.muon))
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if average is not None:
            keep = min(plan.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    average[name].lerp_(value.float(), 1 - keep if value.is_floating_point() else 1.0)
        losses = {k: accelerator.reduce(v.detach().float(), "mean").item() for k, v in parts.items()}
        if not math.isfinite(losses["loss"]):
            raise RuntimeError(
                f"the loss became {losses['loss']} at step {step}: lower the learning rate and run it again"
            )
        if step % max(1, plan.steps // 400) == 0 or step == plan.steps:
            curve.append({"step": step, "seconds": round(time.monotonic() - began, 1)} | losses)
        yield Progress(step, losses, time.monotonic() - began, average, curve)
        if accelerator.is_main_process and (step == plan.steps or time.monotonic() - saved > plan.save_seconds):
            checkpoints.save(folder, step, model, optimizers, average, asdict(plan), curve)
            saved = time.monotonic()
    accelerator.wait_for_everyone()


def _resume(
    folder: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], average: dict | None, plan: Plan
) -> tuple[int, list]:
    found = checkpoints.read(folder)
    if found is None:
        return 0, []
    tensors, header = found
    theirs, ours = (
        {k: v for k, v in p.items() if k not in ("steps", "decay", "save_seconds")}
        for p in (asdict(Plan(steps=0, rows=0)) | header["plan"], asdict(plan))
    )
    if theirs != ours:
        changed = ", ".join(f"{k} was {theirs.get(k)} and is {v}" for k, v in ours.items() if theirs.get(k) != v)
        raise ValueError(
            f"{folder} holds a run with another plan ({changed}): delete the folder, or go back to its plan"
        )
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for name in average or {}:
        average[name].copy_(tensors[f"ema.{name}"])
    for kind, optimizer in optimizers.items():
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith(f"{kind}."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return header["step"], header["curve"]
