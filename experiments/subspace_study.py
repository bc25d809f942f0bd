"""Sharp and flat directions: the experiments of two papers, re-run by one command.

    python -m experiments.subspace_study --task digits --loss mse

Song, Ahn, Yun, "Does SGD really happen in tiny subspaces?" (arXiv 2405.16002), and Zakarin, Singh,
"Accelerating neural network training along sharp and flat directions" (arXiv 2505.11972), split
every update into its part in the *dominant* subspace, spanned by the k leading eigenvectors of the
Hessian of the training loss (k: number of classes), and the rest, the *bulk*. The alignment of a
vector, chi_k(v) = |P v| / |v|, says how much of it lies in the dominant subspace.

Six panels, each a picture and a table:

    alignment                 SGD: loss, chi_k of the full and of mini-batch gradients, eigenvalues
    switch                    from one point on: SGD, Dom-SGD, Bulk-SGD, and two lines between them
    effective_learning_rates  in both subspaces, of SGD, SGD with momentum and Adam
    stability                 Bulk-SGD against SGD: learning rate, k, refresh, momentum, batch size
    energy                    share of H, Gauss-Newton and functional Hessian in the subspace
    noise                     SGD, then full-batch gradient descent: what becomes of the alignment

and a report in which every qualitative claim of the papers is held against a number. The criteria
are part of the code (`experiments.reporting.subspace.CLAIMS`). `runs/<name>/` then holds

    config.json            what was run: the same command continues it, another one is refused
    units/<panel>/*.json   raw results, one file per finished piece of work
    snapshots/*.npz        parameters along SGD, from which the other panels start
    <panel>.csv, .png      table and picture
    claims.json, report.md, report.html

Projections use a basis that the library tracks on a fixed part of the training set; what is
*measured* (chi_k, eigenvalues, energies) uses eigenvectors solved to a tolerance. The point from
which the branches leave is where the moving average (decay 0.9) of chi_k of the full gradient
exceeds 0.95, as in public replications, or a fixed step. There the average runs over every step;
here over every `check_every`-th.

Learning rates: a replication quotes 0.01 (MLP), 0.001 (CNN) and 0.001 (Transformer) from the
appendix of Song et al., the defaults here; another one uses 0.1 for MNIST. Digits are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import models
import optax_accel as oa
from experiments import cli, data
from experiments.cli import UsageError
from experiments.reporting import subspace
from experiments.runs import folders
from experiments.runs.records import (
    environment,
    number,
    read_file,
    read_record,
    write_record,
)
from experiments.runs.study import StudyFolder
from experiments.training import engine, losses
from optax_accel import curvature
from optax_accel.curvature import blocks

PROG = "python -m experiments.subspace_study"
PyTree = Any

LEARNING_RATES = {"digits": 0.05, "mnist5k": 0.01, "cifar10_5k": 0.001, "sst2_1k": 0.001}
TASKS = tuple(LEARNING_RATES)
# When two public replications of Song et al. leave SGD.
SWITCH_ALIGNMENT, ALIGNMENT_DECAY = 0.95, 0.9
# (a, b) of `a P d + b (I - P) d`: Song et al.'s three, and two lines through them (our reading of
# Zakarin and Singh). alpha is the place on the line.
ALPHAS = (0.25, 0.5, 0.75)
METHODS = {"sgd": (1.0, 1.0), "dom": (1.0, 0.0), "bulk": (0.0, 1.0)}
LINES: dict[str, Callable[[float], tuple[float, float]]] = {
    "sgd_to_bulk": lambda alpha: (1 - alpha, 1.0),
    "dom_to_bulk": lambda alpha: (1 - alpha, alpha),
}
# Multiples of the learning rate that Bulk-SGD and SGD are tried at; the other ablations change one
# thing at a time at ABLATION_RATE times the learning rate.
RATE_FACTORS = (1, 2, 5, 10, 20, 50, 100)
ABLATION_RATE = 5
MOMENTUM = 0.9
# Updates (with their full gradients) that one estimate of the effective learning rates pools.
WINDOW = 10
# Eigenvalues measured beyond the k-th, and the relative accuracy of all of them.
EXTRA_EIGENVALUES, TOLERANCE = 4, 1e-4
# A queue of unfinished steps costs memory: wait for one this often.
WAIT_EVERY = 16


# What a study's folder holds.
SUBSPACES = functools.partial(
    StudyFolder,
    kind="a study",
    mark="study",
    files=(
        *("claims.json", "report.md", "report.html"),
        *(f"{panel}.{kind}" for panel in subspace.PANELS for kind in ("csv", "png")),
    ),
    folders=("units", "snapshots"),
)


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Re-run the experiments on the dominant and the bulk subspace of the Hessian."""

    task: str = "digits"
    """Data set and model: digits or mnist5k (MLP), cifar10_5k (CNN), sst2_1k (Transformer)."""
    loss: str = "mse"
    """mse or cross_entropy."""
    scale: str = "small"
    """small: under an hour on two cores (digits: minutes); full: the papers' 20,000 steps; tiny:
    seconds on digits, to see the files, too short to conclude anything."""
    learning_rate: float | None = None
    """Default: 0.05 (digits), 0.01 (mnist5k), 0.001 (cifar10_5k, sst2_1k)."""
    switch_step: int | None = None
    """Leave SGD at this step, instead of when the gradient is aligned."""
    seeds: int | None = None
    """Number of seeds: initial weights and batch order; default: by task and scale."""
    panels: str = ",".join(subspace.PANELS)
    """Panels to compute now, separated by commas."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    name: str | None = None
    """Name of the run's folder; default: task, loss and a hash of the settings."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Lengths and sizes: what separates a look from the papers' full runs.

    Attributes:
      seeds: number of seeds.
      latest_switch: step at which SGD is left at the latest.
      check_every: steps between checks of the alignment up to there.
      steps: steps of each branch from there.
      short_steps: steps of each run of the panels stability and noise.
      evaluations: evaluations of training loss and test accuracy on each of these stretches.
      points: eigenvalue problems solved on each stretch.
      snapshots: parameters kept along SGD from the switch on, where energies are measured.
      curvature_examples: training examples, fixed per seed, whose Hessian the projections track.
      measured_examples: training examples whose Hessian the measurements use.
      refresh_every: steps between refreshes of the tracked subspace.
      probes: random vectors that estimate the energy outside the subspace.
    """

    seeds: int
    latest_switch: int
    check_every: int
    steps: int
    short_steps: int
    evaluations: int
    points: int
    snapshots: int
    curvature_examples: int
    measured_examples: int
    refresh_every: int
    probes: int


TINY = Scale(1, 20, 10, 20, 10, 5, 2, 1, 50, 100, 5, 4)
SCALES = {
    "digits": {
        "tiny": TINY,
        "small": Scale(3, 1500, 10, 2000, 500, 80, 8, 3, 500, 1077, 5, 50),
        "full": Scale(5, 4000, 10, 16000, 2000, 200, 20, 6, 1077, 1077, 5, 200),
    },
    "mnist5k": {
        "tiny": TINY,
        "small": Scale(2, 4000, 20, 4000, 500, 80, 6, 3, 500, 5000, 10, 30),
        "full": Scale(3, 5000, 10, 15000, 2000, 200, 20, 6, 1000, 5000, 5, 100),
    },
    "cifar10_5k": {
        "tiny": TINY,
        "small": Scale(1, 800, 100, 800, 80, 20, 3, 1, 200, 500, 40, 5),
        "full": Scale(3, 5000, 10, 15000, 2000, 200, 20, 6, 1000, 5000, 5, 100),
    },
    "sst2_1k": {
        "tiny": TINY,
        "small": Scale(1, 200, 50, 200, 50, 8, 2, 1, 100, 250, 25, 5),
        "full": Scale(3, 5000, 10, 15000, 2000, 200, 20, 6, 1000, 1000, 5, 100),
    },
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers, checked.

    Attributes:
      task: data and model.
      loss: one of `losses.LOSSES`.
      scale: lengths and sizes.
      learning_rate: of SGD.
      switch_step: where SGD is left; None: where the gradient is aligned.
      batch_size: examples per step, 50 in the papers.
    """

    task: data.Task
    loss: str
    scale: Scale
    learning_rate: float
    switch_step: int | None = None
    batch_size: int = 50

    @property
    def directions(self) -> int:
        """k: as many as there are classes, as in the papers."""
        return self.task.num_classes

    def config(self) -> dict[str, Any]:
        """The settings as plain JSON: two runs with equal settings may share a folder."""
        return {
            "study": "subspaces",
            "task": self.task.name,
            "model": self.task.default_model,
            "train_examples": len(self.task.train),
            "test_examples": len(self.task.test),
            "data": self.task.checksums,
            "loss": self.loss,
            "k": self.directions,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "switch_step": self.switch_step,
            **dataclasses.asdict(self.scale),
        }


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      seed: initial weights and batch order.
      learning_rate: of the optimizer.
      batch_size: examples per step.
      optimizer: ``"sgd"`` or ``"adam"``.
      momentum: of SGD; 0: none.
      weights: (a, b), of the dominant and the bulk part of the update; None: no projection.
      directions: k of the projection.
      refresh_every: steps between refreshes of the tracked subspace.
    """

    seed: int
    learning_rate: float
    batch_size: int
    optimizer: str = "sgd"
    momentum: float = 0.0
    weights: tuple[float, float] | None = None
    directions: int = 0
    refresh_every: int = 1

    def build(self, hyper: dict[str, Any] | None = None) -> optax.GradientTransformationExtraArgs:
        """The optimizer; `hyper` replaces `learning_rate`, `momentum`, `a` and `b`."""
        hyper = self.hyper() if hyper is None else hyper
        if self.optimizer == "adam":
            tx = optax.adam(hyper["learning_rate"])
        else:
            # Without momentum there is no buffer to keep, and other code to compile.
            tx = optax.sgd(hyper["learning_rate"], hyper["momentum"] if self.momentum else None)
        if self.weights is not None:
            tx = optax.chain(
                tx,
                oa.interpolate_subspaces(
                    self.directions, hyper["a"], hyper["b"], tracker=oa.BlockTracker()
                ),
            )
        return optax.with_extra_args_support(tx)

    def hyper(self) -> dict[str, float]:
        """The numbers that one compiled step takes as arguments."""
        a, b = self.weights or (1.0, 1.0)
        return {"learning_rate": self.learning_rate, "momentum": self.momentum, "a": a, "b": b}

    def program(self) -> tuple[Any, ...]:
        """What a step has to be compiled for."""
        return (
            self.optimizer,
            self.momentum > 0,
            None if self.weights is None else self.directions,
        )


# Training and measuring -------------------------------------------------------------------------


def _norm_squared(vector: PyTree) -> jax.Array:
    block = blocks.as_block(vector)
    return blocks.inner(block, block)[0, 0]


@jax.jit
def alignment(basis: PyTree, vector: PyTree) -> jax.Array:
    """chi_k of a vector: the norm of its part in the span of the basis over its own norm."""
    coefficients = blocks.inner(basis, blocks.as_block(vector))
    squared = _norm_squared(vector)
    ratio = jnp.sum(coefficients**2) / jnp.where(squared > 0, squared, 1)
    return jnp.sqrt(jnp.minimum(ratio, 1))


@jax.jit
def update_products(basis: PyTree, gradient: PyTree, before: PyTree, after: PyTree) -> jax.Array:
    """``-<d, g_dom>, |g_dom|^2, -<d, g_bulk>, |g_bulk|^2`` of the update ``d = after - before``."""
    update = jax.tree.map(jnp.subtract, after, before)
    of_gradient = blocks.inner(basis, blocks.as_block(gradient))[:, 0]
    of_update = blocks.inner(basis, blocks.as_block(update))[:, 0]
    whole = blocks.inner(blocks.as_block(update), blocks.as_block(gradient))[0, 0]
    dominant, size = of_update @ of_gradient, of_gradient @ of_gradient
    return jnp.stack([-dominant, size, dominant - whole, _norm_squared(gradient) - size])


class Study:
    """Data, model and compiled functions of one plan."""

    def __init__(self, plan: Plan):
        self.plan = plan
        task = plan.task
        self.x, self.y = jnp.asarray(task.train.x), jnp.asarray(task.train.y)
        self.batches = {name: self._cut(getattr(task, name)) for name in ("train", "test")}
        rows = np.random.default_rng(0).permutation(len(task.train))
        rows = np.sort(rows[: plan.scale.measured_examples])
        self.measured = self._cut(data.Split(task.train.x[rows], task.train.y[rows]))
        # Loops around convolutions are slow on a CPU (jax#12868), and the cold start is one.
        self.cold_start = not (
            models.is_convolutional(task.default_model) and jax.default_backend() == "cpu"
        )
        self.graphdef, _, rest = engine.split(self._model(0))

        def predict(params: PyTree, x: jax.Array) -> jax.Array:
            return engine.objective(self.graphdef, rest, x, self.y).outputs(params)

        # One object for all measurements: what is compiled for an objective lives with it.
        self.objective = oa.Objective(predict, losses.find_loss(plan.loss))
        self._gradient = jax.jit(self.objective.grad)
        self._evaluate = jax.jit(functools.partial(engine.evaluate, self.graphdef, loss=plan.loss))
        self._steps: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def _cut(self, split: data.Split) -> list[dict[str, jax.Array]]:
        """A split in pieces small enough for one pass, as keyword arguments of the objective."""
        size = 5000 if self.plan.task.default_model == "mlp" else 1000
        return [
            {"x": jnp.asarray(split.x[i : i + size]), "y": jnp.asarray(split.y[i : i + size])}
            for i in range(0, len(split), size)
        ]

    def _model(self, seed: int) -> Any:
        task = self.plan.task
        return models.create(
            task.default_model,
            input_shape=task.input_shape,
            num_classes=task.num_classes,
            vocabulary_size=task.vocabulary_size,
            rngs=seed,
        )

    def start(self, seed: int) -> tuple[PyTree, PyTree]:
        """Initial parameters and other variables."""
        return engine.split(self._model(seed))[1:]

    def walk(
        self, run: Run, params: PyTree, first: int, stop: int
    ) -> Iterator[tuple[int, engine.TrainState]]:
        """Trains from step `first` to `stop`.

        Args:
          run: how.
          params: parameters at `first`; the optimizer starts anew there.
          first: number of steps that came before; decides the batches.
          stop: number of steps after the last one.

        Yields:
          (steps done, state), also before the first step. The next step takes the state's buffers:
          copy what is to be kept.
        """
        _, rest = self.start(run.seed)
        examples = len(self.y)
        order = data.index_batches(examples, batch_size=run.batch_size, seed=run.seed)
        for _ in range(first):
            next(order)
        subset = np.random.default_rng(run.seed).permutation(examples)
        subset = np.sort(subset[: self.plan.scale.curvature_examples])
        tracked = (self.x[subset], self.y[subset]) if run.weights is not None else None
        step, hyper = self._step(run), run.hyper()
        state = jax.tree.map(jnp.copy, engine.init_state(run.build(), params, rest))
        yield first, state
        for done in range(first, stop):
            refresh = (
                oa.refresh_at(done - first, run.refresh_every, cold_start=self.cold_start)
                if tracked
                else None
            )
            state, loss = step(state, next(order), self.x, self.y, tracked, hyper, refresh=refresh)
            if done % WAIT_EVERY == 0:
                jax.block_until_ready(loss)
            yield done + 1, state

    def _step(self, run: Run) -> Callable[..., Any]:
        if run.program() not in self._steps:

            def step(
                state: Any, index: Any, x: Any, y: Any, tracked: Any, hyper: Any, refresh: Any
            ) -> tuple[Any, jax.Array]:
                state, metrics = engine.train_step(
                    run.build(hyper),
                    self.graphdef,
                    state,
                    x[index],
                    y[index],
                    curvature=tracked,
                    refresh=refresh,
                    loss=self.plan.loss,
                )
                return state, metrics["loss"]

            self._steps[run.program()] = jax.jit(
                step, static_argnames="refresh", donate_argnames="state"
            )
        return self._steps[run.program()]

    def evaluate(self, state: engine.TrainState) -> dict[str, float | None]:
        """Training loss and test accuracy, on all examples; None where the loss is not finite."""
        wanted = (("train", "loss"), ("test", "accuracy"))
        found = {}
        for split, name in wanted:
            total = 0.0
            for batch in self.batches[split]:
                result = self._evaluate(state.params, state.rest, **batch)
                total += len(batch["y"]) * float(result[name])
            found[f"{split}_{name}"] = total / len(getattr(self.plan.task, split))
        finite = math.isfinite(found["train_loss"])
        return {name: _rounded(value) if finite else None for name, value in found.items()}

    def full_gradient(self, params: PyTree) -> PyTree:
        """The gradient of the training loss."""
        total = None
        for batch in self.batches["train"]:
            share = len(batch["y"]) / len(self.y)
            part = jax.tree.map(lambda g, share=share: share * g, self._gradient(params, **batch))
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return total

    def operator(self, build: Callable[..., Any], params: PyTree) -> curvature.CurvatureOperator:
        """A curvature matrix on the measured examples."""
        if len(self.measured) == 1:
            return build(self.objective, params, **self.measured[0])
        return build(self.objective, params, batches=self.measured)

    def eigenpairs(self, params: PyTree, extra: int = 0) -> curvature.Eigenpairs:
        """The leading k + `extra` eigenpairs of the Hessian, their eigenvalues to `TOLERANCE`."""
        operator = self.operator(curvature.hessian, params)
        count = self.plan.directions + extra
        return curvature.lanczos(
            operator,
            operator.like,
            count,
            key=jax.random.key(0),
            num_products=30 * count,
            tolerance=TOLERANCE,
            start=self.full_gradient(params),
            loop="host",
        )

    def batch_alignments(self, params: PyTree, basis: PyTree, seed: int) -> list[float]:
        """chi_k of a few mini-batch gradients."""
        batch_size = self.plan.batch_size
        order = data.index_batches(len(self.y), batch_size=batch_size, seed=seed + 1000)
        batches = [{"x": self.x[i], "y": self.y[i]} for i in itertools.islice(order, 10)]
        return [float(alignment(basis, self._gradient(params, **batch))) for batch in batches]


_rounded = functools.partial(number, digits=7)  # what float32 carries


def _places(first: int, length: int, number: int) -> set[int]:
    """Both ends of a stretch of steps and evenly spaced ones between: `number` + 1 in all."""
    return {round(first + length * i / number) for i in range(number + 1)}


# The panels' work -------------------------------------------------------------------------------

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """One finished piece of work, stored in one file.

    Attributes:
      panel: one of `subspace.PANELS`.
      identity: what tells it from the others of its panel; goes in front of every row.
      work: makes the rows.
    """

    panel: str
    identity: dict[str, Any]
    work: Callable[[], Rows]

    @property
    def name(self) -> str:
        """The file's name, without extension."""
        return "-".join(str(value) for value in self.identity.values() if value is not None)


