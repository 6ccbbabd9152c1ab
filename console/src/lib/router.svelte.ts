/** Addresses of the console: `/console/PAGE/NAME?QUERY`. The state of a page is in its address. */

const BASE = "/console";

class Router {
  /** Segments below the base, decoded. */
  path = $state.raw<string[]>([]);
  query = $state.raw(new URLSearchParams());
  /** Cursors of the pages before this one, for the way back. */
  before = $state.raw<(string | null)[]>([]);

  constructor() {
    this.#read();
    addEventListener("popstate", () => this.#read());
    document.addEventListener("click", (event) => this.#follow(event));
  }

  /** Value of a parameter; empty if it is absent. */
  get(name: string): string {
    return this.query.get(name) ?? "";
  }

  /** Goes to an address of the console. */
  go(href: string): void {
    history.pushState(null, "", href);
    this.#read();
    scrollTo(0, 0);
  }

  /**
   * Changes parameters of the address; an empty value removes one. Another filter begins with the first page. `keep`
   * replaces the entry of the history, for text that is being typed.
   */
  set(values: Record<string, string | null>, options: { keep?: boolean } = {}): void {
    const query = new URLSearchParams(this.query);
    query.delete("cursor");
    for (const [name, value] of Object.entries(values)) {
      if (value) query.set(name, value);
      else query.delete(name);
    }
    this.#show(query, [], options.keep ?? false);
  }

  /** Shows the page of a list that begins after a cursor. */
  next(cursor: string): void {
    const query = new URLSearchParams(this.query);
    query.set("cursor", cursor);
    this.#show(query, [...this.before, this.query.get("cursor")], false);
  }

  /** Shows the page before, or the first one if it is unknown. */
  previous(): void {
    const query = new URLSearchParams(this.query);
    const cursor = this.before.at(-1);
    if (cursor) query.set("cursor", cursor);
    else query.delete("cursor");
    this.#show(query, this.before.slice(0, -1), false);
  }

  #show(query: URLSearchParams, before: (string | null)[], keep: boolean): void {
    const text = query.toString();
    const href = location.pathname + (text ? `?${text}` : "");
    if (keep) history.replaceState({ before }, "", href);
    else history.pushState({ before }, "", href);
    this.#read();
  }

  #read(): void {
    const path = location.pathname.slice(BASE.length).split("/").filter(Boolean).map(decode);
    if (path.join("/") !== this.path.join("/")) this.path = path;
    this.query = new URLSearchParams(location.search);
    this.before = (history.state as { before?: (string | null)[] } | null)?.before ?? [];
  }

  #follow(event: MouseEvent): void {
    if (event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    const link = event.target instanceof Element ? event.target.closest("a") : null;
    if (!link || link.target || link.hasAttribute("download") || link.origin !== location.origin) return;
    if (link.pathname !== BASE && !link.pathname.startsWith(`${BASE}/`)) return;
    event.preventDefault();
    this.go(link.pathname + link.search);
  }
}

function decode(segment: string): string {
  try {
    return decodeURIComponent(segment);
  } catch {
    return segment;
  }
}

export const router = new Router();

/** Address of a page, such as `to("accounts", "prod")`. */
export function to(...segments: string[]): string {
  return [BASE, ...segments.map(encodeURIComponent)].join("/") + (segments.length === 0 ? "/" : "");
}
