import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import type { Environment, Observed } from "./scenario.ts";

/** Value of a variable that dev/with-regcred sets. */
export function variable(name: string): string {
  const value = process.env[name];
  assert.ok(value, `${name} is not set: run \`make client-test\``);
  return value;
}

export const api = variable("REGCRED_TEST_API");
export const key = variable("REGCRED_TEST_KEY");

/** Environment of the scenario; the prefix separates test files that run side by side. */
export function environment(prefix: string): Environment {
  return {
    api,
    key,
    prefix,
    kubeconfig: readFileSync(`${variable("REGCRED_TEST_KUBE_DIR")}/kubeconfig`, "utf8"),
    registryA: variable("REGCRED_TEST_REGISTRY_A"),
    registryB: variable("REGCRED_TEST_REGISTRY_B"),
  };
}

/** Asserts what the scenario must see, wherever it runs. */
export function assertObserved(observed: Observed, { prefix, registryA, registryB }: Environment): void {
  assert.deepEqual(observed.secretKeys, [registryA, registryB].sort());
  assert.deepEqual(
    { ...observed.collision, title: observed.collision.title.length > 0 },
    { isCollision: true, isOther: false, status: 409, title: true },
  );
  assert.equal(observed.stale, true);
  assert.equal(observed.missing.name, "ProblemError");
  assert.equal(observed.missing.isNotFound, true);
  assert.match(observed.missing.message, /\(404\)/);
  assert.deepEqual(observed.names, [`${prefix}-a`, `${prefix}-b`, `${prefix}-c`]);
  assert.equal(observed.requestsOfPages, 2);
  assert.deepEqual(observed.changes, ["changed 2"]);
  assert.deepEqual(observed.events.at(-1), { event: "status", settled: true, desired: 2, synced: 2 });
  assert.deepEqual(observed.waited, { synced: 2, applied: "wait=30" });
  const uuid = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;
  for (const key of observed.keys) assert.match(key ?? "", uuid);
  assert.equal(new Set(observed.keys).size, observed.keys.length);
}
