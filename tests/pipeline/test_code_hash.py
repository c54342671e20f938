"""`lib.pipeline.code`: a hash changes with the code that decides a result, and with nothing else."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lib.pipeline.code import check_pipeline_code, is_interactive, pipeline_hashes, sources_as_run
from lib.utils import code_hash
from lib.utils.code_hash import SOURCES, StaleCode, import_closure, without_prose
from lib.utils.files import ROOT

MODULE = '''"""What it is."""

import math  # for the root


def f(x):
    """Return √x.

    Twice.
    """
    # a comment
    text = """a # b

    c"""
    return math.sqrt(x), "# no comment", text


class C:
    """A docstring alone."""
'''


def test_docstrings_comments_and_blank_lines_do_not_count():
    assert without_prose(MODULE) == (
        'import math\ndef f(x):\n    text = """a # b\n\n    c"""\n'
        '    return math.sqrt(x), "# no comment", text\nclass C:'
    )
    other = (
        MODULE.replace("Return √x.", "Give the root; ünïcode.")
        .replace("# a comment", "# another")
        .replace("\n\n\n", "\n\n")
    )
    assert other != MODULE and without_prose(other) == without_prose(MODULE)


@pytest.mark.parametrize("old, new", [("math.sqrt", "math.cbrt"), ("# no comment", "# none"), ("a # b\n\n", "a # b\n")])
def test_code_and_text_that_is_data_count(old, new):
    changed = MODULE.replace(old, new)
    assert changed != MODULE and without_prose(changed) != without_prose(MODULE)


def test_a_docstring_after_other_code_on_its_line_is_cut_alone():
    assert without_prose('class A: "text"\nx = 1\n') == "class A:\nx = 1"
    assert without_prose('def f(): "text"; return "kept"\n').endswith('; return "kept"')


def test_a_closure_follows_imports_into_functions_and_packages():
    with sources_as_run() as folder:
        closures = {name: [p.as_posix() for p in import_closure(Path(SOURCES[name]), folder)] for name in ("dd", "kd")}
    wanted = {"lib/attacks/pgd.py", "lib/attacks/__init__.py", "lib/utils/seeds.py", SOURCES["dd"]}
    assert wanted <= set(closures["dd"]) and "lib/attacks/pgd.py" not in closures["kd"]
    assert [str(p) for p in import_closure(Path("lib/pipeline/notebook.py")) if p.name == "device.py"]  # a local import


