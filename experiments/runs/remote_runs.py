"""The metrics of a run also in Weights & Biases, Aim or MLflow, where that package is installed.

`remote.json` in the run's folder holds the name that the service gave the run, so that a resumed
run continues it, and the last step that was sent, so that no step is sent twice.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.cli import UsageError
from experiments.runs.metric_files import Row, tagged
from experiments.runs.records import read_json

RECORD = "remote.json"
PROJECT = "optax_accel"
# The packages by the name of the service, and a function that only the package has: a folder of the
# same name, such as those that W&B makes, can be imported, too.
SERVICES: Mapping[str, str] = {"wandb": "init", "aim": "Run", "mlflow": "start_run"}


def load(service: str) -> Any:
    """The package of a service.

    Args:
      service: one of `SERVICES`.

    Returns:
      The imported package.

    Raises:
      UsageError: it is not installed.
    """
    try:
        package = importlib.import_module(service)
    except ImportError:
        package = None
    if not hasattr(package, SERVICES[service]):
        raise UsageError(
            f"--log {service} needs the package {service}; install it with pip install {service}, "
            "or leave out --log"
        )
    return package


class RemoteRun:
    """A run in a service: of a folder that has one already, the same.

    What has been sent stays: after ``--non-finite rollback`` the service keeps the steps of the
    first attempt. A process that is killed while it sends leaves out the steps of that moment; the
    files of the folder have them.

    Args:
      service: one of `SERVICES`.
      folder: the run's folder, whose name the run gets.
      config: the settings of the run, as plain JSON.
      warn: tells a person that the service no longer takes the metrics.

    Raises:
      UsageError: the package is not installed, ``remote.json`` is damaged or of another service,
        or the service refuses the run.
    """

    def __init__(
        self, service: str, folder: Path, config: Mapping[str, Any], warn: Callable[[str], None]
    ):
        package = load(service)
        self._service, self._path, self._warn = service, folder / RECORD, warn
        name, self._sent = self._read()
        begin = {"wandb": _wandb, "aim": _aim, "mlflow": _mlflow}[service]
        try:
            name, self._send, self._end = begin(package, folder, config, name)
        except Exception as error:  # whatever the package raises
            raise UsageError(
                f"--log {service}: {cli.shortened(str(error))}; set up {service}, or give "
                "--log none"
            ) from error
        self._name: str = name
        self._write()

    def _read(self) -> tuple[str | None, int]:
        if not self._path.exists():
            return None, 0
        try:
            record = read_json(self._path)
            service, name, sent = record["service"], str(record["run"]), int(record["sent"])
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{self._path} is damaged; give another --name") from None
        if service != self._service:
            raise UsageError(
                f"{self._path} is of --log {service}; continue the run with that, or give another "
                "--name"
            )
        return name, sent

    def _write(self) -> None:
        record = {"service": self._service, "run": self._name, "sent": self._sent}
        cli.write_atomic(self._path, cli.to_json(record))

    def write(self, rows: Sequence[Row]) -> None:
        """Sends rows, but for steps that have been sent before."""
        new = [row for row in rows if int(row["step"] or 0) > self._sent]
        if not new or self._send is None:
            return
        self._sent = int(new[-1]["step"] or 0)
        self._write()  # before they are sent, so that none is sent twice
        try:
            for row in new:
                self._send(tagged(row), int(row["step"] or 0))
        except Exception as error:  # the run does not end because a service is away
            self._send = None
            self._warn(
                f"{self._service} takes no more metrics ({cli.shortened(str(error))}); the files "
                "of the run have them all"
            )

    def close(self) -> None:
        """Ends the session; the run can be continued."""
        try:
            self._end()
        except Exception as error:
            self._warn(f"{self._service}: {cli.shortened(str(error))}")


_Send = Callable[[dict[str, float], int], Any] | None
# The run's name, a function that sends the numbers of a step, a function that ends the session.
_Begun = tuple[str, _Send, Callable[[], Any]]


def _wandb(wandb: Any, folder: Path, config: Mapping[str, Any], name: str | None) -> _Begun:
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        id=name,
        resume="allow",
        dir=str(folder),
        config=dict(config),
    )
    return run.id, lambda numbers, step: run.log(numbers, step=step), run.finish


def _aim(aim: Any, folder: Path, config: Mapping[str, Any], name: str | None) -> _Begun:
    run = aim.Run(run_hash=name, experiment=PROJECT)
    run.name = folder.name
    run["config"] = dict(config)

    def send(numbers: dict[str, float], step: int) -> None:
        for tag, value in numbers.items():
            run.track(value, name=tag, step=step)

    return run.hash, send, run.close


def _mlflow(mlflow: Any, folder: Path, config: Mapping[str, Any], name: str | None) -> _Begun:
    if not any(os.environ.get(f"MLFLOW_EXPERIMENT_{x}") for x in ("NAME", "ID")):
        mlflow.set_experiment(PROJECT)
    run = mlflow.start_run(run_id=name, run_name=None if name else folder.name)
    if name is None:
        mlflow.log_params({key: str(value)[:500] for key, value in config.items()})
    return run.info.run_id, lambda numbers, step: mlflow.log_metrics(numbers, step), mlflow.end_run
