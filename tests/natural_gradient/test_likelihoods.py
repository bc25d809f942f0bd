"""Which losses show a likelihood, against their gradients; and which do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_accel as oa
from optax_accel.natural_gradient.likelihoods import recognize
from tests.natural_gradient.test_kfac import first_update

OUTPUTS = np.random.default_rng(0).normal(size=(2, 4, 3, 5))
LABELS = np.arange(12).reshape(4, 3) % 5
TARGETS = np.eye(5)[LABELS]
MASK = np.arange(12).reshape(4, 3) % 4 > 0
WEIGHTS = np.linspace(0, 2, 12).reshape(4, 3)


def cross_entropy(z, labels=LABELS, **kwargs):
    return optax.softmax_cross_entropy_with_integer_labels(z, labels, **kwargs)


CATEGORICAL = {
    "integers": lambda z: cross_entropy(z).mean(),
    "next token": lambda z: cross_entropy(z[:, :-1], LABELS[:, 1:]).mean(),
    "last position": lambda z: cross_entropy(z[:, -1], LABELS[:, -1]).mean(),
    "one position each": lambda z: cross_entropy(z[np.arange(4), [0, 1, 2, 1]], LABELS[:, 0]).sum(),
    "float32": lambda z: cross_entropy(z.reshape(-1, 5).astype(jnp.float32), LABELS.ravel()).sum(),
    "smoothed": lambda z: jnp.mean(
        optax.softmax_cross_entropy(z, optax.smooth_labels(jnp.asarray(TARGETS), 0.1))
    ),
    "masked": lambda z: jnp.where(MASK, cross_entropy(z), 0).sum() / MASK.sum(),
    "weighted": lambda z: jnp.vdot(WEIGHTS, cross_entropy(z)) - 0.1 * z[..., 0].sum(),
    "per example": jax.jit(
        lambda z: jnp.mean(jax.vmap(lambda a, y: -jnp.vdot(jax.nn.log_softmax(a), y))(z, TARGETS))
    ),
    "by hand": lambda z: jnp.sum(jnp.log(jnp.sum(jnp.exp(z), axis=-1)) - jnp.sum(z * TARGETS, -1)),
}
GAUSSIAN = {
    "squares": lambda z: jnp.mean((z - TARGETS) ** 2),
    "optax": lambda z: jnp.vdot(WEIGHTS, optax.l2_loss(z, TARGETS).sum(-1)),
    "product": lambda z: (lambda d: jnp.sum(d * d * WEIGHTS[..., None]))(TARGETS - z),
}


BERNOULLI = {
    "events": lambda z: optax.sigmoid_binary_cross_entropy(z, TARGETS).mean(),
    "weighted events": lambda z: jnp.vdot(
        WEIGHTS, jax.vmap(optax.sigmoid_binary_cross_entropy)(z, 0.3 * TARGETS).sum(-1)
    ),
    "events by hand": lambda z: jnp.sum(jax.nn.softplus(z)) - jnp.vdot(z, TARGETS),
}
LOSSES = CATEGORICAL | GAUSSIAN | BERNOULLI


@jax.jit
def gradients_of_all(outputs):
    return {name: jax.vmap(jax.grad(f))(outputs) for name, f in LOSSES.items()}


def test_losses_that_show_a_likelihood(x64):
    """Between two points the gradient changes by weights times the change of the mean."""
    means = {
        "categorical": jax.nn.softmax(OUTPUTS),
        "gaussian": OUTPUTS,
        "bernoulli": jax.nn.sigmoid(OUTPUTS),
    }
    gradients = gradients_of_all(OUTPUTS)
    for name, loss in LOSSES.items():
        likelihood, _ = recognize(oa.Objective(lambda p: p, loss), jnp.asarray(OUTPUTS[0]))
        expected = "bernoulli" if name in BERNOULLI else "gaussian"
        assert likelihood == ("categorical" if name in CATEGORICAL else expected), name
        change = gradients[name][1] - gradients[name][0]
        expected = means[likelihood][1] - means[likelihood][0]
        weights = jnp.sum(change * expected, -1) / jnp.sum(expected**2, -1)
        np.testing.assert_allclose(
            change,
            weights[..., None] * expected,
            atol=1e-6 if name == "float32" else 1e-14,
            err_msg=name,
        )
        assert weights.max() > 0.01


OTHERS = {
    "temperature": (lambda z: cross_entropy(z / 2).mean(), "`exp`"),
    "prior": (lambda z: cross_entropy(z + np.arange(5.0)[None, None]).mean(), "`exp`"),
    "some classes": (lambda z: cross_entropy(z[..., :4], LABELS % 4).mean(), "`exp`"),
    "other axis": (lambda z: cross_entropy(z, np.zeros((4, 5), int), axis=1).mean(), "`exp`"),
    "mixed axes": (
        lambda z: cross_entropy(z.reshape(4, 5, 3).swapaxes(1, 2)).mean(),
        "`exp`",
    ),
    "negative": (lambda z: cross_entropy(1 - z).mean(), "`exp`"),
    "two positions": (lambda z: jnp.log(jnp.exp(z).sum((1, 2))).mean(), "`reduce_sum`"),
    "squared normalizer": (
        lambda z: cross_entropy(z).mean() + 0.1 * jnp.mean(jax.nn.logsumexp(z, -1) ** 2),
        "`integer_pow`",
    ),
    "weights from the outputs": (
        lambda z: jnp.mean(lax.stop_gradient(z[..., 0]) * cross_entropy(z)),
        "`mul`",
    ),
    "scaled events": (
        lambda z: optax.sigmoid_binary_cross_entropy(2 * z, TARGETS).mean(),
        "a function with a derivative rule",
    ),
    "shifted events": (
        lambda z: optax.sigmoid_binary_cross_entropy(z - 1, TARGETS).mean(),
        "a function with a derivative rule",
    ),
    "other threshold": (
        lambda z: jnp.logaddexp(z, 1.0).mean(),
        "a function with a derivative rule",
    ),
    "classes and events": (
        lambda z: cross_entropy(z).mean() + optax.sigmoid_binary_cross_entropy(z, TARGETS).mean(),
        "adds up binary cross entropies and softmax cross entropies",
    ),
    "target from the outputs": (
        lambda z: jnp.mean((z - lax.stop_gradient(jnp.tanh(z))) ** 2),
        "`integer_pow`",
    ),
    "square of a sum": (lambda z: jnp.mean((z.sum(-1) - 1) ** 2), "`integer_pow`"),
    "product of two": (lambda z: jnp.mean(z * z[::-1]), "`mul`"),
    "both": (
        lambda z: cross_entropy(z).mean() + jnp.mean(z**2),
        "adds up softmax cross entropies and squares",
    ),
    "linear": (lambda z: z.mean(), "does not depend on the outputs"),
    "loop": (
        lambda z: lax.scan(
            lambda total, row: (total + cross_entropy(row, LABELS[0]).sum(), None), 0.0, z
        )[0],
        "`scan`",
    ),
}


def test_losses_that_show_none(x64):
    for name, (loss, reason) in OTHERS.items():
        likelihood, got = recognize(oa.Objective(lambda p: p, loss), jnp.asarray(OUTPUTS[0]))
        assert likelihood is None, name
        assert reason in got, name


def test_several_outputs_show_no_likelihood():
    pair = oa.Objective(lambda p: p, lambda out: jnp.mean(out[0] ** 2 + out[1] ** 2))
    assert recognize(pair, (OUTPUTS[0], OUTPUTS[1])) == (None, "the outputs are not one array")


def test_a_large_vocabulary_needs_no_likelihood():
    """More outputs than a root of the loss Hessian is taken of: as if the likelihood were given."""
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    labels = np.array([1, 299, 17, 40])
    objective = oa.Objective(lambda p: x @ p, lambda z: cross_entropy(z, labels).mean())
    params = jnp.zeros((3, 300))
    updates = [
        first_update(oa.scale_by_kfac(objective, likelihood=likelihood), objective, params)[0]
        for likelihood in (None, "categorical")
    ]
    np.testing.assert_array_equal(*updates)


def test_binary_cross_entropy_has_its_exact_fisher_matrix(x64):
    """Of equal inputs, for which a Kronecker product is exact; without a `likelihood`."""
    x = np.tile([[1.0, -2.0, 0.5]], (4, 1))
    y, weights = np.eye(4)[:, :2], np.array([[1.0, 2.0]])

    def loss(z):
        return jnp.mean(jnp.sum(weights * optax.sigmoid_binary_cross_entropy(z, y), axis=-1))

    objective = oa.Objective(lambda p: x @ p, loss)
    params = jnp.asarray(np.linspace(-1.0, 1.0, 6).reshape(3, 2))
    tx = oa.scale_by_kfac(objective, damping=0.1, damping_kind="eigen", estimator="ggn")
    update, _ = first_update(tx, objective, params)
    # The loss is linear in its targets: its Hessian is that of every target, so the Fisher matrix.
    fisher = jax.hessian(objective)(params).reshape(6, 6)
    expected = np.linalg.solve(fisher + 0.1 * np.eye(6), objective.grad(params).ravel())
    np.testing.assert_allclose(update.ravel(), expected, rtol=1e-10)
