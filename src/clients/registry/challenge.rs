//! Parser for `WWW-Authenticate` (RFC 9110, 11.6.1). Strict and bounded: this untrusted header
//! decides where a login is sent.

/// Maximum length of a header.
const HEADER_MAX: usize = 4096;
/// Maximum number of challenges, and of parameters of one challenge.
const COUNT_MAX: usize = 16;

/// Authentication scheme that a registry requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// The login, with every request.
    Basic,
    /// A token from a token service.
    Bearer {
        /// URL of the token service, unchecked.
        realm: String,
        /// Audience of the token.
        service: Option<String>,
    },
}

/// Parses the headers of one response and returns the challenge that clients answer: the first one
/// with a supported scheme, but Bearer before Basic (containerd,
/// `core/remotes/docker/auth/parse.go`; distribution, `registry/client/auth/session.go`).
pub fn parse<'a>(headers: impl Iterator<Item = &'a [u8]>) -> Option<Challenge> {
    let supported = headers.take(COUNT_MAX).filter_map(challenges).flatten().filter_map(|(scheme, parameters)| {
        let parameter = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        match scheme.as_str() {
            "basic" => Some(Challenge::Basic),
            "bearer" => Some(Challenge::Bearer { realm: parameter("realm")?, service: parameter("service") }),
            _ => None,
        }
    });
    // Of equal ones, `min_by_key` returns the first.
    supported.min_by_key(|challenge| *challenge == Challenge::Basic)
}

type Parameters = Vec<(String, String)>;

/// All challenges of one header, or none if any part is malformed.
fn challenges(header: &[u8]) -> Option<Vec<(String, Parameters)>> {
    let text = std::str::from_utf8(header).ok().filter(|text| text.len() <= HEADER_MAX)?;
    if !text.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte)) {
        return None;
    }
    let mut cursor = Cursor(text);
    let mut found: Vec<(String, Parameters)> = Vec::new();
    loop {
        cursor.skip_commas();
        if cursor.0.is_empty() {
            return Some(found);
        }
        let word = cursor.token()?;
        let had_space = cursor.skip_space();
        if cursor.take('=') {
            // A parameter of the previous challenge.
            let value = cursor.value()?;
            let (_, parameters) = found.last_mut()?;
            let name = word.to_ascii_lowercase();
            if parameters.len() == COUNT_MAX || parameters.iter().any(|(key, _)| *key == name) {
                return None;
            }
            parameters.push((name, value));
            cursor.end_of_item()?;
        } else {
            if found.len() == COUNT_MAX {
                return None;
            }
            found.push((word.to_ascii_lowercase(), Vec::new()));
            // The first parameter follows without a comma. Schemes such as Negotiate have a token68
            // instead.
            if had_space && !cursor.0.is_empty() && !cursor.0.starts_with(',') && !cursor.starts_parameter() {
                cursor.token68()?;
                cursor.end_of_item()?;
            }
        }
    }
}

/// Unread rest of a header.
struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
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

    /// Whether a parameter follows: a name, `=` and a value. The padding of a token68 is not a
    /// value.
    fn starts_parameter(&self) -> bool {
        let mut ahead = Cursor(self.0);
        ahead.token().is_some()
            && {
                ahead.skip_space();
                ahead.take('=')
            }
            && !ahead.0.is_empty()
            && !ahead.0.starts_with(['=', ','])
    }

    /// Reads a token or a quoted string.
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

    /// Requires a comma or the end.
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
    #[case(r#"Basic realm="x", Bearer realm="https://a""#, Some(bearer("https://a", None)))]
    #[case(r#"Bearer realm="https://a", Bearer realm="https://b", Basic realm="x""#, Some(bearer("https://a", None)))]
    #[case(r#"Bearer realm="https://a", realm="https://b""#, None)]
    #[case(r#"Bearer realm="https://a"#, None)]
    #[case(r#"Bearer realm="https://a" service="b""#, None)]
    #[case(r#"realm="https://a""#, None)]
    #[case("Bearer realm=https://a", None)]
    #[case("Negotiate", None)]
    #[case("", None)]
    #[case("Bearer realm=\"https://a\u{e9}\"", None)]
    fn challenge_is_parsed_strictly(#[case] header: &str, #[case] read_as: Option<Challenge>) {
        assert_eq!(read(header), read_as);
    }

    #[test]
    fn bearer_in_a_later_header_is_preferred() {
        let headers = [br#"Basic realm="x""#.as_slice(), br#"Bearer realm="https://a""#.as_slice()];
        assert_eq!(parse(headers.into_iter()), Some(bearer("https://a", None)));
    }

    #[test]
    fn header_is_bounded() {
        assert_eq!(read(&format!(r#"Bearer realm="https://a/{}""#, "x".repeat(5000))), None);
        let many: String = [",a=b"; 100].concat();
        assert_eq!(read(&format!(r#"Bearer realm="https://a"{many}"#)), None);
        let headers = std::iter::repeat_n(b"Negotiate".as_slice(), 100).chain([b"Basic".as_slice()]);
        assert_eq!(parse(headers), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(header in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse([header.as_slice()].into_iter());
        }

        #[test]
        fn malformed_challenge_does_not_panic(header in "(Basic|Bearer|x)( ?[a-z]{1,3} ?= ?\"?[ -~]{0,8}\"?,?){0,5}") {
            read(&header);
        }
    }
}
