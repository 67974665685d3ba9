import { ReactWidget } from '@jupyterlab/ui-components';
import type { Message } from '@lumino/messaging';
import type { JSX } from 'react';
import { summary } from './figures';
import { inferenceIcon } from './names';
import type { Watch } from './watch';

/** The item of the status bar: memory of the fullest device, and tokens per second. */
export class InferenceStatus extends ReactWidget {
  constructor(watch: Watch, show: () => void) {
    super();
    this._watch = watch;
    this._show = show;
    this.id = 'inferkit-lab-status';
    watch.changed.connect(this._changed, this);
  }

  /** Milliseconds between two looks. */
  set interval(interval: number) {
    this._interval = interval;
    if (this.isVisible) {
      this._watch.want(this.id, interval);
    }
  }

  override dispose(): void {
    if (!this.isDisposed) {
      this._watch.want(this.id, null);
      this._watch.changed.disconnect(this._changed, this);
    }
    super.dispose();
  }

  protected override onAfterAttach(msg: Message): void {
    super.onAfterAttach(msg);
    this._look();
  }

  protected override onAfterShow(msg: Message): void {
    super.onAfterShow(msg);
    this._look();
  }

  protected override onAfterHide(msg: Message): void {
    super.onAfterHide(msg);
    this._watch.want(this.id, null);
  }

  protected override onBeforeDetach(msg: Message): void {
    super.onBeforeDetach(msg);
    this._watch.want(this.id, null);
  }

  protected override render(): JSX.Element {
    const { state, error } = this._watch.seen;
    const told =
      error || state === null
        ? { text: 'Inference', title: error || 'Inference' }
        : summary(state);
    return (
      <button
        className="jp-Inferkit-status"
        title={told.title}
        aria-label={`Inference: ${told.text}`}
        onClick={this._show}
      >
        <inferenceIcon.react tag="span" width="14px" height="14px" />
        <span>{told.text}</span>
      </button>
    );
  }

  private _look(): void {
    if (this.isVisible) {
      this._watch.want(this.id, this._interval);
    }
  }

  private _changed(): void {
    if (this.isVisible) {
      this.update();
    }
  }

  private readonly _watch: Watch;
  private readonly _show: () => void;
  private _interval = 5000;
}
