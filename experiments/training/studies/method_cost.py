"""What a method costs beside its base: cases for the interleaved timer."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
import optax_accel as oa
from experiments.methods import Method
from experiments.timing import Case
from experiments.training import losses, monitoring, networks
from experiments.training.step import init_state, train_step

COMPILE_TARGET = 2.0  # of methods without curvature, whose step has one form
NATURAL_COMPILE_TARGET = 3.0  # of each form of the step
# Low-rank and sparse methods are timed on a language model, with a range finder, at settings with
# which their state is at most a third of Adam's.
LOW_MEMORY: Mapping[str, Mapping[str, Any]] = {
    "galore": {"rank": 32, "method": "range_finder"},
    "adarankgrad": {"max_rank": 32},
    "sift": {"rate": 0.01},
}
BETWEEN_TARGET, REFRESH_TARGET = 1.15, 3.0  # of their steps without and with a refresh
MONITOR_TARGET = 0.05  # of the training time, at the monitor's default period
BATCH_SIZE = 128
NUM_CLASSES = 10
TOTAL_STEPS = 10_000
LEARNING_RATE = 1e-3


def update_cases(base: str, group: Sequence[Method], parameters: int) -> list[Case]:
    """`update` and `apply_updates` of a base and its methods on a large tree.

    Methods whose update evaluates the network have no cost of their own here and are left out;
    those with a tracker only project, they do not refresh.

    The bytes of a case are those that have to be read and written once: gradient, parameters and
    state. A basis counts once too, although no program can project with fewer than two passes over
    it, because all inner products have to be known before any direction is taken away.

    Args:
      base: name of the base.
      group: the base, then its methods.
      parameters: number of parameters, in ten square matrices.

    Returns:
      The cases, none where only the base is left.
    """
    side = max(1, math.isqrt(parameters // 10))
    keys = jax.random.split(jax.random.key(0), 10)
    grads = {f"matrix_{i}": jax.random.normal(key, (side, side)) for i, key in enumerate(keys)}

    def call(step: int, carry: Any, update: Any) -> Any:
        return update(grads, *carry)

    cases = []
    for method in group:
        if method.evaluates_network:
            continue
        tx = method.build(LEARNING_RATE, total_steps=TOTAL_STEPS, num_classes=NUM_CLASSES)
        extra = {} if method.tracker is None else {"refresh": False, "value_fn": _no_loss}

        def update(
            grads: Any, params: Any, state: Any, tx: Any = tx, extra: dict[str, Any] = extra
        ) -> Any:
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.zeros_like, grads)
        state = jax.jit(tx.init)(params)
        cases.append(
            Case(
                name=method.name,
                base=None if method.name == base else base,
                call=functools.partial(call, update=jax.jit(update, donate_argnums=(1, 2))),
                carry=(params, state),
                period=1,
                target=method.time_targets.get("update"),
                bytes=moved_bytes(update, grads, params, state),
            )
        )
    return cases if len(cases) > 1 else []


def moved_bytes(update: Callable[..., Any], *args: Any) -> int:
    """Bytes that a function has to read and write once, however it is compiled.

    These are its arguments, as far as it uses them, and its results, but for those that are an
    argument passed on: a donated buffer stays where it is.

    Args:
      update: a pure function.
      *args: its arguments, or their shapes.

    Returns:
      The bytes.

    Example:
      >>> x = jnp.zeros(10)
      >>> moved_bytes(lambda x, kept, unused: (x + kept, kept), x, x, x)  # read two, write one
      120
    """
    jaxpr = jax.make_jaxpr(update)(*args).jaxpr
    used = {var for eqn in jaxpr.eqns for var in eqn.invars if not hasattr(var, "val")}
    passed_on = set(jaxpr.invars)
    read = [var for var in jaxpr.invars if var in used]
    written = [var for var in jaxpr.outvars if not hasattr(var, "val") and var not in passed_on]
    return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in read + written)


def copy_case(number: int) -> Case:
    """A pass over an array that reads and writes every entry once: the bandwidth of the device.

    Args:
      number: of float32 entries.
    """
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    return Case("copy", None, lambda step, x: add(x), jnp.zeros(number), period=1, bytes=8 * number)


def _no_loss(params: Any) -> Any:
    raise AssertionError("an update without refresh evaluates no loss")


class Network:
    """A model and a random batch; by default a dense one and images of MNIST's shape.

    Args:
      batch_size: number of examples.
      model: a name of `models.create`.
      input_shape: shape of an example.
      vocabulary_size: number of different tokens, each of which has a target; None for images,
        which have one label each.
      **options: of the model.
    """

    def __init__(
        self,
        batch_size: int = BATCH_SIZE,
        model: str = "mlp",
        input_shape: tuple[int, ...] = (28, 28, 1),
        vocabulary_size: int | None = None,
        **options: Any,
    ):
        random = np.random.default_rng(0)
        self.model, shape = model, (batch_size, *input_shape)
        if vocabulary_size is None:
            sizes: dict[str, Any] = {"num_classes": NUM_CLASSES}
            x = random.random(shape, np.float32)
            y = random.integers(0, NUM_CLASSES, batch_size, np.int32)
        else:
            sizes = {"vocabulary_size": vocabulary_size}
            x, y = (random.integers(0, vocabulary_size, shape, np.int32) for _ in range(2))
        self.batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
        network = models.create(model, input_shape=input_shape, rngs=0, **sizes, **options)
        graphdef, self.params, self.rest = networks.split(network)
        self.objective = networks.objective(graphdef)

    def build(
        self, method: Method, settings: Mapping[str, Any] = MappingProxyType({})
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer of a method for this network, with settings in place of the catalogue's."""
        return method.build(
            LEARNING_RATE,
            total_steps=TOTAL_STEPS,
            num_classes=NUM_CLASSES,
            objective=self.objective.bind(rest=self.rest, **self.batch),
            likelihood=losses.LIKELIHOODS["cross_entropy"],
            **settings,
        )

    def training_step(self, tx: optax.GradientTransformationExtraArgs) -> Any:
        """A new compiled function ``(state, batch, refresh) -> state``, which donates the state."""

        @functools.partial(jax.jit, static_argnames="refresh", donate_argnames="state")
        def step(state: Any, batch: Any, refresh: Any) -> Any:
            return train_step(tx, self.objective, state, batch, refresh=refresh)[0]

        return step

    def step_case(
        self,
        base: str,
        method: Method,
        refresh: Callable[[int], Any],
        *,
        target: float | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Case:
        """Whole periods of training steps, at least ten steps.

        Args:
          base: name of the base.
          method: the method.
          refresh: the argument ``refresh`` from the number of the step.
          target: highest acceptable ratio to the base.
          settings: of the method, in place of the catalogue's.
        """
        tx = self.build(method, settings)
        step = self.training_step(tx)
        return Case(
            name=method.name,
            base=None if method.name == base else base,
            call=lambda i, state: step(state, self.batch, refresh=refresh(i)),
            # Copies: the step donates its state, and the next case starts from the same weights.
            carry=jax.tree.map(jnp.copy, init_state(tx, self.params, self.rest)),
            period=method.period * math.ceil(10 / method.period),
            target=target,
        )


def step_cases(base: str, group: Sequence[Method]) -> list[Case]:
    """Whole training steps of a dense model: batch 128, images of MNIST's shape.

    Args:
      base: name of the base.
      group: the base, then its methods.
    """
    network = Network()
    return [
        network.step_case(base, method, method.refresh, target=method.time_targets.get("step"))
        for method in group
    ]


def natural_cases(base: str, group: Sequence[Method]) -> list[Case]:
    """Steps of K-FAC and EKFAC at batch 256: whole cycles, and steps that refresh nothing.

    Where the package `kfac_jax` is installed, its cycle stands beside that of `kfac`, with the same
    settings.

    Args:
      base: name of the base.
      group: the base, then its methods.

    Returns:
      The cases, none where only the base is left.
    """
    cases = []
    network = Network(2 * BATCH_SIZE)
    for method in group:
        targets = method.time_targets
        if method.name == base:
            case = network.step_case(base, method, method.refresh)
            cases.append(dataclasses.replace(case, period=1))
        elif method.needs_objective:
            cycle = network.step_case(base, method, method.refresh, target=targets.get("cycle"))
            between = network.step_case(
                base, method, lambda step: False, target=targets.get("between")
            )
            cases += [cycle, dataclasses.replace(between, name=f"{method.name}, between", period=1)]
            if method.name == "kfac" and (reference := _kfac_jax_case(network, base, method)):
                cases.append(reference)
    return cases if len(cases) > 1 else []


def _kfac_jax_case(network: Network, base: str, method: Method) -> Case | None:
    """The steps of the package `kfac_jax` with the defaults of `kfac`; None without the package.

    Args:
      network: what is trained.
      base: name of the base.
      method: `kfac`, for its period.
    """
    try:
        kfac_jax = importlib.import_module("kfac_jax")
    except ImportError:
        return None

    def loss(params: Any, batch: dict[str, Any]) -> Any:
        objective = network.objective.bind(rest=network.rest, **batch)
        logits = objective.outputs(params)  # once: it registers the layers of every evaluation
        kfac_jax.register_softmax_cross_entropy_loss(logits, batch["y"])
        return objective.loss_of_outputs(logits)

    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss),
        l2_reg=0.0,
        norm_constraint=1e-3,
        estimation_mode="fisher_gradients",
        curvature_ema=0.95,
        inverse_update_period=method.period,
        num_burnin_steps=0,
    )
    rates = {
        name: jnp.asarray(rate)
        for name, rate in (("learning_rate", LEARNING_RATE), ("momentum", 0.9), ("damping", 1e-3))
    }
    key = jax.random.key(0)
    params = jax.tree.map(jnp.copy, network.params)  # a step donates them

    def call(step: int, carry: Any) -> Any:
        params, state, _ = optimizer.step(
            *carry, jax.random.fold_in(key, step), batch=network.batch, **rates
        )
        return params, state

    carry = params, optimizer.init(params, key, network.batch)
    return Case("kfac-jax", base, call, carry, method.period)


