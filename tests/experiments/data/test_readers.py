"""Files that are damaged or made to do harm: each is one line, and takes no memory on its word."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import signal
import socket
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from experiments.data import readers
from experiments.data.readers import DataError
from tests.experiments.data.test_data import idx, jpeg

MIB = 2**20
PICTURES = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
EXAMPLES = {"x_train": PICTURES, "y_train": np.arange(4)}
EXAMPLES |= {"x_test": PICTURES, "y_test": np.arange(4)}


@contextlib.contextmanager
def refused(match, memory=8 * MIB):
    """A block that ends in a `DataError` of one line, having taken less memory than that."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match) as caught:
            yield
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


# All files ---------------------------------------------------------------------------------------


def read_picture(path, size=16):
    return readers.ImageFiles([path], size, np.zeros(3), np.ones(3))[[0]]


def read_batch(path):
    return readers.read_cifar(path.parent, {"train": [path.name]}, b"labels")


READERS = {
    "npz": readers.read_npz,
    "jpegs": lambda path: readers.decode_jpegs(path, (8, 8, 3)),
    "idx": lambda path: readers.read_idx(path, 3),
    "batch": read_batch,
    "text": readers.read_text,
    "sentences": readers.read_sentences,
    "pairs": lambda path: readers.read_pairs([path, path]),
    "gray": readers.read_gray,
    "picture": read_picture,
}


@contextlib.contextmanager
def at_most(seconds):
    """Fails, instead of waiting for ever, if the block takes longer."""

    def fail(*_):
        pytest.fail("waits for a file that has no content")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder", "device", "loop", "nothing"])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    path = tmp_path / "file"
    reason = {"loop": "symbolic links", "nothing": "No such file"}.get(kind, f"this is a {kind}")
    with contextlib.ExitStack() as stack:
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind("file")
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "loop":
            path.symlink_to(path)
        stack.enter_context(at_most(20))
        for read in READERS.values():
            with refused(f"file: unreadable, expected .*{reason}"):
                read(path)
        # What is there but cannot be read is not passed over.
        (tmp_path / "file.gz").touch()
        assert readers.plain_or_gzipped(path) == (
            tmp_path / "file.gz" if kind == "nothing" else path
        )


def test_content_is_limited_before_it_is_unpacked(path, monkeypatch):
    monkeypatch.setenv(readers.LIMIT_VARIABLE, "16")
    content, arrays = idx(np.zeros((20, 1024, 1024), np.uint8)), path.with_suffix(".npz")
    path.write_bytes(gzip.compress(content, compresslevel=1))
    too_much = rf"bytes when unpacked, allowed are {16 * MIB}; set {readers.LIMIT_VARIABLE} to"
    for read in (READERS["idx"], readers.read_text):
        with refused(too_much):
            read(path)
    for save in (np.savez, np.savez_compressed):
        save(arrays, **EXAMPLES | {"x_train": np.zeros((20, MIB), np.uint8)})
        with refused(too_much):
            readers.read_npz(arrays)
    monkeypatch.setenv(readers.LIMIT_VARIABLE, "32")
    assert readers.read_idx(path, 3).shape == (20, 1024, 1024)
    assert readers.read_npz(arrays)["x_train"].shape == (20, MIB)
    for value in ("0", "-1", "1.5", "many", "1e3", "99999999"):
        monkeypatch.setenv(readers.LIMIT_VARIABLE, value)
        with refused(f"{readers.LIMIT_VARIABLE} is '{value}', expected a number of MiB"):
            readers.read_idx(path, 3)


def test_names_of_files_cannot_break_the_line(tmp_path):
    path = tmp_path / "a\nb\x1b[31m"
    with refused(r"a\\nb\\x1b\[31m: unreadable"):
        readers.read_text(path)


# Arrays ------------------------------------------------------------------------------------------


