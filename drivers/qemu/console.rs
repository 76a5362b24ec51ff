//! A person at a running QEMU: pictures of its screens, connections to its displays and channels, keys.
//!
//! ```text
//!  picture:  file in memory ──add-fd──▶ QEMU draws into it ──▶ sealed, and cut to what is a picture
//!  display, channel:  a pair of sockets ──getfd, add_client──▶ QEMU has one end, whoever asked the other
//! ```
//!
//! QEMU may have been taken over by its guest. What it writes into a picture is its own memory, as any other that it takes; a
//! picture of more than [`LARGEST`] bytes is not handed on, and none that QEMU could still change.

use super::instance::Body;
use super::qmp::{COMMAND_TIMEOUT, QmpError};
use crate::agent::CHANNEL as AGENT;
use crate::host::acl::through;
use crate::host::workers::{ClosedAside, blocking};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, openat};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::{Value, json};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use virt_model::device::Graphics;
use virt_model::device::chardev::Channel;
use virt_model::device::display::GraphicsKind;
use virt_model::driver::{DriverError, Screen};

/// The largest picture, in bytes: one of the largest screens there are, with nothing in it that repeats.
const LARGEST: u64 = 256 << 20;
/// A picture has at most so many chunks; QEMU makes one of each 8 KiB or so.
const MOST_CHUNKS: usize = 1 << 16;
/// What begins every PNG file.
const SIGNATURE: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

impl Body {
    /// Has QEMU draw what a screen shows; one picture at a time.
    pub async fn screenshot(&self, screen: &Screen) -> Result<OwnedFd, DriverError> {
        let within = Instant::now() + COMMAND_TIMEOUT;
        let late = |_| DriverError::TimedOut("QEMU did not draw its screen in time".to_owned());
        let _drawing = timeout_at(within, self.drawing.lock()).await.map_err(late)?;
        let monitor = self.monitor()?;
        let (picture, writable) = Picture::begin().map_err(no_room)?;
        // QEMU reads the number as an int. Were one not its own, an earlier virtd's picture could be meant.
        let set = Uuid::new_v4().as_u128() as u32 >> 2 | 1 << 30;
        let drawn = timeout_at(within, async {
            let file = vec![ClosedAside::of(writable)];
            monitor.execute_with("add-fd", json!({ "fdset-id": set }), file, COMMAND_TIMEOUT).await?;
            let (file, Screen { card, head }) = (format!("/dev/fdset/{set}"), screen);
            let arguments = json!({ "filename": file, "format": "png", "device": card, "head": head });
            monitor.execute("screendump", arguments).await
        });
        let drawn = drawn.await;
        monitor.tell("remove-fd", json!({ "fdset-id": set })).await;
        drawn.map_err(late)??;
        let finished = blocking(|| picture.finish()).await?;
        finished.map_err(|e| DriverError::Hypervisor(format!("what QEMU drew of its screen is no picture: {e}")))
    }

    /// Connects whoever asked to a display.
    pub async fn open_graphics(&self, graphics: &Graphics, skip_auth: bool) -> Result<OwnedFd, DriverError> {
        let protocol = protocol(graphics.kind)?;
        self.add_client(json!({ "protocol": protocol, "skipauth": skip_auth })).await
    }

    /// Connects whoever asked to a channel whose socket is in the guest's own folder, for want of another place: that socket is
    /// left alone, as QEMU could put anything there. Error: `Refused` while somebody else is connected.
    pub async fn open_channel(&self, channel: &Channel) -> Result<OwnedFd, DriverError> {
        let own = channel.source.path().is_some_and(|path| Path::new(path).starts_with(self.leavings.own_dir()));
        if !own {
            let text = format!("it is of type='{}' with a place of its own; connect there", channel.source.kind);
            return Err(DriverError::Unsupported(text));
        }
        if channel.target.name.as_deref() == Some(AGENT) {
            return Err(DriverError::Unsupported("virtd itself speaks to the guest agent".to_owned()));
        }
        let back_end = format!("char{}", channel.info.alias().unwrap_or_default());
        self.add_client(json!({ "protocol": back_end })).await.map_err(|error| match error {
            DriverError::Hypervisor(why) if why.contains("failed to add client") => {
                DriverError::Refused("another client".to_owned())
            }
            other => other,
        })
    }

