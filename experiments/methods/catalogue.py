"""The catalogue: every method that the experiments can run, ours and Optax's, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_accel as oa

# Every method is tuned on a grid of this many rates, in steps of about 3 (the multiples of Chen et
# al., 2022, section 4): an equal budget.
SGD_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
# Demon Adam in the paper's form takes steps about ten times Adam's at the same rate.
DEMON_ADAM_RATES = (0.00003, 0.0001, 0.0003, 0.001, 0.003)
# Steps between two inversions of K-FAC's factors.
KFAC_PERIOD = 10
# Cycles of the schedule of snapshot ensembles (Huang et al., 2017, section 4).
NUM_SNAPSHOTS = 5
# Of the step to where the quadratic model is lowest.
HESSIAN_FREE_RATES = (0.03, 0.1, 0.3, 0.5, 1.0)
# Up to 0.1, the rate of Pauloski et al., 2020, whose KL clip comes with it.
KFAC_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
# AdaGrad's steps shrink, AdaDelta's are scaled by themselves: its paper has no rate, that is 1.
ADAGRAD_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
ADADELTA_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method may need to know of a run besides its learning rate.

    Attributes:
      total_steps: length of the run; schedules end there.
      num_classes: the dominant subspace has one direction a class (Gur-Ari et al., 2018).
      seed: of the method's own randomness.
      axis_name: axis of the workers, for methods with `Method.per_worker`; None: a single worker.
      num_workers: size of that axis.
      objective: the loss of a batch like those of the run, for methods with
        `Method.needs_objective`.
      likelihood: what its outputs are, see `optax_accel.kfac`; None: the loss decides.
    """

    total_steps: int
    num_classes: int
    seed: int = 0
    axis_name: str | None = None
    num_workers: int = 1
    objective: oa.Objective | None = None
    likelihood: Any = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One entry of the catalogue.

    Attributes:
      name: on the command line.
      family: what the method does.
      summary: one line.
      paper: authors and year.
      link: to the paper, or to Optax's documentation name.
      fidelity: ``"Optax"``, ``"faithful"``, ``"as public code"`` or ``"our reading"``.
      base: name of the method it modifies, which its time is compared with; None: itself a base.
      learning_rates: the grid it is tuned on.
      make: the optimizer from a learning rate and a :class:`Context`.
      gradients_per_step: mini-batch gradients a step.
      tracker: how it follows the dominant subspace; None: it does not.
      per_worker: each worker keeps a state of its own and takes its own gradient.
      needs_objective: it finds the layers of the network in the objective (K-FAC).
    """

    name: str
    family: str
    summary: str
    paper: str
    link: str
    fidelity: str
    base: str | None
    learning_rates: tuple[float, ...]
    make: Callable[[Any, Context], optax.GradientTransformation]
    gradients_per_step: int = 1
    tracker: oa.Tracker | None = None
    per_worker: bool = False
    needs_objective: bool = False

    @property
    def period(self) -> int:
        """After so many steps the forms of the step (`refresh`) come again."""
        return KFAC_PERIOD if self.needs_objective else self.refresh_every or 1

    @property
    def refresh_every(self) -> int | None:
        """Steps between refreshes of the dominant subspace; None without one."""
        return None if self.tracker is None else self.tracker.refresh_every

    def build(
        self,
        learning_rate: Any,
        *,
        total_steps: int,
        num_classes: int,
        seed: int = 0,
        axis_name: str | None = None,
        num_workers: int = 1,
        objective: oa.Objective | None = None,
        likelihood: Any = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer for one run.

        Args:
          learning_rate: a float, a schedule or a traced scalar.
          total_steps: length of the run; schedules end there.
          num_classes: the dominant subspace has one direction a class.
          seed: of the method's own randomness.
          axis_name: axis of the workers, for methods with `per_worker`; ``None``: a single worker.
          num_workers: size of that axis.
          objective: the loss of a batch like those of the run, for methods with `needs_objective`.
          likelihood: what the objective's outputs are, such as ``"categorical"``; ``None``: the
            loss decides.

        Returns:
          A transformation that takes any extra argument.
        """
        context = Context(
            total_steps, num_classes, seed, axis_name, num_workers, objective, likelihood
        )
        return optax.with_extra_args_support(self.make(learning_rate, context))

    def refresh(self, step: int, *, cold_start: bool = True) -> bool | str | None:
        """The static ``refresh`` argument of the update at a step; None without curvature.

        Args:
          step: zero-based training step.
          cold_start: as in :func:`optax_accel.refresh_at`.
        """
        if self.needs_objective:
            return oa.kfac_refresh_at(step, 1, KFAC_PERIOD)
        if self.refresh_every is None:
            return None
        return oa.refresh_at(step, self.refresh_every, cold_start=cold_start)

    def products(self, refresh: bool | str | None, params: Any, num_classes: int) -> int:
        """Hessian-vector products that an update with this ``refresh`` argument makes."""
        if not refresh or self.tracker is None:
            return 0
        return self.tracker.num_products(params, num_classes, cold=refresh == "cold")

    def extra_cost(self, num_classes: int = 10) -> str:
        """What a step takes besides one gradient of its batch, in words.

        Args:
          num_classes: the dominant subspace has one direction a class.

        Returns:
          Further gradients, Hessian-vector products of a (warm) refresh, and the size of the
          optimizer's state in copies of the parameters.
        """
        params = {"w": jax.ShapeDtypeStruct((128, 64), jnp.float32)}
        linear = oa.Objective(lambda params: jnp.zeros((1, 128)) @ params["w"], jnp.sum)
        tx = self.build(0.1, total_steps=100, num_classes=num_classes, objective=linear)
        shapes = jax.eval_shape(tx.init, params)
        state = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / params["w"].size
        costs = [f"state {state:.3g} x the parameters"]
        if self.gradients_per_step > 1:
            costs.insert(0, f"{self.gradients_per_step} gradients a step")
        if products := self.products("warm", params, num_classes):
            noun = "product" if products == 1 else "products"
            rhythm = "step" if self.refresh_every == 1 else f"{self.refresh_every} steps"
            costs.insert(0, f"{products} Hessian-vector {noun} every {rhythm}")
        return ", ".join(costs)


