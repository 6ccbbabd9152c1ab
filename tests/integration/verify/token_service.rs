//! Token service as specified, whose tokens a real registry accepts, with optional deviations.

use std::path::Path;

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use base64::{Engine, prelude::*};
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};
use std::net::SocketAddr;

use super::listening::{Requests, answer, serve};

/// Deviations of a token service.
#[derive(Clone, Copy, Default)]
pub struct Deviations {
    /// Status for every GET.
    pub get_is: Option<&'static str>,
    /// Status for every POST.
    pub post_is: Option<&'static str>,
    /// Further deviation.
    pub quirk: Option<Quirk>,
}

/// Deviation of a token service in its tokens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Quirk {
    /// Anonymous clients get 401 instead of a token for public repositories.
    RefusesAnonymous,
    /// Tokens have no subject.
    OmitsSubject,
    /// The token is in `access_token`.
    UsesAccessToken,
    /// A valid login gets 403 for a repository that it may not read.
    RefusesScopes,
}

/// `martin` may read everything, `lena` nothing. `old` has expired (400), and `harbor` has expired
/// (200 with an empty token).
pub struct TokenService {
    pub address: SocketAddr,
    pub requests: Requests,
    /// Certificate of the signing key, PEM.
    pub certificate: String,
}

impl TokenService {
    pub fn start(deviations: Deviations) -> Self {
        let signer = Signer::new();
        let certificate = signer.certificate.clone();
        let (address, requests) = serve(move |request| respond(request, deviations, &signer));
        Self { address, requests, certificate }
    }

    pub fn realm(&self) -> String {
        format!("http://{}/token", self.address)
    }

    /// Writes the certificate to a file for a registry.
    pub fn write_certificate(&self, folder: &Path) -> std::path::PathBuf {
        let file = folder.join(format!("signer-{}.pem", self.address.port()));
        std::fs::write(&file, &self.certificate).expect("written");
        file
    }
}

struct Signer {
    pair: EcdsaKeyPair,
    certificate: String,
    der: String,
}

impl Signer {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let certificate = CertificateParams::new(["token service".to_owned()]).expect("a name");
        let certificate = certificate.self_signed(&key).expect("a certificate");
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der()).expect("a key");
        Self { pair, der: BASE64_STANDARD.encode(certificate.der()), certificate: certificate.pem() }
    }

    fn sign(&self, claims: &Value) -> String {
        let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let header = json!({"typ": "JWT", "alg": "ES256", "x5c": [self.der]});
        let text = format!("{}.{}", part(&header), part(claims));
        let signature = self.pair.sign(&SystemRandom::new(), text.as_bytes()).expect("a signature");
        format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

fn respond(request: &str, deviations: Deviations, signer: &Signer) -> Vec<u8> {
    let (head, body) = request.split_once("\r\n\r\n").unwrap_or((request, ""));
    let is_post = head.starts_with("POST");
    let target = head.split(' ').nth(1).unwrap_or_default();
    if let Some(status) = if is_post { deviations.post_is } else { deviations.get_is } {
        return answer(status, &[], "canary-upstream");
    }
    let query = if is_post { body } else { target.split_once('?').map_or("", |(_, query)| query) };
    let query: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let parameter = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let login = if is_post { posted_login(&parameter) } else { basic_login(head) };
    let refusal =
        |status: &str| answer(status, &[], r#"{"errors":[{"code":"UNAUTHORIZED","message":"canary-upstream"}]}"#);
    let subject = match login.as_ref().map(|(user, password)| (user.as_str(), password.as_str())) {
        None if deviations.quirk == Some(Quirk::RefusesAnonymous) => return refusal("401 Unauthorized"),
        None | Some(("harbor", _)) => "",
        Some(("martin", "canary-password") | ("<token>", "canary-identity")) => "martin",
        Some(("lena", "canary-password")) => "lena",
        Some(("old", _)) => return refusal("400 Bad Request"),
        Some(_) => return refusal("401 Unauthorized"),
    };
    let scope = parameter("scope").and_then(|scope| scope.strip_prefix("repository:")?.strip_suffix(":pull"));
    let has_public = deviations.quirk != Some(Quirk::RefusesAnonymous);
    let may_read = |name: &&str| subject == "martin" || (has_public && name.starts_with("team/"));
    if deviations.quirk == Some(Quirk::RefusesScopes) && scope.is_some_and(|name| !may_read(&name)) {
        return refusal("403 Forbidden");
    }
    let access: Vec<Value> = scope
        .filter(may_read)
        .map(|name| json!({"type": "repository", "name": name, "actions": ["pull"]}))
        .into_iter()
        .collect();
    let now = chrono::Utc::now().timestamp();
    let mut claims = json!({
        "iss": "test-issuer", "aud": parameter("service").unwrap_or_default(), "sub": subject,
        "iat": now, "nbf": now - 10, "exp": now + 300, "jti": uuid::Uuid::now_v7().to_string(), "access": access,
    });
    if deviations.quirk == Some(Quirk::OmitsSubject) {
        claims.as_object_mut().expect("an object").remove("sub");
    }
    let name = if deviations.quirk == Some(Quirk::UsesAccessToken) { "access_token" } else { "token" };
    answer(
        "200 OK",
        &[("Content-Type", "application/json")],
        &json!({name: signer.sign(&claims), "expires_in": 300}).to_string(),
    )
}

fn basic_login(head: &str) -> Option<(String, String)> {
    let line = head.lines().find_map(|line| line.strip_prefix("authorization: Basic "))?;
    let pair = String::from_utf8(BASE64_STANDARD.decode(line.trim()).ok()?).ok()?;
    pair.split_once(':').map(|(user, password)| (user.to_owned(), password.to_owned()))
}

fn posted_login<'a>(parameter: &impl Fn(&str) -> Option<&'a str>) -> Option<(String, String)> {
    match parameter("grant_type")? {
        "password" => Some((parameter("username")?.to_owned(), parameter("password")?.to_owned())),
        "refresh_token" => Some(("<token>".to_owned(), parameter("refresh_token")?.to_owned())),
        _ => None,
    }
}
