"""The methods by name, family after family, and as text."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import cli
from experiments.methods import (
    curvature,
    gradients,
    learning_rates,
    low_memory,
    momentum,
    optax_methods,
    reparametrization,
    schedules,
    workers,
)
from experiments.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *optax_methods.BASES,
        *optax_methods.ADAPTIVE_RATES,
        *optax_methods.RECENT,
        *momentum.MOMENTUM_DECAY,
        *momentum.OTHER_MOMENTUM,
        *gradients.GRADIENT_SAMPLING,
        *curvature.HESSIAN_SUBSPACE,
        *gradients.EXTRAGRADIENT,
        *learning_rates.CLOSING_BOUNDS,
        *learning_rates.CYCLICAL_SCHEDULES,
        *schedules.SCHEDULES,
        *reparametrization.REPARAMETRIZATION,
        *gradients.SAMPLED_PRODUCTS,
        *gradients.FORWARD_GRADIENT,
        *gradients.GRADIENT_NORM,
        *low_memory.LOW_RANK,
        *low_memory.SPARSE,
        *curvature.NATURAL_GRADIENT,
        *workers.LOCAL_EXTRAGRADIENT,
        *workers.LOCAL_STEPS,
    )
}


def get_methods(names: Sequence[str], *, per_worker: bool = True) -> list[Method]:
    """The methods of these names, in their order, each once.

    Args:
      names: names in the catalogue.
      per_worker: whether methods whose workers keep a state of their own can be used.

    Returns:
      The methods.

    Raises:
      ValueError: there is no name, a name is unknown (the message lists the valid ones), or a
        method cannot be used.

    Example:
      >>> from experiments.methods import get_methods
      >>> [method.name for method in get_methods(["adam", "sgd", "adam"])]
      ['adam', 'sgd']
    """
    if not names:
        raise ValueError(f"no method given; valid: {', '.join(METHODS)}")
    for name in names:
        cli.check_known("method", name, tuple(METHODS))
    chosen = [METHODS[name] for name in dict.fromkeys(names)]
    for method in chosen:
        if method.per_worker and not per_worker:
            raise ValueError(
                f"{method.name} needs workers of its own: python -m experiments.train --method "
                f"{method.name} --workers 8"
            )
    return chosen


def describe(methods: Sequence[Method]) -> str:
    """The methods as text for the terminal.

    Args:
      methods: entries of the catalogue.

    Returns:
      Lines that give, by family, what each method does, its paper, fidelity, extra cost and
      learning rates.
    """
    lines = []
    for family in dict.fromkeys(method.family for method in methods):
        lines.append(f"{family}:")
        for method in methods:
            if method.family != family:
                continue
            grid = " ".join(f"{rate:g}" for rate in method.learning_rates)
            compared = f", compared with {method.base}" if method.base else ""
            lines += [
                f"  {method.name}: {method.summary}",
                f"      {method.fidelity}: {method.paper.authors}, {method.paper.link}",
                f"      cost: {method.extra_cost()}{compared}",
                f"      learning rates {grid}",
            ]
    return "\n".join(lines)
