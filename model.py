"""The networks. First one evaluation, the decoder, the discriminator, prompts, base models. Then,
to be skipped beside the paper: finding, loading, placing and saving them.

A Stable Diffusion 3 pipeline, for whoever does not know diffusers. It is a folder (or a repository
on the hub) with one sub-folder for each part:

    transformer        the network that is distilled, an MMDiT (cache.CachedSD3 shows its forward)
    vae                an autoencoder; latents [C = 16, H, W] ↔ pictures [3, 8H, 8W]
    scheduler          FlowMatchEulerDiscreteScheduler: the teacher's sigmas, shifted by 3. Given
                       `sigmas=[1.0, 0.5]` it shifts them, too: 1, 0.75, and adds the final 0
    text_encoder, _2   two CLIP text encoders; text_encoder_3, T5, which the miniature lacks
    tokenizer, _2, _3  text to token numbers

A prompt reaches the transformer as two tensors, and the code calls the pair `prompt`:
    embeds [B, L, J]   one vector for each text token: 77 from the CLIPs, whose vectors are joined
                       and padded with zeros to T5's width J, then 256 from T5
    pooled [B, P]      one vector for the whole prompt, from the two CLIPs
Stock calls name them encoder_hidden_states and pooled_projections. The empty prompt "" gives the
unconditional answer that guidance needs.

Teacher, student and fake score start from the same transformer. `tiny` and `sd3-medium` take the
same path: a preset names the pipeline, the rest is read from the pipeline's own configs. Not here:
the method (losses.py), the cache (cache.py), run folders and the command line (run.py).

Dimension key: B batch, C latent channels, H W latent size, L text tokens, J and P widths of the
text embeddings. Latents and sigmas are fp32; pictures lie in [0, 1].
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

from run import (UserError, barrier, fill_in, full_state, is_main, newest_student, processes,
                 rng, save_tensors, save_whole)

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (AutoConfig, CLIPTextModelWithProjection, ConvNextV2Backbone,
                          T5EncoderModel)
from transformers.utils import logging as transformers_logging

from cache import CachedSD3, check_span, make_compensation
from tiny.world import CAPTIONS, WORDS

# Bars of loading would bury the lines of a training; those of downloads stay.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()
enable_progress_bars()

HERE = Path(__file__).resolve().parent


# ================================================================== one evaluation of a network

def velocity(net, x, sigma, prompt, span=None, delta=None, f=None):
    """One evaluation of a network: (velocity [B, C, H, W] fp32, Δ0 or None) at latents x
    [B, C, H, W] and sigma, a number or [B]. prompt is (embeds, pooled).

    span, delta and f are the cache's (cache.CachedSD3.forward): without a span every block runs;
    with one the residual Δ0 is recorded; with delta, too, the span is skipped and f(Δ0) stands in
    for it. Δ0 is an argument and an answer, no state of the network: it cannot be left over from
    another prompt, and gradient checkpointing may run the blocks again later.
    """
    # This is the only place where sigma becomes a timestep. On CUDA the forward runs in bf16: a
    # network that learns has fp32 weights and needs autocast for it, a frozen one is stored in bf16
    # and is faster without. The latents outside stay fp32 (deviation 7). The long names are
    # diffusers': embeds are "encoder hidden states", the text encoders' answer; pooled is
    # "projections", CLIP's.
    embeds, pooled = prompt
    mixed = x.device.type == "cuda" and net.dtype == torch.float32
    timestep = 1000 * torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
        v, delta = net(hidden_states=x.to(net.dtype), timestep=timestep,
                       encoder_hidden_states=embeds.to(net.dtype),
                       pooled_projections=pooled.to(net.dtype), span=span, delta=delta, f=f)
    return v.float(), delta


# ================================================================== latents to pictures

class Decoder:
    """The frozen VAE: latents [B, C, H, W] to pictures [B, 3, 8H, 8W] (tiny: 4H, 4W), 0 black and 1
    white. Not clamped, so that gradient flows everywhere: some values lie a little outside."""

    def __init__(self, preset, device, checkpointing=False, compiled=False):
        # On a GPU it is stored in bf16, which takes half the memory. In the miniature that changes
        # a value by 0.26 of 255 levels on the mean.
        self.vae = load_part(AutoencoderKL, preset.source, "vae", frozen_dtype(device))
        # Frozen: its weights do not learn. Gradient still flows through it, to the latents.
        self.vae.to(device).requires_grad_(False)
        # A backward pass at 1024² takes 9.4 GB a picture compiled; checkpointed, which runs it a
        # second time, 7.7 GB and 1.8 times the seconds.
        if compiled:
            self.vae.decoder.compile()
        elif checkpointing:
            self.vae.enable_gradient_checkpointing()

    def __call__(self, latents):
        # The transformer's latents have mean 0 and deviation 1; undo that first. The VAE paints in
        # [−1, 1].
        config = self.vae.config
        latents = latents / config.scaling_factor + config.shift_factor
        pictures = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return pictures.float() / 2 + 0.5


# ================================================================== the discriminator (Stage II)

class Head(torch.nn.Module):
    """Logits [B, places] of a feature map [B, F, h, w] (h·w places, a logit for each) or of pooled
    features [B, F] (one place). Spectral norms bound its slope: a small change of the
    features cannot turn its answer."""

    def __init__(self, channels, width, pooled):
        super().__init__()
        if pooled:
            hidden = torch.nn.Linear(channels, width)
        else:
            hidden = torch.nn.Conv2d(channels, width, kernel_size=3, padding=1)
        self.hidden = spectral_norm(hidden)
        self.logit = spectral_norm(torch.nn.Linear(width, 1))

    def forward(self, features):
        h = torch.nn.functional.leaky_relu(self.hidden(features), 0.2)      # [official] slope 0.2
        if h.ndim == 4:
            h = h.flatten(2).mT                       # B×width×h×w → B×places×width (transposed)
        else:
            h = h[:, None]                            # B×1×width
        return self.logit(h)[..., 0]                                      # B×places


class Discriminator(torch.nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to a list of logits [B, places], one entry for each head
    (Stage II; deviation 11).

    A frozen vision backbone sees edges, parts and objects; small heads, which alone learn, say
    whether they come from a reference. Pictures enter at full size. One head looks at each of the
    backbone's maps (real models four, tiny three), one at the last map's mean. The heads are not
    told the prompt [official].
    """

    def __init__(self, preset, seed=0, width=64):
        super().__init__()
        self.backbone = load_backbone(preset.discriminator).requires_grad_(False)
        # The backbone was trained on pictures normalised like this.
        self.register_buffer("mean", torch.tensor(preset.picture_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preset.picture_std)[:, None, None])
        channels = self.backbone.channels
        torch.manual_seed(seed)
        # Early maps see texture, late ones objects; a head for each tells both.
        heads = [Head(c, width, pooled=False) for c in channels]
        heads.append(Head(channels[-1], width, pooled=True))
        self.heads = torch.nn.ModuleList(heads)

    def forward(self, pictures):
        maps = self.backbone((pictures - self.mean) / self.std).feature_maps
        features = [*maps, maps[-1].mean((2, 3))]                         # the last one is B×C
        return [head(x) for head, x in zip(self.heads, features, strict=True)]


