"""Check and complete the environment: `python -m lib.pipeline.environment`; needs the standard library alone.

The one place that says how to install, for venv and conda alike, in steps, as pip checks hashes for all packages of a
command or for none. requirements.txt has the hashes of every file of every package and is installed as it stands,
without resolving anything: torchattacks 3.5.1 declares `requests~=2.25.1`, which jupyterlab >= 4 refuses, and imports
only torch, numpy and scipy. torch comes by version alone, from whichever index has the build for this machine, each
with hashes of its own, and brings the CUDA packages that it needs. The project itself comes last. With `--docs`, what
builds the documentation follows; users do not need it.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
TORCHATTACKS = "3.5.1"
LOCK, TORCH_LOCK, CROSSCHECK_LOCK = "requirements.txt", "requirements-torch.txt", "tests/crosscheck/requirements.txt"
DOCS, DOCS_LOCK = "docs", "requirements-docs.txt"  # the extra of pyproject.toml, and what it needs besides
SEPARATE = ("crosscheck", "docs")  # parts of pyproject.toml that this environment does without
STEPS = (  # arguments of `pip install`
    ("--require-hashes", "--no-deps", "-r", LOCK),
    ("--no-warn-conflicts", "-r", TORCH_LOCK),  # torchattacks' one is known
    ("--no-deps", "--no-build-isolation", "-e", "."),
)
DOCS_STEP = ("--require-hashes", "--no-deps", "-r", DOCS_LOCK)
HEADS = {
    LOCK: """\
# Exact versions of all packages but torch, direct and transitive, with the SHA-256 of each file, by `make lock`; bounds
# are in pyproject.toml. Install by `python -m lib.pipeline.environment`, which knows the order and the options.
""",
    TORCH_LOCK: """\
# By version alone: torch's builds for CPUs and for each CUDA come from different indexes, with hashes of their own.
""",
    DOCS_LOCK: """\
# Exact versions and hashes of what `make docs` needs besides /requirements.txt, by `make lock`; bounds are those of the
# extra `docs` in pyproject.toml.
""",
    CROSSCHECK_LOCK: """\
# Exact versions and hashes for `make crosscheck`, by `make lock`; shared ones are those of /requirements.txt. Installed
# without dependencies, since adv-lib and torchattacks ask for packages that no attack here needs.
""",
}
# CUDA builds of torch bring these along, CPU builds do not: the lock is for both
CUDA = re.compile(r"^(nvidia-|triton$|pytorch-triton|cuda-)")


def declared_dependencies(extra: str | None = None) -> list[str]:
    """Return the dependencies with their bounds as pyproject.toml declares them: those of an extra, or of all parts.

    Parts are the core, extras and groups, but for the extras in `SEPARATE`, which this environment does without.
    """
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    parts = declared["project"]["optional-dependencies"] | declared["dependency-groups"]
    chosen = [extra] if extra else [name for name in parts if name not in SEPARATE]
    lists = [[] if extra else declared["project"]["dependencies"], *(parts[name] for name in chosen)]
    return list(dict.fromkeys(line for lines in lists for line in lines))


def environment_problems() -> list[str]:
    """Return what this environment lacks to run the project, one line each; empty when it is complete."""
    problems = [] if sys.version_info >= (3, 11) else [f"Python: expected 3.11 or newer, got {sys.version.split()[0]}"]
    lines = (*declared_dependencies(), f"torchattacks=={TORCHATTACKS}", "distilled-defence")
    return problems + requirement_problems(lines)


def requirement_problems(lines: Iterable[str]) -> list[str]:
    """Return which requirements this environment does not fulfil, one line each."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["expected packaging, which is missing"]
    problems = []
    for line in lines:
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"expected {requirement}, which is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"expected {requirement}, got {version}")
    return problems


def installed_closure(extra: str | None = None) -> dict[str, str]:
    """Return name and version of every direct and transitive dependency that is installed, without CUDA's packages.

    With an extra, those of the extra.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    todo, versions, seen = [Requirement(line) for line in declared_dependencies(extra)], {}, set()
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


def read_pins(path: Path) -> dict[str, str]:
    """Return name and version of each package that a lock file pins."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.rstrip(" \\").split("==") for line in lines if re.match(r"[a-z0-9]", line))


def write_lock(name: str, pins: dict[str, str]) -> None:
    """Write a lock file, with the hashes of all files that the package index has of these versions, by uv."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--no-deps", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--python-version", "3.11"]
    lines = "".join(f"{package}=={version}\n" for package, version in sorted(pins.items()))
    done = subprocess.run(command, input=lines.encode(), stdout=subprocess.PIPE, check=True)
    (PROJECT / name).write_bytes(HEADS[name].encode() + done.stdout)


def lock() -> None:
    """Write all lock files: of what is installed here, and the cross-check's with the same versions."""
    pins = installed_closure() | {"torchattacks": TORCHATTACKS}
    write_lock(DOCS_LOCK, {k: v for k, v in installed_closure(DOCS).items() if k not in pins})
    torch = pins.pop("torch")
    write_lock(LOCK, pins)
    (PROJECT / TORCH_LOCK).write_text(f"{HEADS[TORCH_LOCK]}torch=={torch}\n", encoding="utf-8")
    write_lock(
        CROSSCHECK_LOCK, {k: pins.get(k, v) for k, v in read_pins(PROJECT / CROSSCHECK_LOCK).items() if k != "torch"}
    )


def install(steps: Iterable[tuple[str, ...]] = STEPS) -> None:
    """Install into this environment: the locked packages and the project, in steps."""
    for step in steps:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step]
        subprocess.run(pip, check=True, cwd=PROJECT)


def main() -> None:
    """Complete and check the environment."""
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.environment", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only check: exit status 1 names what is missing")
    parser.add_argument(
        "--install", action="store_true", help="install the locked versions, even if nothing is missing"
    )
    parser.add_argument("--list", action="store_true", help="only print what pyproject.toml declares, one a line")
    parser.add_argument("--lock", action="store_true", help="only write requirements*.txt from what is installed")
    parser.add_argument("--docs", action="store_true", help="what `make docs` needs, too")
    options = parser.parse_args()
    if options.list:
        print(*declared_dependencies(), sep="\n")
        return
    steps = STEPS if options.install or (not (options.check or options.lock) and environment_problems()) else ()
    if options.docs and not options.check and (steps or requirement_problems(declared_dependencies(DOCS))):
        steps += (DOCS_STEP,)
    try:
        install(steps)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"expected pip to install, got exit status {error.returncode}: see its message") from None
    extra = declared_dependencies(DOCS) if options.docs or options.lock else []
    if problems := environment_problems() + requirement_problems(extra):
        raise SystemExit("the environment is incomplete:\n  " + "\n  ".join(problems))
    if options.lock:
        lock()
    print("the environment is complete")


if __name__ == "__main__":
    main()
