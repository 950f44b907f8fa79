"""Run folders: how a training is stopped, resumed, and never lost.
Nothing here knows about diffusion; skip this file when you read beside the paper.

A run folder holds settings.json, metrics.jsonl, samples/, the two newest checkpoint-NNNNNN/ and, at
the end, the result. Everything is safetensors or JSON. Nothing is ever unpickled, so loading a
stranger's checkpoint cannot run a stranger's code.

What carries the robustness of the project exists once:
  rng                all randomness: from (seed, iteration) alone, so nothing needs to be saved
  save_whole         the only way a folder is written: temporary name, fsync, rename
  newest_checkpoint  what training goes on from: checks the hashes, falls back to the one before
  Run                the folder itself: opened, restored, logged to, saved
The command line is tools/settings.py, torchrun's processes are tools/processes.py.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tools.processes import (any_process, first, gather, load_optimizer, load_whole,
                             optimizer_tensors, processes, whole_state)
from tools.settings import UserError, leaving

try:
    import fcntl
except ImportError:                                       # Windows: runs are not locked there
    fcntl = None

FORMAT = 4        # version of the run folder; another one is refused, never guessed at
KEEP = 2          # [ours] how many checkpoints stay on disk
SAVING = 0.02     # [ours] share of the time that saving may take, where --checkpoint-every is left
SOONEST = 300     # [ours] seconds between two such checkpoints at least
GRACE = 2.0       # [ours] seconds in which a second signal is taken for the first one's echo
# Settings that a resumed run may change without changing the result. The last five name files,
# which may have been moved: their content is compared instead (Run).
MAY_CHANGE = {"out", "iterations", "checkpoint_every", "sample_every", "log_every", "device",
              "overwrite", "debug", "dry_run", "compile", "model", "prompts", "init",
              "reference", "discriminator"}


# ================================================================== randomness

def rng(seed, *key):
    """A CPU torch.Generator that depends on (seed, key) alone, e.g. rng(seed, iteration) or
    rng(seed, "image", 7).

    Whatever is random in an iteration is drawn from such generators: steps and levels for the
    global batch, noises for each sample by itself. So a resumed run, another device and another
    number of processes see the same numbers.
    """
    words = [int.from_bytes(hashlib.sha256(str(k).encode()).digest()[:4], "big") for k in key]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


# ================================================================== writing and reading

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


def replace_file(path, write):
    """Makes one file by write(temporary path), whole or not at all. Several runs may write the same
    file at once: each has a temporary name of its own."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_tensors(path, tensors):
    """Writes {name: tensor} as one safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda temporary: save_file(tensors, temporary))


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
    commit = None
    with contextlib.suppress(OSError):                    # the git program is optional
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short",
                              "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    return {"torch": torch.__version__, "diffusers": diffusers.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "commit": commit, "machine": platform.machine(),
            "cores": os.cpu_count(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def content_of(folder, pattern="*.safetensors"):
    """What the files of a folder hold, as 16 hex digits, wherever the folder lies: a hash of names,
    sizes, and each file's first and last MiB. Other weights of the same shapes differ there. What
    is no folder, a hub id, stands for itself."""
    if not Path(folder).is_dir():
        return str(folder)
    total = hashlib.sha256()
    for path in sorted(Path(folder).glob(pattern)):
        size, ends = path.stat().st_size, b""
        with open(path, "rb") as file:
            ends += file.read(2**20)
            file.seek(max(0, size - 2**20))
            ends += file.read()
        total.update(f"{path.name} {size}".encode() + ends)
    return total.hexdigest()[:16]


# ================================================================== the run folder

def checkpoints(folder):
    """Checkpoint folders of a run, oldest first."""
    return sorted(Path(folder).glob("checkpoint-" + 6 * "[0-9]"))


def digest(tensors):
    """SHA-256 over {name: CPU tensor}: names, types, shapes and bytes. Taken from memory, so that a
    large checkpoint is written once and not read again."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def newest_checkpoint(run_folder):
    """(iteration, {part: {name: tensor}}) of the newest sound checkpoint, or (0, None).
    A damaged one is named on stderr, and the one before it is used."""
    for folder in reversed(checkpoints(run_folder)):
        try:
            state = read_json(folder / "state.json")
            parts = {}
            for name, expected in state["parts"].items():
                if Path(name).name != name:
                    raise UserError(f"{name!r} is no file name")
                # safetensors maps the file: the tensors are read when they are used.
                parts[name] = load_file(folder / f"{name}.safetensors")
                if digest(parts[name]) != expected:
                    raise UserError(f"{name} does not match its hash")
            return int(state["iteration"]), parts
        except (UserError, OSError, KeyError, ValueError, TypeError, AttributeError,
                SafetensorError) as error:
            print(f"{folder} is damaged ({error}); using the one before", file=sys.stderr)
    return 0, None


