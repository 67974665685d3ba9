import { act } from 'react';
import { createRoot } from 'react-dom/client';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { Answer, State } from '../src/schema';
import type { Deeds } from '../src/deeds';
import { Sidebar } from '../src/view';
import { kernel, model, state } from './states';

const done: Answer = {
  ok: true,
  text: 'Done.',
  kind: '',
  link: '',
  code: '',
  notes: [],
  details: ''
};

let place: HTMLElement;
let root: ReturnType<typeof createRoot>;
let deeds: { [name in keyof Deeds]: ReturnType<typeof vi.fn> };

beforeEach(() => {
  Object.assign(globalThis, { IS_REACT_ACT_ENVIRONMENT: true });
  place = document.body.appendChild(document.createElement('div'));
  root = createRoot(place);
  deeds = {
    act: vi.fn(() => Promise.resolve(done)),
    open: vi.fn(),
    showTab: vi.fn(),
    insertPanel: vi.fn(),
    insertCode: vi.fn(),
    share: vi.fn(),
    create: vi.fn()
  };
});
afterEach(() => {
  act(() => {
    root.unmount();
  });
  place.remove();
});

function show(found: State | null, error = '', current = 'a'): void {
  const ids = found?.kernels.map(k => k.kernel_id) ?? [];
  act(() => {
    root.render(
      <Sidebar
        seen={{ state: found, error }}
        current={{ kernelId: current, name: `${current}.ipynb` }}
        notebooks={new Map(ids.map(id => [id, `folder/${id}.ipynb`]))}
        deeds={deeds}
        asked={0}
      />
    );
  });
}

const titles = (): (string | null)[] =>
  [...place.querySelectorAll('article')].map(each =>
    each.getAttribute('aria-label')
  );

function button(text: string): HTMLButtonElement {
  const found = [...place.querySelectorAll('button')].find(
    b => b.textContent === text
  );
  if (!found) {
    throw new Error(`no button ${text}`);
  }
  return found;
}

test('says that it looks, what went wrong, and that there is nothing', () => {
  show(null);
  expect(place.textContent).toBe('Looking for models…');
  show(null, 'No server.');
  expect(place.querySelector('[role=alert]')?.textContent).toBe('No server.');
  show(state());
  expect(place.textContent).toContain('No kernel has a model.');
  show(state(kernel('a')), 'Gone.');
  expect(place.textContent).toContain('Gone. What is shown is from before.');
  expect(place.textContent).toContain('No model is loaded.');
});

test('shows the current kernel first, and filters many', () => {
  const many = Array.from({ length: 50 }, (_, i) =>
    kernel(`k${String(i)}`, model())
  );
  show(state(...many), '', 'k30');
  expect(titles()).toHaveLength(50);
  expect(titles()[0]).toBe('k30.ipynb');
  const shown = (): number => place.querySelectorAll('[data-model]').length;
  expect(shown()).toBe(1); // the others are folded up
  const fold = place.querySelectorAll<HTMLElement>('[aria-expanded]')[0];
  act(() => {
    fold?.click();
  });
  expect(shown()).toBe(2);
  expect(fold?.getAttribute('aria-expanded')).toBe('true');
  const field = place.querySelector<HTMLInputElement>('input[type=search]');
  act(() => {
    Object.getOwnPropertyDescriptor(
      HTMLInputElement.prototype,
      'value'
    )?.set?.call(field, 'K49');
    field?.dispatchEvent(new Event('input', { bubbles: true }));
  });
  expect(titles()).toEqual(['k49.ipynb']);
});

test('a choice is sent to the kernel, and a refusal shown', async () => {
  deeds.act.mockResolvedValueOnce({
    ...done,
    ok: false,
    text: 'It does not fit.'
  });
  show(state(kernel('a', model())));
  const choice = place.querySelector<HTMLSelectElement>(
    'select[aria-label="Precision of demo"]'
  );
  await act(async () => {
    Object.getOwnPropertyDescriptor(
      HTMLSelectElement.prototype,
      'value'
    )?.set?.call(choice, 'nf4');
    choice?.dispatchEvent(new Event('change', { bubbles: true }));
    await Promise.resolve();
  });
  expect(deeds.act).toHaveBeenCalledWith('a', 'quantize', {
    model: 'demo',
    mode: 'nf4'
  });
  expect(place.querySelector('[role=alert]')?.textContent).toContain(
    'It does not fit.'
  );
  expect(choice?.value).toBe('none'); // as the kernel is
});

test('a load belongs to its kernel, and leaves those of other notebooks free', async () => {
  let loaded: (answer: Answer) => void = () => undefined;
  deeds.act.mockReturnValueOnce(
    new Promise(resolve => {
      loaded = resolve;
    })
  );
  const both = state(kernel('a'), kernel('b'));
  const box = (): string | null | undefined =>
    place.querySelector('.jp-Inferkit-loader')?.textContent;
  show(both, '', 'a');
  act(() => {
    button('Load').click();
  });
  expect(deeds.act).toHaveBeenCalledWith('a', 'load', expect.anything());
  expect(button('Loading…').disabled).toBe(true);
  show(both, '', 'b');
  expect(button('Load').disabled).toBe(false);
  await act(async () => {
    loaded({ ...done, text: 'Loaded.', code: 'model' });
    await Promise.resolve();
  });
  expect(box()).not.toContain('Loaded.');
  show(both, '', 'a');
  expect(box()).toContain('Loaded.');
  act(() => {
    button('Insert cell').click();
  });
  expect(deeds.insertCode).toHaveBeenCalledWith('a', 'model');
});

