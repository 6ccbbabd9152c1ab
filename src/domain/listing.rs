//! Order, filters and positions of lists. Every list has a closed set of orders, each with an index.

use std::str::FromStr;

use chrono::{DateTime, TimeZone, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::invalid::Invalid;

/// Property that a list is ordered by. The name, or the id of an API key, decides between equal
/// values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SortKey {
    /// The unique name.
    Name,
    /// The id, which grows with the time of creation.
    Id,
    /// The name of an API key, which is not unique.
    SharedName,
    /// Time of creation.
    CreatedAt,
    /// Time of expiry. Resources that do not expire come last.
    ExpiresAt,
}

/// Order of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// Property that the list is ordered by.
    pub key: SortKey,
    /// Whether the order is reversed.
    pub descending: bool,
}

/// Orders that a list offers. The default is the first one.
pub trait Sort: Copy + Default + PartialEq + FromStr<Err = Invalid> + 'static {
    /// Name in the API.
    fn as_str(self) -> &'static str;

    /// The order.
    fn order(self) -> Order;
}

macro_rules! sorts {
    ($($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident: $text:tt = $key:ident $(, $descending:ident)?;)+ })+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, ToSchema)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $text)] $variant,)+
        }

        impl FromStr for $name {
            type Err = Invalid;

            fn from_str(text: &str) -> Result<Self, Invalid> {
                let known = [$(Self::$variant),+].into_iter().find(|sort| sort.as_str() == text);
                known.ok_or_else(|| Invalid::new(concat!("must be one of", $(" ", $text),+)))
            }
        }

        impl Sort for $name {
            fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            fn order(self) -> Order {
                match self {
                    $(Self::$variant => Order { key: SortKey::$key, descending: false $(|| sorts!(@$descending))? },)+
                }
            }
        }
    )+};
    (@descending) => { true };
}

sorts! {
    /// Orders of clusters, pull secrets and identity providers. A `-` reverses an order.
    ResourceSort {
        /// By name.
        #[default]
        Name: "name" = Name;
        /// By name, reversed.
        NameDescending: "-name" = Name, descending;
        /// Oldest first.
        CreatedAt: "createdAt" = CreatedAt;
        /// Newest first.
        CreatedAtDescending: "-createdAt" = CreatedAt, descending;
    }
    /// Orders of registry accounts. A `-` reverses an order.
    RegistryAccountSort {
        /// By name.
        #[default]
        Name: "name" = Name;
        /// By name, reversed.
        NameDescending: "-name" = Name, descending;
        /// Oldest first.
        CreatedAt: "createdAt" = CreatedAt;
        /// Newest first.
        CreatedAtDescending: "-createdAt" = CreatedAt, descending;
        /// By time of expiry. Accounts that do not expire come last.
        ExpiresAt: "expiresAt" = ExpiresAt;
    }
    /// Orders of API keys. A `-` reverses an order.
    ApiKeySort {
        /// Oldest first.
        #[default]
        CreatedAt: "createdAt" = Id;
        /// Newest first.
        CreatedAtDescending: "-createdAt" = Id, descending;
        /// By name.
        Name: "name" = SharedName;
        /// By name, reversed.
        NameDescending: "-name" = SharedName, descending;
        /// By time of expiry. Keys that do not expire come last.
        ExpiresAt: "expiresAt" = ExpiresAt;
    }
    /// Orders of targets.
    TargetSort {
        /// By pull secret, oldest first, then by namespace and cluster.
        #[default]
        PullSecret: "pullSecret" = Id;
    }
}

/// Value of a [`SortKey`] other than a unique one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SortValue {
    /// The position consists of the unique key alone.
    Unique,
    /// A name.
    Text(String),
    /// A time; `None` sorts after every time.
    Time(Option<DateTime<Utc>>),
}

/// Place in a list: that of a row, after which the next page starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// Value of the property that the list is ordered by.
    pub value: SortValue,
    /// Unique key of the row: its name, or the id of an API key.
    pub key: String,
}

/// Separates the parts of a position. No name, id or order contains it.
const SEPARATOR: char = '|';

impl Position {
    /// Position of a unique key.
    #[must_use]
    pub fn unique(key: impl Into<String>) -> Self {
        Self { value: SortValue::Unique, key: key.into() }
    }

    /// Text of the position in a list with this order. In the default order it is the unique key.
    #[must_use]
    pub fn to_text<S: Sort>(&self, sort: S) -> String {
        let key = &self.key;
        let value = match &self.value {
            SortValue::Unique if sort == S::default() => return key.clone(),
            SortValue::Unique | SortValue::Time(None) => String::new(),
            SortValue::Text(text) => text.clone(),
            SortValue::Time(Some(time)) => time.timestamp_micros().to_string(),
        };
        format!("{}{SEPARATOR}{value}{SEPARATOR}{key}", sort.as_str())
    }

