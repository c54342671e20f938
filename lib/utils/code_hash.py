"""Hashes of the code that decides a result; `python -m lib.pipeline.code` writes them to `data/code/<experiment>.txt`.

A hash covers a notebook's code cells and every module of `lib` that they import, directly or not, as text without
docstrings, comments and blank lines. Stages of `dvc.yaml` depend on their hash alone: an edit that changes no result
reruns no experiment. How results are drawn, told in words and decided upon (`REPORT`), and what that alone imports,
counts for the report only: experiments save their records without it. Needs no torch.
"""

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from lib.utils.files import ROOT, write_text

CODE = "data/code"
REPORT = Path("lib/report")
SOURCES = {  # of each hash; the names are those of the stages
    "data": "lib/data.py",
    "kd": "notebooks/01_classic_kd.ipynb",
    "dd": "notebooks/02_defensive_distillation.ipynb",
    "rd": "notebooks/03_robust_distillation.ipynb",
    "diff": "notebooks/04_diffusion_distillation.ipynb",
    "dp": "notebooks/05_distilled_diffpure.ipynb",
    "report": "notebooks/06_report.ipynb",
}


class StaleCode(ValueError):
    """A hash that does not belong to the code as it is now."""


def code_of(path: Path) -> str:
    """Return the Python source of a module, or of all code cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    return "\n".join("".join(cell["source"]) for cell in cells) + "\n"


@cache
def without_prose(source: str) -> str:
    """Return Python source without docstrings, comments and blank lines; text, since syntax trees differ by version.

    Raises SyntaxError for source that is no Python.
    """
    lines = [line.encode() for line in source.splitlines()]  # ast counts bytes
    cuts, strings = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            text = node.body[0]
            last = (text.end_lineno or text.lineno) - 1
            cuts.append((text.lineno - 1, text.col_offset, last, text.end_col_offset or len(lines[last])))
        elif isinstance(node, ast.JoinedStr | ast.Constant) and (node.end_lineno or 0) > node.lineno:
            strings |= set(range(node.lineno - 1, node.end_lineno or 0))  # blank lines within text count
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row = token.start[0] - 1
            cuts.append((row, len(token.line[: token.start[1]].encode()), row, len(lines[row])))
    for first, begin, last, end in sorted(cuts, reverse=True):
        lines[first] = lines[first][:begin] + lines[last][end:]
        for row in range(first + 1, last + 1):
            lines[row] = b""
            strings.discard(row)
        strings.discard(first)
    cut = (line if row in strings else line.rstrip() for row, line in enumerate(lines))
    return b"\n".join(line for row, line in enumerate(cut) if line or row in strings).decode()


@cache
def imported_stems(source: str) -> frozenset[Path]:
    """Return what a piece of Python imports of `lib`: every part of every dotted name, as a path without suffix."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names if name.split(".")[0] == "lib"]
    return frozenset(Path(*part[:k]) for part in parts for k in range(1, len(part) + 1))


def imported_modules(source: str, root: Path = ROOT) -> set[Path]:
    """Return the files of `lib` that a piece of Python imports, relative to `root`, with their packages."""
    stems = imported_stems(source)
    files = {file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py")}
    return {file for file in files if (root / file).is_file()}


def import_closure(start: Path, root: Path = ROOT, without: Path | None = None) -> list[Path]:
    """Return a module or notebook and all files of `lib` that it imports, directly or not, relative to `root`.

    The files of the folder `without` are left out, and so is what they alone import.
    """
    todo, seen = [start], set()
    while todo:
        path = todo.pop()
        if path not in seen and without not in path.parents:
            seen.add(path)
            todo += imported_modules(code_of(root / path), root)
    return sorted(seen)


def hash_files(paths: Iterable[Path], root: Path = ROOT) -> str:
    """Return a SHA-256 of the names and the code of files, given relative to `root`."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(f"{path.as_posix()}\n{without_prose(code_of(root / path))}\n".encode())
    return sha.hexdigest()


def code_hash(name: str, root: Path = ROOT) -> str:
    """Return the hash of an experiment, a key of `SOURCES`; what is in `REPORT` counts for "report" alone."""
    return hash_files(import_closure(Path(SOURCES[name]), root, None if name == "report" else REPORT), root)


def check_code(name: str, root: Path = ROOT) -> None:
    """Raise StaleCode, which names file and remedy, unless the written hash of an experiment is that of the code."""
    path = root / CODE / f"{name}.txt"
    known, now = path.read_text(encoding="utf-8").strip() if path.is_file() else "no file", code_hash(name, root)
    if known != now:
        raise StaleCode(
            f"{CODE}/{name}.txt is stale: expected {now[:12]}…, got {known[:12]}…: run `dvc repro code` first"
        )


def tree_hash(root: Path = ROOT) -> str:
    """Return a SHA-256 of all of `lib` and `notebooks` as it is, prose and files that git does not know included.

    The names and the content of modules, notebooks and settings (YAML), line ends as LF.
    """
    sha = hashlib.sha256()
    files = (
        f
        for folder in ("lib", "notebooks")
        for kind in ("py", "ipynb", "yaml")
        for f in (root / folder).rglob(f"*.{kind}")
    )
    for path in sorted(
        f for f in files if ".ipynb_checkpoints" not in f.parts and not f.name.endswith(".failed.ipynb")
    ):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        sha.update(f"{path.relative_to(root).as_posix()}\n{hashlib.sha256(content).hexdigest()}\n".encode())
    return sha.hexdigest()


@cache
def core_hash() -> str:
    """Return the hash of all modules that can decide what a training or an evaluation computes."""
    files = (path.relative_to(ROOT) for path in sorted((ROOT / "lib").rglob("*.py")))
    return hash_files(f for f in files if f.parts[1] not in ("report", "pipeline"))


def fingerprint(*facts: Any) -> str:
    """Return a short hash of `facts` and of the code: other settings or another computation make another one."""
    return hashlib.sha256(f"{facts!r} {core_hash()}".encode()).hexdigest()[:16]


def main() -> None:
    """Write the hash of every experiment; a file whose hash has not changed stays as it is."""
    for name in SOURCES:
        write_text(ROOT / CODE / f"{name}.txt", code_hash(name) + "\n")


if __name__ == "__main__":
    main()
