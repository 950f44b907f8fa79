r"""Sampling: the sigma grids, the 1.67-step sampler, the teacher's guided sampler, the NFE meter,
and pictures from a run.

    python sampler.py --prompt "a red circle" --num-images 16      # at once, without training
    python sampler.py --checkpoint runs/tiny-stage2 --prompts FILE
    python sampler.py --nfe-table                  # network evaluations of every model and span

The grid and the roll-out here are the ones that training uses and that the stock pipeline
reproduces when it is called with `sigmas=[...]` (distill.json of a run holds the exact call).
NFE is the number of network evaluations; guidance doubles an evaluation where it is on.

Dimension key: B batch, C latent channels, H W latent size, N student steps, L text tokens, J and P
widths of the text embeddings (model.py).
"""

import dataclasses
import itertools
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tools.settings import UserError, command, option, parse_settings
from tools.processes import first
from run import (FORMAT, checkpoints, content_of, digest, read_json, replace_file, rng,
                 write_json)
from cache import CachedSD3, make_compensation, nfe
from losses import euler, guidance_weight, guide, shift_sigma
from model import (PRESETS, Decoder, Prompts, add_lora, base_config, base_content, call_network,
                   check_whole, choose_prompts, empty_transformer, find_preset, loading, merge_lora,
                   parse_span, pick_device, read_transformer, variant, velocity)

TEACHER_STEPS = 28      # [paper] the teacher runs 28 × 2
COMMITTED = str(Path(__file__).resolve().parent / "tiny" / "student")    # the default runs' result


# ================================================================== grids and noise

def sigma_grid(steps):
    """The student's sigmas, fp32 [N + 1], from 1 (noise) to 0: two steps are 1, 0.75, 0; four are
    1, 0.9, 0.75, 0.5, 0 [official, shift 3]."""
    # Equal steps in u, then the base model's shift: the first step, short in σ, decides what the
    # paper calls structure; the last one, long in σ, fills in the details.
    u = 1 - torch.arange(steps + 1) / steps                               # N+1: 1, 0.5, 0
    return shift_sigma(u)                                                 # N+1: 1, 0.75, 0


def stock_sigmas(steps):
    """What to pass as `sigmas` to the stock pipeline: [1.0, 0.5] for two steps."""
    # The stock scheduler shifts what it is given and adds the final 0 itself, so pass u, not σ.
    # Never rely on num_inference_steps=2 alone. The scheduler then spreads two steps over all of
    # its noise levels, from the highest to the lowest, and shifts these (the lowest was shifted
    # before): σ = 1, 0.0089, 0 instead of 1, 0.75, 0. So step one jumps from pure noise nearly to
    # the picture, farther than it was trained to, and the picture is blurred.
    return [round(1 - i / steps, 6) for i in range(steps)]


def load_scheduler(preset):
    """The base model's own FlowMatchEulerDiscreteScheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    with loading("the scheduler", preset.source):
        return FlowMatchEulerDiscreteScheduler.from_pretrained(preset.source, subfolder="scheduler")


def teacher_sigmas(scheduler, steps=TEACHER_STEPS):
    """The stock scheduler's own sigmas, fp32 [steps + 1], from 1 to 0."""
    # Not sigma_grid(28): the teacher shall sample exactly as its makers let it sample. Of these 28
    # steps five begin above α = 0.94.
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.cpu()


def image_noise(seed, indices, shape, purpose="image"):
    """Noise [B, C, H, W], each image's from (seed, purpose, its index) alone: the batch size
    changes no picture. Both trainings have purposes of their own: no sample grid and no evaluation
    starts from a noise that was trained on."""
    # One generator for each image, on the CPU: one for the whole batch would give an image another
    # noise whenever its neighbours or the device change.
    noises = [torch.randn(shape, generator=rng(seed, purpose, int(i))) for i in indices]
    return torch.stack(noises)                                            # B×C×H×W


# ================================================================== the student: 1.67 evaluations

