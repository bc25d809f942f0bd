"""The layers of a network, found in its program by following each parameter through it.

No layer is registered and no library is known by name.  ``predict(params)`` is traced to a jaxpr,
in which every parameter is followed (``optax_accel.natural_gradient.following``) to the layers
that use it (``optax_accel.natural_gradient.matching``); what is found is grouped into blocks
(``optax_accel.natural_gradient.grouping``) of the kinds of
``optax_accel.natural_gradient.layers``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from optax_accel._derivatives import check_outputs
from optax_accel._masking import Mask, resolve
from optax_accel.natural_gradient.following import follow
from optax_accel.natural_gradient.grouping import UNUSED, Grouping
from optax_accel.natural_gradient.layers import Block, Network
from optax_accel.objective import Objective

Example: TypeAlias = Mapping[str, Any] | None


def describe_layers(
    objective: Objective, params: chex.ArrayTree, example: Example = None, *, mask: Mask = None
) -> str:
    """What K-FAC makes of a network: a readable report, one line for each block of parameters.

    Args:
      objective: an :class:`~optax_accel.Objective` of the network. Only the program of its
        ``predict`` is read, to find the layers.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      example: keyword arguments of ``predict``, a dictionary of arrays or ``jax.ShapeDtypeStruct``,
        of which only shapes and dtypes matter. ``None`` (default) for an objective that holds its
        batch.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to report. ``None`` (default) selects all leaves.

    Returns:
      A table: the names of the parameters, the kind of layer, how its curvature is approximated
      (and, where that is by a diagonal of batch gradients, why); below it the share of the
      parameters whose curvature has Kronecker structure.

    Raises:
      ValueError: the objective was built from a value function, or its outputs have no leading
        axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> objective = oa.Objective(
      ...     predict=lambda p, x: (x @ p["w"] + p["b"][None]) / p["temperature"],
      ...     loss=lambda outputs, y: jnp.mean((outputs - y) ** 2),
      ... )
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "temperature": jnp.ones(())}
      >>> print(oa.describe_layers(objective, params, {"x": jnp.ones((4, 3))}))
      parameters       kind     approximation
      ['temperature']  generic  diagonal of batch gradients: is combined with activations by `div`
      ['w'], ['b']     dense    4 x 2 Kronecker
      8 of 9 parameters (88.9 %) have Kronecker structure.
    """
    blocks = find(objective, params, example, mask, method="describe_layers").blocks
    lines = [("parameters", "kind", "approximation")]
    lines += [(", ".join(block.names), block.kind, _approximation(block)) for block in blocks]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    table = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines]
    return "\n".join([*table, f"{_coverage(blocks)[1]} have Kronecker structure."])


def _coverage(blocks: Sequence[Block]) -> tuple[float, str]:
    """The share of the parameters with Kronecker structure, and in words."""
    sizes = [sum(map(math.prod, block.shapes)) for block in blocks]
    structured = sum(n for n, block in zip(sizes, blocks, strict=True) if block.kronecker)
    share = structured / max(1, sum(sizes))
    return share, f"{structured:,} of {sum(sizes):,} parameters ({100 * share:.1f} %)"


def _approximation(block: Block) -> str:
    if block.kind == "generic":
        return f"diagonal of batch gradients: {block.reason}"
    if not block.kronecker:
        return "exact diagonal"
    rows, columns = block.matrix_shape
    uses = f", {len(block.uses)} uses" if len(block.uses) > 1 else ""
    if block.function is not None:
        uses += ", of the weight computed from them"
    if block.kind == "tied":
        ways = [part.kind + (" transposed" if turned else "") for part, turned in block.parts()]
        uses = f", nearest to the sum over its uses as {' and as '.join(ways)}"
    slices = f" for each of {block.num_slices} slices" if block.stacked else ""
    return f"{rows} x {columns} Kronecker{slices}{uses}"


def find(
    objective: Objective,
    params: chex.ArrayTree,
    example: Example = None,
    mask: Mask = None,
    *,
    method: str = "K-FAC",
) -> Network:
    """Traces ``predict`` and finds its layers.

    Args:
      objective: an objective of the parameters and of the arguments in ``example``.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      example: keyword arguments of ``predict``, pytrees of arrays or ``jax.ShapeDtypeStruct`` too;
        other leaves (flags, names) are passed on unchanged.
      mask: the parameters that take part; None for all.
      method: name of the caller, for messages.

    Returns:
      The network.

    Raises:
      ValueError: ``predict`` cannot be evaluated, or its outputs have no common leading axis of
        examples.
    """
    check_example(method, objective, example)
    closed, outputs = trace(objective.outputs, params, example)
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path) or "params" for path, _ in paths]
    selected = [True] * len(names) if mask is None else jax.tree.leaves(resolve(params, mask))
    num_examples = _count_examples(outputs)
    follower = follow(closed, len(names), num_examples)
    blocks = tuple(Grouping(follower).blocks(names, selected))
    return Network(blocks, num_examples, follower.program, jax.tree.structure(outputs))


def trace(
    predict: Callable[..., Any], params: chex.ArrayTree, example: Example
) -> tuple[ClosedJaxpr, Any]:
    """The program of ``predict(params, **example)``, and the shapes and dtypes of its results.

    The arguments of the program are the leaves of the parameters, then the arrays of the example.

    Raises:
      ValueError: ``predict`` cannot be evaluated.
    """
    leaves, treedef = jax.tree.flatten(dict(example or {}))
    is_array = [hasattr(leaf, "shape") and not isinstance(leaf, np.generic) for leaf in leaves]

    def of_arrays(params: chex.ArrayTree, arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        arguments = [
            next(remaining) if traced else leaf
            for traced, leaf in zip(is_array, leaves, strict=True)
        ]
        return predict(params, **jax.tree.unflatten(treedef, arguments))

    arrays = [leaf for traced, leaf in zip(is_array, leaves, strict=True) if traced]
    try:
        return jax.make_jaxpr(of_arrays, return_shape=True)(params, arrays)
    except Exception as error:
        summary = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"`predict` cannot be evaluated: {type(error).__name__}: {summary}\nIt was called with "
            f"the parameters {_summary(params)} and the example {_summary(dict(example or {}))}, "
            "which must have the structure, shapes and dtypes of those of a training step."
        ) from error


def check_example(method: str, objective: Objective, example: Example) -> None:
    """Raises if ``predict`` cannot be called with the example.

    Raises:
      ValueError: the objective has no ``predict``, or the example lacks an argument of it.
      TypeError: the objective is not an Objective, or the example is not a dictionary.
    """
    if not isinstance(objective, Objective):
        hint = ""
        if isinstance(objective, jax.Array):
            hint = " Optax's injection takes it for a schedule: use optax_accel.inject_hyperparams."
        raise TypeError(
            f"{method}: `objective` must be an optax_accel.Objective(predict, loss), whose program "
            f"tells how the parameters are used; got {type(objective).__name__}.{hint}"
        )
    if not objective.has_outputs:
        raise ValueError(
            f"{method} finds layers in the program of the network, but the objective is a plain "
            "function of the parameters; build it as optax_accel.Objective(predict, loss)."
        )
    if example is not None and not isinstance(example, Mapping):
        raise TypeError(
            f"{method}: `example` must be a dictionary of keyword arguments of `predict`, as in "
            f"example={{'x': x}}; got {type(example).__name__}."
        )
    _, required, _ = objective.predict_arguments
    if missing := [argument for argument in required if argument not in (example or {})]:
        raise ValueError(
            f"{method} evaluates `predict` on the shapes of a batch, to find its layers, and the "
            f"example lacks its arguments {missing}. Give them, as arrays or "
            f"jax.ShapeDtypeStruct: {method}(..., example={{{missing[0]!r}: ...}})."
        )


def warn_of_diagonals(method: str, blocks: Sequence[Block]) -> None:
    """Says to the caller of ``init`` what has no Kronecker block, and why.

    That is matrices whose curvature is a diagonal of batch gradients; and, where less than half of
    the parameters have Kronecker structure, everything that has none.
    """
    share, coverage = _coverage(blocks)
    others = [b for b in blocks if not b.kronecker and b.reason not in UNUSED]
    if share >= 0.5:
        others = [b for b in others if b.kind == "generic" and len(b.shapes[0]) > 1]
    if not others:
        return
    reasons = "".join(
        f"\n  {b.names[0]} {b.reason or 'is a scale or shift: its diagonal is exact'}"
        for b in others
    )
    warnings.warn(
        f"{method} takes the curvature of {len(others)} of {len(blocks)} blocks of parameters for "
        "diagonal, that of matrices estimated from gradients of whole batches, where a layer would "
        "have a Kronecker product: a layer is a parameter that one matmul, convolution or look-up "
        "takes as a whole or slice by slice, outside of `while` loops, conditionals and functions "
        f"with a derivative rule of their own. {coverage} have Kronecker structure.{reasons}\nSee "
        "optax_accel.describe_layers for all blocks.",
        stacklevel=4,
    )


def _summary(tree: chex.ArrayTree) -> str:
    """Names, dtypes and shapes of the first leaves of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    texts = [
        f"{jax.tree_util.keystr(path) or 'itself'}: "
        + (f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf))
        for path, leaf in leaves[:8]
    ]
    return "{" + ", ".join([*texts, *(["..."] if len(leaves) > 8 else [])]) + "}"


def _count_examples(outputs: chex.ArrayTree) -> int:
    """The number of examples of a batch: the leading axis of the outputs.

    Raises:
      ValueError: the outputs have no common leading axis, or it is empty.
      TypeError: an output is not real floating-point.
    """
    check_outputs("K-FAC", outputs, jnp.floating)
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(outputs)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            "K-FAC counts examples along the leading axis of the outputs of `predict`, which must "
            f"be one for all outputs, and not empty; got the shapes {shapes}."
        )
    return sizes.pop()
