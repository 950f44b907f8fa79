"""The pictures of docs/PICTURES.md: the method at work in the miniature world. Needs matplotlib.

    python -m tools.figures                       # all five, into assets/
    python -m tools.figures --only guidance paths --out /tmp/pictures

    paths.png      one noise on its way to a picture: what each network guesses at each step
    collapse.png   which scenes come for a caption: the paper's first claim
    guidance.png   where the student is judged, and where the judge is guided
    cache.png      what each block changes between the steps, and what stands in for the span
    cost.png       network evaluations, seconds and accuracy

Nothing is trained here. The runs are made by these commands; a picture asks for those it shows:

    python train_stage1.py
    python train_stage1.py --alpha 1 --out runs/tiny-plain
    python train_stage2.py
    python train_stage2.py --warmup 999999 --out runs/tiny-f-alone

Dimension key: B batch, C latent channels, H W latent size. Pictures [B, 3, 32, 32] lie in [0, 1].
"""

import dataclasses
import itertools
from pathlib import Path

from tools.settings import UserError, command, option, parse_settings
from run import replace_file, rng

import torch

from cache import NOTHING, nfe
from losses import GRID, euler, guidance_weight, importance_curve, shift_sigma, x0_from_velocity
from model import Decoder, Prompts, find_preset, load_transformer, pick_device, velocity
from sampler import (TEACHER_STEPS, cached_velocity, guided_velocity, image_noise, load_scheduler,
                     load_student, read_recipe, roll_out, sample_guided, sigma_grid,
                     teacher_sigmas)
from tiny.world import (CAPTIONS, COLOURS, P_USUAL, SCENES, SHAPES, draw, measure, read,
                        sample_labels, scene_entropy)
from tools import find_span
from tools.benchmark import alternate

PICTURES = ("paths", "collapse", "guidance", "cache", "cost")
# How to make a run that is missing.
MAKE = {"stage1": "python train_stage1.py --out {}",
        "plain": "python train_stage1.py --alpha 1 --out {}",
        "stage2": "python train_stage2.py --out {}",
        "f_alone": "python train_stage2.py --warmup 999999 --out {}"}
# Which runs a picture shows: whoever wants one picture need not train for the others.
NEEDS = {"paths": ("stage1", "stage2"), "collapse": ("stage1", "plain", "stage2"),
         "guidance": ("stage1",), "cache": ("stage1", "stage2", "f_alone"),
         "cost": ("stage1", "stage2")}


@dataclasses.dataclass
class Settings:
    only: list = option(None, "which pictures (default: all)", choices=PICTURES)
    stage1: str = option("runs/tiny-stage1", "run of Stage I")
    plain: str = option("runs/tiny-plain", "run of Stage I with guidance everywhere, plain DMD")
    stage2: str = option("runs/tiny-stage2", "run of Stage II")
    f_alone: str = option("runs/tiny-f-alone", "run of Stage II whose warm-up never ends")
    more: list = option(None, "further runs for cost.png, for instance one of four steps")
    samples_per_prompt: int = option(16, "samples of each of the 24 captions", low=2, high=1024)
    seed: int = option(300, "of the start noises; not the training's", low=0, high=2**31 - 1)
    caption: str = option("a blue triangle", "caption of paths.png", choices=tuple(CAPTIONS))
    noise: int = option(45, "which of the noises paths.png starts from", low=0, high=2**31 - 1)
    out: str = option("assets", "folder of the pictures")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


# One colour for each kind of network in all pictures, as in assets/method.svg.
# Green is a teacher, blue a student; red is what is taken away or put in its place.
INK, GREY, TEACHER, STUDENT, RED = "#24292f", "#6e7781", "#2e7d32", "#1f5fbf", "#c62828"
# Near the scenes' own skies and grounds (tiny.world), but far enough apart for thin bars.
SCENE_COLOURS = {"day": "#5aa0e6", "beach": "#e3c07a", "night": "#1b1f3b", "dusk": "#f0795b"}


# ================================================================== what is drawn from

