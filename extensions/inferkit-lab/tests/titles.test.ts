import { expect, test } from 'vitest';
import { colorsOf } from '../src/colors';
import { titlesOf } from '../src/titles';

function titles(...paths: string[]): string[] {
  const known = paths.map((path, index) => [String(index), path] as const);
  return [...titlesOf(new Map(known)).values()];
}

test('notebooks of the same name are told apart by their folders', () => {
  expect(titles('a/x.ipynb', 'b/y.ipynb', '')).toEqual([
    'x.ipynb',
    'y.ipynb',
    'kernel 2'
  ]);
  expect(titles('x.ipynb', 'a/x.ipynb', 'c/b/x.ipynb', 'd/b/x.ipynb')).toEqual([
    'x.ipynb',
    'x.ipynb in a',
    'x.ipynb in c/b',
    'x.ipynb in d/b'
  ]);
  expect(titles('a/x.ipynb', 'b/a/x.ipynb', '/b/a/x.ipynb')).toEqual([
    'x.ipynb in a',
    'x.ipynb in b/a',
    'x.ipynb in /b/a'
  ]);
});

test('a kernel keeps its colour when others come and go', () => {
  const first = colorsOf(['b', 'c'], new Map());
  expect([...first.values()]).toEqual([0, 1]);
  const then = colorsOf(['a', 'c', 'd'], first);
  expect(then.get('c')).toBe(1);
  expect(new Set(then.values()).size).toBe(3);
  const many = Array.from({ length: 12 }, (_, index) => String(index));
  const counts = [...colorsOf(many, new Map()).values()];
  expect(counts.filter(color => color === 5)).toHaveLength(2);
});
