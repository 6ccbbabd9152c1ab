//! Remedies, as requests to regcred and command lines.
//!
//! A command line contains names and keys of registries only, in single quotes. It takes a login
//! from the variables `REGISTRY_USERNAME` and `REGISTRY_PASSWORD`.
//!
//! No remedy deletes what it cannot replace: a Secret is deleted only if it is a docker config with
//! one entry at most. Remedies of several images that create the same Secret are equal.

mod plan;

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use self::plan::Plan;
use super::{
    answer::{ManagedBy, Verdict},
    examination::Examination,
};
use crate::domain::{
    caller::Permission,
    cluster::ServiceAccountRef,
    matching::ImageName,
    names::{Name, NamespaceName, SecretName, ServiceAccountName},
    pull_secret::Document,
};

/// Maximum length of the name of a new Secret.
const NAME_MAX: usize = 60;

/// What a fix does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = PullFixType)]
pub enum FixType {
    /// Creates a Secret that a list names already.
    CreateSecret,
    /// Deletes a Secret that is a docker config with one entry at most, and creates it anew.
    ReplaceSecret,
    /// Creates a Secret, unless one with a login that works exists, and adds it to the ServiceAccount.
    AttachServiceAccount,
    /// Creates a Secret, unless one with a login that works exists, and adds it to `imagePullSecrets` of the
    /// pod, its template or the request. It takes the place of one that makes every pull fail.
    AddPullSecret,
    /// Creates the pod anew, so that it gets the pull secrets of its ServiceAccount.
    RecreatePod,
    /// Creates the ServiceAccount.
    CreateServiceAccount,
    /// Has regcred deliver the Secret again.
    SyncPullSecret,
    /// The account of the rejected entry needs the right password, or a newly minted one. regcred delivers
    /// it.
    RotateAccount,
    /// The registry must grant access.
    GrantAccess,
    /// The image reference must be corrected, or the image pushed.
    CorrectImage,
    /// The host or port is wrong, or the network is at fault.
    CheckRegistry,
    /// The registry lifts its limit later.
    RetryLater,
    /// Nodes, and regcred's host, must trust the registry's certificate.
    TrustCertificate,
    /// The image must be built for the platform, or the node selector changed.
    BuildPlatform,
    /// regcred lacks a right in the cluster.
    GrantRights,
}

/// A step of a fix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "camelCase")]
#[schema(as = PullFixStep)]
pub enum Step {
    /// A request to regcred.
    Request {
        /// Method.
        method: &'static str,
        /// Path.
        path: String,
        /// Headers besides those of every request; absent without any.
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        #[schema(value_type = BTreeMap<String, String>)]
        headers: BTreeMap<&'static str, &'static str>,
        /// Body.
        #[schema(value_type = Object)]
        body: Value,
    },
    /// A command line for a POSIX shell.
    Command {
        /// The line.
        command: String,
    },
}

impl Step {
    /// A request.
    pub(in crate::domain) fn request(method: &'static str, path: String, body: Value) -> Self {
        Self::Request { method, path, headers: BTreeMap::new(), body }
    }

    /// A declaration that replaces nothing.
    pub(in crate::domain) fn declaration(path: String, body: Value) -> Self {
        Self::Request { method: "PUT", path, headers: BTreeMap::from([CREATE_ONLY]), body }
    }
}

/// Header of a request that must not change what exists.
const CREATE_ONLY: (&str, &str) = ("If-None-Match", "*");

/// A remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = PullFix)]
pub struct Fix {
    /// What it does.
    #[serde(rename = "type")]
    pub kind: FixType,
    /// The remedy as a sentence.
    pub description: String,
    /// Name of the Secret that it creates, replaces or adds to a list.
    pub secret: Option<String>,
    /// Steps in order; empty if regcred cannot name them.
    pub steps: Vec<Step>,
    /// Whether `?apply=true` carries out the request among the steps.
    pub applicable: bool,
    /// Whether it was carried out.
    pub applied: bool,
    /// Change of that request.
    #[serde(skip)]
    pub change: Option<Change>,
}

