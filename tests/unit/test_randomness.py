from collections import Counter

import pytest
import torch

from hydra_rlhf.runtime.randomness import generator, permutation, seed_for, uniforms


def test_seed_is_the_top_63_bits_of_the_sha256_of_the_json_list():
    # From a shell: printf '[7, "ppo", 3]' | sha256sum | cut -c1-16
    assert seed_for(7, "ppo", 3) == 0x64222A0A7F0E76AB // 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "bc"), ("ab", "c")),
        ((1,), ("1",)),
        ((1, 23), (12, 3)),
        (("a",), ("a", "")),
        ((1, 2), (2, 1)),
        ((-1,), (1,)),
    ],
)
def test_streams_with_different_names_have_different_seeds(one, other):
    assert seed_for(*one) != seed_for(*other)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = (permutation(50, 3, "order"), uniforms(5, 3, "draws"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert permutation(50, 3, "order") == first[0]
    assert torch.equal(uniforms(5, 3, "draws"), first[1])


def test_generators_are_fresh_each_time():
    draws = [torch.rand(3, generator=generator(1, "x")) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], torch.rand(3, generator=generator(2, "x")))


def test_permutation_holds_every_number_once_and_orders_are_even():
    assert sorted(permutation(7, "a")) == [0, 1, 2, 3, 4, 5, 6]
    assert permutation(0, "a") == []
    assert permutation(1, "a") == [0]
    # 600 orders of three items, each expected 100 times with a standard deviation of 9.1: five of them are 46.
    counts = Counter(tuple(permutation(3, "a", i)) for i in range(600))
    assert len(counts) == 6
    assert all(54 <= count <= 146 for count in counts.values())


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 100])
def test_uniform_number_i_does_not_depend_on_how_many_are_drawn(n):
    assert torch.equal(uniforms(n, 4, "draws"), uniforms(300, 4, "draws")[:n])


def test_uniforms_are_finer_than_single_precision():
    draws = uniforms(1000, 0, "draws")
    assert draws.dtype == torch.float64
    assert 0 <= float(draws.min()) < float(draws.max()) < 1
    # In single precision every draw would be a multiple of 2**-24.
    assert bool(((draws * 2**24) % 1 != 0).any())
    # Mean of 1000 uniforms: 0.5 with a standard deviation of 0.0091.
    assert abs(float(draws.mean()) - 0.5) < 0.05
