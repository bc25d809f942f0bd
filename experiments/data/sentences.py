"""The tasks on SST-2: GLUE's sentences of film reviews, negative (0) or positive (1).

The files are `sst2.train.tsv` and `sst2.dev.tsv`, or `SST-2/train.tsv` and `SST-2/dev.tsv` as GLUE
unpacks them, each plain or `.gz`; the test split is `dev`, since GLUE keeps the labels of its own
test rows. A sentence becomes a row of token ids: 0 is padding, 1 a word that the training split
does not have, and from 2 on come the lower-cased words of the training split, the most frequent
first. Rows are as long as the longest of the whole training file (52 words), at most 100; longer
sentences are cut.

Preprocessing and subsets follow Song et al., "Does SGD really happen in tiny subspaces?" (2024).
The words are ours: their code reads the 30,522 word pieces of distilbert-base-uncased; the words of
1,000 rows are 2,894.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.readers.arrays import Arrays
from experiments.data.readers.files import DataError, find
from experiments.data.readers.hubs import check_labels, check_texts, read_hub
from experiments.data.readers.texts import read_sentences
from experiments.data.tasks import Split, Task, make_task, split_arrays

# The training file and the development file, where GLUE or this project puts them.
_FILES = (("sst2.train.tsv", "sst2.dev.tsv"), ("SST-2/train.tsv", "SST-2/dev.tsv"))
_UNKNOWN, _FIRST_WORD = 1, 2  # token ids; padding is 0
_MAX_TOKENS = 100  # positions of the model of Song et al.


def load_sst2(name: str, folder: Path, hub: str | None) -> Task:
    """A task on SST-2.

    Args:
      name: name of the task.
      folder: folder with the files.
      hub: data set to read instead, `hf:...` or `tfds:...`.

    Returns:
      The task.

    Raises:
      DataError: a file is missing or damaged, or there are too few rows.
    """
    path, arrays = (folder, _read_hub(hub)) if hub else read_files(folder)
    splits = split_arrays(name, path, arrays)
    longest = max(len(_words(sentence)) for sentence in arrays["x_train"])
    splits, size = _tokenize(splits, min(longest, _MAX_TOKENS))
    return make_task(name, splits, num_classes=2, vocabulary_size=size)


def read_files(folder: Path) -> tuple[Path, Arrays]:
    """A path for error messages, and the sentences and labels of both files.

    Args:
      folder: folder with the files.

    Returns:
      The path, and ``x_train``, ``y_train``, ``x_test`` and ``y_test``.

    Raises:
      DataError: a file is missing or damaged.
    """
    paths = find(folder, _FILES, "SST-2")
    return paths[0], _arrays([read_sentences(path) for path in paths])


def _read_hub(hub: str) -> Arrays:
    columns = read_hub(hub, ("train", "validation"), [("sentence",), ("label",)])
    pairs = [
        (check_texts(hub, part, x), check_labels(hub, part, y)) for part, (x, y) in columns.items()
    ]
    for _, y in pairs:
        if y.min() < 0 or y.max() > 1:
            raise DataError(f"{hub}: labels lie between {y.min()} and {y.max()}, expected 0 and 1")
    return _arrays(pairs)


def _arrays(pairs: Sequence[tuple[Any, Any]]) -> Arrays:
    """Arrays of the sentences and labels of train and test."""
    (x_train, y_train), (x_test, y_test) = (
        (np.array(x, object), np.asarray(y, np.int32)) for x, y in pairs
    )
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _tokenize(splits: list[Split], length: int) -> tuple[list[Split], int]:
    """Rows of `length` token ids, and the number of different ids."""
    rows, size = word_ids(count_words(splits[0].x))
    return [Split(rows(split.x, length), split.y) for split in splits], size


def count_words(sentences: Iterable[str]) -> collections.Counter[str]:
    """How often each lower-cased word occurs.

    Args:
      sentences: the sentences.

    Returns:
      The numbers by word, in the order in which the words are read.
    """
    return collections.Counter(itertools.chain.from_iterable(map(_words, sentences)))


def word_ids(
    counts: collections.Counter[str], most: int | None = None
) -> tuple[Callable[[Iterable[str], int], np.ndarray], int]:
    """What makes rows of token ids of sentences.

    Args:
      counts: how often each word occurs in the training split.
      most: the largest number of different ids; rarer words are unknown ones.

    Returns:
      A function of sentences and the length of the rows, and the number of different ids.
    """
    words = counts.most_common(None if most is None else most - _FIRST_WORD)
    # Equally frequent words come in the order in which they are read.
    ids = {word: i for i, (word, _) in enumerate(words, _FIRST_WORD)}

    def rows(sentences: Iterable[str], length: int) -> np.ndarray:
        return padded([[ids.get(w, _UNKNOWN) for w in _words(s)] for s in sentences], length)

    return rows, _FIRST_WORD + len(ids)


def padded(rows: Sequence[Sequence[int]], length: int, padding: int = 0) -> np.ndarray:
    """Rows of equal length.

    Args:
      rows: the rows; longer ones are cut, shorter ones are filled up at the end.
      length: length of all rows of the result.
      padding: number that fills rows up.

    Returns:
      An array of int32.
    """
    array = np.full((len(rows), length), padding, np.int32)
    for target, row in zip(array, rows, strict=True):
        target[: len(row)] = row[:length]
    return array


def _words(sentence: str) -> list[str]:
    return sentence.lower().split()
