// Made by `jlpm types` from inferkit/lab/schemas/state-1.json: change inferkit/lab/schema.py.

/**
 * All that travels between the library and the extension, for the schema.
 */
export interface Report {
  state: State;
  answer: Answer;
}
/**
 * The answer to ``GET inferkit/api/state``, and what ``inferkit ps --json`` prints.
 *
 * Attributes:
 *     version: Of the format.
 *     inferkit: The library's version where this was read.
 *     time: When it was read.
 *     devices: Accelerators first, the CPU last.
 *     kernels: In the order of their ids.
 *     out_of_sight: Ids of kernels that run on another machine, or in another container.
 */
export interface State {
  version: number;
  inferkit: string;
  time: number;
  devices: Attached[];
  kernels: Kernel[];
  out_of_sight: string[];
}
/**
 * A device of this machine.
 *
 * Attributes:
 *     name: "cpu", or what the first kernel on it calls it.
 *     description: What the maker calls it.
 *     total: Its memory.
 *     used: What of it is in use, whoever uses it.
 *     utilization: How busy it is, in percent; None if unknown.
 *     kernels: What of the memory is a kernel's; the rest is some other program's.
 */
export interface Attached {
  name: string;
  description: string;
  total: number;
  used: number;
  utilization: number | null;
  kernels: Share[];
}
/**
 * What a kernel holds of a device's memory.
 */
export interface Share {
  kernel_id: string;
  used: number;
}
/**
 * A kernel with inferkit.
 *
 * Attributes:
 *     kernel_id: Jupyter's id.
 *     pid: Its process.
 *     inferkit: The library's version in it.
 *     here: Whether the server that answers has started it, so that it can be reached by it.
 *     memory: What its process has in the machine's memory.
 *     state: Its file, as it is; None where it is of another version than the reader's.
 *     problem: Why there is no state, and what to do about it; "" where there is one.
 */
export interface Kernel {
  kernel_id: string;
  pid: number;
  inferkit: string;
  here: boolean;
  memory: number;
  state: KernelState | null;
  problem: string;
}
/**
 * A kernel's file.
 *
 * Attributes:
 *     written: When.
 *     notebook: The path of the notebook that the kernel was started for; "" if unknown.
 *     models: Those that are loaded, in the order of loading.
 *     devices: Those that they are on.
 *     work: What is being done, in the order of beginning.
 *     actions: Names of what `inferkit.notebook.actions` can do in this kernel.
 *     experiment: The name of the experiment that was recorded last, or is being; or None.
 *     recording: Whether it is being recorded.
 */
export interface KernelState {
  version: number;
  inferkit: string;
  kernel_id: string;
  pid: number;
  started: number;
  host: string;
  written: number;
  notebook: string;
  models: ModelState[];
  devices: OnDevice[];
  work: Work[];
  actions: string[];
  experiment: string | null;
  recording: boolean;
}
/**
 * A loaded model.
 *
 * Attributes:
 *     name: What the kernel calls it.
 *     ref: What it was loaded by.
 *     state: "running" while it has requests; "stopped" where its engine has failed.
 *     devices: Their names.
 *     dtype: What it runs in.
 *     quantization: The mode.
 *     modes: Those that it can be in; its own alone where it is stored quantized.
 *     batching: The policy.
 *     max_batch: Most requests that run at once.
 *     context: Most tokens of prompt and output together.
 *     fallback: Why requests run one at a time whatever the policy, or None.
 *     step: How decode steps are run.
 *     memory: Weights and KV cache per device.
 *     running: Requests that run.
 *     waiting: Requests that wait.
 *     rate: Output tokens per second now.
 *     itl: Median gap between tokens in the ten seconds up to the latest one, as far as they were
 *         in this mode; None without one.
 *     itl_p99: The 99th percentile of these gaps.
 *     ttft: Time to the first token of the latest request that has one; None if that ran in
 *         another mode.
 *     history: The last minute; None without a token in it.
 */
