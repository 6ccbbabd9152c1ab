//! `regcred cluster rbac`: prints the RBAC rules that regcred requires in a cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Display, Formatter, Write as _},
};

use clap::{Args, Subcommand};

use crate::{
    cli::{CliError, database, print_text},
    domain::{
        cluster::ServiceAccountRef,
        invalid::Invalid,
        names::{Name, NamespaceName, SecretName, ServiceAccountName},
        rbac::{Diagnosed, RequiredRules, Rule},
    },
    service::rbac::{self, ClusterRules, NamedRules},
};

/// Names of pull secrets in one comment.
const NAMES_SHOWN: usize = 10;
/// Longest name of a user or group.
const SUBJECT_MAX: usize = 1024;

#[derive(Debug, Subcommand)]
pub(super) enum ClusterCommand {
    /// Print the RBAC manifests that pull secrets, minted accounts and the renewal of the token require
    /// in a cluster.
    ///
    /// Apply them with `kubectl apply -f -` as a user who may create roles in that cluster. A Role
    /// covers each listed namespace; a `ClusterRole` covers namespaces that are selected by label.
    /// Rules name the declared Secrets and `ServiceAccounts`, except `create`, which cannot. Print
    /// and apply them again after a new pull secret or minted account, or a change of namespaces, `ServiceAccounts` or
    /// deletion policies: `POST /v1/clusters/NAME/check` lists missing rules. The command reads the
    /// database and does not call the cluster.
    Rbac(Rbac),
}

#[derive(Debug, Args)]
pub(super) struct Rbac {
    /// Name of the registered cluster.
    #[arg(long, value_parser = Name::parse)]
    cluster: Name,
    /// Subject: the `ServiceAccount` of the cluster's token. It must exist [default: the one whose
    /// token regcred renews, or else regcred/regcred].
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = parse_service_account)]
    service_account: Option<ServiceAccountRef>,
    /// Subject instead: a user, the common name of a client certificate.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["service_account", "group"], value_parser = subject_name)]
    user: Option<String>,
    /// Subject instead: a group, the organization of a client certificate.
    #[arg(long, value_name = "NAME", conflicts_with = "service_account", value_parser = subject_name)]
    group: Option<String>,
    /// Add `list` and `watch` of all Secrets, so that an edited or deleted Secret is repaired at
    /// once.
    ///
    /// This permits the subject to read every Secret of the cluster. regcred requests the metadata
    /// of its own Secrets only. Without it, the recheck repairs such a Secret
    /// (`REGCRED_PULL_SECRETS_RESYNC_SECONDS`).
    #[arg(long)]
    watch_secrets: bool,
    /// Add the rules to deliver this Secret directly, and to replace it with `ifExists`. May be
    /// repeated.
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = parse_direct_secret)]
    direct_secret: Vec<(NamespaceName, SecretName)>,
    /// Add the rule to request tokens of this `ServiceAccount`, before a minted account with it is
    /// created. May be repeated.
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = parse_service_account)]
    mint_service_account: Vec<ServiceAccountRef>,
    /// Print roles to diagnose image pulls instead: in this namespace, in all with `*`, or without a
    /// value in the namespaces that pull secrets list. May be repeated.
    ///
    /// They have names of their own, `regcred-CLUSTER-doctor`, so that they replace none of the others.
    /// Names of foreign pull secrets are unknown, so this permits the subject to read every Secret
    /// there. The coverage lists pods, workloads, `ServiceAccounts` and the metadata of pull secrets: in
    /// the whole cluster with `*`, or else in namespaces of pull secrets.
    #[arg(
        long,
        value_name = "NAMESPACE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "",
        conflicts_with_all = ["watch_secrets", "direct_secret", "mint_service_account"],
        value_parser = parse_doctor
    )]
    doctor: Vec<DoctorScope>,
}

/// Namespaces in which image pulls are diagnosed.
#[derive(Debug, Clone)]
enum DoctorScope {
    /// Those that pull secrets list.
    Declared,
    /// All.
    All,
    /// One.
    One(NamespaceName),
}

impl ClusterCommand {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let Self::Rbac(rbac) = self;
        rbac.run().await
    }
}

