"""Other people's pipelines, several processes, kills: what the loops meet outside of themselves.

    python -m pytest -q tools/test_pipelines.py

Names are sentences; a docstring says which mistake is caught. A command here is a fork of this
process, where the libraries are loaded already: it is killed, interrupted and joined with others as
one that was typed, and starts at once. What a fork changes of the code dies with it.
"""

import dataclasses
import itertools
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

COMMON = ["--batch-size", "4", "--log-every", "1", "--checkpoint-every", "2", "--iterations", "6"]
WORDS = {train_stage1: [], train_stage2: ["--references", "8", "--warmup", "1"]}
STAGES = [pytest.param(train_stage1, id="stage 1"), pytest.param(train_stage2, id="stage 2")]


def fork(action, log):
    """A process that does action(); exitcode is the command's, or minus the signal that ended
    it."""
    def child():
        tqdm.set_lock(threading.RLock())                  # not one that a killed fork may hold
        torch.set_num_threads(1)                          # a pool's threads are not forked
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        action()
    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    return process


def ended(*processes):
    """The exit codes of processes."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


class Commands:
    """Begins commands on the miniature, with a transformer so small that they take a second."""

    def __init__(self, folder):
        self.folder, base = folder, folder / "base"
        shutil.copytree(model.PRESETS["tiny"].source, base)
        config = SD3Transformer2DModel.load_config(base, subfolder="transformer")
        torch.manual_seed(0)
        SD3Transformer2DModel.from_config(
            config, num_layers=3, num_attention_heads=2, attention_head_dim=16,
            caption_projection_dim=32).save_pretrained(base / "transformer")
        self.tiny = dataclasses.replace(model.PRESETS["tiny"], source=str(base),
                                        cached_blocks="0-1")

    def start(self, script, out, *words, change=None, **environment):
        """A fork that runs script.main, after change(). What it prints is in OUT.log."""
        words = [*COMMON, *WORDS[script], *words, "--out", str(out)]
        if script is train_stage2:
            words += ["--init", str(self.undisturbed(train_stage1))]

        def action():
            os.environ.update(environment)
            model.PRESETS["tiny"] = self.tiny
            train_stage2.D_ONLY = 0                       # turns G, D, D, G, D, D
            sampler.Gallery.save = run.draw_curves = lambda *arguments: None
            if change:
                change()
            script.main(words)
        return fork(action, f"{out}.log")

    def run(self, *arguments, count=1, **others):
        """The exit codes of a command in so many processes, which find each other as torchrun's."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        return set(ended(*[self.start(*arguments, **others, **address, WORLD_SIZE=str(count),
                                      RANK=str(i), LOCAL_RANK=str(i)) for i in range(count)]))

    def undisturbed(self, script):
        return self.folder / script.__name__


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Commands, with an undisturbed run of both stages."""
    if sys.platform != "linux":
        pytest.skip("elsewhere PyTorch does not survive a fork")
    commands = Commands(tmp_path_factory.mktemp("commands"))
    for script in WORDS:
        assert commands.run(script, commands.undisturbed(script)) == {0}
    return commands


def tensors(folder):
    """All tensors of a run folder, {file/name: tensor}: two checkpoints, the result, prompts."""
    return {f"{path.relative_to(folder)}/{name}": tensor
            for path in sorted(folder.rglob("[!.]*.safetensors"))
            for name, tensor in load_file(path).items()}


def assert_same_run(one, other):
    """Equal bit for bit in all that a run leaves, and told as one story."""
    found, expected = tensors(one), tensors(other)
    assert found.keys() == expected.keys() and found
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert metrics(one) == metrics(other)
    for file in ("settings.json", "prompts.safetensors"):
        assert (one / file).exists() == (other / file).exists()


def wait(process, condition):
    """Until condition() holds, or a process has ended."""
    while process.exitcode is None and not condition():
        time.sleep(0.005)


# ------------------------------------------------------------------ several processes

def pull(files, net):
    """What a network's optimiser keeps of its gradients, one vector."""
    return torch.cat([value.flatten() for name, value in sorted(load_file(files / f"{net}_optimizer.safetensors").items())
                      if name.endswith("exp_avg")])


