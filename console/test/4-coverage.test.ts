// Coverage of a cluster: a run is watched, and the drawing lights up what a rotation reaches.
import assert from "node:assert/strict";
import { before, test } from "node:test";
import type { Page } from "playwright-core";
import { create, declare, deployment, go, image, newKey, newNamespace, PATIENCE, registerAccount, registerCluster, registryA, registryB, run, screenshot, settled, signIn, variable, violations, visit } from "./support.ts";

const PASSWORD_B = variable("REGCRED_TEST_REGISTRY_PASSWORD_B");
let namespaces: string[];

before(async () => {
  await registerAccount("cover-a");
  await registerAccount("cover-b", registryB, PASSWORD_B);
  await registerCluster("cover");
  // Of two clusters, one is chosen.
  await registerCluster("beside");
  namespaces = [await newNamespace("console-cover-a"), await newNamespace("console-cover-b"), await newNamespace("console-cover-c")];
  const [a = "", b = "", c = ""] = namespaces;
  await declare("cover-a", ["cover-a"], "cover", [a, b]);
  await declare("cover-b", ["cover-b"], "cover", [c]);
  await create(a, deployment("web", `${registryA}/${image}`, ["cover-a"]));
  await create(b, deployment("api", `${registryA}/${image}`, ["cover-a"]));
  await create(c, deployment("job", `${registryB}/${image}`, ["cover-b"]));
  await create(c, deployment("bare", `${registryA}/${image}`, []));
  const auths = { auths: { [registryB]: { auth: Buffer.from(`martin:${PASSWORD_B}`).toString("base64") } } };
  await run("kubectl", ["create", "secret", "generic", "by-hand", "-n", c, "--type=kubernetes.io/dockerconfigjson", `--from-literal=.dockerconfigjson=${JSON.stringify(auths)}`]);
  await create(c, deployment("hand", `${registryB}/${image}`, ["by-hand"]));
  await run("kubectl", ["create", "secret", "generic", "unused", "-n", c, "--type=kubernetes.io/dockerconfigjson", `--from-literal=.dockerconfigjson=${JSON.stringify(auths)}`]);
});

/** Starts a run and waits until another snapshot than the one before is shown. */
async function examine(page: Page): Promise<void> {
  const shown = page.locator("[data-snapshot]");
  const before = (await shown.count()) > 0 ? await shown.getAttribute("data-snapshot") : "";
  await page.getByRole("button", { name: "Examine the cluster" }).click();
  await page.waitForFunction((id) => ![null, id].includes(document.querySelector("[data-snapshot]")?.getAttribute("data-snapshot") ?? null), before, { timeout: 4 * PATIENCE });
  await page.getByRole("button", { name: "Examine the cluster" }).and(page.locator(":enabled")).waitFor();
  await settled(page);
}

