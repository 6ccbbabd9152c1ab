//! Answers of registries about one image.

use std::fmt;

use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::verification::{VerificationReport, VerificationResult};

/// Whether the registry has the manifest of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ManifestState {
    /// The registry delivers it.
    Found,
    /// It does not exist, or this login may not see it.
    Missing,
    /// The registry did not say.
    Unknown,
}

/// Operating system and architecture of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Platform {
    /// Operating system, such as `linux`.
    pub os: String,
    /// Architecture, such as `arm64`.
    pub architecture: String,
}

impl Platform {
    /// Parses the words of a manifest list. Other text of a registry is refused.
    #[must_use]
    pub fn parse(os: &str, architecture: &str) -> Option<Self> {
        let is_word = |word: &str| {
            (1..=16).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        // Attestations have the platform `unknown/unknown`.
        (is_word(os) && is_word(architecture) && os != "unknown")
            .then(|| Self { os: os.to_owned(), architecture: architecture.to_owned() })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

/// Answer of a registry to a pull, with one login or without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullReport {
    /// Result, in the words of a verification.
    pub result: VerificationResult,
    /// Explanation. Contains no text from the registry.
    pub detail: String,
    /// Whether the manifest was delivered.
    pub manifest: ManifestState,
    /// Platforms of a manifest list; empty if they were not requested, or there is one manifest.
    pub platforms: Vec<Platform>,
}

impl PullReport {
    /// Creates a report without platforms.
    pub fn new(result: VerificationResult, detail: impl Into<String>, manifest: ManifestState) -> Self {
        Self { result, detail: detail.into(), manifest, platforms: Vec::new() }
    }

    /// Whether the image was delivered.
    #[must_use]
    pub fn pulls(&self) -> bool {
        self.manifest == ManifestState::Found
    }
}

impl From<VerificationReport> for PullReport {
    fn from(VerificationReport { result, detail, .. }: VerificationReport) -> Self {
        Self::new(result, detail, ManifestState::Unknown)
    }
}
