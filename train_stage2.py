"""Stage II of 1.x-Distill: detail, by an adversarial loss on exactly the path that inference takes.

    python train_stage2.py                        # continues runs/tiny-stage1, minutes on a CPU
    python train_stage2.py --cached-blocks none   # the paper's "SFD": no cache, any number of steps

The first step runs in full and without gradient, and records Δ0 (cache.py). The second skips the
cached blocks, adds f(Δ0) in their place, and is the one that learns: student and f together,
against a discriminator that looks at decoded pictures (paper, Stage II and cache figure; official
train_stage2). What it calls real are synthetic references from the same prompt and noise, so no
outside image is needed. Iterations count optimiser steps, two of the discriminator for one of the
generator. Before them f alone is fitted to the full second step (ours: deviation 9). Dimension key:
B batch, C latent channels, H W latent size.
"""

import contextlib
import dataclasses
import hashlib
import time
from functools import partial
from pathlib import Path

from run import (Patience, Run, UserError, World, check_batch, command, option, parse_settings,
                 processes, rng, save_whole, update, write_json)


@dataclasses.dataclass
class Settings:
    # what to train
    model: str = option("tiny", "tiny, sd3-medium, sd3.5-medium, sd3.5-large, a folder or a hub id")
    init: str = option(None, "Stage I run to start from (default: runs/MODEL-stage1)")
    reference: str = option("teacher", "who makes the references: the teacher guided with alpha "
                            "[ours], or a Stage I run with more steps [official: 4]")
    out: str = option(None, "run folder (default: runs/MODEL-stage2)")
    prompts: str = option(None, "file of prompts; without it as in Stage I")
    random_weights: bool = option(False, "build the base model and the discriminator's backbone "
                                  "without their weights, to try a machine")
    # the method
    cached_blocks: str = option(None, "span of skipped blocks, first-last, or none [official 2-7: "
                                "1.75 NFE; ours 2-9: 1.67]")
    lora_rank: int = option(None, "train LoRA of this rank, merged at the end [official 64]; "
                            "without it all weights", low=1, high=4096)
    no_compensation: bool = option(False, "train with plain reuse of the residual, without f")
    fit_iterations: int = option(None, "steps that fit f first, cached step to full step [ours]",
                                 low=0)
    warmup: int = option(None, "iterations in which G's turns move f alone "
                         "[paper, second hand: 500]",
                         low=0)
    references: int = option(768, "reference pictures, made once and kept [ours]", low=1,
                             high=10**7)
    # optimisation
    iterations: int = option(None, "optimiser steps, D and G together, after the fit "
                             "[official 4000]", low=0, high=999_999)
    batch_size: int = option(None, "global batch [official 32]", low=1, high=65536)
    accumulation: int = option(1, "micro-batches one after the other, to save memory",
                               low=1, high=65536)
    student_lr: float = option(None, "learning rate [official 1e-5, of LoRA]", above=0, high=1)
    compensation_lr: float = option(None, "of f [official 1e-3; tiny 1e-4, ours]", above=0, high=1)
    fit_lr: float = option(1e-3, "of f during the fit [ours]", above=0, high=1)
    discriminator_lr: float = option(None, "of the heads [official 1e-5; tiny 2e-3, ours]", above=0,
                                     high=1)
    gradient_checkpointing: bool = option(False, "recompute blocks, of the VAE too, in "
                                          "backward: less memory, more time")
    seed: int = option(3407, "seed of everything random [official 3407]", low=0, high=2**31 - 1)
    # the run
    checkpoint_every: int = option(100, "iterations between checkpoints [official 100]", low=1)
    sample_every: int = option(100, "iterations between sample grids [ours]", low=1)
    log_every: int = option(10, "iterations between lines of metrics.jsonl [ours]", low=1)
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    dry_run: bool = option(False, "print the resolved settings and the memory plan and stop")
    overwrite: bool = option(False, "start again although the run folder holds a run")
    debug: bool = option(False, "show tracebacks")


BETAS = (0.9, 0.95)                     # [official] all three; [paper, second hand] too
WEIGHT_DECAY = 1e-4                     # [official]
CLIP = 2.0                              # [official] student and f jointly; D is not clipped
D_ONLY, D_PER_G = 50, 2                 # [official] discriminator alone at first, then 2 D : 1 G
LOGGED = {"fit": ("fit",), "discriminator": ("loss_d", "d_ranks"), "generator": ("loss_g",)}


