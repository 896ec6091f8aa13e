//! From checked options to an export that is ready: a refusal comes before
//! anything is made, and changes nothing but that what a dead target has left is
//! on its image.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::eventfd::EventFd;

use super::claim::{self, Claim, ClaimError};
use super::report::Report;
use super::wait::Wait;
use super::{Export, ServeError, uuid};
use crate::access::{MacSet, WireState};
use crate::config::{DiskEngine, Options, Tuneup};
use crate::drive::Identity;
use crate::net::{Nic, NicError, NicId, NicTrouble, PortOptions, probe};
use crate::store::{
    ArenaOptions, Backing, Cache, DIRTY_MIN, Disk, FoundShadow, Image, ImageError, Pool,
    ShadowOptions, ShadowSide, ShadowStore, StateFile, UringDisk, Volume, VolumeOptions,
    block_bytes, find_shadow, prepare, shadow_limit_min,
};
use crate::sys::link::LinkWatch;
use crate::target::{Settings, Target};
use crate::text::count;
use crate::wire::{Address, ETHERNET_HEADER};

/// A shelf that the Linux driver does not take devices from.
const SHELF_LINUX_IGNORES: u16 = 4095;
pub(super) fn open(options: &Options) -> Result<Export, ServeError> {
    let system = |what| move |e| ServeError::System(what, e);
    let address = options.address;
    let tuneup = options.tuneup.clone();
    if address.shelf.0 == SHELF_LINUX_IGNORES {
        log::warn!("{address}: the Linux driver ignores this shelf; choose another");
    }
    let port_options = PortOptions {
        address,
        engine: tuneup.receive,
        ring_bytes: tuneup.ring_size,
        socket_buffer: tuneup.socket_buffer,
        qdisc_bypass: tuneup.qdisc_bypass,
    };
    // Before the NICs are looked at, so that no change after that is missed.
    let watch = LinkWatch::new().map_err(system("listening for link changes"))?;
    let nics = options.nics.iter();
    let nics = nics.map(|name| match Nic::open(name, &port_options) {
        Err(e) if options.wait_for_interfaces && e.may_come() => {
            log::warn!("{address}: {e}; waiting for it");
            Ok(Nic::absent(&e))
        }
        result => result,
    });
    let nics = nics
        .collect::<Result<Vec<_>, _>>()
        .map_err(ServeError::Nic)?;
    for (n, nic) in nics.iter().enumerate() {
        // Each of its frames would come in twice.
        let index = |nic: &Nic| nic.link.map(|link| link.index);
        let same = |other: &&Nic| nic.link.is_some() && index(other) == index(nic);
        if let Some(other) = nics[..n].iter().find(same) {
            return Err(ServeError::Nic(NicError {
                name: nic.name.clone(),
                why: NicTrouble::Same(other.name.clone()),
            }));
        }
    }

    // What a dead target has left is brought to the image before anyone on the
    // network is asked anything: an answer must not delay that. An image that
    // is yet to be made waits for nothing, and is not made for a refusal.
    let is_new = options.image.create.is_some() && !options.image.path.exists();
    let mut claims = Vec::new();
    if is_new {
        claims = take_address(options, &nics)?;
        load_state(options)?;
    }
    let image = Arc::new(Image::open(&options.image).map_err(ServeError::Image)?);
    let bounds = image.bounds().map_err(|why| {
        ServeError::Image(ImageError {
            path: options.image.path.clone(),
            why,
        })
    })?;
    warn_of(options, &image);

    // Only now that the image is locked: whoever served it before us writes
    // its state no more.
    let (file, state) = load_state(options)?;
    tell_write_cache(address, &file, &state);

    let shadow_options = ShadowOptions {
        path: options.shadow.as_ref().map(|shadow| shadow.path.clone()),
        state_dir: options.state_dir.clone(),
        discard: options.discard_shadow,
        accept: options.accept_shadow,
        export: address.to_string(),
    };
    let mut shadow = find_shadow(&image, &shadow_options).map_err(ServeError::Shadow)?;
    let limit = options.shadow.as_ref().and_then(|shadow| shadow.limit_mib);
    let block = block_bytes(&image, shadow.as_ref()) as u64;
    let least = shadow_limit_min(block).div_ceil(1 << 20);
    if limit.is_some_and(|limit| limit < least) {
        return Err(ServeError::ShadowLimit(block, least));
    }

    let event = Pool::event().map_err(system("making an event"))?;
    let event = Arc::new(event);
    let disk =
        disk(address, &image, &tuneup, &event).map_err(system("starting the disk engine"))?;
    let arena_options = ArenaOptions {
        export: address.to_string(),
        state_dir: options.state_dir.clone(),
        run_dir: options.run_dir.clone(),
        cache_size: tuneup.cache_size,
        doubt: options.doubtful_arena.clone(),
        discard_shadow: options.discard_shadow,
    };
    let mut prepared = prepare(&image, &arena_options, shadow.as_mut())
        .map_err(|e| ServeError::Recover(address, e))?;
    if !is_new {
        claims = take_address(options, &nics).inspect_err(|_| {
            // Nothing is in the arena yet. The refusal is the error to tell.
            if let Some(record) = prepared.record.take() {
                let _ = record.remove_with(&image, || prepared.arena.remove());
            }
        })?;
    }
    let slots = u64::from(prepared.arena.count());
    let dirty_max = (slots * u64::from(tuneup.dirty_ratio) / 100).max(DIRTY_MIN) as u32;
    log::debug!(
        "{address}: cache of {slots} blocks, {dirty_max} of them dirty at most, in {}",
        match prepared.arena.path() {
            Some(path) => path.display().to_string(),
            None => "memory of this process".to_owned(),
        }
    );
    log::debug!("{address}: state file {}", file.path().display());
    let arena = prepared.arena.path().map(Path::to_owned);
    prepared.arena.set_export(&address.to_string());
    let cache = Cache::new(prepared.arena, image.align(), dirty_max);
    let longest = nics
        .iter()
        .filter_map(|nic| nic.link)
        .map(|link| link.mtu)
        .max()
        .unwrap_or(0);
    let volume_options = VolumeOptions {
        export: address.to_string(),
        image: image.path().display().to_string(),
        align: image.align(),
        direct: options.image.direct,
        write_through: prepared.write_through,
        request_max: longest as usize + ETHERNET_HEADER,
        parked_max: tuneup.parked_size,
        max_dirty_age: tuneup.max_dirty_age,
        idle_flush: tuneup.idle_flush,
        io_patience: tuneup.io_patience,
        read_ahead: tuneup.read_ahead,
        write_depth: tuneup.write_depth,
        merge_share: tuneup.merge_share,
        shadow_full: tuneup.shadow_full,
        hold_max: tuneup.hold_max,
        freeze_max: tuneup.freeze_max,
    };
    let mut volume = Volume::new(Instant::now(), disk, cache, bounds, volume_options);
    volume.set_on_stop(tuneup.on_stop);
    if let Some(side) = shadow_side(
        options,
        &image,
        &shadow_options,
        shadow,
        arena.as_deref(),
        event,
    )? {
        volume = volume.with_shadow(side);
    }
    if !volume.restore(Instant::now(), &prepared.unreplayed.pieces) {
        return Err(ServeError::CacheTooSmall);
    }
    prepared
        .unreplayed
        .settle()
        .map_err(|e| ServeError::Recover(address, e))?;
    let settings = Settings {
        address,
        buffers: options.buffers,
        read_only: options.image.read_only,
        durable: options.durable,
        policy: options.policy.clone(),
        identity: identity(options, &image),
    };
    // To ask whether it can discard may have changed its times.
    volume.note_image();
    let mut target = Target::new(Instant::now(), settings, volume, state, Arc::new(file));
    for (index, nic) in nics.iter().enumerate() {
        target.set_nic(NicId(index as u16), nic.info());
    }
    let wait = Wait::new(&watch, target.wake_fd()).map_err(system("epoll"))?;
    Ok(Export {
        address,
        tuneup,
        image,
        read_only: options.image.read_only,
        nics,
        port_options,
        target,
        record: prepared.record,
        watch,
        wait,
        _claims: claims,
        conflict_logged: None,
        report: Report::new(Instant::now(), log::max_level()),
    })
}

