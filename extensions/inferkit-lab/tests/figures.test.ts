import { expect, test } from 'vitest';
import { bytes, figure, spark, summary } from '../src/figures';
import type { History } from '../src/schema';
import { kernel, model, state } from './states';

const history = (changes: Partial<History>): History => ({
  end: 1000,
  seconds: 1,
  itl: [],
  ttft: [],
  tokens: [],
  ...changes
});

test('a sparkline has a path for each unbroken stretch, newest at the right', () => {
  const itl = [10, 20, null, 20];
  const { lines, areas, top } = spark(
    history({ itl, ttft: [null, null, null, null] }),
    1000,
    60,
    20
  );
  expect(lines).toEqual(['M56.5 11.2L57.5 3.3', 'M59.5 3.3h1.5']);
  expect(areas[0]).toBe(`${lines[0] ?? ''}V20H56.5z`);
  expect(top).toBeCloseTo(23);
});

test('a sparkline moves on without new tokens, and out of the box', () => {
  const found = history({ itl: [10], ttft: [5] });
  expect(spark(found, 1030, 60, 20).lines[0]).toMatch(/^M29\.5 /);
  expect(spark(found, 1030, 60, 20).dots[0]?.[0]).toBe(29.5);
  expect(spark(found, 1070, 60, 20)).toMatchObject({ lines: [], dots: [] });
});

test('numbers have three digits or so', () => {
  const shown = [null, 0, 0.5, 12.34, 123.4].map(figure);
  expect(shown).toEqual(['–', '0', '0.50', '12.3', '123']);
  expect(bytes(2 ** 29)).toBe('512 MiB');
  expect(bytes(1.5 * 2 ** 30)).toBe('1.5 GiB');
});

test('the status bar tells the fullest device and the sum of all rates', () => {
  const found = state(
    kernel('a', model({ rate: 10 })),
    kernel('b', model({ rate: 2.5 }))
  );
  const [cpu] = state().devices;
  if (!cpu) {
    throw new Error('no device');
  }
  const gpu = { ...cpu, name: 'cuda:0', used: 15 * 2 ** 30 };
  gpu.kernels = [{ kernel_id: 'a', used: 2 ** 30 }];
  expect(summary({ ...found, devices: [...found.devices, gpu] }).text).toBe(
    'cuda:0 15.0/16.0 GiB · 12.5 tok/s'
  );
  expect(summary(state()).text).toBe('cpu 8.0/16.0 GiB · no model');
});

test('the status bar tells of kernels on another machine', () => {
  const alone = summary({ ...state(), out_of_sight: ['a'] });
  expect(alone.text).toBe('cpu 8.0/16.0 GiB · 1 kernel out of sight');
  expect(alone.title).toContain(
    '0 models in 0 kernels, and 1 kernel out of sight on another machine;'
  );
  const beside = state(kernel('c', model({ rate: 10 })));
  expect(summary({ ...beside, out_of_sight: ['a', 'b'] }).text).toBe(
    'cpu 8.0/16.0 GiB · 10.0 tok/s · 2 kernels out of sight'
  );
});
