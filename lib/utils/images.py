"""Image files: which a command reads and writes, and their pixels in [0, 1].

What a file says of its pixels is honoured or refused, never ignored: depth, transparency, orientation, frames. Only
colour profiles are left aside, and of colour with 16 bits per channel Pillow reads the upper eight, which is an error
below 1/255.
"""

import io
import os
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from lib.utils.files import atomic_path, check_writable, shown_path

FORMATS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
READERS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")  # Pillow's; some of its others run programs
MAX_FILE_BYTES = 2**26  # of a file: many times what a network's images take
RESIZE_RULE = "the shorter side to the size, bilinear with antialiasing, then the centre"
BACKGROUND = "white"  # under what is transparent
UNDEFINED = {  # modes of Pillow without one conversion to grey or RGB
    "CMYK": "inks are colours by their profile alone",
    "LAB": "its colours are outside RGB in part",
    "HSV": "it is no mode of files",
}
SAMPLE_FORMAT, BITS, PHOTOMETRIC, WHITE_IS_ZERO = 339, 258, 262, 0  # tags of TIFF


def _open_image(content: bytes, path: Path, size: int | None) -> Image.Image:
    """Return the decoded image in a file's content, upright; ValueError for all that Pillow does not read cleanly."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a damaged part of a file is a warning, and then left out
        for harmless in (DeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", harmless)
        warnings.filterwarnings("ignore", "Metadata Warning")  # a tag of TIFF written twice
        try:
            with Image.open(io.BytesIO(content), formats=READERS) as image:
                width, height, frames = *image.size, getattr(image, "n_frames", 1)
                if image.format == "PNG" and (size is None or (width, height) == (size, size)):
                    image.verify()  # the checksums, which decoding leaves out
        except Image.DecompressionBombError:
            most = f"{size} x {size}" if size else f"at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels"
            raise ValueError(f"{shown_path(path)} unfolds to too many pixels: expected {most}") from None
        except Exception as error:  # of whatever kind its many readers raise for damaged files
            raise _unreadable(path, error) from error
        if size is not None and (width, height) != (size, size):  # before decoding, whatever it would unfold to
            raise ValueError(
                f"expected {size} x {size} pixels, got {width} x {height} in {shown_path(path)}: resize it"
            )
        if frames != 1:
            raise ValueError(f"expected one image in {shown_path(path)}, got {frames} frames: save one of them alone")
        try:
            image = Image.open(io.BytesIO(content), formats=READERS)
            _check_samples(image, path)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # a copy would have no format and tags
            return image
        except _Refused:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error


class _Refused(ValueError):
    """A file that Pillow reads, but not as what it is."""


def _unreadable(path: Path, error: Exception) -> ValueError:
    """Return the error for a file that is no whole image."""
    text = (
        "it is of no known format" if isinstance(error, Image.UnidentifiedImageError) else " ".join(f"{error}".split())
    )
    formats = ", ".join(READERS)
    return ValueError(
        f"{shown_path(path)} cannot be read as an image ({text[:200]}): expected a whole file of {formats}"
    )


def _check_samples(image: Image.Image, path: Path) -> None:
    """Raise for samples that Pillow decodes as others: signed ones, deep inverted ones, a transparent colour."""
    tags: Any = getattr(image, "tag_v2", {})
    signed = image.mode == "L" and 2 in np.ravel(tags.get(SAMPLE_FORMAT, ()))
    deep = image.mode.startswith("I") or image.mode == "F"
    tiles: Any = getattr(image, "tile", [])
    shallow = any(f"{tile[3]}".startswith(("L;", "RGB;", "I;", "1")) for tile in tiles)
    if signed:
        problem = f"signed numbers (mode {image.mode}), whose black and white it does not say"
    elif deep and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        problem = f"white as 0 (mode {image.mode}, {tags.get(BITS)} bits)"
    elif "transparency" in image.info and image.mode != "P" and (deep or shallow):
        problem = f"one transparent colour in other than 8 bits per channel (mode {image.mode})"
    else:
        return
    raise _Refused(f"{shown_path(path)} holds {problem}: save it as 8-bit grey or RGB")


def _deep_pixels(image: Image.Image, path: Path) -> np.ndarray:
    """Return grey pixels in [0, 1] of a file with more than 8 bits, float32."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if image.mode == "F" and low >= 0 and high <= 1:  # false for NaN as well
        return values.astype(np.float32)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not sixteen:
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 bits or with a sign"
        remedy = "divide them by their white to have numbers in [0, 1]" if image.mode == "F" else "save it with 16 bits"
        raise ValueError(
            f"{shown_path(path)} holds {kind} (mode {image.mode}) from {low:g} to {high:g}, of which it does not say "
            f"what is white: {remedy}, or save it as 8-bit grey"
        )
    bits: Any = getattr(image, "tag_v2", {}).get(BITS, 16)
    return (values / (2 ** int(np.ravel(bits)[0]) - 1)).astype(np.float32)


