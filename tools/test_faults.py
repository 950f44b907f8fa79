"""What people do to such software: faults by kind, each with the right outcome.

    python -m pytest -q tools/test_faults.py

The kinds were taken from public bug reports of people who distil, cache and train such models; the
counts stand in docs/RESULTS.md. Names are sentences; a docstring says which mistake is caught.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import run  # first, as in every script: it silences what the others import

import model
import sampler
import train_stage1
import train_stage2
from test_all import SMALL, STAGE2, TINY
from tools import prompt_files
from tools.settings import UserError
from tools.test_tools import assert_same_student, lines_of, refused

pytestmark = pytest.mark.usefixtures("one_process")
HERE = Path(model.__file__).parent
ONE = [*SMALL, "--iterations", "1"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Sample grids are tested elsewhere."""
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a: None)


@pytest.fixture
def base(tmp_path):
    """A copy of the tiny teacher's folder, a base model of one's own."""
    return Path(shutil.copytree(TINY.source, tmp_path / "place" / "base"))


def files(folder):
    """{path: time of change} of all files."""
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def change(path, edit):
    """Rewrites a safetensors file by edit({name: tensor})."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


# ----------------------------------------------------------------------------- D: one run folder

def test_a_folder_that_is_locked_is_refused_and_stays_as_it_is(tmp_path, capsys):
    """The same command started twice, also with --overwrite; catches two writers of one
    metrics.jsonl, and a living run that loses its folder."""
    out = tmp_path / "run"
    train_stage1.main([*ONE, "--out", str(out)])
    before, fd = files(out), os.open(out, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for words in (["--iterations", "2"], ["--iterations", "1", "--overwrite"]):
        assert "is in use by another command" in refused(
            train_stage1, [*SMALL, *words, "--out", out], capsys)
    assert files(out) == before
    os.close(fd)
    train_stage1.main([*SMALL, "--iterations", "2", "--out", str(out)])
    assert run.read_json(out / "distill.json")["iteration"] == 2


@pytest.mark.slow
def test_of_two_commands_at_the_same_instant_one_has_the_lock(tmp_path):
    """On a folder that is not there yet; and a kill leaves no lock behind. Catches a check that
    comes long before the first write."""
    words = [sys.executable, str(HERE / "train_stage1.py"), *SMALL, "--iterations", "3", "--out",
             str(tmp_path / "run")]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    loser = errors[0] if both[0].returncode == 2 else errors[1]
    assert "is in use by another command" in loser and "Traceback" not in loser
    assert [line["iteration"] for line in lines_of(tmp_path / "run")] == [1, 2, 3]
    killed = subprocess.Popen([*words[:-1], str(tmp_path / "killed")], stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL)
    while not run.checkpoints(tmp_path / "killed"):
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    train_stage1.main([*words[2:-1], str(tmp_path / "killed")])
    assert_same_student(tmp_path / "run", tmp_path / "killed")


# ----------------------------------------------------------------------------- E: wherever it lies

def test_a_run_finds_its_base_from_any_directory(base, tmp_path, monkeypatch, capsys):
    """--model base, a relative folder. Catches a path stored as it was typed: elsewhere it is not
    there, or another folder of that name is."""
    monkeypatch.chdir(base.parent)
    out = tmp_path / "run"
    train_stage1.main([*ONE, "--model", "base", "--pool", "24", "--out", str(out)])
    for words in ("base/", "./base", str(base), "../place/base"):
        train_stage1.main([*ONE, "--model", words, "--pool", "24", "--out", str(out)])
        assert "is finished" in capsys.readouterr().out
    (tmp_path / "elsewhere" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    grid = ["--checkpoint", str(out), "--prompt", "a red circle", "--num-images", "1", "--out"]
    sampler.main([*grid, "one.png"])
    # The base moves; the run is told so, by sampling and by resuming.
    moved = base.rename(tmp_path / "moved")
    assert "say where it is now: --model FOLDER" in refused(sampler, [*grid, "two.png"], capsys)
    sampler.main([*grid, "two.png", "--model", str(moved)])
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    again = [*SMALL, "--pool", "24", "--out", str(out), "--model", str(moved)]
    train_stage1.main([*again, "--iterations", "2"])
    assert run.read_json(out / "distill.json")["base"] == str(moved)
    sampler.main([*grid, "three.png"])
    # Another model at the new place is another model.
    change(moved / "transformer" / "diffusion_pytorch_model.safetensors",
           lambda tensors: tensors["proj_out.bias"].add_(1))
    assert "with other content" in refused(train_stage1, [*again, "--iterations", "3"], capsys)
    assert "is not the base model" in refused(
        sampler, [*grid, "four.png", "--model", str(moved)], capsys)


def test_prompts_and_init_are_told_by_what_they_hold(tmp_path, monkeypatch, capsys):
    """./a.txt is a.txt, run/ is run, a copy is as good; other prompts are not. Catches a run that
    is refused, with the advice --overwrite, for a spelling."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a red circle\na blue cross\n")
    shutil.copy("a.txt", "copy.txt")
    Path("b.txt").write_text("a red circle\na blue square\n")
    for prompts in ("a.txt", "./a.txt", "copy.txt"):
        train_stage1.main([*ONE, "--prompts", prompts, "--out", "run"])
    assert "is finished" in capsys.readouterr().out
    assert "prompts was" in refused(train_stage1, [*ONE, "--prompts", "b.txt", "--out", "run"],
                                    capsys)
    words = [*STAGE2, "--iterations", "1", "--out", "second", "--init"]
    train_stage2.main([*words, "run"])
    shutil.copytree("run", "moved")
    for init in ("./run/", "moved", str(tmp_path / "run")):
        train_stage2.main([*words, init])
        assert "is finished" in capsys.readouterr().out
    train_stage1.main([*ONE, "--seed", "5", "--out", "other"])
    assert "init was run, is other with other content" in refused(
        train_stage2, [*words, "other"], capsys)


