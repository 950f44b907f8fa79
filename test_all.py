"""The project's claims and equivalences. Names are sentences; docstrings say which mistake a test
would catch.

    python -m pytest -q
"""

import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import benchmark
import cache
import claims
import evaluate
import losses
import metrics
import model
import plan
import run
import sampler
import tiny
import train_stage1
import train_stage2
from cache import BlockCache, make_compensation, nfe
from losses import (dmd_loss, draw_sigma, euler, guide, importance_curve, renoise, window,
                    x0_from_velocity)

HERE = Path(__file__).parent
TINY = model.PRESETS["tiny"]
SMALL = ["--batch-size", "4", "--log-every", "1", "--sample-every", "2", "--checkpoint-every", "1"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def teacher():
    return model.load_transformer(TINY)


@pytest.fixture(scope="session")
def stock_pipe():
    """The committed teacher through diffusers alone, exactly as the README tells it."""
    from diffusers import StableDiffusion3Pipeline
    pipe = StableDiffusion3Pipeline.from_pretrained(
        HERE / "weights" / "tiny-sd3", text_encoder_3=None, tokenizer_3=None,
        torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of two iterations."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train_stage1.main([*SMALL, "--iterations", "2", "--out", str(out)])
    return out


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "student" / "diffusion_pytorch_model.safetensors")


# ----------------------------------------------------------------------------- conventions

def test_the_students_sigma_grid_is_the_official_one():
    """Catches an unshifted grid and the stock pipeline's 1, 0.0089, 0."""
    assert torch.allclose(sampler.sigma_grid(2), torch.tensor([1, 0.75, 0]))
    assert torch.allclose(sampler.sigma_grid(4), torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def test_velocity_points_from_data_to_noise():
    """Catches a flipped sign: an Euler step from any sigma to 0 along ε − x0 must land on x0."""
    x0, noise, sigma = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([1, 0.6, 0.1])
    s = sigma[:, None, None, None]
    x = (1 - s) * x0 + s * noise
    assert torch.allclose(x0_from_velocity(x, sigma, noise - x0), x0, atol=1e-6)
    assert torch.allclose(euler(x, noise - x0, sigma, 0.0), x0, atol=1e-6)


def test_timestep_is_a_thousand_sigma():
    """Catches a network that is told sigma itself or the step's index."""
    class Net(torch.nn.Module):
        dtype = torch.float32

        def forward(self, hidden_states, timestep, **others):
            self.seen = timestep
            return (hidden_states,)
    net = Net()
    model.velocity(net, torch.zeros(3, 1, 2, 2), 0.75, (torch.zeros(3, 1), torch.zeros(3, 1)))
    assert net.seen.tolist() == [750, 750, 750]


def test_guidance_is_on_up_to_alpha_inclusive_and_off_above():
    """Eq. 4. Catches < for ≤, a flipped sign and guidance left on at high noise."""
    cond, uncond = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    out = guide(cond, uncond, torch.tensor([0.5, 0.94, 0.9401]), 7.0, 0.94)
    assert torch.allclose(out[:2], (uncond + 7 * (cond - uncond))[:2])
    assert torch.equal(out[2], cond[2])


def test_renoising_reaches_exactly_the_marginal_of_the_higher_level():
    """Catches a wrong factor or variance: x_a re-noised to b must be distributed as x_b from x0."""
    n, x0 = 400_000, 2.0
    for a, b in ((0.0, 0.5), (0.3, 0.8), (0.75, 0.9), (0.5, 1.0)):
        x = (1 - a) * x0 + a * torch.randn(n, 1, generator=seeded(1))
        x = renoise(x, torch.full((n,), a), torch.full((n,), b),
                    torch.randn(n, 1, generator=seeded(2)))
        assert abs(x.mean().item() - (1 - b) * x0) < 0.01 and abs(x.std().item() - b) < 0.01
    x = torch.randn(4, 3)
    same = renoise(x, torch.full((4,), 0.3), torch.full((4,), 0.3), torch.randn(4, 3))
    assert torch.allclose(same, x, atol=2e-3), "variance not clamped, or factor off, at b = a"
    assert torch.equal(renoise(x, torch.ones(4), torch.ones(4), torch.randn(4, 3)), x)


# ----------------------------------------------------------------------------- importance

@pytest.mark.parametrize("name, means", [("official", (0.912, 0.619)), ("uniform", (0.892, 0.461))])
def test_importance_curves_have_the_released_samplers_means(name, means):
    """Mean sigma of both windows of two steps as the released sampler gives them; catches a curve
    read backwards."""
    u = torch.rand(4000, generator=seeded())
    for (high, low), mean in zip(((1.0, 0.75), (0.75, 0.0)), means, strict=True):
        sigma = draw_sigma(u, torch.full_like(u, high), torch.full_like(u, low),
                           importance_curve(name))
        assert abs(sigma.mean().item() - mean) < 0.005
        assert (sigma > low).all() and (sigma <= high + 1e-6).all()


def test_importance_curves_have_the_published_shape():
    """Density at u = 1, the peak, its place and u = 0.5: preset c as released, and the plotted
    curve."""
    for name, start, peak, place, half in (("official", 0.00185, 0.0027, 0.776, 0.00036),
                                           ("paper", 0.0014, 0.0023, 0.75, 0.0007)):
        p = importance_curve(name)
        p = p / p.sum()
        assert (p[0].item() == pytest.approx(start, rel=0.05)
                and p.max().item() == pytest.approx(peak, rel=0.05))
        assert 1 - p.argmax().item() / 1000 == pytest.approx(place, abs=0.01)
        assert p[500].item() == pytest.approx(half, rel=0.06)


def test_share_of_draws_without_guidance_is_the_derived_one():
    """18.2 % of a two-step student's draws lie above α = 0.94, 12.0 % above 0.96: catches
    α on the wrong axis."""
    u, k = torch.rand(20_000, generator=seeded()), torch.arange(20_000) % 2
    high, low = window(k, sampler.sigma_grid(2))
    sigma = torch.cat([draw_sigma(*part, importance_curve("official")) for part in
                       zip(u.split(4000), high.split(4000), low.split(4000), strict=True)])
    assert (sigma > 0.94).float().mean().item() == pytest.approx(0.182, abs=0.006)
    assert (sigma > 0.96).float().mean().item() == pytest.approx(0.120, abs=0.006)


def test_window_and_x0_form_agree_on_the_last_step_only():
    """Both end at level 0; the x0 form re-noises up to 1 whatever the step."""
    sigmas = sampler.sigma_grid(2)
    high, low = window(torch.tensor([0, 1]), sigmas, "window")
    assert high.tolist() == [1, 0.75] and low.tolist() == [0.75, 0]
    high, low = window(torch.tensor([0, 1]), sigmas, "x0")
    assert high.tolist() == [1, 1] and low.tolist() == [0, 0]


# ----------------------------------------------------------------------------- losses

def test_the_students_gradient_is_the_score_difference():
    """Hand-computed (fake − real) / mean|sample − real| / numel; catches a sign, a leak,
    a missing normaliser."""
    sample, real, fake = (torch.randn(2, 3, 4, 5, generator=seeded(i)) for i in range(3))
    sample.requires_grad_(), real.requires_grad_(), fake.requires_grad_()
    dmd_loss(sample, real, fake).backward()
    for b in range(2):
        scale = (sample[b] - real[b]).abs().sum().item() / 60
        assert torch.allclose(sample.grad[b], (fake[b] - real[b]) / scale / 120, rtol=1e-4)
    assert real.grad is None and fake.grad is None


def test_the_column_normaliser_is_the_official_one_weight_for_each_image_column():
    sample, real, fake = (torch.randn(1, 3, 4, 5, generator=seeded(i)) for i in range(3))
    sample.requires_grad_()
    dmd_loss(sample, real, fake, normaliser="column").backward()
    scale = (sample - real).abs()[0].mean((0, 1)).detach()                          # 5 columns
    assert torch.allclose(sample.grad[0], (fake - real)[0] / scale / 60, rtol=1e-4)


def test_pseudo_huber_gradient_is_nearly_the_sign_where_the_difference_is_large():
    sample, real, fake = (torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8),
                          torch.full((1, 4, 8, 8), 1.5))
    sample.requires_grad_()
    dmd_loss(sample, real, fake, distance="huber").backward()
    assert torch.allclose(sample.grad, torch.full_like(sample, 1 / 256), rtol=1e-3)


def test_losses_stay_finite_when_student_and_teacher_agree():
    """Catches the official normaliser's division without an epsilon."""
    x = torch.zeros(2, 4, 8, 8, requires_grad=True)
    for distance in ("mse", "huber"):
        loss = dmd_loss(x, x.detach(), x.detach(), distance=distance)
        loss.backward()
        assert loss.item() == 0 and torch.isfinite(x.grad).all()


def test_fake_score_loss_is_zero_exactly_at_the_students_velocity():
    x0, noise, sigma = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([0.003, 0.75])
    x = renoise(x0, torch.zeros(2), sigma, noise)
    assert losses.fake_score_loss(noise - x0, x, x0, sigma).item() < 1e-6
    assert losses.fake_score_loss(x0 - noise, x, x0, sigma).item() > 1
    with pytest.raises(AssertionError):
        losses.fake_score_loss(noise, x.bfloat16(), x0, sigma)


# ----------------------------------------------------------------------------- the miniature world

def test_the_reader_reads_every_clean_picture():
    """All 24 captions on all 4 scenes; catches confusable colours, scenes and shapes."""
    template = torch.arange(0, len(tiny.templates()[1]), 97)
    grid = torch.cartesian_prod(template, torch.arange(6), torch.arange(4))
    grid = grid[torch.randperm(len(grid), generator=seeded())[:200]]
    seen = tiny.read(tiny.draw(*grid.T))
    assert torch.equal(seen["shape"], tiny.templates()[1][grid[:, 0]])
    assert torch.equal(seen["colour"], grid[:, 1]) and torch.equal(seen["scene"], grid[:, 2])
    assert seen["error"].max() < 1e-3


def test_the_reader_is_not_fooled_by_noise():
    """A picture of nothing must not count as read: its distance to every true picture is large."""
    assert tiny.read(torch.rand(4, 3, 32, 32, generator=seeded()))["error"].min() > 0.2


def test_the_world_is_as_skewed_as_it_says():
    captions = torch.arange(24).repeat_interleave(400)
    template, colour, scene = tiny.sample_labels(len(captions), seeded(), captions)
    shape = tiny.templates()[1][template]
    assert torch.equal(shape * 6 + colour, captions)
    assert (scene == shape).float().mean().item() == pytest.approx(0.55, abs=0.02)
    for other in (1, 2, 3):
        assert (scene == (shape + other) % 4).float().mean().item() == pytest.approx(0.15, abs=0.02)


def test_scene_entropy_is_the_plug_in_estimate():
    """0 for one scene, ln 4 for all alike; 0.96 expected of the data at 8 samples (why n
    must be named)."""
    assert tiny.scene_entropy(torch.zeros(64, dtype=torch.long)).item() == pytest.approx(
        0, abs=1e-6)
    assert tiny.scene_entropy(torch.arange(64) % 4).item() == pytest.approx(math.log(4), abs=1e-5)
    captions = torch.zeros(80_000, dtype=torch.long)
    scene = tiny.sample_labels(len(captions), seeded(), captions)[2]
    assert tiny.scene_entropy(scene.view(-1, 8)).mean().item() == pytest.approx(0.96, abs=0.01)
    assert tiny.scene_entropy(scene.view(-1, 64)).mean().item() == pytest.approx(1.16, abs=0.01)


def test_measure_counts_what_the_reader_sees():
    captions = torch.arange(24).repeat_interleave(4)
    template, colour, _ = tiny.sample_labels(96, seeded(), captions)
    usual = tiny.measure(tiny.draw(template, colour, tiny.templates()[1][template]), captions)
    assert (usual["correct"].min() == 1 and usual["usual"].min() == 1
            and usual["scene_entropy"].max() < 1e-6)
    wrong = tiny.measure(tiny.draw(template, (colour + 1) % 6, tiny.templates()[1][template]),
                         captions)
    assert wrong["correct"].max() == 0


# --------------------------------------------------------------------- the teacher and the samplers

def test_the_committed_teacher_makes_right_pictures_in_the_stock_pipeline(stock_pipe):
    """Nothing of ours between caption and picture; catches a broken export."""
    captions = torch.arange(0, 24, 2)
    images = stock_pipe([tiny.CAPTIONS[c] for c in captions], guidance_scale=TINY.guidance,
                        max_sequence_length=0, generator=seeded(), output_type="pt").images
    assert tiny.measure(images.float(), captions)["correct"].mean() >= 11 / 12


def test_the_teacher_folder_is_small():
    assert sum(p.stat().st_size for p in (HERE / "weights" / "tiny-sd3").rglob("*")
               if p.is_file()) <= 16e6


def stock_latents(pipe, captions, noise, **arguments):
    return pipe(captions, latents=noise, max_sequence_length=0, output_type="latent",
                **arguments).images


@pytest.mark.parametrize("steps", [2, 4])
def test_the_stock_pipeline_gives_the_students_latents(stock_pipe, finished, steps):
    """One grid for training, sampling and export; catches num_inference_steps without sigmas."""
    from diffusers import SD3Transformer2DModel
    student = SD3Transformer2DModel.from_pretrained(finished / "student", torch_dtype=torch.float32)
    captions, noise = tiny.CAPTIONS[:3], sampler.image_noise(0, range(3), (4, 8, 8))
    with torch.inference_mode():
        ours = sampler.roll_out(student, noise, model.encode_prompts(TINY, captions, "cpu"),
                                sampler.sigma_grid(steps))[0][-1]
    teacher, stock_pipe.transformer = stock_pipe.transformer, student
    theirs = stock_latents(stock_pipe, captions, noise, sigmas=sampler.stock_sigmas(steps),
                           num_inference_steps=steps, guidance_scale=1.0)
    stock_pipe.transformer = teacher
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_our_guided_sampler_is_the_stock_one(stock_pipe, teacher):
    """28 steps with guidance; catches a grid, a guidance or an unconditional prompt that
    differs."""
    captions, noise = tiny.CAPTIONS[5:7], sampler.image_noise(0, range(2), (4, 8, 8))
    embeds, pooled = model.encode_prompts(TINY, [*captions, ""], "cpu")
    with torch.inference_mode():
        ours, passes = sampler.sample_guided(
            teacher, noise, (embeds[:2], pooled[:2]),
            (embeds[2:].expand(2, -1, -1), pooled[2:].expand(2, -1)),
            sampler.teacher_sigmas(sampler.load_scheduler(TINY)), 4.0)
    theirs = stock_latents(stock_pipe, captions, noise, num_inference_steps=28, guidance_scale=4.0)
    assert passes == 56 and torch.allclose(ours, theirs, atol=1e-3)


def test_alpha_costs_51_passes_on_the_stock_grid(teacher):
    """Five of the 28 sigmas lie above 0.94; catches < for ≤ and a doubly shifted grid of ours."""
    sigmas = sampler.teacher_sigmas(sampler.load_scheduler(TINY))
    assert len(sigmas) == 29 and (sigmas > 0.94).sum() == 5
    prompt = model.encode_prompts(TINY, [""], "cpu")
    with torch.inference_mode():
        counts = [sampler.sample_guided(teacher, torch.zeros(1, 4, 8, 8), prompt, prompt, sigmas,
                                        w, alpha)[1]
                  for w, alpha in ((4.0, 0.94), (1.0, 1.0))]
    assert counts == [51, 28]


def test_the_batch_size_changes_no_picture():
    both = sampler.image_noise(5, range(4), (4, 8, 8))
    assert torch.equal(both[2:], sampler.image_noise(5, range(2, 4), (4, 8, 8)))
    assert not torch.equal(both[0], both[1])


def test_prompts_are_encoded_once_and_ahead_of_use(monkeypatch):
    """Catches encoding per step, and a book that forgets the unconditional prompt at the next
    chunk."""
    calls = []
    monkeypatch.setattr(model, "encode_prompts", lambda preset, texts, *rest: (
        calls.append(list(texts)), (torch.tensor([[float(len(t))] for t in texts]),) * 2)[1])
    book = model.PromptBook(TINY, "cpu", lambda i: ["x" * (i + 1)], iterations=10, keep=["shown"],
                            chunk=6)
    for i in range(10):
        assert book(i)[0].item() == i + 1 and book.uncond(2)[0].tolist() == [[0], [0]]
    flat = [text for call in calls for text in call]
    assert len(calls) <= 3 and len(flat) == len(set(flat)) == 12


def test_the_grammar_holds_ten_thousand_distinct_prompts():
    prompts = model.default_prompts(model.PRESETS["sd3-medium"])
    assert len(set(prompts)) == len(prompts) >= 10_000


# ----------------------------------------------------------------------------- training

def test_a_run_leaves_what_the_contract_says(finished):
    recipe = json.loads((finished / "distill.json").read_text())
    assert (recipe["sigmas"] == [1.0, 0.75, 0.0] and recipe["iteration"] == 2
            and recipe["alpha"] == 0.94)
    assert "sigmas=[1.0, 0.5], num_inference_steps=2" in recipe["stock_call"]
    assert [p.name for p in sorted(finished.glob("checkpoint-*"))] == [
        "checkpoint-000001", "checkpoint-000002"]
    assert (finished / "samples" / "step_000002.png").exists()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert ([line["iteration"] for line in lines] == [1, 2]
            and all(math.isfinite(line["loss_fake"]) for line in lines))
    settings = json.loads((finished / "settings.json").read_text())
    assert (settings["settings"]["alpha"] == 0.94
            and settings["versions"]["torch"] == torch.__version__)
    assert not [p for p in finished.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".ckpt")]


