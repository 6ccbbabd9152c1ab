// Calls every operation. It is compiled, not run: the types of the generated client must fit ordinary use.
// `make openapi-lint` fails if an operation of the API document is missing here.
import { createClient, events, ifMatch, pages, unwrap } from "@regcred/client";

const client = createClient({ baseUrl: "https://regcred.example.com", token: "rgc_…" });

export async function operation(): Promise<string> {
  await client.GET("/healthz");
  const { ready, rowCache } = await unwrap(client.GET("/readyz"));
  return `${ready} ${rowCache}`;
}

export async function apiKeys(): Promise<void> {
  const { role, permissions } = await unwrap(client.GET("/v1/me"));
  const created = await unwrap(
    client.POST("/v1/api-keys", {
      body: { name: "ci", role: "deliverer", grants: { accounts: ["team-*"], clusters: ["dev"], namespaces: ["a-*"] } },
    }),
  );
  const key: string = created.key;
  const list = await unwrap(client.GET("/v1/api-keys", { params: { query: { limit: 10 } } }));
  const path = { id: list.items[0]?.id ?? created.id };
  const one = await unwrap(client.GET("/v1/api-keys/{id}", { params: { path } }));
  const revoked: string | null = one.revokedAt;
  await client.DELETE("/v1/api-keys/{id}", { params: { path } });
  console.log(role, permissions.length, key.length, revoked);
}

export async function sessions(): Promise<void> {
  const session = await unwrap(client.POST("/v1/sessions"));
  const own = await unwrap(client.GET("/v1/sessions", { params: { query: { all: false } } }));
  for (const { id, current, sourceIp } of own.items) console.log(id, current, sourceIp);
  await client.DELETE("/v1/sessions/{id}", { params: { path: { id: session.id } } });
  await client.DELETE("/v1/sessions");
  const { items } = await unwrap(client.GET("/login"));
  const { authorizationUrl } = await unwrap(client.POST("/login", { body: { provider: items[0]?.name ?? "" } }));
  const { expiresAt } = await unwrap(client.POST("/login/complete", { body: { provider: items[0]?.name ?? "", code: authorizationUrl, state: "" } }));
  console.log(expiresAt);
}

export async function registryAccounts(): Promise<void> {
  const body = { name: "team-a", registry: "registry.example.com:5000", username: "dev", password: "xxx1" };
  const account = await unwrap(client.POST("/v1/registry-accounts", { body }));
  const path = { name: account.name };
  const email: string | null = account.email;
  await client.GET("/v1/registry-accounts", { params: { query: { limit: 10, label: ["team=a"] } } });
  for await (const item of pages(client, "/v1/registry-accounts", { params: { query: { q: "team", sort: "expiresAt", expiresWithin: "30d" } } })) {
    console.log(item.registry, item.expiresAt, item.labels["team"]);
  }
  const { data, error } = await client.GET("/v1/registry-accounts/{name}", { params: { path } });
  if (error) throw new Error(`${error.title}: ${error.errors?.[0]?.field}`);
  const version: number = data.version;
  await client.PATCH("/v1/registry-accounts/{name}", {
    params: { path, header: ifMatch(account) },
    body: { password: "xxx2", email: null },
  });
  const verified = await unwrap(
    client.POST("/v1/registry-accounts/{name}/verify", { params: { path }, body: { repository: "os/alpine" } }),
  );
  const minted = await unwrap(client.POST("/v1/registry-accounts/{name}/mint", { params: { path } }));
  if (minted.mint?.state === "failing") console.log(minted.mint.lastError?.type);
  if (verified.result === "noAccess") console.log(verified.detail, email, version);
  const imported = await unwrap(
    client.POST("/v1/registry-accounts:import", {
      params: { query: { dryRun: true, namePrefix: "ci-" } },
      body: { auths: { "registry.example.com": { auth: "ZGV2Onh4eDE=" } } },
    }),
  );
  for (const item of imported.items) if (item.outcome === "skipped") console.log(item.key, item.reason);
  await client.DELETE("/v1/registry-accounts/{name}", { params: { path, header: ifMatch(account) } });
}

