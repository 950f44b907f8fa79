"""Measures runs beside their teacher and the data: one table, results.json and one picture.

    python evaluate.py                                  # the default runs, the teacher, the data
    python evaluate.py --checkpoint runs/a runs/b --samples-per-prompt 64 --out results/compare
    python evaluate.py --benchmark                      # seconds of 28×2, two and 1.67 steps

Every row samples the same captions from the same start noises. In the miniature world the exact
reader says whether the caption is right (prompt accuracy), how often the shape stands on its usual
scene, and the entropy over scenes in nats: the collapse that the paper cures shows as a usual scene
near 1 and an entropy near 0. The plug-in entropy grows with the samples per caption (data: 0.96 at
8, 1.13 at 32, 1.16 at 64): compare only rows of the same n, and with the data's row.
Fréchet distance and diversity (mean pairwise distance of features within a caption) use a network
that is not the discriminator's. Intervals are 95 % percentile bootstraps over captions. A Stage II
run is compared with the Stage I run that it started from, caption by caption.
"""

import dataclasses
import hashlib
import json
import statistics
import time
from pathlib import Path

import torch

import tiny
from cache import BlockCache, make_compensation, nfe, parse_span
from model import (Decoder, PromptBook, check_base, default_prompts, find_preset, load_transformer,
                   pick_device, save_pictures, velocity)
from run import (MAY_CHANGE, UserError, command, option, parse_settings, read_json, rng, versions,
                 write_json)
from sampler import (TEACHER_STEPS, count_nfe, image_noise, load_scheduler, load_student,
                     read_recipe, roll_out, sample_guided, sigma_grid, stock_sigmas,
                     teacher_sigmas)

MEASURES = ("prompt_accuracy", "usual_scene", "scene_entropy", "diversity", "frechet_to_teacher",
            "frechet_to_data")
COLUMNS = ("name", "nfe_blocks", "seconds_per_image", "speedup", *MEASURES)


@dataclasses.dataclass
class Settings:
    checkpoint: list = option(None, "run folders (default: runs/tiny-stage1, runs/tiny-stage2)")
    model: str = option("tiny", "base model of the runs")
    seed: int = option(1, "start noises come from (seed, image index); not the training's",
                       low=0, high=2**31 - 1)
    samples_per_prompt: int = option(32, "n, samples for each of the 24 captions", low=2, high=4096)
    batch_size: int = option(128, "images at a time; changes no picture", low=1)
    teacher: str = option("yes", "sample the teacher's rows too, minutes on a CPU; alpha = only "
                          "the one that Fréchet distances are taken to",
                          choices=("yes", "alpha", "no"))
    out: str = option("results/tiny", "folder for results.json, table.md and grid.png")
    benchmark: bool = option(False, "time 28×2, two and 1.67 steps instead, in one run, and stop")
    rounds: int = option(20, "benchmark: alternated rounds, of which the median counts", low=1)
    random_weights: bool = option(False, "benchmark: the true shape without its weights")
    resolution: int = option(None, "benchmark: pixels of a side", low=16, high=4096)
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


# ----------------------------------------------------------------------------- measures

def bootstrap(statistic, captions, rounds=1000):
    """95 % interval [low, high] of statistic(indices of captions), resampling captions."""
    drawn = torch.randint(captions, (rounds, captions), generator=rng(0, "bootstrap"))
    values = torch.tensor([float(statistic(index)) for index in drawn])
    return torch.quantile(values, torch.tensor([0.025, 0.975])).tolist()


def load_features(preset):
    """features(pictures [B, 3, 32, 32]) -> [B, F]: the pooled last map of the metric backbone,
    which has another seed, depth and width than the discriminator's."""
    from transformers import ConvNextV2Backbone
    net = ConvNextV2Backbone.from_pretrained(Path(preset.source) / "metric_backbone",
                                             dtype=torch.float32, use_safetensors=True).eval()

    def features(pictures):
        with torch.inference_mode():
            return torch.cat([net(part * 2 - 1).feature_maps[-1].mean((2, 3))
                              for part in pictures.split(256)]).double()
    return features


def moments(features):
    """Sums that Fréchet distance needs, by caption: features [c, n, F] -> ([c, F], [c, F, F]),
    so that a bootstrap over captions only adds."""
    return features.sum(1), torch.einsum("cni,cnj->cij", features, features)


