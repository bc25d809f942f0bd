"""Loading on files that the tests write, and on real ones where there are any."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import os
import pickle
import struct
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import grain
import jax
import numpy as np
import pytest
from PIL import Image

from experiments import data
from experiments.data import readers
from experiments.runs.records import first_difference

ROWS = 10_020  # more than a 5k subset and its validation need


def arrays(shape, rows=ROWS, test_rows=30):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (rows, *shape), dtype=np.uint8),
        "y_train": rng.integers(0, 10, rows, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (test_rows, *shape), dtype=np.uint8),
        "y_test": rng.integers(0, 10, test_rows, dtype=np.uint8),
    }


@pytest.fixture(scope="module")
def mnist():
    return arrays((28, 28))


@pytest.fixture(scope="module")
def cifar():
    return arrays((32, 32, 3))


IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, content, gzipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    for key, name in IDX_NAMES.items():
        if gzipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(content[key]), compresslevel=1))
        else:
            (folder / name).write_bytes(idx(content[key]))


def write_cifar_batches(folder, content):
    """In the format of the original files: Python 2 pickles of NumPy 1 arrays."""
    folder.mkdir()
    parts = zip(
        np.array_split(content["x_train"], 5), np.array_split(content["y_train"], 5), strict=True
    )
    batches = {f"data_batch_{i}": part for i, part in enumerate(parts, start=1)}
    batches["test_batch"] = content["x_test"], content["y_test"]
    for name, (x, y) in batches.items():
        batch = {
            b"batch_label": b"a batch",
            b"labels": y.tolist(),
            b"data": x.transpose(0, 3, 1, 2).reshape(len(x), 3072),
            b"filenames": [b"an image.png"] * len(x),
        }
        pickled = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(pickled.replace(b"numpy._core", b"numpy.core"))


def write_sst2(folder, names=("sst2.train.tsv", "sst2.dev.tsv"), rows=2_001):
    """Row i is "i Is even ." or odd, some words more; the labels say which."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in zip(names, (rows, 30), strict=True):
        lines = ["sentence\tlabel"]
        lines += [f"{i} Is {('even', 'odd')[i % 2]} . \t{i % 2}" for i in range(count)]
        content = "\n".join([*lines, ""]).encode()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def write_text(folder, name="tinyshakespeare.txt", lines=400):
    """One line is "Line 7 of all the lines." """
    text = "".join(f"Line {i} of all the lines.\n" for i in range(lines))
    (folder / name).write_text(text)
    return text


def write_pairs(folder, suffix="", rows=(30, 8, 8)):
    """Pairs such as "7 men ride 7 dogs ." and "7 Hunde reiten 7 Menschen ." """
    parts = ("train", "val", "test_2016_flickr")
    for part, count in zip(parts, rows, strict=True):
        for lang, line in (("en", "{} men ride {} dogs."), ("de", "{} Männer reiten {} Hunde.")):
            text = "".join(line.format(i, i % 3) + "\n" for i in range(count)).encode()
            path = folder / f"multi30k.{part}.{lang}{suffix}"
            path.write_bytes(gzip.compress(text) if suffix else text)


def write_small_mnist(folder):
    np.savez(folder / "mnist.npz", **arrays((28, 28), rows=5_008, test_rows=8))


def assert_is_mnist(task, content):
    np.testing.assert_array_equal(task.train.y, content["y_train"][:5_000])
    np.testing.assert_array_equal(task.validation.y, content["y_train"][5_000:10_000])
    np.testing.assert_array_equal(task.test.y, content["y_test"])
    expected = content["x_train"][:5_000, ..., np.newaxis] / 255
    np.testing.assert_allclose(task.train.x, expected, rtol=1e-6)
    assert task.train.x.dtype == np.float32
    assert task.train.y.dtype == np.int32
    assert task.input_shape == (28, 28, 1)


def assert_fails(match, name, **options):
    with pytest.raises(data.DataError, match=match) as caught:
        data.load_task(name, **options)
    assert "\n" not in str(caught.value)


# Tasks.


