"""Drawing: `draw` paints a scene, `semantic_map` says of each pixel what it shows.

Both run the same strokes on a `Canvas`, whose coordinates go from 0 to 1, right and down, at any size. A canvas either
paints colours (twofold size, shrunk at the end, so that edges are smooth) or labels (one size, hard edges).
"""

from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from ldm_lessons.scenes import things
from ldm_lessons.scenes.styles import apply_style
from ldm_lessons.scenes.world import Dice, Scene

LABELS = ("sky", "cloud", "sun or moon", "mountains", "hills", "cliffs", "city", "meadow", "beach", "snow", "water")
LABELS += ("house", "boat", "balloon", "pine", "palm", "lighthouse", "windmill", "castle", "mushroom", "bird")

SKIES = {  # top, middle, horizon
    "day": ((62, 148, 226), (132, 196, 243), (218, 240, 250)),
    "dawn": ((118, 138, 208), (226, 176, 204), (255, 228, 192)),
    "sunset": ((74, 42, 110), (216, 84, 104), (255, 184, 92)),
    "night": ((9, 14, 44), (22, 34, 80), (48, 62, 116)),
}
LIGHT = {"day": (1, 1, 1), "dawn": (0.96, 0.9, 0.94), "sunset": (0.94, 0.78, 0.72), "night": (0.42, 0.47, 0.7)}
GREY_SKY = {"clear": 0.0, "cloudy": 0.12, "rain": 0.55, "snow": 0.45, "rainbow": 0.05}


def mix(a: tuple, b: tuple, amount: float) -> tuple[int, ...]:
    """The colour `amount` of the way from `a` to `b`, amount in [0, 1]."""
    return tuple(round(x + (y - x) * amount) for x, y in zip(a, b, strict=True))


class Canvas:
    """Strokes in unit coordinates, in the light of the scene's hour; `label` is what the next strokes belong to."""

    def __init__(self, scene: Scene, pixels: int, as_labels: bool = False):
        self.pixels, self.as_labels, self.label, self.time = pixels, as_labels, "sky", scene.time
        self.light = LIGHT[scene.time]
        self.lift = 0.0  # how far the next strokes stand out of the dark: 0 not at all, 1 wholly
        self.night = scene.time == "night"
        self.image = Image.new("L" if as_labels else "RGB", (pixels, pixels))
        self.pen = ImageDraw.Draw(self.image, "L" if as_labels else "RGBA")

    def ink(self, colour: tuple, lit: bool) -> int | tuple:
        if self.as_labels:
            return LABELS.index(self.label)
        if lit:
            return colour
        light = (k + (1 - k) * self.lift for k in self.light)
        return tuple(round(c * k) for c, k in zip(colour, light, strict=False)) + tuple(colour[3:])

    def skip(self, colour: tuple) -> bool:
        """Glazes (colours with transparency) shade a thing; they are no thing of their own on a map."""
        return self.as_labels and len(colour) == 4

    def poly(self, points: list[tuple[float, float]], colour: tuple, lit: bool = False) -> None:
        if not self.skip(colour):
            self.pen.polygon([(x * self.pixels, y * self.pixels) for x, y in points], fill=self.ink(colour, lit))

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: tuple, lit: bool = False) -> None:
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, lit)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: tuple, lit: bool = False) -> None:
        if not self.skip(colour):
            box = ((x - rx) * self.pixels, (y - ry) * self.pixels, (x + rx) * self.pixels, (y + ry) * self.pixels)
            self.pen.ellipse(box, fill=self.ink(colour, lit))

    def line(self, points: list[tuple[float, float]], width: float, colour: tuple, lit: bool = False) -> None:
        if not self.skip(colour):
            thick = max(1, round(width * self.pixels))
            xy = [(x * self.pixels, y * self.pixels) for x, y in points]
            self.pen.line(xy, fill=self.ink(colour, lit), width=thick, joint="curve")

    def shade(self, y0: float, y1: float, stops: tuple, lit: bool = False) -> None:
        """A band from `y0` to `y1` whose colour runs through `stops`."""
        if self.as_labels:
            return self.rect(0, y0, 1, y1, stops[0])
        top, bottom = round(y0 * self.pixels), round(y1 * self.pixels)
        colours = np.array([self.ink(s, lit) for s in stops], float)
        where = np.linspace(0, len(stops) - 1, max(bottom - top, 1))
        column = np.stack([np.interp(where, np.arange(len(stops)), c) for c in colours.T], -1)
        strip = Image.fromarray(column.round().astype(np.uint8)[:, None])
        self.image.paste(strip.resize((self.pixels, len(column)), Image.Resampling.NEAREST), (0, top))


