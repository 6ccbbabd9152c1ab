//! Propagates changes of accounts to pull secrets.

use std::collections::BTreeSet;

use uuid::Uuid;

use super::record_trace;
use crate::{
    domain::{account::Account, selector::LabelSelector},
    service::ServiceError,
    storage::{self, PgConnection},
};

/// Change of an account.
pub(in crate::service) enum AccountTransition<'a> {
    Created(&'a Account),
    Changed { before: &'a Account, after: &'a Account, has_new_password: bool },
    Deleted(&'a Account),
}

impl<'a> AccountTransition<'a> {
    fn before(&self) -> Option<&'a Account> {
        match self {
            Self::Created(_) => None,
            Self::Changed { before, .. } | Self::Deleted(before) => Some(before),
        }
    }

    fn after(&self) -> Option<&'a Account> {
        match self {
            Self::Created(after) | Self::Changed { after, .. } => Some(after),
            Self::Deleted(_) => None,
        }
    }

    /// Whether documents with the account change.
    fn changes_documents(&self) -> bool {
        match self {
            Self::Created(_) | Self::Deleted(_) => true,
            Self::Changed { before, after, has_new_password } => {
                *has_new_password
                    || before.registry != after.registry
                    || before.username != after.username
                    || before.email != after.email
            }
        }
    }

    /// The account whose documents by name change. No declaration names a created or deleted
    /// account.
    fn named(&self) -> Option<Uuid> {
        match self {
            Self::Changed { after, .. } if self.changes_documents() => Some(after.id),
            _ => None,
        }
    }

    /// Whether documents by selector may change.
    fn may_affect_selectors(&self) -> bool {
        self.changes_documents()
            || self.before().map(|account| &account.labels) != self.after().map(|account| &account.labels)
    }

    /// Whether the selector matches the account before and after the change.
    fn selected_by(&self, selector: &LabelSelector) -> (bool, bool) {
        let selects =
            |account: Option<&Account>| account.is_some_and(|account| selector.matches(account.labels.as_map()));
        (selects(self.before()), selects(self.after()))
    }

    /// Whether the document of this selector changes.
    fn affects(&self, selector: &LabelSelector) -> bool {
        let (was, is) = self.selected_by(selector);
        was != is || (is && self.changes_documents())
    }

    /// Whether another set of accounts matches this selector.
    fn changes_selection(&self, selector: &LabelSelector) -> bool {
        let (was, is) = self.selected_by(selector);
        was != is
    }
}

/// Bumps the generation of all pull secrets that use changed accounts, once and in one statement,
/// which prevents deadlocks. Requires [`storage::pull_secrets::lock_selectors_shared`] in the same
/// transaction.
pub(in crate::service) async fn propagate_account_changes(
    conn: &mut PgConnection,
    transitions: &[AccountTransition<'_>],
) -> Result<(), ServiceError> {
    let named: Vec<Uuid> = transitions.iter().filter_map(AccountTransition::named).collect();
    let (mut ids, mut reselecting) = (BTreeSet::new(), Vec::new());
    if !named.is_empty() {
        ids.extend(storage::pull_secrets::ids_naming(conn, &named).await?);
    }
    let transitions: Vec<_> = transitions.iter().filter(|one| one.may_affect_selectors()).collect();
    let accounts = transitions.iter().flat_map(|one| [one.before(), one.after()]).flatten();
    let labels: BTreeSet<_> = accounts.map(|account| account.labels.as_map()).collect();
    if !labels.is_empty() {
        let labels: Vec<_> = labels.into_iter().collect();
        let selecting = storage::pull_secrets::selecting(conn, &labels).await?.into_iter();
        let affected = selecting.filter(|(_, selector)| transitions.iter().any(|one| one.affects(selector)));
        for (id, selector) in affected {
            ids.insert(id);
            if transitions.iter().any(|one| one.changes_selection(&selector)) {
                reselecting.push((id, selector));
            }
        }
    }
    let ids: Vec<Uuid> = ids.into_iter().collect();
    storage::pull_secrets::bump_generation(conn, &ids).await?;
    record_trace(conn, &ids).await?;
    // After the pull secrets are locked: a concurrent change of another account is committed and seen.
    for (id, selector) in reselecting {
        let selects = storage::accounts::selects_any(conn, &selector).await?;
        storage::unmatched::record_accounts(conn, id, Some(selects)).await?;
    }
    Ok(())
}
