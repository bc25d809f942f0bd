"""Tables: CSV, TSV and JSON lines, gzipped or not, and Parquet, by PyArrow."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli
from experiments.data.readers.files import DataError, check_size, read_bytes, reading, reason
from experiments.data.readers.texts import lines

# How each kind of file is divided into columns; None for those that name them in another way.
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".jsonl": None, ".ndjson": None}
SUFFIXES = (*DELIMITERS, ".parquet", ".pq")
_MOST_COLUMNS = 10_000
# Rows of Parquet that are unpacked before their size is counted.
_CHUNK = 1_024


class Table:
    """The columns of a table, by name.

    Args:
      path: the file, for error messages.
      columns: PyArrow arrays of one length, by name.
    """

    def __init__(self, path: Path, columns: dict[str, Any]):
        self.path = path
        self._columns = columns

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [*self._columns]

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name: str) -> np.ndarray:
        """A column.

        Numbers that are missing are NaN, texts that are missing None. Lists of numbers become an
        array with further axes, and what is neither (dates) text.

        Args:
          name: its name.

        Returns:
          An array whose first axis are the rows.

        Raises:
          DataError: the column is absent, or its entries cannot stand in an array.
        """
        if name not in self._columns:
            raise DataError(f"{self.path}: {cli.unknown('column', name, self.names)}")
        with reading(f"{self.path}: column {name!r}", "numbers, texts or lists of one length"):
            return _to_numpy(self._columns[name])

    def describe(self) -> str:
        """The names and types of the columns, as an error message lists them."""
        shown = [f"{name!r} ({column.type})" for name, column in self._columns.items()]
        return f"{', '.join(shown[:20])}{', ...' if len(shown) > 20 else ''}"


def suffix_of(path: Path) -> str:
    """The suffix of a file that may be gzipped: .csv of `a.csv` and of `a.csv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_table(
    path: Path, *, header: bool = True, as_text: bool = False, suffix: str | None = None
) -> Table:
    """Reads a table.

    CSV is that of RFC 4180: texts that contain commas, quotes or line breaks stand in double
    quotes. TSV has no quotes, as in its registration with IANA: a tab always ends a text. JSON
    lines hold one object in each line.

    Args:
      path: the file; its suffix, before .gz, is one of `SUFFIXES`.
      header: whether the first line of CSV or TSV names the columns; otherwise they are called 1,
        2 and so on.
      as_text: whether the columns of CSV and TSV stay text, so that a label 007 does not become 7.
      suffix: the format, one of `SUFFIXES`, where the name of the file does not say it.

    Returns:
      The table.

    Raises:
      DataError: the file is damaged, too large, of another format or without rows.
    """
    suffix = suffix or suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: expected a table, {', '.join(SUFFIXES)} (all but Parquet also .gz)"
        )
    content = read_bytes(path, "a table", unpack=suffix in DELIMITERS)
    with reading(path, f"a table in the format {suffix}"):
        if suffix in (".jsonl", ".ndjson"):
            columns = _read_json(path, content)
        elif suffix in DELIMITERS:
            columns = _read_csv(content, str(DELIMITERS[suffix]), header, as_text)
        else:
            columns = _read_parquet(path, content)
        names = [name for name, _ in columns]
        if len(names) > _MOST_COLUMNS:
            raise DataError(f"{path}: {len(names)} columns, allowed are {_MOST_COLUMNS}")
        if double := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path}: several columns are called {double[0]!r}, expected one")
        if not names or not len(columns[0][1]):
            raise DataError(f"{path}: no row, expected a table with examples")
    return Table(path, dict(columns))


_Columns = list[tuple[str, Any]]


def _import(module: str) -> Any:
    try:
        return importlib.import_module(f"pyarrow{module}")
    except ImportError as error:
        raise DataError(
            f"tables need the package pyarrow, which cannot be imported ({reason(error)}); install "
            "it with: pip install pyarrow"
        ) from error


def _read_csv(content: bytes, delimiter: str, header: bool, as_text: bool) -> _Columns:
    pyarrow, csv = _import(""), _import(".csv")
    content.decode()  # the error says where it is not UTF-8
    if b"\0" in content:
        raise ValueError(f"byte {content.index(0)} is NUL")
    first = content.removeprefix(b"\xef\xbb\xbf").partition(b"\n")[0]
    if first.count(delimiter.encode()) > _MOST_COLUMNS:
        raise ValueError(f"more than the {_MOST_COLUMNS} columns that are allowed")
    # In one block, or the types of columns would be those of the first megabyte.
    reads = {"block_size": len(content) + 1, "autogenerate_column_names": not header}
    parse = csv.ParseOptions(
        delimiter=delimiter,
        quote_char=False if delimiter == "\t" else '"',
        newlines_in_values=delimiter != "\t",
    )
    types: dict[str, Any] = {}
    if as_text:
        start = csv.open_csv(
            io.BytesIO(content), read_options=csv.ReadOptions(**reads), parse_options=parse
        )
        types = dict.fromkeys(start.schema.names, pyarrow.string())
    table = csv.read_csv(
        io.BytesIO(content),
        read_options=csv.ReadOptions(**reads),
        parse_options=parse,
        convert_options=csv.ConvertOptions(strings_can_be_null=not as_text, column_types=types),
    )
    names = table.column_names if header else [str(i + 1) for i in range(table.num_columns)]
    return list(zip(names, table.columns, strict=True))


def _read_json(path: Path, content: bytes) -> _Columns:
    pyarrow = _import("")
    rows = []
    for number, line in lines(path, content.decode()):
        if not line.strip():
            continue
        try:
            row = cli.parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is no JSON ({reason(error)})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is {line[:40]!r}, expected an object {{...}}")
        rows.append(row)
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
        if len(names) > _MOST_COLUMNS:
            raise DataError(f"{path}: more than the {_MOST_COLUMNS} columns that are allowed")
    columns = []
    for name in names:
        with reading(f"{path}: column {name!r}", "entries of one type"):
            columns.append((name, pyarrow.array([row.get(name) for row in rows])))
    return columns


def _read_parquet(path: Path, content: bytes) -> _Columns:
    pyarrow, parquet = _import(""), _import(".parquet")
    file = parquet.ParquetFile(pyarrow.BufferReader(content))
    if len(file.schema_arrow.names) > _MOST_COLUMNS:
        raise ValueError(f"more than the {_MOST_COLUMNS} columns that are allowed")
    batches, size = [], 0
    for batch in file.iter_batches(batch_size=_CHUNK):
        size += batch.nbytes
        check_size(path, size)
        batches.append(batch)
    table = pyarrow.Table.from_batches(batches, file.schema_arrow)
    # Otherwise a damaged file could make pyarrow read beyond its memory.
    table.validate(full=True)
    return list(zip(table.column_names, table.columns, strict=True))


def _to_numpy(column: Any) -> np.ndarray:
    """The entries of a PyArrow array; see `Table.__getitem__`."""
    pyarrow = _import("")
    types = pyarrow.types
    array = pyarrow.concat_arrays(column.chunks) if hasattr(column, "chunks") else column
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if array.null_count:
            raise ValueError(f"{array.null_count} rows have no list")
        lengths = {len(row) for row in array}
        if len(lengths) > 1:
            raise ValueError(f"lists of {min(lengths)} to {max(lengths)} entries")
        inner = _to_numpy(array.flatten())
        return inner.reshape(len(array), lengths.pop(), *inner.shape[1:])
    if types.is_decimal(kind) or (array.null_count and types.is_integer(kind)):
        array = array.cast(pyarrow.float64())
    elif types.is_temporal(kind) or (array.null_count and types.is_boolean(kind)):
        array = array.cast(pyarrow.string())
    elif types.is_binary(kind) or types.is_nested(kind):
        raise ValueError(f"entries of type {str(kind)[:40]}")
    return np.asarray(array.to_numpy(zero_copy_only=False))


def common_columns(tables: Sequence[Table]) -> list[str]:
    """The columns of several tables of one data set.

    Args:
      tables: the tables.

    Returns:
      Their names, in the order of the first table.

    Raises:
      DataError: a table has other columns than the first one.
    """
    first, *others = tables
    for table in others:
        if set(table.names) != set(first.names):
            odd = sorted(set(table.names) ^ set(first.names))[0]
            raise DataError(
                f"{table.path}: column {odd!r} is not in both this file and {first.path}; the "
                "parts of a data set need the same columns"
            )
    return first.names
