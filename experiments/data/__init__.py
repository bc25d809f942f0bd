"""Data sets: their files, the tasks made of them, augmentation, batches, prefetching."""

from experiments.data.batches import batches, in_order, index_batches
from experiments.data.prefetch import prefetch_to_device
from experiments.data.readers import DataError
from experiments.data.tasks import (
    CLASSIFICATION,
    DEFAULTS,
    IGNORED,
    LOSSES,
    TASKS,
    Split,
    Task,
    check_classification,
    data_folder,
    load_task,
)

__all__ = [
    "CLASSIFICATION",
    "DEFAULTS",
    "IGNORED",
    "LOSSES",
    "TASKS",
    "DataError",
    "Split",
    "Task",
    "batches",
    "check_classification",
    "data_folder",
    "in_order",
    "index_batches",
    "load_task",
    "prefetch_to_device",
]
