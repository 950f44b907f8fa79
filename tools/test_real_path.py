"""What a real model's user does, on a stand-in of the hub's folders: true layout, three narrow
blocks, random weights. And what can be switched on. A docstring says which mistake is caught.

    python -m pytest -q tools/test_real_path.py
"""

import re
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import run  # first, as in every script: it silences what the others import
import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel,
                          CLIPProcessor, Dinov2Config, Dinov2Model)

import evaluate
import model
import sampler
import train_stage1
import train_stage2
from test_all import (ask, assert_close, leave_out_pictures, metrics, references_of, refused,
                      tensors)
from tools import random_model

CPU, SHAPE = torch.device("cpu"), (16, 8, 8)
NARROW = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16,
          "joint_attention_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 8}
COMMON = ["--batch-size", 2, "--pool", 4, "--iterations", 2, "--checkpoint-every", 1,
          "--accumulation", 1, "--no-gradient-checkpointing"]
WORDS = {train_stage1: [*COMMON, "--log-every", 1],
         # Turns G (of f alone), D, D, G: D_ONLY is 0 in these tests.
         train_stage2: [*COMMON, "--iterations", 4, "--cached-blocks", "0-1", "--references", 4,
                        "--warmup", 0, "--compensation-lr", 2e-3]}


# Compiling looks at attributes that torch warns of; here a warning would be an error.
TRACED = pytest.mark.filterwarnings("ignore")


def line_of(script, out, *words):
    """A command line. Later words replace earlier ones."""
    return [str(word) for word in [*WORDS[script], *words, "--out", out]]


def train(script, out, *words):
    script.main(line_of(script, out, *words))
    return out


