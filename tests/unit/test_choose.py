"""From a budget to settings, on a plan made up by hand: exact cuts where the budget just suffices and a byte below."""

from dataclasses import replace
from math import isclose

import pytest

from hydra_rlhf.memory import choose
from hydra_rlhf.memory.plan import Cuts

NUM_LAYERS = 8


def phases_of(cuts: Cuts) -> dict[str, dict[str, int]]:
    """100 bytes per row decoded; 20 bytes per token of a micro-batch, 2 less for each layer that is recomputed."""
    update = cuts.micro_batch_tokens * (20 - 2 * cuts.checkpointed_layers)
    return {"rollout": {"cache": 100 * cuts.rollout_rows}, "update": {"weights": 0, "activations": update}}


def work(num_sequences: int = 8, tokens_each: int = 1024, given=None):
    """This much to cut."""
    return choose.Work(
        plan=phases_of,
        given=given or choose.Given(),
        num_layers=NUM_LAYERS,
        num_sequences=num_sequences,
        tokens_each=tokens_each,
    )


def settle(budget: int, *, num_sequences: int = 8, tokens_each: int = 1024, **given: int):
    """What is chosen for `num_sequences` x `tokens_each` tokens."""
    return choose.choose(work(num_sequences, tokens_each, choose.Given(**given)), budget)


def cuts_of(option) -> tuple[int, int, int]:
    """(tokens, rows, layers) of an option."""
    return option.cuts.micro_batch_tokens, option.cuts.rollout_rows, option.cuts.checkpointed_layers


def test_with_room_for_everything_nothing_is_cut():
    # All 8 sequences at once are 8192 tokens x 20 bytes.
    found, options = settle(163_840)
    assert found is not None
    assert cuts_of(found) == (8192, 8, 0)
    assert found.peak == 163_840
    assert [cuts_of(option) for option in options] == [(8192, 8, 0), (4096, 8, 0), (2048, 8, 0), (1024, 8, 0)]


def test_a_smaller_micro_batch_is_taken_where_recomputing_would_cost_more():
    # 81,920 bytes: 8192 tokens with 5 of 8 layers recomputed (8192 x 10) or 4096 with none (4096 x 20).
    # Times: (1 + 5/8/3) (1 + 256/8192) = 1.246; 1 + 256/4096 = 1.0625.
    found, options = settle(81_920)
    assert found is not None
    assert cuts_of(found) == (4096, 8, 0)
    assert [cuts_of(option)[2] for option in options] == [5, 0, 0, 0]
    assert isclose(options[0].relative_time, (1 + 0.625 / 3) * 1.03125)
    assert isclose(found.relative_time, 1.0625)


def test_a_byte_less_recomputes_one_more_layer():
    # 4096 tokens with one layer recomputed: (1 + 1/8/3) x 1.0625 = 1.107, before 2048 with none: 1.125.
    found, options = settle(81_919)
    assert found is not None
    assert cuts_of(found) == (4096, 8, 1)
    assert [cuts_of(option)[2] for option in options] == [6, 1, 0, 0]
    assert found.peak == 4096 * 18


def test_rows_are_halved_until_they_fit():
    # Short sequences, so that the rollout (100 bytes a row) is what matters.
    for budget, rows in ((800, 8), (799, 4), (400, 4), (399, 2), (199, 1), (100, 1)):
        found, options = settle(budget, tokens_each=1)
        assert found is not None
        assert {option.cuts.rollout_rows for option in options} == {rows}
        assert found.peak <= budget
    assert settle(99, tokens_each=1)[0] is None


def test_fewer_responses_may_be_decoded_than_sequences_are_learned_from():
    found, options = choose.choose(replace(work(tokens_each=1), num_decoded=3), 300)
    assert found is not None
    assert {option.cuts.rollout_rows for option in options} == {3}
    assert [option.cuts.micro_batch_tokens for option in options] == [8, 4, 2, 1]


def test_uneven_batches_are_cut_into_even_groups():
    assert list(choose.row_groups(6, None)) == [6, 3, 2, 1]
    assert list(choose.row_groups(1, None)) == [1]
    assert list(choose.row_groups(6, 5)) == [5]


def test_micro_batches_that_are_looked_at():
    assert list(choose.micro_batch_sizes(128, 16, None)) == [128, 64, 32, 16]
    # Not above what is useful, not below one sequence, which may itself be above what is useful.
    assert list(choose.micro_batch_sizes(10**6, 3000, None)) == [8192, 4096, 3000]
    assert list(choose.micro_batch_sizes(10**6, 10_000, None)) == [10_000]
    assert list(choose.micro_batch_sizes(10**6, 3000, 77)) == [77]


def test_where_nothing_fits_the_last_option_is_the_smallest():
    # One sequence with all layers recomputed: 1024 x 4 bytes.
    found, options = settle(4095)
    assert found is None
    assert cuts_of(options[-1]) == (1024, 8, 8)
    assert options[-1].peak == min(option.peak for option in options) == 4096
    assert settle(4096)[0] == options[-1]


def test_settings_leave_no_choice():
    found, options = settle(10**9, micro_batch_tokens=3000, rollout_rows=5, checkpointed_layers=3)
    assert found is not None
    assert [cuts_of(option) for option in options] == [(3000, 5, 3)]
    assert found.peak == 3000 * 14
    # They are kept where they do not fit, too.
    found, options = settle(10, rollout_rows=5, checkpointed_layers=3)
    assert found is None
    assert {cuts_of(option)[1:] for option in options} == {(5, 3)}
    _, options = settle(10, checkpointed_layers=0)
    assert {cuts_of(option)[2] for option in options} == {0}