_MOMENTUM = functools.partial(optax.sgd, momentum=0.9)
_DEMON = ("Chen et al., 2022", "https://arxiv.org/abs/1910.04952")
_SONG = ("Song et al., 2025", "https://arxiv.org/abs/2405.16002")
_ZAKARIN = ("Zakarin and Singh, 2025", "https://arxiv.org/abs/2505.11972")
_YUN = ("Yun, 2023", "https://arxiv.org/abs/2310.17042")
_LIN = ("Lin et al., 2020", "https://arxiv.org/abs/2006.05720")
_YUAN = ("Yuan et al., 2021", "https://arxiv.org/abs/2104.11981")
_LOCAL = ("Lin et al., 2020 (local SGD)", "https://arxiv.org/abs/1808.07217")
_SMITH = ("Smith, 2017", "https://arxiv.org/abs/1506.01186")
_TOPIN = ("Smith and Topin, 2017", "https://arxiv.org/abs/1708.07120")
_LUO = ("Luo et al., 2019", "https://arxiv.org/abs/1902.09843")
_ZHAO = ("Zhao et al., 2022", "https://arxiv.org/abs/2202.03599")
_FORET = ("Foret et al., 2021", "https://arxiv.org/abs/2010.01412")
_SALIMANS = ("Salimans and Kingma, 2016", "https://arxiv.org/abs/1602.07868")
_SCHWARZ = ("Schwarz et al., 2021", "https://arxiv.org/abs/2110.00296")
_MARTENS = ("Martens and Grosse, 2015", "https://arxiv.org/abs/1503.05671")
_GEORGE = ("George et al., 2018", "https://arxiv.org/abs/1806.03884")
_GIDEL = ("Gidel et al., 2019", "https://arxiv.org/abs/1802.10551")


def _momentum_schedule(schedule: Callable[[int], optax.Schedule]) -> Callable[[Any, Context], Any]:
    """SGD with a momentum schedule made from the number of steps: a rival of Demon."""

    def make(learning_rate: Any, context: Context) -> optax.GradientTransformation:
        momentum = schedule(context.total_steps)
        return oa.with_schedules(optax.sgd, momentum=momentum)(learning_rate)

    return make


