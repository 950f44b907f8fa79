"""Measures runs beside their teacher and the data: one table, results.json and a picture.

    python evaluate.py                                  # the default runs, the teacher, the data
    python evaluate.py --checkpoint runs/a runs/b --samples-per-prompt 64 --out results/compare
    python evaluate.py --model sd3-medium --checkpoint RUN --prompts FILE --out results/medium

Each row of the table is one way of making pictures: the teacher in 56 network evaluations, a run in
1.67, that run without its cache. All rows sample the same prompts from the same start noises. Then
a meter looks at the pictures; in the miniature world it is the exact reader (tiny/world.py):

    prompt_accuracy      share of pictures that show the caption's shape and colour; 1 is best
    usual_scene          share of pictures on the shape's usual scene; data 0.55, collapse 1
    scene_entropy        of a caption's pictures, in nats; collapse 0. It grows with n (data: 0.96
                         at 8 samples a caption, 1.13 at 32, 1.16 at 64): compare it at one n
    diversity            mean distance of a prompt's pictures from each other, in features
    frechet_to_teacher   distance of all pictures from those of the α-guided teacher; 0 is best
    frechet_to_data      the same from freshly drawn pictures

Real models have CLIP score, PickScore and LPIPS instead of the first three (tools/real_metrics.py).
Seconds count sampling and decoding, not the text encoders; speedup is against the teacher's 28 × 2.
Brackets are 95 % intervals. A second table compares each run, prompt by prompt, with the Stage I
run that it started from. Read main() first: it goes through all this in order.

Dimension key: P prompts, n pictures for each, F features. Pictures [n, 3, H, W] lie in [0, 1].
"""

import dataclasses
import hashlib
import time
from pathlib import Path

from run import (UserError, command, fill_in, option, parse_settings, read_settings, rng, versions,
                 write_json, write_text)

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cache import NOTHING, make_compensation, nfe
from losses import guidance_weight
from model import (Decoder, Prompts, check_base, choose_prompts, empty_transformer, find_preset,
                   forward_flops, load_part, load_student, load_transformer, parse_span,
                   pick_device)
from sampler import (TEACHER_STEPS, image_noise, roll_out, sample_guided, save_pictures, sigma_grid,
                     teacher_sigmas)
from tiny.world import CAPTIONS, draw, measure, sample_labels

MEASURES = ("prompt_accuracy", "usual_scene", "scene_entropy", "clip_score", "pick_score",
            "diversity", "lpips", "frechet_to_teacher", "frechet_to_data")
COLUMNS = ("name", "nfe_blocks", "nfe_flops", "seconds_per_image", "speedup", *MEASURES)
CHANGES = ("accuracy_points", "entropy_ratio", "frechet_change")          # against its own Stage I


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
    teacher: str = option("yes", "sample the teacher's rows too, minutes on a CPU; alpha = only "
                          "the one that Fréchet distances are taken to",
                          choices=("yes", "alpha", "no"))
    own_path: bool = option(False, "of each run only the path that it was trained for")
    out: str = option(None, "folder for results.json, table.md, grid.png (default: results/MODEL)")
    clip: str = option(None, "folder or hub id of the CLIP score's CLIPModel")
    pickscore: str = option(None, "folder or hub id of PickScore's CLIPModel")
    dino: str = option(None, "folder or hub id of the Dinov2Model")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


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
    folders = [Path(run) for run in settings.checkpoint or ["runs/tiny-stage1"]]
    if not settings.checkpoint and Path("runs/tiny-stage2/settings.json").exists():
        folders.append(Path("runs/tiny-stage2"))
    runs = {folder: read_settings(folder) for folder in folders}
    for folder, run in runs.items():
        if run["model"] != preset.name:
            raise UserError(f"{folder} was distilled from {run['model']}, not from {preset.name}")
        # All rows start from the same noises, so these need one shape.
        if run["latent_shape"] != runs[folders[0]]["latent_shape"]:
            raise UserError(f"{folder} makes pictures of another size than {folders[0]}")
    # Rows are named after their run's folder.
    if len({folder.name for folder in runs}) < len(runs):
        raise UserError("two of the runs have the same name; the table could not tell them apart")
    texts = choose_prompts(preset, settings.prompts)
    if tiny_world and set(texts) - set(CAPTIONS):
        raise UserError(f"--prompts {settings.prompts}: the exact reader knows the 24 captions of "
                        "the miniature only, such as \"a red circle\"")
    check_base(preset)
    return preset, texts, runs


