import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';
import type { State } from './schema';

/** The version of the format that this extension reads; see inferkit/lab/schema.py. */
export const VERSION = 1;

const PATIENCE = 10_000; // milliseconds

/** Ask the Jupyter server what all kernels are doing. */
export async function fetchState(
  settings: ServerConnection.ISettings
): Promise<State> {
  const url = URLExt.join(settings.baseUrl, 'inferkit/api/state');
  let response: Response;
  try {
    // One that hangs must be said to.
    const signal = AbortSignal.timeout(PATIENCE);
    response = await ServerConnection.makeRequest(url, { signal }, settings);
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
  return checked((await response.json()) as State);
}

/** A state, if it is one that this extension can read. */
export function checked(state: State): State {
  if (state.version !== VERSION) {
    const older = state.version < VERSION;
    throw new Error(
      `The server's inferkit is ${state.inferkit}, ${older ? 'older' : 'newer'} than what this ` +
        `page was loaded with: ${older ? 'restart the server' : 'reload the page'}.`
    );
  }
  return state;
}
