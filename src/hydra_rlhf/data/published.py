"""Readers of the row formats of published preference data: one small pure function a format. Imports no torch."""

import re
import reprlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from hydra_rlhf.data.readers import (
    Reading,
    Row,
    best_against_others,
    check_score,
    instruction_prompt,
    pair_reading,
    required,
    required_list,
)
from hydra_rlhf.data.rows import Message, Record, RowError, check_prompt, check_text, describe_type


def read_transcript(text: Any, name: str) -> list[Message]:
    """A transcript whose turns start with a blank line and `Human:` or `Assistant:` -> messages that end in a reply."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", check_text(text, name))
    if parts[0].strip() or len(parts) < 2:
        raise RowError(f"field '{name}' is no transcript: it must start with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns: list[Message] = [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if turns[-1]["role"] != "assistant":
        raise RowError(f"field '{name}' does not end with a turn of the assistant")
    check_text(turns[-1]["content"], f"{name} (last turn)")
    return turns


def read_transcripts(scored: list[tuple[float, list[Message]]]) -> Reading:
    """Scored transcripts of one prompt -> pairs. The published files hold a few that do not fit together: drops."""
    prompt = scored[0][1][:-1]
    if any(turns[:-1] != prompt for _, turns in scored):
        return Reading([], {"prompts_differ": 1})
    if not prompt or prompt[-1]["role"] != "user":
        return Reading([], {"no_question_before_reply": 1})
    return best_against_others(check_prompt(prompt), [(score, turns[-1]["content"]) for score, turns in scored])


def read_hh_rlhf(row: Row) -> Reading:
    """HH-RLHF: chosen and rejected are whole transcripts, the prompt is their common part."""
    chosen = read_transcript(required(row, "chosen"), "chosen")
    rejected = read_transcript(required(row, "rejected"), "rejected")
    return read_transcripts([(1.0, chosen), (0.0, rejected)])


def read_dsp(row: Row) -> Reading:
    """DSP: HH-RLHF transcripts in `text` with a `score` each."""
    texts, scores = required_list(row, "text"), required_list(row, "score")
    if len(texts) != len(scores) or not texts:
        raise RowError(f"'text' has {len(texts)} entries and 'score' {len(scores)}; they must be as many, and some")
    turns = [read_transcript(text, "text") for text in texts]
    return read_transcripts([(check_score(score, "score"), part) for score, part in zip(scores, turns, strict=True)])


def read_ranked_outputs(row: Row) -> Reading:
    """instruction, input, and outputs from best to worst."""
    replies = [check_text(reply, "output") for reply in required_list(row, "output")]
    return best_against_others(instruction_prompt(row), [(-float(rank), reply) for rank, reply in enumerate(replies)])


def read_columns_of_text(prompt: str, chosen: str, rejected: str) -> Callable[[Row], Reading]:
    """A reader for rows with three columns of text under these names."""

    def read(row: Row) -> Reading:
        texts = [check_text(required(row, name), name) for name in (prompt, chosen, rejected)]
        return pair_reading(texts[0], texts[1], texts[2])

    return read


def read_scored_list(
    prompts: tuple[str, ...], replies: str, text: str, scores: tuple[str, ...]
) -> Callable[[Row], Reading]:
    """A reader for rows with a prompt (in the first of `prompts` that is there) and a list of scored replies.

    Each reply is an object with its text in `text`; a row's scores are in the first of `scores` that any reply fills.
    """

    def read(row: Row) -> Reading:
        prompt = next((name for name in prompts if name in row), prompts[0])
        question = instruction_prompt(row) if prompt == "instruction" else check_prompt(required(row, prompt), prompt)
        entries = required_list(row, replies)
        for entry in entries:
            if not isinstance(entry, dict):
                raise RowError(f"'{replies}' holds {describe_type(entry)}, not an object")
            if not any(name in entry for name in scores):
                raise RowError(f"an entry of '{replies}' has no field {' or '.join(repr(name) for name in scores)}")
        used = next((name for name in scores if any(_is_scored(entry, name) for entry in entries)), scores[0])
        scored = [
            (check_score(entry[used], used), check_text(required(entry, text), text))
            for entry in entries
            if _is_scored(entry, used)
        ]
        num_unscored = len(entries) - len(scored)
        reading = best_against_others(question, scored)
        return Reading(reading.records, reading.dropped | ({"unscored_reply": num_unscored} if num_unscored else {}))

    return read


def _is_scored(entry: Row, name: str) -> bool:
    """Whether an entry has a score at all; the published sets write null or N/A where a judge gave none."""
    return entry.get(name) not in (None, "N/A")


def read_tldr_comparisons(row: Row) -> Reading:
    """OpenAI's summary comparisons: a post in `info`, two `summaries`, `choice` 0 or 1."""
    info, summaries, choice = (required(row, name) for name in ("info", "summaries", "choice"))
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise RowError("'info' must be an object and 'summaries' a list of two")
    if type(choice) is not int or choice not in (0, 1):
        raise RowError(f"field 'choice' is {reprlib.repr(choice)}, not 0 or 1")
    body = "post" if info.get("post") is not None else "article"
    lines = [f"SUBREDDIT: r/{info['subreddit']}"] if info.get("subreddit") else []
    lines += [f"TITLE: {info['title']}"] if info.get("title") else []
    lines += [f"{body.upper()}: {check_text(required(info, body), body)}", "TL;DR:"]
    texts = [check_text(summary.get("text") if isinstance(summary, dict) else None, "text") for summary in summaries]
    return pair_reading("\n\n".join(lines), texts[choice].strip(), texts[1 - choice].strip())


