"""Text files: lines, sentences with labels, sentences in several languages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.readers.files import DataError, read_bytes, reading

_LONGEST_LINE, _MOST_LINES = 2**20, 2**22


def read_text(path: Path, expected: str = "text in UTF-8, gzipped or not") -> str:
    r"""The text of a file in UTF-8, gzipped or not.

    Args:
      path: the file.
      expected: what the file should be, for error messages.

    Returns:
      The text, in which lines end with ``\n``, also where the file has ``\r\n``.

    Raises:
      DataError: the file cannot be read, is too large, not UTF-8 or has a NUL character.
    """
    with reading(path, expected):
        text = read_bytes(path, expected).decode()
        if (position := text.find("\0")) >= 0:
            raise ValueError(f"character {position} is NUL")
    return text.replace("\r\n", "\n")


def lines(path: Any, text: str) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers, from 1.

    Args:
      path: the file of the text, for error messages.
      text: the text.

    Yields:
      The number and the content of each line.

    Raises:
      DataError: a line has more than 1,048,576 characters, or there are more than 4,194,304.
    """
    start, number = 0, 0
    while start < len(text) or not number:
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        number += 1
        if number > _MOST_LINES:
            raise DataError(f"{path}: more lines than the {_MOST_LINES} that are allowed")
        if end - start > _LONGEST_LINE:
            raise DataError(
                f"{path}: line {number} has {end - start} characters, allowed are {_LONGEST_LINE}"
            )
        yield number, text[start:end]
        start = end + 1


def read_pairs(paths: Sequence[Path]) -> list[list[str]]:
    """The lines of several files that hold the same sentences in several languages.

    Args:
      paths: the files, one per language.

    Returns:
      For each file its lines.

    Raises:
      DataError: a file cannot be read, a line is empty, or the numbers of lines differ.
    """
    columns = []
    for path in paths:
        column: list[str] = []
        for number, line in lines(path, read_text(path)):
            if not line.strip():
                raise DataError(f"{path}: line {number} is empty, expected a sentence")
            column.append(line)
        columns.append(column)
    numbers = [len(column) for column in columns]
    if len(set(numbers)) > 1:
        raise DataError(
            f"{paths[1]}: {numbers[1]} lines, expected {numbers[0]}, one for each of {paths[0]}"
        )
    return columns


def read_sentences(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sentences and labels of a file in GLUE's format: a header, then sentence, tab, label.

    Args:
      path: the file.

    Returns:
      The sentences, as an array of objects, and the labels, 0 or 1, as int32.

    Raises:
      DataError: the file cannot be read or has another format.
    """
    sentences, labels = [], []
    text = read_text(path, "sentences and labels in UTF-8, gzipped or not")
    for number, line in lines(path, text):
        if number == 1:
            if line.split() != ["sentence", "label"]:
                raise DataError(
                    f"{path}: line 1 is {line[:40]!r}, expected the header 'sentence', tab, 'label'"
                )
            continue
        sentence, _, label = line.rpartition("\t")
        if not sentence.strip() or label.strip() not in ("0", "1"):
            raise DataError(
                f"{path}: line {number} is {line[:40]!r}, expected a sentence, a tab and 0 or 1"
            )
        sentences.append(sentence)
        labels.append(int(label))
    if not labels:
        raise DataError(f"{path}: no line after the header, expected sentences and labels")
    return np.array(sentences, object), np.array(labels, np.int32)
