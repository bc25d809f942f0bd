"""Trackers of the dominant Hessian subspace on one path of SGD: their accuracy and their cost.

Those in the metric of a preconditioner follow a path of Adam from the same start, on the same
batches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import models
import optax_accel as oa
from experiments import data, progress, timing
from experiments.training import networks
from experiments.training.studies.hessians import Reference, arpack
from optax_accel import curvature
from optax_accel.curvature.tracking import CurvatureTracker, block_product

LOSS = "mse"
CHECKPOINTS = 10
# Of Kingma, Ba, "Adam" (2015), section 2; the rates that suit SGD make Adam diverge.
ADAM_LEARNING_RATE = 0.001


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tracker to measure.

    Attributes:
      tracker: the tracker.
      examples: what its refreshes see: the fixed ``"subset"``, the mini-``"batch"`` of the step, or
        the ``"whole"`` training split.
      note: what is special about it.
      metric: ``"euclidean"``, or ``"preconditioned"`` for the metric of Adam.
      sharpness_factor: c, where only the directions count whose eigenvalue exceeds ``c /
        learning_rate``.
    """

    tracker: oa.Tracker
    examples: str
    note: str
    metric: str = "euclidean"
    sharpness_factor: float | None = None

    @property
    def order(self) -> str:
        """Which eigenvalues it follows; the largest, if the tracker does not say."""
        return getattr(self.tracker, "order", "algebraic")


ENTRIES: Mapping[str, Entry] = {
    "block": Entry(oa.BlockTracker(), "subset", "the default"),
    "block_bfloat16": Entry(
        oa.BlockTracker(storage_dtype=jnp.bfloat16), "subset", "basis kept in bfloat16"
    ),
    "block_every_5": Entry(oa.BlockTracker(refresh_every=5), "subset", "refreshed more often"),
    "block_adaptive": Entry(
        oa.BlockTracker(refresh_every="adaptive"), "subset", "refreshed when the subspace has moved"
    ),
    "block_smallest": Entry(
        oa.BlockTracker(order="smallest"), "subset", "the smallest eigenvalues"
    ),
    "block_both": Entry(oa.BlockTracker(order="both"), "subset", "both ends of the spectrum"),
    # Half a way to the edge of stability, c = 1, is far above what short runs reach.
    "block_sharp": Entry(
        oa.BlockTracker(),
        "subset",
        "only eigenvalues above 0.1 / learning rate",
        sharpness_factor=0.1,
    ),
    "block_in_adams_metric": Entry(
        oa.BlockTracker(), "subset", "the preconditioned Hessian", metric="preconditioned"
    ),
    "krylov_in_adams_metric": Entry(
        oa.BlockTracker(krylov_depth=2),
        "subset",
        "the same, twice the products",
        metric="preconditioned",
    ),
    "adaptive_in_adams_metric": Entry(
        oa.BlockTracker(refresh_every="adaptive", krylov_depth=2),
        "subset",
        "the same, refreshed when the subspace has moved",
        metric="preconditioned",
    ),
    "round_robin": Entry(oa.RoundRobinTracker(), "subset", "one product a step"),
    "gradient": Entry(oa.GradientTracker(), "batch", "gradients of the mean outputs"),
    "gradient_every_10": Entry(
        oa.GradientTracker(refresh_every=10, decay=0.8), "batch", "the same, refreshed more often"
    ),
    "gradient_rows": Entry(
        oa.GradientTracker(rows="gradient", refresh_every=1, decay=0.9),
        "batch",
        "centered mini-batch gradients",
    ),
    "exact": Entry(oa.ExactTracker(), "whole", "refreshed at the checkpoints only"),
}


