//! Reasons for which a consumer refuses a complete document.

use super::kubelet;
use crate::domain::docker_config::{
    Consumer,
    import::redact_key,
    parse::{Config, Form},
    reading::{Reading, read},
};

/// Returns the reason if the consumer uses no entry of the document for any image.
pub(super) fn refusal(consumer: Consumer, config: &Config) -> Option<Refusal<'_>> {
    if let Some(reason) = document_reason(consumer, config) {
        return Some(Refusal { key: None, reason });
    }
    config.entries.iter().find_map(|entry| {
        let reason = entry_reason(consumer, &entry.key, read(consumer, entry))?;
        let key = Some(entry.key.as_str());
        Some(Refusal { key, reason })
    })
}

/// Reason for refusing a document.
pub(super) struct Refusal<'a> {
    /// Key of the offending entry, if any.
    pub(super) key: Option<&'a str>,
    reason: String,
}

impl Refusal<'_> {
    /// Complete sentence.
    pub(super) fn of(&self, consumer: Consumer) -> String {
        match self.key {
            None => format!("{consumer} does not read this document: {}", self.reason),
            Some(key) => {
                let effect = match consumer {
                    // It keeps the entries read so far, in the random order of a Go map.
                    Consumer::Docker => "warns, and then finds an entry of this document only by chance,",
                    _ => "cannot use this document",
                };
                format!("{consumer} {effect} because of the entry `{}`: {}", redact_key(key), self.reason)
            }
        }
    }
}

fn document_reason(consumer: Consumer, config: &Config) -> Option<String> {
    match (consumer, config.form) {
        (Consumer::Docker | Consumer::DockerAuthConfig, Form::Dockercfg) => {
            Some("it is the legacy format, without `auths`".to_owned())
        }
        (Consumer::DockerAuthConfig, Form::DockerConfigJson) => {
            let helpers = (!config.helpers.is_empty()).then_some("credHelpers");
            let store = config.store.as_deref().map(|_| "credsStore");
            let name = helpers.or(store).or(config.others.first().map(String::as_str))?;
            Some(format!("it has the field `{name}`, but only `auths` is accepted"))
        }
        _ => None,
    }
}

/// The kubelet skips a key that is not a URL; go-containerregistry fails on it
/// (`pkg/authn/kubernetes/keyring.go`, `NewFromPullSecrets`).
fn entry_reason(consumer: Consumer, key: &str, reading: Reading) -> Option<String> {
    if consumer == Consumer::K8schain && kubelet::slot(key).is_none() {
        return Some("its key is not a URL".to_owned());
    }
    match reading {
        Reading::FailsAll(reason) => Some(reason.into_owned()),
        Reading::Login | Reading::Token | Reading::Nothing(_) | Reading::Fails(_) => None,
    }
}
