import {
  MainAreaWidget,
  Notification,
  type ISessionContext
} from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import {
  OutputAreaModel,
  SimplifiedOutputArea,
  type IOutputAreaModel
} from '@jupyterlab/outputarea';
import type { Kernel, KernelMessage } from '@jupyterlab/services';
import { Signal, type ISignal } from '@lumino/signaling';
import { Widget } from '@lumino/widgets';
import { evaluate, execute, onSubshell, replyTo } from './actions';
import {
  INTERRUPT,
  VERSION,
  expression,
  failureOf,
  lackOf,
  lacksModule,
  type Evaluated
} from './answers';
import { inferenceIcon } from './names';
import { messageOf } from './watch';

const ACTIONS = 'inferkit.notebook.actions';
const AGAIN = 'Show the panel again';

/** What leads to a tab again after the page was reloaded. */
export interface TabOptions {
  /** The path of the notebook whose kernel has the model. */
  readonly path: string;
  /** The model's name; '' for whatever is loaded. */
  readonly model: string;
}

/**
 * The panel of a model in a tab of its own. It lives in the notebook's kernel, and is drawn by the
 * notebook's widgets, so that it lives no longer than the notebook is open.
 */
export class PanelTab extends MainAreaWidget {
  constructor(options: TabOptions, notebook: Promise<NotebookPanel>) {
    super({ content: new Widget() });
    this._options = options;
    this._identify();
    this.addClass('jp-Inferkit-tab');
    this.title.label = options.model || 'Inference';
    this.title.icon = inferenceIcon;
    this.title.closable = true;
    this.content.addClass('jp-Inferkit-tab-content');
    this._say('Waiting for the kernel…');
    void notebook.then(
      found => this._show(found),
      (error: unknown) => {
        this._say(`The notebook could not be opened: ${String(error)}`);
      }
    );
  }

  static idOf(options: TabOptions): string {
    return `inferkit-panel ${options.path} ${options.model}`;
  }

  /** What leads to the tab again. */
  get options(): TabOptions {
    return this._options;
  }

  /** Emitted when that has changed, for the notebook was renamed or moved. */
  get moved(): ISignal<this, void> {
    return this._moved;
  }

  override dispose(): void {
    if (!this.isDisposed) {
      this._putAway();
      this._clear();
      this._context?.statusChanged.disconnect(this._statusChanged, this);
      this._context?.kernelChanged.disconnect(this._kernelChanged, this);
      this._notebook?.context.pathChanged.disconnect(this._pathChanged, this);
    }
    super.dispose();
  }

  /** Show the panel of the model that the tab is called by: it may have gone on to another. */
  again(): void {
    const kernel = this._context?.session?.kernel;
    const area = this._area;
    if (kernel && area?.isAttached) {
      this._recall(kernel, area).catch((error: unknown) => {
        if (this._area === area) {
          // The panel goes on.
          Notification.error(messageOf(error), { autoClose: 5000 });
        }
      });
    } else if (this._notebook) {
      this._draw();
    }
  }

  private async _show(notebook: NotebookPanel): Promise<void> {
    const context = notebook.sessionContext;
    await notebook.revealed;
    await context.ready;
    if (this.isDisposed) {
      return;
    }
    this._notebook = notebook;
    this._context = context;
    context.statusChanged.connect(this._statusChanged, this);
    context.kernelChanged.connect(this._kernelChanged, this);
    notebook.context.pathChanged.connect(this._pathChanged, this);
    this._pathChanged(notebook.context, notebook.context.path); // it may have changed meanwhile
    notebook.disposed.connect(() => {
      this.dispose();
    });
    this._draw();
  }

  private _draw(): void {
    const kernel = this._context?.session?.kernel;
    if (!kernel || !this._notebook) {
      this._say('The notebook has no kernel.', AGAIN);
      return;
    }
    this._say('Waiting for the kernel…');
    const area = new SimplifiedOutputArea({
      model: new OutputAreaModel({ trusted: true }),
      rendermime: this._notebook.content.rendermime
    });
    this._area = area;
    this._kernelId = kernel.id;
    this._ask(kernel, area).catch((error: unknown) => {
      if (this._area === area) {
        this._say(messageOf(error), AGAIN);
      }
    });
  }

