"""The repository's root, and atomic writes of text and canonical JSON.

Imports no torch, so that commands that only read and write start at once.
"""

import io
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
    """Yield a temporary path to write to, and rename it to `path` at the end: `path` never holds a partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_jsonable(value: Any) -> Any:
    """Return `value` with tensors, arrays and paths as JSON types; NaN and infinity become null."""
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


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically."""
    with atomic_path(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically: sorted keys, no NaN, each list on one line."""
    write_text(path, dump_canonical(to_jsonable(value)) + "\n")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file; ValueError, which names file and remedy, for one that is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a JSON file, got {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"expected JSON in {path}, got {problem}: restore it, or run what writes it") from None


def dump_canonical(value: Any, indent: str = "") -> str:
    """Return JSON of JSON types with sorted keys; the items of a list stay on its line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    inner = indent + "  "
    items = [
        f"{inner}{json.dumps(k, ensure_ascii=False)}: {dump_canonical(v, inner)}" for k, v in sorted(value.items())
    ]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def compress_png(content: bytes, colours: int = 256) -> bytes:
    """Return a PNG file with a palette of so many colours, less than half as large; equal files give equal bytes."""
    from PIL import Image  # which most who write files can do without

    with Image.open(io.BytesIO(content)) as image:
        opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    buffer = io.BytesIO()
    method, dither = Image.Quantize.MEDIANCUT, Image.Dither.NONE
    opaque.quantize(colours, method=method, dither=dither).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
