"""SST-2 as token ids, from files that the tests write and from real ones where there are any."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from experiments import data
from tests.experiments.data.files import assert_fails, write_sst2


@pytest.mark.parametrize(
    "names",
    [
        ("sst2.train.tsv.gz", "sst2.dev.tsv"),
        ("sst2.train.tsv", "sst2.dev.tsv.gz"),
        ("SST-2/train.tsv", "SST-2/dev.tsv"),
        ("SST-2/train.tsv.gz", "SST-2/dev.tsv.gz"),
    ],
)
def test_sst2_becomes_token_ids(tmp_path, names):
    write_sst2(tmp_path, names)
    task = data.load_task("sst2_1k", data_dir=tmp_path)
    assert (task.num_classes, task.input_shape, task.default_model) == (2, (4,), "transformer")
    # Padding, unknown, "is", ".", "even", "odd" and the 1,000 numbers.
    assert task.vocabulary_size == 2 + 4 + 1_000
    for split, rows in ((task.train, 1_000), (task.validation, 1_000), (task.test, 30)):
        assert (split.x.shape, split.x.dtype, split.y.dtype) == ((rows, 4), np.int32, np.int32)
        np.testing.assert_array_equal(split.y, np.arange(rows) % 2)
    # Most frequent first, then as they come: "is", ".", "even", "odd", "0", "1".
    assert task.train.x[:3].tolist() == [[6, 2, 4, 3], [7, 2, 5, 3], [8, 2, 4, 3]]
    assert task.validation.x[:2].tolist() == [[1, 2, 4, 3], [1, 2, 5, 3]]  # "1000", "1001"
    assert task.test.x[:2].tolist() == task.train.x[:2].tolist()


def test_sst2_is_as_long_as_the_longest_training_row_whatever_the_split(tmp_path):
    write_sst2(tmp_path, rows=5_010)
    train, dev = (tmp_path / f"sst2.{part}.tsv" for part in ("train", "dev"))
    train.write_text(train.read_text() + "one two three four five six\t1\n")
    dev.write_text("sentence\tlabel\r\n" + "odd " * 8 + "\t1\r\neven\t0")
    for name in ("sst2", "sst2_1k"):
        task = data.load_task(name, data_dir=tmp_path)
        assert task.train.x.shape[1] == task.validation.x.shape[1] == 6
        assert (task.train.x[:, 4:] == 0).all()
        odd, even = task.test.x[0, 0], task.test.x[1, 0]
        assert task.test.x.tolist() == [[odd] * 6, [even] + [0] * 5]
        assert task.test.y.tolist() == [1, 0]
    assert len(data.load_task("sst2", data_dir=tmp_path).train) == 11
    train.write_text(train.read_text() + "word " * 101 + "\t1\n")
    assert data.load_task("sst2", data_dir=tmp_path).input_shape == (100,)


def test_sst2_of_exactly_the_subset_halves_its_development_rows(tmp_path):
    write_sst2(tmp_path, rows=1_000)
    task = data.load_task("sst2_1k", data_dir=tmp_path)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [1_000, 15, 15]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 is '', expected the header 'sentence', tab, 'label'"),
        (b"index\tsentence\n0\tgood\n", "line 1 is 'index.tsentence', expected the header"),
        (b"sentence\tlabel\n", "no line after the header"),
        (b"sentence\tlabel\ngood\t1\nbad 0\n", "line 3 is 'bad 0', expected a sentence, a tab"),
        (b"sentence\tlabel\ngood\t2\n", "line 2 is 'good.t2', expected a sentence, a tab"),
        (b"sentence\tlabel\n \t1\n", "line 2 is ' .t1', expected a sentence, a tab"),
        (b"sentence\tlabel\ncaf\xe9\t1\n", "unreadable, expected sentences and labels in UTF-8"),
        # Without the time, which would make the name of the test another one each second.
        (gzip.compress(b"sentence\tlabel\n" * 9, mtime=0)[:-9], "unreadable, expected sentences"),
        (None, "sst2.dev.tsv: unreadable.*No such file"),
    ],
)
def test_damaged_sst2_file(tmp_path, content, message):
    write_sst2(tmp_path)
    path = tmp_path / "sst2.dev.tsv"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert_fails(message, "sst2_1k", data_dir=tmp_path)
    assert_fails(str(path), "sst2_1k", data_dir=tmp_path)


def test_real_sst2(data_dir):
    task = data.load_task("sst2_1k", data_dir=data_dir)
    assert (len(task.train), len(task.validation), len(task.test)) == (1_000, 1_000, 872)
    assert (task.input_shape, task.vocabulary_size) == ((52,), 2_896)
    assert set(np.unique(task.train.y)) == {0, 1}
    assert 0.05 < (task.test.x == 1).sum() / (task.test.x != 0).sum() < 0.4
    full = data.load_task("sst2", data_dir=data_dir)
    assert (len(full.train), len(full.validation), len(full.test)) == (62_349, 5_000, 872)
    assert full.input_shape == task.input_shape
    np.testing.assert_array_equal(full.train.y[:1_000], task.train.y)
    assert np.bincount(full.test.y).tolist() == [428, 444]  # GLUE's development rows
