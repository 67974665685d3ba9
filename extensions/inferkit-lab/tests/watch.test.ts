import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { State } from '../src/schema';
import { Watch } from '../src/watch';
import { state } from './states';

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

async function seconds(count: number): Promise<void> {
  await vi.advanceTimersByTimeAsync(1000 * count);
}

test('asks as often as the most eager wants, and not at all without anybody', async () => {
  const fetch = vi.fn(() => Promise.resolve(state()));
  const watch = new Watch(fetch);
  await seconds(20);
  expect(fetch).toHaveBeenCalledTimes(0);

  watch.want('status', 5000);
  await seconds(20);
  expect(fetch.mock.calls.length).toBeGreaterThanOrEqual(4);
  expect(fetch.mock.calls.length).toBeLessThanOrEqual(6);

  fetch.mockClear();
  watch.want('sidebar', 1000);
  await seconds(20);
  expect(fetch.mock.calls.length).toBeGreaterThanOrEqual(19);
  expect(fetch.mock.calls.length).toBeLessThanOrEqual(22);

  watch.want('sidebar', null);
  watch.want('status', null);
  await seconds(1);
  fetch.mockClear();
  await seconds(60);
  expect(fetch).toHaveBeenCalledTimes(0);
  expect(watch.active).toBe(false);
});

test('keeps what it knows when the server is gone, and asks less often', async () => {
  const random = vi.spyOn(Math, 'random').mockReturnValue(0.5); // of the waits
  let up = true;
  const fetch = vi.fn(() =>
    up ? Promise.resolve(state()) : Promise.reject(new Error('gone'))
  );
  const watch = new Watch(fetch);
  watch.want('sidebar', 1000);
  await seconds(2);
  expect(watch.seen).toEqual({ state: state(), error: '' });

  up = false;
  await seconds(2);
  expect(watch.seen).toEqual({ state: state(), error: 'gone' });
  fetch.mockClear();
  await seconds(60);
  expect(fetch.mock.calls.length).toBeLessThan(20);

  up = true;
  await seconds(5); // somebody waits for it
  expect(watch.seen.error).toBe('');
  watch.dispose();
  random.mockRestore();
});

test('an answer that comes after a newer one is passed over', async () => {
  const answers: ((found: State) => void)[] = [];
  const watch = new Watch(
    () =>
      new Promise(resolve => {
        answers.push(resolve);
      })
  );
  const slow = watch.refresh();
  const quick = watch.refresh();
  answers[1]?.({ ...state(), time: 2 });
  await quick;
  answers[0]?.({ ...state(), time: 1 });
  await slow;
  expect(watch.seen.state?.time).toBe(2);
});

test('leaves no timer behind', async () => {
  const watch = new Watch(() => Promise.resolve(state()));
  watch.want('sidebar', 1000);
  await seconds(3);
  watch.dispose();
  await seconds(1);
  expect(vi.getTimerCount()).toBe(0);
  watch.want('sidebar', 1000);
  expect(vi.getTimerCount()).toBe(0);
});

test('tells nothing once it is disposed', async () => {
  let answer: (() => void) | null = null;
  const watch = new Watch(
    () =>
      new Promise(resolve => {
        answer = () => {
          resolve(state());
        };
      })
  );
  const told = vi.fn();
  watch.changed.connect(told);
  const asked = watch.refresh();
  watch.dispose();
  (answer as (() => void) | null)?.();
  await asked;
  expect(told).not.toHaveBeenCalled();
});
