"""A canvas on which a map or a mask is painted by mouse, pen or finger (lessons 10 and 13).

In the page its parts carry the classes `painter-canvas`, `painter-label`, `painter-fill` and `painter-undo`.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from . import show


class Painter(anywidget.AnyWidget):
    """`value`, a square of labels, uint8 (side, side), changes with every stroke; observe it by its trait `data`.

    `labels` are colours by name, (r, g, b) or (r, g, b, a) of 255, in the order of the numbers in `value`; `offered`
    says which of them can be painted with (all of them otherwise), the first of these is taken up. `start` is the map
    to begin with. Through transparent colours a `background` is seen, anything that `show.as_array` takes. `brush` is
    the width of a stroke in cells of the map, `shown` the width of the canvas in pixels of the page. Raises ValueError
    for maps that are not square, and for numbers or names that are not in `labels`.
    """

    _esm = Path(__file__).with_suffix(".js")
    side = traitlets.Int().tag(sync=True)
    shown = traitlets.Int().tag(sync=True)
    brush = traitlets.Int().tag(sync=True)
    label = traitlets.Int().tag(sync=True)
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    colours = traitlets.List().tag(sync=True)
    offered = traitlets.List(traitlets.Int()).tag(sync=True)
    background = traitlets.Unicode().tag(sync=True)
    data = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, labels: Mapping[str, Sequence[int]], start: Any, background: Any = None,
        offered: Sequence[str] | None = None, brush: int = 4, shown: int = 288,
    ):  # fmt: skip
        start, names = np.asarray(start), list(labels)
        if start.ndim != 2 or start.shape[0] != start.shape[1]:
            raise ValueError(f"start has the shape {start.shape}: a painter needs a square of labels, (side, side).")
        if unknown := [name for name in offered or () if name not in labels]:
            raise ValueError(f"{unknown[0]!r} is offered but is none of the labels: {', '.join(names)}.")
        seen = [names.index(name) for name in (names if offered is None else offered)]
        super().__init__(
            side=len(start), shown=shown, brush=brush, label=seen[0], names=names, offered=seen,
            colours=[[*map(int, c), 255][:4] for c in labels.values()],
            background="" if background is None
            else "data:image/png;base64," + base64.b64encode(show.png_bytes(background)).decode(),
        )  # fmt: skip
        self.value = start

    @property
    def value(self) -> np.ndarray:
        """What is painted: uint8 (side, side), an entry of `labels` each."""
        return np.frombuffer(base64.b64decode(self.data), np.uint8).reshape(self.side, self.side).copy()

    @value.setter
    def value(self, new: Any) -> None:
        new = np.asarray(new)
        if new.shape != (self.side, self.side):
            raise ValueError(f"the map has the shape {new.shape}: this painter's has ({self.side}, {self.side}).")
        if new.min() < 0 or new.max() >= len(self.names):
            raise ValueError(f"the map has numbers up to {new.max()}: there are {len(self.names)} labels, from 0 on.")
        self.data = base64.b64encode(new.astype(np.uint8).tobytes()).decode()
