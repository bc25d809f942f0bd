"""What is known of the layers of a network: uses of parameters, blocks, the network itself.

A block is of one of these kinds:

=================  ==============================================================================
``dense``          ``dot_general`` with an activation, any number of contracted, kept and batch axes
``convolution``    ``conv_general_dilated``: any stride, padding, dilation and number of groups
``embedding``      ``gather`` of whole slices along one axis
``tied``           a matrix used as embedding and as (transposed) weight, or also transposed
``scale-shift``    a product or a sum that repeats the parameter over the examples (normalization)
``generic``        everything else: the parameter is used in other ways
=================  ==============================================================================

A parameter may be a stack of matrices: scanned by a loop or indexed (layers), numbered by a batch
axis of the ``dot_general`` (heads, experts), or the groups of a convolution.  Its block then has a
matrix for each slice, with factors of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_accel.natural_gradient._least_squares import pseudoinverse
from optax_accel.natural_gradient.layouts import Ops, Shape, Slot, inverse, lay_out
from optax_accel.natural_gradient.program import Program


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter. Numbers are those of values of the program.

    Attributes:
      kind: of the layer, every one in the table above but ``generic``.
      leaf: index of the parameter.
      ops: from the parameter to a matrix (inputs, outputs) or a stack of them, or to the core of a
        scale or shift.
      output: the value at which the gradient is taken.
      input: the activation; None for a shift.
      columns: axes of the activation (dense) that are contracted, in the order of the matrix' rows.
      rows: its other axes; of a convolution those over iterations that share the parameter.
      output_rows: the axes of ``output`` that correspond to ``rows``, the one over the examples
        first.
      outer: how many positions stand before the examples in the axis over these, where both are one
        axis (time before examples): it is ``(outer, examples, rest)``.
      channels: the other axes of ``output``, in the order of the matrix' columns; for a scale or
        shift, in the order of the axes of the core that ``core_axes`` names.
      core_axes: of a scale or shift, the axes of the core that ``channels`` show.
      geometry: parameters of a convolution; of an embedding whether indices out of bounds are
        clipped (else they are dropped).
      coefficient: a further factor of a scale or shift, or None.
      sign: of a shift, or of a term of the layer's weight.
      bias_ops: from the bias to a vector of outputs, or a stack of them, if there is a bias.
      transposed: whether its matrix is that of the block with inputs and outputs exchanged.
      stack: axes of the activation that number the slices of the parameter; first those that
        ``slot`` numbers.
      output_stack: the same axes of ``output``.
      groups: of a convolution.
      slot: which slice of the parameter this is, or which slices the first axes of the stack are,
        if it is not all of them.
      loops: of the parameter's slice in a loop the axis of the core, and the depth of the loop;
        empty outside of loops.
      scales: values with equal entries by which the weight is multiplied.
      left: of a factor of the layer's weight (``optax_accel.natural_gradient.effective``) the
        matrices that stand on its left, each the number of a value and operations on it, in the
        order in which inputs meet them.
      right: those on its right, in the order in which gradients meet them.
    """

    kind: str
    leaf: int
    ops: Ops
    output: int
    input: int | None = None
    columns: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    output_rows: tuple[int, ...] = ()
    outer: int = 1
    channels: tuple[int, ...] = ()
    core_axes: tuple[int, ...] = ()
    geometry: tuple[tuple[str, Any], ...] = ()
    coefficient: int | None = None
    sign: int = 1
    bias_ops: Ops = ()
    transposed: bool = False
    stack: tuple[int, ...] = ()
    output_stack: tuple[int, ...] = ()
    groups: int = 1
    slot: Slot | None = None
    loops: tuple[tuple[int, int], ...] = ()
    scales: tuple[int, ...] = ()
    left: tuple[tuple[int, Ops], ...] = ()
    right: tuple[tuple[int, Ops], ...] = ()

    @property
    def stacked(self) -> bool:
        """Whether the parameter is a stack of matrices."""
        return self.kind != "scale-shift" and len(self.ops[-1][1]) == 3

    def read(self) -> list[int]:
        """The values that are needed of an evaluation."""
        numbers = [self.input, self.coefficient, self.slot and self.slot.number, *self.scales]
        numbers += [number for number, _ in (*self.left, *self.right)]
        return [number for number in numbers if number is not None]