# ================================================================== what a picture is worth

class TinyMeter(torch.nn.Module):
    """The exact reader and, for the features, a small ConvNeXt out of the tiny teacher's folder."""
    resize, missing = None, {}          # told in results.json: nothing is resized, nothing missing

    def __init__(self, preset):
        super().__init__()
        from transformers import ConvNextV2Backbone
        # Not the discriminator's backbone: Stage II learns to please that one, so a distance in
        # its features would flatter Stage II. This one has another seed, depth and width.
        backbone = load_part(ConvNextV2Backbone, preset.source, "metric_backbone", torch.float32)
        self.metric_backbone = backbone.requires_grad_(False)

    def forward(self, pictures, prompt):
        """({name: number}, features [n, F]) of pictures [n, 3, 32, 32] of one of the captions."""
        # The reader compares a picture with all that the world can draw. It has no weights, so no
        # training can fool it.
        read = measure(pictures, torch.full((len(pictures),), CAPTIONS.index(prompt)))
        values = {"prompt_accuracy": read["correct"].mean(), "usual_scene": read["usual"].mean(),
                  "scene_entropy": read["scene_entropy"]}
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

# [ours] Each round of a Fréchet distance costs two eigendecompositions, so there are fewer of them.
# A draw has fewer distinct pictures, which makes the distance larger: its interval leans upwards.
ROUNDS, FRECHET_ROUNDS = 1000, 200


def estimate(name, statistic, prompts, rounds=ROUNDS):
    """{name: number, name_interval: [low, high]}: statistic(indices) of all prompts, and its 95 %
    interval by bootstrap."""
    # How far would the number move with other prompts? Draw P of the P prompts, some twice and some
    # not at all, compute it again, and repeat. Draw whole prompts, not pictures: pictures of one
    # prompt are alike, and counting each as news would make the interval too narrow. The seed is
    # fixed, so that all rows get the same draws.
    drawn = torch.randint(prompts, (rounds, prompts), generator=rng(0, "bootstrap"))
    values = torch.tensor([float(statistic(index)) for index in drawn])
    interval = torch.quantile(values, torch.tensor([0.025, 0.975])).tolist()
    return {name: float(statistic(torch.arange(prompts))), f"{name}_interval": interval}


def nothing(names):
    """None for each name and its interval: a measure that does not apply."""
    return {key: None for name in names for key in (name, f"{name}_interval")}


class Measured:
    """What a meter finds in the pictures of one row: by_prompt {name: [P]}, features [P, n, F].

    groups yields the pictures [n, 3, H, W] of each prompt in turn, so they need not fit in memory.
    """

    def __init__(self, groups, texts, meter):
        with torch.inference_mode():
            answers = [meter(pictures, text) for pictures, text in zip(groups, texts, strict=True)]
        # Double precision: the distance is a small difference of large traces.
        self.features = torch.stack([features for _, features in answers]).double()   # P×n×F
        self.by_prompt = {}
        for name in answers[0][0]:
            self.by_prompt[name] = torch.tensor([float(values[name]) for values, _ in answers])
        # Diversity: how far a picture lies from the n − 1 others of its prompt, on average.
        n = self.features.shape[1]
        distances = [torch.cdist(f, f).sum() / (n * (n - 1)) for f in self.features]
        self.by_prompt["diversity"] = torch.stack(distances)              # P

    def columns(self, teacher, data):
        """The measured columns of the table; teacher and data are Measured, or None."""
        columns, prompts = nothing(MEASURES), len(self.features)
        for name, values in self.by_prompt.items():
            columns |= estimate(name, lambda i: values[i].mean(), prompts)
        for name, other in (("frechet_to_teacher", teacher), ("frechet_to_data", data)):
            if other is None or other is self:            # no distance of the teacher from itself
                continue
            columns |= estimate(name, lambda i: frechet(self.features[i], other.features[i]),
                                prompts, FRECHET_ROUNDS)
        return columns


