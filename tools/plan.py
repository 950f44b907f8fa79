"""The launch planner: what `--dry-run` says a run needs, before anything is downloaded or started.

    python train_stage1.py --model sd3-medium --dry-run

State (weights, gradients, optimiser) is counted exactly, from networks on the meta device.
Activations are measured: one block of each kind runs on the CPU at true width and token count, and
the bytes it keeps for backward are counted, each storage once; VAE and discriminator run on a small
picture and are scaled by pixels. FLOPs are counted on meta tensors.
Plans are for CUDA (bf16 autocast, fp32 weights that learn) unless --device cpu is given.
Bytes; GB = 1e9 bytes. P parameters, b samples at a time on one GPU.
"""


import torch

from cache import BlockCache, make_compensation
from model import Decoder, Discriminator
from sampler import forward_flops

GB, GPU = 1e9, 80e9         # the GPU that plans are made for
ROOM = 6e9                  # [ours] of it left free: CUDA context, libraries, fragments
PROBE = 128                 # [ours] pixels of a side at which VAE and discriminator are probed


def meta_transformer(config):
    """The transformer of a config, with shapes and no memory."""
    from diffusers import SD3Transformer2DModel
    with torch.device("meta"):
        return SD3Transformer2DModel.from_config(config).eval()


def bytes_of(tensors, each=None):
    """Bytes of tensors, or of as many numbers of `each` bytes."""
    return sum(t.numel() * (each or t.element_size()) for t in tensors)


def saved_bytes(call, weights=(), blocks=()):
    """(bytes that call() keeps for backward, the most that one of `blocks` keeps of them): each
    storage once, without the weights themselves."""
    seen, skip, inside = {}, {w.untyped_storage()._cdata for w in weights}, [None]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in skip and storage._cdata not in seen:
            seen[storage._cdata] = storage.nbytes(), inside[0], storage
        return tensor
    hooks = [hook for block in blocks for hook in (
        block.register_forward_pre_hook(lambda module, _: inside.__setitem__(0, module)),
        block.register_forward_hook(lambda *_: inside.__setitem__(0, None)))]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    for hook in hooks:
        hook.remove()
    most = max((sum(n for n, where, _ in seen.values() if where is block) for block in blocks),
               default=0)
    return sum(n for n, *_ in seen.values()), most


def block_bytes(net, tokens, half):
    """[(kept, inputs)] for each block of a meta transformer: bytes for a sample of (image, text)
    tokens that it keeps for backward, and those of its inputs, which are all that checkpointing
    keeps. Under autocast without the bf16 copies of weights: they do not grow with the batch."""
    found, width = {}, net.inner_dim
    for block in net.transformer_blocks[:-1]:
        kind = block.attn2 is not None          # dual attention (SD3.5-Medium)
        if kind not in found:
            real = block.to_empty(device="cpu")
            for p in real.parameters():
                torch.nn.init.constant_(p, 0.01)
            shapes = (1, tokens[0], width), (1, tokens[1], width), (1, width)
            dtype = torch.bfloat16 if half else torch.float32
            x, text, temb = (torch.ones(s, dtype=dtype, requires_grad=True) for s in shapes)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                kept, _ = saved_bytes(lambda: real(
                    hidden_states=x, encoder_hidden_states=text, temb=temb), real.parameters())
            copies = bytes_of((p for p in real.parameters() if p.ndim > 1), 2) if half else 0
            found[kind] = kept - copies, bytes_of((x, text))
            block.to("meta")
    kinds = [block.attn2 is not None for block in net.transformer_blocks]
    return [found.get(kind, next(iter(found.values()))) for kind in kinds]


