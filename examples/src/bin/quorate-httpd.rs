//! A very small HTTP server for one file, started by the `quorate-http` resource agent.
//!
//! `quorate-httpd --listen IP:PORT --source PATH --pidfile FILE`. It answers on its port before it goes into the
//! background, so that its parent's exit code says whether it serves. `SOCKET:FILESYSTEM:PATH` as source reads through a
//! node's file API instead of a mount.

use quorate::admin::client::Client;
use quorate::admin::protocol::{FileOperation, IO_BYTES_MAX, Reply};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// The longest request head that is read.
const HEAD_BYTES_MAX: u64 = 8 << 10;

/// Tells the process in the background from the one that was started.
const BACKGROUND: &str = "QUORATE_HTTPD_BACKGROUND";

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quorate-httpd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn option(name: &str) -> io::Result<String> {
    let mut args = std::env::args().skip_while(|a| a != name);
    args.nth(1).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is missing")))
}

fn serve() -> io::Result<()> {
    let (listen, source, pidfile) = (option("--listen")?, option("--source")?, option("--pidfile")?);
    if std::env::var_os(BACKGROUND).is_none() {
        return start();
    }
    let listener = TcpListener::bind(&listen)
        .map_err(|e| io::Error::new(e.kind(), format!("cannot listen on {listen}: {e}")))?;
    std::fs::write(&pidfile, format!("{}\n", std::process::id()))?;
    // The parent waits for this line.
    let mut stdout = io::stdout();
    writeln!(stdout, "ready")?;
    stdout.flush()?;
    for stream in listener.incoming().flatten() {
        let _broken_connection = answer(stream, &source);
    }
    Ok(())
}

/// Starts ourselves in the background and waits until that process serves.
fn start() -> io::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(BACKGROUND, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    if line.trim() == "ready" {
        Ok(())
    } else {
        Err(io::Error::other(format!("it ended: {}", child.wait()?)))
    }
}

fn answer(mut stream: TcpStream, source: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut request = String::new();
    BufReader::new(stream.try_clone()?.take(HEAD_BYTES_MAX)).read_line(&mut request)?;
    let (status, body) = match (request.starts_with("GET "), read(source)) {
        (false, _) => ("405 Method Not Allowed", b"only GET is answered\n".to_vec()),
        (true, Ok(body)) => ("200 OK", body),
        (true, Err(error)) => ("503 Service Unavailable", format!("{error}\n").into_bytes()),
    };
    // The process number tells a client whether the service has moved.
    write!(
        stream,
        "HTTP/1.1 {status}\r\nServer: quorate-httpd/{}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        std::process::id(),
        body.len()
    )?;
    stream.write_all(&body)
}

fn read(source: &str) -> io::Result<Vec<u8>> {
    let parts: Vec<&str> = source.splitn(3, ':').collect();
    let [socket, filesystem, path] = parts[..] else { return std::fs::read(source) };
    let mut client = Client::connect(Path::new(socket))?;
    let operation = FileOperation::Read { path: path.into(), offset: 0, len: IO_BYTES_MAX as u32 };
    match client.file(filesystem, operation)? {
        Reply::Data(data) => Ok(data),
        other => Err(io::Error::other(format!("unexpected answer: {other:?}"))),
    }
}