export interface ModelState {
  name: string;
  ref: string;
  state: 'ready' | 'running' | 'stopped';
  devices: string[];
  dtype: string;
  quantization: string;
  modes: string[];
  batching: 'continuous' | 'off' | 'static';
  max_batch: number;
  context: number;
  fallback: string | null;
  step: string;
  memory: {
    [k: string]: number;
  };
  running: number;
  waiting: number;
  rate: number;
  itl: number | null;
  itl_p99: number | null;
  ttft: number | null;
  history: History | null;
}
/**
 * The last minute of a model, in steps of equal length; the last step ends at ``end``.
 *
 * Attributes:
 *     end: When the last step ends.
 *     seconds: The length of a step.
 *     itl: Median gap between tokens in each step; None without one.
 *     ttft: Median time to the first token of the requests that began to answer in it.
 *     tokens: Tokens that came in it.
 */
export interface History {
  end: number;
  seconds: number;
  /**
   * @maxItems 1000
   */
  itl: (number | null)[];
  /**
   * @maxItems 1000
   */
  ttft: (number | null)[];
  /**
   * @maxItems 1000
   */
  tokens: number[];
}
/**
 * A device, as a kernel with models on it sees it.
 *
 * Attributes:
 *     name: What the kernel calls it: "cuda:0", "mps", "cpu".
 *     uuid: The driver's name for a GPU, the same in all kernels; "" where there is none.
 *     description: What the maker calls it.
 *     total: Its memory.
 *     free: What of it was free when this was written.
 *     own: What the kernel's process holds of an accelerator's; 0 for the CPU, where the system
 *         tells.
 */
export interface OnDevice {
  name: string;
  uuid: string;
  description: string;
  total: number;
  free: number;
  own: number;
}
/**
 * What a click has the kernel do that takes a while.
 *
 * Attributes:
 *     what: In words.
 *     done: Steps that are done.
 *     total: All steps, where that is known.
 *     id: What `cancel` is given to end it; 0 where it cannot be ended.
 */
export interface Work {
  what: string;
  done: number;
  total: number | null;
  id: number;
}
/**
 * What an action in a kernel gives: see `inferkit.notebook.actions`.
 *
 * Attributes:
 *     ok: Whether it was done.
 *     text: What was done, or what went wrong, in a sentence for a person.
 *     kind: The name of the error's class; "" without one.
 *     link: An address to be opened, where the action gives one.
 *     code: A cell's text, where the action gives one.
 *     notes: What else a person should know.
 *     details: For whoever looks into an error: where it was raised.
 */
export interface Answer {
  ok: boolean;
  text: string;
  kind: string;
  link: string;
  code: string;
  notes: string[];
  details: string;
}

