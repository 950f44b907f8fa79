"""Stage I of 1.x-Distill: structure, by distribution matching whose teacher guidance is off at high
noise.

    python train_stage1.py                         # the miniature world, minutes on a laptop CPU
    python train_stage1.py --model sd3-medium      # the same code on a real model
    torchrun --nproc-per-node 8 train_stage1.py --model sd3.5-large

Three networks start from the base model: the frozen teacher, the student, and the fake score, which
learns the distribution of the student's own samples. Each iteration (paper, Stage I; as in the
official code, where a step from σ_k to σ_{k+1} is compared at noise levels between these two):
  1. roll out    the student runs all its steps, without gradient
  2. fake score  learns by flow matching on the student's samples
  3. student     one of its steps, with gradient; the loss moves it to where the teacher points and
                 away from where the fake score points
Gradient: 2 moves the fake score alone, on samples that are held fixed. 3 moves the student alone,
through the sample of that one step; what the two others say of it is held fixed. One update of the
fake score for each of the student's, and no moving average of weights [official].

The teacher's guidance follows Eq. 4. Not here: the mathematics (losses.py), the cache and the
adversarial stage (cache.py, train_stage2.py).

Functions of other files that it uses:
  velocity(net, x, sigma, prompt)             (v, Δ0), one pass; Δ0 is the cache's, None here
  guided_velocity(teacher, x, …)              v of the teacher by Eq. 4
  roll_out(student, noise, prompt, sigmas)    (latents, velocities, Δ0) of all its steps
  rng(seed, i, …)                             the generator of iteration i's draws
  my_rows(batch)                              this process's rows of a global batch
  micro_batches(batch, n)                     cuts a batch in n parts (--accumulation)
  clip_and_step(optimizers, norm)             clips their gradients jointly, steps, clears them
prompt and uncond are pairs of tensors: embeds [B, L, J] and pooled [B, P] (model.py).

Dimension key: B batch, C latent channels, H W latent size, N student steps, L J P text (model.py).
Latents are [B, C, H, W].
"""

import dataclasses
import itertools
import time

# First of all: run.py keeps out the notices of diffusers and transformers, imported after it.
from run import (CommonSettings, Run, UserError, adamw, clip_and_step, command, micro_batches,
                 my_rows, option, parse_settings, rng)

import torch

from losses import (dmd_loss, dmd_loss_official, draw_sigma, euler, fake_score_loss,
                    importance_curve, renoise, renoise_window, step_end, x0_from_velocity)
from model import (Decoder, Prompts, cost, download, frozen_dtype, load_transformer, place,
                   prepare, save_transformer, velocity)
from sampler import Gallery, guided_velocity, image_noise, roll_out, sigma_grid

# ================================================================== settings

LOSSES = {"ours": dmd_loss, "official": dmd_loss_official}     # --loss; a further one goes here


@dataclasses.dataclass
class Settings(CommonSettings):
    resolution: int = option(None, "pixels of a side (default: the model's own)", low=16, high=4096)
    steps: int = option(2, "student steps N [paper]", low=1, high=100)
    alpha: float = option(None, "teacher guidance only where sigma <= alpha; 1 = everywhere, as in "
                          "plain DMD", low=0, high=1)
    guidance: float = option(None, "the teacher's guidance w", low=1, high=100)
    importance: str = option("official", "curve of the student's re-noise level",
                             choices=("official", "paper", "uniform"))
    form: str = option("window", "match inside the step's window [official], or x0 re-noised to "
                       "any level [paper's figure]", choices=("window", "x0"))
    loss: str = option("ours", "plain score difference, one normaliser a sample [ours], or "
                       "pseudo-Huber, one an image column [official]", choices=tuple(LOSSES))
    student_lr: float = option(None, "learning rate of the student", low=0, high=1)
    fake_lr: float = option(None, "learning rate of the fake score", low=0, high=1)


# Every option above whose default is None takes its value from here.
TINY = dict(                    # [ours] all by trial, so that a laptop does it in minutes
    iterations=220,
    batch_size=32,
    student_lr=1e-4,
    fake_lr=4e-4,
    alpha=0.94,                 # [paper, second hand]
    guidance=4.0,               # enough to amplify a caption's usual scene
    pool=24,                    # all captions of the miniature world
    accumulation=1,
    gradient_checkpointing=False,
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
    pool=2048,                  # [ours] prompts, 2.7 MB of host memory each; [official] 100 000
    accumulation=4,             # [ours] SD3-Medium: 16 at a time fit a GPU of 80 GB
    gradient_checkpointing=True,                          # [official]
    checkpoint_every=50,        # [official]
    sample_every=50,            # [ours]
)
BETAS = (0.0, 0.999)            # [official]; [paper, second hand] too; neither says why β1 is 0
WEIGHT_DECAY = 1e-4             # [official]
CLIP_STUDENT = 2.0              # [official] largest gradient norm
CLIP_FAKE = 1.0                 # [official]


