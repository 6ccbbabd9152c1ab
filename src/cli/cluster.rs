//! `regcred cluster rbac`: prints the RBAC rules that pull secrets require in a cluster.

use std::{
    collections::BTreeSet,
    fmt::{self, Display, Formatter, Write as _},
};

use clap::{Args, Subcommand};

use crate::{
    cli::{CliError, argument, database, print_text},
    domain::{
        names::{Name, NamespaceName, ServiceAccountName},
        rbac::{RequiredRules, Rule},
    },
    service::rbac::{self, PullSecretRules},
};

/// Names of pull secrets in one comment.
const NAMES_SHOWN: usize = 10;
/// Longest name of a user or group.
const SUBJECT_MAX: usize = 1024;

#[derive(Debug, Subcommand)]
pub(super) enum ClusterCommand {
    /// Print the RBAC manifests that pull secrets require in a cluster.
    ///
    /// Apply them with `kubectl apply -f -` as a user who may create roles in that cluster. A Role
    /// covers each listed namespace; a `ClusterRole` covers namespaces that are selected by label.
    /// Print and apply them again after a change of namespaces, `ServiceAccounts` or deletion
    /// policies: `POST /v1/clusters/NAME/check` lists missing rules. The command reads the database
    /// and does not call the cluster.
    Rbac(Rbac),
}

#[derive(Debug, Args)]
pub(super) struct Rbac {
    /// Name of the registered cluster.
    #[arg(long)]
    cluster: String,
    /// Subject: the `ServiceAccount` of the cluster's token. It must exist.
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "regcred/regcred")]
    service_account: String,
    /// Subject instead: a user, the common name of a client certificate.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["service_account", "group"])]
    user: Option<String>,
    /// Subject instead: a group, the organization of a client certificate.
    #[arg(long, value_name = "NAME", conflicts_with = "service_account")]
    group: Option<String>,
    /// Add `list` and `watch` of all Secrets, so that an edited or deleted Secret is repaired at
    /// once.
    ///
    /// This permits the subject to read every Secret of the cluster. regcred requests the metadata
    /// of its own Secrets only. Without it, the recheck repairs such a Secret
    /// (`REGCRED_PULL_SECRETS_RESYNC_SECONDS`).
    #[arg(long)]
    watch_secrets: bool,
}

impl ClusterCommand {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let Self::Rbac(rbac) = self;
        rbac.run().await
    }
}

impl Rbac {
    async fn run(self) -> Result<(), CliError> {
        let cluster = argument("--cluster", Name::parse(&self.cluster))?;
        let subject = self.subject()?;
        let required = rbac::required(&database().await?, &cluster).await?;
        let manifests = Manifests {
            cluster: &cluster,
            subject: &subject,
            required: &required,
            watches_secrets: self.watch_secrets,
        };
        print_text(&manifests.to_string())
    }

    fn subject(&self) -> Result<Subject, CliError> {
        match (&self.user, &self.group) {
            (Some(user), _) => Ok(Subject::User(subject_name("--user", user)?)),
            (None, Some(group)) => Ok(Subject::Group(subject_name("--group", group)?)),
            (None, None) => {
                let Some((namespace, name)) = self.service_account.split_once('/') else {
                    return Err(CliError::Failed("--service-account must be NAMESPACE/NAME".to_owned()));
                };
                Ok(Subject::ServiceAccount {
                    namespace: argument("--service-account: the namespace", NamespaceName::parse(namespace))?,
                    name: argument("--service-account: the name", ServiceAccountName::parse(name))?,
                })
            }
        }
    }
}

fn subject_name(argument: &str, name: &str) -> Result<String, CliError> {
    if name.is_empty() || name.len() > SUBJECT_MAX || name.chars().any(char::is_control) {
        return Err(CliError::Failed(format!("{argument} must be a name without control characters")));
    }
    Ok(name.to_owned())
}

/// Subject of the bindings.
enum Subject {
    ServiceAccount { namespace: NamespaceName, name: ServiceAccountName },
    User(String),
    Group(String),
}

