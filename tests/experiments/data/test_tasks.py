"""Which command takes which task."""

from __future__ import annotations

import pytest

import models
from experiments import (
    compare,
    data,
    ensembles,
    landscape,
    lr_range_test,
    methods,
    scaling,
    solvers,
    survey,
    trackers,
)
from experiments.training import losses

COMMANDS = (compare, ensembles, landscape, lr_range_test, scaling, solvers, survey, trackers)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__.split(".")[-1])
@pytest.mark.parametrize("task", ["wikitext2", "imagenet_folder"])
def test_what_compares_classifiers_says_so(command, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["--task", task]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"task '{task}' is for `train` only" in err
    assert "valid: digits, mnist, " in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", data.TASKS)
def test_defaults_name_what_there_is(task):
    defaults = data.DEFAULTS[task]
    assert defaults.model in models.list()
    assert defaults.method in methods.METHODS
    assert defaults.loss in data.LOSSES[defaults.kind]
    assert set(data.LOSSES[defaults.kind]) <= set(losses.LOSSES)
    # What own files have as a target depends on their classes.
    assert (defaults.target_accuracy > 0) == (task in {*data.CLASSIFICATION} - {*data.OWN_TASKS})
