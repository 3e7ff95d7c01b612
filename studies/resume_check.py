"""A run that is killed again and again ends with the weights of one that was not, bit for bit: `make resume-check`.

Trains a small program twice from the same start: once in peace, once killed with SIGKILL at random moments (while it
samples, updates, evaluates or saves) and started again with the same command, until it has been killed KILLS times.

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
    flags = {"task": "banking77", "steps": STEPS, "examples": 2, "rollouts": 4, "eval-every": 1, "eval-examples": 4, "out": out, "seed": 3}
    return [sys.executable, str(ROOT / "mmgrpo.py"), "train", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]


def same(a: Path, b: Path) -> bool:
    """The weights and the state, byte for byte; the metrics but for the seconds."""
    def metrics(out):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [json.loads(json.dumps(m), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"}) for m in lines]
    files = ["last/model.safetensors", "best/model.safetensors", f"state-{STEPS:07d}/state.safetensors"]
    return all((a / f).read_bytes() == (b / f).read_bytes() for f in files) and metrics(a) == metrics(b)


def main(kills: int) -> int:
    rng, left, runs, failed = random.Random(0), kills, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        peace, war = Path(folder) / "peace", Path(folder) / "war"
        began = time.perf_counter()
        subprocess.run(command(peace), check=True, capture_output=True)
        whole = time.perf_counter() - began
        while left:
            shutil.rmtree(war, ignore_errors=True)
            runs += 1
            while True:                                     # until a start survives to the end
                process = subprocess.Popen(command(war), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                try:
                    _, error = process.communicate(timeout=rng.uniform(0, whole) if left else None)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    left -= 1
                    continue
                if process.returncode and "finished at step" not in error:      # killed after its last save: nothing is left to do
                    print(error, file=sys.stderr)
                    return 1
                break
            failed += not same(peace, war)
            print(f"run {runs}: {kills - left} kills so far; {'bit for bit the same' if same(peace, war) else 'DIFFERENT'}", flush=True)
    print(f"{runs - failed} passed, {failed} failed ({kills} kills)")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 50))
