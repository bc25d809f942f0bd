"""Sparse training: few entries trained or kept, and epochs sampled instead of trained."""

from optax_accel.sparse.increments import SparseIncrementsState, sift, sparse_increments

__all__ = ["SparseIncrementsState", "sift", "sparse_increments"]
