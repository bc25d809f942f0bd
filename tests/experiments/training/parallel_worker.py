"""The runs that `test_parallel` compares, and a process of a distributed run that makes them.

    python tests/experiments/training/parallel_worker.py PORT PROCESSES ID FOLDER JSON

takes part in a run of so many processes with 4 devices each and does what the JSON lists: `runs`,
keyword arguments of `train`, and `poisoned`, those of `poisoned_metrics`. The results of a process
go to `FOLDER/ID.npz`, one array per run.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.methods import METHODS
from experiments.training import networks
from experiments.training.parallel import AXIS, FETCH_EVERY, Parallel
from experiments.training.step import StepOptions, init_state, train_step

STEPS, BATCH = 20, 32


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)  # splits over 8 devices
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))


def batches(dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, BATCH, 6))
    # Learnable labels: with random ones the dominant subspace is barely defined.
    y = np.argmax(x[..., :3] + 0.3 * rng.normal(size=(STEPS, BATCH, 3)), -1).astype(np.int32)
    return [{"x": x, "y": y} for x, y in zip(x.astype(dtype), y, strict=True)]


def own_rows(batch, total=BATCH):
    """The rows of a global batch that belong to this process."""
    size = total // jax.process_count()
    start = jax.process_index() * size
    return jax.tree.map(lambda a: a[start : start + size], batch)


def build(name, workers=None):
    method = METHODS[name]
    more = {} if workers is None else {"axis_name": AXIS, "num_workers": workers}
    if method.needs_objective:
        graphdef, _, rest = networks.split(Mlp(nnx.Rngs(0)))
        more["objective"] = networks.objective(graphdef).bind(rest=rest, **batches()[0])
    # The middle of the method's own grid, but for natural gradients: the longer their steps, the
    # more they make of rounding errors. Two subspace directions, to compile fast.
    rate = method.learning_rates[0 if method.family == "natural gradient" else 2]
    return method, method.build(rate, total_steps=STEPS, num_classes=2, **more)


def setup(tx, mode, devices, *, model=Mlp, workers=None, dtype=np.float32, **options):
    """A `Parallel` and a function that makes its first state."""
    graphdef, params, rest = networks.split(model(nnx.Rngs(0)))

    def make_state():
        return init_state(tx, jax.tree.map(lambda a: a.astype(dtype), params), rest)

    step = functools.partial(
        train_step,
        tx,
        networks.objective(graphdef),
        options=StepOptions(per_worker=workers is not None),
    )
    return Parallel(mode, devices, step, workers=workers, **options), make_state


def train(name, mode, num_devices, *, model=Mlp, workers=None, dtype="float32"):
    """Parameters (with workers: of each) after all steps, as one vector, and the losses."""
    method, tx = build(name, workers)
    parallel, make_state = setup(
        tx,
        mode,
        jax.devices()[:num_devices],
        model=model,
        workers=workers,
        dtype=dtype,
        min_sharded_size=0,
    )
    state = parallel.init(make_state)
    data = batches(dtype)
    losses = []
    for i, batch in enumerate(data):
        # The method's refresh, on a batch of its own.
        refresh = method.refresh(i)
        curvature = parallel.put_batch(own_rows(data[0])) if refresh else None
        state, metrics = parallel.step(
            state, parallel.put_batch(own_rows(batch)), curvature, refresh
        )
        losses.append(metrics["loss"])
        if i % FETCH_EVERY == 0:
            jax.block_until_ready(losses)
    gather = jax.jit(lambda tree: tree, out_shardings=parallel.replicated)
    final = jax.device_get(gather(parallel.get_state(state)))
    vector = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(final.params)])
    assert np.all(final.step == STEPS)
    return vector, np.stack(jax.device_get(losses)), final


def poisoned_metrics(mode, num_devices, workers=None):
    """The metrics as each of this process's devices has them when one row of the batch is NaN."""
    parallel, make_state = setup(
        optax.with_extra_args_support(optax.sgd(0.1)),
        mode,
        jax.devices()[:num_devices],
        workers=workers,
        min_sharded_size=0,
    )
    batch = batches()[0]
    batch["x"][-1] = np.nan
    _, metrics = parallel.step(parallel.init(make_state), parallel.put_batch(own_rows(batch)))
    return {
        name: np.array([np.squeeze(shard.data) for shard in metric.addressable_shards])
        for name, metric in metrics.items()
    }


def main(port, processes, process_id, folder, plan):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process_id))
    results = {}
    plan = json.loads(plan)
    for run in plan.get("runs", []):
        with jax.enable_x64(run.get("dtype") == "float64"):
            vector, losses, _ = train(num_devices=None, **run)
        results[json.dumps(["params", run])] = vector
        results[json.dumps(["losses", run])] = losses
    for run in plan.get("poisoned", []):
        for name, values in poisoned_metrics(num_devices=None, **run).items():
            results[json.dumps([name, run])] = values
    np.savez(Path(folder) / f"{process_id}.npz", **results)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
