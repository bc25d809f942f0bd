"""Files that are damaged or made to do harm: each is one line, and takes no memory on its word."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import os
import pickle
import signal
import socket

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from experiments.data.readers.arrays import read_idx, read_npy, read_npz
from experiments.data.readers.files import LIMIT_VARIABLE, DataError, plain_or_gzipped
from experiments.data.readers.pictures import decode_jpegs, read_gray
from experiments.data.readers.tables import read_table
from experiments.data.readers.texts import read_pairs, read_sentences, read_text
from tests.experiments.data.files import idx, jpeg
from tests.experiments.data.readers.helpers import (
    EXAMPLES,
    MIB,
    PICTURES,
    read_batch,
    read_picture,
    refused,
)


def read_columns(path, suffix):
    table = read_table(path, suffix=suffix)
    return [table[name] for name in table.names]


READERS = {
    "npz": read_npz,
    "jpegs": lambda path: decode_jpegs(path, (8, 8, 3)),
    "idx": lambda path: read_idx(path, 3),
    "batch": read_batch,
    "text": read_text,
    "sentences": read_sentences,
    "pairs": lambda path: read_pairs([path, path]),
    "gray": read_gray,
    "picture": read_picture,
    "npy": read_npy,
    **{suffix: functools.partial(read_columns, suffix=suffix) for suffix in (".csv", ".jsonl")},
    ".parquet": functools.partial(read_columns, suffix=".parquet"),
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
        assert plain_or_gzipped(path) == (tmp_path / "file.gz" if kind == "nothing" else path)


def test_content_is_limited_before_it_is_unpacked(path, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "16")
    content, arrays = idx(np.zeros((20, 1024, 1024), np.uint8)), path.with_suffix(".npz")
    path.write_bytes(gzip.compress(content, compresslevel=1))
    too_much = rf"bytes when unpacked, allowed are {16 * MIB}; set {LIMIT_VARIABLE} to"
    for read in (READERS["idx"], read_text):
        with refused(too_much):
            read(path)
    for save in (np.savez, np.savez_compressed):
        save(arrays, **EXAMPLES | {"x_train": np.zeros((20, MIB), np.uint8)})
        with refused(too_much):
            read_npz(arrays)
    monkeypatch.setenv(LIMIT_VARIABLE, "32")
    assert read_idx(path, 3).shape == (20, 1024, 1024)
    assert read_npz(arrays)["x_train"].shape == (20, MIB)
    for value in ("0", "-1", "1.5", "many", "1e3", "99999999"):
        monkeypatch.setenv(LIMIT_VARIABLE, value)
        with refused(f"{LIMIT_VARIABLE} is '{value}', expected a number of MiB"):
            read_idx(path, 3)


def test_names_of_files_cannot_break_the_line(tmp_path):
    path = tmp_path / "a\nb\x1b[31m"
    with refused(r"a\\nb\\x1b\[31m: unreadable"):
        read_text(path)


def contents():
    """Readable content for each reader."""
    npz, jpegs, png, npy, table = (io.BytesIO() for _ in range(5))
    np.save(npy, PICTURES)
    columns = {"a": [1.5, None] * 9, "b": ["one", "two"] * 9, "c": [[1, 2], [3, 4]] * 9}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
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
        "npy": npy.getvalue(),
        ".csv": b'a,b\n1,"one, two"\n2,three\n' * 9,
        ".jsonl": b'{"a": [1, 2], "b": "one"}\n' * 9,
        ".parquet": table.getvalue(),
    }


@pytest.mark.parametrize("name", sorted(contents()))
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