def _cyclical(mode: Any) -> Callable[[Any, Context], Any]:
    """Four cycles between a quarter of the learning rate and the learning rate."""

    def make(learning_rate: Any, context: Context) -> optax.GradientTransformation:
        # Smith, 2017, sections 3.2 and 3.3; the decay to a tenth over the run is ours.
        gamma = 0.1 ** (1 / context.total_steps) if mode == "exp_range" else None
        half = max(1, context.total_steps // 8)
        return _MOMENTUM(
            oa.cyclical_schedule(learning_rate / 4, learning_rate, half, mode=mode, gamma=gamma)
        )

    return make


def _onecycle(interpolation: Any) -> Callable[[Any, Context], Any]:
    def make(learning_rate: Any, context: Context) -> optax.GradientTransformation:
        steps = max(4, context.total_steps)  # in fewer the corners coincide
        cycle = oa.onecycle(steps, learning_rate, interpolation=interpolation)
        return oa.with_schedules(optax.sgd, **cycle._asdict())()

    return make


def _vtpc_sgd(learning_rate: Any, context: Context) -> optax.GradientTransformation:
    cycle = max(1, context.total_steps // 4)
    return _MOMENTUM(
        oa.vtpc_schedule(
            learning_rate / 4, learning_rate, cycle, 4, floor_value=learning_rate / 100
        )
    )


def _snapshot_sgd(learning_rate: Any, context: Context) -> optax.GradientTransformation:
    steps = context.total_steps
    return _MOMENTUM(oa.snapshot_schedule(learning_rate, steps, min(steps, NUM_SNAPSHOTS)))


def _kfac(factory: Callable[..., Any]) -> Callable[[Any, Context], Any]:
    def make(learning_rate: Any, context: Context) -> optax.GradientTransformation:
        if context.objective is None:
            raise ValueError("K-FAC finds the layers in the objective; build it with `objective=`")
        return factory(
            learning_rate,
            context.objective,
            inverses_every=KFAC_PERIOD,
            likelihood=context.likelihood,
            key=context.seed,
        )

    return make


def _post_local_sgd(learning_rate: Any, context: Context) -> optax.GradientTransformation:
    """Local in the second half, as in the public code; its 32 local steps only in long runs."""
    half = context.total_steps // 2
    return oa.post_local_sgd(
        _MOMENTUM(learning_rate, nesterov=True),
        local_steps=max(1, min(32, half // 8)),  # at least 8 averagings
        switch_step=half,
        axis_name=context.axis_name,
    )


def _graph(context: Context) -> oa.topologies.Topology:
    # Symmetric: DecentLaM with momentum 0.9 diverges on the directed one.
    return oa.topologies.exponential(context.num_workers, symmetric=True)


_BLOCK, _ROUND_ROBIN, _GRADIENT = oa.BlockTracker(), oa.RoundRobinTracker(), oa.GradientTracker()

_ALL = (
    Method(
        "sgd",
        "base",
        "SGD with momentum 0.9",
        "Sutskever et al., 2013",
        "optax.sgd",
        "Optax",
        None,
        SGD_RATES,
        lambda lr, c: _MOMENTUM(lr),
    ),
    Method(
        "plain_sgd",
        "base",
        "SGD without momentum",
        "Robbins and Monro, 1951",
        "optax.sgd",
        "Optax",
        None,
        SGD_RATES,
        lambda lr, c: optax.sgd(lr),
    ),
    Method(
        "nesterov_sgd",
        "base",
        "SGD with Nesterov momentum 0.9",
        "Nesterov, 1983",
        "optax.sgd",
        "Optax",
        "sgd",
        SGD_RATES,
        lambda lr, c: _MOMENTUM(lr, nesterov=True),
    ),
    Method(
        "adam",
        "base",
        "Adam",
        "Kingma and Ba, 2015",
        "optax.adam",
        "Optax",
        None,
        ADAM_RATES,
        lambda lr, c: optax.adam(lr),
    ),
    Method(
        "adagrad",
        "adaptive rates",
        "AdaGrad",
        "Duchi et al., 2011",
        "optax.adagrad",
        "Optax",
        "adam",
        ADAGRAD_RATES,
        lambda lr, c: optax.adagrad(lr),
    ),
    Method(
        "adadelta",
        "adaptive rates",
        "AdaDelta",
        "Zeiler, 2012",
        "optax.adadelta",
        "Optax",
        "adam",
        ADADELTA_RATES,
        lambda lr, c: optax.adadelta(lr),
    ),
    Method(
        "rmsprop",
        "adaptive rates",
        "RMSProp",
        "Tieleman and Hinton, 2012",
        "optax.rmsprop",
        "Optax",
        "adam",
        ADAM_RATES,
        lambda lr, c: optax.rmsprop(lr),
    ),
    Method(
        "adamax",
        "adaptive rates",
        "Adam with the largest gradient in place of the second moment",
        "Kingma and Ba, 2015",
        "optax.adamax",
        "Optax",
        "adam",
        ADAM_RATES,
        lambda lr, c: optax.adamax(lr),
    ),
    Method(
        "nadam",
        "adaptive rates",
        "Adam with Nesterov momentum",
        "Dozat, 2016",
        "optax.nadam",
        "Optax",
        "adam",
        ADAM_RATES,
        lambda lr, c: optax.nadam(lr),
    ),
    Method(
        "amsgrad",
        "adaptive rates",
        "Adam with the largest second moment so far",
        "Reddi et al., 2018",
        "optax.amsgrad",
        "Optax",
        "adam",
        ADAM_RATES,
        lambda lr, c: optax.amsgrad(lr),
    ),
    Method(
        "adamw",
        "adaptive rates",
        "Adam with decoupled weight decay 0.0001",
        "Loshchilov and Hutter, 2019",
        "optax.adamw",
        "Optax",
        "adam",
        ADAM_RATES,
        lambda lr, c: optax.adamw(lr),
    ),
    Method(
        "lamb",
        "adaptive rates",
        "Adam with a step length for each layer",
        "You et al., 2020",
        "optax.lamb",
        "Optax",
        "adam",
        ADAM_RATES,
        lambda lr, c: optax.lamb(lr),
    ),
    Method(
        "demon_sgd",
        "momentum decay",
        "SGD with momentum decaying from 0.9 to 0",
        *_DEMON,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.demon_sgd(lr, decay_steps=c.total_steps),
    ),
    Method(
        "demon_adam",
        "momentum decay",
        "Adam with a decaying, summed first moment",
        *_DEMON,
        fidelity="faithful",
        base="adam",
        learning_rates=DEMON_ADAM_RATES,
        make=lambda lr, c: oa.demon_adam(lr, decay_steps=c.total_steps, nu_bias_correction=True),
    ),
    Method(
        "demon_adam_ema",
        "momentum decay",
        "Adam with a decaying, averaged first moment",
        *_DEMON,
        fidelity="our reading",
        base="adam",
        learning_rates=ADAM_RATES,
        make=lambda lr, c: oa.demon_adam(lr, decay_steps=c.total_steps, form="ema"),
    ),
    Method(
        "cosine_momentum_sgd",
        "momentum decay",
        "rival of Demon: momentum 0.9 to 0 by a cosine",
        *_DEMON,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=_momentum_schedule(lambda steps: optax.cosine_decay_schedule(0.9, steps)),
    ),
    Method(
        "linear_momentum_sgd",
        "momentum decay",
        "rival of Demon: momentum 0.9 to 0 linearly",
        *_DEMON,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=_momentum_schedule(lambda steps: optax.linear_schedule(0.9, 0.0, steps)),
    ),
    Method(
        "exponential_momentum_sgd",
        "momentum decay",
        "rival of Demon: momentum 0.9 exp(-5 t / T)",
        *_DEMON,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=_momentum_schedule(
            lambda steps: optax.exponential_decay(0.9, steps, decay_rate=0.006737947)
        ),
    ),
    Method(
        "onecycle_momentum_sgd",
        "momentum decay",
        "rival of Demon: momentum 0.95, 0.85, 0.95",
        *_DEMON,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=_momentum_schedule(
            lambda steps: oa.momentum_onecycle_schedule(
                steps, rise_fraction=0.5, cycle_fraction=1.0
            )
        ),
    ),
    Method(
        "stoch_grad_adam",
        "gradient sampling",
        "Adam on a random 80 % of the gradient entries",
        *_YUN,
        fidelity="as public code",
        base="adam",
        learning_rates=ADAM_RATES,
        make=lambda lr, c: oa.stoch_grad_adam(lr, rate=0.8, key=c.seed),
    ),
    Method(
        "bulk_sgd",
        "Hessian subspace",
        "SGD outside the dominant Hessian subspace",
        *_SONG,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.bulk_sgd(lr, c.num_classes, base=_MOMENTUM),
        tracker=_BLOCK,
    ),
    Method(
        "dom_sgd",
        "Hessian subspace",
        "SGD inside the dominant Hessian subspace (diagnostic)",
        *_SONG,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.dom_sgd(lr, c.num_classes, base=_MOMENTUM),
        tracker=_BLOCK,
    ),
    Method(
        "interpolated_sgd",
        "Hessian subspace",
        "SGD with the dominant component halved",
        *_ZAKARIN,
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.interpolated_sgd(lr, c.num_classes, 0.5, 1.0, base=_MOMENTUM),
        tracker=_BLOCK,
    ),
    Method(
        "bulk_sgd_round_robin",
        "Hessian subspace",
        "Bulk-SGD, one Hessian-vector product at every step",
        *_SONG,
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.bulk_sgd(lr, c.num_classes, base=_MOMENTUM, tracker=_ROUND_ROBIN),
        tracker=_ROUND_ROBIN,
    ),
    Method(
        "bulk_sgd_gradient",
        "Hessian subspace",
        "Bulk-SGD, the subspace from gradients of the mean outputs",
        *_SONG,
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.bulk_sgd(lr, c.num_classes, base=_MOMENTUM, tracker=_GRADIENT),
        tracker=_GRADIENT,
    ),
    Method(
        "extrap_sgd",
        "extragradient",
        "Nesterov SGD on extrapolated gradients",
        *_LIN,
        fidelity="our reading",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.extrap_sgd(lr),
        gradients_per_step=2,
    ),
    Method(
        "extrap_sgd_past",
        "extragradient",
        "the same, extrapolating with the past gradient",
        *_LIN,
        fidelity="our reading",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.extrap_sgd(lr, direction="past"),
    ),
    Method(
        "extra_adam",
        "extragradient",
        "two Adam half-steps that share their moments",
        *_GIDEL,
        fidelity="faithful",
        base="adam",
        learning_rates=ADAM_RATES,
        make=lambda lr, c: oa.extra_adam(lr),
        gradients_per_step=2,
    ),
    Method(
        "optimistic_sgd",
        "extragradient",
        "optimistic gradient descent",
        "Mokhtari et al., 2020",
        "optax.optimistic_gradient_descent",
        "Optax",
        "plain_sgd",
        SGD_RATES,
        lambda lr, c: optax.optimistic_gradient_descent(lr),
    ),
    Method(
        "adabound",
        "adaptive rates",
        "Adam whose rates are clipped into bounds that close in on SGD's 0.1",
        *_LUO,
        fidelity="faithful",
        base="amsgrad",
        learning_rates=ADAM_RATES,
        make=lambda lr, c: oa.adabound(lr),
    ),
    Method(
        "amsbound",
        "adaptive rates",
        "AMSGrad whose rates are clipped into bounds that close in on SGD's 0.1",
        *_LUO,
        fidelity="faithful",
        base="amsgrad",
        learning_rates=ADAM_RATES,
        make=lambda lr, c: oa.adabound(lr, amsbound=True),
    ),
    Method(
        "cyclical_sgd",
        "cyclical schedules",
        "SGD, the rate up and down in four cycles",
        *_SMITH,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=_cyclical("triangular"),
    ),
    Method(
        "cyclical2_sgd",
        "cyclical schedules",
        "the same, each cycle half as high as the one before",
        *_SMITH,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=_cyclical("triangular2"),
    ),
    Method(
        "exp_range_sgd",
        "cyclical schedules",
        "the same, the height decaying exponentially",
        *_SMITH,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=_cyclical("exp_range"),
    ),
    Method(
        "onecycle_sgd",
        "cyclical schedules",
        "SGD, one cycle of the rate and the opposite one of the momentum",
        *_TOPIN,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=_onecycle("linear"),
    ),
    Method(
        "onecycle_cosine_sgd",
        "cyclical schedules",
        "the same, with cosines",
        *_TOPIN,
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        make=_onecycle("cosine"),
    ),
    Method(
        "vtpc_sgd",
        "cyclical schedules",
        "SGD, variable trapezoidal parity cycles of the rate",
        "Lin et al., 2022",
        "https://doi.org/10.1145/3518781.3519183",
        "our reading",
        "sgd",
        SGD_RATES,
        _vtpc_sgd,
    ),
    Method(
        "snapshot_sgd",
        "cyclical schedules",
        "SGD, five cosine cycles of the rate: a snapshot ensemble's members",
        "Huang et al., 2017",
        "https://arxiv.org/abs/1704.00109",
        "faithful",
        "sgd",
        SGD_RATES,
        _snapshot_sgd,
    ),
    Method(
        "weight_norm_sgd",
        "reparametrization",
        "SGD in lengths and directions of each unit's weights",
        *_SALIMANS,
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.reparametrize(_MOMENTUM(lr), oa.weight_norm()),
    ),
    Method(
        "weight_norm_adam",
        "reparametrization",
        "Adam in lengths and directions of each unit's weights",
        *_SALIMANS,
        fidelity="our reading",
        base="adam",
        learning_rates=ADAM_RATES,
        make=lambda lr, c: oa.reparametrize(optax.adam(lr), oa.weight_norm()),
    ),
    Method(
        "powerprop_sgd",
        "reparametrization",
        "SGD on signed square roots of the weights",
        *_SCHWARZ,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.reparametrize(_MOMENTUM(lr), oa.powerprop(2.0)),
    ),
    Method(
        "gnp_sgd",
        "gradient norm",
        "SGD on the loss and 0.08 times its gradient's norm",
        *_ZHAO,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.gnp(_MOMENTUM(lr), rho=0.1, alpha=0.8),
        gradients_per_step=2,
    ),
    Method(
        "sam_sgd",
        "gradient norm",
        "SGD on the gradient at the worst point 0.05 away (gnp with alpha = 1)",
        *_FORET,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.gnp(_MOMENTUM(lr), rho=0.05, alpha=1.0),
        gradients_per_step=2,
    ),
    Method(
        "kfac",
        "natural gradient",
        "K-FAC with momentum 0.9 and a KL clip, factors at every step, inverses every 10",
        *_MARTENS,
        fidelity="faithful",
        base="sgd",
        learning_rates=KFAC_RATES,
        make=_kfac(oa.kfac),
        gradients_per_step=2,
        needs_objective=True,
    ),
    Method(
        "ekfac",
        "natural gradient",
        "the same with second moments in the factors' eigenbasis (EKFAC)",
        *_GEORGE,
        fidelity="faithful",
        base="sgd",
        learning_rates=KFAC_RATES,
        make=_kfac(oa.ekfac),
        gradients_per_step=2,
        needs_objective=True,
    ),
    Method(
        "hessian_free",
        "natural gradient",
        "damped Gauss-Newton steps by up to ten iterations of conjugate gradients",
        "Martens, 2010",
        "https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf",
        fidelity="our reading",
        base="sgd",
        learning_rates=HESSIAN_FREE_RATES,
        make=lambda lr, c: oa.hessian_free(lr, max_iterations=10),
        gradients_per_step=30,
    ),
    Method(
        "extrap_sgd_local",
        "extragradient",
        "extrap_sgd, each worker extrapolating with its own gradient",
        *_LIN,
        fidelity="our reading",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.extrap_sgd(lr, axis_name=c.axis_name),
        gradients_per_step=2,
        per_worker=True,
    ),
    Method(
        "extrap_sgd_past_local",
        "extragradient",
        "extrap_sgd_past, each worker extrapolating with its own past gradient",
        *_LIN,
        fidelity="our reading",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.extrap_sgd(lr, direction="past", axis_name=c.axis_name),
        per_worker=True,
    ),
    Method(
        "post_local_sgd",
        "local and decentralized steps",
        "Nesterov SGD; after half of the steps parameters are averaged now and then",
        *_LOCAL,
        fidelity="as public code",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        make=_post_local_sgd,
        per_worker=True,
    ),
    Method(
        "decentlam",
        "local and decentralized steps",
        "SGD with momentum 0.9 on the symmetric exponential graph, bias of the momentum removed",
        *_YUAN,
        fidelity="as public code",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.decentlam(lr, topology=_graph(c), axis_name=c.axis_name),
        per_worker=True,
    ),
    Method(
        "dmsgd",
        "local and decentralized steps",
        "rival of DecentLaM: SGD with momentum 0.9 on the symmetric exponential graph",
        *_YUAN,
        fidelity="as public code",
        base="sgd",
        learning_rates=SGD_RATES,
        make=lambda lr, c: oa.dmsgd(lr, topology=_graph(c), axis_name=c.axis_name),
        per_worker=True,
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def get_methods(names: Sequence[str], *, per_worker: bool = True) -> list[Method]:
    """The methods of these names, in their order, each once.

    Args:
      names: names in the catalogue.
      per_worker: whether methods whose workers keep a state of their own can be used.

    Raises:
      ValueError: no name, an unknown one (the message lists the valid ones), or one that cannot be
        used.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        what = f"unknown method {unknown[0]!r}" if unknown else "no method given"
        raise ValueError(f"{what}; valid methods are {', '.join(METHODS)}")
    chosen = [METHODS[name] for name in dict.fromkeys(names)]
    for method in chosen:
        if method.per_worker and not per_worker:
            raise ValueError(
                f"{method.name} needs workers of its own: python -m experiments.train --method "
                f"{method.name} --workers 8"
            )
    return chosen
