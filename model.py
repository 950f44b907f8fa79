"""The networks: which base models there are, loading, encoding prompts, decoding latents, judging.

A Stable Diffusion 3 pipeline, for whoever does not know diffusers. It is a folder (or a repository
on the hub) with one sub-folder for each part:

    transformer        the network that is distilled, an MMDiT (cache.CachedSD3 shows its forward)
    vae                an autoencoder; latents [C = 16, H, W] ↔ pictures [3, 8H, 8W]
    scheduler          FlowMatchEulerDiscreteScheduler: the teacher's sigmas, shifted by 3. Given
                       `sigmas=[1.0, 0.5]` it shifts them, too: 1, 0.75, and adds the final 0
    text_encoder, _2   two CLIP text encoders; text_encoder_3, T5, which the miniature has not
    tokenizer, _2, _3  text to token numbers

A prompt reaches the transformer as two tensors, and the code calls the pair `prompt`:
    embeds [B, L, J]   one vector for each text token: 77 from both CLIPs side by side, 256 from T5
    pooled [B, P]      one vector for the whole prompt, from the two CLIPs
Stock calls name them encoder_hidden_states and pooled_projections. The empty prompt "" gives the
unconditional answer that guidance needs.

Teacher, student and fake score start from the same transformer. `tiny` and `sd3-medium` take the
same path: a preset names the pipeline, the rest is read from the pipeline's own configs. Not here:
the method (losses.py), the cache (cache.py), run folders (run.py), settings (tools/settings.py).

Dimension key: B batch, C latent channels, H W latent size, L text tokens, J and P widths of the
text embeddings. Latents and sigmas are fp32; pictures lie in [0, 1].
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tools.settings import UserError, leaving
from tools.processes import any_process, first, load_whole, processes, whole_state
from run import content_of, rng, save_tensors, save_whole
from cache import CachedSD3, check_span

HERE = Path(__file__).resolve().parent


# ================================================================== base models

# The discriminator's backbone, and the state of its repository that has safetensors with the names
# that transformers reads today.
BACKBONE, BACKBONE_REVISION = "facebook/convnextv2-base-22k-224", "refs/pr/2"


@dataclasses.dataclass(frozen=True)
class Preset:
    """What belongs to a base model. The recipes (rates, counts) stand in the train scripts."""
    name: str                          # as --model and distill.json say it
    source: str                        # pipeline folder or hub id
    cached_blocks: str = "2-9"         # [ours] which; 1.67 NFE [paper] means 8 of 24 blocks
    text_length: int = 256             # [official] T5 tokens; 0 for a pipeline without T5
    encode_batch: int = 16             # [ours] prompts encoded together; the result knows no other
    captions: str = "grammar"          # where prompts come from when no --prompts is given
    architecture: dict | None = None   # SD3Transformer2DModel's arguments, for --dry-run alone
    discriminator: str = BACKBONE      # [ours] in place of the official OpenCLIP ConvNeXt-XXLarge
    picture_mean: tuple = (0.485, 0.456, 0.406)              # what that backbone was trained on
    picture_std: tuple = (0.229, 0.224, 0.225)

    @property
    def tokens(self):
        """L, the text tokens of a prompt: 77 of CLIP and T5's, or the miniature's 8."""
        return 8 if self.captions == "tiny" else 77 + self.text_length


# The three real transformers, as their config.json says it. Nothing here is needed to train them:
# it lets --dry-run plan, and the NFE meter count, without a download.
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
# A second attention of the image stream alone, in blocks 0 to 12; the paper does not treat it.
SD35_MEDIUM = {**SD3_MEDIUM, "qk_norm": "rms_norm", "pos_embed_max_size": 384,
               "dual_attention_layers": tuple(range(13))}
SD35_LARGE = {**SD3_MEDIUM, "qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38,
              "caption_projection_dim": 2432}

PRESETS = {
    "tiny": Preset(
        "tiny", str(HERE / "tiny" / "sd3"),
        cached_blocks="1-4",           # [ours] SD3-Medium's span to scale: 4 of 12 blocks
        text_length=0, encode_batch=1, captions="tiny",
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


def find_preset(model):
    """The preset of that name, or one with SD3's values for any pipeline folder or hub id.
    UserError for a bare name that is neither. Reads no weights."""
    if model in PRESETS:
        not_shadowed(PRESETS[model].source, "--model")
        return PRESETS[model]
    # A hub id has exactly one slash. A bare name that is no folder is a misspelt preset.
    folder = Path(model).resolve()
    if not folder.exists():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
            raise UserError(f"there is no model {model}; use {', '.join(PRESETS)}, "
                            "a pipeline folder or a hub id")
        return Preset(model, model)
    if (folder / "config.json").exists() and not (folder / "transformer").exists():
        raise UserError(f"{folder} is one part of a pipeline; name the pipeline's own folder, "
                        f"perhaps {folder.parent}")
    # Stored as it is found from anywhere. Whether it has T5 is seen by its files: its
    # model_index.json may say otherwise.
    preset = Preset(str(folder), str(folder))
    if not (folder / "text_encoder_3" / "config.json").exists():
        preset = dataclasses.replace(preset, text_length=0)
    backbone = folder / "discriminator_backbone"          # as tools/random_model.py writes it
    if backbone.is_dir():
        preset = dataclasses.replace(preset, discriminator=str(backbone))
    return like_its_preset(preset, folder)


def not_shadowed(source, flag):
    """UserError when a folder in the working directory would be taken for a hub id of ours."""
    if not Path(source).is_absolute() and Path(source).exists():
        raise UserError(f"a folder {source} lies in the working directory and would be taken for "
                        f"the hub's; rename it, or say {flag} ./{source}")


def like_its_preset(preset, folder):
    """A folder's preset with the span of the real model whose transformer it has."""
    with contextlib.suppress(OSError, ValueError):        # what is wrong with it, check_base says
        config = json.loads((folder / "transformer" / "config.json").read_text())
        for known in PRESETS.values():
            same = known.architecture and all(
                config.get(key) == (list(value) if isinstance(value, tuple) else value)
                for key, value in known.architecture.items() if key != "pos_embed_max_size")
            if same:
                return dataclasses.replace(preset, cached_blocks=known.cached_blocks)
    return preset


