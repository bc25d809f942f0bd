"""Fixtures that the tests of the experiments share."""

from __future__ import annotations

import pytest

from experiments import subspace_study
from experiments.training.studies.subspace_runs import Study


@pytest.fixture(scope="session")
def study() -> Study:
    """A tiny study of the subspaces; all tests share it, so that each program compiles once."""
    return Study(subspace_study.resolve(subspace_study.Options(scale="tiny"))[0])
