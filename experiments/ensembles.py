r"""Ensembles: several networks whose predicted probabilities are averaged, for one training budget.

    python -m experiments.ensembles --task digits --members 5

All kinds take the same number of steps together, `--steps`:

    single          one network
    independent     each member a `--members`-th of the steps (rounded down), from weights of its
                    own and in a batch order of its own; all in one compiled program (`vmap`)
    snapshot        one network; its learning rate falls from the top to 0 once per member, and the
                    end of each such cycle is a member (Huang et al., 2017)

Each kind gets the best learning rate of the method's grid, by the validation accuracy of its
average; what is reported was measured on the test split: accuracy, negative log likelihood (NLL)
and calibration error of the members and of the averages over the last m of them. `runs/<name>/`
then holds

    results.json            the settings and all numbers, for each kind, seed, split and member
    ensembles.png           accuracy and calibration error over the number of members averaged

The calibration error is how far the confidence of a prediction, its largest probability, is from
the share of predictions that are right. With B bins of equal width, bin b holding the :math:`n_b`
of the n examples whose confidence lies in ((b - 1) / B, b / B],

.. math:: ECE = \sum_b \frac{n_b}{n} \, |accuracy_b - confidence_b|.

It is never negative, so few examples make it too large: compare it only on equal numbers of them.

References:
  Huang et al., `Snapshot ensembles: train 1, get M for free <https://arxiv.org/abs/1704.00109>`_,
  section 3. Independent members with one cycle each are "SingleCycle ensembles" in its section 4.

  Guo et al., `On calibration of modern neural networks <https://arxiv.org/abs/1706.04599>`_,
  section 2: expected calibration error (ECE), here too with 15 bins.

  Lakshminarayanan et al., `Simple and scalable predictive uncertainty estimation using deep
  ensembles <https://arxiv.org/abs/1612.01474>`_: members that differ in initial weights and batch
  order, averaged probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from rich.table import Table

import optax_accel as oa
from experiments import cli, compare, methods, timing
from experiments.cli import UsageError
from experiments.reporting import figures
from experiments.reporting.statistics import mean_and_error
from experiments.reporting.tables import percent, table
from experiments.runs import folders
from experiments.runs.records import number, write_results
from experiments.training.replicas import FETCH_EVERY, Plan, Record, Replica, Trainer

PROG = "python -m experiments.ensembles"
KINDS = ("single", "independent", "snapshot")
BINS = 15  # Guo et al., section 2
# The schedules of members that are not snapshots, made from the rate and the number of steps.
SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "cosine": lambda rate, steps: oa.snapshot_schedule(rate, steps, 1),
    "constant": lambda rate, steps: rate,
}


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Train ensembles of each kind with one budget; compare accuracy and calibration."""

    task: str = "digits"
    """Data set to classify; an unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model; default: the task's own. An unknown name lists all."""
    kind: str = "all"
    """single, independent, snapshot, or all."""
    method: str = "sgd"
    """Training method; an unknown name lists all."""
    learning_rates: str | None = None
    """Rates to choose from, separated by commas; default: the method's grid."""
    schedule: str = "cosine"
    """Of single and independent members: cosine (one cycle, down to 0) or constant."""
    members: int = 5
    """Members of an ensemble."""
    steps: int | None = None
    """Steps of all members together; default: the task's usual number of passes."""
    batch_size: int = 64
    """Examples per step."""
    curvature_batch_size: int | None = None
    """Examples (fixed per seed) for Hessian-vector products; default: twice the batch size."""
    seeds: int = 3
    """Ensembles of each kind, which differ in initial weights and batch order."""
    bins: int = BINS
    """Bins of the calibration error."""
    name: str | None = None
    """Name of the run's folder; default: ensembles-<task>-<method>."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""


# What probabilities are worth -------------------------------------------------------------------


def average(probabilities: Any, last: int | None = None) -> np.ndarray:
    """The prediction of an ensemble: the mean of its members' probabilities.

    >>> average([[[0.8, 0.2]], [[0.4, 0.6]]]).round(3)
    array([[0.6, 0.4]])

    Args:
      probabilities: `(members, examples, classes)`.
      last: number of members, the last ones, to average; default: all.

    Returns:
      `(examples, classes)`, float64.

    Raises:
      ValueError: another shape, or there are not so many members.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 3 or not len(probabilities):
        raise ValueError(
            "`probabilities` must have the shape (members, examples, classes) with at least one "
            f"member, got {probabilities.shape}."
        )
    members = len(probabilities)
    last = members if last is None else last
    if not 1 <= last <= members:
        raise ValueError(f"`last` must lie between 1 and the {members} members, got {last}.")
    return probabilities[members - last :].mean(axis=0)


