//! Accounts that a reader uses for an image or a registry.

use std::{cmp::Reverse, collections::HashMap, fmt};

use super::{
    Address, ImageName,
    explain::{entries, search},
    lint::lint_host_without_dot,
};
use crate::domain::{
    docker_config::{Consumer, Profile, ScopedAccount, Warning, WarningCode, key_for, parse::Form, split_collisions},
    registry::RegistryScope,
};

/// What accounts are wanted for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MatchTarget {
    /// One image.
    Image(ImageName),
    /// Every image of a registry, or of a part of one.
    Registry(RegistryScope),
}

/// Accounts that a reader uses, in the order of its attempts.
#[derive(Debug)]
pub struct Used<T> {
    /// The accounts.
    pub accounts: Vec<T>,
    /// Accounts with the key of an older one, and the absence of any account.
    pub warnings: Vec<Warning>,
}

impl MatchTarget {
    /// Returns the scopes that cover the target: its registry, and each part of it that contains
    /// the target. Every account for the target has one of them.
    #[must_use]
    pub fn covering_scopes(&self) -> Vec<String> {
        let (authority, path) = match self {
            Self::Image(image) => (image.registry(), Some(image.repository())),
            Self::Registry(scope) => (scope.authority(), scope.path()),
        };
        let mut scope = authority.to_owned();
        let mut scopes = vec![scope.clone()];
        for segment in path.into_iter().flat_map(|path| path.split('/')) {
            scope.push('/');
            scope.push_str(segment);
            scopes.push(scope.clone());
        }
        scopes
    }

    /// An image that stands for the target. For a registry, no account can be for a longer path: a
    /// path does not start with `_`.
    fn image(&self) -> ImageName {
        match self {
            Self::Image(image) => image.clone(),
            Self::Registry(scope) => {
                let repository = scope.path().map_or_else(|| "_".to_owned(), |path| format!("{path}/_"));
                ImageName::assume(scope.authority(), &repository)
            }
        }
    }
}

impl fmt::Display for MatchTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(image) => image.fmt(f),
            Self::Registry(scope) => scope.fmt(f),
        }
    }
}

