"""Programs of networks in which layers get their errors by feedback alignment.

The layers are found as for K-FAC (``optax_accel.natural_gradient.following``).  Direct feedback
changes two places of the program: what reads the input of an aligned layer reads it without
derivative, so that no error comes back through the layer; and the outputs pass through a function
that does nothing but send their error, times the fixed matrices, to these inputs.  What lies
between is differentiated by JAX as always.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

from optax_accel._derivatives import check_outputs
from optax_accel._means import vary_like
from optax_accel.natural_gradient.following import Follower, follow
from optax_accel.natural_gradient.layers import Use
from optax_accel.natural_gradient.program import Program

# Operations that keep the number of entries, but not their order.
_PERMUTING = ("transpose", "rev", "sort", "dot_general", "conv_general_dilated", "cumsum", "gather")
# Shape and dtype of a layer's input.
_Like: TypeAlias = tuple[tuple[int, ...], Any]


class _Layer(NamedTuple):
    """A dense layer or convolution that can be aligned; numbers are those of values.

    Attributes:
      name: of its weight, or of the parameters that the weight is computed from.
      input: the activation.
      weight: as the operation takes it.
      output: its result.
      step: the index of the operation.
      leaf: the index of the weight's parameter; None if it is computed from several.
      fan_out: how many outputs an input reaches, at most.
      convolution: whether it is one.
    """

    name: str
    input: int
    weight: int
    output: int
    step: int
    leaf: int | None
    fan_out: int
    convolution: bool


@dataclasses.dataclass(frozen=True)
class Aligned:
    """The program of a network with its aligned layers.

    Attributes:
      program: the program.
      direct: whether errors come directly from the outputs.
      layers: those whose input gets its error by feedback, by the name of the matrix; several where
        they share their input.
      shapes: of the matrices, by name.
      fan_outs: how many errors the matrix combines for one entry, by name.
      unaligned: names of parameters that layers take in ways that cannot be aligned, and why.
      steps: indices of the steps that are needed.
      num_examples: the first axis of the outputs.
    """

    program: Program
    direct: bool
    layers: dict[str, list[_Layer]]
    shapes: dict[str, tuple[int, ...]]
    fan_outs: dict[str, int]
    unaligned: list[tuple[str, str]]
    steps: list[int]
    num_examples: int

    def evaluate(
        self, leaves: Sequence[jax.Array], matrices: Mapping[str, jax.Array]
    ) -> list[jax.Array]:
        """Runs the program; its derivative is aligned.

        Args:
          leaves: the parameters.
          matrices: the feedback, by name.

        Returns:
          The results of the program: the output, then auxiliary outputs.
        """
        program = self.program
        values = dict(program.constants)
        values.update(zip(program.inputs, leaves, strict=True))
        aligned = [(name, layer) for name, some in self.layers.items() for layer in some]
        inputs = {layer.input: name for name, layer in aligned} if self.direct else {}
        replaced = {} if self.direct else {layer.step: (name, layer) for name, layer in aligned}
        sent: dict[str, jax.Array] = {}
        for index in self.steps:
            function, operands, results = program.steps[index]
            arguments = [values[number] for number in operands]
            if index in replaced:
                name, layer = replaced[index]
                fixed = self._as_taken(layer, leaves, matrices[name])
                side = operands.index(layer.input)
                computed = [_fed_back(function, side, *arguments, fixed)]
            else:
                computed = list(function(*arguments))
            for number, value in zip(results, computed, strict=True):
                if number in inputs:
                    sent[inputs[number]] = value
                    value = lax.stop_gradient(value)
                values[number] = value
        output, *auxiliary = (values[number] for number in program.outputs)
        if self.direct:
            likes = tuple((value.shape, value.dtype) for value in sent.values())
            order = [matrices[name] for name in sent]
            output = _send(likes, output, list(sent.values()), order)
        return [output, *auxiliary]

    def _as_taken(self, layer: _Layer, leaves: Sequence[jax.Array], matrix: jax.Array) -> jax.Array:
        """A matrix like the weight's parameter, laid out as the operation takes the weight."""
        fixed = [matrix.astype(x.dtype) if i == layer.leaf else x for i, x in enumerate(leaves)]
        return lax.stop_gradient(self.program.function_of_inputs(layer.weight)(fixed))

    def products(self, leaves: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """The weights of each layer, or their products up to the outputs, transposed.

        Args:
          leaves: the initial parameters.

        Raises:
          ValueError: the network is not a chain of layers, elementwise functions and reshapes.
        """
        if not self.direct:
            return {
                name: jnp.asarray(leaves[layer.leaf])
                for name, (layer, *_) in self.layers.items()
                if layer.leaf is not None
            }
        program, (outputs,) = self.program, self.program.outputs[:1]
        dtype = wide(program.avals[outputs].dtype)
        rows = jnp.eye(program.shape(outputs)[1], dtype=dtype)
        products, above = {}, outputs
        for name, some in reversed(self.layers.items()):
            layer = some[0]
            if len(some) > 1 or not self._elementwise(layer.output, above):
                raise ValueError(
                    "feedback='product' needs a chain of layers with nothing but elementwise "
                    "functions and reshapes in between, and what lies above the layer "
                    f"{name} is not: use 'uniform' or 'normal', or give the matrices yourself."
                )
            rows = self._pulled_back(layer, leaves, rows)
            products[name], above = rows, layer.input
        return {name: products[name] for name in self.layers}

    def _elementwise(self, below: int, above: int) -> bool:
        """Whether one activation is an elementwise function of another, or is reshaped."""
        program = self.program
        producer = {n: i for i in self.steps for n in program.steps[i][2]}
        stops = {layer.input for some in self.layers.values() for layer in some} - {above}
        pending, seen = [above], set[int]()
        while pending:
            number = pending.pop()
            if number == below or number in seen:
                continue
            seen.add(number)
            index = producer.get(number)
            if index is None or number in stops or program.names[index] in _PERMUTING:
                return False
            if math.prod(program.shape(number)) != math.prod(program.shape(below)):
                return False
            operands = program.steps[index][1]
            pending += [n for n in operands if n in program.data and n in program.trained]
        return True

    def _pulled_back(
        self, layer: _Layer, leaves: Sequence[jax.Array], rows: jax.Array
    ) -> jax.Array:
        """Rows times the transposed linear map of a layer, a batch of them at a time."""
        function, operands, _ = self.program.steps[layer.step]
        weight = self.program.function_of_inputs(layer.weight)(leaves)
        side = operands.index(layer.input)

        def linear(activation: jax.Array) -> jax.Array:
            arguments = (activation, weight) if side == 0 else (weight, activation)
            return function(*arguments)[0]

        like, result = self.program.avals[layer.input], self.program.avals[layer.output]
        transposed = jax.linear_transpose(linear, jax.ShapeDtypeStruct(like.shape, like.dtype))
        count, batch = len(rows), self.num_examples
        rows = jnp.pad(rows, ((0, -count % batch), (0, 0)))
        parts = [
            transposed(part.reshape(result.shape).astype(result.dtype))[0].reshape(batch, -1)
            for part in jnp.split(rows, len(rows) // batch)
        ]
        return jnp.concatenate(parts)[:count].astype(rows.dtype)


def align(closed: ClosedJaxpr, params: chex.ArrayTree, outputs: Any, kind: str) -> Aligned:
    """Finds the layers of a network that can be aligned.

    Args:
      closed: the program of the network, whose results are the output and auxiliary outputs.
      params: its parameters.
      outputs: shapes and dtypes of the outputs.
      kind: ``"dfa"``, ``"cdfa"`` or ``"fa"``.

    Raises:
      ValueError: the outputs are not one array ``(examples, outputs)``, or no layer can be aligned.
      TypeError: they are not real floating-point.
    """
    num_examples, width = _check_shape(outputs)
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path) or "params" for path, _ in paths]
    follower = follow(closed, len(names), num_examples, num_outputs=1)
    program = follower.program
    found, unaligned = _layers(follower, names, kind == "fa")
    found = [layer for layer in found if not (kind == "cdfa" and layer.convolution)]
    if not found:
        reasons = "".join(f"\n  {name} {reason}" for name, reason in unaligned)
        raise ValueError(
            f"feedback_alignment (kind={kind!r}) found no layers to align: a network needs a dense "
            f"layer{'' if kind == 'cdfa' else ' or convolution'} whose inputs depend on other "
            "parameters. With one layer alone the gradient is that of the objective itself: train "
            f"with that.{reasons}"
        )
    groups: dict[Any, list[_Layer]] = {}
    for layer in found:
        groups.setdefault(layer.step if kind == "fa" else layer.input, []).append(layer)
    layers: dict[str, list[_Layer]] = {}
    for some in groups.values():
        name = ", ".join(dict.fromkeys(layer.name for layer in some))
        uses = sum(other.split(" (use ")[0] == name for other in layers)
        layers[f"{name} (use {uses + 1})" if uses else name] = some

    def shape(layer: _Layer) -> tuple[int, ...]:
        if kind == "fa" and layer.leaf is not None:
            return program.shape(program.inputs[layer.leaf])
        return width, math.prod(program.shape(layer.input)) // num_examples

    return Aligned(
        program,
        kind != "fa",
        layers,
        {name: shape(some[0]) for name, some in layers.items()},
        {name: some[0].fan_out if kind == "fa" else width for name, some in layers.items()},
        unaligned,
        _needed(program),
        num_examples,
    )


