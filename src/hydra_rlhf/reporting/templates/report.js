"use strict";
// Sorting and filtering of the samples. Without it the page shows every sample in the order of the run.
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.js = "error"; root.dataset.jsError = event.message; });
  const list = document.getElementById("sample-list");
  if (list) {
    const PAGE = 10;
    const samples = [...list.children];
    const texts = samples.map((sample) => sample.textContent.toLowerCase());
    const controls = document.getElementById("sample-controls");
    const search = document.getElementById("sample-search");
    const order = document.getElementById("sample-order");
    const filter = document.getElementById("sample-filter");
    const counter = document.getElementById("sample-count");
    const more = document.getElementById("sample-more");
    let limit = PAGE;

    // Missing numbers come last in every order.
    const value = (sample, name) => (sample.dataset[name] === undefined ? null : Number(sample.dataset[name]));
    const compare = (name, sign) => (a, b) => {
      const [x, y] = [value(a, name), value(b, name)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (x - y);
    };
    const keeps = {
      all: () => true,
      better: (sample) => value(sample, "gain") > 0,
      worse: (sample) => value(sample, "gain") < 0,
      hacked: (sample) => value(sample, "gain") > 0 && value(sample, "goldGain") < 0,
    };

    const update = () => {
      const [name, direction] = order.value.split(" ");
      const sorted = name === "index" ? samples : [...samples].sort(compare(name, direction === "up" ? 1 : -1));
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const shown = sorted.filter((sample) => {
        const text = texts[sample.dataset.index - 1];
        return keeps[filter.value](sample) && words.every((word) => text.includes(word));
      });
      samples.forEach((sample) => { sample.hidden = true; });
      shown.slice(0, limit).forEach((sample) => { sample.hidden = false; });
      list.replaceChildren(...sorted);
      counter.textContent = `${Math.min(limit, shown.length)} of ${shown.length} shown`;
      more.hidden = shown.length <= limit;
    };
    const restart = () => { limit = PAGE; update(); };
    search.addEventListener("input", restart);
    order.addEventListener("change", restart);
    filter.addEventListener("change", restart);
    more.addEventListener("click", () => {
      const next = list.querySelectorAll(".sample:not([hidden])").length;
      limit += PAGE;
      update();
      // The keyboard goes on where the new samples begin.
      list.querySelectorAll(".sample:not([hidden])")[next]?.focus();
    });
    controls.hidden = false;
    update();
  }
  if (root.dataset.js !== "error") root.dataset.js = "ready";
})();
