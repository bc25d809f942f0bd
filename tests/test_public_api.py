"""What a user sees of the package: names, documentation, imports, error messages."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel import (
    curvature,
    equilibrium,
    gradients,
    low_rank,
    natural_gradient,
    sparse,
    topologies,
    workers,
)
from tests.helpers import least_squares

ROOT = Path(__file__).parents[1]
PACKAGE = Path(oa.__file__).parent  # in the checkout or where the wheel is installed
NAMESPACES = {"curvature": curvature, "equilibrium": equilibrium, "topologies": topologies}
PUBLIC = {
    f"{module.__name__}.{name}": value
    for module in (oa, *NAMESPACES.values())
    for name, value in vars(module).items()
    if not name.startswith("_")
    and not inspect.ismodule(value)
    and (module is not topologies or name in module.__all__)  # a module, not a package
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
METHODS = {
    f"{name}.{attribute}": value
    for name, cls in CLASSES.items()
    for attribute, value in vars(cls).items()
    if not attribute.startswith("_") and callable(inspect.unwrap(getattr(cls, attribute)))
}


def test_all_is_sorted_and_complete() -> None:
    assert oa.__all__ == sorted(oa.__all__)
    exported = {
        name.rpartition(".")[2] for name in PUBLIC if getattr(oa, name.rpartition(".")[2], 0)
    }
    assert set(oa.__all__) == exported | set(NAMESPACES)


@pytest.mark.parametrize(
    "package", [oa, curvature, equilibrium, gradients, low_rank, natural_gradient, sparse, workers]
)
def test_packages_list_what_they_import(package: Any) -> None:
    imported = {
        alias.name
        for node in ast.walk(ast.parse(inspect.getsource(package)))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert package.__all__ == sorted(imported)


def test_every_transformation_and_state_is_exported() -> None:
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("optax_accel.")
        and not name.rpartition(".")[2].startswith("_")
        and not name.startswith(tuple(m.__name__ for m in NAMESPACES.values()))
    ]
    assert len(modules) > 8
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            builds = inspect.isfunction(value) and "optax." in str(
                inspect.signature(value).return_annotation
            )
            if builds or (inspect.isclass(value) and name.endswith("State")):
                assert name in oa.__all__


def descriptions(text: str) -> dict[str, str]:
    """What a docstring says of each argument, attribute or field, by name."""
    found = {}
    for section in re.findall(r"^(?:Args|Attributes):\n((?:(?: .*)?\n)+)", text + "\n", re.M):
        entries = re.split(r"^ {2}(\*{0,2}\w+)(?: \(.*?\))?: ", section, flags=re.M)[1:]
        found |= dict(zip(entries[::2], entries[1::2], strict=True))
    return {name.lstrip("*"): " ".join(words.split()) for name, words in found.items()}


# People read help in an editor, one function at a time. A description may refer to another one, but
# only after a full sentence that stands for itself.
REFERENCE = re.compile(r"(see|as|ditto)\b|.*\bsee there\b", re.I)


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES, *METHODS])
def test_arguments_are_described_where_they_stand(name: str) -> None:
    text = inspect.getdoc((FUNCTIONS | CLASSES | METHODS)[name]) or ""
    described = descriptions(text)
    assert bool(described) == bool(re.search("^(Args|Attributes):", text, re.M))
    short = {
        argument: words
        for argument, words in described.items()
        if REFERENCE.match(words) or len(words.split()) < 2
    }
    assert not short


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name: str) -> None:
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    for section in ("Args:", "Returns:"):
        assert section in text, f"no section {section}"
    missing = set(inspect.signature(FUNCTIONS[name]).parameters) - set(descriptions(text))
    assert not missing
    assert ">>>" in text, "no example"


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_documented(name: str) -> None:
    text = inspect.getdoc(CLASSES[name]) or ""
    fields = getattr(CLASSES[name], "_fields", ()) or getattr(
        CLASSES[name], "__dataclass_fields__", ()
    )
    without_arguments = hasattr(CLASSES[name], "_fields") or inspect.isabstract(CLASSES[name])
    if without_arguments or inspect.signature(CLASSES[name]).parameters:
        assert ("Attributes:" if without_arguments else "Args:") in text
    for field in fields:
        assert re.search(rf"\b{field}:", text), f"field {field} is not described"


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_documented(name: str) -> None:
    assert inspect.getdoc(METHODS[name])


def test_no_private_member_crosses_modules() -> None:
    crossing = []
    for file in sorted(PACKAGE.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        own |= {getattr(n, "attr", getattr(n, "id", "")) for n in nodes if _is_set(n)}
        own |= {"_replace", "_asdict", "_fields"}  # the public methods of named tuples
        for node in nodes:
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom) and node.module != "optax_accel":
                names = [alias.name for alias in node.names]
            crossing += [
                f"{file.name}:{node.lineno} {name}"
                for name in names
                if re.match("_[^_]", name) and name not in own
            ]
    assert crossing == []


def _is_set(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store)


def test_only_objective_and_workers_average_over_replicas() -> None:
    averaging = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if re.search(r"lax\.(pmean|all_gather)\(", file.read_text())
    }
    assert averaging == {"_means.py", "workers"}


def test_import_is_light() -> None:
    """Importing the library imports its own dependencies and nothing of the experiments."""
    heavy = [
        *("flax", "equinox", "orbax", "grain", "sklearn", "matplotlib", "tensorboardX", "tyro"),
        *("rich", "hypothesis", "models", "experiments"),
    ]
    code = f"import sys, optax_accel; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


X, LOSS = jnp.ones(3), lambda p: jnp.sum(p**2)
BULK, EXTRAP, GNP = oa.bulk_sgd(0.1, 1), oa.extrap_sgd(0.1), oa.gnp(optax.sgd(0.1))
RING = topologies.ring(8)
LINEAR = oa.Objective(lambda p: jnp.ones((2, 3)) @ p, lambda out: jnp.mean(out**2))
KFAC = oa.scale_by_kfac(LINEAR)


def call(tx: Any, params: Any = X, **extra: Any) -> Any:
    return tx.update(X, tx.init(X), params, **extra)


# What a user types wrong, and the words that tell it: the argument, then the allowed range.
WRONG: list[tuple[Callable[[], Any], str]] = [
    # The loss as a value
    (lambda: oa.Objective(None, LOSS), "`predict` must be callable"),
    (lambda: oa.Objective(lambda p: p, 1.0), "`loss` must be callable"),
    (lambda: oa.Objective(LOSS, LOSS, hvp_mode="x"), "hvp_mode .* 'forward_over_reverse'"),
    (lambda: oa.Objective.from_value_fn(3), "must be callable"),
    (lambda: oa.Objective.from_value_fn(LOSS, has_aux="no"), "`has_aux` must be True or False"),
    (lambda: LINEAR.accumulated(2, unroll=1, x=X), "`unroll` must be True or False, got 1"),
    (lambda: oa.Objective.from_value_fn(lambda p: p)(X), r"loss must be a scalar, .* \(3,\)"),
    (lambda: oa.Objective.from_value_fn(LOSS).outputs(X), r"Objective\(predict, loss\)"),
    (lambda: oa.Objective.from_value_fn(LOSS).ggn_vp(X, X), r"Objective\(predict, loss\)"),
    # Hessian subspace
    (lambda: oa.BlockTracker(refresh_every=0), "`refresh_every` must be at least 1"),
    (lambda: oa.BlockTracker(refresh_every="often"), "`refresh_every` must be an integer"),
    (lambda: oa.BlockTracker(tolerance=0.1), "`tolerance` is for `refresh_every=.adaptive"),
    (lambda: oa.BlockTracker(max_refresh_every=9), "`max_refresh_every` is for .*20 steps leave"),
    (
        lambda: oa.BlockTracker(refresh_every="adaptive", tolerance=0),
        r"`tolerance` must lie in \(0, 1\]",
    ),
    (
        lambda: oa.BlockTracker(refresh_every="adaptive", max_refresh_every=4),
        "`max_refresh_every` must be at least 5, got 4",
    ),
    (lambda: oa.ExactTracker(refresh_every="adaptive"), "is for BlockTracker.*ExactTracker needs"),
    (lambda: oa.BlockTracker(power_iterations=0), "`power_iterations` must be at least 1"),
    (lambda: oa.BlockTracker(oversampling=-1), "`oversampling` must be at least 0"),
    (lambda: oa.BlockTracker(cold_start_products=0), "`cold_start_products` must be at least 1"),
    (lambda: oa.BlockTracker(order="largest"), "`order` must be one of 'algebraic', 'magnitude'"),
    (lambda: oa.BlockTracker(curvature="fisher"), "`curvature` must be one of 'hessian'"),
    (lambda: oa.BlockTracker(storage_dtype=int), "`storage_dtype` must be a real floating-point"),
    (lambda: oa.RoundRobinTracker(refresh_every=0), "`refresh_every` must be at least 1"),
    (lambda: oa.ExactTracker(tolerance=0), r"`tolerance` must lie in \(0, 1\]"),
    (lambda: oa.GradientTracker(rows="x"), "`rows` must be one of 'outputs', 'gradient'"),
    (lambda: oa.GradientTracker(decay=1), r"`decay` must lie in \[0, 1\)"),
    (lambda: oa.GradientTracker(buffer=0), "`buffer` must be at least 1"),
    (lambda: oa.bulk_sgd(0.1, 1, tracker=oa.BlockTracker), "`tracker` must be a Tracker, such as"),
    (lambda: oa.project_to_bulk(-1), "`num_directions` must be at least 0, got -1"),
    (lambda: oa.project_to_dominant(1.5), "`num_directions` must be an integer, got 1.5"),
    (lambda: oa.interpolate_subspaces(1, "a", 1), "`dominant_weight` must be a number or a sched"),
    (lambda: oa.interpolate_subspaces(1, 1, jnp.nan), r"`bulk_weight` must lie in \(-inf, inf\)"),
    (lambda: oa.project_to_bulk(1, start_step=-1), "`start_step` must be at least 0"),
    (lambda: oa.project_to_bulk(1, alignment_decay=1), r"`alignment_decay` must lie in \[0, 1\),"),
    (lambda: oa.bulk_sgd(0.1, 1, switch_alignment=2), r"`switch_alignment` must lie in \[0, 1\],"),
    (lambda: oa.dom_sgd(0.1, True), "`num_directions` must be an integer"),
    (
        lambda: oa.interpolated_sgd(0.1, 1, 1.0, None),
        "`bulk_weight` must be a number or a schedule",
    ),
    (lambda: oa.bulk_sgd(0.1, 1, mask={"a": True}).init(X), "`mask` must be a pytree of booleans"),
    (lambda: oa.refresh_at(1, refresh_every=0), "`refresh_every` must be at least 1"),
    (lambda: call(BULK, value_fn=LOSS, refresh="hot"), "'warm', 'factors', .* got 'hot'"),
    (
        lambda: call(BULK, value_fn=LOSS, refresh=jnp.array(True)),
        "`refresh` must be a static .*jit",
    ),
    # Momentum decay
    (lambda: oa.demon_schedule(1.0, 10), r"`init_value` must lie in \[0, 1\)"),
    (lambda: oa.demon_schedule(0.9, 0), "`decay_steps` must be at least 1"),
    (lambda: oa.demon_schedule(0.9, 5, 5), "`delay_steps` must be less than `decay_steps`"),
    (lambda: oa.scale_by_demon(-0.1, decay_steps=10), r"`momentum` must lie in \[0, 1\)"),
    (lambda: oa.demon_sgd(0.1, 1.0, decay_steps=10), r"`momentum` must lie in \[0, 1\)"),
    (lambda: oa.demon_sgd(0.1, decay_steps=10.0), "`decay_steps` must be an integer"),
    (lambda: oa.scale_by_demon_adam(1.0, decay_steps=10), r"`b1` must lie in \[0, 1\)"),
    (lambda: oa.demon_adam(0.1, decay_steps=10, b2=1.0), r"`b2` must lie in \[0, 1\)"),
    (lambda: oa.demon_adam(0.1, decay_steps=10, eps=-1), r"`eps` must lie in \[0, inf\)"),
    (
        lambda: oa.demon_adam(0.1, decay_steps=10, form="torch"),
        "`form` must be one of 'paper', 'ema'",
    ),
    # Gradient sampling
    (lambda: oa.sample_gradients(0), r"`rate` must lie in \(0, 1\]"),
    (lambda: oa.sample_gradients(0.5, key="seed"), "`key` must be a PRNG key"),
    (lambda: oa.stoch_grad_adam(0.1, rate=1.1), r"`rate` must lie in \(0, 1\]"),
    (lambda: oa.stoch_grad_adam(0.1, 1), r"`b1` must lie in \[0, 1\)"),
    (lambda: oa.stoch_grad_adam(0.1, weight_decay=-1), r"`weight_decay` must lie in \[0, inf\)"),
    (lambda: oa.stoch_grad_adam(0.1, b1_decay=2), r"`b1_decay` must lie in \[0, 1\]"),
    (lambda: oa.stoch_grad_adam(0.1, bias_offset=-1), "`bias_offset` must be at least 0"),
    # Extragradient
    (lambda: oa.extragradient(optax.sgd(0.1), -1), r"`extrapolation_rate` must lie in \[0, inf\)"),
    (lambda: oa.extragradient(optax.sgd(0.1), 1, "up"), "`direction` must be one of 'gradient'"),
    (
        lambda: oa.extragradient(optax.sgd(0.1), 1, "inner_update", axis_name="data"),
        "leave `axis_name` out",
    ),
    (lambda: oa.extrap_sgd(0.1, momentum=1), r"`momentum` must lie in \[0, 1\)"),
    (lambda: oa.extra_adam(0.1, b2=-1), r"`b2` must lie in \[0, 1\)"),
    (lambda: call(EXTRAP, value_fn=3), "`value_fn` must be callable"),
    (lambda: call(EXTRAP, value_fn=lambda p, x: 0), r"\['x'\].*tx.update\(\.\.\., .*x=\.\.\.\)"),
    (lambda: call(EXTRAP, params=None, value_fn=LOSS), "needs the parameters"),
    # Natural gradient
    (
        lambda: oa.scale_by_kfac(LOSS),
        "`objective` must be an optax_accel.Objective.*; got function",
    ),
    (lambda: oa.scale_by_kfac(LINEAR, damping=0.0), r"`damping` must lie in \(0, inf\), got 0.0"),
    (
        lambda: oa.scale_by_kfac(LINEAR, damping_kind="lu"),
        "`damping_kind` must be one of 'factored",
    ),
    (
        lambda: oa.scale_by_kfac(LINEAR, estimator="kl"),
        "`estimator` must be one of 'fisher', 'ggn'",
    ),
    (lambda: oa.scale_by_ekfac(LINEAR, likelihood="normal"), "`likelihood` must be one of 'categ"),
    (lambda: oa.scale_by_ekfac(LINEAR, decay=1.0), r"`decay` must lie in \[0, 1\), got 1.0"),
    (
        lambda: oa.scale_by_kfac(LINEAR, factors_every=2, inverses_every=5),
        "`inverses_every` must be a multiple of `factors_every`, 2, got 5",
    ),
    (lambda: oa.scale_by_kfac(LINEAR, norm_constraint=0.0), r"`norm_constraint` must lie in \(0"),
    (lambda: oa.scale_by_kfac(LINEAR, max_size=0), "`max_size` must be at least 1, got 0"),
    (lambda: oa.kfac(-0.1, LINEAR), r"`learning_rate` must lie in \[0, inf\), got -0.1"),
    (lambda: oa.kfac(0.1, LINEAR, kl_clip=0.0), r"`kl_clip` must lie in \(0, inf\), got 0.0"),
    (lambda: oa.ekfac(0.1, LINEAR, momentum=1.0), r"`momentum` must lie in \[0, 1\), got 1.0"),
    (
        lambda: oa.scale_by_kfac(LINEAR, factors_every=0),
        "`factors_every` must be at least 1, got 0",
    ),
    (
        lambda: oa.scale_by_kfac(oa.Objective.from_value_fn(LOSS)).init(X),
        r"scale_by_kfac finds layers in .* a plain function .*Objective\(predict, loss\)",
    ),
    (
        lambda: call(oa.scale_by_kfac(LINEAR), value_fn=LOSS),
        r"scale_by_kfac finds layers in .* a plain function .*Objective\(predict, loss\)",
    ),
    (lambda: call(KFAC, value_fn=LINEAR, refresh="all"), "'factors', 'inverses', .* got 'all'"),
    (lambda: call(KFAC, value_fn=LINEAR, refresh=jnp.array(True)), "`refresh` must be a static"),
    (lambda: call(KFAC, params=None, value_fn=LINEAR), "needs the parameters"),
    # Gradient norm penalty
    (lambda: oa.gnp(optax.sgd(0.1), rho=-1), r"`rho` must lie in \[0, inf\), got -1"),
    (lambda: oa.gnp(optax.sgd(0.1), alpha="a"), "`alpha` must be a number or a schedule, got 'a'"),
    (lambda: oa.gnp(None), "`inner` must be an Optax transformation, got None"),
    # Other coordinates of the parameters
    (lambda: oa.reparametrize(None, oa.weight_norm()), "`inner` must be an Optax transformation"),
    (
        lambda: oa.reparametrize(optax.sgd(0.1), oa.weight_norm),
        r"`reparametrization` must be a Reparametrization, such as weight_norm\(\)",
    ),
    (lambda: oa.powerprop(0.5), r"`alpha` must lie in \[1, inf\), got 0.5"),
    (
        lambda: oa.quadratic_model(optax.sgd, damping=1.0),
        r"`preconditioner` must be an Optax transformation, .*build it first, as in",
    ),
    (lambda: oa.describe_layers(LOSS, X), "describe_layers: `objective` must be an .*; got funct"),
    (
        lambda: oa.kfac(0.1, LINEAR, damping=oa.LevenbergMarquardt),
        r"`damping` must be .* optax_accel.LevenbergMarquardt, such as LevenbergMarquardt\(1.0\)",
    ),
    (lambda: oa.batch_gauss_newton(damping="auto"), "`damping` must be a number, a schedule or"),
    (lambda: oa.aggmo(0.1, 0.9), r"`betas` must be a sequence .*such as \(0.0, 0.9\); got 0.9"),
    (lambda: oa.weight_norm("last"), "`output_axes` must be an integer, got 'last'"),
    (
        lambda: call(oa.reparametrize(optax.sgd(0.1), oa.weight_norm()), params=None),
        r"reparametrize needs the parameters.*tx\.update\(grads, state, params\)",
    ),
    # Adaptive rates within bounds
    (lambda: oa.adabound(0.0), r"`learning_rate` must lie in \(0, inf\), got 0.0"),
    (lambda: oa.adabound(0.1, gamma=0.0), r"`gamma` must lie in \(0, inf\), got 0.0"),
    (
        lambda: oa.adabound(0.1, final_learning_rate=-0.1),
        r"`final_learning_rate` must lie in \[0, inf\)",
    ),
    (lambda: oa.adabound(0.1, b2=1.0), r"`b2` must lie in \[0, 1\)"),
    (
        lambda: oa.adabound(optax.linear_schedule(0.0, 1.0, 9)),
        r"`base_learning_rate` .* starts at 0.0\)",
    ),
    # Workers with parameters of their own
    (lambda: oa.decentlam(-0.1, topology=RING), r"`learning_rate` must lie in \[0, inf\)"),
    (
        lambda: oa.decentlam(0.1, topology="ring"),
        r"`topology` must be a Topology, such as .*ring\(8\); got",
    ),
    (lambda: oa.dmsgd(0.1, 1, topology=RING), r"`momentum` must lie in \[0, 1\)"),
    (
        lambda: oa.dmsgd(0.1, topology=RING, consensus_every=-1),
        "`consensus_every` must be at least 0",
    ),
    (
        lambda: call(oa.dmsgd(0.1, topology=RING), params=None),
        "dmsgd needs this worker's parameters",
    ),
    (
        lambda: call(oa.dmsgd(0.1, topology=RING)),
        r"ring\(8\) connects 8 workers, but `axis_name` is None",
    ),
    (
        lambda: call(oa.dmsgd(0.1, topology=RING, axis_name="workers")),
        "the axis 'workers', which does not exist here",
    ),
    (lambda: oa.decentlam(0.1, topology=RING).init({"n": jnp.arange(3)}), "'n'.* has dtype int32"),
    (
        lambda: oa.post_local_sgd(optax.sgd(0.1), local_steps=0, switch_step=1),
        "`local_steps` must be at least 1, got 0",
    ),
    (
        lambda: oa.post_local_sgd(optax.sgd(0.1), local_steps=1, switch_step=-1),
        "`switch_step` must be at least 0, got -1",
    ),
    (
        lambda: oa.post_local_sgd(None, local_steps=1, switch_step=1),
        "`inner` must be an Optax transformation, got None",
    ),
    (
        lambda: call(oa.post_local_sgd(optax.sgd(0.1), local_steps=1, switch_step=1), params=None),
        "post_local_sgd needs this worker's parameters",
    ),
    (lambda: topologies.ring(0), "`num_workers` must be at least 1, got 0"),
    (lambda: topologies.mesh_2d(2, 1.5), "`columns` must be an integer, got 1.5"),
    (lambda: topologies.from_matrix([[0.5, 0.5]]), r"must be square, .* got shape \(1, 2\)"),
    (lambda: topologies.from_matrix([["a"]]), "must hold real numbers, got dtype <U1"),
    (
        lambda: topologies.from_matrix([[1.5, -0.5], [-0.5, 1.5]]),
        r"must not be negative, but entry \(0, 1\) is -0.5",
    ),
    (
        lambda: topologies.from_matrix([[0.5, 0.5], [0.5, 0.4]]),
        "doubly stochastic, but row 1 sums to 0.9, not 1.* Metropolis",
    ),
    (
        lambda: topologies.from_matrix([[[1, 0], [0, 1]], [[0.4, 0.6], [0.5, 0.5]]]),
        "doubly stochastic, but column 0 of matrix 1 sums to 0.9",
    ),
    (
        lambda: topologies.from_matrix(np.eye(3)),
        r"workers 0 and 1 never exchange anything \(1 of 3 workers",
    ),
    (
        lambda: topologies.from_matrix(np.roll(np.eye(3), 1, 0)),
        "fall into 3 groups that only pass their values around in a circle",
    ),
    # Schedules that Optax lacks
    (lambda: oa.cyclical_schedule(0.1, 1, 0), "`step_size` must be at least 1, got 0"),
    (lambda: oa.momentum_onecycle_schedule(9, 1.0), r"`max_momentum` must lie in \[0, 1\)"),
    (lambda: oa.onecycle(9, 0.1, interpolation="cos"), "`interpolation` must be one of 'linear'"),
    (lambda: oa.vtpc_schedule(0.1, 1, 9, 0), "`num_cycles` must be at least 1, got 0"),
    (lambda: oa.snapshot_schedule(0.1, 5, 6), "`num_snapshots` must be at most `total_steps`"),
    # Hyperparameters that change
    (lambda: oa.with_schedules(optax.sgd(0.1)), r"`factory` must be .*not optax.sgd\(0.1\)"),
    (lambda: oa.inject_hyperparams(3), "`factory` must be a function that returns an Optax"),
    (lambda: oa.state_shardings(optax.sgd, X), "`tx` must be an Optax transformation"),
    (lambda: oa.mean_over_micro_batches(3, X, 1), "`function` must be a function, got 3"),
    (lambda: oa.with_schedules(optax.sgd), "at least one schedule"),
    (lambda: oa.with_schedules(optax.sgd, decay=abs), "no argument 'decay'; it takes .*momentum"),
    (lambda: oa.with_schedules(optax.sgd, momentum=0.9), "`momentum` must be a schedule"),
    (lambda: oa.with_schedules(optax.sgd, momentum=abs)(0.1, momentum=1), "was given again"),
    (
        lambda: oa.inject_hyperparams(oa.bulk_sgd)(0.1, -1).init(X),
        "`num_directions` must be at lea",
    ),
    (
        lambda: optax.inject_hyperparams(oa.demon_adam)(-0.1, decay_steps=10).init(X),
        r"`learning_rate` must lie in \[0, inf\), got -0\.1",
    ),
    # Curvature
    (lambda: oa.BlockTracker(storage_dtype="bf16"), "`storage_dtype` must be a real floating-poi"),
    (
        lambda: curvature.lanczos(np.eye(3), X, 2, key=0, num_products=3),
        "`product` must be a function that multiplies a vector, such as .*got ndarray",
    ),
    (lambda: curvature.trace(np.eye(3), key=0), "`operator` must be a function that multiplies"),
    (
        lambda: curvature.lanczos(abs, X, 2, key=jax.random.key(0), num_products=1),
        "`num_products` must be at least `num_directions`, 2, got 1",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_input(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value).partition("mask")[0]


# Every flag of a public function; what else the function needs is here by its name.
FLAGS = {
    f"{name}.{parameter.name}": (function, parameter)
    for name, function in FUNCTIONS.items()
    for parameter in inspect.signature(function).parameters.values()
    if str(parameter.annotation).startswith("bool")
}
REQUIRED: dict[str, Any] = {
    "learning_rate": 0.1,
    "inner": optax.sgd(0.1),
    "value_fn": abs,
    "extrapolation_rate": 0.1,
    "decay_steps": 9,
    "function": lambda carry, part, index: (carry, part),
    "batch": X,
    "num_micro_batches": 1,
    "step": 0,
    "steps_per_epoch": 2,
    "epoch": 0,
    "previous": X,
    "sparsity": 0.5,
    "dominant_weight": 1.0,
    "bulk_weight": 0.0,
    "prune_step": 3,
    "num_workers": 8,
    "objective": LINEAR,
    "params": X,
    "preconditioner": optax.identity(),
    "damping": 0.1,
    "predict": abs,
    "loss": abs,
    "like": X,
    "key": 0,
    "product": abs,
    "products": abs,
    "operator": abs,
    "start": X,
    "basis": X,
    "shift": 0.0,
    "num_directions": 1,
    "rank": 1,
    "rate": 0.5,
    "max_rank": 1,
    "num_members": 2,
    "noise": 0.1,
    "num_products": 1,
    "base_value": 0.1,
    "peak_value": 1.0,
    "step_size": 9,
    "transition_steps": 9,
}
# The same for functions that need other values under these names.
WEIGHTS = [jnp.ones((2, 3)), jnp.ones((3, 2))]
REQUIRED_BY: dict[Any, dict[str, Any]] = {
    oa.feedback_alignment: {
        "objective": oa.Objective(lambda p: jnp.eye(2) @ p[0] @ p[1], jnp.mean),
        "params": WEIGHTS,
    },
    oa.dfa_feedback: {"params": WEIGHTS},
    oa.deq: {"f": lambda z, params, x: 0.5 * z, "z0": X, "x": None},
    equilibrium.solve: {"solver": equilibrium.fixed_point(2), "f": jnp.cos, "z0": X},
    curvature.inverse_product: {"vector": X},
    oa.sample_terms: {"weights": X, "num_samples": 1},
    oa.sampled_matmul: {"a": X, "b": jnp.ones((2, 1))},
    oa.sampled_conv: {"lhs": X, "rhs": X, "window_strides": (), "padding": "SAME"},
}


def required_by(function: Any) -> dict[str, Any]:
    """Values for the arguments that have no default."""
    return {
        name: (REQUIRED | REQUIRED_BY.get(function, {}))[name]
        for name, other in inspect.signature(function).parameters.items()
        if other.default is inspect.Parameter.empty and other.kind is not other.VAR_KEYWORD
    }


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", ["no", 1, jnp.array(True)], ids=["word", "number", "array"])
def test_flags_are_booleans(flag: str, value: Any) -> None:
    function, parameter = FLAGS[flag]
    required = required_by(function)
    with pytest.raises(TypeError, match=f"`{parameter.name}` must be True(,| or) False.*, got "):
        function(**required, **{parameter.name: value})
    function(**required, **{parameter.name: np.bool_(True)})


def words_of(annotation: Any) -> tuple[str, ...]:
    """The words that an argument may be, as its annotation lists them."""
    if get_origin(annotation) is Literal:
        return tuple(word for word in get_args(annotation) if isinstance(word, str))
    return tuple(word for part in get_args(annotation) for word in words_of(part))


def annotation_of(build: Any, parameter: inspect.Parameter) -> Any:
    """An annotation as an object; ``typing.get_type_hints`` fails on chex's recursive types."""
    names: dict[str, Any] = {}
    for owner in reversed(build.__mro__ if inspect.isclass(build) else (build,)):
        names |= vars(sys.modules[owner.__module__])
    return eval(parameter.annotation, names)


