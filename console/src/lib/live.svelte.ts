import { events } from "@regcred/client";
import { api, can, status } from "./api.svelte.ts";
import type { ResourceKind } from "./types.ts";

/** Pause between two refreshes of a panel: a rotation changes thousands of targets. */
const PAUSE = 1_000;
/** Time without input after which changes are not followed, so that an unattended page lets its session end. */
const ATTENDED = 10 * 60_000;

type Follower = { kinds: ResourceKind[]; refresh: () => void; timer?: ReturnType<typeof setTimeout> };

/**
 * Changes of all resources: one stream per tab, closed while the tab is hidden or unattended. Browsers open only six
 * connections to a host.
 */
class Live {
  isConnected = $state(false);
  #followers = new Set<Follower>();
  #controller: AbortController | undefined;
  #lastInput = Date.now();

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
    return () => {
      clearTimeout(follower.timer);
      this.#followers.delete(follower);
    };
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

  #notify(kind: ResourceKind): void {
    for (const follower of this.#followers) {
      if (!follower.kinds.includes(kind) || follower.timer) continue;
      follower.timer = setTimeout(() => {
        delete follower.timer;
        follower.refresh();
      }, PAUSE);
    }
  }
}

export const live = new Live();