impl Rbac {
    async fn run(self) -> Result<(), CliError> {
        let direct = self.direct_rules()?;
        let planned = self.rules_of_planned_accounts()?;
        let ClusterRules { mut pull_secrets, mut accounts, renewed } =
            rbac::required(&database().await?, &self.cluster).await?;
        pull_secrets.extend(direct);
        accounts.extend(planned);
        let doctor = self.doctor_rules(&pull_secrets)?;
        let subject = match (self.user, self.group) {
            (Some(user), _) => Subject::User(user),
            (None, Some(group)) => Subject::Group(group),
            (None, None) => {
                let account = self.service_account.or_else(|| renewed.clone());
                Subject::ServiceAccount(account.map_or_else(default_service_account, Ok)?)
            }
        };
        if let Some(rules) = doctor {
            note!("warning: --doctor permits the subject to read every Secret in these namespaces");
            return print_text(&DoctorRoles { cluster: &self.cluster, subject: &subject, rules }.to_string());
        }
        let manifests = Manifests {
            cluster: &self.cluster,
            subject: &subject,
            required: &pull_secrets,
            minted: &accounts,
            renewal: renewed.as_ref().map(RequiredRules::of_tokens),
            watches_secrets: self.watch_secrets,
        };
        print_text(&manifests.to_string())
    }

    /// Rules of `--direct-secret`, which the comments of the manifests name like those of a pull
    /// secret.
    fn direct_rules(&self) -> Result<Option<NamedRules>, CliError> {
        if self.direct_secret.is_empty() {
            return Ok(None);
        }
        let rules: Vec<_> =
            self.direct_secret.iter().map(|(namespace, name)| RequiredRules::of_direct(namespace, name)).collect();
        named("direct-delivery", &rules).map(Some)
    }

    /// Rules of `--mint-service-account`, which the comments name like those of an account.
    fn rules_of_planned_accounts(&self) -> Result<Option<NamedRules>, CliError> {
        if self.mint_service_account.is_empty() {
            return Ok(None);
        }
        let rules: Vec<_> = self.mint_service_account.iter().map(RequiredRules::of_tokens).collect();
        named("to-be-created", &rules).map(Some)
    }
}

fn named(name: &str, rules: &[RequiredRules]) -> Result<NamedRules, CliError> {
    let name = Name::parse(name).map_err(|error| CliError::Failed(error.to_string()))?;
    Ok(NamedRules { name, rules: RequiredRules::union(rules) })
}

impl Rbac {
    /// Rules of `--doctor`.
    fn doctor_rules(&self, required: &[NamedRules]) -> Result<Option<RequiredRules>, CliError> {
        if self.doctor.is_empty() {
            return Ok(None);
        }
        let rules = self.doctor.iter().flat_map(|scope| match scope {
            DoctorScope::All => vec![RequiredRules::of_diagnosis(None)],
            DoctorScope::One(namespace) => vec![RequiredRules::of_diagnosis(Some(namespace))],
            DoctorScope::Declared => {
                let listed = required.iter().flat_map(|one| one.rules.namespaces.keys());
                listed.map(|namespace| RequiredRules::of_diagnosis(Some(namespace))).collect()
            }
        });
        let rules = RequiredRules::union(&rules.collect::<Vec<_>>());
        if rules.is_empty() {
            let reason = "no pull secret lists a namespace: name one with --doctor=NAMESPACE";
            return Err(CliError::Failed(reason.to_owned()));
        }
        Ok(Some(rules))
    }
}

fn parse_doctor(text: &str) -> Result<DoctorScope, Invalid> {
    Ok(match text {
        "" => DoctorScope::Declared,
        "*" => DoctorScope::All,
        namespace => DoctorScope::One(NamespaceName::parse(namespace)?),
    })
}

fn default_service_account() -> Result<ServiceAccountRef, CliError> {
    parse_service_account("regcred/regcred").map_err(|error| CliError::Failed(error.to_string()))
}

fn parse_service_account(text: &str) -> Result<ServiceAccountRef, Invalid> {
    let (namespace, name) = parse_namespaced(text, ServiceAccountName::parse)?;
    Ok(ServiceAccountRef { namespace, name })
}

fn parse_direct_secret(text: &str) -> Result<(NamespaceName, SecretName), Invalid> {
    parse_namespaced(text, SecretName::parse)
}

