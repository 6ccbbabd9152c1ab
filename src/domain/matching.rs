//! Which entry of a docker config a program uses for an image, in what order, and why not another.
//!
//! Each reader looks up keys in its own way; the rules are in one file for each, with their source.
//! [`explain_accounts`] and [`explain_config`] ask all of them, [`lint`] asks them about images that a key seems to be
//! meant for.

mod address;
mod docker;
mod explain;
mod go_url;
mod image;
mod kubelet;
pub mod lint;
mod nearest;
mod podman;
mod refusal;

use self::address::Address;
pub use self::{
    explain::{Consumers, Explanation, LookUp, explain_accounts, explain_config},
    image::ImageName,
    nearest::{Mismatch, Nearest},
};
use crate::domain::docker_config::{Consumer, parse::Form};

/// What a look-up finds among keys.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    /// Places in the list of keys, in the order in which they are tried.
    order: Vec<usize>,
    /// Whether only one of them is tried, and chance decides which.
    is_ambiguous: bool,
}

impl Found {
    fn none() -> Self {
        Self::in_this_order(Vec::new())
    }

    /// All are tried, one after another.
    fn in_this_order(order: Vec<usize>) -> Self {
        Self { order, is_ambiguous: false }
    }

    /// One of these is used.
    fn one_of(candidates: Vec<usize>) -> Self {
        Self { is_ambiguous: candidates.len() > 1, order: candidates }
    }
}

/// Looks up as the consumer does.
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
