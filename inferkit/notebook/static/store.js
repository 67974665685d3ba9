// What the kernel has told of one live view. Every view of it on a page draws from the same store,
// which therefore is made once per widget model (anywidget calls `initialize` for that).
//
// Messages of the kernel: see inferkit/notebook/live.py.

const COLUMNS = { tokens: 3, firsts: 3, levels: 3, steps: 7 };
const WATCH_EVERY = 10_000; // ms; the kernel stops to send some time after the last one
const SILENT_AFTER = 8_000; // ms; it says something every two seconds
const OUTPUT_AFTER = 1_000; // ms
const ENDED_KEPT = 200;
const OVER = new Set(["stop", "length", "cancelled", "error", "lost"]); // statuses of a request

const emptyTable = (width) => Array.from({ length: width }, () => []);

function createStore(model) {
  const store = {
    parts: {}, // state of the panel, by name
    tables: {}, // columns of numbers, by the table's name
    marks: [], // [time, label]
    requests: new Map(), // by number
    now: null,
    since: null, // when what runs or waits now began to, in the kernel's time
    connected: false,
    dead: "", // why nothing comes: no word for a while, or...
    gone: false, // ...its kernel is no more
    watchers: 0,
  };
  const listeners = new Set();
  let heard = performance.now(), watched = 0;
  let timer = 0;

  for (const [name, width] of Object.entries(COLUMNS)) store.tables[name] = emptyTable(width);

  const tell = (what, names) => listeners.forEach((listener) => listener(what, names));

  function addRows(told, buffer) {
    const width = COLUMNS[told.name];
    if (told.reset) store.tables[told.name] = emptyTable(width);
    const columns = store.tables[told.name];
    // A copy, for the part of a message that a buffer is may begin anywhere.
    const start = buffer.byteOffset ?? 0;
    const bytes = (buffer.buffer ?? buffer).slice(start, start + buffer.byteLength);
    const rows = new Float64Array(bytes);
    for (let i = 0; i < rows.length; i += width) {
      for (let c = 0; c < width; c++) columns[c].push(rows[i + c]);
    }
  }

  function addRequest(told) {
    const known = store.requests.get(told.number) ?? { text: "" };
    const text = told.text ?? known.text + (told.add ?? "");
    const request = { ...known, ...told, text, version: (known.version ?? 0) + 1 };
    delete request.add;
    store.requests.set(told.number, request);
  }

  // Those that wait or run stay, however many there are.
  function forgetOld() {
    let more = store.requests.size - ENDED_KEPT;
    if (more <= 0) return;
    for (const [number, { status }] of store.requests) {
      if (more <= 0) break;
      if (OVER.has(status) && store.requests.delete(number)) more--;
    }
  }

  function beNow(now) {
    store.now = now;
    store.since = now.running + now.waiting > 0 ? store.since ?? now.time : null;
  }

  const receive = {
    // The page that ran the cell has the output by then: see live.py.
    output: (message) => void setTimeout(() => tell("output", message), message.output ? 0 : OUTPUT_AFTER),
    state(message) {
      Object.assign(store.parts, message.parts);
      tell("parts", Object.keys(message.parts));
    },
    update(message, buffers) {
      if (message.whole) {
        store.requests.clear();
        store.marks = [];
      }
      message.tables.forEach((told, i) => addRows(told, buffers[i]));
      message.requests.forEach(addRequest);
      forgetOld();
      store.marks.push(...message.marks);
      beNow(message.now);
      tell("update");
    },
    // What was of late may be so no more.
    beat({ now }) {
      const shown = ["rate", "p50", "p99", "running", "waiting"];
      const changed = shown.some((name) => store.now?.[name] !== now[name]);
      beNow(now);
      if (changed) tell("update");
    },
  };

  model.on("msg:custom", (message, buffers) => {
    if (!(message.type in receive)) return;
    heard = performance.now();
    if (store.dead || !store.connected) {
      store.dead = "";
      store.connected = true;
      tell("link");
    }
    receive[message.type](message, buffers ?? []);
  });
  model.on("comm_live_update", left);

  function lost(why) {
    if (store.dead === why) return;
    store.dead = why;
    tell("link");
  }

  // With the kernel went whatever it was at.
  function left() {
    if (store.gone) return;
    store.gone = true;
    for (const request of store.requests.values()) {
      if (!OVER.has(request.status)) Object.assign(request, { status: "lost", version: request.version + 1 });
    }
    if (store.now) beNow({ ...store.now, rate: 0, running: 0, waiting: 0 });
    tell("update");
    lost("The kernel was restarted or shut down");
  }

  function look() {
    if (document.hidden || store.gone) return;
    const silent = performance.now() - heard;
    if (silent > SILENT_AFTER && !store.dead) lost("No word from the kernel");
    if (performance.now() - watched >= WATCH_EVERY) send({ type: "watch" });
  }

  function send(message) {
    if (store.gone) return;
    watched = performance.now();
    try {
      model.send(message);
    } catch {
      left();
    }
  }

  // A page that was hidden has missed what was not sent to it.
  function shown() {
    if (document.hidden || store.gone || !store.watchers) return;
    heard = performance.now();
    send({ type: "hello" });
  }

  store.listen = (listener) => {
    listeners.add(listener);
    if (store.watchers++ === 0) {
      timer = setInterval(look, 1_000);
      document.addEventListener("visibilitychange", shown);
      shown(); // nobody has listened until now
    }
    return () => {
      listeners.delete(listener);
      if (--store.watchers === 0) {
        clearInterval(timer);
        document.removeEventListener("visibilitychange", shown);
      }
    };
  };
  store.ask = (mark) => send({ type: "output", mark });
  store.act = (name, details = {}) => send({ type: "act", name, ...details });
  store.close = () => {
    clearInterval(timer);
    document.removeEventListener("visibilitychange", shown);
    listeners.clear();
  };
  return store;
}
