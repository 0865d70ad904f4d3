"""The exercises mark themselves rightly. Driven from the notebooks: an exercise is tested by being there.

In a notebook, four cells carry the exercise's id (metadata `exercise`, the name in `checks.lesson_NN`) and a tag each:
`exercise-task` (the task, its dots and minutes), `exercise-stub`, `exercise-check`, and `exercise-help` (the hint and
the solution, each in a `<details>`, the solution with one ```python block).
"""

import ast
import builtins
import html
import linecache
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
import torch

from ldm_lessons import checks
from ldm_lessons.checks._compare import compare
from ldm_lessons.checks._core import Exercise, Rule, Wrong
from ldm_lessons.checks._result import FAILED, NOT_ATTEMPTED, PASSED, Result

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PARTS = ("exercise-task", "exercise-stub", "exercise-check", "exercise-help")


@dataclass
class Found:
    """An exercise as it stands in a notebook."""

    notebook: str
    name: str
    cells: dict[str, str]  # tag -> source
    order: list[str]  # tags in the order of the cells
    imports: str  # the notebook's import statements

    @property
    def exercise(self) -> Exercise:
        return getattr(getattr(checks, f"lesson_{self.notebook[:2]}"), self.name)

    @property
    def solution(self) -> str:
        blocks = [d for d in details(self.cells["exercise-help"]) if re.match(r"\s*solution", d[0], re.IGNORECASE)]
        assert len(blocks) == 1, "exactly one <details> should be summed up as the solution"
        code = re.findall(r"```python\n(.*?)```", blocks[0][1], re.DOTALL)
        assert len(code) == 1, "the folded solution should hold one ```python block"
        return code[0]


def details(markdown: str) -> list[tuple[str, str]]:
    """(summary, body) of every `<details>` block."""
    found = re.findall(r"<details>\s*<summary>(.*?)</summary>(.*?)</details>", markdown, re.DOTALL)
    return [(re.sub(r"<.*?>", "", html.unescape(s)), b) for s, b in found]


