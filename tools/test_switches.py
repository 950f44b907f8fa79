"""What is not the recipe but can be switched on: other numbers of steps, no cache, no f, LoRA, all
options of Stage I, less memory, compiled blocks.

    python -m pytest -q tools/test_switches.py
"""

import itertools

import pytest

import run  # noqa: F401  first, as in every script: it silences what the others import
import torch

import model
import sampler
import train_stage1
import train_stage2
from test_all import (PINNED1, PINNED2, SHAPE, SMALL, STAGE2, TINY, any_net, ask, assert_close,
                      inputs, metrics, recipe, record, record2, references_of, stock_net,
                      trained_compensation, weights)

# ================================================================== steps, references, cache, f

@pytest.fixture(scope="session")
def four_steps(tmp_path_factory):
    """A Stage I run of four steps."""
    out = tmp_path_factory.mktemp("four") / "steps"
    record(train_stage1, [*SMALL, "--steps", "4", "--iterations", "1", "--out", str(out)])
    return out


def test_a_stage_one_run_with_more_steps_can_make_the_references(stage2, finished, four_steps,
                                                                 prompts, decode, tmp_path):
    """[official] Its own path in its own steps, without guidance. Catches a guided student."""
    turns = record2([*STAGE2, "--init", str(finished), "--reference", str(four_steps),
                     "--iterations", "2", "--out", str(tmp_path / "run")])
    assert [turn["learners"] for turn in turns] == [["compensation"], ["discriminator"]]
    net, x, prompt = stock_net(weights(four_steps)), stage2.noise(range(8)), stage2.chosen
    with torch.no_grad():
        for sigma, sigma_next in itertools.pairwise((1, 0.9, 0.75, 0.5, 0)):
            x = x + (sigma_next - sigma) * ask(net, x, sigma, prompts.take(prompt))
        expected = 255 * decode(x).clamp(0, 1)
    assert (references_of(tmp_path / "run") - expected).abs().max() < 0.6
    with pytest.raises(SystemExit):                       # the other way round: no better pictures
        train_stage2.main(["--init", str(four_steps), "--reference", str(finished)])


def test_a_student_of_four_steps_takes_stage_two_and_reuses_three_times(four_steps, finished2):
    """Not the paper's matter, but it runs: 1 + 3·8/12 evaluations. Catches a loop written for two
    steps."""
    out = finished2.parent / "four"
    turn, = record2([*STAGE2, "--init", str(four_steps), "--iterations", "1", "--out", str(out)])
    assert turn["gradients"]["compensation"] and recipe(out)["nfe"] == 3
    assert recipe(out)["sigmas"] == [1.0, 0.9, 0.75, 0.5, 0.0]


@pytest.mark.parametrize("words, skipped, count", [
    (["--cached-blocks", "none"], set(), 2.0), (["--no-compensation"], set("1234"), 1.6667)])
def test_stage_two_without_cache_or_without_f_trains_the_student_from_the_start(
        words, skipped, count, finished, finished2):
    """The paper's "SFD", and plain reuse. Catches a warm-up of an f that is not there, blocks that
    are skipped nevertheless, and an f that is saved."""
    out = finished2.parent / words[0]
    turn, _ = record2([*STAGE2, "--init", str(finished), *words, "--iterations", "2",
                       "--out", str(out)])
    assert turn["learners"] == ["student"] and "compensation" not in turn["weights"]
    reached = {name.split(".")[1] for name in turn["gradients"]["student"]
               if "transformer_blocks" in name}
    assert reached == {str(i) for i in range(12)} - skipped
    assert recipe(out)["nfe"] == count and not (out / "compensation.safetensors").exists()
    _, span, f = sampler.load_student(out, TINY, sampler.read_recipe(out), "cpu")
    assert span == ((1, 4) if skipped else None) and f is None


@pytest.mark.parametrize("options", [
    ["--steps", "4", "--alpha", "1.0", "--resolution", "24", "--importance", "paper"],
    ["--steps", "1", "--form", "x0", "--importance", "uniform", "--loss", "official"]])
