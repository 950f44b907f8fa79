r"""Sampling: one sigma grid, the teacher's guided sampler, the few-step student,
and pictures from a run.

    python sampler.py --checkpoint runs/tiny-stage1 --prompt "a red circle" \
                      --num-images 16 --out grid.png

The grid and the Euler step here are the ones that training uses and that the stock pipeline
reproduces when it is called with `sigmas=[...]` (distill.json holds the exact call).
`num_inference_steps=2` alone would give the stock pipeline σ = 1, 0.0089, 0 instead of 1, 0.75, 0:
a wrong grid that shows as blurred pictures.
NFE counts network passes; guidance doubles a pass where it is on.
Dimension key: B batch, C H W latents.
"""

import contextlib
import dataclasses
import itertools
import time
from pathlib import Path

import torch

from cache import BlockCache, make_compensation, nfe, parse_span
from losses import euler, guide, shift_sigma
from model import (PRESETS, Decoder, PromptBook, check_base, choose_prompts, find_preset,
                   pick_device, save_pictures, velocity, warn_unknown_words)
from run import (FORMAT, UserError, World, checkpoints, command, option, parse_settings, read_json,
                 rng)

TEACHER_STEPS = 28      # [paper] the teacher runs 28 × 2


# ----------------------------------------------------------------------------- grids and noise

def sigma_grid(steps, shift=3.0):
    """The student's sigmas, fp32 [steps + 1], from 1 (noise) to 0:
    two steps are 1, 0.75, 0 (official, shift 3)."""
    return shift_sigma(1 - torch.arange(steps + 1) / steps, shift)


def stock_sigmas(steps):
    """What to pass as `sigmas` to the stock pipeline, which shifts by itself:
    [1.0, 0.5] for two steps."""
    return [round(1 - i / steps, 6) for i in range(steps)]


def load_scheduler(preset, random_weights=False):
    """The base model's own FlowMatchEulerDiscreteScheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    if random_weights and preset.architecture:
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return FlowMatchEulerDiscreteScheduler.from_pretrained(preset.source, subfolder="scheduler")


def teacher_sigmas(scheduler, steps=TEACHER_STEPS):
    """The stock scheduler's own sigmas, fp32 [steps + 1]:
    with 28 steps and α = 0.94, five lie above α."""
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.cpu()


def image_noise(seed, indices, shape, who="image"):
    """Start noise [B, C, H, W], each image from (seed, who, its index) alone: the batch size
    changes no picture. who="training" has noises that no sample or evaluation ever uses."""
    return torch.stack([torch.randn(shape, generator=rng(seed, who, int(i))) for i in indices])


# ----------------------------------------------------------------------------- samplers

def roll_out(student, x, prompt, sigmas, cache=None, later="reuse"):
    """The student's path from noise x [B, C, H, W]:
    (latents at every sigma, velocities at every step).

    Deterministic Euler (official η = 1). There are N + 1 latents, the last one is the sample,
    and N velocities. With a cache the first step records and the later ones "reuse" (or "skip").
    """
    latents, velocities = [x], []
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        with cache.step("record" if step == 0 else later) if cache else contextlib.nullcontext():
            velocities.append(velocity(student, latents[-1], sigma, prompt))
        latents.append(euler(latents[-1], velocities[-1], sigma, sigma_next))
    return latents, velocities


def guided_velocity(net, x, sigma, prompt, uncond, guidance, alpha):
    """The teacher's velocity [B, C, H, W] by Eq. 4: conditional and unconditional pass, always
    both, as one batch. sigma [B] or a number; prompt, uncond (embeds, pooled)."""
    twice = torch.cat([sigma, sigma]) if torch.is_tensor(sigma) else sigma
    both = velocity(net, torch.cat([x, x]), twice,
                    [torch.cat(part) for part in zip(prompt, uncond, strict=True)])
    return guide(*both.chunk(2), sigma, guidance, alpha)


def sample_guided(net, x, prompt, uncond, sigmas, guidance, alpha=1.0):
    """(latents [B, C, H, W], passes): Euler with the guidance rule of Eq. 4,
    α = 1 being guidance everywhere.

    Where guidance is off only the conditional pass is run, so 28 steps cost 56 passes at α = 1,
    51 at α = 0.94 and 28 at guidance 1.
    """
    passes = 0
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        if guidance != 1 and sigma <= alpha:
            v = guided_velocity(net, x, sigma, prompt, uncond, guidance, alpha)
            passes += 2
        else:
            v = velocity(net, x, sigma, prompt)
            passes += 1
        x = euler(x, v, sigma, sigma_next)
    return x, passes


# ----------------------------------------------------------------------------- runs

def recipe_of(preset, stage, steps, alpha, guidance, shape, pixels=None, random_weights=False):
    """The content of distill.json: what is needed to sample a run,
    and the stock call that gives the same picture. pixels: a side that is not the model's own."""
    size = f", height={pixels}, width={pixels}" if pixels else ""
    t5 = "" if preset.text_length else ", text_encoder_3=None, tokenizer_3=None"
    return {
        "format": FORMAT, "base": preset.name, "stage": stage, "iteration": 0, "steps": steps,
        "sigmas": [round(s, 6) for s in sigma_grid(steps).tolist()],
        "alpha": alpha, "guidance": guidance, "cached_blocks": None, "nfe": float(steps),
        "latent_shape": list(shape), "random_weights": random_weights,
        "stock_call": f"StableDiffusion3Pipeline.from_pretrained({preset.source!r}, "
                      f"transformer=SD3Transformer2DModel.from_pretrained('RUN/student'){t5})"
                      f"(prompt, sigmas={stock_sigmas(steps)}, num_inference_steps={steps}, "
                      f"guidance_scale=1.0, max_sequence_length={preset.text_length}{size})"}


