"""Training of equilibrium models by several gradients, and what these cost and how exact they are.

Each contestant is a network whose options say how its fixed point is found and differentiated; all
of one setting have the same parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models
from experiments import data, hlo, timing
from experiments.training import networks
from experiments.training.replicas import Replica
from experiments.training.step import TrainState, init_state

PyTree = Any
CELL = "cell"  # the part of the network whose fixed point is wanted
DEPTHS = ("max_steps", "backward_steps")  # options of the network
EXACT = 4  # times the steps of the solvers in the gradient that the others are compared with
_ROUNDS = 9  # in which gradients are timed beside the implicit one
_PLAIN = {"solver": "fixed_point", "gradient": "unrolled", "tolerance": 0.0, "max_steps": 10}
_IMPLICIT: dict[str, Any] = {"gradient": "implicit"}


class Runner:
    """Trains equilibrium models on images or on a text, see `protocol_runs.Runner`.

    Args:
      setting: ``task``, ``model`` (options of the network), ``steps``, ``pretrained``,
        ``batch_size``, ``weight_decay``; for images ``examples``, the number of those of the
        training split or None; for a text ``length`` of the windows and ``held_out``, the number of
        windows of the other splits.
      data_dir: folder with the data files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        del folder
        self.setting = setting
        self.reads_text = "length" in setting
        if self.reads_text:
            self.task: Any = data.load_task(setting["task"], data_dir=data_dir)
            parts = [
                _windows(split, setting["length"], most)
                for split, most in (
                    (self.task.train, None),
                    (self.task.validation, setting["held_out"]),
                    (self.task.test, setting["held_out"]),
                )
            ]
        else:
            self.task = data.load_classification(setting["task"], data_dir=data_dir)
            pixels = self.task.train.x
            axes = tuple(range(pixels.ndim - 1))
            mean, deviation = (f(pixels, axis=axes, keepdims=True) for f in (np.mean, np.std))
            parts = [
                {"x": ((s.x - mean) / max(deviation.max(), 1e-6))[:most], "y": s.y[:most]}
                for s, most in (
                    (self.task.train, setting["examples"]),
                    (self.task.validation, None),
                    (self.task.test, None),
                )
            ]
        self.train, *others = parts
        # Equally many, so that one program evaluates both.
        fewest = min(len(part["y"]) for part in others)
        self.validation, self.test = (
            {name: array[:fewest] for name, array in part.items()} for part in others
        )
        self._programs: dict[str, _Program] = {}
        self._update = jax.jit(self._updated)

    def config(self) -> dict[str, Any]:
        """Checksums of the data."""
        return {"data": self.task.checksums}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps: each takes one gradient."""
        del options
        return float(self.setting["steps"])

    def seconds(self) -> float:
        """Seconds of an implicit gradient."""
        gradient = self.program(_IMPLICIT).compiled_gradient()
        arguments = self.program(_IMPLICIT).arguments(self.start(0), self.batch(self.order(0)[0]))
        return min(timing.timed(functools.partial(gradient, *arguments))[1] for _ in "123")

    def program(self, options: Mapping[str, Any]) -> _Program:
        """The compiled functions of a network with these options, made once."""
        name = repr(sorted(options.items()))
        if name not in self._programs:
            self._programs[name] = _Program(self, options)
        return self._programs[name]

    def start(self, seed: int) -> TrainState:
        """The state before the first step; the same for all contestants."""
        _, params, rest = self.network(_IMPLICIT, seed)
        return init_state(optimizer(self.setting, jnp.float32(0)), params, rest)

    def network(self, options: Mapping[str, Any], seed: int) -> tuple[Any, PyTree, PyTree]:
        """The network of a seed: static part, parameters, other variables."""
        chosen = dict(self.setting["model"]) | dict(options)
        model: models.EquilibriumLM | models.Mdeq
        if self.reads_text:
            model = models.EquilibriumLM(
                input_shape=(self.setting["length"],),
                vocabulary_size=self.task.vocabulary_size,
                rngs=seed,
                **chosen,
            )
        else:
            model = models.Mdeq(
                input_shape=self.task.input_shape,
                num_classes=self.task.num_classes,
                rngs=seed,
                **chosen,
            )
        return networks.split(model)

    def batch(self, rows: np.ndarray) -> dict[str, jax.Array]:
        """The examples of these numbers."""
        return {name: jnp.asarray(part[rows]) for name, part in self.train.items()}

    def order(self, seed: int) -> np.ndarray:
        """The numbers of the examples of every batch, (steps, batch size)."""
        steps, size = self.setting["steps"], self.setting["batch_size"]
        return data.index_steps(len(self.train["y"]), batch_size=size, seed=seed, steps=steps)

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other, by the same programs; see `protocol_runs.Runner`."""
        program, plain = self.program(options), self.program(_PLAIN)
        for rate, seed in runs:
            state, order = self.start(seed), self.order(seed)
            for number, rows in enumerate(order):
                chosen = plain if number < self.setting["pretrained"] else program
                gradient, rest = chosen.gradient(*chosen.arguments(state, self.batch(rows)))
                state = self._update(state, gradient, rest, jnp.float32(rate))
                if number % 16 == 0:
                    jax.block_until_ready(state.params)
            scores = {"validation": program.score(state, self.validation)}
            scores["loss" if self.reads_text else "error"] = program.score(state, self.test)
            yield scores | self._measures(options, state, self.batch(order[-1]))

    def _updated(
        self, state: TrainState, gradient: PyTree, rest: PyTree, rate: jax.Array
    ) -> TrainState:
        tx = optimizer(self.setting, rate)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, rest=rest, opt_state=opt_state)

    def _measures(
        self, options: Mapping[str, Any], state: TrainState, batch: Any
    ) -> dict[str, float]:
        """Direction, memory and time of a gradient; what is asked of the implicit one alone."""
        program, implicit = self.program(options), self.program(_IMPLICIT)
        far = {name: EXACT * self.depth(name) for name in DEPTHS}
        exact = self.program(_IMPLICIT | far | {"tolerance": 1e-6, "loop": "while"})
        own, reference = (
            _flat(each.gradient(*each.arguments(state, batch))[0][CELL])
            for each in (program, exact)
        )
        cosine = own @ reference / np.linalg.norm(own) / np.linalg.norm(reference)
        found = {
            "angle": 1 - float(cosine),
            "peak": program.memory() / 1e6,
            "time": _ratio(program, implicit, state, batch),
        }
        if program is implicit:
            near = self.program(_IMPLICIT | {"tolerance": 1e-6, "loop": "while"})
            found["growth"] = exact.memory() / near.memory()
            found["residual"] = program.residual(state, batch)
        return found

    def depth(self, name: str) -> int:
        """The number of steps of a solver.

        Args:
          name: the option of the network.
        """
        make: Any = models.EquilibriumLM if self.reads_text else models.Mdeq
        known = inspect.signature(make.__init__).parameters
        defaults = {key: parameter.default for key, parameter in known.items()}
        return int((defaults | dict(self.setting["model"]))[name])


