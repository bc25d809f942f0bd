"""Where the axis over the examples lies in each value of a program, traced back from its outputs.

The leading axis of a network's outputs numbers the examples.  Every operation says which axis of
its operands an axis of its result is (a transposition, a reshape, the rows of a matrix product),
so that this axis can be traced back to every value from which the outputs are computed example by
example.  Sizes alone prove nothing: a frozen matrix may have as many rows as a batch has examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var


class Part(NamedTuple):
    """A part of an axis: the axis reshaped to ``(outer, size, rest)``.

    Attributes:
      axis: of a value.
      outer: how many positions of the axis stand before the part.
      size: of the part.
    """

    axis: int
    outer: int
    size: int


# The axis over the examples as parts of axes, the slowest first; mostly it is one.
Place: TypeAlias = tuple[Part, ...]
# One place for each way to the outputs on which the axis is somewhere else.
Places: TypeAlias = frozenset[Place]
NOWHERE: Places = frozenset()

# Operations on matrices, which are numbered by all axes but the last two.
_LINEAR_ALGEBRA = ("cholesky", "eig", "eigh", "lu", "qr", "svd", "triangular_solve", "householder")
# Operations whose inside is hidden.
_HIDDEN = ("pure_callback", "io_callback", "ffi_call", "all_to_all", "all_gather", "reduce_scatter")


def of_outputs(num_examples: int, num_outputs: int) -> list[Places]:
    """The places of the examples in a network's outputs: all of their leading axis."""
    return [frozenset({(Part(0, 1, num_examples),)})] * num_outputs


def trace_back(jaxpr: Jaxpr, outputs: Sequence[Places]) -> dict[Var, Places]:
    """The places of the examples in every value of a program, from those in its outputs."""
    found: dict[Var, Places] = {}

    def add(atoms: Sequence[Any], places: Sequence[Places]) -> None:
        for atom, some in zip(atoms, places, strict=True):
            if some and not isinstance(atom, Literal):
                found[atom] = found.get(atom, NOWHERE) | some

    add(jaxpr.outvars, outputs)
    for eqn in reversed(jaxpr.eqns):
        results = [found.get(var, NOWHERE) for var in eqn.outvars]
        if any(results):
            add(eqn.invars, _through(eqn, results))
    return found


def of_iteration(eqn: JaxprEqn, results: Sequence[Places]) -> list[Places]:
    """The places in the results of one iteration of a ``scan``, from those in the loop's."""
    count, first = eqn.params["num_carry"], eqn.params["num_consts"]
    carries = list(results[:count])
    stacked = [_moved(places, -1) for places in results[count:]]
    while True:
        before = _into(eqn.params["jaxpr"], [*carries, *stacked])[first : first + count]
        grown = [one | other for one, other in zip(carries, before, strict=True)]
        if grown == carries:
            return [*carries, *stacked]
        carries = grown


def _through(eqn: JaxprEqn, results: Sequence[Places]) -> list[Places]:
    """The places in the operands of an operation, from those in its results."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        iteration = of_iteration(eqn, results)
        first, count = params["num_consts"], params["num_carry"]
        inside = _into(params["jaxpr"], iteration)
        # The examples may be the iterations themselves.
        whole = frozenset(p for places in results[count:] for p in places if p[0].axis == 0)
        whole = frozenset(p for p in whole if len(p) == 1)
        scanned = [_moved(places, 1) | whole for places in inside[first + count :]]
        return [*inside[:first], *iteration[:count], *scanned]
    if name == "while":
        skipped, first = params["cond_nconsts"], params["body_nconsts"]
        carries = list(results)
        while True:
            inside = _into(params["body_jaxpr"], carries)
            grown = [a | b for a, b in zip(carries, inside[first:], strict=True)]
            if grown == carries:
                return [NOWHERE] * skipped + inside[:first] + carries
            carries = grown
    if name == "cond":
        branches = [_into(branch, results) for branch in params["branches"]]
        return [NOWHERE, *(NOWHERE.union(*some) for some in zip(*branches, strict=True))]
    programs = [p for p in params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    if programs and name in ("shard_map", "pallas_call"):
        return [NOWHERE] * len(eqn.invars)
    if programs and not name.startswith(("reduce", "scatter", "cum", "sort")):
        inner = programs[0].jaxpr if isinstance(programs[0], ClosedJaxpr) else programs[0]
        same = len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(results)
        return _into(inner, results) if same else [NOWHERE] * len(eqn.invars)
    operands: list[set[Place]] = [set() for _ in eqn.invars]
    for i, places in enumerate(results):
        for number, operand in enumerate(operands):
            operand.update(filter(None, (_step(eqn, i, number, place) for place in places)))
    return [frozenset(places) for places in operands]


def _into(program: Jaxpr | ClosedJaxpr, results: Sequence[Places]) -> list[Places]:
    """The places in the arguments of a program, from those in its results."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    found = trace_back(jaxpr, results)
    return [found.get(var, NOWHERE) for var in jaxpr.invars]


