import createFetchClient, { type Client } from "openapi-fetch";
import { asProblem, type Problem, ProblemError } from "./problem.js";
import { retrying } from "./retry.js";
import type { paths } from "./schema.js";

/** Media types that results are typed for. For others, set `parseAs`: `"text"` or `"stream"`. */
export type JsonMedia = "application/json" | "application/problem+json";

/** A client of openapi-fetch: `GET`, `POST`, `PUT`, `PATCH` and `DELETE` take a path of the API document. */
export type RegcredClient = Client<paths, JsonMedia>;

export interface ClientOptions {
  /** Address of regcred, without `/v1`. */
  baseUrl: string;
  /**
   * API key or token. A function is called for each request, so that it can renew a token. `null` is for pages of regcred
   * itself: the cookie of their session authenticates.
   */
  token: string | null | (() => string | Promise<string>);
  /** How often to repeat a request that was refused with 429 or 503, or that broke off. 2 by default; 0 for never. */
  retries?: number;
  /** Replaces the global `fetch`, for a proxy or a test. */
  fetch?: (request: Request) => Promise<Response>;
}

/** Creates a client. Each `POST` and `PATCH` gets an `Idempotency-Key`, unless it has one. */
export function createClient(options: ClientOptions): RegcredClient {
  const { baseUrl, token, retries = 2 } = options;
  const fetch = options.fetch ?? ((request: Request) => globalThis.fetch(request));
  // With a token, without cookies: it is the only credential. Responses may hold passwords, so no cache keeps them.
  const client = createFetchClient<paths, JsonMedia>({
    baseUrl,
    fetch: retrying(fetch, retries),
    credentials: token === null ? "same-origin" : "omit",
    cache: "no-store",
  });
  client.use({
    async onRequest({ request }) {
      if (token !== null && !request.headers.has("Authorization")) {
        request.headers.set("Authorization", `Bearer ${typeof token === "string" ? token : await token()}`);
      }
      if (["POST", "PATCH"].includes(request.method) && !request.headers.has("Idempotency-Key")) {
        request.headers.set("Idempotency-Key", randomUuid());
      }
    },
    onResponse: ({ request, response }) => asProblem(response, request.url),
  });
  return client;
}

/** A random UUID (version 4), also in pages that were not loaded over TLS, where `crypto.randomUUID` is missing. */
function randomUuid(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6]! & 0x0f) | 0x40;
  bytes[8] = (bytes[8]! & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/** @internal */
export type UntypedGet<Data> = (path: string, init: object) => Promise<Result<Data>>;

type Result<Data> = { data?: Data; error?: unknown; response: Response };

/** Returns the data of a result, or throws its problem as a {@link ProblemError}. */
export async function unwrap<Data>(result: Result<Data> | Promise<Result<Data>>): Promise<NonNullable<Data>> {
  const { data, error, response } = await result;
  if (!response.ok) throw new ProblemError(error as Problem);
  return data as NonNullable<Data>;
}

/** Header parameters that make a change conditional: it fails with 412 `stale-version` if the resource has changed. */
export function ifMatch(resource: { version: number }): { "If-Match": string } {
  return { "If-Match": `"${resource.version}"` };
}
