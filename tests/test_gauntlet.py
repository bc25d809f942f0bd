"""The gauntlet: what every method has to pass, ready-made optimizers and bare building blocks.

One tiny problem serves all tests, and the tests of one case run one after the other and share its
compiled programs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_accel as oa
from optax_accel.extrapolation import Direction
from tests.helpers import (
    over_workers,
    signature,
    tree_allclose,
    tree_equal,
    with_eigenspace,
)
from tests.methods import (
    ADAM_RATES,
    NUM_STEPS,
    OPTIMIZERS,
    PER_WORKER,
    PROBLEM,
    SGD_RATES,
    Case,
    K,
)

PARTS = {
    "everything": jax.tree.map(np.ones_like, PROBLEM.dominant),
    "bulk": jax.tree.map(np.logical_not, PROBLEM.dominant),
    "dominant": PROBLEM.dominant,
    # The inputs have mean zero, so the mean outputs depend on the biases alone.
    "weights": {"dense": {"w": np.ones((4, 2), bool)}, "b": np.zeros(2, bool)},
}


def chained(name: str, *parts: Any, rates: tuple[float, ...] = SGD_RATES, **kwargs: Any) -> Case:
    return Case(
        name, lambda rate: optax.chain(*parts, optax.scale_by_learning_rate(rate)), rates, **kwargs
    )


CURVED: dict[str, Any] = {"refresh": oa.refresh_at}
TRACKER = oa.BlockTracker(refresh_every=2, oversampling=1, order="magnitude")
KFAC: dict[str, Any] = {"damping": 0.1, "factors_every": 2, "inverses_every": 4}
# Those that the ready-made optimizers have not.
TRACKERS: dict[str, oa.Tracker] = {
    "gradient rows": oa.GradientTracker(rows="gradient", refresh_every=1, buffer=2),
    "exact": oa.ExactTracker(refresh_every=3),
    "bfloat16 basis": oa.BlockTracker(refresh_every=2, storage_dtype=jnp.bfloat16),
}
CASES = (
    *OPTIMIZERS,
    *(
        Case(name, lambda rate, name=name: PER_WORKER[name](rate, None, 1))
        for name in ("post_local_sgd", "decentlam", "dmsgd")
    ),
    chained("project_to_bulk", oa.project_to_bulk(K), optimizes="bulk", **CURVED, slow=True),
    chained(
        "project_to_dominant", oa.project_to_dominant(K), optimizes="dominant", **CURVED, slow=True
    ),
    Case(
        "interpolate_subspaces after adam",
        lambda rate: optax.chain(
            optax.adam(rate), oa.interpolate_subspaces(K, 0.5, 1.5, tracker=TRACKER, start_step=1)
        ),
        ADAM_RATES,
        refresh=lambda step: oa.refresh_at(step, refresh_every=2, start_step=1),
        slow=True,
    ),
    *(
        Case(
            f"interpolated_sgd {name}",
            lambda rate, tracker=tracker: oa.interpolated_sgd(rate, K, 0.5, 1.0, tracker=tracker),
            refresh=lambda step, tracker=tracker: oa.refresh_at(step, tracker.refresh_every),
            slow=True,
        )
        for name, tracker in TRACKERS.items()
    ),
    chained("scale_by_kfac", oa.scale_by_kfac(PROBLEM.objective(), **KFAC)),
    chained("scale_by_ekfac", oa.scale_by_ekfac(PROBLEM.objective(), **KFAC), slow=True),
    chained("scale_by_demon", oa.scale_by_demon(nesterov=True, decay_steps=NUM_STEPS)),
    chained(
        "scale_by_demon_adam",
        oa.scale_by_demon_adam(decay_steps=NUM_STEPS, form="ema"),
        rates=ADAM_RATES,
    ),
    Case(
        "galore eight bits",
        lambda rate: oa.galore(rate, 1, refresh_every=2, scale=1.0, eight_bits=True),
        (0.001, 0.003, 0.01, 0.03, 0.1),
        matrices=True,
        slow=True,
    ),
    chained("sample_gradients", oa.sample_gradients(0.5, key=1, rescale=True)),
    chained(
        "sample_gradients per tensor",
        oa.sample_gradients(0.5, key=jax.random.key(2), sampler=oa.bernoulli_per_tensor),
        slow=True,
    ),
    *(
        Case(
            f"extragradient {direction}",
            lambda rate, direction=direction: oa.extragradient(
                optax.sgd(rate), 0.1, direction, trust_ratio=direction == "gaussian"
            ),
            slow=direction != "gaussian",
        )
        # Those that `extrap_sgd` and `extra_adam` do not take.
        for direction in get_args(Direction)
        if direction not in ("gradient", "past", "inner_update")
    ),
    Case(
        "with_schedules adamw",
        lambda rate: oa.with_schedules(
            optax.adamw, b1=optax.cosine_decay_schedule(0.9, NUM_STEPS), weight_decay=lambda t: 1e-4
        )(rate),
        ADAM_RATES,
    ),
    Case(
        "with_schedules sgd",
        lambda rate: oa.with_schedules(optax.sgd, momentum=oa.demon_schedule(0.9, NUM_STEPS))(
            rate, nesterov=True
        ),
    ),
    # The grid is one of the noise's standard deviation: there is no learning rate.
    Case("esmda", lambda noise: oa.esmda(num_members=24, noise=noise), (0.3, 0.4, 0.5, 0.7, 1.0)),
)


def update(tx: Any, params: Any, state: Any, x: Any, y: Any, **extra: Any) -> tuple[Any, Any]:
    """One update that offers every extra argument that a method may ask for."""
    objective = PROBLEM.objective(x, y)
    value, grads = objective.value_and_grad(params)
    return tx.update(grads, state, params, value=value, grad=grads, value_fn=objective, **extra)


def step(tx: Any, params: Any, state: Any, x: Any, y: Any, **extra: Any) -> tuple[Any, Any]:
    updates, state = update(tx, params, state, x, y, **extra)
    return optax.apply_updates(params, updates), state


def train(tx: Any, params: Any, x: Any, y: Any, num_steps: int) -> Any:
    """Trains in one compiled loop; returns the parameters after each step."""

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        carry = step(tx, *carry, x, y)
        return carry, carry[0]

    return jax.lax.scan(body, (params, tx.init(params)), length=num_steps)[1]


def at(index: Any, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


class Runner:
    """A case with its compiled programs, each made at most once."""

    def __init__(self, case: Case):
        self.case = case
        self.rates = np.float32(case.rates)
        self.tx = case.build(case.rates[2])

    def init(self) -> Any:
        return self.tx.init(PROBLEM.params)

    def _train(self, rate: Any, params: Any, x: Any, y: Any, num_steps: int) -> Any:
        return train(self.case.build(rate), params, x, y, num_steps)

    @functools.cached_property
    def train(self) -> Callable[..., Any]:
        return jax.jit(self._train, static_argnames="num_steps")

    @functools.cached_property
    def trajectory(self) -> Any:
        """20 steps with the middle one of the learning rates."""
        return self.train(self.rates[2], PROBLEM.params, PROBLEM.x, PROBLEM.y, 20)

    @functools.cached_property
    def trajectories(self) -> Any:
        """One for each learning rate of the grid, computed together."""
        run = jax.vmap(self._train, in_axes=(0, None, None, None, None))
        return jax.jit(run, static_argnums=4)(
            self.rates, PROBLEM.params, PROBLEM.x, PROBLEM.y, NUM_STEPS
        )

    @functools.cached_property
    def donating_step(self) -> Callable[..., Any]:
        def unknown_arguments_too(params: Any, state: Any) -> tuple[Any, Any]:
            return step(self.tx, params, state, PROBLEM.x, PROBLEM.y, another_argument="unknown")

        return jax.jit(unknown_arguments_too, donate_argnums=(0, 1))

    def steps(self, params: Any, state: Any, num_steps: int) -> tuple[Any, Any]:
        carry = jax.tree.map(jnp.copy, (params, state))
        for _ in range(num_steps):
            carry = self.donating_step(*carry)
        return carry


def as_params(cases: Any) -> list[Any]:
    return [
        pytest.param(
            case, id=case.name.replace(" ", "-"), marks=[pytest.mark.slow] if case.slow else []
        )
        for case in cases
    ]


@pytest.fixture(scope="module", params=as_params(CASES))
def run(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param)


def check_convergence(relative_losses: jax.Array) -> None:
    """Whether losses fell, of one rate of the grid far; the two highest rates may diverge."""
    assert jnp.all(relative_losses[:3] < 1), relative_losses  # no comparison with NaN is true
    assert jnp.nanmin(relative_losses) < 0.01, relative_losses


def test_converges(run: Runner) -> None:
    """On the part that it optimizes; `dom_sgd` does not converge on the rest, nor should it."""
    objective, end = PROBLEM.objective(), at((slice(None), -1), run.trajectories)
    part = PARTS[run.case.optimizes]
    cut = functools.partial(jax.tree.map, jnp.where, part)
    relative_loss = jax.vmap(lambda p: objective(cut(p, PROBLEM.optimum)))(end) / objective(
        cut(PROBLEM.params, PROBLEM.optimum)
    )
    check_convergence(relative_loss)
    moved = jax.tree.map(
        lambda p, x, x0: jnp.where(p[None], 0, x[:3] - x0[None]), part, end, PROBLEM.params
    )
    tree_allclose(moved, jax.tree.map(jnp.zeros_like, moved), atol=1e-4)


def test_vmap_over_learning_rates_is_a_loop(run: Runner) -> None:
    for i in range(3):
        alone = run.train(run.rates[i], PROBLEM.params, PROBLEM.x, PROBLEM.y, 20)
        # Batched matrix products may sum in another order.
        tree_allclose(at((i, slice(20)), run.trajectories), alone, rtol=1e-5)


def test_jit_is_no_jit(run: Runner) -> None:
    """Also: refreshes driven from the host are those in the graph."""
    params, state = PROBLEM.params, run.init()
    for i in range(4):
        refresh = run.case.refresh(i) if run.case.refresh else None
        params, state = step(run.tx, params, state, PROBLEM.x, PROBLEM.y, refresh=refresh)
        tree_allclose(params, at(i, run.trajectory), rtol=1e-6)


def test_eight_devices_are_one_device(run: Runner) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    batch = jax.device_put((PROBLEM.x, PROBLEM.y), data)
    rate, params = jax.device_put((run.rates[2], PROBLEM.params), everywhere)
    tree_allclose(run.train(rate, params, *batch, 20), run.trajectory, rtol=1e-5)


def test_chain_and_multi_steps(run: Runner) -> None:
    """Neutral neighbors and micro-batches that are all alike change nothing."""
    chain = optax.chain(
        optax.clip_by_global_norm(1e6), run.case.build(run.rates[2]), optax.add_decayed_weights(0.0)
    )
    tx = optax.MultiSteps(chain, every_k_schedule=2)
    micro = jax.jit(train, static_argnums=(0, 4))(tx, PROBLEM.params, PROBLEM.x, PROBLEM.y, 6)
    tree_allclose(at(slice(1, None, 2), micro), at(slice(3), run.trajectory), rtol=1e-6)


@pytest.mark.parametrize("dtypes", ["bf16", "bf16-f32", "f64"])
def test_keeps_dtypes(run: Runner, dtypes: str) -> None:
    """Dtypes stay what they were, so that `scan` accepts the step and `jit` compiles it once."""
    with jax.enable_x64(dtypes == "f64"):
        params = optax.tree.cast(PROBLEM.params, "float64" if dtypes == "f64" else "bfloat16")
        if dtypes == "bf16-f32":
            params["b"] = PROBLEM.params["b"]
        state = jax.eval_shape(run.case.build(0.1).init, params)
        updates, new_state = jax.eval_shape(
            functools.partial(update, run.tx), params, state, PROBLEM.x, PROBLEM.y
        )
    assert [u.dtype for u in jax.tree.leaves(updates)] == [p.dtype for p in jax.tree.leaves(params)]
    assert signature(new_state) == signature(state)


def test_trains_mixed_precision(run: Runner) -> None:
    params = optax.tree.cast(PROBLEM.params, jnp.bfloat16) | {"b": PROBLEM.params["b"]}
    trajectory = run.train(run.rates[2], params, PROBLEM.x, PROBLEM.y, 20)
    assert signature(at(-1, trajectory)) == signature(params)
    loss = jax.vmap(PROBLEM.objective())(trajectory)
    assert jnp.all(jnp.isfinite(loss))
    assert loss[-1] < PROBLEM.objective()(params)


# Optax's own divide by an `eps` that is 0 in float16.
OURS = [case for case in CASES if case.name != "with_schedules adamw"]


# Behind Optax's own Adam, whose `eps` of 1e-8 is 0 in float16, there is nothing left to survive;
# ESMDA ignores gradients.
@pytest.mark.parametrize(
    "case",
    as_params(
        case for case in OURS if case.name not in ("interpolate_subspaces after adam", "esmda")
    ),
)
def test_half_precision_survives_zero_and_tiny_gradients(case: Case) -> None:
    """Numbers whose squares, and an `eps` that, are 0 in float16 are divided by in float32."""
    tx, objective = case.build(case.rates[2]), PROBLEM.objective()
    params = {
        "dense": {"w": PROBLEM.params["dense"]["w"].astype(jnp.float16)},
        "b": PROBLEM.params["b"].astype(jnp.bfloat16),
    }

    def body(carry: Any, scale: jax.Array) -> Any:
        params, state = carry
        scaled = oa.Objective(objective.outputs, lambda out: scale * jnp.mean(out))
        grads = scaled.grad(params)
        updates, state = tx.update(grads, state, params, value_fn=scaled, refresh=False)
        return (optax.apply_updates(params, updates), state), updates

    state = with_eigenspace(tx.init(params))
    updates = jax.jit(lambda *carry: jax.lax.scan(body, carry, jnp.float32([0, 1e-4, 0])))(
        params, state
    )[1]
    for leaf in jax.tree.leaves(updates):
        assert not leaf[0].any()
        assert jnp.all(jnp.abs(leaf) < 10 * case.rates[2])


def test_state_holds_arrays_of_known_shapes(run: Runner) -> None:
    state = run.init()
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len({id(leaf) for leaf in leaves}) == len(leaves)  # an array can be donated only once
    assert signature(jax.eval_shape(run.tx.init, PROBLEM.params)) == signature(state)
    # A checkpoint forgets weak types: the step would be compiled anew after a restart.
    assert not any(getattr(leaf, "weak_type", False) for leaf in leaves)


def test_map_params_finds_what_is_like_the_parameters(run: Runner) -> None:
    """As in Optax's common test: `init` accepts a placeholder and its state has the same form.

    Copies of the parameters are mapped, with further axes in front too; numbers and small matrices
    are not.
    """
    state = jax.eval_shape(run.tx.init, PROBLEM.params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(PROBLEM.params)]
    mapped = []

    def note(leaf: Any) -> Any:
        mapped.append(leaf.shape)
        return leaf

    same = optax.tree.map_params(run.tx, note, state)
    assert signature(same) == signature(state)
    assert all(any(shape[len(shape) - len(s) :] == s for s in shapes) for shape in mapped)
    # Of what is as large as the parameters there is all or, as in a bare projection, nothing.
    assert set(mapped) & set(shapes) in (set(), set(shapes))
    if run.case.basis:
        assert (K, *shapes[0]) in mapped


def test_donation(run: Runner) -> None:
    for _ in range(2):  # a second run finds nothing deleted that the transformation keeps
        carry = jax.tree.map(jnp.copy, PROBLEM.params), run.init()
        for _ in range(3):
            old, carry = carry, run.donating_step(*carry)
            # Scalars that are only there to be read are not even given to the compiled step.
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old) if leaf.size > 1)


def test_orbax_round_trip(run: Runner, tmp_path: Path) -> None:
    saved = run.steps(PROBLEM.params, run.init(), 3)
    target = jax.eval_shape(lambda: (PROBLEM.params, run.init()))
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(3, args=ocp.args.StandardSave(saved))
        restored = manager.restore(3, args=ocp.args.StandardRestore(target))
    tree_equal(restored, saved)
    tree_equal(run.steps(*restored, 3), run.steps(*saved, 3))


@pytest.mark.parametrize("poisoned", ["gradient", "curvature"])
@pytest.mark.parametrize("case", as_params(case for case in CASES if case.basis))
def test_non_finite_values_leave_the_basis_alone(case: Case, poisoned: str) -> None:
    tx, params = case.build(0.1), PROBLEM.params
    state = with_eigenspace(tx.init(params))
    if poisoned == "gradient":
        gradient = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
        refresh, objective = False, PROBLEM.objective()
    else:
        gradient, refresh, objective = params, "warm", PROBLEM.objective(PROBLEM.x * np.nan)

    @jax.jit
    def once(gradient: Any, state: Any) -> tuple[Any, Any]:
        return tx.update(gradient, state, params, value_fn=objective, refresh=refresh)

    updates, new_state = once(gradient, state)
    for name in ("basis", "eigenvalues", "ready"):
        tree_equal(optax.tree.get(new_state, name), optax.tree.get(state, name))
    assert jnp.isfinite(optax.tree.get(new_state, "alignment_ema"))
    sees_it = poisoned == "curvature" and "gradient rows" not in case.name
    assert optax.tree.get(new_state, "accepted") == (not sees_it)
    assert optax.tree.get(new_state, "rejected") == sees_it
    if poisoned == "curvature":
        assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))


# -- workers with a state of their own ------------------------------------------------------------

WORKERS = 4
X, Y = (a.reshape(WORKERS, -1, a.shape[1]) for a in (PROBLEM.x, PROBLEM.y))


def build_worker(name: str, rate: Any) -> Any:
    return PER_WORKER[name](rate, "workers", WORKERS)


def copies(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (WORKERS, *leaf.shape)), tree)


@functools.cache
def worker_trajectory(name: str) -> Any:
    """20 steps with the middle one of the learning rates."""

    def run(x: Any, y: Any) -> Any:
        tx = build_worker(name, SGD_RATES[2])
        return train(tx, PROBLEM.params, x, y, 20)

    return over_workers("vmap", run, WORKERS)(X, Y)


@pytest.mark.parametrize("name", PER_WORKER)
def test_workers_converge(name: str) -> None:
    """On parts of one problem that agree on the optimum; the mean over the workers, too."""

    def run(rate: Any, x: Any, y: Any) -> Any:
        return at(-1, train(build_worker(name, rate), PROBLEM.params, x, y, NUM_STEPS))

    over_rates = jax.vmap(jax.vmap(run, (None, 0, 0), axis_name="workers"), (0, None, None))
    end = jax.jit(over_rates)(np.float32(SGD_RATES), X, Y)
    mean = jax.tree.map(lambda leaf: leaf.mean(1), end)
    objective = PROBLEM.objective()
    for losses in (
        jax.vmap(jax.vmap(objective))(end).max(1),
        jax.vmap(objective)(mean),
    ):
        check_convergence(losses / objective(PROBLEM.params))


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
@pytest.mark.parametrize("name", PER_WORKER)
def test_workers_on_devices_are_those_of_a_simulation(name: str, mode: str) -> None:
    tx = build_worker(name, SGD_RATES[2])
    one = over_workers(mode, functools.partial(step, tx), WORKERS)
    params, state = copies(PROBLEM.params), copies(tx.init(PROBLEM.params))
    for i in range(20):
        before = signature(state)
        params, state = jax.block_until_ready(one(params, state, X, Y))
        assert signature(state) == before
        tree_allclose(params, at((slice(None), i), worker_trajectory(name)), rtol=1e-5)


@pytest.mark.parametrize("name", PER_WORKER)
def test_workers_in_a_chain_and_with_micro_batches(name: str) -> None:
    """Neutral neighbors and micro-batches that are all alike change nothing."""
    rate = SGD_RATES[2]
    chain = optax.chain(
        optax.clip_by_global_norm(1e6), build_worker(name, rate), optax.add_decayed_weights(0.0)
    )
    tx = optax.MultiSteps(chain, every_k_schedule=2)
    micro = over_workers("vmap", lambda x, y: train(tx, PROBLEM.params, x, y, 6), WORKERS)(X, Y)
    tree_allclose(
        at((slice(None), slice(1, None, 2)), micro),
        at((slice(None), slice(3)), worker_trajectory(name)),
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtypes", ["bf16", "bf16-f32", "f64"])
@pytest.mark.parametrize("name", PER_WORKER)
def test_workers_keep_dtypes(name: str, dtypes: str) -> None:
    with jax.enable_x64(dtypes == "f64"):
        params = optax.tree.cast(PROBLEM.params, "float64" if dtypes == "f64" else "bfloat16")
        if dtypes == "bf16-f32":
            params["b"] = PROBLEM.params["b"]
        tx = build_worker(name, 0.1)
        state = jax.eval_shape(lambda: copies(tx.init(params)))
        for mode in ("vmap", "shard_map"):
            updates, new_state = jax.eval_shape(
                over_workers(mode, functools.partial(update, tx), WORKERS),
                copies(params),
                state,
                X,
                Y,
            )
            assert signature(new_state) == signature(state)
            assert signature(updates) == signature(copies(params))


SGD = optax.sgd(0.1)
# Every factory, with the arguments that have no default; hyperparameters are found by annotation.
FACTORIES: dict[Callable[..., optax.GradientTransformationExtraArgs], dict[str, Any]] = {
    oa.project_to_bulk: {"num_directions": K},
    oa.project_to_dominant: {"num_directions": K},
    oa.interpolate_subspaces: {"num_directions": K, "dominant_weight": 0.3, "bulk_weight": 0.7},
    oa.bulk_sgd: {"learning_rate": 0.1, "num_directions": K},
    oa.dom_sgd: {"learning_rate": 0.1, "num_directions": K},
    oa.interpolated_sgd: {
        "learning_rate": 0.1,
        "num_directions": K,
        "dominant_weight": 0.3,
        "bulk_weight": 0.7,
    },
    oa.scale_by_demon: {"decay_steps": 10},
    oa.demon_sgd: {"learning_rate": 0.1, "decay_steps": 10},
    oa.scale_by_demon_adam: {"decay_steps": 10},
    oa.demon_adam: {"learning_rate": 0.1, "decay_steps": 10},
    oa.scale_by_qhm: {},
    oa.qhm: {"learning_rate": 0.1},
    oa.scale_by_qh_adam: {},
    oa.qh_adam: {"learning_rate": 0.1},
    oa.scale_by_aggmo: {},
    oa.aggmo: {"learning_rate": 0.1},
    oa.scale_by_yellowfin: {},
    oa.yellowfin: {},
    oa.scale_by_galore: {"rank": 1},
    oa.galore: {"learning_rate": 0.1, "rank": 1, "weight_decay": 0.5},
    oa.scale_by_adarankgrad: {"max_rank": 2},
    oa.adarankgrad: {"learning_rate": 0.1, "max_rank": 2, "weight_decay": 0.5},
    oa.sparse_increments: {"inner": SGD, "rate": 0.5},
    oa.sift: {
        "learning_rate": 0.1,
        "rate": 0.5,
        "weight_decay": 0.5,
        "decay_selected": True,
        "selection": "random",  # which does not wait for a gradient
    },
    oa.sharpness_directed: {
        "inner": SGD,
        "rho": 0.3,
        "sparsity": 0.5,
        "prune_step": 10,
        "refresh_every": 1,
    },
    oa.keep_pruned: {
        "inner": SGD,
        "pruned": {"dense": {"w": np.eye(4, 2, dtype=bool)}, "b": np.zeros(2, bool)},
    },
    oa.gradsamp: {"inner": SGD, "steps_per_epoch": 1, "start": 1, "period": 2},
    # Pairs, which Optax's injection leaves as they are: they decide shapes.
    oa.sampled_product_gradients: {
        "ratio": (0.5, 0.5),
        "min_samples": (1, 1),
        "where": "backward",
    },
    oa.sample_gradients: {"rescale": True},
    oa.stoch_grad_adam: {"learning_rate": 0.1},
    oa.extragradient: {"inner": SGD, "extrapolation_rate": 0.1, "direction": "gaussian"},
    oa.extrap_sgd: {"learning_rate": 0.1, "extrapolation_rate": 0.05},
    oa.extra_adam: {"learning_rate": 0.1},
    oa.forward_gradient: {"inner": SGD},
    oa.anderson_acceleration: {"inner": SGD, "memory": 2},
    oa.gnp: {"inner": SGD, "rho": 0.3},
    oa.dynamic_loss_scale: {"inner": SGD, "initial_scale": 4},
    oa.monitor_curvature: {"inner": SGD},
    # Damping that acts at once.
    oa.scale_by_kfac: {"objective": PROBLEM.objective(), "damping": 1.0, "damping_kind": "eigen"},
    oa.scale_by_ekfac: {"objective": PROBLEM.objective(), "damping": 1.0},
    oa.kfac: {
        "learning_rate": 0.1,
        "objective": PROBLEM.objective(),
        "damping": 1.0,
        "damping_kind": "eigen",
    },
    oa.ekfac: {"learning_rate": 0.1, "objective": PROBLEM.objective(), "damping": 1.0},
    oa.hessian_free: {"max_iterations": 5},
    oa.scale_by_batch_gauss_newton: {"damping": 1.0},
    oa.batch_gauss_newton: {"learning_rate": 0.1, "damping": 1.0, "momentum": 0.5},
    oa.quadratic_model: {
        "preconditioner": oa.scale_by_batch_gauss_newton(),  # which takes the damping
        "learning_rate": 0.1,
        "momentum": 0.5,
        "damping": 1.0,
    },
    oa.reparametrize: {"inner": SGD, "reparametrization": oa.weight_norm()},
    # Bounds that act on the gradients of the problem, so that they matter.
    oa.scale_by_adabound: {"final_scale": 1.0, "gamma": 0.5},
    oa.adabound: {"learning_rate": 0.1, "gamma": 0.5, "amsbound": True},
    oa.decentlam: {"learning_rate": 0.1, "topology": oa.topologies.ring(1)},
    oa.dmsgd: {"learning_rate": 0.1, "topology": oa.topologies.ring(1)},
    oa.post_local_sgd: {"inner": SGD, "local_steps": 2, "switch_step": 1},
    oa.esmda: {"num_members": 8, "noise": 0.5, "inflation": 1.1, "alphas": (2.0, 2.0)},
    oa.enkf: {"num_members": 8, "noise": 0.5, "inflation": 1.1},
}


def hyperparameters(factory: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, float]:
    """Numbers that a person might schedule or inject, with their values."""
    values = {
        name: kwargs.get(name, parameter.default)
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in oa.static_arguments(factory)
    }
    return {name: value for name, value in values.items() if isinstance(value, float)}


def three_updates(tx: Any, hyperparams: dict[str, Any] | None = None, state: Any = None) -> Any:
    """Updates for three gradients, one after the other, from a state with a basis."""
    state = with_eigenspace(tx.init(PROBLEM.params) if state is None else state)
    if hyperparams:
        state = state._replace(hyperparams={**state.hyperparams, **hyperparams})

    def body(state: Any, scale: jax.Array) -> tuple[Any, Any]:
        updates, state = update(
            tx, PROBLEM.params, state, PROBLEM.x, scale * PROBLEM.y, refresh=False
        )
        return state, updates

    return jax.lax.scan(body, state, jnp.float32([1, -2, 0.5]))[1]


@functools.cache
def plain_updates(factory: Callable[..., Any]) -> Any:
    return jax.jit(three_updates, static_argnums=0)(factory(**FACTORIES[factory]))


def distance(left: Any, right: Any) -> float:
    return float(optax.tree.norm(optax.tree.sub(left, right)) / optax.tree.norm(right))


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_inject_hyperparams(factory: Callable[..., Any]) -> None:
    """Hyperparameters can be changed in the state, as if the method had been built with them."""
    kwargs = FACTORIES[factory]
    values = hyperparameters(factory, kwargs)
    injected = oa.inject_hyperparams(factory)(**kwargs)
    assert set(injected.init(PROBLEM.params).hyperparams) >= set(values)

    @jax.jit
    def from_state_and_built_with(new: dict[str, Any]) -> tuple[Any, Any]:
        return three_updates(injected, new), three_updates(factory(**{**kwargs, **new}))

    # In float32, 1 - b2 has lost three digits.
    tree_allclose(from_state_and_built_with(values)[0], plain_updates(factory), rtol=1e-4)
    for name, value in values.items():
        changed = {**values, name: value * 0.9 if value else 0.1}
        tree_allclose(*from_state_and_built_with(changed), rtol=1e-6)


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_optax_inject_hyperparams(factory: Callable[..., Any]) -> None:
    """Optax's own makes arrays of all numbers: of counts, periods and seeds, too."""
    kwargs = FACTORIES[factory]
    # As Optax has it: what can be called, as an objective, must be named if it is no schedule.
    static = [name for name, value in kwargs.items() if callable(value)]
    injected = optax.inject_hyperparams(factory, static_args=static)(**kwargs)
    numbers = {
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if type(kwargs.get(name, parameter.default)) in (int, float)
    }
    # Outside of `jit`: the number of directions decides the shape of the state.
    state = injected.init(PROBLEM.params)
    assert set(state.hyperparams) == numbers
    changed = jax.jit(lambda state: three_updates(injected, state=state))(state)
    tree_allclose(changed, plain_updates(factory), rtol=1e-4)


