import type { JSONObject, JSONValue } from '@lumino/coreutils';
import type { Answer } from './schema';

const JSON_TYPE = 'application/json';

/** The expression that has a kernel tell its inferkit's version, for `lackOf`. */
export const VERSION = expression('importlib.metadata', 'version', [
  'jupyter-inferkit'
]);

/** The first version of inferkit that a kernel must have. */
export const NEEDED = '0.1.0';

/** The expressions that have a kernel do something, for `answerOf`. */
export function asked(name: string, given: JSONObject): JSONObject {
  return {
    answer: expression('inferkit.notebook.actions', 'do', [name], given),
    version: VERSION
  };
}

/** What a kernel gives for a user expression. */
export interface Evaluated {
  status: string;
  data?: Record<string, JSONValue>;
  ename?: string;
  evalue?: string;
}

/** The name of an interrupt, which has no message. */
export const INTERRUPT = 'KeyboardInterrupt';

/** The answer, or why there is none: for one, because the kernel's inferkit is too old. */
export function answerOf(found: Record<string, Evaluated>): Answer {
  const { answer, version } = found;
  const told = answer?.data?.[JSON_TYPE];
  if (told !== undefined) {
    return told as unknown as Answer;
  }
  const ended = [answer, version].find(one => one?.ename === INTERRUPT);
  if (ended) {
    return refusal(failureOf(ended));
  }
  return refusal(
    lackOf(answer, version) ||
      `${answer?.ename ?? 'Error'}: ${answer?.evalue ?? ''}`
  );
}

/** What a kernel that failed lacks: inferkit, or a later one; '' where it is something else. */
export function lackOf(
  failed: Evaluated | undefined,
  version: Evaluated | undefined
): string {
  if (!lacksModule(failed)) {
    return '';
  }
  if (version?.status !== 'ok') {
    return (
      "inferkit is not installed in this kernel's environment: run `%pip install " +
      'jupyter-inferkit` in the notebook, and restart its kernel.'
    );
  }
  const shown = version.data?.['text/plain'];
  const own = typeof shown === 'string' ? shown.replace(/['"]/g, '') : '';
  return (
    `This kernel has inferkit ${own}, and ${NEEDED} or later with the JupyterLab extension is ` +
    'needed: upgrade jupyter-inferkit in its environment, and restart it.'
  );
}

/** Whether a kernel has failed for want of a module, or of something in one. */
export function lacksModule(failed: Evaluated | undefined): boolean {
  return (
    failed?.ename === 'ModuleNotFoundError' || failed?.ename === 'ImportError'
  );
}

/** Why a kernel has not done what it was asked. */
export function failureOf({ status, ename, evalue }: Evaluated): string {
  if (status !== 'error') {
    // A kernel without subshells drops what waits for a cell, where that fails.
    return 'The cell that ran before failed or was interrupted.';
  }
  return ename === INTERRUPT
    ? 'The kernel was interrupted.'
    : evalue || ename || 'Error';
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

/** What is said without a kernel's answer. */
export function refusal(text: string): Answer {
  return {
    ok: false,
    text,
    kind: 'Refused',
    link: '',
    code: '',
    notes: [],
    details: ''
  };
}
