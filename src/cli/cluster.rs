//! `regcred cluster rbac`: the rights that pull secrets need in a cluster, ready to be applied there.

use std::{collections::BTreeSet, fmt::Write as _};

use clap::{Args, Subcommand};

use crate::{
    cli::{CliError, argument, database, print_text},
    domain::{
        names::{Name, NamespaceName, ServiceAccountName},
        rights::{Needs, Right},
    },
    service::rights::{self, Needed},
};

/// Names of pull secrets in one comment.
const NAMES_SHOWN: usize = 10;
/// The longest name of a user or group that is taken.
const SUBJECT_MAX: usize = 1024;

#[derive(Debug, Subcommand)]
pub(super) enum ClusterCommand {
    /// Print the YAML of exactly the rights that regcred needs in a cluster for the pull secrets that go there.
    ///
    /// For `kubectl apply -f -`, run by somebody who may give rights in that cluster. A Role for each namespace where the pull secrets
    /// name their namespaces, a `ClusterRole` where one selects them by label; no verb that nothing uses. Print and apply it again
    /// when other namespaces, `ServiceAccounts` or deletion policies are declared: a target that lacks a right says so, and
    /// `POST /v1/clusters/NAME/check` lists what is missing. Only the database is asked, never the cluster.
    Rbac(Rbac),
}

#[derive(Debug, Args)]
pub(super) struct Rbac {
    /// Name of the cluster, as it is registered.
    #[arg(long)]
    cluster: String,
    /// Who gets the rights: the `ServiceAccount` whose token the cluster was registered with. It is not made by this.
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "regcred/regcred")]
    service_account: String,
    /// Who gets them instead: a user, as the common name of a client certificate.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["service_account", "group"])]
    user: Option<String>,
    /// Who gets them instead: a group, as the organization of a client certificate.
    #[arg(long, value_name = "NAME", conflicts_with = "service_account")]
    group: Option<String>,
    /// Add list and watch of all Secrets of the cluster, so that an edited or deleted Secret is put right at once.
    ///
    /// That is a large right: whoever has it can read every Secret. regcred asks for the metadata of its own alone. Without it such
    /// a Secret is found at the next comparison (`REGCRED_PULL_SECRETS_RESYNC_SECONDS`).
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
        let needed = rights::needed_in(&database().await?, &cluster).await?;
        let yaml = Yaml { cluster: &cluster, subject: &subject, needed: &needed, watches_secrets: self.watch_secrets };
        print_text(&yaml.to_string())
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

/// Who gets the rights.
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
        // A string of JSON is one of YAML, whatever is in it.
        let name = serde_json::Value::from(name);
        format!("- kind: {kind}\n  apiGroup: rbac.authorization.k8s.io\n  name: {name}\n")
    }
}

/// All that is printed.
struct Yaml<'a> {
    cluster: &'a Name,
    subject: &'a Subject,
    needed: &'a [Needed],
    watches_secrets: bool,
}

impl std::fmt::Display for Yaml<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cluster = self.cluster;
        let mut needs = Needs::of_all(self.needed.iter().map(|one| &one.needs));
        if needs.is_empty() {
            return writeln!(f, "# No pull secret goes to the cluster {cluster}: regcred needs no rights there.");
        }
        if self.watches_secrets {
            needs = needs.with_watched_secrets();
        }
        writeln!(
            f,
            "# What regcred needs in the cluster {cluster} for the pull secrets {}.\n\
             # Made by `regcred cluster rbac`; apply it with: kubectl apply -f -\n\
             # Declared otherwise later, it has to be printed and applied again. What is not needed any more is found by the label:\n\
             # kubectl get clusterroles,clusterrolebindings,roles,rolebindings -A -l regcred.dev/rbac={cluster}",
            names(self.needed.iter())
        )?;
        if !needs.everywhere.is_empty() {
            let selecting = self.needed.iter().filter(|one| !one.needs.everywhere.is_empty());
            let why = match names(selecting) {
                selecting if selecting.is_empty() => {
                    "In the whole cluster, for what can be watched only there.".to_owned()
                }
                selecting => format!("In the whole cluster, where these select namespaces by label: {selecting}."),
            };
            self.write_role(f, None, &why, &needs.everywhere)?;
        }
        for (namespace, rights) in &needs.within {
            let here = self.needed.iter().filter(|one| one.needs.within.contains_key(namespace));
            let why = format!("In the namespace {namespace}, for {}.", names(here));
            self.write_role(f, Some(namespace), &why, rights)?;
        }
        Ok(())
    }
}

