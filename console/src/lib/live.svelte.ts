import { events } from "@regcred/client";
import { api, can, status } from "./api.svelte.ts";
import type { ResourceKind } from "./types.ts";

/** Changes that come together are one refresh. */
const GATHER = 100;
/** Pause between two refreshes: a rotation changes thousands of targets. */
const PAUSE = 1_000;
/** Time without input after which changes are not followed, so that an unattended page lets its session end. */
const ATTENDED = 10 * 60_000;

type Follower = { kinds: ResourceKind[]; refresh: () => void };

/**
 * Changes of all resources: one stream per tab, closed while the tab is hidden or unattended. Browsers open only six
 * connections to a host.
 */
class Live {
  isConnected = $state(false);
  #followers = new Set<Follower>();
  #controller: AbortController | undefined;
  #lastInput = Date.now();
  #changed = new Set<ResourceKind>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #lastRefresh = 0;

  constructor() {
    document.addEventListener("visibilitychange", () => this.#update());
    for (const input of ["pointerdown", "keydown", "wheel"]) {
      addEventListener(input, () => this.#attend(), { passive: true });
    }
    setInterval(() => this.#update(), 30_000);
  }

  /** Calls `refresh` after changes of resources of these kinds, until the returned function is called. */
  follow(kinds: ResourceKind[], refresh: () => void): () => void {
    const follower: Follower = { kinds, refresh };
    this.#followers.add(follower);
    this.#update();
    return () => void this.#followers.delete(follower);
  }

  /** Whether the tab is shown, and was used in the last minutes. Only then does it ask for changes by itself. */
  isAttended(): boolean {
    return !document.hidden && Date.now() - this.#lastInput < ATTENDED;
  }

  /** Opens or closes the stream, as the caller and the tab require. */
  #update(): void {
    const wanted = status.me && this.isAttended() && this.#followers.size > 0;
    if (wanted && !this.#controller) void this.#read((this.#controller = new AbortController()));
    if (!wanted && this.#controller) {
      this.#controller.abort();
      this.#controller = undefined;
      this.isConnected = false;
    }
  }

  #attend(): void {
    const wasAttended = this.isAttended();
    this.#lastInput = Date.now();
    if (!wasAttended) this.#update();
  }

  async #read(controller: AbortController): Promise<void> {
    const kind: ResourceKind[] = [];
    if (can("readAccounts")) kind.push("registryAccount");
    if (can("readPullSecrets")) kind.push("pullSecret", "target");
    if (can("readClusters")) kind.push("cluster");
    let isFirst = true;
    try {
      const { signal } = controller;
      for await (const { data } of events(api, "/v1/events", { params: { query: { kind } }, signal })) {
        this.isConnected = true;
        // A new stream begins with a reset, when the panels have just loaded.
        if (data.kind !== "reset") this.#notify(data.kind);
        else if (!isFirst) for (const each of kind) this.#notify(each);
        isFirst = false;
      }
    } catch {
      // Pages show what they loaded; the next update tries again.
    }
    if (this.#controller === controller) {
      this.#controller = undefined;
      this.isConnected = false;
    }
  }

  /** Panels are refreshed together, so that what they show agrees. */
  #notify(kind: ResourceKind): void {
    this.#changed.add(kind);
    this.#timer ??= setTimeout(() => this.#refresh(), Math.max(GATHER, this.#lastRefresh + PAUSE - Date.now()));
  }

  #refresh(): void {
    const changed = this.#changed;
    this.#changed = new Set();
    this.#timer = undefined;
    this.#lastRefresh = Date.now();
    for (const { kinds, refresh } of this.#followers) {
      if (kinds.some((kind) => changed.has(kind))) refresh();
    }
  }
}

export const live = new Live();
