r"""Curvature matrices as matrix-free symmetric operators on pytrees.

For a loss :math:`L(\theta) = \frac1n \sum_i \ell_i(\theta)`, the mean over examples, with outputs
:math:`f_i(\theta)`, their Jacobians :math:`J_i` and per-example gradients
:math:`g_i = \nabla \ell_i`:

============================  =====================================================================
:func:`hessian`               :math:`H = \nabla^2 L`
:func:`gauss_newton`          :math:`G = \frac1n \sum_i J_i^\top (\nabla_f^2 \ell_i) J_i`
:func:`functional_hessian`    :math:`H - G = \frac1n \sum_{i,c} (\partial \ell_i / \partial f_{ic})
                              \nabla^2 f_{ic}`
:func:`fisher`                :math:`\frac1n \sum_i J_i^\top F_i J_i`, :math:`F_i` the Fisher
                              information of the model's own predictive distribution
:func:`empirical_fisher`      :math:`\frac1n \sum_i g_i g_i^\top`
:func:`gradient_covariance`   :math:`\frac1n \sum_i (g_i - \bar g) (g_i - \bar g)^\top`,
                              :math:`\bar g = \nabla L`
============================  =====================================================================

Every function takes the data in one of two ways. ``**batch``: one batch in memory, as the keyword
arguments that the objective's ``predict`` and ``loss`` name; the model is linearized once, when the
operator is built, and what the linearization stores (about the activations of the batch) is kept
for all products, which then cost about a quarter less than from scratch. Inside ``jit``,
``shard_map`` or ``pmap`` this is the form to use. ``batches=``: a re-iterable of dicts of such
keyword arguments (a list, a ``grain`` data set, ...), for data larger than memory; each product is
one pass over it, linearizes each batch anew, and is the exact mean over all examples. An objective
that holds its data already needs neither, except for the last two operators.

Compiled code is kept with the objective: operators built later from the same objective, at other
parameters or on other data of the same shapes, do not compile again.

``where=`` takes the curvature of a part of the parameters, such as a layer or the matrices of LoRA,
while the loss still sees the others at their values: the matrix has the rows and columns of the
selected leaves alone. Only these are differentiated, so products cost less, and the others may be
of any dtype. In vectors, ``optax.MaskedNode`` stands in place of a leaf that is held fixed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_real_leaves
from optax_accel._derivatives import Constants, LinearFunction
from optax_accel._extra_args import check_params
from optax_accel._masking import Mask, merge, resolve, select
from optax_accel.curvature import blocks
from optax_accel.curvature._vectors import check_vector, part_of
from optax_accel.objective import Objective

Batch = Mapping[str, Any]
Batches = Iterable[Batch]


class CurvatureOperator:
    """A symmetric linear operator on pytrees like the parameters.

    Built by :func:`~optax_accel.curvature.hessian` and its siblings. Vectors may be wider than the
    parameters (float32 for bfloat16 parameters); a product has its vector's dtypes (over
    ``batches`` at least float32).

    Args:
      name: its name in messages.
      params: the parameters, whose structure, shapes and shardings the vectors have.
      linear: the operator as a linear function that is a pytree (``jax.tree_util.Partial``), or
        None if it comes in ``terms``.
      terms: function that starts a pass over linear functions and their weights; the operator is
        their weighted mean. Default: none, the operator is ``linear``.

    Attributes:
      like: structure, shapes and dtypes of the vectors, as ``jax.ShapeDtypeStruct``: those of the
        parameters, in at least float32, with their sharding over a mesh.
      dimension: number of rows and columns.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> from optax_accel import curvature
      >>> objective = oa.Objective(lambda w: w[0] * w[1], lambda f: 0.5 * (f - 5) ** 2)
      >>> operator = curvature.hessian(objective, jnp.array([2.0, 3.0]))
      >>> operator(jnp.array([1.0, 0.0])).tolist()
      [9.0, 7.0]
      >>> operator.dense().tolist()
      [[9.0, 7.0], [7.0, 4.0]]
    """

    def __init__(
        self,
        name: str,
        params: chex.ArrayTree,
        linear: LinearFunction | None,
        terms: Callable[[], Iterable[tuple[LinearFunction, float]]] | None = None,
    ):
        self.like: chex.ArrayTree = jax.tree.map(_vector_like, params)
        self.dimension: int = blocks.dimension(params)
        # Without a constraint the compiler may replicate the products of sharded vectors.
        self._shardings = shardings_of(self.like)
        self._check = functools.partial(check_vector, name, self.like)
        self._name = name
        self._linear = linear
        self._terms = terms

    def __repr__(self) -> str:
        return f"CurvatureOperator({self._name}, dimension={self.dimension})"

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        """The product with one vector, a pytree like ``like``.

        Raises:
          ValueError: the vector has another structure or other shapes.
        """
        self._check(vector)
        return self._mean(lambda linear: _product(linear, vector, self._shardings))

    def select(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """The part of a tree like the parameters that the operator acts on (``where=``).

        Args:
          tree: a gradient, an update, ..., of the structure of all parameters.

        Returns:
          A vector of the operator: ``optax.MaskedNode`` in place of what is held fixed.

        Raises:
          ValueError: the tree is not like the parameters.

        Example:
          >>> import jax.numpy as jnp
          >>> import optax_accel as oa
          >>> from optax_accel import curvature
          >>> objective = oa.Objective.from_value_fn(lambda p: jnp.sum(p["w"] ** 2) + p["b"] ** 2)
          >>> params = {"w": jnp.ones(2), "b": jnp.ones(())}
          >>> operator = curvature.hessian(objective, params, where={"w": True, "b": False})
          >>> operator.select(objective.grad(params))
          {'b': MaskedNode(), 'w': Array([2., 2.], dtype=float32)}
        """
        return part_of(self._name, self.like, tree)

    def block(self, block: chex.ArrayTree) -> chex.ArrayTree:
        """The products with every row of a block, leaves ``(k, *shape)``.

        Every batch is visited once. On a CPU the rows are taken one after the other, which is
        faster than all at once where it matters (by a quarter on 5,000 MNIST images or on a
        convolutional network: the working set of one row is smaller); on other devices and inside
        ``jit`` they are vectorized.

        Raises:
          ValueError: the rows have another structure or other shapes than ``like``.
        """
        self._check(block, num_axes=1)
        leaves = jax.tree.leaves(block)
        if not leaves or leaves[0].shape[0] == 0:
            return block
        return self._mean(lambda linear: _block_products(linear, block, self._shardings))

    def dense(self) -> jax.Array:
        """The operator as a matrix, ``(dimension, dimension)``. For tiny problems only."""
        products = jax.tree.leaves(self.block(blocks.identity(self.like)))
        columns = [leaf.reshape(self.dimension, -1) for leaf in products]
        return jnp.concatenate(columns, axis=1).T if columns else jnp.zeros((0, 0))

    def _mean(self, products: Callable[[Any], chex.ArrayTree]) -> chex.ArrayTree:
        if self._terms is not None:
            return _weighted_mean(self._name, products, self._terms())
        return products(self._linear)


# -- products ------------------------------------------------------------------------------------


Shardings = tuple[jax.NamedSharding | None, ...]


@functools.partial(jax.jit, static_argnums=2)
def _product(
    linear: LinearFunction, vector: chex.ArrayTree, shardings: Shardings
) -> chex.ArrayTree:
    return constrain(linear(vector), shardings)


def _block_products(
    linear: LinearFunction, block: chex.ArrayTree, shardings: Shardings
) -> chex.ArrayTree:
    if not _on_one_cpu((linear, block)):
        return _vectorized_products(linear, block, shardings)
    num_rows = jax.tree.leaves(block)[0].shape[0]
    return _concatenate([_row_product(linear, block, i, shardings) for i in range(num_rows)])


def _on_one_cpu(tree: chex.ArrayTree) -> bool:
    """Whether all arrays are concrete and on a single CPU device.

    On several devices, programs with collectives must not be queued: XLA may abort.
    """
    leaves = jax.tree.leaves(tree)
    return jax.default_backend() == "cpu" and not any(
        isinstance(leaf, jax.core.Tracer)
        or (isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1)
        for leaf in leaves
    )


@functools.partial(jax.jit, static_argnums=2)
def _vectorized_products(
    linear: LinearFunction, block: chex.ArrayTree, shardings: Shardings
) -> chex.ArrayTree:
    return constrain(jax.vmap(linear)(block), shardings, leading=(None,))


@functools.partial(jax.jit, static_argnums=3)
def _row_product(
    linear: LinearFunction, block: chex.ArrayTree, index: int, shardings: Shardings
) -> chex.ArrayTree:
    """The product with one row, as a block of one."""
    row = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, index, 0, keepdims=False), block)
    return blocks.as_block(constrain(linear(row), shardings))


def shardings_of(like: chex.ArrayTree) -> Shardings:
    """The sharding of each leaf, or None unless the compiler decides the shardings of its mesh.

    On a mesh with explicit axes the sharding is part of an array's type, and follows from it.
    """

    def automatic(leaf: jax.ShapeDtypeStruct) -> jax.NamedSharding | None:
        sharding, auto = leaf.sharding, jax.sharding.AxisType.Auto
        if sharding is None or any(kind != auto for kind in sharding.mesh.axis_types):
            return None
        return sharding

    return tuple(automatic(leaf) for leaf in jax.tree.leaves(like))


def constrain(
    tree: chex.ArrayTree, shardings: Shardings, leading: tuple[None, ...] = ()
) -> chex.ArrayTree:
    """A vector (or with ``leading`` a block) sharded as the parameters are."""
    leaves, treedef = jax.tree.flatten(tree)
    placed = [
        leaf
        if sharding is None
        else lax.with_sharding_constraint(
            leaf, jax.NamedSharding(sharding.mesh, jax.P(*leading, *sharding.spec))
        )
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    return jax.tree.unflatten(treedef, placed)


@jax.jit
def _concatenate(parts: list[chex.ArrayTree]) -> chex.ArrayTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@functools.partial(jax.jit, donate_argnums=0)
def _accumulate(total: chex.ArrayTree, summand: chex.ArrayTree, weight: float) -> chex.ArrayTree:
    def weigh(leaf: jax.Array) -> jax.Array:
        return weight * leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

    summand = jax.tree.map(weigh, summand)
    return summand if total is None else jax.tree.map(jnp.add, total, summand)


@functools.partial(jax.jit, donate_argnums=0)
def _scale(total: chex.ArrayTree, factor: float) -> chex.ArrayTree:
    return jax.tree.map(lambda leaf: factor * leaf, total)


def _weighted_mean(
    name: str, function: Callable[[Any], chex.ArrayTree], terms: Iterable[tuple[Any, float]]
) -> chex.ArrayTree:
    """The mean of ``function(term)`` over weighted terms, in at least float32."""
    total, unit, sum_of_weights = None, 0.0, 0.0
    for term, weight in terms:
        value = function(term)
        # At most two batches are in flight: what they store is as large as their activations.
        jax.block_until_ready(total)
        unit = unit or weight  # weights near 1 let the sum be as large as the mean may be
        total = _accumulate(total, value, weight / unit)
        sum_of_weights += weight / unit
    if total is None:
        raise ValueError(
            f"{name}: `batches` is empty; it must give at least one batch with examples (of a "
            "`weight` above 0, if the objective has one)."
        )
    return _scale(total, 1 / sum_of_weights)


# -- construction --------------------------------------------------------------------------------


def build(
    name: str,
    linearize: Callable[..., LinearFunction],
    objective: Objective,
    params: chex.ArrayTree,
    batches: Batches | None,
    where: Mask,
    batch: dict[str, Any],
    *,
    per_example: bool = False,
    centred: bool = False,
    needs_outputs: bool = False,
) -> CurvatureOperator:
    """Builds a curvature operator from an objective and its data.

    Args:
      name: name of the matrix, for messages; compiled code is kept under it.
      linearize: ``linearize(objective, params, batch)`` gives the operator of one batch as a linear
        function that is a pytree; with ``centred`` it also takes the mean gradient.
      objective: the loss.
      params: the parameters at which the curvature is taken.
      batches: data in batches; None for one batch in memory.
      where: which leaves of the parameters the operator acts on; None for all of them.
      batch: the keyword arguments of one batch in memory; empty with ``batches``.
      per_example: whether the batch must have at least one example.
      centred: whether the operator needs the mean gradient of the whole data.
      needs_outputs: whether the objective must give the outputs of the network.

    Returns:
      The operator.

    Raises:
      TypeError: ``objective`` is not an Objective, ``batches`` is not a re-iterable of dicts, an
        argument of the objective is missing, or a parameter is not real.
      ValueError: both ``batches`` and a batch were given, the data is empty, or ``where`` does not
        fit the parameters or selects none of them.
    """
    if not isinstance(objective, Objective):
        wrap = "wrap a function with Objective.from_value_fn"
        if needs_outputs:
            wrap = "it needs the network outputs, so build Objective(predict, loss)"
        raise TypeError(
            f"{name}: `objective` must be an optax_accel.Objective, got "
            f"{type(objective).__name__}; {wrap}, once, so that what is compiled for it is found "
            "again."
        )
    check_params(params, name, f"{name}(objective, params, ...)")
    chosen = _chosen_leaves(name, objective, params, where)
    part = select(params, chosen)
    advice = "leave it out with `where=`" if chosen is None else "set `where` to False there"
    check_real_leaves(part, name, advice)
    traced = _traced((params, batch))
    if chosen is not None and objective.hvp_mode == "finite_difference":
        # Their products hold a function, in which no tracer of a compiled step may stay.
        objective = objective.precompose(functools.partial(_put_back, chosen, params))
        params, chosen = part, None
    linearize = _compiled(name, linearize, objective, traced, chosen)
    gradient = _compiled("gradient", _gradient, objective, traced, chosen)

    if batches is None:
        batch = _select(name, objective, batch)
        if per_example and _count_examples(name, batch) == 0:
            raise ValueError(f"{name}: the batch must have at least one example, it has none.")
        mean = (gradient(params, batch),) if centred else ()
        return CurvatureOperator(name, part, linearize(params, batch, *mean))

    if batch:
        raise ValueError(
            f"{name}: both `batches` and a batch ({', '.join(batch)}) were given; give one of them."
        )
    if traced:
        raise ValueError(
            f"{name}: `batches` are looped over outside of jit; inside, give one batch, as "
            f"{name}(objective, params, x=x, y=y)."
        )
    _check_reiterable(name, batches)
    weighted_batches = functools.partial(_weighted_batches, name, objective, params, batches)
    mean = ()
    if centred:
        mean = (_weighted_mean(name, functools.partial(gradient, params), weighted_batches()),)

    def terms() -> Iterable[tuple[LinearFunction, float]]:
        return ((linearize(params, each, *mean), weight) for each, weight in weighted_batches())

    return CurvatureOperator(name, part, None, terms)


def _chosen_leaves(
    name: str, objective: Objective, params: chex.ArrayTree, where: Mask
) -> chex.ArrayTree | None:
    """A boolean for every leaf of the parameters, None for all of them."""
    if where is None:
        return None
    if "where" in objective.arguments[0]:
        raise TypeError(
            f"{name}: `where` selects leaves of the parameters, but this objective takes an "
            f"argument `where` of its own: give that one in `batches`, as {name}(objective, "
            "params, batches=[{'where': ...}]), or fix it first, as in objective.bind(where=...)."
        )
    chosen = resolve(params, where, "where")
    selected = jax.tree.leaves(chosen)
    if selected and not any(selected):
        raise ValueError(
            f"{name}: `where` is False for all {len(selected)} leaves of the parameters; set it to "
            "True for one of them at least."
        )
    return None if all(selected) else chosen


def _put_back(
    chosen: chex.ArrayTree, whole: chex.ArrayTree, part: chex.ArrayTree
) -> chex.ArrayTree:
    return merge(part, whole, chosen)


def _check_reiterable(name: str, batches: Any) -> None:
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name}: `batches` must be an iterable of dicts of the objective's keyword arguments, "
            f"got {type(batches).__name__}; one batch is given as **batch."
        )
    if iter(batches) is batches:
        raise TypeError(
            f"{name}: `batches` is an iterator, which gives its batches once; every product needs "
            "them anew. Give what makes the iterator: a list, a data set, an object whose "
            "__iter__ starts afresh."
        )


def _weighted_batches(
    name: str, objective: Objective, params: chex.ArrayTree, batches: Batches
) -> Iterator[tuple[Batch, float]]:
    """One pass over the batches that count, each with its weight in the mean over examples."""
    weigh = None
    if objective.has_weight:
        weigh = _compiled("weight", _weight, objective, traced=False)
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"{name}: `batches` must give dicts of the objective's keyword arguments, such "
                f"as {{'x': x, 'y': y}}, got {type(batch).__name__}."
            )
        selected = _select(name, objective, batch)
        if weigh is not None:
            weight = float(weigh(params, selected))
        else:
            weight = float(_count_examples(name, selected))
        if weight:  # an empty batch adds nothing, and its loss may be 0 / 0
            yield selected, weight


def _weight(objective: Objective, params: chex.ArrayTree, batch: Batch) -> jax.Array | None:
    del params
    return objective.batch_weight(**batch)


def _gradient(objective: Objective, params: chex.ArrayTree, batch: Batch) -> chex.ArrayTree:
    return objective.grad(params, **batch)


def _compiled(
    name: str,
    function: Callable[..., Any],
    objective: Objective,
    traced: bool,
    chosen: chex.ArrayTree | None = None,
) -> Callable[..., Any]:
    """``function`` of an objective; compiled code lives as long as the objective.

    With ``chosen`` it is the function of those leaves, the others being arguments of the program.

    Flags and strings in a batch are constants of the program, as they are without ``jit``.
    """
    whole, leaves = function, None
    if chosen is not None:
        whole = functools.partial(_of_part, function, chosen)
        leaves = (tuple(jax.tree.leaves(chosen)), jax.tree.structure(chosen))
    if traced:
        return functools.partial(whole, objective)
    cache: dict[Any, Callable[..., Any]] = vars(objective).setdefault("_compiled", {})

    def call(params: chex.ArrayTree, batch: Batch, *args: Any) -> Any:
        arrays, constants = Constants.split(batch)

        def from_arrays(params: chex.ArrayTree, arrays: list[Any], *args: Any) -> Any:
            return whole(objective, params, constants.join(arrays), *args)

        return cache.setdefault((name, leaves, constants), jax.jit(from_arrays))(
            params, arrays, *args
        )

    return call


def _of_part(
    function: Callable[..., Any],
    chosen: chex.ArrayTree,
    objective: Objective,
    params: chex.ArrayTree,
    batch: Batch,
    *args: Any,
) -> Any:
    of_part = objective.precompose(functools.partial(_put_back, chosen, params))
    return function(of_part, select(params, chosen), batch, *args)


def has_axis(leaf: Any) -> bool:
    """Whether a leaf of a batch has an axis of examples."""
    return len(getattr(leaf, "shape", ())) > 0


def _select(name: str, objective: Objective, batch: Batch) -> dict[str, Any]:
    """The keyword arguments that the objective takes; raises if it needs one that is missing."""
    names, required, variadic = objective.arguments
    missing = [arg for arg in required if arg not in batch]
    if missing:
        raise TypeError(
            f"{name}: the objective takes the arguments {sorted(set(missing))}, which were not "
            f"given; pass them as {name}(objective, params, {missing[0]}=...) or in `batches`."
        )
    return {arg: batch[arg] for arg in batch if variadic or arg in names}


def _count_examples(name: str, batch: Batch) -> int:
    """The length of the leading axis of a batch's leaves."""
    shapes = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        if has_axis(leaf)
    }
    sizes = {shape[0] for shape in shapes.values()}
    if not sizes:
        raise ValueError(
            f"{name} needs data with a leading axis of examples, as keyword arguments of the "
            "objective: an objective that holds its data, or a batch of scalars, has none."
        )
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: the arguments of a batch must have the same leading axis of examples, got "
            f"the shapes {shapes}; bind other arguments first (objective.bind)."
        )
    return sizes.pop()


def _traced(tree: chex.ArrayTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _vector_like(leaf: Any) -> jax.ShapeDtypeStruct:
    shape = shape_of(leaf)
    return shape.update(dtype=jnp.promote_types(leaf.dtype, jnp.float32))


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and, over a mesh, sharding of an array."""
    sharding = None if _traced(leaf) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        sharding = None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
