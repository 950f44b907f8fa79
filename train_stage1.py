"""Stage I of 1.x-Distill: structure, by distribution matching
whose teacher guidance is off at high noise.

    python train_stage1.py                         # the miniature world, minutes on a laptop CPU
    python train_stage1.py --model sd3-medium      # the same code on a real model
    torchrun --nproc-per-node 8 train_stage1.py --model sd3.5-large

Three networks start from the base model: the frozen teacher, the student, and the fake score, which
follows the student's own distribution. Each iteration (paper, Stage I; official trajectory-window
form):
  1. roll out    the student runs all its steps without gradient
  2. fake score  learns by flow matching on the student's samples
  3. student     one of its steps with gradient, re-noised; the loss pulls it along
                 teacher minus fake score
Guidance of the teacher follows Eq. 4. Not here: the cache and the adversarial stage
(train_stage2.py).
Dimension key: B batch, C latent channels, H W latent size, N student steps.
"""

import dataclasses
import hashlib
import time
from functools import partial

from run import (Patience, Run, UserError, World, check_batch, command, option, parse_settings, rng,
                 update, write_json)


@dataclasses.dataclass
class Settings:
    # what to train
    model: str = option(
        "tiny", "tiny, sd3-medium, sd3.5-medium, sd3.5-large, a pipeline folder or a hub id")
    out: str = option(None, "run folder (default: runs/MODEL-stage1)")
    prompts: str = option(
        None, "file of prompts; without it the world's captions or a built-in grammar [ours]")
    random_weights: bool = option(
        False, "build the base model without its weights, to try a machine")
    resolution: int = option(None, "pixels of a side; the preset's own without it",
                             low=16, high=4096)
    # the method
    steps: int = option(2, "student steps N [paper]", low=1, high=100)
    alpha: float = option(
        None, "guidance only where sigma <= alpha [paper, second hand: 0.94; official 0.96]; "
        "1 = everywhere: plain DMD", low=0, high=1)
    guidance: float = option(None, "teacher guidance w [paper 7; tiny 4, ours]", low=1, high=100)
    importance: str = option("official", "curve of the student's re-noise level",
                             choices=("official", "paper", "uniform"))
    form: str = option(
        "window", "match inside the step's window [official], or x0 re-noised [paper's figure]",
        choices=("window", "x0"))
    normaliser: str = option(
        "sample", "loss normaliser per sample [ours] or image column [official]",
        choices=("sample", "column"))
    distance: str = option("mse", "plain score difference [ours], or pseudo-Huber [official]",
                           choices=("mse", "huber"))
    # optimisation
    iterations: int = option(None, "iterations [official 500; tiny 220, ours]", low=1, high=999_999)
    batch_size: int = option(None, "global batch [official 64; tiny 32, ours]", low=1, high=65536)
    accumulation: int = option(1, "micro-batches one after the other, to save memory",
                               low=1, high=65536)
    student_lr: float = option(None, "learning rate [official 5e-6; tiny 1e-4, ours]",
                               above=0, high=1)
    fake_lr: float = option(None, "learning rate [official 4e-5; tiny 4e-4, ours]", above=0, high=1)
    gradient_checkpointing: bool = option(
        False, "recompute blocks in backward: less memory, a third more time")
    seed: int = option(3407, "seed of everything random [official 3407]", low=0, high=2**31 - 1)
    # the run
    checkpoint_every: int = option(None, "iterations between checkpoints [official 50]", low=1)
    sample_every: int = option(50, "iterations between sample grids [ours]", low=1)
    log_every: int = option(5, "iterations between lines of metrics.jsonl [ours]", low=1)
    device: str = option(None, "where to run (default: the fastest there is)",
                         choices=("cpu", "cuda", "mps"))
    dry_run: bool = option(False, "print the resolved settings and the memory plan and stop")
    overwrite: bool = option(False, "start again although the run folder holds a run")
    debug: bool = option(False, "show tracebacks")


BETAS = (0.0, 0.999)                    # [official]; [paper, second hand] too
WEIGHT_DECAY = 1e-4                     # [official]
CLIP_STUDENT, CLIP_FAKE = 2.0, 1.0      # [official] hard-coded there


def resolve(settings):
    """Fills what was not given from the preset, checks what belongs together.
    Returns (settings, preset)."""
    from model import find_preset
    preset = find_preset(settings.model)
    for field in dataclasses.fields(settings):
        if getattr(settings, field.name) is None and hasattr(preset, field.name):
            setattr(settings, field.name, getattr(preset, field.name))
    settings.out = settings.out or f"runs/{settings.model.strip('/').split('/')[-1]}-stage1"
    check_batch(settings)
    return settings, preset


