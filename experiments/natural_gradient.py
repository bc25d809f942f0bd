"""Where natural gradients pay: the loss against steps and against time.

    python -m experiments.natural_gradient --problem mnist_autoencoder --scale small

SGD with momentum, Adam, K-FAC, EKFAC and Hessian-free train one network from the same start on the
same batches. Each is tuned on the same number of settings. A run of any of them ends after the
steps of SGD or, except for very short ones, four times its time (`--time-factor`); what is chosen
and shown is the setting with the lowest training loss at the end. Times are those of the steps:
without compilation, without evaluation.
`runs/<name>/` then holds

    results.json            settings, final losses of all runs, curves of the chosen ones
    curves.png              training loss over steps and over seconds

The problems:

    digits_mlp              scikit-learn digits, tanh network with two hidden layers
    mnist_autoencoder       784-1000-500-250-30-250-500-1000-784 (at small scale a quarter of the
                            widths except for the code), tanh, linear code, cross-entropy on
                            sigmoid outputs, summed over the pixels
    cifar10_5k_cnn          two convolutions and a linear layer
    shakespeare_transformer next characters, a causal pre-norm Transformer

Hessian-free takes gradients of four batches a step and curvature of the first one of them, so its
steps use four times the examples of others. It is left out of the convolutional problem on a CPU,
where XLA runs convolutions in a loop many times slower (jax#12868), unless `--methods` names it.

References:
  Hinton, Salakhutdinov, `Reducing the dimensionality of data with neural networks
  <https://doi.org/10.1126/science.1127647>`_, 2006: the autoencoder, there with logistic units;
  the classic problem of Martens (2010) and of Martens and Grosse (2015), who use tanh as we do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import models
import optax_accel as oa
from experiments import cli, data, timing
from experiments.data.readers import files
from experiments.reporting import figures, tables
from experiments.runs import folders
from experiments.runs.study import claim_results, write_results
from experiments.training import losses, networks

PROG = "python -m experiments.natural_gradient"
PyTree = Any
# A run of another method than the first may always take that many seconds.
LEAST_SECONDS = 3.0
# Points of a curve, and examples on which they are evaluated.
POINTS, EVALUATED = 50, 500


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Compare natural-gradient methods with SGD and Adam: loss over steps and over time."""

    problem: str = "digits_mlp"
    """digits_mlp, mnist_autoencoder, cifar10_5k_cnn or shakespeare_transformer."""
    scale: str = "small"
    """small (minutes on two cores) or full (the networks and data of the literature)."""
    methods: str | None = None
    """Comma-separated; the first one sets the target and the time. Default: all that suit."""
    steps: int | None = None
    """Steps a run; default: those of the problem."""
    settings: int | None = None
    """Settings that each method is tuned on, of the six it has; default: all."""
    time_factor: float = 4.0
    """A run may take this many times the time of the median run of the first method."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    seed: int = 0
    """Of initial weights and batches."""
    name: str | None = None
    """Name of the run's folder; default: natural-gradient-<problem>-<scale>."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""


