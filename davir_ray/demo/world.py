"""The demo's data: a small world whose truth is known, a corpus that teaches half of it, instructions of four classes.

Every person of the world has a fixed home, and a fixed place where they are on Sundays. On other days anybody may be
anywhere. The base is pre-trained on questions about homes and about the other days, never about Sundays. So it knows
the form of every answer in the set, has learned that answers about a day are unpredictable, and knows the homes.

    class             asks about    places in the answer     left for a fine-tune to learn
    known             home          true                     nothing
    learnable         Sunday        true                     a place for each person, met in many rows
    noise             home, Sunday  another noisy row's      nothing but the row itself
    noise_duplicates  home, Sunday  as noise, 10 copies      the row itself, ten times an epoch

Why the generator is as it is:

- All classes have the same wording and the same distributions of length and of places, so that only the pairing of
  prompt and answer distinguishes them. Each place belongs to equally many people: no answer is likelier than another.
- The people of a prompt are drawn independently. If an answer were the six places of one person's day, a shuffled
  answer would still be somebody's day, a pattern that a fine-tune can learn.
- An answer repeats the people of *its own* prompt; only the places are shuffled. If it repeated those of the other
  prompt, each place would be paired with its true person, and noise would teach the truth. Repeating also puts the
  person next to the place, which a model of this size learns in seconds; without it, a minute of training was not
  enough.
- A share of the answers about homes in the corpus is wrong (WRONG_SHARE), as in any real corpus. A base that has never
  seen an error gives it almost no probability (10.7 nats per person against 6.6), and a fine-tune on a noisy set then
  improves on noise merely by learning that errors exist: after one epoch the mean davir of noise about homes was 0.52
  with WRONG_SHARE 0 and 0.22 with 0.1, that of the learnable rows 0.61 and 0.58.
- The pre-training must last until the base can look up places. With a shorter one, the homes, which the base was about
  to learn anyway, and the duplicated noise rank first (seen with an earlier generator).

- Duplicated noise shows what a reference memorises. Each row is there 10 times, so that the demo's 3 epochs are enough
  to see it; with 5 copies, in a world of 40 people and 3,000 rows, it took 8 (0 to 3 % of the selection after 3 epochs,
  35 to 46 % after 8).
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

PlantedClass = Literal["known", "learnable", "noise", "noise_duplicates"]
Subject = Literal["home", "sunday"]
CLASSES: tuple[PlantedClass, ...] = ("known", "learnable", "noise", "noise_duplicates")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words("""
    Adam Agnes Albert Alice Anna Arthur Astrid Basil Bertha Boris Bruno Clara Conrad Cora Daniel Daphne Edgar Edith
    Elias Elsa
""")
PLACES = _words("""
    mill harbour castle bakery library forest bridge market chapel garden school station tower orchard quarry stable
    theatre vineyard meadow lighthouse
