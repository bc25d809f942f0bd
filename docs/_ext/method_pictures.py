"""Draws the picture of each method's page: `python docs/_ext/method_pictures.py [METHOD ...]`.

Every method runs as the catalogue has it on a valley of two parameters, beside its base: linear
regression whose Hessian has the eigenvalues 20 and 1, without noise. It shows how a method moves,
not how well it trains a network. The drawings are stored in `docs/images/methods/`.
"""

from __future__ import annotations

import functools
import io
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.style import context

import optax_accel as oa
from experiments import cli
from experiments.methods import METHODS, Method
from experiments.reporting import figures

FOLDER = Path(__file__).parents[1] / "images" / "methods"
STEPS = 60
EPOCH = 5  # steps
WORKERS = 8  # of methods whose workers keep parameters of their own; each has its own minimum
SCHEDULED = ("momentum decay", "cyclical schedules")  # families whose rule is a course over the run

EIGENVALUES = np.array([20.0, 1.0])
ANGLE = 1.22  # of the steep direction, in radians
AXES = np.array([[np.cos(ANGLE), np.sin(ANGLE)], [-np.sin(ANGLE), np.cos(ANGLE)]])
MINIMUM = np.array([2.0, 1.0])
START = MINIMUM + np.array([0.4, 1.3]) @ AXES
# Two examples whose mean squared error has that Hessian.
INPUTS = np.sqrt(2 * EIGENVALUES)[:, None] * AXES

COLOR = "#2a86c7"  # readable on white and on black
TEXT = "#010203"  # replaced by the color of the page's text
LOOK = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT
    ),
}


def objective(targets: jax.Array) -> oa.Objective:
    """The loss of a linear layer with the weights ``w``, for given targets."""
    return oa.Objective(
        lambda params: jnp.asarray(INPUTS, jnp.float32) @ params["w"],
        lambda outputs: 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1)),
    )


def loss(points: np.ndarray) -> np.ndarray:
    """The loss at the mean of the workers' parameters, which have the shape (..., workers, 2)."""
    along = (points.mean(axis=-2) - MINIMUM) @ AXES.T
    return 0.5 * np.sum(EIGENVALUES * along**2, axis=-1)


@functools.cache
def best_path(name: str) -> tuple[float, np.ndarray]:
    """The best of the catalogue's learning rates for a method, and where it leads.

    Args:
      name: the name of the method.

    Returns:
      The rate with the lowest loss over the last ten steps, and the parameters before every step
      and after the last, of shape (steps + 1, workers, 2), with one worker for most methods.
    """
    method = METHODS[name]
    rates = jnp.array(method.learning_rates, jnp.float32)
    found = np.array(jax.jit(jax.vmap(functools.partial(_path, method)))(rates))
    found[~np.isfinite(found).all(axis=(1, 2, 3))] = 1e9  # a rate that diverges
    best = int(np.argmin(loss(found)[:, -10:].mean(axis=1)))  # as it may oscillate
    return method.learning_rates[best], found[best]


def _path(method: Method, rate: Any) -> jax.Array:
    workers = WORKERS if method.per_worker else 1
    shifts = np.linspace(-0.8, 0.8, workers) if workers > 1 else np.zeros(1)
    minima = MINIMUM + shifts[:, None] * AXES[1]  # apart along the valley
    targets = jnp.asarray(minima @ INPUTS.T, jnp.float32)[..., None]
    tx = _build(method, rate, workers, objective(targets[0]))

    def step(params: Any, state: Any, target: jax.Array) -> tuple[Any, Any]:
        value_fn = objective(target)
        value, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    def steps(carry: Any, _: None) -> tuple[Any, jax.Array]:
        new = jax.vmap(step, axis_name="workers")(*carry, targets)
        return new, new[0]["w"][..., 0]

    params = {"w": jnp.broadcast_to(jnp.asarray(START, jnp.float32)[:, None], (workers, 2, 1))}
    state = jax.vmap(tx.init, axis_name="workers")(params)
    _, points = jax.lax.scan(steps, (params, state), length=STEPS)
    return jnp.concatenate([params["w"][None, ..., 0], points])


def _build(
    method: Method, rate: Any, workers: int, example: oa.Objective | None = None
) -> optax.GradientTransformationExtraArgs:
    return method.build(
        rate,
        total_steps=STEPS,
        steps_per_epoch=EPOCH,
        num_classes=1,
        axis_name="workers" if workers > 1 else None,
        num_workers=workers,
        objective=example if method.needs_objective else None,
    )


