"""Up to which noise level may the teacher be guided? Measures a teacher and proposes α of Eq. 4.

    python -m tools.find_alpha --model tiny
    python -m tools.find_alpha --model sd3-medium --guidance 7 --prompts-used 16

α is not portable: it depends on the teacher and on its guidance w. This tool trains nothing. It
asks, level by level, what guidance does to the teacher's guess of the picture, x̂0 = x_σ − σ·v:

    samples        P prompts, n noises each, by the teacher without guidance, 28 steps
    at a level σ   each is re-noised to σ; the teacher guesses x̂0, once without and once with w
    spread         standard deviation of all values of x̂0, of all prompts together
    within         the same of x̂0 minus the mean x̂0 of its prompt: diversity within a prompt
    share          within ÷ spread: how much of the spread is left to the pictures of one prompt

Each is printed as a ratio, with guidance ÷ without. Guidance raises every spread. Where the ratio
of the share is below 1, it moves whole prompts apart more than the pictures of one prompt: it draws
those together, towards the prompt's most likely layout. The share is lowest at high noise and comes
up to 1 further down. The proposal is the level where half of the largest loss is made up.

These definitions and the rule are ours [ours], not the paper's; the paper gives 0.94 for SD3-Medium
[paper, second hand]. "Half" was chosen because it agrees with the sweep of α in the miniature, one
teacher; guiding only where nothing is lost was measured worse there (docs/NOTEBOOK.md). So take the
proposal as a place to begin a sweep of --alpha at.

Dimension key: B batch, P prompts, n samples of a prompt, C latent channels, H W latent size.
"""

import dataclasses
from pathlib import Path

from tools.settings import UserError, command, fill_in, option, parse_settings
from run import rng, write_text

import torch

from losses import guide, renoise, x0_from_velocity
from model import (Prompts, check_base, choose_prompts, find_preset, frozen_dtype,
                   load_transformer, pick_device, velocity)
from sampler import TEACHER_STEPS, image_noise, load_scheduler, sample_guided, teacher_sigmas
from train_stage1 import SD3, TINY

# Closer together at high noise, where α is looked for: there the share changes fast.
LEVELS = (0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.3)
TO_FIND = [str(level) for level in LEVELS]
LEAST = 0.98        # [ours] a share from here on counts as kept: so much is noise of the samples


@dataclasses.dataclass
class Settings:
    model: str = option("tiny", "the teacher: a preset, a pipeline folder or a hub id")
    guidance: float = option(None, "the teacher's guidance w (default: the training recipe's)",
                             above=1, high=100)
    levels: list = option(None, f"noise levels σ in (0, 1) (default: {' '.join(TO_FIND)})")
    prompts: str = option(None, "file of prompts; without it the built-in ones")
    prompts_used: int = option(24, "P, so many of the prompts", low=2, high=10_000)
    samples_per_prompt: int = option(8, "n, samples of each", low=2, high=4096)
    steps: int = option(TEACHER_STEPS, "steps of the teacher for its samples", low=1, high=1000)
    batch_size: int = option(None, "samples at a time (tiny: 64, others: 2); changes no result",
                             low=1)
    seed: int = option(11, "seed of prompts and noises", low=0, high=2**31 - 1)
    out: str = option(None, "folder of alpha.md and alpha.png (default: results/alpha)")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


def read_levels(words):
    """The levels as numbers, falling; UserError for what is no noise level."""
    levels = []
    for word in words or TO_FIND:
        # At σ = 1 there is no picture left in x, at 0 there is nothing to guess: both are refused.
        try:
            level = float(word)
        except ValueError:
            raise UserError(f"--levels must be numbers, not {word!r}") from None
        if not 0 < level < 1:                             # NaN, too, is not inside
            raise UserError(f"--levels must lie between 0 and 1, not {word}")
        levels.append(level)
    if len(set(levels)) < 2:
        raise UserError("--levels needs two different levels at least")
    return sorted(set(levels), reverse=True)


# ================================================================== measuring

@torch.inference_mode()
def guesses(teacher, prompts, owner, part, shape, sigmas, levels, settings):
    """{level: (x̂0 without guidance, x̂0 with it)}, each [B, C, H, W], of the samples `part` [B];
    owner [P·n] says which prompt each sample has."""
    prompt, uncond = prompts.take(owner[part]), prompts.uncond(len(part))
    noise = image_noise(settings.seed, part, shape).to(prompts.device)
    # Without guidance (w = 1): these samples stand for data, which need not be at hand.
    x0, _ = sample_guided(teacher, noise, prompt, uncond, sigmas, 1.0)
    found = {}
    for j, sigma in enumerate(levels):
        # Fresh noise for each sample and level, from its index alone: batches change no result.
        fresh = image_noise(settings.seed, part, shape, f"level {j}").to(prompts.device)
        # From level 0, so x_σ = (1 − σ)·x0 + σ·noise: what training would show a network at σ.
        x = renoise(x0, 0.0, sigma, fresh)
        # One after the other, not as a batch of two: half the memory.
        v_cond = velocity(teacher, x, sigma, prompt)
        v_uncond = velocity(teacher, x, sigma, uncond)
        # The same x for both guesses: what differs between them is guidance and nothing else.
        v_guided = guide(v_cond, v_uncond, settings.guidance)
        found[sigma] = x0_from_velocity(x, sigma, v_cond), x0_from_velocity(x, sigma, v_guided)
    return found


