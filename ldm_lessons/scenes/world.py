"""The world of the course: which scenes there are, how likely each is, and which are kept out of training.

A `Scene` is a small record of attributes. It is drawn by `paint.draw`, described by `words.caption`, and labelled
pixel by pixel by `paint.semantic_map`. Everything random comes from `Dice`, which uses only `random.Random.random()`:
Python promises that sequence for ever, so a seed means the same scene on every machine.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

TIMES = ("day", "dawn", "sunset", "night")
WEATHERS = ("clear", "cloudy", "rain", "snow", "rainbow")
GROUNDS = ("meadow", "beach", "snow", "lake")
BACKDROPS = ("none", "mountains", "hills", "cliffs", "city")
KINDS = ("house", "boat", "balloon", "pine", "palm", "lighthouse", "windmill", "castle")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
PLACES = ("left", "middle", "right")
SIZES = ("small", "medium", "large")
STYLES = ("plain", "pixel art", "pencil sketch", "watercolour")
HELD_OUT_KIND = "mushroom"
HELD_OUT_STYLE = "stained glass"
COLOURED = ("house", "boat", "balloon", "lighthouse", "windmill", "castle", "mushroom")  # trees are green

# Disjoint seed ranges. "composition" holds the combinations below, "new" the held-out kind and style.
SPLITS = {
    "train": range(0, 1_000_000),
    "validation": range(1_000_000, 1_100_000),
    "test": range(1_100_000, 1_200_000),
    "composition": range(1_200_000, 1_300_000),
    "new": range(1_300_000, 1_400_000),
}
# Never drawn for training: each is a set of attributes, "kind" and "colour" meaning those of one object.
HELD_OUT_COMBINATIONS: tuple[dict[str, str], ...] = (
    {"kind": "house", "colour": "purple"},
    {"kind": "boat", "colour": "green"},
    {"kind": "balloon", "colour": "white"},
    {"kind": "castle", "colour": "yellow"},
    {"kind": "windmill", "style": "pixel art"},
    {"kind": "lighthouse", "time": "dawn"},
    {"ground": "snow", "backdrop": "city"},
    {"ground": "beach", "weather": "rainbow"},
)


@dataclass(frozen=True)
class Object:
    """One thing that stands, floats or flies in a scene. `colour` is None for trees."""

    kind: str
    colour: str | None
    place: str
    size: str


@dataclass(frozen=True)
class Scene:
    """All that a picture shows. `seed` fixes what has no word: the clouds' shapes, the mountains' peaks."""

    time: str
    weather: str
    ground: str
    backdrop: str
    objects: tuple[Object, ...]
    birds: int
    style: str
    seed: int

    def to_dict(self) -> dict:
        """Plain values, as a data set or JSON holds them."""
        return asdict(self) | {"objects": [asdict(o) for o in self.objects]}

    @classmethod
    def from_dict(cls, values: dict) -> "Scene":
        return cls(**(values | {"objects": tuple(Object(**o) for o in values["objects"])}))


class Dice:
    """Random choices that are the same on every machine and Python version."""

    def __init__(self, *seed: int | str):
        self.random = random.Random(":".join(map(str, seed))).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choice(self, options: Sequence, weights: Sequence[float] | None = None):
        if weights is None:
            return options[int(self.random() * len(options))]
        point = self.random() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            point -= weight
            if point < 0:
                return option
        return options[-1]

    def shuffled(self, items: Sequence) -> list:
        order = sorted(range(len(items)), key=[self.random() for _ in items].__getitem__)
        return [items[i] for i in order]


def split_of(seed: int) -> str:
    """The split whose range holds `seed`; ValueError outside all of them."""
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(f"seed {seed} is in no split; the splits are {', '.join(f'{n} {s}' for n, s in SPLITS.items())}")


def held_out(scene: Scene) -> list[dict[str, str]]:
    """The held-out combinations that `scene` shows."""

    def shows(combination: dict[str, str]) -> bool:
        of_object = {k: v for k, v in combination.items() if k in ("kind", "colour")}
        of_scene = {k: v for k, v in combination.items() if k not in ("kind", "colour")}
        return all(getattr(scene, k) == v for k, v in of_scene.items()) and (
            not of_object or any(all(getattr(o, k) == v for k, v in of_object.items()) for o in scene.objects)
        )

    return [c for c in HELD_OUT_COMBINATIONS if shows(c)]


def possible(scene: Scene) -> bool:
    """Whether the world has such a scene: boats need water, palms no snow, rainbows the day."""
    kinds = [o.kind for o in scene.objects]
    return not (
        ("boat" in kinds and scene.ground not in ("lake", "beach"))
        or ("palm" in kinds and scene.ground == "snow")
        or (scene.weather == "rainbow" and scene.time != "day")
        or len(set(kinds)) < len(kinds)
        or len({o.place for o in scene.objects}) < len(kinds)
    )


def _anything(dice: Dice, seed: int, new: bool) -> Scene:
    places = dice.shuffled(PLACES)
    kinds = dice.shuffled((*KINDS, *([HELD_OUT_KIND] * new)))
    objects = tuple(
        Object(kind, dice.choice(COLOURS) if kind in COLOURED else None, place, dice.choice(SIZES, (1, 2, 1)))
        for kind, place in zip(kinds, places[: dice.choice((0, 1, 2), (0.08, 0.57, 0.35))], strict=False)
    )
    return Scene(
        time=dice.choice(TIMES, (0.36, 0.18, 0.23, 0.23)),
        weather=dice.choice(WEATHERS, (0.36, 0.2, 0.13, 0.11, 0.2)),
        ground=dice.choice(GROUNDS, (0.27, 0.21, 0.2, 0.32)),
        backdrop=dice.choice(BACKDROPS, (0.16, 0.21, 0.21, 0.21, 0.21)),
        objects=objects,
        birds=dice.choice((0, 1, 2, 3), (0.64, 0.12, 0.12, 0.12)),
        style=dice.choice((*STYLES, HELD_OUT_STYLE), (0.52, 0.16, 0.16, 0.16, 0.5 * new)),
        seed=seed,
    )


def sample_scene(seed: int, split: str | None = None) -> Scene:
    """The scene of `seed`, drawn from the split that holds it.

    `split` may name a split instead: `seed` then counts from its start, so `sample_scene(0, "test")` is its first.
    Scenes of "train", "validation" and "test" show no held-out combination, kind or style; each of "composition" shows
    at least one held-out combination, each of "new" the held-out kind, the held-out style, or both.
    """
    if split is not None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
        if not 0 <= seed < len(SPLITS[split]):
            raise ValueError(f"split {split!r} has the scenes 0 to {len(SPLITS[split]) - 1}; {seed} is not among them")
        seed = SPLITS[split][seed]
    split = split_of(seed)
    dice = Dice("scene", seed)
    while True:
        scene = _anything(dice, seed, new=split == "new")
        if split == "composition":
            scene = _with(scene, dice.choice(HELD_OUT_COMBINATIONS), dice)
        if not possible(scene):
            continue
        is_new = scene.style == HELD_OUT_STYLE or any(o.kind == HELD_OUT_KIND for o in scene.objects)
        if (bool(held_out(scene)) == (split == "composition")) and (is_new == (split == "new")):
            return scene


def _with(scene: Scene, combination: dict[str, str], dice: Dice) -> Scene:
    """`scene`, changed to show `combination`."""
    of_scene = {k: v for k, v in combination.items() if k not in ("kind", "colour")}
    scene = replace(scene, **of_scene)
    if "kind" in combination:
        first = Object(
            combination["kind"],
            combination.get("colour", dice.choice(COLOURS)),
            scene.objects[0].place if scene.objects else dice.choice(PLACES),
            dice.choice(SIZES),
        )
        others = [o for o in scene.objects[1:] if o.kind != first.kind]
        scene = replace(scene, objects=(first, *others))
    return scene
