// Every page: accessibility in light and dark, policy, sizes, languages, and the states of a list.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { before, test } from "node:test";
import { api, call, declare, go, newNamespace, recordBodies, registerAccount, registerCluster, registryA, screenshot, settled, signIn, violations, visit } from "./support.ts";

const PATHS = {
  overview: "/",
  accounts: "/accounts",
  account: "/accounts/pages",
  "account-new": "/accounts?new=1",
  import: "/accounts?import=1",
  "pull-secrets": "/pull-secrets",
  "pull-secret": "/pull-secrets/pages",
  declare: "/pull-secrets/pages/declare",
  clusters: "/clusters",
  cluster: "/clusters/pages",
  "cluster-new": "/clusters?new=1",
  explain: "/explain",
  doctor: "/doctor",
  coverage: "/doctor/coverage?cluster=pages",
  keys: "/access/keys",
  providers: "/access/providers",
  "provider-new": "/access/providers?new=1",
  roles: "/access/roles",
  sessions: "/access/sessions",
  audit: "/audit",
  missing: "/accounts/none",
};

before(async () => {
  const namespace = await newNamespace("console-pages");
  await registerAccount("pages");
  await registerCluster("pages");
  await declare("pages", ["pages"], "pages", [namespace]);
  // A target that fails: the namespace does not exist.
  await declare("pages-broken", ["pages"], "pages", ["console-none"]);
  const rules = [{ claims: { project_id: "42", ref: "main" }, role: "viewer" }];
  await call("POST", "/v1/identity-providers", { name: "pages", type: "oidc", issuer: "https://gitlab.example.com", audience: "pages", rules });
});

for (const theme of ["light", "dark", "contrast"] as const) {
  test(`every_page_is_accessible_in_${theme}`, async () => {
    const visitor = await visit({ theme });
    const { page, faults } = visitor;
    await signIn(visitor);
    for (const [name, path] of Object.entries(PATHS)) {
      await go(page, path);
      if (/new|import/.test(name)) await page.getByRole("dialog").waitFor();
      await screenshot(page, `${name}-${theme}`);
      assert.deepEqual(await violations(page), [], `${name} in ${theme}`);
      if (/new|import/.test(name)) {
        await page.keyboard.press("Escape");
        await page.getByRole("dialog").waitFor({ state: "detached" });
      }
    }
    assert.deepEqual(faults, []);
    await visitor.context.close();
  });
}

test("narrow_screen_shows_every_page_without_scrolling_sideways", async () => {
  const visitor = await visit({ width: 320 });
  const { page } = visitor;
  await signIn(visitor);
  for (const [name, path] of Object.entries(PATHS)) {
    await go(page, path);
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(width <= 320, `${name} is ${width} px wide`);
    if (/new|import/.test(name)) await page.keyboard.press("Escape");
  }
  await go(page, "/pull-secrets/pages");
  await screenshot(page, "pull-secret-320");
  await visitor.context.close();
});

