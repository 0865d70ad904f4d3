"""Keeps the notebooks true: runs them from cold, stores clean outputs, and checks the rules that they keep.

    python -m ldm_lessons.notebooks run [00 04 ...]      execute, clean, measure, and store
    python -m ldm_lessons.notebooks check [00 04 ...]    list what breaks a rule
    python -m ldm_lessons.notebooks badges [--repo URL]  rewrite Colab badges and setup cells everywhere
    python -m ldm_lessons.notebooks readme               put the measured scores into README.md

The setup cell of every notebook imports this file on Colab before anything is installed: only the standard library up
here, and `nbformat`, `nbclient` and `psutil` inside the functions that need them.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"
MAX_MEGABYTES, MAX_MEGABYTES_TOGETHER = 1.5, 15
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
BADGE_IMAGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
MEASURED = re.compile(r"(<!-- measured -->)(.*?)(<!-- /measured -->)", re.DOTALL)
SCORES = re.compile(r"(<!-- scores -->)(.*?)(<!-- /scores -->)", re.DOTALL)
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:root|home|work|tmp|Users|private|opt)/[\w.-]+/|[A-Za-z]:\\+Users\\")
NOISE = re.compile(r" at 0x[0-9a-f]{6,}|\d(?:it/s|s/it)\b")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|<(?:img|a)\b[^>]*?(?:src|href)=\"([^\"]+)\"")
NOT_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)

SETUP_MARK = "# Setup:"
SETUP = (
    SETUP_MARK
    + """ on your own machine this does nothing; on Colab it fetches the course (about a minute).
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("ldm_lessons") is None:
    home = ".." if os.path.isdir("../ldm_lessons") else "ldm-lessons"
    if not os.path.isdir(home):
        print("Fetching the course ...")
        clone = ["git", "clone", "--quiet", "--depth=1", "{repo}", home]
        if subprocess.run(clone, env={{**os.environ, "GIT_TERMINAL_PROMPT": "0"}}).returncode:
            raise RuntimeError("The course could not be fetched: check the network, then run this cell again.")
    sys.path.insert(0, os.path.abspath(home))
    from ldm_lessons.notebooks import install_missing

    install_missing()
    os.chdir(os.path.join(home, "notebooks"))"""
)


# The repository's address, the badge and the setup cell


def repository(root: Path = ROOT) -> str:
    """The repository's address, from the one place that has it: `[project.urls] Repository` in pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def set_repository(address: str, root: Path = ROOT) -> None:
    """Write another address into pyproject.toml. ValueError unless it looks like https://github.com/owner/name."""
    address = address.strip().rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise ValueError(f"{address!r} is no GitHub address: give one like https://github.com/owner/name.")
    path = root / "pyproject.toml"
    text = re.sub(r'(?m)^(Repository = ").*(")$', rf"\g<1>{address}\g<2>", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")


def setup_cell(root: Path = ROOT) -> str:
    """The source of every notebook's first code cell."""
    return SETUP.format(repo=repository(root))


def colab_badge(name: str, root: Path = ROOT) -> str:
    """The Markdown of the badge that opens `notebooks/<name>` on Colab."""
    return f"{BADGE_IMAGE}({colab_folder(root)}{name})"


def colab_folder(root: Path = ROOT) -> str:
    """Where Colab opens the repository's notebooks; a notebook's file name follows."""
    return f"https://colab.research.google.com/github/{repository(root).split('/', 3)[3]}/blob/{BRANCH}/notebooks/"


def with_badge_and_setup(nb: Any, name: str, root: Path = ROOT) -> Any:
    """Put the current badge into the first Markdown cell and the current setup cell before all other code, in place."""
    import nbformat

    header = next(cell for cell in nb.cells if cell.cell_type == "markdown")
    line, pattern = colab_badge(name, root), rf"(?m)^{re.escape(BADGE_IMAGE)}.*$"
    if re.search(pattern, header.source):
        header.source = re.sub(pattern, lambda _: line, header.source)
    else:
        title, _, rest = header.source.partition("\n")
        header.source = f"{title}\n\n{line}\n{rest}".rstrip("\n")
    first = next((i for i, cell in enumerate(nb.cells) if cell.cell_type == "code"), len(nb.cells))
    if first == len(nb.cells) or not nb.cells[first].source.startswith(SETUP_MARK):
        nb.cells.insert(first, nbformat.v4.new_code_cell(id="setup"))
    nb.cells[first].source = setup_cell(root)
    return nb


def readme_with_address(text: str, root: Path = ROOT) -> str:
    """README's text with the current address in its Colab links and after `git clone`."""
    text = re.sub(r"https://colab\.research\.google\.com/github/[^/\s]+/[^/\s]+/blob/[^/\s]+/notebooks/",
                  lambda _: colab_folder(root), text)  # fmt: skip
    return re.sub(r"(git clone )https?://\S+", lambda m: m[1] + repository(root), text)


def readme_with_scores(text: str, root: Path = ROOT) -> str:
    """README's text with the table of `data/pocket/scores.json` ("readme": label to string) between its markers."""
    path = root / "data" / "pocket" / "scores.json"
    if not path.exists():
        return text
    scores = json.loads(path.read_text(encoding="utf-8")).get("readme", {})
    rows = ["| | measured |", "| --- | --- |"] + [f"| {label} | {value} |" for label, value in scores.items()]
    return SCORES.sub(lambda m: f"{m[1]}\n\n" + "\n".join(rows) + f"\n\n{m[3]}", text)


# What the setup cell calls where the course is not installed


def missing_requirements(requirements: Sequence[str]) -> list[str]:
    """Those of the requirements ("name>=version") that no installed distribution meets."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # every pip carries a copy
        from pip._vendor.packaging.requirements import Requirement
    unmet = []
    for text in requirements:
        requirement = Requirement(text)
        try:
            met = requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            met = False
        if not met:
            unmet.append(text)
    return unmet


def install_missing(root: Path = ROOT) -> list[str]:
    """Install what the course needs and this machine lacks, keeping a torch and a numpy that are there as they are.

    Returns the requirements that were installed; RuntimeError if pip fails.
    """
    pins = []
    for name in ("torch", "torchvision", "torchaudio", "numpy"):
        try:
            pins.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    kept = {pin.split("==")[0] for pin in pins}
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = []
    for text in missing_requirements(project["dependencies"]):
        name = re.split(r"[^\w.-]", text)[0]
        if name in kept:
            print(f"The course asks for {text}; the {name} that is installed here is left as it is.")
        else:
            wanted.append(text)
    if wanted:
        print("Installing", ", ".join(wanted), "...")
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(pins), encoding="utf-8")
            command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            done = subprocess.run([*command, "-c", str(constraints), *wanted], capture_output=True, text=True)
        if done.returncode:
            reason = next((x for x in done.stderr.splitlines() if x.startswith("ERROR")), "no reason given")
            raise RuntimeError(f"pip could not install {', '.join(wanted)}: {reason}")
        importlib.invalidate_caches()  # let this process see what is new
    print("The course is ready.")
    return wanted


# Running from cold


class PeakMemory(threading.Thread):
    """Polls the resident memory of a process and its children; `gigabytes` is the highest sum seen."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.gigabytes, self.stopped = pid, 0.0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.05):
            self.look()

    def look(self) -> None:
        """Take one sample."""
        import psutil

        try:
            process = psutil.Process(self.pid)
            family = [process, *process.children(recursive=True)]
            self.gigabytes = max(self.gigabytes, sum(p.memory_info().rss for p in family) / 1e9)
        except psutil.Error:  # a process that has just ended
            pass


def execute_notebook(nb: Any, folder: Path) -> tuple[float, float]:
    """Run all cells in a fresh kernel that starts in `folder`, in place.

    Returns minutes and peak gigabytes of the kernel with its children; RuntimeError if a cell fails.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(nb, timeout=600, kernel_name="python3", record_timing=False, store_widget_state=False,
                            resources={"metadata": {"path": str(folder)}})  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    with client.setup_kernel(env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}):
        memory = PeakMemory(client.km.provisioner.pid)
        memory.start()
        try:
            for index, cell in enumerate(nb.cells):
                client.execute_cell(cell, index)
        except CellExecutionError as error:
            raise RuntimeError(f"A cell failed, and the file was left as it was:\n{error}") from None
        finally:
            memory.stopped.set()
            memory.join()
            memory.look()
    return (time.perf_counter() - start) / 60, memory.gigabytes


def measured_line(minutes: float, gigabytes: float, before: str = "") -> str:
    """ "about 1 minute, 1.2 GB"; the line from before where it still holds, so that small variations change nothing."""
    old = re.fullmatch(r"about (half a|\d+) minutes?, ([\d.]+) GB", before.strip())
    if old:
        old_minutes, old_gigabytes = 0.5 if old[1] == "half a" else float(old[1]), float(old[2])
        if abs(minutes - old_minutes) <= 0.7 + old_minutes / 10:
            minutes = old_minutes
        if abs(gigabytes - old_gigabytes) <= 0.1 + old_gigabytes / 10:
            gigabytes = old_gigabytes
    whole = round(minutes)
    spell = "half a minute" if minutes < 0.75 else f"{whole} minute{'s' if whole > 1 else ''}"
    return f"about {spell}, {max(gigabytes, 0.1):.1f} GB"


def clean_notebook(nb: Any) -> Any:
    """Drop in place what would change at every run or needs a kernel: progress bars, warnings, widgets, metadata."""
    kept = {key: nb.metadata[key] for key in ("accelerator", "colab") if key in nb.metadata}
    nb.metadata = type(nb.metadata)({**kept, "kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    for cell in nb.cells:
        for key in ("execution", "ExecuteTime", "outputId", "collapsed", "scrolled"):
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            continue
        outputs: list[Any] = []
        for output in cell.outputs:
            if output.get("name") == "stderr" or WIDGET_VIEW in output.get("data", {}):
                continue
            if output.output_type == "stream" and outputs and outputs[-1].output_type == "stream":
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        cell.outputs = outputs
    return nb


def read_notebook(path: Path) -> Any:
    """A notebook as nbformat's node; cells without an id get one that depends on their text only."""
    import nbformat

    raw = json.loads(path.read_text(encoding="utf-8"))
    for index, cell in enumerate(raw["cells"]):
        text = f"{index}{''.join(cell['source'])}"
        cell.setdefault("id", hashlib.sha256(text.encode()).hexdigest()[:8])
    raw["nbformat_minor"] = max(raw["nbformat_minor"], 5)
    return nbformat.reads(json.dumps(raw), as_version=4)


def write_notebook(nb: Any, path: Path) -> None:
    """Store a notebook whole or not at all."""
    import nbformat

    part = path.with_suffix(".part")
    nbformat.write(nb, part)
    part.replace(path)


def run_notebook(path: Path, root: Path = ROOT) -> tuple[float, float]:
    """Run one notebook from cold and store it cleaned and measured; a cell's error leaves the file as it was.

    Returns minutes and peak gigabytes.
    """
    nb = with_badge_and_setup(read_notebook(path), path.name, root)
    minutes, gigabytes = execute_notebook(nb, path.parent)
    clean_notebook(nb)
    header = nb.cells[0]
    header.source = MEASURED.sub(lambda m: m[1] + measured_line(minutes, gigabytes, m[2]) + m[3], header.source)
    write_notebook(nb, path)
    return minutes, gigabytes


# The rules


def definitions(tree: ast.Module, assigned: bool = True) -> dict[str, int]:
    """Public names that a module or notebook binds at its top level, each with its line; imports do not count."""
    names: dict[str, int] = {}
    stack = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node.lineno
        elif isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try):
            stack += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        elif assigned and isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names |= {n.id: node.lineno for n in ast.walk(target) if isinstance(n, ast.Name)}
    return {name: line for name, line in names.items() if not name.startswith("_") and name != "main"}


