// The doctor: verdicts as a tree, and fixes that are carried out from the page.
import assert from "node:assert/strict";
import { before, test } from "node:test";
import { create, deployment, image, newNamespace, patchStatus, pullWithSecret, recordBodies, registerAccount, registerCluster, registryA, screenshot, signIn, violations, visit } from "./support.ts";

const IMAGE = `${registryA}/${image}`;

before(async () => {
  await registerAccount("doctor");
  await registerCluster("doctor");
});

test("workload_without_a_pull_secret_is_fixed_from_the_page", async () => {
  const namespace = await newNamespace("console-doctor");
  await create(namespace, deployment("web", IMAGE));
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, `/doctor?cluster=doctor&namespace=${namespace}&of=deployment&name=web`);
  await page.locator("[data-verdict=noSecret]").waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "doctor-no-secret");
  await page.locator("[data-fix=attachServiceAccount] summary").click();
  await page.getByText("PUT /v1/pull-secrets/").waitFor();

  await page.getByRole("button", { name: "Carry out" }).click();
  const dialog = page.getByRole("dialog");
  await dialog.waitFor();
  assert.deepEqual(await violations(page), []);
  await dialog.getByRole("button", { name: "Carry out" }).click();
  await page.getByText("1 fix was carried out").waitFor();
  // A pull secret is delivered by the worker, soon after it is declared.
  const isFixed = page.locator("[data-ok=true]");
  for (let attempt = 0; attempt < 20 && (await isFixed.count()) === 0; attempt++) {
    await page.getByRole("button", { name: "Diagnose" }).click();
    await page.locator("[data-ok]").waitFor();
  }
  await isFixed.waitFor();
  await page.locator("[data-verdict=ok] summary").click();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "doctor-ok");
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("missing_secret_of_a_pod_is_delivered_from_the_page", async () => {
  const namespace = await newNamespace("console-doctor-pod");
  const spec = { containers: [{ name: "app", image: IMAGE }], imagePullSecrets: [{ name: "gone" }] };
  await create(namespace, { apiVersion: "v1", kind: "Pod", metadata: { name: "web" }, spec });
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, "/doctor");
  await page.getByRole("combobox", { name: "Cluster" }).fill("doctor");
  await page.getByRole("option", { name: "doctor" }).click();
  await page.getByLabel("Namespace").fill(namespace);
  await page.getByLabel("Look at").selectOption("pod");
  await page.getByLabel("Name", { exact: true }).fill("web");
  await page.getByRole("button", { name: "Diagnose" }).click();
  await page.locator("[data-verdict=secretMissing]").waitFor();
  assert.match(page.url(), /of=pod&name=web/);

  await page.getByRole("button", { name: "Carry out" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Carry out" }).click();
  await page.locator("[data-verdict=ok]").waitFor();
  await pullWithSecret(namespace, "gone", registryA);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("pods_that_wait_for_an_image_are_offered", async () => {
  const namespace = await newNamespace("console-doctor-pods");
  const spec = { containers: [{ name: "app", image: IMAGE }] };
  for (const name of ["fine", "waits"]) await create(namespace, { apiVersion: "v1", kind: "Pod", metadata: { name }, spec });
  const waiting = { name: "app", image: IMAGE, imageID: "", ready: false, restartCount: 0, state: { waiting: { reason: "ImagePullBackOff", message: "canary of a message" } } };
  await patchStatus(namespace, "waits", { phase: "Pending", containerStatuses: [waiting] });
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, `/doctor?cluster=doctor&namespace=${namespace}`);
  const pod = page.getByRole("group", { name: "Pods that wait for an image" }).getByRole("button");
  await pod.waitFor();
  assert.equal(await pod.textContent(), "waits pulls fail");
  assert.deepEqual(await page.locator("#doctor-pods option").evaluateAll((all) => all.map((one) => (one as HTMLOptionElement).value)), ["waits", "fine"]);
  assert.ok(!(await page.content()).includes("canary"));
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "doctor-pods");
  await pod.click();
  await page.getByRole("button", { name: "Diagnose" }).click();
  await page.locator("[data-verdict=noSecret]").waitFor();
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("pasted_manifest_is_diagnosed_without_its_environment", async () => {
  const namespace = await newNamespace("console-doctor-yaml");
  const visitor = await visit();
  const { page, faults } = visitor;
  const bodies = await recordBodies(page, "/diagnose");
  await signIn(visitor, undefined, `/doctor?cluster=doctor&namespace=${namespace}&of=manifest`);
  const manifest = [
    "apiVersion: apps/v1",
    "kind: Deployment",
    "metadata: {name: web}",
    "spec:",
    "  template:",
    "    spec:",
    `      containers: [{name: app, image: "${IMAGE}", env: [{name: TOKEN, value: canary-of-an-environment}]}]`,
    "      imagePullSecrets: [{name: absent}]",
  ].join("\n");
  await page.getByLabel("Manifest of a pod or workload").fill("kind: Service");
  await page.getByRole("button", { name: "Diagnose" }).click();
  await page.getByText("contains no pod").first().waitFor();
  assert.deepEqual(await violations(page), []);
  await page.getByLabel("Manifest of a pod or workload").fill(manifest);
  await page.getByRole("button", { name: "Diagnose" }).click();
  await page.locator("[data-verdict=secretMissing]").waitFor();
  assert.equal(bodies.length, 1);
  assert.match(bodies[0] ?? "", /"name":"absent"/);
  assert.doesNotMatch(bodies[0] ?? "", /canary/);
  assert.doesNotMatch(page.url(), /canary|alpine/);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});
