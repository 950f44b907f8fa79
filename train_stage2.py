"""Stage II of 1.x-Distill: detail, by an adversarial loss on exactly the path that inference takes.

    python train_stage2.py                        # continues runs/tiny-stage1, minutes on a CPU
    python train_stage2.py --cached-blocks none   # the paper's "SFD": no cache, any number of steps
    torchrun --nproc-per-node 8 train_stage2.py --model sd3.5-large

Step one runs in full and without gradient; it records Δ0 (cache.py). Step two skips the cached
blocks, adds f(Δ0) in their place, and is the one that learns: student and f together, against a
discriminator that looks at decoded pictures (paper, Stage II and cache figure; official
train_stage2). What it calls real are references: synthetic pictures of the same prompt and noise,
so no outside image is needed. The order of the script:
  1. references   made once, by the teacher
  2. turns        0 to 50 are the discriminator D's; then every third one, 51, 54, 57, 60 …, is the
                  generator G's; an iteration is one turn, as in the official code
  warm-up         G's early turns move f alone, its later ones student and f
Gradient: in D's turns it reaches D's heads alone. In G's it flows from the heads back through the
frozen backbone and the frozen VAE into step two, that is into f and the blocks that ran there; not
into the skipped blocks, Δ0 or step one.

Dimension key: B batch, R references, C latent channels, H W latent size. Latents are [B, C, H, W],
pictures [B, 3, 8H, 8W] (tiny: 4H, 4W) in [0, 1].
"""

import dataclasses
import functools
import hashlib
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from tools.settings import (CommonSettings, UserError, check_batch, command, fill_in, option,
                            parse_settings)
from tools.processes import (adamw, clip_and_step, first, join_processes, micro_batches, share,
                             share_of)
from run import Run, content_of, rng, save_tensors
from cache import make_compensation, nfe
from losses import discriminator_loss, euler, generator_loss
from model import (Decoder, Discriminator, Prompts, add_lora, base_config, base_content,
                   check_base, choose_prompts, draw_pool, empty_transformer, find_preset,
                   frozen_dtype, load_transformer, lora_base_dtype, not_shadowed, parse_span,
                   pick_device, place, save_transformer)
from sampler import (Gallery, cached_velocity, check_same_base, few_step_config, guidance_rule,
                     image_noise, keep_recipe, load_few_step, load_scheduler, load_student,
                     read_recipe, recipe_of, roll_out, sample_guided, sigma_grid, student_content,
                     teacher_sigmas)
from tools.curves import draw as draw_curves

# ================================================================== settings and recipes

@dataclasses.dataclass
class Settings(CommonSettings):
    # what to train on
    model: str = option("tiny", "tiny, sd3-medium, sd3.5-medium, sd3.5-large, a folder or a hub id")
    init: str = option(None, "Stage I run to start from (default: runs/MODEL-stage1)")
    prompts: str = option(None, "file of prompts; without it the built-in ones")
    pool: int = option(None, "how many of the prompts to encode and train on", low=1, high=10**6)
    # the method
    cached_blocks: str = option(None, "span of skipped blocks, first-last, or none")
    no_compensation: bool = option(False, "train with plain reuse of the residual, without f")
    warmup: int = option(None, "iterations in which G's turns move f alone", low=0)
    reference: str = option("teacher", "who makes the references: the teacher guided with alpha "
                            "[ours], a Stage I run with more steps [official: 4], or a few-step "
                            "SD3 transformer of others, a folder or hub id")
    reference_steps: int = option(4, "its steps, where it is no run of ours", low=1, high=100)
    references: int = option(768, "reference pictures R, made once and kept [ours]",
                             low=1, high=10**7)
    lora_rank: int = option(None, "train LoRA of this rank, merged at the end [official 64]; "
                            "without it all weights", low=1, high=4096)
    # optimisation
    iterations: int = option(None, "turns, D's and G's together", low=0, high=999_999)
    batch_size: int = option(None, "global batch B", low=1, high=65536)
    student_lr: float = option(None, "learning rate of the student", above=0, high=1)
    compensation_lr: float = option(None, "learning rate of f", above=0, high=1)
    discriminator_lr: float = option(None, "learning rate of the heads", above=0, high=1)
    discriminator: str = option(None, "its frozen backbone: folder or hub id of a ConvNeXtV2")


