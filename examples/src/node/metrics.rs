//! The metrics over HTTP, on a loopback address only: `metrics = "127.0.0.1:9100"` in `node.toml`.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The longest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 8 * 1024;
/// How long a reader may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves `text` at `/metrics` until the task is ended.
///
/// # Errors
/// The address is no loopback address, or cannot be listened on.
pub(crate) async fn serve(
    address: &str,
    text: impl Fn() -> String + Send + Sync + 'static,
) -> Result<tokio::task::JoinHandle<()>, String> {
    let bad = |e: &dyn core::fmt::Display| format!("node.toml: metrics: {address}: {e}");
    let parsed: SocketAddr = address.parse().map_err(|e| bad(&e))?;
    if !parsed.ip().is_loopback() {
        return Err(bad(&"a loopback address is wanted: the metrics are neither encrypted nor protected"));
    }
    let listener = TcpListener::bind(parsed).await.map_err(|e| bad(&e))?;
    Ok(tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            // One reader at a time: a second one waits, and a slow one not for long.
            if !matches!(tokio::time::timeout(PATIENCE, answer(stream, &text)).await, Ok(Ok(()))) {
                tracing::debug!(target: "quorate", "a reader of the metrics went away");
            }
        }
    }))
}

async fn answer(mut stream: TcpStream, text: &(impl Fn() -> String + Sync)) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        if HEAD_BYTES_MAX < head.len() || stream.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|b| *b == b' ');
    let (status, body) = match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/metrics" | b"/")) => ("200 OK", text()),
        (Some(b"GET"), _) => ("404 Not Found", "there is only /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "only GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn get(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn metrics_are_served_on_loopback_only_and_nothing_else_is() {
        let error = serve("0.0.0.0:0", String::new).await.unwrap_err();
        assert!(error.contains("a loopback address is wanted"), "{error}");
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let task = serve(&free.to_string(), || "a 1\n".to_owned()).await.unwrap();
        let answer = get(free, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\na 1\n"), "{answer}");
        assert!(get(free, "GET /etc HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404"));
        assert!(get(free, "POST /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405"));
        task.abort();
    }
}
