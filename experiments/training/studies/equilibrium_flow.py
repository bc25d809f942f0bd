"""Training of equilibrium networks of optical flow, and solving along sequences of pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models
from experiments import data
from experiments.data import moving_digits
from experiments.training import networks
from experiments.training.replicas import Replica
from experiments.training.step import TrainState, init_state, train_step
from experiments.training.studies.image_runs import seconds_of
from models import deq_flow

PyTree = Any
_PART = 100  # examples that are evaluated together, which keeps correlations small
_PARTS = ("train", "validation", "test")


def optimizer(rate: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """The authors' optimizer: AdamW, clipped, with a rate that rises and falls linearly.

    Bai et al. (2022) and their code: gradient norms are clipped at 1, the weight decay is 1e-4, and
    the rate rises in the first twentieth of the steps.

    Args:
      rate: the highest learning rate.
      steps: number of steps.

    Returns:
      The optimizer.
    """
    rise = max(1, steps // 20)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, rate, rise), optax.linear_schedule(rate, 0.0, steps - rise)],
        [rise],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4))


class Runner:
    """Trains networks of flow on moving digits, see `protocol_runs.Runner`.

    Args:
      setting: ``digits``, ``"digits"`` or ``"mnist"``; ``width`` of the network; ``solver_steps``
        in training; ``steps``, ``batch_size``; the numbers of ``pairs`` trained on and ``held_out``
        in the other splits; the number of ``sequences``, and the ``tolerance`` and ``most_steps``
        of the solver that follows them.
      data_dir: folder with MNIST's files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        del folder
        self.setting = setting
        of_mnist = setting["digits"] == "mnist"
        place = data.data_folder("moving_digits_flow", data_dir) if of_mnist else None
        sprites = moving_digits.read_sprites(place)
        held_out = setting["held_out"]
        numbers = (setting["pairs"], held_out, held_out)
        drawn = {
            name: moving_digits.sequences(own, number, seed=seed, frames=2)
            for seed, (name, own, number) in enumerate(zip(_PARTS, sprites, numbers, strict=True))
        }
        self.splits = {name: moving_digits.as_split(each) for name, each in drawn.items()}
        self.inside = {name: each.inside[:, 0] for name, each in drawn.items()}
        self.sequences = moving_digits.sequences(sprites[2], setting["sequences"], seed=3)
        self._programs: dict[str, _Program] = {}

    def config(self) -> dict[str, Any]:
        """Checksums of the data."""
        return {"data": {name: split.checksums() for name, split in self.splits.items()}}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps; one gradient goes through one update or more for each output."""
        del options
        return float(self.setting["steps"])

    def seconds(self) -> float:
        """Seconds of a step with one output."""
        program = self._program({"corrections": 1, "phantom_steps": 1})
        state, batch = program.start(0), self._batch(self._order(0)[0])
        return seconds_of(lambda: program.step(state, batch, jnp.float32(0.0)))

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other, by the same programs; see `protocol_runs.Runner`."""
        program = self._program(options)
        for rate, seed in runs:
            state = program.start(seed)
            for number, rows in enumerate(self._order(seed)):
                state = program.step(state, self._batch(rows), jnp.float32(rate))
                if number % 16 == 0:
                    jax.block_until_ready(state.step)
            scores: dict[str, Any] = {"validation": self._errors(program, state, "validation")[0]}
            scores["epe"], scores["digit"] = self._errors(program, state, "test")
            yield scores | self._follow(program, state)

    def _program(self, options: Mapping[str, Any]) -> _Program:
        name = str(sorted(options.items()))
        if name not in self._programs:
            self._programs[name] = _Program(self.setting, options)
        return self._programs[name]

    def _batch(self, rows: np.ndarray) -> dict[str, jax.Array]:
        split = self.splits["train"]
        return {"x": jnp.asarray(split.x[rows]), "y": jnp.asarray(split.y[rows])}

    def _order(self, seed: int) -> np.ndarray:
        steps, size = self.setting["steps"], self.setting["batch_size"]
        return data.index_steps(self.setting["pairs"], batch_size=size, seed=seed, steps=steps)

    def _errors(self, program: _Program, state: TrainState, name: str) -> tuple[float, float]:
        """End-point errors of a split: of all pixels, and of those of digits."""
        split = self.splits[name]
        found = [
            np.asarray(program.flow(state, jnp.asarray(split.x[first : first + _PART])))
            for first in range(0, len(split), _PART)
        ]
        distance = np.linalg.norm(np.concatenate(found) - split.y, axis=-1)
        return float(distance.mean()), float(distance[self.inside[name]].mean())

    def _follow(self, program: _Program, state: TrainState) -> dict[str, Any]:
        """Steps and errors along the sequences, from zeros and from the last fixed point."""
        frames, flows = self.sequences.frames, self.sequences.flows
        steps: dict[str, list[float]] = {"cold": [], "warm": []}
        errors: dict[str, list[float]] = {"cold": [], "warm": []}
        unsettled = []
        last = None
        for number in range(flows.shape[1]):
            x = jnp.concatenate([frames[:, number], frames[:, number + 1]], axis=-1)
            zeros = program.zeros(x)
            starts = {"cold": zeros, "warm": zeros if last is None else deq_flow.moved_on(last)}
            for name, start in starts.items():
                flow, z, report = program.estimate(state, x, start)
                distance = np.linalg.norm(np.asarray(flow) - flows[:, number], axis=-1)
                steps[name].append(float(report.steps.mean()))
                errors[name].append(float(distance.mean()))
                if name == "cold":
                    unsettled.append(1 - float(report.converged.mean()))
                last = z
        # The first pair has no past.
        counted = {name: float(np.mean(steps[name][1:])) for name in steps}
        missed = {name: float(np.mean(errors[name][1:])) for name in errors}
        return {
            "steps": counted["cold"],
            "reuse": counted["warm"] / counted["cold"],
            "reuse_error": missed["warm"] / missed["cold"],
            "unsettled": float(np.mean(unsettled[1:])),
            "steps of pairs from zeros": steps["cold"],
            "steps of pairs with reuse": steps["warm"],
        }


