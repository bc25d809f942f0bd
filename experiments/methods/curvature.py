"""Methods that use curvature: the dominant Hessian subspace and natural gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optax

import optax_accel as oa
from experiments.methods.method import Context, Method, Paper
from experiments.methods.optax_methods import SGD_RATES, momentum_sgd

# Steps between two inversions of K-FAC's factors.
KFAC_PERIOD = 10
# Most steps between two refreshes of a subspace that is refreshed when it has moved.
LONGEST_PERIOD = 50
# Up to 0.1, the rate of Pauloski et al., 2020, whose KL clip comes with it.
KFAC_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
# Fractions of the step to where the quadratic model is lowest.
HESSIAN_FREE_RATES = (0.03, 0.1, 0.3, 0.5, 1.0)

_SONG = Paper("Song et al., 2025", "https://arxiv.org/abs/2405.16002")


def _directions(context: Context) -> dict[str, Any]:
    return {"num_directions": context.num_classes}


def _subspace_method(
    name: str,
    summary: str,
    factory: Callable[..., optax.GradientTransformation],
    *,
    tracker: oa.Tracker,
    fidelity: str,
    paper: Paper = _SONG,
    first_step: float | None = None,
) -> Method:
    """SGD with momentum whose steps are changed in the dominant subspace that a tracker follows."""
    every = tracker.refresh_every
    return Method(
        name=name,
        family="Hessian subspace",
        summary=summary,
        paper=paper,
        fidelity=fidelity,
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(factory, base=momentum_sgd, tracker=tracker),
        from_context=_directions,
        tracker=tracker,
        period=LONGEST_PERIOD if every == "adaptive" else every,
        first_step=first_step,
    )


HESSIAN_SUBSPACE = (
    _subspace_method(
        "bulk_sgd",
        "SGD outside the dominant Hessian subspace",
        oa.bulk_sgd,
        tracker=oa.BlockTracker(),
        first_step=5.6,
        fidelity="faithful",
    ),
    _subspace_method(
        "dom_sgd",
        "SGD inside the dominant Hessian subspace (diagnostic)",
        oa.dom_sgd,
        tracker=oa.BlockTracker(),
        first_step=5.6,
        fidelity="faithful",
    ),
    _subspace_method(
        "interpolated_sgd",
        "SGD with the dominant component halved",
        functools.partial(oa.interpolated_sgd, dominant_weight=0.5, bulk_weight=1.0),
        tracker=oa.BlockTracker(),
        first_step=5.6,
        fidelity="our reading",
        paper=Paper("Zakarin and Singh, 2025", "https://arxiv.org/abs/2505.11972"),
    ),
    _subspace_method(
        "bulk_sgd_adaptive",
        "Bulk-SGD, the subspace refreshed when it has moved",
        oa.bulk_sgd,
        tracker=oa.BlockTracker(refresh_every="adaptive", max_refresh_every=LONGEST_PERIOD),
        first_step=5.6,
        fidelity="our reading",
    ),
    _subspace_method(
        "bulk_sgd_round_robin",
        "Bulk-SGD, one Hessian-vector product at every step",
        oa.bulk_sgd,
        tracker=oa.RoundRobinTracker(),
        fidelity="our reading",
    ),
    _subspace_method(
        "bulk_sgd_gradient",
        "Bulk-SGD, the subspace from gradients of the mean outputs",
        oa.bulk_sgd,
        tracker=oa.GradientTracker(),
        first_step=3.5,
        fidelity="our reading",
    ),
)


def _network(context: Context) -> dict[str, Any]:
    return {
        "objective": context.objective,
        "likelihood": context.likelihood,
        "key": context.seed,
    }


NATURAL_GRADIENT = (
    Method(
        name="kfac",
        family="natural gradient",
        summary="K-FAC with momentum 0.9 and a KL clip, factors at every step, inverses every 10",
        paper=Paper("Martens and Grosse, 2015", "https://arxiv.org/abs/1503.05671"),
        fidelity="faithful",
        base="sgd",
        learning_rates=KFAC_RATES,
        factory=functools.partial(oa.kfac, inverses_every=KFAC_PERIOD),
        from_context=_network,
        gradients_per_step=2,
        period=KFAC_PERIOD,
        first_step=2.6,
        needs_objective=True,
        time_targets={"cycle": 5.0, "between": 2.0},
    ),
    Method(
        name="ekfac",
        family="natural gradient",
        summary="the same with second moments in the factors' eigenbasis (EKFAC)",
        paper=Paper("George et al., 2018", "https://arxiv.org/abs/1806.03884"),
        fidelity="faithful",
        base="sgd",
        learning_rates=KFAC_RATES,
        factory=functools.partial(oa.ekfac, inverses_every=KFAC_PERIOD),
        from_context=_network,
        gradients_per_step=2,
        period=KFAC_PERIOD,
        needs_objective=True,
    ),
    Method(
        name="hessian_free",
        family="natural gradient",
        summary="damped Gauss-Newton steps by up to ten iterations of conjugate gradients",
        paper=Paper(
            "Martens, 2010", "https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf"
        ),
        fidelity="our reading",
        base="sgd",
        learning_rates=HESSIAN_FREE_RATES,
        factory=functools.partial(oa.hessian_free, max_iterations=10),
        gradients_per_step=30,
    ),
    Method(
        name="batch_gauss_newton",
        family="natural gradient",
        summary="Gauss-Newton in the space of the batch's outputs, up to ten iterations of CG",
        paper=Paper("Ren and Goldfarb, 2019", "https://arxiv.org/abs/1906.02353"),
        fidelity="our reading",
        base="sgd",
        learning_rates=HESSIAN_FREE_RATES,
        factory=functools.partial(oa.batch_gauss_newton, max_iterations=10),
        from_context=lambda context: {"likelihood": context.likelihood},
        gradients_per_step=25,
        period=oa.LevenbergMarquardt(1.0).every,
    ),
)