def test_a_resumed_run_is_the_undisturbed_run_bit_for_bit(finished, tmp_path, capsys):
    """Catches randomness that is not from (seed, iteration), and any state that a checkpoint
    forgets."""
    out = tmp_path / "resumed"
    train_stage1.main([*SMALL, "--iterations", "1", "--out", str(out)])
    train_stage1.main([*SMALL, "--iterations", "2", "--out", str(out)])
    assert "resuming" in capsys.readouterr().out
    before, after = weights(finished), weights(out)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_finished_run_says_so_and_does_nothing(finished, capsys):
    stamp = (finished / "student" / "config.json").stat().st_mtime_ns
    train_stage1.main([*SMALL, "--iterations", "2", "--out", str(finished)])
    assert "finished" in capsys.readouterr().out
    assert (finished / "student" / "config.json").stat().st_mtime_ns == stamp


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path, capsys):
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "student")
    (out / "distill.json").unlink()
    path = out / "checkpoint-000002" / "student.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    train_stage1.main([*SMALL, "--iterations", "2", "--out", str(out)])
    captured = capsys.readouterr()
    assert "checkpoint-000002 is damaged" in captured.err and "after iteration 1" in captured.out
    before, after = weights(finished), weights(out)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_shapes_that_do_not_fit_are_one_line(finished, tmp_path, capsys):
    """A recipe, a student and a checkpoint of another model, hashes and all."""
    from safetensors.torch import save_file
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    recipe = json.loads((out / "distill.json").read_text())
    for shape in ([7, 8, 8], [4, 64, 8]):
        (out / "distill.json").write_text(json.dumps(recipe | {"latent_shape": shape}))
        with pytest.raises(SystemExit):
            sampler.main(["--checkpoint", str(out)])
        assert "does not fit its student" in capsys.readouterr().err
    (out / "distill.json").unlink()
    path = out / "checkpoint-000002"
    save_file({"other": torch.zeros(3)}, path / "student.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["files"]["student.safetensors"] = run._digest(path / "student.safetensors")
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(SystemExit) as stop:
        train_stage1.main([*SMALL, "--iterations", "2", "--out", str(out)])
    assert stop.value.code == 2 and "does not fit these networks" in capsys.readouterr().err


@pytest.mark.parametrize("harm", [
    lambda f: (f / "state.json").write_text((f / "state.json").read_text()[:-20]),
    lambda f: (f / "state.json").write_text(""),
    lambda f: (f / "state.json").write_text('{"iteration": 2, "files": {"../../x": "0"}}'),
    lambda f: (f / "state.json").unlink(),
    lambda f: os.truncate(f / "student.safetensors", 1000),
    lambda f: os.truncate(f / "fake_score_optimizer.safetensors", 0),
    lambda f: (f / "fake_score.safetensors").unlink(),
    lambda f: (f / "student_optimizer.safetensors").write_bytes(b"\xff" * 64)])
def test_a_checkpoint_cut_or_corrupted_anywhere_is_passed_over(harm, finished, tmp_path, capsys):
    """Hashes, names and JSON; catches a loader that trusts what it finds, or crashes on it."""
    for i in (1, 2):
        shutil.copytree(finished / f"checkpoint-00000{i}", tmp_path / f"checkpoint-00000{i}")
    shutil.copy(finished / "settings.json", tmp_path)
    harm(tmp_path / "checkpoint-000002")
    iteration, parts = run.Run(tmp_path, {}).resume()
    assert iteration == 1 and set(parts) == {"student", "fake_score", "student_optimizer",
                                             "fake_score_optimizer"}
    assert "checkpoint-000002 is damaged" in capsys.readouterr().err


def test_a_write_killed_at_any_of_its_steps_leaves_the_old_or_the_new_folder_whole(tmp_path):
    """kill -9 (os._exit, no clean-up) before the nth call that touches the disk, for every n."""
    program = """if True:
        import builtins, os, pathlib, shutil, sys
        import run
        left = [int(sys.argv[2])]
        def deadly(call):
            def wrapped(*a, **k):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return call(*a, **k)
            return wrapped
        os.fsync, shutil.rmtree = deadly(os.fsync), deadly(shutil.rmtree)
        pathlib.Path.rename, builtins.open = deadly(pathlib.Path.rename), deadly(open)
        pathlib.Path.mkdir = deadly(pathlib.Path.mkdir)
        run.save_whole(sys.argv[1], lambda f: [
            (f / name).write_text("new") for name in ("a", "b")])
    """
    def attempt(folder, n):
        return subprocess.run([sys.executable, "-c", program, str(folder), str(n)], cwd=HERE,
                              capture_output=True).returncode
    outcomes = []
    for n in range(30):
        folder = tmp_path / str(n) / "thing"
        run.save_whole(folder, lambda f: [(f / name).write_text("old") for name in ("a", "b")])
        code = attempt(folder, n)
        at = folder if folder.exists() else folder.with_name(".thing.old")   # between two renames
        found = [(at / name).read_text() for name in ("a", "b")]
        assert found in (["old"] * 2, ["new"] * 2), f"killed before call {n}: {found}"
        assert code in (0, 9)
        outcomes.append(found[0])
        if code == 0:
            break
        assert attempt(folder, 99) == 0 and (folder / "b").read_text() == "new", "no second try"
    assert outcomes[0] == "old" and outcomes[-1] == "new" and len(outcomes) > 8 and code == 0


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    """Whole or not at all: catches a half-written folder and a lost older one."""
    folder = tmp_path / "thing"
    run.save_whole(folder, lambda f: (f / "a").write_text("old"))

    def full_disk(f):
        (f / "a").write_text("new")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        run.save_whole(folder, full_disk)
    assert (folder / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_sigterm_saves_and_the_same_command_goes_on(finished, tmp_path, monkeypatch, capsys):
    """Pre-emptible machines: catches a signal that is lost or a checkpoint that is not written."""
    out, real = tmp_path / "stopped", run.update

    def stop(*arguments):
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(train_stage1, "update", real)
        return real(*arguments)
    monkeypatch.setattr(train_stage1, "update", stop)
    command = [*SMALL[:6], "--checkpoint-every", "100", "--iterations", "2", "--out", str(out)]
    with pytest.raises(SystemExit) as stopped:
        train_stage1.main(command)
    assert stopped.value.code == 130 and "stopped after iteration 1" in capsys.readouterr().out
    train_stage1.main(command)
    before, after = weights(finished), weights(out)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path):
    """kill -9 while it trains, then the same command: nothing of the result may differ."""
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "train_stage1.py", *SMALL, "--iterations", "1000", "--out", str(out)],
        cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (out / "checkpoint-000001").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    reached = int(run.checkpoints(out)[-1].name[-6:])
    total = max(reached + 1, 3)
    for folder in (out, tmp_path / "undisturbed"):
        train_stage1.main([*SMALL, "--iterations", str(total), "--out", str(folder)])
    before, after = weights(tmp_path / "undisturbed"), weights(out)
    assert all(torch.equal(before[key], after[key]) for key in before)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, total + 1))


