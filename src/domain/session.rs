//! Sessions of the web console, and the callers that they act for.

use uuid::Uuid;

/// Caller that a session acts for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionOwner {
    /// An API key.
    ApiKey(Uuid),
    /// A person who signed in through an identity provider.
    Person(Person),
}

/// Subject of an identity provider, with the claims of its ID token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    /// Id of the provider.
    pub provider_id: Uuid,
    /// The `sub` of the ID token.
    pub subject: String,
    /// The claims, as JSON.
    pub claims: String,
}

impl SessionOwner {
    /// Parts that the HMAC of a session covers. Their number differs by kind, so that no session of
    /// one kind is one of the other.
    #[must_use]
    pub fn parts(&self) -> Vec<&[u8]> {
        match self {
            Self::ApiKey(id) => vec![id.as_bytes()],
            Self::Person(Person { provider_id, subject, claims }) => {
                vec![provider_id.as_bytes(), subject.as_bytes(), claims.as_bytes()]
            }
        }
    }

    /// Returns the id of the API key.
    #[must_use]
    pub const fn api_key_id(&self) -> Option<Uuid> {
        match self {
            Self::ApiKey(id) => Some(*id),
            Self::Person(_) => None,
        }
    }

    /// Returns the person.
    #[must_use]
    pub const fn person(&self) -> Option<&Person> {
        match self {
            Self::ApiKey(_) => None,
            Self::Person(person) => Some(person),
        }
    }
}
