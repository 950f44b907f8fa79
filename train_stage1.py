"""Stage I of 1.x-Distill: structure, by distribution matching whose teacher guidance is off at high
noise.

    python train_stage1.py                         # the miniature world, minutes on a laptop CPU
    python train_stage1.py --model sd3-medium      # the same code on a real model
    torchrun --nproc-per-node 8 train_stage1.py --model sd3.5-large

Three networks start from the base model: the frozen teacher, the student, and the fake score, which
learns the distribution of the student's own samples. Each iteration (paper, Stage I; in the form of
the official code, which matches each step within its own window of noise levels):
  1. roll out    the student runs all its steps, without gradient
  2. fake score  learns by flow matching on the student's samples
  3. student     one of its steps, with gradient; the loss moves it to where the teacher points and
                 away from where the fake score points
Gradient: turn 2 moves the fake score alone, on samples that are held fixed. Turn 3 moves the
student alone, through the sample of that one step; what the two others say of it is held fixed.

The teacher's guidance follows Eq. 4. Not here: the mathematics (losses.py), the cache and the
adversarial stage (cache.py, train_stage2.py).

Dimension key: B batch, C latent channels, H W latent size, N student steps. Latents are
[B, C, H, W].
"""

import dataclasses
import functools
import hashlib
import time
from pathlib import Path

import torch
from tqdm import tqdm

from tools.settings import (CommonSettings, UserError, check_batch, command, fill_in, option,
                            parse_settings)
from tools.processes import adamw, clip_and_step, first, join_processes, micro_batches, share
from run import Run, rng
from losses import (dmd_loss, dmd_loss_official, draw_sigma, euler, fake_score_loss,
                    importance_curve, renoise, window, x0_from_velocity)
from model import (Decoder, Prompts, base_content, check_base, choose_prompts, draw_pool,
                   find_preset, frozen_dtype, load_transformer, pick_device, place,
                   save_transformer, vae_factor, velocity)
from sampler import (Gallery, guidance_rule, guided_velocity, image_noise, keep_recipe, recipe_of,
                     roll_out, sigma_grid)
from tools.curves import draw as draw_curves

# ================================================================== settings and recipes

LOSSES = {"ours": dmd_loss, "official": dmd_loss_official}     # --loss; a further one goes here


@dataclasses.dataclass
class Settings(CommonSettings):
    # what to train on
    model: str = option(
        "tiny", "tiny, sd3-medium, sd3.5-medium, sd3.5-large, a pipeline folder or a hub id")
    prompts: str = option(None, "file of prompts; without it the built-in ones")
    pool: int = option(None, "how many of the prompts to encode and train on", low=1, high=10**6)
    resolution: int = option(None, "pixels of a side (default: the model's own)", low=16, high=4096)
    # the method
    steps: int = option(2, "student steps N [paper]", low=1, high=100)
    alpha: float = option(None, "teacher guidance only where sigma <= alpha; 1 = everywhere, which "
                          "is plain DMD", low=0, high=1)
    guidance: float = option(None, "the teacher's guidance w", low=1, high=100)
    importance: str = option("official", "curve of the student's re-noise level",
                             choices=("official", "paper", "uniform"))
    form: str = option("window", "match inside the step's window [official], or x0 re-noised to "
                       "any level [paper's figure]", choices=("window", "x0"))
    loss: str = option("ours", "plain score difference, one normaliser a sample [ours], or "
                       "pseudo-Huber, one an image column [official]", choices=tuple(LOSSES))
    # optimisation
    iterations: int = option(None, "iterations", low=1, high=999_999)
    batch_size: int = option(None, "global batch B", low=1, high=65536)
    student_lr: float = option(None, "learning rate of the student", above=0, high=1)
    fake_lr: float = option(None, "learning rate of the fake score", above=0, high=1)


# Two recipes, side by side. Every option above whose default is None takes its value from here.
TINY = dict(                    # [ours] all by trial, so that a laptop does it in two minutes
    iterations=220,
    batch_size=32,
    student_lr=1e-4,
    fake_lr=4e-4,
    alpha=0.94,
    guidance=4.0,               # amplifies a caption's usual scene as w = 7 does for real models
    pool=24,                    # all captions of the miniature world
    checkpoint_every=100,
    sample_every=50,
)
SD3 = dict(
    iterations=500,             # [official]
    batch_size=64,              # [official] 8 GPUs × 8
    student_lr=5e-6,            # [official]
    fake_lr=4e-5,               # [official] faster than the student, which it has to follow
    alpha=0.94,                 # [paper, second hand]; [official] 0.96
    guidance=7.0,               # [official]; [paper, second hand] too
    pool=2048,                  # [ours] 2.7 MB of host memory each; [official] 100 000
    checkpoint_every=None,      # [ours] by time (run.Run.due); [official] 50
    sample_every=50,            # [ours]
)
BETAS = (0.0, 0.999)            # [official]; [paper, second hand] too
WEIGHT_DECAY = 1e-4             # [official]
CLIP_STUDENT = 2.0              # [official] largest gradient norm
CLIP_FAKE = 1.0                 # [official]


