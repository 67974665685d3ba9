import { useEffect, useRef, useState, type JSX } from 'react';
import { refusal } from './answers';
import { bytes, counted, figure, spark } from './figures';
import type {
  Answer,
  Attached,
  Kernel,
  KernelState,
  ModelState,
  State,
  Work
} from './schema';
import { messageOf, type Seen } from './watch';

/** The notebook that is in front, as far as the sidebar has to do with it. */
export interface Current {
  readonly kernelId: string;
  readonly name: string;
}

/** What the sidebar can have done. */
export interface Deeds {
  /** Have a kernel do something; gives its answer. */
  act(
    kernelId: string,
    name: string,
    given?: Record<string, string | number>
  ): Promise<Answer>;
  /** Show a kernel's notebook. */
  open(kernelId: string): void;
  /** Show the panel of a model in a tab. */
  showTab(kernelId: string, model: string): void;
  /** Put the panel into a kernel's notebook. */
  insertPanel(kernelId: string): void;
  /** Put code into a kernel's notebook. */
  insertCode(kernelId: string, code: string): void;
  /** Save the experiment of a kernel, and show the link to it. */
  share(kernelId: string): void;
  /** Make a notebook that is ready for inference. */
  create(): void;
}

export interface SidebarProps {
  readonly seen: Seen;
  readonly current: Current | null;
  /** Names and paths of notebooks by kernel, as the server has them now. */
  readonly notebooks: ReadonlyMap<string, string>;
  readonly deeds: Deeds;
  /** Counts the times that somebody asked for the field to load a model. */
  readonly asked: number;
}

const MANY = 8; // kernels, from which on a filter is of use
const COLORS = 6;

/** All of the sidebar. */
export function Sidebar(props: SidebarProps): JSX.Element {
  const { seen, current, notebooks, deeds } = props;
  const [wanted, setWanted] = useState('');
  const { state, error } = seen;
  if (state === null) {
    return (
      <div className="jp-Inferkit">
        {error ? (
          <Problem text={error} />
        ) : (
          <p className="jp-Inferkit-hint" role="status">
            Looking for models…
          </p>
        )}
      </div>
    );
  }
  const title = (kernel: Kernel): string => titleOf(kernel, notebooks);
  const kernels = [...state.kernels].sort(
    (a, b) =>
      Number(b.kernel_id === current?.kernelId) -
        Number(a.kernel_id === current?.kernelId) ||
      title(a).localeCompare(title(b)) ||
      a.kernel_id.localeCompare(b.kernel_id)
  );
  const shown = kernels.filter(kernel =>
    matches(kernel, title(kernel), wanted)
  );
  const colors = new Map(
    state.kernels.map((kernel, index) => [kernel.kernel_id, index % COLORS])
  );
  const mine = kernels.find(k => k.kernel_id === current?.kernelId);
  return (
    <div className="jp-Inferkit">
      {error && <Problem text={`${error} What is shown is from before.`} />}
      <Devices state={state} colors={colors} title={title} />
      <Loader
        current={current}
        begun={(mine?.state?.work ?? []).length > 0}
        deeds={deeds}
        asked={props.asked}
        first={kernels.length === 0}
      />
      <section aria-label="Models">
        <h3 className="jp-Inferkit-title">
          Models
          <span className="jp-Inferkit-count">
            {kernels.length > 0 && counted(kernels.length, 'kernel')}
          </span>
        </h3>
        {kernels.length > MANY && (
          <input
            className="jp-Inferkit-filter jp-mod-styled"
            type="search"
            placeholder="Filter by notebook or model"
            aria-label="Filter by notebook or model"
            value={wanted}
            onChange={event => {
              setWanted(event.target.value);
            }}
          />
        )}
        {kernels.length === 0 && <Nothing state={state} deeds={deeds} />}
        {kernels.length > 0 && shown.length === 0 && (
          <p className="jp-Inferkit-hint">Nothing is called “{wanted}”.</p>
        )}
        {shown.map(kernel => (
          <KernelView
            key={`${kernel.kernel_id} ${String(kernel.pid)}`}
            kernel={kernel}
            title={title(kernel)}
            current={kernel.kernel_id === current?.kernelId}
            many={kernels.length > MANY}
            hasNotebook={notebooks.has(kernel.kernel_id)}
            color={colors.get(kernel.kernel_id) ?? 0}
            now={state.time}
            deeds={deeds}
          />
        ))}
      </section>
      {state.out_of_sight.length > 0 && <OutOfSight state={state} />}
    </div>
  );
}

