"""Texts that are damaged or too long."""

from __future__ import annotations

import pytest

from experiments.data.readers import texts
from experiments.data.readers.texts import lines, read_pairs, read_sentences, read_text
from tests.experiments.data.readers.helpers import refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a film\t1\n".encode("utf-16"), "unreadable, expected .*UTF-8"),
        (b"a film\t1\nbad\xff\t0\n", "unreadable, expected .*UTF-8"),
        (b"a fi\0lm\t1\n", "character 19 is NUL"),
        (b"a " * 2**19 + b" film\t1\n", "line 2 has 1048583 characters, allowed are 1048576"),
    ],
)
def test_texts(path, content, message):
    path.write_bytes(b"sentence\tlabel\n" + content)
    with refused(message):
        read_sentences(path)
    if "line" not in message:
        with refused(message.replace("sentences and labels in ", "")):
            read_text(path)


def test_lines_are_counted_before_there_are_lists_of_them(path, monkeypatch):
    monkeypatch.setattr(texts, "_MOST_LINES", 5)
    path.write_text("a\n" * 5)
    assert read_pairs([path, path]) == [["a"] * 5] * 2
    path.write_text("a\n" * 5 + "b")
    with refused("file: more lines than the 5 that are allowed"):
        read_pairs([path, path])
    assert [*lines(path, "a\n\nb")] == [(1, "a"), (2, ""), (3, "b")]
    assert [*lines(path, "")] == [(1, "")]