def write_npz(path, changed=None, content=b"", **info):
    """A file whose array `x_train`, or one of another name, has this content."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in EXAMPLES.items():
            file = io.BytesIO()
            np.save(file, array)
            if name != "x_train" or changed is None:
                archive.writestr(f"{name}.npy", file.getvalue())
            else:
                archive.writestr(changed, content or file.getvalue(), **info)


def npy(shape, descr="'|u1'", version=1, content=b"", length=None):
    """The header of an array in NumPy's format."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(1000000000, 28, 28)"), "x_train has 0 bytes, expected 784000000000 for uint8"),
        (npy(f"({2**70}, 8)"), "x_train has a damaged header"),
        (npy("(-2, -2)", content=bytes(4)), "x_train has a damaged header"),
        (npy("(True,)", content=b"1"), "x_train has a damaged header"),
        (npy("[4]", content=bytes(4)), "x_train has a damaged header"),
        (npy("(4,)", content=bytes(9)), "x_train has 9 bytes, expected 4 for uint8 of shape"),
        (npy("(1,) * 10**9"), "x_train has a damaged header"),
        (npy("(" * 4_000), "x_train has a damaged header"),
        (npy("(4,)", "'|O'", content=bytes(32)), "x_train is of type '|O', expected numbers"),
        (npy("(4,)", "'<U1'", content=bytes(16)), "x_train is of type '<U1'"),
        (npy("(4,)", "'<c16'", content=bytes(64)), "x_train is of type '<c16'"),
        (npy("(4,)", "'i1,i1'", content=bytes(8)), "x_train is of type 'i1,i1'"),
        (npy("(4,)", "[('a', 'i1')]", content=bytes(4)), r"x_train is of type \"\[\('a', 'i1'"),
        (npy("(4,)", version=4, content=bytes(4)), "expected an array in NumPy's format"),
        (npy("(4,)", version=2, length=2**31), "a header of 2147483648 bytes, allowed are 10000"),
        (npy("(4,)", length=9), "x_train has a damaged header"),
        (b"\x93NUMPY", "expected an array in NumPy's format"),
        (b"text", "expected an array in NumPy's format"),
    ],
)
def test_headers_of_arrays(path, content, message):
    write_npz(path, "x_train.npy", content)
    with refused(message.replace("|", r"\|")):
        readers.read_npz(path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_all_versions_of_the_format_of_arrays(path, version):
    array = np.asfortranarray(PICTURES.astype(">i2"))
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(version, 0))
    write_npz(path, "x_train.npy", file.getvalue())
    np.testing.assert_array_equal(readers.read_npz(path)["x_train"], PICTURES)


def test_members_that_cannot_be_read(path):
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_npz(path, "x_train.npy", compress_type=method)
        with refused(f"x_train is compressed by method {method}, expected 0 .* or 8"):
            readers.read_npz(path)
    for name in ("../x_train.npy", "/x_train.npy", "x_train.npy/"):
        write_npz(path, name)
        with refused("no array x_train; expected x_train, y_train"):
            readers.read_npz(path)
    for name in ("y_train.npy", "y_train"):
        with pytest.warns(UserWarning, match="Duplicate") if "." in name else open(os.devnull):
            write_npz(path, "x_train.npy")
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(name, b"")
        with refused("2 arrays y_train, expected one"):
            readers.read_npz(path)
    write_npz(path)
    whole = path.read_bytes()
    # In the list of members: flags, method, size before and after.
    entry = whole.index(b"PK\1\2")
    for position, value, message in (
        (8, struct.pack("<H", 1), "x_train is encrypted"),
        (8, struct.pack("<H", 0x41), "x_train is encrypted"),
        (10, struct.pack("<H", 99), "x_train is compressed by method 99"),
        (24, struct.pack("<I", 2**28), "384 bytes cannot hold the 268435456 that the file"),
        (20, struct.pack("<II", 2**28, 2**28), "bytes cannot hold the 268435456"),
        (16, bytes(4), "Bad CRC-32"),
    ):
        changed = bytearray(whole)
        changed[entry + position : entry + position + len(value)] = value
        path.write_bytes(changed)
        with refused(message):
            readers.read_npz(path)


