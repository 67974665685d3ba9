import {
  ILabShell,
  ILayoutRestorer,
  type JupyterFrontEnd,
  type JupyterFrontEndPlugin
} from '@jupyterlab/application';
import {
  ICommandPalette,
  Notification,
  WidgetTracker
} from '@jupyterlab/apputils';
import { IEditorExtensionRegistry } from '@jupyterlab/codemirror';
import { IDocumentManager } from '@jupyterlab/docmanager';
import { ILauncher } from '@jupyterlab/launcher';
import {
  INotebookTracker,
  NotebookActions,
  type NotebookPanel
} from '@jupyterlab/notebook';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { IStatusBar } from '@jupyterlab/statusbar';
import type { JSONObject } from '@lumino/coreutils';
import { act } from './actions';
import { commandIds, inferenceIcon, launcherIcon } from './names';
import { keepOutputs } from './outputs';
import { promptCells } from './prompts';
import type { Answer, Kernel } from './schema';
import { fetchState } from './server';
import { share } from './share';
import { InferenceSidebar } from './sidebar';
import { InferenceStatus } from './status';
import { PanelTab, type TabOptions } from './tab';
import type { Current, Deeds } from './deeds';
import { messageOf, Watch } from './watch';

const CATEGORY = 'Inference';
const SECOND = 1000;

/** The cells of a new inference notebook. */
const FIRST_CELLS = [
  'import inferkit as ik\n\n%load_ext inferkit',
  'ik.Panel()',
  '%%infer --max-tokens 64\nOnce upon a time'
];

/** Highlights the cells of `%%infer`. */
const prompts: JupyterFrontEndPlugin<void> = {
  id: 'inferkit-lab:prompts',
  description: 'Highlights cells of %%infer, which are prompts, as Markdown.',
  autoStart: true,
  requires: [IEditorExtensionRegistry],
  activate: (_: JupyterFrontEnd, editors: IEditorExtensionRegistry) => {
    editors.addExtension(promptCells);
  }
};

/** The sidebar, the status bar's item, and the commands. */
const inference: JupyterFrontEndPlugin<void> = {
  id: 'inferkit-lab:plugin',
  description: 'Models, devices and latency of all kernels.',
  autoStart: true,
  requires: [INotebookTracker, IDocumentManager],
  optional: [
    ILabShell,
    ILayoutRestorer,
    ICommandPalette,
    ILauncher,
    IStatusBar,
    ISettingRegistry
  ],
  activate
};

export default [prompts, inference];