@pytest.mark.parametrize("stage", [1, 2] if os.environ.get("FAULTS") else [2])
def test_runs_killed_at_random_moments_end_as_the_undisturbed_run(stage, finished, tmp_path):
    """kill -9 after a random delay, again and again, then the same command to its end. Once for
    Stage II; FAULTS=20 in the environment kills both stages 20 times."""
    faults, total = int(os.environ.get("FAULTS", 1)), 56
    script, folders = f"train_stage{stage}.py", (tmp_path / "killed", tmp_path / "undisturbed")
    words = SMALL[:2] if stage == 1 else [*STAGE2[:4], "--init", str(finished), "--fit-iterations",
                                          "2", "--match-iterations", "10"]
    words = [*words, "--iterations", str(total), "--log-every", "1", "--checkpoint-every", "7",
             "--sample-every", "100", "--out"]
    delays = random.Random(0)
    for _ in range(faults):
        process = subprocess.Popen([sys.executable, script, *words, str(folders[0])], cwd=HERE,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (folders[0] / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delays.uniform(1, 12))
        process.kill()
        process.wait()
        lines = (folders[0] / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line) for line in lines)
    for folder in folders:
        {1: train_stage1, 2: train_stage2}[stage].main([*words, str(folder)])
    before, after = (weights(folder) for folder in folders)
    assert all(torch.equal(before[key], after[key]) for key in before)
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
             for folder in folders]
    assert ([line | {"seconds": 0} for line in lines[0]]
            == [line | {"seconds": 0} for line in lines[1]])


def test_a_full_disk_is_one_line_and_costs_nothing_that_was_saved(tmp_path):
    """A real one: a tmpfs of 400 MB takes two checkpoints of 162 MB, not a third. With room again
    the same command goes on."""
    program = """if True:
        import pathlib, subprocess, sys
        import run, train_stage1
        disk = sys.argv[1]
        def mount(options):
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
        def train():
            try:
                train_stage1.main([*sys.argv[2:], "--iterations", "3", "--out", disk + "/run"])
            except SystemExit as stop:
                return stop.code
        mount("size=400m")
        assert train() == 1
        mount("remount,size=800m")
        assert train() is None and run.read_json(disk + "/run/distill.json")["iteration"] == 3
    """
    command = ["unshare", "-rm", sys.executable, "-c", program, str(tmp_path), *SMALL]
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path],
                      capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "after iteration 2" in done.stdout, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "No space left on device" in errors[0]
    assert "Traceback" not in done.stderr


