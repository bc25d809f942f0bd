"""Training in half precision, with a loss scale where it needs one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.training import networks
from experiments.training.optimizers import find_in_state, wrap
from experiments.training.precision import PRECISIONS
from experiments.training.step import StepOptions, init_state, train_step
from tests.experiments.training.small_networks import spy
from tests.helpers import signature, tree_allclose, tree_equal


class Half(nnx.Module):
    """A network without a cast of its outputs."""

    def __init__(self, dtype=None):
        self.norm = nnx.BatchNorm(4, momentum=0.9, dtype=dtype, rngs=nnx.Rngs(0))
        self.hidden = nnx.Linear(4, 8, dtype=dtype, rngs=nnx.Rngs(1))
        self.head = nnx.Linear(8, 3, dtype=dtype, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(self.norm(x))))


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_mixed_precision(batch, name):
    """The network computes in half precision; what it is trained with stays float32."""
    precision = PRECISIONS[name]
    graphdef, params, rest = networks.split(Half(precision.options["dtype"]))
    exact, _, _ = networks.split(Half())
    tx = wrap(spy(), 0.1, precision=precision)
    state = init_state(tx, params, rest)
    assert (find_in_state(state.opt_state, "loss_scale") is not None) == (name == "f16")

    objective, value_fn = networks.objective(graphdef), networks.objective(exact)
    options = StepOptions(value_fn=value_fn)

    def step(state):
        return train_step(tx, objective, state, batch, batch, refresh="warm", options=options)

    new, metrics = jax.jit(step)(state)
    assert metrics["finite"]
    assert signature(new) == signature(state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((new.params, new.rest)))
    text = str(jax.make_jaxpr(step)(state))
    assert ("f16" if name == "f16" else "bf16") in text
    # The gradient is that of float32, within half precision's; so is the loss.
    spied = new.opt_state if name == "bf16" else new.opt_state.inner_state
    (value, _), grads = value_fn.value_and_grad(params, rest=rest, **batch)
    tree_allclose(spied.seen["grad"], grads, rtol=3e-2, atol=3e-3)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-2)
    np.testing.assert_allclose(spied.seen["value"], metrics["loss"], rtol=1e-6)
    assert float(spied.seen["value"]) != float(value)
    # What the method evaluates itself is float32's, to its last bits.
    np.testing.assert_allclose(spied.seen["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(spied.seen["curvature"], value, rtol=1e-6)


def test_products_are_computed_in_float32_by_default(batch):
    graphdef, params, rest = networks.split(Half(jnp.bfloat16))
    exact, _, _ = networks.split(Half())
    products = []

    def update(updates, state, params, *, curvature_value_fn=None, value_fn, **arguments):
        del curvature_value_fn, arguments
        text = str(jax.make_jaxpr(lambda p: value_fn.hvp(p, updates))(params))
        products.append("bf16" in text)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = init_state(tx, params, rest)
    objective = networks.objective(graphdef)
    for options in (StepOptions(value_fn=networks.objective(exact)), StepOptions()):
        jax.eval_shape(
            lambda s, options=options: train_step(tx, objective, s, batch, options=options), state
        )
    assert products == [False, True]


def test_a_step_that_overflows_is_left_out_and_the_scale_falls(batch):
    precision = PRECISIONS["f16"]
    graphdef, params, rest = networks.split(Half("float16"))
    tx = wrap(optax.adam(0.1), 0.1, weight_decay=0.1, precision=precision)
    options = StepOptions(ema=0.9, accumulate=2)
    step = jax.jit(
        lambda s, x: train_step(
            tx, networks.objective(graphdef), s, batch | {"x": x}, options=options
        )
    )
    state = init_state(tx, params, rest, average=True)
    good, metrics = step(state, batch["x"])
    assert metrics["finite"]
    # Infinite inputs: loss and statistics are not finite either.
    wrong = batch["x"].at[0, 0].set(jnp.inf)
    skipped, metrics = step(good, wrong)
    assert metrics["finite"]  # as far as the run is concerned: it was dealt with
    assert not np.isfinite(metrics["loss"])
    assert float(skipped.opt_state.loss_scale) == float(good.opt_state.loss_scale) / 2
    tree_equal(skipped.params, good.params)
    tree_equal(skipped.rest, good.rest)
    tree_equal(skipped.opt_state.inner_state, good.opt_state.inner_state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(skipped.average))
    assert np.isfinite(step(skipped, batch["x"])[1]["loss"])
    # At its smallest the scale cannot help any more, and the run is told.
    lowest = skipped._replace(opt_state=skipped.opt_state._replace(loss_scale=jnp.float32(1.0)))
    assert not step(lowest, wrong)[1]["finite"]