def resolve(settings):
    """Fills in what was not given, checks what belongs together, before anything is loaded. Returns
    the preset, the shape [C, H, W] of a latent and the texts of the prompts."""
    preset = find_preset(settings.model)
    fill_in(settings, TINY if preset.captions == "tiny" else SD3)
    settings.model = preset.name                                # a folder's whole path
    settings.out = settings.out or f"runs/{Path(preset.name).name}-stage1"
    check_batch(settings)
    pick_device(preset, settings.device)                        # refuses one that is not there
    texts = draw_pool(choose_prompts(preset, settings.prompts), settings.pool, settings.seed)
    if settings.dry_run and preset.architecture:                # planned without a download
        config, factor = preset.architecture, 8
    else:
        config, factor = check_base(preset), vae_factor(preset)
    side = config["sample_size"]
    if settings.resolution:
        unit = factor * config["patch_size"]                    # pixels of an image token's side
        largest = unit * config["pos_embed_max_size"]
        if settings.resolution % unit or settings.resolution > largest:
            raise UserError(f"--resolution {settings.resolution} is not a multiple of {unit} up to "
                            f"{largest}")
        side = settings.resolution // factor
    return preset, (config["in_channels"], side, side), texts


# ================================================================== the two turns of an iteration

def fake_score_turn(fake_score, batch, sigmas, form):
    """The fake score's loss, a scalar (paper, Stage I): flow matching on the student's samples.

    batch holds what draw_batch drew and the student's path (add_path: without gradient); sigmas
    [N + 1] are the path's levels.
    """
    prompt, sigma = (batch["embeds"], batch["pooled"]), batch["sigma_fake"]
    k = batch["k_fake"]                                         # B, each sample's own step
    x_k = at_step(batch["latents"], k)                          # B×C×H×W
    v_k = at_step(batch["velocities"], k)                       # B×C×H×W
    _, sigma_end = window(k, sigmas, form)                      # B

    # The student's answer at step k is the guess x̂0. Its sample at the end of the step, σ_k+1, lies
    # on the line from x_k to x̂0.
    x0 = x0_from_velocity(x_k, sigmas[k], v_k)
    p = euler(x_k, v_k, sigmas[k], sigma_end)
    # Fresh noise brings p from its own level σ_k+1 up to a level σ inside the step's window. Not
    # x̂0 from 0, as in the paper's figure (deviation 2): the sample that the next step starts from
    # is p, which still holds noise, so p is what has to be right. (In the last step σ_k+1 is 0 and
    # p is x̂0; with --form x0 that is so in every step.)
    x = renoise(p, sigma_end, sigma, batch["noise_fake"])
    # The fake score learns which velocity leads from there to x̂0. So it comes to know where the
    # student goes from each noise level, as the teacher knows it of real pictures.
    # It is never guided [official]: it shall describe the student's samples as they are.
    v = velocity(fake_score, x, sigma, prompt)
    return fake_score_loss(v, x, x0, sigma)


def student_turn(student, teacher, fake_score, batch, uncond, sigmas, settings):
    """The student's loss, a scalar, and the gap |v_teacher − v_fake| of each sample, [B] (paper,
    Stage I). batch as in fake_score_turn; uncond is the empty prompt B times."""
    prompt, sigma = (batch["embeds"], batch["pooled"]), batch["sigma_student"]
    k = batch["k_student"]                                      # B, drawn independently [official]
    x_k = at_step(batch["latents"], k)                          # B×C×H×W
    _, sigma_end = window(k, sigmas, settings.form)             # B

    # The student's step k once more, this time with gradient: p is its sample at σ_k+1.
    v = velocity(student, x_k, sigmas[k], prompt)
    p = euler(x_k, v, sigmas[k], sigma_end)                     # B×C×H×W

    # Two networks judge the same re-noised sample, without gradient. p is re-noised as above, from
    # its own level. Then each takes one step from σ back to σ_k+1. p_teacher is where it would go
    # if it came from a real picture, p_fake where it would go if it came from the student.
    with torch.no_grad():
        x = renoise(p, sigma_end, sigma, batch["noise_student"])
        v_teacher = guided_velocity(teacher, x, sigma, prompt, uncond, settings.guidance,
                                    settings.alpha)             # Eq. 4: no guidance where σ > α
        v_fake = velocity(fake_score, x, sigma, prompt)
        p_teacher = euler(x, v_teacher, sigma, sigma_end)
        p_fake = euler(x, v_fake, sigma, sigma_end)
        gap = (v_teacher - v_fake).abs().mean((1, 2, 3))        # B

    # p_teacher − p_fake is the direction in which the student's distribution has to move.
    return LOSSES[settings.loss](p, p_teacher, p_fake), gap


