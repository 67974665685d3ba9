// The panel: model and modes above, the prompt, the live plot, and a card for each request.
//
// It draws what the kernel tells (store.parts) and sends what was clicked. What was typed is the
// trait `form`, which the kernel checks: no rule of the library is repeated here.

const CARDS = 100; // requests that are shown; older ones are folded away
const TYPING = 250; // ms without a key until the kernel is told what was typed

const SAMPLING = [
  ["max_tokens", "Max tokens", "64", "Most tokens to generate"],
  ["temperature", "Temperature", "0", "0 picks the likeliest token"],
  ["top_p", "Top-p", "1", "Keep the likeliest tokens of this probability together"],
  ["top_k", "Top-k", "0", "Keep so many of the likeliest tokens; 0 keeps all"],
  ["min_p", "Min-p", "0", "Drop tokens less likely than this share of the likeliest"],
  ["repetition_penalty", "Repetition penalty", "1", "1 does nothing"],
  ["seed", "Seed", "0", "Of the random numbers; “random” draws one for each request"],
  ["stop", "Stop strings", "", "Separated by spaces; quotes around one that has a space"],
];
const FIRST_ROW = 2;
const OVER = new Set(["stop", "length", "cancelled", "error"]);

function createPanel(store, model, root) {
  const inputs = {}, shown = {}, toggles = {};
  const unlisten = [];

  // -- the form -----------------------------------------------------------------------------

  let timer = 0;
  function edit(name, value, now = false) {
    model.set("form", { ...model.get("form"), [name]: value });
    clearTimeout(timer);
    timer = setTimeout(() => model.save_changes(), now ? 0 : TYPING);
  }

  function act(name, details = {}) {
    clearTimeout(timer);
    model.save_changes();
    store.act(name, { form: model.get("form"), ...details });
  }

  function input(name, attributes = {}) {
    const box = h("input", { type: "text", autocomplete: "off", spellcheck: "false", ...attributes });
    box.addEventListener("input", () => edit(name, box.value));
    return (inputs[name] = box);
  }

  function labelled(name, label, control, hint) {
    const made = field(label, control, hint);
    shown[name] = made;
    return made.element;
  }

  // Max batch and context of a loaded model change when the field is left, not at every key.
  function setting(name, label, attributes, hint) {
    const box = input(name, { inputmode: "numeric", size: 6, ...attributes });
    box.addEventListener("change", () => act("apply", { field: name }));
    return labelled(name, label, box, hint);
  }

  function toggle(name, label, values, hint) {
    toggles[name] = segments(label, values, (value) => {
      edit(name, value, true);
      act("apply", { field: name });
    });
    return labelled(name, label, toggles[name].element, hint);
  }

  function fill() {
    const form = model.get("form");
    for (const [name, box] of Object.entries(inputs)) {
      // What somebody types at this moment is not pulled away under the cursor.
      if (box === document.activeElement && root.contains(box)) continue;
      if (box.type === "checkbox") box.checked = Boolean(form[name]);
      else if (box.value !== String(form[name] ?? "")) box.value = form[name] ?? "";
    }
    for (const [name, buttons] of Object.entries(toggles)) buttons.set(form[name]);
  }

  // -- model --------------------------------------------------------------------------------

  const list = h("datalist", { id: `ik-refs-${++fields}` });
  const ref = input("ref", { list: list.id, class: "ik-ref", placeholder: "demo, a hub id, a folder or a .gguf file" });
  ref.addEventListener("keydown", (event) => event.key === "Enter" && act("load"));
  const device = h("select", {});
  device.addEventListener("change", () => edit("device", device.value, true));
  inputs.device = device;
  const load = button("Load", "Load the model by the plan below", () => act("load"), "ik-main");
  const unload = button("Unload", "Cancel its requests and give its memory back", () => act("unload"));
  const which = h("select", { "aria-label": "Loaded model to show" });
  which.addEventListener("change", () => act("attach", { model: which.value }));
  const about = h("div", { class: "ik-about" });
  const plan = h("div", { class: "ik-plan", "aria-live": "polite" });
  const work = h("div", { class: "ik-work", role: "status", hidden: true });
  const failure = h("div", { class: "ik-failure", role: "alert", hidden: true });
  const devices = h("div", { class: "ik-devices" });
  const link = h("div", { class: "ik-link", role: "alert", hidden: true });

  const top = h("section", { class: "ik-section", "aria-label": "Model" },
    h("div", { class: "ik-row" },
      labelled("ref", "Model", ref), list, labelled("device", "Device", device),
      h("div", { class: "ik-buttons" }, load, unload)),
    h("div", { class: "ik-row" },
      toggle("quantize", "Precision", ["none", "int8", "nf4", "fp4"], "How weights are kept (bitsandbytes)"),
      toggle("batching", "Batching", ["continuous", "static", "off"], "When a waiting request may start"),
      setting("max_batch", "Max batch", {}, "Most requests that run at once"),
      setting("context", "Context", {}, "Most tokens of prompt and output together")),
    plan, work, failure, about, devices);

  function button(text, title, click, more = "") {
    return h("button", { type: "button", class: `ik-button ${more}`, title, onclick: click }, text);
  }

  function drawChoices({ choices, model: current }) {
    if (!choices) return;
    list.replaceChildren(...choices.refs.map((each) => h("option", { value: each })));
    const names = ["auto", ...choices.devices];
    const chosen = model.get("form").device;
    if (!names.includes(chosen)) names.push(chosen);
    device.replaceChildren(...names.map((each) => h("option", { value: each }, each)));
    device.value = chosen;
    which.replaceChildren(...choices.loaded.map((each) => h("option", { value: each }, each)));
    which.hidden = choices.loaded.length < 2;
    if (current) which.value = current.name;
  }

  function drawModel({ model: current, work: busy }) {
    about.replaceChildren();
    if (current) {
      const facts = [current.device, current.dtype, current.quantization,
        `${current.batching} batching, at most ${current.max_batch}`, `context ${current.context}`];
      about.append(h("b", {}, current.name), ` is loaded: ${facts.join(" · ")} `, which);
      if (current.fallback) about.append(h("div", { class: "ik-note" }, `Runs one at a time: ${current.fallback}`));
    } else {
      about.append("No model is loaded: choose one and press Load.");
    }
    load.disabled = Boolean(busy);
    unload.disabled = !current || Boolean(busy);
    [send, copies, lines].forEach((each) => (each.disabled = !current));
    prompt.placeholder = current ? "Write a prompt" : "Load a model first, then write a prompt";
    toggles.quantize.disable(Boolean(busy));
  }

  function drawPlan({ plan: told }) {
    plan.className = "ik-plan" + (told && told.fits === false ? " ik-no" : "");
    plan.textContent = told ? told.text : "";
    plan.hidden = !told;
    load.classList.toggle("ik-main", Boolean(told) || !store.parts.model);
  }

  function drawWork({ work: told }) {
    work.hidden = !told;
    if (!told) return;
    const known = told.total > 0;
    const bar = h("progress", known ? { max: told.total, value: told.done } : {});
    bar.setAttribute("aria-label", told.what);
    const unit = told.total > 2 ** 20 ? size : String;
    const count = known ? `${unit(told.done)} of ${unit(told.total)}` : "";
    work.replaceChildren(h("span", {}, told.what), bar, h("span", { class: "ik-faint" }, count));
    if (told.cancel) work.append(button("Cancel", "Stop this; the state before comes back", () => act("cancel")));
  }

  function drawFailure({ failure: told }) {
    failure.hidden = !told;
    if (!told) return;
    failure.replaceChildren(
      h("div", {}, h("b", {}, told.title), " ", told.text),
      button("Dismiss", "Close this message", () => act("dismiss")));
    if (told.details) failure.append(h("details", {}, h("summary", {}, "Details"), h("pre", {}, told.details)));
  }

  function drawDevices({ devices: told }) {
    if (!told) {
      devices.replaceChildren(h("span", { class: "ik-faint" }, "Looking for devices …"));
      return;
    }
    devices.replaceChildren(...told.map((each) => {
      const share = (bytes) => `${each.total ? (100 * bytes) / each.total : 0}%`;
      const others = Math.max(0, each.total - each.free - each.mine);
      const text = `${size(each.total - each.free)} of ${size(each.total)} used`;
      const mine = each.mine ? ` · this model ${size(each.mine)}` : "";
      return h("div", { class: "ik-device", title: each.description },
        h("span", { class: "ik-name" }, each.name),
        h("span", {
          class: "ik-bar", role: "meter", "aria-label": `Memory of ${each.name}`,
          "aria-valuemin": 0, "aria-valuemax": each.total, "aria-valuenow": each.total - each.free,
          "aria-valuetext": text + mine,
        }, h("i", { class: "ik-mine", style: `width:${share(Math.min(each.mine, each.total - each.free))}` }),
        h("i", { class: "ik-others", style: `width:${share(others)}` })),
        h("span", { class: "ik-faint" }, text, mine, ` · ${size(each.free)} free`));
    }));
  }

  // -- prompt -------------------------------------------------------------------------------

  const prompt = h("textarea", { rows: 3, class: "ik-prompt" });
  prompt.addEventListener("input", () => edit("prompt", prompt.value));
  inputs.prompt = prompt;
  const count = input("copies", { inputmode: "numeric", size: 3, "aria-label": "Number of copies" });
  const send = button("Send", "Send the prompt (Ctrl-Enter)", () => act("send", { how: "one" }), "ik-main");
  const copies = button("Send copies", "Send the prompt so many times at once", () => act("send", { how: "copies" }));
  const lines = button("Send each line", "Each line is a prompt of its own", () => act("send", { how: "lines" }));
  const stop = button("Stop", "Stop all requests of this model (Esc)", () => act("stop"), "ik-stop");
  const copy = button("Copy as code", "The cell that repeats this", copyCode);
  const keep = button("Keep figure", "Show the plot below as a plotly figure", () => act("keep"));
  const code = h("div", { class: "ik-code", hidden: true });
  const chat = h("input", { type: "checkbox" });
  chat.addEventListener("change", () => edit("chat", chat.checked, true));
  inputs.chat = chat;
  const eos = h("input", { type: "checkbox" });
  eos.addEventListener("change", () => edit("ignore_eos", eos.checked, true));
  inputs.ignore_eos = eos;

  const sampled = SAMPLING.map(([name, label, usual, hint]) =>
    labelled(name, label, input(name, { placeholder: usual, size: name === "stop" ? 14 : 6 }), hint));
  const bottom = h("section", { class: "ik-section", "aria-label": "Prompt" },
    labelled("prompt", "Prompt", prompt),
    h("div", { class: "ik-row ik-tools" },
      h("div", { class: "ik-buttons" }, send, copies, count, lines, stop),
      h("div", { class: "ik-buttons" }, copy, keep)),
    h("div", { class: "ik-wrong", role: "alert", hidden: true }),
    h("div", { class: "ik-row" },
      ...sampled.slice(0, FIRST_ROW),
      h("label", { class: "ik-check", title: "Put the model's chat template around the prompt" }, chat, "Chat template")),
    h("details", { class: "ik-more" }, h("summary", {}, "More sampling"),
      h("div", { class: "ik-row" }, ...sampled.slice(FIRST_ROW),
        h("label", { class: "ik-check", title: "Go on past the end token, for timing a fixed length" }, eos, "Ignore end token"))),
    code);
  shown.copies = { wrong(text) {
    const message = bottom.querySelector(":scope > .ik-wrong");
    message.textContent = text ?? "";
    message.hidden = !text;
    count.setAttribute("aria-invalid", String(Boolean(text)));
  } };

  function copyCode() {
    const text = store.parts.code ?? "";
    code.hidden = false;
    const box = h("pre", { tabindex: 0 }, text);
    const said = h("span", { role: "status", class: "ik-faint" });
    code.replaceChildren(
      h("div", { class: "ik-buttons" }, said, button("Close", "Hide the code", () => (code.hidden = true))), box);
    copyText(text).then((done) => {
      said.textContent = done ? "Copied: paste it into a cell." : "Select it and copy it into a cell.";
    });
  }

  // -- requests -----------------------------------------------------------------------------

  const cards = new Map();
  const folded = h("div", { class: "ik-faint", hidden: true });
  const requests = h("section", { class: "ik-requests", "aria-label": "Requests" });
  const live = h("div", { class: "ik-now", "aria-live": "off" });
  const summary = h("div", { class: "ik-summary", role: "status" });

  function createCard(number) {
    const title = h("span", { class: "ik-title" });
    const state = h("span", { class: "ik-state" });
    const asked = h("span", { class: "ik-asked" });
    const text = h("div", { class: "ik-text", tabindex: 0, "aria-label": `Answer ${number}` });
    const facts = h("span", { class: "ik-faint" });
    const end = button("Stop", `Stop request ${number}`, () => act("stop", { number }), "ik-small");
    const element = h("article", { class: "ik-card", "aria-label": `Request ${number}` },
      h("header", {}, h("i", { class: "ik-colour", style: `background:${DOTS[number % DOTS.length]}` }),
        title, state, facts, end), asked, text);
    let version = 0;
    return {
      element,
      draw(told) {
        if (told.version === version) return;
        version = told.version;
        const over = OVER.has(told.status);
        const follow = text.scrollHeight - text.scrollTop - text.clientHeight < 24;
        title.textContent = `#${number}`;
        state.textContent = told.status;
        state.className = `ik-state ik-is-${told.status}`;
        asked.textContent = told.prompt;
        asked.title = told.origin === "panel" ? "Sent from the panel" : "Sent by a cell";
        text.textContent = told.error ? `${told.text}\n${told.error}` : told.text;
        if (follow) text.scrollTop = text.scrollHeight;
        facts.textContent = [told.origin === "cell" ? "from a cell" : "", `${told.tokens} tokens`, ...times(told)].filter(Boolean).join(" · ");
        end.hidden = over;
      },
    };
  }

  function times({ ms: told, mode }) {
    if (!told) return [];
    const parts = [["TTFT", told.ttft], ["TPOT", told.tpot], ["queue", told.queue]];
    return [...parts.filter(([, value]) => value != null).map(([name, value]) => `${name} ${ms(value)} ms`), mode];
  }

  function drawRequests() {
    const numbers = [...store.requests.keys()].sort((a, b) => b - a);
    const visible = new Set(numbers.slice(0, CARDS));
    for (const [number, card] of cards) {
      if (!visible.has(number)) {
        card.element.remove();
        cards.delete(number);
      }
    }
    let before = null;
    for (const number of visible) {
      if (!cards.has(number)) {
        cards.set(number, createCard(number));
        const { element } = cards.get(number);
        if (before) before.after(element);
        else requests.prepend(element);
      }
      const card = cards.get(number);
      card.draw(store.requests.get(number));
      before = card.element;
    }
    folded.hidden = numbers.length <= CARDS;
    folded.textContent = `${numbers.length - CARDS} older requests are not shown.`;
    keep.disabled = numbers.length === 0;
  }

  function drawNow() {
    const now = store.now;
    if (!now) return;
    const busy = now.running + now.waiting > 0;
    stop.disabled = !busy;
    root.classList.toggle("ik-busy", busy);
    const number = (value, unit) => (value == null ? "–" : `${ms(value)} ${unit}`);
    live.replaceChildren(
      h("b", {}, busy ? now.rate.toFixed(1) : "0"), " tokens/s",
      ` · ITL p50 ${number(now.p50, "ms")}, p99 ${number(now.p99, "ms")}`,
      ` · ${now.running} running, ${now.waiting} waiting`);
  }

  function drawSummary({ summary: told }) {
    summary.hidden = !told;
    if (!told) return;
    summary.replaceChildren(...told.flatMap(([name, value]) => [
      h("span", { class: "ik-fact" }, h("span", { class: "ik-faint" }, `${name} `), h("b", {}, value))]));
    plot.describe(`Latency of each token over time. ${told.map((pair) => pair.join(" ")).join(", ")}`);
  }

  function drawErrors({ errors = {} }) {
    for (const [name, place] of Object.entries(shown)) place.wrong(errors[name]);
  }

  // -- together -----------------------------------------------------------------------------

  function drawLink() {
    link.hidden = !store.dead;
    const gone = store.dead.startsWith("The kernel");
    link.textContent = gone
      ? `${store.dead}: this panel is no longer connected. Run its cell again for a new one; what is shown stays.`
      : `${store.dead} for some seconds: it may be busy, or gone. This goes away when it answers.`;
    root.classList.toggle("ik-dead", Boolean(store.dead));
    body.inert = gone && Boolean(store.dead);
  }

  function drawParts() {
    const { parts } = store;
    drawChoices(parts);
    drawModel(parts);
    drawPlan(parts);
    drawWork(parts);
    drawFailure(parts);
    drawDevices(parts);
    drawSummary(parts);
    drawErrors(parts);
  }

  function drawUpdate() {
    drawRequests();
    drawNow();
  }

  let waits = false;
  function later() {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => ((waits = false), drawUpdate()));
  }

  const plot = createPlot(store, root);
  const body = h("div", { class: "ik-body" }, top, bottom,
    h("section", { class: "ik-section", "aria-label": "Latency" }, live, plot.element, summary),
    requests, folded);
  root.append(link, body);

  root.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.stopPropagation();
      if (!send.disabled) act("send", { how: "one" });
    } else if (event.key === "Escape") {
      event.preventDefault();
      event.stopPropagation();
      act("stop");
    }
  });
  const draw = { parts: drawParts, update: later, link: drawLink };
  unlisten.push(store.listen((what) => draw[what]()));
  model.on("change:form", fill);
  unlisten.push(() => model.off("change:form", fill));
  fill();
  drawParts();
  drawUpdate();
  drawLink();
  stop.disabled = !(store.now?.running + store.now?.waiting > 0);
  keep.disabled = store.requests.size === 0;
  return () => {
    clearTimeout(timer);
    unlisten.forEach((end) => end());
    plot.destroy();
  };
}
