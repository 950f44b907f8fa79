"""The pictures of docs/RESULTS.md from the committed students: collapse, guidance, paths, cache.

    python -m tools.figures F_ALONE

F_ALONE is a run of train_stage2.py --init tiny/stage1 --warmup 999999.
Needs matplotlib. Writes into assets/.
"""

import itertools
import sys

import run
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cache import NOTHING, nfe
from losses import GRID, euler, guidance_weight, importance_curve, shift_sigma, x0_from_velocity
from model import Decoder, Prompts, find_preset, load_student, load_transformer, velocity
from sampler import (guided_velocity, image_noise, roll_out, sample_guided, sigma_grid,
                     teacher_sigmas)
from tiny.world import (CAPTIONS, COLOURS, P_USUAL, SCENES, SHAPES, draw, measure, read,
                        sample_labels)

INK, GREY, TEACHER, STUDENT, RED = "#24292f", "#6e7781", "#2e7d32", "#1f5fbf", "#c62828"
SCENE_COLOURS = {"day": "#5aa0e6", "beach": "#e3c07a", "night": "#1b1f3b", "dusk": "#f0795b"}
SHOWN = (0, 2, 4, 6, 9, 14, 18, 22, 25)                   # of the teacher's 28 steps
COMPARED = ("a red circle", "a yellow square", "a blue triangle", "a white cross")
CPU, W, ALPHA, N, SEED = torch.device("cpu"), 4.0, 0.94, 32, 500

preset = find_preset("tiny")
teacher, decode = load_transformer(preset), Decoder(preset, CPU)
prompts = Prompts(preset, CAPTIONS, CPU)
stock, two = teacher_sigmas(preset), sigma_grid(2)
captions = torch.arange(24).repeat_interleave(N)
noises = image_noise(SEED, range(24 * N), (4, 8, 8))


def load(folder):
    return load_student(folder, run.read_settings(folder), preset, CPU)


def figure_of(width, height):
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save(figure, name, dpi=100):
    figure.savefig(f"assets/{name}.png", dpi=dpi, metadata={"Software": None})
    print(name, flush=True)


def show(axes, picture):
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])


@torch.inference_mode()
def pictures(sample):
    made = []
    for part in torch.arange(24 * N).split(128):
        latents = sample(noises[part], prompts.take(captions[part]))
        made.append(decode(latents).clamp(0, 1))
    return torch.cat(made)


def by_teacher(w, alpha):
    return lambda noise, prompt: sample_guided(
        teacher, noise, prompt, prompts.uncond(len(noise)), stock, w, alpha)[0]


def by_student(student, span=None, f=None):
    return lambda noise, prompt: roll_out(student, noise, prompt, two, span, f)[0][-1]


# ------------------------------------------------------------- guidance.png

