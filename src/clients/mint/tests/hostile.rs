//! Providers, registries and files that are hostile or wrong.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::*;
use crate::clients::outbound::Resolve;

/// Name server that counts look-ups, and knows only this host.
#[derive(Default)]
struct LocalResolver(AtomicUsize);

impl Resolve for LocalResolver {
    fn resolve<'a>(&'a self, _: &'a str) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(vec![Ipv4Addr::LOCALHOST.into()]) })
    }
}

/// Client that may call no private address, and the look-ups that it makes.
fn guarded_client() -> (MintClient, Arc<LocalResolver>) {
    let resolver = Arc::new(LocalResolver::default());
    let guard = || Guard::with_resolver("".parse().unwrap(), resolver.clone());
    (MintClient::new(guard, config()), resolver)
}

pub(super) fn oauth2(url: &str) -> Value {
    json!({
        "type": "oauth2", "tokenUrl": url, "username": "robot",
        "identity": {"type": "clientSecret", "clientId": "c", "clientSecret": "canary"},
    })
}

fn assert_free_of_canary(error: &MintError) {
    assert!(!format!("{error:?} {error}").contains("canary"), "{error:?}");
}

#[rstest]
#[case::expired(ok(r#"{"access_token": "canary", "expires_in": -1}"#), MintReason::ExpiredOnArrival)]
#[case::now(ok(r#"{"access_token": "canary", "expires_in": "0"}"#), MintReason::ExpiredOnArrival)]
#[case::short(ok(r#"{"access_token": "canary", "expires_in": 299}"#), MintReason::TooShortLived)]
#[case::no_expiry(ok(r#"{"access_token": "canary"}"#), MintReason::BadAnswer)]
#[case::text_expiry(ok(r#"{"access_token": "canary", "expires_in": "canary"}"#), MintReason::BadAnswer)]
#[case::not_a_number(ok(r#"{"access_token": "canary", "expires_in": "NaN"}"#), MintReason::BadAnswer)]
#[case::object(ok(r#"{"access_token": {"canary": 1}, "expires_in": 3600}"#), MintReason::BadAnswer)]
#[case::nul(ok(r#"{"access_token": "can\u0000ary", "expires_in": 3600}"#), MintReason::BadAnswer)]
#[case::empty(ok(r#"{"access_token": "", "expires_in": 3600}"#), MintReason::BadAnswer)]
#[case::ten_megabytes(ok(&"canary ".repeat(1_500_000)), MintReason::BadAnswer)]
#[case::large_refusal(respond("403 Forbidden", "", &"canary ".repeat(1_500_000)), MintReason::Denied)]
#[case::truncated(
    ok(r#"{"access_token": "canary", "expires_in": 3600}"#).replace("content-length: ", "content-length: 9"),
    MintReason::Unreachable
)]
#[case::truncated_json(ok(r#"{"access_token": "canary""#), MintReason::BadAnswer)]
#[case::not_http("canary canary canary\r\n\r\n".to_owned(), MintReason::Unreachable)]
#[case::no_answer(String::new(), MintReason::Unreachable)]
#[case::redirect(
    respond("302 Found", "location: http://127.0.0.1:1/canary\r\n", r#"{"access_token": "canary"}"#),
    MintReason::BadAnswer
)]
#[case::pause(respond("429 Too Many Requests", "retry-after: 1000000000\r\n", "canary"), MintReason::Throttled)]
#[case::no_pause(respond("429 Too Many Requests", "retry-after: canary\r\n", "canary"), MintReason::Throttled)]
#[case::unknown_code(respond("400 Bad Request", "", r#"{"error": "canary"}"#), MintReason::Misconfigured)]
#[case::codes(respond("401 Unauthorized", "", r#"{"error_codes": ["canary", -1]}"#), MintReason::InvalidIdentity)]
#[tokio::test]
async fn hostile_token_service_has_a_reason(#[case] answer: String, #[case] reason: MintReason) {
    let fake = Fake::start(move |_| answer.clone()).await;
    let error = mint(&oauth2(&fake.url)).await.unwrap_err();
    assert_eq!(error.reason, reason, "{}", error.detail);
    assert_eq!(fake.requests().len(), 1);
    assert_free_of_canary(&error);
}

