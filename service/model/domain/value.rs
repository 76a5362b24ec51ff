//! Values as they stand in attributes and texts: numbers, words, truth, MAC addresses.

use crate::xml::{Element, Finding, Place};
use std::fmt;
use uuid::Uuid;

/// Something that is one string in XML.
pub trait Value: Sized {
    /// Reads it. The error says what was expected: "a whole number".
    fn from_text(text: &str) -> Result<Self, String>;
    /// Writes it, in the one form libvirt writes.
    fn to_text(&self) -> String;
}

impl Value for String {
    fn from_text(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }

    fn to_text(&self) -> String {
        self.clone()
    }
}

/// Whole numbers, decimal or `0x…`.
macro_rules! numbers {
    ($($ty:ty)*) => {$(
        impl Value for $ty {
            fn from_text(text: &str) -> Result<Self, String> {
                let text = text.trim();
                let (sign, digits) = text.strip_prefix('-').map_or(("", text), |rest| ("-", rest));
                let parsed = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
                    Some(hex) if hex.starts_with(['-', '+']) => "".parse(),
                    Some(hex) => <$ty>::from_str_radix(&format!("{sign}{hex}"), 16),
                    None => text.parse(),
                };
                parsed.map_err(|_| format!("a whole number from {} to {}", <$ty>::MIN, <$ty>::MAX))
            }

            fn to_text(&self) -> String {
                self.to_string()
            }
        }
    )*};
}
numbers!(u8 u16 u32 u64 i32 i64);

impl Value for Uuid {
    fn from_text(text: &str) -> Result<Self, String> {
        let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
        Uuid::try_parse(&digits).map_err(|_| "a UUID: 32 hexadecimal digits".to_owned())
    }

    fn to_text(&self) -> String {
        self.hyphenated().to_string()
    }
}

/// Which words stand for truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bool {
    /// `yes`, `no`
    YesNo,
    /// `on`, `off`
    OnOff,
}

impl Bool {
    /// The words for false and true.
    pub fn words(self) -> (&'static str, &'static str) {
        match self {
            Bool::YesNo => ("no", "yes"),
            Bool::OnOff => ("off", "on"),
        }
    }

    pub(crate) fn read(self, text: &str) -> Option<bool> {
        let (no, yes) = self.words();
        if text == yes { Some(true) } else { (text == no).then_some(false) }
    }

    pub(crate) fn put(self, to: &mut Element, name: &str, value: Option<bool>) {
        if let Some(value) = value {
            let (no, yes) = self.words();
            to.set_attr(name, if value { yes } else { no });
        }
    }
}

