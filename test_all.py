"""What the project claims: conventions and equations, Stage I, the cache, the samplers, Stage II,
the evaluation, runs. Names are sentences; a docstring says which mistake a test would catch. More
of stock pipelines, several processes, kills, real models and the tools is tested in
tools/test_*.py.

    python -m pytest -q test_all.py

Two kinds of tests carry the rest. An equation is computed by hand. And every turn of both loops is
computed a second time here, in plain tensor code written from the documented formulas, and its
gradients are compared with those that the script really produces ("is its formulas"). What it
takes from ours, f, D and the decoder, has tests of its own.
"""

import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

# Numbers are compared bit for bit, and processes find each other by gloo: all tests run on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import run
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

import evaluate
import losses
import model
import sampler
import train_stage1
import train_stage2
from cache import NOTHING, BlockCache, CachedSD3, make_compensation, nfe
from losses import (dmd_loss, dmd_loss_official, draw_sigma, euler, fake_score_loss,
                    guidance_weight, guide, importance_curve, renoise, shift_sigma,
                    x0_from_velocity)
from tiny.world import CAPTIONS, draw, sample_labels, templates

HERE, CPU = Path(__file__).parent, torch.device("cpu")
TINY = model.PRESETS["tiny"]
SHAPE = (4, 8, 8)                                         # of the miniature's latents
# Large rates, so that all networks move visibly and are different ones after an iteration.
STAGE1 = ["--batch-size", "8", "--student-lr", "1e-3", "--fake-lr", "2e-3", "--log-every", "1",
          "--sample-every", "2", "--checkpoint-every", "1"]
# What must change no gradient: the batch in parts, blocks that run again in backward.
SAVING = ["--gradient-checkpointing", "--accumulation"]
STAGE2 = ["--batch-size", "4", "--references", "8", "--warmup", "0", "--student-lr", "1e-3",
          "--compensation-lr", "5e-3", "--discriminator-lr", "1e-2", "--log-every", "1",
          "--sample-every", "100", "--checkpoint-every", "2", *SAVING, "2"]


# ================================================================== what many tests need

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def metrics(folder):
    """The lines of a run's metrics.jsonl without the seconds, which no two runs share, and what was
    read in its pictures, which most tests leave out. NaN, which strict JSON has not, is refused."""
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    left_out = {"seconds", "right", "scene_entropy_8"}
    return [{key: value for key, value in line.items() if key not in left_out} for line in lines]


def references_of(folder):
    """The reference pictures of a run of Stage II, uint8 [R, 3, H, W]."""
    return load_file(folder / "references.safetensors")["pictures"]


def same(one, other):
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def tensors(folder):
    """All tensors below a folder, {file/name: tensor}."""
    return {f"{path.relative_to(folder)}/{name}": tensor
            for path in sorted(folder.rglob("[!.]*.safetensors"))
            for name, tensor in load_file(path).items()}


def assert_same_run(found, expected):
    """Equal bit for bit in all that a run leaves, and told as one story."""
    ours, theirs = tensors(found), tensors(expected)      # a kill may leave one checkpoint more
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []
    assert metrics(found) == metrics(expected)
    assert run.read_json(found / "settings.json")["finished"] == len(metrics(found)) > 0


def ask(net, x, sigma, prompt, **others):
    """A network's velocity by diffusers' own forward, told 1000·σ: nothing of ours but weights."""
    timestep = 1000 * torch.as_tensor(sigma).flatten().expand(len(x))
    return SD3Transformer2DModel.forward(
        net, hidden_states=x, timestep=timestep, encoder_hidden_states=prompt[0],
        pooled_projections=prompt[1], return_dict=False, **others)[0]


def stock_net(state=None):
    """The tiny transformer as diffusers' own class, with the weights `state`."""
    net = SD3Transformer2DModel.from_pretrained(TINY.source, subfolder="transformer",
                                                torch_dtype=torch.float32)
    if state is not None:
        net.load_state_dict(state)
    return net.eval()


def leave_out_pictures(patch):
    """No sample grids and curves, which change no weight and take most of a short run's time."""
    patch.setattr(sampler.Gallery, "save", lambda *a, **k: {})
    patch.setattr(run, "draw_curves", lambda folder: None)


@pytest.fixture
def no_pictures(monkeypatch):
    """leave_out_pictures for one test."""
    leave_out_pictures(monkeypatch)


