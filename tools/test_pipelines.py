"""Other people's pipelines, several processes, kills: what the loops meet outside of themselves.

    python -m pytest -q tools/test_pipelines.py

Names are sentences; a docstring says which mistake is caught. A command here is a fork of this
process, where the libraries are loaded already: it is killed, interrupted and joined with others as
one that was typed, and starts at once. What a fork changes of the code dies with it.
"""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import run  # first, as in every script: it silences what the others import
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from tqdm import tqdm

import model
import sampler
import train_stage1
import train_stage2
from cache import BlockCache, make_compensation
from test_all import SHAPE, ask, metrics, stock_latents
from tiny.world import CAPTIONS

HERE = Path(__file__).resolve().parent.parent
forks = pytest.mark.skipif(sys.platform != "linux", reason="torch can be forked on Linux alone")


# ================================================================== in a stock pipeline

def few_steps(*sigmas):
    """Arguments of a stock call without guidance. It shifts them: 1, 0.75, 0.5 to 1, 0.9, 0.75."""
    return dict(sigmas=list(sigmas), num_inference_steps=len(sigmas), guidance_scale=1.0)


@pytest.fixture
def cache(stock_pipe):
    """A BlockCache with an f that is not plain reuse, on the stock pipeline for one test."""
    net = stock_pipe.transformer
    f = make_compensation(net.inner_dim)
    for stream in f.values():
        torch.nn.init.normal_(stream.down.weight, std=0.01, generator=run.rng(0, "f"))
    yield BlockCache(net, (1, 4), f)
    net.__dict__.pop("forward", None)


def call(net, prompt, timestep, size=8, **others):
    """A call of a transformer as the pipeline makes it."""
    with torch.no_grad():
        return net(hidden_states=torch.ones(1, 4, size, size), encoder_hidden_states=prompt[0],
                   pooled_projections=prompt[1], timestep=torch.tensor([float(timestep)]),
                   return_dict=False, **others)[0]


def test_three_lines_around_a_stock_pipeline_take_our_cached_path(stock_pipe, teacher, cache,
                                                                  prompts):
    """And after remove() the pipeline is the stock one again, bit for bit. Catches an adapter that
    leaves f out, or stays."""
    noise = sampler.image_noise(0, range(2), SHAPE)
    theirs = stock_latents(stock_pipe, CAPTIONS[:2], noise, **few_steps(1, 0.5))
    with torch.no_grad():
        path = prompts.take([0, 1]), sampler.sigma_grid(2), (1, 4)
        ours = sampler.roll_out(teacher, noise, *path, cache.f)[0][-1]
        reuse = sampler.roll_out(teacher, noise, *path)[0][-1]
    assert torch.allclose(theirs, ours, atol=1e-4) and not torch.allclose(ours, reuse, atol=1e-2)
    cache.remove()
    cache.remove()                                        # the second time does nothing
    assert "forward" not in stock_pipe.transformer.__dict__ and cache.delta is None
    prompt = prompts.take([0])
    stock = ask(stock_pipe.transformer, torch.ones(1, *SHAPE), 0.75, prompt)
    assert torch.equal(call(stock_pipe.transformer, prompt, 750), stock)


def test_pictures_of_a_guided_batch_are_those_of_single_calls(stock_pipe, cache):
    """Guidance brings both halves in one call. Catches residuals that are mixed up in a batch, and
    a second picture that is made from the first one's."""
    noise, guided = sampler.image_noise(0, range(2), SHAPE), {**few_steps(1, 0.5),
                                                              "guidance_scale": 4.0}
    both = stock_latents(stock_pipe, CAPTIONS[:2], noise, **guided)
    for i in range(2):
        one = stock_latents(stock_pipe, CAPTIONS[i], noise[i:i + 1], **guided)
        assert torch.allclose(both[i:i + 1], one, atol=1e-3)


@pytest.mark.parametrize("captions", [[0, 1, 2], [6, 7, 8], [7]])
def test_a_path_that_was_cut_short_leaves_nothing_to_the_next_call(stock_pipe, cache, captions):
    """After a single step of three prompts comes a call that begins at 0.9, as if that path went
    on. Catches Δ0 told apart by time and size alone: pictures of other prompts, or a crash."""
    texts, noise = [CAPTIONS[c] for c in captions], sampler.image_noise(0, captions, SHAPE)
    fresh = stock_latents(stock_pipe, texts, noise, **few_steps(0.75, 0.5))
    stock_latents(stock_pipe, CAPTIONS[:3], sampler.image_noise(0, range(3), SHAPE), **few_steps(1))
    path = stock_latents(stock_pipe, texts, noise, **few_steps(0.75, 0.5))
    assert torch.equal(path, fresh)


@pytest.mark.parametrize("rule, first, later", [
    ("prompt", [(0, 1000, 8)], (1, 750, 8)), ("shape", [(0, 1000, 8)], (0, 750, 4)),
    ("timestep", [(0, 750, 8)], (0, 1000, 8)), ("timestep", [(0, 750, 8)], (0, 750, 8)),
    ("steps", [(0, 1000, 8), (0, 750, 8)], (0, 400, 8))])
