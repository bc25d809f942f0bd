"""What K-FAC and EKFAC are built with."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias, get_args

import chex
import optax

from optax_accel._arguments import check_choice, check_count, check_number
from optax_accel._masking import Mask
from optax_accel.natural_gradient.estimators import Estimator
from optax_accel.natural_gradient.finding import Example, check_example, find
from optax_accel.natural_gradient.layers import Network
from optax_accel.natural_gradient.likelihoods import Likelihood
from optax_accel.objective import Objective
from optax_accel.refresh import check_factor_periods

Kind: TypeAlias = Literal["factored", "eigen", "ekfac"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of :func:`~optax_accel.scale_by_kfac` and its sibling, checked.

    Attributes:
      method: name of the function that was called, for messages.
      kind: ``"factored"`` and ``"eigen"`` are K-FAC's ways of damping; ``"ekfac"`` damps in the
        eigenbasis, too, with the second moments of EKFAC as eigenvalues.
      objective: whose ``predict`` shows the layers.
      example: keyword arguments of ``predict``, of which shapes matter, or None.
      damping: what is added to the curvature.
      decay: of the moving averages.
      factors_every: steps between refreshes of the factors.
      inverses_every: steps between refreshes of the inverses.
      estimator: how the curvature is estimated at the outputs.
      likelihood: the distribution that the outputs parametrize, or None.
      norm_constraint: bound on the product of update and gradient, or None.
      max_size: rows of a factor above which it is approximated by its diagonal.
      key: PRNG key or seed of the random vectors.
      mask: the parameters to precondition; None for all.
    """

    method: str
    kind: Kind
    objective: Objective
    example: Example
    damping: optax.ScalarOrSchedule
    decay: float
    factors_every: int
    inverses_every: int
    estimator: Estimator
    likelihood: Likelihood | None
    norm_constraint: optax.ScalarOrSchedule | None
    max_size: int
    key: chex.PRNGKey | int
    mask: Mask

    def __post_init__(self) -> None:
        """Raises if an option is of another kind than it should be, or outside its range."""
        check_example(self.method, self.objective, self.example)
        check_number("damping", self.damping, 0, open_low=True, allow_schedule=True)
        check_number("decay", self.decay, 0, 1, open_high=True)
        check_factor_periods(self.factors_every, self.inverses_every)
        check_choice("estimator", self.estimator, get_args(Estimator))
        if self.likelihood is not None:
            check_choice("likelihood", self.likelihood, get_args(Likelihood))
        if self.norm_constraint is not None:
            check_number(
                "norm_constraint", self.norm_constraint, 0, open_low=True, allow_schedule=True
            )
        check_count("max_size", self.max_size, 1)

    def find(
        self, objective: Objective, params: chex.ArrayTree, example: Example = None
    ) -> Network:
        """The layers of a network, of the parameters that the mask selects."""
        return find(objective, params, example, self.mask, method=self.method)
