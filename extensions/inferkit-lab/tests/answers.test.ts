import { expect, test } from 'vitest';
import { answerOf, expression, failureOf } from '../src/answers';
import { checked } from '../src/server';
import { state } from './states';

const VERSION = { status: 'ok', data: { 'text/plain': "'0.0.9'" } };

test('strings are strings of Python, whatever is in them', () => {
  expect(expression('a.b', 'do', ['x'], { ref: 'it\'s "q" \\ \n' })).toBe(
    '__import__("a.b", fromlist=["do"]).do("x", ' +
      '**__import__("json").loads("{\\"ref\\":\\"it\'s \\\\\\"q\\\\\\" \\\\\\\\ \\\\n\\"}"))'
  );
});

test('the answer is that of the kernel', () => {
  const told = {
    ok: true,
    text: 'Done.',
    kind: '',
    link: '',
    code: '',
    notes: [],
    details: ''
  };
  const data = { 'application/json': told };
  expect(
    answerOf({ answer: { status: 'ok', data }, version: VERSION })
  ).toEqual(told);
});

test('a kernel without inferkit, or with an older one, is told what it needs', () => {
  const missing = {
    status: 'error',
    ename: 'ModuleNotFoundError',
    evalue: 'no'
  };
  expect(answerOf({ answer: missing, version: missing }).text).toContain(
    'inferkit is not installed'
  );
  expect(answerOf({ answer: missing, version: VERSION }).text).toMatch(
    /has inferkit 0\.0\.9, and 0\.1\.0 or later/
  );
  const other = { status: 'error', ename: 'ValueError', evalue: 'odd' };
  expect(answerOf({ answer: other, version: VERSION })).toMatchObject({
    ok: false,
    text: 'ValueError: odd'
  });
  const ended = { status: 'error', ename: 'KeyboardInterrupt', evalue: '' };
  expect(answerOf({ answer: ended, version: VERSION }).text).toBe(
    'The kernel was interrupted.'
  );
});

test('what waited for a cell that failed says so, and an error without words its name', () => {
  expect(failureOf({ status: 'aborted' })).toBe(
    'The cell that ran before failed or was interrupted.'
  );
  const error = { status: 'error', ename: 'AssertionError', evalue: '' };
  expect(failureOf(error)).toBe('AssertionError');
  expect(failureOf({ ...error, evalue: 'odd' })).toBe('odd');
  expect(failureOf({ ...error, ename: 'KeyboardInterrupt' })).toBe(
    'The kernel was interrupted.'
  );
});

test('a state of another version is refused', () => {
  expect(checked(state())).toEqual(state());
  expect(() => checked({ ...state(), version: 0 })).toThrow(
    'restart the server'
  );
  expect(() => checked({ ...state(), version: 9 })).toThrow('reload the page');
});
