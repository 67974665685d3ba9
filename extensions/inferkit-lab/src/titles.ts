import type { Kernel } from './schema';

/** The paths of kernels' notebooks, by kernel; '' where none is known. */
export function pathsOf(
  kernels: readonly Kernel[],
  notebooks: ReadonlyMap<string, string>
): Map<string, string> {
  return new Map(
    kernels.map(({ kernel_id: id, state }) => [
      id,
      notebooks.get(id) ?? state?.notebook ?? ''
    ])
  );
}

/** What kernels are called: their notebooks' names, with as much of the folder as tells them apart. */
export function titlesOf(
  paths: ReadonlyMap<string, string>
): Map<string, string> {
  const named = new Map<string, string[]>();
  for (const path of new Set(paths.values())) {
    const name = nameOf(path);
    named.set(name, [...(named.get(name) ?? []), path]);
  }
  const title = (id: string, path: string): string => {
    if (!path) {
      return `kernel ${id.slice(0, 8)}`;
    }
    const name = nameOf(path);
    const folder = folderAmong(path, named.get(name) ?? []);
    return folder ? `${name} in ${folder}` : name;
  };
  return new Map([...paths].map(([id, path]) => [id, title(id, path)]));
}

function nameOf(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1);
}

/** The last folders of a path, as many as no other path ends with. */
function folderAmong(path: string, all: readonly string[]): string {
  const parts = path.split('/');
  for (let count = 1; count < parts.length; count++) {
    const end = `/${parts.slice(-count).join('/')}`;
    if (all.filter(other => `/${other}`.endsWith(end)).length === 1) {
      return parts.slice(-count, -1).join('/');
    }
  }
  return parts.slice(0, -1).join('/');
}
