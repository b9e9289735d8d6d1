"""The written rule that labels stories: how happily a text ends. Reads text only; knows no model and no length."""

import re

HAPPY = frozenset(
    word
    for line in (
        "happy happily happier happiest glad glee joy joyful cheerful merry delighted excited exciting smile smiled",
        "smiles smiling laugh laughed laughs laughing laughter giggled fun funny love loved loves loving hug hugged",
        "hugs hugging kiss kissed friend friends best proud thank thanked thanks grateful nice kind kindly good great",
        "wonderful lovely beautiful amazing perfect enjoy enjoyed safe cheered clapped celebrate celebrated danced",
        "sang yay hooray wow",
    )
    for word in line.split()
)
"""Words that speak of a good end."""

SAD = frozenset(
    word
    for line in (
        "sad sadly sadness unhappy cry cried cries crying tear tears wept afraid scared scary fear frightened angry",
        "angrily mad upset hurt hurts pain painful sick ill dead die died lonely alone lost lose broke broken break",
        "sorry bad worse worst mean hate hated ugly worried worry trouble danger dangerous fell stuck shouted yelled",
        "screamed fight fought wrong disappointed never nobody",
    )
    for word in line.split()
)
"""Words that speak of a bad end."""

ENDING_SENTENCES = 2
"""How many of the last complete sentences are the ending."""

MOST = 3
"""The rule's value is held in [-MOST, MOST]."""

SENTENCE_END = re.compile(r'[.!?]+["\']?(?=\s|$)')


def complete_sentences(text: str) -> list[str]:
    """The sentences of a text that are closed by `.`, `!` or `?`; an unfinished last one is left out."""
    sentences: list[str] = []
    start = 0
    for match in SENTENCE_END.finditer(text):
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    return sentences


def happy_ending(text: str) -> int:
    """Different happy words minus different sad words in the last two complete sentences, held in [-3, 3].

    A word counts once however often it comes, so repetition gains nothing; words before the ending count nothing, so
    neither does length.
    """
    words = set(re.findall(r"[a-z]+", " ".join(complete_sentences(text)[-ENDING_SENTENCES:]).lower()))
    return max(-MOST, min(MOST, len(words & HAPPY) - len(words & SAD)))
