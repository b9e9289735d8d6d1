"""Mistakes in `benchmark/work.py`: {function: [(what went wrong, source, source with the mistake)]}."""

CHANGES = {
    "step_work": [
        ("a decode step for the first token", "max(0.0, batch.response_tokens - 1)", "batch.response_tokens"),
        ("context at its longest", "batch.response_tokens / 2", "batch.response_tokens"),
        ("cache of one row", "read += batch.num_decoded * context", "read += context"),
        ("LoRA not read", "model.decode_bytes + (model.lora_bytes if adapted else 0)", "model.decode_bytes"),
        ("one product of attention", "per_token += 4 *", "per_token += 2 *"),
        ("decoding one row", "num_steps * batch.num_decoded * per_token", "num_steps * per_token"),
        (
            "head on all of the prompt",
            "+ 2 * model.head_params * batch.num_decoded",
            "+ 2 * model.head_params * prompts",
        ),
        ("greedy responses cost nothing", "return self.num_sequences + self.num_greedy", "return self.num_sequences"),
        ("greedy responses are not scored", "sum(forwards.values()) + compared", "sum(forwards.values())"),
        ("all roles look at greedy ones", 'scored = {"reward": table["reward"]}', "scored = dict(table)"),
        ("only what learns is scored", "roles in passes(table).items()", "roles in learning.items()"),
        ("forward left out of updating", "* (learned + backward)", "* backward"),
        ("forwards of all epochs shared", "shared_flops=learned", "shared_flops=batch.num_epochs * learned"),
    ],
    "forward_flops and head_flops": [
        ("LoRA always on", "batch.num_tokens, length, adapter is not None)", "batch.num_tokens, length, True)"),
        ("LoRA always off", "batch.num_tokens, length, adapter is not None)", "batch.num_tokens, length, False)"),
        (
            "attention over the prompt",
            "2 * model.num_layers * model.query_width * length",
            "2 * model.num_layers * length",
        ),
        ("head on every token", "batch.num_response_tokens if reads", "batch.num_tokens if reads"),
        ("every pass has an LM head", "if reads else 0.0", "if True else 0.0"),
        ("no pass has one", "if reads else 0.0", "if False else 0.0"),
    ],
    "backward_flops": [
        (
            "weights learn for nothing",
            "(4 * model.block_params + attention) + 2 * head",
            "(2 * model.block_params + attention) + 2 * head",
        ),
        ("head frozen where the trunk learns", "attention) + 2 * head", "attention) + head"),
        (
            "base learns too",
            "(2 * model.block_params + 4 * model.lora_params",
            "(4 * model.block_params + 4 * model.lora_params",
        ),
        ("LoRA frozen", "4 * model.lora_params + attention", "2 * model.lora_params + attention"),
        ("attention as in forward", "ATTENTION_BACKWARD * attention_flops", "attention_flops"),
    ],
    "bound": [
        ("the faster of the two", "decode = max(", "decode = min("),
        (
            "bandwidth alone",
            "max(work.decode_bytes / bandwidth, work.decode_flops / matrix_rate)",
            "work.decode_bytes / bandwidth",
        ),
        ("prefill left out", "decode + work.prefill_flops / matrix_rate", "decode"),
        ("shared forwards counted twice", "self.update_s - self.shared_s", "self.update_s"),
        ("scoring left out", "self.generate_s + self.score_s + self", "self.generate_s + self"),
    ],
}
