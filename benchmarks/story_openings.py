"""Openings of stories, in words that the rule of `story_rule.py` does not count."""

import itertools
import random

NAMES = ("Lily", "Tom", "Sam", "Mia", "Ben", "Anna", "Tim", "Max", "Lucy", "Jack", "Sue", "Bob", "Sara", "Amy")
ANIMALS = ("cat", "dog", "bird", "frog", "bear", "rabbit", "mouse", "fish", "duck", "fox")
PLACES = ("park", "forest", "garden", "house", "farm", "beach", "school", "store")
THINGS = ("box", "ball", "book", "toy", "hat", "stick", "leaf", "car")
TEMPLATES = (
    "Once upon a time, there was a little {animal} named {name}.",
    "Once upon a time, there was a boy named {name} who had a {thing}.",
    "Once upon a time, {name} and {other} went to the {place}.",
    "One day, {name} went to the {place}.",
    "One day, {name} found a {thing} in the {place}.",
    "One day, a {animal} saw a {thing} in the {place}.",
    "{name} and {other} were in the {place}. They saw a {animal}.",
    "{name} was a little {animal}. One day, {name} went to the {place}.",
)


def openings() -> list[list[str]]:
    """Every different opening that each template gives, in a fixed order."""
    groups: list[list[str]] = []
    for template in TEMPLATES:
        found: dict[str, None] = {}
        for name, other, animal, place, thing in itertools.product(NAMES, NAMES, ANIMALS, PLACES, THINGS):
            if name != other:
                found[template.format(name=name, other=other, animal=animal, place=place, thing=thing)] = None
        groups.append(list(found))
    return groups


def split_openings(seed: int, num_train: int, num_test: int, num_fresh: int) -> tuple[list[str], list[str], list[str]]:
    """(train, test, fresh) openings: disjoint, and every template as often as it has openings left."""
    groups = openings()
    rng = random.Random(seed)
    for group in groups:
        rng.shuffle(group)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    mixed = [opening for opening in rounds if opening is not None][: num_train + num_test + num_fresh]
    rng.shuffle(mixed)
    return mixed[:num_train], mixed[num_train : num_train + num_test], mixed[num_train + num_test :]
