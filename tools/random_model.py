"""Writes a Stable Diffusion 3 pipeline folder of the true shape with random weights.

    python -m tools.random_model --model sd3-medium --out models/random-sd3-medium
    python train_stage1.py --model models/random-sd3-medium

The real weights are gated, and they take hours to download. Seconds and memory do not depend on
them: with this folder both stages and the benchmark run on a new machine without a download. The
pictures show nothing.

True are the transformer, the VAE, the backbone of the discriminator and the shape of an encoded
prompt, 77 + 256 tokens of width 4096. The text encoders are true in width alone: they run once for
each prompt, so two layers do. All weights are in half precision, as on the hub.
"""

import dataclasses
from pathlib import Path

from run import UserError, command, option, parse_settings, save_whole

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer,
                          ConvNextV2Backbone, ConvNextV2Config, T5Config, T5EncoderModel,
                          T5Tokenizer)

from model import PRESETS

# Config of SD3's own VAE: pictures [3, 8H, 8W] ↔ latents [16, H, W]. 84 M parameters.
SD3_VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16,
    use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
# Shape of ConvNeXtV2-base, the presets' discriminator backbone. 88 M parameters.
CONVNEXT_BASE = dict(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024],
                     out_features=["stage1", "stage2", "stage3", "stage4"])
# Hidden width and attention heads of SD3's two CLIPs. Side by side they give the 768 + 1280 = 2048
# of a pooled prompt.
CLIP_WIDTHS = ((768, 12), (1280, 20))
LAYERS = 2          # [ours] of each CLIP; SD3 reads the last but one, so there must be two
T5_WIDTH = 4096     # the transformer's joint_attention_dim; CLIP's 2048 are padded with zeros


@dataclasses.dataclass
class Settings:
    model: str = option("sd3-medium", "whose shape", choices=tuple(
        name for name, preset in PRESETS.items() if preset.architecture))
    out: str = option(None, "folder to write (default: models/random-MODEL)")
    blocks: int = option(None, "fewer blocks than the model has", low=2, high=100)
    size: int = option(None, "latent pixels of a side (default: the model's 128)", low=2, high=192)


# ================================================================== text

def clip_tokenizer():
    """A CLIPTokenizer of 77 tokens without a merge: each byte of a prompt is a token."""
    letters = sorted(ByteLevel.alphabet())                # CLIP's names of the 256 bytes
    ends = [letter + "</w>" for letter in letters]        # the same bytes at the end of a word
    pieces = [*letters, *ends, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer():
    """A T5Tokenizer (Unigram of the library tokenizers) that knows the printable ASCII characters.

    T5 expects <pad>, </s> and <unk> as tokens 0, 1, 2. "▁" stands for a space. The number beside a
    piece is the logarithm of its probability; here all are alike.
    """
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0,
                       model_max_length=512)


def clip_encoder(tokenizer, width, heads):
    """A small CLIP text encoder with projection, hidden states of `width`."""
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, projection_dim=width,
        intermediate_size=width, num_hidden_layers=LAYERS, num_attention_heads=heads,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def t5_encoder(tokenizer):
    """A T5 encoder of true width with one narrow layer."""
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, num_layers=1, num_heads=4, d_kv=64, d_ff=256,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


# ================================================================== the folder

def write_pipeline(folder, config):
    """Writes a stock pipeline and, beside it, the discriminator's backbone."""
    torch.manual_seed(0)                                  # the same folder for everybody
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**config), vae=AutoencoderKL(**SD3_VAE),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_encoder(clip, *CLIP_WIDTHS[0]), tokenizer=clip,
        text_encoder_2=clip_encoder(clip, *CLIP_WIDTHS[1]), tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5), tokenizer_3=t5)
    pipe.to(torch.float16).save_pretrained(folder)
    backbone = ConvNextV2Backbone(ConvNextV2Config(**CONVNEXT_BASE))
    backbone.half().save_pretrained(folder / "discriminator_backbone")    # as find_preset wants it


@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.random_model", __doc__.split("\n\n")[0])
    out = Path(settings.out or f"models/random-{settings.model}")
    if out.exists():
        raise UserError(f"{out} exists; give --out another folder, or delete it")
    config = dict(PRESETS[settings.model].architecture)
    config["num_layers"] = settings.blocks or config["num_layers"]
    config["sample_size"] = settings.size or config["sample_size"]
    if "dual_attention_layers" in config:                 # SD3.5-Medium: only blocks that exist
        config["dual_attention_layers"] = tuple(
            i for i in config["dual_attention_layers"] if i < config["num_layers"])
    save_whole(out, lambda folder: write_pipeline(folder, config))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {config['num_layers']} blocks, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
