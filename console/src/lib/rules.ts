import type { IdentityProvider } from "./types.ts";

type Rule = IdentityProvider["rules"][number];

/** Index of the first rule whose claims all match, as regcred compares them; -1 if none does. */
export function matchingRule(rules: Rule[], claims: Record<string, unknown>): number {
  return rules.findIndex((rule) => Object.entries(rule.claims).every(([name, wanted]) => holds(claims[name], wanted)));
}

/** Numbers and booleans are compared as text; of a list, one element must match. */
function holds(claim: unknown, wanted: string): boolean {
  if (Array.isArray(claim)) return claim.some((element) => isText(element) && String(element) === wanted);
  return isText(claim) && String(claim) === wanted;
}

function isText(value: unknown): value is string | number | boolean {
  return ["string", "number", "boolean"].includes(typeof value);
}