fn parse_namespaced<T>(
    text: &str,
    parse: impl FnOnce(&str) -> Result<T, Invalid>,
) -> Result<(NamespaceName, T), Invalid> {
    let (namespace, name) = text.split_once('/').ok_or_else(|| Invalid::new("must be NAMESPACE/NAME"))?;
    let of = |part: &'static str| move |invalid| Invalid::new(format!("the {part} {invalid}"));
    Ok((NamespaceName::parse(namespace).map_err(of("namespace"))?, parse(name).map_err(of("name"))?))
}

fn subject_name(name: &str) -> Result<String, Invalid> {
    if name.is_empty() || name.len() > SUBJECT_MAX || name.chars().any(char::is_control) {
        return Err(Invalid::new("must be a name without control characters"));
    }
    Ok(name.to_owned())
}

/// Subject of the bindings.
enum Subject {
    ServiceAccount(ServiceAccountRef),
    User(String),
    Group(String),
}

impl Subject {
    fn yaml(&self) -> String {
        match self {
            Self::ServiceAccount(ServiceAccountRef { namespace, name }) => {
                format!("- kind: ServiceAccount\n  name: \"{name}\"\n  namespace: \"{namespace}\"\n")
            }
            Self::User(name) => Self::other("User", name),
            Self::Group(name) => Self::other("Group", name),
        }
    }

    fn other(kind: &str, name: &str) -> String {
        // A JSON string is a YAML string.
        let name = serde_json::Value::from(name);
        format!("- kind: {kind}\n  apiGroup: rbac.authorization.k8s.io\n  name: {name}\n")
    }
}

/// The printed manifests.
struct Manifests<'a> {
    cluster: &'a Name,
    subject: &'a Subject,
    required: &'a [NamedRules],
    /// Rules of minted accounts.
    minted: &'a [NamedRules],
    /// Rules of the renewal of the token, if regcred renews it.
    renewal: Option<RequiredRules>,
    watches_secrets: bool,
}

impl Display for Manifests<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let cluster = self.cluster;
        let named = self.required.iter().chain(self.minted).map(|one| &one.rules);
        let mut rules = RequiredRules::union(named.chain(&self.renewal));
        if rules.is_empty() {
            return writeln!(
                f,
                "# No pull secret or minted account uses the cluster {cluster}: regcred requires no rules."
            );
        }
        if self.watches_secrets {
            rules = rules.with_watched_secrets();
        }
        writeln!(
            f,
            "# RBAC rules for regcred in the cluster {cluster}, required by: {}.\n\
             # Generated by `regcred cluster rbac`. Apply with: kubectl apply -f -\n\
             # Generate again after declarations change. To find roles that are no longer required:\n\
             # kubectl get clusterroles,clusterrolebindings,roles,rolebindings -A -l regcred.dev/rbac={cluster}",
            self.names_of(|_| true)
        )?;
        if !rules.cluster.is_empty() {
            let reason = match self.names_of(|rules| !rules.cluster.is_empty()) {
                requiring if requiring.is_empty() => "Cluster-wide, for the watch of Secrets.".to_owned(),
                requiring => format!("Cluster-wide, for: {requiring}."),
            };
            let role = Role { name: &format!("regcred-{cluster}"), cluster, subject: self.subject };
            role.write(f, None, &reason, &rules.cluster)?;
        }
        for (namespace, of_namespace) in &rules.namespaces {
            let requiring = self.names_of(|rules| rules.namespaces.contains_key(namespace));
            let reason = format!("Namespace {namespace}, for: {requiring}.");
            let role = Role { name: &format!("regcred-{cluster}"), cluster, subject: self.subject };
            role.write(f, Some(namespace), &reason, of_namespace)?;
        }
        Ok(())
    }
}

impl Manifests<'_> {
    /// Names the pull secrets and minted accounts with such rules, and the renewal of the token.
    fn names_of(&self, matches: impl Fn(&RequiredRules) -> bool) -> String {
        let pull_secrets = self.required.iter().map(|one| (one.name.to_string(), &one.rules));
        let accounts = self.minted.iter().map(|one| (format!("registry account {}", one.name), &one.rules));
        let matching = pull_secrets.chain(accounts).filter(|(_, rules)| matches(rules));
        let mut names: Vec<String> = matching.map(|(name, _)| name).collect();
        let more = names.len().saturating_sub(NAMES_SHOWN);
        names.truncate(NAMES_SHOWN);
        let mut text = names.join(", ");
        if more > 0 {
            let _ = write!(text, " and {more} more");
        }
        if self.renewal.as_ref().is_some_and(matches) {
            let separator = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{separator}the renewal of the token");
        }
        text
    }
}

