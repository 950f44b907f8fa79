"""Tests of all that is not the method: miniature world, run folders, tools, and the text itself.

    python -m pytest -q tools/test_tools.py

The tests of the method stand in test_all.py, in the order of the reading. Names are sentences; a
docstring says which mistake the test would catch.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import run  # first, as in every script: it silences what the others import

import evaluate
import model
import sampler
import train_stage1
import train_stage2
from test_all import SMALL, TINY, metrics, recipe, seeded, weights
from tiny import make_teacher, world
from tools import plan, prompt_files, random_model, rehearsal
from tools.processes import clip_and_step, optimizer_tensors
from tools.settings import UserError, parse_settings

pytestmark = pytest.mark.usefixtures("one_process")
HERE = Path(model.__file__).parent
# For the network of a Stage II run of a few turns; D_ONLY has to be patched.
STAGE2 = ["--batch-size", "4", "--references", "8", "--log-every", "1", "--sample-every", "100"]


def lines_of(folder):
    """The lines of a run's metrics.jsonl, without the seconds, which no run repeats."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line | {"seconds": 0} for line in lines]


def assert_same_student(one, other, least=100):
    """Fails unless two run folders hold the same student, bit for bit."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys() and len(one) > least
    assert all(torch.equal(one[key], other[key]) for key in one)


def refused(script, words, capsys):
    """The one line on stderr with which a command refuses; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in words])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1
    return error


# ----------------------------------------------------------------------------- the miniature world

def test_the_reader_reads_every_clean_picture():
    """All 24 captions on all 4 scenes; catches confusable colours, scenes and shapes."""
    template = torch.arange(0, len(world.templates()[1]), 97)
    grid = torch.cartesian_prod(template, torch.arange(6), torch.arange(4))
    grid = grid[torch.randperm(len(grid), generator=seeded())[:200]]
    seen = world.read(world.draw(*grid.T))
    assert torch.equal(seen["shape"], world.templates()[1][grid[:, 0]])
    assert torch.equal(seen["colour"], grid[:, 1]) and torch.equal(seen["scene"], grid[:, 2])
    assert seen["error"].max() < 1e-3


def test_the_reader_is_not_fooled_by_noise():
    """A picture of nothing must not count as read: its distance to every true picture is large."""
    assert world.read(torch.rand(4, 3, 32, 32, generator=seeded()))["error"].min() > 0.2


def test_the_world_is_as_skewed_as_it_says():
    """Shape and colour follow the caption, the scene its probabilities; catches a caption that
    names another picture, and scenes that are all alike: there would be no collapse to measure."""
    captions = torch.arange(24).repeat_interleave(400)
    template, colour, scene = world.sample_labels(len(captions), seeded(), captions)
    shape = world.templates()[1][template]
    assert torch.equal(shape * 6 + colour, captions)
    assert (scene == shape).float().mean().item() == pytest.approx(0.55, abs=0.02)
    for other in (1, 2, 3):
        assert (scene == (shape + other) % 4).float().mean().item() == pytest.approx(0.15, abs=0.02)


def test_scene_entropy_is_the_plug_in_estimate():
    """0 for one scene, ln 4 for all alike; 0.96 expected of the data at 8 samples (why n
    must be named)."""
    one = torch.zeros(64, dtype=torch.long)
    assert world.scene_entropy(one).item() == pytest.approx(0, abs=1e-6)
    assert world.scene_entropy(torch.arange(64) % 4).item() == pytest.approx(math.log(4), abs=1e-5)
    captions = torch.zeros(80_000, dtype=torch.long)
    scene = world.sample_labels(len(captions), seeded(), captions)[2]
    assert world.scene_entropy(scene.view(-1, 8)).mean().item() == pytest.approx(0.96, abs=0.01)
    assert world.scene_entropy(scene.view(-1, 64)).mean().item() == pytest.approx(1.16, abs=0.01)


def test_measure_counts_what_the_reader_sees():
    """Usual scenes only, then wrong colours only; catches a shape and a colour that are judged
    apart, and scenes counted over all captions together."""
    captions = torch.arange(24).repeat_interleave(4)
    template, colour, _ = world.sample_labels(96, seeded(), captions)
    scene = world.templates()[1][template]                # scene i is usual for shape i
    usual = world.measure(world.draw(template, colour, scene), captions)
    assert usual["correct"].min() == 1 and usual["usual"].min() == 1
    assert usual["scene_entropy"].max() < 1e-6 and len(usual["scene_entropy"]) == 24
    wrong = world.measure(world.draw(template, (colour + 1) % 6, scene), captions)
    assert wrong["correct"].max() == 0


def test_the_committed_teacher_makes_right_pictures_in_the_stock_pipeline(stock_pipe):
    """Nothing of ours between caption and picture; catches a broken export."""
    captions = torch.arange(0, 24, 2)
    images = stock_pipe([world.CAPTIONS[c] for c in captions],
                        guidance_scale=train_stage1.TINY["guidance"], max_sequence_length=0,
                        generator=seeded(), output_type="pt").images
    assert world.measure(images.float(), captions)["correct"].mean() >= 11 / 12


def test_the_teacher_folder_is_small():
    """16 MB; catches a folder that was saved in full precision, which every clone would fetch."""
    files = [p for p in (HERE / "tiny" / "sd3").rglob("*") if p.is_file()]
    assert len(files) > 10 and sum(p.stat().st_size for p in files) <= 16e6


# ----------------------------------------------------------------------------- prompts

def test_prompts_are_encoded_once_and_the_empty_one_with_them(monkeypatch):
    """Catches encoding anew in every step, and an unconditional branch with another prompt."""
    calls = []

    def encode(preset, texts, device):
        calls.append(list(texts))
        lengths = torch.tensor([[float(len(text))] for text in texts])
        return lengths, -lengths
    monkeypatch.setattr(model, "encode_prompts", encode)
    prompts = model.Prompts(TINY, ["a", "bb", "ccc"], "cpu")
    for _ in range(3):
        embeds, pooled = prompts.take(torch.tensor([2, 0, 2]))
        assert embeds.tolist() == [[3], [1], [3]] and pooled.tolist() == [[-3], [-1], [-3]]
        assert prompts.uncond(2)[0].tolist() == [[0], [0]]
    assert calls == [["a", "bb", "ccc", ""]] and len(prompts) == 3


def test_the_grammar_holds_ten_thousand_distinct_prompts():
    """Catches a list that is left out of the combinations, or two words that make one prompt."""
    prompts = model.default_prompts(model.PRESETS["sd3-medium"])
    assert len(set(prompts)) == len(prompts) >= 10_000


def test_the_pool_is_drawn_once_by_the_seed():
    """--pool: so many different prompts, from the whole list and not from its beginning, the same
    ones after a resume; catches a run that encodes 80 000 prompts, or learns one style only."""
    texts = [str(i) for i in range(1000)]
    pool = model.draw_pool(texts, 30, seed=7)
    assert len(set(pool)) == 30 and set(pool) < set(texts) and max(map(int, pool)) > 800
    assert model.draw_pool(texts, 30, seed=7) == pool != model.draw_pool(texts, 30, seed=8)
    assert model.draw_pool(texts, 1000, seed=7) == texts
    for script in (train_stage1, train_stage2):
        settings = script.Settings(model="sd3-medium", dry_run=True, pool=5)
        assert len(script.resolve(settings)[-1]) == 5


def test_prompt_files_of_windows_and_json_lines_are_read(tmp_path):
    """Catches a byte-order mark, a carriage return or a blank line that becomes part of a
    prompt."""
    (tmp_path / "w.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\na blue cross\r\n")
    (tmp_path / "j.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": " a blue cross "}\n')
    for name in ("w.txt", "j.jsonl"):
        assert prompt_files.read_prompts(tmp_path / name) == ["a red circle", "a blue cross"]


def test_unknown_words_get_a_warning_in_the_miniature_only(capsys):
    """Catches pictures of nothing for "a pink circle", without a word."""
    assert model.choose_prompts(TINY, text="a Red circle") == ["a Red circle"]
    assert not capsys.readouterr().err
    model.choose_prompts(TINY, text="a pink circle")
    assert "does not know pink" in capsys.readouterr().err
    model.choose_prompts(model.PRESETS["sd3-medium"], text="a pink circle")
    assert not capsys.readouterr().err


# ----------------------------------------------------------------------------- run folders

def small_networks():
    """Two small networks and their optimisers, dicts of names as run.Run takes them."""
    torch.manual_seed(0)
    networks = {name: torch.nn.Linear(2, 2) for name in ("student", "fake_score")}
    optimizers = {name: torch.optim.AdamW(net.parameters()) for name, net in networks.items()}
    return networks, optimizers


def small_run(folder, iterations):
    """Saves checkpoints 1 … iterations of small networks, each after a step; returns the student's
    weights after each."""
    networks, optimizers = small_networks()
    trained = run.Run(folder, {"seed": 1})
    trained.restore(networks, optimizers)
    students = []
    for i in range(1, iterations + 1):
        for name, net in networks.items():
            net(torch.ones(1, 2)).square().sum().backward()
            clip_and_step([optimizers[name]])
        trained.save(i, networks, optimizers)
        students.append(networks["student"].weight.detach().clone())
    return students


def test_a_run_leaves_what_the_contract_says(finished):
    """settings, metrics, samples, two checkpoints, a student and its recipe; and no pickle."""
    assert recipe(finished)["sigmas"] == [1.0, 0.75, 0.0] and recipe(finished)["iteration"] == 2
    assert recipe(finished)["alpha"] == 0.94 and recipe(finished)["nfe"] == 2
    assert "sigmas=[1.0, 0.5], num_inference_steps=2" in recipe(finished)["stock_call"]
    names = [p.name for p in sorted(finished.glob("checkpoint-*"))]
    assert names == ["checkpoint-000001", "checkpoint-000002"]
    assert (finished / "samples" / "step_000002.png").exists()
    assert [line["iteration"] for line in metrics(finished)] == [1, 2]
    assert all(math.isfinite(line["loss_fake"]) for line in metrics(finished))
    settings = json.loads((finished / "settings.json").read_text())
    assert settings["settings"]["alpha"] == 0.94
    assert settings["versions"]["torch"] == torch.__version__
    assert not [p for p in finished.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".ckpt")]


def test_a_stage_two_run_leaves_f_and_its_span_besides(finished, finished2):
    """Skipped blocks keep Stage I's weights to the last bit."""
    assert recipe(finished2)["cached_blocks"] == "1-4" and recipe(finished2)["stage"] == 2
    assert recipe(finished2)["nfe"] == pytest.approx(1.6667, abs=1e-4)
    assert recipe(finished2)["iteration"] == 5
    f = load_file(finished2 / "compensation.safetensors")
    assert f["image.down.weight"].abs().sum() > 0 and f["text.down.weight"].abs().sum() > 0
    before, after = weights(finished), weights(finished2)
    changed = {key.split(".")[1] for key in before
               if "transformer_blocks" in key and not torch.equal(before[key], after[key])}
    assert changed and not changed & set("1234")


def test_a_result_stays_one_while_its_run_goes_on(tmp_path):
    """Started again with more iterations; catches a student/ that an interruption leaves without
    the number of its iterations."""
    sampler.keep_recipe(tmp_path, {"stage": 1})
    assert recipe(tmp_path)["iteration"] == 0
    sampler.keep_recipe(tmp_path, {"stage": 1}, 5)
    sampler.keep_recipe(tmp_path, {"stage": 1, "base": "moved"})
    assert recipe(tmp_path) == {"stage": 1, "base": "moved", "iteration": 5}


def test_the_newest_two_checkpoints_are_kept_and_everything_comes_back(tmp_path):
    """Weights and the optimisers' moments and step counts; catches an optimiser that starts cold,
    and a disk that fills up."""
    students = small_run(tmp_path, 4)
    assert [p.name for p in run.checkpoints(tmp_path)] == ["checkpoint-000003", "checkpoint-000004"]
    networks, optimizers = small_networks()
    assert run.Run(tmp_path, {"seed": 1}).restore(networks, optimizers) == 4
    assert torch.equal(networks["student"].weight, students[3])
    again, _ = small_networks()
    assert not torch.equal(again["student"].weight, students[3])
    for name, optimizer in optimizers.items():
        state = optimizer_tensors(networks[name], optimizer)
        saved = load_file(tmp_path / "checkpoint-000004" / f"{name}_optimizer.safetensors")
        assert state.keys() == saved.keys() and state["weight.step"] == 4
        assert all(torch.equal(state[key], saved[key]) for key in saved)


@pytest.mark.parametrize("harm", [
    lambda f: (f / "state.json").write_text((f / "state.json").read_text()[:-20]),
    lambda f: (f / "state.json").write_text(""),
    lambda f: (f / "state.json").write_text("[]"),
    lambda f: (f / "state.json").write_text('{"iteration": 2, "parts": {"../../x": "0"}}'),
    lambda f: (f / "state.json").write_text('{"iteration": 2, "parts": ["student"]}'),
    lambda f: (f / "state.json").unlink(),
    lambda f: os.truncate(f / "student.safetensors", 100),
    lambda f: os.truncate(f / "fake_score_optimizer.safetensors", 0),
    lambda f: (f / "fake_score.safetensors").unlink(),
    lambda f: (f / "student_optimizer.safetensors").write_bytes(b"\xff" * 64),
    lambda f: [(f / "student.safetensors").unlink(), (f / "student.safetensors").mkdir()]])
def test_a_checkpoint_cut_or_corrupted_anywhere_is_passed_over(harm, tmp_path, capsys):
    """Hashes, names and JSON; catches a loader that trusts what it finds, or crashes on it."""
    students = small_run(tmp_path, 2)
    harm(tmp_path / "checkpoint-000002")
    networks, optimizers = small_networks()
    assert run.Run(tmp_path, {"seed": 1}).restore(networks, optimizers) == 1
    assert torch.equal(networks["student"].weight, students[0])
    assert "checkpoint-000002 is damaged" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoint-000001")
    assert run.newest_checkpoint(tmp_path) == (0, None), "with no sound one it begins again"