class Store:
    """The run's folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, unit: Unit) -> Path:
        """Where a unit's rows are."""
        return self.folder / "units" / unit.panel / f"{unit.name}.json"

    def save(self, unit: Unit, rows: Rows) -> None:
        """Stores a finished unit."""
        path = self.path(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, {"identity": unit.identity, "rows": rows})

    def load(self, unit: Unit) -> Rows | None:
        """The rows of a unit, its identity in front of each; None if it is not finished."""
        content = read_record(self.path(unit))
        if content is None:
            return None
        return [{**content["identity"], **row} for row in content["rows"]]

    def save_snapshots(self, seed: int, snapshots: dict[int, PyTree]) -> None:
        """Stores parameters by step; the first is where the branches leave."""
        buffer = io.BytesIO()
        leaves: dict[str, Any] = {
            f"{step}/{i}": np.asarray(leaf)
            for step, params in snapshots.items()
            for i, leaf in enumerate(jax.tree.leaves(params))
        }
        np.savez(buffer, **leaves)
        path = self.folder / "snapshots" / f"seed{seed}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        cli.write_atomic(path, buffer.getvalue())

    def snapshots(self, seed: int, like: PyTree) -> dict[int, PyTree]:
        """What `save_snapshots` stored, in the structure of `like`."""
        path = self.folder / "snapshots" / f"seed{seed}.npz"
        structure, shapes = jax.tree.structure(like), [x.shape for x in jax.tree.leaves(like)]
        found = {}
        try:
            with np.load(io.BytesIO(read_file(path))) as file:
                for step in dict.fromkeys(int(name.split("/")[0]) for name in file.files):
                    leaves = [file[f"{step}/{i}"] for i in range(len(shapes))]
                    if [leaf.shape for leaf in leaves] != shapes:
                        raise ValueError("other shapes")
                    found[step] = jax.tree.unflatten(structure, [*map(jnp.asarray, leaves)])
            if not found:
                raise ValueError("nothing in it")
        except Exception as error:  # NumPy and zipfile raise whatever they meet
            alignment = self.folder / "units" / "alignment" / f"{seed}.json"
            raise UsageError(
                f"{path} is missing or damaged ({type(error).__name__}); delete {alignment}, so "
                "that both are made again"
            ) from error
        return found


