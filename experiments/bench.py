"""Time every method of the catalogue against its Optax base, in one run.

    python -m experiments.bench

What does a method's `update` cost on a tree of 10 million parameters, where the optimizer is all
there is; what does it cost in a whole training step of a dense model; how long does that step take
to compile; and for K-FAC, at twice the batch, what do its whole cycle and a step between refreshes
cost. Method and base run side by side (A B, B A, A B, ...), compiled,
with donated buffers, waiting for every result, so a busy moment of the machine hits both. A ratio
is the median of the ratios of such pairs; the quartiles beside it say how far to trust it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

import models
from experiments import cli, timing
from experiments.methods import METHODS, Method, get_methods
from experiments.reporting import tables
from experiments.training import losses, networks
from experiments.training.step import init_state, train_step

# Highest ratio to the base that this project accepts.
UPDATE_TARGETS = {"demon_sgd": 1.05, "demon_adam": 1.05, "stoch_grad_adam": 1.5}
UPDATE_TARGETS |= {"adabound": 1.1, "weight_norm_adam": 2.0}
STEP_TARGETS = {"extrap_sgd_past": 1.10, "extrap_sgd": 2.1}
COMPILE_TARGET = 2.0  # of methods without curvature, whose step has one form
NATURAL_COMPILE_TARGET = 3.0  # of each form of the step
# Of K-FAC's cycle, factors at every step and inverses every 10, and of its steps without either.
CYCLE_TARGETS = {"kfac": 5.0}
BETWEEN_TARGETS = {"kfac": 2.0}
# Their `update` evaluates the network, which is what it costs.
EVALUATING = ("extragradient", "gradient norm", "natural gradient")
COMPILE_REPEATS = 5  # at most: a compilation takes a second
BATCH_SIZE = 128
NUM_CLASSES = 10
TOTAL_STEPS = 10_000


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Time every method of the catalogue against its Optax base."""

    methods: str | None = None
    """Methods, separated by commas, timed with their bases; default: all."""
    repeats: int = 40
    """Rounds; each one times every method once beside its base."""
    parameters: int = 10_000_000
    """Parameters of the tree that is updated, in ten square float32 matrices."""
    json: Path | None = None
    """Also write the numbers to this file."""


# The questions -------------------------------------------------------------------------------


def update_cases(base: str, group: Sequence[Method], parameters: int) -> list[timing.Case]:
    """`update` and `apply_updates` of a base and its methods on a large tree.

    Methods that evaluate the network inside their update (`EVALUATING`) have no cost of their own
    here and are left out, and so is a base without others; curvature methods only project, they do
    not refresh.
    """
    side = max(1, math.isqrt(parameters // 10))
    keys = jax.random.split(jax.random.key(0), 10)
    grads = {f"matrix_{i}": jax.random.normal(key, (side, side)) for i, key in enumerate(keys)}

    def call(step: int, carry: Any, update: Any) -> Any:
        return update(grads, *carry)

    cases = []
    for method in group:
        if method.family in EVALUATING:
            continue
        tx = method.build(1e-3, total_steps=TOTAL_STEPS, num_classes=NUM_CLASSES)
        extra = {} if method.refresh_every is None else {"refresh": False, "value_fn": _no_loss}

        def update(
            grads: Any, params: Any, state: Any, tx: Any = tx, extra: dict[str, Any] = extra
        ) -> Any:
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.zeros_like, grads)
        cases.append(
            timing.Case(
                name=method.name,
                base=None if method.name == base else base,
                call=functools.partial(call, update=jax.jit(update, donate_argnums=(1, 2))),
                carry=(params, jax.jit(tx.init)(params)),
                period=1,
                target=UPDATE_TARGETS.get(method.name),
            )
        )
    return cases if len(cases) > 1 else []


def _no_loss(params: Any) -> Any:
    raise AssertionError("an update without refresh evaluates no loss")


def _problem(batch_size: int = BATCH_SIZE) -> tuple[Any, ...]:
    """A dense model, split, and a batch of images of MNIST's shape."""
    model = models.create("mlp", input_shape=(28, 28, 1), num_classes=NUM_CLASSES, rngs=0)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.random((batch_size, 28, 28, 1), np.float32))
    y = jnp.asarray(random.integers(0, NUM_CLASSES, batch_size, np.int32))
    return *networks.split(model), x, y


