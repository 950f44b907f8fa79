"""The journey of a real model's user, on a stand-in of true layout: three text encoders with their
own tokenizers (77 + 256 tokens), a VAE of 16 channels, three blocks, random weights.

    python -m pytest -q tools/test_real_path.py

Names are sentences; a docstring says which mistake the test would catch.
"""

import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import run  # first, as in every script: it silences what the others import

import evaluate
import model
import sampler
import train_stage1
import train_stage2
from test_all import SMALL, STAGE2, weights
from tools.processes import clip_and_step, optimizer_tensors
from tools.test_processes import environment
from tools.test_tools import assert_same_student, lines_of, refused

pytestmark = pytest.mark.usefixtures("one_process")
HERE = Path(model.__file__).parent
WORDS = ["--batch-size", "2", "--pool", "4", "--log-every", "1", "--sample-every", "9",
         "--checkpoint-every", "1"]
TURNS = [*WORDS, "--cached-blocks", "0-1", "--references", "6", "--warmup", "0",
         "--compensation-lr", "1e-3"]


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    """Turns G, D, D, G, …; no sample grids."""
    monkeypatch.setattr(train_stage2, "D_ONLY", 0)
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a: None)


@pytest.fixture(scope="session")
def stage1(small_sd3, tmp_path_factory):
    """A Stage I run of the stand-in."""
    out = tmp_path_factory.mktemp("real") / "stage1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.Gallery, "save", lambda *a: None)
        train_stage1.main(["--model", str(small_sd3), *WORDS, "--iterations", "2", "--out",
                           str(out)])
    return out