def test_inject_stateful_hyperparams() -> None:
    """A schedule with a state, in the older function's name."""
    schedule = optax.schedules.WrappedSchedule(lambda count: 0.1 / (1 + count))
    with pytest.warns(DeprecationWarning, match="inject_hyperparams"):
        tx = optax.inject_stateful_hyperparams(oa.demon_sgd)(schedule, decay_steps=10)
    scheduled = oa.demon_sgd(lambda count: 0.1 / (1 + count), decay_steps=10)
    results = [jax.jit(three_updates, static_argnums=0)(t) for t in (tx, scheduled)]
    tree_allclose(*results, rtol=1e-5)


SCHEDULABLE = [
    pytest.param(factory, name, id=f"{factory.__name__}-{name}")
    for factory, kwargs in FACTORIES.items()
    for name in hyperparameters(factory, kwargs)
    if "ScalarOrSchedule" in str(inspect.signature(factory).parameters[name].annotation)
]


@pytest.mark.parametrize(("factory", "name"), SCHEDULABLE)
def test_schedules(factory: Callable[..., Any], name: str) -> None:
    """A schedule's first value acts like that number, its later values act."""
    kwargs = FACTORIES[factory]
    value = hyperparameters(factory, kwargs)[name]

    def scheduled(count: Any) -> jax.Array:
        # Two steps, because `extra_adam` counts half-steps.
        return jnp.where(count < 2, value, 0.5 * value)

    constant = plain_updates(factory)
    changing = jax.jit(lambda: three_updates(factory(**{**kwargs, name: scheduled})))()
    tree_allclose(at(0, changing), at(0, constant), rtol=1e-6)
    assert distance(at(2, changing), at(2, constant)) > 0.01