# Two recipes, side by side. Every option above whose default is None takes its value from here; the
# span belongs to the base model (model.PRESETS).
TINY = dict(                    # [ours] all by trial, so that a laptop does it in three minutes
    iterations=700,
    batch_size=32,
    student_lr=2e-5,            # the official rate is for LoRA; all weights here
    compensation_lr=3e-4,       # at 1e-3 f itself collapses the scenes
    discriminator_lr=2e-3,      # by trial; there are 700 turns to learn in, officially 4000
    warmup=90,                  # of them 13 are G's
    pool=24,                    # all captions of the miniature world
    checkpoint_every=300,
    sample_every=200,
)
SD3 = dict(
    iterations=4000,            # [official] D and G together
    batch_size=32,              # [official] 8 GPUs × 1 × accumulation 4
    student_lr=1e-5,            # [official] for LoRA
    compensation_lr=1e-3,       # [official]
    discriminator_lr=1e-5,      # [official]
    warmup=500,                 # [paper, second hand]; [official] 1000
    pool=2048,                  # [ours] 2.7 MB of host memory each; [official] 100 000
    checkpoint_every=None,      # [ours] by time (run.Run.due); [official] 100
    sample_every=200,           # [ours]
)
BETAS = (0.9, 0.95)             # [official] all three; [paper, second hand] too
WEIGHT_DECAY = 1e-4             # [official]
CLIP_GENERATOR = 2.0            # [official] largest gradient norm of student and f jointly; D: none
D_ONLY = 50                     # [official] no turn of the generator before this one
D_PER_G = 2                     # [official] turns of the discriminator for each of the generator


def turn_of(i):
    """Whose turn iteration i is, counted from 0 [official]: D's up to 50, then G's in 51, 54, 57,
    60 … and D's in between. An iteration of Stage II is one turn."""
    # Heads that start at random say nothing of use. They get a lead, and later twice as many turns,
    # so that the student is always judged by heads that know its newest pictures.
    if i >= D_ONLY and i % (D_PER_G + 1) == 0:
        return "generator"
    return "discriminator"


def resolve(settings):
    """Fills in what was not given, checks what belongs together, before anything is loaded. Returns
    the preset, the recipe of the Stage I run, the span (n, m) or None, and the texts of the
    prompts.
    """
    preset = find_preset(settings.model)
    fill_in(settings, TINY if preset.captions == "tiny" else SD3)
    fill_in(settings, {"cached_blocks": preset.cached_blocks})
    if settings.discriminator is None:
        not_shadowed(preset.discriminator, "--discriminator")
    else:
        preset = dataclasses.replace(preset, discriminator=settings.discriminator)
    settings.model = preset.name                          # a folder's whole path
    short = Path(preset.name).name
    settings.init = settings.init or f"runs/{short}-stage1"
    settings.out = settings.out or f"runs/{short}-stage2"
    if settings.cached_blocks == "none" or settings.no_compensation:
        settings.warmup = 0                               # there is no f to warm up
    check_batch(settings)
    pick_device(preset, settings.device)                  # refuses one that is not there
    texts = draw_pool(choose_prompts(preset, settings.prompts), settings.pool, settings.seed)

    # Where to start: a finished Stage I run of the same base model.
    planned = settings.dry_run and preset.architecture    # planned without a download
    config = preset.architecture if planned else check_base(preset)
    if settings.dry_run and not Path(settings.init).exists():   # ... and before Stage I has run
        side = config["sample_size"]
        init = {"base": preset.name, "stage": 1, "steps": 2,
                "latent_shape": [config["in_channels"], side, side]}
    else:
        init = read_recipe(settings.init)
    check_same_base(settings.init, init, preset)
    if init["stage"] != 1:
        raise UserError(f"{settings.init} is a run of Stage {init['stage']}; --init takes one of "
                        "Stage I")
    # Who makes the references must be better than the student, or D teaches nothing new.
    if is_run(settings.reference):
        other = read_recipe(settings.reference)
        if other["steps"] <= init["steps"]:
            raise UserError(f"--reference {settings.reference} has no more steps than --init "
                            f"{settings.init}; references must be better than the student")
        keys = ("base", "base_content", "latent_shape")
        if [other.get(key) for key in keys] != [init.get(key) for key in keys]:
            raise UserError(f"--reference {settings.reference} has another base model or picture "
                            f"size than --init {settings.init}")
    elif settings.reference != "teacher":
        few_step_config(settings.reference, preset)       # refuses what does not fit the base
    # Which blocks step two skips.
    if settings.cached_blocks == "none":
        return preset, init, None, texts
    if init["steps"] < 2:
        raise UserError(f"{settings.init} has one step; a cache needs a second one: "
                        "--cached-blocks none")
    return preset, init, parse_span(settings.cached_blocks, config["num_layers"]), texts


