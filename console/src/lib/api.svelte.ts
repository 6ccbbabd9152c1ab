import { createClient, isProblem, type Problem, ProblemError, unwrap } from "@regcred/client";
import type { Me, Page } from "./types.ts";

/** State of the connection to regcred, as the last request found it. */
export type Connection = "ok" | "offline" | "unavailable";

class Status {
  connection = $state<Connection>("ok");
  /** The caller; `undefined` while it is being asked for, `null` without a session. */
  me = $state.raw<Me | null | undefined>(undefined);
  /** Whether a session ended without being asked to. */
  hasExpired = $state(false);
}

export const status = new Status();

/** Notes what a request shows of the connection and of the session. */
async function observed(request: Request): Promise<Response> {
  try {
    const response = await fetch(request);
    // All streams may be in use while everything else works.
    const isStream = new URL(request.url).pathname === "/v1/events";
    if (!isStream) status.connection = response.status === 503 ? "unavailable" : "ok";
    if (response.status === 401 && status.me) endSession();
    return response;
  } catch (error) {
    if (!request.signal.aborted) status.connection = "offline";
    throw error;
  }
}

export const api = createClient({ baseUrl: location.origin, token: null, fetch: observed });

function endSession(): void {
  status.hasExpired = true;
  status.me = null;
}

/** Asks who the caller is. */
export async function loadCaller(): Promise<void> {
  try {
    status.me = await unwrap(api.GET("/v1/me"));
  } catch (error) {
    if (isProblem(error) && (error.status === 401 || error.status === 403)) status.me = null;
    else throw error;
  }
}

/** Exchanges an API key for a session. The key is kept nowhere. */
export async function signIn(key: string): Promise<void> {
  await unwrap(api.POST("/v1/sessions", { headers: { Authorization: `Bearer ${key}` } }));
  status.hasExpired = false;
  await loadCaller();
}

/** Ends the session in every tab and replica. */
export async function signOut(): Promise<void> {
  await api.DELETE("/v1/sessions/{id}", { params: { path: { id: "current" } } });
  status.hasExpired = false;
  status.me = null;
}

/** Whether the caller has a permission. Controls that would be refused are not shown. */
export function can(permission: string): boolean {
  return status.me?.permissions.includes(permission) ?? false;
}

/** Whether the grants of the caller include everything. */
export function hasAllGrants(): boolean {
  const { accounts, clusters, namespaces } = status.me?.grants ?? {};
  return [accounts, clusters, namespaces].every((rules) => rules?.some((rule) => rule === "*"));
}

/** A caught error as a problem. */
export function asProblem(error: unknown): Problem {
  if (isProblem(error)) return error;
  const detail = error instanceof Error ? error.message : String(error);
  return { type: "about:blank", title: "", status: 0, detail, instance: "", requestId: "" };
}

/**
 * Reads a page, and the following ones while they are empty: a page may have no items although more follow. Gives up after
 * a few, so that a list never reads without end.
 */
export async function firstItems<Item>(read: (cursor?: string) => Promise<Page<Item>>, cursor?: string): Promise<Page<Item>> {
  let page = await read(cursor);
  for (let reads = 1; page.items.length === 0 && page.next && reads < 5; reads++) page = await read(page.next);
  return page;
}

export { isProblem, ProblemError, unwrap };
export type { Problem };
