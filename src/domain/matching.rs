//! Entry selection: the entries of a docker config that a consumer uses for an image, and why
//! others are not used.
//!
//! Each consumer's lookup rules are in a separate file with their source. [`explain_accounts`] and
//! [`explain_config`] apply all of them to an image; [`used_accounts`] applies those of one
//! consumer, and [`lint`] applies them to images that a key seems to cover.

mod address;
mod docker;
mod explain;
mod go_url;
mod image;
mod kubelet;
pub mod lint;
mod nearest;
mod podman;
mod pull;
mod refusal;
mod used;
mod verdict;

use self::address::Address;
pub use self::{
    explain::{Consumers, Explanation, LookUp, explain_accounts, explain_config, explain_secrets},
    image::{ImageName, ImageReference},
    nearest::{Mismatch, Nearest},
    pull::{Addressed, PullEntry, addressed, nearest_entries, pull_entries, slot},
    used::{MatchTarget, Used, used_accounts},
    verdict::Verdict,
};
use crate::domain::docker_config::{Consumer, parse::Form};

/// Result of a lookup among keys.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    /// Indices of keys, in the order of attempts.
    order: Vec<usize>,
    /// Whether the order is random in part, and with it which key is used.
    is_ambiguous: bool,
}

impl Found {
    fn none() -> Self {
        Self::all_in_order(Vec::new())
    }

    /// All keys are tried in order.
    fn all_in_order(order: Vec<usize>) -> Self {
        Self { order, is_ambiguous: false }
    }

    /// One of the keys is used.
    fn one_of(candidates: Vec<usize>) -> Self {
        Self { is_ambiguous: candidates.len() > 1, order: candidates }
    }
}

/// Looks up keys as the consumer does.
fn look_up(consumer: Consumer, keys: &[&str], form: Form, image: &ImageName) -> Found {
    match consumer {
        Consumer::Kubernetes => kubelet::look_up(keys, image),
        Consumer::K8schain => kubelet::look_up_k8schain(keys, image),
        Consumer::Docker => docker::look_up(keys, image),
        Consumer::DockerAuthConfig => docker::look_up_exactly(keys, image),
        Consumer::Podman => podman::look_up(keys, image, form),
    }
}

#[cfg(test)]
mod tests;
