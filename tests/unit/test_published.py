"""Each row format on a row written by hand, its odd rows, and the real files."""

import json

import pytest

from hydra_rlhf.data.row_formats import FORMATS, describe_formats, detect_format, named_format
from hydra_rlhf.data.rows import Demonstration, PreferencePair, Prompt, RowError
from hydra_rlhf.data.sources import load_demonstrations, load_pairs
from hydra_rlhf.errors import ConfigError

ALL = ("pairs", "demonstrations", "prompts")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def reply(text, rank=None, role="assistant", replies=()):
    node = {"text": text, "role": role, "replies": list(replies)}
    return node if rank is None else {**node, "rank": rank}


QUESTION = [user("Hi"), assistant("Yes?"), user("Why?")]
TREE = reply(
    "Hi",
    role="prompter",
    replies=[
        reply("worse", 1, replies=[reply("Only one answer?", role="prompter", replies=[reply("Yes.")])]),
        reply("best", 0, replies=[reply("More?", role="prompter", replies=[reply("x", 1), reply("y", 0), reply("z")])]),
        reply("worst", 2),
    ],
)

# format -> (row, what it gives): prompt, chosen, rejected, worked out by reading the row.
EXAMPLES = {
    "hh_rlhf": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:  Because.\n\n1. one ",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: No.",
        },
        [(QUESTION, "Because.\n\n1. one", "No.")],
    ),
    "instruction_pairs": (
        {"instruction": "Fix it.", "input": "a b", "output": "ab", "chosen": "ab", "rejected": "no"},
        [("Fix it.\n\na b", "ab", "no")],
    ),
    "pairs": ({"prompt": "p", "chosen": "c", "rejected": "r"}, [("p", "c", "r")]),
    "labelled": ({"prompt": "p", "response_a": "a", "response_b": "b", "label": 1}, [("p", "b", "a")]),
    "dsp": (
        {
            "text": [f"\n\nHuman: Hi\n\nAssistant: {answer}" for answer in ("low", "top", "mid")],
            "score": [0.5, 2, 1.5],
        },
        [([user("Hi")], "top", "low"), ([user("Hi")], "top", "mid")],
    ),
    "gpt4_llm_ranked": (
        {"instruction": "Name one.", "input": " ", "output": ["best", "good", "bad"]},
        [("Name one.", "best", "good"), ("Name one.", "best", "bad")],
    ),
    "gpt4_llm": ({"user_input": "p", "completion_a": "c", "completion_b": "r"}, [("p", "c", "r")]),
    "gpt4_llm_scored": (
        {
            "user_input": "p",
            "responses_and_scores": [
                {"response": "r", "source": "icm-1.3b", "score": 3},
                {"response": "c", "source": "gpt4", "score": 9.5},
            ],
        },
        [("p", "c", "r")],
    ),
    "tldr_comparisons": (
        {
            "info": {"post": "Long story.", "title": "T", "subreddit": "tifu"},
            "summaries": [{"text": " r", "policy": "ref"}, {"text": " c"}],
            "choice": 1,
        },
        [("SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: Long story.\n\nTL;DR:", "c", "r")],
    ),
    "tldr_judged": (
        {"query": "q TL;DR:", "postprocessed_response": " m", "reference_responses": " a", "preferred": "reference"},
        [("q TL;DR:", "a", "m")],
    ),
    "stack_exchange": ({"question": "p", "response_j": "c", "response_k": "r"}, [("p", "c", "r")]),
    "stack_exchange_scored": (
        {
            "question": "p",
            "answers": [
                {"text": "r1", "pm_score": 1, "selected": False},
                {"text": "c", "pm_score": 4, "selected": True},
                {"text": "r2", "pm_score": -1, "selected": False},
            ],
        },
        [("p", "c", "r1"), ("p", "c", "r2")],
    ),
    "oasst": (
        {"message_tree_id": "t", "prompt": TREE},
        [
            ([user("Hi")], "best", "worse"),
            ([user("Hi")], "best", "worst"),
            ([user("Hi"), assistant("best"), user("More?")], "y", "x"),
        ],
    ),
    "ultrafeedback": (
        {
            "instruction": "p",
            "completions": [
                {"response": "r", "overall_score": 10.0, "fine-grained_score": 1.5},
                {"response": "c", "overall_score": 8.0, "fine-grained_score": 4.25},
                {"response": "none", "overall_score": 9.0, "fine-grained_score": "N/A"},
            ],
        },
        [("p", "c", "r")],
    ),
}
DEMONSTRATIONS = {
    "demonstrations": ({"prompt": "p", "response": [assistant("a")]}, ("p", "a")),
    "conversations": ({"messages": [*QUESTION, assistant("a")]}, (QUESTION, "a")),
    "alpaca": ({"instruction": "Fix it.", "input": "a b", "output": "ab"}, ("Fix it.\n\na b", "ab")),
}


