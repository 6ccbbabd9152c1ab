//! Request of a manifest, as a container runtime makes it.

use http::header;
use reqwest::Method;
use serde::Deserialize;

use super::{
    Access, Auth, Challenge, Found, LoginCheck, MANIFEST_TYPES, RegistryEndpoint, RegistryResponse, Step,
    TAKEN_FOR_ANONYMOUS, TokenResponse, TokenService, access_of, challenge, denied, end, not_a_registry,
};
use crate::{
    clients::registry::{PullQuestion, token::Recognition},
    domain::{
        diagnosis::{ManifestState, Platform, PullReport},
        registry::{RegistryScope, RepositoryName},
    },
};

/// Maximum number of platforms of a manifest list.
const PLATFORMS_MAX: usize = 64;

const LOGIN_REQUIRED: &str = "the registry requires a login for this image";

impl LoginCheck<'_> {
    /// Requests a manifest, with the login if the question has one.
    pub(in crate::clients::registry) async fn pull(
        &self,
        repository: &RepositoryName,
        question: &PullQuestion<'_>,
    ) -> Step<PullReport> {
        let registry = self.registry().await?;
        let root = self.get_root(&registry, &Auth::None).await?;
        let pull = Pull { check: self, registry: &registry, repository, question };
        match root.status.as_u16() {
            200 => {
                self.require_registry(&registry, root).await?;
                pull.without_challenge().await
            }
            401 => match challenge::parse(root.challenges()) {
                Some(challenge) => pull.answer(challenge, false).await,
                None => end(
                    Found::NotARegistry,
                    format!("{} requests an authentication scheme that registries do not use", registry.label()),
                ),
            },
            403 => end(
                Found::NoAccess,
                format!("{} refuses this host before any login (403): check for a firewall", registry.label()),
            ),
            400 if self.login.plain_http => {
                Err(self.explain_bad_request(&registry, root).await.unwrap_or_else(|finding| finding))
            }
            status => not_a_registry(&registry, status),
        }
    }
}

/// One request of a manifest.
struct Pull<'p, 'a> {
    check: &'p LoginCheck<'a>,
    registry: &'p RegistryEndpoint<'a>,
    repository: &'p RepositoryName,
    question: &'p PullQuestion<'p>,
}

impl Pull<'_, '_> {
    /// A registry whose root admits clients without a login.
    async fn without_challenge(&self) -> Step<PullReport> {
        let head = self.head(&Auth::None).await?;
        match access_of(&head) {
            Some(Access::Denied(Some(challenge))) => self.answer(challenge, true).await,
            Some(Access::Denied(None)) => end(Found::NoAccess, LOGIN_REQUIRED),
            access => self.conclude(access, head, &Auth::None, Found::Anonymous).await,
        }
    }

    /// `is_open` tells that the root admits clients without a login, so that its answer proves nothing.
    async fn answer(&self, challenge: Challenge, is_open: bool) -> Step<PullReport> {
        match (challenge, self.question.login) {
            (Challenge::Basic, None) => end(Found::NoAccess, LOGIN_REQUIRED),
            (Challenge::Basic, Some(_)) => self.with_basic(is_open).await,
            (Challenge::Bearer { realm, service }, _) => self.with_token(&realm, service.as_deref()).await,
        }
    }

    async fn with_basic(&self, is_open: bool) -> Step<PullReport> {
        let head = self.head(&Auth::Basic).await?;
        match access_of(&head) {
            Some(Access::Denied(_)) if is_open && head.status.as_u16() == 401 => end(
                Found::Invalid,
                format!("the registry refuses this login for {} (401): it is wrong, or has no access", self.repository),
            ),
            Some(Access::Denied(_)) if is_open => {
                end(Found::NoAccess, format!("the registry does not let this login read {} (403)", self.repository))
            }
            Some(Access::Denied(_)) => {
                // Tells a wrong login from one without access.
                LoginCheck { repository: None, ..*self.check }.check_basic(self.registry).await?;
                end(Found::NoAccess, denied(self.repository))
            }
            access => self.conclude(access, head, &Auth::Basic, Found::Valid).await,
        }
    }

