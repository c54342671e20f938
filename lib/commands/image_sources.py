"""Images from files: an .npz file, or a folder with a folder of images for each class."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.data import Split
from lib.utils.files import atomic_path, shown_path
from lib.utils.images import FORMATS, read_image


def write_adversarial(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write tensors, lists, numbers and text as the arrays of an .npz file, which `read_npz` reads again."""
    plain: dict[str, Any] = {k: v.cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in arrays.items()}
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **plain)


def read_npz(path: Path, name: str = "x") -> Split:
    """Return images (n, c, h, w), whole numbers in 0..255 or in [0, 1], and labels `y` of an .npz file.

    Args:
        path: of the file.
        name: of the array of images; "x_adv" for the attacked ones of `python -m lib attack`.

    Returns:
        Images and labels.

    Raises:
        ValueError: for another file, one without these arrays, and labels that are no whole numbers.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{shown_path(path)}: expected an .npz file with the arrays x and y, got another file")
    with np.load(path, allow_pickle=False) as arrays:
        if missing := {name, "y"} - set(arrays.files):
            wanted, lacking = f"the arrays {name} and y", ", ".join(sorted(missing))
            raise ValueError(f"{shown_path(path)}: expected {wanted}, got no {lacking}")
        x, y = arrays[name], arrays["y"]
    x = x / np.float32(255) if x.dtype == np.uint8 else x
    if y.dtype.kind not in "iu":
        raise ValueError(f"{shown_path(path)}: expected labels y as whole numbers, got {y.dtype}")
    return Split(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), torch.from_numpy(y.astype(np.int64)))


def read_folder(folder: Path, channels: int, size: int) -> Split:
    """Return the images of a folder's folders, one per class, whose labels are their places in the order of names."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(p, k) for k, c in enumerate(classes) for p in sorted(c.iterdir()) if p.suffix.lower() in FORMATS]
    if not files:
        expected = f"expected a folder for each class in {shown_path(folder)}, with images"
        raise ValueError(f"{expected} ({', '.join(FORMATS)}), got none")
    return Split(
        torch.stack([read_image(path, channels, size) for path, _ in files]), torch.tensor([k for _, k in files])
    )