def _moved(places: Places, by: int) -> Places:
    """Places where there is one axis more, or one less, in front."""
    moved = (tuple(part._replace(axis=part.axis + by) for part in place) for place in places)
    return frozenset(place for place in moved if all(part.axis >= 0 for part in place))


def _step(eqn: JaxprEqn, result: int, operand: int, place: Place) -> Place | None:
    """The place in one operand from that in one result; None if it is not there."""
    old, new = _shape(eqn.invars[operand]), _shape(eqn.outvars[result])
    if eqn.primitive.name == "reshape" and operand == 0 and eqn.params["dimensions"] is None:
        return _reshaped(place, new, old)
    axes, start = _axes(eqn, operand, old, new), _start(eqn, result, operand)
    parts = []
    for axis, outer, size in place:
        if (of := axes.get(axis)) is None:
            return None
        if old[of] != new[axis]:
            block = new[axis] // outer  # whole blocks are taken
            offset = start.get(axis)
            if offset is None or offset % block or old[of] % block:
                return None
            outer = old[of] // block
        parts.append(Part(of, outer, size))
    return tuple(parts)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _start(eqn: JaxprEqn, result: int, operand: int) -> dict[int, int]:
    """Where, along an axis, an operation begins to take or to put a part."""
    params = eqn.params
    match eqn.primitive.name:
        case "slice":
            strides = params["strides"] or (1,) * len(params["start_indices"])
            starts = enumerate(zip(params["start_indices"], strides, strict=True))
            return {axis: start for axis, (start, stride) in starts if stride == 1}
        case "split":
            return {params["axis"]: sum(params["sizes"][:result])}
        case "concatenate":
            axis = params["dimension"]
            return {axis: sum(_shape(var)[axis] for var in eqn.invars[:operand])}
    return {}


def _axes(
    eqn: JaxprEqn, operand: int, old: tuple[int, ...], new: tuple[int, ...]
) -> dict[int, int]:
    """For axes of a result the axes of an operand that they are."""
    params, name = eqn.params, eqn.primitive.name
    match name:
        case "transpose":
            return dict(enumerate(params["permutation"]))
        case "broadcast_in_dim":
            shown = params["broadcast_dimensions"] if operand == 0 else ()
            return {int(axis): i for i, axis in enumerate(shown)}
        case "squeeze":
            return _without(params["dimensions"], len(old))
        case "unstack":
            return _without([params["axis"]], len(old))
        case "stack":
            return {i + (i >= params["axis"]): i for i in range(len(old))}
        case "dot_general":
            return _of_product(params["dimension_numbers"], operand, eqn)
        case "conv_general_dilated":
            numbers = params["dimension_numbers"]
            ungrouped = operand == 0 and params["batch_group_count"] == 1
            return {numbers.out_spec[0]: numbers.lhs_spec[0]} if ungrouped else {}
        case "gather":
            return _of_gather(params["dimension_numbers"], operand, old, new)
        case "sort":
            return {i: i for i in range(len(old)) if i != params["dimension"]}
        case "fft":
            return {i: i for i in range(len(old) - len(params["fft_lengths"]))}
    if name.startswith(("reduce_window", "select_and")):
        window = params.get("window_dimensions", ())
        return {i: i for i, size in enumerate(window) if size == 1 and len(old) == len(new)}
    if len(old) > len(new) and (name.startswith("reduce") or name in ("argmax", "argmin")):
        return _without(params.get("axes", params.get("dimensions", ())), len(old))
    if name.startswith("scatter"):
        return _of_scatter(params["dimension_numbers"], operand, old, new)
    if name in _HIDDEN:
        return {}
    same = min(len(old), len(new)) - 2 if name in _LINEAR_ALGEBRA else len(old)
    return {i: i for i in range(same)} if len(old) == len(new) else {}