def draw_guidance():
    figure = figure_of(13, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    for k, axes in enumerate(panels):
        high, low = two[k].item(), two[k + 1].item()
        sigmas = shift_sigma(1 - torch.arange(GRID + 1) / GRID)
        inside = (sigmas <= high + 1e-6) & (sigmas > low + 1e-6)
        weights = importance_curve("official").double() * inside
        sigma, probability = sigmas[inside], (weights / weights.sum())[inside]
        density = probability / -torch.gradient(sigma.double())[0]
        axes.plot(sigma, density, color=INK)
        guided = guidance_weight(sigma, W, ALPHA) != 1
        for side, color, label in ((guided, TEACHER, f"guided, w = {W:g}"),
                                   (~guided, GREY, "not\nguided")):
            if side.any():
                axes.fill_between(sigma[side], density[side], color=color, alpha=0.25, linewidth=0)
                middle = (sigma[side].max() + sigma[side].min()).item() / 2
                axes.text(middle, 0.08 + 0.17 * k,
                          f"{100 * probability[side].sum():.0f} %\n{label}", ha="center",
                          color=INK, size=12, weight="bold",
                          transform=axes.get_xaxis_transform())
        if not guided.all():
            axes.axvline(ALPHA, color=INK)
            axes.text(ALPHA, 0.97, f"α = {ALPHA:g} ", ha="right", va="top", size=12,
                      transform=axes.get_xaxis_transform())
        axes.set(xlim=(low, high), xlabel="level σ up to which the sample is re-noised")
        name = ("step one", "step two")[k]
        axes.set_title(f"{name}: the student goes from σ = {high:g} to {low:g}", weight="bold",
                       loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylim=(0, None), ylabel="how often (density over σ)")
    figure.suptitle("Stage I: at which noise levels do teacher and fake score judge the student, "
                    "and is the teacher guided there?\nGuidance makes pictures right, but alike. "
                    "So it is off above α = 0.94 (paper, Eq. 4).", size=12)
    save(figure, "guidance")


# ------------------------------------------------------------- collapse.png

def draw_collapse():
    labels = sample_labels(24 * N, run.rng(SEED, "data"), captions)
    panels = [("data", "no network", INK, draw(*labels)),
              ("teacher without guidance", "28 evaluations", TEACHER,
               pictures(by_teacher(1.0, 1.0))),
              ("teacher, guided at all levels", "56 evaluations", TEACHER,
               pictures(by_teacher(W, 1.0)))]
    for folder, name, spent in (
            ("tiny/plain", "plain DMD: guided at all levels", "2 evaluations"),
            ("tiny/stage1", "Stage I: guided where σ ≤ 0.94", "2 evaluations"),
            ("tiny/student", "Stage II after it", "1.667 evaluations")):
        panels.append((name, spent, STUDENT, pictures(by_student(*load(folder)))))
    figure = figure_of(13, 7.4)
    places = figure.subplots(2, 3, sharey=True)
    for (label, spent, color, made), axes in zip(panels, places.flat, strict=True):
        scene = read(made)["scene"].reshape(24, N)
        shares = torch.nn.functional.one_hot(scene, 4).float().mean(1)    # 24×4
        entropy = measure(made, captions)["scene_entropy"].mean()
        stack_bars(axes, shares)
        axes.set_title(f"{spent}, entropy {entropy:.2f} nats", size=11, loc="left")
        axes.text(0, 1.105, label, color=color, size=12.5, weight="bold", transform=axes.transAxes)
    for axes in places[:, 0]:
        axes.set_ylabel("share of pictures")
    figure.suptitle(f"Which scene comes behind the shape? A bar is a caption, {N} pictures. Its "
                    "lowest part is the usual scene of its shape;\ndashed is that part's height in "
                    "the data. Good is what looks like the data; one colour is collapse.\n"
                    "Entropy of the scenes: mean over the captions, 1.39 at most.\n", size=12)
    handles = [axes.patches[0].__class__((0, 0), 1, 1, color=color)
               for color in SCENE_COLOURS.values()]
    figure.legend(handles, [f"scene: {name}" for name in SCENES], loc="outside lower center",
                  ncols=4, frameon=False)
    save(figure, "collapse", dpi=90)


def stack_bars(axes, shares):
    places, ticks = [], []
    for c in range(24):
        shape = c // len(COLOURS)
        places.append(c + 1.2 * shape)                    # a gap between the shapes
        bottom = 0.0
        for scene in [shape, *[s for s in range(4) if s != shape]]:
            share = shares[c, scene].item()
            axes.bar(places[-1], share, 0.92, bottom=bottom, color=SCENE_COLOURS[SCENES[scene]],
                     edgecolor="white", linewidth=0.3)
            bottom += share
    for shape in range(4):
        ticks.append(sum(places[6 * shape:6 * shape + 6]) / 6)
    axes.axhline(P_USUAL, color="white", linewidth=2.2)
    axes.axhline(P_USUAL, color=INK, linewidth=1.1, linestyle="--")
    axes.set(ylim=(0, 1), xlim=(places[0] - 1, places[-1] + 1))
    axes.set_xticks(ticks, SHAPES)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------- paths.png

@torch.inference_mode()
def teacher_path(noise, prompt, sigmas, w, alpha):
    path, passes, x = [], 0, noise
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        guided = bool(guidance_weight(sigma, w, alpha) != 1)
        if guided:
            v = guided_velocity(teacher, x, sigma, prompt, prompts.uncond(1), w, alpha)
        else:
            v, _ = velocity(teacher, x, sigma, prompt)
        passes += 1 + guided
        path.append((sigma, decode(x0_from_velocity(x, sigma, v))[0], passes, guided))
        x = euler(x, v, sigma, sigma_next)
    return path


@torch.inference_mode()
def student_path(noise, prompt, student, span, f):
    path, x, delta, spent = [], noise, None, 0
    for sigma, sigma_next in itertools.pairwise(two.tolist()):
        spent += 1 if delta is None else nfe(2, span, 12) - 1
        v, delta = velocity(student, x, sigma, prompt, span, delta, f)
        path.append((sigma, decode(x0_from_velocity(x, sigma, v))[0], spent, False))
        x = euler(x, v, sigma, sigma_next)
    return path


def draw_paths(caption, index, seed):
    noise = image_noise(seed, [index], (4, 8, 8))
    prompt = prompts.take([CAPTIONS.index(caption)])
    rows = []
    for label, w, alpha in (("teacher, no guidance", 1.0, 1.0),
                            (f"teacher, w = {W:g}\nat all levels", W, 1.0),
                            (f"teacher, w = {W:g}\nwhere σ ≤ {ALPHA:g}", W, ALPHA)):
        path = teacher_path(noise, prompt, stock, w, alpha)
        rows.append((label, TEACHER, [path[i] for i in (*SHOWN, -1)]))
    path = teacher_path(noise, prompt, two, 1.0, 1.0)
    rows.append(("teacher, two steps,\nnot distilled", TEACHER, [*path, path[-1]]))
    for label, folder in (("Stage I,\ntwo steps", "tiny/stage1"),
                          ("Stage II,\nblocks skipped", "tiny/student")):
        path = student_path(noise, prompt, *load(folder))
        rows.append((label, STUDENT, [*path, path[-1]]))
    levels = [round(stock[i].item(), 2) for i in SHOWN]
    figure = figure_of(1.12 * len(SHOWN) + 3.2, 1.36 * len(rows) + 0.9)
    grid = figure.subplots(len(rows), len(SHOWN) + 2,
                           gridspec_kw={"width_ratios": [1.5, *[1] * len(SHOWN), 1.15]})
    for (label, color, path), line in zip(rows, grid, strict=True):
        for axes in line:
            axes.axis("off")
        line[0].text(1, 0.5, label, ha="right", va="center", color=color, size=11,
                     transform=line[0].transAxes)
        for sigma, picture, spent, guided in path[:-1]:
            column = min(range(len(levels)), key=lambda i: abs(levels[i] - sigma))
            axes = line[column + 1]
            show(axes, picture)
            axes.axis("on")
            axes.set_xlabel(f"{spent:.4g}" + " · w" * guided, size=9, labelpad=3)
        _, picture, spent, _ = path[-1]
        show(line[-1], picture)
        line[-1].axis("on")
        line[-1].spines[:].set(color=color, linewidth=3)
        line[-1].set_xlabel(f"{spent:.4g} evaluations", size=9, weight="bold", color=color)
    for level, axes in zip(levels, grid[0][1:], strict=False):
        axes.set_title(f"σ = {level:g}", size=10)
    grid[0][-1].set_title("result", size=10, weight="bold")
    figure.suptitle(f"“{caption}” from one noise: what each network guesses the picture to be "
                    "(x̂0), step by step\nbelow: network evaluations spent so far; · w: this step "
                    "is guided, which doubles its cost", size=12)
    above = sum(level > ALPHA for level in levels)
    figure.draw_without_rendering()                       # only now the fields have their places
    left, right = grid[0][above].get_position(), grid[0][above + 1].get_position()
    x, bottom = (left.x1 + right.x0) / 2, grid[-1][0].get_position().y0
    figure.add_artist(Line2D([x, x], [bottom, left.y1], color=GREY, linestyle="--"))
    figure.text(x, bottom, f"α = {ALPHA:g}", ha="center", va="top", color=GREY, size=10)
    save(figure, "paths")


# ------------------------------------------------------------- cache.png

@torch.no_grad()
def block_changes(student, samples=48):
    """{"image", "text"}: Σ|residual in step two − in step one| ÷ Σ|in step one| of each block."""
    x0 = image_noise(7, range(samples), (4, 8, 8))
    prompt = prompts.take(torch.arange(samples) % 24)
    x1 = roll_out(student, x0, prompt, two[:2])[0][1]
    changes = {"image": [], "text": []}
    for i in range(11):                                   # the last block returns no text
        _, before = velocity(student, x0, 1.0, prompt, span=(i, i))
        _, later = velocity(student, x1, 0.75, prompt, span=(i, i))
        for stream, one, other in zip(changes, before, later, strict=True):
            changes[stream].append(((other - one).abs().sum() / one.abs().sum()).item())
    return changes


def draw_cache(f_alone):
    one, _, _ = load("tiny/stage1")
    trained, span, f = load("tiny/student")
    alone, _, f_of_alone = load(f_alone)
    columns = (("all blocks\nrun", one, None, None), ("blocks\nskipped", one, span, NOTHING),
               ("Δ0 reused\nas it is", one, span, None),
               ("f trained\nalone", alone, span, f_of_alone),
               ("student and f\ntrained", trained, span, f))
    figure = figure_of(13.4, 5.4)
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    axes = left.subplots()
    for (stream, change), style, color in zip(block_changes(one).items(), ("o-", "s--"),
                                              (STUDENT, GREY), strict=True):
        axes.plot(change, style, color=color, label=f"{stream} stream")
    axes.axvspan(span[0] - 0.5, span[1] + 0.5, color=RED, alpha=0.13,
                 label=f"skipped in step two: {span[0]}–{span[1]}")
    axes.set(xlabel="block (of 0 to 11; the last one is never skipped)", xticks=range(11),
             ylim=(0, None), ylabel="Σ|step two − step one| ÷ Σ|step one|\n"
             "(0: a block adds the same again; 1: the change is as large)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    left.suptitle("How much does what a block adds\nchange from step one to step two?", size=12)
    grid = right.subplots(4, 5)
    for j, (label, *path) in enumerate(columns):
        made = pictures(by_student(*path))
        found = measure(made, captions)
        grid[0][j].set_title(label, color=STUDENT if j else INK, size=10)
        for i, caption in enumerate(COMPARED):
            show(grid[i][j], made[CAPTIONS.index(caption) * N])
        grid[-1][j].set_xlabel(f"{100 * found['right'].mean():.0f} % right\n"
                               f"{found['scene_entropy'].mean():.2f} nats", size=10)
    for i, caption in enumerate(COMPARED):
        grid[i][0].set_ylabel(caption.removeprefix("a ").replace(" ", "\n"), size=9)
    right.suptitle("Step two without blocks 1–4: 1.667 evaluations, with them 2\n(from the same "
                   f"noises; below: how many of {24 * N} are right,\nand the entropy of their "
                   "scenes)", size=11)
    save(figure, "cache")


if __name__ == "__main__":
    draw_guidance()
    draw_paths("a blue triangle", 45, 300)
    draw_cache(sys.argv[1])
    draw_collapse()
