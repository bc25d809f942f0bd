"""Time to the first step: what a method takes before training goes on, compilation included.

Each measurement starts from empty caches of JAX: `init`, then one whole training step that is
traced, compiled and run. The step of a method with a tracker is the one that a loop takes first
when it drives refreshes from the host: it contains the cold start. The same compiled step, run once
more, tells how much of the time is running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import models
from experiments import timing
from experiments.methods import METHODS, Method
from experiments.training.step import init_state
from experiments.training.studies.method_cost import NUM_CLASSES, Network

STEP_TARGET = 3.0  # times the first step with Adam
INIT_TARGET = 0.5  # seconds

NETWORKS: Mapping[str, Callable[[], Network]] = {
    "gpt": lambda: Network(
        16,
        "transformer_lm",
        (64,),
        vocabulary_size=65,
        embedding_size=128,
        num_layers=4,
        num_heads=4,
        dropout_rate=0.0,
    ),
    "mlp": Network,
    "cnn": lambda: Network(100, "cnn", (32, 32, 3), channels=(16, 16)),
}


def measure(network: Network, method: Method) -> dict[str, Any]:
    """Times `init` and the first step of a method, from empty caches on.

    Args:
      network: the network and its batch.
      method: the method.

    Returns:
      ``init``, ``step`` and ``run``, the same compiled step once more, in seconds, and
      ``products``, the Hessian-vector products of the step.
    """
    # A loop of convolutions is slow on a CPU: there the estimate grows by sweeps.
    slow = jax.default_backend() == "cpu" and models.is_convolutional(network.model)
    refresh = method.refresh(0, cold_start=not slow)
    params, rest = jax.tree.map(jnp.copy, (network.params, network.rest))
    jax.clear_caches()
    tx = network.build(method)
    state, init = timing.timed(lambda: init_state(tx, params, rest))
    step = network.training_step(tx)
    state, first = timing.timed(lambda: step(state, network.batch, refresh=refresh))
    _, again = timing.timed(lambda: step(state, network.batch, refresh=refresh))
    products = method.products(refresh, network.params, NUM_CLASSES)
    return {"init": init, "step": first, "run": again, "products": products}


def rows(network: Network, methods: Sequence[Method], repeats: int) -> list[dict[str, Any]]:
    """The first steps of methods beside that of Adam.

    Args:
      network: the network and its batch.
      methods: the methods; Adam comes first in each round, whether or not it is among them.
      repeats: number of rounds.

    Returns:
      Per method: its name, the medians of what `measure` gives, ``ratio``, the lower quartile,
      median and upper quartile of the ratios of ``step`` to Adam's of the same round, and
      ``passes``, whether both targets are reached.
    """
    adam = METHODS["adam"]
    measured: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for method in (adam, *(method for method in methods if method is not adam)):
            measured.setdefault(method.name, []).append(measure(network, method))
    result = []
    for name, times in measured.items():
        row: dict[str, Any] = {
            key: timing.quartiles([each[key] for each in times])[1]
            for key in ("init", "step", "run")
        }
        pairs = zip(times, measured[adam.name], strict=True)
        ratio = timing.quartiles([each["step"] / base["step"] for each, base in pairs])
        passes = ratio[1] <= STEP_TARGET and row["init"] <= INIT_TARGET
        more = {"products": times[0]["products"], "ratio": ratio, "passes": passes}
        result.append({"name": name} | row | more)
    return result