def cached_velocity(student, x, sigma, prompt, span=None, delta=None, f=None):
    """(velocity [B, C, H, W] fp32, Δ0 or None) of the student. Without delta every block runs and
    the residual Δ0 of the span, if there is one, is recorded; with delta the span is skipped and
    f(Δ0) stands in for it."""
    # Δ0 is an argument and an answer, no state of the network: it cannot be left over from another
    # prompt, and gradient checkpointing may run the blocks again later.
    v, delta = call_network(student, x, sigma, prompt, span=span, delta=delta, f=f)
    return v.float(), delta


def roll_out(student, x, prompt, sigmas, span=None, f=None):
    """The student's path from noise x [B, C, H, W] along sigmas [N + 1]: (latents, velocities, Δ0).

    There are N + 1 latents and N velocities, all [B, C, H, W]. The last latent is the sample, if
    sigmas end at 0. With a span this is the 1.67-step sampler of the paper; without one every step
    is a full one.
    """
    # Training and inference both come here: Stage II learns on exactly the path that is used later
    # (paper: "inference-consistent"). It stops before the last step, which it takes with gradient
    # (train_stage2.last_step).
    latents, velocities = [x], []
    # Step one has no Δ0 yet: it runs every block and records one, for each picture anew. From step
    # two on the span is skipped, and the same Δ0 comes back unchanged for the step after. So two
    # steps of SD3-Medium cost 1 + 16/24 evaluations.
    delta = None
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        v, delta = cached_velocity(student, x, sigma, prompt, span, delta, f)
        # Towards x̂0, but only as far as σ_next.
        x = euler(x, v, sigma, sigma_next)
        velocities.append(v)
        latents.append(x)
    return latents, velocities, delta


# ================================================================== the teacher: 28 × 2 evaluations

def guided_velocity(teacher, x, sigma, prompt, uncond, w, alpha):
    """The teacher's velocity [B, C, H, W] by Eq. 4; sigma [B] or a number, prompt and uncond
    (embeds, pooled)."""
    # Conditional and unconditional pass go through the network as one batch of 2·B. Always both,
    # although above α only the first counts: with several processes a pass that only some of them
    # run would hang the others (deviation 6).
    embeds = torch.cat([prompt[0], uncond[0]])                            # 2B×L×J
    pooled = torch.cat([prompt[1], uncond[1]])                            # 2B×P
    # In Stage I each sample has a level of its own; in sampling one number holds for all.
    twice = torch.cat([sigma, sigma]) if torch.is_tensor(sigma) else sigma
    v = velocity(teacher, torch.cat([x, x]), twice, (embeds, pooled))     # 2B×C×H×W
    # The first half was told the prompt, the second nothing. How much their difference counts is
    # each sample's own matter: w where its σ ≤ α, else 1, which leaves the first half as it is.
    v_cond, v_uncond = v.chunk(2)
    return guide(v_cond, v_uncond, guidance_weight(sigma, w, alpha))      # B×C×H×W


def guidance_rule(w, alpha):
    """The rule itself as 16 hex digits, a hash of its weights at 101 levels. A run keeps them: when
    guidance_weight was edited, neither the run nor its references are continued."""
    return digest({"weights": guidance_weight(torch.linspace(1, 0, 101), w, alpha)})[:16]


def sample_guided(teacher, x, prompt, uncond, sigmas, w, alpha=1.0):
    """(latents [B, C, H, W], passes): Euler along sigmas with the guidance rule of Eq. 4; α = 1 is
    guidance everywhere.

    Where the rule gives weight 1 only the conditional pass is run. So 28 steps cost 56 passes at
    α = 1, 51 at α = 0.94, and 28 at w = 1.
    """
    # Counted, because "28×2" is a claim: with α some of the 56 passes are never run.
    passes = 0
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        # Above α the layout is decided, without guidance, so that layouts stay varied. One σ holds
        # for all samples here, so the unconditional pass can be saved.
        if guidance_weight(sigma, w, alpha) == 1:
            v = velocity(teacher, x, sigma, prompt)
            passes += 1
        else:
            # Below α details are painted, with guidance: two passes.
            v = guided_velocity(teacher, x, sigma, prompt, uncond, w, alpha)
            passes += 2
        x = euler(x, v, sigma, sigma_next)
    return x, passes


