//! The server's half of the negotiation, from the greeting to the start of transmission (or the end).
//!
//! It never holds more than one option: the driver feeds what the socket gives, and asks for steps until none is left.

use super::consts::*;
use super::wire::{put_u16, put_u32, put_u64, take_u16, take_u32};
use super::{OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, PRIVATE_BYTES_MAX, STRING_BYTES_MAX};
use crate::Geometry;

const OPTION_HEADER_BYTES: usize = 16;
/// More info requests than there are kinds of information are a mistake, not an attack: they are ignored up to this many.
const INFO_REQUESTS_MAX: usize = 1024;
/// The one context we have.
const BASE_ALLOCATION: &str = "base:allocation";
const BASE_ALLOCATION_ID: u32 = 1;

/// Whether connections are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Never.
    Off,
    /// Always: before TLS only STARTTLS and ABORT are served (FORCEDTLS).
    Required,
}

/// What a client is told of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportDescription {
    /// Size, block size, read-only.
    pub geometry: Geometry,
    /// For people.
    pub description: String,
    /// Whether several connections see one cache, so that a flush on one holds for all.
    pub multi_conn: bool,
}

impl ExportDescription {
    fn transmission_flags(&self, structured: bool) -> u16 {
        let mut flags = TX_HAS_FLAGS | TX_SEND_FLUSH | TX_SEND_FUA;
        if self.geometry.read_only {
            flags |= TX_READ_ONLY;
        } else {
            flags |= TX_SEND_WRITE_ZEROES;
            if self.geometry.can_discard {
                flags |= TX_SEND_TRIM;
            }
        }
        if structured {
            flags |= TX_SEND_DF;
        }
        if self.multi_conn {
            flags |= TX_CAN_MULTI_CONN;
        }
        flags
    }
}

/// What the server has to offer to this connection.
pub trait Exports {
    /// Names and descriptions, as LIST shows them.
    fn list(&self) -> Vec<(String, String)>;
    /// Looks one up. `admitted` is the cluster export for which the connection's hello was accepted, if one was.
    fn find(&self, name: &str, admitted: Option<&str>) -> Found;
}

/// What a look-up gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It may be used.
    Export(ExportDescription),
    /// There is none of that name.
    Unknown,
    /// It is there, for members whose hello was accepted (R10).
    NotAdmitted,
}

/// Why the connection ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client said goodbye.
    #[error("the client aborted the negotiation")]
    Abort,
    /// Client flags that were not offered.
    #[error("client flags {0:#x} were not offered")]
    Flags(u32),
    /// Not an option where one must be.
    #[error("not an option: magic {0:#x}")]
    Magic(u64),
    /// An option longer than any of ours.
    #[error("option {option} has {length} bytes, the limit is {limit}")]
    TooLong {
        /// Which.
        option: u32,
        /// Its length.
        length: u32,
        /// The limit.
        limit: usize,
    },
    /// EXPORT_NAME of an export that cannot be used: that option has no other answer.
    #[error("export {name:?} cannot be used")]
    Export {
        /// Which.
        name: String,
    },
    /// Bytes in clear behind STARTTLS, which somebody in between may have put there.
    #[error("{0} bytes in clear behind STARTTLS")]
    Injected(usize),
}

/// What the driver does next, after sending what is in `out`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Feed more bytes.
    NeedMore,
    /// Send `out`, then do the TLS handshake, then call [`Negotiation::tls_established`].
    StartTls,
    /// Send `out`; a member announces itself; answer with [`Negotiation::answer_private`].
    Hello(Vec<u8>),
    /// Send `out`; a request to the fence service; answer with [`Negotiation::answer_private`].
    Control(Vec<u8>),
    /// Send `out`, then serve requests.
    Transmission(Transmission),
    /// Send `out`, then close.
    Close(CloseReason),
}

/// What was negotiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmission {
    /// The export.
    pub export: String,
    /// Whether structured replies are spoken.
    pub structured: bool,
    /// The id of the `base:allocation` context, if it was selected for this export.
    pub allocation_context: Option<u32>,
    /// Whether the connection is a member's: answers to FLUSH carry the verifier.
    pub admitted: bool,
    /// Bytes of the transmission phase that were read already.
    pub rest: Vec<u8>,
}

