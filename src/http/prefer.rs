//! `Prefer: wait=N` (RFC 7240): a response that waits until the work is done.

use std::{
    future::{Ready, ready},
    time::Duration,
};

use actix_web::{FromRequest, HttpRequest, HttpResponseBuilder, dev::Payload};

use crate::http::problem::ApiError;

/// Maximum wait in seconds. Proxies often cut off longer requests.
const WAIT_MAX: u64 = 60;

/// Time that the client prefers to wait. Unknown preferences are ignored, as the RFC requires.
pub struct PreferWait(pub Option<Duration>);

impl PreferWait {
    /// Confirms the applied preference in a response.
    pub fn confirm(&self, response: &mut HttpResponseBuilder) {
        if let Some(wait) = self.0 {
            response.insert_header(("preference-applied", format!("wait={}", wait.as_secs())));
        }
    }
}

impl FromRequest for PreferWait {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let values = request.headers().get_all("prefer").filter_map(|value| value.to_str().ok());
        ready(Ok(Self(values.flat_map(|value| value.split(',')).find_map(wait))))
    }
}

fn wait(preference: &str) -> Option<Duration> {
    let (name, value) = preference.split(';').next()?.split_once('=')?;
    if !name.trim().eq_ignore_ascii_case("wait") {
        return None;
    }
    let seconds: u64 = value.trim().trim_matches('"').parse().ok()?;
    Some(Duration::from_secs(seconds.min(WAIT_MAX)))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("wait=30", Some(30))]
    #[case(" Wait = \"5\" ; x=y", Some(5))]
    #[case("wait=86400", Some(60))]
    #[case("respond-async", None)]
    #[case("wait", None)]
    #[case("wait=soon", None)]
    #[case("wait=-1", None)]
    fn a_wait_is_parsed_and_bounded(#[case] preference: &str, #[case] seconds: Option<u64>) {
        assert_eq!(wait(preference), seconds.map(Duration::from_secs));
    }
}
