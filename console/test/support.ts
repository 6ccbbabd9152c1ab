import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before } from "node:test";
import { promisify } from "node:util";
import { type Browser, type BrowserContext, chromium, type Page } from "playwright-core";

export const run = promisify(execFile);

/** Value of a variable that dev/with-regcred sets. */
export function variable(name: string): string {
  const value = process.env[name];
  assert.ok(value, `${name} is not set: run \`make console-test\``);
  return value;
}

export const api = variable("REGCRED_TEST_API");
export const key = variable("REGCRED_TEST_KEY");
export const registryA = variable("REGCRED_TEST_REGISTRY_A");
export const registryB = variable("REGCRED_TEST_REGISTRY_B");
export const image = variable("REGCRED_TEST_REGISTRY_IMAGE");
export const kubeconfig = await readFile(`${variable("REGCRED_TEST_KUBE_DIR")}/kubeconfig`, "utf8");

/** Pictures of the pages, kept as artefacts of the run. */
const screenshots = process.env["REGCRED_CONSOLE_SCREENSHOTS"] ?? join(tmpdir(), "regcred-console");
/** A busy machine needs longer than people would wait. */
export const PATIENCE = 30_000;

let browser: Browser;

before(async () => {
  await mkdir(screenshots, { recursive: true });
  // Containers and root have no user namespaces for Chromium's sandbox; the pages are the project's own.
  const args = ["--no-sandbox", "--disable-dev-shm-usage"];
  browser = await chromium.launch({ executablePath: process.env["CHROMIUM"] ?? "/usr/bin/chromium", args });
});

after(() => browser?.close());

/** A browser without a session, with what its pages reported. */
export interface Visitor {
  context: BrowserContext;
  page: Page;
  /** Violations of the content security policy, and exceptions. */
  faults: string[];
}

export async function visit(options: { theme?: "light" | "dark" | "contrast"; locale?: string; width?: number } = {}): Promise<Visitor> {
  const { theme = "light", locale = "en-US", width = 1280 } = options;
  const media = theme === "contrast" ? { contrast: "more" as const } : { colorScheme: theme };
  const context = await browser.newContext({ ...media, locale, viewport: { width, height: 800 }, reducedMotion: "reduce" });
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  const faults: string[] = [];
  page.on("console", (message) => {
    if (/Content Security Policy|TrustedHTML|TrustedScript/.test(message.text())) faults.push(message.text());
  });
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("requestfailed", (request) => {
    const reason = request.failure()?.errorText;
    // Leaving a page ends what it still loads.
    if (request.url().includes("/console/assets/") && reason !== "net::ERR_ABORTED") faults.push(`${request.url()}: ${reason}`);
  });
  await context.exposeFunction("reportViolation", (text: string) => faults.push(text));
  await context.addInitScript(() => {
    addEventListener("securitypolicyviolation", ({ violatedDirective, sourceFile }) => {
      (globalThis as unknown as { reportViolation: (text: string) => void }).reportViolation(`${violatedDirective} in ${sourceFile}`);
    });
  });
  return { context, page, faults };
}

/** Records the bodies of requests whose address has a part. The browser shows tests none of a `Request` object. */
export async function recordBodies(page: Page, part: string): Promise<string[]> {
  const bodies: string[] = [];
  await page.exposeFunction("recordBody", (body: string) => bodies.push(body));
  await page.addInitScript((wanted) => {
    const send = globalThis.fetch;
    globalThis.fetch = async (input, init) => {
      const request = new Request(input, init);
      const body = await request.clone().text();
      const { recordBody } = globalThis as unknown as { recordBody: (body: string) => Promise<void> };
      if (body && request.url.includes(wanted)) await recordBody(body);
      return send(request);
    };
  }, part);
  return bodies;
}

/** Opens an address of the console and signs in. */
export async function signIn(visitor: Visitor, withKey = key, path = "/"): Promise<void> {
  await visitor.page.goto(`${api}/console${path}`);
  await visitor.page.getByLabel("API key").fill(withKey);
  await visitor.page.getByRole("button", { name: "Sign in" }).click();
  await visitor.page.getByRole("navigation", { name: "Pages", exact: true }).waitFor();
}

/** Goes to an address within the console, without loading it again. */
export async function go(page: Page, path: string): Promise<void> {
  await page.evaluate((href) => {
    const link = document.createElement("a");
    link.href = href;
    document.body.append(link);
    link.click();
    link.remove();
  }, `/console${path}`);
  await settled(page);
}

/** Waits until the page and its panels have loaded. */
export async function settled(page: Page): Promise<void> {
  await page.getByRole("heading", { level: 1 }).first().waitFor();
  await page.waitForFunction(() => !document.querySelector("[aria-busy=true], [data-state=loading]"));
}

export async function screenshot(page: Page, name: string): Promise<void> {
  // The header sticks to the top of what is seen.
  await page.evaluate(() => scrollTo(0, 0));
  await page.screenshot({ path: join(screenshots, `${name}.png`), fullPage: true });
}

const axe = await readFile(new URL("../node_modules/axe-core/axe.min.js", import.meta.url), "utf8");

