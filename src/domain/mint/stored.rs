//! Source as it is stored.

use serde_json::{Value, value::RawValue};

use super::Source;
use crate::domain::{
    cluster::ServiceAccountRef,
    invalid::Invalid,
    names::{NamespaceName, ServiceAccountName},
};

/// Source as it is stored, without its secret.
///
/// Another release may have stored it, with fields or values that this one does not know or no longer
/// accepts. So its account stays readable; only a mint validates it.
#[derive(Debug, Clone)]
pub struct StoredSource(Box<RawValue>);

impl PartialEq for StoredSource {
    fn eq(&self, other: &Self) -> bool {
        self.as_text() == other.as_text()
    }
}

impl Eq for StoredSource {}

impl StoredSource {
    /// Reads a stored text, whatever its fields are.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the text is not JSON.
    pub fn parse(text: String) -> Result<Self, Invalid> {
        RawValue::from_string(text).map(Self).map_err(|_| Invalid::new("is not JSON"))
    }

    /// Returns the stored text, to whose bytes the secret is bound.
    #[must_use]
    pub fn as_text(&self) -> &str {
        self.0.get()
    }

    /// Returns the JSON as it is stored.
    #[must_use]
    pub const fn as_json(&self) -> &RawValue {
        &self.0
    }

    /// Returns the members of the source.
    #[must_use]
    pub fn document(&self) -> Value {
        serde_json::from_str(self.as_text()).unwrap_or_default()
    }

    /// Returns the type, for logs.
    #[must_use]
    pub fn source_type(&self) -> String {
        self.document()["type"].as_str().unwrap_or("unknown").to_owned()
    }

    /// Returns the `ServiceAccount` whose token is the identity; none if the source names none.
    #[must_use]
    pub fn service_account(&self) -> Option<ServiceAccountRef> {
        let identity = &self.document()["identity"];
        let namespace = NamespaceName::parse(identity["namespace"].as_str()?).ok()?;
        let name = ServiceAccountName::parse(identity["serviceAccount"].as_str()?).ok()?;
        Some(ServiceAccountRef { namespace, name })
    }

    /// Validates the source for a mint.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if this release does not know a field, or does not accept a value.
    pub fn validate(&self) -> Result<Source, Invalid> {
        Source::from_stored(self.as_text())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const WEB_IDENTITY: &str = r#"{"type":"azureContainerRegistry","identity":{"type":"webIdentity","cluster":"dev",
        "namespace":"regcred","serviceAccount":"pull","clientId":"c","audience":"AUDIENCE"},"tenantId":"t"}"#;

    #[rstest]
    #[case::accepted(&WEB_IDENTITY.replace("AUDIENCE", "api://AzureADTokenExchange"), true)]
    #[case::refused_audience(&WEB_IDENTITY.replace("AUDIENCE", "kubernetes"), false)]
    #[case::newer_field(&WEB_IDENTITY.replace(r#""tenantId""#, r#""newer":1,"tenantId""#), false)]
    #[case::newer_type(&WEB_IDENTITY.replace("azureContainerRegistry", "newer"), false)]
    #[case::newer_identity(&WEB_IDENTITY.replace("webIdentity", "newer"), false)]
    fn source_of_another_release_is_readable(#[case] text: &str, #[case] is_valid: bool) {
        let stored = StoredSource::parse(text.to_owned()).unwrap();
        assert_eq!((stored.as_text(), stored.validate().is_ok()), (text, is_valid));
        assert_eq!(stored.service_account().map(|account| account.to_string()).as_deref(), Some("regcred/pull"));
        assert_eq!(stored.document()["tenantId"], "t");
    }

    #[rstest]
    #[case("3")]
    #[case("[]")]
    #[case("{}")]
    #[case(r#"{"identity":{"namespace":"A/B","serviceAccount":"pull"}}"#)]
    fn source_without_a_service_account_has_none(#[case] text: &str) {
        let stored = StoredSource::parse(text.to_owned()).unwrap();
        assert_eq!((stored.service_account(), stored.source_type().as_str()), (None, "unknown"));
        assert!(stored.validate().is_err());
    }

    #[test]
    fn text_that_is_not_json_is_refused() {
        assert!(StoredSource::parse("{".to_owned()).is_err());
    }
}
