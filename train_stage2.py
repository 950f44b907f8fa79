"""Stage II of 1.x-Distill: detail, by an adversarial loss on exactly the path that inference takes.

    python train_stage2.py                        # continues runs/tiny-stage1, minutes on a CPU
    python train_stage2.py --cached-blocks none --out runs/no-cache     # the paper's "SFD"
    torchrun --nproc-per-node 8 train_stage2.py --model sd3.5-large

Step one runs in full and without gradient; it records Δ0 (cache.py). Step two skips the cached
blocks, adds f(Δ0) in their place, and is the one that learns: student and f together, against a
discriminator that looks at decoded pictures (paper, Stage II and cache figure; official
train_stage2). Its real examples are references: synthetic pictures of the same prompt and noise, so
no outside image is needed. The order of the script:
  1. references   made once, by the teacher
  2. turns        0 to 50 are the discriminator's; then 51, 54, 57, 60 … are the generator's, all
                  others the discriminator's. An iteration is one turn, as in the official code.
                  The generator's early turns (the warm-up) move f alone, later ones student and f
Gradient: in the discriminator's turns it reaches its heads alone. In the generator's it flows from
the heads back through the frozen backbone and the frozen VAE into step two, that is into f and the
blocks that ran there; not into the skipped blocks, Δ0 or step one. (Step one has the same weights,
so it drifts with them; no gradient passes through it [official].)

Functions of other files that it uses:
  roll_out(student, noise, prompt, sigmas, span, f)      (latents, velocities, Δ0) of all its steps
  velocity(student, x, sigma, prompt, span, delta, f)    (v, Δ0), one pass; cached if delta is given
  clip_and_step(optimizers, norm)      clips their gradients jointly, steps, clears theirs alone
  (rng, my_rows and micro_batches as in train_stage1.py)

Dimension key: B batch, R references, C latent channels, H W latent size. Latents are [B, C, H, W],
pictures [B, 3, 8H, 8W] (tiny: 4H, 4W) in [0, 1]. D and G: discriminator and generator.
"""

import dataclasses
import time
from pathlib import Path

from run import (CommonSettings, Run, UserError, adamw, clip_and_step, command, gather, is_main,
                 micro_batches, my_rows, option, parse_settings, read_settings, rng, save_tensors)

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from cache import make_compensation, nfe
from losses import discriminator_loss, euler, generator_loss
from model import (Decoder, Discriminator, Prompts, add_lora, cost, download, frozen_dtype,
                   load_student, load_transformer, parse_span, place, prepare, save_transformer,
                   velocity)
from sampler import Gallery, image_noise, roll_out, sample_guided, sigma_grid, teacher_sigmas

# ================================================================== settings

@dataclasses.dataclass
class Settings(CommonSettings):
    init: str = option(None, "Stage I run to start from (default: runs/MODEL-stage1)")
    cached_blocks: str = option(None, "span of skipped blocks, first-last, or none")
    no_compensation: bool = option(False, "train with plain reuse of the residual, without f")
    warmup: int = option(None, "G's turns up to this iteration move f alone",
                         low=0, high=999_999)
    reference: str = option("teacher", "who makes the references: the teacher, guided with alpha "
                            "[ours], or a Stage I run with more steps [official: 4]")
    references: int = option(768, "reference pictures R, made once and kept [ours]",
                             low=1, high=10**7)
    references_from: str = option(None, "Stage II run whose references are taken")
    lora_rank: int = option(None, "train LoRA of this rank, merged at the end [official 64]; "
                            "without it all weights", low=1, high=4096)
    student_lr: float = option(None, "learning rate of the student", low=0, high=1)
    compensation_lr: float = option(None, "learning rate of f", low=0, high=1)
    discriminator_lr: float = option(None, "learning rate of the heads", low=0, high=1)
    discriminator: str = option(None, "its frozen backbone: folder or hub id of a ConvNeXtV2")


