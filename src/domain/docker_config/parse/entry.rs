//! Entry of one registry.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};

use super::{
    error::ParseError,
    node::{Map, Node},
};

/// Entry of one registry, with the fields that any consumer reads.
pub struct Entry {
    /// Key, which names the registry.
    pub key: String,
    /// `username`.
    pub username: Field,
    /// `password`.
    pub password: Field,
    /// `email`.
    pub email: Field,
    /// `auth`: base64 of `username:password`.
    pub auth: Field,
    /// `identitytoken`: a token to exchange for access tokens.
    pub identity_token: Field,
    /// `registrytoken`: a bearer token.
    pub registry_token: Field,
    /// Names of all other fields.
    pub others: Vec<String>,
    /// Whether the entry is not an object.
    pub is_malformed: bool,
}

/// Field of an entry.
#[derive(Debug, Default)]
pub enum Field {
    /// Missing.
    #[default]
    Absent,
    /// Present and `null`.
    Null,
    /// A string.
    Text(SecretString),
    /// A value of another type, such as a number.
    Malformed,
}

impl Field {
    /// The string. Consumers treat a missing field as empty.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) => text.expose_secret(),
            Self::Absent | Self::Null | Self::Malformed => "",
        }
    }

    /// Whether the field is present, with any value.
    #[must_use]
    pub fn is_present(&self) -> bool {
        !matches!(self, Self::Absent)
    }

    /// Whether a consumer that reads this field fails.
    #[must_use]
    pub fn is_malformed(&self) -> bool {
        matches!(self, Self::Malformed)
    }
}

impl Entry {
    pub(super) fn new(key: String, node: Node) -> Result<Self, ParseError> {
        Self::read(key, node, field)
    }

    /// Entry as Go's `encoding/json` reads it: of fields with one name, the last one counts.
    pub(super) fn of_value(key: String, node: Node) -> Result<Self, ParseError> {
        Self::read(key, node, |fields, name| Ok(last_field(fields, name)))
    }

    fn read(
        key: String,
        node: Node,
        field: impl Fn(&mut Map, &str) -> Result<Field, ParseError>,
    ) -> Result<Self, ParseError> {
        let is_malformed = matches!(node, Node::Text(_) | Node::List(_) | Node::Other);
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
        Node::Map(_) | Node::List(_) | Node::Other => Field::Malformed,
    })
}

/// `null` changes nothing, and a value of another type fails, whatever follows it.
fn last_field(fields: &mut Map, name: &str) -> Field {
    let mut last = Field::Absent;
    for node in fields.take_all(name) {
        match (node, &last) {
            (Node::Null, Field::Absent) => last = Field::Null,
            (_, Field::Malformed) | (Node::Null, _) => {}
            (Node::Text(text), _) => last = Field::Text(SecretString::from(text.as_str())),
            (Node::Map(_) | Node::List(_) | Node::Other, _) => last = Field::Malformed,
        }
    }
    last
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").finish_non_exhaustive()
    }
}
