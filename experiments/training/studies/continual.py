"""Continual learning of pruned networks: five tasks of two classes each, one after the other.

A perceptron with a hidden part for all tasks, the trunk, and one output layer of two classes for
each. After each task the entries of the trunk with the smallest magnitudes, a share of each matrix,
are set to zero, with or without steps of that task after it in which they stay there. The next task
trains all entries again, those that were zero included; after the last one the sparsity is that of
the setting. Every task takes equally many steps, those after the pruning included, and starts the
optimizer anew: SGD with momentum, whose rate falls linearly to zero.

A task's batches are drawn from all of its examples, or, after a share of the steps, from a quarter
of them: a random one, or the one with the largest errors of the predicted probabilities (EL2N) of
the network as it is then.

References:
  Paul et al., `Deep learning on a data diet <https://arxiv.org/abs/2107.07075>`_, 2021: EL2N.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_accel as oa
from experiments import data, timing
from experiments.training.replicas import Replica

PyTree = Any
TASKS, CLASSES = 5, 2
MOMENTUM = 0.9
RETRAINED = 0.25  # share of a task's steps that come after its pruning, where any do
WARM_UP = 0.1  # share of a task's steps before its examples are chosen, where they are


def init(seed: int, sizes: Sequence[int]) -> PyTree:
    """Parameters of the perceptron: uniform within ±1/sqrt(fan in).

    Args:
      seed: of the draw.
      sizes: numbers of inputs and of the units of each hidden layer.

    Returns:
      ``{"trunk": [...], "heads": ...}`` of kernels and biases.
    """
    rng = np.random.default_rng(seed)

    def layer(fan_in: int, fan_out: int) -> dict[str, jax.Array]:
        bound = fan_in**-0.5
        draw = functools.partial(rng.uniform, -bound, bound)
        shapes = {"kernel": (fan_in, fan_out), "bias": (fan_out,)}
        return {name: jnp.asarray(draw(shape), jnp.float32) for name, shape in shapes.items()}

    trunk = [layer(*pair) for pair in itertools.pairwise(sizes)]
    return {"trunk": trunk, "heads": layer(sizes[-1], TASKS * CLASSES)}


def logits(params: PyTree, x: jax.Array) -> jax.Array:
    """Outputs of all heads, (examples, tasks, 2).

    Args:
      params: parameters as `init` makes them.
      x: inputs, (examples, features).
    """
    for layer in params["trunk"]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    outputs = x @ params["heads"]["kernel"] + params["heads"]["bias"][None]
    return outputs.reshape(-1, TASKS, CLASSES)


def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross entropy of a batch, each example by the head of its own task.

    Args:
      params: parameters as `init` makes them.
      x: inputs, (examples, features).
      y: classes from 0 to 9, of which those of a task follow each other.
    """
    own = jnp.take_along_axis(logits(params, x), (y // CLASSES)[:, None, None], axis=1)[:, 0]
    return optax.softmax_cross_entropy_with_integer_labels(own, y % CLASSES).mean()


def matrices_of_trunk(params: PyTree) -> PyTree:
    """The tensors that are pruned.

    Args:
      params: parameters as `init` makes them.

    Returns:
      Booleans, one for each tensor.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and path[0].key == "trunk", params
    )


class Runner:
    """Learns the five tasks of one setting, see `protocol_runs.Runner`.

    Args:
      setting: ``task`` (of images of ten classes), ``hidden_sizes``, ``steps`` of each task,
        ``batch_size`` and ``sparsity``.
      data_dir: folder with the data files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        self.setting = setting
        self.task = data.load_task(setting["task"], data_dir=data_dir)
        y = self.task.train.y
        rows = [np.flatnonzero(y // CLASSES == task) for task in range(TASKS)]
        self.counts = np.array([len(each) for each in rows], np.int32)
        # Padded by examples of the same task; the number of them says which are.
        self.rows = np.stack([np.resize(each, self.counts.max()) for each in rows]).astype(np.int32)
        self._programs: dict[str, Callable[..., Any]] = {}

    def config(self) -> dict[str, Any]:
        """Checksums of the data."""
        return {"data": self.task.checksums}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps, twice where the gradient is taken at a perturbed point as well."""
        return float(TASKS * self.setting["steps"] * (2 if options["rule"] != "plain" else 1))

    def seconds(self) -> float:
        """Seconds of a gradient of one run."""
        gradient = jax.jit(jax.grad(loss))
        size = self.setting["batch_size"]
        x, y = (jnp.asarray(each[:size]) for each in self._flat("train"))
        call = functools.partial(gradient, self._start(0), x, y)
        timing.timed(call)
        return min(timing.timed(call)[1] for _ in range(5))

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> list[dict[str, Any]]:
        """Trains all runs in one program; see `protocol_runs.Runner`."""
        parts = [self._start(seed) for _, seed in runs]
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        rates = jnp.asarray([rate for rate, _ in runs], jnp.float32)
        shape = (TASKS, self.setting["steps"], self.setting["batch_size"])
        draws = [np.random.default_rng(seed).random(shape, np.float32) for _, seed in runs]
        found = self._program(options)(params, rates, np.stack(draws))
        return [
            self._scores({name: value[number] for name, value in found.items()})
            for number in range(len(runs))
        ]

    def _flat(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        part = getattr(self.task, split)
        return part.x.reshape(len(part.y), -1), part.y

    def _start(self, seed: int) -> PyTree:
        features = int(np.prod(self.task.input_shape))
        return init(seed, (features, *self.setting["hidden_sizes"]))

    def _program(self, options: Mapping[str, Any]) -> Callable[..., dict[str, Any]]:
        name = json.dumps(dict(options))
        if name not in self._programs:
            # One after the other: `vmap` would choose the entries to prune anew at every step.
            learn = functools.partial(self._learn, dict(options))
            self._programs[name] = jax.jit(lambda *runs: lax.map(lambda run: learn(*run), runs))
        return self._programs[name]

    def _learn(
        self, options: Mapping[str, Any], params: PyTree, rate: Any, draws: jax.Array
    ) -> dict[str, Any]:
        """All tasks of one run, one after the other; accuracies after each of them."""
        rows, counts = jnp.asarray(self.rows), jnp.asarray(self.counts)

        def learn_one(params: PyTree, task: Any) -> tuple[PyTree, dict[str, Any]]:
            params, grown = self._learn_task(options, params, rate, *task)
            return params, {
                **grown,
                "validation": self._accuracies(params, "validation"),
                "test": self._accuracies(params, "test"),
            }

        params, found = lax.scan(learn_one, params, (draws, rows, counts))
        entries = [layer["kernel"] for layer in params["trunk"]]
        zeros = sum(jnp.sum(kernel == 0) for kernel in entries)
        return {**found, "sparsity": zeros / sum(kernel.size for kernel in entries)}

    def _learn_task(
        self,
        options: Mapping[str, Any],
        params: PyTree,
        rate: Any,
        draws: jax.Array,
        rows: jax.Array,
        count: jax.Array,
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """One task and its pruning; what the pruning adds to the loss, predicted and real."""
        x, y = map(jnp.asarray, self._flat("train"))
        steps = self.setting["steps"]
        last = round((1 - RETRAINED) * steps) if options.get("retrained") else steps
        choice = options.get("examples", "all")
        first = 0 if choice == "all" else round(WARM_UP * steps)
        schedule = optax.linear_schedule(rate, 0.0, steps)
        tx = transformation(options, schedule, self.setting["sparsity"], steps)

        def steps_with(gone: PyTree | None, pool: jax.Array, size: Any) -> Any:
            def step(carry: tuple[PyTree, PyTree], draw: jax.Array) -> tuple[Any, None]:
                params, state = carry
                batch = pool[(draw * size).astype(jnp.int32)]
                objective = functools.partial(loss, x=x[batch], y=y[batch])
                gradients = jax.grad(objective)(params)
                updates, state = tx.update(gradients, state, params, value_fn=objective)
                params = optax.apply_updates(params, updates)
                return (params if gone is None else _without(params, gone), state), None

            return step

        carry, _ = lax.scan(steps_with(None, rows, count), (params, tx.init(params)), draws[:first])
        pool, size = self._choose(choice, carry[0], x, y, rows, count)
        carry, _ = lax.scan(steps_with(None, pool, size), carry, draws[first:last])
        params, state = carry
        sparsity = self.setting["sparsity"]
        gone = oa.smallest_entries(params, sparsity, mask=matrices_of_trunk)
        pruned = _without(params, gone)
        objective = functools.partial(loss, x=x[rows], y=y[rows])
        grown = {
            "predicted": oa.predicted_increase(objective, params, gone),
            "real": objective(pruned) - objective(params),
        }
        (params, _), _ = lax.scan(steps_with(gone, pool, size), (pruned, state), draws[last:])
        return params, grown

    def _choose(
        self, choice: str, params: PyTree, x: jax.Array, y: jax.Array, rows: jax.Array, count: Any
    ) -> tuple[jax.Array, Any]:
        """The examples that the rest of a task is drawn from, and their number."""
        if choice == "all":
            return rows, count
        quarter = int(self.counts.min()) // 4
        if choice == "random":  # the examples of a task are in a random order
            return rows[:quarter], quarter
        outputs = logits(params, x[rows])
        own = jnp.take_along_axis(outputs, (y[rows] // CLASSES)[:, None, None], axis=1)[:, 0]
        scores = oa.el2n_scores(own, y[rows] % CLASSES)
        scores = jnp.where(jnp.arange(len(rows)) < count, scores, -1.0)  # without the padding
        return rows[jnp.argsort(-scores)[:quarter]], quarter

    def _accuracies(self, params: PyTree, split: str) -> jax.Array:
        """Of each task, of which the examples are told."""
        x, y = map(jnp.asarray, self._flat(split))
        own = jnp.take_along_axis(logits(params, x), (y // CLASSES)[:, None, None], axis=1)[:, 0]
        right = jnp.argmax(own, axis=-1) == y % CLASSES
        of_task = y[:, None] // CLASSES == jnp.arange(TASKS)[None]
        return jnp.sum(right[:, None] & of_task, axis=0) / jnp.sum(of_task, axis=0)

    def _scores(self, found: Mapping[str, jax.Array]) -> dict[str, Any]:
        test = np.asarray(found["test"], np.float64)  # (after this task, of this task)
        learned = np.diagonal(test)
        finite = bool(jnp.isfinite(found["real"]).all())
        nan = float("nan")
        return {
            "validation": 1.0 - float(found["validation"][-1].mean()) if finite else nan,
            "error": 1.0 - float(test[-1].mean()) if finite else nan,
            "forgetting": float((learned - test[-1])[:-1].mean()) if finite else nan,
            "sparsity": float(found["sparsity"]),
            "predicted_increase": [float(value) for value in found["predicted"]],
            "real_increase": [float(value) for value in found["real"]],
        }


def _without(params: PyTree, gone: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, out: jnp.where(out, 0, leaf), params, gone)


def transformation(
    options: Mapping[str, Any], schedule: optax.Schedule, sparsity: float, steps: int
) -> optax.GradientTransformationExtraArgs:
    """How a contestant steps.

    Args:
      options: ``rule``: ``"plain"``, ``"sam"`` or ``"directed"``, of which the last two have
        ``rho``.
      schedule: the learning rate.
      sparsity: share of the entries that the coming pruning takes.
      steps: number of steps before it.

    Returns:
      The transformation.
    """
    sgd = optax.sgd(schedule, MOMENTUM)
    if options["rule"] == "sam":
        return oa.gnp(sgd, rho=options["rho"], alpha=1.0)
    if options["rule"] == "directed":
        return oa.sharpness_directed(
            sgd,
            options["rho"],
            sparsity=sparsity,
            prune_step=steps + 1,  # the runner prunes, all contestants alike
            refresh_every=10,
            mask=matrices_of_trunk,
        )
    assert options["rule"] == "plain"
    return optax.with_extra_args_support(sgd)
