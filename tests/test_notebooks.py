"""The notebooks keep their rules; and the machinery that runs, cleans and checks them does what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ldm_lessons import notebooks as nbs

NOTEBOOKS = sorted((nbs.ROOT / "notebooks").glob("*.ipynb"))


# The course's own notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path):
    assert list(nbs.violations(path)) == []


def test_notebooks_together_are_small():
    assert [line for line in nbs.check_notebooks(NOTEBOOKS) if "together" in line] == []


def test_readme_names_the_repository_and_the_scores():
    text = (nbs.ROOT / "README.md").read_text(encoding="utf-8")
    assert nbs.readme_with_address(text) == text, "run: python -m ldm_lessons.notebooks badges"
    assert nbs.readme_with_scores(text) == text, "run: python -m ldm_lessons.notebooks readme"


# A small repository to try the machinery on


@pytest.fixture
def root(tmp_path):
    """A repository with an address, a package of one file, and folders for notebooks and data."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\ndependencies = ["numpy>=1"]\n'
        '[project.urls]\nRepository = "https://github.com/someone/lessons"\n'
    )
    for folder in ("notebooks", "ldm_lessons/checks", "data/pocket"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ldm_lessons" / "__init__.py").touch()
    (tmp_path / "ldm_lessons" / "samplers.py").write_text("def ddim_step(x):\n    return x\n\n\nSAMPLERS = {}\n")
    (tmp_path / "ldm_lessons" / "checks" / "lesson_09.py").write_text("def my_step(f):\n    return f\n")
    (tmp_path / "README.md").write_text("# Lessons\n")
    return tmp_path


HEADER = "# 00 · A lesson\n\nNeeds <!-- measured --><!-- /measured -->\n\nSee [the readme](../README.md#top)."


def notebook(root: Path, *cells, header: str = HEADER, name: str = "00_try.ipynb") -> Path:
    """Write a notebook with header, badge, setup cell and these cells, never run."""
    nb = new_notebook(cells=[new_markdown_cell(header), *cells])
    nbs.write_notebook(nbs.with_badge_and_setup(nb, name, root), root / "notebooks" / name)
    return root / "notebooks" / name


def good(root: Path) -> Path:
    """A notebook that breaks no rule, without having run a kernel."""
    nb = nbs.read_notebook(notebook(root, new_code_cell("x = 1\nx", id="one"), new_markdown_cell("![](../README.md)")))
    nb.cells[0].source = nb.cells[0].source.replace("--><!--", "-->about 1 minute, 1.2 GB<!--")
    nb.metadata["kernelspec"] = dict(nbs.KERNELSPEC)
    for count, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    nb.cells[2].outputs = [new_output("execute_result", {"text/plain": "1"}, execution_count=2)]
    nbs.write_notebook(nb, root / "notebooks" / "00_try.ipynb")
    return root / "notebooks" / "00_try.ipynb"


def test_a_good_notebook_breaks_no_rule(root):
    assert list(nbs.violations(good(root), root)) == []


def edit(index, **fields):
    return lambda nb: nb.cells[index].update(fields)


def with_output(**output):
    return lambda nb: nb.cells[2].outputs.append(new_output(**output))


def drop_measured(nb):
    nb.cells[0].source = nb.cells[0].source.replace("about 1 minute, 1.2 GB", "")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (with_output(output_type="error", ename="E", evalue="", traceback=[]), "stores an error"),
        (edit(2, execution_count=None), "not run once each"),
        (edit(2, execution_count=7), "not run once each"),
        (lambda nb: nb.metadata.update(widgets={}), "widget state"),
        (lambda nb: nb.metadata.update(kernelspec={"name": "mine"}), "kernelspec"),
        (with_output(output_type="display_data", data={nbs.WIDGET_VIEW: {}}), "stores a widget"),
        (with_output(output_type="stream", name="stderr", text="careful"), "warnings or a progress bar"),
        (with_output(output_type="stream", text="saved to /home/ada/out.png"), "a path of one machine"),
        (edit(2, source="open('/work/ada/x.png')"), "a path of one machine"),
        (edit(3, source="It is in `/Users/ada/x`."), "a path of one machine"),
        (with_output(output_type="display_data", data={"text/plain": "<A at 0x7f00aa00bb>"}), "changes at every run"),
        (with_output(output_type="stream", text="20/20 [00:01<00:00, 19.8it/s]"), "changes at every run"),
        (with_output(output_type="display_data", data={"image/png": "A" * 1_500_000}), "the limit is 1.5 MB"),
        (edit(0, source="A lesson without a title"), "starts with a title"),
        (edit(0, source="# A lesson"), "Colab badge"),
        (edit(0, source="# A lesson"), "has no <!-- measured -->"),
        (drop_measured, "no measured minutes"),
        (lambda nb: nb.cells[1].update(source=nb.cells[1].source + "\n"), "setup cell"),
        (edit(3, source="[next](01_gone.ipynb)"), "links to 01_gone.ipynb"),
        (edit(3, source='<img src="gone.png">'), "links to gone.png"),
        (edit(2, source="def ddim_step(x):\n    return 0"), "defines ddim_step"),
        (edit(2, source="if True:\n    a, SAMPLERS = 1, {}"), "defines SAMPLERS"),
    ],
)
def test_each_rule_sees_what_breaks_it(root, break_it, message):
    path = good(root)
    nb = nbs.read_notebook(path)
    break_it(nb)
    nbs.write_notebook(nb, path)
    assert any(message in line for line in nbs.violations(path, root))


