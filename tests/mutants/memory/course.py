"""Mistakes in `memory/course.py`: {function: [(what went wrong, source, source with the mistake)]}."""

AT = "return self.one_row + (num_rows - 1) * self.per_row"
DEEPER = "(num_layers - self.depth) * self.per_layer.at(num_rows)"
HIGHER = "        if not found or line.per_row > found[-1].per_row:"
FELL_APART = "highest = Line(max(one.moments), max(two.moments) - max(one.moments))"

CHANGES = {
    "Line": [
        ("starts at no rows", AT, AT.replace("(num_rows - 1)", "num_rows")),
        ("one row for all", AT, "return self.one_row"),
        ("proportional", AT, "return num_rows * self.one_row"),
        ("steps of the first", AT, AT.replace("self.per_row", "self.one_row")),
        ("falls", AT, AT.replace("+ (", "- (")),
    ],
    "Need.of": [
        ("nothing deep", "(deep if i in one.deep else shallow)", "shallow"),
        ("all deep", "(deep if i in one.deep else shallow)", "deep"),
        ("two rows for one", "Line(a, b - a)", "Line(b, b - a)"),
        ("two rows' bytes a row", "Line(a, b - a)", "Line(a, b)"),
        ("kept of two rows", "Line(one.kept, two.kept - one.kept)", "Line(two.kept, two.kept - one.kept)"),
        ("layers of one row", "Line(one.per_layer, two.per_layer - one.per_layer)", "Line(one.per_layer, 0.0)"),
        ("moments that do not belong together", "        if not same:", "        if False:"),
        ("not deep where it may be", "deep, shallow = [highest], [highest]", "deep, shallow = [], [highest]"),
        ("first moments for the highest", FELL_APART, FELL_APART.replace("max(", "min(")),
    ],
    "Need.peak": [
        ("shallow moments left out", "return max(shallow, self.deep", "return max(0.0, self.deep"),
        ("deep moments left out", "return max(shallow, self.deep_peak(num_rows, num_layers))", "return shallow"),
        ("layers that were run again", DEEPER, DEEPER.replace(" - self.depth", "")),
        ("layers of one row", DEEPER, DEEPER.replace("at(num_rows)", "at(1)")),
        ("one layer too few", DEEPER, DEEPER.replace("self.depth)", "self.depth - 1)")),
    ],
    "highest_lines": [
        ("only the steepest", HIGHER, "        if line.per_row == max(x.per_row for x in lines):"),
        ("only the first", HIGHER, "        if not found:"),
        ("all", HIGHER, "        if True:"),
        ("equally steep ones too", HIGHER, HIGHER.replace("line.per_row >", "line.per_row >=")),
        ("lowest first", "reverse=True", "reverse=False"),
    ],
}