def low_memory_cases(
    base: str, group: Sequence[Method], network: Callable[[], Network]
) -> list[Case]:
    """Steps of low-rank and sparse methods between refreshes, and such with a refresh.

    Args:
      base: name of the base.
      group: the base, then its methods.
      network: makes what is trained.

    Returns:
      The cases, none where only the base is left.
    """
    methods = [method for method in group if method.name in LOW_MEMORY]
    if not methods:
        return []
    trained, one = network(), functools.partial(dataclasses.replace, period=1)
    cases = [one(trained.step_case(base, group[0], lambda step: None))]
    for method in methods:
        settings = LOW_MEMORY[method.name]
        for name, refresh, target in _low_memory_forms(method):
            always = functools.partial(lambda refresh, step: refresh, refresh)
            case = trained.step_case(base, method, always, target=target, settings=settings)
            cases.append(one(case, name=name))
    return cases


def _low_memory_forms(method: Method) -> list[tuple[str, bool | None, float]]:
    """Names of the steps of a method, their ``refresh`` and the target of their time."""
    forms: list[tuple[str, bool | None, float]] = [
        (f"{method.name}, between", False, BETWEEN_TARGET)
    ]
    if method.family == "low rank":
        forms.append((f"{method.name}, refresh", True, REFRESH_TARGET))
    return forms


