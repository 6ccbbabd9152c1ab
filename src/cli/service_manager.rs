//! Readiness for a service manager, as for systemd's `Type=notify`.

use std::{
    io::Result,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

/// Tells the service manager that the service is ready. `socket` is its `NOTIFY_SOCKET`: a path, or
/// an abstract name after `@`.
///
/// # Errors
///
/// The error of the operating system if the socket does not accept the message.
pub(super) fn notify_ready(socket: &str) -> Result<()> {
    let address = match socket.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_reaches_an_abstract_socket() {
        let name = format!("regcred-test-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let mut message = [0; 16];

        notify_ready(&format!("@{name}")).unwrap();

        let length = manager.recv(&mut message).unwrap();
        assert_eq!(&message[..length], b"READY=1");
        drop(manager);
        assert!(notify_ready(&format!("@{name}")).is_err());
    }
}
