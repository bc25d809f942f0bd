"""Data sets: their files, the tasks made of them, augmentation, batches, prefetching.

`load_task` gives a task by name: examples split into train, validation and test, and what a model
has to know about them. `batches` and `index_batches` are Grain pipelines over such examples; their
iterators save and restore their position (`get_state`, `set_state`) and so can be checkpointed.
`prefetch_to_device` moves batches to the device in the background.

| task | train / validation / test | files |
|---|---|---|
| `digits` | 1077 / 360 / 360 | none: in scikit-learn |
| `mnist` | 55,000 / 5,000 / 10,000 | MNIST |
| `mnist5k` | 5,000 / 5,000 / 10,000 | MNIST |
| `fashion_mnist` | 55,000 / 5,000 / 10,000 | Fashion-MNIST |
| `cifar10` | 45,000 / 5,000 / 10,000 | CIFAR-10 |
| `cifar10_5k` | 5,000 / 5,000 / 10,000 | CIFAR-10 |
| | 5,000 / first half / second half of its test rows | or `cifar10_5k.npz`, preferred |
| `cifar100` | 45,000 / 5,000 / 10,000 | CIFAR-100, its 100 fine labels |
| `imagenet_folder` | 19/20 and 1/20 of `train` / `val` | `train/CLASS/*.jpg`, `val/CLASS/*.jpg` |
| `sst2` | 62,349 / 5,000 / 872 | SST-2 |
| `sst2_1k` | 1,000 / 1,000 / 872 | SST-2 |
| `wikitext2` | 59,675 / 6,218 / 7,016 windows | WikiText-2 |
| `tiny_shakespeare` | 7,842 / 435 / 435 windows | tinyshakespeare.txt |
| `multi30k` | 29,000 / 1,014 / 1,000 | Multi30k, English to German |
| `segmentation` | 384 / 48 / 48 crops of 24 / 3 / 3 pictures | ISBI 2012, membranes |
| `moving_digits_flow` | 4,000 / 500 / 500 pairs of pictures | MNIST, or none |
| `digits_detection` | 2,000 / 500 / 500 | MNIST; without a folder none |
| `vae_mnist` | 55,000 / 5,000 / 10,000 | MNIST |
| `vae_digits`, `ncsn_digits` | as `digits` | none |
| `ncsn_cifar10_5k` | as `cifar10_5k` | as `cifar10_5k` |
| `image_folder`, `arrays`, | as the files say, | your own |
| `text`, `text_lm`, `table` | or 70, 15 and 15 per cent | |

The sizes are those of the public files. Where these have no validation split, it is ours: the last
5,000 training rows, or, for the subsets (the first 5,000 training rows, of SST-2 1,000), as many
rows after them. The modules `images`, `moving_digits`, `segmentation`, `detection`, `sentences`,
`language` and `translation` say which files they look for and what they make of them.

`own_tasks` says what the tasks that read a person's own files expect, `own.FilesOptions` how they
are told about columns, splits and labels; `register` adds tasks written in Python.

A data directory `hf:...` or `tfds:...` names a data set of Hugging Face or TensorFlow Datasets
instead of a folder with files, see `readers.hubs.read_hub`: for the MNISTs and CIFARs, SST-2, the
language models and `multi30k`.

Files are not trusted. Only regular files are opened, and at most 512 MiB of each, counted as they
are unpacked; the environment variable OPTAX_ACCEL_DATA_LIMIT allows another number of MiB. Pictures
are JPEG or PNG of at most 89,478,485 pixels, and lines of text have at most 1,048,576 characters.
Whatever is wrong with a file is one `DataError` of one line.
"""

from experiments.data.batches import batches, in_order, index_batches, index_steps
from experiments.data.loading import data_folder, load_classification, load_task, register
from experiments.data.own import FilesOptions
from experiments.data.prefetch import prefetch_to_device
from experiments.data.readers.files import DataError
from experiments.data.tasks import (
    CLASSIFICATION,
    DEFAULTS,
    GENERATIVE,
    IGNORED,
    LOSSES,
    OF_PICTURES,
    OWN_TASKS,
    TASKS,
    Defaults,
    Split,
    Task,
    check_classification,
    default_epochs,
    find_task,
    losses_of,
    make_task,
    short_name,
)

__all__ = [
    "CLASSIFICATION",
    "DEFAULTS",
    "GENERATIVE",
    "IGNORED",
    "LOSSES",
    "OF_PICTURES",
    "OWN_TASKS",
    "TASKS",
    "DataError",
    "Defaults",
    "FilesOptions",
    "Split",
    "Task",
    "batches",
    "check_classification",
    "data_folder",
    "default_epochs",
    "find_task",
    "in_order",
    "index_batches",
    "index_steps",
    "load_classification",
    "load_task",
    "losses_of",
    "make_task",
    "prefetch_to_device",
    "register",
    "short_name",
]
