"""Kills at random moments of every stage: a rerun ends with files equal to the bit, and no process is left behind."""

import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.pipeline.clones import environment, make_clone

PROFILE = "tiny-a"
STAGES = ("code", "data", "kd", "dd", "rd", "diff", "dp", "report")
RUN_BY_HAND = ("lib.pipeline.code", "lib.data")  # stages without a notebook
VOLATILE = ("timing", "provenance", "checkpoints")  # clocks and interrupted work
SECONDS = 10  # after its parent's death no process is left


def target_of(stage):
    return {"code": "code", "data": f"data@{PROFILE}", "report": f"report@{PROFILE}"}.get(stage, f"{stage}@{PROFILE}-0")


def repro(folder, stage, *options):
    """Starts dvc on one stage, in an environment that runs the clone's own code."""
    command = [sys.executable, "-m", "dvc", "repro", *options, "-s", target_of(stage)]
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log)


def files_of(folder):
    """Every result with its content, and what dvc.lock says of the stages."""
    places = [folder / "data" / PROFILE, folder / "figures" / PROFILE, folder / "data/code"]
    paths = [
        p for place in places for p in sorted(place.rglob("*")) if p.is_file() and not set(VOLATILE) & set(p.parts)
    ]
    lock = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}, lock


def leftovers(folder):
    return [str(p) for pattern in ("*.part", "*.failed.ipynb") for p in folder.rglob(pattern) if ".dvc" not in p.parts]


def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def family_of(dvc):
    """dvc's descendants by role: the stage's command, the kernel, and all of them."""
    try:
        children = psutil.Process(dvc.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    roles = {"all": [child for child in children if "daemon" not in command_of(child)]}
    for child in children:
        if "ipykernel" in command_of(child):
            roles.setdefault("kernel", child)
        elif any(module in command_of(child) for module in ("lib.run", *RUN_BY_HAND)):
            roles.setdefault("run", child)
    return roles


def ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


def kill_once(folder, stage, role, signum, moment):
    """Start a stage, done or not, and kill dvc, its command or the kernel `moment` seconds after that one began; say
    whether it was still running."""
    dvc = repro(folder, stage, "--force")
    wait_for(lambda: dvc.poll() is not None or ("run" if role == "dvc" else role) in family_of(dvc), 60)
    wait_for(lambda: dvc.poll() is not None, moment)
    roles = family_of(dvc)
    victim = psutil.Process(dvc.pid) if role == "dvc" and dvc.poll() is None else roles.get(role)
    if victim is None or dvc.poll() is not None:
        dvc.wait(300)
        return False
    below = [child for child in victim.children(recursive=True) if "daemon" not in command_of(child)]
    victim.send_signal(signum)
    if role == "dvc":
        dvc.wait(SECONDS)
    else:
        assert wait_for(lambda: ended(victim), SECONDS), f"{role} of {stage} outlives {signum!r}"
    left = wait_for(lambda: all(map(ended, below)), SECONDS) or [
        command_of(child) for child in below if not ended(child)
    ]
    assert left is True, f"{stage}, {role} killed by {signum!r}: still there after {SECONDS} s: {left}"
    dvc.wait(60)
    assert not [child for child in roles["all"] if not ended(child)]
    return True


@pytest.mark.kills
def test_fault_39_kills_at_any_moment_leave_no_process_and_change_no_result(tmp_path):
    """At least twelve over all stages, by both signals, of dvc, of `lib.run` and of the kernel, at seeded moments."""
    rng, kills, seconds = random.Random(0), [], {}
    calm, killed = make_clone(tmp_path / "calm"), make_clone(tmp_path / "killed")
    for folder in (calm, killed):
        command = (sys.executable, "-m", "lib.profile", PROFILE)
        subprocess.run(command, cwd=folder, env=environment(folder), check=True, stdout=subprocess.DEVNULL)
    for stage in STAGES:
        began = time.monotonic()
        assert repro(calm, stage).wait() == 0, (tmp_path / "calm.log").read_text("utf-8")[-3000:]
        seconds[stage] = time.monotonic() - began
    roles = {stage: ("dvc", "run") if stage in ("code", "data") else ("dvc", "run", "kernel") for stage in STAGES}
    for number, stage in enumerate(STAGES):
        for k in range(2):
            role = roles[stage][(number + k) % len(roles[stage])]
            signum = signal.SIGTERM if (number + 2 * k) % 3 == 0 else signal.SIGKILL
            moment = rng.random() * (seconds[stage] - 3) * 0.7 if seconds[stage] > 4 else rng.random() * 0.3
            for _ in range(4):  # the machine may be quieter by now than when the stage's time was taken
                if kill_once(killed, stage, role, signum, moment):
                    kills.append((stage, role, signum.name, round(moment, 1)))
                    break
                moment /= 3
        assert repro(killed, stage).wait() == 0, (tmp_path / "killed.log").read_text("utf-8")[-3000:]
    print(kills, seconds)
    assert len(kills) >= 12 and {stage for stage, *_ in kills} >= set(STAGES) - {"code"}, kills
    assert {role for _, role, *_ in kills} == {"dvc", "run", "kernel"}
    (before, lock), (after, lock_after) = files_of(calm), files_of(killed)
    assert sorted(after) == sorted(before) and [name for name in before if before[name] != after[name]] == []
    assert lock_after == lock and leftovers(killed) == []
    shutil.rmtree(tmp_path / "killed")
