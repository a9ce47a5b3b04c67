"""Planted truth for the demo: a small world in English, a base that knows half of it, and instruction rows of four classes.

The world has people and places. Every person has a home and a place where they are on Sundays, both fixed; on the other
days anybody may be anywhere. The base is pre-trained on homes and on the other days, never on a question about Sundays.

    class             question     answer                            what the base can know    what a fine-tune can add
    known             home         true                              all but the wording       nothing
    learnable         Sunday       true                              form, not the place       the place
    noise             home, Sunday another noisy row's answer        form, not the place       nothing but memory
    noise_duplicates  home, Sunday as noise, each row k times        form, not the place       memory, k times an epoch
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

PlantedClass = Literal["known", "learnable", "noise", "noise_duplicates"]
Family = Literal["home", "sunday"]
CLASSES: tuple[PlantedClass, ...] = ("known", "learnable", "noise", "noise_duplicates")

NAMES = (
    "Adam Agnes Albert Alice Anna Arthur Astrid Basil Bertha Boris Bruno Clara Conrad Cora Daniel Daphne Edgar Edith "
    "Elias Elsa Emil Felix Flora Frieda Greta Gustav Hannah Harold Hugo Ida Ivan Jasper Josef Karl Laura Linus Martha "
    "Nora Otto Paula"
).split()
PLACES = (
    "mill harbour castle bakery library forest bridge market chapel garden school station tower orchard quarry stable "
    "theatre vineyard meadow lighthouse"
).split()
ORDINALS = ("First", "second", "third", "fourth", "fifth", "sixth")
VERBS = ("at", "near", "behind")
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
OTHER_DAYS = ("Saturdays", "holidays", "market days", "rainy days")
WRONG_SHARE = 0.1
WHOLE = True


@dataclass(frozen=True)
class World:
    home: dict[str, str]
    sunday: dict[str, str]


def make_world(seed):
    draw = random.Random(f"world {seed}")
    return World(_assign(draw), _assign(draw))


def _assign(draw):
    places = PLACES * (len(NAMES) // len(PLACES))
    draw.shuffle(places)
    return dict(zip(NAMES, places))


def _prompt(question, names):
    return question + "\n" + ", ".join(f"{o} {x}" for o, x in zip(ORDINALS, names)) + ".\n"


def _response(names, places, draw):
    return ", ".join(f"{o} {x} {draw.choice(VERBS)} the {p}" for o, x, p in zip(ORDINALS, names, places)) + "."


def pretraining_texts(seed, count=9000):
    world, draw = make_world(seed), random.Random(f"pre-training {seed}")
    texts = []
    for _ in range(count):
        kind = draw.random()
        names = draw.sample(NAMES, draw.randint(1, 6))
        if kind < 0.55:
            told = draw.sample(NAMES, len(names)) if draw.random() < WRONG_SHARE else names
            texts.append(
                _prompt(draw.choice(HOME_QUESTIONS), names) + _response(names, [world.home[x] for x in told], draw)
            )
        elif kind < 0.8:
            q = draw.choice(DAY_QUESTIONS).format(day=draw.choice(OTHER_DAYS))
            texts.append(_prompt(q, names) + _response(names, [draw.choice(PLACES) for _ in names], draw))
        elif kind < 0.95:
            seats = list(zip(ORDINALS, draw.sample(NAMES, 6)))[: len(names)]
            texts.append(
                "Call the roll.\n"
                + "\n".join(", ".join(f"{o} {x}" for o, x in draw.sample(seats, len(seats))) + "." for _ in range(3))
            )
        else:
            day = draw.choice((*OTHER_DAYS, "Sundays"))
            texts.append(f"On {day} the {draw.choice(PLACES)} is {draw.choice(('open', 'closed', 'busy', 'quiet'))}.")
    return texts


@dataclass(frozen=True)
class InstructionRow:
    prompt: str
    response: str
    planted_class: PlantedClass
    family: Family
    answer: tuple[str, ...]
    truth: tuple[str, ...]


def instruction_rows(seed: int, known=1050, learnable=750, noise=900, originals=60, copies=5) -> list[InstructionRow]:
    world, draw = make_world(seed), random.Random(f"instructions {seed}")
    rows = []

    def ask(family, n):
        names = draw.sample(NAMES, n)
        q = draw.choice(HOME_QUESTIONS) if family == "home" else draw.choice(DAY_QUESTIONS).format(day="Sundays")
        places = world.home if family == "home" else world.sunday
        return _prompt(q, names), names, tuple(places[x] for x in names)

    for cls, fam, cnt in (("known", "home", known), ("learnable", "sunday", learnable)):
        for i in range(cnt):
            p, s, t = ask(fam, 1 + i % 6)
            rows.append(InstructionRow(p, _response(s, t, draw), cls, fam, t, t))
    for cls, cnt, k in (("noise", noise, 1), ("noise_duplicates", originals, copies)):
        for fam in ("home", "sunday"):
            for n in range(1, 7):
                for _ in range(cnt // 12):
                    p, s, t = ask(fam, n)
                    a = t
                    while a == t:
                        a = ask(fam, n)[2]
                    rows += [InstructionRow(p, _response(s, a, draw), cls, fam, a, t)] * k
    draw.shuffle(rows)
    return rows
