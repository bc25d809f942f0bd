r"""SIFT: fine-tuning of a few entries of each tensor, chosen by the first gradient.

Of each tensor the :math:`k = \min(\lfloor \text{rate} \cdot \text{size} \rfloor + 1, \text{size})`
entries with the largest gradients are trained, by any optimizer, whose state then has :math:`k`
entries and not all; the others stay where they are:

.. math::
  I = \operatorname{top}_k |g_0|, \qquad \theta_I \leftarrow \theta_I + \operatorname{inner}(g_I) .

Song et al., `Sparse is enough in fine-tuning pre-trained large language models
<https://arxiv.org/abs/2312.11875>`_, ICML 2024.  Faithful to the authors' code
(``song-wx/SIFT``): the size of the sets, one set for each tensor, chosen once, the gradients that
choose it train nothing, and decoupled weight decay acts on the increments, which are zero after
each step, so that it does nothing.  That code merges increments into the weights one backward pass
late; here they are merged at once.  Ours: several gradients that choose, random entries and largest
weights as rivals, and tensors that are trained whole wait for the choice, too.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_accel._adam import scale_by_adam
from optax_accel._arguments import (
    as_arrays,
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_floating_leaves,
    check_inner,
    check_learning_rate,
    check_number,
    is_placeholder,
    known_integer,
    with_checked_init,
)
from optax_accel._masking import Mask, resolve
from optax_accel._mesh_axes import check_undivided
from optax_accel._numerics import zeros
from optax_accel._random import as_key

Selection: TypeAlias = Literal["gradient", "random", "magnitude"]
Share: TypeAlias = float  # under another name, so that no schedule is injected: it decides shapes
_SELECTIONS = ("gradient", "random", "magnitude")


class SparseIncrementsState(NamedTuple):
    """State of :func:`sparse_increments`.

    Attributes:
      count: number of gradients seen; int32 scalar.
      selected_indices: the trained entries of each tensor, flattened in C order: int32 of shape
        ``(k,)``, ascending; ``optax.MaskedNode`` for tensors that are trained whole.
      mean_magnitudes: mean of the gradients' absolute values while several of them choose, like
        the parameters; scalars if one chooses.
      inner_state: state of the inner optimizer on ``(k,)`` entries of each tensor.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    selected_indices: chex.ArrayTree
    mean_magnitudes: chex.ArrayTree
    inner_state: chex.ArrayTree


