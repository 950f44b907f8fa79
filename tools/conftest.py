"""Fixtures that the tests in tools/ share with test_all.py and each other; made once for all."""

from test_all import finished, finished2, no_pictures, prompts, stock_pipe, teacher  # noqa: F401
from tools.test_processes import small_sd3  # noqa: F401
