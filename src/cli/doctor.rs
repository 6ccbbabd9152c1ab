//! `regcred doctor`: diagnoses image pulls, through a running service or with a kubeconfig, and shows
//! the coverage of a cluster.

mod coverage;
mod kubeconfig;
mod server;
mod table;
mod tree;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;

use self::tree::Tree;
use super::{CliError, print_line, print_text};
use crate::{
    domain::{
        diagnosis::WorkloadKind,
        invalid::Invalid,
        names::{Name, NamespaceName, PodName},
    },
    service::diagnosis::Target,
};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Doctor {
    #[command(subcommand)]
    command: Option<DoctorCommand>,
    /// Examine all images in use in this cluster, as `regcred doctor cluster` does.
    #[arg(long, value_name = "NAME", value_parser = Name::parse, help_heading = OF_SERVICE)]
    cluster: Option<Name>,
    #[command(flatten, next_help_heading = OF_SERVICE)]
    options: CoverageOptions,
}

/// Heading of the options that a service needs.
const OF_SERVICE: &str = "Options for the clusters of a running service";

impl Doctor {
    pub(super) async fn run(self) -> Result<(), CliError> {
        match (self.command, self.cluster) {
            (Some(command), _) => command.run().await,
            (None, Some(cluster)) => Coverage { cluster, options: self.options }.run().await,
            (None, None) => Err(CliError::Usage(
                "a subcommand is missing: `regcred doctor kubeconfig` diagnoses with your kubeconfig; with a running \
                 service, use pod, workload or cluster (see `regcred doctor --help`)"
                    .to_owned(),
            )),
        }
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum DoctorCommand {
    /// Diagnose a pod through a running service, which can also carry out fixes.
    ///
    /// Without a pod, diagnoses those of the namespace that wait for an image.
    Pod {
        /// Name of the pod [default: the pods that wait for an image].
        #[arg(value_parser = PodName::parse)]
        pod: Option<PodName>,
        #[command(flatten)]
        request: Request,
    },
    /// Diagnose the pods of a workload through a running service.
    Workload {
        /// Workload, such as deployment/web. Kinds: deployment, statefulset, daemonset, job, cronjob.
        #[arg(value_name = "KIND/NAME", value_parser = Object::parse_workload)]
        workload: Object,
        #[command(flatten)]
        request: Request,
    },
    /// Examine all images in use in a cluster through a running service.
    ///
    /// Requests a run, shows its progress, and prints what cannot be pulled, which pull secrets nothing
    /// uses, and which ones regcred could adopt. Exits with 1 if a pull fails.
    Cluster(Coverage),
    /// Diagnose with your own kubeconfig. Needs neither a service nor a database.
    ///
    /// Reads the pod, its pull secrets and its ServiceAccount with your rights, as kubectl does: exec
    /// plugins of the kubeconfig are run. Asks the registries from this host, with the logins of the
    /// pull secrets, each at the registry that its entry names. Changes nothing, and prints no
    /// password.
    ///
    /// Without an object, diagnoses the pods of the namespace that wait for an image, and its workloads
    /// without a pod.
    Kubeconfig {
        /// Pod, or KIND/NAME such as deployment/web [default: pods that wait for an image, and workloads
        /// without a pod].
        #[arg(value_name = "POD|KIND/NAME", value_parser = Object::parse)]
        object: Option<Object>,
        #[command(flatten)]
        local: Local,
    },
}

/// Options of a diagnosis through a service.
#[derive(Debug, Args)]
pub(super) struct Request {
    /// Namespace.
    #[arg(short, long, default_value = "default", value_parser = NamespaceName::parse)]
    namespace: NamespaceName,
    /// Name of the registered cluster.
    #[arg(long, value_parser = Name::parse)]
    cluster: Name,
    /// URL of the service [default: `REGCRED_URL`]. `REGCRED_TOKEN`, or the file that
    /// `REGCRED_TOKEN_FILE` names, has the API key or token.
    #[arg(long)]
    url: Option<String>,
    /// Carry out the fixes that regcred can make itself.
    #[arg(long)]
    apply: bool,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Output::Tree)]
    output: Output,
}

/// Coverage of a cluster.
#[derive(Debug, Args)]
pub(super) struct Coverage {
    /// Name of the registered cluster.
    #[arg(value_parser = Name::parse)]
    cluster: Name,
    #[command(flatten)]
    options: CoverageOptions,
}

/// Options of a coverage, beside the cluster.
#[derive(Debug, Args)]
pub(super) struct CoverageOptions {
    /// Print the newest snapshot, without a new run.
    #[arg(long)]
    last: bool,
    /// Print all groups, also those that can be pulled.
    #[arg(long)]
    all: bool,
    /// URL of the service [default: `REGCRED_URL`]. `REGCRED_TOKEN`, or the file that
    /// `REGCRED_TOKEN_FILE` names, has the API key or token.
    #[arg(long)]
    url: Option<String>,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = CoverageOutput::Table)]
    output: CoverageOutput,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CoverageOutput {
    /// Table for terminals.
    Table,
    /// JSON for programs.
    Json,
}