@partial(command, several=True)
def main(argv):
    settings, preset = resolve(
        parse_settings(Settings, argv, "train_stage1.py", __doc__.split("\n\n")[0]))
    import torch
    from tqdm import tqdm

    from losses import (dmd_loss, draw_sigma, euler, fake_score_loss, importance_curve,
                        renoise, window, x0_from_velocity)
    from model import (Decoder, PromptBook, check_base, choose_prompts, load_transformer,
                       pick_device, place, save_transformer, vae_config, vae_factor, velocity)
    from sampler import Gallery, guided_velocity, recipe_of, roll_out, sigma_grid

    # ================================================================== set up
    device = pick_device(settings.device)
    prompts = choose_prompts(preset, settings.prompts)
    offline = settings.random_weights or settings.dry_run       # real weights cannot be had
    config = check_base(preset, offline)
    factor = vae_factor(vae_config(preset, offline))
    resolved = dataclasses.asdict(settings)
    print("\n".join(f"  {key:24}{value}" for key, value in resolved.items()))
    unit = factor * config["patch_size"]                        # pixels of an image token's side
    largest = unit * config["pos_embed_max_size"]
    if settings.resolution and (settings.resolution % unit or settings.resolution > largest):
        raise UserError(f"--resolution {settings.resolution} is not a multiple of {unit} up to "
                        f"{largest}")
    side = settings.resolution // factor if settings.resolution else config["sample_size"]
    B, N, shape = settings.batch_size, settings.steps, (config["in_channels"], side, side)
    if settings.dry_run:
        from plan import plan
        print(plan(1, preset, config, settings, shape, N))
        return
    resolved["device"] = str(device)
    resolved["prompts_sha256"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    world = World(device)
    run = Run(settings.out, resolved, settings.overwrite, world)
    if run.finished(settings.iterations):
        return

    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher, student, fake_score = (
        place(load_transformer(preset, dtype, settings.random_weights), device, world)
        for dtype in (frozen, torch.float32, torch.float32))
    teacher.requires_grad_(False)
    decode = Decoder(preset, device, settings.random_weights)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
        fake_score.enable_gradient_checkpointing()
    networks = {"student": student, "fake_score": fake_score}
    optimizers = {name: torch.optim.AdamW(networks[name].parameters(), lr=lr, betas=BETAS,
                                          weight_decay=WEIGHT_DECAY, fused=True)
                  for name, lr in (("student", settings.student_lr),
                                   ("fake_score", settings.fake_lr))}

    start = run.restore(networks, optimizers)
    recipe_file = run.folder / "distill.json"
    recipe = recipe_of(preset, 1, N, settings.alpha, settings.guidance, shape, settings.resolution,
                       settings.random_weights)
    if world.first and not recipe_file.exists():
        write_json(recipe_file, recipe)
    sigmas = sigma_grid(N)                                      # N + 1 levels, 1 … 0
    curves = {"fake": importance_curve("uniform"), "student": importance_curve(settings.importance)}

    def drawn_prompts(i):                                       # this process's share of B
        return world.share([prompts[j] for j in torch.randint(
            len(prompts), (B,), generator=rng(settings.seed, i, "prompts"))])

    gallery = Gallery(preset, prompts)
    book = PromptBook(preset, device, drawn_prompts, settings.iterations, keep=gallery.prompts,
                      random_weights=settings.random_weights)

    # ================================================================== train
    begun, patience = time.perf_counter(), Patience(run)
    bar = tqdm(range(start, settings.iterations), initial=start, total=settings.iterations,
               desc="stage 1", disable=not world.first)
    for i in bar:
        # Everything random of this iteration, for the whole batch, from (seed, i) alone;
        # each process keeps its share of it, in micro-batches.
        g = rng(settings.seed, i, "train")
        draws = {"noise": torch.randn(B, *shape, generator=g)}
        for who in ("fake", "student"):                         # drawn independently [official]
            k = torch.randint(N, (B,), generator=g)             # the step, uniformly
            high, low = window(k, sigmas, settings.form)        # levels of its window
            draws |= {f"k_{who}": k, f"low_{who}": low, f"sigma_k_{who}": sigmas[k],
                      f"sigma_{who}": draw_sigma(torch.rand(B, generator=g), high, low,
                                                 curves[who]),
                      f"noise_{who}": torch.randn(B, *shape, generator=g)}
        draws = {key: world.share(value) for key, value in draws.items()}
        draws["embeds"], draws["pooled"] = book(i)
        micros = [dict(zip(draws, part, strict=True)) for part in
                  zip(*(value.to(device).chunk(settings.accumulation) for value in draws.values()),
                      strict=True)]
        each = torch.arange(len(micros[0]["noise"]), device=device)

        # ---- 1. roll out: the student's own path, without gradient (paper, Stage I)
        with torch.no_grad():
            for m in micros:
                m["prompt"] = m["embeds"], m["pooled"]
                latents, velocities = roll_out(student, m["noise"], m["prompt"], sigmas)
                m["x"], m["v"] = (torch.stack(latents),                   # N+1×B×C×H×W
                                  torch.stack(velocities))                # N×B×C×H×W

        # ---- 2. fake score: flow matching on the student's samples; never guided [official]
        for m in micros:
            k, low, sigma = m["k_fake"], m["low_fake"], m["sigma_fake"]   # B
            x_k, v_k = m["x"][k, each], m["v"][k, each]                   # B×C×H×W
            x0 = x0_from_velocity(x_k, m["sigma_k_fake"], v_k)
            p = euler(x_k, v_k, m["sigma_k_fake"], low)                   # at the window's low end
            x = renoise(p, low, sigma, m["noise_fake"])
            m["loss_fake"] = fake_score_loss(velocity(fake_score, x, sigma, m["prompt"]),
                                             x, x0, sigma)
            (m["loss_fake"] / len(micros)).backward()
        norm_fake = update([optimizers["fake_score"]], CLIP_FAKE)

        # ---- 3. student: one step with gradient, pulled along teacher − fake score
        for m in micros:
            k, low, sigma = m["k_student"], m["low_student"], m["sigma_student"]
            x_k = m["x"][k, each]
            p = euler(x_k, velocity(student, x_k, m["sigma_k_student"], m["prompt"]),
                      m["sigma_k_student"], low)
            with torch.no_grad():
                x = renoise(p, low, sigma, m["noise_student"])
                # Conditional and unconditional pass, always both: one that only some
                # processes need would hang the others (deviation 6).
                v_real = guided_velocity(teacher, x, sigma, m["prompt"], book.uncond(len(x)),
                                         settings.guidance, settings.alpha)            # Eq. 4
                v_fake = velocity(fake_score, x, sigma, m["prompt"])
            m["loss_student"] = dmd_loss(
                p, euler(x, v_real, sigma, low), euler(x, v_fake, sigma, low),
                settings.normaliser, settings.distance)
            (m["loss_student"] / len(micros)).backward()
            m["gap"] = (v_real - v_fake).abs().mean((1, 2, 3))            # B
        norm_student = update([optimizers["student"]], CLIP_STUDENT)

        # ================================================================== log, show, save
        done, last, stop = i + 1, i + 1 == settings.iterations, world.any(run.interrupted)
        patience.check(done, {"fake_score": norm_fake, "student": norm_student}, ", ".join(
            f"sigma of the {who} {draws[f'sigma_{who}'].min():.3f}…"
            f"{draws[f'sigma_{who}'].max():.3f}"
            for who in ("fake", "student")))
        if done % settings.log_every == 0 or last:
            gap, sigma, x0 = (world.gather(torch.cat(part)) for part in zip(
                *((m["gap"], m["sigma_student"], m["x"][-1]) for m in micros), strict=True))
            metrics = {"loss_fake": sum(m["loss_fake"].item() for m in micros) / len(micros),
                       "loss_student": sum(m["loss_student"].item() for m in micros) / len(micros),
                       "grad_norm_fake": norm_fake, "grad_norm_student": norm_student,
                       # |teacher − fake score| by re-noise level (README: what to expect)
                       **{f"gap_{a}_{b}": gap[(sigma > a) & (sigma <= b)].mean()
                          for a, b in ((0, 0.5), (0.5, 0.75), (0.75, 0.94), (0.94, 1))},
                       "x0_mean": x0.mean(), "x0_std": x0.std(),
                       "saturation": (x0.abs() > 4).float().mean(),
                       "diversity": x0.std(0).mean(), "seconds": time.perf_counter() - begun}
            metrics = run.log(done, **metrics)
            bar.set_postfix(fake=f"{metrics['loss_fake']:.3f}", gap=f"{gap.mean():.3f}",
                            std=f"{metrics['x0_std']:.2f}", grad=f"{norm_student:.2f}",
                            refresh=False)
        if done % settings.sample_every == 0 or last:
            gallery.save(run.folder / "samples" / f"step_{done:06d}.png", student, book, decode,
                         shape, sigmas)
        if done % settings.checkpoint_every == 0 or last or stop:
            run.save(done, networks, optimizers)
        if stop and not last:
            bar.close()
            print(f"stopped after iteration {done}, saved; type the same command again to go on")
            raise SystemExit(130)

    # ================================================================== the result
    save_transformer(student, run.folder / "student", half=preset.captions != "tiny")
    if world.first:
        write_json(recipe_file, recipe | {"iteration": settings.iterations})
    print(f"{run.folder}/student: {N} steps, {time.perf_counter() - begun:.0f} s; look at "
          f"{run.folder}/samples/step_{settings.iterations:06d}.png")


if __name__ == "__main__":
    main()
