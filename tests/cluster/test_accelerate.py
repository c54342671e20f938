"""A stage through `accelerate launch` and `torchrun` with two processes: equal results to the bit as by one."""

import subprocess
import sys

import pytest

from tests.pipeline.clones import environment, make_clone
from tests.pipeline.test_kills import files_of, leftovers

PROFILE = "tiny-a"
LAUNCHERS = {  # without --multi_gpu, accelerate begins one process where there is no MPI
    "accelerate": "accelerate launch --no_python --multi_gpu --num_processes 2 --main_process_port 0",
    "torchrun": "torchrun --no-python --standalone --nproc-per-node 2",
}


def run(folder, *words, **changes):
    done = subprocess.run(words, cwd=folder, env=environment(folder) | changes, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_end_with_the_results_of_one(tmp_path):
    folder = make_clone(tmp_path / "clone")
    dvc = (sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s")
    run(folder, sys.executable, "-m", "lib.profile", PROFILE)
    run(folder, *dvc, "code", f"data@{PROFILE}", f"kd@{PROFILE}-0")
    alone = files_of(folder)
    assert f"data/{PROFILE}/models/kd-student-s0.safetensors" in alone[0]
    for launcher in LAUNCHERS.values():
        text = run(folder, *dvc, "--force", f"kd@{PROFILE}-0", LAUNCH=f"python -m lib.pipeline.launch {launcher}")
        assert text.count("wrote data/") == 1 and text.count("lib.run: process 1 leaves") == 1, text[-1500:]
        assert files_of(folder) == alone and leftovers(folder) == []
