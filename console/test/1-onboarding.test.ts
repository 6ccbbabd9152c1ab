// From an empty installation to an image that is pulled. The first file: the installation must be empty.
import assert from "node:assert/strict";
import { test } from "node:test";
import { kubeconfig, newNamespace, pullWithSecret, registryA, registryB, screenshot, settled, signIn, variable, violations, visit } from "./support.ts";

test("empty_installation_leads_to_a_pulled_image", async () => {
  const namespace = await newNamespace("console-start");
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor);
  await settled(page);
  await page.getByText("Three steps to the first pull secret").waitFor();
  await screenshot(page, "overview-empty");
  assert.deepEqual(await violations(page), []);

  const logins = [
    ["start-a", registryA, variable("REGCRED_TEST_REGISTRY_PASSWORD_A")],
    ["start-b", registryB, variable("REGCRED_TEST_REGISTRY_PASSWORD_B")],
  ] as const;
  await page.getByRole("link", { name: "Add a registry account" }).click();
  const dialog = page.getByRole("dialog", { name: "Add a registry account" });
  for (const [name, registry, password] of logins) {
    await dialog.getByLabel("Name", { exact: true }).fill(name);
    await dialog.getByLabel("Registry and path").fill(registry);
    await dialog.getByLabel("User name").fill("martin");
    await dialog.getByLabel("Password", { exact: true }).fill(password);
    await dialog.getByLabel("The registry speaks plain HTTP").check();
    assert.ok(await dialog.getByLabel("Verify the login before saving").isChecked());
    if (name === "start-a") assert.deepEqual(await violations(page), []);
    const isLast = name === "start-b";
    await dialog.getByRole("button", { name: isLast ? "Add a registry account" : "Add, then another" }).click();
    await page.getByText(`${name} was created`).waitFor();
  }
  await page.getByRole("heading", { level: 1, name: "start-b" }).waitFor();
  await page.getByText("valid", { exact: true }).waitFor();

  await page.getByRole("link", { name: "Next: Add a cluster" }).click();
  const cluster = page.getByRole("dialog", { name: "Add a cluster" });
  await cluster.getByLabel("Name", { exact: true }).fill("start");
  await cluster.getByLabel("kubeconfig").fill(kubeconfig);
  assert.deepEqual(await violations(page), []);
  await cluster.getByRole("button", { name: "Add a cluster" }).click();
  await page.getByRole("heading", { level: 1, name: "start" }).waitFor();
  await page.getByText("No right is missing.").waitFor();

  await page.getByRole("link", { name: "Next: Declare a pull secret" }).click();
  await page.getByLabel("Name", { exact: true }).fill("start-pull");
  for (const [name] of logins) {
    // The field has the focus already when the second one is picked.
    await page.getByRole("combobox", { name: "Registry accounts" }).click();
    await page.getByRole("option", { name }).click();
  }
  await page.getByRole("combobox", { name: "Cluster", exact: true }).fill("start");
  await page.getByRole("option", { name: "start" }).click();
  await page.getByLabel("Namespaces", { exact: true }).fill(namespace);
  await page.getByRole("button", { name: "Preview" }).click();
  await page.getByText("What will change where").waitFor();
  assert.match((await page.getByRole("row", { name: namespace }).textContent()) ?? "", /create/);
  await page.getByText("these ServiceAccounts: default").waitFor();
  await screenshot(page, "declare-preview");
  assert.deepEqual(await violations(page), []);
  await page.getByRole("button", { name: "Declare" }).click();
  await page.getByRole("heading", { level: 1, name: "start-pull" }).waitFor();
  await page.getByRole("button", { name: new RegExp(`${namespace}.*synced`) }).waitFor();
  await screenshot(page, "pull-secret");

  await page.getByRole("link", { name: "Registry accounts", exact: true }).click();
  await page.getByRole("row", { name: "start-a" }).getByRole("link", { name: "1 pull secret" }).click();
  await page.getByRole("link", { name: "start-pull" }).waitFor();

  for (const [, registry] of logins) await pullWithSecret(namespace, "start-pull", registry);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});
