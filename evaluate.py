"""Measures runs beside their teacher and the data: one table, results.json and a picture.

    python evaluate.py                                  # the default runs, the teacher, the data
    python evaluate.py --teacher all                    # ... and the teacher guided otherwise
    python evaluate.py --checkpoint runs/a runs/b --samples-per-prompt 64 --out results/compare
    python evaluate.py --model sd3-medium --checkpoint RUN --prompts FILE --out results/medium

Each row of the table is one way of making pictures: the teacher in 51 network evaluations, a run in
1.67, the same run without its cache in 2. All rows but the data sample the same prompts from the
same start noises. Then a meter looks at the pictures; in the miniature world it is the exact reader
(tiny/world.py):

    right                share of pictures that show the caption's shape and colour; 1 is best
    usual_scene          share of pictures on the shape's usual scene; data 0.55, collapse 1
    scene_entropy        of a caption's pictures, in nats; collapse 0. It grows with n (data: 0.96
                         at 8 samples a caption, 1.13 at 32, 1.16 at 64): compare it at one n
    read_error           mean RMS distance of a picture from the nearest true one; data 0
    speckled             share of pictures with specks: away from the outline their distance from
                         the nearest true one is above 0.02
    diversity            mean distance of a prompt's pictures from each other, in the features of a
                         vision network
    frechet_to_teacher   distance of all pictures from those of the α-guided teacher; 0 is best
    frechet_to_data      the same from freshly drawn pictures

Real models have CLIP score, PickScore and LPIPS instead of the first five (tools/real_metrics.py).
Seconds count sampling and decoding, not the text encoders; speedup is against the teacher's 28 × 2,
and absent where no row has these (--teacher all adds one). Brackets are 95 % intervals over
prompts. Read main() first: it goes through all this in order.

Dimension key: P prompts, n pictures for each, F features. Pictures [n, 3, H, W] lie in [0, 1].
"""

import dataclasses
import hashlib
import os
import time
from pathlib import Path

from run import (UserError, command, fill_in, option, parse_settings, read_settings, rng, versions,
                 write_json, write_text)

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import ConvNextV2Backbone

from cache import NOTHING, make_compensation, nfe
from losses import guidance_weight
from model import (Decoder, Prompts, check_base, choose_prompts, download, empty_transformer,
                   find_preset, forward_flops, frozen_dtype, load_part, load_student,
                   load_transformer, parse_span, pick_device)
from sampler import (TEACHER_STEPS, image_noise, roll_out, sample_guided, save_pictures, sigma_grid,
                     teacher_sigmas)
from tiny.world import CAPTIONS, draw, measure, sample_labels

MEASURES = ("right", "usual_scene", "scene_entropy", "read_error", "speckled", "clip_score",
            "pick_score", "diversity", "lpips", "frechet_to_teacher", "frechet_to_data")
COLUMNS = ("name", "nfe_blocks", "nfe_flops", "seconds_per_image", "speedup", *MEASURES)


# ================================================================== settings

@dataclasses.dataclass
class Settings:
    checkpoint: list = option(None, "run folders (default: runs/tiny-stage1, runs/tiny-stage2)")
    model: str = option("tiny", "base model of the runs")
    prompts: str = option(None, "file of prompts: one a line, or JSON lines with \"prompt\" "
                          "(tiny: its 24 captions)")
    seed: int = option(1, "of the start noises; not the training's", low=0, high=2**31 - 1)
    samples_per_prompt: int = option(None, "n, samples for each prompt (tiny: 32, others: 4)",
                                     low=2, high=4096)
    batch_size: int = option(None, "images at a time (tiny: 128, others: 4)", low=1, high=10_000)
    teacher: str = option("alpha", "rows of the teacher: alpha = guided by Eq. 4; all = also "
                          "guided everywhere, unguided, in few steps (slow); no = none",
                          choices=("alpha", "all", "no"))
    alpha: float = option(0.94, "the teacher's alpha: Fréchet distances are taken to it, whatever "
                          "a run was trained with [paper, second hand]", low=0, high=1)
    own_path: bool = option(False, "of each run only the path that it was trained for")
    out: str = option(None, "folder for results.json, table.md, grid.png (default: results/MODEL)")
    clip: str = option(None, "folder or hub id of the CLIP score's CLIPModel")
    pickscore: str = option(None, "folder or hub id of PickScore's CLIPModel")
    dino: str = option(None, "folder or hub id of the Dinov2Model")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))


