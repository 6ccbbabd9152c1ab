//! How the kubelet reads a pull secret (`pkg/credentialprovider/secrets/secrets.go`).

use std::collections::{BTreeSet, HashMap};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use serde::{Deserialize, Serialize, de::IgnoredAny};
use utoipa::ToSchema;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::pod::{Lookup, SecretValue};
use crate::domain::{
    docker_config::{
        Consumer, auth,
        import::redact_key,
        parse::{Config, Entry, Form, Value},
        reading::{Reading, read},
    },
    names::SecretName,
    secret::SecretType,
};

/// Maximum number of characters of a key in an answer.
const KEY_MAX: usize = 255;
/// Maximum number of entries that are read of a Secret.
const ENTRIES_MAX: usize = 500;
/// Maximum number of problems of a Secret in an answer.
const PROBLEMS_MAX: usize = 20;

/// Whether a pull secret could be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum SecretState {
    /// It exists.
    Found,
    /// It does not exist.
    Missing,
    /// The credential of the cluster may not read it.
    Forbidden,
    /// It was not read: the pod names too many.
    NotRead,
}

/// Kind of a problem of a pull secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum SecretProblemKind {
    /// Its type is not that of an image pull secret, so the kubelet ignores it.
    WrongType,
    /// Its data lacks the key that the kubelet reads.
    WrongKey,
    /// The value was encoded in base64 twice.
    DoubleBase64,
    /// A character follows the document's last brace.
    StrayCharacter,
    /// The value begins with a byte order mark, or is UTF-16.
    Encoding,
    /// The value is not JSON, or has the wrong structure.
    NotADockerConfig,
    /// The value has the form of the other type, so the kubelet finds no entry in it.
    OtherForm,
    /// A key occurs twice. The kubelet uses the last one.
    DuplicateKey,
    /// The `auth` of an entry cannot be decoded.
    InvalidAuth,
    /// A field of an entry has the wrong type.
    MalformedEntry,
    /// An entry has no login: the kubelet tries without one.
    NoLogin,
    /// The document exceeds a limit of the diagnosis.
    TooLarge,
    /// The document has no entry.
    Empty,
}

impl SecretProblemKind {
    /// Whether the kubelet fails with all pull secrets of the pod.
    const fn fails_pod(self) -> bool {
        match self {
            Self::DoubleBase64
            | Self::StrayCharacter
            | Self::Encoding
            | Self::NotADockerConfig
            | Self::InvalidAuth
            | Self::MalformedEntry => true,
            Self::WrongType
            | Self::WrongKey
            | Self::OtherForm
            | Self::DuplicateKey
            | Self::NoLogin
            | Self::TooLarge
            | Self::Empty => false,
        }
    }
}

/// Problem of a pull secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretProblem {
    /// Kind.
    #[serde(rename = "type")]
    pub kind: SecretProblemKind,
    /// Key of the entry, if the problem is of one.
    pub key: Option<String>,
    /// Explanation. It contains nothing of the Secret's value.
    pub detail: String,
}

/// Entry of a pull secret.
#[derive(Debug)]
pub(super) struct ReadEntry {
    pub(super) key: String,
    /// User and password, if the kubelet finds a user.
    pub(super) login: Option<(String, SecretString)>,
    /// Whether the kubelet tries without a login in its place.
    pub(super) is_anonymous: bool,
}

/// Pull secret as the kubelet reads it. It holds its logins.
#[derive(Debug)]
pub struct ReadSecret {
    pub(super) name: SecretName,
    pub(super) state: SecretState,
    pub(super) secret_type: Option<SecretType>,
    pub(super) pull_secret_id: Option<Uuid>,
    pub(super) resource_version: Option<String>,
    pub(super) problems: Vec<SecretProblem>,
    pub(super) entries: Vec<ReadEntry>,
    /// Keys of all entries of its document; `None` if they are unknown.
    document_keys: Option<Vec<String>>,
    /// Whether nothing but a docker config would be lost with it.
    is_plain: bool,
    /// Whether it makes every pull of the pod fail, whatever the other pull secrets contain.
    pub(super) fails_pod: bool,
    /// Whether the kubelet may find more in it than this reader does.
    pub(super) is_uncertain: bool,
}

