//! Answer of a provider.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use http::StatusCode;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::{codes, xml::Xml};
use crate::domain::{
    account::{Password, Username},
    mint::{MintError, MintReason, Minted, Validity, schedule},
};

/// Answer of a provider, with a bounded body.
pub(super) struct Answer {
    /// Name of the provider in texts.
    pub(super) label: &'static str,
    pub(super) status: StatusCode,
    /// Time at the provider, if the answer states it.
    pub(super) date: Option<DateTime<Utc>>,
    pub(super) retry_after: Option<Duration>,
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// Parses the JSON of a successful answer.
    ///
    /// # Errors
    ///
    /// The refusal of another answer, or [`MintReason::BadAnswer`].
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, MintError> {
        if !self.status.is_success() {
            return Err(self.refusal(&self.codes()));
        }
        serde_json::from_slice(&self.body).map_err(|_| self.malformed("lacks a member, or is not JSON"))
    }

    /// Returns the text of a successful answer.
    ///
    /// # Errors
    ///
    /// As [`json`](Self::json).
    pub(super) fn text(&self) -> Result<&str, MintError> {
        if !self.status.is_success() {
            return Err(self.refusal(&self.codes()));
        }
        std::str::from_utf8(&self.body).map_err(|_| self.malformed("is not text"))
    }

    /// Describes an answer that is not a success.
    fn refusal(&self, codes: &[String]) -> MintError {
        MintError { retry_after: self.retry_after, ..codes::refusal(self.label, self.status, codes) }
    }

    /// Error for a refusal that ends by itself.
    pub(super) fn unavailable(&self) -> MintError {
        let detail = format!("{} answered {}", self.label, self.status.as_u16());
        MintError { retry_after: self.retry_after, ..MintError::new(MintReason::Unreachable, detail) }
    }

    /// Error for an answer that is not one of this provider. `defect` continues the words "the answer".
    pub(super) fn malformed(&self, defect: &str) -> MintError {
        MintError::new(MintReason::BadAnswer, format!("the answer of {} {defect}", self.label))
    }

    /// Error codes in a body, the most specific one first: Azure's numbers, AWS's `__type`, OAuth's
    /// `error`, Google's `error.status`, and those of the distribution specification; or AWS's XML.
    fn codes(&self) -> Vec<String> {
        let Ok(body) = serde_json::from_slice::<Value>(&self.body) else {
            let text = std::str::from_utf8(&self.body).unwrap_or_default();
            let code = Xml::parse(text).and_then(|xml| xml.text("Error", "Code").map(str::to_owned));
            return code.into_iter().collect();
        };
        let numbers = body["error_codes"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        let texts = [&body["__type"], &body["error"], &body["error"]["status"], &body["errors"][0]["code"]];
        let texts = texts.into_iter().filter_map(Value::as_str);
        let texts = texts.map(|code| code.rsplit('#').next().unwrap_or_default().to_owned());
        numbers.map(|number| format!("AADSTS{number}")).chain(texts).collect()
    }

    /// Builds a login that ends at a time of the provider's clock.
    ///
    /// # Errors
    ///
    /// [`MintReason::BadAnswer`] if the answer states no time, so that the lifetime is unknown, or if
    /// user name or password cannot be used; [`MintReason::ExpiredOnArrival`] or
    /// [`MintReason::TooShortLived`].
    pub(super) fn login_until(
        &self,
        username: &str,
        password: SecretString,
        until: DateTime<Utc>,
    ) -> Result<Minted, MintError> {
        let date = self.date.ok_or_else(|| self.malformed("has no header `Date`, so its lifetime is unknown"))?;
        self.login_for(username, password, until - date)
    }

    /// Builds a login that ends after a time.
    ///
    /// # Errors
    ///
    /// As [`login_until`](Self::login_until).
    pub(super) fn login_for(
        &self,
        username: &str,
        password: SecretString,
        remaining: TimeDelta,
    ) -> Result<Minted, MintError> {
        let username = Username::parse(username).map_err(|_| self.malformed("has an unusable user name"))?;
        let password = Password::parse(password).map_err(|_| self.malformed("has an unusable password"))?;
        let lifetime = schedule::check_lifetime(remaining)?;
        Ok(Minted { username, password, validity: Validity { lifetime, received_at: Instant::now() } })
    }
}

/// Access token of a token service (RFC 6749, section 5.1).
#[derive(Deserialize)]
pub(super) struct TokenAnswer {
    pub(super) access_token: SecretString,
    #[serde(default)]
    expires_in: Option<Seconds>,
}

impl TokenAnswer {
    /// Lifetime of the token, if it is stated.
    pub(super) fn lifetime(&self) -> Option<TimeDelta> {
        self.expires_in.as_ref().and_then(Seconds::delta)
    }
}

/// Number of seconds, as a number or as text.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Seconds {
    Number(f64),
    Text(String),
}

impl Seconds {
    /// The seconds as a duration; `None` if they are not a number.
    pub(super) fn delta(&self) -> Option<TimeDelta> {
        let seconds = match self {
            Self::Number(seconds) => *seconds,
            Self::Text(text) => text.parse().ok()?,
        };
        delta(seconds)
    }
}

/// Converts seconds. Values beyond the range become its ends.
pub(super) fn delta(seconds: f64) -> Option<TimeDelta> {
    const MAX: f64 = 1e12;
    #[expect(clippy::cast_possible_truncation, reason = "the value is within the range")]
    let milliseconds = (seconds.clamp(-MAX, MAX) * 1_000.0) as i64;
    if seconds.is_nan() { None } else { TimeDelta::try_milliseconds(milliseconds) }
}

/// Converts a Unix time.
pub(super) fn unix_time(seconds: f64) -> Option<DateTime<Utc>> {
    DateTime::UNIX_EPOCH.checked_add_signed(delta(seconds)?)
}

/// Reads `exp` of a JWT without verifying it: the value schedules the next mint, and proves nothing.
pub(super) fn jwt_expiry(jwt: &SecretString) -> Option<DateTime<Utc>> {
    use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
    #[derive(Deserialize)]
    struct Claims {
        exp: f64,
    }
    let claims = jwt.expose_secret().split('.').nth(1)?;
    let claims = BASE64_URL_SAFE_NO_PAD.decode(claims.trim_end_matches('=')).ok()?;
    unix_time(serde_json::from_slice::<Claims>(&claims).ok()?.exp)
}