def resolve(settings):
    """Fills in what was not given and checks what belongs together, before anything is loaded.
    Returns the preset, the prompts and {run folder: its settings}."""
    preset = find_preset(settings.model)
    tiny_world = preset.is_tiny
    fill_in(settings, {"samples_per_prompt": 32 if tiny_world else 4,
                       "batch_size": 128 if tiny_world else 4,
                       "out": f"results/{Path(preset.name).name}"})
    pick_device(preset, settings.device)
    if not tiny_world and not (settings.checkpoint and settings.prompts):
        raise UserError("real models need --checkpoint RUN and --prompts FILE")
    if Path(settings.out).is_file():
        raise UserError(f"--out {settings.out} is a file; give a folder")
    names = settings.checkpoint or ["runs/tiny-stage1"]
    if not settings.checkpoint and Path("runs/tiny-stage2/settings.json").exists():
        names.append("runs/tiny-stage2")
    # Whole paths: rows are named after their folder, and "." has no name.
    folders = [Path(os.path.abspath(name)) for name in names]
    runs = {folder: read_settings(folder) for folder in folders}
    for folder, run in runs.items():
        if run["model"] != preset.name:
            raise UserError(f"{folder} was distilled from {run['model']}, not from {preset.name}")
        # All rows start from the same noises, so these need one shape.
        if run["latent_shape"] != runs[folders[0]]["latent_shape"]:
            raise UserError(f"{folder} makes pictures of another size than {folders[0]}")
    if len({folder.name for folder in runs}) < len(runs):
        raise UserError("two of the runs have the same name; the table could not tell them apart")
    texts = choose_prompts(preset, settings.prompts)
    if tiny_world and set(texts) - set(CAPTIONS):
        raise UserError(f"--prompts {settings.prompts}: the exact reader knows the 24 captions of "
                        "the miniature only, such as \"a red circle\"")
    check_base(preset)
    return download(preset), texts, runs


# ================================================================== what a picture is worth

class TinyMeter(torch.nn.Module):
    """The exact reader and, for the features, a small ConvNeXt out of the tiny teacher's folder."""
    resize, missing = None, {}          # told in results.json: nothing is resized, nothing missing

    def __init__(self, preset):
        super().__init__()
        # Not the discriminator's backbone: Stage II learns to please that one, so a distance in
        # its features would flatter Stage II. This one has another seed, depth and width.
        backbone = load_part(ConvNextV2Backbone, preset.source, "metric_backbone", torch.float32)
        self.metric_backbone = backbone.requires_grad_(False)

    def forward(self, pictures, prompt):
        """({name: number}, features [n, F]) of pictures [n, 3, 32, 32] of one of the captions."""
        # The reader compares a picture with all that the world can draw. It has no weights, so no
        # training can fool it.
        read = measure(pictures, torch.full((len(pictures),), CAPTIONS.index(prompt)))
        values = {"right": read["right"].mean(), "usual_scene": read["usual_scene"].mean(),
                  "scene_entropy": read["scene_entropy"],                 # of the one caption here
                  "read_error": read["read_error"].mean(), "speckled": read["speckled"].mean()}
        x = pictures.to(self.metric_backbone.device) * 2 - 1              # to [−1, 1]
        maps = self.metric_backbone(x).feature_maps
        return values, maps[-1].mean((2, 3)).cpu()                        # n×F×h×w → n×F