@dataclasses.dataclass(frozen=True)
class Block:
    """Parameters whose curvature is approximated together.

    Attributes:
      kind: one of those in the table above.
      leaves: indices of the parameters: the weight and, if it has one, the bias.
      names: their paths.
      shapes: their shapes.
      uses: what the curvature is the sum of; empty for a generic block.
      reason: why a block is generic.
      function: of all parameters, where the layer's weight is computed from those of the block: the
        weight.
    """

    kind: str
    leaves: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    uses: tuple[Use, ...] = ()
    reason: str = ""
    function: Callable[[Sequence[Any]], Any] | None = dataclasses.field(default=None, compare=False)

    @property
    def kronecker(self) -> bool:
        """Whether the block is a matrix with an input and an output side."""
        return self.kind in ("dense", "convolution", "embedding", "tied")

    @property
    def has_bias(self) -> bool:
        """Whether its last row is a bias."""
        return bool(self.uses) and bool(self.uses[0].bias_ops)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Inputs (with the bias) and outputs."""
        *_, rows, columns = self.uses[0].ops[-1][1]
        return rows + self.has_bias, columns

    @property
    def num_slices(self) -> int | None:
        """How many matrices are stacked; None for a single one."""
        return self.uses[0].ops[-1][1][0] if self.stacked else None

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices, which the factors have a leading axis for."""
        return self.kronecker and self.uses[0].stacked

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a state depends on."""
        layout = (self.uses[0].ops, self.uses[0].bias_ops) if self.kronecker else ()
        return self.kind, self.names, self.shapes, layout, self.function is not None

    def parts(self) -> list[tuple[Block, bool]]:
        """A block for each way of using a tied matrix, and whether it is transposed there."""
        ways = {(use.kind, use.transposed): None for use in self.uses}
        return [
            (
                dataclasses.replace(
                    self,
                    kind=kind,
                    uses=tuple(u for u in self.uses if (u.kind, u.transposed) == (kind, turned)),
                ),
                turned,
            )
            for kind, turned in ways
        ]

    def to_matrix(self, leaves: Mapping[int, Any], params: Sequence[Any] = ()) -> jax.Array:
        """The block's part of a tree like the gradient: ``(*slices, inputs, outputs)``.

        Args:
          leaves: of the tree, by index.
          params: all parameters; only for a weight that is computed from them.
        """
        use = self.uses[0]
        if self.function is not None:
            push, pull = self._derivatives(params)
            gradient = {i: leaves[i] for i in self.leaves}
            return lay_out(pseudoinverse(pull, push, gradient), use.ops)
        matrix = lay_out(leaves[self.leaves[0]], use.ops)
        if self.has_bias:
            bias = lay_out(leaves[self.leaves[1]], use.bias_ops)
            bias = bias.astype(matrix.dtype)[..., None, :]
            matrix = jnp.concatenate([matrix, bias], axis=-2)
        return matrix

    def from_matrix(self, matrix: jax.Array, params: Sequence[Any] = ()) -> list[jax.Array]:
        """From a change of the matrix to one of each of the block's leaves; arguments as above."""
        use, rows = self.uses[0], self.matrix_shape[0] - self.has_bias
        if self.function is not None:
            push, pull = self._derivatives(params)
            shape = jax.eval_shape(self.function, params).shape
            change = pseudoinverse(push, pull, lay_out(matrix, inverse(use.ops, shape)))
            return [change[i] for i in self.leaves]
        parts = [lay_out(matrix[..., :rows, :], inverse(use.ops, self.shapes[0]))]
        if self.has_bias:
            parts.append(lay_out(matrix[..., rows, :], inverse(use.bias_ops, self.shapes[1])))
        return parts

    def _derivatives(self, params: Sequence[Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The derivative of the weight with respect to the block's leaves, and its transpose."""
        function = self.function
        assert function is not None

        def weight(chosen: dict[int, Any]) -> Any:
            return function([chosen.get(i, leaf) for i, leaf in enumerate(params)])

        point = {i: jnp.asarray(params[i]) for i in self.leaves}
        value, linear = jax.linearize(weight, point)
        transposed = jax.linear_transpose(linear, point)

        def push(change: dict[int, jax.Array]) -> jax.Array:
            narrow = {i: leaf.astype(point[i].dtype) for i, leaf in change.items()}
            return linear(narrow).astype(jnp.result_type(*change.values()))

        def pull(gradient: jax.Array) -> dict[int, jax.Array]:
            (leaves,) = transposed(gradient.astype(value.dtype))
            return jax.tree.map(lambda leaf: leaf.astype(gradient.dtype), leaves)

        return push, pull


@dataclasses.dataclass(frozen=True)
class Network:
    """The program of ``predict``, with the layers found in it.

    Attributes:
      blocks: of the parameters, in their order; none for those that were not selected.
      num_examples: the leading axis of the outputs.
      program: maps the parameters to the leaves of the outputs.
      output_tree: the structure of the outputs.
    """

    blocks: tuple[Block, ...]
    num_examples: int
    program: Program
    output_tree: Any

    def capture(
        self, leaves: Sequence[jax.Array], vary: Callable[[chex.ArrayTree], chex.ArrayTree]
    ) -> tuple[chex.ArrayTree, Callable[[chex.ArrayTree], Any], dict[int, Any]]:
        """Evaluates the network where its layers can be read.

        Activations and the gradients at the layers' outputs come from one evaluation of the
        program with a tap at each output, and its pullback.  Every equation is evaluated as it
        stands, so that the gradients are those of ``jax.grad``, with the user's rules.

        Args:
          leaves: the parameters.
          vary: marks what differs between replicas (:func:`optax_accel._means.vary_over`).

        Returns:
          The outputs; the pullback from gradients at the outputs to a pair: those at the layers'
          outputs, by number, and those of the generic blocks' parameters, by index; the values that
          the uses name, by number.
        """
        uses = [use for block in self.blocks for use in block.uses]
        read = {n for use in uses for n in use.read()}

        def evaluate(taps: dict[int, jax.Array], generic: dict[int, jax.Array]) -> Any:
            tapped = [generic.get(index, leaf) for index, leaf in enumerate(leaves)]
            outputs, values = self.program.evaluate(tapped, taps, read)
            return jax.tree.unflatten(self.output_tree, outputs), values

        taps = {n: self.program.zeros(n) for n in dict.fromkeys(use.output for use in uses)}
        generic = {b.leaves[0]: leaves[b.leaves[0]] for b in self.blocks if b.kind == "generic"}
        outputs, pullback, values = jax.vjp(evaluate, vary(taps), vary(generic), has_aux=True)
        return outputs, pullback, values