def sgd(plan: Plan, seed: int, factor: float = 1.0, **changes: Any) -> Run:
    """SGD as the plan has it, at `factor` times its learning rate, with changes."""
    rate = float(f"{factor * plan.learning_rate:.6g}")  # 0.005, not 0.005000000000000001
    settings = {"learning_rate": rate, "batch_size": plan.batch_size}
    return Run(seed, **{**settings, **changes})


def projected(plan: Plan, weights: tuple[float, float]) -> dict[str, Any]:
    """The changes that make a projected run of a plain one."""
    return {
        "weights": weights,
        "directions": plan.directions,
        "refresh_every": plan.scale.refresh_every,
    }


def follow_sgd(study: Study, store: Store, seed: int) -> Rows:
    """SGD until its gradient is aligned, and on from there; keeps snapshots."""
    plan, scale = study.plan, study.plan.scale
    rows: dict[int, dict[str, Any]] = {}

    def look(step: int, state: engine.TrainState, places: set[int], solve: set[int]) -> None:
        if step not in places | solve:
            return
        row = rows.setdefault(step, {"step": step})
        row |= study.evaluate(state)
        if row["train_loss"] is None:
            raise UsageError(
                f"SGD diverges at learning rate {plan.learning_rate:g} (seed {seed}, before step "
                f"{step}); give a smaller --learning-rate and another --name"
            )
        if step in solve:
            row |= spectrum(study, state, seed)

    params, _ = study.start(seed)
    latest = scale.latest_switch if plan.switch_step is None else plan.switch_step
    places, solve = _places(0, latest, scale.evaluations), _places(0, latest, scale.points)
    average = None
    tracked = sgd(plan, seed, **projected(plan, METHODS["sgd"]))
    for step, state in study.walk(tracked, params, 0, latest):
        look(step, state, places, solve)
        if step and step % scale.check_every == 0:
            basis = engine.find_in_state(state.opt_state, "basis")
            chi = float(alignment(basis, study.full_gradient(state.params)))
            average = (
                chi
                if average is None
                else (ALIGNMENT_DECAY * average + (1 - ALIGNMENT_DECAY) * chi)
            )
            row = rows.setdefault(step, {"step": step})
            row |= {"tracked_chi": _rounded(chi), "tracked_average": _rounded(average)}
            if plan.switch_step is None and average > SWITCH_ALIGNMENT:
                break
    switch, params = step, jax.tree.map(jnp.copy, state.params)

    kept = {switch: params}
    places = _places(switch, scale.steps, scale.evaluations)
    solve = _places(switch, scale.steps, scale.points)
    for step, state in study.walk(sgd(plan, seed), params, switch, switch + scale.steps):
        look(step, state, places, solve)
        if step in _places(switch, scale.steps, scale.snapshots) and step != switch:
            kept[step] = jax.tree.map(jnp.copy, state.params)
    store.save_snapshots(seed, kept)
    aligned = average is not None and average > SWITCH_ALIGNMENT
    ends = {"switch_step": switch, "aligned": aligned}
    return [{**row, **ends} for _, row in sorted(rows.items())]


