//! The edge: what stands between a caller, honest or not, and the routes.

mod browsers;
mod heads;
mod limits;
mod slow;
mod tls;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::support::PATIENCE;

/// A connection without anything that knows HTTP.
fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream.set_write_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// Sends bytes and reads until the server closes the connection: what it answered.
fn answers(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = connect(address);
    // The server may have closed the connection before all was sent.
    let _ = stream.write_all(bytes);
    read_to_the_end(&mut stream)
}

fn read_to_the_end(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    let mut chunk = [0; 16 * 1024];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => read.extend_from_slice(&chunk[..count]),
            // Closed with something unread: that is closed, too.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("the connection was not closed ({error}) after {}", String::from_utf8_lossy(&read)),
        }
    }
    String::from_utf8_lossy(&read).into_owned()
}

/// The statuses of all answers in a text.
fn statuses(answers: &str) -> Vec<&str> {
    answers.match_indices("HTTP/1.1 ").map(|(at, found)| &answers[at + found.len()..][..3]).collect()
}

/// A pause that is part of what a slow client is.
fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}
