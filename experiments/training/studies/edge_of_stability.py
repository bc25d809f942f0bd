"""Full-batch training, the curvature along it, and optimizers against their flows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

import models
import optax_accel as oa
from experiments import data
from experiments.training import networks
from experiments.training.losses import find_loss
from experiments.training.replicas import Replica
from experiments.training.studies import central_flow
from experiments.training.studies.image_runs import seconds_of
from optax_accel import curvature
from optax_accel.curvature import blocks

PyTree = Any
Curves = dict[str, list[float]]

TRACKED = 6  # directions of the block iteration; those behind the first let it converge
_SWEEPS = 2  # in every reading
_FIRST_SWEEPS = 40  # before the first one
_POINTS = 60  # of a curve that is kept
_WINDOW = 40  # steps of a moving average, even: oscillations of period two cancel
_WARM = 10  # flows begin after this part of a run: see `Runner`

OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": optax.sgd,
    "adam": optax.adam,
    "rmsprop": optax.rmsprop,
    "muon": optax.contrib.muon,
    "bulk_sgd": oa.bulk_sgd,
}
# By what the gradient is divided, and the edge: of the others that of SGD. Muon makes all singular
# values of its momentum equal: what multiplies the gradient changes with it, and there is no edge
# to compare with, so that 2 / learning rate is no more than a scale.
PRECONDITIONERS: Mapping[str, Callable[..., curvature.Preconditioner]] = {
    "adam": curvature.adam_preconditioner,
    "rmsprop": curvature.rmsprop_preconditioner,
}


class Tracked(NamedTuple):
    """The leading eigenvectors of a matrix, as a block iteration has them.

    Attributes:
      basis: an orthonormal block, leaves ``(TRACKED, *shape)``.
      shift: what is added to the spectrum so that its top leads.
    """

    basis: PyTree
    shift: jax.Array


class Reading(NamedTuple):
    """What is read at a step.

    Attributes:
      sharpness: the largest eigenvalue of the Hessian.
      effective: that of the preconditioned Hessian; of an optimizer without preconditioner the
        sharpness.
      bend: the curvature along the update d, ``d^T H d``.
    """

    sharpness: jax.Array
    effective: jax.Array
    bend: jax.Array


class Course(NamedTuple):
    """A run, as arrays.

    Attributes:
      losses: before each step, (steps,).
      slopes: of the loss along each update, (steps,).
      readings: a `Reading` of arrays, (readings,).
      iterates: the parameters before each step, (steps, dimension), or nothing where no flow is
        compared with them.
      moments: first and second moment, each (dimension,), and the number of gradients in them,
        where the flows begin; nothing where the optimizer has no second moment.
    """

    losses: np.ndarray
    slopes: np.ndarray
    readings: Reading
    iterates: np.ndarray | None
    moments: tuple[jax.Array, jax.Array, jax.Array] | None = None


class Runner:
    """Trains networks on all of a small training set, see `protocol_runs.Runner`.

    The flows begin after a tenth of a run, at the same weights and moments: the first large steps
    leave every flow behind, and an adaptive optimizer is far above its threshold before its second
    moment has grown (the authors' program does the same by its option ``--warm-start``).

    Args:
      setting: ``task``, ``model`` and ``model_options``, ``loss``, ``examples`` (the first ones of
        the training split), ``steps``, ``every``, the steps between readings of the curvature,
        ``directions`` of Bulk-SGD, ``unstable`` directions of the central flows, and for texts
        ``length`` of the windows.
      data_dir: folder with the data files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        del folder
        self.setting = setting
        self.task = data.load_task(setting["task"], data_dir=data_dir)
        examples = setting["examples"]
        self.x, self.y = (part[:examples] for part in (self.task.train.x, self.task.train.y))
        if self.task.vocabulary_size:
            self.x, self.y = (part[:, : setting["length"]] for part in (self.x, self.y))
        else:
            deviation = max(float(self.x.std()), 1e-6)
            self.x = ((self.x - self.x.mean()) / deviation).astype(np.float32)
        self._graphdef, self._start, self._rest = self.network(0)
        loss = find_loss(setting["loss"])

        def predict(params: PyTree) -> Any:
            return nnx.merge(self._graphdef, params, self._rest, copy=True)(jnp.asarray(self.x))

        self.objective = oa.Objective(predict, lambda out: loss(out, jnp.asarray(self.y)))
        self._unravel = ravel_pytree(self._start)[1]
        self._readers: list[Callable[..., Any]] = []
        # A multiple of the period of the readings, at least one step.
        self.warm = max(1, setting["steps"] // _WARM // setting["every"]) * setting["every"]
        self._basis = jax.jit(lambda key: blocks.random_basis(key, self._start, TRACKED))

    def config(self) -> dict[str, Any]:
        """Checksums of the data."""
        return {"data": self.task.checksums}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of gradients, products with the Hessian counted as two."""
        readings = self.setting["steps"] // self.setting["every"]
        products = TRACKED * _SWEEPS * (2 if options["optimizer"] != "sgd" else 1)
        # Of the central flow, twice in a step: products, and four gradients for each pair.
        unstable = self.setting["unstable"]
        flow = 2 * unstable * (3 + 2 * unstable) * self.setting["steps"] * bool(options.get("flow"))
        return float(self.setting["steps"] + 2 * products * readings + flow)

    def seconds(self) -> float:
        """Seconds of a gradient."""
        gradient = jax.jit(self.objective.grad)
        return seconds_of(functools.partial(gradient, self._start))

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other; see `protocol_runs.Runner`."""
        programs: dict[float, _Program] = {}
        for rate, seed in runs:
            program = programs.setdefault(rate, _Program(self, options, rate))
            course = program.train(seed)
            ratios = np.asarray(course.readings.effective) / program.threshold
            scores = scores_of(course, ratios, rate, self.setting["every"])
            if course.iterates is not None:
                scores |= self._flows(course, rule_of(options, rate), ratios)
            yield scores | {"validation": scores["loss"]}

    def network(self, seed: int) -> tuple[Any, PyTree, PyTree]:
        """The network with the weights of a seed: static part, parameters, other variables.

        Args:
          seed: of the weights.
        """
        is_text = bool(self.task.vocabulary_size)
        sizes = (
            {"vocabulary_size": self.task.vocabulary_size}
            if is_text
            else {"num_classes": self.task.num_classes}
        )
        model = models.create(
            self.setting["model"],
            input_shape=self.x.shape[1:],
            rngs=seed,
            **sizes,
            **self.setting["model_options"],
        )
        return networks.split(model)

    def reader(self, preconditioner: curvature.Preconditioner | None) -> Callable[..., Any]:
        """The compiled `read` of this preconditioner; without one it is compiled once.

        Args:
          preconditioner: of the optimizer, or None.
        """
        if preconditioner is None and self._readers:
            return self._readers[0]
        made = jax.jit(functools.partial(read, self.objective, preconditioner))
        if preconditioner is None:
            self._readers.append(made)
        return made

    def basis(self, seed: int) -> PyTree:
        """A random orthonormal block, from which eigenvectors are found.

        Args:
          seed: of the random numbers.
        """
        block: PyTree = self._basis(jax.random.key(seed))
        return block

    def flat_loss(self, vector: jax.Array) -> jax.Array:
        """The training loss of all parameters as one vector.

        Args:
          vector: the parameters, (dimension,).
        """
        return self.objective(self._unravel(vector))

    def _flows(self, course: Course, rule: central_flow.Rule, ratios: np.ndarray) -> dict[str, Any]:
        """Time averages of an optimizer against its central and its stable flow."""
        assert course.iterates is not None
        first, every = self.warm, self.setting["every"]
        edge = edge_of(ratios[first // every :]) * every
        mean, _ = midpoints(course.iterates[first - 1 :])
        steps = len(mean)
        where = (self.flat_loss, rule, jnp.asarray(mean[0]), course.moments)
        flow = central_flow.central_flow(*where, steps=steps, unstable=self.setting["unstable"])
        smooth = central_flow.stable_flow(*where, steps=steps)
        losses = jax.lax.map(self.flat_loss, smooth)
        return flow_scores(
            course.iterates[first - 1 :],
            course.losses[first:-1],
            jax.tree.map(np.asarray, flow),
            np.asarray(smooth),
            np.asarray(losses),
            first=first,
            edge=edge,
        )


class _Program:
    """The compiled functions of one contestant at one rate."""

    def __init__(self, runner: Runner, options: Mapping[str, Any], rate: float):
        self._runner = runner
        settings = dict(options)
        self._keeps = settings.pop("flow", False)
        name = settings.pop("optimizer")
        make = PRECONDITIONERS.get(name, curvature.sgd_preconditioner)
        preconditioner = make(**settings)
        self.threshold = float(preconditioner.threshold(rate))
        self._is_plain = name not in PRECONDITIONERS
        self._read = runner.reader(None if self._is_plain else preconditioner)
        if name == "bulk_sgd":
            settings["num_directions"] = runner.setting["directions"]
        self._tx = optax.with_extra_args_support(OPTIMIZERS[name](rate, **settings))
        self._step = jax.jit(self._one_step, static_argnames="refresh")

    def train(self, seed: int) -> Course:
        """Trains one run and reads along it.

        Args:
          seed: of the first weights.
        """
        setting = self._runner.setting
        params = self._runner.network(seed)[1]
        state = jax.jit(self._tx.init)(params)
        start = Tracked(self._runner.basis(seed), jnp.zeros(()))
        tracked = (start,) * (1 if self._is_plain else 2)
        losses, slopes, readings, iterates, moments = [], [], [], [], None
        for number in range(setting["steps"]):
            refresh = oa.refresh_at(number, self._tx)
            before = params
            if self._keeps:
                iterates.append(ravel_pytree(before)[0])
            params, state, updates, loss, slope = self._step(before, state, refresh=refresh)
            if self._keeps and number == self._runner.warm:
                moments = moments_of(state)
            losses.append(loss)
            slopes.append(slope)
            if number % setting["every"] == 0:
                applied = () if self._is_plain else state
                for _ in range(1 if number else _FIRST_SWEEPS // _SWEEPS):
                    reading, tracked = self._read(before, applied, updates, tracked)
                readings.append(jax.device_get(reading))  # waits, so that no queue builds up
        return Course(
            losses=np.asarray(jnp.stack(losses)),
            slopes=np.asarray(jnp.stack(slopes)),
            readings=jax.tree.map(lambda *leaves: np.stack(leaves), *readings),
            iterates=np.asarray(jnp.stack(iterates)) if iterates else None,
            moments=moments,
        )

    def _one_step(self, params: PyTree, state: PyTree, *, refresh: Any) -> tuple[Any, ...]:
        objective = self._runner.objective
        loss, gradient = objective.value_and_grad(params)
        updates, state = self._tx.update(
            gradient, state, params, value_fn=objective, refresh=refresh
        )
        slope = optax.tree.vdot(gradient, updates)
        return optax.apply_updates(params, updates), state, updates, loss, slope


def read(
    objective: oa.Objective,
    preconditioner: curvature.Preconditioner | None,
    params: PyTree,
    state: PyTree,
    updates: PyTree,
    tracked: tuple[Tracked, ...],
) -> tuple[Reading, tuple[Tracked, ...]]:
    """Reads the curvature at a step.

    Args:
      objective: the loss.
      preconditioner: of the optimizer; None for one that has none, or a multiple of the identity.
      params: the parameters before the step.
      state: that of the optimizer after the step, whose preconditioner it applied.
      updates: the step.
      tracked: eigenvectors of the Hessian, and where there is a preconditioner of the
        preconditioned Hessian.

    Returns:
      The reading, and the eigenvectors to start from at the next one.
    """
    hessian = curvature.hessian(objective, params)
    operators = [hessian]
    if preconditioner is not None:
        diagonal = preconditioner.diagonal(state, params)
        own = cast("curvature.CurvatureOperator", curvature.preconditioned(hessian, diagonal))
        operators.append(own)
    found = [_sweep(op, each) for op, each in zip(operators, tracked, strict=True)]
    tops = [values[0] for values, _ in found]
    bend = optax.tree.vdot(updates, hessian(updates))
    return Reading(tops[0], tops[-1], bend), tuple(each for _, each in found)


def _sweep(operator: curvature.CurvatureOperator, tracked: Tracked) -> tuple[jax.Array, Tracked]:
    """Eigenvalues in a basis, which some sweeps of block iteration have improved before."""
    for _ in range(_SWEEPS):
        values, basis, smallest = curvature.subspace_sweep(
            operator.block, tracked.basis, shift=tracked.shift
        )
        tracked = Tracked(basis, jnp.maximum(0.9 * tracked.shift, -smallest))
    return values, tracked


def edge_of(ratios: np.ndarray) -> int:
    """The reading from which a run counts as at the edge of stability.

    Args:
      ratios: sharpness over its threshold at each reading.

    Returns:
      The number of the first one of at least 1, or that at three quarters of the run.
    """
    above = np.flatnonzero(ratios >= 1)
    return int(above[0]) if above.size else len(ratios) * 3 // 4


def scores_of(course: Course, ratios: np.ndarray, rate: float, every: int) -> dict[str, Any]:
    """The measures of a run, and its curves.

    Args:
      course: the run.
      ratios: sharpness, preconditioned, over its threshold at each reading.
      rate: the learning rate.
      every: steps between readings.

    Returns:
      Scores by their names in the study.
    """
    first = edge_of(ratios)
    late = slice((first + len(ratios)) // 2, None)
    sharpness = np.asarray(course.readings.sharpness)
    raw = sharpness * rate / 2
    losses, at_edge = course.losses, course.losses[first * every :]
    half = len(ratios) // 2
    bend = course.readings.bend[half:].sum() / 2
    promised = -course.slopes[::every][half:].sum()
    return {
        "loss": _ends(losses)[1],
        "progress": float(np.log10(_ends(losses)[1] / losses[0])),
        "start": float(ratios[0]) if (ratios >= 1).any() else float("nan"),
        "hover": float(np.median(ratios[late])),
        "raw": float(np.median(raw[late])),
        "growth": _growth(sharpness[first:]),
        "balance": float(bend / promised),
        "short": float(np.mean(np.diff(at_edge) > 0)) if len(at_edge) > 1 else float("nan"),
        "long": _growth(at_edge),
        "steps of curves": thinned(np.arange(len(ratios)) * every),
        "loss along the run": thinned(losses[::every][: len(ratios)]),
        "ratio along the run": thinned(ratios),
        "raw ratio along the run": thinned(raw),
    }


def rule_of(options: Mapping[str, Any], rate: float) -> central_flow.Rule:
    """The rule that the flows of a contestant integrate.

    Args:
      options: of the contestant: gradient descent, RMSprop or Adam, as Optax has them.
      rate: its learning rate.

    Returns:
      The rule.
    """
    if options["optimizer"] == "adam":
        return central_flow.Rule(
            learning_rate=rate, b1=options["b1"], b2=options["b2"], corrects=True
        )
    return central_flow.Rule(learning_rate=rate, b2=options.get("decay"))


def moments_of(state: PyTree) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """The moments of RMSprop or Adam, as vectors, and the number of gradients in them.

    Args:
      state: of the optimizer.

    Returns:
      First moment, second moment, number; nothing where there is no second moment. The first
      moment is zero, and the number too, where the state has none.
    """
    square = optax.tree.get(state, "nu")
    if square is None:
        return None
    square = ravel_pytree(square)[0]
    mean = optax.tree.get(state, "mu")
    mean = jnp.zeros_like(square) if mean is None else ravel_pytree(mean)[0]
    return mean, square, jnp.asarray(optax.tree.get(state, "count", 0), square.dtype)


def midpoints(iterates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Second-order midpoints, and the oscillation around them (Cohen et al., 2025, their program).

    >>> mean, oscillation = midpoints(np.array([[1.0], [-1.0], [1.0], [-1.0]]) + 5)
    >>> mean.ravel().tolist(), oscillation.ravel().tolist()
    ([5.0, 5.0], [-1.0, 1.0])

    Args:
      iterates: (steps, dimension).

    Returns:
      Of all iterates but the first and the last the mean of the two means with their neighbors, in
      which an oscillation of period two cancels and a straight path stays, and what is left.
    """
    mean = (iterates[:-2] + 2 * iterates[1:-1] + iterates[2:]) / 4
    return mean, iterates[1:-1] - mean


def flow_scores(
    iterates: np.ndarray,
    losses: np.ndarray,
    flow: central_flow.FlowReading,
    smooth: np.ndarray,
    smooth_losses: np.ndarray,
    *,
    first: int,
    edge: int,
) -> dict[str, Any]:
    """Measures of how well flows describe the time averages of an optimizer, and its curves.

    Args:
      iterates: of the optimizer, (steps + 2, dimension), from one before the flows begin to one
        after they end.
      losses: at all of them but the first and the last, (steps,).
      flow: what was read along the central flow, with the times 0, 1, ... on the leading axis.
      smooth: the stable flow at these times, (steps, dimension).
      smooth_losses: the loss there, (steps,).
      first: the step at which the flows begin.
      edge: steps from there to the first one at the edge of stability.

    Returns:
      Scores by their names in the study.
    """
    mean, oscillation = midpoints(iterates)
    distances = {
        name: moving_average(np.linalg.norm(mean - np.asarray(path), axis=-1))
        for name, path in (("central", flow.params), ("stable", smooth))
    }
    loss, predicted = moving_average(losses), moving_average(np.asarray(flow.predicted_loss))
    spread = moving_average(np.sum(oscillation**2, axis=-1))
    variance = moving_average(np.asarray(flow.variance))
    # An average belongs to the edge where all that it averages does.
    at_edge = slice(min(edge, len(loss) - 1), None)
    central, stable = (distances[name][at_edge].mean() for name in ("central", "stable"))
    return {
        "flow_distance": float(central / stable),
        "flow_loss": float(np.median(np.abs(predicted - loss)[at_edge] / loss[at_edge])),
        "flow_variance": float(variance[at_edge].mean() / spread[at_edge].mean()),
        "steps of flows": thinned(np.arange(len(loss)) + first + min(_WINDOW, len(losses)) // 2),
        "loss, averaged": thinned(loss),
        "loss, predicted": thinned(predicted),
        "loss of the central flow": thinned(moving_average(np.asarray(flow.loss))),
        "loss of the stable flow": thinned(moving_average(smooth_losses)),
        "distance from the central flow": thinned(distances["central"]),
        "distance from the stable flow": thinned(distances["stable"]),
        "variance, measured": thinned(spread),
        "variance, predicted": thinned(variance),
        "ratio of the central flow": thinned(moving_average(np.asarray(flow.ratio))),
    }


def moving_average(values: np.ndarray) -> np.ndarray:
    """Means of `_WINDOW` values that follow each other, in float64.

    >>> moving_average(np.arange(42.0)).tolist()
    [19.5, 20.5, 21.5]

    Args:
      values: (steps, ...).

    Returns:
      (steps - `_WINDOW` + 1, ...), at least one row: shorter runs have the mean of all.
    """
    width = min(_WINDOW, len(values))
    sums = np.cumsum(np.asarray(values, np.float64), axis=0)
    sums = np.concatenate([np.zeros_like(sums[:1]), sums])
    means: np.ndarray = (sums[width:] - sums[:-width]) / width
    return means


def thinned(values: np.ndarray) -> list[float]:
    """At most `_POINTS` means of neighboring values.

    Args:
      values: a curve, (length,).
    """
    parts = np.array_split(np.asarray(values, np.float64), min(_POINTS, len(values)))
    return [float(part.mean()) for part in parts]


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Means of the first and of the last tenth."""
    tenth = max(1, len(values) // 10)
    return float(values[:tenth].mean()), float(values[-tenth:].mean())


def _growth(values: np.ndarray) -> float:
    """The mean of the last tenth over that of the first."""
    first, last = _ends(values)
    return last / first
