"""The words of the built-in world: a shop's help desk, small enough that a tiny model learns it in a minute or two.

About 150 distinct words. The sentences of a reply come from these closed lists, so the gold score of `world.py` can
read a reply without guessing. No torch.
"""

from dataclasses import dataclass
from itertools import permutations


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """Something a customer can ask about a product; `{product}` and `{value}` are filled in."""

    values: tuple[str, ...]
    """Five values that no other attribute shares, so that a value alone shows what it is about."""
    note: str
    """How the stock note states a value."""
    questions: tuple[str, ...]
    """How a customer asks for it."""
    answers: tuple[str, ...]
    """How a reply states it, once with the product's name and once without."""


PRODUCTS = ("lamp", "chair", "clock", "table", "radio", "desk", "vase", "bench", "rug", "mirror")
"""What the shop sells."""

ATTRIBUTES = {
    "price": Attribute(
        values=("10", "20", "30", "40", "50"),
        note="{value} dollars",
        questions=("How much is the {product}?", "What does the {product} cost?"),
        answers=("The {product} costs {value} dollars.", "It costs {value} dollars."),
    ),
    "colour": Attribute(
        values=("red", "blue", "green", "black", "white"),
        note="{value}",
        questions=("What colour is the {product}?", "What colour does the {product} have?"),
        answers=("The {product} is {value}.", "It is {value}."),
    ),
    "delivery": Attribute(
        values=("Monday", "Tuesday", "Thursday", "Friday", "Sunday"),
        note="comes on {value}",
        questions=("When do I get the {product}?", "What day do I get the {product}?"),
        answers=("The {product} comes on {value}.", "It comes on {value}."),
    ),
    "place": Attribute(
        values=("door", "window", "stairs", "wall", "till"),
        note="by the {value}",
        questions=("Where is the {product}?", "Where do I find the {product}?"),
        answers=("The {product} is by the {value}.", "It is by the {value}."),
    ),
    "warranty": Attribute(
        values=("two", "three", "four", "five", "six"),
        note="{value} years of warranty",
        questions=("What is the warranty of the {product}?", "What warranty does the {product} have?"),
        answers=("The {product} has {value} years of warranty.", "It has {value} years of warranty."),
    ),
}
"""What a customer can ask, by name."""

PROMPT = "Stock note: {product}, {notes}.\nCustomer: {question}"
"""A note of three facts about one product, then a question about one of them."""

GREETINGS = ("Hello!", "Good day!", "Welcome to the shop!")
"""Wanted as the first sentence."""
OFFERS = ("Do you need more help?", "Please ask for more help.")
"""Wanted once, anywhere."""
FAREWELLS = ("Thank you!", "Have a good day!", "Thank you and goodbye!")
"""Wanted as the last sentence."""
RUDE_OPENINGS = ("What now?", "Not you again.")
"""Rude, in the place of a greeting."""
RUDE_REMARKS = ("You can read the note.", "Do not waste my day.")
"""Rude, in the place of an offer."""
RUDE_FAREWELLS = ("Now go away.", "Do not ask again.")
"""Rude, in the place of a farewell."""
FILLER_OPENINGS = ("Well, let me see.", "So, you know.")
"""Says nothing, in the place of a greeting."""
FILLER_REMARKS = ("It is what it is.", "Some say so, some do not.")
"""Says nothing, in the place of an offer."""
HEDGES = ("I do not know.", "Who can say?")
"""Says nothing, in the place of the answer."""

Slot = tuple[tuple[float, tuple[str, ...]], ...]
"""Choices for one part of a reply: (probability, texts of which one is taken; none = the part is left out)."""
OPENING_CHOICES: Slot = ((0.38, GREETINGS), (0.24, ()), (0.19, RUDE_OPENINGS), (0.19, FILLER_OPENINGS))
REMARK_CHOICES: Slot = ((0.34, OFFERS), (0.24, ()), (0.21, RUDE_REMARKS), (0.21, FILLER_REMARKS))
FAREWELL_CHOICES: Slot = (
    (0.38, FAREWELLS),
    (0.24, ()),
    (0.20, RUDE_FAREWELLS),
    (0.08, ("Thank", "Have a good", "Thank you and")),
    (0.10, tuple(" ".join(two) for two in permutations(FAREWELLS, 2))),
)
ANSWER_CHOICES = {
    "right": 0.64,
    "twice": 0.09,
    "wrong value": 0.05,
    "other fact": 0.08,
    "two facts": 0.05,
    "hedge": 0.03,
    "none": 0.06,
}
"""How often a reply answers how; `other fact` answers a question that was not asked, from the note."""
