r"""What an optimizer divides its step by, and the curvature at which that step stops converging.

An optimizer with a diagonal preconditioner :math:`P` steps by :math:`-\eta P^{-1} m`, with the rate
:math:`\eta` and an average :math:`m` of the gradients.  While :math:`P` stands still, a quadratic
with Hessian :math:`H` then behaves like one with Hessian :math:`P^{-1/2} H P^{-1/2}` without a
preconditioner: its largest eigenvalue, the *effective sharpness*, is what the stability threshold
of the momentum has to be compared with (Cohen et al. 2022, section 2).

A :class:`Preconditioner` is the pair of both: it reads :math:`P` from the state of the optimizer
and knows the threshold.  There is one for each of the common rules of Optax; for any other rule
make your own from two functions.

With :math:`x' = x - \eta u`, curvature :math:`h` and momentum :math:`\beta`, the characteristic
polynomial of the iteration leaves the unit circle at -1, where

========================================  =========================================================
:math:`u = g`                             :math:`\eta h = 2`
:math:`u = t' = \beta t + g`              :math:`\eta h = 2 (1 + \beta)`
:math:`u = \beta t' + g` (Nesterov)       :math:`\eta h = 2 (1 + \beta) / (1 + 2 \beta)`
a mean, :math:`t' = \beta t + (1-\beta)g`  the same over :math:`1 - \beta`
========================================  =========================================================

(Cohen et al. 2021, appendix B, for the first three; 2022, equation 2, for Adam.)

References:
  Cohen, Kaur, Li, Kolter, Talwalkar, `Gradient descent on neural networks typically occurs at the
  edge of stability <https://arxiv.org/abs/2103.00065>`_, 2021; Cohen et al., `Adaptive gradient
  methods at the edge of stability <https://arxiv.org/abs/2207.14484>`_, 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from optax_accel._arguments import check_flag, check_number, check_product
from optax_accel._numerics import one_minus_power
from optax_accel.curvature._vectors import check_vector
from optax_accel.curvature.operators import CurvatureOperator

_OWN = (
    "For another rule give a Preconditioner(diagonal, threshold) of your own, whose first function "
    "reads P from the state."
)


class Preconditioner(NamedTuple):
    r"""The diagonal :math:`P` that an optimizer divides its step by, and its stability threshold.

    Attributes:
      diagonal: function ``(state, params) -> P``: from the state of the optimizer after its
        ``update``, and the parameters, the diagonal of the preconditioner of that step, positive,
        in at least float32, a pytree shaped like the parameters.  The step is the learning rate
        times :math:`P^{-1}` times the averaged gradient.  An entry that is infinite does not move.
      threshold: function ``learning_rate -> number``: the largest eigenvalue of
        :math:`P^{-1/2} H P^{-1/2}` at which the iteration still converges on a quadratic.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import Preconditioner
      >>> halved = Preconditioner(
      ...     diagonal=lambda state, params: jax.tree.map(lambda p: jnp.full(p.shape, 2.0), params),
      ...     threshold=lambda learning_rate: 2 / learning_rate,
      ... )
      >>> halved.diagonal((), jnp.ones(2)).tolist(), halved.threshold(0.5)
      ([2.0, 2.0], 4.0)
    """

    diagonal: Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree]
    threshold: Callable[[chex.Numeric], chex.Numeric]


def sgd_preconditioner(momentum: float = 0.0, nesterov: bool = False) -> Preconditioner:
    r"""The preconditioner of ``optax.sgd``: :math:`P = 1`, with the threshold of its momentum.

    The threshold is ``2 / learning_rate`` without momentum, ``2 (1 + momentum) / learning_rate``
    with it, and with Nesterov's form that over ``1 + 2 momentum`` (Cohen et al. 2021, appendix B;
    ``optax.trace`` iterates where Nesterov looks ahead, which changes no eigenvalue).

    Args:
      momentum: the decay of ``optax.trace``, in [0, 1); default 0, plain gradient descent.
      nesterov: whether ``optax.sgd`` was given ``nesterov=True``; default False.

    Returns:
      The :class:`Preconditioner`. Its ``diagonal`` raises ``ValueError`` where the state is that of
      another rule: with momentum and without an ``optax.TraceState`` of all the parameters, without
      momentum and with one, or with what an optimizer such as ``optax.adam`` scales by.

    Raises:
      ValueError, TypeError: an argument is outside its range or of the wrong type.

    Example:
      >>> from optax_accel.curvature import sgd_preconditioner
      >>> sgd_preconditioner().threshold(0.5), sgd_preconditioner(momentum=0.5).threshold(0.5)
      (4.0, 6.0)
    """
    check_number("momentum", momentum, 0, 1, open_high=True)
    check_flag("nesterov", nesterov)

    return Preconditioner(Ones(bool(momentum)), lambda rate: _stable(momentum, nesterov) / rate)


def adam_preconditioner(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    nesterov: bool = False,
) -> Preconditioner:
    r"""The preconditioner of ``optax.adam`` and of what is built on it, with bias correction.

    After ``t`` steps :math:`P = (1 - b_1^t) (\sqrt{\nu / (1 - b_2^t) + \epsilon_r} + \epsilon)`,
    because the step is :math:`\eta` times the *uncorrected* mean of the gradients over it; the
    threshold is ``(2 + 2 b1) / ((1 - b1) learning_rate)`` (Cohen et al. 2022, equation 2 and
    section 2). For ``optax.nadam`` the threshold of Nesterov's form is our reading: its mean is
    ``(1 - b1)`` times that of ``optax.trace``, so is the step; the one further power of ``b1`` in
    its bias correction is left out, which matters in the first steps only. Weight decay apart from
    the loss, as in AdamW, is not curvature of the loss, and not part of it.

    Args:
      b1: decay of the mean of the gradients, in [0, 1); default 0.9, as in Optax.
      b2: decay of the mean of their squares, in [0, 1); default 0.999, as in Optax.
      eps: what Optax adds outside of the root, at least 0; default 1e-8, as in Optax.
      eps_root: what Optax adds inside of the root, at least 0; default 0, as in Optax.
      nesterov: whether it is ``optax.nadam``; default False.

    Returns:
      The :class:`Preconditioner`. Its ``diagonal`` raises ``ValueError`` where the state has no
      ``optax.ScaleByAdamState``, or several, or one of a part of the parameters.

    Raises:
      ValueError, TypeError: an argument is outside its range or of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_accel.curvature import adam_preconditioner
      >>> tx, params = optax.adam(0.1), jnp.ones(2)
      >>> _, state = tx.update(jnp.array([2.0, 4.0]), tx.init(params), params)
      >>> adam = adam_preconditioner()  # the step is 0.1 (1 - 0.9) g / P = 0.1
      >>> [round(float(d), 4) for d in adam.diagonal(state, params)]
      [0.2, 0.4]
      >>> round(adam.threshold(0.1), 4)
      380.0
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        check_number(name, decay, 0, 1, open_high=True)
    check_number("eps", eps, 0)
    check_number("eps_root", eps_root, 0)
    check_flag("nesterov", nesterov)

    def diagonal(state: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
        adam = _only("adam_preconditioner", state, (optax.ScaleByAdamState,), "optax.adam")
        count = jnp.maximum(adam.count, 1)
        mean, squares = one_minus_power(b1, count), one_minus_power(b2, count)

        def entry(nu: jax.Array) -> jax.Array:
            root = jnp.sqrt(_wide(nu) / squares.astype(_wide(nu).dtype) + eps_root) + eps
            return mean.astype(root.dtype) * root

        return _positive("adam_preconditioner", entry, params, adam.nu)

    return Preconditioner(diagonal, lambda rate: _stable(b1, nesterov) / ((1 - b1) * rate))


def rmsprop_preconditioner(
    decay: float = 0.9,
    eps: float = 1e-8,
    *,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    bias_correction: bool = False,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Preconditioner:
    r"""The preconditioner of ``optax.rmsprop``.

    :math:`P = \sqrt{\nu + \epsilon}`, or :math:`\sqrt{\nu} + \epsilon` outside of the root, with
    :math:`\nu - \mu^2` in place of :math:`\nu` if centered. Optax's momentum comes after it, as in
    ``optax.sgd``; the threshold is that of :func:`sgd_preconditioner`.

    Args:
      decay: decay of the mean of the squared gradients, in [0, 1); default 0.9, as in Optax; used
        only with ``bias_correction``.
      eps: what Optax adds to it, at least 0; default 1e-8, as in Optax.
      eps_in_sqrt: whether it is added inside of the root; default True, as in Optax.
      centered: whether the variance takes the place of the mean square; default False.
      bias_correction: whether Optax corrects the bias of the means; default False.
      momentum: the momentum of ``optax.rmsprop``, in [0, 1); default 0, which is none.
      nesterov: whether it has Nesterov's form; default False.

    Returns:
      The :class:`Preconditioner`. Its ``diagonal`` raises ``ValueError`` where the state of
      ``optax.rmsprop`` is missing, there are several, or it is that of a part of the parameters.

    Raises:
      ValueError, TypeError: an argument is outside its range or of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_accel.curvature import rmsprop_preconditioner
      >>> tx, params = optax.rmsprop(0.1), jnp.ones(2)
      >>> _, state = tx.update(jnp.array([10.0, 20.0]), tx.init(params), params)
      >>> diagonal = rmsprop_preconditioner().diagonal(state, params)
      >>> [round(float(d), 4) for d in diagonal]  # the roots of 0.1 g**2
      [3.1623, 6.3246]
    """
    check_number("decay", decay, 0, 1, open_high=True)
    check_number("eps", eps, 0)
    check_number("momentum", momentum, 0, 1, open_high=True)
    flags = {"eps_in_sqrt": eps_in_sqrt, "centered": centered, "bias_correction": bias_correction}
    for name, flag in (flags | {"nesterov": nesterov}).items():
        check_flag(name, flag)
    # Optax does not export the states' types, so they are told by an empty one.
    kind = optax.scale_by_stddev if centered else optax.scale_by_rms
    kinds = (type(kind(bias_correction=bias_correction).init(())),)
    name = "rmsprop_preconditioner"

    def diagonal(state: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
        options = f"(centered={centered}, bias_correction={bias_correction})"
        found = _only(name, state, kinds, f"optax.rmsprop{options}")
        _check_momentum(name, "optax.rmsprop", momentum, state, params)
        weight = one_minus_power(decay, jnp.maximum(found.count, 1)) if bias_correction else 1.0

        def entry(nu: jax.Array, mu: jax.Array | None = None) -> jax.Array:
            square = _wide(nu) / jnp.asarray(weight, _wide(nu).dtype)
            if mu is not None:
                square -= (_wide(mu) / jnp.asarray(weight, square.dtype)) ** 2
            square = jnp.maximum(square, 0)
            return jnp.sqrt(square + eps) if eps_in_sqrt else jnp.sqrt(square) + eps

        moments = (found.nu, found.mu) if centered else (found.nu,)
        return _positive(name, entry, params, *moments)

    return Preconditioner(diagonal, lambda rate: _stable(momentum, nesterov) / rate)


def adagrad_preconditioner(eps: float = 1e-7) -> Preconditioner:
    r"""The preconditioner of ``optax.adagrad``: :math:`P = \sqrt{s + \epsilon}`.

    :math:`s` is the sum of all squared gradients; the threshold is ``2 / learning_rate``. Where the
    sum is 0 Optax makes no step, and :math:`P` is infinite.

    Args:
      eps: what Optax adds inside of the root, at least 0; default 1e-7, as in Optax.

    Returns:
      The :class:`Preconditioner`. Its ``diagonal`` raises ``ValueError`` where the state has no
      ``optax.ScaleByRssState``, or several, or one of a part of the parameters.

    Raises:
      ValueError, TypeError: an argument is outside its range or of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_accel.curvature import adagrad_preconditioner
      >>> tx, params = optax.adagrad(0.1, initial_accumulator_value=0.0), jnp.ones(2)
      >>> _, state = tx.update(jnp.array([2.0, 0.0]), tx.init(params), params)
      >>> adagrad_preconditioner(eps=0.0).diagonal(state, params).tolist()
      [2.0, inf]
    """
    check_number("eps", eps, 0)

    def diagonal(state: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
        found = _only("adagrad_preconditioner", state, (optax.ScaleByRssState,), "optax.adagrad")

        def entry(total: jax.Array) -> jax.Array:
            return jnp.where(total > 0, jnp.sqrt(_wide(total) + eps), jnp.inf)

        return _positive("adagrad_preconditioner", entry, params, found.sum_of_squares)

    return Preconditioner(diagonal, lambda rate: _stable(0.0, False) / rate)


def preconditioned(
    operator: Callable[[chex.ArrayTree], chex.ArrayTree], diagonal: chex.ArrayTree
) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
    r"""The operator :math:`P^{-1/2} A P^{-1/2}`, symmetric as :math:`A` is.

    It has the eigenvalues of :math:`P^{-1} A`; with its eigenvectors :math:`w`, those of
    :math:`P^{-1} A` are :math:`P^{-1/2} w`.

    Args:
      operator: the symmetric operator :math:`A`: a
        :class:`~optax_accel.curvature.CurvatureOperator` or a linear function of a pytree.
      diagonal: the diagonal of :math:`P`, positive, a pytree shaped like the vectors; infinite
        entries take their rows and columns out.

    Returns:
      A ``CurvatureOperator`` for one, else a function; for the Hessian of an
      :class:`~optax_accel.Objective` a pytree (``jax.tree_util.Partial``), as that is.

    Raises:
      TypeError: ``operator`` is not callable.
      ValueError: ``diagonal`` is not positive, where its values are known, or does not have the
        structure and shapes of the vectors, which a function shows when it is called.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_accel.curvature import preconditioned
      >>> matrix = jnp.array([[4.0, 2.0], [2.0, 9.0]])
      >>> half = preconditioned(lambda v: matrix @ v, jnp.array([4.0, 1.0]))
      >>> half(jnp.array([1.0, 0.0])).tolist()
      [1.0, 1.0]
    """
    check_product("operator", operator)
    for path, leaf in jax.tree_util.tree_leaves_with_path(diagonal):
        # By NumPy: inside of a conditional JAX traces what is done to known values, too.
        is_known = not isinstance(leaf, jax.core.Tracer) and getattr(
            leaf, "is_fully_addressable", True
        )
        if is_known and np.any(np.asarray(leaf) <= 0):
            raise ValueError(
                "`diagonal` of preconditioned must be positive, and the leaf "
                f"{jax.tree_util.keystr(path) or '(root)'} is not everywhere: where nothing "
                "moves, P is infinite."
            )
    if isinstance(operator, CurvatureOperator):
        check_vector("preconditioned, `diagonal`", operator.like, diagonal)
    factors = jax.tree.map(lambda d: 1 / jnp.sqrt(_wide(jnp.asarray(d))), diagonal)
    if isinstance(operator, CurvatureOperator):
        return _Preconditioned(operator, factors)
    if isinstance(operator, Partial):
        return Partial(_sandwich, operator, factors)
    return lambda vector: _sandwich(operator, factors, vector)


@dataclasses.dataclass(frozen=True)
class Ones:
    """The diagonal of :func:`sgd_preconditioner`: with it the preconditioned operator is itself.

    Attributes:
      has_momentum: whether the state has to hold that of ``optax.trace``.
    """

    has_momentum: bool

    def __call__(self, state: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
        """Ones, shaped like the parameters."""
        name = "sgd_preconditioner"
        if kinds := {type(node).__name__ for node in _nodes(state, _scales)}:
            fitting = _FITTING.get(min(kinds)) if len(kinds) == 1 else None
            advice = f"Use {fitting}, which reads it." if fitting else _OWN
            raise ValueError(
                f"{name} is for optimizers that scale no entry of the gradient, and the state has "
                f"{' and '.join(sorted(kinds))}. {advice}"
            )
        _check_momentum(name, "optax.sgd", self.has_momentum, state, params)
        return _ones_like(params)


class _Preconditioned(CurvatureOperator):
    """A curvature operator between two diagonal ones."""

    def __init__(self, operator: CurvatureOperator, factors: chex.ArrayTree):
        super().__init__(f"preconditioned {operator!r}", operator.like, None)
        self._operator, self._factors = operator, factors

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        return _sandwich(self._operator, self._factors, vector)

    def block(self, block: chex.ArrayTree) -> chex.ArrayTree:
        return _sandwich(self._operator.block, self._factors, block, rows=True)


def check_preconditioner(
    method: str,
    preconditioner: Preconditioner,
    state: chex.ArrayTree,
    params: chex.ArrayTree,
    rate: Any,
) -> None:
    """Raises if a preconditioner does not fit an optimizer, its parameters and its rate.

    Args:
      method: who asks, for the message.
      preconditioner: the preconditioner.
      state: the state of the optimizer.
      params: the parameters.
      rate: a learning rate; scalar.
    """
    diagonal, threshold = jax.eval_shape(
        lambda s, p, r: (preconditioner.diagonal(s, p), preconditioner.threshold(r)),
        state,
        params,
        jnp.asarray(rate, jnp.float32),
    )
    where = f"of the `preconditioner` of {method}"
    check_vector(f"`diagonal` {where}", params, diagonal, whose="the parameters")
    if getattr(threshold, "shape", None) != ():
        got = "None" if threshold is None else f"{threshold}"
        raise ValueError(f"`threshold` {where} must return one number, got {got}.")


def _sandwich(
    operator: Callable[[chex.ArrayTree], chex.ArrayTree],
    factors: chex.ArrayTree,
    vector: chex.ArrayTree,
    rows: bool = False,
) -> chex.ArrayTree:
    check_vector(
        "preconditioned, vector", factors, vector, num_axes=int(rows), whose="the `diagonal`"
    )

    def scaled(tree: chex.ArrayTree) -> chex.ArrayTree:
        def leaf(x: jax.Array, f: jax.Array) -> jax.Array:
            return x * (f[None] if rows else f).astype(x.dtype)

        return jax.tree.map(leaf, tree, factors)

    return scaled(operator(scaled(vector)))


def _stable(momentum: float, nesterov: bool) -> float:
    """Rate times curvature at which the iteration with this momentum stops converging."""
    return 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _ones_like(params: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(
        lambda p: jnp.ones_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params
    )


def _positive(
    name: str,
    entry: Callable[..., jax.Array],
    params: chex.ArrayTree,
    *moments: chex.ArrayTree,
) -> chex.ArrayTree:
    """``entry`` of the moments, leaf by leaf; infinite where it is 0, because nothing moves."""

    def leaf(*moment: jax.Array) -> jax.Array:
        value = entry(*moment)
        return jnp.where(value > 0, value, jnp.inf)

    _check_whole(name, moments[0], params)
    return jax.tree.map(leaf, *moments)


def _check_whole(name: str, moments: chex.ArrayTree, params: chex.ArrayTree) -> None:
    """Raises if the moments in a state are not those of all parameters."""
    structure: Any = jax.tree.structure(params)
    if jax.tree.structure(moments) != structure:
        raise ValueError(
            f"{name} found the state of a part of the parameters, or of others: its moments are "
            f"{jax.tree.structure(moments)}, the parameters {structure}. Inside optax.masked or "
            f"optax.partition each part has a state of its own. {_OWN}"
        )


# The states of what scales entries, by name because Optax exports few, and what fits them.
_FITTING = {
    "ScaleByAdamState": "adam_preconditioner()",
    "ScaleByRmsState": "rmsprop_preconditioner()",
    "ScaleByRmsWithCountState": "rmsprop_preconditioner(bias_correction=True)",
    "ScaleByRStdDevState": "rmsprop_preconditioner(centered=True)",
    "ScaleByRStdDevWithCountState": ("rmsprop_preconditioner(centered=True, bias_correction=True)"),
    "ScaleByRssState": "adagrad_preconditioner()",
}
# The states of what scales a step as a whole.
_NO_ENTRIES = (
    "ScaleByScheduleState",
    "ScaleByBacktrackingLinesearchState",
    "ScaleByZoomLinesearchState",
)


def _scales(node: Any) -> bool:
    """Whether a part of a state belongs to a rule that scales or turns the entries of gradients."""
    kind = type(node)
    if not kind.__module__.startswith("optax.") or kind.__name__ in _NO_ENTRIES:
        return False
    return kind.__name__.startswith("ScaleBy") or kind.__name__ in ("MuonState", "FactoredState")


def _check_momentum(
    name: str, rule: str, momentum: float, state: chex.ArrayTree, params: chex.ArrayTree
) -> None:
    """Raises if the state has no momentum that there should be, or the other way round."""
    if momentum:
        for node in _states(name, state, (optax.TraceState,), f"{rule}(momentum=...)"):
            _check_whole(name, node.trace, params)
    elif _nodes(state, lambda node: isinstance(node, optax.TraceState)):
        raise ValueError(
            f"{name} was made without momentum, and the state has a TraceState, that of momentum: "
            f"give {name} the `momentum` (and `nesterov`) of the optimizer. {_OWN}"
        )


def _nodes(state: chex.ArrayTree, is_one: Callable[[Any], bool]) -> list[Any]:
    """The parts of a state, wherever in that of a chain, that are of some kind."""
    return [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]


def _states(name: str, state: chex.ArrayTree, kinds: tuple[type, ...], rule: str) -> list[Any]:
    """The states of some types, wherever in the state of a chain; at least one."""
    found = _nodes(state, lambda node: isinstance(node, kinds))
    if not found:
        raise ValueError(
            f"{name} found no {kinds[0].__name__} in the state of the optimizer: it reads the "
            f"preconditioner of {rule}, chained or wrapped in any way. Give the preconditioner "
            f"that belongs to the optimizer. {_OWN}"
        )
    return found


def _only(name: str, state: chex.ArrayTree, kinds: tuple[type, ...], rule: str) -> Any:
    """The one state of some types in the state of a chain."""
    found = _states(name, state, kinds, rule)
    if len(found) > 1:
        raise ValueError(
            f"{name} found {len(found)} states {kinds[0].__name__} in the state of the optimizer, "
            f"and cannot tell which of them divides the step. {_OWN}"
        )
    return found[0]