def _check_shape(outputs: Any) -> tuple[int, int]:
    """The numbers of examples and of outputs.

    Raises:
      ValueError: the outputs are not one array with these two axes.
      TypeError: they are not real floating-point.
    """
    check_outputs("feedback_alignment", outputs, jnp.floating)
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(outputs)]
    if len(shapes) != 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(
            "feedback_alignment sends the error of each example from the outputs of `predict` to "
            "the layers: these must be one array of the shape (examples, outputs), and not empty; "
            f"got the shapes {shapes}. Return such an array from `predict` (reshape or concatenate "
            "what an example has), and leave sums over examples to the loss."
        )
    return shapes[0][0], shapes[0][1]


def _layers(
    follower: Follower, names: Sequence[str], own_weight: bool
) -> tuple[list[_Layer], list[tuple[str, str]]]:
    """The layers whose inputs depend on parameters, in their order in the program.

    Args:
      follower: which has followed the parameters.
      names: of the parameters.
      own_weight: whether a layer's weight must be one parameter, laid out in some way.

    Returns:
      The layers, and names of parameters with other uses, with the reasons.
    """
    program = follower.program
    readers = program.readers(program.outputs[:1])
    producer = {n: i for i, (*_, results) in enumerate(program.steps) for n in results}
    found: dict[int, _Layer] = {}
    reasons: dict[str, str] = {}
    for use in follower.uses:
        if use.kind not in ("dense", "convolution") or use.output not in readers:
            continue
        assert use.input is not None
        leaves = follower.parameters_of(use.leaf)
        name = " and ".join(names[i] for i in sorted(leaves))
        if use.output in found:
            continue
        reason, step = _refused(use), producer.get(use.output)
        if step is None or (use.input in program.trained and use.input not in producer):
            reason = "is used inside of a loop"
        elif use.input not in program.trained:  # the first layer: nothing is below it
            continue
        operands = () if step is None else program.steps[step][1]
        others = [number for number in operands if number != use.input]
        computed = len(leaves) > 1 or use.leaf >= len(names) or bool(use.scales)
        if not reason and own_weight and (computed or others[0] in program.data):
            reason = "is not the layer's weight itself, which is computed from it"
        if reason or step is None or len(others) != 1:
            reasons.setdefault(name, reason or "is multiplied by itself")
            continue
        leaf = None if computed else use.leaf
        convolution = use.kind == "convolution"
        found[use.output] = _Layer(
            name, use.input, others[0], use.output, step, leaf, _fan_out(use), convolution
        )
    for refusal in follower.refusals:
        if any(number in readers for number in refusal.results):
            for i in follower.parameters_of(refusal.leaf):
                if len(program.shape(program.inputs[i])) > 1:
                    reasons.setdefault(names[i], refusal.reason)
    return sorted(found.values(), key=lambda layer: layer.step), list(reasons.items())


