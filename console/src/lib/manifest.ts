import type { DiagnoseSpec } from "./types.ts";

/** Pod of a manifest: what a diagnosis needs of it, and the namespace that it names. */
export interface PastedPod {
  namespace: string;
  spec: DiagnoseSpec;
}

type Json = Record<string, unknown>;

/** The pod spec of each kind of manifest. */
const POD_SPEC: Record<string, string[]> = {
  Pod: ["spec"],
  Deployment: ["spec", "template", "spec"],
  ReplicaSet: ["spec", "template", "spec"],
  StatefulSet: ["spec", "template", "spec"],
  DaemonSet: ["spec", "template", "spec"],
  Job: ["spec", "template", "spec"],
  CronJob: ["spec", "jobTemplate", "spec", "template", "spec"],
};

/**
 * Finds the first pod or workload of a manifest in YAML or JSON; `null` if there is none. Only images, names and the
 * architecture are taken: the environment of a container may hold secrets.
 */
export async function readManifest(text: string): Promise<PastedPod | null> {
  // The parser is loaded for a pasted manifest only.
  const { parseAllDocuments } = await import("yaml");
  const documents = parseAllDocuments(text, { strict: false, uniqueKeys: false, logLevel: "silent" });
  for (const document of documents) {
    const value = document.errors.length > 0 ? null : (document.toJS({ maxAliasCount: 100 }) as unknown);
    const items = member(value, "kind") === "List" ? list(member(value, "items")) : [value];
    for (const item of items) {
      const pod = podOf(item);
      if (pod) return pod;
    }
  }
  return null;
}

function podOf(manifest: unknown): PastedPod | null {
  const path = POD_SPEC[text(member(manifest, "kind"))];
  const spec = path?.reduce<unknown>((value, name) => member(value, name), manifest);
  const containers = ["initContainers", "containers", "ephemeralContainers"].flatMap((name) => list(member(spec, name)));
  if (containers.length === 0) return null;
  const account = text(member(spec, "serviceAccountName") ?? member(spec, "serviceAccount"));
  const architecture = text(member(member(spec, "nodeSelector"), "kubernetes.io/arch"));
  return {
    namespace: text(member(member(manifest, "metadata"), "namespace")),
    spec: {
      containers: containers.map((one) => ({ name: text(member(one, "name")), image: text(member(one, "image")) })),
      imagePullSecrets: list(member(spec, "imagePullSecrets")).map((one) => ({ name: text(member(one, "name")) })),
      ...(account && { serviceAccountName: account }),
      ...(architecture && { architecture }),
    },
  };
}

function member(value: unknown, name: string): unknown {
  return typeof value === "object" && value !== null && !Array.isArray(value) ? (value as Json)[name] : undefined;
}

function list(value: unknown): unknown[] {
  return Array.isArray(value) ? value : [];
}

function text(value: unknown): string {
  return typeof value === "string" ? value : "";
}
