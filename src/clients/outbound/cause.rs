//! Classification of failures before a response: DNS, TCP, TLS.
//!
//! Only types and error kinds count, because the text of an error may contain what a peer sent.

use std::{error::Error, io};

use rustls::{AlertDescription, CertificateError};

/// Maximum length of an error chain. It bounds the walk in case a chain is cyclic.
const CHAIN_MAX: usize = 16;

/// Why no response arrived.
#[derive(Debug, Clone, PartialEq)]
pub enum Cause {
    /// The TLS handshake failed.
    Tls(rustls::Error),
    /// No connection within the time limit.
    ConnectTimeout,
    /// No complete response within the time limit.
    Timeout,
    /// The host refused the connection.
    ConnectionRefused,
    /// The network or the host cannot be reached.
    NoRoute,
    /// The host name has no address.
    NameNotResolved,
    /// The peer reset the connection.
    ConnectionReset,
    /// The peer closed the connection before it answered.
    Closed,
    /// Another I/O error.
    Io,
    /// No I/O error: the peer ended the connection early or does not speak HTTP.
    Protocol,
}

impl Cause {
    /// Classifies an error by its chain. A TLS error decides, else the innermost I/O error.
    #[must_use]
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        let mut current = Some(error);
        let mut innermost = None;
        for _ in 0..CHAIN_MAX {
            let Some(error) = current else { break };
            if let Some(tls) = error.downcast_ref::<rustls::Error>() {
                return Self::Tls(tls.clone());
            }
            current = match error.downcast_ref::<io::Error>() {
                Some(io) => {
                    innermost = Some(io);
                    // `source` of an io::Error skips the error that it wraps.
                    io.get_ref().map(|inner| inner as &(dyn Error + 'static))
                }
                None => error.source(),
            };
        }
        innermost.map_or(Self::Protocol, Self::of_io)
    }

    /// Classifies an error of reqwest, which has timeouts of its own.
    #[must_use]
    pub fn of_request(error: &reqwest::Error) -> Self {
        match Self::of(error) {
            Self::Tls(tls) => Self::Tls(tls),
            _ if error.is_timeout() && error.is_connect() => Self::ConnectTimeout,
            _ if error.is_timeout() => Self::Timeout,
            cause => cause,
        }
    }

    fn of_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::ConnectTimeout,
            io::ErrorKind::ConnectionRefused => Self::ConnectionRefused,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
                Self::ConnectionReset
            }
            io::ErrorKind::UnexpectedEof => Self::Closed,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Self::NoRoute,
            _ if is_name_lookup(error) => Self::NameNotResolved,
            _ => Self::Io,
        }
    }
}

/// The standard library has no kind for a failed lookup, only this text of its own.
fn is_name_lookup(error: &io::Error) -> bool {
    error.to_string().starts_with("failed to lookup address information")
}

/// Certificate authorities that a client trusts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// The host's trust store.
    Host,
    /// The host's trust store and the given CA certificates.
    HostAndCa,
    /// The given CA certificates only.
    Ca,
}

/// Advice for a kind of client, appended to texts about TLS failures.
#[derive(Debug, Clone, Copy, Default)]
pub struct TlsHints {
    /// After "the certificate is not valid for …".
    pub wrong_name: &'static str,
    /// After "… does not speak TLS".
    pub not_tls: &'static str,
}

/// Peer of a connection, as error texts describe it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Name or URL of the peer.
    pub label: String,
    /// Authorities that may sign its certificate.
    pub trust: Trust,
    /// Name that its certificate must contain; the host name if absent.
    pub expected_name: Option<String>,
    /// Advice for this kind of client.
    pub hints: TlsHints,
}

impl Peer {
    /// Describes a failure in one sentence.
    #[must_use]
    pub fn describe(&self, cause: &Cause) -> String {
        let label = &self.label;
        let what = match cause {
            Cause::Tls(error) => return self.describe_tls(error),
            Cause::ConnectTimeout => "did not accept a connection in time",
            Cause::Timeout => "sent no complete response in time",
            Cause::ConnectionRefused => "refused the connection: no server listens on this port",
            Cause::NoRoute => "cannot be reached: there is no route to it",
            Cause::NameNotResolved => "cannot be reached: its host name cannot be resolved",
            Cause::ConnectionReset => "reset the connection",
            Cause::Closed => "closed the connection before it answered",
            Cause::Io => "cannot be reached",
            Cause::Protocol => "closed the connection early or did not answer with HTTP",
        };
        format!("{label} {what}")
    }

