"""A launcher ends with dvc, and of the processes that it begins one runs the notebook, alone."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from lib.pipeline import launch
from lib.utils.files import ROOT
from tests.pipeline.test_kills import ended

GROUP = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
CELL = (
    "import os\nfrom accelerate import PartialState\nfrom lib.utils.device import use_gpu\n"
    "print(PartialState(cpu=not use_gpu()).num_processes, os.environ.get('WORLD_SIZE'))"
)


def launched(*words, **changes):
    """Starts the command before another one."""
    command = [sys.executable, "-m", "lib.pipeline.launch", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | changes, stderr=subprocess.PIPE, text=True)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def process_of(path):
    """The process whose number is in a file, as soon as it is there."""
    return psutil.Process(int(wait_until(lambda: path.exists() and path.read_text())))


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"RANK": "1"}, 1),
        ({"SLURM_PROCID": "3"}, 3),
        ({"PMI_RANK": "2"}, 2),
        ({"RANK": "0", "PMI_RANK": "2"}, 0),
    ],
)
def test_the_rank_is_that_of_the_innermost_launcher(monkeypatch, variables, rank):
    for name in launch.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.process_rank() == rank


def test_of_several_processes_the_first_runs_the_notebook_and_alone(tmp_path):
    notebook, out = tmp_path / "a.ipynb", tmp_path / "out.ipynb"
    cells = [
        nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(CELL),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), notebook)
    command = [sys.executable, "-m", "lib.run", str(notebook), str(out), "--quiet"]
    second = subprocess.run(command, cwd=ROOT, env=os.environ | GROUP | {"RANK": "1"}, capture_output=True, text=True)
    assert second.returncode == 0 and second.stdout == "" and not out.exists()
    assert second.stderr.startswith("lib.run: process 1 leaves: process 0 of the launcher runs the notebook")
    first = subprocess.run(command, cwd=ROOT, env=os.environ | GROUP, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    assert nbformat.read(out, 4).cells[-2].outputs[0].text == "1 None\n"  # else it waits for the second at port 1


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_the_exit_status_is_that_of_the_launcher(script, status):
    with launched("sh", "-c", script) as process:
        assert process.wait(20) == status


def test_what_cannot_be_launched_is_one_line():
    with launched("no-such-launcher") as process:
        assert process.stderr.read() == "expected a launcher, got 'no-such-launcher': No such file or directory\n"
    with launched() as process:
        assert process.wait() == 1 and process.stderr.read().startswith("expected a launcher, got none: LAUNCH=")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_what_was_launched(tmp_path, signum):
    """The child here ends in its own time, as srun does when it cancels its job."""
    script = (
        f"trap 'sleep 0.3; echo ended > {tmp_path}/end; kill $!; exit' TERM; sleep 60 & echo > {tmp_path}/begun; wait"
    )
    with launched("sh", "-c", script) as process:
        wait_until((tmp_path / "begun").exists)
        process.send_signal(signum)
        assert process.wait(20) == 128 + signum and process.stderr.read() == ""
    assert (tmp_path / "end").read_text() == "ended\n"


def test_what_does_not_end_is_killed_with_its_children(tmp_path):
    child = psutil.Popen(["sh", "-c", f"trap '' TERM; sleep 60 & echo $! > {tmp_path}/pid; wait"])
    inner = process_of(tmp_path / "pid")
    launch.end_processes([child], patience=0.2)
    assert child.wait(5) == -signal.SIGKILL
    wait_until(lambda: ended(inner))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_ends_with_dvc(tmp_path, signum):
    """Here a stand-in for dvc; dvc itself and a real launcher: tests/cluster."""
    words = [sys.executable, "-m", "lib.pipeline.launch", "sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"]
    environment = os.environ | {"DVC_STAGE": "kd@smoke-0"}
    dvc = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({words!r})"], cwd=ROOT, env=environment
    )
    sleep = process_of(tmp_path / "pid")
    dvc.send_signal(signum)
    dvc.wait()
    wait_until(lambda: ended(sleep))
