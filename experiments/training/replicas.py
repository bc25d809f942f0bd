"""Trains the runs of one method (learning rate x seed) together, in one compiled program.

The step is `step.train_step` under `vmap` over the runs. Curvature is refreshed from
the host (`Method.refresh`, static): `vmap` turns a refresh inside the graph into a `select`, which
pays for it at every step. The data live on the device; runs of one seed start from the same weights
and see the same batches, whatever the method and the learning rate. Workers that have a state of
their own are a further axis of `vmap`, and share the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from experiments import data, progress
from experiments.methods import Method
from experiments.runs.records import number
from experiments.training import losses, networks
from experiments.training.optimizers import find_schedule_free
from experiments.training.parallel import mean_of_copies
from experiments.training.program import evaluation_batch
from experiments.training.step import (
    StepOptions,
    TrainState,
    averaged,
    init_state,
    train_step,
)

# A queue of unfinished steps costs memory and, on a CPU mesh, can hang: fetch a number this often.
FETCH_EVERY = 16
# Most sentences per forward pass of an evaluation, each of which is a batch of words.
EVALUATION_SENTENCES = 125
# The axis of the workers of a run, for methods that give each a state of its own.
WORKERS = "workers"

Replica = tuple[float, int]  # (learning rate, seed)
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers of a comparison, checked.

    Attributes:
      task: the data.
      model: name of the model.
      loss: name of the loss.
      methods: the methods, each with the learning rates that it is tuned on.
      seeds: number of seeds per method and learning rate.
      steps: number of steps.
      batch_size: examples per step.
      curvature_batch_size: examples, fixed per seed, for Hessian-vector products.
      eval_every: steps between validations.
      target: validation accuracy to count the steps to.
      model_options: options of the model besides its defaults.
      first_seed: the first of the seeds, which follow each other.
      runs: the runs of each method, by its name, instead of each of its rates with each seed.
      equal_gradients: whether the test split is also read where a method has taken as many
        gradients as the plan has steps, see `Trainer.equal_step`.
      workers: how many workers share a batch, for methods with `Method.per_worker`.
    """

    task: data.Task
    model: str
    loss: str
    methods: list[Method]
    seeds: int
    steps: int
    batch_size: int
    curvature_batch_size: int
    eval_every: int
    target: float
    model_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_seed: int = 0
    runs: Mapping[str, Sequence[Replica]] | None = None
    equal_gradients: bool = False
    workers: int = 1

    def replicas(self, method: Method) -> list[Replica]:
        """The (learning rate, seed) of every run of a method."""
        if self.runs is not None:
            return list(self.runs[method.name])
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [(rate, seed) for rate in method.learning_rates for seed in seeds]

    def config(self) -> dict[str, Any]:
        """The settings as plain JSON: two runs with equal settings may share a folder."""
        return {
            "task": self.task.name,
            "train_examples": len(self.task.train.y),
            "validation_examples": len(self.task.validation.y),
            "test_examples": len(self.task.test.y),
            "data": self.task.checksums,
            "model": self.model,
            **({"model_options": self.model_options} if self.model_options else {}),
            **({"workers": self.workers} if self.workers > 1 else {}),
            "loss": self.loss,
            "seeds": self.seeds,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "curvature_batch_size": self.curvature_batch_size,
            "eval_every": self.eval_every,
            "target": self.target,
            "methods": {method.name: list(method.learning_rates) for method in self.methods},
        }


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def free_memory() -> int:
    """Bytes that the default device (or, for a CPU, the machine) has left."""
    device = jax.devices()[0]
    if device.platform != "cpu" and (stats := device.memory_stats()):
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not Linux: assume a small machine
        return 4 * 2**30


