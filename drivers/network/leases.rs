//! Who has which address: dnsmasq's own file of it, which outlives everybody, and how its changes are told. When an address is
//! given, dnsmasq has written its file and then runs virtd, which touches a file that is watched (`tell`). Nothing of what guests
//! say of themselves is in that.

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use virt_model::domain::value::{Mac, Value};
use virt_model::driver::network::Lease;
use virt_model::network::is_host_name;

/// In the environment of dnsmasq, and so of what it runs: the file to be touched.
pub const TOLD: &str = "VIRT_LEASES_TOLD";

/// More than any file of leases has. Who writes it talks to guests, and may be another by now.
const LONGEST: u64 = 16 << 20;

/// Of what guests say of themselves so much is told in all, so that an answer with as many leases as there can be is one that a bus
/// carries; and so much of one that its number is as long.
const ROOM: usize = 4 << 20;
const OF_ONE: usize = 32;

/// What virtd does when dnsmasq runs it; whether it was run by dnsmasq at all.
pub fn tell() -> bool {
    let Some(file) = std::env::var_os(TOLD) else { return false };
    // Closing a file that was open for writing is what is watched for.
    let told = rustix::fs::open(Path::new(&file), OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
    drop(told);
    true
}

/// A file whose changes are waited for.
pub struct WatchedLeases(AsyncFd<Watch>);

/// What the kernel tells by; it stays open as long as it is watched.
struct Watch(OwnedFd);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl WatchedLeases {
    /// Watches a file that is there. Must be called within the runtime.
    pub fn new(file: &Path) -> io::Result<WatchedLeases> {
        let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        inotify::add_watch(&watch, file, WatchFlags::CLOSE_WRITE)?;
        // SAFETY: Watch owns its descriptor and always shows the same one.
        let watch = unsafe { AsyncFd::register_with_interest(Watch(watch), Interest::READABLE) };
        watch.map(WatchedLeases).map_err(|error| io::Error::other(error.to_string()))
    }

    /// Waits until it was touched, once for all that did so meanwhile.
    pub async fn touched(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut room = [MaybeUninit::uninit(); 4096];
            let mut events = inotify::Reader::new(&self.0.get_ref().0, &mut room);
            match events.next() {
                Ok(event) if event.events().contains(ReadFlags::CLOSE_WRITE) => {
                    drain(&mut events);
                    return Ok(());
                }
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn drain(events: &mut inotify::Reader<'_, &OwnedFd>) {
    while !events.is_buffer_empty() {
        let _ = events.next();
    }
}

/// The text of dnsmasq's file of leases; none if there is no file.
pub fn text(file: &Path) -> io::Result<String> {
    let mut text = Vec::new();
    match std::fs::File::open(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        file => _ = file?.take(LONGEST).read_to_end(&mut text)?,
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Reads dnsmasq's file of leases, so many at `most`; `prefix` says of each address how many bits are the network's. What is no
/// lease is left out.
pub fn read(text: &str, most: usize, prefix: impl Fn(IpAddr) -> u8) -> Vec<Lease> {
    let (mut leases, mut six, mut room) = (Vec::new(), false, ROOM);
    for line in text.lines() {
        if leases.len() >= most {
            break;
        }
        let words: Vec<&str> = line.splitn(6, ' ').collect();
        // What follows is of IPv6.
        if words.first() == Some(&"duid") {
            six = true;
            continue;
        }
        let [expires, known, address, name, client] = words[..] else { continue };
        let (Ok(expires), Ok(address)) = (expires.parse(), address.parse::<IpAddr>()) else { continue };
        let known_by = (client != "*").then(|| client.to_owned()).filter(|id| id.len() <= 1024);
        let mac = if six { known_by.as_deref().and_then(card_of) } else { Mac::from_text(known).ok() };
        let host_name = Some(name).filter(|name| is_host_name(name)).unwrap_or_default();
        let said = host_name.len() + known_by.as_ref().map_or(0, |id| id.len() + OF_ONE);
        let fits = said <= room;
        room -= if fits { said } else { 0 };
        leases.push(Lease {
            mac,
            address,
            prefix: prefix(address),
            host_name: if fits { host_name.to_owned() } else { String::new() },
            client_id: known_by.filter(|_| fits),
            // Of addresses that go by, the number begins with a T.
            iaid: if six { known.trim_start_matches('T').parse().ok() } else { None },
            expires,
        });
    }
    leases
}

/// The card that an identifier of IPv6 was made of, if it says that.
fn card_of(duid: &str) -> Option<Mac> {
    let bytes: Vec<u8> = duid.split(':').map(|pair| u8::from_str_radix(pair, 16).ok()).collect::<Option<_>>()?;
    let card = match bytes[..] {
        [0, 1, 0, 1, _, _, _, _, ref card @ ..] | [0, 3, 0, 1, ref card @ ..] => card,
        _ => return None,
    };
    card.try_into().ok().map(Mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_as_dnsmasq_writes_them() {
        let text = "1796000000 52:54:00:aa:00:01 192.168.122.50 lin 01:52:54:00:aa:00:01\n\
            0 52:54:00:aa:00:02 192.168.122.51 * *\n\
            1796000000 52:54:00:aa:00:03 192.168.122.52 a;b *\n\
            garbage\n12 x\n\
            duid 00:01:00:01:2a:2a:2a:2a:52:54:00:ff:ff:ff\n\
            1796000001 1114112 fd00::17 lin 00:01:00:01:18:aa:62:fe:52:54:00:aa:00:01\n\
            1796000001 T7 fd00::18 * 00:02:00:00:ab:11\n";
        assert_eq!(read(text, 2, |_| 24).len(), 2, "no more than are given");
        let leases = read(text, 1000, |address| if address.is_ipv4() { 24 } else { 64 });
        assert_eq!(leases.len(), 5);
        assert_eq!((leases[0].host_name.as_str(), leases[0].prefix, leases[0].expires), ("lin", 24, 1_796_000_000));
        assert_eq!(leases[0].client_id.as_deref(), Some("01:52:54:00:aa:00:01"));
        assert_eq!((leases[1].host_name.as_str(), leases[1].expires, &leases[1].client_id), ("", 0, &None));
        assert_eq!(leases[2].host_name, "", "no name is shown that is none");
        assert_eq!((leases[3].mac, leases[3].iaid), (leases[0].mac, Some(1_114_112)));
        assert_eq!((leases[4].mac, leases[4].iaid, leases[4].prefix), (None, Some(7), 64));
    }

    #[test]
    fn what_guests_say_of_themselves_leaves_room_for_all() {
        let line =
            |n: usize| format!("0 52:54:00:aa:00:01 10.0.{}.{} * {}\n", n / 256, n % 256, "00:".repeat(300) + "00");
        let text: String = (0..5000).map(line).collect();
        let leases = read(&text, 65_536, |_| 16);
        let told = leases.iter().filter(|lease| lease.client_id.is_some()).count();
        assert_eq!((leases.len(), told), (5000, ROOM / (902 + OF_ONE)));
        assert!(leases[told - 1].client_id.is_some() && leases[told].client_id.is_none());
    }

    #[tokio::test]
    async fn a_touch_is_told_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("told");
        std::fs::write(&file, "").unwrap();
        let watched = WatchedLeases::new(&file).unwrap();
        for _ in 0..3 {
            let touch = rustix::fs::open(&file, OFlags::WRONLY, Mode::empty()).unwrap();
            drop(touch);
            watched.touched().await.unwrap();
        }
    }
}