def test_a_digest_sees_names_types_shapes_and_bytes():
    """Catches a checkpoint whose tensors were renamed, cut or converted and still pass."""
    x = torch.arange(4.0)
    others = [{"b": x}, {"a": x.double()}, {"a": x[None]}, {"a": x + 1}, {"a": x, "b": x}]
    assert run.digest({"a": x}) == run.digest({"a": x.clone()})
    assert len({run.digest(tensors) for tensors in ({"a": x}, *others)}) == 6


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
        finished, tmp_path, monkeypatch, capsys):
    """One bit of a whole training's newest checkpoint flips: the same command says so, and ends as
    if nothing had happened."""
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a: None)
    out = tmp_path / "damaged"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("student", "distill.json"))
    path = out / "checkpoint-000002" / "student.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    train_stage1.main([*SMALL, "--iterations", "2", "--out", str(out)])
    captured = capsys.readouterr()
    assert "checkpoint-000002 is damaged" in captured.err and "after iteration 1" in captured.out
    assert_same_student(finished, out)
    assert lines_of(finished) == lines_of(out)


def test_shapes_that_do_not_fit_are_one_line(finished, tmp_path, capsys):
    """A recipe, a student and a checkpoint of another model, hashes and all."""
    out = tmp_path / "run"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("checkpoint-000001"))
    recipe = json.loads((out / "distill.json").read_text())
    for shape in ([7, 8, 8], [4, 64, 8]):
        run.write_json(out / "distill.json", recipe | {"latent_shape": shape})
        assert "does not fit its student" in refused(sampler, ["--checkpoint", out], capsys)
    (out / "distill.json").unlink()
    path = out / "checkpoint-000002"
    save_file({"other": torch.zeros(3)}, path / "student.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["parts"]["student"] = run.digest({"other": torch.zeros(3)})
    run.write_json(path / "state.json", state)
    error = refused(train_stage1, [*SMALL, "--iterations", "2", "--out", out], capsys)
    assert "does not fit these networks" in error


def killed_at(n, action):
    """Exit code of a process that does `action` and is killed, with no chance to clean up, before
    its n-th call that touches the disk; 0 if there were fewer calls."""
    with warnings.catch_warnings():
        # Python 3.12 and later warn of fork in a process with threads. The child computes nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code, left = 1, [n]

    def deadly(call):
        def wrapped(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return call(*arguments, **options)
        return wrapped
    try:
        import builtins
        os.fsync, os.unlink, shutil.rmtree = map(deadly, (os.fsync, os.unlink, shutil.rmtree))
        Path.rename, Path.mkdir = deadly(Path.rename), deadly(Path.mkdir)
        builtins.open = deadly(open)
        action()
        code = 0
    finally:
        os._exit(code)


def test_a_write_killed_at_any_of_its_steps_leaves_the_old_or_the_new_folder_whole(tmp_path):
    """kill -9 before the nth call that touches the disk, for every n; then a second try."""
    outcomes = []
    for n in range(40):
        folder = tmp_path / str(n) / "thing"

        def save(text, folder=folder):
            run.save_whole(folder, lambda f: [(f / name).write_text(text) for name in ("a", "b")])
        save("old")
        code = killed_at(n, lambda: save("new"))
        at = folder if folder.exists() else folder.with_name(".thing.old")   # between two renames
        found = [(at / name).read_text() for name in ("a", "b")]
        assert found in (["old"] * 2, ["new"] * 2), f"killed before call {n}: {found}"
        assert code in (0, 9)
        outcomes.append(found[0])
        if code == 0:
            break
        save("new")
        assert (folder / "b").read_text() == "new", "no second try"
        assert [p.name for p in folder.parent.iterdir()] == ["thing"], "something was left behind"
    assert outcomes[0] == "old" and outcomes[-1] == "new" and len(outcomes) > 8 and code == 0


def test_a_file_killed_at_any_of_its_steps_is_the_old_or_the_new_one(tmp_path):
    """As above, for the recipe, the settings and the pictures; catches half a JSON file."""
    found = []
    for n in range(20):
        path = tmp_path / str(n) / "thing.json"
        run.write_json(path, {"text": "old"})
        code = killed_at(n, lambda: run.write_json(path, {"text": "new"}))  # noqa: B023
        found.append(run.read_json(path)["text"])
        run.write_json(path, {"text": "new"})
        assert run.read_json(path)["text"] == "new" and code in (0, 9)
        if code == 0:
            break
    assert found[0] == "old" and found[-1] == "new" and len(found) > 2 and code == 0


def test_a_checkpoint_killed_at_any_of_its_steps_costs_at_most_itself(tmp_path):
    """The third of a run, which removes the first: what is left can be read, and is newest 3 or 2.
    Catches an old checkpoint that goes before the new one is whole."""
    small_run(tmp_path / "two", 2)
    networks, optimizers = small_networks()
    run.Run(tmp_path / "two", {"seed": 1}).restore(networks, optimizers)
    two, found = networks["student"].weight.tolist(), []
    for n in range(60):
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "two", folder)
        three = run.Run(folder, {"seed": 1})
        code = killed_at(n, lambda: three.save(3, networks, optimizers))  # noqa: B023
        newest, parts = run.newest_checkpoint(folder)
        assert parts["student"]["weight"].tolist() == two and code in (0, 9)
        found.append(newest)
        if code == 0:
            break
    assert found[0] == 2 and found[-1] == 3 and found == sorted(found) and code == 0
    assert found.count(3) > 1, "never killed while the first checkpoint was removed"


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    """Whole or not at all: catches a half-written folder or file and a lost older one."""
    folder = tmp_path / "thing"
    run.save_whole(folder, lambda f: (f / "a").write_text("old"))

    def full_disk(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        run.save_whole(folder, lambda f: full_disk(f / "a"))
    with pytest.raises(OSError):
        run.replace_file(folder / "a", full_disk)
    assert (folder / "a").read_text() == "old"
    assert [p.name for p in (*tmp_path.iterdir(), *folder.iterdir())] == ["thing", "a"]


def test_metrics_of_what_was_not_saved_are_dropped(tmp_path):
    """Logged after the checkpoint, or cut off by a kill: catches a metrics.jsonl that tells two
    stories of one iteration. What is not finite is null, since JSON has no NaN."""
    small_run(tmp_path, 2)
    trained = run.Run(tmp_path, {"seed": 1})
    for i, loss in enumerate((0.5, float("nan"), 0.25), 1):
        trained.log(i, loss=loss)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')
    trained.restore(*small_networks())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"iteration": 1, "loss": 0.5}', '{"iteration": 2, "loss": null}']


def test_sigterm_saves_and_the_same_command_goes_on(
        finished, tmp_path, monkeypatch, capsys):
    """Pre-emptible machines: catches a signal that is lost or a checkpoint that is not written."""
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a: None)
    out, real = tmp_path / "stopped", clip_and_step

    def stop(*arguments):
        monkeypatch.setattr(train_stage1, "clip_and_step", real)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)
    monkeypatch.setattr(train_stage1, "clip_and_step", stop)
    command = [*SMALL[:6], "--checkpoint-every", "100", "--iterations", "2", "--out", str(out)]
    with pytest.raises(SystemExit) as stopped:
        train_stage1.main(command)
    assert stopped.value.code == 130 and "stopped after iteration 1" in capsys.readouterr().out
    train_stage1.main(command)
    assert_same_student(finished, out)


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    """Catches Ctrl-C that has to be typed for the length of an iteration of a large model."""
    trained = run.Run(tmp_path, {"seed": 1})
    before = signal.getsignal(signal.SIGTERM)
    trained.restore(*small_networks())
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert trained.interrupted and trained.stopping()
        os.kill(os.getpid(), signal.SIGTERM)              # torchrun passes on what came already
        monkeypatch.setattr(run, "GRACE", 0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("stage", [1, 2])
def test_runs_killed_at_random_moments_end_as_the_undisturbed_run(
        stage, finished, tmp_path, monkeypatch):
    """kill -9 while it trains, then the same command: nothing of the result may differ. Once for
    each stage; FAULTS=20 in the environment kills both 20 times, at any moment from the start."""
    faults, total = int(os.environ.get("FAULTS", 1)), {1: 4, 2: 8}[stage]
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    words = ["--batch-size", "2", "--log-every", "1", "--sample-every", "100"]
    if stage == 2:
        words += ["--references", "6", "--init", str(finished), "--warmup", "4"]
    # In Stage II a checkpoint comes right before a turn of G. D_ONLY, the discriminator's turns at
    # first, is cut short, so that there are any.
    words += ["--iterations", str(total), "--checkpoint-every", str(stage + 1), "--out"]
    program = f"import train_stage{stage} as script; script.D_ONLY = 2; script.main()"
    delays, codes = random.Random(0), []
    for fault in range(faults):
        process = subprocess.Popen([sys.executable, "-c", program, *words, str(killed)], cwd=HERE,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if fault == 0:                                    # surely in the middle of the training
            while process.poll() is None and not run.checkpoints(killed):
                time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delays.uniform(0, 0.3) if fault == 0 else delays.uniform(3, 12))
        process.kill()
        codes.append(process.wait())
        assert all(line["iteration"] for line in lines_of(killed))
    assert -signal.SIGKILL in codes, "it ended before it was killed"
    script = {1: train_stage1, 2: train_stage2}[stage]
    monkeypatch.setattr(script, "D_ONLY", 2, raising=False)
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a: None)
    for folder in (killed, undisturbed):
        script.main([*words, str(folder)])
    assert_same_student(killed, undisturbed)
    assert lines_of(killed) == lines_of(undisturbed)
    assert [line["iteration"] for line in lines_of(killed)] == list(range(1, total + 1))


def test_a_full_disk_is_one_line_and_costs_nothing_that_was_saved(small_sd3, tmp_path):
    """A real one: a tmpfs takes two checkpoints, not a third. With room again the same command
    goes on."""
    program = """if True:
        import pathlib, shutil, subprocess, sys
        import run, train_stage1
        disk, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
        def mount(options):
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
        def train(iterations):
            try:
                train_stage1.main([*words, "--iterations", iterations, "--out", f"{disk}/run"])
            except SystemExit as stop:
                return stop.code
        mount("size=100m")
        train("1")
        used = shutil.disk_usage(disk).used
        shutil.rmtree(disk / "run")
        mount(f"remount,size={int(1.8 * used)}")
        assert train("3") == 1
        assert run.checkpoints(disk / "run")[-1].name == "checkpoint-000002"
        mount("remount,size=100m")
        assert train("3") is None and run.read_json(disk / "run/distill.json")["iteration"] == 3
    """
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path],
                      capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    done = subprocess.run(["unshare", "-rm", sys.executable, "-c", program, str(tmp_path), *SMALL,
                           "--model", str(small_sd3), "--pool", "4"],
                          cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "after iteration 2" in done.stdout, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "No space left on device" in errors[0]
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_changes_no_weight_and_stops_the_run(
        tmp_path, monkeypatch, capsys):
    """Catches NaN that reaches the weights, or the optimiser, and a run that goes on for hours."""
    loss = train_stage1.LOSSES["ours"]
    monkeypatch.setitem(train_stage1.LOSSES, "ours", lambda *a: loss(*a) * float("nan"))
    error = refused_after_training(
        train_stage1, [*SMALL, "--iterations", "5", "--out", str(tmp_path / "nan")], capsys)
    assert "3 iterations in a row were not finite" in error
    assert "iteration 1: the gradient of student is not finite" in error
    assert "fake_score" not in error
    saved = load_file(tmp_path / "nan" / "checkpoint-000002" / "student.safetensors")
    start = model.load_transformer(TINY).state_dict()
    assert all(torch.equal(saved[key], start[key]) for key in saved)
    line = lines_of(tmp_path / "nan")[0]
    assert line["loss_student"] is None and line["grad_norm_student"] is None
    moments = load_file(tmp_path / "nan" / "checkpoint-000002" / "student_optimizer.safetensors")
    assert not moments, "the student's optimiser has seen a gradient"


def refused_after_training(script, words, capsys):
    """All that a command which ends with exit code 2 wrote on stderr."""
    with pytest.raises(SystemExit) as stopped:
        script.main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_only_three_bad_iterations_in_a_row_stop_a_run(tmp_path):
    """Now and then a gradient overflows; catches a counter that is never set back."""
    trained, nan = run.Run(tmp_path, {}), float("nan")
    for norm in (nan, nan, 1.0, nan, nan, 1.0):
        trained.check_finite(1, student=norm, fake_score=1.0)
    trained.check_finite(1, student=nan)
    trained.check_finite(1, fake_score=math.inf)
    with pytest.raises(UserError, match="3 iterations in a row"):
        trained.check_finite(1, student=nan)


def test_a_finished_run_says_so_and_does_nothing(finished, capsys):
    """Catches a second training, or a rewritten result."""
    stamp = (finished / "student" / "config.json").stat().st_mtime_ns
    train_stage1.main([*SMALL, "--iterations", "2", "--out", str(finished)])
    assert "finished" in capsys.readouterr().out
    assert (finished / "student" / "config.json").stat().st_mtime_ns == stamp


def test_other_settings_in_the_same_folder_are_named_and_refused(finished, capsys):
    """Catches a run that goes on with another α; but what changes no number may change."""
    words = [*SMALL, "--out", finished, "--iterations"]
    error = refused(train_stage1, [*words, "3", "--alpha", "0.9"], capsys)
    assert "alpha was 0.94, is 0.9" in error and "--overwrite" in error
    error = refused(train_stage1, [*words, "2", "--pool", "7", "--loss", "official"], capsys)
    assert "pool was 24, is 7; loss was ours, is official; prompts was None" in error
    train_stage1.main([*map(str, words), "2", "--log-every", "3", "--checkpoint-every", "7"])
    assert "finished" in capsys.readouterr().out


def test_a_folder_past_the_iterations_or_of_another_format_is_refused(tmp_path, capsys):
    """Catches a result that is called 1 iteration and has 2, and an older version's folder."""
    small_run(tmp_path, 2)
    with pytest.raises(UserError, match="is at iteration 2 already; give more --iterations"):
        run.Run(tmp_path, {"seed": 1}).finished(1)
    assert not run.Run(tmp_path, {"seed": 1}).finished(2)
    saved = run.read_json(tmp_path / "settings.json")
    run.write_json(tmp_path / "settings.json", saved | {"format": 1})
    with pytest.raises(UserError, match="was written in format 1; this code reads 4"):
        run.Run(tmp_path, {"seed": 1})


def test_overwrite_starts_again_and_only_once_all_is_loaded(tmp_path, capsys):
    """Catches a run that is lost to a misspelt option, or to a folder that is no run at all."""
    small_run(tmp_path / "run", 2)
    (tmp_path / "run" / "student").mkdir()
    words = ["--overwrite", "--iterations", "1", "--out", tmp_path / "run"]
    refused(train_stage1, [*words, "--model", "nobody"], capsys)
    again = run.Run(tmp_path / "run", {"seed": 2}, overwrite=True)
    assert not again.finished(1) and len(run.checkpoints(tmp_path / "run")) == 2
    assert again.restore(*small_networks()) == 0
    assert not run.checkpoints(tmp_path / "run") and not (tmp_path / "run" / "student").exists()
    assert run.read_json(tmp_path / "run" / "settings.json")["settings"] == {"seed": 2}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="exists and is not a run folder"):
        run.Run(tmp_path / "other", {"seed": 2}, overwrite=True)


