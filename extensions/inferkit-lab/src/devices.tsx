import type { JSX } from 'react';
import { bytes } from './figures';
import type { Attached, Kernel, State } from './schema';

export function Devices(props: {
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