/// Options of a diagnosis with a kubeconfig.
#[derive(Debug, Args)]
pub(super) struct Local {
    /// Namespace [default: that of the context].
    #[arg(short, long, value_parser = NamespaceName::parse)]
    namespace: Option<NamespaceName>,
    /// Kubeconfig [default: `KUBECONFIG`, or ~/.kube/config].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig [default: its current one].
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// The node is this machine: ask registries at `localhost` and loopback addresses here.
    #[arg(long)]
    local_node: bool,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Output::Tree)]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// Tree for terminals.
    Tree,
    /// JSON for programs, as the API answers.
    Json,
}

/// Pod or workload.
#[derive(Debug, Clone)]
pub(super) struct Object {
    kind: Option<WorkloadKind>,
    name: PodName,
}

impl Object {
    /// Parses `NAME`, `pod/NAME` or `KIND/NAME`.
    fn parse(text: &str) -> Result<Self, Invalid> {
        let (kind, name) = match text.split_once('/') {
            None => (None, text),
            Some(("pod" | "pods" | "po", name)) => (None, name),
            Some((kind, name)) => (Some(parse_kind(kind)?), name),
        };
        Ok(Self { kind, name: PodName::parse(name)? })
    }

    fn parse_workload(text: &str) -> Result<Self, Invalid> {
        let object = Self::parse(text)?;
        if object.kind.is_some() { Ok(object) } else { Err(Invalid::new("must be KIND/NAME, such as deployment/web")) }
    }

    /// Name for a person.
    fn title(&self) -> String {
        format!("{}/{}", self.kind.map_or("pod", WorkloadKind::as_str), self.name)
    }

    /// Path of the resource in the API.
    fn path(&self) -> String {
        match self.kind {
            None => format!("pods/{}", self.name),
            Some(kind) => format!("workloads/{}/{}", kind.as_str(), self.name),
        }
    }

    fn target(&self) -> Target {
        match self.kind {
            None => Target::Pod(self.name.clone()),
            Some(kind) => Target::Workload(kind, self.name.clone()),
        }
    }
}

/// Parses a kind in singular, plural or kubectl's abbreviation.
fn parse_kind(kind: &str) -> Result<WorkloadKind, Invalid> {
    match kind {
        "deploy" => Ok(WorkloadKind::Deployment),
        "sts" => Ok(WorkloadKind::StatefulSet),
        "ds" => Ok(WorkloadKind::DaemonSet),
        "cj" => Ok(WorkloadKind::CronJob),
        other => WorkloadKind::parse(other.strip_suffix('s').filter(|one| !one.is_empty()).unwrap_or(other))
            .or_else(|_| WorkloadKind::parse(other)),
    }
}

impl DoctorCommand {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let (found, output, search) = match self {
            Self::Cluster(coverage) => return coverage.run().await,
            Self::Pod { pod: None, request } => {
                let search = Search { namespace: request.namespace.clone(), pods: None };
                (request.diagnose_waiting().await.map_err(undiagnosed)?, request.output, Some(search))
            }
            Self::Pod { pod: Some(pod), request } => {
                let object = Object { kind: None, name: pod };
                (vec![request.diagnose(&object).await.map_err(undiagnosed)?], request.output, None)
            }
            Self::Workload { workload, request } => {
                (vec![request.diagnose(&workload).await.map_err(undiagnosed)?], request.output, None)
            }
            Self::Kubeconfig { object, local } => {
                let (found, search) = Box::pin(local.diagnose(object.as_ref())).await.map_err(undiagnosed)?;
                (found, local.output, search)
            }
        };
        print(&found, output, search.as_ref())?;
        result(&found)
    }
}

/// Exit code 1 is that of a diagnosis.
fn undiagnosed(error: CliError) -> CliError {
    match error {
        CliError::OutputClosed => error,
        other => CliError::NotDiagnosed(other.to_string()),
    }
}

/// Diagnosis of an object, as the API answers.
struct Diagnosed {
    object: Object,
    namespace: NamespaceName,
    diagnosis: Value,
}

impl Diagnosed {
    fn is_ok(&self) -> bool {
        self.diagnosis["ok"] == true
    }
}

/// Search for objects to diagnose, if none was named.
struct Search {
    namespace: NamespaceName,
    /// Number of pods that were looked at; none if the service has looked.
    pods: Option<usize>,
}

impl Search {
    /// Says that nothing was found, and what to do next.
    fn nothing_found(&self) -> String {
        let pods = match self.pods {
            None => String::new(),
            Some(0) => " (it has no pods)".to_owned(),
            Some(1) => " (1 pod was looked at)".to_owned(),
            Some(pods) => format!(" ({pods} pods were looked at)"),
        };
        let namespace = &self.namespace;
        format!(
            "No pod of the namespace {namespace} waits for an image{pods}. Name an object to diagnose it anyway, \
             such as deployment/NAME."
        )
    }
}