/// The printed roles of the doctor. One that is applied replaces no right of another: the right that
/// belongs to no namespace has a role of its own, and so has that in all namespaces.
struct DoctorRoles<'a> {
    cluster: &'a Name,
    subject: &'a Subject,
    rules: RequiredRules,
}

impl Display for DoctorRoles<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { cluster, subject, rules } = self;
        writeln!(
            f,
            "# RBAC rules for diagnoses of regcred in the cluster {cluster}, beside those of pull secrets.\n\
             # Generated by `regcred cluster rbac --doctor`. Apply with: kubectl apply -f -"
        )?;
        let (of_nodes, everywhere): (BTreeSet<Rule>, BTreeSet<Rule>) =
            rules.cluster.iter().cloned().partition(|rule| matches!(rule, Rule::Diagnose(Diagnosed::Nodes)));
        let of_namespaces = rules.namespaces.iter().map(|(namespace, rules)| (Some(namespace), rules));
        let role = |suffix: &str| format!("regcred-{cluster}-doctor{suffix}");
        let (name, nodes_name) = (role(""), role("-nodes"));
        if !of_nodes.is_empty() {
            let role = Role { name: &nodes_name, cluster, subject };
            role.write(f, None, "Cluster-wide, for the platforms of images.", &of_nodes)?;
        }
        let everywhere = (!everywhere.is_empty()).then_some((None, &everywhere));
        for (namespace, rules) in everywhere.into_iter().chain(of_namespaces) {
            let reason = namespace.map_or_else(|| "All namespaces.".to_owned(), |name| format!("Namespace {name}."));
            Role { name: &name, cluster, subject }.write(f, namespace, &reason, rules)?;
        }
        Ok(())
    }
}

/// A printed role.
struct Role<'a> {
    name: &'a str,
    cluster: &'a Name,
    subject: &'a Subject,
}

impl Role<'_> {
    /// Writes a role and its binding.
    fn write(
        &self,
        f: &mut Formatter<'_>,
        namespace: Option<&NamespaceName>,
        reason: &str,
        rules: &BTreeSet<Rule>,
    ) -> fmt::Result {
        let Self { name, cluster, .. } = self;
        let kind = if namespace.is_some() { "Role" } else { "ClusterRole" };
        let namespace = namespace.map(|namespace| format!("  namespace: \"{namespace}\"\n")).unwrap_or_default();
        let metadata =
            format!("metadata:\n  name: \"{name}\"\n{namespace}  labels:\n    regcred.dev/rbac: \"{cluster}\"\n");
        write!(f, "---\n# {reason}\napiVersion: rbac.authorization.k8s.io/v1\nkind: {kind}\n{metadata}rules:\n")?;
        write_rules(f, rules)?;
        write!(
            f,
            "---\napiVersion: rbac.authorization.k8s.io/v1\nkind: {kind}Binding\n{metadata}roleRef:\n  \
             apiGroup: rbac.authorization.k8s.io\n  kind: {kind}\n  name: \"{name}\"\nsubjects:\n{}",
            self.subject.yaml()
        )
    }
}

/// Rules of a role that can share an entry.
const ENTRIES: [fn(&Rule) -> bool; 6] = [
    |rule| matches!(rule, Rule::CreateSecrets),
    |rule| matches!(rule, Rule::GetSecret(_) | Rule::PatchSecret(_) | Rule::DeleteSecret(_)),
    |rule| matches!(rule, Rule::GetServiceAccount(_) | Rule::PatchServiceAccount(_)),
    |rule| matches!(rule, Rule::CreateToken(_)),
    |rule| matches!(rule, Rule::ListNamespaces | Rule::WatchNamespaces),
    |rule| matches!(rule, Rule::ListSecrets | Rule::WatchSecrets),
];