def test_digits_are_split_by_class_once_and_for_all():
    task = data.load_task("digits")
    splits = (task.train, task.validation, task.test)
    assert [len(split) for split in splits] == [1077, 360, 360]
    for split in splits:
        assert split.x.shape == (len(split), 8, 8, 1)
        assert split.x.dtype == np.float32
        assert split.y.dtype == np.int32
        assert 0 == split.x.min() < split.x.max() == 1
        share = np.bincount(split.y, minlength=10) / len(split)
        assert (abs(share - 0.1) < 0.01).all()
    # No picture is in two splits (the data set itself has no doubles), and all are there.
    pictures = np.concatenate([split.x.reshape(-1, 64) for split in splits])
    assert len(np.unique(pictures, axis=0)) == 1797
    # The split does not change between versions; results rest on it.
    assert task.test.y[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    assert (task.num_classes, task.input_shape, task.default_model) == (10, (8, 8, 1), "mlp")


def test_mnist_without_subset_validates_on_the_last_rows(tmp_path, mnist):
    np.savez(tmp_path / "mnist.npz", **mnist)
    task = data.load_task("mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(task.train.y, mnist["y_train"][:-5_000])
    np.testing.assert_array_equal(task.validation.y, mnist["y_train"][-5_000:])


@pytest.mark.parametrize("place", [".", "MNIST/raw"])
@pytest.mark.parametrize("gzipped", [False, True])
def test_mnist_from_idx_files(tmp_path, mnist, place, gzipped):
    write_idx(tmp_path / place, mnist, gzipped)
    assert_is_mnist(data.load_task("mnist5k", data_dir=tmp_path), mnist)


def test_data_directory_from_the_environment_unless_one_is_named(tmp_path, mnist, monkeypatch):
    np.savez(tmp_path / "mnist.npz", **mnist)
    monkeypatch.setenv("OPTAX_ACCEL_DATA", str(tmp_path))
    assert_is_mnist(data.load_task("mnist5k"), mnist)
    assert_fails("other: no such folder", "mnist5k", data_dir=tmp_path / "other")


def test_cifar_from_python_batches_and_from_npz(tmp_path, cifar):
    write_cifar_batches(tmp_path / "cifar-10-batches-py", cifar)
    from_batches = data.load_task("cifar10", data_dir=tmp_path)
    # Labels in a column, as Keras has them.
    columns = {key: a[:, np.newaxis] if key[0] == "y" else a for key, a in cifar.items()}
    np.savez(tmp_path / "cifar10.npz", **columns)
    from_npz = data.load_task("cifar10", data_dir=tmp_path)
    for one, other in zip(
        (from_batches.train, from_batches.validation, from_batches.test),
        (from_npz.train, from_npz.validation, from_npz.test),
        strict=True,
    ):
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.y, other.y)
    assert len(from_npz.train) == ROWS - 5_000
    assert from_npz.input_shape == (32, 32, 3)


def test_cifar_is_standardized_by_the_training_split(tmp_path, cifar):
    content = {key: array.copy() for key, array in cifar.items()}
    content["x_train"][:5_000, 0, 0, 0] = 7  # a pixel without variance must not give NaN
    np.savez(tmp_path / "cifar10.npz", **content)
    task = data.load_task("cifar10_5k", data_dir=tmp_path)
    train = content["x_train"][:5_000] / 255.0
    mean, std = train.mean(axis=0), train.std(axis=0)
    std[0, 0, 0] = 1 / 255
    np.testing.assert_allclose(task.train.x, (train - mean) / std, atol=1e-4)
    np.testing.assert_allclose(task.test.x, (content["x_test"] / 255 - mean) / std, atol=1e-4)
    assert (task.train.x[:, 0, 0, 0] == 0).all()


def test_cifar_5k_file_is_preferred_and_halves_its_test_rows(tmp_path, cifar):
    np.savez(tmp_path / "cifar10.npz", **cifar)
    small = arrays((32, 32, 3), rows=5_000)
    np.savez(tmp_path / "cifar10_5k.npz", **small)
    task = data.load_task("cifar10_5k", data_dir=tmp_path)
    np.testing.assert_array_equal(task.train.y, small["y_train"])
    np.testing.assert_array_equal(task.validation.y, small["y_test"][:15])
    np.testing.assert_array_equal(task.test.y, small["y_test"][15:])


@pytest.mark.parametrize(
    "names",
    [
        ("sst2.train.tsv.gz", "sst2.dev.tsv"),
        ("sst2.train.tsv", "sst2.dev.tsv.gz"),
        ("SST-2/train.tsv", "SST-2/dev.tsv"),
        ("SST-2/train.tsv.gz", "SST-2/dev.tsv.gz"),
    ],
)
def test_sst2_becomes_token_ids(tmp_path, names):
    write_sst2(tmp_path, names)
    task = data.load_task("sst2_1k", data_dir=tmp_path)
    assert (task.num_classes, task.input_shape, task.default_model) == (2, (4,), "transformer")
    # Padding, unknown, "is", ".", "even", "odd" and the 1,000 numbers.
    assert task.vocabulary_size == 2 + 4 + 1_000
    for split, rows in ((task.train, 1_000), (task.validation, 1_000), (task.test, 30)):
        assert (split.x.shape, split.x.dtype, split.y.dtype) == ((rows, 4), np.int32, np.int32)
        np.testing.assert_array_equal(split.y, np.arange(rows) % 2)
    # Most frequent first, then as they come: "is", ".", "even", "odd", "0", "1".
    assert task.train.x[:3].tolist() == [[6, 2, 4, 3], [7, 2, 5, 3], [8, 2, 4, 3]]
    assert task.validation.x[:2].tolist() == [[1, 2, 4, 3], [1, 2, 5, 3]]  # "1000", "1001"
    assert task.test.x[:2].tolist() == task.train.x[:2].tolist()


def test_sst2_is_as_long_as_the_longest_training_row_whatever_the_split(tmp_path):
    write_sst2(tmp_path, rows=5_010)
    train, dev = (tmp_path / f"sst2.{part}.tsv" for part in ("train", "dev"))
    train.write_text(train.read_text() + "one two three four five six\t1\n")
    dev.write_text("sentence\tlabel\r\n" + "odd " * 8 + "\t1\r\neven\t0")
    for name in ("sst2", "sst2_1k"):
        task = data.load_task(name, data_dir=tmp_path)
        assert task.train.x.shape[1] == task.validation.x.shape[1] == 6
        assert (task.train.x[:, 4:] == 0).all()
        odd, even = task.test.x[0, 0], task.test.x[1, 0]
        assert task.test.x.tolist() == [[odd] * 6, [even] + [0] * 5]
        assert task.test.y.tolist() == [1, 0]
    assert len(data.load_task("sst2", data_dir=tmp_path).train) == 11
    train.write_text(train.read_text() + "word " * 101 + "\t1\n")
    assert data.load_task("sst2", data_dir=tmp_path).input_shape == (100,)


def test_sst2_of_exactly_the_subset_halves_its_development_rows(tmp_path):
    write_sst2(tmp_path, rows=1_000)
    task = data.load_task("sst2_1k", data_dir=tmp_path)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [1_000, 15, 15]


@pytest.mark.parametrize("place", [".npz", "fashion_mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_not_taken_for_mnist(tmp_path, mnist, place):
    np.savez(tmp_path / "mnist.npz", **arrays((28, 28), rows=20))
    write_idx(tmp_path, arrays((28, 28), rows=20))
    if place == ".npz":
        np.savez(tmp_path / "fashion_mnist.npz", **mnist)
    else:
        write_idx(tmp_path / place, mnist, gzipped=True)
    task = data.load_task("fashion_mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(task.test.y, mnist["y_test"])
    assert (task.input_shape, task.default_model) == ((28, 28, 1), "cnn")


def test_autoencoder_labels_are_the_images(tmp_path):
    write_small_mnist(tmp_path)
    task = data.load_task("vae_mnist", data_dir=tmp_path)
    for split in (task.train, task.validation, task.test):
        assert split.y is split.x
        assert 0 <= split.x.min() < split.x.max() <= 1
    assert (task.num_classes, task.defaults.loss) == (0, "elbo")


def write_cifar100(folder, content):
    folder.mkdir()
    for part in ("train", "test"):
        x, y = content[f"x_{part}"], content[f"y_{part}"]
        batch = {
            b"filenames": [b"an image.png"] * len(x),
            b"fine_labels": y.tolist(),
            b"coarse_labels": (y // 5).tolist(),
            b"data": x.transpose(0, 3, 1, 2).reshape(len(x), 3072),
        }
        (folder / part).write_bytes(pickle.dumps(batch, protocol=2))


def test_cifar100_has_its_fine_labels(tmp_path):
    content = arrays((32, 32, 3), rows=5_100)
    content["y_train"] = np.arange(5_100, dtype=np.uint8) % 100
    write_cifar100(tmp_path / "cifar-100-python", content)
    task = data.load_task("cifar100", data_dir=tmp_path)
    assert task.train.y.tolist() == list(range(100))
    assert task.num_classes == 100
    # Of all tasks only this one reads labels above 9.
    write_cifar_batches(tmp_path / "cifar-10-batches-py", content)
    assert_fails("labels lie between 0 and 99, expected 0 to 9", "cifar10", data_dir=tmp_path)
    np.savez(tmp_path / "cifar100.npz", **content | {"y_test": np.full(30, 100)})
    assert_fails("labels lie between 100 and 100, expected 0 to 99", "cifar100", data_dir=tmp_path)


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_jpegs(path, rows=5_003):
    """Plain gray pictures; the brightness of picture i is i % 5 * 50."""
    pictures = [jpeg(np.full((32, 32, 3), 50 * shade, np.uint8)) for shade in range(5)]
    content = {}
    for part, count in (("train", rows), ("test", 10)):
        chosen = [pictures[i % 5] for i in range(count)]
        content[f"jpeg_{part}"] = np.frombuffer(b"".join(chosen), np.uint8)
        content[f"off_{part}"] = np.cumsum([0, *map(len, chosen)])
        content[f"y_{part}"] = np.arange(count, dtype=np.uint8) % 5
    np.savez(path, **content)
    return content


def test_cifar10_from_jpegs(tmp_path):
    path = tmp_path / "cifar10_jpeg.npz"
    content = write_jpegs(path)
    task = data.load_task("cifar10", data_dir=tmp_path)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [3, 5_000, 10]
    mean, std = task.train.pixels
    pixels = task.test.x * std + mean
    expected = 50.0 * task.test.y[:, None, None, None]
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=2)
    damaged = content["jpeg_train"].copy()
    damaged[content["off_train"][7] :][:20] = 0
    np.savez(path, **content | {"jpeg_train": damaged})
    assert_fails(
        "cifar10_jpeg.npz: train picture 7: not a readable pic", "cifar10", data_dir=tmp_path
    )
    del content["off_test"]
    np.savez(path, **content)
    assert_fails("no array off_test; expected jpeg_train, off_train", "cifar10", data_dir=tmp_path)


def write_imagenet(folder, classes=("n01", "n02"), rows=10):
    """Picture i of class c is of shade 10 i, its left half darker by 5; higher than wide."""
    for part, count in (("train", rows), ("val", 3)):
        for name in classes:
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((48, 36, 3), 10 * i + 5, np.uint8)
                pixels[:, :18] -= 5
                Image.fromarray(pixels).save(place / f"{name}_{i}.png")


def test_folder_of_images(tmp_path):
    write_imagenet(tmp_path)
    task = data.load_task("imagenet_folder", data_dir=tmp_path, image_size=12)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [19, 1, 6]
    assert (task.num_classes, task.input_shape) == (2, (12, 12, 3))
    assert task.test.y.tolist() == [0, 0, 0, 1, 1, 1]
    mean, std = task.test.pixels
    found = task.test.x[np.array([1, 5])] * std + mean
    np.testing.assert_allclose(found[0, :, :5], 10, atol=1e-4)
    np.testing.assert_allclose(found[1, :, 7:], 25, atol=1e-4)
    # Read again, as another index, and by name and size: the same.
    np.testing.assert_array_equal(task.test.x[1:2], task.test.x[np.array([1])])
    again = data.load_task("imagenet_folder", data_dir=tmp_path, image_size=12)
    assert task.checksums == again.checksums
    batch = next(iter(data.batches(task.train, batch_size=4, seed=0, workers=2)))
    assert batch["x"].shape == (4, 12, 12, 3)
    assert data.load_task("imagenet_folder", data_dir=tmp_path).input_shape == (224, 224, 3)


def test_broken_folder_of_images(tmp_path):
    write_imagenet(tmp_path, rows=3)
    path = tmp_path / "train" / "n02" / "n02_1.png"
    path.write_bytes(path.read_bytes()[:60])
    task = data.load_task("imagenet_folder", data_dir=tmp_path, image_size=8)
    dataset = data.batches(task.train, batch_size=2, seed=0, num_epochs=2)
    with (
        data.prefetch_to_device(iter(dataset)) as batches,
        pytest.raises(data.DataError, match=r"n02_1.png: not a readable picture"),
    ):
        list(batches)
    (tmp_path / "val" / "n03").mkdir()
    assert_fails(
        "n03: no pictures here, expected files .jpeg, ", "imagenet_folder", data_dir=tmp_path
    )
    (tmp_path / "val" / "n03" / "1.jpg").touch()
    assert_fails("n03: no such class in .*train", "imagenet_folder", data_dir=tmp_path)
    for size in (0, -3, 4097, 10**9, 32.0):
        assert_fails(
            f"between 1 and 4096, got {size}", "imagenet_folder", data_dir=tmp_path, image_size=size
        )


def membranes(rows=10, size=(130, 260)):
    rng = np.random.default_rng(0)
    y = (rng.random((rows, *size)) < 0.7).astype(np.uint8)
    return {"x": (y * 100 + 50).astype(np.uint8), "y": y}


def test_segmentation_crops_pictures_and_labels_alike(tmp_path):
    content = membranes()
    np.savez(tmp_path / "isbi_em.npz", **content)
    task = data.load_task("segmentation", data_dir=tmp_path)
    # Two crops of each picture; eight pictures, one, one.
    assert [len(s) for s in (task.train, task.validation, task.test)] == [16, 2, 2]
    assert (task.input_shape, task.num_classes) == ((128, 128, 1), 2)
    for split in (task.train, task.validation, task.test):
        np.testing.assert_array_equal(split.x[..., 0] > 0, split.y == 1)
    np.testing.assert_array_equal(task.train.y[1], content["y"][0, :128, 128:256])
    np.testing.assert_array_equal(task.test.y[0], content["y"][9, :128, :128])
    np.testing.assert_allclose([task.train.x.mean(), task.train.x.std()], [0, 1], atol=0.01)
    # The same pictures as files: numbered, with labels of 0 and 255.
    folder = tmp_path / "folder"
    for name, pictures in (("image", content["x"]), ("label", 255 * content["y"])):
        (folder / "membrane/train" / name).mkdir(parents=True)
        for i, picture in enumerate(pictures, start=1):
            Image.fromarray(picture).save(folder / "membrane/train" / name / f"{i}.png")
    files = data.load_task("segmentation", data_dir=folder)
    np.testing.assert_array_equal(files.train.x, task.train.x)
    np.testing.assert_array_equal(files.test.y, task.test.y)
    (folder / "membrane/train/label/7.png").unlink()
    assert_fails("pictures of the same names in image and label", "segmentation", data_dir=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "no array y; expected x, y"),
        ({"x": np.zeros((10, 130, 260), np.float32)}, "pictures are float32"),
        ({"x": np.zeros((10, 64, 64), np.uint8)}, r"labels of shape \(10, 130, 260\)"),
        ({"y": np.full((10, 130, 260), 2)}, "up to 2, expected 0 and 1"),
        (membranes(rows=9), "9 pictures, expected at least 10"),
        (membranes(rows=0), "0 pictures, expected at least 10"),
        ({"y": np.full((10, 130, 260), np.nan)}, "labels are float64 up to nan, expected 0 and 1"),
    ],
)
def test_wrong_membranes(tmp_path, change, message):
    content = membranes() | change
    np.savez(tmp_path / "isbi_em.npz", **{k: a for k, a in content.items() if a is not None})
    assert_fails(message, "segmentation", data_dir=tmp_path)


def test_characters_are_bytes_and_labels_the_next_ones(tmp_path):
    text = write_text(tmp_path)
    task = data.load_task("tiny_shakespeare", data_dir=tmp_path)
    assert (task.input_shape, task.vocabulary_size, task.num_classes) == ((128,), 256, 0)
    cuts = [0, 9 * len(text) // 10, 19 * len(text) // 20, len(text)]
    splits = (task.train, task.validation, task.test)
    for split, start, end in zip(splits, cuts, cuts[1:], strict=False):
        part = text[start:end]
        assert len(split) == (len(part) - 1) // 128
        x, y = split.x.reshape(-1), split.y.reshape(-1)
        assert bytes(x.astype(np.uint8)).decode() == part[: len(x)]
        assert bytes(y.astype(np.uint8)).decode() == part[1 : len(x) + 1]
    write_text(tmp_path, lines=50)
    assert_fails(
        "tokens for validation, expected more than 128", "tiny_shakespeare", data_dir=tmp_path
    )


def write_wikitext(folder, names):
    for name, lines in zip(names, (30, 12, 12), strict=True):
        text = "".join(
            f" \n = Title {i % 9} = \n \n Some <unk> words , here . \n" for i in range(lines)
        )
        text += "" if lines == 30 else "never seen before\n" * 12
        (folder / name).parent.mkdir(exist_ok=True)
        content = text.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("z") else content)


@pytest.mark.parametrize(
    "names",
    [
        ("wikitext2.train.txt.gz", "wikitext2.valid.txt.gz", "wikitext2.test.txt.gz"),
        ("wikitext-2/train.txt", "wikitext-2/valid.txt", "wikitext-2/test.txt"),
        (
            "wikitext-2/wiki.train.tokens",
            "wikitext-2/wiki.valid.tokens",
            "wikitext-2/wiki.test.tokens",
        ),
    ],
)
def test_words_of_wikitext(tmp_path, names):
    write_wikitext(tmp_path, names)
    task = data.load_task("wikitext2", data_dir=tmp_path)
    # "<eos>", "=", "Title", 9 numbers, "Some", "<unk>", "words", ",", "here", ".".
    assert (task.input_shape, task.vocabulary_size) == ((35,), 3 + 9 + 6)
    x, y = task.train.x.reshape(-1), task.train.y.reshape(-1)
    # Every line ends with <eos>, also an empty one.
    assert x[:9].tolist() == [0, 1, 2, 3, 1, 0, 0, 4, 5]
    np.testing.assert_array_equal(x[1:], y[:-1])
    # 14 tokens a title, the last of which is only a label.
    assert len(x) == (30 * 14 - 1) // 35 * 35
    # Words that the training text does not have are the unknown one.
    assert task.validation.x.reshape(-1)[-1] in (0, 5)
    assert task.validation.x.max() < task.vocabulary_size


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_pairs_become_source_shifted_target_and_labels(tmp_path, suffix):
    write_pairs(tmp_path, suffix)
    task = data.load_task("multi30k", data_dir=tmp_path)
    assert (task.input_shape, task.num_classes) == ((40, 40), 0)
    assert task.vocabulary_size < 200
    for split, rows in ((task.train, 30), (task.validation, 8), (task.test, 8)):
        assert (split.x.shape, split.y.shape) == ((rows, 80), (rows, 40))
        source, shifted = split.x[:, :40], split.x[:, 40:]
        for row in range(rows):
            length = (split.y[row] != -1).sum()
            assert split.y[row, length - 1] == 2  # end
            assert (split.y[row, :length] > 0).all()
            assert shifted[row, 0] == 1  # begin
            np.testing.assert_array_equal(shifted[row, 1:length], split.y[row, : length - 1])
            assert (shifted[row, length:] == 0).all()
            assert source[row, (source[row] != 0).sum() - 1] == 2
    assert task.train.x.max() < task.vocabulary_size
    # The same pieces every time.
    again = data.load_task("multi30k", data_dir=tmp_path)
    np.testing.assert_array_equal(again.test.x, task.test.x)


def test_long_sentences_are_cut(tmp_path):
    write_pairs(tmp_path)
    long = "".join(f"{i} men. " for i in range(60))
    for lang in ("en", "de"):
        path = tmp_path / f"multi30k.val.{lang}"
        path.write_text(path.read_text() + long + "\n")
    task = data.load_task("multi30k", data_dir=tmp_path)
    assert (task.validation.x[-1] > 0).all()
    assert (task.validation.y[-1] > 0).all()


def test_pairs_that_do_not_fit_together(tmp_path):
    write_pairs(tmp_path)
    path = tmp_path / "multi30k.val.de"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert_fails("val.de: 7 lines, expected 8, one for each of", "multi30k", data_dir=tmp_path)
    path.write_text("".join([*lines[:3], "\n", *lines[4:]]))
    assert_fails("val.de: line 4 is empty, expected a sentence", "multi30k", data_dir=tmp_path)
    path.unlink()
    assert_fails("val.de: unreadable, expected text in UTF-8", "multi30k", data_dir=tmp_path)


# Hugging Face and TensorFlow Datasets: files that their own packages write.


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


def test_real_texts_and_pairs(data_dir):
    words = data.load_task("wikitext2", data_dir=data_dir)
    # The numbers of PyTorch's example of that data.
    assert words.vocabulary_size == 33_278
    assert len(words.train) == (2_088_628 - 1) // 35
    characters = data.load_task("tiny_shakespeare", data_dir=data_dir)
    assert len(np.unique(characters.train.x)) == 65
    assert len(characters.train) == 7_842
    pairs = data.load_task("multi30k", data_dir=data_dir)
    assert [len(s) for s in (pairs.train, pairs.validation, pairs.test)] == [29_000, 1_014, 1_000]
    assert pairs.vocabulary_size == 8_000
    assert (pairs.train.y[:, -1] != -1).mean() < 0.005  # cut
    assert (pairs.test.x == 3).mean() < 0.001  # unknown


def test_real_membranes(data_dir):
    task = data.load_task("segmentation", data_dir=data_dir)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [384, 48, 48]
    assert 0.75 < task.train.y.mean() < 0.81  # cells


@pytest.mark.slow
def test_real_cifar_jpegs(data_dir):
    task = data.load_task("cifar10", data_dir=data_dir)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [45_000, 5_000, 10_000]
    assert np.bincount(task.test.y).tolist() == [1_000] * 10


def test_real_sst2(data_dir):
    task = data.load_task("sst2_1k", data_dir=data_dir)
    assert (len(task.train), len(task.validation), len(task.test)) == (1_000, 1_000, 872)
    assert (task.input_shape, task.vocabulary_size) == ((52,), 2_896)
    assert set(np.unique(task.train.y)) == {0, 1}
    assert 0.05 < (task.test.x == 1).sum() / (task.test.x != 0).sum() < 0.4
    full = data.load_task("sst2", data_dir=data_dir)
    assert (len(full.train), len(full.validation), len(full.test)) == (62_349, 5_000, 872)
    assert full.input_shape == task.input_shape
    np.testing.assert_array_equal(full.train.y[:1_000], task.train.y)
    assert np.bincount(full.test.y).tolist() == [428, 444]  # GLUE's development rows


def test_real_mnist(data_dir):
    task = data.load_task("mnist5k", data_dir=data_dir)
    # The first labels of the training and test files, as on the MNIST page.
    assert task.train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert task.test.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert (len(task.train), len(task.validation), len(task.test)) == (5_000, 5_000, 10_000)
    # Well-known mean of all pixels: 0.1307.
    assert abs(task.train.x.mean() - 0.1307) < 0.002


def test_real_cifar(data_dir):
    task = data.load_task("cifar10_5k", data_dir=data_dir)
    assert len(task.train) == 5_000
    np.testing.assert_allclose(task.train.x.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(task.train.x.std(axis=0), 1, atol=1e-4)


# Missing and broken files.


NEEDED = {
    "mnist": "expected mnist.npz or train-images-idx3-ubyte",
    "vae": "expected mnist.npz",
    "fashion": r"no Fashion-MNIST here, .* in fashion_mnist or FashionMNIST/raw",
    "cifar10_5k": "expected cifar10_5k.npz, cifar10.npz, the folder cifar-10-batches-py",
    "cifar100": r"expected cifar100.npz, the folder cifar-100-python \(from cifar-100-python.tar",
    "cifar10": "the folder cifar-10-batches-py .* or cifar10_jpeg.npz",
    "sst2": r"expected sst2.train.tsv and sst2.dev.tsv or SST-2/train.tsv and .*\.gz",
    "imagenet": "train: expected one folder for each class, with its pictures",
    "wikitext2": "no WikiText-2 here, expected wikitext2.train.txt and .* or wikitext-2/wiki",
    "tiny": r"expected tinyshakespeare.txt \(also .gz\)",
    "multi30k": "expected multi30k.train.en and multi30k.train.de or multi30k/train.en and",
    "segmentation": "expected isbi_em.npz or pictures in membrane/train/image and",
}


@pytest.mark.parametrize("name", [name for name in data.TASKS if name != "digits"])
def test_no_data_directory_or_an_empty_one(tmp_path, name, monkeypatch):
    monkeypatch.delenv("OPTAX_ACCEL_DATA", raising=False)
    assert_fails("--data-dir or the environment variable OPTAX_ACCEL_DATA", name)
    assert_fails(r"no such folder", name, data_dir=tmp_path / "nowhere")
    expected = next(message for start, message in NEEDED.items() if name.startswith(start))
    assert_fails(expected, name, data_dir=tmp_path)


def test_unknown_task():
    assert_fails("unknown task 'imagenet'; valid: digits, mnist, mnist5k", "imagenet")


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-100], "truncated or damaged|unreadable"),
        (lambda content: content[:9], "truncated or damaged|unreadable"),
        (lambda content: b"", "expected IDX magic number 0x00000803"),
        (lambda content: b"<html>not found</html>", "expected IDX magic number 0x00000803"),
        (lambda content: idx(np.zeros(3, np.uint8)), "starts with 0x00000801, expected"),
        (lambda content: idx(np.zeros((3, 9, 9), np.uint8)), r"\(3, 9, 9\), expected uint8"),
    ],
)
def test_damaged_idx_file(tmp_path, damage, message, gzipped):
    write_idx(tmp_path, arrays((28, 28), rows=20), gzipped)
    path = tmp_path / (IDX_NAMES["x_train"] + ".gz" * gzipped)
    path.write_bytes(damage(path.read_bytes()))
    assert_fails(message, "mnist", data_dir=tmp_path)
    assert_fails(str(tmp_path), "mnist", data_dir=tmp_path)


