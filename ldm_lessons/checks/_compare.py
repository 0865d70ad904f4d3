"""Comparing a learner's answer with the right one, and saying in words how the two differ."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Difference = tuple[str, ...]  # the sentence first, then lines of detail; empty when there is no difference


def compare(got: Any, want: Any, rtol: float = 1e-4, atol: float = 1e-5, where: str = "your answer") -> Difference:
    """How `got` differs from `want`, as a sentence and lines of detail; `()` when they agree.

    Tensors, arrays, numbers, strings, and (nested) tuples, lists and dicts of them are understood.
    """
    if isinstance(want, torch.Tensor | np.ndarray):
        return _arrays(got, want, rtol, atol, where)
    if isinstance(want, bool | str) or want is None:
        same = type(got) is type(want) and got == want
        return () if same else (f"{_start(where)} is {_short(got)}, and {_short(want)} is wanted.",)
    if isinstance(want, int | float | np.number):
        return _numbers(got, want, rtol, atol, where)
    if isinstance(want, Mapping):
        return _mappings(got, want, rtol, atol, where)
    if isinstance(want, tuple | list):
        return _sequences(got, want, rtol, atol, where)
    return () if got == want else (f"{_start(where)} is {_short(got)}, and {_short(want)} is wanted.",)


def _arrays(got: Any, want: Any, rtol: float, atol: float, where: str) -> Difference:
    kind = "torch tensor" if isinstance(want, torch.Tensor) else "NumPy array"
    if not isinstance(got, type(want)):
        return (f"{_start(where)} is of type `{type(got).__name__}`, and a {kind} is wanted.",)
    if tuple(got.shape) != tuple(want.shape):
        return (
            f"{_start(where)} has the wrong shape.",
            f"shape wanted  {tuple(want.shape)}",
            f"yours         {tuple(got.shape)}",
        )
    if got.dtype != want.dtype:
        return (f"{_start(where)} has dtype `{_dtype(got)}`, and `{_dtype(want)}` is wanted.",)
    a, b = _float64(got), _float64(want)
    wrong = ~np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return ()
    if np.isnan(a).any() and not np.isnan(b).any():
        return (f"{_start(where)} holds {int(np.isnan(a).sum())} values that are not a number (nan).",)
    finite = np.isfinite(a) & np.isfinite(b)
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    spot = f" at {list(at)}" if at else ""
    return (
        f"{_start(where)} has the right shape, but {'its value is' if a.size == 1 else 'some values are'} off. "
        + _pattern(a, b, atol),
        f"values off         {int(wrong.sum())} of {wrong.size}",
        f"largest difference {np.abs(a[finite] - b[finite]).max(initial=0.0):.4g}",
        f"first one off{spot}: wanted {b[at]:.6g}, yours {a[at]:.6g}",
    )


def _pattern(got: np.ndarray, want: np.ndarray, atol: float) -> str:
    """A sentence for answers that are the right one scaled, shifted or sorted differently; else an empty string."""
    if got.size < 2 or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return ""
    scale = float((got * want).sum() / max((want * want).sum(), 1e-30))
    if np.allclose(got, scale * want, rtol=1e-3, atol=atol) and abs(scale) > 1e-6:
        flipped = abs(scale + 1) < 1e-3
        return f"It is the right answer {'with its sign flipped' if flipped else f'times {scale:.4g} everywhere'}."
    shift = float((got - want).mean())
    if np.allclose(got, want + shift, rtol=1e-3, atol=atol):
        return f"It is the right answer plus {shift:.4g} everywhere."
    if np.allclose(np.sort(got.ravel()), np.sort(want.ravel()), rtol=1e-4, atol=atol):
        return "The right values are there, but in a different order."
    return ""


def _numbers(got: Any, want: Any, rtol: float, atol: float, where: str) -> Difference:
    if isinstance(got, torch.Tensor | np.ndarray) and np.prod(got.shape) == 1:
        got = got.item()  # a tensor of one element will do for a number
    if isinstance(got, bool) or not isinstance(got, int | float | np.number):
        return (f"{_start(where)} is {_short(got)}, and a number is wanted.",)
    if abs(float(got) - float(want)) <= atol + rtol * abs(float(want)):
        return ()
    return (f"{_start(where)} is {got:.6g}, and {want:.6g} is wanted.",)


def _mappings(got: Any, want: Mapping, rtol: float, atol: float, where: str) -> Difference:
    if not isinstance(got, Mapping) or set(got) != set(want):
        have = sorted(map(str, got)) if isinstance(got, Mapping) else _short(got)
        return (f"{_start(where)} should be a dict with the keys {sorted(map(str, want))}; yours: {have}.",)
    for key in want:
        if found := compare(got[key], want[key], rtol, atol, f"the entry `{key}` of {where}"):
            return found
    return ()


def _sequences(got: Any, want: tuple | list, rtol: float, atol: float, where: str) -> Difference:
    if not isinstance(got, tuple | list):
        return (f"{_start(where)} should be {len(want)} things in a {type(want).__name__}; yours is {_short(got)}.",)
    if len(got) != len(want):
        return (f"{_start(where)} has {len(got)} items, and {len(want)} are wanted.",)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if found := compare(a, b, rtol, atol, f"item {i} of {where}"):
            return found
    return ()


def _float64(x: Any) -> np.ndarray:
    return (x.detach().cpu().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)).astype(np.float64)


def _dtype(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _start(where: str) -> str:
    return where[0].upper() + where[1:]


def _short(x: Any) -> str:
    if isinstance(x, torch.Tensor | np.ndarray):
        return f"a {type(x).__name__} of shape {tuple(x.shape)}"
    text = repr(x)
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"
