"""An external reward model: any sequence-classification model of transformers, with its own base and tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hydra_rlhf.config_rewards import ClassifierSource
from hydra_rlhf.errors import DataError, ModelError
from hydra_rlhf.model.load import DTYPES, first_line, pick_device


class Classifier:
    """Scores (prompt, response) pairs with one output of a classifier, without gradients and without dropout."""

    def __init__(self, config: ClassifierSource, *, offline: bool = False, trust_remote_code: bool = False) -> None:
        """Read config and tokenizer only, so that a wrong path is told at once; `load` reads the weights."""
        self.config = config
        self._options = {
            "revision": config.revision,
            "local_files_only": offline,
            "trust_remote_code": trust_remote_code,
        }
        local = Path(config.path)
        if local.is_dir() and not any(local.glob("*.safetensors")):
            raise ModelError(f"{config.path} holds no .safetensors file; other weight formats are not read, convert it")
        try:
            model_config = AutoConfig.from_pretrained(config.path, **self._options)
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.path, **self._options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise self._refusal(error) from error
        self.label = chosen_label(config, int(model_config.num_labels or 1))
        self.join = chosen_join(config, has_template=bool(self.tokenizer.chat_template))
        self.tokenizer.padding_side = "right"  # a decoder's score is read at its last token, the one before padding
        self.tokenizer.truncation_side = "left"  # the end of the response is what must not be lost
        self._trained_pad_id = model_config.get_text_config().pad_token_id
        self._model: PreTrainedModel | None = None

    def load(self) -> PreTrainedModel:
        """The model, loaded at the first call. Raises `ModelError`."""
        if self._model is None:
            try:
                loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                    self.config.path,
                    dtype=DTYPES[self.config.dtype],
                    use_safetensors=True,
                    output_loading_info=True,
                    **self._options,
                )
            except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
                raise self._refusal(error) from error
            model, report = loaded
            missing = sorted(report["missing_keys"])
            if missing:  # transformers would make them up, differently each time
                raise ModelError(
                    f"{self.config.path} lacks {len(missing)} weights of {type(model).__name__}, e.g. {missing[0]}; is "
                    "it a sequence classifier?"
                )
            model.requires_grad_(False)
            self._model = model.eval().to(pick_device(self.config.device))
        return self._model

    def score(self, prompts: Sequence[str], originals: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """One number per response. `prompts` are texts; `originals` the same as the data has them, text or messages."""
        rows = list(zip(prompts, originals, responses, strict=True))
        # Alike in length together, so that little is padding; the order depends on the texts alone.
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]) + len(rows[i][2]), i))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.config.batch_rows):
            chosen = order[start : start + self.config.batch_rows]
            for row, score in zip(chosen, self._forward([rows[i] for i in chosen]), strict=True):
                scores[row] = score
        return scores

    @torch.no_grad()
    def _forward(self, rows: Sequence[tuple[str, Any, str]]) -> list[float]:
        model = self.load()
        features = [self._features(*row) for row in rows]
        pad_id = self._pad_id({token for feature in features for token in feature["input_ids"]})
        model.config.get_text_config().pad_token_id = pad_id
        batch = {
            name: padded([feature[name] for feature in features], pad_id if name == "input_ids" else 0, model.device)
            for name in features[0]
        }
        return model(**batch).logits[:, self.label].float().tolist()

    def _pad_id(self, used: set[int]) -> int:
        """What to pad with: a decoder reads its score at the last token that is not this one.

        So it is what the model was trained with; where neither it nor its tokenizer has one, an id that no text holds.
        """
        known: tuple[Any, ...] = (self._trained_pad_id, self.tokenizer.pad_token_id)
        for pad_id in known:
            if pad_id is not None:
                return int(pad_id)
        return next(token for token in range(len(used) + 1) if token not in used)

    def _features(self, prompt: str, original: Any, response: str) -> dict[str, list[int]]:
        """Ids, mask (and segment ids, where the tokenizer has them) of one prompt and response."""
        options: dict[str, Any] = {"max_length": self.config.max_tokens, "verbose": False}
        if self.join == "pair":
            return dict(self.tokenizer(prompt, response, truncation="longest_first", **options))
        if self.join == "text":
            return dict(self.tokenizer(prompt + response, truncation=True, **options))
        messages = [{"role": "user", "content": original}] if isinstance(original, str) else list(original)
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        messages.append({"role": "assistant", "content": response})
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates are Jinja programs of their authors and raise what they like
            raise DataError(
                f"the chat template of the reward source {self.config.name!r} refuses a conversation with the roles "
                f"{', '.join(message['role'] for message in messages)} ({error}); set its join to pair or text"
            ) from error
        assert isinstance(text, str)
        # The template has written the special tokens itself.
        return dict(self.tokenizer(text, truncation=True, add_special_tokens=False, **options))

    def _refusal(self, error: Exception) -> ModelError:
        return ModelError(
            f"path={self.config.path!r} of the reward source {self.config.name!r} cannot be loaded as a sequence "
            f"classifier: {first_line(error)}"
        )


def chosen_label(config: ClassifierSource, num_labels: int) -> int:
    """Which output is the score. Raises `ModelError` where the settings do not say it, or wrongly."""
    if config.label is None and num_labels > 1:
        raise ModelError(
            f"the reward source {config.name!r}: {config.path} has {num_labels} outputs; say which is the score with "
            f"label: 0 to {num_labels - 1}"
        )
    label = config.label or 0
    if label >= num_labels:
        raise ModelError(f"label={label} of the reward source {config.name!r}: {config.path} has {num_labels} outputs")
    return label


def chosen_join(config: ClassifierSource, *, has_template: bool) -> str:
    """How prompt and response are put together. Raises `ModelError` for a template that is not there."""
    if config.join == "template" and not has_template:
        raise ModelError(
            f"join=template of the reward source {config.name!r}, but {config.path} has no chat template; use "
            "join: pair or text"
        )
    if config.join == "auto":
        return "template" if has_template else "text"
    return config.join


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> torch.Tensor:
    """Rows of different lengths as one tensor, filled up on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)