export const shapes = {
  Report: {"type":"object","required":["state","answer"],"properties":{"state":{"$ref":"#/$defs/State"},"answer":{"$ref":"#/$defs/Answer"}}},
  State: {"type":"object","required":["version","inferkit","time","devices","kernels","out_of_sight"],"properties":{"version":{"type":"integer"},"inferkit":{"type":"string"},"time":{"type":"number"},"devices":{"type":"array","items":{"$ref":"#/$defs/Attached"}},"kernels":{"type":"array","items":{"$ref":"#/$defs/Kernel"}},"out_of_sight":{"type":"array","items":{"type":"string"}}}},
  Attached: {"type":"object","required":["name","description","total","used","utilization","kernels"],"properties":{"name":{"type":"string"},"description":{"type":"string"},"total":{"type":"integer"},"used":{"type":"integer"},"utilization":{"anyOf":[{"type":"number"},{"type":"null"}]},"kernels":{"type":"array","items":{"$ref":"#/$defs/Share"}}}},
  Share: {"type":"object","required":["kernel_id","used"],"properties":{"kernel_id":{"type":"string"},"used":{"type":"integer"}}},
  Kernel: {"type":"object","required":["kernel_id","pid","inferkit","here","memory","state","problem"],"properties":{"kernel_id":{"type":"string"},"pid":{"type":"integer"},"inferkit":{"type":"string"},"here":{"type":"boolean"},"memory":{"type":"integer"},"state":{"anyOf":[{"$ref":"#/$defs/KernelState"},{"type":"null"}]},"problem":{"type":"string"}}},
  KernelState: {"type":"object","required":["version","inferkit","kernel_id","pid","started","host","written","notebook","models","devices","work","actions","experiment","recording"],"properties":{"version":{"type":"integer"},"inferkit":{"type":"string"},"kernel_id":{"type":"string"},"pid":{"type":"integer","minimum":0,"maximum":9007199254740992},"started":{"type":"number"},"host":{"type":"string","default":""},"written":{"type":"number"},"notebook":{"type":"string"},"models":{"type":"array","items":{"$ref":"#/$defs/ModelState"}},"devices":{"type":"array","items":{"$ref":"#/$defs/OnDevice"}},"work":{"type":"array","items":{"$ref":"#/$defs/Work"}},"actions":{"type":"array","items":{"type":"string"}},"experiment":{"anyOf":[{"type":"string"},{"type":"null"}]},"recording":{"type":"boolean","default":false}}},
  ModelState: {"type":"object","required":["name","ref","state","devices","dtype","quantization","modes","batching","max_batch","context","fallback","step","memory","running","waiting","rate","itl","itl_p99","ttft","history"],"properties":{"name":{"type":"string"},"ref":{"type":"string"},"state":{"enum":["ready","running","stopped"]},"devices":{"type":"array","items":{"type":"string"}},"dtype":{"type":"string"},"quantization":{"type":"string"},"modes":{"type":"array","items":{"type":"string"}},"batching":{"enum":["continuous","off","static"]},"max_batch":{"type":"integer","minimum":0,"maximum":9007199254740992},"context":{"type":"integer","minimum":0,"maximum":9007199254740992},"fallback":{"anyOf":[{"type":"string"},{"type":"null"}]},"step":{"type":"string"},"memory":{"type":"object","additionalProperties":{"type":"integer","minimum":0,"maximum":9007199254740992}},"running":{"type":"integer","minimum":0,"maximum":9007199254740992},"waiting":{"type":"integer","minimum":0,"maximum":9007199254740992},"rate":{"type":"number","minimum":0,"maximum":1000000000000},"itl":{"anyOf":[{"type":"number","minimum":0,"maximum":1000000000000},{"type":"null"}]},"itl_p99":{"anyOf":[{"type":"number","minimum":0,"maximum":1000000000000},{"type":"null"}]},"ttft":{"anyOf":[{"type":"number","minimum":0,"maximum":1000000000000},{"type":"null"}]},"history":{"anyOf":[{"$ref":"#/$defs/History"},{"type":"null"}]}}},
  History: {"type":"object","required":["end","seconds","itl","ttft","tokens"],"properties":{"end":{"type":"number"},"seconds":{"type":"number","exclusiveMinimum":0},"itl":{"type":"array","items":{"anyOf":[{"type":"number","minimum":0,"maximum":1000000000000},{"type":"null"}]},"maxItems":1000},"ttft":{"type":"array","items":{"anyOf":[{"type":"number","minimum":0,"maximum":1000000000000},{"type":"null"}]},"maxItems":1000},"tokens":{"type":"array","items":{"type":"integer","minimum":0,"maximum":9007199254740992},"maxItems":1000}}},
  OnDevice: {"type":"object","required":["name","uuid","description","total","free","own"],"properties":{"name":{"type":"string"},"uuid":{"type":"string"},"description":{"type":"string"},"total":{"type":"integer","minimum":0,"maximum":9007199254740992},"free":{"type":"integer","minimum":0,"maximum":9007199254740992},"own":{"type":"integer","minimum":0,"maximum":9007199254740992}}},
  Work: {"type":"object","required":["what","done","total","id"],"properties":{"what":{"type":"string"},"done":{"type":"integer","minimum":0,"maximum":9007199254740992,"default":0},"total":{"anyOf":[{"type":"integer","minimum":0,"maximum":9007199254740992},{"type":"null"}],"default":null},"id":{"type":"integer","minimum":0,"maximum":9007199254740992,"default":0}}},
  Answer: {"type":"object","required":["ok","text","kind","link","code","notes","details"],"properties":{"ok":{"type":"boolean"},"text":{"type":"string"},"kind":{"type":"string","default":""},"link":{"type":"string","default":""},"code":{"type":"string","default":""},"notes":{"type":"array","items":{"type":"string"},"default":[]},"details":{"type":"string","default":""}}}
} as const;