#[tokio::test]
async fn echoed_request_is_not_repeated() {
    for status in ["200 OK", "400 Bad Request", "401 Unauthorized", "500 Internal Server Error"] {
        let echo = move |request: &str| {
            let body = json!({"error": request, "message": request, "__type": request, "expires_in": 3600});
            respond(status, "", &body.to_string())
        };
        let fake = Fake::start(echo).await;
        for source in [oauth2(&fake.url), ecr(&fake.url)] {
            let error = mint(&source).await.unwrap_err();
            assert_free_of_canary(&error);
            assert!(!error.detail.contains("HTTP/1.1"), "{}", error.detail);
        }
    }
}

#[tokio::test]
async fn requested_pause_is_bounded() {
    let fake = Fake::start(|_| respond("429 Too Many Requests", "retry-after: 1000000000\r\n", "")).await;
    let error = mint(&oauth2(&fake.url)).await.unwrap_err();
    let delay = crate::domain::mint::schedule::backoff(&error, 1, 0.0);
    assert_eq!(delay, Duration::from_hours(1));
}

#[rstest]
#[case::entity(
    r#"<!DOCTYPE a [<!ENTITY b "canary">]><a><Credentials><AccessKeyId>&b;</AccessKeyId></Credentials></a>"#
)]
#[case::truncated("<a><Credentials><AccessKeyId>canary")]
#[case::no_token(
    "<a><Credentials><AccessKeyId>A</AccessKeyId><SecretAccessKey>canary</SecretAccessKey></Credentials></a>"
)]
#[case::header(
    "<a><Credentials><AccessKeyId>A</AccessKeyId><SecretAccessKey>s</SecretAccessKey>\
     <SessionToken>canary&#13;&#10;x-evil: 1</SessionToken></Credentials></a>"
)]
#[case::json(r#"{"Credentials": "canary"}"#)]
#[tokio::test]
async fn hostile_answer_of_sts_ends_the_mint(#[case] answer: &'static str) {
    let fake = Fake::start(move |_| ok(answer)).await;
    let mut source = ecr(&fake.url);
    source["assumeRole"] = json!({"roleArn": "arn:aws:iam::123456789012:role/pull"});
    let error = mint(&source).await.unwrap_err();
    assert_eq!(error.reason, MintReason::BadAnswer, "{}", error.detail);
    assert_eq!(fake.requests().len(), 1);
    assert_free_of_canary(&error);
}

