"""Claim by claim: what the paper says, what the miniature measures, and whether it holds.

    python -m tools.claims                          # claims 1 and 3, three training seeds
    python -m tools.claims --only 2 4 parts alpha   # other claims, and sweeps of one setting

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

from tools.settings import UserError, checked, command, option, parse_settings
from run import read_json, rng, write_text

import torch

HERE = Path(__file__).resolve().parent.parent

# label, arguments of train_stage1.py, arguments of train_stage2.py (None: Stage I is the result)
Variant = collections.namedtuple("Variant", "label stage1 stage2", defaults=("", None))
STAGE1 = Variant("Stage I")
STAGE2 = Variant("co-trained", "", "")
# The warm-up never ends, so the generator's turns move f alone.
F_ONLY = Variant("f alone", "", "--warmup 999999")
UNDISTILLED = Variant("adversarial alone", "--iterations 1", "")


def reused(span):
    """A Stage II run that never trains: f is still the identity, so Δ0 is reused as it is."""
    return Variant(f"{span}, Δ0 reused", "", f"--cached-blocks {span} --iterations 0")


def trained(span):
    """Stage II with another span than the default 1-4."""
    return Variant(f"{span}, co-trained", "", f"--cached-blocks {span}")


EXPERIMENTS = {                              # name: (what the paper says, variants)
    "1": ("Teacher guidance at high noise collapses diversity; switched off there, it survives.",
          [STAGE1, Variant("guidance everywhere", "--alpha 1")]),
    "2": ("Stagewise training gives structure first, detail second.",
          [STAGE1, STAGE2, UNDISTILLED]),
    "3": ("The compensation makes caching nearly free, co-training makes it free.",
          [STAGE1, F_ONLY, STAGE2]),
    "4": ("1.67 evaluations are 33 times fewer than 28×2, at comparable quality and diversity.",
          [STAGE1, STAGE2]),
    "parts": ("What the parts of Stage II are good for (ablation).",
              [STAGE1, STAGE2,
               Variant("without f", "", "--no-compensation"),
               Variant("without the warm-up", "", "--warmup 0"),
               Variant("without a cache", "", "--cached-blocks none")]),
    "width": ("Width of the cached span (sweep).",
              [Variant("no cache", "", "--cached-blocks none"), trained("1-3"),
               STAGE2._replace(label="1-4, co-trained"), trained("1-6")]),
    "place": ("Place of the cached span: where plain reuse hurts, co-training mends (sweep).",
              [STAGE1, reused("1-4"), STAGE2._replace(label="1-4, co-trained"),
               reused("3-6"), trained("3-6")]),
    "alpha": ("α of Eq. 4 trades accuracy against diversity (sweep).",
              [STAGE1._replace(label="α = 0.94"), Variant("α = 1", "--alpha 1"),
               Variant("α = 0.98", "--alpha 0.98"), Variant("α = 0.9", "--alpha 0.9"),
               Variant("α = 0.75", "--alpha 0.75")]),
    "importance": ("Importance curve of the re-noise level (ablation).",
                   [STAGE1._replace(label="official"),
                    Variant("paper's plot", "--importance paper"),
                    Variant("uniform", "--importance uniform")]),
    "form": ("What is re-noised (ablation, deviation 2).",
             [STAGE1._replace(label="window"), Variant("x0", "--form x0")]),
    "loss": ("The form of the loss (ablation, deviations 3 and 4).",
             [STAGE1._replace(label="ours"), Variant("official", "--loss official")]),
}
ALL_PATHS = ("3",)                           # with the span skipped, reused, computed
SUFFIXES = (", span skipped", ", plain reuse", ", no cache")


@dataclasses.dataclass
class Settings:
    only: list = option(None, "which claims and sweeps (default: 1 3)",
                        choices=tuple(EXPERIMENTS))
    seeds: list = option(None, "training seeds (default: 3407 1 2)")
    samples_per_prompt: int = option(128, "n, samples for each of the 24 captions",
                                     low=2, high=4096)
    eval_seed: int = option(200, "evaluation seed; no training may use it", low=0, high=2**31 - 1)
    jobs: int = option(None, "trainings side by side (default: one a core, up to 8)",
                       low=1, high=64)
    runs: str = option("runs/claims", "folder of the runs, kept")
    out: str = option("results/claims", "folder for claims.md, results.json and the plots")
    dry_run: bool = option(False, "print the commands and stop")
    debug: bool = option(False, "show tracebacks")


# ================================================================== what to run

def folders(variant, seed, root):
    """(Stage I folder, Stage II folder or None) of a variant: named by what was changed, so that
    variants share the runs they have in common."""
    def name(stage, arguments):
        words = re.sub(r"[^\w.]+", "-", arguments).strip("-")
        return "-".join(filter(None, (stage, words)))
    stage1 = name("stage1", variant.stage1)
    if variant.stage2 is None:
        return f"{root}/{stage1}-seed{seed}", None
    stage2 = name(stage1.replace("stage1", "stage2"), variant.stage2)
    return f"{root}/{stage1}-seed{seed}", f"{root}/{stage2}-seed{seed}"


def result_of(variant, seed, root):
    """The folder that is measured: Stage II's, or Stage I's where there is no Stage II."""
    stage1, stage2 = folders(variant, seed, root)
    return stage2 or stage1


def commands(variants, seeds, root):
    """The training commands, [Stage I's, Stage II's], each once; a list may run side by side."""
    first_stage, second_stage = {}, {}
    for seed in seeds:
        for variant in variants:
            stage1, stage2 = folders(variant, seed, root)
            first_stage[stage1] = (f"train_stage1.py --seed {seed} --out {stage1} "
                                   f"{variant.stage1}").strip()
            if stage2:
                second_stage[stage2] = (f"train_stage2.py --seed {seed} --init {stage1} "
                                        f"--out {stage2} {variant.stage2}").strip()
    return [list(first_stage.values()), list(second_stage.values())]


def execute(line, threads=None):
    """Runs a script of ours. Of several side by side, with so many threads each, the output goes to
    the screen only when they fail."""
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    print(f"python {line}", flush=True)
    done = subprocess.run([sys.executable, *shlex.split(line)], cwd=HERE, env=environment,
                          capture_output=bool(threads), text=True)
    if done.returncode:
        sys.stderr.write((done.stdout or "")[-2000:] + (done.stderr or "")[-2000:])
        raise UserError(f"python {line} ended with exit code {done.returncode}; "
                        "type the same command again to go on")


# ================================================================== what it says

def gather(rows, variant, seeds, root, suffix=""):
    """{measure: [seeds, captions]} of a variant's rows of results.json (frechet: [seeds]); suffix
    names the path, such as ", plain reuse". None where the variant has no such path."""
    found = []
    for seed in seeds:
        name = Path(result_of(variant, seed, root)).name + suffix
        found += [row for row in rows if row["name"] == name]
    if len(found) != len(seeds):
        return None
    values = {}
    for key in found[0]["by_prompt"]:
        values[key] = torch.tensor([row["by_prompt"][key] for row in found])      # seeds×captions
    values["frechet"] = torch.tensor([row["frechet_to_teacher"] for row in found])
    values["nfe"] = found[0]["nfe_blocks"]
    return values


def teacher_values(rows, seeds):
    """The α-guided teacher's row, repeated for each training seed: it has no training of ours."""
    row = next(row for row in rows if row["name"].startswith("teacher, w") and "<=" in row["name"])
    return {key: torch.tensor([values] * seeds) for key, values in row["by_prompt"].items()}