class Bench:
    """The miniature's teacher, decoder and captions, and its runs, each loaded once."""

    def __init__(self, settings):
        self.settings, self.preset = settings, find_preset("tiny")
        self.device = pick_device(self.preset, settings.device)
        # α and w are those that the Stage I run was trained with, not today's defaults.
        self.recipe = read_recipe(settings.stage1)
        self.alpha, self.w = self.recipe["alpha"], self.recipe["guidance"]
        self.prompts = Prompts(self.preset, CAPTIONS, self.device)
        self.teacher = load_transformer(self.preset).to(self.device)
        self.decode = Decoder(self.preset, self.device)
        self.stock = teacher_sigmas(load_scheduler(self.preset))          # the teacher's 28 steps
        self.two = sigma_grid(2)                                          # 1, 0.75, 0
        self.runs, self.sampled = {}, {}                  # both by name, filled when asked for

    def run(self, name):
        """(student, span or None, f or None) of the run that an option names."""
        if name not in self.runs:
            folder = getattr(self.settings, name)
            self.runs[name] = load_student(folder, self.preset, read_recipe(folder), self.device)
        return self.runs[name]

    def noises(self, n):
        """(noise [24·n, C, H, W], prompt, captions [24·n]): n of each caption, the same noises for
        every network."""
        # Caption by caption: picture i has caption i ÷ n. All measuring below relies on it.
        captions = torch.arange(len(CAPTIONS)).repeat_interleave(n)
        noise = image_noise(self.settings.seed, range(len(captions)), self.recipe["latent_shape"])
        return noise.to(self.device), self.prompts.take(captions), captions

    @torch.inference_mode()
    def pictures(self, name, sample):
        """Pictures [24·n, 3, 32, 32] of sample(noise, prompt) → latents. What has a name is made
        once: collapse.png and cost.png share the teacher's."""
        if name not in self.sampled:
            noise, prompt, _ = self.noises(self.settings.samples_per_prompt)
            # In parts, so that thousands of samples need no more memory than one part.
            made = []
            for part in torch.arange(len(noise)).split(64):
                latents = sample(noise[part], (prompt[0][part], prompt[1][part]))
                made.append(self.decode(latents).clamp(0, 1).cpu())
            self.sampled[name] = torch.cat(made)
        return self.sampled[name]

    def by_teacher(self, w, sigmas, alpha=1.0):
        """A sampler for pictures(): the teacher with guidance w along sigmas."""
        def sample(noise, prompt):
            # The empty prompt, once for each sample of the part.
            uncond = self.prompts.uncond(len(noise))
            return sample_guided(self.teacher, noise, prompt, uncond, sigmas, w, alpha)[0]
        return sample

    def by_student(self, student, span=None, f=None, sigmas=None):
        """A sampler for pictures(): a student's steps, by default two."""
        sigmas = self.two if sigmas is None else sigmas
        return lambda noise, prompt: roll_out(student, noise, prompt, sigmas, span, f)[0][-1]


def check_runs(settings, chosen):
    """UserError, with the command that makes it, for a run that a chosen picture shows and that is
    not there, or that belongs to another base model, stage or number of steps."""
    # dict.fromkeys keeps the order and drops what comes twice.
    for name in dict.fromkeys(name for picture in chosen for name in NEEDS[picture]):
        folder = getattr(settings, name)
        if not (Path(folder) / "distill.json").exists():
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: there is no run {folder}; {MAKE[name].format(folder)} "
                            "makes it")
        # A run of another kind would give a picture whose title lies.
        recipe = read_recipe(folder)
        stage = 1 if name in ("stage1", "plain") else 2
        if (recipe["base"], recipe["steps"], recipe["stage"]) != ("tiny", 2, stage):
            raise UserError(f"{folder} is no run of Stage {stage} of the miniature with two steps")
        if stage == 2 and not recipe.get("cached_blocks"):
            raise UserError(f"{folder} has no cache; the pictures show one")
    for folder in settings.more or []:
        if read_recipe(folder)["base"] != "tiny":
            raise UserError(f"--more {folder} is no run of the miniature")


def figure_of(width, height):
    """An empty matplotlib Figure, in inches; UserError where matplotlib is missing."""
    # Imported where it is used: nothing else in this project needs it. A Figure without pyplot
    # keeps no state and needs no screen.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the pictures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save(figure, folder, name, dpi=100):
    """Writes a figure as PNG, whole or not at all, and says so."""
    path = Path(folder) / f"{name}.png"
    # No date and no version inside: drawing the same again gives the same file.
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi,
                                                        metadata={"Software": None}))
    print(path)


