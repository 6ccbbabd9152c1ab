//! Deserializers for JSON merge patches (RFC 7396), which distinguish absent fields from `null`.

use serde::{Deserialize, Deserializer};

/// Deserializes a present field, including `null`, as `Some`. Use `#[serde(default)]` for an absent
/// one.
pub fn present<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Some)
}

/// Deserializes a field that can be replaced but not removed: `null` is refused.
pub fn set<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}