def test_damaged_gzip_stream(tmp_path):
    write_idx(tmp_path, arrays((28, 28), rows=20), gzipped=True)
    path = tmp_path / (IDX_NAMES["x_train"] + ".gz")
    content = bytearray(path.read_bytes())
    content[200:300] = bytes(100)
    path.write_bytes(content)
    assert_fails(f"{path}: ", "mnist", data_dir=tmp_path)


def test_one_idx_file_missing(tmp_path):
    write_idx(tmp_path, arrays((28, 28), rows=20))
    (tmp_path / IDX_NAMES["y_test"]).unlink()
    assert_fails(f"{IDX_NAMES['y_test']}: unreadable.*No such file", "mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 is '', expected the header 'sentence', tab, 'label'"),
        (b"index\tsentence\n0\tgood\n", "line 1 is 'index.tsentence', expected the header"),
        (b"sentence\tlabel\n", "no line after the header"),
        (b"sentence\tlabel\ngood\t1\nbad 0\n", "line 3 is 'bad 0', expected a sentence, a tab"),
        (b"sentence\tlabel\ngood\t2\n", "line 2 is 'good.t2', expected a sentence, a tab"),
        (b"sentence\tlabel\n \t1\n", "line 2 is ' .t1', expected a sentence, a tab"),
        (b"sentence\tlabel\ncaf\xe9\t1\n", "unreadable, expected sentences and labels in UTF-8"),
        # Without the time, which would make the name of the test another one each second.
        (gzip.compress(b"sentence\tlabel\n" * 9, mtime=0)[:-9], "unreadable, expected sentences"),
        (None, "sst2.dev.tsv: unreadable.*No such file"),
    ],
)
def test_damaged_sst2_file(tmp_path, content, message):
    write_sst2(tmp_path)
    path = tmp_path / "sst2.dev.tsv"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert_fails(message, "sst2_1k", data_dir=tmp_path)
    assert_fails(str(path), "sst2_1k", data_dir=tmp_path)


