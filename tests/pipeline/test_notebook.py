"""`lib.pipeline.notebook` refuses bad parameters before any work, records provenance and saves failed runs."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from nbclient.exceptions import CellExecutionError

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


def test_warnings_in_an_executed_notebook_say_no_path_of_the_machine(tmp_path):
    code = "import warnings\nfrom lib.utils import files\nwarnings.warn('of a cell')\n"
    code += "warnings.warn_explicit('of lib', UserWarning, files.__file__, 3)"
    source = make_notebook(tmp_path / "a.ipynb", PARAMETERS, code)
    notebook.run_notebook(source, tmp_path / "out.ipynb", {}, progress=False, record_file=tmp_path / "record.json")
    text = (tmp_path / "out.ipynb").read_text("utf-8")
    assert "lib/utils/files.py:3: UserWarning: of lib" in text and "cell:3: UserWarning: of a cell" in text
    assert str(ROOT) not in text and "ipykernel_" not in text


def test_a_failing_cell_leaves_the_partial_notebook_and_the_former_result(small, tmp_path):
    out = tmp_path / "out.ipynb"
    out.write_text("former")
    with pytest.raises(CellExecutionError, match="this cell failed"):
        notebook.run_notebook(small, out, {"name": "fail"}, progress=False)
    assert out.read_text() == "former"
    assert "this cell failed" in (tmp_path / "out.failed.ipynb").read_text()


def test_papermill_itself_runs_the_same_notebook(small, tmp_path):
    done = papermill.execute_notebook(
        str(small), str(tmp_path / "o.ipynb"), {"epochs": 7}, cwd=ROOT, progress_bar=False
    )
    assert done.cells[-1].outputs[0].text.startswith("7 0.001 a")


# Processes


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)


WORK = """
import os, time
from pathlib import Path
from lib.utils.parallel import parallel_map
from joblib import parallel_config
folder = Path(name)
(folder / "kernel").write_text(str(os.getpid()))
def sleep(k):
    (folder / f"worker-{k}").write_text(str(os.getpid()))
    time.sleep(100)
if flag:
    parallel_map(sleep, [(0,), (1,)], jobs=2)
time.sleep(100)
"""


def default_signals():
    """Undoes what a shell does to jobs in the background, for which it ignores SIGINT, or nohup SIGHUP."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture
def started(tmp_path):
    """Starts `python -m lib.run` on cells that sleep, and returns it with the numbers of kernel and workers."""
    pids = []

    def start(workers, **options):
        source = make_notebook(tmp_path / "long.ipynb", PARAMETERS, "print('the first cell ran')", WORK)
        arguments = [source, tmp_path / "out.ipynb", "-p", "name", tmp_path, "-p", "flag", str(workers)]
        command = [sys.executable, "-m", "lib.run", *map(str, arguments)]
        run = subprocess.Popen(command, cwd=ROOT, preexec_fn=default_signals, **options)
        files = [tmp_path / name for name in ("kernel", "worker-0", "worker-1")[: 3 if workers else 1]]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
        pids.extend([run.pid, *(int(file.read_text()) for file in files)])
        return run, pids[1:]

    yield start
    for pid in pids:
        if alive(pid):
            psutil.Process(pid).kill()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_fault_39_kernel_and_workers_end_with_the_run(started, tmp_path, signum):
    """And a signal that can be seen leaves the partial notebook."""
    run, children = started(workers=signum in (signal.SIGTERM, signal.SIGKILL), stderr=subprocess.PIPE)
    run.send_signal(signum)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}.get(signum, 128 + signum)
    wait_until(lambda: not any(map(alive, children)))
    failed = tmp_path / "out.failed.ipynb"
    assert failed.exists() == (signum != signal.SIGKILL) and not (tmp_path / "out.ipynb").exists()
    if signum != signal.SIGKILL:
        assert "the first cell ran" in failed.read_text("utf-8")
        assert str(failed) in errors.decode() and "Traceback" not in errors.decode()


def test_fault_39_a_stage_ends_with_dvc(tmp_path):
    """Here a stand-in for dvc, which starts the command and sets DVC_STAGE; dvc itself: test_kills.py."""
    source = make_notebook(tmp_path / "long.ipynb", PARAMETERS, "print('the first cell ran')", WORK)
    command = [sys.executable, "-m", "lib.run", source, tmp_path / "out.ipynb", "-p", "name", tmp_path]
    code = f"import subprocess; subprocess.run({[str(word) for word in command]!r})"
    dvc = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"DVC_STAGE": "kd@smoke-0"})
    wait_until(lambda: (tmp_path / "kernel").exists() and (tmp_path / "kernel").read_text(), 60)
    family = [child.pid for child in psutil.Process(dvc.pid).children(recursive=True)]
    assert int((tmp_path / "kernel").read_text()) in family and len(family) >= 2
    dvc.kill()
    dvc.wait()
    wait_until(lambda: not any(map(alive, family)))
    assert "the first cell ran" in (tmp_path / "out.failed.ipynb").read_text("utf-8")


# Failures that say file, cause and remedy


