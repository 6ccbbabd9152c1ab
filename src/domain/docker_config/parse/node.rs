//! Tree for untrusted JSON and YAML: bounded in depth, without duplicate keys, zeroed on drop.

use std::{cell::Cell, collections::HashSet, fmt};

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use zeroize::Zeroizing;

use super::error::{ParseError, Position, shape};

/// Maximum depth. A Secret's manifest, the deepest supported input, needs about ten.
const MAX_DEPTH: usize = 32;

/// Maximum number of fields of an object, which bounds the time to check entries.
const MAX_FIELDS: usize = 10_000;

/// Maximum number of items of a list. More Secrets do not fit into the input.
const MAX_ITEMS: usize = 10_000;

pub(super) const TOO_MANY: &str = "an object has more than 10000 fields";
pub(super) const TOO_LONG: &str = "a list has more than 10000 items";
pub(super) const TOO_DEEP: &str = "braces and brackets are nested too deeply";
const NEITHER: &str = "the input is neither JSON nor YAML, or is nested too deeply";
const TOO_MUCH: &str = "the YAML is nested too deeply, or its anchors expand too much";
pub(super) const TWICE: &str =
    "an object contains a key twice, and every consumer would silently use the last: delete one";

/// A value. Numbers and booleans mean nothing in a docker config and are not kept.
pub(super) enum Node {
    Null,
    Text(Zeroizing<String>),
    Map(Map),
    List(Vec<Node>),
    Other,
}

/// Fields of an object, in order.
#[derive(Default)]
pub(super) struct Map(Vec<(String, Node)>);

impl Map {
    /// Removes and returns the field with this name. Ignores case, like Go's `encoding/json`.
    pub(super) fn take(&mut self, name: &str) -> Result<Node, ParseError> {
        let mut found = self.0.extract_if(.., |(field, _)| field.eq_ignore_ascii_case(name));
        match (found.next(), found.next()) {
            (None, _) => Ok(Node::Null),
            (Some((_, node)), None) => Ok(node),
            (Some(_), Some(_)) => Err(shape(format!("the field `{name}` occurs twice, in different case"))),
        }
    }

    /// Removes and returns all fields with this name, in order. Ignores case, like Go's
    /// `encoding/json`, which decodes each of them into one field.
    pub(super) fn take_all(&mut self, name: &str) -> Vec<Node> {
        self.0.extract_if(.., |(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, node)| node).collect()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(field, _)| field.eq_ignore_ascii_case(name))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether every value is an object, as in a map from registries to entries.
    pub(super) fn holds_objects(&self) -> bool {
        self.0.iter().all(|(_, node)| matches!(node, Node::Map(_)))
    }

    /// Returns the names of the fields, truncated to 64 characters.
    pub(super) fn into_names(self) -> Vec<String> {
        let shortened = |name: String| name.chars().take(64).collect();
        self.0.into_iter().map(|(name, _)| shortened(name)).collect()
    }

    pub(super) fn into_iter(self) -> impl Iterator<Item = (String, Node)> {
        self.0.into_iter()
    }
}

/// Parses JSON.
pub(super) fn from_json(input: &str) -> Result<Node, ParseError> {
    let mut deserializer = serde_json::Deserializer::from_str(input);
    let node = Seed::refusing_repeated_keys().deserialize(&mut deserializer);
    let node = node.and_then(|node| deserializer.end().map(|()| node));
    node.map_err(|error| super::error::json(&error, input.as_bytes()))
}

/// Parses JSON, and keeps all fields with one name. Also returns whether an object has such fields.
pub(super) fn from_json_with_repeated_keys(input: &str) -> Result<(Node, bool), ParseError> {
    let is_repeated = Cell::new(false);
    let mut deserializer = serde_json::Deserializer::from_str(input);
    let node = Seed { depth: 0, is_repeated: Some(&is_repeated) }.deserialize(&mut deserializer);
    let node = node.and_then(|node| deserializer.end().map(|()| node));
    let node = node.map_err(|error| super::error::json(&error, input.as_bytes()))?;
    Ok((node, is_repeated.get()))
}

/// Parses YAML. The library's message would quote the input, so only its position and kind are
/// used.
pub(super) fn from_yaml(input: &str) -> Result<Node, ParseError> {
    let read = serde_saphyr::with_deserializer_from_str(input, |deserializer| {
        Seed::refusing_repeated_keys().deserialize(deserializer)
    });
    read.map_err(|error| ParseError {
        position: error.location().and_then(position),
        detail: yaml_detail(&error).into(),
    })
}

fn yaml_detail(error: &serde_saphyr::Error) -> &'static str {
    use serde_saphyr::Error;
    match error {
        Error::WithSnippet { error, .. } | Error::AliasError { error, .. } => yaml_detail(error),
        Error::MultipleDocuments { .. } => {
            "the input has several YAML documents: provide only the Secret, without `---`"
        }
        Error::DuplicateMappingKey { .. } => TWICE,
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => TOO_MUCH,
        Error::Message { msg, .. } => {
            [TWICE, TOO_DEEP, TOO_MANY, TOO_LONG].into_iter().find(|detail| msg.starts_with(detail)).unwrap_or(NEITHER)
        }
        _ => NEITHER,
    }
}

fn position(location: serde_saphyr::Location) -> Option<Position> {
    Some(Position { line: usize::try_from(location.line()).ok()?, column: usize::try_from(location.column()).ok()? })
}

/// Deserializer seed for a node at some depth.
#[derive(Clone, Copy)]
struct Seed<'a> {
    depth: usize,
    /// Notes that an object has a key twice; `None` refuses it.
    is_repeated: Option<&'a Cell<bool>>,
}

impl Seed<'_> {
    const fn refusing_repeated_keys() -> Self {
        Self { depth: 0, is_repeated: None }
    }

    fn deeper<E: de::Error>(self) -> Result<Self, E> {
        if self.depth == MAX_DEPTH {
            return Err(E::custom(TOO_DEEP));
        }
        Ok(Self { depth: self.depth + 1, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_str<E>(self, text: &str) -> Result<Node, E> {
        Ok(Node::Text(Zeroizing::new(text.to_owned())))
    }

    fn visit_string<E>(self, text: String) -> Result<Node, E> {
        Ok(Node::Text(Zeroizing::new(text)))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let seed = self.deeper()?;
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(seed)? {
            items.push(item);
            if items.len() > MAX_ITEMS {
                return Err(de::Error::custom(TOO_LONG));
            }
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let seed = self.deeper()?;
        let mut names = HashSet::new();
        let mut fields = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                match self.is_repeated {
                    Some(is_repeated) => is_repeated.set(true),
                    None => return Err(de::Error::custom(TWICE)),
                }
            }
            fields.push((name, map.next_value_seed(seed)?));
            if fields.len() > MAX_FIELDS {
                return Err(de::Error::custom(TOO_MANY));
            }
        }
        Ok(Node::Map(Map(fields)))
    }
}