def read_tldr_judged(row: Row) -> Reading:
    """A post with the model's summary (`ours`) and its author's (`reference`), and which of them a judge preferred."""
    query = check_text(required(row, "query"), "query")
    ours = check_text(required(row, "postprocessed_response"), "postprocessed_response").strip()
    reference = check_text(required(row, "reference_responses"), "reference_responses").strip()
    match required(row, "preferred"):
        case "ours":
            return pair_reading(query, ours, reference)
        case "reference":
            return pair_reading(query, reference, ours)
        case None | "" | "nan":
            return Reading([], {"not_judged": 1})
    raise RowError(f"field 'preferred' is {reprlib.repr(row['preferred'])}, not 'ours' or 'reference'")


def read_oasst_tree(row: Row) -> Reading:
    """An Open Assistant message tree: for each message with ranked replies of the assistant, the best against each."""
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    stack: list[tuple[Any, list[Message]]] = [(required(row, "prompt"), [])]
    while stack:
        node, before = stack.pop()
        if not isinstance(node, dict) or node.get("role") not in ("prompter", "assistant"):
            raise RowError("a message of the tree is no object with role 'prompter' or 'assistant'")
        role = "user" if node["role"] == "prompter" else "assistant"
        path: list[Message] = [*before, {"role": role, "content": check_text(required(node, "text"), "text")}]
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise RowError(f"field 'replies' is {describe_type(replies)}, not a list")
        stack += [(reply, path) for reply in reversed(replies)]
        answers = [reply for reply in replies if isinstance(reply, dict) and reply.get("role") == "assistant"]
        if role == "user" and answers:
            reading = _read_siblings(path, answers)
            records += reading.records
            dropped.update(reading.dropped)
    return Reading(records, dict(dropped))


def _read_siblings(path: list[Message], answers: list[Row]) -> Reading:
    """The assistant's replies to one message -> pairs; `rank` 0 is the best and may be missing."""
    if len(answers) == 1:
        return Reading([], {"single_reply": 1})
    ranked = [
        (-check_score(reply["rank"], "rank"), check_text(required(reply, "text"), "text"))
        for reply in answers
        if reply.get("rank") is not None
    ]
    unranked = {"unranked_reply": len(answers) - len(ranked)} if len(ranked) < len(answers) else {}
    if not ranked:
        return Reading([], unranked)
    reading = best_against_others(path, ranked)
    return Reading(reading.records, reading.dropped | unranked)