def spectrum(study: Study, state: engine.TrainState, seed: int) -> dict[str, Any]:
    """Leading eigenvalues, and the alignment of the full and of mini-batch gradients."""
    k = study.plan.directions
    pairs = study.eigenpairs(state.params, EXTRA_EIGENVALUES)
    basis = blocks.rows(pairs.basis, 0, k)
    batches = study.batch_alignments(state.params, basis, seed)
    return {
        "chi": _rounded(alignment(basis, study.full_gradient(state.params))),
        "batch_chi": _rounded(np.mean(batches)),
        "batch_chi_deviation": _rounded(np.std(batches)),
        **{f"eigenvalue_{i}": _rounded(v) for i, v in enumerate(pairs.eigenvalues, 1)},
        "smallest_ritz_value": _rounded(pairs.smallest),
        "products": int(pairs.num_products),
        "converged": bool(pairs.converged[:k].all()),
    }


def train_branch(study: Study, run: Run, params: PyTree, first: int, steps: int) -> Rows:
    """Loss and accuracy along one run; ends early where the loss is not finite."""
    rows: Rows = []
    places = _places(first, steps, min(steps, study.plan.scale.evaluations))
    for step, state in study.walk(run, params, first, first + steps):
        if step in places:
            rows.append({"step": step, **study.evaluate(state)})
            if rows[-1]["train_loss"] is None:
                break
    return rows