def _build(method: Method, problem: tuple[Any, ...]) -> Any:
    graphdef, _, rest, x, y = problem
    return method.build(
        1e-3,
        total_steps=TOTAL_STEPS,
        num_classes=NUM_CLASSES,
        objective=networks.objective(graphdef).bind(rest=rest, x=x, y=y),
        likelihood=losses.LIKELIHOODS["cross_entropy"],
    )


def _training_step(tx: Any, graphdef: Any) -> Any:
    objective = networks.objective(graphdef)

    @functools.partial(jax.jit, static_argnames="refresh", donate_argnames="state")
    def step(state: Any, x: Any, y: Any, refresh: Any) -> Any:
        return train_step(tx, objective, state, {"x": x, "y": y}, refresh=refresh)[0]

    return step


def step_cases(base: str, group: Sequence[Method]) -> list[timing.Case]:
    """Whole training steps of a dense model: batch 128, images of MNIST's shape."""
    problem = _problem()
    return [_step_case(base, method, problem, STEP_TARGETS.get(method.name)) for method in group]


def natural_cases(base: str, group: Sequence[Method]) -> list[timing.Case]:
    """Those of K-FAC and EKFAC at batch 256: whole cycles, and steps that refresh nothing."""
    cases = []
    problem = _problem(2 * BATCH_SIZE)
    for method in group:
        if method.name == base:
            cases.append(dataclasses.replace(_step_case(base, method, problem), period=1))
        elif method.needs_objective:
            cycle = _step_case(base, method, problem, CYCLE_TARGETS.get(method.name))
            between = _step_case(base, method, problem, BETWEEN_TARGETS.get(method.name), False)
            cases += [cycle, dataclasses.replace(between, name=f"{method.name}, between", period=1)]
    return cases if len(cases) > 1 else []


def _step_case(
    base: str,
    method: Method,
    problem: tuple[Any, ...],
    target: float | None = None,
    refresh: Any = ...,
) -> timing.Case:
    """Training steps as they come, or all with one `refresh`."""
    graphdef, params, rest, x, y = problem
    tx = _build(method, problem)
    step, period = _training_step(tx, graphdef), method.period

    def call(i: int, state: Any) -> Any:
        return step(state, x, y, refresh=method.refresh(i) if refresh is ... else refresh)

    return timing.Case(
        name=method.name,
        base=None if method.name == base else base,
        call=call,
        # Copies: the step donates its state, and the next case starts from the same weights.
        carry=jax.tree.map(jnp.copy, init_state(tx, params, rest)),
        period=period * math.ceil(10 / period),
        target=target,
    )


def compile_cases(base: str, group: Sequence[Method]) -> list[timing.Case]:
    """Tracing and compiling those training steps, in all forms of their static `refresh`.

    The forms of K-FAC's step, of which a loop may use but some, are cases of their own.
    """
    graphdef, params, rest, x, y = problem = _problem()

    def case(name: str, method: Method, forms: Iterable[Any], target: float | None) -> timing.Case:
        tx = _build(method, problem)
        state = jax.eval_shape(functools.partial(init_state, tx), params, rest)

        def call(i: int, carry: None) -> None:
            for form in forms:
                _training_step(tx, graphdef).lower(state, x, y, refresh=form).compile()

        is_base = method.name == base
        return timing.Case(
            name, None if is_base else base, call, None, 1, None if is_base else target
        )

    cases = []
    for method in group:
        if method.needs_objective:
            forms = {"inverses": "inverses", "factors": "factors", "between": False}
            cases += [
                case(f"{method.name}, {name}", method, [form], NATURAL_COMPILE_TARGET)
                for name, form in forms.items()
            ]
        else:
            forms_of_step = {method.refresh(i) for i in range(method.period + 1)}
            target: float | None = COMPILE_TARGET if method.tracker is None else None
            if method.family == "natural gradient":
                target = NATURAL_COMPILE_TARGET
            cases.append(case(method.name, method, forms_of_step, target))
    return cases


