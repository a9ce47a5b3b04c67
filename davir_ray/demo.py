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
SLOTS = ("dawn", "morning", "noon", "afternoon", "evening", "night")
VERBS = ("at", "near", "behind")
QUESTIONS = (
    "Where is {name} on {day}, from {start} until {end}?",
    "Please tell me where {name} is on {day}, from {start} until {end}.",
    "On {day}, from {start} until {end}, where is {name}?",
)
OTHER_DAYS = ("Saturdays", "holidays", "market days", "rainy days")
WRONG_SHARE = 0.1
WHOLE = True


@dataclass(frozen=True)
class World:
    workdays: dict[str, tuple[str, ...]]
    sundays: dict[str, tuple[str, ...]]


def make_world(seed):
    draw = random.Random(f"world {seed}")
    return World(_plans(draw), _plans(draw))


def _plans(draw):
    columns = []
    for _ in SLOTS:
        places = PLACES * (len(NAMES) // len(PLACES))
        draw.shuffle(places)
        columns.append(places)
    return {name: tuple(c[i] for c in columns) for i, name in enumerate(NAMES)}


def _prompt(name, day, slots, draw):
    return draw.choice(QUESTIONS).format(name=name, day=day, start=SLOTS[slots.start], end=SLOTS[slots.stop - 1]) + "\n"


def _response(slots, places, draw):
    return " ".join(f"At {SLOTS[s]} {draw.choice(VERBS)} the {p}." for s, p in zip(slots, places))


def _slots(n, draw):
    start = draw.randint(0, len(SLOTS) - n)
    return range(start, start + n)


def pretraining_texts(seed, count=9000):
    world, draw = make_world(seed), random.Random(f"pre-training {seed}")
    texts = []
    for _ in range(count):
        kind = draw.random()
        slots = _slots(draw.randint(1, len(SLOTS)), draw)
        name = draw.choice(NAMES)
        if kind < 0.6:
            told = world.workdays[name if draw.random() >= WRONG_SHARE else draw.choice(NAMES)]
            texts.append(_prompt(name, "workdays", slots, draw) + _response(slots, [told[s] for s in slots], draw))
        elif kind < 0.9:
            day = draw.choice(OTHER_DAYS)
            texts.append(_prompt(name, day, slots, draw) + _response(slots, [draw.choice(PLACES) for _ in slots], draw))
        else:
            day = draw.choice((*OTHER_DAYS, "Sundays", "workdays"))
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
        name, slots = draw.choice(NAMES), _slots(n, draw)
        plan = (world.workdays if family == "home" else world.sundays)[name]
        return _prompt(name, "workdays" if family == "home" else "Sundays", slots, draw), slots, tuple(plan[s] for s in slots)

    for cls, fam, cnt in (("known", "home", known), ("learnable", "sunday", learnable)):
        for i in range(cnt):
            p, s, t = ask(fam, 1 + i % 6)
            rows.append(InstructionRow(p, _response(s, t, draw), cls, fam, t, t))
    for cls, cnt, k in (("noise", noise, 1), ("noise_duplicates", originals, copies)):
        for fam in ("home", "sunday"):
            for n in range(1, 7):
                for _ in range(cnt // 12):
                    p, s, t = ask(fam, n)
                    plans = world.workdays if fam == "home" else world.sundays
                    a = t
                    while a == t:
                        if WHOLE:
                            o = plans[draw.choice(NAMES)]
                            a = tuple(o[x] for x in s)
                        else:
                            a = tuple(plans[draw.choice(NAMES)][x] for x in s)
                    rows += [InstructionRow(p, _response(s, a, draw), cls, fam, a, t)] * k
    draw.shuffle(rows)
    return rows