class _Program:
    """The compiled functions of one contestant, for all of its rates and seeds."""

    def __init__(self, setting: Mapping[str, Any], options: Mapping[str, Any]):
        self._make = functools.partial(
            models.create,
            "deq_flow",
            input_shape=(moving_digits.SIZE, moving_digits.SIZE, 2),
            width=setting["width"],
            steps=setting["solver_steps"],
            **options,
        )
        model = self._make(rngs=0)
        graphdef, _, self._rest = networks.split(model)
        objective = networks.objective(graphdef, "flow")
        steps = setting["steps"]
        solver = model.solver(setting["most_steps"], setting["tolerance"])

        def step(state: TrainState, batch: PyTree, rate: jax.Array) -> TrainState:
            return train_step(optimizer(rate, steps), objective, state, batch)[0]

        def estimate(state: TrainState, x: jax.Array, z0: deq_flow.FlowState) -> Any:
            model = nnx.merge(graphdef, state.params, state.rest)
            return model.estimate(x, z0, solver)

        def flow(state: TrainState, x: jax.Array) -> jax.Array:
            found: jax.Array = nnx.merge(graphdef, state.params, state.rest).estimate(x)[0]
            return found

        self._init = jax.jit(functools.partial(init_state, optimizer(0.0, steps)))
        self.step: Callable[[TrainState, PyTree, jax.Array], TrainState] = jax.jit(step)
        self.estimate: Callable[..., Any] = jax.jit(estimate)
        self.flow: Callable[[TrainState, jax.Array], jax.Array] = jax.jit(flow)
        self.zeros = model.start

    def start(self, seed: int) -> TrainState:
        """The state before the first step."""
        _, params, rest = networks.split(self._make(rngs=seed))
        state: TrainState = self._init(params, rest)
        return state