@pytest.mark.parametrize(
    "source",
    [
        "%matplotlib inline\nfrom ldm_lessons.samplers import SAMPLERS, ddim_step",
        "def my_step(x):\n    return x",  # the exercise's own stub; its marking function may have the same name
        "class Other:\n    def ddim_step(self):\n        SAMPLERS = 1",
    ],
)
def test_imports_exercises_and_inner_names_are_no_second_definition(root, source):
    path = good(root)
    nb = nbs.read_notebook(path)
    nb.cells[2].source = source
    nbs.write_notebook(nb, path)
    assert list(nbs.violations(path, root)) == []


def test_formulas_code_and_web_addresses_are_no_links():
    text = "$a[t](x)$ `d[k](v)` [a](https://example.org/x) [b](#here) [c](mailto:a@b.c)\n```python\nf[0](y)\n```\n"
    assert list(nbs.local_links(text + "[d](e.md#part)")) == ["e.md"]


def test_all_notebooks_together_have_a_limit(root, monkeypatch):
    monkeypatch.setattr(nbs, "MAX_MEGABYTES_TOGETHER", 0.001)
    assert "together" in nbs.check_notebooks([good(root)], root)[-1]


# Running


NOISY = """\
import sys, warnings
from tqdm.auto import tqdm
for _ in tqdm(range(3)): pass
warnings.warn("noise"); print("error", file=sys.stderr)
print("one", flush=True); print("warn", file=sys.stderr, flush=True); print("two")
{3, 1, 2} and sorted({"a", "b"})"""

WIDGET = """\
import ipywidgets
display(ipywidgets.IntSlider())
display({"text/plain": "a still picture"}, raw=True)"""