def exercises() -> list[Found]:
    every = {}
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        imports = "\n".join(
            ast.unparse(node)
            for cell in cells
            if cell.cell_type == "code" and "bootstrap" not in cell.metadata.get("tags", [])
            for node in ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", cell.source)).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        )
        for cell in cells:
            for tag in set(cell.metadata.get("tags", [])) & set(PARTS):
                name = cell.metadata["exercise"]
                it = every.setdefault((path.stem, name), Found(path.stem, name, {}, [], imports))
                it.cells[tag] = cell.source
                it.order.append(tag)
    return list(every.values())


EXERCISES = exercises()
each_exercise = pytest.mark.parametrize("found", EXERCISES, ids=[f"{e.notebook}-{e.name}" for e in EXERCISES])


def run_cells(found: Found, *sources: str) -> Result:
    """Runs the cells as a kernel would, with the notebook's imports before them; the last expression's value."""
    names: dict = {"__builtins__": builtins}
    used = {n.id for s in sources for n in ast.walk(ast.parse(s)) if isinstance(n, ast.Name)}
    for node in ast.parse(found.imports).body:
        node.names = [a for a in node.names if (a.asname or a.name).split(".")[0] in used]
        if node.names:  # only what these cells need: a lesson may import all of diffusers
            exec(ast.unparse(node), names)
    value = None
    for i, source in enumerate(sources):
        name = f"<cell {found.notebook} {found.name} {i}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        body = ast.parse(source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    return value


# ---- every exercise of every notebook


def test_the_first_lesson_has_exercises():
    assert any(e.notebook.startswith("00") for e in EXERCISES)


@each_exercise
def test_exercise_is_laid_out_as_promised(found):
    assert found.order == list(PARTS), "task, stub, check, help: once each, in this order"
    task, help_ = found.cells["exercise-task"], found.cells["exercise-help"]
    assert re.search(r"(●○○|●●○|●●●)", task), "difficulty: one to three dots"
    assert re.search(r"\b\d+ minutes?\b", task), "the minutes it takes"
    assert f"checks.lesson_{found.notebook[:2]}.{found.name}(" in found.cells["exercise-check"]
    summaries = [s.strip().lower() for s, _ in details(help_)]
    assert len(summaries) == 2 and summaries[0].startswith("hint") and summaries[1].startswith("solution")
    for body in re.findall(r"</summary>(.*?)</details>", help_, re.DOTALL):
        assert body.startswith("\n\n") and body.endswith("\n\n"), "a <details> needs blank lines around its contents"


@each_exercise
def test_folded_solution_passes(found):
    assert run_cells(found, found.solution, found.cells["exercise-check"]).status == PASSED


@each_exercise
def test_untouched_stub_is_not_attempted(found):
    assert run_cells(found, found.cells["exercise-stub"], found.cells["exercise-check"]).status == NOT_ATTEMPTED


@each_exercise
def test_typical_wrong_answers_fail_with_their_own_message(found):
    wrong_answers = found.exercise.wrong_answers
    assert len(wrong_answers) >= 3
    results = [found.exercise(wrong.answer) for wrong in wrong_answers]
    for wrong, result in zip(wrong_answers, results, strict=True):
        assert (result.status, result.message) == (FAILED, wrong.message)
    assert len({r.message for r in results}) == len(results), "every wrong answer deserves its own sentence"


@each_exercise
def test_solution_has_the_stubs_names_and_arguments(found):
    def signatures(source: str) -> list[str]:
        kinds = ast.FunctionDef | ast.ClassDef
        return [
            f"{n.name}({ast.unparse(n.args) if isinstance(n, ast.FunctionDef) else ''})"
            for n in ast.parse(source).body
            if isinstance(n, kinds)
        ]

    assert signatures(found.solution) == signatures(found.cells["exercise-stub"])


# ---- the machinery, on an exercise of its own

halve = Exercise(
    name="Halve it",
    oracle=lambda x: x / 2,
    probes=lambda g: [(torch.randn(3, 4, generator=g),) for _ in range(2)],
    wrong_answers=(Wrong(lambda x: x * 2, "You doubled."), Wrong(lambda x: x.nonsense, "You wrote nonsense.")),
    good="Half of it.",
)


def make(source: str, name: str = "f"):
    """A function from source text, whose lines can be looked up as those of a notebook cell can."""
    file = f"<learner {abs(hash(source))}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = {"torch": torch}
    exec(compile(source, file, "exec"), names)
    return names[name]


def test_a_right_answer_passes():
    result = halve(lambda x: 0.5 * x)
    assert result.passed and result.message == "Half of it."


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n    ...",
        "def f(x):\n    pass",
        'def f(x):\n    """Halves x."""',
        "def f(x):\n    return ...",
        "def f(x):\n    return None",
        "def f(x):\n    raise NotImplementedError",
        "def f(x):\n    raise NotImplementedError('your turn')",
        "def f(x):\n    half = ...  # your line\n    return half",
        "def f(x):\n    half = ...  # your line\n    return half * x",
        "def f(x):\n    return (..., 3)",
    ],
)
def test_stubs_are_not_attempted(source):
    assert halve(make(source)).status == NOT_ATTEMPTED


@pytest.mark.parametrize("value", [..., (1, ...), {"a": ...}])
def test_unfilled_values_are_not_attempted(value):
    assert Exercise(name="A value", oracle=lambda: 48)(value).status == NOT_ATTEMPTED


def test_a_value_can_be_the_answer():
    ratio = Exercise(name="Times", oracle=lambda: 48, wrong_answers=(Wrong(64, "You counted positions."),))
    assert ratio(48).passed and ratio(48.0).passed and ratio(torch.tensor(48)).passed
    assert ratio(64).message == "You counted positions."
    assert ratio(47).message == "Your answer is 47, and 48 is wanted."
    assert ratio("48").status == FAILED


def test_a_forgotten_return_is_named():
    result = halve(make("def f(x):\n    y = x / 2"))
    assert result.status == FAILED and "return" in result.message


def test_a_known_wrong_answer_is_named_even_when_it_raises():
    assert halve(lambda x: 2 * x).message == "You doubled."
    assert halve(lambda x: x.nonsense).message == "You wrote nonsense."


def test_an_exception_shows_the_learners_line_and_not_our_stack():
    result = halve(make("def f(x):\n    y = x + 1\n    return y @ torch.ones(7, 7)"))
    assert result.status == FAILED
    assert "RuntimeError" in result.message and result.details == ("    return y @ torch.ones(7, 7)",)
    assert "_core" not in repr(result) and "Traceback" not in repr(result)


def test_an_ellipsis_in_a_subscript_is_code():
    result = halve(make("def f(x):\n    return x[..., 99]"))
    assert result.status == FAILED and "IndexError" in result.message


def test_a_wrong_signature_is_one_sentence():
    result = halve(make("def f():\n    return 1"))
    assert result.status == FAILED and "could not be called" in result.message


def test_passing_a_result_in_place_of_the_function_is_explained():
    assert "without calling it" in halve(torch.zeros(3)).message


