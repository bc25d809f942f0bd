"""Parameters followed through a program, to the layers that use them.

A parameter is followed through operations that only lay it out (reshape, transpose, broadcast,
casts, one slice) to what uses it.  What is jitted, checkpointed or scanned is looked into where a
parameter enters it; ``while`` loops and conditionals are not, nor is what has a derivative rule of
the user's (``jax.custom_jvp``, ``jax.custom_vjp``): what is inside says nothing about the
derivative.  A rule that passes the gradient to the parameter as it is (a straight-through
estimator) is followed as a layout is.

Sums and matrix products of two parameters, and products of one with a fixed matrix, are followed as
if they were parameters (``optax_accel.natural_gradient.effective``).

In ``lax.scan`` a parameter is either the same in all iterations, which then are further positions
of its layer, or scanned, so that each iteration uses a slice of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from optax_accel.natural_gradient.effective import Computed, Product, Sum, Weight, expand, views_of
from optax_accel.natural_gradient.examples import (
    NOWHERE,
    Places,
    of_iteration,
    of_outputs,
    trace_back,
)
from optax_accel.natural_gradient.layers import Use
from optax_accel.natural_gradient.layouts import Ops, Shape, View
from optax_accel.natural_gradient.lifting import lift
from optax_accel.natural_gradient.matching import DIFFERENT_FACTORS, RULES, Values
from optax_accel.natural_gradient.program import Loop, Program

# Call-like primitives, which have the derivative of the program they run, and the parameter that
# holds it.
_CALLS = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat", "remat2"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call"), "call_jaxpr"),
}
# Operations that have a derivative rule of the user's.
_DERIVATIVE_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin")
# Why a parameter that enters one of these operations has no layer there.
_REASONS = {
    **dict.fromkeys(("while", "cond"), "whose inside is not looked into"),
    "scan": "which changes it from one iteration to the next",
    **dict.fromkeys(_DERIVATIVE_RULES, "which has a derivative rule of its own"),
    **dict.fromkeys(
        ("slice", "dynamic_slice", "split", "unstack"),
        "which takes a part of it that is not one slice",
    ),
}
_UNUSED_PRODUCT = "is multiplied by a parameter, and no layer takes the product as a whole"
_PRODUCT_IN_LOOP = "is multiplied by a parameter inside of a loop, where products are not followed"


class Refusal(NamedTuple):
    """A parameter that a step takes in another way than a layer.

    Attributes:
      leaf: index of the parameter.
      results: numbers of the values that the step computes.
      reason: what is said of it in the report.
    """

    leaf: int
    results: tuple[int, ...]
    reason: str


class Follower:
    """Flattens a program and follows the parameters through it.

    Attributes:
      program: the flat program.
      uses: what could be layers, in the order of the program.
      biases: for the index of a use the vectors that may be its bias: the index of the use in which
        the vector is added, and the operations from it to a vector of outputs.
      outputs: values that are the output of a layer, or that in another layout: the index of its
        use, and for each axis its place among the layer's channels, or None.
      refusals: what is not a layer.
      weights: what is computed from parameters and counts as further ones.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        program: Program,
        views: dict[int, View],
        num_examples: int,
        examples: Sequence[Places],
        depth: int = 0,
    ):
        """Follows all parameters to the end.

        Args:
          closed: the program.
          program: the flat one, which has no steps yet.
          views: those of its inputs that are parameters, or parts of them.
          num_examples: the leading axis of the outputs of the network.
          examples: where the examples are in the program's outputs.
          depth: how many loops there are around the program.
        """
        self.program = program
        self.uses: list[Use] = []
        self.biases: dict[int, list[tuple[int, Ops]]] = {}
        self.outputs: dict[int, tuple[int, tuple[int | None, ...]]] = {}
        self.refusals: list[Refusal] = []
        self._views, self._depth = views, depth
        self.weights: list[Weight] = []
        self._values = Values(program, num_examples, views)
        constants = program.add_constants(closed.consts)
        program.outputs = self._inline(
            closed.jaxpr, constants, (*program.inputs, *program.arguments), examples
        )

    def _inline(
        self,
        jaxpr: Jaxpr,
        constants: Sequence[int],
        arguments: Sequence[int],
        examples: Sequence[Places],
    ) -> tuple[int, ...]:
        """Appends the steps of a program; returns the numbers of its results.

        Args:
          jaxpr: the program.
          constants: numbers of those that it holds.
          arguments: numbers of its arguments.
          examples: where the examples are in its outputs.
        """
        places = trace_back(jaxpr, examples)
        env = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def number_of(atom: Any) -> int:
            return self.program.add_literal(atom) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(map(number_of, eqn.invars))
            reached = [places.get(var, NOWHERE) for var in eqn.outvars]
            inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
            if inner is not None and any(number in self._views for number in operands):
                inner_constants: tuple[int, ...] = ()
                if isinstance(inner, ClosedJaxpr):
                    inner_constants, inner = self.program.add_constants(inner.consts), inner.jaxpr
                results = self._inline(inner, inner_constants, operands, reached)
            elif eqn.primitive.name == "scan" and any(n in self._views for n in operands):
                results = self._follow_loop(eqn, operands, reached)
            else:
                results = self.program.add_equation(eqn, jaxpr, operands)
                self._values.examples.update(zip(results, reached, strict=True))
                self._follow(eqn, operands, results)
            env.update(zip(eqn.outvars, results, strict=True))
        return tuple(number_of(atom) for atom in jaxpr.outvars)

    def _follow(self, eqn: JaxprEqn, operands: tuple[int, ...], results: tuple[int, ...]) -> None:
        """Follows the parameters among the operands of the last step, or notes why it cannot."""
        name = eqn.primitive.name
        result = results[0] if results else -1
        if len(operands) == 1:
            self._follow_output(eqn, operands[0], result)
        views = [number for number in operands if number in self._views]
        condition = self._condition(name, views, results)
        if len(views) == len(operands) == 2 and self._combine(eqn, operands, result, condition):
            return
        if len(views) == 1:
            if name in RULES:
                use = RULES[name](self._values, eqn, operands, result)
                view = self._views[views[0]]
                if view.coefficient is not None and self._depth:
                    use = "is scaled inside of a loop"
                condition = use if isinstance(use, str) else condition
                followed = not isinstance(use, str) and self._add_layer(use, view)
                if not followed and name == "dot_general":
                    followed = self._combine(eqn, operands, result, condition)
                if not followed and name == "gather":
                    followed = self._follow_gather(eqn, operands, result)
            elif name in ("mul", "div", "add", "add_any", "sub"):
                followed = self._follow_elementwise(eqn, operands, result)
            elif name in _DERIVATIVE_RULES:
                followed = self._follow_rule(eqn, views[0], result)
            elif name in ("dynamic_slice", "unstack", "split"):
                followed = self._follow_slices(eqn, operands, results)
            else:
                followed = len(operands) == 1 and self._follow_layout(eqn, views[0], result)
            if followed:
                return
        if self._compute(name, views, results, condition):
            return
        for number in views:  # without a derivative nothing is used
            self.refuse(number, results if self.program.last_has_derivative() else (), condition)

    def _compute(
        self, name: str, views: Sequence[int], results: tuple[int, ...], condition: str
    ) -> bool:
        """Another function of parameters alone, which then counts as a parameter."""
        program = self.program
        if not views or self._depth or len(results) != 1 or name in _REASONS:
            return False
        if not program.last_has_derivative():
            return False
        (result,) = results
        if result in program.data:
            return False
        inputs = tuple(self._views[number] for number in views)
        leaf = len(program.inputs) + len(self.weights)
        self.weights.append(Computed(inputs, result, condition))
        self._views[result] = _whole(leaf, program.shape(result))
        return True

    def parameters_of(self, leaf: int) -> set[int]:
        """Indices of the parameters that one is computed from."""
        count = len(self.program.inputs)
        if leaf < count:
            return {leaf}
        views = views_of(self.weights[leaf - count])
        return set().union(*(self.parameters_of(view.leaf) for view in views))

    def _condition(self, name: str, views: Sequence[int], results: tuple[int, ...]) -> str:
        """What is said of parameters that an operation takes in another way than a layer."""
        if name in _REASONS:
            return f"is used by `{name}`, {_REASONS[name]}"
        if len(views) > 1 and len({self._views[number].leaf for number in views}) == 1:
            return "is combined with itself"
        if name == "dot_general" and len(views) > 1:
            return _PRODUCT_IN_LOOP if self._depth else _UNUSED_PRODUCT
        if any(number in self.program.data for number in results):
            if not any(self._values.examples.get(number) for number in results):
                return f"is combined by `{name}` with an array without an axis over the examples"
            return f"is combined with activations by `{name}`"
        if name in ("mul", "div") and len(views) > 1:
            return "is multiplied or divided entry by entry by a parameter"
        return (
            f"is changed by `{name}`, but only layouts, sums, matrix products and scalar factors "
            "of parameters are followed"
        )

    def refuse(self, number: int, results: tuple[int, ...], reason: str) -> None:
        """Notes that a value, if it is a parameter, is used in another way than by a layer."""
        if number in self._views:
            self.refusals.append(Refusal(self._views[number].leaf, results, reason))

    def _follow_rule(self, eqn: JaxprEqn, number: int, result: int) -> bool:
        """Follows a parameter through a rule that passes the gradient to it as it is."""
        avals = self.program.avals
        old, new = avals[number], avals[result]
        if len(eqn.outvars) != 1 or (old.shape, old.dtype) != (new.shape, new.dtype):
            return False
        function, arguments, _ = self.program.steps[-1]
        index = arguments.index(number)

        def pull(gradient: jax.Array, *values: jax.Array) -> jax.Array:
            def of_parameter(value: jax.Array) -> jax.Array:
                return function(*values[:index], value, *values[index + 1 :])[0]

            return jax.vjp(of_parameter, values[index])[1](gradient)[0]

        traced = jax.make_jaxpr(pull)(new, *(avals[n] for n in arguments)).jaxpr
        if traced.outvars[0] is not traced.invars[0]:
            return False
        self._views[result] = self._views[number]
        return True

    def _follow_layout(self, eqn: JaxprEqn, number: int, result: int) -> bool:
        shapes = self.program.shape(number), self.program.shape(result)
        view = self._views[number].follow(eqn, *shapes)
        if view is None:
            return False
        if view.coefficient is not None:  # the same is done to the coefficient
            function = self.program.steps[-1][0]
            moved = self.program.add_step(function, (view.coefficient,), self.program.avals[result])
            view = dataclasses.replace(view, coefficient=moved)
        self._views[result] = view
        return True

    def _follow_slices(
        self, eqn: JaxprEqn, operands: tuple[int, ...], results: tuple[int, ...]
    ) -> bool:
        """Follows a parameter to its slices along one axis."""
        (number, *starts), program = operands, self.program
        view, old, new = self._views[number], program.shape(number), program.shape(results[0])
        if eqn.primitive.name == "dynamic_slice":
            part = [i for i in range(len(old)) if old[i] != new[i]]
            if len(part) != 1 or new[part[0]] != 1:
                return False
            slices = [self._slice(view, part[0], starts[part[0]])]
        else:
            axis = eqn.params["axis"]
            if len(results) != old[axis]:
                return False
            slices = [view.slice(axis, position) for position in range(old[axis])]
            if len(new) < len(old):
                slices = [one and one.without(axis) for one in slices]
        for result, one in zip(results, slices, strict=True):
            if one is None:
                return False
            self._views[result] = one
        return True

    def _follow_gather(self, eqn: JaxprEqn, operands: tuple[int, ...], result: int) -> bool:
        """Follows a parameter to the slice at one position."""
        number, position = operands
        numbers, old = eqn.params["dimension_numbers"], self.program.shape(number)
        if self.program.shape(position) != (1,) or len(numbers.collapsed_slice_dims) != 1:
            return False
        (axis,) = numbers.collapsed_slice_dims
        whole = tuple(1 if i == axis else size for i, size in enumerate(old))
        if tuple(numbers.start_index_map) != (axis,) or tuple(eqn.params["slice_sizes"]) != whole:
            return False
        if (view := self._slice(self._views[number], axis, position)) is None:
            return False
        self._views[result] = view.without(axis)
        return True

    def _slice(self, view: View, axis: int, number: int) -> View | None:
        """The view of the slice whose position is a value."""
        position = self.program.known_integer(number)
        if position is None:
            return view.slice(axis, None, number)
        shown = view.axes[axis]
        size = 1 if shown is None else view.core[shown]
        return view.slice(axis, min(max(position, 0), size - 1))

    # -- loops ------------------------------------------------------------------------------------

    def _follow_loop(
        self, eqn: JaxprEqn, operands: tuple[int, ...], examples: Sequence[Places]
    ) -> tuple[int, ...]:
        """Follows parameters through a ``scan``; returns the numbers of its results."""
        program, params = self.program, eqn.params
        first, count = params["num_consts"], params["num_carry"]
        views: dict[int, View] = {}
        refused = []
        for i, number in enumerate(operands):
            if (view := self._views.get(number)) is None:
                continue
            if first <= i < first + count:
                refused.append((number, f"is used by `scan`, {_REASONS['scan']}"))
            elif view.coefficient is not None:
                refused.append((number, "is scaled before a `scan` takes it"))
            else:
                views[i] = view if i < first else view.iteration(self._depth + 1)
        inner = self._follow_body(eqn, operands, views, of_iteration(eqn, examples))
        settings = {name: params[name] for name in ("reverse", "unroll")}
        loop = Loop(inner.program, first, count, params["length"], settings)
        results = program.add_loop(loop, operands, [var.aval for var in eqn.outvars])
        for number, reason in refused:
            self.refuse(number, results, reason)
        self._take_over(inner, loop)
        self._follow_results(inner, loop, operands, results)
        return results

    def _follow_results(
        self, inner: Follower, loop: Loop, operands: tuple[int, ...], results: tuple[int, ...]
    ) -> None:
        """Follows parameters that a loop gives back, as modules do with all of their state."""
        body, carries = loop.body, loop.num_constants + loop.num_carries
        for i, (number, result) in enumerate(zip(body.outputs, results, strict=True)):
            if number in body.inputs[carries:] and i >= loop.num_carries:
                if (view := self._views.get(operands[body.inputs.index(number)])) is not None:
                    self._views[result] = view
            elif number in inner._views:
                read = [result]
                if i < loop.num_carries:  # perhaps by the next iteration alone
                    before = body.inputs[loop.num_constants + i]
                    read.append(self.program.of_all_iterations(loop, before))
                reason = "is given back by a `scan` in another layout"
                self.refusals.append(Refusal(inner._views[number].leaf, tuple(read), reason))

    def _follow_body(
        self,
        eqn: JaxprEqn,
        operands: tuple[int, ...],
        views: dict[int, View],
        examples: Sequence[Places],
    ) -> Follower:
        """Follows parameters through one iteration, as it is after many."""
        closed, num_examples = eqn.params["jaxpr"], self._values.num_examples
        num_constants, num_carries = eqn.params["num_consts"], eqn.params["num_carry"]
        outer, avals = self.program, [var.aval for var in closed.jaxpr.invars]
        trained = {i for i, number in enumerate(operands) if number in outer.trained}
        data = {i for i, number in enumerate(operands) if number in outer.data}
        known = {
            i: outer.constants[n]
            for i, n in enumerate(operands[:num_constants])
            if outer.known_integer(n) is not None
        }
        while True:
            body = Program(avals, ())
            body.trained, body.data = set(trained), set(data)
            body.constants.update(known)
            depth = self._depth + 1
            inner = Follower(closed, body, dict(views), num_examples, examples, depth)
            # A carry depends on what it depended on in the iteration before.
            carries = list(enumerate(body.outputs[:num_carries], num_constants))
            found = [{i for i, n in carries if n in some} for some in (body.trained, body.data)]
            if found[0] <= trained and found[1] <= data:
                break
            trained |= found[0]
            data |= found[1]
        return inner

    def _take_over(self, inner: Follower, loop: Loop) -> None:
        """Adds what is found in the body of a loop, as seen from around it."""
        program, offset = self.program, len(self.uses)
        for use in inner.uses:
            lifted = lift(use, program, loop, self._depth + 1)
            if lifted is None:
                reason = "is indexed by a number that changes in the loop that scans it"
                inner.refusals.append(Refusal(use.leaf, (use.output,), reason))
                output = program.of_all_iterations(loop, use.output)
                lifted = dataclasses.replace(use, output=output)
            self.uses.append(lifted)
        for index, shifts in inner.biases.items():
            self.biases[offset + index] = [(offset + shift, ops) for shift, ops in shifts]
        for number, (index, _) in inner.outputs.items():
            self.outputs[program.of_all_iterations(loop, number)] = offset + index, ()
        for refusal in inner.refusals:
            numbers = tuple(program.of_all_iterations(loop, n) for n in refusal.results)
            self.refusals.append(refusal._replace(results=numbers))

    # -- layers -----------------------------------------------------------------------------------

    def _follow_output(self, eqn: JaxprEqn, number: int, result: int) -> None:
        """Follows the output of a layer, which a bias may be added to, through layouts."""
        if number not in self.outputs:
            return
        index, axes = self.outputs[number]
        old, new = self.program.shape(number), self.program.shape(result)
        moved = _whole(-1, old).follow(eqn, old, new)
        if moved is not None and not moved.ops and math.prod(old) == math.prod(new):
            self.outputs[result] = index, tuple(None if i is None else axes[i] for i in moved.axes)

    def _add_layer(self, use: Use, view: View) -> bool:
        if view.coefficient is not None and self._depth:
            return False
        scales = () if view.coefficient is None else (view.coefficient,)
        use = dataclasses.replace(use, slot=view.slot, loops=view.loops, scales=scales)
        rank = len(self.program.shape(use.output))
        order = {axis: i for i, axis in enumerate((*use.output_stack, *use.channels))}
        self.outputs[use.output] = len(self.uses), tuple(order.get(i) for i in range(rank))
        self.uses.append(use)
        self.program.data.add(use.output)
        return True

    def _follow_elementwise(self, eqn: JaxprEqn, operands: tuple[int, ...], result: int) -> bool:
        """A scale or shift of an activation; or a parameter that is still one when it is scaled."""
        side = int(operands[1] in self._views)
        number, other = operands[side], operands[1 - side]
        view = self._views[number]
        old, new = self.program.shape(number), self.program.shape(result)
        quotient = eqn.primitive.name == "div"
        product = eqn.primitive.name == "mul" or quotient
        sign = -1 if eqn.primitive.name == "sub" and side == 1 else 1
        repeated = old != new or view.repeats(old) or self._values.num_examples == 1
        if other not in self.program.data or not repeated:
            if old != new or sign < 0 or (quotient and side == 1):
                return False
            if quotient:
                other = self.program.add_step(_reciprocal, (other,), self.program.avals[other])
            self._views[result] = self._scaled(view, other, result) if product else view
            return True
        if quotient:
            return False
        shown = [i for i, axis in enumerate(view.axes) if axis is not None and old[i] == new[i]]
        rows = [i for i in range(len(new)) if i not in shown]
        part = self._values.example_axis(result, rows)
        if part is None:
            return False
        if not product and sign > 0 and view.coefficient is None and other in self.outputs:
            self._note_bias(view, shown, other, new)
        self.uses.append(
            Use(
                "scale-shift",
                view.leaf,
                view.ops,
                result,
                other if product else None,
                output_rows=tuple(sorted(rows, key=lambda i: i != part.axis)),
                outer=part.outer,
                channels=tuple(shown),
                core_axes=tuple(view.axes[i] for i in shown),  # type: ignore[misc]
                coefficient=view.coefficient,
                sign=sign,
                slot=view.slot,
                loops=view.loops,
            )
        )
        return True

    def _combine(
        self, eqn: JaxprEqn, operands: tuple[int, ...], result: int, condition: str
    ) -> bool:
        """A sum or a matrix product of parameters, which then counts as a parameter.

        Of a product one factor may be data that all examples share, a frozen matrix.
        """
        first, second = views = [self._views.get(number) for number in operands]
        shapes = [self.program.shape(number) for number in operands]
        name, shape = eqn.primitive.name, self.program.shape(result)
        if (
            self._depth
            or (first and first.leaf) == (second and second.leaf)
            or (None in views and any(self._values.examples.get(result, NOWHERE)))
            or any(
                view is not None and (view.repeats(old) or view.sliced or not view.uniform)
                for view, old in zip(views, shapes, strict=True)
            )
        ):
            return False
        if name in ("add", "add_any", "sub") and shapes == [shape, shape] and first and second:
            sign = -1 if name == "sub" else 1
            weight: Weight = Sum(((first, 1), (second, sign)))
        elif name == "dot_general" and not eqn.params["dimension_numbers"][1][0]:
            inner = [tuple(map(int, axes)) for axes in eqn.params["dimension_numbers"][0]]
            outer = [
                tuple(i for i in range(len(old)) if i not in axes)
                for old, axes in zip(shapes, inner, strict=True)
            ]
            axes = (outer[0], inner[0]), (inner[1], outer[1])
            plain = [_whole(-1, old) for old in shapes]
            weight = Product(
                shape,
                first,
                second,
                (first or plain[0]).order(*axes[0]),
                (second or plain[1]).order(*axes[1]),
                (operands[0], plain[0].order(*axes[0])),
                (operands[1], plain[1].order(*axes[1])),
                condition,
            )
            self.program.data.discard(result)  # from here on it is a parameter
        else:
            return False
        self._views[result] = _whole(len(self.program.inputs) + len(self.weights), shape)
        self.weights.append(weight)
        return True

    def expand(self) -> None:
        """Replaces what is found of computed weights by what that means for their parameters."""
        count = len(self.program.inputs)
        for use in self.uses:  # which grows
            if use.leaf < count:
                continue
            weight = self.weights[use.leaf - count]
            if isinstance(weight, Computed):
                alone = not (use.stacked or use.left or use.right)
                if use.kind not in ("dense", "convolution") or not alone:
                    self.refusals.append(Refusal(use.leaf, (use.output,), weight.reason))
                continue
            expanded = list(expand(use, weight))
            self.uses += expanded
            if not expanded:
                reason = weight.reason if isinstance(weight, Product) else _UNUSED_PRODUCT
                self.refusals.append(Refusal(use.leaf, (use.output,), reason))
        for refusal in self.refusals:
            if refusal.leaf >= count:
                weight = self.weights[refusal.leaf - count]
                if isinstance(weight, Product):
                    replaced = None in (weight.left, weight.right)
                else:
                    replaced = refusal.reason != DIFFERENT_FACTORS
                if replaced and not isinstance(weight, Sum):
                    refusal = refusal._replace(reason=weight.reason)
                self.refusals += [refusal._replace(leaf=v.leaf) for v in views_of(weight)]

    def _scaled(self, view: View, factor: int, result: int) -> View:
        """A view whose entries are multiplied, by the variance of a batch for instance."""
        factors = (factor, *(() if view.coefficient is None else (view.coefficient,)))
        multiply = functools.partial(_product, self.program.shape(result))
        coefficient = self.program.add_step(multiply, factors, self.program.avals[result])
        uniform = view.uniform and math.prod(self.program.shape(factor)) == 1
        return dataclasses.replace(view, coefficient=coefficient, uniform=uniform)

    def _note_bias(self, view: View, shown: list[int], number: int, shape: Shape) -> None:
        """Notes that the use which follows may be the bias of the layer that gives a value."""
        index, channels = self.outputs[number]
        layer = self.uses[index]
        if layer.kind == "embedding" or self.program.shape(number) != shape:
            return
        if len(view.axes) != len(shape):  # a scalar
            return
        if any(channels[i] is None and shape[i] > 1 for i in shown):
            return
        if not self._same_slices(view, layer):
            return
        order = sorted((c, i) for i, c in enumerate(channels) if c is not None)
        axes = tuple(axis if i in shown else None for i, axis in enumerate(view.axes))
        stack = [i for c, i in order if c < len(layer.output_stack)]
        ops = dataclasses.replace(view, axes=axes).order(
            [i for c, i in order if c >= len(layer.output_stack)], stack=stack
        )
        *slices, _, outputs = layer.ops[-1][1]
        if math.prod(ops[-1][1]) == math.prod((*slices, outputs)):
            ops = (*ops[:-1], ("reshape", (*slices, outputs)))  # the groups of a convolution apart
            self.biases.setdefault(index, []).append((len(self.uses), ops))

    def _same_slices(self, view: View, layer: Use) -> bool:
        """Whether a vector is the slice of a stack that belongs to a layer's matrix."""
        if [depth for _, depth in view.loops] != [depth for _, depth in layer.loops]:
            return False
        one, other = view.slot, layer.slot
        if one is None or other is None or one.size != other.size:
            return one is other
        if one.number is None or other.number is None:
            return one.position == other.position and one.number == other.number
        return self.program.same_integer(one.number, other.number)


