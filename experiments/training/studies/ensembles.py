"""Ensembles: networks trained to be averaged, as independent members or as snapshots of one run.

References:
  Huang et al., `Snapshot ensembles: train 1, get M for free <https://arxiv.org/abs/1704.00109>`_,
  section 3. Independent members with one cycle each are "SingleCycle ensembles" in its section 4.

  Lakshminarayanan et al., `Simple and scalable predictive uncertainty estimation using deep
  ensembles <https://arxiv.org/abs/1612.01474>`_: members that differ in initial weights and batch
  order, averaged probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import optax_accel as oa
from experiments import progress
from experiments.methods import Method
from experiments.training.replicas import FETCH_EVERY, Plan, Replica, Trainer
from experiments.training.studies.calibration import BINS, average, scores

KINDS = ("single", "independent", "snapshot")
# The schedules of members that are not snapshots, made from the rate and the number of steps.
SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "cosine": lambda rate, steps: oa.snapshot_schedule(rate, steps, 1),
    "constant": lambda rate, steps: rate,
}


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Networks that were trained to be averaged.

    Attributes:
      learning_rate: of all members; with snapshots the top of each cycle.
      seed: of the ensemble.
      steps: training steps of all members together.
      gradient_evaluations: their cost in mini-batch gradients, Hessian-vector products included.
      members: `(params, rest)` of each member, see `experiments.training.networks.split`.
      probabilities: for "validation" and "test" `(members, examples, classes)`, float64.
      labels: for the same `(examples,)`.
    """

    learning_rate: float
    seed: int
    steps: int
    gradient_evaluations: float
    members: list[tuple[Any, Any]]
    probabilities: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    def scores(self, split: str, bins: int = BINS) -> dict[str, list[dict[str, float]]]:
        """`scores` of each member, and of the averages over the last 1, 2, ... all of them.

        Args:
          split: "validation" or "test".
          bins: number of bins of the calibration error.

        Returns:
          `{"members": one per member, "averages": one per m}`; the last average is the ensemble's.
        """
        members, labels = self.probabilities[split], self.labels[split]
        return {
            "members": [scores(member, labels, bins) for member in members],
            "averages": [
                scores(average(members, last), labels, bins) for last in range(1, len(members) + 1)
            ],
        }


