// From the store's tables to what a plot is given: lines that grow, and places in them.

const BREAK = 1; // s without a token, over which no line is drawn...
const GAPS = 4; // ...unless that is less than so many of the median gaps
const PAUSE = 0.05; // s without a step, from which on nothing was running
const RUNNING = 4, WAITING = 5, KV = 6; // columns of the steps

// The first index whose value is not less.
function lowerBound(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The index of the value nearest to this one, or -1.
function nearest(sorted, value) {
  const after = lowerBound(sorted, value);
  if (after === 0 || after < sorted.length && sorted[after] - value < value - sorted[after - 1]) {
    return after < sorted.length ? after : -1;
  }
  return after - 1;
}

// The rolling quantiles, with a break where no token came for a while.
function broken(levels, made) {
  if (made.source !== levels) {
    Object.assign(made, { from: 0, source: levels, data: [[], [], []] });
  }
  const [x, p50, p99] = made.data;
  for (let i = made.from; i < levels[0].length; i++) {
    if (i && levels[0][i] - levels[0][i - 1] > Math.max(BREAK, (GAPS * levels[1][i]) / 1e3)) {
      x.push(levels[0][i] - 1e-6);
      p50.push(null);
      p99.push(null);
    }
    x.push(levels[0][i]);
    p50.push(levels[1][i]);
    p99.push(levels[2][i]);
  }
  made.from = levels[0].length;
  return made.data;
}

// What runs in a step that has not ended, and since when; null where nothing runs. The KV cache is
// that of the last step, or more.
function present({ now, since, tables }) {
  if (since === null) return null;
  const values = { [RUNNING]: now.running, [WAITING]: now.waiting, [KV]: tables.steps[KV].at(-1) };
  return { since, time: now.time, values };
}

// Whether a row of the steps is one: in others requests waited, and none ran.
const isStep = ([, , prefill, decode], row) => prefill[row] + decode[row] > 0;

// Columns of the steps over time, as lines that are zero where nothing ran.
function stepwise(steps, picked, made, last = null) {
  const [times, durations] = steps;
  if (made.source !== steps) {
    const data = [[], ...picked.map(() => [])];
    Object.assign(made, { from: 0, end: -1, tail: 0, source: steps, data });
  }
  const [x, ...lines] = made.data;
  const add = (time, value) => (x.push(time), lines.forEach((line, c) => line.push(value(picked[c]))));
  const nothing = () => 0;
  made.data.forEach((column) => (column.length -= made.tail));
  for (let i = made.from; i < times.length; i++) {
    if (times[i] - made.end > PAUSE) {
      if (made.end >= 0) add(made.end, nothing);
      add(Math.max(times[i] - 1e-6, made.end), nothing);
    }
    add(times[i], (column) => steps[column][i]);
    made.end = times[i] + durations[i] / 1e3;
  }
  made.from = times.length;
  const length = x.length;
  if (times.length) addTail();
  made.tail = x.length - length;
  return made.data;

  // What is not known for good, and so is put in anew each time.
  function addTail() {
    const since = last ? Math.max(last.since, made.end) : Infinity;
    if (since - made.end > PAUSE) add(made.end, nothing);
    if (!last) return;
    add(since, (column) => last.values[column]);
    add(Math.max(last.time, since), (column) => last.values[column]);
  }
}