# Problems ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, its data and its loss.

    Attributes:
      objective: takes ``x`` and ``y`` by name.
      params: the start.
      train: ``(x, y)``.
      test: ``(x, y)``.
      batch_size: of all methods but Hessian-free's gradients.
      steps: of a run.
      likelihood: what the outputs are parameters of, for K-FAC.
      unit: size of the loss, which the rates of SGD are relative to.
    """

    objective: oa.Objective
    params: PyTree
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    batch_size: int
    steps: int
    likelihood: Any
    unit: float = 1.0

    def __post_init__(self) -> None:
        if (number := len(self.train[1])) < self.batch_size:
            raise data.DataError(
                f"{number} training examples, expected at least a batch of {self.batch_size}"
            )


def _on_device(split: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    x, y = split
    return jnp.asarray(x), jnp.asarray(y)


def _classifier(
    task: data.Task,
    model: str,
    examples: int,
    batch_size: int,
    epochs: int,
    seed: int,
    **kwargs: Any,
) -> Problem:
    network = models.create(
        model, input_shape=task.input_shape, num_classes=task.num_classes, rngs=seed, **kwargs
    )
    graphdef, params, rest = networks.split(network)
    train = _on_device((task.train.x[:examples], task.train.y[:examples]))
    return Problem(
        objective=networks.objective(graphdef).given(rest=rest),
        params=params,
        train=train,
        test=_on_device((task.test.x, task.test.y)),
        batch_size=batch_size,
        steps=epochs * (len(train[1]) // batch_size),
        likelihood="categorical",
    )


def _digits_mlp(full: bool, data_dir: Path | None, seed: int) -> Problem:
    width, epochs = (200, 100) if full else (100, 40)
    task = data.load_task("digits")
    return _classifier(task, "mlp", 1077, 128, epochs, seed, hidden_sizes=(width, width))


def _cifar10_5k_cnn(full: bool, data_dir: Path | None, seed: int) -> Problem:
    task = data.load_task("cifar10_5k", data_dir=data_dir)
    if full:
        return _classifier(task, "cnn", 5000, 250, 40, seed)
    return _classifier(task, "cnn", 1000, 100, 6, seed, channels=(16, 16))


def _linear_init(key: jax.Array, n_in: int, n_out: int) -> PyTree:
    """Normal weights that keep the scale of their inputs, and no bias."""
    w = jax.random.normal(key, (n_in, n_out)) / np.sqrt(n_in)
    return {"w": w, "b": jnp.zeros(n_out)}


def _linear(layer: PyTree, x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def autoencoder_outputs(params: Sequence[PyTree], x: jax.Array) -> jax.Array:
    """Logits of the pixels; the code, in the middle, and the outputs are linear."""
    for i, layer in enumerate(params):
        x = _linear(layer, x)
        if i + 1 not in (len(params) // 2, len(params)):
            x = jnp.tanh(x)
    return x


def _pixel_loss(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(outputs, y), axis=-1))


def _mnist_autoencoder(full: bool, data_dir: Path | None, seed: int) -> Problem:
    task = data.load_task("mnist", data_dir=data_dir)
    examples, batch_size = (len(task.train), 1000) if full else (5000, 250)
    encoder = (784, 1000, 500, 250, 30) if full else (784, 250, 125, 62, 30)
    widths = (*encoder, *encoder[-2::-1])
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    train, test = (
        jnp.asarray(split.x.reshape(len(split), -1)[:examples]) for split in (task.train, task.test)
    )
    return Problem(
        objective=oa.Objective(autoencoder_outputs, _pixel_loss),
        params=[
            _linear_init(key, *sizes)
            for key, *sizes in zip(keys, widths[:-1], widths[1:], strict=True)
        ],
        train=(train, train),
        test=(test, test),
        batch_size=batch_size,
        steps=20 * (examples // batch_size),
        likelihood="bernoulli",
        unit=100.0,
    )


def transformer_outputs(params: PyTree, x: jax.Array, *, num_heads: int) -> jax.Array:
    """Logits of the next character at each position, (batch, length, characters)."""
    length, width = params["positions"].shape
    h = params["embedding"][x] + params["positions"][None]
    past = jnp.tril(jnp.ones((length, length), bool))[None, None]
    for layer in params["layers"]:
        q, k, v = (
            _linear(layer[name], _normalized(layer["norm1"], h)).reshape(
                len(x), length, num_heads, width // num_heads
            )
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(q, k, v, mask=past)
        h = h + _linear(layer["out"], attended.reshape(len(x), length, width))
        h = h + _linear(
            layer["down"], jax.nn.gelu(_linear(layer["up"], _normalized(layer["norm2"], h)))
        )
    return _linear(params["head"], _normalized(params["norm"], h))


def _normalized(norm: PyTree, x: jax.Array) -> jax.Array:
    scale, bias = (norm[name][None, None] for name in ("scale", "bias"))
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * scale + bias


def _transformer_init(key: jax.Array, vocabulary: int, length: int, width: int, layers: int) -> Any:
    keys = iter(jax.random.split(key, 6 * layers + 3))

    def norm() -> PyTree:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def linear(n_in: int = width, n_out: int = width) -> PyTree:
        return _linear_init(next(keys), n_in, n_out)

    def layer() -> PyTree:
        attention = {name: linear() for name in ("query", "key", "value", "out")}
        feed_forward = {"up": linear(width, 4 * width), "down": linear(4 * width, width)}
        return {**attention, **feed_forward, "norm1": norm(), "norm2": norm()}

    return {
        "embedding": jax.random.normal(next(keys), (vocabulary, width)),
        "positions": 0.1 * jax.random.normal(next(keys), (length, width)),
        "layers": [layer() for _ in range(layers)],
        "norm": norm(),
        "head": linear(width, vocabulary),
    }


def _shakespeare_transformer(full: bool, data_dir: Path | None, seed: int) -> Problem:
    length, width, layers, examples, batch_size = (
        (128, 128, 4, None, 128) if full else (32, 48, 2, 3000, 50)
    )
    folder = data.data_folder("shakespeare", data_dir)
    (path,) = files.find(folder, [["tinyshakespeare.txt"]], "Tiny Shakespeare")
    text = np.frombuffer(files.read_bytes(path, "text, gzipped or not"), np.uint8)
    characters, ids = np.unique(text, return_inverse=True)
    windows = len(ids) // (length + 1)
    if windows < 10:
        raise data.DataError(
            f"{path}: {len(ids)} characters, expected at least {10 * (length + 1)}, 10 windows"
        )
    rows = ids[: windows * (length + 1)].reshape(windows, length + 1).astype(np.int32)
    held_out = windows // 10
    train, test = (
        _on_device((part[:, :-1], part[:, 1:]))
        for part in (rows[:-held_out][:examples], rows[-held_out:][:EVALUATED])
    )
    return Problem(
        objective=oa.Objective(
            functools.partial(transformer_outputs, num_heads=4),
            lambda outputs, y: losses.find_loss("cross_entropy")(outputs, y),
        ),
        params=_transformer_init(jax.random.key(seed), len(characters), length, width, layers),
        train=train,
        test=test,
        batch_size=batch_size,
        steps=(4 if full else 2) * (len(train[1]) // batch_size),
        likelihood="categorical",
    )


PROBLEMS: dict[str, Callable[[bool, Path | None, int], Problem]] = {
    "digits_mlp": _digits_mlp,
    "mnist_autoencoder": _mnist_autoencoder,
    "cifar10_5k_cnn": _cifar10_5k_cnn,
    "shakespeare_transformer": _shakespeare_transformer,
}
SCALES = ("small", "full")


# Methods ----------------------------------------------------------------------------------------

Setting = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer and what it is tuned on.

    Attributes:
      summary: one line.
      settings: values of its hyperparameters, by name.
      make: the transformation for a problem, from the values (traced).
      refresh: static ``refresh`` argument of the update at a step; None: it has none.
      gradient_batches: batches whose mean gradient makes a step.
    """

    summary: str
    settings: tuple[Setting, ...]
    make: Callable[..., optax.GradientTransformation]
    refresh: Callable[[int], Any] | None = None
    gradient_batches: int = 1


