// What callers with fewer rights see, and the end of sessions.
import assert from "node:assert/strict";
import { test } from "node:test";
import { api, call, declare, go, key, newKey, newNamespace, registerAccount, registerCluster, screenshot, settled, signIn, violations, visit } from "./support.ts";

test("narrowed_operator_sees_only_what_is_granted", async () => {
  const namespace = await newNamespace("console-narrow");
  await registerAccount("narrow-own");
  await registerAccount("narrow-foreign");
  await registerCluster("narrow");
  await declare("narrow-own", ["narrow-own"], "narrow", [namespace]);
  await declare("narrow-foreign", ["narrow-foreign"], "narrow", [namespace]);
  const grants = { accounts: ["narrow-own"], clusters: ["narrow"], namespaces: [namespace] };
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, await newKey("narrow", "operator", grants), "/accounts");
  await settled(page);

  await page.getByRole("link", { name: "narrow-own" }).waitFor();
  assert.equal(await page.getByText("narrow-foreign").count(), 0);
  await go(page, "/pull-secrets");
  await page.getByRole("link", { name: "narrow-own" }).first().waitFor();
  assert.equal(await page.getByText("narrow-foreign").count(), 0);
  await go(page, "/accounts/narrow-foreign");
  await page.locator("[data-state=missing]").first().waitFor();
  await screenshot(page, "not-found");
  await go(page, "/clusters");
  await page.getByRole("link", { name: "narrow", exact: true }).waitFor();
  assert.equal(await page.getByRole("button", { name: "Add a cluster" }).count(), 0);
  // A page without the permission looks different from an empty one.
  assert.equal(await page.getByRole("link", { name: "Audit" }).count(), 0);
  await go(page, "/audit");
  await page.locator("[data-state=notGranted]").waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "not-granted");
  // A refusal of the API is shown with its reason.
  await go(page, "/accounts?new=1");
  const dialog = page.getByRole("dialog");
  await dialog.getByLabel("Name", { exact: true }).fill("elsewhere");
  await dialog.getByLabel("Registry and path").fill("r.example.com");
  await dialog.getByLabel("User name").fill("dev");
  await dialog.getByLabel("Password", { exact: true }).fill("one");
  await dialog.getByRole("button", { name: "Add a registry account" }).click();
  await dialog.getByText("your grants do not include").waitFor();
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("viewer_sees_no_control_that_would_be_refused", async () => {
  const namespace = await newNamespace("console-view");
  await registerAccount("view");
  await registerCluster("view");
  await declare("view", ["view"], "view", [namespace]);
  const visitor = await visit();
  const { page } = visitor;
  const refused: string[] = [];
  page.on("response", (response) => response.status() === 403 && refused.push(response.url()));
  await signIn(visitor, await newKey("view", "viewer"));

  const controls: string[] = [];
  for (const path of ["/", "/accounts", "/accounts/view", "/pull-secrets", "/pull-secrets/view", "/clusters", "/clusters/view", "/explain", "/doctor", "/doctor/coverage?cluster=view", "/access", "/access/providers", "/access/sessions", "/audit"]) {
    await go(page, path);
    const names = await page.locator("main").locator("button, a.button").allTextContents();
    controls.push(...names.filter((name) => /^(Add|Examine|Declare|Edit|Delete|Rotate|Verify|Sync|Import|Create|Revoke|New credential)/.test(name.trim())).map((name) => `${path}: ${name}`));
  }
  assert.deepEqual(controls, []);
  assert.deepEqual(refused, []);
  await visitor.context.close();
});

test("session_that_ends_leads_to_the_sign_in_and_back", async () => {
  const visitor = await visit();
  const { page, context } = visitor;
  await signIn(visitor, undefined, "/access/sessions");
  await page.getByText("this session").waitFor();
  assert.deepEqual(await page.evaluate(() => Object.keys(localStorage)), []);
  assert.equal(await page.evaluate(() => document.cookie), "", "scripts cannot read the cookie");
  const [cookie] = await context.cookies();
  assert.deepEqual([cookie?.httpOnly, cookie?.sameSite], [true, "Strict"]);

  // Ended elsewhere, as by the limits of time.
  const sessions = await call<{ items: { id: string }[] }>("GET", "/v1/sessions");
  for (const { id } of sessions.items) await call("DELETE", `/v1/sessions/${id}`);
  await page.getByRole("link", { name: "Registry accounts" }).first().click();
  await page.getByText("Your session has ended").waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "session-ended");
  await page.getByLabel("API key").fill("rgc_wrong");
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByText("the API key is unknown").first().waitFor();
  assert.deepEqual(await violations(page), []);
  await page.getByLabel("API key").fill(key);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("heading", { level: 1, name: "Registry accounts" }).waitFor();

  await page.getByRole("button", { name: "first" }).click();
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByLabel("API key").waitFor();
  const answer = await context.request.get(`${api}/v1/me`, { headers: { "Sec-Fetch-Site": "same-origin", Referer: `${api}/console/` } });
  assert.equal(answer.status(), 401);
  await context.close();
});

test("admin_ends_the_session_of_another_key", async () => {
  const [admin, other] = [await visit(), await visit()];
  await signIn(other, await newKey("leaver", "viewer"), "/accounts");
  await signIn(admin, undefined, "/access/sessions");
  await admin.page.getByLabel("Sessions of all callers").check();
  const row = admin.page.getByRole("row", { name: "leaver" });
  await row.waitFor();
  assert.match(admin.page.url(), /all=1/);
  assert.deepEqual(await violations(admin.page), []);
  await screenshot(admin.page, "sessions-of-all");
  await row.getByRole("button", { name: "End" }).click();
  await row.waitFor({ state: "detached" });
  await other.page.getByRole("link", { name: "Pull secrets" }).first().click();
  await other.page.getByText("Your session has ended").waitFor();
  assert.deepEqual([...admin.faults, ...other.faults], []);
  await admin.context.close();
  await other.context.close();
});

test("created_key_is_shown_once_and_works", async () => {
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, "/access/keys");
  await page.getByRole("button", { name: "Create an API key" }).click();
  const dialog = page.getByRole("dialog");
  await dialog.getByLabel("Name", { exact: true }).fill("once");
  await dialog.getByLabel("Role").selectOption("operator");
  await dialog.getByLabel("Accounts").fill("team-*, team=a");
  await dialog.getByLabel("Clusters").fill("dev");
  await dialog.getByLabel("Namespaces").fill("a-*");
  assert.deepEqual(await violations(page), []);
  await dialog.getByRole("button", { name: "Create an API key" }).click();
  const text = await dialog.locator("[data-secret]").textContent();
  assert.deepEqual(await violations(page), []);
  const me = await fetch(`${api}/v1/me`, { headers: { Authorization: `Bearer ${text}` } });
  const { grants } = (await me.json()) as { grants: object };
  assert.deepEqual(grants, { accounts: ["team-*", { matchLabels: { team: "a" } }], clusters: ["dev"], namespaces: ["a-*"] });
  await dialog.getByRole("button", { name: "I have stored it" }).click();
  await page.getByRole("row", { name: "once" }).waitFor();
  assert.equal(await page.getByText(text ?? "").count(), 0);

  await page.getByRole("button", { name: "Revoke once" }).click();
  const confirm = page.getByRole("dialog");
  assert.deepEqual(await violations(page), []);
  await confirm.getByRole("button", { name: "Revoke" }).click();
  await page.getByText("once was revoked").waitFor();
  assert.equal((await fetch(`${api}/v1/me`, { headers: { Authorization: `Bearer ${text}` } })).status, 401);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});
