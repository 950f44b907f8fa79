"""Ten exercises: write a function of the method yourself, and let the project's tests judge it.

    python -m tools.exercise                # the list
    python -m tools.exercise 4              # exercises/4: a copy without that function's body
    python -m tools.exercise 4 --check      # which property does yours lack?

The copy has all of the code, so whatever is solved there can be trained there, too. The original
stays as it is; it is also the solution. The tests need pytest.
"""

import ast
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

from run import UserError, command, option, parse_settings

HERE = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Exercise:
    """A function to write: its place, as file and names (a third name, "for", is the body of the
    function's loop), what to think of first, and the tests of test_all.py that judge it."""
    title: str
    file: str
    names: tuple
    hint: str
    tests: tuple


EXERCISES = (
    Exercise("re-noising", "losses.py", ("renoise",),
             "Shrink the picture first; how much variance is missing then? Levels are [B].",
             ("renoising_reaches",)),
    Exercise("the guidance rule, Eq. 4", "losses.py", ("guidance_weight",),
             "torch.where; weight 1 is no guidance.",
             ("guidance_is_on",)),
    Exercise("a level within its window", "losses.py", ("draw_sigma",),
             "Mask the grid, sum up the weights, find where random·total falls.",
             ("importance_curves_have_the_released",)),
    Exercise("the distribution matching loss", "losses.py", ("dmd_loss",),
             "A loss with a given gradient: half the squared distance to a target held fixed.",
             ("students_gradient_is", "losses_stay_finite")),
    Exercise("the fake score's target", "losses.py", ("fake_score_loss",),
             "Which velocity leads from x_σ straight to x̂0? Refuse latents that are not fp32.",
             ("fake_score_loss_is_zero",)),
    Exercise("the student's turn", "train_stage1.py", ("student_turn",),
             "Step k with gradient; re-noise; one step back by the teacher, one by the fake score.",
             ("(each_turn_of_stage_one and default)",)),
    Exercise("f and its start", "cache.py", ("Compensation.__init__", "Compensation.forward"),
             "self.norm, self.up, self.down; hidden width 2·D. Where does training begin?",
             ("f_is_its_formula", "f_at_its_start", "nfe_counts")),
    Exercise("the cached branch of the forward", "cache.py", ("CachedSD3.forward.for",),
             "At i == first keep the span's input; at i == last record Δ0, detached, or add f(Δ0), "
             "cast to the stream's dtype. Blocks take hidden_states (the image), "
             "encoder_hidden_states (the text) and temb, and return (text, image).",
             ("forward_and_a_cached_step",)),
    Exercise("the roll-out in 1.67 evaluations", "sampler.py", ("roll_out",),
             "One loop over the pairs of sigmas; Δ0 comes out of each call and goes into the next.",
             ("path_of_more_than_two_steps", "stock_pipeline_gives")),
    Exercise("whose turn it is", "train_stage2.py", ("turn_of",),
             "D_ONLY and D_PER_G; iterations are counted from 0.",
             ("turns_are_the_official",)),
)


@dataclasses.dataclass
class Settings:
    out: str = option(None, "folder of the exercise (default: exercises/NUMBER)")
    check: bool = option(False, "let the tests judge what is there")


# ================================================================== handing out

def find(tree, names):
    """The node of a dotted name in a module: a function, a method, or "for", its loop."""
    node = tree
    for name in names.split("."):
        if name == "for":
            node = next(child for child in node.body if isinstance(child, ast.For))
        else:
            node = next(child for child in node.body if getattr(child, "name", None) == name)
    return node


def blanked(source, names, number, hint):
    """The source without the body of a function or loop; its docstring stays."""
    node = find(ast.parse(source), names)
    body = node.body
    if isinstance(body[0], ast.Expr) and len(body) > 1:   # the docstring, or super().__init__()
        body = body[1:]
    lines = source.split("\n")
    start = body[0].lineno - 1
    while lines[start - 1].lstrip().startswith("#"):      # its comments tell too much
        start -= 1
    indent = " " * body[0].col_offset
    lines[start:body[-1].end_lineno] = [
        f"{indent}# Exercise {number}. {hint}",
        f"{indent}raise NotImplementedError(\"exercise {number}: write this\")"]
    return "\n".join(lines)


def hand_out(number, folder):
    """Writes the project into the folder, without what the exercise asks for."""
    exercise = EXERCISES[number - 1]
    # What is trained and tested: not the runs, models and environments that may lie beside it.
    for name in ("tiny", "tools"):
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in ("*.py", "*.md", "*.ini", "*.txt"):
        for path in HERE.glob(pattern):
            shutil.copy(path, folder)
    path = folder / exercise.file
    source = path.read_text(encoding="utf-8")
    for names in exercise.names:
        source = blanked(source, names, number, exercise.hint)
    path.write_text(source, encoding="utf-8")


# ================================================================== judging

def judge(number, folder):
    """None if the folder's code passes the exercise's tests, else what pytest says of the first
    that fails, in one line: its name, which is a sentence, and what it found."""
    # In a process of its own, where nothing of the project is imported yet.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "--tb=line", "-p", "no:cacheprovider",
         "test_all.py", "-k", " or ".join(EXERCISES[number - 1].tests)],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"})
    if done.returncode == 0:
        return None
    lines = (done.stdout + done.stderr).splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    # Neither: there is no pytest.
    not_imported = [line for line in lines if line.startswith("E ")]
    return "\n".join(failed or not_imported or lines[-1:])


# ================================================================== command

@command
def main(argv):
    number = argv[0] if argv and argv[0].isdecimal() else None
    settings = parse_settings(Settings, argv[1:] if number else argv, "-m tools.exercise",
                              __doc__.split("\n\n")[0])
    if number is None:
        for i, exercise in enumerate(EXERCISES, 1):
            print(f"{i:3}  {exercise.title:36}{exercise.file:18}{', '.join(exercise.names)}")
        return
    number = int(number)
    if not 1 <= number <= len(EXERCISES):
        raise UserError(f"there are exercises 1 to {len(EXERCISES)}")
    folder = Path(settings.out or f"exercises/{number}").resolve()
    if settings.check:
        if not folder.is_dir():
            raise UserError(f"there is no {folder}; python -m tools.exercise {number} makes it")
        line = judge(number, folder)
        print(line or f"exercise {number} is solved")
        raise SystemExit(1 if line else 0)
    if folder.exists():
        raise UserError(f"{folder} exists; delete it to begin again")
    exercise = EXERCISES[number - 1]
    hand_out(number, folder)
    print(f"{folder}: write {' and '.join(exercise.names)} in {exercise.file}\n"
          f"hint: {exercise.hint}\nthen: python -m tools.exercise {number} --check")


if __name__ == "__main__":
    main()