class Trainer:
    """Trains the runs of one method at a time, many together.

    Args:
      plan: the comparison.
      max_replicas: most runs to train together; ``None`` for as many as fit into the memory.
      memory: bytes that the runs trained together may take; ``None`` for half of what is free.
    """

    def __init__(self, plan: Plan, *, max_replicas: int | None = None, memory: float | None = None):
        self.plan = plan
        task = plan.task
        self.train_x, self.train_y = jnp.asarray(task.train.x), jnp.asarray(task.train.y)
        size = evaluation_batch(task)
        if task.vocabulary_size is not None:
            size = min(size, EVALUATION_SENTENCES)
        self.held_out = {
            name: [
                {
                    "x": jnp.asarray(split.x[i : i + size]),
                    "y": jnp.asarray(split.y[i : i + size]),
                }
                for i in range(0, len(split.y), size)
            ]
            for name, split in (("validation", task.validation), ("test", task.test))
        }
        self.max_replicas = max_replicas
        # Two things that XLA does slowly on a CPU: grouped convolutions, which vmapped weights
        # make, and convolutions in loops, which the Lanczos start makes (jax#12868).
        self.cold_start = True
        if models.is_convolutional(plan.model) and jax.default_backend() == "cpu":
            self.max_replicas = 1
            self.cold_start = False
        self.memory = free_memory() / 2 if memory is None else memory
        self.seeds = range(plan.first_seed, plan.first_seed + plan.seeds)
        split = [
            networks.split(
                models.create(
                    plan.model,
                    input_shape=plan.task.input_shape,
                    num_classes=plan.task.num_classes or None,
                    vocabulary_size=plan.task.vocabulary_size,
                    rngs=seed,
                    **plan.model_options,
                )
            )
            for seed in self.seeds
        ]
        self.graphdef = split[0][0]
        self.weights = [(params, rest) for _, params, rest in split]
        rows = slice(plan.batch_size)
        self.loss = networks.objective(self.graphdef, plan.loss)
        self.objective = self.loss.bind(
            rest=split[0][2], x=self.train_x[rows], y=self.train_y[rows]
        )
        examples = len(plan.task.train.y)
        self.steps_per_epoch = examples // plan.batch_size
        self.order = np.stack([self._batches(seed, examples) for seed in self.seeds])
        # A fixed sub-sample per seed: redrawn at every refresh, its noise alone would move the
        # subspace.
        self.curvature = np.stack(
            [
                np.random.default_rng(seed)
                .permutation(examples)[: plan.curvature_batch_size]
                .astype(np.int32)
                for seed in self.seeds
            ]
        )
        self._steps: dict[tuple[str, bool], Callable[..., Any]] = {}
        self.called: set[tuple[str, bool, Any]] = set()  # the forms of steps that are compiled
        evaluate = functools.partial(networks.evaluate, self.graphdef, loss=plan.loss)
        self._evaluate = {
            True: jax.jit(jax.vmap(evaluate, in_axes=(0, 0, None))),
            False: jax.jit(evaluate),
        }
        # Of several workers their mean parameters are evaluated.
        self._consensus = {True: jax.jit(jax.vmap(mean_of_copies)), False: jax.jit(mean_of_copies)}

        def average(state: TrainState) -> tuple[Any, Any]:
            shown = averaged(state)
            return shown.params, shown.rest

        self._average = {True: jax.jit(jax.vmap(average)), False: jax.jit(average)}

    def _batches(self, seed: int, examples: int) -> np.ndarray:
        size, steps = self.plan.batch_size, self.plan.steps
        return data.index_steps(examples, batch_size=size, seed=seed, steps=steps)

    def build(self, method: Method, learning_rate: Any, seed: int = 0) -> Any:
        """The method's Optax transformation for this plan.

        Args:
          method: the method.
          learning_rate: a float, a schedule or a traced scalar.
          seed: seed of the method's own randomness.

        Returns:
          The transformation.
        """
        return method.build(
            learning_rate,
            total_steps=self.plan.steps,
            num_classes=self.plan.task.num_directions,
            steps_per_epoch=self.steps_per_epoch,
            seed=seed,
            axis_name=WORKERS if method.per_worker else None,
            num_workers=self.plan.workers,
            objective=self.objective if method.needs_objective else None,
            likelihood=losses.LIKELIHOODS[self.plan.loss],
        )

    def state_bytes(self, method: Method) -> tuple[int, int]:
        """Bytes of (parameters, optimizer state) of one run."""
        params, rest = self.weights[0]
        state = jax.eval_shape(lambda p, r: init_state(self.build(method, 0.1), p, r), params, rest)
        return tree_bytes(state.params), tree_bytes(state.opt_state)

    def activation_bytes(self, examples: int) -> int:
        """Bytes that the backward pass of one run keeps of its forward pass."""
        params, rest = self.weights[0]
        x, y = self.train_x[:examples], self.train_y[:examples]
        objective = self.loss.bind(rest=rest, x=x, y=y)
        return tree_bytes(jax.eval_shape(lambda p: jax.vjp(objective, p)[1], params))

    def replica_bytes(self, method: Method) -> int:
        """Estimate of the bytes that one run takes.

        These are parameters, state, gradients and curvature vectors, doubled because XLA keeps a
        second buffer for what is not donated, and activations.
        """
        params, opt_state = self.state_bytes(method)
        products = self.products(method)
        vectors = 2 * max(products)  # curvature vectors and their products
        activations = self.activation_bytes(self.plan.batch_size)
        if any(products):
            # The products of a warm refresh run side by side, each with its tangents.
            tangents = min(filter(None, products))
            kept = self.activation_bytes(self.plan.curvature_batch_size)
            activations = max(activations, (1 + tangents) * kept)
        copies = self.plan.workers if method.per_worker else 1
        return 2 * copies * (params * (3 + vectors) + opt_state) + activations

    def products(self, method: Method) -> list[int]:
        """Hessian-vector products planned for every step."""
        count = functools.cache(lambda refresh: self.step_products(method, refresh))
        return [count(self.refresh(method, step)) for step in range(self.plan.steps)]

    def step_products(self, method: Method, refresh: Any) -> int:
        """Hessian-vector products of a step with this ``refresh``."""
        return method.products(refresh, self.weights[0][0], self.plan.task.num_directions)

    def refresh(self, method: Method, step: int) -> bool | str | None:
        """The static ``refresh`` argument planned for a method's step; see `Method.refresh`."""
        return method.refresh(
            step, cold_start=self.cold_start, steps_per_epoch=self.steps_per_epoch
        )

    def step_cost(self, method: Method, products: Any) -> Any:
        """What steps with so many Hessian-vector products cost, in mini-batch gradients.

        A Hessian-vector product (forward over reverse) costs about two gradients of its own batch.
        """
        scale = 2.0 * self.plan.curvature_batch_size / self.plan.batch_size
        return method.gradients_per_step + scale * products

    def gradient_evaluations(self, method: Method) -> np.ndarray:
        """Cumulative cost planned after 0, 1, ..., `plan.steps` steps, in mini-batch gradients."""
        cost = self.step_cost(method, np.array(self.products(method), float))
        return np.concatenate([[0.0], np.cumsum(cost)])

    def equal_step(self, method: Method) -> int:
        """The last evaluation up to which a method takes at most one gradient per step of the plan.

        There it has cost no more than the whole run of a method with one gradient a step.
        """
        plan, cost = self.plan, self.gradient_evaluations(method)
        points = [*range(0, plan.steps, plan.eval_every), plan.steps]
        return max(step for step in points if cost[step] <= plan.steps)

    def alone(self, method: Method) -> bool:
        """Whether the runs of a method are trained one by one."""
        # `vmap` makes batched decompositions of K-FAC's, and several of these at once can wait for
        # each other for ever in XLA's threads on a CPU (jaxlib 0.10, two threads).
        stuck = method.needs_objective and jax.default_backend() == "cpu"
        return stuck or self.max_replicas == 1

    def chunk_size(self, method: Method, replicas: int) -> int:
        """How many runs to train together, so that all chunks are equal and fit into the memory.

        Args:
          method: the method.
          replicas: number of its runs.

        Returns:
          The size of a chunk.
        """
        if self.alone(method):
            return 1
        most = max(1, int(self.memory // self.replica_bytes(method)))
        most = min(replicas, most, self.max_replicas or replicas)
        return math.ceil(replicas / math.ceil(replicas / most))

    def step(self, method: Method, batched: bool) -> Callable[..., Any]:
        """The compiled training step, with one program per `refresh`.

        Args:
          method: the method.
          batched: whether it steps many runs together, rather than one.

        Returns:
          A function of rates, state, rows of the batch and of the curvature batch, inputs, labels
          and ``refresh``, which returns the new state and the losses.
        """
        key = (method.name, batched)
        if key not in self._steps:

            def one(
                learning_rate: Any,
                state: Any,
                index: Any,
                curvature: Any,
                x: Any,
                y: Any,
                refresh: Any,
            ) -> Any:
                tracked = {"x": x[curvature], "y": y[curvature]} if method.refresh_every else None

                def of_worker(state: Any, index: Any) -> Any:
                    return train_step(
                        self.build(method, learning_rate),
                        self.loss,
                        state,
                        {"x": x[index], "y": y[index]},
                        tracked,
                        refresh=refresh,
                        axis_name=WORKERS if method.per_worker else None,
                        options=StepOptions(per_worker=method.per_worker),
                    )

                if not method.per_worker:
                    return of_worker(state, index)
                rows = index.reshape(self.plan.workers, -1)
                state, metrics = jax.vmap(of_worker, axis_name=WORKERS)(state, rows)
                return state, {"loss": metrics["loss"][0]}  # which is a mean over the workers

            def step(
                rates: Any, state: Any, index: Any, curvature: Any, x: Any, y: Any, refresh: Any
            ) -> tuple[Any, jax.Array]:
                run = functools.partial(one, refresh=refresh)
                if batched:
                    run = jax.vmap(run, in_axes=(0, 0, 0, 0, None, None))
                state, metrics = run(rates, state, index, curvature, x, y)
                return state, metrics["loss"]

            self._steps[key] = jax.jit(step, static_argnames="refresh", donate_argnames="state")
        return self._steps[key]

    def start(self, method: Method, replicas: Sequence[Replica]) -> Runs:
        """Runs before their first step.

        Args:
          method: the method.
          replicas: (learning rate, seed) of each run.

        Returns:
          The runs.
        """
        batched = len(replicas) > 1
        rates = jnp.asarray([rate for rate, _ in replicas], jnp.float32)
        numbers = [self.seeds.index(seed) for _, seed in replicas]
        states = [
            self._init_state(method, rates[i], seed, number)
            for i, ((_, seed), number) in enumerate(zip(replicas, numbers, strict=True))
        ]
        # Copies in any case: the step donates its state, and the next method needs the weights too.
        stack = jnp.stack if batched else lambda leaves: jnp.copy(leaves[0])
        state = jax.tree.map(lambda *leaves: stack(leaves), *states)
        pick = np.array(numbers) if batched else numbers[0]
        return Runs(self, method, batched, rates if batched else rates[0], state, pick)

    def _init_state(self, method: Method, rate: jax.Array, seed: int, number: int) -> Any:
        """The state of a run with the initial weights of this number, one copy for each worker."""
        state = init_state(self.build(method, rate, seed), *self.weights[number])
        if not method.per_worker:
            return state
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * self.plan.workers), state)

    def evaluate(self, runs: Runs, split: str) -> dict[str, np.ndarray]:
        """Loss and accuracy of each run on the whole "validation" or "test" split."""
        sums: dict[str, Any] = {}
        evaluated = runs.state.params, runs.state.rest
        if find_schedule_free(runs.state.opt_state) is not None:
            evaluated = self._average[runs.batched](runs.state)
        if runs.method.per_worker:
            evaluated = self._consensus[runs.batched](evaluated)
        for batch in self.held_out[split]:
            size = len(batch["y"])
            result = self._evaluate[runs.batched](*evaluated, batch)
            for name, value in result.items():
                sums[name] = sums.get(name, 0.0) + size * np.atleast_1d(value).astype(np.float64)
        examples = sum(len(batch["y"]) for batch in self.held_out[split])
        counted = sums.pop("counted", examples)
        return {f"{split}_{name}": value / counted for name, value in sums.items()}

    def work(self, method: Method, replicas: int) -> float:
        """What `experiments.progress` counts for runs of a method: mini-batch gradients."""
        return replicas * float(self.gradient_evaluations(method)[-1])

    def train(self, method: Method, replicas: Sequence[Replica]) -> list[Record]:
        """Trains runs together from start to end, and tells `experiments.progress` how far it is.

        Args:
          method: the method.
          replicas: (learning rate, seed) of each run.

        Returns:
          One record per run and evaluation; the last of each run has the test results, and with
          `Plan.equal_gradients` the one at `equal_step`, too. Values that are not finite are None.
        """
        plan, work = self.plan, self.work(method, len(replicas)) / self.plan.steps
        equal = self.equal_step(method) if plan.equal_gradients else plan.steps
        runs = self.start(method, replicas)
        records: list[Record] = []
        losses: list[np.ndarray] = []  # of the steps since the last evaluation
        queue: list[jax.Array] = []  # those of them that nobody has waited for yet
        for done in range(plan.steps + 1):
            last = done == plan.steps
            point = last or done % plan.eval_every == 0
            if point or len(queue) == FETCH_EVERY:
                losses += [np.atleast_1d(loss) for loss in queue]
                progress.advance(len(queue) * work)
                progress.tell(f"{method.name}: step {done} of {plan.steps}")
                queue = []
            if point:
                values = self.evaluate(runs, "validation")
                if last or done == equal:
                    values |= self.evaluate(runs, "test")
                if losses:
                    with np.errstate(all="ignore"):  # sums of diverged losses
                        values["train_loss"] = np.stack(losses).mean(axis=0, dtype=np.float64)
                for i, (rate, seed) in enumerate(replicas):
                    records.append(
                        {
                            "method": method.name,
                            "learning_rate": rate,
                            "seed": seed,
                            "step": done,
                            "gradient_evaluations": number(runs.gradient_evaluations, 7),
                            **{name: number(value[i], 7) for name, value in values.items()},
                        }
                    )
                losses = []
            if not last:
                queue.append(runs.advance(done))
        return records


