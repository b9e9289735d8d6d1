"""Templates, stop tokens, cuts and the way back, with tokenizers of every kind."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_rlhf.config import DataConfig
from hydra_rlhf.data.formats import (
    CutCounts,
    TokenizedDemonstration,
    TokenizedPair,
    TokenizedPrompt,
    chat_format,
    token_statistics,
)
from hydra_rlhf.data.rows import Demonstration, PreferencePair, Prompt
from hydra_rlhf.data.scratch_tokenizer import scratch_tokenizer
from hydra_rlhf.errors import ConfigError, DataError

TEXTS = ["User: Hi\n\nAssistant: Hello there, how can I help?", "What time do you close? At six."] * 2
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
TALK = [SYSTEM, USER, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]
TEMPLATE = (
    "{% for m in messages %}{{ bos_token if loop.first }}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EOS = 2


@pytest.fixture(scope="module")
def scratch():
    """Byte-level BPE that puts a `<bos>` (1) before prompts; `<eos>` is 2."""
    return scratch_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def stories(shared_dir):
    """A SentencePiece-like tokenizer with a word mark before every text and no pad token."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260k")


def with_backend(tokenizer, **parts):
    """A copy of a tokenizer with other parts in its backend."""
    changed = copy.deepcopy(tokenizer)
    for name, part in parts.items():
        setattr(changed.backend_tokenizer, name, part)
    return changed


def closing(tokenizer, single):
    """A copy whose own special tokens are those of `single`, e.g. `<bos> $A <eos>`."""
    from tokenizers.processors import TemplateProcessing

    return with_backend(
        tokenizer, post_processor=TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    )


def made(tokenizer, *, eos_id=EOS, prompts=(), **settings):
    return chat_format(DataConfig(**settings), tokenizer, prompts, eos_id=eos_id)


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_plain_template(scratch):
    chat = made(scratch, chat_template="plain")
    expected = "System: Be brief.\n\nUser: Hi\n\nAssistant: Yes?\n\nUser: Why?\n\nAssistant:"
    assert chat.render_prompt(TALK) == expected
    assert chat.render_prompt("Hi") == "User: Hi\n\nAssistant:"
    assert chat.encode_prompt(TALK) == ([1, *bare(scratch, expected)], False)
    assert chat.encode_response("Six.") == ([*bare(scratch, " Six."), EOS], False)
    joined = chat.encode_prompt("Hi")[0] + chat.encode_response("Six.")[0]
    assert scratch.decode(joined) == "<bos>User: Hi\n\nAssistant: Six.<eos>"


def test_strings_as_they_are(scratch):
    chat = made(scratch, chat_template="none")
    assert chat.render_prompt("  Hi\n") == "  Hi\n"
    assert chat.render_prompt([USER]) == "Hi"
    assert chat.encode_response("Six.")[0] == [*bare(scratch, "Six."), EOS]
    with pytest.raises(ConfigError, match=r"data\.chat_template=none .* a conversation of 4 messages.*=plain"):
        chat.render_prompt(TALK)


def test_the_tokenizers_own_template(scratch):
    tokenizer = copy.deepcopy(scratch)
    tokenizer.chat_template = TEMPLATE
    chat = made(tokenizer)
    assert chat.template == "tokenizer"
    assert chat.render_prompt([SYSTEM, USER]) == "<bos><system>Be brief.<user>Hi<assistant>"
    # One BOS, the template's: the tokenizer must not add another.
    assert chat.encode_prompt("Hi")[0] == [1, *bare(scratch, "<user>Hi<assistant>")]
    assert chat.encode_response("Six.")[0] == [*bare(scratch, "Six."), EOS]


def test_a_template_that_refuses_a_prompt_is_a_data_error(scratch):
    tokenizer = copy.deepcopy(scratch)
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    chat = made(tokenizer)
    assert chat.render_prompt("Hi") == "x"
    with pytest.raises(DataError, match=r"roles system, user \(no system\); set data\.chat_template=plain"):
        chat.render_prompt([SYSTEM, USER])


def test_which_template_is_taken(scratch):
    messages, text = [Prompt("a"), Prompt([USER])], [Prompt("a")]
    assert made(scratch, prompts=messages).template == "plain"
    assert made(scratch, prompts=text).template == "none"
    assert made(scratch, prompts=text, chat_template="plain").template == "plain"
    with pytest.raises(ConfigError, match="this tokenizer has no chat template"):
        made(scratch, chat_template="tokenizer")
    tokenizer = copy.deepcopy(scratch)
    tokenizer.chat_template = TEMPLATE
    assert made(tokenizer, prompts=text).template == "tokenizer"
    assert made(tokenizer, prompts=text, chat_template="none").template == "none"


