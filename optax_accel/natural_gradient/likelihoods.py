r"""The likelihood that a loss is the negative logarithm of, read off the loss's program.

A loss of the outputs z of the form

.. math::
  \sum_i w_i \log \sum_c e^{z_{ic}} + \text{(terms linear in z)},

with weights that do not depend on z, has the Hessian of a categorical likelihood with these
weights: softmax cross entropy, whatever its targets, label smoothing, masks and weights.  A sum of
weighted squares of single outputs has that of a Gaussian one, and a sum of weighted
:math:`\log(1 + e^{\pm z_i})` that of a Bernoulli one: binary cross entropy, where it is written
with JAX's ``log_sigmoid`` or ``softplus``, as Optax's is. Every value of the program is classified
by how it depends on the outputs; what fits none of the classes, such as a product of two values
that depend on them, gives no likelihood. So a likelihood is found where there is one up to
rounding, and only there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from optax_accel.natural_gradient.layouts import Shape
from optax_accel.objective import Objective

Likelihood: TypeAlias = Literal["categorical", "bernoulli", "gaussian"]

# Operations on one array that only move, select, repeat or cast its entries.
_LAYOUTS = {
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "expand_dims", "slice", "rev"),
    *("dynamic_slice", "gather", "convert_element_type", "copy", "copy_p", "reduce_precision"),
    *("sharding_constraint", "pvary", "pcast", "reshard", "mesh_cast", "optimization_barrier"),
}
_LINEAR = {"reduce_sum", "cumsum", "concatenate", "pad", "split"}
# The likelihood of a sum of terms of one kind.
_LIKELIHOODS: dict[str, Likelihood] = {
    "softmax cross entropies": "categorical",
    "binary cross entropies": "bernoulli",
    "squares": "gaussian",
}
_CALLS = ("jit", "pjit", "checkpoint", "remat", "remat2", "closed_call", "core_call")


@dataclasses.dataclass(frozen=True)
class _Value:
    """How a value depends on the outputs.

    Attributes:
      kind: ``"constant"``: not at all.  ``"stopped"``: without a derivative.  ``"affine"``: as a
        sum of linear functions, log-sum-exps and squares of outputs, with constant weights.
        ``"exponentials"`` of whole rows; ``"sums"`` of these; ``"other"``: in another way.
      rows: of an affine value, whether its last axis shows all classes of a position, up to a
        number for each position.
      entries: of an affine value, whether each of its entries is a linear function of one output.
      units: of an affine value, whether each of its entries is one output or minus one.
      terms: of an affine value, which terms are in it that are not linear.
      uniform: of a constant or stopped value, whether it is the same along its last axis.
      reason: of another one, what the outputs are used in.
    """

    kind: Literal["constant", "stopped", "affine", "exponentials", "sums", "other"]
    rows: bool = False
    entries: bool = False
    units: bool = False
    terms: frozenset[str] = frozenset()
    uniform: bool = False
    reason: str = ""


def recognize(objective: Objective, outputs: chex.ArrayTree) -> tuple[Likelihood | None, str]:
    """The likelihood of a loss, if its program shows one.

    Args:
      objective: of the parameters alone.
      outputs: of the network.

    Returns:
      ``"categorical"``, ``"bernoulli"``, ``"gaussian"`` or None; and why it is None.
    """
    leaves, treedef = jax.tree.flatten(outputs)
    if len(leaves) != 1 or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        return None, "the outputs are not one array"

    def loss(out: jax.Array) -> jax.Array:
        return objective.loss_of_outputs(jax.tree.unflatten(treedef, [out]))

    closed = jax.make_jaxpr(loss)(leaves[0])
    shape = tuple(leaves[0].shape)
    start = _Value("affine", rows=len(shape) > 1 and shape[-1] > 1, entries=True, units=True)
    (value,) = _Reader(shape).read(closed.jaxpr, [_Value("constant")] * len(closed.consts), [start])
    if value.kind == "other":
        return None, value.reason
    if value.kind != "affine" or not value.terms:
        return None, "its gradient does not depend on the outputs"
    if len(value.terms) > 1:
        return None, f"it adds up {' and '.join(sorted(value.terms))} of the outputs"
    return _LIKELIHOODS[next(iter(value.terms))], ""


class _Reader:
    """Classifies the values of a program whose argument has the given shape."""

    def __init__(self, shape: tuple[int, ...]):
        self._classes = shape[-1] if shape else 0

    def read(
        self, jaxpr: Jaxpr, constants: Sequence[_Value], arguments: Sequence[_Value]
    ) -> list[_Value]:
        """The classes of a program's results."""
        known = dict(zip(jaxpr.constvars, constants, strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def of(atom: Any) -> _Value:
            return _Value("constant") if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            operands = [of(atom) for atom in eqn.invars]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name in _CALLS and inner is not None:
                results = self._call(inner, operands)
            else:
                results = [self._result(eqn, operands, var.aval) for var in eqn.outvars]
            known.update(zip(eqn.outvars, results, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    def _call(self, inner: ClosedJaxpr | Jaxpr, operands: Sequence[_Value]) -> list[_Value]:
        if isinstance(inner, ClosedJaxpr):
            constants = [_Value("constant")] * len(inner.consts)
            return self.read(inner.jaxpr, constants, operands)
        return self.read(inner, (), operands)

    def _result(self, eqn: JaxprEqn, operands: list[_Value], aval: Any) -> _Value:
        name, kinds = eqn.primitive.name, {value.kind for value in operands}
        uniform = _is_uniform(eqn, operands, aval)
        if kinds <= {"constant"}:
            return _Value("constant", uniform=uniform)
        dtype = getattr(aval, "dtype", None)
        integer = dtype is not None and not jnp.issubdtype(dtype, jnp.inexact)
        if kinds <= {"constant", "stopped"} or name == "stop_gradient" or integer:
            return _Value("stopped", uniform=uniform)
        if "other" in kinds:
            return next(value for value in operands if value.kind == "other")
        rule = "a function with a derivative rule of its own"
        through = rule if name.startswith("custom") else f"`{name}`"
        result = self._dependent(eqn, operands, aval)
        return result or _Value("other", reason=f"it takes the outputs through {through}")

    def _dependent(self, eqn: JaxprEqn, operands: list[_Value], aval: Any) -> _Value | None:
        """The class of a result for which the derivative of an operand matters; None: another."""
        name, (first, *others) = eqn.primitive.name, operands
        rest_constant = all(value.kind == "constant" for value in others)
        if name == "custom_jvp_call":
            events = frozenset({"binary cross entropies"})
            return _Value("affine", terms=events) if first.units and _is_softplus(eqn) else None
        if name in ("add", "sub", "add_any"):
            return self._sum(eqn, operands)
        if first.kind in ("exponentials", "sums"):
            return self._of_exponentials(eqn, first, aval) if rest_constant else None
        if name == "exp":
            return _Value("exponentials") if first.rows else None
        if name in _LAYOUTS:
            if not rest_constant or jnp.issubdtype(aval.dtype, jnp.complexfloating):
                return None
            whole = first.rows and self._keeps_rows(eqn, aval)
            return dataclasses.replace(first, rows=whole)
        if name in ("mul", "div", "dot_general"):
            return self._product(eqn, operands)
        if name == "neg":
            return dataclasses.replace(first, rows=False)
        if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2):
            return _Value("affine", terms=frozenset({"squares"})) if first.entries else None
        if name == "select_n":
            return _combine(others) if first.kind == "constant" else None
        return _combine(operands) if name in _LINEAR else None

    def _sum(self, eqn: JaxprEqn, operands: list[_Value]) -> _Value | None:
        value = _combine(operands)
        dependent = [v for v in operands if v.kind == "affine"]
        if value is None or len(dependent) > 1:
            return value
        index = operands.index(dependent[0])
        (other,) = operands[:index] + operands[index + 1 :]
        atom = eqn.invars[1 - index]
        shape, (own,) = _shape(atom), dependent
        # Shifted by a number for each position, the softmax is the same.
        alike = other.uniform or not shape or shape[-1] == 1
        negative = eqn.primitive.name == "sub" and index == 1
        return dataclasses.replace(
            value,
            rows=own.rows and alike and not negative,
            entries=own.entries and other.kind == "constant",
            units=False,
        )

    def _product(self, eqn: JaxprEqn, operands: list[_Value]) -> _Value | None:
        name = eqn.primitive.name
        left, right = operands
        if name == "mul" and eqn.invars[0] is eqn.invars[1]:
            return _Value("affine", terms=frozenset({"squares"})) if left.entries else None
        own = left if name == "div" or right.kind == "constant" else right
        other = right if own is left else left
        if other.kind != "constant" or own.kind != "affine":
            return None
        return _Value("affine", entries=own.entries and name != "dot_general", terms=own.terms)

    def _of_exponentials(self, eqn: JaxprEqn, value: _Value, aval: Any) -> _Value | None:
        name = eqn.primitive.name
        if value.kind == "exponentials":
            last = len(_shape(eqn.invars[0])) - 1
            if name == "reduce_sum" and tuple(eqn.params["axes"]) == (last,):
                return _Value("sums")
            return value if name in _LAYOUTS and self._keeps_rows(eqn, aval) else None
        if name == "log":
            return _Value("affine", terms=frozenset({"softmax cross entropies"}))
        # The logarithm in `logsumexp` is one of the absolute value.
        return value if name in _LAYOUTS or name == "abs" else None

    def _keeps_rows(self, eqn: JaxprEqn, aval: Any) -> bool:
        """Whether the result's last axis shows all classes of a position, as the operand's does."""
        name, params, last = eqn.primitive.name, eqn.params, len(_shape(eqn.invars[0])) - 1
        if not aval.shape or aval.shape[-1] != self._classes:
            return False
        if name == "transpose":
            return bool(params["permutation"][-1] == last)
        if name == "broadcast_in_dim":
            return bool(params["broadcast_dimensions"][-1] == len(aval.shape) - 1)
        if name in ("squeeze", "rev"):
            return last not in params["dimensions"]
        if name == "gather":
            numbers = params["dimension_numbers"]
            return (
                params["slice_sizes"][last] == self._classes
                and last not in numbers.start_index_map
                and len(aval.shape) - 1 in numbers.offset_dims
            )
        if name == "reshape":  # the rows stay together, if nothing has been transposed
            return params.get("dimensions") is None
        return True


def _is_softplus(eqn: JaxprEqn) -> bool:
    """Whether a call is of JAX's ``logaddexp`` with 0, which `log_sigmoid` and `softplus` call."""
    if len(eqn.invars) != 2 or not isinstance(zero := eqn.invars[1], core.Literal):
        return False
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    (own,) = jax.make_jaxpr(jnp.logaddexp)(scalar, scalar).eqns
    return not np.any(zero.val) and _source(eqn) is not None and _source(eqn) == _source(own)


def _source(eqn: JaxprEqn) -> str | None:
    """The function that a call is of, with its place in a file."""
    called = getattr(eqn.params.get("call_jaxpr"), "jaxpr", None)
    return getattr(getattr(called, "debug_info", None), "func_src_info", None)


def _shape(atom: Any) -> Shape:
    """The shape of a variable or literal of a program."""
    return tuple(getattr(atom.aval, "shape", ()))


def _combine(values: Sequence[_Value]) -> _Value | None:
    """A linear function of several values."""
    if any(value.kind not in ("constant", "stopped", "affine") for value in values):
        return None
    return _Value("affine", terms=frozenset().union(*(value.terms for value in values)))


def _is_uniform(eqn: JaxprEqn, operands: Sequence[_Value], aval: Any) -> bool:
    """Whether a value is the same along its last axis."""
    shape = tuple(getattr(aval, "shape", ()))
    if not shape or shape[-1] == 1 or math.prod(shape) == 1:
        return True
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        axes = tuple(eqn.params["broadcast_dimensions"])
        if len(shape) - 1 not in axes:
            return True
        return bool(_shape(eqn.invars[0])[axes.index(len(shape) - 1)] == 1)
    return name in ("stop_gradient", "convert_element_type", "neg") and operands[0].uniform
