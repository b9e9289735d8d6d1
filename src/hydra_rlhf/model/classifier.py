"""Reward models of others: any sequence classifier of transformers, with a tokenizer of its own."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hydra_rlhf.data.rows import Message, PromptValue
from hydra_rlhf.errors import ModelError
from hydra_rlhf.model.load import first_line, pick_device

Form = Literal["chat", "pair", "text"]
"""How prompt and response become one input: the tokenizer's chat template, its pair of texts, or one after the other
with the stop token."""
UNLIMITED = 1_000_000
"""Tokenizers without a limit name a larger number than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardClassifier:
    """A loaded classifier and how texts are put to it."""

    model: Any
    """A transformers model for sequence classification."""
    tokenizer: PreTrainedTokenizerBase
    form: Form
    max_tokens: int
    """Longer inputs keep their last tokens: those of the response."""

    @torch.no_grad()
    def scores(self, prompts: Sequence[tuple[PromptValue, str]], responses: Sequence[str]) -> list[float]:
        """One score per response; a prompt is given as in the data and as one string.

        With one label its logit, with two the second's above the first's. Rows of equal length go together, so nothing
        is ever padded; without a pad token transformers reads the last token of single rows only.
        """
        rows = [self.ids(*prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            groups[len(row) if self.model.config.pad_token_id is not None else -number].append(number)
        found = [0.0] * len(rows)
        device = next(self.model.parameters()).device
        for members in groups.values():
            for start in range(0, len(members), 16):
                batch = members[start : start + 16]
                logits = self.model(input_ids=torch.tensor([rows[i] for i in batch], device=device)).logits.float()
                values = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
                for number, value in zip(batch, values.tolist(), strict=True):
                    found[number] = value
        return found

    def ids(self, prompt: PromptValue, prompt_text: str, response: str) -> list[int]:
        """One input as ids."""
        if self.form == "chat":
            messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
            turns.append({"role": "assistant", "content": response})
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            assert isinstance(text, str)
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        elif self.form == "pair":
            ids = self.tokenizer(prompt_text, response, verbose=False)["input_ids"]
        else:
            ids = list(self.tokenizer(prompt_text, verbose=False)["input_ids"])
            ids += self.tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
            if self.tokenizer.eos_token_id is not None:
                ids.append(self.tokenizer.eos_token_id)
        return list(ids)[-self.max_tokens :]


def load_classifier(path: str, *, form: Form | None, device: str = "auto") -> RewardClassifier:
    """A classifier with one or two labels from a folder or a hub name, and its tokenizer; safetensors only, and none of
    the repository's own code. `form` None takes what the tokenizer is made for. Raises `ModelError`."""
    local = Path(path)
    if local.is_dir() and not any(local.glob("*.safetensors")):
        raise ModelError(f"{path} holds no .safetensors file; other weight formats are not read, convert it first")
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded as a sequence classifier: {first_line(error)}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{path} lacks {len(missing)} weights of a classifier, e.g. {missing[0]}; it is no reward model"
        )
    if model.config.num_labels not in (1, 2):
        raise ModelError(f"{path} classifies into {model.config.num_labels} labels; a reward model has one, or two")
    if form is None:
        form = "chat" if tokenizer.chat_template else "pair" if tokenizer.sep_token is not None else "text"
    if form == "chat" and not tokenizer.chat_template:
        raise ModelError(f"{path}: its tokenizer has no chat template; give form=pair or form=text")
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or UNLIMITED]
    return RewardClassifier(
        model=model.to(pick_device(device)).eval(), tokenizer=tokenizer, form=form, max_tokens=min(limits)
    )
