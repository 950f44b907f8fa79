"""The networks: which base models there are, loading them, encoding prompts, decoding latents.

Teacher, student and fake score are the same stock `SD3Transformer2DModel`, started from the same
base. `tiny` and `sd3-medium` take the same path: a preset names a pipeline folder or hub id and the
recipe's values, the rest is read from that pipeline's own configs. Not here: the method
(losses.py), the cache (cache.py).

Dimension key: B batch, C latent channels, H W latent size, L text tokens, D width of the text
embedding, P width of the pooled embedding. Latents and sigmas are fp32; pictures lie in [0, 1].
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import torch

from run import UserError, World, rng, save_whole, whole_state

HERE = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------- presets

@dataclasses.dataclass(frozen=True)
class Preset:
    """A base model and the recipe's values for it; each value carries its origin."""
    name: str
    source: str                        # pipeline folder or hub id
    guidance: float = 7.0              # [official] w of Eq. 4
    alpha: float = 0.94                # [paper, second hand] threshold of Eq. 4; [official] 0.96
    batch_size: int = 64               # [official] 8 GPUs × 8
    iterations: int = 500              # [official] Stage I
    student_lr: float = 5e-6           # [official]
    fake_lr: float = 4e-5              # [official]
    checkpoint_every: int = 50         # [official]
    cached_blocks: str = "2-9"         # [ours] which; 1.67 NFE [paper] means 8 of 24 blocks
    text_length: int = 256             # [official] T5 tokens
    captions: str = "grammar"          # where prompts come from when no --prompts is given
    architecture: dict | None = None   # for --random-weights: SD3Transformer2DModel's arguments
    stage2_iterations: int = 4000      # [official] D and G together
    stage2_checkpoint_every: int = 100 # [official]
    stage2_batch_size: int = 32        # [official] 8 GPUs × 1 × accumulation 4
    stage2_student_lr: float = 1e-5    # [official] for LoRA
    compensation_lr: float = 1e-3      # [official]
    discriminator_lr: float = 1e-5     # [official]
    fit_iterations: int = 500          # [ours] the cached step towards the full one, at first
    match_iterations: int = 0          # [ours] Stage I's loss on the cached path, after the fit
    match_lr: float = 5e-6             # [ours] Stage I's
    warmup: int = 500                  # [paper, second hand]; [official] 1000
    discriminator: str = "facebook/convnextv2-base-22k-224"  # [ours] for OpenCLIP ConvNeXt-XXLarge
    picture_mean: tuple = (0.485, 0.456, 0.406)              # what that backbone was trained on
    picture_std: tuple = (0.229, 0.224, 0.225)

    @property
    def tokens(self):
        """L, the text tokens of a prompt: 77 of CLIP and T5's, or the miniature's 8."""
        return 77 + self.text_length if self.text_length else 8


_SD3 = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
            num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192)

PRESETS = {preset.name: preset for preset in (
    # [ours] all of tiny's values, found by trial; the span is SD3-Medium's, to scale;
    # w amplifies the usual scene as w = 7 does for the real models
    Preset("tiny", str(HERE / "weights" / "tiny-sd3"), guidance=4.0, batch_size=32, iterations=220,
           student_lr=1e-4, fake_lr=4e-4, checkpoint_every=100, cached_blocks="1-4", text_length=0,
           captions="tiny", stage2_iterations=600, stage2_checkpoint_every=300,
           compensation_lr=1e-4, discriminator_lr=2e-3, fit_iterations=100, match_iterations=220,
           match_lr=1e-4, warmup=0,
           discriminator=str(HERE / "weights" / "tiny-sd3" / "discriminator_backbone"),
           picture_mean=(0.5,) * 3, picture_std=(0.5,) * 3),
    Preset("sd3-medium", "stabilityai/stable-diffusion-3-medium-diffusers", architecture=_SD3),
    # [ours] the paper does not treat it
    Preset("sd3.5-medium", "stabilityai/stable-diffusion-3.5-medium",
           architecture={**_SD3, "qk_norm": "rms_norm", "pos_embed_max_size": 384,
                         "dual_attention_layers": tuple(range(13))}),
    Preset("sd3.5-large", "stabilityai/stable-diffusion-3.5-large",
           cached_blocks="2-11",       # [ours] which; 1.74 NFE [paper] means 10 of 38
           architecture={**_SD3, "num_layers": 38, "num_attention_heads": 38,
                         "caption_projection_dim": 2432, "qk_norm": "rms_norm"}),
)}


