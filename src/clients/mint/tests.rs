mod hostile;

use std::{fs, future::pending, sync::Arc};

use base64::{Engine, prelude::BASE64_STANDARD, prelude::BASE64_URL_SAFE_NO_PAD};
use parking_lot::Mutex;
use rstest::rstest;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::domain::mint::NewSource;

/// Time of all clocks that are right.
const DATE: &str = "Thu, 01 Jan 2026 00:00:00 GMT";
const NOW: i64 = 1_767_225_600;
const REGISTRY: &str = "123456789012.dkr.ecr.eu-central-1.amazonaws.com";

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp(NOW, 0).unwrap()
}

fn hour_ahead() -> DateTime<Utc> {
    now() + TimeDelta::hours(1)
}

fn hour_behind() -> DateTime<Utc> {
    now() - TimeDelta::hours(1)
}

/// Answer of a [`Fake`] that leaves the connection open and silent.
const SILENCE: &str = "silence";

/// HTTP server that answers by a function of the request, and records the requests.
struct Fake {
    url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    async fn start(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (answer, requests) = (Arc::new(answer), Arc::new(Mutex::new(Vec::new())));
        let seen = Arc::clone(&requests);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (answer, seen) = (Arc::clone(&answer), Arc::clone(&seen));
                tokio::spawn(async move {
                    let request = read_request(&mut stream).await;
                    let response = answer(&request);
                    seen.lock().push(request);
                    if response == SILENCE {
                        pending::<()>().await;
                    }
                    let _ = stream.write_all(response.as_bytes()).await;
                });
            }
        });
        Self { url, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().clone()
    }

    fn authority(&self) -> &str {
        self.url.trim_start_matches("http://")
    }
}

async fn read_request(stream: &mut TcpStream) -> String {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let lower = head.to_ascii_lowercase();
            let length = lower.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return text;
            }
        }
        match stream.read(&mut buffer).await {
            Ok(count @ 1..) => bytes.extend_from_slice(&buffer[..count]),
            _ => return text,
        }
    }
}

fn respond(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}")
}

fn ok(body: &str) -> String {
    respond("200 OK", &format!("date: {DATE}\r\n"), body)
}

fn ecr_answer(login: &str, expires_at: i64) -> String {
    let token = BASE64_STANDARD.encode(login);
    json!({"authorizationData": [{"authorizationToken": token, "expiresAt": expires_at}]}).to_string()
}

fn sts_answer(key: &str) -> String {
    format!(
        "<AssumeRoleResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><AssumeRoleResult><Credentials>\
         <AccessKeyId>{key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>session</SessionToken>\
         <Expiration>2026-01-01T00:15:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"
    )
}

fn jwt(expires_at: i64) -> String {
    format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(json!({"exp": expires_at}).to_string()))
}

fn config() -> MintClientConfig {
    MintClientConfig { timeout: Duration::from_secs(10), now, ..MintClientConfig::default() }
}

fn client(config: MintClientConfig) -> MintClient {
    MintClient::new(|| Guard::new("127.0.0.1".parse().unwrap()), config)
}

/// Mints for a registry, with a token of the `ServiceAccount` if the source needs one.
async fn mint_for(client: &MintClient, source: &Value, registry: &str) -> Result<Minted, MintError> {
    mint_by(client, source, registry, MintTrigger::Request).await
}

async fn mint_by(
    client: &MintClient,
    source: &Value,
    registry: &str,
    trigger: MintTrigger,
) -> Result<Minted, MintError> {
    let NewSource { source, secret } = Source::parse(serde_json::from_value(source.clone()).unwrap()).unwrap();
    let token = SecretString::from("subject-token");
    let registry = RegistryScope::parse(registry).unwrap();
    let order = MintOrder {
        source: &source,
        secret: &secret,
        web_identity: source.web_identity().map(|_| &token),
        registry: &registry,
        plain_http: true,
        ca_certificate: None,
    };
    client.mint_until(&order, trigger, Instant::now() + client.config.timeout).await
}

async fn mint(source: &Value) -> Result<Minted, MintError> {
    mint_for(&client(config()), source, REGISTRY).await
}