def show_picture(axes, picture):
    """A picture [3, H, W] without axis, its pixels not smoothed."""
    # 32 pixels a side. Smoothed they would look better than the networks make them.
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])


# ================================================================== paths.png

# Dense where the scene is decided, sparse where only edges change.
SHOWN = (0, 2, 4, 6, 9, 14, 18, 22, 25)                   # of 28 steps; 14 is σ = 0.74


@torch.inference_mode()
def teacher_path(bench, noise, prompt, sigmas, w, alpha):
    """[(σ, decoded x̂0 [3, H, W], network evaluations so far, guided?)] of every step of the
    teacher."""
    path, passes, x = [], 0, noise
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        # As sampler.sample_guided does it, which keeps no guesses on its way.
        guided = bool(guidance_weight(sigma, w, alpha) != 1)
        if guided:
            v = guided_velocity(bench.teacher, x, sigma, prompt, bench.prompts.uncond(1), w, alpha)
        else:
            v = velocity(bench.teacher, x, sigma, prompt)
        passes += 1 + guided                              # guidance doubles an evaluation
        # x̂0 is where the velocity points to from here; x itself is still mostly noise.
        path.append((sigma, bench.decode(x0_from_velocity(x, sigma, v))[0], passes, guided))
        x = euler(x, v, sigma, sigma_next)
    return path


@torch.inference_mode()
def student_path(bench, noise, prompt, student, span, f):
    """The same of a student's two steps, the second one without the span."""
    path, x, delta, spent = [], noise, None, 0
    blocks = len(student.transformer_blocks)
    for sigma, sigma_next in itertools.pairwise(bench.two.tolist()):
        # Step one records Δ0 and costs a full evaluation; step two costs what is left of one.
        cost = nfe(2, span, blocks) - 1 if delta is not None else 1
        v, delta = cached_velocity(student, x, sigma, prompt, span, delta, f)
        spent += cost
        path.append((sigma, bench.decode(x0_from_velocity(x, sigma, v))[0], spent, False))
        x = euler(x, v, sigma, sigma_next)
    return path


def path_rows(bench, caption, noise):
    """[(label, colour, path)] of paths.png: three teachers, one in a hurry, two students. The
    last of a path is the result."""
    settings = bench.settings
    # The noise is drawn as for every other picture, by its index alone.
    noise = image_noise(settings.seed, [noise], bench.recipe["latent_shape"]).to(bench.device)
    prompt = bench.prompts.take([CAPTIONS.index(caption)])
    rows = []
    # Three teachers that differ in their guidance alone.
    for label, w, alpha in (("teacher, no guidance", 1.0, 1.0),
                            (f"teacher, w = {bench.w:g}\nat all levels", bench.w, 1.0),
                            (f"teacher, w = {bench.w:g}\nwhere σ ≤ {bench.alpha:g}", bench.w,
                             bench.alpha)):
        path = teacher_path(bench, noise, prompt, bench.stock, w, alpha)
        rows.append((label, TEACHER, [path[i] for i in (*SHOWN, -1)]))
    # The same network in as few steps as the student, so that the gain is the distillation's.
    two = teacher_path(bench, noise, prompt, bench.two, 1.0, 1.0)
    # The guess of the second of two steps is the result.
    rows.append(("teacher, two steps,\nnot distilled", TEACHER, [*two, two[-1]]))
    one, _, _ = bench.run("stage1")
    path = student_path(bench, noise, prompt, one, None, None)
    rows.append(("Stage I,\ntwo steps", STUDENT, [*path, path[-1]]))
    # With its span skipped and f in its place: exactly what the finished method does.
    path = student_path(bench, noise, prompt, *bench.run("stage2"))
    rows.append(("Stage II,\nblocks skipped", STUDENT, [*path, path[-1]]))
    return rows