def find_preset(model):
    """The preset of that name, or one with SD3's values for any pipeline folder or hub id.
    UserError for a bare name that is neither. Reads nothing: check_base does.
    """
    preset = PRESETS.get(model)
    if preset is None:
        if not Path(model).exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
            raise UserError(f"there is no model {model}; use {', '.join(PRESETS)}, "
                            "a pipeline folder or a hub id")
        preset = Preset(model, model)
        folder = Path(model)
        if folder.is_dir() and not (folder / "text_encoder_3" / "config.json").exists():
            preset = dataclasses.replace(preset, text_length=0)
    return preset


def check_base(preset, random_weights=False):
    """The transformer's config of a preset as a dict; UserError unless it is an SD3 transformer.
    Reads only config.json, so that a misspelt name costs nothing; with random_weights a preset's
    own architecture, without a download."""
    from diffusers import SD3Transformer2DModel
    if random_weights and preset.architecture:
        return preset.architecture
    with _hub(preset, "transformer/config.json"):
        config = SD3Transformer2DModel.load_config(preset.source, subfolder="transformer")
    if config.get("_class_name") != "SD3Transformer2DModel":
        raise UserError(f"{preset.source} holds a {config.get('_class_name')}, "
                        "not an SD3Transformer2DModel")
    return config


@contextlib.contextmanager
def _hub(preset, what):
    """Turns the many ways in which weights cannot be had into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors or ValueErrors
        advice = (f"is {preset.source} a diffusers pipeline folder?"
                  if Path(preset.source).exists() else
                  f"accept the licence at huggingface.co/{preset.source} and run `hf auth login`, "
                  "or check the name and the network; --model tiny needs no download")
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"cannot load {what} of {preset.source} ({first}); {advice}") from error


def pick_device(name=None):
    """The torch device: the one named, else cuda, mps or cpu, the first that is there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    name = name or next(key for key in ("cuda", "mps", "cpu") if there[key])
    if not there[name]:
        raise UserError(f"--device {name}: this PyTorch finds no such device; there is "
                        f"{', '.join(key for key in there if there[key])}")
    return torch.device(name)


# ----------------------------------------------------------------------------- networks

def load_transformer(preset, dtype=torch.float32, random_weights=False):
    """A stock SD3Transformer2DModel of the base model, in eval mode.
    random_weights builds it without a download."""
    from diffusers import SD3Transformer2DModel
    if random_weights and preset.architecture:
        torch.manual_seed(0)
        return SD3Transformer2DModel(**preset.architecture).to(dtype).eval()
    with _hub(preset, "the transformer"):
        if random_weights:
            torch.manual_seed(0)
            return SD3Transformer2DModel.from_config(check_base(preset)).to(dtype).eval()
        return SD3Transformer2DModel.from_pretrained(
            preset.source, subfolder="transformer", torch_dtype=dtype,
            use_safetensors=True).eval()                            # never a pickle


def place(net, device, world):
    """The transformer on its device, its weights spread over the processes if there are several:
    torch's fully_shard of each block and of the rest, gathered block by block when they are used.

    Optimisers and caches are made after this. On CUDA the blocks compute in bf16 and gradients are
    summed in fp32; on the CPU all is fp32.
    """
    if world.size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        how = {"mesh": init_device_mesh(device.type, (world.size,)),
               "reshard_after_forward": True}  # the root too: what stays whole would not hear
                                               # that a turn has changed who learns
        if device.type == "cuda":  # velocity() casts; latents and sigmas must stay fp32 before it
            how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32,
                                                    cast_forward_inputs=False)
        for part in (*net.transformer_blocks, net):
            fully_shard(part, **how)
    return net.to(device)


def save_transformer(net, folder, half, prepare=lambda plain: plain):
    """Writes a plain diffusers transformer folder of a network that may be sharded, in half
    precision if so told. prepare: what else makes a bare transformer one with net's parameters.
    All processes call it; the first one writes."""
    from diffusers import SD3Transformer2DModel
    state = whole_state(net)
    if World().first:
        with torch.device("meta"):
            plain = prepare(SD3Transformer2DModel.from_config(net.config))
        plain.load_state_dict(state, assign=True)
        if net._hf_peft_config_loaded:  # LoRA becomes part of the weights
            plain.fuse_lora()
            plain.unload_lora()
        save_whole(folder, (plain.half() if half else plain).save_pretrained)


