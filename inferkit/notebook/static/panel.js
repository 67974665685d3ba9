// The panel: model and modes above, the prompt, the live plot, and a card for each request.
//
// It draws what the kernel tells (store.parts), each part when it changes, and sends what was
// clicked, with the fields that were typed since the last time. The kernel keeps the form and
// checks it: no rule of the library is repeated here.

const TYPING = 250; // ms without a key until the kernel is told what was typed
const NAMING = 800; // the same for a model's name, which the hub may be asked about
const SETTLED = 1_500; // ms after a key, from which on the kernel may change a field in use

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
const FIRST_ROW = 2; // of these are always in sight

function createPanel(store, root) {
  const inputs = {}, shown = {}, toggles = {};

  // -- the form -----------------------------------------------------------------------------

  let typed = {}, timer = 0; // fields that the kernel has not been told of yet
  const sent = {}; // those that it has been told of, and has not answered
  const touched = {}; // when a field was typed into

  function edit(name, value, wait = TYPING) {
    typed[name] = value;
    touched[name] = performance.now();
    clearTimeout(timer);
    timer = setTimeout(() => act("edit"), wait);
  }

  function act(name, details = {}) {
    clearTimeout(timer);
    const fields = typed;
    typed = {};
    for (const [each, value] of Object.entries(fields)) {
      if (each in sent || store.parts.form?.[each] !== value) sent[each] = value;
    }
    store.act(name, { fields, ...details });
  }

  // The kernel may be busy for a while: what was typed and chosen stays until it has taken it in.
  function takeAnswer({ form }) {
    for (const [name, value] of Object.entries(sent)) {
      if (form?.[name] === value) delete sent[name];
    }
  }

  const isMine = (name) => name in typed || name in sent;

  function drawForm({ form }) {
    if (!form) return;
    for (const [name, box] of Object.entries(inputs)) {
      // What somebody types at this moment is not pulled away under the cursor.
      const busy = document.activeElement === box && performance.now() - (touched[name] ?? 0) < SETTLED;
      if (busy || isMine(name)) continue;
      const value = form[name] ?? "";
      if (box.type === "checkbox") box.checked = Boolean(value);
      else if (box.value !== String(value)) choose(box, String(value));
    }
    for (const [name, buttons] of Object.entries(toggles)) {
      if (!isMine(name)) buttons.set(form[name]);
    }
  }

  function choose(box, value) {
    if (box === device && ![...box.options].some((each) => each.value === value)) {
      box.append(h("option", { value }, value));
    }
    box.value = value;
  }

  function input(name, attributes = {}) {
    const box = h("input", { type: "text", autocomplete: "off", spellcheck: "false", ...attributes });
    box.addEventListener("input", () => edit(name, box.value, name === "ref" ? NAMING : TYPING));
    return (inputs[name] = box);
  }

  function checkbox(name, label, hint) {
    const box = h("input", { type: "checkbox" });
    box.addEventListener("change", () => edit(name, box.checked, 0));
    inputs[name] = box;
    return h("label", { class: "ik-check", title: hint }, box, label);
  }

  function labelled(name, label, control, hint) {
    shown[name] = field(label, control, hint);
    return shown[name].element;
  }

  // Max batch and context of a loaded model change when the field is left, not at every key.
  function setting(name, label, usual, hint) {
    const box = input(name, { inputmode: "numeric", size: 6, placeholder: usual });
    box.addEventListener("change", () => {
      delete touched[name];
      act("apply", { field: name });
    });
    return labelled(name, label, box, hint);
  }

  function toggle(name, label, values, hint) {
    toggles[name] = segments(label, values, (value) => {
      edit(name, value);
      act("apply", { field: name });
    });
    return labelled(name, label, toggles[name].element, hint);
  }

  // A button that is off keeps the focus, and says that it is off. One of the class "ik-here" asks
  // nothing of the kernel.
  function button(text, title, click, more = "") {
    const element = h("button", { type: "button", class: `ik-button ${more}`, title }, text);
    element.addEventListener("click", () => isOn(element) && click());
    return element;
  }

  const isOn = (element) => element.getAttribute("aria-disabled") !== "true";
  const enable = (element, on) => element.setAttribute("aria-disabled", String(!on || store.gone));

  // -- model --------------------------------------------------------------------------------

  const list = h("datalist", { id: unique("refs") });
  const ref = input("ref", { list: list.id, class: "ik-ref", placeholder: "demo, a hub id, a folder or a .gguf file" });
  ref.addEventListener("change", () => act("edit"));
  ref.addEventListener("keydown", (event) => {
    const plain = event.key === "Enter" && !event.ctrlKey && !event.metaKey; // with them it sends
    if (plain && isOn(load)) act("load");
  });
  const device = h("select", {}, h("option", { value: "auto" }, "auto"));
  device.addEventListener("change", () => edit("device", device.value, 0));
  inputs.device = device;
  const load = button("Load", "Load the model by the plan below", () => act("load"), "ik-main");
  const unload = button("Unload", "Cancel its requests and give its memory back", () => act("unload"));
  const which = h("select", { "aria-label": "Loaded model to show", hidden: true });
  which.addEventListener("change", () => act("attach", { model: which.value }));
  const facts = h("span", {}), fallback = h("div", { class: "ik-note", hidden: true });
  const plan = h("div", { class: "ik-plan", "aria-live": "polite", hidden: true });
  const failure = h("div", { class: "ik-failure", role: "alert", hidden: true });
  const devices = h("div", { class: "ik-devices" });
  const link = h("div", { class: "ik-link", role: "alert", hidden: true });

  const doing = h("span", { role: "status" }), bar = h("progress", {}), count = h("span", { class: "ik-faint" });
  const cancel = button("Cancel", "Stop this; the state before comes back", () => act("cancel"));
  const work = h("div", { class: "ik-work", hidden: true }, doing, bar, count, cancel);

  const top = h("section", { class: "ik-section", "aria-label": "Model" },
    h("div", { class: "ik-row" },
      labelled("ref", "Model", ref), list, labelled("device", "Device", device),
      h("div", { class: "ik-buttons" }, load, unload)),
    h("div", { class: "ik-row" },
      toggle("quantize", "Precision", ["none", "int8", "nf4", "fp4", "int8wo", "int4wo"],
        "How weights are kept: bitsandbytes' modes, and weight-only ones for a CPU"),
      toggle("batching", "Batching", ["continuous", "static", "off"], "When a waiting request may start"),
      toggle("speculative", "Speculation", ["off", "ngram"],
        "Guess next tokens by what followed the same ones before, and check several in one pass"),
      setting("max_batch", "Max batch", "16", "Most requests that run at once"),
      setting("context", "Context", "4096", "Most tokens of prompt and output together")),
    plan, work, failure, h("div", { class: "ik-about" }, facts, which, fallback), devices);

  function drawChoices({ choices }) {
    if (!choices) return;
    const options = (values) => values.map((each) => h("option", { value: each }, each));
    list.replaceChildren(...choices.refs.map((each) => h("option", { value: each })));
    const chosen = device.value;
    device.replaceChildren(...options(["auto", ...choices.devices]));
    choose(device, chosen);
    which.replaceChildren(...options(choices.loaded));
    which.hidden = choices.loaded.length < 2;
    which.value = store.parts.model?.name ?? "";
  }

  function drawModel({ model }) {
    facts.replaceChildren(...(model
      ? [h("b", {}, model.name), ` is loaded: ${[
        model.device, model.dtype, `precision ${model.quantization}`,
        `${model.batching} batching, at most ${model.max_batch}`, `context ${model.context}`,
        `step ${model.step.split(":")[0]}`,
        ...(model.speculative === "off" ? [] : [`speculation ${model.speculative}`]),
      ].join(" · ")} `]
      : [model === null ? "No model is loaded: choose one and press Load." : "Asking the kernel …"]));
    facts.title = model ? `Decode step: ${model.step}` : "";
    fallback.hidden = !model?.fallback;
    fallback.textContent = model?.fallback ? `Runs one at a time: ${model.fallback}` : "";
    which.value = model?.name ?? "";
    prompt.placeholder = model ? "Write a prompt" : "Load a model first, then write a prompt";
  }

  // What can be pressed follows from several parts.
  function drawButtons({ model, plan: told, work: busy }) {
    enable(load, !busy);
    enable(unload, Boolean(model) && !busy);
    [send, copies, lines].forEach((each) => enable(each, Boolean(model)));
    toggles.quantize.disable(Boolean(busy));
    load.classList.toggle("ik-main", Boolean(told) || !model);
  }

  // A load that fails for what the plan has said says it again, in its own place.
  function drawPlan({ plan: told, failure: failed }) {
    plan.classList.toggle("ik-no", told?.fits === false);
    plan.textContent = told?.text ?? "";
    plan.hidden = !told || told.text === failed?.text;
  }

  function drawWork({ work: told }) {
    work.hidden = !told;
    if (!told) return;
    const known = told.total > 0, unit = told.total > 2 ** 20 ? size : String;
    if (doing.textContent !== told.what) doing.textContent = told.what;
    bar.setAttribute("aria-label", told.what);
    if (known) Object.assign(bar, { max: told.total, value: told.done });
    else bar.removeAttribute("value");
    count.textContent = known ? `${unit(told.done)} of ${unit(told.total)}` : "";
    cancel.hidden = !told.cancel;
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
    devices.replaceChildren(...(told
      ? told.map(deviceRow)
      : [h("span", { class: "ik-faint" }, "Looking for devices …")]));
  }

  function deviceRow(each) {
    const name = h("span", { class: "ik-name" }, each.name);
    if (!each.total) return h("div", { class: "ik-device" }, name, h("span", { class: "ik-faint" }, each.description));
    const used = each.total - each.free, mine = Math.min(each.mine, used);
    const share = (bytes) => `width:${(100 * bytes) / each.total}%`;
    const text = `${size(used)} of ${size(each.total)} used`
      + (each.mine ? ` · ${size(each.mine)} planned for this model` : "") + ` · ${size(each.free)} free`;
    return h("div", { class: "ik-device", title: each.description }, name,
      h("span", {
        class: "ik-bar", role: "meter", "aria-label": `Memory of ${each.name}`, "aria-valuetext": text,
        "aria-valuemin": 0, "aria-valuemax": each.total, "aria-valuenow": used,
      }, h("i", { class: "ik-mine", style: share(mine) }), h("i", { class: "ik-others", style: share(used - mine) })),
      h("span", { class: "ik-faint" }, text));
  }

  // -- prompt -------------------------------------------------------------------------------

  const prompt = h("textarea", { rows: 3, class: "ik-prompt" });
  prompt.addEventListener("input", () => edit("prompt", prompt.value));
  inputs.prompt = prompt;
  const number = input("copies", { inputmode: "numeric", size: 3, "aria-label": "Number of copies" });
  const send = button("Send", "Send the prompt (Ctrl-Enter)", () => act("send", { how: "one" }), "ik-main");
  const copies = button("Send copies", "Send the prompt so many times at once", () => act("send", { how: "copies" }));
  const lines = button("Send each line", "Each line is a prompt of its own", () => act("send", { how: "lines" }));
  const stop = button("Stop", "Stop all requests of this model (Esc)", () => act("stop"), "ik-stop");
  const copy = button("Copy as code", "The cell that repeats this", copyCode, "ik-here");
  const keep = button("Keep figure", "Show the plot below as a plotly figure", () => act("keep"));
  const code = h("div", { class: "ik-code", hidden: true });
  const wrongCopies = h("div", { class: "ik-wrong", role: "alert", id: unique("wrong"), hidden: true });
  number.setAttribute("aria-describedby", wrongCopies.id);
  shown.copies = { wrong(text = "") {
    if (wrongCopies.textContent === text) return;
    wrongCopies.textContent = text;
    wrongCopies.hidden = !text;
    number.setAttribute("aria-invalid", String(Boolean(text)));
  } };

  const sampled = SAMPLING.map(([name, label, usual, hint]) =>
    labelled(name, label, input(name, { placeholder: usual, size: name === "stop" ? 14 : 6 }), hint));
  const bottom = h("section", { class: "ik-section", "aria-label": "Prompt" },
    labelled("prompt", "Prompt", prompt),
    h("div", { class: "ik-row ik-tools" },
      h("div", { class: "ik-buttons" }, send, copies, number, lines, stop),
      h("div", { class: "ik-buttons" }, copy, keep)),
    wrongCopies,
    h("div", { class: "ik-row" }, ...sampled.slice(0, FIRST_ROW),
      checkbox("chat", "Chat template", "Put the model's chat template around the prompt")),
    h("details", { class: "ik-more" }, h("summary", {}, "More sampling"),
      h("div", { class: "ik-row" }, ...sampled.slice(FIRST_ROW),
        checkbox("ignore_eos", "Ignore end token", "Go on past the end token, for timing a fixed length"))),
    code);

  function copyCode() {
    const text = store.parts.code ?? "";
    const said = h("span", { role: "status", class: "ik-faint" });
    code.hidden = false;
    code.replaceChildren(
      h("div", { class: "ik-buttons" }, said, button("Close", "Hide the code", () => (code.hidden = true), "ik-here")),
      h("pre", { tabindex: 0 }, text));
    copyText(text).then((done) => {
      said.textContent = done ? "Copied: paste it into a cell." : "Select it and copy it into a cell.";
    });
  }

  // -- requests -----------------------------------------------------------------------------

  const cards = createCards(store, (number) => act("stop", { number }), button);
  const rate = h("b", {}, "0"), rest = document.createTextNode(" tokens/s");
  const live = h("div", { class: "ik-now" }, rate, rest);
  const summary = h("div", { class: "ik-summary", role: "status", hidden: true });

  function drawNow() {
    const { now } = store;
    const busy = now?.running + now?.waiting > 0;
    enable(stop, busy);
    root.classList.toggle("ik-busy", busy);
    if (!now) return;
    const gap = (value) => (value == null ? "–" : `${ms(value)} ms`);
    rate.textContent = busy ? now.rate.toFixed(1) : "0";
    rest.data = ` tokens/s · ITL of the last 10 s: p50 ${gap(now.p50)}, p99 ${gap(now.p99)}`
      + ` · ${now.running} running, ${now.waiting} waiting`;
  }

  function drawSummary({ summary: told }) {
    summary.hidden = !told?.length;
    if (summary.hidden) return;
    summary.replaceChildren(...told.map(([name, value]) =>
      h("span", { class: "ik-fact" }, h("span", { class: "ik-faint" }, `${name} `), h("b", {}, value))));
    plot.describe(`Latency of each token over time. ${told.map((pair) => pair.join(" ")).join(", ")}`);
  }

  function drawErrors({ errors = {} }) {
    for (const [name, place] of Object.entries(shown)) place.wrong(errors[name]);
  }

  // -- together -----------------------------------------------------------------------------

  function drawLink() {
    link.hidden = !store.dead;
    link.textContent = store.gone
      ? `${store.dead}: this panel is no longer connected. Run its cell again for a new one; what is shown stays.`
      : `${store.dead} for some seconds: it may be busy, or gone. This goes away when it answers.`;
    root.classList.toggle("ik-silent", Boolean(store.dead) && !store.gone);
    if (store.gone) leaveToRead();
  }

  // What would ask something of the kernel is off; what is shown can be read, selected and copied.
  function leaveToRead() {
    for (const box of body.querySelectorAll("input, textarea, select")) {
      if (box.matches("input[type=text], textarea")) box.readOnly = true;
      else box.disabled = true;
    }
    Object.values(toggles).forEach((each) => each.disable(true));
    body.querySelectorAll(".ik-button:not(.ik-here)").forEach((each) => enable(each, false));
  }

  const draws = {
    form: [drawForm], choices: [drawChoices, drawForm], devices: [drawDevices], errors: [drawErrors],
    model: [drawModel, drawButtons], plan: [drawPlan, drawButtons], work: [drawWork, drawButtons],
    failure: [drawFailure, drawPlan], summary: [drawSummary],
  };

  function drawParts(names) {
    const wanted = new Set(names.flatMap((name) => draws[name] ?? []));
    wanted.forEach((draw) => draw(store.parts));
  }

  function drawUpdate() {
    cards.draw();
    enable(keep, store.requests.size > 0);
    drawNow();
    if (store.gone) leaveToRead(); // this was still to be drawn when the kernel went
  }

  const plot = createPlot(store, root, drawUpdate);
  const body = h("div", { class: "ik-body" }, top, bottom,
    h("section", { class: "ik-section", "aria-label": "Latency" }, live, plot.element, summary),
    cards.element, cards.others);
  root.append(link, body);

  root.addEventListener("keydown", (event) => {
    const handled = keyPressed(event);
    if (!handled) return;
    event.preventDefault();
    event.stopPropagation();
  });

  function keyPressed(event) {
    if (event.isComposing) return false;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      // Without a model too: the kernel says what is missing.
      if (!event.repeat) act("send", { how: "one" });
      return true;
    }
    // In a box with a list Esc closes the list.
    if (event.key !== "Escape" || event.target.matches("select, input[list]")) return false;
    act("stop");
    return true;
  }

  root.addEventListener("focusout", () => setTimeout(() => drawForm(store.parts)));

  const unlisten = store.listen((what, names) => {
    if (what === "parts") {
      if (names.includes("form")) takeAnswer(store.parts);
      drawParts(names);
    }
    else if (what === "link") drawLink();
  });
  drawParts(Object.keys(draws));
  drawUpdate();
  drawLink();
  return () => {
    clearTimeout(timer);
    unlisten();
    plot.destroy();
  };
}
