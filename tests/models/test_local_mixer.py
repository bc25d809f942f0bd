from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
import optax_accel as oa
from models.local_mixer import replicated_cross_entropy
from tests.models.test_models import abstract, abstract_outputs, count

TINY = {"num_patches": 2, "channels": 8, "num_groups": 2, "num_blocks": 2}


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        # From the list of layers: 272K, 919K and 17.3M in the paper's tables.
        ("local_mixer_s", (28, 28, 1), 10, 271_892),
        ("local_mixer_m", (32, 32, 3), 10, 918_770),
        ("local_mixer_l", (224, 224, 3), 100, 17_335_796),
    ],
)
def test_parameters(name, shape, classes, parameters):
    model = abstract(name, input_shape=shape, num_classes=classes)
    assert count(model) == parameters
    assert abstract_outputs(model, (2, *shape)) == (2, classes)


def a_network():
    """A tiny network with a classifier, and a batch."""
    model = models.LocalMixer(input_shape=(4, 4, 1), num_classes=3, **TINY)
    model.linear.kernel[...] = jax.random.normal(jax.random.key(3), (8, 3))
    graphdef, params = nnx.split(model)
    batch = {"x": jax.random.normal(jax.random.key(1), (3, 4, 4, 1)), "labels": jnp.arange(3)}

    def loss(params, tap=None, **options):
        return nnx.merge(graphdef, params).loss(**batch, tap=tap, **options)

    return graphdef, params, batch, loss


def test_replicated_loss(x64):
    """Every copy has the value of the usual loss; its derivative is that of its own part."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, bias = (
        jax.random.normal(k, shape)
        for k, shape in zip(keys, [(3, 4, 2, 3), (6, 5), (5,)], strict=True)
    )
    labels = jnp.array([0, 4, 2])

    def usual(x, kernel, bias):
        logits = x.mean(1).reshape(3, -1) @ kernel + bias[None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    @jax.jit
    def results(*arguments):
        copies = functools.partial(replicated_cross_entropy, labels=labels)
        total = jax.grad(lambda *a: copies(*a).sum(), argnums=(0, 1, 2))(*arguments)
        exact = jax.grad(lambda *a: usual(*a).sum(), argnums=(0, 1, 2))(*arguments)
        of_copies = jax.jacobian(copies)(*arguments)
        return copies(*arguments), usual(*arguments), total, exact, of_copies

    values, expected, total, exact, of_copies = results(x, kernel, bias)
    np.testing.assert_allclose(
        values, np.broadcast_to(expected[:, None, None], (3, 4, 2)), rtol=1e-15
    )
    for found, gradient in zip(total, exact, strict=True):
        np.testing.assert_allclose(found, gradient, rtol=1e-12, atol=1e-15)
    own = np.einsum("npgmqhc->npgmqh", abs(of_copies)) > 0
    assert (own.reshape(24, 24) == np.eye(24, dtype=bool)).all()


def test_local_losses_have_the_gradient_of_their_block():
    graphdef, params, batch, loss = a_network()

    def logits_loss(params):
        logits = nnx.merge(graphdef, params)(batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean()

    @jax.jit
    def gradients(params):
        of = {
            name: jax.value_and_grad(functools.partial(loss, locality=name))(params)
            for name in ("global", "block", "group")
        }
        return of, jax.value_and_grad(logits_loss)(params)

    of, plain = gradients(params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, of["global"], plain)
    jax.tree.map(close, of["group"], of["block"])
    # The network's classifier learns as ever, the layers before it by the losses of their blocks.
    jax.tree.map(close, of["group"][1]["linear"], plain[1]["linear"])
    first = (g[1]["blocks"][0]["mixed"]["kernel"][...] for g in (of["group"], plain))
    assert abs(next(first) - next(first)).max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"locality": "group", "perturb": "activations"},
        pytest.param({"locality": "patch", "perturb": "weights"}, marks=pytest.mark.slow),
    ],
    ids=["group-activations", "patch-weights"],
)
def test_forward_gradients_are_unbiased(options):
    _, params, _, loss = a_network()

    @jax.jit
    def moments(params):
        def estimate(key):
            value_fn = functools.partial(loss, **options)
            return oa.forward_value_and_grad(
                lambda params, tap: value_fn(params, tap), params, key=key, perturb="activations"
            )[1]

        estimates = jax.vmap(estimate)(jax.random.split(jax.random.key(5), 3000))
        error = jax.tree.map(lambda e: e.std(0) / 3000**0.5, estimates)
        gradient = jax.grad(functools.partial(loss, **options))(params)
        return jax.tree.map(lambda e: e.mean(0), estimates), error, gradient

    mean, error, gradient = (jax.tree.leaves(tree) for tree in moments(params))
    for m, e, g in zip(mean, error, gradient, strict=True):
        # Five standard errors; what stands behind the taps is exact.
        assert (abs(m - g) <= 5 * e + 1e-5).all()
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    exact = ["head" in name or "linear" in name for name in names]
    if options["perturb"] == "activations":  # the normalization behind removes it
        exact = [e or "['patches']['bias']" in n for e, n in zip(exact, names, strict=True)]
    assert [bool((e < 1e-5).all()) for e in error] == exact


def test_wrong_arguments():
    shape = {"input_shape": (4, 4, 1), "num_classes": 3}
    with pytest.raises(ValueError, match="channels must be a multiple of num_groups, got 8 and 3"):
        models.LocalMixer(**shape, **TINY | {"num_groups": 3})
    with pytest.raises(ValueError, match="height and width multiples of 3"):
        models.LocalMixer(**shape, **TINY | {"num_patches": 3})
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        models.LocalMixer(**shape, **TINY | {"num_blocks": 0})
    *_, loss = a_network()
    params = a_network()[1]
    with pytest.raises(ValueError, match="unknown locality 'layer'; valid: global, block, patch"):
        loss(params, locality="layer")
    with pytest.raises(ValueError, match="unknown perturb 'inputs'; valid: activations, weights"):
        loss(params, perturb="inputs")
