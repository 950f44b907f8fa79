"""The launch planner: what `--dry-run` says a run needs, before anything is downloaded or started.

    python train_stage1.py --model sd3-medium --dry-run

tools/rehearsal.py runs each turn once on fake tensors, one sample on one GPU. From its moments this
file calculates other numbers of samples and of GPUs, and looks for the fastest setting that fits.
Text encoders, host memory and disk are calculated from numbers of parameters; FLOPs are counted on
meta tensors. Plans are for CUDA (bf16 autocast, fp32 weights that learn) unless --device cpu is
given. Bytes; GB = 1e9 bytes; TFLOP = 1e12 operations. b samples at a time on one of n GPUs.
"""

import dataclasses
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from cache import make_compensation
from model import base_config, empty_transformer
from sampler import forward_flops
from tools.rehearsal import KINDS, SHARDED, picture_networks, prompt_sizes, rehearse

GB, TERA = 1e9, 1e12
# What PyTorch finds on an "80 GB" A100 or H100: 79.1 GiB. Its out-of-memory messages say so ("has a
# total capacity of 79.14 GiB", up to 79.25).
GPU = 79.1 * 2**30
# [ours] Bytes of it that are left free in each stage, after what was measured on an H200: 8 GB that
# driver and allocator took beside the tensors, and in Stage II 5 GB for the trials of cuDNN.
ROOM = {1: 8e9, 2: 13e9}
COUNTS = (1, 2, 4, 8)       # GPUs, the columns of the table
# Parameters of T5-XXL's encoder, CLIP-L and CLIP-G; loaded in bf16, 2 bytes each.
TEXT_ENCODERS = 2 * (4.762e9 + 0.124e9 + 0.695e9)


def bytes_of(tensors, each=None):
    """Bytes of tensors, or of as many numbers of `each` bytes."""
    return sum(t.numel() * (each or t.element_size()) for t in tensors)


def on_gpu(settings):
    """Whether the plan is for CUDA, the default."""
    return settings.device != "cpu"


def prompt_bytes(preset, config, settings):
    """Bytes of an encoded prompt."""
    numbers = sum(math.prod(size) for size in prompt_sizes(preset, config))
    return numbers * (2 if on_gpu(settings) else 4)


# ================================================================== from one sample to a run

@dataclasses.dataclass
class Needs:
    """What a run needs, in bytes."""
    moments: dict       # {checkpointing: {turn: [moments, kinds]}}, one sample on one GPU
    gathered: float     # several GPUs: weights and gradients that are whole at a time
    waiting: float      # a sample of Stage I's batch that waits for its micro-batch
    encoders: float     # text encoders, before anything else is loaded; 0 in the miniature
    most_used: float    # that a plan for one GPU of 80 GB may take

    def most(self, kind):
        """The most bytes that a kind ever has."""
        column = KINDS.index(kind)
        return max(rows[:, column].max().item() for rows in self.moments[False].values())

    def busiest(self, turn, n, share, b, checkpointing):
        """{kind: bytes} on each of n GPUs at the busiest moment of a turn. Each GPU has a share of
        the batch and takes b samples of it at a time."""
        # A column of bytes for each kind, a row for each moment of the rehearsal.
        rows = dict(zip(KINDS, self.moments[checkpointing][turn].unbind(1), strict=True))
        if turn != "references":
            # AdamW's moments are there from the first update on; the rehearsal has one update.
            for kind in ("optimiser", "f", "discriminator"):
                rows[kind] = torch.full_like(rows[kind], self.most(kind))
        if b < share:
            # The gradients of the micro-batches before are there from the beginning.
            rows["gradients"] = rows["gradients"].max().expand_as(rows["gradients"])
        if turn.endswith("turn"):
            # Nearly all that is made in a turn is made for each sample.
            rows["activations"] = b * rows["activations"] + (share - b) * self.waiting
        if n > 1:
            # Every GPU keeps an equal piece of what fully_shard spreads. All else is whole on each.
            for kind in SHARDED:
                rows[kind] = rows[kind] / n
            # FSDP gathers its blocks in bf16, so autocast has nothing to copy.
            rows["made of weights"] = torch.full_like(rows["activations"], self.gathered)
        table = torch.stack(list(rows.values()), 1)                       # moments × kinds
        busiest = table[table.sum(1).argmax()]
        return dict(zip(KINDS, busiest.tolist(), strict=True))

    def peak(self, n, share, b, checkpointing):
        """Bytes on each of n GPUs at the busiest moment of all turns: the largest of them and not
        their sum, since turns follow each other."""
        return max(sum(self.busiest(turn, n, share, b, checkpointing).values())
                   for turn in self.moments[checkpointing])

    def fastest(self, n, batch_size):
        """(checkpointing, b, bytes) of the fastest setting that fits n GPUs, or None."""
        share = batch_size // n
        # Micro-batches of equal size alone: run.check_batch refuses others.
        # Recomputing the blocks costs a third more time. But one sample at a time does not fill a
        # GPU: it took 2.4 times as long as sixteen (measured on an H200).
        for checkpointing, least in ((False, min(2, share)), (True, 1)):
            for b in range(share, least - 1, -1):
                if share % b == 0:
                    size = self.peak(n, share, b, checkpointing)
                    if size <= self.most_used:
                        return checkpointing, b, size
        return None


