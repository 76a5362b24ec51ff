//! When others change rules of nftables: the kernel tells of each change at once, so nobody has to look again and again. What it
//! says is only whose the change is; what rules there are now is listed after it.

use super::foreign;
use netlink_packet_core::{NetlinkBuffer, NlasIterator};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

/// The kernel's group of all that is told of nftables (`NFNLGRP_NFTABLES`, 7), as a bit.
const GROUP: u32 = 1 << 6;
/// The high byte of nftables' messages (`NFNL_SUBSYS_NFTABLES`).
const NFTABLES: u16 = 10;
/// Tables, chains and rules that are new and that are gone, in the low byte. What is in a set or counted says nothing here: a
/// program that bans addresses changes it all the time.
const TABLES_CHAINS_RULES: [u16; 6] = [0, 2, 3, 5, 6, 8];
/// What a message begins with, in bytes: family, version, number.
const HEAD: usize = 4;
/// The attribute that names the table, of tables, chains and rules alike.
const TABLE: u16 = 1;
/// The most that the kernel tells at once, in bytes; of more than that, whose it is is not known.
const AT_ONCE: usize = 64 << 10;

/// Whoever changes rules does so in many steps: they have finished when none has come for so long.
const QUIET: Duration = Duration::from_millis(200);
/// Whoever never finishes is looked at so often.
const AT_LEAST: Duration = Duration::from_secs(2);

/// Hears of others' changes as long as it is there.
pub struct RuleChanges(AsyncFd<Listener>);

/// The socket on which the kernel tells; it stays open as long as it is listened to.
struct Listener(OwnedFd);

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl RuleChanges {
    /// Hears what is changed from now on in the network namespace of the calling thread. Must be called within the runtime.
    /// Error: the caller may not (this needs `CAP_NET_ADMIN`), or the kernel has no netfilter.
    pub fn listen() -> io::Result<RuleChanges> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUP))?;
        // SAFETY: Listener owns its descriptor and always shows the same one.
        let listener =
            unsafe { AsyncFd::register_with_interest(Listener(socket), Interest::READABLE | Interest::ERROR) };
        listener.map(RuleChanges).map_err(|error| io::Error::other(error.to_string()))
    }

    /// Waits until others have changed rules and have finished with it, or have been at it for [`AT_LEAST`]. Once for all their
    /// changes meanwhile. What was changed and not waited for is told by the next call.
    pub async fn settled(&self) -> io::Result<()> {
        let mut room = vec![0; AT_ONCE];
        self.change(&mut room).await?;
        let latest = Instant::now() + AT_LEAST;
        loop {
            let now = Instant::now();
            // The end of their changes is no event: it is that none comes.
            match timeout_at(latest.min(now + QUIET), self.change(&mut room)).await {
                Ok(another) if now < latest => another?,
                Ok(another) => return another,
                Err(_) => return Ok(()),
            }
        }
    }

    /// Waits for a change by others.
    async fn change(&self, room: &mut [u8]) -> io::Result<()> {
        loop {
            let mut ready = self.0.ready(Interest::READABLE | Interest::ERROR).await?;
            match self.receive(room) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether what has come next may be a change by others. Error: `WouldBlock` when nothing has come.
    pub(super) fn receive(&self, room: &mut [u8]) -> io::Result<bool> {
        // The whole length is told, also of what has no room.
        let received = recvfrom(&self.0.get_ref().0, &mut *room, RecvFlags::DONTWAIT | RecvFlags::TRUNC);
        let (_, length, sender) = match received {
            // Messages were lost, and whose they were is not known.
            Err(rustix::io::Errno::NOBUFS) => return Ok(true),
            received => received?,
        };
        let by_kernel = sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok()).map(|sender| sender.pid());
        Ok(by_kernel == Some(0) && room.get(..length).is_none_or(is_of_others))
    }
}

/// Whether one of the messages that came at once is of a change by others, or cannot be read.
fn is_of_others(mut told: &[u8]) -> bool {
    while !told.is_empty() {
        let Ok(message) = NetlinkBuffer::new_checked(told) else { return true };
        let (kind, length) = (message.message_type(), message.length() as usize);
        let is_heard = kind >> 8 == NFTABLES && TABLES_CHAINS_RULES.contains(&(kind & 0xff));
        if is_heard && table(message.payload()).is_none_or(|(family, table)| foreign::concerns(family, &table)) {
            return true;
        }
        // Each begins at a multiple of four.
        told = told.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// The family and the name of the table that a message is about, if it can be read.
fn table(message: &[u8]) -> Option<(&'static str, String)> {
    let family = match message.first()? {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => return None,
    };
    let attributes = NlasIterator::new(message.get(HEAD..)?);
    let name = attributes.map_while(Result::ok).find(|attribute| attribute.kind() == TABLE)?;
    let name = name.value().split(|byte| *byte == 0).next()?;
    Some((family, String::from_utf8_lossy(name).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message as the kernel sends it.
    fn message(kind: u16, family: u8, table: &str) -> Vec<u8> {
        let name = [table.as_bytes(), &[0]].concat();
        let mut body = vec![family, 0, 0, 0];
        for (kind, value) in [(3_u16, &[0, 0, 0, 9][..]), (TABLE, &name)] {
            body.extend((value.len() as u16 + 4).to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut message = (body.len() as u32 + 16).to_ne_bytes().to_vec();
        message.extend((NFTABLES << 8 | kind).to_ne_bytes());
        message.extend([0; 10]);
        [message, body].concat()
    }

    #[test]
    fn only_others_chains_and_rules_are_heard() {
        let (new_chain, new_rule, del_table) = (3, 6, 2);
        for kind in [new_chain, new_rule, del_table] {
            assert!(is_of_others(&message(kind, 2, "filter")), "{kind}");
            assert!(!is_of_others(&message(kind, 1, "virt_00")), "{kind}: ours");
            assert!(is_of_others(&message(kind, 2, "virt_00")), "{kind}: of a family that is not ours");
            assert!(!is_of_others(&message(kind, 7, "filter")), "{kind}: of no packet that is passed on");
        }
        let (new_set, new_elements, generation) = (9, 12, 15);
        for kind in [new_set, new_elements, generation] {
            assert!(!is_of_others(&message(kind, 2, "filter")), "{kind}");
        }
        let several = [message(new_rule, 1, "virt_00"), message(generation, 0, ""), message(new_rule, 10, "f")];
        assert!(is_of_others(&several.concat()), "the last of several");
        assert!(!is_of_others(&several[..2].concat()));
    }

    #[test]
    fn what_cannot_be_read_may_be_others() {
        let whole = message(6, 1, "virt_00");
        for cut in 1..whole.len() {
            assert!(is_of_others(&whole[..cut]), "{cut}");
        }
        let nameless = [&20_u32.to_ne_bytes()[..], &(NFTABLES << 8).to_ne_bytes(), &[0; 10], &[1, 0, 0, 0]].concat();
        assert!(is_of_others(&nameless) && is_of_others(&message(6, 200, "virt_00")));
        assert!(!is_of_others(&[]));
    }
}