def test_a_changed_argument_is_noticed():
    result = halve(lambda x: x.div_(2))
    assert result.status == FAILED and "in place" in result.message
    assert halve(lambda x: x.mul_(2)).message == "You doubled."


def test_rules_see_what_values_do_not():
    strict = Exercise(
        name="Quietly",
        oracle=lambda x: x / 2,
        probes=halve.probes,
        rules=(Rule(lambda f: "loud" in f.__name__, "Not so loud."),),
    )

    def loud(x):
        return x / 2

    assert strict(loud).message == "Not so loud." and strict(lambda x: x / 2).passed


def test_random_answers_repeat_and_the_notebooks_numbers_go_on():
    noise = Exercise(
        name="Noise", oracle=lambda n: torch.randn(n), probes=lambda g: [(4,), (5,)]
    )  # both draw from the global generator
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    assert noise(lambda n: torch.randn(n)).passed
    assert torch.equal(torch.randn(3), expected)
    shown = set()
    for seed in (1, 2):  # what is shown does not depend on what the notebook drew before
        torch.manual_seed(seed)
        shown.add(noise(lambda n: torch.randn(n) ** 2))
    assert len(shown) == 1


def test_other_ways_to_call_an_answer():
    module = Exercise(
        name="A module",
        oracle=lambda: torch.nn.Identity(),
        probes=lambda g: [(torch.randn(2, generator=g),)],
        call=lambda cls, x: cls()(x),
    )
    assert module(torch.nn.Identity).passed and module(torch.nn.ReLU).status == FAILED


X = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("got", "want", "expected"),
    [
        (X, X.clone(), None),
        (X + 1e-7, X, None),
        (X.numpy(), X.numpy(), None),
        ((X, 3), (X, 3), None),
        ({"a": "b"}, {"a": "b"}, None),
        (3, 3.0, None),
        (X.T, X, "wrong shape"),
        (X.double(), X, "dtype `float64`"),
        (X.numpy(), X, "torch tensor is wanted"),
        (2 * X, X, "times 2 everywhere"),
        (-X, X, "sign flipped"),
        (X + 0.5, X, "plus 0.5 everywhere"),
        (X.flip(0), X, "different order"),
        (X / 0 * 0, X, "nan"),
        (X**2, X, "some values are off"),
        (torch.tensor(1.0), torch.tensor(2.0), "its value is off"),
        ((X,), (X, X), "1 items"),
        ((X, 2 * X), (X, X), "Item 1 of your answer"),
        ({"b": 1}, {"a": 1}, "keys ['a']"),
        ({"a": 2}, {"a": 1}, "entry `a`"),
        ("cat", "dog", "`'dog'` is wanted"),
        (True, 1, "a number is wanted"),
        ([1, 2], 1, "a number is wanted"),
    ],
)
def test_comparisons_say_what_differs(got, want, expected):
    found = compare(got, want)
    assert found == () if expected is None else expected in found[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_comparing_with_what_is_not_finite_warns_nobody(odd):
    assert compare(X, torch.full_like(X, odd)) and compare(torch.full_like(X, odd), X)
    assert compare(torch.full_like(X, odd), torch.full_like(X, odd)) == ()


def test_the_first_differing_value_is_shown():
    got = X.clone()
    got[1, 2] = 9
    assert compare(got, X)[-1] == "first one off at [1, 2]: wanted 5, yours 9"


@pytest.mark.parametrize("status", [NOT_ATTEMPTED, PASSED, FAILED])
def test_results_show_as_text_and_as_html_for_any_theme(status):
    result = Result("To <pixels>", status, "Use `x < 1` & go on.", ("a < b",))
    assert "To <pixels>" in repr(result) and "a < b" in repr(result)
    shown = result._repr_html_()
    assert "To &lt;pixels&gt;" in shown and "x &lt; 1</code> &amp; go on." in shown and "a &lt; b" in shown
    # the page's own text colour on a translucent wash reads on dark and on light; a fixed text colour would not
    assert "color:inherit" in shown and not re.search(r"(?<![-\w])color:#", shown)
    assert all(0 < float(alpha) <= 0.2 for alpha in re.findall(r"background:rgba\(.*?,([\d.]+)\)", shown))


def test_lessons_are_found_by_name():
    assert checks.lesson_00.to_pixels.name
    with pytest.raises(AttributeError, match="no lesson_99"):
        _ = checks.lesson_99
    with pytest.raises(AttributeError):
        _ = checks.nothing