def _refused(use: Use) -> str:
    """Why the inputs of a layer do not have the examples on their first axis, or an empty text."""
    first = dict(use.geometry)["lhs_spec"][0] if use.kind == "convolution" else use.rows[0]
    if first == 0 and use.outer == 1:
        return ""
    return "has inputs whose first axis is not that of the examples"


def _fan_out(use: Use) -> int:
    """How many outputs of a layer an entry of its input reaches, at most."""
    window = dict(use.geometry).get("window", ())
    return int(use.ops[-1][1][-1] * math.prod(window))


def _needed(program: Program) -> list[int]:
    """Indices of the steps on which the results of a program depend."""
    needed, steps = set(program.outputs), list[int]()
    for index, (_, operands, results) in reversed(list(enumerate(program.steps))):
        if not needed.isdisjoint(results):
            needed.update(operands)
            steps.append(index)
    return steps[::-1]


def wide(dtype: Any) -> Any:
    """A floating-point dtype, but at least float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


# -- the two derivative rules ---------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send(
    likes: tuple[_Like, ...],
    outputs: jax.Array,
    inputs: list[jax.Array],
    matrices: list[jax.Array],
) -> jax.Array:
    """The outputs; their error goes on as it is, and times the matrices to the layers' inputs."""
    return outputs


