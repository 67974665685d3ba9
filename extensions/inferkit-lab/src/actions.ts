import {
  KernelMessage,
  ServerConnection,
  type Kernel
} from '@jupyterlab/services';
import type { JSONObject } from '@lumino/coreutils';
import { answerOf, asked, failureOf, refusal, type Evaluated } from './answers';
import type { Answer } from './schema';
import { messageOf } from './watch';

const PATIENCE = 10_000; // milliseconds until a server is held to be gone
const STARTING = 60_000; // until a kernel is held to be gone, which may have begun just now
const GONE =
  'The server lists no such kernel: it no longer runs, or a gateway does not tell what runs.';
const SILENT = 'The Jupyter server does not answer.';
const ENDED = 'The kernel has ended or was restarted meanwhile.';

/**
 * Have a kernel do something: see inferkit/notebook/actions.py.
 *
 * On a subshell where the kernel has them, so that it is done while a cell runs, and over a
 * connection of its own, so that the notebook's sees nothing of it.
 *
 * @returns The kernel's answer; what went wrong is in it.
 */
export async function act(
  kernels: Kernel.IManager,
  kernelId: string,
  name: string,
  given: JSONObject = {}
): Promise<Answer> {
  let kernel: Kernel.IKernelConnection | null = null;
  try {
    const model = await soon(kernels.findById(kernelId));
    if (!model) {
      return refusal(GONE);
    }
    kernel = kernels.connectTo({ model, handleComms: false });
    return await Promise.race([
      ask(kernel, name, given),
      lost(kernel),
      replaced(kernel)
    ]);
  } catch (error) {
    const gone = error instanceof ServerConnection.NetworkError;
    return refusal(gone ? SILENT : messageOf(error));
  } finally {
    if (kernel) {
      void leave(kernel);
    }
  }
}

/** Dispose of a connection, but not while it connects again, which JupyterLab throws an error for. */
async function leave(kernel: Kernel.IKernelConnection): Promise<void> {
  await new Promise(resolve => setTimeout(resolve)); // it may be about to begin
  const settled = [status(kernel, 'connected'), status(kernel, 'disconnected')];
  await soon(Promise.race(settled)).catch(() => undefined);
  kernel.dispose();
}

/** What is promised, or an error where it does not come while a person would wait. */
function soon<T>(
  promised: Promise<T>,
  patience = PATIENCE,
  otherwise = SILENT
): Promise<T> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      reject(new Error(otherwise));
    }, patience);
    promised.then(resolve, reject).finally(() => {
      clearTimeout(timer);
    });
  });
}

/** Waits until a connection is in a state. */
function status(
  kernel: Kernel.IKernelConnection,
  wanted: Kernel.ConnectionStatus
): Promise<void> {
  return new Promise(resolve => {
    const look = (): void => {
      if (kernel.connectionStatus === wanted) {
        kernel.connectionStatusChanged.disconnect(look);
        resolve();
      }
    };
    kernel.connectionStatusChanged.connect(look);
    look();
  });
}

/** Fails when a connection that there was is given up. */
async function lost(kernel: Kernel.IKernelConnection): Promise<never> {
  await status(kernel, 'disconnected');
  throw new Error('The connection to the kernel was lost.');
}

/**
 * Fails when a kernel's process is another one. Of a restart that was asked for over another
 * connection JupyterLab tells this one nothing; but each process has a session of its own.
 */
function replaced(kernel: Kernel.IKernelConnection): Promise<never> {
  return new Promise((_, reject) => {
    let session = '';
    kernel.anyMessage.connect((_, { msg: { channel, header }, direction }) => {
      // The server sends outputs of its own, but a status only where the kernel ends.
      const its = channel !== 'iopub' || header.msg_type === 'status';
      if (direction === 'recv' && its) {
        session ||= header.session;
        if (header.session !== session) {
          reject(new Error(ENDED));
        }
      }
    });
  });
}

/**
 * Have work done with a subshell, which is there for that long; with null where the kernel has no
 * subshells, so that the work waits for the cell that runs.
 */
export async function onSubshell<T>(
  kernel: Kernel.IKernelConnection,
  work: (subshell: string | null) => Promise<T>
): Promise<T> {
  await soon(status(kernel, 'connected'));
  const info = await soon(
    control<KernelMessage.IInfoReply>(kernel, 'kernel_info_request'),
    STARTING,
    'The kernel does not answer.'
  );
  if (info.language_info.name !== 'python') {
    throw new Error('inferkit runs in Python kernels only.');
  }
  if (!info.supported_features?.includes('kernel subshells')) {
    return await work(null);
  }
  const made = await control<{ subshell_id: string }>(
    kernel,
    'create_subshell_request'
  );
  try {
    return await work(made.subshell_id);
  } finally {
    if (kernel.connectionStatus === 'connected') {
      const gone = control(kernel, 'delete_subshell_request', { ...made });
      await soon(gone).catch(() => undefined); // a kernel that has ended has none left
    }
  }
}

/** Send code to a subshell, or to the main shell; nothing else of the connection's goes there. */
export function execute(
  kernel: Kernel.IKernelConnection,
  subshell: string | null,
  content: KernelMessage.IExecuteRequestMsg['content']
): Kernel.IShellFuture<
  KernelMessage.IExecuteRequestMsg,
  KernelMessage.IExecuteReplyMsg
> {
  const former = kernel.subshellId;
  kernel.subshellId = subshell;
  try {
    return kernel.requestExecute(content);
  } finally {
    kernel.subshellId = former;
  }
}

/** Ask on the control channel, which a kernel answers while a cell runs. */
async function control<T>(
  kernel: Kernel.IKernelConnection,
  msgType: string,
  content: JSONObject = {}
): Promise<T> {
  const message = KernelMessage.createMessage({
    // Of these types, one is known to be of the shell's channel alone.
    msgType: msgType as 'create_subshell_request',
    channel: 'control',
    session: kernel.clientId,
    username: kernel.username,
    content
  });
  const future = kernel.sendControlMessage(message, true);
  const reply = await replyTo(future);
  return reply.content as unknown as T;
}

/**
 * The reply to a message, without what a future waits for besides: that the kernel tells that it is
 * idle, under which message it does not say reliably where several threads tell so at once.
 */
export function replyTo<T extends KernelMessage.IMessage>(future: {
  onReply: (reply: T) => void | PromiseLike<void>;
  readonly done: Promise<unknown>;
}): Promise<T> {
  return new Promise((resolve, reject) => {
    future.onReply = resolve;
    future.done.catch(() => {
      reject(new Error(ENDED));
    });
  });
}

async function ask(
  kernel: Kernel.IKernelConnection,
  name: string,
  given: JSONObject
): Promise<Answer> {
  return answerOf(await evaluate(kernel, asked(name, given)));
}

/** Have a kernel evaluate expressions, and leave no trace in the notebook. */
export function evaluate(
  kernel: Kernel.IKernelConnection,
  expressions: JSONObject
): Promise<Record<string, Evaluated>> {
  return onSubshell(kernel, async subshell => {
    const future = execute(kernel, subshell, {
      code: '',
      silent: true,
      store_history: false,
      allow_stdin: false,
      user_expressions: expressions
    });
    const { content } = await replyTo<KernelMessage.IExecuteReplyMsg>(future);
    if (content.status !== 'ok') {
      throw new Error(failureOf(content));
    }
    return content.user_expressions as unknown as Record<string, Evaluated>;
  });
}