def test_an_edited_guidance_rule_is_another_run(tmp_path, monkeypatch, capsys):
    """The README's first experiment, with the commands of the default runs. Catches an edit that is
    answered by "is finished", a run half by each rule, and references by the old one."""
    monkeypatch.chdir(tmp_path)
    words = [*STAGE2, "--iterations", "1", "--init", "run", "--out"]
    train_stage1.main([*ONE, "--out", "run"])
    train_stage2.main([*words, "second"])
    monkeypatch.setattr(sampler, "guidance_weight",
                        lambda sigma, w, alpha: torch.where(torch.as_tensor(sigma) <= 0.5, w, 1.0))
    assert "guidance_rule was" in refused(train_stage1, [*ONE, "--out", "run"], capsys)
    assert "guidance_rule was" in refused(train_stage2, [*words, "second"], capsys)
    train_stage2.main([*words, "third"])
    assert len(list(tmp_path.glob("references-*"))) == 2


def test_references_are_named_by_all_that_they_depend_on(base):
    """Catches old pictures beside which a changed run is judged, and the same ones made twice."""
    resolved = {"model_content": "a", "guidance_rule": "b"}

    def name(prompts="c", shape=(4, 8, 8), alpha=0.94, w=4.0, other=None, **settings):
        settings = train_stage2.Settings(**{"out": "runs/x", "references": 8, **settings})
        init = {"latent_shape": shape, "alpha": alpha, "guidance": w}
        return train_stage2.references_folder(
            settings, model.find_preset(str(base)), init, types.SimpleNamespace(content=prompts),
            resolved | (other or {}))

    first = name()
    assert name(out="runs/y", student_lr=1.0, warmup=7) == first
    names = [first, name("d"), name(shape=(4, 8, 16)), name(seed=1), name(references=9),
             name(reference="other/model"), name(reference_steps=8), name(alpha=0.945), name(w=5.0)]
    names += [name(other={key: "d"}) for key in (*resolved, "reference_content")]
    change(base / "vae" / "diffusion_pytorch_model.safetensors",
           lambda tensors: tensors["decoder.conv_out.bias"].add_(0.1))
    assert len({*names, name()}) == len(names) + 1


# ----------------------------------------------------------------------------- F: its own schedule

@pytest.mark.parametrize("schedule, words", [({"shift": 1.0}, "its scheduler has shift = 1.0"),
                                             ({"use_dynamic_shifting": True}, "dynamic_shifting"),
                                             ({"use_karras_sigmas": True}, "karras")])
def test_a_base_on_another_schedule_is_refused_before_anything_is_written(
        base, schedule, words, tmp_path, capsys):
    """Trained on σ = 1, 0.75, 0 and sampled by its own scheduler on others: catches pictures that
    differ without a word, and a ValueError after the training."""
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | schedule))
    assert words in refused(train_stage1, [*ONE, "--model", base, "--out", tmp_path / "run"],
                            capsys)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- G: prompt files

