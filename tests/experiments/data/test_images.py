"""Tasks on images, from files that the tests write and from real ones where there are any."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from experiments import data
from tests.experiments.data.files import (
    IDX_NAMES,
    ROWS,
    arrays,
    assert_fails,
    idx,
    write_cifar100,
    write_cifar_batches,
    write_idx,
    write_imagenet,
    write_jpegs,
    write_small_mnist,
)


def assert_is_mnist(task, content):
    np.testing.assert_array_equal(task.train.y, content["y_train"][:5_000])
    np.testing.assert_array_equal(task.validation.y, content["y_train"][5_000:10_000])
    np.testing.assert_array_equal(task.test.y, content["y_test"])
    expected = content["x_train"][:5_000, ..., np.newaxis] / 255
    np.testing.assert_allclose(task.train.x, expected, rtol=1e-6)
    assert task.train.x.dtype == np.float32
    assert task.train.y.dtype == np.int32
    assert task.input_shape == (28, 28, 1)


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


@pytest.mark.slow
def test_real_cifar_jpegs(data_dir):
    task = data.load_task("cifar10", data_dir=data_dir)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [45_000, 5_000, 10_000]
    assert np.bincount(task.test.y).tolist() == [1_000] * 10


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