/// The machine.
#[derive(Debug)]
pub struct Negotiation {
    mode: TlsMode,
    tls: bool,
    /// Our own options are served: a member's certificate was shown.
    private: bool,
    buf: Vec<u8>,
    flags: Option<u32>,
    structured: bool,
    context: Option<String>,
    admitted: Option<String>,
    waiting: Option<u32>,
}

impl Negotiation {
    /// A new connection. The greeting is put into `out`.
    #[must_use]
    pub fn new(mode: TlsMode, out: &mut Vec<u8>) -> Self {
        put_u64(out, NBDMAGIC);
        put_u64(out, IHAVEOPT);
        put_u16(out, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        Self {
            mode,
            tls: false,
            private: false,
            buf: Vec::new(),
            flags: None,
            structured: false,
            context: None,
            admitted: None,
            waiting: None,
        }
    }

    /// The most bytes it wants to be fed now.
    #[must_use]
    pub fn wanted(&self) -> usize {
        let limit = OPTION_HEADER_BYTES + if self.private { PRIVATE_BYTES_MAX } else { OPTION_BYTES_MAX };
        limit.saturating_sub(self.buf.len()).min(OPTION_BYTES_MAX)
    }

    /// Takes bytes from the socket.
    ///
    /// # Panics
    /// If they are more than wanted: a mistake of the driver.
    pub fn receive(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.wanted(), "the driver reads no more than is wanted");
        self.buf.extend_from_slice(bytes);
    }

    /// TLS is up; everything negotiated before is forgotten. `member` says that the certificate is one of this cluster, so
    /// that our own options are served.
    ///
    /// # Panics
    /// If no STARTTLS was under way.
    pub fn tls_established(&mut self, member: bool) {
        assert_eq!(self.waiting.take(), Some(OPT_STARTTLS), "TLS follows STARTTLS");
        self.tls = true;
        self.private = member;
        self.structured = false;
        self.context = None;
        self.admitted = None;
    }

    /// The answer to a private option. `admitted` is the export that the connection may use from now on.
    ///
    /// # Panics
    /// If none is waiting, or the answer is longer than allowed.
    pub fn answer_private(&mut self, answer: &[u8], admitted: Option<String>, out: &mut Vec<u8>) {
        let option = self.waiting.take().expect("a private option is waiting");
        assert!(answer.len() <= PRIVATE_BYTES_MAX, "answers are bounded");
        if option == OPT_QUORATE_HELLO {
            self.admitted = admitted;
        }
        reply(out, option, option, answer);
        reply(out, option, REP_ACK, &[]);
    }

    /// Carries the negotiation on as far as the bytes go.
    pub fn next(&mut self, exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        assert_eq!(self.waiting, None, "the driver answers before it asks for more");
        loop {
            match self.step(exports, out) {
                Some(step) => return step,
                None => continue,
            }
        }
    }

