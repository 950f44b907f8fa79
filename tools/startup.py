"""What a real run spends besides training: prompts, checkpoints, memory; the old way and the new.

    python -m tools.startup                    # on a stand-in of its own, three minutes on 2 cores
    python -m tools.startup --model models/random-sd3-medium --again 1024 --pool 2048

Three things cost a rented GPU time, or a machine memory, before and between the iterations:
  prompts      old: one by one, by encoders that are read again for every so many prompts (--again)
               new: in full batches (model.encode_prompts), read once, kept in a file for later runs
  checkpoint   old: all parts are gathered, written, and read again for their SHA-256
               new: one part at a time, hashed from memory (run.Run.save); Stage I's four parts
  memory       old: each process loads the whole network and then keeps its pieces
               new: the first one loads it and sends the other its pieces (model.place)
Both ways run in turn, and medians count: the quotients compare, the seconds are this machine's. The
stand-in has SD3's layout at a small width, random weights and the true number of text tokens. A
real folder needs the disk and the memory of a real checkpoint (docs/REAL_MODELS.md).
"""

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import run
from tools.processes import any_process, join_processes, processes
from tools.settings import UserError, command, option, parse_settings
from run import Run, save_tensors, save_whole, versions

import torch

from model import (HERE, PRESETS, Prompts, default_prompts, encode_prompts, find_preset,
                   load_transformer, pick_device, place)
from tools.random_model import clip_tokenizer, t5_tokenizer

# [ours] the stand-in: a transformer of 74 M parameters. Its encoders are small, for on a CPU the
# products of large ones would hide everything else.
WIDTH, BLOCKS = 512, 8


@dataclasses.dataclass
class Settings:
    model: str = option(None, "a pipeline folder (default: a stand-in that is deleted again)")
    pool: int = option(63, "prompts to encode; the empty one joins them", low=1, high=10**5)
    again: int = option(16, "the old way reads the encoders again for every so many", low=1)
    rounds: int = option(3, "alternated rounds, of which the median counts", low=1)
    device: str = option(None, "where to encode and to hold the networks", choices=("cpu", "cuda"))
    debug: bool = option(False, "show tracebacks")


# ================================================================== the stand-in

def write_stand_in(folder, width=WIDTH, blocks=BLOCKS):
    """Writes a pipeline folder in half precision, as the hub has it: all that a run reads before it
    trains, the transformer and the text encoders, and a VAE that is there for the checks alone."""
    import diffusers
    import transformers
    torch.manual_seed(0)
    clip_widths = width // 4, width // 2                  # side by side no wider than T5's
    transformer = diffusers.SD3Transformer2DModel(**{
        **PRESETS["sd3-medium"].architecture, "sample_size": 8, "pos_embed_max_size": 8,
        "num_layers": blocks, "num_attention_heads": width // 64, "caption_projection_dim": width,
        "joint_attention_dim": width, "pooled_projection_dim": sum(clip_widths)})
    vae = diffusers.AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    with tempfile.TemporaryDirectory() as files:
        clip, t5 = clip_tokenizer(Path(files) / "clip"), t5_tokenizer()
    clips = [transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        vocab_size=len(clip), hidden_size=clip_width, intermediate_size=4 * clip_width,
        projection_dim=clip_width, num_attention_heads=clip_width // 32, num_hidden_layers=2,
        eos_token_id=clip.eos_token_id, max_position_embeddings=77)) for clip_width in clip_widths]
    encoder = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(t5), d_model=width, d_ff=width, num_layers=1, num_heads=width // 64,
        d_kv=64))
    transformers.utils.logging.disable_progress_bar()     # of writing, a bar for each part
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=clips[0],
        text_encoder_2=clips[1], text_encoder_3=encoder).to(torch.float16).save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()


# ================================================================== measuring