def test_fault_46_a_dead_kernel_is_one_line(tmp_path):
    source = make_notebook(tmp_path / "a.ipynb", PARAMETERS, "print('first')", "import os\nos.kill(os.getpid(), 9)")
    done = cli(source, tmp_path / "out.ipynb")
    *_, last = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith(f"lib.run: {source}: the kernel died, most often killed by the system for memory")
    assert "free memory" in last and "first" in (tmp_path / "out.failed.ipynb").read_text("utf-8")


@pytest.mark.parametrize("kind", ["OSError(28, 'No space left on device', 'data/x.json')", "MemoryError('too little')"])
def test_fault_46_a_full_disk_or_memory_in_a_cell_is_one_line(tmp_path, kind):
    source = make_notebook(tmp_path / "a.ipynb", PARAMETERS, f"raise {kind}")
    done = cli(source, tmp_path / "out.ipynb")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    *_, place, last = done.stderr.splitlines()
    assert "out.failed.ipynb" in place and last.startswith(f"lib.run: {source}: {kind.split('(')[0]}: ")


@pytest.mark.parametrize("full", [1, 2])
def test_fault_46_a_full_disk_never_loses_the_executed_notebook(small, tmp_path, monkeypatch, capsys, full):
    """Where the notebook's folder takes nothing, the one of temporary files does, else the home folder."""
    folders = [tmp_path / name for name in ("results", "temporary", "home")]
    for folder in folders:
        folder.mkdir()
    write, (results, temporary, home) = nbformat.write, folders

    def write_if_room(notebook_, part):
        if Path(part).parent in folders[:full]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(notebook_, part)

    monkeypatch.setattr(nbformat, "write", write_if_room)
    monkeypatch.setattr(notebook.tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.setattr(Path, "home", lambda: home)
    rescued = folders[full] / f"out.{os.getpid()}.ipynb"
    with pytest.raises(OSError, match=f"out.ipynb cannot be written; the executed notebook is {rescued}: free space"):
        notebook.run_notebook(small, results / "out.ipynb", {}, progress=False)
    cells = nbformat.read(rescued, as_version=4).cells
    assert any("3 0.001 a" in str(cell.get("outputs")) for cell in cells)
    assert "No space left" in capsys.readouterr().err and not list(results.iterdir())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'"text"', b"\xff\xfe", b'{"nbformat": 99, "cells": 3}', b"1" * 300, b"PK\x03\x04\x00"],
)
def test_fault_46_what_is_no_notebook_is_named(tmp_path, content):
    path = tmp_path / "a.ipynb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected .*a\.ipynb.*") as error:
        parameters.notebook_defaults(path)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_fault_41_46_targets_are_refused_before_the_run(small, tmp_path, monkeypatch):
    """The notebook itself, under any name, what is no regular file, and a name that two files would share."""
    monkeypatch.setattr(notebook, "execute", lambda _: pytest.fail("runs"))
    (tmp_path / "folder.ipynb").mkdir()
    (tmp_path / "link.ipynb").symlink_to(small)
    (tmp_path / "hard.ipynb").hardlink_to(small)
    (tmp_path / "b.failed.ipynb").write_bytes(small.read_bytes())
    os.mkfifo(tmp_path / "pipe.ipynb")
    before = small.read_bytes()
    for out in ("small", "folder", "link", "hard", "pipe", "../" + tmp_path.name + "/small", "small.ipynb/a"):
        with pytest.raises(ValueError, match="expected"):
            notebook.run_notebook(small, tmp_path / f"{out}.ipynb", {})
    with pytest.raises(ValueError, match="the notebook itself"):  # where a failed run would be saved
        notebook.run_notebook(tmp_path / "b.failed.ipynb", tmp_path / "b.ipynb", {})
    with pytest.raises(ValueError, match="expected OUT to be a notebook"):
        notebook.run_notebook(small, tmp_path / "out.json", {})
    for record in ("small.ipynb", "out.ipynb", "folder.ipynb"):
        with pytest.raises(ValueError, match="expected"):
            notebook.run_notebook(small, tmp_path / "out.ipynb", {}, record_file=tmp_path / record)
    assert small.read_bytes() == before
    done = cli(small, small)
    assert done.returncode == 2 and "the notebook itself" in done.stderr and len(done.stderr.splitlines()) == 1


def test_fault_23_a_run_prints_in_any_locale(tmp_path):
    source = make_notebook(tmp_path / "ε.ipynb", PARAMETERS, "# ε\nprint('ε = 8/255')")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "LANG")} | locale
    command = [sys.executable, "-m", "lib.run", str(source), str(tmp_path / "out.ipynb"), "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ε = 8/255" in (tmp_path / "out.ipynb").read_text("utf-8")


def test_cells_run_by_hand_alone_are_left_as_they_are(tmp_path):
    """With no output, and with no effect on the cells after them."""
    path = make_notebook(tmp_path / "in.ipynb", PARAMETERS, "epochs = 0\nprint(epochs)", "print(epochs)")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].metadata["tags"] = ["interactive"]
    nbformat.write(nb, path)
    notebook.run_notebook(path, tmp_path / "out.ipynb", {"epochs": 7}, progress=False)
    by_hand, last = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-3:-1]
    assert by_hand.source.startswith("epochs = 0") and not by_hand.outputs and by_hand.execution_count is None
    assert last.outputs[0]["text"] == "7\n"