def test_a_list_of_a_million_members_is_not_read(path):
    entry = b"PK\1\2" + bytes(42)
    count = 2**15
    end = struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, count, count, count * len(entry), 0, 0)
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, count * len(entry), 0)
    wide += struct.pack("<4sIQI", b"PK\6\7", 0, count * len(entry), 1)
    for content in (end, end[:-2] + b"\2\0ok", wide + end[:12] + bytes(8) + end[20:]):
        path.write_bytes(count * entry + content)
        with refused("a list of members of 1507328 bytes, allowed are 1048576"):
            readers.read_npz(path)


@pytest.mark.parametrize("shape", [(0, 2**32 - 1, 2**32 - 1), (2**32 - 1,) * 3, (0, 0, 0)])
def test_sizes_of_idx_files(path, shape):
    path.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *shape))
    with refused("at least one entry" if 0 in shape else "16 bytes, expected 79228162458924105"):
        readers.read_idx(path, 3)


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
        readers.decode_jpegs(path, (8, 8, 3))


def test_jpegs_are_counted_before_there_is_room_for_them(path, monkeypatch):
    monkeypatch.setenv(readers.LIMIT_VARIABLE, "1")
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
        readers.decode_jpegs(path, (32, 32, 3))


LABELS = b"C\x06labels"  # opcodes of protocol 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Puts what is on the stack at a place of the memo that has to be made first.
        (b"\x80\x03}r\xff\xff\xff\x7f.", "memo entry 2147483647 of 2"),
        (b"\x80\x03}p4294967295\n.", "memo entry 4294967295 of 2"),
        (b"\x80\x03}p-1\n.", "memo entry -1 of 2"),
        # Promises bytes.
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40), "unreadable, expected a CIFAR python batch"),
        # Makes an array, of whatever is in memory, instead of filling one.
        (b"\x80\x03}(C\x04datacnumpy\nndarray\nJ\x00\x00\x00\x40\x85R" + LABELS + b"]u.", "data"),
        (b"\x80\x03}(C\x04datacnumpy\nndarray\nX\x01\0\0\0b" + LABELS + b"]u.", "data"),
        # Lists in lists, each ten times.
        (b"\x80\x03}(C\x04dataN" + LABELS + b"](K\x01K\x01]h\0e" + b"u.", "unreadable"),
        (pickle.dumps({b"data": 1, b"labels": [[1]]}), "labels is no list of integers"),
        (pickle.dumps({b"data": 1, b"labels": [1.0]}), "labels is no list of integers"),
        (pickle.dumps({b"data": [1], b"labels": [1]}), "data is no array of bytes"),
        (pickle.dumps({b"data": np.zeros(3072), b"labels": [1]}, protocol=2), "no array of bytes"),
        # Makes one text into bytes again and again.
        (b"\x80\x03c_codecs\nencode\nq\0X\x40\0\0\0" + b"a" * 64 + b"q\1X\6\0\0\0latin1q\2"
         + 9 * b"h\0h\1h\2\x86R" + b".", "bytes in no form that Python writes"),
        (b"\x80\x03c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0zip\x86R.", "no form that Python writes"),
        (b"\x80\x03c_codecs\nencode\n}X\4\0\0\0roomJ\0\0\0\x40sb.", "an encoder has no state"),
        (b"\x80\x03cnumpy\nfromfile\n.", "numpy.fromfile does not belong in a data file"),
    ],
)  # fmt: skip
def test_pickles_of_cifar(path, content, message):
    path.write_bytes(content)
    with refused(message):
        read_batch(path)


# Pictures ----------------------------------------------------------------------------------------


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
    for read in (readers.read_gray, read_picture):
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
    for read in (readers.read_gray, read_picture):
        with refused("1.jpg: not a readable picture, expected JPEG or PNG"):
            read(path)
    assert not started.exists()


