"""What an entry of the catalogue is: a method, where it comes from and how it is built."""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_accel as oa
from optax_accel.curvature.block_tracker import SHORTEST_PERIOD

# The costs that the catalogue states are those of a linear layer and ten classes.
_LAYER = {"w": jax.ShapeDtypeStruct((128, 64), jnp.float32)}
_CLASSES = 10
# Where nobody says how long an epoch is, as where steps are timed.
STEPS_PER_EPOCH = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may need to know about a run besides its learning rate.

    Attributes:
      total_steps: length of the run, at which schedules end.
      num_classes: number of classes; the dominant subspace has one direction per class (Gur-Ari
        et al., 2018).
      steps_per_epoch: number of steps in an epoch.
      seed: seed of the method's own randomness.
      axis_name: mesh axis of the workers, for methods with `Method.per_worker`; None for a single
        worker.
      num_workers: size of that axis.
      objective: the loss of a batch like those of the run, for methods with
        `Method.needs_objective`.
      likelihood: what the objective's outputs parametrize, such as ``"categorical"``; None lets
        the loss decide.
    """

    total_steps: int
    num_classes: int
    steps_per_epoch: int = STEPS_PER_EPOCH
    seed: int = 0
    axis_name: str | None = None
    num_workers: int = 1
    objective: oa.Objective | None = None
    likelihood: Any = None


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Attributes:
      authors: authors and year.
      link: address of the paper, or the method's name in Optax's documentation.
    """

    authors: str
    link: str


class Phase(NamedTuple):
    """Steps of a run that are alike.

    Attributes:
      share: their share of the steps of a long run.
      refresh: the argument ``refresh`` of their updates.
    """

    share: float
    refresh: bool | str | None = None


# Families whose update evaluates the network itself.
_EVALUATING = (
    "extragradient",
    "forward gradient",
    "gradient norm",
    "natural gradient",
    "sampled products",
)


