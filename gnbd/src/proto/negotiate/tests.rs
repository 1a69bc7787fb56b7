//! The negotiation, option by option.

use super::super::{put_option, take_u64};
use super::*;

struct One;
impl Exports for One {
    fn list(&self) -> Vec<(String, String)> {
        vec![("disk".into(), "a disk".into()), ("shared".into(), String::new())]
    }
    fn find(&self, name: &str, admitted: Option<&str>) -> Found {
        let geometry = Geometry {
            size_bytes: 1 << 20,
            block_bytes: 512,
            preferred_bytes: 4096,
            transfer_bytes_max: PAYLOAD_BYTES_MAX,
            read_only: false,
            can_discard: true,
        };
        let export =
            || Found::Export(ExportDescription { geometry, description: "a disk".into(), multi_conn: true });
        match name {
            "disk" | "" => export(),
            "shared" if admitted == Some("shared") => export(),
            "shared" => Found::NotAdmitted,
            _ => Found::Unknown,
        }
    }
}

struct Talk {
    machine: Negotiation,
}

impl Talk {
    fn new(mode: TlsMode, flags: u32) -> Self {
        let mut out = Vec::new();
        let mut machine = Negotiation::new(mode, &mut out);
        assert_eq!(out.len(), 18);
        machine.receive(&flags.to_be_bytes());
        Self { machine }
    }

    fn raw(&mut self, bytes: &[u8]) -> (Step, Vec<u8>) {
        self.machine.receive(bytes);
        let mut out = Vec::new();
        let step = self.machine.next(&One, &mut out);
        (step, out)
    }

    /// Sends one option; returns the step and the types and data of the replies.
    fn option(&mut self, option: u32, data: &[u8]) -> (Step, Vec<(u32, Vec<u8>)>) {
        let mut bytes = Vec::new();
        put_option(&mut bytes, option, data);
        let (step, out) = self.raw(&bytes);
        (step, replies(&out, option))
    }

    fn kinds(&mut self, option: u32, data: &[u8]) -> Vec<u32> {
        self.option(option, data).1.into_iter().map(|(k, _)| k).collect()
    }
}

fn replies(mut out: &[u8], option: u32) -> Vec<(u32, Vec<u8>)> {
    let mut all = Vec::new();
    while !out.is_empty() {
        assert_eq!(take_u64(&mut out), Some(OPTION_REPLY_MAGIC));
        assert_eq!(take_u32(&mut out), Some(option));
        let kind = take_u32(&mut out).unwrap();
        let len = take_u32(&mut out).unwrap() as usize;
        all.push((kind, out[..len].to_vec()));
        out = &out[len..];
    }
    all
}

fn info(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, name);
    put_u16(&mut data, infos.len() as u16);
    infos.iter().for_each(|i| put_u16(&mut data, *i));
    data
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, name);
    put_u32(&mut data, queries.len() as u32);
    queries.iter().for_each(|q| put_string(&mut data, q));
    data
}

#[test]
fn go_starts_transmission_with_what_was_negotiated() {
    let mut t = Talk::new(TlsMode::Off, 3);
    assert_eq!(t.kinds(OPT_STRUCTURED_REPLY, &[]), [REP_ACK]);
    assert_eq!(
        t.kinds(OPT_SET_META_CONTEXT, &meta("disk", &["base:allocation"])),
        [REP_META_CONTEXT, REP_ACK]
    );
    let (step, replies) = t.option(OPT_GO, &info("disk", &[3, 1, 2, 77]));
    let kinds: Vec<u32> = replies.iter().map(|r| r.0).collect();
    assert_eq!(kinds, [REP_INFO, REP_INFO, REP_INFO, REP_INFO, REP_ACK]);
    let Step::Transmission(t) = step else { panic!("{step:?}") };
    assert!(t.structured && t.allocation_context == Some(1) && !t.admitted && t.rest.is_empty());
}

#[test]
fn a_context_of_another_export_is_not_selected() {
    let mut t = Talk::new(TlsMode::Off, 3);
    t.kinds(OPT_STRUCTURED_REPLY, &[]);
    t.kinds(OPT_SET_META_CONTEXT, &meta("", &["base:allocation"]));
    let (step, _) = t.option(OPT_GO, &info("disk", &[]));
    assert!(matches!(step, Step::Transmission(t) if t.allocation_context.is_none()));
}

