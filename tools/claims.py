"""Claim by claim: what the paper says, what the miniature measures, and whether it holds.

    python claims.py                          # claims 1 and 3, three training seeds
    python claims.py --only 2 4 parts alpha   # other claims, and sweeps of one setting

Every line of EXPERIMENTS below is a variant of the two training commands: read there what is
compared. Training is left to train_stage1.py and train_stage2.py, which keep their runs under
runs/claims and go on where they were interrupted; measuring is left to evaluate.py, one call, so
all rows share captions and noises. This file only asks and judges.

A statement holds, does not hold, or is not decided: its 95 % interval (bootstrap over training
seeds and captions, both resampled) lies above its bound, below it, or on both sides. The bounds are
ours. The miniature says whether the mechanism is there; it predicts no number of a real model.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from run import UserError, check_value, command, option, parse_settings, read_json, rng, write_text

# label, arguments of train_stage1.py, arguments of train_stage2.py (None: Stage I is the result)
Variant = collections.namedtuple("Variant", "label stage1 stage2", defaults=("", None))
# The default recipe, deviations 11 and 14 included; "no match" below is nearer to the official one.
STAGE1, STAGE2 = Variant("Stage I"), Variant("Stage II, co-trained", "", "")
FIT_ONLY = "--fit-iterations 300 --match-iterations 0 --iterations 0 --references 8"
F_ONLY = Variant("f fitted, student as it was", "", FIT_ONLY)
LATER = {span: (Variant(f"{span}, f fitted", "", f"--cached-blocks {span} {FIT_ONLY}"),
                Variant(f"{span}, co-trained", "", f"--cached-blocks {span}"))
         for span in ("2-5", "3-6")}         # as wide as the default span, one and two blocks later

EXPERIMENTS = {                              # name: (what the paper says, variants)
    "1": ("Teacher guidance at high noise collapses diversity; switched off there, it survives.",
          [STAGE1, Variant("guidance everywhere", "--alpha 1")]),
    "2": ("Stagewise training gives structure first, detail second.",
          [STAGE1, STAGE2, Variant("adversarial turns without Stage I", "--iterations 1",
                                   "--match-iterations 0")]),
    "3": ("The compensation makes caching nearly free, co-training makes it free.",
          [STAGE1, F_ONLY, STAGE2]),
    "4": ("1.67 evaluations are 33 times fewer than 28×2, at comparable quality and diversity.",
          [STAGE1, STAGE2]),
    "parts": ("What the parts of Stage II are good for (ablation).",
              [STAGE1, Variant("Stage I with the match's updates, too", "--iterations 330"), STAGE2,
               Variant("without f", "", "--no-compensation"),
               Variant("f not fitted first", "", "--fit-iterations 0"),
               Variant("no match", "", "--match-iterations 0"),
               Variant("no adversarial turns", "", "--iterations 0"),
               Variant("without a cache, fit and match", "", "--cached-blocks none")]),
    "alpha": ("α of Eq. 4 trades accuracy against diversity (sweep).",
              [Variant(f"α = {a}", f"--alpha {a}" if a != 0.94 else "")
               for a in (1, 0.98, 0.94, 0.9, 0.75)]),
    "importance": ("Importance curve of the re-noise level (ablation).",
                   [Variant("official"), Variant("paper's plot", "--importance paper"),
                    Variant("uniform", "--importance uniform")]),
    "form": ("What is re-noised (ablation, deviation 2).",
             [Variant("window"), Variant("x0", "--form x0")]),
    "normaliser": ("Normaliser of the loss (ablation, deviation 3).",
                   [Variant("per sample"), Variant("per column", "--normaliser column")]),
    "span": ("Width of the cached span (sweep).",
             [Variant("no cache", "", "--cached-blocks none"),
              Variant("1-3, slow", "", "--cached-blocks 1-3"), STAGE2._replace(label="1-4, fast"),
              Variant("1-6", "", "--cached-blocks 1-6")]),
    "place": ("Place of the cached span: where plain reuse hurts, co-training mends (sweep).",
              [STAGE1, F_ONLY, STAGE2, *LATER["2-5"], *LATER["3-6"]]),
}
ALL_PATHS = ("3", "place")                   # with the span skipped, reused, computed


@dataclasses.dataclass
class Settings:
    only: list = option(None, "which claims and sweeps (default: 1 3)",
                        choices=tuple(EXPERIMENTS))
    seeds: list = option(None, "training seeds (default: 3407 1 2)")
    samples_per_prompt: int = option(128, "n, samples for each of the 24 captions",
                                     low=2, high=4096)
    eval_seed: int = option(100, "evaluation seed; no training may use it", low=0, high=2**31 - 1)
    jobs: int = option(None, "trainings side by side (default: one a core, up to 8; on a GPU one)",
                       low=1, high=64)
    runs: str = option("runs/claims", "folder of the runs, kept")
    out: str = option("results/claims", "folder for claims.md, results.json and the plots")
    dry_run: bool = option(False, "print the commands and stop")
    debug: bool = option(False, "show tracebacks")


# ----------------------------------------------------------------------------- what to run

def folders(variant, seed, root):
    """(Stage I folder, Stage II folder or None) of a variant: named by what was changed, so that
    variants share the runs they have in common."""
    def name(stage, arguments):
        words = re.sub(r"[^\w.]+", "-", arguments).strip("-")
        return "-".join(filter(None, (stage, words)))
    first = name("stage1", variant.stage1)
    second = None if variant.stage2 is None else name(
        first.replace("stage1", "stage2"), variant.stage2)
    return tuple(part and f"{root}/{part}-seed{seed}" for part in (first, second))


def commands(variants, seeds, root):
    """The training commands, [Stage I's, Stage II's], each once; a list may run side by side."""
    stages = {}, {}
    for seed in seeds:
        for variant in variants:
            first, second = folders(variant, seed, root)
            stages[0][first] = (f"train_stage1.py --seed {seed} --out {first} "
                                f"{variant.stage1}").strip()
            if second:
                stages[1][second] = (f"train_stage2.py --seed {seed} --init {first} --out {second} "
                                     f"{variant.stage2}").strip()
    return [list(stage.values()) for stage in stages]


def execute(line, threads=None):
    """Runs a script of ours. Of several side by side, with so many threads each, the output goes to
    the screen only when they fail."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    print(f"python {line}", flush=True)
    done = subprocess.run([sys.executable, *shlex.split(line)], cwd=Path(__file__).parent,
                          env=environment, capture_output=bool(threads), text=True)
    if done.returncode:
        sys.stderr.write((done.stdout or "")[-2000:] + (done.stderr or "")[-2000:])
        raise UserError(f"python {line} ended with exit code {done.returncode}; "
                        "type the same command again to go on")


