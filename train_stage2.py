"""Stage II of 1.x-Distill: detail, by an adversarial loss on exactly the path that inference takes.

    python train_stage2.py                        # continues runs/tiny-stage1, minutes on a CPU
    python train_stage2.py --cached-blocks none   # the paper's "SFD": no cache, any number of steps

The first step runs in full and without gradient, and records Δ0 (cache.py). The second skips the
cached blocks, adds f(Δ0) in their place, and is the one that learns: student and f together,
against a discriminator that looks at decoded pictures (paper, Stage II and cache figure; official
train_stage2). What it calls real are synthetic references from the same prompt and noise, so no
outside image is needed. Iterations count optimiser steps, two of the discriminator for one of the
generator. Before them (ours) f alone is fitted to the full second step, deviation 9, then student
and f are matched to the teacher as in Stage I but on the cached path, deviation 14. Dimension key:
B batch, C latent channels, H W latent size.
"""

import contextlib
import dataclasses
import hashlib
import math
import time
from functools import partial
from pathlib import Path

from run import (Patience, Run, UserError, World, check_batch, command, newest_checkpoint, option,
                 parse_settings, processes, put_back, rng, save_whole, update, write_json)
from train_stage1 import BETAS as MATCH_BETAS
from train_stage1 import CLIP_FAKE


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
    cached_blocks: str = option(None, "span of skipped blocks, first-last, or none, then without "
                                "fit and match [official 2-7: 1.75 NFE; ours 2-9: 1.67]")
    lora_rank: int = option(None, "train LoRA of this rank, merged at the end [official 64]; "
                            "without it all weights", low=1, high=4096)
    no_compensation: bool = option(False, "train with plain reuse of the residual, without f")
    fit_iterations: int = option(None, "steps that fit f first, cached step to full step [ours]",
                                 low=0)
    match_iterations: int = option(None, "after that, turns of Stage I's losses on the cached "
                                   "path, of fake score and student [ours]", low=0)
    unconditional: bool = option(False, "do not tell the discriminator the caption [official]")
    warmup: int = option(None, "iterations in which G's turns move f alone "
                         "[paper, second hand: 500]",
                         low=0)
    references: int = option(768, "reference pictures, made once and kept [ours]", low=1,
                             high=10**7)
    # optimisation
    iterations: int = option(None, "optimiser steps, D and G together, after fit and "
                             "match [official 4000]", low=0, high=999_999)
    batch_size: int = option(None, "global batch [official 32]", low=1, high=65536)
    accumulation: int = option(1, "micro-batches one after the other, to save memory",
                               low=1, high=65536)
    student_lr: float = option(None, "of the adversarial turns [official 1e-5, of LoRA]", above=0,
                               high=1)
    compensation_lr: float = option(None, "of f [official 1e-3; tiny 1e-4, ours]", above=0, high=1)
    fit_lr: float = option(1e-3, "of f during the fit [ours]", above=0, high=1)
    match_lr: float = option(None, "of the student in the match [Stage I's]", above=0, high=1)
    fake_lr: float = option(None, "of the fake score in the match [Stage I's]", above=0, high=1)
    discriminator_lr: float = option(None, "of the heads [official 1e-5; tiny 2e-3, ours]", above=0,
                                     high=1)
    gradient_checkpointing: bool = option(False, "recompute blocks, of the VAE too, in "
                                          "backward: less memory, more time")
    seed: int = option(3407, "seed of everything random [official 3407]", low=0, high=2**31 - 1)
    # the run
    checkpoint_every: int = option(None, "iterations between checkpoints [official 100]", low=1)
    sample_every: int = option(200, "iterations between sample grids [ours]", low=1)
    log_every: int = option(10, "iterations between lines of metrics.jsonl [ours]", low=1)
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))
    dry_run: bool = option(False, "print the resolved settings and the memory plan and stop")
    overwrite: bool = option(False, "start again although the run folder holds a run")
    debug: bool = option(False, "show tracebacks")


BETAS = (0.9, 0.95)                     # [official] all three; [paper, second hand] too
WEIGHT_DECAY = 1e-4                     # [official]
CLIP = 2.0                              # [official] student and f jointly; D is not clipped
D_ONLY, D_PER_G = 50, 2                 # [official] discriminator alone at first, then 2 D : 1 G

TURNS = {                               # whose turn it is: (who learns, what is logged)
    "fit": (("compensation",), ("fit", "norm_f")),
    "fake score": (("fake_score",), ("loss_fake", "norm_fake")),
    "match": (("student", "compensation"), ("loss_match", "norm_match")),
    "discriminator": (("discriminator",), ("loss_d", "norm_d", "d_ranks")),
    "generator": (("student", "compensation"), ("loss_g", "norm_g"))}


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
    if settings.cached_blocks == "none":
        settings.match_iterations = 0
    if settings.fit_iterations + settings.match_iterations + settings.iterations > 999_999:
        raise UserError("--fit-iterations, --match-iterations and --iterations are more than "
                        "999,999 together")
    check_batch(settings)
    if settings.references % processes():
        raise UserError(f"--references {settings.references} is not a multiple of "
                        f"{processes()} processes")
    return settings, preset