def base_content(preset):
    """What a base model is, wherever it lies: its transformer's files, or its hub id."""
    return content_of(Path(preset.source) / "transformer")


def base_config(preset):
    """The transformer's config of a base model, a dict; UserError unless it is an SD3
    transformer."""
    # SD1, Flux and others have other inputs and other blocks; nothing here would fit them.
    if Path(preset.source).is_absolute() and not (
            Path(preset.source) / "transformer" / "config.json").exists():
        raise UserError(f"{preset.source} is no pipeline folder: it has no transformer/config.json")
    with loading("transformer/config.json", preset.source):
        config = CachedSD3.load_config(preset.source, subfolder="transformer")
    if config.get("_class_name") != "SD3Transformer2DModel":
        raise UserError(f"{preset.source} holds a {config.get('_class_name')}, "
                        "not an SD3Transformer2DModel")
    return config


def check_base(preset):
    """base_config of a base model that is sound; UserError when a tensor is missing, or when it has
    another schedule than the student's grid is made for. Called once, before anything is loaded: it
    reads configs and the names of tensors alone, so that a mistake costs nothing."""
    config = base_config(preset)
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    for part, cls in (("transformer", CachedSD3), ("vae", AutoencoderKL)):
        with loading(f"the {part}", preset.source), torch.device("meta"):
            empty = cls.from_config(cls.load_config(preset.source, subfolder=part))
            check_whole(empty, Path(preset.source) / part)
    # The student's grid (sampler.sigma_grid) is SD3's: shift 3, for every picture size.
    with loading("the scheduler", preset.source):
        schedule = FlowMatchEulerDiscreteScheduler.load_config(preset.source, subfolder="scheduler")
    for key, needed in SCHEDULE.items():
        if schedule.get(key, needed) != needed:
            raise UserError(f"{preset.source}: its scheduler has {key} = {schedule[key]}; the "
                            f"student's sigmas are made for {needed}, as in Stable Diffusion 3")
    return config


