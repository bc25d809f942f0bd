"""Trackers of the dominant Hessian subspace on one path of SGD: their accuracy and their cost."""

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
from optax_accel.curvature.tracking import block_product

LOSS = "mse"
CHECKPOINTS = 10


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tracker to measure.

    Attributes:
      tracker: the tracker.
      examples: what its refreshes see: the fixed ``"subset"``, the mini-``"batch"`` of the step, or
        the ``"whole"`` training split.
      note: what is special about it.
    """

    tracker: oa.Tracker
    examples: str
    note: str

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
    """A network, the path of SGD that it follows, and what is compiled for them.

    Args:
      task: the data; its default model is trained.
      steps: number of SGD steps, at least `CHECKPOINTS`.
      learning_rate: learning rate of SGD.
      batch_size: number of examples in a mini-batch.
      curvature_batch: number of fixed examples that most trackers see.
      k: dimension of the subspace; None for the number of classes.
      seed: seed of the weights, the batches, the fixed examples and the checkpoints.

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
    ):
        self.steps, self.learning_rate = steps, learning_rate
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
    def gradient(self) -> Callable[..., Any]:
        """The compiled gradient, a function of the parameters and the examples' indices."""
        return jax.jit(lambda params, index: self.objective(index).grad(params))

    @functools.cached_property
    def hessian_product(self) -> Callable[..., Any]:
        """The compiled product of the whole split's Hessian with a flat vector."""

        def product(params: Any, vector: Any) -> Any:
            image = self.objective().hvp(params, self.unravel(vector))
            return jax.flatten_util.ravel_pytree(image)[0]

        return jax.jit(product)