def of_process(file, key):
    """A number that Linux keeps about this process in /proc/self/io or /proc/self/status."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])


def memory_now():
    """Kilobytes that this process holds; of_process("status", "VmHWM") is the peak from here on."""
    gc.collect()
    with contextlib.suppress(AttributeError):             # another C library than glibc
        # Freed tensors shall go back to the system at once, as a real model's large ones do: a call
        # that takes kept memory would seem to need none. −3 is M_MMAP_THRESHOLD of malloc.h.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**16)
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")         # the peak is what is held now
    return of_process("status", "VmRSS")


def measured(call):
    """What a call takes: seconds, megabytes written and read, and how much the resident memory of
    this process grows at its peak."""
    memory = memory_now()
    # Bytes that pass through read and write, whether from the disk or from the system's memory.
    read, written, start = of_process("io", "rchar"), of_process("io", "wchar"), time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start,
            "written": (of_process("io", "wchar") - written) / 1e6,
            "read": (of_process("io", "rchar") - read) / 1e6,
            "memory": (of_process("status", "VmHWM") - memory) * 1024 / 1e6}


def alternate(ways, rounds):
    """{name: {quantity: median}} of the calls {name: callable}, each called in turn."""
    results = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            results[name].append(measured(call))
    return {name: {key: statistics.median(one[key] for one in all_of_it) for key in all_of_it[0]}
            for name, all_of_it in results.items()}


# ================================================================== prompts

def encode_one_by_one(preset, texts, device, again):
    """The old way: batches of one, and each `again` prompts read the encoders from their files."""
    single = dataclasses.replace(preset, encode_batch=1)
    parts = [encode_prompts(single, texts[i:i + again], device)
             for i in range(0, len(texts), again)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def compare_prompts(preset, device, folder, pool, again, rounds):
    """Medians of the old way, of a first run's and of a second run's, which finds the file."""
    texts = default_prompts(preset)[:pool]
    encode_prompts(preset, texts[:1], device)             # so that the libraries are imported

    def first_run():
        for file in folder.glob("prompts-*"):
            file.unlink()
        Prompts(preset, texts, device, folder)

    def second_run():
        Prompts(preset, texts, device, folder)

    return alternate({"old": lambda: encode_one_by_one(preset, [*texts, ""], device, again),
                      "new": first_run, "later": second_run}, rounds)


# ================================================================== a checkpoint

def learning(preset, device):
    """Student and fake score as in Stage I, with optimisers that have made one step."""
    networks, optimizers = {}, {}
    for name in ("student", "fake_score"):
        networks[name] = net = load_transformer(preset).to(device)
        optimizers[name] = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
    return networks, optimizers


def from_device(gather):
    """The function, run.whole_state or run.optimizer_tensors, with its tensors copied: what lies on
    a GPU or in pieces reaches the host as a copy. On a CPU it would be the networks' own memory."""
    def copying(*arguments):
        return {name: tensor.clone() for name, tensor in gather(*arguments).items()}
    return copying


def save_the_old_way(folder, networks, optimizers):
    """Writes the four parts with everything in memory at once; hashes what it reads again."""
    parts = {name: run.whole_state(net) for name, net in networks.items()}
    for name, optimizer in optimizers.items():
        parts[f"{name}_optimizer"] = run.optimizer_tensors(networks[name], optimizer)

    def write(new):
        for name, tensors in parts.items():
            save_tensors(new / f"{name}.safetensors", tensors)
        digests = {}
        for path in sorted(new.glob("*.safetensors")):
            with open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        run.write_json(new / "state.json", digests)

    save_whole(folder / "checkpoint-000001", write)


def compare_checkpoints(preset, device, folder, rounds):
    """Medians of both ways, and the megabytes of the tensors."""
    networks, optimizers = learning(preset, device)
    values = [value for optimizer in optimizers.values() for slots in optimizer.state.values()
              for value in slots.values()]
    values += [value for net in networks.values() for value in net.state_dict().values()]

    def alone(save):
        """One checkpoint lies on the disk at a time."""
        shutil.rmtree(folder / "run", ignore_errors=True)
        save()

    ways = {"old": lambda: alone(lambda: save_the_old_way(folder / "run", networks, optimizers)),
            "new": lambda: alone(lambda: Run(folder / "run", {}).save(1, networks, optimizers))}
    with contextlib.ExitStack() as copies:
        for name in ("whole_state", "optimizer_tensors") if device.type == "cpu" else ():
            copies.enter_context(mock.patch.object(run, name, from_device(getattr(run, name))))
        medians = alternate(ways, rounds)
    shutil.rmtree(folder / "run")
    return medians, sum(value.nbytes for value in values) / 1e6