def frechet(a, b):
    """Fréchet distance between the Gaussians that fit features a and b [..., F]:
    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½). FID is this with Inception's features."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)                             # pictures × F
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)                         # F×F
    # Σ_a·Σ_b is not symmetric, and its root is awkward. But Σ_a^½·Σ_b·Σ_a^½ is symmetric and has
    # the same eigenvalues; the trace of its root is the sum of their roots. Rounding can push an
    # eigenvalue of 0 below 0, whose root would be NaN: clamp it.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T               # Σ_a^½
    middle = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * middle


# ================================================================== how sure we are of it

ROUNDS = 1000           # [ours] of the bootstrap


def estimate(name, values):
    """{name: number, name_interval: [low, high]}: the mean of a measure's values [P], one for each
    prompt, and its 95 % interval by bootstrap."""
    # How far would the mean move with other prompts? Draw P of the P prompts, some twice and some
    # not at all, average again, and repeat. Draw whole prompts, not pictures: pictures of one
    # prompt are alike, and counting each as news would make the interval too narrow. The seed is
    # fixed, so that all rows get the same draws. (No such interval for the Fréchet distance: a draw
    # has fewer different pictures, and that alone makes the distance larger.)
    drawn = torch.randint(len(values), (ROUNDS, len(values)), generator=rng(0, "bootstrap"))
    means = values[drawn].mean(1).float()                                 # ROUNDS
    interval = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return {name: values.mean().item(), f"{name}_interval": interval}


def look(groups, texts, meter):
    """What a meter finds in the pictures of a row, {measure: [P]} and features [P, n, F]; and the
    pictures to be shown, four each of at most four prompts, [16, 3, H, W].

    groups yields the pictures [n, 3, H, W] of each prompt in turn, so they need not fit in memory.
    """
    answers, shown = [], []
    show = torch.linspace(0, len(texts) - 1, min(4, len(texts))).long()
    with torch.inference_mode():
        for c, (pictures, text) in enumerate(zip(groups, texts, strict=True)):
            answers.append(meter(pictures, text))
            if c in show:
                shown.append(pictures[:4])
    # Double precision: the Fréchet distance is a small difference of large traces.
    features = torch.stack([features for _, features in answers]).double()        # P×n×F
    by_prompt = {}
    for name in answers[0][0]:
        by_prompt[name] = torch.tensor([float(values[name]) for values, _ in answers])
    # Diversity: how far a picture lies from the n − 1 others of its prompt, on average.
    n = features.shape[1]
    distances = [torch.cdist(f, f).sum() / (n * (n - 1)) for f in features]
    by_prompt["diversity"] = torch.stack(distances)                       # P
    return by_prompt, features, torch.cat(shown)


# ================================================================== rows

class Rows:
    """The rows of the table so far, {column: value}, None where a column does not apply. Beside
    each its features [P, n, F] and the pictures to be shown.

    In every row but the data's picture j shows prompt j // n and starts from noise j of --seed. So
    two rows differ by what made them and not by luck.
    """

    def __init__(self, settings, preset, texts, shape, device, meter):
        self.settings, self.preset, self.texts = settings, preset, texts
        self.shape, self.device, self.meter = shape, device, meter
        self.n = settings.samples_per_prompt
        self.prompts = Prompts(preset, texts, device)     # before the networks: frees its encoders
        self.decode = Decoder(preset, device)
        self.rows, self.features, self.shown = [], [], []

    def add(self, name, recipe, groups):
        """Makes one row of its pictures, as look() takes them. recipe tells how they are made."""
        groups = tqdm(groups, name, len(self.texts), leave=False)
        by_prompt, features, shown = look(groups, self.texts, self.meter)
        row = dict.fromkeys(COLUMNS) | {"name": name, "recipe": recipe, "steps": None}
        row["by_prompt"] = {}                             # for tools/claims.py, which resamples it
        for column, values in by_prompt.items():
            row |= estimate(column, values)
            row["by_prompt"][column] = [round(v, 6) for v in values.tolist()]
        self.rows.append(row)
        self.features.append(features)
        self.shown.append(shown)

    def add_sampled(self, name, recipe, evaluations, sample):
        """A row of sample(noise, prompt), which returns latents [B, C, H, W]. evaluations: how many
        a picture takes, by blocks and by FLOPs."""
        seconds = []
        self.add(name, recipe, self.groups(sample, seconds))
        blocks, flops = evaluations
        self.rows[-1] |= {"steps": recipe["steps"], "nfe_blocks": blocks, "nfe_flops": flops,
                          "seconds_per_image": sum(seconds) / (self.n * len(self.texts))}

    def groups(self, sample, seconds):
        """Yields the pictures [n, 3, H, W] of each prompt; adds to `seconds` what they took."""
        waiting = []
        for batch in torch.arange(self.n * len(self.texts)).split(self.settings.batch_size):
            begun = time.perf_counter()
            noise = image_noise(self.settings.seed, batch, self.shape).to(self.device)
            latents = sample(noise, self.prompts.take(batch // self.n))   # B×C×H×W
            # .cpu() waits until a GPU has finished: without it the clock would stop too early.
            pictures = self.decode(latents).clamp(0, 1).cpu()             # B×3×8H×8W (tiny: 4)
            seconds.append(time.perf_counter() - begun)
            waiting += pictures
            while len(waiting) >= self.n:
                yield torch.stack(waiting[:self.n])
                waiting = waiting[self.n:]

    def add_data(self):
        """The miniature's own pictures of the captions, freshly drawn. Returns their features."""
        # What would a perfect model get? Not the world's own entropy: with only n samples a caption
        # the measured one is lower. This row is the mark to compare with.
        captions = torch.tensor([CAPTIONS.index(text) for text in self.texts])
        captions = captions.repeat_interleave(self.n)                     # P·n
        pictures = draw(*sample_labels(len(captions), rng(self.settings.seed, "data"), captions))
        self.add("data", {}, pictures.split(self.n))
        return self.features[-1]

    def add_teacher(self, w, alpha, steps):
        """The teacher's rows; w and steps are the first run's. Returns the features of the
        first row, to which Fréchet distances are taken."""
        stock, own = teacher_sigmas(self.preset), sigma_grid(steps)
        # First the teacher that Stage I learns from.
        paths = [(f"teacher, w = {w:g} for sigma <= {alpha:g}", stock, w, alpha)]
        if self.settings.teacher == "all":
            # What goes wrong without the paper: guided everywhere, its layouts collapse; without
            # guidance, it misses the prompt; in as few steps as the student's, it blurs.
            paths.append((f"teacher, w = {w:g} everywhere", stock, w, 1.0))
            paths.append(("teacher, no guidance", stock, 1.0, 1.0))
            paths.append((f"teacher at {steps} steps, not distilled", own, 1.0, 1.0))
        teacher = load_transformer(self.preset, frozen_dtype(self.device)).to(self.device)
        for name, sigmas, guidance, row_alpha in paths:
            def sample(noise, prompt):                    # called within this round of the loop
                uncond = self.prompts.uncond(len(noise))
                return sample_guided(teacher, noise, prompt, uncond, sigmas, guidance, row_alpha)[0]
            # A step costs one evaluation, and a second one where guidance is on: 51 at α = 0.94.
            guided = guidance_weight(sigmas[:-1], guidance, row_alpha) != 1       # steps
            passes = len(guided) + int(guided.sum())
            recipe = {"steps": len(guided), "guidance": guidance, "alpha": row_alpha, "span": None,
                      "sigmas": [round(s, 6) for s in sigmas.tolist()]}
            self.add_sampled(name, recipe, (passes, passes), sample)
        return self.features[-len(paths)]

    def add_run(self, folder, run, stage2_span):
        """A run's rows, one for each of its paths. stage2_span, of a Stage I run: the span, such as
        "1-4", that its Stage II run skips, or None."""
        student, span, f = load_student(folder, run, self.preset, self.device)
        if run["stage"] == 1 and stage2_span:
            span = parse_span(stage2_span, len(student.transformer_blocks))
        paths = run_paths(run["stage"], span, f)
        if self.settings.own_path:
            paths = paths[:1]
        sigmas = sigma_grid(run["steps"])
        for suffix, row_span, row_f in paths:
            def sample(noise, prompt):                    # called within this round of the loop
                latents, _, _ = roll_out(student, noise, prompt, sigmas, row_span, row_f)
                return latents[-1]
            recipe = {"run": os.path.relpath(folder), "path": suffix,
                      "span": f"{row_span[0]}-{row_span[1]}" if row_span else None,
                      "sigmas": [round(s, 6) for s in sigmas.tolist()]}
            for key in ("stage", "finished", "steps", "guidance", "alpha"):
                recipe[key] = run[key]
            evaluations = count_nfe(self.preset, row_span, run["steps"], self.shape,
                                    with_f=row_f not in (None, NOTHING))
            self.add_sampled(folder.name + suffix, recipe, evaluations, sample)