def measure(stage, preset, settings, shape, config, steps, span):
    """Rehearses a run with and without checkpointing: its Needs."""
    moments = {}
    for checkpointing in (False, True):
        moments[checkpointing] = rehearse(stage, preset, settings, shape, config, steps, span,
                                          checkpointing)
    # Of a block that FSDP has gathered: a weight and its gradient in bf16, and the gradient once
    # more in fp32, to be summed. One block is at work, the next one on its way. What is in no block
    # is whole all along.
    net = empty_transformer(config)
    blocks = [bytes_of(block.parameters(), 1) for block in net.transformer_blocks]
    rest = bytes_of(net.parameters(), 1) - sum(blocks)
    each = 2 if on_gpu(settings) else 4                   # bytes of a number
    gathered = each * rest + 2 * (2 * each + 4) * max(blocks)
    waiting = 0
    if stage == 1:
        # Three noises, the N + 1 latents and N velocities of the student's path, and the prompt.
        latents = 3 + 2 * steps + 1
        waiting = 4 * latents * math.prod(shape) + prompt_bytes(preset, config, settings)
    encoders = TEXT_ENCODERS if preset.text_length and on_gpu(settings) else 0
    return Needs(moments, gathered, waiting, encoders, GPU - ROOM[stage])


# ================================================================== lines of text

