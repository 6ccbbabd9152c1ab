//! Takes apart a docker config that somebody has, in whatever form.
//!
//! Nothing is judged here: what a field means to which reader is said in [`super::reading`], what becomes of it in
//! [`super::import`]. No error ever repeats the input.

mod entry;
mod error;
mod form;
mod node;

use std::fmt;

pub use self::{
    entry::{Entry, Field},
    error::{ParseError, Position},
    form::Form,
};
use self::{
    error::shape,
    node::{Map, Node},
};

/// Longer input is refused unread. A Secret holds no more than this (`pkg/apis/core/types.go`, `MaxSecretSize`).
pub const MAX_INPUT: usize = 1024 * 1024;

/// A docker config, taken apart.
pub struct Config {
    /// Whether it has `auths`, or is the bare map of old.
    pub form: Form,
    /// The entries, in the document's order.
    pub entries: Vec<Entry>,
    /// `credHelpers`: the registries that have a helper program of their own.
    pub helpers: Vec<Helper>,
    /// `credsStore`: the helper program for all other registries.
    pub store: Option<String>,
    /// Names of the other fields beside `auths`.
    pub others: Vec<String>,
    /// The type of the Secret that it came in, if it came in a manifest that says so.
    pub secret_type: Option<String>,
}

/// One line of `credHelpers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Helper {
    /// The registry.
    pub registry: String,
    /// The program is `docker-credential-` and this.
    pub name: String,
}

impl Config {
    /// Reads `~/.docker/config.json`, a legacy `.dockercfg`, the base64 value of a Secret with either of them, or such
    /// a Secret's manifest as JSON or YAML.
    ///
    /// # Errors
    ///
    /// [`ParseError`] with line and column, if the input is too long, nested too deeply, malformed, or none of these;
    /// also if a key stands twice in one object, where every reader would silently take the last.
    pub fn parse(input: &[u8]) -> Result<Self, ParseError> {
        form::open(input)
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
        })
    }
}

fn entries(auths: Node) -> Result<Vec<Entry>, ParseError> {
    match auths {
        Node::Null => Ok(Vec::new()),
        Node::Map(map) => map.into_iter().map(|(key, node)| Entry::new(key, node)).collect(),
        Node::Text(_) | Node::Other => Err(shape("`auths` is an object with one entry for each registry")),
    }
}

fn helpers(cred_helpers: Node) -> Result<Vec<Helper>, ParseError> {
    let refused = || shape("`credHelpers` is an object from registries to names of helper programs");
    match cred_helpers {
        Node::Null => Ok(Vec::new()),
        Node::Map(map) => map
            .into_iter()
            .map(|(registry, name)| match name {
                Node::Text(name) => Ok(Helper { registry, name: name.to_string() }),
                _ => Err(refused()),
            })
            .collect(),
        Node::Text(_) | Node::Other => Err(refused()),
    }
}

fn store(creds_store: Node) -> Result<Option<String>, ParseError> {
    match creds_store {
        Node::Null => Ok(None),
        Node::Text(name) => Ok(Some(name.to_string()).filter(|name| !name.is_empty())),
        Node::Map(_) | Node::Other => Err(shape("`credsStore` is the name of a helper program")),
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("form", &self.form).field("entries", &self.entries.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