def code_of(source: str) -> ast.Module:
    """The syntax tree of a code cell, its magics and shell lines left out."""
    lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.split("\n")]
    return ast.parse("" if source.startswith("%%") else "\n".join(lines))


def package_definitions(root: Path = ROOT, assigned: bool = True) -> dict[str, list[str]]:
    """Public names of the package, each with the files that define it; a lesson's marking functions do not count."""
    names: dict[str, list[str]] = {}
    for path in sorted((root / "ldm_lessons").rglob("*.py")):
        if not path.name.startswith("lesson_"):
            for name in definitions(ast.parse(path.read_text(encoding="utf-8")), assigned):
                names.setdefault(name, []).append(str(path.relative_to(root)))
    return names


def outputs_text(cell: Any) -> str:
    """All that a cell's outputs say, pictures left out."""
    outputs = cell.get("outputs", [])
    data = [value for out in outputs for key, value in out.get("data", {}).items() if not key.startswith("image/")]
    return json.dumps([data, [out.get("text", "") for out in outputs]], ensure_ascii=False)


def violations(path: Path, root: Path = ROOT) -> Iterator[str]:
    """What breaks a rule in one notebook, a sentence each."""
    nb = read_notebook(path)
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if path.stat().st_size > MAX_MEGABYTES * 1e6:
        yield f"is {path.stat().st_size / 1e6:.2f} MB; the limit is {MAX_MEGABYTES} MB"
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "has a kernelspec other than python3"
    if "widgets" in nb.metadata:
        yield "stores widget state in its metadata"
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "has code cells that were not run once each, from the top, in a fresh kernel"
    yield from header_violations(nb, path.name, root)
    package = package_definitions(root)
    for cell in nb.cells:
        where = f"cell {cell.id}"
        outputs = cell.get("outputs", [])
        if any(out.output_type == "error" for out in outputs):
            yield f"{where}: stores an error"
        if any(out.get("name") == "stderr" for out in outputs):
            yield f"{where}: stores warnings or a progress bar (stderr)"
        if any(WIDGET_VIEW in out.get("data", {}) for out in outputs):
            yield f"{where}: stores a widget, which shows nothing without a kernel"
        if found := MACHINE_PATH.search(cell.source + outputs_text(cell)):
            yield f"{where}: has a path of one machine, {found[0]}"
        if cell.cell_type == "code":
            if found := NOISE.search(outputs_text(cell)):
                yield f"{where}: has an output that changes at every run, {found[0].strip()!r}"
            for name in definitions(code_of(cell.source)).keys() & package.keys():
                yield f"{where}: defines {name}, which {package[name][0]} defines too"
        elif cell.cell_type == "markdown":
            for target in local_links(cell.source):
                if not (path.parent / target).exists():
                    yield f"{where}: links to {target}, which is not there"