class SgdPath:
    """A network, the path of SGD or Adam that it follows, and what is compiled for them.

    Args:
      task: the data; its default model is trained.
      steps: number of SGD steps, at least `CHECKPOINTS`.
      learning_rate: learning rate of SGD; Adam's is `ADAM_LEARNING_RATE`.
      batch_size: number of examples in a mini-batch.
      curvature_batch: number of fixed examples that most trackers see.
      k: dimension of the subspace; None for the number of classes.
      seed: seed of the weights, the batches, the fixed examples and the checkpoints.
      metric: ``"euclidean"`` for SGD, ``"preconditioned"`` for Adam.

    Attributes:
      checkpoints: the steps at which trackers are compared, one drawn from each tenth of the run.
    """

    def __init__(
        self,
        task: data.Task,
        *,
        steps: int,
        learning_rate: float,
        batch_size: int,
        curvature_batch: int,
        k: int | None = None,
        seed: int = 0,
        metric: str = "euclidean",
    ):
        self.steps, self.metric = steps, metric
        self.learning_rate = learning_rate if metric == "euclidean" else ADAM_LEARNING_RATE
        model = models.create(
            task.default_model,
            input_shape=task.input_shape,
            num_classes=task.num_classes,
            rngs=seed,
        )
        self.graphdef, self.params, self.rest = networks.split(model)
        self.x, self.y = jnp.asarray(task.train.x), jnp.asarray(task.train.y)
        self.k = k or task.num_classes
        _, self.unravel = jax.flatten_util.ravel_pytree(self.params)
        random = np.random.default_rng(seed)
        size = len(task.train)
        self.subset = jnp.asarray(random.permutation(size)[:curvature_batch])
        epochs = math.ceil((steps + 1) * batch_size / size) + 1
        order = np.concatenate([random.permutation(size) for _ in range(epochs)])
        order = order[: len(order) // batch_size * batch_size]
        self.batches = jnp.asarray(order.reshape(-1, batch_size))
        # At even distances they would often fall on refreshes, whose basis is at its best.
        ends = [i * steps // CHECKPOINTS for i in range(CHECKPOINTS + 1)]
        self.checkpoints = [int(step) for step in random.integers(ends[:-1], ends[1:]) + 1]

    @property
    def dimension(self) -> int:
        """Number of parameters."""
        return int(optax.tree.size(self.params))

    def objective(self, index: Any = None) -> oa.Objective:
        """The training loss.

        Args:
          index: indices of the examples; None for all.
        """
        x, y = (self.x, self.y) if index is None else (self.x[index], self.y[index])
        return networks.objective(self.graphdef, LOSS).bind(rest=self.rest, x=x, y=y)

    def index(self, entry: Entry, batch: Any) -> Any:
        """Indices of the examples that a refresh sees; None for all.

        Args:
          entry: the tracker.
          batch: indices of the mini-batch of the step.
        """
        return {"subset": self.subset, "batch": batch, "whole": None}[entry.examples]

    @functools.cached_property
    def descend(self) -> tuple[Callable[..., Any], Any]:
        """The compiled step of the optimizer, and its state at the start.

        The step takes state, parameters and gradient; it returns the next state, the next
        parameters and the diagonal D of the preconditioner, None for SGD.
        """
        adam = self.metric == "preconditioned"
        tx = (optax.adam if adam else optax.sgd)(self.learning_rate)

        def step(state: Any, params: Any, gradient: Any) -> Any:
            updates, state = tx.update(gradient, state, params)
            diagonal = curvature.adam_preconditioner().diagonal(state, params) if adam else None
            return state, optax.apply_updates(params, updates), diagonal

        return jax.jit(step), tx.init(self.params)

    def seen(self, index: Any, params: Any, diagonal: Any) -> tuple[oa.Objective, Any]:
        """The loss in the coordinates ``D^(1/2) (theta - params)``, and its parameters there.

        Args:
          index: indices of the examples; None for all.
          params: the parameters.
          diagonal: D; None for the loss as it is.
        """
        objective = self.objective(index)
        if diagonal is None:
            return objective, params

        def moved(step: Any) -> Any:
            return jax.tree.map(lambda p, s, d: p + s / jnp.sqrt(d), params, step, diagonal)

        return objective.precompose(moved), jax.tree.map(jnp.zeros_like, params)

    @functools.cached_property
    def gradient(self) -> Callable[..., Any]:
        """The compiled gradient, of the parameters, the examples' indices and the diagonal."""

        def gradient(params: Any, index: Any, diagonal: Any = None) -> Any:
            objective, at = self.seen(index, params, diagonal)
            return objective.grad(at)

        return jax.jit(gradient)

    @functools.cached_property
    def hessian_product(self) -> Callable[..., Any]:
        """The compiled product of the whole split's Hessian with a flat vector."""

        def product(params: Any, diagonal: Any, vector: Any) -> Any:
            objective, at = self.seen(None, params, diagonal)
            image = objective.hvp(at, self.unravel(vector))
            return jax.flatten_util.ravel_pytree(image)[0]

        return jax.jit(product)


# Accuracy ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What trackers are compared with at a step.

    Attributes:
      product: the Hessian of the whole training split, on flat vectors.
      references: its leading eigenpairs, by order.
      gradients: flat gradients by name: of the whole split, ``"full"``, and of the mini-batch,
        ``"batch"``.
    """

    product: Callable[[Any], Any]
    references: Mapping[str, Reference]
    gradients: Mapping[str, np.ndarray]

    def exact(self, order: str, least: float) -> tuple[np.ndarray, np.ndarray]:
        """The exact eigenvalues above a threshold, and their eigenvectors as rows."""
        reference = self.references[order]
        counted = reference.eigenvalues > least
        return reference.eigenvalues[counted], reference.vectors.T[counted]

    def alignments(self, order: str, least: float) -> dict[str, float]:
        """The alignment chi_k of each gradient with the exact eigenspace.

        Args:
          order: which end of the spectrum it is of.
          least: eigenvalues above it count.
        """
        _, vectors = self.exact(order, least)
        return {
            name: float(np.linalg.norm(vectors @ vector) / np.linalg.norm(vector))
            for name, vector in self.gradients.items()
        }

    def errors(
        self, space: curvature.Eigenspace, order: str, least: float
    ) -> dict[str, float | None]:
        """Errors of a tracked eigenspace.

        Args:
          space: the tracked eigenspace.
          order: which end of the spectrum it is of.
          least: eigenvalues above it count, of the tracked ones and of the exact ones.

        Returns:
          ``chi full`` and ``chi batch``, the errors of the gradients' alignments; ``cos2``, the
          mean squared cosine; ``eigenvalues``, the largest relative error; ``orthogonality``,
          the largest entry of ``|U U^T - I|``; ``directions`` and ``exact directions``, how many
          count; ``residual held``, the largest residual norm that the state holds, None where it
          holds none, and ``residual``, what the Hessian of the whole split makes of it, both
          relative to the exact eigenvalue of the largest modulus.
        """
        basis = np.concatenate(
            [
                np.asarray(leaf.astype(jnp.float32)).reshape(len(leaf), -1)
                for leaf in jax.tree.leaves(space.basis)
            ],
            axis=1,
        )
        orthogonality = np.max(np.abs(basis @ basis.T - np.eye(len(basis))))
        values = np.asarray(space.eigenvalues)
        counted = values > least
        exact_values, exact = self.exact(order, least)
        values, basis = values[counted], basis[counted]
        result: dict[str, Any] = {
            f"chi {name}": abs(np.linalg.norm(basis @ vector) - np.linalg.norm(exact @ vector))
            / np.linalg.norm(vector)
            for name, vector in self.gradients.items()
        }
        number = max(len(basis), len(exact))
        result["cos2"] = np.linalg.norm(basis @ exact.T) ** 2 / number if number else 1
        pairs = min(len(values), len(exact_values))
        result["eigenvalues"] = np.max(np.abs(values[:pairs] / exact_values[:pairs] - 1), initial=0)
        result["orthogonality"] = orthogonality
        result |= {"directions": len(basis), "exact directions": len(exact)}
        scale = np.max(np.abs(self.references[order].eigenvalues))
        residuals = [
            np.linalg.norm(np.asarray(self.product(vector)) - value * vector)
            for value, vector in zip(values, basis, strict=True)
        ]
        result["residual"] = np.max(residuals, initial=0) / scale
        held = space.residual_norms
        if held is not None:
            result["residual held"] = np.max(np.asarray(held)[counted], initial=0) / scale
        return {name: float(value) for name, value in result.items()} | (
            {"residual held": None} if held is None else {}
        )


def solve(
    path: SgdPath, params: Any, diagonal: Any, batch: Any, orders: Iterable[str]
) -> Checkpoint:
    """What trackers are compared with at some parameters.

    Args:
      path: the network and its data.
      params: the parameters.
      diagonal: the diagonal of the preconditioner; None for SGD.
      batch: indices of the mini-batch there.
      orders: the ends of the spectrum that trackers follow.
    """
    product = functools.partial(path.hessian_product, params, diagonal)
    jax.block_until_ready(product(jnp.zeros(path.dimension)))  # compiles
    references = {
        order: arpack(
            product, path.dimension, path.k, order=order, tol=1e-6, rng=np.random.default_rng(0)
        )
        for order in orders
    }
    trees = {
        name: path.gradient(params, index, diagonal)
        for name, index in (("full", None), ("batch", batch))
    }
    flat = {name: jax.flatten_util.ravel_pytree(tree)[0] for name, tree in trees.items()}
    return Checkpoint(product, references, {name: np.asarray(v) for name, v in flat.items()})


def accuracy(
    path: SgdPath, entries: Mapping[str, Entry], say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[Reference], dict[str, int]]:
    """Follows SGD, or Adam, with every tracker and compares them at the checkpoints.

    Args:
      path: the network and its data.
      entries: the trackers by name, all of the path's metric.
      say: prints a line of progress.

    Returns:
      One row per checkpoint and tracker; the references of the largest eigenvalues, or of the
      first order that there is; and by tracker, the number of refreshes
      behind the cold start.
    """
    # What is compared also shows its residuals; what is timed leaves them out.
    entries = {name: _with_residuals(entry) for name, entry in entries.items()}

    def refreshed(
        space: Any, params: Any, diagonal: Any, batch: Any, entry: Entry, cold: bool
    ) -> Any:
        objective, at = path.seen(path.index(entry, batch), params, diagonal)
        gradient = path.gradient(params, batch, diagonal)
        return entry.tracker.refresh(space, objective, at, gradient, cold=cold)

    refresh = jax.jit(refreshed, static_argnames=("entry", "cold"), donate_argnames="space")
    descend, state = path.descend
    params, rows, references = path.params, [], []
    # The largest first, whose time the costs are compared with.
    orders = sorted({entry.order for entry in entries.values()})
    spaces = {name: entry.tracker.init(params, path.k) for name, entry in entries.items()}
    next_refresh = dict.fromkeys(entries, 0)
    refreshes = dict.fromkeys(entries, 0)
    for step in range(path.steps + 1):
        batch = path.batches[step]
        # Projections come behind the optimizer, at the parameters before its step.
        state, params_after, diagonal = descend(state, params, path.gradient(params, batch))
        checkpoint = None
        progress.tell(f"step {step} of {path.steps}" if step else "compiling")
        if step in path.checkpoints:
            progress.tell(f"step {step}: ARPACK's eigenvalues of the whole split")
            checkpoint = solve(path, params, diagonal, batch, orders)
            references.append(checkpoint.references[orders[0]])
            cost = f"{references[-1].seconds:.1f} s, {references[-1].products} products"
            say(f"step {step}: ARPACK {cost}")
        for name, entry in entries.items():
            exact, measured = entry.examples == "whole", (entry.order, _least(path, entry))
            before = (
                None if checkpoint is None or exact else checkpoint.errors(spaces[name], *measured)
            )
            if checkpoint if exact else step == next_refresh[name]:
                cold = exact or step == 0
                spaces[name] = refresh(
                    spaces[name], params, diagonal, batch, entry=entry, cold=cold
                )
                next_refresh[name] = step + int(entry.tracker.next_period(spaces[name]))
                refreshes[name] += exact or not cold
            if checkpoint is not None:
                used = checkpoint.errors(spaces[name], *measured)
                row: dict[str, Any] = {"tracker": name, "step": step}
                alignments = checkpoint.alignments(*measured)
                row |= {f"exact chi {key}": chi for key, chi in alignments.items()}
                row |= used | {f"before {key}": error for key, error in (before or used).items()}
                rows.append(row)
        params = params_after
        progress.advance(step > 0)
    return rows, references, refreshes


def _with_residuals(entry: Entry) -> Entry:
    """The same tracker, which keeps residuals if it takes curvature products."""
    if not isinstance(entry.tracker, CurvatureTracker):
        return entry
    tracker = dataclasses.replace(entry.tracker, residuals=True)
    return dataclasses.replace(entry, tracker=tracker)


def _least(path: SgdPath, entry: Entry) -> float:
    """The eigenvalue above which directions count."""
    factor = entry.sharpness_factor
    return -math.inf if factor is None else factor / path.learning_rate


# Cost -------------------------------------------------------------------------------------------


def costs(
    path: SgdPath,
    entries: Mapping[str, Entry],
    refreshes: Mapping[str, int],
    arpack_seconds: float,
    repeats: int,
) -> list[dict[str, Any]]:
    """Times Bulk-SGD steps beside plain SGD steps, and what a refresh is made of.

    Args:
      path: the network and its data.
      entries: the trackers by name; those that solve on the whole split, and those in the metric
        of a preconditioner, are left out.
      refreshes: how often each tracker refreshed along the path; one that chose its periods is
        timed at the mean of these.
      arpack_seconds: time of one reference solve.
      repeats: number of rounds.

    Returns:
      One row per tracker.
    """
    entries = {
        name: entry
        for name, entry in entries.items()
        if entry.examples != "whole" and entry.metric == "euclidean"
    }
    cases = [step_case(path, "sgd", None)]
    periods = {name: _period(path, entry, refreshes[name]) for name, entry in entries.items()}
    cases += [step_case(path, name, entry, periods[name]) for name, entry in entries.items()]
    parts = [refresh_parts(path, entry) for entry in entries.values()]
    base, *timed = timing.measure(cases, repeats)
    sgd = base["milliseconds"][1]
    rows = []
    for row, case, timers in zip(timed, cases[1:], parts, strict=True):
        tracker = entries[row["name"]].tracker
        share = None
        if len(timers) == 2:
            whole, products = timing.interleave([timer.time for timer in timers], repeats)
            share = float(np.median(1 - products / whole))
        warm = tracker.num_products(path.params, path.k, cold=False)
        rows.append(
            {
                "tracker": row["name"],
                "sgd milliseconds": sgd,
                "milliseconds": row["milliseconds"],
                "ratio": row["ratio"],
                "products per step": warm / periods[row["name"]],
                "against ARPACK": (1000 * arpack_seconds + sgd) / row["milliseconds"][1],
                "linear algebra": share,
                "steps timed": case.period * repeats,
            }
        )
    return rows


def _period(path: SgdPath, entry: Entry, refreshes: int) -> int:
    """Steps between two refreshes, the mean where the tracker chose them."""
    every = entry.tracker.refresh_every
    return round(path.steps / max(refreshes, 1)) if every == "adaptive" else every


def step_case(path: SgdPath, name: str, entry: Entry | None, every: int = 1) -> timing.Case:
    """A training step as a user writes it.

    Args:
      path: the network and its data.
      name: name of the case.
      entry: the tracker of Bulk-SGD; None for plain SGD.
      every: steps between two refreshes.
    """
    tx: Any = optax.sgd(path.learning_rate)
    period = 20
    if entry is not None:
        factor = entry.sharpness_factor
        tx = oa.bulk_sgd(path.learning_rate, path.k, tracker=entry.tracker, sharpness_factor=factor)
        # Round robin and gradient rows have another rhythm besides that of the refreshes.
        period = math.lcm(every, 10 if every == 1 else every) * (2 if every <= 10 else 1)
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, static_argnames="refresh", donate_argnums=(0, 1))
    def step(params: Any, state: Any, index: Any, subset: Any, x: Any, y: Any, refresh: Any) -> Any:
        def objective(index: Any) -> oa.Objective:
            bound = {"rest": path.rest, "x": x[index], "y": y[index]}
            return networks.objective(path.graphdef, LOSS).bind(**bound)

        value_fn = objective(index)
        grads = value_fn.grad(params)
        extra: dict[str, Any] = {}
        if entry is not None:
            seen = value_fn if entry.examples == "batch" else objective(subset)
            extra = {"curvature_value_fn": seen, "refresh": refresh}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def call(i: int, carry: Any) -> Any:
        refresh = None if entry is None else oa.refresh_at(i, every)
        index = path.batches[i % len(path.batches)]
        return step(*carry, index, path.subset, path.x, path.y, refresh=refresh)

    params = jax.tree.map(jnp.copy, path.params)
    carry = (params, jax.jit(tx.init)(params))
    return timing.Case(name, None if entry is None else "sgd", call, carry, period)


def refresh_parts(path: SgdPath, entry: Entry) -> list[timing.Case]:
    """All of a warm refresh and, where it makes any, its products alone; both are compiled.

    Args:
      path: the network and its data.
      entry: the tracker.
    """
    tracker, params = entry.tracker, path.params
    batch = path.batches[0]
    gradient = path.gradient(params, batch)
    index = path.index(entry, batch)
    # A block of products a refresh; or one, k times, with the linear algebra of a round.
    calls = path.k if isinstance(tracker, oa.RoundRobinTracker) else 1

    @functools.partial(jax.jit, donate_argnums=0)
    def refresh(space: Any, params: Any) -> Any:
        return tracker.refresh(space, path.objective(index), params, gradient, cold=False)

    @jax.jit
    def products(block: Any, params: Any) -> Any:
        return block_product(path.objective(index).hessian(params), params)(block)

    space = refresh(tracker.init(params, path.k), params)
    cases = [timing.Case("refresh", None, lambda _, space: refresh(space, params), space, calls)]
    # A refresh of several block products is not taken apart.
    if tracker.num_products(params, path.k, cold=False) in (1, path.k):
        block = oa.BlockTracker().init(params, path.k // calls).basis
        jax.block_until_ready(products(block, params))
        cases.append(
            timing.Case("products", "refresh", lambda _, carry: products(block, params), 0, calls)
        )
    return cases
