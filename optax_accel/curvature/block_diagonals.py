"""The block-diagonal part of an operator: its layers by themselves, their couplings left out."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._masking import other_type
from optax_accel.curvature import blocks
from optax_accel.curvature._vectors import check_vector, part_of
from optax_accel.curvature.estimates import Operator, block_product

Labels: TypeAlias = chex.ArrayTree | Callable[[chex.ArrayTree], chex.ArrayTree] | None


class DiagonalBlock:
    """One diagonal block of an operator, an operator on the leaves of one group.

    Made by :meth:`BlockDiagonal.part`. A product takes one with the whole operator; where only this
    block is needed, ``where=`` of :func:`~optax_accel.curvature.hessian` and its siblings is
    cheaper.

    Args:
      operator: the whole operator.
      like: structure, shapes and dtypes of its vectors.
      chosen: a boolean for each of their leaves, whether it belongs to the group.

    Attributes:
      like: structure, shapes and dtypes of the vectors; ``optax.MaskedNode`` stands in place of the
        leaves of other groups.
      dimension: number of rows and columns.
    """

    def __init__(self, operator: Operator, like: chex.ArrayTree, chosen: chex.ArrayTree):
        self._product, self._whole = block_product(operator, like)
        self._chosen = chosen
        self.like: chex.ArrayTree = _selected(self._whole, chosen)
        self.dimension: int = blocks.dimension(self.like)

    def __repr__(self) -> str:
        return f"DiagonalBlock(dimension={self.dimension})"

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        """The product with one vector, a pytree like ``like``.

        Raises:
          ValueError: the vector has another structure or other shapes.
        """
        check_vector(repr(self), self.like, vector)
        return jax.tree.map(lambda b: b[0], self.block(blocks.as_block(vector)))

    def select(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """The part of a tree like the vectors of the whole operator that this block acts on.

        Args:
          tree: a gradient, an update, ..., of the structure of all parameters.

        Returns:
          A vector of the block: ``optax.MaskedNode`` in place of the leaves of other groups.

        Raises:
          ValueError: the tree is not like the whole.
        """
        return part_of(repr(self), self.like, tree)

    def block(self, block: chex.ArrayTree) -> chex.ArrayTree:
        """The products with every row of a block, leaves ``(k, *shape)``."""
        check_vector(repr(self), self.like, block, num_axes=1)
        leaves = jax.tree.leaves(block)
        num = leaves[0].shape[0] if leaves else 0
        whole = jax.tree.map(
            lambda m, x, b: b if m else jnp.zeros((num, *x.shape), x.dtype),
            self._chosen,
            self._whole,
            block,
        )
        return _selected(self._product(whole), self._chosen)

    def dense(self) -> jax.Array:
        """The block as a matrix, ``(dimension, dimension)``. For tiny problems only."""
        return _matrix(self.block(blocks.identity(self.like)), self.dimension)


class BlockDiagonal:
    """The block-diagonal part of a symmetric operator, a symmetric operator itself.

    Made by :func:`block_diagonal`.

    Args:
      operator: the whole operator.
      like: structure, shapes and dtypes of its vectors.
      labels: the group of each of their leaves.

    Attributes:
      like: structure, shapes and dtypes of the vectors.
      dimension: number of rows and columns.
      labels: the labels of the groups, in the order of their first leaves.
    """

    def __init__(self, operator: Operator, like: chex.ArrayTree, labels: list[Hashable]):
        self._product, self.like = block_product(operator, like)
        self._operator = operator
        self._of_leaf = labels
        self.dimension: int = blocks.dimension(self.like)
        self.labels: tuple[Hashable, ...] = tuple(dict.fromkeys(labels))

    def __repr__(self) -> str:
        return f"BlockDiagonal({len(self.labels)} blocks, dimension={self.dimension})"

    def part(self, label: Hashable) -> DiagonalBlock:
        """One of the diagonal blocks, as an operator on the leaves of its group.

        Args:
          label: which group, one of ``labels``.

        Returns:
          The operator, for eigensolvers and estimates of a single layer.

        Raises:
          ValueError: there is no such label.
        """
        if label not in self.labels:
            raise ValueError(
                f"there is no block {label!r}; there are {', '.join(map(repr, self.labels))}."
            )
        flags = [each == label for each in self._of_leaf]
        chosen = jax.tree.unflatten(jax.tree.structure(self.like), flags)
        return DiagonalBlock(self._operator, self.like, chosen)

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        """The product with one vector, a pytree like ``like``.

        Raises:
          ValueError: the vector has another structure or other shapes.
        """
        check_vector(repr(self), self.like, vector)
        return jax.tree.map(lambda b: b[0], self.block(blocks.as_block(vector)))

    def block(self, block: chex.ArrayTree) -> chex.ArrayTree:
        """The products with every row of a block, leaves ``(k, *shape)``.

        Each row is cut into its groups, which makes as many rows for the whole operator.
        """
        check_vector(repr(self), self.like, block, num_axes=1)
        leaves, treedef = jax.tree.flatten(block)
        if not leaves or leaves[0].shape[0] == 0:
            return block
        num, groups = leaves[0].shape[0], self.labels

        def cut(leaf: jax.Array, label: Hashable) -> jax.Array:
            there = [leaf if label == group else jnp.zeros_like(leaf) for group in groups]
            return jnp.concatenate(there)

        rows = [cut(leaf, label) for leaf, label in zip(leaves, self._of_leaf, strict=True)]
        images = jax.tree.leaves(self._product(jax.tree.unflatten(treedef, rows)))
        starts = [num * groups.index(label) for label in self._of_leaf]
        own = [image[i : i + num] for image, i in zip(images, starts, strict=True)]
        return jax.tree.unflatten(treedef, own)

    def dense(self) -> jax.Array:
        """The operator as a matrix, ``(dimension, dimension)``. For tiny problems only."""
        whole = _matrix(self._product(blocks.identity(self.like)), self.dimension)
        numbers = [
            jnp.full(leaf.shape, self.labels.index(label)).ravel()
            for leaf, label in zip(jax.tree.leaves(self.like), self._of_leaf, strict=True)
        ]
        group = jnp.concatenate(numbers) if numbers else jnp.zeros((0,), int)
        return jnp.where(group[:, None] == group[None, :], whole, 0)


def block_diagonal(
    operator: Operator, labels: Labels = None, *, like: chex.ArrayTree = None
) -> BlockDiagonal:
    """The block-diagonal part of a symmetric operator: what couples different groups left out.

    A product takes one with the whole operator for each group, so it is exact, whatever the
    operator is. Where the whole is positive semidefinite, so is this part.

    Args:
      operator: a symmetric operator: a :class:`~optax_accel.curvature.CurvatureOperator` or a
        function of a pytree.
      labels: the group of every leaf, as in ``optax.partition``: a pytree of strings or integers
        like the vectors (or a prefix of it), or a function of them that returns one. ``None``
        (default): the leaves with the same parent are a group, as the kernel and the bias of a
        layer, and its label is the parent's path.
      like: structure, shapes and dtypes of the vectors; default: the operator's own.

    Returns:
      The operator, with each of its blocks as ``.part(label)``.

    Raises:
      ValueError: the labels do not fit the vectors.
      TypeError: ``like`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_accel.curvature import block_diagonal
      >>> matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
      >>> def product(v):
      ...     image = matrix @ jnp.stack([v["a"]["w"], v["b"]["w"]])
      ...     return {"a": {"w": image[0]}, "b": {"w": image[1]}}
      >>> like = {"a": {"w": jnp.zeros(())}, "b": {"w": jnp.zeros(())}}
      >>> layers = block_diagonal(product, like=like)
      >>> layers.labels
      ("['a']", "['b']")
      >>> layers.dense().tolist(), layers.part("['b']").dense().tolist()
      ([[2.0, 0.0], [0.0, 3.0]], [[3.0]])
    """
    _, like = block_product(operator, like)
    return BlockDiagonal(operator, like, _labels_of_leaves(labels, like))


def _labels_of_leaves(labels: Labels, like: chex.ArrayTree) -> list[Hashable]:
    if labels is None:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(like)]
        return [jax.tree_util.keystr(path[:-1]) or "(root)" for path in paths]
    tree = labels(like) if callable(labels) else labels
    spread: list[Hashable] = []

    def put(label: Any, part: chex.ArrayTree) -> None:
        if not isinstance(label, Hashable) or hasattr(label, "shape"):
            raise ValueError(f"it contains {label!r}, which is neither a string nor an integer")
        spread.extend([label] * len(jax.tree.leaves(part)))

    try:
        jax.tree.map(put, tree, like)
    except ValueError as error:
        other = other_type(tree, like, "labels", "jax.tree_util.keystr(path)")
        raise ValueError(
            "`labels` must be a pytree of strings or integers like the vectors (or a prefix of "
            f"it), or a function that returns one: {other or error}"
        ) from error
    return spread


def _selected(tree: chex.ArrayTree, chosen: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda m, x: x if m else optax.MaskedNode(), chosen, tree)


def _matrix(rows: chex.ArrayTree, size: int) -> jax.Array:
    """The products with all unit vectors as a matrix."""
    columns = [leaf.reshape(size, -1) for leaf in jax.tree.leaves(rows)]
    return jnp.concatenate(columns, axis=1).T if columns else jnp.zeros((0, 0))
