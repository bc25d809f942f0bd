"""What the methods are held against: recorded runs of other programs, and calculations in NumPy.

`references.json` holds runs of the authors' code and of other libraries, made once beside the
methods of the catalogue, and short examples worked out from the papers' formulas. Beside the
numbers stand the package with its version or commit, and the call. The others are calculated here,
coordinate by coordinate, without anything of this library, Optax or JAX. All of them minimize the
same kind of function,

    f_t(x) = 1/2 sum_i c_i x_i^2 + noise sum_i cos(t + i) x_i

whose gradients vary from step to step, t = 0, 1, ...; nothing is random. To record a run, make the
optimizer by its call on the parameters `start`, give it the gradient c_i x_i + noise cos(t + i) in
each step, and keep the parameters after the steps that `iterates` names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

RECORDS = Path(__file__).with_name("references.json")
AUTHORS, INDEPENDENT, FORMULA = "authors' code", "independent implementation", "formula in NumPy"
STEPS = 100  # of the runs that are calculated
# Two programs in float64 that sum in another order; what is wrong differs by 1e-4 or more.
TOLERANCE = 1e-9
# Optax calculates these factors of the rate or the momentum in float32, since it counts in int32.
_IN_FLOAT32 = ("linear", "exponential", "onecycle_adam")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A quadratic with another slope in each step.

    Attributes:
      start: where the runs start.
      curvatures: of the quadratic, one for each coordinate.
      noise: size of the slope that changes.
    """

    start: tuple[float, ...]
    curvatures: tuple[float, ...]
    noise: float = 0.0

    def slope(self, step: int) -> np.ndarray:
        """The part of the gradient that does not depend on x."""
        return self.noise * np.cos(step + np.arange(len(self.start)))

    def gradient(self, x: np.ndarray, step: int) -> np.ndarray:
        """The gradient in a step, counted from 0."""
        return np.asarray(self.curvatures) * x + self.slope(step)