@pytest.mark.parametrize(
    "build",
    [
        lambda key: oa.stoch_grad_adam(0.1, key=key),
        lambda key: optax.chain(oa.sample_gradients(0.5, key=key), SGD),
        lambda key: oa.extragradient(SGD, 0.1, "gaussian", key=key),
    ],
    ids=["stoch_grad_adam", "sample_gradients", "extragradient"],
)
def test_vmap_over_seeds_is_a_loop(build: Callable[[Any], Any]) -> None:
    def run(key: Any) -> Any:
        return train(build(key), PROBLEM.params, PROBLEM.x, PROBLEM.y, 5)

    keys = jax.random.split(jax.random.key(0), 3)
    together, alone = jax.jit(jax.vmap(run))(keys), [jax.jit(run)(key) for key in keys]
    tree_allclose(together, jax.tree.map(lambda *rows: jnp.stack(rows), *alone), rtol=1e-5)
    assert distance(alone[0], alone[1]) > 1e-3


SGD_LIKE = (oa.demon_sgd, oa.extrap_sgd, oa.decentlam, oa.dmsgd, oa.scale_by_demon)
ADAM_LIKE = (oa.demon_adam, oa.stoch_grad_adam, oa.extra_adam, oa.adabound)
ADAM_LIKE += (oa.scale_by_demon_adam, oa.scale_by_adabound)


