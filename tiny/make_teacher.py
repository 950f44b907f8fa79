"""Makes the tiny teacher again from nothing: a Stable Diffusion 3 pipeline (MMDiT, VAE, two CLIP
text encoders, no T5), only small, and two vision backbones.

    python -m tiny.make_teacher --overwrite     # replaces tiny/sd3; an hour or two

Run again, it goes on from the checkpoints in runs/tiny-teacher.

Nothing of the method is here, and nobody who reads beside the paper needs it. Every constant was
found by trial [ours].
Dimension key: B batch, T shape templates, C latent channels, D width; pictures in [0, 1].
"""

import dataclasses
import math
from pathlib import Path

from run import Run, UserError, adamw, command, option, parse_settings, rng, save_whole

import torch
import torch.nn.functional as F
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer,
                          ConvNextV2Backbone, ConvNextV2Config)

from losses import shift_sigma
from tiny.world import (CAPTIONS, COLOURS, SCENES, SHAPES, SIZE, WORDS, draw, sample_labels,
                        templates)

SAVE_EVERY = 500      # steps between checkpoints


@dataclasses.dataclass
class Settings:
    out: str = option("tiny/sd3", "folder of the finished teacher")
    work: str = option("runs/tiny-teacher", "folder of the checkpoints on the way")
    seed: int = option(0, "seed of everything", low=0, high=2**31 - 1)
    vae_steps: int = option(1400, "VAE: steps of batch 64", low=1, high=10**6)
    teacher_steps: int = option(5000, "MMDiT: steps of batch 128", low=1, high=10**6)
    refine_steps: int = option(3000, "MMDiT: then steps with every sigma alike", low=1, high=10**6)
    backbone_steps: int = option(1000, "vision backbones: steps of batch 128", low=1, high=10**6)
    overwrite: bool = option(False, "replace --out (checkpoints in --work are always continued)")


# ================================================================== training any part

def one_cycle(progress):
    """The learning rate's factor at progress in (0, 1]: up in the first tenth, down as a cosine."""
    if progress < 0.1:
        return progress / 0.1
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def fit(name, model, loss_at, steps, lr, settings, ema=None):
    """Trains `model` on loss_at(step) with AdamW and returns it, or its average `ema`. Each part
    has its own run folder in --work, and goes on from its newest checkpoint."""
    run = Run(Path(settings.work) / name, {"iterations": steps, "steps": steps, "lr": lr,
                                           "checkpoint_every": SAVE_EVERY,
                                           "seed": settings.seed}, torch.device("cpu"))
    optimizer = adamw(model, lr, betas=(0.9, 0.99), weight_decay=1e-4)
    networks, optimizers = {"model": model}, {"model": optimizer}
    if ema:
        networks["ema"] = ema
    start = run.restore(networks, optimizers)

    bar = run.bar(start, name)
    for step in bar:
        done = step + 1
        rate = lr * one_cycle(done / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # loss_at draws its batch from (seed, step) alone, so a resumed run sees the same numbers.
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update_parameters(model)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            run.log(done, loss=loss.item(), lr=rate)
        run.checkpoint(done, networks, optimizers)
    return ema.module if ema else model


# ================================================================== VAE

def make_vae(settings):
    """AutoencoderKL with factor 4: pictures [B, 3, 32, 32] to latents [B, 4, 8, 8]. Its config
    whitens the latents, as SD3's does."""
    torch.manual_seed(settings.seed)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(24, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=8, sample_size=SIZE, use_quant_conv=False,
        use_post_quant_conv=False, force_upcast=False).to(memory_format=torch.channels_last)

    def loss_at(step):
        generator = rng(settings.seed, "vae", step)
        pictures = draw(*sample_labels(64, generator)) * 2 - 1            # a VAE paints in [−1, 1]
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        again = vae.decode(posterior.mean + posterior.std * noise).sample
        # A little pull to N(0, 1), so that the latents stay in one place; the pictures matter more.
        kl = 0.5 * (posterior.mean ** 2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(again, pictures) + 0.3 * F.l1_loss(again, pictures) + 1e-4 * kl

    vae = fit("vae", vae, loss_at, settings.vae_steps, 4e-3, settings).eval()
    with torch.no_grad():
        pictures = draw(*sample_labels(2048, rng(settings.seed, "vae scale"))) * 2 - 1
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(256)])
    vae.register_to_config(shift_factor=latents.mean().item(),
                           scaling_factor=1 / latents.std().item())
    return vae