@pytest.mark.parametrize("script", STAGES)
def test_two_processes_compute_the_gradients_of_one(script, commands, tmp_path):
    words = ["--iterations", "2", "--checkpoint-every", "1", "--warmup", "0"][:4 if script is train_stage1 else 6]
    for count in (1, 2):
        assert commands.run(script, tmp_path / str(count), *words, count=count) == {0}
    one, two = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    assert one.keys() == two.keys()
    worst = {}
    for name, value in one.items():
        d = (two[name].float() - value.float()).abs().max().item()
        kind = "/".join([*name.split("/")[:-1], name.split(".")[-1]])
        rel = d / (value.float().abs().max().item() + 1e-12)
        worst[kind] = max(worst.get(kind, (0, 0, "")), (rel, d, name))
    for k, v in worst.items(): print(k, v)
    print((tmp_path / "2.log").read_text()[-1500:])


@pytest.mark.parametrize("counts", [(1, 2), (2, 1)])
@pytest.mark.parametrize("script", STAGES)
def test_goes_on(script, counts, commands, tmp_path):
    def kill():
        save = run.Run.checkpoint
        def die(self, i, *rest):
            save(self, i, *rest)
            if i == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        run.Run.checkpoint = die
    assert commands.run(script, tmp_path / "run", count=counts[0], change=kill) == {-9}
    assert commands.run(script, tmp_path / "run", count=counts[1]) == {0}
    one, two = tensors(commands.undisturbed(script)), tensors(tmp_path / "run")
    assert one.keys() == two.keys()
    worst = {}
    for name, value in one.items():
        d = (two[name].float() - value.float()).abs().max().item()
        kind = "/".join([*name.split("/")[:-1], name.split(".")[-1]])
        rel = d / (value.float().abs().max().item() + 1e-12)
        worst[kind] = max(worst.get(kind, (0, 0, "")), (rel, d, name))
    for k, v in worst.items(): print(k, v)


# ------------------------------------------------------------------ kills

@pytest.mark.parametrize("script", STAGES)
def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(script, commands, tmp_path):
    """While it loads, encodes, makes references, trains or writes. Catches all that a checkpoint
    lacks, and a file that is half there and believed."""
    out, moments, codes = tmp_path / "run", random.Random(0), []
    for _ in range(5):
        process = commands.start(script, out)
        process.join(moments.uniform(0.1, 0.9))
        process.kill()
        codes += ended(process)
    wait(process := commands.start(script, out), lambda: run.checkpoints(out))
    process.kill()                                        # once surely in the middle
    print(codes)
    assert {-9} <= {*codes, *ended(process)} <= {0, -9}
    assert commands.run(script, out) == {0}
    assert_same_run(out, commands.undisturbed(script))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", STAGES)
def test_a_run_that_is_told_to_stop_saves_and_goes_on(script, number, commands, tmp_path):
    """Ctrl-C, and what pre-emptible machines send. Catches a signal that is lost, one that ends the
    run at once, and an exit code that says all is done."""
    def stop_in_the_third():
        log = run.Run.log

        def stop(self, i, **values):
            if i == 3:
                os.kill(os.getpid(), number)
            log(self, i, **values)
        run.Run.log = stop
    out = tmp_path / "run"
    assert commands.run(script, out, change=stop_in_the_third) == {130}
    assert "stopped after iteration 3, saved" in Path(f"{out}.log").read_text()
    assert [path.name[-1] for path in run.checkpoints(out)] == ["2", "3"]
    assert commands.run(script, out) == {0}
    assert_same_run(out, commands.undisturbed(script))


