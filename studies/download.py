"""Download the published data into a folder: `make data`, to DATA or data/.

What is there already and whole stays. Where there is no network, it says which files to put where.
A file's sha256 is checked where it is known; else only that it can be read, by the task itself.
"""

import hashlib
import json
import sys
import tarfile
from pathlib import Path

import httpx
from tqdm import tqdm

BANKING = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data/"
PUPA = "https://raw.githubusercontent.com/Columbia-NLP-Lab/PAPILLON/main/pupa/"
HOVER = "https://raw.githubusercontent.com/hover-nlp/hover/main/data/hover/"

# file: (address, size in bytes, sha256), the last two where known
FILES = {
    "banking77/train.csv": (
        BANKING + "train.csv",
        839073,
        "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    ),
    "banking77/categories.json": (
        BANKING + "categories.json",
        2036,
        "53261da888122daf2d120d925458631d9619e15d82e56052e7a42e535ce32b63",
    ),
    "pupa/PUPA_New.csv": (
        PUPA + "PUPA_New.csv",
        2854027,
        "72d7659c717706bc987f0d296d9714f63db5e75c6645376ec75380e6638b8f91",
    ),
    "hover/hover_train_release_v1.1.json": (
        HOVER + "hover_train_release_v1.1.json",
        None,
        None,
    ),
    "hover/wiki.abstracts.2017.tar.gz": (
        "https://huggingface.co/dspy/cache/resolve/main/wiki.abstracts.2017.tar.gz",
        None,
        None,
    ),
}


def whole(path: Path, size: int | None, digest: str | None) -> bool:
    """Whether the file is there as published."""
    if not path.is_file() or size not in (None, path.stat().st_size):
        return False
    with path.open("rb") as file:
        return digest in (None, hashlib.file_digest(file, "sha256").hexdigest())


def download(folder: Path, files: dict = FILES) -> list[str]:
    """Fetch what is missing -> a line for each file that could not be had."""
    failed = []
    for name, (address, size, digest) in files.items():
        path = folder / name
        if whole(path, size, digest):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        part = folder / f"{name}.part"
        try:
            fetch(address, part, name, size)
            if not whole(part, size, digest):
                raise ValueError(
                    f"not as published: expected {size} bytes, sha256 {digest}, "
                    f"found {part.stat().st_size} bytes"
                )
            part.replace(path)
        except (httpx.HTTPError, OSError, ValueError) as e:
            failed.append(f"{path}: {type(e).__name__}: {e}; put there what is at {address}")

    archive = folder / "hover" / "wiki.abstracts.2017.tar.gz"
    corpus = folder / "hover" / "corpus.jsonl"
    if archive.is_file() and not corpus.is_file():
        try:
            unpack(archive, corpus)
        except (tarfile.TarError, OSError, StopIteration, ValueError, LookupError, TypeError) as e:
            # to be had again
            archive.unlink()
            address = files["hover/wiki.abstracts.2017.tar.gz"][0]
            failed.append(f"{archive}: {type(e).__name__}: {e}; put there what is at {address}")
    return failed


def fetch(address: str, part: Path, name: str, size: int | None) -> None:
    """Download to `part`, with a bar called `name`."""
    request = httpx.stream("GET", address, follow_redirects=True, timeout=30)
    with request as answer, part.open("wb") as file:
        answer.raise_for_status()
        total = int(answer.headers.get("content-length", 0)) or size
        with tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=None) as bar:
            for block in answer.iter_bytes():
                file.write(block)
                bar.update(len(block))


def unpack(archive: Path, corpus: Path) -> None:
    """The archive's one jsonl of titles and texts -> corpus.jsonl, whose lines the task reads."""
    part = corpus.with_suffix(".part")
    with tarfile.open(archive) as tar, part.open("wb") as out:
        member = next(m for m in tar if m.isfile() and m.name.endswith(".jsonl"))
        lines = tar.extractfile(member)
        bar = tqdm(lines, desc=corpus.name, unit=" articles", unit_scale=True, disable=None)
        for line in bar:
            row = json.loads(line)
            # its text is a list of sentences
            text = " ".join(row["text"]) or row["title"]
            out.write(json.dumps({"title": row["title"], "text": text}).encode() + b"\n")
    part.replace(corpus)


if __name__ == "__main__":
    if lines := download(Path(sys.argv[1] if sys.argv[1:] else "data")):
        sys.exit("error: not all could be had\n" + "\n".join(lines))
