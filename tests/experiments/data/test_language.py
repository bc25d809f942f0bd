"""Texts as windows, from files that the tests write and from real ones where there are any."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import data
from tests.experiments.data.files import assert_fails, write_text, write_wikitext


def test_characters_are_bytes_and_labels_the_next_ones(tmp_path):
    text = write_text(tmp_path)
    task = data.load_task("tiny_shakespeare", data_dir=tmp_path)
    assert (task.input_shape, task.vocabulary_size, task.num_classes) == ((128,), 256, 0)
    cuts = [0, 9 * len(text) // 10, 19 * len(text) // 20, len(text)]
    splits = (task.train, task.validation, task.test)
    for split, start, end in zip(splits, cuts, cuts[1:], strict=False):
        part = text[start:end]
        assert len(split) == (len(part) - 1) // 128
        x, y = split.x.reshape(-1), split.y.reshape(-1)
        assert bytes(x.astype(np.uint8)).decode() == part[: len(x)]
        assert bytes(y.astype(np.uint8)).decode() == part[1 : len(x) + 1]
    write_text(tmp_path, lines=50)
    assert_fails(
        "tokens for validation, expected more than 128", "tiny_shakespeare", data_dir=tmp_path
    )


@pytest.mark.parametrize(
    "names",
    [
        ("wikitext2.train.txt.gz", "wikitext2.valid.txt.gz", "wikitext2.test.txt.gz"),
        ("wikitext-2/train.txt", "wikitext-2/valid.txt", "wikitext-2/test.txt"),
        (
            "wikitext-2/wiki.train.tokens",
            "wikitext-2/wiki.valid.tokens",
            "wikitext-2/wiki.test.tokens",
        ),
    ],
)
def test_words_of_wikitext(tmp_path, names):
    write_wikitext(tmp_path, names)
    task = data.load_task("wikitext2", data_dir=tmp_path)
    # "<eos>", "=", "Title", 9 numbers, "Some", "<unk>", "words", ",", "here", ".".
    assert (task.input_shape, task.vocabulary_size) == ((35,), 3 + 9 + 6)
    x, y = task.train.x.reshape(-1), task.train.y.reshape(-1)
    # Every line ends with <eos>, also an empty one.
    assert x[:9].tolist() == [0, 1, 2, 3, 1, 0, 0, 4, 5]
    np.testing.assert_array_equal(x[1:], y[:-1])
    # 14 tokens a title, the last of which is only a label.
    assert len(x) == (30 * 14 - 1) // 35 * 35
    # Words that the training text does not have are the unknown one.
    assert task.validation.x.reshape(-1)[-1] in (0, 5)
    assert task.validation.x.max() < task.vocabulary_size


def test_real_texts(data_dir):
    words = data.load_task("wikitext2", data_dir=data_dir)
    # The numbers of PyTorch's example of that data.
    assert words.vocabulary_size == 33_278
    assert len(words.train) == (2_088_628 - 1) // 35
    characters = data.load_task("tiny_shakespeare", data_dir=data_dir)
    assert len(np.unique(characters.train.x)) == 65
    assert len(characters.train) == 7_842
