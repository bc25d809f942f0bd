"""Tasks of any pictures, arrays, texts and tables: a task for each kind of a person's own files.

* `image_folder`: pictures in one folder for each class, `CLASS/*.jpg`, or below `train`,
  `validation` (`val`) and `test`.
* `arrays`: an `.npz` file with `x` and `y`, or `x_train`, `y_train`, `x_test` ...; a folder of
  `.npy` files of these names; or a Parquet file whose columns `x` hold lists.
* `text`: texts and their classes, in CSV, TSV, JSON lines or Parquet.
* `text_lm`: the bytes of any text files, in windows, for language models.
* `table`: numbers and categories in CSV, TSV, JSON lines or Parquet, and classes or numbers to
  predict.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli
from experiments.data.own import (
    FilesOptions,
    check_finite,
    divide,
    find_files,
    finish,
    finish_generative,
    read_labels,
    split_by_column,
    split_of,
    standardize,
)
from experiments.data.readers.arrays import describe_npz, read_npy, read_npz
from experiments.data.readers.files import LIMIT_VARIABLE, DataError, check_size, limit
from experiments.data.readers.pictures import (
    ImageFiles,
    describe_others,
    list_classes,
    list_images,
    shape_of,
)
from experiments.data.readers.tables import (
    SUFFIXES,
    Table,
    common_columns,
    read_table,
    suffix_of,
)
from experiments.data.readers.texts import read_text
from experiments.data.sentences import count_words, word_ids
from experiments.data.tasks import DEFAULTS, GENERATIVE, SPLITS, Defaults, Split, Task

# Names that arrays and columns have where none is given, the preferred ones first.
_X = ("x", "images", "features", "inputs", "data")
_Y = ("y", "labels", "targets", "label", "target")
_TEXT = ("text", "sentence", "review", "comment", "content")
_LABEL = ("label", "target", "class", "category", "sentiment", "y")
# Pictures that tell the sizes, the colors, the mean and the deviation of all.
_LOOKED_AT = 1_000
_LARGEST_DEFAULT = 224
# Sides of pictures up to which a small convolutional network is the default.
_SMALL = 64
_MOST_WORDS, _TEXT_LENGTH, _WINDOW = 30_000, 100, 128
_MOST_CATEGORIES = 50


def load_image_folder(location: Path, options: FilesOptions) -> Task:
    """The task `image_folder`.

    Args:
      location: the folder.
      options: how to read it.

    Returns:
      The task. Pictures that take more memory than `readers.files.limit` are read when needed.

    Raises:
      DataError: a folder or picture is missing or damaged, or a class has too few pictures.
    """
    if not location.is_dir():
        raise DataError(f"{location}: expected a folder that holds a folder for each class")
    parts = {split_of(path.name): path for path in sorted(location.iterdir()) if path.is_dir()}
    named = {split: path for split, path in parts.items() if split is not None}
    if "train" not in named:
        named = {"all": location}
    generative = options.problem_type in GENERATIVE
    paths, names, counts = [], [], {}
    for split, folder in named.items():
        loose = list_images(folder) if generative else []
        classes = {"": loose} if loose else list_classes(folder)
        counts[split] = sum(map(len, classes.values()))
        paths += list(itertools.chain.from_iterable(classes.values()))
        names += [name for name, files in classes.items() for _ in files]
    labels: Any = len(paths)
    if not generative:
        where = f"{location}: names of folders"
        labels = read_labels(where, np.array(names, object), "classification")
    splits, notes = divide(location, counts, labels, options)

    shapes = np.array([shape_of(path) for path in paths[:: -(-len(paths) // _LOOKED_AT)]])
    sides = shapes[:, :2].min(axis=1)
    size = options.image_size or min(int(np.median(sides)), _LARGEST_DEFAULT)
    channels = int(shapes[:, 2].max())
    mean, std = np.zeros(channels), np.full(channels, 255.0)
    if not (options.no_standardize or generative):
        rows = splits[0][:: -(-len(splits[0]) // _LOOKED_AT)]
        some = ImageFiles([paths[row] for row in rows], size, mean, np.ones(channels), channels)
        mean, std = standardize(some[:], np.arange(len(rows)))[1]
    fits = len(paths) * size * size * channels * 4 <= limit()

    class Pictures:
        """Picks pictures by their numbers."""

        def __getitem__(self, rows: np.ndarray) -> Any:
            files = ImageFiles([paths[row] for row in rows], size, mean, std, channels)
            return files[:] if fits else files

    notes.append(
        f"pictures of {sides.min()} to {sides.max()} pixels a side, cut to squares and scaled to "
        f"{size} x {size}, {'gray' if channels == 1 else 'in color'}"
        + ("" if fits else "; read when needed, as they take more memory than is allowed")
    )
    if others := describe_others(named.values()):
        notes.append(others)
    if generative:
        if not fits:
            raise DataError(
                f"{location}: {len(paths)} pictures of {size} x {size} take more memory than is "
                f"allowed; give a smaller --image-size, or set {LIMIT_VARIABLE} to more MiB"
            )
        return finish_generative(
            "image_folder", Pictures(), splits, str(options.problem_type), notes
        )
    defaults = DEFAULTS["image_folder"] if size <= _SMALL else DEFAULTS["imagenet_folder"]
    return finish(
        "image_folder",
        location,
        Pictures(),
        labels,
        splits,
        _like("image_folder", model=defaults.model),
        notes=notes,
        pixels=(mean, std),
    )


def _like(task: str, **changes: Any) -> Defaults:
    """The defaults of a task with changes."""
    return dataclasses.replace(DEFAULTS[task], **changes)


# Arrays -----------------------------------------------------------------------------------------


def load_arrays(location: Path, options: FilesOptions) -> Task:
    """The task `arrays`.

    Args:
      location: an `.npz` or Parquet file, or a folder of `.npy` files.
      options: how to read it.

    Returns:
      The task.

    Raises:
      DataError: a file is damaged, arrays are missing or differ in length, inputs are no numbers,
        or a class has too few examples.
    """
    read, described = _open_arrays(location)
    x_name = _choose(location, "x", options.x, _X, described)
    if options.problem_type in GENERATIVE:
        return _load_unlabeled(location, x_name, read, described, options)
    y_name = _choose(location, "y", options.y, _Y, described)
    pairs = {}
    for split, x_array in _by_split(x_name, described).items():
        y_array = _by_split(y_name, described).get(split)
        if y_array is None:
            raise DataError(f"{location}: array {x_array} has no labels; {_list(described)}")
        x, y = read(x_array), read(y_array)
        if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
            raise DataError(
                f"{location}: {x_array} is of shape {x.shape} and {y_array} of shape {y.shape}, "
                "expected a label for each example"
            )
        pairs[split] = (x, y)
    if len({x.shape[1:] for x, _ in pairs.values()}) > 1:
        shapes = " and ".join(str(x.shape) for x, _ in pairs.values())
        raise DataError(f"{location}: inputs of shapes {shapes}, expected examples of one shape")
    x = np.concatenate([x for x, _ in pairs.values()])
    if x.dtype.kind not in "iufb":
        raise DataError(f"{location}: {x_name} is of type {x.dtype}, expected numbers")
    x = x.reshape(len(x), 1) if x.ndim == 1 else x
    check_finite(f"{location}: {x_name}", x)
    labels = read_labels(
        f"{location}: {y_name}",
        np.concatenate([y for _, y in pairs.values()]),
        options.problem_type,
    )
    counts = {split: len(x) for split, (x, _) in pairs.items()}
    splits, notes = divide(location, counts, labels, options)
    if x.dtype == np.uint8 and x.ndim == 3:  # gray pictures without an axis for the channel
        x = x[..., np.newaxis]
    check_size(location, 4 * x.size)
    picture = x.ndim == 4 and min(x.shape[1:3]) >= 4
    bytes_ = x.dtype == np.uint8
    if options.no_standardize:
        scale: Any = (0.0, _brightest(x, notes) if bytes_ else 1.0)
        x = x.astype(np.float32) / np.float32(scale[1])
    else:
        notes.append("inputs are standardized by the training split, along the last axis")
        x, scale = standardize(x, splits[0])
    pixels = scale if picture and bytes_ else None
    return finish(
        "arrays",
        location,
        x,
        labels,
        splits,
        _like("arrays", model="cnn" if picture else "mlp"),
        notes=notes,
        pixels=pixels,
    )


def _load_unlabeled(
    location: Path,
    name: str,
    read: Callable[[str], np.ndarray],
    described: Mapping[str, str],
    options: FilesOptions,
) -> Task:
    """The task `arrays` for a model of the pictures themselves, whose labels are not read."""
    parts = {split: read(array) for split, array in _by_split(name, described).items()}
    for part in parts.values():
        if part.ndim not in (3, 4) or part.dtype.kind not in "uifb" or not len(part):
            raise DataError(
                f"{location}: {name} is {part.dtype} of shape {part.shape}, expected pictures of "
                "shape (N, height, width) or (N, height, width, channels)"
            )
    x = np.concatenate([*parts.values()])
    check_size(location, 4 * x.size)
    told: list[str] = []
    brightest = _brightest(x, told) if x.dtype.kind in "ui" else 1.0
    x = (x[..., np.newaxis] if x.ndim == 3 else x).astype(np.float32) / np.float32(brightest)
    check_finite(f"{location}: {name}", x)
    if x.min() < 0 or x.max() > 1:
        raise DataError(
            f"{location}: {name} goes from {x.min():g} to {x.max():g} (whole numbers divided by "
            "255), expected bytes, truth values, or numbers from 0 to 1"
        )
    counts = {split: len(part) for split, part in parts.items()}
    splits, notes = divide(location, counts, len(x), options)
    return finish_generative("arrays", x, splits, str(options.problem_type), [*notes, *told])


def _brightest(x: np.ndarray, notes: list[str]) -> float:
    """The whole number that stands for 1: 255, or 1 where there are only 0 and 1, which is told."""
    if x.max() > 1:
        return 255.0
    notes.append("inputs hold only the numbers 0 and 1 and are taken as they are, not as bytes")
    return 1.0


def _open_arrays(location: Path) -> tuple[Callable[[str], np.ndarray], Mapping[str, str]]:
    """A reader of arrays by name, and what there is."""
    if location.is_dir():
        files = {path.stem: path for path in sorted(location.glob("*.npy"))}
        if not files:
            raise DataError(f"{location}: no .npy file here, expected x.npy and y.npy, or a file")
        arrays = {name: read_npy(path, text=True) for name, path in files.items()}
        described = {name: f"{a.dtype} of shape {a.shape}" for name, a in arrays.items()}
        return arrays.__getitem__, described
    if suffix_of(location) == ".npz":
        return lambda name: read_npz(location, (name,), text=True)[name], describe_npz(location)
    if suffix_of(location) in (".parquet", ".pq"):
        table = read_table(location)
        return table.__getitem__, dict.fromkeys(table.names, "column")
    raise DataError(f"{location}: expected an .npz or .parquet file, or a folder of .npy files")


def _by_split(name: str, described: Mapping[str, str]) -> dict[str, str]:
    """The arrays of that name by split: `x_train`, `x_val`, `test_x`; or `x` for all."""
    found = {"all": name} if name in described else {}
    for other in described:
        split = split_of(other)
        if split is None:
            continue
        rest = [word for word in other.split("_") if split_of(word) is None]
        if "_".join(rest) == name and other != name:
            found[split] = other
    if "train" in found:
        found.pop("all", None)
    return found


def _choose(
    location: Path, option: str, name: str | None, usual: tuple[str, ...], there: Mapping[str, str]
) -> str:
    """The name of the arrays to read."""
    names = {each: _by_split(each, there) for each in ((name,) if name else usual)}
    found = [each for each, arrays in names.items() if {"all", "train"} & arrays.keys()]
    if len(found) == 1:
        return found[0]
    if name:
        raise DataError(f"{location}: no array {name!r} or '{name}_train'; {_list(there)}")
    reason = f"both {' and '.join(found)}" if found else f"no array {' or '.join(usual)}"
    raise DataError(f"{location}: {reason}; say by --{option} which array to take; {_list(there)}")


def _list(there: Mapping[str, str]) -> str:
    shown = [f"{name} ({kind})" for name, kind in [*there.items()][:20]]
    return f"there is {', '.join(shown) or 'no array'}{', ...' if len(there) > 20 else ''}"


# Tables -----------------------------------------------------------------------------------------


def _read_tables(
    location: Path, options: FilesOptions, as_text: bool
) -> tuple[list[Table], dict[str, int]]:
    """The tables of a data set, and how many rows each split has of which the names say it."""
    files = find_files(location, lambda path: suffix_of(path) in SUFFIXES, "tables")
    tables, counts = [], {}
    for split, paths in files.items():
        if len(paths) > 1:
            shown = ", ".join(path.name for path in paths[:10])
            raise DataError(
                f"{location}: several tables for {split} ({shown}); name one file by --data-dir"
            )
        tables.append(read_table(paths[0], header=not options.no_header, as_text=as_text))
        counts[split] = len(tables[-1])
    common_columns(tables)
    return tables, counts


def _column(tables: list[Table], name: str) -> np.ndarray:
    columns = [table[name] for table in tables]
    kinds = {"number" if column.dtype.kind in "iufb" else "text" for column in columns}
    if len(kinds) > 1:
        raise DataError(
            f"{tables[0].path}: column {name!r} holds numbers in one file and text in another"
        )
    return np.concatenate(columns)


def _find_column(
    table: Table, option: str, name: str | None, usual: tuple[str, ...], taken: tuple[str, ...] = ()
) -> str:
    """The name of the column that an option names, or of the one that is usually called so."""
    names = table.names
    if name is not None:
        if name not in names:
            raise DataError(
                f"{table.path}: no column {name!r} for {option}; there is {table.describe()}"
            )
        return name
    left = [each for each in names if each not in taken]
    found = [each for each in left if each.lower() in usual]
    if not found and len(names) == 2 and len(left) == 1:
        return left[0]
    if len(found) == 1:
        return found[0]
    reason = f"both {' and '.join(found)}" if found else f"no column {' or '.join(usual)}"
    raise DataError(
        f"{table.path}: {reason}; say by {option} which column to take (and --no-header if line 1 "
        f"is an example); there is {table.describe()}"
    )


def _rows(
    tables: list[Table], counts: dict[str, int], options: FilesOptions
) -> tuple[dict[str, int], np.ndarray]:
    """The number of rows of each split, and the rows in that order."""
    everything = np.arange(sum(counts.values()))
    if options.split_column is None:
        return counts, everything
    if len(tables) > 1:
        raise DataError(
            "--split-column and files named after their splits exclude each other; name one file"
        )
    name = _find_column(tables[0], "--split-column", options.split_column, ())
    rows = split_by_column(f"{tables[0].path}: column {name!r}", tables[0][name])
    return {split: len(r) for split, r in rows.items()}, np.concatenate([*rows.values()])


def load_table(location: Path, options: FilesOptions) -> Task:
    """The task `table`.

    Args:
      location: a file, or a folder with files named after their splits.
      options: how to read it.

    Returns:
      The task. Numbers are standardized and missing ones take the mean, both by the training
      split; texts and truth values become one input for each value, 0 or 1.

    Raises:
      DataError: a file is damaged, a column is missing or useless, or a class has too few rows.
    """
    tables, counts = _read_tables(location, options, as_text=False)
    ignored = [name.strip() for name in (options.ignore_columns or "").split(",") if name.strip()]
    for name in ignored:
        _find_column(tables[0], "--ignore-columns", name, ())
    label = _find_column(tables[0], "--label-column", options.label_column, _LABEL)
    counts, order = _rows(tables, counts, options)
    inputs = [
        name for name in tables[0].names if name not in (label, options.split_column, *ignored)
    ]
    if not inputs:
        raise DataError(f"{location}: no column besides the label {label!r}, expected some inputs")
    labels = read_labels(
        f"{location}: column {label!r}", _column(tables, label)[order], options.problem_type
    )
    splits, notes = divide(location, counts, labels, options)
    x, told = _encode(
        location,
        {name: _column(tables, name)[order] for name in inputs},
        splits[0],
        not options.no_standardize,
    )
    return finish("table", location, x, labels, splits, DEFAULTS["table"], notes=[*notes, *told])


def _encode(
    location: Path, columns: Mapping[str, np.ndarray], train: np.ndarray, scaled: bool
) -> tuple[np.ndarray, list[str]]:
    """Inputs of the columns of a table, and what to tell about them."""
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    parts, missing, constant, categories = [], [], [], []
    for name, column in columns.items():
        where = f"{location}: column {name!r}"
        if column.ndim > 1:
            raise DataError(
                f"{where} holds lists; the task arrays reads these, or leave it out by "
                "--ignore-columns"
            )
        if column.dtype.kind in "iuf":
            numbers = np.where(np.isfinite(column), column, np.nan).astype(np.float64)
            absent = int(np.isnan(numbers).sum())
            if np.isnan(numbers[train]).all():
                raise DataError(
                    f"{where} has no entry for training; leave it out by --ignore-columns"
                )
            if absent:
                missing.append(f"{name} ({absent})")
            if np.nanmax(numbers[train]) == np.nanmin(numbers[train]):
                constant.append(name)
            steps = [SimpleImputer(), *([StandardScaler()] if scaled else [])]
            pipeline = make_pipeline(*steps).fit(numbers[train, None])
            parts.append(pipeline.transform(numbers[:, None]))
            continue
        if all(value is None for value in column[train]):
            raise DataError(f"{where} has no entry for training; leave it out by --ignore-columns")
        values = np.array(["(missing)" if v is None else str(v) for v in column], object)
        if absent := int((values == "(missing)").sum()):
            missing.append(f"{name} ({absent})")
        number = len(np.unique(values[train].astype(str)))
        if number > _MOST_CATEGORIES:
            raise DataError(
                f"{where} holds text with {number} different values, such as {values[0]:.40}, more "
                f"than the {_MOST_CATEGORIES} that become categories; leave it out by "
                f"--ignore-columns {name}"
            )
        encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
        parts.append(encoder.fit(values[train, None]).transform(values[:, None]))
        categories.append(f"{name} ({number})")
        check_size(location, 4 * sum(part.size for part in parts))
    notes = [f"inputs: {len(columns)} columns"]
    notes[0] += f", of which categories: {', '.join(categories)}" if categories else ""
    if scaled:
        notes[0] += "; numbers are standardized by the training split"
    if missing:
        notes.append(
            f"missing values: {', '.join(missing)}; numbers take the mean of the training split, "
            "categories one of their own"
        )
    if constant:
        notes.append(f"the same in all training rows: {', '.join(constant)}")
    return np.concatenate(parts, axis=1, dtype=np.float32), notes


# Texts ------------------------------------------------------------------------------------------


def load_text(location: Path, options: FilesOptions) -> Task:
    """The task `text`.

    Args:
      location: a file, or a folder with files named after their splits.
      options: how to read it.

    Returns:
      The task. Token ids are those of `experiments.data.sentences`: lower-cased words of the
      training split, the 29,998 most frequent at most.

    Raises:
      DataError: a file is damaged, a column is missing, or a class has too few texts.
    """
    tables, counts = _read_tables(location, options, as_text=True)
    first = tables[0]
    taken: tuple[str, ...] = (options.split_column or "",)
    if options.text_column is None and options.label_column is None and len(first.names) == 2:
        by_name = [name for name in first.names if name.lower() in _LABEL]
        taken = (*taken, *by_name) if len(by_name) == 1 else taken
    text = _find_column(
        first, "--text-column", options.text_column, _TEXT, (*taken, options.label_column or "")
    )
    label = _find_column(first, "--label-column", options.label_column, _LABEL, (*taken[:1], text))
    if text == label:
        raise DataError(f"{location}: column {text!r} cannot hold both the texts and the labels")
    counts, order = _rows(tables, counts, options)
    texts, names = _column(tables, text)[order], _column(tables, label)[order]
    blank = [not isinstance(each, str) or not each.strip() for each in texts]
    if any(blank):
        raise DataError(
            f"{location}: column {text!r} has {cli.plural(sum(blank), 'row')} without text, the "
            f"first row {blank.index(True) + 1}"
        )
    names = np.array([None if n is None or not str(n).strip() else str(n).strip() for n in names])
    labels = read_labels(f"{location}: column {label!r}", names, "classification")
    splits, notes = divide(location, counts, labels, options)
    lengths = np.array([len(each.split()) for each in texts])
    most = options.max_length or _TEXT_LENGTH
    length = min(int(lengths[splits[0]].max()), most)
    check_size(location, 4 * len(texts) * length)
    words = count_words(texts[splits[0]])
    ids, size = word_ids(words, _MOST_WORDS)
    x = ids(texts, length)
    low, high = lengths.min(), lengths.max()
    span = f"{high}" if low == high else f"{low} to {high}"
    notes.append(f"texts of {span} words, of which {size - 2} different ones are known")
    if cut := int((lengths > length).sum()):
        notes.append(
            f"{cut} texts ({100 * cut / len(texts):.1f} %) are cut to {length} words; --max-length "
            "takes more"
        )
    return finish(
        "text",
        location,
        x,
        labels,
        splits,
        DEFAULTS["text"],
        notes=notes,
        vocabulary_size=size,
    )


def load_text_lm(location: Path, options: FilesOptions) -> Task:
    """The task `text_lm`.

    Args:
      location: a text file in UTF-8, or a folder of them; files named after splits are these.
      options: how to read it.

    Returns:
      The task. Of files that name no split, the end is held out: first training, then validation,
      then test.

    Raises:
      DataError: a file is damaged or not text, or a split is shorter than a window.
    """
    files = find_files(
        location, lambda path: suffix_of(path) in (".txt", ".md", ".text", ""), ".txt files"
    )
    length = options.max_length or _WINDOW
    texts, size = {}, 0
    for split, paths in files.items():
        contents = [read_text(path) for path in paths]
        size += sum(map(len, contents))
        check_size(location, 8 * size)  # each byte is a number of 32 bits in x and in y
        texts[split] = np.frombuffer("\n".join(contents).encode(), np.uint8).astype(np.int32)
    train = texts.pop("all", texts.pop("train", None))
    if train is None:
        raise DataError(f"{location}: no text for training; there is {' and '.join(texts)}")
    total, notes = len(train), []
    for split, fraction in (
        ("test", options.test_fraction),
        ("validation", options.validation_fraction),
    ):
        if split not in texts:
            at = len(train) - max(int(fraction * total), 1)
            train, texts[split] = train[:at], train[at:]
            notes.append(f"{split}: the last {100 * fraction:g} % of the training text")
    splits = []
    for part, row in zip(SPLITS, (train, texts["validation"], texts["test"]), strict=True):
        windows = (len(row) - 1) // length
        if windows < 1:
            raise DataError(
                f"{location}: {len(row)} bytes for {part}, expected more than {length}, a window"
            )
        x, y = (row[i : i + windows * length].reshape(windows, length) for i in (0, 1))
        splits.append(Split(x, y))
    count = sum(map(len, files.values()))
    notes.append(f"{cli.plural(count, 'file')}; tokens are bytes, in windows of {length}")
    return Task(
        name="text_lm",
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        num_classes=0,
        input_shape=(length,),
        vocabulary_size=256,
        notes=tuple(notes),
    )


LOADERS: Mapping[str, Callable[[Path, FilesOptions], Task]] = {
    "image_folder": load_image_folder,
    "arrays": load_arrays,
    "text": load_text,
    "text_lm": load_text_lm,
    "table": load_table,
}