def test_an_overwriting_killed_at_any_of_its_steps_can_be_typed_again(tmp_path):
    """Catches a half-removed run that passes for somebody else's folder and is refused for ever."""
    small_run(tmp_path / "two", 2)
    for n in range(60):
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "two", folder)

        def start_again(folder=folder):
            again = run.Run(folder, {"seed": 2}, overwrite=True)
            return again.restore(*small_networks())
        code = killed_at(n, start_again)
        assert start_again() == 0 and not run.checkpoints(folder)
        if code == 0:
            break
        assert code == 9
    assert code == 0 and n > 8


@pytest.mark.parametrize("harm", [
    lambda f: (f / "distill.json").write_text("{}"),
    lambda f: (f / "distill.json").write_text('{"iteration": "two"}'),
    lambda f: (f / "settings.json").write_text('{"format": 3, "settings": []}'),
    lambda f: (f / "metrics.jsonl").write_text("5\n[]\n{}\n"),
    lambda f: (f / "checkpoint-abcdef").mkdir()])
def test_nonsense_in_a_run_folder_is_passed_over_or_refused_in_one_line(harm, tmp_path):
    """Files that somebody edited by hand; catches a traceback."""
    small_run(tmp_path, 2)
    harm(tmp_path)
    with contextlib.suppress(UserError):
        again = run.Run(tmp_path, {"seed": 1})
        assert not again.finished(3) and again.restore(*small_networks()) == 2



# ----------------------------------------------------------------------------- plan.py

class Watched:
    """The networks and optimisers that a training script makes, and at each of its updates the
    bytes of the gradients that are alive."""

    def __init__(self, script, patch):
        self.networks, self.optimizers, self.gradients = {}, {}, []
        restore, step = run.Run.restore, clip_and_step

        def watch_restore(of_run, networks, optimizers):
            self.networks, self.optimizers = networks, optimizers
            return restore(of_run, networks, optimizers)

        def watch_step(optimizers, *limit):
            self.gradients.append({name: plan.bytes_of(
                p.grad for p in net.parameters() if p.grad is not None)
                for name, net in self.networks.items()})
            return step(optimizers, *limit)
        patch.setattr(run.Run, "restore", watch_restore)
        patch.setattr(script, "clip_and_step", watch_step)

    def moments(self, *names):
        """Bytes of the optimisers' state."""
        return plan.bytes_of(tensor for name in names
                             for slots in self.optimizers[name].state.values()
                             for tensor in slots.values())


def columns(rows):
    """{kind: bytes after each operation} of a rehearsed turn."""
    return dict(zip(rehearsal.KINDS, rows.unbind(1), strict=True))


def test_rehearsed_state_is_the_live_tensors_of_a_run(tmp_path, monkeypatch):
    """Weights, tables, optimiser and gradients, byte for byte; catches a network that is rehearsed
    but not loaded, or the other way round, and gradients of both networks at once."""
    nets, place = [], model.place
    monkeypatch.setattr(train_stage1, "place", lambda *a: (nets.append(place(*a)), nets[-1])[1])
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a: None)
    seen = Watched(train_stage1, monkeypatch)
    train_stage1.main([*SMALL, "--iterations", "1", "--out", str(tmp_path / "x")])
    turns = rehearsal.rehearse(1, TINY, train_stage1.Settings(device="cpu", alpha=0.94, guidance=4),
                               (4, 8, 8), model.check_base(TINY), 2, None, False)
    fake, student = (columns(turns[name]) for name in ("fake score's turn", "student's turn"))
    for kind, net in zip(("teacher", "student", "fake score"), nets, strict=True):
        assert set(student[kind].tolist()) == {plan.bytes_of(net.parameters())}
    assert student["position tables"][-1] == plan.bytes_of(b for net in nets for b in net.buffers())
    assert student["optimiser"][-1] == seen.moments("student", "fake_score")
    whole = plan.bytes_of(nets[1].parameters())
    assert seen.gradients == [{"student": 0, "fake_score": whole},
                              {"student": whole, "fake_score": 0}]
    for turn in (fake, student):                          # from none to those of one network
        assert turn["gradients"][0] == 0 and turn["gradients"].max() == whole


def test_rehearsed_state_of_stage_two_is_the_live_tensors_of_a_run(
        finished, finished2, monkeypatch):
    """Of a turn of G after one of D. Catches an optimiser or gradients that are planned for the
    skipped blocks, which get none."""
    monkeypatch.setattr(train_stage2, "D_ONLY", 3)        # turns D, D, D, G
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a: None)
    seen = Watched(train_stage2, monkeypatch)
    train_stage2.main([*STAGE2, "--init", str(finished), "--warmup", "0", "--iterations", "4",
                       "--out", str(finished2.parent / "x")])         # beside its references
    discriminator, f = model.Discriminator(TINY), seen.networks["compensation"]
    turns = rehearsal.rehearse(2, TINY, train_stage2.Settings(device="cpu"), (4, 8, 8),
                               model.check_base(TINY), 2, (1, 4), False)
    found = columns(turns["G's turn"])
    live, student = seen.gradients[-1], seen.networks["student"]
    assert found["student"][0] == plan.bytes_of(student.parameters())
    assert found["gradients"].max() == live["student"] and found["gradients"][0] == 0
    assert found["optimiser"][-1] == seen.moments("student")
    assert found["f"].max() == (plan.bytes_of(f.parameters()) + live["compensation"]
                                + seen.moments("compensation"))
    # Its heads' gradients, which G's loss leaves behind, and the moments of its own turn before.
    assert found["discriminator"].max() == pytest.approx(
        plan.bytes_of([*discriminator.parameters(), *discriminator.buffers()])
        + live["discriminator"] + seen.moments("discriminator"), rel=1e-3)
    assert not columns(turns["D's turn"])["gradients"].any()


class Allocator:
    """The most bytes that a script's run holds from Run.restore on, by the account of PyTorch's
    CPU allocator, which knows nothing of tensors and operations."""

    def __init__(self, script, patch):
        self.networks, restore = [], run.Run.restore
        self.profile = torch.profiler.profile(profile_memory=True)

        def keep(name, part):
            make = getattr(script, name)

            def made(*args):
                whole = make(*args)
                self.networks.append(part(whole))
                return whole
            patch.setattr(script, name, made)

        def watch_restore(of_run, networks, optimizers):
            start = restore(of_run, networks, optimizers)
            self.networks += networks.values()
            self.profile.start()
            return start
        keep("place", lambda net: net)
        keep("Decoder", lambda decode: decode.vae)
        if hasattr(script, "Discriminator"):
            keep("Discriminator", lambda net: net)
        patch.setattr(run.Run, "restore", watch_restore)
        patch.setattr(run.Run, "save", lambda *a: None)
        patch.setattr(sampler.Gallery, "save", lambda *a: None)

    def peak(self):
        self.profile.stop()
        events = self.profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        grown = max(itertools.accumulate(size for _, size in changes))
        loaded = {t.data_ptr(): t for net in self.networks
                  for t in (*net.parameters(), *net.buffers())}
        return plan.bytes_of(loaded.values()) + grown


@functools.cache
def tiny_needs(stage, script, span):
    """The miniature's needs on a CPU."""
    settings = script.Settings(device="cpu")
    if stage == 1:
        settings.alpha, settings.guidance = 0.94, 4.0
    return plan.measure(stage, TINY, settings, (4, 8, 8), model.check_base(TINY), 2, span)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing", "--accumulation", "4"]])
def test_planned_peak_is_what_the_allocator_hands_out(
        more, finished, finished2, monkeypatch):
    """Of real runs of both stages, 16 samples at a time or four, at most 1 % too low and 7 % too
    high: the rehearsal takes one sample, and what backward makes for a weight is counted for each.
    Catches activations that are missing, counted twice, or do not coincide."""
    monkeypatch.setattr(train_stage2, "D_ONLY", 0)        # turns G, D, D, G
    words = ["--batch-size", "16", "--log-every", "1", *more]
    for stage, script, own, span in (
            (1, train_stage1, ["--iterations", "2"], None),
            (2, train_stage2, ["--iterations", "4", "--init", str(finished), "--warmup", "0",
                               "--references", "8"], (1, 4))):
        with pytest.MonkeyPatch.context() as patch:
            allocator = Allocator(script, patch)
            out = finished2.parent / f"allocator-{stage}-{len(more)}"     # beside the references
            script.main([*words, *own, "--out", str(out)])
        needs = tiny_needs(stage, script, span)
        planned = max(sum(needs.busiest(turn, 1, 16, 4 if more else 16, bool(more)).values())
                      for turn in needs.moments[False] if turn.endswith("turn"))
        assert 0.99 < planned / allocator.peak() < 1.07


def test_passes_of_an_iteration_are_those_that_the_plan_says(
        finished, finished2, tmp_path, monkeypatch):
    """Blocks run, each sample's counted, with gradient 3: Stage I 11 passes as the official code;
    Stage II 5/3 in D's turn and 3 in G's, where the official code has 8. Catches an unused pass."""
    from diffusers.models.attention import JointTransformerBlock
    forward, step, count, passes = JointTransformerBlock.forward, clip_and_step, [0], []

    def counted(self, hidden_states, *a, **k):
        count[0] += len(hidden_states) * (3 if torch.is_grad_enabled() else 1) / (12 * 4)
        return forward(self, hidden_states, *a, **k)

    def spy(*a):
        passes.append(count[0])
        return step(*a)
    monkeypatch.setattr(JointTransformerBlock, "forward", counted)
    monkeypatch.setattr(sampler.Gallery, "save", lambda *a, **k: None)
    monkeypatch.setattr(train_stage2, "D_ONLY", 0)
    monkeypatch.setattr(train_stage2, "clip_and_step", spy)
    train_stage1.main([*SMALL, "--iterations", "1", "--out", str(tmp_path / "1")])
    assert count[0] == pytest.approx(11)
    train_stage2.main([*STAGE2, "--init", str(finished), "--warmup", "0", "--iterations", "4",
                       "--out", str(finished2.parent / "2")])         # turns G, D, D, G
    discriminator, _, generator = (b - a for a, b in itertools.pairwise(passes))
    assert (generator, discriminator) == pytest.approx((3, 5 / 3))


@pytest.fixture
def small_picture_networks(monkeypatch):
    """A VAE and a backbone of reduced width in the random folders of tools.random_model."""
    monkeypatch.setitem(random_model.SD3_VAE, "block_out_channels", [8, 8, 8, 8])
    monkeypatch.setitem(random_model.SD3_VAE, "norm_num_groups", 4)
    monkeypatch.setattr(random_model, "CONVNEXT_BASE", dict(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8],
        out_features=["stage1", "stage2", "stage3", "stage4"]))


@pytest.mark.parametrize("script, options, words", [
    (train_stage1, [], [
        "11.00 transformer passes", "1 GPU: --gradient-checkpointing --accumulation 4, 75.7 GB",
        "8 GPUs: --accumulation 2,", "text encoders, 11.2 GB", "5.6 of prompts",
        "disk: 48.7 GB a checkpoint"]),
    (train_stage2, ["--init", "none"], [
        "D's turn: 1.68 transformer passes", "G's turn: 3.03 transformer passes",
        "10.47 to decode", "2.4 GB of references", "disk: 19.1 GB a checkpoint"])])
@pytest.mark.slow
def test_a_real_model_is_planned_without_its_weights(
        script, options, words, tmp_path, capsys, monkeypatch):
    """At its true size. Catches a plan that downloads, one that writes, and one that no terminal
    shows."""
    monkeypatch.chdir(tmp_path)
    script.main(["--dry-run", "--model", "sd3-medium", "--out", str(tmp_path / "x"), *options])
    out = capsys.readouterr().out
    assert all(word in out for word in words), out
    assert max(map(len, out[out.index("memory plan"):].splitlines())) <= 100
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plan_of_lora_counts_what_learns(tmp_path, capsys):
    """Catches gradients and moments of frozen weights in the plan."""
    pytest.importorskip("peft")
    train_stage2.main(["--dry-run", "--init", "none", "--out", str(tmp_path / "x"),
                       "--accumulation", "2", "--lora-rank", "4"])
    lines = capsys.readouterr().out.splitlines()
    largest = {}                                          # GB of each kind
    for line in lines:
        if line.startswith("  gradients") or line.startswith("  student"):
            largest[line.split()[0]] = max(float(word) for word in line.split()[1:])
    assert 0 < largest["gradients"] < largest["student"] / 2


