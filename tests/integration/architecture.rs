//! Checks the direction of module dependencies: `main -> cli -> app -> {http, worker} -> service ->
//! {storage, clients -> crypto} -> domain`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Modules that each module of the crate may use. Every module must be listed.
const MAY_USE: [(&str, &[&str]); 15] = [
    ("main", &["cli"]),
    // `regcred verify` creates its own clients, as `app` does for the service.
    (
        "cli",
        &[
            "app",
            "clients",
            "clock",
            "config",
            "crypto",
            "domain",
            "http",
            "service",
            "shutdown",
            "storage",
            "telemetry",
        ],
    ),
    (
        "app",
        &[
            "clients",
            "clock",
            "config",
            "crypto",
            "domain",
            "http",
            "metrics",
            "service",
            "shutdown",
            "storage",
            "telemetry",
            "worker",
        ],
    ),
    // Only `cli` and `app` read the configuration; other modules receive values.
    ("config", &["clients", "crypto", "domain", "storage", "telemetry"]),
    ("http", &["clients", "clock", "domain", "metrics", "service", "storage", "telemetry"]),
    ("worker", &["clients", "domain", "metrics", "service", "storage"]),
    // Traces of requests, for the work that they cause.
    ("service", &["clients", "clock", "crypto", "domain", "storage", "telemetry"]),
    ("storage", &["domain"]),
    // Requests to providers are signed.
    ("clients", &["clock", "crypto", "domain"]),
    ("crypto", &["domain"]),
    ("domain", &[]),
    // Outside the layers.
    ("metrics", &["clients", "crypto", "service", "storage"]),
    ("telemetry", &["domain"]),
    ("shutdown", &[]),
    ("clock", &[]),
];

/// Crates that perform I/O or cryptography, and the modules that may use them.
const OUTSIDE: [(&str, &[&str]); 8] = [
    ("actix_web", &["app", "http"]),
    ("kube", &["clients"]),
    ("k8s_openapi", &["clients"]),
    // The exporter of traces.
    ("reqwest", &["cli", "clients", "telemetry"]),
    ("sqlx", &["app", "cli", "config", "http", "metrics", "service", "storage", "worker"]),
    ("tokio", &["app", "cli", "clients", "crypto", "http", "service", "shutdown", "storage", "worker"]),
    ("aws_lc_rs", &["crypto"]),
    ("argon2", &["crypto"]),
];

/// Items of sqlx that run SQL, as opposed to pools, connections and transactions.
const SQL: [&str; 12] = [
    "query",
    "query_as",
    "query_scalar",
    "query_file",
    "query_file_as",
    "query_file_scalar",
    "query_with",
    "query_as_with",
    "query_scalar_with",
    "raw_sql",
    "QueryBuilder",
    "Executor",
];

/// Source file with its module and the first two segments of its paths, such as `crate::MODULE` or
/// `CRATE::NAME`.
struct Source {
    file: PathBuf,
    module: String,
    paths: BTreeSet<(String, String)>,
}

/// Returns all files of `src/`, without unit tests.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect_files(&root, &mut files);
    let sources = files.into_iter().filter(|file| !file.ends_with("tests.rs") && file != &root.join("lib.rs"));
    let sources = sources.map(|file| {
        let first = file.strip_prefix(&root).expect("below src").components().next().expect("a name");
        let module = Path::new(first.as_os_str()).file_stem().expect("a name").to_str().expect("UTF-8").to_owned();
        let text = fs::read_to_string(&file).expect("a file");
        let mut paths = BTreeSet::new();
        collect_paths(text.parse().expect("Rust"), &mut paths);
        if file.parent() == Some(root.as_path()) {
            paths = paths.into_iter().map(|(first, name)| (first.replace("super", "crate"), name)).collect();
        }
        Source { file, module, paths }
    });
    sources.collect()
}

fn collect_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Collects the first two segments of every path, including those in macros and nested `use`.
fn collect_paths(tokens: TokenStream, paths: &mut BTreeSet<(String, String)>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        if is_test_only(&tokens[at..]) {
            at += 2;
            // The item ends with its braces or a semicolon.
            while !tokens.get(at).is_none_or(ends_item) {
                at += 1;
            }
        } else if let TokenTree::Group(group) = &tokens[at] {
            collect_paths(group.stream(), paths);
        } else if let [TokenTree::Ident(first), colon, colons, next, ..] = &tokens[at..]
            && is_punct(colon, ':')
            && is_punct(colons, ':')
            && !(at > 1 && is_punct(&tokens[at - 1], ':') && is_punct(&tokens[at - 2], ':'))
        {
            let names = match next {
                TokenTree::Group(group) => first_names(group.stream()),
                TokenTree::Ident(name) => vec![name.to_string()],
                _ => Vec::new(),
            };
            paths.extend(names.into_iter().map(|name| (first.to_string(), name)));
        }
        at += 1;
    }
}

/// `#[cfg(test)]`
fn is_test_only(tokens: &[TokenTree]) -> bool {
    let [hash, TokenTree::Group(attribute), ..] = tokens else { return false };
    is_punct(hash, '#') && attribute.stream().to_string().replace(' ', "") == "cfg(test)"
}

