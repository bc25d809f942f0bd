"""Random pytrees through every public transformation: an error of ours, or updates that fit."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_accel as oa

NUM_TREES = 150  # each method meets every third of them, curvature methods fewer
SECONDS = 60.0  # of processor time, about twice of what is needed; then no more trees are tried
SHAPES = ((), (3,), (2, 3), (0,), (3, 0, 2))
DTYPES = ("float32", "float32", "bfloat16", "float16", "complex64", "int32", "uint8", "bool", "key")
LIBRARY = str(Path(oa.__file__).parent)

SGD, RING = optax.sgd(0.1), oa.topologies.ring(1)


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    kernel: Any
    scale: Any

    def __call__(self, x: Any) -> Any:
        return x


def loss(params: Any) -> jax.Array:
    """The squares of everything that can be differentiated, in float32."""
    total = jnp.zeros(())
    for leaf in jax.tree.leaves(params):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.inexact):
            wide = jnp.asarray(leaf, jnp.promote_types(dtype, jnp.float32))
            total += 0.5 * jnp.sum(jnp.abs(wide) ** 2 if jnp.iscomplexobj(wide) else wide**2)
    return total


OBJECTIVE = oa.Objective(lambda params: jnp.stack([loss(params)] * 2), lambda out: out[0])

ELEMENTWISE: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "scale_by_demon": lambda mask: oa.scale_by_demon(nesterov=True, decay_steps=9),
    "demon_sgd": lambda mask: oa.demon_sgd(0.1, decay_steps=9, learning_rate_in_momentum=True),
    "scale_by_demon_adam": lambda mask: oa.scale_by_demon_adam(decay_steps=9, form="ema"),
    "demon_adam": lambda mask: oa.demon_adam(0.1, eps=0.0, decay_steps=9),
    "sample_gradients": lambda mask: oa.sample_gradients(0.5),
    "sample_gradients rescaled": lambda mask: oa.sample_gradients(
        0.5, sampler=oa.bernoulli_per_tensor, rescale=True
    ),
    "stoch_grad_adam": lambda mask: oa.stoch_grad_adam(0.1, eps=0.0, b1_decay=0.9, bias_offset=1),
    "scale_by_adabound": lambda mask: oa.scale_by_adabound(eps=0.0, gamma=0.1),
    "adabound": lambda mask: oa.adabound(0.1, amsbound=True),
    "with_schedules": lambda mask: oa.with_schedules(
        oa.stoch_grad_adam, b1=oa.demon_schedule(0.9, 9)
    )(0.1),
    "dynamic_loss_scale": lambda mask: oa.dynamic_loss_scale(oa.demon_adam(0.1, decay_steps=9)),
    "decentlam": lambda mask: oa.decentlam(0.1, topology=RING),
    "dmsgd": lambda mask: oa.dmsgd(0.1, topology=RING, accumulator_dtype=jnp.float32),
    "post_local_sgd": lambda mask: oa.post_local_sgd(
        oa.stoch_grad_adam(0.1), local_steps=1, switch_step=1
    ),
    "reparametrize": lambda mask: oa.reparametrize(
        oa.demon_sgd(0.1, decay_steps=9), oa.weight_norm(), mask=mask
    ),
    "forward_gradient": lambda mask: oa.forward_gradient(
        oa.demon_sgd(0.1, decay_steps=9), mask=mask
    ),
    "gnp": lambda mask: oa.gnp(oa.demon_sgd(0.1, decay_steps=9), mask=mask),
    "extragradient": lambda mask: oa.extragradient(
        oa.stoch_grad_adam(0.1), 0.1, "filter_gaussian", trust_ratio=True, mask=mask
    ),
    "extrap_sgd": lambda mask: oa.extrap_sgd(0.1, direction="past", mask=mask),
    "extra_adam": lambda mask: oa.extra_adam(0.1, eps=0.0),
}
# These take longer: each tree meets one of them.
CURVED: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "project_to_bulk": lambda mask: oa.project_to_bulk(1, mask=mask),
    "project_to_dominant": lambda mask: oa.project_to_dominant(1, mask=mask),
    "interpolate_subspaces": lambda mask: oa.interpolate_subspaces(
        2, 0.5, 2.0, tracker=oa.GradientTracker(), mask=mask
    ),
    "bulk_sgd": lambda mask: oa.bulk_sgd(0.1, 1, mask=mask),
    "dom_sgd": lambda mask: oa.dom_sgd(0.1, 1, tracker=oa.RoundRobinTracker(), mask=mask),
    "interpolated_sgd": lambda mask: oa.interpolated_sgd(0.1, 1, 0.5, 1.0, mask=mask),
    "hessian_free": lambda mask: oa.hessian_free(max_iterations=2, mask=mask),
    "scale_by_kfac": lambda mask: oa.scale_by_kfac(OBJECTIVE, mask=mask),
    "ekfac": lambda mask: oa.ekfac(0.1, OBJECTIVE, mask=mask),
}


def random_leaf(rng: np.random.Generator) -> Any:
    if rng.random() < 0.05:
        return float(rng.normal())  # a number of Python, as Optax allows
    dtype, shape = str(rng.choice(DTYPES)), SHAPES[rng.integers(len(SHAPES))]
    if dtype == "key":
        return jax.random.split(jax.random.key(int(rng.integers(9))), shape)
    values = rng.normal(size=shape) * rng.choice([0.0, 1e-4, 1.0])
    return jnp.asarray(np.abs(9 * values) if dtype == "uint8" else values).astype(dtype)


def random_tree(rng: np.random.Generator, depth: int = 3) -> Any:
    kind = rng.integers(9) if depth else 8
    children = (random_tree(rng, depth - 1) for _ in range(rng.integers(3)))
    match kind:
        case 0:
            return list(children)
        case 1:
            return tuple(children)
        case 2 | 3:
            return dict(zip(("bias", "value"), children, strict=False))
        case 4:
            return Pair(random_tree(rng, depth - 1), None)
        case 5:
            return Module(random_tree(rng, depth - 1), random_tree(rng, depth - 1))
        case 6:
            return nnx.State({"kernel": random_leaf(rng), "layers": {0: random_leaf(rng)}})
        case 7:
            return {"none": None, "leaf": random_leaf(rng)}
    return random_leaf(rng)


def gradient_of(leaf: Any) -> Any:
    """An array like the leaf, as `jax.grad` returns it; keys and booleans stand for themselves."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def describe(tree: Any) -> str:
    return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree))