# ================================================================== the two kinds of turns

def last_step(student, x, prompt, sigmas, span, delta, f):
    """The student's sample [B, C, H, W]: its last step, from x at σ_N−1 to 0, the one that learns.

    It is exactly the step that inference takes: the span skipped, f(Δ0) in its place. If the
    student were trained on full steps, it would first meet f's errors at inference.
    """
    sigma, sigma_end = sigmas[-2].item(), sigmas[-1].item()               # of two steps: 0.75, 0
    v, _ = cached_velocity(student, x, sigma, prompt, span, delta, f)
    return euler(x, v, sigma, sigma_end)


def discriminator_turn(discriminator, picture, reference):
    """The discriminator's loss, a scalar, and how often it ranks a reference above a picture
    (paper, Stage II). picture and reference are [B, 3, 8H, 8W], without gradient: only the heads
    learn here."""
    # One pass for both, so that both are judged by the same weights: spectral norms change a little
    # with every pass in train mode.
    logits = discriminator(torch.cat([reference, picture]))               # heads × [2B, places]
    of_reference = [head[:len(reference)] for head in logits]
    of_picture = [head[len(reference):] for head in logits]
    loss = discriminator_loss(of_reference, of_picture)
    # 0.5 is a blind discriminator, which teaches nothing; near 1 the student has nothing to go by.
    ranks = [(r > p).float().mean() for r, p in zip(of_reference, of_picture, strict=True)]
    return loss, torch.stack(ranks).mean()


def generator_turn(discriminator, decode, latents):
    """The generator's loss, a scalar (paper, Stage II): adversarial alone, as in the released
    config. latents [B, C, H, W] are last_step's, with gradient."""
    # The gradient flows back from the heads through the frozen backbone and the frozen VAE into
    # step two: into f and into every block that ran there. The skipped blocks get none. Step one
    # gets none, either: it ran without gradient, and Δ0 is detached.
    picture = decode(latents)                                             # B×3×8H×8W
    return generator_loss(discriminator(picture))


def draw_batch(i, settings, chosen, texts):
    """Which noises and prompts iteration i takes, as indices {"noise": [B], "prompt": [B]}, for the
    whole batch. They depend on (seed, i) alone. chosen [R] are the references' prompts."""
    B, R = settings.batch_size, settings.references
    g = rng(settings.seed, i, "batch")
    if turn_of(i) == "discriminator":
        # Noises 0 … R − 1 have a reference picture: same prompt, same noise (official).
        noise = torch.randint(R, (B,), generator=g)
        return {"noise": noise, "prompt": chosen[noise]}
    # The generator needs no reference. It takes fresh noises, a new one each time, or student and f
    # would learn the R pairs by heart.
    noise = torch.arange(R + i * B, R + (i + 1) * B)
    return {"noise": noise, "prompt": torch.randint(len(texts), (B,), generator=g)}


# ================================================================== references, made once

