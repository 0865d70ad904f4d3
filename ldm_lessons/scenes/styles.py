"""Art styles: each turns a plainly drawn picture into another medium, the same on every machine.

Texture comes from `_noise`, integer hashing in uint32, not from a library's random numbers.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ldm_lessons.scenes.world import Dice, Scene


@lru_cache(maxsize=64)
def _noise(size: int, cell: int, layer: int) -> np.ndarray:
    """Smooth noise in [-1, 1], float32 (size, size), that changes over about `cell` pixels and tiles."""
    n = max(size // max(cell, 1), 2)
    i = np.arange(n * n, dtype=np.uint32) + np.uint32(layer * 7919 + 1)
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        i = (i ^ (i >> np.uint32(shift))) * np.uint32(factor)
    grid = ((i ^ (i >> np.uint32(16))) >> np.uint32(8)).astype(np.float32).reshape(n, n) / 2**23 - 1
    grid = np.pad(grid, 1, mode="wrap")
    smooth = Image.fromarray(grid).resize((size * (n + 2) // n,) * 2, Image.Resampling.BICUBIC)
    return np.asarray(smooth)[size // n :, size // n :][:size, :size]


def _shifted(size: int, cell: int, layer: int, dice: Dice) -> np.ndarray:
    return np.roll(_noise(size, cell, layer), (int(dice.random() * size), int(dice.random() * size)), (0, 1))


def apply_style(image: Image.Image, scene: Scene) -> Image.Image:
    """`image` in the scene's style; RGB in, RGB of the same size out."""
    dice = Dice("style", scene.seed)
    if scene.style == "plain":
        return image
    return {"pixel art": _pixel_art, "pencil sketch": _pencil, "watercolour": _watercolour, "stained glass": _glass}[
        scene.style
    ](image, dice)


BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], np.float32) / 16 - 0.47


def _pixel_art(image: Image.Image, _: Dice) -> Image.Image:
    """A 32 × 32 grid with few, strong tones, mixed a little by Bayer's pattern."""
    size = image.width
    cells = min(32, size)
    small = np.asarray(image.resize((cells, cells), Image.Resampling.BOX), np.float32)
    small = small + 0.22 * (small - small.mean(-1, keepdims=True))
    step = 255 / 8
    tones = np.round(small / step + 0.2 * np.tile(BAYER, (-(-cells // 4),) * 2)[:cells, :cells, None]) * step
    return Image.fromarray(tones.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)


def _edges(image: Image.Image, radius: float) -> np.ndarray:
    """How sharply brightness changes, float32 (H, W) in [0, 1]."""
    grey = image.convert("L").filter(ImageFilter.GaussianBlur(radius))
    reach = max(1, round(image.width / 128))
    x = np.asarray(ImageChops.difference(grey, ImageChops.offset(grey, reach, 0)), np.float32)
    y = np.asarray(ImageChops.difference(grey, ImageChops.offset(grey, 0, reach)), np.float32)
    edge = np.maximum(x, y)
    edge[:reach], edge[:, :reach] = 0, 0
    return (edge / 26).clip(0, 1)


def _pencil(image: Image.Image, dice: Dice) -> Image.Image:
    """Paper, hatching where it is dark, outlines, and a thin layer of coloured pencil."""
    size = image.width
    unit = size / 128
    rgb = np.asarray(image, np.float32) / 255
    grey = rgb.mean(-1)
    y, x = np.mgrid[:size, :size].astype(np.float32) / unit
    wobble = 1.4 * _shifted(size, round(16 * unit), 1, dice)
    hatch = 0.5 + 0.5 * np.sin((x + y + wobble) * (np.pi / 3.4))
    tone = 1 - 0.22 * hatch * (1 - grey)
    grain = 1 + 0.03 * _shifted(size, max(1, round(unit)), 2, dice)
    colour = (rgb - grey[..., None]) * 0.7 + (0.56 + 0.42 * grey[..., None])
    paper = np.array([0.985, 0.972, 0.94], np.float32)
    ink = (1 - 0.7 * (_edges(image, 0.6 * unit) - 0.2).clip(0, 1))[..., None]
    return Image.fromarray(
        (255 * (colour * tone[..., None] * paper * grain[..., None]).clip(0, 1) * ink).astype(np.uint8)
    )


def _watercolour(image: Image.Image, dice: Dice) -> Image.Image:
    """Edges that wander, washes that bleed and dry darker at their rims, grain, and a rim of bare paper."""
    size = image.width
    unit = size / 128
    dy, dx = (1.7 * unit * _shifted(size, round(16 * unit), k, dice) for k in (3, 4))
    y, x = np.mgrid[:size, :size]
    rows = (y + dy).round().astype(int).clip(0, size - 1)
    columns = (x + dx).round().astype(int).clip(0, size - 1)
    moved = Image.fromarray(np.asarray(image)[rows, columns]).filter(ImageFilter.GaussianBlur(0.7 * unit))
    wash = np.asarray(moved, np.float32) / 255
    rims = _edges(moved, 0.8 * unit)[..., None]
    blotch = 0.09 * _shifted(size, round(22 * unit), 5, dice) + 0.02 * _shifted(size, max(1, round(2 * unit)), 6, dice)
    pigment = (1 - wash) * (0.86 + blotch[..., None] + 0.22 * rims)
    frame = np.minimum.reduce([x, y, size - 1 - x, size - 1 - y]) / unit + 2.2 * _shifted(
        size, round(9 * unit), 7, dice
    )
    painted = (1 - pigment) * ((frame - 2.5) / 2).clip(0, 1)[..., None] + (1 - ((frame - 2.5) / 2).clip(0, 1))[
        ..., None
    ]
    paper = np.array([0.995, 0.985, 0.96], np.float32)
    return Image.fromarray((255 * (painted * paper).clip(0, 1)).astype(np.uint8))


def _glass(image: Image.Image, dice: Dice) -> Image.Image:
    """Panes of one glowing colour each, between dark leads."""
    size, n = image.width, 12
    grid = [
        [(i + dice.uniform(-0.34, 0.34), j + dice.uniform(-0.34, 0.34)) for i in range(n + 1)] for j in range(n + 1)
    ]
    scale = 2 * size / (n - 1)
    at = [[((x - 0.5) * scale, (y - 0.5) * scale) for x, y in row] for row in grid]
    source = np.asarray(image.resize((n * 2, n * 2), Image.Resampling.BOX), np.float32)
    big = Image.new("RGB", (2 * size, 2 * size))
    pen = ImageDraw.Draw(big)
    for j in range(n):
        for i in range(n):
            corners = [at[j][i], at[j][i + 1], at[j + 1][i + 1], at[j + 1][i]]
            for k, pane in enumerate((corners[:3], [corners[0], *corners[2:]])):
                colour = source[min(2 * j + k, 2 * n - 1), min(2 * i + 1 - k, 2 * n - 1)]
                vivid = (colour + 0.45 * (colour - colour.mean()) + 12).clip(0, 255)
                pen.polygon(pane, fill=tuple(int(v) for v in vivid))
                pen.line([*pane, pane[0]], fill=(30, 28, 36), width=max(2, round(size / 64)))
    return big.reduce(2)
