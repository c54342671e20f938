"""Image files of many modes, damaged ones and names: right pixels or a clear refusal, and no file changed by one."""

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib.utils.images import plan_outputs, read_image, write_image
from tests.fuzz.common import check_refusal, examples

MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "I;16", "I", "F", "CMYK", "YCbCr", "LAB", "PA")
LOSSLESS = ("PNG", "TIFF", "BMP", "PPM", "GIF", "WEBP")
LUMA = np.array([0.299, 0.587, 0.114])
NAMES = st.sampled_from(["a", "A", "b", "é", "e\u0301", "ß", "SS", "x\ny", " ", "-n", "a.b"])
SUFFIXES = st.sampled_from([".png", ".PNG", ".jpg", ".tif", ".txt", "", ".part", ".webp"])


def random_image(mode, seed, size=8):
    """Returns an image and its pixels in [0, 1] over white as (c, h, w), None where they are not defined."""
    rng = np.random.default_rng(seed)
    grey, alpha, colour = (rng.integers(0, 256, (size, size, *more), dtype=np.uint8) for more in ((), (), (3,)))
    if mode == "1":
        return Image.fromarray(grey > 99), (grey > 99)[None].astype(float)
    if mode == "L":
        return Image.fromarray(grey), grey[None] / 255
    if mode in ("RGB", "RGBA"):
        full = colour / 255
        if mode == "RGB":
            return Image.fromarray(colour), full.transpose(2, 0, 1)
        share = alpha[..., None] / 255
        return Image.fromarray(np.dstack([colour, alpha])), (full * share + 1 - share).transpose(2, 0, 1)
    if mode == "LA":
        image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
        return image, (grey / 255 * (alpha / 255) + 1 - alpha / 255)[None]
    if mode == "I;16":
        deep = rng.integers(0, 65536, (size, size), dtype=np.uint16)
        return Image.fromarray(deep), deep[None] / 65535
    if mode == "I":
        return Image.fromarray(rng.integers(-9, 2**20, (size, size), dtype=np.int32)), None
    if mode == "F":
        scale = rng.choice([1, 255])
        return Image.fromarray(v := (scale * rng.random((size, size))).astype(np.float32)), v[
            None
        ] if scale == 1 else None
    if mode == "P":
        image = Image.fromarray(grey).convert("P")
        image.putpalette(table := rng.integers(0, 256, 768, dtype=np.uint8).tolist())
        return image, (np.array(table).reshape(256, 3)[grey] / 255).transpose(2, 0, 1)
    return Image.new(mode, (size, size)), None


def saved(image, format):
    """Returns the bytes of a file, or None where a format has no such mode."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    except (OSError, ValueError, KeyError, SystemError):
        return None
    return buffer.getvalue()


def read_bytes(content, channels, size=8):
    """Returns the pixels that `read_image` reads from a file of these bytes, None if it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        path.write_bytes(content)
        try:
            x = read_image(path, channels, size)
        except (ValueError, OSError) as error:
            check_refusal(error)
            assert "a.png" in str(error)
            return None
        assert path.read_bytes() == content and x.shape == (channels, size, size) and x.dtype == torch.float32
        assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1
        return x.numpy()


@examples(150)
@given(st.sampled_from(MODES), st.sampled_from(LOSSLESS), st.sampled_from([1, 3]), st.integers(0, 999))
def test_every_mode_is_read_right_or_refused(mode, format, channels, seed):
    image, pixels = random_image(mode, seed)
    content = saved(image, format)
    if content is None:
        return
    with Image.open(io.BytesIO(content)) as file:
        changed = file.mode != mode and not (mode == "I;16" and file.mode == "I")
    x = read_bytes(content, channels)
    if changed and format in ("PPM", "GIF", "BMP", "WEBP"):  # the file no longer holds what the image did
        return
    assert x is not None or pixels is None, (mode, format)
    if x is not None and pixels is not None:
        if channels == 1 and len(pixels) == 3:
            pixels = (LUMA @ pixels.reshape(3, -1)).reshape(1, 8, 8)
        np.testing.assert_allclose(x, np.broadcast_to(pixels, x.shape), atol=1.1 / 255)


@examples(150)
@given(
    st.sampled_from(["L", "RGB", "RGBA", "P", "I;16", "F"]),
    st.sampled_from(["PNG", "TIFF", "JPEG", "WEBP", "GIF"]),
    st.data(),
)
def test_damaged_files_are_refused_and_a_flipped_bit_of_a_png_never_changes_pixels(mode, format, data):
    image, _ = random_image(mode, data.draw(st.integers(0, 99)))
    content = saved(image, format)
    if content is None:
        return
    whole = read_bytes(content, 1)
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        damaged = content[:at]
    else:
        damaged = content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :]
    x = read_bytes(damaged, 1)
    if format == "PNG" and x is not None and whole is not None:
        assert np.array_equal(x, whole)


@examples(80)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"GIF89a", b"RIFF", b"P5\n8 8\n255\n"]),
)
def test_random_bytes_are_refused_or_an_image(content, head):
    read_bytes(head + content, 1)


@examples(100)
@given(st.lists(st.tuples(NAMES, SUFFIXES), min_size=1, max_size=4), NAMES, SUFFIXES, st.booleans(), st.booleans())
def test_plans_have_one_new_file_for_each_image_or_are_refused(names, out, suffix, whole_folder, exists):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for stem, end in names:
            write_image(torch.zeros(1, 8, 8), folder / "in" / f"{stem}{end}")
        source = folder / "in" if whole_folder else next((folder / "in").iterdir())
        target = folder / "in" / f"{out}{suffix}" if exists else folder / f"{out}{suffix}"
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        try:
            plan = plan_outputs(source, target)
        except (ValueError, OSError) as error:
            check_refusal(error)
        else:
            assert len({p.name.casefold() for p in plan.values()}) == len(plan) >= 1
            assert not set(plan) & set(plan.values()) and all(p.suffix.lower() == ".png" for p in plan.values())
        assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
