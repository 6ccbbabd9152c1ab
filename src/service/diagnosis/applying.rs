//! Carries out the fixes of a diagnosis that regcred can make itself.

use crate::{
    domain::{
        caller::Call,
        diagnosis::{Change, Diagnosis},
        invalid::FieldError,
        names::{Labels, Name, NamespaceName, SecretName},
        pull_secret::Declaration,
        secret::{IfExists, SecretType},
        selector::AccountSelection,
    },
    service::{
        ServiceError,
        pull_secrets::{Precondition, PullSecrets},
        secrets::{Delivery, Secrets},
    },
};

/// Makes the changes of fixes: the use cases of the requests that a fix lists, with their grants and
/// audit events.
#[derive(Clone)]
pub struct Remedies {
    secrets: Secrets,
    pull_secrets: PullSecrets,
}

impl Remedies {
    /// Creates the service.
    #[must_use]
    pub const fn new(secrets: Secrets, pull_secrets: PullSecrets) -> Self {
        Self { secrets, pull_secrets }
    }

    /// Makes the change of each applicable fix, and marks the fix. Fixes for one Secret are
    /// alternatives, so only the first is carried out.
    ///
    /// The caller must have the [permission](Change::permission) of each.
    ///
    /// # Errors
    ///
    /// The error of the first change that fails. Earlier ones are made then, and audited.
    pub async fn apply(
        &self,
        caller: &Call,
        place: (&Name, &NamespaceName),
        diagnosis: &mut Diagnosis,
    ) -> Result<(), ServiceError> {
        let mut applied: Vec<Option<String>> = Vec::new();
        for fix in diagnosis.fixes_mut() {
            let Some(change) = fix.change.clone() else { continue };
            if applied.contains(&fix.secret) {
                continue;
            }
            self.make(caller, place, change).await?;
            fix.applied = true;
            applied.push(fix.secret.clone());
        }
        Ok(())
    }

    async fn make(
        &self,
        caller: &Call,
        (cluster, namespace): (&Name, &NamespaceName),
        change: Change,
    ) -> Result<(), ServiceError> {
        match change {
            Change::Deliver { secret, accounts } => {
                let delivery = Delivery {
                    cluster: cluster.clone(),
                    namespace: namespace.clone(),
                    name: SecretName::parse(&secret)
                        .map_err(|invalid| vec![FieldError::new("name", invalid.to_string())])?,
                    secret_type: SecretType::default(),
                    accounts: AccountSelection::Names(accounts),
                    labels: Labels::default(),
                    if_exists: IfExists::Refuse,
                };
                self.secrets.deliver(caller, delivery).await?;
            }
            Change::Declare { name, document } => {
                let declaration = Declaration::parse(*document)?;
                // Another pull secret of this name is not replaced.
                let condition = Precondition { must_be_new: true, ..Precondition::default() };
                self.pull_secrets.declare(caller, &name, &declaration, &condition).await?;
            }
            Change::Sync { name } => {
                self.pull_secrets.sync(caller, &name).await?;
            }
        }
        Ok(())
    }
}
