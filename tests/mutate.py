"""Does each law bite? `make mutants` breaks the line that guards a law, and looks for the test that turns red.

A mutant is a small diff in tests/mutants/, named by its law; the lines above the diff have the law in
words and the test files that must not pass any more. It is tried on a copy: the tree stays as it is.

    make mutants                            # all of them, two at a time
    make mutants ARGS="sampler entropy"     # those whose law has one of these words
    make mutants ARGS="--since HEAD~3"      # those of files that changed since a commit
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "mutants"
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "models", "__pycache__", "*.egg-info", "results")
SECONDS = 900  # that the tests of one mutant may take


@dataclass(frozen=True)
class Mutant:
    """Example: Mutant("the end token is trained", ("loss",), "mmgrpo.py", Path("…/the-end-token.diff"))"""

    law: str
    tests: tuple[str, ...]  # loss is tests/test_loss.py
    file: str  # that it changes
    diff: Path


def read(path: Path) -> Mutant:
    """A diff with its two lines of header. Raises ValueError where it has none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    law, tests, _, changed = (line.partition(" ") for line in lines[:4])
    if (law[0], tests[0], changed[0]) != ("law:", "tests:", "+++"):
        raise ValueError(f"{path}: expected two lines, `law: …` and `tests: …`, above a diff")
    return Mutant(law[2], tuple(tests[2].split()), changed[2].removeprefix("b/"), path)


def mutants() -> list[Mutant]:
    return [read(path) for path in sorted(FOLDER.glob("*.diff"))]


def apply(mutant: Mutant, tree: Path, check: bool = False) -> str:
    """Break the law in a tree, or only see whether that can be done -> "", or why it cannot."""
    command = ["git", "apply", *(["--check"] if check else []), str(mutant.diff)]
    # away from any repository: there, git would leave out what the repository does not know
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    return done.stderr.strip()


def survives(mutant: Mutant) -> str:
    """Why no test turns red, or "" where one does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        if wrong := apply(mutant, copy):
            return wrong
        files = [f"tests/test_{name}.py" for name in mutant.tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
        # a counterexample need not be a small one
        environment = os.environ | {"HYPOTHESIS_PROFILE": "mutants"}
        done = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, timeout=SECONDS, env=environment
        )
        return "" if done.returncode == 1 else f"survives (pytest ended with {done.returncode})"


def changed_since(commit: str) -> set[str]:
    command = ["git", "diff", "--name-only", commit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def chosen(words: list[str], since: str) -> list[Mutant]:
    """The mutants whose law has one of the words, and whose file or diff changed since a commit."""
    found = mutants()
    if words:
        found = [m for m in found if any(word in m.law for word in words)]
    if since:
        changed = changed_since(since)
        diff_of = {m: str(m.diff.relative_to(ROOT)) for m in found}
        found = [m for m in found if m.file in changed or diff_of[m] in changed]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="of the laws to try; none: all")
    parser.add_argument("--since", default="", help="only those of files that changed since then")
    parser.add_argument("--jobs", type=int, default=2, help="at a time [2]")
    given = parser.parse_args()
    tried = chosen(given.words, given.since)
    failed = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for mutant, wrong in zip(tried, pool.map(survives, tried)):
            failed += bool(wrong)
            verdict = "SURVIVES" if wrong else "red     "
            print(f"{verdict}  {mutant.law}" + (f": {wrong}" if wrong else ""), flush=True)
    print(f"{len(tried) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
