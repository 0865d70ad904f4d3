"""The main objects: each function paints one kind at its foot (x, y), `h` high, in one colour."""

from collections.abc import Callable
from math import cos, pi, sin
from typing import TYPE_CHECKING

from ldm_lessons.scenes.world import Dice, Scene

if TYPE_CHECKING:
    from ldm_lessons.scenes.paint import Canvas

COLOUR_RGB = {
    "red": (222, 58, 52),
    "yellow": (250, 204, 52),
    "green": (58, 158, 84),
    "blue": (52, 104, 214),
    "purple": (142, 72, 186),
    "white": (246, 244, 240),
}
WINDOW = (255, 226, 132)
PLACE_X = {"left": 0.2, "middle": 0.5, "right": 0.8}
SIZE_FACTOR = {"small": 0.72, "medium": 1.0, "large": 1.32}


def _dark(colour: tuple, amount: float = 0.28) -> tuple[int, ...]:
    return tuple(round(v * (1 - amount)) for v in colour)


def _pale(colour: tuple, amount: float = 0.4) -> tuple[int, ...]:
    return tuple(round(v + (255 - v) * amount) for v in colour)


def place_objects(c: "Canvas", scene: Scene, dice: Dice, horizon: float) -> None:
    """Paint the scene's objects, the farther (smaller) first; on a lake, land things get an islet to stand on."""
    spots = []
    for o in scene.objects:
        x = PLACE_X[o.place] + dice.uniform(-0.035, 0.035)
        spots.append((SIZE_FACTOR[o.size], x, dice.uniform(0, 0.03), dice.uniform(0.3, 0.42), o))
    for factor, x, jitter, air, o in sorted(spots, key=lambda s: s[0]):
        y = horizon + 0.1 + 0.13 * (factor - 0.72) / 0.6 + jitter
        if o.kind == "balloon":
            y = air + 0.06 * factor
        elif o.kind == "boat" and scene.ground == "beach":
            y = horizon + 0.075 + 0.02 * factor
        elif scene.ground == "lake" and o.kind != "boat":
            c.label = "meadow"
            w = 0.17 * factor
            c.oval(x, y + 0.012, w * 1.08, 0.036 * factor, (24, 60, 96, 90))
            c.oval(x, y, w, 0.034 * factor, (206, 184, 128))
            c.oval(x, y - 0.01, w * 0.9, 0.026 * factor, (96, 156, 76))
        elif o.kind != "boat":
            c.oval(x, y, 0.1 * factor, 0.018 * factor, (20, 30, 40, 60))
        c.label, c.lift = o.kind, 0.42
        PAINTERS[o.kind](c, x, y, HEIGHTS[o.kind] * factor, COLOUR_RGB.get(o.colour or "green"))
        c.lift = 0.0


def _house(c: "Canvas", x: float, y: float, h: float, colour: tuple) -> None:
    w = h * 0.56
    c.rect(x + w * 0.42, y - h * 1.02, x + w * 0.64, y - h * 0.6, (136, 84, 66))
    c.rect(x - w, y - h * 0.58, x + w, y, colour)
    c.rect(x + w * 0.5, y - h * 0.58, x + w, y, _dark(colour, 0.14))
    c.poly([(x - w * 1.22, y - h * 0.55), (x, y - h), (x + w * 1.22, y - h * 0.55)], (112, 66, 52))
    c.poly([(x, y - h), (x + w * 1.22, y - h * 0.55), (x + w * 0.3, y - h * 0.55)], (88, 50, 44))
    c.rect(x - w * 0.17, y - h * 0.34, x + w * 0.17, y, (92, 58, 44))
    for side in (-0.62, 0.62):
        left, right = x + w * (side - 0.19), x + w * (side + 0.19)
        c.rect(left - 0.006, y - h * 0.46, right + 0.006, y - h * 0.16, (250, 248, 240))
        c.rect(left, y - h * 0.43, right, y - h * 0.19, WINDOW if c.night else (140, 190, 226), lit=c.night)


def _boat(c: "Canvas", x: float, y: float, h: float, colour: tuple) -> None:
    w = h * 0.5
    c.oval(x, y + h * 0.02, w * 1.05, h * 0.06, (16, 40, 70, 80))
    c.rect(x - h * 0.02, y - h, x + h * 0.02, y - h * 0.12, (108, 74, 50))
    c.poly([(x + h * 0.04, y - h * 0.96), (x + h * 0.04, y - h * 0.24), (x + w * 0.95, y - h * 0.24)], colour)
    c.poly(
        [(x - h * 0.04, y - h * 0.84), (x - h * 0.04, y - h * 0.24), (x - w * 0.7, y - h * 0.24)], _dark(colour, 0.2)
    )
    hull = [(x - w, y - h * 0.19), (x + w, y - h * 0.19), (x + w * 0.72, y + h * 0.03), (x - w * 0.7, y + h * 0.03)]
    c.poly(hull, (140, 84, 52))
    c.poly([hull[0], hull[1], (x + w * 0.92, y - h * 0.13), (x - w * 0.92, y - h * 0.13)], (238, 226, 204))