/// Writes the entries of a role, each with the purpose of its verbs. An entry names all objects
/// with the same verbs.
fn write_rules(f: &mut Formatter<'_>, rules: &BTreeSet<Rule>) -> fmt::Result {
    for is_in_entry in ENTRIES {
        let mut of_names: BTreeMap<Option<&str>, Vec<&Rule>> = BTreeMap::new();
        for rule in rules.iter().filter(|rule| is_in_entry(rule)) {
            of_names.entry(rule.name()).or_default().push(rule);
        }
        let mut entries: Vec<(Vec<&Rule>, Vec<&str>)> = Vec::new();
        for (name, rules) in of_names {
            let has_same_verbs =
                |other: &[&Rule]| other.iter().map(|rule| rule.verb()).eq(rules.iter().map(|rule| rule.verb()));
            match entries.iter_mut().find(|(other, _)| has_same_verbs(other)) {
                Some((_, names)) => names.extend(name),
                None => entries.push((rules, Vec::from_iter(name))),
            }
        }
        for (rules, names) in entries {
            write_entry(f, &rules, &names)?;
        }
    }
    for diagnose in rules.iter().filter(|rule| matches!(rule, Rule::Diagnose(_))) {
        // With `list` of the same resource, if the coverage needs it.
        let is_same = |rule: &&Rule| matches!(rule, Rule::Survey(_)) && rule.resource() == diagnose.resource();
        let of_resource: Vec<&Rule> = std::iter::once(diagnose).chain(rules.iter().filter(is_same)).collect();
        write_entry(f, &of_resource, &[])?;
    }
    Ok(())
}

/// Writes one entry of a role. Without names it covers all objects.
fn write_entry(f: &mut Formatter<'_>, rules: &[&Rule], names: &[&str]) -> fmt::Result {
    let Some(resource) = rules.first().map(|rule| rule.resource()) else { return Ok(()) };
    for rule in rules {
        writeln!(f, "# {}: {}", rule.verb(), purpose(rule))?;
    }
    let list = |words: &[&str]| words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
    let verbs: Vec<&str> = rules.iter().map(|rule| rule.verb()).collect();
    let group = rules.first().map_or("", |rule| rule.api_group());
    write!(f, "- apiGroups: [\"{group}\"]\n  resources: [\"{resource}\"]\n")?;
    if !names.is_empty() {
        writeln!(f, "  resourceNames: [{}]", list(names))?;
    }
    writeln!(f, "  verbs: [{}]", list(&verbs))
}

