"""The report's pictures of preference training."""

from hydra_rlhf.reporting.plots import PPO, STAGE1, Chart, Lines, line_chart
from hydra_rlhf.reporting.record import RunRecord

PAIRS = (
    Lines(
        title="Loss",
        unit="nats per pair",
        lines=(("loss/preference", "training"), ("eval/preference_loss", "held out")),
        caption="DPO starts at 0.69. Held out rising again while training falls: fewer epochs.",
    ),
    Lines(
        title="Margin",
        unit="implicit reward, no unit",
        lines=(("train/margin", "training"), ("eval/margin", "held out")),
        caption="By how much the reward that is read off the actor puts chosen above rejected; zero (dashed) is none.",
        level=0.0,
    ),
    Lines(
        title="Log-prob of a response",
        unit="nats per response",
        lines=(("train/chosen_logprob", "chosen"), ("train/rejected_logprob", "rejected")),
        caption="The gap is what is learned. Often both fall; chosen falling fast means that the text itself suffers.",
    ),
)
STEPS = "optimizer step"


def preference_charts(record: RunRecord) -> list[Chart]:
    """Loss, accuracy and margins of pairs, and the actor's responses to held-out prompts as in PPO."""
    charts = [line_chart(record, "preference", spec, STEPS) for spec in (*PAIRS, *STAGE1, *PPO)]
    return [chart for chart in charts if chart is not None]