def test_a_killed_making_of_the_teacher_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """tiny.py's own loop, with kill -9 between two checkpoints."""
    program = ("import sys, pathlib, tiny; tiny.SAVE_EVERY = 20; "
               "work = tiny.Settings(work=sys.argv[1]); "
               "tiny.make_text_encoder(tiny.make_tokenizer(pathlib.Path(sys.argv[2])), 0, work)")
    killed, tokens = tmp_path / "killed", tmp_path / "tokens"
    process = subprocess.Popen([sys.executable, "-c", program, str(killed), str(tokens)], cwd=HERE,
                               stderr=subprocess.DEVNULL)
    while not list(killed.glob("text_encoder_1/checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    reached = run.checkpoints(killed / "text_encoder_1")[-1].name
    assert reached < "checkpoint-000400"
    tokenizer = tiny.make_tokenizer(tokens)
    one, other = (tiny.make_text_encoder(tokenizer, 0, tiny.Settings(work=str(folder)))
                  for folder in (killed, tmp_path / "undisturbed"))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_loss_that_is_not_finite_changes_no_weight_and_stops_the_run(tmp_path, monkeypatch,
                                                                       capsys):
    broken = losses.dmd_loss
    monkeypatch.setattr(losses, "dmd_loss", lambda *a, **k: broken(*a, **k) * float("nan"))
    with pytest.raises(SystemExit) as stopped:
        train_stage1.main([*SMALL, "--iterations", "5", "--out", str(tmp_path / "nan")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "3 iterations in a row were not finite" in error
    assert "iteration 1: the gradient of student is not finite" in error
    assert "sigma of the student" in error and "of fake_score" not in error
    from safetensors.torch import load_file
    saved = load_file(tmp_path / "nan" / "checkpoint-000002" / "student.safetensors")
    start = model.load_transformer(TINY).state_dict()
    assert all(torch.equal(saved[key], start[key]) for key in saved)


@pytest.mark.parametrize("extra", [["--accumulation", "2"], ["--gradient-checkpointing"]])
def test_saving_memory_changes_no_gradient(extra, tmp_path, finished):
    """The first logged losses and gradient norms are those of the plain run, to float tolerance."""
    out = tmp_path / "saving"
    train_stage1.main([*SMALL, "--iterations", "1", "--out", str(out), *extra])
    plain, saving = (json.loads((f / "metrics.jsonl").read_text().splitlines()[0])
                     for f in (finished, out))
    for key in ("loss_fake", "loss_student", "grad_norm_fake", "grad_norm_student"):
        assert saving[key] == pytest.approx(plain[key], rel=1e-3)


def test_accumulation_changes_no_gradient_of_stage2(finished, finished2, tmp_path, monkeypatch):
    """Every turn's loss and gradient norm, and D's count, as in the plain run; nor does
    checkpointing, of the VAE too."""
    monkeypatch.setattr(train_stage2, "D_ONLY", 2)
    train_stage2.main([*STAGE2, "--init", str(finished), "--fit-iterations", "1",
                       "--match-iterations", "2", "--iterations", "4", "--out",
                       str(tmp_path / "x"), "--accumulation", "2", "--gradient-checkpointing"])
    plain, saving = ([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
                     for f in (finished2, tmp_path / "x"))
    for a, b in zip(plain, saving, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("extra", [
    ["--steps", "4", "--alpha", "1.0"], ["--form", "x0", "--importance", "paper"],
    ["--normaliser", "column", "--distance", "huber", "--steps", "1"]])
def test_every_switch_of_the_method_trains(extra, tmp_path):
    out = tmp_path / "switched"
    train_stage1.main([*SMALL, "--iterations", "1", "--out", str(out), *extra])
    line = json.loads((out / "metrics.jsonl").read_text())
    assert math.isfinite(line["loss_student"]) and line["grad_norm_student"] > 0


@pytest.fixture(scope="session")
def small_sd3(tmp_path_factory):
    """SD3-Medium's pipeline (three text encoders, 16 latent channels) of reduced width, random
    weights, on disk."""
    from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                           StableDiffusion3Pipeline)
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    folder = tmp_path_factory.mktemp("models") / "small-sd3"
    tokenizer = tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    clip = [CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, projection_dim=16,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        eos_token_id=tokenizer.eos_token_id)) for _ in range(2)]
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{
            **model.PRESETS["sd3-medium"].architecture, "sample_size": 8, "num_layers": 2,
            "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 32,
            "caption_projection_dim": 16, "pooled_projection_dim": 32}),
        vae=AutoencoderKL(
            latent_channels=16, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip[0], text_encoder_2=clip[1], tokenizer=tokenizer, tokenizer_2=tokenizer,
        tokenizer_3=tokenizer, text_encoder_3=T5EncoderModel(T5Config(
            vocab_size=len(tokenizer), d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=8)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(folder)
    return folder


def test_a_real_models_path_runs_from_the_command_line_to_the_picture(small_sd3, tmp_path):
    """T5 and 16 channels, through the same code as tiny; catches anything that only the
    miniature has."""
    out = tmp_path / "real"
    train_stage1.main([*SMALL, "--model", str(small_sd3), "--iterations", "1", "--out", str(out)])
    sampler.main(["--checkpoint", str(out), "--prompt", "an old cat", "--num-images", "2",
                  "--out", str(tmp_path / "cat.png")])
    assert (tmp_path / "cat.png").exists()
    from safetensors.torch import load_file
    saved = load_file(out / "student" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float16}, (
        "real students are saved in half precision")


# ----------------------------------------------------------------------------- the block cache

def inputs(net, seed=0, batch=2):
    """x, prompt for any SD3 transformer."""
    g, c = seeded(seed), net.config
    return (torch.randn(batch, c.in_channels, c.sample_size, c.sample_size, generator=g),
            (torch.randn(batch, 8, c.joint_attention_dim, generator=g),
             torch.randn(batch, c.pooled_projection_dim, generator=g)))


def trained_compensation(width, seed=0):
    torch.manual_seed(seed)
    f = make_compensation(width)
    for parameter in f.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=seeded(seed))
    return f


def test_the_cache_when_off_recording_or_removed_leaves_the_stock_forward_bit_for_bit(teacher):
    x, prompt = inputs(teacher)
    with torch.no_grad():
        stock = model.velocity(teacher, x, 1.0, prompt)
        cache = BlockCache(teacher, "2-5")
        for mode in ("full", "record"):
            with cache.step(mode):
                assert torch.equal(model.velocity(teacher, x, 1.0, prompt), stock)
        cache.remove()
        assert torch.equal(model.velocity(teacher, x, 1.0, prompt), stock)
    assert not teacher._forward_hooks and not teacher._forward_pre_hooks


def test_f_at_its_start_is_plain_reuse_and_the_true_residual_is_the_full_step(teacher):
    """Catches a residual of the wrong blocks, a stream left out, an f that changes Δ0 at first."""
    x, prompt = inputs(teacher)
    later = inputs(teacher, 1)[0]
    out = {}
    with torch.no_grad():
        full = model.velocity(teacher, later, 0.75, prompt)
        for name, f in (("plain", None), ("f", make_compensation(128))):
            cache = BlockCache(teacher, (2, 5), f)
            with cache.step("record"):
                model.velocity(teacher, x, 1.0, prompt)
            with cache.step("reuse"):
                out[name] = model.velocity(teacher, later, 0.75, prompt)
            with cache.step("skip"):
                out["skip"] = model.velocity(teacher, later, 0.75, prompt)
            with cache.step("record"):
                model.velocity(teacher, later, 0.75, prompt)
            with cache.step("reuse"):
                again = model.velocity(teacher, later, 0.75, prompt)
            cache.remove()
            if f is None:
                assert torch.allclose(again, full, atol=1e-4)
    assert torch.equal(out["plain"], out["f"])
    assert not torch.allclose(out["plain"], full, atol=1e-2)
    assert not torch.allclose(out["plain"], out["skip"], atol=1e-2)


def cached_backward(checkpointing):
    """Backward through a cached second step, outside any `with` and after another call."""
    net, f = model.load_transformer(TINY), trained_compensation(128)
    x, prompt = inputs(net)
    x.requires_grad_()
    cache = BlockCache(net, "2-5", f)
    if checkpointing:
        net.enable_gradient_checkpointing()
    with cache.step("record"):
        first = model.velocity(net, x, 1.0, prompt)
    x1 = (x - 0.25 * first).detach()
    with cache.step("reuse"):
        v = model.velocity(net, x1, 0.75, prompt)
    with torch.no_grad(), cache.step("record"):
        model.velocity(net, x1, 0.75, prompt)
    v.square().mean().backward()
    assert x.grad is None, "gradient reached the first step"
    return net, f


def test_gradient_reaches_f_and_the_blocks_that_ran_and_nothing_else():
    net, f = cached_backward(checkpointing=False)
    reached = [any(p.grad is not None for p in block.parameters())
               for block in net.transformer_blocks]
    assert reached == [not 2 <= i <= 5 for i in range(12)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in f.parameters())


def test_checkpointing_gives_the_cached_step_the_same_gradients():
    """Backward runs blocks again: catches a branch that belongs to the cache, not to the call."""
    plain, saving = cached_backward(False), cached_backward(True)
    for one, other in zip(plain, saving, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name, billions, blocks, width, norms, dual, side", [
    ("sd3-medium", 2.028, 24, 1536, 0, 0, 192),
    ("sd3.5-medium", 2.243, 24, 1536, 4, 13, 384),
    ("sd3.5-large", 8.057, 38, 2432, 4, 0, 192)])
def test_presets_have_the_published_architecture(name, billions, blocks, width, norms, dual, side):
    """Parameters, blocks, width, qk-norm, dual attention, largest latent side, all from the built
    network; catches a preset that some default fills in differently."""
    from diffusers import SD3Transformer2DModel
    with torch.device("meta"):
        net = SD3Transformer2DModel(**model.PRESETS[name].architecture)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(billions * 1e9, rel=5e-4)
    assert (len(net.transformer_blocks), net.inner_dim) == (blocks, width)
    attention = net.transformer_blocks[0].attn
    assert sum(getattr(attention, key) is not None for key in (
        "norm_q", "norm_k", "norm_added_q", "norm_added_k")) == norms
    assert [block.attn2 is not None for block in net.transformer_blocks] == (
        [True] * dual + [False] * (blocks - dual))
    assert net.pos_embed.pos_embed.shape == (1, side ** 2, width)
    assert (net.config.sample_size, net.config.in_channels, net.config.patch_size) == (128, 16, 2)


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_the_cache_fits_the_block_shapes_of_the_real_models(name):
    """qk-norm, dual attention, no qk-norm: reduced width, autocast in bf16."""
    from diffusers import SD3Transformer2DModel
    torch.manual_seed(0)
    net = SD3Transformer2DModel(**{
        **model.PRESETS[name].architecture, "num_layers": 4, "num_attention_heads": 2,
        "attention_head_dim": 8, "caption_projection_dim": 16, "joint_attention_dim": 32,
        "pooled_projection_dim": 32, "sample_size": 8}).eval()
    x, prompt = inputs(net)
    cache = BlockCache(net, "1-2", make_compensation(16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with cache.step("record"):
            full = model.velocity(net, x, 0.75, prompt)
        with cache.step("reuse"):
            assert torch.allclose(model.velocity(net, x, 0.75, prompt), full, atol=0.05)


@pytest.mark.parametrize("span, message", [
    ("5-2", "reversed"), ("2-11", "last one cannot be cached"), ("2-40", "out of range"),
    ("2,4", "without gaps"), ("2-3-4", "without gaps"), ("", "first-last"), ("-1-3", "first-last")])
def test_a_bad_span_is_refused_before_any_hook_is_set(teacher, span, message):
    with pytest.raises(run.UserError, match=message):
        BlockCache(teacher, span)
    assert not teacher._forward_pre_hooks and not teacher.time_text_embed._forward_hooks


def test_f_takes_the_bf16_residual_that_autocast_records():
    """On a GPU Δ0 is bf16 and f stays in fp32; catches a dtype mismatch that no CPU run meets."""
    f = trained_compensation(16)
    out = f["image"](torch.randn(2, 3, 16).bfloat16())
    assert out.dtype == torch.float32 and torch.isfinite(out).all()


def test_nfe_counts_the_papers_numbers():
    assert nfe(2, (2, 9), 24) == pytest.approx(1.667, abs=1e-3) and nfe(2, (2, 7), 24) == 1.75
    assert nfe(2, (2, 11), 38) == pytest.approx(1.737, abs=1e-3)
    assert nfe(2, (2, 5), 12) == pytest.approx(1.667, abs=1e-3)
    parameters = sum(p.numel() for p in make_compensation(1536).parameters())
    assert parameters == pytest.approx(18.9e6, rel=0.01)


def test_the_nfe_meter_gives_the_known_numbers():
    """By FLOPs with f, 1024² and 333 text tokens; catches a counter that misses attention."""
    for name, span, flops, with_f in (("sd3-medium", "2-9", 1.666, 1.676),
                                      ("sd3-medium", "2-7", 1.750, 1.759),
                                      ("sd3.5-medium", "2-9", 1.608, 1.615),
                                      ("sd3.5-large", "2-11", 1.737, 1.743)):
        counted = sampler.count_nfe(model.PRESETS[name], span)
        assert counted["flops"] == pytest.approx(flops, abs=1e-3)
        assert counted["flops_with_f"] == pytest.approx(with_f, abs=1e-3)


def test_a_stock_pipeline_call_takes_the_cached_path(stock_pipe):
    """Three lines around pipe(...): the timestep alone tells record from reuse."""
    net, f = stock_pipe.transformer, trained_compensation(128)
    captions, noise = tiny.CAPTIONS[:2], sampler.image_noise(0, range(2), (4, 8, 8))
    cache = BlockCache(net, "2-5", f)
    theirs = stock_latents(stock_pipe, captions, noise, sigmas=[1.0, 0.5], num_inference_steps=2,
                           guidance_scale=1.0)
    with torch.inference_mode():
        ours = sampler.roll_out(net, noise, model.encode_prompts(TINY, captions, "cpu"),
                                sampler.sigma_grid(2), cache)[0][-1]
        cache.remove()
        plain = sampler.roll_out(net, noise, model.encode_prompts(TINY, captions, "cpu"),
                                 sampler.sigma_grid(2))[0][-1]
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(ours, plain, atol=1e-2)


# ----------------------------------------------------------------------------- Stage II

STAGE2 = ["--batch-size", "4", "--references", "8", "--log-every", "1", "--checkpoint-every", "2",
          "--sample-every", "100", "--match-iterations", "0"]


@pytest.fixture(scope="session")
def finished2(finished, tmp_path_factory):
    """A Stage II run: one fit of f, two turns of the match, then turns of D and G (the D-only
    start cut short)."""
    out = tmp_path_factory.mktemp("runs") / "finished2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage2, "D_ONLY", 2)
        train_stage2.main([*STAGE2, "--init", str(finished), "--fit-iterations", "1",
                           "--match-iterations", "2", "--iterations", "4", "--out", str(out)])
    return out


def test_turns_are_the_official_ones():
    """The fit, the match by turns, 50 turns of D alone, then 2 D : 1 G: 1317 turns of G in 4000."""
    turns = [train_stage2.turn_of(i, 296, 4) for i in range(4300)]
    assert turns[:296] == ["fit"] * 296 and turns[296:300] == ["fake score", "match"] * 2
    assert "generator" not in turns[300:350]
    assert turns[300:].count("generator") == 1317 and turns[300:].count("discriminator") == 2683


def test_a_stage2_run_leaves_what_the_contract_says(finished, finished2):
    recipe = json.loads((finished2 / "distill.json").read_text())
    assert recipe["cached_blocks"] == "1-4" and recipe["nfe"] == pytest.approx(1.6667, abs=1e-4)
    assert recipe["stage"] == 2 and recipe["iteration"] == 7
    before, after = weights(finished), weights(finished2)
    moved = {key.split(".")[1] for key in before if key.startswith("transformer_blocks.")
             and not torch.equal(before[key], after[key])}
    # (the only match turn of this run drew step two)
    assert moved and not moved & {"1", "2", "3", "4"}, "skipped blocks get no gradient"
    from safetensors.torch import load_file
    assert load_file(finished2 / "compensation.safetensors")["image.down.weight"].abs().sum() > 0


def test_a_resumed_stage2_run_is_the_undisturbed_one_bit_for_bit(finished, finished2, tmp_path,
                                                                monkeypatch):
    monkeypatch.setattr(train_stage2, "D_ONLY", 2)
    out = tmp_path / "resumed2"
    for iterations in ("2", "4"):
        train_stage2.main([*STAGE2, "--init", str(finished), "--fit-iterations", "1",
                           "--match-iterations", "2", "--iterations", iterations,
                           "--out", str(out)])
    before, after = weights(finished2), weights(out)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_neither_turn_leaks_gradient_into_the_other(finished, tmp_path, monkeypatch):
    """Generator turns leave the discriminator's gradients empty, and the other way round. Only the
    discriminator sees the references' noises again: what is fitted on them is learnt by heart. And
    the match, both of its turns, has Stage I's betas.
    """
    seen, real, indices, draw = [], run.update, [], sampler.image_noise
    monkeypatch.setattr(sampler, "image_noise", lambda seed, i, shape, who="image": (
        indices.append(max(map(int, i))) if who == "training" else None,
        draw(seed, i, shape, who))[1])

    def spy(optimizers, max_norm=math.inf):
        live = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        every = [p for o in spy.all for g in o.param_groups for p in g["params"]]
        seen.append((len(optimizers), *{g["betas"] for o in optimizers for g in o.param_groups}))
        assert all(p.grad is None for p in every if id(p) not in live)
        return real(optimizers, max_norm)
    spy.all, build = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda *a, **k: (spy.all.append(build(*a, **k)), spy.all[-1])[1])
    monkeypatch.setattr(train_stage2, "D_ONLY", 1)
    monkeypatch.setattr(train_stage2, "update", spy)
    train_stage2.main([*STAGE2, "--init", str(finished), "--fit-iterations", "1",
                       "--match-iterations", "2", "--iterations", "4", "--out",
                       str(tmp_path / "leak")])
    one, two = train_stage1.BETAS, train_stage2.BETAS
    assert seen == [(1, two), (1, one), (2, one), (1, two), (1, two), (1, two), (2, two)]
    assert len(spy.all) == 4
    assert [index >= 8 for index in indices] == [False, True, True, True, False, False, False,
                                                 True]


def test_the_discriminator_is_told_the_caption_unless_it_is_not_to_be():
    """Every head's logits change with the caption, not with the length of its embedding."""
    pictures, pooled = torch.rand(2, 3, 32, 32, generator=seeded()), torch.randn(
        2, 64, generator=seeded())
    told, blind = (model.Discriminator(TINY, prompt).eval() for prompt in (64, None))
    for one, same, other in zip(*(told(pictures, p) for p in (pooled, 3 * pooled, pooled.flip(0))),
                                strict=True):
        assert torch.allclose(one, same, atol=1e-4) and not torch.allclose(one, other, atol=1e-2)
    for one, other in zip(blind(pictures, pooled), blind(pictures, pooled.flip(0)), strict=True):
        assert torch.equal(one, other)


def test_the_match_begins_where_stage_one_stopped(finished, tmp_path):
    """Its fake score and both optimisers' states (with LoRA only the fake score's); the base model
    and fresh optimisers where no sound checkpoint is left."""
    from safetensors.torch import load_file
    shutil.copytree(finished, tmp_path / "run")
    newest = sorted((tmp_path / "run").glob("checkpoint-*"))[-1]
    saved = load_file(newest / "fake_score.safetensors")
    moments = load_file(newest / "student_optimizer.safetensors")

    def begin(**settings):
        networks = {name: model.load_transformer(TINY) for name in ("fake_score", "student")}
        optimizers = {name: torch.optim.AdamW(net.parameters()) for name, net in networks.items()}
        train_stage2.continue_stage1(
            train_stage2.Settings(init=str(tmp_path / "run"), **settings), networks, optimizers)
        return networks["fake_score"].state_dict(), {
            name: run.optimizer_tensors(networks[name], optimizers[name]) for name in networks}
    weights, states = begin()
    assert all(torch.equal(weights[key], value) for key, value in saved.items())
    assert moments.keys() == states["student"].keys() and len(moments) > 100
    assert all(torch.equal(states["student"][key], value) for key, value in moments.items())
    weights, states = begin(lora_rank=4)
    assert states["fake_score"] and not states["student"]
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        os.truncate(folder / "fake_score.safetensors", 100)
    weights, states = begin()
    assert states == {"fake_score": {}, "student": {}}
    base = model.load_transformer(TINY).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in base.items())


def test_stage2_without_a_cache_trains_and_saves(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train_stage2, "D_ONLY", 0)
    out = tmp_path / "sfd"
    train_stage2.main([*STAGE2, "--init", str(finished), "--cached-blocks", "none",
                       "--iterations", "1", "--out", str(out)])
    assert json.loads((out / "distill.json").read_text())["nfe"] == 2
    assert not (out / "compensation.safetensors").exists()


def test_sampler_uses_the_cache_of_a_run_unless_told_not_to(finished2, tmp_path, capsys):
    for extra in ([], ["--no-cache"]):
        sampler.main(["--checkpoint", str(finished2), "--prompt", "a red circle",
                      "--num-images", "1", "--out", str(tmp_path / f"{len(extra)}.png"), *extra])
    out = capsys.readouterr().out
    assert "1.667 network evaluations" in out and "2 network evaluations" in out
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_adversarial_losses_are_the_official_ones():
    """Σ over heads, real target 0.8, fake 0, generator 0.8; hand-computed."""
    real = [torch.tensor([[2.0]]), torch.tensor([0.5])]
    fake = [torch.tensor([[-1.0]]), torch.tensor([0.0])]

    def bce(logit, target):
        p = 1 / (1 + math.exp(-logit))
        return -target * math.log(p) - (1 - target) * math.log(1 - p)
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(
        bce(2, 0.8) + bce(0.5, 0.8) + bce(-1, 0) + bce(0, 0), rel=1e-5)
    assert losses.generator_loss(fake).item() == pytest.approx(bce(-1, 0.8) + bce(0, 0.8), rel=1e-5)


# ----------------------------------------------------------------------------- the plan

def test_planned_state_is_the_live_tensors_of_a_run(tmp_path, monkeypatch):
    """Weights, tables, optimiser and gradients, byte for byte; catches a network that is planned
    but not loaded, or the other way round, and gradients of both networks at once."""
    nets, optimizers, gradients = [], [], []
    place, build = model.place, torch.optim.AdamW
    monkeypatch.setattr(model, "place", lambda *a: (nets.append(place(*a)), nets[-1])[1])
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda *a, **k: (optimizers.append(build(*a, **k)), optimizers[-1])[1])

    def spy(*a):
        gradients.append(plan.bytes_of(p.grad for net in nets for p in net.parameters()
                                       if p.grad is not None))
        return run.update(*a)
    monkeypatch.setattr(train_stage1, "update", spy)
    train_stage1.main([*SMALL, "--iterations", "1", "--out", str(tmp_path / "x")])
    state = plan.state_of(1, plan.meta_transformer(model.check_base(TINY)), half=False)
    planned = {what: size for what, (size, _) in state.items()}
    assert [planned["teacher"], planned["student"], planned["fake score"]] == [
        plan.bytes_of(net.parameters()) for net in nets]
    assert planned["position tables"] == plan.bytes_of(b for net in nets for b in net.buffers())
    assert planned["optimiser, both"] == plan.bytes_of(
        t for o in optimizers for slots in o.state.values()
        for name, t in slots.items() if name != "step")
    assert gradients == [planned["gradients, one at a time"]] * 2


def test_planned_activations_are_those_of_the_true_path():
    """From one block's probe, with and without checkpointing, within 15 % of what a whole forward
    of SD3-Medium's 24 blocks, of reduced width, keeps."""
    from diffusers import SD3Transformer2DModel
    net = SD3Transformer2DModel(**{
        **model.PRESETS["sd3-medium"].architecture, "num_attention_heads": 2, "sample_size": 16,
        "attention_head_dim": 32, "caption_projection_dim": 64, "joint_attention_dim": 32,
        "pooled_projection_dim": 32})
    x, prompt = inputs(net)
    tokens = x.shape[2] * x.shape[3] // 4, prompt[0].shape[1]
    kept = plan.block_bytes(plan.meta_transformer(net.config), tokens, half=False)
    for i, checkpointing in enumerate((False, True)):
        if checkpointing:
            net.enable_gradient_checkpointing()
        live, _ = plan.saved_bytes(lambda: model.velocity(net, x, 0.75, prompt), net.parameters())
        assert len(x) * sum(block[i] for block in kept) == pytest.approx(live, rel=0.15)


def test_passes_of_an_iteration_are_those_that_the_plan_says(finished, tmp_path, monkeypatch):
    """Blocks run, each sample's counted, with gradient 3: Stage I 11 passes as the official code;
    Stage II 5/3 in D's turn and 3 in G's, where the official code has 8. Catches an unused pass."""
    from diffusers.models.attention import JointTransformerBlock
    forward, count, passes = JointTransformerBlock.forward, [0], []

    def counted(self, hidden_states, *a, **k):
        count[0] += len(hidden_states) * (3 if torch.is_grad_enabled() else 1) / (12 * 4)
        return forward(self, hidden_states, *a, **k)

    def spy(*a):
        passes.append(count[0])
        return run.update(*a)
    monkeypatch.setattr(JointTransformerBlock, "forward", counted)
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a, **k: None)
    monkeypatch.setattr(train_stage2, "D_ONLY", 0)
    monkeypatch.setattr(train_stage2, "update", spy)
    train_stage1.main([*SMALL, "--iterations", "1", "--out", str(tmp_path / "1")])
    assert count[0] == pytest.approx(11)
    train_stage2.main([*STAGE2, "--init", str(finished), "--fit-iterations", "1",
                       "--match-iterations", "2", "--iterations", "2", "--out",
                       str(tmp_path / "2")])
    fake, match, generator, discriminator = (b - a for a, b in itertools.pairwise(passes))
    assert (generator, discriminator) == pytest.approx((3, 5 / 3))
    # of step one, or of the cached step two after it
    assert fake in (pytest.approx(1 + 3), pytest.approx(5 / 3 + 3)) and match == pytest.approx(6)


