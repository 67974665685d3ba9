import { useRef, useState, type JSX } from 'react';
import { colorsOf } from './colors';
import type { Current, Deeds } from './deeds';
import { Devices } from './devices';
import { counted } from './figures';
import { KernelView } from './kernel';
import { Loader } from './loader';
import { Problem } from './parts';
import type { Kernel, State } from './schema';
import { pathsOf, titlesOf } from './titles';
import type { Seen } from './watch';

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

/** All of the sidebar. */
export function Sidebar(props: SidebarProps): JSX.Element {
  const { seen, current, notebooks, deeds } = props;
  const [wanted, setWanted] = useState('');
  const { state, error } = seen;
  const colors = useRef<ReadonlyMap<string, number>>(new Map());
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
  const paths = pathsOf(state.kernels, notebooks);
  const titles = titlesOf(paths);
  const title = ({ kernel_id: id }: Kernel): string => titles.get(id) ?? id;
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
  colors.current = colorsOf([...paths.keys()], colors.current);
  const mine = kernels.find(k => k.kernel_id === current?.kernelId);
  return (
    <div className="jp-Inferkit">
      {error && <Problem text={`${error} What is shown is from before.`} />}
      <Devices state={state} colors={colors.current} title={title} />
      <Loader
        current={
          current && {
            ...current,
            name: titles.get(current.kernelId) ?? current.name
          }
        }
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
            path={paths.get(kernel.kernel_id) ?? ''}
            current={kernel.kernel_id === current?.kernelId}
            many={kernels.length > MANY}
            hasNotebook={notebooks.has(kernel.kernel_id)}
            color={colors.current.get(kernel.kernel_id) ?? 0}
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

function matches(kernel: Kernel, title: string, wanted: string): boolean {
  const text = [
    title,
    ...(kernel.state?.models ?? []).map(model => model.name)
  ];
  return text.join(' ').toLowerCase().includes(wanted.trim().toLowerCase());
}