def interrupt_after(script, count, patch):
    """From now on the script stops, as by Ctrl-C, after so many updates."""
    real, calls = clip_and_step, []

    def step(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            os.kill(os.getpid(), 2)
        return real(*arguments)
    patch.setattr(script, "clip_and_step", step)


def sample(folder, out):
    """The picture of one prompt and noise of a run, as bytes."""
    sampler.main(["--checkpoint", str(folder), "--prompt", "an old cat", "--num-images", "1",
                  "--out", str(out)])
    return out.read_bytes()


# ----------------------------------------------------------------------------- the presets

@pytest.mark.parametrize("name, span, flops, with_f", [
    ("sd3-medium", (2, 9), 1.666, 1.676), ("sd3.5-medium", (2, 9), 1.608, 1.615),
    ("sd3.5-large", (2, 11), 1.737, 1.743)])
def test_the_nfe_meter_gives_the_known_numbers(name, span, flops, with_f):
    """By FLOPs with f, at 1024² and 333 text tokens. Catches a counter that misses attention."""
    counted = sampler.count_nfe(model.PRESETS[name], span)
    assert counted["flops"] == pytest.approx(flops, abs=1e-3)
    assert counted["flops_with_f"] == pytest.approx(with_f, abs=1e-3)


@pytest.mark.parametrize("name, billions, blocks, width, norms, dual, side", [
    ("sd3-medium", 2.028, 24, 1536, 0, 0, 192), ("sd3.5-medium", 2.243, 24, 1536, 4, 13, 384),
    ("sd3.5-large", 8.057, 38, 2432, 4, 0, 192)])
def test_presets_have_the_published_architecture(name, billions, blocks, width, norms, dual, side):
    """Parameters, blocks, width, qk-norm, dual attention, largest side, from the built network.
    Catches a preset that some default fills in differently."""
    with torch.device("meta"):
        net = model.CachedSD3(**model.PRESETS[name].architecture)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(billions * 1e9, rel=5e-4)
    assert (len(net.transformer_blocks), net.inner_dim) == (blocks, width)
    attention = net.transformer_blocks[0].attn
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    assert sum(getattr(attention, name) is not None for name in names) == norms
    assert [block.attn2 is not None for block in net.transformer_blocks] == (
        [True] * dual + [False] * (blocks - dual))
    assert net.pos_embed.pos_embed.shape == (1, side ** 2, width)


# ----------------------------------------------------------------------------- forms of the folder

@pytest.mark.parametrize("form", ["sharded", "fp16"])
def test_sharded_and_half_precision_folders_simply_load(form, small_sd3, stage1,
                                                        tmp_path):
    """As the hub has them. Catches a loader that looks for one file of one name."""
    dtype = torch.float16 if form == "fp16" else torch.float32
    pipe = model.load_pipeline(model.find_preset(str(small_sd3)), dtype)
    how = {"variant": "fp16"} if form == "fp16" else {"max_shard_size": "30KB"}
    base = tmp_path / "base"
    pipe.save_pretrained(base, **how)
    files = [path.name for path in (base / "transformer").glob("*.safetensors")]
    assert len(files) > 1 if form == "sharded" else files == [
        "diffusion_pytorch_model.fp16.safetensors"]
    train_stage1.main(["--model", str(base), *WORDS, "--iterations", "2", "--out",
                       str(tmp_path / "run")])
    if form == "sharded":
        assert_same_student(stage1, tmp_path / "run", least=90)
    else:
        line = lines_of(tmp_path / "run")[-1]
        assert line["loss_fake"] == pytest.approx(lines_of(stage1)[-1]["loss_fake"], rel=1e-2)


def test_the_stock_call_is_code_that_runs_on_a_half_precision_base(small_sd3, tmp_path):
    """distill.json's stock_call, evaluated, on a base whose files are fp16, gives the student's
    picture. Catches encoders in half and a student in fp32: "Input type (c10::Half) …"."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    base, out = tmp_path / "base", tmp_path / "run"
    pipe = model.load_pipeline(model.find_preset(str(small_sd3)), torch.float16)
    pipe.save_pretrained(base)
    train_stage1.main(["--model", str(base), *WORDS, "--iterations", "1", "--out", str(out)])
    recipe = run.read_json(out / "distill.json")
    call = recipe["stock_call"].replace("RUN", str(out))
    noise = sampler.image_noise(42, [0], recipe["latent_shape"]).half()
    names = {"StableDiffusion3Pipeline": StableDiffusion3Pipeline, "torch": torch,
             "SD3Transformer2DModel": SD3Transformer2DModel, "prompt": "an old cat"}
    diffusers.utils.logging.disable_progress_bar()
    maker, arguments = call.rsplit(")(prompt", 1)
    pipe = eval(maker + ")", names)
    pipe.set_progress_bar_config(disable=True)
    picture = eval(f"pipe(prompt{arguments[:-1]}, latents=noise, output_type='pt')",
                   {**names, "pipe": pipe, "noise": noise}).images
    diffusers.utils.logging.enable_progress_bar()
    preset, device = model.find_preset(str(base)), torch.device("cpu")
    student, _, _ = sampler.load_student(out, preset, recipe, device)
    with torch.no_grad():
        latents, _, _ = sampler.roll_out(
            student, noise.float(), model.Prompts(preset, ["an old cat"], device).take([0]),
            sampler.sigma_grid(2))
        ours = model.Decoder(preset, device)(latents[-1]).clamp(0, 1)
    assert picture.dtype == torch.float16 and (picture.float() - ours).abs().max() < 0.02


# ----------------------------------------------------------------------------- to the end

def test_a_lora_run_is_sampled_before_and_after_its_end(small_sd3, stage1, tmp_path,
                                                        monkeypatch, capsys):
    """G's and D's turns, stopped in between, sampled, gone on with, merged. Catches a checkpoint
    with adapters that the sampler takes for a broken student."""
    pytest.importorskip("peft")
    words = ["--model", str(small_sd3), *TURNS, "--lora-rank", "2", "--student-lr", "1e-2",
             "--init", str(stage1), "--iterations", "4", "--out"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after(train_stage2, 2, patch)
        train_stage2.main([*words, str(tmp_path / "run")])
    assert not (tmp_path / "run" / "student").exists()
    unfinished = sample(tmp_path / "run", tmp_path / "half.png")
    for folder in ("run", "undisturbed"):
        train_stage2.main([*words, str(tmp_path / folder)])
    assert_same_student(tmp_path / "run", tmp_path / "undisturbed", least=90)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "undisturbed")
    assert sample(tmp_path / "run", tmp_path / "end.png") != unfinished
    # What is sampled from the last checkpoint, adapters added, is what the merged result gives.
    preset, recipe = model.find_preset(str(small_sd3)), run.read_json(
        tmp_path / "run" / "distill.json")
    merged = sampler.load_student(tmp_path / "run", preset, recipe, "cpu")[0].state_dict()
    added = sampler.load_student(tmp_path / "run", preset, recipe | {"iteration": 0}, "cpu")[0]
    for name, tensor in added.state_dict().items():
        assert torch.allclose(tensor, merged[name], atol=1e-3), name
    before = sampler.load_student(stage1, preset, run.read_json(stage1 / "distill.json"), "cpu")[0]
    assert not torch.allclose(before.state_dict()["transformer_blocks.2.attn.to_q.weight"],
                              merged["transformer_blocks.2.attn.to_q.weight"], atol=1e-3)


def test_the_base_under_lora_may_be_in_half_precision(small_sd3, stage1, tmp_path,
                                                      monkeypatch):
    """As on one GPU. Catches adapters that learn in half precision, and a merge that rounds the
    weights that never learned."""
    pytest.importorskip("peft")
    words = ["--model", str(small_sd3), *TURNS, "--lora-rank", "2", "--init", str(stage1),
             "--iterations", "2", "--out"]
    train_stage2.main([*words, str(tmp_path / "full")])
    monkeypatch.setattr(train_stage2, "lora_base_dtype", lambda device: torch.float16)
    train_stage2.main([*words, str(tmp_path / "half")])
    saved = load_file(run.checkpoints(tmp_path / "half")[-1] / "student.safetensors")
    assert {t.dtype for name, t in saved.items() if "lora_" in name} == {torch.float32}
    assert {t.dtype for name, t in saved.items() if "lora_" not in name} == {torch.float16}
    full, half, before = (weights(f) for f in (tmp_path / "full", tmp_path / "half", stage1))
    for name in full:
        assert torch.allclose(full[name].float(), half[name].float(), atol=2e-3), name
    assert torch.equal(half["proj_out.weight"], before["proj_out.weight"])


@pytest.mark.slow
def test_every_tool_takes_the_folder(small_sd3, stage1, tmp_path, capsys):
    """The span finder, the benchmark, the plan, on a folder with fewer blocks than the preset's
    span."""
    from tools import benchmark, find_span
    find_span.main(["--checkpoint", str(stage1), "--out", str(tmp_path / "span.png")])
    benchmark.main(["--model", str(small_sd3), "--cached-blocks", "0-1", "--rounds", "1"])
    assert "span 2-9 does not fit" in refused(
        train_stage2, ["--model", small_sd3, "--init", stage1, "--out", tmp_path / "run"], capsys)
    train_stage1.main(["--model", str(small_sd3), *WORDS, "--dry-run"])
    train_stage2.main(["--model", str(small_sd3), *TURNS, "--init", str(stage1), "--dry-run"])
    assert capsys.readouterr().out.count("memory plan") == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")     # of Dynamo itself
def test_compiled_blocks_give_the_same_run(small_sd3, stage1, tmp_path, monkeypatch):
    """--compile. Catches weights that are saved under compiled names."""
    compiled, real = [], torch.nn.Module.compile

    def compile_quickly(module):
        compiled.append(module)
        real(module, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    train_stage1.main(["--model", str(small_sd3), *WORDS, "--iterations", "2", "--compile",
                       "--out", str(tmp_path / "run")])
    assert len(compiled) == 9                             # three networks of three blocks
    ours, theirs = weights(tmp_path / "run"), weights(stage1)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


# ----------------------------------------------------------------------------- made once

def test_prompts_are_encoded_once_for_all_runs(small_sd3, tmp_path, monkeypatch):
    """In one file beside the runs, in full batches. Catches encoders that are read again, and
    prompts whose last bits depend on their neighbours."""
    preset = model.find_preset(str(small_sd3))
    texts = [f"a cat number {i}" for i in range(20)]
    many = model.Prompts(preset, texts, torch.device("cpu"), tmp_path)
    few = model.Prompts(preset, texts[17:18], torch.device("cpu"), tmp_path)
    assert len(list(tmp_path.glob("prompts-*.safetensors"))) == 2
    assert many.embeds.shape == (21, 333, 32) and many.pooled.shape == (21, 32)
    for one, other in zip(many.take([17]), few.take([0]), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(many.uncond(1), few.uncond(1), strict=True):
        assert torch.equal(one, other)
    dog = model.Prompts(preset, ["a dog"], torch.device("cpu"), tmp_path)
    assert not torch.equal(dog.take([0])[0], few.take([0])[0]), "as many texts, but others"
    monkeypatch.setattr(model, "encode_prompts", None)
    again = model.Prompts(preset, texts, torch.device("cpu"), tmp_path)
    assert torch.equal(again.embeds, many.embeds)
    # A write that is cut off leaves no file that would be taken for whole.
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_interrupted_references_go_on_where_they_were(small_sd3, stage1, tmp_path,
                                                      monkeypatch):
    """Hours for a real model. Catches a kill that loses all, and references that differ by it."""
    words = ["--model", str(small_sd3), *TURNS, "--init", str(stage1), "--iterations", "1", "--out"]
    real, calls = train_stage2.sample_guided, []

    def sample_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)
    monkeypatch.setattr(train_stage2, "sample_guided", sample_once)
    with pytest.raises(SystemExit) as stopped:
        train_stage2.main([*words, str(tmp_path / "a" / "run")])
    assert stopped.value.code == 130 and len(calls) == 2
    train_stage2.main([*words, str(tmp_path / "a" / "run")])
    assert len(calls) == 3, "six references are two batches; the first was there"
    train_stage2.main([*words, str(tmp_path / "b" / "run")])
    assert_same_student(tmp_path / "a" / "run", tmp_path / "b" / "run", least=90)
    folders = [next((tmp_path / name).glob("references-*")) for name in "ab"]
    assert folders[0].name == folders[1].name
    for file in folders[0].iterdir():
        pictures = load_file(file)["pictures"]
        assert pictures.dtype == torch.uint8 and pictures.shape[1:] == (3, 64, 64)
        assert torch.equal(pictures, load_file(folders[1] / file.name)["pictures"])


def test_others_few_step_students_make_references_and_rows(finished, tmp_path,
                                                           capsys):
    """A transformer folder with a number of steps, here our own: its references are those of the
    run with as many steps; its row in the table is the run's own."""
    four = tmp_path / "four"
    train_stage1.main([*SMALL, "--steps", "4", "--iterations", "1", "--out", str(four)])
    words = [*STAGE2, "--iterations", "1", "--init", str(finished), "--out"]
    pictures = []
    for name, reference in (("run", four), ("folder", four / "student")):
        train_stage2.main([*words, str(tmp_path / name / "run"), "--reference", str(reference)])
        file, = (tmp_path / name).glob("references-*/*.safetensors")
        pictures.append(load_file(file)["pictures"])
    assert torch.equal(*pictures)
    assert "has in_channels" in refused(train_stage2, [*words, tmp_path / "no", "--reference",
                                                       other_channels(four, tmp_path)], capsys)
    evaluate.main(["--checkpoint", str(four), "--few-step", str(four / "student"), "--teacher",
                   "no", "--samples-per-prompt", "2", "--own-path", "--out", str(tmp_path / "ev")])
    rows = json.loads((tmp_path / "ev" / "results.json").read_text())["rows"]
    ours, theirs = [row for row in rows if row["name"] in ("four", "student, 4 steps")]
    for key in ("steps", "nfe_blocks", "prompt_accuracy", "scene_entropy", "diversity"):
        assert ours[key] == theirs[key], key


def other_channels(run_folder, tmp_path):
    """A transformer folder of another base."""
    folder = tmp_path / "other"
    folder.mkdir()
    config = json.loads((run_folder / "student" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "in_channels": 16}))
    return folder


