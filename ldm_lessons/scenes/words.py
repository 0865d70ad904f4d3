"""Captions: short natural English, many for one scene, each recording what it says and what it leaves out."""

import re
from dataclasses import dataclass

from ldm_lessons.scenes.world import COLOURS, HELD_OUT_KIND, HELD_OUT_STYLE, Dice, Object, Scene

KIND_WORDS = {
    "house": ("house", "house", "cottage"),
    "boat": ("sailing boat", "boat", "sailboat"),
    "balloon": ("balloon", "hot-air balloon"),
    "pine": ("pine tree", "pine", "fir tree"),
    "palm": ("palm tree", "palm"),
    "lighthouse": ("lighthouse",),
    "windmill": ("windmill", "mill"),
    "castle": ("castle", "fortress"),
    "mushroom": ("giant mushroom", "mushroom"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PLACE_WORDS = {
    "left": ("on the left", "to the left", "on the left side"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "to the right", "on the right side"),
}
BACKDROP_WORDS = {
    "mountains": ("snowy mountains", "mountains", "mountains in the background", "snow-capped peaks"),
    "hills": ("green hills", "rolling hills", "hills in the background", "hills"),
    "cliffs": ("red cliffs", "cliffs", "red rocks in the distance"),
    "city": ("a city skyline", "a city in the background", "city towers", "a skyline"),
}
GROUND_WORDS = {
    "meadow": ("a green meadow", "a meadow", "a grassy field", "grass"),
    "beach": ("a sandy beach", "a beach", "sand by the sea"),
    "snow": ("a snow field", "snowy ground", "deep snow"),
    "lake": ("a lake", "a calm lake", "blue water"),
}
TIME_WORDS = {
    "day": ("by day", "on a bright day", "at noon"),
    "dawn": ("at dawn", "at sunrise", "early in the morning"),
    "sunset": ("at sunset", "in the evening", "at dusk"),
    "night": ("at night", "by moonlight", "after dark"),
}
WEATHER_WORDS = {
    "clear": ("under a clear sky", "with a clear sky"),
    "cloudy": ("with clouds", "under a cloudy sky", "with clouds in the sky"),
    "rain": ("in the rain", "in rainy weather", "with rain falling"),
    "snow": ("in falling snow", "with snow falling", "while it snows"),
    "rainbow": ("with a rainbow", "under a rainbow"),
}
BIRD_WORDS = {
    1: ("one bird", "a bird", "a single bird"),
    2: ("two birds", "a pair of birds"),
    3: ("three birds", "a flock of three birds"),
}
STYLE_WORDS = {
    "plain": ("a picture of", "an illustration of", "a view of"),
    "pixel art": ("pixel art of", "a pixel art picture of", "8-bit pixel art of"),
    "pencil sketch": ("a pencil sketch of", "a pencil drawing of", "a sketch of"),
    "watercolour": ("a watercolour of", "a watercolour painting of", "a painting in watercolour of"),
    "stained glass": ("a stained glass window of", "stained glass showing"),
}


@dataclass(frozen=True)
class Caption:
    """`mentions` names what the text says: "time", "house", "house.colour", ... : what a judge may hold it to."""

    text: str
    mentions: frozenset[str]


def caption_with_mentions(scene: Scene, seed: int = 0) -> Caption:
    """A caption of `scene`; another `seed` gives another order, other words, other things left unsaid."""
    dice = Dice("caption", scene.seed, seed)
    mentions: set[str] = set()

    def say(name: str, words: dict, value: object, leave_out: float = 0.0) -> str:
        if value not in words or dice.chance(leave_out):
            return ""
        mentions.add(name)
        return dice.choice(words[value])

    def thing(o: Object) -> str:
        mentions.add(o.kind)
        size = say(f"{o.kind}.size", SIZE_WORDS, o.size, 0.2)
        colour = o.colour or ""
        if colour:
            mentions.add(f"{o.kind}.colour")
        noun = " ".join(w for w in (size, colour, dice.choice(KIND_WORDS[o.kind])) if w)
        place = say(f"{o.kind}.place", PLACE_WORDS, o.place, 0.12)
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun} {place}".strip()

    things = [thing(o) for o in dice.shuffled(scene.objects)]
    if len(things) == 2 and dice.chance(0.5):
        things = [" and ".join(things)]
    birds = say("birds", BIRD_WORDS, scene.birds)
    backdrop = say("backdrop", BACKDROP_WORDS, scene.backdrop, 0.06)
    ground = say("ground", GROUND_WORDS, scene.ground, 0.04)
    time = say("time", TIME_WORDS, scene.time, 0.05)
    weather = say("weather", WEATHER_WORDS, scene.weather, 0.75 if scene.weather == "clear" else 0.03)
    style = say("style", STYLE_WORDS, scene.style, 0.7 if scene.style == "plain" else 0.0)

    parts = [p for p in dice.shuffled([backdrop, ground]) if p]
    parts = things + parts if dice.chance(0.75) else parts + things
    if birds:
        parts.insert(dice.integer(0, len(parts)), birds)
    if not parts:
        parts = ["a landscape"]
    tail = " ".join(p for p in dice.shuffled([time, weather]) if p)
    text = ", ".join(parts) + (f" {tail}" if tail and dice.chance(0.6) else f", {tail}" if tail else "")
    if style:
        after = dice.chance(0.25)
        text = f"{text}, {style.removesuffix(' of').removesuffix(' showing')}" if after else f"{style} {text}"
    return Caption(text, frozenset(mentions))


def caption(scene: Scene, seed: int = 0) -> str:
    """The text of `caption_with_mentions(scene, seed)`."""
    return caption_with_mentions(scene, seed).text


def known_words() -> list[str]:
    """Every word that training captions hold, sorted; what a model trained on them can be expected to understand."""
    tables = (KIND_WORDS, SIZE_WORDS, PLACE_WORDS, BACKDROP_WORDS, GROUND_WORDS, TIME_WORDS, WEATHER_WORDS, BIRD_WORDS)
    rows = [row for table in (*tables, STYLE_WORDS) for row in table.items()]
    phrases = [p for name, words in rows if name not in (HELD_OUT_KIND, HELD_OUT_STYLE) for p in words]
    phrases += [*COLOURS, "a an and landscape"]
    return sorted({word for phrase in phrases for word in re.findall(r"[a-z]+", phrase)})
