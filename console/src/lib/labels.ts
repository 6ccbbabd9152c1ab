/** Labels as people type them: `team=a, tier=prod`. */
export function parseLabels(text: string): Record<string, string> {
  const pairs = text.split(/[\s,]+/).filter(Boolean);
  return Object.fromEntries(pairs.map((pair) => {
    const [key = "", ...value] = pair.split("=");
    return [key, value.join("=")];
  }));
}

export function formatLabels(labels: Record<string, string> | undefined | null): string {
  return Object.entries(labels ?? {}).map(([key, value]) => `${key}=${value}`).join(", ");
}

/** Names as people type them, separated by commas or spaces. */
export function parseNames(text: string): string[] {
  return text.split(/[\s,]+/).filter(Boolean);
}
