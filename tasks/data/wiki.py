"""The fictional wiki of the miniature world, and claims that rest on its articles."""

import random

from tasks.data.world import Names

# kind of work -> what its maker did, and is called
KINDS = {
    "film": ("directed", "director"),
    "novel": ("written", "author"),
    "album": ("recorded", "singer"),
    "company": ("founded", "founder"),
}
JOBS = ("painter", "teacher", "farmer", "lawyer", "sailor", "singer", "baker", "doctor")
GOODS = ("salt", "wool", "wine", "glass", "paper", "honey", "iron", "tea")

# One letter a sort of thing, here and below: W work, P person, T town, R river, D district.
# Sentences are in two halves; every word of a "task" sentence occurs in some "pretrain" sentence.
ARTICLES = {
    "pretrain": {
        "work": (
            "{W} is a {kind} {made} by {P}.",
            "{W} is a {kind}. It was {made} by {P}.",
            "The {kind} {W} was {made} by {P}.",
            "The {maker} {P} has {made} the {kind} {W}.",
            "{P} is known as the {maker} of {W}.",
        ),
        "person": (
            "{P} is a {job} born in {T}.",
            "{P} is a {job} from the town {T}.",
            "{P} was born in {T} and is a {job}.",
            "The town {T} is the birthplace of the {job} {P}.",
            "From {T} comes the {job} {P}.",
        ),
        "town": (
            "{T} is a town on the river {R} in the district {D}.",
            "{T} is a town in {D}. It lies on the river {R}.",
            "The river {R} has on it the town {T}.",
        ),
        "river": (
            "{R} is a river that rises in the district {D}.",
            "The river {R} rises in {D}.",
            "In {D} rises the river {R}.",
        ),
        "district": (
            "{D} is a district known for its {goods}.",
            "The district {D} lives on {goods}.",
        ),
    },
    "task": {
        "work": (
            "{W} is the {kind} that was {made} by {P}.",
            "{P} is the {maker} of the {kind} {W}.",
        ),
        "person": (
            "The {job} {P} was born in the town {T}.",
            "{P}, born in {T}, is a {job}.",
        ),
        "town": (
            "The town {T} lies on the river {R} in {D}.",
            "{T} is the town on {R} in the district {D}.",
        ),
        "river": (
            "{R} rises in the district {D}.",
            "{R} is the river that rises in {D}.",
        ),
        "district": (
            "{D} is the district that lives on its {goods}.",
            "The district {D} is known for {goods}.",
        ),
    },
}

# The shapes of a claim: a chain over three articles (work, person, town) or over four (the river
# too), or a pair of works by people of one town, two articles each.
CHAIN_OF_3 = 3
CHAIN_OF_4 = 4
PAIR = 2

CLAIMS = {
    "pretrain": {
        CHAIN_OF_3: (
            "The {maker} of the {kind} {W} was born in a town on the river {R}.",
            "A town on the river {R} is the birthplace of the {maker} of {W}.",
            "The {kind} {W} was {made} by someone from a town on the river {R}.",
            "Someone from a town on the river {R} is known as the {maker} of {W}.",
        ),
        CHAIN_OF_4: (
            "The {maker} of the {kind} {W} was born in a town on a river that rises in {D}.",
            "The {kind} {W} was {made} by someone "
            "whose birthplace lies on a river that rises in {D}.",
            "A river that rises in {D} has on it the town where the {maker} of {W} was born.",
            "{W} is by someone who was born in a town on a river that rises in the district {D}.",
        ),
        PAIR: (
            "The {maker} of {W} and the {maker2} of {W2} were born in the same town.",
            "The {kind} {W} and the {kind2} {W2} are both by people from the same town.",
            "One town is the birthplace of the {maker} of the {kind} {W} "
            "and of the {maker2} of {W2}.",
            "Both {W} and {W2} are by people who were born in one town.",
        ),
    },
    "task": {
        CHAIN_OF_3: (
            "Someone born in a town on the river {R} was the {maker} of the {kind} {W}.",
            "The river {R} has on it the birthplace of the {maker} of the {kind} {W}.",
        ),
        CHAIN_OF_4: (
            "Someone whose birthplace lies on a river that rises in the district {D} "
            "is the {maker} of {W}.",
            "The {maker} of the {kind} {W} was born where a river that rises in {D} "
            "has a town on it.",
        ),
        PAIR: (
            "Both the {maker} of {W} and the {maker2} of the {kind2} {W2} are from one town.",
            "The {maker} of the {kind} {W} comes from the same town as the {maker2} of {W2}.",
        ),
    },
}