export async function dockerConfigs(): Promise<void> {
  const rendered = await unwrap(
    client.POST("/v1/docker-configs", { body: { accounts: ["team-a"], profile: "kubernetes" } }),
  );
  const base64: string = rendered.base64;
  const forImage = await unwrap(
    client.POST("/v1/docker-configs", {
      body: { match: { image: "registry.example.com:5000/os/alpine:3" }, profile: "docker" },
    }),
  );
  const forRegistry = await unwrap(
    client.POST("/v1/docker-configs", { body: { match: { registry: "docker.io" }, profile: "podman" } }),
  );
  console.log([...forImage.accounts, ...forRegistry.accounts]);
  const variable = await unwrap(
    client.POST("/v1/docker-configs", {
      // `as const`: otherwise the types of openapi-fetch do not see `parseAs`.
      body: { accountSelector: { matchLabels: { team: "a" } }, profile: "dockerAuthConfig" as const },
      headers: { Accept: "text/plain" },
      parseAs: "text",
    }),
  );
  const explained = await unwrap(
    client.POST("/v1/docker-configs/explain", {
      body: { config: rendered.config, image: "registry.example.com:5000/os/alpine:3" },
    }),
  );
  const manifest = await unwrap(
    client.POST("/v1/docker-configs/manifest", { body: { accounts: ["team-a"], secret: { name: "registry-pull" } } }),
  );
  const yaml = await unwrap(
    client.POST("/v1/docker-configs/manifest", {
      body: { accounts: ["team-a"], secret: { name: "registry-pull" } },
      headers: { Accept: "application/yaml" },
      parseAs: "text",
    }),
  );
  const attached = await unwrap(
    client.POST("/v1/docker-configs/explain", {
      body: { serviceAccount: { cluster: "dev", namespace: "default", name: "default" }, image: "nginx" },
    }),
  );
  console.log(attached.pullSecrets, attached.consumers.kubernetes.verdict.sentence);
  console.log(manifest["kind"], yaml.length, base64, variable.trim(), explained.consumers.kubernetes.keys, explained.warnings[0]?.code);
}

export async function clusters(): Promise<void> {
  const cluster = await unwrap(
    client.POST("/v1/clusters", {
      body: { name: "dev", server: "https://127.0.0.1:6443", auth: { type: "token", token: "…" } },
    }),
  );
  await client.POST("/v1/clusters", {
    body: { name: "prod", server: "https://prod:6443", auth: { type: "clientCertificate", certificate: "…", key: "…" } },
  });
  await client.POST("/v1/clusters", { body: { name: "here", auth: { type: "inCluster" } } });
  await client.POST("/v1/clusters", { body: { name: "edge", kubeconfig: "apiVersion: v1\n…", context: "admin" } });
  const path = { name: cluster.name };
  const list = await unwrap(client.GET("/v1/clusters"));
  const one = await unwrap(client.GET("/v1/clusters/{name}", { params: { path } }));
  await client.PATCH("/v1/clusters/{name}", {
    params: { path, header: ifMatch(one) },
    body: { auth: { type: "token", token: "…" } },
  });
  const check = await unwrap(
    client.POST("/v1/clusters/{name}/check", { params: { path, query: { namespace: ["default"] } } }),
  );
  for (const permission of check.permissions) console.log(permission.verb, permission.allowed);
  const secret = await unwrap(
    client.POST("/v1/clusters/{cluster}/namespaces/{namespace}/secrets", {
      params: { path: { cluster: "dev", namespace: "default" } },
      body: { name: "registry-pull", accounts: ["team-a"] },
    }),
  );
  const direct = await unwrap(
    client.GET("/v1/clusters/{cluster}/namespaces/{namespace}/secrets", {
      params: { path: { cluster: "dev", namespace: "default" } },
    }),
  );
  for (const { name, accounts, outdated } of direct.items) console.log(name, accounts?.length, outdated);
  const place = { cluster: "dev", namespace: "a-dev" };
  const pods = await unwrap(
    client.GET("/v1/clusters/{cluster}/namespaces/{namespace}/pods", { params: { path: place, query: { failing: true } } }),
  );
  for (const { name, owner, phase, waiting } of pods.items) console.log(name, owner?.kind, phase, waiting);
  const diagnosis = await unwrap(
    client.POST("/v1/clusters/{cluster}/namespaces/{namespace}/pods/{pod}/diagnose", { params: { path: { ...place, pod: "web" } } }),
  );
  await client.POST("/v1/clusters/{cluster}/namespaces/{namespace}/workloads/{kind}/{name}/diagnose", {
    params: { path: { ...place, kind: "deployment", name: "web" } },
  });
  await client.POST("/v1/clusters/{cluster}/namespaces/{namespace}/diagnose", {
    params: { path: place },
    body: { images: ["registry.example.com:5000/os/alpine:3"], imagePullSecrets: [{ name: "team-a-pull" }] },
  });
  const coverage = await unwrap(
    client.POST("/v1/clusters/{cluster}/coverage", { params: { path: { cluster: "dev" }, header: { Prefer: "wait=30" } } }),
  );
  await client.GET("/v1/clusters/{cluster}/coverage", { params: { path: { cluster: "dev" } } });
  const groups = await unwrap(
    client.GET("/v1/clusters/{cluster}/coverage/groups", {
      params: { path: { cluster: "dev" }, query: { verdict: ["noSecret", "credentialInvalid"], changed: true } },
    }),
  );
  for (const group of groups.items) console.log(group.namespace, group.repository, group.failsAt.length, group.credential?.account);
  const unused = await unwrap(
    client.GET("/v1/clusters/{cluster}/coverage/secrets", {
      params: { path: { cluster: "dev" }, query: { used: false, owner: ["foreign"] } },
    }),
  );
  const reached = await unwrap(client.GET("/v1/coverage/accounts", { params: { query: { limit: 10 } } }));
  for (const { account, workloads, namespaces, clusters } of reached.items) console.log(account, workloads, namespaces, clusters);
  console.log(coverage.run?.progress?.stage, coverage.snapshot?.summary.groupsOk, unused.items[0]?.adoption?.steps.length);
  for (const image of diagnosis.images) if (image.verdict !== "ok") console.log(image.sentence, image.fix?.steps.length);
  console.log(secret.keys, secret.imagePullSecrets[0]?.name, list.next, check.problem?.type);
  await client.DELETE("/v1/clusters/{name}", { params: { path } });
}