# A statistic is a function of the indices of seeds s and captions c, so that both can be resampled.

def points(a, b):
    """Accuracy of a minus accuracy of b, in points."""
    return lambda s, c: 100 * (a["prompt_accuracy"] - b["prompt_accuracy"])[s][:, c].mean()


def ratio(a, b):
    """Scene entropy of a over that of b."""
    return lambda s, c: a["scene_entropy"][s][:, c].mean() / b["scene_entropy"][s][:, c].mean()


def change(a, b):
    """Fréchet distance to the teacher of a minus that of b; only the seeds are resampled."""
    return lambda s, c: (a["frechet"] - b["frechet"])[s].mean()


def frechet_ratio(a, b):
    """Fréchet distance to the teacher of a over that of b, of the means over the seeds."""
    return lambda s, c: a["frechet"][s].mean() / b["frechet"][s].mean()


def statements(name, get):
    """What an experiment has to show: (text, statistic, "at least" or "at most", bound).
    get(variant, suffix) is gather()."""
    one, two = get(STAGE1), get(STAGE2)
    if name == "1":
        full = get(EXPERIMENTS["1"][1][1])
        return [("entropy with guidance everywhere ÷ with α", ratio(full, one), "at most", 0.5),
                ("accuracy with α − everywhere, points", points(one, full), "at least", -3)]
    if name == "2":
        alone = get(UNDISTILLED)
        return [("Stage II adds detail: Fréchet, change", change(two, one), "at most", 0),
                ("it keeps the structure: entropy, ratio", ratio(two, one), "at least", 0.9),
                ("without Stage I there is no structure: points", points(alone, two),
                 "at most", -10)]
    if name == "3":
        skipped, reuse = get(STAGE1, ", span skipped"), get(STAGE1, ", plain reuse")
        f_alone = get(F_ONLY)
        return [("Δ0 reused − span skipped, points", points(reuse, skipped), "at least", 0),
                ("f alone − Δ0 reused, points", points(f_alone, reuse), "at least", 0),
                ("co-trained − f alone, points", points(two, f_alone), "at least", 0),
                ("f alone − Δ0 reused, Fréchet", change(f_alone, reuse), "at most", 0),
                ("co-trained − f alone, Fréchet", change(two, f_alone), "at most", 0),
                ("co-trained − Stage I's two full steps, points", points(two, one),
                 "at least", -2),
                ("co-trained ÷ Stage I, Fréchet", frechet_ratio(two, one), "at most", 0.5),
                ("co-trained ÷ Stage I, entropy", ratio(two, one), "at least", 0.9)]
    if name == "4":
        teacher = get("teacher")
        return [("28×2 ÷ network evaluations", lambda s, c: 56 / two["nfe"], "at least", 33),
                ("accuracy against the teacher's 28×2 with α, points", points(two, teacher),
                 "at least", -5),
                ("entropy against it, ratio", ratio(two, teacher), "at least", 0.9)]
    if name == "place":
        later, reuse = get(trained("3-6")), get(reused("3-6"))
        return [("3-6: co-trained − Δ0 reused, points", points(later, reuse), "at least", 0),
                ("3-6: co-trained − Stage I, points", points(later, one), "at least", -2)]
    return []


