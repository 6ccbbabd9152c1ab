//! Detects the format of the input and unwraps the document.

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Serialize;
use utoipa::ToSchema;
use zeroize::Zeroizing;

use super::{
    Config, MAX_INPUT, NoConfig, Part, Value,
    error::{ParseError, Position, shape},
    node::{self, Map, Node},
};

/// Format of the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Form {
    /// `{"auths":{…}}`, as in `~/.docker/config.json` and Secrets of type
    /// `kubernetes.io/dockerconfigjson`.
    DockerConfigJson,
    /// The bare map, as in `.dockercfg` and Secrets of type `kubernetes.io/dockercfg`.
    Dockercfg,
}

/// Accepts base64 with or without padding. Consumers are stricter.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Parses any format. Only a list of objects has several parts.
pub(super) fn open(input: &[u8]) -> Result<Vec<Part>, ParseError> {
    let text = text(input)?;
    if !is_base64(text) {
        let node = if text.trim_start().starts_with('{') { node::from_json(text)? } else { node::from_yaml(text)? };
        return config_or_manifest(node);
    }
    let document = decode(text)?;
    let config = document_of(&document).map_err(|error| error.inside("the base64"))?;
    Ok(vec![Part::Config(config)])
}

/// Parses the decoded value of a Secret whose type has this form, as Go's `encoding/json` does.
pub(super) fn open_value(form: Form, value: &[u8]) -> Result<Value, ParseError> {
    let (node, has_repeated_keys) = node::from_json_with_repeated_keys(text(value)?)?;
    let fields = match node {
        Node::Map(fields) => fields,
        Node::Null => Map::default(),
        Node::Text(_) | Node::List(_) | Node::Other => return Err(not_a_config()),
    };
    Ok(Value { config: Config::from_value(form, fields)?, has_repeated_keys })
}

fn text(input: &[u8]) -> Result<&str, ParseError> {
    if input.len() > MAX_INPUT {
        return Err(shape("the input is longer than 1 MiB, the maximum size of a Secret"));
    }
    let text = str::from_utf8(input).map_err(|error| {
        ParseError::at(
            Position::at(input, error.valid_up_to()),
            "the input is not UTF-8: save it as UTF-8, without a byte order mark (PowerShell's `>` writes UTF-16)",
        )
    })?;
    if text.starts_with('\u{feff}') {
        return Err(ParseError::at(
            Position { line: 1, column: 1 },
            "the document starts with a byte order mark, which no consumer accepts: save the file without one",
        ));
    }
    if text.trim().is_empty() {
        return Err(shape("the input is empty"));
    }
    Ok(text)
}

/// Only base64 characters and white space. A JSON object contains braces, and a manifest colons.
fn is_base64(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte) || byte.is_ascii_whitespace())
}

fn decode(text: &str) -> Result<Zeroizing<Vec<u8>>, ParseError> {
    let mut packed = Zeroizing::new(text.as_bytes().to_vec());
    packed.retain(|byte| !byte.is_ascii_whitespace());
    BASE64
        .decode(&*packed)
        .map(Zeroizing::new)
        .map_err(|_| shape("the base64 is invalid: check that it was copied completely"))
}

/// Parses the bare document: JSON in one of the two formats.
fn document_of(bytes: &[u8]) -> Result<Config, ParseError> {
    let text = text(bytes)?;
    match node::from_json(text)? {
        Node::Map(fields) => config(fields),
        Node::Null => config(Map::default()),
        Node::Text(_) | Node::List(_) | Node::Other => Err(not_a_config()),
    }
}

fn config_or_manifest(node: Node) -> Result<Vec<Part>, ParseError> {
    match node {
        Node::Map(fields) if fields.has("kind") || fields.has("apiVersion") => manifest(fields),
        Node::Map(fields) => Ok(vec![Part::Config(config(fields)?)]),
        Node::Null | Node::Text(_) | Node::List(_) | Node::Other => Err(not_a_config()),
    }
}

fn config(fields: Map) -> Result<Config, ParseError> {
    /// Object-valued fields of a `config.json`, which would look like entries of a bare map.
    const BESIDE_AUTHS: [&str; 9] = [
        "auths",
        "credHelpers",
        "credsStore",
        "HttpHeaders",
        "aliases",
        "features",
        "kubernetes",
        "plugins",
        "proxies",
    ];
    if !fields.is_empty() && fields.holds_objects() && !BESIDE_AUTHS.iter().any(|name| fields.has(name)) {
        Config::from_dockercfg(fields)
    } else {
        Config::from_config_json(fields)
    }
}

