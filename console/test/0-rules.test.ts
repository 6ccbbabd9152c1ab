// Rules that the pages compute by themselves.
import assert from "node:assert/strict";
import { test } from "node:test";
import { applicableFixes, mayApply } from "../src/lib/diagnosis.ts";
import { draw } from "../src/lib/drawing.ts";
import { formatAccountGrants, parseAccountGrants } from "../src/lib/grants.ts";
import { formatLabels, parseLabels, parseNames } from "../src/lib/labels.ts";
import { readManifest } from "../src/lib/manifest.ts";
import { rbacYaml } from "../src/lib/rbac.ts";
import { isEditable, matchingRule, parseRule, ruleText } from "../src/lib/rules.ts";
import type { CoverageGroup, Diagnosis } from "../src/lib/types.ts";

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

test("pod_of_a_manifest_is_found_in_every_kind", async () => {
  const pod = { containers: [{ name: "app", image: "a/b:1" }], initContainers: [{ name: "init", image: "a/c:1" }] };
  const wrapped = (kind: string, spec: object): string => JSON.stringify({ kind, metadata: { namespace: "team-a" }, spec });
  const manifests = [
    wrapped("Pod", pod),
    wrapped("StatefulSet", { template: { spec: pod } }),
    wrapped("CronJob", { jobTemplate: { spec: { template: { spec: pod } } } }),
    JSON.stringify({ kind: "List", items: [{ kind: "Service" }, JSON.parse(wrapped("Job", { template: { spec: pod } }))] }),
    `kind: Service\n---\n${wrapped("DaemonSet", { template: { spec: pod } })}`,
  ];
  for (const manifest of manifests) {
    const found = await readManifest(manifest);
    assert.equal(found?.namespace, "team-a", manifest);
    assert.deepEqual(found.spec.containers, [{ name: "init", image: "a/c:1" }, { name: "app", image: "a/b:1" }]);
  }
  for (const other of ["", "nginx:1", "kind: Pod", "{", "- a", "kind: Pod\nspec: {containers: 7}"]) assert.equal(await readManifest(other), null, other);
});

test("fixes_are_offered_to_callers_with_all_of_their_permissions", () => {
  const fix = (type: string, secret: string, applicable = true): object => ({ type, secret, applicable, description: secret, steps: [], applied: false });
  const diagnosis = { problems: [], images: [{ fix: fix("createSecret", "a") }, { fix: fix("createSecret", "a") }, { fix: fix("syncPullSecret", "b") }, { fix: fix("replaceSecret", "c", false) }, { fix: null }] };
  const fixes = applicableFixes(diagnosis as unknown as Diagnosis);
  assert.deepEqual(fixes.map(({ secret }) => secret), ["a", "b"]);
  assert.equal(mayApply(fixes, () => true), true);
  assert.equal(mayApply(fixes, (permission) => permission === "deliverSecrets"), false);
  assert.equal(mayApply([], () => true), false);
});

/** A group of one Deployment in a namespace, with a login or without. */
function group(namespace: string, name: string, account: string | null): CoverageGroup {
  const credential = account === null ? null : { account, key: "r.example.com", pullSecret: null, secret: "pull", works: true };
  return {
    namespace,
    serviceAccount: "default",
    pullSecrets: ["pull"],
    pullSecretsFrom: "pod",
    repository: "r.example.com/app",
    versions: ["1"],
    workloads: [{ kind: "deployment", count: 1 }],
    example: { kind: "deployment", name },
    pods: 0,
    verdict: account === null ? "noSecret" : "ok",
    previousVerdict: null,
    sentence: "",
    failsAt: [],
    credential,
  };
}

test("drawing_is_bounded_and_shows_what_is_reached_first", () => {
  const groups = Array.from({ length: 40 }, (_, at) => group(`n-${String(at).padStart(2, "0")}`, "web", at === 39 ? "last" : "first"));
  const { columns, edges } = draw(groups, "last");
  assert.deepEqual(columns.account.map(({ text }) => text), ["first", "last"]);
  for (const column of ["secret", "namespace", "workload"] as const) {
    assert.equal(columns[column].length, 13, column);
    const [reached] = columns[column].filter((node) => node.reached > 0);
    assert.match(reached?.id ?? "", /n-39|deployment web/);
    const more = columns[column].at(-1);
    assert.deepEqual([more?.text, more?.count, more?.reached], ["", 28, 0]);
  }
  assert.deepEqual(edges.filter(({ isReached }) => isReached).map(({ from }) => from), ["account:last", "secret:pull · n-39", "namespace:n-39"]);
  assert.ok(edges.length <= 3 * 13 + 3, `${edges.length} edges`);
  // What a selection reaches is counted, also where it is not drawn.
  const all = draw(groups, "first").columns.namespace.at(-1);
  assert.deepEqual([all?.count, all?.reached], [28, 27]);
});

test("workload_without_a_login_is_drawn_without_a_way_from_an_account", () => {
  const { columns, edges } = draw([group("a", "web", "one"), group("b", "bare", null)], "one");
  assert.deepEqual(columns.account.map(({ text, reached }) => [text, reached]), [["one", 1]]);
  assert.deepEqual(columns.secret.map(({ text }) => text), ["pull · a"]);
  assert.deepEqual(columns.workload.map(({ text, verdict, reached }) => [text, verdict, reached]), [["deployment web", "ok", 1], ["deployment bare", "noSecret", 0]]);
  assert.deepEqual(edges.filter(({ isReached }) => !isReached).map(({ id }) => id), ["namespace:b workload:b/deployment bare"]);
});

test("rule_stays_the_same_as_text", () => {
  const rule = {
    claims: { sub: "repo:a/b:ref=main", group: "two words" },
    role: "deliverer" as const,
    grants: { accounts: ["team-*", { matchLabels: { team: "a", tier: "prod" } }], clusters: ["dev"], namespaces: ["*"] },
  };
  assert.deepEqual(parseRule(ruleText(rule)), rule);
  assert.ok(isEditable(rule));
  assert.ok(!isEditable({ ...rule, claims: { sub: "two\nlines=1" } }));
  assert.equal(formatAccountGrants(parseAccountGrants("a, team=x+tier=y b")), "a, team=x+tier=y, b");
  // Nothing is granted by leaving a field empty.
  assert.deepEqual(parseRule({ claims: "a=1", role: "operator", accounts: "", clusters: "", namespaces: "" }).grants, { accounts: [], clusters: [], namespaces: [] });
});
