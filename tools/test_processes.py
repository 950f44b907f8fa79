"""Several processes, and a real model in small: the layout of SD3-Medium through both stages.

    python -m pytest -q tools/test_processes.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run  # first, as in every script: it silences what the others import
import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from safetensors.torch import load_file

import model
import sampler
import train_stage1
from test_all import (SHAPE, TINY, assert_close, metrics, recipe, record, record2, settings_of,
                      weights)
from tools.processes import clip_and_step, first

HERE = Path(__file__).resolve().parent.parent


def environment():
    """For scripts of torchrun that lie elsewhere: they find the modules, and take one core each."""
    paths = [str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def small_sd3(tmp_path_factory):
    """SD3-Medium's pipeline in the layout of the hub: T5 and both CLIPs with their own kinds of
    tokenizers (77 + 256 tokens), 16 latent channels; three blocks of small width, random."""
    from tools.random_model import clip_tokenizer, t5_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    folder = tmp_path_factory.mktemp("models") / "small-sd3"
    tokenizer = clip_tokenizer(tmp_path_factory.mktemp("clip") / "tokenizer")
    tokenizer_3 = t5_tokenizer()
    torch.manual_seed(0)
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, projection_dim=16,
        eos_token_id=tokenizer.eos_token_id, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77)) for _ in range(2)]
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer_3), d_model=32, d_ff=32, num_layers=1,
                                 num_heads=2, d_kv=8))
    transformer = SD3Transformer2DModel(**{
        **model.PRESETS["sd3-medium"].architecture, "sample_size": 8, "num_layers": 3,
        "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 32,
        "caption_projection_dim": 16, "pooled_projection_dim": 32})
    vae = AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clips[0], text_encoder_2=clips[1], text_encoder_3=t5, tokenizer=tokenizer,
        tokenizer_2=tokenizer, tokenizer_3=tokenizer_3).save_pretrained(folder)
    shutil.copytree(TINY.discriminator, folder / "discriminator_backbone")
    return folder


REAL = ["--batch-size", "4", "--pool", "4", "--log-every", "1", "--sample-every", "9",
        "--checkpoint-every", "1"]


def trained(base, out, init):
    """Both stages of a real model on its folder `base`; the gradients of each update are written to
    out/STAGE-N.safetensors. In one process, or in each one of torchrun."""
    common = ["--model", str(base), *REAL, "--iterations", "2"]
    scripts = {
        "stage1": lambda words: record(train_stage1, words),
        "stage2": lambda words: record2([*words, "--init", str(init / "stage1"),  # turns G, D
                                         "--cached-blocks", "0-1", "--references", "4",
                                         "--warmup", "0", "--compensation-lr", "1e-3"])}
    for stage, script in scripts.items():
        for i, update in enumerate(script([*common, "--out", str(out / stage)])):
            if first():
                whole = {name: grad.contiguous() for name, grad in update["clipped"].items()}
                run.save_file(whole, out / f"{stage}-{i}.safetensors")


def unfinished(source, target):
    """A copy of trained()'s runs as they were before their last iteration."""
    shutil.copytree(source, target)
    for stage in ("stage1", "stage2"):
        shutil.rmtree(target / stage / "checkpoint-000002")
        shutil.rmtree(target / stage / "student")
        run.write_json(target / stage / "distill.json", recipe(target / stage) | {"iteration": 0})


