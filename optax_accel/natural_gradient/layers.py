r"""The layers of a network, found in its program by following each parameter through it.

No layer is registered and no library is known by name.  ``predict(params)`` is traced to a jaxpr,
in which every parameter is followed through operations that only lay it out (reshape, transpose,
broadcast, casts) to what uses it:

=================  ==============================================================================
``dense``          ``dot_general`` with an activation, any number of contracted and kept axes
``convolution``    ``conv_general_dilated`` in one group: any stride, padding and dilation
``embedding``      ``gather`` of whole slices along one axis
``scale-shift``    a product or a sum that repeats the parameter over the examples (normalization)
``generic``        everything else: the parameter is used in other ways, or inside a loop
=================  ==============================================================================

A vector added to the output of a dense layer or a convolution is its bias, one block with it.  A
parameter used several times in the same way (over time, over branches) has one block, the sum over
its uses.  Uses from which no gradient comes back (``stop_gradient``, rounding) do not count.

What is jitted or checkpointed is looked into where a parameter enters it; loops and conditionals
are not, nor is what has a derivative rule of the user's (``jax.custom_jvp``, ``jax.custom_vjp``):
what is inside says nothing about the derivative.  A rule that passes the gradient to the parameter
as it is (a straight-through estimator) is followed as a layout is.

Activations and the gradients at the layers' outputs come from one evaluation of the same program
with a tap at each output, and its pullback.  Every equation is evaluated as it stands, so that the
gradients are those of ``jax.grad``, with the user's rules.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from optax_accel.objective import Objective

Shape = tuple[int, ...]
# Reshapes and transpositions, applied in this order.
Ops = tuple[tuple[str, Shape], ...]

# Primitives whose result is their operand, as far as shapes and derivatives are concerned.
_IDENTITIES = {
    *("convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint"),
    *("pvary", "pcast", "reshard", "mesh_cast", "optimization_barrier"),
}
# Call-like primitives, which have the derivative of the program they run, and the parameter that
# holds it.
_CALLS = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat", "remat2"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call"), "call_jaxpr"),
}
# Operations that have a rule of the user's.
_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin")
# Operations without a derivative, or whose derivative is zero; beside those with integer results.
_CONSTANT = ("stop_gradient", "round", "floor", "ceil", "sign")
# What is said of parameters that no layer could have.
UNUSED = ("has no entries", "has no gradient", "is not used")
# Why a parameter that enters one of these operations has no layer there.
_REASONS = {
    **dict.fromkeys(("scan", "while", "cond"), "whose inside is not looked into"),
    **dict.fromkeys(_RULES, "which has a derivative rule of its own"),
    **dict.fromkeys(("slice", "dynamic_slice", "split"), "which takes a part of it"),
}


# -- layouts --------------------------------------------------------------------------------------


def lay_out(x: Any, ops: Ops) -> Any:
    """Applies reshapes and transpositions to an array."""
    for name, argument in ops:
        x = x.reshape(argument) if name == "reshape" else x.transpose(argument)
    return x


def inverse(ops: Ops, shape: Shape) -> Ops:
    """The operations that undo ``ops`` on an array that had the given shape."""
    undo: list[tuple[str, Shape]] = []
    for name, argument in ops:
        if name == "reshape":
            undo.append(("reshape", shape))
            shape = argument
        else:
            undo.append(("transpose", tuple(int(i) for i in np.argsort(argument))))
            shape = tuple(shape[i] for i in argument)
    return tuple(reversed(undo))


@dataclasses.dataclass(frozen=True)
class _View:
    """A value that is a parameter in another layout, repeated along some axes.

    Attributes:
      leaf: index of the parameter.
      ops: lead from the parameter to its core, an array with the same entries.
      core: the core's shape.
      axes: for each axis of the value the axis of the core that it shows, or None.
      coefficient: the value by which the entries are multiplied (its number); None: 1.
    """

    leaf: int
    ops: Ops
    core: Shape
    axes: tuple[int | None, ...]
    coefficient: int | None = None

    def repeats(self, shape: Shape) -> bool:
        return math.prod(shape) != math.prod(self.core)

    def order(self, *groups: Sequence[int]) -> Ops:
        """From the parameter to an array with one axis for each group of the value's axes."""
        shown = [self.axes[i] for group in groups for i in group]
        order = [axis for axis in shown if axis is not None]
        order += [i for i in range(len(self.core)) if i not in order]  # of size 1
        sizes = [
            math.prod(self.core[a] for i in group if (a := self.axes[i]) is not None)
            for group in groups
        ]
        return (*self.ops, ("transpose", tuple(order)), ("reshape", tuple(sizes)))


