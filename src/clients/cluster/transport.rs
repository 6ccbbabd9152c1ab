//! Failures before an answer was there: TCP, TLS, DNS, told apart by their types and put into words.

use std::{error::Error, io};

use rustls::{AlertDescription, CertificateError};

use super::error::ClusterError;

/// Whom a client calls, as far as an explanation needs it.
#[derive(Clone)]
pub(super) struct Peer {
    /// The URL, without credentials by construction.
    pub(super) server: String,
    /// The name that the certificate has to bear.
    pub(super) expected_name: String,
    /// Whether a CA was given, in place of the host's trust store.
    pub(super) own_ca: bool,
}

impl Peer {
    /// Explains why no answer came.
    pub(super) fn explain(&self, error: &(dyn Error + 'static)) -> ClusterError {
        let mut current = Some(error);
        let mut io_error = None;
        // Error chains are short; a bound keeps a cyclic one from hanging us.
        for _ in 0..16 {
            let Some(error) = current else { break };
            if let Some(tls) = error.downcast_ref::<rustls::Error>() {
                return self.explain_tls(tls);
            }
            if let Some(io) = error.downcast_ref::<io::Error>() {
                // The innermost one says what happened. An io::Error hides the error inside it from `source`.
                io_error = Some(io);
                if let Some(inner) = io.get_ref() {
                    current = Some(inner);
                    continue;
                }
            }
            current = error.source();
        }
        self.explain_io(io_error)
    }

    fn explain_io(&self, error: Option<&io::Error>) -> ClusterError {
        let server = &self.server;
        let Some(error) = error else {
            return ClusterError::Unreachable {
                detail: format!("{server} closed the connection before it had answered"),
            };
        };
        let what = match error.kind() {
            io::ErrorKind::TimedOut => {
                return ClusterError::Timeout { detail: format!("no connection to {server} came about in time") };
            }
            io::ErrorKind::ConnectionRefused => "refused the connection: nothing listens there",
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
                "broke off the connection"
            }
            io::ErrorKind::UnexpectedEof => "closed the connection before it had answered",
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                "cannot be reached from here: no route"
            }
            _ if is_name_lookup(error) => "cannot be reached: its host name cannot be resolved",
            _ => "cannot be reached",
        };
        ClusterError::Unreachable { detail: format!("{server} {what}") }
    }

    fn explain_tls(&self, error: &rustls::Error) -> ClusterError {
        let server = &self.server;
        let detail = match error {
            rustls::Error::InvalidCertificate(problem) => self.explain_certificate(problem),
            rustls::Error::AlertReceived(alert) => explain_alert(server, *alert),
            rustls::Error::InvalidMessage(_) => format!("{server} does not speak TLS: is it an http:// server?"),
            rustls::Error::PeerIncompatible(_) => {
                format!("{server} speaks neither TLS 1.3 nor TLS 1.2 as regcred does")
            }
            _ => format!("the TLS handshake with {server} failed"),
        };
        ClusterError::Tls { detail }
    }

    fn explain_certificate(&self, problem: &CertificateError) -> String {
        let Self { server, expected_name, own_ca } = self;
        let subject = format!("the certificate of {server}");
        match problem {
            CertificateError::UnknownIssuer | CertificateError::BadSignature if *own_ca => {
                format!("{subject} is not signed by the given caCertificate")
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                format!("{subject} is not signed by an authority that this host trusts: give its caCertificate")
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => format!("{subject} has expired"),
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                format!("{subject} is not valid yet: compare the clocks")
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("{subject} is not made out to {expected_name}: give its name as tlsServerName")
            }
            CertificateError::Revoked => format!("{subject} has been revoked"),
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                format!("{subject} is not made for servers")
            }
            _ => format!("{subject} does not verify"),
        }
    }
}

fn explain_alert(server: &str, alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateRequired => format!("{server} wants a client certificate"),
        AlertDescription::BadCertificate
        | AlertDescription::CertificateExpired
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::UnknownCA => format!("{server} does not accept the client certificate ({alert:?})"),
        _ => format!("{server} ended the TLS handshake ({alert:?})"),
    }
}

