/** An event as it was sent. */
export interface RawEvent {
  event: string;
  data: string;
  /** Id of this event, or of the last one before it that had an id. */
  id: string;
}

/** Parses a stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html). */
export class EventParser {
  /** Reconnection time that the server asked for, in milliseconds. */
  retry: number | undefined;
  #rest = "";
  #event = "";
  #data: string[] = [];
  #id: string;
  #place: string;

  constructor(lastEventId: string) {
    this.#id = lastEventId;
    this.#place = lastEventId;
  }

  /** Id to resume from. */
  get id(): string {
    return this.#place;
  }

  /** Events that the text completes. */
  *push(text: string): Generator<RawEvent, void, undefined> {
    // A final CR may be the first half of CRLF.
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop() ?? "";
    for (const line of lines) {
      if (line !== "") {
        this.#field(line);
        continue;
      }
      this.#place = this.#id; // of a whole block only
      if (this.#data.length > 0) {
        yield { event: this.#event || "message", data: this.#data.join("\n"), id: this.#id };
        this.#event = "";
        this.#data = [];
      } else this.#event = "";
    }
  }

  #field(line: string): void {
    const [, name, value = ""] = /^([^:]*)(?:: ?(.*))?$/s.exec(line) ?? [];
    if (name === "event") this.#event = value;
    else if (name === "data") this.#data.push(value);
    else if (name === "id" && !value.includes("\0")) this.#id = value;
    else if (name === "retry" && /^\d+$/.test(value)) this.retry = Number(value);
  }
}
