//! Devices as they are shown, packed: some ten bytes of what an answer takes ten times as many for. There are as many of them as
//! machines, and most are never asked for.
//!
//! ```text
//!  section: length (2), entries       entry: length (2), values       value: key (1), kind (1), content
//! ```
//!
//! All numbers are little-endian, and texts begin with their length (2).

use crate::shown::text::published;

/// The most that is packed of one configuration, in bytes: enough for some hundred devices, and the signals of a change stay small.
const MOST: usize = 32 << 10;

macro_rules! keys {
    ($($name:ident = $word:literal)+) => {
        /// What is said of a device.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Key { $($name,)+ }

        /// The words of the keys, in their order.
        const WORDS: &[&str] = &[$($word,)+];
    };
}

keys! {
    Address = "address"
    Alias = "alias"
    Backing = "backing"
    BootOrder = "boot-order"
    Bus = "bus"
    Device = "device"
    Format = "format"
    Index = "index"
    Link = "link"
    Listen = "listen"
    Mac = "mac"
    Model = "model"
    Name = "name"
    Nvram = "nvram"
    Openable = "openable"
    Password = "password"
    Path = "path"
    Port = "port"
    Product = "product"
    Readonly = "readonly"
    SecureBoot = "secure-boot"
    Serial = "serial"
    Shareable = "shareable"
    Socket = "socket"
    Source = "source"
    Target = "target"
    TlsPort = "tls-port"
    Type = "type"
    Vendor = "vendor"
    Version = "version"
}

/// What is said under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said<'a> {
    /// A text.
    Text(&'a str),
    /// A number.
    Number(u32),
    /// Yes or no.
    Flag(bool),
    /// Several texts.
    Texts(Vec<&'a str>),
}

const TEXT: u8 = 0;
const NUMBER: u8 = 1;
const NO: u8 = 2;
const YES: u8 = 3;
const TEXTS: u8 = 4;

/// Packs sections, one after the other.
#[derive(Default)]
pub(super) struct Packer(Vec<u8>);

/// Packs one entry.
#[derive(Default)]
pub(super) struct Entry(Vec<u8>);

impl Packer {
    /// A section of these entries. Those for which there is no room, and all behind them, are left out.
    pub fn section(mut self, entries: impl IntoIterator<Item = Entry>) -> Packer {
        let start = self.0.len();
        self.0.extend([0, 0]);
        for Entry(entry) in entries {
            if self.0.len() + entry.len() + 2 > MOST {
                break;
            }
            put_length(&mut self.0, entry.len());
            self.0.extend(entry);
        }
        let length = self.0.len() - start - 2;
        self.0.splice(start..start + 2, short(length));
        self
    }

    /// All of them.
    pub fn finish(self) -> Box<[u8]> {
        self.0.into()
    }
}

impl Entry {
    pub fn text(mut self, key: Key, text: Option<&str>) -> Entry {
        if let Some(text) = text {
            self.0.extend([key as u8, TEXT]);
            put_text(&mut self.0, text);
        }
        self
    }

    pub fn number(mut self, key: Key, number: Option<u32>) -> Entry {
        if let Some(number) = number {
            self.0.extend([key as u8, NUMBER]);
            self.0.extend(number.to_le_bytes());
        }
        self
    }

    pub fn flag(mut self, key: Key, flag: impl Into<Option<bool>>) -> Entry {
        if let Some(flag) = flag.into() {
            self.0.extend([key as u8, if flag { YES } else { NO }]);
        }
        self
    }

    /// Nothing is said where there is none.
    pub fn texts(mut self, key: Key, texts: &[String]) -> Entry {
        if !texts.is_empty() {
            let texts = &texts[..texts.len().min(usize::from(u16::MAX))];
            self.0.extend([key as u8, TEXTS]);
            put_length(&mut self.0, texts.len());
            texts.iter().for_each(|text| put_text(&mut self.0, text));
        }
        self
    }
}

fn short(number: usize) -> [u8; 2] {
    u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes()
}

fn put_length(to: &mut Vec<u8>, length: usize) {
    to.extend(short(length));
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    let text = published(text);
    put_length(to, text.len());
    to.extend(text.as_bytes());
}

/// Reads what was packed; there is no more where it ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unpacked<'a>(pub &'a [u8]);

impl<'a> Unpacked<'a> {
    /// The next that begins with its length: a section, or an entry.
    pub fn part(&mut self) -> Option<Unpacked<'a>> {
        let length = self.length()?;
        self.bytes(length).map(Unpacked)
    }

    /// The next value.
    pub fn value(&mut self) -> Option<(&'static str, Said<'a>)> {
        let &[key, kind] = self.bytes(2)? else { return None };
        let said = match kind {
            TEXT => Said::Text(self.text()?),
            NUMBER => Said::Number(u32::from_le_bytes(self.bytes(4)?.try_into().ok()?)),
            TEXTS => {
                let count = self.length()?;
                Said::Texts((0..count).map_while(|_| self.text()).collect())
            }
            flag => Said::Flag(flag == YES),
        };
        Some((WORDS.get(usize::from(key))?, said))
    }

    fn text(&mut self) -> Option<&'a str> {
        let length = self.length()?;
        std::str::from_utf8(self.bytes(length)?).ok()
    }

    fn length(&mut self) -> Option<usize> {
        let bytes = self.bytes(2)?.try_into().ok()?;
        Some(usize::from(u16::from_le_bytes(bytes)))
    }

    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }
}
