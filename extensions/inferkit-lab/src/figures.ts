import type { History, ModelState, State } from './schema';

const SLOTS = 60;

/** A sparkline: paths of its unbroken stretches and what is below them, dots, and its top in ms. */
export interface Spark {
  readonly lines: string[];
  readonly areas: string[];
  readonly dots: [number, number][];
  readonly top: number;
}

/**
 * The last minute of gaps between tokens, scaled to a box; dots are first tokens of requests.
 *
 * @param history - Of a model.
 * @param now - Seconds since 1970, of the server's clock: the right edge.
 */
export function spark(
  history: History,
  now: number,
  width: number,
  height: number
): Spark {
  const most = history.itl.reduce<number>((a, b) => Math.max(a, b ?? 0), 0);
  const top = most * 1.15 || 1;
  const step = width / SLOTS;
  const x = (index: number): number => {
    const age = now - history.end + (history.itl.length - 1 - index);
    return width - Math.max(0, age / history.seconds) * step - step / 2;
  };
  const y = (itl: number): number => height - 1 - (itl / top) * (height - 2);
  const lines: string[] = [];
  const areas: string[] = [];
  const dots: [number, number][] = [];
  let points: string[] = [];
  const end = (): void => {
    const [first, last] = [points[0], points.at(-1)];
    if (first && last) {
      // A single point is drawn as a dash.
      const line = `M${points.join('L')}${points.length === 1 ? 'h1.5' : ''}`;
      lines.push(line);
      areas.push(`${line}V${height}H${first.split(' ', 1).join()}z`);
    }
    points = [];
  };
  history.itl.forEach((itl, index) => {
    if (x(index) < 0 || itl === null) {
      end();
    } else {
      points.push(`${x(index).toFixed(1)} ${y(itl).toFixed(1)}`);
    }
    if (history.ttft[index] !== null && x(index) >= 0) {
      dots.push([x(index), height - 2.5]);
    }
  });
  end();
  return { lines, areas, dots, top };
}

/** Bytes as the library writes them. */
export function bytes(count: number): string {
  const gib = count / 2 ** 30;
  return gib >= 1
    ? `${gib.toFixed(1)} GiB`
    : `${(count / 2 ** 20).toFixed(0)} MiB`;
}

/** A number with three digits or so; a dash where there is none. */
export function figure(value: number | null): string {
  if (value === null) {
    return '–';
  }
  return value.toFixed(value >= 100 || value === 0 ? 0 : value >= 10 ? 1 : 2);
}

/** "1 request", "2 requests". */
export function counted(count: number, what: string): string {
  return `${count} ${what}${count === 1 ? '' : 's'}`;
}

/** All models of all kernels. */
export function models(state: State): ModelState[] {
  return state.kernels.flatMap(kernel => kernel.state?.models ?? []);
}

/**
 * What the status bar says: the fullest device, and what all models generate. Of kernels on another
 * machine nothing is known, which is said too.
 */
export function summary(state: State): { text: string; title: string } {
  const loaded = models(state);
  const rate = loaded.reduce((sum, model) => sum + model.rate, 0);
  const fill = (d: State['devices'][number]): number =>
    d.total > 0 ? d.used / d.total : 0;
  const ours = state.devices.filter(device => device.kernels.length > 0);
  const among = ours.length > 0 ? ours : state.devices;
  const [fullest] = [...among].sort((a, b) => fill(b) - fill(a));
  const memory =
    fullest === undefined
      ? ''
      : `${fullest.name} ${(fullest.used / 2 ** 30).toFixed(1)}/${bytes(fullest.total)}`;
  const count = state.out_of_sight.length;
  const hidden = count > 0 ? `${counted(count, 'kernel')} out of sight` : '';
  const speed =
    loaded.length > 0 ? `${figure(rate)} tok/s` : hidden ? '' : 'no model';
  return {
    text: [memory, speed, hidden].filter(Boolean).join(' · '),
    title:
      `${counted(loaded.length, 'model')} in ${counted(state.kernels.length, 'kernel')}` +
      `${hidden && `, and ${hidden} on another machine`}; ` +
      'memory of the fullest device and tokens per second now. Click for the Inference sidebar.'
  };
}