/// Declares an enum whose variants are words in XML; another word is refused, naming these.
macro_rules! choices {
    ($(#[$meta:meta])* pub enum $name:ident { $first:ident = $fword:literal, $($variant:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(missing_docs, reason = "the words say it")]
        pub enum $name { #[default] $first, $($variant,)* }

        impl $name {
            /// All of them.
            pub const ALL: &[$name] = &[$name::$first, $($name::$variant,)*];

            /// The word in XML.
            pub fn as_str(self) -> &'static str {
                match self { $name::$first => $fword, $($name::$variant => $word,)* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl $crate::domain::value::Value for $name {
            fn from_text(text: &str) -> Result<Self, String> {
                $name::ALL.iter().copied().find(|v| v.as_str() == text).ok_or_else(|| {
                    let words: Vec<_> = $name::ALL.iter().map(|v| v.as_str()).collect();
                    format!("one of {}", words.join(", "))
                })
            }

            fn to_text(&self) -> String {
                self.as_str().to_owned()
            }
        }
    };
}
pub(crate) use choices;

/// A network card's hardware address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A random address in QEMU's range.
    pub fn made_up() -> Mac {
        let random = Uuid::new_v4().into_bytes();
        Mac([0x52, 0x54, 0x00, random[0], random[1], random[2]])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: Vec<_> = self.0.iter().map(|b| format!("{b:02x}")).collect();
        f.write_str(&bytes.join(":"))
    }
}

impl Value for Mac {
    fn from_text(text: &str) -> Result<Self, String> {
        let bytes: Vec<u8> = text
            .trim()
            .split(':')
            .filter(|part| matches!(part.len(), 1 | 2) && part.bytes().all(|b| b.is_ascii_hexdigit()))
            .filter_map(|part| u8::from_str_radix(part, 16).ok())
            .collect();
        let whole = text.split(':').count() == 6;
        let bytes = <[u8; 6]>::try_from(bytes).ok().filter(|_| whole);
        bytes.map(Mac).ok_or_else(|| "a MAC address such as 52:54:00:12:34:56".to_owned())
    }

    fn to_text(&self) -> String {
        self.to_string()
    }
}

/// A set of CPU numbers: `0-3,^2,8`. Written the shortest way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuSet(pub std::collections::BTreeSet<u32>);

/// More CPUs than any host has; bounds, with the length, what a short text can make us do.
const MAX_CPU: u32 = 16_383;
const MAX_CPU_TEXT: usize = 16_384;

impl Value for CpuSet {
    fn from_text(text: &str) -> Result<Self, String> {
        let expected = || format!("a set of CPUs such as 0-3,^2,8 (none above {MAX_CPU})");
        let number = |part: &str| part.trim().parse::<u32>().ok().filter(|n| *n <= MAX_CPU);
        if text.len() > MAX_CPU_TEXT {
            return Err(expected());
        }
        let mut wanted = vec![false; MAX_CPU as usize + 1];
        for part in text.split(',').map(str::trim) {
            let (with, range) = part.strip_prefix('^').map_or((true, part), |rest| (false, rest));
            let (from, to) = range.split_once('-').unwrap_or((range, range));
            let (from, to) = number(from).zip(number(to)).filter(|(a, b)| a <= b).ok_or_else(expected)?;
            wanted[from as usize..=to as usize].fill(with);
        }
        let set: std::collections::BTreeSet<u32> = (0..=MAX_CPU).filter(|cpu| wanted[*cpu as usize]).collect();
        if set.is_empty() { Err(expected()) } else { Ok(CpuSet(set)) }
    }

    fn to_text(&self) -> String {
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for &cpu in &self.0 {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == cpu => *last = cpu,
                _ => ranges.push((cpu, cpu)),
            }
        }
        let text = |(a, b): (u32, u32)| if a == b { a.to_string() } else { format!("{a}-{b}") };
        ranges.into_iter().map(text).collect::<Vec<_>>().join(",")
    }
}

/// What stands at `place` is not as it should be.
pub(crate) fn complain(log: &mut Vec<Finding>, place: &Place, message: impl Into<String>) {
    log.push(Finding::invalid(place, message));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::shorten;

    #[test]
    fn sets_of_cpus() {
        let canonical = |text| CpuSet::from_text(text).map(|set| set.to_text());
        assert_eq!(canonical("0-3,^2,8").unwrap(), "0-1,3,8");
        assert_eq!(canonical(" 5 , 4 , 4 ").unwrap(), "4-5");
        for bad in ["", "3-1", "x", "1-", "^1", "0-16384", "1,,2", &"0-16383,".repeat(4000)] {
            assert!(canonical(bad).is_err(), "{}", shorten(bad));
        }
    }

    #[test]
    fn hardware_addresses() {
        assert_eq!(Mac::from_text("52:54:0:AB:1a:01").unwrap().to_string(), "52:54:00:ab:1a:01");
        for bad in [
            "",
            "52:54:00:ab:1a",
            "52:54:00:ab:1a:01:02",
            "52:54:00:ab:1a:0g",
            "52-54-00-ab-1a-01",
            ":::::",
            "052:54:00:ab:1a:01",
        ] {
            assert!(Mac::from_text(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(u32::from_text("0x1f"), Ok(31));
        assert_eq!(u32::from_text(" 31 "), Ok(31));
        assert_eq!(i32::from_text("-1"), Ok(-1));
        for bad in ["", "0x", "0x-1", "1f", "-1", "4294967296", "1 2"] {
            assert!(u32::from_text(bad).is_err(), "{bad}");
        }
    }
}