# What a scheduler's config must say, where it says anything. Each of these changes its sigmas.
SCHEDULE = {"shift": 3.0, "num_train_timesteps": 1000, "use_dynamic_shifting": False,
            "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
            "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False}


def weight_files(folder):
    """The safetensors files of a local folder that diffusers would load: those in full precision
    or, where there are none, the *.fp16 ones."""
    # Many repositories hold both, and whoever downloads takes one kind. Large networks are cut into
    # several files; all of them count.
    files = sorted(Path(folder).glob("*.safetensors"))
    return [file for file in files if ".fp16" not in file.name] or files


def variant(folder):
    """"fp16" for a local folder that has such weights alone, else None."""
    files = weight_files(folder)
    return "fp16" if files and ".fp16" in files[0].name else None


def saved_shapes(folder):
    """{tensor: (its shape, its file)} of a local folder's weights; {} of a hub id. Only the headers
    of the files are read."""
    shapes = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                shapes[name] = opened.get_slice(name).get_shape(), file
    return shapes


def check_whole(net, folder):
    """UserError unless the files of a local folder hold just the tensors of `net`, each of its
    shape. The libraries fill in what is missing at random, or drop what they do not know."""
    expected, saved = net.state_dict(), saved_shapes(folder)
    for name, (shape, file) in saved.items():
        if name not in expected:
            raise UserError(f"{file} holds a foreign tensor, {name}; save the network with "
                            "save_pretrained, adapters merged and without a prefix")
        if shape != list(expected[name].shape):
            raise UserError(f"{file}: {name} has the shape {shape}, which does not fit its "
                            "config.json")
    refuse_missing(folder, expected.keys() - saved.keys())


def refuse_missing(folder, missing):
    """UserError when tensors are missing in a folder that is on this machine (no hub id)."""
    if missing and weight_files(folder):
        raise UserError(f"{folder} lacks the tensor {min(missing)}; copy all its files again")


def parse_span(text, blocks):
    """(n, m) of a span such as "2-5", both ends skipped; UserError when it does not fit."""
    match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", str(text))
    if not match:
        raise UserError("a span of blocks is written first-last, for instance 2-5, without gaps, "
                        f"not {text}")
    span = int(match[1]), int(match[2])
    if span[0] > span[1]:
        raise UserError(f"span {text} is reversed; write {span[1]}-{span[0]}")
    try:
        return check_span(span, blocks)
    except ValueError as error:
        raise UserError(str(error)) from None


@contextlib.contextmanager
def loading(what, source):
    """Turns the many ways in which weights cannot be had into one line that says what to do. Keeps
    the bars of loading out; those of downloads stay."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers
    silent = are_progress_bars_disabled()                 # of downloads, by the user's own wish
    shown = [log for log in (of_diffusers, of_transformers) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    if not silent:
        enable_progress_bars()                            # which transformers has just disabled
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        # The hub's own errors are among them.
        advice = (f"accept the licence at huggingface.co/{source} and run `hf auth login`, "
                  "or check the name and the network; --model tiny needs no download")
        if Path(source).exists():
            advice = "its files are missing or damaged; copy or save that part again"
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"cannot load {what} of {source} ({line}); {advice}") from error
    finally:
        for log in shown:
            log.enable_progress_bar()


def pick_device(preset, name=None):
    """The torch device: the one named; else cuda for a real model, where it is there, and the CPU
    for the miniature."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there.append("cuda")
    if torch.backends.mps.is_available():
        there.append("mps")
    if name and name not in there:
        raise UserError(f"--device {name}: this PyTorch finds no such device; there is "
                        f"{', '.join(there)}")
    # The miniature's networks are so small that a GPU waits for Python most of the time: an H200
    # takes as long as two cores. And on a CPU its numbers are those of the docs.
    if not name:
        name = "cuda" if "cuda" in there and preset.captions != "tiny" else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        # fp32 products in TF32 (the discriminator's; transformers and VAE compute in bf16), and the
        # fastest convolutions, found by trial. What they were before comes back at the end.
        leaving.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        leaving.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return device


# ================================================================== the transformer

def load_transformer(preset, dtype=torch.float32, everywhere=True):
    """The base model's transformer, in eval mode. Networks that learn are fp32; a frozen one may be
    bf16. Eval and train mode are the same here: an MMDiT has no dropout. everywhere=False: the
    other processes get it without weights, which place() sends them in pieces."""
    if not everywhere and not first():
        return empty_transformer(base_config(preset), dtype)
    return read_transformer(preset.source, "transformer", dtype)


def read_transformer(source, part=None, dtype=torch.float32):
    """An SD3 transformer from a folder or hub id or, when part is named, from that part of a
    pipeline."""
    with loading("the transformer", source):
        net = CachedSD3.from_pretrained(
            source, subfolder=part, torch_dtype=dtype, variant=variant(Path(source) / (part or "")),
            use_safetensors=True)                         # a pickle could run a stranger's code
    return net.eval()


def empty_transformer(config, dtype=torch.float32):
    """A transformer of that config with shapes and no memory."""
    with torch.device("meta"):
        return CachedSD3.from_config(config).to(dtype).eval()


def frozen_dtype(device):
    """What a network that never learns is stored in: half the memory on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def call_network(net, x, sigma, prompt, **cached):
    """What the network returns, (velocity, Δ0 or None), at latents x [B, C, H, W] and sigma, a
    number or [B]. prompt is (embeds, pooled); cached are the span's arguments of CachedSD3.forward.

    This is the only place where sigma becomes a timestep. On CUDA the forward runs in bf16
    autocast; the latents outside stay fp32 (deviation 7).
    """
    # The long names are diffusers': embeds are "encoder hidden states" because text encoders made
    # them, pooled is "projections" because CLIP projects it.
    embeds, pooled = prompt
    timestep = 1000 * torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        return net(hidden_states=x.to(net.dtype), timestep=timestep,
                   encoder_hidden_states=embeds.to(net.dtype),
                   pooled_projections=pooled.to(net.dtype), return_dict=False, **cached)


def velocity(net, x, sigma, prompt):
    """The network's velocity, fp32 [B, C, H, W], every block computed."""
    return call_network(net, x, sigma, prompt)[0].float()


def place(net, device, compiled=False):
    """The transformer on its device. With several processes its weights are spread over them:
    torch's fully_shard, which gathers each block when it is used. Then only the first process needs
    to hold the whole; it sends each its pieces. Make optimisers after this."""
    if compiled:
        # Block by block: they are alike, so one is compiled and serves all. The loop around them,
        # where the cache is, stays as it is written. In place: names of weights do not change.
        for block in net.transformer_blocks:
            block.compile()
    if processes() == 1:
        return net.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    how = {"mesh": init_device_mesh(device.type, (processes(),)),
           "reshard_after_forward": True}                 # the root, too
    if device.type == "cuda":
        # Compute in bf16, sum gradients in fp32. Inputs stay as they are: call_network casts.
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32,
                                                cast_forward_inputs=False)
    whole = net.state_dict() if first() else {}
    net.to("meta")                                        # `whole` keeps the weights
    # Block by block: only one is whole at a time, the others lie in pieces on all devices.
    for block in net.transformer_blocks:
        fully_shard(block, **how)
    fully_shard(net, **how)
    net.to_empty(device=device)
    load_whole(net, whole)
    return net