def _without(dropped: Sequence[int], rank: int) -> dict[int, int]:
    return dict(enumerate(i for i in range(rank) if i not in dropped))


def _of_product(numbers: Any, operand: int, eqn: JaxprEqn) -> dict[int, int]:
    contracted, batch = numbers
    free = [
        [i for i in range(len(_shape(eqn.invars[side]))) if i not in (*contracted[side], *axes)]
        for side, axes in enumerate(batch)
    ]
    first = len(batch[0]) + (len(free[0]) if operand == 1 else 0)
    return dict(enumerate(map(int, batch[operand]))) | dict(enumerate(free[operand], first))


def _of_gather(
    numbers: Any, operand: int, old: tuple[int, ...], new: tuple[int, ...]
) -> dict[int, int]:
    rows = [i for i in range(len(new)) if i not in numbers.offset_dims]
    if operand == 1:
        return {axis: i for i, axis in enumerate(rows)}
    hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    shown = [i for i in range(len(old)) if i not in hidden]
    axes = dict(zip(map(int, numbers.offset_dims), shown, strict=True))
    pairs = zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    return axes | {rows[index]: int(axis) for index, axis in pairs}


def _of_scatter(
    numbers: Any, operand: int, old: tuple[int, ...], new: tuple[int, ...]
) -> dict[int, int]:
    if operand == 0:
        return {i: i for i in range(len(old))}
    if operand == 1:
        return {}
    hidden = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    shown = [i for i in range(len(new)) if i not in hidden]
    rows = [i for i in range(len(old)) if i not in numbers.update_window_dims]
    axes = dict(zip(shown, map(int, numbers.update_window_dims), strict=True))
    pairs = zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    return axes | {int(axis): rows[index] for index, axis in pairs}


def _reshaped(place: Place, shape: Sequence[int], other: Sequence[int]) -> Place | None:
    """A place in a value of one shape, in the same value of another shape."""
    found: list[Part] = []
    for axis, outer, size in place:
        stride = math.prod(shape[axis + 1 :]) * (shape[axis] // (outer * size))
        parts = _parts(stride, size, other)
        if parts is None:
            return None
        for part in parts:
            last = found[-1] if found else None
            if last and last.axis == part.axis and part.outer == last.outer * last.size:
                found[-1] = last._replace(size=last.size * part.size)
            else:
                found.append(part)
    return tuple(found)


def _parts(stride: int, size: int, shape: Sequence[int]) -> list[Part] | None:
    """A run of entries, a stride apart, as parts of axes; None if it is not whole parts."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if size == 1:  # it is anywhere, best in an axis of its own
        own = [i for i, step in enumerate(strides) if step == stride and shape[i] == 1]
        around = [
            i
            for i, step in enumerate(strides)
            if not stride % step and not step * shape[i] % stride
        ]
        found = (own or around)[:1]
        return [Part(i, strides[i] * shape[i] // stride, 1) for i in found] or None
    parts = []
    for axis, step in enumerate(strides):
        low, high = max(stride, step), min(stride * size, step * shape[axis])
        if high <= low:
            continue
        if low % step or high % low or step * shape[axis] % high:
            return None
        parts.append(Part(axis, step * shape[axis] // high, high // low))
    return parts if math.prod(part.size for part in parts) == size else None
