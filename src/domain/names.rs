//! Names and labels by the rules of Kubernetes, so that every stored name can be written to a
//! cluster.
//!
//! Source of the rules: `k8s.io/apimachinery/pkg/util/validation/validation.go`.

use std::collections::BTreeMap;

use crate::domain::invalid::Invalid;

const LABEL_MAX: usize = 63;
const SUBDOMAIN_MAX: usize = 253;

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $check:path) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Parses a name. The error says which rule it breaks.
            ///
            /// # Errors
            ///
            /// [`Invalid`] if it breaks a rule.
            pub fn parse(name: &str) -> Result<Self, Invalid> {
                $check(name)?;
                Ok(Self(name.to_owned()))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = Invalid;

            fn from_str(name: &str) -> Result<Self, Invalid> {
                Self::parse(name)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// Name of a regcred resource: a DNS-1123 label.
    Name, dns_label
}
name_type! {
    /// Name of a Kubernetes namespace: a DNS-1123 label.
    NamespaceName, dns_label
}
name_type! {
    /// Name of a Kubernetes Secret: a DNS-1123 subdomain, which may contain dots.
    SecretName, dns_subdomain
}

name_type! {
    /// Name of a Kubernetes `ServiceAccount`: a DNS-1123 subdomain.
    ServiceAccountName, dns_subdomain
}

name_type! {
    /// Name of a Kubernetes pod or workload: a DNS-1123 subdomain.
    PodName, dns_subdomain
}

impl ServiceAccountName {
    /// `default`, which every namespace has.
    #[must_use]
    pub fn default_account() -> Self {
        Self("default".to_owned())
    }
}

fn dns_label(label: &str) -> Result<(), Invalid> {
    if label.is_empty() {
        return Err(Invalid::new("must not be empty"));
    }
    if label.len() > LABEL_MAX {
        return Err(Invalid::new("must be at most 63 characters long"));
    }
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if !label.bytes().all(inner) || label.starts_with('-') || label.ends_with('-') {
        return Err(Invalid::new(
            "must consist of lower-case letters, digits and '-', and start and end with a letter or digit",
        ));
    }
    Ok(())
}

fn dns_subdomain(name: &str) -> Result<(), Invalid> {
    if name.len() > SUBDOMAIN_MAX {
        return Err(Invalid::new("must be at most 253 characters long"));
    }
    let refused = "must consist of lower-case letters, digits, '-' and '.', and each part between dots must \
                   start and end with a letter or digit";
    // The API server limits the length of the name, not of its parts.
    let part = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    if name.split('.').all(part) { Ok(()) } else { Err(Invalid::new(refused)) }
}

/// Labels of an account or a Secret.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// Maximum number of labels of one object.
    pub const MAX: usize = 64;

    /// Checks every key and value by the rules of Kubernetes.
    ///
    /// # Errors
    ///
    /// [`Invalid`] names the first key that breaks a rule.
    pub fn parse(labels: BTreeMap<String, String>) -> Result<Self, Invalid> {
        if labels.len() > Self::MAX {
            return Err(Invalid::new("must be at most 64 labels"));
        }
        for (key, value) in &labels {
            label_key(key).map_err(|e| Invalid::new(format!("label key {key:.80?}: {e}")))?;
            label_value(value).map_err(|e| Invalid::new(format!("label {key:.80?}: the value {e}")))?;
        }
        Ok(Self(labels))
    }

    /// The labels, ordered by key.
    #[must_use]
    pub fn as_map(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// Returns the labels.
    #[must_use]
    pub fn into_map(self) -> BTreeMap<String, String> {
        self.0
    }
}

pub(in crate::domain) fn label_key(key: &str) -> Result<(), Invalid> {
    let name = match key.split_once('/') {
        Some((prefix, name)) => {
            dns_subdomain(prefix).map_err(|e| Invalid::new(format!("the prefix {e}")))?;
            name
        }
        None => key,
    };
    if name.is_empty() {
        return Err(Invalid::new("must not be empty"));
    }
    label_value(name)
}

pub(in crate::domain) fn label_value(value: &str) -> Result<(), Invalid> {
    if value.len() > LABEL_MAX {
        return Err(Invalid::new("must be at most 63 characters long"));
    }
    let edge = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if value.bytes().all(inner) && edge(value.chars().next()) && edge(value.chars().last()) {
        Ok(())
    } else {
        Err(Invalid::new("must consist of letters, digits, '-', '_' and '.', and start and end with a letter or digit"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("a", true)]
    #[case("team-5000", true)]
    #[case("5000", true)]
    #[case("", false)]
    #[case("-a", false)]
    #[case("a-", false)]
    #[case("A", false)]
    #[case("a.b", false)]
    #[case("a_b", false)]
    #[case("ä", false)]
    #[case("a\n", false)]
    #[case("..", false)]
    fn names_are_dns_labels(#[case] name: &str, #[case] good: bool) {
        assert_eq!(Name::parse(name).is_ok(), good);
        assert_eq!(NamespaceName::parse(name).is_ok(), good);
    }

    #[rstest]
    #[case("registrykey-2.6.2", true)]
    #[case("a", true)]
    #[case("", false)]
    #[case("a..b", false)]
    #[case(".a", false)]
    #[case("a.-b", false)]
    #[case("Upper", false)]
    #[case("a/b", false)]
    #[case("a%2fb", false)]
    fn secret_names_are_dns_subdomains(#[case] name: &str, #[case] good: bool) {
        assert_eq!(SecretName::parse(name).is_ok(), good);
    }

    #[test]
    fn length_limits_are_those_of_kubernetes() {
        assert!(Name::parse(&"a".repeat(63)).is_ok());
        assert!(Name::parse(&"a".repeat(64)).is_err());
        assert!(SecretName::parse(&"a".repeat(253)).is_ok());
        assert!(SecretName::parse(&"a".repeat(254)).is_err());
    }

    #[rstest]
    #[case("team", "a", true)]
    #[case("example.com/team", "A_b.c-1", true)]
    #[case("team", "", true)]
    #[case("", "a", false)]
    #[case("example.com/", "a", false)]
    #[case("a/b/c", "a", false)]
    #[case("team", "-a", false)]
    #[case("team", "a b", false)]
    fn labels_follow_kubernetes(#[case] key: &str, #[case] value: &str, #[case] good: bool) {
        let labels = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        assert_eq!(Labels::parse(labels).is_ok(), good);
    }
}
