"""All that is not the method: the command line, randomness, processes, the run folder. Skip this
file when you read beside the paper.

A run folder holds settings.json, prompts.safetensors, metrics.jsonl, samples/, the two newest
checkpoint-NNNNNN/ (one when it is finished) and, at the end, the result: student/. Stage II's has
references.safetensors and compensation.safetensors, too. With matplotlib there is curves.png.
Everything is safetensors or JSON. Nothing is ever unpickled, so loading a stranger's checkpoint
cannot run a stranger's code.

Four promises are kept here, each once:
  repeatable    rng: what is random depends on (seed, iteration) alone; no state has to be saved
  never half    save_whole: a temporary name, fsync, rename
  resumed       Run: the same command typed again goes on from the newest checkpoint
  any number    of processes (torchrun) computes the same gradients of the same global batch
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import gc
import hashlib
import io
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

# A first run should be clean. These lines keep notices of diffusers and transformers out, which are
# imported after this file: so every script imports it first. The bars of downloads stay.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", module="(diffusers|transformers|huggingface_hub)")
warnings.filterwarnings("ignore", message="IProgress not found")      # tqdm's, in a notebook

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     set_model_state_dict)
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

KEEP = 2                        # [ours] how many checkpoints stay on disk while a run trains
WAIT = timedelta(hours=2)       # [ours] for the others, while one writes a large checkpoint
# Settings that a resumed run may change. (Another device computes in another precision.)
MAY_CHANGE = {"out", "iterations", "accumulation", "gradient_checkpointing", "checkpoint_every",
              "sample_every", "log_every", "device", "no_compile", "overwrite", "dry_run"}


# ================================================================== the command line

class UserError(Exception):
    """Something the user can put right. Shown as one line; the exit code is 2."""


def option(default, text, low=None, high=None, choices=None):
    """A field of a settings dataclass, and so an option: alpha is --alpha. text says meaning, unit
    and origin; low and high are inclusive. A default of None is filled in by the script."""
    return dataclasses.field(default=default, metadata=dict(
        text=text, low=low, high=high, choices=choices))


@dataclasses.dataclass
class CommonSettings:
    """What both training scripts share."""
    model: str = option(
        "tiny", "tiny, sd3-medium, sd3.5-medium, sd3.5-large, a pipeline folder or a hub id")
    prompts: str = option(None, "file of prompts, one a line; without it the built-in ones")
    pool: int = option(None, "how many of the prompts to encode and train on", low=1, high=10**6)
    iterations: int = option(None, "iterations; in Stage II turns, D's and G's together",
                             low=0, high=999_999)
    batch_size: int = option(None, "global batch B", low=1, high=65536)
    out: str = option(None, "run folder (default: runs/MODEL-stage1 or -stage2)")
    seed: int = option(3407, "seed of everything random [official 3407]", low=0, high=2**31 - 1)
    accumulation: int = option(None, "micro-batches one after the other, to save memory",
                               low=1, high=65536)
    gradient_checkpointing: bool = option(
        None, "recompute blocks in backward: less memory, a third more time (real models do)")
    no_compile: bool = option(False, "do not compile blocks and VAE decoder (real models on CUDA "
                              "are compiled: faster, after a slow start)")
    checkpoint_every: int = option(None, "iterations between checkpoints", low=1, high=10**6)
    sample_every: int = option(None, "iterations between sample grids", low=1, high=10**6)
    log_every: int = option(5, "iterations between lines of metrics.jsonl", low=1, high=10**6)
    device: str = option(None, "where to run (default: the miniature on the CPU, a real model on "
                              "CUDA if it is there)", choices=("cpu", "cuda", "mps"))
    dry_run: bool = option(False, "print the resolved settings and what they cost, and stop")
    overwrite: bool = option(False, "start again although the run folder holds a run")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')} (see python {self.prog} --help)")


def parse_settings(cls, argv, prog, description):
    """The settings dataclass `cls` filled from the command line. Types come from the annotations;
    bool fields are flags. UserError for an unknown option, a wrong type, a value out of range."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        flag, about = "--" + field.name.replace("_", "-"), field.metadata
        text = about["text"].replace("%", "%%")
        # Where the default is None the script decides, by the model: so --no-..., too.
        default = "" if field.default is None else f" (default: {field.default})"
        if field.type is bool:
            action = argparse.BooleanOptionalAction if field.default is None else "store_true"
            parser.add_argument(flag, action=action, help=text)
        elif field.type is list:
            parser.add_argument(flag, nargs="+", metavar="X", choices=about["choices"], help=text)
        else:
            parser.add_argument(flag, type=field.type, metavar="X", choices=about["choices"],
                                default=field.default, help=text + default)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")    # for command()
    given = vars(parser.parse_args(argv))
    del given["debug"]
    settings = cls(**given)
    for field in dataclasses.fields(cls):
        value = getattr(settings, field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        # Written so that NaN, which is neither above nor below, is refused as well.
        if value is not None and low is not None and not low <= value <= high:
            raise UserError(f"--{field.name.replace('_', '-')} must lie between {low} and {high}, "
                            f"not {value}")
    return settings


def fill_in(settings, values):
    """Settings that were not given take these values."""
    for name, value in values.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def command(main):
    """Decorates a script's main(argv): a user's mistake becomes one line and exit code 2, never a
    traceback; Ctrl-C outside a loop 130; a full disk one line and 1. One process prints for all."""
    @functools.wraps(main)
    def wrapped(argv=None):
        argv = sys.argv[1:] if argv is None else argv
        shown = sys.stdout if is_main() else io.StringIO()
        signals = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            # A notebook may call main(): it gets back its own seed, and below its own Ctrl-C.
            with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(shown):
                return main(argv)
        except (UserError, KeyboardInterrupt, OSError, SafetensorError,
                torch.OutOfMemoryError) as error:
            if "--debug" in argv:
                raise
            line, code = f"error: {error}", 1
            if isinstance(error, UserError):
                code = 2
            elif isinstance(error, torch.OutOfMemoryError):
                line = ("error: out of GPU memory; a larger --accumulation takes less, a smaller "
                        f"--batch-size in evaluating ({str(error).splitlines()[0]})")
            elif isinstance(error, KeyboardInterrupt):
                line, code = "stopped", 130
        finally:
            with contextlib.suppress(ValueError):         # not in the main thread
                for number, handler in signals.items():
                    signal.signal(number, handler)
        print(line, file=sys.stderr)
        raise SystemExit(code)
    return wrapped


# ================================================================== randomness

def rng(seed, *key):
    """A CPU torch.Generator that depends on (seed, key) alone, e.g. rng(seed, iteration) or
    rng(seed, "image", 7).

    What is random in an iteration is drawn from such generators: steps and levels for the global
    batch, noises for each sample by itself. So a resumed run, another device and another number of
    processes see the same numbers. (Weights that start at random, those of f, LoRA and D's heads,
    are made under torch.manual_seed(seed).)
    """
    words = [int.from_bytes(hashlib.sha256(str(k).encode()).digest()[:4], "big") for k in key]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


# ================================================================== processes (torchrun)
# All processes make the same calls in the same order: a forward of a sharded network, or a function
# below, that one of them leaves out hangs the others. With one process each does the plain thing.

def processes():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    """Whether this is the process that writes and prints for all."""
    return int(os.environ.get("RANK", 0)) == 0


def join_processes(device):
    """Lets the processes find each other. Does nothing when there is only one."""
    if processes() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
        # At the end the group goes, or its threads abort the process. What is left of sharded
        # networks holds it, so that goes first: the last one registered is the first to run.
        atexit.register(dist.destroy_process_group)
        atexit.register(gc.collect)


def my_rows(batch):
    """This process's rows of a global batch, a tensor; they divide evenly (model.prepare)."""
    return batch.chunk(processes())[int(os.environ.get("RANK", 0))]


def gather(part):
    """The tensors `part` [B, ...] of all processes, one after the other, on the CPU."""
    if processes() == 1:
        return part.cpu()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    parts = [torch.empty_like(part, device=device) for _ in range(processes())]
    dist.all_gather(parts, part.to(device).contiguous())
    return torch.cat(parts).cpu()


def any_process(flag):
    """Whether flag is set in any process."""
    return bool(gather(torch.tensor([int(flag)])).any())


def barrier():
    """All processes wait here for each other."""
    any_process(False)


def micro_batches(batch, parts):
    """Cuts {name: tensor [B, ...]} into `parts` smaller ones (--accumulation). Usually there is one
    part: the batch itself."""
    cut = []
    for i in range(parts):
        cut.append({name: values.chunk(parts)[i] for name, values in batch.items()})
    return cut


def adamw(net, lr, betas, weight_decay):
    """The optimiser of what learns in a network: with LoRA not all of its parameters do."""
    learning = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(learning, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def clip_and_step(optimizers, max_norm=math.inf):
    """One update of all `optimizers` together; returns the norm of their gradients.

    1. Average the gradients over the processes, where fully_shard has not done so already.
    2. Take one norm over all of them. UserError where it is not finite: no weight has moved.
    3. Shrink them jointly where the norm exceeds max_norm, step, and clear them.
    """
    grads = [p.grad for optimizer in optimizers for group in optimizer.param_groups
             for p in group["params"] if p.grad is not None]
    sharded = [grad for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    # Every process holds the small networks whole: f and the discriminator's heads.
    if processes() > 1:
        for grad in whole:
            dist.all_reduce(grad.div_(processes()))
    # Several devices hold pieces of a sharded gradient, so torch takes one kind at a time.
    norms = [torch.nn.utils.get_total_norm(part) for part in (whole, sharded) if part]
    norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    norm = torch.stack(norms).norm() if len(norms) == 2 else norms[0]
    if not math.isfinite(norm):
        raise UserError("a gradient is not finite; lower the learning rates, or look for NaN in "
                        "the base model. The run's newest checkpoint, if there is one, is sound")
    shrink = (max_norm / (norm + 1e-6)).clamp(max=1).item()      # as torch's clip_grad_norm_
    for grad in grads:
        grad.mul_(shrink)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


def full_state(net):
    """The network's state, {name: whole tensor on the CPU}; empty but in the main process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(net, options=options)


def load_full(net, state):
    """Puts a whole state, which only the main process needs to hold, into a network that may be
    sharded: each process receives its part."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=processes() > 1)
    set_model_state_dict(net, state, options=options)


# Not torch's state-dict helpers for optimisers: they step an optimiser that has no state yet, so
# that its first real step would count as the second one.

def optimizer_state(net, optimizer):
    """The optimiser's state as {"parameter.slot": whole tensor on the CPU}: no pickle, and no order
    to rely on. Empty but in the main process."""
    tensors = {}
    for name, parameter in net.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if is_main():
                tensors[f"{name}.{slot}"] = value.cpu()
    return tensors


def load_optimizer(net, optimizer, tensors):
    """Puts back what optimizer_state gave; every process holds it. Rates and betas come from the
    settings."""
    parameters = dict(net.named_parameters())
    for key, value in tensors.items():
        name, slot = key.rsplit(".", 1)
        parameter = parameters[name]
        value = value.to(parameter.device, copy=True)
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements,
                                      src_data_rank=None)     # each takes its own piece
        optimizer.state[parameter][slot] = value


# ================================================================== writing and reading

def save_whole(path, write, size=None):
    """Makes a file or a folder by write(temporary path). It appears whole or not at all: an older
    folder of that name goes only after the new one is complete on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)                # what a kill has left
    try:
        with writing(path, size):
            write(new)
            for file in (new, *new.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            if new.is_dir() and path.exists():
                shutil.rmtree(path)
            new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path, size=None):
    """Names the file, and its bytes where they are known, if it cannot be written: a full disk says
    neither."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        about = f" ({size / 1e6:.0f} MB)" if size else ""
        raise OSError(f"cannot write {path}{about}: {error}") from error


def write_text(path, text):
    """Writes a text file whole or not at all."""
    save_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_tensors(path, tensors, metadata=None):
    """Writes {name: tensor} as one safetensors file, whole or not at all, in the main process;
    metadata is {str: str}."""
    if is_main():
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_whole(path, lambda temporary: save_file(tensors, temporary, metadata),
                   size=sum(tensor.nbytes for tensor in tensors.values()))


def read_json(path):
    """The JSON object in a file; UserError when it is missing, cut off or no object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not readable JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def versions():
    """Versions, commit and machine: what a number must carry to be trusted."""
    import diffusers
    import transformers
    commit = ""
    with contextlib.suppress(OSError):                    # the git program is optional
        commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short",
                                 "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"torch": torch.__version__, "diffusers": diffusers.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "commit": commit, "machine": platform.machine(), "cores": os.cpu_count(),
            "processes": processes(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}


# ================================================================== the run folder

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

def read_settings(folder):
    """The settings.json of a run folder, a dict: all that sampler.py, evaluate.py and Stage II
    read. UserError when it is missing or not ours."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no run folder {folder}; "
                        "python train_stage1.py makes runs/tiny-stage1")
    settings = read_json(Path(folder) / "settings.json")
    needed = {"stage", "model", "steps", "alpha", "guidance", "latent_shape", "finished"}
    if settings.get("stage") == 2:
        needed |= {"init", "cached_blocks", "no_compensation"}
    missing = needed - settings.keys()
    if missing:
        raise UserError(f"{folder}/settings.json lacks {min(missing)}: it is no run of this code, "
                        "or one of an older version")
    if not (Path(folder) / "student").is_dir() and not checkpoints(folder):
        raise UserError(f"{folder} holds neither student/ nor a checkpoint yet")
    return settings


def checkpoints(folder):
    """Checkpoint folders of a run, oldest first."""
    return sorted(Path(folder).glob("checkpoint-" + 6 * "[0-9]"))


def newest_iteration(folder):
    """The iteration of a run's newest checkpoint, or 0. Its name is all that says it: a folder
    appears whole or not at all."""
    saved = checkpoints(folder)
    return int(saved[-1].name[-6:]) if saved else 0


class Run:
    """A run folder: open it, restore() once, then log() and checkpoint() from the loop, finish().
    All processes call every method; the main one writes.

    settings is a dict of plain values. The processes find each other here. done: the result is
    there already. UserError, before anything is written, for a folder that holds a run with other
    settings (unless overwrite is set), and for one that is no run folder.
    """

    def __init__(self, folder, settings, device, overwrite=False):
        join_processes(device)
        self.folder, self.settings, self.stop = Path(folder), settings, False
        saved = self.folder / "settings.json"
        if os.path.lexists(folder) and not self.folder.is_dir():
            raise UserError(f"{folder} is a file, or a link to nothing; give --out a folder")
        before = read_json(saved) if saved.exists() else {}
        # A kill may have left a temporary file, whose name begins with a dot.
        files = [path for path in self.folder.glob("*") if not path.name.startswith(".")]
        if files and not before.keys() >= {"finished", "versions"}:
            raise UserError(f"{folder} exists and is not a run folder; give --out another name")
        if overwrite:
            before = {}
        self.result = before.get("finished", 0)           # iterations of what lies in student/
        differing = [f"{key} was {before.get(key)}, is {value}" for key, value in settings.items()
                     if before and key not in MAY_CHANGE and before.get(key) != value]
        if differing:
            raise UserError(f"{folder} holds a run with other settings ({'; '.join(differing)}); "
                            "give another --out, or --overwrite to start again")
        newest = newest_iteration(folder)
        if before and newest > max(settings["iterations"], self.result):
            raise UserError(f"{folder} is at iteration {newest} already; give more --iterations")
        self.done = 0 < settings["iterations"] <= self.result
        if self.done:
            print(f"{folder} is finished; more --iterations continue it, --overwrite starts again")
        barrier()                                         # all have looked before one writes
        if is_main() and overwrite:
            # One rename, so that no rest of the old run can pass for the new one's.
            folder = self.folder.resolve()                # what a link leads to
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)        # what a kill has left
            if saved.exists():
                folder.rename(old)
                folder.mkdir()
                shutil.rmtree(old)
        if is_main() and not self.done:
            # First of all, so that a kill leaves nothing that looks like somebody else's folder.
            self._write_settings()
            (self.folder / "samples").mkdir(exist_ok=True)
        barrier()                                         # the others look after that

    def restore(self, networks, optimizers):
        """Puts the newest checkpoint into networks and optimisers, dicts of names; returns its
        iteration, or 0. A sharded network takes its part of each tensor: any number of processes
        may have saved it. Metrics logged after that checkpoint are dropped, so that metrics.jsonl
        tells one uninterrupted story (but for `seconds`, which count from the last start)."""
        iteration = newest_iteration(self.folder)
        if is_main():
            log = self.folder / "metrics.jsonl"
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            # A kill may have left half a line, without its end.
            keep = [line for line in lines
                    if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
            write_text(log, "".join(keep))
        if not iteration:
            return 0
        folder = self.folder / f"checkpoint-{iteration:06d}"
        try:
            for name, net in networks.items():
                load_full(net, load_file(folder / f"{name}.safetensors") if is_main() else {})
            for name, optimizer in optimizers.items():
                file = folder / f"{name}_optimizer.safetensors"
                load_optimizer(networks[name], optimizer, load_file(file))
        except (OSError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder} does not load ({str(error).splitlines()[0][:160]}); delete "
                            "it to go on from the one before") from error
        print(f"resuming {self.folder} after iteration {iteration}")
        return iteration

    def _write_settings(self):
        write_json(self.folder / "settings.json",
                   {**self.settings, "finished": self.result, "versions": versions()})

    def bar(self, start, what):
        """The iterations that are to come, with a progress bar."""
        # From here on Ctrl-C and SIGTERM only ask: the loop saves after its iteration, and leaves.
        for number in STOP_SIGNALS:
            with contextlib.suppress(ValueError):         # not in the main thread
                signal.signal(number, lambda number, frame: setattr(self, "stop", True))
        total = self.settings["iterations"]
        return tqdm(range(start, total), initial=start, total=total, desc=what,
                    disable=not is_main())

    def log(self, iteration, **values):
        """Averages the values over the processes and appends one line to metrics.jsonl. What is not
        finite becomes null: JSON has no NaN. On a GPU the peak of allocated memory joins them."""
        every = gather(torch.tensor([list(values.values())], dtype=torch.float64))
        values = dict(zip(values, every.nanmean(0).tolist(), strict=True))
        if not is_main():
            return
        if torch.cuda.is_initialized():
            values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        line = {"iteration": iteration}
        for key, value in values.items():
            line[key] = round(float(value), 6) if math.isfinite(value) else None
        path = self.folder / "metrics.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def checkpoint(self, iteration, networks, optimizers):
        """Saves checkpoint-NNNNNN/, what restore() puts back, where one is due: at every
        checkpoint_every iterations, at the last one, and when a process was asked to stop. Then
        the run ends here."""
        last = iteration == self.settings["iterations"]
        stop = any_process(self.stop)
        if not (last or stop or iteration % self.settings["checkpoint_every"] == 0):
            return

        def write(folder):
            # Sharded tensors are made whole, one part at a time, in the main process.
            for name, net in networks.items():
                save_tensors(folder / f"{name}.safetensors", full_state(net))
            for name, optimizer in optimizers.items():
                save_tensors(folder / f"{name}_optimizer.safetensors",
                             optimizer_state(networks[name], optimizer))

        if is_main():
            save_whole(self.folder / f"checkpoint-{iteration:06d}", write)
            for old in checkpoints(self.folder)[:-KEEP]:
                shutil.rmtree(old)
            draw_curves(self.folder)
        else:
            write(self.folder)                            # gives its pieces, writes nothing
        barrier()
        if stop and not last:
            print(f"\nstopped after iteration {iteration}, saved; run the same command again to "
                  "go on")
            raise SystemExit(130)

    def finish(self):
        """Notes in settings.json how many iterations the result in student/ has."""
        self.result = self.settings["iterations"]
        if is_main():
            self._write_settings()
            for old in checkpoints(self.folder)[:-1]:     # more iterations go on from the newest
                shutil.rmtree(old)


def newest_student(folder):
    """Where a run's newest student lies: student/ or, while it trains, the newest checkpoint."""
    # A run that was finished and then given more iterations has both.
    if newest_iteration(folder) > read_settings(folder)["finished"]:
        return checkpoints(folder)[-1]
    return Path(folder) / "student"


def draw_curves(folder):
    """Draws each quantity of a run's metrics.jsonl over the iterations, curves.png; nothing where
    matplotlib is not installed."""
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        names = sorted({name for line in lines for name in line} - {"iteration", "seconds"})
        rows = math.ceil(len(names) / 4) or 1             # nothing may be logged yet
        figure = Figure(figsize=(14, 2.6 * rows))
        figure.subplots_adjust(0.05, 0.04, 0.98, 0.96, wspace=0.3, hspace=0.35)
        for place, name in enumerate(names, 1):
            points = [(line["iteration"], line[name]) for line in lines if name in line]
            axes = figure.add_subplot(rows, 4, place, title=name)
            axes.plot(*np.array(points, float).T)         # null, where nothing was drawn, is a gap
        save_whole(folder / "curves.png", lambda new: figure.savefig(new, format="png"))