/// Says what is odd about an image that is served all the same.
fn warn_of(options: &Options, image: &Image) {
    let (address, path) = (options.address, image.path().display());
    if image.cut_off() > 0 {
        let bytes = count(image.cut_off(), "byte");
        log::warn!("{address}: {path}: its last {bytes} make no whole sector and are cut off");
    }
    let bytes = image.bytes().unwrap_or(0);
    if let Some(create) = options.image.create.filter(|c| c.bytes != bytes) {
        log::warn!(
            "{address}: {path}: exists with {bytes} bytes and is served as it is, not made with {} \
             (--create)",
            create.bytes
        );
    }
    let (user, loops) = image.users();
    if let Some(user) = user.filter(|_| options.image.force) {
        log::warn!("{address}: {path}: {user}; served all the same (--force)");
    }
    for device in loops {
        log::warn!(
            "{address}: {path}: is attached to {device} as well, where writes of hosts and of this \
             machine destroy each other's; detach it with 'losetup -d {device}'"
        );
    }
}

/// What does the work of a freeze, where a shadow was named.
fn shadow_side(
    options: &Options,
    image: &Arc<Image>,
    shadow_options: &ShadowOptions,
    found: Option<FoundShadow>,
    arena: Option<&Path>,
    event: Arc<EventFd>,
) -> Result<Option<ShadowSide>, ServeError> {
    let Some(shadow) = options.shadow.as_ref() else {
        return Ok(None);
    };
    let (path, image) = (&shadow.path, Arc::clone(image));
    let (store, left) =
        ShadowStore::new(image, path, shadow_options, found, arena).map_err(ServeError::Shadow)?;
    let pool = Pool::start_with(Arc::new(store), options.tuneup.disk_threads, event)
        .map_err(|e| ServeError::System("starting the shadow's threads", e))?;
    Ok(Some(ShadowSide {
        disk: Box::new(pool),
        limit: shadow.limit_mib.map(|mib| mib << 20),
        name: path.display().to_string(),
        left,
    }))
}