/// The standard library has no kind for a failed look-up, only this text of its own.
fn is_name_lookup(error: &io::Error) -> bool {
    error.to_string().starts_with("failed to lookup address information")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use rustls::{InvalidMessage, PeerIncompatible};

    use super::*;

    fn peer(own_ca: bool) -> Peer {
        Peer { server: "https://k8s:6443".to_owned(), expected_name: "k8s".to_owned(), own_ca }
    }

    #[rstest]
    #[case::other_ca(
        CertificateError::UnknownIssuer,
        "the certificate of https://k8s:6443 is not signed by the given caCertificate"
    )]
    #[case::same_name(
        CertificateError::BadSignature,
        "the certificate of https://k8s:6443 is not signed by the given caCertificate"
    )]
    #[case::expired(CertificateError::Expired, "the certificate of https://k8s:6443 has expired")]
    #[case::future(
        CertificateError::NotValidYet,
        "the certificate of https://k8s:6443 is not valid yet: compare the clocks"
    )]
    #[case::name(
        CertificateError::NotValidForName,
        "the certificate of https://k8s:6443 is not made out to k8s: give its name as tlsServerName"
    )]
    #[case::revoked(CertificateError::Revoked, "the certificate of https://k8s:6443 has been revoked")]
    #[case::purpose(CertificateError::InvalidPurpose, "the certificate of https://k8s:6443 is not made for servers")]
    #[case::broken(CertificateError::BadEncoding, "the certificate of https://k8s:6443 does not verify")]
    fn a_certificate_that_does_not_verify_is_explained(#[case] problem: CertificateError, #[case] detail: &str) {
        let explained = peer(true).explain(&rustls::Error::InvalidCertificate(problem));
        assert_eq!(explained, ClusterError::Tls { detail: detail.to_owned() });
    }

    #[rstest]
    #[case(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer), "give its caCertificate")]
    #[case(rustls::Error::AlertReceived(AlertDescription::CertificateRequired), "wants a client certificate")]
    #[case(
        rustls::Error::AlertReceived(AlertDescription::CertificateExpired),
        "does not accept the client certificate (CertificateExpired)"
    )]
    #[case(
        rustls::Error::AlertReceived(AlertDescription::HandshakeFailure),
        "ended the TLS handshake (HandshakeFailure)"
    )]
    #[case(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType), "does not speak TLS")]
    #[case(rustls::Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered), "neither TLS 1.3 nor TLS 1.2")]
    #[case(rustls::Error::DecryptError, "the TLS handshake with https://k8s:6443 failed")]
    fn tls_is_found_inside_an_io_error(#[case] error: rustls::Error, #[case] words: &str) {
        let wrapped = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, error));
        let ClusterError::Tls { detail } = peer(false).explain(&wrapped) else { panic!("not TLS") };
        assert!(detail.contains(words), "{detail}");
    }

    #[rstest]
    #[case(io::ErrorKind::ConnectionRefused.into(), "cluster-unreachable", "nothing listens there")]
    #[case(io::ErrorKind::ConnectionReset.into(), "cluster-unreachable", "broke off the connection")]
    #[case(io::ErrorKind::UnexpectedEof.into(), "cluster-unreachable", "closed the connection")]
    #[case(
        io::Error::other(io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof")),
        "cluster-unreachable",
        "closed the connection"
    )]
    #[case(io::ErrorKind::NetworkUnreachable.into(), "cluster-unreachable", "no route")]
    #[case(io::ErrorKind::TimedOut.into(), "cluster-timeout", "in time")]
    #[case(
        io::Error::other("failed to lookup address information: Name or service not known"),
        "cluster-unreachable",
        "cannot be resolved"
    )]
    #[case(io::Error::other("canary"), "cluster-unreachable", "cannot be reached")]
    fn a_failed_connection_is_explained(#[case] error: io::Error, #[case] slug: &str, #[case] words: &str) {
        let explained = peer(true).explain(&error);
        assert_eq!(explained.slug(), slug);
        assert!(explained.to_string().contains(words) && !explained.to_string().contains("canary"), "{explained}");
    }
}
