"""The training loop: restore, then for each step batch, step, fetch, validate, write, save."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np
from rich.console import Console

import models
from experiments import cli, data
from experiments.data.following import BatchChooser, FollowingBatches, following_batches
from experiments.data.prefetch import DevicePrefetcher
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.records import number
from experiments.runs.remote_runs import RemoteRun
from experiments.training import cluster
from experiments.training.history import History
from experiments.training.non_finite import NonFinitePolicy
from experiments.training.plan import Plan
from experiments.training.profiling import StepTrace
from experiments.training.program import Program
from experiments.training.sampling import NUMBER, write_detections, write_samples
from experiments.training.step import TrainState

PyTree = Any
Batches = DevicePrefetcher | FollowingBatches
# The picture of what a generative model draws at the end.
SAMPLES = "samples.png"
# The picture of what a detector finds at the end.
DETECTIONS = "detections.png"


@dataclasses.dataclass
class Run:
    """Where a run stands: all that it goes on from, most of it in the latest checkpoint.

    Attributes:
      state: what a step reads and writes, placed on the devices.
      patience: number of validations without a lower loss that end the run; ``None``: none do.
      step: number of steps done.
      best: the lowest validation loss so far.
      worse: number of validations since then.
    """

    state: TrainState
    patience: int | None
    step: int = 0
    best: float = math.inf
    worse: int = 0

    def note(self, validation_loss: float) -> None:
        """Counts a validation; NaN does not count as an improvement."""
        self.worse = 0 if validation_loss < self.best else self.worse + 1
        self.best = min(validation_loss, self.best)  # never NaN

    @property
    def stops_early(self) -> bool:
        """Whether the validation loss has not become lower for too long."""
        return self.patience is not None and self.worse >= self.patience


def train(plan: Plan, program: Program, console: Console) -> int | None:
    """Runs a plan in its folder, from the latest checkpoint there on.

    Args:
      plan: what to run.
      program: what it compiles to.
      console: where progress is shown.

    Returns:
      ``None`` at the end, or the number of the signal that interrupted the run.

    Raises:
      UsageError, CheckpointError: what is in the folder does not fit; it is left as it is.
      NonFiniteError: the run met numbers that are not finite and could not go on.
      DataError: an example cannot be read.
    """
    with (
        open_batches(plan, program) as batches,
        Checkpoints(plan.folder / "checkpoints", plan.options.keep, warn=console.print) as saved,
        open_history(plan, program, console) as history,
        open_trace(plan) as trace,
        cluster.stop_signals(console.print) as stop_requested,
        cluster.guard(),
        jax.transfer_guard("disallow"),
    ):
        curvature = curvature_batch(plan, program)
        policy = NonFinitePolicy(plan.options.non_finite, history, console)
        run = restore(program, saved, batches, history)
        if run.step:
            console.print(f"resuming at step {run.step}")
        stopped_by = None
        compiled: set[Any] = set()  # the forms of the step that have been called
        refresh_at = plan.refresh_schedule()
        while run.step < plan.steps and stopped_by is None and not run.stops_early:
            history.begin_step()
            batch, refresh = next(batches), refresh_at(run.step, run.state)
            if refresh not in compiled:
                if not compiled and not console.is_terminal:  # where no line shows it
                    console.print("compiling the first step")
                compiled.add(refresh)
                history.tell("compiling")
            with trace.step():
                run.state, metrics = program.step(run.state, batch, curvature, refresh)
            if activity := program.cold_start(refresh):
                history.tell(activity)  # the step is under way, and waited for below
            if trace.done(metrics):
                console.print(f"profile: {trace.file}", soft_wrap=True)
            if isinstance(batches, FollowingBatches):
                batches.tell(metrics["share"])
            run.step += 1
            history.add(run.step, metrics, batches.get_state())
            stopped_by = stop_requested()

            validates = plan.is_due(run.step, plan.eval_every)
            saves = stopped_by is not None or plan.is_due(run.step, plan.checkpoint_every)
            if not (validates or saves or history.is_due):
                continue  # so that steps overlap
            if (bad := policy.judge(history.fetch(), run.state)) is not None:
                saved.wait()
                run = restore(program, saved, batches, history)
                batches.set_state(bad.position)  # the batches up to the bad one are not seen again
                policy.went_back(bad, run.step)
                continue
            if validates:
                scores = program.evaluate(run.state, plan.task.validation)
                run.note(scores["loss"])
                history.add_scores(scores)
                if plan.is_shown(run.step) or run.stops_early:
                    console.print(f"step {run.step}: validation {show(scores)}")
            history.write()
            if saves or run.stops_early:
                save(run, program, saved, batches)
                policy.saved()
        saved.wait()
        if run.stops_early:
            console.print(
                f"stopped early at step {run.step}: {run.patience} validations in a row without a "
                "lower loss"
            )
        elif run.step < plan.steps:
            saves_what = (
                f"saved step {run.step} of {plan.steps}" if run.step else "nothing was done"
            )
            console.print(f"interrupted: {saves_what}")
            return stopped_by
        scores = program.evaluate(run.state, plan.task.test)
    write_result(plan, run, scores)
    console.print(
        f"test {show(scores)}; metrics and checkpoints are in {plan.folder}", soft_wrap=True
    )
    if models.draws_images(plan.model):
        console.print(f"drawing {NUMBER} images from the model")
        write_samples(program, run.state, plan.folder / SAMPLES)
        console.print(f"images drawn: {plan.folder / SAMPLES}", soft_wrap=True)
    if plan.loss == "detection":
        write_detections(program, run.state, plan.folder / DETECTIONS)
        console.print(
            f"boxes drawn, green: the truth, orange: found, with their class: "
            f"{plan.folder / DETECTIONS}",
            soft_wrap=True,
        )
    return None


# What a run works with -------------------------------------------------------------------------


def open_batches(plan: Plan, program: Program) -> Batches:
    """The batches of the run from its start on, each placed on the devices ahead of its use."""
    if plan.follow_threshold is not None:
        return following_batches(
            plan.task.train,
            batch_size=plan.batch_size,
            seed=plan.options.seed,
            chooser=BatchChooser(plan.follow_threshold),
            shard=grain.sharding.ShardByJaxProcess(),
            workers=plan.options.data_workers,
            put=program.runner.put_batch,
            prefetch=plan.options.prefetch,
        )
    dataset = data.batches(
        plan.task.train,
        batch_size=plan.batch_size,
        seed=plan.options.seed,
        shard=grain.sharding.ShardByJaxProcess(),
        augment=plan.augment,
        num_classes=plan.task.num_classes,
        workers=plan.options.data_workers,
    )
    place = program.runner.put_batch
    return data.prefetch_to_device(iter(dataset), place, plan.options.prefetch)


def open_history(plan: Plan, program: Program, console: Console) -> History:
    """The metrics of the run."""

    def open_remote() -> RemoteRun:
        return RemoteRun(plan.options.log, plan.folder, plan.config(), warn=console.print)

    return History(
        plan.folder,
        program.columns,
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=plan.batch_size,
        title=f"{plan.method.name} on {plan.task.name}",
        console=console,
        open_remote=None if plan.options.log == "none" else open_remote,
    )


def open_trace(plan: Plan) -> StepTrace:
    """The profile of a few steps, which the main process records if it is asked for."""
    recorded = plan.options.profile and cluster.is_main()
    return StepTrace(plan.folder / "profile" if recorded else None)


def curvature_batch(plan: Plan, program: Program) -> PyTree:
    """The examples for Hessian-vector products, placed; ``None`` for a method without."""
    if plan.curvature_batch_size is None:
        return None
    # Fixed: redrawn at every refresh, its noise alone would move the subspace.
    order = np.random.default_rng(plan.options.seed).permutation(len(plan.task.train))
    shard = grain.sharding.ShardByJaxProcess()
    rows = np.split(order[: plan.curvature_batch_size], shard.shard_count)[shard.shard_index]
    return program.runner.put_batch({"x": plan.task.train.x[rows], "y": plan.task.train.y[rows]})


# Saving and restoring --------------------------------------------------------------------------


def restore(program: Program, saved: Checkpoints, batches: Batches, history: History) -> Run:
    """The run at its latest checkpoint, or at its start; batches and metrics go there, too."""
    runner, patience = program.runner, program.plan.options.early_stopping
    with jax.transfer_guard("allow"):  # Orbax and its checks move arrays in their own ways
        if saved.latest() is None:
            run = Run(runner.init(program.make_state), patience)
        else:
            step, state, kept = saved.restore(runner.abstract_state(program.make_state))
            best = math.inf if kept["best"] is None else kept["best"]
            run = Run(runner.put_state(state), patience, step, best, kept["worse"])
            batches.set_state(kept["batches"])
        history.begin(run.step)
    return run


def save(run: Run, program: Program, saved: Checkpoints, batches: Batches) -> None:
    """Starts to save a checkpoint; the metrics up to it are on disk already."""
    kept = {
        "batches": batches.get_state(),
        "best": run.best if math.isfinite(run.best) else None,
        "worse": run.worse,
    }
    with jax.transfer_guard("allow"):
        saved.save(run.step, program.runner.get_state(run.state), data=kept)


def write_result(plan: Plan, run: Run, scores: Mapping[str, float]) -> None:
    """Writes the scores of the test split."""
    named = {f"test_{name}": number(score) for name, score in scores.items()}
    if cluster.is_main():
        cli.write_atomic(plan.folder / "result.json", cli.to_json({"steps": run.step} | named))


def show(scores: Mapping[str, float]) -> str:
    """Scores as the console shows them."""
    return ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