fn login(minted: &Minted) -> (&str, &str, u64) {
    (minted.username.as_str(), minted.password.secret().expose_secret(), minted.validity.lifetime.as_secs())
}

fn ecr(endpoint: &str) -> Value {
    json!({
        "type": "ecr", "region": "eu-central-1", "endpoint": endpoint, "stsEndpoint": endpoint,
        "identity": {"type": "accessKey", "accessKeyId": "AKID", "secretAccessKey": "canary"},
    })
}

fn web_identity() -> Value {
    json!({"type": "webIdentity", "cluster": "dev", "namespace": "regcred", "serviceAccount": "pull"})
}

#[tokio::test]
async fn ecr_login_is_requested_with_a_signature() {
    let fake = Fake::start(|_| ok(&ecr_answer("AWS:password", NOW + 43_200))).await;
    let minted = mint(&ecr(&fake.url)).await.unwrap();
    assert_eq!(login(&minted), ("AWS", "password", 43_200));
    let requests = fake.requests();
    let [request] = requests.as_slice() else { panic!("{requests:?}") };
    assert!(request.starts_with("POST / HTTP/1.1\r\n") && request.ends_with("\r\n\r\n{}"), "{request}");
    let credential = "AWS4-HMAC-SHA256 Credential=AKID/20260101/eu-central-1/ecr/aws4_request, \
                      SignedHeaders=content-type;host;x-amz-date;x-amz-target, Signature=";
    for part in
        [credential, "x-amz-date: 20260101T000000Z", "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"]
    {
        assert!(request.contains(part), "{part}: {request}");
    }
    assert!(!request.contains("canary"));
}

#[tokio::test]
async fn ecr_public_answers_with_one_object() {
    let token = BASE64_STANDARD.encode("AWS:p");
    let body = json!({"authorizationData": {"authorizationToken": token, "expiresAt": 1_767_268_800.5}}).to_string();
    let fake = Fake::start(move |_| ok(&body)).await;
    let source = json!({"type": "ecrPublic", "endpoint": fake.url, "identity": {"type": "accessKey",
        "accessKeyId": "AKID", "secretAccessKey": "s"}});
    assert_eq!(login(&mint(&source).await.unwrap()), ("AWS", "p", 43_200));
    assert!(fake.requests()[0].contains("/us-east-1/ecr-public/aws4_request"));
}

#[tokio::test]
async fn role_is_assumed_before_the_login_is_requested() {
    let fake = Fake::start(|request| {
        if request.contains("Action=AssumeRole&") {
            ok(&sts_answer("ASIA"))
        } else {
            ok(&ecr_answer("AWS:p", NOW + 43_200))
        }
    });
    let fake = fake.await;
    let mut source = ecr(&fake.url);
    source["assumeRole"] = json!({"roleArn": "arn:aws:iam::123456789012:role/pull", "externalId": "x/1"});
    mint(&source).await.unwrap();
    let requests = fake.requests();
    assert_eq!(requests.len(), 2);
    for part in
        ["Credential=AKID/20260101/eu-central-1/sts/", "ExternalId=x%2F1", "role%2Fpull", "RoleSessionName=regcred"]
    {
        assert!(requests[0].contains(part), "{part}: {}", requests[0]);
    }
    assert!(requests[1].contains("Credential=ASIA/") && requests[1].contains("x-amz-security-token: session"));
}

#[tokio::test]
async fn service_account_assumes_a_role_without_a_signature() {
    let fake = Fake::start(|request| {
        if request.contains("Action=AssumeRoleWithWebIdentity") {
            ok(&sts_answer("ASIA"))
        } else {
            ok(&ecr_answer("AWS:p", NOW + 43_200))
        }
    });
    let fake = fake.await;
    let mut source = ecr(&fake.url);
    source["identity"] = web_identity();
    source["assumeRole"] = json!({"roleArn": "arn:aws:iam::123456789012:role/pull"});
    mint(&source).await.unwrap();
    let requests = fake.requests();
    assert!(requests[0].contains("WebIdentityToken=subject-token") && !requests[0].contains("authorization:"));
}

