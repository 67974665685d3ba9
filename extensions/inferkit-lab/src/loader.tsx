import { useEffect, useRef, useState, type JSX } from 'react';
import type { Current, Deeds } from './deeds';
import { Choice, Told, useAct } from './parts';
import type { Answer, Work } from './schema';

export function Loader(props: {
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
  // Another notebook's kernel is free meanwhile, and what is said of this one is not said there.
  const { pending, answer, run, dismiss } = useAct(current?.kernelId);
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

export function Progress(props: {
  work: Work;
  cancel: (() => Promise<Answer>) | null;
}): JSX.Element {
  const { work, cancel } = props;
  const { pending, answer, run, dismiss } = useAct();
  const [asked, setAsked] = useState(false); // and not refused
  return (
    <div className="jp-Inferkit-work" role="status">
      <div className="jp-Inferkit-row">
        <span className="jp-Inferkit-grow">{work.what}</span>
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
