//! Cards that go out by a device of the host's without a bridge (macvtap): made by us, opened once for each queue, and removed
//! when the guest has gone. Needs the right to administer the host's network.

use super::net_tool::run;
use super::tap::{limit, to_tap};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A device to be made, by all that is said of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Macvtap {
    /// Its name.
    pub name: String,
    /// The host's device by which its packets go.
    pub below: String,
    /// `vepa`, `bridge`, `private` or `passthru`.
    pub mode: String,
    /// Its hardware address.
    pub mac: String,
    /// The largest packet, in bytes.
    pub mtu: Option<u32>,
}

impl Macvtap {
    /// Makes it and switches it on. On error it may be there: it is to be removed. Blocks.
    pub fn make(&self) -> io::Result<()> {
        let mtu = self.mtu.map(|mtu| mtu.to_string());
        let mut add = vec!["link", "add", "link", &self.below, "name", &self.name, "address", &self.mac];
        mtu.iter().for_each(|mtu| add.extend(["mtu", mtu]));
        add.extend(["type", "macvtap", "mode", &self.mode]);
        run("ip", &add).map_err(explain)?;
        // One that has the host's device to itself begins with that device's address, and hands this one on to it.
        run("ip", &["link", "set", "dev", &self.name, "address", &self.mac, "up"])
    }

    /// Removes it, if it is the one that was made, and not another of that name. Blocks.
    pub fn remove(&self) -> io::Result<()> {
        if self.is_there(Path::new("/sys/class/net")) { run("ip", &["link", "del", "dev", &self.name]) } else { Ok(()) }
    }

    fn is_there(&self, net: &Path) -> bool {
        let said = |device: &str, file: &str| {
            let text = std::fs::read_to_string(net.join(device).join(file)).unwrap_or_default();
            text.trim().to_owned()
        };
        let address = said(&self.name, "address");
        let on_it = said(&self.name, "iflink") == said(&self.below, "ifindex");
        // One that was cut off in the making may still have the address that it began with.
        on_it && !address.is_empty() && [self.mac.clone(), said(&self.below, "address")].contains(&address)
    }

    /// Opens it, once for each queue. Blocks.
    pub fn open(&self, queues: usize) -> io::Result<Vec<OwnedFd>> {
        let index = std::fs::read_to_string(PathBuf::from("/sys/class/net").join(&self.name).join("ifindex"))?;
        let path = PathBuf::from(format!("/dev/tap{}", index.trim()));
        let queue = |_| {
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let opened = rustix::fs::open(&path, flags, Mode::empty()).map_err(io::Error::from);
            let device = opened.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
            to_tap(&device, "", queues > 1).map(|_| device)
        };
        (0..queues).map(queue).collect()
    }

    /// Limits it. What is on its way to the guest comes in at the host's end. Blocks.
    pub fn shape(&self, rates: &[Option<super::tap::Rate>; 2]) -> io::Result<()> {
        for (rate, to_guest) in rates.iter().zip([true, false]) {
            rate.iter().try_for_each(|rate| limit(&self.name, *rate, !to_guest))?;
        }
        Ok(())
    }
}

/// The first of `macvtap0`, `macvtap1`, … that no device has and that can be `taken`.
pub fn free_name(mut taken: impl FnMut(&str) -> bool) -> Option<String> {
    let names = (0..10_000).map(|n| format!("macvtap{n}"));
    names.into_iter().find(|name| !Path::new("/sys/class/net").join(name).exists() && taken(name))
}

/// Why no such device can be made on this host at all, if that is so. Makes none. Blocks.
pub fn missing() -> Option<io::Error> {
    missing_kind("macvtap")
}

/// The kernel judges the address, which is that of many cards, before it makes anything; and before that, whether it knows the kind,
/// whose module it loads for that.
pub(crate) fn missing_kind(kind: &str) -> Option<io::Error> {
    let refused = run("ip", &["link", "add", "link", "lo", "address", "01:00:00:00:00:01", "type", kind]).err()?;
    Some(explain(refused)).filter(|error| error.to_string() == UNKNOWN)
}

/// What is said where the kernel does not know them.
const UNKNOWN: &str = "this host's kernel has no macvtap (modprobe macvtap)";

fn explain(error: io::Error) -> io::Error {
    let text = error.to_string();
    let unknown = ["Operation not supported", "Unknown device type"].iter().any(|words| text.contains(words));
    if unknown { io::Error::other(UNKNOWN) } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(net: &Path, device: &str, files: [(&str, &str); 3]) {
        std::fs::create_dir_all(net.join(device)).unwrap();
        files.iter().for_each(|(file, text)| std::fs::write(net.join(device).join(file), format!("{text}\n")).unwrap());
    }

    #[test]
    fn only_the_one_that_was_made_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (mac, text) = ("52:54:00:00:00:09".to_owned(), str::to_owned);
        let made = Macvtap { name: text("macvtap0"), below: text("eth0"), mode: text("vepa"), mac, mtu: None };
        assert!(!made.is_there(dir.path()));
        show(dir.path(), "eth0", [("ifindex", "2"), ("iflink", "2"), ("address", "aa:00:00:00:00:01")]);
        show(dir.path(), "macvtap0", [("ifindex", "9"), ("iflink", "2"), ("address", "52:54:00:00:00:09")]);
        assert!(made.is_there(dir.path()));
        show(dir.path(), "macvtap0", [("ifindex", "9"), ("iflink", "2"), ("address", "aa:00:00:00:00:01")]);
        assert!(made.is_there(dir.path()), "it was cut off before it got its own");
        show(dir.path(), "macvtap0", [("ifindex", "9"), ("iflink", "2"), ("address", "52:54:00:00:00:0a")]);
        assert!(!made.is_there(dir.path()), "somebody else's");
        show(dir.path(), "macvtap0", [("ifindex", "9"), ("iflink", "3"), ("address", "52:54:00:00:00:09")]);
        assert!(!made.is_there(dir.path()), "on another device");
    }

    #[test]
    fn a_kernel_without_it_is_said() {
        let why = explain(io::Error::other("ip link add: RTNETLINK answers: Operation not supported"));
        assert_eq!(why.to_string(), "this host's kernel has no macvtap (modprobe macvtap)");
        let why = explain(io::Error::other("ip link add: Cannot find device \"eth7\""));
        assert!(why.to_string().contains("\"eth7\""));
        let mut seen = Vec::new();
        let found = free_name(|name| {
            seen.push(name.to_owned());
            seen.len() == 2
        });
        assert_eq!((found.as_deref(), seen.len()), (seen.last().map(|s| &**s), 2));
    }
}