impl Yaml<'_> {
    /// A role and its binding.
    fn write_role(
        &self,
        f: &mut std::fmt::Formatter<'_>,
        namespace: Option<&NamespaceName>,
        why: &str,
        rights: &BTreeSet<Right>,
    ) -> std::fmt::Result {
        let cluster = self.cluster;
        let kind = if namespace.is_some() { "Role" } else { "ClusterRole" };
        let namespace = namespace.map(|namespace| format!("  namespace: \"{namespace}\"\n")).unwrap_or_default();
        let metadata = format!(
            "metadata:\n  name: \"regcred-{cluster}\"\n{namespace}  labels:\n    regcred.dev/rbac: \"{cluster}\"\n"
        );
        write!(f, "---\n# {why}\napiVersion: rbac.authorization.k8s.io/v1\nkind: {kind}\n{metadata}rules:\n")?;
        for group in RULES {
            let rights: Vec<Right> = group.iter().copied().filter(|right| rights.contains(right)).collect();
            let Some(first) = rights.first() else { continue };
            for right in &rights {
                writeln!(f, "# {}: {}", right.verb(), reason(*right))?;
            }
            let verbs: Vec<String> = rights.iter().map(|right| format!("\"{}\"", right.verb())).collect();
            write!(
                f,
                "- apiGroups: [\"\"]\n  resources: [\"{}\"]\n  verbs: [{}]\n",
                first.resource(),
                verbs.join(", ")
            )?;
        }
        write!(
            f,
            "---\napiVersion: rbac.authorization.k8s.io/v1\nkind: {kind}Binding\n{metadata}roleRef:\n  \
             apiGroup: rbac.authorization.k8s.io\n  kind: {kind}\n  name: \"regcred-{cluster}\"\nsubjects:\n{}",
            self.subject.yaml()
        )
    }
}

/// What stands in one rule.
const RULES: [&[Right]; 4] = [
    &[Right::CreateSecrets, Right::GetSecrets, Right::PatchSecrets, Right::DeleteSecrets],
    &[Right::GetServiceAccounts, Right::PatchServiceAccounts],
    &[Right::ListNamespaces, Right::WatchNamespaces],
    &[Right::ListSecrets, Right::WatchSecrets],
];

const fn reason(right: Right) -> &'static str {
    match right {
        Right::CreateSecrets => "places the Secret where there is none",
        Right::GetSecrets => "sees whose a Secret is and which version it has; its value is never asked for",
        Right::PatchSecrets => "puts new content into it, by server-side apply",
        Right::DeleteSecrets => "removes it where it is not declared any more, as deletionPolicy delete says",
        Right::GetServiceAccounts => "sees which Secrets a ServiceAccount names",
        Right::PatchServiceAccounts => "puts the Secret into its imagePullSecrets, or takes it out",
        Right::ListNamespaces => "compares the labels of namespaces with the selectors",
        Right::WatchNamespaces => "hears of new namespaces and labels at once",
        Right::ListSecrets => "(--watch-secrets) begins to watch Secrets; whoever has it can read all of them",
        Right::WatchSecrets => {
            "(--watch-secrets) hears at once that a Secret was edited or deleted; reads all of them, too"
        }
    }
}