impl Subject {
    fn yaml(&self) -> String {
        match self {
            Self::ServiceAccount { namespace, name } => {
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
    required: &'a [PullSecretRules],
    watches_secrets: bool,
}

impl Display for Manifests<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let cluster = self.cluster;
        let mut rules = RequiredRules::union(self.required.iter().map(|one| &one.rules));
        if rules.is_empty() {
            return writeln!(f, "# No pull secret targets the cluster {cluster}: regcred requires no rules.");
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
            names(self.required.iter())
        )?;
        if !rules.cluster.is_empty() {
            let selecting = self.required.iter().filter(|one| !one.rules.cluster.is_empty());
            let reason = match names(selecting) {
                selecting if selecting.is_empty() => "Cluster-wide, for the watch of Secrets.".to_owned(),
                selecting => format!("Cluster-wide, for namespace selectors of: {selecting}."),
            };
            self.write_role(f, None, &reason, &rules.cluster)?;
        }
        for (namespace, of_namespace) in &rules.namespaces {
            let requiring = self.required.iter().filter(|one| one.rules.namespaces.contains_key(namespace));
            let reason = format!("Namespace {namespace}, for: {}.", names(requiring));
            self.write_role(f, Some(namespace), &reason, of_namespace)?;
        }
        Ok(())
    }
}

impl Manifests<'_> {
    /// Writes a role and its binding.
    fn write_role(
        &self,
        f: &mut Formatter<'_>,
        namespace: Option<&NamespaceName>,
        reason: &str,
        rules: &BTreeSet<Rule>,
    ) -> fmt::Result {
        let cluster = self.cluster;
        let kind = if namespace.is_some() { "Role" } else { "ClusterRole" };
        let namespace = namespace.map(|namespace| format!("  namespace: \"{namespace}\"\n")).unwrap_or_default();
        let metadata = format!(
            "metadata:\n  name: \"regcred-{cluster}\"\n{namespace}  labels:\n    regcred.dev/rbac: \"{cluster}\"\n"
        );
        write!(f, "---\n# {reason}\napiVersion: rbac.authorization.k8s.io/v1\nkind: {kind}\n{metadata}rules:\n")?;
        write_rules(f, rules)?;
        write!(
            f,
            "---\napiVersion: rbac.authorization.k8s.io/v1\nkind: {kind}Binding\n{metadata}roleRef:\n  \
             apiGroup: rbac.authorization.k8s.io\n  kind: {kind}\n  name: \"regcred-{cluster}\"\nsubjects:\n{}",
            self.subject.yaml()
        )
    }
}

/// Rules that form one entry of a role.
const ENTRIES: [&[Rule]; 4] = [
    &[Rule::CreateSecrets, Rule::GetSecrets, Rule::PatchSecrets, Rule::DeleteSecrets],
    &[Rule::GetServiceAccounts, Rule::PatchServiceAccounts],
    &[Rule::ListNamespaces, Rule::WatchNamespaces],
    &[Rule::ListSecrets, Rule::WatchSecrets],
];

/// Writes the entries of a role, each with the purpose of its verbs.
fn write_rules(f: &mut Formatter<'_>, rules: &BTreeSet<Rule>) -> fmt::Result {
    for entry in ENTRIES {
        let rules: Vec<Rule> = entry.iter().copied().filter(|rule| rules.contains(rule)).collect();
        let Some(first) = rules.first() else { continue };
        for rule in &rules {
            writeln!(f, "# {}: {}", rule.verb(), purpose(*rule))?;
        }
        let verbs: Vec<String> = rules.iter().map(|rule| format!("\"{}\"", rule.verb())).collect();
        let (resource, verbs) = (first.resource(), verbs.join(", "));
        write!(f, "- apiGroups: [\"\"]\n  resources: [\"{resource}\"]\n  verbs: [{verbs}]\n")?;
    }
    Ok(())
}

const fn purpose(rule: Rule) -> &'static str {
    match rule {
        Rule::CreateSecrets => "creates a missing Secret",
        Rule::GetSecrets => "reads owner and version of a Secret; metadata only",
        Rule::PatchSecrets => "updates the Secret by server-side apply",
        Rule::DeleteSecrets => "removes a Secret that is no longer declared (deletionPolicy delete)",
        Rule::GetServiceAccounts => "reads the imagePullSecrets of a ServiceAccount",
        Rule::PatchServiceAccounts => "adds the Secret to imagePullSecrets, or removes it",
        Rule::ListNamespaces => "compares namespace labels with selectors",
        Rule::WatchNamespaces => "reports new namespaces and labels at once",
        Rule::ListSecrets => "(--watch-secrets) starts the watch; permits reading every Secret",
        Rule::WatchSecrets => {
            "(--watch-secrets) reports edited and deleted Secrets at once; permits reading every Secret"
        }
    }
}

