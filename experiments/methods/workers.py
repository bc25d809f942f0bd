"""Methods whose workers keep parameters or a state of their own."""

from __future__ import annotations

import functools
from typing import Any

import optax

import optax_accel as oa
from experiments.methods.gradients import LIN
from experiments.methods.method import Context, Method, Paper
from experiments.methods.optax_methods import SGD_RATES, momentum_sgd

_YUAN = Paper("Yuan et al., 2021", "https://arxiv.org/abs/2104.11981")


def _axis_name(context: Context) -> dict[str, Any]:
    return {"axis_name": context.axis_name}


LOCAL_EXTRAGRADIENT = (
    Method(
        name="extrap_sgd_local",
        family="extragradient",
        summary="extrap_sgd, each worker extrapolating with its own gradient",
        paper=LIN,
        fidelity="our reading",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        factory=oa.extrap_sgd,
        from_context=_axis_name,
        gradients_per_step=2,
        per_worker=True,
    ),
    Method(
        name="extrap_sgd_past_local",
        family="extragradient",
        summary="extrap_sgd_past, each worker extrapolating with its own past gradient",
        paper=LIN,
        fidelity="our reading",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(oa.extrap_sgd, direction="past"),
        from_context=_axis_name,
        per_worker=True,
    ),
)


def _post_local_sgd(
    learning_rate: Any, *, local_steps: int, switch_step: int, axis_name: str | None
) -> optax.GradientTransformation:
    return oa.post_local_sgd(
        momentum_sgd(learning_rate, nesterov=True),
        local_steps=local_steps,
        switch_step=switch_step,
        axis_name=axis_name,
    )


def _local_in_the_second_half(context: Context) -> dict[str, Any]:
    """Local in the second half, as in the public code; its 32 local steps only in long runs."""
    half = context.total_steps // 2
    return {
        "local_steps": max(1, min(32, half // 8)),  # at least 8 averagings
        "switch_step": half,
        "axis_name": context.axis_name,
    }


def _on_a_graph(context: Context) -> dict[str, Any]:
    # Symmetric: DecentLaM with momentum 0.9 diverges on the directed graph.
    topology = oa.topologies.exponential(context.num_workers, symmetric=True)
    return {"topology": topology, "axis_name": context.axis_name}


LOCAL_STEPS = (
    Method(
        name="post_local_sgd",
        family="local and decentralized steps",
        summary="Nesterov SGD; after half of the steps parameters are averaged now and then",
        paper=Paper("Lin et al., 2020 (local SGD)", "https://arxiv.org/abs/1808.07217"),
        fidelity="as public code",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        factory=_post_local_sgd,
        from_context=_local_in_the_second_half,
        per_worker=True,
    ),
    Method(
        name="decentlam",
        family="local and decentralized steps",
        summary=(
            "SGD with momentum 0.9 on the symmetric exponential graph, bias of the momentum removed"
        ),
        paper=_YUAN,
        fidelity="as public code",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=oa.decentlam,
        from_context=_on_a_graph,
        per_worker=True,
    ),
    Method(
        name="dmsgd",
        family="local and decentralized steps",
        summary="rival of DecentLaM: SGD with momentum 0.9 on the symmetric exponential graph",
        paper=_YUAN,
        fidelity="as public code",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=oa.dmsgd,
        from_context=_on_a_graph,
        per_worker=True,
    ),
)