def state_of(stage, net, half, f=None, discriminator=None, bare=None):
    """{what: (bytes, whether FSDP shards it)}; gradients of student and fake score never live at
    once, nor do the discriminator's and the generator's. bare: the transformer without LoRA, if
    Stage II has teacher and fake score, too."""
    weights, buffers = list(net.parameters()), list(net.buffers())
    frozen, small = 2 if half else 4, list(f.parameters()) if f else []
    if stage == 1:
        rows = {"teacher": (bytes_of(weights, frozen), True),
                "student": (bytes_of(weights, 4), True),
                "fake score": (bytes_of(weights, 4), True),
                "optimiser, both": (bytes_of(weights, 16), True),
                "gradients, one at a time": (bytes_of(weights, 4), True),
                "position tables": (bytes_of(buffers, 8 + frozen), False)}
    else:
        learning = [p for p in weights if p.requires_grad]
        heads = list(discriminator.heads.parameters())
        rows = {"student": (bytes_of(weights, 4), True),
                "optimiser": (bytes_of(learning, 8), True),
                "gradients": (bytes_of(learning, 4), True),
                "f with optimiser": (bytes_of(small, 16), False),
                "discriminator": (bytes_of(discriminator.parameters(), 4)
                                  + bytes_of(heads, 12), False),
                "position tables": (bytes_of(buffers, 4), False)}
        if bare is not None:
            base = list(bare.parameters())
            rows |= {"teacher": (bytes_of(base, frozen), True),
                     "fake score with optimiser": (bytes_of(base, 12), True),
                     "gradients": (max(bytes_of(learning, 4), bytes_of(base, 4)), True),
                     "position tables": (bytes_of(buffers, 8 + frozen), False)}
    return rows


