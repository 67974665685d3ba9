import { Clipboard, Dialog, showDialog } from '@jupyterlab/apputils';
import { Widget } from '@lumino/widgets';
import type { Answer } from './schema';

/**
 * Share an experiment, and show where it was saved, and the link that opens it.
 *
 * @param ask - Has the kernel do it, and gives its answer.
 */
export async function share(
  ask: (given: { end: boolean }) => Promise<Answer>
): Promise<void> {
  let answer = await ask({ end: false });
  if (answer.kind === 'StillRecording') {
    const { button } = await showDialog({
      title: 'Share experiment',
      body: answer.text,
      buttons: [
        Dialog.cancelButton(),
        Dialog.okButton({ label: 'End and share' })
      ]
    });
    if (!button.accept) {
      return;
    }
    answer = await ask({ end: true });
  }
  await showShared(answer);
}

async function showShared(answer: Answer): Promise<void> {
  const body = new Widget();
  body.addClass('jp-Inferkit-shared');
  const add = (tag: string, text: string, within = body.node): HTMLElement => {
    const element = document.createElement(tag);
    element.textContent = text;
    within.append(element);
    return element;
  };
  add('p', answer.text);
  if (answer.link) {
    const link = add('a', answer.link) as HTMLAnchorElement;
    link.href = answer.link;
    link.target = '_blank';
    link.rel = 'noopener';
  }
  if (answer.notes.length > 0) {
    const list = add('ul', '');
    for (const note of answer.notes) {
      add('li', note, list);
    }
  }
  if (answer.details) {
    const details = add('details', '');
    add('summary', 'Details', details);
    add('pre', answer.details, details).className = 'jp-Inferkit-details';
  }
  const buttons = [Dialog.okButton({ label: 'Close' })];
  if (answer.link) {
    buttons.unshift(Dialog.createButton({ label: 'Copy link', accept: false }));
  }
  const { button } = await showDialog({
    title: answer.ok ? 'Share experiment' : 'Nothing was shared',
    body,
    buttons
  });
  if (button.label === 'Copy link') {
    Clipboard.copyToSystem(answer.link);
  }
}
