"""Pictures that are too large, in other formats or cut."""

from __future__ import annotations

import gzip
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from experiments.data.readers.files import LIMIT_VARIABLE
from experiments.data.readers.pictures import decode_jpegs, list_classes, list_images, read_gray
from tests.experiments.data.files import jpeg
from tests.experiments.data.readers.helpers import PICTURES, read_picture, refused


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("off", lambda a: a - 1, "off_train goes from -1 to"),
        ("off", lambda a: a + 1, "expected numbers from 0 to"),
        ("off", lambda a: a[::-1], "each larger than the one before"),
        ("off", lambda a: a[[0, 2, 1, 3]], "each larger than the one before"),
        ("off", lambda a: a[[0, 1, 1, 3]], "each larger than the one before"),
        ("off", lambda a: a.astype(np.uint64)[::-1], "each larger than the one before"),
        ("off", lambda a: np.full_like(a, 2**62), "off_train goes from 4611686018427387904"),
        ("off", lambda a: a.astype(float), "off_train is float64 of shape"),
        ("off", lambda a: a[:1], r"off_train is int64 of shape \(1,\)"),
        ("off", lambda a: a.reshape(2, 2), r"off_train is int64 of shape \(2, 2\)"),
        ("off", lambda a: a[:3], r"y_train is of shape \(3,\), expected \(2,\)"),
        ("jpeg", lambda a: a.reshape(-1, 1), "jpeg_train is uint8 of shape"),
        ("jpeg", lambda a: a.astype(np.int8), "jpeg_train is int8"),
        ("y", lambda a: a[0], r"y_train is of shape \(\)"),
    ],
)
def test_offsets_of_jpegs(path, part, change, message):
    pictures = [jpeg(np.full((8, 8, 3), 50 * i, np.uint8)) for i in range(3)]
    content = {}
    for split in ("train", "test"):
        content[f"jpeg_{split}"] = np.frombuffer(b"".join(pictures), np.uint8)
        content[f"off_{split}"] = np.cumsum([0, *map(len, pictures)])
        content[f"y_{split}"] = np.arange(3)
    content[f"{part}_train"] = change(content[f"{part}_train"])
    with path.open("wb") as file:
        np.savez(file, **content)
    with refused(message):
        decode_jpegs(path, (8, 8, 3))


def test_jpegs_are_counted_before_there_is_room_for_them(path, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    content = {}
    for split in ("train", "test"):
        content |= {
            f"jpeg_{split}": np.zeros(10_000, np.uint8),
            f"y_{split}": np.zeros(10_000, int),
        }
        content[f"off_{split}"] = np.arange(10_001, dtype=np.uint16)
    with path.open("wb") as file:
        np.savez(file, **content)
    with refused("30720000 bytes when unpacked"):
        decode_jpegs(path, (32, 32, 3))


def png_header(width, height):
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    sizes = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + rows + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (9_500, 9_500), (0, 5), (5, 0)])
def test_sizes_of_pictures(path, size):
    path.write_bytes(png_header(*size))
    for read in (read_gray, read_picture):
        with refused("file: not a readable picture|file: a picture of 9500 x 9500 pixels, allowed"):
            read(path)


def test_a_thin_picture_takes_no_more_room_than_another(path, monkeypatch):
    pixels = np.zeros((20_000, 1, 3), np.uint8)
    pixels[9_000:11_000] = 200
    Image.fromarray(pixels).save(path, "PNG")
    sizes = []
    resize = Image.Image.resize

    def record(image, size, *arguments, **options):
        sizes.append(size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", record)
    assert (read_picture(path, size=224) == 200).all()
    assert sizes == [(224, 224)]


def test_the_middle_of_a_picture_is_scaled(path):
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = np.linspace(0, 255, 40, dtype=np.uint8)[:, None]
    Image.fromarray(pixels).save(path, "PNG")
    expected = Image.fromarray(pixels[:, 30:70]).resize((20, 20), Image.Resampling.BILINEAR)
    # At the border the scaled picture sees what lies beyond.
    np.testing.assert_array_equal(
        read_picture(path, 20)[0, 1:-1, 1:-1], np.asarray(expected)[1:-1, 1:-1]
    )


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "BMP", "PPM", "text", "gzip"])
def test_only_jpeg_and_png_reach_their_decoders(tmp_path, monkeypatch, kind):
    path, started = tmp_path / "1.jpg", tmp_path / "started"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {started}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if kind == "EPS":
        box = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        path.write_bytes(box)
    elif kind in ("text", "gzip"):
        path.write_bytes(gzip.compress(png_header(8, 8)) if kind == "gzip" else b"no picture")
    else:
        Image.fromarray(PICTURES[0]).save(path, kind)
    for read in (read_gray, read_picture):
        with refused("1.jpg: not a readable picture, expected JPEG or PNG"):
            read(path)
    assert not started.exists()


def test_only_files_have_names_of_pictures(tmp_path):
    folder = tmp_path / "train" / "n01"
    folder.mkdir(parents=True)
    Image.fromarray(PICTURES[0]).save(folder / "1.png")
    (folder / "2.png").symlink_to(folder / "1.png")
    (folder / "notes.txt").mkdir()
    assert [path.name for path in list_images(folder)] == ["1.png", "2.png"]
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
        make(folder / "3.JPG")
        with refused("3.JPG: not a regular file, expected a picture"):
            list_classes(tmp_path / "train")
        (folder / "3.JPG").rmdir() if make is os.mkdir else (folder / "3.JPG").unlink()
