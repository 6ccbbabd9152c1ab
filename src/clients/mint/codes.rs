//! Error codes of providers, as far as they are known.
//!
//! A code is compared with this list, and only the text of the list goes on.

use http::StatusCode;

use crate::domain::mint::{MintError, MintReason};

const CODES: [(&str, MintReason); 62] = [
    // AWS: common errors, ECR and STS.
    ("AccessDenied", MintReason::Denied),
    ("AccessDeniedException", MintReason::Denied),
    ("OptInRequired", MintReason::Denied),
    ("NotAuthorized", MintReason::Denied),
    ("ExpiredToken", MintReason::InvalidIdentity),
    ("ExpiredTokenException", MintReason::InvalidIdentity),
    ("IncompleteSignature", MintReason::InvalidIdentity),
    ("InvalidAccessKeyId", MintReason::InvalidIdentity),
    ("InvalidClientTokenId", MintReason::InvalidIdentity),
    ("InvalidIdentityToken", MintReason::InvalidIdentity),
    ("InvalidSignatureException", MintReason::InvalidIdentity),
    ("MissingAuthenticationToken", MintReason::InvalidIdentity),
    ("MissingAuthenticationTokenException", MintReason::InvalidIdentity),
    ("SignatureDoesNotMatch", MintReason::InvalidIdentity),
    ("UnrecognizedClientException", MintReason::InvalidIdentity),
    ("IDPRejectedClaim", MintReason::Denied),
    ("InvalidParameterException", MintReason::Misconfigured),
    ("InvalidParameterValue", MintReason::Misconfigured),
    ("MalformedPolicyDocument", MintReason::Misconfigured),
    ("NoSuchEntity", MintReason::Misconfigured),
    ("PackedPolicyTooLarge", MintReason::Misconfigured),
    ("RegionDisabledException", MintReason::Misconfigured),
    ("ValidationError", MintReason::Misconfigured),
    ("ValidationException", MintReason::Misconfigured),
    ("RequestExpired", MintReason::ClockSkew),
    ("RequestTimeTooSkewed", MintReason::ClockSkew),
    ("RequestLimitExceeded", MintReason::Throttled),
    ("Throttling", MintReason::Throttled),
    ("ThrottlingException", MintReason::Throttled),
    ("TooManyRequestsException", MintReason::Throttled),
    ("IDPCommunicationError", MintReason::Unreachable),
    ("InternalFailure", MintReason::Unreachable),
    ("ServerException", MintReason::Unreachable),
    ("ServiceUnavailable", MintReason::Unreachable),
    // OAuth 2.0 (RFC 6749, section 5.2; RFC 8693, section 2.2.2).
    ("access_denied", MintReason::Denied),
    ("unauthorized_client", MintReason::Denied),
    ("invalid_client", MintReason::InvalidIdentity),
    ("invalid_grant", MintReason::InvalidIdentity),
    ("invalid_request", MintReason::Misconfigured),
    ("invalid_scope", MintReason::Misconfigured),
    ("invalid_target", MintReason::Misconfigured),
    ("unsupported_grant_type", MintReason::Misconfigured),
    ("slow_down", MintReason::Throttled),
    ("server_error", MintReason::Unreachable),
    ("temporarily_unavailable", MintReason::Unreachable),
    // Google (google.rpc.Code).
    ("PERMISSION_DENIED", MintReason::Denied),
    ("UNAUTHENTICATED", MintReason::InvalidIdentity),
    ("FAILED_PRECONDITION", MintReason::Misconfigured),
    ("INVALID_ARGUMENT", MintReason::Misconfigured),
    ("NOT_FOUND", MintReason::Misconfigured),
    ("RESOURCE_EXHAUSTED", MintReason::Throttled),
    ("INTERNAL", MintReason::Unreachable),
    ("UNAVAILABLE", MintReason::Unreachable),
    // Azure: secret wrong, secret expired, assertion outside of its time, no such client, no such
    // tenant, no matching federated credential (two codes), certificate not registered.
    ("AADSTS7000215", MintReason::InvalidIdentity),
    ("AADSTS7000222", MintReason::InvalidIdentity),
    ("AADSTS700024", MintReason::ClockSkew),
    ("AADSTS700016", MintReason::Misconfigured),
    ("AADSTS90002", MintReason::Misconfigured),
    ("AADSTS70021", MintReason::Denied),
    ("AADSTS700213", MintReason::Denied),
    ("AADSTS700027", MintReason::InvalidIdentity),
    ("UNAUTHORIZED", MintReason::Denied),
];

/// Describes an answer that is not a success, by its error codes, the most specific one first, else
/// by its status.
pub(super) fn refusal(label: &str, status: StatusCode, codes: &[String]) -> MintError {
    let known = codes.iter().find_map(|code| CODES.iter().find(|(known, _)| known == code));
    let reason = known.map_or_else(|| reason_of_status(status), |(_, reason)| *reason);
    let number = status.as_u16();
    let answer = match known {
        Some((code, _)) => format!("{label} answered {code} ({number})"),
        None => format!("{label} answered {number}"),
    };
    MintError::new(reason, format!("{answer}{}", remedy(reason)))
}

fn reason_of_status(status: StatusCode) -> MintReason {
    match status.as_u16() {
        401 => MintReason::InvalidIdentity,
        403 => MintReason::Denied,
        408 | 500..=599 => MintReason::Unreachable,
        429 => MintReason::Throttled,
        400..=499 => MintReason::Misconfigured,
        _ => MintReason::BadAnswer,
    }
}

const fn remedy(reason: MintReason) -> &'static str {
    match reason {
        MintReason::Denied => ": grant the identity what docs/MINTING.md lists for this source",
        MintReason::InvalidIdentity => ": check the identity, and set `source` with a valid secret",
        MintReason::Misconfigured => ": check the fields of `source`",
        MintReason::ClockSkew => ": synchronize the clock of regcred's host",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(400, &["ThrottlingException"], MintReason::Throttled, "ThrottlingException (400)")]
    #[case(401, &["AADSTS7000222", "invalid_client"], MintReason::InvalidIdentity, "AADSTS7000222 (401)")]
    #[case(401, &["AADSTS1", "invalid_client"], MintReason::InvalidIdentity, "invalid_client (401)")]
    #[case(400, &["canary"], MintReason::Misconfigured, "the API answered 400")]
    #[case(403, &["RequestTimeTooSkewed"], MintReason::ClockSkew, "RequestTimeTooSkewed (403)")]
    #[case(401, &["AADSTS700024", "invalid_client"], MintReason::ClockSkew, "AADSTS700024 (401)")]
    #[case(403, &[], MintReason::Denied, "the API answered 403")]
    #[case(429, &[], MintReason::Throttled, "the API answered 429")]
    #[case(503, &[], MintReason::Unreachable, "the API answered 503")]
    #[case(204, &[], MintReason::BadAnswer, "the API answered 204")]
    fn code_decides_before_status(
        #[case] status: u16,
        #[case] codes: &[&str],
        #[case] reason: MintReason,
        #[case] text: &str,
    ) {
        let codes: Vec<String> = codes.iter().map(|&code| code.to_owned()).collect();
        let error = refusal("the API", StatusCode::from_u16(status).unwrap(), &codes);
        assert_eq!(error.reason, reason);
        assert!(error.detail.contains(text) && !error.detail.contains("canary"), "{}", error.detail);
    }
}