# ================================================================== prompts

class Prompts:
    """A pool of prompts, each encoded once, and the empty prompt.

    Encode before the networks are loaded: the text encoders of a real model take 11 GB, and are
    freed again here. With folders (run folders, its own first) the result is kept in the first
    one's prompts.safetensors, 2.7 MB for an SD3 prompt, or taken from the one that has these texts.
    """

    def __init__(self, preset, texts, device, folders=()):
        self.texts, self.device = list(texts), device
        # The empty prompt comes last, so that index i is still the i-th text.
        everything = [*self.texts, ""]
        if not folders:
            self.embeds, self.pooled = encode_prompts(preset, everything, device)
            return
        files = [Path(folder) / "prompts.safetensors" for folder in folders]
        about = {"model": preset.name, "texts": json.dumps(everything)}
        if read_metadata(files[0]) not in (None, about):
            raise UserError(f"{files[0]} holds other prompts than are given now; give another "
                            "--out, or --overwrite")
        if is_main() and not any(read_metadata(file) == about for file in files):
            embeds, pooled = encode_prompts(preset, everything, device)
            save_tensors(files[0], {"embeds": embeds, "pooled": pooled}, about)
        barrier()                                         # the others wait for the file
        file = next(file for file in files if read_metadata(file) == about)
        encoded = load_file(file)                         # mapped into memory, not read
        self.embeds, self.pooled = encoded["embeds"], encoded["pooled"]

    def __len__(self):
        return len(self.texts)

    def take(self, indices):
        """The prompts of these indices: (embeds [B, L, J], pooled [B, P]) on the device."""
        indices = torch.as_tensor(indices)
        return self.embeds[indices].to(self.device), self.pooled[indices].to(self.device)

    def uncond(self, n):
        """The empty prompt n times: the teacher's unconditional branch."""
        return self.take([len(self.texts)] * n)