def needs_of(activations):
    """Needs of a turn that has 30 GB of state and so many bytes for each sample; half as many with
    checkpointing."""
    rows = torch.zeros(1, len(rehearsal.KINDS), dtype=torch.float64)
    rows[0, rehearsal.KINDS.index("student")] = 30e9
    moments = {}
    for checkpointing in (False, True):
        rows = rows.clone()
        rows[0, -1] = activations / (1 + checkpointing)
        moments[checkpointing] = {"one turn": rows}
    return plan.Needs(moments, gathered=0, waiting=0, encoders=0, most_used=77e9)


@pytest.mark.parametrize("activations, n, advice", [
    (5e9, 1, (False, 8, 70e9)),             # nothing is recomputed, as many at a time as fit
    (5e9, 2, (False, 8, 55e9)),             # the state is shared, 16 do not fit
    (40e9, 1, (True, 2, 70e9)),             # one at a time would not fill the GPU
    (60e9, 1, (True, 1, 60e9)),             # only checkpointed
    (200e9, 1, None)])
def test_the_plan_advises_the_fastest_setting_that_fits(activations, n, advice):
    """Catches an advice that tries only one sample at a time, or recomputes without need."""
    assert needs_of(activations).fastest(n, 32) == advice


# ----------------------------------------------------------------------------- sampler.py

def test_sampler_makes_a_grid_from_a_run_that_is_not_finished(
        finished, tmp_path, capsys):
    """From its newest checkpoint, the same picture; catches a sampler that takes the base model's
    weights when there is no result yet."""
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished, copy_function=os.link)
    shutil.rmtree(unfinished / "student")
    for folder, name in ((finished, "a.png"), (unfinished, "b.png")):
        sampler.main(["--checkpoint", str(folder), "--prompt", "a red circle", "--num-images", "4",
                      "--seed", "3", "--out", str(tmp_path / name)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "4 images, 2 network evaluations each" in capsys.readouterr().out


def test_sampler_uses_the_cache_of_a_run_unless_told_not_to(
        finished2, tmp_path, capsys):
    """Catches a sampler that shows the student without its cache and reports 1.667 evaluations."""
    for extra in ([], ["--no-cache"]):
        sampler.main(["--checkpoint", str(finished2), "--prompt", "a red circle",
                      "--num-images", "1", "--out", str(tmp_path / f"{len(extra)}.png"), *extra])
    out = capsys.readouterr().out
    assert "1.667 network evaluations" in out and "2 network evaluations" in out
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_sampler_makes_a_picture_without_a_training(tmp_path, monkeypatch, capsys):
    """The committed student, 1.67 evaluations; the exact reader reads what it drew. Catches a
    result to start from that does not fit its code."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(sampler, "save_pictures", lambda pictures, *a: seen.append(pictures))
    sampler.main(["--prompt", "a green cross", "--num-images", "16"])
    assert "16 images, 1.667 network evaluations each" in capsys.readouterr().out
    read = world.measure(seen[0], torch.full((16,), world.CAPTIONS.index("a green cross")))
    assert read["correct"].sum() >= 14


def test_sampler_shows_a_row_for_each_prompt_of_a_file(finished, tmp_path):
    """Each row's noises are its own, whatever the batch size; catches a picture under another
    prompt's row."""
    from PIL import Image
    (tmp_path / "two.txt").write_text("a red circle\na blue cross\n")
    sheets = []
    for batch in ("1", "5"):
        path = tmp_path / f"{batch}.png"
        sampler.main(["--checkpoint", str(finished), "--prompts", str(tmp_path / "two.txt"),
                      "--num-images", "3", "--batch-size", batch, "--out", str(path)])
        sheets.append(torch.tensor(np.array(Image.open(path))).float())
    assert sheets[0].shape == (2 * 34 * 3, 3 * 34 * 3, 3)         # 2 rows, 3 columns, enlarged
    assert (sheets[0] - sheets[1]).abs().max() <= 1               # rounding in the last bit
    rows = sheets[0].view(2, -1)
    assert (rows[0] - rows[1]).abs().mean() > 1


# ----------------------------------------------------------------------------- evaluate.py

@pytest.fixture(scope="session", autouse=True)
def quick_evaluation():
    """What takes most of the time of a small evaluation: a Fréchet distance's interval takes fewer
    rounds here, and FLOPs are counted once for each span."""
    counts, count = {}, evaluate.count_nfe

    def count_once(preset, span, steps=2):
        key = preset.source, span, steps
        if key not in counts:
            counts[key] = count(preset, span, steps)
        return counts[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "FRECHET_ROUNDS", 10)
        patch.setattr(evaluate, "count_nfe", count_once)
        yield


def results_of(out):
    """results.json of an evaluation."""
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="session")
def eight_captions(tmp_path_factory):
    """A file with two captions of each shape."""
    path = tmp_path_factory.mktemp("prompts") / "eight.txt"
    path.write_text("\n".join(world.CAPTIONS[::3]))
    return path


@pytest.fixture(scope="session")
def tiny_evaluation(finished, finished2, eight_captions, tmp_path_factory):
    """(results.json, its folder, what was printed) of both stages in the miniature world."""
    out = tmp_path_factory.mktemp("evaluation")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate.main(["--checkpoint", str(finished), str(finished2), "--prompts",
                       str(eight_captions), "--samples-per-prompt", "3", "--teacher", "alpha",
                       "--out", str(out)])
    return results_of(out), out, printed.getvalue()


def test_evaluate_writes_the_table_and_the_picture(tiny_evaluation):
    """Every row with its intervals; catches a path that is left out or measured twice."""
    results, out, printed = tiny_evaluation
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["data", "teacher, w = 4 for sigma <= 0.94", "finished",
                          "finished, plain reuse", "finished, span skipped", "finished2",
                          "finished2, no cache", "finished2, plain reuse"]
    assert rows["data"]["prompt_accuracy"] == 1
    assert rows["data"]["usual_scene"] == pytest.approx(0.55, abs=0.2)
    assert rows["data"]["frechet_to_data"] is rows["data"]["nfe_blocks"] is None
    guided = rows["teacher, w = 4 for sigma <= 0.94"]
    assert guided["nfe_blocks"] == 51 and guided["frechet_to_teacher"] is None
    nfe = [row["nfe_blocks"] for row in results["rows"][2:]]
    assert nfe == pytest.approx([2, 5 / 3, 5 / 3, 5 / 3, 2, 5 / 3])
    assert len({row["frechet_to_teacher"] for row in results["rows"]}) == 8, "two paths are one"
    for row in results["rows"]:
        for name in evaluate.MEASURES:
            interval = row[f"{name}_interval"]
            if row[name] is None:
                assert interval is None
            elif "frechet" not in name:                   # whose intervals lean upwards
                assert interval[0] <= row[name] <= interval[1]
    assert (out / "grid.png").exists() and (out / "table.md").read_text() in printed
    assert "3 samples for each of 8 prompts" in printed


def test_the_protocol_says_what_numbers_may_be_compared(tiny_evaluation):
    """Catches one table of different seeds, n or feature networks: they must differ in the
    protocol, and what changes no number must not."""
    protocol, made = tiny_evaluation[0]["protocol"], tiny_evaluation[0]["made"]
    assert protocol["samples_per_prompt"] == 3 and protocol["seed"] == 1
    assert protocol["frechet_to"] == {"steps": 28, "guidance": 4.0, "alpha": 0.94}
    assert len(protocol["metric_backbone_sha256"]) == 16 and len(protocol["prompts_sha256"]) == 64
    assert protocol["torch"] == torch.__version__ and "commit" in protocol
    assert {"date", "machine"} <= made.keys() and not made.keys() & protocol.keys()


def test_a_run_is_compared_with_the_stage_one_run_that_it_started_from(tiny_evaluation):
    """Catches a comparison with another path, or of the data and the teacher."""
    rows = {row["name"]: row for row in tiny_evaluation[0]["rows"]}
    against = {name: row["against"]["name"] for name, row in rows.items() if "against" in row}
    assert against == dict.fromkeys(["finished, plain reuse", "finished, span skipped",
                                     "finished2", "finished2, no cache",
                                     "finished2, plain reuse"], "finished")
    change = rows["finished2"]["against"]
    one, two = rows["finished"], rows["finished2"]
    assert change["accuracy_points"] == pytest.approx(
        100 * (two["prompt_accuracy"] - one["prompt_accuracy"]), abs=1e-3)
    assert change["frechet_change"] == pytest.approx(
        two["frechet_to_teacher"] - one["frechet_to_teacher"], abs=1e-6)
    assert len(change["entropy_ratio_interval"]) == 2


def test_an_evaluation_is_repeated_exactly_whatever_the_batch_size(
        tiny_evaluation, finished, finished2, eight_captions, tmp_path):
    """And its rows do not depend on which others there are: --own-path, without the teacher.
    Catches noise that is drawn in the order of use."""
    evaluate.main(["--checkpoint", str(finished2), str(finished), "--prompts", str(eight_captions),
                   "--samples-per-prompt", "3", "--teacher", "no", "--own-path", "--batch-size",
                   "7", "--out", str(tmp_path)])
    results, rows = results_of(tmp_path), tiny_evaluation[0]["rows"]
    assert [row["name"] for row in results["rows"]] == ["data", "finished2", "finished"]
    for one, other in zip(results["rows"], [rows[0], rows[5], rows[2]], strict=True):
        assert one["frechet_to_teacher"] is None
        for name in ("prompt_accuracy", "usual_scene", "scene_entropy"):
            assert one["by_prompt"][name] == other["by_prompt"][name]
        assert one["diversity"] == pytest.approx(other["diversity"], rel=1e-4)
    assert results["protocol"]["frechet_to"] is None


def test_frechet_is_the_distance_of_two_gaussians_by_hand():
    """Means (0, 0) and (3, 4), variances (1, 1) and (4, 9) turned by 45°:
    25 + (1 − 2)² + (1 − 3)² = 30. Catches a missing root and a wrong divisor."""
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.double) * 1.5 ** 0.5
    turn = torch.tensor([[1.0, 1], [-1, 1]], dtype=torch.double) / 2 ** 0.5
    other = cross * torch.tensor([2, 3]) @ turn + torch.tensor([3, 4])
    assert evaluate.frechet(cross, other).item() == pytest.approx(30)
    assert evaluate.frechet(other.view(2, 2, 2), other).item() == pytest.approx(0, abs=1e-6)


def test_two_runs_are_compared_caption_by_caption():
    """A run against itself changes nothing, and its interval is a point; against a worse one the
    points are the difference. Catches pairs that are mixed up."""
    meter, captions = evaluate.TinyMeter(TINY), torch.arange(24).repeat_interleave(2)
    drawn = [world.draw(*world.sample_labels(48, seeded(), captions)) for _ in range(2)]
    drawn[1][:12] = 0                                     # six captions show nothing
    good, bad = (evaluate.Measured(pictures.view(24, 2, 3, 32, 32), world.CAPTIONS, meter)
                 for pictures in drawn)
    same = evaluate.compare(good, good, good)
    assert same["accuracy_points_interval"] == [0, 0] and same["entropy_ratio"] == 1
    assert same["frechet_change"] == pytest.approx(0, abs=1e-6)
    worse = evaluate.compare(bad, good, good)
    assert worse["accuracy_points"] == pytest.approx(-25) and worse["frechet_change"] > 0


# ----------------------------------------------------------------------------- real models

@pytest.fixture(scope="session")
def small_meters(tmp_path_factory):
    """Folders for --clip, --pickscore and --dino: networks of reduced width, random weights."""
    from transformers import (BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel,
                              CLIPProcessor, Dinov2Config, Dinov2Model)
    folder = tmp_path_factory.mktemp("meters")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    size = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = make_teacher.make_tokenizer(folder / "tokenizer")
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