    fn step(&mut self, exports: &dyn Exports, out: &mut Vec<u8>) -> Option<Step> {
        let Some(flags) = self.flags else {
            let Some(bytes) = self.buf.first_chunk() else { return Some(Step::NeedMore) };
            let flags = u32::from_be_bytes(*bytes);
            self.buf.drain(..4);
            if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
                return Some(Step::Close(CloseReason::Flags(flags)));
            }
            self.flags = Some(flags);
            return None;
        };
        let Some(header) = self.buf.first_chunk::<OPTION_HEADER_BYTES>() else { return Some(Step::NeedMore) };
        let magic = u64::from_be_bytes(*header.first_chunk().expect("16 bytes begin with 8"));
        let mut rest = &header[8..];
        let (option, length) =
            (|| Some((take_u32(&mut rest)?, take_u32(&mut rest)?)))().expect("two words are left");
        if magic != IHAVEOPT {
            return Some(Step::Close(CloseReason::Magic(magic)));
        }
        let ours = matches!(option, OPT_QUORATE_HELLO | OPT_QUORATE_CONTROL);
        let limit = if ours && self.private { PRIVATE_BYTES_MAX } else { OPTION_BYTES_MAX };
        if limit < length as usize {
            return Some(Step::Close(CloseReason::TooLong { option, length, limit }));
        }
        let total = OPTION_HEADER_BYTES + length as usize;
        if self.buf.len() < total {
            return Some(Step::NeedMore);
        }
        let data = self.buf[OPTION_HEADER_BYTES..total].to_vec();
        self.buf.drain(..total);
        let fixed = flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
        self.on_option(option, data, fixed, exports, out)
    }

    fn on_option(
        &mut self,
        option: u32,
        data: Vec<u8>,
        fixed: bool,
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Option<Step> {
        let clear = self.mode == TlsMode::Required && !self.tls;
        match option {
            OPT_EXPORT_NAME => return Some(self.on_export_name(data, clear, exports, out)),
            // A client of the limited newstyle knows no option replies.
            _ if !fixed => return Some(Step::Close(CloseReason::Flags(0))),
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Some(Step::Close(CloseReason::Abort));
            }
            OPT_STARTTLS => return self.on_starttls(&data, out),
            _ if clear => error(out, option, REP_ERR_TLS_REQD, "TLS is required: send STARTTLS first"),
            OPT_LIST if !data.is_empty() => error(out, option, REP_ERR_INVALID, "LIST has no data"),
            OPT_LIST => {
                for (name, description) in exports.list() {
                    let mut entry = Vec::new();
                    put_string(&mut entry, &name);
                    entry.extend_from_slice(description.as_bytes());
                    reply(out, option, REP_SERVER, &entry);
                }
                reply(out, option, REP_ACK, &[]);
            }
            OPT_INFO | OPT_GO => return self.on_info(option, &data, exports, out),
            OPT_STRUCTURED_REPLY if !data.is_empty() => {
                error(out, option, REP_ERR_INVALID, "STRUCTURED_REPLY has no data");
            }
            OPT_STRUCTURED_REPLY => {
                self.structured = true;
                reply(out, option, REP_ACK, &[]);
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.on_meta(option, &data, exports, out),
            OPT_QUORATE_HELLO if self.private => {
                self.waiting = Some(option);
                self.admitted = None;
                return Some(Step::Hello(data));
            }
            OPT_QUORATE_CONTROL if self.private => {
                self.waiting = Some(option);
                return Some(Step::Control(data));
            }
            _ => error(out, option, REP_ERR_UNSUP, ""),
        }
        None
    }

    fn on_starttls(&mut self, data: &[u8], out: &mut Vec<u8>) -> Option<Step> {
        if !data.is_empty() || self.tls {
            error(out, OPT_STARTTLS, REP_ERR_INVALID, "STARTTLS has no data, and comes once");
            return None;
        }
        if self.mode == TlsMode::Off {
            error(out, OPT_STARTTLS, REP_ERR_POLICY, "no TLS here");
            return None;
        }
        if !self.buf.is_empty() {
            return Some(Step::Close(CloseReason::Injected(self.buf.len())));
        }
        reply(out, OPT_STARTTLS, REP_ACK, &[]);
        self.waiting = Some(OPT_STARTTLS);
        Some(Step::StartTls)
    }

    fn on_export_name(
        &mut self,
        data: Vec<u8>,
        clear: bool,
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Step {
        let name = String::from_utf8_lossy(&data).into_owned();
        let found = if clear || STRING_BYTES_MAX < name.len() {
            Found::Unknown
        } else {
            exports.find(&name, self.admitted.as_deref())
        };
        let Found::Export(export) = found else {
            return Step::Close(CloseReason::Export { name });
        };
        put_u64(out, export.geometry.size_bytes);
        put_u16(out, export.transmission_flags(self.structured));
        if self.flags.unwrap_or(0) & u32::from(FLAG_NO_ZEROES) == 0 {
            out.extend_from_slice(&[0; 124]);
        }
        Step::Transmission(self.transmission(name))
    }

    fn on_info(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Option<Step> {
        let Some((name, infos)) = parse_info(data) else {
            error(out, option, REP_ERR_INVALID, "the lengths in it do not fit");
            return None;
        };
        let export = match exports.find(&name, self.admitted.as_deref()) {
            Found::Export(export) => export,
            Found::Unknown => {
                error(out, option, REP_ERR_UNKNOWN, "there is no export of that name");
                return None;
            }
            Found::NotAdmitted => {
                error(out, option, REP_ERR_POLICY, "this export is for admitted members of the cluster");
                return None;
            }
        };
        let mut info = Vec::new();
        put_u16(&mut info, INFO_EXPORT);
        put_u64(&mut info, export.geometry.size_bytes);
        put_u16(&mut info, export.transmission_flags(self.structured));
        reply(out, option, REP_INFO, &info);
        // Sent unasked too: a client that knows it obeys it.
        info.clear();
        put_u16(&mut info, INFO_BLOCK_SIZE);
        put_u32(&mut info, export.geometry.block_bytes);
        put_u32(&mut info, export.geometry.preferred_bytes.max(512));
        put_u32(&mut info, export.geometry.transfer_bytes_max.min(PAYLOAD_BYTES_MAX));
        reply(out, option, REP_INFO, &info);
        for (kind, text) in [(INFO_NAME, &name), (INFO_DESCRIPTION, &export.description)] {
            if infos.contains(&kind) {
                info.clear();
                put_u16(&mut info, kind);
                info.extend_from_slice(text.as_bytes());
                reply(out, option, REP_INFO, &info);
            }
        }
        reply(out, option, REP_ACK, &[]);
        (option == OPT_GO).then(|| Step::Transmission(self.transmission(name)))
    }

    fn on_meta(&mut self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) {
        let set = option == OPT_SET_META_CONTEXT;
        if set {
            // Replaced in any case, also by a request that fails.
            self.context = None;
        }
        let parsed = if self.structured { parse_meta(data) } else { None };
        let Some((name, queries)) = parsed else {
            return error(out, option, REP_ERR_INVALID, "structured replies first, and lengths that fit");
        };
        match exports.find(&name, self.admitted.as_deref()) {
            Found::Export(_) => {}
            Found::Unknown => {
                return error(out, option, REP_ERR_UNKNOWN, "there is no export of that name");
            }
            Found::NotAdmitted => {
                return error(out, option, REP_ERR_POLICY, "this export is for admitted members");
            }
        }
        let asked = |q: &Vec<u8>| q == BASE_ALLOCATION.as_bytes() || (!set && q == b"base:");
        if queries.iter().any(asked) || (!set && queries.is_empty()) {
            let mut context = Vec::new();
            put_u32(&mut context, if set { BASE_ALLOCATION_ID } else { 0 });
            context.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, option, REP_META_CONTEXT, &context);
            if set {
                self.context = Some(name);
            }
        }
        reply(out, option, REP_ACK, &[]);
    }

    fn transmission(&mut self, export: String) -> Transmission {
        Transmission {
            structured: self.structured,
            allocation_context: (self.context.as_ref() == Some(&export)).then_some(BASE_ALLOCATION_ID),
            admitted: self.admitted.as_ref() == Some(&export),
            export,
            rest: std::mem::take(&mut self.buf),
        }
    }
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    put_u64(out, OPTION_REPLY_MAGIC);
    put_u32(out, option);
    put_u32(out, kind);
    put_u32(out, u32::try_from(data.len()).expect("replies to options are short"));
    out.extend_from_slice(data);
}

fn error(out: &mut Vec<u8>, option: u32, kind: u32, text: &str) {
    reply(out, option, kind, text.as_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_u32(out, u32::try_from(text.len()).expect("names are short"));
    out.extend_from_slice(text.as_bytes());
}

fn take_name(from: &mut &[u8]) -> Option<String> {
    let len = take_u32(from)? as usize;
    let (name, rest) = from.split_at_checked(len)?;
    *from = rest;
    if STRING_BYTES_MAX < len || name.contains(&0) {
        return None;
    }
    String::from_utf8(name.to_vec()).ok()
}

/// name length, name, count, info requests: exactly filling the data.
fn parse_info(mut data: &[u8]) -> Option<(String, Vec<u16>)> {
    let name = take_name(&mut data)?;
    let count = usize::from(take_u16(&mut data)?);
    if data.len() != 2 * count || INFO_REQUESTS_MAX < count {
        return None;
    }
    let infos = (0..count).map_while(|_| take_u16(&mut data)).collect();
    Some((name, infos))
}

/// name length, name, count, queries each with its length: exactly filling the data.
fn parse_meta(mut data: &[u8]) -> Option<(String, Vec<Vec<u8>>)> {
    let name = take_name(&mut data)?;
    let count = take_u32(&mut data)? as usize;
    let mut queries = Vec::new();
    for _ in 0..count {
        let len = take_u32(&mut data)? as usize;
        let (query, rest) = data.split_at_checked(len)?;
        queries.push(query.to_vec());
        data = rest;
    }
    data.is_empty().then_some((name, queries))
}

#[cfg(test)]
mod tests;
