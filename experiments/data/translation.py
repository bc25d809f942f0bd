"""The task `multi30k`: descriptions of pictures, English to German.

Multi30k (`multi30k.train.en`, `.de`, `multi30k.val...`, `multi30k.test_2016_flickr...`, or the same
in a folder `multi30k` without that beginning) is cut into 8,000 byte-pair pieces for both languages
by SentencePiece, learned from the training split. A row of `x` is the source, then the target
behind a begin token, each of 40 pieces: padding 0, begin 1, end 2, unknown 3; a row of `y` is the
target and an end token. Labels of -1 are padding and count for nothing.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.readers.files import DataError, find
from experiments.data.readers.hubs import check_texts, read_hub
from experiments.data.readers.texts import read_pairs
from experiments.data.sentences import padded
from experiments.data.tasks import IGNORED, SPLITS, Split, Task, make_task

_LANGUAGES = ("en", "de")
_PARTS = ("train", "val", "test_2016_flickr")
_NUM_PIECES = 8_000
_LENGTH = 40  # pieces of a sentence
_PADDING, _BEGIN, _END, _UNKNOWN = range(4)


def load_multi30k(name: str, folder: Path, hub: str | None) -> Task:
    """The task `multi30k`.

    Args:
      name: name of the task.
      folder: folder with the files.
      hub: data set to read instead, `hf:...` or `tfds:...`.

    Returns:
      The task.

    Raises:
      DataError: a file is missing or damaged, or SentencePiece cannot learn from it.
    """
    pairs = _read_hub(hub) if hub else [_read_files(folder, part) for part in _PARTS]
    pieces = _learn_pieces(itertools.chain.from_iterable(pairs[0]), hub or folder)
    splits = []
    for pair in pairs:
        # Cut at once: a line may be long, and a number takes more room than a character.
        source, target = (
            [[*pieces.encode(sentence)[:_LENGTH], _END] for sentence in sentences]
            for sentences in pair
        )
        shifted = [[_BEGIN, *row[:-1]] for row in target]
        x = np.concatenate([padded(rows, _LENGTH, _PADDING) for rows in (source, shifted)], axis=1)
        splits.append(Split(x, padded(target, _LENGTH, IGNORED)))
    return make_task(
        name,
        splits,
        num_classes=0,
        vocabulary_size=pieces.get_piece_size(),
        input_shape=(_LENGTH, _LENGTH),
    )


def _read_hub(hub: str) -> list[list[list[str]]]:
    """The sentences of each split in both languages."""
    columns = read_hub(hub, SPLITS, [(language,) for language in _LANGUAGES])
    return [[check_texts(hub, part, texts) for texts in both] for part, both in columns.items()]


def _read_files(folder: Path, part: str) -> list[list[str]]:
    """The sentences of a split in both languages."""
    groups: Sequence[Sequence[str]] = [
        [f"{prefix}{part}.{language}" for language in _LANGUAGES]
        for prefix in ("multi30k.", "multi30k/")
    ]
    return read_pairs(find(folder, groups, "Multi30k"))


def _learn_pieces(sentences: Any, place: Any) -> Any:
    """SentencePiece's processor with pieces learned from an iterator of sentences."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=_NUM_PIECES,
            hard_vocab_limit=False,  # a small text has fewer
            pad_id=_PADDING,
            bos_id=_BEGIN,
            eos_id=_END,
            unk_id=_UNKNOWN,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"{place}: SentencePiece learns no pieces from the training split; expected "
            "sentences of words, of up to 4192 bytes"
        ) from error
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
