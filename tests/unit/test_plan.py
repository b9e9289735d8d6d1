"""The memory plan's arithmetic by hand numbers, over a simulation that is made up; contract tests hold it to runs."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from hydra_rlhf.memory import plan
from hydra_rlhf.memory.count import BaseSizes, Part
from hydra_rlhf.memory.meta_passes import PassKind, Rows
from hydra_rlhf.memory.simulate import PassBytes, Simulation
from hydra_rlhf.model.roles import ROLES


class MadeUp(Simulation):
    """A simulation that gives what it is told to, and remembers what it was asked."""

    def __init__(self, need: Callable[[PassKind, Rows], PassBytes]) -> None:
        self.need = need
        self.asked: list[tuple[PassKind, Rows, int]] = []

    def micro_batch(self, kind: PassKind, rows: Rows, *, checkpointed: int = 0) -> PassBytes:
        self.asked.append((kind, rows, checkpointed))
        return self.need(kind, rows)

    def rollout(self, rows: Rows, *, adapter: bool) -> PassBytes:
        """64 bytes of cache a row, 20 while drawing, 50 at the worst."""
        cache = 64.0 * rows.num
        return PassBytes(kept=cache, head=cache + 20, peak=cache + 50 + adapter)


SIZES = BaseSizes(
    trunk=Part(num_bytes=1000, gradient_bytes=1000, stepping_bytes=2000, optimizer_bytes=6000),
    lm_head=Part(num_bytes=0, gradient_bytes=0, stepping_bytes=0, optimizer_bytes=0),
    lora=Part(num_bytes=100, gradient_bytes=100, stepping_bytes=200, optimizer_bytes=600),
    scalar_head=Part(num_bytes=10, gradient_bytes=10, stepping_bytes=20, optimizer_bytes=60),
)
WORK = {
    "prompt_tokens": 6,
    "response_tokens": 4,
    "data_response_tokens": 3,
    "num_sequences": 8,
    "minibatch_size": 4,
    "batch_size": 5,
}
HELD = {"weights": 1000, "adapters": 220, "optimizer": 1260, "batch": 1824}
"""Of hydra-ppo: two sets of 100 and two heads of 10; 600 + 660 of state; 8 x (10 x 10 + 4 x 32) bytes of rollout."""


def in_proportion(kind: PassKind, rows: Rows) -> PassBytes:
    """Scoring takes 30 bytes a row and keeps 10; learning keeps 100, the heads 40 more, and needs 150 at the worst."""
    if not kind.learns:
        return PassBytes(kept=10.0 * rows.num, head=20.0 * rows.num, peak=30.0 * rows.num)
    return PassBytes(kept=100.0 * rows.num, head=140.0 * rows.num, peak=150.0 * rows.num)


def heavy(kind: PassKind, rows: Rows) -> PassBytes:
    """5000 bytes a row, all of them kept."""
    del kind
    return PassBytes(kept=5000.0 * rows.num, head=5000.0 * rows.num, peak=5000.0 * rows.num)


def planner(need: Callable[[PassKind, Rows], PassBytes] = in_proportion, *, entropy: bool = False):
    """A planner over the made-up simulation."""
    return plan.Planner(MadeUp(need), SIZES, plan.Workload(**WORK, entropy_gradient=entropy))


def asked(made_up: plan.Planner) -> list[tuple[PassKind, Rows, int]]:
    """The passes that the simulation was asked for."""
    assert isinstance(made_up.simulation, MadeUp)
    return made_up.simulation.asked


def cuts(tokens: int = 20, rows: int = 3, layers: int = 0, graphs: int = 1):
    """Settings."""
    return plan.Cuts(micro_batch_tokens=tokens, rollout_rows=rows, checkpointed_layers=layers, kept_graphs=graphs)


def shown(parts: dict[str, int]) -> dict[str, int]:
    """The parts that are there."""
    assert tuple(parts) == plan.PARTS
    return {name: size for name, size in parts.items() if size}


def test_rollout_and_scoring_hold_everything_but_gradients():
    phases = planner().ppo(ROLES["hydra-ppo"], cuts())
    assert list(phases) == ["rollout", "score", "update"]
    # 3 rows: 192 of cache; 51 at the worst beside it, because the actor's LoRA set is on.
    assert shown(phases["rollout"]) == HELD | {"cache": 192, "activations": 51}
    # 20 tokens are 2 sequences of 10: 60 bytes.
    assert shown(phases["score"]) == HELD | {"activations": 60}


def test_scoring_needs_what_its_worst_pass_needs():
    def half(kind: PassKind, rows: Rows) -> PassBytes:
        """LoRA off needs half."""
        full = in_proportion(kind, rows)
        return full if kind.adapter else replace(full, peak=full.peak / 2)

    assert shown(planner(half).ppo(ROLES["hydra-ppo"], cuts())["score"]) == HELD | {"activations": 60}


def test_with_several_micro_batches_gradients_are_there_all_along():
    made_up = planner()
    update = made_up.ppo(ROLES["hydra-ppo"], cuts(layers=7))["update"]
    # The critic's pass trains its set and its head: 110 bytes of gradient beside 2 rows x 150.
    assert shown(update) == HELD | {"gradients": 110, "activations": 300}
    assert {layers for kind, _, layers in asked(made_up) if kind.learns} == {7}
    assert {layers for kind, _, layers in asked(made_up) if not kind.learns} == {0}


def test_with_a_single_micro_batch_gradients_come_as_activations_go():
    # 40 tokens are the whole minibatch of 4: 600 at the worst, without gradients. Then 110 of gradients beside
    # 600 - 400 that are kept no more; then 220 as the optimizer steps in float32.
    assert shown(planner().ppo(ROLES["hydra-ppo"], cuts(40))["update"]) == HELD | {"activations": 600}

    def soon_gone(kind: PassKind, rows: Rows) -> PassBytes:
        return PassBytes(kept=300.0, head=300.0, peak=310.0) if kind.learns else in_proportion(kind, rows)

    late = planner(soon_gone).ppo(ROLES["hydra-ppo"], cuts(40))["update"]
    assert shown(late) == HELD | {"activations": 310}

    def small(kind: PassKind, rows: Rows) -> PassBytes:
        return PassBytes(kept=5.0, head=5.0, peak=105.0) if kind.learns else in_proportion(kind, rows)

    # 110 + (105 - 5) = 210 after backward, 220 in the step.
    assert shown(planner(small).ppo(ROLES["hydra-ppo"], cuts(40))["update"]) == HELD | {"gradients": 220}

    def wide_head(kind: PassKind, rows: Rows) -> PassBytes:
        return PassBytes(kept=10.0, head=90.0, peak=250.0) if kind.learns else in_proportion(kind, rows)

    # What the heads had (80) is gone when the trunk's backward is at its worst: 110 + 250 - 80 = 280.
    assert shown(planner(wide_head).ppo(ROLES["hydra-ppo"], cuts(40))["update"]) == HELD | {
        "gradients": 110,
        "activations": 170,
    }


def test_graphs_of_a_joined_pass_wait_beside_the_one_that_is_gone_through():
    def with_graph(kind: PassKind, rows: Rows) -> PassBytes:
        """Between forward and backward 110 bytes a row: 100 of the layers and 10 of the heads."""
        return replace(in_proportion(kind, rows), graph=110.0 * rows.num)

    joined, held = ROLES["j-hydra-ppo"], HELD | {"adapters": 120, "optimizer": 660}
    # Micro-batches of 1 row, 4 in a minibatch. Two graphs of 110 wait while the third needs 150, without gradients; one
    # waits beside 110 of gradients: 370 either way, and then 260 + 110. With four graphs 3 x 110 + 150.
    for graphs, planned in ((1, {"gradients": 110, "activations": 150}), (4, {"activations": 480})):
        assert shown(planner(with_graph).ppo(joined, cuts(10, graphs=graphs))["update"]) == held | planned
    assert plan.total(planner(with_graph).ppo(joined, cuts(10, graphs=3))["update"]) == plan.total(held) + 370
    # No more wait than there are: 3 rows and 1 row are two micro-batches, 330 + 450. All 4 rows in one: none waits.
    for tokens, planned in ((30, 780), (40, 600)):
        update = planner(with_graph).ppo(joined, cuts(tokens, graphs=9))["update"]
        assert plan.total(update) == plan.total(held) + planned
    # Passes of their own let no graph wait.
    assert shown(planner(with_graph).ppo(ROLES["hydra-ppo"], cuts(10, graphs=4))["update"]) == HELD | {
        "gradients": 110,
        "activations": 150,
    }

    def heavy_start(kind: PassKind, rows: Rows) -> PassBytes:
        """Gradients weigh more than a graph: the second micro-batch is the peak."""
        del kind, rows
        return PassBytes(kept=20.0, head=90.0, peak=90.0, graph=30.0)

    # 30 + 90 + 110 with two graphs, since one waits beside the second: 0 x 30 + 90 + 110 = 200; of the first 120.
    # Stepping needs 220, so three: 30 + 90 + 110 = 230. What the heads need above the layers' (20 + 30) is called so.
    assert shown(planner(heavy_start).ppo(joined, cuts(10, graphs=2))["update"]) == held | {"gradients": 220}
    assert shown(planner(heavy_start).ppo(joined, cuts(10, graphs=3))["update"]) == held | {
        "gradients": 110,
        "activations": 50,
        "logits": 70,
    }


def test_what_the_heads_need_is_called_logits_where_it_makes_the_peak():
    def heads(kind: PassKind, rows: Rows) -> PassBytes:
        del kind
        return PassBytes(kept=100.0 * rows.num, head=190.0 * rows.num, peak=190.0 * rows.num)

    phases = planner(heads).ppo(ROLES["hydra-ppo"], cuts())
    assert shown(phases["score"]) == HELD | {"activations": 200, "logits": 180}
    assert shown(phases["update"]) == HELD | {"gradients": 110, "activations": 200, "logits": 180}


def test_which_passes_are_asked_for():
    made_up = planner(entropy=True)
    made_up.ppo(ROLES["hydra-ppo"], cuts())
    kinds = [kind for kind, _, _ in asked(made_up)]
    assert kinds == [
        PassKind(adapter=True, lm_head=True),
        PassKind(adapter=True, value_head=True),
        PassKind(lm_head=True, reward_head=True),
        PassKind(adapter=True, lm_head=True, learns=True, entropy_gradient=True),
        PassKind(adapter=True, value_head=True, learns=True),
    ]
    assert {(rows.prompt, rows.response) for _, rows, _ in asked(made_up)} == {(6, 4)}
    joined = planner()
    joined.ppo(ROLES["j-hydra-ppo"], cuts())
    assert [kind for kind, _, _ in asked(joined) if kind.learns] == [
        PassKind(adapter=True, lm_head=True, value_head=True, learns=True)
    ]
    whole = planner()
    whole.ppo(ROLES["ppo"], cuts())
    assert not any(kind.adapter for kind, _, _ in asked(whole))


def test_the_actor_of_whole_trunks_is_sampled_without_an_adapter():
    phases = planner().ppo(ROLES["ppo"], cuts())
    assert phases["rollout"]["activations"] == 50
    # Four trunks; the critic's gradients (1010) are the larger ones, both states (6000 + 6060) stay.
    assert phases["update"]["weights"] == 4000
    assert phases["update"]["optimizer"] == 12060
    # Stepping the critic in float32 (2020) needs more than 1010 of gradients and 300 of activations.
    assert (phases["update"]["gradients"], phases["update"]["activations"]) == (2020, 0)


@pytest.mark.parametrize(
    ("lora", "adapters", "gradients", "optimizer"), [(True, 110, 110, 660), (False, 10, 1010, 6060)]
)
def test_stage_1_learns_from_pairs(lora: bool, adapters: int, gradients: int, optimizer: int):
    made_up = planner(heavy)
    # 40 tokens are 2 pairs of 2 x 9 tokens: 4 rows.
    parts = made_up.stage1("hydra_sft", cuts(40, layers=2), lora=lora)
    assert shown(parts) == {
        "weights": 1000,
        "adapters": adapters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": 20_000,
    }
    assert asked(made_up) == [
        (
            PassKind(adapter=lora, learns=True, lm_head=True, reward_head=True, half=True),
            Rows(num=4, prompt=6, response=3),
            2,
        )
    ]


def test_stage_1_learns_from_demonstrations():
    made_up = planner(heavy)
    # 40 tokens are 4 of 9 tokens; a model without a reward head has no scalar head.
    parts = made_up.stage1("sft", cuts(40), lora=True)
    assert shown(parts) == {"weights": 1000, "adapters": 100, "gradients": 100, "optimizer": 600, "activations": 20_000}
    assert asked(made_up)[0][0] == PassKind(adapter=True, learns=True, lm_head=True)
    # All 5 at once: gradients come as activations go.
    assert "gradients" not in shown(made_up.stage1("sft", cuts(45), lora=True))
    assert "gradients" not in shown(made_up.stage1("hydra_sft", cuts(90), lora=True))


HELD_FOR_PAIRS = {"weights": 1000, "adapters": 100, "optimizer": 600}
"""Of dpo: one trunk, one set, its state."""


def test_learning_from_pairs_with_a_reference():
    made_up = planner()
    # 40 tokens are 2 pairs of 2 x 9 tokens: 4 rows x 150, and the set's gradients of the micro-batches before.
    phases = made_up.preference(ROLES["dpo"], ("reference",), cuts(40, layers=2))
    assert list(phases) == ["preference", "rollout"]
    assert shown(phases["preference"]) == HELD_FOR_PAIRS | {"gradients": 100, "activations": 600}
    rows = Rows(num=4, prompt=6, response=3)
    assert asked(made_up) == [
        (PassKind(adapter=True, learns=True, lm_head=True), rows, 2),
        (PassKind(lm_head=True), rows, 0),
    ]
    # The look at held-out prompts: 3 rows of 64 bytes of cache, 51 at the worst beside it.
    assert shown(phases["rollout"]) == HELD_FOR_PAIRS | {"cache": 192, "activations": 51}
    # simpo asks nobody but the actor.
    alone = planner()
    assert alone.preference(ROLES["simpo"], (), cuts(40, layers=2)) == phases
    assert asked(alone) == [(PassKind(adapter=True, learns=True, lm_head=True), rows, 2)]


def test_reading_pairs_may_need_more_than_learning_from_them():
    def long_read(kind: PassKind, rows: Rows) -> PassBytes:
        """Learning needs 10 bytes a row, reading 70."""
        size = (10.0 if kind.learns else 70.0) * rows.num
        return PassBytes(kept=0.0, head=0.0, peak=size)

    several = planner(long_read).preference(ROLES["dpo"], ("reference",), cuts(40))["preference"]
    assert shown(several) == HELD_FOR_PAIRS | {"gradients": 100, "activations": 280}
    # All 5 pairs at once: 10 rows, and no gradient is there while they are read.
    once = planner(long_read).preference(ROLES["dpo"], ("reference",), cuts(90))["preference"]
    assert shown(once) == HELD_FOR_PAIRS | {"activations": 700}
    # Without a reader: 10 rows x 10 that nothing keeps, beside the gradients that have come by then.
    alone = planner(long_read).preference(ROLES["simpo"], (), cuts(90))["preference"]
    assert shown(alone) == HELD_FOR_PAIRS | {"gradients": 100, "activations": 100}


def test_micro_batches_take_at_least_one_and_at_most_all():
    assert [plan.micro_rows(cuts(tokens), 10, 4) for tokens in (1, 10, 19, 20, 40, 1000)] == [1, 1, 1, 2, 4, 4]


def test_phases_come_one_after_the_other():
    assert plan.total({"weights": 2, "cache": 3}) == 5
    assert plan.peak({"a": {"x": 2, "y": 3}, "b": {"x": 4}}) == 5
