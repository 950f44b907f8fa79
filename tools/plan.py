"""The launch planner: what `--dry-run` says a run needs, before anything is downloaded or started.

    python train_stage1.py --model sd3-medium --dry-run

State (weights, gradients, optimiser) is counted exactly, from networks on the meta device.
Activations are measured: one block of each kind runs on the CPU at true width and token count, and
the bytes it keeps for backward are counted, each storage once; VAE and discriminator run on a small
picture and are scaled by pixels. FLOPs are counted on meta tensors.
Plans are for CUDA (bf16 autocast, fp32 weights that learn) unless --device cpu is given.
Bytes; GB = 1e9 bytes. b samples at a time on one GPU.
"""

import dataclasses
import tempfile
from pathlib import Path

import torch

from model import Decoder, Discriminator, add_lora, check_base, vae_factor
from cache import CachedSD3, make_compensation
from sampler import forward_flops
from tools.random_model import save_backbone, save_vae

GB, GPU = 1e9, 80e9         # the GPU that plans are made for
ROOM = 6e9                  # [ours] of it left free: CUDA context, libraries, fragments
PROBE = 128                 # [ours] pixels of a side at which VAE and discriminator are probed
COUNTS = (1, 2, 4, 8)       # GPUs, the columns of the table


# ================================================================== counting bytes

def meta_transformer(config, lora_rank=None):
    """The transformer of a config, with shapes and no memory."""
    with torch.device("meta"):
        net = CachedSD3.from_config(config).eval()
        if lora_rank:
            add_lora(net, lora_rank, seed=0)
    return net


def bytes_of(tensors, each=None):
    """Bytes of tensors, or of as many numbers of `each` bytes."""
    return sum(t.numel() * (each or t.element_size()) for t in tensors)


def saved_bytes(call, weights=(), blocks=()):
    """(bytes that call() keeps for backward, the most that one of `blocks` keeps of them): each
    storage once, without the weights themselves."""
    known = {w.untyped_storage()._cdata for w in weights}
    storages = []                       # kept alive, so that no address is given out twice
    within = {block: 0 for block in blocks}
    running = [None]                    # the block that runs now

    def pack(tensor):                   # torch calls it for each tensor that backward will need
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            storages.append(storage)
            if running[0] is not None:
                within[running[0]] += storage.nbytes()
        return tensor

    def enter(block, args):
        running[0] = block

    def leave(block, args, output):
        running[0] = None

    hooks = []
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(enter))
        hooks.append(block.register_forward_hook(leave))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in storages), max(within.values(), default=0)


# ================================================================== activations

def block_bytes(net, tokens, half):
    """[(kept, inputs)] for each block of a meta transformer: bytes for a sample of (image, text)
    tokens that it keeps for backward, and those of its inputs, which are all that checkpointing
    keeps."""
    blocks = list(net.transformer_blocks)
    found = {}
    # The last block is cheaper, since it returns no text. It is counted like its neighbours.
    for block in blocks[:-1]:
        kind = block.attn2 is not None                    # dual attention (SD3.5-Medium)
        if kind not in found:
            found[kind] = probe_block(block, tokens, net.inner_dim, half)
    return [found.get(block.attn2 is not None, found[blocks[0].attn2 is not None])
            for block in blocks]


def probe_block(block, tokens, width, half):
    """(kept, inputs) of one block, run on the CPU and put back onto the meta device."""
    block.to_empty(device="cpu")
    for p in block.parameters():
        torch.nn.init.constant_(p, 0.01)                  # unset memory may hold what is slow
    dtype = torch.bfloat16 if half else torch.float32
    image = torch.ones(1, tokens[0], width, dtype=dtype, requires_grad=True)
    text = torch.ones(1, tokens[1], width, dtype=dtype, requires_grad=True)
    temb = torch.ones(1, width, dtype=dtype, requires_grad=True)

    def call():
        block(hidden_states=image, encoder_hidden_states=text, temb=temb)

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        kept, _ = saved_bytes(call, block.parameters())
    if half:
        # Autocast keeps bf16 copies of the weights. They do not grow with the batch, so they are
        # counted elsewhere (Needs.copies).
        kept -= bytes_of((p for p in block.parameters() if p.ndim > 1), 2)
    block.to("meta")
    return kept, bytes_of((image, text))


def load_picture_networks(preset, stage):
    """(Decoder, Discriminator or None in Stage I, VAE's factor) on the CPU. For a preset whose
    architecture is known they have random weights, since nothing may be downloaded."""
    with tempfile.TemporaryDirectory() as folder:
        if preset.architecture:
            backbone = Path(folder, "discriminator_backbone")
            save_vae(Path(folder, "vae"))
            if stage == 2:
                save_backbone(backbone)
            preset = dataclasses.replace(preset, source=folder, discriminator=str(backbone))
        discriminator = Discriminator(preset) if stage == 2 else None
        return Decoder(preset, "cpu"), discriminator, vae_factor(preset)


