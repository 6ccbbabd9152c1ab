import type { Grants } from "./types.ts";

type AccountGrant = NonNullable<Grants["accounts"]>[number];

/** Rules for accounts as people type them: `team-*` is a name, `team=a` a label, `team=a+tier=prod` two labels of one rule. */
export function parseAccountGrants(text: string): AccountGrant[] {
  return text.split(/[\s,]+/).filter(Boolean).map((rule) => {
    if (!rule.includes("=")) return rule;
    const labels = rule.split("+").map((pair) => {
      const [key = "", ...value] = pair.split("=");
      return [key, value.join("=")];
    });
    return { matchLabels: Object.fromEntries(labels) };
  });
}

export function formatAccountGrants(grants: AccountGrant[] | null | undefined): string {
  const rules = (grants ?? []).map((rule) =>
    typeof rule === "string" ? rule : Object.entries(rule.matchLabels).map(([key, value]) => `${key}=${value}`).join("+"),
  );
  return rules.join(", ");
}