def _follow(view: _View, eqn: JaxprEqn, old: Shape, new: Shape) -> _View | None:
    """The view that a layout operation makes of a view; None if it is none."""
    name, params = eqn.primitive.name, eqn.params
    if name == "convert_element_type" and not jnp.issubdtype(params["new_dtype"], jnp.floating):
        return None  # integers have no derivative, complex numbers another one
    if name in _IDENTITIES:
        return view
    if name == "transpose":
        return dataclasses.replace(view, axes=tuple(view.axes[i] for i in params["permutation"]))
    if name == "squeeze":
        kept = (i for i in range(len(old)) if i not in params["dimensions"])
        return dataclasses.replace(view, axes=tuple(view.axes[i] for i in kept))
    if name == "broadcast_in_dim":
        axes: list[int | None] = [None] * len(new)
        for i, j in enumerate(params["broadcast_dimensions"]):
            if old[i] == new[j]:
                axes[j] = view.axes[i]
        return dataclasses.replace(view, axes=tuple(axes))
    if name == "reshape" and params.get("dimensions") is None:
        if (moved := _same_but_ones(old, new)) is not None:
            axes = [None if i is None else view.axes[i] for i in moved]
            return dataclasses.replace(view, axes=tuple(axes))
        if not view.repeats(old):
            ops = view.order(*((i,) for i in range(len(old))))
            return dataclasses.replace(
                view, ops=(*ops[:-1], ("reshape", new)), core=new, axes=tuple(range(len(new)))
            )
    return None


def _same_but_ones(old: Shape, new: Shape) -> list[int | None] | None:
    """For each new axis the old one, if a reshape only adds and removes axes of size 1."""
    longer = [i for i, size in enumerate(old) if size != 1]
    if [old[i] for i in longer] != [size for size in new if size != 1]:
        return None
    remaining = iter(longer)
    return [None if size == 1 else next(remaining) for size in new]


# -- layers ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter. Numbers are those of values of the program.

    Attributes:
      kind: as in the table of the module.
      leaf: index of the parameter.
      ops: from the parameter to a matrix (inputs, outputs), or to the core of a scale or shift.
      output: the value at which the gradient is taken.
      input: the activation; None for a shift.
      columns: axes of the activation (dense) that are contracted, in the order of the matrix' rows.
      rows: its other axes.
      output_rows: the axes of ``output`` that correspond to ``rows``, the one over the examples
        first.
      channels: the other axes of ``output``, in the order of the matrix' columns; for a scale or
        shift, in the order of the axes of the core that ``core_axes`` names.
      core_axes: see ``channels``.
      geometry: parameters of a convolution; of an embedding whether indices out of bounds are
        clipped (else they are dropped).
      coefficient: a further factor of a scale or shift, or None.
      sign: of a shift.
      bias_ops: from the bias to a vector of outputs, if there is a bias.
    """

    kind: str
    leaf: int
    ops: Ops
    output: int
    input: int | None = None
    columns: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    output_rows: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    core_axes: tuple[int, ...] = ()
    geometry: tuple[tuple[str, Any], ...] = ()
    coefficient: int | None = None
    sign: int = 1
    bias_ops: Ops = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """Parameters whose curvature is approximated together.

    Attributes:
      kind: as in the table of the module.
      leaves: indices of the parameters: the weight and, if it has one, the bias.
      names: their paths.
      shapes: their shapes.
      uses: what the curvature is the sum of; empty for a generic block.
      reason: why a block is generic.
    """

    kind: str
    leaves: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    uses: tuple[Use, ...] = ()
    reason: str = ""

    @property
    def kronecker(self) -> bool:
        """Whether the block is a matrix with an input and an output side."""
        return self.kind in ("dense", "convolution", "embedding")

    @property
    def has_bias(self) -> bool:
        """Whether its last row is a bias."""
        return len(self.leaves) > 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Inputs (with the bias) and outputs."""
        _, (rows, columns) = self.uses[0].ops[-1]
        return rows + self.has_bias, columns

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a state depends on."""
        layout = (self.uses[0].ops, self.uses[0].bias_ops) if self.kronecker else ()
        return self.kind, self.names, self.shapes, layout

    def to_matrix(self, leaves: Mapping[int, Any]) -> jax.Array:
        """The block's part of a tree like the parameters as a matrix (inputs, outputs)."""
        use = self.uses[0]
        matrix = lay_out(leaves[self.leaves[0]], use.ops)
        if self.has_bias:
            bias = lay_out(leaves[self.leaves[1]], use.bias_ops)
            matrix = jnp.concatenate([matrix, bias.astype(matrix.dtype)[None]])
        return matrix

    def from_matrix(self, matrix: jax.Array) -> list[jax.Array]:
        """The inverse of :meth:`to_matrix`: one array for each of the block's leaves."""
        use, rows = self.uses[0], self.matrix_shape[0] - self.has_bias
        parts = [lay_out(matrix[:rows], inverse(use.ops, self.shapes[0]))]
        if self.has_bias:
            parts.append(lay_out(matrix[rows], inverse(use.bias_ops, self.shapes[1])))
        return parts