def read_recipe(folder, random_weights=False):
    """The checked distill.json of a run folder; UserError when it is missing, foreign or nonsense,
    or, unless random_weights, of a run that only tried a machine."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}; "
                        "python train_stage1.py makes runs/tiny-stage1")
    recipe = read_json(folder / "distill.json")
    if recipe.get("format") != FORMAT:
        raise UserError(f"{folder}/distill.json has format {recipe.get('format')!r}; "
                        f"this code reads {FORMAT}")
    rules = {"base": str, "stage": int, "iteration": int, "steps": int, "alpha": float,
             "guidance": float, "nfe": float, "init": str, "cached_blocks": str}
    optional = {"init", "cached_blocks"}
    for key, kind in rules.items():
        if type(recipe.get(key)) not in ((int, float) if kind is float else (kind,)) and not (
                key in optional and recipe.get(key) is None):
            raise UserError(f"{folder}/distill.json: {key} is {str(recipe.get(key))[:80]!r}, "
                            f"not {kind.__name__}")
    if not (1 <= recipe["steps"] <= 1000
            and 0 <= recipe["alpha"] <= 1 <= recipe["guidance"] <= 100):
        raise UserError(f"{folder}/distill.json: steps not between 1 and 1000, alpha not between "
                        "0 and 1, or guidance not between 1 and 100")
    if recipe.get("cached_blocks"):
        parse_span(recipe["cached_blocks"], 10_000)         # its form; BlockCache knows the model
    if recipe.get("random_weights") and not random_weights:
        raise UserError(f"{folder} was made with --random-weights, to try a machine: "
                        "there is nothing to see in it")
    shape = recipe.get("latent_shape")
    if not (isinstance(shape, list) and len(shape) == 3
            and all(type(n) is int and 1 <= n <= 1024 for n in shape)):
        raise UserError(f"{folder}/distill.json: latent_shape is {shape!r}, "
                        "not three small integers")
    return recipe


def load_student(folder, preset, recipe, device):
    """(transformer, f or None) of a run, finished or not:
    the result or, when that is older, the newest checkpoint."""
    from diffusers import SD3Transformer2DModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = Path(folder)
    saved = checkpoints(folder)
    newest = int(saved[-1].name[-6:]) if saved else -1
    finished = (folder / "student" / "config.json").exists() and recipe["iteration"] >= newest
    if not finished and not saved:
        raise UserError(f"{folder} holds neither student/ nor a checkpoint yet")
    compensation = None
    try:
        if finished:
            net = SD3Transformer2DModel.from_pretrained(
                folder / "student", torch_dtype=torch.float32, use_safetensors=True)
        else:
            net = SD3Transformer2DModel.from_config(
                check_base(preset, recipe.get("random_weights")))
            net.load_state_dict(load_file(saved[-1] / "student.safetensors"))
        if recipe["cached_blocks"] and recipe.get("compensation", True):
            compensation = make_compensation(net.inner_dim)
            compensation.load_state_dict(load_file(
                (folder if finished else saved[-1]) / "compensation.safetensors"))
            compensation.to(device).eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: its student does not load "
                        f"({str(error).splitlines()[0][:160]})") from error
    c, (channels, *sides) = net.config, recipe["latent_shape"]
    if channels != c.in_channels or max(sides) > c.pos_embed_max_size * c.patch_size:
        raise UserError(f"{folder}/distill.json: latent_shape {recipe['latent_shape']} does not "
                        f"fit its student")
    return net.to(device).eval(), compensation


class Gallery:
    """The sample grid of a training run: always the same prompts (rows) and seeds (columns)."""

    def __init__(self, preset, prompts):
        self.size = 8 if preset.captions == "tiny" else 4
        order = torch.randperm(len(prompts), generator=rng(0, "gallery"))
        self.prompts = [prompts[j] for j in order[:self.size]]

    def save(self, path, student, book, decode, shape, sigmas, cache=None):
        """Samples the grid and writes it to path. All processes call it; the first one writes."""
        pictures = []
        with torch.no_grad():
            for row, prompt in enumerate(self.prompts):
                indices = range(row * self.size, (row + 1) * self.size)
                noise = image_noise(42, indices, shape).to(book.device)
                latents = roll_out(student, noise, book.of([prompt] * self.size), sigmas, cache)[0]
                pictures += [decode(one).cpu() for one in latents[-1].split(1)]
        if World().first:
            save_pictures(torch.cat(pictures), path, self.size)


# ----------------------------------------------------------------------------- NFE meter

def forward_flops(net, shape, tokens, cache=None, mode="full"):
    """FLOPs of one forward of a transformer on the meta device, for one sample of latents `shape`
    [C, H, W] and `tokens` text tokens; with a cache, of the step that mode names."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        call = dict(hidden_states=torch.zeros(1, *shape), timestep=torch.zeros(1),
                    encoder_hidden_states=torch.zeros(1, tokens, net.config.joint_attention_dim),
                    pooled_projections=torch.zeros(1, net.config.pooled_projection_dim))
        with (torch.no_grad(), FlopCounterMode(display=False) as counter,
              cache.step(mode) if cache else contextlib.nullcontext()):
            net(**call, return_dict=False)
    return counter.get_total_flops()


