"""What a run of a notebook depends on: code, commit, parameters, versions, device."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from lib.utils.code_hash import tree_hash
from lib.utils.files import ROOT

PACKAGES = ("torch", "diffusers", "torchattacks", "accelerate", "numpy", "scipy", "scikit-learn", "papermill", "dvc")
NO_REPOSITORY = "not a git repository"


def run_git(*arguments: str) -> tuple[bytes, bytes]:
    """Return output and errors of a git command at the root; nothing where there is no git.

    It asks about this folder, whatever repository the environment's GIT_DIR names, as it does within a git hook.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    command = ("git", "-C", str(ROOT), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, env=environment | {"LC_ALL": "C"})
    except OSError:
        return b"", b""
    return done.stdout, done.stderr


def git_text(*arguments: str) -> tuple[str, str]:
    """Return output and errors of `run_git` as text, without space around them."""
    output, errors = run_git(*arguments)
    return os.fsdecode(output).strip(), os.fsdecode(errors).strip()


def git_state() -> tuple[str, bool | None]:
    """Return the commit of this checkout, and whether code differs from it, modules that git does not know included.

    A repository that the project only lies in is not its own: without a commit the second is None, unknown.
    """
    top, errors = git_text("rev-parse", "--show-toplevel")
    if "dubious ownership" in errors:
        return f"unknown: another user owns the repository, allow it by git config safe.directory {ROOT}", None
    if not top or Path(top).resolve() != ROOT.resolve():
        return NO_REPOSITORY, None
    commit, _ = git_text("rev-parse", "--verify", "--quiet", "HEAD")
    changes, _ = git_text("status", "--porcelain", "-uall", "--", "lib", "notebooks", "profiles")
    return (commit, bool(changes)) if commit else ("no commit yet", None)


def provenance(notebook: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return what a result depends on, taken at the start: commit, hash of the code as it is, parameters, versions."""
    from lib.pipeline.parameters import notebook_defaults  # reads notebooks, which most who name a commit do without

    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    parameters, (commit, dirty) = notebook_defaults(notebook) | values, git_state()
    return {
        "notebook": os.fsencode(notebook.name).decode(errors="replace"),  # in any locale
        "parameters": parameters,
        "seed": parameters.get("seed"),
        "git_commit": commit,
        "git_dirty": dirty,
        "code_sha256": tree_hash(),
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES if p in installed},
        "python": platform.python_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name() -> str:
    """Return the name of the device; importing torch takes seconds, so this runs while the kernel starts."""
    import torch

    from lib.utils.device import use_gpu

    if use_gpu():
        return torch.cuda.get_device_name()
    return f"CPU, threads: {os.environ.get('OMP_NUM_THREADS') or torch.get_num_threads()}"


def provenance_text(record: dict[str, Any]) -> str:
    """Return a finished run's record as a line to read."""
    commit = record["git_commit"]
    at = f"at commit `{commit[:12]}`" if record["git_dirty"] is not None else f"({commit})"
    dirty = " with uncommitted changes" if record["git_dirty"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in record["packages"].items())
    text = f"Run of `{record['notebook']}` {at}{dirty}, code `{record['code_sha256'][:12]}`, seed {record['seed']}, "
    return text + f"{record['device']}, Python {record['python']}, {record['wall_seconds']:.0f} s. {versions}."