# Output -----------------------------------------------------------------------------------------


def verdict(row: dict[str, Any]) -> str:
    """What to show beside a target."""
    if row["target"] is None:
        return ""
    return f"<= {row['target']:.2f} {'pass' if row['ratio'][1] <= row['target'] else 'FAIL'}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Medians, with quartiles in brackets; each base is followed by its methods."""
    view = tables.table(["method", "milliseconds", "ratio to base", "target"], title)
    for row in rows:
        low, median, high = row["milliseconds"]
        time = f"{_short(median)} ({_short(low)}–{_short(high)})"
        if row["base"] is None:
            view.add_row(row["name"], time, "", "", style="bold")
        else:
            low, median, high = row["ratio"]
            ratio = f"{median:.3f} ({low:.2f}–{high:.2f})"
            view.add_row(f"  {row['name']}", time, ratio, verdict(row))
    return view


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, "python -m experiments.bench")
    cli.check_file("--json", options.json)
    # The tree, its gradient, its update and a state of two trees for the method and its base each.
    cli.check_memory(4 * 8 * options.parameters, f"a tree of {options.parameters:,} parameters")
    try:
        everything = [name for name, method in METHODS.items() if not method.per_worker]
        names = everything if options.methods is None else options.methods.split(",")
        chosen = get_methods([name.strip() for name in names], per_worker=False)
    except ValueError as error:
        return cli.fail(error)
    groups: dict[str, list[Method]] = {}
    for method in chosen:
        if method.base is not None:
            groups.setdefault(method.base, [METHODS[method.base]]).append(method)
    if not groups:
        return cli.fail("--methods names only base methods; add one to compare")
    console = cli.console(100)
    side = max(1, math.isqrt(options.parameters // 10))
    computer = timing.machine()
    console.print(", ".join(f"{key} {value}" for key, value in computer.items()))
    if computer["load"] > 0.5 * computer["cores"]:
        console.print(
            "other programs keep the machine busy: mind the quartiles, or come back later"
        )
    questions: dict[str, tuple[str, Callable[..., list[timing.Case]]]] = {
        "update": (
            f"update + apply, {10 * side * side:,} parameters",
            functools.partial(update_cases, parameters=options.parameters),
        ),
        "step": (f"training step, MLP on 28 x 28 images, batch {BATCH_SIZE}", step_cases),
        "natural": (f"K-FAC's cycle and its steps between, batch {2 * BATCH_SIZE}", natural_cases),
        "compile": ("compilation of the step", compile_cases),
    }
    results: dict[str, Any] = {"machine": computer, "repeats": options.repeats}
    for key, (title, make) in questions.items():
        rows = [
            row
            for base, group in groups.items()
            if (cases := make(base, group))
            for row in (
                timing.measure(cases, min(options.repeats, COMPILE_REPEATS), warm_ups=1)
                if key == "compile"
                else timing.measure(cases, options.repeats)
            )
        ]
        results[key] = rows
        if rows:
            console.print()
            console.print(table(title, rows))
    console.print(
        f"\nMedians (quartiles) of {options.repeats} rounds, of compilations "
        f"{min(options.repeats, COMPILE_REPEATS)}. Updates of subspace methods project "
        "without refreshing; their steps refresh at the usual rhythm, the cold start left out."
    )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        cli.write_atomic(options.json, cli.to_json(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