def _balloon(c: "Canvas", x: float, y: float, h: float, colour: tuple) -> None:
    r, top = h * 0.4, y - h * 0.5
    for dx in (-0.34, 0.34):
        c.line([(x + dx * r * 1.6, top + r * 0.66), (x + dx * r * 0.6, y + h * 0.14)], h * 0.022, (104, 78, 58))
    c.oval(x, top, r, r * 1.04, colour)
    c.poly([(x - r * 0.86, top + r * 0.5), (x + r * 0.86, top + r * 0.5), (x + r * 0.26, y), (x - r * 0.26, y)], colour)
    c.oval(x, top, r * 0.62, r * 1.04, _dark(colour, 0.2))
    c.poly(
        [(x - r * 0.55, top + r * 0.48), (x + r * 0.55, top + r * 0.48), (x + r * 0.17, y), (x - r * 0.17, y)],
        _dark(colour, 0.2),
    )
    c.oval(x, top, r * 0.24, r * 1.04, _pale(colour, 0.25))
    c.poly(
        [(x - r * 0.22, top + r * 0.5), (x + r * 0.22, top + r * 0.5), (x + r * 0.07, y), (x - r * 0.07, y)],
        _pale(colour, 0.25),
    )
    c.oval(x - r * 0.45, top - r * 0.42, r * 0.2, r * 0.26, (255, 255, 255, 90))
    c.rect(x - r * 0.26, y + h * 0.1, x + r * 0.26, y + h * 0.25, (150, 102, 60))
    c.rect(x - r * 0.3, y + h * 0.09, x + r * 0.3, y + h * 0.13, (104, 68, 44))


def _pine(c: "Canvas", x: float, y: float, h: float, _: tuple) -> None:
    c.rect(x - h * 0.045, y - h * 0.2, x + h * 0.045, y, (104, 70, 46))
    for low, high, w in ((0.14, 0.6, 0.34), (0.36, 0.8, 0.27), (0.58, 1.0, 0.19)):
        c.poly([(x - w * h, y - low * h), (x, y - high * h), (x + w * h, y - low * h)], (34, 104, 70))
        c.poly([(x + w * h * 0.1, y - low * h), (x, y - high * h), (x + w * h, y - low * h)], (24, 80, 58))


def _palm(c: "Canvas", x: float, y: float, h: float, _: tuple) -> None:
    tip_x, tip_y = x + h * 0.1, y - h * 0.78
    trunk = [(x + h * 0.1 * (k / 8) ** 2, y - h * 0.78 * k / 8) for k in range(9)]
    c.line(trunk, h * 0.075, (150, 108, 68))
    for angle in (200, 235, 285, 325, 345, 180, 5):
        a = angle * pi / 180
        reach, drop = h * 0.4, h * 0.13
        end = (tip_x + reach * cos(a), tip_y + reach * 0.62 * sin(a) + drop)
        mid = (tip_x + 0.55 * reach * cos(a), tip_y + reach * 0.62 * sin(a) - 0.02)
        c.poly([(tip_x, tip_y - 0.012), mid, end, (mid[0], mid[1] + h * 0.085), (tip_x, tip_y + 0.02)], (52, 142, 70))
    for dx in (-0.03, 0.03):
        c.oval(tip_x + dx * h, tip_y + h * 0.03, h * 0.035, h * 0.035, (112, 72, 42))


def _lighthouse(c: "Canvas", x: float, y: float, h: float, colour: tuple) -> None:
    base, top = h * 0.17, h * 0.105

    def at(t: float) -> float:
        return base + (top - base) * t

    for i in range(5):
        low, high = i / 5 * 0.76, (i + 1) / 5 * 0.76
        stripe = colour if i % 2 == 0 else ((250, 248, 244) if colour != COLOUR_RGB["white"] else (214, 214, 220))
        a, b = at(i / 5), at((i + 1) / 5)
        c.poly([(x - a, y - low * h), (x + a, y - low * h), (x + b, y - high * h), (x - b, y - high * h)], stripe)
        c.poly(
            [(x + a * 0.4, y - low * h), (x + a, y - low * h), (x + b, y - high * h), (x + b * 0.4, y - high * h)],
            (20, 24, 50, 46),
        )
    c.rect(x - h * 0.14, y - h * 0.79, x + h * 0.14, y - h * 0.75, (70, 72, 88))
    c.rect(
        x - h * 0.075,
        y - h * 0.9,
        x + h * 0.075,
        y - h * 0.79,
        (255, 234, 140) if c.night else (190, 222, 240),
        lit=c.night,
    )
    c.poly([(x - h * 0.11, y - h * 0.89), (x, y - h), (x + h * 0.11, y - h * 0.89)], colour)
    if c.night:
        for side in (-1, 1):
            beam = [(x, y - h * 0.85), (x + side * 0.34, y - h * 0.85 - 0.055), (x + side * 0.34, y - h * 0.85 + 0.055)]
            c.poly(beam, (255, 240, 170, 70), lit=True)