def draw_paths(bench):
    """paths.png: a row for each network, a column for each noise level, then the results."""
    settings = bench.settings
    rows = path_rows(bench, settings.caption, settings.noise)
    # The columns are noise levels, not step numbers: only so the rows can be compared downwards.
    levels = [round(bench.stock[i].item(), 2) for i in SHOWN]
    figure = figure_of(1.12 * len(SHOWN) + 3.2, 1.36 * len(rows) + 0.9)
    grid = figure.subplots(len(rows), len(SHOWN) + 2,
                           gridspec_kw={"width_ratios": [1.5, *[1] * len(SHOWN), 1.15]})
    for (label, color, path), line in zip(rows, grid, strict=True):
        # Most fields of the students' rows stay empty: these steps they do not take.
        for axes in line:
            axes.axis("off")
        line[0].text(1, 0.5, label, ha="right", va="center", color=color, size=11,
                     transform=line[0].transAxes)
        for sigma, picture, spent, guided in path[:-1]:
            # A student's two steps stand where the teacher has the same noise level.
            column = min(range(len(levels)), key=lambda i: abs(levels[i] - sigma))
            axes = line[column + 1]                       # field 0 holds the row's name
            show_picture(axes, picture.cpu())
            axes.axis("on")
            axes.set_xlabel(f"{spent:.4g}" + " · w" * guided, size=9, labelpad=3)
        _, picture, spent, _ = path[-1]
        show_picture(line[-1], picture.cpu())
        line[-1].axis("on")
        line[-1].spines[:].set(color=color, linewidth=3)
        line[-1].set_xlabel(f"{spent:.4g} evaluations", size=9, color=color, weight="bold")
    for level, axes in zip(levels, grid[0][1:], strict=False):
        axes.set_title(f"σ = {level:g}", size=10)
    grid[0][-1].set_title("result", size=10, weight="bold")
    figure.suptitle(f"“{settings.caption}” from one noise: what each network guesses the picture "
                    "to be (x̂0), step by step\nbelow: network evaluations spent so far; "
                    "· w: this step is guided, which doubles its cost", size=12)
    mark_alpha(figure, grid, levels, bench.alpha)
    save(figure, settings.out, "paths")


def mark_alpha(figure, grid, levels, alpha):
    """A line between the columns above and below α."""
    from matplotlib.lines import Line2D
    above = sum(level > alpha for level in levels)
    if not 0 < above < len(levels):
        return
    figure.draw_without_rendering()                       # only now the fields have their places
    left, right = grid[0][above].get_position(), grid[0][above + 1].get_position()
    x, bottom = (left.x1 + right.x0) / 2, grid[-1][0].get_position().y0
    figure.add_artist(Line2D([x, x], [bottom, left.y1], color=GREY, linestyle="--"))
    figure.text(x, bottom, f"α = {alpha:g}", ha="center", va="top", color=GREY, size=10)


# ================================================================== collapse.png

def scene_shares(pictures, captions):
    """(share of the four scenes for each caption [24, 4], mean entropy in nats) of pictures."""
    # The exact reader's answer, without a network; the scene is read whatever the shape is like.
    scene = read(pictures)["scene"]
    by_caption = torch.stack([scene[captions == c] for c in range(len(CAPTIONS))])       # 24×n
    shares = torch.nn.functional.one_hot(by_caption, len(SCENES)).float().mean(1)        # 24×4
    return shares, scene_entropy(by_caption).mean().item()


