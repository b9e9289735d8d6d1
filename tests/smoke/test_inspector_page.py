"""The report's inspector in a real browser: colours, order, filters, keys, and light and dark."""

import math
from pathlib import Path

import pytest
import token_samples

from hydra_rlhf.reporting.render import render_report
from smoke.browser import DARK, browse, drive, needs_browser, with_driver
from smoke.test_report_page import UNIT

pytestmark = needs_browser

ROWS = token_samples.sample_rows()
PAIRS = [row for row in ROWS if row["kind"] == "evaluation"]
ROLLOUTS = [row for row in ROWS if row["kind"] == "rollout"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = UNIT.make_run_folder(tmp_path_factory.mktemp("runs") / "demo", num_samples=1, few_curves=True)
    UNIT.write_lines(folder / "samples.jsonl", ROWS)
    return render_report(folder)


LIST = """
  const visible = () => [...document.querySelectorAll("#sample-rows .row")];
  const scores = () => visible().map((row) => row.querySelector("b").textContent).join(" ");
  const chosen = () => visible().filter((row) => row.ariaSelected === "true").map((row) => row.dataset.index).join();
  const count = () => byId("sample-count").textContent;
"""


def shown(value: float) -> str:
    """A score as the page writes it: two decimals and a real minus sign."""
    return f"{value:.2f}".replace("-", "−")


def test_samples_are_sorted_and_filtered(page: Path, tmp_path: Path) -> None:
    seen = drive(
        tmp_path,
        page,
        LIST
        + """
        seen.start = [count(), byId("sample-title").textContent];
        set("sample-order", "score"); seen.lowest = scores();
        byId("sample-direction").click(); seen.highest = scores();
        set("sample-show", "worse"); seen.worse = count(); set("sample-show", "all");
        set("sample-kind", "rollout"); seen.rollouts = count();
        set("sample-step-from", "11"); set("sample-step-to", "20"); seen.steps = count();
        set("sample-score-from", "0.5"); seen.both = [count(), scores()];
        set("sample-search", "GRÜSSE graz"); seen.none = count();
        set("sample-search", "GRÜẞE".toLowerCase() + " graz"); seen.words = count();
        set("sample-search", "nowhere"); seen.empty = [count(), byId("sample-detail").hidden];
        """,
    )
    assert seen["start"] == ["12 of 12 samples", "Before and after, step 60"]
    by_score = sorted(PAIRS, key=lambda row: row["score"])
    assert seen["lowest"].split() == [shown(row["score"]) for row in by_score][: len(seen["lowest"].split())]
    assert seen["highest"].split()[0] == shown(by_score[-1]["score"])
    assert seen["worse"] == f"{sum(row['score'] < row['reference_score'] for row in PAIRS)} of 12 samples"
    assert seen["rollouts"] == "120 of 120 samples"
    assert seen["steps"] == "20 of 120 samples"
    kept = [row for row in ROLLOUTS if 11 <= row["step"] <= 20 and row["score"] >= 0.5]
    assert seen["both"][0] == f"{len(kept)} of 120 samples"
    assert seen["both"][1].split()[0] == shown(max(row["score"] for row in kept))
    assert seen["none"] == "0 of 120 samples"
    assert seen["words"] == f"{sum('Grüße' in row['response'] for row in kept)} of 120 samples"
    assert seen["empty"] == ["0 of 120 samples", True]


COLOURS = """
  const colours = (text) => [...text.querySelectorAll(".token")].map((token) =>
    (token.classList.contains("plus") ? 1 : token.classList.contains("minus") ? -1 : 0)
    * Number(token.style.getPropertyValue("--share") || 0));
  const actor = () => document.querySelector(".text[data-side=actor]");
  const pick = (value) => document.querySelector(`#sample-switch input[value=${value}]`).click();
"""


def test_tokens_are_coloured_by_the_chosen_number(page: Path, tmp_path: Path) -> None:
    seen = drive(
        tmp_path,
        page,
        COLOURS
        + """
        seen.text = actor().textContent;
        seen.reference = colours(document.querySelector(".text[data-side=reference]"));
        pick("advantage"); seen.absent = [byId("legend-words").textContent, colours(actor()).some(Boolean)];
        set("sample-kind", "rollout"); seen.advantage = colours(actor());
        pick("value"); seen.value = colours(actor()); seen.legend = byId("legend-ends").textContent;
        seen.paint = getComputedStyle(actor().querySelector(".plus > .ink")).backgroundColor;
        """,
    )
    # The first pair's response ends by itself: its stop token is shown by name.
    assert seen["text"] == PAIRS[0]["response"] + "<eos>"

    def signs(colours: list[float]) -> list[int]:
        return [int(math.copysign(1, colour)) if colour else 0 for colour in colours]

    def expected(values: list[float], centre: float, limit: float) -> list[int]:
        return [0 if abs(v - centre) / limit < 0.02 else int(math.copysign(1, v - centre)) for v in values]

    kl_of_all = [v for row in ROWS for key in ("tokens", "reference_tokens") if key in row for v in row[key]["kl"]]
    limit = sorted(map(abs, kl_of_all))[math.floor(0.98 * len(kl_of_all))]
    assert signs(seen["reference"]) == expected(PAIRS[0]["reference_tokens"]["kl"], 0.0, limit)
    assert seen["absent"][0].startswith("Not kept for this sample.")
    assert not seen["absent"][1]
    assert any(seen["advantage"])
    assert max(map(abs, seen["advantage"])) <= 1
    largest = max(ROLLOUTS[0]["tokens"]["advantage"], key=abs)
    place = ROLLOUTS[0]["tokens"]["advantage"].index(largest)
    assert abs(seen["advantage"][place]) == max(map(abs, seen["advantage"]))
    assert (seen["advantage"][place] > 0) == (largest > 0)
    assert seen["value"] != seen["advantage"]
    assert seen["legend"].endswith("score")
    assert seen["paint"].startswith("color(srgb")


def test_the_keyboard_reaches_everything(page: Path, tmp_path: Path) -> None:
    seen = drive(
        tmp_path,
        page,
        LIST
        + COLOURS
        + """
        const list = byId("sample-list");
        const tip = byId("token-tip");
        list.focus();
        press("ArrowDown"); press("j"); seen.third = [chosen(), list.getAttribute("aria-activedescendant")];
        press("k"); seen.second = chosen();
        press("End"); seen.last = chosen(); press("Home"); seen.first = chosen();
        press("3"); seen.colour = document.querySelector("#sample-switch input:checked").value;
        press("9"); seen.same = document.querySelector("#sample-switch input:checked").value;
        actor().focus();
        press("ArrowRight"); press("ArrowRight"); seen.token = [tip.hidden, tip.textContent];
        press("ArrowLeft"); seen.before = tip.querySelector("code").textContent;
        press("Escape"); seen.closed = tip.hidden;
        press("/"); seen.search = document.activeElement.id;
        press("j"); seen.typing = chosen();
        press("j", document.body); seen.outside = chosen();
        actor().children[0].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
        seen.hover = [tip.hidden, actor().children[0].className.includes("cursor")];
        """,
    )
    first = len(ROLLOUTS)
    assert seen["third"] == [str(first + 2), f"sample-row-{first + 2}"]
    assert seen["second"] == str(first + 1)
    assert (seen["last"], seen["first"]) == (str(first + 11), str(first))
    assert (seen["colour"], seen["same"]) == ("value", "value")
    record = PAIRS[0]["tokens"]
    hidden, words = seen["token"]
    assert not hidden
    assert record["pieces"][1].replace(" ", "␣") in words
    assert f"token 2 of {len(record['pieces'])} · id {record['ids'][1]}" in words
    assert f"{abs(float(format(record['kl'][1], '.3g'))):g}" in words
    assert "Probability" in words
    assert seen["before"] == record["pieces"][0]
    assert seen["closed"]
    assert seen["search"] == "sample-search"
    assert seen["typing"] == seen["outside"] == str(first)
    assert seen["hover"] == [False, True]


def test_a_curve_leads_to_its_samples(page: Path, tmp_path: Path) -> None:
    seen = drive(
        tmp_path,
        page,
        """
        set("sample-kind", "rollout");
        const svg = document.querySelector(".spark svg");
        const box = svg.getBoundingClientRect();
        svg.dispatchEvent(new MouseEvent("click", { clientX: box.left + box.width / 2, bubbles: true }));
        seen.title = byId("sample-title").textContent;
        seen.rule = Number(svg.querySelector(".rule").getAttribute("x1"));
        """,
        "--window-size=1280,1000",
    )
    # Steps 1 to 60: the middle is between 30 and 31, and the strip is 180 wide.
    assert seen["title"] in ("Rollout, step 30", "Rollout, step 31")
    assert seen["rule"] == pytest.approx(90, abs=3)


@pytest.mark.parametrize(("flags", "is_dark"), [((), False), ((DARK,), True)], ids=["light", "dark"])
def test_the_inspector_is_drawn(page: Path, tmp_path: Path, flags: tuple[str, ...], is_dark: bool) -> None:
    import matplotlib.image

    script = """
      set("sample-kind", "rollout");
      document.querySelectorAll("header:not(.detail-head), nav, footer, section:not([aria-labelledby=samples])")
        .forEach((element) => { if (!byId("inspector").contains(element)) element.remove(); });
    """
    picture = tmp_path / "inspector.png"
    driven = with_driver(page, tmp_path / "driven.html", script)
    browse(tmp_path, driven, "--window-size=1280,1400", f"--screenshot={picture}", *flags)
    pixels = matplotlib.image.imread(picture)[..., :3]
    background = pixels[5, 5]
    assert (background.mean() < 0.5) == is_dark
    # Orange tokens have more red than blue, blue ones more blue than red; both are there.
    red, blue = pixels[..., 0], pixels[..., 2]
    assert (red - blue > 0.15).sum() > 500
    assert (blue - red > 0.15).sum() > 500
