// The strip of small curves above the samples: a line marks the sample's step, a click goes to the nearest sample.
const makeCurves = (data, make, show, goToStep) => {
  const strip = document.getElementById("curves-strip");
  if (!strip) return { mark: () => {} };
  strip.innerHTML = "<svg></svg>";
  const SVG = strip.firstChild.namespaceURI; // the page names no address, not even that of a standard
  strip.replaceChildren();
  const [WIDTH, HEIGHT, EDGE] = [180, 56, 4];
  const draw = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
    return element;
  };
  const marks = [];

  data.curves.forEach((curve) => {
    const steps = curve.lines.flatMap((line) => line.steps);
    const values = curve.lines.flatMap((line) => line.values).filter((value) => value !== null);
    const [first, last] = [Math.min(...steps), Math.max(...steps)];
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (curve.floor !== undefined && low < curve.floor) [low, high] = [curve.floor, Math.max(high, curve.floor + 1)];
    const x = (step) => EDGE + ((WIDTH - 2 * EDGE) * (step - first)) / (last - first || 1);
    const y = (value) => EDGE + (HEIGHT - 2 * EDGE) * (1 - Math.max(0, Math.min(1, (value - low) / (high - low || 1))));

    const figure = make("figure", "spark");
    const head = make("p", "spark-head");
    const reading = make("b", "", "");
    head.append(make("span", "", curve.title), reading);
    const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    svg.setAttribute("aria-label", `${curve.title}, ${curve.unit}, from ${show(low)} to ${show(high)}`);
    if (low < 0 && high > 0) svg.append(draw("line", { class: "zero", x1: 0, x2: WIDTH, y1: y(0), y2: y(0) }));
    curve.lines.forEach((line, index) => {
      const known = line.steps.map((step, place) => [step, line.values[place]]).filter(([, value]) => value !== null);
      const points = known.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      svg.append(draw("polyline", { class: `line-${index}`, points }));
      if (known.length === 1) svg.append(draw("circle", { class: `line-${index}`, cx: x(known[0][0]), cy: y(known[0][1]), r: 2 }));
    });
    const rule = draw("line", { class: "rule", y1: 0, y2: HEIGHT });
    svg.append(rule);
    const ends = make("p", "spark-ends");
    ends.append(make("span", "", show(low)), make("span", "", show(high)));
    figure.append(head, svg, ends);
    figure.title = `${curve.unit}; click to go to the samples of a step`;
    svg.addEventListener("click", (event) => {
      const frame = svg.getBoundingClientRect();
      const share = ((event.clientX - frame.left) / frame.width * WIDTH - EDGE) / (WIDTH - 2 * EDGE);
      goToStep(first + share * (last - first));
    });
    marks.push((step) => {
      const inside = step >= first && step <= last;
      rule.setAttribute("x1", x(Math.max(first, Math.min(last, step))));
      rule.setAttribute("x2", x(Math.max(first, Math.min(last, step))));
      rule.style.display = inside ? "" : "none";
      // The last value at or before the step, of the rollouts' line where there is one.
      const line = curve.lines[0];
      let found = null;
      line.steps.forEach((at, place) => { if (at <= step && line.values[place] !== null) found = line.values[place]; });
      reading.textContent = found === null ? "" : show(found);
    });
    strip.append(figure);
  });
  return { mark: (step) => marks.forEach((mark) => mark(step)) };
};
