"""Stock pipelines, several processes, signals and kills: what the method meets outside of itself.

    python -m pytest -q tools/test_pipelines.py

A command here is a fork of this process, in which the libraries are loaded already: it starts at
once, and what it changes of the code dies with it.
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
from pathlib import Path

import pytest

import run  # first, as in every script: it silences what the others import
import torch
from diffusers import SD3Transformer2DModel
from tqdm import tqdm

import model
import sampler
import train_stage1
import train_stage2
from cache import BlockCache
from test_all import (SHAPE, ask, assert_same_run, leave_out_pictures, metrics, stock_pictures,
                      tensors, trained_compensation)
from tiny.world import CAPTIONS

# ================================================================== in a stock pipeline

def call(net, prompt, timestep, size=8, **others):
    """A call of a transformer as the pipeline makes it."""
    with torch.no_grad():
        return net(hidden_states=torch.ones(1, 4, size, size), encoder_hidden_states=prompt[0],
                   pooled_projections=prompt[1], timestep=torch.tensor([float(timestep)]),
                   return_dict=False, **others)[0]


@pytest.fixture
def cache(stock_pipe):
    """A BlockCache on the stock pipeline, for one test, with an f that is not plain reuse."""
    net = stock_pipe.transformer
    yield BlockCache(net, (1, 4), trained_compensation(net))
    net.__dict__.pop("forward", None)


def test_three_lines_around_a_stock_pipeline_take_our_cached_path(stock_pipe, teacher, cache,
                                                                  prompts, decode):
    """And after remove() the transformer is the stock one, bit for bit. Catches an adapter that
    leaves f out, or stays."""
    noise = sampler.image_noise(0, [0, 1], SHAPE)
    theirs = stock_pictures(stock_pipe, CAPTIONS[:2], noise, sigmas=[1.0, 0.5], guidance_scale=1.0,
                           num_inference_steps=2)
    with torch.no_grad():
        latents, _, _ = sampler.roll_out(teacher, noise, prompts.take([0, 1]),
                                         sampler.sigma_grid(2), (1, 4), cache.f)
        ours = decode(latents[-1]).clamp(0, 1)
    assert torch.allclose(theirs, ours, atol=1e-4)
    cache.remove()
    net, prompt = stock_pipe.transformer, prompts.take([0])
    assert "forward" not in net.__dict__
    assert call(net, prompt, 750).equal(ask(net, torch.ones(1, *SHAPE), 0.75, prompt))


@pytest.mark.parametrize("rule, before, now", [
    ("prompt", [(0, 1000, 8)], (1, 750, 8)), ("shape", [(0, 1000, 8)], (0, 750, 4)),
    ("timestep", [(0, 750, 8)], (0, 1000, 8)), ("timestep", [(0, 750, 8)], (0, 750, 8)),
    ("steps", [(0, 1000, 8), (0, 750, 8)], (0, 400, 8))])
def test_a_call_that_does_not_belong_to_the_path_runs_in_full(stock_pipe, cache, prompts, rule,
                                                              before, now):
    """Calls are (prompt, timestep, size). Each case fails without the one rule that it is named
    for. ("steps": image-to-image begins anywhere, with the embeddings of the call before.)"""
    net, both, in_full = stock_pipe.transformer, [prompts.take([0]), prompts.take([1])], []
    for i, timestep, size in (*before, now):
        full = ask(net, torch.ones(1, 4, size, size), timestep / 1000, both[i])
        in_full.append(call(net, both[i], timestep, size).equal(full))
    assert in_full == ([True, False, True] if rule == "steps" else [True, True])


@pytest.mark.parametrize("name, value", [
    ("skip_layers", [2]), ("block_controlnet_hidden_states", [torch.zeros(1)]),
    ("joint_attention_kwargs", {"scale": 0.5})])
def test_an_argument_that_acts_inside_the_span_is_refused(stock_pipe, cache, prompts, name, value):
    """Catches one that is lost without a word; None, as pipelines pass it, is no argument."""
    with pytest.raises(ValueError, match=f"^{name} does not go together with a block cache"):
        call(stock_pipe.transformer, prompts.take([0]), 1000, **{name: value})
    call(stock_pipe.transformer, prompts.take([0]), 1000, **{name: None})


# ================================================================== commands in forks

WORDS = ["--batch-size", "4", "--log-every", "1", "--checkpoint-every", "2", "--iterations", "6"]
STAGES = [pytest.param(train_stage1, id="stage 1"), pytest.param(train_stage2, id="stage 2")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a base whose transformer is so small that a training takes half a second, and
    with a run of each stage. Commands are started in it."""
    if sys.platform != "linux":
        pytest.skip("elsewhere PyTorch may not survive a fork")
    folder, tiny = tmp_path_factory.mktemp("commands"), model.PRESETS["tiny"]
    base = shutil.copytree(tiny.source, folder / "base")
    config = SD3Transformer2DModel.load_config(base, subfolder="transformer")
    torch.manual_seed(0)
    SD3Transformer2DModel.from_config(
        config, num_layers=3, num_attention_heads=2, attention_head_dim=16,
        caption_projection_dim=32).save_pretrained(base / "transformer")
    small = dataclasses.replace(tiny, source=str(base), cached_blocks="0-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", small)
        patch.setattr(train_stage2, "D_ONLY", 0)          # turns G (of f alone), D, D, G, D, D
        leave_out_pictures(patch)
        patch.chdir(folder)
        for script in (train_stage1, train_stage2):
            assert start(script, folder / script.__name__) == {0}
        yield folder