def small_stages(base, out):
    """Both stages on a pipeline folder of three blocks, two of which are cached: out/stage1 and
    out/stage2."""
    words = ["--model", str(base), "--batch-size", "2", "--pool", "4", "--log-every", "1",
             "--sample-every", "9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage2, "D_ONLY", 0)          # the first turn is the generator's
        patch.setattr(sampler.Gallery, "save", lambda *a: None)
        train_stage1.main([*words, "--iterations", "1", "--out", str(out / "stage1")])
        train_stage2.main([*words, "--iterations", "2", "--init", str(out / "stage1"), "--out",
                           str(out / "stage2"), "--cached-blocks", "0-1", "--references", "2",
                           "--warmup", "0", "--compensation-lr", "1e-2"])


@pytest.fixture(scope="session")
def small_evaluation(small_sd3, small_meters, tmp_path_factory):
    """(command, OUT) of an evaluation of a real model's two stages, made once."""
    folder = tmp_path_factory.mktemp("real")
    small_stages(small_sd3, folder)
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
    results = results_of(out)
    assert [row["name"] for row in results["rows"]] == [
        "teacher, w = 7 for sigma <= 0.94", "teacher, w = 7 everywhere", "teacher, no guidance",
        "teacher at 2 steps, not distilled", "stage1", "stage1, plain reuse",
        "stage1, span skipped", "stage2", "stage2, no cache", "stage2, plain reuse"]
    assert [row["nfe_blocks"] for row in results["rows"]] == pytest.approx(
        [51, 56, 28, 2, 2, 4 / 3, 4 / 3, 4 / 3, 2, 4 / 3])
    assert len({row["pick_score"] for row in results["rows"]}) == 10, "two paths are one"
    student = results["rows"][7]
    for name in ("clip_score", "pick_score", "diversity", "frechet_to_teacher"):
        assert math.isfinite(student[name]) and len(student[f"{name}_interval"]) == 2
    assert abs(student["clip_score"]) <= 1 < abs(student["pick_score"] / student["clip_score"])
    for name in ("prompt_accuracy", "usual_scene", "scene_entropy", "frechet_to_data", "lpips"):
        assert student[name] is student[f"{name}_interval"] is None
    assert "pip install lpips" in results["missing"]["lpips"]
    assert student["speedup"] > 1 and student["against"]["name"] == "stage1"
    assert student["against"]["accuracy_points"] is None
    assert math.isfinite(student["against"]["frechet_change"])
    assert {"clip_sha256", "dino_sha256", "resize", "commit"} <= results["protocol"].keys()
    assert not {"date", "machine"} & results["protocol"].keys()
    pictures = sorted(out.glob("images/*/*.png"))
    assert len(pictures) == 10 * 6 and (out / "grid.png").exists()
    from PIL import Image
    for path, prompt in ((out / "images" / "stage2_plain_reuse" / "000002.png", "an old cat"),
                         (out / "images" / "stage2_plain_reuse" / "000003.png", "a red ../fox")):
        with Image.open(path) as image:
            assert image.text["prompt"] == prompt and float(image.text["seconds"]) > 0
        about = run.read_json(path.parent / "about.json")
        assert about["seed"] == 1 and about["row"] == "stage2, plain reuse"


def test_an_interrupted_evaluation_makes_only_the_images_that_are_not_there(
        small_evaluation, capsys):
    """One lost, one cut, one of a stranger. Catches a whole second sampling, trust in half a file,
    and pictures of another seed that pass for these."""
    from PIL import Image
    words, out = small_evaluation
    folder = out / "images" / "stage2_plain_reuse"
    before = results_of(out)
    (folder / "000001.png").unlink()
    os.truncate(folder / "000002.png", 60)
    Image.new("RGB", (64, 64)).save(folder / "000005.png")
    (folder / ".new").write_bytes(b"half a picture")      # what a kill leaves
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("images/*/*.png")}
    evaluate.main(words)
    remade = {p.name for p in out.glob("images/*/*.png") if p.stat().st_mtime_ns != stamps.get(p)}
    assert remade == {"000001.png", "000002.png", "000005.png"}
    after = results_of(out)
    assert after["rows"][-1]["clip_score"] == pytest.approx(before["rows"][-1]["clip_score"],
                                                            abs=1e-4)
    assert after["rows"][0]["nfe_blocks"] == 51, "a row without a new image forgot its passes"
    assert after["rows"][0]["seconds_per_image"] == before["rows"][0]["seconds_per_image"]
    error = refused(evaluate, [*words, "--seed", "2"], capsys)
    assert "pictures of another recipe, seed" in error


def test_lpips_is_the_mean_over_all_pairs_of_a_prompt(small_meters, monkeypatch):
    """With a stand-in of the package: catches pairs with oneself, and pictures left in [0, 1]."""
    from tools.real_metrics import RealMeter

    class Stub(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3), keepdim=True)
    package = type(sys)("lpips")
    package.LPIPS = Stub
    monkeypatch.setitem(sys.modules, "lpips", package)
    meter = RealMeter(evaluate.load_network, *small_meters.values())
    levels = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 16, 16)
    with torch.inference_mode():
        values, features = meter(levels, "an old cat")
    assert values["lpips"].item() == pytest.approx((1 + 2 + 1) / 3) and not meter.missing
    assert features.shape == (3, 16)