def frechet(a, b, n):
    """Fréchet distance of two Gaussians, from moments ([c, F], [c, F, F]) of n samples a caption:
    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½)."""
    (mean_a, cov_a), (mean_b, cov_b) = (_gaussian(*part, n) for part in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * middle


def _gaussian(sums, squares, n):
    total = n * len(sums)
    mean = sums.sum(0) / total
    return mean, (squares.sum(0) - total * mean[:, None] * mean) / (total - 1)


class Measured:
    """What one row's pictures [captions·n, 3, 32, 32] (n in a row for each caption) are worth."""

    def __init__(self, pictures, captions, features):
        found = tiny.measure(pictures, captions)
        groups = len(found["scene_entropy"])
        by_caption = features(pictures).view(groups, -1, features(pictures[:1]).shape[1])
        self.n, self.moments = by_caption.shape[1], moments(by_caption)
        pairs = torch.cdist(by_caption, by_caption).sum((1, 2)) / (self.n * (self.n - 1))
        self.by_caption = {"prompt_accuracy": found["correct"].view(groups, -1).mean(1),
                           "usual_scene": found["usual"].view(groups, -1).mean(1),
                           "scene_entropy": found["scene_entropy"], "diversity": pairs}

    def row(self, teacher, data):
        """The measured columns with their intervals; teacher and data are Measured or None."""
        row, groups = {}, len(self.moments[0])
        for name, values in self.by_caption.items():
            row[name] = values.mean().item()
            row[f"{name}_interval"] = bootstrap(lambda i, v=values: v[i].mean(), groups)
        for name, other in (("frechet_to_teacher", teacher), ("frechet_to_data", data)):
            row[name] = row[f"{name}_interval"] = None
            if other not in (None, self):
                def distance(i, other=other):
                    return frechet([m[i] for m in self.moments], [m[i] for m in other.moments],
                                   self.n)
                row[name] = float(distance(torch.arange(groups)))
                row[f"{name}_interval"] = bootstrap(distance, groups, rounds=200)
        return row


def compare(pairs, teacher):
    """What changed from a run's Stage I to the run, as a mean over pairs (run, its Stage I run) of
    Measured; both saw the same captions and noises, so intervals resample captions of both alike.

    Returns accuracy in points, the ratio of scene entropies and the change of the Fréchet distance
    to the teacher (None without one), each with its interval.
    """
    def points(i):
        return 100 * sum((a.by_caption["prompt_accuracy"] - b.by_caption["prompt_accuracy"])[i]
                         for a, b in pairs).mean() / len(pairs)

    def ratio(i):
        one, other = (sum(p[k].by_caption["scene_entropy"][i].mean() for p in pairs)
                      for k in (0, 1))
        return one / other

    def change(i):
        at = [m[i] for m in teacher.moments]
        return sum(frechet([m[i] for m in a.moments], at, a.n)
                   - frechet([m[i] for m in b.moments], at, b.n) for a, b in pairs) / len(pairs)
    result, captions = {}, len(pairs[0][0].moments[0])
    for name, statistic, rounds in (("accuracy_points", points, 1000),
                                    ("entropy_ratio", ratio, 1000),
                                    ("frechet_change", change if teacher else None, 200)):
        result[name] = float(statistic(torch.arange(captions))) if statistic else None
        result[f"{name}_interval"] = (bootstrap(statistic, captions, rounds)
                                      if statistic else None)
    return result


def same_but_for_seed(run, path):
    """A key that runs share whose settings differ in seed, folders and pace of saving only."""
    settings = read_json(run / "settings.json")["settings"]
    ignored = MAY_CHANGE - {"iterations"} | {"seed", "init"}
    return path, json.dumps({k: v for k, v in settings.items() if k not in ignored})


def mean_rows(rows, measured, teacher):
    """For runs that differ in their seed alone: mean and standard deviation over the runs, and
    compare() of all of them."""
    groups, result = {}, []
    for i, row in enumerate(rows):
        if row["recipe"].get("run"):
            key = same_but_for_seed(Path(row["recipe"]["run"]), row["recipe"]["path"])
            groups.setdefault(key, []).append(i)
    for members in (group for group in groups.values() if len(group) > 1):
        mean = {"runs": [rows[i]["name"] for i in members]}
        for measure in MEASURES:
            values = [rows[i][measure] for i in members]
            if None not in values:
                mean[measure] = torch.tensor(values).mean().item()
                mean[f"{measure}_std"] = torch.tensor(values).std().item()
        if all("against" in rows[i] for i in members):
            mean["against"] = compare([(measured[i], measured[rows[i]["against"]["row"]])
                                       for i in members], teacher)
        result.append(mean)
    return result


def table(rows, means):
    """The rows as a Markdown table with intervals in brackets, what changed against each run's own
    Stage I, then the means over training seeds."""
    def cell(row, column):
        value = row[column]
        if value is None or isinstance(value, str):
            return value or ""
        if column not in MEASURES:
            return f"{value:.3g}" if column != "nfe_blocks" else f"{value:.4g}"
        low, high = row[f"{column}_interval"]
        return f"{value:.3f} [{low:.2f}, {high:.2f}]"

    def change(against):
        return " | ".join("" if against[key] is None else
                          f"{against[key]:.{d}f} [{', '.join(f'{v:.{d}f}' for v in interval)}]"
                          for key, d in (("accuracy_points", 2), ("entropy_ratio", 3),
                                         ("frechet_change", 3))
                          for interval in [against[f"{key}_interval"]])
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row, column) for column in COLUMNS) + " |" for row in rows]
    compared = [row for row in rows if row.get("against", {}).get("name") not in (None,
                                                                                  row["name"])]
    if compared:
        lines += ["", "| run | against | accuracy, points | entropy, ratio | Fréchet, change |",
                  "|" + " --- |" * 5]
        lines += [f"| {row['name']} | {row['against']['name']} | {change(row['against'])} |"
                  for row in compared]
    if means:
        lines += ["", "| mean ± std over runs | " + " | ".join(MEASURES)
                  + " | accuracy, points | entropy, ratio | Fréchet, change |",
                  "|" + " --- |" * (len(MEASURES) + 4)]
    for mean in means:
        lines.append(f"| {', '.join(mean['runs'])} | " + " | ".join(
            f"{mean[m]:.3f} ± {mean[f'{m}_std']:.3f}" if m in mean else "" for m in MEASURES)
            + f" | {change(mean['against']) if 'against' in mean else ' | | '} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- benchmark

def alternate(paths, rounds, device):
    """Median seconds of each of `paths`, {name: callable}, called in turn `rounds` times after one
    call to warm up: on a shared machine only times of one run, taken alternately, compare."""
    times = {name: [] for name in paths}
    for turn in range(rounds + 1):
        for name, path in paths.items():
            start = time.perf_counter()
            path()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark(preset, device, rounds, random_weights, resolution):
    """Prints what the numbers of evaluations are worth in seconds: the transformer's forwards of
    28×2, two and 1.67 steps against one full forward, and whole images of the stock pipeline.

    The transformer runs in bf16 (tiny: fp32), f too. The ideal is the count by blocks, without f:
    the ratio to it is what hooks and f cost.
    """
    from diffusers import StableDiffusion3Pipeline
    dtype = torch.float32 if preset.captions == "tiny" else torch.bfloat16
    net = load_transformer(preset, dtype, random_weights).to(device)
    c, span = net.config, parse_span(preset.cached_blocks, net.config.num_layers)
    torch.manual_seed(0)
    f = make_compensation(net.inner_dim).to(device, dtype)
    side = resolution // 8 if resolution else c.sample_size
    x = torch.randn(1, c.in_channels, side, side, device=device)
    tokens = 77 + preset.text_length if preset.text_length else 8
    prompt = (torch.randn(1, tokens, c.joint_attention_dim, device=device, dtype=dtype),
              torch.randn(1, c.pooled_projection_dim, device=device, dtype=dtype))
    two = [torch.cat([part, part]) for part in (x, *prompt)]
    sigmas = sigma_grid(2)

    def cached():
        cache = BlockCache(net, span, f)
        roll_out(net, x, prompt, sigmas, cache)
        cache.remove()
    ideal = nfe(2, span, c.num_layers)
    with torch.inference_mode():
        t = alternate({"one": lambda: velocity(net, x, 0.75, prompt),
                       "guided": lambda: velocity(net, two[0], 0.75, two[1:]),
                       "2": lambda: roll_out(net, x, prompt, sigmas), "1.67": cached},
                      rounds, device)
    print(f"{preset.name}, {dtype}, {device}, latents {side}×{side}, {tokens} text tokens, "
          f"medians of {rounds} alternated rounds, {versions()}")
    print("transformer alone        seconds   in full forwards")
    for name, seconds in (("one full forward", t["one"]), ("28×2 (28 × a batch of two)",
                          TEACHER_STEPS * t["guided"]), ("two steps", t["2"]),
                          (f"{ideal:.3f} steps, f", t["1.67"])):
        print(f"{name:27}{seconds:9.4f}{seconds / t['one']:10.3f}")
    print(f"{ideal:.3f} steps against the ideal {ideal:.3f} × one full forward: "
          f"{t['1.67'] / ideal / t['one']:.4f}; 28×2 over it: "
          f"{TEACHER_STEPS * t['guided'] / t['1.67']:.1f}×")
    if random_weights:
        return
    without_t5 = {} if preset.text_length else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(preset.source, transformer=net,
                                                    torch_dtype=dtype, use_safetensors=True,
                                                    **without_t5).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt=default_prompts(preset)[0], max_sequence_length=preset.text_length,
                height=side * pipe.vae_scale_factor, width=side * pipe.vae_scale_factor)
    student = dict(call, sigmas=stock_sigmas(2), num_inference_steps=2, guidance_scale=1.0)

    def cached_image():
        cache = BlockCache(net, span, f)
        pipe(**student)
        cache.remove()
    t = alternate({"28×2": lambda: pipe(**call, guidance_scale=preset.guidance),
                   "2": lambda: pipe(**student), "1.67": cached_image}, min(rounds, 5), device)
    print("whole image, text and VAE too: " + ", ".join(
        f"{name} {seconds:.4f} s" for name, seconds in t.items())
        + f"; 28×2 over 1.67: {t['28×2'] / t['1.67']:.1f}×")