function activate(
  app: JupyterFrontEnd,
  tracker: INotebookTracker,
  documents: IDocumentManager,
  labShell: ILabShell | null,
  restorer: ILayoutRestorer | null,
  palette: ICommandPalette | null,
  launcher: ILauncher | null,
  statusBar: IStatusBar | null,
  settings: ISettingRegistry | null
): void {
  const { commands, serviceManager, shell } = app;
  keepOutputs(tracker);
  const watch = new Watch(() => fetchState(serviceManager.serverSettings));
  const tabs = new WidgetTracker<PanelTab>({ namespace: 'inferkit-panels' });

  // -- notebooks and their kernels ----------------------------------------------------------------

  const kernelOf = (panel: NotebookPanel | null): string | undefined =>
    panel?.sessionContext.session?.kernel?.id;

  const current = (): Current | null => {
    const panel = tracker.currentWidget;
    const kernelId = kernelOf(panel);
    return panel && kernelId ? { kernelId, name: panel.title.label } : null;
  };

  const notebooks = (): ReadonlyMap<string, string> => {
    const found = new Map<string, string>();
    for (const session of serviceManager.sessions.running()) {
      if (session.kernel && session.type === 'notebook') {
        found.set(session.kernel.id, session.path);
      }
    }
    return found;
  };

  /** What is known of a kernel. */
  const known = (kernelId: string | undefined): Kernel | undefined =>
    watch.seen.state?.kernels.find(kernel => kernel.kernel_id === kernelId);

  /** Whether a kernel is known to have no inferkit: one out of sight may. */
  const without = (kernelId: string): boolean => {
    const { state, error } = watch.seen;
    return (
      state !== null &&
      !error &&
      !known(kernelId) &&
      !state.out_of_sight.includes(kernelId)
    );
  };

  const opened = async (path: string): Promise<NotebookPanel> => {
    const panel = documents.openOrReveal(path, 'Notebook') as
      NotebookPanel | undefined;
    if (!panel) {
      throw new Error(`${path} is no notebook.`);
    }
    await panel.context.ready;
    return panel;
  };

  const notebookOf = async (
    kernelId: string
  ): Promise<NotebookPanel | null> => {
    const path = notebooks().get(kernelId);
    return path === undefined ? null : await opened(path);
  };

  const insert = async (
    panel: NotebookPanel,
    code: string,
    run: boolean
  ): Promise<void> => {
    shell.activateById(panel.id);
    NotebookActions.insertBelow(panel.content);
    panel.content.activeCell?.model.sharedModel.setSource(code);
    if (run) {
      await NotebookActions.run(panel.content, panel.sessionContext);
    }
  };

  // -- what is clicked ----------------------------------------------------------------------------

  const perform = async (
    kernelId: string,
    name: string,
    given: JSONObject = {}
  ): Promise<Answer> => {
    const answer = await act(serviceManager.kernels, kernelId, name, given);
    await watch.refresh();
    return answer;
  };

  const inNotebook = (
    kernelId: string,
    work: (panel: NotebookPanel) => Promise<void>
  ): void => {
    notebookOf(kernelId)
      .then(panel => (panel ? work(panel) : undefined))
      .catch((error: unknown) => {
        Notification.error(messageOf(error), { autoClose: 5000 });
      });
  };

  const deeds: Deeds = {
    act: perform,
    open: kernelId => {
      inNotebook(kernelId, panel => {
        shell.activateById(panel.id);
        return Promise.resolve();
      });
    },
    showTab: (kernelId, model) => {
      const path = notebooks().get(kernelId);
      if (path !== undefined) {
        void commands.execute(commandIds.tab, { path, model });
      }
    },
    insertPanel: (kernelId, model) => {
      inNotebook(kernelId, panel => insert(panel, panelOf(model), true));
    },
    insertCode: (kernelId, code) => {
      inNotebook(kernelId, panel => insert(panel, code, false));
    },
    share: kernelId => {
      void share(given => perform(kernelId, 'share', given));
    },
    create: () => {
      void commands.execute(commandIds.create);
    }
  };

  // -- sidebar and status bar ---------------------------------------------------------------------

  const sidebar = new InferenceSidebar({ watch, current, notebooks, deeds });
  shell.add(sidebar, 'left', { rank: 350, type: 'Inference' });
  restorer?.add(sidebar, sidebar.id);
  tracker.currentChanged.connect(() => {
    sidebar.update();
    commands.notifyCommandChanged();
  });
  serviceManager.sessions.runningChanged.connect(() => {
    if (sidebar.isVisible) {
      void watch.refresh();
    }
  });

  const show = (): void => {
    shell.activateById(sidebar.id);
  };
  const status = new InferenceStatus(watch, show);
  let statusItem: { dispose(): void } | null = null;
  const showStatus = (wanted: boolean): void => {
    if (wanted && !statusItem) {
      statusItem =
        statusBar?.registerStatusItem('inferkit-lab:status', {
          item: status,
          align: 'right',
          rank: 20
        }) ?? null;
    } else if (!wanted) {
      statusItem?.dispose();
      statusItem = null;
    }
  };

  const configure = (found: ISettingRegistry.ISettings | null): void => {
    sidebar.interval = number(found, 'sidebarSeconds', 1) * SECOND;
    status.interval = number(found, 'statusSeconds', 5) * SECOND;
    showStatus(found?.get('statusBar').composite !== false);
  };
  if (settings) {
    settings.load(inference.id).then(
      found => {
        configure(found);
        found.changed.connect(configure);
      },
      (error: unknown) => {
        console.error(
          'The settings of inferkit-lab could not be loaded.',
          error
        );
        configure(null);
      }
    );
  } else {
    configure(null);
  }

  // -- commands -----------------------------------------------------------------------------------

  const hasNotebook = (): boolean => tracker.currentWidget !== null;

  /** Hide the side that the sidebar is on. */
  const collapse = (lab: ILabShell): void => {
    if ([...lab.widgets('right')].includes(sidebar)) {
      lab.collapseRight();
    } else {
      lab.collapseLeft();
    }
  };

  commands.addCommand(commandIds.show, {
    label: 'Show Inference',
    caption: 'Models, devices and latency of all kernels',
    icon: inferenceIcon,
    isToggled: () => sidebar.isVisible,
    execute: () => {
      if (sidebar.isVisible && labShell) {
        collapse(labShell);
      } else {
        show();
      }
    }
  });
  commands.addCommand(commandIds.load, {
    label: 'Load a Model…',
    caption: "Load a model into the notebook's kernel",
    isEnabled: hasNotebook,
    execute: () => {
      show();
      sidebar.askForModel();
    }
  });
  commands.addCommand(commandIds.panel, {
    label: args => (args['toolbar'] ? '' : 'Insert the Panel'),
    caption: 'Insert the inference panel below, and run it',
    icon: args => (args['toolbar'] ? inferenceIcon : undefined),
    isEnabled: hasNotebook,
    execute: async () => {
      if (tracker.currentWidget) {
        await insert(tracker.currentWidget, PANEL, true);
      }
    }
  });
  commands.addCommand(commandIds.tab, {
    label: 'Open the Panel in a Tab',
    caption: "The panel of the notebook's model, in a tab of its own",
    isEnabled: args => Boolean(args['path']) || hasNotebook(),
    execute: async args => {
      const path =
        (args['path'] as string | undefined) ??
        tracker.currentWidget?.context.path;
      if (path === undefined) {
        return;
      }
      let model = args['model'] as string | undefined;
      if (model === undefined) {
        const panel = tracker.find(one => one.context.path === path);
        const kernelId = kernelOf(panel ?? null);
        await watch.refresh();
        model = known(kernelId)?.state?.models.at(-1)?.name ?? '';
      }
      const options: TabOptions = { path, model };
      const former = tabs.find(tab => tab.id === PanelTab.idOf(options));
      const tab =
        former ??
        new PanelTab(
          options,
          tracker.restored.then(() => opened(path))
        );
      if (former) {
        former.again();
      } else {
        tab.moved.connect(() => {
          void tabs.save(tab); // or it would open a notebook that is no longer there
        });
        // Beside the notebooks, and two of them in one place.
        const other = tabs.find(one => one.isAttached);
        void tabs.add(tab);
        shell.add(tab, 'main', {
          ...(other
            ? { mode: 'tab-after', ref: other.id }
            : { mode: 'split-right' }),
          activate: false
        });
      }
      shell.activateById(tab.id);
    }
  });
  commands.addCommand(commandIds.stop, {
    label: 'Stop All Requests',
    caption: "Stop the requests of all models of the notebook's kernel",
    isEnabled: hasNotebook,
    execute: async () => {
      const kernelId = current()?.kernelId;
      if (kernelId !== undefined) {
        await watch.refresh();
        // A kernel without inferkit is not asked, for it would have to import it.
        const { text, ok } = without(kernelId)
          ? { text: 'Nothing is running.', ok: true }
          : await perform(kernelId, 'stop');
        Notification.emit(text, ok ? 'success' : 'error', { autoClose: 3000 });
      }
    }
  });
  commands.addCommand(commandIds.share, {
    label: 'Share Experiment…',
    caption:
      'Save the experiment of the notebook, and make the link that opens it on Binder',
    isEnabled: hasNotebook, // the kernel knows whether there is one
    execute: () => {
      const kernelId = current()?.kernelId;
      if (kernelId !== undefined) {
        deeds.share(kernelId);
      }
    }
  });
  commands.addCommand(commandIds.create, {
    label: args =>
      args['launcher'] ? 'New inference notebook' : 'New Inference Notebook',
    caption: 'A notebook with the panel and a prompt',
    icon: inferenceIcon,
    execute: async args => {
      const made = (await commands.execute('notebook:create-new', {
        cwd: args['cwd'] ?? '',
        kernelName: serviceManager.kernelspecs.specs?.default ?? 'python3'
      })) as NotebookPanel;
      await made.context.ready;
      await made.sessionContext.ready;
      for (const [index, source] of FIRST_CELLS.entries()) {
        if (index > 0) {
          NotebookActions.insertBelow(made.content);
        }
        made.content.activeCell?.model.sharedModel.setSource(source);
      }
      made.content.activeCellIndex = 0;
      await NotebookActions.runCells(
        made.content,
        made.content.widgets.slice(0, 2),
        made.sessionContext
      );
      made.content.activeCellIndex = 2;
    }
  });

  for (const command of Object.values(commandIds)) {
    palette?.addItem({ command, category: CATEGORY });
  }
  launcher?.add({
    command: commandIds.create,
    category: 'Notebook',
    kernelIconUrl: launcherIcon, // where cards have a letter otherwise
    rank: 10,
    args: { launcher: true }
  });
  void restorer?.restore(tabs, {
    command: commandIds.tab,
    args: tab => ({ ...tab.options }),
    name: tab => tab.id
  });
}

const PANEL = 'import inferkit as ik\n\nik.Panel()';

/** Code that shows the panel of a model; strings of JSON are strings of Python. */
function panelOf(model: string): string {
  const name = JSON.stringify(model);
  return `import inferkit as ik\n\nik.Panel({m.name: m for m in ik.models()}[${name}])`;
}

function number(
  settings: ISettingRegistry.ISettings | null,
  name: string,
  otherwise: number
): number {
  const value = settings?.get(name).composite;
  return typeof value === 'number' ? value : otherwise;
}
