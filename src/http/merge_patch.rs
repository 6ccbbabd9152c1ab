//! Telling an absent field from `null`, as a merge patch (RFC 7396) needs it.

use serde::{Deserialize, Deserializer};

/// Reads a field that is there, `null` included, as `Some`; with `#[serde(default)]` an absent one is `None`.
///
/// # Errors
///
/// Whatever reading `T` gives.
pub fn present<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Some)
}

/// Reads a field that can be replaced but not removed: `null` is refused as a value of the wrong type.
///
/// # Errors
///
/// Whatever reading `T` gives.
pub fn set<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}
