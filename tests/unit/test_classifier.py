"""An external reward model: the same scores as the model gives row by row, whatever its kind and the batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract.tiny import LLAMA_LIKE, SHAPE, tokenizer
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hydra_rlhf.config_rewards import ClassifierSource
from hydra_rlhf.errors import DataError, ModelError
from hydra_rlhf.model.classifier import Classifier

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
PROMPTS = ["the cat", "on the mat the dog ran to the cat", "sat"]
RESPONSES = ["ran", "sat on the mat, the dog", "the cat sat on the mat"]


def save(folder: Path, model: Any, words: Any = None) -> Path:
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def decoder(folder: Path, words: Any = None, **settings: Any) -> Path:
    """A Llama with a score head, spread enough that every token matters."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(LlamaConfig(**(LLAMA_LIKE | {"num_labels": 1} | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return save(folder, model, words)


def encoder(folder: Path) -> Path:
    """A BERT with three outputs and much dropout."""
    torch.manual_seed(1)
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = BertConfig(**shape, intermediate_size=24, num_labels=3, hidden_dropout_prob=0.5, pad_token_id=0)
    return save(folder, BertForSequenceClassification(config))


def classifier(folder: Path, **settings: Any) -> Classifier:
    config = ClassifierSource(name="judge", kind="classifier", path=str(folder), device="cpu", **settings)
    return Classifier(config, offline=True)


def by_hand(folder: Path, texts: list[Any], label: int = 0, **options: Any) -> torch.Tensor:
    """The logits of the model as it was saved, row by row without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words = tokenizer()
    with torch.no_grad():
        rows = [model(**words(*text, return_tensors="pt", **options)).logits[0, label] for text in texts]
    return torch.stack(rows)


@pytest.mark.parametrize("batch_rows", [1, 2, 3])
def test_a_decoder_reads_its_score_at_the_last_token(batch_rows: int, tmp_path: Path) -> None:
    folder = decoder(tmp_path)
    found = classifier(folder, batch_rows=batch_rows).score(PROMPTS, PROMPTS, RESPONSES)
    expected = by_hand(folder, [(prompt + response,) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])
    assert expected.std() > 0.05
    assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_any_pad_token_needs_none(tmp_path: Path) -> None:
    """Padding with an id that some text holds would end the text there."""
    words = tokenizer()
    words.pad_token = None
    folder = decoder(tmp_path, words, pad_token_id=None)
    judge = classifier(folder)
    assert judge.tokenizer.pad_token_id is None
    found = judge.score(PROMPTS, PROMPTS, RESPONSES)
    expected = by_hand(folder, [(prompt + response,) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])
    assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)
    assert judge._pad_id({0, 1, 3}) == 2


def test_an_encoder_with_several_outputs_and_text_pairs(tmp_path: Path) -> None:
    folder = encoder(tmp_path)
    judge = classifier(folder, label=2, join="pair", batch_rows=2)
    found = judge.score(PROMPTS, PROMPTS, RESPONSES)
    expected = by_hand(folder, list(zip(PROMPTS, RESPONSES, strict=True)), label=2)
    assert expected.std() > 1e-3
    assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-4)
    assert judge.score(PROMPTS, PROMPTS, RESPONSES) == found, "no dropout"
    assert not any(parameter.requires_grad for parameter in judge.load().parameters())


def test_its_own_chat_template_joins_messages(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATE
    folder = decoder(tmp_path, words)
    originals = ["the cat", [{"role": "system", "content": "on"}, {"role": "user", "content": "the mat"}]]
    found = classifier(folder).score(["<x>the cat", "<x>on the mat"], originals, ["sat", "ran"])
    texts = [("<user>the cat<assistant>sat",), ("<system>on<user>the mat<assistant>ran",)]
    expected = by_hand(folder, texts, add_special_tokens=False)
    assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)
    as_text = classifier(folder, join="text").score(["the cat"], ["other"], ["sat"])
    assert_close(torch.tensor(as_text), by_hand(folder, [("the catsat",)]), atol=1e-4, rtol=1e-4)


def test_a_template_that_refuses_a_conversation_is_named(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = "{{ raise_exception('no system role') }}"
    judge = classifier(decoder(tmp_path, words))
    with pytest.raises(DataError, match=r"'judge' refuses a conversation with the roles user, assistant .*join"):
        judge.score(["a"], ["a"], ["b"])


def test_long_inputs_lose_tokens_on_the_left(tmp_path: Path) -> None:
    folder = decoder(tmp_path)
    judge = classifier(folder, max_tokens=6)
    features = judge._features("the dog ran " * 9, "", "to the cat")
    whole = tokenizer()("the dog ran " * 9 + "to the cat")["input_ids"]
    assert len(features["input_ids"]) == 6
    assert features["input_ids"][-4:] == whole[-4:]
    assert len(classifier(folder, max_tokens=6, join="pair")._features("a", "", "the cat ran " * 9)["input_ids"]) == 6


def test_models_that_cannot_score_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"path='no/such' of the reward source 'judge' cannot be loaded"):
        classifier(Path("no/such"))
    three = encoder(tmp_path / "three")
    with pytest.raises(ModelError, match=r"has 3 outputs; say which is the score with label: 0 to 2"):
        classifier(three)
    with pytest.raises(ModelError, match=r"label=3 .* has 3 outputs"):
        classifier(three, label=3)
    with pytest.raises(ModelError, match="has no chat template; use join: pair or text"):
        classifier(three, label=0, join="template")
    causal = save(tmp_path / "causal", LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, num_labels=1)))
    with pytest.raises(ModelError, match=r"lacks 1 weights of LlamaForSequenceClassification, e\.g\. score\.weight"):
        classifier(causal).load()
    (causal / "model.safetensors").rename(causal / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no \.safetensors file"):
        classifier(causal)
