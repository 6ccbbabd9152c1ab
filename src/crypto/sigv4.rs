//! AWS Signature Version 4, for requests to the path `/` without a query: every call that regcred
//! makes has this form.

use aws_lc_rs::{digest, hmac};
use chrono::{DateTime, Utc};
use secrecy::ExposeSecret;

use crate::domain::{audit::hex, mint::aws::AwsKey};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// Request to sign.
#[derive(Debug, Clone, Copy)]
pub struct AwsRequest<'a> {
    /// Method.
    pub method: &'a str,
    /// Region of the service.
    pub region: &'a str,
    /// Name of the service in signatures.
    pub service: &'a str,
    /// Headers to sign, with lower-case names. `host` must be one of them.
    pub headers: &'a [(&'a str, &'a str)],
    /// Body.
    pub body: &'a [u8],
}

/// Values of the headers that a signature adds to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsSignature {
    /// `x-amz-date`
    pub date: String,
    /// `authorization`
    pub authorization: String,
}

impl AwsRequest<'_> {
    /// Signs the request as of `now`. The caller adds the values of the signature, and the token of
    /// a temporary key as `x-amz-security-token`, which is signed too.
    #[must_use]
    pub fn sign(&self, key: &AwsKey, now: DateTime<Utc>) -> AwsSignature {
        let date = now.format("%Y%m%dT%H%M%SZ").to_string();
        let day = &date[..8];
        let token = key.session_token.as_ref().map(|token| ("x-amz-security-token", token.expose_secret()));
        let mut headers: Vec<(&str, String)> =
            self.headers.iter().copied().chain(token).map(|(name, value)| (name, canonical_value(value))).collect();
        headers.push(("x-amz-date", date.clone()));
        headers.sort();
        let signed = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let lines = headers.iter().map(|(name, value)| [*name, ":", value.as_str(), "\n"].concat());
        let lines = lines.collect::<Vec<_>>().concat();
        let request = format!("{}\n/\n\n{lines}\n{signed}\n{}", self.method, sha256(self.body));

        let scope = format!("{day}/{}/{}/aws4_request", self.region, self.service);
        let to_sign = format!("{ALGORITHM}\n{date}\n{scope}\n{}", sha256(request.as_bytes()));
        let secret = zeroize::Zeroizing::new(format!("AWS4{}", key.secret_access_key.expose_secret()));
        let signing_key = [day, self.region, self.service, "aws4_request"]
            .into_iter()
            .fold(hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), |key, part| {
                hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&key, part.as_bytes()).as_ref())
            });
        let signature = hex(hmac::sign(&signing_key, to_sign.as_bytes()).as_ref());
        let authorization = format!(
            "{ALGORITHM} Credential={}/{scope}, SignedHeaders={signed}, Signature={signature}",
            key.access_key_id
        );
        AwsSignature { date, authorization }
    }
}

