"""The library's optimizers, as the tests that all of them have to pass build them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import optax

import optax_accel as oa
from tests.helpers import least_squares

PROBLEM = least_squares()
K = PROBLEM.num_directions
NUM_STEPS = 60
SGD_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)


@dataclasses.dataclass(frozen=True)
class Case:
    """One method and the part of the parameters that it optimizes.

    Attributes:
      name: the name of its factory, then what distinguishes it from other cases of that factory.
      build: the optimizer from a learning rate, a float or a traced scalar.
      rates: learning rates; the three lowest make losses fall, one of them all makes them small.
      optimizes: a name in `test_gauntlet.PARTS`: the rest of the parameters it must not touch.
      refresh: the argument of that name at a step of a loop that is driven from the host.
      factors: whether that refreshes K-FAC's factors and not a basis.
      matrices: whether it needs a parameter of two axes or more.
      slow: whether it is a variant of what another case covers.
    """

    name: str
    build: Callable[[Any], optax.GradientTransformationExtraArgs]
    rates: tuple[float, ...] = SGD_RATES
    optimizes: str = "everything"
    refresh: Callable[[int], bool | str | None] | None = None
    factors: bool = False
    matrices: bool = False
    slow: bool = False

    @property
    def basis(self) -> bool:
        """Whether it follows a dominant subspace."""
        return self.refresh is not None and not self.factors


momentum_sgd = functools.partial(optax.sgd, momentum=0.9)


def subspace(name: str, factory: Any, tracker: oa.Tracker, **kwargs: Any) -> Case:
    optimizes, slow = kwargs.pop("optimizes", "everything"), kwargs.pop("slow", False)
    return Case(
        name,
        lambda rate: factory(
            learning_rate=rate, num_directions=K, base=momentum_sgd, tracker=tracker, **kwargs
        ),
        optimizes=optimizes,
        refresh=lambda step: oa.refresh_at(step, tracker.refresh_every),
        slow=slow,
    )


def natural(factory: Any) -> Case:
    def build(rate: Any) -> optax.GradientTransformationExtraArgs:
        return factory(learning_rate=rate, objective=PROBLEM.objective(), inverses_every=10)

    return Case(
        factory.__name__,
        build,
        rates=(0.001, 0.003, 0.01, 0.03, 0.1),
        refresh=lambda step: oa.refresh_at(step, build(0.0)),
        factors=True,
    )


def cycles(rate: Any) -> optax.GradientTransformationExtraArgs:
    schedule = oa.cyclical_schedule(rate / 4, rate, NUM_STEPS // 8)
    return optax.with_extra_args_support(momentum_sgd(schedule))


def one_cycle(rate: Any) -> optax.GradientTransformationExtraArgs:
    cycle = oa.onecycle(NUM_STEPS, rate)
    return optax.with_extra_args_support(oa.with_schedules(optax.sgd, **cycle._asdict())())


OPTIMIZERS = (
    Case("demon_sgd", lambda rate: oa.demon_sgd(rate, decay_steps=NUM_STEPS)),
    Case(
        "demon_adam",
        lambda rate: oa.demon_adam(rate, decay_steps=NUM_STEPS, nu_bias_correction=True),
        (0.00003, 0.0001, 0.0003, 0.001, 0.003),
    ),
    Case(
        "demon_adam ema",
        lambda rate: oa.demon_adam(rate, decay_steps=NUM_STEPS, form="ema"),
        ADAM_RATES,
    ),
    Case("qhm", lambda rate: oa.qhm(rate, beta=0.9), (0.03, 0.1, 0.3, 1.0, 3.0)),
    Case("qh_adam", oa.qh_adam, ADAM_RATES),
    Case("aggmo", oa.aggmo),
    Case(
        "anderson_acceleration",
        lambda rate: oa.anderson_acceleration(optax.sgd(rate), 3, ridge=0.01),
    ),
    Case("yellowfin", oa.yellowfin, (0.1, 0.3, 1.0, 3.0, 10.0)),
    Case(
        "galore",
        lambda rate: oa.galore(rate, 1, refresh_every=2, scale=1.0),
        (0.001, 0.003, 0.01, 0.03, 0.1),
        matrices=True,
    ),
    Case(
        "adarankgrad",
        lambda rate: oa.adarankgrad(rate, 2, refresh_every=2, scale=1.0),
        (0.001, 0.003, 0.01, 0.03, 0.1),
        matrices=True,
    ),
    Case("sift", lambda rate: oa.sift(rate, 1.0), ADAM_RATES),
    Case(
        "sharpness_directed",
        lambda rate: oa.sharpness_directed(
            momentum_sgd(rate), sparsity=0.5, prune_step=100, refresh_every=2
        ),
    ),
    Case("gradsamp", lambda rate: oa.gradsamp(momentum_sgd(rate), 5, scale=0.1)),
    Case("stoch_grad_adam", lambda rate: oa.stoch_grad_adam(rate, rate=0.8, key=0), ADAM_RATES),
    subspace("bulk_sgd", oa.bulk_sgd, oa.BlockTracker(), optimizes="bulk"),
    subspace(
        "bulk_sgd round robin", oa.bulk_sgd, oa.RoundRobinTracker(), optimizes="bulk", slow=True
    ),
    subspace("bulk_sgd gradient", oa.bulk_sgd, oa.GradientTracker(), optimizes="weights"),
    subspace("dom_sgd", oa.dom_sgd, oa.BlockTracker(), optimizes="dominant"),
    subspace(
        "interpolated_sgd",
        oa.interpolated_sgd,
        oa.BlockTracker(),
        dominant_weight=0.5,
        bulk_weight=1.0,
        slow=True,
    ),
    Case("extrap_sgd", oa.extrap_sgd),
    Case("extrap_sgd past", lambda rate: oa.extrap_sgd(rate, direction="past")),
    Case("extra_adam", oa.extra_adam, ADAM_RATES),
    Case("adabound", oa.adabound, ADAM_RATES),
    Case("adabound amsbound", lambda rate: oa.adabound(rate, amsbound=True), ADAM_RATES, slow=True),
    Case("cyclical_schedule", cycles),
    Case("onecycle", one_cycle),
    Case(
        "reparametrize weight_norm",
        lambda rate: oa.reparametrize(momentum_sgd(rate), oa.weight_norm()),
    ),
    Case(
        "reparametrize weight_norm adam",
        lambda rate: oa.reparametrize(optax.adam(rate), oa.weight_norm()),
        ADAM_RATES,
        slow=True,
    ),
    Case(
        "reparametrize powerprop",
        lambda rate: oa.reparametrize(momentum_sgd(rate), oa.powerprop(2.0)),
    ),
    Case(
        "sampled_product_gradients",
        lambda rate: optax.chain(
            oa.sampled_product_gradients(
                0.5, min_samples=1, where="backward", method="bernoulli", uniform="k/n"
            ),
            momentum_sgd(rate),
        ),
    ),
    Case(
        "forward_gradient",
        lambda rate: oa.forward_gradient(momentum_sgd(rate), num_samples=8),
        (0.003, 0.01, 0.03, 0.1, 0.3),
    ),
    Case("gnp", lambda rate: oa.gnp(momentum_sgd(rate), rho=0.1, alpha=0.8)),
    Case("gnp sharpness", lambda rate: oa.gnp(momentum_sgd(rate), rho=0.05, alpha=1.0), slow=True),
    natural(oa.kfac),
    natural(oa.ekfac),
    Case(
        "hessian_free",
        lambda rate: oa.hessian_free(rate, max_iterations=10),
        (0.03, 0.1, 0.3, 0.5, 1.0),
    ),
    Case(
        "batch_gauss_newton",
        lambda rate: oa.batch_gauss_newton(rate, damping=1e-3, max_iterations=10),
        (0.03, 0.1, 0.3, 0.5, 1.0),
    ),
)

# Methods whose workers keep a state of their own; built from a learning rate, the name of the axis
# of the workers (None: there is one) and their number.
PER_WORKER: dict[str, Callable[[Any, str | None, int], optax.GradientTransformationExtraArgs]] = {
    "extrap_sgd local": lambda rate, axis_name, _: oa.extrap_sgd(rate, axis_name=axis_name),
    "extrap_sgd past local": lambda rate, axis_name, _: oa.extrap_sgd(
        rate, direction="past", axis_name=axis_name
    ),
    "post_local_sgd": lambda rate, axis_name, _: oa.post_local_sgd(
        momentum_sgd(rate, nesterov=True), local_steps=3, switch_step=30, axis_name=axis_name
    ),
    # Symmetric: DecentLaM with momentum 0.9 diverges on the directed graph.
    "decentlam": lambda rate, axis_name, size: oa.decentlam(
        rate, topology=oa.topologies.exponential(size, symmetric=True), axis_name=axis_name
    ),
    "dmsgd": lambda rate, axis_name, size: oa.dmsgd(
        rate, topology=oa.topologies.exponential(size, symmetric=True), axis_name=axis_name
    ),
}