def read_image(path: Path, channels: int, size: int | None) -> Float[Tensor, "c h w"]:
    """Read an image file: grey, RGB, a palette, with 1 to 16 bits, or floating-point grey in [0, 1].

    Colour becomes grey by its luma (ITU-R 601), what is transparent lies over white, and the orientation of Exif is
    applied.

    Args:
        path: of the file.
        channels: 1 for grey, 3 for colour, as the network takes it.
        size: height and width, in pixels, that the network takes; None for any.

    Returns:
        The image (c, h, w), in [0, 1].

    Raises:
        ValueError: if the image has another size or several frames, if what its numbers mean is not defined (32-bit
            integers, floating-point numbers outside [0, 1], signed numbers, CMYK, Lab), or the file is no whole image.
        FileNotFoundError: if there is no such file.
    """
    shown = shown_path(path)
    if not path.exists():
        raise FileNotFoundError(f"{shown}: no such file")
    if not path.is_file():
        raise ValueError(f"expected an image file, got {shown}, {'a folder' if path.is_dir() else 'no regular file'}")
    if (length := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(
            f"expected an image file of at most {MAX_FILE_BYTES >> 20} MiB, got {length >> 20} MiB in {shown}"
        )
    image = _open_image(path.read_bytes(), path, size)
    if reason := UNDEFINED.get(image.mode):
        raise ValueError(f"{shown} has mode {image.mode}: {reason}: save it as RGB")
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.repeat(_deep_pixels(image, path)[..., None], channels, 2)
    else:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def fit_image(x: Float[Tensor, "c h w"], size: int) -> Float[Tensor, "c size size"]:
    """Resize an image by `RESIZE_RULE`, the same for images of all sources; one of that size stays as it is.

    Args:
        x: an image in [0, 1].
        size: height and width, in pixels.

    Returns:
        The image (c, size, size), in [0, 1].
    """
    if tuple(x.shape[1:]) == (size, size):
        return x
    height, width = (max(size, round(n * size / min(x.shape[1:]))) for n in x.shape[1:])
    y = functional.interpolate(x[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    return y[:, top : top + size, left : left + size]


def write_image(x: Float[Tensor, "c h w"], path: Path) -> None:
    """Write an image in [0, 1] as PNG, whole or not at all; ValueError for pixels that are not finite or outside."""
    if not (x.isfinite().all() and x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"expected finite pixels in [0, 1] to write to {shown_path(path)}, got others")
    pixels = (x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    with atomic_path(path) as part:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(part, format="PNG")


def _check_outputs(outputs: dict[Path, Path]) -> None:
    """Raise ValueError where two images would be written to one file, or one over an image that is read."""
    writers: dict[str, Path] = {}
    inputs = {(s.st_dev, s.st_ino): file for file in outputs if file.exists() for s in [os.stat(file)]}
    for file, output in outputs.items():
        name = unicodedata.normalize("NFC", output.name).casefold()  # equal names on some file systems
        if other := writers.get(name):
            both = f"{shown_path(other)} and {shown_path(file)}"
            raise ValueError(f"expected an output for each image, got one for {both}, {output.name!r}: rename one")
        writers[name] = file
        if output.exists() and (source := inputs.get((os.stat(output).st_dev, os.stat(output).st_ino))):
            raise ValueError(
                f"expected OUT to be another file than IN, got {shown_path(output)} for {shown_path(source)}, "
                "which is read: give another OUT"
            )
        check_writable(output)


def plan_outputs(source: Path, target: Path) -> dict[Path, Path]:
    """Decide which PNG file is written for which image, before any work.

    Args:
        source: an image file, or a folder, of which the images directly in it are read.
        target: a file that ends in `.png` for a file, a folder for a folder; it need not exist.

    Returns:
        Outputs by inputs, in the order of their names.

    Raises:
        ValueError: if there are no images, target is of the other kind, two outputs have one name (upper and lower
            case are equal), an output is an input, or something other than a file is where one is to be written.
        FileNotFoundError: if there is no source.
        PermissionError: if target may not be written to.
    """
    shown = shown_path(target)
    if not source.exists():
        raise FileNotFoundError(f"{shown_path(source)}: no such file or folder")
    if not source.is_dir():
        if target.is_dir():
            raise ValueError(f"expected a file OUT for a file IN, got {shown}, a folder: name a .png file in it")
        if target.suffix.lower() != ".png":
            raise ValueError(f"expected OUT to end in .png, since PNG is written, got {shown}: change its suffix")
        outputs = {source: target}
    else:
        if target.suffix.lower() in FORMATS or (os.path.lexists(target) and not target.is_dir()):
            raise ValueError(f"expected a folder OUT for the folder IN, got {shown}, a file: name a folder")
        if target.exists() and target.samefile(source):
            raise ValueError(f"expected OUT to be another folder than IN, got {shown}, which is IN: name another")
        images = sorted(p for p in source.iterdir() if p.suffix.lower() in FORMATS)
        if not images:
            raise ValueError(f"expected images ({', '.join(FORMATS)}), got none in {shown_path(source)}")
        outputs = {file: target / f"{file.stem}.png" for file in images}
    _check_outputs(outputs)
    return outputs