def make_references(folder, settings, preset, init, prompts, chosen, decode, run):
    """The reference pictures, uint8 [R, 3, 8H, 8W], of training noises 0 … R − 1 (deviation 10).
    Made once and kept in the folder, batch by batch: after a kill the rest is made.

    The official code makes them anew in every iteration, by a 4-step student that was not released.
    Here the teacher makes them once, with its 28 steps, guided with α as in Stage I: both stages
    imitate the same teacher. (Measured in docs/EXPERIMENTS.md, 5: references without guidance cost
    the student ten points of accuracy, those guided at all levels a little variety.)
    """
    device, shape = prompts.device, init["latent_shape"]
    maker = None                                          # loaded when a batch is missing
    batches = torch.arange(settings.references).split(128 if preset.captions == "tiny" else 4)
    files = [folder / f"pictures-{batch[0]:06d}.safetensors" for batch in batches]
    # Not sharded: each process makes its share of the batches without waiting for the others.
    for j in tqdm(share_of(range(len(files))), desc="references", disable=not first()):
        if files[j].exists():
            continue
        if run.interrupted:
            raise KeyboardInterrupt
        if maker is None:
            maker, grid, w = reference_maker(settings, preset, init, device)
        # The noise is the one that the student will start from, as in the official code. So
        # reference and picture usually show the same layout, and what tells them apart is detail.
        x = image_noise(settings.seed, batches[j], shape, "training").to(device)
        prompt, uncond = prompts.take(chosen[batches[j]]), prompts.uncond(len(x))
        with torch.inference_mode():
            x, _ = sample_guided(maker, x, prompt, uncond, grid, w, init["alpha"])
            # Decoded now, one by one: the picture of a 1024² latent costs more than a pass of the
            # transformer, and D looks at each reference about 110 times (miniature: 20). Clamped
            # and 8-bit, as a picture in a file; the student's, which carry gradient, are not.
            pictures = torch.cat([decode(one) for one in x.split(1)]).clamp(0, 1) * 255
        save_tensors(files[j], {"pictures": pictures.round().to(torch.uint8)})
    run.stopping()                                        # asks all processes: all wait here
    return torch.cat([load_file(file)["pictures"] for file in files])     # R×3×8H×8W


def reference_maker(settings, preset, init, device):
    """(network, sigmas, w) of whoever makes the references (--reference)."""
    dtype = frozen_dtype(device)
    if settings.reference == "teacher":
        grid = teacher_sigmas(load_scheduler(preset))
        return load_transformer(preset, dtype).to(device), grid, init["guidance"]
    # A student is not guided: it has learnt its guidance.
    if is_run(settings.reference):
        other = read_recipe(settings.reference)
        student, _, _ = load_student(settings.reference, preset, other, device)
        return student.to(dtype), sigma_grid(other["steps"]), 1.0
    student = load_few_step(settings.reference, preset, dtype)
    return student.to(device), sigma_grid(settings.reference_steps), 1.0


def is_run(reference):
    """Whether --reference names a run folder; else it is the teacher or others' transformer."""
    return (Path(reference) / "distill.json").exists()


def references_folder(settings, preset, init, prompts, resolved):
    """Where the references lie: beside the run folders, named by all that they depend on, so that
    runs which differ in something else share them."""
    # Who makes them, and the VAE that decodes them.
    about = [resolved["model_content"], content_of(Path(preset.source) / "vae"),
             resolved.get("reference_content", settings.reference), settings.reference_steps]
    # Prompts as encoded, noises, size and number; the teacher's guidance, w, α and the rule itself.
    about += [prompts.content, settings.seed, init["latent_shape"], settings.references,
              init["alpha"], init["guidance"], resolved["guidance_rule"]]
    name = hashlib.sha256(repr(about).encode()).hexdigest()[:12]
    return Path(settings.out).parent / f"references-{name}"


# ================================================================== the script

