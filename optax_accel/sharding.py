"""Where the state of an optimizer lies when the parameters are spread over devices.

An optimizer's state holds arrays that are shaped like the parameters (momentum, Adam's moments, an
accumulated gradient), several such copies stacked along a leading axis (the basis of a tracked
eigenspace, a history of gradients) and small ones (counters, eigenvalues, random keys).  Sharding
the first two like the parameters is what fully sharded training (FSDP; ZeRO, stage 3: Rajbhandari
et al., `ZeRO <https://arxiv.org/abs/1910.02054>`_, 2020, section 5) asks of an optimizer.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import optax

from optax_accel._arguments import check_inner


def state_shardings(tx: optax.GradientTransformation, params: chex.ArrayTree) -> chex.ArrayTree:
    """Shardings for ``tx.init(params)`` that follow those of the parameters.

    A leaf of the state belongs to a parameter if its path in the state ends with the parameter's
    path (the longest such path counts) and its shape ends with the parameter's shape.  It gets the
    parameter's sharding, with unsharded axes for those in front: ``P(None, *spec)`` for a block of
    ``k`` copies.  A leaf of its path with as many axes as the parameter, as the reduced moments of
    GaLore are, is sharded along those axes that are as long as the parameter's.  All other leaves
    are replicated over the parameters' mesh.

    ``optax.tree.map_params`` decides in the same way but for the axes in front: a basis, a sketch
    and a history of gradients, with leaves ``(k, *shape)``, count as parameter-like, and the mapped
    function receives leaves with one more axis.  A ``PartitionSpec`` for such a leaf has to be
    extended, as it is here.  Eigenvalues, counters and K-FAC's factors, which belong to layers and
    not to parameters, do not count.

    Nothing is computed: the structure comes from ``jax.eval_shape``.  Give the result to
    ``jax.jit(tx.init, out_shardings=...)``, so that the state never exists on one device, and to
    ``out_shardings`` of the training step, so that it stays where it is.

    Args:
      tx: any optimizer or transformation, chained, masked, partitioned or wrapped in any way.
      params: the parameters: arrays, or ``jax.ShapeDtypeStruct`` objects, each with a
        ``NamedSharding``, all on one mesh.

    Returns:
      A pytree like ``tx.init(params)`` with a ``NamedSharding`` for each array.

    Raises:
      TypeError: ``tx`` is not an Optax transformation.
      ValueError: a parameter without ``NamedSharding``, or no parameter at all.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> sharding = jax.NamedSharding(mesh, jax.P("data", None))
      >>> params = {"w": jax.device_put(jnp.ones((8, 3)), sharding)}
      >>> tx = oa.bulk_sgd(0.1, num_directions=2)
      >>> shardings = oa.state_shardings(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> basis = optax.tree.get(state, "basis")["w"]
      >>> basis.shape, basis.sharding.spec == jax.P(None, "data", None)
      ((2, 8, 3), True)
    """
    if not isinstance(tx, optax.MultiSteps):  # which only looks like one
        check_inner(tx, "tx")
    return shardings_like(jax.eval_shape(tx.init, params), params)


def shardings_like(tree: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    """Shardings for any pytree of arrays or shapes by the rule of :func:`state_shardings`.

    Args:
      tree: arrays or shapes, e.g. a whole training state.
      params: arrays or shapes, each with a ``NamedSharding``, all on one mesh.

    Returns:
      A pytree like ``tree`` with a ``NamedSharding`` for each leaf.

    Raises:
      ValueError: a parameter without ``NamedSharding``, or no parameter at all.
    """
    by_path: dict[tuple[Any, ...], tuple[tuple[int, ...], jax.NamedSharding]] = {}
    replicated: jax.NamedSharding | None = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, jax.NamedSharding):
            raise ValueError(
                f"the parameter {jax.tree_util.keystr(path) or '(root)'} has no NamedSharding (its "
                f"sharding is {sharding}); place it with "
                "jax.device_put(params, jax.NamedSharding(mesh, spec))"
            )
        by_path[path] = (leaf.shape, sharding)
        replicated = jax.NamedSharding(sharding.mesh, jax.P())
    if replicated is None:
        raise ValueError("there are no parameters, so there is no mesh to place a state on")

    def place(path: tuple[Any, ...], leaf: Any) -> jax.NamedSharding | None:
        owner = next((path[i:] for i in range(len(path) + 1) if path[i:] in by_path), None)
        if owner is None:
            return replicated
        shape, sharding = by_path[owner]
        extra = len(leaf.shape) - len(shape)
        names = list(sharding.spec)
        if extra == 0 and leaf.shape != shape:  # a spec may have fewer axes than its array
            axes = zip(names, leaf.shape, shape, strict=False)
            names = [name if length == full else None for name, length, full in axes]
            if not any(names):
                return replicated
        elif extra < 0 or leaf.shape[extra:] != shape:
            return replicated
        spec = jax.P(*[None] * extra, *names)
        return jax.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    return jax.tree_util.tree_map_with_path(place, tree)