# ----------------------------------------------------------------------------- what it says

def gather(rows, variant, seeds, root, suffix=""):
    """{measure: [seeds, captions]} of a variant's rows of results.json (frechet: [seeds]); suffix
    names the path, such as ", plain reuse"."""
    import torch
    names = [Path(next(filter(None, reversed(folders(variant, seed, root))))).name + suffix
             for seed in seeds]
    found = [row for name in names for row in rows if row["name"] == name]
    if len(found) != len(names):
        return None                                     # this variant has no such path
    values = {key: torch.tensor([row["by_prompt"][key] for row in found])
              for key in found[0]["by_prompt"]}
    return values | {"frechet": torch.tensor([row["frechet_to_teacher"] for row in found]),
                     "nfe": found[0]["nfe_blocks"]}


def points(a, b):
    """Accuracy of a minus accuracy of b, in points, for indices of seeds and captions."""
    return lambda s, c: 100 * (a["prompt_accuracy"] - b["prompt_accuracy"])[s][:, c].mean()


def ratio(a, b):
    """Scene entropy of a over that of b."""
    return lambda s, c: a["scene_entropy"][s][:, c].mean() / b["scene_entropy"][s][:, c].mean()


def change(a, b):
    """Fréchet distance to the teacher of a minus that of b; only the seeds are resampled."""
    return lambda s, c: (a["frechet"] - b["frechet"])[s].mean()


