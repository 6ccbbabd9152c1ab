// Faults that the real server cannot be made to have. Every answer is one of the server of the test.
import assert from "node:assert/strict";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { type TestContext, test } from "node:test";
import { createClient, events, isProblem, pages, unwrap } from "@regcred/client";
import { EventParser } from "../dist/event-parser.js";

type Answer = (response: ServerResponse, request: IncomingMessage) => void;

/** Starts a server that gives one answer for each request, the last one for all further requests. */
async function serve(context: TestContext, answers: Answer[]) {
  const requests: IncomingMessage[] = [];
  const server = createServer((request, response) => {
    const answer = answers[Math.min(requests.length, answers.length - 1)];
    requests.push(request);
    answer?.(response, request);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  context.after(() => {
    server.closeAllConnections();
    server.close();
  });
  const baseUrl = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const header = (name: string) => requests.map(({ headers }) => headers[name]);
  return { client: createClient({ baseUrl, token: "rgc_x" }), baseUrl, requests, header };
}

const reset: Answer = (response) => response.socket?.destroy();
const json =
  (status: number, body: object, headers = {}): Answer =>
  (response) => {
    const type = status < 400 ? "application/json" : "application/problem+json";
    response.writeHead(status, { "Content-Type": type, ...headers }).end(JSON.stringify(body));
  };
const problem = (status: number, slug: string, headers = {}): Answer =>
  json(status, { type: `https://regcred.dev/problems/${slug}`, title: slug, status, detail: "…" }, headers);
const account = { name: "a", registry: "r.example.com", username: "u", password: "p" };
const path = { name: "a" };

test("retry_after_a_reset_has_the_same_idempotency_key", async (context) => {
  const { client, header } = await serve(context, [reset, reset, json(201, { name: "a" })]);

  const created = await unwrap(client.POST("/v1/registry-accounts", { body: account }));

  assert.equal(created.name, "a");
  const keys = header("idempotency-key");
  assert.equal(keys.length, 3);
  assert.equal(new Set(keys).size, 1);
  assert.match(String(keys[0]), /^[0-9a-f-]{36}$/);
});

test("client_of_a_session_sends_no_authorization", async (context) => {
  const { baseUrl, header } = await serve(context, [json(200, { name: "me" })]);
  const client = createClient({ baseUrl, token: null });

  await unwrap(client.GET("/v1/me"));
  await client.POST("/v1/sessions", { headers: { Authorization: "Bearer rgc_y" } });

  assert.deepEqual(header("authorization"), [undefined, "Bearer rgc_y"]);
});

test("idempotency_key_of_the_caller_is_kept", async (context) => {
  const { client, header } = await serve(context, [json(201, { name: "a" })]);

  await client.POST("/v1/registry-accounts", { body: account, headers: { "Idempotency-Key": "order-7" } });

  assert.deepEqual(header("idempotency-key"), ["order-7"]);
});

test("put_is_not_repeated_after_a_reset", async (context) => {
  const { client, requests } = await serve(context, [reset]);

  const body = { accounts: ["a"], secret: { name: "s" }, targets: [] };
  await assert.rejects(client.PUT("/v1/pull-secrets/{name}", { params: { path }, body }), TypeError);

  assert.equal(requests.length, 1);
});

test("refusal_with_retry_after_is_repeated_with_the_same_body", async (context) => {
  const bodies: string[] = [];
  const record =
    (answer: Answer): Answer =>
    (response, request) => {
      request.setEncoding("utf8").on("data", (text: string) => bodies.push(text));
      request.on("end", () => answer(response, request));
    };
  const busy = record(problem(503, "database-unavailable", { "Retry-After": "0" }));
  const { client } = await serve(context, [busy, record(json(200, { name: "a" }))]);

  const body = { accounts: ["a"], secret: { name: "s" }, targets: [] };
  await unwrap(client.PUT("/v1/pull-secrets/{name}", { params: { path }, body }));

  assert.deepEqual(bodies, [JSON.stringify(body), JSON.stringify(body)]);
});

test("retries_end_with_the_problem", async (context) => {
  const { client, requests } = await serve(context, [problem(429, "too-many-requests", { "Retry-After": "0" })]);

  const { error } = await client.GET("/v1/me");

  assert.ok(isProblem(error, "too-many-requests"));
  // @ts-expect-error A slug that the document does not list is a mistake.
  assert.ok(!isProblem(error, "too-many-request"));
  assert.equal(requests.length, 3);
});

test("response_of_a_proxy_becomes_a_problem", async (context) => {
  const html: Answer = (response) => response.writeHead(502, { "Content-Type": "text/html" }).end("<h1>Bad Gateway</h1>");
  const { client } = await serve(context, [html, (response) => response.writeHead(504).end()]);

  const first = await client.GET("/v1/me");
  const second = await client.GET("/v1/me");

  assert.ok(isProblem(first.error) && isProblem(second.error));
  assert.deepEqual(
    [first.error.type, first.error.status, first.error.detail, first.error.instance],
    ["about:blank", 502, "<h1>Bad Gateway</h1>", "/v1/me"],
  );
  assert.equal(second.error.status, 504);
});

test("page_that_fails_throws_its_problem", async (context) => {
  const { client, requests } = await serve(context, [
    json(200, { items: [{ name: "a" }], next: "c1" }),
    problem(403, "forbidden"),
  ]);

  const names: string[] = [];
  const all = async () => {
    for await (const { name } of pages(client, "/v1/clusters")) names.push(name);
  };

  await assert.rejects(all, (error) => isProblem(error, "forbidden"));
  assert.deepEqual([names, requests.map(({ url }) => url)], [["a"], ["/v1/clusters", "/v1/clusters?cursor=c1"]]);
});

const stream =
  (text: string, then: "end" | "reset" | "hang" = "end"): Answer =>
  (response) => {
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    response.write(text, () => {
      if (then === "end") response.end();
      else if (then === "reset") response.socket?.destroy();
    });
  };
const status = (id: string, synced: number) => `id: ${id}\nevent: status\ndata: {"status":{"synced":${synced}}}\n\n`;
const gone = 'event: end\ndata: {"reason":"gone"}\n\n';

test("stream_resumes_and_drops_repeated_events", async (context) => {
  const { client, header } = await serve(context, [
    stream(`retry: 1\n${status("1", 1)}${status("2", 2)}`, "reset"),
    reset,
    problem(503, "database-unavailable"),
    stream(`${status("2", 2)}${status("3", 3)}event: end\ndata: {"reason":"stopping"}\n\n`, "hang"),
    stream(status("3", 3) + gone, "hang"),
  ]);

  const seen: [string, number][] = [];
  for await (const { id, data } of events(client, "/v1/pull-secrets/{name}/events", { params: { path } })) {
    seen.push([id, data.status.synced]);
  }

  assert.deepEqual(seen, [["1", 1], ["2", 2], ["3", 3]]);
  assert.deepEqual(header("last-event-id"), [undefined, "2", "2", "2", "3"]);
  assert.deepEqual(new Set(header("authorization")), new Set(["Bearer rgc_x"]));
});

const resource = (id: string, event: string, data: object) =>
  `id: ${id}\nevent: ${event}\ndata: ${JSON.stringify({ kind: event, ...data })}\n\n`;

test("stream_resumes_behind_a_heartbeat_and_passes_resets_on", async (context) => {
  const { client, header } = await serve(context, [
    stream(`retry: 1\n${resource("e-0", "reset", {})}${resource("e-1", "cluster", { name: "dev" })}`, "reset"),
    // A heartbeat has the place, and is no event. An id that is cut off is none.
    stream(": heartbeat\nid: e-5\n\nid: e-9\n", "reset"),
    stream(resource("e-5", "reset", {}) + resource("e-6", "cluster", { name: "prod" })),
    stream('event: end\ndata: {"reason":"gone"}\n\n', "hang"),
  ]);

  const seen: [string, string][] = [];
  for await (const { id, data } of events(client, "/v1/events", { params: { query: { kind: ["cluster"] } } })) {
    seen.push([id, data.kind === "cluster" ? data.name : data.kind]);
  }

  assert.deepEqual(seen, [["e-0", "reset"], ["e-1", "dev"], ["e-5", "reset"], ["e-6", "prod"]]);
  assert.deepEqual(header("last-event-id"), [undefined, "e-1", "e-5", "e-6"]);
});

test("idle_stream_is_reconnected", async (context) => {
  const { client, header } = await serve(context, [
    stream(`retry: 1\n${status("1", 1)}`, "hang"),
    () => {}, // never answers
    stream(status("2", 2) + gone),
  ]);

  const ids: string[] = [];
  const options = { params: { path }, idleTimeout: 1_000 };
  for await (const { id } of events(client, "/v1/pull-secrets/{name}/events", options)) ids.push(id);

  assert.deepEqual([ids, header("last-event-id")], [["1", "2"], [undefined, "1", "1"]]);
});

test("refused_stream_throws_its_problem", async (context) => {
  const { baseUrl, header } = await serve(context, [
    stream(`retry: 1\n${status("1", 1)}event: end\ndata: {"reason":"unauthenticated"}\n\n`),
    problem(401, "unauthenticated"),
  ]);
  let number = 0;
  const client = createClient({ baseUrl, token: () => `t${++number}` });

  const read = async () => {
    for await (const _ of events(client, "/v1/pull-secrets/{name}/events", { params: { path } }));
  };

  await assert.rejects(read, (error) => isProblem(error, "unauthenticated"));
  assert.deepEqual(header("authorization"), ["Bearer t1", "Bearer t2"]);
});

test("aborted_stream_ends_quietly", async (context) => {
  const { client } = await serve(context, [stream(status("1", 1), "hang")]);
  const controller = new AbortController();

  const options = { params: { path }, signal: controller.signal };
  for await (const _ of events(client, "/v1/pull-secrets/{name}/events", options)) controller.abort();

  assert.ok(controller.signal.aborted);
});

test("parser_accepts_every_line_ending_at_every_split", () => {
  const text = ': comment\nid: 7\nevent:a\ndata: {\r\ndata:  "ä"}\r\rid\rdata\n\nevent: b\n\nretry: 5\ndata: x\n\ndata: cut';
  const expected = [
    { event: "a", data: '{\n "ä"}', id: "7" },
    { event: "message", data: "", id: "" },
    { event: "message", data: "x", id: "" },
  ];
  for (let split = 0; split <= text.length; split++) {
    const parser = new EventParser("");
    assert.deepEqual([...parser.push(text.slice(0, split)), ...parser.push(text.slice(split))], expected, `${split}`);
    assert.equal(parser.retry, 5);
  }
});