def sparse_increments(
    inner: optax.GradientTransformation,
    rate: Share,
    *,
    selection: Selection = "gradient",
    warmup_gradients: int = 1,
    dense: Mask = None,
    decay_selected: bool = False,
    key: chex.PRNGKey | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains a few entries of each tensor with any optimizer that works entry by entry.

    The entries belong to the whole tensor, also where it is sharded under ``jit``; of equal values
    the one of the lower index is chosen, so that all devices agree.

    Args:
      inner: the optimizer, such as ``optax.adamw(1e-4)``. It sees one vector for each tensor.
      rate: share of the entries of each tensor that are trained, in (0, 1]; the authors take 0.008
        for RoBERTa and 0.05 for LLaMA. Each tensor has ``floor(rate * size) + 1`` of them, at most
        all.
      selection: ``"gradient"`` (default, the authors') trains the entries with the largest
        gradients, ``"random"`` any, ``"magnitude"`` those with the largest weights.
      warmup_gradients: number of gradients whose mean absolute values choose the entries, at least
        1 (default, as in the authors' code). They train nothing. More than one keep a copy of the
        parameters in the state.
      dense: which tensors are trained whole, such as a new classifier: a tree of booleans like the
        parameters, a prefix of one, or a function that returns one; ``None`` (default) means none.
      decay_selected: whether ``inner`` sees the weights of the trained entries, so that its weight
        decay acts on them; False (default) as in the authors' code, where it acts on nothing.
      key: PRNG key or integer seed of ``selection="random"``.

    Returns:
      A transformation with state :class:`SparseIncrementsState`.

    Raises:
      ValueError: an argument outside its range; in ``init``: a tensor of 2**31 entries or more.
      TypeError: ``inner`` is no transformation; in ``init``: parameters that are not floating-point
        numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.sparse_increments(optax.sgd(0.1), rate=0.25)
      >>> params = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> state = tx.init(params)
      >>> for gradient in ([0.1, -0.5, 0.2, 0.4], [1.0, 1.0, 1.0, 1.0]):
      ...     updates, state = tx.update(jnp.array(gradient), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> state.selected_indices.tolist(), [round(float(p), 1) for p in params]
      ([1, 3], [1.0, 1.9, 3.0, 3.9])

    References:
      Song et al., `Sparse is enough <https://arxiv.org/abs/2312.11875>`_, 2024, section 4.
    """
    check_inner(inner)
    check_number("rate", rate, 0, 1, open_low=True)
    check_choice("selection", selection, _SELECTIONS)
    check_count("warmup_gradients", warmup_gradients, 1)
    check_flag("decay_selected", decay_selected)
    key = as_key(key)
    base = optax.with_extra_args_support(inner)
    by_gradient = selection == "gradient"

    def init_fn(params: chex.ArrayTree) -> SparseIncrementsState:
        count = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            # What is selected has other shapes than the parameters: nothing counts as like them.
            some, other = jnp.zeros(()), jnp.zeros(())
            return SparseIncrementsState(count, some, other, base.init(jnp.zeros(())))
        check_floating_leaves(params, "sparse_increments")
        check_undivided(params, "sparse_increments")
        params = as_arrays(params)
        leaves, structure = _flatten(params)
        whole = jax.tree.leaves(resolve(params, dense, "dense")) or [False] * len(leaves)
        indices: list[Any] = [
            optax.MaskedNode()
            if is_whole
            else _start(leaf, _selected_size(rate, leaf), selection, key, i)
            for i, (leaf, is_whole) in enumerate(zip(leaves, whole, strict=True))
        ]
        several = by_gradient and known_integer(warmup_gradients) != 1
        magnitudes = [
            zeros(leaf.shape if several and not is_whole else (), _real_dtype(leaf))
            for leaf, is_whole in zip(leaves, whole, strict=True)
        ]
        return SparseIncrementsState(
            count,
            structure.unflatten(indices),
            structure.unflatten(magnitudes),
            base.init(structure.unflatten(_seen(leaves, indices))),
        )

    def _seen(leaves: list[jax.Array], indices: list[Any]) -> list[jax.Array]:
        """The parameters of the inner optimizer: increments, which are zero, or weights."""
        if decay_selected:
            return list(map(_take, leaves, indices))
        return [
            leaf if isinstance(index, optax.MaskedNode) else zeros(index.shape, leaf.dtype)
            for leaf, index in zip(leaves, indices, strict=True)
        ]

    def chosen(
        state: SparseIncrementsState, gradients: list[jax.Array], structure: Any
    ) -> tuple[list[Any], list[jax.Array], jax.Array]:
        """Entries, magnitudes and whether this gradient counts, which it does if it is finite."""
        indices = structure.flatten_up_to(state.selected_indices)
        means = structure.flatten_up_to(state.mean_magnitudes)
        new_indices, new_means, finite = [], [], jnp.ones((), bool)
        for gradient, index, mean in zip(gradients, indices, means, strict=True):
            if isinstance(index, optax.MaskedNode):
                new_indices.append(index)
                new_means.append(mean)
                continue
            size = jnp.abs(gradient).astype(mean.dtype)
            finite &= jnp.all(jnp.isfinite(size))
            if mean.shape == gradient.shape:  # several gradients choose, or it is a scalar
                size = mean + (size - mean) / (state.count + 1).astype(mean.dtype)
                mean = size
            new_indices.append(_largest(size, index.size))
            new_means.append(mean)
        old = indices, means
        selected = jax.tree.map(functools.partial(jnp.where, finite), (new_indices, new_means), old)
        return *selected, finite

    def update_fn(
        updates: chex.ArrayTree,
        state: SparseIncrementsState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, SparseIncrementsState]:
        if decay_selected and params is None:
            raise ValueError(
                "sparse_increments needs the parameters for `decay_selected`: "
                "tx.update(grads, state, params)."
            )
        check_undivided(updates, "sparse_increments")
        gradients, structure = _flatten(updates)
        indices = structure.flatten_up_to(state.selected_indices)
        means = structure.flatten_up_to(state.mean_magnitudes)
        choosing, counts = jnp.zeros((), bool), jnp.ones((), bool)
        if by_gradient:
            choosing = state.count < warmup_gradients
            indices, means, counts = lax.cond(
                choosing,
                lambda: chosen(state, gradients, structure),
                lambda: (indices, means, counts),
            )
        leaves = gradients if params is None else jax.tree.leaves(params)
        scaled, inner_state = base.update(
            structure.unflatten(list(map(_take, gradients, indices))),
            state.inner_state,
            structure.unflatten(_seen(leaves, indices)),
            **extra_args,
        )
        parts = structure.flatten_up_to(scaled)
        if by_gradient:
            parts = [jnp.where(choosing, jnp.zeros_like(part), part) for part in parts]
            inner_state = jax.tree.map(
                functools.partial(jnp.where, choosing), state.inner_state, inner_state
            )
        new_updates = [
            part
            if isinstance(index, optax.MaskedNode)
            else jnp.zeros(gradient.size, gradient.dtype)
            .at[index]
            .set(part.astype(gradient.dtype), unique_indices=True, indices_are_sorted=True)
            .reshape(gradient.shape)
            for gradient, index, part in zip(gradients, indices, parts, strict=True)
        ]
        return structure.unflatten(new_updates), SparseIncrementsState(
            jnp.where(counts, optax.safe_increment(state.count), state.count),
            structure.unflatten(indices),
            structure.unflatten(means),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _flatten(tree: chex.ArrayTree) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


def _selected_size(rate: float, leaf: jax.Array) -> int:
    if leaf.size >= 2**31:
        raise ValueError(
            f"sparse_increments numbers entries by int32, but a tensor has the shape {leaf.shape}; "
            "divide it, or train it whole with `dense`."
        )
    return min(math.floor(rate * leaf.size) + 1, leaf.size)


def _start(
    leaf: jax.Array, size: int, selection: Selection, key: jax.Array, position: int
) -> jax.Array:
    """The entries of the leaf at a position before the first gradient."""
    if selection == "magnitude":
        return _largest(jnp.abs(leaf), size)
    if selection == "gradient":  # whatever they are, the first gradient replaces them
        return jnp.array(np.arange(size, dtype=np.int32))
    key = jax.random.fold_in(key, position)
    return jnp.sort(jax.random.choice(key, leaf.size, (size,), replace=False)).astype(jnp.int32)


def _largest(magnitudes: jax.Array, size: int) -> jax.Array:
    """The flat indices of the largest entries, ascending; of equal ones those of lower indices."""
    return jnp.sort(lax.top_k(magnitudes.ravel(), size)[1]).astype(jnp.int32)


def _take(leaf: jax.Array, index: Any) -> jax.Array:
    return leaf if isinstance(index, optax.MaskedNode) else leaf.ravel()[index]


def _real_dtype(leaf: jax.Array) -> Any:
    return jnp.finfo(jnp.promote_types(leaf.dtype, jnp.float32)).dtype


def sift(
    learning_rate: optax.ScalarOrSchedule,
    rate: Share,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    selection: Selection = "gradient",
    warmup_gradients: int = 1,
    dense: Mask = None,
    decay_selected: bool = False,
    mu_dtype: Any = None,
    key: chex.PRNGKey | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """SIFT: AdamW on the few entries of each tensor with the largest first gradients.

    The state has three numbers for each trained entry: with a rate of 0.01 it takes 1.5 % of the
    memory of Adam's.

    Args:
      learning_rate: float or schedule, at least 0; the authors take 7e-5 for RoBERTa and 2e-4 for
        LLaMA.
      rate: share of the entries of each tensor that are trained, in (0, 1]; the authors take 0.008
        and 0.05.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, at least 0.
      weight_decay: decoupled decay, at least 0; it acts on tensors that are trained whole, and on
        trained entries only with ``decay_selected``.
      selection: ``"gradient"`` (default, the authors') trains the entries with the largest
        gradients, ``"random"`` any, ``"magnitude"`` those with the largest weights.
      warmup_gradients: number of gradients whose mean absolute values choose the entries, at least
        1 (default). They train nothing. More than one keep a copy of the parameters in the state.
      dense: which tensors are trained whole: a tree of booleans like the parameters, a prefix of
        one, or a function that returns one; ``None`` (default) means none.
      decay_selected: whether the decay acts on the trained entries; False (default) as in the
        authors' code.
      mu_dtype: dtype of the first moment; ``None`` (default) is that of the parameters.
      key: PRNG key or integer seed of ``selection="random"``.

    Returns:
      The optimizer.

    Raises:
      ValueError: an argument outside its range; in ``init``: a tensor of 2**31 entries or more.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.sift(learning_rate=0.1, rate=0.01)
      >>> params = {"w": jnp.ones((30, 10))}
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(jnp.sum(params["w"] != 1)), optax.tree.get(state, "mu")["w"].shape
      (4, (4,))

    References:
      Song et al., `Sparse is enough <https://arxiv.org/abs/2312.11875>`_, 2024.
    """
    check_learning_rate(learning_rate)
    for name, value in (("b1", b1), ("b2", b2)):
        check_number(name, value, 0, 1, open_high=True)
    check_number("eps", eps, 0)
    check_number("weight_decay", weight_decay, 0)
    check_dtype("mu_dtype", mu_dtype)
    adamw = optax.chain(
        scale_by_adam("sift", b1, b2, eps, mu_dtype=mu_dtype),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    tx = sparse_increments(
        adamw,
        rate,
        selection=selection,
        warmup_gradients=warmup_gradients,
        dense=dense,
        decay_selected=decay_selected,
        key=key,
    )
    return with_checked_init(tx, functools.partial(check_floating_leaves, method="sift"))