@pytest.mark.parametrize("place", ["while it loads", "while it trains"])
def test_a_second_command_on_a_folder_is_refused(place, commands, tmp_path):
    """Also with --overwrite, and before there are settings. Catches two writers of one run, and a
    check that comes long before the first write."""
    out, go = tmp_path / "run", tmp_path / "go"

    def pause():
        owner, name = ((train_stage1, "Decoder") if place == "while it loads"
                       else (run.Run, "checkpoint"))
        real = getattr(owner, name)

        def paused(*arguments):
            (tmp_path / "waits").touch()
            while not go.exists():
                time.sleep(0.005)
            return real(*arguments)
        setattr(owner, name, paused)
    first = commands.start(train_stage1, out, change=pause)
    wait(first, (tmp_path / "waits").exists)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert commands.run(train_stage1, out) == {2}
    assert commands.run(train_stage1, out, "--overwrite", "--seed", "5") == {2}
    assert Path(f"{out}.log").read_text().count("is in use by another command") == 2
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    go.touch()
    assert ended(first) == [0]
    assert_same_run(out, commands.undisturbed(train_stage1))


# ------------------------------------------------------------------ a kill at any call

def little(folder, seed=1, overwrite=False):
    """A run without a method: one small network, three iterations, each with a checkpoint."""
    torch.manual_seed(seed)
    net = torch.nn.Linear(2, 2)
    optimizer = run.adamw(net, 0.1, (0.9, 0.95), 0.0)
    trained = run.Run(folder, {"seed": seed, "iterations": 3, "checkpoint_every": 1},
                      torch.device("cpu"), overwrite)
    if trained.finished():
        return
    for i in range(trained.restore({"net": net}, {"net": optimizer}), 3):
        net(torch.ones(1, 2)).square().sum().backward()
        trained.log(i + 1, norm=run.clip_and_step([optimizer]))
        trained.checkpoint(i + 1, {"net": net}, {"net": optimizer})
    run.save_whole(folder / "student", lambda new: run.save_tensors(new / "net.safetensors",
                                                                    net.state_dict()))
    trained.finish()


def killed_at(n, *arguments):
    """The exit code of little(*arguments) killed before its n-th call that touches the disk. What
    was to be fsynced then is half on the disk."""
    calls = itertools.count()

    def deadly(call):
        def wrapped(*arguments, **options):
            if next(calls) == n:
                if call is fsync:
                    path = f"/proc/self/fd/{arguments[0]}"
                    os.truncate(path, os.stat(path).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return wrapped
    fsync = os.fsync

    def action():
        run.draw_curves = lambda folder: None
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        run.command(lambda argv: little(*arguments))([])
    code, = ended(fork(action, f"{arguments[0]}.log"))
    return code


NEVER = 10**9


def test_a_kill_before_any_call_costs_at_most_one_checkpoint(tmp_path):
    """And the same command goes on to the same end."""
    assert killed_at(NEVER, tmp_path / "whole") == 0
    newest = []
    for n in itertools.count():
        out = tmp_path / str(n)
        code = killed_at(n, out)
        newest.append(run.iteration_of([Path("checkpoint-000000"), *run.checkpoints(out)][-1]))
        with open(out / "metrics.jsonl", "a") if (out/"metrics.jsonl").exists() else open(os.devnull, "w") as file:
            file.write('{"iteration": 4, "no')
        if code == 0:
            break
        assert code == -9 and killed_at(NEVER, out) == 0, (n, Path(f"{out}.log").read_text())
        assert_same_run(out, tmp_path / "whole")
    print(newest)
    assert newest == sorted(newest) and set(newest) == {0, 1, 2, 3}


def test_overwriting_deletes_in_the_run_folder_alone_and_can_be_killed(tmp_path):
    little_ = tmp_path / "old"
    assert killed_at(NEVER, little_) == 0
    assert killed_at(NEVER, tmp_path / "whole", 2) == 0
    for n in itertools.count():
        out = shutil.copytree(little_, tmp_path / str(n))
        code = killed_at(n, out, 2, True)
        names = sorted(str(p.relative_to(out)) for p in out.rglob("*"))
        again = shutil.copytree(out, tmp_path / f"{n}-again")
        code2 = killed_at(NEVER, again)
        print(n, code, code2, (again/"student").exists(), names)
        if code == 0:
            break
        assert code == -9 and killed_at(NEVER, out, 2, True) == 0
        assert_same_run(out, tmp_path / "whole")
