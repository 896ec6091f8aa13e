//! `merge`: what a thaw does, where no target runs that could.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use shadow::paths::{self, Access, Found, PathError, Paths, Trouble as PathTrouble};
use shadow::{BlockFile, Chunk, Shadow, ShadowFile, State};

use crate::image::Image;
use crate::progress::Bar;
use crate::{Trouble, human, look, records, say};

/// Bytes between two syncs.
const BUDGET: u64 = 64 << 20;

/// What was typed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shadow, under whichever name it has now
    shadow: PathBuf,
    /// The image
    image: PathBuf,
    /// Only says what would be done
    #[arg(long)]
    dry_run: bool,
    /// Takes another image than the one the shadow was made for: a copy of it
    #[arg(long)]
    other_image: bool,
    /// Where aoede keeps its records
    #[arg(long, value_name = "DIR", default_value = "/var/lib/aoede")]
    state_dir: PathBuf,
}

/// A merge that did not come to its end.
#[derive(Debug)]
struct MergeError {
    shadow: PathBuf,
    image: PathBuf,
    why: io::Error,
}

impl fmt::Display for MergeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "merging {} into {}: {}; nothing is lost, both files together are whole: see to the \
             disk and merge again",
            self.shadow.display(),
            self.image.display(),
            self.why
        )
    }
}

impl std::error::Error for MergeError {}

/// Brings all that a shadow holds to its image, and removes it.
///
/// May be killed anywhere and called again.
pub fn merge(args: &Args) -> Result<ExitCode, Trouble> {
    let access = if args.dry_run {
        Access::Look
    } else {
        Access::Change
    };
    let path = paths::behind_marker(&args.shadow)?;
    let step = |what| {
        let path = path.clone();
        move |e| PathError {
            path,
            why: PathTrouble::System(what, e),
        }
    };
    let (file, len) = paths::lock(&path, access)?;
    let metadata = file.metadata().map_err(step("looking at it"))?;
    let shadow = Shadow::open(file, len).map_err(|e| PathError {
        path: path.clone(),
        why: PathTrouble::Open(e),
    })?;
    let spec = *shadow.spec();
    let image = Image::open(&args.image, &spec.geometry, &metadata)?;
    image.belongs(&spec.identity, &spec.geometry, args.other_image)?;
    records::no_arena(&args.state_dir, &image, &spec.identity, &spec.geometry)?;

    let data = look::bytes(shadow.map(), Chunk::Data);
    let zeros = look::bytes(shadow.map(), Chunk::Zero);
    let amount = format!(
        "{} of data and {} of zeros from {} into {}",
        human(data),
        human(zeros),
        path.display(),
        args.image.display()
    );
    if args.dry_run {
        say(&format!("would merge {amount}; nothing was changed"));
        return Ok(ExitCode::SUCCESS);
    }
    let mut work = Work {
        shadow,
        paths: Paths::of(&Found::plain(&path)),
    };
    work.begin(&path)?;
    let mut bar = Bar::new(data + zeros);
    let merged = work.run(&image, &args.state_dir, &mut bar);
    drop(bar);
    merged.map_err(|why| MergeError {
        shadow: work.paths.shadow.clone(),
        image: args.image.clone(),
        why,
    })?;
    // The record first: one that names a shadow which is not there stands for
    // writes that are lost.
    records::forget_shadow(&args.state_dir, &path)?;
    let vanished = paths::vanish(&work.paths, work.shadow.file(), &spec.uuid);
    vanished.map_err(step("removing it"))?;
    say(&format!("merged {amount}; the shadow is removed"));
    Ok(ExitCode::SUCCESS)
}

struct Work {
    shadow: Shadow<ShadowFile>,
    paths: Paths,
}

impl Work {
    /// Makes PATH another inode before the image is touched: backups that are
    /// being made now see by it that their copy is no good.
    fn begin(&mut self, path: &Path) -> Result<(), PathError> {
        if Found::of(path) == Found::New {
            return Ok(());
        }
        let uuid = self.shadow.spec().uuid;
        let begun = paths::begin_thaw(&self.paths, self.shadow.file(), &uuid);
        // Without a marker PATH is absent, or someone else's file.
        begun.map(drop).map_err(|e| PathError {
            path: path.to_owned(),
            why: PathTrouble::System("renaming it to .thaw", e),
        })
    }

    fn run(&mut self, image: &Image, state_dir: &Path, bar: &mut Bar) -> io::Result<()> {
        self.shadow.confirm()?;
        if self.shadow.state() != State::Thawing {
            self.shadow.set_state(State::Thawing)?;
        }
        let mut merged = 0;
        loop {
            let progress = self.shadow.merge(&image.file, BUDGET)?;
            merged += progress.merged;
            records::tell_arenas(state_dir, image);
            bar.at(merged);
            if progress.left_chunks == 0 {
                break;
            }
        }
        // A target that died in a thaw may have left writes to chunks that were
        // merged before, which no merge of ours has synced.
        BlockFile::sync(&image.file)
    }
}
