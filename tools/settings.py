"""The command line: settings, their checks, and how a script ends.

    @dataclasses.dataclass
    class Settings(CommonSettings):
        alpha: float = option(None, "what it is, its unit, its origin", low=0, high=1)

    settings = parse_settings(Settings, argv, "train_stage1.py", "what it does")

A field is an option: alpha is --alpha. This is the only place where the command line is read, so a
mistake is one line and exit code 2, before anything is loaded or written. Imported before diffusers
and transformers, which it keeps quiet.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import os
import sys
import traceback
import warnings

import torch
from safetensors import SafetensorError

from tools.processes import first, processes

# A first run should be clean. Keeps notices of diffusers and transformers out, which are imported
# after this file: so every script imports it first. The bars of downloads stay.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", module="(diffusers|transformers|huggingface_hub)")
warnings.filterwarnings("ignore", message="IProgress not found")      # tqdm's, in a notebook

# What a command changes in its process (signal handlers, locks) is put back through this.
leaving = contextlib.ExitStack()


class UserError(Exception):
    """Something the user can put right. Shown as one line; the exit code is 2."""


def option(default, text, low=None, high=None, above=None, choices=None):
    """A settings field: default, help text (meaning, unit, origin) and the values it may have: from
    low to high inclusive, more than above. A default of None is filled in by the script."""
    return dataclasses.field(default=default, metadata=dict(
        text=text, low=low, high=high, above=above, choices=choices))


@dataclasses.dataclass
class CommonSettings:
    """What both training scripts share and what is not the method."""
    out: str = option(None, "run folder (default: runs/MODEL-stage1 or -stage2)")
    seed: int = option(3407, "seed of everything random [official 3407]", low=0, high=2**31 - 1)
    accumulation: int = option(1, "micro-batches one after the other, to save memory",
                               low=1, high=65536)
    gradient_checkpointing: bool = option(
        False, "recompute blocks in backward: less memory, a third more time")
    compile: bool = option(False, "compile the blocks by torch.compile: a slow start")
    checkpoint_every: int = option(
        None, "iterations between checkpoints; for real models by default as often as saving "
              "takes no more than 2% of the time", low=1)
    sample_every: int = option(None, "iterations between sample grids", low=1)
    log_every: int = option(5, "iterations between lines of metrics.jsonl", low=1)
    device: str = option(None, "where to run (default: the miniature on the CPU, a real model on "
                              "CUDA if it is there)", choices=("cpu", "cuda", "mps"))
    dry_run: bool = option(False, "print the resolved settings and the memory plan and stop")
    overwrite: bool = option(False, "start again although the run folder holds a run")
    debug: bool = option(False, "show tracebacks")


def checked(kind, rule, text):
    """The value of one setting, converted and checked: an argparse type."""
    try:
        value = kind(text)
    except ValueError:
        word = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {word}, not {text!r}") from None
    wrong = None
    if kind is float and not math.isfinite(value):
        wrong = "a finite number"
    elif kind is str and (not value or "\0" in value):
        wrong = "a text without NUL characters"
    elif rule["choices"] and value not in rule["choices"]:
        wrong = f"one of {', '.join(rule['choices'])}"
    elif rule["low"] is not None and value < rule["low"]:
        wrong = f"at least {rule['low']}"
    elif rule["high"] is not None and value > rule["high"]:
        wrong = f"at most {rule['high']}"
    elif rule["above"] is not None and value <= rule["above"]:
        wrong = f"more than {rule['above']}"
    if wrong:
        raise argparse.ArgumentTypeError(f"must be {wrong}, not {text!r}")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        message = message.removeprefix("argument ").replace(": must", " must", 1)
        raise UserError(f"{message} (see python {self.prog} --help)")


def parse_settings(cls, argv, prog, description):
    """The settings dataclass `cls` filled from the command line: field learning_rate is
    --learning-rate. Types come from the annotations; bool fields are flags. Unknown options, wrong
    types and values out of range raise UserError before anything is loaded or written."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["text"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        kind = str if field.type is list else field.type
        default = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(flag, type=functools.partial(checked, kind, field.metadata),
                            nargs="+" if field.type is list else None, metavar="X",
                            default=field.default, help=text + default)
    return cls(**vars(parser.parse_args(argv)))


def fill_in(settings, recipe):
    """Settings that were not given take the recipe's values."""
    for name, value in recipe.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def command(main, several=False):
    """Decorates a script's main(argv): user mistakes become one line and exit code 2, never a
    traceback; Ctrl-C outside a loop 130; a full disk one line and 1. several: torchrun may start
    it, and then only the first process prints."""
    @functools.wraps(main)
    def wrapped(argv=None):
        argv = sys.argv[1:] if argv is None else argv
        output = contextlib.nullcontext() if first() else contextlib.redirect_stdout(io.StringIO())
        try:
            if processes() > 1 and not several:
                raise UserError("torchrun is for train_stage1.py and train_stage2.py; run this "
                                "in one process")
            # A notebook may call main(): it gets back its own seed and its own Ctrl-C.
            with leaving, torch.random.fork_rng(devices=[]), output:
                return main(argv)
        except UserError as error:
            line, code = f"error: {error}", 2
        except KeyboardInterrupt:
            line, code = "stopped", 130
        except SafetensorError as error:                  # its I/O errors are no OSErrors
            line, code = f"error: {error}", 1
        except OSError as error:
            line, code = f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), 1
        if "--debug" in argv:
            traceback.print_exc()
        print(line, file=sys.stderr)
        raise SystemExit(code)
    return wrapped


def check_batch(settings):
    """UserError unless every micro-batch of every process has the same size: only then is the mean
    of their means the mean of the batch."""
    if settings.batch_size % (processes() * settings.accumulation):
        of_all = f" times {processes()} processes" if processes() > 1 else ""
        raise UserError(f"--batch-size {settings.batch_size} is not a multiple of --accumulation "
                        f"{settings.accumulation}{of_all}")