def plan(stage, preset, config, settings, shape, steps=2, span=None, prepare=lambda net: net):
    """The plan of a run as text. shape: latents C, H, W; prepare: what adds LoRA."""
    half = settings.device != "cpu"
    net = prepare(meta_transformer(config))
    tokens = shape[1] * shape[2] // config["patch_size"] ** 2, preset.tokens
    bare, ratio = meta_transformer(config), 1.0
    full = forward_flops(bare, shape, preset.tokens)
    if span:                            # the share of a pass that is left when the span is reused
        with torch.device("meta"):
            cache = BlockCache(bare, span, make_compensation(bare.inner_dim))
        forward_flops(bare, shape, preset.tokens, cache, "record")
        ratio = forward_flops(bare, shape, preset.tokens, cache, "reuse") / full
    kept = whole = block_bytes(meta_transformer(config), tokens, half)
    most = max(n for n, _ in kept)
    if stage == 2 and span:
        first, last = map(int, span.split("-"))
        kept = kept[:first] + kept[last + 1:]
    offline = bool(preset.architecture)
    decode = Decoder(preset, "cpu", offline)
    weights = list(net.parameters())
    extra = {False: 0, True: 0}                 # picture networks' activations; True: checkpointed
    f = make_compensation(net.inner_dim) if span else None
    pooled = config["pooled_projection_dim"]
    discriminator = (Discriminator(preset, None if settings.unconditional else pooled,
                                   random_weights=offline) if stage == 2 else None)
    if stage == 2:
        factor = decode.factor
        side = min(PROBE // factor, shape[1])
        scale = shape[1] * shape[2] / side ** 2
        x = torch.zeros(1, shape[0], side, side, requires_grad=True)
        blocks = [decode.vae.decoder.mid_block, *decode.vae.decoder.up_blocks]
        picture = torch.zeros(1, 3, side * factor, side * factor, requires_grad=True)
        seen, _ = saved_bytes(lambda: discriminator(picture, torch.ones(1, pooled)),
                              discriminator.parameters())
        plain, worst = saved_bytes(lambda: decode(x), decode.vae.parameters(), blocks)
        decode.vae.enable_gradient_checkpointing()
        light, _ = saved_bytes(lambda: decode(x), decode.vae.parameters())
        extra = {False: (plain + seen) * scale, True: (light + worst + seen) * scale}
    match = stage == 2 and settings.match_iterations > 0
    state = state_of(stage, net, half, f, discriminator,
                     meta_transformer(config) if match else None)
    state["VAE"] = bytes_of(decode.vae.parameters(), 4), False
    gathered = 2 * max(bytes_of(b.parameters(), 8) for b in net.transformer_blocks)

    def peak(processes, b, checkpointing):
        # One GPU: autocast keeps bf16 copies of the weights during a pass. Several: two blocks are
        # whole at a time, weights and gradients in bf16 and the gradient to be summed in fp32.
        held = sum(n / processes if sharded else n for n, sharded in state.values())
        copies = (bytes_of(weights, 2) if half else 0) if processes == 1 else gathered
        def inside(blocks):
            return sum(i for _, i in blocks) + most if checkpointing else sum(n for n, _ in blocks)
        busiest = max(inside(kept) + extra[checkpointing], inside(whole) * match)
        return held + copies + b * (busiest + most)                         # `most`: temporaries

    batch, lines = settings.batch_size, ["memory plan" + (" (CUDA)" if half else " (CPU)")]
    lines += [f"  {what:26}{n / GB:9.3f} GB{'' if sharded else '  on every GPU'}"
              for what, (n, sharded) in state.items()]
    lines += [f"  activations of a sample: {sum(n for n, _ in kept) / GB:.2f} GB in the blocks, "
              f"checkpointed {(sum(i for _, i in kept) + most) / GB:.2f} GB" + (
                  f"; pictures {extra[False] / GB:.2f} GB, checkpointed {extra[True] / GB:.2f} GB"
                  if stage == 2 else "")]
    lines += ["  peak on each of        " + "".join(f"{n:>7} GPU" for n in (1, 2, 4, 8))]
    rows = {"as given": (settings.accumulation, settings.gradient_checkpointing),
            "with checkpointing": (settings.accumulation, True), "... and one sample": (None, True)}
    fits = {}
    for name, (accumulation, checkpointing) in rows.items():
        cells = []
        for n in (1, 2, 4, 8):
            b = max(1, batch // n // accumulation) if accumulation else 1
            fits[name, n] = peak(n, b, checkpointing)
            cells.append(f"{fits[name, n] / GB:8.1f} GB")
        lines.append(f"  {name:23}" + "".join(cells))
    given = fits["as given", 1] <= GPU - ROOM
    room = [(n, name) for n in (1, 2, 4, 8) for name in rows if fits[name, n] <= GPU - ROOM]
    advice = {"as given": "", "with checkpointing": " with --gradient-checkpointing",
              "... and one sample": " with --gradient-checkpointing and --accumulation {}"}
    if half and not given:
        lines.append("  80 GB GPUs: " + (
            f"fits {room[0][0]} GPU{'s' * (room[0][0] > 1)}"
            + advice[room[0][1]].format(max(1, batch // room[0][0])) if room else
            "does not fit 8 of them; lower --resolution, or --lora-rank in Stage II"))
    learning = bytes_of((p for p in weights if p.requires_grad), 8)
    disk = (2 * (bytes_of(weights, 4) + learning) if stage == 1
            else bytes_of(weights, 4) + learning + state["f with optimiser"][0]
            + (state["fake score with optimiser"][0] if match else 0))
    lines.append(f"  disk: {disk / GB:.1f} GB a checkpoint, three while one is written; student/ "
                 f"{bytes_of(meta_transformer(config).parameters(), 2) / GB:.1f} GB")
    again = int(settings.gradient_checkpointing)
    # A pass counts 1, with its backward 3, recomputed in backward 4.
    turns = {"an iteration": steps + (3 + again) * 2 + 2 + 1} if stage == 1 else {
        "D's turn": steps - 1 + ratio, "G's turn": steps - 1 + (3 + again) * ratio}
    if match:                           # of any step, each as often: the roll-out, then that step
        rolled, own = (steps - 1) * (1 + (steps - 2) * ratio / 2) / steps, (
            1 + (steps - 1) * ratio) / steps
        turns |= {"fake score's turn": rolled + own + 3 + again,
                  "student's turn in the match": rolled + (3 + again) * own + 2 + 1}
    lines += [f"  {what}: {n:.2f} transformer passes a sample, {n * full * batch / 1e12:.0f} TFLOP"
              for what, n in turns.items()]
    return "\n".join(lines)
