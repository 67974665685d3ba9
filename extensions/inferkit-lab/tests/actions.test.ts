import { ServerConnection, type Kernel } from '@jupyterlab/services';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { act } from '../src/actions';

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

const having = (found: Promise<Kernel.IModel | undefined>): Kernel.IManager =>
  ({ findById: () => found }) as unknown as Kernel.IManager;

test('a server that hangs is said to, and leaves no timer behind', async () => {
  const asked = act(having(new Promise(() => undefined)), 'a', 'stop');
  await vi.advanceTimersByTimeAsync(10_000);
  expect(await asked).toMatchObject({
    ok: false,
    text: 'The Jupyter server does not answer.'
  });
  expect(vi.getTimerCount()).toBe(0);
});

test('a server that is gone, or a kernel, is an answer too', async () => {
  const failed = new ServerConnection.NetworkError(new TypeError('no'));
  const gone = having(Promise.reject(failed));
  expect(await act(gone, 'a', 'stop')).toMatchObject({
    ok: false,
    text: 'The Jupyter server does not answer.'
  });
  const ended = having(Promise.resolve(undefined));
  expect((await act(ended, 'a', 'stop')).text).toBe(
    'This kernel no longer runs.'
  );
  expect(vi.getTimerCount()).toBe(0);
});
