//! The answer of an explanation in one sentence.

use serde::Serialize;
use utoipa::ToSchema;

use super::{Address, ImageName, explain::LookUp};
use crate::domain::docker_config::Consumer;

/// What a reader does for the image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    /// The answer, for people.
    pub sentence: String,
    /// Whether it logs in with an entry that is for the image.
    pub usable: bool,
    /// Key of the entry that it uses, or tries first.
    pub key: Option<String>,
    /// Account of that entry, if any.
    pub account: Option<String>,
}

/// Entry that a lookup found.
#[derive(Debug, Clone, Copy)]
pub(super) struct UsedEntry<'a> {
    /// Scope that the entry is for.
    pub(super) scope: Address<'a>,
    /// Whether it is for the image.
    pub(super) is_intended: bool,
}

/// Adds the verdict to a complete lookup. `mistaken` is the host of an entry that looks like the
/// first part of the image's name.
pub(super) fn conclude(
    consumer: Consumer,
    look_up: LookUp,
    used: &[UsedEntry<'_>],
    mistaken: Option<&str>,
    image: &ImageName,
) -> LookUp {
    let tries_all = consumer == Consumer::Kubernetes;
    let is_intended = if tries_all {
        used.iter().any(|entry| entry.is_intended)
    } else {
        !used.is_empty() && used.iter().all(|entry| entry.is_intended)
    };
    let sentence = if let Some(name) = &look_up.helper {
        format!("{consumer} asks the program `docker-credential-{name}` and uses no entry")
    } else if let Some(problem) = &look_up.problem {
        problem.clone()
    } else {
        match (used, is_intended) {
            ([], _) => unmatched(consumer, &look_up, mistaken, image),
            ([first, ..], false) if tries_all || used.len() == 1 => {
                format!("{consumer} uses {} for `{image}`, although it is for `{}`", entry(&look_up, 0), first.scope)
            }
            ([_], true) => format!("{consumer} logs in with {}", entry(&look_up, 0)),
            ([_, rest @ ..], true) if tries_all => {
                format!("{consumer} tries {} first, and then {} more", entry(&look_up, 0), rest.len())
            }
            _ => format!("{consumer} picks one of {} entries at random, such as {}", used.len(), entry(&look_up, 0)),
        }
    };
    let verdict = Verdict {
        usable: is_intended && look_up.problem.is_none() && look_up.helper.is_none(),
        key: look_up.keys.first().cloned(),
        account: look_up.accounts.first().cloned(),
        sentence,
    };
    LookUp { verdict, ..look_up }
}

fn unmatched(consumer: Consumer, look_up: &LookUp, mistaken: Option<&str>, image: &ImageName) -> String {
    let outcome = format!("{consumer} uses no entry for `{image}`");
    match (mistaken, look_up.nearest.first()) {
        (Some(host), _) => {
            format!(
                "{outcome}: images named `{host}/…` are on Docker Hub, because a registry's name has a dot or a port"
            )
        }
        (None, Some(nearest)) => format!("{outcome}; the nearest is `{}`: {}", nearest.key, nearest.detail),
        (None, None) => outcome,
    }
}

fn entry(look_up: &LookUp, at: usize) -> String {
    let key = look_up.keys.get(at).map(String::as_str).unwrap_or_default();
    match look_up.accounts.get(at) {
        Some(account) => format!("the entry `{key}` of the account `{account}`"),
        None => format!("the entry `{key}`"),
    }
}