class Moments:
    """Sums of x̂0 from which spread and diversity follow. They are of the size of one latent for
    each prompt, however many samples there are: 16 × 128² latents need 1 MB a prompt and sum."""

    def __init__(self, prompts, shape):
        # Double precision: a variance is a small difference of large sums.
        self.n = torch.zeros(prompts, dtype=torch.float64)                # samples so far, P
        self.total = torch.zeros(prompts, *shape, dtype=torch.float64)    # sum of x̂0, P×C×H×W
        self.squares = torch.zeros(prompts, dtype=torch.float64)          # mean squares summed, P

    def add(self, x0, owner):
        """Counts x̂0 [B, C, H, W] of the prompts owner [B]."""
        x0 = x0.double().cpu()
        self.n.index_add_(0, owner, torch.ones(len(x0), dtype=torch.float64))
        self.total.index_add_(0, owner, x0)
        self.squares.index_add_(0, owner, x0.square().flatten(1).mean(1))

    def spread(self):
        """Standard deviation over all values of all samples, a number."""
        # E[x²] − E[x]², over places and samples alike.
        n = self.n.sum()
        mean = self.total.flatten(1).mean(1).sum() / n
        return (self.squares.sum() / n - mean ** 2).clamp(min=0).sqrt().item()

    def within(self):
        """Root mean square distance of a value from its prompt's mean there, a number."""
        # A prompt's mean guess is its blurred common layout. What is left beyond it is variety.
        mean = self.total / self.n[:, None, None, None]                   # P×C×H×W
        inner = self.squares.sum() - (self.n * mean.square().flatten(1).mean(1)).sum()
        # n − 1: a prompt's mean was estimated from the same n samples.
        return (inner / (self.n - 1).sum()).clamp(min=0).sqrt().item()


def measure(teacher, prompts, shape, sigmas, levels, settings):
    """[{"sigma", "spread", "within", "share"}] for each level, falling; all but sigma are ratios,
    with guidance ÷ without."""
    # Of each level two sets of sums, without guidance and with it: no x̂0 is kept.
    many = len(prompts), shape
    plain = {sigma: Moments(*many) for sigma in levels}
    guided = {sigma: Moments(*many) for sigma in levels}
    # Sample j has prompt j mod P, so that a run that is stopped has seen them all.
    owner = torch.arange(len(prompts) * settings.samples_per_prompt) % len(prompts)
    for part in torch.arange(len(owner)).split(settings.batch_size):
        found = guesses(teacher, prompts, owner, part, shape, sigmas, levels, settings)
        for sigma, (without, with_guidance) in found.items():
            plain[sigma].add(without, owner[part])
            guided[sigma].add(with_guidance, owner[part])
    # Ratios, not differences: at high noise every guess is a blur with a small spread of its own.
    rows = []
    for sigma in levels:
        spread = guided[sigma].spread() / plain[sigma].spread()
        within = guided[sigma].within() / plain[sigma].within()
        rows.append({"sigma": sigma, "spread": spread, "within": within, "share": within / spread})
    return rows


def crossing(rows, mark):
    """The lowest level where the ratio of the share comes up to mark, going down in σ; None where
    it is below mark nowhere. rows are measure()'s."""
    below = [i for i, row in enumerate(rows) if row["share"] < mark]
    if not below:
        return None
    # The lowest level that still is below. What lies above it is not guided, though some level in
    # between may look harmless: α is one number.
    last = below[-1]
    if last == len(rows) - 1:
        return rows[last]["sigma"]
    # A straight line between that level and the next one.
    high, low = rows[last], rows[last + 1]
    t = (mark - high["share"]) / (low["share"] - high["share"])
    return high["sigma"] + t * (low["sigma"] - high["sigma"])


