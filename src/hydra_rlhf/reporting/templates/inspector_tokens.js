// One sample's texts: tokens coloured by the chosen quantity, the legend, and the numbers of the token in hand.
const makeTokens = (data, samples) => {
  const byId = (id) => document.getElementById(id);
  const tip = byId("token-tip");
  const SIDES = [["reference", "Reference"], ["actor", "Actor"]];
  const MINUS = "\u2212";
  let sample = null;
  let quantity = data.quantities[0] || null;
  let cursor = null;

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Three significant digits, with a real minus sign and an explicit plus where the sign is what matters.
  const show = (value, sign) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const digits = size === 0 ? "0" : size >= 1000 || size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
    return (sign && value > 0 ? "+" : "") + digits.replace(/-/g, MINUS);
  };
  const showScore = (value, sign) =>
    value === undefined ? "–" : ((sign && value > 0 ? "+" : "") + value.toFixed(2)).replace("-", MINUS);
  const percent = (logprob) => {
    const share = 100 * Math.exp(logprob);
    return share >= 99.95 && share < 100 ? "> 99.9 %" : share < 0.01 ? "< 0.01 %" : `${Number(share.toPrecision(3))} %`;
  };

  // Before and after, what all of training did to a log-prob is the log-prob over the reference's.
  const read = (key) => (key === "change" && sample.kind === "evaluation" ? "kl" : key);
  const numbersOf = (side) => (quantity && side.numbers ? side.numbers[read(quantity.key)] : undefined);
  const scale = () => data.quantities.find((entry) => entry.key === read(quantity.key)) || quantity;

  const paint = (span, value) => {
    span.classList.remove("plus", "minus");
    if (value === null || value === undefined) return;
    const { centre, limit } = scale();
    const share = limit > 0 ? Math.min(1, Math.abs(value - centre) / limit) : 0;
    if (share < 0.02) return;
    span.classList.add(value > centre ? "plus" : "minus");
    span.style.setProperty("--share", share.toFixed(3));
  };

  const tokenSpan = (side, place) => {
    const piece = side.pieces[place];
    const name = side.names ? side.names[place] : undefined;
    const span = make("span", "token");
    span.dataset.place = place;
    const ink = make("span", "ink");
    if (piece === "") {
      span.classList.add(/^[<[].*[>\]]$/.test(name || "") && !/^<0x/.test(name) ? "special" : "part");
      ink.textContent = span.classList.contains("special") ? name : "·";
      span.append(ink);
      return span;
    }
    // The space before a word stays without colour, so that words stand apart and lines do not end in a stripe.
    const space = piece.length > 1 && piece[0] === " " ? " " : "";
    // A line break has no width of its own: its mark carries the colour.
    piece.slice(space.length).split(/(\n)/).forEach((part) => {
      if (part === "\n") ink.append(make("span", "break", "↵"));
      if (part) ink.append(part);
    });
    span.append(space, ink);
    return span;
  };

  const sideElement = (key, label) => {
    const side = sample[key];
    const box = make("section", "side-text");
    box.setAttribute("aria-label", label);
    const who = make("p", "who");
    who.append(make("b", "", label));
    const facts = [["score", side.score], ["gold", side.gold]].filter(([, value]) => value !== undefined);
    facts.forEach(([name, value]) => who.append(make("span", "", `${name} ${showScore(value)}`)));
    if (side.numTokens) who.append(make("span", "", `${side.numTokens} tokens`));
    if (side.ended === false) who.append(make("span", "cut-mark", "cut at the limit"));
    box.append(who);
    const text = make("div", "text");
    text.dir = "auto";
    text.tabIndex = 0;
    text.setAttribute("role", "region");
    text.setAttribute("aria-label", `${label}'s response${side.pieces ? "; arrow keys walk through its tokens" : ""}`);
    if (side.pieces) {
      text.dataset.side = key;
      side.pieces.forEach((_, place) => text.append(tokenSpan(side, place)));
    } else {
      text.textContent = side.text;
    }
    box.append(text);
    if (side.pieces) box.append(make("div", "bars"));
    if (side.cut) box.append(make("div", "cut", `${side.cut.toLocaleString("en")} more characters in samples.jsonl`));
    return box;
  };

  const sideOf = (text) => sample[text.dataset.side];
  const texts = () => [...byId("sample-pair").querySelectorAll(".text[data-side]")];

  // The same numbers as bars, token by token: where along the response they rise and fall.
  const drawBars = (text, numbers) => {
    const bars = text.parentElement.querySelector(".bars");
    const { centre, limit } = scale() || { centre: 0, limit: 0 };
    bars.hidden = !numbers || !(limit > 0);
    if (bars.hidden) return;
    bars.replaceChildren(
      ...numbers.map((value, place) => {
        const bar = make("i", value > centre ? "plus" : "minus");
        const share = value === null ? 0 : Math.min(1, Math.abs(value - centre) / limit);
        bar.style.setProperty("--share", share.toFixed(3));
        bar.dataset.place = place;
        return bar;
      }),
    );
  };

  const paintAll = () => {
    texts().forEach((text) => {
      const numbers = numbersOf(sideOf(text));
      [...text.children].forEach((span, place) => paint(span, numbers ? numbers[place] : null));
      drawBars(text, numbers);
    });
    if (!quantity) return;
    const { centre, limit } = scale();
    byId("legend-ends").replaceChildren(
      ...[centre - limit, centre, centre + limit].map((value) => make("span", "", show(value, centre === 0))),
    );
    byId("legend-ends").append(make("span", "unit", quantity.unit));
    const has = SIDES.some(([key]) => sample[key] && numbersOf(sample[key]));
    byId("legend-bar").classList.toggle("absent", !has);
    byId("legend-words").textContent = has ? quantity.words : `Not kept for this sample. ${quantity.words}`;
  };

  // --- the token in hand -----------------------------------------------------------------------------------------
  const leave = () => {
    if (cursor) cursor.classList.remove("cursor");
    cursor = null;
    tip.hidden = true;
  };
  const line = (list, name, value, strong) => {
    const row = make("div", strong ? "strong" : "");
    row.append(make("dt", "", name), make("dd", "", value));
    list.append(row);
  };
  const point = (span) => {
    if (cursor === span) return;
    leave();
    cursor = span;
    span.classList.add("cursor");
    const side = sideOf(span.parentElement);
    const place = Number(span.dataset.place);
    const numbers = side.numbers;
    const name = (side.names && side.names[place]) || JSON.stringify(side.pieces[place]).slice(1, -1).replace(/ /g, "␣");
    const head = make("p", "tip-head");
    head.append(make("code", "", name), make("span", "", `token ${place + 1} of ${side.numTokens}${side.ids ? ` · id ${side.ids[place]}` : ""}`));
    const list = make("dl", "");
    data.quantities.forEach((entry) => {
      const values = numbers[read(entry.key)];
      if (!values || (entry.key === "change" && read("change") === "kl")) return;
      line(list, entry.label, `${show(values[place], true)} ${entry.unit}`, quantity && read(quantity.key) === entry.key);
    });
    if (numbers.logprob && numbers.logprob[place] !== null) {
      const logprob = numbers.logprob[place];
      const kl = numbers.kl ? numbers.kl[place] : null;
      line(list, "Probability", percent(logprob) + (kl === null ? "" : `, reference ${percent(logprob - kl)}`));
    }
    tip.replaceChildren(head, list);
    tip.hidden = false;
    const frame = byId("inspector").getBoundingClientRect();
    const at = span.getClientRects()[0] || span.getBoundingClientRect();
    const left = Math.min(at.left - frame.left, frame.width - tip.offsetWidth);
    const below = at.bottom + tip.offsetHeight + 12 < window.innerHeight;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${below ? at.bottom - frame.top + 6 : at.top - frame.top - tip.offsetHeight - 6}px`;
  };
  const tokenAt = (target) => {
    const bar = target instanceof Element ? target.closest(".bars > i") : null;
    if (bar) return bar.parentElement.parentElement.querySelector(".text").children[Number(bar.dataset.place)];
    return target instanceof Element ? target.closest(".token") : null;
  };
  const pair = byId("sample-pair");
  pair.addEventListener("mouseover", (event) => { const span = tokenAt(event.target); if (span) point(span); else leave(); });
  pair.addEventListener("mouseleave", leave);
  pair.addEventListener("focusout", leave);
  pair.addEventListener("scroll", leave, true);
  pair.addEventListener("click", (event) => { const span = tokenAt(event.target); if (span) point(span); });
  pair.addEventListener("keydown", (event) => {
    const text = event.target instanceof Element ? event.target.closest(".text[data-side]") : null;
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") leave();
    if (!text || !move || event.altKey || event.ctrlKey || event.metaKey) return;
    const spans = text.children;
    const inHand = cursor && cursor.parentElement === text ? Number(cursor.dataset.place) : move > 0 ? -1 : spans.length;
    const next = spans[Math.max(0, Math.min(spans.length - 1, inHand + move))];
    next.scrollIntoView({ block: "nearest" });
    point(next);
    event.preventDefault();
  });

  // --- the switch ------------------------------------------------------------------------------------------------
  const choose = (index) => {
    if (!data.quantities[index]) return;
    quantity = data.quantities[index];
    [...byId("sample-switch").querySelectorAll("input")].forEach((input, place) => { input.checked = place === index; });
    leave();
    if (sample) paintAll();
  };
  data.quantities.forEach((entry, index) => {
    const label = make("label", "");
    const input = make("input", "");
    input.type = "radio";
    input.name = "colour";
    input.value = entry.key;
    input.checked = index === 0;
    input.addEventListener("change", () => choose(index));
    label.append(input, make("span", "", entry.label));
    byId("sample-switch").append(label);
  });
  byId("sample-colours").hidden = data.quantities.length === 0;

  const draw = (next) => {
    leave();
    sample = next;
    const prompt = byId("sample-prompt");
    prompt.textContent = sample.prompt;
    if (sample.promptCut) prompt.prepend(make("span", "cut", `${sample.promptCut.toLocaleString("en")} more characters before this\n`));
    const sides = SIDES.filter(([key]) => sample[key]);
    pair.replaceChildren(...sides.map(([key, label]) => sideElement(key, label)));
    paintAll();
  };
  return { draw, choose, show, showScore, make };
};