# ================================================================== the NFE meter

def forward_flops(net, shape, tokens, **cached):
    """FLOPs of one forward of a transformer on the meta device, for one sample of latents `shape`
    [C, H, W] and `tokens` text tokens; cached as in CachedSD3.forward. Returns (FLOPs, Δ0)."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):                            # shapes without memory or arithmetic
        x = torch.zeros(1, *shape)
        embeds = torch.zeros(1, tokens, net.config.joint_attention_dim)
        pooled = torch.zeros(1, net.config.pooled_projection_dim)
        timestep = torch.zeros(1)
        # On a CPU the counter would miss the attention; on meta tensors it does not.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _, delta = net(x, embeds, pooled, timestep, **cached)
    return counter.get_total_flops(), delta


def count_nfe(preset, span, steps=2):
    """{"blocks", "flops", "flops_with_f"}: network evaluations of a student with span (n, m) or
    None, counted by blocks, by FLOPs, and by FLOPs with f. One evaluation is one full forward."""
    if not span:
        return {"blocks": float(steps), "flops": float(steps), "flops_with_f": float(steps)}
    # The paper counts blocks. Blocks are not all of a pass (embedding, projection), not all alike
    # (SD3.5-Medium has two kinds), and f is not free: so FLOPs are counted, too.
    with torch.device("meta"):
        net = CachedSD3.from_config(preset.architecture or base_config(preset)).eval()
        f = make_compensation(net.inner_dim)
    config = net.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    # A step that records, one that reuses Δ0 as it is, one with f.
    full, delta = forward_flops(net, shape, preset.tokens, span=span)
    plain, _ = forward_flops(net, shape, preset.tokens, span=span, delta=delta)
    with_f, _ = forward_flops(net, shape, preset.tokens, span=span, delta=delta, f=f)
    # Step one is one evaluation. Each later step counts as its share of a full one.
    return {"blocks": nfe(steps, span, config.num_layers),
            "flops": 1 + (steps - 1) * plain / full,
            "flops_with_f": 1 + (steps - 1) * with_f / full}


def nfe_table():
    """The NFE of every preset's span, and of slower ones, as text."""
    spans = {name: [preset.cached_blocks] for name, preset in PRESETS.items()}
    spans["tiny"].append("1-3")
    spans["sd3-medium"].append("2-7")                     # the released config: the paper's "slow"
    # The teacher's 56 are 28 steps, each with a conditional and an unconditional pass.
    lines = ["model             span   blocks    FLOPs   with f   of two steps; the teacher: 56"]
    for name, of_model in spans.items():
        for text in of_model:
            n = count_nfe(PRESETS[name], parse_span(text, 1000))         # as if of 1000 blocks
            lines.append(f"{name:14}{text:>8}{n['blocks']:9.3f}{n['flops']:9.3f}"
                         f"{n['flops_with_f']:9.3f}")
    return "\n".join(lines)


# ================================================================== runs

def recipe_of(preset, stage, steps, alpha, guidance, shape, size=None):
    """The content of distill.json: what is needed to sample a run, and the stock call that gives
    the two-step picture. size: a side in pixels that is not the model's own."""
    # The stock call is text for people to copy. It names what a stock pipeline would get wrong by
    # itself: the sigmas, no guidance (the student has learnt it), the text length.
    without_t5 = "" if preset.text_length else ", text_encoder_3=None, tokenizer_3=None"
    pixels = f", height={size}, width={size}" if size else ""
    # One dtype for all parts: transformers would load the encoders as the files are, diffusers the
    # student in fp32.
    dtype = "torch_dtype=torch." + ("float32" if preset.captions == "tiny" else "float16")
    student = f"SD3Transformer2DModel.from_pretrained('RUN/student', {dtype})"
    half_only = ", variant='fp16'" if variant(Path(preset.source) / "vae") else ""
    return {
        "format": FORMAT,
        "base": preset.name,                              # whose VAE and text encoders it needs
        "base_content": base_content(preset),             # the same base, wherever it lies
        "stage": stage,
        "iteration": 0,                                   # 0 until the run is finished
        "steps": steps,                                   # N
        "sigmas": [round(s, 6) for s in sigma_grid(steps).tolist()],      # N + 1
        "alpha": alpha,                                   # Eq. 4, as it was trained with
        "guidance": guidance,                             # w, likewise; the student needs none
        "cached_blocks": None,                            # Stage II: "n-m", the span of step two
        "nfe": float(steps),                              # network evaluations by blocks
        "latent_shape": list(shape),                      # C, H, W
        "resolution": size,                               # pixels, if not the model's own
        "stock_call": f"StableDiffusion3Pipeline.from_pretrained({preset.source!r}, "
                      f"{dtype}{half_only}, "
                      f"transformer={student}{without_t5})"
                      f"(prompt, sigmas={stock_sigmas(steps)}, num_inference_steps={steps}, "
                      f"guidance_scale=1.0, max_sequence_length={preset.text_length}{pixels})"}