@dataclasses.dataclass
class Runs:
    """Runs in progress.

    Attributes:
      trainer: what trains them.
      method: how they are trained.
      batched: whether they are many, with a leading axis in every array, rather than one.
      rates: their learning rates.
      state: their training state.
      seeds: the number of the seed among those of the plan, or one number per run.
      gradient_evaluations: what the steps of each run have cost so far, in mini-batch gradients.
    """

    trainer: Trainer
    method: Method
    batched: bool
    rates: jax.Array
    state: Any
    seeds: Any
    gradient_evaluations: float = 0.0

    def __post_init__(self) -> None:
        self._refresh_at = self.method.schedule(
            cold_start=self.trainer.cold_start, steps_per_epoch=self.trainer.steps_per_epoch
        )

    def advance(self, step: int) -> jax.Array:
        """Makes one step of every run.

        Args:
          step: zero-based number of the step.

        Returns:
          The losses, which are not waited for.
        """
        trainer, name = self.trainer, self.method.name
        refresh = self._refresh_at(step, self.state)
        if (name, self.batched, refresh) not in trainer.called:
            trainer.called.add((name, self.batched, refresh))
            progress.tell(f"{name}: compiling")
        self.state, loss = trainer.step(self.method, self.batched)(
            self.rates,
            self.state,
            trainer.order[self.seeds, step % trainer.plan.steps],
            trainer.curvature[self.seeds],
            trainer.train_x,
            trainer.train_y,
            refresh=refresh,
        )
        products = trainer.step_products(self.method, refresh)
        if refresh != "sample":
            self.gradient_evaluations += trainer.step_cost(self.method, products)
        if refresh == "cold":
            progress.tell(f"{name}: finding the subspace ({products} products)")
        return loss
