//! Looking at every copy of everything, also where a shadow opens without.

use std::fmt;

use crate::extent::{Extent, InImage};
use crate::file::BlockFile;
use crate::format::{Copied, Spec, State};
use crate::open::{self, OpenError};

/// A copy that is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The bitmap page, or `None` for the header.
    pub page: Option<u64>,
    /// Which of the two copies, 0 or 1.
    pub copy: u8,
    /// What is wrong with it.
    pub why: &'static str,
    /// The sectors it speaks of, counted from the beginning of the image.
    pub sectors: Extent,
    /// What stands for it.
    pub other: Other,
}

/// What the other copy is, where one is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    /// It is whole, and counts.
    Whole,
    /// It was never written, and counts as that.
    Never,
    /// It is damaged as well.
    Damaged,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.page {
            None => f.write_str("header")?,
            Some(page) => write!(f, "bitmap page {page} ({})", InImage(self.sectors))?,
        }
        write!(f, ", copy {}: {}", self.copy, self.why)?;
        f.write_str(match self.other {
            Other::Whole => {
                "; the other copy stands, as after a crash while this one was written, and the \
                 next change writes it anew"
            }
            Other::Never => {
                "; the other copy was never written, which is as it should be only if a crash \
                 cut off the first write to this one; otherwise restore the shadow"
            }
            Other::Damaged => {
                "; nor does the other copy stand, so it is not known whether these sectors are in \
                 the image or in the shadow; restore the shadow"
            }
        })
    }
}

/// What a check has found.
#[derive(Clone, Debug)]
pub struct Report {
    /// What the header that counts says.
    pub spec: Spec,
    /// How far the freeze has come.
    pub state: State,
    /// Bitmap pages that were ever written.
    pub pages: u64,
    /// Copies that are damaged, in the order of their places.
    pub findings: Vec<Finding>,
}

/// Reads both copies of the header and of every bitmap page. An error where no
/// header stands, or the file is shorter than it says.
pub fn check(file: &dyn BlockFile, file_len: u64) -> Result<Report, OpenError> {
    let headers = open::read_headers(file, file_len)?;
    let header = open::choose_header(headers.clone())?;
    let (spec, geometry) = (header.spec, header.spec.geometry);
    if file_len < geometry.data_end() {
        return Err(OpenError::Short(geometry.data_end(), file_len));
    }
    let mut findings = Vec::new();
    let whole = Extent::from_bytes(geometry.start(), geometry.len());
    add(&mut findings, None, whole, &headers);
    let mut pages = 0;
    open::scan(file, &spec, |page, copies| {
        pages += 1;
        add(
            &mut findings,
            Some(page),
            geometry.sectors_of_page(page),
            &copies,
        );
    })?;
    Ok(Report {
        spec,
        state: header.state,
        pages,
        findings,
    })
}

fn add<T>(
    findings: &mut Vec<Finding>,
    page: Option<u64>,
    sectors: Extent,
    copies: &[Copied<T>; 2],
) {
    for (copied, copy) in copies.iter().zip(0u8..) {
        if let Copied::Damaged(why) = copied {
            let other = match copies.get(1 - usize::from(copy)) {
                Some(Copied::Damaged(_)) => Other::Damaged,
                Some(Copied::Never) => Other::Never,
                _ => Other::Whole,
            };
            findings.push(Finding {
                page,
                copy,
                why,
                sectors,
                other,
            });
        }
    }
}
