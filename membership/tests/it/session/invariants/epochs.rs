//! A message is delivered in the epoch of its sending or later, and never once its sender's life was removed (R2).

use quorate_membership::{Epoch, Identity, View};

pub(crate) fn on_delivered(receiver: Identity, view: &View, from: Identity, epoch: Epoch) {
    assert!(
        epoch <= view.epoch,
        "epochs: {receiver} at epoch {} delivers a message of epoch {epoch}",
        view.epoch
    );
    assert!(
        view.contains(from),
        "epochs: {receiver} at epoch {} delivers a message of removed {from}",
        view.epoch
    );
}
