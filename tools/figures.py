"""Pictures of docs/RESULTS.md, drawn from your own runs of the miniature. Needs matplotlib.

    python -m tools.figures --caption "a blue triangle" --noise 45      # into results/figures

    collapse.png   which scenes come for a caption: the paper's first claim
    paths.png      one noise on its way to a picture: what each network guesses at each step
    cache.png      what each block changes between the steps, and what stands in for the span

Nothing is trained here. These commands make the runs:

    python train_stage1.py
    python train_stage1.py --alpha 1 --out runs/tiny-plain
    python train_stage2.py

Dimension key: B batch, C latent channels, H W latent size, n pictures of each of the 24 captions.
Pictures [B, 3, 32, 32] lie in [0, 1]; x̂0 is a network's guess of the picture.
"""

import dataclasses
from pathlib import Path

from run import UserError, command, option, parse_settings, replace_file

import torch

import evaluate
from cache import nfe
from losses import x0_from_velocity
from model import load_student, load_transformer
from sampler import image_noise, roll_out, sample_guided, sigma_grid, teacher_sigmas
from tiny.world import CAPTIONS, COLOURS, P_USUAL, SCENES, SHAPES, measure, read, scene_entropy
from tools.find_span import reuse_errors

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None                                         # main() says so

# One colour for each kind of network, as in assets/method.svg: green is a teacher, blue a student.
INK, GREY, TEACHER, STUDENT, RED = "#24292f", "#6e7781", "#2e7d32", "#1f5fbf", "#c62828"
# Of the teacher's 28 steps: dense where the scene is decided, sparse where only edges change.
SHOWN = [0, 2, 4, 6, 9, 14, 18, 22, 25]
BARE = {"xticks": [], "yticks": [], "frame_on": False}    # axes of a picture, or of none
# Of day, beach, night, dusk: near their own skies, but far enough apart for thin bars.
SCENE_COLOURS = ("#5aa0e6", "#e3c07a", "#1b1f3b", "#f0795b")


@dataclasses.dataclass
class Settings:
    stage1: str = option("runs/tiny-stage1", "run of Stage I")
    plain: str = option("runs/tiny-plain", "run of Stage I with guidance everywhere, plain DMD")
    stage2: str = option("runs/tiny-stage2", "run of Stage II")
    samples_per_prompt: int = option(16, "n, samples of each caption", low=2, high=1024)
    seed: int = option(300, "of the start noises; not the training's", low=0, high=2**31 - 1)
    caption: str = option("a blue triangle", "caption of paths.png", choices=tuple(CAPTIONS))
    noise: int = option(45, "which of the noises paths.png starts from", low=0, high=2**31 - 1)
    out: str = option("results/figures", "folder of the pictures")
    debug: bool = option(False, "show tracebacks")


# ================================================================== what is drawn from

def open_runs(settings):
    """(evaluate.Rows, still empty; the three runs as {folder: settings}). UserError, before
    anything is loaded, for a run that is missing or of another kind."""
    folders = settings.stage1, settings.plain, settings.stage2
    commands = "train_stage1.py", "train_stage1.py --alpha 1", "train_stage2.py"
    for folder, made_by in zip(folders, commands, strict=True):
        if not Path(folder, "settings.json").exists():
            raise UserError(f"there is no run {folder}; python {made_by} --out {folder} makes it")
    wanted = evaluate.Settings(checkpoint=folders, seed=settings.seed, batch_size=64,
                               samples_per_prompt=settings.samples_per_prompt, out=settings.out)
    preset, texts, runs = evaluate.resolve(wanted)
    # A run of another kind would give a picture whose title lies.
    kinds = [(run["stage"], run["steps"]) for run in runs.values()]
    last = runs[Path(settings.stage2)]
    without_f = last.get("cached_blocks") == "none" or last.get("no_compensation")
    if kinds != [(1, 2), (1, 2), (2, 2)] or without_f:
        raise UserError("the pictures show two runs of Stage I and one of Stage II with f, of two "
                        "steps each")
    rows = evaluate.Rows(wanted, preset, texts, last["latent_shape"], torch.device("cpu"), {})
    return rows, runs


def sample(rows, runs):
    """{name: pictures [24·n, 3, 32, 32]} of all that collapse.png and cache.png show, caption by
    caption, from the same noises: those that evaluate.py would measure."""
    one, _, two = runs.values()
    rows.add_data()
    rows.add_teacher(one["guidance"], one["alpha"], steps=2)
    for (folder, run), span in zip(runs.items(), (two["cached_blocks"], None, None), strict=True):
        rows.add_run(folder, run, span)
    names = ("data", "alpha", "guided", "unguided", "undistilled", "stage1", "reused", "skipped",
             "plain", "stage2", "stage2 in full", "stage2 reused")
    pictures = [album.get(range(len(CAPTIONS) * rows.n)) for album in rows.albums]
    return dict(zip(names, pictures, strict=True))


