"""Mistakes in `model/stop_strings.py`: {function: [(what went wrong, source, source with the mistake)]}."""

FROM = "range(max(num_known + 1, least), len(ids) + 1)"
WINDOW = "ids[0 if num == least else max(0, num - reach) : num]"

CHANGES = {
    "first_end": [
        ("last token not looked at", FROM, "range(max(num_known + 1, least), len(ids))"),
        ("what is known looked at again", FROM, "range(max(num_known, least), len(ids) + 1)"),
        ("least ignored", FROM, "range(num_known + 1, len(ids) + 1)"),
        ("new tokens alone", WINDOW, "ids[num - 1 : num]"),
        ("whole text each time", WINDOW, "ids[:num]"),
        ("too short a window", "reach = 2 * max(", "reach = max("),
        ("reach of the shortest", "2 * max(len(string.encode())", "2 * min(len(string.encode())"),
        ("all strings needed", "if any(string in text", "if all(string in text"),
        ("one token too many", "                return num\n", "                return num + 1\n"),
    ],
    "cut": [
        ("last of them", "min((at for at", "max((at for at"),
        ("string kept", "return text[: min(", "return text[: 3 + min("),
        ("empty where there is none", "default=len(text)", "default=0"),
        ("at the very start ignored", "if at >= 0", "if at > 0"),
        ("last occurrence", "map(text.find, self.strings)", "map(text.rfind, self.strings)"),
    ],
}
