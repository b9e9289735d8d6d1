"""Actor and reference that answer side by side: for every method they are what rollouts and scoring say they are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from contract.tiny import LORA, METHODS, chat, randomise_adapters, tiny_hydra, tiny_trunk, tokenizer
from hydra_rlhf.config import ModelConfig, PPOConfig, Recipe, SamplingConfig
from hydra_rlhf.data.formats import ChatFormat, TokenizedPrompt
from hydra_rlhf.data.rows import Message
from hydra_rlhf.errors import ConfigError, DataError, OutOfMemoryError
from hydra_rlhf.model.export import save_stage1
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import without_roles
from hydra_rlhf.model.stream import DrawnToken
from hydra_rlhf.records import PromptBatch, Responses, TokenBatch
from hydra_rlhf.stages import chat as chat_stage
from hydra_rlhf.stages.chat import Speakers, Turn
from hydra_rlhf.stages.limits import MemoryFailure, StageLimits
from hydra_rlhf.stages.rollout import collect_rollout, prompt_batch, sequence_kl

PROMPT = "the cat sat on"


def speakers_of(hydra: HydraModel, template: str = "none", **sampling: Any) -> Speakers:
    """Up to eight tokens from a model's roles."""
    settings = SamplingConfig(**({"max_response_tokens": 8} | sampling))
    recipe = Recipe(name="tiny", ppo=PPOConfig(sampling=settings))
    talk: ChatFormat = replace(chat(hydra), template=template)  # pyright: ignore[reportArgumentType]
    return Speakers(
        model=hydra,
        chat=talk,
        limits=StageLimits(micro_batch_tokens=64),
        recipe=recipe,
        checkpoint="last (step 2)",
        sampling=settings,
        seed=4,
    )


def made(speakers: Speakers, prompt: Any = PROMPT, number: int = 0) -> Turn:
    """A whole turn, as somebody sees it who waits for its end."""
    turn = speakers.begin(prompt, number)
    for _ in speakers.rounds(turn):
        pass
    speakers.judge(turn)
    return turn


def packed_hydra(folder: Path) -> HydraModel:
    """The same on a base of 8 bits."""
    save_stage1(folder, tiny_trunk("llama"), tokenizer(), None)
    config = ModelConfig(quantization="int8", device="cpu", offline=True)
    return HydraModel.from_pretrained(str(folder), model=config, lora=LORA)


@pytest.mark.parametrize("method", [*METHODS, "8 bits"])
def test_responses_scores_and_kl_are_those_of_rollouts(method: str, tmp_path: Path) -> None:
    """The KL and the scores again from `collect_rollout`, with the tokens that were shown."""
    hydra = packed_hydra(tmp_path) if method == "8 bits" else tiny_hydra(method)
    randomise_adapters(hydra)
    if hydra.table["actor"].adapter is None:
        with torch.no_grad():
            for parameter in hydra.trunk("actor").parameters():
                parameter.mul_(1.1)
    speakers = speakers_of(hydra, temperature=0.7, min_response_tokens=8)
    turn = made(speakers)
    assert list(turn.answers) == ["actor", "reference"]
    assert turn.answers["actor"].ids != turn.answers["reference"].ids
    for role, answer in turn.answers.items():
        prompts = [TokenizedPrompt(turn.prompt_ids, PROMPT)]
        batch = prompt_batch(prompts, [0], 1, hydra.pad_id, hydra.device)
        responses = as_responses(batch, answer)
        config = speakers.recipe.ppo
        rollout = collect_rollout(
            hydra, batch, responses, config.reward, temperature=0.7, limits=speakers.limits, reward_fn=None
        )
        assert answer.score == pytest.approx(rollout.scores.item(), abs=1e-5)
        if role == "actor":
            assert answer.kl == pytest.approx(sequence_kl(rollout).item(), abs=1e-4)
            assert abs(answer.kl) > 1e-2
        else:
            assert answer.kl is None
        assert answer.text == speakers.chat.decode_response(answer.ids, hydra.stop_ids(None))
        assert answer.seconds > 0


