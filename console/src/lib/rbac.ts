import type { MissingRight } from "./types.ts";

/** Subject that receives rights in a cluster. */
export interface Subject {
  namespace: string;
  name: string;
}

/**
 * Manifests that grant missing rights: a Role per namespace, and a ClusterRole for rights in no namespace. Rights with the
 * same verbs share a rule.
 */
export function rbacYaml(missing: MissingRight[], subject: Subject | null): string {
  const namespaces = [...new Set(missing.map((right) => right.namespace))].sort((a, b) => (a ?? "").localeCompare(b ?? ""));
  const who = subject ?? { namespace: "NAMESPACE", name: "SERVICE_ACCOUNT" };
  return namespaces
    .map((namespace) => manifest(missing.filter((right) => right.namespace === namespace), namespace, who))
    .join("---\n");
}

function manifest(rights: MissingRight[], namespace: string | null, subject: Subject): string {
  const kind = namespace === null ? "ClusterRole" : "Role";
  const metadata = namespace === null ? "{name: regcred}" : `{name: regcred, namespace: ${namespace}}`;
  return `apiVersion: rbac.authorization.k8s.io/v1
kind: ${kind}
metadata: ${metadata}
rules:
${rules(rights)}---
apiVersion: rbac.authorization.k8s.io/v1
kind: ${kind}Binding
metadata: ${metadata}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ${kind}, name: regcred}
subjects:
  - {kind: ServiceAccount, namespace: ${subject.namespace}, name: ${subject.name}}
`;
}

function rules(rights: MissingRight[]): string {
  const verbs = new Map<string, Set<string>>();
  for (const { resource, name, verb } of rights) {
    const names = name === null ? "" : `, resourceNames: [${name}]`;
    const rule = `resources: [${resource}]${names}`;
    verbs.set(rule, (verbs.get(rule) ?? new Set()).add(verb));
  }
  return [...verbs].map(([rule, of]) => `  - {apiGroups: [""], ${rule}, verbs: [${[...of].join(", ")}]}\n`).join("");
}