def at_step(path, k):
    """Each sample's entry at its own step: path [steps, B, C, H, W], k [B] → [B, C, H, W]."""
    return path[k, torch.arange(len(k), device=path.device)]


def draw_batch(i, settings, shape, sigmas, texts):
    """Everything random of iteration i, on the CPU: {name: tensor [B, ...]}, of which each process
    gets its share.

    It depends on (seed, i) alone. So a resumed run, another device and another number of processes
    see the same numbers.
    """
    B, N = settings.batch_size, settings.steps
    g = rng(settings.seed, i, "train")
    batch = {}
    # Which step the fake score looks at (uniformly), and to which level its sample is re-noised:
    # uniformly over the grid inside the window [official].
    k = torch.randint(N, (B,), generator=g)
    batch["k_fake"] = k
    batch["sigma_fake"] = draw_sigma(torch.rand(B, generator=g), *window(k, sigmas, settings.form),
                                     importance_curve("uniform"))
    # The same for the student, drawn independently, its level by the importance curve [official].
    k = torch.randint(N, (B,), generator=g)
    batch["k_student"] = k
    batch["sigma_student"] = draw_sigma(torch.rand(B, generator=g),
                                        *window(k, sigmas, settings.form),
                                        importance_curve(settings.importance))
    # The prompts, from a generator of their own: draws that a fork adds above do not shift them.
    batch["prompt"] = torch.randint(len(texts), (B,), generator=rng(settings.seed, i, "prompts"))
    batch = {name: share(values) for name, values in batch.items()}
    # The noises: where the roll-out starts, and with what the two turns re-noise. They are large,
    # so a process draws only its own. A sample's number in the run decides its noises.
    numbers = share(torch.arange(i * B, (i + 1) * B))
    for name in ("noise", "noise_fake", "noise_student"):       # each B×C×H×W
        batch[name] = image_noise(settings.seed, numbers, shape, f"stage 1 {name}")
    return batch


# ================================================================== the script

