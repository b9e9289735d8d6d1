// What the page does besides showing itself. A test reads from the root element whether it started.
const root = document.documentElement;
window.addEventListener("error", (event) => { root.dataset.js = "error"; root.dataset.jsError = event.message; });
startInspector();
if (root.dataset.js !== "error") root.dataset.js = "ready";