NOISY = Problem((1.0, -2.0, 0.5), (1.0, 3.0, 10.0), 0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A run that a method is held against.

    Attributes:
      kind: `AUTHORS`, `INDEPENDENT` or `FORMULA`.
      source: which program, or where the formula stands.
      learning_rate: of the run.
      settings: hyperparameters that differ from the catalogue's.
      problem: what it minimizes.
      iterates: the parameters after some steps, by the number of steps.
      total_steps: length of the run for which schedules are made.
      tolerance: largest difference of a coordinate that passes.
      made_by: of a recorded run ``package`` with its version or commit, ``call``, and ``how`` it
        was computed; empty for a calculation.
    """

    kind: str
    source: str
    learning_rate: float
    settings: Mapping[str, Any]
    problem: Problem
    iterates: Mapping[int, tuple[float, ...]]
    total_steps: int
    tolerance: float = TOLERANCE
    made_by: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The number of steps."""
        return max(self.iterates)


@functools.cache
def recorded() -> dict[str, list[Reference]]:
    """The runs in `references.json`, by the method's name."""
    found: dict[str, list[Reference]] = {}
    for run in json.loads(RECORDS.read_text(encoding="utf-8")):
        iterates = {int(step): tuple(x) for step, x in run["iterates"].items()}
        reference = Reference(
            kind=run["kind"],
            source=run["source"],
            learning_rate=run["learning_rate"],
            settings=run["settings"],
            problem=Problem(tuple(run["start"]), tuple(run["curvatures"]), run["noise"]),
            iterates=iterates,
            total_steps=run.get("total_steps", max(iterates)),
            tolerance=run["tolerance"],
            made_by=run["made_by"],
        )
        found.setdefault(run["method"], []).append(reference)
    return found


# Calculations -----------------------------------------------------------------------------------

Schedule = Callable[[int], float]
Iterates = np.ndarray  # (steps, coordinates)


def constant(value: float) -> Schedule:
    """A schedule that stays."""
    return lambda step: value


def heavy_ball(
    rate: Schedule,
    momentum: Schedule | None = None,
    gradient: Callable[[np.ndarray, int], np.ndarray] = NOISY.gradient,
    mask: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> Iterates:
    """SGD with momentum, 0.9 if not given; `mask` is multiplied with each step."""
    momentum = momentum or constant(0.9)
    x, buffer, path = np.array(NOISY.start), np.zeros(3), []
    for step in range(STEPS):
        buffer = momentum(step) * buffer + gradient(x, step)
        x = x - rate(step) * np.asarray(mask) * buffer
        path.append(x)
    return np.array(path)


def adam(rate: Schedule, b1: Schedule | None = None, demon: bool = False) -> Iterates:
    """Adam; with `demon` its first moment is a sum that decays by b1, without a correction."""
    b1 = b1 or constant(0.9)
    x, m, v, path = np.array(NOISY.start), np.zeros(3), np.zeros(3), []
    for step in range(STEPS):
        g, decay = NOISY.gradient(x, step), b1(step)
        m = decay * m + (1 if demon else 1 - decay) * g
        v = 0.999 * v + 0.001 * g**2
        mean = m if demon else m / (1 - decay ** (step + 1))
        x = x - rate(step) * mean / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        path.append(x)
    return np.array(path)


def _powerprop(rate: float) -> Iterates:
    """SGD on theta with x = theta |theta|."""
    x, buffer, path = np.array(NOISY.start), np.zeros(3), []
    theta = np.sign(x) * np.sqrt(np.abs(x))
    for step in range(STEPS):
        slope = 2 * np.abs(theta) * NOISY.gradient(theta * np.abs(theta), step)
        buffer = 0.9 * buffer + slope
        theta = theta - rate * buffer
        path.append(theta * np.abs(theta))
    return np.array(path)


def _skipping_epochs(rate: float) -> Iterates:
    """SGD with momentum in epochs of ten steps; the eighth only repeats the seventh's mean step."""
    x, buffer, path, start = np.array(NOISY.start), np.zeros(3), [], np.zeros(3)
    for step in range(STEPS):
        epoch, within = divmod(step, 10)
        if epoch != 7:
            buffer = 0.9 * buffer + NOISY.gradient(x, step)
            x_next = x - rate * buffer
        else:
            x_next = x + np.mean(x - start) if within == 0 else x
        if within == 0:
            start = x
        x = x_next
        path.append(x)
    return np.stack(path)


def _at_the_worst_point(rho: float, alpha: float) -> Callable[[np.ndarray, int], np.ndarray]:
    """(1 - alpha) times the gradient and alpha times the one rho along its direction."""

    def gradient(x: np.ndarray, step: int) -> np.ndarray:
        g = NOISY.gradient(x, step)
        there = NOISY.gradient(x + rho * g / np.linalg.norm(g), step)
        return (1 - alpha) * g + alpha * there

    return gradient


# The forms of Chen et al., 2022, section 4, at a share of the run; their first value is 1.
FORMS: Mapping[str, Callable[[float], float]] = {
    "step": lambda s: 0.1 ** ((s >= 0.5) + (s >= 0.75)),
    "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
    "linear": lambda s: 1 - s,
    "exponential": lambda s: math.exp(-5 * s),
}


def _falls(form: str, highest: float) -> Schedule:
    return lambda step: highest * FORMS[form](step / STEPS)


def _cycle(step: int, bottom: float, top: float) -> float:
    """From bottom to top in the first half of the run, and back."""
    return top - (top - bottom) * abs(2 * step / STEPS - 1)


def _demon(step: int) -> float:
    """Chen et al., 2022, section 2."""
    left = 1 - step / STEPS
    return 0.9 * left / (0.1 + 0.9 * left)


def _triangle(step: int, scale: Callable[[int, int], float], highest: float) -> float:
    """Smith, 2017, section 3, with half cycles of an eighth of the run."""
    half = STEPS // 8
    number = 1 + step // (2 * half)
    height = max(0.0, 1 - abs(step / half - 2 * number + 1))
    return highest / 4 + (highest - highest / 4) * height * scale(number, step)


def _smith(scale: Callable[[int, int], float]) -> Iterates:
    return heavy_ball(lambda step: _triangle(step, scale, 0.01))


_CHEN = "Chen et al., 2022, section 4"
_SMITH = "Smith, 2017, section 3"
_SGD, _ADAM = 0.01, 0.01
# By the method's name: where the formula stands, the learning rate, the calculation.
CALCULATIONS: Mapping[str, tuple[str, float, Callable[[], Iterates]]] = {
    **{
        f"{form}_sgd": (_CHEN, _SGD, functools.partial(heavy_ball, _falls(form, _SGD)))
        for form in FORMS
    },
    **{
        f"{form}_adam": (_CHEN, _ADAM, functools.partial(adam, _falls(form, _ADAM)))
        for form in FORMS
    },
    "onecycle_adam": (
        _CHEN,
        _ADAM,
        lambda: adam(
            lambda step: _ADAM * _cycle(step, 0.1, 1.0),
            lambda step: 1.8 - _cycle(step, 0.85, 0.95),
        ),
    ),
    **{
        f"{form}_momentum_sgd": (
            _CHEN,
            _SGD,
            functools.partial(heavy_ball, constant(_SGD), _falls(form, 0.9)),
        )
        for form in ("cosine", "linear", "exponential")
    },
    "onecycle_momentum_sgd": (
        _CHEN,
        _SGD,
        lambda: heavy_ball(constant(_SGD), lambda step: 1.8 - _cycle(step, 0.85, 0.95)),
    ),
    "demon_sgd": (
        "Chen et al., 2022, algorithm 1",
        _SGD,
        lambda: heavy_ball(constant(_SGD), _demon),
    ),
    "demon_adam": (
        "Chen et al., 2022, algorithm 2, with Adam's correction of the second moment",
        0.001,
        lambda: adam(constant(0.001), _demon, demon=True),
    ),
    "cyclical_sgd": (_SMITH, _SGD, lambda: _smith(lambda number, step: 1.0)),
    "cyclical2_sgd": (_SMITH, _SGD, lambda: _smith(lambda number, step: 0.5 ** (number - 1))),
    "exp_range_sgd": (_SMITH, _SGD, lambda: _smith(lambda number, step: 0.1 ** (step / STEPS))),
    "snapshot_sgd": (
        "Huang et al., 2017, equation 2, five cycles",
        _SGD,
        lambda: heavy_ball(lambda step: _SGD * FORMS["cosine"](step % (STEPS // 5) / (STEPS // 5))),
    ),
    "powerprop_sgd": ("Schwarz et al., 2021, section 2", 0.005, lambda: _powerprop(0.005)),
    "sam_sgd": (
        "Foret et al., 2021",
        _SGD,
        lambda: heavy_ball(constant(_SGD), gradient=_at_the_worst_point(0.05, 1.0)),
    ),
    "gnp_sgd": (
        "Zhao et al., 2022, algorithm 1",
        _SGD,
        lambda: heavy_ball(constant(_SGD), gradient=_at_the_worst_point(0.1, 0.8)),
    ),
    "forward_gradient_sgd": (
        "Ren et al., 2023, section 3; as many orthogonal directions as weights",
        _SGD,
        lambda: heavy_ball(constant(_SGD)),
    ),
    "gradsamp": (
        "Revanth et al., 2024, abstract; without noise",
        _SGD,
        lambda: _skipping_epochs(_SGD),
    ),
    # The Hessian is diagonal: its dominant eigenvector is the last coordinate.
    "bulk_sgd": (
        "Song et al., 2025",
        _SGD,
        lambda: heavy_ball(constant(_SGD), mask=(1.0, 1.0, 0.0)),
    ),
    "dom_sgd": (
        "Song et al., 2025",
        _SGD,
        lambda: heavy_ball(constant(_SGD), mask=(0.0, 0.0, 1.0)),
    ),
}


# What would be random otherwise.
_SETTINGS: dict[str, dict[str, Any]] = {
    "forward_gradient_sgd": {"num_samples": 3, "directions": "orthogonal"},
    "gradsamp": {"scale": 0.0},
}


def references(method: str) -> list[Reference]:
    """All that a method is held against; nothing for many.

    Args:
      method: its name in the catalogue.

    Returns:
      The recorded runs, then the calculation.
    """
    found = list(recorded().get(method, []))
    if method in CALCULATIONS:
        source, rate, calculate = CALCULATIONS[method]
        iterates = {n: tuple(map(float, x)) for n, x in enumerate(calculate(), start=1)}
        found.append(
            Reference(
                kind=FORMULA,
                source=source,
                learning_rate=rate,
                settings=_SETTINGS.get(method, {}),
                problem=NOISY,
                iterates=iterates,
                total_steps=STEPS,
                tolerance=1e-6 if method.startswith(_IN_FLOAT32) else TOLERANCE,
            )
        )
    return found