def test_number_of_rows(tmp_path):
    write_sst2(tmp_path, rows=1_999)
    assert_fails("1999 training examples, expected 2000", "sst2_1k", data_dir=tmp_path)
    assert_fails("1999 training examples, expected more than 5000", "sst2", data_dir=tmp_path)
    np.savez(tmp_path / "mnist.npz", **arrays((28, 28), rows=5_000))
    assert_fails("5000 training examples, expected more than 5000", "mnist", data_dir=tmp_path)
    np.savez(tmp_path / "mnist.npz", **arrays((28, 28), rows=9_999))
    assert_fails("9999 training examples, expected 10000", "mnist5k", data_dir=tmp_path)


def test_splits_without_examples(tmp_path):
    write_sst2(tmp_path, rows=1_000)
    path = tmp_path / "sst2.dev.tsv"
    path.write_text("sentence\tlabel\ngood\t1\n")
    assert_fails("1 test example, expected at least 2", "sst2_1k", data_dir=tmp_path)
    write_pairs(tmp_path)
    for lang in ("en", "de"):
        (tmp_path / f"multi30k.train.{lang}").write_text("a" * 5_000 + "\n")
    assert_fails("SentencePiece learns no pieces from the train", "multi30k", data_dir=tmp_path)
    nothing = data.Split(np.zeros((0, 3)), np.zeros(0, int))
    something = data.Split(np.zeros((2, 3)), np.zeros(2, int))
    with pytest.raises(data.DataError, match="task 'mnist': no validation example, expected at"):
        data._task("mnist", [something, nothing, something])