def _send_forward(
    likes: tuple[_Like, ...],
    outputs: jax.Array,
    inputs: list[jax.Array],
    matrices: list[jax.Array],
) -> tuple[jax.Array, list[jax.Array]]:
    return outputs, matrices


def _send_backward(
    likes: tuple[_Like, ...], matrices: list[jax.Array], error: jax.Array
) -> tuple[jax.Array, list[jax.Array], None]:
    matrices = [vary_like(matrix, jax.typeof(error)) for matrix in matrices]
    sent = [
        (error.astype(matrix.dtype) @ matrix).reshape(shape).astype(dtype)
        for (shape, dtype), matrix in zip(likes, matrices, strict=True)
    ]
    return error, sent, None


_send.defvjp(_send_forward, _send_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fed_back(
    function: Callable[..., Sequence[Any]], side: int, one: Any, other: Any, fixed: Any
) -> jax.Array:
    """A bilinear function of activation and weight, whose error goes back through fixed weights.

    Args:
      function: the operation.
      side: which of its operands is the activation.
      one: its first operand.
      other: its second operand.
      fixed: like the weight.
    """
    return function(one, other)[0]


def _fed_back_forward(
    function: Callable[..., Sequence[Any]], side: int, one: Any, other: Any, fixed: Any
) -> tuple[jax.Array, tuple[Any, Any, Any]]:
    activation, weight = (one, other) if side == 0 else (other, one)
    return function(one, other)[0], (activation, weight, fixed)


def _fed_back_backward(
    function: Callable[..., Sequence[Any]], side: int, kept: tuple[Any, Any, Any], error: jax.Array
) -> tuple[Any, Any, None]:
    activation, weight, fixed = kept
    fixed = vary_like(fixed, jax.typeof(weight))

    def operation(activation: Any, weight: Any) -> Any:
        return function(*((activation, weight) if side == 0 else (weight, activation)))[0]

    (below,) = jax.linear_transpose(lambda x: operation(x, fixed), activation)(error)
    (own,) = jax.linear_transpose(lambda x: operation(activation, x), weight)(error)
    return (below, own, None) if side == 0 else (own, below, None)


_fed_back.defvjp(_fed_back_forward, _fed_back_backward)