# Every argument of a public function, tracker or objective that takes words.
WORDS = {
    f"{name}.{parameter.name}": (build, parameter.name, words)
    for name, build in (FUNCTIONS | CLASSES).items()
    if not hasattr(build, "_fields")
    for parameter in inspect.signature(build).parameters.values()
    if (words := words_of(annotation_of(build, parameter)))
}


@pytest.mark.parametrize("option", WORDS)
def test_options_name_the_words_they_take(option: str) -> None:
    build, argument, words = WORDS[option]
    required = required_by(build)
    with pytest.raises(ValueError, match=argument) as caught:
        build(**{**required, argument: "wrong"})
    assert all(repr(word) in str(caught.value) for word in (*words, "wrong"))


@pytest.mark.parametrize("tx", [BULK, oa.project_to_bulk(1), EXTRAP, oa.extra_adam(0.1), GNP, KFAC])
def test_missing_value_fn_shows_the_call(tx: Any) -> None:
    expected = r"`value_fn` to .*tx\.update\(grads, state, params, value_fn=objective\)"
    with pytest.raises(ValueError, match=expected):
        call(tx)


READY_MADE = {
    "demon_sgd": oa.demon_sgd(0.1, decay_steps=9),
    "demon_adam": oa.demon_adam(0.1, decay_steps=9),
    "stoch_grad_adam": oa.stoch_grad_adam(0.1),
    "extrap_sgd": EXTRAP,
    "extra_adam": oa.extra_adam(0.1),
    "adabound": oa.adabound(0.1),
}


