"""Best of n: the start answers n times and the reward head picks one. What PPO has to beat, and costs no training."""

import math
from collections.abc import Sequence

from hydra_rlhf.data.formats import TokenizedPrompt
from hydra_rlhf.evaluation.answers import Answers
from hydra_rlhf.stages.finished import Finished
from hydra_rlhf.stages.rollout import prompt_batch, sample_responses, score_roles

NO_HEAD = (
    "--best-of lets a run's reward head pick, and no run here has one: they learned from a reward function alone, or "
    "from pairs as they are; leave it out, or (in compare) name a run with a reward head too"
)


def best_of_n(finished: Finished, prompts: Sequence[TokenizedPrompt], n: int, *, seed: int) -> Answers:
    """The best-scored of `n` samples of the reference for every prompt, by the run's reward head."""
    model, config, limits = finished.model, finished.run.recipe.ppo, finished.limits
    batch = prompt_batch(prompts, range(len(prompts)), n, model.pad_id, model.device)
    stream = (seed, "best of n", n)
    responses = sample_responses(
        model, finished.chat, "reference", batch, config.sampling, stream=stream, limits=limits
    )
    scored = score_roles(
        model, responses.batch, ["reward"], temperature=config.sampling.temperature, limits=limits
    ).scores.tolist()
    best = [max(range(row, row + n), key=scored.__getitem__) for row in range(0, len(scored), n)]
    lengths = responses.batch.response_mask.sum(dim=1).tolist()
    return Answers(
        player=f"best of {n}",
        run=str(finished.run.folder),
        checkpoint="start",
        texts=[responses.texts[row] for row in best],
        ended=[bool(responses.ended[row]) for row in best],
        num_tokens=[lengths[row] for row in best],
        notes={"kl_bound": best_of_n_kl_bound(n)},
    )


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n: an upper bound of KL(best of n from the start) in nats per response (Stiennon et al. 2020;
    a bound and not the value where samples repeat: Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n