@pytest.mark.parametrize("script, options, words", [
    (train_stage1, [], ["11.00 transformer passes", "fits 1 GPU with --gradient-checkpointing"]),
    (train_stage2, ["--init", "none"], ["G's turn: 3.03 transformer passes", "disk: 24.6 GB"]),
    (train_stage2, ["--init", "none", "--match-iterations", "2"],
     ["fake score's turn: 4.34", "in the match: 6.01", "disk: 49.0 GB"])])
def test_a_real_model_is_planned_without_its_weights(script, options, words, tmp_path, capsys,
                                                     monkeypatch):
    monkeypatch.chdir(tmp_path)
    script.main(["--dry-run", "--model", "sd3-medium", "--out", str(tmp_path / "x"), *options])
    out = capsys.readouterr().out
    assert all(word in out for word in words), out


# ----------------------------------------------------------------------------- several processes

def trained(base, out, init, more=()):
    """Both stages on the pipeline folder `base`, and out/STAGE-N.safetensors: the gradients of each
    update, averaged and clipped. In one process, or in each one of torchrun."""
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    def spy(stage):
        updates = []

        def wrapped(optimizers, max_norm=math.inf):
            grads = [p.grad for o in optimizers for g in o.param_groups for p in g["params"]]
            norm = run.update(optimizers, max_norm)
            whole = {str(i): (g.full_tensor() if isinstance(g, DTensor) else g).contiguous()
                     for i, g in enumerate(grads) if g is not None}
            if run.World().first:
                save_file(whole, out / f"{stage}-{len(updates)}.safetensors")
            updates.append(len(whole))
            return norm
        return wrapped
    out.mkdir(exist_ok=True)
    found = dataclasses.replace(model.find_preset(str(base)), discriminator=TINY.discriminator)
    common = ["--model", str(base), "--batch-size", "4", "--log-every", "1", "--sample-every", "9",
              "--checkpoint-every", "1", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "find_preset", lambda name: found)
        patch.setattr(train_stage2, "D_ONLY", 0)   # turns: fit, fake score, match, G, D
        patch.setattr(train_stage1, "update", spy("stage1"))
        patch.setattr(train_stage2, "update", spy("stage2"))
        train_stage1.main([*common, "--iterations", "2", "--out", str(out / "stage1")])
        train_stage2.main([
            *common, "--init", str(init / "stage1"), "--out", str(out / "stage2"),
            "--cached-blocks", "0-0", "--references", "4", "--warmup", "0",
            "--fit-iterations", "1", "--match-iterations", "2", "--iterations", "2",
            "--compensation-lr", "1e-3"])


