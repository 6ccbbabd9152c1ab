//! Manifests of Secrets: parsing, and the round trip of a written one.

#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use regcred::domain::{
    docker_config::parse::{Config, Form},
    names::{Labels, NamespaceName, SecretName},
    secret::{SecretContent, SecretManifest, SecretType},
};
use regcred_fuzz::{first_line, limited, logins::found};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

fuzz_target!(|input: &[u8]| limited(|| {
    let _ = Config::parse(input);
    let _ = Config::parse(&[&b"kind: Secret\ndata:\n  "[..], input].concat());
    let (first, document) = first_line(input);
    if let (Ok(first), Ok(document)) = (str::from_utf8(first), str::from_utf8(document)) {
        write_and_parse(first, document);
    }
}));

/// Writes a Secret with this document. The first line has its name, namespace and labels, separated
/// by spaces.
fn write_and_parse(first: &str, document: &str) {
    let mut words = first.split(' ');
    let Ok(name) = SecretName::parse(words.next().unwrap_or_default()) else { return };
    let namespace = words.next().and_then(|namespace| NamespaceName::parse(namespace).ok());
    let pairs: BTreeMap<String, String> =
        words.filter_map(|word| word.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let Ok(labels) = Labels::parse(pairs) else { return };
    let secret_type = if document.len() % 2 == 0 { SecretType::DockerConfigJson } else { SecretType::Dockercfg };
    let content = SecretContent::new(secret_type, &SecretString::from(document));
    let manifest = SecretManifest {
        name: &name,
        namespace: namespace.as_ref(),
        labels: labels.as_map(),
        annotations: labels.as_map(),
        resource_version: None,
        content: &content,
    };
    let (json, yaml) = (manifest.to_json().expect("JSON"), manifest.to_yaml().expect("YAML"));
    let of_json: Value = serde_json::from_str(json.expose_secret()).expect("JSON");
    let of_yaml: Value = serde_saphyr::from_str(yaml.expose_secret()).expect("YAML");
    assert_eq!(of_json, of_yaml, "{}", yaml.expose_secret());

    let bare = Config::parse(document.as_bytes());
    for manifest in [json, yaml] {
        let parsed = Config::parse(manifest.expose_secret().as_bytes());
        if let (Ok(bare), true) = (&bare, document.trim_start().starts_with('{'))
            && bare.secret_type.is_none()
            && (bare.form == Form::DockerConfigJson) == (secret_type == SecretType::DockerConfigJson)
        {
            let parsed = parsed.expect("a manifest around a docker config");
            assert_eq!(parsed.secret_type.as_deref(), Some(secret_type.as_str()));
            assert_eq!(found(&parsed).len(), found(bare).len());
        }
    }
}
