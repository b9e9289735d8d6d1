import pytest

from hydra_rlhf.runtime.environment import describe_environment, redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:hunter2@example.org/x", "https://***@example.org/x"),
        ("https://example.org/x?token=abc&y=1", "https://example.org/x?token=***&y=1"),
        ("https://example.org/x?y=1&X-Amz-Signature=abc", "https://example.org/x?y=1&X-Amz-Signature=***"),
        ("hf_" + "a1B2" * 9, "***"),
        ("/models/hf_llama_7b_instruct_with_a_long_name", "/models/hf_llama_7b_instruct_with_a_long_name"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("user@example.org", "user@example.org"),
    ],
)
def test_secrets_are_redacted_and_names_are_not(text, expected):
    assert redact({"a": [text, 1, None], "b": (text,)}) == {"a": [expected, 1, None], "b": [expected]}


def test_settings_whose_names_mention_tokens_are_kept():
    assert redact({"max_prompt_tokens": 256, "stop_token_ids": [1]}) == {
        "max_prompt_tokens": 256,
        "stop_token_ids": [1],
    }


def test_start_is_in_utc_and_commits_are_whole():
    environment = describe_environment()
    assert environment["started"].endswith("+00:00")
    assert environment["git"] is None or len(environment["git"]["commit"]) == 40
    assert environment["hardware"]["cpu"]