def unfinished(source, target):
    """A copy of trained()'s runs as they were before their last iteration."""
    shutil.copytree(source, target)
    for stage, newest in (("stage1", 2), ("stage2", 5)):
        shutil.rmtree(target / stage / f"checkpoint-{newest:06d}")
        shutil.rmtree(target / stage / "student")
        recipe = json.loads((target / stage / "distill.json").read_text())
        run.write_json(target / stage / "distill.json", recipe | {"iteration": 0})


@pytest.fixture(scope="session")
def one_and_two(small_sd3, tmp_path_factory):
    """A folder of the same runs: "one" by one process, "two" by two, "one-two" begun by one and
    ended by two, "two-one" the other way round."""
    folder = tmp_path_factory.mktemp("processes")
    trained(small_sd3, folder / "one", folder / "one")
    unfinished(folder / "one", folder / "one-two")
    script = folder / "two.py"
    script.write_text(
        "import pathlib, test_all\n"
        f"base, folder = pathlib.Path({str(small_sd3)!r}), pathlib.Path({str(folder)!r})\n"
        "for name in ('two', 'one-two'):\n"
        "    test_all.trained(base, folder / name, folder / 'one')\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("look at") == 4, "only the first process prints"
    unfinished(folder / "two", folder / "two-one")
    trained(small_sd3, folder / "two-one", folder / "one")
    return folder


@pytest.mark.parametrize("update", ["stage1-0", "stage1-1", *(f"stage2-{i}" for i in range(5))])
def test_two_processes_give_the_gradients_of_one(update, one_and_two):
    """Fake score, student; f, fake score, student and f, G, D. Catches a batch that is not sliced,
    a loss that is summed, small networks whose gradients nobody averages."""
    from safetensors.torch import load_file
    one, two = (load_file(one_and_two / name / f"{update}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        scale = one[key].abs().max()
        assert torch.allclose(two[key], one[key], atol=1e-3 * scale + 1e-7), key


@pytest.mark.parametrize("name", ["two", "one-two", "two-one"])
def test_a_run_goes_on_under_another_number_of_processes(name, one_and_two):
    """Every line of the metrics is the same, and the weights but for Adam's amplified noise:
    with β1 = 0 its first steps are nearly the gradient's sign."""
    for stage in ("stage1", "stage2"):
        lines, same = ([json.loads(line) for line in
                        (one_and_two / who / stage / "metrics.jsonl").read_text().splitlines()]
                       for who in ("one", name))
        assert len(lines) == len(same)
        for a, b in zip(lines, same, strict=True):
            for key in a.keys() - {"seconds"}:
                assert b[key] == (a[key] and pytest.approx(a[key], rel=1e-2, abs=1e-4)), key
        before, after = weights(one_and_two / "one" / stage), weights(one_and_two / name / stage)
        assert before.keys() == after.keys()
        for key in before:
            moved = (after[key] - before[key]).float().abs()
            assert moved.mean() < 2e-6 and moved.max() < 1e-3, key


# ----------------------------------------------------------------------------- commands

def test_sampler_makes_a_grid_from_a_run_that_is_not_finished(finished, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished)
    shutil.rmtree(unfinished / "student")
    for folder, name in ((finished, "a.png"), (unfinished, "b.png")):
        sampler.main(["--checkpoint", str(folder), "--prompt", "a red circle", "--num-images", "4",
                      "--seed", "3", "--out", str(tmp_path / name)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "4 images" in capsys.readouterr().out


def test_evaluate_writes_the_table_and_the_picture(finished, tmp_path):
    evaluate.main(["--checkpoint", str(finished), "--samples-per-prompt", "2", "--teacher", "no",
                   "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["data", "finished"]
    data = results["rows"][0]
    assert data["prompt_accuracy"] == 1 and data["usual_scene"] == pytest.approx(0.55, abs=0.2)
    low, high = results["rows"][1]["scene_entropy_interval"]
    assert low <= results["rows"][1]["scene_entropy"] <= high
    assert results["protocol"]["samples_per_prompt"] == 2 and (tmp_path / "grid.png").exists()


def test_results_of_another_protocol_are_refused_and_of_the_same_are_added(finished, tmp_path,
                                                                           capsys):
    """Catches one table of different seeds, n or feature networks, and a refusal after minutes."""
    words = ["--checkpoint", str(finished), "--samples-per-prompt", "2", "--teacher", "no", "--out"]
    (tmp_path / "two.txt").write_text("a red circle\na blue cross\n")
    words = ["--prompts", str(tmp_path / "two.txt"), *words]
    evaluate.main([*words, str(tmp_path / "a")])
    path = tmp_path / "a" / "results.json"
    other = json.loads(path.read_text())
    other["rows"][1]["name"], other["rows"][1]["recipe"]["iteration"] = "older", 1
    path.write_text(json.dumps(other))
    evaluate.main([*words, str(tmp_path / "b"), "--add", str(path)])
    rows = json.loads((tmp_path / "b" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["data", "finished", "older"], "the data came twice"
    other["protocol"] |= {"seed": 7, "metric_backbone_sha256": "0"}
    path.write_text(json.dumps(other))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*words, str(tmp_path / "c"), "--add", str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "seed is 7 there, 1 here" in error
    assert "metric_backbone_sha256 is 0 there" in error and "commit" not in error
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="session")
def small_meters(tmp_path_factory):
    """Options for evaluate.py: a CLIPModel and a Dinov2Model of reduced width, random weights."""
    from transformers import (BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel,
                              CLIPProcessor, Dinov2Config, Dinov2Model)
    folder = tmp_path_factory.mktemp("meters")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    size = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    text = dict(**small, vocab_size=len(tokenizer), max_position_embeddings=8,
                eos_token_id=tokenizer.eos_token_id)
    for name in ("clip", "pickscore"):
        CLIPModel(CLIPConfig(text_config=text, projection_dim=8, vision_config=dict(
            **small, image_size=16, patch_size=8))).save_pretrained(folder / name)
        CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder / name)
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                             image_size=16, patch_size=8)).save_pretrained(folder / "dino")
    BitImageProcessor(**size).save_pretrained(folder / "dino")
    return {name: folder / name for name in ("clip", "pickscore", "dino")}


@pytest.fixture(scope="session")
def small_evaluation(small_sd3, small_meters, tmp_path_factory):
    """(command, OUT) of an evaluation of a real model's two stages, made once."""
    folder = tmp_path_factory.mktemp("real")
    trained(small_sd3, folder, folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "an old cat"}\n{"prompt": "a red ../fox"}\n')
    words = ["--model", str(small_sd3), "--checkpoint", str(folder / "stage1"),
             str(folder / "stage2"), "--prompts", str(folder / "prompts.jsonl"),
             "--samples-per-prompt", "3", "--out", str(folder / "out")]
    for name, path in small_meters.items():
        words += [f"--{name}", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lpips", None)                     # as if not installed
        evaluate.main(words)
    return words, folder / "out"


def test_real_models_are_measured_by_the_same_command(small_evaluation):
    """From run and prompts to table, offline. Catches a column of one world asked of the other,
    and pictures without prompt or seed."""
    _, out = small_evaluation
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [
        "teacher, w = 7 for sigma <= 0.94", "teacher, w = 7 everywhere", "teacher, no guidance",
        "teacher at 2 steps, not distilled", "stage1", "stage1, plain reuse",
        "stage1, span skipped", "stage2", "stage2, no cache", "stage2, plain reuse"]
    assert [row["nfe_blocks"] for row in results["rows"][4:]] == [2, 1.5, 1.5, 1.5, 2, 1.5]
    assert len({row["pick_score"] for row in results["rows"]}) == 10, "two paths are one"
    student = results["rows"][7]
    for name in ("clip_score", "pick_score", "diversity", "frechet_to_teacher"):
        assert math.isfinite(student[name]) and len(student[f"{name}_interval"]) == 2
    assert abs(student["clip_score"]) <= 1 < abs(student["pick_score"] / student["clip_score"])
    for name in ("prompt_accuracy", "usual_scene", "scene_entropy", "frechet_to_data", "lpips"):
        assert student[name] is student[f"{name}_interval"] is None
    assert "pip install lpips" in results["missing"]["lpips"]
    assert student["speedup"] > 1 and results["rows"][1]["nfe_blocks"] == 56
    assert {"clip_sha256", "dino_sha256", "resize", "commit"} <= results["protocol"].keys()
    assert not {"date", "machine"} & results["protocol"].keys()
    folder = out / "images" / "stage2_plain_reuse"
    lines = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["an old cat"] * 3 + ["a red ../fox"] * 3
    assert {line["seed"] for line in lines} == {1} and lines[4]["file"] == "000004.png"
    assert len(list(out.glob("images/*/*.png"))) == 10 * 6 and (out / "grid.png").exists()


def test_an_interrupted_evaluation_makes_only_the_images_that_are_not_there(small_evaluation,
                                                                            capsys):
    """One lost, one cut, one whose line a kill cut off. Catches a whole second sampling, trust in
    half a file, and pictures of another seed that pass for these."""
    words, out = small_evaluation
    folder = out / "images" / "stage2_plain_reuse"
    before = json.loads((out / "results.json").read_text())
    (folder / "000001.png").unlink()
    os.truncate(folder / "000002.png", 60)
    log = (folder / "images.jsonl").read_text()
    (folder / "images.jsonl").write_text(log[:-30])
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("images/*/*.png")}
    evaluate.main(words)
    remade = {p.name for p in out.glob("images/*/*.png") if p.stat().st_mtime_ns != stamps.get(p)}
    assert remade == {"000001.png", "000002.png", "000005.png"}
    assert len((folder / "images.jsonl").read_text().splitlines()) == 6
    after = json.loads((out / "results.json").read_text())
    assert after["rows"][-1]["clip_score"] == pytest.approx(before["rows"][-1]["clip_score"],
                                                            abs=1e-4)
    assert after["rows"][0]["nfe_blocks"] == 51, "a row without a new image forgot its passes"
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*words, "--seed", "2"])
    assert stop.value.code == 2 and "pictures of another recipe, seed" in capsys.readouterr().err


def test_lpips_is_the_mean_over_all_pairs_of_a_prompt(small_meters, monkeypatch):
    """With a stand-in of the package: catches pairs with oneself, and pictures left in [0, 1]."""
    class Stub(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3), keepdim=True)
    package = type(sys)("lpips")
    package.LPIPS = Stub
    monkeypatch.setitem(sys.modules, "lpips", package)
    meter = metrics.RealMeter(*small_meters.values())
    levels = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 16, 16)
    with torch.inference_mode():
        values, features = meter(levels, "an old cat")
    assert values["lpips"].item() == pytest.approx((1 + 2 + 1) / 3) and not meter.missing
    assert features.shape == (3, 16)


def test_a_meter_with_weights_that_do_not_fit_or_only_pickles_is_refused(small_meters, tmp_path):
    """Catches a score by random weights, which transformers would give with a mere notice."""
    from transformers import CLIPModel
    with pytest.raises(run.UserError, match="of its weights are not there|cannot load"):
        metrics.load(CLIPModel, small_meters["dino"])
    fuse = tmp_path / "exploded"
    shutil.copytree(small_meters["clip"], tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(run.UserError, match="pickles are never opened"):
        metrics.load(CLIPModel, tmp_path / "clip")
    assert not fuse.exists()


def test_frechet_is_the_distance_of_two_gaussians_by_hand():
    """Means (0, 0) and (3, 4), variances (1, 1) and (4, 9) turned by 45°:
    25 + (1 − 2)² + (1 − 3)² = 30. Catches a missing root and a wrong divisor."""
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.double) * 1.5 ** 0.5
    turn = torch.tensor([[1.0, 1], [-1, 1]], dtype=torch.double) / 2 ** 0.5
    other = cross * torch.tensor([2, 3]) @ turn + torch.tensor([3, 4])
    assert metrics.frechet(cross, other).item() == pytest.approx(30)
    assert metrics.frechet(other.view(2, 2, 2), other).item() == pytest.approx(0, abs=1e-6)


def test_the_benchmark_times_the_cached_path_against_the_full_one(capsys):
    evaluate.main(["--benchmark", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "1.667 steps, f" in out and "whole image, text and VAE too: 28×2" in out
    assert "28×2 (56 × a batch of one)" in out


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                    reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_take_the_cache_on_and_off(teacher):
    """Full, cached and full again, compiled against eager. Catches compiling the hooks with the
    block: those that are set afterwards would never be called."""
    import copy
    x, prompt = inputs(teacher, batch=1)
    compiled, f = copy.deepcopy(teacher), make_compensation(teacher.inner_dim)
    torch.nn.init.normal_(f["image"].down.weight, std=0.02)
    benchmark.compile_blocks(compiled)
    found = []
    for net in (teacher, compiled):
        with torch.inference_mode():
            full = sampler.roll_out(net, x, prompt, sampler.sigma_grid(2))[0][-1]
            cache_on = BlockCache(net, "2-5", f)
            cached = sampler.roll_out(net, x, prompt, sampler.sigma_grid(2), cache_on)[0][-1]
            cache_on.remove()
            again = sampler.roll_out(net, x, prompt, sampler.sigma_grid(2))[0][-1]
        assert torch.equal(full, again) and not torch.allclose(full, cached, atol=1e-2)
        found.append((full, cached))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_two_runs_are_compared_caption_by_caption():
    """A run against itself changes nothing, and its interval is a point; against a worse one the
    points are the difference. Catches pairs that are mixed up."""
    drawn = [tiny.draw(*tiny.sample_labels(48, seeded(), torch.arange(24).repeat_interleave(2)))
             for _ in range(2)]
    drawn[1][:12] = 0
    good, bad = (metrics.Measured(p.view(24, 2, 3, 32, 32), tiny.CAPTIONS,
                                  metrics.TinyMeter(TINY)) for p in drawn)
    same = metrics.compare(good, good, good)
    assert same["accuracy_points_interval"] == [0, 0] and same["entropy_ratio"] == 1
    assert same["frechet_change"] == pytest.approx(0, abs=1e-6)
    worse = metrics.compare(bad, good, good)
    assert worse["accuracy_points"] == pytest.approx(-25) and worse["frechet_change"] > 0


# ----------------------------------------------------------------------------- claims

def test_claims_share_runs_and_train_stage_one_first(capsys):
    """A variant that names its folder wrongly would be judged by another variant's run."""
    claims.main(["--dry-run", "--only", "1", "parts", "alpha", "--seeds", "7"])
    lines = capsys.readouterr().out.splitlines()
    out = [line.split("--out ")[1].split()[0] for line in lines[:-1]]
    assert len(out) == len(set(out))
    assert set(out) == set(lines[-1].split("--checkpoint ")[1].split())
    stages = ["train_stage2" in line for line in lines[:-1]]
    assert stages == sorted(stages) and any(stages)
    assert "runs/claims/stage1-alpha-0.98-seed7" in out
    assert "runs/claims/stage2-fit-iterations-0-seed7" in out


@pytest.mark.parametrize("mean, spread, verdict", [
    (-0.3, 0.01, "holds"), (-1.7, 0.01, "does not hold"), (-1.0, 0.3, "not decided")])
def test_a_claim_is_judged_by_its_interval_over_seeds_and_captions(mean, spread, verdict):
    """A verdict from the point estimate alone would call noise a result."""
    g = torch.Generator().manual_seed(0)
    difference = (mean + spread * torch.randn(3, 24, generator=g)) / 100
    difference += mean / 100 - difference.mean()
    a, b = ({"prompt_accuracy": x} for x in (0.9 + difference, torch.full((3, 24), 0.9)))
    value, low, high, found = claims.judge(claims.points(a, b), "at least", -1, 3, 24)
    assert value == pytest.approx(mean, abs=1e-3) and low < value < high and found == verdict


def test_claims_reads_its_rows_by_seed_and_path():
    """Rows of another seed or path must not enter a claim; a missing path leaves its line out."""
    def row(name, level):
        return {"name": name, "nfe_blocks": 2.0, "frechet_to_teacher": level, "by_prompt": {
            key: [level] * 24 for key in ("prompt_accuracy", "usual_scene", "scene_entropy",
                                          "diversity")}}
    rows = [row("stage1-seed1", 0.5), row("stage1-seed2", 0.7), row("stage1-alpha-1-seed1", 0.1),
            row("stage1-alpha-1-seed2", 0.3), row("stage1-seed3", 9.0)]
    text = claims.report("1", claims.EXPERIMENTS["1"][1], rows, [1, 2], "runs/claims")
    assert "| Stage I | 2 | 0.600 ± 0.141" in text and "**" in text and "9.0" not in text
    assert "0.33 [" in text                                     # mean 0.2 over mean 0.6
    assert claims.gather(rows, claims.STAGE1, [1, 2], "r", ", plain reuse") is None


@pytest.fixture
def small_world(monkeypatch):
    """The miniature with one radius: 4,704 pictures to encode instead of 84,000."""
    monkeypatch.setattr(tiny, "RADII", (12,))
    for cached in (tiny.templates, tiny._template_norms):
        cached.cache_clear()
    yield
    for cached in (tiny.templates, tiny._template_norms):
        cached.cache_clear()


def test_the_teacher_can_be_made_again(small_world, tmp_path):
    """Every part of tiny.py with a step or two; catches a folder that the stock pipeline does not
    load."""
    from diffusers import StableDiffusion3Pipeline
    tiny.main(["--out", str(tmp_path / "teacher"), "--work", str(tmp_path / "work"),
               "--vae-steps", "1", "--teacher-steps", "1", "--refine-steps", "1",
               "--backbone-steps", "1", "--report-samples", "0"])
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "teacher", text_encoder_3=None,
                                                    tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=1, max_sequence_length=0,
                output_type="pt").images.shape[-1] == 32


# ----------------------------------------------------------------------------- bad input

def bad_files(folder):
    (folder / "empty.txt").write_text("\n\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (folder / "nul.txt").write_bytes(b"a red circle\na \0 circle\n")
    (folder / "long.txt").write_text("a red circle\n" + "a" * 10_001)
    (folder / "bad.jsonl").write_text('{"prompt": "a red circle"}\n{"text": "a red circle"}\n')
    (folder / "words.txt").write_text("a pink elephant\n")
    (folder / "file").write_text("a file")
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").write_text("precious")
    (folder / "model" / "transformer").mkdir(parents=True)
    (folder / "model" / "transformer" / "config.json").write_text(
        '{"_class_name": "FluxTransformer2DModel"}')
    for name, content in (("evil", {"steps": "../../etc"}), ("huge", {"steps": 10**30}),
                          ("newer", {"format": 99}), ("good", {}),
                          ("foreign", {"base": "sd3-medium"}), ("one", {"steps": 1}),
                          ("two", {"stage": 2}), ("span", {"cached_blocks": "5-2"}),
                          ("dict", {"cached_blocks": {"a": 1}}), ("init", {"init": ["x"]}),
                          ("latents", {"latent_shape": [4, 8, 10**9]}),
                          ("path", {"base": "../../etc"})):
        (folder / name).mkdir()
        (folder / name / "distill.json").write_text(json.dumps({
            "format": 1, "base": "tiny", "stage": 1, "iteration": 0, "steps": 2, "alpha": 0.94,
            "guidance": 4.0, "nfe": 2.0, "latent_shape": [4, 8, 8], **content}))
    (folder / "list").mkdir()
    (folder / "list" / "distill.json").write_text("[1]")


@pytest.mark.parametrize("arguments, message", [
    ("--colour red", "unrecognized arguments: --colour red"),
    ("--steps 0", "--steps must be at least 1, not 0"),
    ("--steps two", "--steps must be an integer, not 'two'"),
    ("--steps 2.5", "--steps must be an integer"),
    ("--alpha 2", "--alpha must be at most 1, not 2.0"),
    ("--alpha nan", "--alpha must be a finite number"),
    ("--guidance inf", "--guidance must be a finite number"),
    ("--student-lr 0", "--student-lr must be more than 0"),
    ("--batch-size 5 --accumulation 2", "--batch-size 5 is not a multiple of --accumulation 2"),
    ("--importance best", "--importance must be one of official, paper, uniform, not best"),
    ("--seed -1", "--seed must be at least 0"),
    ("--prompts FOLDER/nowhere.txt", "there is no such file"),
    ("--prompts FOLDER/other", "there is no such file"),
    ("--prompts FOLDER/empty.txt", "no prompt in it"),
    ("--prompts FOLDER/binary.txt", "not UTF-8 text"),
    ("--prompts FOLDER/nul.txt", "line 2: NUL"),
    ("--prompts FOLDER/long.txt", "line 2: NUL characters or longer than 10,000"),
    ("--prompts FOLDER/bad.jsonl", "line 2: no JSON object with a text"),
    ("--out FOLDER/file", "is a file; give --out a folder"),
    ("--out FOLDER/other", "exists and is not a run folder"),
    ("--model sd4", "there is no model sd4; use tiny, sd3-medium"),
    ("--model FOLDER/model", "holds a FluxTransformer2DModel, not an SD3Transformer2DModel"),
    ("--model FOLDER/other", "is FOLDER/other a diffusers pipeline folder?"),
    ("--model ./misspelt/folder", "there is no model ./misspelt/folder"),
    ("--model nobody/nothing", "--model tiny needs no download"),
    ("sampler.py", "--checkpoint RUN is needed"),
    ("sampler.py --checkpoint FOLDER/nowhere", "there is no run folder"),
    ("sampler.py --checkpoint FOLDER/other", "distill.json is missing"),
    ("sampler.py --checkpoint FOLDER/evil", "steps is '../../etc', not int"),
    ("sampler.py --checkpoint FOLDER/huge", "not between 1 and 1000"),
    ("sampler.py --checkpoint FOLDER/newer", "has format 99"),
    ("sampler.py --checkpoint FOLDER/span", "span 5-2 is reversed"),
    ("sampler.py --checkpoint FOLDER/dict", "cached_blocks is"),
    ("sampler.py --checkpoint FOLDER/latents", "latent_shape is"),
    ("sampler.py --checkpoint FOLDER/path", "there is no model ../../etc"),
    ("sampler.py --checkpoint FOLDER/list", "does not hold a JSON object"),
    ("evaluate.py --checkpoint FOLDER/init", "init is"),
    ("sampler.py --checkpoint FOLDER/evil --out grid.txt", "give a file name that ends in .png"),
    ("evaluate.py --checkpoint FOLDER/nowhere", "there is no run folder"),
    ("evaluate.py --checkpoint FOLDER/good --prompts FOLDER/words.txt", "the exact reader knows"),
    ("evaluate.py --checkpoint FOLDER/good --add FOLDER/good/distill.json", "is no results.json"),
    ("evaluate.py --checkpoint FOLDER/good FOLDER/other/../good", "have the same name"),
    ("evaluate.py --model sd3-medium", "real models need --checkpoint RUN and --prompts FILE"),
    ("evaluate.py --benchmark --rounds 0", "--rounds must be at least 1"),
    ("cache.py", "--checkpoint RUN is needed"),
    ("cache.py --checkpoint FOLDER/good --nfe 3", "--nfe must be at most 2"),
    ("train_stage2.py --init FOLDER/nowhere", "there is no run folder"),
    ("train_stage2.py --init FOLDER/good --cached-blocks 2-11", "last one cannot be cached"),
    ("train_stage2.py --init FOLDER/good --cached-blocks 5-2", "span 5-2 is reversed"),
    ("train_stage2.py --init FOLDER/good --reference FOLDER/good", "has no more steps than"),
    ("train_stage2.py --init FOLDER/foreign", "was distilled from sd3-medium, not from tiny"),
    ("train_stage2.py --init FOLDER/two", "is a run of Stage 2; --init takes one of Stage I"),
    ("train_stage2.py --init FOLDER/one", "has one step; a cache needs a second one"),
    ("tiny.py --out FOLDER/other", "exists; give --out another folder"),
])
def test_bad_input_gets_one_clear_line_and_writes_nothing(arguments, message, tmp_path, capsys,
                                                          monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))}
    words = [word.replace("FOLDER", str(tmp_path)) for word in arguments.split()]
    script = train_stage1
    if words[0].endswith(".py"):
        script = {"sampler.py": sampler, "evaluate.py": evaluate, "tiny.py": tiny,
                  "cache.py": cache, "train_stage2.py": train_stage2}[words.pop(0)]
    with pytest.raises(SystemExit) as stop:
        script.main(words)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message.replace("FOLDER", str(tmp_path)) in error
    assert len(error.splitlines()) == 1 and error.startswith("error: ")
    assert {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))} == before


