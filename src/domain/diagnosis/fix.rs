//! Remedies, as requests to regcred and command lines.
//!
//! A command line contains names and keys of registries only, in single quotes. It takes a login
//! from the variables `REGISTRY_USERNAME` and `REGISTRY_PASSWORD`.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    answer::{ManagedBy, PullSecretsFrom, Verdict},
    examination::{Examination, ExaminedImage},
    pod::{Subject, WorkloadKind},
    secret::{ReadSecret, SecretState},
};
use crate::domain::{
    caller::Permission,
    docker_config::DOCKER_HUB_KEY,
    matching::ImageName,
    names::{Name, NamespaceName, SecretName, ServiceAccountName},
    pull_secret::{DeletionPolicy, Document, SecretDocument, TargetDocument},
    secret::SecretType,
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
    /// Deletes a Secret and creates it anew. All of its entries are replaced.
    ReplaceSecret,
    /// Creates a Secret and adds it to the ServiceAccount.
    AttachServiceAccount,
    /// Creates a Secret and adds it to `imagePullSecrets` of the pod, its template or the request.
    AddPullSecret,
    /// Creates the pod anew, so that it gets the pull secrets of its ServiceAccount.
    RecreatePod,
    /// Creates the ServiceAccount.
    CreateServiceAccount,
    /// Has regcred deliver the Secret again.
    SyncPullSecret,
    /// Stores the right password in regcred, which delivers it.
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
    /// Name of the Secret that it creates or replaces.
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
        let (method, path, body) = match self {
            Self::Deliver { secret, accounts } => {
                let accounts: Vec<&str> = accounts.iter().map(Name::as_str).collect();
                let path = format!("/v1/clusters/{cluster}/namespaces/{namespace}/secrets");
                ("POST", path, json!({"name": secret, "accounts": accounts}))
            }
            Self::Declare { name, document } => ("PUT", format!("/v1/pull-secrets/{name}"), json!(document)),
            Self::Sync { name } => ("POST", format!("/v1/pull-secrets/{name}/sync"), Value::Null),
        };
        Step::Request { method, path, body }
    }
}

/// What regcred could deliver.
#[derive(Debug)]
pub struct RegcredContext {
    /// Name of the cluster.
    pub cluster: Name,
    /// For each image, the accounts for it that the caller is granted.
    pub accounts: Vec<Vec<Name>>,
    /// For each image, the name of a pull secret with the Secret that a fix would create.
    pub pull_secrets: Vec<PullSecretName>,
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
}

fn command(command: String) -> Step {
    Step::Command { command }
}

/// Proposes a remedy for the verdict about an image; `verdicts` has those of all images.
pub(super) fn propose(
    examination: &Examination,
    index: usize,
    verdicts: &[Verdict],
    managed: &[(SecretName, ManagedBy)],
    context: Option<&RegcredContext>,
) -> Option<Fix> {
    let (image, verdict) = (examination.images.get(index)?, *verdicts.get(index)?);
    let Some(reference) = &image.reference else {
        let why = image.invalid.as_deref().unwrap_or("the image reference is invalid");
        return Some(fix(FixType::CorrectImage, why, None, Vec::new()));
    };
    let accounts = context.map(|context| accounts_for(index, verdicts, context)).unwrap_or_default();
    let pull_secret = context.and_then(|context| context.pull_secrets.get(index));
    let plan = Plan { examination, image, name: &reference.name, accounts, pull_secret, context, managed };
    match verdict {
        Verdict::Ok => None,
        Verdict::NoSecret => Some(plan.no_secret()),
        Verdict::SecretMissing => plan.missing(),
        Verdict::SecretUnreadable => plan.unreadable(),
        Verdict::NoMatchingEntry => Some(plan.no_match()),
        Verdict::CredentialInvalid => Some(plan.invalid()),
        Verdict::Unknown => plan.unknown(),
        Verdict::NoAccess
        | Verdict::ImageNotFound
        | Verdict::RegistryUnreachable
        | Verdict::RateLimited
        | Verdict::TlsError
        | Verdict::ArchitectureMismatch => Some(outside(verdict, &reference.name)),
    }
}

