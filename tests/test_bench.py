"""The side-by-side measurement: it measures what it says, and its command writes the table."""

import json

import pytest
import torch

from ldm_lessons import bench
from ldm_lessons.vae import Gaussian

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'


def test_the_ratio_is_ours_to_theirs_whoever_begins(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def takes(name, seconds):
        def call():
            order.append(name)
            clock[0] += seconds if len(order) > 2 else 100.0  # the first turn warms up

        return call

    row = bench.take_turns(takes("ours", 0.002), takes("theirs", 0.008), 5, lambda: None)
    assert row == pytest.approx({"ours_ms": 2.0, "theirs_ms": 8.0, "ratio": 0.25})
    assert sorted(order[::2]) == sorted(order[1::2]) == ["ours"] * 3 + ["theirs"] * 3


def test_both_sides_compute_the_same():
    cpu = torch.device("cpu")
    ours, pipe = bench.our_model("pocket", cpu, torch.float32), bench.their_pipe("pocket", cpu, torch.float32)
    with torch.inference_mode():
        for name, mine, theirs in bench.parts(ours, pipe):
            a, b = mine(), theirs()
            a = a.mode() if isinstance(a, Gaussian) else a
            b = b.latent_dist.mode() if hasattr(b, "latent_dist") else b[0]
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        for name, mine, theirs in bench.trajectories(ours):
            assert mine().shape == theirs().shape, name


def test_operations_are_those_of_the_products_and_convolutions():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert bench.operations(lambda: a @ b) == 2 * 3 * 5 * 7
    conv, x = torch.nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)
    assert bench.operations(lambda: conv(x).relu()) == 2 * 2 * 6 * 8 * 8 * 4 * 3 * 3
    q = torch.randn(1, 2, 10, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert bench.operations(lambda: attention(q, q, q)) == 2 * (2 * 2 * 10 * 10 * 4)


def test_the_command_writes_its_table(tmp_path, capsys):
    bench.main(["--only", "text encoder", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "table.json")])
    rate, row = json.loads((tmp_path / "table.json").read_text()).values()
    assert set(row) == {"ours_ms", "theirs_ms", "ratio", "of_peak"} and min(row.values()) > 0
    assert rate["flops_per_second"] > 1e9 and row["of_peak"] < 1
    assert "text encoder" in capsys.readouterr().out
    assert bench.memory("pocket", torch.device("cpu"), torch.float32)["ours_mb"] > 100
