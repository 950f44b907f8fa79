"""The tools, the experiments and the documents: what a reader copies from a page works, and what a
tool says of numbers is what the numbers say."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from run import parse_settings

import torch

import cache
import model
import sampler
from tiny.world import CAPTIONS
from tools import benchmark, claims, exercise, find_span

HERE = Path(__file__).resolve().parent.parent


# ================================================================== tools

def rows(accuracy, entropy, distance):
    """Rows of results.json for the runs of two training seeds: all captions alike."""
    found = []
    for seed in ("1", "2"):
        for variant in accuracy:
            found.append({"name": claims.row_name(variant, seed, "runs"), "nfe_blocks": 2.0,
                          "frechet_to_teacher": distance[variant],
                          "by_prompt": {"right": 24 * [accuracy[variant]],
                                        "scene_entropy": 24 * [entropy[variant]],
                                        "read_error": 24 * [0.05], "speckled": 24 * [0.1]}})
    return found


def test_a_claim_is_judged_by_its_interval():
    """Catches a verdict from the mean alone, and a difference with its sign turned."""
    one, plain = claims.EXPERIMENTS["1"][1][:2]
    text = claims.report("1", rows({one: 0.9, plain: 0.95}, {one: 0.8, plain: 0.2},
                                   {one: 0.4, plain: 0.9}), ["1", "2"], "runs")
    assert text.count("**holds**") == 1 and text.count("**does not hold**") == 1
    assert "-5.0" in text and "0.25" in text
    a = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    value, low, high = claims.interval(a, "−", 0 * a)
    assert value == 0.5 and low < 0.25 and high > 0.75
    collapsed = claims.report("1", rows({one: 0.9, plain: 0.9}, {one: 0.0, plain: 0.0},
                                        {one: 0.4, plain: 0.9}), ["1", "2"], "runs")
    assert "nan" not in collapsed and "**not decided**" in collapsed


def test_a_class_pools_its_results(tmp_path, capsys):
    """Catches rows of two names in one mean."""
    for i, right in enumerate((0.9, 0.96)):
        rows = [{"name": name, "right": right - less, "scene_entropy": 0.8,
                 "frechet_to_teacher": None} for name, less in (("a", 0), ("b", 0.5))]
        (tmp_path / f"{i}.json").write_text(json.dumps({"rows": rows}))
    claims.main(["--pool", *map(str, tmp_path.glob("*.json"))])
    text = capsys.readouterr().out
    assert "| a | 2 | 0.930 ± 0.042 | 0.800 ± 0.000 |  |" in text and "| b | 2 | 0.430" in text


def test_the_commands_of_the_claims_are_commands(capsys):
    """Each is parsed by its script. Catches an option that is gone, and Stage II before Stage I."""
    claims.main(["--dry-run", "--only", *claims.EXPERIMENTS])
    lines = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    for script, *words in lines:
        parse_settings(importlib.import_module(script[:-3]).Settings, words, script, "")
    scripts = [script for script, *_ in lines]
    assert scripts == sorted(scripts, key=["train_stage1.py", "train_stage2.py",
                                           "evaluate.py"].index)


def test_the_span_that_is_proposed_has_the_smallest_error(finished, capsys):
    """Catches a width that does not give the wanted evaluations, and the largest error."""
    find_span.main(["--checkpoint", str(finished), "--samples", "2", "--nfe", "1.75"])
    text = capsys.readouterr().out
    spans = re.findall(r"(\d+)-(\d+) +([\d.]+)(.*)", text.split("spans of")[1])
    assert len(spans) == 9 and all(int(m) - int(n) == 2 for n, m, _, _ in spans)
    best = min(spans, key=lambda span: float(span[2]))
    assert "proposed" in best[3] and text.count("<- proposed") == 1


def test_the_benchmark_compares_in_one_run(capsys):
    """Catches a path that was renamed. The seconds themselves are no matter of a test."""
    benchmark.main(["--rounds", "1"])
    text = capsys.readouterr().out
    assert "1.667" in text and "28×2" in text


def test_links_between_the_pages_lead_somewhere():
    """Catches a file or a heading that was renamed, in README.md and docs/."""
    pages = [HERE / "README.md", *(HERE / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
                assert anchor in slugs, f"{page.name}: {link}"


# ================================================================== exercises

# Three plausible mistakes for each exercise: what ours says, and what somebody might write.
MISTAKES = {
    1: [("return shrink * x +", "return x +"), ("- (a * shrink) ** 2", "- a ** 2"),
        ("variance.sqrt() * noise", "variance * noise")],
    2: [("<= alpha, w, 1.0", "< alpha, w, 1.0"), ("<= alpha, w, 1.0", "> alpha, w, 1.0"),
        ("<= alpha, w, 1.0", "<= alpha, w, 0.0")],
    3: [("grid <= high[:, None] + 1e-6", "grid < high[:, None] - 1e-6"),
        ("grid > low[:, None] + 1e-6", "grid >= low[:, None] - 1e-6"),
        ("weights.double() * inside", "inside.double()")],
    4: [("p + p_teacher - p_fake", "p - p_teacher + p_fake"),
        ("(p - p_teacher).abs().mean((1, 2, 3), keepdim=True)", "(p - p_teacher).abs().mean()"),
        ("with torch.no_grad():", "with torch.enable_grad():")],
    5: [("(x - x0) / to_shape", "(x0 - x) / to_shape"), ("/ to_shape(sigma, x)", ""),
        ("F.mse_loss", "F.l1_loss")],
    6: [("euler(x, v_teacher, sigma, sigma_end)", "euler(x, v_teacher, sigma, 0 * sigma)"),
        ("renoise(p, sigma_end, sigma,", "renoise(p, 0 * sigma, sigma,"),
        ("velocity(fake_score, x, sigma, prompt)\n        p_t", "velocity(fake_score, x, sigma, "
         "uncond)\n        p_t")],
    7: [("nn.init.zeros_(self.down.weight)", "nn.init.normal_(self.down.weight)"),
        ("2 * width", "4 * width"), ("return x + self.down(", "return self.down(")],
    8: [("(image - image_in).detach()", "image - image_in"), ("(image - image_in)", "image"),
        ("if i == first:", "if i == first and not reuse:")],
    9: [("euler(x, v, sigma, sigma_next)", "euler(x, v, sigma, 0.0)"),
        ("v, delta = velocity", "v, _ = velocity"),
        ("prompt, span, delta, f)", "prompt, span, delta)")],
    10: [("== 0:\n        return \"g", "== 1:\n        return \"g"), ("i >= D_ONLY and ", ""),
         ("== 0:\n        return \"g", "!= 0:\n        return \"g")],
}


def verdict(number, folder):
    """What the exercise's check says, in a fork of this process: it replaces the modules."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)                          # a pool's threads are not forked
        theirs.send(exercise.judge(number, folder))
    fork = multiprocessing.get_context("fork").Process(target=child)
    fork.start()
    assert ours.poll(120), "the check hangs"
    return ours.recv()