@pytest.mark.parametrize("single", ["<bos> $A <eos>", "$A <eos>"])
def test_prompts_never_end_with_the_stop_token(scratch, single):
    tokenizer = closing(scratch, single)
    assert tokenizer("Hi")["input_ids"][-1] == EOS
    begin = [1] if single.startswith("<bos>") else []
    chat = made(tokenizer, chat_template="none")
    assert chat.encode_prompt("Hi")[0] == begin + bare(scratch, "Hi")
    assert chat.encode_response("Six.")[0] == [*bare(scratch, "Six."), EOS], "one stop token, not two"


def test_special_tokens_written_in_a_response_are_text(scratch):
    chat = made(scratch, chat_template="none")
    ids, _ = chat.encode_response("a<eos>b<pad>")
    assert ids.count(EOS) == 1
    assert chat.decode_response(ids, [EOS]) == "a<eos>b<pad>"
    assert scratch("a<eos>b", add_special_tokens=False)["input_ids"].count(EOS) == 1, "elsewhere they still count"


def test_any_of_several_stop_tokens_ends_a_response(scratch):
    chat = made(scratch, chat_template="none", eos_id=1)
    six = bare(scratch, "Six.")
    assert chat.encode_response("Six.")[0] == [*six, 1]
    full_stop = six[-1]
    assert chat.decode_response([*six, 1], [1, EOS]) == "Six."
    assert chat.decode_response([*six, EOS], (1, EOS)) == "Six."
    assert chat.decode_response(six, [full_stop]) == scratch.decode(six[:-1]), "an ordinary token may be a stop token"
    assert chat.decode_response(six, [EOS]) == "Six."
    assert chat.decode_response([], [EOS]) == ""


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_no_pad_token_and_pad_equal_to_eos(scratch, pad):
    tokenizer = copy.deepcopy(scratch)
    tokenizer.pad_token = pad
    chat = made(tokenizer, chat_template="plain")
    ids, _ = chat.encode_response("Six.")
    assert ids == [*bare(scratch, " Six."), EOS]
    assert chat.decode_response(ids, [EOS]) == "Six."


@pytest.mark.parametrize("template", ["plain", "none"])
@given(text=st.text(min_size=1))
def test_responses_come_back(scratch, template, text):
    chat = made(scratch, chat_template=template, max_response_tokens=10_000)
    ids, cut = chat.encode_response(text)
    assert not cut
    assert chat.decode_response(ids, [EOS]) == text


@pytest.mark.parametrize("template", ["plain", "none"])
@pytest.mark.parametrize(
    "text", ["there was a cat", " two  spaces ", ", so", "\n\nLine", "é😀", "a</s><s>b", "1<unk>2"]
)
def test_responses_come_back_with_a_word_mark_before_every_text(stories, template, text):
    chat = made(stories, chat_template=template)
    assert chat.response_prefix == "", "the word mark is the space"
    ids, _ = chat.encode_response(text)
    assert ids[-1] == EOS
    assert EOS not in ids[:-1]
    assert stories.convert_ids_to_tokens(ids[0]).startswith("▁")
    assert chat.decode_response(ids, [EOS, 1]) == text


def test_a_word_mark_tokenizer_joins_prompt_and_response_with_one_space(stories):
    chat = made(stories, chat_template="plain")
    joined = chat.encode_prompt("Hi")[0] + chat.encode_response("Six.")[0]
    assert stories.decode(joined, skip_special_tokens=True) == "User: Hi\n\nAssistant: Six."
    # A sampled continuation inside a word has no mark, and keeps its text.
    within = stories.convert_tokens_to_ids(["s", ",", "▁he"])
    assert chat.decode_response(within, [EOS]) == "s, he"


def test_a_byte_level_tokenizer_that_adds_its_own_space(scratch):
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = with_backend(scratch, pre_tokenizer=ByteLevel(add_prefix_space=True))
    chat = made(tokenizer, chat_template="plain")
    assert chat.response_prefix == ""
    ids, _ = chat.encode_response("Six.")
    assert ids == [*bare(scratch, " Six."), EOS]
    assert chat.decode_response(ids, [EOS]) == "Six."


