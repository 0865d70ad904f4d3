"""Widgets for the notebooks (ipywidgets 7.7 and later, so that they work on Colab as they do in JupyterLab).

Their parts carry CSS classes, by which the browser test finds them: `prompt-box`, `seed-slider`, `make-picture`,
`picture`, `picture-slider`, `widget-message`.
"""

import html
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets

from . import show

_ECHO = 0.4  # seconds; leaving the text field by a click on the button reports both: the click is then an echo


class PromptBox(ipywidgets.HBox):
    """A sentence, a seed and a button at the left, the picture made from them at the right.

    `make(prompt, seed, on_step)` returns a picture (anything that `show.as_array` takes) and calls `on_step(step)`
    after each of its `steps` steps. The picture is made anew on Enter, when the slider is let go, and by the button;
    pressed with nothing changed, the button goes on to the next seed. Errors and warnings are shown as sentences.
    With a `canvas`, a `painter.Painter` that `make` reads, the picture is made anew after strokes on it, too.
    """

    def __init__(
        self,
        make: Callable[[str, int, Callable[[Any], None]], Any],
        prompt: str,
        seed: int,
        steps: int,
        max_seed: int = 99,
        scale: int = 2,
        canvas: ipywidgets.DOMWidget | None = None,
    ):
        wide = ipywidgets.Layout(width="98%")
        self.make, self.scale = make, scale
        self.text = ipywidgets.Text(prompt, placeholder="a sentence", continuous_update=False, layout=wide)
        self.seed = ipywidgets.IntSlider(
            seed, 0, max_seed, description="seed", continuous_update=False, layout=ipywidgets.Layout(width="98%")
        )
        self.button = ipywidgets.Button(description="Make a picture", button_style="primary")
        self.progress = ipywidgets.IntProgress(0, 0, steps, layout=ipywidgets.Layout(width="98%", height="12px"))
        self.message = ipywidgets.HTML()
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(min_width="128px"))
        for part, name in (
            (self.text, "prompt-box"),
            (self.seed, "seed-slider"),
            (self.button, "make-picture"),
            (self.picture, "picture"),
            (self.message, "widget-message"),
        ):
            part.add_class(name)
        parts = [self.text, self.seed, self.button, self.progress, self.message]
        left = ipywidgets.VBox(parts if canvas is None else [canvas, *parts], layout=ipywidgets.Layout(width="60%"))
        super().__init__([left, self.picture], layout=ipywidgets.Layout(align_items="flex-start"))
        self._made: tuple[str, int] | None = None  # what the picture on show was made from
        self._finished = 0.0
        self.text.observe(self._changed, "value")
        self.seed.observe(self._changed, "value")
        if canvas is not None:
            canvas.observe(self._changed, "data")
        self.button.on_click(self._clicked)
        self.refresh()

    def refresh(self) -> None:
        """Makes the picture of the present sentence and seed, and shows it or says in a sentence why there is none."""
        self.button.disabled = True
        self.progress.value, self.progress.bar_style = 0, ""
        self.message.value = ""
        self._made = (self.text.value, self.seed.value)
        try:
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", UserWarning)
                picture = self.make(self.text.value, self.seed.value, self._count)
            self.picture.value = show.png_bytes(picture, scale=self.scale)
            self.progress.value = self.progress.max
            said = dict.fromkeys(str(note.message) for note in notes if note.category is UserWarning)
            self.message.value = "<br>".join(map(html.escape, said))
        except Exception as error:  # noqa: BLE001 - a callback's traceback would vanish into the log
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            words = html.escape(f"{kind}{error}" or type(error).__name__)
            self.message.value = f'<span style="color:inherit"><b>No picture this time.</b> {words}</span>'
            self.progress.bar_style = "danger"
        finally:
            self.button.disabled = False
            self._finished = time.monotonic()

    def _count(self, _step: Any) -> None:
        self.progress.value = min(self.progress.value + 1, self.progress.max)

    def _changed(self, _change: dict) -> None:
        self.refresh()

    def _clicked(self, _button: ipywidgets.Button) -> None:
        if self._made != (self.text.value, self.seed.value):
            self.refresh()
        elif time.monotonic() - self._finished > _ECHO:
            self.seed.value = (self.seed.value + 1) % (self.seed.max + 1)  # which makes the picture


def prompt_box(
    model: Any,
    prompt: str = "a red house on the left, snowy mountains, a green meadow at sunset",
    seed: int = 0,
    num_inference_steps: int = 20,
    **settings: Any,
) -> PromptBox:
    """A box to type a sentence in, with a seed slider, that shows the picture `model` makes of it.

    `settings` (guidance_scale, sampler, negative_prompt, ...) go to `generate.text_to_image` as they are.
    """
    from . import generate

    def make(words: str, number: int, on_step: Callable[[Any], None]) -> Any:
        return generate.text_to_image(
            model,
            words,
            seed=number,
            num_inference_steps=num_inference_steps,
            progress=False,
            on_step=on_step,
            **settings,
        )[0]

    return PromptBox(make, prompt, seed, num_inference_steps)


class PictureSlider(ipywidgets.VBox):
    """A slider, a choice and the picture made from both, anew at every move.

    `make(value, choice)` returns anything that `show.as_array` takes; `value` goes from 0 to `largest`.
    """

    def __init__(
        self,
        make: Callable[[int, str], Any],
        largest: int,
        choices: Sequence[str],
        value: int = 0,
        label: str = "t",
        scale: int = 3,
    ):
        self.make, self.scale = make, scale
        wide = ipywidgets.Layout(width="420px")
        self.slider = ipywidgets.IntSlider(value, 0, largest, description=label, layout=wide)
        self.choice = ipywidgets.ToggleButtons(options=list(choices))
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="fit-content"))
        self.slider.add_class("picture-slider")
        self.picture.add_class("picture")
        super().__init__([self.choice, self.slider, self.picture])
        self.slider.observe(self._moved, "value")
        self.choice.observe(self._moved, "value")
        self._moved()

    def _moved(self, _change: dict | None = None) -> None:
        self.picture.value = show.png_bytes(self.make(self.slider.value, self.choice.value), scale=self.scale)


def noise_slider(picture: Any, schedules: Mapping[str, Any], t: int = 300, seed: int = 0) -> PictureSlider:
    """`picture`, float (3, H, W) in [-1, 1], with the noise of timestep t: a slider for t, a button for each schedule.

    `schedules` are `NoiseSchedule`s by name; the noise itself is always the same.
    """
    import torch

    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))

    def make(t: int, name: str) -> Any:
        return (schedules[name].add_noise(picture, noise, t) / 2 + 0.5).clamp(0, 1)

    largest = min(s.num_train_timesteps for s in schedules.values()) - 1
    return PictureSlider(make, largest, list(schedules), t)