    fn describe_tls(&self, error: &rustls::Error) -> String {
        let label = &self.label;
        match error {
            rustls::Error::InvalidCertificate(problem) => {
                format!("the certificate of {label} {}", self.describe_certificate(problem))
            }
            rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
                format!("{label} requires a client certificate")
            }
            rustls::Error::AlertReceived(
                alert @ (AlertDescription::BadCertificate
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::UnknownCA),
            ) => format!("{label} requires another client certificate ({alert:?})"),
            rustls::Error::AlertReceived(alert) => format!("{label} ended the TLS handshake ({alert:?})"),
            rustls::Error::InvalidMessage(_) => format!("{label} does not speak TLS{}", self.hints.not_tls),
            rustls::Error::PeerIncompatible(_) => format!("{label} supports neither TLS 1.3 nor TLS 1.2"),
            _ => format!("the TLS handshake with {label} failed"),
        }
    }

    fn describe_certificate(&self, problem: &CertificateError) -> String {
        let what = match problem {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => match self.trust {
                Trust::Host => "is not signed by an authority that this host trusts: set caCertificate",
                Trust::HostAndCa => "is signed neither by caCertificate nor by an authority that this host trusts",
                Trust::Ca => "is not signed by the given caCertificate",
            },
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => "has expired",
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "is not valid yet: compare the clocks"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                let name = self.expected_name.as_deref().unwrap_or("its host name");
                return format!("is not valid for {name}{}", self.hints.wrong_name);
            }
            CertificateError::Revoked => "has been revoked",
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                "is not a server certificate"
            }
            // A CA certificate in place of a server certificate has no variant of its own.
            CertificateError::Other(_) => {
                "does not verify: a self-signed certificate must have `basicConstraints=CA:FALSE`"
            }
            _ => "does not verify",
        };
        what.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use rustls::{InvalidMessage, PeerIncompatible};

    use super::*;

    fn peer(trust: Trust) -> Peer {
        let hints = TlsHints { wrong_name: ": set tlsServerName", not_tls: ": is it an http:// server?" };
        Peer { label: "https://k8s:6443".to_owned(), trust, expected_name: Some("k8s".to_owned()), hints }
    }

    #[rstest]
    #[case::other_ca(CertificateError::UnknownIssuer, "is not signed by the given caCertificate")]
    #[case::same_name(CertificateError::BadSignature, "is not signed by the given caCertificate")]
    #[case::expired(CertificateError::Expired, "has expired")]
    #[case::future(CertificateError::NotValidYet, "is not valid yet: compare the clocks")]
    #[case::name(CertificateError::NotValidForName, "is not valid for k8s: set tlsServerName")]
    #[case::revoked(CertificateError::Revoked, "has been revoked")]
    #[case::purpose(CertificateError::InvalidPurpose, "is not a server certificate")]
    #[case::broken(CertificateError::BadEncoding, "does not verify")]
    fn certificate_failure_is_described(#[case] problem: CertificateError, #[case] what: &str) {
        let cause = Cause::of(&rustls::Error::InvalidCertificate(problem));
        assert_eq!(peer(Trust::Ca).describe(&cause), format!("the certificate of https://k8s:6443 {what}"));
    }

    #[rstest]
    #[case(Trust::Host, "set caCertificate")]
    #[case(Trust::HostAndCa, "is signed neither by caCertificate nor")]
    fn unknown_authority_is_described_by_what_is_trusted(#[case] trust: Trust, #[case] words: &str) {
        let cause = Cause::Tls(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer));
        assert!(peer(trust).describe(&cause).contains(words));
    }

    #[rstest]
    #[case(rustls::Error::AlertReceived(AlertDescription::CertificateRequired), "requires a client certificate")]
    #[case(
        rustls::Error::AlertReceived(AlertDescription::CertificateExpired),
        "requires another client certificate (CertificateExpired)"
    )]
    #[case(
        rustls::Error::AlertReceived(AlertDescription::HandshakeFailure),
        "ended the TLS handshake (HandshakeFailure)"
    )]
    #[case(
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType),
        "does not speak TLS: is it an http:// server?"
    )]
    #[case(rustls::Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered), "neither TLS 1.3 nor TLS 1.2")]
    #[case(rustls::Error::DecryptError, "the TLS handshake with https://k8s:6443 failed")]
    fn tls_error_inside_an_io_error_is_found(#[case] error: rustls::Error, #[case] words: &str) {
        let wrapped = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, error));
        let cause = Cause::of(&wrapped);
        assert!(matches!(cause, Cause::Tls(_)), "{cause:?}");
        let detail = peer(Trust::Host).describe(&cause);
        assert!(detail.contains(words), "{detail}");
    }

    #[rstest]
    #[case(io::ErrorKind::ConnectionRefused.into(), Cause::ConnectionRefused)]
    #[case(io::ErrorKind::ConnectionReset.into(), Cause::ConnectionReset)]
    #[case(io::ErrorKind::UnexpectedEof.into(), Cause::Closed)]
    #[case(io::Error::other(io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof")), Cause::Closed)]
    #[case(io::ErrorKind::NetworkUnreachable.into(), Cause::NoRoute)]
    #[case(io::ErrorKind::TimedOut.into(), Cause::ConnectTimeout)]
    #[case(io::Error::other("failed to lookup address information: Name or service not known"), Cause::NameNotResolved)]
    #[case(io::Error::other("canary"), Cause::Io)]
    fn io_error_is_classified_by_its_kind(#[case] error: io::Error, #[case] expected: Cause) {
        let cause = Cause::of(&error);
        assert_eq!(cause, expected);
        let detail = peer(Trust::Host).describe(&cause);
        assert!(detail.starts_with("https://k8s:6443 ") && !detail.contains("canary"), "{detail}");
    }
}
