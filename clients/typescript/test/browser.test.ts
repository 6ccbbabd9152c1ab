// The scenario in Chromium, in a page of another origin: requests go over CORS, as those of a dashboard do.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { extname } from "node:path";
import { after, before, test } from "node:test";
import { type Browser, chromium, type Page } from "playwright-core";
import { type Observed, scenario } from "./scenario.ts";
import { api, assertObserved, environment, key, variable } from "./support.ts";

const origin = variable("REGCRED_TEST_ORIGIN");
const root = new URL("../", import.meta.url);
const html = `<!doctype html><title>Dashboard</title><script type="importmap">
  {"imports": {"@regcred/client": "/dist/index.js", "openapi-fetch": "/node_modules/openapi-fetch/dist/index.mjs"}}
</script>`;
const types: Record<string, string> = { ".js": "text/javascript", ".mjs": "text/javascript" };

const server = createServer(async (request, response) => {
  const path = new URL(request.url ?? "/", origin).pathname;
  if (path === "/") return response.setHeader("Content-Type", "text/html").end(html);
  const content = await readFile(new URL(`.${path}`, root)).catch(() => undefined);
  if (!content) return response.writeHead(404).end();
  return response.setHeader("Content-Type", types[extname(path)] ?? "text/plain").end(content);
});
let browser: Browser;

before(async () => {
  const { hostname, port } = new URL(origin);
  await new Promise<void>((resolve) => server.listen(Number(port), hostname, resolve));
  // Containers and root have no user namespaces for Chromium's sandbox; the page is the test's own.
  const args = ["--no-sandbox", "--disable-dev-shm-usage"];
  browser = await chromium.launch({ executablePath: process.env["CHROMIUM"] ?? "/usr/bin/chromium", args });
});

after(async () => {
  await browser?.close();
  server.closeAllConnections();
  server.close();
});

/** Opens the page, and collects the messages of its console. */
async function open(): Promise<{ page: Page; messages: string[] }> {
  const page = await browser.newPage();
  const messages: string[] = [];
  page.on("console", (message) => messages.push(message.text()));
  page.on("pageerror", (error) => messages.push(error.message));
  await page.goto(origin);
  return { page, messages };
}

test("dashboard_scenario_works_in_a_page_of_another_origin", async () => {
  const { page, messages } = await open();
  const chrome = environment("chrome");

  const run = `import("@regcred/client").then((regcred) => (${scenario})(regcred, ${JSON.stringify(chrome)}))`;
  const observed = await page.evaluate<Observed>(run);

  assertObserved(observed, chrome);
  assert.deepEqual(messages.filter((message) => /CORS|blocked|Content Security/.test(message)), []);
});

test("stream_resumes_in_a_page", async () => {
  const { page } = await open();
  const send = (method: string, path: string, body?: object) =>
    fetch(api + path, {
      method,
      headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  const declaration = {
    accounts: ["stream"],
    secret: { name: "stream" },
    targets: [{ cluster: "stream", namespaces: ["default"] }],
  };
  await send("POST", "/v1/registry-accounts", { name: "stream", registry: "r.example.com", username: "u", password: "p" });
  await send("POST", "/v1/clusters", { name: "stream", kubeconfig: environment("stream").kubeconfig });
  assert.equal((await send("PUT", "/v1/pull-secrets/stream", declaration)).status, 201);
  const requests: { id: string | undefined; cookie: string | undefined }[] = [];
  page.on("request", async (request) => {
    if (!request.url().endsWith("/events") || request.method() !== "GET") return;
    const headers = await request.allHeaders();
    requests.push({ id: headers["last-event-id"], cookie: headers["cookie"] });
  });

  type Input = { api: string; key: string; declaration: typeof declaration };
  // The page ends the first stream itself, as a network does, and receives the change that follows in the second one.
  const read = async ({ api, key, declaration }: Input): Promise<{ ids: string[]; versions: number[] }> => {
    const { createClient, events } = (await import("@regcred/client")) as typeof import("@regcred/client");
    let connections = 0;
    const client = createClient({
      baseUrl: api,
      token: key,
      fetch: async (request) => {
        const response = await fetch(request);
        if (!request.url.endsWith("/events") || ++connections > 1) return response;
        const reader = response.body!.getReader();
        let hasEvent = false;
        const body = new ReadableStream({
          async pull(controller) {
            if (hasEvent) return controller.error(new TypeError("cut"));
            const { value } = await reader.read();
            hasEvent = new TextDecoder().decode(value).includes("data:");
            controller.enqueue(value);
          },
        });
        return new Response(body, response);
      },
    });
    const ids: string[] = [];
    const versions: number[] = [];
    const params = { path: { name: "stream" } };
    const signal = AbortSignal.timeout(60_000);
    for await (const { id, data } of events(client, "/v1/pull-secrets/{name}/events", { params, signal })) {
      ids.push(id);
      versions.push(data.version);
      if (data.version === 2) break;
      await client.PUT("/v1/pull-secrets/{name}", { params, body: { ...declaration, serviceAccounts: ["default"] } });
    }
    return { ids, versions };
  };
  const seen = await page.evaluate(read, { api, key, declaration });

  assert.deepEqual(seen.versions, [1, 2]);
  assert.deepEqual(requests.map(({ id }) => id), [undefined, seen.ids[0]]);
  assert.deepEqual(requests.map(({ cookie }) => cookie), [undefined, undefined]);
});

test("page_of_an_unlisted_origin_is_refused", async () => {
  const { page } = await open();

  // The page itself is allowed, so the request comes from an opaque origin.
  const failed = await page.evaluate(
    ({ api, key }) =>
      new Promise<string>((resolve) => {
        addEventListener("message", ({ data }) => resolve(String(data)));
        const frame = document.createElement("iframe");
        frame.setAttribute("sandbox", "allow-scripts");
        frame.srcdoc = `<script>
          fetch(${JSON.stringify(`${api}/v1/me`)}, { headers: { Authorization: ${JSON.stringify(`Bearer ${key}`)} } })
            .then(() => "answered", (error) => error.name).then((result) => parent.postMessage(result, "*"));
        </script>`;
        document.body.append(frame);
      }),
    { api, key },
  );

  assert.equal(failed, "TypeError");
});
