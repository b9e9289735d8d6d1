"""Small random models and the recipe of `hydra-rlhf bench` for them, for benchmarks that call its functions."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra_rlhf.config import DataConfig, LoraConfig, MemoryConfig, ModelConfig, PPOConfig, Recipe, SamplingConfig


def llama_folder(folder: Path, *, hidden: int, layers: int, vocab: int) -> str:
    """A folder with the config of a Llama and no weights: heads of 64, MLPs of 8/3 of the width, tied embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def bench_recipe(
    path: str,
    *,
    batch: int,
    prompt: int,
    response: int,
    iterations: int,
    micro: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    rank: int = 16,
    targets: tuple[str, ...] = ("all-linear",),
    quantization: str = "none",
    budget: str = "auto",
    checkpointing: str = "auto",
    min_response: int | None = None,
    stop_token_ids: tuple[int, ...] | None = None,
) -> Recipe:
    """One epoch and one minibatch a step; responses have exactly `response` tokens unless `min_response` is less."""
    choices: dict[str, Any] = {
        "model": {"dtype": dtype, "quantization": quantization},
        "memory": {"budget": budget, "checkpointing": checkpointing},
    }
    return Recipe(
        name="bench",
        model=ModelConfig(path=path, device=device, offline=True, **choices["model"]),
        lora=LoraConfig(rank=rank, alpha=2.0 * rank, targets=targets),
        data=DataConfig(max_prompt_tokens=prompt),
        memory=MemoryConfig(**choices["memory"]),
        ppo=PPOConfig(
            num_steps=iterations,
            rollout_batch_size=batch,
            minibatch_size=batch,
            num_epochs=1,
            micro_batch_tokens=None if micro is None else micro * (prompt + response),
            sampling=SamplingConfig(
                max_response_tokens=response,
                min_response_tokens=response if min_response is None else min_response,
                stop_token_ids=stop_token_ids,
            ),
            eval_every=0,
            save_every=0,
            num_logged_samples=0,
        ),
    )


@contextlib.contextmanager
def only_the_last_line() -> Iterator[None]:
    """What is printed inside goes to stderr, so that a script's last line of output is its result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