    /// Gives QEMU one end of a pair of sockets, for what `arguments` name.
    async fn add_client(&self, mut arguments: Value) -> Result<OwnedFd, DriverError> {
        let monitor = self.monitor()?;
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair.map_err(|e| no_room(e.into()))?;
        let name = format!("virtd-client-{}", Uuid::new_v4());
        arguments["fdname"] = json!(name);
        let opened = timeout(COMMAND_TIMEOUT, async {
            let end = vec![ClosedAside::of(theirs.into())];
            monitor.execute_with("getfd", json!({ "fdname": name }), end, COMMAND_TIMEOUT).await?;
            monitor.execute("add_client", arguments).await
        });
        let late = |_| DriverError::TimedOut("QEMU did not take a client in time".to_owned());
        let opened = opened.await.map_err(late).and_then(|opened| Ok(opened?));
        if opened.is_err() {
            monitor.tell("closefd", json!({ "fdname": name })).await;
        }
        opened.map(|_| ours)
    }

    /// Presses keys, by their numbers, of one call at a time: QEMU keeps those that wait in a line, which it works off even if
    /// nobody waits for it any more. Returns when they are pressed. Error: `TimedOut`, after which they may be pressed still.
    pub async fn send_keys(&self, keys: &[u8], hold: Option<Duration>) -> Result<(), DriverError> {
        let keys: Vec<Value> = keys.iter().map(|key| json!({ "type": "number", "data": key })).collect();
        let mut arguments = json!({ "keys": keys });
        if let Some(hold) = hold {
            arguments["hold-time"] = json!(u64::try_from(hold.as_millis()).unwrap_or(u64::MAX).max(1));
        }
        let within = Instant::now() + COMMAND_TIMEOUT;
        let turn = timeout_at(within, self.pressing.lock()).await;
        let _pressing = turn.map_err(|_| {
            DriverError::TimedOut("an earlier send-key is not done yet; the keys of this one were not sent".to_owned())
        })?;
        let monitor = self.monitor()?;
        match timeout_at(within, monitor.execute("send-key", arguments)).await {
            Ok(Err(QmpError::TimedOut(_))) | Err(_) => Err(DriverError::TimedOut(
                "QEMU did not answer send-key in time; the keys may still be pressed when it does".to_owned(),
            )),
            Ok(sent) => Ok(sent.map(drop)?),
        }
    }

    /// Wakes a guest that sleeps. Returns when it is awake.
    pub async fn wake_up(&self) -> Result<(), DriverError> {
        match self.reporter.guest(|guest| guest.is_asleep()) {
            true => self.resume().await,
            false => Err(DriverError::Refused("the guest does not sleep".to_owned())),
        }
    }
}

/// What QEMU calls a display where it is given clients: it has one of each protocol.
fn protocol(kind: GraphicsKind) -> Result<&'static str, DriverError> {
    match kind {
        GraphicsKind::Vnc => Ok("vnc"),
        GraphicsKind::Spice => Ok("spice"),
        GraphicsKind::Dbus => Ok("@dbus-display"),
        other => Err(DriverError::Unsupported(format!(
            "graphics of type='{other}' speak no protocol; use those of type 'vnc', 'spice' or 'dbus'"
        ))),
    }
}

fn no_room(error: io::Error) -> DriverError {
    DriverError::Internal(format!("no descriptor for QEMU: {error}"))
}

/// A picture in the making.
///
/// Its memory is the guest's: QEMU wrote it, so the kernel charges it to the guest's control group for as long as whoever
/// asked keeps the descriptor. It is not copied into memory of virtd's, since nobody bounds how many pictures are kept, and
/// for how long: in the guest's group they cost the machine of which the caller may use the console, in virtd's all of them.
struct Picture(OwnedFd);