def velocity(net, x, sigma, prompt):
    """The network's velocity, fp32 [B, C, H, W], at latents x [B, C, H, W]
    and sigma (a number or [B]).

    prompt is (embeds [B, L, D], pooled [B, P]). This is the only place where sigma becomes a
    timestep (1000·σ). On CUDA the forward runs in bf16 autocast; what enters and leaves is fp32
    (deviation 7).
    """
    timestep = 1000 * torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        v = net(hidden_states=x.to(net.dtype), timestep=timestep,
                encoder_hidden_states=prompt[0].to(net.dtype),
                pooled_projections=prompt[1].to(net.dtype), return_dict=False)[0]
    return v.float()


def vae_config(preset, random_weights=False):
    """The VAE's config as a dict; with random_weights that of SD3's own VAE, without a download."""
    from diffusers import AutoencoderKL
    if random_weights and preset.architecture:
        return dict(down_block_types=["DownEncoderBlock2D"] * 4,
                    up_block_types=["UpDecoderBlock2D"] * 4,
                    block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16,
                    use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305,
                    shift_factor=0.0609)
    with _hub(preset, "the VAE's config"):
        return AutoencoderKL.load_config(preset.source, subfolder="vae")


def vae_factor(config):
    """Pixels of a side for each latent pixel: 8 for the real models, 4 for tiny."""
    return 2 ** (len(config["block_out_channels"]) - 1)


class Decoder:
    """The frozen VAE: latents [B, C, H, W] to pictures [B, 3, 8H, 8W] in [0, 1] (tiny: 4H, 4W).
    Not clamped, so that gradient flows everywhere."""

    def __init__(self, preset, device, random_weights=False, checkpointing=False):
        from diffusers import AutoencoderKL
        if random_weights and preset.architecture:
            torch.manual_seed(0)
            self.vae = AutoencoderKL.from_config(vae_config(preset, True))
        else:
            with _hub(preset, "the VAE"):
                self.vae = AutoencoderKL.from_pretrained(
                    preset.source, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True)
        self.vae.to(device).eval().requires_grad_(False)
        if checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.factor = vae_factor(self.vae.config)

    def __call__(self, latents):
        config = self.vae.config
        return (self.vae.decode(latents / config.scaling_factor + config.shift_factor,
                                return_dict=False)[0] / 2 + 0.5)


class Head(torch.nn.Module):
    """Logits of what is seen, a map [B, C, H, W] or pooled features [B, C], spectrally normalised.

    Told the caption as a projection, as in conditional GANs (Miyato & Koyama 2018): the logit is
    judge(h) + h·c with h the head's features and c a linear image of the pooled prompt [B, P]
    (deviation 11).
    """

    def __init__(self, seen, width, layer, pooled_width):
        super().__init__()
        from torch.nn.utils.parametrizations import spectral_norm
        self.look = spectral_norm(layer(seen, width))
        self.judge = spectral_norm(torch.nn.Linear(width, 1))
        self.caption = (spectral_norm(torch.nn.Linear(pooled_width, width, bias=False))
                        if pooled_width else None)

    def forward(self, seen, pooled):
        h = torch.nn.functional.leaky_relu(self.look(seen), 0.2)
        h = h.flatten(2).mT if h.ndim == 4 else h[:, None]                  # B×places×width
        logits = self.judge(h)[..., 0]                                      # B×places
        if self.caption is not None:
            length = h.shape[-1] ** 0.5                     # the prompt's, whatever its encoder's
            c = self.caption(length * torch.nn.functional.normalize(pooled.float(), dim=1))
            logits = logits + (h @ c[:, :, None])[..., 0]
        return logits


