"""Up to which noise level may the teacher be guided? Measures a teacher and proposes α of Eq. 4.

    python -m tools.find_alpha --model sd3-medium --guidance 7 --prompts-used 16

α is not portable: it depends on the teacher and on its guidance w. This tool trains nothing. It
asks, level by level, what guidance does to the teacher's guess of the picture, x̂0 = x_σ − σ·v:

    samples        P prompts, n noises each, by the teacher without guidance, 28 steps
    at a level σ   each is re-noised to σ; the teacher guesses x̂0, once without and once with w
    spread         standard deviation of all values of x̂0, of all prompts together
    within         the same of x̂0 minus the mean x̂0 of its prompt: diversity within a prompt
    share          within ÷ spread: how much of the spread is left to the pictures of one prompt

Each is printed as a ratio, with guidance ÷ without. Where the share's is below 1, guidance draws
the pictures of a prompt together, towards its most likely layout: at high noise. Further down it
comes up to 1. The proposal is the level where half of the largest loss is made up.

These definitions and the rule are ours [ours]; the paper gives 0.94 for SD3-Medium [paper, second
hand]. "Half" agrees with the sweep of α in the miniature, one teacher; guiding only where nothing
is lost was worse there (docs/NOTEBOOK.md). So begin a sweep of --alpha at the proposal.

Dimension key: B batch, P prompts, n samples of a prompt, C latent channels, H W latent size.
"""

import dataclasses

from run import UserError, command, option, parse_settings, rng

import torch

from losses import guide, renoise, x0_from_velocity
from model import (Prompts, check_base, choose_prompts, download, find_preset, load_transformer,
                   pick_device, velocity)
from sampler import TEACHER_STEPS, image_noise, sample_guided, teacher_sigmas
from train_stage1 import SD3, TINY

# The levels asked about. Closer together at high noise, where α is looked for.
LEVELS = (0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.3)
LEAST = 0.98        # [ours] a share from here on counts as kept: so much is noise of the samples


@dataclasses.dataclass
class Settings:
    model: str = option("tiny", "the teacher: a preset, a pipeline folder or a hub id")
    guidance: float = option(None, "the teacher's w (default: the training's)", low=1, high=100)
    prompts: str = option(None, "file of prompts; without it the built-in ones")
    prompts_used: int = option(24, "P, so many of the prompts", low=2, high=10_000)
    samples_per_prompt: int = option(8, "n, samples of each", low=2, high=4096)
    steps: int = option(TEACHER_STEPS, "steps of the teacher for its samples", low=1, high=1000)
    batch_size: int = option(16, "samples at a time", low=1, high=10_000)
    seed: int = option(11, "seed of prompts and noises", low=0, high=2**31 - 1)
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))


@torch.inference_mode()
def measure(teacher, prompts, shape, sigmas, settings):
    """[{"sigma", "spread", "within", "share"}], one for each level; the last three are ratios."""
    parts = torch.arange(len(prompts) * settings.samples_per_prompt).split(settings.batch_size)
    # Sample j has prompt j mod P. No guidance (w = 1): these samples stand for data, which need not
    # be at hand. They stay in memory, 1 MB each at 1024².
    clean = []
    for part in parts:
        noise = image_noise(settings.seed, part, shape).to(prompts.device)
        x0, _ = sample_guided(teacher, noise, prompts.take(part % len(prompts)), None, sigmas,
                              w=1.0, alpha=1.0)
        clean.append(x0)                                  # B×C×H×W
    rows = []
    for j, sigma in enumerate(LEVELS):
        plain, guided = [], []
        for part, x0 in zip(parts, clean, strict=True):
            # Fresh noise for each sample and level, from its index alone: batches change no result.
            fresh = image_noise(settings.seed, part, shape, f"level {j}").to(prompts.device)
            # From level 0, so x_σ = (1 − σ)·x0 + σ·noise: what training would show a network at σ.
            x = renoise(x0, 0.0, sigma, fresh)
            # The same x for both guesses: what differs between them is guidance and nothing else.
            v_cond, _ = velocity(teacher, x, sigma, prompts.take(part % len(prompts)))
            v_uncond, _ = velocity(teacher, x, sigma, prompts.uncond(len(part)))
            v_guided = guide(v_cond, v_uncond, settings.guidance)
            plain.append(x0_from_velocity(x, sigma, v_cond).cpu())
            guided.append(x0_from_velocity(x, sigma, v_guided).cpu())
        # With ÷ without, no difference: at high noise every guess is a blur of small spread.
        ratios = spreads(torch.cat(guided), len(prompts)) / spreads(torch.cat(plain), len(prompts))
        spread, within = ratios.tolist()
        rows.append({"sigma": sigma, "spread": spread, "within": within, "share": within / spread})
    return rows


