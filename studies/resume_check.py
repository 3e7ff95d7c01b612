"""A run that is killed again and again ends with the weights of one that was not, bit for bit.

`make resume-check` trains a small program twice from the same start: once in peace, once killed
with SIGKILL at random moments (while it samples, updates, evaluates or saves) and started again
with the same command, until it has been killed KILLS times.

    python -m studies.resume_check [KILLS]        # default 50
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12


def command(out: Path) -> list[str]:
    options = {
        "task": "banking77",
        "steps": STEPS,
        "examples": 2,
        "rollouts": 4,
        "eval-every": 1,
        "eval-examples": 4,
        "out": out,
        "seed": 3,
    }
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", str(value)]
    return [sys.executable, str(ROOT / "mmgrpo.py"), "train", *flags]


def without_seconds(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name != "seconds"}


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, but for the seconds."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, object_hook=without_seconds) for line in lines]


def same(a: Path, b: Path) -> bool:
    """The weights and the state, byte for byte; the metrics but for the seconds."""
    files = [
        "last/model.safetensors",
        "best/model.safetensors",
        f"state-{STEPS:07d}/state.safetensors",
    ]
    alike = all((a / file).read_bytes() == (b / file).read_bytes() for file in files)
    return alike and metrics(a) == metrics(b)


def main(kills: int) -> int:
    rng = random.Random(0)
    left = kills
    runs = 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        peace = Path(folder) / "peace"
        war = Path(folder) / "war"
        began = time.perf_counter()
        subprocess.run(command(peace), check=True, capture_output=True)
        whole = time.perf_counter() - began
        while left:
            shutil.rmtree(war, ignore_errors=True)
            runs += 1
            # until a start survives to the end
            while True:
                process = subprocess.Popen(
                    command(war), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
                try:
                    _, error = process.communicate(timeout=rng.uniform(0, whole) if left else None)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    left -= 1
                    continue
                # one that was killed after its last save has nothing left to do, and says so
                if process.returncode and "finished at step" not in error:
                    print(error, file=sys.stderr)
                    return 1
                break
            alike = same(peace, war)
            failed += not alike
            verdict = "bit for bit the same" if alike else "DIFFERENT"
            print(f"run {runs}: {kills - left} kills so far; {verdict}", flush=True)
    print(f"{runs - failed} passed, {failed} failed ({kills} kills)")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 50))
