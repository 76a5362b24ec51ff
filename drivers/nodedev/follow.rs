//! Follows the host's devices: all of them first, then each of which the kernel says something.

use super::LinuxDevices;
use super::read::Reader;
use super::uevent::{self, Received, Uevent};
use crate::host::pci::VFIO;
use crate::host::workers::blocking;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use virt_model::driver::DriverError;
use virt_model::driver::host_devices::DeviceNews;

/// News that wait to be taken: who does not keep up has the kernel keep its messages, or lose them.
const WAITING: usize = 256;

/// Messages that are looked after together.
const BATCH: usize = 1024;

/// How long udev is waited for: it may have died, or not be of this network namespace.
const UDEV: Duration = Duration::from_secs(3);

/// After a look that could not be, as where no thread can be made, the next one is this much later.
const LATER: Duration = Duration::from_secs(10);

/// What is to be looked at again.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Touched {
    /// These folders below sysfs.
    pub folders: BTreeSet<PathBuf>,
    /// All.
    pub all: bool,
    /// The folders of which udev is to send on what the kernel says, and until when it is waited for.
    pub awaited: BTreeMap<PathBuf, Instant>,
}

impl Touched {
    /// What a message says is to be looked at. `udev`: it is there, and sends on what it has done its part with.
    pub fn take(&mut self, event: Uevent, udev: bool) {
        let driver = Path::new("/bus/pci/drivers").join(VFIO);
        if event.folder == driver {
            // All that could be handed over can be now, or cannot any more.
            self.all = true;
        }
        // What udev names and notes is not there yet.
        let early = udev && !event.by_udev && matches!(&*event.action, "add" | "change");
        if !event.folder.starts_with("/devices") {
            return;
        }
        if early {
            self.awaited.entry(event.folder).or_insert_with(|| Instant::now() + UDEV);
        } else {
            self.awaited.remove(&event.folder);
            self.folders.extend(event.before);
            self.folders.insert(event.folder);
        }
    }

    /// What is to be looked at now; what udev is waited for stays.
    pub fn due(&mut self) -> Touched {
        let now = Instant::now();
        let late = self.awaited.extract_if(.., |_, until| *until <= now).map(|(folder, _)| folder);
        self.folders.extend(late);
        Touched { folders: std::mem::take(&mut self.folders), all: std::mem::take(&mut self.all), ..Touched::default() }
    }

    /// Comes back when udev is not waited for any more, with something.
    async fn waits_no_longer(&self) {
        match self.awaited.values().min() {
            Some(until) => sleep_until(*until).await,
            None => std::future::pending().await,
        }
    }

    fn is_empty(&self) -> bool {
        self.folders.is_empty() && !self.all
    }
}

/// See [`virt_model::driver::host_devices::HostDevices::follow`].
pub(super) fn begin(devices: Arc<LinuxDevices>) -> mpsc::Receiver<DeviceNews> {
    let (sender, receiver) = mpsc::channel(WAITING);
    // Before the first look, so that nothing that happens after it is missed.
    // SAFETY: the AsyncFd owns the descriptor, and has no other.
    let listener = uevent::listen().and_then(|fd| unsafe { AsyncFd::register(fd) }.map_err(io::Error::other));
    tokio::spawn(async move {
        if let Err(error) = follow(&devices, listener, &sender).await {
            tracing::error!(%error, "the host's devices are not followed any more; restart virtd to see what has changed");
        }
    });
    receiver
}

async fn follow(
    devices: &Arc<LinuxDevices>,
    listener: io::Result<AsyncFd<OwnedFd>>,
    sender: &mpsc::Sender<DeviceNews>,
) -> Result<(), DriverError> {
    let mut touched = Touched { all: true, ..Touched::default() };
    let mut told = false;
    let listener =
        listener.map_err(|e| DriverError::Unsupported(format!("the kernel does not tell of its devices: {e}")));
    loop {
        let (of, batch) = (devices.clone(), touched.due());
        let looked = match blocking(move || of.look_again(&batch)).await {
            Ok(looked) => looked,
            Err(error) => {
                tracing::warn!(%error, "the host's devices could not be looked at; all are looked at again");
                touched.all = true;
                if timeout(LATER, sender.closed()).await.is_ok() {
                    return Ok(());
                }
                continue;
            }
        };
        for news in looked {
            // Nobody listens any more when virtd ends.
            if sender.send(news).await.is_err() {
                return Ok(());
            }
        }
        if !std::mem::replace(&mut told, true) {
            let _ = sender.send(DeviceNews::AllTold).await;
        }
        let listener = listener.as_ref().map_err(Clone::clone)?;
        while touched.is_empty() {
            tokio::select! {
                () = sender.closed() => return Ok(()),
                () = touched.waits_no_longer() => break,
                ready = listener.readable() => {
                    let mut ready = ready.map_err(|e| DriverError::Internal(e.to_string()))?;
                    let _ = ready.try_io(|listener| receive_all(listener.get_ref(), devices.host.has_udev(), &mut touched));
                }
            }
        }
    }
}

/// Takes what has come in, up to a number. Error: `WouldBlock` when that was all.
fn receive_all(listener: &OwnedFd, udev: bool, touched: &mut Touched) -> io::Result<()> {
    for _ in 0..BATCH {
        match uevent::receive(listener)? {
            Received::Message(event) => touched.take(event, udev),
            Received::Other => {}
            Received::Overrun => touched.all = true,
        }
    }
    Ok(())
}

impl LinuxDevices {
    /// Looks at what was touched; what there is to tell. Blocks.
    pub(super) fn look_again(&self, touched: &Touched) -> Vec<DeviceNews> {
        let reader = Reader::of(&self.host);
        let mut news = Vec::new();
        let mut folders = touched.folders.clone();
        if touched.all {
            let (found, mut more) = reader.folders();
            folders.extend(self.inventory().folders().cloned());
            folders.extend(found);
            news.push(DeviceNews::Is(Arc::new(reader.computer())));
            more |= folders.len() > self.most;
            if more {
                tracing::warn!("the host has very many devices; {} of them are listed", self.most);
            }
        }
        for folder in folders {
            let now = reader.device(&folder);
            let mut inventory = self.inventory();
            if now.is_none() || inventory.len() < self.most || inventory.has(&folder) {
                news.extend(inventory.put(&folder, now));
            }
        }
        news
    }
}