# ----------------------------------------------------------------------------- checkpoints, memory

def test_a_checkpoint_holds_one_part_at_a_time(small_sd3, tmp_path, monkeypatch):
    """49 GB for SD3-Medium in Stage I. Catches all parts gathered before the first is written."""
    alive, most, order, real = [], [], [], run.save_tensors

    def watch(path, tensors):
        if "checkpoint" in str(path):
            order.append("write")
            most.append(sum(ref() is not None for ref in alive))
            alive.extend(weakref.ref(tensor) for name, tensor in tensors.items()
                         if name.endswith("exp_avg"))
        real(path, tensors)

    def copied(*arguments):
        """The optimiser's tensors copied, as they are where they were on a GPU or in pieces."""
        order.append("gather")
        return {name: tensor.clone() for name, tensor in optimizer_tensors(*arguments).items()}

    monkeypatch.setattr(run, "save_tensors", watch)
    monkeypatch.setattr(run, "optimizer_tensors", copied)
    train_stage1.main(["--model", str(small_sd3), *WORDS, "--iterations", "1", "--out",
                       str(tmp_path / "run")])
    assert order == ["write", "write", "gather", "write", "gather", "write"]
    assert len(alive) > 100 and max(most) == 0


def test_saving_takes_two_percent_of_the_time_where_nothing_else_is_said(tmp_path, monkeypatch):
    """A checkpoint of two minutes is due every 100 minutes, one of a second every five minutes.
    Catches 10–20 % of a rented GPU's time."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    trained = run.Run(tmp_path, {})
    for seconds, wait in ((120, 6000), (1, 300)):
        trained.saved_at, trained.save_seconds = now[0], seconds
        now[0] += wait - 1
        assert not trained.due(7, None)
        now[0] += 2
        assert trained.due(7, None)
    assert trained.due(14, 7) and not trained.due(15, 7)


MEMORY = """
import resource, sys, torch, run, model
from cache import CachedSD3
from tools.processes import any_process, first, join_processes, whole_state
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def main():
    join_processes(torch.device("cpu"))
    preset = model.find_preset(sys.argv[1])
    any_process(False)
    before = peak()
    net = model.place(model.load_transformer(preset, everywhere=False), torch.device("cpu"))
    whole = sum(p.numel() * 4 for p in net.parameters())
    state = whole_state(net)
    if first():
        stock = CachedSD3.from_pretrained(preset.source, subfolder="transformer")
        assert all(torch.equal(state[name], t) for name, t in stock.state_dict().items())
    else:
        print("SHARE", (peak() - before) / whole)
    any_process(False)
