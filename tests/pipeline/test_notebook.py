"""`lib.pipeline.notebook` refuses bad parameters before any work, records provenance and saves failed runs."""

import json
import subprocess
import sys

import nbformat
import papermill
import pytest

from lib.pipeline import notebook, parameters
from lib.utils.files import ROOT

KD = ROOT / "notebooks" / "01_classic_kd.ipynb"
PARAMETERS = 'epochs: int = 3\nlr: float = 1e-3\nname = "a"\nflag: bool = False\ncounts: list = [1, 2]'


def make_notebook(path, *sources, tagged=True):
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    )
    nb.cells = [nbformat.v4.new_code_cell(s) for s in sources]
    if tagged:
        nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, path)
    return path


@pytest.fixture
def small(tmp_path):
    code = "import os, lib\nprint(epochs, lr, name, os.getcwd())\nassert name != 'fail', 'this cell failed'"
    return make_notebook(tmp_path / "small.ipynb", PARAMETERS, code)


def cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lib.run", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


def test_bad_parameters_need_not_wait_for_torch():
    code = "import sys, lib.pipeline.notebook, lib.pipeline.profile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(("name", "value"), [("eppochs", "3"), ("teacher_epochs", "many"), ("T", "hot"), ("T", "1/0")])
def test_bad_parameters_exit_before_any_training(tmp_path, name, value):
    done = cli(KD, tmp_path / "out.ipynb", "-p", name, value)
    assert done.returncode == 2 and name in done.stderr and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1 and "expected " in done.stderr
    if name == "eppochs":
        assert all(valid in done.stderr for valid in parameters.notebook_defaults(KD))
    else:
        assert f"got {value!r}" in done.stderr


def test_a_run_starts_at_the_root_and_records_where_it_comes_from(small, tmp_path):
    out = tmp_path / "out.ipynb"
    values = parameters.gather_parameters(small, [], [("epochs", "5"), ("lr", "8/255"), ("name", "b")])
    notebook.run_notebook(small, out, values, progress=False)
    nb = nbformat.read(out, as_version=4)
    printed = next(c.outputs[0].text for c in nb.cells if c.cell_type == "code" and c.outputs)
    assert printed.split() == ["5", str(8 / 255), "b", str(ROOT)]
    record = nb.metadata["distill_run"]
    assert record["parameters"] == {"epochs": 5, "lr": 8 / 255, "name": "b", "flag": False, "counts": [1, 2]}
    assert len(record["git_commit"]) == 40 and record["packages"]["torch"] and record["wall_seconds"] > 0
    assert {"git_dirty", "device", "python", "seed", "started"} <= record.keys()
    assert nb.cells[-1].id == "provenance" and record["git_commit"][:12] in nb.cells[-1].source
    assert "papermill" not in nb.metadata and not any("papermill" in c.metadata for c in nb.cells)
    assert not (tmp_path / "out.failed.ipynb").exists()


def test_with_the_record_apart_equal_runs_give_equal_bytes(small, tmp_path):
    outs = [tmp_path / f"{i}.ipynb" for i in range(2)]
    for out in outs:
        notebook.run_notebook(small, out, {"epochs": 2}, progress=False, record_file=tmp_path / "record.json")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["parameters"]["epochs"] == 2 and len(record["git_commit"]) == 40


def test_a_failing_cell_leaves_the_partial_notebook_and_the_former_result(small, tmp_path):
    out = tmp_path / "out.ipynb"
    out.write_text("former")
    with pytest.raises(papermill.PapermillExecutionError, match="this cell failed"):
        notebook.run_notebook(small, out, {"name": "fail"}, progress=False)
    assert out.read_text() == "former"
    assert "this cell failed" in (tmp_path / "out.failed.ipynb").read_text()


def test_papermill_itself_runs_the_same_notebook(small, tmp_path):
    done = papermill.execute_notebook(
        str(small), str(tmp_path / "o.ipynb"), {"epochs": 7}, cwd=ROOT, progress_bar=False
    )
    assert done.cells[-1].outputs[0].text.startswith("7 0.001 a")
