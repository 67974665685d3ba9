// The requests: a card for each. Those that run stand above, then those that have ended, each with
// the newest first, and at the end those that wait, in their order.

const CARDS = 100; // requests that are shown; others are counted

// `stopIt` stops the request of a number; `button` makes a button.
function createCards(store, stopIt, button) {
  const cards = new Map();
  const others = h("div", { class: "ik-faint", hidden: true });
  const element = h("section", { class: "ik-requests", "aria-label": "Requests" });

  function visible() {
    const all = [...store.requests.values()].reverse();
    const running = all.filter(({ status }) => status === "running");
    const ended = all.filter(({ status }) => OVER.has(status));
    const waiting = all.filter(({ status }) => status === "waiting").reverse();
    // Those that wait have their share beside those that have ended, the next ones first.
    const room = Math.max(0, CARDS - running.length);
    const next = waiting.slice(0, Math.max(room >> 1, room - ended.length));
    const shown = [...running, ...ended.slice(0, room - next.length), ...next];
    return shown.slice(0, CARDS).map((each) => each.number);
  }

  function draw() {
    const numbers = visible(), seen = new Set(numbers);
    for (const [number, card] of cards) {
      if (seen.has(number)) continue;
      card.element.remove();
      cards.delete(number);
    }
    let before = null;
    for (const number of numbers) {
      if (!cards.has(number)) cards.set(number, createCard(number, stopIt, button));
      const card = cards.get(number);
      const place = before ? before.nextSibling : element.firstChild;
      if (card.element !== place) element.insertBefore(card.element, place);
      card.draw(store.requests.get(number));
      before = card.element;
    }
    // They are numbered from 1, and the store forgets the oldest.
    const more = Math.max(0, ...store.requests.keys()) - numbers.length;
    others.hidden = more <= 0;
    others.textContent = `${more} more request${more === 1 ? " is" : "s are"} not shown.`;
  }

  return { element, others, draw };
}

// A request: its status and numbers, its prompt in a line, its answer as it comes.
function createCard(number, stopIt, button) {
  const state = h("span", {}), asked = h("span", { class: "ik-asked" });
  const facts = h("span", { class: "ik-faint" });
  const answer = document.createTextNode("");
  const text = h("div", { class: "ik-text" }, h("div", {}, answer)), error = h("div", { class: "ik-wrong", hidden: true });
  const stop = button("Stop", `Stop request ${number}`, () => stopIt(number), "ik-small");
  const element = h("article", { class: "ik-card", "aria-label": `Request ${number}` },
    h("header", {}, h("i", { class: "ik-colour", style: `background:${DOTS[number % DOTS.length]}` }),
      h("span", { class: "ik-title" }, `#${number}`), state, facts, stop), asked, text, error);
  let version = 0;

  function grow(whole) {
    // What is there stays, so that it can be selected while more comes.
    if (whole.startsWith(answer.data)) answer.appendData(whole.slice(answer.data.length));
    else answer.data = whole;
  }

  function times({ ms: told, mode }) {
    if (!told) return [];
    const parts = [["TTFT", told.ttft], ["TPOT", told.tpot], ["queue", told.queue]];
    const known = parts.filter(([, value]) => value != null);
    return [...known.map(([name, value]) => `${name} ${ms(value)} ms`), `precision ${mode}`];
  }

  return {
    element,
    draw(told) {
      if (told.version === version) return;
      version = told.version;
      const over = OVER.has(told.status);
      state.textContent = told.status;
      state.className = `ik-state ik-is-${told.status}`;
      asked.textContent = told.prompt;
      asked.title = told.prompt;
      grow(told.text);
      error.textContent = told.error ?? "";
      error.hidden = !told.error;
      const from = told.origin === "panel" ? [] : ["from a cell"];
      facts.textContent = [...from, `${told.tokens} token${told.tokens === 1 ? "" : "s"}`, ...times(told)].join(" · ");
      stop.hidden = over;
    },
  };
}
