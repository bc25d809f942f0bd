"""What a command would take, found out before it: parameters, memory, and time from a few steps."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

import models
from experiments import cli, data, hlo, progress, timing
from experiments.methods import Method
from experiments.training import networks
from experiments.training.plan import Plan
from experiments.training.program import Program, evaluation_batch
from experiments.training.replicas import Plan as Comparison
from experiments.training.replicas import Replica, Trainer, tree_bytes

# Steps that are timed in each form, and steps that show how often each form comes.
TIMED, RHYTHM = 5, 200


class Speed(NamedTuple):
    """Seconds that were measured.

    Attributes:
      first: of the first steps of every form: compilation and a cold start.
      step: of a step after these, with refreshes at their usual rhythm.
      evaluation: of one evaluation of the validation split.
    """

    first: float
    step: float
    evaluation: float

    def seconds(self, steps: int, evaluations: int, times: int = 1) -> float:
        """Of a run, or of several runs one after the other that share their programs."""
        return self.first + times * (steps * self.step + evaluations * self.evaluation)

    def source(self) -> str:
        """Where an estimate comes from, for the person who reads it."""
        return (
            f"{1e3 * self.step:.3g} ms a step, measured over {TIMED} steps after "
            f"{self.first:.1f} s of compilation"
        )


def measure_steps(
    step: Callable[[int], Any], refresh: Callable[[int], Any], steps: int
) -> tuple[float, float]:
    """Times every form of a step.

    >>> first, seconds = measure_steps(lambda number: jax.numpy.ones(3), lambda number: None, 10)
    >>> first > 0, seconds > 0
    (True, True)

    Args:
      step: makes a step of the form that the step with this number has; returns arrays to wait for.
      refresh: the form of the step with this number.
      steps: length of the run.

    Returns:
      `Speed.first` and `Speed.step`.
    """
    forms = [refresh(number) for number in range(min(steps, RHYTHM))]
    counts = collections.Counter(forms)
    first = mean = 0.0
    for form, count in counts.items():
        number = forms.index(form)

        def several(times: int, number: int = number) -> Any:
            return [step(number) for _ in range(times)][-1]

        first += timing.timed(functools.partial(several, 1))[1]
        if count > 1 or len(counts) == 1:  # a cold start comes only once
            mean += count / len(forms) * timing.timed(functools.partial(several, TIMED))[1] / TIMED
    return first, mean


def size(count: float) -> str:
    """Bytes as text.

    >>> size(900), size(1234567), size(5.25e9)
    ('0.9 kB', '1.23 MB', '5.25 GB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


# One run of `train` -----------------------------------------------------------------------------


def of_run(plan: Plan, program: Program) -> tuple[dict[str, str], Speed]:
    """What a run would take: compiles its steps, makes a few of them and writes nothing.

    Args:
      plan: the run.
      program: what it compiles to.

    Returns:
      Lines by what they are about, and what was measured.
    """
    # Here, because checkpoints need Orbax, which no command's `--help` should wait for.
    from experiments.training.loop import curvature_batch, open_batches

    runner, curvature = program.runner, curvature_batch(plan, program)
    state, forms = runner.init(program.make_state), set[Any]()
    with open_batches(plan, program) as batches:

        def step(number: int) -> Any:
            nonlocal state
            refresh = plan.refresh_at(number)
            forms.add(refresh)
            progress.tell("compiling and timing steps" if not refresh else "finding the subspace")
            state, metrics = program.step(state, next(batches), curvature, refresh)
            return metrics

        first, seconds = measure_steps(step, plan.refresh_at, plan.steps)
        batch = next(batches)
    memory = max(
        hlo.memory(runner.lower(state, batch, curvature if form else None, form).compile()).total
        for form in forms
    )
    progress.tell("timing a validation")
    validation, at_once = plan.task.validation, evaluation_batch(plan.task)
    part = dataclasses.replace(validation, x=validation.x[:at_once], y=validation.y[:at_once])
    program.evaluate(state, part)
    scored = timing.timed(lambda: program.evaluate(state, part))[1]
    parts = math.ceil(len(validation) / at_once)
    speed = Speed(first, seconds, scored * parts)
    validations = math.ceil(plan.steps / plan.eval_every)
    shapes = program.shapes
    lines = {
        "parameters": f"{parameters(shapes.params):,}",
        "steps": f"{plan.steps} of {cli.plural(plan.batch_size, 'example')}, "
        f"{cli.plural(validations, 'validation')}",
        "memory": f"{size(memory)} on each device, from the compiled step; from shapes: "
        f"parameters {size(tree_bytes(shapes.params))}, optimizer "
        f"{size(tree_bytes(shapes.opt_state))}, batch {size(tree_bytes(batch))}",
        "time": f"about {cli.duration(speed.seconds(plan.steps, validations))}: {speed.source()}; "
        f"{scored * parts:.2g} s a validation; without saving",
    }
    return lines, speed


# Many runs together -----------------------------------------------------------------------------


def of_runs(trainer: Trainer, method: Method, replicas: Sequence[Replica]) -> Speed:
    """Measures runs of a method that are trained together."""
    progress.tell(f"{method.name}: timing a few steps")
    plan, runs = trainer.plan, trainer.start(method, replicas)
    first, step = measure_steps(
        runs.advance, lambda number: trainer.refresh(method, number), plan.steps
    )
    trainer.evaluate(runs, "validation")  # compiles
    _, evaluation = timing.timed(lambda: trainer.evaluate(runs, "validation"))
    return Speed(first, step, evaluation)


class Share(NamedTuple):
    """What the runs of one method in a comparison would take.

    Attributes:
      method: its name.
      runs: their number.
      together: how many are trained together.
      bytes: memory of those, estimated from shapes.
      step: seconds of a step of those.
      seconds: of all.
    """

    method: str
    runs: int
    together: int
    bytes: float
    step: float
    seconds: float


def of_method(trainer: Trainer, method: Method, todo: Sequence[Replica]) -> Share:
    """Forecasts runs of one method.

    Args:
      trainer: the trainer of the comparison.
      method: the method.
      todo: its runs, at least one.

    Returns:
      What they would take.
    """
    plan: Comparison = trainer.plan
    together = trainer.chunk_size(method, len(todo))
    speed = of_runs(trainer, method, todo[:together])
    evaluations = math.ceil(plan.steps / plan.eval_every) + 1
    seconds = speed.seconds(plan.steps, evaluations, math.ceil(len(todo) / together))
    need = together * trainer.replica_bytes(method)
    return Share(method.name, len(todo), together, need, speed.step, seconds)


def of_shares(trainer: Trainer, shares: Sequence[Share]) -> dict[str, str]:
    """The forecast of a comparison in lines.

    Args:
      trainer: the trainer of the comparison.
      shares: of its methods.

    Returns:
      Lines by what they are about.
    """
    plan, most = trainer.plan, max(shares, key=lambda share: share.bytes)
    rows = slice(plan.batch_size)
    batch = plan.task.train.x[rows].nbytes + plan.task.train.y[rows].nbytes
    return {
        "parameters": f"{parameters(trainer.weights[0][0]):,}",
        "memory": f"{size(most.bytes)} for {cli.plural(most.together, 'run')} of {most.method} "
        f"together, estimated from shapes; a batch has {size(batch)}",
        "time": f"about {cli.duration(sum(share.seconds for share in shares))}, from steps "
        "measured after compilation, with compilation and validations, without the final timing",
    }


# Other studies ----------------------------------------------------------------------------------


def parameters(params: Any) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def of_shapes(task: data.Task, model: str, batch_size: int) -> dict[str, str]:
    """What shapes tell of a study that nobody measures beforehand.

    Args:
      task: its data.
      model: name of its model, with default options.
      batch_size: examples of a batch.

    Returns:
      Lines by what they are about.
    """

    def make() -> Any:
        return networks.split(
            models.create(
                model,
                input_shape=task.input_shape,
                num_classes=task.num_classes or None,
                vocabulary_size=task.vocabulary_size,
            )
        )[1]

    shapes = jax.eval_shape(make)
    batch = task.train.x[:batch_size].nbytes + task.train.y[:batch_size].nbytes
    return {
        "parameters": f"{parameters(shapes):,}",
        "memory": f"parameters {size(tree_bytes(shapes))}, batch {size(batch)}, from shapes; "
        "intermediate results are not counted",
    }


def of_ensembles(trainer: Trainer, method: Method, kinds: int, rates: Sequence[float]) -> float:
    """Seconds that kinds of ensembles take, all of which have the same steps to make.

    Args:
      trainer: of the plan for the whole budget.
      method: how they are trained.
      kinds: number of kinds.
      rates: the learning rates to choose from.

    Returns:
      The estimate.
    """
    plan = trainer.plan
    replicas = [(rate, seed) for rate in rates for seed in range(plan.seeds)]
    together = trainer.chunk_size(method, len(replicas))
    speed = of_runs(trainer, method, replicas[:together])
    return kinds * speed.seconds(plan.steps, 0, math.ceil(len(replicas) / together))
