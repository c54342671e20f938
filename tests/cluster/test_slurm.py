"""Stages through SLURM, on a cluster of this one machine: equal results to the bit, and jobs that end with dvc."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from lib.utils.files import ROOT
from tests.pipeline.clones import environment, git, make_clone
from tests.pipeline.test_kills import command_of, files_of, leftovers, wait_for

PROGRAMS = ("sbatch", "srun", "squeue", "slurmctld", "slurmd", "munged")
SCRIPT = Path(__file__).with_name("slurm.sh")
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
PROFILE = "tiny-a"
LAUNCH = "python -m lib.pipeline.launch srun --ntasks=1"
missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: Debian's slurm-wlm and munge have them"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd begins jobs as root alone"),
]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which srun speaks with a cluster of this machine; it ends with the tests."""
    folder = tmp_path_factory.mktemp("slurm")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    changes = {"PATH": path, "CONTROL_PORT": free_port(), "NODE_PORT": free_port()}
    changes["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        subprocess.run(["sh", SCRIPT, "start", folder], check=True, env=os.environ | changes)
        yield changes
    finally:
        subprocess.run(["sh", SCRIPT, "stop", folder], check=True, env=os.environ | changes)
    daemons = [p for p in psutil.process_iter() if str(folder) in command_of(p)]
    assert not daemons and not list(folder.glob("*.pid"))


def command(folder, *words, **changes):
    """Starts a command of a clone, in an environment that runs the clone's own code."""
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(words, cwd=folder, env=environment(folder) | changes, stdout=log, stderr=log)


def repro(folder, *targets, **changes):
    return command(folder, sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *targets, **changes)


def log_of(folder):
    return (folder.parent / f"{folder.name}.log").read_text("utf-8")[-3000:]


def prepared(folder):
    """A clone on a tiny profile with two seeds of experiment 1, and its stages without a launcher."""
    make_clone(folder)
    path = folder / "profiles" / f"{PROFILE}.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["seeds"]["kd_seeds"] = [0, 1]
    path.write_text(yaml.safe_dump(settings))
    git(folder, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "two seeds")
    assert command(folder, sys.executable, "-m", "lib.profile", PROFILE).wait() == 0
    assert repro(folder, "-s", "code", f"data@{PROFILE}").wait() == 0, log_of(folder)
    return folder


def working_in(folder):
    """The processes that run in a folder, dvc's daemon aside."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and "daemon" not in command_of(process):
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def jobs(cluster, states="RUNNING"):
    line = ["squeue", "--noheader", "--format=%A", f"--states={states}"]
    return subprocess.run(line, env=os.environ | cluster, capture_output=True, text=True, check=True).stdout.split()


def script_of_the_page():
    """The file stage.sbatch of docs/cluster.md, without the GPU that this machine need not have."""
    return re.sub(r"#SBATCH --gres=.*\n", "", re.search(r"```sh\n(#!/bin/sh\n.*?)```", PAGE, re.DOTALL)[1])


@pytest.fixture(scope="module")
def direct(tmp_path_factory):
    """A clone whose stages ran without a launcher."""
    folder = prepared(tmp_path_factory.mktemp("direct") / "clone")
    for stage in (f"kd@{PROFILE}-0", f"kd@{PROFILE}-1", f"rd@{PROFILE}-0"):
        assert repro(folder, "-s", stage).wait() == 0, log_of(folder)
    return folder


def assert_equal_results(folder, direct):
    (before, lock), (after, lock_after) = files_of(direct), files_of(folder)
    assert {f"data/{PROFILE}/{kind}/kd-s0.json" for kind in ("records", "metrics")} <= before.keys()
    assert sorted(after) == sorted(before) and [name for name in before if before[name] != after[name]] == []
    assert lock_after == lock and leftovers(folder) == []


def test_stages_through_srun_at_once_and_killed_end_with_equal_results(cluster, direct, tmp_path):
    folder, changes = prepared(tmp_path / "clone"), cluster | {"LAUNCH": LAUNCH}
    for signum in (signal.SIGTERM, signal.SIGKILL):  # a job ends with dvc
        dvc = repro(folder, "-s", f"kd@{PROFILE}-0", **changes)
        assert wait_for(lambda: any("ipykernel" in command_of(p) for p in working_in(folder)), 60), log_of(folder)
        assert len(jobs(cluster)) == 1
        dvc.send_signal(signum)
        dvc.wait(10)
        assert wait_for(lambda: not jobs(cluster, "PENDING,RUNNING,COMPLETING") and not working_in(folder), 20), (
            working_in(folder)
        )
    both = [repro(folder, "-s", f"{stage}@{PROFILE}-0", **changes) for stage in ("kd", "rd")]
    assert wait_for(lambda: len(jobs(cluster)) == 2, 60), "two stages did not run at once"
    assert [dvc.wait(300) for dvc in both] == [0, 0], log_of(folder)
    assert (
        repro(folder, "-s", f"kd@{PROFILE}-1", **(changes | {"LAUNCH": f"{LAUNCH} --overcommit --ntasks=2"})).wait()
        == 0
    )
    assert "process 1 leaves" in log_of(folder)[-3000:]
    assert_equal_results(folder, direct)


def test_the_pages_array_over_seeds_and_its_collecting_run(cluster, direct, tmp_path):
    folder = prepared(tmp_path / "clone")
    (folder / "stage.sbatch").write_text(script_of_the_page())
    for stage, seeds in (("kd", "0-1"), ("rd", "0")):
        words = ("sbatch", "--wait", f"--array={seeds}", "stage.sbatch", stage, PROFILE)
        assert command(folder, *words, **cluster).wait(300) == 0, log_of(folder)
    (folder / "stage.sbatch").unlink()
    assert_equal_results(folder, direct)
    targets = [f"kd@{PROFILE}-0", f"kd@{PROFILE}-1", f"rd@{PROFILE}-0"]
    dry = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--dry", *targets],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lib.run" not in dry.stdout and "didn't change" in dry.stdout
