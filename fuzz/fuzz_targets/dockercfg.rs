//! Legacy `.dockercfg`: logins built from the input survive rendering and parsing.

#![no_main]

use libfuzzer_sys::fuzz_target;
use regcred::domain::{
    docker_config::{
        Profile,
        import::FoundAccount,
        parse::{Config, Form},
    },
    registry::RegistryScope,
};
use regcred_fuzz::{
    RECORD_SEPARATOR, UNIT_SEPARATOR, limited,
    logins::{assert_contains, rendered},
};
use secrecy::{ExposeSecret, SecretString};

fuzz_target!(|input: &[u8]| limited(|| {
    let Ok(text) = str::from_utf8(input) else { return };
    let accounts: Vec<FoundAccount> = text.split(RECORD_SEPARATOR).filter_map(account).collect();
    for profile in [Profile::Dockercfg, Profile::Kubernetes] {
        let Some(rendered) = rendered(profile, &accounts) else { continue };
        let document = rendered.document.expose_secret().as_bytes();
        assert_contains(profile, document, &accounts);
        let is_bare = Config::parse(document).is_ok_and(|config| config.form == Form::Dockercfg);
        assert!(!is_bare || profile == Profile::Dockercfg);
    }
}));

/// An account with registry, user name, password and perhaps mail address. `None` if an import would
/// skip it.
fn account(record: &str) -> Option<FoundAccount> {
    let mut fields = record.split(UNIT_SEPARATOR);
    let scope = RegistryScope::parse(fields.next()?).ok()?;
    let (username, password) = (fields.next()?.to_owned(), fields.next()?);
    let email = fields.next().map(str::to_owned);
    if username.is_empty() || username.contains(':') || password.is_empty() {
        return None;
    }
    let password = SecretString::from(password);
    Some(FoundAccount { scope, plain_http: false, username, password, email, left_out: Vec::new() })
}