impl Picture {
    /// A file in memory, and its end that is written to: QEMU takes none that can be read, too.
    fn begin() -> io::Result<(Picture, File)> {
        let file = memfd_create("screenshot", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let writable = openat(CWD, through(&file), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok((Picture(file), writable.into()))
    }

    /// What was drawn, and no more, which nobody can change. Blocks for moments.
    fn finish(self) -> io::Result<OwnedFd> {
        fcntl_add_seals(&self.0, SealFlags::WRITE | SealFlags::GROW)?;
        let file = File::from(self.0);
        let size = file.metadata()?.len();
        if size > LARGEST {
            return Err(bad(&format!("it has {size} bytes, and no more than {LARGEST} are handed on")));
        }
        ftruncate(&file, png_length(&file)?)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(file.into())
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// How many bytes of a file are a PNG, which has a last chunk.
fn png_length(file: &File) -> io::Result<u64> {
    let read = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).map(|()| bytes).map_err(|_| bad("it is cut off"))
    };
    if read(0)? != SIGNATURE {
        return Err(bad("it does not begin as a PNG"));
    }
    let mut at = SIGNATURE.len() as u64;
    for _ in 0..MOST_CHUNKS {
        let [a, b, c, d, kind @ ..] = read(at)?;
        // The length of what the chunk holds; its own, its kind and a checksum come to that.
        at += u64::from(u32::from_be_bytes([a, b, c, d])) + 12;
        if &kind == b"IEND" {
            return Ok(at);
        }
    }
    Err(bad("it has no end"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    fn chunk(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
        let length = u32::try_from(content.len()).unwrap();
        [&length.to_be_bytes()[..], kind, content, &[0; 4]].concat()
    }

    fn drawn(bytes: &[u8]) -> io::Result<OwnedFd> {
        let (picture, mut writable) = Picture::begin().unwrap();
        writable.write_all(bytes).unwrap();
        picture.finish()
    }

    #[test]
    fn a_picture_is_as_long_as_what_was_drawn_and_nobody_changes_it_any_more() {
        let (picture, mut writable) = Picture::begin().unwrap();
        let png =
            [&SIGNATURE[..], &chunk(b"IHDR", &[1; 13]), &chunk(b"IDAT", &[2; 999]), &chunk(b"IEND", b"")].concat();
        writable.write_all(&png).unwrap();
        let mut file = File::from(picture.finish().unwrap());
        writable.write_all(b"more").expect_err("QEMU has still an end, and it is of no use to it");
        file.set_len(0).expect_err("nor is it to whoever gets it");
        let mut read = Vec::new();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, png, "from its beginning");
    }

    #[test]
    fn what_is_no_picture_is_not_handed_on() {
        let mut endless = SIGNATURE.to_vec();
        endless.extend(chunk(b"IDAT", b"").repeat(MOST_CHUNKS));
        let huge = [&SIGNATURE[..], &u32::MAX.to_be_bytes(), b"IDAT"].concat();
        for (bytes, why) in [
            (b"P6 720 400".to_vec(), "begin"),
            (Vec::new(), "cut off"),
            (SIGNATURE.to_vec(), "cut off"),
            (huge, "cut off"),
            (endless, "no end"),
        ] {
            let error = drawn(&bytes).expect_err(why).to_string();
            assert!(error.contains(why), "{error}");
        }
        // The last chunk says that it is longer than the file.
        drawn(&[&SIGNATURE[..], &9u32.to_be_bytes(), b"IEND\0\0\0\0"].concat()).expect_err("it is cut off");
    }

    #[test]
    fn what_speaks_no_protocol_is_not_opened() {
        assert_eq!(protocol(GraphicsKind::Dbus).unwrap(), "@dbus-display");
        let error = protocol(GraphicsKind::EglHeadless).unwrap_err();
        assert!(matches!(&error, DriverError::Unsupported(text) if text.contains("egl-headless")), "{error}");
    }

    #[test]
    fn a_picture_is_no_larger_than_it_may_be() {
        let (picture, mut writable) = Picture::begin().unwrap();
        let png = [&SIGNATURE[..], &chunk(b"IDAT", b"x"), &chunk(b"IEND", b"")].concat();
        writable.write_all(&png).unwrap();
        writable.set_len(LARGEST + 1).unwrap();
        let error = picture.finish().expect_err("it is larger").to_string();
        assert!(error.contains("bytes"), "{error}");
        let (picture, mut writable) = Picture::begin().unwrap();
        writable.write_all(&png).unwrap();
        writable.set_len(LARGEST).unwrap();
        let cut = File::from(picture.finish().unwrap());
        assert_eq!(cut.metadata().unwrap().len(), png.len() as u64, "what follows the picture is not handed on");
    }
}