def read(name, row):
    return FORMATS[name].read(row)


def test_every_format_has_an_example():
    assert {*EXAMPLES, *DEMONSTRATIONS, "prompts"} == set(FORMATS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_pairs_are_read_and_detected(name):
    row, expected = EXAMPLES[name]
    before = json.dumps(row)
    assert read(name, row).records == [PreferencePair(*pair) for pair in expected]
    assert detect_format([row], ALL) == name
    assert json.dumps(row) == before, "a reader leaves its row alone"


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_are_read_and_detected(name):
    row, expected = DEMONSTRATIONS[name]
    assert read(name, row).records == [Demonstration(*expected)]
    assert detect_format([row], ALL) == name


def test_prompts_are_read_and_detected():
    assert read("prompts", {"prompt": QUESTION, "id": 3}).records == [Prompt(QUESTION)]
    assert detect_format([{"prompt": "p", "answer": 4}], ALL) == "prompts"


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("oasst", "prompts")])
def test_every_field_is_needed_and_null_is_refused(name):
    row, _ = EXAMPLES[name] if name in EXAMPLES else DEMONSTRATIONS[name]
    for missing in FORMATS[name].fields:
        with pytest.raises(RowError, match=missing):
            read(name, {key: value for key, value in row.items() if key != missing})
        if (name, missing) != ("tldr_judged", "preferred"):  # null there means: not judged
            with pytest.raises(RowError):
                read(name, {**row, missing: None})


@pytest.mark.parametrize(
    ("label", "chosen"), [(0, "a"), ("0", "a"), ("a", "a"), ("A", "a"), (1, "b"), (1.0, "b"), (" b ", "b"), ("B", "b")]
)
def test_labels(label, chosen):
    row = {"prompt": "p", "response_a": "a", "response_b": "b", "label": label}
    assert [pair.chosen for pair in read("labelled", row).records] == [chosen]


def test_ties_are_counted_and_other_labels_refused():
    row = {"prompt": "p", "response_a": "a", "response_b": "b"}
    assert read("labelled", {**row, "label": "Tie"}) == ([], {"tie": 1})
    for label in (2, -1, 0.5, "c", "", True, None, [0], float("nan")):
        with pytest.raises(RowError, match="label"):
            read("labelled", {**row, "label": label})


