"""The repository's rules: who imports whom, how long a file may be, safe loading, one address."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ldm_lessons.notebooks import ROOT, package_definitions, repository

PACKAGE = ROOT / "ldm_lessons"
SIDE = 9  # any other module: it may use every floor, and no floor uses it
FLOORS = {
    **dict.fromkeys(("schedules", "layers", "scenes", "checkpoints"), 0),
    **dict.fromkeys(("samplers", "unet", "vae", "text", "clip"), 1),
    **dict.fromkeys(("guidance", "weights", "training", "pipeline", "controlnet"), 2),
    "generate": 3,
}
SIDE_LINES = 400
LINES = {  # of code: docstrings, comments and blank lines do not count
    **dict.fromkeys(("schedules", "layers", "vae", "text", "clip", "controlnet"), 130),
    "unet": 140,
    **dict.fromkeys(("guidance", "weights", "training", "checkpoints"), 150),
    **dict.fromkeys(("pipeline", "generate"), 180),
    "samplers": 300,
    "scenes": 400,
}
SLACK = 1.2
ONE_SITTING = 500  # lines of all kinds, in any file


def module_of(path: Path, package: Path = PACKAGE) -> str:
    """The module that a file belongs to: its name, or that of the folder that holds it."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def files(package: Path = PACKAGE) -> list[Path]:
    """The package's Python files, its own nearly empty __init__.py left out."""
    return [path for path in sorted(package.rglob("*.py")) if path != package / "__init__.py"]


def floor(module: str) -> int:
    """How high a module stands."""
    return FLOORS.get(module, SIDE)


def imported(path: Path, package: Path = PACKAGE) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ("ldm_lessons", *path.relative_to(package).parts)
                base = ".".join(filter(None, (*here[: -node.level], base)))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in found]
    return {part[1] for part in parts if part[0] == "ldm_lessons" and len(part) > 1} - {module_of(path, package)}


def climbing(package: Path = PACKAGE) -> list[str]:
    """Imports from a lower floor to a higher one."""
    return [
        f"{path.name} imports {other}"
        for path in files(package)
        for other in imported(path, package)
        if floor(other) > floor(module_of(path, package))
    ]


def circles(package: Path = PACKAGE) -> list[str]:
    """Modules that reach themselves through imports."""
    direct: dict[str, set[str]] = {}
    for path in files(package):
        direct.setdefault(module_of(path, package), set()).update(imported(path, package))
    reach = {name: set(others) for name, others in direct.items()}
    for _ in reach:
        reach = {name: others.union(*(direct.get(other, set()) for other in others)) for name, others in reach.items()}
    return sorted(name for name, others in reach.items() if name in others)


def code_lines(text: str) -> int:
    """Lines of code in a file, its docstrings, comments and blank lines left out."""
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            left_out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(number not in left_out and not re.match(r"\s*(#|$)", line) for number, line in lines)


def too_long(package: Path = PACKAGE) -> list[str]:
    """Files past their budget of code lines with its slack, or past one sitting altogether."""
    found = []
    for path in files(package):
        text, budget = path.read_text(encoding="utf-8"), LINES.get(module_of(path, package), SIDE_LINES)
        if code_lines(text) > SLACK * budget:
            found.append(f"{path.name} has {code_lines(text)} lines of code for {budget}")
        if len(text.splitlines()) > ONE_SITTING:
            found.append(f"{path.name} has {len(text.splitlines())} lines")
    return found


def unsafe(package: Path = PACKAGE) -> list[str]:
    """Ways to run code that comes with data: pickles in their several wrappings, and remote code."""
    found = []
    for path in files(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.keyword):
                names = [f"{node.arg}={ast.unparse(node.value)}"]
            banned = {"pickle", "dill", "joblib", "torch.load", "trust_remote_code=True", "allow_pickle=True"}
            banned |= {"weights_only=False", "use_safetensors=False"}
            found += [f"{path.name}:{getattr(node, 'lineno', '?')} {name}" for name in names if name in banned]
    return found


def undocumented(package: Path = PACKAGE) -> list[str]:
    """Public functions and classes without docstring, and public functions with a parameter that has no type."""
    found = []
    for path in files(package):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_") or node.name == "main":
                continue
            if not ast.get_docstring(node):
                found.append(f"{path.name}: {node.name} has no docstring")
            if isinstance(node, ast.FunctionDef):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if node.returns is None or any(parameter.annotation is None for parameter in parameters):
                    found.append(f"{path.name}: {node.name} lacks type hints")
    return found


def defined_twice(root: Path = ROOT) -> dict[str, list[str]]:
    """Public functions and classes that two places in the package define."""
    return {name: where for name, where in package_definitions(root, assigned=False).items() if len(where) > 1}


def test_imports_never_climb_a_floor():
    assert climbing() == []


def test_imports_have_no_circles():
    assert circles() == []


def test_files_can_be_read_in_one_sitting():
    assert too_long() == []


def test_nothing_is_loaded_that_can_run_code():
    assert unsafe() == []


def test_public_things_have_docstrings_and_types():
    assert undocumented() == []


def test_no_name_is_defined_twice_in_the_package():
    assert defined_twice() == {}


