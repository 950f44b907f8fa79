"""The block cache and its learned compensation f (paper, cache figure): a second step for two
thirds of a step.

    python cache.py --checkpoint runs/tiny-stage1      # reuse error by block, and the span to cache

In the first step the residual of a span of blocks n..m is recorded, of the image and the text
stream:
    Δ0 = O_m,0 − I_n,0           output of block m minus input of block n, step 0
In a later step the span is skipped, and a small MLP f for each stream predicts its residual from
Δ0:
    O_m,1 = I_n,1 + f(Δ0)        f(x) = x + W2·GELU(W1·LayerNorm(x)), W2 and its bias start at 0
so f starts as plain reuse. f sees neither time nor text, and costs about a quarter of a block.

It sits on a stock SD3Transformer2DModel through hooks on that one object: no copied forward, no
patched class.

    cache = BlockCache(pipe.transformer, "2-5", f)   # then call pipe(...) as for the 2-step student
    cache.remove()                                   # and the model is as it was

Left alone, a call at timestep 1000 records and every other call reuses, which is what a stock
pipeline needs. Our loops say it: with cache.step("record" | "reuse" | "skip" | "full").
Dimension key: B batch, N image tokens, L text tokens, D width.
"""

import contextlib
import dataclasses
import re

import torch
from torch import nn

from run import UserError, command, option, parse_settings, rng

MODES = ("full", "record", "reuse", "skip")


def parse_span(text, blocks):
    """(n, m) of a span such as "2-5", both ends skipped; UserError unless 0 ≤ n ≤ m ≤ blocks − 2.

    The last block cannot be cached: it returns no text stream.
    """
    match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", str(text))
    if not match:
        raise UserError("a span of blocks is written first-last, for instance 2-5, without gaps, "
                        f"not {text}")
    first, last = map(int, match.groups())
    if first > last:
        raise UserError(f"span {text} is reversed; write {last}-{first}")
    if last > blocks - 2:
        raise UserError(f"span {text} is out of range: this model has blocks 0-{blocks - 1}, and "
                        f"the last one cannot be cached, so a span ends at {blocks - 2} at most")
    return first, last


def nfe(steps, span, blocks):
    """Network evaluations by blocks: the first step in full, each later one without the span
    (n, m). SD3-Medium (24 blocks), two steps: span 2-9 is 1.667, 2-7 is 1.75. f is not counted."""
    return steps - (steps - 1) * (span[1] - span[0] + 1) / blocks


