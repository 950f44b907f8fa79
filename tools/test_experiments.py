"""Tests of docs/EXPERIMENTS.md: each of its diffs still applies and does what the page says of it.

    python -m pytest -q tools/test_experiments.py

Nothing is trained, and the files of the tree are not touched: a diff is applied to a copy of the
one file that it changes. Names are sentences; a docstring says which mistake the test would catch.
"""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

# First, as in every script: it silences what the others import.
from tools.settings import UserError, parse_settings

import cache
import model
from tools.prompt_files import read_prompts

HERE = Path(model.__file__).parent
FOLDER = HERE / "docs" / "experiments"
TEXT = (HERE / "docs" / "EXPERIMENTS.md").read_text()
DIFFS = sorted(path.stem for path in FOLDER.glob("*.diff"))
LONGEST = 15                              # lines that a diff may add, and that it may remove


def changed_file(name):
    """The path, in the tree, of the one file that a diff changes."""
    files = re.findall(r"^\+\+\+ b/(\S+)", (FOLDER / f"{name}.diff").read_text(), re.M)
    assert len(files) == 1, f"{name}.diff changes {files}"
    return files[0]


def patched(name, folder):
    """The file that a diff changes, copied into the folder and changed."""
    # A repository of its own, or git would take the folder for a part of one around it, and skip
    # the diff without a word. A hook's GIT_DIR would have the same effect.
    assert shutil.which("git"), "these tests apply diffs with git"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*words):
        return subprocess.run(["git", *map(str, words)], cwd=folder, env=environment, text=True,
                              capture_output=True)
    path = changed_file(name)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / path, folder / path)
    assert git("init", "-q").returncode == 0
    done = git("apply", FOLDER / f"{name}.diff")
    assert done.returncode == 0, f"{name}.diff does not apply any more: {done.stderr}"
    assert (folder / path).read_text() != (HERE / path).read_text()
    return folder / path


def load(name, folder):
    """The changed file as a module; the project's other modules stay as they are."""
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", patched(name, folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------- page and files

@pytest.mark.parametrize("name", DIFFS)
def test_every_diff_applies_is_short_and_leaves_a_file_that_compiles(name, tmp_path):
    """Catches a diff that has rotted because the file under it was changed."""
    lines = (FOLDER / f"{name}.diff").read_text().splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    assert 1 <= len(added) <= LONGEST and len(removed) <= LONGEST
    assert all(len(line) <= 101 for line in added), "a line of the tree has at most 100 columns"
    path = patched(name, tmp_path)
    compile(path.read_text(), str(path), "exec")


def test_the_page_names_every_file_of_its_folder_and_no_other():
    """Catches a diff that nobody is told of, and one that is recommended but not there."""
    named = set(re.findall(r"docs/experiments/([\w.]+)", TEXT))
    assert named == {path.name for path in FOLDER.iterdir()}
    assert len(DIFFS) >= 10


def test_every_experiment_has_its_question_its_command_and_its_folded_answer():
    """Ten of them, each with what a student needs; catches an answer that is not folded away."""
    head, *parts = re.split(r"^## (?=\d+\. )", TEXT, flags=re.M)
    assert [int(part.split(".")[0]) for part in parts] == list(range(1, len(parts) + 1))
    assert len(parts) >= 10 and TEXT.splitlines()[2].startswith("This page is for")
    for part in parts:
        title, answer = part.split("\n", 1)[0], part.split("<details>")
        assert title.endswith("?"), f"{title}: the title is no question"
        assert "*What do you expect?*" in answer[0], title
        assert "```\n" in answer[0] and re.search(r"\d+ minutes?", answer[0]), title
        assert len(answer) == 2 and "| --- |" in answer[1] and "</details>" in answer[1], title


