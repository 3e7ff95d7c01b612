"""Published data: rows that are checked one by one, splits, and defaults for training on them."""

import csv
import json
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, TextIO

from program import InputError

# Defaults of the real editions, for LMs that others trained.
REAL_DEFAULTS = {
    "examples": 4,
    "temperature": 0.6,
    # One standard deviation for the whole step, and a wide upper clip: groups are often nearly
    # equal, and right answers unlikely.
    "scale_rewards": "batch",
    "clip_high": 0.28,
    # An unreadable run earns no less than a wrong one: where any label beats none, the label that
    # is likeliest grows until all runs are alike. A warm start teaches the format instead.
    "format_failure_score": 0.0,
    # Where right answers are rare, a step without any is no reason to give up.
    "patience": 25,
}


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def splits(
    folder: Path, examples: list[dict], train: int, dev: int, test: int
) -> tuple[list[dict], list[dict], list[dict]]:
    """Disjoint splits of at most these sizes, smaller in proportion where examples are fewer.

    Raises InputError naming the folder where there are too few.
    """
    share = min(1.0, len(examples) / (train + dev + test))
    train, dev, test = (max(1, int(size * share)) for size in (train, dev, test))
    if len(examples) < train + dev + test:
        raise InputError(f"{folder}: {len(examples)} examples are too few for three splits")
    dev_end = train + dev
    return examples[:train], examples[train:dev_end], examples[dev_end : dev_end + test]


# --------------------------------------------------------------------------------------------- rows
def _jsonl(file: TextIO) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            yield line, json.loads(text)
        except ValueError as e:
            raise InputError(f"{file.name}:{line}: cannot be read ({e})") from None


def _json(file: TextIO) -> Iterator[tuple[str, Any]]:
    data = json.load(file)
    rows = data if isinstance(data, list) else [data]
    for i, row in enumerate(rows):
        yield f"entry {i}", row


def _csv(file: TextIO) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        # fields beyond those of the header stand under None
        is_row = None not in row
        yield reader.line_num, {k: v or "" for k, v in row.items()} if is_row else None


# the end of a file's name -> its rows, each with the place that an error names
_READERS: dict[str, Callable[[TextIO], Iterable[tuple]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
}


def _check(where: str, row: Any, fields: dict[str, Callable[[Any], bool]]) -> None:
    for name, is_good in fields.items():
        if not isinstance(row, dict) or name not in row:
            raise InputError(f"{where}: {name}: missing")
        if not is_good(row[name]):
            raise InputError(f"{where}: {name}: found {str(row[name])[:60]!r}")


def read_rows(path: Path, fields: dict[str, Callable[[Any], bool]]) -> list[dict]:
    """The rows of a .jsonl, .json (a list of objects) or .csv file.

    fields[name](value) says whether a field is good. Raises InputError naming the file, the line
    (or the entry) and the field.
    """
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for place, row in _READERS[path.suffix](file):
                _check(f"{path}:{place}", row, fields)
                rows.append(row)
    except InputError:
        raise
    # ValueError: bytes that are no text, or a .json file that is no JSON
    except (OSError, csv.Error, RecursionError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows
