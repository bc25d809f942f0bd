"""Data sets of Hugging Face and TensorFlow Datasets, on disk or by name."""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from experiments.data.readers.files import DataError, check_size, read_bytes, reading, reason
from experiments.data.readers.pictures import decode
from experiments.data.readers.texts import read_text

HUBS = ("hf", "tfds")
# The names of a split's columns, and its rows.
_Table = tuple[list[str], Iterable[Any]]


def hub_of(location: Any) -> str | None:
    """The hub that a location names.

    Args:
      location: `hf:...`, `tfds:...`, or the path of a folder.

    Returns:
      "hf" or "tfds"; None for a path.
    """
    kind, colon, _ = str(location).partition(":")
    return kind if colon and kind in HUBS else None


def read_hub(
    location: str, splits: Sequence[str], columns: Sequence[Sequence[str]]
) -> dict[str, list[list[Any]]]:
    """Reads columns of a data set that `datasets` or `tensorflow_datasets` manages.

    `hf:FOLDER` is a folder that `Dataset.save_to_disk` wrote; `hf:NAME` or `hf:NAME:CONFIGURATION`
    is what `datasets.load_dataset` finds under that name (in its cache, when offline).
    `tfds:FOLDER` is the folder of a version (with `dataset_info.json`); `tfds:NAME` is a data set
    that has been prepared in `~/tensorflow_datasets`. Its files must be ArrayRecord
    (`file_format="array_record"`), which needs no TensorFlow.

    Args:
      location: the data set, `hf:...` or `tfds:...`.
      splits: names of the splits to read.
      columns: the names that each column may have, e.g. `[("image", "img"), ("label",)]`.

    Returns:
      For each split its columns as lists. Pictures, which must be JPEG or PNG, become arrays of
      bytes, and texts `str`.

    Raises:
      DataError: the package, the data set, a split or a column is missing or damaged, or the
        values take more memory than `files.limit`.
    """
    kind, _, name = location.partition(":")
    read = {"hf": _hugging_face, "tfds": _tensorflow}[kind]
    tables = {}
    with reading(location, f"a data set with {', '.join(splits)}"):
        size = 0
        for split, (present, rows) in read(name, splits, columns).items():
            for names in columns:
                if _chosen(names, present) is None:
                    raise DataError(
                        f"{location}: split {split} has columns {', '.join(present)[:200]}, "
                        f"expected {' or '.join(names)}"
                    )
            values: list[list[Any]] = [[] for _ in columns]
            for number, row in enumerate(rows):
                for column, names in zip(values, columns, strict=True):
                    value = _plain(row[_chosen(names, present)], f"{location}: {split} {number}")
                    size += getattr(value, "nbytes", 0) or len(str(value))
                    column.append(value)
                check_size(location, size)
            if not values[0]:
                raise DataError(f"{location}: split {split} is empty")
            tables[split] = values
    return tables