impl ReadSecret {
    /// Reads the value of a Secret.
    #[must_use]
    pub fn of(name: SecretName, found: Lookup<SecretValue>) -> Self {
        let mut read = Self {
            name,
            state: SecretState::Found,
            secret_type: None,
            pull_secret_id: None,
            resource_version: None,
            problems: Vec::new(),
            entries: Vec::new(),
            document_keys: None,
            is_plain: false,
            fails_pod: false,
            is_uncertain: false,
        };
        match found {
            Lookup::Found(value) => read.read_value(&value),
            Lookup::Missing => read.state = SecretState::Missing,
            Lookup::Forbidden => read.state = SecretState::Forbidden,
            Lookup::NotRead => read.state = SecretState::NotRead,
        }
        if read.problems.len() > PROBLEMS_MAX {
            read.problems.sort_by_key(|problem| !problem.kind.fails_pod());
            read.problems.truncate(PROBLEMS_MAX);
        }
        read
    }

    /// Whether the credential of the cluster may not read it.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        self.state == SecretState::Forbidden
    }

    /// Name.
    #[must_use]
    pub const fn name(&self) -> &SecretName {
        &self.name
    }

    /// Whether it could be read.
    #[must_use]
    pub const fn state(&self) -> SecretState {
        self.state
    }

    /// Its type, if it is that of a pull secret.
    #[must_use]
    pub const fn secret_type(&self) -> Option<SecretType> {
        self.secret_type
    }

    /// Keys of its entries, as answers show them.
    #[must_use]
    pub fn shown_keys(&self) -> Vec<String> {
        self.entries.iter().map(|entry| shown_key(&entry.key)).collect()
    }

    /// Whether the kubelet uses all of it: each entry has a login, and nothing is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let is_found = self.state == SecretState::Found && self.problems.is_empty();
        is_found && !self.entries.is_empty() && self.entries.iter().all(|entry| entry.login.is_some())
    }

    fn read_value(&mut self, value: &SecretValue) {
        self.pull_secret_id = value.pull_secret_id;
        self.resource_version.clone_from(&value.resource_version);
        self.secret_type = value.secret_type.parse().ok();
        self.is_plain = !value.has_other_data && !value.has_owner;
        let Some(secret_type) = self.secret_type else {
            self.add(
                SecretProblemKind::WrongType,
                "its type is not kubernetes.io/dockerconfigjson, so the kubelet ignores it; the type of a Secret \
                 cannot be changed",
            );
            // What else is wrong would be wrong in the new Secret, too.
            match (&value.dockerconfigjson, &value.dockercfg) {
                (Some(document), _) => self.read_document(SecretType::DockerConfigJson, document),
                (None, Some(document)) => self.read_document(SecretType::Dockercfg, document),
                (None, None) => self.wrong_key(SecretType::DockerConfigJson),
            }
            self.entries.clear();
            (self.fails_pod, self.is_uncertain) = (false, false);
            return;
        };
        let document = match secret_type {
            SecretType::DockerConfigJson => &value.dockerconfigjson,
            SecretType::Dockercfg => &value.dockercfg,
        };
        match document {
            Some(document) => self.read_document(secret_type, document),
            None => self.wrong_key(secret_type),
        }
    }

    fn wrong_key(&mut self, secret_type: SecretType) {
        let detail = format!("its data has no `{}`, the only key that the kubelet reads", secret_type.data_key());
        self.add(SecretProblemKind::WrongKey, &detail);
    }

    fn read_document(&mut self, secret_type: SecretType, document: &SecretSlice<u8>) {
        let form = match secret_type {
            SecretType::DockerConfigJson => Form::DockerConfigJson,
            SecretType::Dockercfg => Form::Dockercfg,
        };
        let document = document.expose_secret();
        match Config::parse_value(form, document) {
            Ok(value) => self.read_config(&value, document),
            Err(error) if error.is_limit() => {
                self.is_uncertain = true;
                self.add(SecretProblemKind::TooLarge, &error.to_string());
            }
            Err(error) => {
                let kind = kind_of_refused(document);
                self.fails_pod = true;
                let has_no_login = kind == SecretProblemKind::NotADockerConfig && is_foreign(document);
                let repaired = repaired(kind, document).as_ref().map(keys_of);
                self.document_keys = repaired.or(has_no_login.then(Vec::new));
                let detail = match kind {
                    SecretProblemKind::DoubleBase64 => {
                        "the value is base64 of base64: encode it once, or give it as `stringData`".to_owned()
                    }
                    _ => error.to_string(),
                };
                self.add(kind, &detail);
            }
        }
    }

    fn read_config(&mut self, value: &Value, document: &[u8]) {
        let config = &value.config;
        self.document_keys = Some(keys_of(config));
        if let Some(other) = other_form(config, document) {
            self.document_keys = Some(keys_of(&other));
            self.add(
                SecretProblemKind::OtherForm,
                "the document has the form of the other type: the type kubernetes.io/dockerconfigjson needs `auths` \
                 around the entries, the legacy type kubernetes.io/dockercfg has none",
            );
            return;
        }
        if config.entries.is_empty() {
            self.add(SecretProblemKind::Empty, "the document has no entry");
        }
        if value.has_repeated_keys {
            self.add(
                SecretProblemKind::DuplicateKey,
                "a key occurs twice, of which the kubelet uses the last: delete one",
            );
        }
        let last: HashMap<&str, usize> =
            config.entries.iter().enumerate().map(|(index, entry)| (entry.key.as_str(), index)).collect();
        for (index, entry) in config.entries.iter().enumerate() {
            self.read_entry(entry, last.get(entry.key.as_str()) == Some(&index));
        }
        if self.entries.len() > ENTRIES_MAX {
            self.entries.truncate(ENTRIES_MAX);
            self.is_uncertain = true;
            self.add(SecretProblemKind::TooLarge, "it has more than 500 entries, of which the first are examined");
        }
    }

    /// Reads an entry. One that a later one replaces can only fail.
    fn read_entry(&mut self, entry: &Entry, is_last: bool) {
        let (kind, detail) = match read(Consumer::Kubernetes, entry) {
            Reading::FailsAll(detail) => {
                self.fails_pod = true;
                let is_auth = !entry.is_malformed && !entry.auth.text().is_empty();
                let kind = if is_auth { SecretProblemKind::InvalidAuth } else { SecretProblemKind::MalformedEntry };
                (kind, format!("{detail}; the kubelet then fails with all pull secrets of the pod"))
            }
            _ if !is_last => return,
            Reading::Login | Reading::Token => {
                let login = login(entry);
                // The runtime takes a login without a user for none.
                let is_anonymous = login.as_ref().is_some_and(|(user, _)| user.is_empty());
                let login = login.filter(|_| !is_anonymous);
                self.entries.push(ReadEntry { key: entry.key.clone(), login, is_anonymous });
                if !is_anonymous {
                    return;
                }
                (SecretProblemKind::NoLogin, "it has no user, so the image is pulled without a login".to_owned())
            }
            Reading::Nothing(detail) | Reading::Fails(detail) => {
                self.entries.push(ReadEntry { key: entry.key.clone(), login: None, is_anonymous: true });
                (SecretProblemKind::NoLogin, detail.into_owned())
            }
        };
        self.problems.push(SecretProblem { kind, key: Some(shown_key(&entry.key)), detail });
    }

    fn add(&mut self, kind: SecretProblemKind, detail: &str) {
        self.problems.push(SecretProblem { kind, key: None, detail: detail.to_owned() });
    }

    /// Whether the kubelet cannot use it, or uses less of it than it seems to contain.
    pub(super) fn is_unreadable(&self) -> bool {
        let has_effect = |kind| !matches!(kind, SecretProblemKind::DuplicateKey | SecretProblemKind::TooLarge);
        self.state == SecretState::Found && self.problems.iter().any(|problem| has_effect(problem.kind))
    }

    /// Whether all of it is known, and the kubelet can use it.
    pub(super) fn is_good(&self) -> bool {
        self.state == SecretState::Found && !self.is_unreadable() && !self.is_uncertain
    }

    /// Whether the kubelet may find in it what the diagnosis does not know.
    pub(super) fn is_unknown(&self) -> bool {
        self.is_uncertain || matches!(self.state, SecretState::Forbidden | SecretState::NotRead)
    }

    /// The problem that makes every pull of the pod fail.
    pub(super) fn failure(&self) -> Option<&SecretProblem> {
        self.problems.iter().find(|problem| problem.kind.fails_pod())
    }

    /// Whether nothing else is lost with it: it has a docker config with one entry at most, no other
    /// data and no owner.
    pub(super) fn is_replaceable(&self) -> bool {
        let has_one_entry = self.document_keys.as_ref().is_some_and(|keys| keys.len() <= 1);
        self.is_plain && has_one_entry && self.pull_secret_id.is_none()
    }

    /// Key of its only entry, if a command line may show it.
    pub(super) fn only_key(&self) -> Option<&str> {
        let [key] = self.document_keys.as_deref()? else { return None };
        Some(key).filter(|key| shown_key(key) == **key && !key.contains('…')).map(String::as_str)
    }

    pub(super) fn keys(&self) -> Vec<&str> {
        self.entries.iter().map(|entry| entry.key.as_str()).collect()
    }
}