#[test]
fn what_cannot_be_answered_is_an_error_and_the_connection_goes_on() {
    let mut t = Talk::new(TlsMode::Off, 3);
    assert_eq!(t.kinds(99, b"whatever"), [REP_ERR_UNSUP]);
    assert_eq!(t.kinds(4, b""), [REP_ERR_UNSUP]);
    assert_eq!(t.kinds(OPT_LIST, b"x"), [REP_ERR_INVALID]);
    assert_eq!(t.kinds(OPT_STRUCTURED_REPLY, b"x"), [REP_ERR_INVALID]);
    assert_eq!(t.kinds(OPT_SET_META_CONTEXT, &meta("disk", &[])), [REP_ERR_INVALID]);
    assert_eq!(t.kinds(OPT_STARTTLS, b""), [REP_ERR_POLICY]);
    assert_eq!(t.kinds(OPT_GO, b"\0\0\0\x7fdisk\0\0"), [REP_ERR_INVALID]);
    assert_eq!(t.kinds(OPT_GO, &info(&"n".repeat(4097), &[])), [REP_ERR_INVALID]);
    assert_eq!(t.kinds(OPT_INFO, &info("none", &[])), [REP_ERR_UNKNOWN]);
    assert_eq!(t.kinds(OPT_GO, &info("shared", &[])), [REP_ERR_POLICY]);
    assert_eq!(t.kinds(OPT_QUORATE_HELLO, b""), [REP_ERR_UNSUP]);
    assert_eq!(t.kinds(OPT_LIST, b""), [REP_SERVER, REP_SERVER, REP_ACK]);
    t.kinds(OPT_STRUCTURED_REPLY, &[]);
    assert_eq!(t.kinds(OPT_SET_META_CONTEXT, &meta("disk", &["base:", "x:y", "none"])), [REP_ACK]);
    assert_eq!(t.kinds(OPT_LIST_META_CONTEXT, &meta("disk", &["base:"])), [REP_META_CONTEXT, REP_ACK]);
    assert_eq!(t.kinds(OPT_LIST_META_CONTEXT, &meta("disk", &[])), [REP_META_CONTEXT, REP_ACK]);
    let (step, replies) = t.option(OPT_ABORT, b"data");
    assert_eq!((step, replies[0].0), (Step::Close(CloseReason::Abort), REP_ACK));
}

#[test]
fn without_tls_only_starttls_and_abort_are_served_where_tls_is_required() {
    let mut t = Talk::new(TlsMode::Required, 3);
    for option in [OPT_LIST, OPT_GO, OPT_INFO, OPT_STRUCTURED_REPLY, OPT_QUORATE_HELLO, 99] {
        assert_eq!(t.kinds(option, b""), [REP_ERR_TLS_REQD], "{option}");
    }
    let (step, replies) = t.option(OPT_STARTTLS, b"");
    assert_eq!((step, replies[0].0), (Step::StartTls, REP_ACK));
    t.machine.tls_established(true);
    assert_eq!(t.kinds(OPT_STARTTLS, b""), [REP_ERR_INVALID]);
    let (step, _) = t.option(OPT_QUORATE_HELLO, b"me");
    assert_eq!(step, Step::Hello(b"me".to_vec()));
    let mut out = Vec::new();
    t.machine.answer_private(b"you", Some("shared".into()), &mut out);
    assert_eq!(replies_kinds(&out), [OPT_QUORATE_HELLO, REP_ACK]);
    let (step, _) = t.option(OPT_GO, &info("shared", &[]));
    assert!(matches!(step, Step::Transmission(t) if t.admitted));
}

fn replies_kinds(out: &[u8]) -> Vec<u32> {
    replies(out, OPT_QUORATE_HELLO).into_iter().map(|r| r.0).collect()
}

#[test]
fn export_name_pads_unless_told_not_to_and_closes_on_failure() {
    for (flags, len) in [(3, 10), (1, 134), (0, 134)] {
        let mut t = Talk::new(TlsMode::Off, flags);
        let mut bytes = Vec::new();
        put_option(&mut bytes, OPT_EXPORT_NAME, b"disk");
        let (step, out) = t.raw(&bytes);
        assert!(matches!(step, Step::Transmission(_)));
        assert_eq!(out.len(), len);
    }
    let mut t = Talk::new(TlsMode::Off, 3);
    let (step, _) = t.option(OPT_EXPORT_NAME, b"shared");
    assert_eq!(step, Step::Close(CloseReason::Export { name: "shared".into() }));
    let mut t = Talk::new(TlsMode::Required, 3);
    let (step, _) = t.option(OPT_EXPORT_NAME, b"disk");
    assert!(matches!(step, Step::Close(CloseReason::Export { .. })));
}

#[test]
fn bytes_behind_starttls_and_junk_close_the_connection() {
    let mut t = Talk::new(TlsMode::Required, 3);
    let mut bytes = Vec::new();
    put_option(&mut bytes, OPT_STARTTLS, b"");
    bytes.push(0);
    assert_eq!(t.raw(&bytes).0, Step::Close(CloseReason::Injected(1)));
    let mut t = Talk::new(TlsMode::Off, 7);
    assert_eq!(t.raw(&[]).0, Step::Close(CloseReason::Flags(7)));
    let mut t = Talk::new(TlsMode::Off, 3);
    assert!(matches!(t.raw(&[7; 16]).0, Step::Close(CloseReason::Magic(_))));
    let mut t = Talk::new(TlsMode::Off, 3);
    let mut bytes = Vec::new();
    put_u64(&mut bytes, IHAVEOPT);
    put_u32(&mut bytes, OPT_LIST);
    put_u32(&mut bytes, u32::MAX);
    assert!(matches!(t.raw(&bytes).0, Step::Close(CloseReason::TooLong { .. })));
}

proptest::proptest! {
    #[test]
    fn mutated_options_never_panic_and_never_stall(
        option in 0_u32..13,
        data in proptest::collection::vec(0_u8..8, 0..64),
        cut in 0_usize..200,
        flip in proptest::option::of((0_usize..80, 0_u8..)),
    ) {
        let mut t = Talk::new(TlsMode::Off, 3);
        let mut bytes = Vec::new();
        put_option(&mut bytes, OPT_STRUCTURED_REPLY, b"");
        put_option(&mut bytes, option, &data);
        if let Some((at, value)) = flip && let Some(byte) = bytes.get_mut(at) {
            *byte = value;
        }
        bytes.truncate(cut.max(1));
        t.raw(&bytes);
    }
}
