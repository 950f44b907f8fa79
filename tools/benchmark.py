"""What the network evaluations are worth in seconds: 28×2 against two and 1.67 steps.

    python -m tools.benchmark
    python -m tools.benchmark --model models/random-sd3-medium --resolution 256
    python -m tools.benchmark --compile        # with torch.compile of every block

First the transformer alone, as forwards of 28×2, two and 1.67 steps against one full forward, then
whole images of the stock pipeline. The paths of a part are timed alternately, and medians count.
The transformer runs in bf16 (tiny: fp32), and so does f. The ideal is the count by blocks, without
f: the ratio to it is what f costs. tools/random_model.py writes the folder of the second command.
"""

import dataclasses
import statistics
import time

from tools.settings import UserError, command, option, parse_settings
from run import versions

import torch

from cache import BlockCache, make_compensation, nfe
from model import (default_prompts, find_preset, load_pipeline, load_transformer,
                   parse_span, pick_device, vae_factor, velocity)
from sampler import TEACHER_STEPS, roll_out, sigma_grid, stock_sigmas
from train_stage1 import SD3, TINY


@dataclasses.dataclass
class Settings:
    model: str = option("tiny", "base model: a preset, a pipeline folder or a hub id")
    cached_blocks: str = option(None, "span of skipped blocks, first-last (default: the model's)")
    rounds: int = option(20, "alternated rounds, of which the median counts", low=1)
    resolution: int = option(None, "pixels of a side (default: the model's own)", low=16, high=4096)
    compile: bool = option(False, "torch.compile the blocks (needs a C++ compiler on a CPU)")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


# ================================================================== timing

def compile_blocks(net):
    """torch.compile of every block's forward, two graphs in all: the last block returns no text.
    The loop over the blocks stays Python, so that a span can be skipped."""
    for block in net.transformer_blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def alternate(paths, rounds, device):
    """Median seconds of each of `paths`, {name: callable}, called in turn `rounds` times after one
    call to warm up: on a shared machine only times of one run, taken alternately, compare."""
    times = {name: [] for name in paths}
    for turn in range(rounds + 1):
        for name, path in paths.items():
            start = time.perf_counter()
            path()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:                                      # turn 0 warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# ================================================================== the transformer alone

def time_transformer(net, x, prompt, span, f, rounds):
    """Seconds of one forward, of a guided one as a batch of two and as two of one, of two steps
    and of 1.67, for latents x [1, C, H, W]."""
    embeds, pooled = prompt
    x_twice = torch.cat([x, x])
    prompt_twice = torch.cat([embeds, embeds]), torch.cat([pooled, pooled])
    sigmas = sigma_grid(2)

    def one():
        velocity(net, x, 0.75, prompt)

    def guided():
        velocity(net, x_twice, 0.75, prompt_twice)

    def apart():
        velocity(net, x, 0.75, prompt)
        velocity(net, x, 0.75, prompt)

    def two_steps():
        roll_out(net, x, prompt, sigmas)

    def cached_steps():
        roll_out(net, x, prompt, sigmas, span, f)

    paths = {"one": one, "guided": guided, "apart": apart, "2": two_steps, "1.67": cached_steps}
    with torch.inference_mode():
        return alternate(paths, rounds, x.device)


def print_transformer(t, ideal):
    """The table of time_transformer's seconds t; ideal: network evaluations of the cached path."""
    rows = {"one full forward": t["one"],
            "28×2 (28 × a batch of two)": TEACHER_STEPS * t["guided"],
            "28×2 (56 × a batch of one)": TEACHER_STEPS * t["apart"],
            "two steps": t["2"],
            f"{ideal:.3f} steps, f": t["1.67"]}
    print("transformer alone           seconds   in full forwards   over 1.67 steps")
    for name, seconds in rows.items():
        print(f"{name:27}{seconds:9.4f}{seconds / t['one']:17.3f}{seconds / t['1.67']:17.2f}×")
    print(f"{ideal:.3f} steps against the ideal {ideal:.3f} × one full forward: "
          f"{t['1.67'] / ideal / t['one']:.4f}")


# ================================================================== whole images

def time_pipeline(pipe, preset, pixels, span, f, rounds):
    """Seconds of whole images by the stock pipeline: the guided teacher's 28 steps, the student's
    two, and those with the cache of cache.BlockCache."""
    guidance = (TINY if preset.captions == "tiny" else SD3)["guidance"]
    call = dict(prompt=default_prompts(preset)[0], max_sequence_length=preset.text_length,
                height=pixels, width=pixels)
    student = dict(call, sigmas=stock_sigmas(2), num_inference_steps=2, guidance_scale=1.0)

    def teacher():
        pipe(**call, guidance_scale=guidance)

    def two_steps():
        pipe(**student)

    def cached_steps():
        cache = BlockCache(pipe.transformer, span, f)
        pipe(**student)
        cache.remove()

    return alternate({"28×2": teacher, "2": two_steps, "1.67": cached_steps}, min(rounds, 5),
                     pipe.transformer.device)


# ================================================================== command

@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.benchmark", __doc__.split("\n\n")[0])
    preset = find_preset(settings.model)
    device = pick_device(preset, settings.device)
    dtype = torch.float32 if preset.captions == "tiny" else torch.bfloat16
    net = load_transformer(preset, dtype).to(device)
    config = net.config
    span = parse_span(settings.cached_blocks or preset.cached_blocks, config.num_layers)
    torch.manual_seed(0)
    f = make_compensation(net.inner_dim).to(device, dtype)
    factor = vae_factor(preset)
    if settings.resolution and settings.resolution % (factor * config.patch_size):
        raise UserError(f"--resolution {settings.resolution} is not a multiple of "
                        f"{factor * config.patch_size}")
    side = settings.resolution // factor if settings.resolution else config.sample_size
    x = torch.randn(1, config.in_channels, side, side, device=device)
    embeds = torch.randn(1, preset.tokens, config.joint_attention_dim, device=device, dtype=dtype)
    pooled = torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype)
    if settings.compile:
        compile_blocks(net)
    print(f"{preset.name}, {dtype}, {device}{', compiled blocks' if settings.compile else ''}, "
          f"latents {side}×{side}, {preset.tokens} text tokens, "
          f"medians of {settings.rounds} alternated rounds, {versions()}")
    t = time_transformer(net, x, (embeds, pooled), span, f, settings.rounds)
    print_transformer(t, nfe(2, span, config.num_layers))

    # A stock pipeline calls a stock transformer, so the whole images take theirs.
    del net
    pipe = load_pipeline(preset, dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    if settings.compile:
        compile_blocks(pipe.transformer)
    t = time_pipeline(pipe, preset, side * factor, span, f, settings.rounds)
    seconds = ", ".join(f"{name} {value:.4f} s" for name, value in t.items())
    print(f"whole image, text and VAE too: {seconds}; 28×2 over 1.67: {t['28×2'] / t['1.67']:.1f}×")


if __name__ == "__main__":
    main()
