import { api, ProblemError, status, unwrap } from "./api.svelte.ts";
import { type TextName, t } from "./i18n.svelte.ts";
import { router, to } from "./router.svelte.ts";

/** Address to return to. It outlives the visit at the provider, in this tab only. */
const KEY = "regcred.return";
/** Page that a provider sends the browser back to. The name of the provider follows. */
const RETURN_PAGE = "login";
/** Errors of a provider (RFC 6749, section 4.1.2.1) that a person can do something about. */
const ERRORS: Record<string, TextName> = {
  access_denied: "login.denied",
  temporarily_unavailable: "login.unavailable",
  server_error: "login.unavailable",
};

/** Names of the identity providers through which people sign in. */
export async function loginProviders(signal: AbortSignal): Promise<string[]> {
  const { items } = await unwrap(api.GET("/login", { signal }));
  return items.map(({ name }) => name);
}

/** Leaves for the page of a provider. */
export async function startLogin(provider: string): Promise<void> {
  const { authorizationUrl } = await unwrap(api.POST("/login", { body: { provider } }));
  sessionStorage.setItem(KEY, location.pathname + location.search);
  location.assign(authorizationUrl);
}

/** Whether the browser comes back from a provider. */
export function isReturning(): boolean {
  return router.path[0] === RETURN_PAGE;
}

/** Exchanges what the provider gave the browser for a session. It leaves the address before anything else happens. */
export async function completeLogin(): Promise<void> {
  const answer = new URLSearchParams(location.search);
  const [code, state, issuer, error] = ["code", "state", "iss", "error"].map((name) => answer.get(name) ?? "");
  const provider = router.path[1] ?? "";
  const back = sessionStorage.getItem(KEY) ?? "";
  sessionStorage.removeItem(KEY);
  router.replace(back.startsWith(to()) && !back.startsWith(to(RETURN_PAGE)) ? back : to());
  if (error || !provider || !code || !state) throw refused(t(ERRORS[error ?? ""] ?? "login.failed"));
  await unwrap(api.POST("/login/complete", { body: { provider, code, state, ...(issuer && { iss: issuer }) } }));
  status.hasExpired = false;
}

function refused(detail: string): ProblemError {
  return new ProblemError({ type: "", title: t("login.title"), status: 403, detail, instance: "", requestId: "" });
}
