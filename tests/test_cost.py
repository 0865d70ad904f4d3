"""What a call costs is counted right: by closed forms, and the same on the meta device as on the processor."""

import pytest
import torch
from torch import nn

from ldm_lessons import bench, cost
from ldm_lessons.layers import Attention, TransformerBlock
from ldm_lessons.unet import UNet, UNetConfig

TINY = UNetConfig(
    block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
    heads=2, norm_num_groups=8, cross_attention_dim=16,
)  # fmt: skip


def test_each_kind_is_counted_by_its_own_formula():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    assert cost.operations_by_kind(lambda: conv(torch.randn(2, 4, 8, 8))) == {
        "convolutions": 2 * 2 * 6 * 4 * 4 * 4 * 9, "linear layers": 0, "attention": 0, "attention to the text": 0,
    }  # fmt: skip
    block, n, c, words, d = TransformerBlock(24, 10, heads=3), 50, 24, 7, 10
    found = cost.operations_by_kind(lambda: block(torch.randn(1, n, c), torch.randn(1, words, d)))
    assert found["attention"] == 4 * n * n * c and found["attention to the text"] == 4 * n * words * c
    own, cross, feed = 4 * n * c * c, 2 * n * c * c + 2 * words * d * c, n * c * 8 * c + n * 4 * c * c
    assert found["linear layers"] == 2 * (own + cross + feed) and found["convolutions"] == 0
    assert list(found) == list(cost.KINDS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_whole_unet_costs_the_same_everywhere(device):
    net = UNet(TINY).to(device)
    x, text = torch.randn(1, 4, 16, 16, device=device), torch.randn(1, 5, 16, device=device)
    found = cost.operations_by_kind(lambda: net(x, 500, text))
    assert sum(found.values()) == bench.operations(lambda: net(x, 500, text))
    twin, y, words = UNet(TINY), torch.randn(1, 4, 16, 16), torch.randn(1, 5, 16)
    assert found == cost.operations_by_kind(lambda: twin(y, 500, words))
    with cost.FusedAttention():
        assert cost.peak_bytes(lambda: net(x, 500, text)) == cost.peak_bytes(lambda: twin(y, 500, words))
        assert cost.kept_bytes(net, x, 500, text) == cost.kept_bytes(twin, y, 500, words)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_is_what_lives_at_one_moment(device):
    x = torch.randn(1000, device=device)

    def chain():
        a = x + 1  # one
        b = a * 2  # two
        del a
        c = b.view(10, 100).t() - 3  # a view costs nothing; b and c: two
        d = torch.cat([c.flatten(), b])  # the flattened copy, b, c and d of two: five
        return d

    assert cost.peak_bytes(chain) == 5 * 4000
    assert cost.peak_bytes(lambda: x.add_(0)) == 0, "what was there before does not count"
    assert cost.peak_bytes(chain) == 5 * 4000, "one call leaves nothing behind for the next"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_kept_for_the_way_back(device):
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).to(device)
    x = torch.randn(5, 6, device=device)
    assert cost.kept_bytes(net, x) == 4 * (5 * 6 + 5 * 10), "the input, and the ReLU's output once for two readers"
    attention, n, c, heads = Attention(24, heads=3).to(device), 50, 24, 3
    tokens = torch.randn(1, n, c, device=device)
    with cost.FusedAttention():
        fused = cost.kept_bytes(attention, tokens)
    assert fused == 4 * (n * c + 3 * n * c + n * c + heads * n), "input, q, k, v, what is read, a number a row"
    with bench.sdpa_kernel(bench.SDPBackend.MATH):
        plain = cost.kept_bytes(attention, tokens)
    assert plain - fused >= 4 * heads * n * n - 4 * heads * n, "the matrix, a number for every pair"


def test_fused_attention_gives_the_same_numbers():
    block, x, text = TransformerBlock(24, 10, heads=3), torch.randn(2, 9, 24), torch.randn(2, 7, 10)
    with cost.FusedAttention():
        fused = block(x, text)
    with bench.sdpa_kernel(bench.SDPBackend.MATH):
        torch.testing.assert_close(block(x, text), fused)


def test_seconds_are_the_median_after_a_call_to_warm_up(monkeypatch):
    clock, takes = [0.0], iter([100.0, 3.0, 1.0, 2.0, 7.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += next(takes)

    assert cost.seconds_of(call) == 2.0
    assert cost.seconds_of(call, turns=1) == 7.0
