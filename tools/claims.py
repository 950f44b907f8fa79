"""Claim by claim: what the paper says, what the miniature measures, and whether it holds.

    python -m tools.claims                          # claims 1 to 4 and the parts, three seeds
    python -m tools.claims --seeds 8                # eight: what docs/RESULTS.md shows
    python -m tools.claims --only width alpha       # sweeps of one setting
    python -m tools.claims --pool results/*/results.json        # twenty students, one table

Two tables come first: what is compared, and what has to hold. The training scripts go on where they
were interrupted. One call of evaluate.py measures all, so all rows share captions and noises.

A statement holds, does not hold, or is not decided: its 95 % interval (bootstrap over training
seeds and captions) lies on the right side of its bound, on the wrong side, or on both. The bounds
are ours. The miniature says whether a mechanism is there; it predicts no number of a real model.

Dimension key: S training seeds, P prompts (the 24 captions).
"""

import concurrent.futures
import dataclasses
import math
import operator
import os
import shlex
import subprocess
import sys
from pathlib import Path

from run import UserError, command, option, parse_settings, read_json, rng, write_text

import torch

# ================================================================== what is asked

# A variant's name says what was changed: "Stage I --alpha 1 + II --warmup 0" is a Stage II run with
# that argument, after a Stage I run with that one. Without "+ II" Stage I is the result. Other rows
# that evaluate.py makes of a run have their path behind a comma: "Stage I, plain reuse".
STAGE1 = "Stage I"
GUIDED_EVERYWHERE = "Stage I --alpha 1"                   # as plain DMD is
SKIPPED, REUSED = "Stage I, span skipped", "Stage I, plain reuse"
STAGE2 = "Stage I + II"
F_ONLY = "Stage I + II --warmup 999999"                   # a warm-up that never ends
UNDISTILLED = "Stage I --iterations 1 + II"               # the adversarial loss alone
NOT_CACHED = "Stage I + II, no cache"                     # that student, with full steps
NO_CACHE = "Stage I + II --cached-blocks none"            # trained without a cache
LATER = "Stage I + II --cached-blocks 3-6"                # default 1-4
LATER_REUSED = f"{LATER} --iterations 0"                  # f is still the identity: plain reuse
TEACHER = "teacher, w = 4 for sigma <= 0.94"              # a row of every evaluation

# name: (what the paper says, the variants). Each is also compared with the first one.
EXPERIMENTS = {
    "1": ("Teacher guidance at high noise collapses diversity; switched off there, it survives.",
          [STAGE1, GUIDED_EVERYWHERE]),
    "2": ("Stagewise training gives structure first, detail second.",
          [STAGE1, REUSED, STAGE2, NOT_CACHED, UNDISTILLED]),
    "3": ("The compensation makes caching nearly free, co-training makes it free.",
          [STAGE1, SKIPPED, REUSED, F_ONLY, STAGE2, NOT_CACHED]),
    "4": ("1.67 evaluations are 33 times fewer than 28×2, at comparable quality and diversity.",
          [STAGE1, STAGE2]),
    "parts": ("What the parts of Stage II are good for (ablation).",
              [STAGE1, STAGE2, f"{STAGE2} --no-compensation", f"{STAGE2} --warmup 0", NO_CACHE]),
    "width": ("Width of the cached span (sweep).",
              [NO_CACHE, f"{STAGE2} --cached-blocks 1-3", STAGE2, f"{STAGE2} --cached-blocks 1-6"]),
    "place": ("Place of the cached span: where plain reuse hurts, co-training mends (sweep).",
              [STAGE1, f"{STAGE2} --iterations 0", STAGE2, LATER_REUSED, LATER]),
    "alpha": ("α of Eq. 4 trades accuracy against diversity (sweep; default 0.94).",
              [STAGE1, *(f"{STAGE1} --alpha {alpha}" for alpha in (1, 0.98, 0.9, 0.75))]),
    "importance": ("Importance curve of the re-noise level (ablation).",
                   [STAGE1, f"{STAGE1} --importance paper", f"{STAGE1} --importance uniform"]),
    "form": ("What is re-noised (ablation, deviation 2).", [STAGE1, f"{STAGE1} --form x0"]),
    "loss": ("Its loss (ablation, deviations 3, 4).", [STAGE1, f"{STAGE1} --loss official"]),
}

