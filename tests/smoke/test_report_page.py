"""The report in a real browser: it is drawn, its script works, nothing hostile runs, nothing overflows on a phone."""

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_rlhf.reporting.render import render_report

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser: none of chromium, chromium-browser, google-chrome is on PATH"
)


def load_unit_test() -> Any:
    """The module of the unit tests, for its run folder; tests are not a package."""
    path = Path(__file__).resolve().parents[1] / "unit" / "test_reporting.py"
    spec = importlib.util.spec_from_file_location("reporting_unit_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UNIT = load_unit_test()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_report(UNIT.make_run_folder(tmp_path_factory.mktemp("runs") / "demo"))


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Open a page with further flags, in a fresh profile; returns what the browser prints."""

    def run(page: Path, *flags: str) -> str:
        assert BROWSER is not None
        command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


def with_driver(page: Path, target: Path, script: str) -> Path:
    """A copy of the page that also runs `script` after its own; the policy against foreign scripts is taken out."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    target.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return target


@pytest.mark.parametrize(("flags", "is_dark"), [((), False), (("--force-dark-mode",), True)], ids=["light", "dark"])
def test_the_page_is_drawn(
    page: Path, browse: Callable[..., str], tmp_path: Path, flags: tuple[str, ...], is_dark: bool
) -> None:
    import matplotlib.image

    picture = tmp_path / "report.png"
    browse(page, "--window-size=1280,2400", f"--screenshot={picture}", *flags)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape == (2400, 1280, 3)
    background = pixels[5, 5]
    assert (background.mean() < 0.5) == is_dark
    drawn = (abs(pixels - background) > 0.08).any(axis=-1)
    # Title and facts, cards, tables, first charts, further charts: something is on each, and none is a solid block.
    for top, bottom in ((40, 220), (220, 520), (680, 1120), (1180, 1560), (1560, 2400)):
        assert 0.01 < drawn[top:bottom].mean() < 0.6, f"rows {top} to {bottom}"
    # The curves are there in colour.
    colourful = pixels.max(axis=-1) - pixels.min(axis=-1) > 0.3
    assert colourful[1180:2400].sum() > 2000


def test_the_script_runs_and_hostile_text_does_not(page: Path, browse: Callable[..., str]) -> None:
    dom = browse(page, "--dump-dom")
    assert 'data-js="ready"' in dom
    assert "data-js-error" not in dom
    assert "<title>demo · hydra-rlhf report</title>" in dom
    assert "&lt;script&gt;document.title='taken'&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in dom
    assert dom.count("<script") == 1
    assert "10 of 32 shown" in dom
    assert dom.count("<article ") == 32


def test_samples_are_sorted_and_filtered(page: Path, browse: Callable[..., str], tmp_path: Path) -> None:
    driver = """
      const [order, filter, search] = ["order", "filter", "search"].map((n) => document.getElementById(`sample-${n}`));
      const shown = () => [...document.querySelectorAll(".sample:not([hidden])")];
      const visible = () => shown().map((sample) => sample.dataset.index).join(" ");
      const set = (control, value) => { control.value = value; control.dispatchEvent(new Event("change")); };
      const seen = {};
      set(order, "gain down"); seen.best = visible();
      set(filter, "worse"); seen.worse = visible();
      set(filter, "all"); set(order, "index up");
      document.getElementById("sample-more").click(); seen.more = visible();
      search.value = "BELL null"; search.dispatchEvent(new Event("input")); seen.found = visible();
      document.body.dataset.seen = JSON.stringify(seen);
    """
    dom = browse(with_driver(page, tmp_path / "driven.html", driver), "--dump-dom")
    seen = json.loads(re.search(r'data-seen="([^"]*)"', dom)[1].replace("&quot;", '"'))  # pyright: ignore[reportOptionalSubscript]
    rows = [json.loads(line) for line in (page.parent / "samples.jsonl").read_text("utf-8").splitlines()]
    gains = {index: row["score"] - row["reference_score"] for index, row in enumerate(rows, 1)}
    by_gain = sorted(gains, key=lambda index: -gains[index])
    assert seen["best"] == " ".join(map(str, by_gain[:10]))
    assert set(seen["worse"].split()) == {str(index) for index, gain in gains.items() if gain < 0}
    assert seen["more"] == " ".join(map(str, range(1, 21)))
    assert seen["found"] == "3"


@pytest.mark.parametrize("width", [480, 1280])
def test_nothing_is_wider_than_the_window(page: Path, browse: Callable[..., str], tmp_path: Path, width: int) -> None:
    driver = "document.body.dataset.widths = `${document.documentElement.scrollWidth} of ${window.innerWidth}`;"
    dom = browse(with_driver(page, tmp_path / "driven.html", driver), f"--window-size={width},2400", "--dump-dom")
    content, window = re.search(r'data-widths="(\d+) of (\d+)"', dom).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert int(window) <= max(width, 500)  # some browsers have a smallest window
    assert int(content) <= int(window)
