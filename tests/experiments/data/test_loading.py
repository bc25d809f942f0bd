"""Which folder is read, and what is said of missing and of too few examples."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import data
from experiments.data.tasks import make_task
from tests.experiments.data.files import arrays, assert_fails, write_pairs, write_sst2

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


NEED_NOTHING = {
    *("digits", "vae_digits", "ncsn_digits", "moving_digits_flow", "digits_detection"),
}


@pytest.mark.parametrize("name", sorted({*data.TASKS} - NEED_NOTHING - {*data.OWN_TASKS}))
def test_no_data_directory_or_an_empty_one(tmp_path, name, monkeypatch):
    monkeypatch.delenv("OPTAX_ACCEL_DATA", raising=False)
    assert_fails("--data-dir or the environment variable OPTAX_ACCEL_DATA", name)
    assert_fails(r"no such folder", name, data_dir=tmp_path / "nowhere")
    source = name.removeprefix("ncsn_")
    expected = next(message for start, message in NEEDED.items() if source.startswith(start))
    assert_fails(expected, name, data_dir=tmp_path)


def test_unknown_task():
    assert_fails("unknown task 'foo'; valid: digits, mnist, mnist5k", "foo")


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
        make_task("mnist", [something, nothing, something])


@pytest.mark.parametrize("folder", ["a" * 300, "a\0b", "~nobody-of-this-name/data", "/dev/null"])
def test_folders_that_cannot_be(folder):
    assert_fails(
        "no such folder, expected one with the files of task 'mnist'", "mnist", data_dir=folder
    )
