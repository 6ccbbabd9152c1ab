import { formatAccountGrants, parseAccountGrants } from "./grants.ts";
import { parseNames } from "./labels.ts";
import type { IdentityProvider, Role } from "./types.ts";

type Rule = IdentityProvider["rules"][number];

/** A rule as people edit it: a claim per line, and grants as names. */
export interface RuleText {
  claims: string;
  role: Role;
  accounts: string;
  clusters: string;
  namespaces: string;
}

export function ruleText({ claims, role, grants }: Rule): RuleText {
  return {
    claims: Object.entries(claims).map(([name, value]) => `${name}=${value}`).join("\n"),
    role,
    accounts: formatAccountGrants(grants?.accounts),
    clusters: (grants?.clusters ?? []).join(", "),
    namespaces: (grants?.namespaces ?? []).join(", "),
  };
}

/** The grants are always named: what a role gets without any differs by role, and could be more than was meant. */
export function parseRule({ claims, role, accounts, clusters, namespaces }: RuleText): Rule {
  const lines = claims.split("\n").filter((line) => line.trim() !== "");
  const pairs = lines.map((line) => {
    const at = line.indexOf("=");
    return at < 0 ? [line.trim(), ""] : [line.slice(0, at).trim(), line.slice(at + 1).trim()];
  });
  return {
    claims: Object.fromEntries(pairs),
    role,
    grants: { accounts: parseAccountGrants(accounts), clusters: parseNames(clusters), namespaces: parseNames(namespaces) },
  };
}

/** Whether a rule stays the same as text: a claim may have line breaks, or a name with `=`. */
export function isEditable(rule: Rule): boolean {
  const { claims, grants } = parseRule(ruleText(rule));
  const before = { accounts: rule.grants?.accounts ?? [], clusters: rule.grants?.clusters ?? [], namespaces: rule.grants?.namespaces ?? [] };
  return JSON.stringify([claims, grants]) === JSON.stringify([rule.claims, before]);
}

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
