"""Drawing tokens: by hand, and in tiles the same draws as all at once, with no tensor above the tile's bytes."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.model import draw
from hydra_rlhf.model.heads import LMHead

VOCAB = 50
PLAIN = SamplingConfig()
CONFIGS = [
    PLAIN,
    SamplingConfig(temperature=0.7),
    SamplingConfig(top_k=5),
    SamplingConfig(top_p=0.6, temperature=1.5),
    SamplingConfig(min_p=0.1),
]
IDS = ["plain", "temperature", "top_k", "top_p", "min_p"]


class LargestTensor(TorchDispatchMode):
    """The most bytes of any tensor made inside the block."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return made


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: their products and sums are exact, so logits do not depend on how rows are tiled."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def head_and_states(num_rows: int) -> tuple[LMHead, Tensor, Tensor]:
    """A head, states and one uniform number per row."""
    head = LMHead(weight=whole_numbers(VOCAB, 8, seed=1), bias=None, softcap=None, scale=0.25)
    uniforms = torch.rand(num_rows, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return head, whole_numbers(num_rows, 8, seed=2), uniforms


def plain_draw(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> Tensor:
    """All rows at once, each step a tensor of its own."""
    cumulative = draw.restrict(logits / config.temperature, config).double().softmax(-1).cumsum(-1)
    at = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp(max=VOCAB - 1)


def test_draws_invert_the_cumulative_distribution():
    # Shares 1/2, 1/4, 1/4: 0.49 is in the first, 0.51 in the second, 0.76 in the third.
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, -1)
    drawn = draw.Shares(logits).draw(torch.tensor([0.49, 0.51, 0.76]))
    assert drawn.tolist() == [0, 1, 2]


@pytest.mark.parametrize("vocab", [1, 2, 7, 50, 64, 1000, 4099])
def test_blocks_find_what_a_running_sum_over_all_tokens_finds(vocab):
    """Shares are whole numbers, so that both kinds of sums are exact; a third of the tokens have none."""
    generator = torch.Generator().manual_seed(vocab)
    counts = torch.randint(0, 3, (200, vocab), generator=generator)
    counts[:, vocab // 2] = 2  # the peak, in every row
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1.0 - 2.0**-53])
    drawn = draw.Shares((counts / 2).log()).draw(uniforms)
    cumulative = counts.cumsum(dim=1).double()
    expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    expected[1] = counts[1].nonzero()[-1]  # the product above rounds to the whole sum
    assert drawn.tolist() == expected.tolist()
    assert (counts.gather(1, drawn[:, None]) > 0).all()


def test_entries_without_mass_are_never_found_at_their_borders():
    masses = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]], dtype=torch.float64).expand(5, -1)
    index, into = draw.find(masses, torch.tensor([-1e-9, 0.0, 1.0, 2.5, 3.0], dtype=torch.float64))
    assert index.tolist() == [1, 1, 3, 3, 3]
    assert_close(into, torch.tensor([0.0, 0.0, 0.0, 1.5, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("vocab", [5, 50, 4099])
def test_the_total_is_that_of_all_exponentials(vocab):
    logits = 20.0 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(0))
    assert_close(draw.Shares(logits).log_total(), logits.double().logsumexp(dim=-1).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("num_rows_per_tile", [1, 3, 16, 1000])
def test_tiles_draw_what_all_rows_at_once_draw(config, num_rows_per_tile):
    head, states, uniforms = head_and_states(40)
    logits = head.logits(states)
    expected = plain_draw(logits, uniforms, config)
    tile_bytes = num_rows_per_tile * VOCAB * draw.DRAW_BYTES
    nothing = torch.tensor([], dtype=torch.long)
    found = draw.draw_in_tiles(head, states, uniforms, config, forbidden=nothing, tile_bytes=tile_bytes)
    drawn, logprobs = found.tokens, found.logprobs
    assert drawn.tolist() == expected.tolist()
    everything = (logits / config.temperature).double().log_softmax(-1)  # of all tokens: not of those left to draw from
    assert_close(logprobs.double(), everything.gather(1, drawn[:, None]).squeeze(1), atol=1e-5, rtol=0)
    assert len(set(drawn.tolist())) > 3


def test_forbidden_ids_are_never_drawn():
    head, states, uniforms = head_and_states(40)
    everything = draw.draw_in_tiles(
        head, states, uniforms, PLAIN, forbidden=torch.tensor([], dtype=torch.long), tile_bytes=10**6
    ).tokens
    likely = torch.tensor(everything.unique().tolist()[:3])
    found = draw.draw_in_tiles(head, states, uniforms, PLAIN, forbidden=likely, tile_bytes=900)
    drawn, logprobs = found.tokens, found.logprobs
    everything_else = head.logits(states).log_softmax(-1).gather(1, drawn[:, None]).squeeze(1)
    assert_close(logprobs, everything_else, atol=1e-5, rtol=0)  # training masks no token
    assert not torch.isin(drawn, likely).any()
    assert torch.isin(everything, likely).any()


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_no_tensor_of_a_draw_is_larger_than_a_tile(config):
    """Sixty-four rows whose logits would take 12,800 bytes, in a tile of 4,000."""
    head, states, uniforms = head_and_states(64)
    nothing = torch.tensor([], dtype=torch.long)
    with LargestTensor() as largest:
        draw.draw_in_tiles(head, states, uniforms, config, forbidden=nothing, tile_bytes=4000)
    assert 0 < largest.num_bytes <= 4000
    with LargestTensor() as untiled:
        draw.draw_in_tiles(head, states, uniforms, config, forbidden=nothing, tile_bytes=10**6)
    assert untiled.num_bytes >= 64 * VOCAB * 4


def test_a_draw_leaves_its_logits_as_they_were():
    head, states, uniforms = head_and_states(4)
    logits = head.logits(states)
    before = logits.clone()
    draw.Shares(logits).draw(uniforms)
    assert torch.equal(logits, before)