class Run:
    """A run folder: open it, restore() once, then log() and save() from the loop. All processes
    call every method; the first one writes.

    settings is a dict of plain values. A folder that holds another run's settings is refused unless
    overwrite is set; a folder that is not a run folder is never touched. For files that may have
    been moved, "model_content" and the like (content_of) are compared instead of the path.
    """

    def __init__(self, folder, settings, overwrite=False):
        self.folder, self.settings = Path(folder), settings
        self.interrupted, self.locked, self.bad = False, False, 0
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; give --out a folder")
        saved = self.folder / "settings.json"
        if self.folder.exists() and not saved.exists() and any(
                not path.name.startswith(".") for path in self.folder.iterdir()):
            raise UserError(f"{self.folder} exists and is not a run folder; "
                            "give --out another name")
        self.replace = saved.exists() and overwrite
        if self.folder.exists():
            self._lock()
        if saved.exists() and not overwrite:
            self._compare(read_json(saved))

    def _lock(self):
        """Keeps other commands out of the folder. The system itself drops the lock when this
        process ends, however it ends: nothing is left over that would have to be cleaned up."""
        taken, self.locked = False, True
        if first() and fcntl:
            fd = os.open(self.folder, os.O_RDONLY)
            leaving.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = True
            except OSError:                               # a file system without locks
                pass
        if any_process(taken):
            raise UserError(f"{self.folder} is in use by another command that is still running; "
                            "wait for its end or give another --out")

    def _compare(self, before):
        if before.get("format") != FORMAT:
            raise UserError(f"{self.folder} was written in format {before.get('format')}; "
                            f"this code reads {FORMAT}")
        before = before.get("settings")
        if not isinstance(before, dict):
            raise UserError(f"{self.folder}/settings.json holds no settings")
        differing = []
        for key, value in self.settings.items():
            if key not in MAY_CHANGE and before.get(key) != value:
                name = key.removesuffix("_content")
                what = f"{name} was {before.get(name)}, is {self.settings[name]}"
                differing.append(what + (" with other content" if name != key else ""))
        if differing:
            raise UserError(f"{self.folder} holds a run with other settings "
                            f"({'; '.join(differing)}); "
                            "give another --out, or --overwrite to start again")

    def finished(self, total):
        """True, and says so, when the result has `total` iterations; UserError when it has passed
        them without a result. Before anything is loaded."""
        recipe, saved = self.folder / "distill.json", checkpoints(self.folder)
        if self.replace:
            return False
        done = read_json(recipe).get("iteration") if recipe.exists() else 0
        if type(done) is not int:
            raise UserError(f"{recipe}: iteration is {str(done)[:80]!r}, not an integer")
        if done >= total and recipe.exists():
            print(f"{self.folder} is finished; more --iterations continue it, "
                  "--overwrite starts again")
            return True
        if saved and int(saved[-1].name[-6:]) > total:
            raise UserError(f"{self.folder} is at iteration {int(saved[-1].name[-6:])} "
                            "already; give more --iterations")
        return False

    def restore(self, networks, optimizers):
        """Puts the newest checkpoint into networks and optimisers, dicts of names; returns its
        iteration, or 0. A sharded network takes its part of each tensor: any number of processes
        may have saved it. Metrics logged after that checkpoint are dropped, so that metrics.jsonl
        tells one uninterrupted story."""
        any_process(False)                                # until all have read the folder
        if first():
            if self.replace:                              # only now that all else has been loaded
                # A rename first: a kill while it is deleted leaves no half of it under its name.
                old = self.folder.with_name(f".{self.folder.name}.replaced")
                shutil.rmtree(old, ignore_errors=True)
                self.folder.rename(old)
                shutil.rmtree(old)
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.replace or not self.locked:
            self._lock()                                  # of a folder that is new
            if (self.folder / "settings.json").exists():  # not so new: another one was faster
                self._compare(read_json(self.folder / "settings.json"))
        if first():
            # First of all, so that a kill leaves nothing that looks like somebody else's folder.
            write_json(self.folder / "settings.json",
                       {"format": FORMAT, "settings": self.settings,
                        "versions": versions() | {"processes": processes()}})
            (self.folder / "samples").mkdir(exist_ok=True)
        any_process(False)
        self._catch_signals()
        iteration, parts = newest_checkpoint(self.folder) if first() else (0, None)
        iteration = int(gather(torch.tensor([iteration]))[0])    # the first process read it for all
        if first():
            self._cut_metrics(iteration)
        if not iteration:
            return 0
        try:
            for name, net in networks.items():
                load_whole(net, parts[name] if first() else {})
            for name, optimizer in optimizers.items():
                load_optimizer(networks[name], optimizer,
                               parts[f"{name}_optimizer"] if first() else {})
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{self.folder}: its checkpoint does not fit these networks "
                            f"({str(error).splitlines()[0][:160]})") from error
        print(f"resuming {self.folder} after iteration {iteration}")
        return iteration

    def _cut_metrics(self, iteration):
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        keep = []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):    # cut off by a kill
                if json.loads(line)["iteration"] <= iteration:
                    keep.append(line)
        write_text(path, "".join(keep))

    def _catch_signals(self):
        """Ctrl-C and SIGTERM set .interrupted, the moment; the loop saves and leaves after its
        iteration."""
        def handler(number, frame):
            # The second one does not wait; but a scheduler and torchrun may both pass on the first.
            if self.interrupted and time.monotonic() - self.interrupted > GRACE:
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):         # not in the main thread
                leaving.callback(signal.signal, number, signal.signal(number, handler))

    def stopping(self):
        """Whether any process was asked to stop."""
        return any_process(bool(self.interrupted))

    def leave(self, iteration):
        """Ends an interrupted run after it was saved."""
        print(f"stopped after iteration {iteration}, saved; type the same command again to go on")
        raise SystemExit(130)

    def log(self, iteration, **values):
        """Appends one line to metrics.jsonl, the first process's numbers. What is not finite
        becomes null: JSON has no NaN. On a GPU peak_gb, what --dry-run plans, joins them."""
        if not first():
            return
        if torch.cuda.is_initialized():
            values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        line = {"iteration": iteration}
        for key, value in values.items():
            line[key] = round(float(value), 6) if math.isfinite(value) else None
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def check_finite(self, iteration, **norms):
        """Names gradients (norm by network) that are not finite; clip_and_step has skipped their
        update. Stops the run after three such iterations in a row."""
        wrong = [name for name, norm in norms.items() if not math.isfinite(norm)]
        self.bad = self.bad + 1 if wrong else 0
        if wrong and first():
            print(f"iteration {iteration}: the gradient of {', '.join(wrong)} is not finite; "
                  "its update was skipped", file=sys.stderr)
        if self.bad >= 3:
            advice = f"the newest checkpoint in {self.folder} is sound"
            if not checkpoints(self.folder):
                advice = "there is no checkpoint yet; lower the learning rates"
            raise UserError(f"{self.bad} iterations in a row were not finite; {advice}")

    def due(self, iteration, every):
        """Whether to save now: at every so many iterations or, when every is None, whenever saving
        has then taken no more than SAVING of the time."""
        if every:
            return iteration % every == 0
        spent = time.monotonic() - self.saved_at
        return any_process(first() and spent > max(SOONEST, self.save_seconds / SAVING))

    def save(self, iteration, networks, optimizers):
        """Writes checkpoint-NNNNNN/, what restore() puts back, and removes all but the newest two.
        Sharded tensors are made whole, one part at a time, in the first process."""
        begun = time.monotonic()

        def write(folder):
            digests = {}
            for name, net in networks.items():
                write_part(folder, name, whole_state(net), digests)
            for name, optimizer in optimizers.items():
                write_part(folder, f"{name}_optimizer",
                           optimizer_tensors(networks[name], optimizer), digests)
            if first():
                write_json(folder / "state.json",
                           {"format": FORMAT, "iteration": iteration, "parts": digests})

        # A function of its own, so that a part is freed before the next one is gathered.
        def write_part(folder, name, tensors, digests):
            if first():
                save_tensors(folder / f"{name}.safetensors", tensors)
                digests[name] = digest(tensors)

        if first():
            save_whole(self.folder / f"checkpoint-{iteration:06d}", write)
            for old in checkpoints(self.folder)[:-KEEP]:
                shutil.rmtree(old)
        else:
            write(None)                                   # gives its pieces, writes nothing
        any_process(False)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - begun