def draw(scene: Scene, size: int = 128) -> Image.Image:
    """The picture of `scene`, RGB, `size` × `size` pixels (8 to 2048); about 4 ms at 128."""
    _check_size(size)
    canvas = Canvas(scene, size * (2 if size > 64 else 4))
    _paint(canvas, scene)
    return apply_style(canvas.image.reduce(canvas.pixels // size), scene)


def semantic_map(scene: Scene, size: int = 128) -> np.ndarray:
    """What each pixel shows, as indices into `LABELS`: uint8 (size, size)."""
    _check_size(size)
    canvas = Canvas(scene, size, as_labels=True)
    _paint(canvas, scene)
    return np.array(canvas.image)


def _check_size(size: int) -> None:
    if not isinstance(size, int) or not 8 <= size <= 2048:
        raise ValueError(f"a scene can be drawn 8 to 2048 pixels wide (a whole number); {size!r} is not that")


def _paint(c: Canvas, scene: Scene) -> None:
    dice = Dice("paint", scene.seed)
    horizon = dice.uniform(0.56, 0.62)
    sun_x = dice.uniform(0.14, 0.86)
    grey = GREY_SKY[scene.weather]
    murk = (58, 64, 84) if c.night else (150, 158, 172)
    sky = tuple(mix(s, murk, grey * (0.6 if scene.time in ("sunset", "dawn") else 1)) for s in SKIES[scene.time])
    c.label = "sky"
    c.shade(0, 1, (sky[0], sky[1], sky[2], sky[2]), lit=True)
    _light_in_the_sky(c, scene, dice, horizon, sun_x)
    _clouds(c, scene, dice, sky)
    if scene.weather == "rainbow":
        _rainbow(c, dice, horizon)
    {"none": lambda *_: None, "mountains": _mountains, "hills": _hills, "cliffs": _cliffs, "city": _city}[
        scene.backdrop
    ](c, dice, horizon, sky[2])
    {"meadow": _meadow, "beach": _beach, "snow": _snow, "lake": _lake}[scene.ground](c, dice, horizon, sky, sun_x)
    things.place_objects(c, scene, Dice("objects", scene.seed), horizon)
    _birds(c, scene, Dice("birds", scene.seed))
    if scene.weather in ("rain", "snow"):
        _falling(c, scene, Dice("falling", scene.seed))


def _light_in_the_sky(c: Canvas, scene: Scene, dice: Dice, horizon: float, x: float) -> None:
    if c.night:
        for _ in range(dice.integer(20, 32)):
            sx, sy, r = dice.random(), dice.uniform(0, horizon - 0.04), dice.uniform(0.005, 0.0085)
            if scene.weather not in ("rain", "snow"):
                c.oval(sx, sy, r, r, (255, 250, 225, 235), lit=True)
    if scene.weather in ("rain", "snow"):
        return
    y = {"day": dice.uniform(0.12, 0.2), "night": dice.uniform(0.12, 0.22)}.get(scene.time, horizon - 0.07)
    radius = {"day": 0.062, "dawn": 0.07, "sunset": 0.09, "night": 0.058}[scene.time]
    colour = {"day": (255, 226, 92), "dawn": (255, 246, 222), "sunset": (255, 214, 110), "night": (250, 244, 214)}
    glow = {"day": (255, 246, 190), "dawn": (255, 236, 200), "sunset": (255, 190, 100), "night": (150, 165, 220)}
    for k in (2.3, 1.75, 1.35):
        c.oval(x, y, radius * k, radius * k, (*glow[scene.time], 46), lit=True)
    c.label = "sun or moon"
    c.oval(x, y, radius, radius, colour[scene.time], lit=True)
    if c.night:
        for dx, dy, r in ((-0.3, -0.2, 0.22), (0.28, 0.25, 0.16), (0.1, -0.45, 0.12)):
            c.oval(x + dx * radius, y + dy * radius, r * radius, r * radius, (222, 214, 184, 200), lit=True)


def _clouds(c: Canvas, scene: Scene, dice: Dice, sky: tuple) -> None:
    count = {"clear": 0, "rainbow": 1, "cloudy": dice.integer(3, 4), "rain": 5, "snow": 4}[scene.weather]
    white = {"day": (255, 255, 255), "dawn": (255, 240, 238), "sunset": (255, 198, 170), "night": (92, 102, 142)}
    body = white[scene.time]
    if scene.weather == "rain":
        body = mix(body, (84, 92, 110), 0.72)
    if scene.weather == "snow":
        body = mix(body, (196, 204, 218), 0.5) if not c.night else (112, 120, 152)
    under = mix(body, sky[0], 0.34)
    c.label = "cloud"
    start = dice.random()
    for i in range(count):
        x = (start + (i + dice.uniform(-0.2, 0.2)) / count) % 1.0
        y = dice.uniform(0.07, 0.3) if scene.weather in ("cloudy", "rainbow") else dice.uniform(0.03, 0.15)
        w = dice.uniform(0.1, 0.16) * (1.35 if scene.weather in ("rain", "snow") else 1)
        puffs = [(-0.8, 0.08, 0.36), (-0.3, -0.16, 0.5), (0.32, -0.08, 0.44), (0.82, 0.1, 0.32)]
        for dx, dy, r in puffs:
            c.oval(x + dx * w, y + dy * w + 0.018, r * w * 1.2, r * w * 0.86, under, lit=True)
        for dx, dy, r in puffs:
            c.oval(x + dx * w, y + dy * w, r * w * 1.12, r * w * 0.78, body, lit=True)


def _rainbow(c: Canvas, dice: Dice, horizon: float) -> None:
    if c.as_labels:
        return
    x, radius = dice.uniform(0.3, 0.7), dice.uniform(0.4, 0.46)
    bands = ((236, 72, 72), (248, 150, 60), (250, 222, 84), (92, 190, 104), (76, 140, 226), (142, 96, 200))
    for i, colour in enumerate(bands):
        r = radius - i * 0.016
        arc = [(x + r * cos(a * pi / 40), horizon + 0.02 - r * sin(a * pi / 40)) for a in range(41)]
        c.line(arc, 0.019, (*colour, 205), lit=True)


def _mountains(c: Canvas, dice: Dice, horizon: float, haze: tuple) -> None:
    c.label = "mountains"
    for layer, count in ((0, 3), (1, dice.integer(2, 3))):
        rock = mix((104, 116, 142), haze if not c.night else (104, 116, 142), 0.42 * (1 - layer))
        for i in range(count):
            x = (i + 0.5 + dice.uniform(-0.3, 0.3)) / count + (0.12 if layer else 0)
            height = dice.uniform(0.2, 0.27) if layer == 0 else dice.uniform(0.22, 0.34)
            half = height * dice.uniform(0.78, 1.0)
            top, ridge = horizon - height, dice.uniform(-0.1, 0.1) * half
            c.poly([(x - half, horizon + 0.01), (x, top), (x + half, horizon + 0.01)], rock)
            shadow = [
                (x, top),
                (x + half, horizon + 0.01),
                (x + ridge, horizon + 0.01),
                (x + 0.12 * half, top + 0.5 * height),
            ]
            c.poly(shadow, mix(rock, (38, 44, 74), 0.32))
            cap, s = 0.36, half * 0.36
            zig = [(x, top), (x + s, top + cap * height), (x + 0.45 * s, top + cap * height * 0.72)]
            zig += [(x + 0.05 * s, top + cap * height * 1.18), (x - 0.42 * s, top + cap * height * 0.74)]
            c.poly([*zig, (x - s, top + cap * height)], (250, 252, 255))
            c.poly([(x, top), *zig[1:3], (x + 0.05 * s, top + cap * height * 1.1)], (206, 216, 236))


def _hills(c: Canvas, dice: Dice, horizon: float, haze: tuple) -> None:
    c.label = "hills"
    for layer in range(3):
        colour = mix((84, 152, 84), haze if not c.night else (84, 152, 84), 0.46 - 0.2 * layer)
        height, phase = 0.17 - 0.045 * layer, dice.uniform(0, 2 * pi)
        swing, waves = dice.uniform(0.03, 0.05), dice.uniform(1.2, 1.9)
        ridge = [
            (k / 40, horizon - height - swing * sin(phase + waves * 2 * pi * k / 40) - 0.012 * sin(3 * phase + k / 3))
            for k in range(41)
        ]
        c.poly([*ridge, (1, horizon + 0.01), (0, horizon + 0.01)], colour)
        for _ in range(5 * (layer == 2)):
            x, y = ridge[dice.integer(2, 38)]
            c.oval(x, y + 0.02, 0.016, 0.02, mix(colour, (26, 84, 52), 0.55))


def _cliffs(c: Canvas, dice: Dice, horizon: float, haze: tuple) -> None:
    c.label = "cliffs"
    for layer, count in ((0, 2), (1, 2)):
        rock = mix((196, 94, 58), haze if not c.night else (196, 94, 58), 0.28 * (1 - layer))
        for i in range(count):
            x = (i + 0.5 + dice.uniform(-0.24, 0.24)) / count + (0.2 if layer == 0 else 0)
            w, h = dice.uniform(0.13, 0.21), dice.uniform(0.15, 0.25) + 0.04 * (1 - layer)
            top, slope = horizon - h, 0.04
            c.poly([(x - w - slope, horizon + 0.01), (x - w, top), (x + w, top), (x + w + slope, horizon + 0.01)], rock)
            side = [(x + w * 0.45, top), (x + w, top), (x + w + slope, horizon + 0.01), (x + w * 0.6, horizon + 0.01)]
            c.poly(side, mix(rock, (92, 30, 34), 0.42))
            for k in (0.24, 0.5, 0.76):
                band = [(x - w - slope * k, top + h * k), (x + w + slope * k, top + h * k)]
                c.line(band, 0.009, mix(rock, (122, 46, 34), 0.5))
            c.rect(x - w, top, x + w, top + 0.014, mix(rock, (250, 190, 130), 0.45))


def _city(c: Canvas, dice: Dice, horizon: float, haze: tuple) -> None:
    c.label = "city"
    for layer in range(2):
        wall = mix((104, 112, 140), haze if not c.night else (104, 112, 140), 0.45 * (1 - layer))
        x = -0.02
        while x < 1:
            w, h = dice.uniform(0.065, 0.105), dice.uniform(0.1, 0.3) * (1.1 - 0.22 * layer)
            colour = mix(wall, (64, 70, 104), dice.uniform(0, 0.3))
            c.rect(x, horizon - h, x + w, horizon + 0.01, colour)
            if dice.chance(0.25):
                c.poly([(x, horizon - h), (x + w / 2, horizon - h - 0.05), (x + w, horizon - h)], colour)
            for row in range(int(h / 0.036) * layer):
                for column in range(2):
                    y = horizon - h + 0.016 + 0.036 * row
                    left = x + w * (0.2 + 0.36 * column)
                    shining = dice.chance(0.62) and c.time in ("night", "sunset")
                    window = (255, 224, 128) if shining else mix(colour, (206, 226, 244), 0.5)
                    c.rect(left, y, left + w * 0.24, y + 0.016, window, lit=shining)
            x += w + dice.uniform(0.0, 0.03)


def _meadow(c: Canvas, dice: Dice, horizon: float, *_: object) -> None:
    c.label = "meadow"
    c.shade(horizon, 1, ((128, 190, 88), (92, 164, 70), (66, 134, 58)))
    for i in range(2):
        y, tilt = horizon + 0.1 + 0.15 * i, dice.uniform(-0.04, 0.04)
        rise = [(k / 16, y + tilt * sin(pi * k / 16) + tilt * (k / 16 - 0.5)) for k in range(17)]
        c.poly([*rise, (1, 1), (0, 1)], (40, 110, 46, 44))
    flowers = ((250, 246, 240), (252, 220, 96), (240, 130, 150))
    for _ in range(dice.integer(16, 26)):
        x, y = dice.random(), dice.uniform(horizon + 0.05, 0.98)
        near = (y - horizon) / 0.4
        c.line([(x, y), (x + dice.uniform(-0.008, 0.008), y - 0.016 - 0.014 * near)], 0.006, (52, 116, 48))
        if dice.chance(0.5):
            c.oval(x, y - 0.02 * near, 0.005 + 0.005 * near, 0.005 + 0.005 * near, dice.choice(flowers))


def _beach(c: Canvas, dice: Dice, horizon: float, sky: tuple, sun_x: float) -> None:
    shore = horizon + dice.uniform(0.09, 0.12)
    phase = dice.uniform(0, 2 * pi)
    _water(c, dice, horizon, shore + 0.04, sky, sun_x, 4)
    c.label = "beach"
    edge = [(k / 24, shore + 0.014 * sin(phase + k / 3.2)) for k in range(25)]
    c.poly([*edge, (1, 1), (0, 1)], (240, 216, 158))
    c.line(edge, 0.016, (252, 252, 248))
    c.poly([*[(x, y + 0.008) for x, y in edge], (1, shore + 0.06), (0, shore + 0.06)], (206, 176, 120, 120))
    c.shade(shore + 0.06, 1, ((240, 216, 158), (232, 202, 140)))
    for _ in range(12):
        x, y = dice.random(), dice.uniform(shore + 0.08, 0.98)
        c.oval(
            x, y, dice.uniform(0.006, 0.014), 0.005, dice.choice(((250, 236, 206), (212, 178, 124), (236, 150, 128)))
        )


def _snow(c: Canvas, dice: Dice, horizon: float, *_: object) -> None:
    c.label, c.lift = "snow", 0.25 * c.night
    c.shade(horizon, 1, ((226, 236, 248), (244, 248, 253), (236, 243, 252)))
    for i in range(3):
        y, phase = horizon + 0.07 + 0.12 * i, dice.uniform(0, 2 * pi)
        drift = [(k / 24, y + 0.022 * sin(phase + k / 4)) for k in range(25)]
        c.poly([*drift, (1, y + 0.055), (0, y + 0.055)], (170, 192, 228, 74))
    for _ in range(14):
        x, y = dice.random(), dice.uniform(horizon + 0.04, 0.98)
        c.oval(x, y, 0.005, 0.005, (255, 255, 255))
    c.lift = 0.0


def _water(c: Canvas, dice: Dice, top: float, bottom: float, sky: tuple, sun_x: float, ripples: int) -> None:
    c.label = "water"
    blue = (52, 128, 196) if not c.night else (16, 36, 84)
    c.shade(top, bottom, (mix(sky[2], blue, 0.5), mix(sky[1], blue, 0.72), mix(sky[0], blue, 0.8)), lit=True)
    shine = mix(sky[2], (255, 255, 255), 0.35)
    for i in range(ripples):
        y = top + (bottom - top) * (i + 0.5) / ripples
        x, w = dice.uniform(-0.05, 0.9), dice.uniform(0.06, 0.18)
        c.line([(x, y), (x + w, y)], 0.006, (*shine, 110), lit=True)
        glint = dice.uniform(0.02, 0.06)
        c.line([(sun_x - glint, y), (sun_x + glint, y)], 0.008, (*mix(shine, (255, 240, 200), 0.6), 190), lit=True)


def _lake(c: Canvas, dice: Dice, horizon: float, sky: tuple, sun_x: float) -> None:
    _water(c, dice, horizon, 1, sky, sun_x, 12)
    c.rect(0, horizon - 0.004, 1, horizon + 0.008, (58, 106, 72, 190))
    side = 0 if dice.chance(0.5) else 1
    bank = [(side, 0.93), (abs(side - 0.16), 0.955), (abs(side - 0.3), 1.0), (side, 1.0)]
    c.label = "meadow"
    c.poly(bank, (74, 132, 64))
    for _ in range(7):
        x, h = abs(side - dice.uniform(0.01, 0.2)), dice.uniform(0.06, 0.11)
        c.line([(x, 0.99), (x + dice.uniform(-0.012, 0.012), 0.99 - h)], 0.008, (56, 104, 56))
        c.oval(x, 0.99 - h, 0.008, 0.02, (112, 78, 48))


def _birds(c: Canvas, scene: Scene, dice: Dice) -> None:
    flying = {o.place for o in scene.objects if o.kind == "balloon"}
    x0 = dice.choice([x for p, x in (("left", 0.25), ("middle", 0.5), ("right", 0.75)) if p not in flying])
    y0, lean = dice.uniform(0.14, 0.26), dice.uniform(-0.05, 0.05)
    c.label = "bird"
    colour = (226, 230, 244) if c.night else (40, 42, 58)
    spread = {1: [(0.0, 0.0)], 2: [(-0.1, 0.0), (0.1, lean)], 3: [(-0.16, 0.03), (0.0, -0.055), (0.16, 0.04)]}
    for dx, dy in spread.get(scene.birds, []):
        x, y, w = x0 + dx, y0 + dy, 0.08
        flap = dice.uniform(0.6, 0.85)
        wing = [(0, 0.012), (0.5, -0.5 * flap), (1.0, -0.3 * flap), (0.55, -0.16 * flap), (0, 0.3)]
        for side in (-1, 1):
            c.poly([(x + side * a * w, y + b * w) for a, b in wing], colour, lit=True)


def _falling(c: Canvas, scene: Scene, dice: Dice) -> None:
    if c.as_labels:
        return
    coarse = scene.style in ("pixel art", "pencil sketch")  # every drop fills a block, or is drawn round
    if scene.weather == "rain":
        drop = (170, 190, 228, 150) if c.night else (226, 236, 250, 170)
        for _ in range(24 if coarse else 46):
            x, y, length = dice.uniform(-0.05, 1.1), dice.uniform(-0.05, 1), dice.uniform(0.05, 0.085)
            c.line([(x, y), (x - 0.3 * length, y + length)], 0.009, drop, lit=True)
    else:
        for _ in range(24 if coarse else 55):
            x, y, r = dice.random(), dice.random(), dice.uniform(0.009, 0.0145)
            c.oval(x, y, r, r, (255, 255, 255, 235), lit=True)
