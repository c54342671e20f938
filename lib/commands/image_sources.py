"""Images of one's own: an .npz file, a folder with a folder of images for each class, or a torch Dataset."""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib.attacks.checks import check_labels
from lib.data import Split, check_images
from lib.utils.files import atomic_path, shown_path
from lib.utils.images import FORMATS, fit_image, read_image


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


class ImageSource(NamedTuple):
    """Images that are read when they are drawn: how many, what reads some of them, and what a record says of them.

    `read`: numbers of images → images (n, c, h, w), labels (n,) and how many of the images were resized.
    """

    n: int
    read: Callable[[Sequence[int]], tuple[Split, int]]
    facts: dict[str, Any]


def npz_source(path: Path, name: str = "x") -> ImageSource:
    """Return the images of an .npz file, see `read_npz`; they are never resized."""
    every = read_npz(path, name)
    check_images(every.x)
    check_labels("y", every.y, every.x)
    return ImageSource(
        len(every.y), lambda rows: (Split(*(t[torch.as_tensor(rows)] for t in every)), 0), {"kind": ".npz file"}
    )


def stack_images(pairs: Sequence[tuple[Tensor, int]], size: int | None, whose: str) -> tuple[Split, int]:
    """Return images, resized where a size is wanted, with labels, and how many were resized; ValueError otherwise."""
    fitted = [x if size is None else fit_image(x, size) for x, _ in pairs]
    resized = sum(y.shape != x.shape for y, (x, _) in zip(fitted, pairs, strict=True))
    if len(shapes := {tuple(x.shape) for x in fitted}) > 1:
        some = ", ".join(map(str, sorted(shapes)[:3]))
        raise ValueError(f"{whose}: expected images of one shape, got {some}: give --size, or convert them")
    points = Split(torch.stack(fitted), torch.tensor([label for _, label in pairs]))
    check_images(points.x)
    check_labels("y", points.y, points.x)
    return points, resized


def folder_source(folder: Path, channels: int, size: int) -> ImageSource:
    """Return the images of a folder's folders, one per class, whose labels are their places in the order of names.

    Args:
        folder: with a folder for each class.
        channels: 1 for grey, 3 for colour.
        size: height and width to which images of other sizes are brought by `lib.utils.images.fit_image`.

    Returns:
        The source, in the order of classes and files.

    Raises:
        ValueError: for a folder without images; when images are read, for files that are none.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(p, k) for k, c in enumerate(classes) for p in sorted(c.iterdir()) if p.suffix.lower() in FORMATS]
    if not files:
        expected = f"expected a folder for each class in {shown_path(folder)}, with images"
        raise ValueError(f"{expected} ({', '.join(FORMATS)}), got none")

    def read(rows: Sequence[int]) -> tuple[Split, int]:
        some = [files[row] for row in rows]
        return stack_images([(read_image(path, channels, None), k) for path, k in some], size, shown_path(folder))

    return ImageSource(len(files), read, {"kind": "folder", "classes": [c.name for c in classes]})


def dataset_source(dataset: Any, name: str, channels: int, size: int | None) -> ImageSource:
    """Return the images of a torch Dataset.

    Args:
        dataset: its items are pairs of image and label, the image a tensor (c, h, w), floating-point in [0, 1] or of
            bytes, or one of Pillow.
        name: its name in messages.
        channels: to which images of Pillow are converted, 1 or 3.
        size: see `folder_source`; None to leave images as they are.

    Returns:
        The source.

    Raises:
        ValueError: when images are read, for items that are none.
    """

    def item(row: int) -> tuple[Tensor, int]:
        pair = dataset[row]
        image, label = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (pair, None)
        if isinstance(image, Image.Image):
            image = image.convert("L" if channels == 1 else "RGB")
            image = torch.from_numpy(np.array(image).reshape(image.height, image.width, channels)).permute(2, 0, 1)
        number = getattr(label, "ndim", 0) == 0 and label is not None and float(label).is_integer()
        if not isinstance(image, Tensor) or image.ndim != 3 or not number:
            expected = "a tensor (c, h, w) or an image of Pillow, with a whole number as label"
            got = ", ".join(type(part).__name__ for part in (image, label))
            raise ValueError(f"{name}: expected {expected}, got ({got}) as item {row}")
        return (image.float() / 255 if image.dtype == torch.uint8 else image.float()), int(cast(Any, label))

    return ImageSource(
        len(dataset), lambda rows: stack_images([item(int(k)) for k in rows], size, name), {"kind": "torch Dataset"}
    )
