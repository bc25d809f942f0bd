"""Which operations are layers: one rule for each kind that has a matrix of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

from jax import lax
from jax.extend.core import JaxprEqn

from optax_accel.natural_gradient.examples import NOWHERE, Part, Places
from optax_accel.natural_gradient.layers import Use
from optax_accel.natural_gradient.layouts import View
from optax_accel.natural_gradient.program import Program

DIFFERENT_FACTORS = (
    "is multiplied by different numbers that are not parameters before a layer takes it"
)


@dataclasses.dataclass(frozen=True)
class Values:
    """What is known of the values of a program.

    Attributes:
      program: the program, as far as it has been read.
      num_examples: the leading axis of its outputs.
      views: the values that are a parameter in another layout, by number.
      examples: where the axis over the examples lies in a value, by number; where it is not, the
        value reaches the outputs only through sums over examples or as something that all of them
        share.
    """

    program: Program
    num_examples: int
    views: dict[int, View]
    examples: dict[int, Places] = dataclasses.field(default_factory=dict)

    def not_a_layer(self, weight: int, activation: int) -> str:
        """Why a layer cannot have one value for its whole matrix and the other for its inputs."""
        view = self.views.get(weight)
        if view is None:
            return "is an input of a layer instead of its weight"
        if not view.uniform:
            return DIFFERENT_FACTORS
        if view.repeats(self.program.shape(weight)):
            return "is repeated before a layer takes it"
        if not self.per_example(activation):
            return "has inputs that depend on parameters alone"
        return ""

    def per_example(self, number: int) -> bool:
        """Whether a value can be an activation, also a constant one: the first state of a loop."""
        return number in self.program.data or number not in self.program.trained

    def example_axis(self, number: int, axes: Sequence[int]) -> Part | None:
        """The one of some axes of a value that numbers the examples of the outputs."""
        places = self.examples.get(number, NOWHERE)
        if len(places) != 1:
            return None
        (place,) = places
        return place[0] if len(place) == 1 and place[0].axis in axes else None

    def without_examples(self, what: str, activation: int, result: int) -> str:
        """Why what is computed from an activation, but not example by example, is not a layer's."""
        shape = self.program.shape(activation)
        if len(self.examples.get(result, NOWHERE)) > 1:
            return f"has {what} {shape} whose examples lie on different axes"
        return f"has {what} {shape} without an axis that becomes that of the outputs' examples"


# The use that an equation makes of a parameter, from the numbers of its operands and its result;
# where it is not a layer, the condition that failed.
Rule: TypeAlias = Callable[[Values, JaxprEqn, tuple[int, ...], int], Use | str]


def match_dense(values: Values, eqn: JaxprEqn, operands: tuple[int, ...], result: int) -> Use | str:
    """``dot_general`` of a parameter with an activation."""
    side = int(operands[1] in values.views)
    weight, activation = operands[side], operands[1 - side]
    contracted, batch = eqn.params["dimension_numbers"]
    if reason := values.not_a_layer(weight, activation):
        return reason
    view = values.views[weight]
    inputs, columns = (tuple(map(int, contracted[i])) for i in (side, 1 - side))
    slices, stack = (tuple(map(int, batch[i])) for i in (side, 1 - side))
    outputs = [i for i in range(len(view.axes)) if i not in (*inputs, *slices)]
    shape = values.program.shape(activation)
    rows = [i for i in range(len(shape)) if i not in (*columns, *stack)]
    first = len(stack) + (len(outputs) if side == 0 else 0)
    output_rows = dict(zip(rows, range(first, first + len(rows)), strict=True))
    if (part := values.example_axis(result, list(output_rows.values()))) is None:
        return values.without_examples("inputs", activation, result)
    rows.sort(key=lambda i: output_rows[i] != part.axis)  # examples first
    first = len(stack) + (0 if side == 0 else len(rows))
    return Use(
        "dense",
        view.leaf,
        view.order(inputs, outputs, stack=slices),
        result,
        activation,
        columns=columns,
        rows=tuple(rows),
        output_rows=tuple(output_rows[i] for i in rows),
        channels=tuple(range(first, first + len(outputs))),
        stack=stack,
        output_stack=tuple(range(len(stack))),
        outer=part.outer,
    )


def match_convolution(
    values: Values, eqn: JaxprEqn, operands: tuple[int, ...], result: int
) -> Use | str:
    """``conv_general_dilated`` of an activation with a parameter."""
    activation, weight = operands
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if reason := values.not_a_layer(weight, activation):
        return reason
    view = values.views[weight]
    if params["batch_group_count"] != 1:
        return "is in a convolution with groups of examples"
    if (part := values.example_axis(result, numbers.out_spec[:1])) is None:
        return values.without_examples("inputs", activation, result)
    output, input_, *window = numbers.rhs_spec
    shape = values.program.shape(weight)
    geometry = {
        "lhs_spec": numbers.lhs_spec,
        "window": [shape[i] for i in window],
        "strides": params["window_strides"],
        "padding": params["padding"],
        "dilation": params["rhs_dilation"],
        "input_dilation": params["lhs_dilation"],
    }
    groups, stack = params["feature_group_count"], []
    if groups > 1:  # outputs as (groups, outputs of a group)
        view = view.split(output, groups, shape)
        stack, output = [output], output + 1
        input_, *window = (i + (i >= output) for i in (input_, *window))
    return Use(
        "convolution",
        view.leaf,
        view.order((*window, input_), (output,), stack=stack),
        result,
        activation,
        output_rows=(numbers.out_spec[0], *numbers.out_spec[2:]),
        channels=(numbers.out_spec[1],),
        geometry=tuple((name, tuple(value)) for name, value in geometry.items()),
        groups=groups,
        outer=part.outer,
    )


def match_embedding(
    values: Values, eqn: JaxprEqn, operands: tuple[int, ...], result: int
) -> Use | str:
    """``gather`` of whole slices of a parameter along one axis."""
    table, indices = operands
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if reason := values.not_a_layer(table, indices):
        return reason
    view = values.views[table]
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return "is looked up along several axes at once"
    (axis,), shape = numbers.start_index_map, values.program.shape(table)
    whole = tuple(1 if i == axis else size for i, size in enumerate(shape))
    if tuple(numbers.collapsed_slice_dims) != (axis,) or tuple(sizes) != whole:
        return "is looked up in parts that are not whole slices"
    channels = tuple(map(int, numbers.offset_dims))
    output_rows = [i for i in range(len(values.program.shape(result))) if i not in channels]
    if (part := values.example_axis(result, output_rows)) is None:
        return values.without_examples("indices", indices, result)
    rows = sorted(range(len(output_rows)), key=lambda i: output_rows[i] != part.axis)
    return Use(
        "embedding",
        view.leaf,
        view.order((axis,), [i for i in range(len(shape)) if i != axis]),
        result,
        indices,
        columns=(len(output_rows),),
        rows=tuple(rows),
        output_rows=tuple(output_rows[i] for i in rows),
        channels=channels,
        geometry=(("clip", eqn.params["mode"] == lax.GatherScatterMode.CLIP),),
        outer=part.outer,
    )


RULES: dict[str, Rule] = {
    "dot_general": match_dense,
    "conv_general_dilated": match_convolution,
    "gather": match_embedding,
}
