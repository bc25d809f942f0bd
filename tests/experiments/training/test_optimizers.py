"""What surrounds a method in training, and looking fields up in its state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.training import networks
from experiments.training.optimizers import find_in_state, is_decayed, wrap
from experiments.training.step import init_state, train_step
from tests.experiments.training.small_networks import NormDropout, spy
from tests.helpers import tree_allclose


def test_state_lookup_ignores_parameters_of_that_name():
    tx = optax.chain(optax.trace(0.9), optax.trace(0.8), spy())
    opt_state = tx.init({"value": jnp.ones(3), "trace": jnp.ones(2)})
    assert find_in_state(opt_state, "objective_value").shape == ()
    assert find_in_state(opt_state, "trace") is opt_state[1].trace
    assert find_in_state(opt_state, "alignment") is None


def test_weight_decay_is_that_of_adamw(mlp, batch):
    graphdef, params, rest = mlp
    trained = []
    for tx in (
        wrap(optax.adam(0.1), 0.1, weight_decay=0.3),
        optax.adamw(0.1, weight_decay=0.3, mask=is_decayed),
    ):
        tx = optax.with_extra_args_support(tx)
        state = init_state(tx, params, rest)
        for _ in range(2):
            state, _ = train_step(tx, networks.objective(graphdef), state, batch)
        trained.append(state.params)
    tree_allclose(*trained, rtol=1e-5)


def test_norms_and_biases_are_not_decayed():
    def masked(model):
        mask = is_decayed(networks.split(model)[1])
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): decayed
            for path, decayed in jax.tree.leaves_with_path(mask)
        }

    attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    for model in (NormDropout(nnx.Rngs(0)), attention, nnx.Embed(5, 4, rngs=nnx.Rngs(0))):
        for name, decayed in masked(model).items():
            assert decayed == name.endswith(("kernel", "embedding")), name


def test_clipping_is_of_the_whole_gradient(mlp, batch):
    graphdef, params, rest = mlp
    tx = wrap(optax.sgd(1.0), 1.0, clip=1e-2)
    state, _ = train_step(tx, networks.objective(graphdef), init_state(tx, params, rest), batch)
    step = optax.tree.sub(params, state.params)
    np.testing.assert_allclose(optax.tree.norm(step), 1e-2, rtol=1e-3)
