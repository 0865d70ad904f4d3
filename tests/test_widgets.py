"""The prompt box, without a browser: values are set and clicks are called as the front end would."""

import io
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lessons import schedules, show, widgets
from ldm_lessons.painter import Painter
from ldm_lessons.schedules import NoiseSchedule


def stand_in(prompt: str, seed: int, on_step) -> np.ndarray:
    """A picture that depends on the sentence and the seed, in four steps."""
    if not prompt.strip():
        raise ValueError("The prompt is empty: write a sentence.")
    for _ in range(4):
        on_step(None)
    return np.full((8, 8, 3), (len(prompt) % 256, seed % 256, 7), dtype=np.uint8)


@pytest.fixture
def box(monkeypatch):
    box = widgets.PromptBox(stand_in, "a red house", seed=3, steps=4)
    monkeypatch.setattr(widgets, "_ECHO", -1.0)
    return box


def colour(box) -> tuple[int, ...]:
    return Image.open(io.BytesIO(box.picture.value)).convert("RGB").getpixel((0, 0))


def test_there_is_a_picture_from_the_start(box):
    assert colour(box) == (11, 3, 7) and box.progress.value == box.progress.max == 4
    assert Image.open(io.BytesIO(box.picture.value)).size == (16, 16)


def test_a_new_sentence_or_seed_makes_a_new_picture(box):
    box.text.value = "a blue boat on a lake"
    assert colour(box) == (21, 3, 7)
    box.seed.value = 9
    assert colour(box) == (21, 9, 7)


def test_the_button_goes_on_to_the_next_seed(box):
    box.button.click()
    assert box.seed.value == 4 and colour(box) == (11, 4, 7)
    box.seed.value = box.seed.max
    box.button.click()
    assert box.seed.value == 0


def test_a_click_that_only_left_the_text_field_is_not_a_second_wish(box, monkeypatch):
    monkeypatch.setattr(widgets, "_ECHO", 60.0)
    box.text.value = "a tree"
    box.button.click()
    assert box.seed.value == 3 and colour(box) == (6, 3, 7)


def test_an_error_is_a_sentence_in_the_widget_and_goes_away(box):
    before = box.picture.value
    box.text.value = "  "
    assert "The prompt is empty" in box.message.value and box.picture.value == before
    assert not box.button.disabled and box.progress.bar_style == "danger"
    box.text.value = "a tree"
    assert box.message.value == "" and colour(box) == (6, 3, 7) and box.progress.bar_style == ""


def test_an_unexpected_error_names_its_kind_and_is_escaped():
    def broken(prompt, seed, on_step):
        raise RuntimeError("<no> picture")

    box = widgets.PromptBox(broken, "a", seed=0, steps=1)
    assert "RuntimeError: &lt;no&gt; picture" in box.message.value and not box.button.disabled


def test_a_warning_is_said_in_the_widget_and_the_picture_comes():
    def doubtful(prompt, seed, on_step):
        warnings.warn("the model never saw 'cat'.", stacklevel=1)
        return stand_in(prompt, seed, on_step)

    box = widgets.PromptBox(doubtful, "a cat", seed=0, steps=4)
    assert "never saw" in box.message.value and colour(box) == (5, 0, 7)


def test_parts_can_be_found_by_their_classes(box):
    classes = {c for part in (box.text, box.seed, box.button, box.picture, box.message) for c in part._dom_classes}
    assert classes == {"prompt-box", "seed-slider", "make-picture", "picture", "widget-message"}
    assert not box.text.continuous_update and not box.seed.continuous_update


def test_prompt_box_hands_its_settings_to_text_to_image(monkeypatch):
    calls = []

    def text_to_image(model, prompt, **settings):
        calls.append((model, prompt, settings))
        return [np.zeros((8, 8, 3), dtype=np.uint8)]

    fake = types.SimpleNamespace(text_to_image=text_to_image)
    monkeypatch.setitem(sys.modules, "ldm_lessons.generate", fake)
    monkeypatch.setattr("ldm_lessons.generate", fake, raising=False)
    box = widgets.prompt_box("model", "a tree", seed=2, num_inference_steps=5, guidance_scale=3.0)
    box.seed.value = 4
    assert [(m, p, s["seed"]) for m, p, s in calls] == [("model", "a tree", 2), ("model", "a tree", 4)]
    assert all(s["num_inference_steps"] == 5 and s["guidance_scale"] == 3.0 and not s["progress"] for *_, s in calls)


def test_a_noise_slider_shows_what_add_noise_gives():
    named = {"linear": NoiseSchedule(schedules.linear()), "cosine": NoiseSchedule(schedules.cosine())}
    picture = torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8)
    box = widgets.noise_slider(picture, named, t=0, seed=3)
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3))

    def expected(name: str, t: int) -> bytes:
        return show.png_bytes((named[name].add_noise(picture, noise, t) / 2 + 0.5).clamp(0, 1), scale=3)

    assert box.picture.value == expected("linear", 0)
    box.slider.value = 700
    assert box.picture.value == expected("linear", 700)
    box.choice.value = "cosine"
    assert box.picture.value == expected("cosine", 700)
    assert box.slider.max == 999


LABELS = {"sky": (0, 0, 255), "grass": (0, 255, 0), "clear": (0, 0, 0, 0)}


def test_a_painter_holds_a_map_and_says_what_does_not_fit():
    start = np.arange(16).reshape(4, 4) % 3
    painter = Painter(LABELS, start, background=np.zeros((4, 4, 3), np.uint8), offered=["grass"])
    assert (painter.value == start).all() and painter.value.dtype == np.uint8
    assert painter.colours == [[0, 0, 255, 255], [0, 255, 0, 255], [0, 0, 0, 0]]
    assert painter.offered == [1] and painter.label == 1 and painter.background.startswith("data:image/png;base64,")
    painter.value = start.T
    assert (painter.value == start.T).all()
    with pytest.raises(ValueError, match=r"shape \(2, 2\): this painter's has \(4, 4\)"):
        painter.value = np.zeros((2, 2))
    with pytest.raises(ValueError, match="numbers up to 3: there are 3 labels"):
        painter.value = np.full((4, 4), 3)
    assert (painter.value == start.T).all()
    with pytest.raises(ValueError, match="a square of labels"):
        Painter(LABELS, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="'sea' is offered but is none of the labels: sky, grass, clear"):
        Painter(LABELS, start, offered=["sea"])


def test_a_stroke_makes_a_new_picture(monkeypatch):
    monkeypatch.setattr(widgets, "_ECHO", -1.0)
    painter = Painter(LABELS, np.zeros((4, 4)))

    def make(prompt, seed, on_step):
        return np.full((8, 8, 3), painter.value.sum(), np.uint8)

    box = widgets.PromptBox(make, "a", seed=0, steps=1, canvas=painter)
    assert colour(box) == (0, 0, 0)
    painter.value = np.eye(4)  # as the page does after a stroke: `data` changes
    assert colour(box) == (4, 4, 4)
    box.button.click()
    assert box.seed.value == 1
