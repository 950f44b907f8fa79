"""What a run is: validated settings, reproducible randomness, a run folder,
whole-or-nothing checkpoints.

Nothing here knows about diffusion. A run folder holds settings.json, metrics.jsonl, samples/, the
two newest checkpoint-NNNNNN/ and, at the end, the result. Everything is safetensors or JSON;
nothing is ever unpickled, so loading a stranger's checkpoint cannot run a stranger's code.

Four mechanisms carry the robustness of the project, and each exists once:
  parse_settings     the only place where the command line is read and checked
  save_whole         the only way a folder is written: temporary name, fsync, rename
  newest_checkpoint  what training goes on from: checks the hashes, falls back to the one before
  World              the only place where the processes of torchrun speak with each other
"""

import argparse
import atexit
import contextlib
import dataclasses
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
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

FORMAT = 1        # [ours] version of the run folder; a newer one is refused, never guessed at
KEEP = 2          # [ours] how many checkpoints stay on disk
# settings that a resumed run may change without changing the result
MAY_CHANGE = {"out", "iterations", "checkpoint_every", "sample_every", "log_every", "device",
              "overwrite", "debug", "dry_run"}


class UserError(Exception):
    """Something the user can put right. Shown as one line; the exit code is 2."""


# ----------------------------------------------------------------------------- settings

def option(default, text, low=None, high=None, above=None, choices=None):
    """A settings field: default, help text (meaning, unit, origin),
    and the range a value must lie in.

    low and high are inclusive, above is exclusive. A default of None means "taken from the model's
    preset".
    """
    return dataclasses.field(default=default, metadata=dict(
        text=text, low=low, high=high, above=above, choices=choices))


def check_value(name, value, kind, rule):
    """The value of one setting, converted and checked. Raises UserError with one clear line."""
    try:
        value = kind(value)
    except ValueError:
        article = "an" if kind is int else "a"
        raise UserError(f"{name} must be {article} {_KINDS[kind]}, not {value!r}") from None
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}")
    if kind is str and (not value or "\0" in value):
        raise UserError(f"{name} must not be empty and must not hold NUL characters")
    if rule["choices"] and value not in rule["choices"]:
        raise UserError(f"{name} must be one of {', '.join(map(str, rule['choices']))}, "
                        f"not {value}")
    for bound, wrong, words in (("low", lambda b: value < b, "at least"),
                                ("high", lambda b: value > b, "at most"),
                                ("above", lambda b: value <= b, "more than")):
        if rule[bound] is not None and wrong(rule[bound]):
            raise UserError(f"{name} must be {words} {rule[bound]}, not {value}")
    return value


_KINDS = {int: "integer", float: "number", str: "text"}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def parse_settings(cls, argv=None, prog=None, description=None):
    """The settings dataclass `cls` filled from the command line:
    field learning_rate is --learning-rate.

    Types come from the annotations (bool fields are flags). Unknown options, wrong types and values
    out of range raise UserError before anything is imported, loaded or written.
    """
    prog = prog or Path(sys.argv[0]).name
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["text"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif field.type is list:
            parser.add_argument(flag, nargs="+", help=text, metavar="X")
        else:
            shown = "from the preset" if field.default is None else field.default
            parser.add_argument(flag, help=f"{text} (default: {shown})", metavar="X")
    given = vars(parser.parse_args(argv))
    values = {}
    for field in dataclasses.fields(cls):
        value, flag = given[field.name], "--" + field.name.replace("_", "-")
        if value is None or value is False:
            continue
        if field.type is list:
            value = [check_value(flag, v, str, field.metadata) for v in value]
        elif field.type is not bool:
            value = check_value(flag, value, field.type, field.metadata)
        values[field.name] = value
    return cls(**values)


def command(main, several=False):
    """Decorates a script's main(argv):
    user mistakes become one line and exit code 2, never a traceback.

    several: it may be started by torchrun; only the first of the processes prints.

    Ctrl-C and SIGTERM reach the training loops through Run.interrupted; anywhere else they leave
    with 130. A full disk or a folder that cannot be written is one line and exit code 1.
    """
    def wrapped(argv=None):
        argv = sys.argv[1:] if argv is None else argv
        quiet()
        try:
            if processes() > 1 and not several:
                raise UserError("torchrun is for train_stage1.py and train_stage2.py; run this "
                                "in one process")
            first = int(os.environ.get("RANK", 0)) == 0
            with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):
                return main(argv)
        except UserError as error:
            line, code = f"error: {error}", 2
        except KeyboardInterrupt:
            line, code = "stopped", 130
        except SafetensorError as error:  # its I/O errors are no OSErrors
            line, code = f"error: {error}", 1
        except OSError as error:
            line, code = f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), 1
        if "--debug" in argv:
            import traceback
            traceback.print_exc()
        print(line, file=sys.stderr)
        raise SystemExit(code)
    return wrapped


