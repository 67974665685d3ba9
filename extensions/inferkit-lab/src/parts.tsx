import { useState, type JSX } from 'react';
import { refusal } from './answers';
import type { Answer } from './schema';
import { messageOf } from './watch';

export function Problem({ text }: { text: string }): JSX.Element {
  return (
    <p className="jp-Inferkit-problem" role="alert">
      {text}
    </p>
  );
}

export function Button(props: {
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

export function Choice(props: {
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
export function Count(props: {
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

export function Told(props: {
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
      <div className="jp-Inferkit-grow">
        {answer.text}
        {answer.details && (
          <details>
            <summary>Details</summary>
            <pre className="jp-Inferkit-details">{answer.details}</pre>
          </details>
        )}
      </div>
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

export type Run = (
  work: () => Promise<Answer>,
  tellSuccess?: boolean
) => Promise<void>;

/** What became of the last action on something. */
interface Act {
  readonly pending: boolean;
  readonly answer: Answer | null;
}

const NOTHING: Act = { pending: false, answer: null };

/**
 * One action after another, and the answer of the last: what went well is seen without words.
 *
 * @param of - What is acted on: each has an action and an answer of its own.
 */
export function useAct(of = ''): Act & { run: Run; dismiss: () => void } {
  const [acts, setActs] = useState<ReadonlyMap<string, Act>>(new Map());
  const put = (act: Act): void => {
    setActs(others => new Map(others).set(of, act));
  };
  const run: Run = async (work, tellSuccess = false) => {
    put({ pending: true, answer: null });
    try {
      const found = await work();
      put({ pending: false, answer: found.ok && !tellSuccess ? null : found });
    } catch (error) {
      put({ pending: false, answer: refusal(messageOf(error)) });
    }
  };
  return {
    ...(acts.get(of) ?? NOTHING),
    run,
    dismiss: () => {
      put(NOTHING);
    }
  };
}