def add_lora(net, rank, seed):
    """LoRA on the attention and feed-forward layers of both streams [official targets; alpha =
    rank, so the scale is 1; deviation 12]. All other weights are frozen."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("--lora-rank needs peft: pip install peft") from None
    # Of the skipped blocks these get no gradient in Stage II, so they stay as they are there.
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


def lora_base_dtype(device):
    """What the frozen weights under LoRA are stored in: half precision on one GPU, as the student's
    file has them. Sharded, all weights of a block must be of one type, so fp32."""
    half = device.type == "cuda" and processes() == 1
    return torch.float16 if half else torch.float32


def merge_lora(net):
    """Adds B·A to each weight W and takes the adapter off: nobody has to guess a scale later."""
    net.fuse_lora()
    net.unload_lora()


def save_transformer(net, folder, half, lora_rank=None):
    """Writes a stock transformer folder of a network that may be sharded, LoRA merged into its
    weights, in half precision if so told. All processes call it; the first one writes."""
    from diffusers import SD3Transformer2DModel
    state = whole_state(net)
    if not first():
        return
    # A stock network takes over the weights, so that the folder is stock: CachedSD3 would write its
    # own name into config.json, and from_pretrained of others would not find it.
    with torch.device("meta"):                            # shapes without memory
        plain = SD3Transformer2DModel.from_config(net.config)
        if lora_rank:
            add_lora(plain, lora_rank, seed=0)
    if lora_rank:
        state = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    plain.load_state_dict(state, assign=True)
    if lora_rank:
        merge_lora(plain)                                 # in place: hence the copy above
    if half:
        plain.half()
    save_whole(folder, plain.save_pretrained)


# ================================================================== latents to pictures

def vae_factor(preset):
    """Pixels of a side for each latent pixel: 8 for the real models, 4 for tiny."""
    from diffusers import AutoencoderKL
    with loading("the VAE's config", preset.source):
        # Each level but the last halves the picture's side.
        config = AutoencoderKL.load_config(preset.source, subfolder="vae")
    return 2 ** (len(config["block_out_channels"]) - 1)


class Decoder:
    """The frozen VAE: latents [B, C, H, W] to pictures [B, 3, 8H, 8W] in [0, 1] (tiny: 4H, 4W).
    Not clamped, so that gradient flows everywhere."""

    def __init__(self, preset, device, checkpointing=False):
        from diffusers import AutoencoderKL
        with loading("the VAE", preset.source):
            self.vae = AutoencoderKL.from_pretrained(
                preset.source, subfolder="vae", torch_dtype=frozen_dtype(device),
                use_safetensors=True, variant=variant(Path(preset.source) / "vae"))
        # On a GPU it is stored in bf16, half the memory; the eye sees no difference (in the
        # miniature 0.26 of 255 levels on the mean). Channels last is the order in memory that a
        # GPU's convolutions prefer; the shape stays [B, C, H, W].
        if device.type == "cuda":
            self.vae.to(memory_format=torch.channels_last)
        # Frozen: its weights do not learn. Gradient still flows through it, to the latents.
        self.vae.to(device).eval().requires_grad_(False)
        if checkpointing:
            self.vae.enable_gradient_checkpointing()

    def __call__(self, latents):
        # The transformer works on whitened latents; undo that first. The VAE paints in [−1, 1].
        config = self.vae.config
        latents = latents / config.scaling_factor + config.shift_factor
        pictures = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return pictures.float() / 2 + 0.5


# ================================================================== the discriminator (Stage II)

class Head(torch.nn.Module):
    """Logits [B, places] of a feature map [B, C, H, W] (one for each place) or of pooled features
    [B, C] (one). Spectral norms bound its slope, so that it cannot become arbitrarily sure."""

    def __init__(self, channels, width, pooled):
        super().__init__()
        from torch.nn.utils.parametrizations import spectral_norm
        look = (torch.nn.Linear(channels, width) if pooled
                else torch.nn.Conv2d(channels, width, kernel_size=3, padding=1))
        self.look = spectral_norm(look)
        self.judge = spectral_norm(torch.nn.Linear(width, 1))

    def forward(self, features):
        h = torch.nn.functional.leaky_relu(self.look(features), 0.2)      # [official] slope 0.2
        if h.ndim == 4:
            h = h.flatten(2).mT                       # B×width×H×W → B×places×width
        else:
            h = h[:, None]                            # B×1×width
        return self.judge(h)[..., 0]                                      # B×places


class Discriminator(torch.nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to a list of logits [B, places], one entry for each head
    (Stage II; deviation 11).

    A frozen vision backbone sees edges, parts and objects; small heads, which alone learn, say
    whether they look like a reference's. One head looks at each of the backbone's maps, one at the
    last map's mean. The heads are not told the prompt [official].
    """

    def __init__(self, preset, seed=0, width=64):
        super().__init__()
        self.backbone = load_backbone(preset.discriminator).eval().requires_grad_(False)
        # The backbone was trained on pictures normalised like this; others would blind it.
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