class Compensation(nn.Module):
    """f of one stream: x + W2·GELU(W1·LayerNorm(x)) for x [B, N, D]; hidden width 2·D [official],
    W2 zero at the start."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        x = x.to(self.up.weight.dtype)  # f stays in fp32 although autocast recorded Δ0 in bf16
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def make_compensation(width):
    """f of both streams, as a module with .image and .text: SD3-Medium (D = 1536) 18.9 M
    parameters."""
    return nn.ModuleDict({"image": Compensation(width), "text": Compensation(width)})


class _Call:
    """One forward: its mode and residuals. It travels with that forward's own time embedding,
    because gradient checkpointing runs blocks again in backward, when the cache may be in another
    mode."""

    def __init__(self, mode, delta):
        self.mode, self.delta, self.inputs = mode, delta, None


class BlockCache:
    """The cache on one transformer. span is "n-m" or (n, m); compensation None is plain reuse
    of Δ0.

    All or nothing: a bad span raises UserError before any hook is set. remove() takes every hook
    away. A network that is to be sharded is sharded first.
    """

    def __init__(self, transformer, span, compensation=None):
        blocks = transformer.transformer_blocks
        text = span if isinstance(span, str) else f"{span[0]}-{span[1]}"
        self.first, self.last = parse_span(text, len(blocks))
        self.compensation, self.mode, self.delta, self.call = compensation, None, None, None
        # prepend: before fully_shard's own hooks, which hand the blocks copies of the tagged tensor
        before = dict(with_kwargs=True, prepend=True)
        self.hooks = [
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.time_text_embed.register_forward_hook(self._tag),
            blocks[self.first].register_forward_pre_hook(self._enter, **before),
            blocks[self.last + 1].register_forward_pre_hook(self._leave, **before),
            transformer.register_forward_hook(self._end)]

    def remove(self):
        """Takes the cache off; the model is bit for bit what it was."""
        for hook in self.hooks:
            hook.remove()
        self.delta = self.call = None

    @contextlib.contextmanager
    def step(self, mode):
        """Calls inside are "full", "record", "reuse" or "skip" (the span left out, nothing in
        its place)."""
        assert mode in MODES, mode
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    # ---- hooks, in the order in which a forward meets them

    def _begin(self, transformer, args, kwargs):
        mode = self.mode
        if mode is None:  # a stock pipeline says which step it is only by the timestep
            mode = "record" if float(kwargs["timestep"].flatten()[0]) >= 999.5 else "reuse"
        if mode == "reuse" and self.delta is None:
            raise RuntimeError("the block cache was asked to reuse before it recorded; "
                               "start at timestep 1000")
        self.call = _Call(mode, self.delta if mode == "reuse" else None)
        if mode in ("reuse", "skip"):
            kwargs = {**kwargs, "skip_layers": list(range(self.first, self.last + 1))}
        return args, kwargs

    def _tag(self, module, args, temb):
        temb.block_cache_call = self.call

    @torch.compiler.disable
    def _enter(self, block, args, kwargs):
        image, text, call = _streams(args, kwargs)
        if call.mode == "record":
            call.inputs = image, text                                     # B×N×D, B×L×D

    @torch.compiler.disable
    def _leave(self, block, args, kwargs):
        image, text, call = _streams(args, kwargs)
        if call.mode == "record":
            # Gradient never reaches the first step (official: it runs without).
            call.delta = (image - call.inputs[0]).detach(), (text - call.inputs[1]).detach()
            call.inputs = None
        if call.mode != "reuse":
            return None
        delta = call.delta
        if self.compensation is not None:
            delta = self.compensation["image"](delta[0]), self.compensation["text"](delta[1])
        image, text = image + delta[0].to(image.dtype), text + delta[1].to(text.dtype)
        if args:  # positional under gradient checkpointing
            return (image, text, *args[2:]), kwargs
        return args, {**kwargs, "hidden_states": image, "encoder_hidden_states": text}

    def _end(self, transformer, args, output):
        if self.call.mode == "record":
            self.delta = self.call.delta
        self.call = None


def _streams(args, kwargs):
    """(image [B, N, D], text [B, L, D], call) of a block's arguments, positional or by keyword."""
    if args:
        return args[0], args[1], args[2].block_cache_call
    return kwargs["hidden_states"], kwargs["encoder_hidden_states"], kwargs["temb"].block_cache_call


# ----------------------------------------------------------------------------- span finder

@dataclasses.dataclass
class Settings:
    checkpoint: str = option(None, "run folder whose student is measured")
    nfe: float = option(1.67, "wanted network evaluations of two steps", low=1, high=2)
    samples: int = option(64, "roll-outs to measure on", low=1, high=100_000)
    batch_size: int = option(16, "roll-outs at a time", low=1)
    seed: int = option(7, "seed of their noises and prompts", low=0, high=2**31 - 1)
    out: str = option("reuse_error.png", "the plot, if matplotlib is installed")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


def reuse_errors(student, x0, x1, prompt, sigmas):
    """{"image": [blocks], "text": [blocks - 1]}: mean squared change of each block's own residual
    from step one (x0 at sigmas[0]) to step two (x1 at sigmas[1]). The paper plots a "reuse error"
    for each block but does not define it: this definition is ours."""
    from model import velocity
    first, errors = [], {"image": [], "text": []}

    def compare(block, args, kwargs, output):
        text, image = output                              # the last block returns no text
        residuals = [image - kwargs["hidden_states"]]
        if text is not None:
            residuals.append(text - kwargs["encoder_hidden_states"])
        if len(first) < len(hooks):
            first.append(residuals)
            return
        index = len(errors["image"])
        for stream, a, b in zip(errors, first[index], residuals, strict=False):
            errors[stream].append((b.float() - a.float()).square().mean().item())

    hooks = [block.register_forward_hook(compare, with_kwargs=True)
             for block in student.transformer_blocks]
    for x, sigma in ((x0, sigmas[0]), (x1, sigmas[1])):
        velocity(student, x, float(sigma), prompt)
    for hook in hooks:
        hook.remove()
    return errors