def encode_prompts(preset, texts, device):
    """(embeds [n, L, J], pooled [n, P]) on the CPU, by the stock pipeline's own encode_prompt.
    L is 77 + 256 for the real models, 8 for tiny, which has no T5."""
    config = CachedSD3.load_config(preset.source, subfolder="transformer")
    empty = empty_transformer(config)                     # encode_prompt reads its config alone
    pipe = load_pipeline(preset, frozen_dtype(device), transformer=empty, vae=None)
    if pipe.tokenizer_3:
        lengths = [len(ids) for ids in pipe.tokenizer_3(texts).input_ids]
        cut = sum(length > preset.text_length for length in lengths)
        if cut:
            print(f"{cut} of {len(texts)} prompts have more than T5's {preset.text_length} tokens; "
                  "their ends are cut off")
    for encoder in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if encoder is not None:
            encoder.to(device)
    embeds, pooled = [], []
    bar = tqdm(texts, "encoding prompts", disable=len(texts) < 100 or not is_main())
    with torch.no_grad():
        # One by one: the last bits of a prompt must not depend on its neighbours.
        for text in bar:
            # Four answers: embeds, pooled and, for guidance inside the pipeline, two of the empty
            # prompt, which are None here.
            of_text, _, of_whole, _ = pipe.encode_prompt(
                text, None, None, do_classifier_free_guidance=False,
                max_sequence_length=preset.text_length, device=device)
            embeds.append(of_text.cpu())                                  # 1×L×J
            pooled.append(of_whole.cpu())                                 # 1×P
    return torch.cat(embeds), torch.cat(pooled)


# ================================================================== base models

# The discriminator's backbone, and the revision of its repository whose tensors have the names that
# transformers reads today.
BACKBONE, BACKBONE_REVISION = "facebook/convnextv2-base-22k-224", "refs/pr/2"
# What the evaluation looks at real models with (tools/real_metrics.py).
CLIP = "openai/clip-vit-large-patch14"                            # [ours]
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"     # its model card's
DINO = "facebook/dinov2-base"                                     # [ours] not Stage II's backbone


@dataclasses.dataclass(frozen=True)
class Preset:
    """What belongs to a base model. Rates and counts stand in the train scripts."""
    name: str                          # as --model and settings.json say it
    source: str                        # pipeline folder or hub id
    cached_blocks: str = "2-9"         # [ours] which; 1.67 NFE [paper] means 8 of 24 blocks
    text_length: int = 256             # [official] T5 tokens; 0 for a pipeline without T5
    is_tiny: bool = False              # whether it is the miniature, with its 24 captions
    architecture: dict | None = None   # SD3Transformer2DModel's arguments: counted without download
    discriminator: str = BACKBONE      # [ours] in place of the official OpenCLIP ConvNeXt-XXLarge
    picture_mean: tuple = (0.485, 0.456, 0.406)              # what that backbone was trained on
    picture_std: tuple = (0.229, 0.224, 0.225)

    @property
    def tokens(self):
        """L, the text tokens of a prompt: 77 of CLIP and T5's, or the 8 of tiny/sd3's CLIPs."""
        return 8 if self.is_tiny else 77 + self.text_length