@functools.partial(command, several=True)
def main(argv):
    settings = parse_settings(Settings, argv, "train_stage2.py", __doc__.split("\n\n")[0])
    preset, init, span, texts = resolve(settings)
    resolved = dataclasses.asdict(settings)
    print("\n".join(f"  {name:24}{value}" for name, value in resolved.items()))
    shape, steps = init["latent_shape"], init["steps"]
    if settings.dry_run:
        from tools.plan import plan
        print(plan(2, preset, settings, shape, steps, span))
        return
    device = pick_device(preset, settings.device)
    join_processes(device)
    resolved["device"] = str(device)
    # What a resumed run must find again, though it may lie elsewhere.
    resolved["model_content"] = base_content(preset)
    resolved["guidance_rule"] = guidance_rule(init["guidance"], init["alpha"])
    resolved["prompts_content"] = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    resolved["discriminator_content"] = content_of(preset.discriminator)
    resolved["init_content"] = student_content(settings.init)
    resolved["started_from"] = [init[name] for name in ("iteration", "alpha", "guidance")]
    if is_run(settings.reference):
        resolved["reference_content"] = student_content(settings.reference)
    elif settings.reference != "teacher":
        resolved["reference_content"] = content_of(settings.reference, "**/*.safetensors")
    run = Run(settings.out, resolved, settings.overwrite)
    if run.finished(settings.iterations):
        return

    # ------------------------------------------------------------- student, f, discriminator
    # No fake score any more, and the teacher only while it makes the references: Stage II needs far
    # less memory than Stage I.
    prompts = Prompts(preset, texts, device, run.folder.parent)    # frees the text encoders again
    if first():
        dtype = lora_base_dtype(device) if settings.lora_rank else torch.float32
        student, _, _ = load_student(settings.init, preset, init, torch.device("cpu"), dtype)
    else:                                                 # place() sends the others their pieces
        student = empty_transformer(base_config(preset))
    torch.manual_seed(settings.seed)                      # f's first layer starts at random
    f = None                                              # plain reuse of Δ0
    if span and not settings.no_compensation:
        f = make_compensation(student.inner_dim).to(device)
    discriminator = Discriminator(preset, settings.seed).to(device)
    decode = Decoder(preset, device, settings.gradient_checkpointing)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if settings.lora_rank:
        add_lora(student, settings.lora_rank, settings.seed)
    student = place(student, device, settings.compile)

    # Only the discriminator's heads learn; its backbone, the VAE and the text encoders are frozen.
    networks = {"student": student, "discriminator": discriminator.heads}
    optimizers = {"student": adamw(student, settings.student_lr, BETAS, WEIGHT_DECAY),
                  "discriminator": adamw(discriminator.heads, settings.discriminator_lr, BETAS,
                                         WEIGHT_DECAY)}
    if f is not None:
        networks["compensation"] = f
        optimizers["compensation"] = adamw(f, settings.compensation_lr, BETAS, WEIGHT_DECAY)
    # The generator is student and f together: they share one gradient norm, as in the official
    # code.
    generator = [optimizers[name] for name in ("student", "compensation") if name in optimizers]
    start = run.restore(networks, optimizers)             # 0, or where a run was interrupted
    recipe = stage2_recipe(settings, preset, init, span, f, len(student.transformer_blocks))
    keep_recipe(run.folder, recipe)
    sigmas = sigma_grid(steps)                            # 1, 0.75, 0
    gallery = Gallery(preset, prompts)

    # ------------------------------------------------------------- references, made once
    chosen = torch.randint(len(texts), (settings.references,),
                           generator=rng(settings.seed, "references"))    # R, their prompts
    folder = references_folder(settings, preset, init, prompts, resolved)
    references = make_references(folder, settings, preset, init, prompts, chosen, decode,
                                 run)                                     # R×3×8H×8W, uint8

    # ------------------------------------------------------------- train
    begun = time.perf_counter()
    metrics = {}                                          # since the last line; of the last part
    bar = tqdm(range(start, settings.iterations), initial=start, total=settings.iterations,
               desc="stage 2", disable=not first())
    for i in bar:
        turn = turn_of(i)
        batch = draw_batch(i, settings, chosen, texts)
        parts = micro_batches({name: share(numbers) for name, numbers in batch.items()},
                              settings.accumulation)
        for part in parts:
            # ---- 1. the steps before the last, without gradient: the first in full, recording Δ0
            #      (with more than two steps those in between are cached)
            noise = image_noise(settings.seed, part["noise"], shape, "training").to(device)
            prompt = prompts.take(part["prompt"])
            with torch.no_grad():
                latents, _, delta = roll_out(student, noise, prompt, sigmas[:-1], span, f)
            x = latents[-1]                               # B×C×H×W, before the last step
            # In train mode a pass advances the heads' spectral norms. They shall advance once a
            # turn, whatever --accumulation is: in the first part alone.
            discriminator.heads.train(part is parts[0])

            if turn == "discriminator":
                # ---- 2. D: the student's picture as inference makes it, against its reference
                with torch.no_grad():
                    picture = decode(last_step(student, x, prompt, sigmas, span, delta, f))
                reference = references[part["noise"]].to(device) / 255
                loss, ranks = discriminator_turn(discriminator, picture, reference)
                metrics |= {"loss_d": loss.item(), "d_ranks": ranks.item()}
            else:
                # ---- 3. G: the same step, with gradient; no reference is needed
                sample = last_step(student, x, prompt, sigmas, span, delta, f)
                loss = generator_turn(discriminator, decode, sample)
                metrics |= {"loss_g": loss.item()}
            (loss / len(parts)).backward()                # mean of parts = mean of the batch

        # ---- 4. one step of those whose turn it is
        if turn == "discriminator":
            norm = clip_and_step([optimizers["discriminator"]])
        elif i < settings.warmup:
            # Warm-up [paper, second hand]: f alone. Otherwise the student would adapt to errors
            # that f, which still is plain reuse, will soon remove by itself.
            norm = clip_and_step([optimizers["compensation"]], CLIP_GENERATOR)
        else:
            norm = clip_and_step(generator, CLIP_GENERATOR)
        metrics["norm_d" if turn == "discriminator" else "norm_g"] = norm
        # G's loss leaves gradients in the heads, and in the student during the warm-up: nobody may
        # take them into another turn.
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)

        # ---- log, show, save
        done = i + 1
        last = done == settings.iterations
        stop = run.stopping()                             # Ctrl-C, in any process
        run.check_finite(done, **{turn: norm})
        if done % settings.log_every == 0 or last:
            # An iteration is one turn; both counts tell how many updates that makes.
            generated = sum(turn_of(j) == "generator" for j in range(done))
            run.log(done, **metrics, updates_d=done - generated, updates_g=generated,
                    seconds=time.perf_counter() - begun)
            bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()
                             if "norm" not in name}, refresh=False)
            metrics = {}
        if done % settings.sample_every == 0 or last:
            gallery.save(run.folder / "samples" / f"step_{done:06d}.png", student, decode, shape,
                         sigmas, span, f)
            draw_curves(run.folder)                       # where matplotlib is installed
        if run.due(done, settings.checkpoint_every) or last or stop:
            run.save(done, networks, optimizers)
        if stop and not last:
            bar.close()
            run.leave(done)

    # ------------------------------------------------------------- the result
    # f has a file of its own: a stock transformer folder would drop it with a mere warning.
    if f is not None and first():
        save_tensors(run.folder / "compensation.safetensors", f.state_dict())
    save_transformer(student, run.folder / "student", preset.captions != "tiny", settings.lora_rank)
    keep_recipe(run.folder, recipe, settings.iterations)
    print(f"{run.folder}: {recipe['nfe']:.3f} network evaluations, "
          f"{time.perf_counter() - begun:.0f} s; "
          f"look at {run.folder}/samples/step_{settings.iterations:06d}.png")


def stage2_recipe(settings, preset, init, span, f, blocks):
    """The content of distill.json: Stage I's recipe, and which blocks are skipped."""
    shape, size = init["latent_shape"], init.get("resolution")
    recipe = recipe_of(preset, 2, init["steps"], init["alpha"], init["guidance"], shape, size)
    recipe["init"] = Path(settings.init).resolve().name
    recipe["lora_rank"] = settings.lora_rank
    if span:
        recipe["cached_blocks"] = settings.cached_blocks
        recipe["compensation"] = f is not None
        recipe["nfe"] = round(nfe(init["steps"], span, blocks), 4)
    return recipe


if __name__ == "__main__":
    main()
