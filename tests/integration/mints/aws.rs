//! ECR logins from ministack, which checks signatures, policies and trust policies, and from moto,
//! which checks signatures and issues logins that have expired.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::atomic::{AtomicBool, Ordering},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, TimeDelta, Utc};
use regcred::{
    clients::{
        mint::{AmbientConfig, AwsEnvironment, MetadataConfig, MintClient, MintClientConfig},
        outbound::Guard,
    },
    domain::mint::{MintError, MintReason, Minted},
};
use serde_json::{Value, json};

use super::{
    direct_mint, mint_by,
    peers::{Peer, run_script},
};
use crate::{
    support::listener::{listen, read_request},
    verify::listening::answer,
};

const REGISTRY: &str = "000000000000.dkr.ecr.eu-central-1.amazonaws.com";
const ROLES: &str = "arn:aws:iam::000000000000:role";

type Mint = Result<(Minted, String), MintError>;

/// Creates the users and roles of a peer, and returns their keys.
fn identities(peer: &Peer, arguments: &[&str]) -> Value {
    let arguments: Vec<&str> = [peer.url.as_str()].iter().chain(arguments).copied().collect();
    run_script("aws-peers", "aws_identities.py", &arguments, &Value::Null)
}

fn source(endpoint: &str, identity: &Value) -> Value {
    json!({
        "type": "ecr", "region": "eu-central-1", "endpoint": endpoint, "stsEndpoint": endpoint, "identity": identity,
    })
}

fn access_key(key: &Value) -> Value {
    json!({"type": "accessKey", "accessKeyId": key["id"], "secretAccessKey": key["secret"]})
}

async fn mint(source: &Value) -> Mint {
    direct_mint(MintClientConfig::default(), source, None, REGISTRY, None).await
}

/// A login that is valid for twelve hours.
#[track_caller]
fn assert_login(minted: Mint) {
    let (minted, password) = minted.expect("a login");
    assert_eq!(minted.username.as_str(), "AWS");
    assert!(!password.is_empty());
    // The peers state whole seconds.
    let off = minted.validity.lifetime.as_secs_f64() - 43_200.0;
    assert!(off.abs() <= 5.0, "{:?}", minted.validity.lifetime);
}

#[track_caller]
fn assert_refused(minted: Mint, reason: MintReason) {
    let error = minted.expect_err("a refusal");
    assert_eq!(error.reason, reason, "{}", error.detail);
}

fn hour_ahead() -> DateTime<Utc> {
    Utc::now() + TimeDelta::hours(1)
}