test('an action that fails leaves the controls as they were', async () => {
  deeds.act.mockRejectedValueOnce(new Error('The server is gone.'));
  show(state(kernel('a', model())));
  await act(async () => {
    button('Unload').click();
    await Promise.resolve();
  });
  expect(place.querySelector('[role=alert]')?.textContent).toContain(
    'The server is gone.'
  );
  expect(button('Unload').disabled).toBe(false);
});

test('a change goes on while requests are stopped', async () => {
  let changed: (answer: Answer) => void = () => undefined;
  deeds.act.mockReturnValueOnce(
    new Promise(resolve => {
      changed = resolve;
    })
  );
  show(state(kernel('a', model({ running: 1 }))));
  const choose = place.querySelector<HTMLSelectElement>('article select');
  act(() => {
    Object.getOwnPropertyDescriptor(
      HTMLSelectElement.prototype,
      'value'
    )?.set?.call(choose, 'nf4');
    choose?.dispatchEvent(new Event('change', { bubbles: true }));
  });
  await act(async () => {
    button('Stop').click();
    await Promise.resolve();
  });
  expect(deeds.act).toHaveBeenLastCalledWith('a', 'stop', { model: 'demo' });
  expect(choose?.disabled).toBe(true);
  expect(button('Unload').disabled).toBe(true);
  await act(async () => {
    changed({ ...done, ok: false, text: 'It does not fit.' });
    await Promise.resolve();
  });
  expect(choose?.disabled).toBe(false);
  expect(place.querySelector('[role=alert]')?.textContent).toContain(
    'It does not fit.'
  );
});

test('work that can be ended is, by its own button, and a refusal is shown', async () => {
  const one = kernel('a', model());
  const work = [
    { what: 'Loading x', done: 0, total: null, id: 7 },
    { what: 'Changing the batching', done: 0, total: null, id: 0 }
  ];
  show(state({ ...one, state: one.state && { ...one.state, work } }));
  const cancels = (): HTMLButtonElement[] =>
    [...place.querySelectorAll('button')].filter(each =>
      each.textContent?.startsWith('Cancel')
    );
  expect(cancels()).toHaveLength(1);
  const click = async (): Promise<void> => {
    await act(async () => {
      cancels()[0]?.click();
      await Promise.resolve();
    });
  };
  deeds.act.mockResolvedValueOnce({ ...done, ok: false, text: 'It is over.' });
  await click();
  expect(deeds.act).toHaveBeenCalledWith('a', 'cancel', { work: 7 });
  expect(place.querySelector('[role=alert]')?.textContent).toContain(
    'It is over.'
  );
  await click();
  expect(cancels()[0]?.textContent).toBe('Cancelling…');
});

test('what cannot be reached can be watched, and not changed', () => {
  const one = kernel('a', model({ running: 1 }));
  show(state({ ...one, here: false }));
  expect(place.textContent).toContain('elsewhere');
  const controls = [
    ...place.querySelectorAll<HTMLButtonElement>(
      'article select, article button'
    )
  ];
  const enabled = controls
    .filter(control => !control.disabled)
    .map(c => c.textContent);
  expect(enabled).toEqual(['a.ipynb']);
});

test('sharing is hidden where there is nothing to share, or the kernel cannot', () => {
  const one = kernel('a', model());
  const having = (experiment: string | null, actions: string[]): void => {
    show(
      state({
        ...one,
        state: one.state && { ...one.state, experiment, actions }
      })
    );
  };
  having(null, ['share']);
  expect(place.textContent).not.toContain('Share');
  having('mine', []);
  expect(place.textContent).not.toContain('Share');
  having('mine', ['share']);
  act(() => {
    button('Share experiment “mine”').click();
  });
  expect(deeds.share).toHaveBeenCalledWith('a');
});

test('kernels out of sight, and those with a problem, are said to be', () => {
  const bad = { ...kernel('a'), state: null, problem: 'Upgrade it.' };
  show({ ...state(bad), out_of_sight: ['z'] });
  expect(place.textContent).toContain('Upgrade it.');
  expect(place.textContent).toContain(
    '1 kernel runs on another machine and is out of sight'
  );
});

test('among many kernels, one with a problem has nothing to unfold', () => {
  const many = Array.from({ length: 12 }, (_, i) =>
    kernel(`k${String(i)}`, model())
  );
  const bad = { ...kernel('bad'), state: null, problem: 'Upgrade it.' };
  show(state(...many, bad), '', 'k0');
  const row = place.querySelector('[data-kernel=bad]');
  expect(row?.textContent).toContain('Upgrade it.');
  expect(row?.querySelector('[aria-expanded]')).toBeNull();
  const header = row?.querySelector('header');
  expect(header?.title).toMatch(/^folder\/bad\.ipynb\nKernel bad, /);
});

test('memory bars tell in words whose it is', () => {
  show(state(kernel('a', model())));
  expect(
    place.querySelector('.jp-Inferkit-bar')?.getAttribute('aria-label')
  ).toBe('Memory of cpu: a.ipynb 1.0 GiB, other 7.0 GiB, free 8.0 GiB');
});
