"""The cache in a stock pipeline of diffusers: cache.BlockCache, three lines around somebody else's
code. What the cache computes is tested in test_all.py; here is what a pipeline does with it.

    python -m pytest -q tools/test_stock_pipeline.py
"""

import pytest

import run  # noqa: F401  first, as in every script: it silences what the others import
import torch

import sampler
from cache import BlockCache
from test_all import SHAPE, ask, inputs, stock_latents, trained_compensation
from tiny.world import CAPTIONS


def few_steps(*sigmas):
    """Arguments of a stock call without guidance. It shifts them: 1, 0.75, 0.5 to 1, 0.9, 0.75."""
    return dict(sigmas=list(sigmas), num_inference_steps=len(sigmas), guidance_scale=1.0)


@pytest.fixture
def adapter(stock_pipe):
    """A BlockCache on the stock pipeline, taken off after the test."""
    net = stock_pipe.transformer
    adapter = BlockCache(net, (1, 4), trained_compensation(net))
    yield adapter
    if "forward" in net.__dict__:
        adapter.remove()


def test_three_lines_around_a_stock_pipeline_take_our_cached_path(stock_pipe, teacher, adapter,
                                                                  prompts):
    """And after remove() the pipeline is the stock one again, bit for bit."""
    noise = sampler.image_noise(0, range(2), SHAPE)
    theirs = stock_latents(stock_pipe, CAPTIONS[:2], noise, **few_steps(1, 0.5))
    with torch.no_grad():
        path = prompts.take([0, 1]), sampler.sigma_grid(2)
        ours = sampler.roll_out(teacher, noise, *path, (1, 4), adapter.f)[0][-1]
        full = sampler.roll_out(teacher, noise, *path)[0][-1]
    assert torch.allclose(theirs, ours, atol=1e-4) and not torch.allclose(ours, full, atol=1e-2)
    adapter.remove()
    assert "forward" not in stock_pipe.transformer.__dict__
    removed = stock_latents(stock_pipe, CAPTIONS[:2], noise, **few_steps(1, 0.5))
    assert torch.allclose(removed, full, atol=1e-4) and not torch.equal(removed, theirs)
    x, prompt = inputs(teacher)
    with torch.no_grad():
        found = [ask(net, x, 0.75, prompt) for net in (stock_pipe.transformer, teacher)]
    assert torch.equal(*found)


@pytest.mark.parametrize("captions", [[7], [6, 7, 8], [0], [0, 1, 2]])
def test_a_new_call_never_reuses_the_residual_of_the_one_before(stock_pipe, adapter, captions):
    """After a step at σ = 1 of three prompts comes a call that begins at 0.9, as if that path went
    on: of another number of prompts, of as many others, of the same. Catches Δ0 told apart by time
    and size alone: the pictures would be of other prompts, or the call would crash."""
    stock_latents(stock_pipe, CAPTIONS[:3], sampler.image_noise(0, range(3), SHAPE), **few_steps(1))
    texts, noise = [CAPTIONS[c] for c in captions], sampler.image_noise(0, captions, SHAPE)
    start = stock_latents(stock_pipe, texts, noise, **few_steps(0.75))
    adapter.forget()
    stock_latents(stock_pipe, CAPTIONS[:3], sampler.image_noise(0, range(3), SHAPE), **few_steps(1))
    path = stock_latents(stock_pipe, texts, noise, **few_steps(0.75, 0.5))
    adapter.forget()
    fresh = stock_latents(stock_pipe, texts, noise, **few_steps(0.75, 0.5))
    adapter.remove()
    assert torch.equal(start, stock_latents(stock_pipe, texts, noise, **few_steps(0.75)))
    assert torch.equal(path, fresh)