# ================================================================== an iteration

@torch.no_grad()
def student_path(student, noise, prompt, sigmas):
    """The roll-out: the student's own path from noise [B, C, H, W], without gradient. Returns its
    latents [N + 1, B, C, H, W] and velocities [N, B, C, H, W] (paper, Stage I)."""
    # Training happens on the latents that the student meets itself, not on noised data: there are
    # no data here, and its own mistakes are what it has to learn from.
    latents, velocities, _ = roll_out(student, noise, prompt, sigmas)
    return torch.stack(latents), torch.stack(velocities)


def fake_score_turn(fake_score, draws, path, prompt, sigmas, form):
    """The fake score's loss, a scalar (paper, Stage I): flow matching on the student's samples.

    draws are draw_batch's, path is student_path's, sigmas [N + 1] are the path's levels.
    """
    latents, velocities = path
    k, sigma = draws["k_fake"], draws["sigma_fake"]             # B each: a step, a level
    x_k, v_k = at_step(latents, k), at_step(velocities, k)      # B×C×H×W each
    sigma_end = step_end(k, sigmas, form)                       # B

    # The student's answer at step k is the guess x̂0. Its sample at the end of the step, σ_{k+1},
    # lies on the line from x_k to x̂0.
    x0 = x0_from_velocity(x_k, sigmas[k], v_k)
    p = euler(x_k, v_k, sigmas[k], sigma_end)
    # Fresh noise brings p from its own level σ_{k+1} up to a level σ inside the step's window. The
    # next step starts from p, which still holds noise, so p is what has to be right. In the last
    # step σ_{k+1} is 0 and p is x̂0; with --form x0, the paper's figure, in every step.
    x = renoise(p, sigma_end, sigma, draws["noise_fake"].to(p.device))
    # The fake score learns the velocity of the straight line through x̂0 and x. In the last step
    # this is exact flow matching: it comes to know the student's samples as the teacher knows real
    # pictures. In the steps before, x still holds some of the noise that x̂0 came from: there it
    # learns where the student goes from such a latent, the official code's practice
    # (docs/TEACHING.md). It is never guided [official]: it must describe the student's samples as
    # they are.
    v, _ = velocity(fake_score, x, sigma, prompt)
    return fake_score_loss(v, x, x0, sigma)


def student_turn(student, teacher, fake_score, draws, path, prompt, uncond, sigmas, settings):
    """The student's loss, a scalar, and the gap |v_teacher − v_fake| of each sample, [B] (paper,
    Stage I). draws and path as in fake_score_turn; uncond is the empty prompt B times."""
    latents, _ = path
    k, sigma = draws["k_student"], draws["sigma_student"]       # B each, drawn anew [official]
    x_k = at_step(latents, k)                                   # B×C×H×W
    sigma_end = step_end(k, sigmas, settings.form)              # B

    # The student's step k once more, this time with gradient: p is its sample at σ_{k+1}.
    v, _ = velocity(student, x_k, sigmas[k], prompt)
    p = euler(x_k, v, sigmas[k], sigma_end)                     # B×C×H×W

    # Two networks judge the same re-noised sample x, without gradient. p is re-noised as above,
    # from its own level. Then each takes one step from σ back to σ_{k+1}: p_teacher is where the
    # guided teacher brings x, p_fake where the fake score brings it. (x is made of p, but counts
    # as a constant, as in DMD.)
    with torch.no_grad():
        x = renoise(p, sigma_end, sigma, draws["noise_student"].to(p.device))
        v_teacher = guided_velocity(teacher, x, sigma, prompt, uncond, settings.guidance,
                                    settings.alpha)             # Eq. 4: no guidance where σ > α
        v_fake, _ = velocity(fake_score, x, sigma, prompt)
        p_teacher = euler(x, v_teacher, sigma, sigma_end)
        p_fake = euler(x, v_fake, sigma, sigma_end)
        gap = (v_teacher - v_fake).abs().mean((1, 2, 3))        # B

    # p_teacher − p_fake is the direction in which the student's distribution has to move.
    return LOSSES[settings.loss](p, p_teacher, p_fake), gap


def at_step(values, k):
    """Each sample's entry at its own step: values [steps, B, C, H, W], k [B] → [B, C, H, W]."""
    return values[k, torch.arange(len(k))]                      # values[k[b], b] for every sample b