def _grid(**values: Sequence[float]) -> tuple[Setting, ...]:
    """All combinations."""
    return tuple(
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    )


def _kfac(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(problem: Problem, kl_clip: Any, damping: Any) -> optax.GradientTransformation:
        x, _ = problem.train
        example = {"x": jax.ShapeDtypeStruct((problem.batch_size, *x.shape[1:]), x.dtype)}
        # The KL clip is what sets the length of nearly all steps; the rate with the momentum of
        # 0.9 adds up to 1, the length of a Newton step.
        return factory(
            0.1,
            problem.objective,
            example=example,
            kl_clip=kl_clip,
            damping=damping,
            likelihood=problem.likelihood,
        )

    return make


_KFAC_GRID = _grid(kl_clip=(0.001, 0.003, 0.01), damping=(0.003, 0.03))

METHODS: dict[str, Method] = {
    "sgd": Method(
        "SGD with momentum 0.9; rates for losses of about 1",
        _grid(rate=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
        lambda problem, rate: optax.sgd(rate / problem.unit, momentum=0.9),
    ),
    "adam": Method(
        "Adam",
        _grid(rate=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)),
        lambda problem, rate: optax.adam(rate),
    ),
    "kfac": Method(
        "K-FAC with rate 0.1, momentum 0.9, factors every step, inverses every 10",
        _KFAC_GRID,
        _kfac(oa.kfac),
        oa.kfac_refresh_at,
    ),
    "ekfac": Method("EKFAC, as K-FAC", _KFAC_GRID, _kfac(oa.ekfac), oa.kfac_refresh_at),
    "hessian_free": Method(
        "Hessian-free, gradients of four batches, curvature of one",
        _grid(rate=(0.5, 1.0), damping=(0.1, 1.0, 10.0)),
        lambda problem, rate, damping: oa.hessian_free(rate, damping=damping),
        gradient_batches=4,
    ),
}


class Trainer:
    """The compiled steps of one method on one problem."""

    def __init__(self, method: Method, problem: Problem):
        self.method, self.problem = method, problem
        refreshes = [None]
        if method.refresh is not None:
            refreshes = list(dict.fromkeys(method.refresh(step) for step in range(20)))
        rows = jnp.zeros(problem.batch_size * method.gradient_batches, jnp.int32)
        setting = jax.tree.map(jnp.float32, method.settings[0])
        state = self.init(setting)
        start = time.perf_counter()
        self.steps = {
            refresh: jax.jit(functools.partial(self._step, refresh=refresh), donate_argnums=(0, 1))
            .lower(problem.params, state, setting, rows)
            .compile()
            for refresh in refreshes
        }
        self.compile_seconds = time.perf_counter() - start
        carry = jax.tree.map(jnp.copy, (problem.params, state))
        for step in self.steps.values():  # the first call sets up what later ones find
            carry = jax.block_until_ready(step(*carry, setting, rows))

    @functools.cached_property
    def init(self) -> Callable[[Any], PyTree]:
        """The state before the first step, from a setting."""

        def init(setting: Any) -> PyTree:
            return self.method.make(self.problem, **setting).init(self.problem.params)

        return jax.jit(init)

    def _step(
        self, params: PyTree, state: PyTree, setting: Any, rows: Any, *, refresh: Any
    ) -> tuple[PyTree, PyTree]:
        problem = self.problem

        def of(rows: jax.Array) -> oa.Objective:
            x, y = problem.train
            return problem.objective.bind(x=x[rows], y=y[rows])

        tx = optax.with_extra_args_support(self.method.make(problem, **setting))
        objective, extra = of(rows), {}
        if self.method.gradient_batches > 1:
            extra["curvature_value_fn"] = of(rows[: problem.batch_size])
        if self.method.refresh is not None:
            extra["refresh"] = refresh
        grads = objective.grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective, **extra)
        return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(objective: oa.Objective, params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    return objective(params, x=x, y=y)


def batches(examples: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of batches, without end: the data shuffled anew in each epoch, the remainder dropped."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(examples).astype(np.int32)
        for start in range(0, examples - size + 1, size):
            yield order[start : start + size]


def train(
    trainer: Trainer, setting: Setting, steps: int, seconds: float, seed: int
) -> dict[str, list[float]]:
    """One run.

    Returns:
      The curve: steps made, seconds they took, training and test loss then. It ends early where
      the loss is not finite or the time is up.
    """
    problem, method = trainer.problem, trainer.method
    values = jax.tree.map(jnp.float32, setting)
    params = jax.tree.map(jnp.copy, problem.params)
    state = trainer.init(values)
    parts = [tuple(a[:EVALUATED] for a in split) for split in (problem.train, problem.test)]
    curve: dict[str, list[float]] = {key: [] for key in ("step", "seconds", "train", "test")}
    elapsed, shown = 0.0, -math.inf
    size = problem.batch_size * method.gradient_batches
    rows = batches(len(problem.train[1]), size, seed)
    for step in range(steps + 1):
        last = step == steps or elapsed >= seconds
        if last or step % max(1, steps // POINTS) == 0 or elapsed - shown > seconds / POINTS:
            losses = [float(_evaluate(problem.objective, params, *part)) for part in parts]
            if not all(map(math.isfinite, losses)):
                break
            shown = elapsed
            for key, value in zip(curve, (step, elapsed, *losses), strict=True):
                curve[key].append(value)
        if last:
            break
        take = jnp.asarray(next(rows))
        compiled = trainer.steps[method.refresh(step) if method.refresh else None]
        start = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state, values, take))
        elapsed += time.perf_counter() - start
    return curve


def final_loss(curve: dict[str, list[float]], steps: int, seconds: float) -> float:
    """The last training loss of a run; infinity if it diverged."""
    ended = curve["step"][-1] >= steps or curve["seconds"][-1] >= seconds
    return curve["train"][-1] if ended else math.inf


# Results ----------------------------------------------------------------------------------------


def reached(curve: dict[str, list[float]], target: float) -> tuple[int, float] | None:
    """Steps and seconds to a training loss, from the first point of the curve that is as low.

    >>> reached({"step": [0, 5], "seconds": [0.0, 0.1], "train": [2.0, 1.0]}, 1.5)
    (5, 0.1)

    Args:
      curve: as of `train`.
      target: the loss.

    Returns:
      Both numbers; None if it never comes.
    """
    for step, seconds, loss in zip(curve["step"], curve["seconds"], curve["train"], strict=True):
        if loss <= target:
            return int(step), seconds
    return None


def run(options: Options, problem: Problem, names: Sequence[str]) -> list[dict[str, Any]]:
    """Tunes and compares the methods; one row each."""
    rows: list[dict[str, Any]] = []
    steps, seconds = options.steps or problem.steps, math.inf
    for name in names:
        method = METHODS[name]
        trainer = Trainer(method, problem)
        settings = method.settings
        if options.settings is not None:  # from the middle
            middle = sorted(range(len(settings)), key=lambda i: abs(2 * i - len(settings) + 1))
            settings = tuple(settings[i] for i in sorted(middle[: options.settings]))
        curves = [train(trainer, setting, steps, seconds, options.seed) for setting in settings]
        finals = [final_loss(curve, steps, seconds) for curve in curves]
        best = int(np.argmin(finals))
        if math.isinf(finals[best]):
            raise ValueError(f"{name} diverged with all of its settings")
        curve = curves[best]
        if not rows:
            # Runs that diverged early say nothing on the time.
            whole = [
                c["seconds"][-1] for c, loss in zip(curves, finals, strict=True) if loss < 1e30
            ]
            seconds = max(options.time_factor * float(np.median(whole)), LEAST_SECONDS)
        rows.append(
            {
                "method": name,
                "summary": method.summary,
                "settings": settings,
                "final_losses": [loss if math.isfinite(loss) else None for loss in finals],
                "chosen": settings[best],
                "compile_seconds": trainer.compile_seconds,
                "milliseconds_per_step": 1000 * curve["seconds"][-1] / max(curve["step"][-1], 1),
                "curve": curve,
            }
        )
    target = rows[0]["curve"]["train"][-1]
    for row in rows:
        row["reached"] = reached(row["curve"], target)
    return rows


def conclusion(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers say, in sentences."""
    base, target = rows[0], rows[0]["curve"]["train"][-1]
    steps, seconds = base["reached"]
    name = base["method"]
    lines = [f"{name} gets to a training loss of {target:.4g} in {steps} steps, {seconds:.3g} s"]
    for row in rows[1:]:
        if row["reached"] is None:
            loss, end = min(row["curve"]["train"]), row["curve"]["seconds"][-1]
            lines.append(f"{row['method']} does not get there in {end:.3g} s (lowest: {loss:.4g})")
            continue
        own_steps, own_seconds = row["reached"]
        fewer, less = _times(steps, own_steps, "fewer"), _times(seconds, own_seconds, "less")
        lines.append(
            f"{row['method']} gets there in {own_steps} steps, {fewer}, and {own_seconds:.3g} s, "
            f"{less}"
        )
    there = [row for row in rows if row["reached"] is not None]
    fewest = min(there, key=lambda row: row["reached"][0])["method"]
    fastest = min(there, key=lambda row: row["reached"][1])["method"]
    lowest = min(rows, key=lambda row: row["curve"]["train"][-1])["method"]
    lines.append(
        f"fewest steps: {fewest}; least time: {fastest}; lowest training loss at the end: {lowest}"
    )
    return lines


def _times(theirs: float, own: float, better: str) -> str:
    if max(theirs, own) < 1.05 * min(theirs, own):
        return "about as many" if better == "fewer" else "about as much"
    if own <= theirs:
        return f"{theirs / max(own, 1e-9):.2g} times {better}"
    return f"{own / max(theirs, 1e-9):.2g} times more"


def picture(title: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Training losses over steps and over seconds."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("step", "seconds"),
        ("steps", "seconds of steps"),
        strict=True,
    ):
        figures.frame(axes)
        for i, row in enumerate(rows):
            color = figures.COLORS[i % len(figures.COLORS)]
            curve = row["curve"]
            axes.plot(curve[key], curve["train"], color=color, label=row["method"])
        axes.axhline(rows[0]["curve"]["train"][-1], color="#888888", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def default_methods(problem: str) -> tuple[str, ...]:
    """All methods that suit the problem on this kind of device."""
    loops = problem != "cifar10_5k_cnn" or jax.default_backend() != "cpu"
    return tuple(name for name in METHODS if name != "hessian_free" or loops)


def resolve(options: Options) -> tuple[Problem, tuple[str, ...]]:
    """Checks the options; returns the problem and the names of the methods.

    Raises:
      ValueError: with one line that says what is allowed.
    """
    options.check()
    cli.check_known("problem", options.problem, tuple(PROBLEMS))
    cli.check_known("scale", options.scale, SCALES)
    names = default_methods(options.problem)
    if options.methods is not None:
        names = tuple(dict.fromkeys(name.strip() for name in options.methods.split(",")))
    for name in names:
        cli.check_known("method", name, tuple(METHODS))
    make = PROBLEMS[options.problem]
    return make(options.scale == "full", options.data_dir, options.seed), names


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    try:
        problem, names = resolve(options)
        default = f"natural-gradient-{options.problem}-{options.scale}"
        folder = folders.locate(options.runs_dir, options.name, default)
    except ValueError as error:
        return cli.fail(error)
    console = cli.console(130)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    title = (
        f"{options.problem}, {options.scale}: {parameters:,} parameters, "
        f"{len(problem.train[1]):,} examples, batches of {problem.batch_size}"
    )
    steps = cli.plural(options.steps or problem.steps, "step")
    with claim_results(folder, PROG, ["curves.png"]):
        console.print(f"{title}, up to {steps} -> {folder}", soft_wrap=True)
        try:
            rows = run(options, problem, names)
        except ValueError as error:
            return cli.fail(error, 1)
        lines = conclusion(rows)
        record = {"machine": timing.machine(), "title": title, "conclusion": lines, "methods": rows}
        write_results(folder, PROG, options, record)
        cli.write_atomic(folder / "curves.png", figures.png(picture(title, rows)))
    columns = ["method", "setting", "steps", "ms/step", "compile s", "train", "test"]
    view = tables.table([*columns, "steps there", "seconds there"], left=2)
    for row in rows:
        curve, there = row["curve"], row["reached"]
        view.add_row(
            row["method"],
            ", ".join(f"{name} {value:g}" for name, value in row["chosen"].items()),
            str(curve["step"][-1]),
            f"{row['milliseconds_per_step']:.3g}",
            f"{row['compile_seconds']:.2g}",
            f"{curve['train'][-1]:.4g}",
            f"{curve['test'][-1]:.4g}",
            *(("never", "never") if there is None else (str(there[0]), f"{there[1]:.3g}")),
        )
    console.print(view)
    for line in lines:
        console.print(line)
    console.print(f"picture: {folder / 'curves.png'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