def test_a_call_that_belongs_to_no_path_runs_in_full(stock_pipe, cache, prompts, rule, first,
                                                     later):
    """Calls (prompt, timestep, size). Each case fails without the one rule that it is named for;
    "steps": image-to-image begins at a small timestep, with the embeddings of the call before."""
    net, taken = stock_pipe.transformer, [prompts.take([0]), prompts.take([1])]
    for i, timestep, size in first:
        before = call(net, taken[i], timestep, size)
    i, timestep, size = later
    found = call(net, taken[i], timestep, size)
    assert torch.equal(found, ask(net, torch.ones(1, 4, size, size), timestep / 1000, taken[i]))
    if rule == "steps":
        assert not torch.equal(before, ask(net, torch.ones(1, *SHAPE), 0.75, taken[0]))


@pytest.mark.parametrize("name, value", [
    ("skip_layers", [2]), ("block_controlnet_hidden_states", [torch.zeros(1)]),
    ("joint_attention_kwargs", {"scale": 0.5})])
def test_an_argument_that_acts_inside_the_span_is_refused(stock_pipe, cache, prompts, name, value):
    """Catches guidance by skipped layers, a ControlNet or an adapter's scale that is lost."""
    with pytest.raises(ValueError, match=f"^{name} does not go together.*[^\n]$"):
        call(stock_pipe.transformer, prompts.take([0]), 750, **{name: value})
    assert cache.delta is None
    call(stock_pipe.transformer, prompts.take([0]), 750, joint_attention_kwargs={})


def test_offloading_goes_on_after_the_cache_and_off_before_it(stock_pipe, cache, prompts):
    """accelerate puts a forward of its own on a network. Catches a cache that takes its place, is
    never reached, or is taken off while it is still called."""
    hooks = pytest.importorskip("accelerate.hooks")
    net, prompt, seen = stock_pipe.transformer, prompts.take([0]), []

    class Count(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs
    cached = [call(net, prompt, 1000), call(net, prompt, 750)]
    hooks.add_hook_to_module(net, Count())
    hooked = [call(net, prompt, 1000), call(net, prompt, 750)]
    assert all(map(torch.equal, cached, hooked)) and len(seen) == 2
    with pytest.raises(ValueError, match="remove the pipeline's offloading before the cache"):
        cache.remove()
    hooks.remove_hook_from_module(net)
    cache.remove()
    assert not torch.equal(call(net, prompt, 750), cached[1])
    hooks.add_hook_to_module(net, Count())
    with pytest.raises(ValueError, match="make the cache before the pipeline is offloaded"):
        BlockCache(net, (1, 4))
    hooks.remove_hook_from_module(net)


def test_a_second_cache_and_a_network_that_is_no_transformer_are_refused(stock_pipe, cache):
    """Catches two caches whose removal leaves one behind, and one around a compiled network."""
    with pytest.raises(ValueError, match="remove.. the other cache first"):
        BlockCache(stock_pipe.transformer, (2, 3))
    assert stock_pipe.transformer.__dict__["forward"] is cache
    with pytest.raises(ValueError, match="not OptimizedModule"):
        BlockCache(torch.compile(stock_pipe.transformer), (2, 3))


# ================================================================== commands in forks

COMMON = ["--batch-size", "4", "--log-every", "1", "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(script, out, *words) begins a command, and is its process; exit code -9: killed."""
    # The tiny model with a transformer so small that an iteration is a matter of milliseconds.
    small = tmp_path_factory.mktemp("base")
    for part in model.PRESETS["tiny"].source, :
        shutil.copytree(part, small, dirs_exist_ok=True)
    config = SD3Transformer2DModel.load_config(small, subfolder="transformer")
    torch.manual_seed(0)
    SD3Transformer2DModel.from_config(
        config, num_layers=3, num_attention_heads=2, attention_head_dim=16,
        caption_projection_dim=32).save_pretrained(small / "transformer")
    tiny = model.dataclasses.replace(model.PRESETS["tiny"], source=str(small), cached_blocks="0-1")

    def start(script, out, *words, before=None, **environment):
        if script is train_stage2:
            words = ["--references", "8", "--warmup", "1", *words]
        words = [*COMMON, *map(str, words), "--out", str(out)]

        def child():
            tqdm.set_lock(threading.RLock())              # not one that a killed fork may hold
            torch.set_num_threads(1)                      # the pool's threads are not forked
            os.environ.update(environment)
            sys.stdout = sys.stderr = open(f"{out}.log", "a", buffering=1)
            model.PRESETS["tiny"] = tiny
            train_stage2.D_ONLY = 0                       # turns: G (f alone), D, D, G, D, D
            sampler.Gallery.save = lambda *a: None
            if before:
                before()
            script.main(words)
        process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
        process.start()
        return process
    return start