#[rstest]
#[case::no_expiry("e30.e30.c2ln")]
#[case::not_a_token("canary")]
#[case::not_base64("e30.!canary!.c2ln")]
#[tokio::test]
async fn hostile_token_of_a_registry_ends_the_mint(#[case] token: &'static str) {
    let fake = Fake::start(move |request| match request.split(' ').nth(1).unwrap_or_default() {
        "/t/oauth2/v2.0/token" => ok(r#"{"access_token": "entra", "expires_in": 3599}"#),
        _ => ok(&json!({"refresh_token": token}).to_string()),
    });
    let fake = fake.await;
    let source = azure_source(&fake, &json!({"type": "clientSecret", "clientId": "c", "clientSecret": "s"}));
    let error = mint_for(&client(config()), &source, fake.authority()).await.unwrap_err();
    assert_eq!(error.reason, MintReason::BadAnswer, "{}", error.detail);
    assert_free_of_canary(&error);
}

/// Registries that a source of each type does not serve.
const FOREIGN_REGISTRIES: [(&str, &[&str]); 4] = [
    (
        "ecr",
        &[
            "docker.io",
            "ghcr.io",
            "127.0.0.1:5000",
            "registry.example.com",
            "public.ecr.aws",
            "gcr.io",
            "acme.azurecr.io",
            "api.ecr.eu-central-1.amazonaws.com",
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com",
            "123456789012.dkr.ecr.eu-central-1.amazonaws.com:8443",
            "123456789012.dkr.ecr.eu-central-1.amazonaws.com.cn",
            "123456789012.dkr.ecr.eu-central-1.amazonaws.com.evil.example",
            "evil.123456789012.dkr.ecr.eu-central-1.amazonaws.com",
            "12345678901.dkr.ecr.eu-central-1.amazonaws.com",
            "123456789012.dkr.ecr.eu-central-1.evil.example",
        ],
    ),
    (
        "ecrPublic",
        &[
            "docker.io",
            "evil.public.ecr.aws",
            "public.ecr.aws.evil.example",
            "public.ecr.aws:8443",
            "123456789012.dkr.ecr.us-east-1.amazonaws.com",
        ],
    ),
    (
        "googleArtifactRegistry",
        &[
            "docker.io",
            "docker.pkg.dev",
            "europe-west3-npm.pkg.dev",
            "europe-west3-docker.pkg.dev.evil.example",
            "evil.europe-west3-docker.pkg.dev",
            "evil-gcr.io",
            "a.b.gcr.io",
            "gcr.io.evil.example",
            "gcr.io:8443",
            "metadata.google.internal",
        ],
    ),
    (
        "azureContainerRegistry",
        &[
            "docker.io",
            "azurecr.io",
            "acmeazurecr.io",
            "evil.acme.azurecr.io",
            "acme.azurecr.com",
            "acme.azurecr.io.evil.example",
            "acme.azurecr.io:8443",
            "login.microsoftonline.com",
        ],
    ),
];

#[tokio::test]
async fn no_request_leaves_for_a_foreign_registry() {
    let access_key = json!({"type": "accessKey", "accessKeyId": "AKID", "secretAccessKey": "s"});
    let client_secret = json!({"type": "clientSecret", "clientId": "c", "clientSecret": "s"});
    let google = google_key();
    let mut checked = 0;
    for (source_type, registries) in FOREIGN_REGISTRIES {
        let source = match source_type {
            "ecr" => json!({"type": source_type, "region": "eu-central-1", "identity": access_key}),
            "ecrPublic" => json!({"type": source_type, "identity": access_key}),
            "googleArtifactRegistry" => json!({"type": source_type, "identity": google}),
            _ => json!({"type": source_type, "tenantId": "t", "identity": client_secret}),
        };
        for registry in registries {
            let (client, resolver) = guarded_client();
            let error = mint_for(&client, &source, registry).await.unwrap_err();
            assert_eq!(error.reason, MintReason::RegistryMismatch, "{source_type} {registry}: {}", error.detail);
            assert_eq!(resolver.0.load(Ordering::SeqCst), 0, "{source_type} {registry}");
            checked += 1;
        }
    }
    assert!(checked >= 30);
}

#[tokio::test]
async fn no_request_reaches_a_private_address() {
    let fake = Fake::start(|_| ok(r#"{"access_token": "t", "expires_in": 3600}"#)).await;
    let port = fake.authority().rsplit(':').next().unwrap();
    let hosts = [
        "127.0.0.1",
        "127.1.2.3",
        "0.0.0.0",
        "[::1]",
        "[::ffff:7f00:1]",
        "[::]",
        "10.0.0.1",
        "localhost",
        "rebound.example.com",
        "169.254.169.254",
        "169.254.170.23",
        "[fd00:ec2::254]",
        "100.100.100.200",
        "metadata.google.internal",
    ];
    for host in hosts {
        let url = format!("http://{host}:{port}");
        let mut named = azure_source(&fake, &json!({"type": "clientSecret", "clientId": "c", "clientSecret": "s"}));
        named["authority"] = json!(url);
        for source in [oauth2(&url), ecr(&url), named] {
            let (client, _) = guarded_client();
            let error = mint_for(&client, &source, "registry.example.com").await.unwrap_err();
            assert_eq!(error.reason, MintReason::Misconfigured, "{url}: {}", error.detail);
        }
    }
    assert_eq!(fake.requests().len(), 0);
}

#[rstest]
#[case::decimal("http://2130706433:PORT")]
#[case::octal("http://0177.0.0.1:PORT")]
#[case::hexadecimal("http://0x7f.0.0.1:PORT")]
#[case::short("http://127.1:PORT")]
#[case::user_information("http://login.microsoftonline.com@127.0.0.1:PORT")]
#[case::trailing_dot("http://localhost.:PORT")]
#[tokio::test]
async fn ambiguous_host_does_not_pass_the_guard(#[case] url: &str) {
    let fake = Fake::start(|_| ok("")).await;
    let url = url.replace("PORT", fake.authority().rsplit(':').next().unwrap());
    // Either the source is refused, or its one spelling of the host.
    if Source::parse(serde_json::from_value(oauth2(&url)).unwrap()).is_ok() {
        let error = mint_for(&guarded_client().0, &oauth2(&url), REGISTRY).await.unwrap_err();
        assert_eq!(error.reason, MintReason::Misconfigured, "{}", error.detail);
    }
    assert_eq!(fake.requests().len(), 0);
}

/// File whose content a test sets, as the platform does.
struct TokenFile(std::path::PathBuf);

impl TokenFile {
    fn missing() -> Self {
        Self(std::env::temp_dir().join(format!("regcred-mint-{}", uuid::Uuid::now_v7())))
    }

    /// Replaces the file in one step.
    fn rotate(&self, token: &str) {
        let next = self.0.with_extension("next");
        fs::write(&next, token).unwrap();
        fs::rename(&next, &self.0).unwrap();
    }
}

impl Drop for TokenFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Mints before the file exists, with each content of it, and after it was removed. Returns the
/// reasons of the failures.
async fn mint_with_contents(client: &MintClient, source: &Value, registry: &str, file: TokenFile) -> Vec<MintReason> {
    let (mut reasons, long) = (Vec::new(), "x".repeat(64 * 1024 + 1));
    for content in [None, Some("first"), Some("second\n"), Some(""), Some("two words"), Some("a\u{e4}"), Some(&long)] {
        if let Some(content) = content {
            file.rotate(content);
        }
        reasons.extend(mint_for(client, source, registry).await.err().map(|error| error.reason));
    }
    drop(file);
    reasons.extend(mint_for(client, source, registry).await.err().map(|error| error.reason));
    reasons
}

#[tokio::test]
async fn rotated_token_file_of_a_role_is_read_again() {
    let fake = Fake::start(|request| {
        if request.contains("Action=AssumeRoleWithWebIdentity") {
            ok(&sts_answer("ASIA"))
        } else {
            ok(&ecr_answer("AWS:p", NOW + 43_200))
        }
    });
    let fake = fake.await;
    let file = TokenFile::missing();
    let aws = AwsEnvironment {
        role_arn: Some("arn:aws:iam::123456789012:role/regcred".to_owned()),
        web_identity_token_file: Some(file.0.clone()),
        ..AwsEnvironment::default()
    };
    let client =
        client(MintClientConfig { ambient: AmbientConfig { aws: Some(aws), ..AmbientConfig::default() }, ..config() });
    let reasons = mint_with_contents(&client, &ambient_ecr(&fake), REGISTRY, file).await;
    assert_eq!(reasons, [MintReason::InvalidIdentity; 6]);
    let sent: Vec<String> =
        fake.requests().into_iter().filter(|request| request.contains("WebIdentityToken=")).collect();
    assert_eq!(sent.len(), 2);
    assert!(sent[0].ends_with("WebIdentityToken=first") && sent[1].ends_with("WebIdentityToken=second"), "{sent:?}");
}

#[tokio::test]
async fn rotated_token_file_of_azure_is_read_again() {
    let fake = azure().await;
    let file = TokenFile::missing();
    let environment = AzureEnvironment {
        client_id: Some("c".to_owned()),
        tenant_id: Some("t".to_owned()),
        federated_token_file: Some(file.0.clone()),
        authority_host: Some(fake.url.clone()),
    };
    let ambient = AmbientConfig { azure: Some(environment), ..AmbientConfig::default() };
    let client = client(MintClientConfig { ambient, ..config() });
    let mut source = json!({"type": "azureContainerRegistry", "identity": {"type": "ambient"}});
    source["authority"] = json!(fake.url);
    let reasons = mint_with_contents(&client, &source, fake.authority(), file).await;
    assert_eq!(reasons, [MintReason::InvalidIdentity; 6]);
    let sent: Vec<String> =
        fake.requests().into_iter().filter(|request| request.contains("client_assertion=")).collect();
    assert_eq!(sent.len(), 2);
    assert!(sent[0].contains("client_assertion=first") && sent[1].contains("client_assertion=second"), "{sent:?}");
}

/// Waits until a fake received this number of requests.
async fn until_received(fake: &Fake, count: usize) {
    while fake.requests().len() < count {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Client whose mints end long after each wait for a host.
fn patient_client() -> Arc<MintClient> {
    Arc::new(client(MintClientConfig { timeout: Duration::from_mins(10), ..config() }))
}

fn spawn_mint(client: &Arc<MintClient>, source: &Value, trigger: MintTrigger) {
    let (client, source) = (Arc::clone(client), source.clone());
    tokio::spawn(async move { mint_by(&client, &source, REGISTRY, trigger).await });
}

#[tokio::test]
async fn hanging_host_defers_scheduled_mints_and_holds_no_others() {
    let hanging = Fake::start(|_| SILENCE.to_owned()).await;
    let other = Fake::start(|_| ok(r#"{"access_token": "t", "expires_in": 3600}"#)).await;
    let client = patient_client();
    for _ in 0..REQUESTS_PER_HOST {
        spawn_mint(&client, &oauth2(&hanging.url), MintTrigger::Schedule);
    }
    until_received(&hanging, REQUESTS_PER_HOST).await;
    let source = oauth2(&hanging.url);
    let error = mint_by(&client, &source, REGISTRY, MintTrigger::Schedule);
    let error = tokio::time::timeout(Duration::from_mins(1), error).await.unwrap().unwrap_err();
    assert!(error.is_deferral && error.reason == MintReason::Throttled, "{error:?}");
    mint_by(&client, &oauth2(&other.url), REGISTRY, MintTrigger::Schedule).await.unwrap();
    assert_eq!(hanging.requests().len(), REQUESTS_PER_HOST);
}

#[tokio::test]
async fn waiting_requests_leave_scheduled_mints_a_share_of_a_host() {
    let fake = Fake::start(|request| {
        if request.contains("scope=slow") {
            SILENCE.to_owned()
        } else {
            ok(r#"{"access_token": "t", "expires_in": 3600}"#)
        }
    });
    let fake = fake.await;
    let client = patient_client();
    let mut slow = oauth2(&fake.url);
    slow["scope"] = json!("slow");
    for _ in 0..2 * REQUESTS_PER_HOST {
        spawn_mint(&client, &slow, MintTrigger::Request);
    }
    until_received(&fake, REQUESTS_PER_HOST_ON_REQUEST).await;
    mint_by(&client, &oauth2(&fake.url), REGISTRY, MintTrigger::Schedule).await.unwrap();
    assert_eq!(fake.requests().len(), REQUESTS_PER_HOST_ON_REQUEST + 1);
}

/// Three requests of each mint go to the metadata service, where mints that have begun wait longer.
#[tokio::test]
async fn scheduled_mint_that_has_called_a_host_is_not_deferred_there() {
    let fake = Fake::start(|request| match request.lines().next().unwrap_or_default() {
        "PUT /latest/api/token HTTP/1.1" => ok("imds-session"),
        "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1" => ok("pull-role"),
        "POST / HTTP/1.1" => ok(&ecr_answer("AWS:p", NOW + 43_200)),
        _ => metadata_key(),
    });
    let fake = fake.await;
    let ambient = AmbientConfig { aws: Some(AwsEnvironment::default()), ..AmbientConfig::default() };
    let client = client(MintClientConfig { timeout: Duration::from_mins(10), ..with_metadata(&fake, ambient) });
    let source = ambient_ecr(&fake);
    let mints = (0..20).map(|_| mint_by(&client, &source, REGISTRY, MintTrigger::Schedule));
    let results = futures_util::future::join_all(mints).await;
    let sessions = fake.requests().iter().filter(|request| request.starts_with("PUT ")).count();
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), sessions);
    assert!(results.iter().all(|result| result.as_ref().err().is_none_or(|error| error.is_deferral)), "{results:?}");
    assert!(sessions > 0 && sessions < 20);
}