def start(script, out, *words, change=lambda: None, count=1):
    """The exit codes of a command in so many processes, which find each other as torchrun's: minus
    the signal for one that was killed, None for one that hangs. change() is called in each of them
    first; what they print is in OUT.log."""
    words = [*WORDS, *words, "--out", str(out)]
    if script is train_stage2:
        words += ["--references", "8", "--warmup", "1", "--init", "train_stage1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
                          LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        tqdm.set_lock(threading.RLock())                  # not one that a killed fork may hold
        torch.set_num_threads(1)                          # a pool's threads are not forked
        signal.signal(signal.SIGINT, signal.default_int_handler)      # `pytest &` ignores it
        sys.stdout = sys.stderr = open(f"{out}.log", "a", buffering=1)
        change()
        script.main(words)
    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=child, args=(rank,), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    codes = set()
    for process in processes:
        process.join(120)
        codes.add(process.exitcode)
        process.kill()
    return codes


LOG = [(run.Run, "log")]                                  # called once in each iteration
DISK = [*LOG, *[(os, name) for name in ("fsync", "rename", "mkdir", "unlink", "rmdir")]]


def signalled(number, n, calls, rank=0):
    """A change: the process gets a signal before its n-th call, from 1, of these functions. A kill
    leaves half of a file that is not fsynced yet, and half a line of metrics."""
    def change():
        count = itertools.count(1)

        def wrap(name, real):
            def called(first, *arguments, **options):
                if next(count) == n and int(os.environ["RANK"]) >= rank:
                    if number == signal.SIGKILL and name == "fsync":
                        os.truncate(f"/proc/self/fd/{first}", os.fstat(first).st_size // 2)
                    elif number == signal.SIGKILL and name == "log":
                        with open(first.folder / "metrics.jsonl", "a") as file:
                            file.write('{"iteration": 9, "lo')
                    os.kill(os.getpid(), number)
                return real(first, *arguments, **options)
            return called
        for owner, name in calls:
            setattr(owner, name, wrap(name, getattr(owner, name)))
    return change


@pytest.mark.parametrize("script", STAGES)
def test_any_number_of_processes_goes_on_and_computes_the_run_of_one(script, runs, tmp_path):
    """One is killed, two go on until the second is told to stop, one ends it. AdamW's moments tell
    every gradient. Catches a share that is another process's too, a loss that is summed, small
    networks whose gradients nobody averages, a checkpoint that holds one process's part, an
    optimiser that begins anew, and a process that waits for ever for one that has left."""
    out = tmp_path / "run"
    killed, told = signalled(signal.SIGKILL, 3, LOG), signalled(signal.SIGTERM, 3, LOG, rank=1)
    assert start(script, out, change=killed) == {-9}
    assert start(script, out, change=told, count=2) == {130}
    assert Path(f"{out}.log").read_text().count("stopped after iteration 5, saved") == 1
    assert start(script, out) == {0}
    for line, undisturbed in zip(metrics(out), metrics(runs / script.__name__),
                                 strict=True):            # of several processes the mean
        for name in {"loss_fake", "loss_student", "gap", "loss_d", "loss_g"} & line.keys():
            assert line[name] == pytest.approx(undisturbed[name], rel=1e-3), name
    one = tensors(runs / script.__name__ / "checkpoint-000006")
    other = tensors(out / "checkpoint-000006")
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference = other[name].float() - value.float()
        if "_optimizer" in name:                          # exp_avg, exp_avg_sq and step
            noise = 1e-7 if name.endswith("exp_avg") else 1e-12
            assert difference.norm() <= 1e-3 * value.norm() + noise, name
        else:                                             # an update moves a weight by 2e-5
            assert difference.abs().mean() < 1e-6, name


@pytest.mark.slow
def test_torchrun_starts_a_training_and_it_ends_well(runs, tmp_path):
    """From another directory, on a pipeline folder. Catches processes that abort at the end, and
    lines that each of them prints."""
    script = Path(train_stage1.__file__).resolve()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         script, *WORDS, "--model", runs / "base", "--pool", "4", "--out", "run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("look at") == 1 and len(metrics(tmp_path / "run")) == 6


@pytest.mark.parametrize("script, number, n, calls", [
    pytest.param(train_stage1, signal.SIGINT, 3, LOG, id="Ctrl-C"),
    pytest.param(train_stage2, signal.SIGTERM, 3, LOG, id="SIGTERM"),
    pytest.param(train_stage2, signal.SIGINT, 1, [(train_stage2, "sample_guided")], id="early")])
def test_a_run_that_is_told_to_stop_saves_and_goes_on(script, number, n, calls, runs, tmp_path):
    """Ctrl-C, also while references are made, and SIGTERM. Catches a signal that is lost, one that
    costs an iteration, an exit code that says all is done, and a run that passes for a shorter one.
    """
    out = tmp_path / "run"
    assert start(script, out, change=signalled(number, n, calls)) == {130}
    assert [path.name[-1] for path in run.checkpoints(out)] == (["2", "3"] if n == 3 else [])
    assert "\nstopped" in Path(f"{out}.log").read_text()
    assert n == 1 or start(script, out, "--iterations", "2") == {2}
    assert start(script, out) == {0}
    assert_same_run(out, runs / script.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES)
def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(script, runs, tmp_path):
    """A moment is a call that changes the disk: between two of them a kill finds the same files.
    Catches all that a checkpoint lacks, a file that is half there and believed, an old checkpoint
    that goes before the new one is whole, and a folder that is taken for somebody else's."""
    out, newest = tmp_path / "run", [0]
    for n in (*range(1, 13), *sorted(random.Random(3).sample(range(18, 70), 4))):
        assert start(script, out, change=signalled(signal.SIGKILL, n, DISK)) <= {0, -9}
        newest.append(run.newest_iteration(out))
    assert newest == sorted(newest) and len({*newest}) > 2
    assert start(script, out) == {0}
    assert_same_run(out, runs / script.__name__)


@pytest.mark.slow
def test_overwriting_can_be_killed_and_deletes_in_the_run_folder_alone(runs, tmp_path):
    """Killed before each call that changes the disk. Catches a half-removed run that is refused for
    ever, that passes for a finished one, or whose rest passes for the new one's, and a link whose
    target is emptied."""
    old, out = tmp_path / "old", tmp_path / "here" / "run"
    assert start(train_stage1, old, "--seed", "1") == {0}
    out.parent.mkdir()
    (out.parent / "notes.txt").write_text("precious")
    for n in range(1, 9):
        assert start(train_stage1, out, "--seed", "1", "--overwrite") == {0}
        (out / "link").symlink_to(old)
        killed = signalled(signal.SIGKILL, n, DISK)
        assert start(train_stage1, out, "--overwrite", change=killed) == {-9}
        saved = out / "settings.json"
        whole = tensors(out / "student").keys() == tensors(old / "student").keys()
        assert whole or not saved.exists() or not run.read_json(saved)["finished"]
    assert start(train_stage1, out, "--overwrite") == {0}
    assert_same_run(out, runs / "train_stage1")
    assert {path.name for path in out.parent.iterdir()} == {"run", "run.log", "notes.txt"}
    assert len(metrics(old)) == 6 and tensors(old)