def show_picture(axes, picture):
    """Shows a picture [3, H, W]; smoothed it would look better than it is."""
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")


# ================================================================== collapse.png

def draw_collapse(pictures, alpha):
    """collapse.png: a panel for each network, a bar for each caption."""
    # Above the data and the teachers, below the students: read each column downwards or across.
    panels = {"data": ("data", INK),
              "unguided": ("teacher without guidance", TEACHER),
              "guided": ("teacher, guided at all levels", TEACHER),
              "plain": ("plain DMD: guided at all levels", STUDENT),
              "stage1": (f"Stage I: guided where σ ≤ {alpha:g}", STUDENT),
              "stage2": ("Stage II after it", STUDENT)}
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    grid = figure.subplots(2, 3, sharey=True)
    for (name, (label, color)), axes in zip(panels.items(), grid.flat, strict=True):
        # The exact reader's answer, whatever the shape is like.
        scene = read(pictures[name])["scene"].reshape(len(CAPTIONS), -1)          # 24×n
        stack_bars(axes, scene)
        axes.set_title(f"{label}\nentropy {scene_entropy(scene).mean():.2f} nats", color=color)
    grid[0, 0].set_ylabel("share of pictures")
    figure.suptitle("Which scene comes behind the shape? A bar is a caption, its lowest part the "
                    "usual scene\n(dashed: its share in the data). A bar of one colour is collapse")
    # Bars without height carry the scenes' names into one legend for all.
    for scene, color in zip(SCENES, SCENE_COLOURS, strict=True):
        grid[0, 0].bar(0, 0, color=color, label=f"scene: {scene}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def stack_bars(axes, scene):
    """A bar for each caption, its parts the shares of the scenes; scene [24, n] are indices."""
    shape = torch.arange(len(CAPTIONS)) // len(COLOURS)
    places = torch.arange(len(CAPTIONS)) + 1.2 * shape    # a gap between the shapes
    bottom = torch.zeros(len(CAPTIONS))
    for k in range(len(SCENES)):
        # Scene i is the usual one of shape i (tiny.world). It comes first, so that the height of
        # the lowest part is the share of the usual scene, and a full bar of it is a collapse.
        part = (shape + k) % len(SCENES)                                          # 24
        share = (scene == part[:, None]).float().mean(1)                          # 24
        axes.bar(places, share, 0.92, bottom, color=[SCENE_COLOURS[i] for i in part])
        bottom += share
    axes.axhline(P_USUAL, color=GREY, linestyle="--")
    axes.set_xticks(places.reshape(len(SHAPES), -1).mean(1), SHAPES)


# ================================================================== paths.png

@torch.inference_mode()
def teacher_path(x, prompt, uncond, teacher, sigmas, w, alpha=1.0):
    """([(σ, x̂0 as latents [1, C, H, W])] of every step from noise x, network evaluations)."""
    path, spent = [], 0
    for i in range(len(sigmas) - 1):
        # One step all the way to 0 is the guess x̂0, where the velocity points to from here; x
        # itself is still mostly noise. Then comes the step that is taken.
        guess, _ = sample_guided(teacher, x, prompt, uncond, sigmas[[i, -1]], w, alpha)
        x, passes = sample_guided(teacher, x, prompt, uncond, sigmas[i:i + 2], w, alpha)
        path.append((sigmas[i].item(), guess))
        spent += passes
    return path, spent


@torch.inference_mode()
def student_path(x, prompt, student, span, f):
    """The same of a student's two steps."""
    latents, velocities, _ = roll_out(student, x, prompt, sigma_grid(2), span, f)
    path = []
    for x, sigma, v in zip(latents, (1, 0.75), velocities, strict=False):
        path.append((sigma, x0_from_velocity(x, sigma, v)))
    return path, nfe(2, span, len(student.transformer_blocks))


def draw_paths(settings, rows, one, stage1, stage2):
    """paths.png: a row for each network, a column for each noise level, then the results. one are
    the settings of Stage I, whose w and α count; stage1 and stage2 are (student, span, f)."""
    w, alpha = one["guidance"], one["alpha"]
    noise = image_noise(settings.seed, [settings.noise], rows.shape)
    prompt = rows.prompts.take([CAPTIONS.index(settings.caption)])
    begin = noise, prompt, rows.prompts.uncond(1), load_transformer(rows.preset)
    stock = teacher_sigmas(rows.preset)                   # 28 steps
    # Three teachers that differ in their guidance alone; one in as few steps as the students, so
    # that the gain is the distillation's; then exactly what the finished method does.
    lines = {"teacher, no guidance": teacher_path(*begin, stock, 1.0),
             f"teacher, w = {w:g}\nat all levels": teacher_path(*begin, stock, w),
             f"teacher, w = {w:g}\nwhere σ ≤ {alpha:g}": teacher_path(*begin, stock, w, alpha),
             "teacher, two steps,\nnot distilled": teacher_path(*begin, sigma_grid(2), 1.0),
             "Stage I": student_path(noise, prompt, *stage1),
             "Stage II,\nblocks skipped": student_path(noise, prompt, *stage2)}

    figure = Figure(figsize=(14, 9), layout="constrained")
    grid = figure.subplots(len(lines), len(SHOWN) + 1, subplot_kw=BARE)
    # The columns are noise levels, not step numbers: only so the rows can be compared downwards.
    levels = stock[SHOWN]
    for (label, (path, spent)), line in zip(lines.items(), grid, strict=True):
        color = TEACHER if label.startswith("teacher") else STUDENT
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", color=color)
        steps = path if len(path) == 2 else [path[i] for i in SHOWN]
        for sigma, guess in steps:
            column = (levels - sigma).abs().argmin()      # 0.75 stands where the teacher has 0.74
            show_picture(line[column], rows.decode(guess)[0])
        # The guess of the last step, which ends at σ = 0, is the result.
        show_picture(line[-1], rows.decode(path[-1][1])[0])
        line[-1].set_xlabel(f"{spent:.4g} NFE", color=color, weight="bold")
    for level, axes in zip(levels.tolist(), grid[0], strict=False):
        axes.set_title(f"σ = {level:.2g} {'>' if level > alpha else '≤'} α", size=10)
    grid[0][-1].set_title("result", weight="bold")
    figure.suptitle(f"“{settings.caption}” from one noise: each network's guesses of the picture")
    return figure


# ================================================================== cache.png

def draw_cache(pictures, rows, student, span):
    """cache.png: left the blocks, right the same pictures with what can stand in for the span."""
    figure = Figure(figsize=(13.4, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    draw_blocks(left.subplots(), rows, student, span)
    # Three columns have the same student. Only the last one was trained with its cache, so its
    # pictures differ from the others in more than what stands in for the span.
    columns = {"stage1": "all blocks\nrun", "skipped": "blocks\nskipped",
               "reused": "Δ0 reused\nas it is", "stage2": "student and f\ntrained"}
    shown = (0, 9, 14, 23)                                # captions, each shape once
    captions = torch.arange(len(CAPTIONS)).repeat_interleave(rows.n)
    right.suptitle(f"Step two without blocks {span[0]}–{span[1]}, from the same noises\n"
                   f"(how many of {len(captions)} are right; entropy of their scenes)")
    grid = right.subplots(len(shown), len(columns), subplot_kw=BARE)
    for column, (name, label) in zip(grid.T, columns.items(), strict=True):
        column[0].set_title(label)
        for axes, c in zip(column, shown, strict=True):
            show_picture(axes, pictures[name][c * rows.n])
            axes.set_ylabel(CAPTIONS[c] if name == "stage1" else "", size=8)
        # Counted over all captions; four pictures are too few to judge by.
        measured = measure(pictures[name], captions)
        column[-1].set_xlabel(f"{100 * measured['correct'].mean():.0f} % right\n"
                              f"{measured['scene_entropy'].mean():.2f} nats")
    return figure


@torch.inference_mode()
def draw_blocks(axes, rows, student, span):
    """How much each block's residual changes between the steps of a student that never met a cache
    (tools/find_span.py, --error l1)."""
    sigmas = sigma_grid(2)
    noise = image_noise(7, range(2 * len(CAPTIONS)), rows.shape)                  # 48×C×H×W
    prompt = rows.prompts.take(torch.arange(len(noise)) % len(CAPTIONS))
    latents, _, _ = roll_out(student, noise, prompt, sigmas)
    errors = reuse_errors(student, latents[0], latents[1], prompt, sigmas, "l1")
    # The last block returns no text, so the text stream has a point less.
    axes.plot(errors["image"], "o-", color=STUDENT, label="image stream")
    axes.plot(errors["text"], "s--", color=GREY, label="text stream")
    axes.axvspan(span[0] - 0.5, span[1] + 0.5, color=RED, alpha=0.13, label="skipped")
    axes.set(title="How much does what a block adds\nchange from step one to step two?",
             xlabel="block", ylabel="Σ|step two − step one| ÷ Σ|step one|", ylim=(0, None))
    axes.legend(frameon=False)


# ================================================================== command

@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.figures", __doc__.split("\n\n")[0])
    if Figure is None:
        raise UserError("the pictures need matplotlib: pip install matplotlib")
    rows, runs = open_runs(settings)
    one, _, two = runs.values()
    stage1 = load_student(settings.stage1, one, rows.preset, rows.device)
    stage2 = load_student(settings.stage2, two, rows.preset, rows.device)
    pictures = sample(rows, runs)
    figures = {"collapse.png": draw_collapse(pictures, one["alpha"]),
               "paths.png": draw_paths(settings, rows, one, stage1, stage2),
               "cache.png": draw_cache(pictures, rows, stage1[0], stage2[1])}
    for name, figure in figures.items():
        path = Path(settings.out, name)
        replace_file(path, lambda new: figure.savefig(new, format="png"))
        print(path)


if __name__ == "__main__":
    main()