def follow(
    closed: ClosedJaxpr, num_parameters: int, num_examples: int, num_outputs: int | None = None
) -> Follower:
    """Follows the parameters through the program of a network.

    Args:
      closed: the program.
      num_parameters: how many of its first arguments are parameters.
      num_examples: the leading axis of its outputs.
      num_outputs: how many of its results are outputs; those after them are auxiliary, and nothing
        is known of their axes. None: all are outputs.
    """
    avals = [var.aval for var in closed.jaxpr.invars]
    program = Program(avals[:num_parameters], avals[num_parameters:])
    views = {number: _whole(i, program.shape(number)) for i, number in enumerate(program.inputs)}
    count = len(closed.jaxpr.outvars)
    num_outputs = count if num_outputs is None else num_outputs
    examples = of_outputs(num_examples, num_outputs) + [NOWHERE] * (count - num_outputs)
    follower = Follower(closed, program, views, num_examples, examples)
    for number in program.outputs:
        follower.refuse(number, (number,), "is an output itself")
    follower.expand()
    return follower


def _whole(leaf: int, shape: Shape) -> View:
    """An array as it is."""
    return View(leaf, (), shape, tuple(range(len(shape))))


def _reciprocal(factor: jax.Array) -> tuple[jax.Array]:
    return (1 / factor,)


def _product(shape: Shape, *factors: jax.Array) -> tuple[jax.Array]:
    return (jnp.broadcast_to(math.prod(factors), shape),)