def propose(rows):
    """(α, reason): where half of the largest loss of the share is made up. α is None where no level
    collapses."""
    # Where guidance does most harm; it need not be the highest level, where x̂0 is one blur.
    worst = min(rows, key=lambda row: row["share"])
    if worst["share"] >= LEAST:
        return None, ("at none of these levels guidance takes from the share of the diversity "
                      "within a prompt; α = 1, or ask at higher levels")
    # Halfway between the worst share and 1. Where all of the loss is made up α would be too low:
    # a student of two steps then gets little guidance where its first step is judged.
    alpha = crossing(rows, (1 + worst["share"]) / 2)
    reason = (f"guidance draws the pictures of a prompt together most at σ = {worst['sigma']:g} "
              f"(share {worst['share']:.2f}); at σ = {alpha:.2f} half of that is left, below "
              f"{crossing(rows, LEAST):.2f} nothing")
    if rows[-1]["share"] < LEAST:
        reason += "; but the lowest level collapses, too: ask at lower ones"
    return alpha, reason


# ================================================================== table and plot

def table(rows):
    """The rows as a Markdown table."""
    lines = ["| σ | spread | within a prompt | share |", "| --- | --- | --- | --- |"]
    for row in rows:
        lines.append(f"| {row['sigma']:g} | {row['spread']:.3f} | {row['within']:.3f} | "
                     f"{row['share']:.3f} |")
    return "\n".join(lines)


def plot(rows, alpha, title, path):
    """The ratios over σ as a PNG, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    figure = Figure(figsize=(9, 3.8), layout="constrained", facecolor="white")
    # Left what the two ratios are, right what follows from them.
    sigmas = [row["sigma"] for row in rows]
    left, right = figure.subplots(1, 2)
    left.plot(sigmas, [row["spread"] for row in rows], "o-", label="spread, all prompts")
    left.plot(sigmas, [row["within"] for row in rows], "s-", label="within a prompt")
    left.set(ylabel="x̂0 with guidance ÷ without\n(near 1 is good: little is changed)",
             title="guidance spreads the guess out")
    left.legend()
    share = [row["share"] for row in rows]
    # Red: the levels where guidance takes from a prompt's own diversity.
    right.plot(sigmas, share, "o-", color="#c62828")
    right.axhspan(min(share) - 0.05, 1, color="#c62828", alpha=0.07)
    right.set(ylabel="share within a prompt, with ÷ without\n(1 or more is good; below: collapse)",
              title="where it collapses", ylim=(min(share) - 0.05, max(1.1, max(share) + 0.05)))
    for axes in (left, right):
        axes.axhline(1, color="#6e7781", linewidth=1)
        if alpha:
            axes.axvline(alpha, color="#2e7d32", linestyle="--")
        axes.set_xlabel("noise level σ (1 = noise)")
        axes.grid(alpha=0.25)
    if alpha:
        right.text(alpha, 0.03, f"proposed α = {alpha:.2f} ", ha="right", color="#2e7d32",
                   transform=right.get_xaxis_transform())
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    print(path)


@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.find_alpha", __doc__.split("\n\n")[0])
    # What may be wrong is asked before a gigabyte is loaded.
    levels, preset = read_levels(settings.levels), find_preset(settings.model)
    tiny = preset.captions == "tiny"
    fill_in(settings, {"guidance": (TINY if tiny else SD3)["guidance"], "out": "results/alpha",
                       "batch_size": 64 if tiny else 2})
    if Path(settings.out).is_file():
        raise UserError(f"--out {settings.out} is a file; give a folder")
    device = pick_device(preset, settings.device)
    texts = choose_prompts(preset, settings.prompts)
    config = check_base(preset)
    if len(texts) < 2:
        raise UserError(f"--prompts {settings.prompts}: two prompts are needed, or nothing lies "
                        "between them")
    # Drawn, not the first so many: the built-in grammar's first ones are all of one style.
    order = torch.randperm(len(texts), generator=rng(settings.seed, "prompts"))
    texts = [texts[j] for j in order[:settings.prompts_used].tolist()]
    prompts = Prompts(preset, texts, device)              # frees the text encoders again
    teacher = load_transformer(preset, frozen_dtype(device)).to(device)
    # The model's own picture size: another one would have another noise level for "layout".
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    sigmas = teacher_sigmas(load_scheduler(preset), settings.steps)
    rows = measure(teacher, prompts, shape, sigmas, levels, settings)

    # The text file comes before the plot: a missing matplotlib loses no measurement.
    alpha, reason = propose(rows)
    what = (f"{preset.name}, w = {settings.guidance:g}, {len(texts)} prompts × "
            f"{settings.samples_per_prompt} samples, seed {settings.seed}")
    proposal = f"proposed α: {'none' if alpha is None else f'{alpha:.2f}'}; {reason}"
    text = f"{what}; x̂0 with guidance ÷ without\n\n{table(rows)}\n\n{proposal}"
    write_text(Path(settings.out) / "alpha.md", text + "\n")
    print(text)
    plot(rows, alpha, what, Path(settings.out) / "alpha.png")


if __name__ == "__main__":
    main()
