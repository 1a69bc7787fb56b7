//! What the service manager is told: ready, still alive, stopping (the datagrams of `sd_notify(3)`).
//!
//! The protocol is one datagram of `NAME=VALUE` lines to the socket named by `NOTIFY_SOCKET`: a path, or an abstract name
//! after `@`. `WATCHDOG_USEC` asks for a `WATCHDOG=1` at least that often, `WATCHDOG_PID` says of whom.

use std::ffi::OsString;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The variables of the protocol. A child that is not to speak for the service must not get them.
pub const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// The longest status line in bytes; the rest is cut off.
const STATUS_BYTES_MAX: usize = 256;

/// Speaks to the service manager; where there is none, says nothing.
///
/// A message that cannot be sent is dropped with a line in the log: the service manager then does what it does with a
/// service that is silent, and nothing here depends on it.
#[derive(Debug)]
pub struct Notifier {
    to: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// As the environment says. A variable that makes no sense is as good as none, with a warning.
    #[must_use]
    pub fn from_env() -> Self {
        let [socket, usec, pid] = VARIABLES.map(std::env::var_os);
        Self::new(socket, usec, pid)
    }

    fn new(socket: Option<OsString>, usec: Option<OsString>, pid: Option<OsString>) -> Self {
        let Some(name) = socket else { return Self { to: None, watchdog: None } };
        let number = |text: OsString| text.to_str().and_then(|t| t.parse::<u64>().ok());
        let is_me = pid.is_none_or(|pid| number(pid) == Some(u64::from(std::process::id())));
        let watchdog = usec.and_then(number).filter(|usec| 0 < *usec && is_me).map(Duration::from_micros);
        let address = match name.as_bytes() {
            [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
            [b'/', ..] => SocketAddr::from_pathname(&name),
            _ => Err(std::io::Error::other("neither a path nor an abstract name")),
        };
        let to = address.and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            // A service manager that does not read must not stop us.
            socket.set_nonblocking(true)?;
            Ok((socket, address))
        });
        match to {
            Ok(to) => Self { to: Some(to), watchdog },
            Err(error) => {
                tracing::warn!(target: "quorate_supervisor", ?name, %error, "NOTIFY_SOCKET cannot be used");
                Self { to: None, watchdog: None }
            }
        }
    }

    /// How often [`Notifier::alive`] is to be called: half of what the service manager allows.
    #[must_use]
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|allowed| allowed / 2)
    }

    /// The service can be used.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// It is alive.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// It begins to stop and needs so long for it at most.
    pub fn stopping(&self, deadline: Duration) {
        self.send(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={}", deadline.as_micros()));
    }

    /// One line for people, for `systemctl status`.
    pub fn status(&self, line: &str) {
        let mut line = line.replace(|c: char| c.is_control(), " ");
        let mut end = line.len().min(STATUS_BYTES_MAX);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        self.send(&format!("STATUS={line}"));
    }

    fn send(&self, message: &str) {
        let Some((socket, address)) = &self.to else { return };
        if let Err(error) = socket.send_to_addr(message.as_bytes(), address) {
            tracing::warn!(target: "quorate_supervisor", message, %error, "the service manager was not told");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 1024];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }

    #[test]
    fn messages_arrive_at_a_path_and_at_an_abstract_name() {
        let path = std::env::temp_dir().join(format!("quorate-notify-{}", std::process::id()));
        let at_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("quorate-notify-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        let at_name = UnixDatagram::bind_addr(&abstract_name).unwrap();
        let pairs = [(path.clone().into_os_string(), &at_path), (format!("@{name}").into(), &at_name)];
        for (variable, socket) in pairs {
            let notifier = Notifier::new(Some(variable), Some("3000000".into()), None);
            assert_eq!(notifier.watchdog_interval(), Some(Duration::from_millis(1500)));
            notifier.ready();
            notifier.alive();
            notifier.status(&format!("two\nlines {}", "é".repeat(300)));
            notifier.stopping(Duration::from_secs(60));
            assert_eq!(received(socket), "READY=1");
            assert_eq!(received(socket), "WATCHDOG=1");
            let status = received(socket);
            assert!(status.starts_with("STATUS=two lines é") && status.len() <= 7 + STATUS_BYTES_MAX);
            assert_eq!(received(socket), "STOPPING=1\nEXTEND_TIMEOUT_USEC=60000000");
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn without_a_service_manager_or_with_a_wrong_one_nothing_is_said() {
        for socket in [None, Some("relative/path".into()), Some("/nowhere/at/all".into())] {
            let notifier = Notifier::new(socket, Some("1000000".into()), Some("1".into()));
            assert_eq!(notifier.watchdog_interval(), None, "the watchdog is another process's");
            notifier.ready();
        }
    }
}