@pytest.mark.parametrize("factory", SGD_LIKE + ADAM_LIKE, ids=lambda factory: factory.__name__)
def test_positional_arguments_are_those_of_optax(factory: Callable[..., Any]) -> None:
    """In Optax's order, so that `f(1e-3, 0.9, 0.999)` means what it means there."""
    base = optax.sgd if factory in SGD_LIKE else optax.adam
    ours, theirs = (
        [
            name
            for name, parameter in inspect.signature(fn).parameters.items()
            if parameter.kind is not parameter.KEYWORD_ONLY and name != "learning_rate"
        ]
        for fn in (factory, base)
    )
    assert ours
    assert ours == theirs[: len(ours)]


def test_learning_rates_come_first_and_are_not_negative() -> None:
    for factory, kwargs in FACTORIES.items():
        names = [n for n in inspect.signature(factory).parameters if n != "preconditioner"]
        if "learning_rate" not in names:
            continue
        assert names[0] == "learning_rate"
        with pytest.raises(ValueError, match=r"`learning_rate` must lie in .*, got -0\.1"):
            factory(**{**kwargs, "learning_rate": -0.1})


def test_defaults_are_no_functions() -> None:
    """Optax's `inject_hyperparams` would take them for schedules."""
    for factory in FACTORIES:
        for parameter in inspect.signature(factory).parameters.values():
            assert parameter.default is parameter.empty or not callable(parameter.default)