def keep_recipe(folder, recipe, iteration=None):
    """Writes distill.json, the first process for all: with the iteration of a result, or of the
    result that is there already (0 without one)."""
    file = Path(folder) / "distill.json"
    # Written at each start: a base that has moved is found again at its new place. A result that is
    # there already stays one until a better one is written.
    if iteration is None:
        iteration = read_json(file)["iteration"] if file.exists() else 0
    if first():
        write_json(file, recipe | {"iteration": iteration})


# What every distill.json must hold. Stage II adds compensation, init and lora_rank.
RECIPE_TYPES = {"base": str, "stage": int, "iteration": int, "steps": int, "alpha": float,
                "guidance": float, "nfe": float, "latent_shape": list}


def read_recipe(folder):
    """The checked distill.json of a run folder; UserError when it is missing, foreign or
    nonsense."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}; "
                        "python train_stage1.py makes runs/tiny-stage1")
    # The file may come from a stranger or a newer version. Check what is used later, so that a
    # wrong value is one line here and no traceback there.
    recipe = read_json(folder / "distill.json")
    if recipe.get("format") != FORMAT:
        raise UserError(f"{folder}/distill.json has format {recipe.get('format')!r}; "
                        f"this code reads {FORMAT}")
    for key, kind in RECIPE_TYPES.items():
        value = recipe.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{folder}/distill.json: {key} is {str(value)[:80]!r}, "
                            f"not {kind.__name__}")
    if not (1 <= recipe["steps"] <= 1000
            and 0 <= recipe["alpha"] <= 1 <= recipe["guidance"] <= 100):
        raise UserError(f"{folder}/distill.json: steps not between 1 and 1000, alpha not between "
                        "0 and 1, or guidance not between 1 and 100")
    shape = recipe["latent_shape"]
    if len(shape) != 3 or not all(type(n) is int and 1 <= n <= 1024 for n in shape):
        raise UserError(f"{folder}/distill.json: latent_shape is {shape!r}, "
                        "not three small integers")
    if recipe.get("cached_blocks") is not None:
        parse_span(recipe["cached_blocks"], 10_000)       # its form; load_student knows the model
    return recipe


def newest_weights(folder, recipe):
    """Where a run's newest student lies: student/ or, while it trains, the newest checkpoint."""
    # A run that was finished and then given more iterations has both, and its checkpoints may have
    # gone further than its result.
    saved = checkpoints(folder)
    newest = int(saved[-1].name[-6:]) if saved else -1
    student = Path(folder) / "student"
    if (student / "config.json").exists() and recipe["iteration"] >= newest:
        return student
    if not saved:
        raise UserError(f"{folder} holds neither student/ nor a checkpoint yet")
    return saved[-1]


def student_content(folder):
    """What a run's newest student is, wherever the run lies."""
    weights = newest_weights(folder, read_recipe(folder))
    return content_of(weights, "*.safetensors" if weights.name == "student"
                      else "student.safetensors")


