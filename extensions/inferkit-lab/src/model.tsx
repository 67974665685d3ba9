import type { JSX } from 'react';
import type { Deeds } from './deeds';
import { bytes, figure, spark } from './figures';
import { Button, Choice, Count, type Run } from './parts';
import type { ModelState } from './schema';

export function ModelView(props: {
  model: ModelState;
  kernelId: string;
  here: boolean;
  hasNotebook: boolean;
  now: number;
  busy: boolean;
  deeds: Deeds;
  change: Run;
  stop: Run;
}): JSX.Element {
  const { model, kernelId, here, deeds, busy } = props;
  const memory = Object.entries(model.memory).filter(([, size]) => size > 0);
  const act = (
    name: string,
    given: Record<string, string | number> = {},
    run = props.change
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
              act('stop', {}, props.stop);
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
            title="Insert its panel into the notebook"
            disabled={!here || !props.hasNotebook}
            click={() => {
              deeds.insertPanel(kernelId, model.name);
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
    [
      'ITL ms',
      figure(model.itl),
      'Median gap between tokens in the last 10 s with any, in this mode'
    ],
    ['p99 ms', figure(model.itl_p99), '99th percentile of these gaps'],
    [
      'TTFT ms',
      figure(model.ttft),
      'Time to first token of the latest request in this mode'
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