def test_conversations_share_their_beginning():
    both = {"chosen": [*QUESTION, assistant("c")], "rejected": [*QUESTION, assistant("r")]}
    expected = [PreferencePair(QUESTION, "c", "r")]
    assert read("pairs", both).records == expected
    assert read("pairs", {"prompt": "Hi", **both}).records == expected, "the prompt is repeated in the conversations"
    assert read("pairs", {"prompt": None, **both}).records == expected
    answers = {"chosen": [assistant("c")], "rejected": "r"}
    assert read("pairs", {"prompt": QUESTION, **answers}).records == expected
    later = {"chosen": [user("Why?"), assistant("c")], "rejected": [user("Why?"), assistant("r")]}
    assert read("pairs", {"prompt": [*QUESTION[:1], assistant("Yes?"), user("So?")], **later}).records == [
        PreferencePair([user("Hi"), assistant("Yes?"), user("So?"), user("Why?")], "c", "r")
    ]
    extra = {"chosen": [{**user("Hi"), "name": None}, assistant("c")], "rejected": [user("Hi"), assistant("r")]}
    assert read("pairs", extra).records == [PreferencePair([user("Hi")], "c", "r")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": " \n"}, "field 'rejected' is empty"),
        ({"prompt": "", "chosen": "c", "rejected": "r"}, "field 'prompt' is empty"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, "field 'prompt' is a number, not a string"),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, "field 'prompt' is null"),
        ({"chosen": "c", "rejected": "r"}, "field 'prompt' is missing"),
        ({"prompt": "p", "chosen": {"a": 1}, "rejected": "r"}, "field 'chosen' is an object"),
        ({"prompt": [], "chosen": "c", "rejected": "r"}, "empty list"),
        ({"prompt": ["p"], "chosen": "c", "rejected": "r"}, "message 1 of 'prompt' is not an object"),
        ({"prompt": [{"role": "human", "content": "p"}], "chosen": "c", "rejected": "r"}, "role 'human'"),
        ({"prompt": [{"role": ["user"], "content": "p"}], "chosen": "c", "rejected": "r"}, "known roles"),
        ({"prompt": [{"role": "user", "content": None}], "chosen": "c", "rejected": "r"}, "content that is null"),
        ({"prompt": [user(" ")], "chosen": "c", "rejected": "r"}, "field 'prompt' is empty"),
        ({"prompt": [assistant("p")], "chosen": "c", "rejected": "r"}, "ends with an assistant message"),
        ({"prompt": "p", "chosen": [user("c")], "rejected": "r"}, "'chosen' ends with a user message"),
        ({"prompt": "p", "chosen": [assistant("")], "rejected": "r"}, "field 'chosen' is empty"),
        ({"chosen": [user("a"), assistant("c")], "rejected": [user("b"), assistant("r")]}, "differ before their last"),
        ({"chosen": [assistant("a"), assistant("c")], "rejected": [assistant("a"), assistant("r")]}, "assistant"),
    ],
)
def test_malformed_pairs(row, reason):
    with pytest.raises(RowError, match=reason):
        read("pairs", row)


def test_equal_sides_are_dropped():
    assert read("pairs", {"prompt": "p", "chosen": "same", "rejected": "same\n"}) == ([], {"equal_sides": 1})
    ranked = {"instruction": "i", "output": ["a", "a", "b"]}
    assert read("gpt4_llm_ranked", ranked) == ([PreferencePair("i", "a", "b")], {"equal_sides": 1})


def test_transcripts_that_do_not_fit_are_dropped():
    hi, ho = "\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Ho\n\nAssistant: b"
    assert read("hh_rlhf", {"chosen": hi, "rejected": ho}) == ([], {"prompts_differ": 1})
    alone = {"chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nAssistant: c", "rejected": hi + "\n\nAssistant: b"}
    assert read("hh_rlhf", alone) == ([], {"no_question_before_reply": 1})
    assert read("dsp", {"text": [hi], "score": [1]}) == ([], {"single_reply": 1})
    assert read("dsp", {"text": [hi, hi + "!"], "score": [1, 1.0]}) == ([], {"tie": 1})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, "does not end with a turn"),
        ({"chosen": "Hi\n\nHuman: x\n\nAssistant: b", "rejected": "x"}, "no transcript"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "x"}, r"'chosen \(last turn\)' is empty"),
    ],
)
def test_malformed_transcripts(row, reason):
    with pytest.raises(RowError, match=reason):
        read("hh_rlhf", row)