def load_backbone(source):
    """A frozen ConvNeXtV2 with all its feature maps, from a folder or the hub; UserError unless all
    its weights are there."""
    # transformers' AutoBackbone fails on local folders, so the class is named here.
    from transformers import AutoConfig, ConvNextV2Backbone
    revision = BACKBONE_REVISION if source == BACKBONE else None
    with loading("the discriminator's backbone", source):
        levels = AutoConfig.from_pretrained(source, revision=revision).stage_names[1:]
        backbone, found = ConvNextV2Backbone.from_pretrained(
            source, out_features=levels, dtype=torch.float32, use_safetensors=True,
            revision=revision, output_loading_info=True)
    # Older files name the weights of GRN gamma and beta. transformers then leaves them at zero
    # without a word, and the backbone sees less. hidden_states_norms come new with a backbone, and
    # its classifier is not needed.
    missing = [name for name in found["missing_keys"] if "hidden_states_norms" not in name]
    foreign = [name for name in found["unexpected_keys"]
               if not name.startswith(("classifier.", "layernorm.", "convnextv2.layernorm."))]
    if missing or foreign:
        what = f"lacks {min(missing)}" if missing else f"holds a foreign tensor, {min(foreign)}"
        raise UserError(f"the discriminator's backbone {source} {what}; save it with the "
                        "transformers of today, or name another by --discriminator")
    return backbone


