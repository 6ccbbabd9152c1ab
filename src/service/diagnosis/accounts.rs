//! Accounts of regcred for the images of a diagnosis. A fix delivers one only after its login was
//! tried.

use super::{Diagnoses, RegistryQuestions};
use crate::{
    domain::{
        audit::{Action, NewEvent, Resource},
        caller::Call,
        diagnosis::{FixAccount, PullReport},
        matching::ImageReference,
        names::Name,
        verification::VerificationResult,
    },
    service::ServiceError,
    storage::accounts::SealedCredential,
};

/// Maximum number of accounts that are tried for one image.
const TRIED_MAX: usize = 5;

/// What the registry of an image says of a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trial {
    /// It delivers the image.
    Pulls,
    /// It accepts the login, and does not deliver the image.
    Accepted,
    /// It rejects the login, or does not let it pull the image.
    Refused,
    /// It could not be asked.
    Unasked,
}

impl Trial {
    fn of(report: Option<&PullReport>) -> Self {
        use VerificationResult as R;
        match report {
            Some(report) if report.pulls() => Self::Pulls,
            Some(PullReport { result: R::Valid | R::Anonymous, .. }) => Self::Accepted,
            Some(PullReport { result: R::Invalid | R::NoAccess, .. }) => Self::Refused,
            Some(PullReport {
                result: R::Unreachable | R::TlsError | R::NotARegistry | R::RateLimited | R::Refused,
                ..
            })
            | None => Self::Unasked,
        }
    }
}

impl Diagnoses {
    /// Returns the granted account with the longest scope whose login pulls an image. Without one, the
    /// first that the registry does not refuse.
    pub(super) async fn account_for(
        &self,
        caller: &Call,
        image: &ImageReference,
        questions: &RegistryQuestions<'_>,
    ) -> Result<Option<FixAccount>, ServiceError> {
        let mut next = None;
        let accounts = self.docker_configs.narrowest_for(caller, &image.name).await?;
        for account in accounts.into_iter().take(TRIED_MAX) {
            let Ok(name) = Name::parse(&account.name) else { continue };
            let trial = self.try_account(caller, (&name, &account), image, questions).await?;
            let found = FixAccount { name, is_tried: trial != Trial::Unasked };
            match trial {
                Trial::Pulls => return Ok(Some(found)),
                Trial::Accepted | Trial::Unasked => next = next.or(Some(found)),
                Trial::Refused => {}
            }
        }
        Ok(next)
    }

    /// Presents the login of an account to its registry, which is that of the image. The event is
    /// durable before.
    async fn try_account(
        &self,
        caller: &Call,
        (name, account): (&Name, &SealedCredential),
        image: &ImageReference,
        questions: &RegistryQuestions<'_>,
    ) -> Result<Trial, ServiceError> {
        if account.is_expired() {
            return Ok(Trial::Refused);
        }
        if account.registry.authority() != image.name.registry() {
            return Ok(Trial::Unasked);
        }
        let event = NewEvent::of(caller, Action::AccountVerify, Resource::account(name));
        let Ok(password) = self.docker_configs.password(account) else {
            self.audit_writer.note_damage(event).await;
            return Ok(Trial::Refused);
        };
        self.audit_writer.record(event).await?;
        let report = questions.ask_with(image, (account.username.as_str(), &password)).await;
        Ok(Trial::of(report.as_ref()))
    }
}
