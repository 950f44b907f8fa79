"""Which blocks may be skipped? Measures a Stage I run and proposes a span for Stage II.

    python -m tools.find_span --checkpoint runs/tiny-stage1 --nfe 1.67

Two tables. The first tells for each block how much its residual, what the block adds to the image
and to the text, changes from step one to step two: a block that does the same again can be skipped.
The second tries each span of the wanted width: step two with the span's Δ0 reused as it is, without
f, against step two in full. The span with the smallest error is proposed. Not here: the cache
(cache.py) and the training of f, which makes the error smaller still (train_stage2.py).

The paper plots a "reuse error" and does not define it. --error chooses between two readings [ours]:
squared    blocks: mean squared change; spans: |v_reused − v|₂ ÷ |v|₂ of step two's velocity
l1         blocks: Σ|change| ÷ Σ|residual of step one|, the relative L1 distance that the authors
           plot elsewhere (X-Slim, arXiv 2512.12604); spans: the same with L1 norms
Squared, a block with large residuals looks bad although its change may be small beside them.

Dimension key: B batch, C latent channels, H W latent size, N image tokens, L text tokens, D width.
"""

import dataclasses

from tools.settings import UserError, command, option, parse_settings
from run import rng

import torch

from cache import nfe
from model import Prompts, default_prompts, find_preset, pick_device, velocity
from sampler import (cached_velocity, image_noise, load_student, read_recipe, roll_out,
                     sigma_grid)


@dataclasses.dataclass
class Settings:
    checkpoint: str = option(None, "run folder whose student is measured")
    nfe: float = option(1.67, "wanted network evaluations of two steps", low=1, high=2)
    error: str = option("squared", "how a change is measured: mean square, or relative L1 distance",
                        choices=("squared", "l1"))
    samples: int = option(64, "roll-outs to measure on", low=1, high=100_000)
    batch_size: int = option(16, "roll-outs at a time", low=1)
    seed: int = option(7, "seed of their noises and prompts", low=0, high=2**31 - 1)
    out: str = option("reuse_error.png", "the plot, if matplotlib is installed")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


# ================================================================== what changes between the steps

def block_residuals(student, x, sigma, prompt):
    """What each block adds at latents x [B, C, H, W]: (image [B, N, D], text [B, L, D]) a block.
    The last block returns no text: None."""
    # Hooks, not another forward: what is measured is exactly what the network does.
    residuals = []

    def keep(block, args, inputs, output):
        # A block returns its input plus what it adds; the difference is its contribution.
        text, image = output
        added = image - inputs["hidden_states"]
        if text is not None:
            text = text - inputs["encoder_hidden_states"]
        residuals.append((added, text))

    hooks = []
    for block in student.transformer_blocks:
        hooks.append(block.register_forward_hook(keep, with_kwargs=True))
    velocity(student, x, sigma, prompt)
    for hook in hooks:
        hook.remove()
    return residuals


def reuse_errors(student, x0, x1, prompt, sigmas, error="squared"):
    """{"image": [blocks], "text": [blocks − 1]}: change of each block's own residual from step one
    (x0 at sigmas[0]) to step two (x1 at sigmas[1]), by one of ERRORS."""
    change = ERRORS[error]
    # Each step at its own latents and level, as when the student samples.
    one = block_residuals(student, x0, sigmas[0].item(), prompt)
    two = block_residuals(student, x1, sigmas[1].item(), prompt)
    errors = {"image": [], "text": []}
    for (image, text), (image_later, text_later) in zip(one, two, strict=True):
        errors["image"].append(change(image_later, image))
        if text is not None:
            errors["text"].append(change(text_later, text))
    return errors


def mean_square(a, b):
    """Mean squared difference of two tensors, a number."""
    return (a.float() - b.float()).square().mean().item()


def relative_l1(a, b):
    """Σ|a − b| ÷ Σ|b| of two tensors, a number: the change as a share of what was there before."""
    a, b = a.float(), b.float()
    return ((a - b).abs().sum() / b.abs().sum()).item()


ERRORS = {"squared": mean_square, "l1": relative_l1}      # of a block's residual, --error


def span_errors(student, spans, x0, x1, prompt, sigmas, error="squared"):
    """For each span the relative error |v_reused − v| / |v| of the second step's velocity when the
    span's Δ0 is reused as it is; |·| is the Euclidean norm, or L1 with error="l1"."""
    norm = 1 if error == "l1" else 2
    # This error sees what the blocks' own do not: how much the later blocks make of it.
    sigma_0, sigma_1 = sigmas[0].item(), sigmas[1].item()
    full = velocity(student, x1, sigma_1, prompt)                         # B×C×H×W
    errors = []
    for span in spans:
        # Step one records the span's Δ0, step two takes it as it is: the worst case, without f.
        _, delta = cached_velocity(student, x0, sigma_0, prompt, span)
        reused, _ = cached_velocity(student, x1, sigma_1, prompt, span, delta)
        errors.append(((reused - full).norm(norm) / full.norm(norm)).item())
    return errors


