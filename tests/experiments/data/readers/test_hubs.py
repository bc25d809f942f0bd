"""Hugging Face and TensorFlow Datasets: files that their own packages write."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from experiments import data
from tests.experiments.data.files import (
    arrays,
    assert_fails,
    write_pairs,
    write_sst2,
    write_wikitext,
)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def save_hugging_face(folder, tables):
    datasets = pytest.importorskip("datasets")
    pictures = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    parts = {
        name: datasets.Dataset.from_dict(table, features=pictures if "img" in table else None)
        for name, table in tables.items()
    }
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return f"hf:{folder}"


def test_images_of_hugging_face(tmp_path):
    content = arrays((32, 32, 3), rows=5_003, test_rows=4)
    tables = {
        part: {"img": [*map(png, content[f"x_{part}"])], "label": content[f"y_{part}"].tolist()}
        for part in ("train", "test")
    }
    found = data.load_task("cifar10", data_dir=save_hugging_face(tmp_path / "hf", tables))
    np.savez(tmp_path / "cifar10.npz", **content)
    expected = data.load_task("cifar10", data_dir=tmp_path)
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(found, split).x, getattr(expected, split).x)
        np.testing.assert_array_equal(getattr(found, split).y, getattr(expected, split).y)


def test_text_of_hugging_face(tmp_path):
    write_pairs(tmp_path)
    parts = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    tables = {
        name: {
            lang: (tmp_path / f"multi30k.{part}.{lang}").read_text().splitlines()
            for lang in ("de", "en")
        }
        for name, part in parts.items()
    }
    found = data.load_task("multi30k", data_dir=save_hugging_face(tmp_path / "pairs", tables))
    np.testing.assert_array_equal(
        found.test.x, data.load_task("multi30k", data_dir=tmp_path).test.x
    )
    names = [f"wikitext2.{part}.txt" for part in ("train", "valid", "test")]
    write_wikitext(tmp_path, names)
    # As their WikiText is: a row for each line, empty ones without its end.
    tables = {
        part: {
            "text": [
                line if line.strip() else ""
                for line in (tmp_path / name).read_text().splitlines(keepends=True)
            ]
        }
        for part, name in zip(parts, names, strict=True)
    }
    location = save_hugging_face(tmp_path / "text", tables)
    found = data.load_task("wikitext2", data_dir=location)
    expected = data.load_task("wikitext2", data_dir=tmp_path)
    np.testing.assert_array_equal(found.train.x, expected.train.x)
    np.testing.assert_array_equal(found.test.y, expected.test.y)
    assert_fails("split train has columns text, expected en", "multi30k", data_dir=location)
    assert_fails("reads a folder with files, not hf:", "segmentation", data_dir=location)
    tables.pop("validation")
    location = save_hugging_face(tmp_path / "less", tables)
    assert_fails("no split validation, expected train, valid", "wikitext2", data_dir=location)


def refused_tables(folder, name, table, message):
    parts = ("train", "test") if "img" in table else ("train", "validation", "test")
    location = save_hugging_face(folder, dict.fromkeys(parts, table))
    assert_fails(f"^{location}: .*{message}", name, data_dir=location)


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("sst2", {"sentence": ["good", None], "label": [1, 0]}, "row of train is 'None', expected"),
        ("sst2", {"sentence": ["good", " "], "label": [1, 0]}, "row of train is ' ', expected a"),
        ("sst2", {"sentence": ["good", "bad"], "label": [1, -1]}, "lie between -1 and 1, expected"),
        ("sst2", {"sentence": ["good", "bad"], "label": [1, None]}, "a label of train is None"),
        ("sst2", {"sentence": ["good", "bad"], "label": [1, 0.5]}, "a label of train is 1.0, exp"),
        ("wikitext2", {"text": ["a", "b\0c"]}, r"row of train is 'b.x00c', expected a text"),
        ("wikitext2", {"text": [1, 2]}, "row of train is '1', expected a text"),
        ("multi30k", {"en": ["a man"], "de": ["\n"]}, r"row of train is '.n', expected a sentence"),
    ],
)
def test_wrong_values_of_hugging_face(tmp_path, name, table, message):
    refused_tables(tmp_path / "hf", name, table, message)


def test_wrong_pictures_of_hugging_face(tmp_path, monkeypatch):
    pictures = [png(np.zeros((32, 32, 3), np.uint8)), png(np.zeros((30, 32, 3), np.uint8))]
    table = {"img": pictures, "label": [1, 2]}
    shapes = r"pictures of shapes \(30, 32, 3\) and \(32, 32, 3\), expected one"
    refused_tables(tmp_path / "shapes", "cifar10", table, shapes)
    # Their package would start Ghostscript.
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    box = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    table = {"img": [{"bytes": box, "path": None}], "label": [1]}
    refused_tables(tmp_path / "eps", "cifar10", table, "train 0: not a readable picture, expected")
    assert not started.exists()
    (tmp_path / "eps" / "fifo").symlink_to("/dev/zero")
    assert_fails("fifo: not a regular file", "cifar10", data_dir=f"hf:{tmp_path / 'eps'}")
    (tmp_path / "eps" / "fifo").unlink()
    # Of ten million bytes, ten thousand are left.
    arrow = pytest.importorskip("pyarrow")
    (path,) = (tmp_path / "eps" / "train").glob("*.arrow")
    plain = arrow.table({"img": ["a" * 10**7], "label": [1]})
    for column, compression in ((plain["img"], "zstd"), (plain["img"].dictionary_encode(), None)):
        table = plain.set_column(0, "img", column)
        options = arrow.ipc.IpcWriteOptions(compression=compression)
        with arrow.ipc.new_stream(str(path), table.schema, options=options) as stream:
            stream.write_table(table)
        location = f"hf:{tmp_path / 'eps'}"
        assert_fails("arrow: compressed or with a dictionary", "cifar10", data_dir=location)
    monkeypatch.setenv("OPTAX_ACCEL_DATA_LIMIT", "1")
    table = {"text": ["a b" * 10_000] * 40}
    refused_tables(tmp_path / "large", "wikitext2", table, "bytes when unpacked, allowed are 1048")


def test_damaged_folders_of_hugging_face(tmp_path):
    tables = {
        part: {"sentence": ["a good film"] * 9, "label": [1] * 9}
        for part in ("train", "validation")
    }
    location = save_hugging_face(tmp_path / "hf", tables)
    rng = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "hf").rglob("*") if path.is_file())
    assert len(files) == 7
    for path in 4 * files:
        content = path.read_bytes()
        changed = bytearray(content)
        for position in rng.integers(len(changed), size=5):
            changed[position] = rng.integers(256)
        path.write_bytes(changed[: rng.integers(len(changed))] if rng.integers(3) == 0 else changed)
        assert_fails(str(tmp_path / "hf"), "sst2", data_dir=location)
        path.write_bytes(content)


def save_tensorflow(folder, features, tables):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Builder(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos: ClassVar = {}  # else looked for beside this file
        name = "small"

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features(tfds))
            )

        def _split_generators(self, manager):
            return {
                part: list(
                    enumerate(
                        dict(zip(table, row, strict=True))
                        for row in zip(*table.values(), strict=True)
                    )
                )
                for part, table in tables.items()
            }

        def _generate_examples(self):
            raise NotImplementedError

    builder = Builder(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return f"tfds:{builder.data_path}"


def test_sentences_of_tensorflow_datasets(tmp_path):
    write_sst2(tmp_path)
    tables = {}
    for part, name in (("train", "sst2.train.tsv"), ("validation", "sst2.dev.tsv")):
        rows = [line.rsplit("\t", 1) for line in (tmp_path / name).read_text().splitlines()[1:]]
        tables[part] = {"sentence": [x for x, _ in rows], "label": [int(y) for _, y in rows]}
    location = save_tensorflow(
        tmp_path,
        lambda tfds: {
            "sentence": tfds.features.Text(),
            "label": tfds.features.ClassLabel(num_classes=2),
        },
        tables,
    )
    found = data.load_task("sst2_1k", data_dir=location)
    # They shuffle rows; each still has its label: the third word says which it is.
    assert [len(s) for s in (found.train, found.validation, found.test)] == [1_000, 1_000, 30]
    assert found.input_shape == (4,)
    for split in (found.train, found.test):
        assert len({*zip(split.x[:, 2].tolist(), split.y.tolist(), strict=True)}) == 2
    assert found.test.y.sum() == 15
    assert_fails("no split test, expected train, test", "mnist", data_dir=location)
    # A class of any other module would be imported.
    path = Path(location.removeprefix("tfds:")) / "features.json"
    content = path.read_text()
    for module in ("this", r"\u0074his"):
        path.write_text(
            content.replace("tensorflow_datasets.core.features.text_f", module + ".x", 1)
        )
        assert_fails("features.json: a feature is this.x", "sst2_1k", data_dir=location)
    assert "this" not in sys.modules


@pytest.mark.parametrize(("hub", "package"), [("hf", "datasets"), ("tfds", "tensorflow-datasets")])
def test_hub_without_its_package(hub, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    assert_fails(
        f"{hub}: needs the package {package}, .*pip install {package}", "mnist", data_dir=f"{hub}:x"
    )
    monkeypatch.setenv("OPTAX_ACCEL_DATA", f"{hub}:x")
    assert_fails(f"pip install {package}", "mnist")