def effective_rates(study: Study, run: Run) -> Rows:
    r"""Effective learning rates in both subspaces, along one run from the start.

    ``-<d, g_dom> / |g_dom|^2`` and the same in the bulk (Song et al., section 6), with ``d`` the
    applied update and ``g`` the full gradient at the point before. Numerators and denominators are
    summed over `WINDOW` steps, on the basis of the first: a single update is mostly noise.
    """
    scale = study.plan.scale
    params, _ = study.start(run.seed)
    places = _places(0, scale.latest_switch, scale.points)
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
        rows.append({"step": step, **{key: _rounded(value) for key, value in row.items()}})
    return rows


def noise(study: Study, run: Run, params: PyTree, first: int) -> Rows:
    """Loss and alignment of the full gradient along one run."""
    scale = study.plan.scale
    rows: Rows = []
    for step, state in study.walk(run, params, first, first + scale.short_steps):
        if step in _places(first, scale.short_steps, scale.points):
            row = {"step": step, **study.evaluate(state)}
            if row["train_loss"] is None:
                break
            chi = alignment(study.eigenpairs(state.params).basis, study.full_gradient(state.params))
            rows.append({**row, "chi": _rounded(chi)})
    return rows


def energy(study: Study, snapshots: dict[int, PyTree]) -> Rows:
    """Energy shares of the three matrices in the dominant subspace, at every snapshot."""
    rows: Rows = []
    for step, params in snapshots.items():
        basis = study.eigenpairs(params).basis
        for name in subspace.OPERATORS:
            operator = study.operator(getattr(curvature, name), params)
            shares = curvature.energy_shares(
                operator, basis, key=jax.random.key(0), num_probes=study.plan.scale.probes
            )
            row = {"step": step, "operator": name}
            for kind, estimate in (("frobenius", shares.frobenius), ("trace", shares.trace)):
                row[f"{kind}_share"] = _rounded(estimate.value)
                row[f"{kind}_error"] = _rounded(estimate.standard_error)
            rows.append(row)
    return rows