class Discriminator(torch.nn.Module):
    """Frozen multi-level backbone with small heads: pictures [B, 3, H, W] in [0, 1] and pooled
    prompts [B, P] to a list of logits [B, places].

    One convolutional head for each of the backbone's maps and one on the pooled last map. Gradient
    flows through the backbone to the picture; only the heads learn. pooled_width is P, or None for
    heads that are not told the caption, as the official ones (four of width 512 with strides and
    blurs on OpenCLIP ConvNeXt-XXLarge; deviation 11).
    """

    def __init__(self, preset, pooled_width=None, seed=0, width=64, random_weights=False):
        super().__init__()
        from transformers import AutoConfig, ConvNextV2Backbone, ConvNextV2Config
        if random_weights and not Path(preset.discriminator).exists():
            torch.manual_seed(0)
            self.backbone = ConvNextV2Backbone(ConvNextV2Config(  # the shape of ConvNeXtV2-base
                depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024],
                out_features=["stage1", "stage2", "stage3", "stage4"]))
        else:
            with _hub(preset, "the discriminator's backbone"):
                levels = AutoConfig.from_pretrained(preset.discriminator).stage_names[1:]
                # AutoBackbone fails on local folders; the class is named here
                self.backbone = ConvNextV2Backbone.from_pretrained(
                    preset.discriminator, out_features=levels, dtype=torch.float32,
                    use_safetensors=True)
        self.backbone.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(preset.picture_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preset.picture_std)[:, None, None])
        torch.manual_seed(seed)
        channels, layer = self.backbone.channels, partial(torch.nn.Conv2d, kernel_size=3, padding=1)
        self.heads = torch.nn.ModuleList(
            [Head(c, width, layer, pooled_width) for c in channels]
            + [Head(channels[-1], width, torch.nn.Linear, pooled_width)])

    def forward(self, pictures, pooled=None):
        maps = self.backbone((pictures - self.mean) / self.std).feature_maps
        return [head(m, pooled) for head, m in
                zip(self.heads, [*maps, maps[-1].mean((2, 3))], strict=True)]


def load_pipeline(preset, dtype, **parts):
    """The stock StableDiffusion3Pipeline of a base model; parts stand in for its own components.
    A folder without T5 loads only when it is told so."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import logging
    logging.disable_progress_bar()
    without_t5 = {} if preset.text_length else {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(
        preset.source, torch_dtype=dtype, use_safetensors=True, **without_t5, **parts)


def encode_prompts(preset, prompts, device, dtype=torch.float32, random_weights=False):
    """(embeds [N, L, D], pooled [N, P]) of prompts on the CPU,
    through the stock pipeline's encode_prompt.

    Loads the text encoders, encodes, and frees them. The empty string is the unconditional prompt.
    L is 77 + 256 for the real models, 8 for tiny (no T5).
    """
    if random_weights and preset.architecture:
        shape = preset.architecture
        drawn = [rng(0, "prompt", text) for text in prompts]
        return (torch.stack([torch.randn(preset.tokens, shape["joint_attention_dim"],
                                         generator=g) for g in drawn]).to(dtype),
                torch.stack([torch.randn(shape["pooled_projection_dim"], generator=g)
                             for g in drawn]).to(dtype))
    from diffusers import SD3Transformer2DModel
    with torch.device("meta"):  # encode_prompt reads the transformer's config, never its weights
        config_only = SD3Transformer2DModel.from_config(check_base(preset))
    with _hub(preset, "the text encoders"):
        pipe = load_pipeline(preset, dtype, transformer=config_only, vae=None)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if encoder is not None:
            encoder.to(device)
    embeds, pooled = [], []
    with torch.no_grad():
        for prompt in prompts:  # one by one: in a batch its last bits depend on its neighbours
            e, _, p, _ = pipe.encode_prompt(
                prompt, None, None, do_classifier_free_guidance=False,
                max_sequence_length=preset.text_length, device=device)
            embeds.append(e.cpu())
            pooled.append(p.cpu())
    return torch.cat(embeds), torch.cat(pooled)


class PromptBook:
    """Embeddings by prompt, each encoded once, in chunks ahead of use.

    One encoded SD3 prompt is 2.7 MB, so 100 000 do not fit: the book holds `keep` (and the empty
    prompt) for good, the prompts of the coming iterations for a chunk, and loads and frees the text
    encoders once a chunk. wanted(iteration) lists the prompts of an iteration.
    """

    def __init__(self, preset, device, wanted, iterations, keep=(), chunk=1024,
                 random_weights=False):
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.encode = lambda texts: encode_prompts(preset, texts, device, dtype, random_weights)
        self.device, self.wanted, self.iterations, self.chunk = device, wanted, iterations, chunk
        self.keep, self.pages = ["", *keep], {}

    def of(self, texts, iteration=None):
        """(embeds [B, L, D], pooled [B, P]) of texts, on the device."""
        if any(text not in self.pages for text in texts):
            ahead = dict.fromkeys([*self.keep, *texts])
            for later in range(iteration + 1 if iteration is not None else 0, self.iterations):
                if len(ahead) >= self.chunk:
                    break
                ahead.update(dict.fromkeys(self.wanted(later)))
            new = [text for text in ahead if text not in self.pages]
            self.pages = {text: page for text, page in self.pages.items() if text in ahead}
            self.pages.update(zip(new, zip(*self.encode(new), strict=True), strict=True))
        return tuple(torch.stack(part).to(self.device)
                     for part in zip(*(self.pages[text] for text in texts), strict=True))

    def __call__(self, iteration):
        """The prompts of an iteration, as of(...)."""
        return self.of(self.wanted(iteration), iteration)

    def uncond(self, n):
        """The empty prompt n times: the teacher's unconditional branch."""
        return tuple(part.expand(n, *part.shape[1:]) for part in self.of([""]))


