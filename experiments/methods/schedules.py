"""Demon's rivals: what the learning rate, or the momentum, of SGD and Adam does over a run.

The forms are those of Chen et al., 2022 (https://arxiv.org/abs/1910.04952), section 4, with t of T
steps done: a rate falls from its value to 0 by a cosine, linearly, by exp(-5 t / T), to a tenth at
given shares of the run, to a tenth on each plateau, or goes up from a tenth and down again
(OneCycle); a momentum falls to 0 in the same ways.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import optax

import optax_accel as oa
from experiments.methods.method import Context, Method, Paper
from experiments.methods.optax_methods import ADAM_RATES, SGD_RATES

# Demon Adam in the paper's form takes steps about ten times Adam's at the same rate.
DEMON_ADAM_RATES = (0.00003, 0.0001, 0.0003, 0.001, 0.003)
# Over a run a falling rate is half of its highest value in the mean, or less.
FALLING_ADAM_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
_DECAY = -5.0  # the exponent at the end: k about -0.05 x (100 / T) in each step

# Factors that begin (OneCycle: peak) at 1, from the number of steps.
FACTORS: Mapping[str, Callable[[int], optax.Schedule]] = {
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
    "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    "exponential": lambda steps: optax.exponential_decay(1.0, steps, math.exp(_DECAY)),
    "onecycle": lambda steps: optax.join_schedules(
        [
            optax.linear_schedule(0.1, 1.0, max(1, steps // 2)),
            optax.linear_schedule(1.0, 0.1, max(1, steps - steps // 2)),
        ],
        [max(1, steps // 2)],
    ),
}


def scheduled(
    learning_rate: Any,
    *,
    total_steps: int,
    optimizer: str,
    rate: str = "constant",
    momentum: str = "constant",
    peak: float = 0.9,
    trough: float = 0.85,
    drops: tuple[float, ...] = (0.5, 0.75),
    patience: float = 0.1,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """SGD or Adam with a schedule for its rate and one for its momentum.

    Args:
      learning_rate: the rate, at its highest.
      total_steps: length of the run.
      optimizer: ``"sgd"`` or ``"adam"``, whose momentum is ``b1``.
      rate: ``"constant"``, ``"step"``, ``"plateau"`` or one of `FACTORS`.
      momentum: ``"constant"``, ``"onecycle"``, ``"demon"`` or one of `FACTORS`.
      peak: the momentum, at its highest.
      trough: the lowest momentum of ``"onecycle"``.
      drops: shares of the run at which ``"step"`` divides the rate by ten.
      patience: share of the run without a lower training loss, averaged over a hundredth of the
        run, after which ``"plateau"`` divides the rate by ten.
      weight_decay: coefficient of the penalty's gradient.

    Returns:
      The transformation.
    """
    steps, parts = max(2, total_steps), []
    value: Any = learning_rate
    if rate == "step":
        factor = optax.piecewise_constant_schedule(1.0, {int(d * steps): 0.1 for d in drops})
        value = _times(learning_rate, factor)
    elif rate in FACTORS:
        value = _times(learning_rate, FACTORS[rate](steps))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    parts.append(_optimizer(value, steps, optimizer, momentum, peak, trough))
    if rate == "plateau":
        window = max(1, steps // 100)
        parts.append(
            optax.contrib.reduce_on_plateau(
                patience=max(1, round(patience * steps / window)), accumulation_size=window
            )
        )
    return optax.chain(*parts)


def _times(learning_rate: Any, factor: optax.Schedule) -> optax.Schedule:
    return lambda count: learning_rate * factor(count)


def _optimizer(
    learning_rate: Any, steps: int, optimizer: str, momentum: str, peak: float, trough: float
) -> optax.GradientTransformation:
    if momentum == "demon":
        if optimizer == "sgd":
            return oa.demon_sgd(learning_rate, peak, decay_steps=steps)
        return oa.demon_adam(learning_rate, peak, decay_steps=steps, nu_bias_correction=True)
    argument, factory = {"sgd": ("momentum", optax.sgd), "adam": ("b1", optax.adam)}[optimizer]
    # The state tells what is scheduled.
    schedules = {"learning_rate": learning_rate} if callable(learning_rate) else {}
    constants = {} if schedules else {"learning_rate": learning_rate}
    if momentum == "constant":
        constants[argument] = peak
        build = oa.with_schedules(factory, **schedules) if schedules else factory
        return build(**constants)
    if momentum == "onecycle":
        schedule = oa.momentum_onecycle_schedule(
            max(4, steps), peak, trough, rise_fraction=0.5, cycle_fraction=1.0
        )
    else:
        schedule = _times(peak, FACTORS[momentum](steps))
    return oa.with_schedules(factory, **schedules, **{argument: schedule})(**constants)


def _total_steps(context: Context) -> dict[str, Any]:
    return {"total_steps": context.total_steps}


def entry(name: str, summary: str, optimizer: str, **settings: Any) -> Method:
    """A rival of Demon as an entry of the catalogue.

    Args:
      name: its name.
      summary: what it does, in one line.
      optimizer: ``"sgd"`` or ``"adam"``.
      **settings: arguments of `scheduled`.

    Returns:
      The entry.
    """
    if optimizer == "sgd":
        rates = SGD_RATES
    elif settings.get("momentum") == "demon":
        rates = DEMON_ADAM_RATES
    else:
        falls = settings.get("rate") == "step" or settings.get("rate") in FACTORS
        rates = FALLING_ADAM_RATES if falls else ADAM_RATES
    return Method(
        name=name,
        family="schedules",
        summary=summary,
        paper=Paper("Chen et al., 2022", "https://arxiv.org/abs/1910.04952"),
        fidelity="Optax",
        base=optimizer,
        learning_rates=rates,
        factory=functools.partial(scheduled, optimizer=optimizer, **settings),
        from_context=_total_steps,
    )


# The rates' schedules that no other family has.
SCHEDULES = (
    *(
        entry(f"{rate}_{optimizer}", f"{title}, {words}", optimizer, rate=rate)
        for optimizer, title in (("sgd", "SGD"), ("adam", "Adam"))
        for rate, words in (
            ("step", "the rate divided by ten at 50 % and at 75 % of the run"),
            ("cosine", "the rate to 0 by a cosine"),
            ("linear", "the rate to 0 linearly"),
            ("exponential", "the rate times exp(-5 t / T)"),
            ("plateau", "the rate divided by ten where the training loss stays"),
        )
    ),
    entry(
        "onecycle_adam",
        "Adam, one cycle of the rate and the opposite one of the first moment's decay",
        *("adam",),
        rate="onecycle",
        momentum="onecycle",
        peak=0.95,
    ),
)