/// Opens a Secret, or a list of objects, as printed by `kubectl get -o json` or `-o yaml`, or
/// written for `kubectl apply`.
fn manifest(mut fields: Map) -> Result<Vec<Part>, ParseError> {
    match kind(&mut fields)?.as_deref() {
        Some("Secret") => {
            let source = source(&mut fields)?;
            let config = secret(fields, source)?.ok_or_else(|| shape(NoConfig::OtherSecret.to_string()))?;
            Ok(vec![Part::Config(config)])
        }
        Some("List") => list(fields, None),
        // The API server leaves out the kind of its items.
        Some("SecretList") => list(fields, Some("Secret")),
        _ => Err(shape("the manifest is neither a Secret nor a list of Secrets: its `kind` differs")),
    }
}

fn kind(fields: &mut Map) -> Result<Option<String>, ParseError> {
    Ok(match fields.take("kind")? {
        Node::Text(kind) => Some(kind.to_string()),
        _ => None,
    })
}

/// Opens the items of a list. One without a docker config does not invalidate the others.
fn list(mut fields: Map, default_kind: Option<&str>) -> Result<Vec<Part>, ParseError> {
    let items = match fields.take("items")? {
        Node::List(items) => items,
        Node::Null => Vec::new(),
        Node::Text(_) | Node::Map(_) | Node::Other => return Err(shape("`items` of a list must be a list of objects")),
    };
    let items = items.into_iter().enumerate();
    Ok(items.map(|(index, item)| list_item(&format!("items[{index}]"), item, default_kind)).collect())
}

fn list_item(place: &str, item: Node, default_kind: Option<&str>) -> Part {
    let no_config = |source: &str, reason| Part::NoConfig { source: source.to_owned(), reason };
    let Node::Map(mut fields) = item else { return no_config(place, NoConfig::OtherObject) };
    let named = source(&mut fields).ok().flatten();
    let shown = named.clone().unwrap_or_else(|| place.to_owned());
    let kind = kind(&mut fields).ok().flatten();
    if kind.as_deref().or(default_kind) != Some("Secret") {
        return no_config(&shown, NoConfig::OtherObject);
    }
    match secret(fields, named) {
        Ok(Some(config)) => Part::Config(config),
        Ok(None) => no_config(&shown, NoConfig::OtherSecret),
        Err(error) => no_config(&shown, NoConfig::Invalid(error)),
    }
}

/// `NAMESPACE/NAME` of an object, or its name.
fn source(fields: &mut Map) -> Result<Option<String>, ParseError> {
    let Node::Map(mut metadata) = fields.take("metadata")? else { return Ok(None) };
    let mut text = |name: &str| -> Result<Option<String>, ParseError> {
        Ok(match metadata.take(name)? {
            // Longer than any name.
            Node::Text(text) => Some(text.chars().take(253).collect()),
            _ => None,
        })
    };
    let (namespace, name) = (text("namespace")?, text("name")?);
    Ok(name.map(|name| namespace.map_or_else(|| name.clone(), |namespace| format!("{namespace}/{name}"))))
}

/// Returns the docker config of a Secret, or `None` if it is no image pull secret.
fn secret(mut secret: Map, source: Option<String>) -> Result<Option<Config>, ParseError> {
    let (mut data, mut string_data) = (map(secret.take("data")?)?, map(secret.take("stringData")?)?);
    let secret_type = match secret.take("type")? {
        Node::Text(text) => Some(text.to_string()),
        _ => None,
    };
    for (name, form) in [(".dockerconfigjson", Form::DockerConfigJson), (".dockercfg", Form::Dockercfg)] {
        let place = format!("`{name}`");
        // The API server lets `stringData` override `data`.
        let document = match (string_data.take(name)?, data.take(name)?) {
            (Node::Text(plain), _) => Zeroizing::new(plain.as_bytes().to_vec()),
            (_, Node::Text(value)) => decode(&value).map_err(|error| error.inside(&place))?,
            _ => continue,
        };
        let config = document_of(&document).map_err(|error| error.inside(&place))?;
        if config.form != form && !config.entries.is_empty() {
            return Err(shape(format!(
                "{place} holds the format of the other Secret type: no consumer finds an entry in it"
            )));
        }
        return Ok(Some(Config { form, secret_type, source, ..config }));
    }
    Ok(None)
}

fn map(node: Node) -> Result<Map, ParseError> {
    match node {
        Node::Map(map) => Ok(map),
        Node::Null => Ok(Map::default()),
        Node::Text(_) | Node::List(_) | Node::Other => {
            Err(shape("`data` and `stringData` of a Secret must be objects"))
        }
    }
}

fn not_a_config() -> ParseError {
    shape("not a docker config: provide an object with `auths`, its base64, or the manifest of a Secret")
}