/// Change that regcred itself can make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Delivers a Secret with these accounts.
    Deliver {
        /// Name of the Secret.
        secret: String,
        /// Names of the accounts.
        accounts: Vec<Name>,
    },
    /// Declares a pull secret.
    Declare {
        /// Name of the pull secret.
        name: Name,
        /// Declaration.
        document: Box<Document>,
    },
    /// Has a pull secret delivered again.
    Sync {
        /// Name of the pull secret.
        name: Name,
    },
}

impl Change {
    /// Permission that the change requires.
    #[must_use]
    pub const fn permission(&self) -> Permission {
        match self {
            Self::Deliver { .. } => Permission::DeliverSecrets,
            Self::Declare { .. } | Self::Sync { .. } => Permission::WritePullSecrets,
        }
    }

    /// The same change as a request.
    fn request(&self, cluster: &Name, namespace: &NamespaceName) -> Step {
        match self {
            Self::Deliver { secret, accounts } => {
                let accounts: Vec<&str> = accounts.iter().map(Name::as_str).collect();
                let path = format!("/v1/clusters/{cluster}/namespaces/{namespace}/secrets");
                Step::request("POST", path, json!({"name": secret, "accounts": accounts}))
            }
            Self::Declare { name, document } => Step::declaration(format!("/v1/pull-secrets/{name}"), json!(document)),
            Self::Sync { name } => Step::request("POST", format!("/v1/pull-secrets/{name}/sync"), Value::Null),
        }
    }
}

/// What regcred could deliver.
#[derive(Debug)]
pub struct RegcredContext {
    /// Name of the cluster.
    pub cluster: Name,
    /// For each image, the account that a fix may deliver.
    pub accounts: Vec<Option<FixAccount>>,
    /// For each image, the name of a pull secret with the Secret that a fix would create.
    pub pull_secrets: Vec<PullSecretName>,
    /// `ServiceAccount` of the cluster's token, if it is known.
    pub service_account: Option<ServiceAccountRef>,
}

/// Account that a fix delivers for an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FixAccount {
    /// Name of the account.
    pub name: Name,
    /// Whether the registry of the image accepted its login. Otherwise it could not be asked.
    pub is_tried: bool,
}

/// Name of a pull secret that a fix could declare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullSecretName {
    /// No pull secret has this name.
    Free(Name),
    /// The pull secret of this name places the Secret in the namespace already.
    Declared(Name),
    /// The name belongs to another pull secret, or is not valid.
    Taken,
}

impl PullSecretName {
    /// Name of the pull secret for a Secret of one namespace, if it is short enough.
    #[must_use]
    pub fn of(namespace: &NamespaceName, secret: &str) -> Option<Name> {
        Name::parse(&format!("{namespace}-{}", secret.replace('.', "-"))).ok()
    }
}

fn fix(kind: FixType, description: impl Into<String>, secret: Option<&str>, steps: Vec<Step>) -> Fix {
    let (description, secret) = (description.into(), secret.map(str::to_owned));
    Fix { kind, description, secret, steps, applicable: false, applied: false, change: None }
}

impl Fix {
    /// Has `?apply=true` make this change, which is one of the steps.
    fn applying(self, change: Option<Change>) -> Self {
        Self { applicable: change.is_some(), change, ..self }
    }

    /// Leaves its steps to the caller.
    pub(super) fn advised(self) -> Self {
        self.applying(None)
    }
}

/// How command lines call `kubectl`.
#[derive(Debug, Clone)]
pub struct Kubectl(String);

impl Default for Kubectl {
    fn default() -> Self {
        Self("kubectl".to_owned())
    }
}

impl Kubectl {
    /// Calls it with this kubeconfig and context.
    #[must_use]
    pub fn with_options(kubeconfig: Option<&str>, context: Option<&str>) -> Self {
        let options = [("kubeconfig", kubeconfig), ("context", context)].into_iter();
        let options = options.filter_map(|(name, value)| Some(format!(" --{name}={}", quoted(value?))));
        Self(format!("kubectl{}", options.collect::<String>()))
    }