test("cluster_is_examined_and_a_rotation_lights_up_its_reach", async () => {
  const [a = "", b = "", c = ""] = namespaces;
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, "/doctor");
  await page.getByRole("link", { name: "A whole cluster" }).click();
  await page.getByRole("combobox", { name: "Cluster" }).fill("cover");
  await page.getByRole("option", { name: "cover" }).click();
  await page.getByText("has not been examined yet").waitFor();
  assert.match(page.url(), /\/doctor\/coverage\?cluster=cover$/);
  assert.deepEqual(await violations(page), []);
  await examine(page);

  const drawing = page.getByRole("group", { name: "Drawing" });
  const account = drawing.getByRole("button", { name: "cover-a", exact: true });
  await account.waitFor();
  assert.equal(await drawing.locator("[data-lit]").count(), 0);
  assert.deepEqual(await violations(page), []);
  await account.focus();
  await page.keyboard.press("Enter");
  await page.getByText("Rotating cover-a touches 2 workloads in 2 namespaces of 1 cluster.").waitFor();
  const lit = async (column: string) => (await drawing.locator(`[data-column=${column}][data-lit]`).evaluateAll((all) => all.map((one) => one.getAttribute("data-lit")))).sort();
  assert.deepEqual(await lit("secret"), [`cover-a · ${a}`, `cover-a · ${b}`].sort());
  assert.deepEqual(await lit("namespace"), [a, b].sort());
  assert.deepEqual(await lit("workload"), ["deployment api", "deployment web"]);
  assert.equal(await drawing.locator("path.lit").count(), 6);
  assert.equal(await account.getAttribute("aria-pressed"), "true");
  assert.match(page.url(), /account=cover-a/);
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "coverage-drawing");
  // The same without a drawing.
  await page.getByText("The drawing as a table").click();
  assert.equal(await page.locator("details[open] tbody tr").count(), 2);
  await drawing.getByRole("button", { name: "cover-b", exact: true }).click();
  await page.getByText("Rotating cover-b touches 1 workload in 1 namespace of 1 cluster.").waitFor();
  assert.deepEqual(await lit("namespace"), [c]);
  await page.getByRole("button", { name: "Clear the selection" }).click();
  assert.equal(await drawing.locator("[data-lit]").count(), 0);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("lists_of_a_coverage_are_filtered_and_lead_to_the_fix", async () => {
  const [, , c = ""] = namespaces;
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, "/doctor/coverage?cluster=cover&show=groups");
  await settled(page);
  await page.getByLabel("Verdict", { exact: true }).selectOption("noSecret");
  await page.getByLabel("Namespace").fill(c);
  await page.waitForURL(/verdict=noSecret&namespace=/);
  await settled(page);
  assert.equal(await page.locator("[data-group]").count(), 1);
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "coverage-groups");
  await page.getByRole("link", { name: "Deployment bare" }).click();
  await page.locator("[data-verdict=noSecret]").waitFor();

  await page.goBack();
  await page.getByRole("link", { name: /unused$/ }).click();
  const unused = page.getByRole("row", { name: `${c} unused` });
  await unused.waitFor();
  assert.equal(await page.getByRole("row", { name: `${c} by-hand` }).count(), 0);
  await page.getByLabel("Use", { exact: true }).selectOption("");
  await page.getByLabel("Adoption", { exact: true }).selectOption("true");
  const foreign = page.getByRole("row", { name: `${c} by-hand` });
  await foreign.getByText("Adopt: import 1 login").click();
  await foreign.getByText("PUT /v1/pull-secrets/").waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "coverage-secrets");

  await page.getByRole("link", { name: "Accounts", exact: true }).click();
  await page.getByText("Rotating cover-a touches 2 workloads in 2 namespaces of 1 cluster.").waitFor();
  assert.deepEqual(await violations(page), []);
  await page.getByRole("link", { name: "Show in the drawing: cover-a" }).click();
  await page.locator("[data-reach=cover-a]").waitFor();
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("second_run_says_what_became_worse", async () => {
  const [a = ""] = namespaces;
  const visitor = await visit();
  const { page, faults } = visitor;
  const asked: string[] = [];
  page.on("request", (request) => /\/coverage$/.test(request.url()) && request.method() === "GET" && asked.push(request.url()));
  await signIn(visitor, undefined, "/doctor/coverage?cluster=cover");
  await page.getByRole("group", { name: "Drawing" }).waitFor();
  await create(a, deployment("broken", `${registryB}/${image}`, ["cover-a"]));
  await run("kubectl", ["delete", "deployment", "web", "-n", a]);
  await examine(page);
  await page.locator("[data-changes]").getByText("1 new").waitFor();
  await page.locator("[data-changes]").getByText("1 gone").waitFor();
  await page.getByRole("link", { name: "Show the changes" }).click();
  await page.getByRole("row", { name: "Deployment broken" }).waitFor();
  assert.equal(await page.locator("[data-group]").count(), 1);
  await screenshot(page, "coverage-changes");

  // While the tab is hidden, it does not ask for the progress.
  const body = await page.evaluate(() => fetch("/v1/clusters/cover/coverage").then((response) => response.json() as Promise<{ run: object }>));
  const running = { ...body, run: { ...body.run, state: "running", progress: { stage: "examining", done: 3, total: 7 } } };
  await page.route(/\/coverage$/, (route) => route.fulfill({ json: running }));
  await page.reload();
  await page.getByText("Examining groups of images: 3 / 7").waitFor();
  const progress = page.getByRole("progressbar", { name: "Progress of the run" });
  assert.equal(await progress.getAttribute("value"), "3");
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "coverage-running");
  const shown = asked.length;
  await page.waitForRequest(/\/coverage$/);
  assert.ok(asked.length > shown, "a shown tab asks again");
  await page.evaluate(() => Object.defineProperty(document, "hidden", { value: true }));
  // A request that has begun may end.
  await page.waitForTimeout(500);
  const before = asked.length;
  await page.waitForTimeout(2_500);
  assert.equal(asked.length, before);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("narrowed_operator_is_told_that_clusters_are_not_granted", async () => {
  const grants = { accounts: ["*"], clusters: ["cover"], namespaces: ["*"] };
  const visitor = await visit();
  const { page, faults } = visitor;
  const refused: string[] = [];
  page.on("response", (response) => response.status() === 403 && refused.push(response.url()));
  await signIn(visitor, await newKey("cover-narrow", "operator", grants), "/doctor/coverage?cluster=cover");
  await page.locator("[data-state=notGranted]").waitFor();
  await settled(page);
  assert.equal(await page.getByRole("button", { name: "Examine the cluster" }).count(), 0);
  assert.deepEqual(await violations(page), []);
  assert.deepEqual(refused, []);
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

for (const theme of ["dark", "contrast"] as const) {
  test(`coverage_is_accessible_in_${theme}_and_on_a_narrow_screen`, async () => {
    const visitor = await visit({ theme, width: 320 });
    const { page, faults } = visitor;
    await signIn(visitor, undefined, "/doctor/coverage?cluster=cover&account=cover-a");
    await page.locator("[data-reach=cover-a]").waitFor();
    for (const view of ["Drawing", "Images in use", "Pull secrets of the cluster", "Accounts"]) {
      await page.getByRole("navigation", { name: "What is shown of the cluster" }).getByRole("link", { name: view, exact: true }).click();
      await settled(page);
      assert.deepEqual(await violations(page), [], view);
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(width <= 320, `${view} is ${width} px wide`);
      if (view === "Drawing") await screenshot(page, `coverage-drawing-${theme}-320`);
    }
    assert.deepEqual(faults, []);
    await visitor.context.close();
  });
}

test("pull_secret_names_the_number_of_its_users", async () => {
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, "/pull-secrets/cover-b");
  await page.getByText("1 workload in 1 namespace of 1 cluster uses its Secrets.").waitFor();
  assert.deepEqual(await violations(page), []);
  await page.getByRole("link", { name: "Deployment job" }).waitFor();
  // The other groups of the cluster use another one.
  assert.equal(await page.locator("[data-group]").count(), 1);
  await screenshot(page, "pull-secret-users");
  await page.getByRole("link", { name: "Coverage of cover" }).click();
  await page.getByRole("group", { name: "Drawing" }).waitFor();
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("chinese_texts_cover_the_coverage", async () => {
  const visitor = await visit({ locale: "zh-CN" });
  const { page, faults } = visitor;
  await page.goto(`${variable("REGCRED_TEST_API")}/console/doctor/coverage?cluster=cover&account=cover-b`);
  await page.getByLabel("API 密钥").fill(variable("REGCRED_TEST_KEY"));
  await page.getByRole("button", { name: "登录" }).click();
  await page.getByText("轮换 cover-b 会影响 1 个集群的 1 个命名空间中的 1 个工作负载。").waitFor();
  await page.getByRole("group", { name: "关系图" }).waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "coverage-drawing-zh");
  assert.deepEqual(faults, []);
  await visitor.context.close();
});

test("of_more_groups_than_a_page_the_first_and_those_of_the_account_are_drawn", async () => {
  const [, b = ""] = namespaces;
  // Before the other namespaces, so that their groups are not on the first page.
  const crowd = await newNamespace("a-crowd");
  // Of one workload, 100 containers are examined.
  for (let first = 0; first <= 500; first += 100) {
    const object = deployment(`crowd-${first}`, "") as { spec: { template: { spec: { containers: object[] } } } };
    object.spec.template.spec.containers = Array.from({ length: 100 }, (_, n) => ({ name: `c${n}`, image: `registry.invalid/app-${first + n}` }));
    await create(crowd, object);
  }
  const visitor = await visit();
  const { page, faults } = visitor;
  await signIn(visitor, undefined, "/doctor/coverage?cluster=cover");
  const drawing = page.getByRole("group", { name: "Drawing" });
  await drawing.waitFor();
  await examine(page);
  await page.getByText("The cluster has more groups: 500 are drawn.").waitFor();
  assert.equal(await drawing.locator("[data-column=account]").getByText("cover-a", { exact: true }).count(), 0);
  await go(page, "/doctor/coverage?cluster=cover&account=cover-a");
  await page.locator("[data-reach=cover-a]").waitFor();
  await drawing.locator(`[data-lit="cover-a · ${b}"]`).waitFor();
  assert.deepEqual(await violations(page), []);
  await screenshot(page, "coverage-drawing-large");
  await page.getByLabel("Namespace").fill(b);
  await page.getByText("The cluster has more groups").waitFor({ state: "detached" });
  assert.deepEqual(faults, []);
  await visitor.context.close();
  await run("kubectl", ["delete", "deployments", "--all", "-n", crowd]);
});
