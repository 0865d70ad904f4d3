"""The training loop: learns, averages, resumes exactly, and never harms what it has made."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm_lessons import checkpoints, training
from ldm_lessons.training import Plan, train

PLAN = Plan(steps=40, rows=50, batch=8, learning_rate=0.02, warmup=5, ema=0.9, weight_decay=0.0, save_seconds=1e9)


def problem() -> tuple[nn.Module, training.Loss]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    x = torch.randn(50, 3, generator=training.generator(7))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3

    def loss(model: nn.Module, rows: torch.Tensor, rng: torch.Generator, done: float) -> torch.Tensor:
        noise = 0.01 * torch.randn(len(rows), 1, generator=rng)
        return (model(x[rows]) - y[rows] - noise).square().mean()

    return model, loss


def run(folder: Path, plan: Plan = PLAN, stop: int | None = None) -> tuple[list[float], nn.Module]:
    model, loss = problem()
    losses = []
    for progress in train(model, loss, plan, folder):
        losses.append(progress.losses["loss"])
        if progress.step == stop:
            break
    return losses, model


def test_it_learns(tmp_path) -> None:
    losses, model = run(tmp_path, replace(PLAN, steps=400))
    assert losses[-1] < 1e-3 < losses[0]
    assert torch.allclose(model.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=0.05)
    average = checkpoints.ema_weights(tmp_path)
    assert torch.allclose(average["weight"], model.weight, atol=0.05) and not torch.equal(
        average["weight"], model.weight
    )


def test_every_epoch_takes_every_row_once() -> None:
    plan = replace(PLAN, batch=7)
    taken = torch.cat([training.rows_of_step(plan, s) for s in range(100)])[:500].view(10, 50)
    assert all(torch.equal(epoch.sort().values, torch.arange(50)) for epoch in taken)
    assert not torch.equal(taken[0], taken[1])


def test_the_learning_rate_rises_stays_and_falls() -> None:
    plan = Plan(steps=100, rows=1, warmup=10, decay=0.5, learning_rate=1.0)
    rates = [training.learning_rate(plan, s) for s in range(100)]
    assert rates[0] == 0.1 and rates[9:51] == [1.0] * 42 and rates[75] == 0.5 and 0 < rates[99] <= 0.021


@pytest.mark.parametrize("muon", [0.0, 0.05])
def test_resuming_takes_the_very_steps(tmp_path, muon: float) -> None:
    whole, model = run(tmp_path / "whole", replace(PLAN, muon=muon))
    always = replace(PLAN, save_seconds=0.0, muon=muon)
    before, _ = run(tmp_path / "cut", always, stop=17)
    after, resumed = run(tmp_path / "cut", always)
    assert before[:16] + after == whole  # the save follows the yield: step 17 is done again
    assert torch.equal(model.weight, resumed.weight)
    first, second = (checkpoints.read(tmp_path / n) for n in ("whole", "cut"))
    assert all(torch.equal(v, second[0][k]) for k, v in first[0].items())
    assert [c["loss"] for c in first[1]["curve"]] == [c["loss"] for c in second[1]["curve"]]


def test_muon_steps_along_every_direction_alike(tmp_path) -> None:
    """From a gradient of very unequal singular values, its step has nearly equal ones; a bias stays with AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 3))
    u, _, v = torch.linalg.svd(torch.randn(4, 72), full_matrices=False)
    steep = (u * torch.tensor([10.0, 3.0, 1.0, 0.5])) @ v
    before = model[1].weight.detach().clone()

    def loss(model: nn.Module, rows: torch.Tensor, rng: torch.Generator, done: float) -> torch.Tensor:
        return (model[1].weight.flatten(1) * steep).sum() + model[0].weight.sum() + sum(m.bias.sum() for m in model)

    plan = Plan(steps=1, rows=4, batch=2, warmup=0, decay=0.0, muon=0.1, learning_rate=0.01)
    list(train(model, loss, plan, tmp_path))
    moved = torch.linalg.svdvals((model[1].weight.detach() - before).flatten(1)) / 0.1
    assert moved.max() < 1.3 and moved.min() > 0.3 * moved.max()  # 10 : 0.5 before
    tensors, _ = checkpoints.read(tmp_path)
    assert tensors["muon.1.momentum_buffer"].shape == (4, 72) and "optimizer.1.exp_avg" in tensors
    with pytest.raises(ValueError, match="Muon cannot be used with fp16"):
        next(train(model, loss, plan, tmp_path, precision="fp16"))