function Nothing({
  state,
  deeds
}: {
  state: State;
  deeds: Deeds;
}): JSX.Element {
  if (state.out_of_sight.length > 0) {
    return <></>;
  }
  return (
    <div className="jp-Inferkit-hint">
      <p>
        No kernel has a model. Load one above, or run{' '}
        <code>ik.load("demo")</code> in a notebook: it appears here, whatever
        loads it.
      </p>
      <button
        className="jp-Inferkit-button"
        onClick={() => {
          deeds.create();
        }}
      >
        New inference notebook
      </button>
    </div>
  );
}

function OutOfSight({ state }: { state: State }): JSX.Element {
  const count = state.out_of_sight.length;
  return (
    <p className="jp-Inferkit-hint" role="note">
      {counted(count, 'kernel')} {count === 1 ? 'runs' : 'run'} on another
      machine and {count === 1 ? 'is' : 'are'} out of sight from here. What{' '}
      {count === 1 ? 'it has' : 'they have'} loaded, <code>ik.models()</code>{' '}
      tells in the notebook.
    </p>
  );
}

function Problem({ text }: { text: string }): JSX.Element {
  return (
    <p className="jp-Inferkit-problem" role="alert">
      {text}
    </p>
  );
}

// -- devices --------------------------------------------------------------------------------------

function Devices(props: {
  state: State;
  colors: ReadonlyMap<string, number>;
  title: (kernel: Kernel) => string;
}): JSX.Element {
  const names = new Map(
    props.state.kernels.map(kernel => [kernel.kernel_id, props.title(kernel)])
  );
  return (
    <section aria-label="Devices">
      <h3 className="jp-Inferkit-title">Devices</h3>
      {props.state.devices.map((device, index) => (
        <Device
          key={`${device.name} ${index}`}
          device={device}
          colors={props.colors}
          names={names}
        />
      ))}
    </section>
  );
}

function Device(props: {
  device: Attached;
  colors: ReadonlyMap<string, number>;
  names: ReadonlyMap<string, string>;
}): JSX.Element {
  const { device, colors, names } = props;
  const ours = device.kernels.reduce((sum, share) => sum + share.used, 0);
  const other = Math.max(0, device.used - ours);
  const percent = (part: number): string =>
    `${device.total > 0 ? (100 * part) / device.total : 0}%`;
  const parts = [
    ...device.kernels.map(
      share =>
        `${names.get(share.kernel_id) ?? 'a kernel'} ${bytes(share.used)}`
    ),
    `other ${bytes(other)}`,
    `free ${bytes(Math.max(0, device.total - device.used))}`
  ];
  const busy =
    device.utilization === null
      ? ''
      : `${device.utilization.toFixed(0)} % busy`;
  return (
    <div className="jp-Inferkit-device">
      <div className="jp-Inferkit-row jp-Inferkit-head">
        <b>{device.name}</b>
        <span
          className="jp-Inferkit-soft jp-Inferkit-cut"
          title={device.description}
        >
          {device.description}
        </span>
        <span className="jp-Inferkit-soft jp-Inferkit-end">{busy}</span>
      </div>
      <div
        className="jp-Inferkit-bar"
        role="img"
        aria-label={`Memory of ${device.name}: ${parts.join(', ')}`}
        title={parts.join('\n')}
      >
        {device.kernels.map(share => (
          <span
            key={share.kernel_id}
            className="jp-Inferkit-share"
            data-color={colors.get(share.kernel_id) ?? 0}
            style={{ width: percent(share.used) }}
          />
        ))}
        <span
          className="jp-Inferkit-share jp-mod-other"
          style={{ width: percent(other) }}
        />
      </div>
      <div className="jp-Inferkit-row jp-Inferkit-soft">
        <span>
          {bytes(device.used)} of {bytes(device.total)}
        </span>
        <span className="jp-Inferkit-key jp-Inferkit-end">
          <i className="jp-Inferkit-swatch jp-mod-other" /> other {bytes(other)}
        </span>
      </div>
    </div>
  );
}