fn twenty_minutes_behind() -> DateTime<Utc> {
    Utc::now() - TimeDelta::minutes(20)
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn ministack_accepts_signatures_and_policies_decide() {
    let peer = Peer::ministack().await;
    let keys = identities(&peer, &["--roles"]);
    let source = source(&peer.url, &access_key(&keys["pull"]));
    assert_login(mint(&source).await);

    let wrong = json!({"id": keys["pull"]["id"], "secret": "wrong"});
    assert_refused(mint(&self::source(&peer.url, &access_key(&wrong))).await, MintReason::InvalidIdentity);
    assert_refused(mint(&self::source(&peer.url, &access_key(&keys["denied"]))).await, MintReason::Denied);

    let mut assumed = source.clone();
    assumed["assumeRole"] = json!({"roleArn": format!("{ROLES}/assumed"), "externalId": "external-1"});
    assert_login(mint(&assumed).await);
    assumed["assumeRole"]["externalId"] = json!("external-2");
    assert_refused(mint(&assumed).await, MintReason::Denied);

    assert_wrong_clock_is_corrected(&source).await;
    assert_throttled_mint_succeeds_later(&peer, &keys["pull"]).await;
    assert_subject_of_a_web_identity_is_trusted(&peer).await;
}

/// ministack refuses signatures that are 15 minutes off.
async fn assert_wrong_clock_is_corrected(source: &Value) {
    for now in [hour_ahead, twenty_minutes_behind] {
        let config = MintClientConfig { now, ..MintClientConfig::default() };
        let client = MintClient::new(|| Guard::new("127.0.0.1".parse().expect("an address")), config);
        assert_login(mint_by(&client, source, None, REGISTRY, None).await);
        // Each dated answer tells it.
        let offset = client.clock_offset_max() + (now() - Utc::now());
        assert!(offset.abs() < TimeDelta::minutes(1), "{offset}");
    }
}

async fn assert_throttled_mint_succeeds_later(peer: &Peer, key: &Value) {
    let (behind, is_first) = (peer.url.trim_start_matches("http://").to_owned(), AtomicBool::new(true));
    let front = listen(move |mut stream| {
        let request = read_request(&stream);
        let response = if is_first.swap(false, Ordering::SeqCst) {
            let body = json!({"__type": "ThrottlingException", "message": "Rate exceeded"});
            answer("400 Bad Request", &[("Content-Type", "application/x-amz-json-1.1")], &body.to_string())
        } else {
            forward(&behind, &request)
        };
        let _ = stream.write_all(&response);
    });
    let source = source(&format!("http://{front}"), &access_key(key));
    assert_refused(mint(&source).await, MintReason::Throttled);
    assert_login(mint(&source).await);
}

fn forward(server: &str, request: &str) -> Vec<u8> {
    let mut server = TcpStream::connect(server).expect("a connection");
    let request = request.replacen("\r\n", "\r\nconnection: close\r\n", 1);
    server.write_all(request.as_bytes()).expect("sent");
    let mut response = Vec::new();
    server.read_to_end(&mut response).expect("a response");
    response
}

async fn assert_subject_of_a_web_identity_is_trusted(peer: &Peer) {
    let identity = json!({"type": "webIdentity", "cluster": "dev", "namespace": "regcred", "serviceAccount": "pull"});
    let mut source = source(&peer.url, &identity);
    source["assumeRole"] = json!({"roleArn": format!("{ROLES}/federated")});
    let mint = async |subject: &str| {
        let encode = |value: Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let expires_at = Utc::now().timestamp() + 600;
        let claims =
            json!({"iss": "https://issuer.example", "aud": "sts.amazonaws.com", "sub": subject, "exp": expires_at});
        let token = format!("{}.{}.c2ln", encode(json!({"alg": "RS256"})), encode(claims));
        direct_mint(MintClientConfig::default(), &source, Some(&token), REGISTRY, None).await
    };
    assert_login(mint("system:serviceaccount:regcred:pull").await);
    assert_refused(mint("system:serviceaccount:regcred:other").await, MintReason::Denied);
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn ministack_gives_the_key_of_the_instance_to_a_session() {
    let peer = Peer::ministack_instance().await;
    let metadata = MetadataConfig {
        instance: peer.url.clone(),
        containers: Vec::new(),
        allowed: "127.0.0.1".parse().expect("an address"),
    };
    let ambient = AmbientConfig { aws: Some(AwsEnvironment::default()), ..AmbientConfig::default() };
    let config = MintClientConfig { ambient, metadata, ..MintClientConfig::default() };

    let source = source(&peer.url, &json!({"type": "ambient"}));
    assert_login(direct_mint(config, &source, None, REGISTRY, None).await);
    let plain = reqwest::get(format!("{}/latest/meta-data/iam/security-credentials/", peer.url)).await;
    assert_eq!(plain.expect("an answer").status(), 401);
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn login_of_moto_has_expired_on_arrival() {
    let peer = Peer::moto().await;
    let keys = identities(&peer, &[]);
    assert_refused(mint(&source(&peer.url, &access_key(&keys["pull"]))).await, MintReason::ExpiredOnArrival);
    let wrong = json!({"id": keys["pull"]["id"], "secret": "wrong"});
    assert_refused(mint(&source(&peer.url, &access_key(&wrong))).await, MintReason::InvalidIdentity);
}
