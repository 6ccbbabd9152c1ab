import type { CoverageGroup, CoverageUserCount, PullVerdict } from "./types.ts";

/** Number of workloads of all kinds. */
export function workloadsOf(counts: CoverageUserCount[]): number {
  return counts.reduce((sum, { count }) => sum + count, 0);
}

/** Columns of the drawing, from the login to what depends on it. */
export const COLUMNS = ["account", "secret", "namespace", "workload"] as const;
export type Column = (typeof COLUMNS)[number];

export interface DrawnNode {
  id: string;
  column: Column;
  text: string;
  /** Nodes that it stands for: several if there is no place for them. */
  count: number;
  /** Those of them that the selected account reaches. */
  reached: number;
  verdict: PullVerdict | null;
}

export interface DrawnEdge {
  id: string;
  from: string;
  to: string;
  isReached: boolean;
}

/** Way of a login to a workload. Without a login, or with one of another client, its begin is missing. */
export interface Way {
  account: string | null;
  secret: string | null;
  namespace: string;
  workload: string;
  verdict: PullVerdict;
}

export interface Drawing {
  columns: Record<Column, DrawnNode[]>;
  edges: DrawnEdge[];
  ways: Way[];
}

/**
 * Draws which accounts reach which workloads: at most `limit` nodes per column, and one that stands for all others. Nodes
 * that the selected account reaches are shown before others.
 */
export function draw(groups: CoverageGroup[], selected: string, limit = 12): Drawing {
  const ways = waysOf(groups);
  const nodes = new Map<string, DrawnNode & { weight: number }>();
  for (const way of ways) {
    for (const column of COLUMNS) {
      const text = way[column];
      if (text === null) continue;
      const id = idOf(way, column, text);
      const node = nodes.get(id) ?? { id, column, text, count: 1, reached: 0, verdict: null, weight: 0 };
      node.weight++;
      if (isReached(way, selected)) node.reached = 1;
      if (column === "workload") node.verdict = worse(node.verdict, way.verdict);
      nodes.set(id, node);
    }
  }
  const columns = {} as Record<Column, DrawnNode[]>;
  const places = new Map<string, string>();
  for (const column of COLUMNS) {
    const all = [...nodes.values()].filter((node) => node.column === column);
    const ranked = all.toSorted((a, b) => b.reached - a.reached || b.weight - a.weight || compare(a.text, b.text));
    const rest = ranked.slice(limit);
    const shown: DrawnNode[] = all.filter((node) => !rest.includes(node));
    for (const { id } of shown) places.set(id, id);
    for (const { id } of rest) places.set(id, `${column}:`);
    if (rest.length > 0) {
      shown.push({ id: `${column}:`, column, text: "", count: rest.length, reached: rest.filter(({ reached }) => reached > 0).length, verdict: null });
    }
    columns[column] = shown;
  }
  const edges = edgesOf(ways, selected, places);
  arrange(columns, edges);
  return { columns, edges, ways };
}

/** Workloads of different namespaces may have one name. */
function idOf({ namespace }: Way, column: Column, text: string): string {
  return column === "workload" ? `${column}:${namespace}/${text}` : `${column}:${text}`;
}

function waysOf(groups: CoverageGroup[]): Way[] {
  return groups.map((group) => {
    const more = workloadsOf(group.workloads) - 1;
    const name = group.example ? `${group.example.kind} ${group.example.name}` : (group.repository ?? "?");
    const { credential, namespace, verdict } = group;
    // The name first: a long text is cut.
    const secret = credential ? `${credential.secret} · ${namespace}` : null;
    return { account: credential?.account ?? null, secret, namespace, workload: more > 0 ? `${name} +${more}` : name, verdict };
  });
}

export function isReached(way: Way, selected: string): boolean {
  return selected !== "" && way.account === selected;
}

function worse(one: PullVerdict | null, other: PullVerdict): PullVerdict {
  return one === null || one === "ok" ? other : one;
}

function edgesOf(ways: Way[], selected: string, places: Map<string, string>): DrawnEdge[] {
  const edges = new Map<string, DrawnEdge>();
  for (const way of ways) {
    const ids = COLUMNS.map((column) => {
      const text = way[column];
      return text === null ? undefined : places.get(idOf(way, column, text));
    });
    for (let at = 1; at < ids.length; at++) {
      const [from, to] = [ids[at - 1], ids[at]];
      if (!from || !to) continue;
      const id = `${from} ${to}`;
      const edge = edges.get(id) ?? { id, from, to, isReached: false };
      edge.isReached ||= isReached(way, selected);
      edges.set(id, edge);
    }
  }
  // Those that are reached are drawn last, above the others.
  return [...edges.values()].sort((a, b) => Number(a.isReached) - Number(b.isReached));
}

/** Orders each column by the places of what leads to it, so that few lines cross. What stands for others is last. */
function arrange(columns: Record<Column, DrawnNode[]>, edges: DrawnEdge[]): void {
  let before = new Map<string, number>();
  for (const column of COLUMNS) {
    const isLast = ({ text }: DrawnNode): number => (text === "" ? 1 : 0);
    const middle = (node: DrawnNode): number => {
      const from = edges.filter(({ to }) => to === node.id).flatMap(({ from }) => before.get(from) ?? []);
      return from.length === 0 ? Infinity : from.reduce((sum, one) => sum + one, 0) / from.length;
    };
    const middles = new Map(columns[column].map((node) => [node.id, middle(node)]));
    const place = (node: DrawnNode): number => middles.get(node.id) ?? Infinity;
    columns[column].sort((a, b) => isLast(a) - isLast(b) || order(place(a), place(b)) || compare(a.text, b.text));
    before = new Map(columns[column].map(({ id }, at) => [id, at]));
  }
}

/** Infinities are equal to each other, which their difference does not say. */
function order(a: number, b: number): number {
  return a === b ? 0 : a - b;
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}
