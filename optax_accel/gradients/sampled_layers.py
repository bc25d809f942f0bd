r"""Sampled products without a change of the model: in the program of an objective's ``predict``.

The program is evaluated with another rule for each product or convolution that a layer makes of its
inputs and its weights, the rule of ``optax_accel.gradients.sampled_products``.  Weights are what
depends on parameters alone, inputs what depends on data; a product of two activations (attention
scores) and one of two parameters stay exact, and so do convolutions with groups.  What is jitted,
checkpointed or scanned is looked into; ``while`` loops, conditionals and functions with a
derivative rule of the user's are evaluated as they stand.

Adelman, Levy, Hakimi, Silberstein, `Faster neural network training with approximate tensor
operations <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from optax_accel._derivatives import has_primitive
from optax_accel._extra_args import as_objective
from optax_accel._functions import argument_names
from optax_accel._masking import Mask, resolve
from optax_accel._random import as_key
from optax_accel.gradients._bilinear import convolution, dot
from optax_accel.gradients.sampled_terms import (
    Count,
    Ratio,
    Sampling,
    SamplingMethod,
    Scores,
    Uniform,
    Where,
)
from optax_accel.objective import Objective
from optax_accel.refresh import Cost, announce_cost

_PRODUCTS = ("dot_general", "conv_general_dilated")
_CALLS = ("jit", "pjit", "closed_call", "core_call")
_CHECKPOINTS = ("checkpoint", "remat", "remat2")


def sample_products(
    objective: Objective,
    ratio: Ratio | None = None,
    *,
    key: chex.PRNGKey | int | None = None,
    step: chex.Numeric | None = None,
    num_samples: Count | None = None,
    min_samples: Count = 10,
    method: SamplingMethod = "top_k",
    where: Where = "forward",
    uniform: Uniform = "1/n",
    scores: Scores = "both",
    norm_rows: int | None = None,
    mask: Mask = None,
) -> Objective:
    """The objective whose layers compute a part of the terms of their products.

    It is for training steps; the given objective stays exact, for evaluation.  Values and gradients
    are those of the sampled network.  The functions of this objective have a derivative rule of
    their own, so that second derivatives need ``hvp_mode="reverse_over_reverse"`` or
    ``"finite_difference"``.

    Args:
      objective: an :class:`~optax_accel.Objective` of ``predict`` and ``loss``.
      ratio: share of the terms that are computed in each product, in (0, 1]; give it or
        ``num_samples``. 1 is the exact product. With ``where="backward"`` a pair: for the gradient
        with respect to a layer's inputs and for that with respect to its weights, also of
        ``num_samples`` and ``min_samples``.
      key: PRNG key or integer seed; needed where something is drawn at random. Each product has a
        key of its own, derived from it, and so have the iterations of a scan, micro-batches and,
        unless ``scores="weights"``, the replicas of the objective's ``axis_name``.
      step: number of the training step, folded into the key, so that each step draws anew; an
        integer or a traced scalar. ``None`` (default): the key is new at each step already.
      num_samples: number of the terms that are computed, at least 1, in place of a share; as many
        as there are, or more, are the exact product. ``None`` (default): as ``ratio`` says.
      min_samples: the fewest terms that a ``ratio`` stands for, at least 1; 10 (default) as in the
        authors' code.
      method: ``"top_k"`` (default) computes the largest terms, deterministically and with a bias;
        ``"crs"`` draws terms with replacement and ``"bernoulli"`` each by itself, both unbiased for
        a single product.
      where: ``"forward"`` (default) computes products from the chosen terms, and the gradients of
        these alone. ``"backward"`` computes products exactly and samples their gradients, that of
        inputs over outputs and that of weights over examples. ``"forward_only"`` samples products,
        but not their gradients.
      uniform: what is mixed into the probabilities of draws, with a share of 0.1: ``"1/n"``
        (default), as in the authors' code, ``"k/n"``, which keeps the mean number of Bernoulli's
        terms, or ``None`` for nothing.
      scores: whose norms are the weights of the terms. ``"both"`` (default): of inputs and weights;
        ``"weights"``: of weights alone, so that devices with different examples choose the same
        terms, and only the rows of the gradient that belong to these are summed over devices.
      norm_rows: number of consecutive rows and columns, from a random one on, by which norms are
        estimated, at least 1; 10 in the authors' code. ``None`` (default): all.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the weights whose products are sampled. ``None`` (default) selects all;
        the authors leave the first layer and the classifier of residual networks exact.

    Returns:
      An objective of the same parameters and arguments.

    Raises:
      ValueError: the objective was built from a value function, or an argument is outside its
        range; where it is evaluated: there is no product of a selected parameter with data.
      TypeError: ``objective`` is not an Objective, or something is drawn at random, and there is no
        ``key``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> objective = oa.Objective(
      ...     predict=lambda w, x: x @ w, loss=lambda outputs: jnp.mean(outputs)
      ... )
      >>> w, x = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.ones((2, 4))
      >>> half = oa.sample_products(objective, 0.5, min_samples=1)
      >>> float(objective(w, x=x)), float(half(w, x=x))
      (10.0, 7.0)
      >>> half.grad(w, x=x)[:, 0].tolist()
      [0.0, 0.0, 1.0, 1.0]

    References:
      Adelman et al., `Faster neural network training with approximate tensor operations
      <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            "sample_products: `objective` must be an optax_accel.Objective(predict, loss), in "
            f"whose program the products are found; got {type(objective).__name__}."
        )
    if not objective.has_outputs:
        raise ValueError(
            "sample_products finds products in the program of the network, but the objective is a "
            "plain function of the parameters; build it as optax_accel.Objective(predict, loss)."
        )
    sampling = Sampling.checked(
        ratio=ratio,
        num_samples=num_samples,
        min_samples=min_samples,
        method=method,
        where=where,
        uniform=uniform,
        scores=scores,
        norm_rows=norm_rows,
    )
    if sampling.needs_key:
        if key is None:
            raise TypeError(
                f"sample_products: method={method!r} and norm_rows={norm_rows!r} draw at random: "
                "give a `key`, and the `step` for a new draw at each step."
            )
        key = as_key(key) if step is None else jax.random.fold_in(as_key(key), step)
    else:
        key = None
    return _with_sampled_predict(objective, sampling, key, mask)


class SampledProductGradientsState(NamedTuple):
    """State of :func:`sampled_product_gradients`.

    Attributes:
      count: number of updates made; int32 scalar.
      rng_key: the PRNG key given at construction; step ``t`` draws from ``fold_in(rng_key, t)``.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    rng_key: chex.PRNGKey


def sampled_product_gradients(
    ratio: Ratio | None = None,
    *,
    key: chex.PRNGKey | int = 0,
    num_samples: Count | None = None,
    min_samples: Count = 10,
    method: SamplingMethod = "top_k",
    where: Where = "forward",
    uniform: Uniform = "1/n",
    scores: Scores = "both",
    norm_rows: int | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by that of a network that computes a part of its products' terms.

    The first element of a chain, whose ``update`` needs ``value_fn``, an
    :class:`~optax_accel.Objective` of ``predict`` and ``loss``, and ``params``.  The incoming
    gradient is not used: in a jitted step that does not use it either XLA leaves its computation
    out, and with ``objective.value_and_grad`` what remains of it is the exact loss.  Evaluation
    stays exact, as nothing else sees the sampled products.

    Args:
      ratio: share of the terms that are computed in each product, in (0, 1]; give it or
        ``num_samples``. 1 is the exact gradient. With ``where="backward"`` a pair: for the gradient
        with respect to a layer's inputs and for that with respect to its weights, also of
        ``num_samples`` and ``min_samples``.
      key: PRNG key or integer seed, from which the keys of all steps and products are derived.
      num_samples: number of the terms that are computed, at least 1, in place of a share; as many
        as there are, or more, are the exact product. ``None`` (default): as ``ratio`` says.
      min_samples: the fewest terms that a ``ratio`` stands for, at least 1; 10 (default) as in the
        authors' code.
      method: ``"top_k"`` (default) computes the largest terms, deterministically and with a bias;
        ``"crs"`` draws terms with replacement and ``"bernoulli"`` each by itself, both unbiased for
        a single product.
      where: ``"forward"`` (default) computes products from the chosen terms, and the gradients of
        these alone. ``"backward"`` computes products exactly and samples their gradients, that of
        inputs over outputs and that of weights over examples. ``"forward_only"`` samples products,
        but not their gradients.
      uniform: what is mixed into the probabilities of draws, with a share of 0.1: ``"1/n"``
        (default), as in the authors' code, ``"k/n"``, which keeps the mean number of Bernoulli's
        terms, or ``None`` for nothing.
      scores: whose norms are the weights of the terms. ``"both"`` (default): of inputs and weights;
        ``"weights"``: of weights alone, so that devices with different examples choose the same
        terms.
      norm_rows: number of consecutive rows and columns, from a random one on, by which norms are
        estimated, at least 1; 10 in the authors' code. ``None`` (default): all.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the weights whose products are sampled. ``None`` (default) selects all.

    Returns:
      A transformation with state :class:`SampledProductGradientsState`.

    Raises:
      ValueError: an argument outside its range; in ``update``: missing ``value_fn`` or ``params``,
        an objective without ``predict``, or no product of a selected parameter with data.
      TypeError: ``key`` is neither a key nor an integer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> objective = oa.Objective(
      ...     predict=lambda w, x: x @ w, loss=lambda outputs: jnp.mean(outputs)
      ... )
      >>> w, x = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.ones((2, 4))
      >>> tx = optax.chain(oa.sampled_product_gradients(0.5, min_samples=1), optax.sgd(0.1))
      >>> grads = objective.grad(w, x=x)
      >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective, x=x)
      >>> [round(float(u), 2) for u in updates[:, 0]]
      [-0.0, -0.0, -0.1, -0.1]

    References:
      Adelman et al., `Faster neural network training with approximate tensor operations
      <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021.
    """
    settings: dict[str, Any] = {
        "num_samples": num_samples,
        "min_samples": min_samples,
        "method": method,
        "where": where,
        "uniform": uniform,
        "scores": scores,
        "norm_rows": norm_rows,
    }
    Sampling.checked(ratio=ratio, **settings)
    initial_key = as_key(key)

    def init_fn(params: chex.ArrayTree) -> SampledProductGradientsState:
        del params
        announce_cost(Cost("a gradient of sampled products", 1))
        # A copy, so that a donated state does not take the caller's key with it.
        return SampledProductGradientsState(jnp.zeros((), jnp.int32), jnp.copy(initial_key))

    def update_fn(
        updates: chex.ArrayTree,
        state: SampledProductGradientsState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, SampledProductGradientsState]:
        objective = as_objective(
            value_fn,
            extra_args,
            method="sampled_product_gradients",
            params=params,
            why="evaluate the network with sampled products",
            needs_outputs=True,
        )
        some = sample_products(
            objective, ratio, key=state.rng_key, step=state.count, mask=mask, **settings
        )
        gradient = some.grad(params)
        gradient = jax.tree.map(lambda g, u: g.astype(u.dtype), gradient, updates)
        return gradient, SampledProductGradientsState(
            optax.safe_increment(state.count), state.rng_key
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_sampled_predict(
    objective: Objective, sampling: Sampling, key: jax.Array | None, mask: Mask
) -> Objective:
    """The objective with another rule for the products in ``predict``."""
    axis_name = objective.axis_name

    def change(outer: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
        del has_aux  # auxiliary outputs are results like the others
        names, _, variadic = argument_names(outer)
        takes_part = variadic or "micro_batch" in names

        @functools.wraps(outer)
        def predict(params: chex.ArrayTree, **kwargs: Any) -> chex.ArrayTree:
            own = key
            if own is not None and kwargs.get("micro_batch") is not None:
                own = jax.random.fold_in(own, kwargs["micro_batch"])
            if own is not None and axis_name is not None and sampling.scores == "both":
                own = jax.random.fold_in(own, lax.axis_index(axis_name))
            if not takes_part:
                kwargs.pop("micro_batch", None)
            return _Rewriter(sampling, mask).call(outer, params, kwargs, own)

        if not takes_part:  # the objective gives an argument to those that name it
            signature = inspect.signature(outer)
            part = inspect.Parameter("micro_batch", inspect.Parameter.KEYWORD_ONLY, default=None)
            predict.__signature__ = signature.replace(  # type: ignore[attr-defined]
                parameters=[*signature.parameters.values(), part]
            )
        return predict

    return objective.with_predict(change)


class _Value(NamedTuple):
    """A value of the program.

    Attributes:
      array: the value.
      leaves: indices of the parameters that it depends on.
      data: whether it depends on anything else that is given.
    """

    array: Any
    leaves: frozenset[int] = frozenset()
    data: bool = False


class _Rewriter:
    """Evaluates a program with sampled products."""

    def __init__(self, sampling: Sampling, mask: Mask):
        self._sampling, self._mask = sampling, mask
        self._selected: list[bool] = []
        self._found = 0

    def call(
        self,
        function: Callable[..., Any],
        params: chex.ArrayTree,
        kwargs: dict[str, Any],
        key: jax.Array | None,
    ) -> Any:
        """``function(params, **kwargs)``.

        Raises:
          ValueError: no product is one of a selected parameter and data.
        """
        leaves = jax.tree.leaves(params)
        others, treedef = jax.tree.flatten(kwargs)
        traced = [hasattr(x, "shape") and not isinstance(x, np.generic) for x in others]
        arrays = [x for x, is_array in zip(others, traced, strict=True) if is_array]

        def flat(params: chex.ArrayTree, arrays: Sequence[Any]) -> Any:
            rest = iter(arrays)
            given = [
                next(rest) if is_array else x for x, is_array in zip(others, traced, strict=True)
            ]
            return function(params, **jax.tree.unflatten(treedef, given))

        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(params, arrays)
        chosen = None if self._mask is None else resolve(params, self._mask)
        self._selected = [True] * len(leaves) if chosen is None else jax.tree.leaves(chosen)
        values = [_Value(leaf, frozenset([i])) for i, leaf in enumerate(leaves)]
        values += [_Value(array, data=True) for array in arrays]
        results = self._run(closed.jaxpr, closed.consts, values, _Keys(key))
        if not self._found:
            raise ValueError(
                "sample_products found nothing to sample: in the program of `predict` there is no "
                "matrix product or convolution without groups of a parameter that `mask` selects "
                "and an array that depends on data, outside of `while` loops, conditionals and "
                "functions with a derivative rule of their own."
            )
        return jax.tree.unflatten(jax.tree.structure(shapes), [v.array for v in results])

    def _run(
        self, jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[_Value], keys: _Keys
    ) -> list[_Value]:
        values = [_Value(constant, data=True) for constant in constants]
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*values, *arguments), strict=True))

        def read(atom: Any) -> _Value:
            return _Value(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            results = self._apply(eqn, jaxpr, [read(atom) for atom in eqn.invars], keys)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(
        self, eqn: JaxprEqn, jaxpr: Jaxpr, operands: list[_Value], keys: _Keys
    ) -> list[_Value]:
        """The results of one equation."""
        name = eqn.primitive.name
        if name in _PRODUCTS and (side := self._weight(eqn, operands)) is not None:
            self._found += 1
            return [self._sampled(eqn, operands, side, keys.next())]
        inner: Any = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
        enters = any(value.leaves for value in operands) and any(value.data for value in operands)
        looked_into = name in (*_CALLS, *_CHECKPOINTS, "scan") and enters
        if looked_into and any(has_primitive(_open(inner)[0], product) for product in _PRODUCTS):
            if name == "scan":
                return self._scan(eqn, operands, keys)
            program, constants = _open(inner)
            if name in _CALLS:
                return self._run(program, constants, operands, keys)
            return self._checkpointed(eqn, program, operands, keys)
        return _joined(operands, _evaluate(eqn, jaxpr, operands))

    def _weight(self, eqn: JaxprEqn, operands: list[_Value]) -> int | None:
        """Which operand of a product is the weight of a layer; None if it is not one."""
        sides = [
            i
            for i, (value, other) in enumerate(zip(operands, reversed(operands), strict=True))
            if not value.data and other.data and any(self._selected[n] for n in value.leaves)
        ]
        if eqn.primitive.name == "conv_general_dilated":
            groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
            if groups != (1, 1) or sides != [1]:
                return None
        return sides[0] if sides else None

    def _sampled(self, eqn: JaxprEqn, operands: list[_Value], side: int, key: Any) -> _Value:
        """A product with the weight on a side."""
        a, b = operands[1 - side].array, operands[side].array
        params = {
            name: value
            for name, value in eqn.params.items()
            if name not in ("dimension_numbers", "out_sharding")
        }
        numbers, how = eqn.params["dimension_numbers"], {"sampling": self._sampling, "key": key}
        if eqn.primitive.name == "conv_general_dilated":
            strides, padding = params.pop("window_strides"), params.pop("padding")
            result = convolution(a, b, strides, padding, dimension_numbers=numbers, **how, **params)
        elif side == 1:
            result = dot(a, b, numbers, **how, **params)
        else:
            contracted, batch = numbers
            swapped = tuple(reversed(contracted)), tuple(reversed(batch))
            result = dot(a, b, swapped, **how, **params)
            first = len(batch[0])  # then the axes of a, then those of b
            middle = result.ndim - (b.ndim - len(contracted[0]) - first)
            order = [*range(first), *range(middle, result.ndim), *range(first, middle)]
            result = result.transpose(order)
        return _Value(result, operands[0].leaves | operands[1].leaves, True)

    def _checkpointed(
        self, eqn: JaxprEqn, program: Jaxpr, operands: list[_Value], keys: _Keys
    ) -> list[_Value]:
        """A program whose intermediate results are computed anew in the backward pass."""
        kinds: list[_Value] = []

        def run(arrays: list[Any], key: Any) -> list[Any]:
            given = [v._replace(array=x) for v, x in zip(operands, arrays, strict=True)]
            results = self._run(program, (), given, _Keys(key))
            kinds[:] = [v._replace(array=None) for v in results]
            return [v.array for v in results]

        again = jax.checkpoint(
            run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
        )
        arrays = again([v.array for v in operands], keys.next())
        return [kind._replace(array=x) for kind, x in zip(kinds, arrays, strict=True)]

    def _scan(self, eqn: JaxprEqn, operands: list[_Value], keys: _Keys) -> list[_Value]:
        """A loop, each of whose iterations draws anew."""
        program, constants = _open(eqn.params["jaxpr"])
        first = eqn.params["num_consts"]
        last = first + eqn.params["num_carry"]
        kinds = _as_after_many(program, [v._replace(array=None) for v in operands], first, last)
        key = keys.next()
        results: list[_Value] = []

        def body(carry: list[Any], scanned: tuple[list[Any], jax.Array]) -> tuple[Any, Any]:
            arrays = [*(v.array for v in operands[:first]), *carry, *scanned[0]]
            given = [v._replace(array=x) for v, x in zip(kinds, arrays, strict=True)]
            own = None if key is None else jax.random.fold_in(key, scanned[1])
            computed = self._run(program, constants, given, _Keys(own))
            results[:] = [v._replace(array=None) for v in computed]
            arrays = [v.array for v in computed]
            return arrays[: last - first], arrays[last - first :]

        length = eqn.params["length"]
        carry, stacked = lax.scan(
            body,
            [jnp.asarray(v.array) for v in operands[first:last]],
            ([v.array for v in operands[last:]], jnp.arange(length)),
            length,
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        return [v._replace(array=x) for v, x in zip(results, (*carry, *stacked), strict=True)]


class _Keys:
    """Hands out keys, one for each product in the order of the program; Nones from None."""

    def __init__(self, key: jax.Array | None):
        self._key, self._count = key, 0

    def next(self) -> jax.Array | None:
        self._count += 1
        return None if self._key is None else jax.random.fold_in(self._key, self._count)


def _open(program: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    if isinstance(program, ClosedJaxpr):
        return program.jaxpr, program.consts
    return program, ()


def _evaluate(eqn: JaxprEqn, jaxpr: Jaxpr, operands: list[_Value]) -> Sequence[Any]:
    """An equation as it stands."""
    # A program of this one equation: the public way to evaluate equations of any kind.
    arguments = {
        var: value.array
        for var, value in zip(eqn.invars, operands, strict=True)
        if not isinstance(var, Literal)
    }
    single = jaxpr.replace(constvars=[], invars=list(arguments), outvars=eqn.outvars, eqns=[eqn])
    return jaxpr_as_fun(ClosedJaxpr(single, ()))(*arguments.values())


def _joined(operands: Sequence[_Value], arrays: Sequence[Any]) -> list[_Value]:
    """Results that depend on what any operand depends on."""
    leaves = frozenset().union(*(value.leaves for value in operands))
    data = any(value.data for value in operands)
    return [_Value(array, leaves, data) for array in arrays]


def _as_after_many(program: Jaxpr, kinds: list[_Value], first: int, last: int) -> list[_Value]:
    """On what the inputs of a loop's body depend in the end; its carries are from first to last."""
    while True:
        env = dict(zip(program.invars, kinds, strict=True))
        env.update((var, _Value(None, data=True)) for var in program.constvars)
        for eqn in program.eqns:
            given = [env[var] for var in eqn.invars if not isinstance(var, Literal)]
            env.update(zip(eqn.outvars, _joined(given, [None] * len(eqn.outvars)), strict=True))
        after = list(kinds)
        for i, var in enumerate(program.outvars[: last - first], first):
            if not isinstance(var, Literal):
                after[i] = _joined([kinds[i], env[var]], [None])[0]
        if after == kinds:
            return kinds
        kinds = after
