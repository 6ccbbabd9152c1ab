import type { components } from "./schema.js";

/** A problem (RFC 9457): the `error` of a result. */
export type Problem = components["schemas"]["Problem"];

const TYPES = "https://regcred.dev/problems/";

/** Last segment of a problem type of this release, such as `key-collision`. A later release may have more. */
export type ProblemSlug = components["schemas"]["ProblemType"] extends infer Type
  ? Type extends `${typeof TYPES}${infer Slug}`
    ? Slug
    : never
  : never;

/** A problem that was thrown. It has the fields of the problem. */
export class ProblemError extends Error implements Problem {
  override readonly name = "ProblemError";
  readonly type: string;
  readonly title: string;
  readonly status: number;
  readonly detail: string;
  readonly instance: string;
  readonly requestId: string;
  readonly errors?: NonNullable<Problem["errors"]>;

  constructor(problem: Problem) {
    super(`${problem.title} (${problem.status}): ${problem.detail}`);
    this.type = problem.type;
    this.title = problem.title;
    this.status = problem.status;
    this.detail = problem.detail;
    this.instance = problem.instance;
    this.requestId = problem.requestId;
    if (problem.errors) this.errors = problem.errors;
  }
}

/**
 * Whether an error of a result, or a caught error, is a problem; with `slug`, a problem of this type, such as
 * `key-collision`.
 */
export function isProblem(error: unknown, slug?: ProblemSlug): error is Problem {
  if (typeof error !== "object" || error === null) return false;
  const { type, status } = error as Partial<Problem>;
  if (typeof type !== "string" || typeof status !== "number") return false;
  return slug === undefined || type === TYPES + slug;
}

/**
 * Replaces an error response that is not a problem, such as that of a proxy, by a problem of type `about:blank`.
 *
 * @internal
 */
export async function asProblem(response: Response, url: string): Promise<Response> {
  if (response.ok || response.headers.get("Content-Type")?.startsWith("application/problem+json")) return response;
  const text = await response.text();
  const problem: Problem = {
    type: "about:blank",
    title: response.statusText || `Status ${response.status}`,
    status: response.status,
    detail: text.slice(0, 500) || "The response has no body; a proxy may have sent it",
    instance: new URL(url).pathname,
    requestId: response.headers.get("X-Request-Id") ?? "",
  };
  const headers = new Headers(response.headers);
  headers.delete("Content-Length");
  headers.delete("Content-Encoding");
  headers.set("Content-Type", "application/problem+json");
  return new Response(JSON.stringify(problem), { status: response.status, statusText: response.statusText, headers });
}