def compare(run, base, teacher):
    """What changed from base, a run's Stage I, to run, both Measured: accuracy in points, the ratio
    of scene entropies (both None for real models) and the change of the Fréchet distance to the
    teacher (None without one), each with its interval."""
    changes = nothing(CHANGES)
    # Both saw the same prompts and noises, so a draw takes the same prompts of both: what is hard
    # for both cancels, and the interval is narrower than that of two separate numbers.
    a, b, prompts = run.by_prompt, base.by_prompt, len(run.features)
    if "prompt_accuracy" in a:
        gain = a["prompt_accuracy"] - b["prompt_accuracy"]                # P
        changes |= estimate("accuracy_points", lambda i: 100 * gain[i].mean(), prompts)
        changes |= estimate("entropy_ratio", lambda i: (a["scene_entropy"][i].mean()
                                                        / b["scene_entropy"][i].mean()), prompts)
    if teacher is not None:
        def change(i):
            target = teacher.features[i]
            return frechet(run.features[i], target) - frechet(base.features[i], target)
        changes |= estimate("frechet_change", change, prompts, FRECHET_ROUNDS)
    return changes


# ================================================================== rows

class Album:
    """The pictures of one row by index, and the seconds that each took. They stay in memory; those
    of a real model become files (tools.real_metrics.FileAlbum)."""

    def __init__(self):
        self.pictures, self.seconds = {}, {}

    def put(self, index, picture, prompt, seconds):
        """Keeps picture [3, H, W]."""
        self.pictures[index], self.seconds[index] = picture, seconds

    def get(self, indices):
        """Pictures [n, 3, H, W] in [0, 1]."""
        return torch.stack([self.pictures[i] for i in indices])