def header_violations(nb: Any, name: str, root: Path) -> Iterator[str]:
    """The first cell is the header with badge and measured line; the first code cell is the setup cell."""
    header = nb.cells[0].source if nb.cells and nb.cells[0].cell_type == "markdown" else ""
    if not header.startswith("# "):
        yield "does not open with a Markdown cell that starts with a title"
    if colab_badge(name, root) not in header.split("\n"):
        yield "has not the current Colab badge in its first cell; run: python -m ldm_lessons.notebooks badges"
    found = MEASURED.search(header)
    if not found:
        yield "has no <!-- measured --><!-- /measured --> in its first cell"
    elif not re.fullmatch(r"about .+ minutes?, [\d.]+ GB", found[2]):
        yield "has no measured minutes and memory in its first cell; run: python -m ldm_lessons.notebooks run"
    first = next((cell.source for cell in nb.cells if cell.cell_type == "code"), "")
    if first != setup_cell(root):
        yield "has not the current setup cell as its first code; run: python -m ldm_lessons.notebooks badges"


def local_links(markdown: str) -> Iterator[str]:
    """The files, without their anchors, that Markdown links to or shows; code, formulas and web addresses left out."""
    for found in LINK.finditer(NOT_PROSE.sub("", markdown)):
        target = (found[1] or found[2]).split("#")[0]
        if target and not re.match(r"[a-z]+:", target):
            yield target


