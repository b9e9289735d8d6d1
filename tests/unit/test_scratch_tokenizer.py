"""The tokenizer of scratch models: any text comes back, and the same texts give the same tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_rlhf.data.scratch_tokenizer import scratch_tokenizer

TEXTS = ["Hello there, how can I help you today?", "The shop opens at 10 and closes at 6.", "Thank you. Goodbye!"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return scratch_tokenizer(TEXTS, 300)


def test_special_tokens_are_three_and_prompts_get_a_bos(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ids = tokenizer("Hello")["input_ids"]
    assert ids[0] == 1
    assert ids[1:] == tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert 2 not in ids
    assert tokenizer.model_max_length == 2048
    assert tokenizer.chat_template is None


def test_the_vocabulary_is_as_large_as_asked_and_was_learned(tokenizer):
    assert len(tokenizer) == 300
    # 3 special tokens and 256 bytes leave 41 merges, so what the texts repeat takes fewer ids than bytes.
    assert len(tokenizer("Hello there", add_special_tokens=False)["input_ids"]) < len("Hello there")
    with pytest.raises(AssertionError, match="no room"):
        scratch_tokenizer(TEXTS, 258)


@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_training_is_repeatable(tokenizer, tmp_path):
    again = scratch_tokenizer(iter(TEXTS), 300)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("Hello é")["input_ids"] == tokenizer("Hello é")["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.model_max_length) == (0, 2, 2048)
