"""What must be refused or kept, because it would otherwise go wrong without a word."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from contract.tiny import chat, ppo_config, prompts, tiny_hydra, tiny_trunk, tokenizer
from hydra_rlhf.config import DataConfig, ModelConfig, Recipe, SamplingConfig
from hydra_rlhf.errors import ConfigError, DataError, Interrupted, ModelError, NonFiniteError
from hydra_rlhf.model.export import save_stage1
from hydra_rlhf.model.generate_batch import AVAILABLE
from hydra_rlhf.model.load import load_trunk
from hydra_rlhf.model.probe import check_trunk
from hydra_rlhf.model.sample import sample_tokens
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.recipes import load_recipe
from hydra_rlhf.runtime.run import Run, delete_run
from hydra_rlhf.stages.datasets import load_raw
from hydra_rlhf.stages.pipeline import run_recipe
from hydra_rlhf.stages.ppo import train_ppo_stage
from hydra_rlhf.stages.session import Session


def test_missing_weights_are_not_made_up(tmp_path: Path):
    save_stage1(tmp_path, tiny_trunk("llama"), tokenizer(), None)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if ".layers.1." not in n}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 9 weights .*layers\.1\."):
        load_trunk(str(tmp_path), ModelConfig(offline=True))
    # An LM head alone may be missing; then no role can read it.
    save_file({n: t for n, t in tensors.items() if "lm_head" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no language-model head"):
        _ = load_trunk(str(tmp_path), ModelConfig(offline=True)).lm_head


def test_damaged_weights_are_an_error_of_the_model(tmp_path: Path):
    save_stage1(tmp_path, tiny_trunk("llama"), tokenizer(), None)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_trunk(str(tmp_path), ModelConfig(offline=True))


def test_a_model_that_sees_later_tokens_is_refused():
    shape = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    model = BertLMHeadModel(BertConfig(**shape, is_decoder=False))
    with pytest.raises(ModelError, match="BertLMHeadModel"):
        check_trunk(Trunk(model), "bert")


def test_extra_data_that_the_test_split_uses_up_is_refused(tmp_path: Path):
    pairs = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
    for name, rows in (("train", pairs[:4]), ("test", pairs[4:]), ("prompts", [{"prompt": "p4"}, {"prompt": "p5"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(**{name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test", "prompts")})
    with pytest.raises(DataError, match=r"data\.prompts=.*no row is left"):
        load_raw(config, seed=0)


def test_settings_that_the_world_would_ignore_are_refused():
    with pytest.raises(ConfigError, match=r"data\.test means nothing"):
        load_raw(DataConfig(test="other.jsonl"), seed=0)


def test_a_stage_that_the_method_has_not_is_refused():
    with pytest.raises(ConfigError, match="method=hydra-ppo has no stage sft; it has hydra_sft, ppo, evaluation"):
        run_recipe(Recipe(name="x", method="hydra-ppo"), until="sft")


def test_a_setting_given_twice_is_refused(tmp_path: Path):
    (tmp_path / "twice.yaml").write_text("name: x\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="seed comes twice"):
        load_recipe(tmp_path / "twice.yaml")


@pytest.mark.parametrize(
    "engine",
    [
        "slots",
        "generate",
        pytest.param("generate_batch", marks=pytest.mark.skipif(not AVAILABLE, reason="needs newer transformers")),
    ],
)
def test_logits_that_are_not_finite_are_not_sampled_from(engine):
    trunk = tiny_hydra("hydra-ppo").trunk("hydra")
    with torch.no_grad():
        trunk.lm_head.weight[7] = float("nan")
    prompts = torch.tensor([[3, 4, 5]])
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        sample_tokens(
            trunk,
            None,
            prompts,
            torch.ones_like(prompts, dtype=torch.bool),
            torch.full((1, 4), 0.5),
            SamplingConfig(engine=engine),
            stop_ids=(2,),
            pad_id=0,
        )


def test_a_stop_during_a_rollout_keeps_the_steps_before_it(tmp_path: Path):
    recipe = Recipe(name="stopped", output_dir=str(tmp_path), ppo=ppo_config(num_steps=5, save_every=0))
    hydra = tiny_hydra("hydra-ppo")
    with Run.open(recipe, resume=False) as run:
        session = Session(run)

        def stop_in_the_third_step() -> None:
            if len(session.history) == 2:
                raise Interrupted(15)

        session.stop.check = stop_in_the_third_step  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(Interrupted):
            train_ppo_stage(session, hydra, chat(hydra), prompts(), recipe.ppo, seed=0)
        assert run.checkpoints("ppo").steps() == [2]


def test_a_run_in_use_is_not_deleted(tmp_path: Path):
    recipe = Recipe(name="busy", output_dir=str(tmp_path))
    with Run.open(recipe, resume=False) as run:
        with pytest.raises(Exception, match="in use by process"):
            delete_run(run.folder)
        assert run.folder.exists()
    delete_run(tmp_path / "busy")
    assert not (tmp_path / "busy").exists()