def test_the_package_itself_imports_nothing():
    assert imported(PACKAGE / "__init__.py") == set()
    assert len((PACKAGE / "__init__.py").read_text(encoding="utf-8").splitlines()) <= 12


def test_a_sampler_needs_torch_only():
    heavy = ("datasets", "matplotlib", "transformers", "diffusers")
    code = f"import sys, ldm_lessons.samplers; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


FILLER = "x = 1\n" * 160 + "#\n" * 340
BAD = {
    "schedules.py": "from ldm_lessons.generate import denoise\n",
    "scenes/palette.py": "from .. import show\n",
    "unet.py": "def f():\n    from .models import load\n",
    "guidance.py": "import ldm_lessons.data\n",
    "show.py": "from ldm_lessons import widgets\n",
    "widgets.py": "from . import show\n",
    "layers.py": "import torch\n\n\nclass Twice:\n    pass\n\n\ndef untyped(x):\n    '''Text.'''\n" + FILLER,
    "weights.py": "import pickle\nimport torch\nfrom torch import load\ntorch.load('x')\nf(trust_remote_code=True)\n",
    "text.py": "class Twice:\n    '''Text.'''\n",
}


def test_each_rule_sees_what_breaks_it(tmp_path):
    package = tmp_path / "ldm_lessons"
    for name, text in BAD.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert sorted(climbing(package)) == [
        "guidance.py imports data",
        "palette.py imports show",
        "schedules.py imports generate",
        "unet.py imports models",
    ]
    assert circles(package) == ["show", "widgets"]
    assert too_long(package) == ["layers.py has 164 lines of code for 130", "layers.py has 509 lines"]
    assert len(unsafe(package)) == 4
    assert undocumented(package) == [
        "layers.py: Twice has no docstring",
        "layers.py: untyped lacks type hints",
        "unet.py: f has no docstring",
        "unet.py: f lacks type hints",
    ]
    assert list(defined_twice(tmp_path)) == ["Twice"]


# Installing


PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def plain(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_are_versions_and_nothing_else():
    assert [line for line in PINS if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert len({plain(line.split("==")[0]) for line in PINS}) == len(PINS)


def test_all_that_the_course_asks_for_is_pinned_within_its_ranges():
    from packaging.requirements import Requirement

    pinned = {plain(name): version for name, version in (line.split("==") for line in PINS)}
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if plain(requirement.name) != plain(PROJECT["name"]):
            assert requirement.specifier.contains(pinned[plain(requirement.name)]), requirement


def test_every_import_of_the_package_is_asked_for():
    names = {"PIL": "pillow", "skimage": "scikit-image", "huggingface_hub": "huggingface-hub"}
    asked = {plain(re.split(r"[^\w.-]", text)[0]) for text in PROJECT["dependencies"]}
    asked |= {plain(re.split(r"[^\w.-]", text)[0]) for text in PROJECT["optional-dependencies"]["lab"]}
    asked |= {"ldm-lessons", "packaging", "pip", "ipython"}  # of pip and of ipykernel
    used = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add(node.module.split(".")[0])
    assert {plain(names.get(name, name)) for name in used - sys.stdlib_module_names} <= asked


INSTALLING = ["Makefile", "pyproject.toml", "constraints.txt", "environment.yml", ".ci/run", "README.md"]


@pytest.mark.parametrize("name", INSTALLING)
def test_no_registry_or_local_wheel_is_named(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"pypi\.org|pythonhosted|index-url|find-links|file://|/opt/|download\.pytorch", text) == []


TEXTS = {"", ".py", ".toml", ".txt", ".yml", ".md", ".ipynb", ".json", ".js"}


def test_the_address_stands_in_one_place():
    owner_and_name = repository().split("/", 3)[3]
    holders = set()
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name == ".ci" or not name.startswith(".") and not name.endswith(("egg-info", "runs"))
        ]
        for path in (Path(folder) / name for name in names):
            if (
                path.suffix in TEXTS
                and path.stat().st_size < 2e6
                and owner_and_name in path.read_text(encoding="utf-8")
            ):
                holders.add(str(path.relative_to(ROOT)))
    written_from_it = {"README.md", *(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb"))}
    assert holders - written_from_it == {"pyproject.toml"}


def test_conda_uses_the_tested_versions():
    text = (ROOT / "environment.yml").read_text()
    assert "-c constraints.txt" in text and "-e .[lab]" in text


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n" in text and "END OF TERMS AND CONDITIONS" in text and PROJECT["license"] == "Apache-2.0"


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()


@pytest.mark.parametrize(
    ("script", "sentence"),
    [("exit 1", "needs Python 3.11"), ('case "$2" in *version_info*) ;; *) exit 1;; esac', "venv module is missing")],
)
def test_make_says_what_python_lacks(tmp_path, script, sentence):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    command = ["make", "-s", f"VENV={tmp_path}/venv", f"PYTHON={python}", f"{tmp_path}/venv/.lab"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode and sentence in done.stderr and len(done.stderr.splitlines()) <= 2


def test_data_stays_small():
    assert sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file()) < 60e6
