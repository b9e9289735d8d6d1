"""The report in a real browser: it is drawn, its script works, nothing hostile runs, nothing overflows on a phone."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from hydra_rlhf.reporting.render import render_report
from smoke.browser import DARK, browse, drive, needs_browser

pytestmark = needs_browser


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


@pytest.mark.parametrize(("flags", "is_dark"), [((), False), ((DARK,), True)], ids=["light", "dark"])
def test_the_page_is_drawn(page: Path, tmp_path: Path, flags: tuple[str, ...], is_dark: bool) -> None:
    import matplotlib.image

    picture = tmp_path / "report.png"
    browse(tmp_path, page, "--window-size=1280,2400", f"--screenshot={picture}", *flags)
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


def test_the_script_runs_and_hostile_text_does_not(page: Path, tmp_path: Path) -> None:
    dom = browse(tmp_path, page, "--dump-dom")
    assert 'data-js="ready"' in dom
    assert "data-js-error" not in dom
    assert "<title>demo · hydra-rlhf report</title>" in dom
    assert dom.count("<script") == 2
    assert "32 of 32 samples" in dom
    assert dom.count("<article ") == 1
    seen = drive(
        tmp_path,
        page,
        """
        press("ArrowDown", byId("sample-list"));
        seen.prompt = byId("sample-prompt").textContent;
        seen.texts = [...document.querySelectorAll("#sample-pair .text")].map((text) => text.textContent);
        seen.title = document.title;
        seen.images = document.images.length;
        """,
    )
    assert seen == {
        "prompt": UNIT.HOSTILE,
        "texts": [UNIT.HOSTILE, UNIT.HOSTILE],
        "title": "demo · hydra-rlhf report",
        "images": 0,
    }


@pytest.mark.parametrize("width", [480, 1280])
def test_nothing_is_wider_than_the_window(page: Path, tmp_path: Path, width: int) -> None:
    driver = "seen.widths = [document.documentElement.scrollWidth, window.innerWidth]"
    content, window = drive(tmp_path, page, driver, f"--window-size={width},2400")["widths"]
    assert window <= max(width, 500)  # some browsers have a smallest window
    assert content <= window
