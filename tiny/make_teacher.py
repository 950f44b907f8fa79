"""Makes the tiny teacher again from nothing: a Stable Diffusion 3 pipeline (MMDiT, VAE, two CLIP text
encoders, no T5), only small, and two vision backbones.

    python -m tiny.make_teacher          # writes tiny/sd3; an hour or two; resumes when interrupted

Nothing of the method is here, and nobody who reads beside the paper needs it.
Dimension key: B batch, T shape templates, D width; pictures in [0, 1].
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from losses import shift_sigma
from run import Run, UserError, command, option, parse_settings, rng, save_whole
from tiny.world import (
    CAPTIONS,
    COLOURS,
    SCENES,
    SHAPES,
    SIZE,
    WORDS,
    draw,
    measure,
    read,
    sample_labels,
    templates,
)

SAVE_EVERY = 500                      # steps between checkpoints [ours]


@dataclasses.dataclass
class Settings:
    out: str = option("tiny/sd3", "folder of the finished teacher")
    work: str = option("runs/tiny-teacher", "folder of the checkpoints on the way")
    seed: int = option(0, "seed of everything", low=0, high=2**31 - 1)
    vae_steps: int = option(1400, "VAE: steps of batch 64 [ours]", low=1)
    teacher_steps: int = option(5000, "MMDiT: steps of batch 128 [ours]", low=1)
    refine_steps: int = option(3000, "MMDiT: then steps with every sigma alike [ours]", low=1)
    backbone_steps: int = option(1000, "vision backbones: steps of batch 128 [ours]", low=1)
    report_samples: int = option(32, "samples a caption for the numbers at the end; 0 = none",
                                 low=0)
    overwrite: bool = option(False, "replace --out (checkpoints in --work are always continued)")
    debug: bool = option(False, "show tracebacks")


def fit(name, model, loss_at, steps, lr, settings, ema=None):
    """Trains `model` on loss_at(step) with AdamW and a one-cycle rate;
    resumes from its own run folder."""
    from tqdm import tqdm
    run = Run(Path(settings.work) / name, {"steps": steps, "lr": lr, "seed": settings.seed})
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4,
                                  fused=True)
    start, parts = run.resume()
    if parts:
        model.load_state_dict(parts["model"])
        load_optimizer(model, optimizer, parts["optimizer"])
        if ema:
            ema.load_state_dict(parts["ema"])

    def save(step):
        run.checkpoint(step, {"model": model.state_dict(),
                              "optimizer": optimizer_tensors(model, optimizer),
                              **({"ema": ema.state_dict()} if ema else {})})

    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, disable=start == steps)
    for step in bar:
        progress = (step + 1) / steps
        rate = lr * min(progress / 0.1,
                        0.5 * (1 + math.cos(math.pi * max(0.0, progress - 0.1) / 0.9)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update_parameters(model)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            run.log(step + 1, loss=loss.item(), lr=rate)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps or run.interrupted:
            save(step + 1)
        if run.interrupted and step + 1 < steps:
            raise UserError(f"{name} stopped at step {step + 1}; "
                            "type the same command again to go on")
    return ema.module if ema else model


def make_vae(settings):
    """AutoencoderKL with factor 4 and four latent channels;
    its latents are whitened by the config, as SD3's are."""
    from diffusers import AutoencoderKL
    torch.manual_seed(settings.seed)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(24, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=8, sample_size=SIZE, use_quant_conv=False,
        use_post_quant_conv=False, force_upcast=False).to(memory_format=torch.channels_last)

    def loss_at(step):
        generator = rng(settings.seed, "vae", step)
        pictures = draw(*sample_labels(64, generator)) * 2 - 1
        posterior = vae.encode(pictures).latent_dist
        again = vae.decode(posterior.mean + posterior.std * torch.randn(
            posterior.mean.shape, generator=generator)).sample
        kl = 0.5 * (posterior.mean ** 2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(again, pictures) + 0.3 * F.l1_loss(again, pictures) + 1e-4 * kl

    vae = fit("vae", vae, loss_at, settings.vae_steps, 4e-3, settings).eval()
    with torch.no_grad():
        pictures = draw(*sample_labels(2048, rng(settings.seed, "vae scale"))) * 2 - 1
        latents = torch.cat([vae.encode(p).latent_dist.mode() for p in pictures.split(256)])
    vae.register_to_config(shift_factor=latents.mean().item(),
                           scaling_factor=1 / latents.std().item())
    return vae


def make_tokenizer(folder):
    """A CLIPTokenizer whose vocabulary is the captions' words,
    one token each, at most 8 tokens a caption."""
    from transformers import CLIPTokenizer
    vocabulary, merges = {}, []
    for char in sorted(set("".join(WORDS))):
        vocabulary[char] = len(vocabulary)
        vocabulary[char + "</w>"] = len(vocabulary)
    for word in sorted(WORDS):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:                       # merge from the left: c i r… → ci r… → cir…
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def make_text_encoder(tokenizer, index, settings):
    """A small CLIP text encoder, trained for seconds to tell the captions
    (and the empty one) apart."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    torch.manual_seed(settings.seed * 2 + index + 1)
    model = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.5)
    model.head = torch.nn.Linear(32, len(SHAPES) + len(COLOURS) + 1)
    tokens = tokenizer(["", *CAPTIONS], padding="max_length", max_length=8,
                       return_tensors="pt").input_ids
    target = torch.zeros(1 + len(CAPTIONS), len(SHAPES) + len(COLOURS) + 1)
    target[0, -1] = 1
    for i in range(len(CAPTIONS)):
        target[1 + i, [i // len(COLOURS), len(SHAPES) + i % len(COLOURS)]] = 1

    def loss_at(step):
        return F.binary_cross_entropy_with_logits(model.head(model(tokens).text_embeds), target)

    model = fit(f"text_encoder_{index + 1}", model, loss_at, 400, 3e-3, settings).eval()
    del model.head
    return model


def make_transformer(vae, tokenizer, encoders, settings):
    """SD3Transformer2DModel of 12 blocks and width 128, by flow matching with caption dropout;
    the EMA is kept."""
    from diffusers import (FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                           StableDiffusion3Pipeline)
    torch.manual_seed(settings.seed)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=12,
        attention_head_dim=32, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=8,
        qk_norm="rms_norm")
    pipe = StableDiffusion3Pipeline(
        transformer=model, vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1],
        text_encoder_3=None, tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    with torch.no_grad():
        # 25 × 8 × 64 and 25 × 64; the empty caption is the last
        embeds, _, pooled, _ = pipe.encode_prompt(
            [*CAPTIONS, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=0)
        grid = torch.cartesian_prod(torch.arange(len(templates()[1])), torch.arange(6),
                                    torch.arange(4))
        bank = torch.cat([vae.encode(draw(*part.T) * 2 - 1).latent_dist.mode()
                          for part in grid.split(512)])
    # every picture of the world, encoded once
    bank = (bank - vae.config.shift_factor) * vae.config.scaling_factor

    def loss_of(net, name, shift, step):
        generator = rng(settings.seed, name, step)
        template, colour, scene = sample_labels(128, generator)
        x0 = bank[(template * 6 + colour) * 4 + scene]            # B × 4 × 8 × 8
        caption = templates()[1][template] * len(COLOURS) + colour
        # dropout makes the unconditional branch
        caption[torch.rand(128, generator=generator) < 0.1] = len(CAPTIONS)
        u = torch.rand(128, generator=generator)
        sigma = shift_sigma(u, shift)[:, None, None, None]
        noise = torch.randn(x0.shape, generator=generator)
        v = net(hidden_states=(1 - sigma) * x0 + sigma * noise, timestep=1000 * sigma.flatten(),
                encoder_hidden_states=embeds[caption], pooled_projections=pooled[caption],
                return_dict=False)[0]
        return F.mse_loss(v, noise - x0)

    # Two one-cycles. The first draws sigma as densely as the sampler's shifted grid has it, the
    # second goes on from the first's average with every sigma alike: at middle noise, where the
    # outline of a shape is decided, the first alone leaves squares and crosses blurred.
    for name, steps, lr, shift in (("transformer", settings.teacher_steps, 2e-3, 3),
                                   ("transformer_refined", settings.refine_steps, 1e-3, 1)):
        ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
        model = fit(name, model, functools.partial(loss_of, model, name, shift), steps, lr,
                    settings, ema)
    pipe.transformer = model.eval()
    return pipe


def make_backbone(name, depths, widths, seed, settings):
    """A small ConvNeXt V2 that tells shape, colour and scene;
    kept without its heads, as a feature network."""
    from transformers import ConvNextV2Backbone, ConvNextV2Config
    torch.manual_seed(seed)
    net = torch.nn.Module()
    net.backbone = ConvNextV2Backbone(ConvNextV2Config(
        patch_size=2, num_stages=3, hidden_sizes=list(widths), depths=list(depths), image_size=SIZE,
        out_features=["stage1", "stage2", "stage3"]))                      # maps of 16², 8² and 4²
    net.head = torch.nn.Linear(2 * widths[-1], len(SHAPES) + len(COLOURS) + len(SCENES))

    def loss_at(step):
        generator = rng(seed, name, step)
        template, colour, scene = sample_labels(128, generator)
        # every scene equally often: nothing to guess from
        scene = torch.randint(len(SCENES), (128,), generator=generator)
        pictures = draw(template, colour, scene) * 2 - 1
        pictures = pictures + 0.1 * torch.rand(128, 1, 1, 1, generator=generator) * torch.randn(
            pictures.shape, generator=generator)
        last = net.backbone(pictures).feature_maps[-1]                    # B×C×4×4
        logits = net.head(torch.cat([last.mean((2, 3)), last.amax((2, 3))], 1))
        parts = logits.split([len(SHAPES), len(COLOURS), len(SCENES)], 1)
        return sum(F.cross_entropy(p, t) for p, t in zip(
            parts, (templates()[1][template], colour, scene), strict=True))

    return fit(name, net, loss_at, settings.backbone_steps, 2e-3, settings).backbone.eval()


def report(folder, n, seed):
    """Prints what the finished teacher is worth: n samples a caption, with and without guidance."""
    from model import PRESETS, Decoder, PromptBook, load_transformer
    from sampler import image_noise, load_scheduler, sample_guided, teacher_sigmas
    preset = dataclasses.replace(PRESETS["tiny"], source=str(folder))
    captions = torch.arange(len(CAPTIONS)).repeat_interleave(n)
    book = PromptBook(preset, "cpu", lambda i: [], 0, keep=CAPTIONS)
    net, decode = load_transformer(preset), Decoder(preset, "cpu")
    sigmas, w = teacher_sigmas(load_scheduler(preset)), preset.guidance
    with torch.inference_mode():
        truth = draw(*sample_labels(len(captions), rng(seed, "report"), captions))
        again = [decode.vae.decode(decode.vae.encode(p * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
                 for p in truth.split(256)]
        one, other = read(truth), read(torch.cat(again).clamp(0, 1))
        same = torch.stack([one[key] == other[key] for key in ("shape", "colour", "scene")]).all(0)
        print(f"VAE: {same.float().mean():.3f} of {len(same)} reconstructions are read right")
        for guidance, alpha in ((1.0, 1.0), (w, 1.0), (w, preset.alpha)):
            pictures = []
            for batch in torch.arange(len(captions)).split(128):
                latents, passes = sample_guided(
                    net, image_noise(seed, batch, (4, 8, 8)),
                    book.of([CAPTIONS[captions[i]] for i in batch]),
                    book.uncond(len(batch)), sigmas, guidance, alpha)
                pictures.append(decode(latents).clamp(0, 1))
            found = measure(torch.cat(pictures), captions)
            print(f"teacher, guidance {guidance:g} for sigma <= {alpha:g}, {passes} passes: "
                  f"caption right {found['correct'].mean():.3f}, "
                  f"usual scene {found['usual'].mean():.3f}, "
                  f"scene entropy {found['scene_entropy'].mean():.3f} (n = {n})")


@command
def main(argv):
    settings = parse_settings(Settings, argv, "tiny/make_teacher.py", __doc__.split("\n\n")[0])
    out = Path(settings.out)
    if out.exists() and not settings.overwrite:
        raise UserError(f"{out} exists; give --out another folder, or --overwrite")
    vae = make_vae(settings)
    tokenizer = make_tokenizer(Path(settings.work) / "tokenizer")
    encoders = [make_text_encoder(tokenizer, i, settings) for i in range(2)]
    pipe = make_transformer(vae, tokenizer, encoders, settings)
    backbones = {
        "discriminator_backbone": make_backbone(
            "discriminator_backbone", (2, 2, 2), (24, 48, 96), 1, settings),
        "metric_backbone": make_backbone("metric_backbone", (1, 3, 1), (16, 32, 64), 2, settings)}

    def write(folder):
        pipe.to(torch.float16)
        for encoder in (pipe.text_encoder, pipe.text_encoder_2):
            encoder.float()  # transformers would load them in half, diffusers the rest in fp32
        pipe.save_pretrained(folder)
        for name, backbone in backbones.items():
            backbone.half().save_pretrained(folder / name)

    save_whole(out, write)
    print(f"{out}: {sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e6:.1f} MB")
    if settings.report_samples:
        report(out, settings.report_samples, settings.seed)


if __name__ == "__main__":
    main()