# Accuracy ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What trackers are compared with at a step.

    Attributes:
      references: the leading eigenpairs of the Hessian on the whole training split, by order.
      gradients: flat gradients by name: of the whole split, ``"full"``, and of the mini-batch,
        ``"batch"``.
    """

    references: Mapping[str, Reference]
    gradients: Mapping[str, np.ndarray]

    def alignments(self, order: str) -> dict[str, float]:
        """The alignment chi_k of each gradient with the exact eigenspace.

        Args:
          order: which end of the spectrum it is of.
        """
        exact = self.references[order].vectors.T
        return {
            name: float(np.linalg.norm(exact @ vector) / np.linalg.norm(vector))
            for name, vector in self.gradients.items()
        }

    def errors(self, space: curvature.Eigenspace, order: str) -> dict[str, float]:
        """Errors of a tracked eigenspace.

        Args:
          space: the tracked eigenspace.
          order: which end of the spectrum it is of.

        Returns:
          ``chi full`` and ``chi batch``, the errors of the gradients' alignments; ``cos2``, the
          mean squared cosine; ``eigenvalues``, the largest relative error; and ``orthogonality``,
          the largest entry of ``|U U^T - I|``.
        """
        basis = np.concatenate(
            [
                np.asarray(leaf.astype(jnp.float32)).reshape(len(leaf), -1)
                for leaf in jax.tree.leaves(space.basis)
            ],
            axis=1,
        )
        reference = self.references[order]
        exact, values = reference.vectors, np.asarray(space.eigenvalues)
        result = {
            f"chi {name}": abs(np.linalg.norm(basis @ vector) - np.linalg.norm(exact.T @ vector))
            / np.linalg.norm(vector)
            for name, vector in self.gradients.items()
        }
        result["cos2"] = np.linalg.norm(basis @ exact) ** 2 / len(basis)
        result["eigenvalues"] = np.max(np.abs(values / reference.eigenvalues - 1))
        result["orthogonality"] = np.max(np.abs(basis @ basis.T - np.eye(len(basis))))
        return {name: float(value) for name, value in result.items()}


def solve(path: SgdPath, params: Any, gradient: Any, orders: Iterable[str]) -> Checkpoint:
    """What trackers are compared with at some parameters.

    Args:
      path: the network and its data.
      params: the parameters.
      gradient: gradient of the mini-batch there.
      orders: the ends of the spectrum that trackers follow.
    """
    product = functools.partial(path.hessian_product, params)
    jax.block_until_ready(product(jnp.zeros(path.dimension)))  # compiles
    references = {
        order: arpack(
            product, path.dimension, path.k, order=order, tol=1e-6, rng=np.random.default_rng(0)
        )
        for order in orders
    }
    trees = {"full": path.gradient(params, None), "batch": gradient}
    flat = {name: jax.flatten_util.ravel_pytree(tree)[0] for name, tree in trees.items()}
    return Checkpoint(references, {name: np.asarray(vector) for name, vector in flat.items()})


def accuracy(
    path: SgdPath, entries: Mapping[str, Entry], say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[Reference], dict[str, int]]:
    """Follows SGD with every tracker and compares them at the checkpoints.

    Args:
      path: the network and its data.
      entries: the trackers by name.
      say: prints a line of progress.

    Returns:
      One row per checkpoint and tracker; the references of the largest eigenvalues, or of the
      first order that there is; and by tracker, the number of refreshes
      behind the cold start.
    """

    def refreshed(
        space: Any, params: Any, gradient: Any, batch: Any, entry: Entry, cold: bool
    ) -> Any:
        objective = path.objective(path.index(entry, batch))
        return entry.tracker.refresh(space, objective, params, gradient, cold=cold)

    refresh = jax.jit(refreshed, static_argnames=("entry", "cold"), donate_argnames="space")
    descend = jax.jit(
        lambda params, grads: jax.tree.map(lambda p, g: p - path.learning_rate * g, params, grads)
    )
    params, rows, references = path.params, [], []
    # The largest first, whose time the costs are compared with.
    orders = sorted({entry.order for entry in entries.values()})
    spaces = {name: entry.tracker.init(params, path.k) for name, entry in entries.items()}
    next_refresh = dict.fromkeys(entries, 0)
    refreshes = dict.fromkeys(entries, 0)
    for step in range(path.steps + 1):
        batch = path.batches[step]
        gradient = path.gradient(params, batch)
        checkpoint = None
        progress.tell(f"step {step} of {path.steps}" if step else "compiling")
        if step in path.checkpoints:
            progress.tell(f"step {step}: ARPACK's eigenvalues of the whole split")
            checkpoint = solve(path, params, gradient, orders)
            references.append(checkpoint.references[orders[0]])
            cost = f"{references[-1].seconds:.1f} s, {references[-1].products} products"
            say(f"step {step}: ARPACK {cost}")
        for name, entry in entries.items():
            exact = entry.examples == "whole"
            before = (
                None
                if checkpoint is None or exact
                else checkpoint.errors(spaces[name], entry.order)
            )
            if checkpoint if exact else step == next_refresh[name]:
                cold = exact or step == 0
                spaces[name] = refresh(
                    spaces[name], params, gradient, batch, entry=entry, cold=cold
                )
                next_refresh[name] = step + int(entry.tracker.next_period(spaces[name]))
                refreshes[name] += exact or not cold
            if checkpoint is not None:
                used = checkpoint.errors(spaces[name], entry.order)
                row: dict[str, Any] = {"tracker": name, "step": step}
                alignments = checkpoint.alignments(entry.order)
                row |= {f"exact chi {key}": chi for key, chi in alignments.items()}
                row |= used | {f"before {key}": error for key, error in (before or used).items()}
                rows.append(row)
        params = descend(params, gradient)
        progress.advance(step > 0)
    return rows, references, refreshes


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
      entries: the trackers by name; those that solve on the whole split are left out.
      refreshes: how often each tracker refreshed along the path; one that chose its periods is
        timed at the mean of these.
      arpack_seconds: time of one reference solve.
      repeats: number of rounds.

    Returns:
      One row per tracker.
    """
    entries = {name: entry for name, entry in entries.items() if entry.examples != "whole"}
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
        tx = oa.bulk_sgd(path.learning_rate, path.k, tracker=entry.tracker)
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