@functools.cache
def step_lengths(name: str) -> np.ndarray:
    """The lengths of the steps of a method under a gradient that stays 1, in learning rates.

    Args:
      name: the name of a method that needs the gradient only.
    """
    rate = METHODS[name].learning_rates[0]
    tx = _build(METHODS[name], rate, workers=1)
    params = jnp.zeros(())

    def step(state: Any, _: None) -> tuple[Any, jax.Array]:
        update, state = tx.update(jnp.ones(()), state, params)
        return state, -update / rate

    return np.asarray(jax.lax.scan(step, tx.init(params), length=STEPS)[1])


# -- drawing ---------------------------------------------------------------------------------------


def picture(method: Method) -> str:
    """The drawing of a method beside its base, as SVG to be put into a page.

    Args:
      method: an entry of the catalogue that has a base.
    """
    assert method.base is not None
    with context([figures.STYLE_SHEET, LOOK]):
        figure = Figure(figsize=(7.4, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_paths(left, method)
        described = _draw_lengths if method.family in SCHEDULED else _draw_losses
        described(right, method)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
    opening = f'<svg role="img" aria-label="{alternative(method)}"'
    svg = svg.replace("<svg", opening, 1)
    # A hundredth of a point is enough for coordinates, which stand inside of tags.
    svg = re.sub(r"(\d\.\d\d)\d+(?=[^<>]*>)", r"\1", svg)
    # An empty line would end the block of HTML in a page of Markdown.
    return "\n".join(line for line in svg.splitlines() if line.strip()) + "\n"


def alternative(method: Method) -> str:
    """What the drawing of a method shows, in words, for those who do not see it."""
    parts = []
    for name in (method.name, method.base):
        rate, points = best_path(str(name))
        parts.append(f"{name} (learning rate {rate:g}) has the loss {loss(points)[-1]:.2g}")
    ends = " and ".join(parts)
    first = loss(best_path(method.name)[1])[0]
    return (
        f"Paths of {method.name} and {method.base} through a valley of two parameters: "
        f"from the loss {first:.2g}, after {STEPS} steps {ends}."
    )


def _draw_paths(axes: Axes, method: Method) -> None:
    for level in 0.02 * 4.0 ** np.arange(6):
        width, height = 2 * np.sqrt(2 * level / EIGENVALUES)
        angle = float(np.degrees(ANGLE))
        axes.add_patch(
            Ellipse(
                tuple(MINIMUM), width, height, angle=angle, fill=False, edgecolor=TEXT, alpha=0.25
            )
        )
    for name, look in _looks(method):
        rate, points = best_path(name)
        for number, path in enumerate(points.swapaxes(0, 1)):
            label = f"{name}, rate {rate:g}" if number == 0 else None
            axes.plot(*path.T, label=label, **look)
    axes.plot(*MINIMUM, marker="+", color=TEXT, markersize=9)
    axes.set(
        title="Path through a valley",
        xlabel="first parameter",
        ylabel="second parameter",
        xlim=(0.4, 2.9),
        ylim=(0.4, 2.2),
    )
    axes.locator_params(nbins=5)
    axes.legend(loc="upper left", fontsize=8)


def _draw_losses(axes: Axes, method: Method) -> None:
    for name, look in _looks(method):
        axes.semilogy(np.maximum(loss(best_path(name)[1]), 1e-12), **look)
    axes.set(title="Loss", xlabel="step", ylabel="loss (log scale)")
    axes.minorticks_off()


def _draw_lengths(axes: Axes, method: Method) -> None:
    for name, look in _looks(method):
        axes.plot(step_lengths(name), **look)
    axes.set(
        title="Steps under a constant gradient",
        xlabel="step",
        ylabel="length, in learning rates",
        ylim=(0, None),
    )


def _looks(method: Method) -> list[tuple[str, dict[str, Any]]]:
    """The base first, so that the method lies above it."""
    base = {"color": TEXT, "alpha": 0.6, "linewidth": 1.0, "linestyle": (0, (3, 2))}
    return [(str(method.base), base), (method.name, {"color": COLOR, "linewidth": 1.4})]


def main(names: list[str]) -> None:
    """Draws the named methods, or all that have a page."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    chosen = names or [name for name, method in METHODS.items() if method.fidelity != "Optax"]
    for name in chosen:
        cli.write_atomic(FOLDER / f"{name}.svg", picture(METHODS[name]).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