    /// Parses the text of a position in a list with this order. `is_key` checks the unique key.
    /// Returns `None` for a position of another order.
    #[must_use]
    pub fn parse<S: Sort>(text: &str, sort: S, is_key: impl Fn(&str) -> bool) -> Option<Self> {
        let parts: Vec<&str> = text.split(SEPARATOR).collect();
        let (value, key) = match parts[..] {
            [key] if sort == S::default() => ("", key),
            [name, value, key] if name == sort.as_str() && sort != S::default() => (value, key),
            _ => return None,
        };
        let value = match (sort.order().key, value) {
            (SortKey::Name | SortKey::Id, "") => SortValue::Unique,
            (SortKey::Name | SortKey::Id, _) | (SortKey::CreatedAt, "") => return None,
            (SortKey::SharedName, text) => SortValue::Text(text.to_owned()),
            (SortKey::ExpiresAt, "") => SortValue::Time(None),
            (SortKey::CreatedAt | SortKey::ExpiresAt, micros) => {
                SortValue::Time(Some(Utc.timestamp_micros(micros.parse().ok()?).single()?))
            }
        };
        is_key(key).then(|| Self { value, key: key.to_owned() })
    }
}

/// A page of a list in the database.
#[derive(Debug, Clone)]
pub struct ListRequest {
    /// Order.
    pub order: Order,
    /// Position that the page starts after.
    pub after: Option<Position>,
    /// Maximum number of items.
    pub limit: usize,
}

/// Where the next page starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// After the last item of this page.
    Item(Position),
    /// After a row that is not an item of this page, and that may be hidden from the caller.
    Row(Position),
}

/// One page of a list.
#[derive(Debug)]
pub struct Listed<T> {
    /// Items, in the order of the list.
    pub items: Vec<T>,
    /// Where the next page starts; `None` on the last page.
    pub next: Option<Next>,
}

/// Part of a name, in lower case: all names are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePart(String);

impl NamePart {
    /// Longest part: that of the longest name.
    const MAX: usize = 63;

    /// Parses a part of a name, in any case.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if no name contains it.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let part = text.to_ascii_lowercase();
        let is_part = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if part.is_empty() || part.len() > Self::MAX || !part.bytes().all(is_part) {
            return Err(Invalid::new("must be part of a name: 1 to 63 letters, digits and `-`"));
        }
        Ok(Self(part))
    }

    /// The part, in lower case.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// State of an API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ApiKeyState {
    /// Neither revoked nor expired.
    Active,
    /// Expired and not revoked.
    Expired,
    /// Revoked.
    Revoked,
}

impl FromStr for ApiKeyState {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "active" => Ok(Self::Active),
            "expired" => Ok(Self::Expired),
            "revoked" => Ok(Self::Revoked),
            _ => Err(Invalid::new("must be active, expired or revoked")),
        }
    }
}

/// State of a pull secret: the worst one of its targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum PullSecretState {
    /// It is being deleted.
    Deleting,
    /// In some target, a Secret of another owner has the name.
    Conflict,
    /// The last attempt failed in some target, and no target is in conflict.
    Failed,
    /// Some target is not up to date yet, and none failed.
    Pending,
    /// All targets are up to date, or there is none.
    Synced,
}

impl PullSecretState {
    /// All states.
    pub const ALL: [Self; 5] = [Self::Deleting, Self::Conflict, Self::Failed, Self::Pending, Self::Synced];

    /// Name in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deleting => "deleting",
            Self::Conflict => "conflict",
            Self::Failed => "failed",
            Self::Pending => "pending",
            Self::Synced => "synced",
        }
    }
}

impl FromStr for PullSecretState {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let found = Self::ALL.into_iter().find(|state| state.as_str() == text);
        found.ok_or_else(|| Invalid::new("must be deleting, conflict, failed, pending or synced"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn at(micros: i64) -> SortValue {
        SortValue::Time(Utc.timestamp_micros(micros).single())
    }

    proptest! {
        #[test]
        fn a_position_survives_its_text_in_its_own_order_alone(micros in -1_000_000_000_i64..4_000_000_000_000_000, key in "[a-z]{1,63}") {
            use RegistryAccountSort as S;
            let positions = [
                (S::Name, SortValue::Unique),
                (S::NameDescending, SortValue::Unique),
                (S::CreatedAt, at(micros)),
                (S::CreatedAtDescending, at(micros)),
                (S::ExpiresAt, at(micros)),
                (S::ExpiresAt, SortValue::Time(None)),
            ];
            for (sort, value) in positions {
                let position = Position { value, key: key.clone() };
                let text = position.to_text(sort);
                for other in [S::Name, S::NameDescending, S::CreatedAt, S::CreatedAtDescending, S::ExpiresAt] {
                    let parsed = Position::parse(&text, other, |_| true);
                    prop_assert_eq!(parsed, (other == sort).then(|| position.clone()), "{} as {}", text, other.as_str());
                }
            }
        }
    }

    #[test]
    fn a_position_in_the_default_order_is_the_unique_key() {
        assert_eq!(Position::unique("team-a").to_text(ResourceSort::Name), "team-a");
        assert_eq!(Position::parse("Not a name", ResourceSort::Name, |key| key == "team-a"), None);
    }

    #[rstest]
    #[case("Team", Some("team"))]
    #[case("-a-", Some("-a-"))]
    #[case("", None)]
    #[case("a.b", None)]
    #[case("a%", None)]
    #[case("a_b", None)]
    #[case("ä", None)]
    fn a_name_part_has_the_characters_of_names(#[case] text: &str, #[case] part: Option<&str>) {
        assert_eq!(NamePart::parse(text).ok().as_ref().map(NamePart::as_str), part);
    }
}
