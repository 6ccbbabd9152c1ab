//! Parts of an input.

use std::fmt;

use super::{Config, ParseError, form};

/// A docker config of an input, or an object of a list that has none.
#[derive(Debug)]
pub enum Part {
    /// A docker config.
    Config(Config),
    /// An object without a docker config.
    NoConfig {
        /// `NAMESPACE/NAME` of the object, or its place in the list.
        source: String,
        /// Why it has none.
        reason: NoConfig,
    },
}

/// Why an object of a list has no docker config.
#[derive(Debug)]
pub enum NoConfig {
    /// It is not a Secret.
    OtherObject,
    /// It is a Secret for another purpose.
    OtherSecret,
    /// Its docker config does not parse.
    Invalid(ParseError),
}

impl Part {
    /// Parses what [`Config::parse`] does, and lists of objects (`kind: List` or `SecretList`).
    ///
    /// # Errors
    ///
    /// As [`Config::parse`]. An object of a list without a valid docker config is no error.
    pub fn parse_all(input: &[u8]) -> Result<Vec<Self>, ParseError> {
        form::open(input)
    }

    /// Returns the docker config, if the part has one.
    #[must_use]
    pub fn config(&self) -> Option<&Config> {
        match self {
            Self::Config(config) => Some(config),
            Self::NoConfig { .. } => None,
        }
    }
}

impl fmt::Display for NoConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherObject => f.write_str("it is not a Secret"),
            Self::OtherSecret => f.write_str(
                "it is not an image pull secret: its `data` has neither `.dockerconfigjson` nor `.dockercfg`",
            ),
            Self::Invalid(error) => error.fmt(f),
        }
    }
}
