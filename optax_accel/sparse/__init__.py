"""Sparse training: few entries trained or kept, and epochs sampled instead of trained."""

from optax_accel.sparse.gradsamp import GradSampState, gradsamp, sample_epoch, skip_epoch
from optax_accel.sparse.increments import SparseIncrementsState, sift, sparse_increments
from optax_accel.sparse.pruning import (
    KeepPrunedState,
    SharpnessDirectedState,
    el2n_scores,
    keep_pruned,
    predicted_increase,
    select_examples,
    sharpness_directed,
    smallest_entries,
)

__all__ = [
    "GradSampState",
    "KeepPrunedState",
    "SharpnessDirectedState",
    "SparseIncrementsState",
    "el2n_scores",
    "gradsamp",
    "keep_pruned",
    "predicted_increase",
    "sample_epoch",
    "select_examples",
    "sharpness_directed",
    "sift",
    "skip_epoch",
    "smallest_entries",
    "sparse_increments",
]
