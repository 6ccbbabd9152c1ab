//! Kubeconfigs: everything but a self-contained credential is refused, and no refusal is long or
//! changes the lines of a log.

#![no_main]

use libfuzzer_sys::fuzz_target;
use regcred::clients::cluster::kubeconfig;
use regcred_fuzz::limited;
use secrecy::SecretString;

fuzz_target!(|input: &[u8]| limited(|| {
    let Ok(text) = str::from_utf8(input) else { return };
    let text = SecretString::from(text);
    for (context, allow_plain_http) in [(None, false), (Some("dev"), true)] {
        let Err(errors) = kubeconfig::parse(&text, context, allow_plain_http) else { continue };
        assert!(!errors.is_empty());
        for error in errors {
            assert!(["kubeconfig", "context"].contains(&error.field.as_str()), "{error:?}");
            assert!(error.detail.len() < 4000 && !error.detail.chars().any(char::is_control), "{error:?}");
        }
    }
}));