/// Returns the document in the form of the other type, if it has that. Its entries are then
/// invisible to the kubelet.
fn other_form(config: &Config, document: &[u8]) -> Option<Config> {
    let is_other = match config.form {
        Form::DockerConfigJson => config.entries.is_empty() && !config.others.is_empty(),
        Form::Dockercfg => config.entries.iter().any(|entry| entry.key == "auths"),
    };
    let parsed = is_other.then(|| Config::parse(document))?.ok()?;
    (parsed.form != config.form).then_some(parsed)
}

fn keys_of(config: &Config) -> Vec<String> {
    let keys: BTreeSet<&str> = config.entries.iter().map(|entry| entry.key.as_str()).collect();
    keys.into_iter().map(str::to_owned).collect()
}

/// The document without what the kubelet refuses, to tell what would be lost with it.
fn repaired(kind: SecretProblemKind, value: &[u8]) -> Option<Config> {
    match kind {
        SecretProblemKind::Encoding => Config::parse(value.strip_prefix(b"\xef\xbb\xbf")?).ok(),
        SecretProblemKind::StrayCharacter => Config::parse(value.get(..end_of_object(value)?)?).ok(),
        // It opens base64, too.
        SecretProblemKind::DoubleBase64 => Config::parse(value).ok(),
        _ => None,
    }
}