# What has to hold: experiment, measure (points: of accuracy), two variants, bound.
STATEMENTS = (
    ("1", "entropy", GUIDED_EVERYWHERE, "÷", STAGE1, "at most", 0.5),
    ("1", "points", STAGE1, "−", GUIDED_EVERYWHERE, "at least", -3),
    # Stage II adds detail. Like with like: both on the cached path, and both with full steps.
    ("2", "frechet", STAGE2, "−", REUSED, "at most", 0),
    ("2", "read error", STAGE2, "−", REUSED, "at most", 0),
    ("2", "speckled", STAGE2, "−", REUSED, "at most", 0),
    ("2", "frechet", NOT_CACHED, "−", STAGE1, "at most", 0),
    ("2", "read error", NOT_CACHED, "−", STAGE1, "at most", 0),
    ("2", "speckled", NOT_CACHED, "−", STAGE1, "at most", 0),
    ("2", "speckled", STAGE2, "−", NOT_CACHED, "at most", 0),       # what the cache costs the eye
    ("2", "entropy", STAGE2, "÷", STAGE1, "at least", 0.9),         # it keeps the structure
    ("2", "points", UNDISTILLED, "−", STAGE2, "at most", -10),      # without Stage I: none
    ("3", "points", REUSED, "−", SKIPPED, "at least", 0),
    ("3", "points", F_ONLY, "−", REUSED, "at least", 0),
    ("3", "points", STAGE2, "−", F_ONLY, "at least", 0),
    ("3", "frechet", F_ONLY, "−", REUSED, "at most", 0),
    ("3", "frechet", STAGE2, "−", F_ONLY, "at most", 0),
    ("3", "points", STAGE2, "−", STAGE1, "at least", -2),           # Stage I has two full steps
    ("3", "frechet", STAGE2, "÷", STAGE1, "at most", 0.5),
    ("4", "evaluations", TEACHER, "÷", STAGE2, "at least", 33),
    ("4", "points", STAGE2, "−", TEACHER, "at least", -5),
    ("4", "entropy", STAGE2, "÷", TEACHER, "at least", 0.9),
    ("place", "points", LATER, "−", LATER_REUSED, "at least", 0),
    ("place", "points", LATER, "−", STAGE1, "at least", -2),
)
DEFAULT = ("1", "2", "3", "4", "parts")
CORES = os.cpu_count() or 1
SIGNS = {"÷": operator.truediv, "−": operator.sub, "at least": operator.ge, "at most": operator.le}
VERDICTS = ("does not hold", "not decided", "holds")      # so many ends of the interval satisfy it


@dataclasses.dataclass
class Settings:
    only: list = option(None, "which claims and sweeps (default: 1 2 3 4 parts)",
                        choices=tuple(EXPERIMENTS))
    seeds: int = option(3, "how many training seeds: 3407, 1, 2, 3 and so on", low=1, high=100)
    samples_per_prompt: int = option(128, "samples for each of the 24 captions", low=2, high=4096)
    eval_seed: int = option(500, "evaluation seed; training draws other noises", 0, 2**31 - 1)
    jobs: int = option(min(8, CORES), "trainings side by side; they share the cores", 1, 64)
    runs: str = option("runs/claims", "folder of the runs, kept")
    out: str = option("results/claims", "folder for claims.md and evaluate.py's results")
    pool: list = option(None, "results.json files of a class, say: one table of all of them")
    dry_run: bool = option(False, "print the commands and stop")


# ================================================================== what to run

