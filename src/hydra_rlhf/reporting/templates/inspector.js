// The inspector: which samples are listed and in which order, which one is shown, and the keys.
const startInspector = () => {
  const byId = (id) => document.getElementById(id);
  const source = byId("inspector-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const samples = data.samples;
  const KINDS = { evaluation: "before and after", held_out: "held out", rollout: "rollouts" };
  const TITLES = { evaluation: "Before and after", held_out: "Held-out prompt", rollout: "Rollout" };
  const ROW = 62;
  const root = byId("inspector");
  const list = byId("sample-list");
  const rows = byId("sample-rows");

  const textOf = (side) => (side ? side.text ?? side.pieces.join("") : "");
  const difference = (sample, name) =>
    sample.reference && sample.actor[name] !== undefined && sample.reference[name] !== undefined
      ? sample.actor[name] - sample.reference[name]
      : undefined;
  samples.forEach((sample, index) => {
    sample.index = index;
    sample.response = textOf(sample.actor);
    sample.haystack = [sample.prompt, sample.response, textOf(sample.reference)].join("\n").toLowerCase();
    sample.score = sample.actor.score;
    sample.length = sample.actor.numTokens ?? sample.response.length;
    sample.gain = difference(sample, "score");
    sample.goldGain = difference(sample, "gold");
  });

  const tokens = makeTokens(data, samples);
  const { make, show, showScore } = tokens;
  const curves = makeCurves(data, make, show, (step) => goToStep(step));

  // --- which samples ---------------------------------------------------------------------------------------------
  let shown = [];
  let chosen = null;
  let descending = false;
  const SHOW = {
    all: () => true,
    cut: (sample) => sample.actor.ended === false,
    better: (sample) => sample.gain > 0,
    worse: (sample) => sample.gain < 0,
    hacked: (sample) => sample.gain > 0 && sample.goldGain < 0,
  };
  const bound = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value));

  const kinds = Object.keys(KINDS).filter((kind) => samples.some((sample) => sample.kind === kind));
  const count = (kind) => samples.filter((sample) => kind === "all" || sample.kind === kind).length;
  const option = (kind, label) => {
    const entry = make("option", "", `${label} (${count(kind).toLocaleString("en")})`);
    entry.value = kind;
    return entry;
  };
  byId("sample-kind").append(...kinds.map((kind) => option(kind, KINDS[kind])));
  if (kinds.length > 1) byId("sample-kind").append(option("all", "all kinds"));

  const filter = (startOver) => {
    const words = byId("sample-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = byId("sample-kind").value;
    const keeps = SHOW[byId("sample-show").value];
    const [first, last] = [bound("sample-step-from", -Infinity), bound("sample-step-to", Infinity)];
    const [lowest, highest] = [bound("sample-score-from", -Infinity), bound("sample-score-to", Infinity)];
    // A sample without a score is in no range of scores, but in the list while no range is asked for.
    const scored = (sample) => (lowest === -Infinity && highest === Infinity) || (sample.score >= lowest && sample.score <= highest);
    const order = byId("sample-order").value;
    const sign = descending ? -1 : 1;
    shown = samples
      .filter((sample) => kind === "all" || sample.kind === kind)
      .filter((sample) => keeps(sample) && sample.step >= first && sample.step <= last && scored(sample))
      .filter((sample) => words.every((word) => sample.haystack.includes(word)))
      .sort((a, b) => {
        const [x, y] = [a[order], b[order]];
        // Missing numbers come last in either direction; equal ones stay in the run's order.
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined) || a.index - b.index;
        return sign * (x - y) || a.index - b.index;
      });
    byId("sample-count").textContent = `${shown.length.toLocaleString("en")} of ${count(kind).toLocaleString("en")} samples`;
    rows.style.height = `${Math.max(1, shown.length) * ROW}px`;
    list.scrollTop = 0;
    choose(!startOver && shown.includes(chosen) ? chosen : shown[0] || null);
  };

  // --- the list: only the rows in view exist -----------------------------------------------------------------------
  const rowElement = (sample, place) => {
    const row = make("div", "row");
    row.id = `sample-row-${sample.index}`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", String(sample === chosen));
    row.setAttribute("aria-setsize", String(shown.length));
    row.setAttribute("aria-posinset", String(place + 1));
    row.dataset.index = sample.index;
    row.style.transform = `translateY(${place * ROW}px)`;
    const head = make("div", "row-head");
    const gain = sample.gain;
    if (gain === undefined) head.append(make("span", "", `step ${sample.step.toLocaleString("en")}`));
    else head.append(make("span", gain > 0 ? "up" : gain < 0 ? "down" : "", `gain ${showScore(gain, true)}`));
    if (sample.kl !== undefined) head.append(make("span", "", `KL ${showScore(sample.kl)}`));
    head.append(make("span", "", `${sample.length} ${sample.actor.numTokens ? "tok" : "chars"}`));
    head.append(make("b", "", showScore(sample.score)));
    row.append(head, make("div", "row-text", sample.response.replace(/\s+/g, " ") || "(empty)"));
    return row;
  };
  const drawRows = () => {
    if (shown.length === 0) {
      rows.replaceChildren(make("p", "none", "No sample is left; widen the filters."));
      return;
    }
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
    rows.replaceChildren(...shown.slice(first, last).map((sample, place) => rowElement(sample, first + place)));
  };

  const fact = (name, value) => {
    const entry = make("div", "");
    entry.append(make("dt", "", name), make("dd", "", value));
    return entry;
  };
  const choose = (sample) => {
    chosen = sample;
    byId("sample-detail").hidden = sample === null;
    if (sample === null) {
      list.removeAttribute("aria-activedescendant");
      drawRows();
      return;
    }
    const top = shown.indexOf(sample) * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    drawRows();
    list.setAttribute("aria-activedescendant", `sample-row-${sample.index}`);
    byId("sample-title").textContent = `${TITLES[sample.kind]}, step ${sample.step.toLocaleString("en")}`;
    const facts = [
      ["score gain", sample.gain, true],
      ["gold gain", sample.goldGain, true],
      ["KL", sample.kl, false],
      ...Object.entries(sample.sources || {}).map(([name, value]) => [name, value, false]),
    ].filter(([, value]) => value !== undefined);
    byId("sample-numbers").replaceChildren(
      ...facts.map(([name, value, sign]) => fact(name, `${showScore(value, sign)}${name === "KL" ? " nats" : ""}`)),
    );
    tokens.draw(sample);
    curves.mark(sample.step);
  };
  const move = (by) => {
    const next = shown[Math.max(0, Math.min(shown.length - 1, shown.indexOf(chosen) + by))];
    if (next) choose(next);
  };
  const goToStep = (step) => {
    const known = shown.length ? shown : samples;
    const nearest = known.reduce((best, sample) => (Math.abs(sample.step - step) < Math.abs(best.step - step) ? sample : best));
    if (shown.includes(nearest)) choose(nearest);
  };

  // --- what the reader does ----------------------------------------------------------------------------------------
  // A filter keeps the sample in hand where it can; a new order begins at its top.
  byId("sample-controls").addEventListener("input", (event) => filter(event.target.id === "sample-order"));
  byId("sample-controls").addEventListener("submit", (event) => event.preventDefault());
  byId("sample-direction").addEventListener("click", () => {
    descending = !descending;
    byId("sample-direction").textContent = descending ? "↓" : "↑";
    byId("sample-direction").setAttribute("aria-label", descending ? "Largest first" : "Smallest first");
    filter(true);
  });
  list.addEventListener("scroll", drawRows);
  rows.addEventListener("click", (event) => {
    const row = event.target instanceof Element ? event.target.closest(".row") : null;
    if (row) { choose(samples[Number(row.dataset.index)]); list.focus({ preventScroll: true }); }
  });
  const LIST_KEYS = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity };
  list.addEventListener("keydown", (event) => {
    if (!(event.key in LIST_KEYS)) return;
    move(Math.max(-samples.length, Math.min(samples.length, LIST_KEYS[event.key])));
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    const target = event.target instanceof Element ? event.target : document.body;
    const isTyping = target.matches("input:not([type=radio]), select, textarea");
    // Letters act only inside the inspector, so that they never surprise a reader of the rest of the page.
    if (isTyping || event.altKey || event.ctrlKey || event.metaKey || !root.contains(target)) return;
    if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
    else if (event.key === "/") byId("sample-search").focus();
    else if (/^[1-9]$/.test(event.key)) tokens.choose(Number(event.key) - 1);
    else return;
    event.preventDefault();
  });

  root.hidden = false;
  filter(true);
};