// -- loading --------------------------------------------------------------------------------------

function Loader(props: {
  current: Current | null;
  /** Whether the kernel shows what it does. */
  begun: boolean;
  deeds: Deeds;
  asked: number;
  first: boolean;
}): JSX.Element {
  const { current, deeds } = props;
  const [open, setOpen] = useState(props.first);
  const [ref, setRef] = useState('demo');
  const [mode, setMode] = useState('none');
  const { pending, answer, run, dismiss } = useAct();
  const box = useRef<HTMLDetailsElement>(null);
  const field = useRef<HTMLInputElement>(null);
  useEffect(() => {
    if (props.asked > 0 && box.current) {
      box.current.open = true; // now, for what is folded up cannot be focused
      field.current?.focus();
      field.current?.select();
    }
  }, [props.asked]);
  const into = current?.name ?? '';
  return (
    <details
      ref={box}
      className="jp-Inferkit-loader"
      open={open}
      onToggle={event => {
        setOpen(event.currentTarget.open);
      }}
    >
      <summary>Load a model{current ? ` into ${into}` : ''}</summary>
      {current === null ? (
        <p className="jp-Inferkit-hint">
          Open a notebook: the model is loaded into its kernel.
        </p>
      ) : (
        <form
          onSubmit={event => {
            event.preventDefault();
            const given = { ref: ref.trim(), quantize: mode };
            void run(() => deeds.act(current.kernelId, 'load', given), true);
          }}
        >
          <div className="jp-Inferkit-form">
            <input
              ref={field}
              className="jp-mod-styled"
              aria-label="Model: demo, a hub id, a folder or a .gguf file"
              title="demo, a hub id, a folder or a .gguf file"
              required
              spellCheck={false}
              value={ref}
              onChange={event => {
                setRef(event.target.value);
              }}
            />
            <Choice
              label="Precision to load it in"
              value={mode}
              of={['none', 'int8', 'nf4', 'fp4', 'int8wo', 'int4wo']}
              choose={setMode}
            />
            <button
              className="jp-Inferkit-button jp-mod-main"
              disabled={pending}
            >
              {pending ? 'Loading…' : 'Load'}
            </button>
          </div>
        </form>
      )}
      {pending && !props.begun && (
        <p className="jp-Inferkit-soft" role="status">
          The kernel begins…
        </p>
      )}
      <Told
        answer={answer}
        dismiss={dismiss}
        insert={
          current && answer?.code
            ? () => {
                deeds.insertCode(current.kernelId, answer.code);
              }
            : null
        }
      />
    </details>
  );
}

function Progress(props: {
  work: Work;
  cancel: (() => Promise<Answer>) | null;
}): JSX.Element {
  const { work, cancel } = props;
  const { pending, answer, run, dismiss } = useAct();
  const [asked, setAsked] = useState(false); // and not refused
  return (
    <div className="jp-Inferkit-work" role="status">
      <div className="jp-Inferkit-row">
        <span className="jp-Inferkit-cut jp-Inferkit-grow" title={work.what}>
          {work.what}
        </span>
        {cancel && (
          <button
            className="jp-Inferkit-button jp-mod-small"
            disabled={pending || asked}
            onClick={() => {
              void run(async () => {
                const found = await cancel();
                setAsked(found.ok);
                return found;
              });
            }}
          >
            {pending || asked ? 'Cancelling…' : 'Cancel'}
          </button>
        )}
      </div>
      {/* Without a value it moves to and fro. */}
      <progress
        aria-label={work.what}
        {...(work.total ? { value: work.done, max: work.total } : {})}
      />
      <Told answer={answer} dismiss={dismiss} insert={null} />
    </div>
  );
}

// -- kernels and models ---------------------------------------------------------------------------

interface KernelProps {
  readonly kernel: Kernel;
  readonly title: string;
  readonly current: boolean;
  /** Whether there are so many that all but the current one are folded up. */
  readonly many: boolean;
  readonly hasNotebook: boolean;
  readonly color: number;
  readonly now: number;
  readonly deeds: Deeds;
}