/// Chooses the accounts that are for the target and that the reader of the profile finds: all of
/// them for the kubelet, which tries each, and else the one that is used.
///
/// `accounts` is ordered from old to new: of accounts with one key, the oldest is used. For the
/// docker CLI, which matches hosts only, it is the one with the longest path.
#[must_use]
pub fn used_accounts<T>(
    profile: Profile,
    accounts: Vec<T>,
    target: &MatchTarget,
    scoped: impl for<'a> Fn(&'a T) -> ScopedAccount<'a>,
) -> Used<T> {
    let (image, consumer) = (target.image(), profile.consumer());
    let covers = |scope: &str| Address::of(scope).covers(&image) && lint_host_without_dot(scope).is_none();
    let mut covering: Vec<T> = accounts.into_iter().filter(|one| covers(scoped(one).scope.as_str())).collect();
    // Stable: accounts with one scope stay ordered by age.
    covering.sort_by_key(|one| Reverse(scoped(one).scope.as_str().len()));
    let (kept, left_out) = split_collisions(profile, covering, |one| scoped(one).scope);
    let order = {
        let kept: Vec<ScopedAccount<'_>> = kept.iter().map(&scoped).collect();
        let candidates = entries(consumer, &kept).unwrap_or_default();
        let found = search(consumer, &candidates, Form::DockerConfigJson, &image).order.into_iter();
        let used = found.filter_map(|at| candidates.get(at)?.account.map(str::to_owned));
        let limit = if consumer == Consumer::Kubernetes { usize::MAX } else { 1 };
        used.take(limit).collect::<Vec<_>>()
    };
    let mut by_name: HashMap<String, T> = kept.into_iter().map(|one| (scoped(&one).name.to_owned(), one)).collect();
    let accounts: Vec<T> = order.iter().filter_map(|name| by_name.remove(name)).collect();
    let mut warnings = Vec::new();
    for one in left_out.iter().map(&scoped) {
        if let Some(older) = accounts.iter().map(&scoped).find(|used| used.scope == one.scope) {
            let detail = format!("not used: the older account `{}` has the same key", older.name);
            let key = key_for(profile, one.scope);
            warnings.push(Warning::new(WarningCode::KeyCollision, Some(one.name), key, detail));
        }
    }
    if accounts.is_empty() {
        let detail = format!("none of the accounts that are granted to you is for `{target}`");
        warnings.push(Warning::of_all(WarningCode::NothingMatches, detail));
    }
    Used { accounts, warnings }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;
    use crate::domain::matching::explain_accounts;

    type Named = (String, RegistryScope);

    fn scoped(account: &Named) -> ScopedAccount<'_> {
        ScopedAccount { name: &account.0, scope: &account.1 }
    }

    fn used(profile: Profile, scopes: &[&str], target: &MatchTarget) -> Used<Named> {
        let accounts = scopes.iter().enumerate();
        let accounts = accounts.map(|(at, scope)| (format!("{at}:{scope}"), RegistryScope::parse(scope).unwrap()));
        used_accounts(profile, accounts.collect(), target, scoped)
    }

    fn image(written: &str) -> MatchTarget {
        MatchTarget::Image(ImageName::parse(written).unwrap())
    }

    fn names(used: &Used<Named>) -> Vec<&str> {
        used.accounts.iter().map(|(name, _)| name.split_once(':').map_or("", |(_, scope)| scope)).collect()
    }

    const SCOPES: [&str; 7] =
        ["reg.io", "reg.io/team", "reg.io/team/app", "reg.io/te", "reg.io/other", "docker.io", "docker.io/acme"];

    #[rstest]
    #[case(Profile::Kubernetes, "reg.io/team/app:1", &["reg.io/team/app", "reg.io/team", "reg.io"])]
    #[case(Profile::Dockercfg, "reg.io/team/app:1", &["reg.io/team/app", "reg.io/team", "reg.io"])]
    #[case(Profile::Podman, "reg.io/team/app:1", &["reg.io/team/app"])]
    #[case(Profile::Docker, "reg.io/team/app:1", &["reg.io/team/app"])]
    #[case(Profile::DockerAuthConfig, "reg.io/team/x", &["reg.io/team"])]
    #[case(Profile::Docker, "reg.io/x", &["reg.io"])]
    #[case(Profile::Docker, "acme/app", &["docker.io/acme"])]
    #[case(Profile::Docker, "nginx", &["docker.io"])]
    #[case(Profile::Kubernetes, "acme/app", &["docker.io/acme", "docker.io"])]
    #[case(Profile::Kubernetes, "acmeworks/app", &["docker.io"])]
    #[case(Profile::Podman, "quay.io/app", &[])]
    #[case(Profile::Kubernetes, "reg.io:443/app", &[])]
    fn reader_uses_the_accounts_for_the_image(
        #[case] profile: Profile,
        #[case] written: &str,
        #[case] expected: &[&str],
    ) {
        let used = used(profile, &SCOPES, &image(written));
        assert_eq!(names(&used), expected);
        let codes: Vec<_> = used.warnings.iter().map(|warning| warning.code).collect();
        assert_eq!(codes, if expected.is_empty() { vec![WarningCode::NothingMatches] } else { Vec::new() });
    }

    #[rstest]
    #[case("reg.io", &["reg.io"])]
    #[case("https://reg.io/team/", &["reg.io/team", "reg.io"])]
    #[case("index.docker.io", &["docker.io"])]
    #[case("https://index.docker.io/v1/", &["docker.io"])]
    #[case("docker.io/acme", &["docker.io/acme", "docker.io"])]
    #[case("quay.io", &[])]
    fn registry_has_the_accounts_for_all_of_it(#[case] written: &str, #[case] expected: &[&str]) {
        let target = MatchTarget::Registry(RegistryScope::parse(written).unwrap());
        assert_eq!(names(&used(Profile::Kubernetes, &SCOPES, &target)), expected);
        let first: Vec<_> = expected.iter().take(1).copied().collect();
        for profile in [Profile::Docker, Profile::DockerAuthConfig, Profile::Podman] {
            assert_eq!(names(&used(profile, &SCOPES, &target)), first, "{profile}");
        }
    }

    #[test]
    fn oldest_account_of_a_scope_is_used_and_others_are_named() {
        for profile in Profile::ALL {
            let used = used(profile, &["reg.io", "reg.io/x", "reg.io"], &image("reg.io/app"));
            assert_eq!(used.accounts.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["0:reg.io"]);
            let [warning] = &used.warnings[..] else { panic!("one warning: {:?}", used.warnings) };
            assert_eq!((warning.code, warning.account.as_deref()), (WarningCode::KeyCollision, Some("2:reg.io")));
        }
    }

    #[test]
    fn host_without_dot_is_for_no_image() {
        let target = MatchTarget::Registry(RegistryScope::parse("harbor").unwrap());
        assert!(used(Profile::Docker, &["harbor"], &target).accounts.is_empty());
        assert!(used(Profile::Docker, &["harbor"], &image("harbor/app")).accounts.is_empty());
        assert_eq!(names(&used(Profile::Docker, &["localhost"], &image("localhost/app"))), ["localhost"]);
    }

    proptest! {
        /// The explanation of the chosen accounts says that the reader uses exactly these.
        #[test]
        fn explanation_agrees(
            scopes in proptest::collection::vec("(reg\\.io|docker\\.io|reg\\.io:5000)(/[ab]){0,3}", 0..8),
            written in "(reg\\.io/|reg\\.io:5000/|docker\\.io/|)[ab](/[ab]){0,3}",
        ) {
            let scopes: Vec<&str> = scopes.iter().map(String::as_str).collect();
            let target = image(&written);
            let MatchTarget::Image(name) = &target else { unreachable!() };
            for profile in Profile::ALL {
                let used = used(profile, &scopes, &target);
                let accounts: Vec<_> = used.accounts.iter().map(scoped).collect();
                let explained = explain_accounts(&accounts, name);
                let look_up = explained.consumers.get(profile.consumer());
                let expected: Vec<_> = accounts.iter().map(|account| account.name).collect();
                prop_assert_eq!(&look_up.accounts, &expected);
                prop_assert_eq!(look_up.verdict.usable, !expected.is_empty());
                // Every account for the image is found by the scopes that the database is asked for.
                let covering = target.covering_scopes();
                prop_assert!(accounts.iter().all(|account| covering.iter().any(|one| one == account.scope.as_str())));
                // One exists if and only if a scope covers the image.
                let is_covered = scopes.iter().any(|scope| covering.iter().any(|one| one == scope));
                prop_assert_eq!(!expected.is_empty(), is_covered);
            }
        }
    }
}
