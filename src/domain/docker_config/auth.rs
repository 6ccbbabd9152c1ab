//! The `auth` field: base64 of `username:password`, as each consumer decodes it.

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use zeroize::Zeroizing;

/// Go's `base64.StdEncoding`: requires padding, ignores trailing bits.
const PADDED: GeneralPurpose = engine(DecodePaddingMode::RequireCanonical);

/// Go's `base64.RawStdEncoding`: forbids padding.
const UNPADDED: GeneralPurpose = engine(DecodePaddingMode::RequireNone);

const fn engine(padding: DecodePaddingMode) -> GeneralPurpose {
    let config = GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true).with_decode_padding_mode(padding);
    GeneralPurpose::new(&alphabet::STANDARD, config)
}

/// Reason why an `auth` cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::domain) enum AuthProblem {
    #[error("its `auth` is not base64 of the standard alphabet")]
    NotBase64,
    #[error("its `auth` is base64 without the padding (`=`) that this consumer requires")]
    NotPadded,
    #[error("its `auth` has no colon between user and password")]
    NoColon,
    #[error("its `auth` has no user before the colon")]
    NoUser,
}

/// Decoded `auth`. Bytes, because UTF-8 is not guaranteed.
pub(in crate::domain) struct Login {
    pub(in crate::domain) username: Zeroizing<Vec<u8>>,
    pub(in crate::domain) password: Zeroizing<Vec<u8>>,
}

/// Decodes like the kubelet: padded if it ends in `=`, else unpadded
/// (`pkg/credentialprovider/config.go`, `decodeDockerConfigFieldAuth`).
pub(in crate::domain) fn decode_leniently(auth: &str) -> Result<Login, AuthProblem> {
    let engine = if auth.trim_end().ends_with('=') { PADDED } else { UNPADDED };
    split(&decode(&engine, auth).ok_or(AuthProblem::NotBase64)?)
}

/// Decodes like podman: padded only (`pkg/docker/config/config.go`, `decodeDockerAuth`).
pub(in crate::domain) fn decode_padded(auth: &str) -> Result<Login, AuthProblem> {
    let decoded = decode(&PADDED, auth).ok_or_else(|| match decode_leniently(auth) {
        Err(AuthProblem::NotBase64) => AuthProblem::NotBase64,
        _ => AuthProblem::NotPadded,
    })?;
    split(&decoded)
}

/// Decodes like the docker CLI: padded only, and with a user (`cli/config/configfile/file.go`,
/// `decodeAuth`).
pub(in crate::domain) fn decode_strictly(auth: &str) -> Result<Login, AuthProblem> {
    let login = decode_padded(auth)?;
    if login.username.is_empty() {
        return Err(AuthProblem::NoUser);
    }
    Ok(login)
}

/// Go's decoders skip line breaks.
fn decode(engine: &GeneralPurpose, auth: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut packed = Zeroizing::new(auth.as_bytes().to_vec());
    packed.retain(|byte| !b"\r\n".contains(byte));
    engine.decode(&*packed).ok().map(Zeroizing::new)
}

/// Splits at the first colon: a password may contain more.
fn split(decoded: &[u8]) -> Result<Login, AuthProblem> {
    let colon = decoded.iter().position(|byte| *byte == b':').ok_or(AuthProblem::NoColon)?;
    let (username, password) = decoded.split_at(colon);
    Ok(Login {
        username: Zeroizing::new(username.to_vec()),
        password: Zeroizing::new(password.iter().skip(1).copied().collect()),
    })
}
