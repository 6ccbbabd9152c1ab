// 10,000 accounts and 50,000 targets: no list loads more than its page. The last file, since its rows stay.
import assert from "node:assert/strict";
import { before, test } from "node:test";
import { api, run, screenshot, settled, signIn, variable, visit } from "./support.ts";

const STATEMENTS = [
  `INSERT INTO clusters (id, name, server, auth_type) VALUES (gen_random_uuid(), 'load', 'https://127.0.0.1:1', 'none')`,
  `INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id, labels, expires_at,
       last_verified_at, last_verification_result, last_verification_detail)
   SELECT gen_random_uuid(), 'load-' || lpad(n::text, 5, '0'), 'reg.example.com', 'dev', '\\x00', 'load', '{"team": "many"}',
       CASE n % 4 WHEN 0 THEN now() + n * interval '1 minute' END, now(),
       CASE WHEN n % 1000 = 7 THEN 'invalid' ELSE 'valid' END, 'detail'
   FROM generate_series(0, 9999) AS n`,
  `INSERT INTO pull_secrets (id, name, declaration)
   SELECT gen_random_uuid(), 'load-' || n, jsonb_build_object(
       'accounts', '["load-00001"]'::jsonb, 'secret', '{"name": "pull", "type": "kubernetes.io/dockerconfigjson"}'::jsonb,
       'targets', '[{"cluster": "load", "namespaces": ["n-0"]}]'::jsonb, 'serviceAccounts', '[]'::jsonb,
       'deletionPolicy', 'delete', 'adopt', false)
   FROM generate_series(0, 9) AS n`,
  `INSERT INTO pull_secret_clusters (pull_secret_id, cluster_id, selects)
   SELECT pull_secrets.id, clusters.id, false FROM pull_secrets, clusters
   WHERE clusters.name = 'load' AND pull_secrets.name LIKE 'load-%'`,
  `INSERT INTO pull_secret_accounts (pull_secret_id, account_id)
   SELECT pull_secrets.id, one.id FROM pull_secrets, registry_accounts AS one
   WHERE one.name = 'load-00001' AND pull_secrets.name LIKE 'load-%'`,
  // Not due: the worker leaves them alone.
  `INSERT INTO pull_secret_targets (pull_secret_id, cluster_id, namespace, generation, state, pending_since, next_attempt_at)
   SELECT pull_secrets.id, clusters.id, 'n-' || n, 1, state, CASE WHEN state <> 'synced' THEN now() END, now() + interval '1 year'
   FROM (SELECT n, CASE WHEN n % 500 = 1 THEN 'failed' WHEN n % 700 = 2 THEN 'pending' ELSE 'synced' END AS state
         FROM generate_series(0, 4999) AS n) AS every, pull_secrets, clusters
   WHERE clusters.name = 'load' AND pull_secrets.name LIKE 'load-%'`,
  "VACUUM ANALYZE",
];
const PATHS = ["/", "/accounts", "/accounts/load-00001", "/pull-secrets", "/pull-secrets/load-1", "/clusters", "/clusters/load", "/audit"];

before(async () => {
  const psql = `${variable("REGCRED_TEST_PG_BIN")}/psql`;
  const options = ["-qX", "-v", "ON_ERROR_STOP=1"];
  for (const statement of STATEMENTS) await run(psql, [...options, "-c", statement, variable("DATABASE_URL")]);
});

test("no_list_loads_more_than_its_page", async (context) => {
  const visitor = await visit();
  const { page, faults } = visitor;
  const sizes: { url: string; items: number }[] = [];
  page.on("response", async (response) => {
    if (!response.url().includes("/v1/") || !response.headers()["content-type"]?.startsWith("application/json")) return;
    const body = (await response.json().catch(() => null)) as { items?: unknown[] } | null;
    if (body?.items) sizes.push({ url: response.url(), items: body.items.length });
  });
  await signIn(visitor);
  for (const path of PATHS) {
    const begin = performance.now();
    await page.goto(`${api}/console${path}`);
    await settled(page);
    const complete = performance.now() - begin;
    const paint = await page.evaluate(() => performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? 0);
    context.diagnostic(`${path}: first paint ${paint.toFixed(0)} ms, complete ${complete.toFixed(0)} ms`);
    assert.ok((await page.locator("tbody tr").count()) <= 60, path);
  }
  await page.goto(`${api}/console/pull-secrets/load-1`);
  await settled(page);
  assert.equal(await page.locator(".cell").count(), 200);
  await screenshot(page, "load-pull-secret");
  assert.deepEqual(sizes.filter(({ items }) => items > 200), []);
  assert.ok(sizes.length >= PATHS.length, `${sizes.length} lists`);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});
