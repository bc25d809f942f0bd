"""Training of detectors on regular and stitched batches, and their average precisions."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
from experiments import timing
from experiments.data import data_folder
from experiments.data.detection import NAME, load_digits_detection
from experiments.data.following import (
    KINDS,
    PER_STITCHED,
    BatchChooser,
    FollowingBatches,
    following_batches,
)
from experiments.data.tasks import Split
from experiments.training import losses, networks
from experiments.training.average_precision import average_precision
from experiments.training.replicas import Replica
from experiments.training.step import StepOptions, TrainState, averaged, init_state, train_step
from models.detector import SMALL_AREA

PyTree = Any
_EMA = 0.99  # the average over the last hundred steps or so, which stands for a falling rate
_CHUNK = 100  # pictures that are looked at together
_AREAS = {"ap": (0.0, math.inf), "small": (0.0, SMALL_AREA), "large": (SMALL_AREA, math.inf)}
# Thresholds that no share is below, or every finite one.
_NEVER, _ALWAYS = 0.0, 2.0


class Replayed(BatchChooser):
    """Takes kinds in an order that was decided before, whatever the loss says.

    Args:
      order: the kind of each step.
    """

    def __init__(self, order: Sequence[str]):
        super().__init__()
        self._order = iter(order)

    def choose(self, share: float) -> str:
        """The next kind.

        Args:
          share: not looked at.
        """
        super().choose(share)
        return next(self._order)


class Runner:
    """Trains detectors by Adam at a constant rate, see `protocol_runs.Runner`.

    Args:
      setting: ``mnist``, whether the digits are MNIST's, ``steps``, ``batch_size``, ``width`` of
        the detector, ``pictures`` to train on and ``held_out``.
      data_dir: folder with the data files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        del folder
        self.setting = setting
        named = data_dir or os.environ.get("OPTAX_ACCEL_DATA")
        source = data_folder(NAME, named) if setting["mnist"] else None
        held_out = setting["held_out"]
        self.task = load_digits_detection(source, (setting["pictures"], held_out, held_out))
        self._graphdef, *_ = self._network(0)
        # The kinds of the runs that follow the loss, by loss, rate and seed.
        self._kinds: dict[tuple[str, float, int], list[str]] = {}
        self._steps: dict[str, Any] = {}
        self._evaluate = jax.jit(
            functools.partial(networks.evaluate, self._graphdef, loss="detection")
        )

    def config(self) -> dict[str, Any]:
        """Checksums of the data."""
        return {"data": self.task.checksums}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps: each takes one gradient, whatever its pictures are made of."""
        del options
        return float(self.setting["steps"])

    def seconds(self) -> float:
        """Seconds of a step."""
        state, step = self._start(0, 0.01), self._step("box")
        with self._batches(0, BatchChooser(_NEVER)) as batches:
            call = functools.partial(step, state, next(batches), jnp.float32(0.01))
            timing.timed(call)
            return min(timing.timed(call)[1] for _ in range(5))

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other; see `protocol_runs.Runner`."""
        for rate, seed in runs:
            yield self._run(options, rate, seed)

    def _run(self, options: Mapping[str, Any], rate: float, seed: int) -> dict[str, Any]:
        follow = options.get("follow", "box")
        size, steps = self.setting["batch_size"], self.setting["steps"]
        state, step = self._start(seed, rate), self._step(follow)
        scores: dict[str, Any] = {}
        seen, kinds, shares = 0, list[str](), list[float]()
        with self._batches(seed, self._chooser(options, rate, seed)) as batches:
            for _ in range(steps):
                batch = next(batches)
                state, metrics = step(state, batch, jnp.float32(rate))
                batches.tell(metrics["share"])
                kinds.append(str(batches.kind))
                shares.append(float(metrics["share"]))
                seen += size * (1 if kinds[-1] == KINDS[0] else PER_STITCHED)
                if seen >= steps * size and "ap (pictures)" not in scores:
                    scores |= self._errors(state, self.task.test, " (pictures)")
        if options["batches"] == "feedback":
            self._kinds[follow, rate, seed] = kinds
        scores |= self._errors(state, self.task.test, "")
        every = max(1, steps // 20)
        return scores | {
            "validation": self._errors(state, self.task.validation, "")["ap"],
            "stitched": kinds.count(KINDS[1]) / steps,
            "seen": seen / (steps * size),
            "shares": [
                float(np.nanmean(part)) if np.isfinite(part).any() else math.nan
                for part in np.array_split(shares, range(every, steps, every))
            ],
        }

    # -- what is trained -----------------------------------------------------------------------

    def _network(self, seed: int) -> tuple[Any, PyTree, PyTree]:
        return networks.split(
            models.create(
                "detector",
                input_shape=self.task.input_shape,
                num_classes=self.task.num_classes,
                width=self.setting["width"],
                rngs=seed,
            )
        )

    def _start(self, seed: int, rate: float) -> TrainState:
        _, params, rest = self._network(seed)
        return init_state(optax.adam(rate), params, rest, average=True)

    def _step(self, follow: str) -> Any:
        """The compiled step that tells the share of this loss; it takes the rate, too."""
        if follow not in self._steps:
            objective = networks.objective(self._graphdef, "detection", group=losses.GROUPS[follow])
            options = StepOptions(ema=_EMA, shares=True)

            @jax.jit
            def step(state: TrainState, batch: Any, rate: jax.Array) -> Any:
                tx = optax.with_extra_args_support(optax.adam(rate))
                return train_step(tx, objective, state, batch, options=options)

            self._steps[follow] = step
        return self._steps[follow]

    def _batches(self, seed: int, chooser: BatchChooser) -> FollowingBatches:
        size = self.setting["batch_size"]
        # Read when they are needed: of one kind there may be few.
        return following_batches(
            self.task.train, batch_size=size, seed=seed, chooser=chooser, prefetch=0
        )

    def _chooser(self, options: Mapping[str, Any], rate: float, seed: int) -> BatchChooser:
        kind = options["batches"]
        if kind == "mix":  # the batches of the run with feedback, shuffled
            key = (options["follow"], rate, seed)
            if key not in self._kinds:
                self._run({"batches": "feedback", "follow": options["follow"]}, rate, seed)
            return Replayed(np.random.default_rng(seed).permutation(self._kinds[key]).tolist())
        thresholds = {"regular": _NEVER, "stitched": _ALWAYS}
        return BatchChooser(thresholds[kind]) if kind in thresholds else BatchChooser()

    def _errors(self, state: TrainState, split: Split, ending: str) -> dict[str, float]:
        """One less the average precisions of the averaged weights."""
        state = averaged(state)
        found = [
            self._evaluate(state.params, state.rest, {"x": x, "y": y})["detections"]
            for x, y in (
                (split.x[i : i + _CHUNK], split.y[i : i + _CHUNK])
                for i in range(0, len(split), _CHUNK)
            )
        ]
        boxes = np.concatenate([np.asarray(rows) for rows in found])
        if not np.isfinite(boxes).all():
            return {name + ending: math.nan for name in _AREAS}
        return {
            name + ending: 1 - average_precision(boxes, split.y, areas=areas)
            for name, areas in _AREAS.items()
        }
