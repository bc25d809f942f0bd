"""The units of work behind the six panels of the subspace study.

Every unit trains one or several runs of the module `subspace_runs` and returns rows of
plain numbers. The units of the panel `alignment` come first: they find the step at which the other
runs leave SGD, and keep the parameters there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import UsageError
from experiments.runs.units import Rows, Store, Unit
from experiments.training.optimizers import find_in_state
from experiments.training.step import TrainState
from experiments.training.studies.subspace_runs import (
    Plan,
    PyTree,
    Run,
    Study,
    alignment,
    rounded,
    update_products,
)
from optax_accel import curvature
from optax_accel.curvature import blocks

# Two public replications of Song et al. leave SGD where the moving average of chi_k, with this
# decay, exceeds this value.
SWITCH_ALIGNMENT, ALIGNMENT_DECAY = 0.95, 0.9
# The factors (a, b) of the update `a P d + b (I - P) d`: the three methods of Song et al., and two
# lines between them (our reading of Zakarin and Singh), with alpha the position on the line.
ALPHAS = (0.25, 0.5, 0.75)
METHODS = {"sgd": (1.0, 1.0), "dom": (1.0, 0.0), "bulk": (0.0, 1.0)}
LINES: dict[str, Callable[[float], tuple[float, float]]] = {
    "sgd_to_bulk": lambda alpha: (1 - alpha, 1.0),
    "dom_to_bulk": lambda alpha: (1 - alpha, alpha),
}
# Bulk-SGD and SGD are compared at these multiples of the learning rate; the other ablations change
# one setting at a time at ABLATION_RATE times the learning rate.
RATE_FACTORS = (1, 2, 5, 10, 20, 50, 100)
ABLATION_RATE = 5
MOMENTUM = 0.9
# Each estimate of the effective learning rates pools this number of updates.
WINDOW = 10
# Number of eigenvalues measured beyond the k-th.
EXTRA_EIGENVALUES = 4
# Matrices whose energy is measured: constructors of `optax_accel.curvature`.
OPERATORS = ("hessian", "gauss_newton", "functional_hessian")
OPTIMIZERS: dict[str, tuple[float, dict[str, Any]]] = {  # rate factor, other changes
    "sgd": (1.0, {}),
    "momentum": (1.0, {"momentum": MOMENTUM}),
    "adam": (0.1, {"optimizer": "adam"}),
}


def evenly_spaced(first: int, length: int, number: int) -> set[int]:
    """`number` + 1 evenly spaced steps from `first` to `first` + `length`, both included."""
    return {round(first + length * i / number) for i in range(number + 1)}


def sgd(plan: Plan, seed: int, factor: float = 1.0, **changes: Any) -> Run:
    """SGD with the settings of the plan.

    Args:
      plan: the settings of the study.
      seed: seed of the run.
      factor: factor of the plan's learning rate.
      **changes: other fields of the `Run` to set.
    """
    rate = float(f"{factor * plan.learning_rate:.6g}")  # 0.005, not 0.005000000000000001
    settings = {"learning_rate": rate, "batch_size": plan.batch_size}
    return Run(seed, **{**settings, **changes})


def projected(plan: Plan, weights: tuple[float, float]) -> dict[str, Any]:
    """The fields that turn a plain `Run` into a projected one.

    Args:
      plan: the settings of the study.
      weights: the factors (a, b) of the dominant and the bulk part of the update.
    """
    return {
        "weights": weights,
        "directions": plan.directions,
        "refresh_every": plan.scale.refresh_every,
    }


def follow_sgd(study: Study, store: Store, seed: int) -> Rows:
    """Trains by SGD until the gradient is aligned, then for the length of a branch.

    Args:
      study: data, model and compiled functions.
      store: where the parameters at the switch and after it are kept.
      seed: seed of the run.

    Returns:
      Rows of losses, accuracies, alignments and eigenvalues; all have the ``switch_step``.

    Raises:
      UsageError: SGD diverges.
    """
    plan, scale = study.plan, study.plan.scale
    rows: dict[int, dict[str, Any]] = {}

    def measure(step: int, state: TrainState, first: int, length: int) -> None:
        solve = step in evenly_spaced(first, length, scale.points)
        if not solve and step not in evenly_spaced(first, length, scale.evaluations):
            return
        row = rows.setdefault(step, {"step": step})
        row |= study.evaluate(state)
        if row["train_loss"] is None:
            raise UsageError(
                f"SGD diverges at learning rate {plan.learning_rate:g} (seed {seed}, before step "
                f"{step}); give a smaller --learning-rate and another --name"
            )
        if solve:
            row |= spectrum(study, state, seed)

    params, _ = study.start(seed)
    latest = scale.latest_switch if plan.switch_step is None else plan.switch_step
    average = None
    tracked = sgd(plan, seed, **projected(plan, METHODS["sgd"]))
    for step, state in study.walk(tracked, params, 0, latest):
        measure(step, state, 0, latest)
        if step and step % scale.check_every == 0:
            basis = find_in_state(state.opt_state, "basis")
            chi = float(alignment(basis, study.full_gradient(state.params)))
            average = (
                chi
                if average is None
                else (ALIGNMENT_DECAY * average + (1 - ALIGNMENT_DECAY) * chi)
            )
            row = rows.setdefault(step, {"step": step})
            row |= {"tracked_chi": rounded(chi), "tracked_average": rounded(average)}
            if plan.switch_step is None and average > SWITCH_ALIGNMENT:
                break
    switch, params = step, jax.tree.map(jnp.copy, state.params)

    kept = {switch: params}
    for step, state in study.walk(sgd(plan, seed), params, switch, switch + scale.steps):
        measure(step, state, switch, scale.steps)
        if step in evenly_spaced(switch, scale.steps, scale.snapshots) and step != switch:
            kept[step] = jax.tree.map(jnp.copy, state.params)
    store.save_snapshots(f"seed{seed}", kept)
    aligned = average is not None and average > SWITCH_ALIGNMENT
    ends = {"switch_step": switch, "aligned": aligned}
    return [{**row, **ends} for _, row in sorted(rows.items())]


def alignment_unit(study: Study, store: Store, seed: int) -> Unit:
    """The unit of `follow_sgd`.

    Args:
      study: data, model and compiled functions.
      store: where the parameters at the switch and after it are kept.
      seed: seed of the run.
    """
    return Unit("alignment", {"seed": seed}, lambda: follow_sgd(study, store, seed))


def snapshots(study: Study, store: Store, seed: int) -> dict[int, PyTree]:
    """The parameters that `follow_sgd` kept, by step; the first are those of the switch.

    Args:
      study: data, model and compiled functions.
      store: where the parameters are kept.
      seed: seed of the run.

    Raises:
      UsageError: their file is missing or damaged.
    """
    unit = alignment_unit(study, store, seed)
    return store.snapshots(f"seed{seed}", study.start(seed)[0], unit)


def spectrum(study: Study, state: TrainState, seed: int) -> dict[str, Any]:
    """Leading eigenvalues, and the alignment of the full and of mini-batch gradients.

    Args:
      study: data, model and compiled functions.
      state: the training state to measure.
      seed: seed of the run.
    """
    k = study.plan.directions
    pairs = study.eigenpairs(state.params, EXTRA_EIGENVALUES)
    basis = blocks.rows(pairs.basis, 0, k)
    batches = study.batch_alignments(state.params, basis, seed)
    return {
        "chi": rounded(alignment(basis, study.full_gradient(state.params))),
        "batch_chi": rounded(np.mean(batches)),
        "batch_chi_deviation": rounded(np.std(batches)),
        **{f"eigenvalue_{i}": rounded(v) for i, v in enumerate(pairs.eigenvalues, 1)},
        "smallest_ritz_value": rounded(pairs.smallest),
        "products": int(pairs.num_products),
        "converged": bool(pairs.converged[:k].all()),
    }


def train_branch(study: Study, run: Run, params: PyTree, first: int, steps: int) -> Rows:
    """Loss and accuracy along one run, up to the first loss that is not finite.

    Args:
      study: data, model and compiled functions.
      run: the settings of the run.
      params: parameters to start from.
      first: number of steps taken before.
      steps: number of steps to train.
    """
    rows: Rows = []
    places = evenly_spaced(first, steps, min(steps, study.plan.scale.evaluations))
    for step, state in study.walk(run, params, first, first + steps):
        if step in places:
            rows.append({"step": step, **study.evaluate(state)})
            if rows[-1]["train_loss"] is None:
                break
    return rows


def effective_rates(study: Study, run: Run) -> Rows:
    r"""Effective learning rates in both subspaces, along one run from the start.

    ``-<d, g_dom> / |g_dom|^2`` and the same in the bulk (Song et al., section 6), with ``d`` the
    applied update and ``g`` the full gradient before it. A single update is mostly noise, so
    numerators and denominators are summed over `WINDOW` steps, projected on the basis of the first.

    Args:
      study: data, model and compiled functions.
      run: the settings of the run.
    """
    scale = study.plan.scale
    params, _ = study.start(run.seed)
    places = evenly_spaced(0, scale.latest_switch, scale.points)
    rows: Rows = []
    walk = study.walk(run, params, 0, scale.latest_switch + WINDOW)
    for step, state in walk:
        if step not in places:
            continue
        if study.evaluate(state)["train_loss"] is None:
            break
        basis = study.eigenpairs(state.params).basis
        sums: Any = 0.0
        for _ in range(WINDOW):
            before = jax.tree.map(jnp.copy, state.params)
            gradient = study.full_gradient(before)
            _, state = next(walk)
            sums = sums + update_products(basis, gradient, before, state.params)
        dominant, dominant_size, bulk, bulk_size = np.asarray(sums, np.float64)
        row = {"dominant": dominant / dominant_size, "bulk": bulk / bulk_size}
        rows.append({"step": step, **{key: rounded(value) for key, value in row.items()}})
    return rows


def noise(study: Study, run: Run, params: PyTree, first: int) -> Rows:
    """Loss and alignment of the full gradient along one run.

    Args:
      study: data, model and compiled functions.
      run: the settings of the run.
      params: parameters to start from.
      first: number of steps taken before.
    """
    scale = study.plan.scale
    rows: Rows = []
    for step, state in study.walk(run, params, first, first + scale.short_steps):
        if step in evenly_spaced(first, scale.short_steps, scale.points):
            row = {"step": step, **study.evaluate(state)}
            if row["train_loss"] is None:
                break
            chi = alignment(study.eigenpairs(state.params).basis, study.full_gradient(state.params))
            rows.append({**row, "chi": rounded(chi)})
    return rows


def energy(study: Study, snapshots: dict[int, PyTree]) -> Rows:
    """Energy shares of the three matrices in the dominant subspace.

    Args:
      study: data, model and compiled functions.
      snapshots: parameters by step.
    """
    rows: Rows = []
    for step, params in snapshots.items():
        basis = study.eigenpairs(params).basis
        for name in OPERATORS:
            operator = study.operator(getattr(curvature, name), params)
            shares = curvature.energy_shares(
                operator, basis, key=jax.random.key(0), num_probes=study.plan.scale.probes
            )
            row = {"step": step, "operator": name}
            for kind, estimate in (("frobenius", shares.frobenius), ("trace", shares.trace)):
                row[f"{kind}_share"] = rounded(estimate.value)
                row[f"{kind}_error"] = rounded(estimate.standard_error)
            rows.append(row)
    return rows


def ablations(plan: Plan, seed: int) -> Iterator[tuple[str, float, str, Run]]:
    """The runs of the stability panel.

    Args:
      plan: the settings of the study.
      seed: seed of the runs.

    Yields:
      The name of the changed setting, its value, the method and the run.
    """
    bulk = projected(plan, METHODS["bulk"])
    scale, k = plan.scale, plan.directions
    for factor in RATE_FACTORS:
        for method, changes in (("sgd", {}), ("bulk", bulk)):
            run = sgd(plan, seed, factor, **changes)
            yield "learning_rate", run.learning_rate, method, run
    for directions in sorted({max(1, k // 4), max(1, k // 2), k, 2 * k, 4 * k}):
        changes = {**bulk, "directions": directions}
        yield "k", directions, "bulk", sgd(plan, seed, ABLATION_RATE, **changes)
    for every in sorted({1, 5, 20, 100, scale.refresh_every, scale.short_steps}):
        changes = {**bulk, "refresh_every": every}
        yield "refresh_every", every, "bulk", sgd(plan, seed, ABLATION_RATE, **changes)
    for name, values in (("momentum", (0.0, 0.5, MOMENTUM)), ("batch_size", (10, 50, 250))):
        for value in values:
            for method, changes in (("sgd", {}), ("bulk", bulk)):
                run = sgd(plan, seed, ABLATION_RATE, **{**changes, name: value})
                yield name, value, method, run


def units(study: Study, store: Store, seed: int) -> Iterator[Unit]:
    """All units of one seed. That of `alignment` comes first, because the others start from it.

    Args:
      study: data, model and compiled functions.
      store: where the units' rows and the parameters at the switch are kept.
      seed: seed of the runs.
    """
    plan, scale = study.plan, study.plan.scale

    @functools.cache
    def along_sgd() -> dict[int, PyTree]:
        return snapshots(study, store, seed)

    def switch() -> tuple[PyTree, int]:
        step, params = next(iter(along_sgd().items()))
        return params, step

    @functools.cache  # several ablations contain the same run
    def branch(run: Run, steps: int) -> Rows:
        return train_branch(study, run, *switch(), steps)

    yield alignment_unit(study, store, seed)

    branches: list[tuple[str, float | None, tuple[float, float]]] = [
        *((name, None, weights) for name, weights in METHODS.items()),
        *((name, alpha, line(alpha)) for name, line in LINES.items() for alpha in ALPHAS),
    ]
    for name, alpha, weights in branches:
        run = sgd(plan, seed, **({} if name == "sgd" else projected(plan, weights)))
        identity = {"method": name, "alpha": alpha, "a": weights[0], "b": weights[1], "seed": seed}
        yield Unit("switch", identity, functools.partial(branch, run, scale.steps))

    for name, (factor, changes) in OPTIMIZERS.items():
        run = sgd(plan, seed, factor, **changes)
        identity = {"optimizer": name, "learning_rate": run.learning_rate, "seed": seed}
        rates = functools.partial(effective_rates, study, run)
        yield Unit("effective_learning_rates", identity, rates)

    for ablation, value, method, run in ablations(plan, seed):
        identity = {"ablation": ablation, "value": value, "method": method, "seed": seed}
        yield Unit("stability", identity, functools.partial(branch, run, scale.short_steps))

    def energies() -> Rows:
        return energy(study, {0: study.start(seed)[0], **along_sgd()})

    yield Unit("energy", {"seed": seed}, energies)

    for name, batch_size in (("sgd", plan.batch_size), ("gd", len(plan.task.train))):

        def chi_along(batch_size: int = batch_size) -> Rows:
            return noise(study, sgd(plan, seed, batch_size=batch_size), *switch())

        yield Unit("noise", {"method": name, "seed": seed}, chi_along)