# Every option above whose default is None takes its value from here; the span belongs to the base
# model (model.PRESETS).
TINY = dict(                    # [ours] all by trial, so that a laptop does it in minutes
    iterations=700,
    batch_size=32,
    student_lr=2e-5,            # the official rate is for LoRA; all weights here
    compensation_lr=3e-4,
    discriminator_lr=2e-3,      # D has 483 turns to learn in, officially 2683
    warmup=90,                  # 14 turns of G: 51, 54 … 90
    pool=24,                    # all captions of the miniature world
    accumulation=1,
    gradient_checkpointing=False,
    checkpoint_every=300,
    sample_every=200,
)
SD3 = dict(
    iterations=4000,            # [official] D and G together
    batch_size=32,              # [official] 8 GPUs × 1 × accumulation 4
    student_lr=1e-5,            # [official] for LoRA; all weights may want less: untested
    compensation_lr=1e-3,       # [official]
    discriminator_lr=1e-5,      # [official] for other heads (deviation 11): untested
    warmup=500,                 # [paper, second hand]; [official] 1000; D's turns count, too
    pool=2048,                  # [ours] 2.7 MB of host memory each; [official] 100 000
    accumulation=8,             # [ours] SD3-Medium: 4 at a time fit a GPU of 80 GB
    gradient_checkpointing=True,                          # [official]
    checkpoint_every=100,       # [official]
    sample_every=200,           # [ours]
)
BETAS = (0.9, 0.95)             # [official] student, f and D; [paper, second hand] too
WEIGHT_DECAY = 1e-4             # [official]
CLIP_GENERATOR = 2.0            # [official] largest gradient norm of student and f jointly; in the
                                # warm-up of f alone (deviation 9). D's is not clipped
D_ONLY = 50                     # [official] G has no turn before iteration 50. Its first is 51, the
                                # next multiple of 3
D_PER_G = 2                     # [official] turns of the discriminator for each of the generator


def turn_of(i):
    """Whose turn iteration i is, counted from 0 [official]: D's up to 50, then G's in 51, 54, 57,
    60 … and D's in between. An iteration of Stage II is one turn."""
    # Heads that start at random say nothing of use. They get a lead, and later twice as many turns,
    # so that the student is always judged by heads that know its newest pictures.
    if i >= D_ONLY and i % (D_PER_G + 1) == 0:
        return "generator"
    return "discriminator"


# ================================================================== the two kinds of turns

def last_step(student, x, prompt, sigmas, span, delta, f):
    """The student's sample [B, C, H, W]: the end of its last step, from x at σ_{N−1} to 0. This
    step is the one that is trained.

    It is exactly the step that inference takes: the span skipped, f(Δ0) in its place. If the
    student were trained on full steps, it would first meet f's errors at inference.
    """
    sigma, sigma_end = sigmas[-2].item(), sigmas[-1].item()               # of two steps: 0.75, 0
    v, _ = velocity(student, x, sigma, prompt, span, delta, f)
    return euler(x, v, sigma, sigma_end)


def discriminator_turn(discriminator, picture, reference):
    """The discriminator's loss, a scalar, and how often a reference's logit is above its picture's,
    place by place (paper, Stage II). picture and reference are [B, 3, 8H, 8W], without gradient:
    only the heads learn here."""
    # One pass for both, so that both are judged by the same weights: a spectral norm divides by the
    # layer's largest singular value, and estimates it anew in every pass in train mode.
    logits = discriminator(torch.cat([reference, picture]))               # heads × [2B, places]
    of_reference = [head[:len(reference)] for head in logits]
    of_picture = [head[len(reference):] for head in logits]
    loss = discriminator_loss(of_reference, of_picture)
    # 0.5 is a blind discriminator, which teaches nothing; near 1 the student has nothing to go by.
    ranks = [(r > p).float().mean() for r, p in zip(of_reference, of_picture, strict=True)]
    return loss, torch.stack(ranks).mean()


def generator_turn(discriminator, decode, latents):
    """The generator's loss, a scalar (paper, Stage II): adversarial alone, as in the official
    config. latents [B, C, H, W] are last_step's, with gradient."""
    # The gradient flows back from the heads through the frozen backbone and the frozen VAE into
    # step two: into f and into every block that ran there. The skipped blocks get none. Step one
    # gets none, either: it ran without gradient, and Δ0 is detached.
    picture = decode(latents)                                             # B×3×8H×8W
    return generator_loss(discriminator(picture))


def draw_batch(i, settings, reference_prompts, texts):
    """Which noises and prompts iteration i takes, {"noise_index": [B], "prompt_index": [B]}: this
    process's rows of the global batch. They depend on (seed, i) alone. Noises 0 … R − 1 are the
    references', with the prompts reference_prompts [R]; those from R on are fresh."""
    B, R = settings.batch_size, settings.references
    g = rng(settings.seed, i, "batch")
    if turn_of(i) == "discriminator":
        # A reference picture has the same prompt and the same noise [official].
        number = torch.randint(R, (B,), generator=g)
        prompt = reference_prompts[number]
    else:
        # The generator needs no reference. It takes fresh noises, a new one each time, or student
        # and f would learn the R pairs by heart.
        number = torch.arange(R + i * B, R + (i + 1) * B)
        prompt = torch.randint(len(texts), (B,), generator=g)
    return {"noise_index": my_rows(number), "prompt_index": my_rows(prompt)}


