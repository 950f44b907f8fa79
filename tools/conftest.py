"""Fixtures that the tests in tools/ share with test_all.py."""

from test_all import (decode, finished, finished2, no_pictures, prompts, stage2,  # noqa: F401
                      stock_pipe, teacher, turns1)