def count_nfe(preset, span, steps, shape, with_f):
    """Network evaluations of a student with span (n, m) or None, (by blocks, by FLOPs). One
    evaluation is one full forward, of latents of this shape [C, H, W]."""
    if not span:
        return float(steps), float(steps)
    # The paper counts blocks. Blocks are not all of a pass (embedding, projection), not all alike
    # (SD3.5-Medium has two kinds), and f is not free: so FLOPs are counted, too.
    config, _ = check_base(preset, offline=True)
    net = empty_transformer(config)
    with torch.device("meta"):
        f = make_compensation(net.inner_dim) if with_f else None
    # A step that records, and one that reuses Δ0.
    full, delta = forward_flops(net, shape, preset.tokens, span=span)
    cached, _ = forward_flops(net, shape, preset.tokens, span=span, delta=delta, f=f)
    # Step one is one evaluation. Each later step counts as its share of a full one.
    return nfe(steps, span, config["num_layers"]), 1 + (steps - 1) * cached / full


def run_paths(stage, span, f):
    """(suffix of the row's name, span, f) for each path that a run's student can take. First comes
    its own, the one that it was trained for; the others show what that training gains."""
    if stage == 1:
        # This student never met a cache. What does it lose with an untrained one? A few points when
        # Δ0 is reused as it is, very much when nothing stands in the span's place.
        paths = [("", None, None)]
        if span:
            paths.append((", plain reuse", span, None))
            paths.append((", span skipped", span, NOTHING))
        return paths
    # This one was trained with its cache. "No cache" shows what skipping still costs, "plain reuse"
    # what f adds. (A run that was trained without f has plain reuse as its own path.)
    paths = [("", span, f)]
    if span:
        paths.append((", no cache", None, None))
    if f:
        paths.append((", plain reuse", span, None))
    return paths


