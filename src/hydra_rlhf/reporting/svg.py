"""Charts as inline SVG: text stays text, colours follow the page's theme, and equal inputs give equal bytes.

Colours are drawn in the light palette and then replaced by CSS variables, so that one picture serves light and dark.
"""

import io
import re
from collections.abc import Callable
from typing import Any

# Okabe and Ito's colour-blind-safe hues, darkened until each has a contrast of at least 3:1 on white.
BLUE, ORANGE, GREEN, PURPLE, OCHRE, SKY = "#0f6cb5", "#cf5200", "#0a8662", "#a34a8f", "#a37500", "#2e97cd"
INK, GRID, MUTED, WASH = "#4b5563", "#e5e7eb", "#8d95a1", "#eef4fa"
VARIABLES = {
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PURPLE: "--purple",
    OCHRE: "--ochre",
    SKY: "--sky",
    INK: "--ink-soft",
    GRID: "--grid",
    MUTED: "--muted",
    WASH: "--wash",
}
"""CSS variable of each colour; the values in the style sheet differ between light and dark."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hydra-rlhf",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 12,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.left": False,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "figure.dpi": 72,
}


def draw_svg(draw: Callable[[Any], None], key: str, words: str, *, width: int = 380, height: int = 240) -> str:
    """Draw into a figure of `width` x `height` CSS pixels and return it as inline SVG, described by `words`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    return _inline(buffer.getvalue(), key, words)


def _inline(svg: str, key: str, words: str) -> str:
    """Matplotlib's file as a part of a page: theme colours, the page's font, ids that are unique in the page."""
    from markupsafe import escape

    body = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="([^"]+)"', body)
    assert view_box is not None
    body = body[body.index(">") + 1 :]
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{key}-", body).replace("xlink:href", "href")
    body = re.sub(r"(font: (?:[a-z0-9]+ )*[\d.]+px )[^;\"]+", r"\1sans-serif", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    body = re.sub(r">\s+<", "><", re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL))
    return f'<svg class="plot" role="img" aria-label="{escape(words)}" viewBox="{view_box[1]}">{body.strip()}'