# All together they take minutes.
@pytest.mark.parametrize("number", [pytest.param(
    number, marks=pytest.mark.slow if number in (1, 4) else pytest.mark.minutes)
    for number in MISTAKES])
def test_an_exercise_is_solved_by_our_code_and_by_no_mistake(number, tmp_path):
    """Catches a check that lets a plausible mistake pass, and one that asks for our very lines."""
    path = tmp_path / "folder" / exercise.EXERCISES[number - 1].file
    exercise.hand_out(number, tmp_path / "folder")
    assert "raise NotImplementedError" in path.read_text()
    solution = (HERE / path.name).read_text()
    path.write_text(solution)
    assert verdict(number, tmp_path / "folder") is None
    for ours, theirs in MISTAKES[number]:
        assert ours in solution, ours
        path.write_text(solution.replace(ours, theirs))
        line = verdict(number, tmp_path / "folder")
        assert line and line.startswith("not so: ") and "\n" not in line, (ours, line)


# ================================================================== experiments and lecture

EXPERIMENTS = HERE / "docs" / "experiments"


def patched(name, folder):
    """The (first) file that NAME.diff changes, changed, in a folder that is its own repository."""
    diff = str(EXPERIMENTS / f"{name}.diff")
    files = re.findall(r"^\+\+\+ b/(\S+)", Path(diff).read_text(), re.M)
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / file, folder / file)
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    for words in (["init", "-q"], ["apply", diff], ["apply", "-R", "--check", diff]):
        subprocess.run(["git", *words], cwd=folder, env=env, check=True)
    return folder / files[0]


def loaded(path):
    """A changed file as a module; the project's other modules stay as they are."""
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(path.read_text(), path.name, "exec"), vars(module))
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in EXPERIMENTS.glob("*.diff")))
def test_every_diff_of_the_experiments_applies_and_goes_back(name, tmp_path):
    """Catches a diff that has rotted because the file under it was changed."""
    patched(name, tmp_path)


def test_the_commands_and_files_of_the_experiments_are_there():
    """Catches an option that is gone, a file that nobody is told of, a diff that stays applied."""
    text = (HERE / "docs" / "EXPERIMENTS.md").read_text().replace("\\\n", " ")
    assert set(re.findall(r"docs/experiments/([\w.]+)", text)) == set(os.listdir(EXPERIMENTS))
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        assert block.count("git apply docs") == len(re.findall("git (?:apply -R|checkout)", block))
        for line in re.findall(r"^python (\w+\.py.*)", block, re.M):
            script, *words = line.split()
            parse_settings(importlib.import_module(script[:-3]).Settings, words, script, "")
    assert model.read_prompts(EXPERIMENTS / "circles.txt") == CAPTIONS[:6]
    mixed = model.read_prompts(EXPERIMENTS / "mixed.txt")
    assert len({caption.split()[-1] for caption in mixed}) == 4 and {*mixed} < {*CAPTIONS}
    assert model.read_prompts(EXPERIMENTS / "23_captions.txt") == CAPTIONS[:22] + CAPTIONS[23:]


