import type { Kernel, ModelState, State } from '../src/schema';

/** A model as a kernel tells it. */
export function model(changes: Partial<ModelState> = {}): ModelState {
  return {
    name: 'demo',
    ref: 'demo',
    state: 'ready',
    devices: ['cpu'],
    dtype: 'bfloat16',
    quantization: 'none',
    modes: ['none', 'nf4'],
    batching: 'continuous',
    max_batch: 16,
    context: 4096,
    fallback: null,
    step: 'eager',
    memory: { cpu: 2 ** 30 },
    running: 0,
    waiting: 0,
    rate: 0,
    itl: null,
    itl_p99: null,
    ttft: null,
    history: null,
    ...changes
  };
}

/** A kernel with these models. */
export function kernel(id: string, ...models: ModelState[]): Kernel {
  return {
    kernel_id: id,
    pid: 1,
    inferkit: '1.0',
    here: true,
    memory: 2 ** 30,
    problem: '',
    state: {
      version: 1,
      inferkit: '1.0',
      kernel_id: id,
      pid: 1,
      started: 0,
      host: 'here',
      written: 0,
      notebook: `folder/${id}.ipynb`,
      models,
      devices: [],
      work: [],
      actions: ['share'],
      experiment: null,
      recording: false
    }
  };
}

/** All of them, on a CPU. */
export function state(...kernels: Kernel[]): State {
  return {
    version: 1,
    inferkit: '1.0',
    time: 1000,
    devices: [
      {
        name: 'cpu',
        description: 'A processor',
        total: 16 * 2 ** 30,
        used: 8 * 2 ** 30,
        utilization: 50,
        kernels: kernels.map(({ kernel_id }) => ({
          kernel_id,
          used: 2 ** 30
        }))
      }
    ],
    kernels,
    out_of_sight: []
  };
}
