//! Changes of parts of a declaration, and what a request states about the stored pull secret.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{PullSecrets, ShownPullSecret, granted};
use crate::{
    domain::{
        caller::{Call, Identity},
        invalid::FieldError,
        names::Name,
        pull_secret::{Declaration, Document},
    },
    service::{ExpectedVersion, ServiceError, check_version, connection},
    storage::pull_secrets::StoredPullSecret,
};

/// Attempts to change a declaration that other requests change at the same time.
const ATTEMPTS_MAX: usize = 5;

/// What a request states about the stored pull secret.
#[derive(Debug, Clone, Default)]
pub struct Precondition {
    /// Version that `If-Match` requires.
    pub version: ExpectedVersion,
    /// Read-only fields of the body.
    pub read_only: ReadOnlyFields,
    /// Whether the name must be free, as `If-None-Match: *` requires.
    pub must_be_new: bool,
}

/// Read-only fields of a pull secret that was read before; `None` for an omitted field.
///
/// The others (status, selections and generations) are not compared: regcred changes them while the
/// caller edits the declaration.
#[derive(Debug, Clone, Default)]
pub struct ReadOnlyFields {
    /// Immutable identifier.
    pub id: Option<Uuid>,
    /// Version of the declaration.
    pub version: Option<i64>,
    /// Time of the deletion.
    pub deleted_at: Option<DateTime<Utc>>,
    /// Time of creation.
    pub created_at: Option<DateTime<Utc>>,
    /// Time of the last change.
    pub updated_at: Option<DateTime<Utc>>,
}

impl Precondition {
    /// Requires that the stored pull secret, if there is one, is as the request states.
    pub(super) fn check(&self, existing: Option<&StoredPullSecret>) -> Result<(), ServiceError> {
        match existing {
            Some(existing) if self.must_be_new => return Err(ServiceError::Exists { name: existing.name.to_string() }),
            Some(existing) => check_version(self.version, existing.version)?,
            None if self.version.is_some() => return Err(ServiceError::Stale { current: 0 }),
            None => {}
        }
        self.read_only.check(existing)
    }
}

impl ReadOnlyFields {
    fn check(&self, existing: Option<&StoredPullSecret>) -> Result<(), ServiceError> {
        fn differs<T: PartialEq>(given: Option<&T>, stored: Option<&T>) -> bool {
            given.is_some() && given != stored
        }
        let fields = [
            ("id", differs(self.id.as_ref(), existing.map(|one| &one.id))),
            ("version", differs(self.version.as_ref(), existing.map(|one| &one.version))),
            ("deletedAt", differs(self.deleted_at.as_ref(), existing.and_then(|one| one.deleted_at.as_ref()))),
            ("createdAt", differs(self.created_at.as_ref(), existing.map(|one| &one.created_at))),
            ("updatedAt", differs(self.updated_at.as_ref(), existing.map(|one| &one.updated_at))),
        ];
        let detail = match existing {
            Some(_) => "is read-only and differs from the stored value: omit it, or read the pull secret again",
            None => "is read-only and there is no pull secret of this name: omit it",
        };
        let changed = fields.into_iter().filter(|(_, differs)| *differs);
        let errors: Vec<FieldError> = changed.map(|(field, _)| FieldError::new(field, detail)).collect();
        if errors.is_empty() { Ok(()) } else { Err(errors.into()) }
    }
}

impl PullSecrets {
    /// Changes the declaration of an existing pull secret as [`declare`](Self::declare) does.
    /// `merge` returns the changed declaration.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - As [`declare`](Self::declare), and the errors of `merge`.
    pub async fn change(
        &self,
        caller: &Call,
        name: &Name,
        expected: ExpectedVersion,
        merge: impl Fn(Document) -> Result<Declaration, Vec<FieldError>>,
    ) -> Result<ShownPullSecret, ServiceError> {
        for _ in 1..ATTEMPTS_MAX {
            let (declaration, condition) = self.merged(caller, name, expected, &merge).await?;
            match self.declare(caller, name, &declaration, &condition).await {
                // Another request changed the declaration since it was read.
                Err(ServiceError::Stale { .. }) if expected.is_none() => {}
                declared => return declared.map(|(_, shown)| shown),
            }
        }
        let (declaration, condition) = self.merged(caller, name, expected, &merge).await?;
        Ok(self.declare(caller, name, &declaration, &condition).await?.1)
    }

    /// Merges a change into the stored declaration, without storing it. The result holds for the
    /// returned condition only.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - [`ServiceError::Stale`] if the pull secret is not at the expected version.
    pub async fn merged(
        &self,
        caller: &Identity,
        name: &Name,
        expected: ExpectedVersion,
        merge: impl Fn(Document) -> Result<Declaration, Vec<FieldError>>,
    ) -> Result<(Declaration, Precondition), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let stored = granted(&mut conn, caller, name).await?;
        check_version(expected, stored.version)?;
        let declaration = merge(stored.declaration.document())?;
        Ok((declaration, Precondition { version: Some(stored.version), ..Precondition::default() }))
    }
}
