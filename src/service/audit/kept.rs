//! Where this process left a chain for changes.
//!
//! Who writes the event of a change does not see its transaction end. That is found out when the chain is locked the next time,
//! for the transaction has ended by then: the head is where it was to be after it, or the row is still the one of before. A head
//! that was set back by somebody is in a row that another transaction wrote.

use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use crate::{
    domain::audit::{Chain, Head},
    storage::audit::{LockedChain, TransactionId},
};

/// A chain, and where it was left.
#[derive(Debug)]
pub(super) struct KeptChain(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    chain_id: Uuid,
    /// Where the chain was last for certain.
    head: Head,
    /// The transaction that left it there, once that was seen.
    written_by: Option<TransactionId>,
    /// It is there instead, if this was committed.
    sent: Option<Sent>,
}

/// What a transaction wrote to a chain.
#[derive(Debug)]
struct Sent {
    transaction: TransactionId,
    /// Where the chain was to be after each of its writes.
    heads: Vec<Head>,
}

impl Kept {
    fn new(opened: Chain) -> Self {
        Self { chain_id: opened.opening.id, head: opened.head, written_by: None, sent: None }
    }

    /// The chain is there for certain, in the row that this transaction wrote.
    fn settle(&mut self, head: &Head, written_by: &TransactionId) {
        self.head = head.clone();
        self.written_by = Some(written_by.clone());
        self.sent = None;
    }
}

impl KeptChain {
    /// A chain that was just opened.
    pub(super) fn new(opened: Chain) -> Self {
        Self(Mutex::new(Kept::new(opened)))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock()
    }

    /// Which chain, and how many events it has if what was sent last was committed.
    pub(super) fn left_at(&self) -> (Uuid, i64) {
        let kept = self.kept();
        let head = kept.sent.as_ref().and_then(|sent| sent.heads.last()).unwrap_or(&kept.head);
        (kept.chain_id, head.sequence)
    }

    /// Whether the chain is where it was left, with what the transaction that has locked it wrote itself.
    pub(super) fn is_where_left(&self, locked: &LockedChain) -> bool {
        let mut kept = self.kept();
        let LockedChain { chain, transaction, written_by } = locked;
        if kept.chain_id != chain.opening.id {
            return false;
        }
        let is_own = kept.sent.as_ref().is_some_and(|sent| sent.transaction == *transaction);
        let is_sent = kept.sent.as_ref().is_some_and(|sent| sent.heads.contains(&chain.head));
        let is_before = kept.head == chain.head && kept.written_by.as_ref().is_none_or(|by| by == written_by);
        // What this transaction has written itself may still be rolled back.
        if !is_own && (is_sent || is_before) {
            kept.settle(&chain.head, written_by);
        }
        is_sent || is_before
    }

    /// A transaction is about to move the chain there. To be told before that is sent: nothing after it may come to its end.
    pub(super) fn send(&self, locked: &LockedChain, head: Head) {
        let mut kept = self.kept();
        if kept.chain_id != locked.chain.opening.id {
            return;
        }
        match &mut kept.sent {
            Some(sent) if sent.transaction == locked.transaction => sent.heads.push(head),
            sent => *sent = Some(Sent { transaction: locked.transaction.clone(), heads: vec![head] }),
        }
    }

    /// Goes on with another chain.
    pub(super) fn replace(&self, opened: Chain) {
        *self.kept() = Kept::new(opened);
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::domain::audit::Opening;

    fn head(sequence: i64) -> Head {
        Head { sequence, hash: sequence.to_be_bytes().to_vec() }
    }

    fn chain(id: Uuid, sequence: i64) -> Chain {
        let opening = Opening { id, number: 1, opened_at: crate::clock::now(), continues: None };
        Chain { opening, opening_hash: Vec::new(), key_id: String::new(), head: head(sequence), seal: Vec::new() }
    }

    /// The chain as a transaction finds it that another one left there.
    fn locked(id: Uuid, sequence: i64, written_by: u64, transaction: u64) -> LockedChain {
        let number = |number: u64| TransactionId::from(number.to_string());
        LockedChain { chain: chain(id, sequence), transaction: number(transaction), written_by: number(written_by) }
    }

    /// A chain that transaction 1 opened and transaction 2 has written to, which has ended.
    fn written() -> (Uuid, KeptChain) {
        let id = Uuid::now_v7();
        let kept = KeptChain::new(chain(id, 0));
        let first = locked(id, 0, 1, 2);
        assert!(kept.is_where_left(&first));
        kept.send(&first, head(1));
        (id, kept)
    }

    #[test]
    fn what_was_committed_is_where_the_chain_was_left() {
        let (id, kept) = written();
        assert!(kept.is_where_left(&locked(id, 1, 2, 3)));
        assert!(!kept.is_where_left(&locked(id, 0, 1, 4)));
        assert_eq!(kept.left_at(), (id, 1));
    }

    #[test]
    fn what_was_rolled_back_leaves_the_chain_where_it_was() {
        let (id, kept) = written();
        assert!(kept.is_where_left(&locked(id, 0, 1, 3)));
        assert!(!kept.is_where_left(&locked(id, 1, 2, 4)));
        assert_eq!(kept.left_at(), (id, 0));
    }

    #[test]
    fn a_chain_that_was_set_back_is_not_where_it_was_left() {
        let (id, kept) = written();
        assert!(!kept.is_where_left(&locked(id, 0, 3, 4)));
        assert_eq!(kept.left_at(), (id, 1));
        let (id, kept) = written();
        assert!(kept.is_where_left(&locked(id, 1, 2, 3)));
        assert!(!kept.is_where_left(&locked(id, 1, 4, 5)));
    }

    #[test]
    fn a_transaction_may_write_twice() {
        for is_committed in [true, false] {
            let (id, kept) = written();
            let again = locked(id, 1, 2, 2);
            assert!(kept.is_where_left(&again));
            kept.send(&again, head(2));
            let next = if is_committed { locked(id, 2, 2, 3) } else { locked(id, 0, 1, 3) };
            assert!(kept.is_where_left(&next), "{is_committed}");
        }
    }

    #[test]
    fn a_chain_that_was_replaced_is_left_alone() {
        let (id, kept) = written();
        let other = Uuid::now_v7();
        kept.replace(chain(other, 0));
        let late = locked(id, 0, 1, 3);
        assert!(!kept.is_where_left(&late));
        kept.send(&late, head(1));
        assert_eq!(kept.left_at(), (other, 0));
        assert!(kept.is_where_left(&locked(other, 0, 4, 5)));
    }
}
