"""Image files: every mode is read as what it is or refused, and outputs are decided before any work."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lib.utils.images import plan_outputs, read_image, write_image

VALUES = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
LUMA = np.array([0.299, 0.587, 0.114])


def png(depth, colour, rows, *chunks):
    """Returns an 8 x 8 PNG file with rows of bytes and more chunks, made by hand."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def read(path, image, channels=1, **options):
    image.save(path, **options)
    return read_image(path, channels, 8).numpy()


def test_images_of_8_bits_are_read_as_before(tmp_path):
    rgb = Image.fromarray(VALUES)
    for name in ("a.png", "a.bmp", "a.tif", "a.ppm"):
        assert np.array_equal(read(tmp_path / name, rgb, 3), np.float32(VALUES.transpose(2, 0, 1)) / 255)
        assert np.array_equal(read(tmp_path / name, rgb)[0], np.asarray(rgb.convert("L"), np.float32) / 255)
        np.testing.assert_allclose(read(tmp_path / name, rgb)[0], VALUES @ LUMA / 255, atol=0.6 / 255)
        grey = Image.fromarray(VALUES[..., 0])
        assert np.array_equal(read(tmp_path / name, grey, 3), np.float32(np.stack([VALUES[..., 0]] * 3)) / 255)
    bits = VALUES[..., 0] > 127
    assert np.array_equal(read(tmp_path / "b.png", Image.fromarray(bits))[0], bits.astype(np.float32))
    palette = rgb.quantize(64)
    assert np.array_equal(
        read(tmp_path / "p.png", palette, 3) * 255, np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_fault_09_35_16_bits_are_scaled_by_their_white(tmp_path, suffix):
    values = VALUES[..., 0].astype(np.uint16) * 257
    values[0, 0] = 126 * 257 + 100
    result = read(tmp_path / f"a.{suffix}", Image.fromarray(values))
    assert np.array_equal(result[0], (values / 65535).astype(np.float32))
    grey = Image.fromarray(np.full((8, 8), 126 * 257, np.uint16))
    assert read(tmp_path / f"g.{suffix}", grey).mean() == pytest.approx(126 / 255)


def test_fault_09_deep_files_made_by_hand_are_read_as_what_they_are(tmp_path):
    path, values = tmp_path / "a.png", VALUES.astype(">u2") * 257
    path.write_bytes(png(16, 2, [row.tobytes() for row in values]))
    np.testing.assert_allclose(read_image(path, 3, 8), VALUES.transpose(2, 0, 1) / 255, atol=1 / 256)
    path.write_bytes(png(16, 0, [row.tobytes() for row in values[..., 0]], (b"tRNS", b"\0\1")))
    with pytest.raises(ValueError, match="one transparent colour in other than 8 bits"):
        read_image(path, 1, 8)
    path.write_bytes(png(2, 0, [b"\x1b\x1b"] * 8, (b"tRNS", b"\0\1")))
    with pytest.raises(ValueError, match="one transparent colour in other than 8 bits"):
        read_image(path, 1, 8)
    for pixels, number, value, words in (
        (VALUES[..., 0].astype(np.uint16), 262, 0, "white as 0"),
        (VALUES[..., 0], 339, 2, "signed numbers"),
    ):
        file = tmp_path / "a.tif"
        Image.fromarray(pixels).save(file, tiffinfo={339: 1})
        content = file.read_bytes()
        at = content.index(struct.pack("<HHI", number, 3, 1)) + 8
        file.write_bytes(content[:at] + struct.pack("<H", value) + content[at + 2 :])
        with pytest.raises(ValueError, match=words):
            read_image(file, 1, 8)


def test_fault_09_what_is_transparent_lies_over_white(tmp_path):
    alpha = VALUES[..., 1]
    ink = np.dstack([np.zeros((8, 8, 3), np.uint8), alpha])  # ink in the alpha channel alone
    for name, image in (
        ("rgba.png", Image.fromarray(ink)),
        ("la.png", Image.merge("LA", (Image.new("L", (8, 8), 0), Image.fromarray(alpha)))),
        ("rgba.webp", Image.fromarray(ink)),
    ):
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        for channels in (1, 3):
            result = read(tmp_path / name, image, channels, **options)
            np.testing.assert_allclose(result, np.broadcast_to(1 - alpha / 255, result.shape), atol=0.6 / 255)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 129))
    assert read(tmp_path / "half.png", half).mean() == pytest.approx(126 / 255)
    grey = Image.fromarray(VALUES[..., 0])
    expected = np.where(VALUES[..., 0] == VALUES[0, 0, 0], 255, VALUES[..., 0]) / 255
    np.testing.assert_allclose(
        read(tmp_path / "key.png", grey, transparency=int(VALUES[0, 0, 0]))[0], expected, atol=1e-6
    )
    palette = Image.fromarray(VALUES[..., 0] % 4).convert("P")
    palette.putpalette([0, 0, 0, 50, 50, 50, 100, 100, 100, 200, 200, 200])
    shown = np.array([255, 50, 100, 200])[VALUES[..., 0] % 4] / 255
    np.testing.assert_allclose(read(tmp_path / "p.png", palette, transparency=0)[0], shown, atol=1e-6)
    opaque = Image.fromarray(np.dstack([VALUES, np.full((8, 8), 255, np.uint8)]))
    assert np.array_equal(read(tmp_path / "o.png", opaque), read(tmp_path / "r.png", Image.fromarray(VALUES)))


