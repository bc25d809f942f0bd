"""One process of the distributed runs that `test_cluster` starts.

    python cluster_worker.py JSON

joins a run with the JSON's `join` (arguments of `cluster.initialize`), prints what it finds, one
JSON per line, and takes steps, each of them a collective, until something ends it. `timeouts` of
the JSON replaces constants of the module.
"""

from __future__ import annotations

import json
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import UsageError
from experiments.training import cluster


def tell(**what):
    print(json.dumps(what), flush=True)


def make_folder(fail):
    if fail:
        raise UsageError("the folder is taken")
    return {"folder": "runs/a", "process": jax.process_index()}


def main(join, timeouts, early_signal=False, bug=False):
    for name, seconds in timeouts.items():
        setattr(cluster, name, seconds)
    try:
        cluster.initialize(**join)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    answers = [cluster.from_main(lambda: make_folder(fail=False))]
    try:
        cluster.from_main(lambda: make_folder(fail=True))
    except UsageError as error:
        answers.append(str(error))
    tell(answers=answers, main=cluster.is_main(), devices=len(jax.devices()))
    last = jax.process_index() == jax.process_count() - 1
    if early_signal:
        if last:
            signal.raise_signal(signal.SIGTERM)
        time.sleep(3)
    cluster.advise("start again with --resume")

    mesh = jax.make_mesh((jax.device_count(),), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = np.ones(jax.local_device_count(), np.float32)
    batch = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, jax.P("i")), rows)
    total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))
    with cluster.stop_signals() as requested, cluster.guard():
        for step in range(1, 20_000):
            assert float(total(batch)) == jax.device_count()
            if step == 5:
                tell(started=True)
            stopped_by = requested()
            if stopped_by is not None:
                tell(step=step, stopped_by=stopped_by)
                return 0
            if bug and last and step == 20:
                raise ArithmeticError("a bug")
            time.sleep(0.005)
    return 3


if __name__ == "__main__":
    sys.exit(main(**json.loads(sys.argv[1])))
