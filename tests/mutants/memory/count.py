"""Mistakes in `memory/count.py`: {function: [(what went wrong, source, source with the mistake)]}."""

HEADLESS = 'if any(role.trunk == trunk and role.head == "lm" for role in table.values()):'
SETS = "len(adapters(table)) * sizes.lora.num_bytes + len(trunks(table)) * sizes.below_bytes"

CHANGES = {
    "count_method": [
        (
            "every role a trunk",
            "for name in trunks(table))\n    lora",
            "for name in (role.trunk for role in table.values()))\n    lora",
        ),
        ("one LoRA set", SETS, SETS.replace("len(adapters(table)) * ", "")),
        ("a set for each trunk", SETS, SETS.replace("len(adapters(table))", "len(trunks(table))")),
        ("one set below", SETS, SETS.replace("len(trunks(table)) * ", "")),
        ("no set below", SETS, SETS.replace(" + len(trunks(table)) * sizes.below_bytes", "")),
        ("every role a head", 'for role in table.values() if role.head != "lm"}', "for role in table.values()}"),
        (
            "gradients of all passes",
            "max((sum(part.gradient_bytes for part in parts) for parts in trained), default=0)",
            "sum(part.gradient_bytes for parts in trained for part in parts)",
        ),
        (
            "state of one pass",
            "sum(part.optimizer_bytes for parts in trained for part in parts)",
            "sum(part.optimizer_bytes for part in trained[0])",
        ),
        ("gradients left out of the total", "head_bytes + gradients + optimizer,", "head_bytes + optimizer,"),
        ("state as large as the weights", "sum(part.optimizer_bytes for parts", "sum(part.num_bytes for parts"),
    ],
    "trained_parts and trunk_part": [
        ("adapters train the trunk", "if adapter is None else sizes.lora\n    roles", "\n    roles"),
        (
            "heads do not learn",
            'return [body, *(sizes.scalar_head for role in roles if role.head != "lm")]',
            "return [body]",
        ),
        ("a head for each role", 'for role in roles if role.head != "lm")]', "for role in roles)]"),
        ("every trunk has an LM head", HEADLESS, "if True:"),
        ("no trunk has an LM head", HEADLESS, "if False:"),
        ("any trunk's LM head", HEADLESS, HEADLESS.replace("role.trunk == trunk and ", "")),
        ("gradients of the head", "whole.gradient_bytes - head.gradient_bytes", "whole.gradient_bytes"),
        ("state of the head", "whole.optimizer_bytes - head.optimizer_bytes", "whole.optimizer_bytes"),
        ("reference and reward learn", "{name: table[name] for name in TRAINABLE_ROLES if name in table}", "table"),
    ],
    "describe_role": [
        ("nothing is trained", "    if name in TRAINABLE_ROLES:\n        body", "    if False:\n        body"),
        ("everything is trained", "    if name in TRAINABLE_ROLES:\n        body", "    if True:\n        body"),
        ("head left out", ' + (0 if role.head == "lm" else sizes.scalar_head.num_bytes)', ""),
        (
            "head of the actor",
            '(0 if role.head == "lm" else sizes.scalar_head.num_bytes)',
            "sizes.scalar_head.num_bytes",
        ),
        (
            "trunk for its LoRA set",
            "sizes.lora if role.adapter is not None else trunk_part(table, role.trunk, sizes)",
            "trunk_part(table, role.trunk, sizes)",
        ),
    ],
}
