"""The repository's root, and atomic writes of text and canonical JSON.

Imports no torch, so that commands that only read and write start at once.
"""

import errno
import gzip
import io
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
LEFTOVER = re.compile(r"(.+)\.([1-9][0-9]*)\.part", re.DOTALL)  # what `part_path` names: target and process
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FILE_KINDS = {  # of what is at a path, by `stat`
    stat.S_ISDIR: "a folder",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
}


def shown_path(path: Path) -> str:
    """Return a path as messages show it, in one line whatever characters its name has."""
    return str(path) if str(path).isprintable() else repr(str(path))


def part_path(path: Path) -> Path:
    """Return the path, beside `path` and of this process alone, at which to write what will be renamed to `path`.

    No image, network, notebook or record has a name that ends in `.part`; `sweep_leftovers` knows it by its name.
    """
    return path.with_name(f"{_stem(path.name)}.{os.getpid()}.part")


def _stem(name: str) -> str:
    """Return what a temporary file's name begins with: a target's name, cut so that more fits into 255 bytes."""
    return os.fsdecode(os.fsencode(name)[:200])


def _is_written(path: Path, pid: int) -> bool:
    """Say whether the process that a temporary file is named after may still write it.

    Numbers of processes come again: one that began a minute or more after the last write is another one.
    """
    with suppress(psutil.Error, FileNotFoundError):  # FileNotFoundError: just renamed, so a new one may follow
        return psutil.Process(pid).create_time() < path.lstat().st_mtime + 60
    return psutil.pid_exists(pid)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep_leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Remove what killed processes left half-written directly in a folder: files and folders of `part_path`.

    Args:
        folder: where to look; one that does not exist holds none.
        name: of the target whose leftovers to remove; None: of all.

    Returns:
        What was removed. What a living process writes stays, and so does what cannot be removed.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = LEFTOVER.fullmatch(path.name)
        if match and name in (None, match[1]) and not _is_written(path, int(match[2])):
            with suppress(OSError):
                _remove(path)
                removed.append(path)
    return removed


def check_writable(path: Path) -> None:
    """Check that a file may be written at `path`, before the work whose result it is to hold.

    Raises:
        ValueError: if something other than a regular file is there, a symbolic link included, or its folder cannot be.
        PermissionError: if the folder may not be written to.
    """
    shown = shown_path(path)
    if path.is_symlink():
        link = shown_path(Path(os.readlink(path)))
        raise ValueError(f"expected a file to write, got {shown}, a symbolic link to {link}: name that file itself")
    if os.path.lexists(path) and not path.is_file():
        kind = next((text for is_kind, text in FILE_KINDS.items() if is_kind(path.lstat().st_mode)), "no regular file")
        raise ValueError(f"expected a file to write, got {shown}, {kind}: give the name of a file")
    parent = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not parent.is_dir():
        raise ValueError(f"expected a folder for {shown}, got {shown_path(parent)}, which is none: name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{shown_path(parent)} may not be written to: choose another folder for {path.name!r}")


def _named_error(error: Exception, path: Path, part: Path) -> Exception:
    """Return the error of a failed write with the target's name; for a full disk, whoever says it, with the remedy."""
    code = error.errno if isinstance(error, OSError) else None
    if code not in FULL_DISK and not isinstance(error, OSError):  # libraries that write have errors of their own
        code = errno.ENOSPC if shutil.disk_usage(path.parent).free < 2**16 else None
    if code in FULL_DISK:
        text = f"{os.strerror(code)}, nothing was written: free space there, then run again"
        return OSError(code, text, shown_path(path))
    if isinstance(error, OSError) and code is not None and error.filename in (None, str(part), part):
        return OSError(code, os.strerror(code), shown_path(path))
    return error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` at the end: `path` never holds a partial file.

    A failed write leaves `path` as it was. What killed processes left of former writes of it is removed.

    Raises:
        ValueError: if something other than a regular file is at `path`, see `check_writable`.
        OSError: if it cannot be written; names `path`.
    """
    path = Path(path)
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(path.parent, _stem(path.name))
    part = part_path(path)
    _remove(part)
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with no content
        os.replace(part, path)
    except Exception as error:
        named = _named_error(error, path, part)
        if named is error:
            raise
        raise named from error
    finally:
        _remove(part)


def read_limited(path: Path, limit: int) -> bytes:
    """Return the content of a file, of a `.gz` uncompressed; ValueError where it has more than `limit` bytes."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes of content, got more")
    return content


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