def spreads(x0, prompts):
    """[2]: the standard deviation of all values of x̂0 [n·P, C, H, W], and that within a prompt."""
    # A prompt's mean guess is its blurred common layout; what is left beyond it is variety.
    by_prompt = x0.double().unflatten(0, (-1, prompts))                   # n×P×C×H×W
    return torch.stack([by_prompt.std(correction=0), by_prompt.var(0).mean().sqrt()])


def propose(rows):
    """(α, reason) from measure()'s rows, σ falling; α is None where no level collapses."""
    # Where guidance does most harm; it need not be the highest level, where x̂0 is one blur.
    worst = min(rows, key=lambda row: row["share"])
    if worst["share"] >= LEAST:
        return None, "no level collapses: α = 1, or add higher ones to LEVELS"
    # Halfway between the worst share and 1. Where all of the loss is made up α would be too low:
    # a student of two steps then gets little guidance where its first step is judged.
    half = (1 + worst["share"]) / 2
    # The lowest level that still is below. What lies above it is not guided, though some level in
    # between may look harmless: α is one number.
    last = max(i for i, row in enumerate(rows) if row["share"] < half)
    if last == len(rows) - 1:
        return rows[-1]["sigma"], "the lowest one collapses, too: add lower ones to LEVELS"
    high, low = rows[last:last + 2]                       # a straight line between these two
    t = (half - high["share"]) / (low["share"] - high["share"])
    alpha = high["sigma"] + t * (low["sigma"] - high["sigma"])
    return alpha, ("guidance draws a prompt's pictures together most at "
                   f"σ = {worst['sigma']:g} (share {worst['share']:.2f}); half of it is left at α")


@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.find_alpha", __doc__.split("\n\n")[0])
    preset = find_preset(settings.model)
    values = TINY if preset.is_tiny else SD3
    settings.guidance = settings.guidance or values["guidance"]
    device = pick_device(preset, settings.device)
    texts = choose_prompts(preset, settings.prompts)
    config, _ = check_base(preset)
    if len(texts) < 2:                                    # nothing would lie between them
        raise UserError(f"--prompts {settings.prompts}: two prompts are needed at least")
    # Drawn, not the first so many: the built-in grammar's first ones are all of one style.
    order = torch.randperm(len(texts), generator=rng(settings.seed, "prompts"))
    texts = [texts[j] for j in order[:settings.prompts_used].tolist()]
    preset = download(preset)                             # now a folder on this disk
    prompts = Prompts(preset, texts, device)              # frees the text encoders again
    teacher = load_transformer(preset, frozen_on=device).to(device)
    # The model's own picture size: another one would have another noise level for "layout".
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    sigmas = teacher_sigmas(preset, settings.steps)
    rows = measure(teacher, prompts, shape, sigmas, settings)
    alpha, reason = propose(rows)
    print(f"{preset.name}, w = {settings.guidance:g}, {len(texts)} prompts × "
          f"{settings.samples_per_prompt} samples, seed {settings.seed}: guided ÷ not\n\n"
          "| σ | spread | within a prompt | share |\n| --- | --- | --- | --- |")
    for row in rows:
        print("| {sigma:g} | {spread:.3f} | {within:.3f} | {share:.3f} |".format(**row))
    print(f"\nproposed α: {'none' if alpha is None else f'{alpha:.2f}'}; {reason}")


if __name__ == "__main__":
    main()
