// What the kernel has told of one live view. Every view of it on a page draws from the same store,
// which therefore is made once per widget model (anywidget calls `initialize` for that).
//
// Messages of the kernel: see inferkit/notebook/live.py.

const COLUMNS = { tokens: 3, firsts: 3, levels: 3, steps: 7 };
const WATCH_EVERY = 10_000; // ms; the kernel stops to send some time after the last one
const SILENT_AFTER = 8_000; // ms; it says something every two seconds
const REQUESTS_KEPT = 200;

const emptyTable = (width) => Array.from({ length: width }, () => []);

function createStore(model) {
  const store = {
    parts: {}, // state of the panel, by name
    tables: {}, // columns of numbers, by the table's name
    marks: [], // [time, label]
    requests: new Map(), // by number
    now: null,
    connected: false,
    dead: "", // why nothing comes any more
    epoch: 0, // counts the times that all was sent anew
    watchers: 0,
  };
  const listeners = new Set();
  let heard = performance.now();
  let timer = 0;

  for (const [name, width] of Object.entries(COLUMNS)) store.tables[name] = emptyTable(width);

  const tell = (what) => listeners.forEach((listener) => listener(what));

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
    for (const number of store.requests.keys()) {
      if (store.requests.size <= REQUESTS_KEPT) break;
      store.requests.delete(number);
    }
  }

  const receive = {
    state(message) {
      Object.assign(store.parts, message.parts);
      tell("parts");
    },
    update(message, buffers) {
      if (message.whole) {
        store.requests.clear();
        store.marks = [];
        store.epoch++;
      }
      message.tables.forEach((told, i) => addRows(told, buffers[i]));
      message.requests.forEach(addRequest);
      store.marks.push(...message.marks);
      store.now = message.now;
      tell("update");
    },
    beat() {},
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
  model.on("comm_live_update", () => lost("The kernel was restarted or shut down"));

  function lost(why) {
    if (store.dead === why) return;
    store.dead = why;
    tell("link");
  }

  function look() {
    if (document.hidden) return;
    const silent = performance.now() - heard;
    if (silent > SILENT_AFTER && !store.dead) lost("No word from the kernel");
    if (performance.now() - watched >= WATCH_EVERY) send({ type: "watch" });
  }

  let watched = 0;
  function send(message) {
    watched = performance.now();
    try {
      model.send(message);
    } catch {
      lost("The kernel was restarted or shut down");
    }
  }

  // A page that was hidden has missed what was not sent to it.
  function shown() {
    if (document.hidden || !store.watchers) return;
    heard = performance.now();
    send({ type: "hello" });
  }

  store.listen = (listener) => {
    listeners.add(listener);
    if (store.watchers++ === 0) {
      timer = setInterval(look, 1_000);
      document.addEventListener("visibilitychange", shown);
      if (store.connected) shown();
    }
    return () => {
      listeners.delete(listener);
      if (--store.watchers === 0) {
        clearInterval(timer);
        document.removeEventListener("visibilitychange", shown);
      }
    };
  };
  store.act = (name, details = {}) => send({ type: "act", name, ...details });
  store.close = () => {
    clearInterval(timer);
    document.removeEventListener("visibilitychange", shown);
    listeners.clear();
  };
  send({ type: "hello" });
  return store;
}
