"""Log-probs of response tokens: which state predicts which token, hand numbers, and when the logits go in tiles."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract.tiny import alone, ragged_batch, tiny_hydra
from torch.testing import assert_close

from hydra_rlhf.model import logprobs
from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.records import TokenBatch

LN2 = math.log(2)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def identity_head(dtype=torch.float64):
    """States are the logits."""
    return LMHead(weight=torch.eye(3, dtype=dtype), bias=None, softcap=None, scale=1.0)


def small_batch():
    """Two prompt columns, three response columns; the second row's response has two tokens."""
    return TokenBatch(
        tokens=torch.tensor([[9, 9, 0, 1, 2], [9, 9, 1, 1, 0]]),
        attention_mask=torch.tensor([[True] * 5, [True] * 4 + [False]]),
        response_mask=torch.tensor([[True, True, True], [True, True, False]]),
    )


def test_a_token_is_predicted_by_the_state_before_it():
    hidden = torch.arange(10.0).view(2, 5, 1)  # state t of row i is 5 i + t
    assert logprobs.predicting_states(hidden, small_batch()).squeeze(2).tolist() == [[1, 2, 3], [6, 7, 8]]


def test_the_last_state_is_that_of_the_last_counted_token():
    hidden = torch.arange(10.0).view(2, 5, 1)
    assert logprobs.last_states(hidden, small_batch()).squeeze(1).tolist() == [4, 8]