def check(make: Callable[[Any], optax.GradientTransformation], params: Any, mask: Any) -> bool:
    """Whether it was updated; False if it was refused by an error of ours."""
    grads = jax.tree.map(gradient_of, params)
    try:
        tx = optax.with_extra_args_support(make(mask))
        state = tx.init(params)
        updates, new_state = tx.update(
            grads, state, params, value_fn=OBJECTIVE, value=jnp.ones(()), refresh=False
        )
    except (TypeError, ValueError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if not last.startswith(LIBRARY):
            raise
        return False
    assert signature(updates) == signature(params)
    assert signature(new_state) == signature(state)
    for u in jax.tree.leaves(updates):
        assert not jnp.issubdtype(u.dtype, jnp.inexact) or np.isfinite(np.asarray(u)).all(), u
    return True


def signature(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


# K-FAC says that it found blocks without a Kronecker product, as it should.
@pytest.mark.filterwarnings("ignore:.* takes the curvature of")
@pytest.mark.slow
def test_random_trees() -> None:
    end, curved = time.process_time() + SECONDS, list(CURVED)
    outcomes: dict[str, list[bool]] = {name: [] for name in ELEMENTWISE | CURVED}
    for seed in range(NUM_TREES):
        if time.process_time() > end and seed >= 30:
            break
        rng = np.random.default_rng(seed)
        params = random_tree(rng)
        if params is None:
            continue
        # Often what cannot be trained is masked out, by a tree or by a function.
        floating = lambda tree: jax.tree.map(  # noqa: E731
            lambda x: bool(jnp.issubdtype(jnp.result_type(x), jnp.floating)), tree
        )
        mask = (None, floating, floating(params), True)[seed % 4]
        names = [*list(ELEMENTWISE)[seed % 3 :: 3], curved[seed % len(curved)]]
        for name in names:
            try:
                outcomes[name].append(check((ELEMENTWISE | CURVED)[name], params, mask))
            except Exception as error:
                error.add_note(f"{name}, tree {seed}: {describe(params)}, mask {seed % 4}")
                raise
    # Neither refuses everything nor is there nothing that it refuses.
    for name in ELEMENTWISE:
        assert {True, False} == set(outcomes[name]), name
