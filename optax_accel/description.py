"""What an optimizer consists of: elements, state, extra arguments, costs, periods of refreshes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._arguments import check_numeric_leaves, shown
from optax_accel.refresh import Cost, SampledEpochs, announcements

_PASS_ON = {"with_extra_args_support", "with_checked_init"}
_HEADINGS = ("element", "state", "arrays", "bytes", "a step costs, besides its gradient")


class StateArray(NamedTuple):
    """An array of an optimizer's state.

    Attributes:
      path: its place in the state of its element, such as ``.mu['w']``.
      shape: its shape.
      dtype: the name of its dtype.
      num_bytes: its size in bytes.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


class Element(NamedTuple):
    """An element of an optimizer's chain.

    Attributes:
      name: the functions that made it, the wrapper first, as ``gnp(trace, scale)``. Elements inside
        ``optax.masked``, ``optax.partition`` and ``optax.MultiSteps`` stand by themselves, behind
        the name of what they are in, as ``masked: scale_by_adam``. Read from the closures of the
        transformation: Optax keeps no names. Of what a function builds anew in every update, as
        ``optax.inject_hyperparams`` does, only the function is known.
      arrays: the arrays of its state.
      requires: the extra arguments without which its ``update`` raises.
      cost: what its ``update`` evaluates in a step besides the gradient that it is given, in
        words: as our methods tell it; ``"nothing"`` where ``update`` takes no function that it
        could evaluate; ``"unknown"`` for all else.
      further_gradients: gradients that it takes in a step besides the one that it is given; None
        where they are not known, or not whole gradients.
    """

    name: str
    arrays: tuple[StateArray, ...]
    requires: tuple[str, ...]
    cost: str
    further_gradients: int | None

    @property
    def num_bytes(self) -> int:
        """The size of its state in bytes."""
        return sum(array.num_bytes for array in self.arrays)


