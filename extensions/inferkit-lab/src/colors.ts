const COLORS = 6; // see style/base.css

/**
 * Colours of kernels: each keeps its own, whoever comes and goes, and a new one has the rarest.
 *
 * @param ids - The kernels that there are.
 * @param former - The colours until now.
 */
export function colorsOf(
  ids: readonly string[],
  former: ReadonlyMap<string, number>
): Map<string, number> {
  const found = new Map([...former].filter(([id]) => ids.includes(id)));
  const uses = Array.from({ length: COLORS }, () => 0);
  const use = (color: number): void => {
    uses[color] = (uses[color] ?? 0) + 1;
  };
  found.forEach(use);
  for (const id of ids) {
    if (!found.has(id)) {
      const color = uses.indexOf(Math.min(...uses));
      found.set(id, color);
      use(color);
    }
  }
  return found;
}