def picture_bytes(decode, discriminator, shape, factor):
    """{checkpointing: bytes} that VAE and discriminator keep for backward, for a sample of latents
    `shape` [C, H, W]."""
    side = min(PROBE // factor, shape[1])
    latents = torch.zeros(1, shape[0], side, side, requires_grad=True)
    picture = torch.zeros(1, 3, side * factor, side * factor, requires_grad=True)
    vae = decode.vae
    blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    judged, _ = saved_bytes(lambda: discriminator(picture), discriminator.parameters())
    plain, most = saved_bytes(lambda: decode(latents), vae.parameters(), blocks)
    vae.enable_gradient_checkpointing()
    light, _ = saved_bytes(lambda: decode(latents), vae.parameters())
    # With checkpointing one block is whole again at a time, when it is recomputed in backward.
    scale = shape[1] * shape[2] / side ** 2               # convolutions: so many more pixels
    return {False: (plain + judged) * scale, True: (light + most + judged) * scale}


# ================================================================== the state and the peak

def state_of(stage, net, half, f=None, discriminator=None):
    """{what: (bytes, whether FSDP shards it)}. AdamW keeps two fp32 numbers for each weight that
    learns: 8 bytes. Gradients of student and fake score never live at once, nor do the
    discriminator's and the generator's."""
    weights, buffers = list(net.parameters()), list(net.buffers())
    frozen = 2 if half else 4                             # bytes of a weight that never learns
    if stage == 1:
        return {"teacher": (bytes_of(weights, frozen), True),
                "student": (bytes_of(weights, 4), True),
                "fake score": (bytes_of(weights, 4), True),
                "optimiser, both": (bytes_of(weights, 16), True),
                "gradients, one at a time": (bytes_of(weights, 4), True),
                "position tables": (bytes_of(buffers, 8 + frozen), False)}
    learning = [p for p in weights if p.requires_grad]    # with LoRA not all do
    judge = bytes_of(discriminator.parameters(), 4) + bytes_of(discriminator.heads.parameters(), 12)
    # f and the heads: 4 bytes of weight, 4 of gradient, 8 of optimiser.
    return {"student": (bytes_of(weights, 4), True),
            "optimiser": (bytes_of(learning, 8), True),
            "gradients": (bytes_of(learning, 4), True),
            "f with optimiser": (bytes_of(f.parameters(), 16) if f else 0, False),
            "discriminator": (judge, False),
            "position tables": (bytes_of(buffers, 4), False)}


@dataclasses.dataclass
class Needs:
    """What a run needs, in bytes."""
    state: dict         # {what: (bytes, whether FSDP shards it)}
    copies: float       # one GPU: bf16 copies of the weights that autocast keeps during a pass
    gathered: float     # several GPUs: the two blocks that are whole at a time
    blocks: list        # (kept, inputs) for a sample, of each block that runs with gradient
    most: float         # the largest block's kept bytes
    pictures: dict      # {checkpointing: bytes for a sample} of VAE and discriminator

    def in_blocks(self, checkpointing):
        """Bytes that the blocks keep for a sample. With checkpointing these are the inputs of all
        blocks, and one block is whole again at a time."""
        if checkpointing:
            return sum(inputs for _, inputs in self.blocks) + self.most
        return sum(kept for kept, _ in self.blocks)

    def peak(self, processes, b, checkpointing):
        """Bytes on each of `processes` GPUs at the busiest moment, b samples at a time."""
        held = 0
        for size, sharded in self.state.values():
            held += size / processes if sharded else size
        held += self.copies if processes == 1 else self.gathered
        temporaries = self.most                           # [ours] as much as the largest block
        return held + b * (self.in_blocks(checkpointing) + self.pictures[checkpointing]
                           + temporaries)


def measure_needs(stage, preset, settings, shape, config, net, span):
    """Builds and measures everything: the Needs of a run."""
    half = settings.device != "cpu"
    tokens = shape[1] * shape[2] // config["patch_size"] ** 2, preset.tokens    # N, L
    decode, discriminator, factor = load_picture_networks(preset, stage)
    f = None
    if span:
        # The skipped blocks get no gradient in Stage II, and so no optimiser state.
        for block in net.transformer_blocks[span[0]:span[1] + 1]:
            block.requires_grad_(False)
    if span and not settings.no_compensation:
        f = make_compensation(net.inner_dim)
    state = state_of(stage, net, half, f, discriminator)
    state["VAE"] = bytes_of(decode.vae.parameters(), 4), False

    blocks = block_bytes(meta_transformer(config), tokens, half)
    most = max(kept for kept, _ in blocks)
    if span:                                              # the step that learns skips them
        blocks = blocks[:span[0]] + blocks[span[1] + 1:]
    pictures = {False: 0, True: 0}                        # Stage I looks at latents alone
    if stage == 2:
        pictures = picture_bytes(decode, discriminator, shape, factor)
    # A block that FSDP has gathered: 2 bytes of weight, 2 of gradient, 4 of gradient to be summed.
    largest = max(bytes_of(block.parameters(), 8) for block in net.transformer_blocks)
    copies = bytes_of(net.parameters(), 2) if half else 0
    return Needs(state, copies, 2 * largest, blocks, most, pictures)


# ================================================================== lines of text

ROWS = ("as given", "with checkpointing", "... and one sample")
ADVICE = {"as given": "", "with checkpointing": " with --gradient-checkpointing",
          "... and one sample": " with --gradient-checkpointing and --accumulation {}"}


def peaks(needs, settings):
    """{(row, GPUs): bytes} for the settings as given, with checkpointing, and with one sample at a
    time, too."""
    table = {}
    for n in COUNTS:
        b = max(1, settings.batch_size // n // settings.accumulation)
        table["as given", n] = needs.peak(n, b, settings.gradient_checkpointing)
        table["with checkpointing", n] = needs.peak(n, b, True)
        table["... and one sample", n] = needs.peak(n, 1, True)
    return table


def memory_lines(needs, settings, stage):
    """The state, the activations and the table of peaks."""
    lines = ["memory plan" + (" (CPU)" if settings.device == "cpu" else " (CUDA)")]
    for what, (size, sharded) in needs.state.items():
        lines.append(f"  {what:26}{size / GB:9.3f} GB{'' if sharded else '  on every GPU'}")
    line = (f"  activations of a sample: {needs.in_blocks(False) / GB:.2f} GB in the blocks, "
            f"checkpointed {needs.in_blocks(True) / GB:.2f} GB")
    if stage == 2:
        line += (f"; pictures {needs.pictures[False] / GB:.2f} GB, "
                 f"checkpointed {needs.pictures[True] / GB:.2f} GB")
    lines.append(line)
    table = peaks(needs, settings)
    lines.append("  peak on each of        " + "".join(f"{n:>7} GPU" for n in COUNTS))
    for row in ROWS:
        cells = [f"{table[row, n] / GB:8.1f} GB" for n in COUNTS]
        lines.append(f"  {row:23}" + "".join(cells))
    if settings.device != "cpu" and table["as given", 1] > GPU - ROOM:
        lines.append("  80 GB GPUs: " + advice(table, settings.batch_size))
    return lines


def advice(table, batch_size):
    """The fewest GPUs that the run fits, and with what."""
    for n in COUNTS:
        for row in ROWS:
            if table[row, n] <= GPU - ROOM:
                return (f"fits {n} GPU{'s' if n > 1 else ''}"
                        + ADVICE[row].format(max(1, batch_size // n)))
    return f"does not fit {COUNTS[-1]} of them; lower --resolution, or --lora-rank in Stage II"


def disk_line(stage, net, config, state):
    """Bytes of a checkpoint and of the result."""
    whole = bytes_of(net.parameters(), 4)
    learning = bytes_of((p for p in net.parameters() if p.requires_grad), 8)
    if stage == 1:
        checkpoint = 2 * (whole + learning)               # student and fake score
    else:
        checkpoint = whole + learning + state["f with optimiser"][0]
    student = bytes_of(meta_transformer(config).parameters(), 2)          # LoRA is merged
    return (f"  disk: {checkpoint / GB:.1f} GB a checkpoint, three while one is written; student/ "
            f"{student / GB:.1f} GB")


def compute_lines(stage, preset, settings, shape, config, steps, span):
    """Transformer passes and FLOPs of an iteration or turn."""
    net = meta_transformer(config)
    full, delta = forward_flops(net, shape, preset.tokens, span=span)
    ratio = 1.0                         # the share of a pass that is left when the span is skipped
    if span:
        with torch.device("meta"):
            f = None if settings.no_compensation else make_compensation(net.inner_dim)
        rest, _ = forward_flops(net, shape, preset.tokens, span=span, delta=delta, f=f)
        ratio = rest / full
    # A pass counts 1, with its backward 3, recomputed in backward 4.
    learning = 4 if settings.gradient_checkpointing else 3
    if stage == 1:
        # The roll-out; student and fake score with gradient; the guided teacher's two passes; the
        # fake score's answer for the student.
        turns = {"an iteration": settings.steps + 2 * learning + 2 + 1}
    else:
        before = 1 + (steps - 2) * ratio                  # steps without the last: one in full
        turns = {"D's turn": before + ratio, "G's turn": before + learning * ratio}
    lines = []
    for what, passes in turns.items():
        tera = passes * full * settings.batch_size / 1e12
        lines.append(f"  {what}: {passes:.2f} transformer passes a sample, {tera:.0f} TFLOP")
    return lines


def plan(stage, preset, settings, shape, steps=2, span=None):
    """The plan of a run as text. settings are those of the stage's script; shape: latents
    [C, H, W]. Stage II passes the steps of its Stage I run and its span (n, m) or None."""
    config = preset.architecture or check_base(preset)
    net = meta_transformer(config, settings.lora_rank if stage == 2 else None)
    needs = measure_needs(stage, preset, settings, shape, config, net, span)
    return "\n".join([*memory_lines(needs, settings, stage),
                      disk_line(stage, net, config, needs.state),
                      *compute_lines(stage, preset, settings, shape, config, steps, span)])
