"""Language models' tasks: a text as windows, one behind the other.

`x` are the tokens of a window, `y` the tokens that follow each of them; a model sees no window but
its own. WikiText-2 (`wikitext2.train.txt`, `.valid`, `.test`, or the folder `wikitext-2` with
`train.txt` or `wiki.train.tokens` ...) is split at its blanks, and a line ends with `<eos>`: 33,278
different words, windows of 35. Tiny Shakespeare is `tinyshakespeare.txt`, cut into 90, 5 and 5 per
cent; its tokens are bytes, in windows of 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.data.readers.files import DataError, find
from experiments.data.readers.hubs import check_texts, read_hub
from experiments.data.readers.texts import lines, read_text
from experiments.data.tasks import SPLITS, Split, Task, make_task

_WIKITEXT_FILES = (
    [f"wikitext2.{part}.txt" for part in ("train", "valid", "test")],
    [f"wikitext-2/{part}.txt" for part in ("train", "valid", "test")],
    [f"wikitext-2/wiki.{part}.tokens" for part in ("train", "valid", "test")],
)
_WINDOWS = {"wikitext2": 35, "tiny_shakespeare": 128}


def load_windows(name: str, folder: Path, hub: str | None) -> Task:
    """The task `wikitext2` or `tiny_shakespeare`.

    Args:
      name: name of the task.
      folder: folder with the files.
      hub: data set to read instead, `hf:...` or `tfds:...`.

    Returns:
      The task.

    Raises:
      DataError: a file is missing or damaged, or shorter than a window.
    """
    paths, texts = ([folder] * len(SPLITS), _read_hub(hub)) if hub else read_files(name, folder)
    if name == "wikitext2":
        tokens, size = _word_ids(paths, texts)
    else:
        tokens = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        size = 256
    length = _WINDOWS[name]
    splits = []
    for path, part, row in zip(paths, SPLITS, tokens, strict=True):
        windows = (len(row) - 1) // length
        if not windows:
            raise DataError(
                f"{path}: {len(row)} tokens for {part}, expected more than {length}, a window"
            )
        x, y = (row[i : i + windows * length].reshape(windows, length) for i in (0, 1))
        splits.append(Split(x, y))
    return make_task(name, splits, num_classes=0, vocabulary_size=size)


def _read_hub(hub: str) -> list[str]:
    """The texts of the splits."""
    return [
        "\n".join(row.removesuffix("\n") for row in check_texts(hub, part, rows, "a text"))
        for part, (rows,) in read_hub(hub, SPLITS, [("text",)]).items()
    ]


def read_files(name: str, folder: Path) -> tuple[list[Path], list[str]]:
    """The file and the text of each split.

    Args:
      name: ``"wikitext2"`` or ``"tiny_shakespeare"``.
      folder: folder with the files.

    Returns:
      Three paths and three texts.

    Raises:
      DataError: a file is missing or damaged.
    """
    if name == "wikitext2":
        paths = find(folder, _WIKITEXT_FILES, "WikiText-2")
        return paths, [read_text(path) for path in paths]
    (path,) = find(folder, [["tinyshakespeare.txt"]], "Tiny Shakespeare")
    text = read_text(path)
    first, second = 9 * len(text) // 10, 19 * len(text) // 20
    return [path] * len(SPLITS), [text[:first], text[first:second], text[second:]]


def _word_ids(paths: Sequence[Path], texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
    """The words of each text as numbers, in the order of the training text, and their number.

    Words that the training text does not have, of which WikiText-2's own files have none, become
    the one that stands for rare words.
    """
    ids: dict[str, int] = {}
    words = words_and_ends(paths[0], texts[0])
    tokens = [np.fromiter((ids.setdefault(word, len(ids)) for word in words), np.int32)]
    unknown = ids.setdefault("<unk>", len(ids))
    for path, text in zip(paths[1:], texts[1:], strict=True):
        words = words_and_ends(path, text)
        tokens.append(np.fromiter((ids.get(word, unknown) for word in words), np.int32))
    return tokens, len(ids)


def words_and_ends(path: Path, text: str) -> Iterator[str]:
    """The words of a text, and ``<eos>`` behind each line.

    Args:
      path: the file of the text, for error messages.
      text: the text.

    Yields:
      The words.

    Raises:
      DataError: a line is too long.
    """
    for _, line in lines(path, text):
        yield from line.split()
        yield "<eos>"