def turn_of(i, fit, match):
    """Whose turn iteration i is: `fit` of f first, then `match` of fake score and student, then
    discriminator or generator as in the official code."""
    if i < fit:
        return "fit"
    if i < fit + match:
        return ("fake score", "match")[(i - fit) % 2]
    i -= fit + match
    return "generator" if i >= D_ONLY and i % (D_PER_G + 1) == 0 else "discriminator"


@partial(command, several=True)
def main(argv):
    settings, preset = resolve(
        parse_settings(Settings, argv, "train_stage2.py", __doc__.split("\n\n")[0]))
    import torch
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    from cache import BlockCache, make_compensation, nfe, parse_span
    from losses import (discriminator_loss, dmd_loss, draw_sigma, euler, fake_score_loss, fit_loss,
                        generator_loss, importance_curve, renoise, x0_from_velocity)
    from model import (Decoder, Discriminator, PromptBook, check_base, choose_prompts,
                       load_transformer, pick_device, place, save_transformer, velocity)
    from sampler import (Gallery, guided_velocity, image_noise, load_scheduler, load_student,
                         read_recipe, recipe_of, roll_out, sample_guided, sigma_grid,
                         teacher_sigmas)

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
    before = settings.fit_iterations, settings.match_iterations
    total = sum(before) + settings.iterations
    if run.finished(total):
        return

    student, _ = load_student(settings.init, preset, init, "cpu")
    learns_f = cached and not settings.no_compensation
    torch.manual_seed(settings.seed)                            # f's first layer starts at random
    compensation = make_compensation(student.inner_dim).to(device) if learns_f else None
    discriminator = Discriminator(
        preset, None if settings.unconditional else config["pooled_projection_dim"],
        seed=settings.seed, random_weights=settings.random_weights).to(device)
    decode = Decoder(preset, device, settings.random_weights, settings.gradient_checkpointing)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    student = place(with_lora(student), device, world)
    cache = BlockCache(student, span, compensation) if cached else None

    networks = {"student": student, "discriminator": discriminator.heads}
    rates = {"student": settings.student_lr, "discriminator": settings.discriminator_lr}
    if learns_f:
        networks["compensation"], rates["compensation"] = compensation, settings.compensation_lr
    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    if settings.match_iterations:
        teacher = load_transformer(preset, frozen, settings.random_weights).requires_grad_(False)
        teacher = place(teacher, device, world)
        fake_score = load_transformer(preset, random_weights=settings.random_weights)
        if settings.gradient_checkpointing:
            fake_score.enable_gradient_checkpointing()
        networks["fake_score"] = place(fake_score, device, world)
        rates["fake_score"] = settings.fake_lr
    learning = {name: [p for p in net.parameters() if p.requires_grad]
                for name, net in networks.items()}
    optimizers = {name: torch.optim.AdamW(
        learning[name], lr=rates[name], betas=MATCH_BETAS if name == "fake_score" else BETAS,
        weight_decay=WEIGHT_DECAY, fused=True) for name in networks}
    start = run.restore(networks, optimizers)
    if settings.match_iterations and not start:
        continue_stage1(settings, networks, optimizers)
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
    curves = {"fake score": importance_curve("uniform"), "match": importance_curve("official")}
    chosen = [prompts[j] for j in torch.randint(len(prompts), (R,),
                                                generator=rng(settings.seed, "references"))]

    def batch_of(i):
        """(noise indices, prompts) of iteration i, this process's share of B: the discriminator's
        turns take those of references, all others fresh ones, which nobody can learn by heart."""
        g = rng(settings.seed, i, "batch")
        if turn_of(i, *before) == "discriminator":
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
        turn, (pick, _) = turn_of(i, *before), batch_of(i)
        learners, logged = TURNS[turn]
        draws = dict(zip(("pick", "embeds", "pooled"), (torch.tensor(pick), *book(i)), strict=True))
        k = steps - 1                                           # the step that is looked at
        if turn in ("fake score", "match"):     # any; one for all, as the cache has one mode
            g = rng(settings.seed, i, "match")
            k = int(torch.randint(steps, (1,), generator=g))
            draws |= {"uniform": world.share(torch.rand(B, generator=g)),
                      "fresh": world.share(torch.randn(B, *shape, generator=g))}
        micros = [dict(zip(draws, part, strict=True)) for part in
                  zip(*(value.chunk(settings.accumulation) for value in draws.values()),
                      strict=True)]
        high, low = sigmas[k].item(), sigmas[k + 1].item()
        parts, seen = len(micros), seen | dict.fromkeys(logged, 0.0)

        for m in micros:
            # ---- 1. the steps before it: in full, no gradient; the first records Δ0
            noise = image_noise(settings.seed, m["pick"], shape, "training").to(device)
            prompt = m["embeds"], m["pooled"]
            with torch.no_grad():
                x = roll_out(student, noise, prompt, sigmas[:k + 1], cache)[0][-1]     # B×C×H×W

            # Who learns in this turn; nobody else's gradients are touched. Where a network runs
            # without gradient there is nothing to freeze, and it must not be frozen before its
            # first forward: fully_shard would take it for one that never learns.
            for name in {"fake score": (), "discriminator": learners}.get(
                    turn, networks.keys() - {"fake_score"}):
                for p in learning[name]:
                    p.requires_grad_(name in learners)
                for group in optimizers[name].param_groups:
                    group["lr"] = (settings.fit_lr if turn == "fit" else settings.match_lr
                                   if (turn, name) == ("match", "student") else rates[name])
                    group["betas"] = MATCH_BETAS if turn == "match" else BETAS

            # ---- 2. the step as inference takes it, with gradient where student or f learn
            gradient = turn in ("fit", "match", "generator")
            mode = cache.step("reuse" if k else "full") if cached else contextlib.nullcontext()
            with torch.set_grad_enabled(gradient), mode:
                v = velocity(student, x, high, prompt)
            p = euler(x, v, high, low)                                        # B×C×H×W

            if turn == "fit":
                # ---- 3a. f alone, until the cached step predicts what the full one does
                # (deviation 9)
                with torch.no_grad(), cache.step("full"):
                    full = velocity(student, x, high, prompt)
                loss = fit_loss(v, full)
                values = {"fit": loss}

            elif turn in ("fake score", "match"):
                # ---- 3b. Stage I's two losses, in its default form, at the end of this step
                # (deviation 14)
                ends = torch.tensor([[high], [low]]).expand(2, len(x))                # 2×B
                sigma = draw_sigma(m["uniform"], *ends, curves[turn]).to(device)      # B
                x_sigma = renoise(p.detach(), low, sigma, m["fresh"].to(device))
                if turn == "fake score":
                    v_fake = velocity(networks["fake_score"], x_sigma, sigma, prompt)
                    loss = fake_score_loss(v_fake, x_sigma, x0_from_velocity(x, high, v), sigma)
                    values = {"loss_fake": loss}
                else:
                    with torch.no_grad():
                        v_real = guided_velocity(teacher, x_sigma, sigma, prompt,
                                                 book.uncond(len(x)), init["guidance"],
                                                 init["alpha"])
                        v_fake = velocity(networks["fake_score"], x_sigma, sigma, prompt)
                    loss = dmd_loss(p, euler(x_sigma, v_real, sigma, low),
                                    euler(x_sigma, v_fake, sigma, low))
                    values = {"loss_match": loss}

            else:
                # ---- 3c. adversarial: a reference is real [target 0.8], the student's picture
                # is not
                with torch.set_grad_enabled(gradient):
                    fake = decode(p)                                          # B×3×8H×8W
                # The spectral norms' power iteration goes with the turn, not with the micro-batch.
                discriminator.heads.train(m is micros[0])
                if turn == "generator":
                    loss = generator_loss(discriminator(fake, m["pooled"]))
                    values = {"loss_g": loss}
                else:
                    with torch.no_grad():
                        real = decode(reference[m["pick"]].to(device))
                    real_logits, fake_logits = zip(*(      # one pass: both see the same weights
                        each.chunk(2) for each in discriminator(
                            torch.cat([real, fake]), m["pooled"].repeat(2, 1))), strict=True)
                    loss = discriminator_loss(real_logits, fake_logits)
                    values = {"loss_d": loss, "d_ranks": torch.stack([
                        (r > f).float().mean()
                        for r, f in zip(real_logits, fake_logits, strict=True)]).mean()}

            (loss / parts).backward()
            for key, value in values.items():
                seen[key] += value.item() / parts

        if turn == "generator" and i - sum(before) < settings.warmup:        # f alone at first
            optimizers["student"].zero_grad(set_to_none=True)
            learners = ("compensation",)
        norm = seen[logged[1]] = update([optimizers[name] for name in learners if name in networks],
                                        {"discriminator": math.inf,
                                         "fake score": CLIP_FAKE}.get(turn, CLIP))

        # ================================================================== log, show, save
        done, end, stop = i + 1, i + 1 == total, world.any(run.interrupted)
        patience.check(done, {turn: norm})
        if done % settings.log_every == 0 or end:
            turns = [turn_of(j, *before) for j in range(done)]
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


def continue_stage1(settings, networks, optimizers):
    """The match goes on where Stage I stopped: with the fake score of its newest checkpoint, which
    knows the student already, and the optimisers' states of both (deviation 14)."""
    first = World().first
    _, parts = newest_checkpoint(settings.init, first)
    if not parts:
        if first:
            print(f"{settings.init} has no checkpoint left; its fake score starts from the base "
                  "model")
        return
    student = () if settings.lora_rank else ("student",)            # LoRA trains other parameters
    put_back(settings.init, parts, networks, optimizers, ["fake_score"], ["fake_score", *student])


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