def test_fault_09_35_numbers_without_a_white_are_refused_and_floats_in_the_range_read(tmp_path):
    values = np.random.default_rng(1).random((8, 8)).astype(np.float32)
    assert np.array_equal(read(tmp_path / "f.tif", Image.fromarray(values))[0], values)
    for wrong, words in (
        (values * 255, r"floating-point numbers \(mode F\) from .* divide them by their white"),
        (values - 0.5, "floating-point"),
        (np.where(values > 0.5, np.float32("nan"), values), "floating-point"),
        ((values * 2**20).astype(np.int32), r"integers of 32 bits .* \(mode I\) from .* save it with 16 bits"),
    ):
        with pytest.raises(ValueError, match=words):
            read(tmp_path / "f.tif", Image.fromarray(wrong))
    for mode, suffix in (("CMYK", "tif"), ("CMYK", "jpg"), ("LAB", "tif")):
        with pytest.raises(ValueError, match=f"has mode {mode}: .* save it as RGB"):
            read(tmp_path / f"c.{suffix}", Image.new(mode, (8, 8)))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_fault_09_the_orientation_of_exif_is_applied(tmp_path, suffix):
    columns = np.zeros((8, 8), np.uint8)
    columns[:, :4] = 255
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees clockwise to be seen: the left becomes the top
    image = Image.fromarray(columns).convert("RGB")
    result = read(tmp_path / f"a.{suffix}", image, exif=exif)
    np.testing.assert_allclose(result[0], columns.T / 255, atol=0.1)


def test_fault_09_30_what_is_not_one_whole_image_of_the_size_is_refused_by_name(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    for name in ("anim.gif", "anim.png", "pages.tif", "anim.webp"):
        with pytest.raises(ValueError, match=rf"expected one image in .*{name}, got 2 frames"):
            read(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
    Image.fromarray(VALUES).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    cases = {"empty.png": b"", "text.png": b"text", "cut.png": content[:-30], "flipped.png": bytes(flipped)}
    for name, part in cases.items():
        (tmp_path / name).write_bytes(part)
    for name in (*cases, "pipe.png", "folder.png", "none.png"):
        with pytest.raises((ValueError, FileNotFoundError), match=name) as error:
            read_image(tmp_path / name, 1, 8)
        assert "\n" not in str(error.value)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match=r"at most 64 MiB, got 64 MiB in .*large\.png"):
        read_image(tmp_path / "large.png", 1, 8)


@pytest.mark.parametrize("side", [9, 12_000, 60_000])
def test_fault_30_a_decompression_bomb_is_refused_by_name_before_it_is_decoded(tmp_path, side):
    bomb = bytearray(png(8, 0, [bytes(8)] * 8))
    bomb[16:24] = struct.pack(">II", side, side)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"8 x 8.*bomb\.png|bomb\.png.* pixels"):
        read_image(tmp_path / "bomb.png", 1, 8)


def test_fault_35_no_pixels_that_are_not_finite_are_written(tmp_path):
    for value in (float("nan"), float("inf"), -0.1, 1.1):
        with pytest.raises(ValueError, match="expected finite pixels"):
            write_image(torch.full((1, 8, 8), value), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.png", "in/b.jpg", "c.png"):
        Image.fromarray(VALUES).save(tmp_path / name)
    return tmp_path


def test_outputs_are_planned_for_a_file_and_a_folder(folder):
    source, out = folder / "in", folder / "new" / "out"
    assert plan_outputs(source, out) == {source / "a.png": out / "a.png", source / "b.jpg": out / "b.png"}
    assert plan_outputs(folder / "c.png", out / "d.PNG") == {folder / "c.png": out / "d.PNG"} and not out.exists()


@pytest.mark.parametrize("other", ["a.jpg", "A.jpg", "A.PNG", "a.tiff"])
def test_fault_10_two_images_for_one_output_are_refused(folder, other):
    Image.fromarray(VALUES).save(folder / "in" / other)
    with pytest.raises(ValueError, match=r"expected an output for each image, got one for .* rename one"):
        plan_outputs(folder / "in", folder / "out")


def test_fault_30_36_outputs_of_the_wrong_kind_and_over_inputs_are_refused(folder):
    (folder / "text").write_text("text")
    (folder / "same").symlink_to("in")
    (folder / "link.png").symlink_to("c.png")
    (folder / "out").mkdir()
    (folder / "out" / "a.png").symlink_to("../in/a.png")
    os.link(folder / "in" / "b.jpg", folder / "hard.png")
    os.mkfifo(folder / "pipe.png")
    before = sorted(folder.rglob("*"))
    for source, target, words in (
        ("c.png", "c.png", "another file than IN"),
        ("c.png", "link.png", "another file than IN"),
        ("link.png", "c.png", "another file than IN"),
        ("in/b.jpg", "hard.png", "another file than IN"),
        ("in", "in", "another folder than IN"),
        ("in", "same", "another folder than IN"),
        ("in", "out", "another file than IN"),
        ("c.png", "in", "a folder: name a "),
        ("in", "text", "expected a folder OUT"),
        ("in", "x.png", "expected a folder OUT"),
        ("c.png", "c.jpg", r"end in \.png"),
        ("c.png", "c", r"end in \.png"),
        ("c.png", "pipe.png", "a pipe"),
        ("c.png", "text/x.png", "which is none"),
        ("none.png", "x.png", r"none\.png: no such file or folder"),
        ("out/none", "x.png", "no such file or folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            plan_outputs(folder / source, folder / target)
    assert sorted(folder.rglob("*")) == before
