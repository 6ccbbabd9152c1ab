//! Values of each kind of resource that audit events record: what decides who may do what, and
//! where secrets go. Never a secret value. User names and e-mail addresses are not recorded either:
//! events are never deleted.

use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    crypto::fingerprint,
    domain::{
        account::Account,
        audit::changes::RecordedFields,
        caller::NewApiKey,
        cluster::CaCertificate,
        grants::GrantsDocument,
        identity_provider::{AuthMethod, ProviderConfig, RuleDocument},
        mint::StoredSource,
        pull_secret::Declaration,
    },
    storage::clusters::StoredCluster,
};

pub fn account(account: &Account) -> RecordedFields {
    RecordedFields::default()
        .with("registry", account.registry.as_str())
        .with("plainHttp", account.plain_http)
        .with("caCertificate", fingerprints(account.ca_certificate.as_ref()))
        .with("source", account.source().map(destinations))
        .with_labels(account.labels.as_map())
}

/// Where the secret or the token of a source is shown, and for what. Ids of clients may be names of
/// people.
fn destinations(source: &StoredSource) -> Value {
    let source = source.document();
    let identity = &source["identity"];
    json!({
        "type": source["type"], "region": source["region"], "endpoint": source["endpoint"],
        "stsEndpoint": source["stsEndpoint"], "authority": source["authority"], "tokenUrl": source["tokenUrl"],
        "tenantId": source["tenantId"], "roleArn": source["assumeRole"]["roleArn"],
        "impersonate": source["impersonate"], "scope": source["scope"],
        "identity": identity["type"], "cluster": identity["cluster"], "namespace": identity["namespace"],
        "serviceAccount": identity["serviceAccount"], "audience": identity["audience"],
        "workloadIdentityProvider": identity["workloadIdentityProvider"],
    })
}

pub fn cluster(cluster: &StoredCluster) -> RecordedFields {
    let ca = cluster.ca_certificate.as_deref().and_then(|pem| CaCertificate::parse(pem).ok());
    RecordedFields::default()
        .with("server", cluster.server.as_deref())
        .with("caCertificate", fingerprints(ca.as_ref()))
        .with("tlsServerName", cluster.tls_server_name.as_deref())
        .with("allowPlainHttp", cluster.allow_plain_http)
        .with("auth.type", cluster.auth_type.as_str())
        .with("auth.serviceAccount", cluster.renewal.as_ref().map(|renewal| renewal.account.to_string()))
}

pub fn api_key(new: &NewApiKey) -> RecordedFields {
    RecordedFields::default()
        .with("role", new.role.as_str())
        .with("grants", json(&GrantsDocument::from(&new.grants)))
        .with("expiresAt", new.expires_at.map(|at| json(&at)))
        .with("sourceCidrs", Some(new.source_networks.to_texts()).filter(|networks| !networks.is_empty()))
}

pub fn provider(config: &ProviderConfig) -> RecordedFields {
    let rules: Vec<RuleDocument> = config.rules.iter().map(RuleDocument::from).collect();
    let fields = RecordedFields::default().with("audience", config.audience.as_str()).with("rules", json(&rules));
    match &config.auth_method {
        AuthMethod::Oidc { issuer, ca_certificate } => fields
            .with("issuer", issuer.to_string())
            .with("caCertificate", fingerprints(ca_certificate.as_ref()))
            .with("login.clientId", config.login.as_ref().map(ToString::to_string)),
        AuthMethod::TokenReview { cluster } => fields.with("cluster", cluster.as_str()),
    }
}

pub fn pull_secret(declaration: &Declaration) -> RecordedFields {
    let document = declaration.document();
    RecordedFields::default()
        .with("accounts", json(&document.accounts))
        .with("accountSelector", json(&document.account_selector))
        .with("secret", json(&document.secret))
        .with("targets", json(&document.targets))
        .with("serviceAccounts", json(&document.service_accounts))
        .with("deletionPolicy", json(&document.deletion_policy))
        .with("adopt", document.adopt)
}

/// SHA-256 fingerprints of a CA's certificates; `null` without a CA.
fn fingerprints(ca: Option<&CaCertificate>) -> Option<Vec<String>> {
    ca.map(fingerprint::of)
}

/// Types of the API serialise without errors.
fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_of_a_source_are_recorded_without_its_clients() {
        let recorded = |source: &Value| destinations(&StoredSource::parse(source.to_string()).unwrap());
        let google = recorded(&json!({
            "type": "googleArtifactRegistry", "impersonate": "pull@p.iam.gserviceaccount.com", "scope": "s",
            "identity": {"type": "webIdentity", "cluster": "dev", "namespace": "a", "serviceAccount": "pull",
                "audience": "x", "workloadIdentityProvider": "projects/1"},
        }));
        for (member, value) in [
            ("type", "googleArtifactRegistry"),
            ("impersonate", "pull@p.iam.gserviceaccount.com"),
            ("scope", "s"),
            ("identity", "webIdentity"),
            ("cluster", "dev"),
            ("namespace", "a"),
            ("serviceAccount", "pull"),
            ("audience", "x"),
            ("workloadIdentityProvider", "projects/1"),
        ] {
            assert_eq!(google[member], value, "{member}");
        }
        let role = json!({"roleArn": "arn", "externalId": "id"});
        let key = json!({"type": "accessKey", "accessKeyId": "lena"});
        let aws = recorded(&json!({"type": "ecr", "region": "r", "assumeRole": role, "identity": key}));
        assert_eq!((&aws["region"], &aws["roleArn"]), (&json!("r"), &json!("arn")));
        let client = json!({"type": "clientSecret", "clientId": "lena"});
        let azure = recorded(&json!({"type": "azureContainerRegistry", "tenantId": "t", "identity": client}));
        assert_eq!(azure["tenantId"], "t");
        assert!(!aws.to_string().contains("lena") && !azure.to_string().contains("lena"));
    }
}
