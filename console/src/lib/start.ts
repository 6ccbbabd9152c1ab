import { to } from "./router.svelte.ts";
import type { Summary } from "./types.ts";

/** Step to the first pull secret. */
export interface StartStep {
  text: "start.account" | "start.cluster" | "start.pullSecret";
  href: string;
  permission: string;
  isDone: boolean;
}

/** Steps to the first pull secret, in order. The last one begins with an account, if it is given. */
export function startSteps({ registryAccounts, clusters, pullSecrets }: Summary, account?: string): StartStep[] {
  const declare = to("pull-secrets", "+", "declare");
  return [
    { text: "start.account", href: `${to("accounts")}?new=1`, permission: "writeAccounts", isDone: registryAccounts.total.count > 0 },
    { text: "start.cluster", href: `${to("clusters")}?new=1`, permission: "writeClusters", isDone: clusters.count > 0 },
    {
      text: "start.pullSecret",
      href: account === undefined ? declare : `${declare}?account=${encodeURIComponent(account)}`,
      permission: "writePullSecrets",
      isDone: Object.values(pullSecrets).some((n) => typeof n === "number" && n > 0),
    },
  ];
}