def test_random_weights_are_for_trying_a_machine_only(small_sd3, tmp_path, capsys):
    out = tmp_path / "random"
    train_stage1.main([*SMALL, "--model", str(small_sd3), "--random-weights", "--resolution", "32",
                       "--iterations", "1", "--out", str(out)])
    with pytest.raises(SystemExit):
        sampler.main(["--checkpoint", str(out)])
    assert "was made with --random-weights" in capsys.readouterr().err


def test_stage2_of_random_weights_takes_a_stage1_of_random_weights(small_sd3, tmp_path,
                                                                   monkeypatch, capsys):
    """Without any weights on the disk: a small architecture in place of the preset's."""
    shape = dict(sample_size=4, num_layers=3, num_attention_heads=2, attention_head_dim=8,
                 caption_projection_dim=16)
    small = dataclasses.replace(model.PRESETS["sd3-medium"], fit_iterations=0, warmup=0,
                                architecture={**model.PRESETS["sd3-medium"].architecture, **shape})
    monkeypatch.setitem(model.PRESETS, "sd3-medium", small)
    monkeypatch.setattr(train_stage2, "D_ONLY", 0)
    common = ["--model", "sd3-medium", "--random-weights", "--batch-size", "1", "--sample-every",
              "9", "--iterations", "1"]
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a, **k: None)
    train_stage1.main([*common, "--out", str(tmp_path / "one")])
    monkeypatch.setattr(sampler, "TEACHER_STEPS", 2)
    train_stage2.main([*common, "--init", str(tmp_path / "one"), "--references", "1",
                       "--cached-blocks", "0-1", "--out", str(tmp_path / "two")])
    line = json.loads((tmp_path / "two" / "metrics.jsonl").read_text())
    assert math.isfinite(line["loss_g"]) and line["norm_g"] > 0
    with pytest.raises(SystemExit):
        train_stage2.main(["--model", "sd3-medium", "--init", str(tmp_path / "one")])
    assert "error" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_named_and_refused(finished, capsys):
    with pytest.raises(SystemExit):
        train_stage1.main([*SMALL, "--iterations", "3", "--alpha", "0.9", "--out", str(finished)])
    assert "alpha was 0.94, is 0.9" in capsys.readouterr().err


