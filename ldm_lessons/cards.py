"""`data/README.md`, written from what the recipes and the judge recorded: no number in it is typed.

python -m ldm_lessons.cards          writes it
python -m ldm_lessons.cards strip    draws docs/strip.png, for the README
python -m ldm_lessons.cards sheet    draws data/pocket/sheet.webp: 64 new prompts, four seeds each
"""

import json
import sys
import textwrap
from pathlib import Path

from ldm_lessons import scenes
from ldm_lessons.machine import data_dir
from ldm_lessons.metrics import write_json
from ldm_lessons.scenes import world

WHAT = {
    "judge": ("`judge/`", "a classifier of scenes, one head an attribute, trained on drawn scenes alone"),
    "text": ("`pocket/text_encoder/`, `pocket/tokenizer/`", "tokenizer and text tower, taught by the judge's layers"),
    "clip": ("`clip/`", "the picture tower of a small CLIP, trained to meet that text tower"),
    "vae": ("`pocket/vae/`", "f = 8, four latent channels: (3, 128, 128) pictures to (4, 16, 16) latents"),
    "unet": ("`pocket/unet/`", "the denoiser of latents, v-prediction, 10 % of the captions left out"),
    "inpaint": ("`inpaint/`", "what an inpainting U-Net of nine channels has otherwise than the pocket model's"),
    "controlnet": (
        "`controlnet/`",
        "steers the pocket model by a painted map; what the U-Net has is not kept twice",
    ),
    "vae-f4": ("`small/vae-f4/`", "f = 4, for 64 × 64 pictures (lessons 04 and 05)"),
    "vae-f8": ("`small/vae-f8/`", "f = 8, for 64 × 64 pictures"),
    "vae-f16": ("`small/vae-f16/`", "f = 16, for 64 × 64 pictures"),
    "pixels": ("`small/pixels/`", "a denoiser of 32 × 32 pictures, with samples along its way (lesson 02)"),
}
LIMITS = """The models know this one world and its words. Combinations that were kept out of training are obeyed far
less often than others; small things (stars, rain, windows) come out soft. What the judge misses on drawn pictures (the
last column) it cannot count in the model's either. Pictures other than 128 × 128 are outside what they were trained on.
The judge never saw a picture of the model's, but its layers helped to train text tower, VAE and U-Net: what it
overlooks they may have learnt to overlook. (The VAE's loss looked through an earlier judge, of the same kind.)"""


def record(name: str, facts: dict) -> None:
    """Add a training's facts to `data/cards.json` and write `data/README.md` anew."""
    path = data_dir() / "cards.json"
    write_json(path, _cards() | {name: facts})
    write_readme()


def write_readme() -> Path:
    """`data/README.md`: the data set's card and the models'."""
    parts = ["# What lies here", _scenes()]
    parts += [_model(name, facts) for name, facts in _cards().items() if name in WHAT]
    scores = data_dir() / "pocket" / "scores.json"
    if scores.exists():
        parts.append(_scores(json.loads(scores.read_text())))
    parts += ["## Limits", LIMITS, "## Licence", "Everything here was made by this repository's code: Apache-2.0."]
    target = data_dir() / "README.md"
    target.write_text("\n\n".join(parts) + "\n")
    return target


def _cards() -> dict:
    path = data_dir() / "cards.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _scenes() -> str:
    splits = "; ".join(f"{name} {seeds.start:,} to {seeds.stop - 1:,}" for name, seeds in scenes.SPLITS.items())
    kept = "; ".join(" + ".join(f"{k} {v}" for k, v in c.items()) for c in world.HELD_OUT_COMBINATIONS)
    return f"""## The scenes

`scenes/preview.parquet` holds the first 256 validation scenes: `image` (128 × 128), `text`, `mentions` (what the text
says), `seed`, `scene` (the attributes, JSON), `map` (a label index a pixel: {", ".join(scenes.LABELS)}). All others
are drawn when they are wanted: `ldm_lessons.data.scene_dataset("train", 10_000)`.

- times: {", ".join(world.TIMES)}; weather: {", ".join(world.WEATHERS)}; ground: {", ".join(world.GROUNDS)};
  backdrop: {", ".join(world.BACKDROPS)}; styles: {", ".join(world.STYLES)}
- up to two of {", ".join(world.KINDS)}, with a colour ({", ".join(world.COLOURS)}; trees are green), a place
  ({", ".join(world.PLACES)}) and a size ({", ".join(world.SIZES)}); up to three birds
- splits, by seed: {splits}
- held out of all training: the kind {world.HELD_OUT_KIND}, the style {world.HELD_OUT_STYLE}, and these combinations:
  {kept}"""


