"""Runs in a service: modules with the same interface stand for the packages."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import UsageError
from experiments.runs.remote_runs import SERVICES, RemoteRun, load

CONFIG = {"method": "sgd"}


class Server:
    """What a service keeps: the points of each run, and how often a session ended."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, str, float]]] = {}
        self.configs: list[Any] = []
        self.ended = 0

    def begin(self, name: str | None) -> str:
        name = name or f"r{len(self.runs)}"
        self.runs.setdefault(name, [])
        return name

    def add(self, name: str, numbers: dict[str, float], step: int) -> None:
        self.runs[name] += [(step, tag, value) for tag, value in numbers.items()]

    def end(self) -> None:
        self.ended += 1


def fake(service: str, server: Server) -> Any:
    """A module with the functions of the package that an adapter may call."""
    if service == "wandb":

        def init(*, project: str, name: str, id: str | None, resume: str, dir: str, config: Any):
            assert resume == "allow"
            server.configs.append(config)
            run = server.begin(id)

            def log(data: dict[str, float], *, step: int) -> None:
                server.add(run, data, step)

            return types.SimpleNamespace(id=run, log=log, finish=server.end)

        return types.SimpleNamespace(init=init)
    if service == "aim":

        class Run:
            def __init__(self, run_hash: str | None = None, *, experiment: str):
                self.hash = server.begin(run_hash)

            def __setitem__(self, key: str, value: Any) -> None:
                server.configs.append(value)

            def track(self, value: float, name: str, step: int) -> None:
                server.add(self.hash, {name: value}, step)

            def close(self) -> None:
                server.end()

        return types.SimpleNamespace(Run=Run)
    active: list[str] = []

    def start_run(run_id: str | None = None, *, run_name: str | None = None) -> Any:
        active[:] = [server.begin(run_id)]
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=active[0]))

    return types.SimpleNamespace(
        set_experiment=lambda name: None,
        start_run=start_run,
        log_params=server.configs.append,
        log_metrics=lambda metrics, step: server.add(active[0], metrics, step),
        end_run=server.end,
    )


def rows(first: int, last: int) -> list[Any]:
    return [{"step": i, "loss": 1 / i, "seconds": 1.0} for i in range(first, last + 1)]


@pytest.mark.parametrize("service", SERVICES)
def test_resumed_runs_go_on_without_doubled_points(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    monkeypatch.setitem(sys.modules, service, fake(service, server))
    first = RemoteRun(service, tmp_path, CONFIG, warn=pytest.fail)
    first.write(rows(1, 4))
    first.write(rows(5, 6))
    # Killed behind step 6 and resumed from the checkpoint of step 3.
    again = RemoteRun(service, tmp_path, CONFIG, warn=pytest.fail)
    again.write(rows(4, 8))
    again.close()
    assert server.runs == {"r0": [(i, "train/loss", 1 / i) for i in range(1, 9)]}
    assert server.configs[0] == CONFIG
    assert server.ended == 1
    other = next(name for name in SERVICES if name != service)
    monkeypatch.setitem(sys.modules, other, fake(other, server))
    with pytest.raises(UsageError, match=f"is of --log {service}; continue the run with that"):
        RemoteRun(other, tmp_path, CONFIG, warn=pytest.fail)


def test_a_service_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, told = Server(), []
    monkeypatch.setitem(sys.modules, "mlflow", fake("mlflow", server))
    run = RemoteRun("mlflow", tmp_path, CONFIG, warn=told.append)
    server.runs.clear()
    run.write(rows(1, 2))
    run.write(rows(3, 4))
    assert len(told) == 1
    assert told[0].startswith("mlflow takes no more metrics")
    assert json.loads((tmp_path / "remote.json").read_text())["sent"] == 2


@pytest.mark.parametrize("service", SERVICES)
def test_an_absent_package_is_named(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, service, types.ModuleType(service))
    with pytest.raises(UsageError, match=f"pip install {service}"):
        load(service)
    monkeypatch.setitem(sys.modules, service, None)
    with pytest.raises(UsageError, match=f"pip install {service}"):
        load(service)