@pytest.mark.parametrize("folder", ["a" * 300, "a\0b", "~nobody-of-this-name/data", "/dev/null"])
def test_folders_that_cannot_be(folder):
    assert_fails(
        "no such folder, expected one with the files of task 'mnist'", "mnist", data_dir=folder
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_test": None}, "no array x_test; expected x_train, y_train, x_test, y_test"),
        ({"x_train": np.zeros((20, 28, 28), np.float32)}, "train images are float32"),
        ({"x_train": np.zeros((20, 784), np.uint8)}, r"\(20, 784\), expected uint8 of shape"),
        ({"x_train": np.zeros((0, 28, 28), np.uint8)}, r"train images are uint8 of shape \(0,"),
        ({"y_train": np.zeros(19, np.uint8)}, r"labels are uint8 of shape \(19,\), expected"),
        ({"y_train": np.zeros((20, 10), np.uint8)}, r"labels are uint8 of shape \(20, 10\)"),
        ({"y_train": np.uint8(3)}, r"labels are uint8 of shape \(\)"),
        ({"y_test": np.full(30, 2.5)}, "test labels are float64"),
        ({"y_test": np.arange(30)}, "test labels lie between 0 and 29, expected 0 to 9"),
        ({"y_test": np.array([None] * 30)}, "y_test is of type '.O', expected numbers"),
    ],
)
def test_wrong_arrays_in_npz(tmp_path, change, message):
    content = arrays((28, 28), rows=20) | change
    np.savez(tmp_path / "mnist.npz", **{k: a for k, a in content.items() if a is not None})
    assert_fails(message, "mnist", data_dir=tmp_path)