def _model(name: str, facts: dict) -> str:
    where, what = WHAT[name]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    checked = "; ".join(f"{k}: {_short(v)}" for k, v in facts.get("validation", {}).items())
    rows = [
        f"## {name}: {what}",
        f"In {where}; {facts['parameters']:,} parameters, in half precision.",
        f"- made by `{facts['command']}`, seed {facts['plan']['seed']}",
        f"- {facts['plan']['steps']:,} steps of {facts['plan']['batch']}: {facts['samples']:,} samples of "
        f"{facts['plan']['rows']:,} scenes, in {facts['minutes']} minutes on {facts['hardware']}",
        f"- {versions}",
        f"- loss at the end of the run: {facts['curve'][-1]['loss']:.4f} (the curve is in `cards.json`)",
    ]
    rows += [f"- on validation scenes: {checked}"] * bool(checked)
    if facts.get("stages"):
        when = ", ".join(f"step {stage['step']:,} ({stage['minutes']} minutes)" for stage in facts["stages"])
        rows.append(f"- samples on the way, after {when}")
    return "\n".join([rows[0], "", rows[1], "", *rows[2:]])


def _short(value: object) -> str:
    if isinstance(value, dict):
        if "accuracy" in value:
            return f"{100 * value['accuracy']:.1f} % of {value['asked']:,}"
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    return str(value)


def _scores(found: dict) -> str:
    columns = {
        "prompts": "new prompts", "paraphrases": "in other words", "composition": "held-out combinations",
        "vae": "drawn, through the VAE", "drawn": "drawn",
    }  # fmt: skip
    columns = {key: title for key, title in columns.items() if key in found}
    table = [f"| asked for | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name in [*found["prompts"]["attributes"], "all right"]:
        cells = (found[c]["all_right"] if name == "all right" else found[c]["attributes"].get(name) for c in columns)
        table.append(f"| {name} | " + " | ".join(_short(c) if c else "" for c in cells) + " |")
    fid, near = found["fid"], found.get("nearest")
    parts = [
        "## pocket: what the judge says",
        f"`python -m ldm_lessons.metrics --count {found['count']}`: {found['steps']} steps of {found['sampler']}, "
        f"guidance {found['guidance_scale']}, {found['prompts']['seconds']} seconds a picture, in batches of 16.",
        "\n".join(table),
        f"Fréchet distance in the judge's features to {found['count']} other drawn scenes: {fid['made']} for the "
        f"model's pictures, {fid['vae']} for drawn ones through the VAE, {fid['drawn']} for drawn ones (the floor).",
    ]
    if near:
        parts.append(
            f"The nearest of {near['among']:,} training scenes, root mean square difference at 32 × 32 (black to white "
            f"is 1): the model's pictures median {near['made']['median']}, least {near['made']['least']}; new drawn "
            f"scenes median {near['drawn']['median']}, least {near['drawn']['least']}."
        )
    if "grid" in found:
        parts += [
            f"How sampler, steps and guidance change it, {found['grid'][0]['count']} prompts in each row "
            f"(`python -m ldm_lessons.metrics --grid {found['grid'][0]['count']}`):",
            "\n".join(["| sampler | steps | guidance | objects | all right | seconds |", "|---" * 6 + "|"] + [
                f"| {r['sampler']} | {r['steps']} | {r['guidance_scale']} | {100 * r['object']:.0f} % | "
                f"{100 * r['all_right']:.0f} % | {r['seconds']} |" for r in found["grid"]
            ]),
        ]  # fmt: skip
    return "\n\n".join(parts)


STRIP = (
    "a red house on the left, snowy mountains, a green meadow at sunset",
    "a yellow balloon in the middle, red cliffs, a beach by day",
    "a white boat on the right, a lake, green hills at dawn",
    "a watercolour of a lighthouse, a lake by day with clouds",
    "a castle in the middle, a meadow under a rainbow",
)


def write_strip(seed: int = 0) -> Path:
    """`docs/strip.png`: five sentences and the pocket model's first tries at them, with the seeds from `seed` on."""
    from ldm_lessons import generate, models, show

    show.use_style()
    made = generate.text_to_image(models.load("pocket"), list(STRIP), seed=seed)
    target = data_dir().parent / "docs" / "strip.png"
    target.parent.mkdir(exist_ok=True)
    show.image_row(made, list(STRIP)).savefig(target, dpi=110, bbox_inches="tight")
    return target


def write_sheet(prompts: int = 64, seeds: int = 4) -> Path:
    """`data/pocket/sheet.webp`: the first test prompts with several seeds each, unselected, each with its sentence."""
    from PIL import Image, ImageDraw, ImageFont

    from ldm_lessons import generate, models

    told = [scenes.caption(scenes.sample_scene(i, "test")) for i in range(prompts)]
    model, font = models.load("pocket"), ImageFont.load_default(13)
    side, text, columns = 96, 56, 4
    wide, high = seeds * side + 12, side + text
    sheet = Image.new("RGB", (columns * wide, -(-prompts // columns) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for i, sentence in enumerate(told):
        x, y = wide * (i % columns), high * (i // columns)
        for k, picture in enumerate(generate.text_to_image(model, [sentence] * seeds, seed=0, progress=False)):
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x + k * side, y))
        pen.multiline_text((x + 2, y + side + 3), textwrap.fill(sentence, 62), "black", font)
    target = data_dir() / "pocket" / "sheet.webp"
    sheet.save(target, quality=80, method=6)
    return target


if __name__ == "__main__":
    print({"strip": write_strip, "sheet": write_sheet}.get(" ".join(sys.argv[1:]), write_readme)())
