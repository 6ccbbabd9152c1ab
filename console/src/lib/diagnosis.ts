import type { Diagnosis, PullFix } from "./types.ts";

/** Permission that carrying out a fix requires, by its type. Other fixes cannot be carried out. */
const PERMISSIONS: Partial<Record<PullFix["type"], string>> = {
  createSecret: "deliverSecrets",
  attachServiceAccount: "writePullSecrets",
  syncPullSecret: "writePullSecrets",
};

/** Fixes of the pod and of its images, each change once: of several fixes for one Secret, the first is carried out. */
export function applicableFixes({ problems, images }: Diagnosis): PullFix[] {
  const all = [...problems, ...images].flatMap(({ fix }) => (fix?.applicable ? [fix] : []));
  const key = ({ type, secret, description }: PullFix): string => `${type} ${secret ?? description}`;
  return all.filter((fix, at) => all.findIndex((other) => key(other) === key(fix)) === at);
}

/** Whether a caller may carry out all of the fixes. regcred refuses to carry out some of them only. */
export function mayApply(fixes: PullFix[], can: (permission: string) => boolean): boolean {
  return fixes.length > 0 && fixes.every(({ type }) => can(PERMISSIONS[type] ?? ""));
}

/** A request as a line that names it. */
export function requestLine(
  method: string,
  path: string,
  headers: Record<string, string> | undefined,
  body: unknown,
): string {
  const sent = Object.entries(headers ?? {}).map(([name, value]) => ` -H '${name}: ${value}'`);
  return `${method} ${path}${sent.join("")}${body ? ` ${JSON.stringify(body)}` : ""}`;
}