def low_memory_compile_cases(
    base: str, group: Sequence[Method], network: Callable[[], Network]
) -> list[Case]:
    """Tracing and compiling the steps of `low_memory_cases`.

    Args:
      base: name of the base.
      group: the base, then its methods.
      network: makes what is trained.

    Returns:
      The cases, none where only the base is left.
    """
    methods = [method for method in group if method.name in LOW_MEMORY]
    if not methods:
        return []
    trained = network()
    cases = [_compile_case(trained, base, None, group[0], [None], None)]
    for method in methods:
        for name, refresh, _ in _low_memory_forms(method):
            settings = LOW_MEMORY[method.name]
            case = _compile_case(trained, name, base, method, [refresh], COMPILE_TARGET, settings)
            cases.append(case)
    return cases


def _compile_case(
    network: Network,
    name: str,
    base: str | None,
    method: Method,
    forms: Iterable[Any],
    target: float | None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Case:
    """Tracing and compiling the step of a method in some forms of its static ``refresh``."""
    tx = network.build(method, settings)
    state = jax.eval_shape(functools.partial(init_state, tx), network.params, network.rest)

    def call(i: int, carry: None) -> None:
        for form in forms:
            network.training_step(tx).lower(state, network.batch, refresh=form).compile()

    return Case(name, base, call, None, 1, target)


def compile_cases(base: str, group: Sequence[Method]) -> list[Case]:
    """Tracing and compiling the steps of `step_cases`, in all forms of their static `refresh`.

    The forms of K-FAC's step, only some of which a loop may use, are separate cases.

    Args:
      base: name of the base.
      group: the base, then its methods.
    """
    network = Network()

    def case(name: str, method: Method, forms: Iterable[Any], target: float | None) -> Case:
        if method.name == base:
            return _compile_case(network, name, None, method, forms, None)
        return _compile_case(network, name, base, method, forms, target)

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


def monitor_cases(network: Network) -> list[Case]:
    """Steps of Adam, and of Adam with a monitor of its curvature, without and with a record.

    Args:
      network: what is trained.
    """
    watched = oa.monitor_curvature(
        optax.adam(LEARNING_RATE),
        preconditioner=oa.curvature.adam_preconditioner(),
        inner_learning_rate=LEARNING_RATE,
    )
    forms: dict[str, Any] = {
        "adam": (optax.adam(LEARNING_RATE), None, 10),
        "between": (watched, False, 10),
    }
    forms["record"] = (watched, True, 1)
    cases = []
    for name, (tx, refresh, period) in forms.items():
        tx = optax.with_extra_args_support(tx)
        step = network.training_step(tx)

        def call(i: int, state: Any, step: Any = step, refresh: Any = refresh) -> Any:
            needed = monitoring.without_records(state, refresh)
            new = step(needed, network.batch, refresh=refresh)
            return monitoring.with_records(new, state)

        carry = jax.tree.map(jnp.copy, init_state(tx, network.params, network.rest))
        cases.append(Case(name, None if name == "adam" else "adam", call, carry, period))
    return cases


def monitor_summary(cases: Sequence[Case], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the monitor adds to a training.

    Args:
      cases: those of `monitor_cases`.
      rows: what `timing.measure` found of them.

    Returns:
      ``"time"`` and ``"cpu"``, what it adds to wall and CPU time of a training with a record at the
      default period, from the medians, relative to the training without; and ``"memory"``, the
      bytes of its state relative to those of the parameters.
    """
    every = inspect.signature(oa.monitor_curvature).parameters["every"].default

    def added(ratio: str) -> float:
        _, between, record = (row[ratio] and row[ratio][1] for row in rows)
        return float(between - 1 + (record - between) / every)

    plain, watched = (case.carry for case in cases[:2])

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    return {
        "time": added("ratio"),
        "cpu": added("cpu_ratio"),
        "memory": (size(watched) - size(plain)) / size(plain.params),
    }