def interval(statistic, seeds, captions, rounds=2000):
    """(value, low, high): 95 % bootstrap that resamples seeds and captions."""
    g = rng(0, "claims")
    value = float(statistic(torch.arange(seeds), torch.arange(captions)))
    drawn = []
    for _ in range(rounds):
        s = torch.randint(seeds, (seeds,), generator=g)
        c = torch.randint(captions, (captions,), generator=g)
        drawn.append(float(statistic(s, c)))
    low, high = torch.quantile(torch.tensor(drawn), torch.tensor([0.025, 0.975])).tolist()
    return value, low, high


def judge(statistic, sense, bound, seeds, captions):
    """(value, low, high, verdict) of a statement."""
    value, low, high = interval(statistic, seeds, captions)
    if sense == "at least":
        inside, outside = low >= bound, high < bound
    else:
        inside, outside = high <= bound, low > bound
    verdict = "not decided"
    if inside:
        verdict = "holds"
    elif outside:
        verdict = "does not hold"
    return value, low, high, verdict


def report(name, variants, rows, seeds, root):
    """The Markdown section of one experiment: its variants' rows, each against the default Stage I
    recipe's first, then its statements."""
    def get(variant, suffix=""):
        if variant == "teacher":
            return teacher_values(rows, len(seeds))
        return gather(rows, variant, seeds, root, suffix)

    def cell(values, digits):                                  # [seeds, captions] or [seeds]
        by_seed = values.mean(1) if values.ndim == 2 else values
        spread = f" ± {by_seed.std():.{digits}f}" if len(seeds) > 1 else ""
        return f"{by_seed.mean():.{digits}f}{spread}"

    def against(values, digits, statistic):
        value, low, high = interval(statistic(values, base), len(seeds), 24)
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    first = next(variant for variant in variants if not variant.stage1)
    base = get(first)
    lines = [f"### {name}: {EXPERIMENTS[name][0]}", "",
             "| variant | NFE | right | entropy | Fréchet | points | entropy ratio |",
             "|" + " --- |" * 7]
    for variant in variants:
        for suffix in ("", *SUFFIXES) if name in ALL_PATHS else ("",):
            values = get(variant, suffix)
            if values is None:
                continue
            measured = [cell(values["prompt_accuracy"], 3), cell(values["scene_entropy"], 2),
                        cell(values["frechet"], 2)]
            lines.append(f"| {variant.label}{suffix} | {values['nfe']:.4g} | "
                         f"{' | '.join(measured)} | {against(values, 1, points)} | "
                         f"{against(values, 2, ratio)} |")
    lines += ["", f"Fréchet: to the α-guided teacher. Points and entropy ratio: against "
              f"*{first.label}*."]
    judged = statements(name, get)
    if judged:
        lines += ["", "| statement | measured | bound | verdict |", "|" + " --- |" * 4]
    for text, statistic, sense, bound in judged:
        value, low, high, verdict = judge(statistic, sense, bound, len(seeds), 24)
        lines.append(f"| {text} | {value:.2f} [{low:.2f}, {high:.2f}] | {sense} {bound} | "
                     f"**{verdict}** |")
    return "\n".join(lines)


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
        y = values["prompt_accuracy"].mean(1)                             # seeds
        a = values[x].mean(1) if x != "nfe" else 0 * y + values["nfe"]
        bars = {"xerr": a.std(), "yerr": y.std()} if len(y) > 1 else {}
        axes.errorbar(a.mean(), y.mean(), **bars, fmt="o", capsize=3)
        axes.annotate(label, (a.mean(), y.mean()), xytext=(6, 6), textcoords="offset points")
    axes.set(xlabel={"nfe": "network evaluations"}.get(x, "scene entropy, nats"),
             ylabel="caption right")
    axes.margins(x=0.2, y=0.15)                                           # room for the labels
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(path)


