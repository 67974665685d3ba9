// The live plot: the gap before each token as it comes, TTFT marks, changes of mode and rolling
// quantiles; beneath it how many requests run and wait; and on request the scheduler's timeline.
//
// uPlot draws axes and lines. Dots, marks and steps are drawn on its canvas here, for there are up
// to 20,000 of them in a table that grows ten times a second.

const REDRAW = 100; // ms between two redraws, at least
const WINDOWS = [[30, "30 s"], [300, "5 min"], [Infinity, "All"]];
const LEFT = 58; // px for the axis, so that the plots are aligned

const MIB = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
  .map((each) => each * 2 ** 20);

// `alongside` is called in the same frame, for what else is drawn of an update: one frame, one layout.
function createPlot(store, root, alongside = () => {}) {
  const element = h("div", { class: "ik-plot" });
  const figure = h("div", { role: "img", "aria-label": "Latency of each token over time" });
  const legend = h("div", { class: "ik-legend", "aria-hidden": "true" });
  const readout = h("div", { class: "ik-readout" });
  const empty = h("div", { class: "ik-empty" }, "Each token appears here as it comes.");
  const more = h("details", { class: "ik-timeline" },
    h("summary", {}, "Scheduler timeline: steps, prefill and KV cache"));
  const under = h("div", {});
  more.append(under);
  const range = segments("Time shown", WINDOWS.map(([, label]) => label), (label) => {
    zoomed = null;
    span = WINDOWS.find((each) => each[1] === label)[0];
    schedule();
  });
  range.set(WINDOWS[0][1]);
  element.append(h("div", { class: "ik-above" }, legend, range.element), figure, empty, readout, more);

  let span = WINDOWS[0][0];
  let zoomed = null; // [from, to] that the user has dragged
  let drawn = 0, timer = 0, frame = 0, scheduled = false;
  let theme = readTheme();
  let plots = [], timeline = [];
  const levels = {}, load = {}, kept = {}; // what the plots are given, which grows
  const sync = uPlot.sync(unique("sync"));

  function readTheme() {
    const style = getComputedStyle(root);
    const pick = (name, fallback) => style.getPropertyValue(name).trim() || fallback;
    return {
      ink: pick("--jp-ui-font-color1", style.color || "#555"),
      back: pick("--ik-back", "transparent"),
      grid: pick("--jp-border-color2", "rgba(128,128,128,.25)"),
      font: `11px ${pick("--jp-ui-font-family", "system-ui, sans-serif")}`,
    };
  }

  // -- what is in sight ---------------------------------------------------------------------

  function lastTime() {
    const ends = [store.tables.tokens[0], store.tables.firsts[0], store.tables.levels[0]];
    const { steps } = store.tables;
    const moments = ends.map((times) => times.at(-1) ?? 0);
    moments.push((steps[0].at(-1) ?? 0) + (steps[1].at(-1) ?? 0) / 1e3);
    moments.push(store.marks.at(-1)?.[0] ?? 0);
    if (store.since !== null) moments.push(store.now.time); // a step may last long
    return Math.max(...moments);
  }

  function firstTime() {
    const { tokens, firsts, steps } = store.tables;
    return Math.min(...[tokens, firsts, steps].map((table) => table[0][0] ?? Infinity));
  }

  function sight() {
    if (zoomed) return zoomed;
    const first = firstTime();
    if (!Number.isFinite(first)) return [0, 10];
    const last = lastTime();
    const from = Math.max(first, last - span);
    return [from, Math.max(last, from + 1)];
  }

  // Most of what is in sight sets the scale: one stall must not flatten all else.
  function highest(from, to) {
    const [times, gaps] = store.tables.tokens;
    const start = lowerBound(times, from), end = lowerBound(times, to + 1e-9);
    if (end <= start) return 50;
    const stride = Math.max(1, Math.floor((end - start) / 2_000));
    const sample = [];
    let most = 0;
    for (let i = start; i < end; i += stride) sample.push(gaps[i]);
    for (let i = start; i < end; i++) most = Math.max(most, gaps[i]);
    sample.sort((a, b) => a - b);
    const usual = sample[Math.floor(0.98 * (sample.length - 1))];
    return Math.max(1, 1.15 * Math.min(most, 2 * usual));
  }

  // -- the plots ----------------------------------------------------------------------------

  function axis(label, more = {}) {
    return {
      label,
      labelSize: 14,
      labelFont: theme.font,
      labelGap: 0,
      font: theme.font,
      size: LEFT - 14,
      stroke: () => theme.ink,
      grid: { stroke: () => theme.grid, width: 1 },
      ticks: { show: false },
      ...more,
    };
  }

  function timeAxis(shown) {
    return axis(undefined, {
      size: shown ? 24 : 6,
      values: (_, splits) => splits.map((each) => (shown ? clock(each) : "")),
      space: 70,
    });
  }

  const mebibytes = (_, splits) => splits.map((each) => String(+(each / 2 ** 20).toFixed(2)));
  const whole = (_, splits) => splits.map((each) => (each % 1 ? "" : String(each)));

  function plot({ height, series, axes, scale, hooks, bottom }) {
    const made = new uPlot({
      width: Math.max(200, element.clientWidth || 600),
      height,
      padding: [6, 10, 0, 0],
      legend: { show: false },
      cursor: {
        drag: { x: true, y: false, setScale: false, dist: 5 },
        sync: { key: sync.key, scales: ["x", null], setSeries: false },
        points: { show: false },
        y: false,
        bind: { dblclick: () => () => ((zoomed = null), schedule(), null) },
      },
      scales: { x: { time: false, range: sight }, y: { range: scale } },
      series: [{}, ...series],
      axes: [timeAxis(bottom), ...axes],
      hooks: {
        ...hooks,
        setCursor: [tellCursor],
        setSelect: [(u) => {
          if (u.select.width < 5) return;
          const [from, to] = [u.select.left, u.select.left + u.select.width];
          zoomed = [u.posToVal(from, "x"), u.posToVal(to, "x")];
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          schedule();
        }],
      },
    }, [[], ...series.map(() => [])]);
    sync.sub(made);
    return made;
  }

  const line = (stroke, more = {}) => ({ stroke, width: 2, points: { show: false }, ...more });
  const stepped = uPlot.paths.stepped({ align: 1 });

  function build() {
    const latency = plot({
      height: 210,
      series: [line(() => theme.ink), line(VERMILION, { dash: [6, 3] })],
      axes: [axis("ITL, ms")],
      scale: () => [0, highest(...sight())],
      hooks: {
        drawAxes: [(u) => drawDots(u, store)],
        draw: [(u) => drawMarks(u, store, theme, true), (u) => drawFirsts(u, store, theme)],
      },
    });
    const requests = plot({
      height: 92,
      series: [
        line(BLUE, { paths: stepped, fill: "rgba(0,114,178,.18)" }),
        line(ORANGE, { paths: stepped, dash: [5, 3] }),
      ],
      axes: [axis("requests", { values: whole, space: 22, incrs: [1, 2, 4, 8, 16, 32, 64, 128, 256] })],
      scale: (_, low, high) => [0, Math.max(1, high ?? 1) * 1.1],
      hooks: { draw: [(u) => drawMarks(u, store, theme, false)] },
      bottom: true,
    });
    plots = [latency, requests];
    figure.replaceChildren(latency.root, requests.root);
  }

  function buildTimeline() {
    const steps = plot({
      height: 130,
      series: [line("transparent")],
      axes: [axis("step, ms")],
      scale: (_, low, high) => [0, Math.max(1, high ?? 1) * 1.15],
      hooks: { drawAxes: [(u) => drawSteps(u, store, theme)], draw: [(u) => drawMarks(u, store, theme, false)] },
    });
    const kv = plot({
      height: 92,
      series: [line(GREEN, { paths: stepped, fill: "rgba(0,158,115,.18)" })],
      axes: [axis("KV, MiB", { space: 22, incrs: MIB, values: mebibytes })],
      scale: (_, low, high) => [0, Math.max(2 ** 16, high ?? 0) * 1.1],
      hooks: {},
      bottom: true,
    });
    timeline = [steps, kv];
    under.replaceChildren(
      h("div", { class: "ik-legend" },
        swatch(BLUE, "decode only"), swatch(ORANGE, "with prefill"),
        h("span", { class: "ik-faint" }, "prompt + output tokens in each step"), (under.kv = h("span", {}))),
      steps.root, kv.root);
  }

  function swatch(colour, ...text) {
    return h("span", {}, h("i", { style: `background:${colour}` }), ...text);
  }

  // -- what the cursor is at ----------------------------------------------------------------

  function tellCursor(u) {
    const { left } = u.cursor;
    if (left === null || left < 0) {
      readout.textContent = "";
      return;
    }
    const time = u.posToVal(left, "x");
    const { tokens, steps } = store.tables;
    const parts = [];
    const token = nearest(tokens[0], time);
    const reach = (u.scales.x.max - u.scales.x.min) / 50;
    if (token >= 0 && Math.abs(tokens[0][token] - time) < reach) {
      parts.push(`${clock(tokens[0][token])}: request ${tokens[2][token]}, ITL ${ms(tokens[1][token])} ms`);
    }
    const at = lowerBound(steps[0], time + 1e-9) - 1;
    if (at >= 0 && time <= steps[0][at] + steps[1][at] / 1e3 + reach) {
      const [, duration, prefill, decode, running, waiting, kv] = steps.map((column) => column[at]);
      const what = isStep(steps, at)
        ? `step of ${ms(duration)} ms: ${prefill} prompt + ${decode} output tokens, ` : "no step: ";
      parts.push(`${what}${running} running, ${waiting} waiting, KV ${size(kv)}`);
    }
    readout.textContent = parts.join(" · ");
  }

  const p50 = document.createTextNode("p50"), p99 = document.createTextNode("p99");
  legend.append(
    h("span", {}, h("i", { class: "ik-dot" }), "ITL"),
    h("span", {}, h("i", { class: "ik-line" }), p50),
    h("span", {}, h("i", { class: "ik-line ik-dashed" }), p99),
    h("span", {}, h("i", { class: "ik-diamond" }), "TTFT"),
    swatch(BLUE, "running"),
    swatch(ORANGE, "waiting"));

  function tellLegend() {
    const { now } = store;
    const level = (value) => (value == null ? "" : ` ${ms(value)} ms`);
    p50.data = `p50${level(now?.p50)}`;
    p99.data = `p99${level(now?.p99)}`;
  }

  // -- when ---------------------------------------------------------------------------------

  function redraw() {
    scheduled = false;
    if (!element.isConnected) return;
    drawn = performance.now();
    theme = readTheme(); // before anything changes, or the page would be laid out for it
    alongside();
    const { steps } = store.tables;
    const some = steps[0].length > 0 || store.tables.firsts[0].length > 0;
    empty.hidden = some;
    figure.hidden = readout.hidden = !some;
    tellLegend();
    if (!some) return;
    if (!plots.length) build();
    plots[0].setData(broken(store.tables.levels, levels));
    plots[1].setData(stepwise(steps, [RUNNING, WAITING], load, present(store)));
    if (more.open) {
      if (!timeline.length) buildTimeline();
      timeline[0].setData([steps[0], steps[1].map((each, i) => (isStep(steps, i) ? each : null))]);
      timeline[1].setData(stepwise(steps, [KV], kept, present(store)));
      under.kv.textContent = store.now?.capacity ? `KV cache of ${size(store.now.capacity)}` : "";
    }
    queueMicrotask(tellDrawn); // uPlot draws in one, too
  }

  // For tests and benchmarks, which cannot look into a canvas.
  function tellDrawn() {
    const { tokens, firsts } = store.tables;
    const newest = Math.max(tokens[0].at(-1) ?? 0, firsts[0].at(-1) ?? 0);
    const detail = { tokens: tokens[0].length, newest, ms: performance.now() - drawn };
    element.dispatchEvent(new CustomEvent("inferkit-drawn", { bubbles: true, detail }));
  }

  function schedule() {
    if (scheduled || document.hidden) return;
    scheduled = true;
    const wait = Math.max(0, drawn + REDRAW - performance.now());
    timer = setTimeout(() => (frame = requestAnimationFrame(redraw)), wait);
  }

  function resize() {
    const width = element.clientWidth;
    if (width < 50) return;
    for (const each of [...plots, ...timeline]) {
      if (each.width !== width) each.setSize({ width, height: each.height });
    }
    schedule();
  }

  // A theme's style sheet comes some time after its name.
  function recolour() {
    for (const wait of [0, 200, 1_000]) setTimeout(repaint, wait);
  }

  function repaint() {
    theme = readTheme();
    [...plots, ...timeline].forEach((each) => each.redraw(false, true));
  }

  const watcher = new ResizeObserver(resize);
  watcher.observe(element);
  const themes = new MutationObserver(recolour);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "class", "data-vscode-theme-kind"] });
  more.addEventListener("toggle", schedule);
  const deaf = store.listen((what) => what === "update" && schedule());
  schedule();

  return {
    element,
    describe: (text) => figure.setAttribute("aria-label", text),
    destroy() {
      deaf();
      clearTimeout(timer);
      cancelAnimationFrame(frame);
      watcher.disconnect();
      themes.disconnect();
      [...plots, ...timeline].forEach((each) => (sync.unsub(each), each.destroy()));
    },
  };
}
