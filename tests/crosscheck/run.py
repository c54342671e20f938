"""Cross-check our attacks with foolbox, adv-lib and ART: `python -m tests.crosscheck.run`, once per change of them.

tests/crosscheck/passed.txt holds the hash of the code that passed last and its result. While it fits, that result is
printed; otherwise `make crosscheck` compares anew, in an environment of its own, and writes the file (in CI, nobody
commits it). Needs the standard library alone.
"""

import argparse
import hashlib
import subprocess
from pathlib import Path
from typing import Any

from lib.utils.code_hash import hash_files
from lib.utils.files import ROOT, write_text

HERE = Path("tests/crosscheck")
PASSED = HERE / "passed.txt"


def attacks_hash(root: Path = ROOT) -> str:
    """Return the hash of the attacks' code, of the cross-check's and of the versions that it compares with."""
    paths = [path for folder in ("lib/attacks", HERE) for path in sorted((root / folder).glob("*.py"))]
    code = hash_files((path.relative_to(root) for path in paths), root)
    versions = (root / HERE / "requirements.txt").read_text(encoding="utf-8")
    return hashlib.sha256(f"{code}\n{versions}".encode()).hexdigest()


def passed_summary(root: Path = ROOT) -> str | None:
    """Return the summary of the run that passed with this very code; None if there was none."""
    path = root / PASSED
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return lines[-1] if len(lines) > 1 and lines[0] == attacks_hash(root) else None


class Report:
    """A pytest plugin that collects the lines and numbers of all comparisons and prints them at the end."""

    def __init__(self) -> None:
        self.properties: list[tuple[str, Any]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Collect what a test recorded."""
        if report.when == "call":
            self.properties += report.user_properties

    def values(self, name: str) -> list[Any]:
        """Return all values recorded under `name`."""
        return [value for key, value in self.properties if key == name]

    def summary(self) -> str:
        """Return the cross-check's result in one line."""
        images, distances = self.values("images"), self.values("distance")
        most, farthest = max(0, *images), max(0.0, *distances)
        uncounted = "".join(f"; not counted: {name}" for name in self.values("uncounted"))
        return (
            f"cross-check: {len(images)} comparisons, largest disadvantage {most} image{'s' * (most != 1)} of 128, "
            f"median distance at most {100 * farthest:.1f} % above{uncounted}"
        )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print one line per comparison."""
        for line in self.values("line"):
            terminalreporter.write_line(line)


def compare() -> int:
    """Run the cross-check in this environment, write `passed.txt` if it passes, and return the exit status."""
    import pytest

    report = Report()
    status = int(pytest.main(["-q", str(ROOT / HERE)], plugins=[report]))
    if status == 0:
        write_text(ROOT / PASSED, "\n".join([attacks_hash(), *report.values("line"), report.summary()]) + "\n")
        print(report.summary())
    return status


def main(root: Path = ROOT) -> None:
    """Print the stored result while it fits the code; compare anew otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.crosscheck.run", description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="compare now, with the packages of this environment")
    if parser.parse_args().here:
        raise SystemExit(compare())
    if summary := passed_summary(root):
        print(f"{summary} (cached: attacks unchanged)")
    else:
        raise SystemExit(subprocess.run(["make", "--no-print-directory", "crosscheck"], cwd=root).returncode)


if __name__ == "__main__":
    main()