const fn purpose(rule: &Rule) -> &'static str {
    match rule {
        Rule::CreateSecrets => "creates a missing Secret; Kubernetes cannot restrict it to names",
        Rule::GetSecret(_) => "reads owner and version of a Secret; metadata only",
        Rule::PatchSecret(_) => "updates the Secret by server-side apply",
        Rule::DeleteSecret(_) => "removes a Secret that is no longer declared (deletionPolicy delete)",
        Rule::GetServiceAccount(_) => "reads the imagePullSecrets of a ServiceAccount",
        Rule::PatchServiceAccount(_) => "adds the Secret to imagePullSecrets, or removes it",
        Rule::CreateToken(_) => "requests tokens of a ServiceAccount: renews that of this cluster, or mints logins",
        Rule::ListNamespaces => "compares namespace labels with selectors",
        Rule::WatchNamespaces => "reports new namespaces and labels at once",
        Rule::ListSecrets => "(--watch-secrets) starts the watch; permits reading every Secret",
        Rule::WatchSecrets => {
            "(--watch-secrets) reports edited and deleted Secrets at once; permits reading every Secret"
        }
        Rule::Diagnose(Diagnosed::Secrets) => {
            "(--doctor) reads the pull secrets of a pod, whose names are unknown; permits reading every Secret"
        }
        Rule::Diagnose(Diagnosed::Events) => "(--doctor) reads what the kubelet reported about a pull",
        Rule::Diagnose(Diagnosed::ServiceAccounts) => "(--doctor) reads the imagePullSecrets of a ServiceAccount",
        Rule::Diagnose(Diagnosed::Nodes) => "(--doctor) reads platforms of nodes, and versions of kubelets",
        Rule::Diagnose(Diagnosed::Pods | Diagnosed::Workloads(_)) => "(--doctor) reads images and pull secrets",
        Rule::Survey(Diagnosed::Secrets) => "(--doctor) finds unused pull secrets for the coverage; metadata only",
        Rule::Survey(_) => "(--doctor) finds the images in use for the coverage",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn required(name: &str, cluster: &[Rule], namespaces: &[(&str, &[Rule])]) -> NamedRules {
        let namespaces = namespaces
            .iter()
            .map(|(namespace, rules)| (NamespaceName::parse(namespace).unwrap(), rules.iter().cloned().collect()));
        let rules = RequiredRules { cluster: cluster.iter().cloned().collect(), namespaces: namespaces.collect() };
        NamedRules { name: Name::parse(name).unwrap(), rules }
    }

    fn yaml(required: &[NamedRules], subject: &Subject, watches_secrets: bool) -> String {
        let cluster = &Name::parse("dev").unwrap();
        Manifests { cluster, subject, required, minted: &[], renewal: None, watches_secrets }.to_string()
    }

    const MANIFESTS: &str = r#"# RBAC rules for regcred in the cluster dev, required by: team-a, team-b.
# Generated by `regcred cluster rbac`. Apply with: kubectl apply -f -
# Generate again after declarations change. To find roles that are no longer required:
# kubectl get clusterroles,clusterrolebindings,roles,rolebindings -A -l regcred.dev/rbac=dev
---
# Cluster-wide, for: team-a.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: "regcred-dev"
  labels:
    regcred.dev/rbac: "dev"
rules:
# get: reads owner and version of a Secret; metadata only
- apiGroups: [""]
  resources: ["secrets"]
  resourceNames: ["pull"]
  verbs: ["get"]
# list: compares namespace labels with selectors
- apiGroups: [""]
  resources: ["namespaces"]
  verbs: ["list"]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: "regcred-dev"
  labels:
    regcred.dev/rbac: "dev"
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: "regcred-dev"
subjects:
- kind: ServiceAccount
  name: "broker.1"
  namespace: "regcred"
---
# Namespace 007, for: team-b.
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: "regcred-dev"
  namespace: "007"
  labels:
    regcred.dev/rbac: "dev"
rules:
# create: creates a missing Secret; Kubernetes cannot restrict it to names
- apiGroups: [""]
  resources: ["secrets"]
  verbs: ["create"]
# get: reads owner and version of a Secret; metadata only
# patch: updates the Secret by server-side apply
- apiGroups: [""]
  resources: ["secrets"]
  resourceNames: ["other.1", "third"]
  verbs: ["get", "patch"]
# delete: removes a Secret that is no longer declared (deletionPolicy delete)
- apiGroups: [""]
  resources: ["secrets"]
  resourceNames: ["pull"]
  verbs: ["delete"]
# get: reads the imagePullSecrets of a ServiceAccount
- apiGroups: [""]
  resources: ["serviceaccounts"]
  resourceNames: ["default"]
  verbs: ["get"]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: "regcred-dev"
  namespace: "007"
  labels:
    regcred.dev/rbac: "dev"
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: "regcred-dev"
subjects:
- kind: ServiceAccount
  name: "broker.1"
  namespace: "regcred"
"#;

    #[test]
    fn manifests_explain_each_rule() {
        let subject = Subject::ServiceAccount(parse_service_account("regcred/broker.1").unwrap());
        let secret = |name: &str| SecretName::parse(name).unwrap();
        let of_namespace = [
            Rule::CreateSecrets,
            Rule::GetSecret(secret("pull")),
            Rule::DeleteSecret(secret("pull")),
            Rule::GetSecret(secret("third")),
            Rule::PatchSecret(secret("third")),
            Rule::GetSecret(secret("other.1")),
            Rule::PatchSecret(secret("other.1")),
            Rule::GetServiceAccount(ServiceAccountName::parse("default").unwrap()),
        ];
        let required = [
            required("team-a", &[Rule::GetSecret(secret("pull")), Rule::ListNamespaces], &[]),
            required("team-b", &[], &[("007", &of_namespace)]),
        ];
        assert_eq!(yaml(&required, &subject, false), MANIFESTS);
    }

    #[test]
    fn names_cannot_inject_yaml() {
        let required = [required("team-a", &[], &[("null", &[Rule::GetSecret(SecretName::parse("null").unwrap())])])];
        let name = "x\"\\ y: [*] # é";
        let yaml = yaml(&required, &Subject::User(name.to_owned()), true);
        let parsed: Vec<serde_json::Value> = serde_saphyr::from_multiple(&yaml).unwrap();
        assert_eq!(parsed.len(), 4);
        assert_eq!(parsed[1]["subjects"][0]["name"], name);
        assert_eq!(parsed[0]["kind"], "ClusterRole");
        assert_eq!(parsed[0]["rules"][0]["verbs"], serde_json::json!(["list", "watch"]));
        assert_eq!(parsed[2]["metadata"]["namespace"], "null");
        assert_eq!(parsed[2]["rules"][0]["resourceNames"], serde_json::json!(["null"]));
    }

    #[test]
    fn renewal_and_minted_accounts_require_tokens_of_named_service_accounts() {
        let account = parse_service_account("regcred/broker").unwrap();
        let pull = parse_service_account("apps/pull").unwrap();
        let manifests = Manifests {
            cluster: &Name::parse("dev").unwrap(),
            subject: &Subject::ServiceAccount(account.clone()),
            required: &[],
            minted: &[named("prod-ecr", &[RequiredRules::of_tokens(&pull)]).unwrap()],
            renewal: Some(RequiredRules::of_tokens(&account)),
            watches_secrets: false,
        };
        let parsed: Vec<serde_json::Value> = serde_saphyr::from_multiple(&manifests.to_string()).unwrap();
        for (role, namespace, name) in [(&parsed[0], "apps", "pull"), (&parsed[2], "regcred", "broker")] {
            let rule = serde_json::json!({
                "apiGroups": [""], "resources": ["serviceaccounts/token"], "resourceNames": [name], "verbs": ["create"],
            });
            assert_eq!(role["rules"], serde_json::json!([rule]));
            assert_eq!((&role["kind"], &role["metadata"]["namespace"]), (&"Role".into(), &namespace.into()));
        }
        let text = manifests.to_string();
        assert!(text.contains("required by: registry account prod-ecr, the renewal of the token."), "{text}");
        assert!(text.contains("# Namespace apps, for: registry account prod-ecr."), "{text}");
    }

    /// Rights that were granted earlier are kept.
    #[test]
    fn roles_of_the_doctor_have_names_of_their_own() {
        let cluster = &Name::parse("dev").unwrap();
        let subject = &Subject::User("regcred".to_owned());
        let names = |namespace: Option<&str>| -> Vec<String> {
            let namespace = namespace.map(|name| NamespaceName::parse(name).unwrap());
            let rules = RequiredRules::of_diagnosis(namespace.as_ref());
            let text = DoctorRoles { cluster, subject, rules }.to_string();
            let parsed: Vec<serde_json::Value> = serde_saphyr::from_multiple(&text).unwrap();
            assert!(parsed.iter().skip(1).step_by(2).all(|binding| binding["subjects"][0]["name"] == "regcred"));
            let shown =
                |one: &serde_json::Value| format!("{} {}", one["kind"], one["metadata"]["name"]).replace('"', "");
            parsed.iter().step_by(2).map(shown).collect()
        };
        assert_eq!(names(Some("a")), ["ClusterRole regcred-dev-doctor-nodes", "Role regcred-dev-doctor"]);
        assert_eq!(names(None), ["ClusterRole regcred-dev-doctor-nodes", "ClusterRole regcred-dev-doctor"]);
    }

    #[test]
    fn no_manifest_without_pull_secrets() {
        let text = yaml(&[], &Subject::Group("brokers".to_owned()), true);
        assert!(text.starts_with("# No pull secret") && text.lines().count() == 1, "{text}");
    }

    #[test]
    fn subject_names_are_validated() {
        for bad in ["", "a\nb", &"x".repeat(SUBJECT_MAX + 1)] {
            assert!(subject_name(bad).is_err());
        }
        assert!(subject_name("system:serviceaccount:a:b").is_ok());
        for bad in ["regcred", "a/b/c", "/a", "a/", "A/b"] {
            assert!(parse_service_account(bad).is_err(), "{bad}");
        }
    }
}
