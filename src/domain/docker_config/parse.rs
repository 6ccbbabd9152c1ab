//! Parses existing docker configs in any format.
//!
//! Parsing does not interpret fields: [`super::reading`] says how consumers read them,
//! [`super::import`] turns them into accounts. Errors never repeat the input.

mod entry;
mod error;
mod form;
mod node;
mod part;

use std::fmt;

pub use self::{
    entry::{Entry, Field},
    error::{ParseError, Position},
    form::Form,
    part::{NoConfig, Part},
};
use self::{
    error::shape,
    node::{Map, Node},
};

/// Maximum length of the input, equal to that of a Secret (`pkg/apis/core/types.go`,
/// `MaxSecretSize`).
pub const MAX_INPUT: usize = 1024 * 1024;

/// A parsed docker config.
pub struct Config {
    /// Format of the document.
    pub form: Form,
    /// Entries in document order.
    pub entries: Vec<Entry>,
    /// `credHelpers`: registries with their own helper program.
    pub helpers: Vec<Helper>,
    /// `credsStore`: helper program for all other registries.
    pub store: Option<String>,
    /// Names of the other fields.
    pub others: Vec<String>,
    /// Type of the Secret, if the document came in a manifest with a type.
    pub secret_type: Option<String>,
    /// `NAMESPACE/NAME` of the Secret, or its name, if the document came in a manifest with a name.
    pub source: Option<String>,
}

/// Value of a Secret, as the kubelet reads it.
#[derive(Debug)]
pub struct Value {
    /// The docker config. A key may occur twice; the kubelet uses the last entry.
    pub config: Config,
    /// Whether an object of the document has a key twice.
    pub has_repeated_keys: bool,
}

/// One field of `credHelpers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Helper {
    /// Registry.
    pub registry: String,
    /// Suffix of the program's name after `docker-credential-`.
    pub name: String,
}

impl Config {
    /// Parses `~/.docker/config.json`, a legacy `.dockercfg`, the base64 value of a Secret with
    /// either, or that Secret's manifest as JSON or YAML.
    ///
    /// # Errors
    ///
    /// [`ParseError`] with line and column if the input is too long, nested too deeply, malformed,
    /// or in another format. A duplicate key in an object is an error, too: consumers would
    /// silently use the last one.
    pub fn parse(input: &[u8]) -> Result<Self, ParseError> {
        let mut parts = form::open(input)?.into_iter();
        match (parts.next(), parts.next()) {
            (Some(Part::Config(config)), None) => Ok(config),
            _ => Err(shape("the manifest is a list: provide one Secret of it")),
        }
    }

    /// Parses the decoded value of a Secret, as the kubelet reads it: JSON in the form that the
    /// Secret's type says, and no other format. Only `auths` and `HttpHeaders` are interpreted
    /// (`pkg/credentialprovider/config.go`, `DockerConfigJSON`).
    ///
    /// # Errors
    ///
    /// [`ParseError`] with line and column. [`ParseError::is_limit`] tells a limit of this parser.
    pub fn parse_value(form: Form, value: &[u8]) -> Result<Value, ParseError> {
        form::open_value(form, value)
    }

    /// Go decodes all fields with one name, in any case, into one map.
    fn from_value(form: Form, mut fields: Map) -> Result<Self, ParseError> {
        let auths = match form {
            Form::DockerConfigJson => {
                fields.take_all("HttpHeaders").into_iter().try_for_each(check_headers)?;
                fields.take_all("auths")
            }
            Form::Dockercfg => vec![Node::Map(std::mem::take(&mut fields))],
        };
        let mut entries = Vec::new();
        for node in auths {
            match node {
                Node::Null => entries.clear(),
                Node::Map(map) => entries.extend(map.into_iter()),
                Node::Text(_) | Node::List(_) | Node::Other => return Err(no_object()),
            }
        }
        let entries: Result<Vec<Entry>, ParseError> =
            entries.into_iter().map(|(key, node)| Entry::of_value(key, node)).collect();
        Ok(Self {
            form,
            entries: entries?,
            helpers: Vec::new(),
            store: None,
            others: fields.into_names(),
            secret_type: None,
            source: None,
        })
    }

    /// `{"auths":{…}}`.
    fn from_config_json(mut fields: Map) -> Result<Self, ParseError> {
        Ok(Self {
            form: Form::DockerConfigJson,
            entries: entries(fields.take("auths")?)?,
            helpers: helpers(fields.take("credHelpers")?)?,
            store: store(fields.take("credsStore")?)?,
            others: fields.into_names(),
            secret_type: None,
            source: None,
        })
    }

    /// The bare map.
    fn from_dockercfg(map: Map) -> Result<Self, ParseError> {
        Ok(Self {
            form: Form::Dockercfg,
            entries: entries(Node::Map(map))?,
            helpers: Vec::new(),
            store: None,
            others: Vec::new(),
            secret_type: None,
            source: None,
        })
    }
}

fn entries(auths: Node) -> Result<Vec<Entry>, ParseError> {
    match auths {
        Node::Null => Ok(Vec::new()),
        Node::Map(map) => map.into_iter().map(|(key, node)| Entry::new(key, node)).collect(),
        Node::Text(_) | Node::List(_) | Node::Other => Err(no_object()),
    }
}

fn no_object() -> ParseError {
    shape("`auths` must be an object with one entry per registry")
}

/// The kubelet decodes the headers, although it does not use them.
fn check_headers(headers: Node) -> Result<(), ParseError> {
    let is_text = match headers {
        Node::Null => true,
        Node::Map(map) => map.into_iter().all(|(_, node)| matches!(node, Node::Text(_) | Node::Null)),
        Node::Text(_) | Node::List(_) | Node::Other => false,
    };
    if is_text { Ok(()) } else { Err(shape("`HttpHeaders` must be an object with texts")) }
}

fn helpers(cred_helpers: Node) -> Result<Vec<Helper>, ParseError> {
    let refused = || shape("`credHelpers` must be an object from registries to names of helper programs");
    match cred_helpers {
        Node::Null => Ok(Vec::new()),
        Node::Map(map) => map
            .into_iter()
            .map(|(registry, name)| match name {
                Node::Text(name) => Ok(Helper { registry, name: name.to_string() }),
                _ => Err(refused()),
            })
            .collect(),
        Node::Text(_) | Node::List(_) | Node::Other => Err(refused()),
    }
}

fn store(creds_store: Node) -> Result<Option<String>, ParseError> {
    match creds_store {
        Node::Null => Ok(None),
        Node::Text(name) => Ok(Some(name.to_string()).filter(|name| !name.is_empty())),
        Node::Map(_) | Node::List(_) | Node::Other => Err(shape("`credsStore` must be the name of a helper program")),
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("form", &self.form).field("entries", &self.entries.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
