"""The tools, the experiments and the documents: what a reader copies from a page works, and what a
tool says of numbers is what the numbers say."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run
from run import parse_settings

import torch

import model
from tiny.world import CAPTIONS
from tools import benchmark, claims, exercise, find_span

HERE = Path(__file__).resolve().parent.parent


# ================================================================== tools

def rows(variants):
    """Rows of results.json for the runs of two training seeds, all captions alike. variants are
    {name: (accuracy, entropy, distance)}."""
    found = []
    for seed in ("1", "2"):
        for name, (accuracy, entropy, distance) in variants.items():
            found.append({"name": claims.row_name(name, seed, "runs"), "nfe_blocks": 2.0,
                          "frechet_to_teacher": distance,
                          "by_prompt": {"right": 24 * [accuracy], "scene_entropy": 24 * [entropy],
                                        "read_error": 24 * [0.05], "speckled": 24 * [0.1]}})
    return found


def test_a_claim_is_judged_by_its_interval():
    """Catches a verdict from the mean alone, and a difference with its sign turned."""
    one, plain = claims.EXPERIMENTS["1"][1][:2]
    measured = rows({one: (0.9, 0.8, 0.4), plain: (0.95, 0.2, 0.9)})
    text = claims.report("1", measured, ["1", "2"], "runs")
    assert text.count("**holds**") == 1 and text.count("**does not hold**") == 1
    assert "-5.0" in text and "0.25" in text
    a = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    value, low, high = claims.interval(a, "−", 0 * a)
    assert value == 0.5 and low < 0.25 and high > 0.75
    collapsed = rows({one: (0.9, 0.0, 0.4), plain: (0.9, 0.0, 0.9)})
    text = claims.report("1", collapsed, ["1", "2"], "runs")
    assert "nan" not in text and "**not decided**" in text


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


def test_the_span_that_is_proposed_has_the_smallest_error(finished, tmp_path, monkeypatch, capsys):
    """Catches a width that does not give the wanted evaluations, the largest error, and other
    prompts than the run's."""
    folder, texts = tmp_path / "run", []
    shutil.copytree(finished, folder)
    (tmp_path / "prompts.txt").write_text("a red cross")
    run.write_json(folder / "settings.json", run.read_settings(finished) | {
        "prompts": str(tmp_path / "prompts.txt")})

    class Seen(model.Prompts):
        def __init__(self, preset, chosen, device):
            texts.extend(chosen)
            super().__init__(preset, chosen, device)

    monkeypatch.setattr(find_span, "Prompts", Seen)
    find_span.main(["--checkpoint", str(folder), "--samples", "2", "--nfe", "1.75"])
    assert texts == 2 * ["a red cross"]
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
    assert exercise.judge(number, tmp_path / "folder") is None
    for ours, theirs in MISTAKES[number]:
        assert ours in solution, ours
        path.write_text(solution.replace(ours, theirs))
        line = exercise.judge(number, tmp_path / "folder")
        assert line and line.startswith("FAILED") and "\n" not in line, (ours, line)


# ================================================================== experiments and lecture

EXPERIMENTS = HERE / "docs" / "experiments"


@pytest.mark.parametrize("diff", sorted(EXPERIMENTS.glob("*.diff")), ids=lambda path: path.stem)
def test_every_diff_of_the_experiments_applies_and_goes_back(diff, tmp_path):
    """Catches a diff that has rotted because the file under it was changed."""
    for file in re.findall(r"^\+\+\+ b/(\S+)", diff.read_text(), re.M):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / file, tmp_path / file)
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    for words in (["init", "-q"], ["apply", diff], ["apply", "-R", "--check", diff]):
        subprocess.run(["git", *words], cwd=tmp_path, env=env, check=True)


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