# ================================================================== prompts

def load_pipeline(preset, dtype, **parts):
    """The stock StableDiffusion3Pipeline of a base model; parts stand in for its own components."""
    from diffusers import StableDiffusion3Pipeline
    if not preset.text_length:
        # A folder without T5 loads only when it is told so, whatever its model_index.json says.
        parts = {"text_encoder_3": None, "tokenizer_3": None, **parts}
    return StableDiffusion3Pipeline.from_pretrained(
        preset.source, torch_dtype=dtype, use_safetensors=True,
        variant=variant(Path(preset.source) / "text_encoder"), **parts)


class Prompts:
    """A pool of prompts, each encoded once, and the empty prompt. Index it like a list.

    Encode before the networks are loaded: the text encoders of a real model take 11 GB, and are
    freed again here. With a folder the result is kept there in one file, 2.7 MB for an SD3 prompt,
    which later runs and other processes share; it is mapped into memory, not read.
    """

    def __init__(self, preset, texts, device, folder=None):
        self.texts, self.device = list(texts), device
        # The empty prompt comes last, so that index i is still the i-th text.
        everything = [*self.texts, ""]
        if folder is None:
            self.embeds, self.pooled = encode_prompts(preset, everything, device)
            return
        # Named by all that it depends on, so that no file is ever out of date.
        about = [everything, frozen_dtype(device), preset.text_length, preset.encode_batch]
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            about.append(content_of(Path(preset.source) / part))
        self.content = hashlib.sha256(repr(about).encode()).hexdigest()[:12]
        file = Path(folder) / f"prompts-{self.content}.safetensors"
        if first() and not file.exists():
            embeds, pooled = encode_prompts(preset, everything, device)
            save_tensors(file, {"embeds": embeds, "pooled": pooled})
        any_process(False)                                # the others wait for the first
        encoded = load_file(file)
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
    from tqdm import tqdm
    device, size = torch.device(device), preset.encode_batch
    empty = empty_transformer(base_config(preset))        # encode_prompt reads its config alone
    with loading("the text encoders", preset.source):
        pipe = load_pipeline(preset, frozen_dtype(device), transformer=empty, vae=None)
    encoders = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2,
                "text_encoder_3": pipe.text_encoder_3}
    for name, encoder in encoders.items():
        if encoder is not None:
            check_encoder(encoder, Path(preset.source) / name)
            encoder.to(device)
    warn_of_long_prompts(pipe, preset, texts)
    embeds, pooled = [], []
    with torch.no_grad():
        for start in tqdm(range(0, len(texts), size), desc="encoding prompts",
                          disable=len(texts) < 100 or not first()):
            batch = texts[start:start + size]
            # Always full: in batches of different sizes the last bits of a prompt would depend on
            # how many came with it.
            full = batch + [""] * (size - len(batch))
            # Of the four answers two are for guidance inside the pipeline; ours are one and three.
            answers = pipe.encode_prompt(full, None, None, do_classifier_free_guidance=False,
                                         max_sequence_length=preset.text_length, device=device)
            embeds.append(answers[0][:len(batch)].cpu())                  # size×L×J
            pooled.append(answers[2][:len(batch)].cpu())                  # size×P
    return torch.cat(embeds), torch.cat(pooled)


