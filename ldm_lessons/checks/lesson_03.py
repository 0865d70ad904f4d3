"""Marking for 03_the_price_of_pixels: a convolution counted, the curve's next point, and what fits in a GPU."""

import torch

from ._core import Exercise, Wrong


def _conv(batch: int, c_in: int, c_out: int, height: int, width: int, kernel: int, stride: int) -> int:
    """From the shapes that PyTorch itself gives, not from a formula for them."""
    with torch.device("meta"):
        layer = torch.nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
        out = layer(torch.empty(batch, c_in, height, width))
    return 2 * out.numel() * layer.weight[0].numel()


_CONVS = [(1, 64, 64, 32, 32, 3, 1), (2, 3, 16, 64, 32, 3, 1), (4, 8, 8, 16, 16, 1, 1), (1, 32, 64, 64, 64, 3, 2)]

conv_flops = Exercise(
    name="Count a convolution",
    oracle=_conv,
    probes=lambda g: _CONVS,
    good="Numbers out, times products each, times two.",
    wrong_answers=(
        Wrong(
            lambda b, i, o, h, w, k, s: b * o * (h // s) * (w // s) * i * k * k,
            "Yours is exactly half: a multiplication and its addition are two operations.",
        ),
        Wrong(
            lambda b, i, o, h, w, k, s: 2 * b * o * h * w * i * k * k,
            "You counted an output as large as the input. With a stride of 2 there are a quarter as many numbers to "
            "compute.",
        ),
        Wrong(
            lambda b, i, o, h, w, k, s: 2 * o * (h // s) * (w // s) * i * k * k,
            "You counted one picture; the batch has several.",
        ),
        Wrong(
            lambda b, i, o, h, w, k, s: 2 * b * o * (h // s) * (w // s) * i * k,
            "The kernel is a square: it has kernel × kernel places, not kernel.",
        ),
        Wrong(
            lambda b, i, o, h, w, k, s: 2 * b * o * (h // s) * (w // s) * k * k,
            "Each number of the output is a sum over all the channels that come in; you counted one.",
        ),
    ),
)


def _through(side_1: int, work_1: float, side_2: int, work_2: float, side: int) -> float:
    table = torch.tensor([[side_1**2, side_1**4], [side_2**2, side_2**4]], dtype=torch.float64)
    a, b = torch.linalg.solve(table, torch.tensor([work_1, work_2], dtype=torch.float64)).tolist()
    return a * side**2 + b * side**4


def _curves(g: torch.Generator) -> list[tuple]:
    found = []
    for side_1, side_2, side in ((16, 32, 64), (64, 128, 512), (64, 32, 128)):
        a, b = (torch.rand(2, generator=g, dtype=torch.float64) + 0.5).tolist()
        work = [100.0 * a * s**2 + 0.1 * b * s**4 for s in (side_1, side_2)]
        found.append((side_1, work[0], side_2, work[1], side))
    return found


next_point = Exercise(
    name="The next point of the curve",
    oracle=_through,
    probes=_curves,
    good="Two counts, and you know what a size costs that your machine could never run.",
    wrong_answers=(
        Wrong(
            lambda s1, w1, s2, w2, s: w2 * (s / s2) ** 2,
            "You let all of the work grow with the pixels; a part of it grows with their square.",
        ),
        Wrong(
            lambda s1, w1, s2, w2, s: w2 * (s / s2) ** 4,
            "You let all of the work grow with the square of the pixels; that is attention's part alone.",
        ),
        Wrong(
            lambda s1, w1, s2, w2, s: w1 + (w2 - w1) * (s**2 - s1**2) / (s2**2 - s1**2),
            "You drew a straight line through the two points. In the number of pixels the curve bends; divide the "
            "work by the pixels first, then it is a line.",
        ),
        Wrong(
            lambda s1, w1, s2, w2, s: _through(s1**0.5, w1, s2**0.5, w2, s**0.5),
            "You took the side for n. The number of pixels is the side squared.",
        ),
        Wrong(
            lambda s1, w1, s2, w2, s: (
                w2 * (w2 / w1) ** (torch.tensor(s / s2).log() / torch.tensor(s2 / s1).log()).item()
            ),
            "You went on with the last growth as if it were a power. The curve gets steeper: find a and b first.",
        ),
    ),
)


def _bytes(side: int, weights: int, per_pixel: int, heads: int, layers: int, batch: int) -> int:
    n = side * side
    return 10 * weights + batch * (per_pixel * n + 2 * heads * layers * n * n)


def _fits(memory: int, *net: int) -> int:
    return max([side for side in range(8, 8192, 8) if _bytes(side, *net) <= memory], default=0)


def _first(memory: int, needed) -> int:
    side = 0
    while needed(side + 8) <= memory:
        side += 8
    return side


largest_side = Exercise(
    name="What fits in 16 GB?",
    oracle=_fits,
    probes=lambda g: [
        (16 * 10**9, 10_000_000, 30_000, 4, 2, 8),
        (16 * 10**9, 860_000_000, 100_000, 8, 4, 1),
        (80 * 10**9, 10_000_000, 30_000, 4, 2, 1),
        (16 * 10**9, 2_000_000_000, 30_000, 4, 2, 1),
        (10**9, 10_000_000, 2_000_000, 1, 1, 4),
    ],
    good="Whoever keeps the table of pairs runs into the wall at a few dozen pixels.",
    wrong_answers=(
        Wrong(
            lambda m, w, p, h, la, b: _first(m, lambda s: 10 * w + b * p * s * s),
            "You left out the pairs of attention, which is what fills the memory.",
        ),
        Wrong(
            lambda m, w, p, h, la, b: _first(m, lambda s: b * (p * s**2 + 2 * h * la * s**4)),
            "You left out the weights with their gradient and averages.",
        ),
        Wrong(
            lambda m, w, p, h, la, b: _first(m, lambda s: 10 * w + p * s**2 + 2 * h * la * s**4),
            "You counted one picture; each of the batch has its own bytes.",
        ),
        Wrong(
            lambda m, w, p, h, la, b: _first(m, lambda s: 10 * w + b * (p * s**2 + 2 * h * la * s**2)),
            "You counted the places; there are as many pairs as their square.",
        ),
        Wrong(
            lambda m, w, p, h, la, b: _fits(m, w, p, h, la, b) + 8,
            "Yours is one step too large: it needs more than there is. Take the last one that fits.",
        ),
    ),
)