def draw_collapse(bench):
    """collapse.png: a panel for each network, a bar for each caption."""
    n, w = bench.settings.samples_per_prompt, bench.w
    captions = torch.arange(len(CAPTIONS)).repeat_interleave(n)
    # What a perfect model would show with so few pictures a caption: not the world's own 1.18 nats.
    data = draw(*sample_labels(len(captions), rng(bench.settings.seed, "data"), captions))
    panels = [("data", None, INK, data)]
    for name, label, count, guidance in (("unguided", "teacher without guidance", 28, 1.0),
                                         ("guided", "teacher, guided at all levels", 56, w)):
        # Named, since cost.png asks for the guided teacher's pictures again: 56 passes each.
        panels.append((label, count, TEACHER,
                       bench.pictures(name, bench.by_teacher(guidance, bench.stock))))
    for name, label in (("plain", "plain DMD: guided at all levels"),
                        ("stage1", f"Stage I: guided where σ ≤ {bench.alpha:g}"),
                        ("stage2", "Stage II after it")):
        student, span, f = bench.run(name)
        count = nfe(2, span, len(student.transformer_blocks)) if span else 2
        panels.append((label, count, STUDENT,
                       bench.pictures(name, bench.by_student(student, span, f))))

    # Above the teachers and the data, below the students: read each column downwards or across.
    figure = figure_of(13, 7.4)
    places = figure.subplots(2, 3, sharey=True)
    for (label, count, color, pictures), axes in zip(panels, places.flat, strict=True):
        shares, entropy = scene_shares(pictures, captions)
        stack_bars(axes, shares)
        spent = f"{count:.4g} evaluations, " if count else "no network, "
        axes.set_title(f"{spent}entropy {entropy:.2f} nats", size=11, loc="left")
        axes.text(0, 1.105, label, color=color, size=12.5, weight="bold",
                  transform=axes.transAxes)
    for axes in places[:, 0]:
        axes.set_ylabel("share of pictures")
    figure.suptitle(f"Which scene comes behind the shape? A bar is a caption, {n} pictures. Its "
                    "lowest part is the usual scene of its shape;\ndashed is that part's height in "
                    "the data. Good is what looks like the data; one colour is collapse.\n"
                    "Entropy of the scenes: mean over the captions, 1.39 at most.\n", size=12)
    # One legend for all, under the panels.
    handles = [axes.patches[0].__class__((0, 0), 1, 1, color=color)
               for color in SCENE_COLOURS.values()]
    figure.legend(handles, [f"scene: {name}" for name in SCENES], loc="outside lower center",
                  ncols=4, frameon=False)
    save(figure, bench.settings.out, "collapse", dpi=90)


def stack_bars(axes, shares):
    """Stacked bars of shares [24, 4], a bar for each caption, the usual scene at the bottom."""
    places, ticks = [], []
    for c in range(len(CAPTIONS)):
        shape = c // len(COLOURS)
        x = c + 1.2 * shape                               # a gap between the shapes
        places.append(x)
        bottom = 0.0
        # Scene i is the usual one of shape i (tiny.world). It comes first, so that the height of
        # the lowest part is the share of the usual scene, and a full bar of it is a collapse.
        for scene in [shape, *[s for s in range(len(SCENES)) if s != shape]]:
            share = shares[c, scene].item()
            axes.bar(x, share, 0.92, bottom, color=SCENE_COLOURS[SCENES[scene]],
                     edgecolor="white", linewidth=0.3)
            bottom += share
    per_shape = len(COLOURS)
    for shape in range(len(SHAPES)):
        ticks.append(sum(places[shape * per_shape:(shape + 1) * per_shape]) / per_shape)
    # White under black: the line shows on dark bars and between them.
    axes.axhline(P_USUAL, color="white", linewidth=2.2)
    axes.axhline(P_USUAL, color=INK, linewidth=1.1, linestyle="--")
    axes.set(ylim=(0, 1), xlim=(places[0] - 1, places[-1] + 1))
    axes.set_xticks(ticks, SHAPES)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)


# ================================================================== guidance.png

def window_probability(weights, high, low):
    """(σ [n], probability [n]) of the levels of one window, from the largest σ down: what
    losses.draw_sigma draws from, computed instead of drawn."""
    sigmas = shift_sigma(1 - torch.arange(GRID + 1) / GRID)               # 1001, falling from 1
    inside = (sigmas <= high + 1e-6) & (sigmas > low + 1e-6)
    # Within a window the weights are scaled to 1: they decide inside a step, not between steps.
    weights = weights.double() * inside
    return sigmas[inside], (weights / weights.sum())[inside]