def optimizer(setting: Mapping[str, Any], rate: Any) -> optax.GradientTransformationExtraArgs:
    """Adam with decay of the weights, at a rate that falls as a cosine.

    Args:
      setting: ``steps`` and ``weight_decay``.
      rate: the first rate.
    """
    shape = optax.cosine_decay_schedule(1.0, setting["steps"])
    return optax.with_extra_args_support(
        optax.chain(
            optax.add_decayed_weights(setting["weight_decay"]),
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(lambda count: rate * shape(count)),
        )
    )


class _Program:
    """The compiled functions of one network."""

    def __init__(self, runner: Runner, options: Mapping[str, Any]):
        self._runner = runner
        self._graphdef, _, _ = runner.network(options, 0)
        self._objective = networks.objective(self._graphdef)
        self._compiled: Any = None
        self._evaluate = jax.jit(functools.partial(networks.evaluate, self._graphdef))
        self._residual = jax.jit(self._residual_of)

    def _gradient(self, params: PyTree, rest: PyTree, batch: Any) -> tuple[PyTree, PyTree]:
        (_, rest), gradient = self._objective.value_and_grad(params, rest=rest, **batch)
        return gradient, rest

    def _residual_of(self, params: PyTree, rest: PyTree, x: jax.Array) -> jax.Array:
        model = nnx.merge(self._graphdef, params, rest, copy=True)
        model.eval()
        return model.equilibrium(x)[1].relative_residual.mean()

    @staticmethod
    def arguments(state: TrainState, batch: Any) -> tuple[PyTree, PyTree, Any]:
        """What the gradient takes."""
        return state.params, state.rest, batch

    def compiled_gradient(self) -> Callable[..., tuple[PyTree, PyTree]]:
        """The compiled gradient of the loss, which training and measures share.

        Compilation is most of the study's time where the steps of a solver are unrolled.
        """
        if self._compiled is None:
            runner = self._runner
            arguments = self.arguments(runner.start(0), runner.batch(runner.order(0)[0]))
            self._compiled = jax.jit(self._gradient).lower(*arguments).compile()
        compiled: Callable[..., tuple[PyTree, PyTree]] = self._compiled
        return compiled

    def gradient(self, *arguments: Any) -> tuple[PyTree, PyTree]:
        """The gradient of the loss of a batch, and the other variables after the pass."""
        return self.compiled_gradient()(*arguments)

    def memory(self) -> int:
        """Bytes of intermediate results that the compiler plans for a gradient."""
        return hlo.memory(self.compiled_gradient()).temp

    def residual(self, state: TrainState, batch: Any) -> float:
        """The mean relative residual of the forward solver."""
        return float(self._residual(state.params, state.rest, batch["x"]))

    def score(self, state: TrainState, split: Mapping[str, np.ndarray]) -> float:
        """The share of wrong answers, or for a text the loss of a token."""
        batch = {name: jnp.asarray(part) for name, part in split.items()}
        found = self._evaluate(state.params, state.rest, batch)
        loss = float(found["loss"])
        if self._runner.reads_text or not np.isfinite(loss):
            return loss
        return 1 - float(found["accuracy"])


def _ratio(program: _Program, implicit: _Program, state: TrainState, batch: Any) -> float:
    """Median CPU time of a gradient over that of the implicit one, in interleaved rounds."""
    if program is implicit:
        return 1.0
    calls = [
        functools.partial(each.compiled_gradient(), *each.arguments(state, batch))
        for each in (program, implicit)
    ]
    seconds = [[timing.timed_cpu(call)[2] for call in calls] for _ in range(_ROUNDS)]
    own, other = np.median(np.asarray(seconds), axis=0)
    return float(own / other)


def _flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def _windows(split: data.Split, length: int, most: int | None) -> dict[str, np.ndarray]:
    """The tokens of a split, which follow each other, in windows of another length."""
    parts = {}
    for name, tokens in (("x", split.x), ("y", split.y)):
        flat = tokens.reshape(-1)
        parts[name] = flat[: len(flat) // length * length].reshape(-1, length)[:most]
    return parts
