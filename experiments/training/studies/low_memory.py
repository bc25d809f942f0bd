"""Training of language models by optimizers of little memory, and what these keep and do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
import optax_accel as oa
from experiments import data, hlo, timing
from experiments.training import networks
from experiments.training.replicas import Replica, tree_bytes
from experiments.training.step import TrainState, init_state, train_step

PyTree = Any
READINGS = 40  # of the ranks in a run; a tenth of the run has four
_ROUNDS = 5  # in which a step with a refresh is timed beside one without


def projected(params: PyTree) -> PyTree:
    """Dimension numbers that leave embeddings and positions to plain Adam, as GaLore's authors do.

    Args:
      params: parameters of `models.TransformerLM`, which has no head of its own.

    Returns:
      A tree like them.
    """

    def numbers(path: Any, leaf: Any) -> Any:
        names = {str(getattr(entry, "key", entry)) for entry in path}
        is_matrix = leaf.ndim == 2 and "kernel" in names
        return optax.contrib.GaLoreDimensionNumbers(0, 1) if is_matrix else None

    return jax.tree_util.tree_map_with_path(numbers, params)


OPTIMIZERS: Mapping[str, Callable[..., Any]] = {
    "adam": optax.adam,
    # The size from which a matrix is factored is 128 in Optax: these networks are narrower.
    "adafactor": functools.partial(optax.adafactor, min_dim_size_to_factor=32),
    "galore": functools.partial(oa.galore, method="range_finder", dimension_numbers=projected),
    "adarankgrad": functools.partial(oa.adarankgrad, dimension_numbers=projected),
    "sift": oa.sift,
}


class Runner:
    """Trains language models on one text, see `protocol_runs.Runner`.

    Args:
      setting: ``task``, ``length`` of the windows, ``width``, ``layers``, ``heads``, ``steps``,
        ``batch_size`` and ``held_out``, the number of windows of the validation and the test split.
      data_dir: folder with the data files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        del folder
        self.setting = setting
        self.task = data.load_task(setting["task"], data_dir=data_dir)
        most = setting["held_out"]
        self._train = self._windows(self.task.train, None)
        self._held_out = {
            "validation": self._windows(self.task.validation, most),
            "loss": self._windows(self.task.test, most),
        }

    def config(self) -> dict[str, Any]:
        """Checksums of the data."""
        return {"data": self.task.checksums}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps: each takes one gradient."""
        del options
        return float(self.setting["steps"])

    def seconds(self) -> float:
        """Seconds of a step of Adam."""
        program = _Program(self, {"optimizer": "adam"})
        state, batch = program.start(0, 0.0), self.batch(self.order(0)[0])
        step = program.step(None, state, batch)
        seconds = []
        for _ in range(5):
            state, each = timing.timed(functools.partial(step, state, batch, jnp.float32(0.0)))
            seconds.append(each)
        return min(seconds)

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other, by the same programs; see `protocol_runs.Runner`."""
        program = _Program(self, options)
        adam = tree_bytes(_Program(self, {"optimizer": "adam"}).shapes().opt_state)
        for rate, seed in runs:
            state, readings = program.start(seed, rate), list[list[float]]()
            every = max(1, self.setting["steps"] // READINGS)
            for number, rows in enumerate(self.order(seed)):
                batch = self.batch(rows)
                refresh = oa.refresh_at(number, program.optimizer(rate))
                state = program.step(refresh, state, batch)(state, batch, jnp.float32(rate))
                if number % every == 0:
                    readings.append(_ranks(state.opt_state))  # which waits for the step
            scores: dict[str, Any] = {
                name: program.loss(state, windows) for name, windows in self._held_out.items()
            }
            scores |= {"state": tree_bytes(state.opt_state) / adam, "peak": program.peak / 1e6}
            if "rank" in options or "max_rank" in options:
                scores |= _of_ranks(readings, options)
            if program.is_driven:
                scores["refresh"] = program.refresh_ratio(state, batch)
            yield scores

    def network(self, seed: int) -> tuple[Any, PyTree, PyTree]:
        """The network with the weights of a seed: static part, parameters, other variables."""
        model = models.create(
            "transformer_lm",
            input_shape=(self.setting["length"],),
            vocabulary_size=self.task.vocabulary_size,
            embedding_size=self.setting["width"],
            num_layers=self.setting["layers"],
            num_heads=self.setting["heads"],
            dropout_rate=0.0,
            rngs=seed,
        )
        return networks.split(model)

    def batch(self, rows: np.ndarray) -> dict[str, jax.Array]:
        """The windows of these numbers."""
        return {name: jnp.asarray(part[rows]) for name, part in self._train.items()}

    def order(self, seed: int) -> np.ndarray:
        """The numbers of the windows of every batch, (steps, batch size)."""
        steps, size = self.setting["steps"], self.setting["batch_size"]
        return data.index_steps(len(self._train["y"]), batch_size=size, seed=seed, steps=steps)

    def _windows(self, split: data.Split, most: int | None) -> dict[str, np.ndarray]:
        """The tokens of a split, which follow each other, in windows of another length."""
        length = self.setting["length"]
        parts = {}
        for name, tokens in (("x", split.x), ("y", split.y)):
            flat = tokens.reshape(-1)
            flat = flat[: len(flat) // length * length]
            parts[name] = flat.reshape(-1, length)[:most]
        return parts


class _Program:
    """The compiled steps of one contestant, for all of its rates and seeds."""

    def __init__(self, runner: Runner, options: Mapping[str, Any]):
        self._runner = runner
        settings = dict(options)
        self._build = functools.partial(OPTIMIZERS[settings.pop("optimizer")], **settings)
        self._graphdef, _, self._rest = runner.network(0)
        self._objective = networks.objective(self._graphdef)
        self._steps: dict[Any, Any] = {}
        evaluate = functools.partial(networks.evaluate, self._graphdef)
        self._evaluate = jax.jit(evaluate)
        self._optimizers: dict[float, Any] = {}
        self.peak = 0

    def optimizer(self, rate: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer whose rate falls from this one to zero."""
        if not isinstance(rate, float):
            schedule = optax.linear_schedule(rate, 0.0, self._runner.setting["steps"])
            return optax.with_extra_args_support(self._build(schedule))
        if rate not in self._optimizers:  # made once, so that its periods are read once
            self._optimizers[rate] = optax.with_extra_args_support(self._build(rate))
        return self._optimizers[rate]

    def shapes(self) -> TrainState:
        """The shapes of a state."""
        _, params, rest = self._runner.network(0)
        init = functools.partial(init_state, self.optimizer(jnp.float32(0.1)))
        shapes: TrainState = jax.eval_shape(init, params, rest)
        return shapes

    def start(self, seed: int, rate: float) -> TrainState:
        """The state before the first step."""
        _, params, rest = self._runner.network(seed)
        init = functools.partial(init_state, self.optimizer(jnp.float32(rate)))
        state: TrainState = jax.jit(init)(params, rest)
        return state

    def step(self, refresh: Any, state: TrainState, batch: Any) -> Callable[..., TrainState]:
        """The compiled step with this ``refresh``; it takes a state, a batch and the rate."""
        if refresh not in self._steps:

            def step(state: TrainState, batch: Any, rate: jax.Array) -> TrainState:
                tx = self.optimizer(rate)
                return train_step(tx, self._objective, state, batch, refresh=refresh)[0]

            jitted = jax.jit(step, donate_argnums=0)
            compiled = jitted.lower(state, batch, jnp.float32(0.0)).compile()
            self.peak = max(self.peak, hlo.memory(compiled).total)
            self._steps[refresh] = compiled
        made: Callable[..., TrainState] = self._steps[refresh]
        return made

    @property
    def is_driven(self) -> bool:
        """Whether there are steps with a refresh and steps without."""
        return False in self._steps

    def refresh_ratio(self, state: TrainState, batch: Any) -> float:
        """CPU time of a step with a refresh over that of one without, the least of some rounds."""
        least = dict.fromkeys(self._steps, float("inf"))
        for _ in range(_ROUNDS):
            for refresh, step in self._steps.items():
                call = functools.partial(step, state, batch, jnp.float32(0.0))
                state, _, seconds = timing.timed_cpu(call)
                least[refresh] = min(least[refresh], seconds)
        between = least.pop(False)
        return max(least.values()) / between

    def loss(self, state: TrainState, windows: Mapping[str, np.ndarray]) -> float:
        """The mean loss of a token, in nats."""
        batch = {name: jnp.asarray(part) for name, part in windows.items()}
        return float(self._evaluate(state.params, state.rest, batch)["loss"])


def _ranks(opt_state: PyTree) -> list[float]:
    """The rank of each subspace of AdaRankGrad, in the order of the parameters."""
    found = [value for _, value in optax.tree.get_all_with_path(opt_state, "subspace_rank")]
    return [float(rank) for rank in jax.tree.leaves(found)]


def _of_ranks(readings: Sequence[Sequence[float]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Mean relative rank, its fall from the first to the last tenth, and the rank of each layer."""
    if "max_rank" not in options:
        return {"rank": 1.0}
    relative = np.asarray(readings) / options["max_rank"]  # (readings, matrices)
    means = relative.mean(axis=1)
    tenth = max(1, len(means) // 10)
    scores = {"rank": float(means.mean())}
    scores["fall"] = float(means[-tenth:].mean() / means[:tenth].mean())
    return scores | {f"rank of matrix {i}": row.tolist() for i, row in enumerate(relative.T)}
