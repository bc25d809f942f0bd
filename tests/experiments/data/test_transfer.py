"""Data to pretrain on and to fine-tune for, from files that the tests write."""

from __future__ import annotations

import numpy as np

from experiments import data
from experiments.data.transfer import shifted_digits, text_to_reviews
from tests.experiments.data.files import write_sst2, write_wikitext


def test_text_and_reviews_have_one_vocabulary(tmp_path):
    write_sst2(tmp_path)
    write_wikitext(tmp_path, [f"wikitext2.{part}.txt" for part in ("train", "valid", "test")])
    windows, task = text_to_reviews(tmp_path, vocabulary_size=12, length=6)
    text = (tmp_path / "wikitext2.train.txt").read_text().lower()
    words = text.replace("\n", " <eos> ").split()
    assert windows.shape == (len(words) // 7, 7)
    assert task.vocabulary_size == 12
    assert (len(task.train), task.train.x.shape[1]) == (1_000, 6)
    # The same words have the same ids, and rare ones and "<unk>" the id 1.
    seen = dict(zip(words, windows.ravel().tolist(), strict=False))
    assert seen["<unk>"] == 1
    assert sorted(set(windows.ravel().tolist())) == sorted(set(seen.values()))
    assert windows.max() < 12
    first = task.train.x[0]  # "<number> is even ." or the like
    assert (first[4:] == 0).all()
    assert seen.get(".", -1) in first[:4]


def test_digits_move_to_the_right_and_down():
    plain = data.load_task("digits")
    before, after = shifted_digits(2, 300)
    assert (len(before.train), len(after.train), len(after.test)) == (1_077, 300, 360)
    np.testing.assert_array_equal(after.test.x[:, 2:, 2:], plain.test.x[:, :-2, :-2])
    np.testing.assert_array_equal(after.train.y, plain.train.y[:300])