def quiet():
    """Keeps third parties' notices and bars out of a first run; call before they are imported."""
    for key, value in (("TRANSFORMERS_VERBOSITY", "critical"), ("DIFFUSERS_VERBOSITY", "critical"),
                       ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", module="(diffusers|transformers|huggingface_hub)")


# ----------------------------------------------------------------------------- randomness

def rng(seed, *key):
    """A CPU torch.Generator that depends on (seed, key) alone,
    e.g. rng(seed, iteration) or rng(seed, "image", 7).

    Everything random of an iteration is drawn from such a generator for the global batch, so a
    resumed run, another device and another number of processes see the same numbers.
    """
    import torch
    words = [int.from_bytes(hashlib.sha256(str(k).encode()).digest()[:4], "big") for k in key]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


# ----------------------------------------------------------------------------- several processes

def processes():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_batch(settings):
    """UserError unless every micro-batch of every process has the same size: the mean of their
    means is the mean of the batch only then."""
    parts = processes() * settings.accumulation
    if settings.batch_size % parts:
        raise UserError(f"--batch-size {settings.batch_size} is not a multiple of --accumulation "
                        f"{settings.accumulation}" + (f" times {processes()} processes"
                                                      if processes() > 1 else ""))


class World:
    """The processes of this run: those that torchrun started, or this one alone.

    All of them draw the same global batch and keep their share of it, so that any number of
    processes computes the same gradients. All make the same calls in the same order: a forward of a
    sharded network, or a method below, that one of them leaves out hangs the others.
    """

    def __init__(self, device="cpu"):
        import torch
        import torch.distributed as dist
        self.device, self.dist = torch.device(device), dist
        if processes() > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.first = self.rank == 0     # it writes and prints for all

    def share(self, batch):
        """This process's part of a global batch, a tensor or a list."""
        size = len(batch) // self.size
        return batch[self.rank * size:(self.rank + 1) * size]

    def gather(self, part):
        """The tensors `part` [B, ...] of all processes, one after the other, on the CPU."""
        import torch
        if self.size == 1:
            return part.cpu()
        parts = [torch.empty_like(part, device=self.device) for _ in range(self.size)]
        self.dist.all_gather(parts, part.to(self.device).contiguous())
        return torch.cat(parts).cpu()

    def mean(self, values):
        """{name: number} with the means over the processes; those without a value do not count."""
        import torch
        rows = self.gather(torch.tensor([[float(value) for value in values.values()]]))
        return dict(zip(values, rows.nanmean(0).tolist(), strict=True))

    def any(self, flag):
        """Whether flag is set in any process."""
        import torch
        return bool(self.gather(torch.tensor([int(flag)])).any())

    def wait(self):
        """Goes on when all processes are here."""
        self.any(False)


# ----------------------------------------------------------------------------- writing and reading

def save_whole(folder, write):
    """Makes `folder` by calling write(temporary folder). It appears whole or not at all.

    An older folder of that name is replaced only after the new one is complete on the disk. Between
    the two renames it is at .NAME.old, whole; after a kill at that instant the next save_whole puts
    it back first.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        write(new)
        for path in [p for p in new.rglob("*") if p.is_file()]:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    with contextlib.suppress(OSError):  # some file systems cannot fsync a directory
        fd = os.open(folder.parent, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path, text):
    """Writes a text file whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_json(path, value):
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions():
    """Versions, commit and machine: what a number must carry to be trusted."""
    import diffusers
    import torch
    import transformers
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
                         capture_output=True, text=True)
    return {"torch": torch.__version__, "diffusers": diffusers.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "commit": git.stdout.strip() or None, "machine": platform.machine(),
            "cores": os.cpu_count(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def checkpoints(folder):
    """Checkpoint folders of a run, oldest first."""
    return sorted(Path(folder).glob("checkpoint-??????"))


def newest_checkpoint(run_folder, loud=True):
    """(iteration, {part: {name: tensor}}) of the newest sound checkpoint, or (0, None).
    A damaged one is named on stderr, and the one before it is used."""
    from safetensors.torch import load_file
    for folder in reversed(checkpoints(run_folder)):
        try:
            state = read_json(folder / "state.json")
            for name, digest in state["files"].items():
                if Path(name).name != name or _digest(folder / name) != digest:
                    raise UserError(f"{name} does not match its hash")
            return (int(state["iteration"]),
                    {Path(name).stem: load_file(folder / name) for name in state["files"]})
        except (UserError, OSError, KeyError, ValueError, TypeError, AttributeError,
                SafetensorError) as error:
            if loud:
                print(f"{folder} is damaged ({error}); using the one before", file=sys.stderr)
    return 0, None


class Run:
    """A run folder. Open it, resume(), then log() and checkpoint() from the loop. All processes
    call every method; the first one writes.

    settings is a dict of plain values. A folder that holds another run's settings is refused unless
    overwrite is set; a folder that is not a run folder is never touched.
    """

    def __init__(self, folder, settings, overwrite=False, world=None):
        self.folder, self.settings, self.world = Path(folder), settings, world or World()
        self.interrupted = False
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; give --out a folder")
        saved = self.folder / "settings.json"
        if self.folder.exists() and not saved.exists() and any(
                not path.name.startswith(".") for path in self.folder.iterdir()):
            raise UserError(f"{self.folder} exists and is not a run folder; "
                            "give --out another name")
        if saved.exists() and not overwrite:
            self._compare(read_json(saved))
        self.replace = saved.exists() and overwrite

    def _compare(self, before):
        if before.get("format") != FORMAT:
            raise UserError(f"{self.folder} was written in format {before.get('format')}; "
                            f"this code reads {FORMAT}")
        before = before.get("settings", {})
        differing = [f"{key} was {before.get(key)}, is {value}"
                     for key, value in self.settings.items()
                     if key not in MAY_CHANGE and before.get(key) != value]
        if differing:
            raise UserError(f"{self.folder} holds a run with other settings "
                            f"({'; '.join(differing)}); "
                            "give another --out, or --overwrite to start again")

    def resume(self):
        """(iteration, {part: {name: tensor}}) of the newest sound checkpoint, or (0, None).
        Writes settings.json.

        Metrics logged after the checkpoint are dropped, so that metrics.jsonl tells one
        uninterrupted story.
        """
        self.world.wait()  # until all have read the folder
        if self.world.first:
            if self.replace:  # only now, when all that may fail has been loaded
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            # first of all, so that a kill leaves nothing that looks like somebody else's folder
            write_json(self.folder / "settings.json",
                       {"format": FORMAT, "settings": self.settings,
                        "versions": versions() | {"processes": self.world.size}})
            (self.folder / "samples").mkdir(exist_ok=True)
        self.world.wait()
        iteration, parts = newest_checkpoint(self.folder, self.world.first)
        self._catch_signals()
        if self.world.first:
            self._cut_metrics(iteration)
        return iteration, parts

    def _cut_metrics(self, iteration):
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        keep = []
        for line in lines:  # a line cut off by a kill is no JSON: it and its successors go
            with contextlib.suppress(ValueError):
                if json.loads(line)["iteration"] <= iteration:
                    keep.append(line)
        write_text(path, "".join(keep))

    def _catch_signals(self):
        """Ctrl-C and SIGTERM set .interrupted;
        the loop saves and leaves at the end of its iteration."""
        def handler(number, frame):
            if self.interrupted:  # the second one does not wait
                raise KeyboardInterrupt
            self.interrupted = True
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, handler)

    def log(self, iteration, **values):
        """Appends one line to metrics.jsonl, means over the processes, and returns them.
        Values that are not finite become null: JSON has no NaN. On a GPU peak_gb, what plan.py
        predicts, joins them."""
        if self.world.device.type == "cuda":
            import torch
            values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        line, values = {"iteration": iteration}, self.world.mean(values)
        for key, value in values.items():
            line[key] = round(value, 6) if math.isfinite(value) else None
        if not self.world.first:
            return values
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return values

    def checkpoint(self, iteration, parts):
        """Saves {part: {name: tensor}} as checkpoint-NNNNNN/ and removes all but the newest two."""
        from safetensors.torch import save_file

        def write(folder):
            for part, tensors in parts.items():
                save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                          folder / f"{part}.safetensors")
            files = {p.name: _digest(p) for p in sorted(folder.glob("*.safetensors"))}
            write_json(folder / "state.json",
                       {"format": FORMAT, "iteration": iteration, "files": files})

        if self.world.first:
            save_whole(self.folder / f"checkpoint-{iteration:06d}", write)
            for old in checkpoints(self.folder)[:-KEEP]:
                shutil.rmtree(old)
        self.world.wait()

    def finished(self, total):
        """True, and says so, when the result has `total` iterations; UserError when it has passed
        them without a result. Before anything is loaded."""
        recipe, saved = self.folder / "distill.json", checkpoints(self.folder)
        if self.replace:
            return False
        if recipe.exists() and read_json(recipe)["iteration"] >= total:
            print(f"{self.folder} is finished; more --iterations continue it, "
                  "--overwrite starts again")
            return True
        if saved and int(saved[-1].name[-6:]) > total:
            raise UserError(f"{self.folder} is at iteration {int(saved[-1].name[-6:])} "
                            "already; give more --iterations")
        return False

    def restore(self, networks, optimizers):
        """resume() into networks and optimisers, dicts of the same names; returns the iteration.
        A sharded network takes its part of each tensor: any number of processes may have saved it.
        """
        iteration, parts = self.resume()
        if parts:
            put_back(self.folder, parts, networks, optimizers, networks, networks)
            print(f"resuming {self.folder} after iteration {iteration}")
        return iteration

    def save(self, iteration, networks, optimizers):
        """checkpoint() of what restore() puts back, sharded tensors made whole."""
        self.checkpoint(iteration, {name: whole_state(net) for name, net in networks.items()} | {
            f"{name}_optimizer": optimizer_tensors(net, optimizers[name])
            for name, net in networks.items()})


