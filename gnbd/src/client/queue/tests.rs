//! The queue, rule by rule.

use super::*;

const ONE: Verifier = Verifier([1; 16]);
const TWO: Verifier = Verifier([2; 16]);

struct Run {
    queue: ClientQueue,
    ops: u64,
}

impl Run {
    fn connected() -> Self {
        let mut run = Self { queue: ClientQueue::new(), ops: 0 };
        assert!(run.give(Input::Connected { verifier: Some(ONE) }).is_empty());
        run
    }

    /// What comes out, in short: `w3+2` is a write of 2 bytes at 3, `!` a completion, `e` one with an error.
    fn give(&mut self, input: Input) -> Vec<String> {
        let mut out = Vec::new();
        self.queue.handle(input, &mut out);
        out.into_iter()
            .map(|o| match o {
                Output::Send(tag, Command::Write { offset, len, .. }) => format!("{}:w{offset}+{len}", tag.0),
                Output::Send(tag, Command::Read { offset, len, .. }) => format!("{}:r{offset}+{len}", tag.0),
                Output::Send(tag, Command::Flush) => format!("{}:f", tag.0),
                Output::Send(tag, other) => format!("{}:{other:?}", tag.0),
                Output::Complete(id, Ok(())) => format!("!{}", id.0),
                Output::Complete(id, Err(_)) => format!("e{}", id.0),
                Output::Reconnect => "reconnect".into(),
            })
            .collect()
    }

    fn submit(&mut self, operation: Operation) -> Vec<String> {
        self.ops += 1;
        self.give(Input::Submit(OpId(self.ops), operation))
    }

    fn write(&mut self, offset: u64, len: usize) -> Vec<String> {
        self.submit(Operation::Write { offset, data: Arc::new(Buf::zeroed(len)), fua: false })
    }

    fn ok(&mut self, tag: u64) -> Vec<String> {
        self.give(Input::Reply { tag: Tag(tag), result: Ok(()), verifier: None })
    }

    fn failed(&mut self, tag: u64) -> Vec<String> {
        self.give(Input::Reply { tag: Tag(tag), result: Err(Errno::Io), verifier: None })
    }

    fn flushed(&mut self, tag: u64, verifier: Verifier) -> Vec<String> {
        self.give(Input::Reply { tag: Tag(tag), result: Ok(()), verifier: Some(verifier) })
    }
}

#[test]
fn a_flush_covers_what_was_acknowledged_before_it_was_sent() {
    let mut run = Run::connected();
    assert_eq!(run.write(0, 4), ["1:w0+4"]);
    assert_eq!(run.ok(1), ["!1"]);
    assert_eq!(run.write(4, 4), ["2:w4+4"]);
    assert_eq!(run.submit(Operation::Flush), ["3:f"]);
    assert_eq!(run.ok(2), ["!2"]);
    assert_eq!(run.flushed(3, ONE), ["!3"]);
    assert!(!run.queue.is_clean());
    run.give(Input::Lost);
    assert_eq!(run.give(Input::Connected { verifier: Some(TWO) }), ["4:w4+4"]);
}

#[test]
fn the_same_verifier_after_a_loss_resends_only_what_was_not_answered() {
    let mut run = Run::connected();
    run.write(0, 4);
    run.ok(1);
    run.write(8, 4);
    run.give(Input::Lost);
    assert_eq!(run.give(Input::Connected { verifier: Some(ONE) }), ["3:w8+4"]);
    assert!(run.ok(2).is_empty(), "an answer of the generation before");
}

#[test]
fn nothing_new_is_sent_before_what_is_sent_again_is_answered() {
    let mut run = Run::connected();
    run.write(0, 4);
    run.ok(1);
    run.give(Input::Lost);
    assert!(run.write(100, 4).is_empty());
    assert_eq!(run.give(Input::Connected { verifier: Some(TWO) }), ["2:w0+4"]);
    assert!(run.submit(Operation::Read { offset: 0, len: 4 }).is_empty());
    assert_eq!(run.ok(2), ["3:w100+4", "4:r0+4"]);
}

#[test]
fn a_resend_that_was_cut_off_is_made_again_under_the_same_verifier() {
    let mut run = Run::connected();
    run.write(0, 4);
    run.ok(1);
    run.give(Input::Lost);
    run.give(Input::Connected { verifier: Some(TWO) });
    run.give(Input::Lost);
    assert_eq!(run.give(Input::Connected { verifier: Some(TWO) }), ["3:w0+4"]);
}

#[test]
fn a_new_verifier_in_a_flush_waits_for_what_is_under_way_then_resends_then_flushes_again() {
    let mut run = Run::connected();
    run.write(0, 4);
    run.ok(1);
    run.write(2, 4);
    assert_eq!(run.submit(Operation::Flush), ["3:f"]);
    assert!(run.flushed(3, TWO).is_empty());
    assert!(run.write(50, 4).is_empty());
    assert_eq!(run.ok(2), ["!2", "4:w0+2", "5:w2+4"]);
    assert!(run.ok(4).is_empty());
    assert_eq!(run.ok(5), ["6:f", "7:w50+4"]);
    assert_eq!(run.flushed(6, TWO), ["!3"]);
}