def test_every_command_of_the_page_is_one_that_its_script_takes():
    """Catches an option that is gone but still recommended, and a script that has moved."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", TEXT, re.M | re.S))
    lines = [line for line in blocks.splitlines() if line.strip()]
    assert len(lines) > 25
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:2] == ["git", "apply"]:
            assert (HERE / words[-1]).exists() and words[2:-1] in ([], ["-R"]), line
            continue
        assert words[0] == "python" and (HERE / words[1]).exists(), line
        script = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        try:
            settings = parse_settings(script.Settings, words[2:], words[1], "")
        except UserError as error:
            pytest.fail(f"{line}: {error}")
        if getattr(settings, "prompts", None):
            assert read_prompts(HERE / settings.prompts)


def test_every_diff_is_taken_back_where_it_is_applied():
    """Catches a page that leaves its reader with a changed tree at the next experiment."""
    blocks = re.findall(r"^```\n(.*?)^```", TEXT, re.M | re.S)
    for block in blocks:
        applied = re.findall(r"^git apply (docs\S+)", block, re.M)
        assert applied == re.findall(r"^git apply -R (docs\S+)", block, re.M), block
    assert {Path(path).stem for block in blocks
            for path in re.findall(r"^git apply (docs\S+)", block, re.M)} == set(DIFFS)


def test_the_pictures_of_the_page_are_there_and_small():
    """At most four, of at most 100 kB each."""
    pictures = re.findall(r"!\[[^\]]+\]\(\.\./(assets/[\w.]+)\)", TEXT)
    assert len(pictures) <= 4
    for picture in pictures:
        assert (HERE / picture).stat().st_size <= 100_000, picture


# ----------------------------------------------------------------------------- what the diffs do

def test_the_changed_guidance_rules_are_those_of_the_page(tmp_path):
    """At levels on both sides of each bound; the bounds themselves as in Eq. 4, inclusive."""
    sigma = torch.tensor([1.0, 0.98, 0.979, 0.95, 0.94, 0.8, 0.75, 0.5, 0.1])
    guided = {"interval": [0, 0, 0, 0, 1, 1, 0, 0, 0],
              "upside_down": [1, 1, 1, 1, 0, 0, 0, 0, 0],
              "preshift": [0, 0, 1, 1, 1, 1, 1, 1, 1]}
    for name, on in guided.items():
        (tmp_path / name).mkdir()
        weight = load(name, tmp_path / name).guidance_weight
        assert torch.equal(weight(sigma, 4.0, 0.94), torch.tensor([4.0 if i else 1.0 for i in on]))
        assert weight(0.8, 4.0, 0.94) == (1 if name == "upside_down" else 4)    # a number, too


def test_the_hinge_is_the_one_of_the_books(tmp_path):
    """By hand: D pays below 1 for references and above −1 for pictures, G has no bound."""
    hinge = load("hinge", tmp_path)
    reference, picture = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 1.0]])
    assert hinge.discriminator_loss([reference], [picture]) == pytest.approx(0.25 + 1.0)
    assert hinge.generator_loss([picture, picture]) == pytest.approx(2.0)


def test_the_changed_compensations_change_what_they_say(tmp_path):
    """One stream alone, the linear f, and Δ0 of the neighbour."""
    torch.manual_seed(0)
    f, delta = cache.make_compensation(8), (torch.randn(3, 4, 8), torch.randn(3, 2, 8))
    for stream in f.values():
        torch.nn.init.normal_(stream.down.weight)
    both = cache.apply_compensation(f, delta)
    for name, own in (("f_image_only", 0), ("f_text_only", 1)):
        (tmp_path / name).mkdir()
        one = load(name, tmp_path / name).apply_compensation(f, delta)
        assert torch.equal(one[own], both[own]) and torch.equal(one[1 - own], delta[1 - own])
    (tmp_path / "borrowed").mkdir()
    borrowed = load("borrowed", tmp_path / "borrowed").apply_compensation
    assert torch.equal(borrowed(None, delta)[0][1], delta[0][0])
    assert torch.equal(borrowed(f, delta)[1][0], both[1][2])
    # Linear: behind the norm, scaling the input's W1 scales what f adds.
    (tmp_path / "f_linear").mkdir()
    linear = load("f_linear", tmp_path / "f_linear").Compensation(8)
    torch.nn.init.normal_(linear.down.weight)
    torch.nn.init.zeros_(linear.up.bias)
    x = torch.randn(1, 2, 8)
    added = linear(x) - x
    linear.up.weight.data *= -2
    assert torch.allclose(linear(x) - x, -2 * added, atol=1e-5)


@torch.no_grad()
def test_each_block_reused_for_itself_is_the_whole_span_reused(tmp_path):
    """The two forwards, on a small random network: equal up to rounding while every block of the
    span is skipped, another picture when every second one is. Catches a diff that skips nothing."""
    torch.manual_seed(0)
    net = cache.CachedSD3(sample_size=8, patch_size=2, in_channels=4, num_layers=6,
                          attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
                          caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
                          pos_embed_max_size=8).eval()
    x, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16), torch.randn(2, 16)
    span, one, two = (1, 4), torch.full((2,), 1000.0), torch.full((2,), 750.0)

    def second_step(forward):
        _, delta = forward(net, x, text, pooled, one, span)
        return forward(net, 0.9 * x, text, pooled, two, span, delta)[0]
    path = patched("each_block", tmp_path)
    whole, full = second_step(cache.CachedSD3.forward), net(0.9 * x, text, pooled, two)[0]
    module = load("each_block", tmp_path)
    assert torch.allclose(second_step(module.CachedSD3.forward), whole, atol=1e-4)
    assert not torch.allclose(full, whole, atol=1e-3)
    # The page: 1 becomes 2, and every second block of the span is run.
    source = path.read_text()
    assert source.count("range(first, last + 1, 1)") == 1
    path.write_text(source.replace("range(first, last + 1, 1)", "range(first, last + 1, 2)"))
    spec = importlib.util.spec_from_file_location("every_second", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not torch.allclose(second_step(module.CachedSD3.forward), whole, atol=1e-3)


def test_the_prompt_files_leave_out_what_the_page_says():
    """23 captions without the purple cross, and the six circles."""
    from tiny.world import CAPTIONS
    assert read_prompts(FOLDER / "23_captions.txt") == [caption for caption in CAPTIONS
                                                        if caption != "a purple cross"]
    assert read_prompts(FOLDER / "circles.txt") == [caption for caption in CAPTIONS
                                                    if caption.endswith("circle")]
