//! One HTTP/1.1 request on one new connection.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// The body of `GET /`: the server's name. Every way to fail is an error, a short answer too.
pub fn get(to: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.set_nodelay(true)?;
    stream.write_all(request(to).as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    body(&answer)
}

/// What asks for the body, on a connection of its own.
pub fn request(to: SocketAddr) -> String {
    format!("GET / HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n")
}

/// The body of an answer that is whole.
pub fn body(answer: &str) -> io::Result<String> {
    let invalid = |reason: &str| io::Error::other(format!("{reason}: {answer:?}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| invalid("cut short"))?;
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(invalid("not 200"));
    }
    let mut lengths = head
        .lines()
        .filter_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    match lengths.next() {
        Some(length) if body.len() == length => Ok(body.to_owned()),
        _ => Err(invalid("body and content-length differ")),
    }
}

/// The errno's name, or what the error says.
pub fn error_name(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", nix::errno::Errno::from_raw(number)),
        None => error.to_string(),
    }
}