# A step of the flat program: a function of values, the numbers of its operands and results.
_Step = tuple[Callable[..., Sequence[Any]], tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Network:
    """The program of ``predict``, with the layers found in it.

    Attributes:
      blocks: of the parameters, in their order; none for those that were not selected.
      num_examples: the leading axis of the outputs.
      shapes: of the values of the program, by number.
      dtypes: theirs.
      steps: the program.
      constants: values that are known, by number.
      inputs: numbers of the parameters.
      outputs: numbers of the outputs' leaves.
      output_tree: their structure.
    """

    blocks: tuple[Block, ...]
    num_examples: int
    shapes: tuple[Shape, ...]
    dtypes: tuple[Any, ...]
    steps: tuple[_Step, ...]
    constants: Mapping[int, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    output_tree: Any

    def capture(
        self, leaves: Sequence[jax.Array], vary: Callable[[chex.ArrayTree], chex.ArrayTree]
    ) -> tuple[chex.ArrayTree, Callable[[chex.ArrayTree], Any], dict[int, Any]]:
        """Evaluates the network where its layers can be read.

        Args:
          leaves: the parameters.
          vary: marks what differs between replicas (:func:`optax_accel.objective.vary_over`).

        Returns:
          The outputs; the pullback from gradients at the outputs to a pair: those at the layers'
          outputs, by number, and those of the generic blocks' parameters, by index; the values that
          the uses name, by number.
        """
        uses = [use for block in self.blocks for use in block.uses]
        read = {n for use in uses for n in (use.input, use.coefficient) if n is not None}

        def evaluate(taps: dict[int, jax.Array], generic: dict[int, jax.Array]) -> Any:
            values = dict(self.constants)
            for index, (number, leaf) in enumerate(zip(self.inputs, leaves, strict=True)):
                values[number] = generic.get(index, leaf)
            for function, operands, results in self.steps:
                computed = function(*(values[number] for number in operands))
                for number, value in zip(results, computed, strict=True):
                    values[number] = _tap(value, taps[number]) if number in taps else value
            outputs = jax.tree.unflatten(self.output_tree, [values[n] for n in self.outputs])
            return outputs, {number: values[number] for number in read}

        taps = {
            n: jnp.zeros(self.shapes[n], self.dtypes[n])
            for n in dict.fromkeys(use.output for use in uses)
        }
        generic = {b.leaves[0]: leaves[b.leaves[0]] for b in self.blocks if b.kind == "generic"}
        outputs, pullback, values = jax.vjp(evaluate, vary(taps), vary(generic), has_aux=True)
        return outputs, pullback, values


@jax.custom_vjp
def _tap(value: jax.Array, tap: jax.Array) -> jax.Array:
    """``value + tap`` at ``tap = 0``: no operation, but the gradient goes to both."""
    return value


def _tap_forward(value: jax.Array, tap: jax.Array) -> tuple[jax.Array, None]:
    return value, None


def _tap_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, gradient


_tap.defvjp(_tap_forward, _tap_backward)


def find(
    objective: Objective,
    params: chex.ArrayTree,
    example: Mapping[str, Any] | None = None,
    selected: Sequence[bool] | None = None,
) -> Network:
    """Traces ``predict`` and finds its layers.

    Args:
      objective: an objective of the parameters and what ``example`` holds.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      example: keyword arguments of ``predict``, pytrees of arrays or ``jax.ShapeDtypeStruct`` too;
        other leaves (flags, names) are given as they are.
      selected: for each parameter whether it takes part; None: all do.

    Returns:
      The network.

    Raises:
      ValueError: ``predict`` cannot be evaluated, or its outputs have no common leading axis of
        examples.
    """
    leaves, treedef = jax.tree.flatten(dict(example or {}))
    is_array = [hasattr(leaf, "shape") and not isinstance(leaf, np.generic) for leaf in leaves]

    def predict(params: chex.ArrayTree, arrays: list[Any]) -> chex.ArrayTree:
        remaining = iter(arrays)
        given = [
            next(remaining) if traced else leaf
            for traced, leaf in zip(is_array, leaves, strict=True)
        ]
        return objective.outputs(params, **jax.tree.unflatten(treedef, given))

    arrays = [leaf for traced, leaf in zip(is_array, leaves, strict=True) if traced]
    try:
        closed, outputs = jax.make_jaxpr(predict, return_shape=True)(params, arrays)
    except Exception as error:
        summary = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"`predict` cannot be evaluated: {type(error).__name__}: {summary}\nIt was given the "
            f"parameters {_summary(params)} and the example {_summary(dict(example or {}))}, which "
            "must have the structure, shapes and dtypes of those of a training step."
        ) from error
    return _Finder(closed, params, outputs).network(selected)


def _summary(tree: chex.ArrayTree) -> str:
    """Names, dtypes and shapes of the first leaves of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    texts = [
        f"{jax.tree_util.keystr(path) or 'itself'}: "
        + (f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf))
        for path, leaf in leaves[:8]
    ]
    return "{" + ", ".join([*texts, *(["..."] if len(leaves) > 8 else [])]) + "}"


class _Finder:
    """Flattens a program and follows the parameters through it."""

    def __init__(self, closed: ClosedJaxpr, params: chex.ArrayTree, outputs: chex.ArrayTree):
        paths = jax.tree_util.tree_leaves_with_path(params)
        self.names = [jax.tree_util.keystr(path) or "params" for path, _ in paths]
        self.leaf_shapes = [tuple(jnp.shape(leaf)) for _, leaf in paths]
        self.num_examples = count_examples(outputs)
        self.output_tree = jax.tree.structure(outputs)
        # The program: values are numbers.
        self.avals: list[Any] = []
        self.steps: list[_Step] = []
        self.constants: dict[int, Any] = {}
        # What is known of values.
        self.data: set[int] = set()  # depend on the data, or on other arrays that are not trained
        self.trained: set[int] = set()  # depend on parameters
        self.constant: set[int] = set()  # steps through which no gradient comes back
        self.views: dict[int, _View] = {}
        self.channels: dict[int, tuple[int, tuple[int | None, ...]]] = {}
        # What is known of parameters.
        self.uses: list[Use] = []
        self.biases: dict[int, list[tuple[int, Ops]]] = {}
        # Parameters that a step takes in another way than a layer, the step's results, the reason.
        self.refusals: list[tuple[int, tuple[int, ...], str]] = []

        arguments = self._new([var.aval for var in closed.jaxpr.invars])
        self.inputs = arguments[: len(paths)]
        self.trained.update(self.inputs)
        self.data.update(arguments[len(paths) :])
        for leaf, (number, shape) in enumerate(zip(self.inputs, self.leaf_shapes, strict=True)):
            self.views[number] = _View(leaf, (), shape, tuple(range(len(shape))))
        self.outputs = self._inline(closed.jaxpr, self._constant(closed.consts), arguments)
        for number in self.outputs:
            self._give_up(number, (number,), "is an output itself")
        # Which values the outputs depend on by a derivative, and how many steps read them so.
        self.live = set(self.outputs)
        self.readers = collections.Counter(self.outputs)
        for index, (_, operands, results) in reversed(list(enumerate(self.steps))):
            if index not in self.constant and not self.live.isdisjoint(results):
                self.live.update(operands)
                self.readers.update(operands)
        self.generic: dict[int, str] = {}
        for leaf, results, reason in self.refusals:
            if not self.live.isdisjoint(results):
                self.generic.setdefault(leaf, reason)

    def network(self, selected: Sequence[bool] | None) -> Network:
        return Network(
            tuple(self._blocks([True] * len(self.names) if selected is None else selected)),
            self.num_examples,
            tuple(tuple(getattr(aval, "shape", ())) for aval in self.avals),
            tuple(getattr(aval, "dtype", None) for aval in self.avals),
            tuple(self.steps),
            self.constants,
            self.inputs,
            tuple(self.outputs),
            self.output_tree,
        )

    # -- the flat program ------------------------------------------------------------------------

    def _new(self, avals: Sequence[Any]) -> tuple[int, ...]:
        self.avals.extend(avals)
        return tuple(range(len(self.avals) - len(avals), len(self.avals)))

    def _constant(self, values: Sequence[Any]) -> tuple[int, ...]:
        numbers = self._new([jax.typeof(value) for value in values])
        self.constants.update(zip(numbers, values, strict=True))
        self.data.update(numbers)
        return numbers

    def _shape(self, number: int) -> Shape:
        return tuple(self.avals[number].shape)

    def _inline(
        self, jaxpr: Jaxpr, constants: Sequence[int], arguments: Sequence[int]
    ) -> list[int]:
        """Appends the steps of a program; returns the numbers of its results."""
        env = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def number_of(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return env[atom]
            (number,) = self._new([atom.aval])
            self.constants[number] = atom.val
            return number

        for eqn in jaxpr.eqns:
            operands = tuple(map(number_of, eqn.invars))
            inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
            if inner is not None and any(number in self.views for number in operands):
                inner_constants: tuple[int, ...] = ()
                if isinstance(inner, ClosedJaxpr):
                    inner_constants, inner = self._constant(inner.consts), inner.jaxpr
                results = self._inline(inner, inner_constants, operands)
            else:
                results = self._append(eqn, jaxpr, operands)
            env.update(zip(eqn.outvars, results, strict=True))
        return [number_of(atom) for atom in jaxpr.outvars]

    def _append(self, eqn: JaxprEqn, jaxpr: Jaxpr, operands: tuple[int, ...]) -> list[int]:
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
        function = jaxpr_as_fun(ClosedJaxpr(single, ()))
        if eqn.primitive.name in _CONSTANT or not any(map(_has_derivative, eqn.outvars)):
            self.constant.add(len(self.steps))
        self.steps.append((function, tuple(arguments.values()), results))
        for known in (self.data, self.trained):
            if not known.isdisjoint(operands):
                known.update(results)
        self._match(eqn, operands, results)
        return list(results)

    # -- following parameters --------------------------------------------------------------------

    def _match(self, eqn: JaxprEqn, operands: tuple[int, ...], results: tuple[int, ...]) -> None:
        result = results[0] if results else -1
        if len(operands) == 1:
            self._move_channels(eqn, operands[0], result)
        views = [number for number in operands if number in self.views]
        matchers = {
            "dot_general": self._match_dense,
            "conv_general_dilated": self._match_convolution,
            "gather": self._match_embedding,
            **dict.fromkeys(("mul", "add", "add_any", "sub"), self._match_elementwise),
            **dict.fromkeys(_RULES, self._match_rule),
        }
        matcher = matchers.get(eqn.primitive.name, self._match_layout)
        if len(views) == 1 and matcher(eqn, operands, result):
            return
        name = eqn.primitive.name
        reason = f", {_REASONS[name]}" if name in _REASONS else ""
        for number in views:
            self._give_up(number, results, f"is used by `{name}`{reason}")

    def _give_up(self, number: int, results: tuple[int, ...], reason: str) -> None:
        if number in self.views:
            self.refusals.append((self.views[number].leaf, results, reason))

    def _match_rule(self, eqn: JaxprEqn, operands: tuple[int, ...], result: int) -> bool:
        """Follows a parameter through a rule that passes the gradient to it as it is."""
        (number,) = (number for number in operands if number in self.views)
        old, new = self.avals[number], self.avals[result]
        if len(eqn.outvars) != 1 or (old.shape, old.dtype) != (new.shape, new.dtype):
            return False
        function, arguments, _ = self.steps[-1]
        index = arguments.index(number)

        def pull(gradient: jax.Array, *values: jax.Array) -> jax.Array:
            def of_parameter(value: jax.Array) -> jax.Array:
                return function(*values[:index], value, *values[index + 1 :])[0]

            return jax.vjp(of_parameter, values[index])[1](gradient)[0]

        traced = jax.make_jaxpr(pull)(new, *(self.avals[n] for n in arguments)).jaxpr
        if traced.outvars[0] is not traced.invars[0]:
            return False
        self.views[result] = self.views[number]
        return True

    def _match_layout(self, eqn: JaxprEqn, operands: tuple[int, ...], result: int) -> bool:
        if len(operands) != 1:
            return False
        (operand,) = operands
        view = _follow(self.views[operand], eqn, self._shape(operand), self._shape(result))
        if view is None:
            return False
        if view.coefficient is not None:  # the same is done to the coefficient
            moved = self._new([self.avals[result]])
            self.steps.append((self.steps[-1][0], (view.coefficient,), moved))
            view = dataclasses.replace(view, coefficient=moved[0])
        self.views[result] = view
        return True

    def _move_channels(self, eqn: JaxprEqn, operand: int, result: int) -> None:
        """Follows the output of a layer, which a bias may be added to, through layouts."""
        if operand not in self.channels:
            return
        index, axes = self.channels[operand]
        old, new = self._shape(operand), self._shape(result)
        moved = _follow(_View(-1, (), old, tuple(range(len(old)))), eqn, old, new)
        if moved is not None and not moved.ops and math.prod(old) == math.prod(new):
            self.channels[result] = index, tuple(None if i is None else axes[i] for i in moved.axes)

    def _weight(self, number: int) -> _View | None:
        """The view of a parameter that a layer can have for its matrix."""
        view = self.views.get(number)
        if view is None or view.coefficient is not None or view.repeats(self._shape(number)):
            return None
        return view

    def _add_layer(self, use: Use) -> bool:
        rank = len(self._shape(use.output))
        order = {axis: i for i, axis in enumerate(use.channels)}
        self.channels[use.output] = len(self.uses), tuple(order.get(i) for i in range(rank))
        self.uses.append(use)
        self.data.add(use.output)
        return True

    def _per_example(self, number: int) -> bool:
        """Whether a value can be an activation, also a constant one: the first state of a loop."""
        return number in self.data or number not in self.trained

    def _match_dense(self, eqn: JaxprEqn, operands: tuple[int, ...], result: int) -> bool:
        side = int(operands[1] in self.views)
        weight, activation = operands[side], operands[1 - side]
        contracted, batch = eqn.params["dimension_numbers"]
        if (view := self._weight(weight)) is None or batch[0] or not self._per_example(activation):
            return False
        inputs, columns = (tuple(map(int, contracted[i])) for i in (side, 1 - side))
        outputs = [i for i in range(len(view.axes)) if i not in inputs]
        shape = self._shape(activation)
        rows = [i for i in range(len(shape)) if i not in columns]
        first = len(outputs) if side == 0 else 0
        output_rows = dict(zip(rows, range(first, first + len(rows)), strict=True))
        if (leading := self._example_axis(shape, rows)) is None:
            return False
        rows = [leading, *(i for i in rows if i != leading)]
        first = 0 if side == 0 else len(rows)
        return self._add_layer(
            Use(
                "dense",
                view.leaf,
                view.order(inputs, outputs),
                result,
                activation,
                columns=columns,
                rows=tuple(rows),
                output_rows=tuple(output_rows[i] for i in rows),
                channels=tuple(range(first, first + len(outputs))),
            )
        )

    def _match_convolution(self, eqn: JaxprEqn, operands: tuple[int, ...], result: int) -> bool:
        activation, weight = operands
        params, numbers = eqn.params, eqn.params["dimension_numbers"]
        if (view := self._weight(weight)) is None or not self._per_example(activation):
            return False
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            return False
        if self._example_axis(self._shape(activation), numbers.lhs_spec[:1]) is None:
            return False
        output, input_, *window = numbers.rhs_spec
        shape = self._shape(weight)
        geometry = {
            "lhs_spec": numbers.lhs_spec,
            "window": [shape[i] for i in window],
            "strides": params["window_strides"],
            "padding": params["padding"],
            "dilation": params["rhs_dilation"],
            "input_dilation": params["lhs_dilation"],
        }
        return self._add_layer(
            Use(
                "convolution",
                view.leaf,
                view.order((*window, input_), (output,)),
                result,
                activation,
                output_rows=(numbers.out_spec[0], *numbers.out_spec[2:]),
                channels=(numbers.out_spec[1],),
                geometry=tuple((name, tuple(value)) for name, value in geometry.items()),
            )
        )

    def _match_embedding(self, eqn: JaxprEqn, operands: tuple[int, ...], result: int) -> bool:
        table, indices = operands
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        if (view := self._weight(table)) is None or not self._per_example(indices):
            return False
        if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
            return False
        (axis,), shape = numbers.start_index_map, self._shape(table)
        whole = tuple(1 if i == axis else size for i, size in enumerate(shape))
        if tuple(numbers.collapsed_slice_dims) != (axis,) or tuple(sizes) != whole:
            return False
        channels = tuple(map(int, numbers.offset_dims))
        output_rows = [i for i in range(len(self._shape(result))) if i not in channels]
        leading = self._example_axis(self._shape(indices), range(len(output_rows)))
        if leading is None:
            return False
        rows = [leading, *(i for i in range(len(output_rows)) if i != leading)]
        return self._add_layer(
            Use(
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
            )
        )

    def _match_elementwise(self, eqn: JaxprEqn, operands: tuple[int, ...], result: int) -> bool:
        side = int(operands[1] in self.views)
        number, other = operands[side], operands[1 - side]
        view, old, new = self.views[number], self._shape(number), self._shape(result)
        product = eqn.primitive.name == "mul"
        sign = -1 if eqn.primitive.name == "sub" and side == 1 else 1
        shown = [i for i, axis in enumerate(view.axes) if axis is not None and old[i] == new[i]]
        repeated = [i for i in range(len(new)) if i not in shown]
        per_example = other in self.data and (
            old != new or view.repeats(old) or self.num_examples == 1
        )
        if not per_example:
            if old != new or sign < 0:
                return False
            # Still the parameter: scaled, by the variance of a batch for instance, or shifted.
            if product:
                coefficient = self._new([self.avals[result]])
                factors = (other, *(() if view.coefficient is None else (view.coefficient,)))
                self.steps.append((functools.partial(_product, new), factors, coefficient))
                view = dataclasses.replace(view, coefficient=coefficient[0])
            self.views[result] = view
            return True
        leading = self._example_axis(new, repeated)
        if leading is None:
            return False
        if not product and sign > 0 and view.coefficient is None and other in self.channels:
            self._note_bias(view, shown, other, new)
        self.uses.append(
            Use(
                "scale-shift",
                view.leaf,
                view.ops,
                result,
                other if product else None,
                output_rows=(leading, *(i for i in repeated if i != leading)),
                channels=tuple(shown),
                core_axes=tuple(view.axes[i] for i in shown),  # type: ignore[misc]
                coefficient=view.coefficient,
                sign=sign,
            )
        )
        return True

    def _note_bias(self, view: _View, shown: list[int], other: int, shape: Shape) -> None:
        """Notes that the use which follows may be the bias of the layer that gives ``other``."""
        index, channels = self.channels[other]
        layer = self.uses[index]
        if layer.kind == "embedding" or self._shape(other) != shape:
            return
        if len(view.axes) != len(shape):  # a scalar
            return
        if any(channels[i] is None and shape[i] > 1 for i in shown):
            return
        order = sorted((c, i) for i, c in enumerate(channels) if c is not None)
        axes = tuple(axis if i in shown else None for i, axis in enumerate(view.axes))
        ops = dataclasses.replace(view, axes=axes).order([i for _, i in order])
        if ops[-1][1] == layer.ops[-1][1][1:]:
            self.biases.setdefault(index, []).append((len(self.uses), ops))

    def _example_axis(self, shape: Shape, axes: Sequence[int]) -> int | None:
        """The axis over the examples: the first whose size is a multiple of their number."""
        return next((int(i) for i in axes if shape[i] and shape[i] % self.num_examples == 0), None)

    # -- blocks ----------------------------------------------------------------------------------

    def _blocks(self, selected: Sequence[bool]) -> Iterator[Block]:
        uses: dict[int, list[int]] = {leaf: [] for leaf in range(len(self.names))}
        for index, use in enumerate(self.uses):
            if use.output in self.live:
                uses[use.leaf].append(index)
        taken = {leaf for leaf, _, _ in self.refusals} | {use.leaf for use in self.uses}
        for leaf, indices in uses.items():
            if 0 in self.leaf_shapes[leaf]:
                self.generic[leaf] = "has no entries"
            kinds = sorted({self.uses[i].kind for i in indices})
            layouts = {self.uses[i].ops for i in indices}
            if not indices:
                self.generic.setdefault(leaf, "has no gradient" if leaf in taken else "is not used")
            elif len(kinds) > 1:
                self.generic.setdefault(leaf, f"is used as {' and as '.join(kinds)}")
            elif kinds != ["scale-shift"] and len(layouts) > 1:
                self.generic.setdefault(leaf, "is used in several layouts")

        joined = {
            leaf: found
            for leaf, indices in uses.items()
            if leaf not in self.generic
            and selected[leaf]
            and (found := self._bias_of(indices, uses)) is not None
            and selected[found[0]]
        }
        biases = {bias for bias, _ in joined.values()}
        for leaf, indices in uses.items():
            if leaf in biases or not selected[leaf]:
                continue
            leaves: tuple[int, ...] = (leaf,)
            own = tuple(self.uses[i] for i in indices)
            if leaf in joined:
                bias, ops = joined[leaf]
                leaves = (leaf, bias)
                own = tuple(dataclasses.replace(use, bias_ops=ops) for use in own)
            reason = self.generic.get(leaf, "")
            yield Block(
                "generic" if reason else own[0].kind,
                leaves,
                tuple(self.names[i] for i in leaves),
                tuple(self.leaf_shapes[i] for i in leaves),
                () if reason else own,
                reason,
            )

    def _bias_of(self, indices: list[int], uses: dict[int, list[int]]) -> tuple[int, Ops] | None:
        """The bias that is added in every one of a layer's uses, and nowhere else."""
        found = [
            [
                (shift, ops)
                for shift, ops in self.biases.get(i, [])
                if self.uses[shift].output in self.live
            ]
            for i in indices
        ]
        if any(len(candidates) != 1 for candidates in found):
            return None
        shifts = [shift for ((shift, _),) in found]
        partners = {(self.uses[shift].leaf, ops) for ((shift, ops),) in found}
        if len(partners) != 1:
            return None
        ((bias, ops),) = partners
        # The gradient of the bias is the layer's only if nothing else reads the layer's output.
        only_reader = all(
            self.readers[number] == 1
            for number, (index, _) in self.channels.items()
            if index in indices
        )
        if bias in self.generic or sorted(shifts) != uses[bias] or not only_reader:
            return None
        return bias, ops


def _has_derivative(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", np.int32), jnp.inexact)


def _product(shape: Shape, *factors: jax.Array) -> tuple[jax.Array]:
    return (jnp.broadcast_to(math.prod(factors), shape),)


def count_examples(outputs: chex.ArrayTree) -> int:
    """The number of examples of a batch: the leading axis of the outputs.

    Raises:
      ValueError: the outputs have no common leading axis, or it is empty.
    """
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(outputs)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            "K-FAC counts examples along the leading axis of the outputs of `predict`, which must "
            f"be one for all outputs, and not empty; got the shapes {shapes}."
        )
    return sizes.pop()


def report(blocks: Sequence[Block]) -> str:
    """A readable report: one line for each block."""
    lines = [("parameters", "kind", "approximation")]
    for block in blocks:
        names = ", ".join(block.names)
        if block.kronecker:
            rows, columns = block.matrix_shape
            how = f"{rows} x {columns} Kronecker"
            if len(block.uses) > 1:
                how += f", {len(block.uses)} uses"
        elif block.kind == "generic":
            how = f"diagonal of batch gradients: {block.reason}"
        else:
            how = "exact diagonal"
        lines.append((names, block.kind, how))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines)