fn names<'a>(needed: impl Iterator<Item = &'a Needed>) -> String {
    let all: Vec<&str> = needed.map(|one| one.name.as_str()).collect();
    let mut text = all.iter().take(NAMES_SHOWN).copied().collect::<Vec<_>>().join(", ");
    if let Some(more) = all.len().checked_sub(NAMES_SHOWN).filter(|more| *more > 0) {
        let _ = write!(text, " and {more} more");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needed(name: &str, everywhere: &[Right], within: &[(&str, &[Right])]) -> Needed {
        let within = within
            .iter()
            .map(|(namespace, rights)| (NamespaceName::parse(namespace).unwrap(), rights.iter().copied().collect()));
        let needs = Needs { everywhere: everywhere.iter().copied().collect(), within: within.collect() };
        Needed { name: Name::parse(name).unwrap(), needs }
    }

    fn yaml(needed: &[Needed], subject: &Subject, watches_secrets: bool) -> String {
        Yaml { cluster: &Name::parse("dev").unwrap(), subject, needed, watches_secrets }.to_string()
    }

    /// Removes the indentation of a literal in this module.
    fn unindented(literal: &str) -> String {
        literal.trim().replace("\n        ", "\n")
    }

    #[test]
    fn the_yaml_says_what_and_why() {
        let subject = Subject::ServiceAccount {
            namespace: NamespaceName::parse("regcred").unwrap(),
            name: ServiceAccountName::parse("broker.1").unwrap(),
        };
        let needed = [
            needed("team-a", &[Right::GetSecrets, Right::ListNamespaces], &[]),
            needed("team-b", &[], &[("007", &[Right::GetSecrets, Right::DeleteSecrets, Right::GetServiceAccounts])]),
        ];
        let expected = r#"
        # What regcred needs in the cluster dev for the pull secrets team-a, team-b.
        # Made by `regcred cluster rbac`; apply it with: kubectl apply -f -
        # Declared otherwise later, it has to be printed and applied again. What is not needed any more is found by the label:
        # kubectl get clusterroles,clusterrolebindings,roles,rolebindings -A -l regcred.dev/rbac=dev
        ---
        # In the whole cluster, where these select namespaces by label: team-a.
        apiVersion: rbac.authorization.k8s.io/v1
        kind: ClusterRole
        metadata:
          name: "regcred-dev"
          labels:
            regcred.dev/rbac: "dev"
        rules:
        # get: sees whose a Secret is and which version it has; its value is never asked for
        - apiGroups: [""]
          resources: ["secrets"]
          verbs: ["get"]
        # list: compares the labels of namespaces with the selectors
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
        # In the namespace 007, for team-b.
        apiVersion: rbac.authorization.k8s.io/v1
        kind: Role
        metadata:
          name: "regcred-dev"
          namespace: "007"
          labels:
            regcred.dev/rbac: "dev"
        rules:
        # delete: removes it where it is not declared any more, as deletionPolicy delete says
        - apiGroups: [""]
          resources: ["secrets"]
          verbs: ["delete"]
        # get: sees which Secrets a ServiceAccount names
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
        assert_eq!(yaml(&needed, &subject, false).trim_end(), unindented(expected));
    }

    #[test]
    fn nothing_that_somebody_names_becomes_yaml_of_its_own() {
        let needed = [needed("team-a", &[], &[("null", &[Right::GetSecrets])])];
        let name = "x\"\\ y: [*] # é";
        let yaml = yaml(&needed, &Subject::User(name.to_owned()), true);
        let parsed: Vec<serde_json::Value> = serde_saphyr::from_multiple(&yaml).unwrap();
        assert_eq!(parsed.len(), 4);
        assert_eq!(parsed[1]["subjects"][0]["name"], name);
        assert_eq!(parsed[0]["kind"], "ClusterRole");
        assert_eq!(parsed[0]["rules"][0]["verbs"], serde_json::json!(["list", "watch"]));
        assert_eq!(parsed[2]["metadata"]["namespace"], "null");
    }

    #[test]
    fn without_pull_secrets_there_is_nothing_to_give() {
        let text = yaml(&[], &Subject::Group("brokers".to_owned()), true);
        assert!(text.starts_with("# No pull secret") && text.lines().count() == 1, "{text}");
    }

    #[test]
    fn the_bounds_of_a_subject() {
        for bad in ["", "a\nb", &"x".repeat(SUBJECT_MAX + 1)] {
            assert!(subject_name("--user", bad).is_err());
        }
        assert!(subject_name("--user", "system:serviceaccount:a:b").is_ok());
    }
}