def find_notebooks(names: Sequence[str], root: Path = ROOT) -> list[Path]:
    """Notebooks by number, name or path; all of them when no name is given. FileNotFoundError for an unknown one."""
    folder = root / "notebooks"
    paths = sorted(folder.glob("*.ipynb")) if not names else []
    for name in names:
        found = [Path(name)] if Path(name).is_file() else sorted(folder.glob(f"{name}*.ipynb"))
        if not found:
            raise FileNotFoundError(f"There is no notebook {name!r}: name one by its number, as in 00.")
        paths += found
    return paths


def check_notebooks(paths: Sequence[Path], root: Path = ROOT) -> list[str]:
    """What breaks a rule in the notebooks, one line each."""
    lines = [f"{path.name} {line}" for path in paths for line in violations(path, root)]
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    if megabytes > MAX_MEGABYTES_TOGETHER:
        lines.append(f"The notebooks together are {megabytes:.1f} MB; the limit is {MAX_MEGABYTES_TOGETHER} MB")
    return lines


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m ldm_lessons.notebooks", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("run", "execute from cold and store clean outputs"), ("check", "list what breaks a rule")):
        commands.add_parser(name, help=about).add_argument("names", nargs="*", help="00, 04 ...; all when left out")
    badges = commands.add_parser("badges", help="rewrite Colab badges and setup cells")
    badges.add_argument("--repo", help="the repository's new address")
    commands.add_parser("readme", help="put the measured scores into README.md")
    args = parser.parse_args(argv)
    readme = root / "README.md"
    try:
        if args.command == "run":
            for path in find_notebooks(args.names, root):
                print(f"{path.name} ...", end=" ", flush=True)
                minutes, gigabytes = run_notebook(path, root)
                print(f"{60 * minutes:.0f} s, {gigabytes:.2f} GB at most, {path.stat().st_size / 1e6:.2f} MB stored")
        elif args.command == "badges":
            if args.repo:
                set_repository(args.repo, root)
            for path in find_notebooks([], root):
                write_notebook(with_badge_and_setup(read_notebook(path), path.name, root), path)
            readme.write_text(readme_with_address(readme.read_text(encoding="utf-8"), root), encoding="utf-8")
            print(f"Badges and setup cells now name {repository(root)}.")
        elif args.command == "readme":
            readme.write_text(readme_with_scores(readme.read_text(encoding="utf-8"), root), encoding="utf-8")
        if args.command in ("run", "check"):
            lines = check_notebooks(find_notebooks(args.names, root), root)
            print("\n".join(lines) or "The notebooks keep the rules.")
            return int(bool(lines))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