def test_a_meter_with_weights_that_do_not_fit_or_only_pickles_is_refused(small_meters, tmp_path):
    """Catches a score by random weights, which transformers would give with a mere notice."""
    from tools.real_metrics import RealMeter
    clip, pickscore, dino = small_meters.values()
    with pytest.raises(UserError, match="are not there|cannot load"):
        RealMeter(evaluate.load_network, dino, pickscore, dino)
    fuse = tmp_path / "exploded"
    shutil.copytree(clip, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights.pop("logit_scale")
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not there, logit_scale for one"):
        RealMeter(evaluate.load_network, tmp_path / "clip", pickscore, dino)
    (tmp_path / "clip" / "model.safetensors").unlink()
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(UserError, match="pickles are never opened"):
        RealMeter(evaluate.load_network, tmp_path / "clip", pickscore, dino)
    assert not fuse.exists()


# ----------------------------------------------------------------------------- benchmark.py

def test_the_benchmark_times_the_cached_path_against_the_full_one(capsys):
    """Catches a table whose columns are of another path, and an option that came too late."""
    from tools import benchmark
    benchmark.main(["--rounds", "1"])
    out = capsys.readouterr().out
    assert "1.667 steps, f" in out and "whole image, text and VAE too: 28×2" in out
    assert "28×2 (56 × a batch of one)" in out and "medians of 1 alternated rounds" in out
    benchmark.print_transformer({"one": 1.0, "guided": 1.9, "apart": 2.1, "2": 2.0, "1.67": 1.7},
                                5 / 3)
    rows = {line[:27].strip(): line[27:].split() for line in
            capsys.readouterr().out.splitlines()[1:]}
    assert rows["28×2 (28 × a batch of two)"] == ["53.2000", "53.200", "31.29×"]
    assert rows["1.667 steps, f"] == ["1.7000", "1.700", "1.00×"]


def test_paths_are_timed_in_turn_and_the_median_counts(monkeypatch):
    """After a round that warms up. Catches all rounds of one path before the other's: on a machine
    that gets slower the second would look worse."""
    from tools import benchmark
    clock, calls = [0.0], []
    seconds = {"a": iter([9, 1, 5, 2]), "b": iter([9, 3, 3, 8])}

    def path(name):
        def call():
            calls.append(name)
            clock[0] += next(seconds[name])
        return call
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    found = benchmark.alternate({"a": path("a"), "b": path("b")}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4 and found == {"a": 2, "b": 3}


# ----------------------------------------------------------------------------- find_span.py

def test_a_blocks_residual_is_what_the_recorded_residual_is_made_of(teacher):
    """Summed over a span they are the cache's Δ0, of both streams; and where nothing changes no
    error is found. Catches a stream or an input of another block, and a hook left behind."""
    from tools import find_span
    x = sampler.image_noise(0, range(2), (4, 8, 8))
    prompt = model.encode_prompts(TINY, world.CAPTIONS[:2], "cpu")
    with torch.no_grad():
        residuals = find_span.block_residuals(teacher, x, 0.75, prompt)
        _, delta = sampler.cached_velocity(teacher, x, 0.75, prompt, span=(2, 4))
        sigmas = torch.tensor([0.75, 0.75])
        errors = find_span.reuse_errors(teacher, x, x, prompt, sigmas)
        span, = find_span.span_errors(teacher, [(2, 4)], x, x, prompt, sigmas)
        changed = find_span.reuse_errors(teacher, x, 0.9 * x, prompt, torch.tensor([1, 0.75]))
    for stream in (0, 1):
        assert torch.allclose(sum(block[stream] for block in residuals[2:5]), delta[stream],
                              atol=1e-4)
    assert len(residuals) == 12 and residuals[11][1] is None
    assert max(errors["image"] + errors["text"]) == 0 and span == pytest.approx(0, abs=1e-5)
    assert len(changed["image"]) == 12 and len(changed["text"]) == 11
    assert min(changed["image"]) > 0
    assert not any(block._forward_hooks for block in teacher.transformer_blocks)


def test_the_span_with_the_smallest_error_is_proposed(
        finished, tmp_path, monkeypatch, capsys):
    """Of the width that the wanted NFE asks for. Catches a last block in the span, and a table
    that proposes one span and prints another's error."""
    from tools import find_span
    monkeypatch.setitem(sys.modules, "matplotlib", None)              # as if not installed
    for nfe, counted, width in (("1.67", "1.667", 4), ("1", "1.083", 11)):
        find_span.main(["--checkpoint", str(finished), "--samples", "3", "--batch-size", "2",
                        "--nfe", nfe, "--out", str(tmp_path / "plot.png")])
        out = capsys.readouterr().out
        assert f"spans of {width} blocks, {counted} NFE" in out
        rows = re.findall(r"^ +(\d+)-(\d+) +([\d.]+)(  <- proposed)?$", out, re.M)
        assert [(int(n), int(m)) for n, m, *_ in rows] == [
            (n, n + width - 1) for n in range(12 - width)]
        best, = [float(error) for *_, error, mark in rows if mark]
        assert best == min(float(error) for *_, error, _ in rows)
        assert len(re.findall(r"^ +\d+ +[\d.]+( +[\d.]+)?$", out, re.M)) == 12
    assert "pip install matplotlib" in out and not list(tmp_path.iterdir())


def test_the_reuse_error_is_drawn_where_matplotlib_is_installed(tmp_path):
    """Catches a plot that fails after the measuring."""
    pytest.importorskip("matplotlib")
    from tools import find_span
    errors = {"image": [0.1, 0.2, 0.3], "text": [0.1, 0.2], "span": [0.1]}
    find_span.plot(errors, (0, 1), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


# ----------------------------------------------------------------------------- random_model.py

def test_a_random_model_goes_through_both_stages_and_the_sampler(
        small_picture_networks, tmp_path, monkeypatch, capsys):
    """The true shape's folder, of reduced width: all parts, no download. Catches a part that the
    stock pipeline or a script does not find, and an existing folder that is overwritten."""
    shape = dict(num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16)
    preset = model.PRESETS["sd3-medium"]
    monkeypatch.setitem(model.PRESETS, "sd3-medium", dataclasses.replace(
        preset, architecture={**preset.architecture, **shape}))
    base = tmp_path / "random"
    words = ["--model", "sd3-medium", "--blocks", "3", "--size", "8", "--out", str(base)]
    random_model.main(words)
    assert "3 blocks" in capsys.readouterr().out
    small_stages(base, tmp_path)
    line = lines_of(tmp_path / "stage2")[0]
    assert math.isfinite(line["loss_g"]) and line["norm_g"] > 0
    sampler.main(["--checkpoint", str(tmp_path / "stage2"), "--prompt", "an old cat, ünïcode",
                  "--num-images", "1", "--out", str(tmp_path / "cat.png")])
    assert (tmp_path / "cat.png").exists()
    saved = load_file(tmp_path / "stage2/student/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float16}, "real students are in half"
    assert "exists; give --out another folder" in refused(random_model, words, capsys)


# ----------------------------------------------------------------------------- claims.py

def claim_rows(seeds, level=lambda name: 0.5):
    """Rows of results.json for every path of every variant of tools.claims, made up; level(name)
    is the value of all measures of a row."""
    from tools import claims
    names = {"teacher, w = 4 for sigma <= 0.94"}
    for _, variants in claims.EXPERIMENTS.values():
        for variant in variants:
            for seed in seeds:
                folder = Path([f for f in claims.folders(variant, seed, "r") if f][-1]).name
                names |= {folder, *(folder + suffix for suffix in claims.SUFFIXES)}
    measures = ("prompt_accuracy", "usual_scene", "scene_entropy", "diversity")
    return [{"name": name, "nfe_blocks": 5 / 3, "frechet_to_teacher": level(name),
             "by_prompt": {key: [level(name)] * 24 for key in measures}} for name in sorted(names)]


def test_claims_share_runs_and_train_stage_one_first(capsys):
    """A variant that names its folder wrongly would be judged by another variant's run."""
    from tools import claims
    claims.main(["--dry-run", "--only", "1", "parts", "alpha", "--seeds", "7"])
    lines = capsys.readouterr().out.splitlines()
    out = [line.split("--out ")[1].split()[0] for line in lines[:-1]]
    assert len(out) == len(set(out))
    assert set(out) == set(lines[-1].split("--checkpoint ")[1].split())
    stages = ["train_stage2" in line for line in lines[:-1]]
    assert stages == sorted(stages) and any(stages)
    assert "runs/claims/stage1-alpha-0.98-seed7" in out
    assert "runs/claims/stage2-warmup-0-seed7" in out


def test_every_command_of_the_claims_is_one_that_its_script_takes(capsys):
    """Catches a variant that asks for an option which is gone: hours later, or never."""
    from tools import claims
    claims.main(["--dry-run", "--seeds", "7", "--only", *claims.EXPERIMENTS])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 15
    scripts = {"train_stage1.py": train_stage1, "train_stage2.py": train_stage2,
               "evaluate.py": evaluate}
    for line in lines:
        _, name, *words = line.split()
        parse_settings(scripts[name].Settings, words, name, "")


@pytest.mark.parametrize("mean, spread, verdict", [
    (-0.3, 0.01, "holds"), (-1.7, 0.01, "does not hold"), (-1.0, 0.3, "not decided")])
def test_a_claim_is_judged_by_its_interval_over_seeds_and_captions(mean, spread, verdict):
    """A verdict from the point estimate alone would call noise a result."""
    from tools import claims
    difference = (mean + spread * torch.randn(3, 24, generator=seeded())) / 100
    difference += mean / 100 - difference.mean()
    a, b = ({"prompt_accuracy": x} for x in (0.9 + difference, torch.full((3, 24), 0.9)))
    value, low, high, found = claims.judge(claims.points(a, b), "at least", -1, 3, 24)
    assert value == pytest.approx(mean, abs=1e-3) and low < value < high and found == verdict
    opposite = {"holds": "does not hold", "does not hold": "holds", "not decided": "not decided"}
    assert claims.judge(claims.points(a, b), "at most", -1, 3, 24)[3] == opposite[verdict]


def test_claims_reads_its_rows_by_seed_and_path():
    """Rows of another seed or path must not enter a claim; a missing path leaves its line out."""
    from tools import claims

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
    assert claims.gather(rows, claims.STAGE1, [1, 2], "r")["frechet"].tolist() == pytest.approx(
        [0.5, 0.7])


def test_claims_trains_measures_and_judges(tmp_path, monkeypatch, capsys):
    """All experiments on made-up rows, without a training. Catches a statement about a variant or
    a path that nobody measures, an order that needs a run before it is there, and a claim that
    holds whatever was measured: all rows are alike here, so nothing collapses and nothing helps."""
    from tools import claims
    executed, real = [], claims.interval

    def execute(line, threads=None):
        executed.append(line)
        if line.startswith("evaluate.py"):
            run.write_json(tmp_path / "results.json", {
                "rows": claim_rows([7, 8]), "protocol": {"seed": 200}})
    monkeypatch.setattr(claims, "execute", execute)
    monkeypatch.setattr(claims, "interval", lambda *a: real(*a, rounds=20))
    monkeypatch.setitem(sys.modules, "matplotlib", None)              # as if not installed
    claims.main(["--seeds", "7", "8", "--jobs", "1", "--out", str(tmp_path), "--only",
                 *claims.EXPERIMENTS])
    kinds = [line.split()[0] for line in executed]
    assert kinds == sorted(kinds, key=["train_stage1.py", "train_stage2.py",
                                       "evaluate.py"].index) and kinds.count("evaluate.py") == 1
    text = (tmp_path / "claims.md").read_text()
    assert text.count("### ") == len(claims.EXPERIMENTS) and "nan" not in text
    assert "1.00 [1.00, 1.00] | at most 0.5 | **does not hold**" in text
    assert "pip install matplotlib" in capsys.readouterr().out
    with pytest.raises(UserError, match="ended with exit code 3"):
        monkeypatch.undo()
        claims.execute("-c 'raise SystemExit(3)'", threads=1)


def test_sweeps_are_drawn_where_matplotlib_is_installed(tmp_path):
    """Catches a plot that only fails after the hours of its sweep."""
    pytest.importorskip("matplotlib")
    from tools import claims
    found = claims.gather(claim_rows([7, 8]), claims.STAGE1, [7, 8], "r")
    for x in ("scene_entropy", "nfe"):
        claims.plot(tmp_path / f"{x}.png", x, [("one", found), ("other", found)])
        assert (tmp_path / f"{x}.png").stat().st_size > 1000


# ----------------------------------------------------------------------------- make_teacher.py

@pytest.fixture
def small_world(monkeypatch):
    """The miniature with one large radius: 96 pictures to encode instead of 84,000."""
    monkeypatch.setattr(world, "RADII", (15,))
    for cached in (world.templates, world._template_norms):
        cached.cache_clear()
    yield
    for cached in (world.templates, world._template_norms):
        cached.cache_clear()


def test_the_teacher_can_be_made_again(small_world, tmp_path, monkeypatch, capsys):
    """Every part of tiny/make_teacher.py with a step or two; catches a folder that the stock
    pipeline does not load."""
    from diffusers import StableDiffusion3Pipeline
    words = ["--out", str(tmp_path / "teacher"), "--work", str(tmp_path / "work"),
             "--vae-steps", "1", "--teacher-steps", "1", "--refine-steps", "1",
             "--backbone-steps", "1", "--report-samples", "0"]
    fit = make_teacher.fit
    monkeypatch.setattr(make_teacher, "fit", lambda name, net, loss_at, steps, *rest: fit(
        name, net, loss_at, min(steps, 2), *rest))        # the text encoders' 400
    make_teacher.main(words)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "teacher", text_encoder_3=None,
                                                    tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=1, max_sequence_length=0,
                output_type="pt").images.shape[-1] == 32
    ours, committed = ({path.relative_to(folder) for path in folder.rglob("*.json")}
                       for folder in (tmp_path / "teacher", Path(TINY.source)))
    assert ours == committed, "the committed folder was made by another version"
    assert "exists; give --out another folder" in refused(make_teacher, words, capsys)


def make_one_encoder(work, tokens):
    """Trains make_teacher's first text encoder, but for 200 steps only."""
    fit = make_teacher.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_teacher, "fit", lambda name, net, loss_at, steps, *rest: fit(
            name, net, loss_at, 200, *rest))
        patch.setattr(make_teacher, "SAVE_EVERY", 20)
        return make_teacher.make_text_encoder(make_teacher.make_tokenizer(tokens), 0,
                                              make_teacher.Settings(work=str(work)))


def test_a_killed_making_of_the_teacher_goes_on_bit_for_bit(tmp_path):
    """make_teacher's own loop, with kill -9 between two checkpoints."""
    killed, tokens = tmp_path / "killed", tmp_path / "tokens"
    program = ("import pathlib, sys; from tools import test_tools; "
               "test_tools.make_one_encoder(*map(pathlib.Path, sys.argv[1:]))")
    process = subprocess.Popen([sys.executable, "-c", program, str(killed), str(tokens)], cwd=HERE,
                               stderr=subprocess.DEVNULL)
    while not run.checkpoints(killed / "text_encoder_1"):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert run.checkpoints(killed / "text_encoder_1")[-1].name < "checkpoint-000200"
    one = make_one_encoder(killed, tokens)
    other = make_one_encoder(tmp_path / "undisturbed", tokens)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# ----------------------------------------------------------------------------- the command line

def bad_files(folder):
    """All kinds of files and run folders that a command may be pointed at by mistake or malice."""
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
    good = {"format": run.FORMAT, "base": "tiny", "stage": 1, "iteration": 0, "steps": 2,
            "sigmas": [1.0, 0.75, 0.0], "alpha": 0.94, "guidance": 4.0, "nfe": 2.0,
            "cached_blocks": None, "latent_shape": [4, 8, 8], "resolution": None}
    for name, content in (("evil", {"steps": "../../etc"}), ("huge", {"steps": 10**30}),
                          ("newer", {"format": 99}), ("good", {}),
                          ("foreign", {"base": "sd3-medium"}), ("one", {"steps": 1}),
                          ("two", {"stage": 2}), ("span", {"cached_blocks": "5-2"}),
                          ("dict", {"cached_blocks": {"a": 1}}), ("init", {"init": ["x"]}),
                          ("latents", {"latent_shape": [4, 8, 10**9]}),
                          ("path", {"base": "../../etc"})):
        (folder / name).mkdir()
        (folder / name / "distill.json").write_text(json.dumps({**good, **content}))
    (folder / "list").mkdir()
    (folder / "list" / "distill.json").write_text("[1]")
    (folder / "old").mkdir()
    (folder / "old" / "settings.json").write_text('{"format": 1, "settings": {}}')


# Arguments of train_stage1.py, or a command by name and its arguments; what the one line must say.
BAD_INPUT = [
    ("--colour red", "unrecognized arguments: --colour red (see python train_stage1.py --help)"),
    ("--normaliser column", "unrecognized arguments: --normaliser column"),
    ("--alph 0.9", "unrecognized arguments: --alph 0.9"),
    ("--alpha", "--alpha: expected one argument"),
    ("--steps 0", "--steps must be at least 1, not '0'"),
    ("--steps two", "--steps must be an integer, not 'two'"),
    ("--steps 2.5", "--steps must be an integer, not '2.5'"),
    ("--alpha 2", "--alpha must be at most 1, not '2'"),
    ("--alpha nan", "--alpha must be a finite number, not 'nan'"),
    ("--alpha high", "--alpha must be a number, not 'high'"),
    ("--guidance inf", "--guidance must be a finite number"),
    ("--student-lr 0", "--student-lr must be more than 0"),
    ("--batch-size 5 --accumulation 2", "--batch-size 5 is not a multiple of --accumulation 2"),
    ("--batch-size 1e3", "--batch-size must be an integer, not '1e3'"),
    ("--importance best", "--importance must be one of official, paper, uniform, not 'best'"),
    ("--loss mse", "--loss must be one of ours, official, not 'mse'"),
    ("--pool 0", "--pool must be at least 1"),
    ("--seed -1", "--seed must be at least 0"),
    ("--resolution 20", "--resolution 20 is not a multiple of 8 up to 64"),
    ("--resolution 80", "--resolution 80 is not a multiple of 8 up to 64"),
    ("--prompts FOLDER/nowhere.txt", "there is no such file"),
    ("--prompts FOLDER/other", "there is no such file"),
    ("--prompts FOLDER/empty.txt", "no prompt in it"),
    ("--prompts FOLDER/binary.txt", "not UTF-8 text"),
    ("--prompts FOLDER/nul.txt", "line 2: NUL"),
    ("--prompts FOLDER/long.txt", "line 2: NUL characters or longer than 10,000"),
    ("--prompts FOLDER/bad.jsonl", "line 2: no text, and no object with \"prompt\""),
    ("--out FOLDER/file", "is a file; give --out a folder"),
    ("--out FOLDER/other", "exists and is not a run folder"),
    ("--out FOLDER/other --overwrite", "exists and is not a run folder"),
    ("--out FOLDER/old", "was written in format 1; this code reads 4"),
    ("--model sd4", "there is no model sd4; use tiny, sd3-medium"),
    ("--model FOLDER/model", "holds a FluxTransformer2DModel, not an SD3Transformer2DModel"),
    ("--model FOLDER/other", "FOLDER/other is no pipeline folder: it has no transformer/config"),
    ("--model ./misspelt/folder", "there is no model ./misspelt/folder"),
    ("--model nobody/nothing", "--model tiny needs no download"),
    ("sampler.py --out grid.jpg", "give a file name that ends in .png"),
    ("sampler.py --checkpoint FOLDER/nowhere", "there is no run folder"),
    ("sampler.py --checkpoint FOLDER/other", "distill.json is missing"),
    ("sampler.py --checkpoint FOLDER/good", "holds neither student/ nor a checkpoint yet"),
    ("sampler.py --checkpoint FOLDER/evil", "steps is '../../etc', not int"),
    ("sampler.py --checkpoint FOLDER/huge", "not between 1 and 1000"),
    ("sampler.py --checkpoint FOLDER/newer", "has format 99"),
    ("sampler.py --checkpoint FOLDER/span", "span 5-2 is reversed"),
    ("sampler.py --checkpoint FOLDER/dict", "a span of blocks is written first-last"),
    ("sampler.py --checkpoint FOLDER/latents", "latent_shape is"),
    ("sampler.py --checkpoint FOLDER/path", "there is no model ../../etc"),
    ("sampler.py --checkpoint FOLDER/list", "does not hold a JSON object"),
    ("sampler.py --checkpoint FOLDER/good --out grid.txt", "give a file name that ends in .png"),
    ("sampler.py --checkpoint FOLDER/good --prompt x --prompts y", "or --prompts, not both"),
    ("evaluate.py --checkpoint FOLDER/nowhere", "there is no run folder"),
    ("evaluate.py --checkpoint FOLDER/good --prompts FOLDER/words.txt", "the exact reader knows"),
    ("evaluate.py --checkpoint FOLDER/good FOLDER/other/../good", "have the same name"),
    ("evaluate.py --checkpoint FOLDER/foreign", "was distilled from sd3-medium, not from tiny"),
    ("evaluate.py --checkpoint FOLDER/good --out FOLDER/file", "is a file; give a folder"),
    ("evaluate.py --model sd3-medium", "real models need --checkpoint RUN and --prompts FILE"),
    ("train_stage2.py --init FOLDER/nowhere", "there is no run folder"),
    ("train_stage2.py --init FOLDER/good --cached-blocks 2-11", "last one cannot be cached"),
    ("train_stage2.py --init FOLDER/good --cached-blocks 5-2", "span 5-2 is reversed"),
    ("train_stage2.py --init FOLDER/good --cached-blocks 2,4", "written first-last"),
    ("train_stage2.py --init FOLDER/good --reference FOLDER/good", "has no more steps than"),
    ("train_stage2.py --init FOLDER/foreign", "was distilled from sd3-medium, not from tiny"),
    ("train_stage2.py --init FOLDER/two", "is a run of Stage 2; --init takes one of Stage I"),
    ("train_stage2.py --init FOLDER/one", "has one step; a cache needs a second one"),
    ("train_stage2.py --match-iterations 2", "unrecognized arguments: --match-iterations 2"),
    ("tools/find_span.py", "--checkpoint RUN is needed"),
    ("tools/find_span.py --checkpoint FOLDER/good --nfe 3", "--nfe must be at most 2"),
    ("tools/find_span.py --checkpoint FOLDER/one", "has one step"),
    ("tools/find_span.py --checkpoint FOLDER/good --error l2", "must be one of squared, l1"),
    ("tools/find_alpha.py --levels 0.9 half", "--levels must be numbers, not 'half'"),
    ("tools/find_alpha.py --levels 0.9 1", "--levels must lie between 0 and 1, not 1"),
    ("tools/find_alpha.py --levels nan 0.5", "--levels must lie between 0 and 1, not nan"),
    ("tools/find_alpha.py --levels 0.9 0.90", "--levels needs two different levels"),
    ("tools/find_alpha.py --guidance 1", "--guidance must be more than 1"),
    ("tools/find_alpha.py --out FOLDER/file", "is a file; give a folder"),
    ("tools/find_alpha.py --model FOLDER/other", "is no pipeline folder"),
    ("tools/curves.py", "name a run folder, for instance runs/tiny-stage1"),
    ("tools/curves.py FOLDER/nowhere", "FOLDER/nowhere holds no metrics.jsonl"),
    ("tools/curves.py --run FOLDER/good FOLDER/other", "FOLDER/good holds no metrics.jsonl"),
    ("tools/figures.py", "--stage1: there is no run runs/tiny-stage1; python train_stage1.py"),
    ("tools/figures.py --only cake", "--only must be one of paths, collapse, guidance, cache"),
    ("tools/figures.py --stage1 FOLDER/good --stage2 FOLDER/nowhere --only paths",
     "no run FOLDER/nowhere; python train_stage2.py --out FOLDER/nowhere makes it"),
    ("tools/figures.py --stage1 FOLDER/one --only guidance", "is no run of Stage 1 of the mini"),
    ("tools/figures.py --stage1 FOLDER/good --plain FOLDER/foreign --only collapse",
     "is no run of Stage 1 of the miniature with two steps"),
    ("tools/figures.py --stage1 FOLDER/good --stage2 FOLDER/two --only cost", "has no cache"),
    ("tools/figures.py --stage1 FOLDER/good --only guidance --more FOLDER/foreign",
     "--more FOLDER/foreign is no run of the miniature"),
    ("tools/benchmark.py --rounds 0", "--rounds must be at least 1"),
    ("tools/benchmark.py --cached-blocks 5-2", "span 5-2 is reversed"),
    ("tools/benchmark.py --resolution 20", "--resolution 20"),
    ("tools/random_model.py --model tiny", "--model must be one of sd3-medium, sd3.5-medium"),
    ("tools/random_model.py --out FOLDER/other", "exists; give --out another folder"),
    ("tools/claims.py --only 99", "--only must be one of 1, 2, 3, 4"),
    ("tools/claims.py --seeds 7 7", "--seeds must differ"),
    ("tools/claims.py --seeds -7", "--seeds"),
    ("tools/claims.py --seeds seven", "--seeds must be an integer, not 'seven'"),
    ("tiny/make_teacher.py --out FOLDER/other", "exists; give --out another folder"),
]


def command_of(arguments, folder):
    """(module with a main, its words) of a line of BAD_INPUT."""
    words = [word.replace("FOLDER", str(folder)) for word in arguments.split()]
    name = "train_stage1.py"
    if words[0].endswith(".py"):
        name = words.pop(0)
    return importlib.import_module(name.removesuffix(".py").replace("/", ".")), words


@pytest.mark.parametrize("arguments, message", BAD_INPUT)
def test_bad_input_gets_one_clear_line_and_writes_nothing(
        arguments, message, tmp_path, capsys, monkeypatch):
    """Exit code 2, no traceback, no file; catches whatever is found out only after minutes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))}
    script, words = command_of(arguments, tmp_path)
    assert message.replace("FOLDER", str(tmp_path)) in refused(script, words, capsys)
    assert {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))} == before


COMMANDS = ("train_stage1.py", "train_stage2.py", "sampler.py", "evaluate.py",
            "tools/benchmark.py", "tools/find_span.py", "tools/random_model.py", "tools/claims.py",
            "tools/curves.py", "tools/figures.py", "tools/find_alpha.py", "tiny/make_teacher.py")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_options_and_how_to_ask_for_them(name, capsys):
    """--help, and the command that an error names; catches a % in a help text, which argparse
    cannot print, and advice that does not work: python tools/x.py finds no run.py."""
    script, _ = command_of(name, "")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert not stop.value.code
    for field in dataclasses.fields(script.Settings):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["text"]
    advice = re.search(r"\(see python (.+) --help\)", refused(script, ["--nonsense"], capsys))[1]
    dotted = name.removesuffix(".py").replace("/", ".")
    assert advice == (name if "/" not in name else f"-m {dotted}")


def test_commands_that_are_not_for_torchrun_say_so(monkeypatch, capsys):
    """Catches eight processes that write one table."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in COMMANDS[2:]:
        script, _ = command_of(name, "")
        assert "torchrun is for train_stage1.py and train_stage2.py" in refused(script, [], capsys)


def test_dry_run_prints_settings_and_writes_nothing(tmp_path, capsys):
    """Catches a plan that leaves a run folder behind."""
    train_stage1.main(["--dry-run", "--out", str(tmp_path / "x")])
    assert "alpha                   0.94" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- strangers' files

class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_any_place_where_weights_are_looked_for_is_never_opened(
        finished, tmp_path, capsys):
    """Run folders and base models of a stranger: .bin files, and pickles named .safetensors."""
    fuse, stranger, base = tmp_path / "exploded", tmp_path / "run", tmp_path / "base"
    bomb = pickle.dumps(Bomb(fuse))
    for extension in ("bin", "safetensors"):
        shutil.copytree(finished, stranger, copy_function=os.link)
        shutil.copytree(TINY.source, base)
        for path in [*stranger.rglob("*.safetensors"), *base.rglob("*.safetensors")]:
            path.unlink()                                 # a link to the true one
            path.with_suffix(f".{extension}").write_bytes(bomb)
            for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
                (path.parent / name).write_bytes(bomb)
        refused(sampler, ["--checkpoint", stranger], capsys)
        refused(train_stage1, ["--model", base, "--out", tmp_path / "x", "--iterations", "1"],
                capsys)
        assert not fuse.exists()
        shutil.rmtree(stranger)
        shutil.rmtree(base)
    assert pickle.loads(bomb) is None and fuse.exists(), "the bomb itself is sound"


# ----------------------------------------------------------------------------- the text itself

MODULES = sorted(path.relative_to(HERE) for path in (
    *HERE.glob("*.py"), *HERE.glob("tools/*.py"), *HERE.glob("tiny/*.py"))
    if not path.name.startswith("test_"))


def test_every_public_function_and_class_has_a_docstring():
    """And every file. Only a script's Settings and main have none: the options and the file's own
    docstring tell about them."""
    assert len(MODULES) >= 16, "files are missing"
    for name in MODULES:
        tree = ast.parse((HERE / name).read_text())
        assert ast.get_docstring(tree), name
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not (
                    node.name.startswith("_") or node.name in ("main", "Settings")):
                assert ast.get_docstring(node), f"{name}: {node.name}"


def imports_of(name):
    """The modules that a file of ours imports, of ours by their dotted name, lazy imports too, but
    not under `if __name__ == "__main__"`: a file's own command may import what it needs."""
    ours = {str(path.with_suffix("")).replace("/", ".") for path in MODULES}
    tree = ast.parse((HERE / name).read_text())
    tree.body = [node for node in tree.body
                 if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & ours
            found |= inner or {node.module}
    return {module if module in ours else module.split(".")[0] for module in found}, ours


PLUMBING = {"tools.settings", "tools.processes"}          # what any file may import


def test_losses_and_cache_know_none_of_ours():
    """Catches a loss that asks a network, a setting or a device, and a cache that cannot be copied
    out. The miniature's pictures need torch alone."""
    assert imports_of("losses.py")[0] == {"torch"}
    assert imports_of("tiny/world.py")[0] == {"torch", "functools"}
    for name, allowed in (("cache.py", set()), ("run.py", PLUMBING), ("tools/processes.py", set()),
                          ("tools/settings.py", {"tools.processes"})):
        found, ours = imports_of(name)
        assert found & ours == allowed, f"{name} imports {found & ours}"


# What the method leaves to tools: --dry-run, --prompts, the metrics of real models, the curves.
ON_DEMAND = {("train_stage1", "tools.plan"), ("train_stage2", "tools.plan"),
             ("evaluate", "tools.real_metrics"), ("model", "tools.prompt_files"),
             ("train_stage1", "tools.curves"), ("train_stage2", "tools.curves")}


def test_imports_close_no_circle():
    """Lazy imports count. Catches a file that cannot be read before another that needs it. And the
    method knows no tool."""
    graph = {}
    for path in MODULES:
        name = str(path.with_suffix("")).replace("/", ".")
        found, ours = imports_of(path)
        graph[name] = {other for other in found & ours if (name, other) not in ON_DEMAND}
        if not name.startswith("tools."):
            assert not {other for other in graph[name] if "tools." in other} - PLUMBING, name
    assert {"run", "cache"} <= graph["model"] and "sampler" in graph["train_stage1"]
    assert "train_stage1" not in graph["train_stage2"] and not graph["losses"]
    while graph:                                          # take away who needs nobody, and again
        free = {name for name, others in graph.items() if not others & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in free}


def table_rows(text):
    """The tables of a Markdown text: for each the cells of its rows, without the line of dashes."""
    tables, before = [], ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not before.startswith("|"):
                tables.append([])
            if not all(re.fullmatch(":?-+:?", cell) for cell in cells):
                tables[-1].append(cells)
        before = line
    return tables


def test_the_readmes_reading_order_names_real_files_and_functions():
    """Rows whose first cell is a file in backticks: every other name in backticks is defined there,
    or is a file; catches a table that outlived a rename."""
    rows = [row for table in table_rows((HERE / "README.md").read_text()) for row in table
            if re.search(r"`[\w/]+\.py`", row[0])]
    files, names = set(), 0
    for first, *others in rows:
        of_row = re.findall(r"`([\w/]+\.py)`", first)
        files |= set(of_row)
        text = "".join((HERE / file).read_text() for file in of_row)
        for name in re.findall(r"`([^`]+)`", " ".join(others)):
            word = name.removesuffix("()").split(".")[-1]
            if re.fullmatch(r"[A-Za-z_]\w{2,}", word):
                defined = re.search(rf"(def|class) {word}\b|^{word} = ", text, re.M)
                assert defined, f"{first} holds no {name}"
                names += 1
            elif re.fullmatch(r"[\w/]+\.(py|md)", name):
                assert (HERE / name).exists(), name
    assert {"losses.py", "train_stage1.py", "cache.py", "train_stage2.py", "sampler.py",
            "model.py"} <= files
    assert names >= 10


def commands_in(name):
    """(script, words) of every command in a text: README, a file's docstring; of docs/ the blocks
    of code and the tools, since the rest tells of older versions, too."""
    text = (HERE / name).read_text()
    if str(name).endswith(".py"):
        text = ast.get_docstring(ast.parse(text))
    elif str(name).startswith("docs/"):
        text = "\n".join(re.findall(r"^(?:python|torchrun) .*|`python -m tools[^`]*`", text, re.M))
    found = re.findall(r"(?:python|torchrun --nproc-per-node \d+) "
                       r"(-m [\w.]+|[\w/]+\.py)([^`\n#&]*)", text)
    return [(script, shlex.split(words)) for script, words in found
            if "pytest" not in script and not set("$\\…[") & set(words)]


def test_every_command_in_a_text_is_one_that_its_script_takes():
    """Catches an option that is gone but still recommended, and a script that has moved."""
    counts = {}
    for name in ("README.md", "docs/RESULTS.md", "docs/REAL_MODELS.md", "docs/PICTURES.md",
                 *map(str, MODULES)):
        counts[name] = len(commands_in(name))
        for script, words in commands_in(name):
            path = script
            if script.startswith("-m "):
                path = script[3:].replace(".", "/") + ".py"
            assert (HERE / path).exists(), f"{name}: there is no {path}"
            settings = getattr(command_of(path, "")[0], "Settings", None)
            try:
                if settings:
                    parse_settings(settings, words, path, "")
            except UserError as error:
                pytest.fail(f"{name}: python {script} {' '.join(words)}: {error}")
    assert counts["README.md"] >= 10 and counts["docs/RESULTS.md"] >= 5
    assert counts["train_stage1.py"] == 3 and sum(counts.values()) > 40


def test_the_readme_can_be_read_in_one_sitting():
    """Its size, and that no line or table needs a wide screen; the documents' too."""
    text = (HERE / "README.md").read_text()
    assert len(text.split()) <= 1800 and len(table_rows(text)) <= 4
    assert max(len(row) for table in table_rows(text) for row in table) <= 5
    documents = [*HERE.glob("docs/*.md")]
    assert len(documents) >= 4
    for path in (HERE / "README.md", *documents):
        text = path.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 120, f"{path.name}:{number} has {len(line)} columns"
        assert all(len(row) <= 7 for table in table_rows(text) for row in table), path.name


def test_nothing_unpickles_or_runs_foreign_code():
    """Calls by name in the source of all files; catches what no test of behaviour would meet."""
    for name in MODULES:
        text = (HERE / name).read_text().replace(".eval(", "")
        for word in ("torch.load", "torch.save", "torch.hub", "import pickle", "np.load",
                     "allow_pickle", "trust_remote_code", "shell=True", "os.system", "eval(",
                     "exec(", "marshal", "__import__"):
            assert word not in text, f"{name}: {word}"


# ----------------------------------------------------------------------------- --error of find_span

def test_the_relative_change_of_a_block_does_not_grow_with_its_residual(teacher):
    """By hand, and by scale: the squared change of a block that adds twice as much is four times as
    large, its relative L1 change is the same. Catches norms of the wrong order or the later step
    below the line; and a default that is no longer the mean square."""
    from tools import find_span
    before, after = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([2.0, -2.0, 1.0])
    assert find_span.mean_square(after, before) == pytest.approx(10 / 3)
    assert find_span.relative_l1(after, before) == pytest.approx(4 / 7)
    for name, factor in (("squared", 9), ("l1", 1)):
        change = find_span.ERRORS[name]
        assert change(3 * after, 3 * before) == pytest.approx(factor * change(after, before))
    assert find_span.Settings().error == "squared"

    x = sampler.image_noise(0, range(2), (4, 8, 8))
    prompt = model.encode_prompts(TINY, world.CAPTIONS[:2], "cpu")
    sigmas = torch.tensor([1.0, 0.75])
    with torch.no_grad():
        default = find_span.reuse_errors(teacher, x, 0.9 * x, prompt, sigmas)
        squared = find_span.reuse_errors(teacher, x, 0.9 * x, prompt, sigmas, "squared")
        relative = find_span.reuse_errors(teacher, x, 0.9 * x, prompt, sigmas, "l1")
        spans = [find_span.span_errors(teacher, [(2, 4)], x, 0.9 * x, prompt, sigmas, name)[0]
                 for name in ("squared", "l1")]
        one = find_span.block_residuals(teacher, x, 1.0, prompt)[5][0]
        two = find_span.block_residuals(teacher, 0.9 * x, 0.75, prompt)[5][0]
    assert default == squared != relative
    assert relative["image"][5] == pytest.approx(((two - one).abs().sum() / one.abs().sum()).item())
    assert spans[0] != spans[1] and all(0 < error < 5 for error in spans)


def test_the_span_finder_says_which_error_it_prints(
        finished, tmp_path, monkeypatch, capsys):
    """Catches a table of one error under the other's name."""
    from tools import find_span
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for error, block, span in (("squared", "(mean squared change", "NFE, relative error"),
                               ("l1", "(relative L1 change", "NFE, relative L1 error")):
        find_span.main(["--checkpoint", str(finished), "--samples", "2", "--error", error,
                        "--out", str(tmp_path / "plot.png")])
        out = capsys.readouterr().out
        assert block in out and span in out and out.count("<- proposed") == 1


# ----------------------------------------------------------------------------- find_alpha.py

def test_spread_and_diversity_are_the_standard_deviations_that_they_say():
    """In two batches, against torch's own. Catches a mean over the wrong dimension and a batch that
    is counted as if it were all."""
    from tools import find_alpha
    g = run.rng(0, "test")
    of_prompt = 5 * torch.randn(4, 2, 3, 3, generator=g)              # the prompts lie far apart
    x0 = torch.randn(12, 2, 3, 3, generator=g) + of_prompt.repeat(3, 1, 1, 1)
    owner = torch.arange(12) % 4
    moments = find_alpha.Moments(4, (2, 3, 3))
    moments.add(x0[:5], owner[:5])
    moments.add(x0[5:], owner[5:])
    assert moments.spread() == pytest.approx(x0.std(correction=0).item(), rel=1e-5)
    by_prompt = x0.reshape(3, 4, 2, 3, 3)                             # of prompt j mod 4
    within = by_prompt.var(0).mean().sqrt().item()
    assert moments.within() == pytest.approx(within, rel=1e-5)
    assert moments.within() < 1.3 < moments.spread()


def test_guidance_takes_from_the_share_of_a_prompt_at_high_noise_alone(
        tmp_path, monkeypatch, capsys):
    """On the true teacher, few samples. Catches the sign of the guidance, x̂0 of another level, and
    a result that depends on the batch size."""
    from tools import find_alpha
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    tables = []
    for size in ("12", "5"):
        find_alpha.main(["--levels", "0.5", "0.96", "0.8", "--samples-per-prompt", "3", "--steps",
                         "3", "--prompts-used", "4", "--batch-size", size, "--out", str(tmp_path)])
        out = capsys.readouterr().out
        rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", out, re.M)
        tables.append([[float(cell) for cell in row] for row in rows])
    assert np.allclose(*tables, atol=2e-3)
    assert [row[0] for row in tables[0]] == [0.96, 0.8, 0.5]          # falling, however asked for
    spreads = [row[1] for row in tables[0]]
    assert spreads[0] > spreads[1] > spreads[2] > 1                   # guidance spreads out
    assert all(share == pytest.approx(within / spread, abs=2e-3)
               for _, spread, within, share in tables[0])
    assert tables[0][0][3] < 0.9 < tables[0][2][3]
    assert "proposed α: 0." in out and "pip install matplotlib" in out
    assert [path.name for path in tmp_path.iterdir()] == ["alpha.md"]
    assert "proposed α" in (tmp_path / "alpha.md").read_text()


def test_alpha_is_proposed_where_half_of_the_loss_is_made_up():
    """By hand, with a harmless level above a collapsing one, where nothing collapses, and where all
    does. Catches the first crossing from above instead of the last."""
    from tools import find_alpha

    def rows(*shares):
        return [{"sigma": 0.9 - 0.1 * i, "spread": 2, "within": 2 * share, "share": share}
                for i, share in enumerate(shares)]
    alpha, reason = find_alpha.propose(rows(0.6, 0.7, 0.9, 1.0))      # half: 0.8, between 0.8, 0.7
    assert alpha == pytest.approx(0.75) and "σ = 0.9 (share 0.60)" in reason
    assert find_alpha.crossing(rows(0.6, 1.0, 0.7, 0.9), 0.8) == pytest.approx(0.65)
    assert find_alpha.propose(rows(1.0, 0.99, 1.1))[0] is None
    alpha, reason = find_alpha.propose(rows(0.6, 0.65, 0.7))
    assert alpha == pytest.approx(0.7) and "ask at lower ones" in reason


def test_alpha_is_drawn_where_matplotlib_is_installed(tmp_path):
    """With and without a proposal. Catches a plot that fails after the measuring."""
    pytest.importorskip("matplotlib")
    from tools import find_alpha
    rows = [{"sigma": 0.9, "spread": 2.0, "within": 1.4, "share": 0.7},
            {"sigma": 0.5, "spread": 1.1, "within": 1.2, "share": 1.05}]
    for alpha in (0.8, None):
        find_alpha.plot(rows, alpha, "title", tmp_path / "alpha.png")
        assert (tmp_path / "alpha.png").stat().st_size > 1000
        (tmp_path / "alpha.png").unlink()


# ----------------------------------------------------------------------------- curves.py

def test_curves_are_drawn_from_what_a_run_logs(finished2, tmp_path, capsys):
    """By the command, of a Stage II run of the tests. Catches a quantity in no panel, or in two."""
    pytest.importorskip("matplotlib")
    from tools import curves
    log = curves.read_log(finished2)
    drawn = [name for _, _, names in curves.grouped(log) for name in names]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == {name for name, (iterations, _) in log.items() if len(iterations) > 1}
    shutil.copy(finished2 / "metrics.jsonl", tmp_path)
    curves.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_quantity_is_drawn_in_the_panel_of_its_kind():
    """Catches gradient norms among the losses, and a quantity of tomorrow that nobody sees."""
    from tools import curves
    names = ("loss_fake", "loss_d", "gap", "gap_0.94_1", "x0_std", "norm_g", "grad_norm_fake",
             "updates_g", "d_ranks", "tomorrow")
    panels = {name: (title, axis) for title, axis, group in curves.grouped(
        {name: ([1, 2], [0.5, 0.4]) for name in names}) for name in group}
    assert panels["gap"] == panels["gap_0.94_1"] != panels["loss_fake"] != panels["loss_d"]
    assert panels["norm_g"] == panels["grad_norm_fake"] != panels["updates_g"]
    assert panels["tomorrow"][0] == "other" and panels.keys() == set(names)
    assert all("good" in axis or "direction" in axis for _, axis, _ in
               [(title, axis, None) for title, _, axis in curves.PANELS])
    assert curves.smooth([1.0] * 50) == [1.0] * 50
    assert curves.smooth(list(map(float, range(40))))[20] == 20


@pytest.mark.parametrize("text", [
    b"", b"5\n[]\n{}\nnull\n", b'{"iteration": 1, "loss_fake": 0.5}\n', b"\xff\xfe\x00" * 50,
    b'{"iteration": 1, "a": 1}\n{"iteration": 2, "a": NaN}\n{"iteration": 3, "a": Infin',
    b'{"iteration": "one", "a": 1}\n{"iteration": true, "a": 2}\n{"a": 3}\n',
    b'{"iteration": 1, "a": true}\n{"iteration": 2, "a": "x"}\n{"iteration": 3, "a": [1]}\n',
    b'{"iteration": 1, "a": 1' + b"0" * 400 + b'}\n{"iteration": 2, "a": 1}\n', b"[" * 100_000])
def test_a_log_without_a_curve_is_passed_over_in_silence(text, tmp_path, capsys):
    """draw() ends hours of training: it may draw nothing, but never raise; catches each way in
    which a log is short, odd or cut."""
    from tools import curves
    assert curves.draw(tmp_path / "nowhere") is None                  # this alone it tells
    capsys.readouterr()
    (tmp_path / "metrics.jsonl").write_bytes(text)
    assert curves.draw(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert not capsys.readouterr().err


def test_a_cut_log_is_drawn_up_to_its_cut_and_without_matplotlib_not_at_all(
        tmp_path, monkeypatch, capsys):
    """A last line cut in the middle, null in a bin. Catches a draw() that raises at the end of a
    training on a machine without matplotlib, and a full disk."""
    from tools import curves
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 5, "gap": 0.5, "gap_0_0.5": null}\n{"iteration": 10, "gap": 0.4}\n'
        '{"iteration": 15, "gap": 0.')
    assert curves.read_log(tmp_path) == {"gap": ([5, 10], [0.5, 0.4])}
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        without.setitem(sys.modules, "matplotlib.figure", None)
        assert curves.draw(tmp_path) is None
        assert "the curves need matplotlib" in refused(curves, [tmp_path], capsys)
    pytest.importorskip("matplotlib")
    with monkeypatch.context() as full:
        full.setattr(curves, "replace_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert curves.draw(tmp_path) is None and "full" in capsys.readouterr().err
    assert curves.draw(tmp_path) == tmp_path / "curves.png"


# ----------------------------------------------------------------------------- figures.py

def test_the_share_of_guided_draws_is_that_of_the_levels_that_are_drawn():
    """The picture computes what losses.draw_sigma draws. Catches another window, another curve, or
    α compared the other way."""
    from losses import draw_sigma, importance_curve
    from tools import figures
    curve, k = importance_curve("official"), torch.ones(20_000)
    for high, low in ((1.0, 0.75), (0.75, 0.0)):
        sigma, probability = figures.window_probability(curve, high, low)
        drawn = draw_sigma(torch.rand(20_000, generator=run.rng(0, "test")), high * k, low * k,
                           curve)
        share = probability[sigma <= 0.94].sum().item()
        assert probability.sum().item() == pytest.approx(1)
        assert share == pytest.approx((drawn <= 0.94).float().mean().item(), abs=0.01)
        assert drawn.max() <= sigma.max() and drawn.min() >= sigma.min()


def test_shares_of_scenes_are_counted_caption_by_caption():
    """On drawn pictures of known scenes. Catches captions and pictures in another order, which
    would mix a collapse away."""
    from tools import figures
    captions = torch.arange(24).repeat_interleave(2)
    template, colour, _ = world.sample_labels(48, run.rng(0, "test"), captions)
    scene = captions % 4
    scene[0] = 3                                          # of caption 0 one picture is at dusk
    shares, entropy = figures.scene_shares(world.draw(template, colour, scene), captions)
    assert shares[0].tolist() == [0.5, 0, 0, 0.5] and shares[6].tolist() == [0, 0, 1, 0]
    assert entropy == pytest.approx(math.log(2) / 24, abs=1e-6)


@pytest.fixture(scope="module")
def few_pictures(finished, finished2, tmp_path_factory):
    """The five pictures of the tests' runs, which are hardly trained, and what was printed."""
    pytest.importorskip("matplotlib")
    from tools import figures
    out, patch = tmp_path_factory.mktemp("pictures"), pytest.MonkeyPatch()
    patch.setattr(figures, "teacher_sigmas", lambda _: sampler.sigma_grid(28)[[0, 3, 20, 28]])
    patch.setattr(figures, "SHOWN", (0, 1, 2))
    real_time = figures.time_paths
    patch.setattr(figures, "time_paths", lambda bench, rows: real_time(bench, rows, 1, 1))
    patch.setattr(figures, "block_changes", functools.partial(figures.block_changes, samples=2))
    runs = ["--stage1", finished, "--plain", finished, "--stage2", finished2,
            "--f-alone", finished2, "--more", finished]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        figures.main([str(word) for word in (*runs, "--samples-per-prompt", "2", "--out", out)])
    patch.undo()
    return out, printed.getvalue()


def test_all_pictures_are_drawn_and_small(few_pictures):
    """Catches a picture that fails after the sampling, and one that is too large for a page."""
    from tools import figures
    out, printed = few_pictures
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{name}.png" for name in figures.PICTURES)
    assert printed.split() == [str(out / f"{name}.png") for name in figures.PICTURES]
    for path in out.iterdir():
        assert 5_000 < path.stat().st_size < 500_000, path.name


def test_the_paths_end_where_the_samplers_end_and_count_what_they_count(
        finished, finished2):
    """The last guess of a path is the sample, and its evaluations are the sampler's. Catches a path
    of its own beside the one that is used, and a guided step that counts as one."""
    from tools import figures
    settings = figures.Settings(stage1=str(finished), stage2=str(finished2))
    bench = figures.Bench(settings)
    noise, prompt = sampler.image_noise(3, [0], (4, 8, 8)), bench.prompts.take([0])
    sigmas = sampler.sigma_grid(28)[[0, 3, 20, 28]]       # 1, 0.96, 0.55, 0
    for w, alpha in ((1.0, 1.0), (4.0, 1.0), (4.0, 0.94)):
        path = figures.teacher_path(bench, noise, prompt, sigmas, w, alpha)
        with torch.no_grad():
            latents, passes = sampler.sample_guided(bench.teacher, noise, prompt,
                                                    bench.prompts.uncond(1), sigmas, w, alpha)
            assert torch.allclose(path[-1][1], bench.decode(latents)[0], atol=1e-4)
        assert path[-1][2] == passes == {1.0: 3, 4.0: 6 if alpha == 1 else 4}[w]
        assert [guided for *_, guided in path] == [w > 1 and s <= alpha for s in sigmas[:-1]]
    student, span, f = bench.run("stage2")
    path = figures.student_path(bench, noise, prompt, student, span, f)
    with torch.no_grad():
        latents, _, _ = sampler.roll_out(student, noise, prompt, bench.two, span, f)
        assert torch.allclose(path[-1][1], bench.decode(latents[-1])[0], atol=1e-4)
    assert [spent for _, _, spent, _ in path] == [1, pytest.approx(5 / 3)]


def test_the_pictures_without_matplotlib_are_one_line(
        finished, tmp_path, monkeypatch, capsys):
    """Before anything is sampled. Catches minutes that end in an ImportError."""
    from tools import figures
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(figures, "Bench", None)
    monkeypatch.chdir(tmp_path)
    error = refused(figures, ["--stage1", finished, "--only", "guidance"], capsys)
    assert error == "error: the pictures need matplotlib: pip install matplotlib"
    assert not list(tmp_path.iterdir())
