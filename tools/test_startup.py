"""The numbers of tools/startup.py on a stand-in of 10 M parameters, where they can be counted.

    python -m pytest -q tools/test_startup.py

Names are sentences; a docstring says which mistake the test would catch.
"""

from pathlib import Path

import pytest
import torch

import run  # noqa: F401  first, as in every script: it silences what the others import

import model
from tools import startup

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux"),
    pytest.mark.slow]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A pipeline folder of SD3's layout: four blocks of width 256."""
    folder = tmp_path_factory.mktemp("startup") / "stand-in"
    startup.write_stand_in(folder, width=256, blocks=4)
    return folder


def test_both_ways_encode_the_same_prompts(stand_in, tmp_path, monkeypatch):
    """In batches of one and of 16; the encoders are read three times, once, and not at all. Catches
    a benchmark whose ways do different work."""
    reads, load = [], model.load_pipeline
    monkeypatch.setattr(model, "load_pipeline", lambda *a, **k: reads.append(a) or load(*a, **k))
    preset = model.find_preset(str(stand_in))
    texts = model.default_prompts(preset)[:4]
    embeds, pooled = startup.encode_one_by_one(preset, [*texts, ""], CPU, again=2)
    assert len(reads) == 3, "five prompts, two at a time"
    for _ in range(2):
        new = model.Prompts(preset, texts, CPU, tmp_path)
        assert len(reads) == 4
        assert embeds.shape == new.embeds.shape == (5, 333, 256)
        assert torch.allclose(embeds, new.embeds, atol=1e-5)
        assert torch.allclose(pooled, new.pooled, atol=1e-5)
    assert not torch.allclose(embeds[0], embeds[1], atol=1e-2), "prompts that can be told apart"


def test_a_checkpoint_is_written_once_and_read_by_the_old_way_alone(stand_in, tmp_path):
    """Stage I's student, fake score and their optimisers: 24 bytes a parameter, and the step
    counts. Catches parts that are left out, a hash from the file, parts that are held together."""
    preset = model.find_preset(str(stand_in))
    t, size = startup.compare_checkpoints(preset, CPU, tmp_path, rounds=1)
    net = model.load_transformer(preset)
    learn = sum(parameter.numel() for parameter in net.parameters())
    fixed = sum(buffer.numel() for buffer in net.buffers())
    counts = len(list(net.parameters()))
    assert size * 1e6 == 2 * (12 * learn + 4 * fixed + 4 * counts)
    for way in t.values():                                # names, shapes and the hashes join them
        assert size < way["written"] < size + 0.3
    assert t["old"]["read"] == pytest.approx(t["old"]["written"], abs=0.1)
    assert t["new"]["read"] < 0.1
    # Two networks of one unit, two optimisers of two units: six at once, or two.
    assert t["old"]["memory"] == pytest.approx(size, rel=0.1)
    assert t["new"]["memory"] == pytest.approx(size / 3, rel=0.2)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_both_ways_and_their_quotient(stand_in, capsys):
    """Catches rows that do not fit a page, and a second process that holds a whole network."""
    startup.main(["--model", str(stand_in), "--pool", "2", "--again", "2", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:52].strip(): [float(word) for word in line[52:].split()] for line in lines[2:10]}
    assert len(rows) == 8 and all(len(line) <= 100 for line in lines[1:])
    for old, new, ratio in rows.values():
        assert ratio == pytest.approx(new / old, rel=0.05, abs=0.01)
    assert rows["prompts a second, in later runs"][2] > 3
    assert rows["checkpoint: MB read"][2] < 0.01
    old, new, _ = rows["memory of the second process, in networks"]
    assert 0.4 < new < 1 < old
    assert "read the encoders 2 times for 3 prompts" in lines[-1]
