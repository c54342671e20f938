"""Work side by side ends with the process that asked for it, and says so when a worker is killed."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lib.utils import parallel
from lib.utils.files import ROOT

CODE = """
import os, time
from pathlib import Path
from lib.utils.parallel import parallel_map
def work(k):
    Path(f"{k}").write_text(str(os.getpid()))
    time.sleep(100)
if __name__ == "__main__":
    parallel_map(work, [(0,), (1,)], jobs=2, progress=False)
"""


def test_fault_39_workers_end_with_a_killed_parent(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "script.py").write_text(CODE, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment)
    files, end = [tmp_path / "0", tmp_path / "1"], time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < end:
        time.sleep(0.1)
    workers = [psutil.Process(int(file.read_text())) for file in files]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def kill_worker(parent):
    assert os.getpid() != parent, "only a worker may end"
    os.kill(os.getpid(), signal.SIGKILL)


def test_fault_46_a_worker_killed_by_the_system_is_said(tmp_path):
    message = "pairs: expected 2 processes, got one killed by the system, most often for memory: run with fewer `jobs`"
    with pytest.raises(MemoryError, match=message):
        parallel.parallel_map(kill_worker, [(os.getpid(),)] * 2, jobs=2, desc="pairs", progress=False)
    assert parallel.parallel_map(divmod, [(7, 2), (9, 4)], jobs=2, progress=False) == [(3, 1), (2, 1)]