/// Removes white space around a value and repeated spaces in it.
fn canonical_value(value: &str) -> String {
    value.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use aws_credential_types::Credentials;
    use aws_sigv4::{
        http_request::{SignableBody, SignableRequest, SigningSettings},
        sign::v4::SigningParams,
    };
    use chrono::TimeZone;
    use proptest::prelude::*;
    use rstest::rstest;
    use secrecy::SecretString;

    use super::*;

    const TOKEN: &str = "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA==";

    fn key(token: Option<&str>) -> AwsKey {
        AwsKey {
            access_key_id: "AKIDEXAMPLE".to_owned(),
            secret_access_key: SecretString::from("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"),
            session_token: token.map(SecretString::from),
        }
    }

    fn sign(method: &str, more: &[(&str, &str)], body: &str, token: Option<&str>) -> AwsSignature {
        let headers: Vec<(&str, &str)> =
            [("host", "example.amazonaws.com")].into_iter().chain(more.iter().copied()).collect();
        let request =
            AwsRequest { method, region: "us-east-1", service: "service", headers: &headers, body: body.as_bytes() };
        request.sign(&key(token), Utc.with_ymd_and_hms(2015, 8, 30, 12, 36, 0).unwrap())
    }

    /// The test suite that AWS publishes, as far as it concerns the path `/` without a query.
    #[rstest]
    #[case::get_vanilla("GET", &[], "", None, "host;x-amz-date",
        "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31")]
    #[case::post_vanilla("POST", &[], "", None, "host;x-amz-date",
        "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b")]
    #[case::post_header_value_case("POST", &[("my-header1", "VALUE1")], "", None, "host;my-header1;x-amz-date",
        "cdbc9802e29d2942e5e10b5bccfdd67c5f22c7c4e8ae67b53629efa58b974b7d")]
    #[case::get_header_value_trim("GET", &[("my-header1", " value1"), ("my-header2", " \"a   b   c\"")], "", None,
        "host;my-header1;my-header2;x-amz-date", "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736")]
    #[case::post_form("POST", &[("content-type", "application/x-www-form-urlencoded")], "Param1=value1", None,
        "content-type;host;x-amz-date", "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a")]
    #[case::post_sts_header_before("POST", &[], "", Some(TOKEN), "host;x-amz-date;x-amz-security-token",
        "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead")]
    fn published_vectors_are_reproduced(
        #[case] method: &str,
        #[case] headers: &[(&str, &str)],
        #[case] body: &str,
        #[case] token: Option<&str>,
        #[case] signed: &str,
        #[case] signature: &str,
    ) {
        let AwsSignature { date, authorization } = sign(method, headers, body, token);
        assert_eq!(date, "20150830T123600Z");
        let credential = "AKIDEXAMPLE/20150830/us-east-1/service/aws4_request";
        let expected =
            format!("AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={signed}, Signature={signature}");
        assert_eq!(authorization, expected);
    }

    #[test]
    fn every_part_of_a_request_is_signed() {
        let signature = sign("POST", &[("x-amz-target", "T")], "{}", None);
        for other in [
            sign("GET", &[("x-amz-target", "T")], "{}", None),
            sign("POST", &[("x-amz-target", "U")], "{}", None),
            sign("POST", &[("x-amz-target", "T")], "{ }", None),
            sign("POST", &[("x-amz-target", "T")], "{}", Some("token")),
        ] {
            assert_ne!(other, signature);
        }
    }

    /// Headers that AWS's client does not sign, or that a signature adds.
    const NOT_GIVEN: [&str; 7] = [
        "authorization",
        "host",
        "transfer-encoding",
        "user-agent",
        "x-amz-date",
        "x-amz-security-token",
        "x-amzn-trace-id",
    ];

    /// Signs a request by AWS's own implementation.
    fn sign_by_oracle(request: &AwsRequest<'_>, key: &AwsKey, now: DateTime<Utc>) -> AwsSignature {
        let (id, secret) = (&key.access_key_id, key.secret_access_key.expose_secret());
        let token = key.session_token.as_ref().map(|token| token.expose_secret().to_owned());
        let identity = Credentials::new(id, secret, token, None, "test").into();
        let params = SigningParams::builder()
            .identity(&identity)
            .region(request.region)
            .name(request.service)
            .time(now.into())
            .settings(SigningSettings::default())
            .build()
            .unwrap();
        let host = request.headers.iter().find(|(name, _)| *name == "host").unwrap().1;
        let (headers, body) = (request.headers.iter().copied(), SignableBody::Bytes(request.body));
        let signable = SignableRequest::new(request.method, format!("https://{host}/"), headers, body).unwrap();
        let (instructions, _) = aws_sigv4::http_request::sign(signable, &params.into()).unwrap().into_parts();
        let header = |name: &str| {
            instructions.headers().find(|(header, _)| *header == name).map(|(_, value)| value.to_owned()).unwrap()
        };
        AwsSignature { date: header("x-amz-date"), authorization: header("authorization") }
    }

    fn any_headers() -> impl Strategy<Value = BTreeMap<String, String>> {
        let name = "[a-z][a-z0-9]{0,8}(-[a-z0-9]{1,8}){0,3}";
        let name = name.prop_filter("is another header", |name| !NOT_GIVEN.contains(&name.as_str()));
        proptest::collection::btree_map(name, "[ -~]{0,40}", 0..6)
    }

    fn any_key() -> impl Strategy<Value = AwsKey> {
        let token = proptest::option::of("[!-~]{1,200}");
        ("[A-Z0-9]{16,32}", "[!-~]{1,64}", token).prop_map(|(access_key_id, secret, token)| AwsKey {
            access_key_id,
            secret_access_key: SecretString::from(secret),
            session_token: token.map(SecretString::from),
        })
    }

    proptest! {
        #[test]
        fn signature_is_the_one_of_the_client_of_aws(
            key in any_key(),
            method in "GET|POST|PUT|DELETE",
            host in "[a-z0-9]{1,12}(\\.[a-z0-9]{1,12}){0,4}(:[1-9][0-9]{3})?",
            region in "[a-z]{2}-[a-z]{4,9}-[1-9]",
            service in "ecr|ecr-public|sts",
            headers in any_headers(),
            body in any::<Vec<u8>>(),
            // Until 2100.
            time in 0_i64..4_102_444_800,
        ) {
            let headers = headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            let headers: Vec<_> = headers.chain([("host", host.as_str())]).collect();
            let request =
                AwsRequest { method: &method, region: &region, service: &service, headers: &headers, body: &body };
            let now = DateTime::from_timestamp(time, 0).unwrap();
            prop_assert_eq!(request.sign(&key, now), sign_by_oracle(&request, &key, now));
        }
    }
}