fn names<'a>(required: impl Iterator<Item = &'a PullSecretRules>) -> String {
    let all: Vec<&str> = required.map(|one| one.name.as_str()).collect();
    let mut text = all.iter().take(NAMES_SHOWN).copied().collect::<Vec<_>>().join(", ");
    if let Some(more) = all.len().checked_sub(NAMES_SHOWN).filter(|more| *more > 0) {
        let _ = write!(text, " and {more} more");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn required(name: &str, cluster: &[Rule], namespaces: &[(&str, &[Rule])]) -> PullSecretRules {
        let namespaces = namespaces
            .iter()
            .map(|(namespace, rules)| (NamespaceName::parse(namespace).unwrap(), rules.iter().copied().collect()));
        let rules = RequiredRules { cluster: cluster.iter().copied().collect(), namespaces: namespaces.collect() };
        PullSecretRules { name: Name::parse(name).unwrap(), rules }
    }

    fn yaml(required: &[PullSecretRules], subject: &Subject, watches_secrets: bool) -> String {
        Manifests { cluster: &Name::parse("dev").unwrap(), subject, required, watches_secrets }.to_string()
    }

    const MANIFESTS: &str = r#"# RBAC rules for regcred in the cluster dev, required by: team-a, team-b.
# Generated by `regcred cluster rbac`. Apply with: kubectl apply -f -
# Generate again after declarations change. To find roles that are no longer required:
# kubectl get clusterroles,clusterrolebindings,roles,rolebindings -A -l regcred.dev/rbac=dev
---
# Cluster-wide, for namespace selectors of: team-a.
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
# delete: removes a Secret that is no longer declared (deletionPolicy delete)
- apiGroups: [""]
  resources: ["secrets"]
  verbs: ["delete"]
# get: reads the imagePullSecrets of a ServiceAccount
- apiGroups: [""]
  resources: ["serviceaccounts"]
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
        let subject = Subject::ServiceAccount {
            namespace: NamespaceName::parse("regcred").unwrap(),
            name: ServiceAccountName::parse("broker.1").unwrap(),
        };
        let required = [
            required("team-a", &[Rule::GetSecrets, Rule::ListNamespaces], &[]),
            required("team-b", &[], &[("007", &[Rule::GetSecrets, Rule::DeleteSecrets, Rule::GetServiceAccounts])]),
        ];
        assert_eq!(yaml(&required, &subject, false), MANIFESTS);
    }

    #[test]
    fn names_cannot_inject_yaml() {
        let required = [required("team-a", &[], &[("null", &[Rule::GetSecrets])])];
        let name = "x\"\\ y: [*] # é";
        let yaml = yaml(&required, &Subject::User(name.to_owned()), true);
        let parsed: Vec<serde_json::Value> = serde_saphyr::from_multiple(&yaml).unwrap();
        assert_eq!(parsed.len(), 4);
        assert_eq!(parsed[1]["subjects"][0]["name"], name);
        assert_eq!(parsed[0]["kind"], "ClusterRole");
        assert_eq!(parsed[0]["rules"][0]["verbs"], serde_json::json!(["list", "watch"]));
        assert_eq!(parsed[2]["metadata"]["namespace"], "null");
    }

    #[test]
    fn no_manifest_without_pull_secrets() {
        let text = yaml(&[], &Subject::Group("brokers".to_owned()), true);
        assert!(text.starts_with("# No pull secret") && text.lines().count() == 1, "{text}");
    }

    #[test]
    fn subject_names_are_validated() {
        for bad in ["", "a\nb", &"x".repeat(SUBJECT_MAX + 1)] {
            assert!(subject_name("--user", bad).is_err());
        }
        assert!(subject_name("--user", "system:serviceaccount:a:b").is_ok());
    }
}
