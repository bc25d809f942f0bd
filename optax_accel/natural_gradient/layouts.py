"""Parameters in another layout: reshaped, transposed, repeated along some axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

Shape: TypeAlias = tuple[int, ...]
# Reshapes and transpositions, applied in this order.
Ops: TypeAlias = tuple[tuple[str, Shape], ...]

# Primitives whose result is their operand, as far as shapes and derivatives are concerned.
_IDENTITIES = {
    *("convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint"),
    *("pvary", "pcast", "reshard", "mesh_cast", "optimization_barrier"),
}


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


def simplified(ops: Ops, shape: Shape) -> Ops:
    """The same operations on an array of a shape, without those that change nothing."""
    kept: list[tuple[str, Shape]] = []
    for name, argument in ops:
        if name == "reshape":
            if argument != shape:
                kept.append((name, argument))
            shape = argument
            continue
        shape = tuple(shape[i] for i in argument)
        if kept and kept[-1][0] == "transpose":
            argument = tuple(kept.pop()[1][i] for i in argument)
        if argument != tuple(range(len(argument))):
            kept.append((name, argument))
    return tuple(kept)


@dataclasses.dataclass(frozen=True)
class View:
    """A value that is a parameter in another layout, repeated along some axes.

    Attributes:
      leaf: index of the parameter.
      ops: lead from the parameter to its core, an array with the same entries.
      core: the core's shape.
      axes: for each axis of the value the axis of the core that it shows, or None.
      coefficient: the number of the value by which the entries are multiplied, if there is one.
    """

    leaf: int
    ops: Ops
    core: Shape
    axes: tuple[int | None, ...]
    coefficient: int | None = None

    def repeats(self, shape: Shape) -> bool:
        """Whether the value, of the given shape, shows entries of the parameter several times."""
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

    def follow(self, eqn: JaxprEqn, old: Shape, new: Shape) -> View | None:
        """The view of the result of an operation on the value; None if it is not a layout."""
        name, params = eqn.primitive.name, eqn.params
        if name == "convert_element_type" and not jnp.issubdtype(params["new_dtype"], jnp.floating):
            return None  # integers have no derivative, complex numbers a different one
        if name in _IDENTITIES:
            return self
        if name == "transpose":
            return self._with_axes(params["permutation"])
        if name == "squeeze":
            return self._with_axes([i for i in range(len(old)) if i not in params["dimensions"]])
        if name == "broadcast_in_dim":
            sources: list[int | None] = [None] * len(new)
            for i, j in enumerate(params["broadcast_dimensions"]):
                if old[i] == new[j]:
                    sources[j] = i
            return self._with_axes(sources)
        if name == "reshape" and params.get("dimensions") is None:
            if (kept := _same_but_ones(old, new)) is not None:
                return self._with_axes(kept)
            if not self.repeats(old):
                ops = self.order(*((i,) for i in range(len(old))))
                return dataclasses.replace(
                    self, ops=(*ops[:-1], ("reshape", new)), core=new, axes=tuple(range(len(new)))
                )
        return None

    def _with_axes(self, sources: Sequence[int | None]) -> View:
        """The view whose axes are these axes of the value, or new ones (None)."""
        axes = tuple(None if i is None else self.axes[i] for i in sources)
        return dataclasses.replace(self, axes=axes)


def _same_but_ones(old: Shape, new: Shape) -> list[int | None] | None:
    """For each new axis the old one, if a reshape only adds and removes axes of size 1."""
    longer = [i for i, size in enumerate(old) if size != 1]
    if [old[i] for i in longer] != [size for size in new if size != 1]:
        return None
    remaining = iter(longer)
    return [None if size == 1 else next(remaining) for size in new]
