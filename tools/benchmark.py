"""What the network evaluations are worth in seconds: 28×2 against two and 1.67 steps.

    python benchmark.py                        # the same as python evaluate.py --benchmark
    python benchmark.py --model sd3-medium --random-weights --resolution 256
    python benchmark.py --compile              # with torch.compile of every block

First the transformer alone, as forwards of 28×2, two and 1.67 steps against one full forward, then
whole images of the stock pipeline. The paths of a run are timed alternately, and medians count. The
transformer runs in bf16 (tiny: fp32), and so does f. The ideal is the count by blocks, without f:
the ratio to it is what hooks and f cost.
"""

import dataclasses
import statistics
import time

import torch

from cache import BlockCache, make_compensation, nfe, parse_span
from model import (default_prompts, find_preset, load_pipeline, load_transformer, pick_device,
                   velocity)
from run import command, option, parse_settings, versions
from sampler import TEACHER_STEPS, roll_out, sigma_grid, stock_sigmas


@dataclasses.dataclass
class Settings:
    model: str = option("tiny", "base model")
    rounds: int = option(20, "alternated rounds, of which the median counts", low=1)
    random_weights: bool = option(False, "the true shape without its weights")
    resolution: int = option(None, "pixels of a side (default: the model's own)", low=16, high=4096)
    compile: bool = option(False, "torch.compile the blocks (needs a C++ compiler on a CPU)")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


def compile_blocks(net):
    """torch.compile of every block's forward, two graphs in all: the last block returns no text.

    Not of the block as a module: that would compile its hooks with it, and hooks that are set
    later, as the cache's are, would not be seen.
    """
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
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@command
def main(argv):
    settings = parse_settings(Settings, argv, "benchmark.py", __doc__.split("\n\n")[0])
    preset, device = find_preset(settings.model), pick_device(settings.device)
    dtype = torch.float32 if preset.captions == "tiny" else torch.bfloat16
    net = load_transformer(preset, dtype, settings.random_weights).to(device)
    c, span = net.config, parse_span(preset.cached_blocks, net.config.num_layers)
    torch.manual_seed(0)
    f = make_compensation(net.inner_dim).to(device, dtype)
    side = settings.resolution // 8 if settings.resolution else c.sample_size
    x = torch.randn(1, c.in_channels, side, side, device=device)
    prompt = (torch.randn(1, preset.tokens, c.joint_attention_dim, device=device, dtype=dtype),
              torch.randn(1, c.pooled_projection_dim, device=device, dtype=dtype))
    two = [torch.cat([part, part]) for part in (x, *prompt)]
    sigmas, ideal = sigma_grid(2), nfe(2, span, c.num_layers)
    if settings.compile:
        compile_blocks(net)

    def cached(call):
        """call(cache), with the cache set and taken off again as in use."""
        def timed():
            cache = BlockCache(net, span, f)
            call(cache)
            cache.remove()
        return timed

    with torch.inference_mode():
        t = alternate({"one": lambda: velocity(net, x, 0.75, prompt),
                       "guided": lambda: velocity(net, two[0], 0.75, two[1:]),
                       "apart": lambda: [velocity(net, x, 0.75, prompt) for _ in range(2)],
                       "2": lambda: roll_out(net, x, prompt, sigmas),
                       "1.67": cached(lambda cache: roll_out(net, x, prompt, sigmas, cache))},
                      settings.rounds, device)
    print(f"{preset.name}, {dtype}, {device}{', compiled blocks' if settings.compile else ''}, "
          f"latents {side}×{side}, {preset.tokens} text tokens, "
          f"medians of {settings.rounds} alternated rounds, {versions()}")
    teacher = {"28×2 (28 × a batch of two)": TEACHER_STEPS * t["guided"],
               "28×2 (56 × a batch of one)": TEACHER_STEPS * t["apart"]}
    print("transformer alone           seconds   in full forwards   over 1.67 steps")
    for name, seconds in {"one full forward": t["one"], **teacher, "two steps": t["2"],
                          f"{ideal:.3f} steps, f": t["1.67"]}.items():
        print(f"{name:27}{seconds:9.4f}{seconds / t['one']:17.3f}{seconds / t['1.67']:17.2f}×")
    print(f"{ideal:.3f} steps against the ideal {ideal:.3f} × one full forward: "
          f"{t['1.67'] / ideal / t['one']:.4f}")
    if settings.random_weights:
        return
    pipe = load_pipeline(preset, dtype, transformer=net).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt=default_prompts(preset)[0], max_sequence_length=preset.text_length,
                height=side * pipe.vae_scale_factor, width=side * pipe.vae_scale_factor)
    student = dict(call, sigmas=stock_sigmas(2), num_inference_steps=2, guidance_scale=1.0)
    t = alternate({"28×2": lambda: pipe(**call, guidance_scale=preset.guidance),
                   "2": lambda: pipe(**student), "1.67": cached(lambda cache: pipe(**student))},
                  min(settings.rounds, 5), device)
    print("whole image, text and VAE too: " + ", ".join(
        f"{name} {seconds:.4f} s" for name, seconds in t.items())
        + f"; 28×2 over 1.67: {t['28×2'] / t['1.67']:.1f}×")


if __name__ == "__main__":
    main()
