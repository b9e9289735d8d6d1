"""Micro-batches: hand cases, a plain greedy cut and all possible cuts as references, properties over random sizes."""

from itertools import combinations, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from hydra_rlhf.model.device import CPU_CALL_TOKENS
from hydra_rlhf.records import TokenBatch
from hydra_rlhf.stages import micro_batches

SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=12)
BUDGETS = st.integers(1, 120)
CALLS = st.integers(0, 20)


def padded(sizes, group) -> int:
    """Tokens of a group in memory: rows x (longest prompt + longest response)."""
    return len(group) * (max(sizes[i][0] for i in group) + max(sizes[i][1] for i in group))


def plain_greedy(sizes, max_tokens: int) -> list[list[int]]:
    """The same rows in the same order, each put into the last group if that stays within the budget."""
    groups: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), -sizes[i][0], i)):
        if groups and padded(sizes, [*groups[-1], item]) <= max_tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def cost(sizes, groups, call_tokens: int) -> int:
    """What a cut costs in tokens."""
    return sum(padded(sizes, group) + call_tokens for group in groups)


def test_groups_are_alike_in_size():
    # Four rows of 4 + 2 tokens and room for three: filling up gives 3 and 1, which needs 18 tokens; 2 and 2 need 12.
    sizes = [(4, 2)] * 4
    assert [len(group) for group in plain_greedy(sizes, 18)] == [3, 1]
    assert micro_batches.by_token_budget(sizes, 18, 1) == [[0, 1], [2, 3]]


def test_equal_rows_need_no_more_groups_than_filling_up():
    # Ten rows of six and room for four (24): three groups, with 4 rows at the largest.
    groups = micro_batches.by_token_budget([(5, 1)] * 10, 24, 1)
    assert sorted(len(group) for group in groups) in ([2, 4, 4], [3, 3, 4])


def test_a_group_more_is_made_where_it_saves_more_padding_than_it_costs():
    # Rows of 10, 10, 2 and 2 tokens: together 40, in two groups 20 + 4, so a call may cost up to 16.
    sizes = [(1, 9), (1, 9), (1, 1), (1, 1)]
    assert micro_batches.by_token_budget(sizes, 40, 15) == [[0, 1], [2, 3]]
    assert micro_batches.by_token_budget(sizes, 40, 17) == [[0, 1, 2, 3]]
    assert micro_batches.by_token_budget(sizes, 40, 16) == [[0, 1], [2, 3]]  # as cheap, and the smaller one


def test_rows_are_sorted_by_length():
    # 9, 8, 3, 2: together they would be 4 x 9 = 36; two groups of neighbours are 18 and 6.
    assert micro_batches.by_token_budget([(1, 1), (4, 5), (1, 2), (4, 4)], 18, 4) == [[1, 3], [2, 0]]


def test_both_paddings_count():
    # Two rows of 12 tokens each; side by side they are 10 + 10 columns wide, so 40 tokens and not 24.
    sizes = [(10, 2), (2, 10)]
    assert micro_batches.by_token_budget(sizes, 39, 20) == [[0], [1]]
    assert micro_batches.by_token_budget(sizes, 40, 20) == [[0, 1]]


def test_a_row_above_the_budget_is_alone():
    assert micro_batches.by_token_budget([(1, 1), (20, 20), (1, 1)], 4, 1) == [[1], [0, 2]]


def test_equal_lengths_keep_their_order():
    assert micro_batches.by_token_budget([(2, 2), (3, 1), (2, 2)], 1, 0) == [[1], [0], [2]]


@given(SIZES, BUDGETS, CALLS)
def test_every_row_once_and_within_the_budget(sizes, max_tokens, call_tokens):
    groups = micro_batches.by_token_budget(sizes, max_tokens, call_tokens)
    assert sorted(item for group in groups for item in group) == list(range(len(sizes)))
    assert all(len(group) == 1 or padded(sizes, group) <= max_tokens for group in groups)


@given(SIZES, BUDGETS, CALLS)
def test_never_dearer_than_filling_up(sizes, max_tokens, call_tokens):
    ours = micro_batches.by_token_budget(sizes, max_tokens, call_tokens)
    assert cost(sizes, ours, call_tokens) <= cost(sizes, plain_greedy(sizes, max_tokens), call_tokens)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=7), st.integers(1, 60), CALLS)