def draw_batch(i, settings, shape, sigmas, texts):
    """Everything random of iteration i, on the CPU, {name: tensor}: of the global batch of B this
    process's rows.

    It depends on (seed, i) alone. So a resumed run, another device and another number of processes
    see the same numbers.
    """
    B, N = settings.batch_size, settings.steps
    g = rng(settings.seed, i, "train")
    draws = {}
    # Which step the fake score looks at (uniformly), and to which level its sample is re-noised:
    # uniformly over the grid inside the window [official].
    k = torch.randint(N, (B,), generator=g)
    draws["k_fake"] = k
    draws["sigma_fake"] = draw_sigma(torch.rand(B, generator=g),
                                     *renoise_window(k, sigmas, settings.form),
                                     importance_curve("uniform"))
    # The same for the student, drawn independently, its level by the importance curve [official].
    k = torch.randint(N, (B,), generator=g)
    draws["k_student"] = k
    draws["sigma_student"] = draw_sigma(torch.rand(B, generator=g),
                                        *renoise_window(k, sigmas, settings.form),
                                        importance_curve(settings.importance))
    # The prompts, from a generator of their own: draws that you add above do not shift them.
    draws["prompt_index"] = torch.randint(len(texts), (B,),
                                          generator=rng(settings.seed, i, "prompts"))
    draws = {name: my_rows(values) for name, values in draws.items()}
    # The noises: where the roll-out starts, and with what the two turns re-noise. They are large,
    # so a process draws only its own. A sample's number in the run decides its noises.
    numbers = my_rows(torch.arange(i * B, (i + 1) * B))
    for name in ("noise", "noise_fake", "noise_student"):       # each B×C×H×W
        draws[name] = image_noise(settings.seed, numbers, shape, f"stage 1 {name}")
    return draws


SHOWN = ("loss_fake", "gap", "x0_std", "grad_norm_student")     # metrics in the progress bar


def diagnose(gap, sigma, x0, sigmas, alpha):
    """What diagnoses a run, {name: number}, of this process's samples: gap and sigma [B] of the
    student's turn (README: what you see while it trains), x0 [B, C, H, W] the end of its path."""
    metrics = {"gap": gap.mean().item()}
    # |v_teacher − v_fake| by re-noise level. The bins end at 0, 0.5, α, 1 and the steps' levels;
    # one that holds no sample is null in the log. Above α nobody is guided: there the gap tells
    # only how far the fake score has come from the teacher. (Rounded so that a level of
    # 0.89999998 and an α of 0.9 are one edge.)
    edges = sorted({0.0, 0.5, alpha, 1.0, *(round(s, 4) for s in sigmas.tolist())})
    for low, high in itertools.pairwise(edges):
        inside = (sigma > low) & (sigma <= high)
        metrics[f"gap_{low:g}_{high:g}"] = gap[inside].mean().item()
    metrics["x0_mean"] = x0.mean().item()
    metrics["x0_std"] = x0.std().item()                         # the data's is 1; healthy below 1.3
    metrics["saturation"] = (x0.abs() > 4).float().mean().item()        # healthy: below 0.01
    # Over the batch of all captions: healthy near 1. It falls if all captions give one picture. It
    # does not notice one scene a caption.
    metrics["x0_batch_std"] = x0.std(0).mean().item()
    return metrics


# ================================================================== the script

def resolve(settings):
    """Checks the settings before anything is loaded. Returns the preset, the device, the prompts,
    the transformer's config and the shape [C, H, W] of a latent."""
    preset, device, texts, config, factor = prepare(settings, TINY, SD3, stage=1)
    side = config["sample_size"]
    if settings.resolution and preset.is_tiny:
        raise UserError("--resolution is for real models; the miniature's exact reader knows 32 "
                        "pixels alone")
    if settings.resolution:
        side = settings.resolution // factor
        unit = factor * config["patch_size"]                    # pixels of an image token's side
        largest = unit * config["pos_embed_max_size"]
        if settings.resolution % unit or settings.resolution > largest:
            raise UserError(f"--resolution {settings.resolution} is not a multiple of {unit} up to "
                            f"{largest}")
    return preset, device, texts, config, [config["in_channels"], side, side]