/// Accounts of the Secret for an image. A missing Secret serves all images that lack it.
fn accounts_for(index: usize, verdicts: &[Verdict], context: &RegcredContext) -> Vec<Name> {
    let own = context.accounts.get(index).cloned().unwrap_or_default();
    if own.is_empty() || verdicts.get(index) != Some(&Verdict::SecretMissing) {
        return own;
    }
    let mut accounts: Vec<Name> = Vec::new();
    for (verdict, of_image) in verdicts.iter().zip(&context.accounts) {
        for account in of_image {
            if *verdict == Verdict::SecretMissing && !accounts.contains(account) {
                accounts.push(account.clone());
            }
        }
    }
    accounts
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
                "check host name, port and network of `{registry}`; an address that is not public must be in \
                 REGCRED_OUTBOUND_ALLOW"
            ),
        ),
    };
    fix(kind, description, None, Vec::new())
}

/// Remedy for a missing `ServiceAccount`.
pub(super) fn create_service_account(namespace: &NamespaceName, name: &ServiceAccountName) -> Fix {
    let line = format!("kubectl create serviceaccount '{name}' -n '{namespace}'");
    fix(FixType::CreateServiceAccount, format!("create the ServiceAccount {name}"), None, vec![command(line)])
}

/// What a remedy for one image depends on.
struct Plan<'a> {
    examination: &'a Examination,
    image: &'a ExaminedImage,
    name: &'a ImageName,
    accounts: Vec<Name>,
    pull_secret: Option<&'a PullSecretName>,
    context: Option<&'a RegcredContext>,
    managed: &'a [(SecretName, ManagedBy)],
}