# ================================================================== text

def make_tokenizer():
    """A CLIPTokenizer whose vocabulary is the captions' words, one token each; at most 8 tokens a
    caption, start and end counted."""
    vocabulary, merges = {}, []
    for char in sorted(set("".join(WORDS))):
        vocabulary[char] = len(vocabulary)
        vocabulary[char + "</w>"] = len(vocabulary)       # the same letter at the end of a word
    for word in sorted(WORDS):
        pieces = [*word[:-1], word[-1] + "</w>"]
        # Merge from the left until the word is one piece: c i r… → ci r… → cir…
        while len(pieces) > 1:
            pair = pieces[0], pieces[1]
            if pair not in merges:
                merges.append(pair)
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=8)


def make_text_encoder(tokenizer, index, settings):
    """A small CLIP text encoder with projection, width 32. An untrained one would give all captions
    nearly the same vector, so it learns for seconds to tell them, and the empty one, apart."""
    torch.manual_seed(settings.seed * 2 + index + 1)      # the two encoders differ
    model = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.5)
    # A head that goes again: which shape, which colour, and whether the caption is empty.
    answers = len(SHAPES) + len(COLOURS) + 1
    model.head = torch.nn.Linear(32, answers)
    tokens = tokenizer(["", *CAPTIONS], padding="max_length", max_length=8,
                       return_tensors="pt").input_ids                     # 25×8
    target = torch.zeros(1 + len(CAPTIONS), answers)
    target[0, -1] = 1
    for i in range(len(CAPTIONS)):
        shape, colour = i // len(COLOURS), i % len(COLOURS)
        target[1 + i, [shape, len(SHAPES) + colour]] = 1

    def loss_at(step):
        return F.binary_cross_entropy_with_logits(model.head(model(tokens).text_embeds), target)

    model = fit(f"text_encoder_{index + 1}", model, loss_at, 400, 3e-3, settings).eval()
    del model.head
    return model


# ================================================================== MMDiT

def make_transformer(vae, tokenizer, encoders, settings):
    """The finished pipeline. Its SD3Transformer2DModel has 12 blocks and width 128; it learns by
    flow matching with caption dropout, and its moving average is kept."""
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
        # 25×8×64 and 25×64; the empty caption is the last
        embeds, _, pooled, _ = pipe.encode_prompt(
            [*CAPTIONS, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=0)
    bank = encode_world(vae)

    # Two one-cycles. The first draws sigma as densely as the sampler's shifted grid has it, the
    # second goes on from the first's average with every sigma alike: at middle noise, where the
    # outline of a shape is decided, the first alone leaves squares and crosses blurred.
    for name, steps, lr, shift in (("transformer", settings.teacher_steps, 2e-3, 3),
                                   ("transformer_refined", settings.refine_steps, 1e-3, 1)):
        ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))

        def loss_at(step):
            generator = rng(settings.seed, name, step)
            return flow_matching_loss(model, bank, embeds, pooled, shift, generator)

        model = fit(name, model, loss_at, steps, lr, settings, ema)
    pipe.transformer = model.eval()
    return pipe


