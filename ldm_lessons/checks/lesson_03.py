"""Marking for 03_the_price_of_pixels: what a convolution costs, the next point of the curve, what fits."""

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ._core import Exercise, Wrong


def _real_convolution(c_in: int, c_out: int, kernel: int, height: int, width: int, stride: int) -> tuple[int, int]:
    """PyTorch's own layer and PyTorch's own counter."""
    with torch.device("meta"):
        layer, x = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2), torch.empty(1, c_in, height, width)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return sum(p.numel() for p in layer.parameters()), counter.get_total_flops()


def _weights(c_in: int, c_out: int, kernel: int) -> int:
    return kernel * kernel * c_in * c_out + c_out


conv_cost = Exercise(
    name="What a convolution costs",
    oracle=_real_convolution,
    probes=lambda g: [
        (320, 320, 3, 64, 64, 1),
        (4, 320, 3, 64, 48, 1),
        (640, 640, 3, 32, 32, 2),
        (320, 640, 1, 16, 24, 1),
        (3, 128, 5, 64, 32, 4),
    ],
    rtol=1e-9,
    good="The weights do not know how large the picture is; the work does. A stride of 2 saves three quarters of it.",
    wrong_answers=(
        Wrong(
            lambda i, o, k, h, w, s: (_weights(i, o, k), k * k * i * o * (h // s) * (w // s)),
            "You counted a multiplication and its addition as one operation. That is a way of counting, too, but this "
            "course counts both: twice as many.",
        ),
        Wrong(
            lambda i, o, k, h, w, s: (_weights(i, o, k), 2 * k * k * i * o * h * w),
            "You left the stride out. It makes the answer smaller, and only positions of the *answer* cost something.",
        ),
        Wrong(
            lambda i, o, k, h, w, s: (_weights(i, o, k), 2 * k * k * i * o * h * w // s),
            "You divided by the stride once. It thins out the rows *and* the columns.",
        ),
        Wrong(
            lambda i, o, k, h, w, s: (k * k * i * o, 2 * k * k * i * o * (h // s) * (w // s)),
            "The operations are right, but the weights lack the biases: there is one for each output channel.",
        ),
        Wrong(
            lambda i, o, k, h, w, s: (k * i * o + o, 2 * k * i * o * (h // s) * (w // s)),
            "The window is kernel × kernel positions, not kernel.",
        ),
        Wrong(
            lambda i, o, k, h, w, s: (k * k * o + o, 2 * k * k * o * (h // s) * (w // s)),
            "You let each output channel look at one channel only. Its window goes through all `c_in` of them.",
        ),
        Wrong(
            lambda i, o, k, h, w, s: (_weights(i, o, k), 2 * _weights(i, o, k) * (h // s) * (w // s)),
            "You counted the biases among the products. A bias is one addition a number; the counter leaves it out, "
            "and so does the formula.",
        ),
        Wrong(
            lambda i, o, k, h, w, s: (2 * k * k * i * o * (h // s) * (w // s), _weights(i, o, k)),
            "These are the right two numbers in the wrong order: first the weights, then the operations.",
        ),
    ),
)


def _through_both(sides: tuple, operations: tuple, side: int, power: float) -> float:
    """At `side`, the curve a n^power + b n^(2 power) through both points, by Lagrange's two basis functions."""
    (m, n), (at_m, at_n), x = (s**power for s in sides), operations, side**power
    return at_m * x * (n - x) / (m * (n - m)) + at_n * x * (x - m) / (n * (n - m))


def _solved(sides: tuple, operations: tuple, side: int) -> float:
    n = torch.tensor(sides, dtype=torch.float64)
    a, b = torch.linalg.solve(torch.stack([n**2, n**4], dim=1), torch.tensor(operations, dtype=torch.float64))
    return (a * side**2 + b * side**4).item()


def _line(sides: tuple, operations: tuple, side: int, power: int) -> float:
    (m, n), (at_m, at_n) = (s**power for s in sides), operations
    return at_m + (at_n - at_m) * (side**power - m) / (n - m)


next_point = Exercise(
    name="The next point of the curve",
    oracle=_solved,
    probes=lambda g: [
        ((64, 128), (803.2, 4674.0), 256),
        ((32, 64), (7.0, 28.0), 128),
        ((16, 48), (1.0, 81.0), 96),
        ((40, 56), (1000.0, 2500.0), 48),
        ((128, 256), (14.2, 61.7), 512),
    ],
    rtol=1e-6,
    good="Two points are enough, because you know the two powers. That is worth more than any fit.",
    wrong_answers=(
        Wrong(
            lambda sides, ops, side: ops[1] * (side / sides[1]) ** 2,
            "You let everything grow with the number of positions. That holds for the convolutions; attention's share "
            "grows with its square.",
        ),
        Wrong(
            lambda sides, ops, side: ops[1] * (side / sides[1]) ** 4,
            "You let everything grow with the square of the positions. That holds for attention alone; the "
            "convolutions grow with the positions.",
        ),
        Wrong(
            lambda sides, ops, side: ops[1] * (ops[1] / ops[0]) ** math.log(side / sides[1], sides[1] / sides[0]),
            "You drew a straight line through both points on log-log axes. The sum of two powers is no power: the line "
            "bends upwards, and you come out too low beyond the points.",
        ),
        Wrong(
            lambda sides, ops, side: _line(sides, ops, side, 2),
            "You drew a straight line over the number of positions. So you made up a part that costs the same at every "
            "size, and left out the part that grows with the square.",
        ),
        Wrong(
            lambda sides, ops, side: _line(sides, ops, side, 1),
            "You drew a straight line over the side. Operations go with the side's second and fourth power.",
        ),
        Wrong(
            lambda sides, ops, side: _through_both(sides, ops, side, 1),
            "You used the side n where the number of positions belongs: the two parts go with n² and with n⁴.",
        ),
        Wrong(
            lambda sides, ops, side: ops[1] + (ops[1] - ops[0]),
            "You added the last difference once more. The curve is not a staircase of equal steps, and the sides may "
            "lie anywhere.",
        ),
    ),
)  # fmt: skip


def _one_by_one(weights: int, kept: int, memory: int) -> int:
    batch = 0
    while 16 * weights + (batch + 1) * kept <= memory:
        batch += 1
    return batch


pictures_that_fit = Exercise(
    name="What fits",
    oracle=_one_by_one,
    probes=lambda g: [
        (859_520_964, 936_000_000, 16 * 10**9),
        (859_520_964, 2_399_000_000, 16 * 10**9),
        (859_520_964, 59_620_000_000, 80 * 10**9),
        (10_860_676, 41_000_000, 4 * 10**9),
        (2_600_000_000, 1_100_000_000, 24 * 10**9),
        (1_000_000, 1_000_000, 20_000_000),
        (1_000_000, 3_000_000, 24_000_000),
    ],
    rtol=1e-9,
    good="The first 16 bytes a weight are paid before the first picture comes. What is left is shared by the pictures.",
    wrong_answers=(
        Wrong(
            lambda w, k, m: max(0, (m - 2 * w) // k),
            "You counted 2 bytes a weight. That is enough to *use* the network; training keeps gradients and the "
            "optimiser's numbers, too.",
        ),
        Wrong(
            lambda w, k, m: max(0, (m - 4 * w) // k),
            "You counted weights and gradients, 4 bytes together. Adam's own numbers are the larger part: 12 more.",
        ),
        Wrong(
            lambda w, k, m: max(0, (m - 12 * w) // k),
            "You counted the 12 bytes of the optimiser. Weights and gradients in half precision come on top: 2 and 2.",
        ),
        Wrong(
            lambda w, k, m: max(0, (m - 14 * w) // k),
            "You are 2 bytes a weight short: the half-precision weights or their gradients are missing.",
        ),
        Wrong(
            lambda w, k, m: (m - 16 * w) // k,
            "Where not even the weights fit, you answer with a negative number of pictures. It should be 0.",
        ),
        Wrong(
            lambda w, k, m: max(0, (m - 16 * w) / k),
            "Pictures come whole: round down.",
        ),
        Wrong(
            lambda w, k, m: max(0, round((m - 16 * w) / k)),
            "You rounded to the nearest whole number. The last picture has to fit whole: round down.",
        ),
        Wrong(
            lambda w, k, m: m // (16 * w + k),
            "You gave each picture weights of its own. All pictures of a batch go through the same weights.",
        ),
        Wrong(
            lambda w, k, m: m // k,
            "You shared out all the memory among the pictures. The weights and their optimiser need their part first.",
        ),
    ),
)