# The three real transformers, as their config.json says it. Only --dry-run and the count of FLOPs
# need this: they do without a download.
SD3_MEDIUM = dict(
    sample_size=128,                   # H = W of the latents at 1024² pixels
    patch_size=2,                      # 2×2 latents become one image token: 64·64 = 4096 tokens
    in_channels=16,                    # C; out_channels is C, too: velocity has the latents' shape
    out_channels=16,
    num_layers=24,                     # joint blocks
    num_attention_heads=24,            # times the head's width: D = 24·64 = 1536
    attention_head_dim=64,
    joint_attention_dim=4096,          # J, width of embeds: T5's
    caption_projection_dim=1536,       # embeds are projected to D
    pooled_projection_dim=2048,        # P: 768 + 1280 of the two CLIPs
    pos_embed_max_size=192,            # largest picture: 192 tokens a side
)
# The paper does not treat SD3.5-Medium. In its blocks 0 to 12 the image stream has a second
# attention, of its own tokens alone.
SD35_MEDIUM = {**SD3_MEDIUM, "qk_norm": "rms_norm", "pos_embed_max_size": 384,
               "dual_attention_layers": tuple(range(13))}
SD35_LARGE = {**SD3_MEDIUM, "qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38,
              "caption_projection_dim": 2432}

PRESETS = {
    "tiny": Preset(
        "tiny", str(HERE / "tiny" / "sd3"),       # C 4, H = W 8, T 16, L 8, D 128, J = P 64
        cached_blocks="1-4",           # [ours] SD3-Medium's span to scale: 4 of 12 blocks
        text_length=0, is_tiny=True,
        discriminator=str(HERE / "tiny" / "sd3" / "discriminator_backbone"),
        picture_mean=(0.5,) * 3, picture_std=(0.5,) * 3),
    "sd3-medium": Preset(
        "sd3-medium", "stabilityai/stable-diffusion-3-medium-diffusers", architecture=SD3_MEDIUM),
    "sd3.5-medium": Preset(
        "sd3.5-medium", "stabilityai/stable-diffusion-3.5-medium", architecture=SD35_MEDIUM),
    "sd3.5-large": Preset(
        "sd3.5-large", "stabilityai/stable-diffusion-3.5-large", architecture=SD35_LARGE,
        cached_blocks="2-11"),         # [ours] which; 1.74 NFE [paper] means 10 of 38
}


# ================================================================== which base model
# From here on: finding, loading, placing, saving. Skip it when you read beside the paper.

def find_preset(model):
    """The preset of that name, or one with SD3-Medium's values for any pipeline folder or hub id.
    UserError for what is neither. Reads no weights."""
    if model in PRESETS:
        return PRESETS[model]
    folder = Path(model).resolve()
    if folder.is_file():
        raise UserError(f"{model} is a file, and a base model is a pipeline folder; \"A single "
                        "file\" in docs/REAL_MODELS.md makes one of it")
    if not folder.exists():
        # A hub id has exactly one slash; the rest are misspelt names and folders that have gone.
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
            raise UserError(f"there is no model {model}; use {', '.join(PRESETS)}, "
                            "a pipeline folder or a hub id")
        return Preset(model, model)
    for name in ("transformer/config.json", "model_index.json"):
        if not (folder / name).exists():
            raise UserError(f"{folder} is no pipeline folder: it has no {name}")
    # Stored with its whole path: found from any working directory. Whether it has T5 is seen by its
    # files, since its model_index.json may say otherwise.
    has_t5 = (folder / "text_encoder_3" / "config.json").exists()
    backbone = folder / "discriminator_backbone"          # as tools/random_model.py writes it
    return Preset(str(folder), str(folder), text_length=256 if has_t5 else 0,
                  discriminator=str(backbone) if backbone.is_dir() else BACKBONE)


def check_base(preset, offline=False):
    """(the transformer's config, factor) of a base model. A latent pixel is factor × factor pixels:
    8 in the real models, 4 in tiny. UserError unless it is an SD3 transformer with SD3's schedule.
    Reads configs alone, so a mistake costs nothing; offline, a preset's without a download."""
    if offline and preset.architecture:
        return preset.architecture, 8
    with loading("the configs", preset.source):
        config = CachedSD3.load_config(preset.source, subfolder="transformer")
        vae = AutoencoderKL.load_config(preset.source, subfolder="vae")
        schedule = load_scheduler(preset).config
    # SD1, Flux and others have other inputs and other blocks; nothing here would fit them.
    if config.get("_class_name") != "SD3Transformer2DModel":
        raise UserError(f"{preset.source} holds a {config.get('_class_name')}, "
                        "not an SD3Transformer2DModel")
    # The student's grid (sampler.sigma_grid) is SD3's: shift 3, for every picture size, and none of
    # the scheduler's other ways to space its sigmas.
    others = [name for name in ("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas",
                                "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
                                "stochastic_sampling") if getattr(schedule, name, None)]
    if schedule.shift != 3.0 or others:
        raise UserError(f"{preset.source}: its scheduler has shift = {schedule.shift} "
                        f"{', '.join(others)}; the student's sigmas are made for a shift of 3, as "
                        "in Stable Diffusion 3")
    # Each level of the VAE but the last halves the picture's side.
    return config, 2 ** (len(vae["block_out_channels"]) - 1)


