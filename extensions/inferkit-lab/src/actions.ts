import type { Kernel } from '@jupyterlab/services';
import type { JSONObject, JSONValue } from '@lumino/coreutils';
import type { Answer } from './schema';

const JSON_TYPE = 'application/json';
const VERSION = expression('importlib.metadata', 'version', [
  'jupyter-inferkit'
]);

/** The first version of inferkit that a kernel must have. */
export const NEEDED = '0.1.0';

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
    const info = await kernel.info;
    if (info.language_info.name !== 'python') {
      return refusal('inferkit runs in Python kernels only.');
    }
    return await onSubshell(kernel, () => ask(kernel, name, given));
  } catch (error) {
    return refusal(
      `The kernel gave no answer: ${error instanceof Error ? error.message : String(error)}`
    );
  } finally {
    kernel.dispose();
  }
}

async function onSubshell<T>(
  kernel: Kernel.IKernelConnection,
  work: () => Promise<T>
): Promise<T> {
  if (!kernel.supportsSubshells) {
    return await work(); // once the cell that runs is done
  }
  const made = await kernel.requestCreateSubshell({}).done;
  const { subshell_id } = made.content;
  kernel.subshellId = subshell_id;
  try {
    return await work();
  } finally {
    if (!kernel.isDisposed && kernel.connectionStatus === 'connected') {
      await kernel.requestDeleteSubshell({ subshell_id }).done;
    }
  }
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
    user_expressions: {
      answer: expression('inferkit.notebook.actions', 'do', [name], given),
      version: VERSION
    }
  });
  const { content } = await future.done;
  if (content.status !== 'ok') {
    return refusal('The kernel was interrupted.');
  }
  return answerOf(
    content.user_expressions as unknown as Record<string, Evaluated>
  );
}

/** What a kernel gives for a user expression. */
export interface Evaluated {
  status: string;
  data?: Record<string, JSONValue>;
  ename?: string;
  evalue?: string;
}

/** The answer, or why there is none: for one, because the kernel's inferkit is too old. */
export function answerOf(found: Record<string, Evaluated>): Answer {
  const { answer, version } = found;
  const told = answer?.data?.[JSON_TYPE];
  if (told !== undefined) {
    return told as unknown as Answer;
  }
  if (version?.status !== 'ok') {
    return refusal(
      "inferkit is not installed in this kernel's environment: run `%pip install " +
        'jupyter-inferkit` in the notebook, and restart its kernel.'
    );
  }
  const shown = version.data?.['text/plain'];
  const own = typeof shown === 'string' ? shown.replace(/['"]/g, '') : '';
  if (
    answer?.ename === 'ModuleNotFoundError' ||
    answer?.ename === 'ImportError'
  ) {
    return refusal(
      `This kernel has inferkit ${own}, and ${NEEDED} or later with the JupyterLab extension is ` +
        'needed: upgrade jupyter-inferkit in its environment, and restart it.'
    );
  }
  return refusal(`${answer?.ename ?? 'Error'}: ${answer?.evalue ?? ''}`);
}

/** Python that calls a function of a module; strings of JSON are strings of Python. */
export function expression(
  module: string,
  name: string,
  args: string[],
  keywords: JSONObject = {}
): string {
  const written = args.map(arg => JSON.stringify(arg));
  if (Object.keys(keywords).length > 0) {
    const json = JSON.stringify(JSON.stringify(keywords));
    written.push(`**__import__("json").loads(${json})`);
  }
  return `__import__("${module}", fromlist=["${name}"]).${name}(${written.join(', ')})`;
}

function refusal(text: string): Answer {
  return { ok: false, text, kind: 'Refused', link: '', code: '', notes: [] };
}
