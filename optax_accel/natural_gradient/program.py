"""A traced program as a flat list of steps between numbered values."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from optax_accel.natural_gradient.layouts import Shape

# A function of values, the numbers of its operands and of its results.
Step: TypeAlias = tuple[Callable[..., Sequence[Any]], tuple[int, ...], tuple[int, ...]]

# Operations without a derivative, or whose derivative is zero; so are those with integer results.
_CONSTANT = ("stop_gradient", "round", "floor", "ceil", "sign")


class Program:
    """A flat program, to which steps are appended.

    Attributes:
      avals: what is known of the values' shapes and dtypes, by number.
      steps: the program.
      constants: values that are known, by number.
      inputs: numbers of the parameters.
      outputs: numbers of the outputs' leaves, once the program is whole.
      trained: values that depend on parameters.
      data: values that depend on the data, or on other arrays that are not trained.
    """

    def __init__(self, trained: Sequence[Any], data: Sequence[Any]):
        """Starts a program.

        Args:
          trained: shapes and dtypes of the parameters.
          data: shapes and dtypes of the other arguments.
        """
        self.avals: list[Any] = []
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self.inputs, self.arguments = self._new(trained), self._new(data)
        self.outputs: tuple[int, ...] = ()
        self.trained, self.data = set(self.inputs), set(self.arguments)
        self._without_gradient: set[int] = set()  # indices of steps

    def shape(self, number: int) -> Shape:
        """The shape of a value."""
        return tuple(self.avals[number].shape)

    def add_constants(self, values: Sequence[Any]) -> tuple[int, ...]:
        """Adds arrays that the program holds, and that count as data."""
        numbers = self._new([jax.typeof(value) for value in values])
        self.constants.update(zip(numbers, values, strict=True))
        self.data.update(numbers)
        return numbers

    def add_literal(self, literal: Literal) -> int:
        """Adds a number that is written in the program."""
        (number,) = self._new([literal.aval])
        self.constants[number] = literal.val
        return number

    def add_equation(
        self, eqn: JaxprEqn, jaxpr: Jaxpr, operands: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Adds an equation of a program, as it stands, as a step."""
        results = self._new([var.aval for var in eqn.outvars])
        # A program of this one equation: the public way to evaluate equations of any kind.
        arguments = {
            var: number
            for var, number in zip(eqn.invars, operands, strict=True)
            if not isinstance(var, Literal)
        }
        single = jaxpr.replace(
            constvars=[], invars=list(arguments), outvars=eqn.outvars, eqns=[eqn]
        )
        if eqn.primitive.name in _CONSTANT or not any(map(_has_derivative, eqn.outvars)):
            self._without_gradient.add(len(self.steps))
        self.steps.append(
            (jaxpr_as_fun(ClosedJaxpr(single, ())), tuple(arguments.values()), results)
        )
        for dependent in (self.data, self.trained):
            if not dependent.isdisjoint(operands):
                dependent.update(results)
        return results

    def add_step(
        self, function: Callable[..., Sequence[Any]], operands: tuple[int, ...], aval: Any
    ) -> int:
        """Adds a value that the program itself does not compute; returns its number."""
        (number,) = self._new([aval])
        self.steps.append((function, operands, (number,)))
        return number

    def _new(self, avals: Sequence[Any]) -> tuple[int, ...]:
        self.avals.extend(avals)
        return tuple(range(len(self.avals) - len(avals), len(self.avals)))

    def readers(self) -> collections.Counter[int]:
        """How often each value is read on a way by which a gradient comes back from the outputs."""
        counts = collections.Counter(self.outputs)
        for index, (_, operands, results) in reversed(list(enumerate(self.steps))):
            if index not in self._without_gradient and any(number in counts for number in results):
                counts.update(operands)
        return counts

    def evaluate(
        self,
        leaves: Sequence[jax.Array],
        taps: dict[int, jax.Array],
        read: Collection[int],
    ) -> tuple[list[Any], dict[int, Any]]:
        """Runs the program.

        Args:
          leaves: the parameters.
          taps: zeros, by the number of the value whose gradient is theirs, too.
          read: numbers of values to return.

        Returns:
          The outputs, and the values to read by their numbers.
        """
        values = dict(self.constants)
        values.update(zip(self.inputs, leaves, strict=True))
        for function, operands, results in self.steps:
            computed = function(*(values[number] for number in operands))
            for number, value in zip(results, computed, strict=True):
                values[number] = _tap(value, taps[number]) if number in taps else value
        return [values[n] for n in self.outputs], {number: values[number] for number in read}

    def zeros(self, number: int) -> jax.Array:
        """Zeros in the shape of a value."""
        return jnp.zeros(self.shape(number), self.avals[number].dtype)


def _has_derivative(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", np.int32), jnp.inexact)


@jax.custom_vjp
def _tap(value: jax.Array, tap: jax.Array) -> jax.Array:
    """``value + tap`` at ``tap = 0``: no operation, but the gradient goes to both."""
    return value


def _tap_forward(value: jax.Array, tap: jax.Array) -> tuple[jax.Array, None]:
    return value, None


def _tap_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, gradient


_tap.defvjp(_tap_forward, _tap_backward)
