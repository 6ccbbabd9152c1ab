//! Remedies inside the cluster, for one image.

use serde_json::{Value, json};

use super::{
    Change, Fix, FixType, Kubectl, PullSecretName, RegcredContext, Step, create_service_account, fix, new_secret_name,
};
use crate::domain::{
    diagnosis::{
        answer::ManagedBy,
        examination::{Examination, ExaminedImage},
        pod::{Controller, Subject, WorkloadKind},
        secret::{ReadSecret, SecretState},
    },
    docker_config::DOCKER_HUB_KEY,
    matching::ImageName,
    names::{Name, PodName, SecretName},
    pull_secret::{DeletionPolicy, Document, SecretDocument, TargetDocument},
    registry::RegistryScope,
    secret::SecretType,
};

/// State of a target whose Secret is up to date.
const SYNCED: &str = "synced";

/// What a remedy for one image depends on.
pub(super) struct Plan<'a> {
    pub(super) examination: &'a Examination,
    pub(super) image: &'a ExaminedImage,
    pub(super) name: &'a ImageName,
    pub(super) accounts: Vec<Name>,
    pub(super) pull_secret: Option<&'a PullSecretName>,
    pub(super) context: Option<&'a RegcredContext>,
    pub(super) managed: &'a [(SecretName, ManagedBy)],
    /// Remedies of earlier images.
    pub(super) proposed: &'a [Fix],
}

/// List of pull secrets that new pods get.
#[derive(Clone, Copy, PartialEq, Eq)]
enum List {
    /// That of the pod, its workload or the request.
    Own,
    /// That of the `ServiceAccount`.
    OfServiceAccount,
    /// That of a controller which is not known.
    OfController,
}

