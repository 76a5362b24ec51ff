//! What a person does at a machine: looks at its screens, presses its keys. None of it changes the machine's configuration or
//! state, so it waits for nothing that is done to the machine, and keeps nobody waiting (`Domain::beside`).

use super::Domain;
use crate::authz::{Action, Caller};
use crate::error::{Error, Result};
use crate::verb;
use std::os::fd::OwnedFd;
use std::time::Duration;
use virt_model::device::CharSource;
use virt_model::device::chardev::CharKind;
use virt_model::device::display::VideoKind;
use virt_model::domain::DomainDef;
use virt_model::driver::{ConsoleOptions, DriverError, Screen};
use virt_model::keys::Codeset;
use virt_model::xml::shorten;

/// So many keys are pressed at once at most.
const MOST_KEYS: usize = 16;
/// So long are keys held at most.
const LONGEST_HOLD: Duration = Duration::from_secs(5);

impl Domain {
    /// A picture of what one of the screens shows, a PNG file in memory that nobody can change any more, from its beginning.
    /// Errors: `NoSuchDevice` if it has no such screen, `TimedOut` if the hypervisor does not draw it soon.
    pub async fn screenshot(&self, caller: &Caller, screen: u32) -> Result<OwnedFd> {
        self.beside(caller, &verb::SCREENSHOT, async {
            let guest = self.guest()?;
            let screens = screens(&guest.live);
            let wanted = usize::try_from(screen).ok().and_then(|screen| screens.get(screen));
            let wanted = wanted.ok_or_else(|| self.has_no("screen", screen, screens.len()))?;
            let drawn = guest.instance.screenshot(wanted).await;
            drawn.map_err(|e| Error::from_driver(&self.name(), verb::SCREENSHOT.word, e))
        })
        .await
    }

    /// A connection to the display that the `<graphics>` of this index offers, which speaks its protocol from the beginning;
    /// with `skip_auth` the display asks for no password, for who may have that.
    /// Errors: `NoSuchDevice` if there is no such element, `OperationUnsupported` if it offers none.
    pub async fn open_graphics(&self, caller: &Caller, index: u32, skip_auth: bool) -> Result<OwnedFd> {
        self.beside(caller, &verb::OPEN_GRAPHICS, async {
            if skip_auth {
                self.allow(caller, Action::SkipAuth).await?;
            }
            let guest = self.guest()?;
            let all = &guest.live.devices.graphics;
            let wanted = usize::try_from(index).ok().and_then(|index| all.get(index));
            let wanted = wanted.ok_or_else(|| self.has_no("graphics", index, all.len()))?;
            let opened = guest.instance.open_graphics(wanted, skip_auth).await;
            opened.map_err(|e| Error::from_driver(&self.name(), verb::OPEN_GRAPHICS.word, e))
        })
        .await
    }

    /// A connection to the host's end of the channel of that name.
    /// Errors: `NoSuchDevice` if there is none, `Busy` while another client has it, `OperationUnsupported` for one that others
    /// serve.
    pub async fn open_channel(&self, caller: &Caller, name: &str) -> Result<OwnedFd> {
        self.beside(caller, &verb::OPEN_CHANNEL, async {
            let guest = self.guest()?;
            let channel = guest.live.devices.channels.iter().find(|one| one.target.name.as_deref() == Some(name));
            let channel = channel.ok_or_else(|| {
                Error::NoSuchDevice(format!("domain '{}' has no channel '{}'", self.name(), shorten(name)))
            })?;
            guest.instance.open_channel(channel).await.map_err(|error| match error {
                DriverError::Refused(job) => {
                    Error::Busy { object: format!("channel '{name}' of domain '{}'", self.name()), job }
                }
                other => Error::from_driver(&self.name(), &format!("open channel '{name}' of"), other),
            })
        })
        .await
    }

