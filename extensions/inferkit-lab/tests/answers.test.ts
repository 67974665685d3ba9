import { ServerConnection } from '@jupyterlab/services';
import { expect, test } from 'vitest';
import { answerOf, expression, failureOf, lackOf } from '../src/answers';
import { checked, fetchState } from '../src/server';
import { kernel, model, state } from './states';

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
  expect(lackOf(missing, VERSION)).toMatch(/0\.1\.0 or later/);
  expect(lackOf(other, VERSION)).toBe('');
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

test('a state that lacks something, anywhere, is that of an older server', () => {
  const whole = state(
    kernel(
      'a',
      model({
        history: { end: 1, seconds: 1, itl: [null], ttft: [1], tokens: [2] }
      })
    ),
    { ...kernel('b'), state: null, problem: 'Upgrade it.' }
  );
  expect(checked({ ...whole, added: 1 })).toMatchObject(whole);
  const told = JSON.stringify(whole);
  const fields = [
    'kernels',
    'time',
    'utilization',
    'problem',
    'models',
    'actions',
    'modes',
    'ttft'
  ];
  for (const field of fields) {
    const lacking: unknown = JSON.parse(
      told.replaceAll(`"${field}":`, '"other":')
    );
    expect(() => checked(lacking), field).toThrow(
      "The server's inferkit is 1.0, older than what this page was loaded with: restart the server."
    );
  }
  expect(() => checked({ ...whole, kernels: {} })).toThrow(
    'restart the server'
  );
  expect(() => checked({ ...whole, kernels: [null] })).toThrow('restart');
});

test('what is not an answer of inferkit is said to be none', async () => {
  const answered = (body: string): Promise<unknown> =>
    fetchState(
      ServerConnection.makeSettings({
        fetch: () => Promise.resolve(new Response(body))
      })
    );
  expect(await answered(JSON.stringify(state()))).toEqual(state());
  for (const body of ['<html>Log in</html>', '', 'null', '[]', '{"a": 1}']) {
    await expect(answered(body), body).rejects.toThrow(
      "not that of inferkit's server, but perhaps a page to log in: reload the page."
    );
  }
});