    async fn with_token(&self, realm: &str, service: Option<&str>) -> Step<PullReport> {
        let check = self.check;
        let realm = check.parse_realm(realm)?;
        // Without TLS, a login leaves this host for nothing but this host.
        let is_own_host =
            RegistryScope::parse(realm.host_str().unwrap_or_default()).is_ok_and(|scope| scope.is_loopback());
        if realm.scheme() != "https" && !is_own_host {
            return end(Found::Refused, "the registry names a token service without TLS at another host");
        }
        let other = check.token_endpoint(self.registry, &realm).await?;
        let tokens = TokenService { check, endpoint: other.as_ref().unwrap_or(self.registry), realm, service };
        let scope = format!("repository:{}:pull", self.repository);
        let has_login = self.question.login.is_some();
        let response = if has_login {
            tokens.token_for_login(Some(&scope)).await?
        } else {
            tokens.anonymous_token(Some(&scope)).await?
        };
        let token = match response {
            TokenResponse::Token(token) => token,
            TokenResponse::Refused(_) if !has_login => return end(Found::NoAccess, LOGIN_REQUIRED),
            TokenResponse::Refused(status) => {
                return Err(check.token_refused(&tokens, status).await.unwrap_or_else(|finding| finding));
            }
            TokenResponse::MethodNotSupported => {
                return end(Found::NotARegistry, "the registry names a token service that does not exist (404)");
            }
        };
        let auth = Auth::Bearer(&token);
        let head = self.head(&auth).await?;
        let access = access_of(&head);
        if !matches!(access, Some(Access::Denied(_) | Access::Missing)) {
            let result = if has_login { Found::Valid } else { Found::Anonymous };
            return self.conclude(access, head, &auth, result).await;
        }
        if !has_login {
            return match access {
                Some(Access::Missing) => self.conclude(access, head, &auth, Found::Anonymous).await,
                _ => end(Found::NoAccess, LOGIN_REQUIRED),
            };
        }
        let anonymous = match tokens.anonymous_token(Some(&scope)).await {
            Ok(TokenResponse::Token(token)) => Some(token),
            Ok(TokenResponse::Refused(_) | TokenResponse::MethodNotSupported) => None,
            Err(finding) if finding.result == Found::NotARegistry => None,
            Err(finding) => return Err(finding),
        };
        let is_recognized = check.refuses_wrong_logins(&tokens.realm)
            || token.recognition(anonymous.as_ref()) != Recognition::Anonymous;
        match access {
            _ if !is_recognized => end(Found::Invalid, TAKEN_FOR_ANONYMOUS),
            Some(Access::Missing) => self.conclude(access, head, &auth, Found::Valid).await,
            _ => end(Found::NoAccess, denied(self.repository)),
        }
    }

    async fn head(&self, auth: &Auth<'_>) -> Step<RegistryResponse> {
        self.manifest(Method::HEAD, auth).await
    }

    async fn manifest(&self, method: Method, auth: &Auth<'_>) -> Step<RegistryResponse> {
        let path = format!("{}/manifests/{}", self.repository, self.question.image.version());
        let request = self.check.request(self.registry, method, &path, auth);
        self.registry.send(request.header(header::ACCEPT, MANIFEST_TYPES)).await
    }

    async fn conclude(
        &self,
        access: Option<Access>,
        head: RegistryResponse,
        auth: &Auth<'_>,
        result: Found,
    ) -> Step<PullReport> {
        match access {
            Some(Access::Granted) => {
                let mut report = PullReport::new(result, "the registry delivers the image", ManifestState::Found);
                if self.question.wants_platforms && is_list(head.header("content-type")) {
                    report.platforms = self.platforms(auth).await?;
                }
                Ok(report)
            }
            Some(Access::Missing) => {
                let version = self.question.image.version();
                let detail = format!("{} has no `{version}`, or this client may not see it (404)", self.repository);
                Ok(PullReport::new(result, detail, ManifestState::Missing))
            }
            Some(Access::Denied(_)) | None => end(Found::NotARegistry, "the registry does not answer for repositories"),
        }
    }

    async fn platforms(&self, auth: &Auth<'_>) -> Step<Vec<Platform>> {
        let response = self.manifest(Method::GET, auth).await?;
        if response.status.as_u16() != 200 {
            return Ok(Vec::new());
        }
        Ok(platforms(&self.registry.read_body(response).await?))
    }
}

fn is_list(content_type: &str) -> bool {
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"]
        .iter()
        .any(|list| content_type.starts_with(list))
}

/// Platforms of a manifest list; none if it cannot be read.
fn platforms(list: &[u8]) -> Vec<Platform> {
    #[derive(Deserialize)]
    struct List {
        manifests: Vec<Manifest>,
    }
    #[derive(Deserialize)]
    struct Manifest {
        platform: Option<Words>,
    }
    #[derive(Deserialize)]
    struct Words {
        #[serde(default)]
        os: String,
        #[serde(default)]
        architecture: String,
    }
    let list: Option<List> = serde_json::from_slice(list).ok();
    let manifests = list.into_iter().flat_map(|list| list.manifests).take(PLATFORMS_MAX);
    manifests
        .filter_map(|one| one.platform)
        .filter_map(|words| Platform::parse(&words.os, &words.architecture))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_of_a_list_are_read_and_other_text_is_not() {
        let list = br#"{"manifests":[{"platform":{"os":"linux","architecture":"amd64"}},{},
            {"platform":{"os":"unknown","architecture":"unknown"}},
            {"platform":{"os":"linux","architecture":"CANARY CANARY"}}]}"#;
        let read: Vec<String> = platforms(list).iter().map(ToString::to_string).collect();
        assert_eq!(read, ["linux/amd64"]);
        assert!(platforms(b"[]").is_empty() && platforms(b"<html>").is_empty());
    }
}