def test_no_cut_within_the_budget_is_cheaper_or_as_cheap_with_a_smaller_largest(sizes, max_tokens, call_tokens):
    """All cuts of the sorted rows, by trying each."""
    order = sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), -sizes[i][0], i))

    def rank(groups) -> tuple[int, int]:
        return cost(sizes, groups, call_tokens), max(padded(sizes, group) for group in groups)

    possible = [
        [order[a:b] for a, b in pairwise([0, *cuts, len(order)])]
        for num_cuts in range(len(order))
        for cuts in combinations(range(1, len(order)), num_cuts)
    ]
    within = [cut for cut in possible if all(len(g) == 1 or padded(sizes, g) <= max_tokens for g in cut)]
    assert rank(micro_batches.by_token_budget(sizes, max_tokens, call_tokens)) == min(map(rank, within))


@given(SIZES, BUDGETS, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_no_group(sizes, max_tokens, random):
    shuffled = sizes.copy()
    random.shuffle(shuffled)

    def cut(rows) -> list[list[tuple[int, int]]]:
        return [[rows[i] for i in group] for group in micro_batches.by_token_budget(rows, max_tokens, 3)]

    assert cut(shuffled) == cut(sizes)


def batch_of(sizes) -> TokenBatch:
    """Rows of these (prompt, response) lengths; each token says which row it is in."""
    p, r = max(a for a, _ in sizes), max(b for _, b in sizes)
    columns = torch.arange(p + r)
    starts = torch.tensor([p - a for a, _ in sizes])[:, None]
    ends = torch.tensor([p + b for _, b in sizes])[:, None]
    mask = (columns >= starts) & (columns < ends)
    rows = torch.arange(1, len(sizes) + 1)[:, None]
    return TokenBatch(tokens=torch.where(mask, rows, 0), attention_mask=mask, response_mask=mask[:, p:])


def test_columns_that_only_other_rows_need_are_cut():
    # Of prompts of 1 to 4 and responses of 1 to 3, these two rows need 2 and 2 columns.
    batch = batch_of([(4, 1), (2, 1), (1, 2), (1, 3)])
    part = micro_batches.select_rows(batch, torch.tensor([1, 2]))
    assert part.tokens.tolist() == [[2, 2, 2, 0], [0, 3, 3, 3]]
    assert part.attention_mask.tolist() == [[True, True, True, False], [False, True, True, True]]
    assert part.response_mask.tolist() == [[True, False], [True, True]]


@given(SIZES, BUDGETS)
def test_micro_batches_hold_each_row_whole_and_nothing_more(sizes, max_tokens):
    batch = batch_of(sizes)
    seen = []
    parts = list(micro_batches.micro_batches(batch, max_tokens))
    assert [index.tolist() for index, _ in parts] == micro_batches.by_token_budget(sizes, max_tokens, CPU_CALL_TOKENS)
    for index, part in parts:
        assert len(index) == 1 or part.tokens.numel() <= max_tokens
        assert part.tokens.numel() == padded(sizes, index.tolist())
        for row, mask, response in zip(index.tolist(), part.attention_mask, part.response_mask, strict=True):
            assert (int(mask.sum() - response.sum()), int(response.sum())) == sizes[row]
        assert torch.equal(part.tokens, torch.where(part.attention_mask, index[:, None] + 1, 0))
        seen += index.tolist()
    assert sorted(seen) == list(range(len(sizes)))


def test_equal_sets_of_rows_are_cut_equally():
    batch = batch_of([(3, 2), (1, 6), (5, 5), (2, 2), (4, 1), (2, 2)])

    def cut(rows: list[int] | None) -> list[list[int]]:
        return [index.tolist() for index, _ in micro_batches.micro_batches(batch, 16, rows)]

    assert cut([5, 0, 2, 3]) == cut([3, 2, 5, 0])
    assert sorted(row for group in cut([5, 0, 2, 3]) for row in group) == [0, 2, 3, 5]
    assert cut(None) == cut([5, 1, 3, 0, 4, 2])