def count_nfe(preset, span, steps=2):
    """{"blocks", "flops", "flops_with_f"}: network evaluations of a student with span "n-m" or
    None.

    Counted on meta tensors, so without weights or GPU, at the preset's own picture size and text
    length. One evaluation is one full forward of the same network; f's cost shows in the last only.
    """
    if not span:
        return {"blocks": float(steps), "flops": float(steps), "flops_with_f": float(steps)}
    from diffusers import SD3Transformer2DModel
    with torch.device("meta"):
        net = SD3Transformer2DModel.from_config(preset.architecture or check_base(preset)).eval()
        f = make_compensation(net.inner_dim)
    c, later = net.config, {}
    of = (net, (c.in_channels, c.sample_size, c.sample_size), preset.tokens)
    full = forward_flops(*of)
    for name, use in (("flops", None), ("flops_with_f", f)):
        cache = BlockCache(net, span, use)
        forward_flops(*of, cache, "record")
        later[name] = 1 + (steps - 1) * forward_flops(*of, cache, "reuse") / full
        cache.remove()
    return {"blocks": nfe(steps, parse_span(span, c.num_layers), c.num_layers), **later}


def nfe_table():
    """The NFE of every preset's span, and of SD3-Medium's slow one, as text."""
    lines = [f"{'model':14}{'span':>8}{'blocks':>9}{'FLOPs':>9}{'with f':>9}"
             "   of two steps; the teacher: 56"]
    for preset in PRESETS.values():
        slow = {"sd3-medium": ["2-7"], "tiny": ["1-3"]}.get(preset.name, [])
        for span in [preset.cached_blocks, *slow]:
            n = count_nfe(preset, span)
            lines.append(f"{preset.name:14}{span:>8}{n['blocks']:9.3f}{n['flops']:9.3f}"
                         f"{n['flops_with_f']:9.3f}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- command

@dataclasses.dataclass
class Settings:
    checkpoint: str = option(
        None, "run folder of train_stage1.py or train_stage2.py, finished or not")
    prompt: str = option(None, "one prompt")
    prompts: str = option(None, "file of prompts: text, one a line, or JSON lines with \"prompt\"")
    num_images: int = option(4, "images for each prompt", low=1, high=100_000)
    seed: int = option(42, "noise of image i is drawn from (seed, i)", low=0, high=2**31 - 1)
    batch_size: int = option(16, "images at a time; changes no picture", low=1)
    no_cache: bool = option(False, "run every block in every step, though the run has a cache")
    out: str = option("grid.png", "the picture, one row a prompt")
    nfe_table: bool = option(False, "print the network evaluations of every preset and stop")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    debug: bool = option(False, "show tracebacks")


@command
def main(argv):
    settings = parse_settings(Settings, argv, "sampler.py", __doc__.split("\n\n")[0])
    if settings.nfe_table:
        print(nfe_table())
        return
    if not settings.checkpoint:
        raise UserError("--checkpoint RUN is needed, for instance runs/tiny-stage1")
    if Path(settings.out).suffix != ".png" or Path(settings.out).is_dir():
        raise UserError(f"--out {settings.out}: give a file name that ends in .png")
    if settings.prompt and settings.prompts:
        raise UserError("give --prompt or --prompts, not both")
    recipe = read_recipe(settings.checkpoint)
    preset, device = find_preset(recipe["base"]), pick_device(settings.device)
    texts = ([settings.prompt] if settings.prompt
             else choose_prompts(preset, settings.prompts)[:1000])
    if settings.prompt:
        warn_unknown_words(preset, texts)
    student, compensation = load_student(settings.checkpoint, preset, recipe, device)
    cached = recipe["cached_blocks"] and not settings.no_cache
    cache = BlockCache(student, recipe["cached_blocks"], compensation) if cached else None
    decode, sigmas = Decoder(preset, device), sigma_grid(recipe["steps"])
    jobs = [text for text in texts for _ in range(settings.num_images)]    # image i shows jobs[i]
    chunks = [range(i, min(i + settings.batch_size, len(jobs)))
              for i in range(0, len(jobs), settings.batch_size)]
    book = PromptBook(preset, device, lambda i: [jobs[j] for j in chunks[i]], len(chunks))
    pictures, start = [], time.perf_counter()
    with torch.inference_mode():
        for i, chunk in enumerate(chunks):
            latents = roll_out(
                student, image_noise(settings.seed, chunk, recipe["latent_shape"]).to(device),
                book(i), sigmas, cache)[0][-1]
            pictures += [decode(one).cpu() for one in latents.split(1)]
    seconds = time.perf_counter() - start
    columns = settings.num_images if len(texts) > 1 else max(1, round(len(jobs) ** 0.5))
    save_pictures(torch.cat(pictures), settings.out, columns)
    print(f"{settings.out}: {len(jobs)} images, "
          f"{recipe['nfe'] if cached else recipe['steps']:.4g} network evaluations each, "
          f"{seconds:.1f} s")


if __name__ == "__main__":
    main()
