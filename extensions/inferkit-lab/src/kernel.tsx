import { useState, type JSX } from 'react';
import type { Deeds } from './deeds';
import { bytes, figure } from './figures';
import { Progress } from './loader';
import { ModelView } from './model';
import { Problem, Told, useAct } from './parts';
import type { Kernel, KernelState } from './schema';

interface KernelProps {
  readonly kernel: Kernel;
  readonly title: string;
  /** Of its notebook; '' where that is not known. */
  readonly path: string;
  readonly current: boolean;
  /** Whether there are so many that all but the current one are folded up. */
  readonly many: boolean;
  readonly hasNotebook: boolean;
  readonly color: number;
  readonly now: number;
  readonly deeds: Deeds;
}

export function KernelView(props: KernelProps): JSX.Element {
  const { kernel, title, current, hasNotebook, color, deeds } = props;
  const changes = useAct();
  const stops = useAct(); // which may come while a change waits
  const [opened, setOpened] = useState(false);
  const state = kernel.state;
  const folds = props.many && !current && Boolean(state?.models.length);
  const folded = folds && !opened;
  const id = kernel.kernel_id;
  const where = kernel.here
    ? `Kernel ${id}, process ${kernel.pid}, inferkit ${kernel.inferkit}`
    : `Process ${kernel.pid}, which another Jupyter or program has started: it can be watched from here, not changed.`;
  return (
    <article className="jp-Inferkit-kernel" aria-label={title} data-kernel={id}>
      <header
        className="jp-Inferkit-row"
        title={props.path ? `${props.path}\n${where}` : where}
      >
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
            className="jp-Inferkit-link jp-Inferkit-name"
            onClick={() => {
              deeds.open(id);
            }}
          >
            {title}
          </button>
        ) : (
          <span className="jp-Inferkit-name">{title}</span>
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
            busy={changes.pending}
            deeds={deeds}
            change={changes.run}
            stop={stops.run}
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
      {[changes, stops].map(({ answer, dismiss }, index) => (
        <Told key={index} answer={answer} dismiss={dismiss} insert={null} />
      ))}
    </article>
  );
}

function canShare(state: KernelState): boolean {
  return state.experiment !== null && state.actions.includes('share');
}