/// Whether a value is no damaged docker config, so that no login is lost with it: it has neither a brace
/// nor the word `auth`, and does not begin as the base64 of a brace.
fn is_foreign(value: &[u8]) -> bool {
    let names_auth = value.windows(4).any(|word| word.eq_ignore_ascii_case(b"auth"));
    !names_auth && !value.contains(&b'{') && !value.trim_ascii_start().starts_with(b"e")
}

/// Length of the JSON object that a value begins with.
fn end_of_object(value: &[u8]) -> Option<usize> {
    let mut values = serde_json::Deserializer::from_slice(value).into_iter::<IgnoredAny>();
    let is_object = value.trim_ascii_start().starts_with(b"{");
    (matches!(values.next(), Some(Ok(_))) && is_object).then(|| values.byte_offset())
}

/// Says why a value is refused, by the value itself.
fn kind_of_refused(value: &[u8]) -> SecretProblemKind {
    if value.starts_with(b"\xef\xbb\xbf") || std::str::from_utf8(value).is_err() {
        return SecretProblemKind::Encoding;
    }
    let Some(end) = end_of_object(value) else {
        return double_base64(value).unwrap_or(SecretProblemKind::NotADockerConfig);
    };
    let rest = value.get(end..).unwrap_or_default();
    if rest.trim_ascii().is_empty() { SecretProblemKind::NotADockerConfig } else { SecretProblemKind::StrayCharacter }
}

