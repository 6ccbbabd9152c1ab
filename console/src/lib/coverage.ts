import { to } from "./router.svelte.ts";
import type { CoverageGroup, PullVerdict } from "./types.ts";

/** Views of the coverage of a cluster, in their order. */
export const VIEWS = ["drawing", "groups", "secrets", "accounts"] as const;
export type View = (typeof VIEWS)[number];

/** Verdicts that a group can have. */
export const VERDICTS: PullVerdict[] = [
  "ok",
  "noSecret",
  "secretMissing",
  "secretUnreadable",
  "noMatchingEntry",
  "credentialInvalid",
  "noAccess",
  "imageNotFound",
  "registryUnreachable",
  "rateLimited",
  "tlsError",
  "architectureMismatch",
  "unknown",
];

/** Address of a view of the coverage of a cluster. */
export function coverageHref(cluster: string, values: Record<string, string> = {}): string {
  return `${to("doctor", "coverage")}?${new URLSearchParams({ cluster, ...values })}`;
}

/** Address of the diagnosis of the workload that a group names; `null` for one that the doctor does not know. */
export function exampleHref(cluster: string, { namespace, example }: CoverageGroup): string | null {
  if (!example || example.kind === "other") return null;
  return `${to("doctor")}?${new URLSearchParams({ cluster, namespace, of: example.kind, name: example.name })}`;
}