@pytest.mark.parametrize("name", READY_MADE)
def test_errors_carry_the_name_of_the_optimizer(name: str) -> None:
    """And not that of a transformation inside."""
    with pytest.raises(TypeError, match=f"^{name} works on .* has dtype int32"):
        READY_MADE[name].init({"n": jnp.arange(3)})
    if name.startswith("extra"):
        with pytest.raises(ValueError, match=f"^{name} needs the extra argument `value_fn`"):
            call(READY_MADE[name])


@pytest.mark.parametrize(
    ("tx", "accepted"),
    [
        (EXTRAP, " or any function of the parameters that returns the scalar loss. "),
        (BULK, " or any function of the parameters"),
        (KFAC, r"\(predict, loss\). "),
        (oa.hessian_free(), r"\(predict, loss\). "),
        (
            oa.project_to_bulk(1, tracker=oa.BlockTracker(curvature="gauss_newton")),
            r"\(predict, loss\). ",
        ),
    ],
)
def test_missing_value_fn_says_what_the_method_accepts(tx: Any, accepted: str) -> None:
    with pytest.raises(ValueError, match=rf"with an optax_accel\.Objective{accepted}"):
        call(tx)


@pytest.mark.parametrize("tx", [BULK, EXTRAP, GNP, KFAC])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
        lambda tx: optax.partition({"x": tx, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
    ],
    ids=["masked", "partition"],
)
def test_masked_node_points_to_mask(tx: Any, wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"MaskedNode: .* its own `mask=` instead"):
        wrap(tx).init({"a": X, "b": X})


def test_own_mask_is_what_the_message_promises() -> None:
    """Masked-out leaves are held fixed in the curvature and get the base optimizer's update."""
    problem = least_squares()
    mask = {"dense": {"w": True}, "b": False}
    objective = problem.objective()
    grads = objective.grad(problem.params)
    for tx in (oa.bulk_sgd(0.1, 2, mask=mask), oa.extrap_sgd(0.1, momentum=None, mask=mask)):
        updates, _ = jax.jit(
            lambda g, p, tx=tx: tx.update(g, tx.init(p), p, value_fn=objective, refresh="cold")
        )(grads, problem.params)
        # The inputs are orthogonal to the bias: its gradient is the same at the point ahead.
        assert jnp.allclose(updates["b"], -0.1 * grads["b"], rtol=1e-5)
        assert not jnp.allclose(updates["dense"]["w"], -0.1 * grads["dense"]["w"], rtol=1e-2)