@pytest.mark.parametrize("layers", range(NUM_LAYERS + 1))
def test_no_layer_too_many_is_recomputed(layers: int):
    # Exactly what this many layers need, so neither one fewer nor one more.
    budget = 1024 * (20 - 2 * layers)
    option = choose.fewest_layers(work(), budget, tokens=1024, rows=1)
    assert option.cuts.checkpointed_layers == layers


def test_a_stage_without_a_rollout_is_bound_by_its_learning_alone():
    sft = replace(
        work(2, 512, choose.Given(rollout_rows=1)),
        plan=lambda cuts: {"sft": {"activations": phases_of(cuts)["update"]["activations"]}},
    )
    found, _ = choose.choose(sft, 20 * 1024)
    assert found is not None
    assert cuts_of(found) == (1024, 1, 0)


def test_the_peak_is_the_largest_phase_and_not_their_sum():
    cuts = Cuts(micro_batch_tokens=10, rollout_rows=3, checkpointed_layers=0)
    assert choose.Option(cuts=cuts, phases=phases_of(cuts), relative_time=1.0).peak == 300
    assert choose.rollout_bytes(phases_of, 3, NUM_LAYERS) == 300


def test_whether_anything_fits_is_told_by_the_smallest_parts():
    # A sequence of 1024 tokens, all layers recomputed: 4 bytes a token; one row decoded: 100.
    assert choose.fits_smallest(work(), 4096)
    assert not choose.fits_smallest(work(), 4095)
    assert choose.fits_smallest(work(8, 1), 100)
    assert not choose.fits_smallest(work(8, 1), 99)
    # What is given is kept: 10 tokens x (20 - 2 x 3) = 140, or 2 rows of 100.
    given = choose.Given(micro_batch_tokens=10, checkpointed_layers=3)
    assert choose.fits_smallest(work(8, 1024, given), 140)
    assert not choose.fits_smallest(work(8, 1024, given), 139)
    assert not choose.fits_smallest(work(8, 1, choose.Given(rollout_rows=2)), 199)
    assert not choose.fits_smallest(work(8, 1, choose.Given(checkpointed_layers=0, micro_batch_tokens=9)), 179)


def test_where_too_much_is_held_only_the_smallest_cuts_are_planned():
    asked: list[Cuts] = []

    def plan(cuts: Cuts) -> dict[str, dict[str, int]]:
        asked.append(cuts)
        return {name: parts | {"weights": 500} for name, parts in phases_of(cuts).items()}

    held = replace(work(), plan=plan, held=500)
    found, options = choose.choose(held, 499)
    assert found is None
    # All layers recomputed, one row decoded, in every size of micro-batch; nothing else was asked for.
    assert [cuts_of(option) for option in options] == [(tokens, 1, 8) for tokens in (8192, 4096, 2048, 1024)]
    assert asked == [option.cuts for option in options]
    given = choose.Given(rollout_rows=5, checkpointed_layers=3)
    assert {cuts_of(option)[1:] for option in choose.choose(replace(held, given=given), 499)[1]} == {(5, 3)}
    asked.clear()
    assert not choose.fits_smallest(held, 499)
    assert asked == []
    # A byte more is not too little by itself: 500 + 1024 x 4 bytes are.
    assert choose.choose(held, 500) == (None, choose.choose(replace(held, held=0), 500)[1])
    assert {cuts.checkpointed_layers for cuts in asked} > {0}
    assert choose.fits_smallest(held, 500 + 4096)


def test_as_many_graphs_wait_as_fit():
    def with_graphs(cuts: Cuts) -> dict[str, dict[str, int]]:
        """Each graph takes what its micro-batch does."""
        phases = phases_of(cuts)
        return phases | {"update": {"activations": phases["update"]["activations"] * cuts.kept_graphs}}

    def kept(budget: int, *, keeps: bool = True, num_sequences: int = 5) -> tuple[int, int]:
        """(graphs, peak) with 2 sequences of 1024 tokens in each micro-batch: 40,960 bytes."""
        given = choose.Given(micro_batch_tokens=2500, rollout_rows=1, checkpointed_layers=0)
        asked = replace(work(num_sequences, 1024, given), plan=with_graphs, keeps_graphs=keeps)
        found, options = choose.choose(asked, budget)
        assert found is not None
        assert options == [found]
        return found.cuts.kept_graphs, found.peak

    # 5 sequences are 3 micro-batches of 2500 x 20 bytes: all three, two, one.
    assert kept(10**9) == (3, 150_000)
    assert kept(150_000) == (3, 150_000)
    assert kept(149_999) == (2, 100_000)
    assert kept(99_999) == (1, 50_000)
    assert kept(10**9, num_sequences=2) == (1, 50_000)
    assert kept(10**9, keeps=False) == (1, 50_000)
    # A sequence longer than a micro-batch is one by itself.
    long = replace(work(3, 1024, choose.Given(micro_batch_tokens=10)), plan=with_graphs, keeps_graphs=True)
    assert choose.choose(long, 10**9)[0].cuts.kept_graphs == 3  # pyright: ignore[reportOptionalMemberAccess]
    assert choose.choose(long, 0) == (None, choose.choose(long, 0)[1])


def test_relative_time():
    # 256 tokens more than there are; a third more where everything is recomputed.
    assert choose.relative_time(256, 0.0) == 2.0
    assert isclose(choose.relative_time(2560, 1.0), 1.1 * 4 / 3)