def _chosen(names: Sequence[str], present: Sequence[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _hugging_face(
    name: str, splits: Sequence[str], columns: Sequence[Sequence[str]]
) -> dict[str, _Table]:
    datasets = _import("datasets", "hf")
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        _check_regular(folder)
        for file in Path(folder).rglob("*.arrow"):
            _check_uncompressed(file)
        data_set = datasets.load_from_disk(folder)
    else:
        path, _, configuration = name.partition(":")
        data_set = datasets.load_dataset(path, configuration or None)
    present = data_set.keys() if isinstance(data_set, dict) else ["one without a name"]

    def table(split: Any) -> _Table:
        # Its features would open pictures of any format.
        plain = split.with_format("arrow")
        names = [n for n in (_chosen(names, split.column_names) for names in columns) if n]
        for column in names:
            kind = str(split.data.schema.field(column).type)
            # In such types one long value may stand for any number of rows.
            if re.search("dictionary|run_end|view", kind):
                raise DataError(f"hf:{name}: column {column} is of type {kind[:40]}, expected rows")
        # Otherwise a damaged file could make pyarrow read beyond its memory.
        split.data.validate(full=True)

        def rows() -> Iterator[Any]:
            for batch in plain.iter(batch_size=1000):
                yield from batch.select(names).to_pylist()

        return split.column_names, rows()

    return {split: table(data_set[split]) for split in _known("hf", name, splits, present)}


def _tensorflow(
    name: str, splits: Sequence[str], columns: Sequence[Sequence[str]]
) -> dict[str, _Table]:
    tfds = _import("tensorflow_datasets", "tfds")
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        _check_regular(folder)
        _check_features(Path(folder) / "features.json")
        builder = tfds.builder_from_directory(folder)
    else:
        builder = tfds.builder(name)
    known = _known("tfds", name, splits, builder.info.splits.keys())
    features = builder.info.features
    # Its features would open pictures of any format.
    decoders = {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return {
        split: ([*features], builder.as_data_source(split=split, decoders=decoders or None))
        for split in known
    }


def _check_regular(folder: str) -> None:
    """Raises `DataError` if a folder holds anything but files and folders."""
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in names):
            if not os.path.isfile(path):
                raise DataError(f"{path}: not a regular file, expected one of a data set")


def _check_uncompressed(path: Path) -> None:
    """Raises `DataError` if a table in Arrow's stream format is compressed; Hugging Face's are not.

    It would be unpacked as a whole before anybody knows its size. The header of each batch, a
    flatbuffer, says whether it is compressed: `Message.header`, the third field, is a
    `RecordBatch`, which has a fourth field if so (arrow.apache.org/docs/format/Columnar.html).
    """
    pyarrow = _import("pyarrow", "hf")
    with pyarrow.memory_map(str(path)) as source:
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            if message.type == "schema":
                continue
            content = message.metadata.to_pybytes()

            (root,) = struct.unpack_from("<I", content)
            header = _flatbuffer_field(content, root, 2)
            header += struct.unpack_from("<I", content, header)[0]
            if message.type != "record batch" or _flatbuffer_field(content, header, 3):
                raise DataError(f"{path}: compressed or with a dictionary, expected plain batches")


def _flatbuffer_field(content: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table begins; 0 if it is absent."""
    fields = table - int(struct.unpack_from("<i", content, table)[0])
    place = 4 + 2 * number
    if place >= struct.unpack_from("<H", content, fields)[0]:
        return 0
    offset = int(struct.unpack_from("<H", content, fields + place)[0])
    return table + offset if offset else 0


def _check_features(path: Path) -> None:
    """Raises `DataError` if the features of a data set name a module outside their package.

    TensorFlow Datasets would import whatever module stands there.
    """

    def check(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            named = key in ("type", "pythonClassName", "python_class_name")
            if named and isinstance(value, str) and not value.startswith("tensorflow_datasets."):
                raise DataError(f"{path}: a feature is {value[:80]}, expected one of theirs")

    json.loads(read_text(path, "features of a data set"), object_pairs_hook=check)


def _import(package: str, hub: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        install = package.replace("_", "-")
        raise DataError(
            f"{hub}: needs the package {install}, which cannot be imported ({reason(error)}); "
            f"install it with: pip install {install}"
        ) from error


def _known(hub: str, name: str, splits: Sequence[str], present: Iterable[str]) -> Sequence[str]:
    names = [*present]
    for split in splits:
        if split not in names:
            raise DataError(
                f"{hub}:{name}: no split {split}, expected {', '.join(splits)} (there are "
                f"{', '.join(names)[:200]})"
            )
    return splits


def _plain(value: Any, name: str) -> Any:
    """A value of a hub's table as an array, a number or text."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:  # a picture of Hugging Face's
        content = value["bytes"]
        if content is None:
            content = read_bytes(Path(str(value["path"])), "a picture", unpack=False)
        return np.asarray(decode(content, name, None))
    if isinstance(value, bytes):
        if value[:3] == b"\xff\xd8\xff" or value[:4] == b"\x89PNG":
            return np.asarray(decode(value, name, None))
        return value.decode()
    return np.asarray(value) if isinstance(value, list) else value


def check_labels(hub: str, part: str, labels: Sequence[Any]) -> np.ndarray:
    """The labels of a split as int32.

    Args:
      hub: the data set, for the error message.
      part: name of the split, for the error message.
      labels: the values of the column.

    Returns:
      A vector of int32.

    Raises:
      DataError: a value is not a whole number of 32 bits.
    """
    for label in labels:
        if not isinstance(label, int | np.integer) or not -(2**31) <= label < 2**31:
            raise DataError(f"{hub}: a label of {part} is {str(label)[:40]}, expected a number")
    return np.array(labels, np.int32)


def check_texts(
    hub: str, part: str, texts: Sequence[Any], expected: str = "a sentence"
) -> list[str]:
    """The texts of a split.

    Args:
      hub: the data set, for the error message.
      part: name of the split, for the error message.
      texts: the values of the column.
      expected: what the texts are; unlike others, ``"a sentence"`` must not be blank.

    Returns:
      A list of the texts.

    Raises:
      DataError: a value is not text or has a NUL, or a sentence is blank.
    """
    for text in texts:
        usable = isinstance(text, str) and "\0" not in text
        if not usable or (expected == "a sentence" and not text.strip()):
            raise DataError(f"{hub}: a row of {part} is {str(text)[:40]!r}, expected {expected}")
    return [*texts]