# ================================================================== memory of two processes

def shard(model, way):
    """In each of two processes: spreads the base's transformer over them, and prints how much that
    added to the peak of this process's memory, as a share of one network."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    device = torch.device("cpu")
    join_processes(device)
    preset = find_preset(model)
    any_process(False)                                    # imports and connections are made
    before = memory_now()
    if way == "new":
        net = place(load_transformer(preset, everywhere=False), device)
    else:
        net, mesh = load_transformer(preset), init_device_mesh("cpu", (processes(),))
        for block in net.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    whole = sum(4 * parameter.numel() for parameter in net.parameters())
    any_process(False)
    print((of_process("status", "VmHWM") - before) * 1024 / whole)


def compare_memory(model):
    """{way: [share of the first process, of the second]}, by gloo on the CPU. Once: memory is not
    as noisy as time."""
    shares = {}
    for way in ("old", "new"):
        with socket.socket() as free:                     # a port that nobody uses now
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        code = f"from tools.startup import shard; shard({str(model)!r}, {way!r})"
        twins = []
        for rank in ("0", "1"):
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port,
                     "MASTER_ADDR": "127.0.0.1"}
            twins.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE, text=True,
                                          env={**os.environ, **where}, cwd=HERE))
        texts = [twin.communicate(timeout=600) for twin in twins]
        if any(twin.returncode for twin in twins):
            raise UserError(f"two processes failed: {texts[0][1][-500:] or texts[1][1][-500:]}")
        shares[way] = [float(out.splitlines()[-1]) for out, _ in texts]
    return shares


# ================================================================== command

def print_row(what, old, new):
    """A row of the table; its last column is what the new way takes, or gives, of the old one's."""
    print(f"{what:52}{old:13.2f}{new:13.2f}{new / old:13.3f}", flush=True)


def print_rows(preset, device, folder, settings):
    """Measures and prints the three parts, each as soon as it is known."""
    many = settings.pool + 1                              # and the empty prompt
    t = compare_prompts(preset, device, folder, settings.pool, settings.again, settings.rounds)
    rate = {way: many / medians["seconds"] for way, medians in t.items()}
    print_row("prompts a second, in a first run", rate["old"], rate["new"])
    print_row("prompts a second, in later runs", rate["old"], rate["later"])
    t, size = compare_checkpoints(preset, device, folder, settings.rounds)
    print_row("checkpoint: MB written", t["old"]["written"], t["new"]["written"])
    print_row("checkpoint: MB read", t["old"]["read"], t["new"]["read"])
    print_row("checkpoint: seconds", t["old"]["seconds"], t["new"]["seconds"])
    print_row("checkpoint: MB held in memory at the peak", t["old"]["memory"], t["new"]["memory"])
    shares = compare_memory(preset.source)
    for name, old, new in zip(("first", "second"), shares["old"], shares["new"], strict=True):
        print_row(f"memory of the {name} process, in networks", old, new)
    print(f"The old way read the encoders {math.ceil(many / settings.again)} times for {many} "
          f"prompts. The tensors of the checkpoint are {size:.1f} MB.")


@command
def main(argv):
    settings = parse_settings(Settings, argv, "-m tools.startup", __doc__.split("\n\n")[0])
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("tools.startup reads /proc, which only Linux has")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if settings.model is None:
            write_stand_in(folder / "stand-in")
        preset = find_preset(settings.model or str(folder / "stand-in"))
        device = pick_device(preset, settings.device or "cpu")
        print(f"{settings.model or 'a stand-in'}, {device}, medians of {settings.rounds} "
              f"alternated rounds, {versions()}")
        print(f"{'':52}{'old way':>13}{'new way':>13}{'new / old':>13}", flush=True)
        print_rows(preset, device, folder, settings)


if __name__ == "__main__":
    main()
