"""Parameters in another layout: reshaped, transposed, sliced, repeated along some axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

Shape: TypeAlias = tuple[int, ...]
# Reshapes, transpositions and reversals of axes, applied in this order.
Ops: TypeAlias = tuple[tuple[str, Shape], ...]

# Primitives whose result is their operand, as far as shapes and derivatives are concerned.
_IDENTITIES = {
    *("convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint"),
    *("pvary", "pcast", "reshard", "mesh_cast", "optimization_barrier"),
}


def lay_out(x: Any, ops: Ops) -> Any:
    """Applies reshapes, transpositions and reversals to an array."""
    for name, argument in ops:
        if name == "rev":
            x = jnp.flip(x, argument)
        else:
            x = x.reshape(argument) if name == "reshape" else x.transpose(argument)
    return x


def inverse(ops: Ops, shape: Shape) -> Ops:
    """The operations that undo ``ops`` on an array that had the given shape."""
    undo: list[tuple[str, Shape]] = []
    for name, argument in ops:
        if name == "reshape":
            undo.append(("reshape", shape))
            shape = argument
        elif name == "rev":
            undo.append((name, argument))
        else:
            undo.append(("transpose", tuple(int(i) for i in np.argsort(argument))))
            shape = tuple(shape[i] for i in argument)
    return tuple(reversed(undo))


def simplified(ops: Ops, shape: Shape) -> Ops:
    """The same operations on an array of a shape, without those that change nothing."""
    kept: list[tuple[str, Shape]] = []
    shapes = [shape]  # in front of each of them, and behind the last
    for name, argument in ops:
        if kept and kept[-1][0] == name != "rev":  # two in one
            _, last = kept.pop()
            shapes.pop()
            if name == "transpose":
                argument = tuple(last[i] for i in argument)
        before, after, changes = shapes[-1], shapes[-1], True
        if name == "reshape":
            after, changes = argument, argument != before
        elif name == "transpose":
            after = tuple(before[i] for i in argument)
            changes = argument != tuple(range(len(before)))
        if changes:
            kept.append((name, argument))
            shapes.append(after)
    return tuple(kept)


class Slot(NamedTuple):
    """Which slice of a stack a value is.

    Attributes:
      axis: of the core, along which the slices lie.
      size: how many there are.
      position: of the slice, where it is known; else None.
      number: of the value that holds the position, where it is computed; else None.
    """

    axis: int
    size: int
    position: int | None
    number: int | None


@dataclasses.dataclass(frozen=True)
class View:
    """A value that is a parameter in another layout, or a slice of it, repeated along some axes.

    Attributes:
      leaf: index of the parameter.
      ops: lead from the parameter to its core, an array with the same entries.
      core: the core's shape.
      axes: for each axis of the value the axis of the core that it shows, or None.
      coefficient: the number of the value by which the entries are multiplied, if there is one.
      uniform: whether all entries of the coefficient are the same.
      slot: which slice the value is, where it was taken by its position.
      loops: the axes of the core of which the value is the slice of one iteration, each with the
        depth of the loop that scans it; the outermost first.
    """

    leaf: int
    ops: Ops
    core: Shape
    axes: tuple[int | None, ...]
    coefficient: int | None = None
    uniform: bool = True
    slot: Slot | None = None
    loops: tuple[tuple[int, int], ...] = ()

    @property
    def sliced(self) -> tuple[int, ...]:
        """The axes of the core of which the value is one slice."""
        return (
            *(() if self.slot is None else (self.slot.axis,)),
            *(axis for axis, _ in self.loops),
        )

    def repeats(self, shape: Shape) -> bool:
        """Whether the value, of the given shape, shows entries of the parameter several times."""
        entries = math.prod(n for i, n in enumerate(self.core) if i not in self.sliced)
        return math.prod(shape) != entries

    def order(self, *groups: Sequence[int], stack: Sequence[int] = ()) -> Ops:
        """From the parameter to an array with one axis for each group of the value's axes.

        Args:
          groups: of axes.
          stack: axes that number matrices. In front of the groups there is one axis for these and
            those of which the value is a slice, if there are any.
        """
        ops, sizes = self._order((stack, *groups))
        count = len(self.sliced)
        stacked = (math.prod(sizes[: count + 1]),) if count or len(stack) else ()
        return (*ops, ("reshape", (*stacked, *sizes[count + 1 :])))

    def _order(self, groups: Sequence[Sequence[int]]) -> tuple[Ops, Shape]:
        """To an array whose axes are sliced ones, then those of the groups; and their sizes."""
        shown = [self.axes[i] for group in groups for i in group]
        order = [*self.sliced, *(axis for axis in shown if axis is not None)]
        order += [i for i in range(len(self.core)) if i not in order]  # of size 1
        sizes = [self.core[axis] for axis in self.sliced]
        sizes += [
            math.prod(self.core[a] for i in group if (a := self.axes[i]) is not None)
            for group in groups
        ]
        return (*self.ops, ("transpose", tuple(order))), tuple(sizes)

    def slice(self, axis: int, position: int | None, number: int | None = None) -> View | None:
        """The view of one slice along an axis of the value, which then has the size 1.

        Args:
          axis: of the value.
          position: of the slice, if it is known.
          number: of the value that holds it, if it is computed.
        """
        shown = self.axes[axis]
        axes = (*self.axes[:axis], None, *self.axes[axis + 1 :])
        if shown is None:
            return dataclasses.replace(self, axes=axes)
        if self.coefficient is not None:
            return None
        slot = Slot(shown, self.core[shown], position, number)
        view = dataclasses.replace(self, axes=axes, slot=slot)
        return view if self.slot is None else view._of_a_slice(self.slot)

    def _of_a_slice(self, outer: Slot) -> View | None:
        """The view of a slice of a slice, both at known positions, as one slice of a flat stack."""
        own = self.slot
        assert own is not None
        if own.position is None or outer.position is None:
            return None
        rest = [i for i in range(len(self.core)) if i not in (outer.axis, own.axis)]
        place = {axis: i for i, axis in enumerate(rest, 1)}
        size = outer.size * own.size
        core = (size, *(self.core[i] for i in rest))
        return dataclasses.replace(
            self,
            ops=(*self.ops, ("transpose", (outer.axis, own.axis, *rest)), ("reshape", core)),
            core=core,
            axes=tuple(None if axis is None else place[axis] for axis in self.axes),
            slot=Slot(0, size, outer.position * own.size + own.position, None),
            loops=tuple((place[axis], depth) for axis, depth in self.loops),
        )

    def without(self, axis: int) -> View:
        """The view of the value without an axis of size 1."""
        return dataclasses.replace(self, axes=(*self.axes[:axis], *self.axes[axis + 1 :]))

    def split(self, axis: int, count: int, shape: Shape) -> View:
        """The view of the value with one axis as two, the first of this size.

        Args:
          axis: of the value.
          count: size of the first of the two.
          shape: of the value, which repeats nothing.
        """
        two = count, shape[axis] // count
        return self._reshaped(shape, (*shape[:axis], *two, *shape[axis + 1 :]))

    def iteration(self, depth: int) -> View:
        """The view of what one iteration of a loop sees of a value scanned along its first axis."""
        shown, *axes = self.axes
        loops = self.loops if shown is None else (*self.loops, (shown, depth))
        return dataclasses.replace(self, axes=tuple(axes), loops=loops)

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
                return self._reshaped(old, new)
        if name == "rev":
            reversed_ = tuple(a for i in params["dimensions"] if (a := self.axes[i]) is not None)
            return dataclasses.replace(self, ops=(*self.ops, ("rev", reversed_)))
        if name == "slice":
            part = [i for i in range(len(old)) if old[i] != new[i]]
            view: View | None = self
            for i in part:
                if new[i] != 1 or view is None:
                    return None
                view = view.slice(i, params["start_indices"][i])
            return view
        return None

    def _reshaped(self, old: Shape, new: Shape) -> View:
        """The view after a reshape: of a new core, whose first axes are the sliced ones."""
        ops, sizes = self._order([(i,) for i in range(len(old))])
        sliced, count = sizes[: len(self.sliced)], len(self.sliced)
        first = int(self.slot is not None)
        return dataclasses.replace(
            self,
            ops=(*ops, ("reshape", (*sliced, *new))),
            core=(*sliced, *new),
            axes=tuple(range(count, count + len(new))),
            slot=None if self.slot is None else self.slot._replace(axis=0),
            loops=tuple((first + i, depth) for i, (_, depth) in enumerate(self.loops)),
        )

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