function KernelView(props: KernelProps): JSX.Element {
  const { kernel, title, current, hasNotebook, color, deeds } = props;
  const { pending, answer, run, dismiss } = useAct();
  const [opened, setOpened] = useState(false);
  const folds = props.many && !current;
  const folded = folds && !opened;
  const state = kernel.state;
  const id = kernel.kernel_id;
  const where = kernel.here
    ? `Kernel ${id}, process ${kernel.pid}, inferkit ${kernel.inferkit}`
    : `Process ${kernel.pid}, which another Jupyter or program has started: it can be watched from here, not changed.`;
  return (
    <article className="jp-Inferkit-kernel" aria-label={title} data-kernel={id}>
      <header className="jp-Inferkit-row" title={where}>
        {folds && (
          <button
            className="jp-Inferkit-fold"
            aria-expanded={!folded}
            aria-label={`Models of ${title}`}
            onClick={() => {
              setOpened(!opened);
            }}
          />
        )}
        <i className="jp-Inferkit-swatch" data-color={color} />
        {hasNotebook ? (
          <button
            className="jp-Inferkit-link jp-Inferkit-cut"
            onClick={() => {
              deeds.open(id);
            }}
          >
            {title}
          </button>
        ) : (
          <span className="jp-Inferkit-cut">{title}</span>
        )}
        {current && <span className="jp-Inferkit-badge">current</span>}
        {!kernel.here && <span className="jp-Inferkit-badge">elsewhere</span>}
        <span className="jp-Inferkit-soft jp-Inferkit-end">
          {bytes(kernel.memory)}
        </span>
      </header>
      {kernel.problem && <Problem text={kernel.problem} />}
      {state?.models.length === 0 && state.work.length === 0 && (
        <p className="jp-Inferkit-soft jp-Inferkit-none">No model is loaded.</p>
      )}
      {folded && state && state.models.length > 0 && (
        <p className="jp-Inferkit-soft jp-Inferkit-none jp-Inferkit-cut">
          {state.models
            .map(({ name, state, rate }) =>
              state === 'running'
                ? `${name} ${figure(rate)} tok/s`
                : `${name} ${state}`
            )
            .join(', ')}
        </p>
      )}
      {!folded &&
        state?.models.map(model => (
          <ModelView
            key={model.name}
            model={model}
            kernelId={id}
            here={kernel.here}
            hasNotebook={hasNotebook}
            now={props.now}
            busy={pending}
            deeds={deeds}
            run={run}
          />
        ))}
      {state?.work.map(work => (
        <Progress
          key={work.id || work.what}
          work={work}
          cancel={
            kernel.here && work.id
              ? () => deeds.act(id, 'cancel', { work: work.id })
              : null
          }
        />
      ))}
      {state && kernel.here && canShare(state) && (
        <button
          className="jp-Inferkit-button jp-mod-small jp-Inferkit-shares"
          title={`${state.recording ? 'End the recording, save it' : 'Save it'}, and make the link that opens it on Binder`}
          onClick={() => {
            deeds.share(id);
          }}
        >
          Share experiment “{state.experiment}”
        </button>
      )}
      <Told answer={answer} dismiss={dismiss} insert={null} />
    </article>
  );
}

function canShare(state: KernelState): boolean {
  return state.experiment !== null && state.actions.includes('share');
}

