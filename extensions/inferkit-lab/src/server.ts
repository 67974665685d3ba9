import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';
import { shapes, type State } from './schema';

/** The version of the format that this extension reads; see inferkit/lab/schema.py. */
export const VERSION = 1;

const PATIENCE = 10_000; // milliseconds

/** As much of JSON Schema as the state's is made of. */
interface Shape {
  readonly $ref?: string;
  readonly anyOf?: readonly Shape[];
  readonly enum?: readonly unknown[];
  readonly type?: string;
  readonly items?: Shape;
  readonly required?: readonly string[];
  readonly properties?: Readonly<Record<string, Shape>>;
}

const SHAPES: Readonly<Record<string, Shape>> = shapes;

/** Ask the Jupyter server what all kernels are doing. */
export async function fetchState(
  settings: ServerConnection.ISettings
): Promise<State> {
  const url = URLExt.join(settings.baseUrl, 'inferkit/api/state');
  let response: Response;
  let text: string;
  try {
    // One that hangs must be said to.
    const signal = AbortSignal.timeout(PATIENCE);
    response = await ServerConnection.makeRequest(url, { signal }, settings);
    text = await response.text();
  } catch {
    throw new Error('The Jupyter server does not answer.');
  }
  if (response.status === 404) {
    throw new Error(
      'This Jupyter server has no inferkit: install jupyter-inferkit in its environment, and ' +
        'restart it. `jupyter server extension list` shows inferkit.lab then.'
    );
  }
  if (!response.ok) {
    throw new Error(
      `The Jupyter server answers ${response.status} ${response.statusText}.`
    );
  }
  return checked(parsed(text));
}

/** What a text is the JSON of; nothing where it is none. */
function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** A state, if it is one that this extension can read. */
export function checked(answer: unknown): State {
  const { version, inferkit } = (answer ?? {}) as Partial<State>;
  if (version === undefined) {
    throw new Error(
      "The answer is not that of inferkit's server, but perhaps a page to log in: reload the page."
    );
  }
  if (version !== VERSION || !follows(answer, shapes.State)) {
    // What is added keeps the version: where something is lacking, the server is older.
    const newer = version > VERSION;
    throw new Error(
      `The server's inferkit is ${inferkit ?? 'unknown'}, ${newer ? 'newer' : 'older'} than what ` +
        `this page was loaded with: ${newer ? 'reload the page' : 'restart the server'}.`
    );
  }
  return answer as State;
}

/** Whether a value has what a shape says; it may have more. */
function follows(value: unknown, shape: Shape = {}): boolean {
  if (shape.$ref) {
    return follows(value, SHAPES[shape.$ref.replace('#/$defs/', '')]);
  }
  if (shape.anyOf) {
    return shape.anyOf.some(one => follows(value, one));
  }
  if (shape.enum) {
    return shape.enum.includes(value);
  }
  switch (shape.type) {
    case 'array':
      return (
        Array.isArray(value) && value.every(one => follows(one, shape.items))
      );
    case 'object':
      return (
        isObject(value) &&
        (shape.required ?? []).every(name =>
          follows(value[name], shape.properties?.[name])
        )
      );
    case 'null':
      return value === null;
    case 'integer':
      return typeof value === 'number';
    default:
      return typeof value === shape.type;
  }
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null;
}
