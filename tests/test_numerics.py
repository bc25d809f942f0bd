"""Tests of norms and sums over the leaves of a tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_accel._numerics import max_norm, norm, total, vdot

REDUCTIONS = {
    "max_norm": max_norm,
    "norm": norm,
    "vdot": lambda tree: vdot(tree, tree),
}


def _num_operations(reduction, num_leaves):
    """Operations in the compiled program of leaves that are divided by a number of all of them."""

    def rescale(leaves):
        number = reduction(leaves)
        return [leaf / number for leaf in leaves]

    leaves = [jax.ShapeDtypeStruct((3 + i,), jnp.float32) for i in range(num_leaves)]
    return jax.jit(rescale).lower(leaves).compile().as_text().count(" = ")


@pytest.fixture(params=[1, 2], ids="{} devices".format)
def devices(request, monkeypatch):
    """How many devices there seem to be: a single one joins leaves."""
    monkeypatch.setattr(jax, "device_count", lambda: request.param)


@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.usefixtures("devices")
def test_program_grows_in_proportion_to_the_leaves(reduction):
    assert _num_operations(reduction, 32) < 2.5 * _num_operations(reduction, 16)


@pytest.mark.usefixtures("devices")
def test_norms_and_inner_products_are_those_of_optax():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(0.25), "c": jnp.ones(3, jnp.int8)}
    other = jax.tree.map(lambda leaf: 2 * leaf, tree)

    @jax.jit
    def both(tree, other):
        ours = vdot(tree, other), norm(tree), max_norm(tree)
        return ours, (optax.tree.vdot(tree, other), optax.tree.norm(tree), optax.tree.max(tree))

    np.testing.assert_allclose(*both(tree, other), rtol=1e-6)


def test_what_is_empty_sums_to_zero():
    assert vdot((), ()) == norm(()) == max_norm(()) == total([]) == 0
