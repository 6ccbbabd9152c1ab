//! Query strings, parsed and documented in one place.
//!
//! The parameters of a route are a type. It derives [`utoipa::IntoParams`], which documents them,
//! and implements [`FromQuery`], which parses them. [`Caller`](super::auth::Caller) takes that
//! type, so every route under `/v1` refuses parameters that it does not know, before its handler
//! runs.

use std::borrow::Cow;

use url::form_urlencoded;
use utoipa::IntoParams;

use crate::domain::invalid::{FieldError, FieldErrors, Invalid};

/// Maximum number of characters of an unknown parameter's name that an error repeats.
const NAME_SHOWN: usize = 50;

/// Parameters that a query string can be parsed into.
pub trait FromQuery: Sized {
    /// Reads the parameters. The value of an invalid parameter is arbitrary, because [`parse`]
    /// returns the errors instead.
    fn from_query(query: &mut Query<'_>) -> Self;

    /// Whether the parameters request a dry run.
    fn is_dry_run(&self) -> bool {
        false
    }
}

/// Parameter of every operation that changes something. The permission check
/// ([`Caller`](super::auth::Caller)) passes it on with the caller.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DryRunQuery {
    /// Checks the change and responds as if it was made, without making it. Nothing is stored or
    /// delivered; a created resource is returned with 200, and no response has an `ETag`.
    #[param(value_type = Option<bool>, rename = "dryRun", default = false)]
    dry_run: bool,
}

impl FromQuery for DryRunQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self { dry_run: query.flag("dryRun") }
    }

    fn is_dry_run(&self) -> bool {
        self.dry_run
    }
}

/// No parameters.
impl FromQuery for () {
    fn from_query(_: &mut Query<'_>) -> Self {}
}

/// The parameters of both types.
impl<A: FromQuery, B: FromQuery> FromQuery for (A, B) {
    fn from_query(query: &mut Query<'_>) -> Self {
        (A::from_query(query), B::from_query(query))
    }

    fn is_dry_run(&self) -> bool {
        self.0.is_dry_run() || self.1.is_dry_run()
    }
}

/// A decoded query string, and the errors found in it so far.
#[derive(Debug)]
pub struct Query<'a> {
    pairs: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    known: Vec<&'static str>,
    errors: FieldErrors,
}

/// Parses a query string.
///
/// # Errors
///
/// Lists every parameter that is unknown, has an invalid value, or is repeated but allowed only
/// once.
pub fn parse<Q: FromQuery>(query: &str) -> Result<Q, Vec<FieldError>> {
    let pairs = form_urlencoded::parse(query.as_bytes()).collect();
    let mut query = Query { pairs, known: Vec::new(), errors: FieldErrors::default() };
    let parsed = Q::from_query(&mut query);
    query.refuse_unknown();
    query.errors.finish(|| Some(parsed))
}

impl Query<'_> {
    /// Parses a parameter that may be given once.
    pub fn one<T>(&mut self, name: &'static str, parse: impl Fn(&str) -> Result<T, Invalid>) -> Option<T> {
        let mut values = self.all(name, parse);
        if values.len() > 1 {
            self.errors.refuse(name, "must be given only once");
        }
        values.pop()
    }

    /// Parses every value of a parameter that may be repeated.
    pub fn all<T>(&mut self, name: &'static str, parse: impl Fn(&str) -> Result<T, Invalid>) -> Vec<T> {
        self.known.push(name);
        let Self { pairs, errors, .. } = self;
        let values = pairs.iter().filter(|(key, _)| key == name);
        values.filter_map(|(_, value)| errors.take(name, parse(value))).collect()
    }

    /// Parses a parameter that is `true` or `false`. The default is `false`.
    pub fn flag(&mut self, name: &'static str) -> bool {
        self.optional_flag(name).unwrap_or_default()
    }

    /// Parses a parameter that is `true` or `false`, if it is given.
    pub fn optional_flag(&mut self, name: &'static str) -> Option<bool> {
        self.one(name, |value| value.parse().map_err(|_| Invalid::new("must be true or false")))
    }

    /// Errors of parameters that depend on each other.
    pub fn errors(&mut self) -> &mut FieldErrors {
        &mut self.errors
    }

    fn refuse_unknown(&mut self) {
        let known: Vec<_> = self.known.iter().map(|name| format!("`{name}`")).collect();
        let advice = if known.is_empty() {
            "this route takes none".to_owned()
        } else {
            format!("known are {}", known.join(", "))
        };
        let mut seen: Vec<&str> = Vec::new();
        for (name, _) in &self.pairs {
            if !self.known.contains(&&**name) && !seen.contains(&&**name) {
                seen.push(name);
                let shown: String = name.chars().take(NAME_SHOWN).collect();
                self.errors.refuse(&shown, format!("is not a known query parameter; {advice}"));
            }
        }
    }
}