function ModelView(props: {
  model: ModelState;
  kernelId: string;
  here: boolean;
  hasNotebook: boolean;
  now: number;
  busy: boolean;
  deeds: Deeds;
  run: Run;
}): JSX.Element {
  const { model, kernelId, here, deeds, run, busy } = props;
  const memory = Object.entries(model.memory).filter(([, size]) => size > 0);
  const act = (
    name: string,
    given: Record<string, string | number> = {}
  ): void => {
    void run(() => deeds.act(kernelId, name, { model: model.name, ...given }));
  };
  const frozen = !here || busy;
  return (
    <div className="jp-Inferkit-model" data-model={model.name}>
      <div className="jp-Inferkit-row">
        <b className="jp-Inferkit-cut" title={`${model.ref}, ${model.dtype}`}>
          {model.name}
        </b>
        <span className="jp-Inferkit-state" data-state={model.state}>
          {model.state}
        </span>
        <span
          className="jp-Inferkit-soft jp-Inferkit-end"
          title="Weights and KV cache"
        >
          {memory.map(([name, size]) => `${name} ${bytes(size)}`).join(', ')}
        </span>
      </div>
      <Latency model={model} now={props.now} />
      <div className="jp-Inferkit-row jp-Inferkit-modes">
        <Choice
          label={`Precision of ${model.name}`}
          value={model.quantization}
          of={model.modes}
          disabled={frozen || model.modes.length < 2}
          choose={mode => {
            act('quantize', { mode });
          }}
        />
        <Choice
          label={`Batching of ${model.name}`}
          value={model.batching}
          of={['continuous', 'static', 'off']}
          disabled={frozen}
          choose={batching => {
            act('batching', { batching });
          }}
        />
        <Count
          label={`Most requests of ${model.name} at once`}
          value={model.max_batch}
          disabled={frozen}
          choose={max_batch => {
            act('batching', { max_batch });
          }}
        />
      </div>
      {model.fallback && (
        <p className="jp-Inferkit-soft">
          One request at a time: {model.fallback}
        </p>
      )}
      <div className="jp-Inferkit-row">
        <span className="jp-Inferkit-requests">
          {model.running} running, {model.waiting} waiting
        </span>
        <span className="jp-Inferkit-end jp-Inferkit-buttons">
          <Button
            text="Stop"
            title="Stop the requests; what they have is kept"
            disabled={!here || model.running + model.waiting === 0}
            click={() => {
              act('stop');
            }}
          />
          <Button
            text="Panel"
            title="Open the panel in a tab"
            disabled={!here || !props.hasNotebook}
            click={() => {
              deeds.showTab(kernelId, model.name);
            }}
          />
          <Button
            text="Insert"
            title="Insert the panel into the notebook"
            disabled={!here || !props.hasNotebook}
            click={() => {
              deeds.insertPanel(kernelId);
            }}
          />
          <Button
            text="Unload"
            title="Cancel its requests and give the memory back"
            disabled={frozen}
            click={() => {
              act('unload');
            }}
          />
        </span>
      </div>
    </div>
  );
}

const WIDTH = 240;
const HEIGHT = 34;