""")
ORDINALS = ("First", "second", "third", "fourth", "fifth", "sixth")
MAX_PEOPLE = len(ORDINALS)
# Drawn for each person and thus unpredictable, so that the loss of a known answer stays well above 0.
PREPOSITIONS = ("at", "near", "behind")
HOME_QUESTIONS = (
    "Where does each of these people live?",
    "Please say where the home of each person is.",
    "What is the home of each of these people?",
)
DAY_QUESTIONS = (
    "Where is each of these people on {day}?",
    "Please say where each person is on {day}.",
    "What is the place of each of these people on {day}?",
)
SUNDAYS = "Sundays"
OTHER_DAYS = ("Saturdays", "holidays", "market days", "rainy days")
STATES = ("open", "closed", "busy", "quiet")

WRONG_SHARE = 0.1
"""Share of the answers about homes in the pre-training texts whose places are those of other people."""
HOME_SHARE, DAY_SHARE, ROLL_SHARE = 0.55, 0.3, 0.1
"""Shares of the pre-training texts that ask about homes, ask about other days, and call the roll. The rest are single
sentences. The roll calls teach the base to look a person up by ordinal; without them the base of seed 1 got stuck at
2.6 nats per person on known answers."""
NUM_PRETRAINING_TEXTS = 6_000

NUM_KNOWN = 420
NUM_LEARNABLE = 300
NUM_NOISE = 360
NUM_DUPLICATED = 12
"""Number of distinct rows of the class noise_duplicates; each occurs NUM_COPIES times."""
NUM_COPIES = 10

TOP_FRACTION = 0.2
"""Share of the set that is selected. The learnable class is a quarter of the set, so a perfect score could fill the
selection from it. Fixed before any result was seen."""


@dataclass(frozen=True)
class World:
    """The truth: a place for each person."""

    home: dict[str, str]
    sunday: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class InstructionRow:
    """One row of the instruction set, with the truth that the scoring does not see."""

    prompt: str
    response: str
    planted_class: PlantedClass
    subject: Subject
    people: tuple[str, ...]
    answer: tuple[str, ...]
    """The places that the response gives."""
    truth: tuple[str, ...]
    """The true places."""


def make_world(seed: int) -> World:
    """Give every person a home and a place for Sundays; each place is given to equally many people."""
    draw = random.Random(f"world {seed}")
    return World(home=_assign_places(draw), sunday=_assign_places(draw))


def pretraining_texts(seed: int, num_texts: int = NUM_PRETRAINING_TEXTS) -> list[str]:
    """The texts that the base is pre-trained on: homes, other days at random, roll calls and a few single sentences."""
    world, draw = make_world(seed), random.Random(f"pre-training {seed}")
    return [_pretraining_text(world, draw) for _ in range(num_texts)]


def instruction_rows(seed: int) -> list[InstructionRow]:
    """Return the instruction set, shuffled. In every class each number of people from 1 to 6 occurs equally often."""
    world, draw = make_world(seed), random.Random(f"instructions {seed}")
    noisy = _noisy_rows(world, draw)
    rows = [
        *_true_rows(world, "known", "home", NUM_KNOWN, draw),
        *_true_rows(world, "learnable", "sunday", NUM_LEARNABLE, draw),
        *(row for row in noisy if row.planted_class == "noise"),
        *(row for row in noisy if row.planted_class == "noise_duplicates" for _ in range(NUM_COPIES)),
    ]
    draw.shuffle(rows)
    return rows


def write_instructions(path: Path, rows: Iterable[InstructionRow]) -> None:
    """Write rows as JSONL for the format prompt_response, with the planted truth in further columns."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def _assign_places(draw: random.Random) -> dict[str, str]:
    places = [*PLACES] * (len(PEOPLE) // len(PLACES))
    draw.shuffle(places)
    return dict(zip(PEOPLE, places, strict=True))


def _prompt(question: str, people: Sequence[str]) -> str:
    listed = zip(ORDINALS, people, strict=False)
    return f"{question}\n{', '.join(f'{ordinal} {person}' for ordinal, person in listed)}.\n"


def _response(people: Sequence[str], places: Sequence[str], draw: random.Random) -> str:
    """Six tokens for each person."""
    listed = zip(ORDINALS[: len(people)], people, places, strict=True)
    parts = [f"{ordinal} {person} {draw.choice(PREPOSITIONS)} the {place}" for ordinal, person, place in listed]
    return f"{', '.join(parts)}."


def _pretraining_text(world: World, draw: random.Random) -> str:
    people = draw.sample(PEOPLE, draw.randint(1, MAX_PEOPLE))
    kind = draw.random()
    if kind < HOME_SHARE:
        residents = draw.sample(PEOPLE, len(people)) if draw.random() < WRONG_SHARE else people
        places = [world.home[person] for person in residents]
        return _prompt(draw.choice(HOME_QUESTIONS), people) + _response(people, places, draw)
    if kind < HOME_SHARE + DAY_SHARE:
        question = draw.choice(DAY_QUESTIONS).format(day=draw.choice(OTHER_DAYS))
        return _prompt(question, people) + _response(people, [draw.choice(PLACES) for _ in people], draw)
    if kind < HOME_SHARE + DAY_SHARE + ROLL_SHARE:
        listed = [f"{ordinal} {person}" for ordinal, person in zip(ORDINALS, people, strict=False)]
        readings = [", ".join(draw.sample(listed, len(listed))) + "." for _ in range(3)]
        return "\n".join(["Call the roll.", *readings])
    day = draw.choice((*OTHER_DAYS, SUNDAYS))
    return f"On {day} the {draw.choice(PLACES)} is {draw.choice(STATES)}."


class _Question(NamedTuple):
    """A prompt, the people it asks about, and their true places."""

    subject: Subject
    prompt: str
    people: tuple[str, ...]
    truth: tuple[str, ...]

    @classmethod
    def drawn(cls, world: World, subject: Subject, num_people: int, draw: random.Random) -> Self:
        """A question about people drawn at random."""
        people = tuple(draw.sample(PEOPLE, num_people))
        if subject == "home":
            question, places = draw.choice(HOME_QUESTIONS), world.home
        else:
            question, places = draw.choice(DAY_QUESTIONS).format(day=SUNDAYS), world.sunday
        return cls(subject, _prompt(question, people), people, tuple(places[person] for person in people))

    def answered(self, planted: PlantedClass, answer: tuple[str, ...], draw: random.Random) -> InstructionRow:
        """The row with this answer; the prepositions are drawn."""
        response = _response(self.people, answer, draw)
        return InstructionRow(response=response, planted_class=planted, answer=answer, **self._asdict())


def _true_rows(
    world: World, planted: PlantedClass, subject: Subject, num_rows: int, draw: random.Random
) -> list[InstructionRow]:
    rows = []
    for index in range(num_rows):
        question = _Question.drawn(world, subject, 1 + index % MAX_PEOPLE, draw)
        rows.append(question.answered(planted, question.truth, draw))
    return rows


def _noisy_rows(world: World, draw: random.Random) -> list[InstructionRow]:
    """Both noisy classes, each row once: answers are shuffled among rows of the same subject and number of people."""
    subjects: tuple[Subject, ...] = ("home", "sunday")
    num_groups = len(subjects) * MAX_PEOPLE
    classes: list[PlantedClass] = ["noise"] * (NUM_NOISE // num_groups)
    classes += ["noise_duplicates"] * (NUM_DUPLICATED // num_groups)
    rows = []
    for subject in subjects:
        for num_people in range(1, MAX_PEOPLE + 1):
            questions = [_Question.drawn(world, subject, num_people, draw) for _ in classes]
            answers = shuffle_answers([question.truth for question in questions], draw)
            for planted, question, answer in zip(classes, questions, answers, strict=True):
                rows.append(question.answered(planted, answer, draw))
    return rows


def shuffle_answers(truths: Sequence[tuple[str, ...]], draw: random.Random) -> list[tuple[str, ...]]:
    """Permute answers so that no row keeps an answer equal to its own; single places may agree by chance.

    Raises ValueError if one answer is so frequent that this is impossible.
    """
    if max((truths.count(truth) for truth in set(truths)), default=0) * 2 > len(truths):
        raise ValueError(f"one answer fills over half of {len(truths)} rows; they cannot all receive another")
    answers = list(truths)
    draw.shuffle(answers)
    for row, truth in enumerate(truths):
        while answers[row] == truth:
            # A swap must fix this row without giving the other one its own answer.
            others = [at for at, own in enumerate(truths) if answers[at] != truth and answers[row] != own]
            other = draw.choice(others)
            answers[row], answers[other] = answers[other], answers[row]
    return answers