/// Takes a value unchanged.
#[expect(clippy::unnecessary_wraps, reason = "parsers return a Result")]
pub fn text(value: &str) -> Result<String, Invalid> {
    Ok(value.to_owned())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[derive(Debug, PartialEq)]
    struct Sample {
        number: Option<u8>,
        words: Vec<String>,
        is_dry: bool,
    }

    impl FromQuery for Sample {
        fn from_query(query: &mut Query<'_>) -> Self {
            Self {
                number: query.one("number", |value| value.parse().map_err(|_| Invalid::new("must be a number"))),
                words: query.all("word", text),
                is_dry: query.flag("dryRun"),
            }
        }
    }

    fn refused<Q: FromQuery>(query: &str) -> Vec<String> {
        let Err(errors) = parse::<Q>(query) else { panic!("{query} is accepted") };
        errors.into_iter().map(|error| format!("{}: {}", error.field, error.detail)).collect()
    }

    #[test]
    fn values_are_decoded_once_and_keys_may_repeat() {
        let parsed = parse::<Sample>("word=a%20b&number=7&word=%2525&word=c+d&dryRun=true").unwrap();
        let words = ["a b", "%25", "c d"].map(str::to_owned).into();
        assert_eq!(parsed, Sample { number: Some(7), words, is_dry: true });
        let none = Sample { number: None, words: Vec::new(), is_dry: false };
        assert_eq!(parse::<Sample>("").unwrap(), none);
        assert_eq!(parse::<Sample>("&").unwrap(), none);
        assert_eq!(parse::<(Sample, ())>("dryRun=false").unwrap().0, none);
    }

    #[test]
    fn every_error_is_reported_at_once() {
        let expected = [
            "number: must be a number",
            "dryRun: must be true or false",
            "other: is not a known query parameter; known are `number`, `word`, `dryRun`",
        ];
        assert_eq!(refused::<Sample>("dryRun=1&other=1&number=x&other=2"), expected);
    }

    #[rstest]
    #[case("number=1&number=1")]
    #[case("dryRun=true&dryRun=false")]
    fn a_single_parameter_is_refused_when_repeated(#[case] query: &str) {
        assert!(refused::<Sample>(query)[0].ends_with(": must be given only once"));
    }

    #[rstest]
    #[case("a", "a")]
    #[case("=x", "")]
    #[case("Number=1", "Number")]
    #[case("%6eope=1", "nope")]
    fn a_route_without_parameters_refuses_all(#[case] query: &str, #[case] name: &str) {
        let expected = [format!("{name}: is not a known query parameter; this route takes none")];
        assert_eq!(refused::<()>(query), expected);
    }

    #[test]
    fn a_long_name_is_clipped() {
        let [error] = &parse::<()>(&"x".repeat(1_000)).unwrap_err()[..] else { panic!("one error") };
        assert_eq!(error.field.len(), NAME_SHOWN);
    }
}