    /// A connection to a serial port or console, by its alias; with an empty one to the first serial port or, for want of any, to
    /// the first console.
    /// Errors: `NoSuchDevice` if there is none, `OperationUnsupported` where what is said goes to another place, `Busy` while
    /// another client is there.
    pub async fn open_console(&self, caller: &Caller, device: &str, options: ConsoleOptions) -> Result<OwnedFd> {
        self.beside(caller, &verb::OPEN_CONSOLE, async {
            let guest = self.guest()?;
            let (alias, source) = console(&guest.live, device).ok_or_else(|| {
                let which = if device.is_empty() { String::new() } else { format!(" '{}'", shorten(device)) };
                Error::NoSuchDevice(format!("domain '{}' has no serial port or console{which}", self.name()))
            })?;
            let failed = |error| match error {
                DriverError::Refused(job) => {
                    Error::Busy { object: format!("console '{alias}' of domain '{}'", self.name()), job }
                }
                other => Error::from_driver(&self.name(), &format!("open console '{alias}' of"), other),
            };
            if source.kind != CharKind::Pty {
                let text = format!("it is of type='{}' with a place of its own; look there", source.kind);
                return Err(failed(DriverError::Unsupported(text)));
            }
            guest.instance.open_console(alias, source, options).await.map_err(failed)
        })
        .await
    }

    /// Presses keys all at once and lets them go after a while (0: as long as the hypervisor does by itself). Returns when they
    /// are pressed; a second call waits until those of the first are.
    /// Errors: `InvalidArgument` for a codeset or a code that there is not, and for too many keys or too long; `TimedOut` if
    /// the hypervisor does not answer, after which they may be pressed still.
    pub async fn send_key(&self, caller: &Caller, codeset: &str, hold_usec: u64, keys: &[u32]) -> Result<()> {
        self.beside(caller, &verb::SEND_KEY, async {
            let (keys, hold) = (pressed(codeset, keys)?, hold(hold_usec)?);
            let sent = self.guest()?.instance.send_keys(&keys, hold).await;
            sent.map_err(|e| Error::from_driver(&self.name(), verb::SEND_KEY.word, e))
        })
        .await
    }

    pub(super) fn has_no(&self, what: &str, index: u32, count: usize) -> Error {
        let there = match count {
            0 => "it has none".to_owned(),
            1 => "it has one, number 0".to_owned(),
            _ => format!("it has {count}, from number 0 on"),
        };
        Error::NoSuchDevice(format!("domain '{}' has no {what} {index}: {there}", self.name()))
    }
}

/// The screens of a machine, in the order of its cards. A card of virtio has as many as it has heads, any other has one.
fn screens(def: &DomainDef) -> Vec<Screen> {
    let cards = def.devices.videos.iter().filter(|video| video.model.kind != VideoKind::None);
    let each = cards.flat_map(|video| {
        let heads = if video.model.kind == VideoKind::Virtio { video.model.heads.unwrap_or(1) } else { 1 };
        let card = video.info.alias().unwrap_or_default().to_owned();
        (0..heads).map(move |head| Screen { card: card.clone(), head })
    });
    each.collect()
}

/// The serial port or console of that alias, or the first of all; a console that is a serial port goes by that one's alias.
fn console<'d>(def: &'d DomainDef, device: &str) -> Option<(&'d str, &'d CharSource)> {
    let mut all = def.devices.all_consoles().map(|one| (one.info.alias().unwrap_or_default(), one.source));
    all.find(|(alias, _)| device.is_empty() || *alias == device)
}