@pytest.fixture(scope="session")
def one_and_two(small_sd3, tmp_path_factory):
    """A folder of the same runs: "one" by one process, "two" by two, "one-two" begun by one and
    ended by two, "two-one" the other way round."""
    folder = tmp_path_factory.mktemp("processes")
    trained(small_sd3, folder / "one", folder / "one")
    unfinished(folder / "one", folder / "one-two")
    script = folder / "two.py"
    script.write_text(
        "import pathlib, tools.test_processes\n"
        f"base, folder = pathlib.Path({str(small_sd3)!r}), pathlib.Path({str(folder)!r})\n"
        "for name in ('two', 'one-two'):\n"
        "    tools.test_processes.trained(base, folder / name, folder / 'one')\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)], capture_output=True, text=True, timeout=300,
        env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("look at") == 4, "only the first process prints"
    unfinished(folder / "two", folder / "two-one")
    trained(small_sd3, folder / "two-one", folder / "one")
    return folder


@pytest.mark.parametrize("update", [f"{stage}-{i}" for stage in ("stage1", "stage2")
                                    for i in range(2)])
def test_two_processes_give_the_gradients_of_one(update, one_and_two):
    """Fake score, student; G, D. Catches a share that is another process's too, a loss that is
    summed, small networks whose gradients nobody averages."""
    one, two = (load_file(one_and_two / name / f"{update}.safetensors") for name in ("one", "two"))
    assert len(one) > 10
    assert_close(two, one)


@pytest.mark.parametrize("name", ["two", "one-two", "two-one"])
def test_a_run_goes_on_under_another_number_of_processes(name, one_and_two):
    """The same gradient norms, and the same weights but for Adam's amplified noise: with β1 = 0 its
    first steps are nearly the gradient's sign. Catches a checkpoint that holds one process's part,
    and an optimiser that begins anew."""
    for stage in ("stage1", "stage2"):
        one, other = metrics(one_and_two / "one" / stage), metrics(one_and_two / name / stage)
        assert len(one) == len(other) == 2
        for a, b in zip(one, other, strict=True):
            norms = {key for key in a if "norm" in key}
            assert norms and all(b[key] == pytest.approx(a[key], rel=1e-2) for key in norms)
        before, after = weights(one_and_two / "one" / stage), weights(one_and_two / name / stage)
        assert before.keys() == after.keys()
        for key in before:
            difference = (after[key] - before[key]).float().abs()
            assert difference.mean() < 2e-6 and difference.max() < 1e-3, key


@pytest.mark.parametrize("stage, count", [("stage1", 2), ("stage2", 1.333)])
def test_a_real_models_path_runs_from_the_command_line_to_the_picture(stage, count, one_and_two,
                                                                      tmp_path, capsys):
    """T5 and 16 channels, through the same code as tiny. Catches anything that only the miniature
    has."""
    sampler.main(["--checkpoint", str(one_and_two / "one" / stage), "--prompt", "an old cat",
                  "--num-images", "2", "--out", str(tmp_path / "cat.png")])
    assert (tmp_path / "cat.png").exists()
    assert f"2 images, {count} network evaluations each" in capsys.readouterr().out
    saved = weights(one_and_two / "one" / stage)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}, "half precision"


def test_a_real_model_without_t5_takes_the_same_path(small_sd3, no_pictures, tmp_path):
    """Whatever its model_index.json says. Catches 256 zero tokens in the place of T5's."""
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(small_sd3, base, ignore=shutil.ignore_patterns("*_3"))
    train_stage1.main(["--model", str(base), *REAL, "--iterations", "1", "--out", str(out)])
    preset = model.find_preset(str(base))
    embeds, _ = model.encode_prompts(preset, ["an old cat"], "cpu")
    assert embeds.shape[1] == preset.tokens == 77
    sampler.main(["--checkpoint", str(out), "--prompt", "an old cat", "--num-images", "1",
                  "--out", str(tmp_path / "cat.png")])
    assert (tmp_path / "cat.png").exists()


def test_a_process_draws_its_own_noises_alone(monkeypatch):
    """Catches processes that see other numbers than one does, and one that draws for all."""
    settings, (_, _, texts) = settings_of(train_stage1, ["--batch-size", "8"])
    whole = train_stage1.draw_batch(5, settings, SHAPE, sampler.sigma_grid(2), texts)
    drawn = []
    def spy(seed, numbers, *rest):
        drawn.append(len(numbers))
        return sampler.image_noise(seed, numbers, *rest)
    monkeypatch.setattr(train_stage1, "image_noise", spy)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    part = train_stage1.draw_batch(5, settings, SHAPE, sampler.sigma_grid(2), texts)
    assert part.keys() == whole.keys() and drawn == [2, 2, 2]
    for name, values in part.items():
        assert values.equal(whole[name][4:6]), name


def test_a_gradient_is_shortened_to_the_limit_and_never_lengthened():
    """Of both networks jointly. Catches a factor above 1, and a norm for each network alone."""
    def updates(limit):
        nets = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
        optimizers = [torch.optim.SGD(net.parameters(), lr=1.0) for net in nets]
        before = [net.weight.item() for net in nets]
        for net, gradient in zip(nets, (3.0, 4.0), strict=True):
            net.weight.grad = torch.tensor([[gradient]])
        assert clip_and_step(optimizers, limit) == 5
        assert all(net.weight.grad is None for net in nets)
        return [old - net.weight.item() for old, net in zip(before, nets, strict=True)]
    assert updates(10.0) == pytest.approx([3, 4], abs=1e-4)
    assert updates(1.0) == pytest.approx([0.6, 0.8], abs=1e-4)
    assert updates(float("inf")) == pytest.approx([3, 4], abs=1e-4)
