"""A traced program as a flat list of steps between numbered values."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from optax_accel._mesh_axes import filled_like
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
      names: of the operations that the steps are, empty for steps that are not in the program.
      loops: steps that are loops which are looked into, by their index.
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
        self.names: list[str] = []
        self.loops: dict[int, Loop] = {}
        self.constants: dict[int, Any] = {}
        self.inputs, self.arguments = self._new(trained), self._new(data)
        self.outputs: tuple[int, ...] = ()
        self.trained, self.data = set(self.inputs), set(self.arguments)
        self._without_gradient: set[int] = set()  # indices of steps
        # Integers that are computed alike have one number (the first), by how they are computed.
        self._first: dict[int, int] = {}
        self._integers: dict[tuple[Any, ...], int] = {}

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
        self.names.append(eqn.primitive.name)
        for dependent in (self.data, self.trained):
            if not dependent.isdisjoint(operands):
                dependent.update(results)
        if all(map(self._is_integer, results)):
            self._note_integers(eqn, operands, results)
        return results

    def _is_integer(self, number: int) -> bool:
        dtype = getattr(self.avals[number], "dtype", np.float32)
        integer = any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_))
        return integer and math.prod(self.shape(number)) == 1

    def _note_integers(
        self, eqn: JaxprEqn, operands: tuple[int, ...], results: tuple[int, ...]
    ) -> None:
        """Remembers how integers, of which indices are made, are computed; and known ones."""
        how = eqn.primitive.name, str(eqn.params), tuple(map(self._identity, operands))
        for i, number in enumerate(results):
            self._first[number] = self._integers.setdefault((*how, i), number)
        function, arguments, _ = self.steps[-1]
        known: list[Any] = [self.known_integer(number) for number in arguments]
        if eqn.primitive.name in ("pvary", "pcast"):  # the same number, on every replica
            same = zip(results, map(self.known_integer, operands), strict=True)
            self.constants.update((n, value) for n, value in same if value is not None)
        elif None not in known and eqn.primitive.name != "axis_index":
            with jax.ensure_compile_time_eval():
                avals = [self.avals[number] for number in arguments]
                pairs = zip(known, avals, strict=True)
                values = function(*(jnp.full(aval.shape, n, aval.dtype) for n, aval in pairs))
            self.constants.update(zip(results, values, strict=True))

    def _identity(self, number: int) -> tuple[str, int]:
        known = self.known_integer(number)
        return ("", self._first.get(number, number)) if known is None else ("known", known)

    def same_integer(self, one: int, other: int) -> bool:
        """Whether two single integers are the same number, or are computed in the same way."""
        return self._identity(one) == self._identity(other)

    def known_integer(self, number: int) -> int | None:
        """A single integer or flag, where it does not depend on arguments; else None."""
        value = self.constants.get(number)
        if value is None or isinstance(value, jax.core.Tracer) or not self._is_integer(number):
            return None
        return int(np.asarray(value).item())

    def add_loop(
        self, loop: Loop, operands: tuple[int, ...], avals: Sequence[Any]
    ) -> tuple[int, ...]:
        """Adds a loop as a step."""
        results = self._new(avals)
        self.loops[len(self.steps)] = loop
        self.steps.append((loop.run, operands, results))
        self.names.append("scan")
        for inside, dependent in ((loop.body.data, self.data), (loop.body.trained, self.trained)):
            computed = zip(results, loop.body.outputs, strict=True)
            dependent.update(number for number, inner in computed if inner in inside)
        return results

    def of_all_iterations(self, loop: Loop, number: int) -> int:
        """The number of an array of what a value in a loop is in every iteration."""
        if number not in loop.stacked:
            aval = loop.body.avals[number]
            shape = (loop.length, *aval.shape)
            (loop.stacked[number],) = self._new([jax.ShapeDtypeStruct(shape, aval.dtype)])
        return loop.stacked[number]

    def add_step(
        self, function: Callable[..., Sequence[Any]], operands: tuple[int, ...], aval: Any
    ) -> int:
        """Adds a value that the program itself does not compute; returns its number."""
        (number,) = self._new([aval])
        self.steps.append((function, operands, (number,)))
        self.names.append("")
        return number

    def _new(self, avals: Sequence[Any]) -> tuple[int, ...]:
        self.avals.extend(avals)
        return tuple(range(len(self.avals) - len(avals), len(self.avals)))

    def last_has_derivative(self) -> bool:
        """Whether a gradient comes back through the last step."""
        return len(self.steps) - 1 not in self._without_gradient

    def readers(self, outputs: Sequence[int] | None = None) -> collections.Counter[int]:
        """How often each value is read on a way by which a gradient comes back from the outputs.

        Args:
          outputs: numbers of those that count; None for all of the program's.
        """
        counts = collections.Counter(self.outputs if outputs is None else outputs)
        for index, (_, operands, results) in reversed(list(enumerate(self.steps))):
            if index in self._without_gradient or not any(number in counts for number in results):
                continue
            if (loop := self.loops.get(index)) is None:
                counts.update(operands)
                continue
            inside = loop.readers([i for i, number in enumerate(results) if number in counts])
            pairs = zip(operands, loop.body.inputs, strict=True)
            counts.update(number for number, inner in pairs if inner in inside)
            counts.update({n: inside[i] for i, n in loop.stacked.items() if i in inside})
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
        for index, (function, operands, results) in enumerate(self.steps):
            arguments = [values[number] for number in operands]
            if index in self.loops:
                computed, inside = self.loops[index].evaluate(arguments, taps, read)
                values.update(inside)
            else:
                computed = list(function(*arguments))
            for number, value in zip(results, computed, strict=True):
                values[number] = _tap(value, taps[number]) if number in taps else value
        return [values[n] for n in self.outputs], {number: values[number] for number in read}

    def function_of_inputs(self, number: int) -> Callable[[Sequence[Any]], Any]:
        """A value that depends on parameters alone, as a function of all of them."""
        needed, steps = {number}, list[Step]()
        for step in reversed(self.steps):
            if not needed.isdisjoint(step[2]):
                needed.update(step[1])
                steps.insert(0, step)
        constants = {n: value for n, value in self.constants.items() if n in needed}
        inputs = self.inputs

        def function(leaves: Sequence[Any]) -> Any:
            values = constants | dict(zip(inputs, leaves, strict=True))
            for compute, operands, results in steps:
                values.update(zip(results, compute(*(values[n] for n in operands)), strict=True))
            return values[number]

        return function

    def zeros(self, number: int) -> jax.Array:
        """Zeros in the shape of a value."""
        aval = self.avals[number]
        return filled_like(jnp.zeros((), aval.dtype), aval)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A ``lax.scan`` that is looked into.

    Attributes:
      body: the program of one iteration; its inputs are constants, carries and slices of what is
        scanned, its outputs carries and slices of what is stacked.
      num_constants: how many of the inputs are the same in all iterations.
      num_carries: how many are handed on from one iteration to the next.
      length: the number of iterations.
      settings: further arguments of ``lax.scan``.
      stacked: for numbers of values in the body the numbers, in the program around the loop, of the
        arrays of their values in all iterations.
    """

    body: Program
    num_constants: int
    num_carries: int
    length: int
    settings: dict[str, Any]
    stacked: dict[int, int] = dataclasses.field(default_factory=dict)

    def run(self, *arguments: Any) -> list[Any]:
        """The results of the loop alone."""
        return self.evaluate(arguments, {}, ())[0]

    def evaluate(
        self, arguments: Sequence[Any], taps: dict[int, jax.Array], read: Collection[int]
    ) -> tuple[list[Any], dict[int, Any]]:
        """Runs the loop; arguments and results are those of :meth:`Program.evaluate`.

        Taps and values to read are numbered as around the loop, and have a leading axis of
        iterations: they are scanned, as the loop's own inputs and outputs are.
        """
        inner_taps = {i: taps[n] for i, n in self.stacked.items() if n in taps}
        inner_read = [i for i, n in self.stacked.items() if n in read]
        first, last = self.num_constants, self.num_constants + self.num_carries
        constants, carries, scanned = arguments[:first], arguments[first:last], arguments[last:]

        def body(carries: Any, slices: Any) -> tuple[Any, Any]:
            scanned, taps = slices
            results, values = self.body.evaluate([*constants, *carries, *scanned], taps, inner_read)
            return results[: self.num_carries], (results[self.num_carries :], values)

        start = [
            value if isinstance(value, jax.Array) else jnp.asarray(value, self.body.avals[n].dtype)
            for value, n in zip(carries, self.body.inputs[first:last], strict=True)
        ]
        carries, (results, values) = lax.scan(
            body, start, (list(scanned), inner_taps), self.length, **self.settings
        )
        return [*carries, *results], {self.stacked[i]: value for i, value in values.items()}

    def readers(self, results: Sequence[int]) -> collections.Counter[int]:
        """How often values of the body are read on the way to results of the loop."""
        read = set(results)
        while True:
            inside = self.body.readers([self.body.outputs[i] for i in sorted(read)])
            carries = self.body.inputs[self.num_constants :][: self.num_carries]
            before = {i for i, number in enumerate(carries) if number in inside}
            if before <= read:
                return inside
            read |= before


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
