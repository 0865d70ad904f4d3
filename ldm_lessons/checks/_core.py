"""How an exercise marks itself. A lesson's module only declares, for each exercise:

    to_pixels = Exercise(
        name="From decoder to screen",
        oracle=lambda x: ((x + 1) / 2).clamp(0, 1),           # the right answer, written independently of the package
        probes=lambda g: [(torch.randn(2, 3, 8, 8, generator=g),)],  # argument tuples, drawn from a seeded generator
        wrong_answers=(
            Wrong(lambda x: (x + 1) / 2, "You did not clamp: ..."),  # a typical mistake, and what to say about it
        ),
    )

The variable's name is the exercise's id; the notebook marks its cells with it (metadata `exercise: to_pixels`, tags
`exercise-task`, `exercise-stub`, `exercise-check`, `exercise-help`), and tests/test_checks.py does the rest.

An answer is a function (it is called on every probe) or, when `probes` is None, a plain value (it is compared with what
`oracle()` returns). A check never raises for what a learner has written:

    untouched   a stub that returns `...`, has an empty body, raises NotImplementedError, or still holds a `...`
    passed      equal to the oracle on every probe, its arguments left as they were, and every rule kept
    failed      a wrong answer that is recognised by name, an exception shown by the learner's own line, or a comparison
"""

import ast
import inspect
import linecache
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._compare import Difference, compare
from ._result import FAILED, NOT_ATTEMPTED, PASSED, Result

_HERE = str(Path(__file__).parent)
_AMBIENT_SEED = 20_211_220  # of PyTorch's global generator during a call; not one that an exercise would hand out
_IN_PLACE = (
    "The values are right, but your function changes one of its arguments in place (`+=`, `x[...] = ...` or a method "
    "such as `clamp_` do that). Make a new tensor instead: the caller may still need the old one."
)


@dataclass(frozen=True)
class Wrong:
    """A typical wrong answer (a function, or a value where the exercise asks for one) and the sentence it deserves."""

    answer: Any
    message: str


@dataclass(frozen=True)
class Rule:
    """Something the values alone do not show: when `broken(answer)` is true, `message` is said."""

    broken: Callable[[Any], bool]
    message: str


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: BaseException | None = None
    spoilt: bool = False  # the call changed one of its arguments

    def differs(self, other: "_Outcome", rtol: float, atol: float) -> bool:
        if self.error or other.error:
            return repr(self.error) != repr(other.error)
        return bool(compare(self.value, other.value, rtol, atol))


@dataclass(frozen=True)
class Exercise:
    """One exercise's marking; call it on the learner's answer to get a `Result`.

    `call(answer, *probe)` says how an answer is used on a probe, for answers that are not plain functions (a class to
    be built, a module to be run). `good` is said on success. `rtol`, `atol` are the tolerances of every comparison.
    """

    name: str
    oracle: Callable[..., Any]
    probes: Callable[[torch.Generator], Iterable[tuple]] | None = None
    wrong_answers: Sequence[Wrong] = ()
    rules: Sequence[Rule] = ()
    call: Callable[..., Any] = lambda answer, *probe: answer(*probe)
    good: str = ""
    rtol: float = 1e-4
    atol: float = 1e-5
    seed: int = 0

    def __call__(self, answer: Any) -> Result:
        if _unfilled(answer):
            return self._result(NOT_ATTEMPTED, "Replace the `...` in the cell above, run it, then run this one again.")
        if self.probes is not None and not callable(answer):
            return self._result(FAILED, f"Pass your function itself, without calling it; this is {_kind(answer)}.")
        wanted = self._outcomes(self.oracle)
        mine = self._outcomes(answer)
        for outcome in mine:
            if isinstance(outcome.error, NotImplementedError) or _unfilled(outcome.value):
                return self._result(NOT_ATTEMPTED, "Replace the `...` in the cell above, run it, and come back here.")
        if all(outcome.value is None and outcome.error is None for outcome in mine) and wanted[0].value is not None:
            if _is_blank(answer):
                return self._result(NOT_ATTEMPTED, "The function's body is still empty.")
            return self._result(FAILED, "Your function returns nothing. Does it end with `return`?")

        if self._differ(mine, wanted):
            return self._explain(answer, mine, wanted)
        if any(a.spoilt and not b.spoilt for a, b in zip(mine, wanted, strict=True)):
            return self._result(FAILED, _IN_PLACE)
        for rule in self.rules:
            with torch.random.fork_rng(devices=[]):
                if rule.broken(answer):
                    return self._result(FAILED, rule.message)
        return self._result(PASSED, self.good)

    def _explain(self, answer: Any, mine: list[_Outcome], wanted: list[_Outcome]) -> Result:
        """The best sentence for an answer that is not right: a known mistake, else its exception, else a comparison."""
        if any(outcome.error for outcome in mine) and (line := _placeholder(answer)):
            return self._result(NOT_ATTEMPTED, f"There is still a `...` to replace, in `{line}`")
        for wrong in self.wrong_answers:
            if not self._differ(mine, self._outcomes(wrong.answer)):
                return self._result(FAILED, wrong.message)
        for outcome in mine:
            if outcome.error is not None:
                return self._result(FAILED, *_blame(outcome.error, answer))
        pairs = [compare(a.value, b.value, self.rtol, self.atol) for a, b in zip(mine, wanted, strict=True)]
        at = next(i for i, found in enumerate(pairs) if found)
        probe = list(self.probes(torch.Generator().manual_seed(self.seed)))[at] if self.probes else ()
        given = [f"this was for        {', '.join(map(_kind, probe))}"] if probe else []
        return self._result(FAILED, *pairs[at], *given)

    def _differ(self, ours: list[_Outcome], theirs: list[_Outcome]) -> bool:
        return any(a.differs(b, self.rtol, self.atol) for a, b in zip(ours, theirs, strict=True))

    def _outcomes(self, answer: Any) -> list[_Outcome]:
        """What `answer` gives on every probe; probes and random state are made afresh, the same for every answer."""
        if self.probes is None:
            value = answer() if answer is self.oracle else answer
            return [_Outcome(value)]
        outcomes = []
        clean = list(self.probes(torch.Generator().manual_seed(self.seed)))
        for probe, untouched in zip(self.probes(torch.Generator().manual_seed(self.seed)), clean, strict=True):
            with torch.random.fork_rng(devices=[]):  # a learner's own random numbers repeat, and the notebook's go on
                torch.manual_seed(_AMBIENT_SEED)
                try:
                    value, error = self.call(answer, *probe), None
                except Exception as caught:  # noqa: BLE001 - whatever it is, the learner gets a sentence
                    value, error = None, caught
            outcomes.append(_Outcome(value, error, spoilt=_changed(probe, untouched)))
        return outcomes

    def _result(self, status: str, message: str, *details: str) -> Result:
        return Result(self.name, status, message, details)