# ----------------------------------------------------------------------------- command

@command
def main(argv):
    settings = parse_settings(Settings, argv, "evaluate.py", __doc__.split("\n\n")[0])
    from tqdm import tqdm
    runs = [Path(run) for run in settings.checkpoint or ["runs/tiny-stage1"]]
    if not settings.checkpoint and Path("runs/tiny-stage2/distill.json").exists():
        runs.append(Path("runs/tiny-stage2"))
    if Path(settings.out).is_file():
        raise UserError(f"--out {settings.out} is a file; give a folder")
    preset, device = find_preset(settings.model), pick_device(settings.device)
    if settings.benchmark:
        return benchmark(preset, device, settings.rounds, settings.random_weights,
                         settings.resolution)
    if preset.captions != "tiny":
        raise UserError("evaluate.py measures the miniature world (--model tiny); metrics for real "
                        "models are not there yet, sampler.py makes their pictures")
    recipes = {run: read_recipe(run) for run in runs}
    for run, recipe in recipes.items():
        if recipe["base"] != preset.name:
            raise UserError(f"{run} was distilled from {recipe['base']}, not from {preset.name}")

    # ------------------------------------------------------------------ what every row shares
    prompts, config, n = default_prompts(preset), check_base(preset), settings.samples_per_prompt
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    captions = torch.arange(len(prompts)).repeat_interleave(n)          # image i shows captions[i]
    batches = torch.arange(len(captions)).split(settings.batch_size)
    book = PromptBook(preset, device, lambda i: [], 0, keep=prompts)
    decode, features = Decoder(preset, device), load_features(preset)
    first = recipes[runs[0]]                                            # its α, w guide the teacher

    def sample(name, sampler):
        """(pictures, passes, seconds per image) of sampler(noise, prompt) -> (latents, passes)."""
        pictures, start = [], time.perf_counter()
        with torch.inference_mode():
            for batch in tqdm(batches, desc=name, leave=False):
                noise = image_noise(settings.seed, batch, shape).to(device)
                latents, passes = sampler(noise, book.of([prompts[c] for c in captions[batch]]))
                pictures.append(decode(latents).clamp(0, 1).cpu())
        return torch.cat(pictures), passes, (time.perf_counter() - start) / len(captions)

    # ------------------------------------------------------------------ the rows
    jobs = []                                                             # (name, recipe, sampler)
    if settings.teacher != "no":
        teacher = load_transformer(preset).to(device)
        stock, own = teacher_sigmas(load_scheduler(preset)), sigma_grid(first["steps"])
        w, alpha = first["guidance"], first["alpha"]
        for name, sigmas, guidance, a in (
                (f"teacher, w = {w:g} for sigma <= {alpha:g}", stock, w, alpha),
                (f"teacher, w = {w:g} everywhere", stock, w, 1.0),
                ("teacher, no guidance", stock, 1.0, 1.0),
                (f"teacher at {first['steps']} steps, not distilled", own, 1.0, 1.0))[
                    :1 if settings.teacher == "alpha" else None]:
            recipe = {"steps": len(sigmas) - 1, "guidance": guidance, "alpha": a, "span": None,
                      "sigmas": [round(s, 6) for s in sigmas.tolist()]}
            jobs.append((name, recipe, lambda x, prompt, g=(sigmas, guidance, a): sample_guided(
                teacher, x, prompt, book.uncond(len(x)), *g)))
    spans = [recipe["cached_blocks"] for recipe in recipes.values() if recipe["cached_blocks"]]
    for run, recipe in recipes.items():
        student, f = load_student(run, preset, recipe, device)
        told = {key: recipe[key] for key in ("stage", "iteration", "steps", "sigmas", "guidance",
                                             "alpha")}
        span = recipe["cached_blocks"] or (spans[0] if spans and recipe["steps"] > 1 else None)
        paths = [("", f, "reuse" if recipe["cached_blocks"] else None)]
        if recipe["cached_blocks"]:
            paths.append((", no cache", None, None))
        if span and (f or recipe["stage"] == 1):
            paths.append((", plain reuse", None, "reuse"))
        if span and recipe["stage"] == 1:
            paths.append((", span skipped", None, "skip"))
        for suffix, use, later in paths:
            def sampler(x, prompt, student=student, recipe=recipe, span=span, use=use, later=later):
                cache = BlockCache(student, span, use) if later else None
                latents = roll_out(student, x, prompt, sigma_grid(recipe["steps"]), cache, later)[0]
                if cache:
                    cache.remove()
                return latents[-1], None
            jobs.append((run.name + suffix, {"run": str(run), "path": suffix, **told,
                                             "span": span if later else None}, sampler))

    drawn = tiny.draw(*tiny.sample_labels(len(captions), rng(settings.seed, "data"), captions))
    rows = [{"name": "data", "recipe": {}, "steps": None, "nfe_blocks": None, "nfe_flops": None,
             "seconds_per_image": None}]
    shown, measured = [drawn], [Measured(drawn, captions, features)]
    for name, recipe, sampler in jobs:
        pictures, passes, seconds = sample(name, sampler)
        counts = count_nfe(preset, recipe["span"], recipe["steps"])
        rows.append({"name": name, "recipe": recipe, "steps": recipe["steps"],
                     "nfe_blocks": passes or counts["blocks"],
                     "nfe_flops": passes or counts["flops_with_f"], "seconds_per_image": seconds})
        shown.append(pictures)
        measured.append(Measured(pictures, captions, features))
    guided = measured[1] if settings.teacher != "no" else None           # with the run's α
    slowest = next((row["seconds_per_image"] for row in rows if row["nfe_blocks"] == 56), None)
    stage1 = {Path(row["recipe"]["run"]).name: i for i, row in reversed(list(enumerate(rows)))
              if row["recipe"].get("stage") == 1}              # the run's own path, its first row
    for i, row in enumerate(tqdm(rows, desc="intervals", leave=False)):
        row.update(measured[i].row(guided, measured[0]))
        own = row["seconds_per_image"]
        row["speedup"] = slowest / own if slowest and own else None
        if row["recipe"].get("run"):
            own = Path(row["recipe"]["run"])
            base = stage1.get(Path(recipes[own].get("init") or own).name)
            if base is not None:
                row["against"] = {"name": rows[base]["name"], "row": base,
                                  **compare([(measured[i], measured[base])], guided)}

    # ------------------------------------------------------------------ the result
    protocol = {"prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
                "seed": settings.seed, "samples_per_prompt": n, "images": len(captions),
                "reader": "exact", "features": "metric_backbone", "resize": None,
                "teacher_steps": TEACHER_STEPS, "device": str(device), **versions()}
    means, out = mean_rows(rows, measured, guided), Path(settings.out)
    text = table(rows, means)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", {"protocol": protocol, "rows": rows, "means": means})
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    pick = [c * n + j for c in (0, 8, 16, 21) for j in range(min(n, 4))]  # 4 captions × 4 seeds
    save_pictures(torch.cat([pictures[pick] for pictures in shown]), out / "grid.png", len(pick),
                  labels=[row["name"] for row in rows])
    print(text)
    print(f"\n{n} samples for each of {len(prompts)} captions; {out}/results.json, {out}/grid.png")


if __name__ == "__main__":
    main()
