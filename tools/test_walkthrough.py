"""The lecture of docs/walkthrough.ipynb: it runs, and its committed outputs are its own.

    python -m pytest -q tools/test_walkthrough.py

Without jupyter: the code cells are executed in order, in one namespace. Names are sentences; a
docstring says which mistake the test would catch.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import run  # noqa: F401  first, as in every script: it silences what the others import

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"
METHOD = ("losses", "cache", "train_stage1", "train_stage2", "sampler", "model", "run",
          "tiny.world")
DRAWS = ("show(", "plt.subplots(")                        # a cell with one of these has a figure


def code_cells():
    """[(source, outputs, execution count)] of the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), cell["outputs"], cell["execution_count"])
            for cell in cells if cell["cell_type"] == "code"]


def printed(outputs):
    """What a cell has printed."""
    return "".join("".join(output["text"]) for output in outputs
                   if output["output_type"] == "stream")


def words(text):
    """A printed text without its numbers, whose last digits differ from machine to machine."""
    return re.sub(r"-?\d[\d.]*(e[-+]\d+)?", "#", text).split()


def pictures(outputs):
    """How many PNGs a cell shows."""
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_its_cells_run_in_order_and_print_what_is_committed(monkeypatch):
    """Catches a change of the method that breaks the lecture, and a cell that was edited and not
    executed again."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")                                 # draws without a screen
    from matplotlib import pyplot
    pyplot.close("all")                                   # what other tests left open
    monkeypatch.chdir(NOTEBOOK.parent)                    # where jupyter starts it
    monkeypatch.setattr(sys, "path", list(sys.path))      # its first cell adds to it
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        for number, (source, outputs, _) in enumerate(code_cells(), 1):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(source, f"code cell {number}", "exec"), namespace)
            assert words(output.getvalue()) == words(printed(outputs)), f"code cell {number}"
            drawn = len(pyplot.get_fignums())
            pyplot.close("all")
            assert drawn == pictures(outputs), f"code cell {number} draws {drawn} figures"


def test_its_outputs_are_committed_and_clean():
    """Catches outputs that were cleared, cells run out of order, and warnings, tracebacks or paths
    of somebody's machine in a file that everybody reads."""
    cells = code_cells()
    assert [count for *_, count in cells] == list(range(1, len(cells) + 1))
    for number, (source, outputs, _) in enumerate(cells, 1):
        draws = "def show" not in source and any(call in source for call in DRAWS)
        assert pictures(outputs) == draws, f"code cell {number}"
        for output in outputs:
            assert output["output_type"] in ("stream", "display_data"), f"code cell {number}"
            assert output.get("name") != "stderr", f"code cell {number}"
        text = printed(outputs)
        assert not re.search(r"(/|\\)(work|tmp|root|home|Users|usr)\b|Warning|it/s", text), text
    assert sum(pictures(outputs) for _, outputs, _ in cells) >= 12
    assert NOTEBOOK.stat().st_size < 1_200_000


def test_it_defines_nothing_of_the_method_again():
    """Catches a copy of a formula that no longer follows the file it was copied from. Cells are
    short enough for a projector."""
    theirs = set()
    for name in METHOD:
        module = importlib.import_module(name)
        theirs |= {key for key, value in vars(module).items()
                   if callable(value) and getattr(value, "__module__", None) == module.__name__}
    assert {"dmd_loss", "guidance_weight", "Compensation", "turn_of"} <= theirs
    for number, (source, _, _) in enumerate(code_cells(), 1):
        assert len(source.splitlines()) <= 15, f"code cell {number}"
        for node in ast.walk(ast.parse(source)):
            name = None
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                name = node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            assert name not in theirs, f"code cell {number} defines {name} again"
