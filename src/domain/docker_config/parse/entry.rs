//! One registry's entry.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};

use super::{
    error::ParseError,
    node::{Map, Node},
};

/// One registry's entry: the fields that some reader reads, as they stand there.
pub struct Entry {
    /// The key, which names the registry.
    pub key: String,
    /// `username`.
    pub username: Field,
    /// `password`.
    pub password: Field,
    /// `email`.
    pub email: Field,
    /// `auth`: base64 of `username:password`.
    pub auth: Field,
    /// `identitytoken`: a token to be exchanged for others.
    pub identity_token: Field,
    /// `registrytoken`: a bearer token.
    pub registry_token: Field,
    /// The names of all other fields.
    pub others: Vec<String>,
    /// Whether this is no object at all.
    pub is_malformed: bool,
}

/// One field of an entry.
#[derive(Debug, Default)]
pub enum Field {
    /// It is not there.
    #[default]
    Absent,
    /// It is there, and `null`.
    Null,
    /// A text.
    Text(SecretString),
    /// Something that cannot stand there, such as a number.
    Malformed,
}

impl Field {
    /// The text; what is absent is empty to every reader.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) => text.expose_secret(),
            Self::Absent | Self::Null | Self::Malformed => "",
        }
    }

    /// Whether the field is there, with whatever value.
    #[must_use]
    pub fn is_present(&self) -> bool {
        !matches!(self, Self::Absent)
    }

    /// Whether a reader of this field fails on it.
    #[must_use]
    pub fn is_malformed(&self) -> bool {
        matches!(self, Self::Malformed)
    }
}

impl Entry {
    pub(super) fn new(key: String, node: Node) -> Result<Self, ParseError> {
        let is_malformed = matches!(node, Node::Text(_) | Node::Other);
        let mut fields = if let Node::Map(fields) = node { fields } else { Map::default() };
        Ok(Self {
            key,
            username: field(&mut fields, "username")?,
            password: field(&mut fields, "password")?,
            email: field(&mut fields, "email")?,
            auth: field(&mut fields, "auth")?,
            identity_token: field(&mut fields, "identitytoken")?,
            registry_token: field(&mut fields, "registrytoken")?,
            others: fields.into_names(),
            is_malformed,
        })
    }
}

fn field(fields: &mut Map, name: &str) -> Result<Field, ParseError> {
    if !fields.has(name) {
        return Ok(Field::Absent);
    }
    Ok(match fields.take(name)? {
        Node::Null => Field::Null,
        Node::Text(text) => Field::Text(SecretString::from(text.as_str())),
        Node::Map(_) | Node::Other => Field::Malformed,
    })
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").finish_non_exhaustive()
    }
}
