// A rotation, watched while it is delivered, by pointer and by keyboard alone.
import assert from "node:assert/strict";
import { test } from "node:test";
import { declare, go, newNamespace, registerAccount, registerCluster, registryB, run, screenshot, settled, signIn, variable, violations, visit } from "./support.ts";

/** Data of a Secret, for comparison. */
async function secretOf(namespace: string, name: string): Promise<string> {
  const { stdout } = await run("kubectl", ["get", "secret", name, "-n", namespace, "-o", "jsonpath={.data}"]);
  return stdout;
}

test("rotation_is_watched_live_and_a_wrong_password_is_refused", async () => {
  const namespaces = [await newNamespace("console-rotate-a"), await newNamespace("console-rotate-b")];
  await registerAccount("rotate");
  await registerCluster("rotate");
  await declare("rotate", ["rotate"], "rotate", namespaces);
  const [watcher, operator] = [await visit(), await visit()];
  await signIn(watcher, undefined, "/pull-secrets/rotate");
  await watcher.page.getByText("generation 1").waitFor();
  await watcher.page.locator("[data-live=true]").waitFor();
  const streams: string[] = [];
  watcher.page.on("request", (request) => request.url().includes("/events") && streams.push(request.url()));

  const { page } = operator;
  await signIn(operator, undefined, "/accounts/rotate");
  await page.getByRole("button", { name: "Rotate the password" }).click();
  const dialog = page.getByRole("dialog");
  assert.equal(await dialog.getByLabel("New password").inputValue(), "");
  assert.equal(await dialog.getByLabel("Verify before saving").isChecked(), true);
  await dialog.getByLabel("New password").fill("wrong");
  await dialog.getByRole("button", { name: "Rotate the password" }).click();
  await dialog.getByRole("alert").waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "rotate-refused");
  await dialog.getByLabel("Verify before saving").uncheck();
  await dialog.getByLabel("New password").fill("another");
  await dialog.getByRole("button", { name: "Rotate the password" }).click();
  await page.getByText("rotate has a new password").waitFor();
  await dialog.waitFor({ state: "detached" });

  await watcher.page.getByText("generation 2").waitFor();
  for (const namespace of namespaces) {
    await watcher.page.getByRole("button", { name: new RegExp(`${namespace}.*synced`) }).waitFor();
  }
  assert.deepEqual(streams, [], "the stream that was open before carried the change");
  await screenshot(watcher.page, "rotation-live");
  assert.deepEqual([...watcher.faults, ...operator.faults], []);
  await watcher.context.close();
  await operator.context.close();
});

test("password_is_rotated_by_keyboard_alone", async () => {
  const namespace = await newNamespace("console-keys");
  await registerAccount("keys", registryB, "outdated");
  await registerCluster("keys");
  await declare("keys", ["keys"], "keys", [namespace]);
  const before = await secretOf(namespace, "keys");
  const visitor = await visit();
  const { page, faults } = visitor;
  await page.goto(new URL("/console/", variable("REGCRED_TEST_API")).href);
  await page.getByLabel("API key").waitFor();
  // The field has the focus when the page opens.
  await page.keyboard.insertText(variable("REGCRED_TEST_KEY"));
  await page.keyboard.press("Enter");
  await settled(page);

  await page.keyboard.press("/");
  const search = page.getByRole("combobox", { name: "Name of a resource, page or action" });
  await search.waitFor();
  assert.deepEqual(await violations(page), []);
  await page.keyboard.insertText("keys");
  await page.getByRole("option", { name: "keys Registry account" }).waitFor();
  await screenshot(page, "palette");
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { level: 1, name: "keys" }).waitFor();
  await page.getByRole("button", { name: "Rotate the password" }).waitFor();

  const rotate = page.getByRole("button", { name: "Rotate the password" });
  for (let tabs = 0; !(await rotate.evaluate((element) => element === document.activeElement)); tabs++) {
    assert.ok(tabs < 30, "the button is reached with Tab");
    await page.keyboard.press("Tab");
  }
  await page.keyboard.press("Enter");
  const field = page.getByRole("dialog").getByLabel("New password");
  await field.waitFor();
  for (let tabs = 0; !(await field.evaluate((element) => element === document.activeElement)); tabs++) {
    assert.ok(tabs < 10, "the field is reached with Tab");
    await page.keyboard.press("Tab");
  }
  await page.keyboard.insertText(variable("REGCRED_TEST_REGISTRY_PASSWORD_B"));
  await page.keyboard.press("Enter");
  await page.getByText("keys has a new password").waitFor();
  await page.getByText("valid", { exact: true }).waitFor();

  await go(page, "/pull-secrets/keys");
  await page.getByText("generation 2").waitFor();
  await page.getByRole("button", { name: new RegExp(`${namespace}.*synced`) }).waitFor();
  assert.notEqual(await secretOf(namespace, "keys"), before);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});