def ablations(plan: Plan, seed: int) -> Iterator[tuple[str, float, str, Run]]:
    """The runs of the stability panel: (what is changed, value, method, run)."""
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


OPTIMIZERS: dict[str, tuple[float, dict[str, Any]]] = {
    "sgd": (1.0, {}),
    "momentum": (1.0, {"momentum": MOMENTUM}),
    "adam": (0.1, {"optimizer": "adam"}),
}


def units(study: Study, store: Store, seed: int) -> Iterator[Unit]:
    """All units of a seed, in order: those of `alignment` first, where the others start."""
    plan, scale = study.plan, study.plan.scale

    @functools.cache
    def snapshots() -> dict[int, PyTree]:
        return store.snapshots(seed, study.start(seed)[0])

    def origin() -> tuple[PyTree, int]:
        step, params = next(iter(snapshots().items()))
        return params, step

    @functools.cache  # the ablations share a run
    def branch(run: Run, steps: int) -> Rows:
        return train_branch(study, run, *origin(), steps)

    yield Unit("alignment", {"seed": seed}, lambda: follow_sgd(study, store, seed))

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
        yield Unit(
            "effective_learning_rates", identity, functools.partial(effective_rates, study, run)
        )

    for ablation, value, method, run in ablations(plan, seed):
        identity = {"ablation": ablation, "value": value, "method": method, "seed": seed}
        yield Unit("stability", identity, functools.partial(branch, run, scale.short_steps))

    def energies() -> Rows:
        return energy(study, {0: study.start(seed)[0], **snapshots()})

    yield Unit("energy", {"seed": seed}, energies)

    for name, batch_size in (("sgd", plan.batch_size), ("gd", len(plan.task.train))):

        def chi_along(batch_size: int = batch_size) -> Rows:
            return noise(study, sgd(plan, seed, batch_size=batch_size), *origin())

        yield Unit("noise", {"method": name, "seed": seed}, chi_along)