# ================================================================== references, made once

def find_references(run, settings, preset, stage1, prompts, reference_prompts, decode):
    """The reference pictures, uint8 [R, 3, 8H, 8W]: the run's own, another run's, or made now."""
    file = run.folder / "references.safetensors"
    if file.exists():
        return load_file(file)["pictures"]
    if settings.references_from:
        other = Path(settings.references_from) / "references.safetensors"
        pictures = load_file(other)["pictures"]
    else:
        pictures = gather(make_references(settings, preset, stage1, prompts, reference_prompts,
                                          decode))
    save_tensors(file, {"pictures": pictures})
    return pictures


def make_references(settings, preset, stage1, prompts, reference_prompts, decode):
    """This process's rows of the reference pictures, uint8 [R, 3, 8H, 8W], of training noises
    0 … R − 1 (deviation 10).

    The official code makes them anew in every iteration, by a 4-step student that was not released.
    Here the teacher makes them once, with its 28 steps, guided with α as in Stage I: both stages
    imitate the same teacher. (Measured in docs/EXPERIMENTS.md, 5: references without guidance cost
    the student ten points of accuracy.)
    """
    device, shape = prompts.device, stage1["latent_shape"]
    if settings.reference == "teacher":
        maker = load_transformer(preset, frozen_dtype(device)).to(device)
        sigmas, w = teacher_sigmas(preset), stage1["guidance"]
    else:                                                 # a student has learnt its guidance
        other = read_settings(settings.reference)
        maker, _, _ = load_student(settings.reference, other, preset, device)
        sigmas, w = sigma_grid(other["steps"]), 1.0
    # Whole networks here, not sharded: each process makes its rows without waiting for the others.
    mine = my_rows(torch.arange(settings.references))
    pictures = []
    for part in tqdm(mine.split(128 if preset.is_tiny else 4), desc="references",
                     disable=not is_main()):
        # The noise is the one that the student will start from, as in the official code. So
        # reference and picture usually show the same layout, and what tells them apart is detail.
        x = image_noise(settings.seed, part, shape, "training").to(device)
        prompt, uncond = prompts.take(reference_prompts[part]), prompts.uncond(len(x))
        with torch.inference_mode():
            x, _ = sample_guided(maker, x, prompt, uncond, sigmas, w, stage1["alpha"])
            # Decoded now, one by one: decoding a 1024² latent costs more than a pass of the
            # transformer, and D looks at each reference about 110 times (miniature: 20). Clamped
            # and 8-bit, as a picture in a file. The student's picture is never clamped or rounded:
            # that would stop the gradient in G's turns (deviation 10).
            decoded = torch.cat([decode(one) for one in x.split(1)]).clamp(0, 1) * 255
        pictures.append(decoded.round().to(torch.uint8).cpu())
    return torch.cat(pictures)


def check_references(settings, stage1):
    """UserError for a --reference or --references-from that does not fit. Reads settings alone."""
    # Who makes the references must be better than the student, or D teaches nothing new.
    if settings.reference != "teacher":
        other = read_settings(settings.reference)
        same_base = other["model"] == stage1["model"]
        same_size = other["latent_shape"] == stage1["latent_shape"]
        if other["steps"] <= stage1["steps"] or not same_base or not same_size:
            raise UserError(f"--reference {settings.reference} needs more steps than --init "
                            f"{settings.init}, and the same base model and picture size")
    # Reference j belongs to noise j and to the prompt drawn for it, so seed, prompts and size must
    # be the same. `own` is Stage I's settings (α, w, size), overridden by this run's.
    if settings.references_from:
        other, own = read_settings(settings.references_from), {**stage1, **vars(settings)}
        if not Path(settings.references_from, "references.safetensors").exists():
            raise UserError(f"--references-from {settings.references_from} holds no references")
        for name in ("model", "prompts", "pool", "seed", "references", "reference", "alpha",
                     "guidance", "latent_shape"):
            if name in own and other.get(name) != own[name]:
                raise UserError(f"--references-from {settings.references_from} has another {name}: "
                                f"{other.get(name)}, not {own[name]}")


# ================================================================== the script