def test_prompt_files_of_windows_and_json_lines_are_read(tmp_path):
    (tmp_path / "w.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\na blue cross\r\n")
    (tmp_path / "j.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": " a blue cross "}\n')
    for name in ("w.txt", "j.jsonl"):
        assert model.read_prompts(tmp_path / name) == ["a red circle", "a blue cross"]


def test_unknown_words_get_a_warning(capsys):
    model.warn_unknown_words(TINY, ["a red circle", "a pink circle"])
    assert "does not know pink" in capsys.readouterr().err


def test_dry_run_prints_settings_and_writes_nothing(tmp_path, capsys):
    train_stage1.main(["--dry-run", "--out", str(tmp_path / "x")])
    assert ("alpha                   0.94" in capsys.readouterr().out
            and not list(tmp_path.iterdir()))


# ----------------------------------------------------------------------------- the text itself

def test_every_public_function_and_class_has_a_docstring():
    for module in (losses, model, cache, plan, run, sampler, tiny, metrics, benchmark, evaluate,
                   claims, train_stage1, train_stage2):
        for name, thing in vars(module).items():
            if inspect.isfunction(thing) and thing.__module__ == module.__name__ \
                    and not name.startswith("_") and name != "main":
                assert thing.__doc__, f"{module.__name__}.{name}"


def test_losses_knows_only_torch():
    tree = ast.parse((HERE / "losses.py").read_text())
    names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    assert names == {"torch"} and not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]


def test_the_readmes_reading_order_names_real_files_and_functions():
    """| `file` | part of the method | `function`, … | rows; catches a table that outlived
    a rename."""
    rows = [line for line in (HERE / "README.md").read_text().splitlines()
            if line.startswith("| `") and ".py`" in line]
    assert len(rows) >= 6
    for row in rows:
        file, *_, functions = [cell.strip() for cell in row.strip("|").split("|")]
        text = (HERE / file.strip("`")).read_text()
        for name in functions.replace("`", "").split(", "):
            assert f"def {name}(" in text or f"class {name}" in text, f"{file}: {name}"


class Bomb:
    """Unpickling it makes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_any_place_where_weights_are_looked_for_is_never_opened(finished, tmp_path,
                                                                           capsys):
    """Run folders and base models of a stranger: .bin files, and pickles named .safetensors."""
    fuse, stranger, base = tmp_path / "exploded", tmp_path / "run", tmp_path / "base"
    bomb = pickle.dumps(Bomb(fuse))
    for extension in ("bin", "safetensors"):
        shutil.copytree(finished, stranger)
        shutil.copytree(TINY.source, base)
        for path in [*stranger.rglob("*.safetensors"), *base.rglob("*.safetensors")]:
            path.with_suffix(f".{extension}").write_bytes(bomb)
            for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
                (path.parent / name).write_bytes(bomb)
            if extension == "bin":
                path.unlink()
        for script, words in ((sampler, ["--checkpoint", str(stranger)]),
                              (train_stage1, ["--model", str(base), "--out", str(tmp_path / "x"),
                                              "--iterations", "1"])):
            with pytest.raises(SystemExit) as stop:
                script.main(words)
            assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
        assert not fuse.exists()
        shutil.rmtree(stranger)
        shutil.rmtree(base)
    assert pickle.loads(bomb) is None and fuse.exists(), "the bomb itself is sound"


def test_nothing_unpickles_or_runs_foreign_code():
    for path in HERE.glob("*.py"):
        if path.name != "test_all.py":
            text = path.read_text()
            for word in ("torch.load", "import pickle", "trust_remote_code", "shell=True", "eval(",
                         "exec("):
                assert word not in text.replace(".eval(", ""), f"{path.name}: {word}"
