import { type RegcredClient, type UntypedGet, unwrap } from "./client.js";
import { EventParser, type RawEvent } from "./event-parser.js";
import { ProblemError } from "./problem.js";
import { backoff, sleep } from "./retry.js";
import type { paths } from "./schema.js";

type DataOf<Path extends keyof paths> = paths[Path] extends {
  get: { responses: { 200: { content: { "text/event-stream": infer Data } } } };
}
  ? Data
  : never;

/** Paths of event streams. */
export type EventPath = {
  [Path in keyof paths]: [DataOf<Path>] extends [never] ? never : Path;
}[keyof paths];

/** An event of a stream. */
export interface ServerEvent<Data> {
  /** Id of the event; empty if the stream has none. */
  id: string;
  /** Name of the event, such as `status` or `reset`. */
  event: string;
  data: Data;
}

type ParametersOf<Path extends EventPath> = paths[Path] extends { get: { parameters: infer Parameters } }
  ? Parameters
  : never;

/** Parameters of a stream. */
export type EventsOptions<Path extends EventPath> = {
  /** Ends the iteration. */
  signal?: AbortSignal;
  /** Id of the last event that was received, to resume an earlier stream. */
  lastEventId?: string;
  /** Time without any data after which to reconnect, in milliseconds. 45,000 by default: three heartbeats. */
  idleTimeout?: number;
} & (ParametersOf<Path> extends { path: unknown } ? { params: ParametersOf<Path> } : { params?: ParametersOf<Path> });

/**
 * Iterates over the events of a stream. It sends the `Authorization` header, which `EventSource` cannot.
 *
 * Reconnects with `Last-Event-ID` after an interruption, with growing delays, and drops an event that repeats the last
 * id. If a stream cannot continue from there, its next event is `reset`: load again. The iteration ends when the resource
 * is gone, or when the signal is aborted.
 *
 * @throws ProblemError if regcred refuses the stream, such as 401 or 404
 */
export async function* events<Path extends EventPath>(
  client: RegcredClient,
  path: Path,
  ...[options]: EventsOptions<Path> extends { params: unknown } ? [EventsOptions<Path>] : [EventsOptions<Path>?]
): AsyncGenerator<ServerEvent<DataOf<Path>>, void, undefined> {
  const { signal, lastEventId = "", idleTimeout = 45_000, params } = options ?? {};
  const get = client.GET as unknown as UntypedGet<ReadableStream<Uint8Array>>;
  let last = lastEventId;
  let retry = 1_000;
  for (let attempt = 0; !signal?.aborted; attempt++) {
    const connection = new Connection(signal, idleTimeout);
    const parser = new EventParser(last);
    try {
      const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
      const init = { params, headers, parseAs: "stream", signal: connection.signal };
      const body = await unwrap(get(path, init));
      for await (const event of connection.events(body, parser)) {
        attempt = 0;
        if (event.event === "end") {
          if (isGone(event)) return;
          break;
        }
        // The place of a reset may be that of the last event.
        if (event.id && event.id === last && event.event !== "reset") continue;
        last = event.id;
        yield { id: event.id, event: event.event, data: JSON.parse(event.data) as DataOf<Path> };
      }
    } catch (error) {
      if (signal?.aborted) return;
      // Syntax errors and refusals would come again; everything else is an interruption.
      if (error instanceof SyntaxError || (error instanceof ProblemError && !isTemporary(error))) throw error;
    } finally {
      connection.close();
    }
    // Heartbeats move the place past events that were left out.
    last = parser.id;
    retry = parser.retry ?? retry;
    await sleep(backoff(attempt, retry), signal);
  }
}

function isGone(event: RawEvent): boolean {
  return (JSON.parse(event.data) as { reason?: string }).reason === "gone";
}

function isTemporary(problem: ProblemError): boolean {
  return problem.status >= 500 || problem.status === 429 || problem.status === 408;
}

/** One connection of a stream. It is aborted with the caller's signal, and if no data arrives in time. */
class Connection {
  readonly signal: AbortSignal;
  readonly #controller = new AbortController();
  readonly #idleTimeout: number;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(signal: AbortSignal | undefined, idleTimeout: number) {
    const own = this.#controller.signal;
    this.signal = signal ? AbortSignal.any([signal, own]) : own;
    this.#idleTimeout = idleTimeout;
    this.#startTimer();
  }

  async *events(body: ReadableStream<Uint8Array>, parser: EventParser): AsyncGenerator<RawEvent, void, undefined> {
    const decoder = new TextDecoder();
    const reader = body.getReader();
    for (;;) {
      this.#startTimer();
      const { done, value } = await reader.read();
      clearTimeout(this.#timer); // the consumer may take its time
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  }

  close(): void {
    clearTimeout(this.#timer);
    this.#controller.abort();
  }

  #startTimer(): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#controller.abort(new Error("no data in time")), this.#idleTimeout);
  }
}
