//! Network namespaces, veth pairs and tap devices, made with `ip`.

use std::fs::{self, File};
use std::io;
use std::panic::resume_unwind;
use std::path::Path;
use std::process::{self, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, thread};

use nix::sched::{CloneFlags, setns};

use super::wait::{Deadline, wait_until};
use crate::error::{Error, Result};

/// Where `ip netns` keeps its handles.
const HANDLES: &str = "/run/netns";

static COUNT: AtomicU32 = AtomicU32::new(0);
static INDEX: AtomicU32 = AtomicU32::new(1000);

/// A network namespace with nothing in it but `lo`, which is up.
///
/// Clones are the same namespace. It is taken away with the last of them; a
/// process in it holds one, so the order of dropping is free.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    handle: File,
}

impl Namespace {
    /// A new one, its name made of AOEDE_LAB_PREFIX (or "aoede"), the process
    /// id and a count.
    pub fn new() -> Result<Namespace> {
        let prefix = env::var("AOEDE_LAB_PREFIX").unwrap_or_else(|_| "aoede".to_owned());
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{prefix}-{}-{count}", process::id());
        ip(&["netns", "add", &name])?;
        let path = Path::new(HANDLES).join(&name);
        let handle = match File::open(&path) {
            Ok(handle) => handle,
            Err(e) => {
                // It is there, and nobody else will take it away.
                let _ = ip(&["netns", "del", &name]);
                return Err(Error::System(path.display().to_string(), e));
            }
        };
        let namespace = Namespace(Arc::new(Inner { name, handle }));
        // From here on dropping takes it away. No IPv6: neighbour discovery
        // would put frames of its own on the wire.
        namespace.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        namespace.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Runs a closure in a thread that is inside; a panic in it goes on here.
    pub fn enter<T: Send>(&self, run: impl FnOnce() -> T + Send) -> Result<T> {
        let inside = thread::scope(|scope| {
            let thread = thread::Builder::new().name(self.name().to_owned());
            let joined = thread
                .spawn_scoped(scope, || self.join_thread().map(|()| run()))
                .map_err(Error::system("thread"))?
                .join();
            joined.unwrap_or_else(|panic| resume_unwind(panic))
        });
        inside.map_err(|e| match e {
            Error::System(what, e) => Error::System(format!("entering {}: {what}", self.name()), e),
            other => other,
        })
    }

    /// Moves the calling thread inside, for good.
    pub fn join_thread(&self) -> Result<()> {
        setns(&self.0.handle, CloneFlags::CLONE_NEWNET).map_err(Error::system("setns"))
    }

    /// Runs `ip` inside, and says what it printed.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        ip(&[&["-n", self.name()][..], arguments].concat())
    }

    /// Changes the MTU of an interface.
    pub fn set_mtu(&self, interface: &str, mtu: u32) -> Result<()> {
        self.ip(&["link", "set", interface, "mtu", &mtu.to_string()])
            .map(drop)
    }

    /// Sets an interface up or down.
    pub fn set_up(&self, interface: &str, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        self.ip(&["link", "set", interface, state]).map(drop)
    }

    fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        // A thread's own view of /proc/sys/net is that of its namespace.
        let path = Path::new("/proc/sys").join(key);
        match self.enter(|| fs::write(&path, value))? {
            // A kernel without IPv6 has nothing to switch off.
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Error::System(path.display().to_string(), e))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Err(e) = ip(&["netns", "del", &self.name]) {
            eprintln!("namespace {} is left behind: {e}", self.name);
        }
    }
}

/// A cable between two namespaces, or between two ends in one. It goes with
/// either of them.
#[derive(Debug)]
pub struct Veth {
    /// Each end by the names of its namespace and of its interface.
    ends: [(String, String); 2],
}

impl Veth {
    /// Joins `a.0`, an interface name in the namespace `a.1`, with that of
    /// `b`. Both ends are up and have a carrier when this returns.
    pub fn new(a: (&str, &Namespace), b: (&str, &Namespace), mtu: u32) -> Result<Veth> {
        let [first, second] = [a, b];
        // Each end with a number that the other has not: where both are equal,
        // as the first interfaces of two namespaces are, the kernel takes the
        // end for no veth and lets up to a second pass before its carrier counts.
        let index = INDEX.fetch_add(2, Ordering::Relaxed);
        let numbers = [index, index + 1, mtu].map(|n| n.to_string());
        let [index_a, index_b, mtu] = numbers.each_ref().map(String::as_str);
        let add = ["-n", first.1.name(), "link", "add", first.0];
        let end = ["mtu", mtu, "index", index_a, "type", "veth"];
        let peer = ["peer", "name", second.0, "mtu", mtu, "index", index_b];
        let place = ["netns", second.1.name()];
        ip(&[&add[..], &end, &peer, &place].concat())?;
        for (name, namespace) in [first, second] {
            namespace.set_up(name, true)?;
        }
        for (name, namespace) in [first, second] {
            wait_for_carrier(namespace, name)?;
        }
        Ok(Veth {
            ends: [first, second].map(|(name, place)| (place.name().to_owned(), name.to_owned())),
        })
    }

    /// Changes the MTU of both ends.
    pub fn set_mtu(&self, mtu: u32) -> Result<()> {
        let mtu = mtu.to_string();
        self.ends.iter().try_for_each(|(namespace, name)| {
            ip(&["-n", namespace, "link", "set", name, "mtu", &mtu]).map(drop)
        })
    }

    /// Unplugs the cable: both ends are gone.
    pub fn remove(self) -> Result<()> {
        let (namespace, name) = &self.ends[0];
        ip(&["-n", namespace, "link", "del", name]).map(drop)
    }
}

fn wait_for_carrier(namespace: &Namespace, name: &str) -> Result<()> {
    let what = format!("{name} in {} to come up", namespace.name());
    namespace.enter(|| {
        wait_until(
            &what,
            Deadline::seconds(5),
            || matches!(aoede::sys::link::query(name), Ok(Some(link)) if link.running),
        )
    })?
}

/// A tap device inside a namespace, for a virtual machine. It goes with its
/// namespace.
#[derive(Debug)]
pub struct Tap {
    namespace: Namespace,
    name: String,
}

impl Tap {
    /// Makes it and sets it up. It has a carrier only while a program holds it
    /// open.
    pub fn new(name: &str, namespace: &Namespace, mtu: u32) -> Result<Tap> {
        namespace.ip(&["tuntap", "add", "dev", name, "mode", "tap"])?;
        let tap = Tap {
            namespace: namespace.clone(),
            name: name.to_owned(),
        };
        namespace.set_mtu(name, mtu)?;
        namespace.set_up(name, true)?;
        Ok(tap)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until a program holds it open.
    pub fn wait_for_carrier(&self) -> Result<()> {
        wait_for_carrier(&self.namespace, &self.name)
    }
}

/// Runs `ip`, and says what it printed.
fn ip(arguments: &[&str]) -> Result<String> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .map_err(Error::system("ip"))?;
    if !output.status.success() {
        return Err(Error::Program(format!(
            "ip {}: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