#[test]
fn writes_that_overlap_are_sent_one_after_the_other() {
    let mut run = Run::connected();
    assert_eq!(run.write(0, 8), ["1:w0+8"]);
    assert!(run.write(4, 8).is_empty());
    assert_eq!(run.write(100, 8), ["2:w100+8"]);
    assert_eq!(run.ok(1), ["!1", "3:w4+8"]);
}

#[test]
fn what_was_revoked_is_never_sent_again() {
    let mut run = Run::connected();
    run.write(0, 8);
    run.ok(1);
    assert_eq!(run.write(20, 8), ["2:w20+8"]);
    assert!(run.give(Input::Revoke { offset: 4, len: 20 }).is_empty());
    assert_eq!(run.give(Input::Lost), ["e2"]);
    assert_eq!(run.give(Input::Connected { verifier: Some(TWO) }), ["3:w0+4"]);
    let mut run = Run::connected();
    run.queue.plant(Some(QueueBug::IgnoreRevoke));
    run.write(0, 8);
    run.ok(1);
    run.give(Input::Revoke { offset: 0, len: 8 });
    run.give(Input::Lost);
    assert_eq!(run.give(Input::Connected { verifier: Some(TWO) }), ["2:w0+8"], "the mistake shows");
}

#[test]
fn the_end_is_for_ever() {
    let mut run = Run::connected();
    run.write(0, 8);
    assert_eq!(run.give(Input::End(IoError::Fenced { detail: String::new() })), ["e1"]);
    assert_eq!(run.write(0, 8), ["e2"]);
    assert!(run.give(Input::Connected { verifier: Some(ONE) }).is_empty());
    assert_eq!(run.write(0, 8), ["e3"]);
}

#[test]
fn much_that_is_retained_is_flushed_without_being_asked() {
    let mut run = Run::connected();
    let len = 8 << 20;
    for i in 0..4 {
        run.write(i * len, len as usize);
    }
    for tag in 1..=3 {
        run.ok(tag);
    }
    assert_eq!(run.ok(4), ["!4", "5:f"]);
    assert!(run.flushed(5, ONE).is_empty());
    assert!(run.queue.is_clean());
}

#[test]
fn a_server_that_is_going_away_is_left_and_asked_again() {
    let mut run = Run::connected();
    run.write(0, 4);
    let down = Input::Reply { tag: Tag(1), result: Err(Errno::Shutdown), verifier: None };
    assert_eq!(run.give(down), ["reconnect"]);
    assert_eq!(run.give(Input::Connected { verifier: Some(ONE) }), ["2:w0+4"]);
}

/// A plain server says nothing of what a failed flush lost: a kernel reports it once, and the next flush succeeds.
#[test]
fn after_a_failed_flush_a_plain_server_gets_everything_again_before_the_next() {
    let mut run = Run { queue: ClientQueue::new(), ops: 0 };
    assert!(run.give(Input::Connected { verifier: None }).is_empty());
    run.write(0, 4);
    run.ok(1);
    assert_eq!(run.submit(Operation::Flush), ["2:f"]);
    assert_eq!(run.write(8, 4), ["3:w8+4"]);
    assert!(run.failed(2).is_empty(), "what is under way is awaited first");
    assert_eq!(run.ok(3), ["!3", "4:w0+4", "5:w8+4"]);
    run.ok(4);
    assert_eq!(run.ok(5), ["6:f"]);
    assert_eq!(run.ok(6), ["!2"]);
    assert!(run.queue.is_clean());
}

#[test]
fn a_flush_that_a_plain_server_fails_again_and_again_is_reported_and_the_data_still_owed() {
    let mut run = Run { queue: ClientQueue::new(), ops: 0 };
    run.give(Input::Connected { verifier: None });
    run.write(0, 4);
    run.ok(1);
    assert_eq!(run.submit(Operation::Flush), ["2:f"]);
    assert_eq!(run.failed(2), ["3:w0+4"]);
    assert_eq!(run.ok(3), ["4:f"]);
    assert_eq!(run.failed(4), ["5:w0+4"]);
    assert_eq!(run.ok(5), ["6:f"]);
    assert_eq!(run.failed(6), ["e2", "7:w0+4"]);
    run.ok(7);
    assert!(!run.queue.is_clean());
}

/// The queue's own flush has nobody to report a failure to: what it did not make durable must not pass for durable.
#[test]
fn a_failed_flush_that_nobody_asked_for_loses_nothing_at_a_plain_server() {
    let mut run = Run { queue: ClientQueue::new(), ops: 0 };
    run.give(Input::Connected { verifier: None });
    let len = 8 << 20;
    for i in 0..4 {
        run.write(i * len, len as usize);
    }
    (1..=3).for_each(|tag| drop(run.ok(tag)));
    assert_eq!(run.ok(4), ["!4", "5:f"]);
    let again: Vec<String> = (0..4).map(|i| format!("{}:w{}+{len}", 6 + i, i * len)).collect();
    assert_eq!(run.failed(5), again);
    (6..=8).for_each(|tag| drop(run.ok(tag)));
    assert_eq!(run.ok(9), ["10:f"]);
    run.ok(10);
    assert!(run.queue.is_clean());
}