def test_damaged_npz(tmp_path):
    path = tmp_path / "cifar10.npz"
    np.savez(path, **arrays((32, 32, 3), rows=20))
    whole = path.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        assert_fails("cifar10.npz: unreadable, expected an .npz", "cifar10", data_dir=tmp_path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert_fails("cifar10.npz: unreadable, expected an .npz", "cifar10", data_dir=tmp_path)
    np.savez(path, np.zeros(3))
    assert_fails(
        "cifar10.npz: no array x_train, y_train, x_test, y_test", "cifar10", data_dir=tmp_path
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps({b"labels": [1]}),
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": np.zeros(7, np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": [[1], [2, 3]], b"labels": [1]}),
    ],
)
def test_damaged_cifar_batch(tmp_path, content):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar_batches(folder, arrays((32, 32, 3), rows=20))
    (folder / "data_batch_3").write_bytes(content)
    assert_fails(
        "data_batch_3: unreadable, expected a CIFAR python batch", "cifar10", data_dir=tmp_path
    )


def test_cifar_batch_cannot_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    folder = tmp_path / "cifar-10-batches-py"
    write_cifar_batches(folder, arrays((32, 32, 3), rows=20))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Attack(), b"labels": [1]}))
    assert_fails("test_batch: .*does not belong in a data file", "cifar10", data_dir=tmp_path)
    assert not (tmp_path / "written").exists()


# Checksums.


