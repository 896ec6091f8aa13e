//! Memory shared with a file: words that survive the process, and slots whose
//! bytes are lent out while they do not change.
//!
//! One owner writes ([`Slots`] is not `Clone` and writing takes `&mut`). A
//! [`Loan`] reads a part of a slot from any thread, and the kernel through it;
//! while a slot is lent, writing to it is refused. Both rules are checked here,
//! so that no mistake elsewhere can make two see one byte change.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, compiler_fence};

use memmap2::{Advice, MmapOptions, MmapRaw};

const PAGE: usize = 4096;

#[derive(Debug)]
struct Shared {
    memory: MmapRaw,
    words: usize,
    slots_at: usize,
    slot_size: usize,
    /// How often each slot is lent.
    lent: Box<[AtomicU32]>,
}

/// The owner's side: words, and slots of equal size.
#[derive(Debug)]
pub struct Slots(Arc<Shared>);

/// A part of a slot, unchanged as long as this lives.
#[derive(Debug)]
pub struct Loan {
    shared: Arc<Shared>,
    slot: u32,
    start: u32,
    len: u32,
}

/// The length of a file for so many words and slots, in bytes.
pub fn file_len(words: usize, slot_size: usize, slots: usize) -> usize {
    (words * 8).next_multiple_of(PAGE) + slot_size * slots
}

impl Slots {
    /// Maps a file that is [`file_len`] long. Room for what is touched must be
    /// allocated, or a full filesystem ends the process with SIGBUS.
    pub fn map(file: &File, words: usize, slot_size: usize, slots: usize) -> io::Result<Slots> {
        let len = file_len(words, slot_size, slots);
        if file.metadata()?.len() < len as u64 || slot_size == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let memory = MmapOptions::new().len(len).map_raw(file)?;
        let lent = std::iter::repeat_with(|| AtomicU32::new(0))
            .take(slots)
            .collect();
        let slots_at = (words * 8).next_multiple_of(PAGE);
        Ok(Slots(Arc::new(Shared {
            memory,
            words,
            slots_at,
            slot_size,
            lent,
        })))
    }

    /// Takes the words into memory and keeps them there, where that is allowed.
    pub fn keep_words(&self) {
        self.keep(0, self.0.slots_at);
    }

    /// Takes these slots into memory and keeps them there, where that is
    /// allowed. Their room is allocated.
    pub fn keep_slots(&self, slots: std::ops::Range<u32>) {
        let size = self.0.slot_size;
        let slots = slots.start as usize..(slots.end as usize).min(self.0.lent.len());
        self.keep(self.0.slots_at + slots.start * size, slots.len() * size);
    }

    fn keep(&self, at: usize, len: usize) {
        // Both only help: what is not here yet, or was swapped out, comes.
        let _ = self.0.memory.advise_range(Advice::PopulateWrite, at, len);
        // SAFETY: within the mapping, whose length `map` has checked; locking
        // changes no byte. Without the right to lock it fails, and nothing else.
        unsafe { libc::mlock(self.0.memory.as_ptr().add(at).cast(), len) };
    }

    /// A word.
    pub fn word(&self, index: usize) -> u64 {
        self.0.word(index).load(Ordering::Acquire)
    }

    /// Sets a word. All that this thread wrote before is in memory before it,
    /// and all that it writes after is after it, in the order in which a later
    /// process finds them: stores of one thread reach shared memory in program
    /// order when it is killed, so only the compiler has to be held.
    pub fn set_word(&mut self, index: usize, value: u64) {
        self.0.word(index).store(value, Ordering::Release);
        compiler_fence(Ordering::SeqCst);
        #[cfg(test)]
        watch::stored();
    }

    /// Writes bytes into a slot that is not lent; `false` (and nothing written)
    /// if it is, or if they do not fit.
    pub fn write(&mut self, slot: u32, at: usize, bytes: &[u8]) -> bool {
        if self.is_lent(slot) {
            return false;
        }
        let Some(to) = self.0.bytes_at(slot, at, bytes.len()) else {
            return false;
        };
        // SAFETY: the range is within the slot; nobody reads it, since it is
        // not lent, only we lend, and we are borrowed mutably; `bytes` is not
        // of this slot, since a borrow of it would be a borrow of us.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        #[cfg(test)]
        watch::stored();
        true
    }

    /// Copies a part of one slot to the same place in another that is not lent;
    /// `false` if that cannot be.
    pub fn copy(&mut self, from: u32, to: u32, at: usize, len: usize) -> bool {
        if from == to || self.is_lent(to) {
            return false;
        }
        let (Some(source), Some(target)) =
            (self.0.bytes_at(from, at, len), self.0.bytes_at(to, at, len))
        else {
            return false;
        };
        // SAFETY: both ranges lie within slots that differ; nobody reads the
        // target, and nobody but us writes the source.
        unsafe { std::ptr::copy_nonoverlapping(source, target, len) };
        #[cfg(test)]
        watch::stored();
        true
    }

