"""The demo's corpus: short English rewriting and knowledge tasks, made from a seed.

Every answer is a function of its prompt, so exact match is a fair score. What a model has to know is spread over a
lexicon: past tenses, participles, plurals, opposites, and who does what where. A few rows with references cannot show
all of it; a teacher's judgment on many prompts can. That gap is what the demo measures.

Randomness is ``random.Random(seed)`` over ordered tables only: the same seed gives the same corpus in every process.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

from megadistill.errors import DataError


class Verb(NamedTuple):
    """Four forms of a verb."""

    base: str
    third: str
    past: str
    participle: str


class Trade(NamedTuple):
    """Who does what where."""

    person: str
    people: str
    verb: Verb
    product: str
    place: str


def _verbs(table: str) -> list[Verb]:
    return [Verb(*line.split()) for line in table.strip().splitlines()]


VERBS = _verbs("""
    carry carries carried carried
    wash washes washed washed
    hide hides hid hidden
    find finds found found
    buy buys bought bought
    bring brings brought brought
    lose loses lost lost
    see sees saw seen
    hold holds held held
    keep keeps kept kept
    break breaks broke broken
    choose chooses chose chosen
    steal steals stole stolen
    draw draws drew drawn
    send sends sent sent
    take takes took taken
    forget forgets forgot forgotten
    drop drops dropped dropped
    give gives gave given
    throw throws threw thrown
""")

_TRADES = """
    baker bakers | bake bakes baked baked | bread | in the bakery
    farmer farmers | grow grows grew grown | corn | on the farm
    pilot pilots | fly flies flew flown | planes | over the clouds
    teacher teachers | teach teaches taught taught | grammar | at the school
    doctor doctors | heal heals healed healed | patients | at the hospital
    fisherman fishermen | catch catches caught caught | trout | on the lake
    tailor tailors | sew sews sewed sewn | coats | in the workshop
    writer writers | write writes wrote written | novels | in the attic
    singer singers | sing sings sang sung | ballads | on the stage
    driver drivers | drive drives drove driven | trucks | on the road
    potter potters | shape shapes shaped shaped | clay | by the kiln
    waiter waiters | serve serves served served | dinner | in the restaurant
    banker bankers | lend lends lent lent | money | at the bank
    soldier soldiers | guard guards guarded guarded | gates | at the castle
    builder builders | build builds built built | houses | in the suburb
    postman postmen | deliver delivers delivered delivered | parcels | along the street
    florist florists | sell sells sold sold | roses | at the market
    barber barbers | cut cuts cut cut | hair | in the salon
    painter painters | paint paints painted painted | portraits | in the studio
    shepherd shepherds | feed feeds fed fed | sheep | on the meadow
    cook cooks | boil boils boiled boiled | soup | in the kitchen
    king kings | wear wears wore worn | crowns | in the palace
    thief thieves | rob robs robbed robbed | travellers | in the alley
    sailor sailors | steer steers steered steered | ships | on the sea