def test_scores_must_be_finite_numbers_as_many_as_texts():
    hi = "\n\nHuman: Hi\n\nAssistant: a"
    for scores in ([1.0], [1.0, float("nan")], [1.0, "2"], [1.0, True], [1.0, None], [1.0, float("inf")]):
        with pytest.raises(RowError, match="score"):
            read("dsp", {"text": [hi, hi + "b"], "score": scores})


def test_scored_lists_count_ties_single_replies_and_missing_scores():
    def scored(*scores):
        answers = [{"text": f"t{index}", "score": score} for index, score in enumerate(scores)]
        return read("stack_exchange_scored", {"question": "p", "answers": answers})

    assert scored(2, 5, 5) == ([PreferencePair("p", "t1", "t0")], {"tie": 1})
    assert scored(1) == ([], {"single_reply": 1})
    assert scored() == ([], {"single_reply": 1})
    assert scored(1, None, 3) == ([PreferencePair("p", "t2", "t0")], {"unscored_reply": 1})
    with pytest.raises(RowError, match="no field 'pm_score' or 'score'"):
        read("stack_exchange_scored", {"question": "p", "answers": [{"text": "a"}]})
    with pytest.raises(RowError, match="holds a string, not an object"):
        read("stack_exchange_scored", {"question": "p", "answers": ["a", "b"]})


def test_ultrafeedback_takes_one_kind_of_score_for_a_row():
    completions = [{"response": "a", "overall_score": 1.0}, {"response": "b", "overall_score": 2.0}]
    assert read("ultrafeedback", {"prompt": "p", "completions": completions}).records == [PreferencePair("p", "b", "a")]


def test_tldr_rows_without_a_judgement_and_without_a_subreddit():
    row, _ = EXAMPLES["tldr_judged"]
    for nothing in ("", None, "nan"):
        assert read("tldr_judged", {**row, "preferred": nothing}) == ([], {"not_judged": 1})
    with pytest.raises(RowError, match="'preferred' is 'both'"):
        read("tldr_judged", {**row, "preferred": "both"})
    row, _ = EXAMPLES["tldr_comparisons"]
    news = {**row, "info": {"article": "News.", "title": "T", "post": None, "subreddit": None}}
    assert read("tldr_comparisons", news).records[0].prompt == "TITLE: T\n\nARTICLE: News.\n\nTL;DR:"
    for wrong in ({"choice": 2}, {"choice": True}, {"choice": 1.0}, {"summaries": [{"text": "a"}]}, {"info": {}}):
        with pytest.raises(RowError):
            read("tldr_comparisons", {**row, **wrong})


def test_trees_count_what_gives_no_pair():
    # In TREE: "Yes." has no sibling, and "z" beside x and y has no rank.
    assert read("oasst", {"prompt": TREE}).dropped == {"single_reply": 1, "unranked_reply": 1}
    unranked = reply("Hi", role="prompter", replies=[reply("a"), reply("b")])
    assert read("oasst", {"prompt": unranked}) == ([], {"unranked_reply": 2})
    equal = reply("Hi", role="prompter", replies=[reply("a", 0), reply("b", 0), reply("c", 1)])
    assert read("oasst", {"prompt": equal}) == ([PreferencePair([user("Hi")], "a", "c")], {"tie": 1})
    deep = reply("end", 0)
    for level in range(2000):
        deep = reply(f"{level}", role=("prompter", "assistant")[level % 2], replies=[deep])
    assert read("oasst", {"prompt": deep}).records == []


def test_malformed_trees():
    for node in (None, {"role": "prompter"}, reply("x", role="human"), reply(" ", role="prompter"), {"text": "x"}):
        with pytest.raises(RowError):
            read("oasst", {"prompt": node})
    with pytest.raises(RowError, match="not a list"):
        read("oasst", {"prompt": {**reply("x", role="prompter"), "replies": {"0": "a"}}})
    with pytest.raises(RowError, match="is no object"):
        read("oasst", {"prompt": reply("x", role="prompter", replies=["text"])})


