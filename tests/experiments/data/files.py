"""Files of data sets, as small as the readers allow, and what fails to read them."""

from __future__ import annotations

import gzip
import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from experiments import data

ROWS = 10_020  # more than a 5k subset and its validation need


def arrays(shape, rows=ROWS, test_rows=30):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (rows, *shape), dtype=np.uint8),
        "y_train": rng.integers(0, 10, rows, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (test_rows, *shape), dtype=np.uint8),
        "y_test": rng.integers(0, 10, test_rows, dtype=np.uint8),
    }


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


def write_small_mnist(folder):
    np.savez(folder / "mnist.npz", **arrays((28, 28), rows=5_008, test_rows=8))


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


def membranes(rows=10, size=(130, 260)):
    rng = np.random.default_rng(0)
    y = (rng.random((rows, *size)) < 0.7).astype(np.uint8)
    return {"x": (y * 100 + 50).astype(np.uint8), "y": y}


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


def write_wikitext(folder, names):
    for name, lines in zip(names, (30, 12, 12), strict=True):
        text = "".join(
            f" \n = Title {i % 9} = \n \n Some <unk> words , here . \n" for i in range(lines)
        )
        text += "" if lines == 30 else "never seen before\n" * 12
        (folder / name).parent.mkdir(exist_ok=True)
        content = text.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("z") else content)


def write_pairs(folder, suffix="", rows=(30, 8, 8)):
    """Pairs such as "7 men ride 7 dogs ." and "7 Hunde reiten 7 Menschen ." """
    parts = ("train", "val", "test_2016_flickr")
    for part, count in zip(parts, rows, strict=True):
        for lang, line in (("en", "{} men ride {} dogs."), ("de", "{} Männer reiten {} Hunde.")):
            text = "".join(line.format(i, i % 3) + "\n" for i in range(count)).encode()
            path = folder / f"multi30k.{part}.{lang}{suffix}"
            path.write_bytes(gzip.compress(text) if suffix else text)


def assert_fails(match, name, **options):
    with pytest.raises(data.DataError, match=match) as caught:
        data.load_task(name, **options)
    assert "\n" not in str(caught.value)
