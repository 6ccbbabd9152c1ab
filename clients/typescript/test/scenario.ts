import type * as Regcred from "@regcred/client";

/** What the scenario needs of its environment. */
export interface Environment {
  api: string;
  key: string;
  /** Prefix of the names that the scenario creates. */
  prefix: string;
  kubeconfig: string;
  registryA: string;
  registryB: string;
}

/** What the scenario saw. */
export interface Observed {
  secretKeys: string[];
  collision: { isCollision: boolean; isOther: boolean; status: number; title: string };
  stale: boolean;
  missing: { name: string; message: string; isNotFound: boolean };
  names: string[];
  requestsOfPages: number;
  changes: string[];
  events: { event: string; settled: boolean; desired: number; synced: number }[];
  waited: { synced: number; applied: string | null };
  keys: (string | null)[];
}

/**
 * Does what a dashboard does, in Node.js and in a page: it must be self-contained, because its text is sent to the page.
 */
export async function scenario(regcred: typeof Regcred, environment: Environment): Promise<Observed> {
  const { createClient, events, ifMatch, isProblem, pages, unwrap } = regcred;
  const { api, key, prefix, kubeconfig, registryA, registryB } = environment;
  const sent: Request[] = [];
  const client = createClient({
    baseUrl: api,
    token: async () => key,
    fetch: (request) => {
      sent.push(request.clone());
      return fetch(request);
    },
  });

  // The main job: two accounts in, one Secret out.
  const account = (name: string, registry: string, password: string) => ({
    name: `${prefix}-${name}`,
    registry,
    username: "martin",
    password,
    labels: { suite: prefix },
    plainHttp: true,
  });
  const first = await unwrap(client.POST("/v1/registry-accounts", { body: account("a", registryA, "xxx1") }));
  await unwrap(client.POST("/v1/registry-accounts", { body: account("b", registryB, "xxx2") }));
  await unwrap(client.POST("/v1/clusters", { body: { name: prefix, kubeconfig } }));
  const accounts = [`${prefix}-a`, `${prefix}-b`];
  const secret = await unwrap(
    client.POST("/v1/clusters/{cluster}/namespaces/{namespace}/secrets", {
      params: { path: { cluster: prefix, namespace: "default" } },
      body: { name: `${prefix}-pull`, accounts },
    }),
  );

  // A problem is a typed error.
  await unwrap(client.POST("/v1/registry-accounts", { body: account("c", registryA, "xxx3") }));
  const collided = await client.POST("/v1/docker-configs", { body: { accounts: [accounts[0]!, `${prefix}-c`] } });
  const collision = {
    isCollision: isProblem(collided.error, "key-collision"),
    isOther: isProblem(collided.error, "not-found"),
    status: collided.error?.status ?? 0,
    title: collided.error?.title ?? "",
  };

  // The second editor of a version gets 412.
  const change = { params: { path: { name: first.name }, header: ifMatch(first) }, body: { password: "xxx4" } };
  await unwrap(client.PATCH("/v1/registry-accounts/{name}", change));
  const stale = isProblem((await client.PATCH("/v1/registry-accounts/{name}", change)).error, "stale-version");
  const missing = await unwrap(
    client.GET("/v1/registry-accounts/{name}", { params: { path: { name: `${prefix}-missing` } } }),
  ).catch((error: Error) => ({ name: error.name, message: error.message, isNotFound: isProblem(error, "not-found") }));
  if (!("isNotFound" in missing)) throw new Error("a missing account was found");

  // All pages of a list.
  const before = sent.length;
  const names: string[] = [];
  const query = { limit: 2, label: [`suite=${prefix}`] };
  for await (const item of pages(client, "/v1/registry-accounts", { params: { query } })) names.push(item.name);
  const requestsOfPages = sent.length - before;

  // The stream of all resources: the first event asks to load, the others name what changed since.
  const signal = AbortSignal.timeout(60_000);
  const changes: string[] = [];
  const kinds = { query: { kind: ["registryAccount" as const] } };
  for await (const { data } of events(client, "/v1/events", { params: kinds, signal })) {
    const renamed = { params: { path: { name: `${prefix}-c` } }, body: { username: "other" } };
    if (data.kind === "reset") await unwrap(client.PATCH("/v1/registry-accounts/{name}", renamed));
    if (data.kind !== "registryAccount" || data.name !== `${prefix}-c`) continue;
    changes.push(`${data.change} ${data.version}`);
    break;
  }

  // Events until the pull secret is settled, then a read that waits.
  const path = { name: prefix };
  const declaration = {
    accounts,
    secret: { name: `${prefix}-declared` },
    targets: [{ cluster: prefix, namespaces: ["default", "kube-public"] }],
  };
  await unwrap(client.PUT("/v1/pull-secrets/{name}", { params: { path }, body: declaration }));
  const seen: Observed["events"] = [];
  for await (const { event, data } of events(client, "/v1/pull-secrets/{name}/events", { params: { path }, signal })) {
    seen.push({ event, settled: data.settled, desired: data.status.desired, synced: data.status.synced });
    if (data.settled) break;
  }
  const header = { Prefer: "wait=30" };
  const read = await client.GET("/v1/pull-secrets/{name}", { params: { path, header } });
  const waited = {
    synced: (await unwrap(read)).status.synced,
    applied: read.response.headers.get("Preference-Applied"),
  };
  return {
    secretKeys: secret.keys,
    collision,
    stale,
    missing,
    names,
    requestsOfPages,
    changes,
    events: seen,
    waited,
    keys: sent.filter(({ method }) => method === "POST").map(({ headers }) => headers.get("Idempotency-Key")),
  };
}