def resolve(settings):
    """Fills what was not given from the preset, checks what belongs together."""
    from model import find_preset
    preset = find_preset(settings.model)
    for field in dataclasses.fields(settings):
        if getattr(settings, field.name) is None:
            value = getattr(preset, f"stage2_{field.name}", getattr(preset, field.name, None))
            setattr(settings, field.name, value)
    short = settings.model.strip("/").split("/")[-1]
    settings.init = settings.init or f"runs/{short}-stage1"
    settings.out = settings.out or f"runs/{short}-stage2"
    if settings.cached_blocks == "none" or settings.no_compensation:
        settings.fit_iterations = settings.warmup = 0
    check_batch(settings)
    if settings.references % processes():
        raise UserError(f"--references {settings.references} is not a multiple of "
                        f"{processes()} processes")
    return settings, preset


def phase_of(i, fit_iterations):
    """What iteration i does: "fit" f first, then "discriminator" or "generator" by the official
    turns."""
    turn = i - fit_iterations
    if turn < 0:
        return "fit"
    return "generator" if turn >= D_ONLY and turn % (D_PER_G + 1) == 0 else "discriminator"


@partial(command, several=True)
def main(argv):
    settings, preset = resolve(
        parse_settings(Settings, argv, "train_stage2.py", __doc__.split("\n\n")[0]))
    import torch
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    from cache import BlockCache, make_compensation, nfe, parse_span
    from losses import discriminator_loss, euler, fit_loss, generator_loss
    from model import (Decoder, Discriminator, PromptBook, check_base, choose_prompts,
                       load_transformer, pick_device, place, save_transformer, velocity)
    from sampler import (Gallery, image_noise, load_scheduler, load_student, read_recipe, recipe_of,
                         roll_out, sample_guided, sigma_grid, teacher_sigmas)

    # ================================================================== set up
    device = pick_device(settings.device)
    prompts = choose_prompts(preset, settings.prompts)
    offline = settings.random_weights or settings.dry_run       # real weights cannot be had
    config = check_base(preset, offline)
    if settings.dry_run and not Path(settings.init).exists():   # planned before Stage I has run
        init = {"base": preset.name, "stage": 1, "steps": 2,
                "latent_shape": [config["in_channels"], *[config["sample_size"]] * 2]}
    else:
        init = read_recipe(settings.init, offline)
    if init["base"] != preset.name:
        raise UserError(f"{settings.init} was distilled from {init['base']}, "
                        f"not from {preset.name}")
    if init["stage"] != 1:
        raise UserError(f"{settings.init} is a run of Stage {init['stage']}; --init takes one of "
                        "Stage I")
    steps, cached = init["steps"], settings.cached_blocks != "none"
    span = parse_span(settings.cached_blocks, config["num_layers"]) if cached else None
    if cached and steps < 2:
        raise UserError(f"{settings.init} has one step; a cache needs a second one: "
                        "--cached-blocks none")
    if settings.reference != "teacher":
        told = read_recipe(settings.reference, settings.random_weights)
        if told["steps"] <= steps:
            raise UserError(f"--reference {settings.reference} has no more steps than --init "
                            f"{settings.init}; references must be better than the student")
        if (told["base"], told["latent_shape"]) != (init["base"], init["latent_shape"]):
            raise UserError(f"--reference {settings.reference} has another base model or picture "
                            f"size than --init {settings.init}")
    resolved = dataclasses.asdict(settings)
    print("\n".join(f"  {key:24}{value}" for key, value in resolved.items()))
    with_lora = (partial(add_lora, rank=settings.lora_rank, seed=settings.seed)
                 if settings.lora_rank else lambda net: net)
    if settings.dry_run:
        from plan import plan
        print(plan(2, preset, config, settings, init["latent_shape"], steps,
                   settings.cached_blocks if cached else None, with_lora))
        return
    resolved |= {"device": str(device),                         # another --init is another run
                 "started_from": [init[key] for key in ("iteration", "alpha", "guidance")]}
    resolved["prompts_sha256"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    world = World(device)
    run = Run(settings.out, resolved, settings.overwrite, world)
    total = settings.fit_iterations + settings.iterations
    if run.finished(total):
        return

    student, _ = load_student(settings.init, preset, init, "cpu")
    learns_f = cached and not settings.no_compensation
    torch.manual_seed(settings.seed)                            # f's first layer starts at random
    compensation = make_compensation(student.inner_dim).to(device) if learns_f else None
    discriminator = Discriminator(
        preset, seed=settings.seed, random_weights=settings.random_weights).to(device)
    decode = Decoder(preset, device, settings.random_weights, settings.gradient_checkpointing)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    student = place(with_lora(student), device, world)
    cache = BlockCache(student, span, compensation) if cached else None

    networks = {"student": student, "discriminator": discriminator.heads}
    rates = {"student": settings.student_lr, "discriminator": settings.discriminator_lr}
    if learns_f:
        networks["compensation"], rates["compensation"] = compensation, settings.compensation_lr
    learning = {name: [p for p in net.parameters() if p.requires_grad]
                for name, net in networks.items()}
    optimizers = {name: torch.optim.AdamW(learning[name], lr=rates[name], betas=BETAS,
                                          weight_decay=WEIGHT_DECAY, fused=True)
                  for name in networks}
    start = run.restore(networks, optimizers)
    recipe_file = run.folder / "distill.json"
    side = init["latent_shape"][1]
    recipe = recipe_of(preset, 2, steps, init["alpha"], init["guidance"], init["latent_shape"],
                       side * decode.factor if side != config["sample_size"] else None,
                       settings.random_weights)
    recipe["init"] = settings.init
    if cached:
        recipe |= {"cached_blocks": settings.cached_blocks, "compensation": learns_f,
                   "nfe": round(nfe(steps, span, config["num_layers"]), 4)}
    if world.first and not recipe_file.exists():
        write_json(recipe_file, recipe)

    B, R, sigmas = settings.batch_size, settings.references, sigma_grid(steps)
    shape = init["latent_shape"]                                          # C, H, W
    chosen = [prompts[j] for j in torch.randint(len(prompts), (R,),
                                                generator=rng(settings.seed, "references"))]

    def batch_of(i):
        """(noise indices, prompts) of iteration i, this process's share of B: the discriminator's
        turns take those of references, f's and the generator's turns fresh ones, which nobody can
        learn by heart."""
        g = rng(settings.seed, i, "batch")
        if phase_of(i, settings.fit_iterations) == "discriminator":
            pick = torch.randint(R, (B,), generator=g).tolist()
            texts = [chosen[j] for j in pick]
        else:
            pick = range(R + i * B, R + (i + 1) * B)
            texts = [prompts[j] for j in torch.randint(len(prompts), (B,), generator=g)]
        return world.share(pick), world.share(texts)

    gallery = Gallery(preset, prompts)
    book = PromptBook(preset, device, lambda i: batch_of(i)[1], total,
                      keep=gallery.prompts, random_weights=settings.random_weights)

    # ================================================================== references, made once
    # Deviation 10. The same prompt and noise as the student's sample; the teacher is guided with
    # α, or it would teach the collapse that Stage I avoided.
    def make_references():
        frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
        if settings.reference == "teacher":
            teacher = load_transformer(preset, frozen, settings.random_weights).to(device)
            grid = teacher_sigmas(load_scheduler(preset, settings.random_weights))
        else:
            teacher, _ = load_student(settings.reference, preset, told, device)
            teacher, grid = teacher.to(frozen), sigma_grid(told["steps"])
        # not sharded: each process makes its share without waiting for the others
        latents, batches = [], world.share(torch.arange(R)).split(
            128 if preset.captions == "tiny" else 4)
        pages = PromptBook(preset, device, lambda i: [chosen[j] for j in batches[i]], len(batches),
                           random_weights=settings.random_weights)
        w = init["guidance"] if settings.reference == "teacher" else 1.0
        with torch.inference_mode():
            for i, batch in enumerate(tqdm(batches, desc="references", disable=not world.first)):
                if run.interrupted:
                    raise KeyboardInterrupt
                x = image_noise(settings.seed, batch, shape, "training").to(device)
                prompt = pages(i)
                latents.append(sample_guided(teacher, x, prompt, pages.uncond(len(x)), grid, w,
                                             init["alpha"])[0].cpu())
        return world.gather(torch.cat(latents))                                     # R×C×H×W

    kept = run.folder / "references" / "latents.safetensors"
    if not kept.exists():
        made = make_references()
        if world.first:
            save_whole(kept.parent, lambda folder: save_file({"latents": made}, folder / kept.name))
    world.wait()
    reference = load_file(kept)["latents"]

    # ================================================================== train
    begun, patience, seen = time.perf_counter(), Patience(run), {}
    bar = tqdm(range(start, total), initial=start, total=total, desc="stage 2",
               disable=not world.first)
    for i in bar:
        phase, (pick, _) = phase_of(i, settings.fit_iterations), batch_of(i)
        micros = [dict(zip(("pick", "embeds", "pooled"), part, strict=True)) for part in
                  zip(*(value.chunk(settings.accumulation)
                        for value in (torch.tensor(pick), *book(i))), strict=True)]
        parts, seen = len(micros), seen | {key: 0.0 for key in LOGGED[phase]}

        for m in micros:
            # ---- 1. all steps but the last: in full, no gradient; the first records Δ0
            noise = image_noise(settings.seed, m["pick"], shape, "training").to(device)
            prompt, last = (m["embeds"], m["pooled"]), sigmas[-2].item()
            with torch.no_grad():
                x = roll_out(student, noise, prompt, sigmas[:-1],
                             cache)[0][-1]                             # B×C×H×W at σ_N-1

            # Who learns in this turn; nobody else's gradients are touched. Only now, after a
            # forward: fully_shard takes a network that starts frozen for one that never learns.
            for name in networks:
                learns = {"fit": name == "compensation", "discriminator": name == "discriminator",
                          "generator": name != "discriminator"}[phase]
                for p in learning[name]:
                    p.requires_grad_(learns)
                for group in optimizers[name].param_groups:
                    group["lr"] = settings.fit_lr if phase == "fit" else rates[name]

            if phase == "fit":
                # ---- 2a. f alone, until the cached step predicts what the full one does
                # (deviation 9)
                with torch.no_grad(), cache.step("full"):
                    full = velocity(student, x, last, prompt)
                with cache.step("reuse"):
                    loss = fit_loss(velocity(student, x, last, prompt), full)
                (loss / parts).backward()
                seen["fit"] += loss.item() / parts
                continue

            # ---- 2b. the last step as inference takes it, with gradient in the generator's turn
            with torch.set_grad_enabled(phase == "generator"):
                with cache.step("reuse") if cached else contextlib.nullcontext():
                    v = velocity(student, x, last, prompt)
                fake = decode(euler(x, v, last, 0.0))                             # B×3×8H×8W
            # The spectral norms' power iteration goes with the turn, not with the micro-batch.
            discriminator.heads.train(m is micros[0])
            if phase == "discriminator":
                # ---- 3a. discriminator: references are real [target 0.8], the student's pictures
                # are not
                with torch.no_grad():
                    real = decode(reference[m["pick"]].to(device))
                real_logits, fake_logits = zip(*(          # one pass: both see the same weights
                    each.chunk(2) for each in discriminator(torch.cat([real, fake]))), strict=True)
                loss = discriminator_loss(real_logits, fake_logits)
                (loss / parts).backward()
                ranks = sum((r > f).float().mean()
                            for r, f in zip(real_logits, fake_logits, strict=True))
                seen["loss_d"] += loss.item() / parts
                seen["d_ranks"] += ranks.item() / len(real_logits) / parts
            else:
                # ---- 3b. generator: student and f together; f alone during the warm-up
                loss = generator_loss(discriminator(fake))
                (loss / parts).backward()
                seen["loss_g"] += loss.item() / parts

        if phase == "generator":
            both = ("compensation", "student") if learns_f else ("student",)
            if i - settings.fit_iterations < settings.warmup:
                optimizers["student"].zero_grad(set_to_none=True)
                both = ("compensation",)
            norm = seen["norm_g"] = update([optimizers[name] for name in both], CLIP)
        elif phase == "discriminator":
            norm = seen["norm_d"] = update([optimizers["discriminator"]])
        else:
            norm = seen["norm_f"] = update([optimizers["compensation"]], CLIP)

        # ================================================================== log, show, save
        done, end, stop = i + 1, i + 1 == total, world.any(run.interrupted)
        patience.check(done, {phase: norm})
        if done % settings.log_every == 0 or end:
            turns = [phase_of(j, settings.fit_iterations) for j in range(done)]
            seen |= {"updates_d": turns.count("discriminator"),
                     "updates_g": turns.count("generator")}
            run.log(done, seconds=time.perf_counter() - begun, **seen)
            bar.set_postfix({key: f"{value:.3f}" for key, value in seen.items()
                             if "norm" not in key and "updates" not in key}, refresh=False)
            seen = {}                                           # a line holds what is new in it
        if done % settings.sample_every == 0 or end:
            gallery.save(run.folder / "samples" / f"step_{done:06d}.png", student, book, decode,
                         shape, sigmas, cache)
        if done % settings.checkpoint_every == 0 or end or stop:
            run.save(done, networks, optimizers)
        if stop and not end:
            bar.close()
            print(f"stopped after iteration {done}, saved; type the same command again to go on")
            raise SystemExit(130)

    # ================================================================== the result
    if cached:
        cache.remove()
    if learns_f and world.first:
        tensors = {k: v.detach().cpu().contiguous() for k, v in compensation.state_dict().items()}
        save_file(tensors, run.folder / "compensation.safetensors")
    save_transformer(student, run.folder / "student", preset.captions != "tiny", with_lora)
    if world.first:
        write_json(recipe_file, recipe | {"iteration": total})
    print(f"{run.folder}: {recipe['nfe']:.3f} network evaluations, "
          f"{time.perf_counter() - begun:.0f} s; "
          f"look at {run.folder}/samples/step_{total:06d}.png")


def add_lora(student, rank, seed):
    """LoRA on the attention and feed-forward layers of both streams [official targets,
    alpha = rank; deviation 12]."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("--lora-rank needs peft: pip install peft") from None
    import torch
    torch.manual_seed(seed)
    student.requires_grad_(False)
    student.add_adapter(LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian",
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj",
                        "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2",
                        "ff_context.net.0.proj", "ff_context.net.2"]))
    return student


if __name__ == "__main__":
    main()