def resolve(settings):
    """Checks the settings before anything is loaded. Returns the preset, the device, the prompts,
    the transformer's config, the settings of the Stage I run and the span (n, m) or None."""
    preset, device, texts, config, _ = prepare(settings, TINY, SD3, stage=2)
    settings.cached_blocks = settings.cached_blocks or preset.cached_blocks
    settings.init = str(Path(settings.init or f"runs/{Path(preset.name).name}-stage1"))

    # Where to start: a Stage I run of the same base model.
    if settings.dry_run and not Path(settings.init).exists():   # before Stage I has run
        side = config["sample_size"]
        stage1 = {"stage": 1, "model": preset.name, "steps": 2,
                  "latent_shape": [config["in_channels"], side, side]}
    else:
        stage1 = read_settings(settings.init)
    if stage1["stage"] != 1 or stage1["model"] != preset.name:
        raise UserError(f"{settings.init} is a run of Stage {stage1['stage']} from "
                        f"{stage1['model']}; --init takes one of Stage I from {preset.name}")
    check_references(settings, stage1)

    # Which blocks step two skips.
    if settings.cached_blocks == "none":
        return preset, device, texts, config, stage1, None
    if stage1["steps"] < 2:
        raise UserError(f"{settings.init} has one step; a cache needs a second one: "
                        "--cached-blocks none")
    span = parse_span(settings.cached_blocks, config["num_layers"])
    return preset, device, texts, config, stage1, span