# ----------------------------------------------------------------------------- prompts

_GRAMMAR = (
    ("a close-up photo of", "an oil painting of", "a watercolour of", "a pencil drawing of",
     "a film still of", "a wide shot of", "a studio portrait of", "a 3D render of",
     "a vintage photo of", "an isometric view of"),
    ("an old", "a young", "a small", "a giant", "a wooden", "a golden", "a ragged", "a cheerful",
     "a tired", "a glass"),
    ("cat", "fisherman", "robot", "lighthouse", "dancer", "fox", "violin", "castle", "bicycle",
     "astronaut", "owl", "gardener", "sailing ship", "teapot", "elephant", "chess player"),
    ("in a foggy forest", "on a busy street", "by the sea", "in a sunlit kitchen",
     "on a mountain ridge", "in the desert", "under a bridge at night", "in a library",
     "among wild flowers", "in heavy snow"),
    ("at dawn", "in soft light", "with long shadows", "in neon colours", "in muted tones"))


def default_prompts(preset):
    """The miniature's 24 captions, or (deviation 8) 80 000 prompts of a built-in grammar
    (style, kind, subject, place, light)."""
    if preset.captions == "tiny":
        from tiny import CAPTIONS
        return CAPTIONS
    import itertools
    return [" ".join(words) for words in itertools.product(*_GRAMMAR)]


def read_prompts(path):
    """Prompts of a file: text, one a line, or JSON lines with "prompt".
    UserError by file name and line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--prompts {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # takes a byte-order mark away
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path}: not UTF-8 text") from None
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("{"):
            try:
                line = json.loads(line)["prompt"].strip()
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"--prompts {path}, line {number}: "
                                "no JSON object with a text \"prompt\"") from None
        if "\0" in line or len(line) > 10_000:
            raise UserError(f"--prompts {path}, line {number}: "
                            "NUL characters or longer than 10,000 characters")
        if line:
            prompts.append(line)
    if not prompts:
        raise UserError(f"--prompts {path}: no prompt in it")
    return prompts


def choose_prompts(preset, path=None):
    """The prompts to train or sample on; warns of words that the miniature world does not know."""
    prompts = read_prompts(path) if path else default_prompts(preset)
    warn_unknown_words(preset, prompts)
    return prompts


def warn_unknown_words(preset, prompts):
    """The miniature knows a dozen words;
    any other one is read as noise, which deserves a warning."""
    if preset.captions == "tiny":
        from tiny import WORDS
        unknown = sorted({word for text in prompts for word in text.lower().split()} - WORDS)
        if unknown:
            print(f"warning: the miniature world does not know {', '.join(unknown[:8])}; "
                  f"its words are {', '.join(sorted(WORDS))}", file=sys.stderr)


def save_pictures(pictures, path, columns, labels=()):
    """Saves pictures [B, 3, H, W] in [0, 1] as one PNG grid, with a label before each row;
    small ones are shown enlarged to about 96 pixels."""
    from PIL import Image, ImageDraw, ImageFont
    rows = -(-len(pictures) // columns)
    h, w = pictures.shape[2:]
    canvas = torch.ones(3, rows * (h + 2), columns * (w + 2))
    for i, picture in enumerate(pictures.float().cpu()):
        y, x = i // columns * (h + 2), i % columns * (w + 2)
        canvas[:, y:y + h, x:x + w] = picture.clamp(0, 1)
    image = Image.fromarray((canvas.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    scale = max(1, 96 // h)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    image = image.resize((image.width * scale, image.height * scale), Image.NEAREST)
    if labels:
        font = ImageFont.load_default(20)
        margin = 20 + max(int(font.getlength(label)) for label in labels)
        sheet = Image.new("RGB", (image.width + margin, image.height), "white")
        sheet.paste(image, (margin, 0))
        for row, label in enumerate(labels):
            ImageDraw.Draw(sheet).text((10, (row + 0.4) * (h + 2) * scale), label, "black", font)
        image = sheet
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