def few_step_config(source, preset):
    """(config, its sub-folder or None) of a few-step SD3 transformer that others distilled from the
    same base: a transformer's folder or hub id, or a pipeline's. UserError when it takes other
    inputs than the base."""
    with loading("the few-step transformer", source):
        try:
            config, part = CachedSD3.load_config(source), None
        except OSError:                                   # a whole pipeline, then
            config, part = CachedSD3.load_config(source, subfolder="transformer"), "transformer"
    # Inputs and latents must be the base's: its encoders and its VAE are used.
    base = base_config(preset)
    for key in ("_class_name", "in_channels", "joint_attention_dim", "pooled_projection_dim"):
        if config.get(key) != base.get(key):
            raise UserError(f"{source} has {key} = {config.get(key)}; its base has {base.get(key)}")
    return config, part


def load_few_step(source, preset, dtype=torch.float32):
    """That transformer, in eval mode."""
    config, part = few_step_config(source, preset)
    check_whole(empty_transformer(config), Path(source) / (part or ""))
    return read_transformer(source, part, dtype)


def load_student(folder, preset, recipe, device, dtype=torch.float32):
    """(student, span or None, f or None) of a run, finished or not: the result or, when that is
    older, the newest checkpoint."""
    # A finished run has a stock folder, student/, and beside it f (in a file of its own: a stock
    # folder drops keys that it does not know). One that still trains has checkpoints only.
    folder = Path(folder)
    weights = newest_weights(folder, recipe)
    finished = weights.name == "student"
    span = f = None
    try:
        if finished:
            config = CachedSD3.load_config(weights)
            check_whole(empty_transformer(config), weights)
            student = read_transformer(weights, dtype=dtype)
        else:
            student = CachedSD3.from_config(base_config(preset))
            if recipe.get("lora_rank"):                   # a checkpoint holds adapters, not merged
                add_lora(student, recipe["lora_rank"], seed=0)
            student.load_state_dict(load_file(weights / "student.safetensors"))
            if recipe.get("lora_rank"):
                merge_lora(student)
        if recipe.get("cached_blocks"):
            span = parse_span(recipe["cached_blocks"], len(student.transformer_blocks))
        if span and recipe.get("compensation", True):
            f = make_compensation(student.inner_dim)
            source = folder if finished else weights
            f.load_state_dict(load_file(source / "compensation.safetensors"))
            f.to(device).eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: its student does not load "
                        f"({str(error).splitlines()[0][:160]})") from error
    # The position table is made for a largest picture; beyond it the forward would fail.
    config, (channels, *sides) = student.config, recipe["latent_shape"]
    if channels != config.in_channels or max(sides) > config.pos_embed_max_size * config.patch_size:
        raise UserError(f"{folder}/distill.json: latent_shape {recipe['latent_shape']} does not "
                        "fit its student")
    return student.to(device).eval(), span, f


def check_same_base(folder, recipe, preset):
    """UserError unless a run was distilled from this base; a base that has moved is the same."""
    if recipe["base"] != preset.name and recipe.get("base_content") != base_content(preset):
        raise UserError(f"{folder} was distilled from {recipe['base']}, not from {preset.name}")


def find_base(recipe, model=None):
    """The preset of a run's base model, or of `model`, where it lies now."""
    # A preset's name or a hub id is found from anywhere. A folder is stored with its whole path,
    # and may have moved since.
    name = recipe["base"] if model is None else model
    if Path(name).is_absolute() and not Path(name).exists():
        raise UserError(f"the base model {name} is not there; say where it is now: --model FOLDER")
    preset = find_preset(name)
    if model and recipe.get("base_content") not in (None, base_content(preset)):
        raise UserError(f"--model {model} is not the base model that this run was distilled from")
    return preset


# ================================================================== pictures

class Gallery:
    """The sample grid of a training run: always the same prompts (rows) and noises (columns)."""

    def __init__(self, preset, prompts):
        # The same rows in every run and at every step: two grids differ only in the student.
        self.prompts = prompts
        self.size = 8 if preset.captions == "tiny" else 4
        self.rows = torch.randperm(len(prompts), generator=rng(0, "gallery"))[:self.size]

    def save(self, path, student, decode, shape, sigmas, span=None, f=None):
        """Samples the grid and writes it to path. All processes call it; the first one writes."""
        pictures = []
        with torch.no_grad():
            for i, row in enumerate(self.rows.tolist()):
                noise = image_noise(42, range(i * self.size, (i + 1) * self.size), shape)
                prompt = self.prompts.take([row] * self.size)
                latents, _, _ = roll_out(student, noise.to(self.prompts.device), prompt, sigmas,
                                         span, f)
                pictures += [decode(one).cpu() for one in latents[-1].split(1)]
        if first():
            save_pictures(torch.cat(pictures), path, self.size)


