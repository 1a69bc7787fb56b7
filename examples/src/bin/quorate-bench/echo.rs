//! The limits of messages: one of the same size that goes there and back over TCP, TCP with TLS, and QUIC; a stream of bytes.

use crate::child::{Process, pin, say};
use crate::node::credentials;
use crate::sample::{Stopwatch, percentile};
use quorate_membership::NodeId;
use quorate_membership::driver::transport::{Channel, Lane, QuicTransport, TcpTransport, Transport};
use std::error::Error;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The size of a message that asks for a lock with a name of 24 bytes, TLS aside.
pub(crate) const MESSAGE_BYTES: usize = 84;
/// The blocks of a stream.
const STREAM_BYTES: usize = 64 << 10;

fn transport(kind: &str, dir: &Path, id: u32) -> Result<Arc<dyn Transport>, Box<dyn Error>> {
    let (credentials, lanes) = (credentials(dir, id)?, [Lane::Sessions]);
    Ok(match kind {
        "quic" => Arc::new(QuicTransport::new(UdpSocket::bind("127.0.0.1:0")?, credentials, &lanes)?),
        _ => Arc::new(TcpTransport::new(TcpListener::bind("127.0.0.1:0")?, credentials, &lanes)?),
    })
}

fn echo(mut stream: impl Read + Write) -> std::io::Result<()> {
    let mut bytes = [0; MESSAGE_BYTES];
    while stream.read_exact(&mut bytes).is_ok() {
        stream.write_all(&bytes)?;
    }
    Ok(())
}

fn ask(mut stream: impl Read + Write, count: u32) -> std::io::Result<Vec<f64>> {
    let mut bytes = [7; MESSAGE_BYTES];
    let mut spent = Vec::new();
    for _ in 0..count {
        let watch = Stopwatch::start();
        stream.write_all(&bytes)?;
        stream.read_exact(&mut bytes)?;
        spent.push(watch.nanos());
    }
    Ok(spent)
}

/// `DIR ID CPU KIND`: sends back what comes.
pub(crate) fn server(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [dir, id, cpu, kind] = args else { return Err("echo-server: arguments".into()) };
    pin(cpu)?;
    if kind == "unix" {
        let path = Path::new(dir).join("echo.sock");
        let listener = UnixListener::bind(&path)?;
        say(&format!("ready {}", path.display()));
        let (stream, _) = listener.accept()?;
        return Ok(echo(stream)?);
    }
    if kind == "raw" {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        say(&format!("ready {}", listener.local_addr()?));
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        return Ok(echo(stream)?);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let transport = transport(kind, Path::new(dir), id.parse()?)?;
        say(&format!("ready {}", transport.local_address()));
        let Some(Channel { mut read, mut write, .. }) = transport.accept().await else { return Ok(()) };
        let mut bytes = [0; MESSAGE_BYTES];
        while read.read_exact(&mut bytes).await.is_ok() {
            write.write_all(&bytes).await?;
            write.flush().await?;
        }
        Ok(())
    })
}

/// `DIR ID CPU KIND ADDRESS COUNT`: p50 and p99 of so many round trips, in nanoseconds.
pub(crate) fn client(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [dir, id, cpu, kind, address, count] = args else { return Err("echo-client: arguments".into()) };
    pin(cpu)?;
    let count: u32 = count.parse()?;
    let mut spent = Vec::new();
    if kind == "unix" {
        spent = ask(UnixStream::connect(address)?, count)?;
    } else if kind == "raw" {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        spent = ask(stream, count)?;
    } else {
        let (address, mut bytes): (SocketAddr, _) = (address.parse()?, [7; MESSAGE_BYTES]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let transport = transport(kind, Path::new(dir), id.parse()?)?;
            let channel = transport.dial(NodeId(1), address, Lane::Sessions).await?;
            let Channel { mut read, mut write, .. } = channel;
            for _ in 0..count {
                let watch = Stopwatch::start();
                write.write_all(&bytes).await?;
                write.flush().await?;
                read.read_exact(&mut bytes).await?;
                spent.push(watch.nanos());
            }
            Ok::<_, Box<dyn Error>>(())
        })?;
    }
    say(&format!("ok {} {}", percentile(&mut spent, 50.0), percentile(&mut spent, 99.0)));
    Ok(())
}

/// p50 and p99 of round trips between two processes on these CPUs.
pub(crate) fn round_trips(
    dir: &Path,
    kind: &str,
    cpus: [&str; 2],
    count: u32,
) -> Result<(f64, f64), Box<dyn Error>> {
    let dir = dir.to_string_lossy().into_owned();
    let words = |id: &str, cpu: &str| vec![dir.clone(), id.into(), cpu.into(), kind.to_owned()];
    let mut server = Process::start("echo-server", &words("1", cpus[0]))?;
    let address = server.expect("ready")?;
    let mut args = words("2", cpus[1]);
    args.extend([address, count.to_string()]);
    let mut client = Process::start("echo-client", &args)?;
    match client.answer()?[..] {
        [p50, p99] => Ok((p50, p99)),
        _ => Err("an echo without its figures".into()),
    }
}

/// `DIR ID CPU`: takes what comes, and says one byte at its end.
pub(crate) fn sink(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [dir, id, cpu] = args else { return Err("stream-sink: arguments".into()) };
    pin(cpu)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let transport = transport("tcp", Path::new(dir), id.parse()?)?;
        say(&format!("ready {}", transport.local_address()));
        let Some(Channel { mut read, mut write, .. }) = transport.accept().await else { return Ok(()) };
        let mut bytes = vec![0; STREAM_BYTES];
        // A block that begins with 1 is the last one.
        loop {
            read.read_exact(&mut bytes).await?;
            if bytes.first() == Some(&1) {
                break;
            }
        }
        write.write_all(&[1]).await?;
        write.flush().await?;
        // The other end closes.
        let _ = read.read(&mut bytes).await;
        Ok(())
    })
}

/// `DIR ID CPU ADDRESS MS`: bytes a second that a sink takes in blocks of 64 KiB.
pub(crate) fn source(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [dir, id, cpu, address, ms] = args else { return Err("stream-source: arguments".into()) };
    pin(cpu)?;
    let (address, time): (SocketAddr, f64) = (address.parse()?, ms.parse::<f64>()? * 1e6);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rate = runtime.block_on(async {
        let transport = transport("tcp", Path::new(dir), id.parse()?)?;
        let Channel { mut read, mut write, .. } = transport.dial(NodeId(1), address, Lane::Sessions).await?;
        let mut bytes = vec![0; STREAM_BYTES];
        let (watch, mut sent) = (Stopwatch::start(), 0);
        let mut is_last = false;
        while !is_last {
            is_last = time <= watch.nanos();
            if let Some(first) = bytes.first_mut() {
                *first = u8::from(is_last);
            }
            write.write_all(&bytes).await?;
            sent += STREAM_BYTES;
        }
        write.flush().await?;
        read.read_exact(&mut bytes[..1]).await?;
        Ok::<_, Box<dyn Error>>(sent as f64 * 1e9 / watch.nanos())
    })?;
    say(&format!("ok {rate}"));
    Ok(())
}