def test_detection_is_by_majority_and_by_kind():
    pair, alpaca = EXAMPLES["pairs"][0], DEMONSTRATIONS["alpaca"][0]
    assert detect_format([alpaca, pair, pair], ALL) == "pairs"
    assert detect_format([alpaca, pair, pair], ("demonstrations",)) == "alpaca"
    assert detect_format([pair], ("prompts", "pairs")) == "prompts"
    assert detect_format([{"a": 1}, {}], ALL) is None


def test_formats_are_named_and_described():
    assert named_format("oasst") is FORMATS["oasst"]
    with pytest.raises(
        ConfigError, match=r"data\.format='stackexchange' is no known row format; did you mean stack_exch"
    ):
        named_format("stackexchange")
    with pytest.raises(ConfigError, match="known formats: auto, hh_rlhf"):
        named_format("qqqq")
    assert "(prompt, response_a, response_b, label)" in describe_formats()
    assert len(describe_formats().splitlines()) == len(FORMATS)


# file -> (format, rows, pairs, drops). Rows are the README's; polite has 6 rows with chosen == rejected; the 60 trees
# hold 37, 67, 16, 2, 6 and 1 groups of 2, 3, 4, 5, 6 and 9 ranked replies: 37 + 2*67 + 3*16 + 4*2 + 5*6 + 8 = 265.
REAL = {
    "hh_rlhf/harmless-base.jsonl": ("hh_rlhf", 500, 500, {}),
    "hh_rlhf/harmless-base.jsonl.gz": ("hh_rlhf", 500, 500, {}),
    "dsp/helpful.json": ("dsp", 500, 500, {}),
    "gpt4_llm/comparison_gpt4_data_en.json": ("gpt4_llm_ranked", 510, 510, {}),
    "tldr/oai1b_judged.csv": ("tldr_judged", 200, 200, {}),
    "stack_exchange/stack_exchange_paired_tiny.json": ("stack_exchange", 25, 25, {}),
    "oasst/en_trees.jsonl": ("oasst", 60, 265, {"single_reply": 26, "unranked_reply": 5}),
    "polite/instruction-data-with-preference.json": ("instruction_pairs", 1100, 1094, {"equal_sides": 6}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared_dir, name):
    rows = load_pairs(shared_dir / "data" / "raw" / name)
    assert (rows.format, rows.rows_read, len(rows), rows.dropped) == REAL[name]


def test_real_demonstrations(shared_dir):
    path = shared_dir / "data" / "raw" / "alpaca" / "alpaca_en_demo.json"
    rows = load_demonstrations(path)
    different = {(row["instruction"], row["input"], row["output"]) for row in json.loads(path.read_text("utf-8"))}
    assert (rows.format, rows.rows_read, len(rows)) == ("alpaca", 991, len(different))
    assert rows.dropped == {"duplicate": 991 - len(different)}


@pytest.mark.parametrize(
    ("raw", "converted"),
    [
        ("hh_rlhf/harmless-base.jsonl", "hh_harmless"),
        ("dsp/helpful.json", "hh_helpful"),
        ("gpt4_llm/comparison_gpt4_data_en.json", "gpt4_llm"),
        ("tldr/oai1b_judged.csv", "tldr"),
    ],
)
def test_published_rows_equal_the_converted_ones(shared_dir, raw, converted):
    # The converted sets were made from the same sources by another program; nearly all raw rows must be among them.
    data = shared_dir / "data"
    known = [row for split in ("train", "test") for row in load_pairs(data / converted / f"{split}.jsonl").rows]
    found = load_pairs(data / "raw" / raw).rows
    both = {json.dumps([row.prompt, row.chosen, row.rejected]) for row in known}
    shared = sum(json.dumps([row.prompt, row.chosen, row.rejected]) in both for row in found)
    assert shared >= 0.95 * len(found), f"{shared} of {len(found)}"
