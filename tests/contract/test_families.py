"""What must hold for every model family: padding, heads, LoRA on and off, sampling, formats others load."""

import pytest
import torch
from torch.testing import assert_close

from contract.tiny import (
    CONFIGS,
    FAMILIES,
    alone,
    ragged_batch,
    randomise_adapters,
    tiny_hydra,
    tiny_trunk,
    tokenizer,
    with_garbage_padding,
)
from hydra_rlhf.config import LoraConfig, ModelConfig, SamplingConfig
from hydra_rlhf.model.export import load_peft_adapter, save_merged, save_peft_adapter, save_reward_model, save_stage1
from hydra_rlhf.model.heads import ScalarHead
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.load import load_trunk
from hydra_rlhf.model.logprobs import response_logprobs
from hydra_rlhf.model.sample import sample_tokens


def wide(family: str) -> torch.dtype:
    """float64 where the family can: eager attention takes its softmax in float32, where a float64 mask is -inf."""
    return torch.float32 if family == "gemma2" else torch.float64


ROLE_NAMES = ("actor", "critic", "reference", "reward")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def plain_logprobs(family: str, batch):
    """Log-probs of the whole sequence by transformers' own forward, without padding: an independent source."""
    model = tiny_trunk(family, wide(family)).model
    rows = []
    for row in range(len(batch.tokens)):
        one = alone(batch, row)
        logits = model(input_ids=one.tokens).logits[0].log_softmax(-1)
        rows.append(logits[:-1].gather(1, one.tokens[0, 1:, None])[:, 0][-one.response_mask.shape[1] :])
    return rows


def test_logprobs_equal_transformers_on_each_row_alone(family: str):
    batch, hydra = ragged_batch(), tiny_hydra("hydra-ppo", family, wide(family))
    ours = hydra.evaluate(batch, ["reference"])["reference"].logprobs
    assert ours is not None
    for row, theirs in enumerate(plain_logprobs(family, batch)):
        assert_close(ours[row, : len(theirs)], theirs, atol=1e-5, rtol=0)
        assert not ours[row, len(theirs) :].any()


def test_padding_never_matters(family: str):
    hydra = tiny_hydra("hydra-ppo", family, wide(family))
    randomise_adapters(hydra)
    batch = ragged_batch()
    padded = hydra.evaluate(with_garbage_padding(batch), ROLE_NAMES)
    for row in range(len(batch.tokens)):
        single = hydra.evaluate(alone(batch, row), ROLE_NAMES)
        r = int(batch.response_mask[row].sum())
        for role, field in (("actor", "logprobs"), ("critic", "values"), ("reference", "logprobs")):
            ours, theirs = getattr(padded[role], field), getattr(single[role], field)
            assert_close(ours[row, :r], theirs[0], atol=2e-6, rtol=0)
        assert_close(padded["reward"].scores[row], single["reward"].scores[0], atol=2e-6, rtol=0)


def test_lora_off_is_the_model_itself_bit_for_bit(family: str):
    batch = ragged_batch()
    before = tiny_trunk(family).hidden_states(batch.tokens, batch.attention_mask, adapter=None)
    hydra = tiny_hydra("hydra-ppo", family)
    randomise_adapters(hydra)
    trunk = hydra.trunk("hydra")
    assert torch.equal(trunk.hidden_states(batch.tokens, batch.attention_mask, adapter=None), before)
    on = trunk.hidden_states(batch.tokens, batch.attention_mask, adapter="actor")
    assert not torch.allclose(on[batch.attention_mask], before[batch.attention_mask], atol=1e-3)


def test_all_linears_are_adapted_but_the_head(family: str):
    hydra = tiny_hydra("hydra-ppo", family)
    linears = {path.rsplit(".", 1)[-1] for path in hydra.trunk("hydra").lora_linears}
    attention_and_mlp = {
        "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"},
        "gpt2": {"c_attn", "c_proj", "c_fc"},
    }
    llama = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert linears == attention_and_mlp.get(family, llama)


