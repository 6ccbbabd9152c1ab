/** Time to wait for at most, in milliseconds, whatever `Retry-After` says. */
const MAX_DELAY = 30_000;

/** Resolves after a time, or as soon as the signal is aborted. */
export function sleep(milliseconds: number, signal?: AbortSignal | null): Promise<void> {
  return new Promise((resolve) => {
    if (signal?.aborted) return resolve();
    const done = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    signal?.addEventListener("abort", done);
  });
}

/** Delay before a retry, in milliseconds: doubled by each attempt, with jitter, so that clients do not return together. */
export function backoff(attempt: number, base: number): number {
  return Math.min(MAX_DELAY, base * 2 ** attempt) * (0.5 + Math.random() / 2);
}

/** `Retry-After` of a response in milliseconds; regcred sends seconds. */
export function retryAfter(response: Response): number | undefined {
  const seconds = Number(response.headers.get("Retry-After") ?? Number.NaN);
  return Number.isFinite(seconds) ? Math.min(MAX_DELAY, seconds * 1000) : undefined;
}

/**
 * Wraps `fetch` with retries.
 *
 * With `Retry-After`, regcred asks for the repetition of any request: 429, 503, and 409 while a request with the same
 * `Idempotency-Key` is in progress. After a network error the change may have happened: only reads and requests with an
 * `Idempotency-Key` are repeated.
 */
export function retrying(
  fetch: (request: Request) => Promise<Response>,
  retries: number,
): (request: Request) => Promise<Response> {
  return async (request) => {
    const repeatable = request.method === "GET" || request.headers.has("Idempotency-Key");
    for (let attempt = 0; ; attempt++) {
      const isLast = attempt >= retries;
      let delay = backoff(attempt, 250);
      try {
        const response = await fetch(isLast ? request : request.clone());
        const after = [409, 429, 503].includes(response.status) ? retryAfter(response) : undefined;
        if (isLast || after === undefined) return response;
        await response.body?.cancel();
        delay += after;
      } catch (error) {
        if (isLast || !repeatable || request.signal.aborted) throw error;
      }
      await sleep(delay, request.signal);
    }
  };
}