@pytest.mark.slow
def test_running_cleans_measures_and_repeats_to_the_byte(root):
    path = notebook(
        root,
        new_code_cell(NOISY, id="noisy"),
        new_code_cell(WIDGET, id="widget"),
        new_code_cell("ballast = b'x' * 300_000_000\nlist({'b', 'c', 'a', 'e'})", id="ballast"),
    )
    nb = nbs.read_notebook(path)
    nb.metadata.update(widgets={"state": 1}, kernelspec={"name": "other", "display_name": "Other"})
    nb.cells[2].metadata.update(execution={"iopub.status.busy": "2026-01-01"}, tags=["kept"])
    nbs.write_notebook(nb, path)
    minutes, gigabytes = nbs.run_notebook(path, root)
    first = path.read_bytes()
    nb = nbformat.read(path, as_version=4)
    assert list(nbs.violations(path, root)) == []
    assert [cell.id for cell in nb.cells if cell.cell_type == "code"][:2] == ["setup", "noisy"]
    assert nb.cells[2].metadata == {"tags": ["kept"]}
    noisy, widget = nb.cells[2].outputs, nb.cells[3].outputs
    assert [out.get("text") for out in noisy] == ["one\ntwo\n", None]
    assert noisy[1].data["text/plain"] == "['a', 'b']"
    assert [out.data for out in widget] == [{"text/plain": "a still picture"}]
    assert 0 < minutes < 2
    assert 0.3 < gigabytes < 1.0, "the kernel's memory, and not this test's"
    assert "<!-- measured -->about half a minute, 0." in nb.cells[0].source
    nbs.run_notebook(path, root)
    assert path.read_bytes() == first


@pytest.mark.slow
def test_a_failing_cell_leaves_the_file_as_it_was(root):
    path = notebook(root, new_code_cell("1 / 0"))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="left as it was"):
        nbs.run_notebook(path, root)
    assert path.read_bytes() == before


def test_a_notebook_is_written_whole_or_not_at_all(root, monkeypatch):
    path = good(root)
    before, nb = path.read_bytes(), nbs.read_notebook(path)

    def full_disk(_, target):
        Path(target).write_text("{")
        raise OSError("no space left")

    monkeypatch.setattr(nbformat, "write", full_disk)
    with pytest.raises(OSError, match="no space"):
        nbs.write_notebook(nb, path)
    assert path.read_bytes() == before


def test_cells_without_id_get_the_same_one_every_time(root):
    path = good(root)
    raw = json.loads(path.read_text())
    for cell in raw["cells"]:
        del cell["id"]
    raw["nbformat_minor"] = 4
    path.write_text(json.dumps(raw))
    ids = [[cell.id for cell in nbs.read_notebook(path).cells] for _ in range(2)]
    assert ids[0] == ids[1] and len(set(ids[0])) == 4


@pytest.mark.parametrize(
    ("minutes", "gigabytes", "before", "line"),
    [
        (0.2, 0.51, "", "about half a minute, 0.5 GB"),
        (1.1, 1.24, "", "about 1 minute, 1.2 GB"),
        (2.6, 2.0, "not measured yet", "about 3 minutes, 2.0 GB"),
        (1.6, 1.3, "about 1 minute, 1.2 GB", "about 1 minute, 1.2 GB"),
        (1.0, 0.5, "about half a minute, 0.5 GB", "about half a minute, 0.5 GB"),
        (2.4, 1.2, "about 1 minute, 1.2 GB", "about 2 minutes, 1.2 GB"),
        (1.0, 1.9, "about 1 minute, 1.2 GB", "about 1 minute, 1.9 GB"),
    ],
)
def test_measured_line_holds_still(minutes, gigabytes, before, line):
    assert nbs.measured_line(minutes, gigabytes, before) == line


def test_notebooks_are_found_by_number():
    with pytest.raises(FileNotFoundError, match="no notebook '99'"):
        nbs.find_notebooks(["99"])
    assert nbs.find_notebooks([]) == NOTEBOOKS


# The address, the badges and the README


def test_one_command_rewrites_every_address(root):
    path = good(root)
    before = path.read_text()
    readme = root / "README.md"
    readme.write_text(f"git clone https://github.com/a/b\n[00]({nbs.colab_folder(root)}00_try.ipynb)\n")
    assert nbs.main(["badges", "--repo", "https://github.com/new/home.git/"], root) == 0
    assert nbs.repository(root) == "https://github.com/new/home"
    after = path.read_text()
    assert "someone" in before and "someone" not in after and after.count("new/home") == 2
    assert readme.read_text().count("new/home") == 2
    assert list(nbs.violations(path, root)) == []
    assert nbs.main(["badges", "--repo", "home"], root) == 1