# ================================================================== table and picture

def cell(row, name):
    """One cell as text: a name, a count, or a measured value with its interval."""
    value, interval = row[name], row.get(f"{name}_interval")
    if value is None or isinstance(value, str):
        return value or ""
    if interval is None:
        return f"{value:.4g}" if name.startswith("nfe") else f"{value:.3g}"
    low, high = interval
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"


def table(rows):
    """The rows as a Markdown table."""
    columns = [column for column in COLUMNS if any(row[column] is not None for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join([cell(row, column) for column in columns]) + " |")
    return "\n".join(lines)


def save_grid(path, rows, shown):
    """The picture: of each row, with its name, the pictures to be shown, [columns, 3, H, W]. A
    column shows one prompt, from one start noise."""
    pictures, columns = torch.cat(shown), len(shown[0])
    if pictures.shape[-1] > 256:
        pictures = torch.nn.functional.interpolate(pictures, (256, 256), mode="area")
    save_pictures(pictures, path, columns)
    # Make room on the left and write the names there.
    grid, font = Image.open(path), ImageFont.load_default(20)
    margin = 20 + int(max(font.getlength(row["name"]) for row in rows))
    sheet = Image.new("RGB", (grid.width + margin, grid.height), "white")
    sheet.paste(grid, (margin, 0))
    for i, row in enumerate(rows):
        place = 10, (i + 0.4) * grid.height / len(rows)
        ImageDraw.Draw(sheet).text(place, row["name"], "black", font)
    sheet.save(path)


# What the default runs of eight training seeds gave in the default evaluation: mean ± standard
# deviation; an AMD EPYC, 2026-11-29. On another kind of CPU training rounds otherwise and ends
# elsewhere, as with another seed.
EXPECTED = {
    "tiny-stage1": "right 0.982 ± 0.005, scene_entropy 0.75 ± 0.07, frechet_to_teacher 0.57 ± 0.18",
    "tiny-stage2": "right 0.966 ± 0.006, scene_entropy 0.74 ± 0.06, frechet_to_teacher 0.19 ± 0.05",
}


def expected(settings):
    """Lines that say what to expect of this evaluation, if it is the default one."""
    default = Settings(samples_per_prompt=32, batch_size=128, out=settings.out)
    if settings != default:
        return []
    return [f"{name} with default settings, eight training seeds: {values}"
            for name, values in EXPECTED.items()]


# ================================================================== command

@command
def main(argv):
    settings = parse_settings(Settings, argv, "evaluate.py", __doc__.split("\n\n")[0])
    preset, texts, runs = resolve(settings)
    device, out = pick_device(preset, settings.device), Path(settings.out)
    n = settings.samples_per_prompt
    tiny_world = preset.is_tiny
    first_run = next(iter(runs.values()))                 # its w guides the teacher

    # ------------------------------------------------------------- the protocol
    if tiny_world:
        meter = TinyMeter(preset)
    else:
        from tools.real_metrics import RealMeter
        meter = RealMeter(settings.clip, settings.pickscore, settings.dino)
    meter.to(device)
    # Numbers of two results.json compare only where the protocols are equal: other prompts, seeds,
    # n or feature networks give other numbers for the same model. Another machine changes the
    # seconds and the last digits.
    protocol = {"model": preset.name, "seed": settings.seed, "samples_per_prompt": n,
                "prompts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
                "images": n * len(texts), "latent_shape": first_run["latent_shape"],
                "device": str(device), **versions(), "resize": meter.resize, "frechet_to": None}
    if settings.teacher != "no":
        protocol["frechet_to"] = {"steps": TEACHER_STEPS, "guidance": first_run["guidance"],
                                  "alpha": settings.alpha}

    # ------------------------------------------------------------- sample and measure, row by row
    sampled = Rows(settings, preset, texts, first_run["latent_shape"], device, meter)
    data = teacher = None
    if tiny_world:
        data = sampled.add_data()
    if settings.teacher != "no":
        teacher = sampled.add_teacher(first_run["guidance"], settings.alpha, first_run["steps"])
    # A Stage I run is also shown with the span that its Stage II run, if there is one, skips.
    spans = {}                                            # {name of the Stage I run: span as text}
    for run in runs.values():
        if run.get("cached_blocks", "none") != "none":
            spans.setdefault(Path(run["init"]).name, run["cached_blocks"])
    for folder, run in runs.items():
        sampled.add_run(folder, run, spans.get(folder.name))
    rows = sampled.rows
    # The paper's baseline, 28 × 2, if --teacher all has sampled it.
    baseline = [row["seconds_per_image"] for row in rows if row["nfe_blocks"] == 2 * TEACHER_STEPS]
    for row, features in zip(rows, sampled.features, strict=True):
        for column, other in (("frechet_to_teacher", teacher), ("frechet_to_data", data)):
            if other is not None and other is not features:       # none of a row from itself
                row[column] = frechet(features, other).item()
        if baseline and row["seconds_per_image"]:
            row["speedup"] = baseline[0] / row["seconds_per_image"]

    # ------------------------------------------------------------- the result
    markdown = table(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", {"protocol": protocol, "rows": rows,
                                      "missing": meter.missing})
    write_text(out / "table.md", markdown + "\n")
    save_grid(out / "grid.png", rows, sampled.shown)
    print(markdown)
    for name, reason in meter.missing.items():
        print(f"{name}: not measured, {reason}")
    print(f"\n{n} samples for each of {len(texts)} prompts; {out}/results.json, {out}/grid.png")
    for line in expected(settings):
        print(line)


if __name__ == "__main__":
    main()