def calibration_error(probabilities: Any, labels: Any, bins: int = BINS) -> float:
    """Expected calibration error with bins of equal width, see the formula above.

    >>> calibration_error([[0.75, 0.25]] * 4, [0, 0, 0, 1])  # sure to 3/4, right in 3 of 4
    0.0
    >>> calibration_error([[1.0, 0.0]] * 4, [1, 1, 1, 1])
    1.0

    Args:
      probabilities: `(examples, classes)`.
      labels: integers, `(examples,)`.
      bins: number of bins; 15 in the paper.

    Returns:
      A number between 0, calibrated, and 1, sure and wrong.

    Raises:
      ValueError: wrong shapes, no bin, or rows that are no probabilities.
    """
    probabilities, labels = _check(probabilities, labels)
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}.")
    confidence = np.minimum(probabilities.max(axis=1), 1.0)  # rounding
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    # n_b cancels: the sums of each bin are all it takes.
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def scores(probabilities: Any, labels: Any, bins: int = BINS) -> dict[str, float]:
    """Accuracy, mean negative log likelihood and calibration error of one prediction.

    >>> scores([[0.5, 0.5], [0.0, 1.0]], [0, 1])
    {'accuracy': 1.0, 'nll': 0.346..., 'calibration_error': 0.25}

    Args:
      probabilities: `(examples, classes)`.
      labels: integers, `(examples,)`.
      bins: as in `calibration_error`.

    Returns:
      `accuracy`, `nll` (infinite where a label has probability 0) and `calibration_error`. A
      prediction that is not finite, from a diverged training, is a failure: accuracy 0, NLL
      infinite, calibration error NaN.

    Raises:
      ValueError: as in `calibration_error`.
    """
    if not np.all(np.isfinite(probabilities)):
        return {"accuracy": 0.0, "nll": math.inf, "calibration_error": math.nan}
    probabilities, labels = _check(probabilities, labels)
    with np.errstate(divide="ignore"):
        log_likelihood = np.log(probabilities[np.arange(len(labels)), labels])
    return {
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == labels)),
        "nll": -float(log_likelihood.mean()),
        "calibration_error": calibration_error(probabilities, labels, bins),
    }


def _check(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            "`probabilities` must have the shape (examples, classes) and `labels` (examples,), "
            f"with at least one example, got {probabilities.shape} and {labels.shape}."
        )
    # float32 softmax rounds by far less.
    sums = probabilities.sum(axis=1)
    if not (np.all(probabilities >= 0) and np.allclose(sums, 1, rtol=0, atol=1e-3)):
        raise ValueError(
            "`probabilities` must not be negative and add up to 1 in each row; outputs of a "
            "network become probabilities by softmax."
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"`labels` must lie between 0 and {probabilities.shape[1] - 1}, got "
            f"{labels.min()} to {labels.max()}."
        )
    return probabilities, labels


