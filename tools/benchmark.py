"""What the network evaluations are worth in seconds: 28×2 against two and 1.67 steps.

    python -m tools.benchmark
    python -m tools.benchmark --model models/random-sd3-medium     # of tools/random_model.py

First the evaluations of the model's span, counted; then the seconds of the transformer alone, and
those of whole pictures in the stock pipeline. The paths are timed alternately, and medians count.
All is in bf16 on a GPU, else in fp32. What f costs: 1.67 steps against the count by blocks, which
leaves f out, times one forward.

Dimension key: C latent channels, H W latent size; one picture at a time.
"""

import dataclasses
import statistics
import time

from run import command, option, parse_settings, versions

import torch

from cache import BlockCache, make_compensation
from evaluate import count_nfe
from model import (check_base, default_prompts, download, find_preset, frozen_dtype, load_pipeline,
                   load_transformer, parse_span, pick_device, place, velocity)
from sampler import TEACHER_STEPS, roll_out, sigma_grid


@dataclasses.dataclass
class Settings:
    model: str = option("tiny", "base model: a preset, a pipeline folder or a hub id")
    cached_blocks: str = option(None, "span of skipped blocks, first-last (default: the model's)")
    rounds: int = option(20, "alternated rounds, of which the median counts", low=1, high=10_000)
    compile: bool = option(False, "compile the blocks of the transformer alone")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))


def alternate(paths, rounds, device):
    """Median seconds of each of `paths`, {name: callable}, called in turn `rounds` times after one
    call to warm up: on a shared machine only times of one run, taken alternately, compare."""
    times = {name: [] for name in paths}
    for turn in range(rounds + 1):
        for name, path in paths.items():
            start = time.perf_counter()
            path()
            # A GPU works on while Python goes on; without this the clock would stop too early.
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:                                      # turn 0 warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def show(what, times):
    """Prints seconds, and how many times as long the teacher takes."""
    print(f"{what:27}  seconds   28×2 over it")
    for name, seconds in times.items():
        print(f"{name:27}{seconds:9.4f}{times['28×2'] / seconds:14.1f}×")


@torch.inference_mode()
def time_transformer(net, x, prompt, span, f, rounds):
    """Median seconds of the transformer alone at latents x [1, C, H, W]."""
    # A guided step is two evaluations. As one batch of two it may cost less than two calls.
    x_twice = torch.cat([x, x])                                           # 2×C×H×W
    prompt_twice = [torch.cat([part, part]) for part in prompt]           # embeds, pooled
    sigmas = sigma_grid(2)                                                # 1, 0.75, 0
    times = alternate({"28×2": lambda: velocity(net, x_twice, 0.75, prompt_twice),
                       "two steps": lambda: roll_out(net, x, prompt, sigmas),
                       "1.67 steps": lambda: roll_out(net, x, prompt, sigmas, span, f),
                       "one forward": lambda: velocity(net, x, 0.75, prompt)}, rounds, x.device)
    times["28×2"] *= TEACHER_STEPS                        # one was timed: they are alike
    return times


@torch.inference_mode()
def time_pipeline(pipe, preset, span, f, rounds):
    """Median seconds of a picture in the stock pipeline, text encoders and VAE included."""
    call = {"prompt": default_prompts(preset)[0], "max_sequence_length": preset.text_length}
    student = {**call, "sigmas": [1.0, 0.5], "num_inference_steps": 2, "guidance_scale": 1.0}

    def teacher():
        # Any scale above 1 costs the same: two evaluations a step.
        pipe(**call, num_inference_steps=TEACHER_STEPS, guidance_scale=7.0)

    def cached():
        cache = BlockCache(pipe.transformer, span, f)
        pipe(**student)
        cache.remove()

    paths = {"28×2": teacher, "two steps": lambda: pipe(**student), "1.67 steps": cached}
    return alternate(paths, min(rounds, 5), pipe.transformer.device)


# ================================================================== command

@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.benchmark", __doc__.split("\n\n")[0])
    preset = find_preset(settings.model)
    device = pick_device(preset, settings.device)
    config, _ = check_base(preset, offline=True)          # the count needs no download
    span = parse_span(settings.cached_blocks or preset.cached_blocks, config["num_layers"])
    shape = config["in_channels"], config["sample_size"], config["sample_size"]
    ideal, flops = count_nfe(preset, span, 2, shape, with_f=False)
    _, flops_with_f = count_nfe(preset, span, 2, shape, with_f=True)
    print(f"network evaluations of {preset.name}, span {span[0]}-{span[1]}: {ideal:.3f} by blocks, "
          f"{flops:.3f} by FLOPs, {flops_with_f:.3f} with f")

    preset = download(preset)
    net = place(load_transformer(preset, frozen_dtype(device)), device, settings.compile)
    dtype = net.dtype
    f = make_compensation(net.inner_dim).to(device, dtype)            # untrained: as slow
    # Nobody looks at these pictures, so the prompt is noise: no text encoder is needed.
    x = torch.randn(1, *shape, device=device)
    embeds = torch.randn(1, preset.tokens, config["joint_attention_dim"], device=device)
    pooled = torch.randn(1, config["pooled_projection_dim"], device=device)
    print(f"{dtype}, {device}, latents {shape[1]}×{shape[2]}, {preset.tokens} text tokens, "
          f"medians of {settings.rounds} alternated rounds, {versions()}")
    times = time_transformer(net, x, (embeds, pooled), span, f, settings.rounds)
    show("transformer alone", times)
    print(f"1.67 steps over {ideal:.3f} × one forward: "
          f"{times['1.67 steps'] / ideal / times['one forward']:.4f}")

    del net                                               # a stock pipeline takes a stock network
    pipe = load_pipeline(preset, dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    show("stock pipeline", time_pipeline(pipe, preset, span, f, settings.rounds))


if __name__ == "__main__":
    main()