test("chinese_browser_gets_chinese_pages", async () => {
  const visitor = await visit({ locale: "zh-CN" });
  const { page, faults } = visitor;
  await page.goto(`${api}/console/`);
  await page.getByLabel("API 密钥").fill(process.env["REGCRED_TEST_KEY"] ?? "");
  await page.getByRole("button", { name: "登录" }).click();
  await page.getByRole("heading", { level: 1, name: "概览" }).waitFor();
  await settled(page);
  assert.equal(await page.getAttribute("html", "lang"), "zh-CN");
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "overview-zh");
  // The choice outlives a reload, and needs none.
  await page.getByRole("button", { name: "first" }).click();
  await page.getByLabel("语言").selectOption("en");
  await page.getByRole("heading", { level: 1, name: "Overview" }).waitFor();
  await page.reload();
  await page.getByRole("heading", { level: 1, name: "Overview" }).waitFor();
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("list_keeps_its_state_in_the_address", async () => {
  const visitor = await visit();
  const { page } = visitor;
  await signIn(visitor, undefined, "/accounts");
  await page.getByLabel("Part of the name").fill("no-such-account");
  await page.getByText("Nothing matches.").waitFor();
  assert.equal(new URL(page.url()).search, "?q=no-such-account");
  await screenshot(page, "no-match");
  await page.reload();
  await page.getByText("Nothing matches.").waitFor();
  assert.equal(await page.getByLabel("Part of the name").inputValue(), "no-such-account");
  await page.getByRole("button", { name: "Clear the filters" }).click();
  await page.getByRole("link", { name: "pages", exact: true }).waitFor();
  assert.equal(await page.getByLabel("Part of the name").inputValue(), "");
  await visitor.context.close();
});

test("list_loads_one_page_at_a_time", async () => {
  for (let number = 0; number < 55; number++) await registerAccount(`paged-${String(number).padStart(2, "0")}`);
  const visitor = await visit();
  const { page } = visitor;
  const requests: string[] = [];
  page.on("request", (request) => request.url().includes("/v1/registry-accounts") && requests.push(request.url()));
  await signIn(visitor, undefined, "/accounts?q=paged");
  await settled(page);
  assert.equal(await page.locator("tbody tr").count(), 50);
  // A change that is announced late may load the page again.
  assert.deepEqual([...new Set(requests.map((url) => new URL(url).search))], ["?limit=50&usedBy=true&q=paged"]);
  await page.getByRole("button", { name: "Next" }).click();
  await page.getByRole("link", { name: "paged-54" }).waitFor();
  assert.equal(await page.locator("tbody tr").count(), 5);
  await page.getByRole("button", { name: "Previous" }).click();
  await page.getByRole("link", { name: "paged-00" }).waitFor();
  await page.goBack();
  await page.getByRole("link", { name: "paged-54" }).waitFor();
  await visitor.context.close();
});

test("pasted_config_is_imported_after_a_preview", async () => {
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, "/accounts?import=1");
  const dialog = page.getByRole("dialog");
  const auth = Buffer.from("dev:one").toString("base64");
  await dialog.getByLabel("config.json").fill(JSON.stringify({ auths: { "imported.example.com": { auth }, "helped.example.com": {} } }));
  await dialog.getByLabel("Prefix of the names").fill("import-");
  await dialog.getByRole("button", { name: "Preview" }).click();
  await dialog.getByRole("row", { name: "will be created" }).waitFor();
  await dialog.getByRole("row", { name: "skipped" }).waitFor();
  assert.equal((await fetch(`${api}/v1/registry-accounts/import-imported-example-com`, { headers: { Authorization: `Bearer ${process.env["REGCRED_TEST_KEY"]}` } })).status, 404);
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "import-preview");
  await dialog.getByRole("button", { name: "Import" }).click();
  await page.getByText("1 account was imported").waitFor();
  await call("GET", "/v1/registry-accounts/import-imported-example-com");
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("image_is_explained_for_every_reader", async () => {
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, `/explain?image=${encodeURIComponent(`${registryA}/os/alpine:3`)}&by=pullSecret&of=pages`);
  await page.getByText("the kubelet logs in with the entry").waitFor();
  assert.equal(await page.getByRole("columnheader").count(), 5);
  await screenshot(page, "explain-match");
  await page.getByLabel("Image").fill("127.0.0.1:1/os/alpine:3");
  await page.getByRole("button", { name: "Explain" }).click();
  await page.getByText("another port").first().waitFor();
  assert.match(page.url(), /image=127\.0\.0\.1%3A1/);
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "explain-miss");
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("rule_tester_names_the_rule_that_applies", async () => {
  const visitor = await visit();
  const { page } = visitor;
  await signIn(visitor, undefined, "/access/providers");
  await page.getByText("Test the rules with claims").click();
  await page.getByLabel("Claims as JSON").fill('{"project_id": 42, "ref": ["main", "other"]}');
  await page.getByText("✓ applies").waitFor();
  await page.getByLabel("Claims as JSON").fill('{"project_id": 43, "ref": "main"}');
  await page.getByText("No rule matches these claims.").waitFor();
  await visitor.context.close();
});

test("identity_provider_is_added_edited_and_deleted", async () => {
  const visitor = await visit();
  const { page, faults } = visitor;
  const bodies = await recordBodies(page, "/v1/identity-providers/edited");
  await signIn(visitor, undefined, "/access/providers");
  await page.getByRole("button", { name: "Add an identity provider" }).click();
  const dialog = page.getByRole("dialog");
  await dialog.getByLabel("Name", { exact: true }).fill("edited");
  await dialog.getByLabel("Issuer").fill("https://id.example.com");
  await dialog.getByLabel("Audience", { exact: true }).fill("edited");
  await dialog.getByLabel("Client id").fill("console");
  await dialog.getByLabel("Client secret").fill("canary-secret");
  await dialog.getByLabel("Required claims").fill("groups=ops team");
  await dialog.getByLabel("Role").selectOption("operator");
  await dialog.getByLabel("Accounts").fill("team-*, team=a+tier=prod");
  await dialog.getByRole("button", { name: "Add a rule" }).click();
  await dialog.getByLabel("Required claims").nth(1).fill("groups=dev");
  await dialog.getByLabel("Claims as JSON").fill('{"groups": ["dev"]}');
  await dialog.getByRole("group", { name: "Rule 2" }).getByText("✓ applies").waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "provider-form");
  await dialog.getByRole("button", { name: "Add an identity provider" }).click();
  await page.getByText("edited was created").waitFor();
  const path = "/v1/identity-providers/edited";
  const created = await call<{ rules: object[]; login: object }>("GET", path);
  const grants = { accounts: ["team-*", { matchLabels: { team: "a", tier: "prod" } }], clusters: [], namespaces: [] };
  assert.deepEqual(created.rules[0], { claims: { groups: "ops team" }, role: "operator", grants });
  assert.deepEqual(created.login, { clientId: "console" });

  await page.getByRole("button", { name: "Edit edited" }).click();
  // The secret is never filled in, and stays if nothing is entered.
  assert.equal(await dialog.getByLabel("Client secret").inputValue(), "");
  assert.ok(!(await page.content()).includes("canary-secret"));
  assert.deepEqual(await violations(page), []);
  await dialog.getByRole("button", { name: "Move rule 2 up" }).click();
  await dialog.getByRole("button", { name: "Save" }).click();
  await page.getByText("edited was changed").waitFor();
  const changed = await call<{ rules: { claims: object }[]; login: object }>("GET", path);
  assert.deepEqual(changed.rules.map(({ claims }) => claims), [{ groups: "dev" }, { groups: "ops team" }]);
  assert.deepEqual(changed.login, created.login);
  assert.deepEqual(bodies.map((body) => Object.keys(JSON.parse(body) as object)), [["rules"]]);
  // A refusal names the field.
  await page.getByRole("button", { name: "Edit edited" }).click();
  await dialog.getByLabel("Issuer").fill("https://other.example.com");
  await dialog.getByRole("button", { name: "Save" }).click();
  await dialog.locator("[data-state=failed]").waitFor();
  assert.deepEqual(await violations(page), []);
  await dialog.getByRole("button", { name: "Cancel" }).click();

  await page.getByRole("button", { name: "Delete edited" }).click();
  await dialog.getByRole("button", { name: "Delete" }).click();
  await page.getByText("edited was deleted").waitFor();
  assert.equal((await fetch(`${api}${path}`, { headers: { Authorization: `Bearer ${process.env["REGCRED_TEST_KEY"]}` } })).status, 404);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("state_of_the_audit_chain_is_shown", async () => {
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, "/audit");
  const chain = page.locator("[data-chain]");
  await chain.getByText(/^number \d+, \d+ events? in the chain/).waitFor();
  await chain.getByText("this process has found none since its start").waitFor();
  assert.deepEqual(await violations(page), []);
  await page.route("**/v1/summary", async (route) => {
    const audit = { lastSeal: null, unsealed: { count: 3, hasMore: false }, oldestUnsealedSeconds: 75.2, tampering: 2 };
    await route.fulfill({ json: { audit } });
  });
  await page.reload();
  await chain.getByText("Sealing has stalled").waitFor();
  await chain.getByText("3 batches, the oldest for 76 s").waitFor();
  await chain.getByText("has found 2 since its start").waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "audit-stalled");
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("filtered_audit_events_are_exported", async () => {
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, "/audit");
  await page.getByLabel("Resource, such as clusters/dev").fill("registry-accounts/pages");
  await page.waitForURL("**/audit?resource=registry-accounts%2Fpages");
  await settled(page);
  await page.getByRole("row", { name: "registryAccount.create" }).waitFor();
  const [download] = await Promise.all([page.waitForEvent("download"), page.getByRole("link", { name: "Export" }).click()]);
  const lines = (await readFile(await download.path(), "utf8")).trim().split("\n").map((line) => JSON.parse(line) as { action: string });
  assert.equal(lines.at(-1)?.action, "registryAccount.create");
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("banners_tell_an_outage_from_a_lost_connection", async () => {
  const visitor = await visit();
  const { page, context, faults } = visitor;
  await signIn(visitor, undefined, "/accounts");
  await settled(page);
  const problem = { type: "https://regcred.dev/problems/database-unavailable", title: "Database unavailable", status: 503, detail: "retry later", instance: "/", requestId: "r" };
  await context.route("**/v1/**", (route) => route.fulfill({ status: 503, contentType: "application/problem+json", headers: { "Retry-After": "1" }, body: JSON.stringify(problem) }));
  await page.getByRole("link", { name: "Clusters" }).first().click();
  await page.locator("[data-connection=unavailable]").waitFor();
  await page.getByText("Database unavailable").waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "unavailable");
  await context.unroute("**/v1/**");
  await page.locator("[data-connection]").waitFor({ state: "detached" });
  await page.getByRole("button", { name: "Try again" }).click();
  await page.getByRole("link", { name: "pages", exact: true }).waitFor();

  await context.setOffline(true);
  await page.getByRole("link", { name: "Registry accounts" }).first().click();
  await page.locator("[data-connection=offline]").waitFor();
  await screenshot(page, "offline");
  await context.setOffline(false);
  await page.locator("[data-connection]").waitFor({ state: "detached" });
  assert.deepEqual(faults, []);
  await context.close();
});