@torch.no_grad()
def encode_world(vae):
    """The whitened latents of every picture of the world, [T·6·4, 4, 8, 8]: of every template,
    colour and scene, in this order. Training looks them up instead of encoding them again."""
    labels = torch.cartesian_prod(torch.arange(len(templates()[1])), torch.arange(len(COLOURS)),
                                  torch.arange(len(SCENES)))              # T·6·4 × 3
    latents = []
    for part in labels.split(512):
        pictures = draw(*part.T) * 2 - 1
        latents.append(vae.encode(pictures).latent_dist.mode())
    return (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor


def flow_matching_loss(net, bank, embeds, pooled, shift, generator):
    """Mean (v − (ε − x0))² over a batch of 128 drawn from the world, a scalar. embeds [25, 8, 64]
    and pooled [25, 64] are those of the captions and, last, of the empty one."""
    template, colour, scene = sample_labels(128, generator)               # B each
    x0 = bank[(template * len(COLOURS) + colour) * len(SCENES) + scene]   # B×4×8×8
    caption = templates()[1][template] * len(COLOURS) + colour            # B
    # A tenth of the captions is dropped: so the network learns the unconditional answer that
    # guidance needs.
    caption[torch.rand(128, generator=generator) < 0.1] = len(CAPTIONS)
    sigma = shift_sigma(torch.rand(128, generator=generator), shift)      # B
    noise = torch.randn(x0.shape, generator=generator)
    each = sigma[:, None, None, None]                                     # B×1×1×1
    v = net(hidden_states=(1 - each) * x0 + each * noise, timestep=1000 * sigma,
            encoder_hidden_states=embeds[caption], pooled_projections=pooled[caption],
            return_dict=False)[0]
    return F.mse_loss(v, noise - x0)


# ================================================================== vision backbones

def make_backbone(name, depths, widths, seed, settings):
    """A small ConvNeXt V2 that learns to tell shape, colour and scene. Kept without its head, as a
    feature network: one for the discriminator, another one for the metrics."""
    torch.manual_seed(seed)
    net = torch.nn.Module()
    net.backbone = ConvNextV2Backbone(ConvNextV2Config(
        patch_size=2, num_stages=3, hidden_sizes=list(widths), depths=list(depths), image_size=SIZE,
        out_features=["stage1", "stage2", "stage3"]))                     # maps of 16², 8², 4²
    answers = [len(SHAPES), len(COLOURS), len(SCENES)]
    net.head = torch.nn.Linear(2 * widths[-1], sum(answers))

    def loss_at(step):
        generator = rng(seed, name, step)
        template, colour, scene = sample_labels(128, generator)
        # Every scene equally often: the shape must not give it away.
        scene = torch.randint(len(SCENES), (128,), generator=generator)
        pictures = draw(template, colour, scene) * 2 - 1
        # Up to 0.1 of noise, since it will look at a student's imperfect pictures.
        amount = 0.1 * torch.rand(128, 1, 1, 1, generator=generator)
        pictures = pictures + amount * torch.randn(pictures.shape, generator=generator)
        last = net.backbone(pictures).feature_maps[-1]                    # B×C×4×4
        features = torch.cat([last.mean((2, 3)), last.amax((2, 3))], 1)   # B×2C
        of_shape, of_colour, of_scene = net.head(features).split(answers, 1)
        return (F.cross_entropy(of_shape, templates()[1][template])
                + F.cross_entropy(of_colour, colour) + F.cross_entropy(of_scene, scene))

    return fit(name, net, loss_at, settings.backbone_steps, 2e-3, settings).backbone.eval()


# ================================================================== command

@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tiny.make_teacher", __doc__.split("\n\n")[0])
    out = Path(settings.out)
    if out.exists() and not settings.overwrite:
        raise UserError(f"{out} exists; give --out another folder, or --overwrite")
    vae = make_vae(settings)
    tokenizer = make_tokenizer()
    encoders = [make_text_encoder(tokenizer, i, settings) for i in range(2)]
    pipe = make_transformer(vae, tokenizer, encoders, settings)
    backbones = {
        "discriminator_backbone": make_backbone(
            "discriminator_backbone", (2, 2, 2), (24, 48, 96), 1, settings),
        "metric_backbone": make_backbone("metric_backbone", (1, 3, 1), (16, 32, 64), 2, settings)}

    def write(folder):
        pipe.to(torch.float16)
        # transformers would load these two in half again, diffusers loads the rest in fp32.
        pipe.text_encoder.float()
        pipe.text_encoder_2.float()
        pipe.save_pretrained(folder)
        for name, backbone in backbones.items():
            backbone.half().save_pretrained(folder / name)

    save_whole(out, write)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB; python evaluate.py says what it is worth")


if __name__ == "__main__":
    main()
