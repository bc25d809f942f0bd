"""Checksums tell data sets from each other."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from experiments import data
from experiments.data.readers import pictures
from experiments.data.readers.pictures import ImageFiles, list_images
from experiments.runs.records import first_difference
from tests.experiments.data.files import write_imagenet


def test_checksums_tell_which_part_of_the_data_differs(tmp_path):
    task = data.load_task("digits")
    expected = task.checksums
    assert expected == data.load_task("digits").checksums
    for split in ("train", "validation", "test"):
        old = getattr(task, split)
        x, y = old.x.copy(), old.y.copy()
        x[-1, -1, -1] += 1
        y[-1] += 1
        for kind, new in (("examples", data.Split(x, old.y)), ("labels", data.Split(old.x, y))):
            changed = dataclasses.replace(task, **{split: new}).checksums
            difference = first_difference({"data": expected}, {"data": changed})
            assert difference == f"other {kind} of the {split} split"
    # The same bytes in another shape, or another type.
    reshaped = data.Split(task.test.x.reshape(360, 4, 16, 1), task.test.y.view(np.float32))
    assert not {*reshaped.checksums().values()} & {*task.test.checksums().values()}
    for older in (None, {}, {"train": 3}, [1], {"train": {"examples": 1}}):
        difference = first_difference({"data": older}, {"data": expected})
        assert difference == (
            "no checksums of all its data, because an older version of this project made it"
        )
    # Where the labels are the examples there is one number.
    autoencoder = data.Split(task.test.x, task.test.x).checksums()
    assert autoencoder["labels"] == autoencoder["examples"]


def test_checksums_of_pictures(tmp_path, monkeypatch):
    def checksum():
        paths = list_images(tmp_path / "train" / "n01")
        return ImageFiles(paths, 8, np.zeros(3), np.ones(3)).checksum()

    write_imagenet(tmp_path, rows=5)
    path = tmp_path / "train" / "n01" / "n01_3.png"
    content, times = path.read_bytes(), (0, path.stat().st_mtime_ns)

    def write(changed):
        path.write_bytes(changed)
        os.utime(path, ns=times)

    # Few bytes count as a whole, whenever they were written.
    expected = checksum()
    os.utime(path)
    assert checksum() == expected
    write(content[:-1] + b"x")
    assert checksum() != expected
    write(content)
    assert checksum() == expected
    # Of many, sizes, times and some of the files.
    monkeypatch.setattr(pictures, "_CHECKSUM_BYTES", 100)
    monkeypatch.setattr(pictures, "_CHECKSUM_FILES", 2)
    expected = checksum()
    write(content[:-1] + b"x")  # every third file is read, the first and this one
    assert checksum() != expected
    write(content)
    assert checksum() == expected
    os.utime(path)
    assert checksum() != expected
    write(content + b"x")
    assert checksum() != expected
    write(content)
    path.rename(path.with_name("n01_9.png"))
    assert checksum() != expected
