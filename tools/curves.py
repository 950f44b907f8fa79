"""Draws what a run has logged: its metrics.jsonl as curves, in groups, in one picture.

    python -m tools.curves RUN [RUN ...]

The picture is curves.png in each run's folder. Each panel says which direction is good, or that
none is. It needs matplotlib. A training may call draw() at its end: a picture is never worth a run,
so draw() makes nothing, and raises nothing, where matplotlib is missing or the log is short, odd or
cut. Not here: what the quantities mean (README, docs/RESULTS.md, "What you see while it trains").
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

from tools.settings import UserError, command, option, parse_settings
from tools.processes import first
from run import replace_file


@dataclasses.dataclass
class Settings:
    run: list = option(None, "run folders; they may also stand alone, without --run")
    debug: bool = option(False, "show tracebacks")


# title, how the quantities of the panel begin, what the axis says. A quantity is drawn in the first
# panel whose beginning fits. So updates_g is no gradient norm, and what nobody foresaw is not lost.
PANELS = (
    # The fake score's loss may rise a little, since the student moves on; without end means that it
    # does not follow. The student's loss is no distance to anything: it is built for its gradient.
    ("losses of Stage I", ("loss_fake", "loss_student"),
     "loss; no direction,\nbut loss_fake must not rise without end"),
    # Two players: when one gets better the other's loss grows, so neither has a direction.
    ("losses of Stage II", ("loss_d", "loss_g"),
     "loss; no direction,\nlevel is good"),
    # Above α nobody is guided: there the gap starts near 0 and grows while the student changes.
    ("teacher against fake score, by noise level σ", ("gap",),
     "mean |v_teacher − v_fake|\nbelow α falling slowly is good"),
    ("the student's latents x0", ("x0_", "diversity"),
     "of the latent values\nx0_std near the data's 1 is good"),
    # Four standard deviations: over-guided pictures have hard, too colourful patches.
    ("share of latents beyond ±4", ("saturation",),
     "share; low is good"),
    ("how often D ranks a reference first", ("d_ranks",),
     "share; good is in between:\n0.5 is a blind D, 1 a hopeless G"),
    ("gradient norms, before clipping", ("grad_norm", "norm_"),
     "norm; no direction,\nlevel is good"),
    # From here on what is no sign of quality; the last panel takes what nobody foresaw.
    ("updates of D and of G", ("updates_",), "updates; no direction"),
    ("seconds since the command was typed", ("seconds",),
     "seconds; no direction,\na straight line is good"),
    ("other", ("",), "value; no direction is known"),
)


# ================================================================== the log

def read_log(folder):
    """{quantity: (iterations, values)} of a run's metrics.jsonl; what is no finite number of some
    iteration is left out."""
    found = {}
    # A run that was killed may have left half a line, and a disk that was full half a letter.
    text = (Path(folder) / "metrics.jsonl").read_bytes().decode(errors="replace")
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(entry, dict) or not is_number(entry.get("iteration")):
            continue
        # Stage II logs a quantity only where it is new, so each has iterations of its own.
        for name, value in entry.items():
            # null is a quantity that this iteration did not have, such as an empty bin of σ.
            if name != "iteration" and is_number(value):
                iterations, values = found.setdefault(name, ([], []))
                iterations.append(entry["iteration"])
                values.append(value)
    return found


def is_number(value):
    """Whether a value of JSON can be drawn; true, NaN and Infinity cannot. Nor can an integer of a
    hundred digits, which JSON allows."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e30 and math.isfinite(value)


def grouped(log):
    """[(title, what the axis says, names)] of the panels that have something to show."""
    panels, taken = [], set()
    for title, beginnings, axis in PANELS:
        names = []
        for name, (iterations, _) in log.items():
            fits = name.startswith(beginnings) and name not in taken
            if fits and len(set(iterations)) >= 2:        # one point is no curve
                names.append(name)
        # A stage has only its own quantities: the other stage's panels are left out.
        if names:
            panels.append((title, axis, names))
        taken.update(names)
    return panels


# ================================================================== the picture

def draw(folder):
    """Writes folder/curves.png and returns its path; None where there is nothing to draw or nothing
    to draw with. Raises no error: it is called at the end of hours of training."""
    if not first():                                       # of several processes one draws
        return None
    try:
        log = read_log(folder)
        panels = grouped(log)
        if not panels:
            return None
        return save(Path(folder) / "curves.png", panels, log)
    except ImportError:                                   # without matplotlib there is no picture
        return None
    except Exception as error:                            # whatever it is, the run is worth more
        print(f"no curves.png ({str(error) or type(error).__name__})", file=sys.stderr)
        return None


def save(path, panels, log):
    """Draws grouped()'s panels of a read_log() into a PNG, whole or not at all; returns path."""
    # A Figure of its own, not pyplot: that would change the screen of a notebook that trains.
    from matplotlib.figure import Figure
    # Three panels a row are still readable on a laptop; a log of one quantity is one panel.
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)                     # rounded up
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained", facecolor="white")
    for place, (title, axis, names) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for name in names:
            iterations, values = log[name]
            # Batches are small, so single values jump. Pale: what was logged; full: its trend.
            # What counts upwards (seconds, updates) is no noise: its trend is the line itself.
            trend = values if sorted(values) == values else smooth(values)
            line, = axes.plot(iterations, trend, linewidth=1.8, label=name)
            axes.plot(iterations, values, color=line.get_color(), alpha=0.3, linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(axis, fontsize=8)
        axes.set_xlabel("iteration", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.suptitle(f"{path.resolve().parent.name}: what the run logged (full lines: running mean)",
                    fontsize=11)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=90))
    return path


def smooth(values):
    """The running mean of a list of numbers over a tenth of its length; as long as the list."""
    # Centred, so that a bend stands where it happened and not later.
    half = len(values) // 20
    means = []
    for i in range(len(values)):
        near = values[max(0, i - half):i + half + 1]      # fewer at both ends
        means.append(sum(near) / len(near))
    return means


@command
def main(argv):
    # Folders may stand alone, as in `ls runs/tiny-stage1`: there is nothing else to ask for.
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    settings = parse_settings(Settings, argv, "-m tools.curves", __doc__.split("\n\n")[0])
    if not settings.run:
        raise UserError("name a run folder, for instance runs/tiny-stage1")
    # All folders are checked before the first picture is drawn.
    for folder in settings.run:
        if not (Path(folder) / "metrics.jsonl").is_file():
            raise UserError(f"{folder} holds no metrics.jsonl; python train_stage1.py makes "
                            "runs/tiny-stage1")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the curves need matplotlib: pip install matplotlib") from None
    for folder in settings.run:
        path = draw(folder)
        if not path:
            raise UserError(f"{folder}/metrics.jsonl holds no quantity of two iterations")
        print(path)


if __name__ == "__main__":
    main()
