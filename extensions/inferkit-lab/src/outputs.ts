import type { INotebookTracker, NotebookPanel } from '@jupyterlab/notebook';
import type { IOutputAreaModel } from '@jupyterlab/outputarea';
import type { PartialJSONObject } from '@lumino/coreutils';

/** What a live view tells of an output under its cell: see inferkit/notebook/live.py. */
export interface Told {
  /** The view's element. */
  readonly root: Node;
  /** Which output it is; a later one of the same place replaces it. */
  readonly place: string;
  /** What tells it from an earlier one of its place. */
  readonly mark: string;
  /** The output, where it was asked for. */
  readonly output?: {
    readonly data: PartialJSONObject;
    readonly metadata: PartialJSONObject;
  };
  /** Asks the kernel for it. */
  ask(): void;
}

type Cell = NotebookPanel['content']['widgets'][number];

interface Found {
  readonly outputs: IOutputAreaModel;
  readonly index: number;
  readonly mark: unknown;
}

/**
 * Have the outputs of live views get into notebooks whose page was loaded after their cells had run:
 * Jupyter hands them to the page that ran the cell alone.
 */
export function keepOutputs(tracker: INotebookTracker): void {
  document.addEventListener('inferkit-output', event => {
    take(tracker, (event as CustomEvent<Told>).detail);
  });
}

function take(tracker: INotebookTracker, told: Told): void {
  const panel = tracker.find(one => one.node.contains(told.root));
  const shown = panel?.content.widgets.find(one =>
    one.node.contains(told.root)
  );
  const found = panel ? outputsAt(panel, told.place) : [];
  if (!shown || found.some(one => one.mark === told.mark)) {
    return;
  }
  if (!told.output) {
    told.ask();
    return;
  }
  const output = { output_type: 'display_data', ...told.output };
  const [former] = found;
  if (former) {
    former.outputs.set(former.index, output);
  } else {
    outputsOf(shown)?.add(output);
  }
}

function outputsAt(panel: NotebookPanel, place: string): Found[] {
  const found: Found[] = [];
  for (const cell of panel.content.widgets) {
    const outputs = outputsOf(cell);
    for (let index = 0; outputs && index < outputs.length; index++) {
      const noted = outputs.get(index).metadata['inferkit'] as
        PartialJSONObject | undefined;
      if (noted?.['place'] === place) {
        found.push({ outputs, index, mark: noted['mark'] });
      }
    }
  }
  return found;
}

function outputsOf(cell: Cell): IOutputAreaModel | null {
  const { model } = cell;
  return model.type === 'code' && 'outputs' in model
    ? (model.outputs as IOutputAreaModel)
    : null;
}