def prepare(settings, tiny, sd3, stage):
    """What both training scripts do first: fills in the values of the miniature or of the real
    models and checks what belongs together, before anything is loaded. Returns the preset, the
    device, the prompts, the transformer's config and the VAE's factor."""
    preset = find_preset(settings.model)
    if getattr(settings, "discriminator", None):          # Stage II's
        preset = dataclasses.replace(preset, discriminator=settings.discriminator)
    given = settings.accumulation
    fill_in(settings, tiny if preset.is_tiny else sd3)
    if given is None:
        # The scripts' value is for one GPU and their own batch size. With several processes or a
        # smaller batch fewer parts do.
        parts = max(1, settings.accumulation // processes())
        settings.accumulation = math.gcd(parts, settings.batch_size // processes())
    settings.model = preset.name                          # a folder's whole path
    settings.out = settings.out or f"runs/{Path(preset.name).name}-stage{stage}"
    # Every micro-batch of every process has the same size: only then is the mean of their means the
    # mean of the batch.
    if settings.batch_size % (processes() * settings.accumulation):
        of_all = f" times {processes()} processes" if processes() > 1 else ""
        raise UserError(f"--batch-size {settings.batch_size} is not a multiple of --accumulation "
                        f"{settings.accumulation}{of_all}")
    references = getattr(settings, "references", 0)       # Stage II's; processes make them together
    if references % processes():
        raise UserError(f"--references {references} is not a multiple of {processes()} processes")
    device = pick_device(preset, settings.device)
    texts = choose_prompts(preset, settings.prompts, None, settings.pool, settings.seed)
    config, factor = check_base(preset, offline=settings.dry_run)
    settings.no_compile |= not can_compile(preset, device)
    networks = whereabouts(preset)
    if "not there" in networks and not settings.dry_run:  # cost() says it in a dry run
        print(f"Both stages and the evaluation need:\n{networks}")
    return preset, device, texts, config, factor


def pick_device(preset, name=None):
    """The torch device: the one named; else cuda for a real model, where it is there, and the CPU
    for the miniature."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    # The miniature's networks are so small that a GPU waits for Python most of the time: an H200
    # takes as long as two cores. And on a CPU its numbers are those of the docs.
    if not name:
        name = "cuda" if there["cuda"] and not preset.is_tiny else "cpu"
    if not there[name]:
        raise UserError(f"--device {name}: this PyTorch finds no such device")
    if name == "cuda":
        # fp32 products in TF32: the discriminator's. Transformers and VAE compute in bf16.
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def load_scheduler(preset):
    """The base model's own FlowMatchEulerDiscreteScheduler."""
    with loading("the scheduler", preset.source):
        return FlowMatchEulerDiscreteScheduler.from_pretrained(preset.source, subfolder="scheduler")


def parse_span(text, blocks):
    """(n, m) of a span such as "2-5", both ends skipped; UserError when it does not fit."""
    try:
        first, last = str(text).split("-")
        return check_span((int(first), int(last)), blocks)
    except ValueError as error:
        raise UserError(f"--cached-blocks {text}: a span is written first-last, such as 2-5 "
                        f"({error})") from None


# ================================================================== where prompts come from

# Five lists whose combinations are 80 000 prompts: style, kind, subject, place, light [ours].
GRAMMAR = (
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
    """The miniature's 24 captions, or the built-in grammar's 80 000 prompts (deviation 8)."""
    if preset.is_tiny:
        return CAPTIONS
    return [" ".join(words) for words in itertools.product(*GRAMMAR)]


def read_prompts(path):
    """The prompts of a file: one a line, or JSON lines with "prompt"; UserError with the line that
    is neither."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: not a file of UTF-8 text ({error})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith(("{", "[")):          # a bracket must not become a prompt
            try:
                line = json.loads(line)["prompt"].strip()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"--prompts {path}, line {number}: neither a prompt nor a JSON "
                                "object with \"prompt\"") from None
        if line.strip():
            prompts.append(line.strip())
    if not prompts:
        raise UserError(f"--prompts {path}: no prompt in it")
    return prompts


def choose_prompts(preset, path=None, text=None, pool=None, seed=0):
    """The texts to train or sample on: one text, those of a file, or the default ones; `pool` of
    them, drawn by seed, when there are more. Warns of words that the miniature does not know."""
    texts = default_prompts(preset)
    if text:
        texts = [text]
    elif path:
        texts = read_prompts(path)
    if preset.is_tiny:
        unknown = {word for text in texts for word in text.lower().split()} - WORDS
        if unknown:
            print(f"warning: the miniature world does not know {', '.join(sorted(unknown)[:8])}; "
                  f"its words are {', '.join(sorted(WORDS))}", file=sys.stderr)
    if pool is None or pool >= len(texts):
        return texts
    # Drawn at random: the first so many of the grammar would all be of one style.
    order = torch.randperm(len(texts), generator=rng(seed, "pool"))
    return [texts[j] for j in order[:pool].tolist()]


def read_metadata(file):
    """The metadata of a safetensors file; None where there is no such file."""
    if not file.exists():
        return None
    with loading(file.name, file.parent), safe_open(file, "pt") as opened:
        return opened.metadata()


# ================================================================== loading

@contextlib.contextmanager
def loading(what, source):
    """Turns the many ways in which weights cannot be had into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        advice = (f"check its name and the network, accept its licence at huggingface.co/{source} "
                  "and run `hf auth login`; with HF_HUB_OFFLINE all of it must be on this disk")
        if Path(source).exists():
            advice = "its files are missing or damaged; copy or save that part again"
        raise UserError(f"cannot load {what} of {source} ({line}); {advice}") from error


def download(preset):
    """The preset with a folder on this disk as its source, downloaded where it is not there yet:
    of a repository just the parts of a pipeline, and of their weights one form."""
    # Loaded by its hub id instead, each part would ask the hub once more, which fails on a machine
    # without a network.
    if Path(preset.source).is_dir():
        return preset
    with loading("the pipeline", preset.source):
        folder = StableDiffusion3Pipeline.download(preset.source, use_safetensors=True)
    return dataclasses.replace(preset, source=str(folder))


def whereabouts(preset):
    """Lines that say of each network that both stages and the evaluation need whether it is on this
    disk, or how to fetch it before hours are spent."""
    sources = [preset.source, preset.discriminator]
    if not preset.is_tiny:
        sources += [CLIP, PICKSCORE, PICKSCORE_PROCESSOR, DINO]
    lines = []
    for source in sources:
        # The hub's cache notes a revision that it has fetched, and a download that was cut off.
        cached = Path(constants.HF_HUB_CACHE, "models--" + source.replace("/", "--"))
        revision = BACKBONE_REVISION if source == BACKBONE else "main"
        begun = any(cached.glob("blobs/*.incomplete"))
        if Path(source).is_dir() or (cached / "refs" / revision).exists() and not begun:
            lines.append(f"{source}: there")
        else:
            lines.append(f"{source}: not there: hf download {source} --revision {revision}")
    return "\n".join(lines)


def load_part(cls, source, part, dtype, harmless=None, **others):
    """One network of a pipeline, or of a folder of its own (part None), in eval mode. UserError
    unless its files hold just its tensors: the libraries would fill in what is missing at random
    and drop what they do not know. Names that match the pattern `harmless` may differ."""
    what = part or cls.__name__
    if part:
        others["subfolder"] = part
    with loading(what, source):
        net, found = cls.from_pretrained(                 # use_safetensors: a pickle could run code
            source, torch_dtype=dtype, use_safetensors=True, output_loading_info=True, **others)
    for verb, names in (("lacks the tensor", found["missing_keys"]),
                        ("holds a foreign tensor,", found["unexpected_keys"])):
        odd = sorted(name for name in names if not (harmless and re.match(harmless, name)))
        if odd:
            raise UserError(f"{what} of {source} {verb} {odd[0]}; copy its files again, or save it "
                            "with save_pretrained, adapters merged")
    # Without accelerate diffusers leaves some weights of a half-precision folder as they are.
    return net.to(dtype).eval()


def load_transformer(preset, dtype=torch.float32):
    """The base model's transformer, in eval mode: an MMDiT has no dropout, so that train mode would
    be the same. What learns is fp32; for one that never does see frozen_dtype()."""
    return load_part(CachedSD3, preset.source, "transformer", dtype)


def empty_transformer(config):
    """A transformer of that config with shapes and no memory."""
    with torch.device("meta"):
        return CachedSD3.from_config(config).eval()


def frozen_dtype(device):
    """What a network that never learns is stored in: half the memory on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_backbone(source):
    """A frozen ConvNeXtV2 with all its feature maps, from a folder or the hub."""
    # By its class: transformers' AutoBackbone fails on local folders.
    revision = BACKBONE_REVISION if source == BACKBONE else None
    with loading("the discriminator's backbone", source):
        # All stages but the first name, which is the stem.
        levels = AutoConfig.from_pretrained(source, revision=revision).stage_names[1:]
    # hidden_states_norms are new in a backbone, and its classifier is not needed. Anything else
    # must be there: older files name the weights of GRN gamma and beta, and transformers would
    # leave them at zero without a word.
    return load_part(ConvNextV2Backbone, source, None, torch.float32, out_features=levels,
                     revision=revision,
                     harmless=r"hidden_states_norms|classifier\.|(convnextv2\.)?layernorm\.")


def load_pipeline(preset, dtype, **parts):
    """The stock StableDiffusion3Pipeline of a base model; parts stand in for its own components."""
    # Loaded one by one, so that a missing tensor is seen. A folder without T5 loads only when it is
    # told so, whatever its model_index.json says.
    for name in ("text_encoder", "text_encoder_2"):
        parts[name] = load_part(CLIPTextModelWithProjection, preset.source, name, dtype)
    if preset.text_length:
        parts["text_encoder_3"] = load_part(T5EncoderModel, preset.source, "text_encoder_3", dtype)
    else:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    with loading("the pipeline", preset.source):
        return StableDiffusion3Pipeline.from_pretrained(
            preset.source, torch_dtype=dtype, use_safetensors=True, **parts)


# ================================================================== what a forward costs

def forward_flops(net, shape, tokens, **cached):
    """(FLOPs, Δ0) of one forward of a transformer on the meta device, for one sample of latents
    `shape` [C, H, W] and `tokens` text tokens; cached as in CachedSD3.forward."""
    with torch.device("meta"):                            # shapes without memory or arithmetic
        x = torch.zeros(1, *shape)
        embeds = torch.zeros(1, tokens, net.config.joint_attention_dim)
        pooled = torch.zeros(1, net.config.pooled_projection_dim)
        # On a CPU the counter would miss the attention; on meta tensors it does not.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _, delta = net(x, embeds, pooled, torch.zeros(1), **cached)
    return counter.get_total_flops(), delta


def cost(preset, config, shape, learning, frozen, samples, passes):
    """What --dry-run says of a run: `learning` and `frozen` transformers in memory, and an
    iteration of so many samples with so many forward passes each (a backward pass counts two)."""
    net = empty_transformer(config)
    billions = sum(p.numel() for p in net.parameters()) / 1e9
    flops, _ = forward_flops(net, shape, preset.tokens)
    return (f"transformer: {billions:.2f} billion parameters, {flops / 1e12:.3g} TFLOP a forward\n"
            f"memory: {learning} that learn × 16 bytes a parameter (fp32 weights, gradient, "
            f"AdamW's two moments) = {16 * learning * billions:.1f} GB; {frozen} frozen × 2 bytes "
            f"(bf16) = {2 * frozen * billions:.1f} GB; activations come on top: measured peaks are "
            f"in docs/REAL_MODELS.md\n"
            f"compute: an iteration is {samples} samples × {passes:g} passes = "
            f"{samples * passes * flops / 1e12:.4g} TFLOP\n{whereabouts(preset)}")


# ================================================================== compiling, many devices, LoRA

def can_compile(preset, device):
    """Whether blocks and VAE decoder are compiled: those of a real model on CUDA, where they are
    1.3 to 2.5 times as fast (docs/REAL_MODELS.md). Says what is missing for it."""
    if preset.is_tiny or device.type != "cuda":
        return False
    # torch.compile writes kernels for Triton, which builds its launcher with a C compiler.
    missing = []
    if not importlib.util.find_spec("triton"):
        missing.append("triton")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        missing.append("a C compiler")
    if missing:
        print(f"not compiled, so slower: {' and '.join(missing)} not found", file=sys.stderr)
    return not missing


def place(net, device, compiled=False):
    """The transformer on its device. With several processes its weights are spread over them:
    torch's fully_shard, which gathers each block when it is used. Each process has read the whole
    on its host and keeps its pieces. Make optimisers after this."""
    if compiled:
        # Block by block: they are alike, so one is compiled and serves all. The loop around them,
        # where the cache is, stays as it is written. In place: names of weights do not change.
        for block in net.transformer_blocks:
            block.compile()
    if processes() == 1:
        return net.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    how = {"mesh": init_device_mesh(device.type, (processes(),)), "reshard_after_forward": True}
    if device.type == "cuda":
        # Compute in bf16, sum gradients in fp32. Inputs stay as they are: velocity() casts.
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32,
                                                cast_forward_inputs=False)
    # Block by block: only one is whole at a time, the others lie in pieces on all devices.
    for block in net.transformer_blocks:
        fully_shard(block, **how)
    fully_shard(net, **how)
    return net


def add_lora(net, rank, seed):
    """LoRA on the attention and feed-forward layers of both streams [official targets; alpha =
    rank, so the scale is 1; deviation 12]. All other weights are frozen."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("--lora-rank needs peft: pip install peft") from None
    # In skipped blocks LoRA gets no gradient in Stage II, and changes nothing.
    attention = ["to_q", "to_k", "to_v", "to_out.0",
                 "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]    # add_: the text stream
    feed_forward = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    torch.manual_seed(seed)
    net.requires_grad_(False)
    net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                               target_modules=attention + feed_forward))
    for parameter in net.parameters():                    # what learns is fp32, as ever
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return net


def merge_lora(state):
    """The state {name: tensor} of a plain network from one with adapters: B·A is added to each
    weight W, so nobody has to guess a scale later. One without adapters comes back as it is."""
    merged = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            A = state[f"{layer}.lora_A.default.weight"]
            B = state[f"{layer}.lora_B.default.weight"]
            tensor = tensor + B @ A
        if ".lora_" not in name:
            merged[name.replace(".base_layer", "")] = tensor
    return merged


# ================================================================== the student on disk

def save_transformer(net, folder, half):
    """Writes a stock transformer folder of a network that may be sharded, LoRA merged into its
    weights, in half precision if so told. All processes call it; the main one writes."""
    state = full_state(net)
    if not is_main():
        return
    # A stock network takes over the weights, so that the folder is stock: CachedSD3 would write its
    # own name into config.json, and from_pretrained of others would not find it.
    with torch.device("meta"):                            # shapes without memory
        plain = SD3Transformer2DModel.from_config(net.config)
    plain.load_state_dict(merge_lora(state), assign=True)
    if half:
        plain.half()
    save_whole(folder, plain.save_pretrained,
               size=sum(tensor.nbytes for tensor in plain.state_dict().values()))


def load_student(folder, settings, preset, device):
    """(student, span or None, f or None) of a run with these settings, finished or not: its result
    or, when that is older, its newest checkpoint. On a GPU in bf16, on the CPU in fp32."""
    folder = Path(folder)
    weights = newest_student(folder)
    finished = weights.name == "student"
    span = f = None
    with loading("the student", folder):
        if finished:
            student = load_part(CachedSD3, weights, None, torch.float32)
        else:
            student = CachedSD3.from_config(
                CachedSD3.load_config(preset.source, subfolder="transformer"))
            student.load_state_dict(merge_lora(load_file(weights / "student.safetensors")))
        if settings.get("cached_blocks", "none") != "none":
            span = parse_span(settings["cached_blocks"], len(student.transformer_blocks))
        # f has a file of its own: a stock folder would drop it with a mere warning.
        if span and not settings["no_compensation"]:
            f = make_compensation(student.inner_dim)
            source = folder if finished else weights
            f.load_state_dict(load_file(source / "compensation.safetensors"))
            f.to(device, frozen_dtype(device)).eval()
    return student.to(device, frozen_dtype(device)).eval(), span, f
