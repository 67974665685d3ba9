// Writes src/schema.ts from the JSON Schema that the Python package makes of its structures.
// The shapes below the types are for src/server.ts, which looks whether an answer is of them.
// With --check it only tells, by its exit status, whether the file is what it would write.
import { readFileSync, writeFileSync } from 'node:fs';
import { compile } from 'json-schema-to-typescript';

const source = new URL(
  '../../../inferkit/lab/schemas/state-1.json',
  import.meta.url
);
const target = new URL('../src/schema.ts', import.meta.url);

const { $defs } = JSON.parse(readFileSync(source, 'utf8'));
const shapes = Object.entries($defs).map(
  ([name, { type, required, properties }]) =>
    `  ${name}: ${JSON.stringify({ type, required, properties })}`
);
const types = await compile({ ...$defs.Report, $defs }, 'Report', {
  additionalProperties: false,
  bannerComment:
    '// Made by `jlpm types` from inferkit/lab/schemas/state-1.json: change inferkit/lab/schema.py.',
  style: { singleQuote: true, trailingComma: 'none' }
});
const made = `${types}\nexport const shapes = {\n${shapes.join(',\n')}\n} as const;\n`;
if (process.argv.includes('--check')) {
  if (readFileSync(target, 'utf8') !== made) {
    console.error(
      'src/schema.ts is not what the schema gives: run `jlpm types`.'
    );
    process.exit(1);
  }
} else {
  writeFileSync(target, made);
}