def _unfilled(value: Any) -> bool:
    """True for `...`, and for a tuple, list or dict with a `...` in it."""
    if isinstance(value, tuple | list):
        return any(_unfilled(v) for v in value)
    if isinstance(value, dict):
        return any(_unfilled(v) for v in value.values())
    return value is ... or value is NotImplemented


def _changed(probe: tuple, untouched: tuple) -> bool:
    known = torch.Tensor | list | dict
    return any(isinstance(b, known) and bool(compare(a, b, 0.0, 0.0)) for a, b in zip(probe, untouched, strict=True))


def _tree(answer: Any) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(answer)))
    except (OSError, TypeError, SyntaxError):
        return None


def _is_blank(answer: Any) -> bool:
    """True when a function's body is only a docstring, `...`, `pass` or an empty `return`."""
    tree = _tree(answer)
    if tree is None or not isinstance(tree.body[0], ast.FunctionDef):
        return False
    return all(
        isinstance(node, ast.Pass)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Return) and (node.value is None or isinstance(node.value, ast.Constant)))
        for node in tree.body[0].body
    )


def _placeholder(answer: Any) -> str | None:
    """The first line of the answer's source with a `...` that stands for something (not the one in `x[..., None]`)."""
    tree = _tree(answer)
    if tree is None:
        return None
    subscripts = {id(n) for s in ast.walk(tree) if isinstance(s, ast.Subscript) for n in ast.walk(s.slice)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value is ... and id(node) not in subscripts:
            return textwrap.dedent(inspect.getsource(answer)).splitlines()[node.lineno - 1].strip()
    return None


def _blame(error: BaseException, answer: Any) -> Difference:
    """An exception as a sentence with the line of the learner's own code that raised it, without our stack."""
    what = f"`{type(error).__name__}: {' '.join(str(error).split())}`" if str(error) else f"`{type(error).__name__}`"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_HERE)]
    own = _file(answer)
    mine = [f for f in frames if f.filename == own] or [f for f in frames if "site-packages" not in f.filename]
    if not mine:
        return (f"Your function could not be called: {what}",)
    line = (mine[-1].line or linecache.getline(mine[-1].filename, mine[-1].lineno or 0)).strip()
    return (f"Your code stopped with {what}" + (", at this line:" if line else "."), *([f"    {line}"] if line else []))


def _file(answer: Any) -> str | None:
    try:
        return inspect.getfile(answer if inspect.isclass(answer) else inspect.unwrap(answer))
    except (TypeError, ValueError):
        return None


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"`{value!r}`"[:80]
