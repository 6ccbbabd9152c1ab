//! Costs of single calls in process, each against plain work of the same size.

use std::{collections::BTreeMap, hint::black_box, sync::Arc, time::Instant};

use argon2::{Argon2, PasswordVerifier};
use base64::{Engine, prelude::BASE64_STANDARD};
use regcred::{
    crypto::{
        api_key::{KeyChecker, NewKey, PresentedKey, generate},
        pepper::{Pepper, Peppers},
    },
    domain::{
        docker_config::{Credential, Profile, ScopedAccount, render},
        matching::{ImageName, explain_accounts},
        registry::RegistryScope,
    },
};
use secrecy::{ExposeSecret, SecretString};

use crate::report::{Rounds, progress, row, table};

const ROUNDS: usize = 9;
/// Minimum duration of a round, in seconds.
const ROUND_SECONDS: f64 = 0.05;

/// Work and its baseline.
struct Case {
    name: String,
    work: Box<dyn Fn()>,
    plain: Box<dyn Fn()>,
}

/// Measures everything that needs no server. A new subject is a new entry in `cases`.
pub fn measure() -> anyhow::Result<()> {
    progress("rendering, explaining and checking keys in process");
    let cases = [
        render_case(1)?,
        render_case(10)?,
        render_case(100)?,
        explain_case(1_000)?,
        first_check_case()?,
        cached_check_case()?,
    ];
    let mut rows = vec![row(["", "µs", "plain µs", "times as long", "spread"])];
    for case in cases {
        let (mut work, mut plain) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            work.push(seconds(&case.work));
            plain.push(seconds(&case.plain));
        }
        let ratios: Rounds = work.iter().zip(&plain).map(|(work, plain)| work / plain).collect();
        let micros = |seconds: Vec<f64>| format!("{:.2}", seconds.into_iter().collect::<Rounds>().median() * 1e6);
        let [median, spread] = ratios.spread(2);
        rows.push(vec![case.name, micros(work), micros(plain), median, spread]);
    }
    table(
        "In process: render against serde_json writing a plain map of the same content, explain against a prefix search, \
         key checks against argon2id and HMAC",
        &rows,
    )?;
    Ok(())
}

/// Mean duration of one run, from as many runs as a round takes.
fn seconds(work: &dyn Fn()) -> f64 {
    let start = Instant::now();
    let mut runs = 0_u32;
    loop {
        for _ in 0..32 {
            work();
        }
        runs += 32;
        let took = start.elapsed().as_secs_f64();
        if took >= ROUND_SECONDS {
            return took / f64::from(runs);
        }
    }
}

struct Account {
    name: String,
    scope: RegistryScope,
    username: String,
    password: SecretString,
}

/// Rendering for Kubernetes, against `serde_json` writing prepared maps of the same text.
fn render_case(count: usize) -> anyhow::Result<Case> {
    let accounts = (0..count)
        .map(|n| {
            Ok(Account {
                name: format!("team-{n}"),
                scope: RegistryScope::parse(&format!("registry-{n}.example.com:5000/team"))?,
                username: format!("robot-{n}"),
                password: SecretString::from(format!("0123456789abcdef0123456789abcd{n:02}")),
            })
        })
        .collect::<anyhow::Result<Vec<Account>>>()?;
    let entries = accounts.iter().map(|account| {
        let password = account.password.expose_secret();
        let auth = BASE64_STANDARD.encode(format!("{}:{password}", account.username));
        let entry = [("username", account.username.clone()), ("password", password.to_owned()), ("auth", auth)];
        (account.scope.to_string(), BTreeMap::from(entry))
    });
    let same = BTreeMap::from([("auths", entries.collect::<BTreeMap<String, BTreeMap<&str, String>>>())]);
    let rendered = move || {
        let credentials: Vec<Credential<'_>> = accounts
            .iter()
            .map(|account| Credential {
                account: &account.name,
                scope: &account.scope,
                username: &account.username,
                password: &account.password,
                email: None,
            })
            .collect();
        drop(black_box(render(Profile::Kubernetes, black_box(&credentials))));
    };
    Ok(Case {
        name: format!("render {count} account{}", if count == 1 { "" } else { "s" }),
        work: Box::new(rendered),
        plain: Box::new(move || drop(black_box(serde_json::to_string(black_box(&same))))),
    })
}

/// Explaining an image for all five consumers, with the match in the middle of the accounts,
/// against five searches for keys that prefix the image name.
fn explain_case(count: usize) -> anyhow::Result<Case> {
    let scopes = (0..count)
        .map(|n| Ok((format!("team-{n}"), RegistryScope::parse(&format!("registry-{n}.example.com:5000"))?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let image = ImageName::parse(&format!("registry-{}.example.com:5000/team/app:1", count / 2))?;
    let keys: Vec<String> = scopes.iter().map(|(_, scope)| scope.to_string()).collect();
    let name = image.to_string();
    let explained = move || {
        let accounts: Vec<_> = scopes.iter().map(|(name, scope)| ScopedAccount { name, scope }).collect();
        drop(black_box(explain_accounts(black_box(&accounts), &image)));
    };
    let searched = move || {
        for _ in 0..5 {
            black_box(keys.iter().filter(|key| black_box(&name).starts_with(key.as_str())).count());
        }
    };
    Ok(Case { name: format!("explain an image among {count}"), work: Box::new(explained), plain: Box::new(searched) })
}

/// Fixture of the key checks.
struct Checked {
    runtime: tokio::runtime::Runtime,
    pepper: Pepper,
    key: NewKey,
}

impl Checked {
    fn new() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let pepper = Pepper::parse(&SecretString::from(BASE64_STANDARD.encode([7; 32])))?;
        let key = generate(&pepper)?;
        Ok(Self { runtime, pepper, key })
    }

    fn checker(&self) -> KeyChecker {
        KeyChecker::new(Arc::new(Peppers::new(self.pepper.clone().into(), None)), 1)
    }

    fn check(&self, checker: &KeyChecker) -> bool {
        let Some(shown) = PresentedKey::parse(self.key.text.expose_secret()) else { return false };
        self.runtime.block_on(checker.check(shown, Some(&self.key.verifier))).unwrap_or(false)
    }
}

/// First check of a key in this process, against argon2id with the same parameters.
fn first_check_case() -> anyhow::Result<Case> {
    let checked = Checked::new()?;
    let (key, hash) = (checked.key.text.expose_secret().to_owned(), checked.key.verifier.hash.clone());
    anyhow::ensure!(checked.check(&checked.checker()), "a good key was refused");
    let first = move || {
        black_box(checked.check(&checked.checker()));
    };
    let argon2 = move || {
        // With the parameters of the hash, not the defaults.
        let _ = black_box(Argon2::default().verify_password(key.as_bytes(), hash.as_str()));
    };
    Ok(Case { name: "verify a key for the first time".to_owned(), work: Box::new(first), plain: Box::new(argon2) })
}

/// Check of a cached key, against one HMAC over its text.
fn cached_check_case() -> anyhow::Result<Case> {
    let checked = Checked::new()?;
    let caching = checked.checker();
    let text = checked.key.text.expose_secret().to_owned();
    anyhow::ensure!(checked.check(&caching), "a good key was refused");
    let plain_key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &[7; 32]);
    Ok(Case {
        name: "verify a cached key".to_owned(),
        work: Box::new(move || {
            black_box(checked.check(&caching));
        }),
        plain: Box::new(move || {
            black_box(aws_lc_rs::hmac::sign(&plain_key, text.as_bytes()));
        }),
    })
}