function Latency({
  model,
  now
}: {
  model: ModelState;
  now: number;
}): JSX.Element {
  const drawn = model.history && spark(model.history, now, WIDTH, HEIGHT);
  const facts: [string, string, string][] = [
    ['ITL ms', figure(model.itl), 'Median gap between tokens of late'],
    ['p99 ms', figure(model.itl_p99), '99th percentile of these gaps'],
    [
      'TTFT ms',
      figure(model.ttft),
      'Time to first token of the latest request'
    ],
    ['tok/s', figure(model.rate), 'Output tokens per second, now']
  ];
  const said = facts.map(([name, value]) => `${name} ${value}`).join(', ');
  return (
    <div className="jp-Inferkit-latency">
      <svg
        className="jp-Inferkit-spark"
        viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
        preserveAspectRatio="none"
        role="img"
        aria-label={`Gaps between tokens in the last minute. ${said}`}
      >
        <title>
          {drawn
            ? `Gap between tokens (ITL) in the last minute; the top is ${figure(drawn.top)} ms. ` +
              'Dots: first tokens of requests.'
            : 'No token in the last minute.'}
        </title>
        <line
          className="jp-Inferkit-axis"
          x1="0"
          x2={WIDTH}
          y1={HEIGHT - 0.5}
          y2={HEIGHT - 0.5}
        />
        {drawn?.areas.map(path => (
          <path key={path} className="jp-Inferkit-area" d={path} />
        ))}
        {drawn?.lines.map(path => (
          <path key={path} className="jp-Inferkit-itl" d={path} />
        ))}
        {drawn?.dots.map(([x, y]) => (
          <ellipse
            key={x}
            className="jp-Inferkit-ttft"
            cx={x}
            cy={y}
            rx="1.8"
            ry="2.2"
          />
        ))}
      </svg>
      <dl className="jp-Inferkit-figures">
        {facts.map(([name, value, title]) => (
          <div key={name} title={title}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
    </div>
  );
}

// -- small parts ----------------------------------------------------------------------------------

function Button(props: {
  text: string;
  title: string;
  disabled: boolean;
  click: () => void;
}): JSX.Element {
  return (
    <button
      className="jp-Inferkit-button jp-mod-small"
      title={props.title}
      disabled={props.disabled}
      onClick={props.click}
    >
      {props.text}
    </button>
  );
}

function Choice(props: {
  label: string;
  value: string;
  of: string[];
  disabled?: boolean;
  choose: (value: string) => void;
}): JSX.Element {
  return (
    <select
      className="jp-Inferkit-choice"
      aria-label={props.label}
      title={props.label}
      value={props.value}
      disabled={props.disabled ?? false}
      onChange={event => {
        props.choose(event.target.value);
      }}
    >
      {props.of.map(value => (
        <option key={value}>{value}</option>
      ))}
    </select>
  );
}

/** A whole number, which holds when it is entered and not while it is typed. */
function Count(props: {
  label: string;
  value: number;
  disabled: boolean;
  choose: (value: number) => void;
}): JSX.Element {
  const [typed, setTyped] = useState<string | null>(null);
  const enter = (): void => {
    const value = Number(typed);
    setTyped(null);
    if (
      typed !== null &&
      Number.isInteger(value) &&
      value > 0 &&
      value !== props.value
    ) {
      props.choose(value);
    }
  };
  return (
    <input
      className="jp-Inferkit-choice jp-Inferkit-number"
      type="number"
      min={1}
      aria-label={props.label}
      title={props.label}
      disabled={props.disabled}
      value={typed ?? String(props.value)}
      onChange={event => {
        setTyped(event.target.value);
      }}
      onBlur={enter}
      onKeyDown={event => {
        if (event.key === 'Enter') {
          enter();
        } else if (event.key === 'Escape') {
          setTyped(null);
        }
      }}
    />
  );
}

function Told(props: {
  answer: Answer | null;
  dismiss: () => void;
  insert: (() => void) | null;
}): JSX.Element {
  const { answer } = props;
  if (answer === null) {
    return <></>;
  }
  return (
    <div
      className="jp-Inferkit-told"
      data-ok={answer.ok}
      role={answer.ok ? 'status' : 'alert'}
    >
      <span className="jp-Inferkit-grow">{answer.text}</span>
      {props.insert && (
        <button
          className="jp-Inferkit-button jp-mod-small"
          title="Insert a cell that loads it as it is, and calls it model"
          onClick={props.insert}
        >
          Insert cell
        </button>
      )}
      <button
        className="jp-Inferkit-button jp-mod-small"
        aria-label="Dismiss"
        title="Dismiss"
        onClick={props.dismiss}
      >
        ×
      </button>
    </div>
  );
}

type Run = (
  work: () => Promise<Answer>,
  tellSuccess?: boolean
) => Promise<void>;

/** One action after another, and the answer of the last: what went well is seen without words. */
function useAct(): {
  pending: boolean;
  answer: Answer | null;
  run: Run;
  dismiss: () => void;
} {
  const [pending, setPending] = useState(false);
  const [answer, setAnswer] = useState<Answer | null>(null);
  const run: Run = async (work, tellSuccess = false) => {
    setPending(true);
    setAnswer(null);
    try {
      const found = await work();
      setAnswer(found.ok && !tellSuccess ? null : found);
    } catch (error) {
      setAnswer(refusal(messageOf(error)));
    } finally {
      setPending(false);
    }
  };
  return {
    pending,
    answer,
    run,
    dismiss: () => {
      setAnswer(null);
    }
  };
}

function titleOf(
  kernel: Kernel,
  notebooks: ReadonlyMap<string, string>
): string {
  const path = notebooks.get(kernel.kernel_id) ?? kernel.state?.notebook ?? '';
  return path.split('/').pop() || `kernel ${kernel.kernel_id.slice(0, 8)}`;
}

function matches(kernel: Kernel, title: string, wanted: string): boolean {
  const text = [
    title,
    ...(kernel.state?.models ?? []).map(model => model.name)
  ];
  return text.join(' ').toLowerCase().includes(wanted.trim().toLowerCase());
}