SLOW = """
import sys, time, pathlib
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from test_training import *
model, loss = problem()
for p in train(model, loss, replace(PLAN, steps=300, save_seconds=0.0), pathlib.Path({folder!r})):
    print(p.step, p.losses["loss"], flush=True)
    time.sleep(0.002)
"""


def test_kill_minus_nine_at_any_moment(tmp_path) -> None:
    """A process that is killed hard, again and again, ends at the weights of one that never was."""
    script = SLOW.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    seen: dict[int, str] = {}
    for seconds in (0.15, 0.4, None):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        first = process.stdout.readline()
        lines = [first]
        if seconds is not None:
            time.sleep(seconds)
            os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.read().splitlines()
        process.wait()
        for line in lines:
            if len(line.split()) == 2:
                step, value = line.split()
                assert seen.setdefault(int(step), value) == value or not value
    model, loss = problem()
    for p in train(model, loss, replace(PLAN, steps=300), tmp_path / "whole"):
        assert seen[p.step] == str(p.losses["loss"])
    pair = [checkpoints.read(tmp_path / n)[0] for n in ("whole", "killed")]
    assert all(torch.equal(v, pair[1][k]) for k, v in pair[0].items())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch) -> None:
    run(tmp_path, replace(PLAN, steps=20))
    whole = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors: dict, path: Path, header: dict) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="could not be written to .*No space left.*the last checkpoint is whole"):
        run(tmp_path, replace(PLAN, steps=25))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_folder_that_cannot_be_written_to(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="could not be written to .*choose another folder"):
        run(tmp_path / "file" / "run")


def test_another_plan_and_a_damaged_file_are_named(tmp_path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="batch was 8 and is 4"):
        run(tmp_path, replace(PLAN, batch=4))
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        run(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing has been trained in"):
        checkpoints.ema_weights(tmp_path / "nowhere")


def test_a_loss_that_is_no_number_stops_at_once(tmp_path) -> None:
    model, _ = problem()
    with pytest.raises(RuntimeError, match="loss became nan at step 1: lower the learning rate"):
        list(train(model, lambda m, rows, rng, done: m.weight.sum() * float("nan"), PLAN, tmp_path))


PAIR = """
import os, sys, pathlib
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from test_training import *
model, loss = problem()
quiet = lambda m, rows, rng, done: (m(X[rows]) - Y[rows]).square().mean()
X = torch.randn(50, 3, generator=training.generator(7)); Y = X.sum(1, keepdim=True)
for p in train(model, quiet, replace(PLAN, muon={muon}), pathlib.Path({folder!r})): pass
PartialState().destroy_process_group()
os.write(1, f"ended at {{p.step}} {{p.losses['loss']:.6f}}\\n".encode())  # at one go: two processes write
"""


@pytest.mark.parametrize("muon", [0.0, 0.05])
def test_two_processes_share_a_batch(tmp_path, muon: float) -> None:
    """Two CPU processes end where one process does: the same rows, shared out."""
    results = []
    for count in (1, 2):
        script = tmp_path / f"pair{count}.py"
        script.write_text(
            PAIR.format(tests=str(Path(__file__).parent), folder=str(tmp_path / f"run{count}"), muon=muon)
        )
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(script)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, env=env, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("ended at 40") == count
        results.append(checkpoints.ema_weights(tmp_path / f"run{count}"))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-5, rtol=1e-4)
