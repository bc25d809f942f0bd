"""Methods that take less: Adam with a small state, weights pruned, epochs without gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

import optax_accel as oa
from experiments.methods.method import STEPS_PER_EPOCH, Method, Paper
from experiments.methods.optax_methods import ADAM_RATES, SGD_RATES, momentum_sgd

# Matrices move by a quarter of Adam's steps.
_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
_RANK = 8


def _fitting(factory: Callable[..., Any], argument: str) -> Callable[..., Any]:
    """The factory with a rank of at most 8 that fits the largest matrix of the network."""

    @functools.wraps(factory)
    def build(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
        def init(params: Any) -> Any:
            sides = [min(leaf.size // leaf.shape[-1], leaf.shape[-1]) for leaf in matrices(params)]
            rank = settings.get(argument, min([_RANK, max(sides, default=_RANK)]))
            return factory(learning_rate, **{**settings, argument: rank}).init(params)

        tx = factory(learning_rate, **{argument: _RANK, **settings})

        def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
            return tx.update(updates, state, params, **extra_args)  # whose state knows the rank

        return optax.GradientTransformationExtraArgs(init, update)

    def matrices(params: Any) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1 and leaf.size]

    return build


def _sharpness_directed(
    learning_rate: Any,
    prune_step: int,
    rho: float = 0.05,
    sparsity: float = 0.5,
    refresh_every: int = 100,
) -> optax.GradientTransformationExtraArgs:
    return oa.sharpness_directed(
        momentum_sgd(learning_rate),
        rho,
        sparsity=sparsity,
        prune_step=prune_step,
        refresh_every=refresh_every,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )


def _gradsamp(
    learning_rate: Any,
    steps_per_epoch: int,
    statistics: Any = "tensor",
    scale: float = 1.0,
    key: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GradSamp at the epochs that `Method.refresh` knows of, which has no settings."""
    sampled = {"statistics": statistics, "scale": scale, "key": key}
    return oa.gradsamp(momentum_sgd(learning_rate), steps_per_epoch, **sampled)


LOW_RANK = (
    Method(
        name="galore",
        family="low rank",
        summary="Adam in a subspace of rank 8 of each matrix's gradient, renewed every 200 steps",
        paper=Paper("Zhao et al., 2024", "https://arxiv.org/abs/2403.03507"),
        fidelity="faithful",
        base="adam",
        learning_rates=_RATES,
        factory=_fitting(oa.galore, "rank"),
        period=200,
    ),
    Method(
        name="adarankgrad",
        family="low rank",
        summary="the same of rank 1 to 8, as the gradient needs it; moments follow the subspace",
        paper=Paper("Refael et al., 2025", "https://arxiv.org/abs/2410.17881"),
        fidelity="our reading",
        base="adam",
        learning_rates=_RATES,
        factory=_fitting(oa.adarankgrad, "max_rank"),
    ),
)

SPARSE = (
    Method(
        name="sift",
        family="sparse",
        summary="Adam on the 5 % of each tensor's entries with the largest first gradients",
        paper=Paper("Song et al., 2024", "https://arxiv.org/abs/2312.11875"),
        fidelity="faithful",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=functools.partial(oa.sift, rate=0.05),
    ),
    Method(
        name="sharpness_directed",
        family="sparse",
        summary="SGD with momentum 0.9, flat along the half of the weights pruned at the end",
        paper=Paper("Ren and Honavar, 2024", "https://arxiv.org/abs/2401.05667"),
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=_sharpness_directed,
        from_context=lambda context: {"prune_step": context.total_steps},
        gradients_per_step=2,
    ),
    Method(
        name="gradsamp",
        family="sparse",
        summary="SGD with momentum 0.9; every third epoch is sampled from the last, not trained",
        paper=Paper("Revanth et al., 2024", "https://arxiv.org/abs/2406.07332"),
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=_gradsamp,
        from_context=lambda context: {
            "steps_per_epoch": context.steps_per_epoch,
            "key": context.seed,
        },
        period=6 * STEPS_PER_EPOCH,  # two sampled ones; those of the start are over after one
    ),
)
