"""Fixtures that the tests in tools/ share with test_all.py."""

from test_all import decode, finished, prompts, stock_pipe, teacher, turns1  # noqa: F401
