//! What a file under an export must be able to do.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

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
}
