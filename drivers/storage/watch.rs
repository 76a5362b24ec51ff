//! What changes in a pool, whoever changes it: the kernel tells it, and nothing is asked while nothing changes.
//!
//! Names are told at once. Writes come in masses: of those the kernel is asked once a second at most, and forgets what does not
//! fit; then all is told to have changed.

use super::folder::PoolFolder;
use super::mount_table::TABLE;
use crate::host::acl::through;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use virt_model::driver::storage::PoolChange;

/// How often writes are told at most.
const PACE: Duration = Duration::from_secs(1);
/// Changes that wait to be heard.
const QUEUE: usize = 16;
/// So many names are told at once; of more it is told that there are many.
const NAMES: usize = 4096;

/// Tells what changes from now on, until nobody listens; with what tells it, for who knows of more. Blocks; within the runtime.
pub fn begin(folder: &PoolFolder) -> io::Result<(Sender<PoolChange>, Receiver<PoolChange>)> {
    let comings = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO;
    let ends = WatchFlags::DELETE_SELF | WatchFlags::ONLYDIR;
    let names = watch(folder, comings | WatchFlags::ATTRIB | ends)?;
    let writes = watch(folder, WatchFlags::MODIFY | WatchFlags::ONLYDIR)?;
    let (tell, told) = channel(QUEUE);
    tokio::spawn(follow(names, tell.clone(), PoolChange::Names, None));
    tokio::spawn(follow(writes, tell.clone(), PoolChange::Sizes, Some(PACE)));
    Ok((tell, told))
}

/// The kernel's table of what is mounted where, which tells when it has changed.
pub struct Mounts(AsyncFd<OwnedFd>);

/// Watches that table. Blocks for a moment; within the runtime.
pub fn mounts() -> io::Result<Mounts> {
    let table = rustix::fs::open(TABLE, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: it is a descriptor of its own, which is closed with what is registered.
    Ok(Mounts(unsafe { AsyncFd::register_with_interest(table, Interest::PRIORITY) }?))
}

impl Mounts {
    /// Waits until something has been mounted or unmounted since the last time.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

fn watch(folder: &PoolFolder, what: WatchFlags) -> io::Result<AsyncFd<OwnedFd>> {
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&inotify, through(folder), what)?;
    // SAFETY: it is a descriptor of its own, which is closed with what is registered.
    Ok(unsafe { AsyncFd::register(inotify) }?)
}

async fn follow(
    inotify: AsyncFd<OwnedFd>,
    tell: Sender<PoolChange>,
    as_change: fn(BTreeSet<String>) -> PoolChange,
    pace: Option<Duration>,
) {
    loop {
        let ready = tokio::select! {
            ready = inotify.readable() => ready,
            () = tell.closed() => return,
        };
        let Ok(mut ready) = ready else { return };
        let seen = read(inotify.get_ref());
        ready.clear_ready();
        let change = match seen {
            Seen::Names(names) if names.is_empty() => continue,
            Seen::Names(names) if names.len() <= NAMES => as_change(names),
            Seen::Names(_) | Seen::Much => PoolChange::Much,
            Seen::End => PoolChange::Lost,
        };
        let is_end = change == PoolChange::Lost;
        if tell.send(change).await.is_err() || is_end {
            return;
        }
        if let Some(pace) = pace {
            tokio::time::sleep(pace).await;
        }
    }
}

enum Seen {
    Names(BTreeSet<String>),
    Much,
    End,
}

/// Reads all that the kernel has to tell.
fn read(inotify: &OwnedFd) -> Seen {
    let mut buffer = [MaybeUninit::uninit(); 16 << 10];
    let mut reader = Reader::new(inotify, &mut buffer);
    let (mut names, mut much) = (BTreeSet::new(), false);
    loop {
        let event = match reader.next() {
            Ok(event) => event,
            Err(Errno::INTR) => continue,
            Err(_) if much => return Seen::Much,
            Err(_) => return Seen::Names(names),
        };
        let what = event.events();
        if what.intersects(ReadFlags::DELETE_SELF | ReadFlags::UNMOUNT | ReadFlags::IGNORED) {
            return Seen::End;
        }
        much |= what.contains(ReadFlags::QUEUE_OVERFLOW);
        // A name that nobody can write is counted when all are read.
        match event.file_name().map(|name| name.to_str()) {
            Some(Ok(name)) if names.len() <= NAMES => _ = names.insert(name.to_owned()),
            Some(Err(_)) => much = true,
            _ => {}
        }
    }
}