fn double_base64(value: &[u8]) -> Option<SecretProblemKind> {
    let packed: Zeroizing<Vec<u8>> =
        Zeroizing::new(value.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect());
    let decoded = BASE64_STANDARD.decode(&*packed).map(Zeroizing::new).ok()?;
    decoded.trim_ascii_start().starts_with(b"{").then_some(SecretProblemKind::DoubleBase64)
}

/// User and password as the kubelet reads them. `auth` takes precedence.
fn login(entry: &Entry) -> Option<(String, SecretString)> {
    let text = entry.auth.text();
    if text.is_empty() {
        return Some((entry.username.text().to_owned(), entry.password.text().into()));
    }
    let login = auth::decode_leniently(text).ok()?;
    let password = std::str::from_utf8(&login.password).ok()?;
    Some((std::str::from_utf8(&login.username).ok()?.to_owned(), password.into()))
}

/// Key as answers show it: without a user, and nothing that no key of a registry contains.
pub(super) fn shown_key(key: &str) -> String {
    let key = redact_key(key);
    let is_usual = |c: char| c.is_ascii_alphanumeric() || ".:/_-*[]@…".contains(c);
    if key.len() <= KEY_MAX && key.chars().all(is_usual) { key.into_owned() } else { "…".to_owned() }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn value(secret_type: &str, json: Option<&[u8]>, cfg: Option<&[u8]>) -> SecretValue {
        let slice = |bytes: &[u8]| SecretSlice::from(bytes.to_vec());
        SecretValue {
            secret_type: secret_type.to_owned(),
            dockerconfigjson: json.map(slice),
            dockercfg: cfg.map(slice),
            has_other_data: false,
            has_owner: false,
            pull_secret_id: None,
            resource_version: None,
        }
    }

    fn read_secret(value: SecretValue) -> ReadSecret {
        ReadSecret::of(SecretName::parse("pull").unwrap(), Lookup::Found(value))
    }

    const JSON: &str = "kubernetes.io/dockerconfigjson";
    const CFG: &str = "kubernetes.io/dockercfg";

    #[rstest]
    #[case::good(r#"{"auths":{"reg.io":{"auth":"dTpw"}}}"#, &[], false)]
    #[case::crlf("{\"auths\":\r\n{\"reg.io\":{\"auth\":\"dTpw\"}}}\r\n", &[], false)]
    #[case::stray(r#"{"auths":{"reg.io":{"auth":"dTpw"}}}#"#, &[SecretProblemKind::StrayCharacter], true)]
    #[case::twice("eyJhdXRocyI6e319", &[SecretProblemKind::DoubleBase64], true)]
    #[case::cut(r#"{"auths":{"#, &[SecretProblemKind::NotADockerConfig], true)]
    #[case::list("[]", &[SecretProblemKind::NotADockerConfig], true)]
    #[case::structure(r#"{"auths":"x"}"#, &[SecretProblemKind::NotADockerConfig], true)]
    #[case::bom("\u{feff}{}", &[SecretProblemKind::Encoding], true)]
    #[case::legacy(r#"{"reg.io":{"auth":"dTpw"}}"#, &[SecretProblemKind::OtherForm], false)]
    #[case::empty("{}", &[SecretProblemKind::Empty], false)]
    #[case::auth(r#"{"auths":{"reg.io":{"auth":"!"}}}"#, &[SecretProblemKind::InvalidAuth], true)]
    #[case::colon(r#"{"auths":{"reg.io":{"auth":"dXA="}}}"#, &[SecretProblemKind::InvalidAuth], true)]
    #[case::helpers(r#"{"auths":{"reg.io":{"auth":"dTpw"}},"credHelpers":[],"credsStore":7}"#, &[], false)]
    #[case::headers(r#"{"auths":{},"HttpHeaders":{"a":1}}"#, &[SecretProblemKind::NotADockerConfig], true)]
    #[case::cases(r#"{"auths":{"a.io":{"auth":"dTpw"}},"Auths":{"b.io":{"Auth":"dTpw","AUTH":"dTpx"}}}"#, &[], false)]
    #[case::replaced_but_broken(
        r#"{"auths":{"reg.io":{"auth":"!"},"reg.io":{"auth":"dTpx"}}}"#,
        &[SecretProblemKind::DuplicateKey, SecretProblemKind::InvalidAuth],
        true
    )]
    #[case::number(r#"{"auths":{"reg.io":{"username":7}}}"#, &[SecretProblemKind::MalformedEntry], true)]
    #[case::token(r#"{"auths":{"reg.io":{"identitytoken":"x"}}}"#, &[SecretProblemKind::NoLogin], false)]
    #[case::doubled(
        r#"{"auths":{"reg.io":{"auth":"dTpw"},"reg.io":{"auth":"dTpx"}}}"#,
        &[SecretProblemKind::DuplicateKey],
        false
    )]
    fn value_is_read_as_by_the_kubelet(
        #[case] text: &str,
        #[case] problems: &[SecretProblemKind],
        #[case] fails_pod: bool,
    ) {
        let read = read_secret(value(JSON, Some(text.as_bytes()), None));
        let found: Vec<_> = read.problems.iter().map(|problem| problem.kind).collect();
        assert_eq!((found.as_slice(), read.fails_pod), (problems, fails_pod), "{:?}", read.problems);
    }

    #[test]
    fn legacy_type_has_no_auths() {
        let good = read_secret(value(CFG, None, Some(br#"{"reg.io":{"username":"u","password":"p"}}"#)));
        assert_eq!((good.keys(), good.problems.len()), (vec!["reg.io"], 0));
        let wrapped = read_secret(value(CFG, None, Some(br#"{"auths":{"reg.io":{"auth":"dTpw"}}}"#)));
        assert_eq!(wrapped.problems[0].kind, SecretProblemKind::OtherForm);
        assert!(wrapped.keys().is_empty());
    }

    #[test]
    fn secret_of_another_type_is_ignored_and_its_value_explained() {
        let stray = read_secret(value("Opaque", Some(br#"{"auths":{}}#"#), None));
        let kinds: Vec<_> = stray.problems.iter().map(|problem| problem.kind).collect();
        assert_eq!(kinds, [SecretProblemKind::WrongType, SecretProblemKind::StrayCharacter]);
        assert!(!stray.fails_pod);
        let other = read_secret(value("Opaque", None, None));
        assert_eq!(other.problems[1].kind, SecretProblemKind::WrongKey);
        let good = read_secret(value("Opaque", Some(br#"{"auths":{"reg.io":{"auth":"dTpw"}}}"#), None));
        assert_eq!((good.problems.len(), good.keys().len()), (1, 0));
    }

    #[rstest]
    #[case::text("letmein", true)]
    #[case::empty("", true)]
    #[case::list("[]", true)]
    #[case::cut(r#"{"auths":{"reg.io":"#, false)]
    #[case::yaml("Auths:\n  reg.io: x\n", false)]
    #[case::cut_base64("eyJhdXRocyI6e", false)]
    fn value_that_is_no_docker_config_is_replaceable(#[case] text: &str, #[case] expected: bool) {
        for secret_type in ["Opaque", JSON] {
            let read = read_secret(value(secret_type, Some(text.as_bytes()), None));
            assert_eq!((read.is_replaceable(), read.only_key()), (expected, None), "{secret_type}");
        }
        let owned = SecretValue { has_owner: true, ..value("Opaque", Some(text.as_bytes()), None) };
        assert!(!read_secret(owned).is_replaceable());
    }

    #[test]
    fn explanations_contain_nothing_of_the_value() {
        for text in [
            r#"{"auths":{"CANARY\n":{"auth":"CANARY!"}}}"#,
            r#"{"auths":{"u:CANARY@reg.io":{"username":"CANARY","password":"CANARY","auth":["CANARY"]}}}"#,
            r#"{"auths":"CANARY"}"#,
            "CANARY",
        ] {
            let read = read_secret(value(JSON, Some(text.as_bytes()), None));
            let shown = format!("{:?} {:?}", read.problems, value(JSON, Some(text.as_bytes()), None));
            assert!(!shown.contains("CANARY"), "{shown}");
            assert!(!read.problems.is_empty());
        }
    }
}