/** Violations of WCAG 2.2 AA on the page, each with the elements that it is about. */
export async function violations(page: Page): Promise<string[]> {
  // As an expression: a script element would violate the content security policy.
  await page.evaluate(axe);
  return page.evaluate(async () => {
    const { axe } = globalThis as unknown as { axe: { run: (options: object) => Promise<Result> } };
    type Result = { violations: { id: string; nodes: { html: string; failureSummary: string }[] }[] };
    const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
    const { violations } = await axe.run({ runOnly: { type: "tag", values: tags } });
    return violations.flatMap(({ id, nodes }) => nodes.map(({ html, failureSummary }) => `${id}: ${html.slice(0, 200)} ${failureSummary}`));
  });
}

/** Calls the API with the first key. */
export async function call<T>(method: string, path: string, body?: object): Promise<T> {
  const response = await fetch(api + path, {
    method,
    headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
    ...(body && { body: JSON.stringify(body) }),
  });
  const text = await response.text();
  assert.ok(response.ok, `${method} ${path}: ${response.status} ${text}`);
  return (text ? JSON.parse(text) : undefined) as T;
}

/** Creates a namespace with its ServiceAccount, for which the API server alone has no controller, and returns its name. */
export async function newNamespace(prefix: string): Promise<string> {
  const name = `${prefix}-${Date.now().toString(36)}`;
  await run("kubectl", ["create", "namespace", name]);
  await run("kubectl", ["create", "serviceaccount", "default", "-n", name]);
  return name;
}

/** Creates an object in a namespace of the cluster. */
export async function create(namespace: string, object: object): Promise<void> {
  const kubectl = spawn("kubectl", ["create", "-n", namespace, "-f", "-"], { stdio: ["pipe", "ignore", "inherit"] });
  kubectl.stdin.end(JSON.stringify(object));
  const [code] = (await once(kubectl, "exit")) as [number];
  assert.equal(code, 0);
}

/** Sets the status of a pod, as its kubelet does. The kubectl of the tests may not know `--subresource`. */
export async function patchStatus(namespace: string, pod: string, status: object): Promise<void> {
  const folder = variable("REGCRED_TEST_KUBE_DIR");
  const certificate = ["--cacert", `${folder}/ca.crt`, "--cert", `${folder}/admin.crt`, "--key", `${folder}/admin.key`];
  const address = `${variable("REGCRED_TEST_KUBE_SERVER")}/api/v1/namespaces/${namespace}/pods/${pod}/status`;
  const type = "Content-Type: application/merge-patch+json";
  await run("curl", ["-fsS", ...certificate, "-X", "PATCH", "-H", type, "-d", JSON.stringify({ status }), address]);
}

/** Deployment of one container, whose pods name these pull secrets. */
export function deployment(name: string, image: string, pullSecrets: string[] = []): object {
  const labels = { app: name };
  const spec = { containers: [{ name: "app", image }], ...(pullSecrets.length > 0 && { imagePullSecrets: pullSecrets.map((one) => ({ name: one })) }) };
  return { apiVersion: "apps/v1", kind: "Deployment", metadata: { name }, spec: { selector: { matchLabels: labels }, template: { metadata: { labels }, spec } } };
}

/** Creates an API key and returns its text. */
export async function newKey(name: string, role: string, grants?: object): Promise<string> {
  const created = await call<{ key: string }>("POST", "/v1/api-keys", { name, role, ...(grants && { grants }) });
  return created.key;
}

/** Reads the image of a registry with the docker config of a Secret, as a kubelet pulls with it. */
export async function pullWithSecret(namespace: string, secret: string, registry: string): Promise<void> {
  const jsonpath = "jsonpath={.data.\\.dockerconfigjson}";
  const { stdout } = await run("kubectl", ["get", "secret", secret, "-n", namespace, "-o", jsonpath]);
  const folder = await mkdtemp(join(tmpdir(), "regcred-pull-"));
  try {
    const file = join(folder, "config.json");
    await writeFile(file, Buffer.from(stdout, "base64"));
    await run("skopeo", ["inspect", "--tls-verify=false", "--authfile", file, `docker://${registry}/${image}`]);
  } finally {
    await rm(folder, { recursive: true });
  }
}

/** Registers the cluster of the tests under a name. */
export async function registerCluster(name: string): Promise<void> {
  await call("POST", "/v1/clusters", { name, kubeconfig });
}

export async function registerAccount(name: string, registry = registryA, password = variable("REGCRED_TEST_REGISTRY_PASSWORD_A")): Promise<void> {
  await call("POST", "/v1/registry-accounts", { name, registry, username: "martin", password, plainHttp: true });
}

/** Declares a pull secret and waits until it is delivered. */
export async function declare(name: string, accounts: string[], cluster: string, namespaces: string[]): Promise<void> {
  const body = { accounts, secret: { name }, targets: [{ cluster, namespaces }] };
  const response = await fetch(`${api}/v1/pull-secrets/${name}`, {
    method: "PUT",
    headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json", Prefer: "wait=30" },
    body: JSON.stringify(body),
  });
  assert.ok(response.ok, await response.text());
}
