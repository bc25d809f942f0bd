"""Files of a person's own: what is read of them, how they are divided, what is said of mistakes."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import data
from tests.experiments.data.files import assert_fails

ROWS = 40


def write_table(path, *, classes=("no", "yes"), header=True, delimiter=","):
    """Row i: i, a color, whether it is odd, and a class; rows 3 and 5 lack the number."""
    lines = [delimiter.join(("number", "color", "odd", "label"))] if header else []
    for i in range(ROWS):
        number = "" if i in (3, 5) else str(i)
        row = (number, ("red", "blue")[i % 3 == 0], str(i % 2 == 1).lower(), classes[i % 2])
        lines.append(delimiter.join(row))
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def sizes(task):
    return [len(split) for split in (task.train, task.validation, task.test)]


@pytest.mark.parametrize("name", data.OWN_TASKS)
def test_a_location_has_to_be_given(tmp_path, name, monkeypatch):
    monkeypatch.setenv("OPTAX_ACCEL_DATA", str(tmp_path))
    assert_fails("reads files of your own: name them by --data-dir", name)
    assert_fails("no such folder or file", name, data_dir=tmp_path / "nowhere")
    assert_fails("expected", name, data_dir=tmp_path)
    assert_fails("unknown option 'lable_column' .did you mean 'label_column'", name, lable_column=1)


def test_table_of_numbers_categories_and_gaps(tmp_path):
    task = data.load_task("table", data_dir=write_table(tmp_path / "a.csv.gz"))
    assert sizes(task) == [28, 6, 6]
    # A number, two colors, and two truth values.
    assert (task.input_shape, task.num_classes, task.classes) == ((5,), 2, ("no", "yes"))
    numbers = task.train.x[:, 0]
    assert abs(numbers.mean()) < 1e-6
    assert abs(numbers.std() - 1) < 1e-6
    for split in (task.train, task.validation, task.test):
        assert np.bincount(split.y).tolist() == [len(split) / 2] * 2  # stratified
        np.testing.assert_array_equal(split.x[:, 4], split.y)
    assert "missing values: number (2); numbers take the mean" in task.describe()
    assert "2 classes: no (50.0 %), yes (50.0 %)" in task.describe()
    again = data.load_task("table", data_dir=tmp_path / "a.csv.gz")
    assert task.checksums == again.checksums
    other = data.load_task("table", data_dir=tmp_path / "a.csv.gz", split_seed=1)
    assert task.checksums != other.checksums
    raw = data.load_task("table", data_dir=tmp_path / "a.csv.gz", no_standardize=True)
    assert raw.train.x[:, 0].max() > 30


def test_formats_hold_the_same(tmp_path):
    columns = {"a": [0.5 * i for i in range(ROWS)], "target": [i % 3 for i in range(ROWS)]}
    rows = list(zip(*columns.values(), strict=True))
    (tmp_path / "t.tsv").write_text("a\ttarget\n" + "\n".join(f"{a}\t{b}" for a, b in rows))
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    (tmp_path / "bare.csv").write_text("\n".join(f"{a},{b}" for a, b in rows))
    found = [data.load_task("table", data_dir=path) for path in sorted(tmp_path.glob("t.*"))]
    bare = {"label_column": "2", "no_header": True}
    found.append(data.load_task("table", data_dir=tmp_path / "bare.csv", **bare))
    assert len(found) == 4
    for task in found[1:]:
        assert task.checksums == found[0].checksums


def test_numbers_to_predict(tmp_path):
    path = tmp_path / "prices.csv"
    path.write_text("id,size,price\n" + "".join(f"n{i},{i},{10 * i}.5\n" for i in range(60)))
    task = data.load_task("table", data_dir=path, label_column="price", ignore_columns="id")
    assert (task.defaults.kind, task.defaults.loss, task.num_classes) == ("regression", "mse", 1)
    assert task.train.y.shape == (42, 1)
    (scale,) = task.label_scale
    np.testing.assert_allclose(np.diff(task.train.y[:, 0]).min() * scale, 10, rtol=1e-5)
    with pytest.raises(data.DataError, match="the labels are numbers"):
        data.load_classification("table", data_dir=path, label_column="price", ignore_columns="id")
    assert_fails("no column label or target", "table", data_dir=path)
    path.write_text("a,label\n" + "".join(f"{i},{i}\n" for i in range(60)))
    assert_fails("class '0' has 1 example, expected .* problem_type", "table", data_dir=path)
    assert data.load_task("table", data_dir=path, problem_type="regression").num_classes == 1


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,label\n", {}, "no row"),
        ("a,label\n1,2,3\n", {}, "unreadable, expected a table"),
        ("a,a,label\n1,2,3\n", {}, "several columns are called 'a'"),
        ("a,label\n1,x\n2,x\n", {}, "all labels are x, expected at least 2 classes"),
        ("a,label\n1,x\n2,\n", {}, "1 label missing or not finite, the first in row 2"),
        ("a,label\n1,1.5\n2,2.5\n", {"problem_type": "classification"}, "label of row 1 is 1.5"),
        ("a,label,target\n1,1,1\n", {}, "both label and target; say by --label-column"),
        ("a,label\n1,1\n", {"label_column": "b"}, r"no column 'b' .* 'a' \(int64\), 'label'"),
        ("label\n1\n2\n", {}, "no column besides the label"),
        ("a,label\n" + ",0\n,1\n" * 9, {}, "column 'a' has no entry"),
        ("s,label\nx,0\n", {"split_column": "s"}, "the split of row 1 is 'x', expected train"),
        ("a,label\n1,0\n", {"x": "a"}, "x is for the task arrays; table does not use it"),
        (
            "a,label\n1,0\n",
            {"image_size": 8},
            "for the tasks image_folder and imagenet_folder; table",
        ),
        ("a,label\n1,0\n", {"max_length": 8}, "for the tasks text and text_lm; table"),
        ("a,label\n1,0\n", {"test_fraction": 0.9}, "their sum must be below 1"),
        ("a,label\n1,0\n", {"problem_type": "ranking"}, "unknown problem_type 'ranking'"),
    ],
)
def test_mistakes_in_tables(tmp_path, text, options, message):
    (tmp_path / "t.csv").write_text(text)
    assert_fails(message, "table", data_dir=tmp_path / "t.csv", **options)


def test_too_many_categories(tmp_path):
    lines = [f"name {i},{i % 2}" for i in range(200)]
    (tmp_path / "t.csv").write_text("\n".join(["name,label", *lines]))
    assert_fails("140 different values, such as name 0", "table", data_dir=tmp_path / "t.csv")


def test_splits_by_files_and_by_column(tmp_path):
    parts = {"train": 12, "val": 4, "test": 6}
    rows = [(i, i % 2, part) for part, count in parts.items() for i in range(count)]
    for part in parts:
        lines = [f"{i},{y}" for i, y, p in rows if p == part]
        (tmp_path / f"{part}.csv").write_text("\n".join(["a,label", *lines]))
    files = data.load_task("table", data_dir=tmp_path)
    assert sizes(files) == [12, 4, 6]
    column = tmp_path / "whole"
    column.mkdir()
    lines = [",".join(map(str, row)) for row in rows]
    (column / "t.csv").write_text("\n".join(["a,label,part", *lines]))
    task = data.load_task("table", data_dir=column / "t.csv", split_column="part")
    assert task.checksums == files.checksums
    (tmp_path / "val.csv").unlink()
    assert sizes(data.load_task("table", data_dir=tmp_path)) == [10, 2, 6]
    (tmp_path / "more.csv").write_text("a,label\n1,2\n")
    assert_fails("more.csv: its name says none of train", "table", data_dir=tmp_path)


def test_texts(tmp_path):
    names = ("praise", "7", "complaint", "10", "question")
    rows = [(names[i % 5], f'Text {i} "of class {names[i % 5]}') for i in range(60)]
    path = tmp_path / "texts.tsv"
    path.write_text("kind\twords\n" + "".join(f"{k}\t{t}\n" for k, t in rows))
    columns = {"text_column": "words", "label_column": "kind"}
    task = data.load_task("text", data_dir=path, **columns)
    assert (task.num_classes, task.input_shape) == (5, (5,))
    assert task.classes == tuple(sorted(names))
    assert task.defaults.target_accuracy in (0.6, 0.61)  # between a fifth and all
    short = data.load_task("text", data_dir=path, max_length=2, **columns)
    assert short.input_shape == (2,)
    assert "60 texts (100.0 %) are cut to 2 words" in short.describe()
    bare = tmp_path / "bare.tsv"
    bare.write_text("".join(f"{k}\t{t}\n" for k, t in rows))
    places = {"no_header": True, "text_column": "2", "label_column": "1"}
    assert data.load_task("text", data_dir=bare, **places).checksums == task.checksums
    assert_fails("no column text or sentence .* 'kind'", "text", data_dir=path)
    assert_fails("cannot hold both", "text", data_dir=path, text_column="kind", label_column="kind")
    path.write_text("label\ttext\nx\tone\ny\t \n")
    assert_fails("column 'text' has 1 row without text, the first row 2", "text", data_dir=path)
    path.write_bytes("label\ttext\nx\tLäufer\n".encode("latin-1"))
    assert_fails(r"can't decode .*\); save it in UTF-8$", "text", data_dir=path)


def test_text_for_language_models(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 30)
    task = data.load_task("text_lm", data_dir=tmp_path, max_length=10)
    assert (sizes(task), task.vocabulary_size) == ([20, 4, 4], 256)
    np.testing.assert_array_equal(task.train.x[:, 1:], task.train.y[:, :-1])
    assert_fails("bytes for .*, expected more than 128, a window", "text_lm", data_dir=tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "test.txt")
    assert_fails("no text for training; there is test", "text_lm", data_dir=tmp_path)


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 6, 5), dtype=np.uint8), np.arange(30) % 3
    path = tmp_path / "a.npz"
    np.savez(path, pixels=x, kinds=np.array(["c", "a", "b"])[y], other=np.zeros(2))
    task = data.load_task("arrays", data_dir=path, x="pixels", y="kinds")
    assert (task.input_shape, task.default_model, task.num_classes) == ((6, 5, 1), "cnn", 3)
    assert task.classes == ("a", "b", "c")
    mean, std = task.train.pixels
    pixels = np.concatenate([s.x for s in (task.train, task.validation, task.test)]) * std + mean
    assert sorted(pixels.sum((1, 2, 3)).round()) == sorted(x.sum((1, 2)).tolist())
    assert_fails(r"no array x or .*pixels \(uint8 of shape \(30, 6, 5\)\)", "arrays", data_dir=path)
    assert_fails("no array 'pixel'", "arrays", data_dir=path, x="pixel", y="kinds")
    assert_fails(
        "expected a label for each example", "arrays", data_dir=path, x="pixels", y="other"
    )
    np.savez(path, x_train=x[:20] / 7, y_train=y[:20], x_val=x[20:] / 7, y_val=y[20:])
    assert sizes(data.load_task("arrays", data_dir=path)) == [17, 10, 3]
    np.savez(path, x=np.where(x > 250, np.nan, x), y=y)
    assert_fails("x: NaN or infinite numbers in", "arrays", data_dir=path)
    np.savez(path, x=x, images=x, y=y)
    assert_fails("both x and images; say by --x", "arrays", data_dir=path)
    np.savez(path, x=x.reshape(30, -1) * 1.0, y=rng.normal(size=(30, 2)))
    numbers = data.load_task("arrays", data_dir=path)
    assert (numbers.defaults.kind, numbers.default_model, numbers.num_classes) == (
        "regression",
        "mlp",
        2,
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    images = rng.integers(0, 256, (30, 8, 8), np.uint8)
    np.savez(path, x=images)  # without labels
    scores = data.load_task("arrays", data_dir=path, problem_type="score_matching")
    assert (scores.default_model, scores.input_shape) == ("ncsn", (8, 8, 1))
    assert 0.9 < scores.train.x.max() <= 1
    np.savez(path, x=images / 100)
    assert_fails("from 0 to 1", "arrays", data_dir=path, problem_type="autoencoder")
    for kind, told in ((bool, False), (np.uint8, True), (np.int64, True)):
        np.savez(path, x=(images > 99).astype(kind))
        binary = data.load_task("arrays", data_dir=path, problem_type="autoencoder")
        np.testing.assert_array_equal(np.unique(binary.train.x), [0, 1])
        assert ("only the numbers 0 and 1" in binary.describe()) is told
    np.savez(path, x=(images > 99).astype(np.uint8), y=y)
    binary = data.load_task("arrays", data_dir=path, no_standardize=True)
    np.testing.assert_array_equal(np.unique(binary.train.x), [0, 1])
    assert binary.train.pixels == (0.0, 1.0)
    assert "only the numbers 0 and 1" in binary.describe()
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    assert data.load_task("arrays", data_dir=folder).num_classes == 3


@pytest.mark.parametrize("gray", [False, True])
def test_folder_of_pictures(tmp_path, gray, monkeypatch):
    for name, shade in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for i in range(10):
            shape = (12 + i, 9) if gray else (12 + i, 9, 3)
            Image.fromarray(np.full(shape, shade, np.uint8)).save(tmp_path / name / f"{i}.png")
    task = data.load_task("image_folder", data_dir=tmp_path)
    assert (task.input_shape, task.default_model) == ((9, 9, 1 if gray else 3), "cnn")
    assert (sizes(task), task.classes) == ([14, 3, 3], ("dark", "light"))
    np.testing.assert_allclose(task.train.x[:, 0, 0, 0], 2 * task.train.y - 1, atol=1e-3)
    assert "not read" not in task.describe()
    (tmp_path / "dark" / "list.TXT").touch()
    (tmp_path / "light" / "list.txt").touch()
    (tmp_path / "light" / "Thumbs").touch()
    monkeypatch.setenv("OPTAX_ACCEL_DATA_LIMIT", "1")
    large = data.load_task("image_folder", data_dir=tmp_path, image_size=130)
    assert large.default_model == "resnet18"
    assert "read when needed" in large.describe()
    assert "no pictures: .txt (2), no suffix (1); pictures are .jpeg" in large.describe()
    assert large.train.x[:1].shape[1:] == large.input_shape
    monkeypatch.delenv("OPTAX_ACCEL_DATA_LIMIT")
    modelled = data.load_task("image_folder", data_dir=tmp_path, problem_type="autoencoder")
    assert (modelled.default_model, modelled.num_classes, sizes(modelled)) == ("vae", 0, [14, 3, 3])
    assert modelled.train.y is modelled.train.x
    np.testing.assert_allclose(np.unique(modelled.train.x), [40 / 255, 200 / 255], rtol=1e-6)
    loose = data.load_task("image_folder", data_dir=tmp_path / "dark", problem_type="autoencoder")
    assert sizes(loose) == [6, 2, 2]
    with pytest.raises(data.DataError, match="unknown problem_type 'regression'; valid: classif"):
        data.load_task("image_folder", data_dir=tmp_path, problem_type="regression")
    (tmp_path / "dark" / "3.png").write_bytes(b"not a picture")
    assert_fails("3.png: ", "image_folder", data_dir=tmp_path)


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_spirals.py").write_text(
        "import numpy as np\nfrom experiments import data\n"
        "def load(folder):\n"
        "    x, y = np.eye(9, dtype=np.float32), np.arange(9) % 3\n"
        "    return data.make_task('spirals', [data.Split(x, y)] * 3, num_classes=3)\n"
        "data.register('spirals', load, data.Defaults('mlp'))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    task = data.load_task("my_spirals:spirals")
    assert (task.name, task.default_model, task.num_classes) == ("spirals", "mlp", 3)
    assert data.load_classification("my_spirals:spirals").name == "spirals"
    assert_fails("registers no task 'spiral', only .*spirals", "my_spirals:spiral")
    assert_fails("module 'nowhere' cannot be imported", "nowhere:spirals")
    split = data.Split(np.zeros((2, 3), np.float32), np.array([0, 3]))
    wrong = data.make_task("wrong", [split] * 3, num_classes=3)
    data.register("wrong", lambda _: wrong, data.Defaults("mlp"))
    assert_fails("train labels are int64 from 0 to 3, expected integers from 0 to 2", "wrong")
    with pytest.raises(data.DataError, match="one of ours"):
        data.register("mnist", lambda _: wrong, data.Defaults("mlp"))
    with pytest.raises(data.DataError, match="does not fit the kind regression; valid: mse"):
        data.register("other", lambda _: wrong, data.Defaults("mlp", kind="regression"))
