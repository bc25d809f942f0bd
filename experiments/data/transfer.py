"""Tasks to pretrain on and to fine-tune for, whose inputs mean the same.

`text_to_reviews` gives WikiText-2's text and SST-2's reviews one vocabulary: the most frequent
lower-cased words of both training splits. `shifted_digits` needs no files: digits, and the same
images moved by some pixels.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np

from experiments.data import language, sentences
from experiments.data.images import load_digits
from experiments.data.loading import data_folder
from experiments.data.tasks import Split, Task, make_task, split_arrays


def text_to_reviews(
    data_dir: Path | None, *, vocabulary_size: int, length: int
) -> tuple[np.ndarray, Task]:
    """Windows of WikiText-2, and the task `sst2_1k` in the same words.

    Args:
      data_dir: folder with the files of both; None for the one that OPTAX_ACCEL_DATA names.
      vocabulary_size: number of token ids; 0 is padding, 1 any rarer word.
      length: number of tokens of a window and of a sentence; longer sentences are cut.

    Returns:
      Token ids of the training text, int32 of shape (windows, length + 1), of which the last is
      only to be predicted; and the task.

    Raises:
      DataError: a file is missing or damaged.
    """
    paths, texts = language.read_files("wikitext2", data_folder("wikitext2", data_dir))
    words = [word.lower() for word in language.words_and_ends(paths[0], texts[0])]
    place, arrays = sentences.read_files(data_folder("sst2_1k", data_dir))
    splits = split_arrays("sst2_1k", place, arrays)
    counts = collections.Counter(words)
    counts.update(sentences.count_words(splits[0].x))
    del counts["<unk>"]  # it stands for a rarer word, which has the id of unknown ones
    rows, size = sentences.word_ids(counts, vocabulary_size)
    windows = len(words) // (length + 1)
    # A row of words is read as one sentence, so that it is divided afterwards, not cut.
    tokens = rows([" ".join(words)], len(words))[0]
    task = make_task(
        "sst2_1k",
        [Split(rows(split.x, length), split.y) for split in splits],
        num_classes=2,
        vocabulary_size=size,
    )
    return tokens[: windows * (length + 1)].reshape(windows, length + 1), task


def shifted_digits(pixels: int, examples: int) -> tuple[Task, Task]:
    """The task `digits`, and the same with images moved to the right and down.

    Args:
      pixels: by how many; what leaves an image at one side comes back at the other.
      examples: number of training examples of the second task, the first ones.

    Returns:
      Both tasks.
    """
    task = load_digits()

    def moved(split: Split) -> Split:
        return dataclasses.replace(split, x=np.roll(split.x, (pixels, pixels), axis=(1, 2)))

    shifted = dataclasses.replace(
        task,
        train=moved(task.train)[:examples],
        validation=moved(task.validation),
        test=moved(task.test),
    )
    return task, shifted