def test_checksums_tell_which_part_of_the_data_differs(tmp_path):
    task = data.load_task("digits")
    expected = task.checksums
    assert expected == data.load_task("digits").checksums
    for split in ("train", "validation", "test"):
        old = getattr(task, split)
        x, y = old.x.copy(), old.y.copy()
        x[-1, -1, -1] += 1
        y[-1] += 1
        for kind, new in (("examples", data.Split(x, old.y)), ("labels", data.Split(old.x, y))):
            changed = dataclasses.replace(task, **{split: new}).checksums
            difference = first_difference({"data": expected}, {"data": changed})
            assert difference == f"other {kind} of the {split} split"
    # The same bytes in another shape, or another type.
    reshaped = data.Split(task.test.x.reshape(360, 4, 16, 1), task.test.y.view(np.float32))
    assert not {*reshaped.checksums().values()} & {*task.test.checksums().values()}
    for older in (None, {}, {"train": 3}, [1], {"train": {"examples": 1}}):
        difference = first_difference({"data": older}, {"data": expected})
        assert difference == (
            "no checksums of all its data, because an older version of this project made it"
        )
    # Where the labels are the examples there is one number.
    autoencoder = data.Split(task.test.x, task.test.x).checksums()
    assert autoencoder["labels"] == autoencoder["examples"]


def test_checksums_of_pictures(tmp_path, monkeypatch):
    def checksum():
        paths = readers.list_images(tmp_path / "train" / "n01")
        return readers.ImageFiles(paths, 8, np.zeros(3), np.ones(3)).checksum()

    write_imagenet(tmp_path, rows=5)
    path = tmp_path / "train" / "n01" / "n01_3.png"
    content, times = path.read_bytes(), (0, path.stat().st_mtime_ns)

    def write(changed):
        path.write_bytes(changed)
        os.utime(path, ns=times)

    # Few bytes count as a whole, whenever they were written.
    expected = checksum()
    os.utime(path)
    assert checksum() == expected
    write(content[:-1] + b"x")
    assert checksum() != expected
    write(content)
    assert checksum() == expected
    # Of many, sizes, times and some of the files.
    monkeypatch.setattr(readers, "_CHECKSUM_BYTES", 100)
    monkeypatch.setattr(readers, "_CHECKSUM_FILES", 2)
    expected = checksum()
    write(content[:-1] + b"x")  # every third file is read, the first and this one
    assert checksum() != expected
    write(content)
    assert checksum() == expected
    os.utime(path)
    assert checksum() != expected
    write(content + b"x")
    assert checksum() != expected
    write(content)
    path.rename(path.with_name("n01_9.png"))
    assert checksum() != expected


# Pipelines.


def take(iterator, count):
    return [np.asarray(batch) for batch in itertools.islice(iterator, count)]