# Training ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Networks that were trained to be averaged.

    Attributes:
      learning_rate: of all members; with snapshots the top of each cycle.
      seed: of the ensemble.
      steps: training steps of all members together.
      gradient_evaluations: their cost in mini-batch gradients, Hessian-vector products included.
      members: `(params, rest)` of each member, see `experiments.training.engine.split`.
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
          bins: as in `calibration_error`.

        Returns:
          `{"members": one per member, "averages": one per m}`; the last average is the ensemble's.
        """
        found, labels = self.probabilities[split], self.labels[split]
        return {
            "members": [scores(own, labels, bins) for own in found],
            "averages": [
                scores(average(found, last), labels, bins) for last in range(1, len(found) + 1)
            ],
        }


def train_members(
    plan: Plan,
    method: methods.Method,
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
    method: methods.Method,
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
      ValueError: as in `train_members`, or so many cycles do not fit in the steps.
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
      ValueError: there are not so many cycles of that length in so many steps.
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
    found: dict[float, list[dict[str, float]]] = {}
    for ensemble in ensembles:
        prediction = average(ensemble.probabilities["validation"])
        values = scores(prediction, ensemble.labels["validation"])
        found.setdefault(ensemble.learning_rate, []).append(values)
    return {
        rate: {key: statistics.fmean(row[key] for row in rows) for key in ("accuracy", "nll")}
        for rate, rows in found.items()
    }


def best_rate(ensembles: Sequence[Ensemble]) -> float:
    """The learning rate with the best mean validation accuracy; of equal ones the lowest NLL."""
    means = validate(ensembles)
    return max(means, key=lambda rate: (means[rate]["accuracy"], -means[rate]["nll"]))


def _trainer(plan: Plan, method: methods.Method, members: int, most: int | None) -> Trainer:
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
    method: methods.Method,
    replicas: list[Replica],
    schedule: Callable[[Any], Any] | None,
    ends: Sequence[int],
) -> list[list[tuple[Any, Any]]]:
    """(params, rest) of each run after each of these numbers of steps."""
    if schedule is not None:
        make = method.make
        method = dataclasses.replace(method, make=lambda rate, c: make(schedule(rate), c))
    size = trainer.chunk_size(method, len(replicas))
    kept: list[list[tuple[Any, Any]]] = []
    for first in range(0, len(replicas), size):
        chunk = replicas[first : first + size]
        own: list[list[tuple[Any, Any]]] = [[] for _ in chunk]
        # The last chunk is filled up with copies, so that the compiled program fits.
        runs = trainer.start(method, chunk + [chunk[-1]] * (size - len(chunk)))
        for done in range(1, trainer.plan.steps + 1):
            loss = runs.advance(done - 1)
            if done % FETCH_EVERY == 0:
                jax.block_until_ready(loss)
            if done in ends:
                # Copies, since the next step donates its state.
                state = (runs.state.params, runs.state.rest)
                for i, states in enumerate(own):
                    index = (i,) if runs.batched else ...
                    states.append(jax.tree.map(lambda leaf, index=index: leaf[index].copy(), state))
        kept += own
    return kept


def _ensembles(
    trainer: Trainer,
    method: methods.Method,
    keys: Sequence[Replica],
    groups: Sequence[list[tuple[Any, Any]]],
    runs: int,
) -> list[Ensemble]:
    """The ensembles with these members, each of so many runs, and what they predict."""

    @jax.jit
    def predict(params: Any, rest: Any, x: jax.Array) -> jax.Array:
        model = nnx.merge(trainer.graphdef, params, rest, copy=True)
        model.eval()
        return model(x)

    labels = {
        split: np.concatenate([np.asarray(y) for _, y in parts])
        for split, parts in trainer.held_out.items()
    }
    steps = runs * trainer.plan.steps
    cost = runs * float(trainer.gradient_evaluations(method)[-1])
    result = []
    for (rate, seed), members in zip(keys, groups, strict=True):
        probabilities = {
            split: np.stack(
                [
                    np.concatenate([_softmax(predict(*member, x)) for x, _ in parts])
                    for member in members
                ]
            )
            for split, parts in trainer.held_out.items()
        }
        result.append(Ensemble(rate, seed, steps, cost, members, probabilities, labels))
    return result


def _softmax(outputs: jax.Array) -> np.ndarray:
    """In double precision, where hardly a probability is 0."""
    logits = np.asarray(outputs, np.float64)
    with np.errstate(invalid="ignore"):  # of a diverged training
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


# The command ------------------------------------------------------------------------------------


def resolve(options: Options) -> tuple[Plan, list[str], list[float]]:
    """Checks the options; returns the plan for the whole budget, the kinds and the rates.

    Raises:
      ValueError: with one line that says what is allowed.
    """
    options.check()
    cli.check_known("kind", options.kind, (*KINDS, "all"))
    cli.check_known("method", options.method, tuple(methods.METHODS))
    cli.check_known("schedule", options.schedule, tuple(SCHEDULES))
    rates = _rates(options)
    plan = compare.resolve(
        compare.Options(
            task=options.task,
            data_dir=options.data_dir,
            model=options.model,
            methods=options.method,
            seeds=options.seeds,
            steps=options.steps,
            batch_size=options.batch_size,
            curvature_batch_size=options.curvature_batch_size,
        )
    )
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    if kinds != ["single"] and options.members > plan.steps:
        raise UsageError(
            f"--members {options.members} is more than the {cli.plural(plan.steps, 'step')} "
            "that all members take together; raise --steps"
        )
    if "snapshot" in kinds:
        snapshot_cycle(plan.steps, options.members)
    return plan, kinds, rates


def _rates(options: Options) -> list[float]:
    if options.learning_rates is None:
        return list(methods.METHODS[options.method].learning_rates)
    try:
        rates = [float(rate) for rate in options.learning_rates.split(",")]
    except ValueError:
        rates = []
    if not rates or any(map(cli.RATE.problem, rates)):
        raise UsageError(
            "--learning-rates must be positive numbers separated by commas, got "
            f"{options.learning_rates!r}"
        )
    return list(dict.fromkeys(rates))


def run(
    options: Options, plan: Plan, kind: str, rates: Sequence[float]
) -> tuple[list[Ensemble], Record]:
    """Trains the ensembles of one kind at all rates.

    Returns:
      The ensembles at the best rate, one per seed, and their results.
    """
    (method,) = plan.methods
    members = 1 if kind == "single" else options.members
    if kind == "snapshot":
        found = train_snapshots(plan, method, rates, members)
    else:
        share = dataclasses.replace(plan, steps=plan.steps // members)
        make = SCHEDULES[options.schedule]
        found = train_members(
            share, method, rates, members, schedule=lambda rate: make(rate, share.steps)
        )
    rate = best_rate(found)
    chosen = [ensemble for ensemble in found if ensemble.learning_rate == rate]
    record = {
        "kind": kind,
        "members": members,
        "steps": chosen[0].steps,
        "gradient_evaluations": chosen[0].gradient_evaluations,
        "learning_rate": rate,
        "validation": [{"learning_rate": r} | means for r, means in validate(found).items()],
        "seeds": [
            {split: ensemble.scores(split, options.bins) for split in ensemble.labels}
            for ensemble in chosen
        ],
    }
    return chosen, record


def _values(record: Record, key: str, what: str, place: int | None = None) -> list[float]:
    """A test score of each seed: of one member or average, or the mean over them."""
    found = [[row[key] for row in seed["test"][what]] for seed in record["seeds"]]
    return [statistics.fmean(own) if place is None else own[place] for own in found]


def _on_edge(record: Record, rates: Sequence[float]) -> bool:
    return len(rates) > 1 and record["learning_rate"] in (min(rates), max(rates))


def _percent(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    return percent(*mean_and_error(values))


def tables(records: Sequence[Record], rates: Sequence[float]) -> list[Table]:
    """The kinds side by side, on the test split; then member by member."""
    view = table(
        [
            *("kind", "rate", "steps", "gradients", "member's\naccuracy %", "average's"),
            *("member's\nNLL", "average's", "member's\nECE %", "average's"),
        ]
    )
    for record in records:
        rate = record["learning_rate"]
        cells = [f"{rate:g}" + ("*" if _on_edge(record, rates) else "")]
        cells += [f"{record['steps']:,}", f"{record['gradient_evaluations']:,.0f}"]
        for key in ("accuracy", "nll", "calibration_error"):
            for what, place in (("members", None), ("averages", -1)):
                values = _values(record, key, what, place)
                nll = f"{statistics.fmean(values):.4f}"
                cells.append(nll if key == "nll" else _percent(values))
        view.add_row(record["kind"], *cells)
    several = [record for record in records if record["members"] > 1]
    if not several:
        return [view]
    columns = [
        f"{record['kind']}:\n{what}" for record in several for what in ("member m", "last m")
    ]
    detail = table(["m", *columns], title="accuracy %")
    for m in range(1, several[0]["members"] + 1):
        cells = []
        for record in several:
            cells.append(_percent(_values(record, "accuracy", "members", m - 1)))
            cells.append(_percent(_values(record, "accuracy", "averages", m - 1)))
        detail.add_row(str(m), *cells)
    return [view, detail]


def picture(options: Options, records: Sequence[Record]) -> Figure:
    """Accuracy and calibration error of the averages over the last 1, 2, ... all members."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = {"accuracy": "test accuracy in %", "calibration_error": "test calibration error in %"}
    for axes, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        figures.frame(axes)
        for record in records:
            color = figures.COLORS[KINDS.index(record["kind"])]
            numbers = range(1, record["members"] + 1)
            means = [
                100 * statistics.fmean(_values(record, key, "averages", m - 1)) for m in numbers
            ]
            if record["kind"] == "single":
                axes.axhline(means[0], color=color, linestyle="--", label="single")
                continue
            axes.plot(numbers, means, color=color, marker="o", label=f"{record['kind']}: average")
            own = [100 * statistics.fmean(_values(record, key, "members", -m)) for m in numbers]
            axes.scatter(numbers, own, color=color, marker="x", alpha=0.6, label="its members")
        axes.set_xlabel("m, the number of members averaged (x: the m-th last member)")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.suptitle(
        f"Ensembles on {options.task} with {options.method}, one budget", x=0.01, ha="left"
    )
    return figure


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    try:
        plan, kinds, rates = resolve(options)
        default = f"ensembles-{options.task}-{options.method}"
        folder = folders.locate(options.runs_dir, options.name, default)
    except ValueError as error:
        return cli.fail(error)
    console = cli.console(120)
    with folders.claim_results(folder, PROG, ["ensembles.png"]):
        console.print(
            f"{plan.task.name}, {plan.model}, {options.method}: "
            f"{cli.plural(options.members, 'member')}, {cli.plural(plan.steps, 'step')} of "
            f"{cli.plural(plan.batch_size, 'example')} together, "
            f"{cli.plural(len(rates), 'rate')} x {cli.plural(plan.seeds, 'seed')} -> "
            f"{folder}",
            soft_wrap=True,
        )
        records = []
        for kind in kinds:
            begin = time.perf_counter()
            _, record = run(options, plan, kind, rates)
            records.append(record)
            console.print(f"  {kind:<12} {time.perf_counter() - begin:.1f} s")
        result = {"machine": timing.machine(), "kinds": records}
        write_results(folder, PROG, options, _plain(result))
        cli.write_atomic(folder / "ensembles.png", figures.png(picture(options, records)))
    for view in tables(records, rates):
        console.print()
        console.print(view)
    console.print()
    if any(_on_edge(record, rates) for record in records):
        console.print("* an end of the rates: beyond it may be a better one")
    console.print(f"picture: {folder / 'ensembles.png'}", soft_wrap=True)
    return 0


def _plain(value: Any) -> Any:
    """For JSON: numbers that are not finite are None."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return number(value) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