TWO = ["a red circle", "a blue cross"]
PROMPT_FILES = {
    "array.json": '["a red circle", "a blue cross"]',
    "spread.json": '[\n  "a red circle",\n  "a blue cross"\n]\n',
    "objects.json": '[{"prompt": "a red circle"}, {"caption": "a blue cross", "id": 7}]',
    "coco.json": '{"images": [1, 2], "annotations": [{"caption": "a red circle", "id": 1},\n'
                 '{"caption": "a blue cross", "id": 2}]}',
    "lines.jsonl": '{"prompt": "a red circle"}\n{"caption": "a blue cross"}\n',
    "texts.jsonl": '"a red circle"\n"a blue cross"\n',
    "texts.txt": '"a red circle"\n"a blue cross"\n',
    "mixed.txt": 'a red circle\n{"prompt": "a blue cross"}\n',
    "table.csv": 'file_name,prompt\n1.png,a red circle\n\n2.png,a blue cross\n',
    "quoted.csv": '\ufeffCaption,id\n"a red circle",1\n"a blue cross",2\n',
    "table.tsv": 'id\tcaption\n1\ta red circle\n2\ta blue cross\n',
    "windows.txt": '\ufeffa red circle\r\n\r\n  a blue cross  \r\n'}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts_are_read_from_the_files_that_people_have(name, tmp_path, capsys):
    """Catches brackets, quotes, headers and file names that become prompts without a word."""
    (tmp_path / name).write_bytes(PROMPT_FILES[name].encode())
    assert prompt_files.read_prompts(tmp_path / name) == TWO
    assert f"{name}: 2 prompts, the first ones: a red circle; a blue cross" in (
        capsys.readouterr().out)


def test_a_line_of_prompts_ends_at_a_newline_and_nowhere_else(tmp_path):
    """U+2028 and a vertical tab within a prompt. Catches a prompt that is cut in two."""
    strange = "a red\u2028circle\x0bof glass"
    (tmp_path / "a.txt").write_text(f"{strange}\na blue cross\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": strange}, ensure_ascii=False) + "\n",
                                      encoding="utf-8")
    assert prompt_files.read_prompts(tmp_path / "a.txt") == [strange, "a blue cross"]
    assert prompt_files.read_prompts(tmp_path / "a.jsonl") == [strange]


@pytest.mark.parametrize("name, text, words", [
    ("a.json", '["a red circle",\n "a blue cross"', "line 1: not JSON"),
    ("a.txt", '[a red circle]\n', "line 1: not JSON"),
    ("a.json", '[{"prompt": "a"}, {"text": "b"}]', "line 1, entry 2: no text"),
    ("a.json", '{"a": {"prompt": 3}}', "line 1: no text"),
    ("a.json", '[["a"], [5]]', "entry 2, entry 1: no text"),
    ("a.jsonl", '{"prompt": "a"}\na blue cross\n', "line 2: not JSON"),
    ("a.csv", 'file,text\n1.png,a red circle\n', "line 1: no column named prompt or caption"),
    ("a.csv", 'id,prompt\n1,a\n2\n', "line 3: the row has only 1 columns"),
    ("a.csv", '', "no column named"),
    ("a.json", "[]", "no prompt in it"),
    ("a.txt", "[" * 100_000, "not JSON")])