def as_responses(batch: PromptBatch, answer: chat_stage.Answer) -> Responses:
    """One answer as a rollout has it."""
    tokens = torch.tensor([answer.ids])
    mask = torch.ones_like(tokens).bool()
    return Responses(
        batch=TokenBatch(
            tokens=torch.cat([batch.tokens, tokens], dim=1),
            attention_mask=torch.cat([batch.attention_mask, mask], dim=1),
            response_mask=mask,
        ),
        logprobs=torch.tensor([answer.logprobs]),
        texts=[answer.text],
        ended=torch.tensor([answer.ended]),
    )


def test_with_no_lora_both_say_the_same_and_the_kl_is_zero() -> None:
    turn = made(speakers_of(tiny_hydra("hydra-ppo")))
    actor, reference = turn.answers["actor"], turn.answers["reference"]
    assert actor.ids == reference.ids
    assert actor.score == reference.score
    assert actor.kl == pytest.approx(0.0, abs=1e-5)


def test_both_advance_together_and_a_later_turn_draws_anew() -> None:
    hydra = tiny_hydra("hydra-ppo")
    randomise_adapters(hydra)
    speakers = speakers_of(hydra, min_response_tokens=8)
    turn = speakers.begin(PROMPT, 0)
    seen = [[len(answer.ids) for answer in turn.answers.values()] for _ in speakers.rounds(turn)]
    assert seen == [[n, n] for n in range(1, 9)] + [[8, 8]]
    assert turn.answers["actor"].score is None
    again, later = made(speakers), made(speakers, number=1)
    assert again.answers["actor"].ids == turn.answers["actor"].ids
    assert later.answers["actor"].ids != turn.answers["actor"].ids


def test_who_is_stopped_is_scored_as_far_as_it_came() -> None:
    speakers = speakers_of(tiny_hydra("hydra-ppo"), min_response_tokens=8)
    turn = speakers.begin(PROMPT, 0)
    for _ in speakers.rounds(turn):
        if len(turn.answers["actor"].ids) == 3:
            break
    speakers.judge(turn)
    assert [len(answer.ids) for answer in turn.answers.values()] == [3, 3]
    assert turn.answers["actor"].score is not None
    assert not turn.answers["actor"].ended


@pytest.mark.parametrize(
    ("missing", "roles", "has_score", "has_kl"),
    [
        (("reward",), ("actor", "reference"), False, True),
        (("critic",), ("actor", "reference"), True, True),
        (("critic", "reward"), ("actor", "reference"), False, True),
        (("reference", "critic"), ("actor",), True, False),
        (("reference", "critic", "reward"), ("actor",), False, False),
    ],
)
def test_a_method_without_some_roles(
    missing: tuple[str, ...], roles: tuple[str, ...], has_score: bool, has_kl: bool
) -> None:
    whole = tiny_hydra("hydra-ppo")
    table = without_roles(whole.table, *missing)
    hydra = HydraModel(table, {"hydra": whole.trunk("hydra").plain_copy()}, whole.tokenizer, lora=whole.lora)
    turn = made(speakers_of(hydra))
    assert tuple(turn.answers) == roles
    assert (turn.answers["actor"].score is not None) == has_score
    assert (turn.answers["actor"].kl is not None) == has_kl


def test_temperatures_and_back() -> None:
    speakers = speakers_of(tiny_hydra("hydra-ppo"), top_k=7, temperature=0.9)
    greedy = speakers.changed(temperature=0)
    assert (greedy.sampling.temperature, greedy.sampling.top_k) == (1.0, 1)
    back = greedy.changed(temperature=0.7, max_tokens=5)
    assert (back.sampling.temperature, back.sampling.top_k, back.sampling.max_response_tokens) == (0.7, 7, 5)
    assert made(greedy).answers["actor"].ids == made(greedy, number=1).answers["actor"].ids


