// Signing in through an identity provider: a real one, on another site than regcred.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import type { Page } from "playwright-core";
import { CLIENT, type RunningProvider, startProvider } from "./provider.ts";
import { api, call, screenshot, settled, type Visitor, violations, visit } from "./support.ts";

const RULES = [
  { claims: { groups: "ops" }, role: "operator" },
  { claims: { groups: "dev" }, role: "viewer" },
];
let provider: RunningProvider;

before(async () => {
  provider = await startProvider(`${api}/console/login/corp`);
  await call("POST", "/v1/identity-providers", { name: "corp", type: "oidc", issuer: provider.issuer, audience: "console-login", rules: RULES, login: CLIENT });
});

after(async () => {
  await call("DELETE", "/v1/identity-providers/corp");
  provider.close();
});

/** Leaves for the provider. */
async function leave({ page }: Visitor, path = "/"): Promise<void> {
  await page.goto(`${api}/console${path}`);
  await page.getByRole("button", { name: "Sign in with corp" }).click();
  await page.waitForURL(`${provider.issuer}/**`);
}

/** Signs a person in at the provider, and agrees. */
async function agree(page: Page, person: string): Promise<void> {
  await page.locator("input[name=login]").fill(person);
  await page.locator("input[name=password]").fill("any");
  await page.getByRole("button", { name: "Sign-in" }).click();
  await page.getByRole("button", { name: "Continue" }).click();
  await page.waitForURL(`${api}/console/**`);
}

test("person_signs_in_through_a_provider_and_comes_back_to_the_page", async () => {
  const visitor = await visit();
  const { page, context, faults } = visitor;
  await page.goto(`${api}/console/accounts?q=prod`);
  await page.getByRole("button", { name: "Sign in with corp" }).waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "sign-in");
  await leave(visitor, "/accounts?q=prod");
  const asked = new URL(page.url());
  assert.equal(asked.origin, provider.issuer);
  await agree(page, "lena");

  await page.getByRole("heading", { level: 1, name: "Registry accounts" }).waitFor();
  assert.equal(page.url(), `${api}/console/accounts?q=prod`);
  await page.getByRole("button", { name: "corp/lena · viewer" }).waitFor();
  const cookies = await context.cookies(api);
  assert.deepEqual(cookies.map(({ name, httpOnly, sameSite }) => [name, httpOnly, sameSite]), [["regcred", true, "Strict"]]);
  const stored = await page.evaluate(() => [Object.keys(localStorage), Object.keys(sessionStorage), document.cookie]);
  assert.deepEqual(stored, [[], [], ""]);
  // The role is that of the first rule that matches, at the moment.
  await page.getByRole("link", { name: "Access" }).click();
  await page.getByRole("link", { name: "Sessions" }).waitFor();
  assert.equal(await page.getByRole("link", { name: "API keys" }).count(), 0);
  await call("PATCH", "/v1/identity-providers/corp", { rules: [{ claims: { sub: "lena" }, role: "operator" }] });
  await page.reload();
  await page.getByRole("button", { name: "corp/lena · operator" }).waitFor();
  await call("PATCH", "/v1/identity-providers/corp", { rules: RULES });

  const events = await call<{ items: { actor: { type: string; name: string } }[] }>("GET", "/v1/audit-events?action=session.create&limit=1");
  assert.deepEqual([events.items[0]?.actor.type, events.items[0]?.actor.name], ["identityProvider", "corp/lena"]);
  assert.deepEqual(faults, []);
  await context.close();
});

test("person_without_a_rule_or_who_declines_is_told_why", async () => {
  const visitor = await visit({ theme: "dark" });
  const { page, context, faults } = visitor;
  await leave(visitor);
  await agree(page, "mia");
  await page.getByText("no rule of its identity provider matches").waitFor();
  assert.equal(page.url(), `${api}/console/`);
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "sign-in-refused");

  await context.clearCookies();
  await leave(visitor);
  await page.getByRole("link", { name: "Cancel" }).click();
  await page.getByText("access was denied").waitFor();
  // An answer that this browser did not ask for.
  await page.goto(`${api}/console/login/corp?code=stolen&state=guessed`);
  await page.getByText("belongs to another browser").waitFor();
  assert.equal(page.url(), `${api}/console/`);
  assert.deepEqual(await context.cookies(api).then((all) => all.filter(({ name }) => name === "regcred")), []);
  assert.deepEqual(faults, []);
  await context.close();
});

test("signing_out_everywhere_ends_the_sessions_of_all_browsers", async () => {
  const [one, two] = [await visit(), await visit()];
  for (const visitor of [one, two]) {
    await leave(visitor, "/access/sessions");
    await agree(visitor.page, "olga");
    await visitor.page.getByRole("button", { name: "corp/olga · operator" }).waitFor();
    await settled(visitor.page);
  }
  await two.page.getByText("this session").waitFor();
  assert.equal(await two.page.locator("tbody tr").count(), 2);
  await screenshot(two.page, "sessions-of-a-person");
  // The first key may end the sessions of others, which a person may not.
  assert.equal(await two.page.getByLabel("Sessions of all callers").count(), 0);
  const { items } = await call<{ items: { owner: { name: string } }[] }>("GET", "/v1/sessions?all=true");
  assert.equal(items.filter(({ owner }) => owner.name === "corp/olga").length, 2);
  await two.page.getByRole("button", { name: "Sign out everywhere" }).click();
  await two.page.getByLabel("API key").waitFor();
  await one.page.getByRole("link", { name: "Registry accounts" }).first().click();
  await one.page.getByText("Your session has ended").waitFor();
  assert.deepEqual([...one.faults, ...two.faults], []);
  await one.context.close();
  await two.context.close();
});