export async function pullSecrets(signal: AbortSignal): Promise<void> {
  const path = { name: "team-a" };
  const declared = await unwrap(
    client.PUT("/v1/pull-secrets/{name}", {
      params: { path, header: { Prefer: "wait=30" } },
      body: {
        accounts: ["team-a"],
        secret: { name: "team-a-pull" },
        targets: [{ cluster: "dev", namespaceSelector: { matchLabels: { team: "a" } } }],
        serviceAccounts: ["default"],
      },
    }),
  );
  const changed = await unwrap(
    client.PATCH("/v1/pull-secrets/{name}", {
      params: { path, query: { dryRun: true } },
      body: { accounts: null, accountSelector: { matchLabels: { team: "a" } } },
    }),
  );
  if ("targets" in changed) console.log(changed.targets.length);
  const list = await unwrap(client.GET("/v1/pull-secrets", { params: { query: { limit: 1 } } }));
  const one = await unwrap(client.GET("/v1/pull-secrets/{name}", { params: { path, header: { Prefer: "wait=30" } } }));
  const generation: number = one.observedGeneration;
  for await (const event of events(client, "/v1/pull-secrets/{name}/events", { params: { path }, signal })) {
    if (event.event === "status" && event.data.settled) break;
  }
  await client.GET("/v1/pull-secrets/{name}/events", { params: { path }, parseAs: "stream" });
  await client.POST("/v1/pull-secrets/{name}/sync", { params: { path } });
  await client.GET("/v1/pull-secrets/{name}/targets", { params: { path, query: { state: ["failed"] } } });
  const targets = pages(client, "/v1/pull-secrets/{name}/targets", { params: { path, query: { state: ["failed"] } } });
  for await (const target of targets) console.log(target.cluster, target.namespace, target.lastError?.detail);
  await client.GET("/v1/pull-secrets", { params: { query: { sort: "-createdAt", state: ["failed"], cluster: "dev" } } });
  const first = await unwrap(client.GET("/v1/targets", { params: { query: { limit: 1, sort: "pullSecret" } } }));
  console.log(first.items[0]?.state);
  const broken = pages(client, "/v1/targets", { params: { query: { state: ["failed", "conflict"], cluster: "dev" } } });
  for await (const target of broken) console.log(target.pullSecret, target.namespace, target.state);
  const summary = await unwrap(client.GET("/v1/summary"));
  console.log(summary.targets.failed.count, summary.targets.failed.hasMore, summary.oldestPendingTarget?.ageSeconds);
  await client.DELETE("/v1/pull-secrets/{name}", {
    params: { path, header: ifMatch(one), query: { deletionPolicy: "retain" } },
  });
  console.log(declared, list.items[0]?.status.failed, generation);
}

export async function resourceEvents(signal: AbortSignal): Promise<void> {
  for await (const { data } of events(client, "/v1/events", { params: { query: { kind: ["target"] } }, signal })) {
    switch (data.kind) {
      case "reset":
        break;
      case "target":
        console.log(data.change, data.name, data.cluster, data.namespace, data.state);
        break;
      case "pullSecret":
        console.log(data.change, data.name, data.version, data.generation);
        break;
      default: {
        const kind: "registryAccount" | "cluster" = data.kind;
        console.log(kind, data.change, data.name, data.version);
      }
    }
  }
  for await (const { event } of events(client, "/v1/events")) console.log(event);
  await client.GET("/v1/events", { parseAs: "stream" });
}

export async function identityProviders(): Promise<void> {
  const rules = [{ claims: { project_id: "42" }, role: "renderer" as const, grants: { accounts: ["team-*"] } }];
  const provider = await unwrap(
    client.POST("/v1/identity-providers", {
      body: { name: "gitlab", type: "oidc", issuer: "https://gitlab.example.com", audience: "regcred", rules },
    }),
  );
  await client.POST("/v1/identity-providers", {
    body: { name: "pods", type: "tokenReview", cluster: "dev", audience: "regcred", rules },
  });
  const path = { name: provider.name };
  const list = await unwrap(client.GET("/v1/identity-providers"));
  const one = await unwrap(client.GET("/v1/identity-providers/{name}", { params: { path } }));
  await client.PATCH("/v1/identity-providers/{name}", { params: { path, header: ifMatch(one) }, body: { rules } });
  await client.DELETE("/v1/identity-providers/{name}", { params: { path } });
  console.log(list.items.length);
}

export async function auditEvents(): Promise<void> {
  const query = { resource: "registry-accounts/team-a", from: "2026-11-01T00:00:00Z" };
  const { items } = await unwrap(client.GET("/v1/audit-events", { params: { query } }));
  for (const event of items) console.log(event.at, event.actor.type, event.action, event.outcome);
  for await (const event of pages(client, "/v1/audit-events", { params: { query } })) console.log(event.id);
}