fn print(found: &[Diagnosed], output: Output, search: Option<&Search>) -> Result<(), CliError> {
    match (output, found, search) {
        (Output::Json, [one], None) => print_line(&format!("{:#}", one.diagnosis)),
        (Output::Json, ..) => {
            let items = found.iter().map(|one| {
                let pod = one.object.kind.is_none().then(|| one.object.name.as_str());
                serde_json::json!({
                    "object": one.object.title(), "pod": pod, "namespace": one.namespace.as_str(),
                    "diagnosis": one.diagnosis,
                })
            });
            let is_ok = found.iter().all(Diagnosed::is_ok);
            print_line(&format!("{:#}", serde_json::json!({"ok": is_ok, "items": items.collect::<Vec<_>>()})))
        }
        (Output::Tree, [], Some(search)) => print_line(&search.nothing_found()),
        (Output::Tree, ..) => {
            for one in found {
                let title = format!("{} in namespace {}", one.object.title(), one.namespace);
                let tree = match one.object.kind {
                    Some(_) => Tree::of_workload(&title, &one.diagnosis),
                    None => Tree::of_pod(&title, &one.diagnosis),
                };
                print_text(&tree.to_string())?;
            }
            shared_secrets(found).into_iter().try_for_each(|name| {
                let name = tree::plain(name);
                print_line(&format!(
                    "Several fixes share the Secret {name}: create it once, and leave that command out of the others."
                ))
            })
        }
    }
}

/// Names of the Secrets that the fixes of several objects create.
fn shared_secrets(found: &[Diagnosed]) -> Vec<&str> {
    let mut objects: BTreeMap<&str, usize> = BTreeMap::new();
    for one in found {
        let fixes = one.diagnosis["images"].as_array().into_iter().flatten().map(|image| &image["fix"]);
        let makes_secret = |fix: &Value| {
            let mut steps = fix["steps"].as_array().into_iter().flatten();
            steps.any(|step| step["command"].as_str().is_some_and(|line| line.contains(" create secret ")))
        };
        let creating = fixes.filter(|fix| makes_secret(fix));
        let created: BTreeSet<&str> = creating.filter_map(|fix| fix["secret"].as_str()).collect();
        for name in created {
            *objects.entry(name).or_default() += 1;
        }
    }
    objects.into_iter().filter(|(_, objects)| *objects > 1).map(|(name, _)| name).collect()
}

/// Exit code 1 if an image cannot be pulled.
fn result(found: &[Diagnosed]) -> Result<(), CliError> {
    let images = || found.iter().flat_map(|one| one.diagnosis["images"].as_array().into_iter().flatten());
    let bad = images().filter(|image| image["verdict"] != "ok").count();
    match (found.iter().all(Diagnosed::is_ok), bad) {
        (true, _) => Ok(()),
        (false, 0) => Err(CliError::Failed("a problem prevents the pod".to_owned())),
        (false, bad) => Err(CliError::Failed(not_ok(bad, images().count(), ["image", "images"]))),
    }
}

/// `1 of 3 images is not ok`.
fn not_ok(bad: usize, total: usize, [one, many]: [&str; 2]) -> String {
    let (noun, verb) = (if total == 1 { one } else { many }, if bad == 1 { "is" } else { "are" });
    format!("{bad} of {total} {noun} {verb} not ok")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_agree_with_their_words() {
        let said = |bad, total| not_ok(bad, total, ["image", "images"]);
        assert_eq!(said(1, 1), "1 of 1 image is not ok");
        assert_eq!(said(1, 3), "1 of 3 images is not ok");
        assert_eq!(said(2, 3), "2 of 3 images are not ok");
    }

    #[test]
    fn secret_of_several_objects_is_named_once() {
        let diagnosed = |name: &str, secret: &str| {
            let command = format!("kubectl create secret docker-registry '{secret}'");
            let fix = serde_json::json!({"secret": secret, "steps": [{"type": "command", "command": command}]});
            Diagnosed {
                object: Object { kind: None, name: PodName::parse(name).unwrap() },
                namespace: NamespaceName::parse("team-a").unwrap(),
                diagnosis: serde_json::json!({"images": [{"fix": fix}, {"fix": fix}, {"fix": null}]}),
            }
        };
        let found = [diagnosed("a", "one"), diagnosed("b", "shared"), diagnosed("c", "shared")];
        assert_eq!(shared_secrets(&found), ["shared"]);
    }

    #[test]
    fn objects_are_parsed_as_kubectl_writes_them() {
        let path = |text: &str| Object::parse(text).map(|object| object.path()).ok();
        for (text, expected) in [
            ("web-7d9", "pods/web-7d9"),
            ("pod/web", "pods/web"),
            ("deployment/web", "workloads/deployment/web"),
            ("deployments/web", "workloads/deployment/web"),
            ("deploy/web", "workloads/deployment/web"),
            ("StatefulSet/web", "workloads/statefulset/web"),
            ("cj/web", "workloads/cronjob/web"),
        ] {
            assert_eq!(path(text).as_deref(), Some(expected), "{text}");
        }
        for refused in ["", "a b", "replicaset/web", "deployment/", "s/web", "pod/web/x"] {
            assert_eq!(path(refused), None, "{refused}");
        }
        assert!(Object::parse_workload("web").is_err());
    }
}
