//! A proxy in front of Postgres that loses what it is told to lose. The benches share this file.

use std::{io, net::SocketAddr, thread};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{oneshot, watch},
};

/// What the proxy forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// Everything.
    Whole,
    /// Everything but notifications, like a transaction pooler.
    WithoutNotifications,
    /// Nothing, like a network that drops packets. Connections stay open.
    Cut,
}

/// A port in front of Postgres. Closed when dropped.
pub struct PgProxy {
    address: SocketAddr,
    /// The wire of new connections, and how often open ones were cut.
    state: watch::Sender<(Wire, usize)>,
    _stop: oneshot::Sender<()>,
}

impl PgProxy {
    /// Opens a port in front of a server on loopback.
    pub fn before(port: u16, wire: Wire) -> Self {
        let (state, watched) = watch::channel((wire, 0));
        let (stop, stopped) = oneshot::channel::<()>();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("set");
        let address = listener.local_addr().expect("an address");
        // A separate runtime keeps the proxy running while a test blocks its thread.
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("a listener");
                let accepting = async {
                    loop {
                        let Ok((client, _)) = listener.accept().await else { continue };
                        tokio::spawn(forward(client, port, watched.clone()));
                    }
                };
                tokio::select! {
                    () = accepting => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, state, _stop: stop }
    }

    /// URL of a database behind the proxy, from its own URL. Without TLS, so that the proxy can
    /// read messages.
    pub fn url(&self, url: &str) -> String {
        let mut url: url::Url = url.parse().expect("a URL");
        url.set_port(Some(self.address.port())).expect("set");
        url.set_host(Some("127.0.0.1")).expect("set");
        url.set_query(Some("sslmode=disable"));
        url.to_string()
    }

    /// Sets the wire of open and of new connections.
    pub fn becomes(&self, wire: Wire) {
        self.state.send_modify(|(now, _)| *now = wire);
    }

    /// Cuts all open connections for good. New ones are whole.
    pub fn cut_open_connections(&self) {
        self.state.send_modify(|(now, cuts)| (*now, *cuts) = (Wire::Whole, *cuts + 1));
    }
}

type State = watch::Receiver<(Wire, usize)>;

/// Forwards one connection. Errors mean that a peer is gone.
async fn forward(client: TcpStream, port: u16, state: State) {
    let cuts = state.borrow().1;
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::select! {
        _ = requests(from_client, to_server, state.clone(), cuts) => {}
        _ = responses(from_server, to_client, state, cuts) => {}
    }
}

async fn requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut state: State, cuts: usize) -> io::Result<()> {
    let mut chunk = vec![0; 16 * 1024];
    loop {
        let count = from.read(&mut chunk).await?;
        if count == 0 {
            return Ok(());
        }
        passing(&mut state, cuts).await;
        to.write_all(&chunk[..count]).await?;
    }
}

/// Forwards messages: a byte with the type, and a length that includes itself.
async fn responses(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut state: State, cuts: usize) -> io::Result<()> {
    loop {
        let mut message = vec![0; 5];
        from.read_exact(&mut message).await?;
        let length = u32::from_be_bytes([message[1], message[2], message[3], message[4]]);
        message.resize(1 + usize::try_from(length).unwrap_or_default(), 0);
        from.read_exact(&mut message[5..]).await?;
        let wire = passing(&mut state, cuts).await;
        let is_notification = message[0] == b'A';
        if !is_notification || wire == Wire::Whole {
            to.write_all(&message).await?;
        }
    }
}

/// Waits until the wire is not cut, and returns it.
async fn passing(state: &mut State, cuts: usize) -> Wire {
    loop {
        let (wire, now) = *state.borrow_and_update();
        if now == cuts && wire != Wire::Cut {
            return wire;
        }
        if state.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