# Command line -----------------------------------------------------------------------------------


def resolve(options: Options) -> tuple[Plan, list[str]]:
    """Checks the options and fills in the defaults; also gives the panels to compute.

    Raises:
      UsageError, data.DataError: with one line that says what is allowed.
    """
    options.check()
    cli.check_known("task", options.task, TASKS)
    cli.check_known("loss", options.loss, data.LOSSES["classification"])
    cli.check_known("scale", options.scale, tuple(SCALES[options.task]))
    panels = [name.strip() for name in options.panels.split(",") if name.strip()]
    if not panels:
        raise UsageError(f"--panels names none; valid: {', '.join(subspace.PANELS)}")
    for panel in panels:
        cli.check_known("panel", panel, tuple(subspace.PANELS))
    scale = SCALES[options.task][options.scale]
    if options.seeds is not None:
        scale = dataclasses.replace(scale, seeds=options.seeds)
    plan = Plan(
        task=data.load_task(options.task, data_dir=options.data_dir),
        loss=options.loss,
        scale=scale,
        learning_rate=options.learning_rate or LEARNING_RATES[options.task],
        switch_step=options.switch_step,
    )
    return plan, panels


def run(
    plan: Plan, folder: Path, panels: Sequence[str], console: Console
) -> dict[str, subspace.Rows]:
    """Computes what is not finished yet; returns the rows of every panel that is complete."""
    study, store = Study(plan), Store(folder)
    rows: dict[str, subspace.Rows] = {}
    incomplete = set()
    begin, computed = time.perf_counter(), 0
    everything = (units(study, store, seed) for seed in range(plan.scale.seeds))
    for unit in itertools.chain.from_iterable(everything):
        found = store.load(unit)
        if found is None and (unit.panel in panels or unit.panel == "alignment"):
            start = time.perf_counter()
            store.save(unit, unit.work())
            found = store.load(unit)
            computed += 1
            console.print(f"  {unit.panel} {unit.name}: {time.perf_counter() - start:.1f} s")
        if found is None:
            incomplete.add(unit.panel)
        rows.setdefault(unit.panel, []).extend(found or [])
    console.print(
        f"  {cli.plural(computed, 'unit')} computed in {time.perf_counter() - begin:.0f} s"
    )
    return {name: content for name, content in rows.items() if name not in incomplete}


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        plan, panels = resolve(options)
    config = plan.config()
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
    default = f"subspaces-{plan.task.name}-{plan.loss}-{digest}"
    folder = folders.locate(options.runs_dir, options.name, default)
    console = cli.console(100)
    with SUBSPACES(folder, config).claim():
        console.print(
            f"{plan.task.name}, {plan.task.default_model}, {plan.loss}, learning rate "
            f"{plan.learning_rate:g}, {cli.plural(plan.scale.seeds, 'seed')} -> {folder}",
            soft_wrap=True,
        )
        rows = run(plan, folder, panels, console)
        results = {"config": config, "environment": environment(), "rows": rows}
        claims = subspace.write_all(folder, results)
    console.print()
    console.print(subspace.table(claims))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
