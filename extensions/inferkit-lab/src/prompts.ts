import {
  EditorExtensionRegistry,
  type IEditorExtensionFactory
} from '@jupyterlab/codemirror';
import { RangeSetBuilder, type Extension } from '@codemirror/state';
import {
  Decoration,
  ViewPlugin,
  type DecorationSet,
  type EditorView,
  type PluginValue,
  type ViewUpdate
} from '@codemirror/view';

type Model = IEditorExtensionFactory.IOptions['model'];

/** IPython's Markdown: what Markdown cells are. */
const PROMPT_TYPE = 'text/x-ipythongfm';
const MAGIC = /^\s*%%infer(\s|$)/;

/** Highlight the cells of `%%infer`, which are prompts, as Markdown. */
export const promptCells: IEditorExtensionFactory = {
  name: 'inferkit:prompt-cells',
  factory: ({ model }) =>
    EditorExtensionRegistry.createImmutableExtension(highlight(model))
};

function highlight(model: Model): Extension {
  return ViewPlugin.define(view => new PromptCell(view, model), {
    decorations: plugin => plugin.magic
  });
}

/** What the texts of prompts were before: a cell may be shown by several editors. */
const formers = new WeakMap<Model, string>();

const line = Decoration.line({ class: 'jp-Inferkit-magic' });

/** Changes the type of an editor's text with its first line, and back. */
class PromptCell implements PluginValue {
  constructor(view: EditorView, model: Model) {
    this._model = model;
    this._view = view;
    this.magic = this._look();
    model.mimeTypeChanged.connect(this._check, this);
  }

  /** The line of the magic, which is no part of the prompt. */
  magic: DecorationSet;

  update(update: ViewUpdate): void {
    if (update.docChanged || update.transactions.some(t => t.reconfigured)) {
      this.magic = this._look();
    }
  }

  destroy(): void {
    const model = this._model;
    model.mimeTypeChanged.disconnect(this._check, this);
    const former = formers.get(model);
    if (!model.isDisposed && former !== undefined) {
      formers.delete(model);
      model.mimeType = former; // another editor of the cell begins anew
    }
  }

  private _look(): DecorationSet {
    // An editor must not be changed while it changes.
    queueMicrotask(() => {
      this._check();
    });
    const marks = new RangeSetBuilder<Decoration>();
    if (this._isPrompt) {
      marks.add(0, 0, line);
    }
    return marks.finish();
  }

  private get _isPrompt(): boolean {
    const type = formers.get(this._model) ?? this._model.mimeType;
    const first = this._view.state.doc.line(1).text;
    return type !== PROMPT_TYPE && type.includes('python') && MAGIC.test(first);
  }

  private _check(): void {
    const model = this._model;
    const former = formers.get(model);
    if (this._isPrompt && model.mimeType !== PROMPT_TYPE) {
      formers.set(model, model.mimeType);
      model.mimeType = PROMPT_TYPE;
    } else if (!this._isPrompt && former !== undefined) {
      formers.delete(model);
      if (model.mimeType === PROMPT_TYPE) {
        model.mimeType = former;
      }
    }
  }

  private readonly _model: Model;
  private readonly _view: EditorView;
}
