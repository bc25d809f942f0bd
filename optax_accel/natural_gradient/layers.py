"""What is known of the layers of a network: uses of parameters, blocks, the network itself.

A block is of one of these kinds:

=================  ==============================================================================
``dense``          ``dot_general`` with an activation, any number of contracted and kept axes
``convolution``    ``conv_general_dilated`` in one group: any stride, padding and dilation
``embedding``      ``gather`` of whole slices along one axis
``tied``           a matrix used as embedding and as (transposed) weight, or also transposed
``scale-shift``    a product or a sum that repeats the parameter over the examples (normalization)
``generic``        everything else: the parameter is used in other ways, or inside a loop
=================  ==============================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_accel.natural_gradient.layouts import Ops, Shape, inverse, lay_out
from optax_accel.natural_gradient.program import Program


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter. Numbers are those of values of the program.

    Attributes:
      kind: of the layer, every one in the table above but ``generic``.
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
      core_axes: of a scale or shift, the axes of the core that ``channels`` show.
      geometry: parameters of a convolution; of an embedding whether indices out of bounds are
        clipped (else they are dropped).
      coefficient: a further factor of a scale or shift, or None.
      sign: of a shift.
      bias_ops: from the bias to a vector of outputs, if there is a bias.
      transposed: whether its matrix is that of the block with inputs and outputs exchanged.
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
    transposed: bool = False


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
        return self.kind in ("dense", "convolution", "embedding", "tied")

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
        read = {n for use in uses for n in (use.input, use.coefficient) if n is not None}

        def evaluate(taps: dict[int, jax.Array], generic: dict[int, jax.Array]) -> Any:
            tapped = [generic.get(index, leaf) for index, leaf in enumerate(leaves)]
            outputs, values = self.program.evaluate(tapped, taps, read)
            return jax.tree.unflatten(self.output_tree, outputs), values

        taps = {n: self.program.zeros(n) for n in dict.fromkeys(use.output for use in uses)}
        generic = {b.leaves[0]: leaves[b.leaves[0]] for b in self.blocks if b.kind == "generic"}
        outputs, pullback, values = jax.vjp(evaluate, vary(taps), vary(generic), has_aux=True)
        return outputs, pullback, values