def test_the_diffs_of_the_losses_do_what_the_page_says(tmp_path):
    """Guidance at levels on both sides of each bound."""
    sigma = torch.tensor([1.0, 0.98, 0.979, 0.95, 0.94, 0.8, 0.75, 0.5, 0.1])
    for name, on in {"interval": "000011000", "upside_down": "111100000",
                     "preshift": "001111111"}.items():
        weight = loaded(patched(name, tmp_path)).guidance_weight(sigma, 4.0, 0.94)
        assert weight.tolist() == [4.0 if one == "1" else 1.0 for one in on], name


def test_half_the_side_gives_a_whole_velocity(tmp_path):
    """A network that guesses 3 everywhere, from noise of deviation 1. Catches tokens in the wrong
    places, and noise that the mean has made weaker."""
    halved = loaded(patched("half_side", tmp_path))
    tokens = torch.arange(4.0).reshape(1, 4, 1)

    def guesses(net, x, *_):
        assert x.shape == (1, 4, 4, 4) and 0.7 < x.std() < 1.3
        return x - 3, (tokens, "text")
    halved.velocity = guesses
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    v, (image, text) = halved.half_side(None, x, 1.0, None)
    assert torch.allclose(x - v, torch.full_like(x, 3.0)) and text == "text"
    assert image.flatten().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


@torch.no_grad()
def test_the_diffs_of_the_cache_do_what_the_page_says(tmp_path, teacher, prompts, monkeypatch):
    """One stream of f alone, a linear f, Δ0 of the neighbour; and a residual for each block is the
    span's up to rounding."""
    f, delta = cache.make_compensation(8), (torch.randn(3, 4, 8), torch.randn(3, 2, 8))
    for one in f.values():
        torch.nn.init.normal_(one.down.weight)
    image, text = cache.apply_compensation(f, delta)
    for name, wanted in {"f_image_only": (image, delta[1]), "f_text_only": (delta[0], text),
                         "borrowed": (image.roll(1, 0), text.roll(1, 0))}.items():
        found = loaded(patched(name, tmp_path)).apply_compensation(f, delta)
        assert all(map(torch.allclose, found, wanted)), name
    f, forward = f["image"], loaded(patched("f_linear", tmp_path)).Compensation.forward
    assert torch.allclose(forward(f, image), image + f.down(f.up(f.norm(image))))
    noise, prompt = sampler.image_noise(0, [0, 1], (4, 8, 8)), prompts.take([3, 9])
    each_block = loaded(patched("each_block", tmp_path)).CachedSD3.forward
    samples = []
    for forward in (type(teacher).forward, each_block):
        monkeypatch.setattr(type(teacher), "forward", forward)
        latents, *_ = sampler.roll_out(teacher, noise, prompt, sampler.sigma_grid(2), (1, 4))
        samples.append(latents[-1])
    assert 0 < torch.dist(*samples) < 1e-3


def test_the_diffs_of_the_references_do_what_the_page_says(tmp_path, prompts):
    """The guidance of the teacher that makes them."""
    for name, wanted in {"references_guided": (4, 1), "references_unguided": (1, 1)}.items():
        stage2, seen = loaded(patched(name, tmp_path)), []
        stage2.sample_guided = lambda *words, w=4, alpha=1: seen.append((w, alpha)) or words[1:3]
        stage1 = {"latent_shape": [3, 8, 8], "guidance": 4, "alpha": 0.94}
        stage2.make_references(stage2.Settings(references=2), model.PRESETS["tiny"], stage1,
                               prompts, torch.tensor([0, 1]), decode=torch.clone)
        assert seen == [wanted]


@pytest.mark.slow
@torch.random.fork_rng(devices=[])
def test_the_lecture_runs_and_prints_what_is_committed(monkeypatch):
    """Catches a change that breaks the lecture. Numbers are left out: last digits differ."""
    namespace, pyplot = {}, pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.chdir(HERE / "docs")                      # where jupyter starts it
    monkeypatch.setattr(sys, "path", list(sys.path))      # its first cell adds to it
    for cell in json.loads(Path("walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
            wanted = "".join("".join(one.get("text", "")) for one in cell["outputs"])
            number = re.compile(r"-?\d[\d.]*(e[-+]\d+)?")
            assert number.sub("#", output.getvalue()).split() == number.sub("#", wanted).split()
    pyplot.close("all")
