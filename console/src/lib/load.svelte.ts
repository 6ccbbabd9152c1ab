import { untrack } from "svelte";
import { asProblem, type Problem } from "./api.svelte.ts";
import { live } from "./live.svelte.ts";
import { tick } from "./time.svelte.ts";
import type { ResourceKind } from "./types.ts";

/** Content of a panel: it loads by itself, and a slow or failed one leaves the others alone. */
export class Loader<T> {
  data = $state.raw<T>();
  problem = $state.raw<Problem>();
  isLoading = $state(true);
  #run: ((signal: AbortSignal) => Promise<T>) | undefined;
  #controller = new AbortController();

  /** Loads with another request. What was shown stays until its result, so that a list does not flicker. */
  start(run: (signal: AbortSignal) => Promise<T>): void {
    this.#run = run;
    void this.refresh();
  }

  /** Loads again. */
  async refresh(): Promise<void> {
    if (!this.#run) return;
    this.#controller.abort();
    const controller = (this.#controller = new AbortController());
    this.isLoading = true;
    try {
      const data = await this.#run(controller.signal);
      if (controller.signal.aborted) return;
      tick();
      this.data = data;
      this.problem = undefined;
    } catch (error) {
      if (controller.signal.aborted) return;
      this.problem = asProblem(error);
    }
    this.isLoading = false;
  }

  stop(): void {
    this.#controller.abort();
  }
}

/**
 * Loads while a component is shown. `request` reads what the request depends on, and returns it; it runs again when that
 * changes, and after changes of the resources of `kinds`.
 */
export function load<T>(request: () => (signal: AbortSignal) => Promise<T>, kinds: ResourceKind[] = []): Loader<T> {
  const loader = new Loader<T>();
  $effect(() => {
    const run = request();
    untrack(() => loader.start(run));
    return () => loader.stop();
  });
  if (kinds.length > 0) $effect(() => live.follow(kinds, () => void loader.refresh()));
  return loader;
}
