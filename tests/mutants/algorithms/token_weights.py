"""Mistakes in `algorithms/token_weights.py`: {function: [(what went wrong, source, source with the mistake)]}."""

MEAN = "num_tokens / (num_responses * lengths.double())"
FULL = "num_tokens / (num_responses * max_tokens)"

CHANGES = {
    "response_mean_weights": [
        ("inverted", MEAN, "num_responses * lengths.double() / num_tokens"),
        ("lengths ignored", MEAN, "num_tokens / (num_responses * torch.ones_like(lengths).double())"),
        ("longer ones count more", MEAN, "num_tokens * lengths.double() / num_responses"),
        ("responses of the micro-batch", MEAN, "num_tokens / (len(lengths) * lengths.double())"),
        ("tokens of the micro-batch", MEAN, "lengths.sum() / (num_responses * lengths.double())"),
        ("sum over responses", MEAN, "num_tokens / lengths.double()"),
        ("tokens left out", MEAN, "1 / (num_responses * lengths.double())"),
    ],
    "full_length_weights": [
        ("inverted", FULL, "num_responses * max_tokens / num_tokens"),
        ("length left out", FULL, "num_tokens / num_responses"),
        ("responses left out", FULL, "num_tokens / max_tokens"),
        ("tokens left out", FULL, "1 / (num_responses * max_tokens)"),
        ("longest of the micro-batch", FULL, "num_tokens / (num_responses * int(lengths.max()))"),
        ("responses of the micro-batch", FULL, "num_tokens / (len(lengths) * max_tokens)"),
        ("mean length", FULL, "num_tokens / float(lengths.sum())"),
    ],
}
