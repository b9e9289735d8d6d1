"""The tokenizer of `scratch:` models: a byte-level BPE trained on the data, so that a run needs no network."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def scratch_tokenizer(
    texts: Iterable[str], vocab_size: int, *, model_max_length: int = 2048
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE over `texts` with at most `vocab_size` ids (at least 259: 256 bytes, pad, bos, eos).

    Prompts get a `<bos>`, nothing gets an EOS. Any UTF-8 text comes back as it was. The same texts in the same order
    give the same tokenizer. `model_max_length` is only written down in it; nothing is cut to it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    assert vocab_size >= 256 + len(SPECIAL_TOKENS), f"{vocab_size=} has no room for all bytes"
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # All bytes are in the vocabulary from the start, so no text is unknown.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