def test_what_is_no_prompt_file_is_refused_by_name_and_line(name, text, words, tmp_path):
    """Catches a wrong file that is trained on for hours."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as refusal:
        prompt_files.read_prompts(tmp_path / name)
    assert words in str(refusal.value) and name in str(refusal.value)


def test_prompts_longer_than_clip_reads_are_counted(small_sd3, capsys):
    """Catches a file of long prompts whose ends only T5 sees."""
    preset = model.find_preset(str(small_sd3))
    model.Prompts(preset, ["a cat", "a very old cat " * 8], "cpu")
    assert "1 of 3 prompts are longer than CLIP's 77 tokens" in capsys.readouterr().err


# ----------------------------------------------------------------------------- H: in a notebook

def test_main_puts_back_what_it_changes_in_its_process(tmp_path, capsys):
    """Signals, seeds, progress bars, also when it fails. Catches a notebook whose Ctrl-C is
    swallowed and whose random numbers repeat."""
    from diffusers.utils import logging

    def state():
        return [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
                torch.get_rng_state().tolist(), logging.is_progress_bar_enabled(),
                torch.get_default_dtype(), os.getcwd(), dict(os.environ),
                len(os.listdir("/proc/self/fd"))]
    train_stage1.main([*ONE, "--out", str(tmp_path / "warm")])     # what is imported later
    before = state()
    train_stage1.main([*ONE, "--out", str(tmp_path / "run")])
    assert state() == before
    train_stage2.main([*STAGE2, "--iterations", "1", "--init", str(tmp_path / "run"), "--out",
                       str(tmp_path / "second")])
    assert state() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage1, "student_turn", None)
        with pytest.raises(TypeError):
            train_stage1.main([*ONE, "--out", str(tmp_path / "broken")])
    assert state()[:-1] == before[:-1]


# ----------------------------------------------------------------------------- I: not whole

DAMAGES = {
    "transformer/diffusion_pytorch_model.safetensors": "transformer lacks the tensor proj_out.bias",
    "vae/diffusion_pytorch_model.safetensors": "vae lacks the tensor decoder.conv_in.bias",
    "text_encoder/model.safetensors":
        "text_encoder lacks the tensor text_model.final_layer_norm.bias"}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_missing_tensor_of_a_base_is_named_before_anything_is_written(
        name, base, tmp_path, capsys):
    """The libraries make up what is missing, or crash on a tensor without memory."""
    missing = DAMAGES[name].split()[-1]
    change(base / name, lambda tensors: tensors.pop(missing))
    assert DAMAGES[name] in refused(
        train_stage1, [*ONE, "--model", base, "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


def lora_keys(tensors):
    tensors["transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.zeros(2, 2)


def prefixed(tensors):
    for name in list(tensors):
        tensors["model.diffusion_model." + name] = tensors.pop(name)


def other_shape(tensors):
    tensors["proj_out.bias"] = torch.zeros(3)


@pytest.mark.parametrize("edit, words", [(lora_keys, "a foreign tensor, transformer_blocks.0.attn"),
                                         (prefixed, "a foreign tensor, model.diffusion_model."),
                                         (other_shape, "proj_out.bias has the shape [3]")])
def test_foreign_tensors_of_a_base_and_of_a_student_are_named(edit, words, base, tmp_path, capsys):
    """Adapters that were not merged, another tool's prefix, another model's shape: all of them are
    dropped, or crash, in the libraries."""
    train_stage1.main([*ONE, "--out", str(tmp_path / "good")])
    for folder, command in (
            (base / "transformer", (train_stage1, [*ONE, "--model", base, "--out",
                                                   tmp_path / "run"])),
            (tmp_path / "good" / "student", (sampler, ["--checkpoint", tmp_path / "good"]))):
        change(folder / "diffusion_pytorch_model.safetensors", edit)
        assert words in refused(*command, capsys)
    assert not (tmp_path / "run").exists()


def test_a_part_is_told_from_a_pipeline(base, capsys):
    """--model base/transformer. Catches a KeyError, and advice that names the wrong thing."""
    error = refused(train_stage1, ["--model", base / "transformer"], capsys)
    assert "is one part of a pipeline" in error and error.endswith(str(base))


# ----------------------------------------------------------------------------- J: advice that fits

def test_a_base_in_half_precision_files_only_loads(base, tmp_path, capsys):
    """*.fp16.safetensors, as many a download has it. Catches "is it a pipeline folder?"."""
    for path in base.rglob("*.safetensors"):
        if path.parent.name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            half = {name: tensor.half() for name, tensor in load_file(path).items()}
            save_file(half, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")),
                      metadata={"format": "pt"})
            path.unlink()
    train_stage1.main([*ONE, "--model", str(base), "--out", str(tmp_path / "run")])
    recipe = run.read_json(tmp_path / "run" / "distill.json")
    assert recipe["iteration"] == 1 and "variant='fp16'" in recipe["stock_call"]


def test_a_folder_does_not_pass_for_the_hubs(tmp_path, monkeypatch, capsys):
    """A folder stabilityai/… or facebook/… in the working directory. Catches a run that takes it
    for the hub's."""
    monkeypatch.chdir(tmp_path)
    real = model.PRESETS["sd3-medium"]
    Path(real.source).mkdir(parents=True)
    assert "would be taken for the hub's" in refused(train_stage1, ["--model", "sd3-medium"],
                                                     capsys)
    shutil.rmtree("stabilityai")
    Path(real.discriminator).mkdir(parents=True)
    error = refused(train_stage2, ["--model", "sd3-medium", "--dry-run"], capsys)
    assert "--discriminator ./facebook/convnextv2" in error


@pytest.mark.parametrize("old, new", [("grn.weight", "grn.gamma"), ("grn.bias", "grn.beta")])
def test_an_older_backbone_is_refused(base, old, new, capsys):
    """Its GRN weights are named gamma and beta. transformers leaves them at zero without a word."""
    def rename(tensors):
        for name in list(tensors):
            if name.endswith(old):
                tensors[name.replace(old, new)] = tensors.pop(name)
    backbone = base / "discriminator_backbone"
    change(backbone / "model.safetensors", rename)
    with pytest.raises(UserError, match="backbone .* (lacks|holds a foreign)"):
        model.load_backbone(str(backbone))


def test_a_run_that_breaks_before_its_first_checkpoint_is_told_so(tmp_path):
    """Catches "the newest checkpoint is sound" where there is none."""
    trained = run.Run(tmp_path, {})
    with contextlib.suppress(UserError):
        for _ in range(2):
            trained.check_finite(1, student=float("nan"))
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        trained.check_finite(1, student=float("nan"))