/// The numbers of the keys that have these codes.
fn pressed(codeset: &str, keys: &[u32]) -> Result<Vec<u8>> {
    let refuse = |why: String| Err(Error::InvalidArgument(why));
    let none = |code: u32, known: Codeset| {
        Error::InvalidArgument(format!("no key has the code {code} ({code:#x}) in the codeset '{known}'"))
    };
    let Some(known) = Codeset::named(codeset) else {
        let all: Vec<_> = Codeset::ALL.iter().map(|codeset| codeset.as_str()).collect();
        return refuse(format!("there is no codeset '{}'; there are {}", shorten(codeset), all.join(", ")));
    };
    if keys.is_empty() || keys.len() > MOST_KEYS {
        return refuse(format!("1 to {MOST_KEYS} keys are pressed at once, not {}", keys.len()));
    }
    keys.iter().map(|code| known.key(*code).ok_or_else(|| none(*code, known))).collect()
}

/// How long keys are held; `None`: as the hypervisor likes.
fn hold(usec: u64) -> Result<Option<Duration>> {
    let hold = Duration::from_micros(usec);
    if hold > LONGEST_HOLD {
        let (given, most) = (usec, LONGEST_HOLD.as_micros());
        return Err(Error::InvalidArgument(format!("keys are held for at most {most} microseconds, not {given}")));
    }
    Ok((usec > 0).then_some(hold))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_pressed_is_named() {
        let refused = |codeset: &str, keys: &[u32]| pressed(codeset, keys).unwrap_err().to_string();
        assert_eq!(pressed("linux", &[29, 56, 111]).unwrap(), [0x1d, 0x38, 0xd3]);
        let unknown = refused("dvorak", &[1]);
        assert!(unknown.contains("'dvorak'") && unknown.contains("linux, xt, qnum, usb"), "{unknown}");
        let unknown = refused("usb", &[4, 0x5555]);
        assert!(unknown.contains("0x5555") && unknown.contains("'usb'"), "{unknown}");
        assert!(refused("linux", &[]).contains("not 0"));
        assert!(refused("linux", &[30; MOST_KEYS + 1]).contains("not 17"));
        assert_eq!(hold(0).unwrap(), None);
        assert_eq!(hold(1500).unwrap(), Some(Duration::from_micros(1500)));
        assert!(hold(u64::MAX).unwrap_err().to_string().contains("5000000"));
    }

    #[test]
    fn a_console_is_found_by_its_alias_and_the_first_without() {
        let of = |devices: &str, device: &str| {
            let text =
                format!("<domain type='test'><name>d</name><memory>1</memory><devices>{devices}</devices></domain>");
            let def = DomainDef::parse(&text).expect("a machine");
            console(&def, device).map(|(alias, source)| (alias.to_owned(), source.kind))
        };
        let virtio = "<console type='pty'><target type='virtio'/><alias name='console1'/></console>";
        let both = "<serial type='file'><source path='/a'/><alias name='serial0'/></serial>\
                    <console type='file'><target type='serial'/><alias name='serial0'/></console>";
        let both = [both, virtio].concat();
        for first in ["", "serial0"] {
            assert_eq!(of(&both, first), Some(("serial0".to_owned(), CharKind::File)));
        }
        assert_eq!(of(&both, "console1"), Some(("console1".to_owned(), CharKind::Pty)));
        assert_eq!(of(virtio, ""), Some(("console1".to_owned(), CharKind::Pty)));
        assert_eq!(of(&both, "console0"), None);
        assert_eq!(of("", ""), None);
    }

    #[test]
    fn screens_are_counted_over_all_cards() {
        let of = |cards: &str| {
            let text =
                format!("<domain type='qemu'><name>d</name><memory>1</memory><devices>{cards}</devices></domain>");
            screens(&DomainDef::parse(&text).expect("a machine"))
        };
        let screen = |card: &str, head| Screen { card: card.to_owned(), head };
        let cards = "<video><model type='qxl' heads='4'/><alias name='video0'/></video>\
                     <video><model type='virtio' heads='2'/><alias name='video1'/></video>";
        assert_eq!(of(cards), [screen("video0", 0), screen("video1", 0), screen("video1", 1)]);
        assert_eq!(of("<video><model type='none'/></video>"), []);
        assert_eq!(of(""), []);
    }
}
