//! Tests of the parser: layouts as the kernel's header has them, and hostile bytes.

use super::super::abi::ALL;
use super::*;
use proptest::prelude::*;

fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
    let mut m = Vec::new();
    m.extend(u32::try_from(40 + body.len()).unwrap().to_ne_bytes());
    m.extend(opcode.to_ne_bytes());
    m.extend(77_u64.to_ne_bytes());
    m.extend(5_u64.to_ne_bytes());
    for n in [1000_u32, 100, 4242, 0] {
        m.extend(n.to_ne_bytes());
    }
    m.extend(body);
    m
}

fn parse(message: &[u8]) -> Result<Op<'_>, OpError> {
    let (header, body) = Header::parse(message).unwrap();
    Op::parse(header.opcode, body)
}

#[test]
fn the_header_is_forty_bytes_and_names_the_caller() {
    let m = message(1, b"file\0");
    let (header, body) = Header::parse(&m).unwrap();
    assert_eq!(header, Header { opcode: 1, unique: Unique(77), node: 5, uid: 1000, gid: 100, pid: 4242 });
    assert_eq!(body, b"file\0");
}

#[test]
fn a_length_that_differs_from_the_header_is_refused() {
    let mut m = message(1, b"file\0");
    m.push(0);
    assert_eq!(Header::parse(&m), Err(Malformed));
    assert_eq!(Header::parse(&m[..39]), Err(Malformed));
}

#[test]
fn extensions_are_cut_off_and_may_not_exceed_the_body() {
    let mut m = message(1, b"a\0______12345678");
    m[36] = 1;
    assert_eq!(Header::parse(&m).unwrap().1, b"a\0______");
    m[36] = 3;
    assert_eq!(Header::parse(&m), Err(Malformed));
}

#[test]
fn the_flock_bit_stands_at_byte_eighty() {
    let mut body = Vec::new();
    for n in [9_u64, 0xabc, 0, i64::MAX.unsigned_abs()] {
        body.extend(n.to_ne_bytes());
    }
    for n in [1_u32, 4242, 0, 0] {
        body.extend(n.to_ne_bytes());
    }
    let mut m = message(33, &body);
    assert!(matches!(parse(&m), Ok(Op::Setlk { lock: LockOp { flock: false, .. }, wait: true })));
    let flag = if cfg!(target_endian = "little") { 40 + 40 } else { 40 + 43 };
    m[flag] = 1;
    let Ok(Op::Setlk { lock, wait: true }) = parse(&m) else { panic!("{:?}", parse(&m)) };
    assert!(lock.flock);
    assert_eq!((lock.handle, lock.owner, lock.kind), (Handle(9), LockOwner(0xabc), LockType::Write));
}

#[test]
fn names_are_not_empty_have_no_slash_and_end() {
    for body in [&b"\0"[..], b"a/b\0", b"endless"] {
        assert_eq!(parse(&message(1, body)), Err(OpError::Malformed(Opcode::Lookup)));
    }
    let long = [b'x'; abi::NAME_BYTES_MAX + 2];
    assert_eq!(parse(&message(1, &long)), Err(OpError::Malformed(Opcode::Lookup)));
}

#[test]
fn a_rename_has_two_names() {
    let mut body = 8_u64.to_ne_bytes().to_vec();
    body.extend(2_u32.to_ne_bytes());
    body.extend([0; 4]);
    body.extend(b"old\0new\0");
    assert_eq!(
        parse(&message(45, &body)),
        Ok(Op::Rename { name: b"old", to_node: 8, to_name: b"new", flags: 2 })
    );
}

#[test]
fn a_write_must_have_the_data_it_announces() {
    let mut body = Vec::new();
    body.extend(3_u64.to_ne_bytes());
    body.extend(4096_u64.to_ne_bytes());
    body.extend(5_u32.to_ne_bytes());
    body.extend(4_u32.to_ne_bytes());
    body.extend([0; 16]);
    body.extend(b"12345");
    let m = message(16, &body);
    assert_eq!(
        parse(&m),
        Ok(Op::Write { handle: Handle(3), offset: 4096, data: b"12345", flags: 0, kill_suidgid: true })
    );
    body.pop();
    assert_eq!(parse(&message(16, &body)), Err(OpError::Malformed(Opcode::Write)));
}

#[test]
fn setattr_has_the_fields_its_mask_names() {
    let mut body = Vec::new();
    body.extend((fattr::SIZE | fattr::MTIME_NOW | fattr::ATIME | fattr::KILL_SUIDGID).to_ne_bytes());
    body.extend([0; 4]);
    for n in [9_u64, 12345, 0, 50, 60, 70] {
        body.extend(n.to_ne_bytes());
    }
    for n in [5_u32, 6, 7, 0o644, 0, 1, 2, 0] {
        body.extend(n.to_ne_bytes());
    }
    assert_eq!(body.len(), 88);
    let want = SetAttr {
        size: Some(12345),
        atime: Some(SetTime::At { seconds: 50, nanos: 5 }),
        mtime: Some(SetTime::Now),
        kill_suidgid: true,
        ..SetAttr::default()
    };
    assert_eq!(parse(&message(4, &body)), Ok(Op::Setattr(want)));
}

#[test]
fn a_batch_of_forgets_may_not_announce_more_than_it_has() {
    let mut body = vec![];
    body.extend(2_u32.to_ne_bytes());
    body.extend([0; 4]);
    for n in [5_u64, 1, 6, 3] {
        body.extend(n.to_ne_bytes());
    }
    let m = message(42, &body);
    let Ok(Op::BatchForget(forgets)) = parse(&m) else { panic!() };
    assert_eq!(forgets.iter().collect::<Vec<_>>(), [(5, 1), (6, 3)]);
    body[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
    assert_eq!(parse(&message(42, &body)), Err(OpError::Malformed(Opcode::BatchForget)));
}

#[test]
fn an_unknown_operation_is_named() {
    assert_eq!(parse(&message(9999, &[])), Err(OpError::Unknown(9999)));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok((header, body)) = Header::parse(&bytes) {
            let _ = Op::parse(header.opcode, body);
        }
    }

    #[test]
    fn random_bodies_of_every_operation_never_panic(
        which in 0..ALL.len(),
        body in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let m = message(ALL[which] as u32, &body);
        let (header, body) = Header::parse(&m).unwrap();
        if let Ok(Op::BatchForget(forgets)) = Op::parse(header.opcode, body) {
            assert!(forgets.iter().count() * 16 <= body.len());
        }
    }
}
