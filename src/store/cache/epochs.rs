//! Which writes are on stable storage: counted by epochs.
//!
//! Every version of a block that is written belongs to an epoch, and stays on
//! its account until a sync that began after its write-back has succeeded. A
//! flush closes the present epoch and waits until no account up to it is open.
//! So it waits for what was there before it, and not for what comes after.

use std::collections::VecDeque;
use std::time::Instant;

/// A stretch of time between two closings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u64);

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// Versions not written back yet.
    unwritten: u32,
    /// Versions not synced yet, the unwritten ones among them.
    unsynced: u32,
    /// When the first of them was made.
    since: Option<Instant>,
}

/// The open accounts, oldest first; the last is the present epoch's.
#[derive(Debug)]
pub(super) struct Epochs {
    first: u64,
    accounts: VecDeque<Account>,
}

impl Epochs {
    pub fn new() -> Epochs {
        Epochs {
            first: 0,
            accounts: VecDeque::from([Account::default()]),
        }
    }

    pub fn current(&self) -> Epoch {
        Epoch(self.first + self.accounts.len() as u64 - 1)
    }

    /// Ends the present epoch, if anything is in it; returns the last that has
    /// ended.
    pub fn close(&mut self) -> Epoch {
        let closed = self.current();
        // Whoever flushes again and again while the disk fails must not make
        // the list of accounts grow.
        if self.accounts.len() > 1 && self.accounts.back().is_some_and(|a| a.unsynced == 0) {
            return Epoch(closed.0 - 1);
        }
        self.accounts.push_back(Account::default());
        self.prune();
        closed
    }

    fn account(&mut self, epoch: Epoch) -> Option<&mut Account> {
        let index = epoch.0.checked_sub(self.first);
        debug_assert!(index.is_some(), "{epoch:?} is closed");
        self.accounts.get_mut(index? as usize)
    }

    /// A version was made, or one counted elsewhere belongs here now.
    pub fn add(&mut self, epoch: Epoch, unwritten: bool, now: Instant) {
        if let Some(account) = self.account(epoch) {
            account.unwritten += u32::from(unwritten);
            account.unsynced += 1;
            account.since.get_or_insert(now);
        }
    }

    /// A version is on stable storage, or belongs elsewhere now.
    pub fn remove(&mut self, epoch: Epoch, unwritten: bool) {
        if let Some(account) = self.account(epoch) {
            account.unwritten -= u32::from(unwritten);
            account.unsynced -= 1;
        }
        self.prune();
    }

    /// A version was written back.
    pub fn written(&mut self, epoch: Epoch) {
        if let Some(account) = self.account(epoch) {
            account.unwritten -= 1;
        }
    }

    /// A version must be written back again.
    pub fn unwritten(&mut self, epoch: Epoch) {
        if let Some(account) = self.account(epoch) {
            account.unwritten += 1;
        }
    }

    fn prune(&mut self) {
        while self.accounts.len() > 1 && self.accounts.front().is_some_and(|a| a.unsynced == 0) {
            self.accounts.pop_front();
            self.first += 1;
        }
    }

    /// Whether all of this closed epoch and those before is on stable storage.
    pub fn is_synced(&self, epoch: Epoch) -> bool {
        self.first > epoch.0
            || self
                .accounts
                .iter()
                .take((epoch.0 - self.first) as usize + 1)
                .all(|a| a.unsynced == 0)
    }

    /// Whether all of this epoch and those before is written back.
    pub fn is_written(&self, epoch: Epoch) -> bool {
        self.first > epoch.0
            || self
                .accounts
                .iter()
                .take((epoch.0 - self.first) as usize + 1)
                .all(|a| a.unwritten == 0)
    }

    /// Since when the oldest version waits.
    pub fn oldest(&self) -> Option<Instant> {
        self.accounts
            .iter()
            .find(|a| a.unsynced > 0)
            .and_then(|a| a.since)
    }
}

#[cfg(test)]
impl Epochs {
    /// The epochs whose accounts are open.
    pub fn open(&self) -> impl Iterator<Item = Epoch> + use<> {
        (self.first..self.first + self.accounts.len() as u64).map(Epoch)
    }

    /// What is unwritten and what is unsynced of an epoch, if it is open.
    pub fn counts(&self, epoch: Epoch) -> Option<(u32, u32)> {
        let index = epoch.0.checked_sub(self.first)?;
        let account = self.accounts.get(index as usize)?;
        Some((account.unwritten, account.unsynced))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_epoch_waits_for_its_own_and_no_later_ones() {
        let (mut epochs, now) = (Epochs::new(), Instant::now());
        let first = epochs.current();
        epochs.add(first, true, now);
        let closed = epochs.close();
        assert_eq!(closed, first);
        let second = epochs.current();
        epochs.add(second, true, now);
        assert!(!epochs.is_written(closed) && !epochs.is_synced(closed));
        epochs.written(first);
        assert!(epochs.is_written(closed) && !epochs.is_synced(closed));
        epochs.unwritten(first);
        assert!(!epochs.is_written(closed));
        epochs.written(first);
        epochs.remove(first, false);
        assert!(epochs.is_synced(closed) && !epochs.is_synced(second));
        assert_eq!(epochs.oldest(), Some(now));
        epochs.remove(second, true);
        assert!(epochs.is_synced(second) && epochs.oldest().is_none());
    }

    #[test]
    fn closing_again_and_again_makes_no_accounts() {
        let (mut epochs, now) = (Epochs::new(), Instant::now());
        let first = epochs.current();
        epochs.add(first, true, now);
        assert_eq!(epochs.close(), first);
        assert_eq!(epochs.close(), first);
        assert_eq!(epochs.open().count(), 2);
        let second = epochs.current();
        epochs.add(second, true, now);
        assert_eq!(epochs.close(), second);
        assert!(!epochs.is_synced(first));
        epochs.remove(first, true);
        assert!(epochs.is_synced(first) && !epochs.is_synced(second));
    }

    #[test]
    fn an_empty_epoch_is_synced_at_once() {
        let mut epochs = Epochs::new();
        let closed = epochs.close();
        assert!(epochs.is_synced(closed) && epochs.is_written(closed));
    }
}