def said(*texts: str) -> list[Message]:
    """A conversation that begins with the user."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def test_what_does_not_fit_the_positions_is_left_out_on_the_left() -> None:
    """64 positions and 8 tokens of response leave 56; the template takes some ten tokens a message."""
    speakers = speakers_of(tiny_hydra("hydra-ppo"), template="plain")
    short = speakers.begin(said("a cat"), 0)
    assert short.notices == []
    long = said("a " * 30, "b", "c", "d", "the cat")
    turn = speakers.begin(long, 0)
    assert turn.prompt == long[2:]
    assert turn.notices == ["2 of the oldest messages left out: the model has room for 56 tokens before a response"]
    assert len(turn.prompt_ids) <= 56
    made(speakers, long)  # and what is left can be answered
    alone = speakers.begin(said("cat " * 60), 0)
    assert len(alone.prompt_ids) == 56
    assert alone.notices == [
        "the beginning of the prompt was cut off: the model has room for 56 tokens before a response"
    ]
    system: list[Message] = [{"role": "system", "content": "be brief"}]
    assert speakers.begin([*system, *long], 0).prompt == [*system, long[-1]]
    with pytest.raises(ConfigError, match="responses of 64 tokens do not fit this model, which has 64 positions"):
        speakers.changed(max_tokens=64)
    assert speakers.changed(max_tokens=63).begin("the cat", 0).prompt_ids


def test_prompts_that_are_no_text_are_refused() -> None:
    speakers = speakers_of(tiny_hydra("hydra-ppo"))
    with pytest.raises(DataError, match="is not UTF-8"):
        speakers.begin("caf\udce9", 0)


def test_half_a_character_waits_for_its_other_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary has no token for a whole euro sign, so its three bytes are three tokens."""
    hydra = tiny_hydra("hydra-ppo")
    speakers = speakers_of(hydra)
    ids = hydra.tokenizer("a€b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    shown = texts_while_drawing(speakers, [*ids, 2], monkeypatch)
    assert shown == ["a", "a", "a", "a€", "a€b", "a€b"]
    # What never becomes a character is shown when the next token or the end makes that sure.
    assert texts_while_drawing(speakers, ids[:3] + ids[-1:] + ids[1:2], monkeypatch)[-3:] == [
        "a\ufffdb",
        "a\ufffdb",
        "a\ufffdb\ufffd",
    ]


def texts_while_drawing(speakers: Speakers, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What can be read of the actor's response after each round, if it draws these ids."""

    def drawn(*_args: Any, **_kwargs: Any) -> Any:
        return (DrawnToken(number, 0.0, number == 2) for number in ids)

    monkeypatch.setattr(chat_stage, "stream_tokens", drawn)
    turn = speakers.begin(PROMPT, 0)
    return [turn.answers["actor"].text for _ in speakers.rounds(turn)]


def test_memory_that_runs_out_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(work: Callable[..., Any], *arguments: Any) -> MemoryFailure:
        return MemoryFailure("no bytes left")

    monkeypatch.setattr(chat_stage, "attempt", attempt)
    with pytest.raises(OutOfMemoryError, match=r"a prompt of \d+ tokens and up to 8 more; .*no bytes left"):
        made(speakers_of(tiny_hydra("hydra-ppo")))


def test_a_turn_for_scripts() -> None:
    turn = made(speakers_of(tiny_hydra("hydra-ppo"), min_response_tokens=8))
    found = turn.as_dict()
    assert list(found) == ["prompt", "actor", "reference", "kl", "notices"]
    assert found["prompt"] == PROMPT
    assert found["actor"] == {
        "response": turn.answers["actor"].text,
        "score": turn.answers["actor"].score,
        "tokens": 8,
        "ended": turn.answers["actor"].ended,
        "tokens_per_s": pytest.approx(8 / turn.answers["actor"].seconds, abs=0.1),
    }
    assert_close(found["kl"], turn.answers["actor"].kl)