impl Plan<'_> {
    pub(super) fn no_secret(&self) -> Fix {
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

    pub(super) fn missing(&self) -> Option<Fix> {
        let missing = self.examination.secrets.iter().find(|secret| secret.state == SecretState::Missing)?;
        let name = missing.name.as_str();
        if let Some(by) = self.managed_by(missing) {
            return Some(self.sync(by, name));
        }
        let description = format!("create the Secret {name} with a login for `{}`", self.name.registry());
        let steps = self.provide(name, self.key());
        // A Secret that an earlier remedy creates for another registry cannot be created again.
        if self.is_taken(name, &steps) {
            return Some(self.add());
        }
        Some(fix(FixType::CreateSecret, description, Some(name), steps).applying(self.delivery(name)))
    }

    pub(super) fn unreadable(&self) -> Option<Fix> {
        let secrets = &self.examination.secrets;
        let failing = self.examination.failing_secret();
        let unreadable = || secrets.iter().map(AsRef::as_ref).find(|secret: &&ReadSecret| secret.is_unreadable());
        let secret = failing.or_else(unreadable)?;
        if let Some(by) = self.managed_by(secret) {
            return Some(self.sync(by, secret.name.as_str()));
        }
        let earlier = |fix: &&Fix| fix.secret.as_deref() == Some(secret.name.as_str());
        Some(match self.proposed.iter().find(earlier) {
            Some(earlier) if secret.fails_pod => earlier.clone(),
            _ if secret.is_replaceable() => self.replace(secret),
            _ if secret.fails_pod => self.add_instead_of(Some(secret)),
            _ => self.add(),
        })
    }

    pub(super) fn invalid(&self) -> Fix {
        let tried =
            self.image.candidates.iter().find(|candidate| candidate.skipped.is_none() && candidate.login.is_some());
        let tried = tried.and_then(|one| Some((self.examination.secrets.get(one.secret)?, one.key.as_str())));
        let Some((secret, key)) = tried else { return self.add() };
        match self.managed_by(secret) {
            Some(by) if by.pull_secret.is_some() && by.state.as_deref() == Some(SYNCED) && by.is_as_written => {
                rotate(by, key)
            }
            Some(by) => self.sync(by, secret.name.as_str()),
            None if secret.is_replaceable() => self.replace(secret),
            None => self.add(),
        }
    }

    pub(super) fn unknown(&self) -> Option<Fix> {
        let is_forbidden = self.examination.secrets.iter().any(|secret| secret.state == SecretState::Forbidden);
        let context = self.context.filter(|_| is_forbidden)?;
        let (cluster, namespace) = (&context.cluster, &self.examination.pod.namespace);
        let (subject, advice) = match &context.service_account {
            Some(account) => (format!("'{}/{}'", account.namespace, account.name), ""),
            None => (
                "\"$REGCRED_SERVICE_ACCOUNT\"".to_owned(),
                "; REGCRED_SERVICE_ACCOUNT is the NAMESPACE/NAME of the ServiceAccount of its token, and a client \
                 certificate needs --user instead",
            ),
        };
        let command = format!(
            "regcred cluster rbac --cluster '{cluster}' '--doctor={namespace}' --service-account {subject} | kubectl \
             apply -f -"
        );
        let description = format!("grant regcred the right to read the Secrets of the namespace{advice}");
        Some(fix(FixType::GrantRights, description, None, vec![Step::Command { command }]))
    }

    fn kubectl(&self) -> &Kubectl {
        &self.examination.kubectl
    }

    fn managed_by(&self, secret: &ReadSecret) -> Option<&ManagedBy> {
        self.managed.iter().find(|(name, _)| *name == secret.name).map(|(_, by)| by)
    }

    /// Whether an earlier remedy makes the Secret in another way.
    fn is_taken(&self, secret: &str, steps: &[Step]) -> bool {
        self.proposed.iter().any(|earlier| earlier.secret.as_deref() == Some(secret) && earlier.steps != steps)
    }

    fn sync(&self, by: &ManagedBy, secret: &str) -> Fix {
        let owner = by.pull_secret.as_deref().and_then(|name| Name::parse(name).ok());
        owner.and_then(|owner| self.sync_of(&owner, secret)).unwrap_or_else(|| {
            let description = format!(
                "the Secret {secret} belongs to a pull secret of regcred that this caller may not see: have it delivered \
                 again"
            );
            fix(FixType::SyncPullSecret, description, Some(secret), Vec::new())
        })
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

    /// Replaces a Secret by one for the registry of its only entry.
    fn replace(&self, secret: &ReadSecret) -> Fix {
        let (name, namespace) = (secret.name.as_str(), &self.examination.pod.namespace);
        let key = secret.only_key().unwrap_or_else(|| self.key());
        let mut steps =
            vec![self.kubectl().step(format!("delete secret '{name}' -n '{namespace}' --ignore-not-found"))];
        steps.extend(self.provide(name, key));
        if self.is_taken(name, &steps) {
            return self.add();
        }
        let description =
            format!("replace the Secret {name} by one with a login for `{key}`, the only one that it is for");
        fix(FixType::ReplaceSecret, description, Some(name), steps)
    }

    /// Creates a further Secret and adds it to the list that counts.
    pub(super) fn add(&self) -> Fix {
        self.add_instead_of(None)
    }

    /// As [`add`](Self::add), and removes another Secret from the list.
    fn add_instead_of(&self, removed: Option<&ReadSecret>) -> Fix {
        let name = new_secret_name(self.examination, self.name);
        let removed = removed.map(|secret| secret.name.as_str());
        match self.list() {
            List::OfServiceAccount => self.add_to_service_account(&name, removed),
            list => self.add_to_own_list(&name, removed, list),
        }
    }

    fn list(&self) -> List {
        let pod = &self.examination.pod;
        match &pod.subject {
            Subject::Pod { controller: Some(Controller { has_own_list: Some(true), .. }), .. } => List::Own,
            Subject::Pod { controller: Some(Controller { has_own_list: Some(false), .. }), .. } => {
                List::OfServiceAccount
            }
            _ if !pod.has_own_list() => List::OfServiceAccount,
            Subject::Pod { controller: Some(_), .. } => List::OfController,
            Subject::Pod { controller: None, .. } | Subject::Workload { .. } | Subject::Spec => List::Own,
        }
    }

    fn add_to_service_account(&self, name: &str, removed: Option<&str>) -> Fix {
        let (pod, registry) = (&self.examination.pod, self.name.registry());
        let account = &pod.service_account;
        if let Some(declaring) = self.declare(name).filter(|_| removed.is_none()) {
            return declaring;
        }
        let mut steps = self.provide(name, self.key());
        if self.examination.is_service_account_missing {
            steps.extend(create_service_account(self.kubectl(), &pod.namespace, account).steps);
        }
        steps.extend(self.attach(name, removed));
        steps.extend(self.recreate());
        let removal = removed.map(|removed| format!(" instead of {removed}")).unwrap_or_default();
        let description = format!(
            "create the Secret {name} with a login for `{registry}`, and add it to the ServiceAccount {account}{removal}: \
             all of its new pods use it, and older ones keep their list"
        );
        fix(FixType::AttachServiceAccount, description, Some(name), steps)
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
            PullSecretName::Declared(name) => {
                let mut fix = self.sync_of(name, secret)?;
                fix.steps.extend(self.recreate());
                return Some(fix);
            }
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
        steps.extend(self.recreate());
        let description = format!(
            "declare the pull secret {name}: regcred creates the Secret {secret} with a login for `{}`, keeps it in sync, \
             and adds it to the ServiceAccount {account}: all of its new pods use it, and older ones keep their list",
            self.name.registry()
        );
        Some(fix(FixType::AttachServiceAccount, description, Some(secret), steps).applying(Some(change)))
    }

    fn add_to_own_list(&self, name: &str, removed: Option<&str>, list: List) -> Fix {
        let mut steps = self.provide(name, self.key());
        let changes = if list == List::Own { self.change_own_list(name, removed) } else { Vec::new() };
        let how = match &self.examination.pod.subject {
            Subject::Workload { kind: WorkloadKind::Job, .. } => {
                ", and create the Job anew with it in imagePullSecrets: its template cannot be changed"
            }
            Subject::Pod { controller: Some(_), .. } if changes.is_empty() => {
                ", and have the controller of the pod add it to imagePullSecrets"
            }
            _ => ", and add it to imagePullSecrets",
        };
        steps.extend(changes);
        let removal = removed.map(|removed| format!(", instead of {removed}")).unwrap_or_default();
        let registry = self.name.registry();
        let description = format!("create the Secret {name} with a login for `{registry}`{how}{removal}");
        fix(FixType::AddPullSecret, description, Some(name), steps)
    }

    /// Delivery of a Secret, if regcred has an account for the image.
    fn delivery(&self, secret: &str) -> Option<Change> {
        let has_account = self.context.is_some() && !self.accounts.is_empty();
        has_account.then(|| Change::Deliver { secret: secret.to_owned(), accounts: self.accounts.clone() })
    }

    /// Key of the image's registry.
    fn key(&self) -> &str {
        if self.name.is_on_docker_hub() { DOCKER_HUB_KEY } else { self.name.registry() }
    }

    /// Creates a Secret for a key: by regcred if it has an account for the image, and the key is of the
    /// image's registry.
    fn provide(&self, name: &str, key: &str) -> Vec<Step> {
        let namespace = &self.examination.pod.namespace;
        let authority = |text: &str| RegistryScope::parse(text).ok().map(|scope| scope.authority().to_owned());
        let is_of_image = authority(key) == authority(self.name.registry());
        if let Some(step) = self.delivery(name).filter(|_| is_of_image).and_then(|delivery| self.request(&delivery)) {
            return vec![step];
        }
        vec![self.kubectl().step(format!(
            "create secret docker-registry '{name}' -n '{namespace}' --docker-server='{key}' \
             --docker-username=\"$REGISTRY_USERNAME\" --docker-password=\"$REGISTRY_PASSWORD\""
        ))]
    }

    /// The list is atomic, so a patch that is not a JSON Patch would replace it.
    fn attach(&self, name: &str, removed: Option<&str>) -> Option<Step> {
        let names = self.examination.of_service_account.as_ref();
        let place = |removed: &str| names?.iter().position(|name| name.as_str() == removed);
        let operation = if let Some(removed) = removed {
            let path = format!("/imagePullSecrets/{}", place(removed)?);
            json!([{"op": "test", "path": format!("{path}/name"), "value": removed},
                {"op": "replace", "path": path, "value": {"name": name}}])
        } else if names.is_some_and(Vec::is_empty) || self.examination.is_service_account_missing {
            json!([{"op": "add", "path": "/imagePullSecrets", "value": [{"name": name}]}])
        } else {
            // Fails if there is no list, rather than to replace one that could not be read.
            json!([{"op": "add", "path": "/imagePullSecrets/-", "value": {"name": name}}])
        };
        let (account, namespace) = (&self.examination.pod.service_account, &self.examination.pod.namespace);
        let line = format!("patch serviceaccount '{account}' -n '{namespace}' --type=json -p '{operation}'");
        Some(self.kubectl().step(line))
    }

    /// Changes the list of the pod, or of the workload that creates it.
    fn change_own_list(&self, added: &str, removed: Option<&str>) -> Vec<Step> {
        let pod = &self.examination.pod;
        // A strategic merge patch refuses a list whose entries lack a name.
        if pod.has_invalid_reference {
            return Vec::new();
        }
        let removed = removed.map(|removed| json!({"$patch": "delete", "name": removed}));
        let list: Vec<Value> = removed.into_iter().chain([json!({"name": added})]).collect();
        let list = json!({"imagePullSecrets": list});
        let namespace = &pod.namespace;
        match &pod.subject {
            Subject::Pod { name, controller: None } => vec![self.kubectl().pipe(&[
                &format!("get pod '{name}' -n '{namespace}' -o yaml"),
                &format!("patch --local -f - -o yaml -p '{}'", json!({"spec": list})),
                "replace --force -f -",
            ])],
            Subject::Pod { controller: Some(Controller { workload: Some((kind, name)), .. }), .. } => {
                let changed = self.change_template(*kind, name, &list);
                changed.map(|step| [vec![step], self.recreate()].concat()).unwrap_or_default()
            }
            Subject::Workload { kind, name } => self.change_template(*kind, name, &list).into_iter().collect(),
            Subject::Pod { .. } | Subject::Spec => Vec::new(),
        }
    }

    /// The template of a Job cannot be changed.
    fn change_template(&self, kind: WorkloadKind, name: &PodName, list: &Value) -> Option<Step> {
        let namespace = &self.examination.pod.namespace;
        let template = json!({"spec": {"template": {"spec": list}}});
        let patch = match kind {
            WorkloadKind::Job => return None,
            WorkloadKind::CronJob => json!({"spec": {"jobTemplate": template}}),
            WorkloadKind::Deployment | WorkloadKind::StatefulSet | WorkloadKind::DaemonSet => template,
        };
        Some(self.kubectl().step(format!("patch {} '{name}' -n '{namespace}' -p '{patch}'", kind.as_str())))
    }

    /// Creates existing pods anew: they keep their list.
    fn recreate(&self) -> Vec<Step> {
        let namespace = &self.examination.pod.namespace;
        match &self.examination.pod.subject {
            Subject::Pod { name, controller: None } => vec![
                self.kubectl().pipe(&[&format!("get pod '{name}' -n '{namespace}' -o yaml"), "replace --force -f -"]),
            ],
            Subject::Pod { name, .. } => {
                vec![self.kubectl().step(format!("delete pod '{name}' -n '{namespace}' --ignore-not-found"))]
            }
            Subject::Workload {
                kind: kind @ (WorkloadKind::Deployment | WorkloadKind::StatefulSet | WorkloadKind::DaemonSet),
                name,
            } => vec![self.kubectl().step(format!("rollout restart '{}/{name}' -n '{namespace}'", kind.as_str()))],
            Subject::Workload { .. } | Subject::Spec => Vec::new(),
        }
    }
}

/// Has the account of an entry get another login.
fn rotate(by: &ManagedBy, key: &str) -> Fix {
    match by.accounts.iter().find(|account| account.key == key) {
        Some(account) if account.is_minted => {
            let path = format!("/v1/registry-accounts/{}/mint", account.name);
            let step = Step::request("POST", path, Value::Null);
            let description = format!("have regcred mint a new login for the account {}", account.name);
            fix(FixType::RotateAccount, description, None, vec![step])
        }
        Some(account) => {
            let description = format!(
                "store the right password with the account {0}: PATCH /v1/registry-accounts/{0} with `password`; regcred \
                 delivers it",
                account.name
            );
            fix(FixType::RotateAccount, description, None, Vec::new())
        }
        None => {
            let description = "store the right password with the registry account of this entry; regcred delivers it";
            fix(FixType::RotateAccount, description, None, Vec::new())
        }
    }
}
