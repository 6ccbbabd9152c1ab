//! `WWW-Authenticate`, as a registry sends it (RFC 9110, 11.6.1): read strictly and within bounds, since it is foreign input that
//! decides where a login goes.

/// Longer headers are refused.
const HEADER_MAX: usize = 4096;
/// More challenges, or parameters of one, are refused.
const COUNT_MAX: usize = 16;

/// How a registry wants to be shown a login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// With every request.
    Basic,
    /// Once, to a token service.
    Bearer {
        /// URL of the token service; not checked yet.
        realm: String,
        /// Whom the token is for.
        service: Option<String>,
    },
}

/// Reads the headers of one answer: the first challenge of a kind that registries use.
pub(super) fn parse<'a>(headers: impl Iterator<Item = &'a [u8]>) -> Option<Challenge> {
    headers.take(COUNT_MAX).filter_map(challenges).flatten().find_map(|(scheme, parameters)| {
        let parameter = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        match scheme.as_str() {
            "basic" => Some(Challenge::Basic),
            "bearer" => Some(Challenge::Bearer { realm: parameter("realm")?, service: parameter("service") }),
            _ => None,
        }
    })
}

type Parameters = Vec<(String, String)>;

/// All challenges of one header, or none of them where a part cannot be read.
fn challenges(header: &[u8]) -> Option<Vec<(String, Parameters)>> {
    let text = std::str::from_utf8(header).ok().filter(|text| text.len() <= HEADER_MAX)?;
    if !text.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte)) {
        return None;
    }
    let mut rest = Rest(text);
    let mut found: Vec<(String, Parameters)> = Vec::new();
    loop {
        rest.skip_commas();
        if rest.0.is_empty() {
            return Some(found);
        }
        let word = rest.token()?;
        let had_space = rest.skip_space();
        if rest.take('=') {
            // A parameter of the challenge before.
            let value = rest.value()?;
            let (_, parameters) = found.last_mut()?;
            let name = word.to_ascii_lowercase();
            if parameters.len() == COUNT_MAX || parameters.iter().any(|(key, _)| *key == name) {
                return None;
            }
            parameters.push((name, value));
            rest.end_of_item()?;
        } else {
            if found.len() == COUNT_MAX {
                return None;
            }
            found.push((word.to_ascii_lowercase(), Vec::new()));
            // Its first parameter follows without a comma; or a token68, which Negotiate and the like have.
            if had_space && !rest.0.is_empty() && !rest.0.starts_with(',') && !rest.starts_parameter() {
                rest.token68()?;
                rest.end_of_item()?;
            }
        }
    }
}

/// What is still to be read.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn skip_space(&mut self) -> bool {
        let trimmed = self.0.trim_start_matches([' ', '\t']);
        let skipped = trimmed.len() < self.0.len();
        self.0 = trimmed;
        skipped
    }

    fn skip_commas(&mut self) {
        self.0 = self.0.trim_start_matches([' ', '\t', ',']);
    }

    fn take(&mut self, expected: char) -> bool {
        let rest = self.0.strip_prefix(expected);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }

    fn cut(&mut self, length: usize) -> Option<&'a str> {
        let (cut, rest) = self.0.split_at_checked(length).filter(|(cut, _)| !cut.is_empty())?;
        self.0 = rest;
        Some(cut)
    }

    fn token(&mut self) -> Option<&'a str> {
        let length = self.0.bytes().take_while(|byte| is_token_byte(*byte)).count();
        self.cut(length)
    }

    fn token68(&mut self) -> Option<&'a str> {
        let length = self.0.bytes().take_while(|b| b.is_ascii_alphanumeric() || b"-._~+/=".contains(b)).count();
        self.cut(length)
    }

    /// Whether a name and a `=` come next that are followed by a value, which the padding of a token68 is not.
    fn starts_parameter(&self) -> bool {
        let mut ahead = Rest(self.0);
        ahead.token().is_some()
            && {
                ahead.skip_space();
                ahead.take('=')
            }
            && !ahead.0.is_empty()
            && !ahead.0.starts_with(['=', ','])
    }

    /// A token or a quoted string.
    fn value(&mut self) -> Option<String> {
        self.skip_space();
        if !self.take('"') {
            return self.token().map(str::to_owned);
        }
        let mut value = String::new();
        let mut characters = self.0.char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                '"' => {
                    self.0 = self.0.get(at + 1..)?;
                    return Some(value);
                }
                '\\' => value.push(characters.next()?.1),
                other => value.push(other),
            }
        }
        None
    }

    /// Only a comma or the end may follow.
    fn end_of_item(&mut self) -> Option<()> {
        self.skip_space();
        (self.0.is_empty() || self.0.starts_with(',')).then_some(())
    }
}

fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn read(header: &str) -> Option<Challenge> {
        parse([header.as_bytes()].into_iter())
    }

    fn bearer(realm: &str, service: Option<&str>) -> Challenge {
        Challenge::Bearer { realm: realm.to_owned(), service: service.map(str::to_owned) }
    }

    #[rstest]
    #[case(r#"Basic realm="sandbox""#, Some(Challenge::Basic))]
    #[case("basic", Some(Challenge::Basic))]
    #[case(r#"Bearer realm="https://a/token",service="b""#, Some(bearer("https://a/token", Some("b"))))]
    #[case(r#"bearer Service=b , REALM = "https://a/token""#, Some(bearer("https://a/token", Some("b"))))]
    #[case(
        r#"Bearer realm="https://a/token",service="b",scope="repository:x:pull,push",error="invalid_token""#,
        Some(bearer("https://a/token", Some("b")))
    )]
    #[case(r#"Bearer realm="https://a/\"t\"""#, Some(bearer("https://a/\"t\"", None)))]
    #[case(r#"Negotiate, Basic realm="x""#, Some(Challenge::Basic))]
    #[case(r#"Negotiate YWJj==, Bearer realm="https://a""#, Some(bearer("https://a", None)))]
    #[case(r#"Digest realm="x", nonce="y", Basic realm="z""#, Some(Challenge::Basic))]
    #[case(r#",, Basic realm="x" ,,"#, Some(Challenge::Basic))]
    #[case(r#"Bearer service="b""#, None)]
    #[case(r#"Bearer service="b", Basic realm="x""#, Some(Challenge::Basic))]
    #[case(r#"Bearer realm="https://a", realm="https://b""#, None)]
    #[case(r#"Bearer realm="https://a"#, None)]
    #[case(r#"Bearer realm="https://a" service="b""#, None)]
    #[case(r#"realm="https://a""#, None)]
    #[case("Bearer realm=https://a", None)]
    #[case("Negotiate", None)]
    #[case("", None)]
    #[case("Bearer realm=\"https://a\u{e9}\"", None)]
    fn a_challenge_is_read_strictly(#[case] header: &str, #[case] read_as: Option<Challenge>) {
        assert_eq!(read(header), read_as);
    }

    #[test]
    fn headers_are_bounded() {
        assert_eq!(read(&format!(r#"Bearer realm="https://a/{}""#, "x".repeat(5000))), None);
        let many: String = [",a=b"; 100].concat();
        assert_eq!(read(&format!(r#"Bearer realm="https://a"{many}"#)), None);
        let headers = std::iter::repeat_n(b"Negotiate".as_slice(), 100).chain([b"Basic".as_slice()]);
        assert_eq!(parse(headers), None);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_or_refused(header in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse([header.as_slice()].into_iter());
        }

        #[test]
        fn whatever_looks_like_a_challenge_is_read_or_refused(header in "(Basic|Bearer|x)( ?[a-z]{1,3} ?= ?\"?[ -~]{0,8}\"?,?){0,5}") {
            read(&header);
        }
    }
}