    fn call(&self, arguments: &str) -> String {
        format!("{} {arguments}", self.0)
    }

    fn step(&self, arguments: impl AsRef<str>) -> Step {
        Step::Command { command: self.call(arguments.as_ref()) }
    }

    /// Calls it several times, each with the output of the one before.
    fn pipe(&self, calls: &[&str]) -> Step {
        let calls: Vec<String> = calls.iter().map(|arguments| self.call(arguments)).collect();
        Step::Command { command: calls.join(" | ") }
    }
}

/// One word of a POSIX shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Proposes a remedy for the verdict about an image; `verdicts` has those of all images, and `proposed`
/// the remedies of earlier ones.
pub(super) fn propose(
    examination: &Examination,
    (index, verdicts): (usize, &[Verdict]),
    proposed: &[Fix],
    managed: &[(SecretName, ManagedBy)],
    context: Option<&RegcredContext>,
) -> Option<Fix> {
    let (image, verdict) = (examination.images.get(index)?, *verdicts.get(index)?);
    let Some(reference) = &image.reference else {
        let why = image.invalid.as_deref().unwrap_or("the image reference is invalid");
        return Some(fix(FixType::CorrectImage, why, None, Vec::new()));
    };
    let accounts = context.map(|context| accounts_for(examination, index, verdicts, context)).unwrap_or_default();
    let pull_secret = context.and_then(|context| context.pull_secrets.get(index));
    let (name, existing) = (&reference.name, examination.existing_secret(index));
    let plan = Plan { examination, image, name, existing, accounts, pull_secret, context, managed, proposed };
    let fix = match verdict {
        Verdict::Ok => None,
        Verdict::NoSecret => Some(plan.no_secret()),
        Verdict::SecretMissing => plan.missing(),
        Verdict::SecretUnreadable => plan.unreadable(),
        Verdict::NoMatchingEntry => Some(plan.add()),
        Verdict::CredentialInvalid => Some(plan.invalid()),
        Verdict::Unknown => plan.unknown(),
        Verdict::NoAccess
        | Verdict::ImageNotFound
        | Verdict::RegistryUnreachable
        | Verdict::RateLimited
        | Verdict::TlsError
        | Verdict::ArchitectureMismatch => Some(outside(verdict, &reference.name)),
    };
    fix.map(|fix| with_untried(fix, context))
}

/// Names the accounts of a fix whose registry could not be asked.
fn with_untried(mut fix: Fix, context: Option<&RegcredContext>) -> Fix {
    let accounts = context.iter().flat_map(|context| context.accounts.iter().flatten());
    let delivered = |name: &Name| {
        fix.steps.iter().any(|step| match step {
            Step::Request { body, .. } => {
                body["accounts"].as_array().is_some_and(|names| names.contains(&json!(name.as_str())))
            }
            Step::Command { .. } => false,
        })
    };
    let mut untried: Vec<&str> = accounts
        .filter(|account| !account.is_tried && delivered(&account.name))
        .map(|account| account.name.as_str())
        .collect();
    untried.sort_unstable();
    untried.dedup();
    if !untried.is_empty() {
        fix.description = format!(
            "{}. The registry could not be asked whether it accepts the login of {}: verify it first",
            fix.description,
            untried.join(", ")
        );
    }
    fix
}

/// Accounts of the Secret for an image: one for each image that the same Secret is for. A missing
/// Secret serves all images that lack it, a new one those of its registry.
fn accounts_for(examination: &Examination, index: usize, verdicts: &[Verdict], context: &RegcredContext) -> Vec<Name> {
    let registry = |index: usize| {
        let reference = examination.images.get(index)?.reference.as_ref()?;
        Some(reference.name.registry())
    };
    let verdict = |index: usize| verdicts.get(index).copied();
    if context.accounts.get(index).is_none_or(Option::is_none) {
        return Vec::new();
    }
    let has_same_secret = |other: usize| match (verdict(index), verdict(other)) {
        (Some(Verdict::SecretMissing), other) => other == Some(Verdict::SecretMissing),
        (_, Some(other_verdict)) => needs_new_secret(other_verdict) && registry(other) == registry(index),
        _ => false,
    };
    let mut accounts: Vec<Name> = Vec::new();
    for (other, account) in context.accounts.iter().enumerate() {
        let name = account.as_ref().map(|account| &account.name);
        if let Some(name) = name.filter(|name| has_same_secret(other) && !accounts.contains(name)) {
            accounts.push(name.clone());
        }
    }
    accounts
}