# ----------------------------------------------------------------------------- optimiser plumbing

def update(optimizers, max_norm=math.inf):
    """Clips the gradients of all `optimizers` jointly, steps and clears them; returns the norm.
    A norm that is not finite changes no weight.

    Sharded gradients come averaged over the processes; those of the small networks that every
    process holds whole (f, the discriminator's heads) are averaged here.
    """
    import torch
    from torch.distributed.tensor import DTensor
    world, grads = World(), [p.grad for optimizer in optimizers for g in optimizer.param_groups
                             for p in g["params"] if p.grad is not None]
    sharded = [grad for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    for grad in whole if world.size > 1 else ():
        world.dist.all_reduce(grad.div_(world.size))
    norms = [torch.nn.utils.get_total_norm(part) for part in (whole, sharded) if part]
    norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    norm = torch.stack(norms).norm() if len(norms) == 2 else norms[0]
    shrink = (max_norm / (norm + 1e-6)).clamp(max=1).item()  # as torch's clip_grad_norm_
    for grad in grads:
        grad.mul_(shrink)
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


class Patience:
    """Counts updates in a row whose gradient is not finite, says so, and stops the run after
    three."""

    def __init__(self, run, limit=3):
        self.run, self.limit, self.bad = run, limit, 0

    def check(self, iteration, norms, sigma=""):
        """norms: {network: gradient norm} of this iteration; sigma: what levels it was at."""
        wrong = [name for name, norm in norms.items() if not math.isfinite(norm)]
        self.bad = self.bad + 1 if wrong else 0
        if wrong and self.run.world.first:
            print(f"iteration {iteration}: the gradient of {', '.join(wrong)} is not finite "
                  f"{sigma}; its update was skipped", file=sys.stderr)
        if self.bad >= self.limit:
            raise UserError(f"{self.bad} iterations in a row were not finite; the newest "
                            f"checkpoint in {self.run.folder} is sound")


def put_back(folder, parts, networks, optimizers, weights, states):
    """Parts of a checkpoint, as Run.save wrote them, into the networks named in `weights` and the
    optimisers named in `states`; UserError, with the folder, when they do not fit."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    try:
        for name in weights:
            set_model_state_dict(networks[name], parts[name],
                                 options=StateDictOptions(full_state_dict=True))
        for name in states:
            load_optimizer(networks[name], optimizers[name], parts[f"{name}_optimizer"])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: its checkpoint does not fit these networks "
                        f"({str(error).splitlines()[0][:160]})") from error


def whole_state(net):
    """The network's state, {name: whole tensor on the CPU}; empty but in the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True,
                                                              cpu_offload=True))


# Not torch's state-dict helpers for optimisers: they step an optimiser that has no state yet, so
# that its first real step would count as the second one.

def optimizer_tensors(model, optimizer):
    """The optimiser's state as {"parameter.slot": whole tensor on the CPU}: no pickle, and no order
    to rely on. Empty but in the first process."""
    from torch.distributed.tensor import DTensor
    tensors, first = {}, World().first
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if first:
                tensors[f"{name}.{slot}"] = value.cpu()
    return tensors


def load_optimizer(model, optimizer, tensors):
    """Puts back what optimizer_tensors saved.
    Learning rates and betas come from the settings, not the file."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    named = dict(model.named_parameters())
    for key, value in tensors.items():
        name, slot = key.rsplit(".", 1)
        parameter = named[name]
        value = value.to(parameter.device, copy=True)
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements,
                                      src_data_rank=None)   # all have read it: nothing is sent
        optimizer.state[parameter][slot] = value