def _windmill(c: "Canvas", x: float, y: float, h: float, colour: tuple) -> None:
    c.poly([(x - h * 0.2, y), (x - h * 0.125, y - h * 0.62), (x + h * 0.125, y - h * 0.62), (x + h * 0.2, y)], colour)
    c.poly(
        [(x + h * 0.06, y), (x + h * 0.045, y - h * 0.62), (x + h * 0.125, y - h * 0.62), (x + h * 0.2, y)],
        _dark(colour, 0.18),
    )
    c.poly([(x - h * 0.155, y - h * 0.6), (x, y - h * 0.82), (x + h * 0.155, y - h * 0.6)], (98, 64, 54))
    c.rect(x - h * 0.055, y - h * 0.17, x + h * 0.055, y, (86, 56, 44))
    c.rect(x - h * 0.04, y - h * 0.42, x + h * 0.04, y - h * 0.3, WINDOW if c.night else (150, 196, 226), lit=c.night)
    hub_y = y - h * 0.64
    for angle in (35, 125, 215, 305):
        a = angle * pi / 180
        dx, dy = cos(a), sin(a)
        start, end, w = h * 0.07, h * 0.42, h * 0.085
        c.line([(x, hub_y), (x + end * dx, hub_y + end * dy)], h * 0.026, (92, 66, 52))
        sail = [(start, 0), (end, 0), (end, w), (start, w)]
        c.poly([(x + p * dx - q * dy, hub_y + p * dy + q * dx) for p, q in sail], (250, 244, 230))
    c.oval(x, hub_y, h * 0.03, h * 0.03, (70, 50, 42))


def _castle(c: "Canvas", x: float, y: float, h: float, colour: tuple) -> None:
    stone, shade = (184, 178, 176), (152, 146, 150)
    w = h * 0.5
    c.rect(x - w, y - h * 0.42, x + w, y, stone)
    for k in range(5):
        left = x - w + k * w * 0.44
        c.rect(left, y - h * 0.49, left + w * 0.24, y - h * 0.4, stone)
    for centre, r, top in ((-0.86, 0.24, 0.56), (0.86, 0.24, 0.56), (0.0, 0.3, 0.7)):
        cx = x + centre * w
        c.rect(cx - r * w, y - top * h, cx + r * w, y, stone)
        c.rect(cx + r * w * 0.3, y - top * h, cx + r * w, y, shade)
        roof = top + 0.3
        c.poly([(cx - r * w * 1.4, y - top * h), (cx, y - roof * h), (cx + r * w * 1.4, y - top * h)], colour)
        c.poly(
            [(cx, y - roof * h), (cx + r * w * 1.4, y - top * h), (cx + r * w * 0.3, y - top * h)], _dark(colour, 0.2)
        )
        glow = WINDOW if c.night else (86, 86, 104)
        c.rect(cx - r * w * 0.32, y - (top - 0.08) * h, cx + r * w * 0.32, y - (top - 0.2) * h, glow, lit=c.night)
    c.rect(x - w * 0.17, y - h * 0.24, x + w * 0.17, y, (84, 58, 46))
    c.oval(x, y - h * 0.24, w * 0.17, h * 0.07, (84, 58, 46))


def _mushroom(c: "Canvas", x: float, y: float, h: float, colour: tuple) -> None:
    stem = [(x - h * 0.15, y), (x - h * 0.1, y - h * 0.55), (x + h * 0.1, y - h * 0.55), (x + h * 0.15, y)]
    c.poly(stem, (246, 236, 214))
    c.poly([(x + h * 0.04, y), (x + h * 0.03, y - h * 0.55), *stem[2:]], (222, 206, 178))
    cap = [(x + h * 0.42 * cos(a * pi / 24), y - h * 0.5 - h * 0.5 * sin(a * pi / 24)) for a in range(25)]
    c.poly(cap, colour)
    c.oval(x, y - h * 0.5, h * 0.42, h * 0.07, _dark(colour, 0.3))
    spot = (252, 250, 244) if colour != COLOUR_RGB["white"] else (220, 90, 80)
    for dx, dy, r in ((-0.2, 0.68, 0.07), (0.04, 0.85, 0.08), (0.22, 0.64, 0.06), (0.02, 0.63, 0.05)):
        c.oval(x + dx * h, y - dy * h, r * h, r * h * 0.86, spot)


PAINTERS: dict[str, Callable] = {
    f.__name__[1:]: f for f in (_house, _boat, _balloon, _pine, _palm, _lighthouse, _windmill, _castle, _mushroom)
}
HEIGHTS = {"house": 0.24, "boat": 0.29, "balloon": 0.31, "pine": 0.31, "palm": 0.33}
HEIGHTS |= {"lighthouse": 0.38, "windmill": 0.35, "castle": 0.31, "mushroom": 0.29}