@pytest.fixture
def copy(tmp_path):
    """The sources alone."""
    for name in ("lib", "notebooks"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    return tmp_path


def changed_by(copy: Path, edit) -> set[str]:
    before = pipeline_hashes(copy)
    edit()
    return {name for name, value in pipeline_hashes(copy).items() if value != before[name]}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def notebook_edit(path: Path, kind: str, text: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    next(c for c in notebook.cells if c.cell_type == kind and not is_interactive(c)).source += text
    nbformat.write(notebook, path)


def with_another_line(name: str):
    """An edit of a module that adds a line of code."""
    return lambda root: replace(root / name, "\ndef ", "\nANOTHER = 1\n\n\ndef ")


FIGURES, PGD, TRAINING = "lib/report/figures/__init__.py", "lib/attacks/pgd.py", "lib/training.py"
EDITS = {  # what is edited, how, and the experiments whose hash it changes
    "a docstring": (lambda root: replace(root / PGD, '"""', '"""Now: '), set()),
    "a comment": (lambda root: replace(root / TRAINING, "\nimport math", "\n# why\nimport math"), set()),
    "a figure's colour": (lambda root: replace(root / FIGURES, '"colorblind"', '"deep"'), {"report"}),
    "a conclusion's words": (with_another_line("lib/report/sentences/kd.py"), {"report"}),
    "a notebook's text": (lambda root: notebook_edit(root / SOURCES["kd"], "markdown", "\nMore."), set()),
    "a notebook's code": (lambda root: notebook_edit(root / SOURCES["kd"], "code", "\nmore = 1"), {"kd"}),
    "a line in an attack": (with_another_line(PGD), {"dd", "rd", "dp"}),
    "a line in the solvers": (with_another_line("lib/diffusion/solvers.py"), {"diff", "dp"}),
    "a line in the seeds": (with_another_line("lib/utils/seeds.py"), set(SOURCES) - {"report"}),
    "a line in the statistics": (with_another_line("lib/report/statistics.py"), {"report"}),
    "a line in the claims": (with_another_line("lib/report/claims.py"), {"report"}),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_changes_the_hashes_of_exactly_the_experiments_it_can_change(copy, what):
    edit, expected = EDITS[what]
    assert changed_by(copy, lambda: edit(copy)) == expected


def test_no_module_of_the_report_counts_for_an_experiment_nor_what_it_alone_imports(copy):
    def edit():
        (copy / "lib/utils/only_here.py").write_text("NEW = 1\n")
        for path in (copy / "lib/report").rglob("*.py"):
            path.write_text(path.read_text(encoding="utf-8") + "\nfrom lib.utils.only_here import NEW\n", "utf-8")

    assert changed_by(copy, edit) == {"report"}


@pytest.mark.parametrize("tags, changed", [(["interactive"], set()), ([], {"kd"})])
def test_cells_run_by_hand_alone_do_not_count(copy, tags, changed):
    before = pipeline_hashes(copy)
    notebook = nbformat.read(copy / SOURCES["kd"], as_version=4)
    notebook.cells.insert(3, nbformat.v4.new_code_cell("more = 1", metadata={"tags": tags}))
    nbformat.write(notebook, copy / SOURCES["kd"])
    after = pipeline_hashes(copy)
    assert {name for name in SOURCES if after[name] != before[name]} == changed


@pytest.mark.parametrize("name", ["kd", "dd", "rd", "diff", "dp"])
def test_notebooks_save_nothing_that_the_report_computes(name):
    """Its hash has no part in theirs: they may draw and print with it, but keep nothing of it."""
    with sources_as_run() as folder:
        tree = ast.parse(code_hash.code_of(folder / SOURCES[name]))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    modules = [node for node in imports if node.module.startswith("lib.report")]
    drawn = {alias.asname or alias.name for node in modules for alias in node.names}
    saving = [node for node in tree.body if not isinstance(node, ast.Expr)]  # an expression only shows something
    used = {node.id for part in saving for node in ast.walk(part) if isinstance(node, ast.Name)}
    assert drawn and not drawn & used


def test_a_stale_hash_is_refused_by_name(copy):
    for name in ("kd", "dd"):
        with pytest.raises(StaleCode, match=f"data/code/{name}.txt is stale.*run `dvc repro code` first"):
            check_pipeline_code(name, copy)
    (copy / "data/code").mkdir(parents=True)
    (copy / "data/code/kd.txt").write_text(pipeline_hashes(copy)["kd"] + "\n")
    check_pipeline_code("kd", copy)
    EDITS["a notebook's code"][0](copy)
    with pytest.raises(StaleCode, match=r"expected .{13}, got"):
        check_pipeline_code("kd", copy)


def test_the_command_refuses_a_stale_hash_before_any_work(copy):
    command = [sys.executable, "-m", "lib.run", SOURCES["kd"], "out.ipynb", "--code", "kd"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "data/code/kd.txt is stale" in done.stderr and not (copy / "out.ipynb").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["a docstring", "a comment", "a figure's colour", "a notebook's text", "a line in an attack"]
)
def test_dvc_reruns_what_an_edit_can_change_and_nothing_else(tmp_path, what):
    """In a scratch copy with the committed lock: after `dvc repro code`, whose code is another one?"""
    repository = tmp_path / "copy"
    subprocess.run(("git", "clone", "-q", ROOT, repository), check=True)
    edit, expected = EDITS[what]
    edit(repository)
    dvc = [sys.executable, "-m", "dvc"]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    first = subprocess.run([*dvc, "repro", "code"], cwd=repository, env=environment, capture_output=True, text=True)
    assert first.returncode == 0 and "Running stage 'code'" in first.stdout, first.stderr
    status = subprocess.run([*dvc, "status", "--json"], cwd=repository, env=environment, capture_output=True, text=True)
    assert status.returncode == 0, status.stderr
    stale = {
        stage.split("@")[0]
        for stage, changes in json.loads(status.stdout).items()
        for change in changes
        if isinstance(change, dict)
        for path in change.get("changed deps", {})
        if path.startswith(code_hash.CODE)
    }
    assert stale == expected, status.stdout
