"""Measures runs beside their teacher and the data: one table, results.json and pictures.

    python evaluate.py                                  # the default runs, the teacher, the data
    python evaluate.py --checkpoint runs/a runs/b --samples-per-prompt 64 --out results/compare
    python evaluate.py --model sd3-medium --checkpoint RUN --prompts FILE --out results/medium
    python evaluate.py --benchmark                      # seconds of 28×2, two and 1.67 steps

Every row samples the same prompts from the same start noises. In the miniature world the exact
reader says whether the caption is right (prompt accuracy), how often the shape stands on its usual
scene, and the entropy over scenes in nats: the collapse that the paper cures shows as a usual scene
near 1 and an entropy near 0. The plug-in entropy grows with the samples per caption (data: 0.96 at
8, 1.13 at 32, 1.16 at 64). Real models have CLIP score, PickScore and LPIPS instead; their pictures
are kept, and the same command goes on where it was interrupted. Seconds count sampling and
decoding, not the text encoders. Measures and intervals: metrics.py.

Rows belong in one table only if their protocol is the same: --add takes the rows of an earlier
results.json or refuses them. A Stage II run is compared, prompt by prompt, with the Stage I run
that it started from.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cache import BlockCache
from metrics import Measured, RealMeter, TinyMeter, compare, weights_hash
from model import (Decoder, PromptBook, check_base, default_prompts, find_preset, load_transformer,
                   pick_device, read_prompts, save_pictures)
from run import (UserError, command, option, parse_settings, read_json, rng, versions, write_json,
                 write_text)
from sampler import (TEACHER_STEPS, count_nfe, image_noise, load_scheduler, load_student,
                     read_recipe, roll_out, sample_guided, sigma_grid, teacher_sigmas)

MEASURES = ("prompt_accuracy", "usual_scene", "scene_entropy", "clip_score", "pick_score",
            "diversity", "lpips", "frechet_to_teacher", "frechet_to_data")
COLUMNS = ("name", "nfe_blocks", "nfe_flops", "seconds_per_image", "speedup", *MEASURES)


@dataclasses.dataclass
class Settings:
    checkpoint: list = option(None, "run folders (default: runs/tiny-stage1, runs/tiny-stage2)")
    model: str = option("tiny", "base model of the runs")
    prompts: str = option(None, "file of prompts: text, one a line, or JSON lines with \"prompt\" "
                          "(tiny: its 24 captions)")
    seed: int = option(1, "start noises come from (seed, image index); not the training's",
                       low=0, high=2**31 - 1)
    samples_per_prompt: int = option(None, "n, samples for each prompt (tiny: 32, others: 4)",
                                     low=2, high=4096)
    batch_size: int = option(None, "images at a time; changes no picture (tiny: 128, others: 4)",
                             low=1)
    teacher: str = option("yes", "sample the teacher's rows too, minutes on a CPU; alpha = only "
                          "the one that Fréchet distances are taken to",
                          choices=("yes", "alpha", "no"))
    own_path: bool = option(False, "of each run its own path only, neither without the cache nor "
                            "with another one")
    out: str = option(None, "folder for results.json, table.md, grid.png (default: results/MODEL)")
    add: list = option(None, "results.json of earlier evaluations of the same protocol")
    clip: str = option(None, "folder or hub id of the CLIP score's CLIPModel")
    pickscore: str = option(None, "folder or hub id of PickScore's CLIPModel")
    dino: str = option(None, "folder or hub id of the Dinov2Model")
    benchmark: bool = option(False, "time 28×2, two and 1.67 steps instead: benchmark.py, its "
                             "options too")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


# ----------------------------------------------------------------------------- the table

def table(rows):
    """The rows as a Markdown table with intervals in brackets, then what changed against each run's
    own Stage I."""
    def cell(row, column):
        value = row[column]
        if value is None or isinstance(value, str):
            return value or ""
        if column not in MEASURES:
            return f"{value:.4g}" if column.startswith("nfe") else f"{value:.3g}"
        low, high = row[f"{column}_interval"]
        return f"{value:.3f} [{low:.2f}, {high:.2f}]"

    def change(against):
        return " | ".join("" if against[key] is None else
                          f"{against[key]:.{d}f} [{', '.join(f'{v:.{d}f}' for v in interval)}]"
                          for key, d in (("accuracy_points", 2), ("entropy_ratio", 3),
                                         ("frechet_change", 3))
                          for interval in [against[f"{key}_interval"]])
    columns = [c for c in COLUMNS if any(row[c] is not None for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row, column) for column in columns) + " |" for row in rows]
    compared = [row for row in rows if row.get("against", {}).get("name") not in (None,
                                                                                  row["name"])]
    if compared:
        lines += ["", "| run | against | accuracy, points | entropy, ratio | Fréchet, change |",
                  "|" + " --- |" * 5]
        lines += [f"| {row['name']} | {row['against']['name']} | {change(row['against'])} |"
                  for row in compared]
    return "\n".join(lines)


# ----------------------------------------------------------------------------- rows

def safe(name):
    """A name as one part of a path, whatever is in it."""
    return re.sub("[^A-Za-z0-9.=-]+", "_", name).strip("._") or "unnamed"


class Album:
    """The pictures of one row, image i at place i: in memory, or in a folder (real models), one PNG
    each, with images.jsonl telling prompt, seed and seconds of every one.

    A folder that holds part of them already goes on from there; `about` says what they are, and a
    folder of other pictures is refused.
    """

    def __init__(self, about, folder=None):
        self.folder, self.pictures, self.lines = folder, {}, {}
        if folder is None:
            return
        stamp, self.log = folder / "about.json", folder / "images.jsonl"
        if stamp.exists() and read_json(stamp) != about:
            raise UserError(f"{folder} holds pictures of another recipe, seed, prompts or version; "
                            "give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(stamp, about)
        for line in self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else ():
            # a kill cuts off lines, a full disk pictures; SyntaxError is PIL's word for that
            with contextlib.suppress(ValueError, KeyError, TypeError, OSError, SyntaxError):
                entry = json.loads(line)
                with Image.open(self.path(entry["index"])) as image:
                    image.load()
                self.lines[entry["index"]] = entry
        write_text(self.log, "".join(json.dumps(entry) + "\n" for entry in self.lines.values()))

    def path(self, index):
        """Where image `index` is kept: no prompt can name a file elsewhere."""
        return self.folder / f"{index:06d}.png"

    def put(self, index, picture, **told):
        """Keeps picture [3, H, W]; told: prompt, seed, seconds, passes."""
        self.lines[index] = {"index": index, **told}
        if self.folder is None:
            self.pictures[index] = picture
            return
        pixels, new = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8), self.folder / ".new"
        Image.fromarray(pixels.numpy()).save(new, format="PNG")
        os.replace(new, self.path(index))
        self.lines[index]["file"] = self.path(index).name
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.lines[index]) + "\n")

    def get(self, indices):
        """Pictures [n, 3, H, W] in [0, 1]."""
        if self.folder is None:
            return torch.stack([self.pictures[i] for i in indices])
        return torch.stack([torch.from_numpy(np.array(Image.open(self.path(i)).convert("RGB")))
                            for i in indices]).permute(0, 3, 1, 2) / 255

    def seconds(self):
        """Mean seconds of an image."""
        return sum(line["seconds"] for line in self.lines.values()) / len(self.lines)


def teacher_rows(preset, first, which, device):
    """(name, recipe, sampler) of the teacher's rows, guided by the first run's α and w; the first
    row is what Fréchet distances are taken to. sampler(noise, prompt, uncond) -> (latents, passes).
    """
    if which == "no":
        return
    teacher = load_transformer(preset).to(device)
    stock, own = teacher_sigmas(load_scheduler(preset)), sigma_grid(first["steps"])
    w, alpha, weights = first["guidance"], first["alpha"], weights_hash(teacher)
    for name, sigmas, guidance, a in (
            (f"teacher, w = {w:g} for sigma <= {alpha:g}", stock, w, alpha),
            (f"teacher, w = {w:g} everywhere", stock, w, 1.0),
            ("teacher, no guidance", stock, 1.0, 1.0),
            (f"teacher at {first['steps']} steps, not distilled", own, 1.0, 1.0))[
                :1 if which == "alpha" else None]:
        recipe = {"steps": len(sigmas) - 1, "guidance": guidance, "alpha": a, "span": None,
                  "sigmas": [round(s, 6) for s in sigmas.tolist()], "weights": weights}
        yield name, recipe, lambda x, prompt, uncond, g=(sigmas, guidance, a): sample_guided(
            teacher, x, prompt, uncond, *g)


def run_rows(run, recipe, preset, span, device):
    """(name, recipe, sampler) of a run's rows: its own path and, of Stage II, without the cache and
    with plain reuse. span is what a Stage I run skips for comparison, or None."""
    student, f = load_student(run, preset, recipe, device)
    own = recipe["cached_blocks"]
    paths = [("", f, "reuse" if own else None)]
    if own:
        paths.append((", no cache", None, None))
    if span and (f or recipe["stage"] == 1):
        paths.append((", plain reuse", None, "reuse"))
    if span and recipe["stage"] == 1:
        paths.append((", span skipped", None, "skip"))
    told = {key: recipe[key] for key in ("stage", "iteration", "steps", "sigmas", "guidance",
                                         "alpha")}
    weights = weights_hash(student, *([f] if f else []))
    for suffix, use, later in paths:
        def sampler(x, prompt, uncond, use=use, later=later):
            cache = BlockCache(student, span, use) if later else None
            latents = roll_out(student, x, prompt, sigma_grid(recipe["steps"]), cache, later)[0]
            if cache:
                cache.remove()
            return latents[-1], None
        yield run.name + suffix, {"run": str(run), "path": suffix, **told,
                                  "span": span if later else None, "weights": weights}, sampler


def added_rows(paths, protocol):
    """The rows of earlier results.json; UserError that names the keys in which their protocol
    differs: pictures of other prompts, seeds or code do not compare."""
    rows = []
    for path in paths or ():
        other = read_json(path)
        theirs, found = other.get("protocol"), other.get("rows")
        if not isinstance(theirs, dict) or not isinstance(found, list) or not all(
                isinstance(row, dict) and {*COLUMNS, "recipe"} <= row.keys() for row in found):
            raise UserError(f"--add {path} is no results.json of this version")
        differing = [f"{key} is {str(theirs.get(key))[:60]} there, {str(protocol.get(key))[:60]} "
                     "here" for key in sorted(theirs.keys() | protocol.keys())
                     if theirs.get(key) != protocol.get(key)]
        if differing:
            raise UserError(f"--add {path} was measured by another protocol, its rows do not "
                            f"belong in one table: {'; '.join(differing)}")
        rows += found
    return rows


# ----------------------------------------------------------------------------- command

@command
def main(argv):
    if "--benchmark" in argv:
        from benchmark import main as benchmark
        return benchmark([word for word in argv if word != "--benchmark"])
    settings = parse_settings(Settings, argv, "evaluate.py", __doc__.split("\n\n")[0])
    from tqdm import tqdm
    preset, device = find_preset(settings.model), pick_device(settings.device)
    tiny_world = preset.captions == "tiny"
    runs = [Path(run) for run in settings.checkpoint or ["runs/tiny-stage1"]]
    if not settings.checkpoint and Path("runs/tiny-stage2/distill.json").exists():
        runs.append(Path("runs/tiny-stage2"))
    if not tiny_world and not (settings.checkpoint and settings.prompts):
        raise UserError("real models need --checkpoint RUN and --prompts FILE")
    out = Path(settings.out or f"results/{safe(preset.name)}")
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder")
    recipes = {run: read_recipe(run) for run in runs}
    first = recipes[runs[0]]                                            # its α, w guide the teacher
    for run, recipe in recipes.items():
        if recipe["base"] != preset.name:
            raise UserError(f"{run} was distilled from {recipe['base']}, not from {preset.name}")
        if recipe["latent_shape"] != first["latent_shape"]:
            raise UserError(f"{run} makes pictures of another size than {runs[0]}")
    if len({run.name for run in recipes}) < len(recipes):
        raise UserError("two of the runs have the same name; the table could not tell them apart")
    prompts = read_prompts(settings.prompts) if settings.prompts else default_prompts(preset)
    if tiny_world and set(prompts) - set(default_prompts(preset)):
        raise UserError(f"--prompts {settings.prompts}: the exact reader knows the 24 captions of "
                        "the miniature only, such as \"a red circle\"")

    # ------------------------------------------------------------------ what every row shares
    check_base(preset)
    n = settings.samples_per_prompt or (32 if tiny_world else 4)
    meter = (TinyMeter(preset) if tiny_world
             else RealMeter(settings.clip, settings.pickscore, settings.dino))
    stamp = versions()
    made = {key: stamp.pop(key) for key in ("machine", "cores", "date")} | {"device": str(device)}
    pictures_of = {"model": preset.name, "seed": settings.seed, "samples_per_prompt": n,
                   "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
                   "images": n * len(prompts), "latent_shape": first["latent_shape"], **stamp}
    reference = {"steps": TEACHER_STEPS, "guidance": first["guidance"], "alpha": first["alpha"]}
    protocol = pictures_of | {
        "resize": meter.resize, "frechet_to": None if settings.teacher == "no" else reference,
        **{f"{name}_sha256": weights_hash(net) for name, net in meter.named_children()}}
    added = added_rows(settings.add, protocol)
    groups = torch.arange(n * len(prompts)).view(-1, n).tolist()    # prompt c has images groups[c]
    batches = torch.arange(n * len(prompts)).split(
        settings.batch_size or (128 if tiny_world else 4))
    book = PromptBook(preset, device, lambda i: [prompts[j // n] for j in batches[i].tolist()],
                      len(batches))
    decode = Decoder(preset, device)

    # ------------------------------------------------------------------ sampling, row by row
    def jobs():
        yield from teacher_rows(preset, first, settings.teacher, device)
        # a Stage I run is shown with the span that the first of its Stage II runs skips, too
        spans = {Path(recipe.get("init") or "").name: recipe["cached_blocks"]
                 for recipe in reversed(recipes.values()) if recipe["cached_blocks"]}
        for run, recipe in recipes.items():
            span = recipe["cached_blocks"] or spans.get(run.name)
            yield from itertools.islice(run_rows(run, recipe, preset, span, device),
                                        1 if settings.own_path else None)

    def fill(name, album, sampler):
        """Samples the pictures of a row that its album does not hold yet."""
        for i, batch in enumerate(tqdm(batches, desc=name, leave=False)):
            batch = [j for j in batch.tolist() if j not in album.lines]
            if not batch:
                continue
            texts = [prompts[j // n] for j in batch]
            prompt, uncond = book.of(texts, i), book.uncond(len(batch))
            start = time.perf_counter()
            with torch.inference_mode():
                noise = image_noise(settings.seed, batch, first["latent_shape"]).to(device)
                latents, passes = sampler(noise, prompt, uncond)
                pictures = decode(latents).clamp(0, 1).cpu()
            seconds = (time.perf_counter() - start) / len(batch)
            for j, text, picture in zip(batch, texts, pictures, strict=True):
                album.put(j, picture, prompt=text, seed=settings.seed, seconds=seconds,
                          passes=passes)

    rows, albums = [], []
    if tiny_world:
        from tiny import CAPTIONS, draw, sample_labels
        captions = torch.tensor([CAPTIONS.index(text) for text in prompts]).repeat_interleave(n)
        albums.append(Album({}))
        for i, picture in enumerate(draw(*sample_labels(
                len(captions), rng(settings.seed, "data"), captions))):
            albums[0].put(i, picture)
        rows.append({"name": "data", "recipe": {}, "steps": None, "nfe_blocks": None,
                     "nfe_flops": None, "seconds_per_image": None})
    for name, recipe, sampler in jobs():
        album = Album({"row": name, "recipe": recipe, "device": str(device), **pictures_of},
                      None if tiny_world else out / "images" / safe(name))
        fill(name, album, sampler)
        passes, counts = album.lines[0]["passes"], count_nfe(preset, recipe["span"],
                                                             recipe["steps"])
        albums.append(album)
        rows.append({"name": name, "recipe": recipe, "steps": recipe["steps"],
                     "nfe_blocks": passes or counts["blocks"],
                     "nfe_flops": passes or counts["flops_with_f"],
                     "seconds_per_image": album.seconds()})

    # ------------------------------------------------------------------ measuring
    meter.to(device)
    measured = [Measured(tqdm(map(album.get, groups), desc=f"measuring {row['name']}",
                              total=len(groups), leave=False), prompts, meter)
                for row, album in zip(rows, albums, strict=True)]
    data = measured[0] if tiny_world else None
    guided = measured[int(tiny_world)] if settings.teacher != "no" else None  # with the run's α
    slowest = next((row["seconds_per_image"] for row in rows if row["nfe_blocks"] == 56), None)
    stage1 = {Path(row["recipe"]["run"]).name: i for i, row in reversed(list(enumerate(rows)))
              if row["recipe"].get("stage") == 1}              # the run's own path, its first row
    for i, row in enumerate(tqdm(rows, desc="intervals", leave=False)):
        row.update({key: None for name in MEASURES for key in (name, f"{name}_interval")})
        row.update(measured[i].row(guided, data))
        row["by_prompt"] = {name: [round(v, 6) for v in values.tolist()]
                            for name, values in measured[i].by_prompt.items()}
        own = row["seconds_per_image"]
        row["speedup"] = slowest / own if slowest and own else None
        if row["recipe"].get("run"):
            own = Path(row["recipe"]["run"])
            base = stage1.get(Path(recipes[own].get("init") or own).name)
            if base is not None:
                row["against"] = {"name": rows[base]["name"],
                                  **compare(measured[i], measured[base], guided)}

    # ------------------------------------------------------------------ the result
    labels = [row["name"] for row in rows]
    rows += [row for row in added if row["recipe"] not in [other["recipe"] for other in rows]]
    text = table(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", {"protocol": protocol, "made": made, "rows": rows,
                                      "missing": meter.missing})
    write_text(out / "table.md", text + "\n")
    picks = torch.linspace(0, len(prompts) - 1, min(4, len(prompts))).long()  # × 4 seeds
    shown = torch.cat([album.get([i for c in picks for i in groups[c][:4]]) for album in albums])
    if shown.shape[-1] > 256:
        shown = torch.nn.functional.interpolate(shown, (256, 256), mode="area")
    save_pictures(shown, out / "grid.png", len(shown) // len(albums), labels=labels)
    print(text)
    for name, reason in meter.missing.items():
        print(f"{name}: not measured, {reason}")
    print(f"\n{n} samples for each of {len(prompts)} prompts; {out}/results.json, {out}/grid.png")


if __name__ == "__main__":
    main()
