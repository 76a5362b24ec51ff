//! Keys: what they are called in each codeset, as data (`keys.txt`).

use crate::domain::value::choices;

choices! {
    /// Who gave the keys their codes.
    pub enum Codeset {
        Linux = "linux", Xt = "xt", Qnum = "qnum", Usb = "usb", AtSet1 = "atset1", AtSet2 = "atset2", AtSet3 = "atset3",
        Win32 = "win32", OsX = "os-x",
    }
}

/// The table's columns after the name.
const COLUMNS: usize = 8;
/// Which of them is the one in QEMU's own numbers.
const QNUM: usize = 1;

impl Codeset {
    /// The codeset of that name.
    pub fn named(word: &str) -> Option<Codeset> {
        Codeset::ALL.iter().copied().find(|codeset| codeset.as_str() == word)
    }

    /// The number of the key that has this code, in the way that hypervisors number keys (set 1, with the prefix e0 as the high
    /// bit); `None`: there is no such key.
    pub fn key(self, code: u32) -> Option<u8> {
        let column = self.column();
        let row = rows().find(|row| codes(row[column]).any(|one| one == code))?;
        codes(row[QNUM]).next().and_then(|number| u8::try_from(number).ok())
    }

    /// The keyboards of the first PCs have the scan codes of set 1.
    fn column(self) -> usize {
        match self {
            Codeset::Linux => 0,
            Codeset::Qnum => QNUM,
            Codeset::Xt | Codeset::AtSet1 => 2,
            Codeset::AtSet2 => 3,
            Codeset::AtSet3 => 4,
            Codeset::Usb => 5,
            Codeset::Win32 => 6,
            Codeset::OsX => 7,
        }
    }
}

/// The rows of the table, without names.
fn rows() -> impl Iterator<Item = [&'static str; COLUMNS]> {
    let lines = include_str!("keys.txt").lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_whitespace().skip(1).collect::<Vec<_>>().try_into().ok())
}

/// The codes in a place of the table.
fn codes(place: &'static str) -> impl Iterator<Item = u32> {
    place.split(',').filter_map(|code| match code.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => code.parse().ok(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_line_of_the_table_is_a_row_of_codes() {
        let lines: Vec<_> = include_str!("keys.txt").lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(rows().count(), lines.len());
        assert!(lines.len() > 150);
        let names: HashSet<_> = lines.iter().filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(names.len(), lines.len(), "a name stands there twice");
        for place in rows().flatten() {
            assert!(place == "-" || codes(place).count() == place.split(',').count(), "{place}");
        }
        assert!(rows().all(|row| row[..=2].iter().all(|place| *place != "-")), "each has these");
    }

    /// No two keys have the same code, so each code of each key leads back to it.
    #[test]
    fn every_code_of_every_codeset_leads_back_to_its_key() {
        for codeset in Codeset::ALL {
            let mut seen = HashSet::new();
            for row in rows() {
                let number = codes(row[QNUM]).next().and_then(|number| u8::try_from(number).ok());
                assert!(number.is_some(), "{row:?}");
                for code in codes(row[codeset.column()]) {
                    assert!(seen.insert(code), "{codeset}: {code:#x} is of two keys");
                    assert_eq!(codeset.key(code), number, "{codeset}: {code:#x}");
                }
            }
            assert!(seen.len() > 100, "{codeset}");
        }
    }

    /// QEMU's numbers are those of set 1, with the prefix as the high bit; the two of Korean keyboards have none.
    #[test]
    fn the_numbers_are_those_of_set_1() {
        for row in rows() {
            for (number, scan) in codes(row[QNUM]).zip(codes(row[Codeset::AtSet1.column()])) {
                let expected = match scan {
                    0xf1 | 0xf2 => scan & 0x7f,
                    _ if scan >> 8 == 0xe0 => 0x80 | scan & 0x7f,
                    _ => scan,
                };
                assert_eq!(number, expected, "{row:?}");
                assert!(scan < 0x100 || scan >> 8 == 0xe0, "{row:?}");
            }
        }
    }

    /// What a person would look up: Ctrl, Alt and Delete in each codeset.
    #[test]
    fn the_three_keys_that_everybody_presses_are_known_in_every_codeset() {
        for (codeset, keys) in [
            (Codeset::Linux, [29, 56, 111]),
            (Codeset::Xt, [0x1d, 0x38, 0xe053]),
            (Codeset::Qnum, [0x1d, 0x38, 0xd3]),
            (Codeset::Usb, [0xe0, 0xe2, 0x4c]),
            (Codeset::AtSet1, [0x1d, 0x38, 0xe053]),
            (Codeset::AtSet2, [0x14, 0x11, 0xe071]),
            (Codeset::AtSet3, [0x11, 0x19, 0x64]),
            (Codeset::Win32, [0x11, 0x12, 0x2e]),
            (Codeset::OsX, [0x3b, 0x3a, 0x75]),
        ] {
            assert_eq!(keys.map(|code| codeset.key(code)), [Some(0x1d), Some(0x38), Some(0xd3)], "{codeset}");
            assert_eq!(codeset.key(0xffff), None, "{codeset}");
            assert_eq!(Codeset::named(codeset.as_str()), Some(codeset));
        }
        assert_eq!(Codeset::named("dvorak"), None);
    }
}
