"""Judges by name: what each spec means, what is refused, and what judges say of a few answers."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from chat_server import chat_server
from contract.tiny import tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from hydra_rlhf.config_rewards import ClassifierSource
from hydra_rlhf.errors import ConfigError, JudgeError, RewardFunctionError
from hydra_rlhf.evaluation.answers import Answers, Questions, as_text
from hydra_rlhf.evaluation.best_of import best_of_n_kl_bound
from hydra_rlhf.evaluation.judges import Setting, default_judges, read_judge
from hydra_rlhf.evaluation.texts import distinct_n, rouge
from hydra_rlhf.evaluation.tournament import hold_tournament
from hydra_rlhf.model.classifier import Classifier

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "go"}]


def questions(num=3):
    prompts = [f"question {k}" for k in range(num)]
    return Questions(prompts=prompts, columns=[{"limit": k} for k in range(num)], references=["r"] * num)


def answers(player, texts):
    return Answers(
        player=player,
        run=player,
        checkpoint="last",
        texts=texts,
        ended=[True] * len(texts),
        num_tokens=[1] * len(texts),
    )


@pytest.fixture
def setting(tmp_path):
    return Setting(run=tmp_path, is_world=False)


def test_conversations_as_text():
    assert as_text("plain") == "plain"
    assert as_text(TALK) == "User: hi\n\nAssistant: yes?\n\nUser: go"
    asked = Questions(prompts=["a", TALK], columns=[{}, {}], references=["", ""])
    assert asked.bare_texts == ["a", "hiyes?go"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("silver", "there is no such judge; use gold"),
        ("gold:1", "there is no such judge"),
        ("rule:", "there is no such judge"),
        ("gold", "only the built-in world"),
        ("rule:nonsense", "not of the form module:function"),
        ("rule:no_such_module:f", "cannot be imported"),
        ("classifier:x,join=odd", "join=odd is not one of auto, template, pair, text"),
        ("classifier:x,label=-1", "label=-1 is not a number of at least 0"),
        ("classifier:x,colour=red", "colour is no option; there are join, label, device"),
        ("llm:model", "write llm:MODEL@URL"),
        ("llm:@http://127.0.0.1/v1", "write llm:MODEL@URL"),
        ("llm:m@http://127.0.0.1/v1,parallel=0", "parallel=0 is not a number of at least 1"),
        ("llm:m@http://127.0.0.1/v1,timeout=nan", "timeout=nan is not a number"),
        ("llm:m@http://127.0.0.1/v1,speed=1", "speed is no option"),
        ("llm:m@http://127.0.0.1/v1,key=NO_SUCH_KEY_HERE", "no variable NO_SUCH_KEY_HERE"),
        ("llm:m@http://127.0.0.1/v1,prompt=/no/such/file", "neither helpfulness, summary nor a file"),
    ],
)
def test_specs_that_are_refused(spec, words, setting):
    with pytest.raises(ConfigError, match=words):
        read_judge(spec, setting)


def test_a_prompt_file_needs_all_three_places(setting, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Compare {response_a} with the other one, for {prompt}")
    with pytest.raises(ConfigError, match=r"no place \{response_b\}"):
        read_judge(f"llm:m@http://127.0.0.1/v1,prompt={file}", setting)


def test_options_of_an_llm_judge(setting, tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "k-1")
    monkeypatch.delenv("HYDRA_RLHF_JUDGE_KEY", raising=False)
    plain = read_judge("llm:org/model:free@http://127.0.0.1:1/v1", setting).llm
    assert (plain.model, plain.endpoint.url, plain.endpoint.key) == ("org/model:free", "http://127.0.0.1:1/v1", None)
    assert plain.options == {"temperature": 0.0, "max_tokens": 512}
    assert plain.endpoint.cache == tmp_path / "judge_cache"
    options = "prompt=summary,key=OTHER_KEY,parallel=2,retries=1,timeout=3,temperature=default,max-tokens=9,cache=c"
    other = read_judge(f"llm:m@https://example.org/v1,{options}", setting).llm
    assert other.options == {"max_tokens": 9}
    assert (other.num_parallel, other.endpoint.num_retries, other.endpoint.timeout_s) == (2, 1, 3.0)
    assert (other.endpoint.key, str(other.endpoint.cache)) == ("k-1", "c")
    assert "post" in other.template


def test_what_judges_by_default(tmp_path):
    assert default_judges(Setting(run=tmp_path, is_world=True)) == ["gold", "reward-head"]
    assert default_judges(Setting(run=tmp_path, is_world=False)) == ["reward-head"]
    headless = Setting(run=tmp_path, is_world=True, has_reward=False)
    assert default_judges(headless) == ["gold"]
    with pytest.raises(ConfigError, match="has no reward head; name a run that has one"):
        read_judge("reward-head", headless)
    with pytest.raises(ConfigError, match="name a judge"):
        default_judges(Setting(run=tmp_path, is_world=False, has_reward=False))


@pytest.fixture
def rules(tmp_path, monkeypatch):
    (tmp_path / "house_rules.py").write_text(
        "def words(prompts, responses): return [len(r.split()) for r in responses]\n"
        "def limits(prompts, responses, limit): return [-abs(len(r) - n) for r, n in zip(responses, limit)]\n"
        "def broken(prompts, responses): raise KeyError('x')\n"
        "def short(prompts, responses): return [1.0]\n"
        "def nan(prompts, responses): return [float('nan')] * len(responses)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "house_rules", raising=False)  # other tests have house rules of their own
    yield
    sys.modules.pop("house_rules", None)


@pytest.mark.usefixtures("rules")
def test_rules(setting):
    asked, given = questions(), [answers("a", ["x", "y z", "u v w"])]
    assert read_judge("rule:house_rules:words", setting).score(asked, given) == [[1.0, 2.0, 3.0]]
    assert read_judge("rule:house_rules:limits", setting).score(asked, given) == [[-1.0, -2.0, -3.0]]
    for name, words in (("broken", "raised KeyError"), ("short", "1 values for 3"), ("nan", "finite number")):
        with pytest.raises(RewardFunctionError, match=words):
            read_judge(f"rule:house_rules:{name}", setting).score(asked, given)


@pytest.mark.usefixtures("rules")
def test_a_tournament_by_hand(setting):
    """Words: start 1 2 3; long 2 2 4 (win, tie, win); two seeds of short, 0 and 1 word everywhere."""
    entries = [
        answers("start", ["x", "x x", "x x x"]),
        answers("long", ["x y", "x y", "x y z u"]),
        answers("short", [".", "", "x"]),
        answers("short", ["x", "y", "z"]),
    ]
    held = hold_tournament(read_judge("rule:house_rules:words", setting), questions(), entries, seed=0)
    assert held["judge"] == "rule:house_rules:words"
    matrix = held["win_rates"]
    assert [matrix[i][i] for i in range(3)] == [None] * 3
    cell = matrix[1][0]
    assert (cell["wins"], cell["ties"], cell["losses"], cell["failed"]) == (2, 1, 0, 0)
    assert cell["rate"] == pytest.approx(2.5 / 3)
    assert matrix[0][1]["rate"] == pytest.approx(0.5 / 3)
    assert matrix[0][1]["ci"] == pytest.approx([1 - cell["ci"][1], 1 - cell["ci"][0]])
    assert (matrix[0][1]["wins"], matrix[0][1]["losses"]) == (0, 2)
    # Start against short: seed 0 has 1 0 1 words (tie, win, win), seed 1 has 1 1 1 (tie, win, win): 5 of 6.
    assert matrix[0][2]["rate"] == pytest.approx(5 / 6)
    assert (matrix[0][2]["wins"], matrix[0][2]["ties"], matrix[0][2]["losses"]) == (4, 2, 0)
    assert held["mean_scores"] == pytest.approx({"start": 2.0, "long": 8 / 3, "short": 5 / 6})
    assert held["strengths"][0] == {"strength": 0.0, "ci": [0.0, 0.0]}
    assert held["strengths"][1]["strength"] > 0 > held["strengths"][2]["strength"]
    assert held["length_controlled_win_rates"][1][0]["rate"] == pytest.approx(
        1 - held["length_controlled_win_rates"][0][1]["rate"]
    )


def test_a_tournament_by_a_model_that_cannot_judge_everything(setting):
    def misbehave(_, body):
        return "malformed" if "question 1\n" in body["messages"][0]["content"] else ""

    entries = [answers("start", ["aa", "bb", "cc"]), answers("actor", ["a", "bbb", "ccc"])]
    with chat_server(misbehave=misbehave) as server:
        judge = read_judge(f"llm:m@{server.url},retries=0", setting)
        held = hold_tournament(judge, questions(), entries, seed=0)
        with pytest.raises(JudgeError, match="no comparison of start with actor"):
            hold_only_failures(judge)
    cell = held["win_rates"][1][0]
    assert (cell["wins"], cell["ties"], cell["losses"], cell["failed"]) == (1, 0, 1, 1)
    assert cell["rate"] == 0.5
    assert held["asked"]["num_failed"] == 1
    assert json.dumps(held)


def hold_only_failures(judge):
    asked = Questions(prompts=["question 1"], columns=[{}], references=[""])
    return hold_tournament(judge, asked, [answers("start", ["bb"]), answers("actor", ["bbb"])], seed=0)


def classifier_folder(folder, *, num_labels=1, pad=True):
    torch.manual_seed(3)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=num_labels,
        pad_token_id=0 if pad else None,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_classifier_scores_as_a_reward_source_does(tmp_path, setting):
    """With options; tests of how texts are put to it are those of the classifier itself."""
    folder = str(classifier_folder(tmp_path / "rm", num_labels=2))
    asked, given = questions(), [answers("actor", ["the cat", "mat", "the dog ran"])]
    ((found),) = read_judge(f"classifier:{folder},join=text,label=1", setting).score(asked, given)
    config = ClassifierSource(name="judge", kind="classifier", path=folder, join="text", label=1)
    assert found == Classifier(config).score(asked.texts, asked.prompts, given[0].texts)
    assert len(set(found)) == 3


def test_distinct_n():
    # the cat . the cat sat: 6 words of which 4 differ; pairs (the cat) (cat .) | (the cat) (cat sat): 3 of 4.
    assert distinct_n(["The cat.", "the cat sat"], 1) == pytest.approx(4 / 6)
    assert distinct_n(["The cat.", "the cat sat"], 2) == pytest.approx(3 / 4)
    assert distinct_n(["", "a"], 2) is None


def test_rouge():
    pytest.importorskip("rouge_score")
    # "the cat sat" in "the cat ran": 2 of 3 words both ways, one of two pairs; the other text is equal.
    found = rouge(["the cat sat", "a dog"], ["the cat ran", "a dog"], seed=0)
    assert found["rouge1"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["rouge2"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["rougeL"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["rouge1_ci"] == pytest.approx([2 / 3, 1.0])


def test_kl_bound_of_best_of_n():
    assert best_of_n_kl_bound(1) == 0.0
    assert best_of_n_kl_bound(4) == pytest.approx(math.log(4) - 0.75)
    assert np.isfinite(best_of_n_kl_bound(64))