  /** Have the panel that is shown go back to the model; it is drawn anew only where it is closed. */
  private async _recall(
    kernel: Kernel.IKernelConnection,
    area: SimplifiedOutputArea
  ): Promise<void> {
    // Its id: the kernel would show the panel itself, and take it to be where nobody sees it.
    const { id = { status: 'error' } } = await evaluate(kernel, {
      id: `${panelOf(this.options.model)}.model_id`
    });
    if (this._area !== area) {
      return; // closed, or begun anew
    }
    if (id.ename === INTERRUPT) {
      throw new Error(failureOf(id));
    }
    if (id.status !== 'ok') {
      const reason = await reasonOf(kernel, id);
      if (this._area === area) {
        this._say(reason, AGAIN);
      }
      return;
    }
    const text = id.data?.['text/plain'];
    const shown = JSON.stringify(area.model.toJSON());
    if (typeof text !== 'string' || !shown.includes(text.replace(/'/g, ''))) {
      this._draw();
    }
  }

  /**
   * Have the kernel show the panel, while a cell runs too. It goes over the notebook's connection,
   * which hears of the panel's widgets before it is told to show them.
   */
  private async _ask(
    kernel: Kernel.IKernelConnection,
    area: SimplifiedOutputArea
  ): Promise<void> {
    const drawn = new Promise<void>(resolve => {
      area.model.changed.connect(() => {
        const found = area.model.length > 0 && !refused(area.model);
        if (this._area === area && found && !area.isAttached) {
          this.content.node.textContent = '';
          Widget.attach(area, this.content.node);
          resolve();
        }
      });
    });
    await onSubshell(kernel, async subshell => {
      if (this._area !== area) {
        return; // closed, or begun anew
      }
      if (subshell === null) {
        this._hint('Waiting for the cell that runs…');
      }
      const future = execute(kernel, subshell, {
        code: shown(this.options.model),
        silent: false,
        store_history: false,
        allow_stdin: false
      });
      area.future = future;
      const { content } = await replyTo<KernelMessage.IExecuteReplyMsg>(future);
      if (content.status !== 'ok') {
        throw new Error(await reasonOf(kernel, content));
      }
      // Outputs have a channel of their own, and may come later than the reply.
      await Promise.race([drawn, future.done]);
    });
  }

  private _statusChanged(_: ISessionContext, status: Kernel.Status): void {
    if (
      status === 'restarting' ||
      status === 'autorestarting' ||
      status === 'dead'
    ) {
      this._say('The kernel was restarted: its models are gone.', AGAIN);
    }
  }

  /** Whether it was shut down or changed for another: the former one has ended then. */
  private _kernelChanged(): void {
    const kernel = this._context?.session?.kernel;
    if (this._area && kernel?.id !== this._kernelId) {
      this._say('The kernel was shut down: its models are gone.', AGAIN);
    }
  }

  private _pathChanged(_: unknown, path: string): void {
    if (path !== this._options.path) {
      this._options = { ...this._options, path };
      this._identify();
      this._moved.emit();
    }
  }

  private _identify(): void {
    const { path, model } = this._options;
    this.id = PanelTab.idOf(this._options);
    this.title.caption = `Inference panel of ${model || 'the models'} in ${path}`;
  }

  /** Have the panel rest in the kernel, which may be gone or lack what makes it rest. */
  private _putAway(): void {
    const kernel = this._context?.session?.kernel;
    if (this._area?.isAttached && kernel?.id === this._kernelId) {
      const { model } = this._options;
      const away = expression(ACTIONS, 'put_away', [model]);
      evaluate(kernel, { away }).catch(() => undefined);
    }
  }

  private _say(text: string, again = ''): void {
    this._clear();
    this._hint(text, again);
  }

  private _hint(text: string, again = ''): void {
    const line = document.createElement('p');
    line.className = 'jp-Inferkit-hint';
    line.setAttribute('role', 'status');
    line.textContent = text;
    if (again) {
      const button = document.createElement('button');
      button.className = 'jp-Inferkit-button';
      button.textContent = again;
      button.onclick = () => {
        this.again();
      };
      line.append(document.createElement('br'), button);
    }
    this.content.node.replaceChildren(line);
  }

  private _clear(): void {
    if (this._area) {
      if (this._area.isAttached) {
        Widget.detach(this._area);
      }
      this._area.dispose();
      this._area = null;
    }
  }

  private _options: TabOptions;
  private readonly _moved = new Signal<this, void>(this);
  private _notebook: NotebookPanel | null = null;
  private _context: ISessionContext | null = null;
  private _area: SimplifiedOutputArea | null = null;
  private _kernelId = ''; // of the kernel that the panel lives in
}

/** Why a kernel shows no panel: it may lack an inferkit that has them. */
async function reasonOf(
  kernel: Kernel.IKernelConnection,
  failed: Evaluated
): Promise<string> {
  if (!lacksModule(failed)) {
    return failureOf(failed);
  }
  const { version } = await evaluate(kernel, { version: VERSION });
  return lackOf(failed, version);
}

/** Whether an output tells of an error: the reply does in one sentence. */
function refused(outputs: IOutputAreaModel): boolean {
  return outputs.get(outputs.length - 1).type === 'error';
}

/** Code that shows a model's panel, and leaves no trace in the notebook's history. */
function shown(model: string): string {
  return `__import__("IPython.display", fromlist=["display"]).display(${panelOf(model)})`;
}

/** The expression that makes a model's panel, or has the one there is show the model again. */
function panelOf(model: string): string {
  return expression(ACTIONS, 'panel', [model]);
}
