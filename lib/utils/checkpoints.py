"""Files from which interrupted work goes on: written whole, with a SHA-256, and set aside by name when they are broken.

A file is what `torch.save` writes, and the 32 bytes of its SHA-256 at the end, which `torch.load` does not mind.
"""

import hashlib
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from lib.utils.files import write_bytes

DIGEST = hashlib.sha256().digest_size


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers and text, in dicts and lists, atomically and with their SHA-256."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def load_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote; None without a file, or after setting aside one that was changed.

    Nothing is unpickled but tensors, numbers and text.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    if len(content) > DIGEST and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]:
        saved = torch.load(io.BytesIO(content[:-DIGEST]), map_location=map_location, weights_only=True)
        if isinstance(saved, dict):
            return saved
    set_aside(path, "broken", "it is not as it was written")
    return None


def set_aside(path: Path, suffix: str, reason: str) -> None:
    """Rename a file or folder that nothing can go on from, with one line on stderr that names it."""
    target = path.with_name(f"{path.name}.{suffix}")
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(path, target)
    print(f"{path} was renamed to {target.name}, since {reason}: this work begins again", file=sys.stderr, flush=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove, directly in a folder, what interrupted work would have gone on from, what is broken and half-written."""
    patterns = ("*.pt", "*.pt.*", "*.broken", "*.part")
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