def train_kind(
    kind: str,
    plan: Plan,
    method: Method,
    learning_rates: Sequence[float],
    members: int,
    schedule: str = "cosine",
) -> list[Ensemble]:
    """Trains ensembles of one kind with a budget that is the same for all kinds.

    Args:
      kind: one of `KINDS`.
      plan: the whole budget: `plan.steps` steps for all members of an ensemble together.
      method: how they are trained.
      learning_rates: for each of them ensembles are trained.
      members: number of members of an ensemble; of a ``"single"`` network always 1.
      schedule: one of `SCHEDULES`, for members that are not snapshots.

    Returns:
      The ensembles, learning rate by learning rate, in the order of their seeds.

    Raises:
      ValueError: the method or the loss makes no ensembles, or the steps are too few.
    """
    if kind == "snapshot":
        return train_snapshots(plan, method, learning_rates, members)
    members = 1 if kind == "single" else members
    share = dataclasses.replace(plan, steps=plan.steps // members)
    make = SCHEDULES[schedule]
    return train_members(
        share, method, learning_rates, members, schedule=lambda rate: make(rate, share.steps)
    )


def train_members(
    plan: Plan,
    method: Method,
    learning_rates: Sequence[float],
    members: int,
    *,
    schedule: Callable[[Any], Any] | None = None,
    max_replicas: int | None = None,
) -> list[Ensemble]:
    """Trains ensembles of independent members, all in one compiled program.

    As many at a time as memory allows; convolutional models on a CPU one by one, since XLA is slow
    at the grouped convolutions that `vmap` makes of them. Member i of the ensemble with seed s is
    the run with seed `s + i * plan.seeds`; so the first members are the
    runs with the seeds of the ensembles, as in `experiments.compare`.

    Args:
      plan: the training of one member: `plan.steps` steps each. There are `plan.seeds` ensembles
        for each learning rate; `plan.methods` is not looked at.
      method: how they are trained.
      learning_rates: for each of them ensembles are trained.
      members: number of members of an ensemble.
      schedule: makes a schedule of a (traced) learning rate; default: it is constant.
      max_replicas: most runs to train together.

    Returns:
      The ensembles, learning rate by learning rate, in the order of their seeds.

    Raises:
      ValueError: no members, a method whose workers keep a state of their own, or a loss that does
        not make probabilities of softmax.
    """
    inner = dataclasses.replace(plan, seeds=plan.seeds * members)
    trainer = _trainer(inner, method, members, max_replicas)
    keys = [(rate, seed) for rate in learning_rates for seed in range(plan.seeds)]
    replicas = [(rate, seed + i * plan.seeds) for rate, seed in keys for i in range(members)]
    ends = [end for (end,) in _train(trainer, method, replicas, schedule, [plan.steps])]
    groups = [ends[i : i + members] for i in range(0, len(ends), members)]
    return _ensembles(trainer, method, keys, groups, runs=members)


def train_snapshots(
    plan: Plan,
    method: Method,
    learning_rates: Sequence[float],
    members: int,
    *,
    max_replicas: int | None = None,
) -> list[Ensemble]:
    """Trains snapshot ensembles: the members are states of one run, at the end of each cycle.

    The rate follows `optax_accel.snapshot_schedule`; snapshots are taken after L, 2 L, ... and
    after all T steps, L = ceil(T / members). Only the rate starts anew: momentum goes on.

    Args:
      plan: the training of an ensemble: `plan.steps` steps for all its members. The ensemble with
        seed s is the run with seed s.
      method: how they are trained.
      learning_rates: the rates at the top of each cycle; ensembles are trained for each of them.
      members: number of snapshots, the members of an ensemble.
      max_replicas: most runs to train together.

    Returns:
      The ensembles, learning rate by learning rate, in the order of their seeds; the members in
      the order in which they were taken.

    Raises:
      ValueError: no members, a method whose workers keep a state of their own, a loss that does
        not make probabilities of softmax, or more cycles than fit into the steps.
    """
    trainer = _trainer(plan, method, members, max_replicas)
    cycle = snapshot_cycle(plan.steps, members)
    ends = [min(i * cycle, plan.steps) for i in range(1, members + 1)]
    keys = [(rate, seed) for rate in learning_rates for seed in range(plan.seeds)]
    schedule = functools.partial(
        oa.snapshot_schedule, total_steps=plan.steps, num_snapshots=members
    )
    groups = _train(trainer, method, keys, schedule, ends)
    return _ensembles(trainer, method, keys, groups, runs=1)


def snapshot_cycle(steps: int, members: int) -> int:
    """The length of a snapshot ensemble's cycles, of which only the last may be shorter.

    >>> snapshot_cycle(100, 3)
    34

    Args:
      steps: of the whole training.
      members: number of cycles.

    Raises:
      ValueError: that many cycles of equal length do not fit into the steps.
    """
    if members > steps:
        raise ValueError(f"{members} members need at least {members} steps, got {steps}")
    cycle = -(-steps // members)
    if (members - 1) * cycle >= steps:
        raise ValueError(
            f"{steps} steps are {-(-steps // cycle)} cycles of {cycle}, not {members}; for "
            f"{members} members take {members * cycle} steps"
        )
    return cycle


def validate(ensembles: Sequence[Ensemble]) -> dict[float, dict[str, float]]:
    """For each learning rate the mean accuracy and NLL of its ensembles' validation predictions."""
    by_rate: dict[float, list[dict[str, float]]] = {}
    for ensemble in ensembles:
        prediction = average(ensemble.probabilities["validation"])
        values = scores(prediction, ensemble.labels["validation"])
        by_rate.setdefault(ensemble.learning_rate, []).append(values)
    return {
        rate: {key: statistics.fmean(row[key] for row in rows) for key in ("accuracy", "nll")}
        for rate, rows in by_rate.items()
    }


def best_rate(ensembles: Sequence[Ensemble]) -> float:
    """The learning rate with the best mean validation accuracy; of equal ones the lowest NLL."""
    means = validate(ensembles)
    return max(means, key=lambda rate: (means[rate]["accuracy"], -means[rate]["nll"]))


def _trainer(plan: Plan, method: Method, members: int, most: int | None) -> Trainer:
    if members < 1:
        raise ValueError(f"an ensemble has at least 1 member, got {members}")
    if method.per_worker:
        raise ValueError(f"{method.name} needs workers of its own; members have one state each")
    if plan.loss != "cross_entropy":
        raise ValueError(
            "probabilities are the softmax of networks trained with loss 'cross_entropy', "
            f"got {plan.loss!r}"
        )
    return Trainer(plan, max_replicas=most)


def _train(
    trainer: Trainer,
    method: Method,
    replicas: list[Replica],
    schedule: Callable[[Any], Any] | None,
    ends: Sequence[int],
) -> list[list[tuple[Any, Any]]]:
    """Trains runs and returns the (params, rest) of each after the numbers of steps in `ends`."""
    if schedule is not None:
        factory = method.factory
        method = dataclasses.replace(
            method, factory=lambda rate, **arguments: factory(schedule(rate), **arguments)
        )
    size = trainer.chunk_size(method, len(replicas))
    kept: list[list[tuple[Any, Any]]] = []
    for first in range(0, len(replicas), size):
        chunk = replicas[first : first + size]
        snapshots: list[list[tuple[Any, Any]]] = [[] for _ in chunk]
        # The last chunk is filled up with copies, so that the compiled program fits.
        runs = trainer.start(method, chunk + [chunk[-1]] * (size - len(chunk)))
        for done in range(1, trainer.plan.steps + 1):
            loss = runs.advance(done - 1)
            if done % FETCH_EVERY == 0:
                jax.block_until_ready(loss)
                progress.tell(f"{method.name}: step {done} of {trainer.plan.steps}")
            progress.advance(len(chunk))
            if done in ends:
                # Copies, since the next step donates its state.
                state = (runs.state.params, runs.state.rest)
                for i, states in enumerate(snapshots):
                    index = (i,) if runs.batched else ...
                    states.append(jax.tree.map(lambda leaf, index=index: leaf[index].copy(), state))
        kept += snapshots
    return kept


def _ensembles(
    trainer: Trainer,
    method: Method,
    keys: Sequence[Replica],
    groups: Sequence[list[tuple[Any, Any]]],
    runs: int,
) -> list[Ensemble]:
    """The ensembles that these members make, each of `runs` runs, and their predictions."""

    @jax.jit
    def predict(params: Any, rest: Any, x: jax.Array) -> jax.Array:
        model = nnx.merge(trainer.graphdef, params, rest, copy=True)
        model.eval()
        return model(x)

    labels = {
        split: np.concatenate([np.asarray(part["y"]) for part in parts])
        for split, parts in trainer.held_out.items()
    }
    steps = runs * trainer.plan.steps
    cost = runs * float(trainer.gradient_evaluations(method)[-1])
    result = []
    for (rate, seed), members in zip(keys, groups, strict=True):
        probabilities = {
            split: np.stack(
                [
                    np.concatenate([_softmax(predict(*member, part["x"])) for part in parts])
                    for member in members
                ]
            )
            for split, parts in trainer.held_out.items()
        }
        result.append(Ensemble(rate, seed, steps, cost, members, probabilities, labels))
    return result


def _softmax(outputs: jax.Array) -> np.ndarray:
    """Probabilities in double precision, in which hardly one of them is 0."""
    logits = np.asarray(outputs, np.float64)
    with np.errstate(invalid="ignore"):  # of a diverged training
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