main()
"""


def test_the_second_process_never_holds_a_whole_network(small_sd3, tmp_path):
    """Two processes with gloo; peak resident memory. Catches eight copies of SD3.5-Large, 300 GB,
    in one machine's memory; and pieces that are not the first process's weights."""
    config = dict(model.PRESETS["sd3-medium"].architecture, num_layers=12, num_attention_heads=8,
                  attention_head_dim=64, caption_projection_dim=512, joint_attention_dim=512,
                  pooled_projection_dim=64, sample_size=8, pos_embed_max_size=8)
    base = tmp_path / "base"
    base.mkdir()
    for part in small_sd3.iterdir():
        if part.name != "transformer":
            (base / part.name).symlink_to(part)
    diffusers.SD3Transformer2DModel(**config).save_pretrained(base / "transformer")
    (tmp_path / "memory.py").write_text(MEMORY)
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         "29677", str(tmp_path / "memory.py"), str(base)], cwd=HERE, text=True,
        capture_output=True, env=environment())
    assert process.returncode == 0, process.stderr[-2000:]
    share = float(process.stdout.split("SHARE")[1].split()[0])
    assert 0.5 < share < 0.9, "half of the network, and what is on its way"


def test_the_miniature_stays_on_the_cpu_where_a_gpu_is(monkeypatch):
    """Its numbers are a CPU's, and a GPU is no faster. Catches a README whose commands give other
    numbers on a machine that happens to have one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tiny, real = (model.find_preset(name) for name in ("tiny", "sd3-medium"))
    assert model.pick_device(tiny).type == "cpu"
    assert model.pick_device(tiny, "cuda").type == "cuda"
    assert model.pick_device(real).type == "cuda"
    assert model.pick_device(real, "cpu").type == "cpu"


def test_pictures_of_a_gpus_decoder_look_the_same(monkeypatch):
    """On a GPU the VAE is in bf16. Catches a decoder that loses more than the eye sees."""
    tiny, cpu = model.find_preset("tiny"), torch.device("cpu")
    latents = sampler.image_noise(0, range(24), (4, 8, 8)) / 2      # any colours and edges
    with torch.no_grad():
        exact = model.Decoder(tiny, cpu)(latents).clamp(0, 1)
        monkeypatch.setattr(model, "frozen_dtype", lambda device: torch.bfloat16)
        half = model.Decoder(tiny, cpu)(latents)
    assert half.dtype == torch.float32
    levels = 255 * (half.clamp(0, 1) - exact).abs()
    assert 0 < levels.mean() < 1 and levels.max() < 16