@functools.partial(command, several=True)
def main(argv):
    settings = parse_settings(Settings, argv, "train_stage1.py", __doc__.split("\n\n")[0])
    preset, shape, texts = resolve(settings)
    resolved = dataclasses.asdict(settings)
    print("\n".join(f"  {name:24}{value}" for name, value in resolved.items()))
    if settings.dry_run:
        from tools.plan import plan
        print(plan(1, preset, settings, shape))
        return
    device = pick_device(preset, settings.device)
    join_processes(device)
    resolved["device"] = str(device)
    # What a resumed run must find again, though it may lie elsewhere.
    resolved["model_content"] = base_content(preset)
    resolved["guidance_rule"] = guidance_rule(settings.guidance, settings.alpha)
    resolved["prompts_content"] = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    run = Run(settings.out, resolved, settings.overwrite)
    if run.finished(settings.iterations):
        return

    # ------------------------------------------------------------- three networks, one base
    prompts = Prompts(preset, texts, device, run.folder.parent)     # frees the text encoders again
    # place() moves a network to its device. Of several processes only the first reads the weights
    # (everywhere=False), and place() spreads them over all.
    teacher = place(load_transformer(preset, frozen_dtype(device), everywhere=False), device,
                    settings.compile)
    student = place(load_transformer(preset, everywhere=False), device, settings.compile)
    fake_score = place(load_transformer(preset, everywhere=False), device, settings.compile)
    teacher.requires_grad_(False)
    decode = Decoder(preset, device)                            # for the sample grids only
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
        fake_score.enable_gradient_checkpointing()
    networks = {"student": student, "fake_score": fake_score}
    optimizers = {"student": adamw(student, settings.student_lr, BETAS, WEIGHT_DECAY),
                  "fake_score": adamw(fake_score, settings.fake_lr, BETAS, WEIGHT_DECAY)}

    start = run.restore(networks, optimizers)                   # 0, or where a run was interrupted
    recipe = recipe_of(preset, 1, settings.steps, settings.alpha, settings.guidance, shape,
                       settings.resolution)
    keep_recipe(run.folder, recipe)
    sigmas_cpu = sigma_grid(settings.steps)                     # N + 1 levels, 1 … 0
    sigmas = sigmas_cpu.to(device)                              # the same where the networks are
    gallery = Gallery(preset, prompts)

    # ------------------------------------------------------------- train
    begun = time.perf_counter()
    bar = tqdm(range(start, settings.iterations), initial=start, total=settings.iterations,
               desc="stage 1", disable=not first())
    for i in bar:
        batch = draw_batch(i, settings, shape, sigmas_cpu, texts)
        # Micro-batches; usually there is one. A part also keeps its path, losses and gap, for
        # measure() below.
        parts = load_batch(batch, prompts, device, settings.accumulation)

        # ---- 1. roll out: the student's own path, kept in the part, for both turns
        #      2. the fake score follows it
        for part in parts:
            add_path(part, student, sigmas)
            loss = fake_score_turn(fake_score, part, sigmas, settings.form)
            (loss / len(parts)).backward()                      # mean of parts = mean of the batch
            part["loss_fake"] = loss.detach()
        norm_fake = clip_and_step([optimizers["fake_score"]], CLIP_FAKE)

        # ---- 3. the student moves along teacher minus fake score
        for part in parts:
            uncond = prompts.uncond(len(part["noise"]))
            loss, part["gap"] = student_turn(student, teacher, fake_score, part, uncond, sigmas,
                                             settings)
            (loss / len(parts)).backward()
            part["loss_student"] = loss.detach()
        norm_student = clip_and_step([optimizers["student"]], CLIP_STUDENT)

        # ---- log, show, save
        done = i + 1
        last = done == settings.iterations
        stop = run.stopping()                                   # Ctrl-C, in any process
        run.check_finite(done, fake_score=norm_fake, student=norm_student)
        if done % settings.log_every == 0 or last:
            metrics = measure(parts)
            metrics["grad_norm_fake"], metrics["grad_norm_student"] = norm_fake, norm_student
            run.log(done, **metrics, seconds=time.perf_counter() - begun)
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in SHOWN}, refresh=False)
        if done % settings.sample_every == 0 or last:
            gallery.save(run.folder / "samples" / f"step_{done:06d}.png", student, decode, shape,
                         sigmas)
            draw_curves(run.folder)                             # where matplotlib is installed
        if run.due(done, settings.checkpoint_every) or last or stop:
            run.save(done, networks, optimizers)
        if stop and not last:
            bar.close()
            run.leave(done)

    # ------------------------------------------------------------- the result
    save_transformer(student, run.folder / "student", half=preset.captions != "tiny")
    keep_recipe(run.folder, recipe, settings.iterations)
    seconds = time.perf_counter() - begun
    print(f"{run.folder}/student: {settings.steps} steps, {seconds:.0f} s; "
          f"look at {run.folder}/samples/step_{settings.iterations:06d}.png")


SHOWN = ("loss_fake", "gap", "x0_std", "grad_norm_student")     # of the metrics, in the bar


def load_batch(batch, prompts, device, accumulation):
    """draw_batch's tensors on the device, with the prompts themselves, in micro-batches."""
    tensors = {name: values.to(device) for name, values in batch.items()}
    tensors["embeds"], tensors["pooled"] = prompts.take(batch["prompt"])
    return micro_batches(tensors, accumulation)


@torch.no_grad()
def add_path(part, student, sigmas):
    """The student's own path from the part's noise, without gradient (paper, Stage I): training
    happens on the latents that the student meets itself, not on noised data."""
    prompt = part["embeds"], part["pooled"]
    latents, velocities, _ = roll_out(student, part["noise"], prompt, sigmas)
    part["latents"] = torch.stack(latents)                      # N+1×B×C×H×W
    part["velocities"] = torch.stack(velocities)                # N×B×C×H×W


def measure(parts):
    """What diagnoses a run, of the first process's share (README: what you see while it trains)."""
    gap = torch.cat([part["gap"] for part in parts])            # B
    sigma = torch.cat([part["sigma_student"] for part in parts])
    x0 = torch.cat([part["latents"][-1] for part in parts])     # B×C×H×W
    metrics = {"gap": gap.mean().item()}
    for name in ("loss_fake", "loss_student"):
        metrics[name] = sum(part[name].item() for part in parts) / len(parts)
    # |v_teacher − v_fake| by re-noise level: above α = 0.94, where nobody is guided, the gap starts
    # small. 0.75 is where step one ends. A bin that holds no sample is null in the log.
    for low, high in ((0, 0.5), (0.5, 0.75), (0.75, 0.94), (0.94, 1)):
        metrics[f"gap_{low}_{high}"] = gap[(sigma > low) & (sigma <= high)].mean().item()
    metrics["x0_mean"] = x0.mean().item()
    metrics["x0_std"] = x0.std().item()                         # the data's is 1
    metrics["saturation"] = (x0.abs() > 4).float().mean().item()
    metrics["diversity"] = x0.std(0).mean().item()              # over the batch, of all captions
    return metrics


if __name__ == "__main__":
    main()
