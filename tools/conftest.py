"""Fixtures that the tests in tools/ share with test_all.py and each other."""

import pytest

import run
from test_all import (decode, finished, finished2, no_pictures, prompts, stage2,  # noqa: F401
                      stock_pipe, teacher, turns1)
from tools.settings import leaving
from tools.test_processes import small_sd3  # noqa: F401


@pytest.fixture
def one_process(request, monkeypatch):
    """Tests open one run folder several times in one process, which its lock would refuse; and what
    a Run changes in the process (signals) is put back, as main() does."""
    if "lock" not in request.node.name:
        monkeypatch.setattr(run, "fcntl", None)
    yield
    leaving.close()