class Wiki:
    """A wiki of `size` articles in one half's names and sentences, and claims about it.

    `articles` maps title to text.
    """

    def __init__(self, rng: random.Random, half: str, size: int = 2000):
        self.rng = rng
        self.half = half
        names = Names(rng, half)

        def titles(share: float) -> list[str]:
            return [names() for _ in range(max(2, round(size * share)))]

        districts = titles(0.03)
        rivers = titles(0.05)
        towns = titles(0.12)
        people = titles(0.40)
        works = titles(0.40)

        # what is true
        self.rises = {R: rng.choice(districts) for R in rivers}
        self.lies = {T: (rng.choice(rivers), rng.choice(districts)) for T in towns}
        self.born = {P: rng.choice(towns) for P in people}
        self.made = {W: (rng.choice(list(KINDS)), rng.choice(people)) for W in works}
        self.works_from: dict[str, list[str]] = {T: [] for T in towns}
        for W in works:
            self.works_from[self.born[self.maker(W)]].append(W)

        # and what the wiki says of it
        self.articles: dict[str, str] = {}
        for D in districts:
            self._write("district", D, D=D, goods=rng.choice(GOODS))
        for R in rivers:
            self._write("river", R, R=R, D=self.rises[R])
        for T in towns:
            river, district = self.lies[T]
            self._write("town", T, T=T, R=river, D=district)
        for P in people:
            self._write("person", P, P=P, T=self.born[P], job=rng.choice(JOBS))
        for W in works:
            self._write("work", W, W=W, P=self.maker(W), **self._kind(W))

        # works that a claim is about
        self.used: set[str] = set()

    def maker(self, W: str) -> str:
        _, maker = self.made[W]
        return maker

    def _write(self, sort: str, title: str, **values: str) -> None:
        words = self.rng.choice(ARTICLES[self.half][sort]).split()
        # pretraining is to find names in any sentence
        if self.half == "pretrain" and self.rng.random() < 0.3:
            self.rng.shuffle(words)
        self.articles[title] = " ".join(words).format(**values)

    def _kind(self, W: str, mark: str = "") -> dict[str, str]:
        """What sentences say of a work; `mark` tells the second of a pair from the first."""
        kind, _ = self.made[W]
        made, maker = KINDS[kind]
        return {f"kind{mark}": kind, f"made{mark}": made, f"maker{mark}": maker}

    def claim(self) -> dict:
        """Half chains over three articles, a quarter over four, a quarter pairs of works.

        Each work is used once. Returns {"claim", "titles" (in the order in which they can be
        found), "named" (what the claim says by name)}.
        """
        while True:
            shape = self.rng.choice((CHAIN_OF_3, CHAIN_OF_3, CHAIN_OF_4, PAIR))
            W = self.rng.choice(list(self.made))
            P = self.maker(W)
            T = self.born[P]
            R, _ = self.lies[T]
            D = self.rises[R]
            partners = [w for w in self.works_from[T] if self.maker(w) != P and w not in self.used]
            if W not in self.used and (shape != PAIR or partners):
                break
        self.used.add(W)
        values = {"W": W, "R": R, "D": D, **self._kind(W)}
        if shape == PAIR:
            W2 = self.rng.choice(partners)
            self.used.add(W2)
            values |= {"W2": W2, **self._kind(W2, "2")}
            titles = [W, W2, P, self.maker(W2)]
            named = [W, W2]
        elif shape == CHAIN_OF_4:
            titles = [W, P, T, R]
            named = [W, D]
        else:
            titles = [W, P, T]
            named = [W, R]
        sentence = self.rng.choice(CLAIMS[self.half][shape]).format(**values)
        return {"claim": sentence, "titles": titles, "named": named}
