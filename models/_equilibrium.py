"""What the models share whose output is a fixed point of one block."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
from flax import nnx

from models import _common
from optax_accel import equilibrium

SOLVERS = ("anderson", "broyden", "fixed_point")
GRADIENTS = ("implicit", "phantom", "unrolled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How the fixed point is found and differentiated; plain values, so that models compare equal.

    Args:
        solver: "anderson", "broyden" or "fixed_point", in both directions.
        max_steps: The most steps of the solver.
        backward_steps: The same for the linear system of the implicit gradient.
        tolerance: Residual, relative to the norm of the block's output, below which an example has
            converged.
        memory: Pairs that Anderson (None: 6) or Broyden (None: all) keeps; None with "fixed_point".
        gradient: "implicit", "phantom" or "unrolled".
        phantom_steps: Steps of the phantom gradient.
        damping: Share of the block in each of these.
        loop: "while", "unrolled" or None: "unrolled" on a CPU, where XLA runs convolutions in a
            loop slowly, otherwise "while".
    """

    solver: str
    max_steps: int
    backward_steps: int
    tolerance: float
    memory: int | None
    gradient: str
    phantom_steps: int
    damping: float
    loop: str | None

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("solver", self.solver, SOLVERS),
            ("gradient", self.gradient, GRADIENTS),
            ("loop", self.loop, ("while", "unrolled", None)),
        ):
            if value not in valid:
                raise ValueError(
                    f"unknown {name} {value!r}; valid: {', '.join(str(each) for each in valid)}"
                )
        least = 2 if self.solver == "anderson" else 1
        check_count("max_steps", self.max_steps, least)
        check_count("backward_steps", self.backward_steps, least)
        check_count("phantom_steps", self.phantom_steps, 1)
        if self.memory is not None:
            check_count("memory", self.memory, 1)
            if self.solver == "fixed_point":
                raise ValueError("memory must be None with solver 'fixed_point', which has none")
        # The solvers and the gradient check the rest.
        self._solver(self.max_steps)
        self._solver(self.backward_steps)
        equilibrium.phantom(self.phantom_steps, self.damping)

    def _solver(self, max_steps: int) -> equilibrium.FixedPointSolver:
        loop = self.loop or ("unrolled" if jax.default_backend() == "cpu" else "while")
        options: dict[str, Any] = {"stop": "relative", "loop": loop}
        if self.memory is not None:
            options["memory"] = self.memory
        make: Any = getattr(equilibrium, self.solver)
        solver: equilibrium.FixedPointSolver = make(max_steps, self.tolerance, **options)
        return solver

    def solve(self, cell: nnx.Module, z0: Any, x: Any) -> tuple[Any, equilibrium.FixedPointReport]:
        """The fixed point of `cell(z, x)` in z, and the solver's report.

        Args:
            cell: A module whose variables are all parameters, and of which `z` keeps its shapes.
            z0: Where the solver starts, a pytree of arrays (N, ...).
            x: What is injected, a pytree; it may contain masks of dropout, which are then the same
                in all iterations.
        """
        graphdef, params = nnx.split(folded(cell))
        gradient: Any = self.gradient
        if gradient == "phantom":
            gradient = equilibrium.phantom(self.phantom_steps, self.damping)

        def step(z: Any, params: Any, x: Any) -> Any:
            return nnx.merge(graphdef, params)(z, x)

        return equilibrium.deq(
            step,
            z0,
            nnx.as_pure(params),
            x,
            solver=self._solver(self.max_steps),
            backward_solver=self._solver(self.backward_steps),
            gradient=gradient,
        )


def check_count(name: str, value: Any, least: int) -> None:
    """Refuses what is no count of at least so much.

    Args:
        name: Of the argument that the user gave.
        value: Its value.
        least: The least that is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def folded(cell: nnx.Module) -> nnx.Module:
    """A copy with plain layers in place of weight-normalized ones, computed once for all steps.

    Args:
        cell: A module.
    """
    cell = nnx.clone(cell)
    for path, module in list(nnx.iter_modules(cell)):
        if isinstance(module, _common.WeightNormalized):
            _common.replace(_common.owner_of(cell, path), path[-1], module.folded())
    return cell
