// Rules that the pages compute by themselves.
import assert from "node:assert/strict";
import { test } from "node:test";
import { formatLabels, parseLabels, parseNames } from "../src/lib/labels.ts";
import { rbacYaml } from "../src/lib/rbac.ts";
import { matchingRule } from "../src/lib/rules.ts";

test("missing_rights_become_one_role_per_namespace", () => {
  const missing = [
    { verb: "create", resource: "secrets", namespace: "a", name: null },
    { verb: "get", resource: "secrets", namespace: "a", name: "pull" },
    { verb: "patch", resource: "secrets", namespace: "a", name: "pull" },
    { verb: "list", resource: "namespaces", namespace: null, name: null },
  ];
  const yaml = rbacYaml(missing, { namespace: "regcred", name: "broker" });
  const documents = yaml.split("---\n");
  assert.equal(documents.length, 4);
  assert.match(documents[0]!, /kind: ClusterRole\nmetadata: \{name: regcred\}\nrules:\n {2}- \{apiGroups: \[""\], resources: \[namespaces\], verbs: \[list\]\}\n$/);
  assert.match(documents[2]!, /kind: Role\nmetadata: \{name: regcred, namespace: a\}/);
  assert.match(documents[2]!, /resources: \[secrets\], verbs: \[create\]/);
  assert.match(documents[2]!, /resources: \[secrets\], resourceNames: \[pull\], verbs: \[get, patch\]/);
  assert.match(documents[3]!, /kind: RoleBinding[\s\S]*namespace: regcred, name: broker/);
});

test("first_rule_whose_claims_all_match_applies", () => {
  const rules = [
    { claims: { project_id: "42", ref_protected: "true" }, role: "deliverer" as const },
    { claims: { groups: "ops" }, role: "operator" as const },
  ];
  assert.equal(matchingRule(rules, { project_id: 42, ref_protected: true }), 0);
  assert.equal(matchingRule(rules, { project_id: "42" }), -1);
  assert.equal(matchingRule(rules, { groups: ["dev", "ops"] }), 1);
  assert.equal(matchingRule(rules, { groups: { ops: true } }), -1);
  assert.equal(matchingRule(rules, { groups: "Ops" }), -1);
});

test("labels_and_names_are_read_as_they_are_written", () => {
  const labels = { team: "a", tier: "prod", url: "x=y" };
  assert.deepEqual(parseLabels(formatLabels(labels)), labels);
  assert.deepEqual(parseLabels("  "), {});
  assert.deepEqual(parseNames("a, b  c,"), ["a", "b", "c"]);
});