# What the parameters of networks are called: `optax.tree.get` must not find them for our fields.
PARAMETER_NAMES = {
    *("kernel", "bias", "weight", "weights", "w", "b", "scale", "embedding", "embeddings"),
    *("query", "key", "value", "q", "k", "v", "out", "mean", "var", "alpha", "beta", "gamma"),
    *("g", "step", "params", "layers", "u", "values", "keys"),
}


def test_fields_of_states_are_not_called_as_parameters() -> None:
    states = [cls for name, cls in vars(oa).items() if name.endswith("State")]
    assert len(states) > 8
    for cls in states:
        assert not PARAMETER_NAMES & set(cls._fields), cls.__name__


def test_the_gauntlet_covers_every_factory() -> None:
    public = {getattr(oa, name) for name in oa.__all__}
    returns = {
        fn
        for fn in public
        if inspect.isfunction(fn)
        and "GradientTransformation" in str(inspect.signature(fn).return_annotation)
        and "Callable" not in str(inspect.signature(fn).return_annotation)
    }
    assert returns == set(FACTORIES)
    run = {case.name.split()[0] for case in CASES}
    # Some optimizers are nothing but their `scale_by_*`; the others have tests of their own.
    nothing_but = {"scale_by_adabound", "scale_by_batch_gauss_newton", "scale_by_qhm"}
    nothing_but |= {"scale_by_qh_adam", "scale_by_aggmo", "scale_by_yellowfin"}
    nothing_but |= {"scale_by_galore", "scale_by_adarankgrad", "sparse_increments"}
    nothing_but |= {"enkf"}
    apart = {"keep_pruned", "dynamic_loss_scale", "quadratic_model", "monitor_curvature"}
    assert {f.__name__ for f in returns} - run == nothing_but | apart
