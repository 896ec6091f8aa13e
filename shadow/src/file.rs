//! What a file under an export must be able to do.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

/// A file of fixed-place bytes: an image, a block device, a shadow.
///
/// Every call is whole or an error: a short transfer is continued, and one that
/// cannot be finished is reported, never taken for success.
pub trait BlockFile: Send + Sync {
    /// Fills `buf` from `offset`; `UnexpectedEof` if the file ends before.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `data` at `offset`.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    /// Returns once all that was written before is on stable storage.
    fn sync(&self) -> io::Result<()>;

    /// Makes `len` bytes at `offset` zeros, as a write of so many would.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        write_zeros(self, offset, len)
    }

    /// The first byte at or behind `offset` that may be other than zero, or
    /// `None` if there is none up to the end. Only a help to pass over what is
    /// known to be empty: `offset` itself is always a right answer.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }
}

/// Writes zeros, in pieces.
fn write_zeros<F: BlockFile + ?Sized>(file: &F, offset: u64, len: u64) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(ZEROS.len() as u64);
        file.write_at(&ZEROS[..piece as usize], offset + done)?;
        done += piece;
    }
    Ok(())
}

impl BlockFile for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        // The kernel does it without moving bytes where it can; what it cannot
        // (a filesystem without holes, a range across blocks of a device) is
        // written.
        let punched = i64::try_from(offset).is_ok_and(|offset| {
            let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            i64::try_from(len).is_ok_and(|len| fallocate(self, how, offset, len).is_ok())
        });
        if punched {
            return Ok(());
        }
        write_zeros(self, offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let from = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        match lseek(self, from, Whence::SeekData) {
            Ok(at) => Ok(Some(u64::try_from(at).unwrap_or(offset).max(offset))),
            Err(Errno::ENXIO) => Ok(None),
            // Not every filesystem knows; then all of it may be data.
            Err(_) => Ok(Some(offset)),
        }
    }
}

/// A file in memory, of a fixed length, for tests and trials.
#[derive(Debug)]
pub struct MemoryFile(Mutex<Vec<u8>>);

impl MemoryFile {
    /// A file holding `bytes`.
    pub fn new(bytes: Vec<u8>) -> MemoryFile {
        MemoryFile(Mutex::new(bytes))
    }

    /// A copy of what it holds now.
    pub fn bytes(&self) -> Vec<u8> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Runs `f` on the `len` bytes at `offset`, or says that they are not there.
    fn at<R>(
        &self,
        offset: u64,
        len: usize,
        kind: io::ErrorKind,
        f: impl FnOnce(&mut [u8]) -> R,
    ) -> io::Result<R> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let range = usize::try_from(offset)
            .ok()
            .and_then(|o| Some(o..o.checked_add(len)?));
        match range.and_then(|r| bytes.get_mut(r)) {
            Some(slice) => Ok(f(slice)),
            None => Err(kind.into()),
        }
    }
}

impl BlockFile for MemoryFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.at(offset, buf.len(), io::ErrorKind::UnexpectedEof, |b| {
            buf.copy_from_slice(b)
        })
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.at(offset, data.len(), io::ErrorKind::StorageFull, |b| {
            b.copy_from_slice(data)
        })
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_file_behave_alike_at_the_end() {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(1024).unwrap();
        let files: [&dyn BlockFile; 2] = [&disk, &MemoryFile::new(vec![0; 1024])];
        for file in files {
            file.write_at(b"last", 1020).unwrap();
            let mut buf = [0; 4];
            file.read_at(&mut buf, 1020).unwrap();
            assert_eq!(&buf, b"last");
            let err = file.read_at(&mut buf, 1021).unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
            file.sync().unwrap();
        }
    }

    #[test]
    fn zeros_are_zeros_and_holes_are_passed_over() {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 20).unwrap();
        let files: [&dyn BlockFile; 2] = [&disk, &MemoryFile::new(vec![0; 1 << 20])];
        for file in files {
            file.write_at(&vec![7; 300_000], 5000).unwrap();
            file.zero(6000, 200_001).unwrap();
            let mut buf = vec![1; 200_003];
            file.read_at(&mut buf, 5999).unwrap();
            assert_eq!((buf[0], buf[200_002]), (7, 7));
            assert!(buf[1..200_002].iter().all(|b| *b == 0));
            assert!(file.next_data(0).unwrap().unwrap() <= 5000);
            assert!(
                file.next_data(305_000)
                    .unwrap()
                    .is_none_or(|at| at >= 305_000)
            );
        }
        assert_eq!(disk.next_data(900_000).unwrap(), None);
    }
}
