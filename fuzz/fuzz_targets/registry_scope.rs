//! Registries as written by a person or a docker config: each has one canonical spelling.

#![no_main]

use libfuzzer_sys::fuzz_target;
use regcred::domain::{
    docker_config::{Profile, key_for},
    registry::{RegistryScope, RepositoryName},
};
use regcred_fuzz::{first_line, limited};

fuzz_target!(|input: &[u8]| limited(|| {
    let (registry, repository) = first_line(input);
    let (Ok(registry), Ok(repository)) = (str::from_utf8(registry), str::from_utf8(repository)) else { return };
    let Ok(scope) = RegistryScope::parse(registry) else { return };
    assert_eq!(RegistryScope::parse(scope.as_str()).as_ref(), Ok(&scope));
    let port = scope.port().map(|port| format!(":{port}")).unwrap_or_default();
    let path = scope.path().map(|path| format!("/{path}")).unwrap_or_default();
    assert_eq!(scope.as_str(), format!("{}{port}{path}", scope.host()));
    assert_eq!(scope.authority(), format!("{}{port}", scope.host()));
    for profile in Profile::ALL {
        let of_key = RegistryScope::parse(key_for(profile, &scope)).expect("a key is a registry");
        assert_eq!(of_key.authority(), scope.authority());
    }
    if let Ok(repository) = RepositoryName::parse(repository, &scope) {
        assert!(!repository.as_str().contains("..") && !repository.as_str().starts_with('/'), "{repository:?}");
    }
}));
