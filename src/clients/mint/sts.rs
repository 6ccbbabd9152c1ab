//! AWS STS: temporary keys.

use secrecy::{ExposeSecret, SecretString};

use super::{
    answer::Answer,
    attempt::{Attempt, FORM, Target, form},
    xml::Xml,
};
use crate::domain::mint::{AssumeRole, EcrSource, MintError, aws::AwsKey};

const VERSION: &str = "2011-06-15";
/// Name of the sessions.
const SESSION_NAME: &str = "regcred";
/// Lifetime of a key, in seconds: the shortest that STS grants. It is used within seconds.
const DURATION: &str = "900";

impl Attempt<'_> {
    /// Assumes a role with a key.
    pub(super) async fn assume_role(
        &self,
        source: &EcrSource,
        role: &AssumeRole,
        key: &AwsKey,
    ) -> Result<AwsKey, MintError> {
        let target = self.sts(source)?;
        let mut pairs = parameters("AssumeRole", &role.role_arn).to_vec();
        pairs.extend(role.external_id.as_deref().map(|id| ("ExternalId", id)));
        let headers = [("content-type", FORM)];
        parse(&self.signed_post(&target, &source.region, "sts", key, &headers, &form(&pairs)).await?)
    }

    /// Assumes a role with a token of a `ServiceAccount`. The request has no signature.
    pub(super) async fn assume_role_with_web_identity(
        &self,
        source: &EcrSource,
        role_arn: &str,
        token: &SecretString,
    ) -> Result<AwsKey, MintError> {
        let target = self.sts(source)?;
        let mut pairs = parameters("AssumeRoleWithWebIdentity", role_arn).to_vec();
        pairs.push(("WebIdentityToken", token.expose_secret()));
        parse(&self.post_form(&target, &pairs).await?)
    }

    fn sts(&self, source: &EcrSource) -> Result<Target, MintError> {
        let own = format!("https://{}", source.region.sts_host(source.fips));
        self.provider_target(&own, source.sts_endpoint.as_ref(), "/", "AWS STS")
    }
}

/// Parameters of both actions.
const fn parameters<'a>(action: &'a str, role_arn: &'a str) -> [(&'a str, &'a str); 5] {
    [
        ("Action", action),
        ("Version", VERSION),
        ("RoleArn", role_arn),
        ("RoleSessionName", SESSION_NAME),
        ("DurationSeconds", DURATION),
    ]
}

/// Reads the key of a successful answer.
fn parse(answer: &Answer) -> Result<AwsKey, MintError> {
    let text = answer.text()?;
    let xml = Xml::parse(text).ok_or_else(|| answer.malformed("is not XML"))?;
    let member = |name| xml.text("Credentials", name).ok_or_else(|| answer.malformed("lacks a key"));
    Ok(AwsKey {
        access_key_id: member("AccessKeyId")?.to_owned(),
        secret_access_key: SecretString::from(member("SecretAccessKey")?),
        session_token: Some(SecretString::from(member("SessionToken")?)),
    })
}
