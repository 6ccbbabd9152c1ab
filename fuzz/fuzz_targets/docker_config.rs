//! Docker configs in every form, and the round trip of their logins through every profile.

#![no_main]

use libfuzzer_sys::fuzz_target;
use regcred::domain::{
    docker_config::{Consumer, Profile, parse::Config, reading::read},
    matching::lint::lint_config,
};
use regcred_fuzz::{
    limited,
    logins::{assert_contains, found, rendered},
};
use secrecy::ExposeSecret;

fuzz_target!(|input: &[u8]| limited(|| {
    let config = match Config::parse(input) {
        Ok(config) => config,
        Err(error) => {
            assert!(error.to_string().len() < 1000, "{error}");
            return;
        }
    };
    let _ = lint_config(&config);
    for entry in &config.entries {
        for consumer in Consumer::ALL {
            let _ = read(consumer, entry);
        }
    }
    let accounts = found(&config);
    for profile in Profile::ALL {
        if let Some(rendered) = rendered(profile, &accounts) {
            assert_contains(profile, rendered.document.expose_secret().as_bytes(), &accounts);
        }
    }
}));