def test_badges_leave_the_rest_of_a_notebook_alone(root):
    path = good(root)
    nb = nbs.read_notebook(path)
    before = path.read_bytes()
    nbs.write_notebook(nbs.with_badge_and_setup(nb, path.name, root), path)
    assert path.read_bytes() == before


def test_scores_fill_the_readme(root):
    text = "a <!-- scores -->old<!-- /scores --> b"
    assert nbs.readme_with_scores(text, root) == text
    (root / "data" / "pocket" / "scores.json").write_text('{"readme": {"sky": "91 % of 200"}}')
    assert "| sky | 91 % of 200 |" in (filled := nbs.readme_with_scores(text, root)) and "old" not in filled
    assert nbs.readme_with_scores(filled, root) == filled


# The setup cell


def run_setup_cell(source: str, cwd: Path, hide: bool) -> subprocess.CompletedProcess:
    """Run the setup cell in a fresh Python, where `hide` makes it look as if the course were not installed."""
    hiding = """
import os, sys
sys.path[:] = [path for path in sys.path if path and not os.path.isdir(path + "/ldm_lessons")]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
"""
    shown = "import os, ldm_lessons; print(os.getcwd(), os.path.realpath(ldm_lessons.__file__))"
    script = (hiding if hide else "") + source + "\n" + shown
    env = {**os.environ, "PYTHONPATH": "" if hide else str(nbs.ROOT)}
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def test_setup_cell_does_nothing_where_the_course_is_installed(tmp_path):
    done = run_setup_cell(nbs.setup_cell(), tmp_path, hide=False)
    assert done.stdout.split() == [str(tmp_path), str(nbs.ROOT / "ldm_lessons" / "__init__.py")], done.stderr


def test_setup_cell_fetches_the_course_where_it_is_missing(root, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("content")
    (root / "ldm_lessons" / "notebooks.py").write_text(Path(nbs.__file__).read_text())
    good(root)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(root)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    source = nbs.SETUP.format(repo=root.as_uri())
    home = cwd / "ldm-lessons"
    for _ in range(2):  # the second time as after a restarted kernel: nothing to fetch
        done = run_setup_cell(source, cwd, hide=True)
        assert done.returncode == 0, done.stderr
        where = done.stdout.strip().splitlines()[-1].split()
        assert where == [str(home / "notebooks"), str(home / "ldm_lessons" / "__init__.py")]
    assert "Fetching" not in done.stdout
    done = run_setup_cell(source, home / "notebooks", hide=True)  # opened in a clone that was never installed
    assert done.stdout.strip().splitlines()[-1].split() == where, done.stderr


def test_setup_cell_says_so_when_the_course_cannot_be_fetched(tmp_path):
    done = run_setup_cell(nbs.SETUP.format(repo=(tmp_path / "nothing").as_uri()), tmp_path, hide=True)
    assert "RuntimeError: The course could not be fetched" in done.stderr


def test_missing_requirements_are_found():
    assert nbs.missing_requirements(["numpy>=1", "torch>=2.6", "numpy>=99", "no-such-thing>=1"]) == [
        "numpy>=99",
        "no-such-thing>=1",
    ]


def test_a_preinstalled_torch_is_never_replaced(root, monkeypatch, capsys):
    import torch

    (root / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=99", "no-such-thing>=1", "nbformat>=4"]\n')
    commands = []

    def pip(command, **_):
        commands.append((command, Path(command[command.index("-c") + 1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert nbs.install_missing(root) == ["no-such-thing>=1"]
    (command, constraints), = commands  # fmt: skip
    assert command[-1] == "no-such-thing>=1" and not any("torch" in part for part in command)
    assert f"torch=={torch.__version__}" in constraints.split()
    assert "asks for torch>=99" in capsys.readouterr().out


def test_a_failing_pip_gives_one_sentence(root, monkeypatch):
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["no-such-thing>=1"]\n')
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="could not install no-such-thing>=1: ERROR: no network"):
        nbs.install_missing(root)
