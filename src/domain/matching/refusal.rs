//! What makes a reader refuse a whole document.

use super::kubelet;
use crate::domain::docker_config::{
    Consumer,
    import::shown,
    parse::{Config, Form},
    reading::{Reading, read},
};

/// Why a reader uses no entry of the document, whatever the image.
pub(super) fn refusal(consumer: Consumer, config: &Config) -> Option<Refusal<'_>> {
    if let Some(why) = as_a_whole(consumer, config) {
        return Some(Refusal { key: None, why });
    }
    config.entries.iter().find_map(|entry| {
        let why = because_of(consumer, &entry.key, read(consumer, entry))?;
        let key = Some(entry.key.as_str());
        Some(Refusal { key, why })
    })
}

/// Why a reader refuses a document.
pub(super) struct Refusal<'a> {
    /// The key of the entry that is to blame, if it is one.
    pub(super) key: Option<&'a str>,
    why: String,
}

impl Refusal<'_> {
    /// The whole sentence.
    pub(super) fn of(&self, consumer: Consumer) -> String {
        match self.key {
            None => format!("{consumer} does not read this document: {}", self.why),
            Some(key) => {
                let effect = match consumer {
                    // It goes on with what it had read, in the order of a Go map, which is random.
                    Consumer::Docker => "warns, and then finds an entry of this document only by chance,",
                    _ => "cannot use this document",
                };
                format!("{consumer} {effect} because of the entry `{}`: {}", shown(key), self.why)
            }
        }
    }
}

fn as_a_whole(consumer: Consumer, config: &Config) -> Option<String> {
    match (consumer, config.form) {
        (Consumer::Docker | Consumer::DockerAuthConfig, Form::Dockercfg) => {
            Some("it is the legacy form, without `auths`".to_owned())
        }
        (Consumer::DockerAuthConfig, Form::DockerConfigJson) => {
            let helpers = (!config.helpers.is_empty()).then_some("credHelpers");
            let store = config.store.as_deref().map(|_| "credsStore");
            let name = helpers.or(store).or(config.others.first().map(String::as_str))?;
            Some(format!("it has the field `{name}`, and any other than `auths` is refused"))
        }
        _ => None,
    }
}

/// A key that is no URL is passed over by the kubelet, but go-containerregistry fails on it
/// (`pkg/authn/kubernetes/keyring.go`, `NewFromPullSecrets`).
fn because_of(consumer: Consumer, key: &str, reading: Reading) -> Option<String> {
    if consumer == Consumer::K8schain && kubelet::slot(key).is_none() {
        return Some("its key is no URL".to_owned());
    }
    match reading {
        Reading::FailsAll(why) => Some(why.into_owned()),
        Reading::Login | Reading::Token | Reading::Nothing(_) | Reading::Fails(_) => None,
    }
}