def statements(name, get):
    """What an experiment has to show: (text, statistic, "at least" or "at most", bound).
    get(variant, suffix) is gather()."""
    one, two = get(STAGE1), get(STAGE2)
    if name == "1":
        full = get(EXPERIMENTS["1"][1][1])
        return [("entropy with guidance everywhere ÷ with α", ratio(full, one), "at most", 0.5),
                ("accuracy with α − everywhere, points", points(one, full), "at least", -3)]
    if name == "2":
        alone = get(EXPERIMENTS["2"][1][2])
        return [("Stage II adds detail: Fréchet, change", change(two, one), "at most", 0),
                ("it keeps the structure: entropy, ratio", ratio(two, one), "at least", 0.95),
                ("without Stage I there is no structure: accuracy against both, points",
                 points(alone, two), "at most", -10)]
    if name == "3":
        return [("span skipped, points", points(get(STAGE1, ", span skipped"), one),
                 "at most", -10),
                ("Δ0 reused as it is, points", points(get(STAGE1, ", plain reuse"), one),
                 "at most", -10),
                ("nearly free with f alone, points", points(get(F_ONLY), one), "at least", -5),
                ("free when co-trained, points", points(two, one), "at least", -1),
                ("… entropy, ratio", ratio(two, one), "at least", 0.95),
                ("… Fréchet, change", change(two, one), "at most", 0)]
    if name == "place":
        return [statement for span, (fitted, trained) in LATER.items() for statement in (
            (f"{span}: Δ0 reused as it is, points", points(get(fitted, ", plain reuse"), one),
             "at most", -10),
            (f"{span}: free when co-trained, points", points(get(trained), one), "at least", -1))]
    if name == "4":
        teacher = get("teacher")
        return [("28×2 ÷ network evaluations", lambda s, c: 56 / two["nfe"], "at least", 33),
                ("accuracy against the teacher's 28×2 with α, points", points(two, teacher),
                 "at least", -3),
                ("entropy against it, ratio", ratio(two, teacher), "at least", 0.95)]
    return []


def interval(statistic, seeds, captions, rounds=2000):
    """(value, low, high): 95 % bootstrap that resamples seeds and captions."""
    import torch
    g = rng(0, "claims")
    value = float(statistic(torch.arange(seeds), torch.arange(captions)))
    drawn = torch.tensor([float(statistic(torch.randint(seeds, (seeds,), generator=g),
                                          torch.randint(captions, (captions,), generator=g)))
                          for _ in range(rounds)])
    return value, *torch.quantile(drawn, torch.tensor([0.025, 0.975])).tolist()


def judge(statistic, sense, bound, seeds, captions):
    """(value, low, high, verdict) of a statement."""
    value, low, high = interval(statistic, seeds, captions)
    inside, outside = (low >= bound, high < bound) if sense == "at least" else (
        high <= bound, low > bound)
    return value, low, high, ("holds" if inside else "does not hold" if outside
                              else "not decided")


def report(name, variants, rows, seeds, root):
    """The Markdown section of one experiment: its variants' rows, each against the default Stage I
    recipe's first, then its statements."""
    def get(variant, suffix=""):
        if variant == "teacher":
            return teacher_values(rows, len(seeds))
        return gather(rows, variant, seeds, root, suffix)

    def cell(values):                                          # [seeds, captions] or [seeds]
        by_seed = values.mean(1) if values.ndim == 2 else values
        spread = f" ± {by_seed.std():.3f}" if len(seeds) > 1 else ""
        return f"{by_seed.mean():.3f}{spread}"

    def against(values, digits, statistic):
        value, low, high = interval(statistic(values, base), len(seeds), 24)
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    first = next(variant for variant in variants if not variant.stage1)
    base = get(first)
    lines = [f"### {name}: {EXPERIMENTS[name][0]}", "",
             "| variant | NFE | caption right | usual scene | scene entropy | diversity | Fréchet "
             f"to the α-guided teacher | against *{first.label}*: points | entropy, ratio |",
             "|" + " --- |" * 9]
    for variant in variants:
        for suffix in ("", *SUFFIXES) if name in ALL_PATHS else ("",):
            values = get(variant, suffix)
            if values:
                lines.append(f"| {variant.label}{suffix} | {values['nfe']:.4g} | " + " | ".join(
                    cell(values[key]) for key in ("prompt_accuracy", "usual_scene",
                                                  "scene_entropy", "diversity", "frechet"))
                    + f" | {against(values, 1, points)} | {against(values, 2, ratio)} |")
    judged = [(text, *judge(statistic, sense, bound, len(seeds), 24), sense, bound)
              for text, statistic, sense, bound in statements(name, get)]
    if judged:
        lines += ["", "| statement | measured | bound | verdict |", "|" + " --- |" * 4]
        lines += [f"| {text} | {value:.2f} [{low:.2f}, {high:.2f}] | {sense} {bound} | "
                  f"**{verdict}** |" for text, value, low, high, verdict, sense, bound in judged]
    return "\n".join(lines)