class Description(NamedTuple):
    """What :func:`describe` found; ``print`` shows it as a table.

    Attributes:
      elements: the elements of the chain in the order of their updates.
      requires: the extra arguments without which ``update`` raises.
      refreshes: the periods, in steps, at which estimates of the curvature are refreshed, as
        ``refresh_every 20, start_step 0``; :func:`~optax_accel.refresh_at` drives them from the
        host.
    """

    elements: tuple[Element, ...]
    requires: tuple[str, ...]
    refreshes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the whole state in bytes."""
        return sum(element.num_bytes for element in self.elements)

    def __str__(self) -> str:
        """A table of the elements, one line for each field of their states, and a summary."""
        rows: list[tuple[str, ...]] = [_HEADINGS]
        for element in self.elements:
            fields = _fields(element.arrays) or [("none", "", "")]
            rows.append((element.name, *fields[0], element.cost))
            rows += [("", *field, "") for field in fields[1:]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = [
            "  ".join(
                cell.rjust(width) if i == 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        arguments = "".join(f", {name}=..." for name in self.requires)
        lines += [
            "",
            f"state: {self.num_bytes:,} bytes",
            f"call: tx.update(grads, state, params{arguments})",
        ]
        if self.refreshes:
            lines.append(f"refreshes: {'; '.join(self.refreshes)}; see optax_accel.refresh_at")
        return "\n".join(lines)


def describe(
    tx: optax.GradientTransformation | optax.MultiSteps, params: chex.ArrayTree
) -> Description:
    """Tells what an optimizer consists of, keeps, needs and costs, without running it.

    The state is not allocated: ``init`` is only traced (``jax.eval_shape``).

    Args:
      tx: the optimizer, chained, masked or wrapped in any way.
      params: the parameters, or their shapes and dtypes as ``jax.ShapeDtypeStruct``.

    Returns:
      The description; ``print`` shows it as a table.

    Raises:
      TypeError: ``tx`` is not an Optax transformation, or a leaf of ``params`` is not numeric.
      ValueError: ``params`` is empty, or the ``init`` of a method does not accept the parameters.

    Example:
      >>> import jax.numpy as jnp, optax, optax_accel as oa
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), oa.gnp(optax.sgd(0.1, momentum=0.9)))
      >>> found = oa.describe(tx, {"w": jnp.zeros((3, 2))})
      >>> found.requires, found.num_bytes
      (('value_fn',), 32)
      >>> found.elements[1].further_gradients
      1
    """
    if not isinstance(tx, optax.GradientTransformation | optax.MultiSteps):
        raise TypeError(f"`tx` must be an Optax transformation, got {shown(tx)}.")
    if not jax.tree.leaves(params):
        raise ValueError(f"`params` must contain arrays, got {shown(params)}.")
    check_numeric_leaves(params, "describe", "give the parameters without it")
    elements, refreshes, requires = [], [], []
    for within, part, seen in _elements(tx, params):
        with announcements() as announced:
            shapes = jax.eval_shape(part.init, seen)
        if isinstance(shapes, optax.MultiStepsState):
            # What is inside is an element of its own.
            shapes, announced, parts = shapes._replace(inner_opt_state=()), [], [part]
        else:
            parts = list(_parts(part))
        costs = list(dict.fromkeys(a for a in announced if isinstance(a, Cost)))
        refreshes += [_periods(a) for a in announced if not isinstance(a, Cost)]
        needed = [name for cost in costs for name in cost.requires]
        needed += [name for inner in parts for name in _required(inner.update)]
        requires += needed
        words, gradients = _cost(costs, parts)
        name = within + (
            "multi_steps" if isinstance(shapes, optax.MultiStepsState) else _name(part)
        )
        elements.append(
            Element(name, _arrays(shapes), tuple(dict.fromkeys(needed)), words, gradients)
        )
    return Description(
        tuple(elements), tuple(dict.fromkeys(requires)), tuple(dict.fromkeys(refreshes))
    )


def _periods(announced: Any) -> str:
    """The periods that a method announces, in words."""
    if isinstance(announced, SampledEpochs):
        return f"sampled epochs of {announced.steps_per_epoch} steps"
    return ", ".join(f"{name} {value}" for name, value in announced._asdict().items())


def _cost(costs: list[Cost], parts: list[Any]) -> tuple[str, int | None]:
    """The cost of an element of these parts in words, and the gradients of it."""
    words = [cost.words for cost in costs]
    numbers = [cost.further_gradients for cost in costs]
    if not all(_is_known(tx) for tx in parts):
        words.append("unknown")
        numbers.append(None)
    known = [number for number in numbers if number is not None]
    return "; ".join(words) or "nothing", sum(known) if len(known) == len(numbers) else None


def _is_known(tx: Any) -> bool:
    """Whether a transformation evaluates nothing itself, or announces what it does."""
    parameters = inspect.signature(tx.update).parameters
    ours = _module(tx.update) == __name__.partition(".")[0]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if ours and not _is_made_for_a_mask(tx.update):
        return True
    return "value_fn" not in parameters and (not takes_any or bool(_inner(tx)))


# -- closures --------------------------------------------------------------------------------------


def _elements(
    tx: Any, params: chex.ArrayTree, within: str = ""
) -> Iterator[tuple[str, Any, chex.ArrayTree]]:
    """The elements of chains, and of those inside Optax's wrappers.

    Yields:
      What wraps the element, in words; the element; the parameters that it sees.
    """
    for part in _chained(tx):
        enclosed, maker = _closure(part.init), _maker(part.update)
        if maker == "MultiSteps" and "_opt" in enclosed:
            yield within, part, params
            yield from _elements(enclosed["_opt"], params, f"{within}multi_steps: ")
        elif maker == "masked" and {"inner", "mask"} <= enclosed.keys():
            mask = enclosed["mask"]
            mask = mask(params) if callable(mask) else mask
            yield from _elements(enclosed["inner"], _masked(params, mask), f"{within}masked: ")
        elif maker == "partition" and {"transforms", "param_labels"} <= enclosed.keys():
            jax.eval_shape(part.init, params)  # raises on labels without a transformation
            labels = enclosed["param_labels"]
            labels = labels(params) if callable(labels) else labels
            for group, inner in enclosed["transforms"].items():
                mask = jax.tree.map(lambda label, group=group: label == group, labels)
                words = f"{within}partition {group!r}: "
                yield from _elements(inner, _masked(params, mask), words)
        else:
            yield within, part, params


def _masked(params: chex.ArrayTree, mask: chex.ArrayTree) -> chex.ArrayTree:
    """The parameters as `optax.masked` shows them; a leaf of the mask may stand for a subtree."""
    return jax.tree.map(lambda kept, some: some if kept else optax.MaskedNode(), mask, params)


def _chained(tx: Any) -> Iterator[Any]:
    """The elements of chains within chains; of anything else itself."""
    tx = _unwrapped(tx)
    init, update = _closure(tx.init), _closure(tx.update)
    if _maker(tx.update) == "chain" and {"init_fns"} <= set(init) and {"update_fns"} <= set(update):
        for pair in zip(init["init_fns"], update["update_fns"], strict=True):
            yield from _chained(optax.GradientTransformationExtraArgs(*pair))
    else:
        yield tx


def _unwrapped(tx: Any) -> Any:
    """A transformation without the wrappers that only check, or drop extra arguments."""
    for function in (tx.update, tx.init):
        inner = _closure(function).get("tx")
        if _maker(function) in _PASS_ON and isinstance(inner, optax.GradientTransformation):
            return _unwrapped(inner)
    return tx


def _inner(tx: Any) -> list[Any]:
    """The transformations in the closures of another one."""
    seen: dict[int, Any] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, optax.GradientTransformation):
            seen.setdefault(id(value.update), value)
        elif isinstance(value, tuple | list):
            for part in value:
                visit(part, depth)
        elif isinstance(value, dict):
            for part in value.values():
                visit(part, depth)
        elif depth and inspect.isfunction(value):
            visit(_closure(value), depth - 1)

    enclosed = _closure(tx.update)
    if _maker(tx.update) == "with_schedules":
        build, values_at = enclosed["inner"], enclosed["values_at"]
        visit(build(values_at(jnp.zeros((), jnp.int32))), 0)
    else:
        visit([_closure(tx.init), enclosed], 3)
        if not seen and _is_made_for_a_mask(tx.update):
            visit(enclosed["make"](None), 0)
    return list(seen.values())


def _parts(tx: Any) -> Iterator[Any]:
    """A transformation and all that it contains, as far as one can see."""
    yield tx
    for inner in _inner(tx):
        for part in _chained(inner):
            yield from _parts(part)


def _name(tx: Any) -> str:
    inside = ", ".join(_name(part) for inner in _inner(tx) for part in _chained(inner))
    maker = _maker(tx.update)
    if _module(tx.update) == __name__.partition(".")[0]:  # a class: its name as a function's
        maker = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", maker).lower()
    return f"{maker}({inside})" if inside else maker


def _is_made_for_a_mask(function: Any) -> bool:
    """Whether it is of a method that is made anew for each mask."""
    return getattr(function, "__qualname__", "").startswith("with_fixed_leaves.")


def _maker(function: Any) -> str:
    """The function or class in which a function was defined."""
    function = getattr(function, "func", function)  # of functools.partial
    name = getattr(function, "__qualname__", type(function).__name__)
    if _is_made_for_a_mask(function):
        return _maker(_closure(function)["make"])
    parts = [part for part in name.split(".") if part != "<locals>"]
    return parts[0].lstrip("_") if len(parts) > 1 else name


def _module(function: Any) -> str:
    function = getattr(function, "func", function)
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _closure(function: Any) -> dict[str, Any]:
    """What a function has enclosed, and the attributes of the object that a method belongs to."""
    owner = getattr(function, "__self__", None)
    if owner is not None:
        return dict(getattr(owner, "__dict__", {}))
    function = getattr(function, "func", function)
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    found = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


def _required(update: Any) -> list[str]:
    """Arguments of ``update`` by name that have no default."""
    return [
        name
        for name, parameter in inspect.signature(update).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and parameter.default is inspect.Parameter.empty
    ]


# -- state -----------------------------------------------------------------------------------------


def _arrays(shapes: Any) -> tuple[StateArray, ...]:
    return tuple(
        StateArray(
            jax.tree_util.keystr(path),
            leaf.shape,
            str(leaf.dtype),
            leaf.size * leaf.dtype.itemsize,
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    )


def _fields(arrays: tuple[StateArray, ...]) -> list[tuple[str, str, str]]:
    """Arrays by the field that they are in: its name, what they are, and their bytes."""
    grouped: dict[str, list[StateArray]] = {}
    for array in arrays:
        path = re.sub(r"\[\d+\]", "", array.path).lstrip(".")
        grouped.setdefault(path.partition("[")[0] or path, []).append(array)
    rows = []
    for field, members in grouped.items():
        dtypes = ", ".join(dict.fromkeys(array.dtype for array in members))
        what = f"{members[0].shape}" if len(members) == 1 else f"{len(members)} arrays"
        total = sum(array.num_bytes for array in members)
        rows.append((field or "(root)", f"{dtypes} {what}", f"{total:,}"))
    return rows
