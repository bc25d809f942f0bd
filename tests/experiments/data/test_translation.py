"""Pairs of sentences as pieces of words."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import data
from tests.experiments.data.files import assert_fails, write_pairs


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_pairs_become_source_shifted_target_and_labels(tmp_path, suffix):
    write_pairs(tmp_path, suffix)
    task = data.load_task("multi30k", data_dir=tmp_path)
    assert (task.input_shape, task.num_classes) == ((40, 40), 0)
    assert task.vocabulary_size < 200
    for split, rows in ((task.train, 30), (task.validation, 8), (task.test, 8)):
        assert (split.x.shape, split.y.shape) == ((rows, 80), (rows, 40))
        source, shifted = split.x[:, :40], split.x[:, 40:]
        for row in range(rows):
            length = (split.y[row] != -1).sum()
            assert split.y[row, length - 1] == 2  # end
            assert (split.y[row, :length] > 0).all()
            assert shifted[row, 0] == 1  # begin
            np.testing.assert_array_equal(shifted[row, 1:length], split.y[row, : length - 1])
            assert (shifted[row, length:] == 0).all()
            assert source[row, (source[row] != 0).sum() - 1] == 2
    assert task.train.x.max() < task.vocabulary_size
    # The same pieces every time.
    again = data.load_task("multi30k", data_dir=tmp_path)
    np.testing.assert_array_equal(again.test.x, task.test.x)


def test_long_sentences_are_cut(tmp_path):
    write_pairs(tmp_path)
    long = "".join(f"{i} men. " for i in range(60))
    for lang in ("en", "de"):
        path = tmp_path / f"multi30k.val.{lang}"
        path.write_text(path.read_text() + long + "\n")
    task = data.load_task("multi30k", data_dir=tmp_path)
    assert (task.validation.x[-1] > 0).all()
    assert (task.validation.y[-1] > 0).all()


def test_pairs_that_do_not_fit_together(tmp_path):
    write_pairs(tmp_path)
    path = tmp_path / "multi30k.val.de"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert_fails("val.de: 7 lines, expected 8, one for each of", "multi30k", data_dir=tmp_path)
    path.write_text("".join([*lines[:3], "\n", *lines[4:]]))
    assert_fails("val.de: line 4 is empty, expected a sentence", "multi30k", data_dir=tmp_path)
    path.unlink()
    assert_fails("val.de: unreadable, expected text in UTF-8", "multi30k", data_dir=tmp_path)


def test_real_pairs(data_dir):
    pairs = data.load_task("multi30k", data_dir=data_dir)
    assert [len(s) for s in (pairs.train, pairs.validation, pairs.test)] == [29_000, 1_014, 1_000]
    assert pairs.vocabulary_size == 8_000
    assert (pairs.train.y[:, -1] != -1).mean() < 0.005  # cut
    assert (pairs.test.x == 3).mean() < 0.001  # unknown