/// The engine that does what must wait for the disk.
fn disk(
    address: Address,
    image: &Arc<Image>,
    tuneup: &Tuneup,
    event: &Arc<EventFd>,
) -> std::io::Result<Box<dyn Disk>> {
    if tuneup.disk_engine != DiskEngine::Threads {
        match UringDisk::start(Arc::clone(image), Arc::clone(event)) {
            Ok(disk) => {
                log::debug!("{address}: disk engine: io_uring");
                return Ok(Box::new(disk));
            }
            Err(e) if tuneup.disk_engine == DiskEngine::IoUring => return Err(e),
            Err(e) => log::info!("{address}: no io_uring ({e}); threads do the disk work"),
        }
    }
    let threads = tuneup.disk_threads;
    log::debug!("{address}: disk engine: {threads} threads");
    let backing: Arc<dyn Backing> = Arc::<Image>::clone(image);
    let pool = Pool::start_with(backing, tuneup.disk_threads, Arc::clone(event))?;
    Ok(Box::new(pool))
}

/// The file of the wire's state, and what it holds.
fn load_state(options: &Options) -> Result<(StateFile, WireState), ServeError> {
    let path = &options.image.path;
    // An image that is yet to be made has no path of its own to resolve.
    let in_folder = || {
        let folder = std::fs::canonicalize(path.parent()?).ok()?;
        Some(folder.join(path.file_name()?))
    };
    let real_path = std::fs::canonicalize(path).ok().or_else(in_folder);
    let real_path = real_path.unwrap_or_else(|| path.clone());
    let address = options.address.to_string();
    let file = StateFile::new(&options.state_dir, &address, &real_path);
    let state = match file.load().map_err(ServeError::State)? {
        Some(text) => WireState::from_text(&text)
            .map_err(|e| ServeError::BadState(file.path().to_owned(), e))?,
        None => WireState::default(),
    };
    Ok((file, state))
}

/// Logs the hosts that have switched their write cache off.
fn tell_write_cache(address: Address, file: &StateFile, state: &WireState) {
    let path = file.path().display();
    if !state.write_cache {
        log::warn!(
            "{address}: state file {path}: aoede 0.1.0 saved the write cache as off, so each write \
             of every host waits for stable storage; to end that, stop the export and change \
             write_cache to true in the file"
        );
    }
    let hosts = state.write_cache_off.as_slice().len();
    if hosts > 0 {
        log::info!(
            "{address}: the write cache is off for {hosts} of at most {} hosts, which have asked \
             for it; they are write_cache_off in {path}",
            MacSet::MAX
        );
    }
}

/// Takes the address, among the processes of this machine and then on the
/// network, unless it is to be shared.
fn take_address(options: &Options, nics: &[Nic]) -> Result<Vec<Claim>, ServeError> {
    let (address, time) = (options.address, options.tuneup.address_probe);
    let mut claims = Vec::new();
    if options.shared_address {
        return Ok(claims);
    }
    if let Some(dir) = claim::directory(address, options.run_dir.as_deref()) {
        for nic in nics {
            claims.push(claim::take(&dir, address, &nic.name).map_err(|e| match e {
                ClaimError::Taken(holder) => ServeError::Claimed(address, nic.name.clone(), holder),
                ClaimError::System(e) => ServeError::System("claiming the address", e),
            })?);
        }
    }
    match probe::find_conflict(nics, address, uuid(), time).map_err(ServeError::Nic)? {
        Some(conflict) => Err(ServeError::AddressConflict(address, conflict)),
        None => Ok(claims),
    }
}

fn identity(options: &Options, image: &Image) -> Identity {
    let Address { shelf, slot } = options.address;
    let host = nix::unistd::gethostname().unwrap_or_default();
    let serial = match options.tuneup.serial.as_str() {
        "" => format!("{}.{}:{}", shelf.0, slot.0, host.to_string_lossy()),
        serial => serial.to_owned(),
    };
    let (physical_exponent, alignment) = image.physical_block();
    Identity {
        serial,
        model: options.tuneup.model.clone(),
        firmware: env!("CARGO_PKG_VERSION").to_owned(),
        wwn: world_wide_name(image.identity(), host.as_encoded_bytes()),
        physical_exponent,
        alignment,
        trim: image.can_discard(),
    }
}

/// A name of the kind "locally assigned" (NAA 3), since we have no number of an
/// organisation to build on: 60 bits of machine, image and window.
fn world_wide_name(image: u64, host: &[u8]) -> u64 {
    const NAA_LOCAL: u64 = 3 << 60;
    let crc = crc::Crc::<u64>::new(&crc::CRC_64_XZ);
    let mut digest = crc.digest();
    // The host's name stands in where there is no machine id, as in an
    // initramfs.
    match std::fs::read("/etc/machine-id") {
        Ok(id) if !id.is_empty() => digest.update(&id),
        _ => digest.update(host),
    }
    digest.update(&image.to_le_bytes());
    NAA_LOCAL | digest.finalize() >> 4
}
