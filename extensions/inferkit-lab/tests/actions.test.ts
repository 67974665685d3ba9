import {
  ServerConnection,
  type Kernel,
  type KernelMessage
} from '@jupyterlab/services';
import { Signal } from '@lumino/signaling';
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
    'The server lists no such kernel: it no longer runs, or a gateway does not tell what runs.'
  );
  expect(vi.getTimerCount()).toBe(0);
});

/** A kernel that takes what it is asked, and answers nothing. */
class Connection {
  connectionStatus: Kernel.ConnectionStatus = 'connected';
  readonly connectionStatusChanged = new Signal<this, string>(this);
  readonly anyMessage = new Signal<this, Kernel.IAnyMessageArgs>(this);
  readonly dispose = vi.fn(() => {
    this._cancel(new Error('Canceled'));
  });

  get kernels(): Kernel.IManager {
    return {
      findById: () => Promise.resolve({ id: 'a' }),
      connectTo: () => this
    } as unknown as Kernel.IManager;
  }

  sendControlMessage(): object {
    const done = new Promise((_, reject) => {
      this._cancel = reject;
    });
    return { done };
  }

  say(channel: string, msg_type: string, session: string): void {
    const msg = { channel, header: { msg_type, session } };
    this.anyMessage.emit({
      msg: msg as KernelMessage.IMessage,
      direction: 'recv'
    });
  }

  change(to: Kernel.ConnectionStatus): void {
    this.connectionStatus = to;
    this.connectionStatusChanged.emit(to);
  }

  private _cancel: (error: Error) => void = () => undefined;
}

/** That a connection was disposed of, and that nothing waits any more. */
async function expectLeft(kernel: Connection): Promise<void> {
  expect(kernel.dispose).toHaveBeenCalled();
  await vi.advanceTimersByTimeAsync(100); // signals clean up after themselves
  expect(vi.getTimerCount()).toBe(0);
}

test('a restart that another connection asked for ends the action', async () => {
  const kernel = new Connection();
  const ended = vi.fn();
  void act(kernel.kernels, 'a', 'load').then(ended);
  await vi.advanceTimersByTimeAsync(0);
  kernel.say('control', 'kernel_info_reply', 'first');
  kernel.say('iopub', 'status', 'first');
  kernel.say('iopub', 'stream', 'server');
  await vi.advanceTimersByTimeAsync(1);
  expect(ended).not.toHaveBeenCalled();
  kernel.say('iopub', 'status', 'second');
  await vi.advanceTimersByTimeAsync(1);
  expect(ended.mock.calls[0]?.[0]).toMatchObject({
    ok: false,
    text: 'The kernel has ended or was restarted meanwhile.'
  });
  await expectLeft(kernel);
});

test('a kernel that never answers is said to', async () => {
  const kernel = new Connection();
  const asked = act(kernel.kernels, 'a', 'load');
  await vi.advanceTimersByTimeAsync(60_000);
  expect((await asked).text).toBe('The kernel does not answer.');
  await vi.advanceTimersByTimeAsync(1);
  await expectLeft(kernel);
});

test('a connection that connects again is left when it has', async () => {
  const kernel = new Connection();
  const asked = act(kernel.kernels, 'a', 'load');
  await vi.advanceTimersByTimeAsync(0);
  kernel.say('iopub', 'status', 'first');
  kernel.say('iopub', 'status', 'server');
  kernel.change('connecting');
  await asked;
  await vi.advanceTimersByTimeAsync(1000);
  expect(kernel.dispose).not.toHaveBeenCalled();
  kernel.change('connected');
  await vi.advanceTimersByTimeAsync(1);
  await expectLeft(kernel);
});