fn ends_item(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace) || is_punct(token, ';')
}

fn is_punct(token: &TokenTree, wanted: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == wanted)
}

/// Returns the first name of each element of a `{…}` in a `use`.
fn first_names(tokens: TokenStream) -> Vec<String> {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let elements = tokens.split(|token| is_punct(token, ','));
    elements.filter_map(|element| element.first().map(ToString::to_string)).collect()
}

#[test]
fn modules_depend_in_one_direction() {
    let may_use = BTreeMap::from(MAY_USE);
    let mut used = BTreeSet::new();
    let mut violations = Vec::new();
    for source in sources() {
        let Some(allowed) = may_use.get(source.module.as_str()) else {
            violations.push(format!("{}: the module `{}` is not in MAY_USE", source.file.display(), source.module));
            continue;
        };
        for (_, target) in source.paths.iter().filter(|(first, _)| first == "crate" || first == "regcred") {
            if *target != source.module && may_use.contains_key(target.as_str()) {
                used.insert((source.module.clone(), target.clone()));
                if !allowed.contains(&target.as_str()) {
                    violations.push(format!("{}: `{}` must not use `{target}`", source.file.display(), source.module));
                }
            }
        }
    }
    assert!(violations.is_empty(), "{violations:#?}");
    // Proves that the search finds the main dependencies.
    for (user, target) in [
        ("main", "cli"),
        ("cli", "app"),
        ("app", "http"),
        ("http", "service"),
        ("service", "storage"),
        ("service", "clients"),
        ("service", "crypto"),
        ("storage", "domain"),
        ("clients", "domain"),
        ("crypto", "domain"),
    ] {
        assert!(used.contains(&(user.to_owned(), target.to_owned())), "{user} -> {target} was not found in {used:?}");
    }
}

#[test]
fn allowed_dependencies_have_no_cycle() {
    let mut left = BTreeMap::from(MAY_USE);
    while !left.is_empty() {
        let before = left.len();
        let names: BTreeSet<&str> = left.keys().copied().collect();
        left.retain(|_, uses| uses.iter().any(|module| names.contains(module)));
        assert!(left.len() < before, "dependency cycle: {:?}", left.keys());
    }
}

#[test]
fn only_storage_contains_sql() {
    let (in_storage, elsewhere): (Vec<Source>, Vec<Source>) = sources()
        .into_iter()
        .filter(|source| source.paths.iter().any(|(first, name)| first == "sqlx" && SQL.contains(&name.as_str())))
        .partition(|source| source.module == "storage");
    let elsewhere: Vec<PathBuf> = elsewhere.into_iter().map(|source| source.file).collect();
    assert_eq!(elsewhere, [""; 0].map(PathBuf::from));
    assert!(in_storage.len() >= 4, "found SQL in only {} files", in_storage.len());
}

#[test]
fn outside_crates_are_used_by_their_modules_only() {
    let may_use = BTreeMap::from(OUTSIDE);
    let mut violations = Vec::new();
    let mut seen = BTreeSet::new();
    for source in sources() {
        for (first, _) in &source.paths {
            let Some(allowed) = may_use.get(first.as_str()) else { continue };
            seen.insert(first.clone());
            if !allowed.contains(&source.module.as_str()) {
                violations.push(format!("{}: `{}` must not use `{first}`", source.file.display(), source.module));
            }
        }
        let in_std = |name: &str| source.paths.contains(&("std".to_owned(), name.to_owned()));
        if source.module == "domain" && ["fs", "env", "process", "thread"].into_iter().any(in_std) {
            violations.push(format!("{}: `domain` is pure", source.file.display()));
        }
    }
    assert!(violations.is_empty(), "{violations:#?}");
    assert_eq!(seen.len(), OUTSIDE.len(), "unused: only {seen:?} were found");
}

/// A kubeconfig of a person may run programs.
#[test]
fn only_the_command_line_opens_the_kubeconfig_of_a_person() {
    let users = sources().into_iter().filter(|source| {
        let text = fs::read_to_string(&source.file).expect("a file");
        text.contains("of_user(") && !text.contains("fn of_user(")
    });
    let users: Vec<String> = users.map(|source| source.module).collect();
    assert_eq!(users, ["cli"]);
}

#[test]
fn paths_are_found_in_imports_expressions_and_macros() {
    let source = r#"
        // use crate::in_a_comment::X;
        use crate::{one::A, two::{B, C}, self};
        #[cfg(test)]
        mod tests { use crate::of_tests::X; }
        #[cfg(test)]
        mod more_tests;
        fn f(x: crate::three::D) { let s = "crate::in_a_string"; format!("{}", crate::four::e(sqlx::query!("x"))); }
    "#;
    let mut paths = BTreeSet::new();
    collect_paths(source.parse().expect("Rust"), &mut paths);
    let names: Vec<&str> = paths.iter().filter(|(first, _)| first == "crate").map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["four", "one", "self", "three", "two"]);
    assert!(paths.contains(&("sqlx".to_owned(), "query".to_owned())));
}
