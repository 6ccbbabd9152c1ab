//! Sealed values, and the places and destinations that they are bound to.

use uuid::Uuid;

/// Follows the key id of a bound value. No key id contains a `+`.
const BOUND_SUFFIX: &str = "+bound";

/// Place of a sealed value, and where the value is sent. The ciphertext opens only there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Table of the row.
    pub table: &'static str,
    /// Column that holds the ciphertext.
    pub column: &'static str,
    /// Primary key of the row.
    pub id: Uuid,
    /// Everything that decides where the value is sent, in an order that never changes.
    pub destination: Vec<Field>,
}

/// Part of a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Field {
    /// No value.
    Absent,
    /// A value.
    Value(Vec<u8>),
    /// A value that only its SHA-256 represents.
    Long(Vec<u8>),
    /// The SHA-256 of such a value, which Postgres has computed.
    Digest([u8; 32]),
}

impl Field {
    fn of(text: Option<&str>) -> Self {
        text.map_or(Self::Absent, |text| Self::Value(text.as_bytes().to_vec()))
    }
}

/// CA certificate of a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ca<'a> {
    /// The certificate, as stored.
    Pem(&'a str),
    /// Its SHA-256.
    Digest([u8; 32]),
}

impl Ca<'_> {
    fn field(ca: Option<Self>) -> Field {
        match ca {
            None => Field::Absent,
            Some(Self::Pem(pem)) => Field::Long(pem.as_bytes().to_vec()),
            Some(Self::Digest(digest)) => Field::Digest(digest),
        }
    }
}

/// Where the password of a registry account is sent. Another path at the same registry is the same
/// destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegistryDestination<'a> {
    /// Host and port.
    pub authority: &'a str,
    /// Whether the login is verified over plain HTTP.
    pub plain_http: bool,
    /// CA that a verification trusts.
    pub ca: Option<Ca<'a>>,
}

impl RegistryDestination<'_> {
    /// Returns the fields.
    #[must_use]
    pub fn fields(&self) -> Vec<Field> {
        let plain_http = Field::Value(vec![u8::from(self.plain_http)]);
        vec![Field::of(Some(self.authority)), plain_http, Ca::field(self.ca)]
    }
}

/// Where the secret of a minted account's source is sent. The source names the provider, and the
/// login goes to the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MintDestination<'a> {
    /// The source, as stored.
    pub source: &'a str,
    /// The account's registry.
    pub registry: RegistryDestination<'a>,
}

impl MintDestination<'_> {
    /// Returns the fields.
    #[must_use]
    pub fn fields(&self) -> Vec<Field> {
        let mut fields = vec![Field::Long(self.source.as_bytes().to_vec())];
        fields.extend(self.registry.fields());
        fields
    }
}

/// Where the secret of a client for signing in is sent: the issuer names its token endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoginDestination<'a> {
    /// Issuer.
    pub issuer: &'a str,
    /// CA of the issuer's certificate.
    pub ca: Option<Ca<'a>>,
    /// Id of the client.
    pub client_id: &'a str,
}

impl LoginDestination<'_> {
    /// Returns the fields.
    #[must_use]
    pub fn fields(&self) -> Vec<Field> {
        vec![Field::of(Some(self.issuer)), Ca::field(self.ca), Field::of(Some(self.client_id))]
    }
}

/// Where the credential of a cluster is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterDestination<'a> {
    /// URL of the API server. Its scheme tells whether the connection is encrypted.
    pub server: Option<&'a str>,
    /// CA of the API server's certificate.
    pub ca: Option<Ca<'a>>,
    /// Name in the API server's certificate.
    pub tls_server_name: Option<&'a str>,
}

impl ClusterDestination<'_> {
    /// Returns the fields.
    #[must_use]
    pub fn fields(&self) -> Vec<Field> {
        vec![Field::of(self.server), Ca::field(self.ca), Field::of(self.tls_server_name)]
    }
}

/// What a ciphertext is bound to, besides its table, row and column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealForm {
    /// Nothing else. Releases up to 0.1.0 seal so, and later ones until `master-key rotate --bind`.
    Unbound,
    /// The destination.
    Bound,
}

/// Sealed value as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Id of the master key, with `+bound` behind it if the value is bound to its destination. An
    /// edit of the suffix makes the value unreadable, because the form is part of the additional
    /// data.
    pub key_id: String,
    /// Nonce (12 bytes), ciphertext and tag (16 bytes).
    pub bytes: Vec<u8>,
}

impl SealForm {
    /// Returns the stored key id of values that a master key seals in this form.
    #[must_use]
    pub fn stored_key_id(self, key: &str) -> String {
        match self {
            Self::Unbound => key.to_owned(),
            Self::Bound => format!("{key}{BOUND_SUFFIX}"),
        }
    }

    /// Splits a stored key id into the id of the master key and the form.
    #[must_use]
    pub fn split(stored_key_id: &str) -> (&str, Self) {
        match stored_key_id.strip_suffix(BOUND_SUFFIX) {
            Some(key) => (key, Self::Bound),
            None => (stored_key_id, Self::Unbound),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_key_id_splits_into_key_and_form() {
        for form in [SealForm::Unbound, SealForm::Bound] {
            assert_eq!(SealForm::split(&form.stored_key_id("k-1")), ("k-1", form));
        }
    }
}
