"""Which blocks may be skipped? Measures a Stage I run and proposes a span for Stage II.

    python -m tools.find_span --checkpoint runs/tiny-stage1 --nfe 1.67

Each span of the wanted width is tried: step two with the span's Δ0 reused as it is, without f,
against step two in full, |v_reused − v| ÷ |v|. The span with the smallest error is proposed. With
--nfe 1.92 each single block of the miniature's twelve is tried. The paper plots a "reuse
error" and does not define it; this measure is [ours].

Dimension key: B batch, C latent channels, H W latent size.
"""

import dataclasses

from run import UserError, command, option, parse_settings, read_settings, rng

import torch

from cache import nfe
from model import (Prompts, choose_prompts, download, find_preset, load_student, pick_device,
                   velocity)
from sampler import image_noise, roll_out, sigma_grid


@dataclasses.dataclass
class Settings:
    checkpoint: str = option(None, "run folder whose student is measured")
    nfe: float = option(1.67, "wanted network evaluations of two steps", low=1, high=2)
    samples: int = option(64, "roll-outs to measure on", low=1, high=100_000)
    batch_size: int = option(16, "roll-outs at a time", low=1, high=10_000)
    seed: int = option(7, "seed of their noises and prompts", low=0, high=2**31 - 1)
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))


@torch.no_grad()
def span_errors(student, spans, noise, prompt, sigmas):
    """For each span the relative error |v_reused − v| ÷ |v| of the second step's velocity when the
    span's Δ0 is reused as it is, from noise [B, C, H, W]."""
    latents, _, _ = roll_out(student, noise, prompt, sigmas[:2])
    x = latents[1]                                        # where the student itself has come to
    full, _ = velocity(student, x, sigmas[1].item(), prompt)              # B×C×H×W
    errors = []
    for span in spans:
        # Step one records the span's Δ0, step two takes it as it is: the worst case, without f.
        # Each step at its own latents and level, as when the student samples.
        _, delta = velocity(student, noise, sigmas[0].item(), prompt, span)
        reused, _ = velocity(student, x, sigmas[1].item(), prompt, span, delta)   # B×C×H×W
        errors.append(((reused - full).norm() / full.norm()).item())
    return torch.tensor(errors)                                           # spans


@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.find_span", __doc__.split("\n\n")[0])
    if not settings.checkpoint:
        raise UserError("--checkpoint RUN is needed, for instance runs/tiny-stage1")
    run = read_settings(settings.checkpoint)
    if run["steps"] < 2:
        raise UserError(f"{settings.checkpoint} has one step: there is nothing to reuse")
    preset = download(find_preset(run["model"]))          # now a folder on this disk
    device = pick_device(preset, settings.device)
    # The prompts that it was trained on.
    pool = choose_prompts(preset, run["prompts"], None, run["pool"], run["seed"])
    chosen = torch.randint(len(pool), (settings.samples,), generator=rng(settings.seed, "prompts"))
    # Of each roll-out its own prompt: a block may do the same again for one and not for another.
    prompts = Prompts(preset, [pool[j] for j in chosen.tolist()], device)
    student, _, _ = load_student(settings.checkpoint, run, preset, device)
    # NFE = 2 − width / blocks, so the wanted NFE gives the width, as near as blocks allow.
    blocks = len(student.transformer_blocks)
    width = min(max(1, round((2 - settings.nfe) * blocks)), blocks - 1)
    spans = [(n, n + width - 1) for n in range(blocks - width)]     # never the last block
    sigmas = sigma_grid(run["steps"])
    errors = torch.zeros(len(spans))                      # the mean over the samples
    for part in torch.arange(settings.samples).split(settings.batch_size):
        noise = image_noise(settings.seed, part, run["latent_shape"]).to(device)  # B×C×H×W
        found = span_errors(student, spans, noise, prompts.take(part), sigmas)
        errors += found * len(part) / settings.samples
    best = errors.argmin().item()

    # All spans of that width, not the best alone: neighbours are often nearly as good.
    print(f"spans of {width} blocks, {nfe(2, spans[best], blocks):.3f} NFE: error of step two when "
          "Δ0 is reused as it is")
    for i, ((first, last), error) in enumerate(zip(spans, errors.tolist(), strict=True)):
        mark = "  <- proposed" if i == best else ""
        print(f"{first:5}-{last:<4}{error:8.4f}{mark}")


if __name__ == "__main__":
    main()