def test_gradients_do_not_depend_on_checkpointing_or_on_when_backward_runs(family: str):
    """Actor, critic and reference forward, and only then both backwards, with and without recomputation."""
    batch = ragged_batch()
    grads = []
    for checkpointing, interleaved in ((False, False), (True, False), (False, True), (True, True)):
        hydra = tiny_hydra("hydra-ppo", family, wide(family))
        randomise_adapters(hydra)
        if checkpointing:
            hydra.trunk("hydra").enable_checkpointing()
        hydra.train()

        def losses(role: str, hydra=hydra):
            output = hydra.evaluate(batch, [role])[role]
            value = output.logprobs if role == "actor" else output.values
            return torch.where(batch.response_mask, value, 0.0).sum()

        if interleaved:
            actor, critic = losses("actor"), losses("critic")
            with torch.no_grad():
                hydra.evaluate(batch, ["reference", "reward"])
            critic.backward()
            actor.backward()
        else:
            losses("actor").backward()
            losses("critic").backward()
        grads.append({n: p.grad for n, p in hydra.named_parameters() if p.grad is not None})
    assert any("lora_A.actor" in name for name in grads[0])
    assert any("lora_A.critic" in name for name in grads[0])
    assert all(grad.abs().sum() > 0 for grad in grads[0].values())
    tolerance = 1e-9 if wide(family) == torch.float64 else 1e-4
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, grad in other.items():
            assert_close(grad, grads[0][name], atol=tolerance, rtol=tolerance)


def test_checkpointing_really_recomputes(family: str):
    hydra = tiny_hydra("hydra-ppo", family)
    calls = []
    layer = hydra.trunk("hydra").lora_linears[next(iter(hydra.trunk("hydra").lora_linears))]
    in_layer = next(m for path, m in hydra.trunk("hydra").lora_linears.items() if ".0." in path)
    assert layer is not None
    in_layer.register_forward_hook(lambda *_: calls.append(1))
    hydra.trunk("hydra").enable_checkpointing()
    hydra.train()
    output = hydra.evaluate(ragged_batch(), ["actor"])["actor"].logprobs
    assert len(calls) == 1
    output.sum().backward()
    assert len(calls) == 2


def test_greedy_decoding_equals_generate(family: str):
    """Token by token, on a batch with left padding, prompts longer than the sliding window included."""
    trunk = tiny_trunk(family, wide(family))
    batch = ragged_batch()
    prompts, mask = batch.tokens[:, :5], batch.attention_mask[:, :5]
    long = torch.cat([prompts[:, 1:2].expand(-1, 4) * 0 + 7, prompts], dim=1)
    long_mask = torch.cat([mask[:, :1].expand(-1, 4), mask], dim=1)
    ours = sample_tokens(
        trunk,
        None,
        long,
        long_mask,
        torch.full((4, 12), 0.5),
        SamplingConfig(top_k=1, max_response_tokens=12),
        stop_ids=(2,),
        pad_id=0,
    )
    theirs = trunk.model.generate(
        input_ids=long,
        attention_mask=long_mask.long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )[:, long.shape[1] :]
    for row in range(4):
        n = int(ours.mask[row].sum())
        assert ours.tokens[row, :n].tolist() == theirs[row, :n].tolist()