    /// Whether someone still has a loan of the slot.
    pub fn is_lent(&self, slot: u32) -> bool {
        self.0
            .lent
            .get(slot as usize)
            .is_none_or(|lent| lent.load(Ordering::Acquire) > 0)
    }

    /// A part of a slot, to look at now; empty if it is not within the slot.
    pub fn bytes(&self, slot: u32, at: usize, len: usize) -> &[u8] {
        match self.0.bytes_at(slot, at, len) {
            // SAFETY: within the slot; only writing changes it, and that needs
            // &mut self: not while this slice lives.
            Some(start) => unsafe { std::slice::from_raw_parts(start, len) },
            None => &[],
        }
    }

    /// Lends a part of a slot; `None` if it is not within it.
    pub fn lend(&self, slot: u32, at: usize, len: usize) -> Option<Loan> {
        self.0.bytes_at(slot, at, len)?;
        self.0.lent[slot as usize].fetch_add(1, Ordering::Relaxed);
        Some(Loan {
            shared: Arc::clone(&self.0),
            slot,
            start: at as u32,
            len: len as u32,
        })
    }
}

/// A look at the memory after each store of this thread, where a process may be
/// killed.
#[cfg(test)]
pub mod watch {
    use std::cell::RefCell;

    thread_local! {
        static LOOK: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    }

    /// Calls `look` after each store, until `work` has ended.
    pub fn each_store(look: impl FnMut() + 'static, work: impl FnOnce()) {
        LOOK.set(Some(Box::new(look)));
        work();
        LOOK.take();
    }

    pub(super) fn stored() {
        // What the look itself stores is none of its business.
        if let Some(mut look) = LOOK.take() {
            look();
            LOOK.set(Some(look));
        }
    }
}

impl Shared {
    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words, "word {index} of {}", self.words);
        // SAFETY: within the words, which begin page-aligned; they are changed
        // only as whole words; the mapping lives as long as self.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().cast::<u64>().add(index)) }
    }

    /// Where a range of a slot begins, if it is within the slot.
    fn bytes_at(&self, slot: u32, at: usize, len: usize) -> Option<*mut u8> {
        let within = at.checked_add(len).is_some_and(|end| end <= self.slot_size);
        if !within || slot as usize >= self.lent.len() {
            return None;
        }
        let offset = self.slots_at + slot as usize * self.slot_size + at;
        // SAFETY: `map` made the mapping long enough for all slots.
        Some(unsafe { self.memory.as_mut_ptr().add(offset) })
    }
}

impl Deref for Loan {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self
            .shared
            .bytes_at(self.slot, self.start as usize, self.len as usize)
        {
            // SAFETY: within the slot, and unchanged while it is lent, which it
            // is as long as self lives.
            Some(start) => unsafe { std::slice::from_raw_parts(start, self.len as usize) },
            None => &[],
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        // Release: who reads was done reading before the owner may write.
        self.shared.lent[self.slot as usize].fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots() -> (File, Slots) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(file_len(10, 4096, 3) as u64).unwrap();
        let slots = Slots::map(&file, 10, 4096, 3).unwrap();
        (file, slots)
    }

    #[test]
    fn what_is_lent_does_not_change() {
        let (_file, mut slots) = slots();
        assert!(slots.write(1, 8, b"old"));
        let loan = slots.lend(1, 8, 3).unwrap();
        assert!(!slots.write(1, 8, b"new") && !slots.copy(0, 1, 0, 16));
        assert!(slots.copy(1, 2, 0, 16) && slots.write(0, 0, b"other"));
        assert_eq!(&*loan, b"old");
        drop(loan);
        assert!(slots.write(1, 8, b"new"));
        assert_eq!(slots.bytes(1, 8, 3), b"new");
        assert_eq!(slots.bytes(2, 8, 3), b"old");
    }

    #[test]
    fn nothing_reaches_beyond_a_slot() {
        let (_file, mut slots) = slots();
        assert!(!slots.write(0, 4095, b"xx") && !slots.write(3, 0, b"x"));
        assert!(!slots.write(0, usize::MAX, b"x") && slots.write(2, 4094, b"xx"));
        assert!(slots.lend(0, 0, 4097).is_none() && slots.lend(3, 0, 0).is_none());
        assert!(!slots.copy(1, 1, 0, 8) && slots.bytes(0, 4000, 100).is_empty());
    }

    #[test]
    fn the_file_keeps_words_and_bytes() {
        let (file, mut slots) = slots();
        slots.set_word(9, 42);
        slots.write(2, 0, b"kept");
        drop(slots);
        let again = Slots::map(&file, 10, 4096, 3).unwrap();
        assert_eq!((again.word(9), again.bytes(2, 0, 4)), (42, &b"kept"[..]));
        file.set_len(100).unwrap();
        assert!(Slots::map(&file, 10, 4096, 3).is_err());
    }
}
