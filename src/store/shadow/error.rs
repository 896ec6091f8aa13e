//! Why a start is refused for its shadow.

use std::fmt;
use std::io;
use std::path::PathBuf;

use shadow::PathError;

/// Why a start is refused for its shadow.
#[derive(Debug)]
pub enum ShadowError {
    /// The file itself.
    Path(PathError),
    /// It belongs to another image, or to another state of this one; how it
    /// differs.
    OtherImage(PathBuf, String),
    /// It may belong to this image; why that is not certain, and both sides.
    InDoubt(PathBuf, String),
    /// This record, which names a shadow, may be of this image; the same.
    RecordInDoubt(PathBuf, PathBuf, String),
    /// There are two of them.
    Twice(PathBuf, PathBuf),
    /// A record names a shadow that was not given, or another one.
    NotGiven(PathBuf),
    /// A record names one of another exported range, which shares sectors with ours;
    /// the first of them and how many.
    OtherWindow(PathBuf, u64, u64),
    /// A record names a shadow that is not there.
    Gone(PathBuf),
    /// It is there, and the image is read-only.
    ReadOnly(PathBuf),
    /// A marker is there, and the shadow that it stands for is not.
    MarkerAlone(PathBuf, PathBuf),
    /// The record, or its directory.
    Record(PathBuf, String),
    /// Bringing it up to date.
    Io(PathBuf, &'static str, io::Error),
}

impl fmt::Display for ShadowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ShadowError::Path(e) => write!(f, "{e}"),
            ShadowError::OtherImage(path, how) => write!(
                f,
                "shadow {}: is none of this image ({how}); move it away or name another with -f",
                path.display()
            ),
            ShadowError::InDoubt(path, doubt) => write!(
                f,
                "shadow {}: {doubt}; --accept-shadow says that this is the right image, \
                 --discard-shadow discards the writes in it",
                path.display()
            ),
            ShadowError::RecordInDoubt(record, path, doubt) => write!(
                f,
                "shadow {} holds writes to a frozen image: {doubt}; -f {} --accept-shadow says that \
                 this is the right image, -f {} --discard-shadow discards the writes in it; if this \
                 is another image, move the record {} away",
                path.display(),
                path.display(),
                path.display(),
                record.display()
            ),
            ShadowError::Twice(one, other) => write!(
                f,
                "shadow {}: there is {} as well; move the one away that is not of this image",
                one.display(),
                other.display()
            ),
            ShadowError::NotGiven(path) => write!(
                f,
                "the image is frozen, and what was written since is in {}; start with -f {}, or \
                 --discard-shadow discards those writes",
                path.display(),
                path.display()
            ),
            ShadowError::OtherWindow(path, first, sectors) => write!(
                f,
                "shadow {} holds writes to sectors of this export, since another range of the \
                 image is frozen; start with -o {first} -l {sectors} and thaw it first",
                path.display()
            ),
            ShadowError::Gone(path) => write!(
                f,
                "shadow {} is not there, and holds writes that were acknowledged; bring it back, \
                 or --discard-shadow discards them",
                path.display()
            ),
            ShadowError::ReadOnly(path) => write!(
                f,
                "shadow {} is not merged yet, which changes the image; start once without -r and \
                 with -f {}, and thaw it",
                path.display(),
                path.display()
            ),
            ShadowError::MarkerAlone(marker, shadow) => write!(
                f,
                "{} is the marker of shadow {}, which is not there; bring that file back, or \
                 --discard-shadow discards what it holds",
                marker.display(),
                shadow.display()
            ),
            ShadowError::Record(path, what) => {
                write!(f, "shadow record {}: {what}", path.display())
            }
            ShadowError::Io(path, what, e) => {
                write!(f, "shadow {}: {what}: {e}; it is kept", path.display())
            }
        }
    }
}

impl std::error::Error for ShadowError {}

impl From<PathError> for ShadowError {
    fn from(e: PathError) -> ShadowError {
        ShadowError::Path(e)
    }
}
