//! Keys of one document that name the same registry.

use std::collections::HashMap;

use secrecy::ExposeSecret;

use super::{FoundAccount, ImportItem, ImportOutcome, SkipReason};
use crate::domain::{
    docker_config::{Profile, key_for},
    registry::RegistryScope,
};

/// Keeps one item per registry and skips the others with a reference to it.
pub(super) fn skip_duplicates(items: &mut [ImportItem]) {
    let winners = winners(items);
    for at in 0..items.len() {
        let winner = account(&items[at]).and_then(|account| winners.get(&account.scope));
        if let Some(winner) = winner.copied().filter(|winner| *winner != at) {
            skip(items, at, winner);
        }
    }
}

/// Index of the item to keep for each registry: the first with the key that every consumer finds,
/// or else the first.
fn winners(items: &[ImportItem]) -> HashMap<RegistryScope, usize> {
    let mut winners: HashMap<RegistryScope, usize> = HashMap::new();
    for (at, item) in items.iter().enumerate() {
        let Some(FoundAccount { scope, .. }) = account(item) else { continue };
        let is_found_by_all = |item: &ImportItem| item.key == key_for(Profile::Kubernetes, scope);
        let winner = winners.entry(scope.clone()).or_insert(at);
        if is_found_by_all(item) && !is_found_by_all(&items[*winner]) {
            *winner = at;
        }
    }
    winners
}

fn account(item: &ImportItem) -> Option<&FoundAccount> {
    match &item.outcome {
        ImportOutcome::Found(account) => Some(account),
        ImportOutcome::Skipped { .. } => None,
    }
}

fn skip(items: &mut [ImportItem], other: usize, winner: usize) {
    let key = &items[winner].key;
    let of = items[winner].source.as_ref().map_or_else(String::new, |source| format!(" of `{source}`"));
    let (reason, detail) = if is_same_login(account(&items[other]), account(&items[winner])) {
        (SkipReason::Duplicate, format!("the key `{key}`{of} names the same registry and holds the same credential"))
    } else {
        (
            SkipReason::Conflict,
            format!(
                "the key `{key}`{of} names the same registry and holds another credential: import this entry in a separate document with another `namePrefix`"
            ),
        )
    };
    items[other].outcome = ImportOutcome::Skipped { reason, detail };
}

fn is_same_login(one: Option<&FoundAccount>, other: Option<&FoundAccount>) -> bool {
    one.zip(other).is_some_and(|(one, other)| {
        one.username == other.username
            && one.password.expose_secret() == other.password.expose_secret()
            && one.plain_http == other.plain_http
    })
}