def trainings(name, seed, root):
    """[(folder, command)] of a variant: Stage I's and, if it has one, Stage II's. A folder is named
    by what was changed, so that variants share the runs they have in common."""
    def folder(words):
        return f"{root}/{'-'.join(words.split()).replace('--', '')}-seed{seed}"

    stage1, plus, stage2 = name.split(",")[0].removeprefix("Stage I").partition(" + II")
    init = folder(f"stage1 {stage1}")
    runs = [(init, f"train_stage1.py --seed {seed} --out {init}{stage1}")]
    if plus:
        out = folder(f"stage2 {stage1} {stage2}")
        line = f"train_stage2.py --seed {seed} --init {init} --out {out}{stage2}"
        # References are the teacher's, alike for one seed, α and w. To make them takes a third of a
        # run: so the default makes them for the others.
        if stage1 or stage2:
            line += f" --references-from {folder('stage2')}"
        runs.append((out, line))
    return runs


def execute(line, threads):
    """Runs a script of ours with so many threads; its output is shown only when it fails."""
    print(f"python {line}", flush=True)
    done = subprocess.run([sys.executable, *shlex.split(line)], capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": str(threads), **os.environ})
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-2000:])
        raise UserError(f"python {line} ended with exit code {done.returncode}; "
                        "type the same command again to go on")


# ================================================================== what it says

def row_name(name, seed, root):
    """The row of results.json that belongs to a variant: its folder's name and the path's."""
    if name == TEACHER:                                   # no training of ours, so no seed
        return name
    folder, _ = trainings(name, seed, root)[-1]
    _, comma, path = name.partition(",")
    return Path(folder).name + comma + path


def read(rows, name, seeds, root):
    """What results.json's rows say of a variant, {measure: [S, P]}."""
    by_name = {row["name"]: row for row in rows}
    found = [by_name[row_name(name, seed, root)] for seed in seeds]

    def by_caption(column):
        return torch.tensor([row["by_prompt"][column] for row in found])                  # S×P
    accuracy = by_caption("right")
    # A distance is one number for all captions, so in effect only the seeds are resampled. The
    # teacher has none from itself.
    distance = torch.tensor([row["frechet_to_teacher"] or 0.0 for row in found])          # S
    # The paper counts 28×2 for the teacher, though with α five passes are never run.
    evaluations = 56 if name == TEACHER else found[0]["nfe_blocks"]
    return {"points": 100 * accuracy, "entropy": by_caption("scene_entropy"),
            "read error": by_caption("read_error"), "speckled": by_caption("speckled"),
            "frechet": distance[:, None].expand_as(accuracy),
            "evaluations": torch.full_like(accuracy, evaluations)}


def interval(a, sign, b, rounds=2000):
    """(value, low, high) of mean(a) ÷ or − mean(b), a and b [S, P]: 95 % bootstrap."""
    g = rng(0, "claims")
    (seeds, captions), combine = a.shape, SIGNS[sign]
    drawn = []
    for _ in range(rounds):
        # As many seeds as there are, some twice and some not at all; captions likewise. The same
        # for a and b: a caption that is hard for both says nothing of their difference.
        s = torch.randint(seeds, (seeds, 1), generator=g)
        c = torch.randint(captions, (captions,), generator=g)
        drawn.append(combine(a[s, c].mean(), b[s, c].mean()))
    low, high = torch.quantile(torch.stack(drawn), torch.tensor([0.025, 0.975])).tolist()
    return combine(a.mean(), b.mean()).item(), low, high


def brackets(value, low, high, digits=2):
    """A value and its interval as text; a dash where they are not numbers (÷ an entropy of 0)."""
    if not math.isfinite(value + low + high):
        return "–"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def spread(by_seed, digits):
    """Mean ± standard deviation of a number of each seed, [S], as text; of one seed the number."""
    of_seeds = f" ± {by_seed.std():.{digits}f}" if len(by_seed) > 1 else ""
    return f"{by_seed.mean():.{digits}f}{of_seeds}"