def test_every_epoch_is_a_new_order_of_all_indices():
    batches = take(data.index_batches(13, batch_size=4, seed=0), 9)
    assert {batch.dtype for batch in batches} == {np.dtype("int32")}
    epochs = [np.concatenate(batches[i : i + 3]) for i in (0, 3, 6)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == 12  # the remainder of one is dropped
        assert epoch.min() >= 0
        assert epoch.max() < 13
    assert not (epochs[0] == epochs[1]).all()
    assert not (epochs[1] == epochs[2]).all()


def test_the_seed_decides_the_order_and_neighbors_share_none():
    def epochs(seed):
        return {tuple(b) for b in take(data.index_batches(50, batch_size=50, seed=seed), 10)}

    assert epochs(0) == epochs(0)
    assert len(epochs(0) | epochs(1) | epochs(2)) == 30


def test_number_of_epochs():
    assert len(list(data.index_batches(13, batch_size=4, seed=0, num_epochs=2))) == 6


def test_all_positions_are_equally_likely():
    orders = np.stack(take(data.index_batches(5, batch_size=5, seed=1), 2_000))
    counts = np.stack([np.bincount(column, minlength=5) for column in orders.T])
    # Binomial, mean 400 and standard deviation 18: five of them are never left by chance.
    assert abs(counts - 400).max() < 90


@pytest.mark.parametrize("batch_size", [0, -1, 14])
def test_impossible_batch_size(batch_size):
    with pytest.raises(ValueError, match=f"between 1 and the 13 examples, got {batch_size}"):
        data.index_batches(13, batch_size=batch_size, seed=0)


def test_impossible_numbers():
    split = data.load_task("digits").validation
    for options, message in (
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, or None, got 0"),
        ({"workers": -1}, "workers must be between 0 and 1000, got -1"),
        ({"workers": 10**9}, "workers must be between 0 and 1000"),
        ({"augment": ("mixup",)}, "mixup needs the number of classes, more than .* label 9; got"),
        ({"augment": ("blur",)}, "unknown augmentation 'blur'; valid: randaugment, crop"),
        ({"augment": ("flip",), "seed": 2**31}, "seed must be between 0 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            data.batches(split, **{"batch_size": 8, "seed": 0} | options)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        data.in_order(split, 0)
    for size in (-1, 10**9):
        with pytest.raises(ValueError, match=f"size must be between 0 and 1000, got {size}"):
            data.prefetch_to_device(iter([]), size=size)


def test_batches_hold_the_examples_of_the_indices():
    split = data.load_task("digits").train
    indices = data.index_batches(len(split), batch_size=64, seed=3)
    batches = data.batches(split, batch_size=64, seed=3)
    for index, batch in itertools.islice(zip(indices, batches, strict=False), 20):
        np.testing.assert_array_equal(batch["x"], split.x[index])
        np.testing.assert_array_equal(batch["y"], split.y[index])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_parts_of_all_processes_are_the_whole_batch(count):
    split = data.load_task("digits").train
    arguments = {"batch_size": 64, "seed": 3, "num_epochs": 2}
    whole = list(data.batches(split, **arguments))
    shards = [grain.sharding.ShardOptions(i, count) for i in range(count)]
    parts = [list(data.batches(split, **arguments, shard=shard)) for shard in shards]
    assert [len(part) for part in parts] == [len(whole)] * count
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert [len(piece["y"]) for piece in pieces] == [64 // count] * count
        for name in ("x", "y"):
            joined = np.concatenate([piece[name] for piece in pieces])
            np.testing.assert_array_equal(joined, batch[name])


def test_a_position_saved_by_some_processes_serves_any_other_number():
    def iterators(count):
        shards = [grain.sharding.ShardOptions(i, count) for i in range(count)]
        return [data.index_batches(50, batch_size=8, seed=0, shard=shard) for shard in shards]

    expected = take(data.index_batches(50, batch_size=8, seed=0), 20)
    batches = []
    state = None
    for count in (1, 2, 4, 1):  # five batches each, over the end of an epoch of six
        processes = iterators(count)
        for process in processes:
            if state is not None:
                process.set_state(state)
        batches += [np.concatenate([next(p) for p in processes]) for _ in range(5)]
        states = [process.get_state() for process in processes]
        assert all(other == states[0] for other in states)
        state = states[-1]
    np.testing.assert_array_equal(batches, expected)


def test_a_batch_that_does_not_split_over_the_processes():
    shard = grain.sharding.ShardOptions(0, 3)
    with pytest.raises(ValueError, match="batch_size 8 does not split evenly over 3 processes"):
        data.index_batches(50, batch_size=8, seed=0, shard=shard)


def put_on(sharding):
    return lambda batch: jax.device_put(batch, sharding)


def pipelines():
    split = data.load_task("digits").validation
    batches = data.batches(split, batch_size=100, seed=3)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    yield "host", lambda: iter(batches)
    yield "device", lambda: data.prefetch_to_device(iter(batches), size=3)
    yield "mesh", lambda: data.prefetch_to_device(iter(batches), put_on(sharding))


@pytest.mark.parametrize("which", ["host", "device", "mesh"])
def test_a_restored_iterator_continues_where_it_was_saved(which):
    make = dict(pipelines())[which]
    iterator = make()
    for _ in range(4):  # into the second epoch of three batches
        next(iterator)
    state = iterator.get_state()
    following = [next(iterator) for _ in range(4)]
    again = make()
    for target in (again, iterator):  # a fresh one, and one that has gone on
        target.set_state(state)
        for batch in following:
            jax.tree.map(np.testing.assert_array_equal, next(target), batch)


def test_prefetching_changes_nothing_but_the_place():
    split = data.load_task("digits").validation
    dataset = data.batches(split, batch_size=100, seed=3, num_epochs=2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    fetched = list(data.prefetch_to_device(iter(dataset), put_on(sharding), size=4))
    assert len(fetched) == 6
    for on_device, on_host in zip(fetched, dataset, strict=True):
        assert {leaf.sharding for leaf in on_device.values()} == {sharding}
        jax.tree.map(np.testing.assert_array_equal, on_device, on_host)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def count_to(n, pulled):
    for i in range(n):
        pulled.append(i)
        yield np.full(2, i)


def test_prefetching_works_on_any_iterator_and_stays_ahead_by_its_size():
    pulled = []
    with data.prefetch_to_device(count_to(9, pulled), size=3) as iterator:
        assert pulled == []
        assert next(iterator)[0] == 0
        # Three wait, one is being made; and no more, however long one waits.
        until(lambda: len(pulled) == 5)
        time.sleep(0.05)
        assert pulled == [0, 1, 2, 3, 4]
        assert [int(batch[0]) for batch in iterator] == [1, 2, 3, 4, 5, 6, 7, 8]
        with pytest.raises(StopIteration):
            next(iterator)


def test_without_prefetching_a_batch_is_made_when_it_is_asked_for():
    pulled = []
    iterator = data.prefetch_to_device(count_to(5, pulled), size=0)
    for i in range(5):
        assert int(next(iterator)[0]) == i
        assert pulled == list(range(i + 1))


def test_the_next_batch_is_made_while_the_last_one_is_used():
    used, made = threading.Event(), threading.Event()

    def source():
        yield np.zeros(1)
        assert used.wait(20)  # would never come if the consumer had to wait for this batch
        made.set()
        yield np.ones(1)

    with data.prefetch_to_device(source(), size=1) as iterator:
        next(iterator)
        used.set()
        assert made.wait(20)
        assert next(iterator)[0] == 1


def test_what_goes_wrong_in_the_background_is_raised_in_its_place():
    class Source:
        def __init__(self):
            self.position = 0

        def __next__(self):
            self.position += 1
            if self.position == 3:
                raise data.DataError("picture 3 is damaged")
            return np.full(1, self.position)

        def get_state(self):
            return {"position": self.position}

        def set_state(self, state):
            self.position = state["position"]

    with data.prefetch_to_device(Source(), size=4) as iterator:
        assert [int(next(iterator)[0]) for _ in range(2)] == [1, 2]
        with pytest.raises(data.DataError, match="picture 3 is damaged"):
            next(iterator)
        assert iterator.get_state() == {"position": 2}
        iterator.set_state({"position": 3})  # behind it, all is well
        assert int(next(iterator)[0]) == 4


def test_closing_ends_the_background_work():
    pulled = []
    before = threading.active_count()
    iterator = data.prefetch_to_device(count_to(1000, pulled), size=2)
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    assert threading.active_count() == before
    # Also when it was never asked for anything, and twice.
    unused = data.prefetch_to_device(count_to(3, []))
    unused.close()
    unused.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_and_augmentation_keep_batches_and_positions(workers):
    split = data.load_task("digits").validation
    arguments = {"batch_size": 40, "seed": 3, "augment": ("crop", "flip", "mixup")}
    expected = list(
        itertools.islice(data.batches(split, **arguments, num_classes=10), 30)
    )  # nine an epoch
    assert not (expected[0]["x"] == expected[9]["x"]).all()

    def make():
        dataset = data.batches(split, **arguments, num_classes=10, workers=workers)
        return data.prefetch_to_device(iter(dataset))

    with make() as iterator:
        for batch in expected[:13]:
            jax.tree.map(np.testing.assert_array_equal, next(iterator), batch)
        state = iterator.get_state()
    with make() as iterator:
        iterator.set_state(state)
        for batch in expected[13:]:
            jax.tree.map(np.testing.assert_array_equal, next(iterator), batch)
    # The parts of two processes are the whole batch, whoever reads.
    shards = [grain.sharding.ShardOptions(i, 2) for i in range(2)]
    parts = [
        data.batches(split, **arguments, num_classes=10, workers=workers, shard=shard)
        for shard in shards
    ]
    for batch, *pieces in itertools.islice(zip(expected, *parts, strict=False), 12):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
        jax.tree.map(np.testing.assert_array_equal, joined, batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_examples_in_order(workers):
    split = data.load_task("digits").validation
    found = list(data.in_order(split, 100, workers))
    assert [len(batch["y"]) for batch in found] == [100, 100, 100, 60]
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in found]), split.x)
    np.testing.assert_array_equal(np.concatenate([batch["y"] for batch in found]), split.y)
