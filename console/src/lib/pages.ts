import type { Component } from "svelte";
import type { TextName } from "./i18n.svelte.ts";

export interface PageEntry {
  /** First segment of the address; empty for the first page. */
  id: string;
  name: TextName;
  /** Permission without which the page is not offered. */
  permission: string;
  load: () => Promise<{ default: Component }>;
}

/** Pages in the order of the navigation. Each is loaded when it is first shown. */
export const PAGES: PageEntry[] = [
  { id: "", name: "nav.overview", permission: "readPullSecrets", load: () => import("../pages/Overview.svelte") },
  { id: "accounts", name: "nav.accounts", permission: "readAccounts", load: () => import("../pages/Accounts.svelte") },
  { id: "pull-secrets", name: "nav.pullSecrets", permission: "readPullSecrets", load: () => import("../pages/PullSecrets.svelte") },
  { id: "clusters", name: "nav.clusters", permission: "readClusters", load: () => import("../pages/Clusters.svelte") },
  { id: "explain", name: "nav.explain", permission: "readAccounts", load: () => import("../pages/Explain.svelte") },
  { id: "doctor", name: "nav.doctor", permission: "diagnosePods", load: () => import("../pages/Doctor.svelte") },
  { id: "access", name: "nav.access", permission: "authenticated", load: () => import("../pages/Access.svelte") },
  { id: "audit", name: "nav.audit", permission: "readAudit", load: () => import("../pages/Audit.svelte") },
];
