"use strict";
(() => {
  const data = JSON.parse(document.getElementById("llmserve-data").textContent);
  const emulated = "emulated: not measured on real hardware";
  const drawn = new Map(); // chart element → promise of its Vega view
  const states = new WeakMap(); // timeline element → the stretch of time it shows

  const rows = (columns) => {
    const names = Object.keys(columns);
    const length = names.length ? columns[names[0]].length : 0;
    return Array.from({ length }, (_, i) =>
      Object.fromEntries(names.map((name) => [name, columns[name][i]])));
  };

  // Lines of a title that fit a chart, because a wider title would squeeze the plot.
  const wrapped = (text, width) => {
    const lines = [""];
    for (const word of text.split(" ")) {
      const last = lines[lines.length - 1];
      if (last && (last.length + word.length) * 8.3 > width) lines.push(word);
      else lines[lines.length - 1] = last ? `${last} ${word}` : word;
    }
    return lines;
  };

  // The same joining as charts.py's `whole`: a kind's specification with one figure's data.
  const whole = (figure, params, width) => {
    const spec = structuredClone(data.specs[figure.kind]);
    spec.title = { text: wrapped(figure.title, width - 80) };
    if (figure.emulated) spec.title.subtitle = emulated;
    spec.datasets = Object.fromEntries(
      Object.entries(figure.data).map(([name, columns]) => [name, rows(columns)]));
    for (const parameter of spec.params ?? [])
      parameter.value = params[parameter.name] ?? parameter.value;
    spec.layer = spec.layer.filter((layer) => spec.datasets[(layer.data ?? spec.data).name]?.length);
    for (const layer of spec.layer)
      if (layer.encoding.x?.title === "(x)") layer.encoding.x.title = figure.x;
    const legend = { ...data.config.legend, ...(width < 440 && { columns: 2 }) };
    spec.config = { ...data.config, legend };
    return spec;
  };

  const draw = (element) => {
    if (!drawn.has(element)) {
      const figure = data.figures[element.dataset.figure];
      const timeline = element.closest(".timeline");
      const params = timeline ? state(timeline) : {};
      // The element itself is an image with a label; what Vega says of its parts would only repeat
      // that mark by mark.
      const inside = element.appendChild(document.createElement("div"));
      inside.ariaHidden = "true";
      drawn.set(element, vegaEmbed(inside, whole(figure, params, element.clientWidth), {
        mode: "vega-lite", renderer: "svg", actions: false, ast: true, tooltip: { theme: "custom" },
        logLevel: 1,
      }).then((result) => {
        element.dataset.drawn = "yes";
        return result.view;
      }));
    }
    return drawn.get(element);
  };

  const state = (timeline) => {
    if (!states.has(timeline)) {
      const { t0, t1 } = data.figures[timeline.querySelector(".chart").dataset.figure].params;
      states.set(timeline, { t0, t1, min: t0, max: t1 });
    }
    return states.get(timeline);
  };

  const show = async (timeline, t0, t1) => {
    const now = state(timeline);
    const span = Math.min(Math.max(t1 - t0, (now.max - now.min) / 5000), now.max - now.min);
    now.t0 = Math.min(Math.max(t0, now.min), now.max - span);
    now.t1 = now.t0 + span;
    const whole = span >= now.max - now.min;
    timeline.querySelector("output").value = whole ? ""
      : `${now.t0.toFixed(2)} s to ${now.t1.toFixed(2)} s`;
    for (const element of timeline.querySelectorAll(".chart"))
      if (drawn.has(element)) {
        const view = await drawn.get(element);
        await view.signal("t0", now.t0).signal("t1", now.t1).runAsync();
      }
  };

  const zoom = (timeline, how) => {
    const { t0, t1, min, max } = state(timeline);
    const middle = (t0 + t1) / 2, span = t1 - t0;
    const moves = {
      in: [middle - span / 4, middle + span / 4], out: [middle - span, middle + span],
      earlier: [t0 - span / 3, t1 - span / 3], later: [t0 + span / 3, t1 + span / 3],
      all: [min, max],
    };
    return show(timeline, ...moves[how]);
  };

  const keys = { "+": "in", "=": "in", "-": "out", ArrowLeft: "earlier", ArrowRight: "later", 0: "all" };

  for (const timeline of document.querySelectorAll(".timeline")) {
    for (const button of timeline.querySelectorAll("[data-zoom]"))
      button.addEventListener("click", () => zoom(timeline, button.dataset.zoom));
    timeline.addEventListener("keydown", (event) => {
      if (event.target !== timeline || event.ctrlKey || event.metaKey || event.altKey) return;
      if (!(event.key in keys)) return;
      event.preventDefault();
      zoom(timeline, keys[event.key]);
    });
    for (const element of timeline.querySelectorAll(".chart")) drag(timeline, element);
  }

  function drag(timeline, element) {
    let from = null, box = null;
    const time = (view, event) => {
      const left = element.querySelector("svg").getBoundingClientRect().left;
      return view.scale("x").invert(event.clientX - left - view.origin()[0]);
    };
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !drawn.has(element)) return;
      from = event;
    });
    element.addEventListener("pointermove", (event) => {
      if (!from) return;
      if (!box) {
        if (Math.abs(event.clientX - from.clientX) < 5) return;
        element.setPointerCapture(event.pointerId);
        box = element.appendChild(document.createElement("div"));
        box.className = "dragged";
      }
      const left = element.getBoundingClientRect().left;
      box.style.left = `${Math.min(from.clientX, event.clientX) - left}px`;
      box.style.width = `${Math.abs(event.clientX - from.clientX)}px`;
    });
    const end = async (event) => {
      const start = from, was = box;
      from = box = null;
      if (!was) return;
      was.remove();
      if (event.type === "pointercancel") return;
      const view = await drawn.get(element);
      const [a, b] = [time(view, start), time(view, event)];
      show(timeline, Math.min(a, b), Math.max(a, b));
    };
    element.addEventListener("pointerup", end);
    element.addEventListener("pointercancel", end);
    element.addEventListener("dblclick", () => zoom(timeline, "all"));
  }

  // Charts are drawn when they come near the screen, the rest of the open ones when nothing else
  // is to be done, and all open ones before printing.
  const charts = [...document.querySelectorAll(".chart")];
  const open = (element) => !element.closest("details:not([open])");
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries)
      if (entry.isIntersecting) {
        watcher.unobserve(entry.target);
        draw(entry.target);
      }
  }, { rootMargin: "400px" });
  charts.forEach((element) => watcher.observe(element));
  const idle = (work) => window.requestIdleCallback
    ? requestIdleCallback(work, { timeout: 300 }) : setTimeout(work, 50);
  const rest = () => {
    const next = charts.find((element) => !drawn.has(element) && open(element));
    if (next) draw(next).then(() => idle(rest));
  };
  idle(rest);
  for (const details of document.querySelectorAll("details"))
    details.addEventListener("toggle", () => idle(rest));
  window.addEventListener("beforeprint", () => charts.filter(open).forEach(draw));

  // A link to a folded test unfolds it.
  const unfold = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  window.addEventListener("hashchange", unfold);
  unfold();

  const theme = document.getElementById("theme");
  const choose = (value) => {
    if (value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
    theme.value = value;
  };
  const key = "llmserve-theme";
  try { choose(localStorage.getItem(key) ?? "auto"); } catch { choose("auto"); }
  theme.addEventListener("change", () => {
    choose(theme.value);
    try { localStorage.setItem(key, theme.value); } catch { /* a page without storage forgets */ }
  });
})();
