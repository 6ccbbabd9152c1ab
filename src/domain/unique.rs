//! Maps that refuse duplicate keys. JSON parsers otherwise keep one of the values silently.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

/// A map that was deserialized without duplicate keys.
#[derive(Debug)]
pub struct UniqueMap<V>(pub BTreeMap<String, V>);

impl<V> Default for UniqueMap<V> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

struct UniqueVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some(key) = access.next_key::<String>()? {
            if map.contains_key(&key) {
                // serde's own wording, which `http::body` parses.
                return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
            }
            map.insert(key, access.next_value()?);
        }
        Ok(UniqueMap(map))
    }
}

/// Deserializes a map and refuses duplicate keys, for `#[serde(deserialize_with = …)]`.
///
/// # Errors
///
/// The deserializer's errors, and duplicate keys.
pub fn map<'de, D: Deserializer<'de>, V: Deserialize<'de>>(deserializer: D) -> Result<BTreeMap<String, V>, D::Error> {
    UniqueMap::deserialize(deserializer).map(|UniqueMap(map)| map)
}
