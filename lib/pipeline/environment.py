"""Check and complete the environment: `python -m lib.pipeline.environment`; needs the standard library alone.

torchattacks 3.5.1 declares `requests~=2.25.1`, which jupyterlab >= 4 refuses; resolved together, pip silently goes
back to jupyterlab 3. It imports only torch, numpy and scipy, so it is installed by itself, without its dependencies:
here, for venv and conda alike, and nowhere else.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
TORCHATTACKS = "3.5.1"
# CUDA builds of torch bring these along, CPU builds do not: the lock is for both
CUDA = re.compile(r"^(nvidia-|triton$|pytorch-triton|cuda-)")


def declared_dependencies() -> list[str]:
    """Return the dependencies with their bounds as pyproject.toml declares them."""
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]


def environment_problems() -> list[str]:
    """Return what this environment lacks to run the project, one line each; empty when it is complete."""
    problems = [] if sys.version_info >= (3, 11) else [f"Python: expected 3.11 or newer, got {sys.version.split()[0]}"]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [*problems, "expected packaging, which is missing"]
    for line in (*declared_dependencies(), f"torchattacks=={TORCHATTACKS}", "distilled-defence"):
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"expected {requirement}, which is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"expected {requirement}, got {version}")
    return problems


def installed_closure() -> dict[str, str]:
    """Return name and version of every direct and transitive dependency that is installed, without CUDA's packages."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    todo, versions, seen = [Requirement(line) for line in declared_dependencies()], {}, set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if CUDA.match(name) or (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            versions[name] = importlib.metadata.version(name).split("+")[0]  # a local tag such as +cpu names one build
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return dict(sorted(versions.items()))


def main() -> None:
    """Complete and check the environment."""
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.environment", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only check: exit status 1 names what is missing")
    parser.add_argument("--lock", action="store_true", help="write requirements.txt from what is installed")
    options = parser.parse_args()
    if not options.check and any("torchattacks" in line for line in environment_problems()):
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"torchattacks=={TORCHATTACKS}"]
        subprocess.run(install, check=True)
    if problems := environment_problems():
        raise SystemExit("the environment is incomplete:\n  " + "\n  ".join(problems))
    if options.lock:
        head = "# Exact versions of all direct and transitive packages, by `make lock`; bounds are in pyproject.toml.\n"
        (PROJECT / "requirements.txt").write_text(head + "".join(f"{k}=={v}\n" for k, v in installed_closure().items()))
    print("the environment is complete")


if __name__ == "__main__":
    main()