def _nothing(context: Context) -> Mapping[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of the catalogue.

    Attributes:
      name: its name on the command line.
      family: the kind of method, under which the catalogue lists it.
      summary: what it does, in one line.
      paper: where it comes from.
      fidelity: ``"Optax"``, ``"faithful"``, ``"as public code"`` or ``"our reading"``.
      base: name of the method that it modifies and that its time is compared with; None for a
        method that modifies no other.
      learning_rates: the grid that it is tuned on.
      factory: makes the optimizer from a learning rate and keyword arguments.
      from_context: the keyword arguments of `factory` that depend on the run.
      gradients_per_step: mini-batch gradients that a step takes.
      tracker: how it follows the dominant subspace; None if it does not.
      period: number of steps after which the forms of the step (`refresh`) repeat, and by which
        those of the start are over; of a tracker that chooses its periods, the longest one.
      per_worker: whether each worker keeps a state of its own and takes its own gradient.
      needs_objective: whether it finds the layers of the network in the objective (K-FAC).
      time_targets: highest ratios to the base's time that this project accepts, by what is timed:
        ``"update"``, a training ``"step"``, a ``"cycle"`` of steps with one refresh of everything
        (K-FAC), a step ``"between"`` refreshes.
      first_step: what the first step takes, compilation and cold start included, in first steps of
        Adam: measured on the GPT of `experiments.bench`, for methods that are far from 1; else
        None.
    """

    name: str
    family: str
    summary: str
    paper: Paper
    fidelity: str
    base: str | None = None
    learning_rates: tuple[float, ...]
    factory: Callable[..., optax.GradientTransformation]
    from_context: Callable[[Context], Mapping[str, Any]] = _nothing
    gradients_per_step: int = 1
    tracker: oa.Tracker | None = None
    period: int = 1
    per_worker: bool = False
    needs_objective: bool = False
    time_targets: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    first_step: float | None = None

    @property
    def refresh_every(self) -> int | Literal["adaptive"] | None:
        """Steps between refreshes of the dominant subspace; None without one."""
        return None if self.tracker is None else self.tracker.refresh_every

    @property
    def evaluates_network(self) -> bool:
        """Whether every update evaluates the network itself, not only where it refreshes."""
        return self.family in _EVALUATING or self.gradients_per_step > 1

    @property
    def phases(self) -> list[Phase]:
        """The steps of a long run without its cold start, those without a refresh first.

        Example:
          >>> from experiments.methods import METHODS
          >>> METHODS["bulk_sgd"].phases
          [Phase(share=0.95, refresh=False), Phase(share=0.05, refresh='warm')]
        """
        kinds = collections.Counter(self.refresh(self.period + i) for i in range(self.period))
        steps_before_refreshes = sorted(kinds.items(), key=lambda item: bool(item[0]))
        return [Phase(number / self.period, kind) for kind, number in steps_before_refreshes]

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the hyperparameters that `build` accepts."""
        return tuple(inspect.signature(self.factory).parameters)[1:]

    def build(
        self,
        learning_rate: Any,
        *,
        total_steps: int,
        num_classes: int,
        steps_per_epoch: int = STEPS_PER_EPOCH,
        seed: int = 0,
        axis_name: str | None = None,
        num_workers: int = 1,
        objective: oa.Objective | None = None,
        likelihood: Any = None,
        **settings: Any,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer for one run.

        Args:
          learning_rate: a float, a schedule or a traced scalar.
          total_steps: length of the run, at which schedules end.
          num_classes: number of classes; the dominant subspace has one direction per class.
          steps_per_epoch: number of steps in an epoch.
          seed: seed of the method's own randomness.
          axis_name: mesh axis of the workers, for methods with `per_worker`; ``None`` for a single
            worker.
          num_workers: size of that axis.
          objective: the loss of a batch like those of the run, for methods with `needs_objective`.
          likelihood: what the objective's outputs parametrize, such as ``"categorical"``; ``None``
            lets the loss decide.
          **settings: further hyperparameters by name, such as ``damping=0.03``, in place of the
            catalogue's values; `settings` lists the names.

        Returns:
          A transformation that takes any extra argument.

        Raises:
          ValueError: the method needs an objective and has none, or does not know a setting.

        Example:
          >>> from experiments.methods import METHODS
          >>> sgd = METHODS["sgd"].build(0.1, total_steps=100, num_classes=10, nesterov=True)
          >>> METHODS["hessian_free"].settings[:3]
          ('damping', 'damping_factor', 'max_iterations')
        """
        if self.needs_objective and objective is None:
            raise ValueError("K-FAC finds the layers in the objective; build it with `objective=`")
        unknown = [name for name in settings if name not in self.settings]
        if unknown:
            raise ValueError(
                f"method {self.name} has no setting {unknown[0]!r}; its settings are "
                f"{', '.join(self.settings) or 'none but the learning rate'}"
            )
        context = Context(
            total_steps=total_steps,
            num_classes=num_classes,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            axis_name=axis_name,
            num_workers=num_workers,
            objective=objective,
            likelihood=likelihood,
        )
        arguments = {**self.from_context(context), **settings}
        return optax.with_extra_args_support(self.factory(learning_rate, **arguments))

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed on demand, so that other processes can be sent an entry."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _on_a_linear_layer(self) -> Callable[[int], optax.GradientTransformationExtraArgs]:
        """The optimizer of `_LAYER` by steps per epoch: periods and sizes can be read from it."""
        objective = oa.Objective(lambda params: jnp.zeros((1, 128)) @ params["w"], jnp.sum)
        arguments: dict[str, Any] = {"total_steps": 100, "num_classes": _CLASSES}

        @functools.cache
        def build(steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
            arguments["steps_per_epoch"] = steps_per_epoch
            with jax.transfer_guard("allow"):  # the first to ask may be a guarded training loop
                return self.build(0.1, objective=objective, **arguments)

        return build

    def refresh(
        self, step: int, *, cold_start: bool = True, steps_per_epoch: int = STEPS_PER_EPOCH
    ) -> bool | str | None:
        """The static ``refresh`` argument of the update at a step, known before the run.

        A tracker that chooses its periods is planned at the shortest one: the most that it costs.
        A run asks `schedule` instead.

        Args:
          step: zero-based training step.
          cold_start: whether the first estimate of the subspace comes from Lanczos iterations,
            rather than growing from a random basis over the first ten steps.
          steps_per_epoch: number of steps in an epoch, as for `build`.

        Returns:
          What :func:`optax_accel.refresh_at` says about the optimizer with the catalogue's
          settings; None for a method without curvature.

        Example:
          >>> from experiments.methods import METHODS
          >>> [METHODS["bulk_sgd"].refresh(step) for step in (0, 1, 20)]
          ['cold', False, 'warm']
        """
        if self.refresh_every == "adaptive":
            return oa.refresh_at(step, refresh_every=SHORTEST_PERIOD, cold_start=cold_start)
        tx = self._on_a_linear_layer(steps_per_epoch)
        refresh = oa.refresh_at(step, tx, cold_start=cold_start)
        assert not isinstance(refresh, oa.Refresh)  # as no entry has a tracker and K-FAC
        return refresh

    def schedule(
        self, *, cold_start: bool = True, steps_per_epoch: int = STEPS_PER_EPOCH
    ) -> Callable[[int, Any], Any]:
        """The ``refresh`` argument of each update of one run, or of runs stepped together.

        A tracker that chooses its periods says in its state when it is due; of several runs the
        first one that is due refreshes all of them. For other methods it is what `refresh` gives.

        Args:
          cold_start: as for `refresh`.
          steps_per_epoch: as for `refresh`.

        Returns:
          A function of the zero-based step and of the state before it, which contains that of the
          optimizer.
        """
        with jax.transfer_guard("allow"):
            tx = self._on_a_linear_layer(steps_per_epoch)
            return oa.RefreshSchedule(tx, cold_start=cold_start)

    def products(self, refresh: Any, params: Any, num_classes: int) -> int:
        """Hessian-vector products that an update takes.

        Args:
          refresh: the argument ``refresh`` of the update.
          params: the parameters, or their shapes.
          num_classes: number of classes; the dominant subspace has one direction per class.

        Returns:
          Their number, 0 for a method without a tracker.
        """
        if not refresh or self.tracker is None:
            return 0
        return self.tracker.num_products(params, num_classes, cold=refresh == "cold")

    def extra_cost(self) -> str:
        """What a step takes besides one gradient of its batch, in words.

        Returns:
          Further gradients, Hessian-vector products of a (warm) refresh with ten classes, the size
          of the optimizer's state in copies of the parameters, and what the first step takes.
        """
        shapes = jax.eval_shape(self._on_a_linear_layer(STEPS_PER_EPOCH).init, _LAYER)
        state = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / _LAYER["w"].size
        costs = [f"state {state:.3g} x the parameters"]
        if self.first_step is not None:
            costs.append(f"the first step {self.first_step:g} x that of Adam")
        if self.gradients_per_step > 1:
            costs.insert(0, f"{self.gradients_per_step} gradients a step")
        if products := self.products("warm", _LAYER, _CLASSES):
            noun = "product" if products == 1 else "products"
            every: Any = self.refresh_every
            if every == "adaptive":
                every = f"{SHORTEST_PERIOD} to {self.period}"
            rhythm = "step" if every == 1 else f"{every} steps"
            costs.insert(0, f"{products} Hessian-vector {noun} every {rhythm}")
        return ", ".join(costs)
