"""Rows of published data files, checked one by one: an error names the file, the line and the field."""
import csv
import json
from pathlib import Path
from typing import Callable

from program import InputError


def read_rows(path: Path, fields: dict[str, Callable]) -> list[dict]:
    """The rows of a .jsonl, .json (a list of objects) or .csv file. fields[name](value) says whether a field is good.

    Raises InputError naming the file, the line (or the entry) and the field.
    """
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for where, row in _READERS[path.suffix](file):
                for name, good in fields.items():
                    if not isinstance(row, dict) or name not in row or not good(row[name]):
                        found = f"found {str(row[name])[:60]!r}" if isinstance(row, dict) and name in row else "missing"
                        raise InputError(f"{path}:{where}: {name}: {found}")
                rows.append(row)
    except (OSError, csv.Error, RecursionError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    except ValueError as e:
        raise e if isinstance(e, InputError) else InputError(f"{path}:{len(rows) + 1}: cannot be read ({e})") from None
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def _jsonl(file):
    for line, text in enumerate(file, 1):
        if text.strip():
            yield line, json.loads(text)


def _json(file):
    data = json.load(file)
    return [(f"entry {i}", row) for i, row in enumerate(data)] if isinstance(data, list) else [("entry 0", data)]


def _csv(file):
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        yield reader.line_num, {k: v or "" for k, v in row.items() if k is not None} if None not in row else None


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}


# Defaults of the real editions, for LMs that others trained. An unreadable run earns no less than a wrong one: where any label
# beats none, the label that is likeliest grows until all runs are alike (a warm start teaches the format instead). One standard
# deviation for the whole step, and a wide upper clip, for groups are often nearly equal and right answers unlikely.
REAL = {"examples": 4, "temperature": 0.6, "scale_rewards": "batch", "clip_high": 0.28,
        "format_failure_score": 0.0}


def text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def splits(folder: Path, examples: list[dict], train: int, dev: int, test: int) -> tuple[list[dict], list[dict], list[dict]]:
    """Disjoint splits of at most these sizes, smaller in proportion where there are fewer examples."""
    share = min(1.0, len(examples) / (train + dev + test))
    a, b, c = (max(1, int(n * share)) for n in (train, dev, test))
    if len(examples) < a + b + c:
        raise InputError(f"{folder}: {len(examples)} examples are too few for three splits")
    return examples[:a], examples[a:a + b], examples[a + b:a + b + c]