def report(name, rows, seeds, root):
    """The Markdown section of one experiment: its variants and its statements."""
    what, variants = EXPERIMENTS[name]
    first = read(rows, variants[0], seeds, root)
    lines = [f"### {name}: {what}", "",
             "| variant | NFE | right | entropy | Fréchet | read error | speckled | points | "
             "entropy ratio |",
             "|" + " --- |" * 9]
    for variant in variants:
        values = read(rows, variant, seeds, root)
        cells = [variant, f"{values['evaluations'][0, 0]:.4g}",
                 spread((values["points"] / 100).mean(1), 3),
                 spread(values["entropy"].mean(1), 2), spread(values["frechet"].mean(1), 2),
                 spread(values["read error"].mean(1), 4), spread(values["speckled"].mean(1), 3),
                 brackets(*interval(values["points"], "−", first["points"])),
                 brackets(*interval(values["entropy"], "÷", first["entropy"]))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Fréchet: to the teacher with α. Points, entropy ratio: against the first row."]
    judged = [statement[1:] for statement in STATEMENTS if statement[0] == name]
    if judged:
        lines += ["", "| statement | measured | bound | verdict |", "|" + " --- |" * 4]
    for measure, a, sign, b, sense, bound in judged:
        of_a, of_b = read(rows, a, seeds, root), read(rows, b, seeds, root)
        value, low, high = interval(of_a[measure], sign, of_b[measure])
        verdict = VERDICTS[1]
        if math.isfinite(low + high):
            verdict = VERDICTS[SIGNS[sense](low, bound) + SIGNS[sense](high, bound)]
        digits = {"read error": 4, "speckled": 3}.get(measure, 2)
        lines.append(f"| {measure}: *{a}* {sign} *{b}* | {brackets(value, low, high, digits)} | "
                     f"{sense} {bound} | **{verdict}** |")
    return "\n".join(lines)


def pooled(files):
    """A Markdown table of evaluations that differ in the training seed: rows of one name together,
    mean ± standard deviation over the files."""
    columns = ("right", "scene_entropy", "frechet_to_teacher")
    rows = {}                                             # {name: {column: values}}
    for file in files:
        for row in read_json(file)["rows"]:
            of_name = rows.setdefault(row["name"], {column: [] for column in columns})
            for column in columns:
                if row[column] is not None:
                    of_name[column].append(row[column])
    lines = [f"| name | results | {' | '.join(columns)} |", "|" + " --- |" * 5]
    for name, found in rows.items():
        cells = [name, str(len(found["right"]))]
        for values in found.values():
            cells.append(spread(torch.tensor(values), 3) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ================================================================== command

@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.claims", __doc__.split("\n\n")[0])
    if settings.pool:
        print(pooled(settings.pool))
        return
    seeds = ["3407", *map(str, range(1, settings.seeds))]
    chosen = [name for name in EXPERIMENTS if name in (settings.only or DEFAULT)]
    # The default Stage I comes first: Fréchet distances are taken to the teacher with its α.
    names = [STAGE1]
    for name in chosen:
        names += EXPERIMENTS[name][1]
    # Each run once, in lists that come one after the other: Stage I, the default Stage II, those
    # that take its references, the evaluation. What stands in one list may run side by side.
    lists, measured = ({}, {}, {}, {}), {}                # {folder: command}
    for seed in seeds:
        for name in names:
            for folder, line in trainings(name, seed, settings.runs):
                place = ("train_stage2" in line) + ("--references-from" in line)
                lists[place][folder] = line
            measured[folder] = line                       # the last one is what is measured
    own_path = "--own-path " if not {"2", "3"} & {*chosen} else ""    # they compare paths of a run
    lists[3][settings.out] = (
        f"evaluate.py --seed {settings.eval_seed} --out {settings.out} {own_path}"
        f"--samples-per-prompt {settings.samples_per_prompt} --checkpoint {' '.join(measured)}")
    if settings.dry_run:
        print("\n".join(f"python {line}" for lines in lists for line in lines.values()))
        return
    for lines in lists:
        jobs = max(1, min(settings.jobs, len(lines)))
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            # list() waits for all, and raises what went wrong in one of them.
            list(pool.map(execute, lines.values(), len(lines) * [max(1, CORES // jobs)]))

    rows = read_json(Path(settings.out) / "results.json")["rows"]
    sections = [report(name, rows, seeds, settings.runs) for name in chosen]
    sections.append(f"Training seeds {', '.join(seeds)}; ± standard deviation over them; brackets: "
                    "95 % bootstrap over seeds and captions (Fréchet: over seeds).")
    write_text(Path(settings.out) / "claims.md", "\n\n".join(sections) + "\n")
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