@command
def main(argv):
    settings = parse_settings(Settings, argv, "train_stage1.py", __doc__.split("\n\n")[0])
    preset, device, texts, config, shape = resolve(settings)
    print("\n".join(f"  {name:24}{value}" for name, value in vars(settings).items()))
    if settings.dry_run:
        # Roll-out N; fake score and student learn with 3 each (a backward pass counts two); to
        # judge, the teacher takes 2 and the fake score 1. Checkpointing runs the forward of both
        # that learn a second time.
        passes = settings.steps + 3 + 3 + 2 + 1 + 2 * settings.gradient_checkpointing
        print(cost(preset, config, shape, learning=2, frozen=1, samples=settings.batch_size,
                   passes=passes))
        return
    run = Run(settings.out, {"stage": 1, **vars(settings), "latent_shape": shape}, device,
              settings.overwrite)
    if run.done:
        return

    # ------------------------------------------------------------- three networks, one base
    preset = download(preset)                                   # now a folder on this disk
    prompts = Prompts(preset, texts, device, [run.folder])      # frees the text encoders again
    # place() moves a network to its device; several processes share it in pieces. The teacher never
    # learns, so on a GPU bf16 is enough; what learns is fp32. compiled is False on a CPU
    # (model.prepare).
    compiled = not settings.no_compile
    teacher = place(load_transformer(preset, frozen_dtype(device)), device, compiled)
    student = place(load_transformer(preset), device, compiled)
    fake_score = place(load_transformer(preset), device, compiled)
    teacher.requires_grad_(False)
    decode = Decoder(preset, device)                            # for the sample grids only
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
        fake_score.enable_gradient_checkpointing()
    networks = {"student": student, "fake_score": fake_score}
    optimizers = {"student": adamw(student, settings.student_lr, BETAS, WEIGHT_DECAY),
                  "fake_score": adamw(fake_score, settings.fake_lr, BETAS, WEIGHT_DECAY)}
    start = run.restore(networks, optimizers)                   # 0, or where a run was interrupted
    sigmas = sigma_grid(settings.steps)                         # N + 1 levels, 1 … 0
    gallery = Gallery(preset, prompts)

    # ------------------------------------------------------------- train
    begun = time.perf_counter()
    bar = run.bar(start, "stage 1")
    for i in bar:
        # One update of each network. With --accumulation 1 each loop over `parts` runs once.
        draws = draw_batch(i, settings, shape, sigmas, texts)
        parts = micro_batches(draws, settings.accumulation)
        paths, losses_fake, losses_student, gaps = [], [], [], []

        # ---- 1. roll out: the student's own path, for both turns
        #      2. the fake score follows it
        for part in parts:
            prompt = prompts.take(part["prompt_index"])         # embeds B×L×J, pooled B×P
            path = student_path(student, part["noise"].to(device), prompt, sigmas)
            loss = fake_score_turn(fake_score, part, path, prompt, sigmas, settings.form)
            (loss / len(parts)).backward()                      # mean of parts = mean of the batch
            paths.append(path)
            losses_fake.append(loss.detach())
        # Clips the gradients to that norm, takes the step and clears them (run.py).
        norm_fake = clip_and_step([optimizers["fake_score"]], CLIP_FAKE)

        # ---- 3. the student moves along teacher minus fake score. It has not moved since the
        #      roll-out, so the paths are still its own
        for part, path in zip(parts, paths, strict=True):
            prompt = prompts.take(part["prompt_index"])
            uncond = prompts.uncond(len(part["prompt_index"]))
            loss, gap = student_turn(student, teacher, fake_score, part, path, prompt, uncond,
                                     sigmas, settings)
            (loss / len(parts)).backward()
            losses_student.append(loss.detach())
            gaps.append(gap)
        norm_student = clip_and_step([optimizers["student"]], CLIP_STUDENT)

        # ---- log, show, save
        done, seen = i + 1, {}
        last = done == settings.iterations
        if done % settings.sample_every == 0 or last:
            # In the miniature an exact reader counts right pictures and varied scenes.
            seen = gallery.save(run.folder / "samples" / f"step_{done:06d}.png", student, decode,
                                shape, sigmas)
        if done % settings.log_every == 0 or seen or last:
            x0 = torch.cat([latents[-1] for latents, _ in paths])         # B×C×H×W
            metrics = {"loss_fake": torch.stack(losses_fake).mean().item(),
                       "loss_student": torch.stack(losses_student).mean().item(),
                       **diagnose(torch.cat(gaps).cpu(), draws["sigma_student"], x0, sigmas,
                                  settings.alpha),
                       "grad_norm_fake": norm_fake, "grad_norm_student": norm_student}
            run.log(done, **metrics, **seen, seconds=time.perf_counter() - begun)
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in SHOWN}, refresh=False)
        run.checkpoint(done, networks, optimizers)              # where due; Ctrl-C ends it here

    # ------------------------------------------------------------- the result
    save_transformer(student, run.folder / "student", half=not preset.is_tiny)
    run.finish()
    print(f"{run.folder}/student: {settings.steps} steps, {time.perf_counter() - begun:.0f} s; "
          f"look at {run.folder}/samples/step_{settings.iterations:06d}.png")


if __name__ == "__main__":
    main()