def make_base(folder, name="sd3-medium"):
    """A pipeline folder as the hub has it, narrow enough for a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in NARROW.items():
            patch.setitem(model.PRESETS[name].architecture, key, value)
        patch.setitem(random_model.SD3_VAE, "block_out_channels", [8] * 4)
        patch.setitem(random_model.SD3_VAE, "norm_num_groups", 4)
        patch.setitem(random_model.CONVNEXT_BASE, "depths", [1] * 4)
        patch.setitem(random_model.CONVNEXT_BASE, "hidden_sizes", [8] * 4)
        patch.setattr(random_model, "CLIP_WIDTHS", ((16, 2), (16, 2)))
        patch.setattr(random_model, "T5_WIDTH", 32)
        random_model.main(["--model", name, "--blocks", "3", "--size", "8", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A base, both stages on it (Stage II: a turn of G, one of D), the words that make Stage II
    again. No network; no curves and sample grids, which take most of the time."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *a: pytest.fail("asked the network"))
        patch.setitem(sys.modules, "lpips", None)         # as if not installed
        leave_out_pictures(patch)
        patch.setattr(train_stage2, "D_ONLY", 0)
        base = make_base(folder / "sd3")
        stage1 = train(train_stage1, folder / "stage1", "--model", base)
        again = ["--model", base, "--init", stage1]
        stage2 = train(train_stage2, folder / "stage2", *again)
        yield SimpleNamespace(base=base, preset=model.find_preset(str(base)), stage1=stage1,
                              stage2=stage2, again=again)


def load(folder):
    """(student, span, f) as our commands load them from a run."""
    settings = run.read_settings(folder)
    return model.load_student(folder, settings, model.find_preset(settings["model"]), CPU)


def pulls(folder):
    """What the gradients left in the optimisers, {name: tensor}."""
    return {name: tensor for file in folder.glob("checkpoint-*/*_optimizer.safetensors")
            for name, tensor in load_file(file).items() if name.endswith("exp_avg")}


# ================================================================== from training to the table

def meters(folder):
    """Stand-ins for CLIP, PickScore and DINOv2, as options of evaluate.py."""
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(**small, image_size=16, patch_size=8)
    size = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = random_model.clip_tokenizer()
    text = dict(**small, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    for name in ("clip", "pickscore"):
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        CLIPModel(config).save_pretrained(folder / name)
        CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder / name)
    Dinov2Model(Dinov2Config(**vision)).save_pretrained(folder / "dino")
    BitImageProcessor(**size).save_pretrained(folder / "dino")
    return ["--clip", f"{folder}/clip", "--pickscore", f"{folder}/pickscore",
            "--dino", f"{folder}/dino"]


def test_a_real_model_goes_from_training_to_the_table(real, tmp_path, monkeypatch, capsys):
    """Catches a column of one world asked of the other, two rows that are one path, a long prompt
    whose end nobody reads, and nobody says so, and a missing network that is not named by its
    option."""
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.write_text('an old cat\n{"prompt": "' + 300 * "a red ../fox " + '"}\n')
    argv = [str(word) for word in [
        "--model", real.base, "--checkpoint", real.stage1, real.stage2, "--prompts", prompts,
        "--samples-per-prompt", 2, "--teacher", "all", "--out", out]]
    monkeypatch.setattr(model.constants, "HF_HUB_OFFLINE", True)
    line = refused(evaluate.main, argv, capsys)
    assert model.CLIP in line and line.endswith("--clip")
    sampler.main(["--checkpoint", str(real.stage2), "--prompts", str(prompts), "--num-images", "3",
                  "--out", str(tmp_path / "grid.png")])
    with Image.open(tmp_path / "grid.png") as picture:    # two pixels of white around each
        assert picture.size == (3 * 66, 2 * 66)
    assert "1 of 3 prompts have more than T5's 256 tokens" in capsys.readouterr().out
    evaluate.main([*argv, *meters(tmp_path)])
    assert not (real.stage2 / "prompts.safetensors").exists(), "they are its Stage I's"
    rows = {row["name"]: row for row in run.read_json(out / "results.json")["rows"]}
    assert list(rows)[0] == "teacher, w = 7 for sigma <= 0.94"
    assert [row["nfe_blocks"] for row in rows.values()] == pytest.approx(
        [51, 56, 28, 2, 2, 4 / 3, 4 / 3, 4 / 3, 2, 4 / 3])
    assert len({row["pick_score"] for row in rows.values()}) == 10
    assert {name for name in evaluate.MEASURES if rows["stage2"][name] is not None} == {
        "clip_score", "pick_score", "diversity", "frechet_to_teacher"}
    assert rows["stage2"]["speedup"] > 1
    with Image.open(out / "grid.png") as picture:         # ten rows, two prompts of two pictures
        assert picture.height == 10 * 66 and picture.width > 4 * 66


def snippets(page, replaced):
    """The Python code of README.md or a page in docs/, with other words in some places."""
    text = (Path(model.__file__).parent / page).read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.S))
    for old, new in replaced.items():
        code = code.replace(old, new)
    return code


@TRACED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_uploaded_run_loads_by_the_pages_code(dtype, real, tmp_path, monkeypatch):
    """docs/REAL_MODELS.md, for one who has the stock libraries and what `hf upload` takes: the run,
    then blocks compiled, the prompt kept, a small VAE, four pictures. Catches a snippet that is not
    what training took for granted, and a file that the code needs and nobody uploads."""
    folder, x = tmp_path / "uploaded", sampler.image_noise(42, [0], SHAPE)
    shutil.copytree(real.stage2 / "student", folder / "student")
    shutil.copy(real.stage2 / "compensation.safetensors", folder)
    shutil.copy(Path(model.__file__).with_name("cache.py"), folder)
    ours = str(Path(model.__file__).parent)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ours)])
    monkeypatch.delitem(sys.modules, "cache")
    AutoencoderTiny(latent_channels=16, encoder_block_out_channels=[8] * 4,
                    decoder_block_out_channels=[8] * 4).save_pretrained(tmp_path / "taesd3")
    compiled = compile_for_a_test(monkeypatch)
    names = {"more": {"latents": x.to(getattr(torch, dtype)), "output_type": "pt"}}
    exec(snippets("docs/REAL_MODELS.md", {
        'snapshot_download("ME/NAME")': repr(str(folder)), '"cuda"': '"cpu"',
        "stabilityai/stable-diffusion-3-medium-diffusers": str(real.base), "(2, 9)": "(0, 1)",
        "torch.bfloat16": f"torch.{dtype}", "guidance_scale=1.0).images[0]":
        "guidance_scale=1.0, **more).images[0]", "madebyollin/taesd3": str(tmp_path / "taesd3"),
        }), names)
    assert sys.modules["cache"].__file__ == str(folder / "cache.py")
    student, span, f = load(real.stage2)
    prompt = model.Prompts(real.preset, ["an owl in heavy snow"], CPU).take([0])
    with torch.no_grad():
        latents, _, _ = sampler.roll_out(student, x, prompt, sampler.sigma_grid(2), span, f)
        error = names["image"] - model.Decoder(real.preset, CPU)(latents[-1]).clamp(0, 1)[0]
    assert error.abs().max() < {"float32": 1e-4, "bfloat16": 0.05}[dtype]
    assert len(names["images"]) == 4 and len(compiled) == 3


def test_the_readmes_code_runs(monkeypatch):
    """On the committed student, as a newcomer copies it."""
    monkeypatch.chdir(Path(model.__file__).parent)
    names = {}
    exec(snippets("README.md", {}), names)
    assert names["image"].size == (32, 32)


def compile_for_a_test(monkeypatch):
    """Compiling traces the code and leaves out the making of kernels, which takes minutes. Returns
    the list of the modules that are compiled from now on."""
    compiled, real_compile = [], torch.nn.Module.compile

    def compile(module):
        compiled.append(type(module).__name__)
        real_compile(module, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    return compiled


# ================================================================== base models

@pytest.mark.parametrize("form", ["no T5", "sd3.5-medium"])
def test_folders_as_they_are_in_public_load(form, real, tmp_path, monkeypatch):
    """No T5, dual attention. Catches 256 tokens of nobody, and a base that is found from one place
    alone."""
    folder, out = tmp_path / "base", tmp_path / "run"
    if form == "no T5":                                   # model_index.json still names it
        shutil.copytree(real.base, folder, ignore=shutil.ignore_patterns("*_3"))
    else:
        make_base(folder, form)
    monkeypatch.chdir(tmp_path)
    train(train_stage1, out, "--model", "base", "--iterations", 1)
    assert run.read_settings(out)["model"] == str(folder), "found from anywhere"
    tokens = load_file(out / "prompts.safetensors")["embeds"].shape[1]
    assert tokens == (77 if form == "no T5" else 333)
    assert any("attn2" in name for name in tensors(out / "student")) == (form == "sd3.5-medium")


HARMS = {"lacks the tensor": lambda weights: weights.pop(min(weights)),
         "foreign tensor": lambda weights: weights.update({"to_q.lora_A": torch.zeros(2)}),
         "cannot load": lambda weights: weights.update({min(weights): torch.zeros(3, 5)})}


@pytest.mark.parametrize("harm", [*HARMS, "pickle"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2", "text_encoder_3",
                                  "discriminator_backbone", "student"])
def test_weights_that_do_not_fit_are_refused(part, harm, real, tmp_path, capsys):
    """The libraries fill in at random what is missing, and drop what they do not know. Catches a
    run on half a model, and code that a pickle brings."""
    folder, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(real.stage1 if part == "student" else real.base, folder)
    file, = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    if harm == "pickle":
        torch.save(weights, file.with_suffix(".bin"))
        file.unlink()
    else:
        HARMS[harm](weights)
        save_file(weights, file, {"format": "pt"})
    if part == "student":
        line = refused(sampler.main, ["--checkpoint", str(folder), "--out", f"{out}.png"], capsys)
    elif part == "discriminator_backbone":
        argv = line_of(train_stage2, out, *real.again, "--discriminator", folder / part)
        line = refused(train_stage2.main, argv, capsys)
    else:
        line = refused(train_stage1.main, line_of(train_stage1, out, "--model", folder), capsys)
    assert (harm in line or harm == "pickle") and str(folder) in line
    assert harm != "pickle" or "cannot load" in line
    # Prompts may be encoded already: the same command takes them once that part is mended.
    assert {path.name for path in out.rglob("*.safetensors")} <= {"prompts.safetensors"}


def changed(part, **values):
    """A harm: another value in a config."""
    return lambda base: run.write_json(base / part, run.read_json(base / part) | values)


@pytest.mark.parametrize("harm, words", [
    (changed("scheduler/scheduler_config.json", shift=1.0), "shift = 1.0"),
    (changed("scheduler/scheduler_config.json", use_dynamic_shifting=True), "use_dynamic_shifting"),
    (changed("transformer/config.json", _class_name="FluxTransformer2DModel"), "holds a Flux"),
    (lambda base: (base / "model_index.json").unlink(),
     "is no pipeline folder: it has no model_index.json")])
def test_a_base_that_does_not_fit_is_refused_before_anything_is_written(harm, words, real, tmp_path,
                                                                        capsys):
    """Catches a student trained on other sigmas than its scheduler gives."""
    out = tmp_path / "out"
    harm(shutil.copytree(real.base, tmp_path / "base"))
    argv = line_of(train_stage1, out, "--model", tmp_path / "base")
    assert words in refused(train_stage1.main, argv, capsys) and not out.exists()


def test_lora_is_merged_into_a_stock_folder(real, tmp_path):
    """The result, and the checkpoint as the sampler loads it, give the velocity of the network with
    its adapters on. Catches a scale that must be guessed, and adapters that are lost on saving."""
    pytest.importorskip("peft")
    words = ["--lora-rank", 2, "--student-lr", 1e-2]
    out = train(train_stage2, tmp_path / "run", *real.again, *words)
    assert all("lora_" in name for name in pulls(out) if "blocks" in name)
    adapted = model.load_transformer(real.preset)
    model.add_lora(adapted, 2, seed=1)
    adapted.load_state_dict(load_file(out / "checkpoint-000004" / "student.safetensors"))
    merged = SD3Transformer2DModel.from_pretrained(out / "student", torch_dtype=torch.float32)
    run.write_json(out / "settings.json", run.read_settings(out) | {"finished": 0})
    noise = sampler.image_noise(0, [0], SHAPE)
    prompt = model.Prompts(real.preset, ["an old cat"], CPU).take([0])
    expected, *others = [ask(net, noise, 1.0, prompt) for net in (
        adapted, merged, load(out)[0], load(real.stage1)[0])]
    errors = [(v - expected).abs().max() for v in others]
    assert errors[0] < 2e-3 and errors[1] < 1e-4 and errors[2] > 1e-2     # 2e-3: saved in half


@pytest.mark.parametrize("words, skipped", [
    (["--cached-blocks", "none"], set()), (["--no-compensation"], {"0", "1"})])
def test_without_cache_or_without_f_the_student_learns_from_the_start(
        words, skipped, real, tmp_path, monkeypatch, capsys):
    """The paper's "SFD", and plain reuse, with the references of another run. Catches a warm-up of
    an f that is not there, blocks that are skipped nevertheless, an f that is saved, and hours of
    the teacher."""
    monkeypatch.setattr(train_stage2, "make_references", None)
    out = train(train_stage2, tmp_path / "run", *real.again, *words, "--warmup", 9,
                "--references-from", real.stage2)
    assert references_of(out).equal(references_of(real.stage2))
    reached = {name.split(".")[1] for name in pulls(out) if "blocks" in name}
    assert reached == {"0", "1", "2"} - skipped
    assert f"{1.333 if skipped else 2:.3f} network evaluations" in capsys.readouterr().out
    assert load(out)[1:] == ((0, 1) if skipped else None, None)
    assert not (out / "compensation.safetensors").exists()


def test_a_stage_one_run_of_more_steps_makes_the_references(real, tmp_path, capsys):
    """[official] Its own path in its own steps, without guidance. Catches the teacher's pictures
    under another name. Stage II takes such a run, too: three of its steps reuse."""
    four = train(train_stage1, tmp_path / "four", "--model", real.base, "--steps", 4)
    out = train(train_stage2, tmp_path / "run", *real.again, "--reference", four)
    drawn = torch.randint(4, (4,), generator=run.rng(3407, "references"))
    pool = model.Prompts(real.preset, model.choose_prompts(real.preset, pool=4, seed=3407), CPU)
    noise, grid = sampler.image_noise(3407, range(4), SHAPE, "training"), sampler.sigma_grid(4)
    with torch.no_grad():
        latents, _, _ = sampler.roll_out(load(four)[0], noise, pool.take(drawn), grid)
        expected = 255 * model.Decoder(real.preset, CPU)(latents[-1]).clamp(0, 1)
    assert (references_of(out) - expected).abs().max() < 0.6
    assert (references_of(real.stage2) - expected).abs().max() > 3
    argv = line_of(train_stage2, tmp_path / "next", "--model", real.base, "--init", four)
    line = refused(train_stage2.main, [*argv, "--model", "tiny"], capsys)
    assert f"is a run of Stage 1 from {real.base}" in line
    train_stage2.main(argv)
    assert "2.000 network evaluations" in capsys.readouterr().out     # 1 + 3·(1/3)


@TRACED
@pytest.mark.slow
def test_saving_memory_and_compiling_change_no_gradient(real, tmp_path, monkeypatch):
    """Micro-batches, blocks that run again in backward, compiled blocks. Catches a sum of
    micro-batches for their mean, a switch that nobody reads, and a cache that a compiled block
    does not see."""
    switched, enable = [], model.CachedSD3.enable_gradient_checkpointing
    monkeypatch.setattr(model.CachedSD3, "enable_gradient_checkpointing",
                        lambda net: switched.append("net") or enable(net))
    monkeypatch.setattr(model, "can_compile", lambda preset, device: True)
    compiled = compile_for_a_test(monkeypatch)
    words = ["--accumulation", 2, "--gradient-checkpointing"]
    for script, plain, more in ((train_stage1, real.stage1, ["--model", real.base]),
                                (train_stage2, real.stage2, real.again)):
        out = train(script, tmp_path / plain.name, *more, *words)
        assert_close(pulls(out), pulls(plain), 1e-2)
    # Of Stage I student and fake score (the teacher is compiled, too), of Stage II the student.
    assert switched == 3 * ["net"]
    assert sorted(compiled) == ["Decoder", *(4 * 3 * ["JointTransformerBlock"])]
    compiled.clear()
    train(train_stage1, tmp_path / "plain", "--model", real.base, "--no-compile")
    assert not compiled


def test_compiling_is_for_real_models_on_cuda_where_it_can_be(monkeypatch, capsys):
    """Catches a miniature whose numbers change, and a run that ends for want of a compiler."""
    real, cuda = model.PRESETS["sd3-medium"], torch.device("cuda")
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(model.shutil, "which", lambda name: "there")
    assert model.can_compile(real, cuda) and not model.can_compile(real, CPU)
    assert not model.can_compile(model.PRESETS["tiny"], cuda) and not capsys.readouterr().err
    monkeypatch.setattr(model.shutil, "which", lambda name: None)
    assert not model.can_compile(real, cuda) and "a C compiler" in capsys.readouterr().err


def test_a_hub_id_trains_offline_from_the_hubs_cache(real, tmp_path, monkeypatch, capsys):
    """As on a node of a cluster: the transformer in pieces, no network. Catches parts that are
    asked of the hub one by one, and a loader that looks for one file of one name."""
    snapshot = tmp_path / "models--someone--sd3" / "snapshots" / "0123"
    pipe = model.load_pipeline(real.preset, torch.float16)
    pipe.save_pretrained(snapshot, max_shard_size="30KB")
    (tmp_path / "models--someone--sd3" / "refs").mkdir()
    (tmp_path / "models--someone--sd3" / "refs" / "main").write_text("0123")
    # The backbone's other revision, and a download that was cut off.
    (tmp_path / "models--facebook--convnextv2-base-22k-224" / "refs" / "main").mkdir(parents=True)
    (tmp_path / "models--facebook--dinov2-base" / "refs" / "main").mkdir(parents=True)
    (tmp_path / "models--facebook--dinov2-base" / "blobs").mkdir()
    (tmp_path / "models--facebook--dinov2-base" / "blobs" / "12.incomplete").touch()
    monkeypatch.setattr(model.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(model.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("asked the network"))
    out = train(train_stage1, tmp_path / "run", "--model", "someone/sd3", "--iterations", 1)
    text = capsys.readouterr().out
    assert "someone/sd3: there" in text
    assert f"not there: hf download {model.BACKBONE} --revision refs/pr/2" in text
    assert f"not there: hf download {model.DINO}" in text
    argv = ["--model", "someone/sd3", "--init", str(out), "--cached-blocks", "0-1",
            "--discriminator", str(real.base)]
    train_stage2.resolve(run.parse_settings(train_stage2.Settings, argv, "", ""))
    assert model.BACKBONE not in capsys.readouterr().out, "another one was given"
    assert run.read_settings(out)["model"] == "someone/sd3"
    assert metrics(out) == metrics(real.stage1)[:1]


def test_another_picture_size_goes_through_both_stages(real, tmp_path, capsys):
    """One that cuts a token in two, or that no position embedding covers, is refused. Catches
    latents taken for pixels, and a Stage II at the model's own size."""
    one, words = tmp_path / "one", ["--model", real.base, "--resolution"]
    for side in (72, 144):
        line = refused(train_stage1.main, line_of(train_stage1, one, *words, side), capsys)
        assert f"--resolution {side} is not a multiple of 16 up to 128" in line
    train(train_stage1, one, *words, 96)
    two = train(train_stage2, tmp_path / "two", "--model", real.base, "--init", one)
    assert references_of(two).shape == (4, 3, 96, 96)
    argv = ["--model", real.base, "--checkpoint", two, real.stage2, "--prompts", __file__]
    assert "of another size" in refused(evaluate.main, [str(word) for word in argv], capsys)


@pytest.mark.parametrize("text, found", [
    ("\ufeffa red circle\r\n\r\n  a cross \r\n", ["a red circle", "a cross"]),
    ('{"prompt": "a red circle", "id": 7}\n\na cross', ["a red circle", "a cross"]),
    ("of\u2028glass\n", ["of\u2028glass"]), ("\n \n", "no prompt in it"),
    ('{"prompt": "a"}\n{"caption": "b"}', "line 2: neither"), ('a\n["b"]', "line 2: neither")])
def test_prompts_are_lines_of_text_or_of_json(text, found, tmp_path):
    """Catches a bracket that is trained on, and a file that ends in a traceback."""
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    if isinstance(found, list):
        assert model.read_prompts(tmp_path / "prompts.txt") == found
    else:
        with pytest.raises(run.UserError, match=found):
            model.read_prompts(tmp_path / "prompts.txt")