def span_error(student, span, x0, x1, prompt, sigmas):
    """Relative error of the second step's velocity when the span's Δ0 is reused as it is."""
    from model import velocity
    full = velocity(student, x1, float(sigmas[1]), prompt)
    cache = BlockCache(student, span)
    with cache.step("record"):
        velocity(student, x0, float(sigmas[0]), prompt)
    with cache.step("reuse"):
        reused = velocity(student, x1, float(sigmas[1]), prompt)
    cache.remove()
    return ((reused - full).norm() / full.norm()).item()


@command
def main(argv):
    settings = parse_settings(Settings, argv, "cache.py", __doc__.split("\n\n")[0])
    from model import PromptBook, default_prompts, find_preset, pick_device
    from sampler import image_noise, load_student, read_recipe, roll_out, sigma_grid
    if not settings.checkpoint:
        raise UserError("--checkpoint RUN is needed, for instance runs/tiny-stage1")
    recipe = read_recipe(settings.checkpoint)
    if recipe["steps"] < 2:
        raise UserError(f"{settings.checkpoint} has one step: there is nothing to reuse")
    preset, device = find_preset(recipe["base"]), pick_device(settings.device)
    student, _ = load_student(settings.checkpoint, preset, recipe, device)
    blocks = len(student.transformer_blocks)
    width = min(max(1, round((2 - settings.nfe) * blocks)), blocks - 1)
    prompts, sigmas = default_prompts(preset), sigma_grid(recipe["steps"])
    texts = [prompts[j] for j in torch.randint(len(prompts), (settings.samples,),
                                               generator=rng(settings.seed, "prompts"))]
    book, total = PromptBook(preset, device, lambda i: [], 0, keep=texts), {}
    with torch.no_grad():
        for part in torch.arange(settings.samples).split(settings.batch_size):
            x0 = image_noise(settings.seed, part, recipe["latent_shape"]).to(device)
            prompt = book.of([texts[j] for j in part])
            x1 = roll_out(student, x0, prompt, sigmas)[0][1]
            found = reuse_errors(student, x0, x1, prompt, sigmas)
            found["span"] = [span_error(student, (n, n + width - 1), x0, x1, prompt, sigmas)
                             for n in range(blocks - width)]
            for key, values in found.items():                             # mean over the samples
                share = torch.tensor(values) * len(part) / settings.samples
                total[key] = total.get(key, 0) + share
    errors = {stream: total[stream].tolist() for stream in ("image", "text")}
    spans = {(n, n + width - 1): error for n, error in enumerate(total["span"].tolist())}
    print("block   image error   text error    (mean squared change of the block's residual)")
    for i, image in enumerate(errors["image"]):
        print(f"{i:5}{image:14.4f}" + (f"{errors['text'][i]:13.4f}" if i < blocks - 1 else ""))
    best = min(spans, key=spans.get)
    print(f"\nspans of {width} blocks, {nfe(2, best, blocks):.3f} NFE, relative error of the "
          "second step when Δ0 is reused as it is")
    for span, error in spans.items():
        print(f"{span[0]:5}-{span[1]:<4}{error:8.4f}{'  <- proposed' if span == best else ''}")
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for stream, values in errors.items():
        axes.semilogy(values, "o-", label=f"{stream} stream")
    axes.axvspan(best[0] - 0.5, best[1] + 0.5, alpha=0.15,
                 label=f"proposed span {best[0]}-{best[1]}")
    axes.set(xlabel="block", ylabel="reuse error")
    axes.legend()
    figure.tight_layout()
    figure.savefig(settings.out, dpi=120)
    print(f"{settings.out}")


if __name__ == "__main__":
    main()