def test_scatter_puts_values_back_and_keeps_the_gradient():
    values = torch.tensor([1.0, 2.0, 3.0]).requires_grad_()
    placed = logprobs.scatter(values, torch.tensor([[True, False, True], [False, True, False]]))
    assert placed.tolist() == [[1, 0, 2], [0, 3, 0]]
    (placed * torch.tensor([[1.0, 5.0, 2.0], [5.0, 3.0, 5.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize("tile_bytes", [4, 24, 2**20])
def test_response_logprobs_by_hand(tile_bytes):
    # Every state gives the logits ln 1, ln 2, ln 1, so probabilities 1/4, 1/2, 1/4 and entropy 3/2 ln 2; but state 0
    # predicts the prompt and state 4 nothing: they give other logits, and are not read.
    hidden = f64([[[9.0, 0, 0], [0, LN2, 0], [0, LN2, 0], [0, LN2, 0], [0, 0, 9.0]]] * 2)
    batch = small_batch()
    found, entropy = logprobs.response_logprobs(
        identity_head(), hidden, batch, batch.response_mask, temperature=1.0, tile_bytes=tile_bytes
    )
    # Responses 0, 1, 2 and 1, 1.
    assert_close(found, -LN2 * f64([[2.0, 1.0, 2.0], [1.0, 1.0, 0.0]]), rtol=0, atol=1e-12)
    assert_close(entropy, 1.5 * LN2 * f64([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]), rtol=0, atol=1e-12)
    # Only some of the tokens: the others are 0.
    mask = torch.tensor([[False, True, False], [True, False, False]])
    found, entropy = logprobs.response_logprobs(
        identity_head(), hidden, batch, mask, temperature=1.0, tile_bytes=tile_bytes
    )
    assert_close(found, -LN2 * f64([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), rtol=0, atol=1e-12)
    assert_close(entropy, 1.5 * LN2 * mask.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tile_bytes", [4, 24, 2**20])
def test_no_token_counts(tile_bytes):
    batch = small_batch()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    hidden = torch.randn(2, 5, 3, requires_grad=True)
    found, entropy = logprobs.response_logprobs(
        identity_head(torch.float32), hidden, batch, nothing, temperature=1.0, tile_bytes=tile_bytes
    )
    assert found.tolist() == entropy.tolist() == [[0, 0, 0], [0, 0, 0]]
    found.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_all_at_once_by_hand():
    # Logits 0, ln(2) / 2, 0 at the temperature 1/2; gradient of the log-prob ([target] - p) / T, of the entropy
    # -p (log p + entropy) / T: 2 (ln(2) / 8), 2 (-ln(2) / 4), 2 (ln(2) / 8).
    for entropy_gradient, by_entropy in ((False, 0.0), (True, 2 * f64([LN2 / 8, -LN2 / 4, LN2 / 8]))):
        states = f64([[0.0, LN2 / 2, 0.0]]).requires_grad_()
        found, entropy = logprobs.direct_logprobs(
            identity_head(), states, torch.tensor([1]), temperature=0.5, entropy_gradient=entropy_gradient
        )
        assert_close(found, f64([-LN2]), rtol=0, atol=1e-12)
        assert_close(entropy, f64([1.5 * LN2]), rtol=0, atol=1e-12)
        assert entropy.requires_grad == entropy_gradient
        (found + entropy).sum().backward()
        assert_close(states.grad, (2 * f64([-0.25, 0.5, -0.25]) + by_entropy)[None], rtol=0, atol=1e-12)


def which_path(monkeypatch, dtype, tile_bytes):
    """The path that 5 tokens of a vocabulary of 3 take."""
    taken = []
    for name in ("direct_logprobs", "tiled_logprobs"):
        function = getattr(logprobs, name)
        monkeypatch.setattr(
            logprobs, name, lambda *a, name=name, function=function, **k: (taken.append(name), function(*a, **k))[1]
        )
    states, targets = torch.zeros(5, 3, dtype=dtype), torch.zeros(5, dtype=torch.long)
    logprobs.token_logprobs(identity_head(dtype), states, targets, temperature=1.0, tile_bytes=tile_bytes)
    monkeypatch.undo()
    assert len(taken) == 1
    return taken[0]


def test_few_logits_are_kept_and_many_made_in_tiles(monkeypatch):
    # 5 tokens x 3 columns x 4 bytes = 60.
    assert which_path(monkeypatch, torch.float32, 60) == "direct_logprobs"
    assert which_path(monkeypatch, torch.float32, 59) == "tiled_logprobs"
    assert which_path(monkeypatch, torch.float64, 60) == "direct_logprobs"


def test_half_precision_always_goes_in_tiles(monkeypatch):
    # Plain logits would be rounded to 8 bits and tiles are not: a log-prob must not depend on its neighbours' number.
    assert which_path(monkeypatch, torch.bfloat16, 2**20) == "tiled_logprobs"
    assert which_path(monkeypatch, torch.float16, 2**20) == "tiled_logprobs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile_bytes", [2048, 2**20])
def test_scoring_and_learning_see_the_same_bits(dtype, tile_bytes):
    # The ratio of a rollout's own log-probs to the first update's is exactly one, kept logits or tiles.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(301, 8, generator=generator).to(dtype)
    head = LMHead(weight=weight.requires_grad_(), bias=None, softcap=4.0, scale=0.7)
    states, targets = torch.randn(50, 8, generator=generator).to(dtype), torch.arange(50)
    with torch.no_grad():
        old, _ = logprobs.token_logprobs(head, states, targets, temperature=0.9, tile_bytes=tile_bytes)
    new, _ = logprobs.token_logprobs(head, states, targets, temperature=0.9, tile_bytes=tile_bytes)
    assert not old.requires_grad
    assert new.requires_grad
    assert torch.equal((new - old).exp(), torch.ones(50))


def test_kept_logits_and_tiles_agree():
    generator = torch.Generator().manual_seed(0)
    head = LMHead(torch.randn(301, 8, generator=generator).double().requires_grad_(), None, 4.0, 0.7)
    states, targets = torch.randn(50, 8, generator=generator).double().requires_grad_(), torch.arange(50)
    found = []
    for tile_bytes in (2**20, 2048):
        both = logprobs.token_logprobs(
            head, states, targets, temperature=0.9, entropy_gradient=True, tile_bytes=tile_bytes
        )
        gradients = torch.autograd.grad((both[0] + 0.3 * both[1]).sum(), (states, head.weight))
        found.append([*both, *gradients])
    for kept, tiled in zip(*found, strict=True):
        assert_close(kept, tiled, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt"])
def test_a_model_gives_the_same_in_any_tiles(family):
    # Log-probs and gradients of every trained tensor, with the whole trunk trained: the tied head's too.
    batch = ragged_batch()
    found = {}
    for tile_bytes in (2**25, 4096, 512):
        hydra = tiny_hydra("ppo", family, torch.float64)
        hydra.logit_tile_bytes = tile_bytes
        output = hydra.evaluate(batch, ["actor"], temperature=0.8, entropy_gradient=True)["actor"]
        (output.logprobs + 0.1 * output.entropy).sum().backward()
        found[tile_bytes] = [output.logprobs.detach(), output.entropy.detach()] + [
            parameter.grad for parameter in hydra.parameters() if parameter.grad is not None
        ]
    assert len(found[512]) > 10
    for tile_bytes in (4096, 512):
        for tiled, kept in zip(found[tile_bytes], found[2**25], strict=True):
            assert_close(tiled, kept, rtol=0, atol=1e-10 * max(1.0, kept.abs().max().item()))


def test_the_tile_reaches_the_head():
    # 300 columns x 15 response tokens: with tiles of 512 bytes no block of more than 128 logits is made.
    hydra = tiny_hydra("hydra-ppo", "llama")
    assert hydra.logit_tile_bytes == logprobs.LOGIT_TILE_BYTES == 32 * 2**20
    batch = alone(ragged_batch(), 0)
    with torch.no_grad():
        expected = hydra.evaluate(batch, ["reference"])["reference"].logprobs
        hydra.logit_tile_bytes = 512
        found = hydra.evaluate(batch, ["reference"])["reference"].logprobs
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.equal(found, expected)  # summed in another order, so tiles were used


def test_triton_is_not_imported_on_the_cpu():
    code = (
        "import sys, torch\n"
        "from hydra_rlhf.model.heads import LMHead\n"
        "from hydra_rlhf.model.logprobs import token_logprobs\n"
        "head = LMHead(torch.zeros(9, 2), None, None, 1.0)\n"
        "token_logprobs(head, torch.zeros(3, 2), torch.zeros(3).long(), temperature=1.0, tile_bytes=8)\n"
        "assert 'hydra_rlhf.model.tiled_logprobs' in sys.modules\n"
        "assert 'hydra_rlhf.model.triton_fold' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