"""


def _trades(table: str) -> list[Trade]:
    trades = []
    for line in table.strip().splitlines():
        names, verb, product, place = (cell.strip() for cell in line.split("|"))
        person, people = names.split()
        trades.append(Trade(person, people, Verb(*verb.split()), product, place))
    return trades


TRADES = _trades(_TRADES)


def _list(table: str) -> list[str]:
    return [cell.strip() for cell in table.split("|")]


OPPOSITES = [
    pair.split("/")
    for pair in _list(
        "old/young | tall/short | rich/poor | happy/sad | brave/timid | strong/weak | kind/cruel | loud/quiet | "
        "lazy/busy | clever/foolish | polite/rude | famous/unknown"
    )
]
OPPOSITE = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
ADJECTIVES = sorted(OPPOSITE)
COLORS = _list("red | blue | green | black | white | yellow | golden | silver | wooden | heavy")
OBJECTS = _list(
    "basket | letter | lamp | bottle | ladder | box | key | map | drum | chair | coin | mirror | blanket | candle | "
    "hammer | bucket | clock | ring | book | flag"
)
PLACES = _list(
    "near the river | in the garden | behind the church | at the station | in the cave | under the bridge | "
    "beside the tower | on the island"
)
TIMES = _list(
    "at dawn | at noon | at midnight | after lunch | before supper | during the storm | in the winter | on Monday"
)


class Clause(NamedTuple):
    """One sentence before it is put into words; ``tail`` is its place or time."""

    adjective: str
    trade: Trade
    verb: Verb
    color: str
    thing: str
    tail: str

    @property
    def subject(self) -> str:
        """The singular subject with its article."""
        return _join("the", self.adjective, self.trade.person)

    @property
    def subjects(self) -> str:
        """The plural subject with its article."""
        return _join("the", self.adjective, self.trade.people)

    @property
    def object(self) -> str:
        """The object with its article."""
        return _join("the", self.color, self.thing)


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _sentence(*words: str, mark: str = ".") -> str:
    text = _join(*words)
    return text[0].upper() + text[1:] + mark


def _clause(rng: Random) -> Clause:
    return Clause(
        adjective=rng.choice(ADJECTIVES),
        trade=rng.choice(TRADES),
        verb=rng.choice(VERBS),
        color=rng.choice(COLORS),
        thing=rng.choice(OBJECTS),
        tail=rng.choice(PLACES + TIMES),
    )


def _present(c: Clause) -> str:
    return _sentence(c.subject, c.verb.third, c.object, c.tail)


def _past(rng: Random) -> tuple[str, str]:
    c = _clause(rng)
    return _present(c), _sentence(c.subject, c.verb.past, c.object, c.tail)


def _negative(rng: Random) -> tuple[str, str]:
    c = _clause(rng)
    return _present(c), _sentence(c.subject, "does not", c.verb.base, c.object, c.tail)


def _question(rng: Random) -> tuple[str, str]:
    c = _clause(rng)
    return _present(c), _sentence("does", c.subject, c.verb.base, c.object, c.tail, mark="?")


def _plural(rng: Random) -> tuple[str, str]:
    c = _clause(rng)
    return _present(c), _sentence(c.subjects, c.verb.base, c.object, c.tail)


def _opposite(rng: Random) -> tuple[str, str]:
    c = _clause(rng)
    return _present(c), _present(c._replace(adjective=OPPOSITE[c.adjective]))


def _passive(rng: Random) -> tuple[str, str]:
    c = _clause(rng)
    return _present(c), _sentence(c.object, "is", c.verb.participle, "by", c.subject, c.tail)


def _work(rng: Random) -> tuple[str, str]:
    adjective, trade, when = rng.choice(ADJECTIVES), rng.choice(TRADES), rng.choice(TIMES)
    answer = _sentence(when, "the", adjective, trade.person, trade.verb.third, trade.product, trade.place)
    return f"{trade.person}, {adjective}, {when}", answer


def _correction(rng: Random) -> tuple[str, str]:
    trade, other = rng.sample(TRADES, 2)
    subject, when = _join("the", rng.choice(ADJECTIVES), trade.person), rng.choice(TIMES)
    wrong = _sentence(subject, other.verb.third, other.product, other.place, when)
    return wrong, _sentence(subject, trade.verb.third, trade.product, trade.place, when)


KINDS: dict[str, tuple[Callable[[Random], tuple[str, str]], list[str]]] = {
    "past": (_past, ["Put the sentence into the past tense.", "Tell the same story as if it happened yesterday."]),
    "negative": (_negative, ["Make the sentence negative.", "Say that this is not so."]),
    "question": (_question, ["Turn the statement into a question.", "Ask whether this is true."]),
    "plural": (_plural, ["Put the subject into the plural.", "Rewrite the sentence for several people."]),
    "opposite": (
        _opposite,
        ["Describe the person with the opposite adjective.", "Say it about the opposite kind of person."],
    ),
    "passive": (_passive, ["Put the sentence into the passive voice.", "Begin the sentence with the object."]),
    "work": (_work, ["Write a sentence about the work of this person.", "Say what this person does and where."]),
    "correction": (
        _correction,
        ["Correct the false statement about the work of this person.", "Say what this person really does."],
    ),
}


MAX_MISSES = 1000  # consecutive draws of known prompts after which a kind counts as exhausted


@dataclass(frozen=True)
class CorpusSizes:
    """Rows of each split: all have outputs but ``prompts``; ``valid`` and ``test`` are held out."""

    teacher: int = 8000
    references: int = 128
    prompts: int = 6000
    valid: int = 128
    test: int = 160


def generate_corpus(seed: int, sizes: CorpusSizes) -> dict[str, list[dict[str, str]]]:
    """Rows {"instruction", "input", "output"} by split, every kind of task equally often.

    No task has the same input twice, within a split or across splits, however its instruction is worded.

    Returns:
        teacher_train, train (rows with references for the student), prompts (the output is empty), valid, test.

    Raises:
        DataError: The grammar cannot give that many different prompts.
    """
    # The held-out splits come first, so that they stay the same when the training splits change in size.
    counts = {
        "test": sizes.test,
        "valid": sizes.valid,
        "train": sizes.references,
        "prompts": sizes.prompts,
        "teacher_train": sizes.teacher,
    }
    rng = Random(seed)
    seen: set[tuple[str, str]] = set()
    return {key: _split(rng, key, count, seen) for key, count in counts.items()}


def _split(rng: Random, key: str, count: int, seen: set[tuple[str, str]]) -> list[dict[str, str]]:
    if count < 0:
        raise DataError(f"synthetic corpus: {key} needs at least 0 rows, got {count}")
    kinds = list(KINDS)
    rows: list[dict[str, str]] = []
    misses = 0
    while len(rows) < count:
        kind = kinds[len(rows) % len(kinds)]
        make, instructions = KINDS[kind]
        prompt, answer = make(rng)
        if (kind, prompt) in seen:
            misses += 1
            if misses > MAX_MISSES:
                raise DataError(
                    f"synthetic corpus: no new prompts of kind {kind!r} after {len(rows)} of {count} {key} rows"
                )
            continue
        misses = 0
        seen.add((kind, prompt))
        output = "" if key == "prompts" else answer
        rows.append({"instruction": rng.choice(instructions), "input": prompt, "output": output})
    rng.shuffle(rows)
    return rows


def write_corpus(folder: str | Path, corpus: dict[str, list[dict[str, str]]]) -> None:
    """Writes ``FOLDER/KEY.jsonl`` for each split, one row a line."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for key, rows in corpus.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{key}.jsonl").write_text("".join(lines), encoding="utf-8")