# ================================================================== command

def train(stages, jobs):
    """Runs Stage I's commands, then Stage II's, so many side by side."""
    cores = os.cpu_count() or 1
    jobs = jobs or min(8, cores)
    threads = max(1, cores // jobs) if jobs > 1 else None
    for lines in stages:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(lambda line: execute(line, threads), lines):
                pass


@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.claims", __doc__.split("\n\n")[0])
    chosen = {name: EXPERIMENTS[name] for name in settings.only or ["1", "3"]}
    rule = option(None, "", low=0, high=2**31 - 1).metadata
    try:
        seeds = [checked(int, rule, seed) for seed in settings.seeds or ["3407", "1", "2"]]
    except Exception as error:
        raise UserError(f"--seeds {error}") from None
    if settings.eval_seed in seeds or len(set(seeds)) < len(seeds):
        raise UserError("--seeds must differ from each other and from --eval-seed")
    # The default recipe comes first: Fréchet distances are taken to its teacher.
    variants = [STAGE1]
    for _, group in chosen.values():
        variants += [variant for variant in group if variant not in variants]
    variants.sort(key=lambda variant: variant.stage1 != "")
    stages = commands(variants, seeds, settings.runs)
    measured = []
    for seed in seeds:
        measured += [result_of(variant, seed, settings.runs) for variant in variants]
    own_path = "" if chosen.keys() & set(ALL_PATHS) else "--own-path "
    evaluation = (f"evaluate.py --teacher alpha --seed {settings.eval_seed} --samples-per-prompt "
                  f"{settings.samples_per_prompt} --out {settings.out} {own_path}--checkpoint "
                  + " ".join(dict.fromkeys(measured)))
    if settings.dry_run:
        print("\n".join(f"python {line}" for line in [*stages[0], *stages[1], evaluation]))
        return
    train(stages, settings.jobs)
    execute(evaluation)

    found = read_json(Path(settings.out) / "results.json")
    sections = [report(name, group, found["rows"], seeds, settings.runs)
                for name, (_, group) in chosen.items()]
    sections.append("Training seeds " + ", ".join(map(str, seeds)) + "; ± standard deviation over "
                    "them; brackets: 95 % bootstrap over seeds and captions (Fréchet: over seeds). "
                    + json.dumps(found["protocol"]))
    text = "\n\n".join(sections)
    write_text(Path(settings.out) / "claims.md", text + "\n")
    for name, x in (("alpha", "scene_entropy"), ("width", "nfe")):
        if name in chosen:
            plot(Path(settings.out) / f"{name}.png", x, [
                (variant.label, gather(found["rows"], variant, seeds, settings.runs))
                for variant in chosen[name][1]])
    print(text)


if __name__ == "__main__":
    main()