@command
def main(argv):
    settings = parse_settings(Settings, argv, "train_stage2.py", __doc__.split("\n\n")[0])
    preset, device, texts, config, stage1, span = resolve(settings)
    print("\n".join(f"  {name:24}{value}" for name, value in vars(settings).items()))
    steps, shape = stage1["steps"], stage1["latent_shape"]
    if settings.dry_run:
        # The roll-out; in G's turns, one of three, a backward pass of the last step, which counts
        # two, with checkpointing three. The VAE and the discriminator's backbone come on top. No
        # frozen transformer: the teacher has made its references, and gone, before the training.
        blocks = config["num_layers"]
        cached_step = nfe(2, span, blocks) - 1
        backward = (2 + settings.gradient_checkpointing) * cached_step
        print(cost(preset, config, shape, learning=1, frozen=0, samples=settings.batch_size,
                   passes=nfe(steps, span, blocks) + backward / (D_PER_G + 1)))
        return
    run = Run(settings.out, {"stage": 2, **vars(settings), "latent_shape": shape, "steps": steps,
                             "alpha": stage1["alpha"], "guidance": stage1["guidance"]}, device,
              settings.overwrite)
    if run.done:
        return

    # ------------------------------------------------------------- student, f, discriminator
    # No fake score any more, and the teacher only while it makes the references: Stage II needs far
    # less memory than Stage I.
    preset = download(preset)                             # now a folder on this disk
    discriminator = Discriminator(preset, settings.seed).to(device)
    prompts = Prompts(preset, texts, device, [run.folder, settings.init])   # frees the encoders
    # On the CPU, where load_student gives fp32, which learning needs; place() moves it.
    student, _, _ = load_student(settings.init, stage1, preset, torch.device("cpu"))
    torch.manual_seed(settings.seed)                      # f's first layer starts at random
    f = None                                              # plain reuse of Δ0
    if span and not settings.no_compensation:
        f = make_compensation(student.inner_dim).to(device)
    compiled = not settings.no_compile
    decode = Decoder(preset, device, settings.gradient_checkpointing, compiled)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if settings.lora_rank:
        add_lora(student, settings.lora_rank, settings.seed)
    student = place(student, device, compiled)

    # Only the discriminator's heads learn; its backbone, the VAE and the text encoders are frozen.
    networks = {"student": student, "discriminator": discriminator.heads}
    optimizers = {"student": adamw(student, settings.student_lr, BETAS, WEIGHT_DECAY),
                  "discriminator": adamw(discriminator.heads, settings.discriminator_lr, BETAS,
                                         WEIGHT_DECAY)}
    if f is not None:
        networks["compensation"] = f
        optimizers["compensation"] = adamw(f, settings.compensation_lr, BETAS, WEIGHT_DECAY)
    # The generator is student and f together: they share one gradient norm [official].
    generator = [optimizers[name] for name in ("student", "compensation") if name in optimizers]
    start = run.restore(networks, optimizers)             # 0, or where a run was interrupted
    sigmas = sigma_grid(steps)                            # 1, 0.75, 0
    gallery = Gallery(preset, prompts)

    # ------------------------------------------------------------- references, made once
    begun = time.perf_counter()
    reference_prompts = torch.randint(len(texts), (settings.references,),
                                      generator=rng(settings.seed, "references"))       # R
    references = find_references(run, settings, preset, stage1, prompts, reference_prompts,
                                 decode)                  # R×3×8H×8W, uint8

    # ------------------------------------------------------------- train
    metrics = {}                                          # of the newest turn of each kind
    bar = run.bar(start, "stage 2")
    for i in bar:
        turn = turn_of(i)
        draws = draw_batch(i, settings, reference_prompts, texts)
        parts = micro_batches(draws, settings.accumulation)
        losses, ranks = [], []
        for part in parts:
            # ---- 1. the steps before the last, without gradient: the first in full, recording Δ0
            #      (with more than two steps those in between are cached)
            noise = image_noise(settings.seed, part["noise_index"], shape, "training").to(device)
            prompt = prompts.take(part["prompt_index"])
            with torch.no_grad():
                latents, _, delta = roll_out(student, noise, prompt, sigmas[:-1], span, f)
            x = latents[-1]                               # B×C×H×W, where the last step starts

            if turn == "discriminator":
                # ---- 2. D: the student's picture as inference makes it, against its reference
                with torch.no_grad():
                    picture = decode(last_step(student, x, prompt, sigmas, span, delta, f))
                reference = references[part["noise_index"]].to(device) / 255
                # In train mode each pass takes one power iteration of the heads' spectral norms.
                # Only the first micro-batch runs in it, so a turn takes one, whatever
                # --accumulation is (deviation 11). G's turns take none [official].
                discriminator.heads.train(part is parts[0])
                loss, rank = discriminator_turn(discriminator, picture, reference)
                ranks.append(rank)
            else:
                # ---- 3. G: the same step, with gradient; no reference is needed
                sample = last_step(student, x, prompt, sigmas, span, delta, f)
                discriminator.heads.eval()
                loss = generator_turn(discriminator, decode, sample)
            (loss / len(parts)).backward()                # mean of parts = mean of the batch
            losses.append(loss.detach())

        # ---- 4. one step of those whose turn it is
        if turn == "discriminator":
            norm = clip_and_step([optimizers["discriminator"]])           # not clipped [official]
        else:
            # Warm-up [paper, second hand]: f learns alone first, so that the student does not learn
            # to make up for errors that f will remove by itself. (Without it the miniature shows no
            # difference: docs/RESULTS.md.)
            learners = generator
            if f is not None and i <= settings.warmup:    # this one included [official]
                learners = [optimizers["compensation"]]
            norm = clip_and_step(learners, CLIP_GENERATOR)
        who = "d" if turn == "discriminator" else "g"
        metrics |= {f"loss_{who}": torch.stack(losses).mean().item(), f"grad_norm_{who}": norm}
        if ranks:
            metrics["d_ranks"] = torch.stack(ranks).mean().item()
        # G's backward pass also leaves gradients in the heads, and in the warm-up in the student.
        # clip_and_step clears those of the learners alone. Clear all, or the next turn adds them.
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)

        # ---- log, show, save
        done, seen = i + 1, {}
        last = done == settings.iterations
        if done % settings.sample_every == 0 or last:
            # In the miniature an exact reader counts right pictures and varied scenes.
            seen = gallery.save(run.folder / "samples" / f"step_{done:06d}.png", student, decode,
                                shape, sigmas, span, f)
        if done % settings.log_every == 0 or seen or last:
            # An iteration is one turn; both counts tell how many updates that makes.
            generated = sum(turn_of(j) == "generator" for j in range(done))
            run.log(done, **metrics, **seen, updates_d=done - generated, updates_g=generated,
                    seconds=time.perf_counter() - begun)
            bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()
                             if "norm" not in name}, refresh=False)
            metrics = {}
        run.checkpoint(done, networks, optimizers)        # where due; Ctrl-C ends it here

    # ------------------------------------------------------------- the result
    if f is not None:
        save_tensors(run.folder / "compensation.safetensors", f.state_dict())
    save_transformer(student, run.folder / "student", half=not preset.is_tiny)
    evaluations = nfe(steps, span, len(student.transformer_blocks))
    run.finish()
    print(f"{run.folder}: {evaluations:.3f} network evaluations, "
          f"{time.perf_counter() - begun:.0f} s; "
          f"look at {run.folder}/samples/step_{settings.iterations:06d}.png")


if __name__ == "__main__":
    main()