impl Plan<'_> {
    fn no_secret(&self) -> Fix {
        let pod = &self.examination.pod;
        let has_list = self.examination.of_service_account.as_ref().is_some_and(|names| !names.is_empty());
        if let (Subject::Pod { .. }, true) = (&pod.subject, has_list) {
            let description = format!(
                "create the pod anew: it then gets the pull secrets of the ServiceAccount {}",
                pod.service_account
            );
            return fix(FixType::RecreatePod, description, None, self.recreate());
        }
        self.add()
    }

    fn missing(&self) -> Option<Fix> {
        let missing = self.examination.secrets.iter().find(|secret| secret.state == SecretState::Missing)?;
        let name = missing.name.as_str();
        let description = format!("create the Secret {name} with a login for `{}`", self.name.registry());
        Some(fix(FixType::CreateSecret, description, Some(name), self.provide(name)).applying(self.delivery(name)))
    }

    fn unreadable(&self) -> Option<Fix> {
        let secrets = &self.examination.secrets;
        let failing = self.examination.failing_secret();
        let secret = failing.or_else(|| secrets.iter().find(|secret| secret.is_unreadable()).map(Arc::as_ref))?;
        Some(self.sync(secret).unwrap_or_else(|| self.replace(secret)))
    }

    fn no_match(&self) -> Fix {
        let near = self.image.nearest.first();
        let near = near.and_then(|near| self.examination.secrets.iter().find(|one| one.name.as_str() == near.secret));
        match near {
            Some(secret) if is_replaceable(secret) && !self.is_used(secret) => self.replace(secret),
            _ => self.add(),
        }
    }

    fn invalid(&self) -> Fix {
        let tried = self.image.candidates.iter().find(|candidate| candidate.skipped.is_none());
        let secret = tried.and_then(|candidate| self.examination.secrets.get(candidate.secret));
        match secret {
            Some(secret) if self.managed_by(secret).is_some() && !self.accounts.is_empty() => self.rotate(),
            Some(secret) if is_replaceable(secret) => self.replace(secret),
            _ => self.add(),
        }
    }

    fn unknown(&self) -> Option<Fix> {
        let is_forbidden = self.examination.secrets.iter().any(|secret| secret.state == SecretState::Forbidden);
        let context = self.context.filter(|_| is_forbidden)?;
        let (cluster, namespace) = (&context.cluster, &self.examination.pod.namespace);
        let line = format!("regcred cluster rbac --cluster '{cluster}' '--doctor={namespace}' | kubectl apply -f -");
        let description = "grant regcred the right to read the Secrets of the namespace";
        Some(fix(FixType::GrantRights, description, None, vec![command(line)]))
    }

    /// Whether an image of the pod uses it.
    fn is_used(&self, secret: &ReadSecret) -> bool {
        let secrets = &self.examination.secrets;
        let candidates = self.examination.images.iter().flat_map(|image| &image.candidates);
        candidates.filter_map(|one| secrets.get(one.secret)).any(|used| used.name == secret.name)
    }

    fn managed_by(&self, secret: &ReadSecret) -> Option<&str> {
        let (_, by) = self.managed.iter().find(|(name, _)| *name == secret.name)?;
        by.pull_secret.as_deref()
    }

    fn sync(&self, secret: &ReadSecret) -> Option<Fix> {
        self.sync_of(&Name::parse(self.managed_by(secret)?).ok()?, secret.name.as_str())
    }

    fn sync_of(&self, owner: &Name, secret: &str) -> Option<Fix> {
        let change = Change::Sync { name: owner.clone() };
        let description = format!("have regcred deliver the Secret {secret} of the pull secret {owner} again");
        let steps = vec![self.request(&change)?];
        Some(fix(FixType::SyncPullSecret, description, Some(secret), steps).applying(Some(change)))
    }

    /// The request of a change.
    fn request(&self, change: &Change) -> Option<Step> {
        Some(change.request(&self.context?.cluster, &self.examination.pod.namespace))
    }

    fn rotate(&self) -> Fix {
        let body = json!({"password": "$REGISTRY_PASSWORD"});
        let steps = self.accounts.iter().take(1).map(|account| Step::Request {
            method: "PATCH",
            path: format!("/v1/registry-accounts/{account}"),
            body: body.clone(),
        });
        let description = "store the right password with the registry account; regcred delivers it";
        fix(FixType::RotateAccount, description, None, steps.collect())
    }

    fn replace(&self, secret: &ReadSecret) -> Fix {
        let (name, namespace) = (secret.name.as_str(), &self.examination.pod.namespace);
        let mut steps = vec![command(format!("kubectl delete secret '{name}' -n '{namespace}' --ignore-not-found"))];
        steps.extend(self.provide(name));
        let description =
            format!("replace the Secret {name} by one with a login for `{}`: all of its entries", self.name.registry());
        fix(FixType::ReplaceSecret, description, Some(name), steps)
    }

    /// Creates a further Secret and adds it to the list that counts.
    fn add(&self) -> Fix {
        let name = new_secret_name(self.examination, self.name);
        let pod = &self.examination.pod;
        let registry = self.name.registry();
        let is_of_account = self.examination.from != PullSecretsFrom::Pod;
        if let Some(declaring) = self.declare(&name).filter(|_| is_of_account) {
            return declaring;
        }
        let mut steps = self.provide(&name);
        if self.examination.from == PullSecretsFrom::Pod {
            steps.extend(self.add_to_own_list(&name));
            let description =
                format!("create the Secret {name} with a login for `{registry}`, and add it to imagePullSecrets");
            return fix(FixType::AddPullSecret, description, Some(&name), steps);
        }
        let account = &pod.service_account;
        if self.examination.is_service_account_missing {
            steps.extend(create_service_account(&pod.namespace, account).steps);
        }
        steps.push(self.attach(&name));
        if let Subject::Pod { .. } = pod.subject {
            steps.extend(self.recreate());
        }
        let description = format!(
            "create the Secret {name} with a login for `{registry}`, and add it to the ServiceAccount {account}: all of \
             its new pods use it"
        );
        fix(FixType::AttachServiceAccount, description, Some(&name), steps)
    }

    /// Declares a pull secret that places the Secret in the namespace and adds it to the
    /// `ServiceAccount`, if regcred has an account for the image.
    fn declare(&self, secret: &str) -> Option<Fix> {
        let examination = self.examination;
        let (cluster, pod) = (&self.context?.cluster, &examination.pod);
        if self.accounts.is_empty() || examination.is_service_account_missing {
            return None;
        }
        let name = match self.pull_secret? {
            PullSecretName::Free(name) => name,
            PullSecretName::Declared(name) => return self.sync_of(name, secret),
            PullSecretName::Taken => return None,
        };
        let (namespace, account) = (&pod.namespace, &pod.service_account);
        let document = Box::new(Document {
            accounts: Some(self.accounts.iter().map(Name::to_string).collect()),
            account_selector: None,
            secret: SecretDocument { name: secret.to_owned(), secret_type: SecretType::default().as_str().to_owned() },
            targets: vec![TargetDocument {
                cluster: cluster.to_string(),
                namespaces: Some(vec![namespace.to_string()]),
                namespace_selector: None,
                exclude_namespaces: Vec::new(),
            }],
            service_accounts: vec![account.to_string()],
            deletion_policy: DeletionPolicy::default(),
            adopt: false,
        });
        let change = Change::Declare { name: name.clone(), document };
        let mut steps = vec![self.request(&change)?];
        if let Subject::Pod { .. } = pod.subject {
            steps.extend(self.recreate());
        }
        let description = format!(
            "declare the pull secret {name}: regcred creates the Secret {secret} with a login for `{}`, keeps it in sync, \
             and adds it to the ServiceAccount {account}, so that all of its new pods use it",
            self.name.registry()
        );
        Some(fix(FixType::AttachServiceAccount, description, Some(secret), steps).applying(Some(change)))
    }

    /// Delivery of a Secret, if regcred has an account for the image.
    fn delivery(&self, secret: &str) -> Option<Change> {
        let has_account = self.context.is_some() && !self.accounts.is_empty();
        has_account.then(|| Change::Deliver { secret: secret.to_owned(), accounts: self.accounts.clone() })
    }

    /// Creates a Secret: by regcred if it has an account for the image.
    fn provide(&self, name: &str) -> Vec<Step> {
        let namespace = &self.examination.pod.namespace;
        if let Some(step) = self.delivery(name).and_then(|delivery| self.request(&delivery)) {
            return vec![step];
        }
        let key = if self.name.is_on_docker_hub() { DOCKER_HUB_KEY } else { self.name.registry() };
        vec![command(format!(
            "kubectl create secret docker-registry '{name}' -n '{namespace}' --docker-server='{key}' \
             --docker-username=\"$REGISTRY_USERNAME\" --docker-password=\"$REGISTRY_PASSWORD\""
        ))]
    }

    /// The list is atomic, so a patch that is not a JSON Patch would replace it.
    fn attach(&self, name: &str) -> Step {
        let names = self.examination.of_service_account.as_ref();
        let operation = if names.is_some_and(|names| !names.is_empty()) {
            json!([{"op": "add", "path": "/imagePullSecrets/-", "value": {"name": name}}])
        } else {
            json!([{"op": "add", "path": "/imagePullSecrets", "value": [{"name": name}]}])
        };
        let (account, namespace) = (&self.examination.pod.service_account, &self.examination.pod.namespace);
        command(format!("kubectl patch serviceaccount '{account}' -n '{namespace}' --type=json -p '{operation}'"))
    }

    fn add_to_own_list(&self, secret: &str) -> Option<Step> {
        let list = json!({"imagePullSecrets": [{"name": secret}]});
        let namespace = &self.examination.pod.namespace;
        match &self.examination.pod.subject {
            Subject::Pod { name, .. } => Some(command(format!(
                "kubectl get pod '{name}' -n '{namespace}' -o yaml | kubectl patch --local -f - -o yaml -p '{}' | kubectl \
                 replace --force -f -",
                json!({"spec": list})
            ))),
            // The template of a Job cannot be changed.
            Subject::Workload { kind: WorkloadKind::Job, .. } | Subject::Spec => None,
            Subject::Workload { kind, name } => {
                let template = json!({"spec": {"template": {"spec": list}}});
                let patch =
                    if *kind == WorkloadKind::CronJob { json!({"spec": {"jobTemplate": template}}) } else { template };
                Some(command(format!("kubectl patch {} '{name}' -n '{namespace}' -p '{patch}'", kind.as_str())))
            }
        }
    }

    fn recreate(&self) -> Vec<Step> {
        let Subject::Pod { name, is_controlled } = &self.examination.pod.subject else { return Vec::new() };
        let namespace = &self.examination.pod.namespace;
        vec![command(if *is_controlled {
            format!("kubectl delete pod '{name}' -n '{namespace}'")
        } else {
            format!("kubectl get pod '{name}' -n '{namespace}' -o yaml | kubectl replace --force -f -")
        })]
    }
}

/// Name of a new Secret, after the registry. No list has it.
pub(super) fn new_secret_name(examination: &Examination, image: &ImageName) -> String {
    let word = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let host: String = image.registry().chars().map(word).take(NAME_MAX).collect();
    let name = format!("pull-{}", host.trim_matches('-'));
    let of_account = examination.of_service_account.iter().flatten();
    let taken: Vec<&SecretName> = examination.secrets.iter().map(|secret| &secret.name).chain(of_account).collect();
    let is_taken = |name: &str| taken.iter().any(|secret| secret.as_str() == name);
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    std::iter::once(name.clone()).chain(numbered).find(|name| !is_taken(name)).unwrap_or(name)
}

/// Whether nothing else is lost with the Secret: it has no other entry, and no owner.
fn is_replaceable(secret: &ReadSecret) -> bool {
    secret.entries.len() == 1 && secret.pull_secret_id.is_none()
}
