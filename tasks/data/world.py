"""Names of the miniature world: two invented words each, in two halves that share no name.

The tiny LM's pretraining text is written with names of the half "pretrain", the tasks' train, dev
and test examples with names of the half "task": it knows every word, and none of the names it will
meet.
"""

import random
import zlib

CONSONANTS = "bdfghjklmnprstvz"
VOWELS = "aeiou"
ENDINGS = "klmnr"


def _word(rng: random.Random) -> str:
    """A pronounceable word of five letters. Example: Bafek"""
    first = rng.choice(CONSONANTS.upper()) + rng.choice(VOWELS)
    second = rng.choice(CONSONANTS) + rng.choice(VOWELS)
    return first + second + rng.choice(ENDINGS)


def _words(count: int = 500) -> list[str]:
    """Different words, the same ones always."""
    rng = random.Random("words")
    found: list[str] = []
    while len(found) < count:
        word = _word(rng)
        if word not in found:
            found.append(word)
    return found


WORDS = _words()


def half_of(name: str) -> str:
    """Which half of the world a name belongs to: a property of the name alone."""
    return "task" if zlib.crc32(name.encode()) % 10 < 4 else "pretrain"


class Names:
    """A supply of names of one half, each given once."""

    def __init__(self, rng: random.Random, half: str):
        self.rng = rng
        self.half = half
        self.given: set[str] = set()

    def __call__(self) -> str:
        while True:
            name = " ".join(self.rng.sample(WORDS, 2))
            if half_of(name) == self.half and name not in self.given:
                self.given.add(name)
                return name