def check_encoder(encoder, folder):
    """UserError when the files of a local folder lack a tensor of a text encoder: transformers
    would make it up at random."""
    tensors, saved = encoder.state_dict(), saved_shapes(folder)
    # T5 has one table under two names, of which its file has one.
    there = {tensors[name].data_ptr() for name in saved.keys() & tensors.keys()}
    missing = [name for name, tensor in tensors.items()
               if name not in saved and tensor.data_ptr() not in there]
    refuse_missing(folder, missing)


def warn_of_long_prompts(pipe, preset, texts):
    """Counts prompts that are longer than CLIP's 77 tokens: it reads no further. T5 does."""
    if not preset.text_length:
        return
    limit = pipe.tokenizer.model_max_length
    long = sum(len(ids) > limit for ids in pipe.tokenizer(texts).input_ids)
    if long:
        print(f"warning: {long} of {len(texts)} prompts are longer than CLIP's {limit} tokens; "
              "only T5 reads their ends", file=sys.stderr)


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
    if preset.captions == "tiny":
        from tiny.world import CAPTIONS
        return CAPTIONS
    return [" ".join(words) for words in itertools.product(*GRAMMAR)]


def texts_of(preset, path=None):
    """The texts of a file of prompts, or the default ones."""
    if not path:
        return default_prompts(preset)
    from tools.prompt_files import read_prompts           # text, JSON, CSV: nothing of the method
    return read_prompts(path)


def choose_prompts(preset, path=None, text=None):
    """The texts to train or sample on: one text, those of a file, or the default ones. Warns of
    words that the miniature world does not know."""
    texts = [text] if text else texts_of(preset, path)
    if preset.captions == "tiny":
        from tiny.world import WORDS
        unknown = {word for text in texts for word in text.lower().split()} - WORDS
        if unknown:
            print(f"warning: the miniature world does not know {', '.join(sorted(unknown)[:8])}; "
                  f"its words are {', '.join(sorted(WORDS))}", file=sys.stderr)
    return texts


def draw_pool(texts, size, seed):
    """`size` of the texts, drawn by seed (--pool): all that a run encodes and trains on."""
    if size >= len(texts):
        return texts
    # Drawn at random: the first so many of the grammar would all be of one style.
    order = torch.randperm(len(texts), generator=rng(seed, "pool"))
    return [texts[j] for j in order[:size].tolist()]