def test_only_files_have_names_of_pictures(tmp_path):
    folder = tmp_path / "train" / "n01"
    folder.mkdir(parents=True)
    Image.fromarray(PICTURES[0]).save(folder / "1.png")
    (folder / "2.png").symlink_to(folder / "1.png")
    (folder / "notes.txt").mkdir()
    assert [path.name for path in readers.list_images(folder)] == ["1.png", "2.png"]
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
        make(folder / "3.JPG")
        with refused("3.JPG: not a regular file, expected a picture"):
            readers.list_classes(tmp_path / "train")
        (folder / "3.JPG").rmdir() if make is os.mkdir else (folder / "3.JPG").unlink()


# Text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a film\t1\n".encode("utf-16"), "unreadable, expected .*UTF-8"),
        (b"a film\t1\nbad\xff\t0\n", "unreadable, expected .*UTF-8"),
        (b"a fi\0lm\t1\n", "character 19 is NUL"),
        (b"a " * 2**19 + b" film\t1\n", "line 2 has 1048583 characters, allowed are 1048576"),
    ],
)
def test_texts(path, content, message):
    path.write_bytes(b"sentence\tlabel\n" + content)
    with refused(message):
        readers.read_sentences(path)
    if "line" not in message:
        with refused(message.replace("sentences and labels in ", "")):
            readers.read_text(path)


def test_lines_are_counted_before_there_are_lists_of_them(path, monkeypatch):
    monkeypatch.setattr(readers, "_MOST_LINES", 5)
    path.write_text("a\n" * 5)
    assert readers.read_pairs([path, path]) == [["a"] * 5] * 2
    path.write_text("a\n" * 5 + "b")
    with refused("file: more lines than the 5 that are allowed"):
        readers.read_pairs([path, path])
    assert [*readers.lines(path, "a\n\nb")] == [(1, "a"), (2, ""), (3, "b")]
    assert [*readers.lines(path, "")] == [(1, "")]


# Everything else ---------------------------------------------------------------------------------


def contents():
    """Readable content for each reader."""
    npz, jpegs, png = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(npz, **EXAMPLES)
    pictures = {}
    for split in ("train", "test"):
        pictures |= {f"jpeg_{split}": np.frombuffer(jpeg(np.zeros((8, 8, 3), np.uint8)), np.uint8)}
        pictures |= {f"off_{split}": np.array([0, len(pictures[f"jpeg_{split}"])])}
        pictures |= {f"y_{split}": np.zeros(1, int)}
    np.savez(jpegs, **pictures)
    Image.fromarray(PICTURES[0]).save(png, "PNG")
    batch = {b"labels": [1], b"data": np.zeros((1, 3072), np.uint8)}
    return {
        "npz": npz.getvalue(),
        "jpegs": jpegs.getvalue(),
        "idx": gzip.compress(idx(PICTURES)),
        "batch": pickle.dumps(batch, protocol=2),
        "sentences": b"sentence\tlabel\na good film\t1\n",
        "gray": png.getvalue(),
        "picture": jpeg(PICTURES[0]),
    }


@pytest.mark.parametrize("name", ["npz", "jpegs", "idx", "batch", "sentences", "gray", "picture"])
def test_damaged_bytes(path, name):
    """Cut, changed in a few places, or with something put between: read, or refused in one line."""
    rng = np.random.default_rng(0)
    whole = contents()[name]
    path.write_bytes(whole)
    READERS[name](path)
    refusals = []
    for _ in range(60):
        changed = bytearray(whole)
        # Half of the time where headers and lists of contents lie.
        reach = min(len(whole), 300) if rng.integers(2) else len(whole)
        position = int(rng.integers(reach)) * (1 if rng.integers(2) else -1) - 1
        few = rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8).tobytes()
        match rng.integers(3):
            case 0:
                del changed[position:]
            case 1:
                changed[position : position + len(few)] = few
            case 2:
                changed[position:position] = few
        path.write_bytes(changed)
        try:
            READERS[name](path)
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert "\n" not in "".join(refusals)
