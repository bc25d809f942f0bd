"""Fixtures that the tests of the readers share."""

from __future__ import annotations

import pytest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"