def record(script, argv, out):
    """Runs script.main(argv) into the folder `out` and returns its updates in order. Each is a
    dict:

    draws      what draw_batch gave
    learners   {network: (rate, betas, weight decay)} of those whose optimisers take the step
    limit      largest gradient norm allowed
    weights    {network: its state before the step}
    gradients  {network: {name: tensor}} as the backward pass left them
    """
    updates, drawn, nets, optims = [], [], {}, {}
    draw, restore, step = script.draw_batch, script.Run.restore, script.clip_and_step

    def spy_on_draws(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    def spy_on_restore(self, networks, optimizers):
        nets.update(networks)
        optims.update(optimizers)
        return restore(self, networks, optimizers)

    def spy_on_step(optimizers, limit=math.inf):
        update = {"draws": drawn[-1], "learners": {}, "limit": limit, "weights": {},
                  "gradients": {}}
        for name, net in nets.items():
            update["weights"][name] = {k: v.clone() for k, v in net.state_dict().items()}
            update["gradients"][name] = {k: v.clone() for k, v in gradients(net).items()}
        for name, optim in optims.items():
            if optim in optimizers:
                group, = optim.param_groups
                update["learners"][name] = group["lr"], group["betas"], group["weight_decay"]
        updates.append(update)
        return step(optimizers, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "draw_batch", spy_on_draws)
        patch.setattr(script.Run, "restore", spy_on_restore)
        patch.setattr(script, "clip_and_step", spy_on_step)
        patch.setattr(train_stage2, "D_ONLY", 0)
        script.main([*argv, "--out", str(out)])
    return updates


def assert_close(found, expected, tolerance=1e-3):
    """Gradients {name: tensor}: the same names, each equal to a thousandth of its largest entry."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().item()
        assert torch.allclose(found[name], value, rtol=0, atol=tolerance * largest + 1e-9), name


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.fixture(scope="session")
def teacher():
    return model.load_transformer(TINY)


@pytest.fixture(scope="session")
def prompts():
    """The miniature's 24 captions and the empty prompt, encoded."""
    return model.Prompts(TINY, CAPTIONS, CPU)


@pytest.fixture(scope="session")
def decode():
    return model.Decoder(TINY, CPU)


@pytest.fixture(scope="session")
def stock_pipe():
    """The committed teacher through diffusers alone, exactly as the README tells it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        HERE / "tiny" / "sd3", text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_pictures(pipe, captions, noise, **arguments):
    """[B, 3, 32, 32] from 0 to 1."""
    return pipe(captions, latents=noise, max_sequence_length=0, output_type="pt",
                **arguments).images


@pytest.fixture(scope="session")
def turns1(tmp_path_factory):
    """(folder, its four updates) of a Stage I run: fake score, student, fake score, student."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_pictures(patch)
        return out, record(train_stage1, [*STAGE1, "--iterations", "2"], out)


@pytest.fixture(scope="session")
def finished(turns1):
    """The Stage I run's folder."""
    return turns1[0]


@pytest.fixture(scope="session")
def turns2(finished):
    """(folder, its five updates) of a Stage II run: G (f's warm-up), D, D, G, D."""
    out = finished.parent / "finished2"
    return out, record(train_stage2, [*STAGE2, "--iterations", "5", "--init", str(finished)], out)


@pytest.fixture(scope="session")
def finished2(turns2):
    """The Stage II run's folder."""
    return turns2[0]


# ================================================================== conventions

def test_the_students_sigma_grid_is_the_official_one():
    """Catches an unshifted grid and the stock pipeline's 1, 0.0089, 0."""
    assert torch.allclose(sampler.sigma_grid(2), torch.tensor([1, 0.75, 0]))
    assert torch.allclose(sampler.sigma_grid(4), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    assert shift_sigma(0.5) == 0.75


def test_velocity_points_from_data_to_noise():
    """Catches a flipped sign: an Euler step from any σ to 0 along ε − x0 must land on x0."""
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    sigma = torch.tensor([1, 0.6, 0.1])
    s = sigma[:, None, None, None]
    x = (1 - s) * x0 + s * noise
    assert torch.allclose(x0_from_velocity(x, sigma, noise - x0), x0, atol=1e-6)
    assert torch.allclose(euler(x, noise - x0, sigma, 0.0), x0, atol=1e-6)


# ================================================================== equations of Stage I

def test_guidance_is_on_up_to_alpha_inclusive_and_off_above():
    """Eq. 4. Catches < for ≤, the flipped side, swapped branches, and guidance left on at high
    noise, where the conditional answer must come back to the last bit."""
    weight = guidance_weight(torch.tensor([0.5, 0.94, 0.9401, 1.0]), 7.0, 0.94)
    assert weight.tolist() == [7, 7, 1, 1]
    assert guidance_weight(0.94, 7.0, 0.94) == 7 and guidance_weight(1.0, 7.0, 1.0) == 7
    cond, uncond = torch.randn(4, 4, 2, 2), torch.randn(4, 4, 2, 2)
    guided = guide(cond, uncond, weight)
    assert torch.allclose(guided[0], uncond[0] + 7 * (cond[0] - uncond[0]))
    assert torch.equal(guided[2:], cond[2:])


def test_renoising_reaches_exactly_the_marginal_of_the_higher_level():
    """Catches a wrong factor or variance: x_a re-noised to b must be distributed as x_b of x0."""
    n, x0 = 400_000, 2.0
    for a, b in ((0.0, 0.5), (0.3, 0.8), (0.75, 0.9), (0.5, 1.0)):
        x = (1 - a) * x0 + a * torch.randn(n, 1, generator=seeded(1))
        x = renoise(x, a, b, torch.randn(n, 1, generator=seeded(2)))
        assert x.mean().item() == pytest.approx((1 - b) * x0, abs=0.01), "the picture's share"
        assert x.std().item() == pytest.approx(b, abs=0.01), "how much noise there is"
    x, a = torch.randn(4, 3), torch.full((4,), 0.3)
    same_level = renoise(x, a, a, torch.randn(4, 3))
    assert torch.allclose(same_level, x, atol=2e-3), "x must come back at b = a: clamp the variance"


@pytest.mark.parametrize("name, means", [
    ("official", (0.912, 0.619)), ("uniform", (0.892, 0.461)), ("paper", (0.902, 0.590))])
def test_importance_curves_have_the_released_samplers_means(name, means):
    """Mean σ in both windows of two steps, as the released sampler gives them (the paper's: as our
    reading of its plot does). Catches a curve read backwards, another shift, and a draw that leaves
    its window."""
    u = torch.arange(1000) / 1000
    for (high, low), mean in zip(((1.0, 0.75), (0.75, 0.0)), means, strict=True):
        sigma = draw_sigma(u, torch.full_like(u, high), torch.full_like(u, low),
                           importance_curve(name))
        assert (sigma > low).all(), "the last level belongs to the next window"
        assert (sigma <= high + 1e-6).all(), "a level above the window"
        assert sigma[0].item() == pytest.approx(high), "the first level belongs to the window"
        assert sigma.mean().item() == pytest.approx(mean, abs=0.005), "not drawn by the weights"


def test_importance_curve_is_the_releases():
    """Preset c, normalised, at five indices. With this blur the whole curve was once compared with
    the released code's: equal to 6e-8. Catches one that reaches further than 300 indices."""
    p = importance_curve("official")
    p = p / p.sum()
    released = [1.850721e-3, 2.637901e-3, 3.566290e-4, 8.836208e-5, 7.094266e-6]
    torch.testing.assert_close(p[[0, 252, 500, 678, 1000]], torch.tensor(released),
                               rtol=1e-5, atol=0)


def test_the_table_of_equations_names_tests_that_exist():
    """The one on top of losses.py. Catches a test that was renamed."""
    tests = [name for name in globals() if name.startswith("test_")]
    before, table = losses.__doc__.split("NAME of the test\n")
    column = len(before.splitlines()[-1])
    for line in table.split("\n\n")[0].splitlines():
        name = line[column:]
        assert name.startswith("(") or any(name in test for test in tests), name


def test_the_students_gradient_is_the_score_difference():
    """(p_fake − p_teacher) / mean|p − p_teacher|, by hand. Catches a sign, a gradient that leaks
    into the teacher, a normaliser that is missing or no sample's own."""
    p, p_teacher, p_fake = (torch.randn(2, 3, 4, 5, generator=seeded(i)) for i in range(3))
    for tensor in (p, p_teacher, p_fake):
        tensor.requires_grad_()
    dmd_loss(p, p_teacher, p_fake).backward()
    assert p_teacher.grad is None and p_fake.grad is None, "gradient reaches teacher or fake score"
    assert (p.grad * (p_fake - p_teacher)).sum() > 0, "descent must lead along p_teacher − p_fake"
    for b in range(2):
        scale = (p[b] - p_teacher[b]).abs().sum().item() / 60
        wanted = (p_fake[b] - p_teacher[b]) / scale / 120
        assert torch.allclose(p.grad[b], wanted, rtol=1e-4), "each sample by its own mean distance"


@pytest.mark.parametrize("loss", [dmd_loss, dmd_loss_official])
def test_losses_stay_finite_when_student_and_teacher_agree(loss):
    """Catches the official normaliser's division without an epsilon."""
    x = torch.zeros(2, 4, 8, 8, requires_grad=True)
    value = loss(x, x.detach(), x.detach())
    value.backward()
    assert value.item() == 0 and x.grad.abs().max() == 0


def test_fake_score_loss_is_zero_exactly_at_the_velocity_that_leads_to_x0():
    """Catches a flipped sign, a distance that is not squared, and bf16 latents, whose target is 59
    % off at σ = 0.003."""
    x0, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    sigma = torch.tensor([0.003, 0.75])
    x = renoise(x0, torch.zeros(2), sigma, noise)
    assert fake_score_loss(noise - x0, x, x0, sigma).item() < 1e-6
    assert fake_score_loss(noise - x0 + 2, x, x0, sigma).item() == pytest.approx(4, rel=1e-3)
    with pytest.raises(AssertionError):
        fake_score_loss(noise, x.bfloat16(), x0, sigma)


# ================================================================== Stage I

def levels(values):
    """One number for each sample, ready to multiply latents."""
    return values[:, None, None, None]                                    # B → B×1×1×1


def noised(p, end, sigma, noise):
    """p from level `end` up to σ: the paper's formula once more, not losses.renoise."""
    shrink = (1 - sigma) / (1 - end)
    return shrink * p + (sigma ** 2 - (end * shrink) ** 2).sqrt() * noise


BETAS1 = (0.0, 0.999)
OTHER = ["--steps", "3", "--form", "x0", "--loss", "official", "--seed", "0", *SAVING, "4"]


def settings_of(script, argv):
    settings = run.parse_settings(script.Settings, argv, "", "")
    return settings, script.resolve(settings)


@pytest.mark.parametrize("options", [[], OTHER], ids=["default", "all else"])
def test_each_turn_of_stage_one_is_its_formulas(options, turns1, prompts, no_pictures, tmp_path):
    """Catches what no run shows: re-noising from another level, a fake score that aims at the
    intermediate sample, guidance on the wrong side of α, a flipped difference of scores, a path
    that is not the student's own."""
    argv = [*STAGE1, "--iterations", "2", *options]
    turns = record(train_stage1, argv, tmp_path / "run") if options else turns1[1]
    fake_turn, student_turn = turns[2:]                   # of iteration 1
    settings, (_, _, texts, _, _) = settings_of(train_stage1, argv)
    N = settings.steps
    u = 1 - torch.arange(N + 1) / N
    sigmas = 3 * u / (1 + 2 * u)
    batch = train_stage1.draw_batch(1, settings, SHAPE, sigmas, texts)
    prompt, empty = prompts.take(batch["prompt_index"]), prompts.uncond(8)

    # The student's own path from the noise.
    student, each = stock_net(student_turn["weights"]["student"]), torch.arange(8)
    latents, velocities = [batch["noise"]], []
    with torch.no_grad():
        for here, there in itertools.pairwise(sigmas):
            velocities.append(ask(student, latents[-1], here, prompt))
            latents.append(latents[-1] + (there - here) * velocities[-1])
    latents, velocities = torch.stack(latents), torch.stack(velocities)

    # The fake score: from σ_k to x̂0, but re-noised from the sample at the end of the step.
    k, sigma = batch["k_fake"], levels(batch["sigma_fake"])
    start = levels(sigmas[k])
    end = 0 * start if settings.form == "x0" else levels(sigmas[k + 1])
    x0 = latents[k, each] - start * velocities[k, each]
    p = latents[k, each] + (end - start) * velocities[k, each]
    x = noised(p, end, sigma, batch["noise_fake"])
    fake_score = stock_net(fake_turn["weights"]["fake_score"])
    v = ask(fake_score, x, sigma, prompt)
    ((v - (x - x0) / sigma) ** 2).mean().backward()
    assert fake_turn["learners"] == {"fake_score": (2e-3, BETAS1, 1e-4)}
    assert fake_turn["limit"] == 1.0
    assert_close(fake_turn["gradients"]["fake_score"], gradients(fake_score))

    # The student: its step once more, judged by the guided teacher and the updated fake score.
    k, sigma = batch["k_student"], levels(batch["sigma_student"])
    assert len(k.unique()) == N and 0 < (sigma > 0.94).sum() < 8, "the draw shows all cases"
    start = levels(sigmas[k])
    end = 0 * start if settings.form == "x0" else levels(sigmas[k + 1])
    p = latents[k, each] + (end - start) * ask(student, latents[k, each], start, prompt)
    fake_score = stock_net(student_turn["weights"]["fake_score"])
    with torch.no_grad():
        x = noised(p, end, sigma, batch["noise_student"])
        v_cond, v_uncond = ask(stock_net(), x, sigma, prompt), ask(stock_net(), x, sigma, empty)
        v_teacher = torch.where(sigma <= 0.94, v_uncond + 4 * (v_cond - v_uncond), v_cond)
        p_teacher = x + (end - sigma) * v_teacher
        p_fake = x + (end - sigma) * ask(fake_score, x, sigma, prompt)
        difference, distance = p_fake - p_teacher, (p - p_teacher).abs()
        if settings.loss == "official":                   # pseudo-Huber, one weight a column
            c = 1e-3 * math.sqrt(4 * 8 * 8 / (64 * 64 * 4))
            direction = difference / (difference ** 2 + c ** 2).sqrt()
            direction = direction / distance.mean((1, 2), keepdim=True)
        else:
            direction = difference / distance.mean((1, 2, 3), keepdim=True)
    p.backward(direction / p.numel())
    assert student_turn["learners"] == {"student": (1e-3, BETAS1, 1e-4)}
    assert student_turn["limit"] == 2.0
    assert_close(student_turn["gradients"]["student"], gradients(student))
    assert not student_turn["gradients"]["fake_score"], "the student's turn reached the fake score"


@pytest.mark.parametrize("form, windows, of_fake_score, of_student", [
    ("window", [(1, 0.75), (0.75, 0)], (0.892, 0.461), (0.912, 0.619)),
    ("x0", [(1, 0), (1, 0)], (0.676, 0.676), (0.899, 0.899))])
def test_levels_are_drawn_inside_each_samples_own_window(form, windows, of_fake_score, of_student):
    """The fake score's uniformly, the student's by the curve, each with a step of its own; with
    --form x0 at all levels. Catches swapped curves, one k for both, and a neighbour's window."""
    argv = ["--batch-size", "4096", "--form", form]
    settings, (_, _, texts, _, shape) = settings_of(train_stage1, argv)
    batch = train_stage1.draw_batch(0, settings, (1, 1, 1), sampler.sigma_grid(2), texts)
    for who, means in (("fake", of_fake_score), ("student", of_student)):
        for step, ((high, low), mean) in enumerate(zip(windows, means, strict=True)):
            sigma = batch[f"sigma_{who}"][batch[f"k_{who}"] == step]
            assert ((sigma <= high + 1e-6) & (sigma > low)).all()
            assert sigma.mean().item() == pytest.approx(mean, abs=0.01)
    agree = (batch["k_fake"] == batch["k_student"]).float().mean().item()
    assert shape == list(SHAPE) and agree == pytest.approx(0.5, abs=0.03)


def test_no_two_iterations_draw_the_same():
    """Steps, levels, prompts and noises, which are no evaluation's either, and no other seed's.
    Catches an iteration or the seed left out of a key, a noise that depends on its neighbours, and
    a student that learns by heart what it is measured on."""
    sigmas = sampler.sigma_grid(2)

    def draws(i, seed):
        argv = ["--seed", seed, "--batch-size", "64"]
        settings, (_, _, texts, _, _) = settings_of(train_stage1, argv)
        return train_stage1.draw_batch(i, settings, SHAPE, sigmas, texts)
    one, again, later, elsewhere = draws(0, "42"), draws(0, "42"), draws(1, "42"), draws(0, "43")
    for name in one:
        assert torch.equal(one[name], again[name]), name
        assert not torch.equal(one[name], later[name]), name
        assert not torch.equal(one[name], elsewhere[name]), name
    noises = [batch[name] for batch in (one, later)
              for name in ("noise", "noise_fake", "noise_student")]
    noises += [sampler.image_noise(42, range(64), SHAPE, purpose)
               for purpose in ("image", "training")]
    assert torch.equal(noises[-1][5:7], sampler.image_noise(42, [5, 6], SHAPE, "training"))
    every = torch.cat(noises).flatten(1)
    likeness = torch.corrcoef(every) - torch.eye(len(every))
    assert likeness.abs().max() < 0.5, "two noises are one"


def test_the_log_tells_the_gap_by_noise_level():
    """Catches bins that are fixed while α and the steps are options, and an empty one where a
    level is α but for its rounding."""
    sigma, gap = torch.tensor([0.2, 0.7, 0.8, 0.97]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    bins = {"gap_0_0.5": 1, "gap_0.5_0.75": 2, "gap_0.75_0.9": 3, "gap_0.9_1": 4, "gap": 2.5,
            "x0_mean": 1, "x0_std": 0, "saturation": 0, "x0_batch_std": 0}
    for steps in (2, 4):                                  # 1, 0.75, 0 and 1, 0.9, 0.75, 0.5, 0
        sigmas = sampler.sigma_grid(steps)
        assert train_stage1.diagnose(gap, sigma, torch.ones(4, *SHAPE), sigmas, 0.9) == bins


# ================================================================== the cache

def inputs(net, seed=0, batch=2):
    """Latents and a prompt for any SD3 transformer."""
    g, c = seeded(seed), net.config
    x = torch.randn(batch, c.in_channels, c.sample_size, c.sample_size, generator=g)
    embeds = torch.randn(batch, 8, c.joint_attention_dim, generator=g)
    return x, (embeds, torch.randn(batch, c.pooled_projection_dim, generator=g))


def any_net(name):
    """The tiny teacher, or a real model's kind of blocks: four, of reduced width."""
    if name == "tiny":
        return model.load_transformer(TINY)
    torch.manual_seed(0)
    real = model.PRESETS[name].architecture
    dual = [i for i in real.get("dual_attention_layers", ()) if i < 2]    # two of four
    return CachedSD3(**{
        **real, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8,
        "caption_projection_dim": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32,
        "sample_size": 8, "dual_attention_layers": tuple(dual)}).eval()


def trained_compensation(net):
    """An f that is not plain reuse."""
    f = make_compensation(net.inner_dim)
    for i, parameter in enumerate(f.parameters()):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=seeded(i))
    return f


def step(net, x, sigma, prompt, **cached):
    """(velocity, Δ0) of our forward."""
    return net(hidden_states=x, timestep=torch.full((len(x),), 1000.0 * sigma),
               encoder_hidden_states=prompt[0], pooled_projections=prompt[1], **cached)


def stock_step(net, x, sigma, prompt, span, added=None):
    """(velocity, (image, text) residual of the span) by diffusers' forward, hooks and its
    skip_layers: in full or, with a residual `added` to each stream, with that in the span's place.
    """
    first, after = span[0], span[1] + 1
    seen = {}

    def before_block(block, args, inputs):
        seen[block] = inputs["hidden_states"], inputs["encoder_hidden_states"]
        if added and block is net.transformer_blocks[after]:
            image, text = seen[block]
            inputs["hidden_states"] = image + added[0].to(image.dtype)
            inputs["encoder_hidden_states"] = text + added[1].to(text.dtype)
        return args, inputs
    hooks = [net.transformer_blocks[i].register_forward_pre_hook(before_block, with_kwargs=True)
             for i in (first, after)]
    v = ask(net, x, sigma, prompt, skip_layers=range(first, after) if added else None)
    for hook in hooks:
        hook.remove()
    if added:
        return v, added
    image_in, text_in = seen[net.transformer_blocks[first]]
    image, text = seen[net.transformer_blocks[after]]
    return v, ((image - image_in).detach(), (text - text_in).detach())


BOTH = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
KINDS = pytest.mark.parametrize("kind", ["tiny", "sd3-medium", "sd3.5-medium", "sd3.5-large"])


@KINDS
@BOTH
def test_the_forward_and_a_cached_step_are_the_stock_ones_bit_for_bit(kind, bf16):
    """Velocities, gradients and Δ0 of a full step and of O_m,1 = I_n,1 + f(Δ0) after it. Catches
    streams passed in the wrong order, a flag of a real model that only the stock forward honours, f
    on the wrong stream, a span one block off, an input of the span that step one left behind, and a
    Δ0 that step two trains through."""
    found, span = [], (1, 2)
    for ours in (False, True):
        net = any_net(kind)
        f, (x, prompt), (x_later, _) = trained_compensation(net), inputs(net), inputs(net, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if ours:
                plain, _ = step(net, x, 1.0, prompt)
                full, delta = step(net, x, 1.0, prompt, span=span)
                cached, _ = step(net, x_later, 0.75, prompt, span=span, delta=delta, f=f)
            else:
                full, delta = stock_step(net, x, 1.0, prompt, span)
                added = f["image"](delta[0]), f["text"](delta[1])
                plain, (cached, _) = full, stock_step(net, x_later, 0.75, prompt, span, added)
        full.square().mean().backward(retain_graph=True)
        of_full = gradients(net)
        net.zero_grad(set_to_none=True)
        cached.square().mean().backward()
        found.append({
            "a step without a span": {"v": plain},
            "a step that records Δ0": {"v": full} | of_full,
            "Δ0 is what the span added to each stream": {"image": delta[0], "text": delta[1]},
            "a cached step (f(Δ0): cast, then added; Δ0: detached)": {"v": cached} | gradients(net),
            "f's gradients": gradients(f)})
    for what, expected in found[0].items():
        assert same(found[1][what], expected), what


def test_f_is_its_formula():
    """x + W2·GELU(W1·LayerNorm(x)), hidden width 2·D, by hand. Catches a residual or a LayerNorm
    that is left out."""
    f, x = make_compensation(8)["text"], torch.randn(2, 3, 8, generator=seeded())
    for i, parameter in enumerate(f.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=seeded(i))
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    hidden = (normed * f.norm.weight + f.norm.bias) @ f.up.weight.T + f.up.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    assert f.up.weight.shape == (16, 8)
    assert torch.allclose(f(x), x + hidden @ f.down.weight.T + f.down.bias, atol=1e-4)


def test_f_at_its_start_is_plain_reuse(teacher):
    """Catches an f that changes Δ0 at first. NOTHING stands for the baseline that leaves the blocks
    out, which the stock forward knows as skip_layers."""
    (x, prompt), (later, _), span, found = inputs(teacher), inputs(teacher, 1), (1, 4), []
    with torch.no_grad():
        _, delta = step(teacher, x, 1.0, prompt, span=span)
        for f in (None, make_compensation(128), NOTHING):
            v, _ = step(teacher, later, 0.75, prompt, span=span, delta=delta, f=f)
            found.append(v)
        skipped = ask(teacher, later, 0.75, prompt, skip_layers=[1, 2, 3, 4])
    plain, start, left_out = found
    assert torch.equal(plain, start) and torch.equal(left_out, skipped)
    assert not torch.allclose(plain, left_out, atol=1e-2)


def test_a_path_of_more_than_two_steps_reuses_the_first_residual(teacher):
    """Catches a Δ0 that is recorded again from a step whose span did not run."""
    (x, prompt), f, span = inputs(teacher), trained_compensation(teacher), (1, 4)
    sigmas = sampler.sigma_grid(3)
    with torch.no_grad():
        latents, velocities, delta = sampler.roll_out(teacher, x, prompt, sigmas, span, f)
        first, recorded = step(teacher, x, 1.0, prompt, span=span)
        last, _ = step(teacher, latents[2], sigmas[2].item(), prompt, span=span, delta=recorded,
                       f=f)
    assert torch.equal(velocities[0], first) and torch.equal(velocities[2], last)
    assert torch.equal(delta[0], recorded[0]) and len(latents) == 4


@pytest.mark.parametrize("span", [(1, 2, 3), (5, 2), (2, 11), (-1, 3)])
def test_a_bad_span_is_refused_before_anything_is_changed(teacher, span):
    """Catches Python's own words for it, and the last block in a span: it returns no text, so there
    is no residual."""
    x, prompt = inputs(teacher)
    with pytest.raises(ValueError, match="^a span is|does not fit"):
        BlockCache(teacher, span)
    with pytest.raises(ValueError, match="^a span is|does not fit"):
        step(teacher, x, 1.0, prompt, span=span)
    assert "forward" not in teacher.__dict__


def test_nfe_counts_the_papers_numbers():
    """Also the size of f: 18.9 M parameters for SD3-Medium."""
    assert nfe(2, (2, 9), 24) == pytest.approx(1.667, abs=1e-3) and nfe(2, (2, 7), 24) == 1.75
    assert nfe(2, (2, 11), 38) == pytest.approx(1.737, abs=1e-3)
    assert nfe(2, (1, 4), 12) == pytest.approx(1.667, abs=1e-3) and nfe(4, (1, 4), 12) == 3
    parameters = sum(p.numel() for p in make_compensation(1536).parameters())
    assert parameters == pytest.approx(18.9e6, rel=0.01)


# ================================================================== the samplers

@pytest.mark.parametrize("steps, told", [
    (2, [1.0, 0.5]), (4, [1.0, 0.75, 0.5, 0.25])])
def test_the_stock_pipeline_gives_the_students_pictures(stock_pipe, finished, prompts, decode,
                                                        steps, told):
    """One grid for training, sampling and export. student/ is a stock folder. Catches another last
    level, latents scaled otherwise than the VAE's, our class's name or f's weights in the folder.
    """
    student, _, _ = model.load_student(finished, run.read_settings(finished), TINY, CPU)
    noise = sampler.image_noise(0, range(3), SHAPE)
    with torch.no_grad():
        latents, _, _ = sampler.roll_out(student, noise, prompts.take([0, 1, 2]),
                                         sampler.sigma_grid(steps))
        ours = decode(latents[-1]).clamp(0, 1)
    stock, notes = SD3Transformer2DModel.from_pretrained(
        finished / "student", torch_dtype=torch.float32, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    assert stock.load_config(finished / "student")["_class_name"] == "SD3Transformer2DModel"
    pipe = StableDiffusion3Pipeline(**{**stock_pipe.components, "transformer": stock})
    pipe.set_progress_bar_config(disable=True)
    theirs = stock_pictures(pipe, CAPTIONS[:3], noise, num_inference_steps=steps,
                            guidance_scale=1.0, sigmas=told)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_our_guided_sampler_is_the_stock_one_and_alpha_saves_five_passes(stock_pipe, teacher,
                                                                         prompts, decode):
    """28 steps; five of their sigmas lie above α = 0.94. Catches another grid, swapped branches,
    another empty prompt, < for ≤, and a pass made for nothing."""
    noise, passes = sampler.image_noise(0, range(2), SHAPE), []
    for w, alpha in ((4.0, 1.0), (1.0, 1.0), (4.0, 0.94)):
        with torch.no_grad():
            latents, count = sampler.sample_guided(
                teacher, noise, prompts.take([5, 6]), prompts.uncond(2),
                sampler.teacher_sigmas(TINY), w, alpha)
            ours = decode(latents).clamp(0, 1)
        passes.append(count)
        if alpha == 1:
            theirs = stock_pictures(stock_pipe, CAPTIONS[5:7], noise, num_inference_steps=28,
                                    guidance_scale=w)
            assert torch.allclose(ours, theirs, atol=1e-3)
    assert passes == [56, 28, 51]


# ================================================================== Stage II

def test_turns_are_the_official_ones():
    """51 turns of D, then 1 G : 2 D: in 4000 turns 1317 of G. Catches 1 D : 2 G."""
    turns = [train_stage2.turn_of(i) for i in range(4000)]
    assert "generator" not in turns[:51]
    assert turns[51:54] == ["generator", "discriminator", "discriminator"]
    assert turns.count("generator") == 1317 and turns.count("discriminator") == 2683


BETAS2 = (0.9, 0.95)
REFERENCE_PROMPTS = torch.randint(24, (8,), generator=run.rng(3407, "references"))


def test_references_are_the_alpha_guided_teachers_pictures(teacher, finished2, prompts, decode):
    """The same prompts and noises as D's turns take, 28 steps, eight bits. Catches another guidance
    rule than Stage I's, and a reference of another noise."""
    noise = sampler.image_noise(3407, range(8), SHAPE, "training")
    with torch.no_grad():
        latents, _ = sampler.sample_guided(
            teacher, noise, prompts.take(REFERENCE_PROMPTS), prompts.uncond(8),
            sampler.teacher_sigmas(TINY), 4.0, 0.94)
        expected = 255 * decode(latents).clamp(0, 1)
    kept = references_of(finished2)
    assert kept.dtype == torch.uint8 and kept.shape == (8, 3, 32, 32)
    assert (kept - expected).abs().max() < 0.6, "more than rounding"


def cached_path(turn, prompts):
    """(network, f, the student's sample at σ = 0) of a turn of Stage II: step one in full without
    gradient, step two with f(Δ0) in the place of blocks 1 to 4."""
    prompt = prompts.take(turn["draws"]["prompt_index"])
    noise = sampler.image_noise(3407, turn["draws"]["noise_index"], SHAPE, "training")
    net = stock_net(turn["weights"]["student"])
    f = make_compensation(128)
    f.load_state_dict(turn["weights"]["compensation"])
    with torch.no_grad():
        v, (image, text) = stock_step(net, noise, 1.0, prompt, (1, 4))
        x = noise - 0.25 * v                              # from σ = 1 to 0.75
    added = f["image"](image), f["text"](text)            # test_f_is_its_formula
    v, _ = stock_step(net, x, 0.75, prompt, (1, 4), added)
    return net, f, x - 0.75 * v                           # from 0.75 to 0


def cross_entropy(logits, label):
    """−label·log p − (1 − label)·log(1 − p), mean over batch and places, sum over heads."""
    log = torch.nn.functional.logsigmoid
    return sum((-label * log(x) - (1 - label) * log(-x)).mean() for x in logits)


def judge(turn):
    """The discriminator of a turn. In eval mode: its spectral norms have taken the turn's step."""
    discriminator = model.Discriminator(TINY)
    discriminator.heads.load_state_dict(turn["weights"]["discriminator"])
    return discriminator.eval()


@pytest.mark.parametrize("i", [1, 2, 4])
def test_each_discriminator_turn_is_its_formulas(i, turns2, prompts, decode):
    """The student's picture as inference makes it, against the reference of the same noise. Catches
    a last step run in full, swapped labels, and a pair that is none."""
    folder, turns = turns2
    turn, logged = turns[i], metrics(folder)[i]
    with torch.no_grad():
        picture = decode(cached_path(turn, prompts)[2])
    discriminator = judge(turn)
    of_reference = discriminator(references_of(folder)[turn["draws"]["noise_index"]] / 255)
    of_picture = discriminator(picture)
    loss = cross_entropy(of_reference, 0.8) + cross_entropy(of_picture, 0.0)
    loss.backward()
    ranks = [(r > p).float().mean() for r, p in zip(of_reference, of_picture, strict=True)]
    assert logged["loss_d"] == pytest.approx(loss.item(), rel=1e-3)
    assert logged["d_ranks"] == pytest.approx(sum(ranks).item() / len(ranks), abs=2e-3)
    assert turn["learners"] == {"discriminator": (1e-2, BETAS2, 1e-4)}
    assert turn["limit"] == math.inf
    assert_close(turn["gradients"]["discriminator"], gradients(discriminator.heads))
    assert not turn["gradients"]["student"] and not turn["gradients"]["compensation"]


@pytest.mark.parametrize("i, who", [(0, ["compensation"]), (3, ["student", "compensation"])])
def test_each_generator_turn_is_its_formulas(i, who, turns2, prompts, decode):
    """The adversarial loss alone, through the VAE and the cached step, into student and f; in the
    warm-up f alone takes the step. Catches a label of 0, a gradient through step one, f on the
    wrong stream, a turn that begins with the gradient of the one before, and a student bent by an f
    that is still plain reuse."""
    turn = turns2[1][i]
    net, f, sample = cached_path(turn, prompts)
    cross_entropy(judge(turn)(decode(sample)), 0.8).backward()
    rates = {"student": (1e-3, BETAS2, 1e-4), "compensation": (5e-3, BETAS2, 1e-4)}
    assert turn["learners"] == {name: rates[name] for name in who}
    assert turn["limit"] == 2.0
    # Rounding may take a unit of the backbone across a kink: with two threads 2.5e-3.
    assert_close(turn["gradients"]["student"], gradients(net), 1e-2)
    assert_close(turn["gradients"]["compensation"], gradients(f), 1e-2)
    reached = {name.split(".")[1] for name in gradients(net) if "transformer_blocks" in name}
    assert not reached & set("1234") and len(reached) == 8, "skipped blocks get no gradient"


def test_the_values_of_both_stages_are_the_documented_ones():
    """The official code's, and the paper's α and warm-up. Catches a constant that somebody tuned.
    (The optimisers' are seen in each turn.)"""
    values = {"iterations": 500, "batch_size": 64, "student_lr": 5e-6, "fake_lr": 4e-5,
              "alpha": 0.94, "guidance": 7.0}
    assert values.items() <= train_stage1.SD3.items()
    values = {"iterations": 4000, "batch_size": 32, "student_lr": 1e-5, "compensation_lr": 1e-3,
              "discriminator_lr": 1e-5, "warmup": 500}
    assert values.items() <= train_stage2.SD3.items()
    spans = [model.PRESETS[name].cached_blocks for name in ("tiny", "sd3-medium", "sd3.5-large")]
    assert spans == ["1-4", "2-9", "2-11"] and model.PRESETS["sd3-medium"].text_length == 256


def test_the_discriminator_is_its_formula():
    """Backbone and heads written out from their weights. Catches pictures that are normalised
    otherwise than the backbone's own, the last map's maximum for its mean, another slope, heads
    without a spectral norm, or one that is told the picture itself."""
    discriminator = model.Discriminator(TINY, seed=5).eval()
    pictures = torch.rand(3, 3, 32, 32, generator=seeded())
    maps = discriminator.backbone((pictures - 0.5) / 0.5).feature_maps

    def bounded(layer):
        one, = layer.parametrizations.weight              # its largest singular value becomes 1
        w = layer.parametrizations.weight.original
        return w / (one._u @ w.flatten(1) @ one._v)
    for head, x, logits in zip(discriminator.heads, [*maps, maps[-1].mean((2, 3))],
                               discriminator(pictures), strict=True):
        hidden = bounded(head.hidden)
        if x.ndim == 4:
            h = torch.nn.functional.conv2d(x, hidden, head.hidden.bias, padding=1).flatten(2).mT
        else:
            h = (x @ hidden.T + head.hidden.bias)[:, None]
        h = torch.where(h > 0, h, 0.2 * h)
        expected = (h @ bounded(head.logit).T + head.logit.bias)[..., 0]
        assert torch.allclose(logits, expected, atol=1e-5)
        assert torch.linalg.matrix_norm(hidden.flatten(1), 2).item() == pytest.approx(1, rel=0.1)
    assert len(maps) == 3 and not any(p.requires_grad for p in discriminator.backbone.parameters())


def test_the_generator_never_meets_the_noise_of_a_reference(turns2, finished, monkeypatch):
    """D's turns take numbers below R, with the reference's prompt; G's turns fresh ones, each once.
    Catches a student and an f that learn R pairs by heart, and two turns that draw alike."""
    monkeypatch.setattr(train_stage2, "D_ONLY", 0)
    settings, _ = settings_of(train_stage2, [*STAGE2, "--init", str(finished)])
    (_, turns), fresh = turns2, []
    for i in range(300):
        draws = train_stage2.draw_batch(i, settings, REFERENCE_PROMPTS, CAPTIONS)
        assert i >= 5 or same(draws, turns[i]["draws"]), "the loop draws as it should"
        if i % 3:
            assert (draws["noise_index"] < 8).all()
            assert draws["prompt_index"].equal(REFERENCE_PROMPTS[draws["noise_index"]])
        else:
            fresh += draws["noise_index"].tolist()
    assert min(fresh) >= 8 and len(set(fresh)) == len(fresh) == 400
    for i, j, name in ((1, 2, "noise_index"), (0, 3, "prompt_index")):
        assert not turns[i]["draws"][name].equal(turns[j]["draws"][name]), name


# ================================================================== the evaluation

def test_the_frechet_distance_is_its_formula():
    """Catches a sign, a root of the wrong product, biased covariances."""
    a, b = (torch.randn(50, 1, 4, generator=seeded(i)).double() for i in range(2))
    b = 2 * b + 1
    cov_a, cov_b = (torch.cov(x.flatten(0, 1).T) for x in (a, b))
    roots = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    means = (a.mean((0, 1)) - b.mean((0, 1))).square().sum()
    expected = means + cov_a.trace() + cov_b.trace() - 2 * roots
    assert evaluate.frechet(a, b).item() == pytest.approx(expected.item())
    assert evaluate.frechet(a, a).item() == pytest.approx(0, abs=1e-9)


def test_an_interval_is_the_middle_95_percent_of_resampled_prompts():
    """Resampled a second time here, value by value. Catches quantiles of another width, pictures
    drawn in place of prompts, and rows that are not given the same draws."""
    values = torch.rand(24, generator=seeded())
    found = evaluate.estimate("x", values)
    drawn = torch.randint(24, (1000, 24), generator=run.rng(0, "bootstrap")).tolist()
    means = sorted(sum(values[i].item() for i in row) / 24 for row in drawn)
    low, high = found["x_interval"]
    assert found["x"] == pytest.approx(values.mean().item())
    assert means[24] - 1e-6 <= low <= means[26] and means[973] <= high <= means[975] + 1e-6


def test_measures_are_taken_prompt_by_prompt():
    """Diversity is the mean distance of a prompt's pictures from each other. Catches means over the
    pictures of all prompts, and a pair of a picture with itself."""
    pictures = torch.rand(3, 4, 3, 8, 8, generator=seeded())              # P×n×3×H×W
    meter = lambda pictures, text: ({"right": pictures.mean()}, pictures[:, 0, 0, :2])
    found, features, shown = evaluate.look(pictures, CAPTIONS[:3], meter)
    first = pictures[0, :, 0, 0, :2]
    pairs = [(first[i] - first[j]).norm() for i, j in itertools.combinations(range(4), 2)]
    assert found["diversity"][0].item() == pytest.approx(sum(pairs).item() / 6, rel=1e-4)
    assert torch.allclose(found["right"], pictures.flatten(1).mean(1))
    assert features.shape == (3, 4, 2) and shown.equal(pictures.flatten(0, 1))


@pytest.mark.slow
def test_the_table_measures_each_row_from_the_same_noises(finished, finished2, tmp_path,
                                                          monkeypatch, capsys):
    """A run, its twin, Stage II, the teacher and the data. Catches a row without its baseline or
    its name, network evaluations of another span, seconds of nobody, the teacher compared with
    itself, other noises in another row, two rows that are one path, and what to expect of another
    protocol."""
    monkeypatch.chdir(finished)
    twin = shutil.copytree(finished, tmp_path / "twin")
    evaluate.main(["--checkpoint", ".", str(twin), str(finished2), "--samples-per-prompt", "2",
                   "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "results.json").read_text()
    result = json.loads(text, parse_constant=pytest.fail)                 # no NaN
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["data", "teacher, w = 4 for sigma <= 0.94", "finished",
                          "finished, plain reuse", "finished, span skipped", "twin", "finished2",
                          "finished2, no cache", "finished2, plain reuse"]
    counts = [row["nfe_blocks"] for row in result["rows"]]
    assert counts[1:3] == [51, 2] and counts[6] == pytest.approx(5 / 3) and counts[7] == 2
    assert rows["finished2"]["nfe_flops"] > counts[6]
    assert rows["data"]["right"] == 1 and rows["data"]["frechet_to_data"] is None
    teacher = rows["teacher, w = 4 for sigma <= 0.94"]
    assert teacher["frechet_to_teacher"] is None and teacher["clip_score"] is None
    assert counts[0] is None and rows["data"]["seconds_per_image"] is None
    assert rows["finished"]["seconds_per_image"] > 0 and len(
        rows["finished"]["by_prompt"]["right"]) == 24
    different = {tuple(row["by_prompt"]["diversity"]) for row in result["rows"]}
    assert len(different) == len(rows) - 1, "rows of one path"
    assert rows["twin"]["by_prompt"] == rows["finished"]["by_prompt"]
    printed = capsys.readouterr().out
    assert "| finished2 |" in printed and "eight training seeds" not in printed
    assert (tmp_path / "out" / "grid.png").exists()


def test_the_default_evaluation_says_what_to_expect():
    """Catches a reference that nobody is shown."""
    argv = ["--samples-per-prompt", "32", "--batch-size", "128"]
    assert len(evaluate.expected(run.parse_settings(evaluate.Settings, argv, "", ""))) == 2


def test_the_exact_reader_reads_what_was_drawn():
    """And says so of the right caption. Catches shape and colour exchanged, a distance that is not
    the nearest one's, and an outline counted as a speck."""
    captions = torch.arange(24).repeat_interleave(4)
    template, colour, scene = sample_labels(96, seeded(), captions)
    pictures = draw(template, colour, scene)
    found = evaluate.measure(pictures, captions)
    assert found["right"].all() and (found["read_error"] < 1e-3).all()
    assert not found["speckled"].any()
    assert not evaluate.measure(pictures, captions.roll(4))["right"].any()
    # A corner 0.3 too bright in the first picture; in the second, a shape's edge.
    pictures[0, :, :4, :4] -= 0.3
    edge = templates()[0][template[1]] % 1 > 0
    pictures[1, :, edge] = 0.5
    found = evaluate.measure(pictures, captions)
    assert found["speckled"][:3].tolist() == [1, 0, 0]
    assert found["read_error"][0].item() == pytest.approx(0.3 * (16 / 1024) ** 0.5, rel=1e-3)
    assert found["read_error"][1] > 0.02


# ================================================================== runs

def refused(main, argv, capsys):
    """The one line with which a command is refused, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: ") and "Traceback" not in lines[0]
    return lines[-1]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(stage, finished, finished2, no_pictures,
                                                          monkeypatch, capsys):
    """Stage II between two turns of D. Catches randomness that is not from (seed, iteration), any
    state that a checkpoint forgets, a result that is not the last iteration's, a finished run that
    is not left alone, and one that refuses to save memory in another way."""
    monkeypatch.setattr(train_stage2, "D_ONLY", 0)
    script, words, whole, first, last = train_stage1, STAGE1, finished, "1", "2"
    if stage == 2:
        script, whole, first, last = train_stage2, finished2, "2", "5"
        words = [*STAGE2, "--init", str(finished)]
    out = whole.parent / f"resumed{stage}"
    for more in ([first], [last], [last, "--accumulation", "1"]):         # another machine's
        script.main([*words, "--out", str(out), "--iterations", *more])
    text = capsys.readouterr().out
    assert "resuming" in text and "is finished" in text
    assert_same_run(out, whole)
    newest, = run.checkpoints(out)                        # the others went
    student = load_file(out / "student" / "diffusion_pytorch_model.safetensors")
    assert same(student, load_file(newest / "student.safetensors"))
    if stage == 2:
        f = load_file(out / "compensation.safetensors")
        assert same(f, load_file(newest / "compensation.safetensors"))
    else:
        assert None in metrics(out)[0].values(), "a bin of noise levels that holds no sample"


def test_the_curves_are_drawn(tmp_path):
    """Also when nothing is logged yet, or null. Catches a traceback in place of "stopped"."""
    pytest.importorskip("matplotlib")
    for text in ("", '{"iteration": 1, "gap": 0.5, "d_ranks": null}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        run.draw_curves(tmp_path)
        (tmp_path / "curves.png").unlink()


def test_too_little_memory_is_one_line(capsys):
    """Catches a traceback after minutes of loading, which does not say what to do."""
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")
    with pytest.raises(SystemExit) as stop:
        run.command(main)([])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "a larger --accumulation" in line and "9 GiB" in line


def test_the_sample_grid_is_the_samplers_and_the_log_tells_what_the_reader_finds_in_it(finished2,
                                                                                      tmp_path):
    """Catches a grid of another path or other noises, one that nobody reads, and captions that are
    not its rows'."""
    grid, file, out = finished2 / "samples" / "step_000005.png", tmp_path / "f", tmp_path / "g.png"
    rows = torch.randperm(24, generator=run.rng(0, "gallery"))[:8]
    file.write_text("\n".join(CAPTIONS[row] for row in rows))
    sampler.main(["--checkpoint", str(finished2), "--prompts", str(file), "--num-images", "8",
                  "--batch-size", "8", "--out", str(out)])
    assert out.read_bytes() == grid.read_bytes()
    # A picture of 32 pixels is shown enlarged to 96; each has a border of 2.
    sheet = torch.from_numpy(np.array(Image.open(grid)))[::3, ::3] / 255
    pictures = sheet.reshape(8, 34, 8, 34, 3)[:, :32, :, :32].permute(0, 2, 4, 1, 3).flatten(0, 1)
    found = evaluate.measure(pictures, rows.repeat_interleave(8))
    last = json.loads((finished2 / "metrics.jsonl").read_text().splitlines()[-1])
    # Eight bits may take a picture to another reading.
    assert last["right"] == pytest.approx(found["right"].mean().item(), abs=0.05)
    assert last["scene_entropy_8"] == pytest.approx(found["scene_entropy"].mean().item(), abs=0.1)


def test_a_checkpoint_is_used_while_it_is_newer_than_the_result(finished, tmp_path):
    """Catches a sampler that shows the old student of a run that trains on."""
    out = shutil.copytree(finished, tmp_path / "run")
    run.checkpoints(out)[-1].rename(out / "checkpoint-000003")
    assert run.newest_student(finished).name == "student"
    assert run.newest_student(out).name == "checkpoint-000003"


@pytest.mark.parametrize("argv, words", [
    (["--alpha", "0.9"], "alpha was 0.94, is 0.9"), (["--seed", "4"], "seed was 3407, is 4")])
def test_a_run_with_other_settings_is_refused_and_left_as_it_was(
        finished, tmp_path, argv, words, capsys):
    """Names the difference. Catches a resumed run that mixes two."""
    out = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    argv = [*STAGE1, "--iterations", "3", "--out", str(out), *argv]
    assert words in refused(train_stage1.main, argv, capsys)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_damaged_checkpoint_is_named(finished, no_pictures, tmp_path, capsys):
    """Catches a traceback, and a run that begins anew without a word."""
    out = shutil.copytree(finished, tmp_path / "run")
    with open(run.checkpoints(out)[-1] / "student.safetensors", "r+b") as file:
        file.truncate(1000)
    line = refused(train_stage1.main, [*STAGE1, "--iterations", "3", "--out", str(out)], capsys)
    assert "checkpoint-000002 does not load" in line and "delete it to go on" in line


def test_nothing_of_the_users_is_deleted_without_overwrite(finished, no_pictures, tmp_path, capsys):
    """A folder of somebody else's is refused, also with --overwrite; a run is replaced with it
    alone, also behind a link to another disk, and the prompts of another file are not taken for its
    own. Catches a link that is replaced by a folder."""
    own = tmp_path / "thesis"
    own.mkdir()
    (own / "chapter1.txt").write_text("years of work")
    for more in ([], ["--overwrite"], ["--seed", "1"]):
        argv = [*STAGE1, "--iterations", "1", "--out", str(own), *more]
        line = refused(train_stage1.main, argv, capsys)
        assert "is not a run folder" in line and (own / "chapter1.txt").exists()
        (own / "settings.json").write_text('{"stage": 1}')        # an editor's own
    prompts, out, disk = tmp_path / "prompts.txt", tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    out.symlink_to(disk)
    prompts.write_text("a red circle\na blue cross\n")
    argv = [*STAGE1, "--iterations", "1", "--prompts", str(prompts), "--out", str(out)]
    train_stage1.main(argv)
    prompts.write_text("a red circle\na blue square\n")
    assert "other prompts" in refused(train_stage1.main, [*argv, "--iterations", "2"], capsys)
    train_stage1.main([*argv, "--overwrite", "--alpha", "0.5"])
    assert out.is_symlink() and run.read_settings(disk)["alpha"] == 0.5
    assert len(run.checkpoints(disk)) == len(metrics(disk)) == 1


def test_a_gradient_that_is_not_finite_moves_no_weight_and_stops_the_run(
        no_pictures, tmp_path, monkeypatch, capsys):
    """Catches NaN that spreads into the weights, and a run that goes on with it for hours."""
    factors = iter([1.0, math.nan])

    def loss(p, p_teacher, p_fake):
        return dmd_loss(p, p_teacher, p_fake) * next(factors)
    monkeypatch.setitem(train_stage1.LOSSES, "ours", loss)
    out = tmp_path / "run"
    line = refused(train_stage1.main, [*STAGE1, "--iterations", "9", "--out", str(out)], capsys)
    assert "a gradient is not finite" in line and not (out / "student").exists()
    saved, = run.checkpoints(out)
    assert saved.name == "checkpoint-000001" and len(metrics(out)) == 1
    state = load_file(saved / "student.safetensors")
    assert all(value.isfinite().all() for value in state.values())


def test_gradients_are_clipped_by_one_norm_of_all_learners():
    """Catches a clip of each network by itself, and gradients that go into the next update."""
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    grads = [torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0, 0])]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad.clone()
    norm = run.clip_and_step([torch.optim.SGD([weight], lr=1.0) for weight in weights], 2.0)
    assert norm == pytest.approx(5)
    for weight, grad in zip(weights, grads, strict=True):
        assert torch.allclose(-weight.data, 2 / 5 * grad) and weight.grad is None


def raise_full(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_loses_nothing(finished, no_pictures, tmp_path, monkeypatch, capsys):
    """The disk fills while the second checkpoint is written, then while the result is, which is not
    ours to write: one line, exit code 1, the first checkpoint is whole, and the same command ends
    as the undisturbed run."""
    out, save = tmp_path / "run", run.save_file
    argv = [*STAGE1, "--iterations", "2", "--out", str(out)]

    def full(tensors, path, metadata=None):
        if "checkpoint-000002" in str(path) and "optimizer" in str(path):     # the networks fit
            raise_full()
        save(tensors, path, metadata)
    for owner, name, writes, words, saved in (
            (run, "save_file", full, "checkpoint-000002", 1),
            (SD3Transformer2DModel, "save_pretrained", raise_full, f"write {out}/student (", 2)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(owner, name, writes)
            train_stage1.main(argv)
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 1 and "No space left on device" in line
        assert words in line and " MB)" in line and len(run.checkpoints(out)) == saved
    train_stage1.main(argv)
    assert_same_run(out, finished)


@pytest.mark.parametrize("script, argv, words", [
    (train_stage1, ["--student-lr", "nan"], "must lie between 0 and 1, not nan"),
    (train_stage1, ["--form", "x1"], "invalid choice: 'x1'"),
    (train_stage1, ["--alfa", "1"], "unrecognized arguments: --alfa"),
    (train_stage1, ["--model", "sd3-big"], "there is no model sd3-big"),
    (train_stage1, ["--model", "README.md"], "README.md is a file"),
    (train_stage1, ["--accumulation", "5"], "is not a multiple of --accumulation 5"),
    (train_stage1, ["--prompts", "nowhere.txt"], "--prompts nowhere.txt: not a file"),
    (train_stage1, ["--out", "README.md"], "is a file"),
    (train_stage2, ["--init", "EMPTY"], "holds neither student/ nor a checkpoint yet"),
    (train_stage2, ["--init", "nowhere"], "there is no run folder nowhere"),
    (train_stage2, ["--init", "FINISHED2"], "is a run of Stage 2"),
    (train_stage2, ["--init", "FINISHED", "--cached-blocks", "1-11"], "does not fit"),
    (train_stage2, ["--init", "FINISHED", "--cached-blocks", "1,2"], "is written first-last"),
    (train_stage2, ["--init", "FINISHED", "--reference", "FINISHED"], "needs more steps"),
    (train_stage2, ["--init", "FINISHED", "--references-from", "FINISHED2", "--seed", "5"],
     "has another seed: 3407, not 5"),
    (train_stage2, ["--init", "FINISHED", "--references-from", "FINISHED2", "--pool", "3"],
     "has another pool: 24, not 3"),
    (train_stage2, ["--init", "FINISHED", "--references-from", "tiny/student"],
     "holds no references"),
    (train_stage1, ["--resolution", "64"], "is for real models"),
    (sampler, ["--out", "picture.jpg"], "ends in .png"),
    (sampler, ["--checkpoint", "tiny", "--out", "x.png"], "settings.json is missing"),
    (sampler, ["--checkpoint", "OLD", "--out", "x.png"], "lacks cached_blocks"),
    (evaluate, ["--model", "sd3-medium", "--checkpoint", "FINISHED"], "real models need"),
])
def test_a_mistake_is_one_line_before_anything_is_written(
        script, argv, words, finished, finished2, tmp_path, monkeypatch, capsys):
    """Catches a traceback, and a refusal after the weights were loaded."""
    settings = run.read_json(finished / "settings.json")
    known = {"FINISHED": finished, "FINISHED2": finished2, "EMPTY": tmp_path / "empty",
             "OLD": tmp_path / "old"}
    run.write_json(known["EMPTY"] / "settings.json", settings)            # stopped at once
    run.write_json(known["OLD"] / "settings.json", settings | {"stage": 2})     # lacks Stage II's
    argv = [str(known.get(word, word)) for word in argv]
    for name in ("load_part", "encode_prompts"):
        monkeypatch.setattr(model, name, lambda *a, **k: pytest.fail("weights were loaded"))
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    assert words in refused(script.main, argv, capsys)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_what_it_costs_and_writes_nothing(finished2, tmp_path, monkeypatch, capsys):
    """SD3-Medium without a download, as it fits 80 GB: in parts of 16, checkpointed; and a folder,
    by its configs. Of 8 processes each has an eighth of the batch already. Catches a plan that
    needs gated weights, or a Stage I run that is not there yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked the network"))
    train_stage1.main(["--model", "sd3-medium", "--dry-run"])
    train_stage2.main(["--model", "sd3.5-large", "--no-gradient-checkpointing", "--dry-run"])
    text = capsys.readouterr().out
    assert re.findall("(?:accumulation|checkpointing) +(.*)", text) == ["4", "True", "8", "False"]
    assert "2.03 billion parameters" in text and "= 64.9 GB" in text and "13 passes" in text
    assert "8.06 billion parameters" in text and "2.22807 passes" in text
    train_stage1.main(["--model", TINY.source, "--dry-run"])
    train_stage2.main(["--references", "8", "--references-from", str(finished2), "--dry-run"])
    assert capsys.readouterr().out.count("billion parameters") == 2
    monkeypatch.setenv("WORLD_SIZE", "8")
    train_stage1.main(["--model", "sd3-medium", "--dry-run"])
    assert re.findall("accumulation +(.*)", capsys.readouterr().out) == ["1"]
    argv = ["--model", "sd3-medium", "--references", "9"]
    assert "is not a multiple of 8 processes" in refused(train_stage2.main, argv, capsys)
    assert not list(tmp_path.iterdir())