#[tokio::test]
async fn code_of_an_xml_refusal_is_read() {
    let body = "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>canary</Message></Error>\
                </ErrorResponse>";
    let fake = Fake::start(move |_| respond("403 Forbidden", "", body)).await;
    let mut source = ecr(&fake.url);
    source["assumeRole"] = json!({"roleArn": "arn:aws:iam::123456789012:role/pull"});
    let error = mint(&source).await.unwrap_err();
    assert_eq!(error.reason, MintReason::Denied);
    assert!(error.detail.contains("AWS STS answered AccessDenied (403)"), "{}", error.detail);
}

#[tokio::test]
async fn wrong_clock_is_corrected_by_the_date_of_the_answer() {
    let fake = Fake::start(|request| {
        if request.contains("x-amz-date: 20260101T00") {
            ok(&ecr_answer("AWS:p", NOW + 43_200))
        } else {
            respond("400 Bad Request", &format!("date: {DATE}\r\n"), r#"{"__type": "InvalidSignatureException"}"#)
        }
    });
    let fake = fake.await;
    let client = client(MintClientConfig { now: hour_ahead, ..config() });
    let minted = mint_for(&client, &ecr(&fake.url), REGISTRY).await.unwrap();
    // The lifetime is relative to the provider's time.
    assert_eq!(minted.validity.lifetime.as_secs(), 43_200);
    assert_eq!(fake.requests().len(), 2);
    assert_eq!(client.clock_offset_max(), TimeDelta::hours(-1));
    mint_for(&client, &ecr(&fake.url), REGISTRY).await.unwrap();
    assert_eq!(fake.requests().len(), 3);
}

#[tokio::test]
async fn refusal_at_the_same_time_is_not_repeated() {
    let refusal =
        respond("400 Bad Request", &format!("date: {DATE}\r\n"), r#"{"__type": "x#UnrecognizedClientException"}"#);
    let fake = Fake::start(move |_| refusal.clone()).await;
    let error = mint(&ecr(&fake.url)).await.unwrap_err();
    assert_eq!((error.reason, fake.requests().len()), (MintReason::InvalidIdentity, 1));
}

/// Claims of the assertion at the end of a request.
fn assertion_claims(request: &str) -> Value {
    let assertion = request.rsplit_once("assertion=").unwrap().1;
    let claims = BASE64_URL_SAFE_NO_PAD.decode(assertion.split('.').nth(1).unwrap()).unwrap();
    serde_json::from_slice(&claims).unwrap()
}

#[rstest]
#[case::google_ahead("google", hour_ahead)]
#[case::google_behind("google", hour_behind)]
#[case::azure_ahead("azure", hour_ahead)]
#[case::azure_behind("azure", hour_behind)]
#[tokio::test]
async fn wrong_clock_is_corrected_in_assertions(#[case] cloud: &str, #[case] local: fn() -> DateTime<Utc>) {
    let fake = Fake::start(|request| {
        if !request.contains("assertion=") {
            return ok(&json!({"refresh_token": jwt(NOW + 10_800)}).to_string());
        }
        let claims = assertion_claims(request);
        let start = claims["iat"].as_i64().or(claims["nbf"].as_i64()).unwrap();
        let is_timely = (NOW - 300..=NOW).contains(&start) && claims["exp"].as_i64().unwrap() > NOW;
        if is_timely {
            ok(r#"{"access_token": "t", "expires_in": 3600}"#)
        } else {
            respond("400 Bad Request", &format!("date: {DATE}\r\n"), r#"{"error": "invalid_grant"}"#)
        }
    });
    let fake = fake.await;
    let source = match cloud {
        "google" => json!({"type": "googleArtifactRegistry", "endpoint": fake.url, "identity": google_key()}),
        _ => azure_source(&fake, &azure_certificate().0),
    };
    let client = client(MintClientConfig { now: local, ..config() });
    let count = || fake.requests().iter().filter(|request| request.contains("assertion=")).count();
    mint_for(&client, &source, fake.authority()).await.unwrap();
    assert_eq!(count(), 2);
    mint_for(&client, &source, fake.authority()).await.unwrap();
    assert_eq!(count(), 3);
}

#[rstest]
#[case::undated("", 1)]
#[case::same_time("date: Thu, 01 Jan 2026 00:00:00 GMT\r\n", 1)]
#[case::other_time("date: Thu, 01 Jan 2026 01:00:00 GMT\r\n", 2)]
#[tokio::test]
async fn provider_that_still_refuses_the_time_is_a_clock_skew(#[case] date: &'static str, #[case] requests: usize) {
    let fake = Fake::start(move |_| respond("403 Forbidden", date, r#"{"__type": "RequestTimeTooSkewed"}"#)).await;
    let client = client(config());
    let error = mint_for(&client, &ecr(&fake.url), REGISTRY).await.unwrap_err();
    assert_eq!((error.reason, fake.requests().len()), (MintReason::ClockSkew, requests), "{}", error.detail);
    assert!(error.detail.ends_with("synchronize the clock of regcred's host"), "{}", error.detail);
}

#[tokio::test]
async fn clock_that_no_request_depends_on_is_reported() {
    let fake = Fake::start(|_| ok(r#"{"access_token": "t", "expires_in": 3600}"#)).await;
    let client = client(MintClientConfig { now: hour_behind, ..config() });
    mint_for(&client, &hostile::oauth2(&fake.url), REGISTRY).await.unwrap();
    assert_eq!(client.clock_offset_max(), TimeDelta::hours(1));
}

/// The clock of this host may be wrong, so it does not tell the lifetime.
#[tokio::test]
async fn expiry_in_an_answer_without_a_date_is_not_believed() {
    let fake = Fake::start(|request| match request.split(' ').nth(1).unwrap_or_default() {
        "/" => respond("200 OK", "", &ecr_answer("AWS:canary", NOW + 43_200)),
        "/oauth2/exchange" => respond("200 OK", "", &json!({"refresh_token": jwt(NOW + 10_800)}).to_string()),
        path if path.ends_with(":generateAccessToken") => {
            respond("200 OK", "", r#"{"accessToken": "canary", "expireTime": "2026-01-01T01:00:00Z"}"#)
        }
        _ => respond("200 OK", "", r#"{"access_token": "t", "expires_in": 3600}"#),
    });
    let fake = fake.await;
    let google = json!({"type": "googleArtifactRegistry", "endpoint": fake.url, "identity": google_key(),
        "impersonate": "pull@p.iam.gserviceaccount.com"});
    let azure = azure_source(&fake, &json!({"type": "clientSecret", "clientId": "c", "clientSecret": "s"}));
    for source in [ecr(&fake.url), google, azure] {
        let error = mint_for(&client(config()), &source, fake.authority()).await.unwrap_err();
        assert_eq!(error.reason, MintReason::BadAnswer, "{}", error.detail);
        assert!(error.detail.contains("`Date`"), "{}", error.detail);
    }
}

#[rstest]
#[case::expired(ok(&ecr_answer("AWS:canary", 1_420_070_400)), MintReason::ExpiredOnArrival)]
#[case::short(ok(&ecr_answer("AWS:canary", NOW + 299)), MintReason::TooShortLived)]
#[case::user_name(ok(&ecr_answer("canary=:canary", NOW + 43_200)), MintReason::BadAnswer)]
#[case::no_expiry(ok(r#"{"authorizationData": [{"authorizationToken": "QVdTOmNhbmFyeQ=="}]}"#), MintReason::BadAnswer)]
#[case::text_expiry(
    ok(r#"{"authorizationData": [{"authorizationToken": "QVdTOmNhbmFyeQ==", "expiresAt": "canary"}]}"#),
    MintReason::BadAnswer
)]
#[case::no_login(ok(r#"{"authorizationData": []}"#), MintReason::BadAnswer)]
#[case::no_user(ok(&ecr_answer("canary", NOW + 43_200)), MintReason::BadAnswer)]
#[case::empty_user(ok(&ecr_answer(":canary", NOW + 43_200)), MintReason::BadAnswer)]
#[case::nul(ok(&ecr_answer("AWS:can\0ary", NOW + 43_200)), MintReason::BadAnswer)]
#[case::not_json(ok("<html>canary</html>"), MintReason::BadAnswer)]
#[case::large(ok(&"canary".repeat(100_000)), MintReason::BadAnswer)]
#[case::truncated(ok(&ecr_answer("AWS:canary", NOW + 43_200)).replace("content-length: ", "content-length: 9"),
    MintReason::Unreachable)]
#[case::redirect(
    respond("307 Temporary Redirect", "location: http://127.0.0.1:1/canary\r\n", ""),
    MintReason::BadAnswer
)]
#[case::echo(respond("400 Bad Request", "", r#"{"__type": "canary", "message": "canary"}"#), MintReason::Misconfigured)]
#[case::retry_after(respond("429 Too Many Requests", "retry-after: 1000000000\r\n", "canary"), MintReason::Throttled)]
#[case::failure(respond("500 Internal Server Error", "", "canary"), MintReason::Unreachable)]
#[case::no_content(respond("204 No Content", "", ""), MintReason::BadAnswer)]
#[tokio::test]
async fn hostile_answer_has_a_reason_and_is_not_repeated(#[case] answer: String, #[case] reason: MintReason) {
    let fake = Fake::start(move |_| answer.clone()).await;
    let error = mint(&ecr(&fake.url)).await.unwrap_err();
    assert_eq!(error.reason, reason, "{}", error.detail);
    assert!(!format!("{error:?}").contains("canary"), "{error:?}");
}

#[tokio::test]
async fn host_that_asks_for_a_pause_is_not_called() {
    let fake = Fake::start(|_| respond("429 Too Many Requests", "retry-after: 60\r\n", "")).await;
    let client = client(config());
    for _ in 0..2 {
        let error = mint_for(&client, &ecr(&fake.url), REGISTRY).await.unwrap_err();
        assert_eq!(error.reason, MintReason::Throttled);
        assert!(error.retry_after.is_some_and(|delay| delay > Duration::from_secs(55)), "{error:?}");
    }
    assert_eq!(fake.requests().len(), 1);
}

#[tokio::test]
async fn address_that_is_not_allowed_is_not_called() {
    let fake = Fake::start(|_| ok("")).await;
    let client = MintClient::new(|| Guard::new("".parse().unwrap()), config());
    let error = mint_for(&client, &ecr(&fake.url), REGISTRY).await.unwrap_err();
    assert_eq!(error.reason, MintReason::Misconfigured);
    assert!(error.detail.contains("REGCRED_MINT_ALLOW"), "{}", error.detail);
    assert_eq!(fake.requests().len(), 0);
}

fn google_key() -> Value {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap().serialize_pem();
    let file = json!({"type": "service_account", "client_email": "pull@p.iam.gserviceaccount.com",
        "private_key": key, "private_key_id": "k1"});
    json!({"type": "serviceAccountKey", "keyFile": file.to_string()})
}

#[tokio::test]
async fn google_key_signs_an_assertion() {
    let fake = Fake::start(|_| ok(r#"{"access_token": "ya29", "expires_in": "3599"}"#)).await;
    let source = json!({"type": "googleArtifactRegistry", "endpoint": fake.url, "identity": google_key()});
    let minted = mint(&source).await.unwrap();
    assert_eq!(login(&minted), ("oauth2accesstoken", "ya29", 3_599));
    let request = fake.requests().remove(0);
    assert!(request.starts_with("POST /token "), "{request}");
    let claims = assertion_claims(&request);
    assert_eq!(claims["aud"], "https://oauth2.googleapis.com/token");
    assert_eq!(claims["iat"], NOW - 10);
    assert_eq!(claims["scope"], "https://www.googleapis.com/auth/cloud-platform.read-only");
}

#[tokio::test]
async fn google_service_account_is_impersonated() {
    let fake = Fake::start(|request| {
        if request.contains(":generateAccessToken") {
            ok(r#"{"accessToken": "impersonated", "expireTime": "2026-01-01T01:00:00Z"}"#)
        } else {
            ok(r#"{"access_token": "federated", "expires_in": 600, "token_type": "Bearer"}"#)
        }
    });
    let fake = fake.await;
    let mut identity = web_identity();
    identity["workloadIdentityProvider"] = json!("projects/1/locations/global/workloadIdentityPools/p/providers/x");
    let source = json!({"type": "googleArtifactRegistry", "endpoint": fake.url, "identity": identity,
        "impersonate": "pull@p.iam.gserviceaccount.com"});
    assert_eq!(login(&mint(&source).await.unwrap()), ("oauth2accesstoken", "impersonated", 3_600));
    let requests = fake.requests();
    assert!(requests[0].starts_with("POST /v1/token ") && requests[0].contains("subject_token=subject-token"));
    let path = "POST /v1/projects/-/serviceAccounts/pull@p.iam.gserviceaccount.com:generateAccessToken ";
    assert!(
        requests[1].starts_with(path) && requests[1].contains("authorization: Bearer federated"),
        "{}",
        requests[1]
    );
}

/// Entra ID and registry in one.
async fn azure() -> Fake {
    Fake::start(|request| match request.split(' ').nth(1).unwrap_or_default() {
        "/t/oauth2/v2.0/token" => ok(r#"{"access_token": "entra", "expires_in": 3599}"#),
        "/oauth2/exchange" => ok(&json!({"refresh_token": jwt(NOW + 10_800)}).to_string()),
        "/oauth2/token" => ok(&json!({"access_token": jwt(NOW + 4_500)}).to_string()),
        _ => respond("404 Not Found", "", ""),
    })
    .await
}

fn azure_source(fake: &Fake, identity: &Value) -> Value {
    json!({"type": "azureContainerRegistry", "tenantId": "t", "authority": fake.url, "identity": identity})
}

#[tokio::test]
async fn azure_token_is_exchanged_at_the_registry() {
    let fake = azure().await;
    let source = azure_source(&fake, &json!({"type": "clientSecret", "clientId": "c", "clientSecret": "s&1"}));
    let minted = mint_for(&client(config()), &source, fake.authority()).await.unwrap();
    assert_eq!(login(&minted), ("00000000-0000-0000-0000-000000000000", jwt(NOW + 10_800).as_str(), 10_800));
    let requests = fake.requests();
    assert!(requests[0].contains("client_secret=s%261") && requests[0].contains("containerregistry.azure.net"));
    assert!(requests[1].contains("access_token=entra") && !requests[1].contains("client_secret"), "{}", requests[1]);
}

#[tokio::test]
async fn azure_login_is_limited_to_repositories() {
    let fake = azure().await;
    let mut identity = web_identity();
    identity["clientId"] = json!("c");
    let mut source = azure_source(&fake, &identity);
    source["repositories"] = json!(["os/alpine", "app"]);
    let minted = mint_for(&client(config()), &source, fake.authority()).await.unwrap();
    assert_eq!(minted.validity.lifetime.as_secs(), 4_500);
    let requests = fake.requests();
    assert!(requests[0].contains("client_assertion=subject-token"));
    let scopes = "scope=repository%3Aos%2Falpine%3Apull&scope=repository%3Aapp%3Apull";
    assert!(requests[2].contains(scopes), "{}", requests[2]);
}

/// Identity with a certificate, and the thumbprint of the certificate.
fn azure_certificate() -> (Value, String) {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
    let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
    let identity = json!({"type": "clientCertificate", "clientId": "c", "certificate": certificate.pem(),
        "privateKey": key.serialize_pem()});
    (identity, crate::crypto::jwt_signer::thumbprint(certificate.der()))
}

#[tokio::test]
async fn azure_certificate_signs_an_assertion() {
    let fake = azure().await;
    let (identity, thumbprint) = azure_certificate();
    mint_for(&client(config()), &azure_source(&fake, &identity), fake.authority()).await.unwrap();
    let request = fake.requests().remove(0);
    let assertion = request.rsplit_once("client_assertion=").unwrap().1;
    let header = BASE64_URL_SAFE_NO_PAD.decode(assertion.split('.').next().unwrap()).unwrap();
    let header: Value = serde_json::from_slice(&header).unwrap();
    assert_eq!(header["alg"], "PS256");
    assert_eq!(header["x5t#S256"], thumbprint);
}

#[rstest]
#[case("basic", "authorization: Basic Yzph", "\r\n\r\ngrant_type=client_credentials&scope=pull")]
#[case("body", "client_id=c&client_secret=a+b%26", "grant_type=client_credentials&scope=pull&client_id=c")]
#[tokio::test]
async fn oauth2_client_authenticates_in_both_ways(
    #[case] authentication: &str,
    #[case] login_part: &str,
    #[case] body_part: &str,
) {
    let fake = Fake::start(|_| ok(r#"{"access_token": "t"}"#)).await;
    let mut source = json!({
        "type": "oauth2", "tokenUrl": format!("{}/token", fake.url), "username": "robot", "scope": "pull",
        "authentication": authentication,
        "identity": {"type": "clientSecret", "clientId": "c", "clientSecret": "a b&"},
    });
    assert_eq!(mint(&source).await.unwrap_err().reason, MintReason::BadAnswer);
    source["lifetimeSeconds"] = json!(3_600);
    assert_eq!(login(&mint(&source).await.unwrap()), ("robot", "t", 3_600));
    let request = fake.requests().remove(0);
    assert!(request.contains(login_part) && request.contains(body_part), "{request}");
}

fn with_metadata(fake: &Fake, ambient: AmbientConfig) -> MintClientConfig {
    let allowed = "127.0.0.1".parse().unwrap();
    let metadata = MetadataConfig { instance: fake.url.clone(), containers: vec![fake.url.clone()], allowed };
    MintClientConfig { ambient, metadata, ..config() }
}

fn ambient_ecr(fake: &Fake) -> Value {
    let mut source = ecr(&fake.url);
    source["identity"] = json!({"type": "ambient"});
    source
}

fn metadata_key() -> String {
    ok(r#"{"Code": "Success", "AccessKeyId": "ASIA", "SecretAccessKey": "s", "Token": "session", "Expiration": "x"}"#)
}

#[tokio::test]
async fn instance_key_is_read_with_a_session() {
    let fake = Fake::start(|request| match request.lines().next().unwrap_or_default() {
        "PUT /latest/api/token HTTP/1.1" => ok("imds-session"),
        "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1" => ok("pull-role\n"),
        "GET /latest/meta-data/iam/security-credentials/pull-role HTTP/1.1"
            if request.contains("x-aws-ec2-metadata-token: imds-session") =>
        {
            metadata_key()
        }
        "POST / HTTP/1.1" => ok(&ecr_answer("AWS:p", NOW + 43_200)),
        _ => respond("401 Unauthorized", "", ""),
    });
    let fake = fake.await;
    let config =
        with_metadata(&fake, AmbientConfig { aws: Some(AwsEnvironment::default()), ..AmbientConfig::default() });
    mint_for(&client(config), &ambient_ecr(&fake), REGISTRY).await.unwrap();
    assert!(fake.requests()[3].contains("Credential=ASIA/"));
}

#[tokio::test]
async fn pod_key_is_read_with_the_token_file_of_each_mint() {
    let fake = Fake::start(|request| match request.lines().next().unwrap_or_default() {
        "GET /v1/credentials HTTP/1.1" => metadata_key(),
        _ => ok(&ecr_answer("AWS:p", NOW + 43_200)),
    });
    let fake = fake.await;
    let file = std::env::temp_dir().join(format!("regcred-mint-{}", uuid::Uuid::now_v7()));
    let aws = AwsEnvironment {
        credentials_full_uri: Some(format!("{}/v1/credentials", fake.url)),
        authorization_token_file: Some(file.clone()),
        ..AwsEnvironment::default()
    };
    let client = client(with_metadata(&fake, AmbientConfig { aws: Some(aws), ..AmbientConfig::default() }));
    let missing = mint_for(&client, &ambient_ecr(&fake), REGISTRY).await.unwrap_err();
    assert_eq!(missing.reason, MintReason::InvalidIdentity);
    for token in ["first", "second"] {
        fs::write(&file, format!("{token}\n")).unwrap();
        mint_for(&client, &ambient_ecr(&fake), REGISTRY).await.unwrap();
    }
    fs::remove_file(&file).unwrap();
    let requests = fake.requests();
    assert!(requests[0].contains("authorization: first\r\n") && requests[2].contains("authorization: second\r\n"));
}

#[rstest]
#[case("http://169.254.169.254/latest/user-data")]
#[case("http://169.254.170.23.evil.example/v1/credentials")]
#[case("http://169.254.170.23@evil.example/v1/credentials")]
#[case("http://169.254.170.23:8080/v1/credentials")]
#[tokio::test]
async fn container_key_comes_from_known_services_only(#[case] uri: &str) {
    let aws = AwsEnvironment { credentials_full_uri: Some(uri.to_owned()), ..AwsEnvironment::default() };
    let ambient = AmbientConfig { aws: Some(aws), ..AmbientConfig::default() };
    let source = json!({"type": "ecr", "region": "eu-central-1", "identity": {"type": "ambient"}});
    let client = client(MintClientConfig { ambient, ..config() });
    let error = mint_for(&client, &source, REGISTRY).await.unwrap_err();
    assert_eq!(error.reason, MintReason::Misconfigured, "{}", error.detail);
}

#[rstest]
#[case(json!({"type": "ecr", "region": "eu-central-1", "identity": {"type": "ambient"}}), REGISTRY, "aws")]
#[case(json!({"type": "googleArtifactRegistry", "identity": {"type": "ambient"}}), "gcr.io", "gcp")]
#[case(json!({"type": "azureContainerRegistry", "identity": {"type": "ambient"}}), "acme.azurecr.io", "azure")]
#[tokio::test]
async fn ambient_identity_is_off_by_default(#[case] source: Value, #[case] registry: &str, #[case] provider: &str) {
    let error = mint_for(&client(config()), &source, registry).await.unwrap_err();
    assert_eq!(error.reason, MintReason::Misconfigured);
    assert!(error.detail.contains(provider) && error.detail.contains("REGCRED_MINT_AMBIENT"), "{}", error.detail);
}

#[tokio::test]
async fn managed_identities_are_read_from_the_metadata_service() {
    let fake = Fake::start(|request| match request.split('?').next().unwrap_or_default() {
        "GET /metadata/identity/oauth2/token" => ok(r#"{"access_token": "managed", "expires_in": "86399"}"#),
        "GET /computeMetadata/v1/instance/service-accounts/default/token" => {
            ok(r#"{"access_token": "ya29", "expires_in": 1200}"#)
        }
        _ => ok(&json!({"refresh_token": jwt(NOW + 10_800)}).to_string()),
    });
    let fake = fake.await;
    let ambient = AmbientConfig { gcp: true, azure: Some(AzureEnvironment::default()), aws: None };
    let client = client(with_metadata(&fake, ambient));
    let google = json!({"type": "googleArtifactRegistry", "identity": {"type": "ambient"}});
    assert_eq!(mint_for(&client, &google, "gcr.io").await.unwrap().validity.lifetime.as_secs(), 1_200);
    assert!(fake.requests()[0].contains("host: metadata.google.internal\r\n"));
    let mut azure = json!({"type": "azureContainerRegistry", "identity": {"type": "ambient", "clientId": "c"}});
    azure["authority"] = json!("https://login.example.com");
    mint_for(&client, &azure, fake.authority()).await.unwrap();
    let requests = fake.requests();
    assert!(requests[1].contains("client_id=c") && requests[1].contains("metadata: true"), "{}", requests[1]);
    assert!(requests[2].starts_with("POST /oauth2/exchange ") && requests[2].contains("access_token=managed"));
}

#[rstest]
#[case("404 Not Found", MintReason::Unreachable)]
#[case("410 Gone", MintReason::Unreachable)]
#[case("500 Internal Server Error", MintReason::Unreachable)]
#[case("429 Too Many Requests", MintReason::Throttled)]
#[case("400 Bad Request", MintReason::Misconfigured)]
#[tokio::test]
async fn managed_identity_that_is_not_ready_is_retried_soon(#[case] status: &'static str, #[case] reason: MintReason) {
    let fake = Fake::start(move |_| respond(status, "", r#"{"error": "canary"}"#)).await;
    let ambient = AmbientConfig { azure: Some(AzureEnvironment::default()), ..AmbientConfig::default() };
    let source = json!({"type": "azureContainerRegistry", "identity": {"type": "ambient"}});
    let client = client(with_metadata(&fake, ambient));
    let error = mint_for(&client, &source, "acme.azurecr.io").await.unwrap_err();
    assert_eq!(error.reason, reason, "{}", error.detail);
}