def turn_lines(needs, settings):
    """What lives on one GPU at the busiest moment of each turn, with the settings as given."""
    given, batch = settings.gradient_checkpointing, settings.batch_size
    b = max(1, batch // settings.accumulation)
    turns = {turn: needs.busiest(turn, 1, batch, b, given) for turn in needs.moments[given]}
    kind_of_device = "CUDA" if on_gpu(settings) else "CPU"
    lines = [f"memory plan ({kind_of_device}): GB of one GPU at the busiest moment of each turn, "
             f"{b} at a time",
             " " * 18 + "".join(f"{turn:>20}" for turn in turns)]
    # A kind that a stage does not have gets no line.
    for kind in KINDS:
        if any(rows[kind] for rows in turns.values()):
            cells = [f"{rows[kind] / GB:20.3f}" for rows in turns.values()]
            lines.append(f"  {kind:16}" + "".join(cells))
    cells = [f"{sum(rows.values()) / GB:20.3f}" for rows in turns.values()]
    return [*lines, f"  {'together':16}" + "".join(cells)]


def peak_lines(needs, settings):
    """The table of peaks on 1 to 8 GPUs."""
    given, batch = settings.gradient_checkpointing, settings.batch_size
    lines = ["  peak on each of         " + "".join(f"{n:>8} GPU" for n in COUNTS)]
    for what, accumulation, checkpointing in (("as given", settings.accumulation, given),
                                              ("with checkpointing", settings.accumulation, True),
                                              ("... and one sample", batch, True)):
        cells = []
        for n in COUNTS:
            share = max(1, batch // n)
            size = needs.peak(n, share, max(1, share // accumulation), checkpointing)
            cells.append(f"{size / GB:9.1f} GB")
        lines.append(f"  {what:24}" + "".join(cells))
    if needs.encoders:
        lines.append(f"  before all this, on the first GPU: text encoders, "
                     f"{needs.encoders / GB:.1f} GB")
    return lines


def advice_lines(needs, settings):
    """The fastest setting for each number of GPUs."""
    whole = needs.fastest(1, settings.batch_size)
    if whole and whole[:2] == (False, settings.batch_size):
        return []                                         # the miniature: one GPU takes it all
    lines = [f"  fastest on 80 GB GPUs ({needs.most_used / GB:.1f} GB used at most):"]
    # A batch that does not divide among the GPUs would be refused.
    for n in COUNTS:
        found = settings.batch_size % n == 0 and needs.fastest(n, settings.batch_size)
        words = "does not fit"
        if found:
            checkpointing, b, size = found
            switch = "--gradient-checkpointing " if checkpointing else ""
            accumulation = settings.batch_size // n // b
            words = f"{switch}--accumulation {accumulation}, {size / GB:.1f} GB"
        lines.append(f"    {n} GPU{'s' if n > 1 else ''}: {words}")
    if not any("--" in line for line in lines):
        lines.append("    lower --resolution, or --lora-rank in Stage II")
    return lines


def host_lines(stage, preset, settings, shape, config, needs, pixels):
    """Host memory. The first process reads and writes for all; numbers of one line follow each
    other, lines add up."""
    # One network at a time is read, in fp32, and leaves for the GPU.
    weights = bytes_of(empty_transformer(config).parameters(), 1)
    pool = settings.pool * prompt_bytes(preset, config, settings)
    # Encoded batch by batch and then put together: for a moment they are there twice.
    encoding = 2 * pool + needs.encoders
    # Stage I has two optimisers, each a part of a checkpoint.
    part = max(needs.most("optimiser") / (2 if stage == 1 else 1), needs.most("student"))
    lines = [f"  host memory, first process: {encoding / GB:.1f} GB while prompts are encoded, "
             f"{4 * weights / GB:.1f} to read weights,",
             f"    {part / GB:.1f} for the largest part of a checkpoint; "
             f"for all: {pool / GB:.1f} of prompts, mapped"]
    if stage == 2:
        pictures = settings.references * 3 * pixels       # 8 bits a channel
        # The maker is not sharded: all processes read it at once.
        maker = weights * (2 if on_gpu(settings) else 4)
        lines.append(f"    each process: {pictures / GB:.1f} GB of references, before that "
                     f"{maker / GB:.1f} to read who makes them")
    return lines


def disk_line(stage, config, needs, f, heads):
    """Bytes of a checkpoint, which has weights and two moments of each that learns, and of the
    result."""
    checkpoint = needs.most("student") + needs.most("optimiser") + bytes_of([*f, *heads], 12)
    if stage == 1:
        checkpoint += needs.most("fake score")
    student = bytes_of(empty_transformer(config).parameters(), 2)         # LoRA is merged
    return (f"  disk: {checkpoint / GB:.1f} GB a checkpoint, three while one is written; student/ "
            f"{student / GB:.1f} GB")


# ================================================================== FLOPs

def flops(call, x, backward):
    """FLOPs of call(x) on the meta device, with those of the backward pass to x if so told."""
    x = x.requires_grad_(backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        answer = call(x)
        if backward:
            # With frozen weights this is the path to x alone, as in the generator's turn.
            torch.autograd.backward(answer, [torch.ones_like(a) for a in answer])
    return counter.get_total_flops()


def compute_lines(stage, preset, settings, shape, config, steps, span, decode, discriminator):
    """Transformer passes, pictures and FLOPs of an iteration or turn. A pass counts 1, with its
    backward 3, recomputed in backward 4; with LoRA, whose own share is small, one less."""
    net = empty_transformer(config)
    full, delta = forward_flops(net, shape, preset.tokens, span=span)
    learning = 3 + settings.gradient_checkpointing
    if stage == 1:
        # The roll-out; student and fake score with gradient; the guided teacher's two passes; the
        # fake score's answer for the student. No picture is decoded.
        return [turn_line("an iteration", steps + 2 * learning + 2 + 1, full, 0, settings)]
    ratio = 1.0                         # the share of a pass that is left when the span is skipped
    if span:
        with torch.device("meta"):
            f = None if settings.no_compensation else make_compensation(net.inner_dim)
        rest, _ = forward_flops(net, shape, preset.tokens, span=span, delta=delta, f=f)
        ratio = rest / full
    before = 1 + (steps - 2) * ratio                      # steps without the last: one in full
    learning -= bool(settings.lora_rank)
    # VAE and backbone are frozen: their backward costs once more what their forward costs.
    latent = torch.zeros(1, *shape, device="meta")
    decoded = flops(lambda x: [decode(x)], latent, False)
    picture = decode(latent).detach()
    judged = flops(discriminator, picture, False)
    pulled = (flops(lambda x: [decode(x)], latent.clone(), True)
              + flops(discriminator, picture.clone(), True)
              + decoded * settings.gradient_checkpointing)
    return [f"  a pass: {full / TERA:.2f} TFLOP; a picture: {decoded / TERA:.2f} to decode, "
            f"{judged / TERA:.2f} to judge",
            # D sees the picture and its reference, which was decoded when it was made.
            turn_line("D's turn", before + ratio, full, decoded + 2 * judged, settings),
            turn_line("G's turn", before + learning * ratio, full, pulled, settings)]


def turn_line(what, passes, full, pictures, settings):
    """One line of FLOPs, of a sample and of a batch."""
    sample = passes * full + pictures
    line = f"  {what}: {passes:.2f} transformer passes a sample"
    if pictures:
        line += f" and pictures ({pictures / sample:.0%} of it)"
    return line + f", {sample * settings.batch_size / TERA:.0f} TFLOP a batch"


# ================================================================== the plan

def plan(stage, preset, settings, shape, steps=2, span=None):
    """The plan of a run as text. settings are those of the stage's script; shape: latents
    [C, H, W]. Stage II passes the steps of its Stage I run and its span (n, m) or None."""
    if preset.captions == "tiny" and not settings.device:
        settings = dataclasses.replace(settings, device="cpu")            # as model.pick_device
    config = preset.architecture or base_config(preset)
    shape = tuple(shape)
    steps = settings.steps if stage == 1 else steps
    needs = measure(stage, preset, settings, shape, config, steps, span)
    decode, discriminator = picture_networks(preset, stage)
    f, heads = [], []
    if stage == 2:
        heads = list(discriminator.heads.parameters())
        if span and not settings.no_compensation:
            with torch.device("meta"):
                f = list(make_compensation(empty_transformer(config).inner_dim).parameters())
    factor = 2 ** (len(decode.vae.config.block_out_channels) - 1)
    pixels = shape[1] * shape[2] * factor ** 2
    return "\n".join([
        *turn_lines(needs, settings), *peak_lines(needs, settings),
        *(advice_lines(needs, settings) if on_gpu(settings) else []),
        *host_lines(stage, preset, settings, shape, config, needs, pixels),
        disk_line(stage, config, needs, f, heads),
        *compute_lines(stage, preset, settings, shape, config, steps, span, decode,
                       discriminator)])