@torch.no_grad()
def measure(student, prompts, spans, settings, shape, sigmas):
    """{"image", "text", "span": errors}, each the mean over the samples."""
    # Means over the samples, batch by batch: an error of single samples jumps.
    total = {"image": 0, "text": 0, "span": 0}
    for part in torch.arange(settings.samples).split(settings.batch_size):
        x0 = image_noise(settings.seed, part, shape).to(prompts.device)
        prompt = prompts.take(part)
        latents, _, _ = roll_out(student, x0, prompt, sigmas[:2])
        x1 = latents[1]                                   # where the student itself has come to
        found = reuse_errors(student, x0, x1, prompt, sigmas, settings.error)
        found["span"] = span_errors(student, spans, x0, x1, prompt, sigmas, settings.error)
        weight = len(part) / settings.samples             # the last part may be smaller
        for name, values in found.items():
            total[name] = total[name] + weight * torch.tensor(values)
    return {name: values.tolist() for name, values in total.items()}


# ================================================================== tables and plot

NAMES = {"squared": "mean squared change of the block's residual",
         "l1": "relative L1 change of the block's residual"}


def print_tables(errors, spans, best, blocks, error="squared"):
    """The error of each block and of each span."""
    print(f"block   image error   text error    ({NAMES[error]})")
    for i, image in enumerate(errors["image"]):
        text = f"{errors['text'][i]:13.4f}" if i < len(errors["text"]) else ""
        print(f"{i:5}{image:14.4f}{text}")
    width = best[1] - best[0] + 1
    norm = "relative L1 error" if error == "l1" else "relative error"
    print(f"\nspans of {width} blocks, {nfe(2, best, blocks):.3f} NFE, {norm} of the "
          "second step when Δ0 is reused as it is")
    # Of all spans of that width, not of the best alone: neighbours are often nearly as good.
    for span, error in zip(spans, errors["span"], strict=True):
        mark = "  <- proposed" if span == best else ""
        print(f"{span[0]:5}-{span[1]:<4}{error:8.4f}{mark}")


def plot(errors, best, out, error="squared"):
    """The errors of the blocks as a picture, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")                                 # draws into files, needs no screen
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    # Logarithmic: squared errors of the first and the last block differ by a factor of fifty.
    for stream in ("image", "text"):
        axes.semilogy(errors[stream], "o-", label=f"{stream} stream")
    axes.axvspan(best[0] - 0.5, best[1] + 0.5, alpha=0.15,
                 label=f"proposed span {best[0]}-{best[1]}")
    axes.set(xlabel="block", ylabel=f"{NAMES[error]}\n(low is good)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(out)


@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.find_span", __doc__.split("\n\n")[0])
    if not settings.checkpoint:
        raise UserError("--checkpoint RUN is needed, for instance runs/tiny-stage1")
    recipe = read_recipe(settings.checkpoint)
    if recipe["steps"] < 2:
        raise UserError(f"{settings.checkpoint} has one step: there is nothing to reuse")
    preset = find_preset(recipe["base"])
    device = pick_device(preset, settings.device)
    pool = default_prompts(preset)
    chosen = torch.randint(len(pool), (settings.samples,), generator=rng(settings.seed, "prompts"))
    # Of each roll-out its own prompt: a block may do the same again for one and not for another.
    prompts = Prompts(preset, [pool[j] for j in chosen.tolist()], device)
    student, _, _ = load_student(settings.checkpoint, preset, recipe, device)

    # NFE = 2 − width / blocks, so the wanted NFE gives the width, as near as blocks allow. The last
    # block cannot be skipped.
    blocks = len(student.transformer_blocks)
    width = round((2 - settings.nfe) * blocks)
    width = min(max(1, width), blocks - 1)
    spans = [(n, n + width - 1) for n in range(blocks - width)]
    errors = measure(student, prompts, spans, settings, recipe["latent_shape"],
                     sigma_grid(recipe["steps"]))
    # Of equal errors the first one counts: an earlier span.
    best = spans[errors["span"].index(min(errors["span"]))]
    print_tables(errors, spans, best, blocks, settings.error)
    plot(errors, best, settings.out, settings.error)


if __name__ == "__main__":
    main()
