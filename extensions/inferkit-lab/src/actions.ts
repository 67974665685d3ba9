import { KernelMessage, type Kernel } from '@jupyterlab/services';
import type { JSONObject } from '@lumino/coreutils';
import { answerOf, asked, refusal, type Evaluated } from './answers';
import type { Answer } from './schema';

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
  const model = await kernels.findById(kernelId);
  if (!model) {
    return refusal('This kernel no longer runs.');
  }
  const kernel = kernels.connectTo({ model, handleComms: false });
  try {
    await connected(kernel);
    const info = await control<KernelMessage.IInfoReply>(
      kernel,
      'kernel_info_request'
    );
    if (info.language_info.name !== 'python') {
      return refusal('inferkit runs in Python kernels only.');
    }
    if (!info.supported_features?.includes('kernel subshells')) {
      return await ask(kernel, name, given); // once the cell that runs is done
    }
    const made = await control<{ subshell_id: string }>(
      kernel,
      'create_subshell_request'
    );
    kernel.subshellId = made.subshell_id;
    try {
      return await ask(kernel, name, given);
    } finally {
      kernel.subshellId = null; // or the connection would delete it again
      if (kernel.connectionStatus === 'connected') {
        await control(kernel, 'delete_subshell_request', { ...made });
      }
    }
  } catch (error) {
    return refusal(
      `The kernel gave no answer: ${error instanceof Error ? error.message : String(error)}`
    );
  } finally {
    kernel.dispose();
  }
}

/** Waits until messages can be sent. */
function connected(kernel: Kernel.IKernelConnection): Promise<void> {
  return new Promise((resolve, reject) => {
    const look = (): void => {
      if (kernel.connectionStatus === 'connected') {
        resolve();
      } else if (kernel.connectionStatus === 'disconnected') {
        reject(new Error('it cannot be reached.'));
      }
    };
    kernel.connectionStatusChanged.connect(look);
    look();
  });
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
function replyTo<T extends KernelMessage.IMessage>(future: {
  onReply: (reply: T) => void | PromiseLike<void>;
  readonly done: Promise<unknown>;
}): Promise<T> {
  return new Promise((resolve, reject) => {
    future.onReply = resolve;
    future.done.catch(reject); // the kernel was restarted, or has died
  });
}

async function ask(
  kernel: Kernel.IKernelConnection,
  name: string,
  given: JSONObject
): Promise<Answer> {
  const future = kernel.requestExecute({
    code: '',
    silent: true,
    store_history: false,
    allow_stdin: false,
    user_expressions: asked(name, given)
  });
  const { content } = await replyTo<KernelMessage.IExecuteReplyMsg>(future);
  if (content.status !== 'ok') {
    return refusal('The kernel was interrupted.');
  }
  return answerOf(
    content.user_expressions as unknown as Record<string, Evaluated>
  );
}