def test_guidance_goes_together_with_the_adapter(stock_pipe, adapter):
    """Both halves of a guided batch have their own residual. Catches a cache for one call only."""
    noise = sampler.image_noise(0, range(2), SHAPE)
    guided = {**few_steps(1, 0.5), "guidance_scale": 4.0}
    both = stock_latents(stock_pipe, CAPTIONS[:2], noise, **guided)
    one = stock_latents(stock_pipe, CAPTIONS[:1], noise[:1], **guided)
    assert torch.allclose(both[:1], one, atol=1e-3)


@pytest.mark.parametrize("name, value", [("skip_layers", [2]),
                                         ("block_controlnet_hidden_states", [torch.zeros(1)])])
def test_what_would_act_inside_a_skipped_block_is_refused_in_one_line(stock_pipe, adapter, name,
                                                                      value):
    """Catches guidance by skipped layers or a ControlNet that is lost without a word."""
    x, prompt = inputs(stock_pipe.transformer)
    with pytest.raises(ValueError) as refusal:
        stock_pipe.transformer(
            hidden_states=x, encoder_hidden_states=prompt[0], pooled_projections=prompt[1],
            timestep=torch.tensor([750.0, 750.0]), **{name: value})
    assert name in str(refusal.value) and "\n" not in str(refusal.value)
    assert adapter.delta is None


def test_a_path_ends_after_its_steps(stock_pipe, adapter):
    """Image-to-image begins at a smaller sigma. With the embeddings of the call before, handed in
    again, nothing but the number of steps tells it from a third step."""
    net = stock_pipe.transformer
    x, (embeds, pooled) = inputs(net)

    def call(timestep):
        return net(hidden_states=x, encoder_hidden_states=embeds, pooled_projections=pooled,
                   timestep=torch.full((2,), timestep), return_dict=False)[0]
    with torch.no_grad():
        _, reused, other = call(1000.0), call(750.0), call(400.0)
        adapter.remove()
        assert torch.equal(other, call(400.0)) and not torch.equal(reused, call(750.0))


def test_a_second_cache_on_one_model_is_refused(stock_pipe, adapter):
    """Catches two caches whose removal leaves one of them behind, and one that does nothing."""
    net = stock_pipe.transformer
    with pytest.raises(ValueError, match="has a cache already"):
        BlockCache(net, (2, 3))
    assert net.forward is adapter
    adapter.remove()
    adapter.remove()
    BlockCache(net, (2, 3)).remove()
    assert not {"forward", "_block_cache"} & net.__dict__.keys()
    with pytest.raises(ValueError, match="not Linear"):
        BlockCache(torch.nn.Linear(1, 1), (2, 3))


@pytest.mark.parametrize("order", ["hook, cache", "cache, hook", "hook, cache, unhook"])
def test_the_adapter_goes_together_with_the_hooks_of_offloading(stock_pipe, order):
    """accelerate puts a forward of its own on a network, which moves weights and inputs. Catches a
    cache that takes its place, or is wrapped and then cannot be found again."""
    hooks = pytest.importorskip("accelerate.hooks")
    net, (x, (embeds, pooled)) = stock_pipe.transformer, inputs(stock_pipe.transformer)
    seen = []

    class Count(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    def path():
        with torch.no_grad():
            return [net(hidden_states=x, encoder_hidden_states=embeds, pooled_projections=pooled,
                        timestep=torch.full((2,), t), return_dict=False)[0] for t in (1000., 750.)]
    stock = path()
    for what in order.split(", "):
        if what == "hook":
            hooks.add_hook_to_module(net, Count())
        elif what == "cache":
            cached = BlockCache(net, (1, 4))
        else:
            hooks.remove_hook_from_module(net)
    first, second = path()
    assert torch.equal(first, stock[0]) and not torch.equal(second, stock[1])
    assert len(seen) == (0 if "unhook" in order else 2)
    cached.remove()
    assert torch.equal(path()[1], stock[1]) and len(seen) == (0 if "unhook" in order else 4)
    hooks.remove_hook_from_module(net)
    assert "_block_cache" not in net.__dict__ and torch.equal(path()[1], stock[1])
    net.__dict__.pop("forward", None)
