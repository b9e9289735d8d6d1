"""Mistakes in `stages/limits.py`: {function: [(what went wrong, source, source with the mistake)]}."""

HALF = "self.micro_batch_tokens = num_tokens // 2"
COUNTED = "which no batch may have come near\n        self.num_retries += 1"
ALONE = "        if num_items == 1:"

CHANGES = {
    "StageLimits": [
        ("half of the limit", HALF, "self.micro_batch_tokens //= 2"),
        ("as large as what failed", HALF, HALF.replace(" // 2", "")),
        ("a third", HALF, HALF.replace("// 2", "// 3")),
        ("retries not counted", COUNTED, ""),
        ("single sequences cut on and on", ALONE, "        if num_items == 0:"),
        ("pairs of rows never cut", ALONE, "        if num_items <= 2:"),
        ("single rows cut on and on", "        if num_rows == 1:", "        if num_rows == 0:"),
        ("rows not halved", "self.rollout_rows = num_rows // 2", "self.rollout_rows = num_rows"),
        (
            "evaluations unbounded",
            "config.sampling.batch_rows or config.rollout_batch_size * config.samples_per_prompt",
            "config.sampling.batch_rows",
        ),
        ("prompts for rows", "config.rollout_batch_size * config.samples_per_prompt", "config.rollout_batch_size"),
        ("setting ignored", "config.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS", "DEFAULT_MICRO_BATCH_TOKENS"),
    ],
    "map_micro_batches": [
        ("goes on after a failure", "                break\n", "                continue\n"),
        ("results alive until the next attempt", "        results.clear()\n", "        kept = results\n"),
        ("gradients not dropped", "        start_over()\n", ""),
        (
            "gradients dropped after the halving",
            "        start_over()\n        gc.collect()\n        release()\n        limits.halve_micro_batch(*failure)",
            "        gc.collect()\n        release()\n        limits.halve_micro_batch(*failure)\n        start_over()",
        ),
        ("failing result kept", "            results.append(result)\n        if", "        if"),
    ],
    "learn_after_looking": [
        ("the first graphs wait", "keeps = number >= len(parts) - num_kept", "keeps = number < num_kept"),
        ("no graph waits", "keeps = number >= len(parts) - num_kept", "keeps = number < 0"),
        ("always a graph", "with torch.set_grad_enabled(keeps):", "with torch.set_grad_enabled(True):"),
        (
            "what is looked at stays",
            "        if keeps:\n            kept.append(seen)",
            "        if True:\n            kept.append(seen)",
        ),
        ("the last one seen stays", "        del seen\n", ""),
        ("another one's graph", "kept.pop() if kept", "kept.pop(0) if kept"),
        ("kept though learned from", "kept.pop() if kept", "kept[-1] if kept"),
        ("in order", "for part in reversed(parts):", "for part in parts:"),
        ("learned before all is seen", "    between()\n\n", ""),
        ("gradients stay", "        forget()\n", ""),
        ("graphs for ever", "        if num_kept > 1:\n", "        if num_kept > 0:\n"),
        ("half of the limit", "num_kept = min(limits.kept_graphs, len(parts))", "num_kept = limits.kept_graphs"),
        ("as many graphs as failed", "self.kept_graphs = num_kept // 2", "self.kept_graphs = num_kept - 1"),
    ],
    "finish_rows": [
        ("limit ignored", "min(limits.rollout_rows or num_rows, num_rows)", "num_rows"),
        (
            "more rows than there are",
            "min(limits.rollout_rows or num_rows, num_rows)",
            "limits.rollout_rows or num_rows",
        ),
        ("given up", "        limits.halve_rollout_rows(size, result.reason)\n", "        return\n"),
        (
            "limit kept",
            "limits.halve_rollout_rows(size, result.reason)",
            "limits.halve_rollout_rows(2 * size, result.reason)",
        ),
        (
            "half of all",
            "limits.halve_rollout_rows(size, result.reason)",
            "limits.halve_rollout_rows(num_rows, result.reason)",
        ),
    ],
    "attempt": [
        ("frames stay alive", "traceback.clear_frames(link.__traceback__)", "pass"),
        ("causes stay alive", "link = link.__cause__ or link.__context__", "link = None"),
        ("every error is memory", "if not is_out_of_memory(error):", "if False:"),
        (
            "only CUDA's error",
            "isinstance(error, MemoryError | torch.OutOfMemoryError)",
            "isinstance(error, torch.OutOfMemoryError)",
        ),
        ("the CPU allocator unknown", "any(text in str(error) for text in OUT_OF_MEMORY)", "False"),
        ("the last line for the reason", ".splitlines()[0]", ".splitlines()[-1]"),
        ("nothing handed back", "        trim(0)\n", "        pass\n"),
    ],
}
