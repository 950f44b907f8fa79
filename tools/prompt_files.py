"""Reads prompts from the files that people have: `--prompts FILE` of all scripts.

    text           one prompt a line
    JSON lines     a text or an object a line; the object holds "prompt" or "caption"
    JSON           an array of such, also spread over lines, or COCO's {"annotations": [...]}
    CSV, TSV       told by the file's name, with a column named prompt or caption

What is none of these is refused by line: a bracket or a header must not become a prompt.
"""

import csv
import io
import json
from pathlib import Path

from tools.settings import UserError
from tools.processes import first

COLUMNS = ("prompt", "caption")     # looked for in this order
LONGEST = 10_000                    # [ours] characters; more is no prompt but a wrong file


def read_prompts(path):
    """The prompts of a file, a list of str; UserError with file name and line. The first process
    prints their number and the first three, so that a wrong file shows."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--prompts {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")       # takes a byte-order mark away
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path}: not UTF-8 text") from None
    if path.suffix.lower() in (".csv", ".tsv"):
        found = from_table(path, text)
    else:
        found = from_json_or_text(path, text)
    prompts = []
    for where, prompt in found:
        prompt = prompt.strip()
        if "\0" in prompt or len(prompt) > LONGEST:
            raise UserError(f"--prompts {path}, {where}: NUL characters or longer than {LONGEST:,} "
                            "characters")
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"--prompts {path}: no prompt in it")
    if first():
        shown = "; ".join(prompt[:60] for prompt in prompts[:3])
        print(f"{path}: {len(prompts)} prompts, the first ones: {shown}")
    return prompts


def from_table(path, text):
    """[(where, prompt)] of a CSV or TSV file."""
    tab = path.suffix.lower() == ".tsv"
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tab else ",")
    header = [name.strip().lower() for name in next(rows, [])]
    wanted = [name for name in COLUMNS if name in header]
    if not wanted:
        raise UserError(f"--prompts {path}, line 1: no column named prompt or caption")
    column, found = header.index(wanted[0]), []
    try:
        for row in rows:
            where = f"line {rows.line_num}"
            if row and len(row) <= column:                # an empty line is no row
                raise UserError(f"--prompts {path}, {where}: the row has only {len(row)} columns")
            if row:
                found.append((where, row[column]))
    except csv.Error as error:
        raise UserError(f"--prompts {path}, line {rows.line_num}: {error}") from None
    return found


def from_json_or_text(path, text):
    """[(where, prompt)] of a file that is JSON as a whole, or else line by line."""
    whole, is_json = parse(text)
    if is_json:
        return from_value(path, "line 1", whole)
    found = []
    # A line ends at a newline and nowhere else; str.splitlines would know ten other ends.
    for number, line in enumerate(text.split("\n"), 1):
        where, line = f"line {number}", line.strip()
        value, is_json = parse(line)
        if is_json and isinstance(value, (str, list, dict)):
            found += from_value(path, where, value)
        elif line[:1] in ("{", "[") or line and path.suffix.lower() in (".json", ".jsonl"):
            raise UserError(f"--prompts {path}, {where}: not JSON, although it begins like it or "
                            "the file is named so")
        else:
            found.append((where, line))                   # the prompt as it stands
    return found


def parse(text):
    """(value, True) of JSON text, else (None, False)."""
    try:
        return json.loads(text), True
    except (ValueError, RecursionError):
        return None, False


def from_value(path, where, value):
    """[(where, prompt)] of a JSON value: a text, an object that has one, or a list of them."""
    if isinstance(value, str):
        return [(where, value)]
    if isinstance(value, list):
        found = []
        for number, entry in enumerate(value, 1):
            found += from_value(path, f"{where}, entry {number}", entry)
        return found
    if isinstance(value, dict):
        for key in (*COLUMNS, "annotations"):
            if key in value:
                return from_value(path, where, value[key])
    raise UserError(f"--prompts {path}, {where}: no text, and no object with \"prompt\" or "
                    "\"caption\"")
