"""Mistakes in `memory/plan.py`: {function: [(what went wrong, source, source with the mistake)]}."""

ONCE = "once=num == work.minibatch_size, "
WAITING = "min(cuts.kept_graphs, -(-work.minibatch_size // num)) - 1 if len(roles) > 1 else 0"
LATE = "peak=need.peak - max(need.kept, need.head - need.kept)"
LOGITS = "max(0.0, need.head - max(need.kept, less)) if need.head >= need.peak else 0.0"
PAIRS = "sequence * (2 if pairs else 1), work.batch_size) * (2 if pairs else 1)"

CHANGES = {
    "Planner.ppo": [
        ("scoring of the last pass only", "        score = max(\n", "        score = min(\n"),
        (
            "scored row by row",
            "micro = replace(group, num=micro_rows(cuts, sequence, work.num_sequences))",
            "micro = group",
        ),
        (
            "responses left out of the rows",
            "sequence = work.prompt_tokens + work.response_tokens\n        batch",
            "sequence = work.prompt_tokens\n        batch",
        ),
        ("cache counted twice", "replace(need, kept=0.0), less=need.kept)", "need)"),
        ("cache lost", '"cache": round(need.kept), ', ""),
        ("batch of one sequence", "batch = work.num_sequences * (", "batch = ("),
        (
            "sampled without the adapter",
            'adapter=table["actor"].adapter is not None)\n        held',
            "adapter=False)\n        held",
        ),
        ("smallest learning pass", "return max(found, key=total)", "return min(found, key=total)"),
        ("entropy of the critic too", ' and "actor" in roles,', ","),
        ("nothing learns", "                learns=True,\n                entropy", "                entropy"),
        (
            "nothing recomputed",
            "need = self.simulation.micro_batch(kind, rows, checkpointed=cuts.checkpointed_layers)\n            found",
            "need = self.simulation.micro_batch(kind, rows)\n            found",
        ),
        ("always one micro-batch", ONCE, "once=True, "),
        ("never one micro-batch", ONCE, "once=False, "),
        ("graphs wait in any pass", WAITING, WAITING.replace("len(roles) > 1", "roles")),
        ("no graph waits", WAITING, "0"),
        ("a graph too many", WAITING, WAITING.replace(" - 1", "")),
        ("more graphs than micro-batches", WAITING, "cuts.kept_graphs - 1 if len(roles) > 1 else 0"),
        (
            "a rest is no micro-batch",
            WAITING,
            WAITING.replace("-(-work.minibatch_size // num)", "work.minibatch_size // num"),
        ),
        ("no state", '            "optimizer": counted.optimizer,\n', ""),
        ("heads left out", "counted.adapters + counted.heads", "counted.adapters"),
    ],
    "Planner.preference": [
        ("pairs as single rows", "num = 2 * micro_rows(cuts, 2 * (", "num = micro_rows(cuts, 2 * ("),
        ("pairs cut as single rows", "micro_rows(cuts, 2 * (work", "micro_rows(cuts, (work"),
        (
            "responses of PPO",
            "response=work.data_response_tokens)\n        ((train",
            "response=work.response_tokens)\n        ((train",
        ),
        ("readers forgotten", "if name in readers}", "if name in ()}"),
        ("everybody reads", "if name in readers}", "}"),
        ("gradients while nothing was learned", "gradients = 0 if once else sum(", "gradients = sum("),
        ("no gradients beside reading", "gradients = 0 if once else sum(", "gradients = 0 * sum("),
        ("never one micro-batch", "once = num == 2 * work.batch_size", "once = False"),
        ("single micro-batch missed", "once = num == 2 * work.batch_size", "once = num == work.batch_size"),
        ("smallest moment", '"preference": max(found, key=total)', '"preference": min(found, key=total)'),
        ("without the reference's passes", "found.append(phase(", "found and (phase("),
    ],
    "Planner.stage1": [
        ("pairs as single rows", PAIRS, PAIRS.replace(" * (2 if pairs else 1)", "")),
        ("pairs cut as single rows", PAIRS, PAIRS.replace("sequence * (2 if pairs else 1)", "sequence")),
        (
            "responses of PPO",
            "response=work.data_response_tokens)\n        kind = replace(kind_of(lora",
            "response=work.response_tokens)\n        kind = replace(kind_of(lora",
        ),
        ("all weights train", "[self.sizes.lora if lora else self.sizes.trunk, *heads]", "[self.sizes.trunk, *heads]"),
        ("all rows meet the LM head", "learns=True, half=pairs)", "learns=True)"),
        ("adapter lost", "(body.num_bytes if lora else 0)", "0"),
        ("adapter always", "(body.num_bytes if lora else 0)", "body.num_bytes"),
        (
            "single micro-batch of pairs missed",
            "once = num == work.batch_size * (2 if pairs else 1)",
            "once = num == work.batch_size",
        ),
    ],
    "learning and phase": [
        ("float32 step forgotten", "part.stepping_bytes for part", "part.gradient_bytes for part"),
        (
            "no gradients beside activations",
            'return [phase(held | {"gradients": gradients}, need), stepping]',
            "return [phase(held, need), stepping]",
        ),
        (
            "no step",
            '[phase(held | {"gradients": gradients}, need), stepping]',
            '[phase(held | {"gradients": gradients}, need)]',
        ),
        ("all graphs at the end", "(num_waiting - 1) * need.graph", "num_waiting * need.graph"),
        ("one graph waits", "beside(need, num_waiting * need.graph)", "beside(need, need.graph)"),
        (
            "graphs without what heads keep",
            "beside(need, num_waiting * need.graph)",
            "beside(need, num_waiting * need.kept)",
        ),
        ("no gradients beside the second", 'phase(held | {"gradients": gradients}, second)', "phase(held, second)"),
        ("graphs wait after the heads", "peak=need.peak + more)", "peak=need.peak)"),
        ("graphs called logits", "kept=need.kept + more, head", "head"),
        ("nothing gone when gradients are there", LATE, "peak=need.peak"),
        ("heads not gone", LATE, "peak=need.peak - need.kept"),
        ("activations not gone", LATE, "peak=need.peak - need.head + need.kept"),
        ("logits always named", LOGITS, "max(0.0, need.head - max(need.kept, less))"),
        ("logits never named", LOGITS, "0.0"),
        ("logits with what is kept", LOGITS, LOGITS.replace("need.head - max(need.kept, less)", "need.head")),
        ("peak is the sum", "    return max(total(parts) for", "    return sum(total(parts) for"),
    ],
    "micro_rows": [
        (
            "none where one is too large",
            "max(1, cuts.micro_batch_tokens // tokens_each)",
            "cuts.micro_batch_tokens // tokens_each",
        ),
        (
            "more than there are",
            "min(num, max(1, cuts.micro_batch_tokens // tokens_each))",
            "max(1, cuts.micro_batch_tokens // tokens_each)",
        ),
        ("rounded up", "cuts.micro_batch_tokens // tokens_each)", "-(-cuts.micro_batch_tokens // tokens_each))"),
        ("always all", "min(num, max(1, cuts.micro_batch_tokens // tokens_each))", "num"),
        ("always one", "min(num, max(1, cuts.micro_batch_tokens // tokens_each))", "min(num, 1)"),
    ],
}
