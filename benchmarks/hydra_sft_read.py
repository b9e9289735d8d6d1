"""What Hydra-SFT and separate stage-1 models of one seed say about its held-out pairs; prints one JSON line.

python benchmarks/hydra_sft_read.py HYDRA_RUN SEPARATE_RUN
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import STAGE1_TABLES
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.datasets import load_raw, tokenize
from hydra_rlhf.stages.examples import lm_mask, token_micro_batches
from hydra_rlhf.stages.finished import known_chat_format

TOKENS = 8192
"""Padded tokens per forward."""


def main() -> None:
    """Read both sides."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("hydra", type=Path)
    parser.add_argument("separate", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hydra = read(args.hydra, "hydra_sft")
    separate = read(args.separate, "sft") | read(args.separate, "reward_model")
    print(json.dumps({"hydra": hydra, "separate": separate}))


@torch.no_grad()
def read(folder: Path, stage: str) -> dict[str, Any]:
    """Of each held-out pair: log-probability and tokens of the chosen response, and the margin of the scores."""
    run = Run.load(folder)
    recipe, table = run.recipe, STAGE1_TABLES[stage]
    model = HydraModel.from_stage1(
        table, {stage: str(folder / stage)}, model=recipe.model, lora=recipe.lora, seed=recipe.seed
    )
    pairs = tokenize(load_raw(recipe.data, seed=recipe.seed), known_chat_format(run, recipe, model)).test_pairs
    found: dict[str, Any] = {name: [0.0] * len(pairs) for name in ("logprobs", "num_tokens", "margins")}
    for members, batch in token_micro_batches(pairs, TOKENS, pad_id=model.pad_id, device=model.device):
        outputs = model.evaluate(batch, list(table), lm_mask=lm_mask(batch, pairs))
        chosen = batch.response_mask[: len(members)]
        for name, output in outputs.items():
            if name == "reward":
                assert output.scores is not None
                better, worse = output.scores.chunk(2)
                values = {"margins": better - worse}
            else:
                assert output.logprobs is not None
                values = {"logprobs": output.logprobs[: len(members)].double().sum(dim=1), "num_tokens": chosen.sum(1)}
            for key, column in values.items():
                for member, value in zip(members, column.tolist(), strict=True):
                    found[key][member] = value
    return {key: column for key, column in found.items() if key_of(key) in table}


def key_of(column: str) -> str:
    """The role that a column is read from."""
    return "reward" if column == "margins" else "reference"


if __name__ == "__main__":
    main()
