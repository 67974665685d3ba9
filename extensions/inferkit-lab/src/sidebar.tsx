import { ReactWidget } from '@jupyterlab/ui-components';
import type { Message } from '@lumino/messaging';
import type { JSX } from 'react';
import { inferenceIcon } from './names';
import type { Current, Deeds } from './deeds';
import { Sidebar } from './view';
import type { Watch } from './watch';

/** The sidebar: watches while it is seen, and does nothing while it is not. */
export class InferenceSidebar extends ReactWidget {
  constructor(options: InferenceSidebar.IOptions) {
    super();
    this._options = options;
    this.id = 'inferkit-lab';
    this.title.icon = inferenceIcon;
    this.title.caption = 'Inference';
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', 'Inference');
    this.addClass('jp-Inferkit-sidebar');
    options.watch.changed.connect(this._renderIfSeen, this);
  }

  /** Milliseconds between two looks. */
  set interval(interval: number) {
    this._interval = interval;
    if (this.isVisible) {
      this._options.watch.want(this.id, interval);
    }
  }

  /** Show the field for a model to be loaded, ready to be typed in. */
  askForModel(): void {
    this._asked += 1;
    this.update();
  }

  override dispose(): void {
    if (!this.isDisposed) {
      this._options.watch.want(this.id, null);
      this._options.watch.changed.disconnect(this._renderIfSeen, this);
    }
    super.dispose();
  }

  handleEvent(): void {
    // Whoever comes back need not wait for the next try.
    if (this.isVisible && this._options.watch.seen.error) {
      void this._options.watch.refresh();
    }
  }

  // It is detached from one side and attached to the other without being hidden or shown.

  protected override onAfterAttach(msg: Message): void {
    super.onAfterAttach(msg);
    this.node.addEventListener('pointerdown', this);
    window.addEventListener('focus', this);
    this._look();
  }

  protected override onBeforeDetach(msg: Message): void {
    this.node.removeEventListener('pointerdown', this);
    window.removeEventListener('focus', this);
    this._options.watch.want(this.id, null);
    super.onBeforeDetach(msg);
  }

  protected override onAfterShow(msg: Message): void {
    super.onAfterShow(msg);
    this._look();
  }

  protected override onAfterHide(msg: Message): void {
    super.onAfterHide(msg);
    this._options.watch.want(this.id, null);
  }

  private _look(): void {
    if (this.isVisible) {
      this._options.watch.want(this.id, this._interval);
      this.update();
    }
  }

  protected override render(): JSX.Element {
    const { watch, current, notebooks, deeds } = this._options;
    return (
      <Sidebar
        seen={watch.seen}
        current={current()}
        notebooks={notebooks()}
        deeds={deeds}
        asked={this._asked}
      />
    );
  }

  private _renderIfSeen(): void {
    if (this.isVisible) {
      this.update();
    }
  }

  private readonly _options: InferenceSidebar.IOptions;
  private _interval = 1000;
  private _asked = 0;
}

export namespace InferenceSidebar {
  export interface IOptions {
    readonly watch: Watch;
    readonly current: () => Current | null;
    readonly notebooks: () => ReadonlyMap<string, string>;
    readonly deeds: Deeds;
  }
}
