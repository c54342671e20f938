"""The repository's root, whatever the working directory is, and how every file of the project is written: whole.

Needs no torch, so that what only reads and writes begins at once.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Lends a path beside `path` to write to and moves it there at the end: no one ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_jsonable(value: Any) -> Any:
    """Returns `value` with tensors, arrays and paths turned into JSON's types; NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return to_jsonable(value.tolist())
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Iterable):
        return [to_jsonable(v) for v in value]
    return str(value)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that `path` always holds a whole one."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes canonical JSON: sorted keys, one line end, no NaN; nested lists of numbers stay on one line."""
    write_text(path, _dumps(to_jsonable(value), "") + "\n")


def _dumps(value: Any, indent: str) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    inner = indent + "  "
    rows = [f"{inner}{json.dumps(k, ensure_ascii=False)}: {_dumps(v, inner)}" for k, v in sorted(value.items())]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