def save_pictures(pictures, path, columns):
    """Saves pictures [B, 3, H, W] in [0, 1] as one PNG grid, whole or not at all; small ones are
    shown enlarged to about 96 pixels."""
    from PIL import Image
    h, w = pictures.shape[2:]
    rows = -(-len(pictures) // columns)                   # rounded up
    sheet = Image.new("RGB", (columns * (w + 2), rows * (h + 2)), "white")
    pixels = (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    for i, picture in enumerate(pixels.cpu().numpy()):
        place = i % columns * (w + 2), i // columns * (h + 2)
        sheet.paste(Image.fromarray(picture), place)
    # Enlarged without smoothing: what is blurred in the result is blurred by the model.
    scale = max(1, 96 // h)
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.NEAREST)
    # Whole or not at all: a viewer never meets half a picture.
    replace_file(path, lambda temporary: sheet.save(temporary, format="PNG"))


# ================================================================== command

@dataclasses.dataclass
class Settings:
    checkpoint: str = option(
        None, "run folder of train_stage1.py or train_stage2.py, finished or not (default: "
              "runs/tiny-stage2 or, before it is trained, the committed tiny/student)")
    model: str = option(None, "where the base model is now, if it has moved")
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
        settings.checkpoint = "runs/tiny-stage2"
        if not Path(settings.checkpoint, "distill.json").exists():
            settings.checkpoint = COMMITTED               # a result to start from
    if Path(settings.out).suffix != ".png" or Path(settings.out).is_dir():
        raise UserError(f"--out {settings.out}: give a file name that ends in .png")
    if settings.prompt and settings.prompts:
        raise UserError("give --prompt or --prompts, not both")
    recipe = read_recipe(settings.checkpoint)
    preset = find_base(recipe, settings.model)
    device = pick_device(preset, settings.device)
    texts = choose_prompts(preset, settings.prompts, settings.prompt)
    # Nobody wants a picture of each of them when no prompt was given.
    if not settings.prompt and not settings.prompts and preset.captions != "tiny":
        texts = texts[:4]                                 # of the grammar's 80,000
    texts = texts[:1000]

    # Everything comes from the run folder: which base model, how many steps, which span, f. Only
    # the prompts and the noises are the caller's.
    prompts = Prompts(preset, texts, device)
    student, span, f = load_student(settings.checkpoint, preset, recipe, device)
    if settings.no_cache:
        span = None                                       # every step in full
    decode, sigmas = Decoder(preset, device), sigma_grid(recipe["steps"])

    total, pictures, start = len(texts) * settings.num_images, [], time.perf_counter()
    with torch.inference_mode():
        for images in torch.arange(total).split(settings.batch_size):
            noise = image_noise(settings.seed, images, recipe["latent_shape"]).to(device)
            prompt = prompts.take(images // settings.num_images)          # so many of each
            latents, _, _ = roll_out(student, noise, prompt, sigmas, span, f)
            # The VAE takes them one by one: 1024² pictures need much memory, and the last bits of a
            # picture must not depend on its neighbours.
            pictures += [decode(one).cpu() for one in latents[-1].split(1)]
    # The text encoders are not in these seconds: a prompt is encoded once, whatever the steps.
    seconds = time.perf_counter() - start
    # Several prompts: a row for each. One prompt: as square as it goes.
    columns = settings.num_images if len(texts) > 1 else max(1, round(total ** 0.5))
    save_pictures(torch.cat(pictures), settings.out, columns)
    evaluations = recipe["nfe"] if span else recipe["steps"]
    print(f"{settings.out}: {total} images, {evaluations:.4g} network evaluations each, "
          f"{seconds:.1f} s")


if __name__ == "__main__":
    main()
