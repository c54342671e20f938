"""A repository like this one, small enough to run its whole graph in a test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from lib.utils.files import ROOT


def make_clone(folder):
    """Make a folder a repository of the working tree and two tiny profiles, without results; return it."""
    files = subprocess.run(
        ("git", "ls-files", "-co", "--exclude-standard"), cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for file in files:
        if (
            (not file.startswith(("data/", "figures/", "tests/")) or file == "data/speed.json")
            and (ROOT / file).exists()
            and file != "dvc.lock"
        ):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, target)
    smoke = yaml.safe_load((ROOT / "profiles/smoke.yaml").read_text())
    for name, width in (("tiny-a", 4), ("tiny-b", 5)):  # even less than smoke, and one seed
        kd = {"teacher_width": width, "members": 1, "teacher_epochs": 1, "student_steps": 2, "weight_decays": [0.0]}
        dd = {"proxy_epochs": 1, "test_points": 10, "steps": 2, "cw_steps": 5, "student_steps": 2, "diagnosed": 0}
        rd = {"teacher_width": width, "few_labels": 0, "temperatures": [1.0], "test_points": 10}
        changes = {"profile": name, "seeds": {key: [0] for key in smoke["seeds"]}}
        diff = {"teacher_epochs": 1, "steps": [4, 2, 1], "test_points": 5, "sampled": 2}
        changes |= {
            "kd": smoke["kd"] | kd,
            "dd": smoke["dd"] | dd,
            "rd": smoke["rd"] | rd,
            "diff": smoke["diff"] | diff,
            "dp": smoke["dp"] | {"variants": ["clean", "adaptive", "label", "label-n0"], "test_points": 2},
        }
        (folder / "profiles" / f"{name}.yaml").write_text(yaml.safe_dump(changes))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start")
    return folder


def git(folder, *arguments):
    subprocess.run(("git", *arguments), cwd=folder, check=True, capture_output=True)


def environment(folder):
    """The environment of a command that is to run the clone's own code; dvc takes /bin/sh, as where SHELL is unset."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {
        "SHELL": "/bin/sh",
        "PATH": path,
        "PYTHONPATH": str(folder),
        "DVC_NO_ANALYTICS": "1",
        "CI": "true",
    }
