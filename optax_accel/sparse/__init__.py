"""Sparse training: few entries trained or kept, and epochs sampled instead of trained."""

from optax_accel.sparse.gradsamp import GradSampState, gradsamp, sample_epoch, skip_epoch
from optax_accel.sparse.increments import SparseIncrementsState, sift, sparse_increments

__all__ = [
    "GradSampState",
    "SparseIncrementsState",
    "gradsamp",
    "sample_epoch",
    "sift",
    "skip_epoch",
    "sparse_increments",
]