def test_a_response_does_not_depend_on_what_shares_its_batch(family: str):
    """Alone, permuted, and with rows that leave early: the same tokens from the same uniform numbers."""
    hydra = tiny_hydra("hydra-ppo", family)
    randomise_adapters(hydra, 0.1)
    trunk, batch = hydra.trunk("hydra"), ragged_batch()
    prompts, mask = batch.tokens[:, :5], batch.attention_mask[:, :5]
    uniforms = torch.rand(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stops = tuple(range(2, 80))  # a quarter of the vocabulary, so that rows end at different times

    def sample(rows: list[int]):
        config = SamplingConfig(max_response_tokens=8)
        return sample_tokens(
            trunk, "actor", prompts[rows], mask[rows], uniforms[rows], config, stop_ids=stops, pad_id=0
        )

    together = sample([0, 1, 2, 3])
    assert len(set(together.mask.sum(1).tolist())) > 1, "the rows should end at different times"
    permuted = sample([2, 0, 3, 1])
    for row in range(4):
        n = int(together.mask[row].sum())
        expected = together.tokens[row, :n].tolist()
        assert sample([row]).tokens[0].tolist() == expected
        assert permuted.tokens[[2, 0, 3, 1].index(row), :n].tolist() == expected


def test_saved_folders_load_bit_for_bit(family: str, tmp_path):
    """Stage 1 -> folder -> the roles of stage 2, reward head included, in float32 and bfloat16."""
    for dtype in ("float32", "bfloat16"):
        trunk = tiny_trunk(family, getattr(torch, dtype))
        head = ScalarHead(trunk.hidden_size, generator=torch.Generator().manual_seed(0))
        head.shift(0.25)
        folder = tmp_path / dtype
        save_stage1(folder, trunk, tokenizer(), head)
        hydra = HydraModel.from_pretrained(str(folder), model=ModelConfig(dtype=dtype, offline=True), lora=LORA_2)
        batch = ragged_batch()
        hidden = trunk.hidden_states(batch.tokens, batch.attention_mask, adapter=None)
        outputs = hydra.evaluate(batch, ROLE_NAMES)
        expected, _ = response_logprobs(trunk.lm_head, hidden, batch, batch.response_mask, temperature=1.0)
        assert torch.equal(outputs["reference"].logprobs, expected)
        assert torch.equal(hydra.scalar_head("hydra", "reward").bias, head.bias)
        # The critic starts as the reward model exactly: its value after the last token would be the score.
        assert torch.equal(hydra.scalar_head("hydra", "value").weight, head.weight)


LORA_2 = LoraConfig(rank=2)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft calls the old name
def test_peft_loads_our_adapters_and_we_load_its(family: str, tmp_path):
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    hydra = tiny_hydra("hydra-ppo", family)
    randomise_adapters(hydra)
    trunk, batch = hydra.trunk("hydra"), ragged_batch()
    save_peft_adapter(trunk, "actor", tmp_path / "ours")
    theirs = PeftModel.from_pretrained(tiny_trunk(family).model, str(tmp_path / "ours"))
    expected = plain_logits(theirs, batch)
    assert_close(ours_logits(trunk, "actor", batch), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours_logits(trunk, None, batch), expected, atol=1e-2)

    fan_in_fan_out = family == "gpt2"
    config = PeftConfig(r=3, lora_alpha=5, target_modules="all-linear", fan_in_fan_out=fan_in_fan_out)
    made = get_peft_model(tiny_trunk(family).model, config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    made.save_pretrained(str(tmp_path / "theirs"))
    fresh = tiny_trunk(family)
    load_peft_adapter(fresh, "start", tmp_path / "theirs")
    assert_close(ours_logits(fresh, "start", batch), plain_logits(made, batch), atol=1e-4, rtol=1e-4)


def plain_logits(model, batch):
    one = alone(batch, 0)
    with torch.no_grad():
        return model(input_ids=one.tokens).logits


def ours_logits(trunk, adapter, batch):
    one = alone(batch, 0)
    with torch.no_grad():
        return trunk.lm_head.logits(trunk.hidden_states(one.tokens, one.attention_mask, adapter=adapter)[0])[None]


def test_merged_export_says_what_the_adapter_said_and_leaves_the_base_alone(family: str, tmp_path):
    hydra = tiny_hydra("hydra-ppo", family)
    randomise_adapters(hydra)
    trunk, batch = hydra.trunk("hydra"), ragged_batch()
    before = {name: tensor.clone() for name, tensor in trunk.base_parameters().items()}
    save_merged(trunk, "actor", hydra.tokenizer, tmp_path / "merged")
    merged = load_trunk(str(tmp_path / "merged"), ModelConfig(offline=True))
    assert_close(ours_logits(merged, None, batch), ours_logits(trunk, "actor", batch), atol=1e-4, rtol=1e-4)
    for name, tensor in trunk.base_parameters().items():
        assert torch.equal(tensor, before[name]), name


def test_reward_export_scores_the_same(family: str, tmp_path):
    from transformers import AutoModelForSequenceClassification

    hydra = tiny_hydra("hydra-ppo", family)
    randomise_adapters(hydra)
    head = hydra.scalar_head("hydra", "reward")
    head.shift(0.5)
    batch = ragged_batch()
    save_reward_model(hydra.trunk("hydra"), head, hydra.tokenizer, tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    scores = hydra.evaluate(batch, ["reward"])["reward"].scores
    for row in range(4):
        one = alone(batch, row)
        logit = theirs(input_ids=one.tokens, attention_mask=one.attention_mask.long()).logits[0, 0]
        assert_close(logit + theirs.config.reward_bias, scores[row], atol=1e-5, rtol=1e-5)


def test_configs_cover_tied_and_untied_embeddings():
    assert {config.tie_word_embeddings for config in CONFIGS.values()} == {True, False}