SUFFIXES = (", span skipped", ", plain reuse", ", no cache")


def teacher_values(rows, seeds):
    """The α-guided teacher's row, repeated for each training seed: it has no training of ours."""
    import torch
    row = next(row for row in rows if row["name"].startswith("teacher, w") and "<=" in row["name"])
    return {key: torch.tensor([row["by_prompt"][key]] * seeds) for key in row["by_prompt"]}


def plot(path, x, series):
    """Accuracy over x, "scene_entropy" or "nfe", as a PNG with error bars over the training seeds;
    series is [(label, gather())]."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path}: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for label, values in series:
        y = values["prompt_accuracy"].mean(1)                                       # seeds
        a = values[x].mean(1) if x != "nfe" else 0 * y + values["nfe"]
        bars = {"xerr": a.std(), "yerr": y.std()} if len(y) > 1 else {}
        axes.errorbar(a.mean(), y.mean(), **bars, fmt="o", capsize=3)
        axes.annotate(label, (a.mean(), y.mean()), xytext=(6, 6), textcoords="offset points")
    axes.set(xlabel={"nfe": "network evaluations"}.get(x, "scene entropy, nats"),
             ylabel="caption right")
    axes.margins(x=0.2, y=0.15)                        # room for the labels
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(path)


@command
def main(argv):
    settings = parse_settings(Settings, argv, "claims.py", __doc__.split("\n\n")[0])
    chosen = {name: EXPERIMENTS[name] for name in settings.only or ["1", "3"]}
    rule = option(None, "", low=0, high=2**31 - 1).metadata
    seeds = [check_value("--seeds", seed, int, rule) for seed in settings.seeds or [3407, 1, 2]]
    if settings.eval_seed in seeds or len(set(seeds)) < len(seeds):
        raise UserError("--seeds must differ from each other and from --eval-seed")
    # the default recipe first: Fréchet distances are taken to its teacher
    variants = sorted(dict.fromkeys(v for _, group in chosen.values() for v in group),
                      key=lambda variant: variant.stage1 != "")
    stages = commands(variants, seeds, settings.runs)
    measured = [list(filter(None, folders(variant, seed, settings.runs)))[-1]
                for seed in seeds for variant in variants]
    evaluation = (f"evaluate.py --teacher alpha --seed {settings.eval_seed} --samples-per-prompt "
                  f"{settings.samples_per_prompt} --out {settings.out} "
                  + ("" if chosen.keys() & set(ALL_PATHS) else "--own-path ") + "--checkpoint "
                  + " ".join(dict.fromkeys(measured)))
    if settings.dry_run:
        print("\n".join(f"python {line}" for line in [*stages[0], *stages[1], evaluation]))
        return
    from model import pick_device
    cores = os.cpu_count() or 1
    jobs = settings.jobs or (min(8, cores) if pick_device(None).type == "cpu" else 1)
    threads = max(1, cores // jobs) if jobs > 1 else None
    for lines in stages:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda line: execute(line, threads), lines))
    execute(evaluation)
    found = read_json(Path(settings.out) / "results.json")
    rows, protocol = found["rows"], found["protocol"]
    text = "\n\n".join(report(name, group, rows, seeds, settings.runs)
                       for name, (_, group) in chosen.items())
    text += ("\n\nTraining seeds " + ", ".join(map(str, seeds)) + "; ± standard deviation over "
             "them; brackets: 95 % bootstrap over seeds and captions (Fréchet: over seeds). "
             + json.dumps(protocol))
    write_text(Path(settings.out) / "claims.md", text + "\n")
    for name, x in (("alpha", "scene_entropy"), ("span", "nfe")):
        if name in chosen:
            plot(Path(settings.out) / f"{name}.png", x, [
                (variant.label, gather(rows, variant, seeds, settings.runs))
                for variant in chosen[name][1]])
    print(text)


if __name__ == "__main__":
    main()