def test_prompts_are_cut_on_the_left_and_keep_their_bos(scratch):
    text = "What time do you close? At six."
    ids = bare(scratch, text)
    chat = made(scratch, chat_template="none", max_prompt_tokens=4)
    assert chat.encode_prompt(text) == ([1, *ids[-3:]], True)
    assert made(scratch, chat_template="none", max_prompt_tokens=len(ids) + 1).encode_prompt(text) == ([1, *ids], False)
    assert made(scratch, chat_template="none", max_prompt_tokens=1).encode_prompt(text) == (ids[-1:], True)
    no_bos = closing(scratch, "$A")
    assert made(no_bos, chat_template="none", max_prompt_tokens=4).encode_prompt(text) == (ids[-4:], True)


def test_responses_are_cut_on_the_right_and_lose_their_stop_token(scratch):
    ids = bare(scratch, "At six.")
    whole = made(scratch, chat_template="none", max_response_tokens=len(ids) + 1)
    assert whole.encode_response("At six.") == ([*ids, EOS], False)
    cut = made(scratch, chat_template="none", max_response_tokens=len(ids))
    assert cut.encode_response("At six.") == (ids, True), "the stop token was the one that did not fit"


def test_pairs_with_their_cuts_counted(scratch):
    # <bos> and three tokens fit before, three tokens after; x, y, z, w and the digits are single bytes.
    chat = made(scratch, chat_template="none", max_prompt_tokens=4, max_response_tokens=3)
    one = {text: bare(scratch, text)[0] for text in "xyzw123"}
    pairs = [
        PreferencePair("xyz", "12", "3"),
        PreferencePair("wxyz", "123", "3"),
        PreferencePair("x", "123x", "123y"),
        PreferencePair("x", "123x", "321x"),
    ]
    tokenized, counts = chat.tokenize_pairs(pairs)
    x, y, z = one["x"], one["y"], one["z"]
    first, second, third = one["1"], one["2"], one["3"]
    assert tokenized == [
        TokenizedPair([1, x, y, z], [first, second, EOS], [third, EOS]),
        TokenizedPair([1, x, y, z], [first, second, third], [third, EOS]),
        TokenizedPair([1, x], [first, second, third], [third, second, first]),
    ]
    assert counts == CutCounts(prompt_tokens_cut=1, response_tokens_cut=2, equal_after_cut=1)


def test_demonstrations_and_prompts(scratch):
    chat = made(scratch, chat_template="none", max_prompt_tokens=3, max_response_tokens=2)
    x, y, one = (bare(scratch, text)[0] for text in "xy1")
    tokenized, counts = chat.tokenize_demonstrations([Demonstration("x", "1"), Demonstration("yxy", "11")])
    assert tokenized == [TokenizedDemonstration([1, x], [one, EOS]), TokenizedDemonstration([1, x, y], [one, one])]
    assert counts == CutCounts(prompt_tokens_cut=1, response_tokens_cut=1)
    prompts, counts = chat.tokenize_prompts([Prompt("x", {"id": 7}), Prompt("yxy")])
    assert prompts == [TokenizedPrompt([1, x], "x", {"id": 7}, "x"), TokenizedPrompt([1, x, y], "xy", {}, "yxy")]
    assert counts == CutCounts(prompt_tokens_cut=1)


def test_prompt_texts_carry_their_template(scratch):
    prompts, _ = made(scratch, chat_template="plain").tokenize_prompts([Prompt([USER])])
    assert prompts[0].text == "User: Hi\n\nAssistant:"


def test_a_prompt_without_tokens_is_refused(scratch):
    from tokenizers.normalizers import Replace

    tokenizer = with_backend(closing(scratch, "$A"), normalizer=Replace("x", ""))
    with pytest.raises(DataError, match="no tokens in the prompt 'xx'"):
        made(tokenizer, chat_template="none").encode_prompt("xx")


def test_percentiles_are_nearest_ranks():
    # Of ten values the first is the 10th percentile, the fifth the 50th and the ninth the 90th.
    assert token_statistics([10, 1, 9, 2, 8, 3, 7, 4, 6, 5]) == {"p10": 1, "p50": 5, "p90": 9, "max": 10}
    assert token_statistics([4]) == {"p10": 4, "p50": 4, "p90": 4, "max": 4}
    # Of three: ranks ceil(0.3) = 1, ceil(1.5) = 2, ceil(2.7) = 3.
    assert token_statistics([30, 10, 20]) == {"p10": 10, "p50": 20, "p90": 30, "max": 30}
    assert token_statistics([]) == {}