/// Whether a remedy may create a Secret.
pub(super) const fn needs_secret(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::SecretMissing) || needs_new_secret(verdict)
}

const fn needs_new_secret(verdict: Verdict) -> bool {
    matches!(
        verdict,
        Verdict::NoSecret | Verdict::SecretUnreadable | Verdict::NoMatchingEntry | Verdict::CredentialInvalid
    )
}

/// Remedy that is outside the cluster and regcred.
fn outside(verdict: Verdict, image: &ImageName) -> Fix {
    let registry = image.registry();
    let (kind, description) = match verdict {
        Verdict::NoAccess => {
            (FixType::GrantAccess, format!("grant the user of the login the right to pull `{image}` at the registry"))
        }
        Verdict::ImageNotFound => (
            FixType::CorrectImage,
            format!("correct the repository or the tag, or push the image: `{image}` does not have it"),
        ),
        Verdict::RateLimited => (
            FixType::RetryLater,
            format!("wait until `{registry}` accepts requests again; with a login, its limit is usually higher"),
        ),
        Verdict::TlsError => (
            FixType::TrustCertificate,
            format!(
                "give `{registry}` a certificate for its name from a CA that nodes and the host of regcred trust, or \
                 add its CA to their trust stores; a registry without TLS must be configured in the container runtime \
                 of each node"
            ),
        ),
        Verdict::ArchitectureMismatch => (
            FixType::BuildPlatform,
            "build the image for the platform that the pod requires, or change its node selector".to_owned(),
        ),
        _ => (
            FixType::CheckRegistry,
            format!(
                "check host name, port and network of `{registry}`; the regcred service asks an address that is not \
                 public only if REGCRED_OUTBOUND_ALLOW has it"
            ),
        ),
    };
    fix(kind, description, None, Vec::new())
}

/// Remedy for a missing `ServiceAccount`.
pub(super) fn create_service_account(kubectl: &Kubectl, namespace: &NamespaceName, name: &ServiceAccountName) -> Fix {
    let step = kubectl.step(format!("create serviceaccount '{name}' -n '{namespace}'"));
    fix(FixType::CreateServiceAccount, format!("create the ServiceAccount {name}"), None, vec![step])
}

/// Name of a new Secret, after the registry. No list has it, no Secret that is known, and the images of
/// one registry share it.
pub(super) fn new_secret_name(examination: &Examination, image: &ImageName) -> String {
    let of_account = examination.of_service_account.iter().flatten();
    let listed = examination.secrets.iter().map(|secret| &secret.name).chain(of_account).chain(&examination.reserved);
    let mut taken: Vec<String> = listed.map(ToString::to_string).collect();
    let mut registries: Vec<&str> = Vec::new();
    for reference in examination.images.iter().filter_map(|image| image.reference.as_ref()) {
        let registry = reference.name.registry();
        if registry == image.registry() {
            break;
        }
        if !registries.contains(&registry) {
            registries.push(registry);
        }
    }
    for registry in registries {
        let name = free_name(registry, &taken);
        taken.push(name);
    }
    free_name(image.registry(), &taken)
}

fn free_name(registry: &str, taken: &[String]) -> String {
    let word = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let host: String = registry.chars().map(word).take(NAME_MAX).collect();
    let name = format!("pull-{}", host.trim_matches('-'));
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    std::iter::once(name.clone()).chain(numbered).find(|name| !taken.contains(name)).unwrap_or(name)
}