def draw_guidance(bench):
    """guidance.png: density of the re-noise levels in the two windows; α and its two sides."""
    figure = figure_of(13, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    for k, axes in enumerate(panels):
        # Step k is judged between the level it starts from and the one it ends at.
        high, low = bench.two[k].item(), bench.two[k + 1].item()
        sigma, probability = window_probability(importance_curve("official"), high, low)
        # The grid is even in u, not in σ: density over σ is probability ÷ distance in σ.
        density = probability / -torch.gradient(sigma.double())[0]
        axes.plot(sigma, density, color=INK)
        # Where the curve is not in the way of the words.
        fill_sides(axes, sigma, probability, density, bench, height=0.08 + 0.17 * k)
        axes.set(xlim=(low, high), xlabel="noise level σ to which the student's sample is brought")
        axes.set_title(f"step {k + 1} of 2: the student goes from σ = {high:g} to {low:g}",
                       weight="bold", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylim=(0, None), ylabel="how often (density over σ)")
    figure.suptitle("Stage I: at which noise levels do teacher and fake score judge the student, "
                    "and is the teacher guided there?\nGuidance makes pictures right, but alike. "
                    f"So it is off above α = {bench.alpha:g} (paper, Eq. 4), where layouts are "
                    "decided.", size=12)
    save(figure, bench.settings.out, "guidance")


def fill_sides(axes, sigma, probability, density, bench, height):
    """Fills a window's density on both sides of α and writes, at a height from 0 to 1, how much of
    the draws is there."""
    # The rule itself is asked, not α: whoever changes guidance_weight sees it here.
    guided = guidance_weight(sigma, bench.w, bench.alpha) != 1
    for side, color, label in ((guided, TEACHER, f"guided, w = {bench.w:g}"),
                               (~guided, GREY, "not\nguided")):
        if side.any():
            axes.fill_between(sigma[side], density[side], color=color, alpha=0.25, linewidth=0)
            share = probability[side].sum().item()
            middle = (sigma[side].max() + sigma[side].min()).item() / 2
            axes.text(middle, height, f"{100 * share:.0f} %\n{label}", ha="center", color=INK,
                      size=12, weight="bold", transform=axes.get_xaxis_transform())
    # In the second window α lies outside: nothing to mark.
    if guided.any() and not guided.all():
        axes.axvline(bench.alpha, color=INK)
        axes.text(bench.alpha, 0.97, f"α = {bench.alpha:g} ", ha="right", va="top", size=12,
                  transform=axes.get_xaxis_transform())


# ================================================================== cache.png

# Each shape once, and colours that stand out from every scene.
COMPARED = ("a red circle", "a yellow square", "a blue triangle", "a white cross")


def block_changes(bench, samples=48):
    """{"image": [12], "text": [11]}: change of each block's residual from step one to step two,
    relative to its size (tools/find_span.py, --error l1)."""
    student, span, _ = bench.run("stage1")
    # Of Stage I's student, which never met a cache. The span (1, 4) is asked for only because
    # measure() wants one; its error is not drawn.
    settings = find_span.Settings(samples=samples, batch_size=16, seed=7, error="l1")
    chosen = torch.arange(samples) % len(CAPTIONS)
    prompts = Prompts(bench.preset, [CAPTIONS[c] for c in chosen.tolist()], bench.device)
    return find_span.measure(student, prompts, [(1, 4)], settings, bench.recipe["latent_shape"],
                             bench.two)


def draw_cache(bench):
    """cache.png: left the blocks, right the same pictures with what can stand in for the span."""
    # The first four columns have the same student. Only the last one was trained with its cache,
    # so its pictures differ from the others in more than what stands in for the span.
    one, _, _ = bench.run("stage1")
    alone, _, f_alone = bench.run("f_alone")
    two, span, f = bench.run("stage2")
    columns = (("all blocks\nrun", "full", one, None, None),
               ("blocks\nskipped", "skipped", one, span, NOTHING),
               ("Δ0 reused\nas it is", "reused", one, span, None),
               ("f trained\nalone", "f_alone", alone, span, f_alone),
               ("student and f\ntrained", "stage2", two, span, f))
    figure = figure_of(13.4, 5.4)
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    draw_blocks(left.subplots(), block_changes(bench), span)
    grid = right.subplots(len(COMPARED), len(columns))
    n = bench.settings.samples_per_prompt
    captions = torch.arange(len(CAPTIONS)).repeat_interleave(n)
    for j, (label, name, *path) in enumerate(columns):
        # Counted over all captions; four pictures are too few to judge by.
        pictures = bench.pictures(name if name != "full" else "stage1", bench.by_student(*path))
        measured = measure(pictures, captions)
        correct, entropy = measured["correct"].mean(), measured["scene_entropy"].mean()
        grid[0][j].set_title(label, color=STUDENT if j else INK, size=10)
        for i, caption in enumerate(COMPARED):
            show_picture(grid[i][j], pictures[CAPTIONS.index(caption) * n])
        grid[-1][j].set_xlabel(f"{100 * correct:.0f} % right\n{entropy:.2f} nats", size=10)
        grid[0][j].spines[:].set(linewidth=0.8)
    for i, caption in enumerate(COMPARED):
        grid[i][0].set_ylabel(caption.removeprefix("a ").replace(" ", "\n"), size=9)
    right.suptitle(f"Step two without blocks {span[0]}–{span[1]}: {nfe(2, span, 12):.4g} "
                   "evaluations, with them 2\n(from the same noises; below: how many of "
                   f"{len(captions)} are right,\nand the entropy of their scenes; two points are "
                   "chance)",
                   size=11)
    left.suptitle("How much does what a block adds\nchange from step one to step two?", size=12)
    save(figure, bench.settings.out, "cache")


def draw_blocks(axes, changes, span):
    """The change of each block's residual between the steps, the span shaded."""
    # The last block returns no text, so the text stream has a point less.
    for stream, marker, color in (("image", "o-", STUDENT), ("text", "s--", GREY)):
        axes.plot(changes[stream], marker, color=color, label=f"{stream} stream")
    axes.axvspan(span[0] - 0.5, span[1] + 0.5, color=RED, alpha=0.13,
                 label=f"skipped in step two: {span[0]}–{span[1]}")
    axes.set(xlabel="block", xticks=range(len(changes["image"])), ylim=(0, None),
             ylabel="Σ|step two − step one| ÷ Σ|step one|\n"
                    "(0: a block adds the same again; 1: the change is as large)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


# ================================================================== cost.png

def cost_paths(bench):
    """[(label, name, evaluations, trained for it?, sampler, colour)] of cost.png, dear to cheap."""
    one, _, _ = bench.run("stage1")
    two, span, f = bench.run("stage2")
    blocks = len(one.transformer_blocks)
    # "Trained for it": the teacher was trained for many steps, so 28 × 2 is its own.
    rows = [("teacher, guided at all levels, 28 × 2", "guided", 56.0, True,
             bench.by_teacher(bench.w, bench.stock), TEACHER),
            ("teacher, 4 steps, not distilled", "four", 4.0, False,
             bench.by_teacher(1.0, sigma_grid(4)), TEACHER),
            ("teacher, 2 steps, not distilled", "undistilled", 2.0, False,
             bench.by_teacher(1.0, bench.two), TEACHER),
            ("Stage I, 2 steps", "stage1", 2.0, True, bench.by_student(one), STUDENT),
            (f"Stage II, blocks {span[0]}–{span[1]} by f", "stage2", nfe(2, span, blocks), True,
             bench.by_student(two, span, f), STUDENT)]
    # What a narrower and a wider span would cost, without another training.
    for other in ((1, 3), (1, 4), (1, 6)):
        rows.append((f"Stage I, blocks {other[0]}–{other[1]} reused", f"reused {other}",
                     nfe(2, other, blocks), False, bench.by_student(one, other), STUDENT))
    # Runs that were really trained for another number of steps or another span.
    for folder in bench.settings.more or []:
        recipe = read_recipe(folder)
        student, of_run, its_f = load_student(folder, bench.preset, recipe, bench.device)
        sample = bench.by_student(student, of_run, its_f, sigma_grid(recipe["steps"]))
        label = f"Stage II, blocks {of_run[0]}–{of_run[1]} by f" if its_f else Path(folder).name
        rows.append((label, folder, recipe["nfe"], True, sample, STUDENT))
    return sorted(rows, key=lambda row: -row[2])


def time_paths(bench, rows, size=8, rounds=25):
    """Seconds of each path relative to one full forward of the same batch, {name: ratio}; taken in
    turn, because on a shared machine only such times compare."""
    # A few samples at once, as whoever makes pictures would do; of one alone the overhead counts.
    noise, prompt, _ = bench.noises(1)
    noise, prompt = noise[:size], (prompt[0][:size], prompt[1][:size])
    uncond = bench.prompts.uncond(size)
    calls = {"one": lambda: velocity(bench.teacher, noise, 0.75, prompt)}
    for _, name, _, _, sample, _ in rows:
        # sample=sample: each call keeps its own path, not the loop's last one.
        calls[name] = lambda sample=sample: sample(noise, prompt)
    # Of the guided teacher one step: its 28 are alike, and many short rounds beat a few long ones.
    calls["guided"] = lambda: guided_velocity(bench.teacher, noise, 0.75, prompt, uncond, bench.w,
                                              1.0)
    with torch.inference_mode():
        seconds = alternate(calls, rounds, bench.device)
    seconds["guided"] *= TEACHER_STEPS
    return {name: seconds[name] / seconds["one"] for name in calls}


def draw_cost(bench):
    """cost.png: evaluations and seconds, accuracy, entropy; filled is trained for its point."""
    rows, n = cost_paths(bench), bench.settings.samples_per_prompt
    seconds = time_paths(bench, rows)
    captions = torch.arange(len(CAPTIONS)).repeat_interleave(n)
    figure = figure_of(13, 4.8)
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[1.25, 1, 0.8])
    # A row is one way to a picture: left what it costs, then what it is worth.
    for y, (_, name, count, trained, sample, color) in enumerate(rows):
        dot = {"marker": "o", "markersize": 9, "markeredgewidth": 2, "color": color,
               "markerfacecolor": color if trained else "white"}
        left.plot(count, y, "|", color=INK, markersize=20, markeredgewidth=2)
        left.plot(seconds[name], y, **dot)
        left.text(max(seconds[name], count) * 1.35, y, f"{count:.4g} evaluations", va="center",
                  size=9.5)
        measured = measure(bench.pictures(name, sample), captions)
        for axes, values, digits in ((middle, measured["correct"].reshape(-1, n).mean(1), 3),
                                     (right, measured["scene_entropy"], 2)):      # both [24]
            axes.plot(bootstrap(values), [y, y], color=color, linewidth=2)
            axes.plot(values.mean(), y, **dot)
            axes.text(1.02, y, f"{values.mean():.{digits}f}", va="center", size=9.5,
                      transform=axes.get_yaxis_transform())
    left.set_yticks(range(len(rows)), [row[0] for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)                  # the first row on top
    # From 1.5 to 56: on a linear axis the students would stand on one place.
    left.set_xscale("log")
    left.set(xlim=(1.2, 600), title="what it costs",
             xlabel="mark: network evaluations, by blocks\ndot: seconds, in those of one forward")
    left.set_xticks([1.5, 2, 4, 10, 56], ["1.5", "2", "4", "10", "56"])
    left.minorticks_off()
    middle.set(title="right", xlabel="share with the caption's\nshape and colour (1 is best)")
    right.set(title="varied", xlabel="entropy of the scenes in nats\n(the data: about 1.1)",
              xlim=(0, None))
    for axes in (left, middle, right):
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Ways to a picture, from dear to cheap. Filled: trained for that many "
                    "evaluations. Hollow: not trained for it\n(reused: Δ0 as it is, without f). "
                    "Lines: 95 % interval over captions.", size=12)
    save(figure, bench.settings.out, "cost")


def bootstrap(by_caption, rounds=1000):
    """(low, high): 95 % interval of the mean of [captions], which are drawn again and again."""
    # Whole captions are drawn, as in evaluate.py: pictures of one caption are alike.
    drawn = torch.randint(len(by_caption), (rounds, len(by_caption)), generator=rng(0, "figures"))
    return torch.quantile(by_caption[drawn].mean(1), torch.tensor([0.025, 0.975])).tolist()


# ================================================================== command

@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.figures", __doc__.split("\n\n")[0])
    chosen = settings.only or list(PICTURES)
    if Path(settings.out).is_file():
        raise UserError(f"--out {settings.out} is a file; give a folder")
    # All that can be wrong is asked before anything is loaded or sampled.
    check_runs(settings, chosen)
    figure_of(1, 1)                                       # without matplotlib stop now, not later
    bench = Bench(settings)
    for name in dict.fromkeys(chosen):
        {"paths": draw_paths, "collapse": draw_collapse, "guidance": draw_guidance,
         "cache": draw_cache, "cost": draw_cost}[name](bench)


if __name__ == "__main__":
    main()