def test_every_switch_of_stage_one_trains(options, tmp_path):
    """Two iterations each. Catches a switch that only the settings know."""
    turns = record(train_stage1, [*SMALL, "--iterations", "2", *options,
                                  "--out", str(tmp_path / "run")])
    assert len(turns) == 4 and recipe(tmp_path / "run")["iteration"] == 2
    assert all(line["grad_norm_student"] > 0 for line in metrics(tmp_path / "run"))


# ================================================================== LoRA, less memory, speed

def test_lora_is_merged_into_a_stock_folder(finished, finished2, prompts):
    """The saved student without adapters gives the velocity that the trained one with adapters had.
    Catches a scale that must be guessed, and LoRA weights lost on saving."""
    pytest.importorskip("peft")
    out, found, save = finished2.parent / "lora", [], train_stage2.save_transformer
    x, prompt = sampler.image_noise(0, range(2), SHAPE), prompts.take([0, 1])

    def spy(net, *others):
        with torch.no_grad():
            found.append(model.velocity(net, x, 1.0, prompt))
        save(net, *others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage2, "save_transformer", spy)
        turns = record2([*STAGE2, "--init", str(finished), "--lora-rank", "2", "--warmup", "0",
                         "--student-lr", "1e-2", "--iterations", "1", "--out", str(out)])
    assert {name.split(".")[-3] for name in turns[0]["gradients"]["student"]} == {"lora_A",
                                                                                "lora_B"}
    with torch.no_grad():
        merged = ask(stock_net(weights(out)), x, 1.0, prompt)
        before = ask(stock_net(weights(finished)), x, 1.0, prompt)
    assert torch.allclose(merged, found[0], atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-3)


SAVING = ["--accumulation", "2", "--gradient-checkpointing"]


def test_saving_memory_changes_no_gradient(turns1, tmp_path):
    """Fake score's and student's. Catches a sum of micro-batches in the place of their mean."""
    turns = record(train_stage1, [*PINNED1, "--iterations", "1", *SAVING,
                                  "--out", str(tmp_path / "run")])
    assert len(turns) == 2
    for plain, saving in zip(turns1, turns, strict=False):
        assert_close(saving["clipped"], plain["clipped"], 1e-2)


def test_saving_memory_changes_no_gradient_of_stage_two(stage2, finished):
    """G's and D's. Catches spectral norms that advance once for each micro-batch."""
    turns = record2([*PINNED2, "--iterations", "2", "--init", str(finished), *SAVING,
                     "--out", str(stage2.folder.parent / "saving")])
    for plain, saving in zip(stage2.turns, turns, strict=False):
        assert_close(saving["clipped"], plain["clipped"])


def test_compiled_blocks_take_the_cached_path():
    """torch.compile is applied to blocks. Catches a cache that is traced into them, or lost."""
    net = any_net("sd3.5-medium")
    f, (x, prompt), sigmas = trained_compensation(net), inputs(net), sampler.sigma_grid(2)
    found = []
    for compiled in (False, True):
        if compiled:
            for block in net.transformer_blocks:
                block.forward = torch.compile(block.forward, dynamic=False, backend="eager")
        with torch.no_grad():
            full = sampler.roll_out(net, x, prompt, sigmas)[0][-1]
            cached = sampler.roll_out(net, x, prompt, sigmas, (1, 2), f)[0][-1]
        found.append((full, cached))
    assert not torch.allclose(*found[0], atol=1e-3)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def pixels(path):
    from PIL import Image
    return torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).int()


def test_the_batch_size_changes_no_picture(finished2, tmp_path, capsys):
    """Noise belongs to an image, not to its batch. The same run without its cache gives another
    picture, and says so."""
    words = ["--checkpoint", str(finished2), "--prompt", "a red circle", "--num-images", "4"]
    for name, more in (("a", ["--batch-size", "4"]), ("b", ["--batch-size", "1"]),
                       ("c", ["--no-cache"])):
        sampler.main([*words, "--out", str(tmp_path / f"{name}.png"), *more])
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert (a - b).abs().max() <= 1 and (a - c).abs().max() > 1
    out = capsys.readouterr().out
    assert "1.667 network evaluations" in out and "2 network evaluations" in out