class Rows:
    """The rows of the table so far, {column: value}, and the album of each.

    In every row picture j shows prompt j // n and starts from noise j of --seed. So two rows differ
    by what made them and not by luck.
    """

    def __init__(self, settings, preset, texts, shape, device, protocol):
        self.settings, self.preset, self.texts = settings, preset, texts
        self.shape, self.device, self.protocol = shape, device, protocol
        self.n = settings.samples_per_prompt
        self.prompts = Prompts(preset, texts, device)     # before the networks: frees its encoders
        self.decode = Decoder(preset, device)
        self.rows, self.albums = [], []
        self.stage1 = {}                                  # {Stage I run's name: index of its row}

    def add(self, name, recipe, evaluations, sample):
        """Makes one row. recipe tells how its pictures are made; evaluations, how many a picture
        takes, by blocks and by FLOPs; sample(noise, prompt) returns latents [B, C, H, W]."""
        album = Album()
        if not self.preset.is_tiny:
            from tools.real_metrics import FileAlbum
            about = {"row": name, "recipe": recipe, **self.protocol, "date": None}
            album = FileAlbum(Path(self.settings.out) / "images", name, about)
        # Of an interrupted evaluation of a real model some pictures are there already.
        total, size = self.n * len(self.texts), self.settings.batch_size
        missing = [j for j in range(total) if j not in album.seconds]
        for start in tqdm(range(0, len(missing), size), desc=name, leave=False):
            batch = missing[start:start + size]
            prompt = self.prompts.take([j // self.n for j in batch])
            begun = time.perf_counter()
            with torch.inference_mode():
                noise = image_noise(self.settings.seed, batch, self.shape).to(self.device)
                latents = sample(noise, prompt)                           # B×C×H×W
                # .cpu() waits until a GPU has finished: without it the clock would stop too early.
                pictures = self.decode(latents).clamp(0, 1).cpu()         # B×3×8H×8W (tiny: 4)
            seconds = (time.perf_counter() - begun) / len(batch)
            for j, picture in zip(batch, pictures, strict=True):
                album.put(j, picture, self.texts[j // self.n], seconds)
        blocks, flops = evaluations
        self.rows.append({"name": name, "recipe": recipe, "steps": recipe["steps"],
                          "nfe_blocks": blocks, "nfe_flops": flops,
                          "seconds_per_image": sum(album.seconds.values()) / total})
        self.albums.append(album)

    def add_data(self):
        """The miniature's own pictures of the captions, freshly drawn."""
        # What would a perfect model get? Not the world's own entropy: with only n samples a caption
        # the measured one is lower. This row is the mark to compare with.
        captions = torch.tensor([CAPTIONS.index(text) for text in self.texts])
        captions = captions.repeat_interleave(self.n)                     # P·n
        labels = sample_labels(len(captions), rng(self.settings.seed, "data"), captions)
        self.albums.append(Album())
        for j, picture in enumerate(draw(*labels)):
            self.albums[-1].put(j, picture, self.texts[j // self.n], seconds=None)
        self.rows.append({"name": "data", "recipe": {}, "steps": None, "nfe_blocks": None,
                          "nfe_flops": None, "seconds_per_image": None})

    def add_teacher(self, w, alpha, steps):
        """The teacher's rows; w, α and steps are the first run's."""
        stock, own = teacher_sigmas(self.preset), sigma_grid(steps)
        # First the teacher that Stage I learned from: Fréchet distances are taken to this row.
        paths = [(f"teacher, w = {w:g} for sigma <= {alpha:g}", stock, w, alpha)]
        if self.settings.teacher == "yes":
            # What goes wrong without the paper: guided everywhere, its layouts collapse; without
            # guidance, it misses the prompt; in as few steps as the student's, it blurs.
            paths.append((f"teacher, w = {w:g} everywhere", stock, w, 1.0))
            paths.append(("teacher, no guidance", stock, 1.0, 1.0))
            paths.append((f"teacher at {steps} steps, not distilled", own, 1.0, 1.0))
        teacher = load_transformer(self.preset).to(self.device)
        for name, sigmas, guidance, a in paths:
            def sample(noise, prompt):
                uncond = self.prompts.uncond(len(noise))
                return sample_guided(teacher, noise, prompt, uncond, sigmas, guidance, a)[0]
            # A step costs one evaluation, and a second one where guidance is on: 51 at α = 0.94.
            guided = guidance_weight(sigmas[:-1], guidance, a) != 1       # steps
            passes = len(guided) + int(guided.sum())
            recipe = {"steps": len(guided), "guidance": guidance, "alpha": a, "span": None,
                      "sigmas": [round(s, 6) for s in sigmas.tolist()]}
            self.add(name, recipe, (passes, passes), sample)

    def add_run(self, folder, run, stage2_span):
        """A run's rows, one for each of its paths. stage2_span, as text, is what the Stage II of a
        Stage I run skips, or None."""
        student, span, f = load_student(folder, run, self.preset, self.device)
        if run["stage"] == 1 and stage2_span:
            span = parse_span(stage2_span, len(student.transformer_blocks))
        paths = run_paths(run["stage"], span, f)
        if self.settings.own_path:
            paths = paths[:1]
        if run["stage"] == 1:
            self.stage1[folder.name] = len(self.rows)     # where its own path will stand
        sigmas = sigma_grid(run["steps"])
        for suffix, span, f in paths:
            def sample(noise, prompt):
                latents, _, _ = roll_out(student, noise, prompt, sigmas, span, f)
                return latents[-1]
            recipe = {"run": str(folder), "path": suffix, "stage1": stage1_name(folder, run),
                      "span": f"{span[0]}-{span[1]}" if span else None,
                      "sigmas": [round(s, 6) for s in sigmas.tolist()]}
            for key in ("stage", "finished", "steps", "guidance", "alpha"):
                recipe[key] = run[key]
            # f counts in every row with a span, though plain reuse and skipping go without it.
            count = count_nfe(self.preset, span, run["steps"])
            self.add(folder.name + suffix, recipe, (count["blocks"], count["flops_with_f"]), sample)


def stage1_name(folder, run):
    """The name of the Stage I run that a run is or started from."""
    return folder.name if run["stage"] == 1 else Path(run["init"]).name


def count_nfe(preset, span, steps=2):
    """{"blocks", "flops", "flops_with_f"}: network evaluations of a student with span (n, m) or
    None, counted by blocks, by FLOPs, and by FLOPs with f. One evaluation is one full forward."""
    if not span:
        return {"blocks": float(steps), "flops": float(steps), "flops_with_f": float(steps)}
    # The paper counts blocks. Blocks are not all of a pass (embedding, projection), not all alike
    # (SD3.5-Medium has two kinds), and f is not free: so FLOPs are counted, too.
    config, _ = check_base(preset, offline=True)
    net = empty_transformer(config)
    with torch.device("meta"):
        f = make_compensation(net.inner_dim)
    shape = config["in_channels"], config["sample_size"], config["sample_size"]
    # A step that records, one that reuses Δ0 as it is, one with f.
    full, delta = forward_flops(net, shape, preset.tokens, span=span)
    plain, _ = forward_flops(net, shape, preset.tokens, span=span, delta=delta)
    with_f, _ = forward_flops(net, shape, preset.tokens, span=span, delta=delta, f=f)
    # Step one is one evaluation. Each later step counts as its share of a full one.
    return {"blocks": nfe(steps, span, config["num_layers"]),
            "flops": 1 + (steps - 1) * plain / full,
            "flops_with_f": 1 + (steps - 1) * with_f / full}


def run_paths(stage, span, f):
    """(suffix of the row's name, span, f) for each path that a run's student can take. First comes
    its own, the one that it was trained for; the others show what that training gains."""
    if stage == 1:
        # This student never met a cache. What does it lose with an untrained one? Little when Δ0
        # is reused as it is, very much when nothing stands in the span's place.
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
    digits = 2 if name == "accuracy_points" else 3
    end_digits = 2 if name in MEASURES else digits        # the first table is wide already
    low, high = interval
    return f"{value:.{digits}f} [{low:.{end_digits}f}, {high:.{end_digits}f}]"


def table(rows):
    """The rows as a Markdown table, then what changed against each run's own Stage I."""
    columns = []                                          # those that have a value in some row
    for column in COLUMNS:
        if any(row[column] is not None for row in rows):
            columns.append(column)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join([cell(row, column) for column in columns]) + " |")
    compared = [row for row in rows if "against" in row]
    if compared:
        lines += ["", "| run | against | accuracy, points | entropy, ratio | Fréchet, change |",
                  "|" + " --- |" * 5]
    for row in compared:
        cells = [cell(row["against"], name) for name in ("name", *CHANGES)]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(lines)


def save_grid(path, rows, albums, prompts, n):
    """The picture: of each row, with its name, the first four pictures of four prompts. A column
    shows one prompt, from one start noise."""
    indices = []                                          # of the pictures shown of each row
    for c in torch.linspace(0, prompts - 1, min(4, prompts)).long().tolist():
        indices += range(c * n, c * n + min(4, n))
    pictures = torch.cat([album.get(indices) for album in albums])        # rows·columns × 3×H×W
    if pictures.shape[-1] > 256:
        pictures = torch.nn.functional.interpolate(pictures, (256, 256), mode="area")
    save_pictures(pictures, path, columns=len(indices))
    # Make room on the left and write the names there.
    grid, font = Image.open(path), ImageFont.load_default(20)
    margin = 20 + int(max(font.getlength(row["name"]) for row in rows))
    sheet = Image.new("RGB", (grid.width + margin, grid.height), "white")
    sheet.paste(grid, (margin, 0))
    for i, row in enumerate(rows):
        place = 10, (i + 0.4) * grid.height / len(rows)
        ImageDraw.Draw(sheet).text(place, row["name"], "black", font)
    sheet.save(path)


# ================================================================== command

@command
def main(argv):
    settings = parse_settings(Settings, argv, "evaluate.py", __doc__.split("\n\n")[0])
    preset, texts, runs = resolve(settings)
    device, out = pick_device(preset, settings.device), Path(settings.out)
    n = settings.samples_per_prompt
    tiny_world = preset.is_tiny
    leader = next(iter(runs.values()))                    # first run: its w, α guide the teacher

    # ------------------------------------------------------------- the protocol
    if tiny_world:
        meter = TinyMeter(preset)
    else:
        from tools.real_metrics import RealMeter
        meter = RealMeter(settings.clip, settings.pickscore, settings.dino)
    # Numbers of two results.json compare only where the protocols are equal: other prompts, seeds,
    # n or feature networks give other numbers for the same model. Machine and date change none but
    # the seconds.
    protocol = {"model": preset.name, "seed": settings.seed, "samples_per_prompt": n,
                "prompts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
                "images": n * len(texts), "latent_shape": leader["latent_shape"],
                "device": str(device), **versions(), "resize": meter.resize, "frechet_to": None}
    if settings.teacher != "no":
        protocol["frechet_to"] = {"steps": TEACHER_STEPS, "guidance": leader["guidance"],
                                  "alpha": leader["alpha"]}

    # ------------------------------------------------------------- sample, row by row
    sampled = Rows(settings, preset, texts, leader["latent_shape"], device, protocol)
    if tiny_world:
        sampled.add_data()
    if settings.teacher != "no":
        sampled.add_teacher(leader["guidance"], leader["alpha"], leader["steps"])
    # A Stage I run is also shown with the span that its Stage II run, if there is one, skips.
    spans = {}                                            # {name of the Stage I run: span as text}
    for folder, run in runs.items():
        if run.get("cached_blocks", "none") != "none":
            spans.setdefault(stage1_name(folder, run), run["cached_blocks"])
    for folder, run in runs.items():
        sampled.add_run(folder, run, spans.get(folder.name))
    rows, albums = sampled.rows, sampled.albums

    # ------------------------------------------------------------- measure
    meter.to(device)                                      # now that the transformers are gone
    measured = []
    for row, album in zip(rows, albums, strict=True):
        groups = (album.get(range(c * n, (c + 1) * n)) for c in range(len(texts)))
        bar = tqdm(groups, f"measuring {row['name']}", len(texts), leave=False)
        measured.append(Measured(bar, texts, meter))
    # Rows lie in the order in which they were added: the data, the α-guided teacher, the others.
    data = measured[0] if tiny_world else None
    teacher = measured[int(tiny_world)] if settings.teacher != "no" else None
    slowest = None                                        # seconds of the paper's baseline, 28 × 2
    for row in rows:
        if row["nfe_blocks"] == 2 * TEACHER_STEPS:
            slowest = slowest or row["seconds_per_image"]
    for i, row in enumerate(tqdm(rows, desc="intervals", leave=False)):
        row |= measured[i].columns(teacher, data)
        row["by_prompt"] = {}                             # for tools/claims.py, which resamples it
        for name, values in measured[i].by_prompt.items():
            row["by_prompt"][name] = [round(v, 6) for v in values.tolist()]
        seconds = row["seconds_per_image"]
        row["speedup"] = slowest / seconds if slowest and seconds else None
        base = sampled.stage1.get(row["recipe"].get("stage1"))
        if base not in (None, i):                         # not against itself
            row["against"] = {"name": rows[base]["name"]}
            row["against"] |= compare(measured[i], measured[base], teacher)

    # ------------------------------------------------------------- the result
    text = table(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", {"protocol": protocol, "rows": rows,
                                      "missing": meter.missing})
    write_text(out / "table.md", text + "\n")
    save_grid(out / "grid.png", rows, albums, len(texts), n)
    print(text)
    for name, reason in meter.missing.items():
        print(f"{name}: not measured, {reason}")
    print(f"\n{n} samples for each of {len(texts)} prompts; {out}/results.json, {out}/grid.png")


if __name__ == "__main__":
    main()
